-- Stores an object, or replaces it if it is still as it was, and adds its bytes to its tenant's.
--
-- KEYS[1] the object
-- KEYS[2] sorted set of its tenant's objects of the kind
-- KEYS[3] hash of what its tenant's objects take, in bytes
-- KEYS[4] sorted set of the objects that expire
-- KEYS[5] set of its tenant's open batches; only for a new batch
-- KEYS[6] sorted set of all open batches; only for a new batch
-- ARGV[1] the value as it was; '' = none
-- ARGV[2] the new value
-- ARGV[3] its name
-- ARGV[4] its name with its kind
-- ARGV[5] its score in KEYS[2]; '' = as before
-- ARGV[6] the time at which it expires; '' = as before, '0' = never
-- ARGV[7] its name in KEYS[6]
-- ARGV[8] most open batches of its tenant
-- ARGV[9..] a map for each count: its `field` of KEYS[3], the `bytes` to add, and the `most` that it may have, if any
-- Returns 'changed' if the value was not as it was; the limit that it would exceed, and what there is; or 'stored', the
--   number of its tenant's objects, and the first count.
-- Safe to run twice: the second run finds the value changed.
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return {'changed'} end
local counts = {}
for n = 9, #ARGV do
  local count = cmsgpack.unpack(ARGV[n])
  local held = tonumber(redis.call('HGET', KEYS[3], count.field) or 0)
  if count.most and held + count.bytes > count.most then return {count.field, held} end
  counts[n - 8] = count
end
if KEYS[5] then
  local open = redis.call('SCARD', KEYS[5])
  if open >= tonumber(ARGV[8]) then return {'batches', open} end
  redis.call('SADD', KEYS[5], ARGV[3])
  redis.call('ZADD', KEYS[6], ARGV[5], ARGV[7])
end
redis.call('SET', KEYS[1], ARGV[2])
if ARGV[5] ~= '' then redis.call('ZADD', KEYS[2], ARGV[5], ARGV[3]) end
if ARGV[6] == '0' then redis.call('ZREM', KEYS[4], ARGV[4]) end
if ARGV[6] ~= '' and ARGV[6] ~= '0' then redis.call('ZADD', KEYS[4], ARGV[6], ARGV[4]) end
for _, count in ipairs(counts) do redis.call('HINCRBY', KEYS[3], count.field, count.bytes) end
return {'stored', redis.call('ZCARD', KEYS[2]), tonumber(redis.call('HGET', KEYS[3], counts[1].field))}
