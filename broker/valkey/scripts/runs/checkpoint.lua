-- Keeps a run's checkpoint, whose bytes were written before, and the one before it; older ones are deleted. A job that
-- gets on ends no worker: runs before this one count neither as attempts nor as its fault (claimed.lua).
--
-- KEYS[1] the job's record, which names the bytes of older checkpoints
-- KEYS[2] the checkpoint's bytes
-- ARGV[1] MessagePack map of the run: `token`, `ran` (seconds of all runs of the job) and `checkpoint` (its facts in
--   JSON, of which `key` is KEYS[2]).
-- Returns 1 if the claim is still ours; else the bytes are deleted.
-- Safe to run twice: it is kept already.
--- @include "final"
local job, bytes = KEYS[1], KEYS[2]
local run = cmsgpack.unpack(ARGV[1])
if not ours(job, run.token) then
  redis.call('UNLINK', bytes)
  return 0
end
local latest, before = unpack(redis.call('HMGET', job, 'checkpoint', 'checkpoint_before'))
if latest ~= run.checkpoint then
  if before then redis.call('UNLINK', cjson.decode(before).key) end
  if latest then redis.call('HSET', job, 'checkpoint_before', latest) end
  redis.call('HSET', job, 'checkpoint', run.checkpoint, 'ran', run.ran)
end
redis.call('HDEL', job, 'blamed')
if tonumber(redis.call('HGET', job, 'attempts') or 0) > 1 then redis.call('HSET', job, 'attempts', 1) end
local left = redis.call('TTL', job)
if left < 0 then redis.call('PERSIST', bytes) else redis.call('EXPIRE', bytes, left) end
return 1
