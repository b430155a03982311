-- Moves messages between class queues and corrects their records, at once.
--
-- KEYS[1] the leader's fencing token
-- KEYS[2] work: hash of cell to device seconds and counts of jobs
-- KEYS[3..] for each message: the list it is in, the list it goes to, and its job's record
-- ARGV[1] fencing token
-- ARGV[2..] for each message: its bytes, its new bytes, number of fields, and the record's new fields
-- Returns for each message 1 if it was still there, else 0; nothing where the token is not the leader's.
-- Safe to run twice: a message that moved is not where it was.
--- @include "cells"
local work = KEYS[2]
--- @include "record_move"
local moved, i = {}, 2
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return moved end
for k = 3, #KEYS, 3 do
  local last = i + 2 + ARGV[i + 2]
  local there = redis.call('LREM', KEYS[k], 1, ARGV[i]) == 1
  if there then
    redis.call('LPUSH', KEYS[k + 1], ARGV[i + 1])
    record_move(KEYS[k + 2], i + 3, last)
  end
  moved[#moved + 1], i = there and 1 or 0, last + 1
end
return moved
