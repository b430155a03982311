-- Answers which jobs were accepted in a span of time, what they asked for and what became of them, from their records.
--
-- KEYS[1] accepted: sorted set of groups of jobs' keys by the time at which they were accepted
-- ARGV[1] begin of the span
-- ARGV[2] end of the span, excluded
-- ARGV[3] groups to skip
-- ARGV[4] most groups
-- ARGV[5] number of jobs from which on no further group is inspected
-- ARGV[6..] names of states; the answer has their numbers, from 0 on
-- Returns how many groups were inspected; hardware classes; for each group that has a record left: when it was
--   accepted, its deadline, number of jobs, model, tenant and basis, of the first of them; then, packed for each job of
--   these groups: state, class (0 = none), seconds until it ended and seconds since it began to run (-1 = unknown);
--   then for each that generated answers: the number of jobs before it, and the bins of their lengths.
-- Safe to run twice: it changes nothing.
local states, numbers, classes = {}, {}, {}
for n = 6, #ARGV do states[ARGV[n]] = n - 6 end
local function number_of(class)
  if not class then return 0 end
  if not numbers[class] then
    classes[#classes + 1] = class
    numbers[class] = #classes
  end
  return numbers[class]
end
local answer, packed, generated, looked, most = {}, {}, {}, 0, tonumber(ARGV[5])
local groups = redis.call('ZRANGEBYSCORE', KEYS[1], ARGV[1], '(' .. ARGV[2], 'WITHSCORES', 'LIMIT', ARGV[3], ARGV[4])
for g = 1, #groups, 2 do
  if #packed >= most then break end
  local before, at = #packed, tonumber(groups[g + 1])
  for _, job in ipairs(cmsgpack.unpack(groups[g])) do
    local state, class, started, finished, bins =
      unpack(redis.call('HMGET', job, 'state', 'hardware_class', 'started', 'finished', 'generated'))
    if states[state] then
      if #packed == before then
        local due, model, tenant, basis = unpack(redis.call('HMGET', job, 'deadline_at', 'model', 'tenant', 'basis'))
        answer[#answer + 1], answer[#answer + 2], answer[#answer + 3] = groups[g + 1], due or '0', 0
        answer[#answer + 1], answer[#answer + 2], answer[#answer + 3] = model or '', tenant or '', basis or ''
      end
      if bins then generated[#generated + 1], generated[#generated + 2] = #packed, bins end
      packed[#packed + 1] = struct.pack('<BBff', states[state], number_of(class), finished and finished - at or -1,
        finished and started and finished - started or -1)
    end
  end
  if #packed > before then answer[#answer - 3] = #packed - before end
  looked = looked + 1
end
return {looked, classes, answer, table.concat(packed), generated}
