-- Stores an object, or replaces it if it is still as it was, and counts the bytes that it takes of its tenant's.
-- KEYS: the object, its tenant's objects of the kind, what its tenant's take, the objects that expire; of a new batch
--   also its tenant's open batches, and all open batches.
-- ARGV: the value as it was ('' = none), the new one, its name, its name with its kind, its place among its tenant's
--   objects ('' = the place that it has), the time at which it expires ('' = as before, '0' = never), its name among all
--   open batches, and how many its tenant may have; then of each count its name, the bytes to add, and the most that it
--   may have ('' = any).
-- Returns the word 'changed' if the value was not as it was; the limit that it would exceed, and what there is; or
--   'stored', the number of its tenant's objects, and the first count. Safe to run twice: the second finds it changed.
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return {'changed'} end
for n = 9, #ARGV, 3 do
  local held = tonumber(redis.call('HGET', KEYS[3], ARGV[n]) or 0)
  if ARGV[n + 2] ~= '' and held + ARGV[n + 1] > tonumber(ARGV[n + 2]) then return {ARGV[n], held} end
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
for n = 9, #ARGV, 3 do redis.call('HINCRBY', KEYS[3], ARGV[n], ARGV[n + 1]) end
return {'stored', redis.call('ZCARD', KEYS[2]), tonumber(redis.call('HGET', KEYS[3], ARGV[9]))}
