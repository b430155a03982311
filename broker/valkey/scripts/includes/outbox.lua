-- put(event, endpoints, most, most_dead): adds an event to the outboxes of endpoints. One that is full gives it up at
-- once: it becomes a dead letter, of which the oldest are dropped.
-- announce(hooks, job, state, meta): adds the event of a job's end. `hooks` is what the job's record says of it, as
-- JSON: the endpoints to notify of each ending, and limits. `meta` says why it failed; more than 8 KiB is left out.
-- Uses: now, outbox_prefix, dead_prefix, webhooks_due.
local function put(event, endpoints, most, most_dead)
  local packed = cmsgpack.pack(event)
  for _, endpoint in ipairs(endpoints) do
    if redis.call('LLEN', outbox_prefix .. endpoint) < most then
      redis.call('RPUSH', outbox_prefix .. endpoint, packed)
      redis.call('ZADD', webhooks_due, 'NX', now, endpoint)
    else
      redis.call('LPUSH', dead_prefix .. endpoint, cmsgpack.pack({event, now, 0, 'the outbox is full'}))
      redis.call('LTRIM', dead_prefix .. endpoint, 0, most_dead - 1)
    end
  end
end
local endings = {succeeded = 'completed', cancelled = 'cancelled'}
local function announce(hooks, job, state, meta)
  local read, notified = pcall(cjson.decode, hooks)
  local ending = endings[state] or 'failed'
  local endpoints = read and type(notified) == 'table' and notified.endpoints  -- what ends a job must not fail for this
  endpoints = endpoints and endpoints[ending]
  if not endpoints then return end
  local id = string.sub(redis.sha1hex(job .. ' ' .. tostring(now)), 1, 32)
  local model = redis.call('HGET', job, 'model') or ''
  local why = state ~= 'succeeded' and #meta <= 8192 and meta or ''
  put({id, 'job', ending, now, job, model, state, why}, endpoints, notified.most, notified.most_dead)
end
