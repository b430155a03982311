"""The way from arrivals to class queues, at once in the store: Lua scripts, their arguments and their answers.

What a router takes lies in lists of its own until it is forwarded, under its *life*: a key that ends without signs from
it. Others put back what lies under a life that ended, and nothing more is taken or forwarded under it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import msgspec

from broker.valkey.scripts import DRAINS, HOLD, NOW
from tasks.fingerprint import FIRST, SHOWN, KeyUse
from taxiway.contract.keys import (
    ACCEPTED,
    COUNT,
    DEADLINES,
    LEVELS,
    TURNS,
    WORK,
    job_key,
    jobs_cell,
    reading_key,
    reply_channel,
    result_key,
)

_pack = msgspec.msgpack.Encoder().encode

SPENT_KEPT = 172_800
"""Seconds for which a day's spending is kept: two days."""

LIVE = (
    DRAINS
    + NOW
    + """
-- KEYS: the sorted set of lives, a life key. ARGV: the life, ms that it lasts without a sign, '1' at its birth.
-- A life that ended is never taken up again: another router may have put back what was taken under it.
if ARGV[3] == '1' then redis.call('SET', KEYS[2], '') end
local lives = redis.call('PEXPIRE', KEYS[2], ARGV[2])
if lives == 1 then redis.call('ZADD', KEYS[1], now, ARGV[1]) end
return {tostring(now), lives}
"""
)
"""Shows that a router lives; answers the time, and 0 where its life had ended."""

LONGEST = 315_360_000
"""Seconds for which a record lasts at most, whatever its job's deadline: ten years."""

FORWARD = (
    NOW
    + HOLD
    + f"""
-- KEYS, where something was taken or is to be: the arrivals' lists, first served first, the taken list that gets the
-- next of them, then the taken lists that this call answers as a whole.
-- ARGV: the life key that they were taken under ('' = they were not), most arrivals to take, bytes after which no more
-- are taken, then groups of jobs that are forwarded alike: list ('' = none), seconds to keep the record, the state that
-- the record is in ('' = there is none), the holding queue ('' = none), keys of blobs with spaces between, deadline
-- (0 = none), time at which they were accepted (0 = they are not to be listed), number of fields, fields, number of
-- charges, charges (hash, field, amount, seconds to keep the hash or ''), number of jobs, and each's key, client,
-- message and use of an idempotency key ('' = none).
-- A job that has a record arrived before: the copy is dropped; so is a reading that is there. The client of a copy is
-- told of the job's end, if it has ended: it may have been cancelled before it arrived. Who uses an idempotency key is
-- told whether it asks for what the key was first used for; its copy is refused where it does not.
local ours = ARGV[1] == '' or redis.call('EXISTS', ARGV[1]) == 1
local function due(job, was)
  return ours and (redis.call('EXISTS', job) == 0 and '' or redis.call('HGET', job, 'state')) == was
end
local function leave(job)
  local cell, work, queue = unpack(redis.call('HMGET', job, 'cell', 'work', 'holding'))
  if cell then
    redis.call('HINCRBYFLOAT', '{WORK}', cell, -work)
    redis.call('HINCRBYFLOAT', '{WORK}', cell .. '|{COUNT}', -1)
  end
  if queue then let_go(job, queue) end
end
-- A record lasts until its job must have ended, and for its time after: who ends the job takes its work back by it.
local function lasting(keep, deadline)
  return string.format('%d', math.min(math.max(deadline - now, 0) + keep, {LONGEST}))
end
local function tell(job, client)
  local meta = redis.call('GET', '{result_key("")}' .. string.sub(job, {len(job_key("")) + 1}))
  if meta then redis.call('PUBLISH', '{reply_channel("")}' .. client, meta) end
end
local function reply_to(job, client)
  if client == '' then redis.call('HDEL', job, 'reply') else redis.call('HSET', job, 'reply', client) end
end
local function take_turns(jobs)
  local cell = redis.call('HGET', jobs[1], 'cell')
  if not cell then return end
  local turn = redis.call('HINCRBY', '{WORK}', cell .. '|{TURNS}', #jobs) - #jobs
  for n, job in ipairs(jobs) do redis.call('HSET', job, 'turn', turn + n - 1) end
end
local function used(job, client, use, new)
  local digest, submission, same, other, keep = unpack(cmsgpack.unpack(use))
  if new then redis.call('HSET', job, 'digest', digest) end
  local first = redis.call('HGET', job, 'digest') or digest
  if submission ~= '' then
    local told = first == digest and same or string.gsub(other, '{FIRST}', string.sub(first, 1, {SHOWN}))
    redis.call('SET', '{result_key("")}' .. submission, told, 'EX', keep)
    if client ~= '' then redis.call('PUBLISH', '{reply_channel("")}' .. client, told) end
  end
  return first == digest
end
local function take(most, bytes)
  local into, taken = KEYS[{LEVELS + 1}], {{}}
  if redis.call('EXISTS', unpack(KEYS, 1, {LEVELS})) == 0 then return taken end
  for level = 1, {LEVELS} do
    local from = KEYS[level]
    local waiting = redis.call('LLEN', from)
    local all = waiting > 1 and waiting <= most and redis.call('EXISTS', into) == 0
    if all and redis.call('MEMORY', 'USAGE', from, 'SAMPLES', 0) < bytes then  -- one step moves a list as it is
      redis.call('RENAME', from, into)
      local newest = redis.call('LRANGE', into, 0, -1)
      for n = waiting, 1, -1 do taken[#taken + 1], bytes = newest[n], bytes - #newest[n] end
      waiting = 0
    end
    for _ = 1, math.min(waiting, most - #taken) do
      if bytes <= 0 then break end
      local message = redis.call('LMOVE', from, into, 'RIGHT', 'LEFT')
      taken[#taken + 1], bytes = message, bytes - #message
    end
  end
  return taken
end
local done, i = {{}}, 4
while i <= #ARGV do
  local list, keep, was, holding, blobs, deadline, listed = unpack(ARGV, i, i + 6)
  if tonumber(deadline) > 0 then keep = lasting(keep, deadline) end
  local fields = i + 8
  local charges = fields + ARGV[i + 7] + 1
  local jobs = charges + ARGV[charges - 1] * 4 + 1
  local after, forwarded, accepted = jobs + ARGV[jobs - 1] * 4, {{}}, {{}}
  local first, its_client  -- of the group's new records: the others are copies of it, or there already
  for j = jobs, after - 1, 4 do
    local job, client, message, use = unpack(ARGV, j, j + 3)
    local new
    if first and job ~= first then
      new = redis.call('COPY', first, job) == 1
      if new and client ~= its_client then reply_to(job, client) end
    elseif due(job, was) then
      if was ~= '' then leave(job) end
      redis.call('HSET', job, unpack(ARGV, fields, charges - 2))
      if client ~= '' then reply_to(job, client) end
      redis.call('EXPIRE', job, keep)
      new = true
      if was == '' then first, its_client = job, client end
    end
    if new then
      if holding ~= '' then hold(job, message) end
      forwarded[#forwarded + 1], accepted[#accepted + 1] = message, job
    elseif ours and client ~= '' then
      tell(job, client)
    end
    done[#done + 1] = new and 1 or 0
    if ours and use ~= '' and not used(job, client, use, new) then done[#done] = -1 end
  end
  if #forwarded > 0 then
    take_turns(accepted)
    local group = cmsgpack.pack(accepted)
    if tonumber(deadline) > 0 then redis.call('ZADD', '{DEADLINES}', deadline, group) end
    if tonumber(listed) > 0 then redis.call('ZADD', '{ACCEPTED}', listed, group) end
    if list ~= '' then redis.call('LPUSH', list, unpack(forwarded)) end
    for blob in string.gmatch(blobs, '%S+') do
      if holding ~= '' then redis.call('PERSIST', blob) else redis.call('EXPIRE', blob, keep) end
    end
    for c = charges, jobs - 2, 4 do
      local hash, field, amount, seconds = unpack(ARGV, c, c + 3)
      redis.call('HINCRBYFLOAT', hash, field, amount * #forwarded)
      if seconds ~= '' then redis.call('EXPIRE', hash, seconds) end
    end
  end
  i = after
end
local taken = {{}}
if ours and #KEYS > 0 then
  if #KEYS > {LEVELS + 1} then redis.call('DEL', unpack(KEYS, {LEVELS + 2})) end
  taken = take(tonumber(ARGV[2]), tonumber(ARGV[3]))
end
return {{tostring(now), ours and 1 or 0, done, taken}}
"""
)
"""Publishes placed messages and writes their records, and takes the next arrivals, at once.

Answers the time, whether the router lives, 1 for each job that was forwarded and -1 for one whose key was first used
for something else, and what was taken, first served first.
"""

LET_GO = DRAINS + FORWARD
"""`FORWARD` for jobs that were held: they are there already, and a full server lets them go."""

_RETURN = """
-- Moves all of a taken list to where it is served first; answers how many messages that were.
local function give_back(list, into)
  local taken = redis.call('LLEN', list)
  for _ = 1, taken do redis.call('LMOVE', list, into, 'LEFT', 'RIGHT') end
  return taken
end
"""

PUT_BACK = (
    DRAINS
    + _RETURN
    + """
-- KEYS: the list to put back into, taken lists.
local put_back = 0
for k = 2, #KEYS do put_back = put_back + give_back(KEYS[k], KEYS[1]) end
return put_back
"""
)
"""Puts back what a router took and could not forward, under a life that goes on; answers how many."""

RECOVER = (
    DRAINS
    + NOW
    + _RETURN
    + """
-- KEYS: the sorted set of lives, a life key, the list to put back into, the taken lists under that life.
-- ARGV: the life, seconds after its last sign for which a move that was under way may still reach its lists, most lives
-- to remember: beyond that, those that ended are forgotten as soon as nothing lies under them.
if redis.call('EXISTS', KEYS[2]) == 1 then return 0 end
local put_back = 0
if redis.call('EXISTS', unpack(KEYS, 4)) > 0 then
  for k = 4, #KEYS do put_back = put_back + give_back(KEYS[k], KEYS[3]) end
end
local sign = redis.call('ZSCORE', KEYS[1], ARGV[1])
if sign and (now - sign > tonumber(ARGV[2]) or redis.call('ZCARD', KEYS[1]) > tonumber(ARGV[3])) then
  redis.call('ZREM', KEYS[1], ARGV[1])
end
return put_back
"""
)
"""Puts back, to be served first, what a dead router had taken; answers how many."""


FORGET = (
    DRAINS
    + NOW
    + f"""
-- ARGV: score from which on groups are looked at, seconds after which a record may be gone, most groups.
-- Answers how many were looked at, and the score of the last of them.
local groups = redis.call('ZRANGEBYSCORE', '{ACCEPTED}', ARGV[1], now - ARGV[2], 'WITHSCORES', 'LIMIT', 0, ARGV[3])
for g = 1, #groups, 2 do
  if redis.call('EXISTS', unpack(cmsgpack.unpack(groups[g]))) == 0 then redis.call('ZREM', '{ACCEPTED}', groups[g]) end
end
return {{#groups / 2, groups[#groups] or '-inf'}}
"""
)
"""Takes groups of jobs whose records are gone out of the index of jobs."""


class Forward(msgspec.Struct, frozen=True, kw_only=True):
    """One job and where it goes.

    Without a `queue_list` it is only recorded: it was published elsewhere, or its `fields` name the `holding` queue
    that keeps its message. `fields` hold the job's record, with its `cell` and `work`, `arrived` and `rows`; `lengths`
    where it is to generate, `spent` and `cost` where its tenant has a budget, `blobs`, the keys of its large inputs,
    which stay with the record until the job ends. Jobs one after the other with the same `fields` object are forwarded
    as one group. `was` is the state that the record is in, empty where there is to be none; `reply` the name of its
    client, `use` its use of an idempotency key. With a `reading` instead of a job, `fields` are that reading's, kept
    with the jobs that refer to it.
    """

    queue_list: str = ""
    message: bytes = b""
    job: str = ""
    fields: Mapping[str, str | bytes]
    keep: int
    was: str = ""
    reply: str = ""
    use: KeyUse | None = None
    reading: str = ""

    @property
    def key(self) -> str:
        """Where the fields are kept."""
        return reading_key(self.reading) if self.reading else job_key(self.job)


class Forwarded(msgspec.Struct, frozen=True):
    """`FORWARD`'s answer: the server's time, whether the router lives, which jobs were forwarded, what was taken.

    `refused` says which were not because their keys were first used for something else.
    """

    now: float
    lives: bool
    done: list[bool]
    taken: list[bytes]
    refused: list[bool]


def forward_args(forwards: Iterable[Forward], life_key: str = "", *, most: int = 0, most_bytes: int = 0) -> list[Any]:
    """`FORWARD`'s arguments: what was taken under a life is forwarded, and up to `most` arrivals are taken."""
    args: list[Any] = [life_key, most, most_bytes]
    for (queue_list, keep, was, *_), group in groupby(forwards, key=_alike):
        jobs = list(group)
        fields = jobs[0].fields
        flat = [text for pair in fields.items() for text in pair]
        args += [queue_list, keep, was, fields.get("holding", ""), fields.get("blobs", "")]
        args += [_ends_at(fields, keep), 0 if was else fields.get("accepted", 0), len(flat), *flat]
        args += _charges(fields, was)
        args.append(len(jobs))
        for job in jobs:
            args += (job.key, job.reply, job.message, b"" if job.use is None else _pack(job.use))
    return args


def forward_answer(answer: Sequence[Any]) -> Forwarded:
    """What `FORWARD` says."""
    now, lives, done, taken = answer
    return Forwarded(float(now), bool(lives), [one == 1 for one in done], taken, [one < 0 for one in done])


def _ends_at(fields: Mapping[str, str | bytes], keep: int) -> float:
    """When a job has ended at the latest; 0 for one that is held without a deadline, and for a reading.

    What was placed without a deadline ends with its ticket: no worker runs it after that, and somebody has to say so.
    """
    placed = float(fields.get("placed", 0))
    return float(fields.get("deadline_at", 0)) or (placed and placed + keep)


def _alike(forward: Forward) -> tuple[str, int, str, int, bool]:
    """What jobs of a group have in common; a digest of its own is no part of the record that is copied."""
    return forward.queue_list, forward.keep, forward.was, id(forward.fields), forward.use is not None


def _charges(fields: Mapping[str, str | bytes], was: str) -> list[Any]:
    """What the work hash gains with each job, and what its tenant's day costs; their number first.

    A job that `was` in some state is counted for its tenant already.
    """
    charges: list[Any] = []
    if "cell" in fields:
        charges += [WORK, fields["cell"], fields["work"], "", WORK, jobs_cell(str(fields["cell"])), 1, ""]
    if "counted" in fields and not was:
        charges += [WORK, fields["counted"], 1, ""]
    if "arrived" in fields:
        charges += [WORK, fields["arrived"], fields["rows"], ""]
    if "spent" in fields:
        charges += [fields["spent"], fields["tenant"], fields["cost"], SPENT_KEPT]
    return [len(charges) // 4, *charges]
