#!lua flags=allow-oom
-- Renews claims.
--
-- KEYS[1..] each job's record
-- ARGV[1] seconds of a lease, from now on
-- ARGV[2..] each job's token
-- Returns for each job 1 if its claim is still held, else 0.
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
