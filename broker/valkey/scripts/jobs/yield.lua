-- Asks the holders of running jobs to yield: to keep what is done and return the job to its queue.
--
-- KEYS[1..] for each job: its record, and the record of the job that waits for its place (its own if none does)
-- ARGV[1] seconds within which a job is to yield
-- ARGV[2] prefix of the channels that notify workers of cancellations
-- ARGV[3..] a map for each job: the `token` of its claim, and the `reason`
-- Returns for each job 1 if its holder was asked, 0 if it is not held under that token, ended, or was asked before, and
--   -1 if the job that was to have its place does not wait any more.
-- Safe to run twice: a holder is asked once. It answers by releasing the job (release.lua).
--- @include "now"
--- @include "final"
--- @include "ours"
local seconds, prefix, asked = ARGV[1], ARGV[2], {}
local function waits(job)
  local state, holder = unpack(redis.call('HMGET', job, 'state', 'holder'))
  return state == 'queued' and (holder or '') == ''
end
for n = 1, #KEYS / 2 do
  local job, waiting, ask = KEYS[2 * n - 1], KEYS[2 * n], cmsgpack.unpack(ARGV[n + 2])
  if waiting ~= job and not waits(waiting) then
    asked[n] = -1
  elseif ours(job, ask.token)
    and redis.call('HSETNX', job, 'yield', string.format('%.3f ', now + seconds) .. ask.reason) == 1 then
    local worker = string.match(ask.token, '(.*)#')
    redis.call('PUBLISH', prefix .. worker, cmsgpack.pack({job, ask.token, seconds, ask.reason}))
    asked[n] = 1
  else
    asked[n] = 0
  end
end
return asked
