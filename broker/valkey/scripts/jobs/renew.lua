#!lua flags=allow-oom
-- Prolongs claims.
-- KEYS: jobs. ARGV: seconds of a lease from now on, then each job's token. Returns 1 for each claim that is still ours.
-- Safe to run twice: the later call counts.
--- @include "now"
--- @include "final"
--- @include "ours"
local still = {}
for n, job in ipairs(KEYS) do
  local mine = ours(job, ARGV[n + 1])
  if mine then redis.call('HSET', job, 'held_until', now + ARGV[1]) end
  still[n] = mine and 1 or 0
end
return still
