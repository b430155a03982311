"""Holding: where jobs wait that no class can take soon, bound to nothing. Scripts run by the server, and their answers.

Whatever the broker, holding is in the state store, beside the jobs' records: a queue for all jobs of one tenant that
have the same candidates, ordered by deadline. `scripts.FORWARD` puts jobs in and, when they are placed, takes them out.
A router that releases draws jobs for some seconds; what it has not placed by then goes back. So none is lost with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from broker.valkey.scripts import DRAINS, HOLD, NOW
from taxiway.contract.keys import HELD, RELEASED, holding_key

SURVEY = (
    DRAINS
    + NOW
    + HOLD
    + f"""
-- KEYS: the set of holding queues, the releaser, the work hash. ARGV: router, ms for which no other router releases.
local answer = {{tostring(now), {{}}}}
local holder = redis.call('GET', KEYS[2])
if holder and holder ~= ARGV[1] then return answer end
redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[2])
for _, job in ipairs(redis.call('ZRANGEBYSCORE', '{RELEASED}', '-inf', now, 'LIMIT', 0, 1000)) do
  local message = redis.call('HGET', '{HELD}', job)
  redis.call('ZREM', '{RELEASED}', job)
  if message then hold(job, message) end
end
for _, queue in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  local key = '{holding_key("")}' .. queue
  local job, due = unpack(redis.call('ZRANGE', key, 0, 0, 'WITHSCORES'))
  if job then
    local level, jobs = redis.call('HGET', job, 'level'), redis.call('ZCARD', key)
    for _, part in ipairs({{queue, due, level, tostring(jobs)}}) do answer[#answer + 1] = part end
  else
    redis.call('SREM', KEYS[1], queue)
  end
end
if answer[3] then answer[2] = redis.call('HGETALL', KEYS[3]) end
return answer
"""
)
"""Answers the time, the cells of the work hash, and each holding queue's name, its first job's deadline and level, and
the number of its jobs; no queues to a second router."""

RESIGN = """
-- KEYS: the releaser. ARGV: router.
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
"""
"""Lets another router release at once, if this one did."""

DRAW = (
    DRAINS
    + NOW
    + f"""
-- ARGV: holding queue, most jobs, seconds after which those that are not placed go back.
local answer = {{tostring(now)}}
local drawn = redis.call('ZPOPMIN', '{holding_key("")}' .. ARGV[1], ARGV[2])
for i = 1, #drawn, 2 do
  local job = drawn[i]
  local accepted, due, reply = unpack(redis.call('HMGET', job, 'accepted', 'deadline_at', 'reply'))
  redis.call('ZADD', '{RELEASED}', now + ARGV[3], job)
  for _, part in ipairs({{redis.call('HGET', '{HELD}', job), accepted, due, reply or ''}}) do
    answer[#answer + 1] = part
  end
end
return answer
"""
)
"""Takes a queue's first jobs; answers the time, then each one's message, acceptance, deadline (0 = none) and client."""


@dataclass(frozen=True, slots=True)
class Line:
    """A holding queue: its name, the deadline and the level of the job that is first in it, and the number of its jobs.

    The deadline is by the store's clock, beyond `scripts.NEVER` for a job that has none.
    """

    queue: str
    due: float
    level: int
    jobs: int


@dataclass(frozen=True, slots=True)
class Survey:
    """The server's time, the holding queues that this router may release from, and the cells of `keys.WORK`."""

    now: float
    work: Mapping[str, float]
    lines: Sequence[Line]


@dataclass(frozen=True, slots=True)
class Drawn:
    """A job taken out of holding to be placed; times by the store's clock, `deadline_at` 0 where there is none."""

    message: bytes
    accepted: float
    deadline_at: float
    reply: str


def survey_answer(answer: Sequence[Any]) -> Survey:
    """What `SURVEY` saw."""
    cells = zip(answer[1][::2], answer[1][1::2], strict=True)
    lines = zip(answer[2::4], answer[3::4], answer[4::4], answer[5::4], strict=True)
    return Survey(
        now=float(answer[0]),
        work={cell.decode(): float(figure) for cell, figure in cells},
        lines=[Line(queue.decode(), float(due), int(level), int(jobs)) for queue, due, level, jobs in lines],
    )


def draw_args(queue: str, most: int, lease: float) -> list[Any]:
    """`DRAW`'s arguments."""
    return [queue, most, lease]


def draw_answer(answer: Sequence[bytes]) -> tuple[float, list[Drawn]]:
    """The server's time, and the jobs drawn, first due first."""
    jobs = zip(answer[1::4], answer[2::4], answer[3::4], answer[4::4], strict=True)
    return float(answer[0]), [Drawn(message, float(at), float(due), reply.decode()) for message, at, due, reply in jobs]
