"""What must happen at once in the state store: Lua scripts run by the server, their arguments and their answers.

Key names come in as arguments made by `taxiway.keys`. Times come from the server's clock, so that no host's clock
decides who holds a claim or whether a deadline has passed. `register_script` of redis-py, sync or asyncio, runs them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import msgspec

from tasks.lengths import KEEP, NEGLIGIBLE, TENANTS_AT_MOST, bin_of
from taxiway.job import FINAL, JobState
from taxiway.keys import claim_key, job_key, reading_key, reply_channel, result_key

_NOW = """
local t = redis.call('TIME')
local now = t[1] + t[2] / 1000000
"""

TAKE = (
    _NOW
    + """
-- KEYS: a router's taken hash, then lists to take from, first served first.
-- ARGV: most messages, prefix of tags: another one each time, for a tag that comes again would hide a recovery.
local answer, left = {tostring(now)}, tonumber(ARGV[1])
for k = 2, #KEYS do
  local got = left > 0 and redis.call('RPOP', KEYS[k], left) or {}
  for _, message in ipairs(got or {}) do
    local tag = ARGV[2] .. left
    redis.call('HSET', KEYS[1], tag, message)
    answer[#answer + 1], answer[#answer + 2], left = tag, message, left - 1
  end
end
return answer
"""
)
"""Moves arrivals into the taken hash; answers the time, then a tag and a message for each."""

FORWARD = """
-- KEYS: the taken hash, the work hash.
-- ARGV, six a message and then its fields: tag, list, message, job key, seconds to keep the record, number of fields.
-- A tag that is gone was recovered by another router: its message is that router's to forward. A job that has a record
-- arrived before: the copy is dropped; so is a reading that is there. The work hash gains the job's seconds and rows,
-- its `spent` key what it costs.
-- Answers 1 for each message forwarded.
local i, answer = 1, {}
while i <= #ARGV do
  local tag, list, message, job, keep, n = unpack(ARGV, i, i + 5)
  local ours = tag == '' or redis.call('HDEL', KEYS[1], tag) == 1
  local fresh = tonumber(n) > 0 and redis.call('EXISTS', job) == 0
  if ours and fresh then
    if list ~= '' then redis.call('LPUSH', list, message) end
    redis.call('HSET', job, unpack(ARGV, i + 6, i + 5 + n))
    redis.call('EXPIRE', job, keep)
    local cell, work, arrived, rows, spent, tenant, cost =
      unpack(redis.call('HMGET', job, 'cell', 'work', 'arrived', 'rows', 'spent', 'tenant', 'cost'))
    if cell then redis.call('HINCRBYFLOAT', KEYS[2], cell, work) end
    if arrived then redis.call('HINCRBY', KEYS[2], arrived, rows) end
    if spent then
      redis.call('HINCRBYFLOAT', spent, tenant, cost)
      redis.call('EXPIRE', spent, 172800)  -- two days
    end
  end
  answer[#answer + 1] = (ours and fresh) and 1 or 0
  i = i + 6 + n
end
return answer
"""
"""Publishes placed messages and writes their records, at once; answers 1 for each that was forwarded."""

RECOVER = """
-- KEYS: the set of routers, the router's life key, its taken hash, the arrivals list. ARGV: the router.
if redis.call('EXISTS', KEYS[2]) == 1 then return 0 end
local taken = redis.call('HVALS', KEYS[3])
for _, message in ipairs(taken) do redis.call('RPUSH', KEYS[4], message) end
redis.call('DEL', KEYS[3])
redis.call('SREM', KEYS[1], ARGV[1])
return #taken
"""
"""Puts back what a dead router had taken; answers how many."""

_ENDED = (
    "local final = {"
    + ", ".join(f"{state} = true" for state in sorted(FINAL))
    + """}
-- A record says that its job ended for longer than the result is kept.
local function ended(result, job)
  return final[redis.call('HGET', job, 'state')] or redis.call('EXISTS', result) == 1
end
"""
)

CLAIM = (
    _NOW
    + _ENDED
    + """
-- ARGV: worker, lease in ms, then for each job: result key, claim key, job key, deadline (0 = none), device.
-- Who holds a job may finish it after its deadline, so a job that is held is not late.
local answer = {tostring(now)}
for i = 3, #ARGV, 5 do
  local result, claim, job, deadline, device = unpack(ARGV, i, i + 4)
  local verdict, value = 'run', ''
  if ended(result, job) then
    verdict = 'final'
  elseif redis.call('EXISTS', claim) == 1 then
    verdict, value = 'held', tostring(redis.call('PTTL', claim))
  elseif tonumber(deadline) > 0 and now > tonumber(deadline) then
    verdict = 'late'
  else
    value = ARGV[1] .. '#' .. redis.call('HINCRBY', job, 'attempts', 1)
    redis.call('SET', claim, value, 'PX', ARGV[2])
    redis.call('HSET', job, 'state', 'running', 'started', tostring(now), 'device', device)
  end
  answer[#answer + 1], answer[#answer + 2] = verdict, value
end
return answer
"""
)
"""First claim wins. Answers the time, then a verdict and its value for each job."""

RENEW = """
-- ARGV: lease in ms, then a claim key and its token for each job. Answers how many are still ours.
local ours = 0
for i = 2, #ARGV, 2 do
  if redis.call('GET', ARGV[i]) == ARGV[i + 1] then ours = ours + redis.call('PEXPIRE', ARGV[i], ARGV[1]) end
end
return ours
"""
"""Prolongs claims."""

RELEASE = """
-- ARGV: for each job, claim key, token, job key.
for i = 1, #ARGV, 3 do
  if redis.call('GET', ARGV[i]) == ARGV[i + 1] then
    redis.call('DEL', ARGV[i])
    redis.call('HSET', ARGV[i + 2], 'state', 'queued')
  end
end
"""
"""Gives claims back, for jobs that return to their queue."""

_LEARN = f"""
-- Weights by bin: what was counted fades a little with every answer that is added. A cell is some 300 bytes.
local function learn(cell, bins)
  local known = redis.call('HGET', KEYS[2], cell)
  if not known and redis.call('HLEN', KEYS[2]) >= {TENANTS_AT_MOST} then
    redis.call('HDEL', KEYS[2], redis.call('HRANDFIELD', KEYS[2]))
  end
  local weights, faded = known and cjson.decode(known) or {{}}, {KEEP} ^ #bins
  for bin, weight in pairs(weights) do
    weight = math.floor(weight * faded * 1000) / 1000
    weights[bin] = weight >= {NEGLIGIBLE} and weight or nil
  end
  for _, bin in ipairs(bins) do weights[tostring(bin)] = (weights[tostring(bin)] or 0) + 1 end
  redis.call('HSET', KEYS[2], cell, cjson.encode(weights))
end
"""

FINISH = (
    _NOW
    + _ENDED
    + _LEARN
    + """
-- KEYS: the work hash, the hash of lengths. ARGV: seconds to keep a result, seconds to keep a record, then for each
-- job: result key, claim key, job key, token ('' = no claim is needed), state, meta, reply channel ('' = none),
-- bins of the lengths that it generated ('' = none). A job that never started gives back what it was to cost.
local written = {}
for i = 3, #ARGV, 8 do
  local result, claim, job, token, state, meta, reply, bins = unpack(ARGV, i, i + 7)
  local ours = token == '' or redis.call('GET', claim) == token
  if ours and not ended(result, job) then
    redis.call('SET', result, meta, 'EX', ARGV[1])
    local cell, work, lengths, started, spent, tenant, cost =
      unpack(redis.call('HMGET', job, 'cell', 'work', 'lengths', 'started', 'spent', 'tenant', 'cost'))
    if cell then redis.call('HINCRBYFLOAT', KEYS[1], cell, -work) end
    if lengths and bins ~= '' then learn(lengths, cjson.decode(bins)) end
    if spent and not started and redis.call('EXISTS', spent) == 1 then
      redis.call('HINCRBYFLOAT', spent, tenant, -cost)
    end
    redis.call('HSET', job, 'state', state, 'finished', tostring(now))
    redis.call('EXPIRE', job, ARGV[2])
    redis.call('DEL', claim)
    redis.call('PUBLISH', result, meta)
    if reply ~= '' then redis.call('PUBLISH', reply, meta) end
    written[#written + 1] = 1
  else
    written[#written + 1] = 0
  end
end
return written
"""
)
"""Writes results once and announces them; answers 1 for each that was written."""

HEARTBEAT = (
    _NOW
    + """
-- KEYS: hash of devices, sorted set of heartbeats. ARGV: worker, facts ('' = gone).
if ARGV[2] == '' then
  redis.call('HDEL', KEYS[1], ARGV[1])
  redis.call('ZREM', KEYS[2], ARGV[1])
else
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
  redis.call('ZADD', KEYS[2], now, ARGV[1])
end
return tostring(now)
"""
)
"""Publishes one device's facts under the server's time."""


class Verdict(StrEnum):
    """What became of a claim."""

    RUN = "run"
    FINAL = "final"
    LATE = "late"
    HELD = "held"


@dataclass(frozen=True, slots=True)
class Claim:
    """One job's claim: its fencing token where it may run, seconds until it may be tried again where it is held."""

    verdict: Verdict
    token: str = ""
    retry_in: float = 0.0


@dataclass(frozen=True, slots=True)
class Forward:
    """One taken message and where it goes.

    Without a `queue_list` it only records the job (it was published elsewhere); without `fields` it only settles the
    message. `fields` hold the job's record, with its `cell` and `work`, `arrived` and `rows`; `lengths` where it is to
    generate, `spent` and `cost` where its tenant has a budget. With a `reading` instead of a job, `fields` are that
    reading's, kept with the jobs that refer to it.
    """

    tag: str
    queue_list: str = ""
    message: bytes = b""
    job: str = ""
    fields: Mapping[str, str | bytes] = field(default_factory=dict)
    keep: int = 0
    reading: str = ""

    @property
    def key(self) -> str:
        """Where the fields are kept; empty where there are none."""
        if self.reading:
            return reading_key(self.reading)
        return job_key(self.job) if self.job else ""


@dataclass(frozen=True, slots=True)
class Ending:
    """One job's end. An empty `token` ends it whoever holds it; `reply` is its client's name, if it has one.

    `generated` is the length of each answer that it generated, in tokens.
    """

    job: str
    state: JobState
    meta: bytes
    token: str = ""
    reply: str = ""
    generated: Sequence[int] = ()

    def __post_init__(self) -> None:
        assert self.state in FINAL


def take_answer(answer: Sequence[bytes]) -> tuple[float, list[tuple[str, bytes]]]:
    """The server's time, and tag and message of everything taken."""
    pairs = zip(answer[1::2], answer[2::2], strict=True)
    return float(answer[0]), [(tag.decode(), message) for tag, message in pairs]


def forward_args(forwards: Iterable[Forward]) -> list[Any]:
    """`FORWARD`'s arguments."""
    args: list[Any] = []
    for f in forwards:
        flat = [text for pair in f.fields.items() for text in pair]
        args += [f.tag, f.queue_list, f.message, f.key, f.keep, len(flat), *flat]
    return args


def claim_args(worker: str, lease: float, jobs: Iterable[tuple[str, float]], device: str) -> list[Any]:
    """`CLAIM`'s arguments: `jobs` are ids with their deadlines by the server's clock, 0 where there is none."""
    args: list[Any] = [worker, int(lease * 1000)]
    for job, deadline in jobs:
        args += [result_key(job), claim_key(job), job_key(job), deadline, device]
    return args


def claim_answer(answer: Sequence[bytes]) -> tuple[float, list[Claim]]:
    """The server's time, and each job's claim in order."""
    claims = []
    for verdict, value in zip(answer[1::2], answer[2::2], strict=True):
        kind = Verdict(verdict.decode())
        if kind is Verdict.HELD:
            claims.append(Claim(kind, retry_in=max(float(value), 0.0) / 1000))
        else:
            claims.append(Claim(kind, token=value.decode()))
    return float(answer[0]), claims


def renew_args(lease: float, claims: Iterable[tuple[str, str]]) -> list[Any]:
    """`RENEW`'s arguments: `claims` are job ids with their tokens."""
    return [int(lease * 1000), *(part for job, token in claims for part in (claim_key(job), token))]


def release_args(claims: Iterable[tuple[str, str]]) -> list[Any]:
    """`RELEASE`'s arguments: `claims` are job ids with their tokens."""
    return [part for job, token in claims for part in (claim_key(job), token, job_key(job))]


def finish_args(endings: Iterable[Ending], *, keep_result: float, keep_record: float) -> list[Any]:
    """`FINISH`'s arguments."""
    args: list[Any] = [int(keep_result), int(keep_record)]
    for e in endings:
        reply = reply_channel(e.reply) if e.reply else ""
        bins = msgspec.json.encode([bin_of(tokens) for tokens in e.generated]) if e.generated else b""
        args += [result_key(e.job), claim_key(e.job), job_key(e.job), e.token, str(e.state), e.meta, reply, bins]
    return args
