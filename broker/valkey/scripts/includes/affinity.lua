-- prefer(affinity, job, message): gives a message to the worker that has its prefix in a cache, where that delays
-- nothing: the worker waits for messages with a free slot, and each message that waits for the class has one.
-- Returns whether it did. `affinity` is a map, in which numbers of KEYS name keys:
--   before: record of the job that had the prefix before
--   workers: the class's, each a map of its `name`, its free `capacity` and its `list` of tags
--   most: how many free slots fewer than another worker's the worker may have
--   queue: the class's queue; lists: that queue's lists; ending: end of its unacked entries
--   unacked, index: kombu's hash of unacknowledged messages, and its index
--   lease: seconds; handover: seconds after which the message may return to the class's queue
--
-- The message is among the unacked, and the worker's list has its tag. If nobody takes it, any worker finds it there as
-- if a silent worker held it (recover.lua). A worker that left an earlier one there for so long gets nothing.
-- Uses: now.
local function prefer(affinity, job, message)
  local unacked, index = KEYS[affinity.unacked], KEYS[affinity.index]
  local function free(worker)
    local left, queue = string.match(redis.call('GET', KEYS[worker.capacity]) or '', '^(%d+) %d+ (.+)$')
    if queue ~= affinity.queue then return 0 end
    local first = redis.call('LINDEX', KEYS[worker.list], -1)
    if first and redis.call('HEXISTS', unacked, first) == 0 then return 0 end
    return left - redis.call('LLEN', KEYS[worker.list])
  end
  local holder = string.match(redis.call('HGET', KEYS[affinity.before], 'holder') or '', '^(.*)#%d+ ')
  local own, into, all, widest = 0, nil, 0, 0
  for _, worker in ipairs(affinity.workers) do
    local slots = free(worker)
    if worker.name == holder then own, into = slots, KEYS[worker.list] end
    all, widest = all + math.max(slots, 0), math.max(widest, slots)
  end
  if own < 1 or widest - own > affinity.most then return false end
  for _, list in ipairs(affinity.lists) do all = all - redis.call('LLEN', KEYS[list]) end
  local tag = string.sub(redis.sha1hex(job), 1, 12) .. '.1.0'
  if all < 1 or redis.call('HSETNX', unacked, tag, '[' .. message .. affinity.ending) == 0 then return false end
  redis.call('ZADD', index, now - affinity.lease + affinity.handover, tag)
  redis.call('LPUSH', into, tag)
  redis.call('PEXPIRE', into, math.floor(affinity.lease * 1000))
  redis.call('HSET', job, 'led', holder)
  return true
end
