-- Adds, replaces or removes an endpoint, if it is still what the new value was made from.
-- KEYS: the hash of endpoints, the sorted set of endpoints with events, the endpoint's outbox, its state, its dead
--   letters.
-- ARGV: endpoint, its value as it was ('' = there is none), the new one ('' = it is removed, and all that waits for it).
-- Returns 1 if it was changed, else 0. Safe to run twice: the second run finds the new value, and leaves it.
if (redis.call('HGET', KEYS[1], ARGV[1]) or '') ~= ARGV[2] then return 0 end
if ARGV[3] ~= '' then
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
else
  redis.call('HDEL', KEYS[1], ARGV[1])
  redis.call('ZREM', KEYS[2], ARGV[1])
  redis.call('UNLINK', KEYS[3], KEYS[4], KEYS[5])
end
return 1
