#!lua flags=allow-oom
-- Writes results once, announces them, and acknowledges their messages.
--
-- KEYS[1] work: hash of cell to device seconds and counts of jobs
-- KEYS[2] lengths: hash of model and tenant to the lengths of their answers
-- KEYS[3] held: hash of held job to its message
-- KEYS[4] released: sorted set of jobs that were drawn from holding and not placed
-- KEYS[5] unacked: kombu's hash of unacknowledged messages
-- KEYS[6] kombu's index of it
-- KEYS[7] webhooks_due: sorted set of webhook endpoints with events
-- KEYS[8..] each job's result and record. A record names its blobs, holding queue, day's spending, tenant's open jobs
--   and the webhook endpoints to notify
-- ARGV[1] seconds to keep a result
-- ARGV[2] seconds to keep a record
-- ARGV[3] prefix of clients' reply channels
-- ARGV[4] prefix of workers' channels of cancelled jobs
-- ARGV[5] prefix of holding queues' keys
-- ARGV[6] prefix of webhook outboxes' keys
-- ARGV[7] prefix of the keys of webhooks' dead letters
-- ARGV[8..] a map for each job:
--   token: of its claim; '' = no claim is needed, '-' = the job has no record: its arrival is refused
--   state, meta: its last state, and its result as Celery stores it
--   client: to notify; absent = the record's, read here, because a router may be writing it just now
--   bins: of the lengths that it generated, as JSON
--   started, device: its start, if that was not recorded before
--   tag: of its message, if this acknowledges it
-- Returns for each job 1 if its result was written, else 0.
--   It replaces the state that Celery reads of a running job (runs/report.lua).
-- Safe to run twice: a result that is there, or a job that ended, is left as it is.
--- @include "now"
--- @include "final"
--- @include "cells"
local work, lengths, held, released, unacked, index, webhooks_due = unpack(KEYS, 1, 7)
local keep_result, keep_record, reply_prefix, cancelled_prefix, holding_prefix, outbox_prefix, dead_prefix =
  unpack(ARGV, 1, 7)
--- @include "hold"
-- learn(cell, bins): adds lengths of answers, by bin, to the weights of a model and tenant (tasks.models.profiles).
-- What was counted before fades by 1 % with every answer; a cell is some 300 bytes, and at most 512 are kept: then one
-- at random is dropped. Uses: lengths.
local function learn(cell, bins)
  local known = redis.call('HGET', lengths, cell)
  if not known and redis.call('HLEN', lengths) >= 512 then
    redis.call('HDEL', lengths, redis.call('HRANDFIELD', lengths))
  end
  local weights, faded = known and cjson.decode(known) or {}, 0.99 ^ #bins
  for bin, weight in pairs(weights) do
    weight = math.floor(weight * faded * 1000) / 1000
    weights[bin] = weight >= 0.01 and weight or nil
  end
  for _, bin in ipairs(bins) do weights[tostring(bin)] = (weights[tostring(bin)] or 0) + 1 end
  redis.call('HSET', lengths, cell, cjson.encode(weights))
end
--- @include "outbox"
-- Notifies the worker that holds a job that it was ended for it.
local function notify_holder(holder, job)
  local worker = holder and string.match(holder, '(.*)#')
  if worker then redis.call('PUBLISH', cancelled_prefix .. worker, job) end
end
local written, tags, cells, jobs, finished = {}, {}, {}, {}, tostring(now)
for n = 8, #ARGV do
  local result, job, ending = KEYS[2 * n - 8], KEYS[2 * n - 7], cmsgpack.unpack(ARGV[n])
  local token, state, meta = ending.token, ending.state, ending.meta
  local was, holder, attempts, cell, seconds, answers, started, spent, tenant, cost, queue, blobs, open, reply,
    hooks, parts, celery_state, latest, before = unpack(redis.call('HMGET', job,
    'state', 'holder', 'attempts', 'cell', 'work', 'lengths', 'started', 'spent', 'tenant', 'cost', 'holding', 'blobs',
    'open', 'reply', 'webhooks', 'parts', 'celery_state', 'checkpoint', 'checkpoint_before'))
  local may = not final[was] and (token == '' or token == '-' and not was or has(holder, token))
  if may and celery_state then redis.call('DEL', result) end
  if may and redis.call('SET', result, meta, 'EX', keep_result, 'NX') then
    if cell then cells[cell], jobs[cell] = (cells[cell] or 0) + seconds, (jobs[cell] or 0) + 1 end
    if open then redis.call('ZREM', open, job) end
    if blobs and state ~= 'dead' then
      for blob in string.gmatch(blobs, '%S+') do redis.call('UNLINK', blob) end
    end
    if latest then redis.call('UNLINK', cjson.decode(latest).key) end
    if before then redis.call('UNLINK', cjson.decode(before).key) end
    if queue and queue ~= '' then let_go(job, queue) end
    if answers and ending.bins then learn(answers, cjson.decode(ending.bins)) end
    if spent and not started and not ending.started and redis.call('EXISTS', spent) == 1 then
      redis.call('HINCRBYFLOAT', spent, tenant, -cost)  -- a job that never started gives back what it was to cost
      redis.call('HSET', job, 'cost', 0)  -- if it did start on an endpoint, its bill follows
    end
    if ending.started then
      redis.call('HSET', job, 'state', state, 'finished', finished, 'started', ending.started, 'device', ending.device,
        'attempts', (attempts or 0) + 1)
    else
      redis.call('HSET', job, 'state', state, 'finished', finished)
    end
    if ending.bins then redis.call('HSET', job, 'generated', ending.bins) end
    if parts then redis.call('HDEL', job, 'generation') end
    redis.call('EXPIRE', job, keep_record)
    if token == '' then notify_holder(holder, job) end
    redis.call('PUBLISH', result, meta)
    local client = ending.client or reply
    if client then redis.call('PUBLISH', reply_prefix .. client, meta) end
    tags[#tags + 1] = ending.tag
    if hooks then announce(hooks, job, state, meta) end
    written[#written + 1] = 1
  else
    written[#written + 1] = 0
  end
end
for cell, seconds in pairs(cells) do
  local field = jobs_cell(cell)
  redis.call('HINCRBYFLOAT', work, cell, -seconds)
  if redis.call('HINCRBY', work, field, -jobs[cell]) < 0 then redis.call('HSET', work, field, 0) end
end
if #tags > 0 then
  redis.call('HDEL', unacked, unpack(tags))
  redis.call('ZREM', index, unpack(tags))
end
return written
