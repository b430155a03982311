-- final: the states in which a job has ended, as taxiway.contract.job.FINAL names them.
local final = {cancelled = true, dead = true, expired = true, failed = true, succeeded = true}
