#!lua flags=allow-oom
-- Records that messages are still held. KEYS: the index of unacknowledged messages. ARGV: tags. Returns nothing.
-- Safe to run twice: the later call counts, and what was acknowledged stays so.
--- @include "now"
local scores = {}
for i, tag in ipairs(ARGV) do scores[2 * i - 1], scores[2 * i] = now, tag end
redis.call('ZADD', KEYS[1], 'XX', unpack(scores))
