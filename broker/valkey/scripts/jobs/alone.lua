#!lua flags=allow-oom
-- Notes whether a worker handles nothing beside a job that may have ended another worker (includes/claimed.lua).
--
-- KEYS[1..] each job's record
-- ARGV[1] 1 if it handles nothing else, else 0
-- ARGV[2..] each job's token
-- Returns nothing.
-- Safe to run twice: it writes the same.
--- @include "final"
for n, job in ipairs(KEYS) do
  if ours(job, ARGV[n + 1]) then redis.call('HSET', job, 'alone', ARGV[1]) end
end
