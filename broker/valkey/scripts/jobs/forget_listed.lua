#!lua flags=allow-oom
-- Takes groups of jobs whose records are gone out of the index of jobs.
-- KEYS: accepted. Job keys are in its members.
-- ARGV: score from which on groups are looked at, seconds after which a record may be gone, most groups.
-- Returns how many were looked at, and the score of the last of them. Safe to run twice: it removes what is not there.
--- @include "now"
local groups = redis.call('ZRANGEBYSCORE', KEYS[1], ARGV[1], now - ARGV[2], 'WITHSCORES', 'LIMIT', 0, ARGV[3])
for g = 1, #groups, 2 do
  if redis.call('EXISTS', unpack(cmsgpack.unpack(groups[g]))) == 0 then redis.call('ZREM', KEYS[1], groups[g]) end
end
return {#groups / 2, groups[#groups] or '-inf'}
