#!lua flags=allow-oom
-- Publishes one device's facts under the server's time.
--
-- KEYS[1] devices: hash of worker to its device's facts
-- KEYS[2] heartbeats: sorted set of workers by the time of their last heartbeat
-- ARGV[1] worker
-- ARGV[2] the device's facts as JSON; '' = the device is gone
-- Returns the time.
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
