-- lead(wanted, k, job, message): leads a message to the worker that has its prefix in a cache, where that delays nothing:
-- the worker waits for messages with a free slot, and all that waits for the class has one. `wanted` is MessagePack: the
-- record of the job that had the prefix before, the class's workers (name, keys of its room and of its list), how many
-- free slots less than another the worker may have, the class's queue, end of an unacked entry, seconds of a lease, and
-- seconds after which the message may return to the class's queue. KEYS[k] on: the unacked hash, its index, the class's
-- lists. Returns whether it was led.
--
-- The message stands among the unacked, and the worker's list has its tag. If nobody takes it, any worker finds it there
-- as what a silent one held (recover.lua). A worker that left an earlier one so long takes nothing.
-- Uses: now.
local function lead(wanted, k, job, message)
  local before, workers, most, queue, ending, lease, within = unpack(cmsgpack.unpack(wanted))
  local unacked, index = KEYS[k], KEYS[k + 1]
  local function free(room, list)
    local left, of = string.match(redis.call('GET', room) or '', '^(%d+) %d+ (.+)$')
    if of ~= queue then return 0 end
    local first = redis.call('LINDEX', list, -1)
    if first and redis.call('HEXISTS', unacked, first) == 0 then return 0 end
    return left - redis.call('LLEN', list)
  end
  local holder = string.match(redis.call('HGET', before, 'holder') or '', '^(.*)#%d+ ')
  local own, into, all, widest = 0, nil, 0, 0
  for _, worker in ipairs(workers) do
    local slots = free(worker[2], worker[3])
    if worker[1] == holder then own, into = slots, worker[3] end
    all, widest = all + math.max(slots, 0), math.max(widest, slots)
  end
  if own < 1 or widest - own > most then return false end
  for list = k + 2, k + 5 do all = all - redis.call('LLEN', KEYS[list]) end
  local tag = string.sub(redis.sha1hex(job), 1, 12) .. '.1.0'
  if all < 1 or redis.call('HSETNX', unacked, tag, '[' .. message .. ending) == 0 then return false end
  redis.call('ZADD', index, now - lease + within, tag)
  redis.call('LPUSH', into, tag)
  redis.call('PEXPIRE', into, math.floor(lease * 1000))
  redis.call('HSET', job, 'led', holder)
  return true
end
