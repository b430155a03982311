-- record_move(job, fields): a job's record gets these fields and values, and its work goes from the record's old cell
-- to its new one. A job that ended or runs keeps its record. Uses: work, jobs_cell, turns_cell.
local function record_move(job, fields)
  if #fields == 0 or redis.call('HGET', job, 'state') ~= 'queued' then return end
  local cell, seconds = unpack(redis.call('HMGET', job, 'cell', 'work'))
  redis.call('HSET', job, unpack(fields))
  if not cell then return end
  redis.call('HINCRBYFLOAT', work, cell, -seconds)
  redis.call('HINCRBYFLOAT', work, jobs_cell(cell), -1)
  cell, seconds = unpack(redis.call('HMGET', job, 'cell', 'work'))
  redis.call('HINCRBYFLOAT', work, cell, seconds)
  redis.call('HINCRBYFLOAT', work, jobs_cell(cell), 1)
  redis.call('HSET', job, 'turn', redis.call('HINCRBY', work, turns_cell(cell), 1) - 1)
end
