#!lua flags=allow-oom
-- Records that jobs run. One that was billed and runs again may cost as much again: its tenant's spending has that until
-- the next bill (bill.lua). What ends at once says so in finish.lua instead.
-- KEYS: jobs. ARGV: device, then for each job its token and the time at which it began.
-- Returns 1 for each claim that is still ours. Called twice it counts a run twice: who got no answer gives the job up.
--- @include "final"
--- @include "ours"
local function reserve(job)
  local spent, tenant, cost, most = unpack(redis.call('HMGET', job, 'spent', 'tenant', 'cost', 'reserve'))
  if most and tonumber(cost) == 0 and redis.call('EXISTS', spent) == 1 then
    redis.call('HINCRBYFLOAT', spent, tenant, most)
    redis.call('HSET', job, 'cost', most)
  end
end
local still = {}
for n, job in ipairs(KEYS) do
  local mine = ours(job, ARGV[2 * n])
  if mine then
    if redis.call('HINCRBY', job, 'attempts', 1) > 1 then reserve(job) end
    redis.call('HSET', job, 'state', 'running', 'started', ARGV[2 * n + 1], 'device', ARGV[1])
  end
  still[n] = mine and 1 or 0
end
return still
