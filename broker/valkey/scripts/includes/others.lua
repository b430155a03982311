-- others(worker, class): whether another device than a worker's takes from a class's queue. A device is live for 3 s
-- after its heartbeat. Uses: now, devices, heartbeats.
local function others(worker, class)
  for _, name in ipairs(redis.call('ZRANGEBYSCORE', heartbeats, now - 3, '+inf')) do
    local encoded = name ~= worker and redis.call('HGET', devices, name)
    local facts = encoded and cjson.decode(encoded)
    if facts and not facts.draining then
      for _, served in ipairs(facts.serves or {facts.hardware_class}) do
        if served == class then return true end
      end
    end
  end
  return false
end
