#!lua flags=allow-oom
-- Takes, prolongs or gives up a lease.
-- KEYS: the lease, and the count of its holders if it has fencing tokens. ARGV: holder, ms that it lasts (0 = give it up).
-- Returns the token of the holder ('' = nobody), and the ms that it lasts if that is another one, else 0.
-- A token is the holder's name; a fencing token ends with the count, so it is never given twice.
-- Safe to run twice: it prolongs, and the holder keeps its token.
local token = redis.call('GET', KEYS[1])
local ours = token == ARGV[1] or token and string.sub(token, 1, #ARGV[1] + 1) == ARGV[1] .. '#'
if token and not ours then return {token, math.max(redis.call('PTTL', KEYS[1]), 1)} end
if ARGV[2] == '0' then
  redis.call('DEL', KEYS[1])
  return {'', 0}
end
if not token then token = ARGV[1] .. (KEYS[2] and '#' .. redis.call('INCR', KEYS[2]) or '') end
redis.call('SET', KEYS[1], token, 'PX', ARGV[2])
return {token, 0}
