-- put_back(tag): a message that a worker took returns to its place in its queue, whose lists kombu names by priority.
-- Nothing where it was acknowledged. Uses: unacked, index.
local function put_back(tag)
  local entry = redis.call('HGET', unacked, tag)
  redis.call('ZREM', index, tag)
  if not entry then return end
  redis.call('HDEL', unacked, tag)
  local message, _, queue = unpack(cjson.decode(entry))
  local priority = message.properties.priority or 0
  local list = priority >= 3 and queue .. '\6\22' .. (math.min(9, priority - priority % 3)) or queue
  redis.call('RPUSH', list, string.sub(entry, 2, #entry - 2 * #queue - 9))  -- less [ and , "queue", "queue"]
end
