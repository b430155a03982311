-- Puts dead letters of an endpoint back into its outbox, at its end.
-- KEYS: the sorted set of endpoints with events, the endpoint's outbox, its dead letters.
-- ARGV: endpoint, most events in an outbox, ids of events (none = all).
-- Returns how many were put back; those for which there is no room stay.
-- Safe to run twice: what was put back is no dead letter.
--- @include "now"
local due, outbox, dead = unpack(KEYS)
local wanted, all, room = {}, #ARGV == 2, ARGV[2] - redis.call('LLEN', outbox)
for n = 3, #ARGV do wanted[ARGV[n]] = true end
local letters, back = redis.call('LRANGE', dead, 0, -1), 0
for n = #letters, 1, -1 do
  local event = cmsgpack.unpack(letters[n])[1]
  if back < room and (all or wanted[event[1]]) then
    if all then redis.call('RPOP', dead) else redis.call('LREM', dead, -1, letters[n]) end
    event[9] = now  -- the time from which on it is tried
    redis.call('RPUSH', outbox, cmsgpack.pack(event))
    back = back + 1
  end
end
if back > 0 then redis.call('ZADD', due, 'NX', now, ARGV[1]) end
return back
