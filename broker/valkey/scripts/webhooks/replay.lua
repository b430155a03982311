-- Returns an endpoint's dead letters to its outbox, at its end.
--
-- KEYS[1] due: sorted set of endpoints with events
-- KEYS[2] the endpoint's outbox
-- KEYS[3] the endpoint's dead letters
-- ARGV[1] endpoint
-- ARGV[2] most events in an outbox
-- ARGV[3..] ids of events; none = all
-- Returns how many were returned; those that the outbox has no space for stay.
-- Safe to run twice: what was returned is no dead letter.
--- @include "now"
local due, outbox, dead = unpack(KEYS)
local wanted, all, free = {}, #ARGV == 2, ARGV[2] - redis.call('LLEN', outbox)
for n = 3, #ARGV do wanted[ARGV[n]] = true end
local dead_letters, back = redis.call('LRANGE', dead, 0, -1), 0
for n = #dead_letters, 1, -1 do
  local event = cmsgpack.unpack(dead_letters[n])[1]
  if back < free and (all or wanted[event[1]]) then
    if all then redis.call('RPOP', dead) else redis.call('LREM', dead, -1, dead_letters[n]) end
    event[9] = now  -- the time from which on it is tried
    redis.call('RPUSH', outbox, cmsgpack.pack(event))
    back = back + 1
  end
end
if back > 0 then redis.call('ZADD', due, 'NX', now, ARGV[1]) end
return back
