-- hold(job, message): a job's message waits in the holding queue that its record names, by deadline. What has no
-- deadline comes after all that have one, as it was accepted. The record stays as long as the message.
-- Uses: held, holding, holding_prefix.
local function hold(job, message)
  local queue, due, accepted = unpack(redis.call('HMGET', job, 'holding', 'deadline_at', 'accepted'))
  due = tonumber(due) > 0 and tonumber(due) or 1e10 + accepted
  redis.call('ZADD', holding_prefix .. queue, due, job)
  redis.call('SADD', holding, queue)
  redis.call('HSET', held, job, message)
  redis.call('PERSIST', job)
end
-- let_go(job, queue): takes a job out of holding. Uses: held, released, holding_prefix.
local function let_go(job, queue)
  redis.call('ZREM', holding_prefix .. queue, job)
  redis.call('ZREM', released, job)
  redis.call('HDEL', held, job)
end
