#!lua flags=allow-oom
-- Publishes one device's facts under the server's time.
-- KEYS: the hash of devices, the sorted set of heartbeats. ARGV: worker, facts ('' = gone). Returns the time.
-- Safe to run twice: the later call counts.
--- @include "now"
if ARGV[2] == '' then
  redis.call('HDEL', KEYS[1], ARGV[1])
  redis.call('ZREM', KEYS[2], ARGV[1])
else
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
  redis.call('ZADD', KEYS[2], now, ARGV[1])
end
return tostring(now)
