#!lua flags=allow-oom
-- Renews a router's session.
--
-- KEYS[1] sessions: sorted set of routers' sessions by their last renewal
-- KEYS[2] the session; present while it lasts
-- ARGV[1] session
-- ARGV[2] milliseconds that it lasts without a renewal
-- ARGV[3] '1' if it begins, else ''
-- Returns 0 if the session had ended, else 1.
-- Safe to run twice: it renews. A session that ended is never revived: another router may have returned what was in
--   flight under it.
--- @include "now"
if ARGV[3] == '1' then redis.call('SET', KEYS[2], '') end
local lives = redis.call('PEXPIRE', KEYS[2], ARGV[2])
if lives == 1 then redis.call('ZADD', KEYS[1], now, ARGV[1]) end
return lives
