-- over(result, state, due, deadline): whether a copy of a job is not to run, by the job's record. Either the job ended
-- (its record, or only its result, says so), or it was accepted again with a later deadline, as a dead letter that is
-- replayed is: then its other message runs. Uses: final.
local function over(result, state, due, deadline)
  return final[state] or not state and redis.call('EXISTS', result) == 1 or deadline > 0 and due > deadline + 0.001
end
-- claimed(worker, lease, result, job, deadline, elsewhere): one job's claim, as its verdict and the value that goes with
-- it: run (token, runs begun, workers that it may have ended), held (seconds left), final, late or elsewhere; and the
-- job's device seconds. Uses: now, final.
--
-- Who holds a job may finish it after its deadline, so a job that is held is not late. A holder that neither ended the
-- job nor gave it back goes into the job's history. A copy with a later deadline than the record has the record's.
-- Where `elsewhere` tells whether another device could run it, a job that this very worker held when its lease ended is
-- left to that device for 5 s: it may be what ended the worker. The first holder that ended counts as ended by it, a later
-- one only if it handled nothing beside it (alone.lua). A claim on a job without a record stays for a day.
local function claimed(worker, lease, result, job, deadline, elsewhere)
  local state, attempts, claims, holder, held_until, history, due, blamed, alone, work = unpack(redis.call('HMGET', job,
    'state', 'attempts', 'claims', 'holder', 'held_until', 'history', 'deadline_at', 'blamed', 'alone', 'work'))
  deadline, due, work = tonumber(deadline), tonumber(due or 0), tonumber(work or 0) or 0
  if over(result, state, due, deadline) then return 'final', '', work end
  local was_held, left = holder and holder ~= '', (held_until or 0) - now
  if was_held and left > 0 then return 'held', tostring(left), work end
  if deadline > 0 and now > deadline or due > 0 and now > due then return 'late', '', work end
  local lately = was_held and elsewhere and left > -5
  if lately and string.match(holder, '^(.*)#') == worker and elsewhere() then return 'elsewhere', '', work end
  if was_held and (not blamed or alone == '1') then blamed = redis.call('HINCRBY', job, 'blamed', 1) end
  if alone or was_held then redis.call('HDEL', job, 'alone', 'yield') end
  if was_held and #(history or '') < 4000 then
    local worker_since = string.gsub(holder, '#%d+ ', ' ')
    redis.call('HSET', job, 'history', (history or '') .. worker_since .. ' ' .. (state or 'queued') .. '\n')
  end
  local number = (claims or 0) + 1
  local token = worker .. '#' .. number
  redis.call('HSET', job, 'claims', number, 'holder', token .. ' ' .. now, 'held_until', now + lease)
  if not state then redis.call('EXPIRE', job, 86400) end
  return 'run', token .. ' ' .. (attempts or 0) .. ' ' .. (blamed or 0) .. ' ' .. string.format('%.6f', due), work
end
