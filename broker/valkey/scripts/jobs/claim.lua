#!lua flags=allow-oom
-- Claims jobs: the first claim wins.
-- KEYS: for each job its result and its record. ARGV: worker, seconds of a lease, then each job's deadline (0 = none).
-- Returns the time, then a verdict and its value for each job (includes/claimed.lua).
-- Safe to run twice: who holds a job already is told `held`, and the first claim's lease ends by itself.
--- @include "now"
--- @include "final"
--- @include "over"
--- @include "claimed"
local answer = {tostring(now)}
for n = 1, #KEYS / 2 do
  answer[2 * n], answer[2 * n + 1] = claimed(ARGV[1], ARGV[2], KEYS[2 * n - 1], KEYS[2 * n], ARGV[n + 2])
end
return answer
