-- Records what jobs that ended before placement were, lists them, and notifies webhook endpoints of their end.
--
-- KEYS[1] accepted: sorted set of groups of jobs' keys by the time at which they were accepted
-- KEYS[2] webhooks_due: sorted set of webhook endpoints with events
-- KEYS[3..] each job's record, which names the webhook endpoints to notify
-- ARGV[1] seconds to keep a record
-- ARGV[2] prefix of webhook outboxes' keys
-- ARGV[3] prefix of the keys of webhooks' dead letters
-- ARGV[4..] a map for each job: `meta`, its result; `accepted`, the time at which it was; `record`, fields of its record,
--   each followed by its value
-- Returns nothing.
-- Safe to run twice, and for a copy of a message: a job that was accepted, or is listed, is left as it is.
--- @include "now"
local webhooks_due, keep, outbox_prefix, dead_prefix = KEYS[2], ARGV[1], ARGV[2], ARGV[3]
--- @include "outbox"
for n = 3, #KEYS do
  local job, refused = KEYS[n], cmsgpack.unpack(ARGV[n + 1])
  local ended, listed, state = unpack(redis.call('HMGET', job, 'finished', 'accepted', 'state'))
  if ended and not listed then
    redis.call('HSET', job, 'accepted', refused.accepted, unpack(refused.record))
    redis.call('EXPIRE', job, keep)
    redis.call('ZADD', KEYS[1], refused.accepted, cmsgpack.pack({job}))
    local hooks = redis.call('HGET', job, 'webhooks')
    if hooks then announce(hooks, job, state, refused.meta) end
  end
end
