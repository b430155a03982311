#!lua flags=allow-oom
-- Deletes an object, and counts its bytes no more.
-- KEYS: the object, its tenant's objects of the kind, what its tenant's take, the objects that expire.
-- ARGV: its name, its name with its kind, the count of its own bytes, that of its content ('' = none) and its bytes.
-- Returns the number of its tenant's objects, and the count of their bytes. Safe to run twice: the second finds nothing.
local size = redis.call('STRLEN', KEYS[1])
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('ZREM', KEYS[4], ARGV[2])
if redis.call('UNLINK', KEYS[1]) == 1 then
  redis.call('HINCRBY', KEYS[3], ARGV[3], -size)
  if ARGV[4] ~= '' then redis.call('HINCRBY', KEYS[3], ARGV[4], -ARGV[5]) end
end
return {redis.call('ZCARD', KEYS[2]), tonumber(redis.call('HGET', KEYS[3], ARGV[3]) or 0)}
