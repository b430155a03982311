#!lua flags=allow-oom
-- Returns messages that no worker has kept for a lease to their places in their queues. The queues' lists follow from
--   the messages. Tags of another form are kombu's own.
--
-- KEYS[1] unacked: kombu's hash of unacknowledged messages
-- KEYS[2] index: kombu's index of it
-- ARGV[1] seconds of a lease
-- ARGV[2] most messages
-- Returns the number of messages. Those of one worker end up in the order in which it took them.
-- Safe to run twice: a message that was returned has no entry.
--- @include "now"
local unacked, index = KEYS[1], KEYS[2]
--- @include "put_back"
local lost = {}
for _, tag in ipairs(redis.call('ZRANGEBYSCORE', index, '-inf', now - ARGV[1], 'LIMIT', 0, ARGV[2])) do
  local take, number = string.match(tag, '^%x+%.(%d+)%.(%d+)$')
  if take then lost[#lost + 1] = {tonumber(take), tonumber(number), tag} end
end
table.sort(lost, function(a, b) if a[1] ~= b[1] then return a[1] > b[1] end return a[2] > b[2] end)
for _, one in ipairs(lost) do put_back(one[3]) end
return #lost
