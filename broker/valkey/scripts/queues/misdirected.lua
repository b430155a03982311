-- Reads the messages of one application in a queue that others may use, too; changes nothing.
-- KEYS: a queue's list. ARGV: how many of its oldest messages to look at, what stands in those that are wanted.
-- Returns the messages.
local found = {}
if redis.call('EXISTS', KEYS[1]) == 1 and redis.call('TYPE', KEYS[1]).ok == 'list' then
  for _, message in ipairs(redis.call('LRANGE', KEYS[1], -ARGV[1], -1)) do
    if string.find(message, ARGV[2], 1, true) then found[#found + 1] = message end
  end
end
return found
