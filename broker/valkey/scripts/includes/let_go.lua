-- let_go(job, queue): takes a job out of holding. Uses: held, released, holding_prefix.
local function let_go(job, queue)
  redis.call('ZREM', holding_prefix .. queue, job)
  redis.call('ZREM', released, job)
  redis.call('HDEL', held, job)
end
