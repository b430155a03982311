-- Takes or keeps the lead, or gives it up.
-- KEYS: leader, the count of its changes. ARGV: router, ms of a lease (0 = give it up).
-- Returns the fencing token, empty while another leads. A token is never given twice: it ends with the count.
-- Safe to run twice: who leads keeps its token.
local token = redis.call('GET', KEYS[1])
local ours = token and string.sub(token, 1, #ARGV[1] + 1) == ARGV[1] .. '#'
if token and not ours then return '' end
if ARGV[2] == '0' then
  redis.call('DEL', KEYS[1])
  return ''
end
if not token then token = ARGV[1] .. '#' .. redis.call('INCR', KEYS[2]) end
redis.call('SET', KEYS[1], token, 'PX', ARGV[2])
return token
