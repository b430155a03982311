#!lua flags=allow-oom
-- Takes messages of a class queue into kombu's hash of unacknowledged messages, and claims their jobs. Keys of jobs and
-- results follow from the messages.
--
-- KEYS[1] unacked: kombu's hash of unacknowledged messages
-- KEYS[2] index: kombu's index of it
-- KEYS[3] the worker's free capacity
-- KEYS[4] devices: hash of worker to its device's facts
-- KEYS[5] heartbeats: sorted set of workers by the time of their last heartbeat
-- KEYS[6] list of tags of the messages that prefer the worker, which are served first
-- KEYS[7..] the queue's lists, first served first; the first one has the queue's name
-- ARGV[1] beginning of tags
-- ARGV[2] end of an unacked entry
-- ARGV[3] worker
-- ARGV[4] seconds of a lease
-- ARGV[5] prefix of results' keys
-- ARGV[6] prefix of records' keys
-- ARGV[7] most seconds of patient work to take, as the jobs' records say
-- ARGV[8] number in tags from which on messages are counted that are left to another device
-- ARGV[9] number of lists before the first one of patient work
-- ARGV[10] 1 if messages may prefer the worker, else 0
-- ARGV[11] most messages; absent = the free capacity in KEYS[3]
-- ARGV[12] number of this take, which tags carry; absent = the one in KEYS[3]
-- Returns the time, the number of the take, then for each message: itself, its job, and verdict and value of the claim.
-- Safe to run twice: a message is taken once, and returns if nobody keeps it for a lease.
--
-- A message's first property names its job and deadline, and the job is claimed with it; a message with an eta has none.
-- The worker checks that its signed ticket is for that job. A job that another device should run is not answered: it
-- stays among the unacked, where any worker finds it within half a second as if a silent worker held it.
--- @include "now"
--- @include "final"
local unacked, index, capacity, devices, heartbeats, preferring = unpack(KEYS, 1, 6)
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
--- @include "claimed"
local tags, ending, worker, lease, result_prefix, job_prefix, ahead, others_from, urgent, preferred = unpack(ARGV, 1, 10)
local asked, queue, pause = ARGV[11], KEYS[7], 0.5
local most, take = asked, ARGV[12]
if not asked then most, take = string.match(redis.call('GET', capacity) or '0 0', '(%d+) (%d+)') end
-- A message of the previous release has its job and deadline only in its ticket, after the signature's 64 digits.
local function from_ticket(message)
  local headers = cjson.decode(message).headers
  return type(headers.eta) ~= 'string' and cjson.decode(string.sub(headers.taxiway, 65))
end
local function claimable(message)
  local first = string.match(message, '^{"properties": ?{"taxiway_job": ?({[^{}]*})')
  local read, found = pcall(first and cjson.decode or from_ticket, first or message)
  if read and type(found) == 'table' and type(found.job) == 'string' then return found.job, tonumber(found.deadline_at) end
end
local function elsewhere() return others(worker, queue) end
local answer, entries, scores = {tostring(now), take}, {}, {}
local left, n, left_to_others = tonumber(most), 0, 0
ahead = tonumber(ahead)
local function keep(message, number, at)
  local tag = tags .. take .. '.' .. number
  entries[#entries + 1], entries[#entries + 2] = tag, '[' .. message .. ending
  scores[#scores + 1], scores[#scores + 2] = at, tag
end
-- Claims a message's job, and returns the job's device seconds.
local function receive(message)
  local verdict, value, seconds = '', '', 0
  local job, deadline = claimable(message)
  if job then
    verdict, value, seconds = claimed(worker, lease, result_prefix .. job, job_prefix .. job, deadline or 0, elsewhere)
  end
  if verdict == 'elsewhere' then
    keep(message, others_from + left_to_others, now - lease + pause)
    left_to_others = left_to_others + 1
    return 0
  end
  keep(message, n, now)
  answer[4 * n + 3], answer[4 * n + 4], answer[4 * n + 5], answer[4 * n + 6] = message, job or '', verdict, value
  n, left = n + 1, left - 1
  return seconds
end
-- Takes patient messages while there is room for their work: as many at once as there would be of the longest so far.
local function take_patient(list)
  local some, longest = 1, 0
  while left > 0 and ahead > 0 do
    local got, m = redis.call('RPOP', list, some) or {}, 1
    if #got == 0 then return end
    while got[m] and ahead > 0 do
      local seconds = receive(got[m])
      ahead, longest, m = ahead - seconds, math.max(longest, seconds), m + 1
    end
    for rest = #got, m, -1 do redis.call('RPUSH', list, got[rest]) end  -- after one that was longer than expected
    some = longest > 0 and math.max(math.min(left, math.floor(ahead / longest)), 1) or left
  end
end
while preferred == '1' and left > 0 do
  local tag = redis.call('RPOP', preferring)
  if not tag then break end
  local entry = redis.call('HGET', unacked, tag)
  if entry then  -- else it returned to the queue
    redis.call('HDEL', unacked, tag)
    redis.call('ZREM', index, tag)
    receive(string.sub(entry, 2, #entry - #ending))
  end
end
for k = 7, #KEYS do
  if k - 7 >= tonumber(urgent) then
    take_patient(KEYS[k])
  elseif left > 0 then
    for _, message in ipairs(redis.call('RPOP', KEYS[k], left) or {}) do receive(message) end
  end
end
local lasting = math.floor(lease * 1000)
if asked then
  redis.call('SET', capacity, left .. ' ' .. take + 1 .. (preferred == '1' and ' ' .. queue or ''), 'PX', lasting)
elseif n > 0 then
  redis.call('SET', capacity, '0 0', 'PX', lasting)
end
if #entries > 0 then
  redis.call('HSET', unacked, unpack(entries))
  redis.call('ZADD', index, unpack(scores))
end
return answer
