-- Forgets that a job ended dead, so that it can run again.
-- KEYS: the job, its result. Returns 0 where it ended in another way, or not at all.
-- Safe to run twice: what is forgotten is not there to be forgotten.
local state = redis.call('HGET', KEYS[1], 'state')
if state and state ~= 'dead' or not state and redis.call('EXISTS', KEYS[2]) == 1 then return 0 end
redis.call('DEL', KEYS[1], KEYS[2])
return 1
