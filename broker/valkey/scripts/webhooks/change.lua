-- Adds, replaces or removes an endpoint, if it is still what the new value was made from.
--
-- KEYS[1] hash of endpoint to its value
-- KEYS[2] sorted set of endpoints with events
-- KEYS[3] the endpoint's outbox
-- KEYS[4] the endpoint's state
-- KEYS[5] the endpoint's dead letters
-- ARGV[1] endpoint
-- ARGV[2] its value as it was; '' = there is none
-- ARGV[3] its new value; '' = it is removed with all its events
-- Returns 1 if it was changed, else 0.
-- Safe to run twice: the second run finds the new value, and leaves it.
if (redis.call('HGET', KEYS[1], ARGV[1]) or '') ~= ARGV[2] then return 0 end
if ARGV[3] ~= '' then
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
else
  redis.call('HDEL', KEYS[1], ARGV[1])
  redis.call('ZREM', KEYS[2], ARGV[1])
  redis.call('UNLINK', KEYS[3], KEYS[4], KEYS[5])
end
return 1
