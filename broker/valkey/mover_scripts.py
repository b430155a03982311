"""The scripts of the one that moves, run by the server (see `broker.valkey.scripts`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from broker.mover import Step
from taxiway.contract.keys import job_key, priority_list

LEAD = """
-- KEYS: the lead, the count of leads. ARGV: name, lease in ms ('0' gives it up).
local token = redis.call('GET', KEYS[1])
local ours = token and string.sub(token, 1, #ARGV[1] + 1) == ARGV[1] .. '#'
if token and not ours then return '' end
if ARGV[2] == '0' then
  redis.call('DEL', KEYS[1])
  return ''
end
if not token then token = ARGV[1] .. '#' .. redis.call('INCR', KEYS[2]) end
redis.call('SET', KEYS[1], token, 'PX', ARGV[2])
return token
"""
"""Takes or keeps the lead; answers its token, empty while another leads."""

PEEK = """
-- KEYS: lists. ARGV: most messages and most bytes of each. Answers how many there are in all, then an array a list;
-- those pushed last come first.
local depth, shown = 0, {}
for k, list in ipairs(KEYS) do
  local seen, left = {}, tonumber(ARGV[2])
  for i = 0, tonumber(ARGV[1]) - 1 do
    local message = redis.call('LINDEX', list, i)
    if not message or #message > left then break end
    seen[#seen + 1], left = message, left - #message
  end
  depth, shown[k] = depth + redis.call('LLEN', list), seen
end
table.insert(shown, 1, depth)
return shown
"""
"""Shows the messages that lists serve last."""

MOVE = """
-- KEYS: the lead, the work hash. ARGV: token ('' = the lead was checked before), then for each message: the list it is
-- in ('' = another server moves it), the message there, the list it goes to, the message there, job key, number of
-- fields, and the record's new fields. The work hash follows from the record's old cell to its new one.
-- A job that ended or runs keeps its record.
local moved = {}
if ARGV[1] ~= '' and redis.call('GET', KEYS[1]) ~= ARGV[1] then return moved end
local i = 2
while i <= #ARGV do
  local from, old, to, new, job, n = unpack(ARGV, i, i + 5)
  local ours = from == '' or redis.call('LREM', from, 1, old) == 1
  if ours and to ~= '' then redis.call('LPUSH', to, new) end
  if ours and n ~= '0' and redis.call('HGET', job, 'state') == 'queued' then
    local cell, work = unpack(redis.call('HMGET', job, 'cell', 'work'))
    redis.call('HSET', job, unpack(ARGV, i + 6, i + 5 + n))
    if cell then
      redis.call('HINCRBYFLOAT', KEYS[2], cell, -work)
      redis.call('HINCRBYFLOAT', KEYS[2], cell .. '|jobs', -1)
      cell, work = unpack(redis.call('HMGET', job, 'cell', 'work'))
      redis.call('HINCRBYFLOAT', KEYS[2], cell, work)
      redis.call('HINCRBYFLOAT', KEYS[2], cell .. '|jobs', 1)
      redis.call('HSET', job, 'turn', redis.call('HINCRBY', KEYS[2], cell .. '|turns', 1) - 1)
    end
  end
  moved[#moved + 1] = ours and 1 or 0
  i = i + 6 + n
end
return moved
"""
"""Moves messages and corrects their records at once; answers 1 for each that was still there, nothing without lead."""


def move_args(token: str, steps: Sequence[Step], messages: Sequence[bytes], *, record: bool) -> list[Any]:
    """`MOVE`'s arguments; `messages` are the steps' envelopes as the broker keeps them, handles those it has now."""
    args: list[Any] = [token]
    for step, message in zip(steps, messages, strict=True):
        peeked = step.peeked
        lists = priority_list(peeked.queue, peeked.level), priority_list(step.queue, peeked.level)
        args += [lists[0], peeked.handle, lists[1], message, *_record_args(step, record=record)]
    return args


def record_args(token: str, steps: Sequence[Step]) -> list[Any]:
    """`MOVE`'s arguments for messages that another server moves."""
    return [token, *(part for step in steps for part in ("", "", "", "", *_record_args(step, record=True)))]


def _record_args(step: Step, *, record: bool) -> list[Any]:
    flat = [text for pair in step.fields.items() for text in pair] if record else []
    return [job_key(step.peeked.job), len(flat), *flat]
