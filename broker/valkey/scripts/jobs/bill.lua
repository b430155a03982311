#!lua flags=allow-oom
-- Charges what jobs used of endpoints to their tenants' spending, in place of the most that they may cost. A further
-- run counts with that again until it is billed (start.lua).
--
-- KEYS[1..] each job's record, which names the day's spending and the part of the job's cost that is counted there
-- ARGV[1..] a map for each job's bill: its `id` and US `dollars`
-- Returns for each job 1 if the bill was charged, else 0.
-- Safe to run twice: a bill is charged once.
local charged = {}
for n, job in ipairs(KEYS) do
  local bill = cmsgpack.unpack(ARGV[n])
  local new = redis.call('EXISTS', job) == 1 and redis.call('HSETNX', job, 'bill|' .. bill.id, bill.dollars) == 1
  if new then
    local spent, tenant, cost = unpack(redis.call('HMGET', job, 'spent', 'tenant', 'cost'))
    redis.call('HINCRBYFLOAT', job, 'billed', bill.dollars)
    if spent and redis.call('EXISTS', spent) == 1 then
      redis.call('HINCRBYFLOAT', spent, tenant, bill.dollars - (tonumber(cost) or 0))
    end
    if spent and (tonumber(cost) or 0) > 0 then redis.call('HSET', job, 'cost', 0, 'reserve', cost) end
  end
  charged[n] = new and 1 or 0
end
return charged
