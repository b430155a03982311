-- Adds an event that is not a job's end to outboxes, once a day.
-- KEYS: the sorted set of endpoints with events, the mark of the event. Outboxes and dead letters are named by endpoints.
-- ARGV: prefixes of the keys of outboxes and of dead letters, most events in an outbox, most dead letters; id, kind and
--   ending of the event, the name of what ended; endpoints.
-- Returns nothing. Safe to run twice, and by several routers: an event that has its mark is not added again.
--- @include "now"
local webhooks_due, outbox_prefix, dead_prefix = KEYS[1], ARGV[1], ARGV[2]
--- @include "outbox"
if not redis.call('SET', KEYS[2], '', 'NX', 'EX', 86400) then return end
local event = {ARGV[5], ARGV[6], ARGV[7], now, ARGV[8], '', '', ''}
put(event, {unpack(ARGV, 9)}, tonumber(ARGV[3]), tonumber(ARGV[4]))
