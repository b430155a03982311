#!lua flags=allow-oom
-- Holds a worker's name for one process.
-- KEYS: the name's key. ARGV: process, ms for which the name stays its own without another call (0 = it leaves it).
-- Returns the process that has the name ('' = nobody) and, where that is another one, the ms that this lasts.
-- Safe to run twice: it prolongs.
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return {holder, redis.call('PTTL', KEYS[1])} end
if ARGV[2] == '0' then
  redis.call('DEL', KEYS[1])
  return {'', 0}
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return {ARGV[1], 0}
