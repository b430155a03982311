-- over(result, state, due, deadline): whether a copy of a job needs no run, by the job's record: it ended, or the copy
-- was published in vain, as its router thought, before the job was placed again with a later deadline: the other copy is
-- the job's. A record says that its job ended for longer than the result is kept. Uses: final.
local function over(result, state, due, deadline)
  return final[state] or not state and redis.call('EXISTS', result) == 1 or deadline > 0 and due > deadline + 0.001
end
