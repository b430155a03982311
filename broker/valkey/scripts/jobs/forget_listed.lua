#!lua flags=allow-oom
-- Removes groups of jobs whose records are gone from the index of jobs.
--
-- KEYS[1] accepted: sorted set of groups of jobs' keys by the time at which they were accepted
-- ARGV[1] score of the first group to inspect
-- ARGV[2] seconds after which a record may be gone
-- ARGV[3] most groups
-- Returns how many were inspected, and the score of the last of them.
-- Safe to run twice: what was removed is not there.
--- @include "now"
local groups = redis.call('ZRANGEBYSCORE', KEYS[1], ARGV[1], now - ARGV[2], 'WITHSCORES', 'LIMIT', 0, ARGV[3])
for g = 1, #groups, 2 do
  if redis.call('EXISTS', unpack(cmsgpack.unpack(groups[g]))) == 0 then redis.call('ZREM', KEYS[1], groups[g]) end
end
return {#groups / 2, groups[#groups] or '-inf'}
