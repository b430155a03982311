#!lua flags=allow-oom
-- Puts back, to be served first, what a router whose session ended had taken.
-- KEYS: the sorted set of sessions, the session's key, the list to put back into, the session's in-flight lists.
-- ARGV: session, seconds after its last sign for which a move that was under way may still reach its lists, most
--   sessions to remember: beyond that, those that ended are forgotten as soon as nothing is in flight under them.
-- Returns how many messages were put back.
-- Safe to run twice: a list that was put back is empty; a session that lives is left alone.
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
