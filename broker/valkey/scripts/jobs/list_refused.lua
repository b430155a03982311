-- Records what jobs that ended before placement were, and lists them.
--
-- KEYS: accepted, then the job records.
-- ARGV: seconds to keep a record, then for each job: time at which it was accepted, number of fields, fields.
-- Returns nothing.
-- Safe to run twice, and for a copy of a message: a job that was accepted, or is listed, is left as it is.
local keep, i = ARGV[1], 2
for k = 2, #KEYS do
  local at, job, count = ARGV[i], KEYS[k], tonumber(ARGV[i + 1])
  local ended, listed = unpack(redis.call('HMGET', job, 'finished', 'accepted'))
  if ended and not listed then
    redis.call('HSET', job, 'accepted', at, unpack(ARGV, i + 2, i + 1 + count))
    redis.call('EXPIRE', job, keep)
    redis.call('ZADD', KEYS[1], at, cmsgpack.pack({job}))
  end
  i = i + 2 + count
end
