-- Shows the messages that lists serve last.
--
-- KEYS[1..] lists
-- ARGV[1] most messages of each
-- ARGV[2] most bytes of each
-- Returns how many there are in all, then for each list its messages; those pushed last come first.
-- Safe to run twice: it changes nothing.
local depth, shown = 0, {}
for k, list in ipairs(KEYS) do
  local seen, left = {}, tonumber(ARGV[2])
  for i = 0, tonumber(ARGV[1]) - 1 do
    local message = redis.call('LINDEX', list, i)
    if not message or #message > left then break end
    seen[#seen + 1], left = message, left - #message
  end
  depth, shown[k] = depth + redis.call('LLEN', list), seen
end
table.insert(shown, 1, depth)
return shown
