-- Replaces a value, if it is still the one that the new value was made from. A value that expires keeps its lifetime.
--
-- KEYS[1] the value
-- ARGV[1] the value as it was; '' = none
-- ARGV[2] the new value
-- Returns 1 if it was replaced, else 0.
-- Safe to run twice: the second run finds the new value, and leaves it.
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2], 'KEEPTTL')
return 1
