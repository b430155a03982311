#!lua flags=allow-oom
-- Shows that a router's session lives.
-- KEYS: the sorted set of sessions, the session's key. ARGV: session, ms that it lasts without a sign, '1' as it begins.
-- Returns the time, and 0 where the session had ended.
-- Safe to run twice: it prolongs. A session that ended is never taken up again: another router may have put back what
-- was in flight under it.
--- @include "now"
if ARGV[3] == '1' then redis.call('SET', KEYS[2], '') end
local lives = redis.call('PEXPIRE', KEYS[2], ARGV[2])
if lives == 1 then redis.call('ZADD', KEYS[1], now, ARGV[1]) end
return {tostring(now), lives}
