-- Reads one application's messages in a queue that others may use, too.
--
-- KEYS[1] the queue's list
-- ARGV[1] how many of its oldest messages to inspect
-- ARGV[2] task of the wanted messages
-- ARGV[3] bytes above which a message is not decoded here
-- Returns the messages of that task, and those that were not decoded.
-- Safe to run twice: it changes nothing.
local function is_of(message, task)
  local read, decoded = pcall(cjson.decode, message)
  return read and type(decoded) == 'table' and type(decoded.headers) == 'table' and decoded.headers.task == task
end
local found = {}
if redis.call('EXISTS', KEYS[1]) == 1 and redis.call('TYPE', KEYS[1]).ok == 'list' then
  for _, message in ipairs(redis.call('LRANGE', KEYS[1], -ARGV[1], -1)) do
    if #message > tonumber(ARGV[3]) or is_of(message, ARGV[2]) then found[#found + 1] = message end
  end
end
return found
