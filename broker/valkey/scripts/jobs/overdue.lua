#!lua flags=allow-oom
-- Takes jobs whose deadline passed and that are to be ended; a group is forgotten once all of it ended.
--
-- KEYS[1] deadlines: sorted set of groups of jobs' keys by their deadline
-- ARGV[1] most groups
-- ARGV[2] seconds after which what has not ended by then is answered again
-- Returns the time, how many groups were due, when the next one is (0 = there is none), then for each of their jobs
--   that has not ended: key, client, state, deadline, acceptance, class and start ('' = unknown). A job that was placed
--   again is in the group of its new deadline. One that runs and has no deadline goes on: the worker that holds it ends
--   it.
-- Safe to run twice, and by several routers: who takes a group postpones it, and removes nothing that has not ended.
--- @include "now"
--- @include "final"
local groups = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, ARGV[1])
local answer = {tostring(now), #groups, '0'}
for _, group in ipairs(groups) do
  local before = #answer
  for _, job in ipairs(cmsgpack.unpack(group)) do
    local fields = redis.call('HMGET', job, 'reply', 'state', 'deadline_at', 'accepted', 'hardware_class', 'started')
    local state, due = fields[2], tonumber(fields[3] or 0)
    if state and not final[state] and due <= now and (due > 0 or state ~= 'running') then
      answer[#answer + 1] = job
      for n = 1, 6 do answer[#answer + 1] = fields[n] or '' end
    end
  end
  if #answer > before then
    redis.call('ZADD', KEYS[1], now + ARGV[2], group)
  else
    redis.call('ZREM', KEYS[1], group)
  end
end
answer[3] = redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')[2] or '0'
return answer
