#!lua flags=allow-oom
-- Takes, renews or releases a lease.
--
-- KEYS[1] the lease
-- KEYS[2] count of the lease's holders; only for a lease with fencing tokens
-- ARGV[1] holder
-- ARGV[2] milliseconds that the lease lasts; 0 = release it
-- Returns the holder's token ('' = nobody holds it), and the milliseconds left if another one holds it, else 0. A token
--   is the holder's name; a fencing token ends with the count, so that it is never given twice.
-- Safe to run twice: it renews, and the holder keeps its token.
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
