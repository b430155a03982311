-- Adds an event that is not a job's end to outboxes, once a day.
--
-- KEYS[1] webhooks_due: sorted set of webhook endpoints with events
-- KEYS[2] mark of the event
-- ARGV[1] prefix of outboxes' keys
-- ARGV[2] prefix of dead letters' keys
-- ARGV[3] most events in an outbox
-- ARGV[4] most dead letters
-- ARGV[5] the event's id
-- ARGV[6] the event's kind
-- ARGV[7] the event's ending
-- ARGV[8] name of what ended
-- ARGV[9..] endpoints
-- Returns nothing.
-- Safe to run twice, and by several routers: an event that has its mark is not added again.
--- @include "now"
local webhooks_due, outbox_prefix, dead_prefix = KEYS[1], ARGV[1], ARGV[2]
--- @include "outbox"
if not redis.call('SET', KEYS[2], '', 'NX', 'EX', 86400) then return end
local event = {ARGV[5], ARGV[6], ARGV[7], now, ARGV[8], '', '', ''}
put(event, {unpack(ARGV, 9)}, tonumber(ARGV[3]), tonumber(ARGV[4]))
