#!lua flags=allow-oom
-- Records that a worker still holds messages.
--
-- KEYS[1] kombu's index of unacknowledged messages
-- ARGV[1..] tags
-- Returns nothing.
-- Safe to run twice: the later call counts, and what was acknowledged stays so.
--- @include "now"
local scores = {}
for i, tag in ipairs(ARGV) do scores[2 * i - 1], scores[2 * i] = now, tag end
redis.call('ZADD', KEYS[1], 'XX', unpack(scores))
