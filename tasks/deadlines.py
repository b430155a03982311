"""Which jobs are past their deadline, by the server's clock: the script that takes them, and its answer.

`forwarding` makes one group of jobs that go together; it waits in a sorted set by their deadline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tasks.scripts import DRAINS, ENDED, NOW
from taxiway.keys import DEADLINES, job_key

OVERDUE = (
    DRAINS
    + NOW
    + ENDED
    + f"""
-- ARGV: most groups, seconds after which what is left of them is answered again.
-- Answers how many groups of jobs were due, when the next one is (0 = there is none), then the key and the client of
-- each of their jobs that has not ended. What was placed anew since is in the group of its new deadline. What runs and
-- has no deadline goes on: who holds it ends it.
local groups = redis.call('ZRANGEBYSCORE', '{DEADLINES}', '-inf', now, 'LIMIT', 0, ARGV[1])
local out = {{#groups, '0'}}
for _, group in ipairs(groups) do
  local before = #out
  for _, job in ipairs(cmsgpack.unpack(group)) do
    local state, reply, due = unpack(redis.call('HMGET', job, 'state', 'reply', 'deadline_at'))
    due = tonumber(due or 0)
    if state and not final[state] and due <= now and (due > 0 or state ~= 'running') then
      out[#out + 1], out[#out + 2] = job, reply or ''
    end
  end
  if #out > before then
    redis.call('ZADD', '{DEADLINES}', now + ARGV[2], group)
  else
    redis.call('ZREM', '{DEADLINES}', group)
  end
end
out[2] = redis.call('ZRANGE', '{DEADLINES}', 0, 0, 'WITHSCORES')[2] or '0'
return out
"""
)
"""Takes jobs whose deadline passed and that are to be ended; a group is forgotten once all of it ended."""


def overdue_answer(answer: Sequence[Any]) -> tuple[int, list[tuple[str, str]], float]:
    """How many groups were due; their jobs, each with its client, empty where it has none; the next due, 0 for none."""
    groups, due, *jobs = answer
    pairs = zip(jobs[::2], jobs[1::2], strict=True)
    return groups, [(key.decode().removeprefix(job_key("")), reply.decode()) for key, reply in pairs], float(due)
