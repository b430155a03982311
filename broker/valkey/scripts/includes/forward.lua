-- The whole of forward.lua and release_held.lua. Uses: was, the state that the records are in ('' = there is none).
--- @include "now"
--- @include "cells"
local work, held, released, holding, deadlines, accepted = unpack(KEYS, 1, 6)
local life, into, levels, in_flight = KEYS[7], KEYS[8], tonumber(ARGV[1]), tonumber(ARGV[2])
local job_prefix, result_prefix, reply_prefix, holding_prefix = unpack(ARGV, 5, 8)
--- @include "hold"
--- @include "let_go"
local ours = levels == 0 or redis.call('EXISTS', life) == 1
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
  if client == '' then redis.call('HDEL', job, 'reply') else redis.call('HSET', job, 'reply', client) end
end
local function turn_of(cell, count) return redis.call('HINCRBY', work, turns_cell(cell), count) - count end
-- Writes a record in one command, with its turn in the cell and its client where it has such.
local function write(job, cell, client, fields)
  if cell ~= '' then fields[#fields + 1], fields[#fields + 2] = 'turn', turn_of(cell, 1) end
  if client ~= '' then fields[#fields + 1], fields[#fields + 2] = 'reply', client end
  redis.call('HSET', job, unpack(fields))
end
-- How many more jobs a tenant may have. One whose record expired is gone without an end: nobody lived to end it.
local function room(open, most)
  redis.call('ZREMRANGEBYSCORE', open, '-inf', now)
  return most - redis.call('ZCARD', open)
end
local function used(job, client, use, new)
  local digest, submission, same, other, keep, placeholder, shown = unpack(cmsgpack.unpack(use))
  if new then redis.call('HSET', job, 'digest', digest) end
  local first = redis.call('HGET', job, 'digest') or digest
  if submission ~= '' then
    local meta = first == digest and same or string.gsub(other, placeholder, string.sub(first, 1, shown))
    redis.call('SET', result_prefix .. submission, meta, 'EX', keep)
    if client ~= '' then redis.call('PUBLISH', reply_prefix .. client, meta) end
  end
  return first == digest
end
local function take(most, bytes)
  local taken = {}
  if redis.call('EXISTS', unpack(KEYS, 9, 8 + levels)) == 0 then return taken end
  for level = 1, levels do
    local from = KEYS[8 + level]
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
--- @include "lead"
local done, i, k = {}, 10, levels == 0 and 7 or 9 + levels + in_flight
for _ = 1, tonumber(ARGV[9]) do
  if ours then redis.call('SET', KEYS[k], ARGV[i], 'EX', ARGV[i + 1], 'NX') end
  i, k = i + 2, k + 1
end
while i <= #ARGV do
  local published, keep, queue, blobs, deadline, listed, cell = unpack(ARGV, i, i + 6)
  if tonumber(deadline) > 0 then keep = lasting(keep, deadline) end
  local fields, charges = cmsgpack.unpack(ARGV[i + 7]), cmsgpack.unpack(ARGV[i + 8])
  local tenant, cost, most, count = unpack(ARGV, i + 9, i + 12)
  local list, spent, wanted, open
  if published ~= '' then list, k = KEYS[k], k + 1 end
  if #published > 1 then wanted, k = k, k + 6 end
  if tenant ~= '' then spent, k = KEYS[k], k + 1 end
  if most ~= '' then open, k = KEYS[k], k + 1 end
  local left = open and was == '' and ours and room(open, most)
  local first_blob = k
  k, i = k + blobs, i + 13
  local forwarded, jobs, copies = {}, {}, {}
  local first, its_client  -- of the group's new records: the others are copies of it, or there already
  for _ = 1, tonumber(count) do
    local job, new = KEYS[k], nil
    local client, message, use = unpack(ARGV, i, i + 2)
    k, i = k + 1, i + 3
    local over = left and left < 1 and redis.call('EXISTS', job) == 0
    if over then
      use = ''
    elseif first and job ~= first then
      new = redis.call('COPY', first, job) == 1
      if new then copies[#copies + 1] = job end
      if new and client ~= its_client then reply_to(job, client) end
    elseif due(job) then
      if was ~= '' then leave(job) end
      write(job, cell, client, {unpack(fields)})
      redis.call('EXPIRE', job, keep)
      new = true
      if was == '' then first, its_client = job, client end
    end
    if new then
      if queue ~= '' then hold(job, message) end
      if open then redis.call('ZADD', open, queue ~= '' and '+inf' or now + keep, job) end
      if left then left = left - 1 end
      forwarded[#forwarded + 1], jobs[#jobs + 1] = message, job
    elseif ours and client ~= '' and not over then
      notify(job, client)
    end
    done[#done + 1] = new and 1 or over and -2 or 0
    if ours and use ~= '' and not used(job, client, use, new) then done[#done] = -1 end
  end
  if #forwarded > 0 then
    if cell ~= '' and #copies > 0 then
      local turn = turn_of(cell, #copies)
      for n, job in ipairs(copies) do redis.call('HSET', job, 'turn', turn + n - 1) end
    end
    local group = cmsgpack.pack(jobs)
    if tonumber(deadline) > 0 then redis.call('ZADD', deadlines, deadline, group) end
    if tonumber(listed) > 0 then redis.call('ZADD', accepted, listed, group) end
    if list and not (wanted and lead(published, wanted, jobs[1], forwarded[1])) then
      redis.call('LPUSH', list, unpack(forwarded))
    end
    for b = first_blob, first_blob + blobs - 1 do
      if queue ~= '' then redis.call('PERSIST', KEYS[b]) else redis.call('EXPIRE', KEYS[b], keep) end
    end
    for c = 1, #charges, 2 do redis.call('HINCRBYFLOAT', work, charges[c], charges[c + 1] * #forwarded) end
    if spent then
      redis.call('HINCRBYFLOAT', spent, tenant, cost * #forwarded)
      redis.call('EXPIRE', spent, 172800)  -- a day's spending is read on that day: two days
    end
  end
end
local taken = {}
if ours and levels > 0 then
  if in_flight > 0 then redis.call('DEL', unpack(KEYS, 9 + levels, 8 + levels + in_flight)) end
  taken = take(tonumber(ARGV[3]), tonumber(ARGV[4]))
end
return {tostring(now), ours and 1 or 0, done, taken}
