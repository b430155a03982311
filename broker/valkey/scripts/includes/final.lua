-- final: the states in which a job has ended, as taxiway.contract.job.FINAL names them.
local final = {cancelled = true, dead = true, expired = true, failed = true, succeeded = true}
-- has(holder, token): whether a holder, as a record says it, has this token.
-- ours(job, token): whether a job is held under this token: it has not ended, and nobody has claimed it since. A lease
-- that is over ends no claim alone.
local function has(holder, token) return holder and string.sub(holder, 1, #token + 1) == token .. ' ' end
local function ours(job, token)
  local state, holder = unpack(redis.call('HMGET', job, 'state', 'holder'))
  return has(holder, token) and not final[state]
end
