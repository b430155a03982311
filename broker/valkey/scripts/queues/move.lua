-- Moves messages between class queues and corrects their records, at once. One whose job ran before, and lost its worker,
-- goes to the front of its list, where it returned to; the others to the end.
--
-- KEYS[1] the leader's fencing token
-- KEYS[2] work: hash of cell to device seconds and counts of jobs
-- KEYS[3..] for each message: the list it is in, the list it goes to, and its job's record
-- ARGV[1] fencing token
-- ARGV[2..] a map for each message: `message`, its bytes; `moved`, its new ones; `record`, new fields of its job's
--   record, each followed by its value
-- Returns for each message 1 if it was still there, else 0; nothing where the token is not the leader's.
-- Safe to run twice: a message that moved is not where it was.
--- @include "cells"
local work = KEYS[2]
--- @include "record_move"
local moved = {}
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return moved end
for n = 2, #ARGV do
  local source, target, job, step = KEYS[3 * n - 3], KEYS[3 * n - 2], KEYS[3 * n - 1], cmsgpack.unpack(ARGV[n])
  local there = redis.call('LREM', source, 1, step.message) == 1
  if there then
    local again = tonumber(redis.call('HGET', job, 'attempts') or 0) > 0
    redis.call(again and 'RPUSH' or 'LPUSH', target, step.moved)
    record_move(job, step.record)
  end
  moved[n - 1] = there and 1 or 0
end
return moved
