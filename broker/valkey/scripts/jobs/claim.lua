#!lua flags=allow-oom
-- Claims jobs: the first claim wins.
--
-- KEYS[1..] each job's result and record
-- ARGV[1] worker
-- ARGV[2] seconds of a lease
-- ARGV[3..] each job's deadline; 0 = none
-- Returns the time, then for each job a verdict and its value (includes/claimed.lua).
-- Safe to run twice: a worker that holds a job already gets `held`, and the first claim's lease expires.
--- @include "now"
--- @include "final"
--- @include "claimed"
local answer = {tostring(now)}
for n = 1, #KEYS / 2 do
  answer[2 * n], answer[2 * n + 1] = claimed(ARGV[1], ARGV[2], KEYS[2 * n - 1], KEYS[2 * n], ARGV[n + 2])
end
return answer
