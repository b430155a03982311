-- Records moves that another server makes.
-- KEYS: leader, work, then jobs. ARGV: fencing token, then for each job the number of fields, and its record's new ones.
-- Returns 1, or 0 where the token is not the leader's. Safe to run twice: the record says the same again.
--- @include "cells"
local work = KEYS[2]
--- @include "record_move"
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
local i = 2
for k = 3, #KEYS do
  local last = i + ARGV[i]
  record_move(KEYS[k], i + 1, last)
  i = last + 1
end
return 1
