-- rewrite(job, fields): a job's record gets these fields and values, and its work goes from the record's old cell to its
-- new one.
-- record_move(job, fields): the same for a job that waits; one that ended or runs keeps its record.
-- Uses: work, jobs_cell, turns_cell.
local function rewrite(job, fields)
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
local function record_move(job, fields)
  if #fields > 0 and redis.call('HGET', job, 'state') == 'queued' then rewrite(job, fields) end
end
