#!lua flags=allow-oom
-- Draws a holding queue's first jobs, for the leader to place them.
--
-- KEYS[1] the leader's fencing token
-- KEYS[2] the holding queue. It has its jobs' keys
-- KEYS[3] released: sorted set of jobs that were drawn and not placed
-- KEYS[4] held: hash of held job to its message
-- ARGV[1] fencing token
-- ARGV[2] most jobs
-- ARGV[3] seconds after which those that are not placed are held again
-- Returns the time, then for each job: message, acceptance, deadline (0 = none) and client; no jobs where the token is
--   not the leader's.
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
