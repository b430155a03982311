#!lua flags=allow-oom
-- Answers which messages may be forgotten, once what it saw is kept.
-- KEYS: a key to write to, so that a wait for the log or for a replica covers all that was written before; then for each
--   job its result and its record. ARGV: each job's deadline (0 = none).
-- Returns 1 for each copy that needs no run. Safe to run twice: it reads.
--- @include "final"
--- @include "over"
redis.call('SET', KEYS[1], '', 'PX', 1000)
local answer = {}
for n, deadline in ipairs(ARGV) do
  local state, due = unpack(redis.call('HMGET', KEYS[2 * n + 1], 'state', 'deadline_at'))
  answer[n] = over(KEYS[2 * n], state, tonumber(due or 0), tonumber(deadline)) and 1 or 0
end
return answer
