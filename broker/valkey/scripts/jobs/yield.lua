-- Asks the holders of running jobs to yield: to keep what is done and return the job to its queue.
--
-- KEYS[1] unacked: kombu's hash of unacknowledged messages
-- KEYS[2] work: hash of cell to device seconds and counts of jobs
-- KEYS[3..] for each job: its record, and the record of the job that waits for its place (its own if none does)
-- ARGV[1] seconds within which a job is to yield
-- ARGV[2] prefix of the channels that notify workers of cancellations
-- ARGV[3..] a map for each job: the `token` of its claim, the `reason`, and the token under which a worker has `held`
--   the waiting job ('' = none). One that is to move has the `tag` of its message, which becomes `moved`, its new bytes as an unacknowledged one: it returns to the queue that these name. Its
--   record gets the new fields in `record`, each followed by its value
-- Returns for each job 1 if its holder was asked, 0 if it is not held under that token, ended, or was asked before, and
--   -1 if the job that was to have its place does not wait any more.
-- Safe to run twice: a holder is asked once. It answers by releasing the job (release.lua).
--- @include "now"
--- @include "final"
--- @include "cells"
local unacked, work, seconds, prefix, asked = KEYS[1], KEYS[2], ARGV[1], ARGV[2], {}
--- @include "record_move"
local function waits(job, held)
  local state, holder = unpack(redis.call('HMGET', job, 'state', 'holder'))
  return state == 'queued' and string.match(holder or '', '%S*') == held
end
for n = 1, #KEYS / 2 - 1 do
  local job, waiting, ask = KEYS[2 * n + 1], KEYS[2 * n + 2], cmsgpack.unpack(ARGV[n + 2])
  if waiting ~= job and not waits(waiting, ask.held) then
    asked[n] = -1
  elseif ours(job, ask.token)
    and not (ask.tag and redis.call('HEXISTS', unacked, ask.tag) == 0)
    and redis.call('HSETNX', job, 'yield', string.format('%.3f ', now + seconds) .. ask.reason) == 1 then
    local worker = string.match(ask.token, '(.*)#')
    redis.call('PUBLISH', prefix .. worker, cmsgpack.pack({job, ask.token, seconds, ask.reason}))
    if ask.tag then
      redis.call('HSET', unacked, ask.tag, ask.moved)
      rewrite(job, ask.record)
    end
    asked[n] = 1
  else
    asked[n] = 0
  end
end
return asked
