-- Forgets that a job ended dead, so that it can run again.
--
-- KEYS[1] the job's record
-- KEYS[2] the job's result
-- Returns 0 where it ended in another way, or not at all, else 1.
-- Safe to run twice: what was forgotten is not there.
local state = redis.call('HGET', KEYS[1], 'state')
if state and state ~= 'dead' or not state and redis.call('EXISTS', KEYS[2]) == 1 then return 0 end
redis.call('DEL', KEYS[1], KEYS[2])
return 1
