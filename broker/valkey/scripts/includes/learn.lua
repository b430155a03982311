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
