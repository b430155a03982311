#!lua flags=allow-oom
-- Records the outcome of an attempt to deliver an endpoint's first event, and keeps the endpoint for the next one.
--
-- KEYS[1] due: sorted set of endpoints with events
-- KEYS[2] the endpoint's outbox
-- KEYS[3] the endpoint's state
-- KEYS[4] the endpoint's dead letters
-- ARGV[1] endpoint
-- ARGV[2] token
-- ARGV[3] 'delivered', 'retry' or 'dead'
-- ARGV[4] seconds until the next attempt or, for another event, of a lease
-- ARGV[5] fault
-- ARGV[6] most dead letters
-- Returns the next event: '' = none is left, or it is not to be sent now; nothing where the token is not the
--   endpoint's.
-- Safe to run twice unless the answer is lost: then the lease expires, and the first event is sent once more.
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
