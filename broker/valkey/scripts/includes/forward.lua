-- The whole of forward.lua and release_held.lua. Uses: was, the state that the records are in ('' = there is none).
--- @include "now"
--- @include "cells"
local work, held, released, holding, deadlines, accepted = unpack(KEYS, 1, 6)
local job_prefix, result_prefix, reply_prefix, holding_prefix = unpack(ARGV, 1, 4)
--- @include "hold"
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
local taking = ARGV[5] ~= '' and cmsgpack.unpack(ARGV[5])
local ours = not taking or redis.call('EXISTS', KEYS[taking.session]) == 1
local function keys_of(numbers)
  local keys = {}
  for n, number in ipairs(numbers) do keys[n] = KEYS[number] end
  return keys
end
local function due(job)
  return ours and (redis.call('EXISTS', job) == 0 and '' or redis.call('HGET', job, 'state')) == was
end
local function leave(job)
  local cell, seconds, queue = unpack(redis.call('HMGET', job, 'cell', 'work', 'holding'))
  if cell then
    redis.call('HINCRBYFLOAT', work, cell, -seconds)
    redis.call('HINCRBYFLOAT', work, jobs_cell(cell), -1)
  end
  if queue then let_go(job, queue) end
end
-- A record lasts until its job must have ended, and for its time after: who ends the job takes its work back by it. At
-- most ten years.
local function lasting(keep, deadline)
  return string.format('%d', math.min(math.max(deadline - now, 0) + keep, 315360000))
end
local function notify(job, client)
  local meta = redis.call('GET', result_prefix .. string.sub(job, #job_prefix + 1))
  if meta then redis.call('PUBLISH', reply_prefix .. client, meta) end
end
local function reply_to(job, client)
  if client then redis.call('HSET', job, 'reply', client) else redis.call('HDEL', job, 'reply') end
end
local function turn_of(cell, count) return redis.call('HINCRBY', work, turns_cell(cell), count) - count end
-- Writes a record in one command, with its turn in the cell and its client where it has such.
local function write(job, group, client)
  local fields = {unpack(group.record)}
  if group.cell then fields[#fields + 1], fields[#fields + 2] = 'turn', turn_of(group.cell, 1) end
  if client then fields[#fields + 1], fields[#fields + 2] = 'reply', client end
  redis.call('HSET', job, unpack(fields))
end
-- How many more jobs a tenant may have. One whose record expired is gone without an end: nobody lived to end it.
local function may_open(open, most)
  redis.call('ZREMRANGEBYSCORE', open, '-inf', now)
  return most - redis.call('ZCARD', open)
end
-- Whether the key was first used for the same; the submitter gets the result that says so.
local function used(job, client, use, new)
  if new then redis.call('HSET', job, 'digest', use.digest) end
  local first = redis.call('HGET', job, 'digest') or use.digest
  if use.submission ~= '' then
    local shown = string.sub(first, 1, use.shown)
    local meta = first == use.digest and use.same or string.gsub(use.other, use.placeholder, shown)
    redis.call('SET', result_prefix .. use.submission, meta, 'EX', use.keep)
    if client then redis.call('PUBLISH', reply_prefix .. client, meta) end
  end
  return first == use.digest
end
local done = {}
-- Writes the records of a group's jobs that are due; the first one's is written, and new ones after it are its copies.
-- Returns the due jobs' messages and records, and how many records are copies, which still have the first one's turn.
local function record(group, keep, open)
  local left = open and was == '' and ours and may_open(open, group.max_depth)
  local messages, jobs, copies, first = {}, {}, 0, nil
  for _, one in ipairs(group.jobs) do
    local job, use, new = KEYS[one.key], one.use, false
    local over = left and left < 1 and redis.call('EXISTS', job) == 0
    if over then
      use = nil
    elseif first and KEYS[first.key] ~= job then
      new = redis.call('COPY', KEYS[first.key], job) == 1
      if new then copies = copies + 1 end
      if new and one.client ~= first.client then reply_to(job, one.client) end
    elseif due(job) then
      if was ~= '' then leave(job) end
      write(job, group, one.client)
      redis.call('EXPIRE', job, keep)
      new = true
      if was == '' then first = one end
    end
    if new then
      if group.holding then hold(job, one.message) end
      if open then redis.call('ZADD', open, group.holding and '+inf' or now + keep, job) end
      if left then left = left - 1 end
      messages[#messages + 1], jobs[#jobs + 1] = one.message, job
    elseif ours and one.client and not over then
      notify(job, one.client)
    end
    done[#done + 1] = new and 1 or over and -2 or 0
    if ours and use and not used(job, one.client, use, new) then done[#done] = -1 end
  end
  return messages, jobs, copies
end
local function forward(group)
  local keep = group.deadline and lasting(group.keep, group.deadline) or group.keep
  local open = group.open and KEYS[group.open]
  local messages, jobs, copies = record(group, keep, open)
  if #messages == 0 then return end
  if group.cell and copies > 0 then
    local turn = turn_of(group.cell, copies)
    for n = 1, copies do redis.call('HSET', jobs[#jobs - copies + n], 'turn', turn + n - 1) end
  end
  local packed = cmsgpack.pack(jobs)
  if group.deadline then redis.call('ZADD', deadlines, group.deadline, packed) end
  if group.accepted then redis.call('ZADD', accepted, group.accepted, packed) end
  if group.list and not (group.affinity and prefer(group.affinity, jobs[1], messages[1])) then
    redis.call('LPUSH', KEYS[group.list], unpack(messages))
  end
  for _, blob in ipairs(keys_of(group.blobs or {})) do
    if group.holding then redis.call('PERSIST', blob) else redis.call('EXPIRE', blob, keep) end
  end
  for field, amount in pairs(group.work or {}) do redis.call('HINCRBYFLOAT', work, field, amount * #messages) end
  if group.spent then
    redis.call('HINCRBYFLOAT', KEYS[group.spent], group.tenant, group.cost * #messages)
    redis.call('EXPIRE', KEYS[group.spent], 172800)  -- a day's spending is read on that day: two days
  end
end
local function take(lists, into, most, bytes)
  local taken = {}
  if redis.call('EXISTS', unpack(lists)) == 0 then return taken end
  for _, from in ipairs(lists) do
    local waiting = redis.call('LLEN', from)
    local all = waiting > 1 and waiting <= most and redis.call('EXISTS', into) == 0
    if all and redis.call('MEMORY', 'USAGE', from, 'SAMPLES', 0) < bytes then  -- one step moves a list as it is
      redis.call('RENAME', from, into)
      local newest = redis.call('LRANGE', into, 0, -1)
      for n = waiting, 1, -1 do taken[#taken + 1], bytes = newest[n], bytes - #newest[n] end
      waiting = 0
    end
    for _ = 1, math.min(waiting, most - #taken) do
      if bytes <= 0 then break end
      local message = redis.call('LMOVE', from, into, 'RIGHT', 'LEFT')
      taken[#taken + 1], bytes = message, bytes - #message
    end
  end
  return taken
end
for _, one in ipairs(ours and cmsgpack.unpack(ARGV[6]) or {}) do
  redis.call('SET', KEYS[one.key], one.bytes, 'EX', one.keep, 'NX')
end
if ours and ARGV[7] ~= '' then
  local receipts = cmsgpack.unpack(ARGV[7])
  for _, line in ipairs(receipts.lines) do
    redis.call('XADD', KEYS[receipts.stream], 'MAXLEN', '~', receipts.most, '*', 'line', line)
  end
end
for n = 8, #ARGV do forward(cmsgpack.unpack(ARGV[n])) end
local taken = {}
if taking and ours then
  if #taking.answered > 0 then redis.call('DEL', unpack(keys_of(taking.answered))) end
  taken = take(keys_of(taking.arrivals), KEYS[taking.into], taking.most, taking.bytes)
end
return {ours and 1 or 0, done, taken}
