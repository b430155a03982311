#!lua flags=allow-oom
-- Returns what a router had taken when its session ended to the arrivals, to be served first.
--
-- KEYS[1] sessions: sorted set of routers' sessions by their last renewal
-- KEYS[2] the session; present while it lasts
-- KEYS[3] the arrivals' first list
-- KEYS[4..] the session's in-flight lists
-- ARGV[1] session
-- ARGV[2] seconds since its last renewal for which a move that was under way may still reach its lists
-- ARGV[3] most sessions to remember; beyond that, ended ones are forgotten as soon as nothing is in flight under them
-- Returns the number of messages returned.
-- Safe to run twice: a list that was emptied has nothing to return; a session that lasts is left alone.
--- @include "now"
--- @include "give_back"
if redis.call('EXISTS', KEYS[2]) == 1 then return 0 end
local put_back = 0
if redis.call('EXISTS', unpack(KEYS, 4)) > 0 then
  for k = 4, #KEYS do put_back = put_back + give_back(KEYS[k], KEYS[3]) end
end
local sign = redis.call('ZSCORE', KEYS[1], ARGV[1])
if sign and (now - sign > tonumber(ARGV[2]) or redis.call('ZCARD', KEYS[1]) > tonumber(ARGV[3])) then
  redis.call('ZREM', KEYS[1], ARGV[1])
end
return put_back
