-- Records what a run reports, for pollers, for readers of the job's stream and for Celery's `AsyncResult`.
--
-- KEYS[1] the job's record
-- KEYS[2] its stream
-- KEYS[3] its result, which holds a state of Celery's until the job ends (finish.lua). What has no state on its record
--   would be taken for a job that ended (claimed.lua)
-- ARGV[1] seconds to keep the stream and the state after the last report
-- ARGV[2] most entries of the stream: the latest is what counts
-- ARGV[3] MessagePack map of the run: `token`, `ran` (seconds of all runs of the job), `progress` (JSON, '' = not new)
--   and `state` (Celery's, '' = none is wanted)
-- Returns 1 if the claim is still ours; else nothing is written.
-- Safe to run twice: readers see the same again.
--- @include "final"
local job, stream, result = unpack(KEYS)
local run = cmsgpack.unpack(ARGV[3])
if not ours(job, run.token) then return 0 end
redis.call('HSET', job, 'ran', run.ran)
if run.progress ~= '' then
  redis.call('HSET', job, 'progress', run.progress)
  redis.call('XADD', stream, 'MAXLEN', '~', ARGV[2], '*', 'p', run.progress)
  redis.call('EXPIRE', stream, ARGV[1])
end
if run.state ~= '' and redis.call('HEXISTS', job, 'state') == 1 then
  redis.call('HSET', job, 'celery_state', 1)
  redis.call('SET', result, run.state, 'EX', ARGV[1])
end
return 1
