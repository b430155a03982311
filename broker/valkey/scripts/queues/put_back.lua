#!lua flags=allow-oom
-- Returns messages that a worker took to their places in their queues.
-- KEYS: the unacked hash, its index. The queues' lists follow from the messages. ARGV: tags, the last taken first.
-- Returns nothing. Safe to run twice: a message that was put back has no entry.
local unacked, index = KEYS[1], KEYS[2]
--- @include "put_back"
for _, tag in ipairs(ARGV) do put_back(tag) end
