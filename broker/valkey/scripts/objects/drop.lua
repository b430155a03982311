#!lua flags=allow-oom
-- Deletes an object, and subtracts its bytes from its tenant's.
--
-- KEYS[1] the object
-- KEYS[2] sorted set of its tenant's objects of the kind
-- KEYS[3] hash of what its tenant's objects take, in bytes
-- KEYS[4] sorted set of the objects that expire
-- ARGV[1] its name
-- ARGV[2] its name with its kind
-- ARGV[3] the field of KEYS[3] that counts its own bytes
-- ARGV[4] the field of KEYS[3] that counts its content; '' = none
-- ARGV[5] its content's bytes
-- Returns the number of its tenant's objects, and their bytes.
-- Safe to run twice: the second run finds no object.
local size = redis.call('STRLEN', KEYS[1])
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('ZREM', KEYS[4], ARGV[2])
if redis.call('UNLINK', KEYS[1]) == 1 then
  redis.call('HINCRBY', KEYS[3], ARGV[3], -size)
  if ARGV[4] ~= '' then redis.call('HINCRBY', KEYS[3], ARGV[4], -ARGV[5]) end
end
return {redis.call('ZCARD', KEYS[2]), tonumber(redis.call('HGET', KEYS[3], ARGV[3]) or 0)}
