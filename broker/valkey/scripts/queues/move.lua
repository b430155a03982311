-- Moves messages between class queues and corrects their records, at once.
-- KEYS: leader, work, then for each message the list it is in, the list it goes to, and its job.
-- ARGV: fencing token, then for each message: its bytes, those that it gets, number of fields, and the record's new
--   fields.
-- Returns 1 for each message that was still there; nothing where the token is not the leader's.
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
