-- Reports what a process serves from its models folder; what a process reported is dropped 60 s after its last call.
-- KEYS: the hash of reports, the sorted set of when each process called, the count of reloads, what operators asked of
-- models.
-- ARGV: process, its report ('' = as before).
-- Returns how often a reload was asked for, 1 if the store has a report of the process, what was asked of models, and the
-- time.
-- Safe to run twice: the later call counts.
--- @include "now"
for _, name in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now - 60)) do
  redis.call('ZREM', KEYS[2], name)
  redis.call('HDEL', KEYS[1], name)
end
redis.call('ZADD', KEYS[2], math.floor(now), ARGV[1])
if ARGV[2] ~= '' then redis.call('HSET', KEYS[1], ARGV[1], ARGV[2]) end
local known = redis.call('HEXISTS', KEYS[1], ARGV[1])
return {tonumber(redis.call('GET', KEYS[3]) or '0'), known, redis.call('HGETALL', KEYS[4]), tostring(now)}
