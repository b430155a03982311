-- Records what jobs that ended before placement were, lists them, and tells webhook endpoints of their end.
--
-- KEYS: accepted, the sorted set of webhook endpoints with events, then the job records. A record names the endpoints to
--   tell of its end.
-- ARGV: seconds to keep a record, prefixes of the keys of outboxes and of their dead letters, then for each job: its
--   result, time at which it was accepted, number of fields, fields.
-- Returns nothing.
-- Safe to run twice, and for a copy of a message: a job that was accepted, or is listed, is left as it is.
--- @include "now"
local webhooks_due, keep, outbox_prefix, dead_prefix, i = KEYS[2], ARGV[1], ARGV[2], ARGV[3], 4
--- @include "outbox"
for k = 3, #KEYS do
  local meta, at, job, count = ARGV[i], ARGV[i + 1], KEYS[k], tonumber(ARGV[i + 2])
  local ended, listed, state = unpack(redis.call('HMGET', job, 'finished', 'accepted', 'state'))
  if ended and not listed then
    redis.call('HSET', job, 'accepted', at, unpack(ARGV, i + 3, i + 2 + count))
    redis.call('EXPIRE', job, keep)
    redis.call('ZADD', KEYS[1], at, cmsgpack.pack({job}))
    local hooks = redis.call('HGET', job, 'webhooks')
    if hooks then announce(hooks, job, state, meta) end
  end
  i = i + 3 + count
end
