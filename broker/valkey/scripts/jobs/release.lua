#!lua flags=allow-oom
-- Releases claims on jobs that return to their queue. A message that was never accepted as a job gets no state.
-- A job that was asked to yield (yield.lua) has yielded once more; its record says why it did last.
--
-- KEYS[1..] each job's record
-- ARGV[1] 1 if runs that began count as attempts, else 0
-- ARGV[2..] each job's token
-- Returns nothing.
-- Safe to run twice: a claim that was released is held by nobody.
--- @include "final"
for n, job in ipairs(KEYS) do
  if ours(job, ARGV[n + 1]) then
    if redis.call('HGET', job, 'state') == 'running' then
      redis.call('HINCRBY', job, 'attempts', ARGV[1] - 1)
      redis.call('HSET', job, 'state', 'queued')
    end
    redis.call('HSET', job, 'holder', '')
    redis.call('HDEL', job, 'alone')
    local asked = redis.call('HGET', job, 'yield')
    if asked then
      redis.call('HDEL', job, 'yield')
      redis.call('HINCRBY', job, 'yields', 1)
      redis.call('HSET', job, 'yielded', string.match(asked, ' (.*)'))
    end
  end
end
