#!lua flags=allow-oom
-- Renews claims.
--
-- KEYS[1..] each job's record
-- ARGV[1] seconds of a lease, from now on
-- ARGV[2..] each job's token
-- Returns for each job 0 if its claim is not held any more, 1 if it is, and if it was asked to yield (yield.lua) the
--   seconds left for that and the reason.
-- Safe to run twice: the later call counts.
--- @include "now"
--- @include "final"
local still = {}
for n, job in ipairs(KEYS) do
  still[n] = 0
  if ours(job, ARGV[n + 1]) then
    redis.call('HSET', job, 'held_until', now + ARGV[1])
    local by, reason = string.match(redis.call('HGET', job, 'yield') or '', '^(%S+) (.*)$')
    still[n] = by and string.format('%.3f ', by - now) .. reason or 1
  end
end
return still
