#!lua flags=allow-oom
-- Gives claims back, for jobs that return to their queue. A message that was never accepted as a job gets no state.
-- KEYS: jobs. ARGV: 1 if runs that began count, else 0; then the jobs' tokens. Returns nothing.
-- Safe to run twice: a claim that was given back is no longer ours.
--- @include "final"
--- @include "ours"
for n, job in ipairs(KEYS) do
  if ours(job, ARGV[n + 1]) then
    if redis.call('HGET', job, 'state') == 'running' then
      redis.call('HINCRBY', job, 'attempts', ARGV[1] - 1)
      redis.call('HSET', job, 'state', 'queued')
    end
    redis.call('HSET', job, 'holder', '')
    redis.call('HDEL', job, 'alone')
  end
end
