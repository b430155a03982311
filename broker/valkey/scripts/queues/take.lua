#!lua flags=allow-oom
-- Takes messages of a class queue into kombu's hash of unacknowledged messages, and claims their jobs. Keys of jobs and
-- results follow from the messages.
--
-- KEYS[1] unacked: kombu's hash of unacknowledged messages
-- KEYS[2] index: kombu's index of it
-- KEYS[3] the worker's free capacity
-- KEYS[4] devices: hash of worker to its device's facts
-- KEYS[5] heartbeats: sorted set of workers by the time of their last heartbeat
-- KEYS[6..] the queue's lists, first served first, and the list of the messages that prefer the worker, if it has one,
--   which is served before them
-- ARGV[1] beginning of tags
-- ARGV[2] end of an unacked entry
-- ARGV[3] worker
-- ARGV[4] seconds of a lease
-- ARGV[5] prefix of results' keys
-- ARGV[6] prefix of records' keys
-- ARGV[7] most seconds of patient work to take, as the jobs' records say
-- ARGV[8] number in tags from which on those are counted that are left to another device
-- ARGV[9] number of lists before the first one of patient work
-- ARGV[10] number of the queue's lists
-- ARGV[11] most messages; absent = the free capacity in KEYS[3]
-- ARGV[12] number of this take, which tags carry; absent = the one in KEYS[3]
-- Returns the time, the number of the take, then for each message: itself, its job, and verdict and value of the claim.
-- Safe to run twice: a message is taken once, and returns if nobody keeps it for a lease.
--
-- A job is claimed where the message says in the usual form which it is and that it has no eta; whoever reads the
-- ticket sees whether that was true. A job that another device should run is not answered: it stays among the unacked,
-- where any worker finds it within half a second as if a silent worker held it.
--- @include "now"
--- @include "final"
local unacked, index, room, devices, heartbeats = unpack(KEYS, 1, 5)
--- @include "others"
--- @include "over"
--- @include "claimed"
local tags, ending, worker, lease, result_prefix, job_prefix, ahead, parking, first_patient, lists, most, take = unpack(ARGV)
local pause, asked = 0.5, most
ahead = tonumber(ahead)
if not asked then most, take = string.match(redis.call('GET', room) or '0 0', '(%d+) (%d+)') end
local function after(message, name, pattern, from)
  local _, at = string.find(message, '\\"' .. name .. '\\":', from, true)
  return at and string.match(message, '^ ?' .. pattern, at + 1)
end
local function order_of(message)
  local at = string.find(message, '"taxiway":"', 1, true) or string.find(message, '"taxiway": "', 1, true)
  if not at or string.find(message, '"eta":"', 1, true) or string.find(message, '"eta": "', 1, true) then return nil end
  return after(message, 'job', '\\"([^\\"]+)', at), after(message, 'deadline_at', '([%d.e+]+)', at) or '0'
end
local function elsewhere() return others(worker, KEYS[6]) end
local answer, entries, scores, left, n, parked = {tostring(now), take}, {}, {}, tonumber(most), 0, 0
local function keep(message, number, at)
  local tag = tags .. take .. '.' .. number
  entries[#entries + 1], entries[#entries + 2] = tag, '[' .. message .. ending
  scores[#scores + 1], scores[#scores + 2] = at, tag
end
local function receive(message, patient)
  local verdict, value = '', ''
  local job, deadline = order_of(message)
  if job then
    verdict, value = claimed(worker, lease, result_prefix .. job, job_prefix .. job, deadline, elsewhere)
  end
  if verdict == 'elsewhere' then
    keep(message, parking + parked, now - lease + pause)
    parked = parked + 1
    return
  end
  if job and patient then ahead = ahead - (tonumber(redis.call('HGET', job_prefix .. job, 'work') or 0) or 0) end
  keep(message, n, now)
  answer[4 * n + 3], answer[4 * n + 4], answer[4 * n + 5], answer[4 * n + 6] = message, job or '', verdict, value
  n, left = n + 1, left - 1
end
local last = 5 + lists
local led = KEYS[last + 1]
while led and left > 0 do
  local tag = redis.call('RPOP', led)
  if not tag then break end
  local entry = redis.call('HGET', unacked, tag)
  if entry then  -- else it returned to the queue
    redis.call('HDEL', unacked, tag)
    redis.call('ZREM', index, tag)
    receive(string.sub(entry, 2, #entry - #ending), false)
  end
end
for k = 6, last do
  local patient = k - 6 >= tonumber(first_patient)
  local got = true
  while got and left > 0 and (not patient or ahead > 0) do
    got = redis.call('RPOP', KEYS[k], patient and 1 or left)
    for _, message in ipairs(got or {}) do receive(message, patient) end
    got = got and patient
  end
end
local lasting = math.floor(lease * 1000)
if asked then
  redis.call('SET', room, left .. ' ' .. take + 1 .. (led and ' ' .. KEYS[6] or ''), 'PX', lasting)
elseif n > 0 then
  redis.call('SET', room, '0 0', 'PX', lasting)
end
if #entries > 0 then
  redis.call('HSET', unacked, unpack(entries))
  redis.call('ZADD', index, unpack(scores))
end
return answer
