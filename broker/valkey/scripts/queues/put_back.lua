#!lua flags=allow-oom
-- Returns messages that a worker took to their places in their queues. The queues' lists follow from the messages.
--
-- KEYS[1] unacked: kombu's hash of unacknowledged messages
-- KEYS[2] index: kombu's index of it
-- ARGV[1..] tags, the last taken first
-- Returns nothing.
-- Safe to run twice: a message that was returned has no entry.
local unacked, index = KEYS[1], KEYS[2]
--- @include "put_back"
for _, tag in ipairs(ARGV) do put_back(tag) end
