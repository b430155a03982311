#!lua flags=allow-oom
-- Takes endpoints whose first event is due, each for one router.
--
-- KEYS[1] due: sorted set of endpoints with events
-- ARGV[1] prefix of outboxes' keys
-- ARGV[2] prefix of states' keys
-- ARGV[3] seconds of a lease
-- ARGV[4] most endpoints
-- ARGV[5] router
-- Returns the time, then for each endpoint: its id, the token, the attempts made for its first event, and that event.
-- Safe to run twice: an endpoint that was taken is due again once the lease expires.
--- @include "now"
local due, outbox_prefix, state_prefix = KEYS[1], ARGV[1], ARGV[2]
local answer = {tostring(now)}
for _, endpoint in ipairs(redis.call('ZRANGEBYSCORE', due, '-inf', now, 'LIMIT', 0, ARGV[4])) do
  local event, state = redis.call('LINDEX', outbox_prefix .. endpoint, 0), state_prefix .. endpoint
  if event then
    local token = ARGV[5] .. '#' .. redis.call('HINCRBY', state, 'takes', 1)
    redis.call('HSET', state, 'token', token)
    redis.call('ZADD', due, now + ARGV[3], endpoint)
    local attempts = redis.call('HGET', state, 'attempts') or '0'
    for _, part in ipairs({endpoint, token, attempts, event}) do answer[#answer + 1] = part end
  else
    redis.call('ZREM', due, endpoint)
  end
end
return answer
