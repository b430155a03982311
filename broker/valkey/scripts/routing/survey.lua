#!lua flags=allow-oom
-- Inspects holding; jobs that were drawn and not placed in time are held again.
--
-- KEYS[1] holding: set of holding queues with jobs
-- KEYS[2] released: sorted set of jobs that were drawn and not placed
-- KEYS[3] held: hash of held job to its message
-- KEYS[4] work: hash of cell to device seconds and counts of jobs
-- ARGV[1] prefix of holding queues' keys
-- Returns the time, KEYS[4]'s content (nothing if no job is held), then for each holding queue its name, its first
--   job's deadline and level, and the number of its jobs.
-- Safe to run twice: what is held again is so once.
--- @include "now"
local holding, released, held, work = unpack(KEYS)
local holding_prefix = ARGV[1]
--- @include "hold"
local answer = {tostring(now), {}}
for _, job in ipairs(redis.call('ZRANGEBYSCORE', released, '-inf', now, 'LIMIT', 0, 1000)) do
  local message = redis.call('HGET', held, job)
  redis.call('ZREM', released, job)
  if message then hold(job, message) end
end
for _, queue in ipairs(redis.call('SMEMBERS', holding)) do
  local key = holding_prefix .. queue
  local job, due = unpack(redis.call('ZRANGE', key, 0, 0, 'WITHSCORES'))
  if job then
    local level, jobs = redis.call('HGET', job, 'level'), redis.call('ZCARD', key)
    for _, part in ipairs({queue, due, level, tostring(jobs)}) do answer[#answer + 1] = part end
  else
    redis.call('SREM', holding, queue)
  end
end
if answer[3] then answer[2] = redis.call('HGETALL', work) end
return answer
