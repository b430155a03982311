#!lua flags=allow-oom
-- Removes groups of jobs that have all ended, or have no record any more, from the deadlines.
--
-- KEYS[1] deadlines: sorted set of groups of jobs' keys by their deadline
-- ARGV[1] score of the first group to inspect
-- ARGV[2] most groups
-- Returns how many were inspected, and the score of the last of them.
-- Safe to run twice: what was removed is not there.
--- @include "final"
local groups = redis.call('ZRANGEBYSCORE', KEYS[1], ARGV[1], '+inf', 'WITHSCORES', 'LIMIT', 0, ARGV[2])
local function open(group)
  for _, job in ipairs(cmsgpack.unpack(group)) do
    local state = redis.call('HGET', job, 'state')
    if state and not final[state] then return true end
  end
end
for g = 1, #groups, 2 do
  if not open(groups[g]) then redis.call('ZREM', KEYS[1], groups[g]) end
end
return {#groups / 2, groups[#groups] or '-inf'}
