-- over(result, state, due, deadline): whether a copy of a job is not to run, by the job's record. Either the job ended
-- (its record, or only its result, says so), or it was accepted again with a later deadline, as a dead letter that is
-- replayed is: then its other message runs. Uses: final.
local function over(result, state, due, deadline)
  return final[state] or not state and redis.call('EXISTS', result) == 1 or deadline > 0 and due > deadline + 0.001
end
