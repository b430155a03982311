-- Reports what a process says of itself. A process's report is dropped 60 s after its last call.
--
-- KEYS[1] hash of process to its report
-- KEYS[2] sorted set of processes by their last call
-- ARGV[1] process
-- ARGV[2] its report; '' = as before
-- Returns 1 if the store has a report of the process, and the time.
-- Safe to run twice: the later call counts.
--- @include "now"
for _, name in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now - 60)) do
  redis.call('ZREM', KEYS[2], name)
  redis.call('HDEL', KEYS[1], name)
end
redis.call('ZADD', KEYS[2], math.floor(now), ARGV[1])
if ARGV[2] ~= '' then redis.call('HSET', KEYS[1], ARGV[1], ARGV[2]) end
return {redis.call('HEXISTS', KEYS[1], ARGV[1]), tostring(now)}
