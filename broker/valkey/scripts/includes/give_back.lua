-- give_back(list, into): moves all of an in-flight list to where it is served first; answers how many messages.
local function give_back(list, into)
  local messages = redis.call('LLEN', list)
  for _ = 1, messages do redis.call('LMOVE', list, into, 'LEFT', 'RIGHT') end
  return messages
end
