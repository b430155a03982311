#!lua flags=allow-oom
-- Gives claims back, for jobs that return to their queue: a run that began does not count. A message that
-- was never accepted as a job gets no state.
-- KEYS: jobs. ARGV: their tokens. Returns nothing.
-- Safe to run twice: a claim that was given back is no longer ours.
--- @include "final"
--- @include "ours"
for n, job in ipairs(KEYS) do
  if ours(job, ARGV[n]) then
    if redis.call('HGET', job, 'state') == 'running' then
      redis.call('HINCRBY', job, 'attempts', -1)
      redis.call('HSET', job, 'state', 'queued')
    end
    redis.call('HSET', job, 'holder', '')
    redis.call('HINCRBY', job, 'released', 1)
  end
end
