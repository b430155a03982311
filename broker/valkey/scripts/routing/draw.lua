#!lua flags=allow-oom
-- Takes a holding queue's first jobs, for the leader to place them.
-- KEYS: leader, the holding queue, released, held. Records are named by the queue.
-- ARGV: fencing token, most jobs, seconds after which those that are not placed are held again.
-- Returns the time, then each job's message, acceptance, deadline (0 = none) and client; no jobs where the token is not
--   the leader's.
-- Safe to run twice: a job is drawn once, and held again if nobody places it.
--- @include "now"
local queue, released, held = KEYS[2], KEYS[3], KEYS[4]
local answer = {tostring(now)}
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return answer end
local drawn = redis.call('ZPOPMIN', queue, ARGV[2])
for i = 1, #drawn, 2 do
  local job = drawn[i]
  local accepted, due, reply = unpack(redis.call('HMGET', job, 'accepted', 'deadline_at', 'reply'))
  redis.call('ZADD', released, now + ARGV[3], job)
  for _, part in ipairs({redis.call('HGET', held, job), accepted, due, reply or ''}) do
    answer[#answer + 1] = part
  end
end
return answer
