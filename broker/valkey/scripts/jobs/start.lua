#!lua flags=allow-oom
-- Records that jobs run. What ends at once says so in finish.lua instead.
-- KEYS: jobs. ARGV: device, then for each job its token and the time at which it began.
-- Returns 1 for each claim that is still ours. Called twice it counts a run twice: who got no answer gives the job up.
--- @include "final"
--- @include "ours"
local still = {}
for n, job in ipairs(KEYS) do
  local mine = ours(job, ARGV[2 * n])
  if mine then
    redis.call('HINCRBY', job, 'attempts', 1)
    redis.call('HSET', job, 'state', 'running', 'started', ARGV[2 * n + 1], 'device', ARGV[1])
  end
  still[n] = mine and 1 or 0
end
return still
