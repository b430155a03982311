#!lua flags=allow-oom
-- Records what came of an attempt to deliver an endpoint's first event, and keeps the endpoint for the next one.
-- KEYS: the sorted set of endpoints with events, the endpoint's outbox, its state, its dead letters.
-- ARGV: endpoint, token, 'delivered', 'retry' or 'dead', seconds until the next attempt or, for another event, of a
--   lease, fault, most dead letters.
-- Returns the next event: '' = none is left, or it is not to be sent now; nothing where the token is not the endpoint's.
-- Safe to run twice but for a lost answer: then the lease ends, and the event that is first is sent once more.
--- @include "now"
local due, outbox, state, dead = unpack(KEYS)
local endpoint, token, outcome, pause, fault, most_dead = unpack(ARGV)
if redis.call('HGET', state, 'token') ~= token then return end
if outcome == 'retry' then
  redis.call('HINCRBY', state, 'attempts', 1)
  redis.call('HSET', state, 'fault', fault)
  redis.call('ZADD', due, now + pause, endpoint)
  redis.call('HDEL', state, 'token')
  return ''
end
local event = redis.call('LPOP', outbox)
if event and outcome == 'dead' then
  local attempts = (redis.call('HGET', state, 'attempts') or 0) + 1
  redis.call('LPUSH', dead, cmsgpack.pack({cmsgpack.unpack(event), now, attempts, fault}))
  redis.call('LTRIM', dead, 0, most_dead - 1)
end
redis.call('HDEL', state, 'attempts', 'fault')
local following = redis.call('LINDEX', outbox, 0)
if not following then
  redis.call('ZREM', due, endpoint)
  redis.call('HDEL', state, 'token')
  return ''
end
redis.call('ZADD', due, now + pause, endpoint)
return following
