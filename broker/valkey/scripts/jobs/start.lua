#!lua flags=allow-oom
-- Records that jobs run. A job that was billed and runs again may cost as much again: its tenant's spending has that
-- until the next bill (bill.lua). A job that ends at once says in finish.lua that it started.
--
-- KEYS[1..] each job's record
-- ARGV[1] device
-- ARGV[2..] a map for each job: the `token` of its claim, and when it `began`
-- Returns for each job 1 if its claim is still held, else 0.
-- Not safe to run twice: it counts a run twice. A worker that gets no answer gives the job up.
--- @include "final"
local function reserve(job)
  local spent, tenant, cost, most = unpack(redis.call('HMGET', job, 'spent', 'tenant', 'cost', 'reserve'))
  if most and tonumber(cost) == 0 and redis.call('EXISTS', spent) == 1 then
    redis.call('HINCRBYFLOAT', spent, tenant, most)
    redis.call('HSET', job, 'cost', most)
  end
end
local still = {}
for n, job in ipairs(KEYS) do
  local run = cmsgpack.unpack(ARGV[n + 1])
  local mine = ours(job, run.token)
  if mine then
    if redis.call('HINCRBY', job, 'attempts', 1) > 1 then reserve(job) end
    redis.call('HSET', job, 'state', 'running', 'started', run.began, 'device', ARGV[1])
  end
  still[n] = mine and 1 or 0
end
return still
