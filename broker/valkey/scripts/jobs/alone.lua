#!lua flags=allow-oom
-- Notes whether a worker handles nothing beside a job that may have ended another one (includes/claimed.lua).
-- KEYS: jobs. ARGV: 1 if it does, else 0; then the jobs' tokens. Returns nothing.
-- Safe to run twice.
--- @include "final"
--- @include "ours"
for n, job in ipairs(KEYS) do
  if ours(job, ARGV[n + 1]) then redis.call('HSET', job, 'alone', ARGV[1]) end
end
