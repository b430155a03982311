-- Lets another router release at once, if this one did.
-- KEYS: releaser. ARGV: router. Returns nothing. Safe to run twice.
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
