-- Reads one application's messages in a queue that others may use, too.
--
-- KEYS[1] the queue's list
-- ARGV[1] how many of its oldest messages to inspect
-- ARGV[2] text that the wanted messages contain
-- Returns the messages.
-- Safe to run twice: it changes nothing.
local found = {}
if redis.call('EXISTS', KEYS[1]) == 1 and redis.call('TYPE', KEYS[1]).ok == 'list' then
  for _, message in ipairs(redis.call('LRANGE', KEYS[1], -ARGV[1], -1)) do
    if string.find(message, ARGV[2], 1, true) then found[#found + 1] = message end
  end
end
return found
