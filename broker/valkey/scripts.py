"""What must happen at once in the state store: Lua scripts run by the server, their arguments and their answers.

Key names come in as arguments made by `taxiway.contract.keys`. Times come from the server's clock: no host's clock
decides who holds a claim or whether a deadline has passed. `register_script` of redis-py, sync or asyncio, runs them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import msgspec

from tasks.models.lengths import KEEP, NEGLIGIBLE, TENANTS_AT_MOST, bin_of
from taxiway.contract.job import FINAL, JobState
from taxiway.contract.keys import (
    DEVICES,
    HEARTBEATS,
    HELD,
    HOLDING,
    RELEASED,
    holding_key,
    job_key,
    reply_channel,
    result_key,
    withdrawn_channel,
)

NEVER = 1e10
"""A moment by the store's clock that no deadline reaches: what has none is held behind it, as it arrived."""

DRAINS = "#!lua flags=allow-oom\n"
"""How a script begins that a server runs though its memory is full: what ends accepted work makes room.

Others are refused as a whole before they wrote anything.
"""

NOW = """
local t = redis.call('TIME')
local now = t[1] + t[2] / 1000000
"""

HOLD = f"""
-- A job's message waits in the holding queue that its record names, by deadline; the record stays as long as it does.
local function hold(job, message)
  local queue, due, accepted = unpack(redis.call('HMGET', job, 'holding', 'deadline_at', 'accepted'))
  due = tonumber(due) > 0 and tonumber(due) or {NEVER:.0f} + accepted
  redis.call('ZADD', '{holding_key("")}' .. queue, due, job)
  redis.call('SADD', '{HOLDING}', queue)
  redis.call('HSET', '{HELD}', job, message)
  redis.call('PERSIST', job)
end
local function let_go(job, queue)
  redis.call('ZREM', '{holding_key("")}' .. queue, job)
  redis.call('ZREM', '{RELEASED}', job)
  redis.call('HDEL', '{HELD}', job)
end
"""
"""What puts a job into holding and takes it out; part of other scripts."""

ELSEWHERE = 5.0
"""Seconds for which a job whose worker ended is left to another device of its class, after its lease is over."""

_LIVE = 3.0  # seconds: a device whose last heartbeat is older is not counted upon

ENDED = "local final = {" + ", ".join(f"{state} = true" for state in sorted(FINAL)) + "}\n"
"""Lua's table of the states in which a job has ended; part of other scripts."""

_OTHERS = f"""
-- Whether another device than a worker's takes from a class's queue.
local function others(worker, class)
  for _, name in ipairs(redis.call('ZRANGEBYSCORE', '{HEARTBEATS}', now - {_LIVE}, '+inf')) do
    local told = name ~= worker and redis.call('HGET', '{DEVICES}', name)
    local facts = told and cjson.decode(told)
    if facts and not facts.draining then
      for _, served in ipairs(facts.serves or {{facts.hardware_class}}) do
        if served == class then return true end
      end
    end
  end
  return false
end
"""

_OVER = (
    ENDED
    + """
-- Whether a copy of a job needs no run, by the job's record: it ended, or the copy was published in vain, as its router
-- thought, before the job was placed anew with a later deadline: the other copy is the job's. A record says that its
-- job ended for longer than the result is kept.
local function over(result, state, due, deadline)
  return final[state] or not state and redis.call('EXISTS', result) == 1 or deadline > 0 and due > deadline + 0.001
end
"""
)

UNRECORDED = 86_400
"""Seconds for which a claim stays on a job without a record: one that was lost, or that a forged message names."""

CLAIMING = (
    NOW
    + _OVER
    + _OTHERS
    + f"local elsewhere = {ELSEWHERE}\n"
    + """
local since = ' ' .. now
-- One job's claim: its verdict, and the value that goes with it. Who holds a job may finish it after its deadline, so
-- a job that is held is not late. A holder that neither ended the job nor gave it back goes into the job's history. A
-- copy with a later deadline than the record has the record's. Where the class is given whose queue it was taken from,
-- a job that this very device held when its worker ended is left to another device for a while: it may be what ended
-- the worker.
local function claimed(worker, lease, result, job, deadline, class)
  local state, attempts, released, claims, holder, held_until, history, due = unpack(redis.call('HMGET', job,
    'state', 'attempts', 'released', 'claims', 'holder', 'held_until', 'history', 'deadline_at'))
  deadline, due = tonumber(deadline), tonumber(due or 0)
  if over(result, state, due, deadline) then return 'final', '' end
  local was_held, left = holder and holder ~= '', (held_until or 0) - now
  if was_held and left > 0 then return 'held', tostring(left) end
  if deadline > 0 and now > deadline or due > 0 and now > due then return 'late', '' end
  local lately = was_held and class and left > -elsewhere
  if lately and string.match(holder, '^(.*)#') == worker and others(worker, class) then return 'elsewhere', '' end
  if was_held and #(history or '') < 4000 then
    local worker_since = string.gsub(holder, '#%d+ ', ' ')
    redis.call('HSET', job, 'history', (history or '') .. worker_since .. ' ' .. (state or 'queued') .. '\\n')
  end
  local number = (claims or 0) + 1
  local token = worker .. '#' .. number
  redis.call('HSET', job, 'claims', number, 'holder', token .. since, 'held_until', now + lease)
  if not state then redis.call('EXPIRE', job, """
    + str(UNRECORDED)
    + """) end
  return 'run', token .. ' ' .. (attempts or 0) .. ' ' .. (number - (released or 0))
end
"""
)
"""What a script that claims begins with."""

OURS = (
    ENDED
    + """
-- Whether a holder, as a record says it, has this token.
local function has(holder, token) return holder and string.sub(holder, 1, #token + 1) == token .. ' ' end
-- Whether a job is held under this token: it has not ended, and nobody has claimed it since.
local function ours(job, token)
  local state, holder = unpack(redis.call('HMGET', job, 'state', 'holder'))
  return has(holder, token) and not final[state]
end
"""
)
"""What tells whether a claim is still its worker's; part of other scripts. A lease that is over ends no claim alone."""

CLAIM = (
    DRAINS
    + CLAIMING
    + """
-- ARGV: worker, seconds of a lease, then for each job: result key, job key, deadline (0 = none).
local answer = {tostring(now)}
for i = 3, #ARGV, 3 do
  answer[#answer + 1], answer[#answer + 2] = claimed(ARGV[1], ARGV[2], unpack(ARGV, i, i + 2))
end
return answer
"""
)
"""First claim wins. Answers the time, then a verdict and its value for each job."""

OVER = (
    DRAINS
    + _OVER
    + """
-- KEYS: a key to write to, so that a wait for the log or for a replica covers all that was written before.
-- ARGV: for each job: result key, job key, deadline (0 = none). Answers 1 for each copy that needs no run.
redis.call('SET', KEYS[1], '', 'PX', 1000)
local answer = {}
for i = 1, #ARGV, 3 do
  local result, job, deadline = unpack(ARGV, i, i + 2)
  local state, due = unpack(redis.call('HMGET', job, 'state', 'deadline_at'))
  answer[#answer + 1] = over(result, state, tonumber(due or 0), tonumber(deadline)) and 1 or 0
end
return answer
"""
)
"""Says which messages may be forgotten, once what it saw is kept."""

START = (
    DRAINS
    + OURS
    + """
-- ARGV: device, then for each job: token, job key, time. Answers 1 for each claim that is still ours.
local held = {}
for i = 2, #ARGV, 3 do
  local token, job, started = unpack(ARGV, i, i + 2)
  held[#held + 1] = ours(job, token) and 1 or 0
  if held[#held] == 1 then
    redis.call('HINCRBY', job, 'attempts', 1)
    redis.call('HSET', job, 'state', 'running', 'started', started, 'device', ARGV[1])
  end
end
return held
"""
)
"""Says that jobs run. What ends at once says so in `FINISH` instead."""

RENEW = (
    DRAINS
    + NOW
    + OURS
    + """
-- ARGV: seconds of a lease, then a token and a job key for each job. Answers 1 for each claim that is still ours.
local held = {}
for i = 2, #ARGV, 2 do
  held[#held + 1] = ours(ARGV[i + 1], ARGV[i]) and 1 or 0
  if held[#held] == 1 then redis.call('HSET', ARGV[i + 1], 'held_until', now + ARGV[1]) end
end
return held
"""
)
"""Prolongs claims."""

RELEASE = (
    DRAINS
    + OURS
    + """
-- ARGV: for each job, token, job key.
for i = 1, #ARGV, 2 do
  local token, job = ARGV[i], ARGV[i + 1]
  if ours(job, token) then
    if redis.call('HGET', job, 'state') == 'running' then redis.call('HINCRBY', job, 'attempts', -1) end
    redis.call('HSET', job, 'state', 'queued', 'holder', '')
    redis.call('HINCRBY', job, 'released', 1)
  end
end
"""
)
"""Gives claims back, for jobs that return to their queue: a run that began does not count."""

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

_WITHDRAW = f"""
-- Tells the worker that holds a job that it was ended for it.
local function withdraw(holder, job)
  local worker = holder and string.match(holder, '(.*)#')
  if worker then redis.call('PUBLISH', '{withdrawn_channel("")}' .. worker, job) end
end
"""

FINISH = (
    DRAINS
    + NOW
    + OURS
    + HOLD
    + _LEARN
    + _WITHDRAW
    + f"local channel = '{reply_channel('')}'\n"
    + """
-- KEYS: the work hash, the hash of lengths; where tags are given, kombu's unacked hash and its index.
-- ARGV: seconds to keep a result, seconds to keep a record, then for each job: result key, job key, token ('' = no
-- claim is needed, '-' = the job has no record), state, meta, client ('' = the one on its record, read here, for a
-- router may be writing it just now), bins of the lengths that it generated ('' = none), time and device of its start
-- ('' = none, or told before), tag of its message ('' = none).
-- A job that never started gives back what it was to cost.
local written, tags, cells, jobs, tenants, finished = {}, {}, {}, {}, {}, tostring(now)
for i = 3, #ARGV, 10 do
  local result, job, token, state, meta, client, bins, start, device, tag = unpack(ARGV, i, i + 9)
  local was, holder, attempts, cell, work, lengths, started, spent, tenant, cost, queue, blobs, counted, reply =
    unpack(redis.call('HMGET', job,
    'state', 'holder', 'attempts', 'cell', 'work', 'lengths', 'started', 'spent', 'tenant', 'cost', 'holding', 'blobs',
    'counted', 'reply'))
  local may = not final[was] and (token == '' or token == '-' and not was or has(holder, token))
  if may and redis.call('SET', result, meta, 'EX', ARGV[1], 'NX') then
    if cell then cells[cell], jobs[cell] = (cells[cell] or 0) + work, (jobs[cell] or 0) + 1 end
    if counted then tenants[counted] = (tenants[counted] or 0) + 1 end
    if blobs and state ~= 'dead' then
      for blob in string.gmatch(blobs, '%S+') do redis.call('UNLINK', blob) end
    end
    if queue and queue ~= '' then let_go(job, queue) end
    if lengths and bins ~= '' then learn(lengths, cjson.decode(bins)) end
    if spent and not started and start == '' and redis.call('EXISTS', spent) == 1 then
      redis.call('HINCRBYFLOAT', spent, tenant, -cost)
    end
    if start ~= '' then
      redis.call('HSET', job, 'state', state, 'finished', finished, 'started', start, 'device', device,
        'attempts', (attempts or 0) + 1)
    else
      redis.call('HSET', job, 'state', state, 'finished', finished)
    end
    redis.call('EXPIRE', job, ARGV[2])
    if token == '' then withdraw(holder, job) end
    redis.call('PUBLISH', result, meta)
    if client == '' then client = reply or '' end
    if client ~= '' then redis.call('PUBLISH', channel .. client, meta) end
    if tag ~= '' then tags[#tags + 1] = tag end
    written[#written + 1] = 1
  else
    written[#written + 1] = 0
  end
end
local function fewer(field, ended)
  if redis.call('HINCRBY', KEYS[1], field, -ended) < 0 then redis.call('HSET', KEYS[1], field, 0) end
end
for cell, work in pairs(cells) do
  redis.call('HINCRBYFLOAT', KEYS[1], cell, -work)
  fewer(cell .. '|jobs', jobs[cell])
end
for tenant, ended in pairs(tenants) do fewer(tenant, ended) end
if #tags > 0 then
  redis.call('HDEL', KEYS[3], unpack(tags))
  redis.call('ZREM', KEYS[4], unpack(tags))
end
return written
"""
)
"""Writes results once, announces them, and acknowledges their messages; answers 1 for each that was written."""

REVIVE = f"""
-- KEYS: job key, result key. Forgets that a job ended dead; answers 0 where it ended in another way, or not at all.
local state = redis.call('HGET', KEYS[1], 'state')
if state and state ~= '{JobState.DEAD}' or not state and redis.call('EXISTS', KEYS[2]) == 1 then return 0 end
redis.call('DEL', KEYS[1], KEYS[2])
return 1
"""
"""Lets a job that was given up begin anew."""

HEARTBEAT = (
    DRAINS
    + NOW
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
    """One job's claim: its fencing token where it may run, seconds until it may be tried again where it is held.

    `attempts` counts the runs that are known to have begun, and `claims` the claims that were not given back, this one
    included: more than one says that a worker ended while it held the job.
    """

    verdict: Verdict
    token: str = ""
    retry_in: float = 0.0
    attempts: int = 0
    claims: int = 1


REFUSED = "-"
"""Stands for the token of a job that is refused: a second copy of one that was accepted ends nothing."""


@dataclass(frozen=True, slots=True)
class Ending:
    """One job's end. An empty `token` ends it whoever holds it, `REFUSED` only if it was never accepted.

    `reply` is its client's name, empty where its record says it or there is none. `generated` is the length of each
    answer that it generated, in tokens. `started` and `device` say when and where it began to run, unless `START` said
    so; `tag` is its message's, where that is to be acknowledged by the same step.
    """

    job: str
    state: JobState
    meta: bytes
    token: str = ""
    reply: str = ""
    generated: Sequence[int] = ()
    started: str = ""
    device: str = ""
    tag: str = ""

    def __post_init__(self) -> None:
        assert self.state in FINAL


def claim_args(worker: str, lease: float, jobs: Iterable[tuple[str, float]]) -> list[Any]:
    """`CLAIM`'s arguments: `jobs` are ids with their deadlines by the server's clock, 0 where there is none."""
    return [worker, lease, *over_args(jobs)]


def over_args(jobs: Iterable[tuple[str, float]]) -> list[Any]:
    """`OVER`'s arguments, `jobs` as in `claim_args`."""
    return [part for job, deadline in jobs for part in (result_key(job), job_key(job), deadline)]


def claim_answer(answer: Sequence[bytes]) -> tuple[float, list[Claim]]:
    """The server's time, and each job's claim in order."""
    return float(answer[0]), [claim_from(*pair) for pair in zip(answer[1::2], answer[2::2], strict=True)]


def claim_from(verdict: bytes, value: bytes) -> Claim:
    """One claim as `CLAIMING`'s function answers it."""
    if verdict == b"run":
        token, attempts, claims = value.decode().rsplit(" ", 2)
        return Claim(Verdict.RUN, token, attempts=int(attempts), claims=int(float(claims)))
    kind = Verdict(verdict.decode())
    return Claim(kind, retry_in=float(value) if kind is Verdict.HELD else 0.0)


def start_args(device: str, jobs: Iterable[tuple[str, str, float]]) -> list[Any]:
    """`START`'s arguments: `jobs` are ids with their tokens and the server's time at which they began."""
    return [device, *(part for job, token, at in jobs for part in (token, job_key(job), at))]


def renew_args(lease: float, claims: Iterable[tuple[str, str]]) -> list[Any]:
    """`RENEW`'s arguments: `claims` are job ids with their tokens."""
    return [lease, *(part for job, token in claims for part in (token, job_key(job)))]


def release_args(claims: Iterable[tuple[str, str]]) -> list[Any]:
    """`RELEASE`'s arguments: `claims` are job ids with their tokens."""
    return [part for job, token in claims for part in (token, job_key(job))]


def finish_args(endings: Iterable[Ending], *, keep_result: float, keep_record: float) -> list[Any]:
    """`FINISH`'s arguments."""
    args: list[Any] = [int(keep_result), int(keep_record)]
    for e in endings:
        bins = msgspec.json.encode([bin_of(tokens) for tokens in e.generated]) if e.generated else b""
        args += [result_key(e.job), job_key(e.job), e.token, str(e.state), e.meta, e.reply]
        args += [bins, e.started, e.device, e.tag]
    return args
