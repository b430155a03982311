#!lua flags=allow-oom
-- Takes a holding queue's first jobs, for a router to place them.
-- KEYS: the holding queue, released, held. Records are named by the queue.
-- ARGV: most jobs, seconds after which those that are not placed are held again.
-- Returns the time, then each job's message, acceptance, deadline (0 = none) and client.
-- Safe to run twice: a job is drawn once, and held again if nobody places it.
--- @include "now"
local queue, released, held = unpack(KEYS)
local answer = {tostring(now)}
local drawn = redis.call('ZPOPMIN', queue, ARGV[1])
for i = 1, #drawn, 2 do
  local job = drawn[i]
  local accepted, due, reply = unpack(redis.call('HMGET', job, 'accepted', 'deadline_at', 'reply'))
  redis.call('ZADD', released, now + ARGV[2], job)
  for _, part in ipairs({redis.call('HGET', held, job), accepted, due, reply or ''}) do
    answer[#answer + 1] = part
  end
end
return answer
