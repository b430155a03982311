"""A worker's hold on its class's queue on Valkey or Redis, beside kombu and in kombu's own lists, hash and index.

One script takes messages by priority into the unacked hash, and claims their jobs, so that other workers and all tools
that read them go on as before. An idle worker blocks on `BLMOVE queue queue RIGHT RIGHT`, which leaves a message where
it was, with the script behind it in the same connection: one answer wakes it and brings what it wakes for. That script
takes what the worker said last that it has room for, once, whichever list wakes it. kombu's own way costs two round
trips and 150 µs a message. What a silent worker held comes back to the front of its queue; kombu would put it last, by
some host's clock.
"""

from __future__ import annotations

import contextlib
import math
import select
import socket
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kombu.transport.redis import Channel
from redis.exceptions import NoScriptError, RedisError

from broker.valkey.blocking import ANSWER, Line, connect
from broker.valkey.scripts import CLAIMING, DRAINS, NOW, Claim, claim_from
from tasks.topology import Limits
from taxiway.contract.durability import refusal
from taxiway.contract.keys import LEVELS, PATIENT, job_key, priority_lists, result_key, room_key

MOST = 256
"""Messages that one script takes, so that the server is not blocked for long by one worker."""

_PAUSE = 0.5  # seconds until a job that is to run elsewhere is offered again

_ENDLESS = 1e18  # seconds

_USED = b"0 0"  # says a room that was given to `wait`, and was taken

UNACKED: tuple[str, str] = (Channel.unacked_key, Channel.unacked_index_key)
"""kombu's hash of messages that were taken, and its index by time."""

_TAKE = (
    DRAINS
    + CLAIMING
    + f"local parking, pause, first_patient = {MOST}, {_PAUSE}, {PATIENT}\n"
    + """
-- KEYS: the unacked hash, its index, the worker's room, then a queue's lists, first served first.
-- ARGV: tags' beginning, the end of an unacked entry, worker ('' = claim nothing), seconds of a lease, prefixes of
-- result and job keys, most seconds of patient work, most messages and the number of this take, which the tags carry;
-- without these two, as the room says that the last take left them. Of the lists of patient work no more is taken once
-- the jobs' records tell of so many seconds. A job is claimed where the message says in the usual form which it is and
-- that it has no eta; whoever reads the ticket sees whether that was true. A job that is to run elsewhere is not
-- answered: it stays among the unacked, where any worker finds it soon as what a silent one held.
local function after(message, name, pattern, from)
  local _, at = string.find(message, '\\\\"' .. name .. '\\\\":', from, true)
  return at and string.match(message, '^ ?' .. pattern, at + 1)
end
local function order_of(message)
  local at = string.find(message, '"taxiway":"', 1, true) or string.find(message, '"taxiway": "', 1, true)
  if not at or string.find(message, '"eta":"', 1, true) or string.find(message, '"eta": "', 1, true) then return nil end
  return after(message, 'job', '\\\\"([^\\\\"]+)', at), after(message, 'deadline_at', '([%d.e+]+)', at) or '0'
end
local most, take, ahead = ARGV[8], ARGV[9], tonumber(ARGV[7])
if not most then most, take = string.match(redis.call('GET', KEYS[3]) or '0 0', '(%d+) (%d+)') end
local answer, entries, scores, left, n, parked = {tostring(now), take}, {}, {}, tonumber(most), 0, 0
local function keep(message, number, at)
  local tag = ARGV[1] .. take .. '.' .. number
  entries[#entries + 1], entries[#entries + 2] = tag, '[' .. message .. ARGV[2]
  scores[#scores + 1], scores[#scores + 2] = at, tag
end
local function receive(message, patient)
  local job, verdict, value = nil, '', ''
  if ARGV[3] ~= '' then
    local deadline
    job, deadline = order_of(message)
    if job then verdict, value = claimed(ARGV[3], ARGV[4], ARGV[5] .. job, ARGV[6] .. job, deadline, KEYS[4]) end
  end
  if verdict == 'elsewhere' then
    keep(message, parking + parked, now - ARGV[4] + pause)
    parked = parked + 1
    return
  end
  if job and patient then ahead = ahead - (tonumber(redis.call('HGET', ARGV[6] .. job, 'work') or 0) or 0) end
  keep(message, n, now)
  answer[4 * n + 3], answer[4 * n + 4], answer[4 * n + 5], answer[4 * n + 6] = message, job or '', verdict, value
  n, left = n + 1, left - 1
end
for k = 4, #KEYS do
  local patient = k - 4 >= first_patient
  local got = true
  while got and left > 0 and (not patient or ahead > 0) do
    got = redis.call('RPOP', KEYS[k], patient and 1 or left)
    for _, message in ipairs(got or {}) do receive(message, patient) end
    got = got and patient
  end
end
local lasting = math.floor(ARGV[4] * 1000)
if ARGV[8] then
  redis.call('SET', KEYS[3], left .. ' ' .. take + 1, 'PX', lasting)
elseif n > 0 then
  redis.call('SET', KEYS[3], '0 0', 'PX', lasting)
end
if #entries > 0 then
  redis.call('HSET', KEYS[1], unpack(entries))
  redis.call('ZADD', KEYS[2], unpack(scores))
end
return answer
"""
)

_RETURN = """
-- A message that was taken returns to its place in its queue.
local function put_back(tag)
  local entry = redis.call('HGET', KEYS[1], tag)
  redis.call('ZREM', KEYS[2], tag)
  if not entry then return end
  redis.call('HDEL', KEYS[1], tag)
  local message, _, queue = unpack(cjson.decode(entry))
  local priority = message.properties.priority or 0
  local list = priority >= 3 and queue .. '\\6\\22' .. (math.min(9, priority - priority % 3)) or queue
  redis.call('RPUSH', list, string.sub(entry, 2, #entry - 2 * #queue - 9))  -- less [ and , "queue", "queue"]
end
"""

_PUT_BACK = (
    DRAINS
    + _RETURN
    + """
-- KEYS: the unacked hash, its index. ARGV: tags, the last taken first.
for _, tag in ipairs(ARGV) do put_back(tag) end
"""
)

_KEEP = (
    DRAINS
    + NOW
    + """
-- KEYS: the index. ARGV: tags.
local scores = {}
for i, tag in ipairs(ARGV) do scores[2 * i - 1], scores[2 * i] = now, tag end
redis.call('ZADD', KEYS[1], 'XX', unpack(scores))
"""
)

_RECOVER = (
    DRAINS
    + NOW
    + _RETURN
    + """
-- KEYS: the unacked hash, its index. ARGV: seconds of a lease, most messages. Takes back what no worker has kept for a
-- lease; tags of another form are kombu's own. Those of one worker end up in the order in which it took them.
local lost = {}
for _, tag in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now - ARGV[1], 'LIMIT', 0, ARGV[2])) do
  local take, number = string.match(tag, '^%x+%.(%d+)%.(%d+)$')
  if take then lost[#lost + 1] = {tonumber(take), tonumber(number), tag} end
end
table.sort(lost, function(a, b) if a[1] ~= b[1] then return a[1] > b[1] end return a[2] > b[2] end)
for _, one in ipairs(lost) do put_back(one[3]) end
return #lost
"""
)


@dataclass(frozen=True, slots=True)
class Taken:
    """One message with its tag, and the claim on the job that it names."""

    tag: str
    raw: bytes
    job: str
    claim: Claim | None

    @property
    def token(self) -> str:
        """The token under which the job was claimed; empty where it was not."""
        return self.claim.token if self.claim is not None else ""


@dataclass(frozen=True, slots=True)
class Haul:
    """What one script took from a queue, first served first, at `now` by the store's clock."""

    queue: str
    now: float
    taken: list[Taken]


class ClassQueue:
    """A worker's hold on the queues that it consumes. Threads may share it, but for `take` and `wait`, which one calls.

    Args:
        worker: the worker's name; claims carry it.
        claiming: whether broker and state are one server, so that what is taken is claimed by the same step.
        ahead: seconds of patient work after which a take takes no more of it, where broker and state are one server.
    """

    def __init__(self, url: str, worker: str, limits: Limits, *, claiming: bool, ahead: float = math.inf) -> None:
        self.acknowledges_with_result = claiming
        self._client = connect(url)
        self._line = Line(url)
        self._take = self._client.register_script(_TAKE)
        self._put_back = self._client.register_script(_PUT_BACK)
        self._keep = self._client.register_script(_KEEP)
        self._recover = self._client.register_script(_RECOVER)
        self._lease = limits.lease
        self._claim_args = [worker if claiming else "", limits.lease, result_key(""), job_key(""), min(ahead, _ENDLESS)]
        self._room = room_key(worker)
        self._events = f"/{self._client.connection_pool.connection_kwargs.get('db') or 0}."
        self._tags = f"{uuid.uuid4().hex[:12]}."
        self._takes = 0
        self._blocked: dict[str, Any] = {}  # redis-py's connections, whose methods lack types
        self._rope, self._bell = socket.socketpair()

    def take(self, queue: str, most: int, levels: int = LEVELS) -> Haul:
        """Up to `most` messages by priority, then by age, with the claims on their jobs; `wait` takes the rest.

        Only those of the queue's first `levels` are taken.
        """
        self._takes += 2  # each take has its number: the second is of what `wait` takes
        keys, args = self._taking(queue, levels)
        args += [min(most, MOST), self._takes]
        return self._haul(queue, self._told(lambda: self._line.run(self._take, keys, args)))

    def wait(self, queues: Sequence[str], longest: float, levels: int = LEVELS) -> list[Haul]:
        """What came as the first message stood in one of the queues' `levels`, at the latest after `longest` seconds.

        It is no more than the last `take` was short of, and of one queue; nothing where only a look is worthwhile.
        """
        try:
            lists = [(name, queue) for queue in queues for name in priority_lists(queue)[:levels]]
            return self._wait(lists, longest, levels)
        except (RedisError, OSError) as error:
            for name in [*self._blocked]:
                self._leave(name)
            raise refusal("broker", error) from error

    def wake(self) -> None:
        """End `wait`, now and for good. Any thread may."""
        self._rope.close()

    def acknowledge(self, tags: Sequence[str]) -> None:
        """Forget messages that were answered."""
        if tags:
            self._told(lambda: self._forget(tags))

    def put_back(self, tags: Sequence[str]) -> None:
        """Return messages, given in the order in which they were taken, to their places in their queues."""
        if tags:
            self._told(lambda: self._put_back(keys=UNACKED, args=[*reversed(tags)]))

    def keep(self, tags: Sequence[str]) -> None:
        """Say that the messages are still held, or they return to their queues when a lease is over."""
        if tags:
            self._told(lambda: self._keep(keys=[UNACKED[1]], args=tags))

    def recover(self) -> int:
        """Return what a worker held that has been silent for a lease to its place in its queue; how many messages."""
        recovered: int = self._told(lambda: self._recover(keys=UNACKED, args=[self._lease, MOST]))
        return recovered

    def message(self, tag: str) -> bytes:
        """A message that is held, as it was taken; empty where it is not held any more."""
        entry: bytes = self._told(lambda: self._client.hget(UNACKED[0], tag)) or b""
        return entry[1:].rsplit(b', "', 2)[0]

    def publish(self, topic: str, message: bytes) -> None:
        """Publish on a fanout exchange of kombu's: `topic` is its name, a slash and the routing key."""
        self._told(lambda: self._client.publish(self._events + topic, message))

    def _taking(self, queue: str, levels: int) -> tuple[list[str], list[Any]]:
        """Keys and arguments that every take from the queue has."""
        keys = [*UNACKED, self._room, *priority_lists(queue)[:levels]]
        return keys, [self._tags, f', "{queue}", "{queue}"]', *self._claim_args]

    def _haul(self, queue: str, answer: Sequence[bytes]) -> Haul:
        now, take, *rest = answer
        prefix = f"{self._tags}{take.decode()}."
        taken = [
            Taken(f"{prefix}{n}", rest[at], rest[at + 1].decode(errors="replace"), _claim(*rest[at + 2 : at + 4]))
            for n, at in enumerate(range(0, len(rest), 4))
        ]
        return Haul(queue, float(now), taken)

    def _wait(self, lists: Sequence[tuple[str, str]], longest: float, levels: int) -> list[Haul]:
        for name in self._blocked.keys() - {name for name, _ in lists}:  # of a class that the worker has left
            self._leave(name)
        for name, queue in lists:
            if name not in self._blocked:
                self._blocked[name] = self._block(name, queue, levels)
        hauls = self._woken(dict(lists), longest)
        if not hauls and self._client.getdel(self._room) == _USED:
            hauls += self._woken(dict(lists), ANSWER)  # it was taken just now
        return hauls

    def _block(self, name: str, queue: str, levels: int) -> Any:
        """A connection that waits for a message in the list, and then takes from the queue."""
        connection: Any = self._client.connection_pool.get_connection()
        keys, args = self._taking(queue, levels)
        commands = [
            ("BLMOVE", name, name, "RIGHT", "RIGHT", 0),
            ("EVALSHA", self._take.sha, len(keys), *keys, *args),
        ]
        connection.send_packed_command(connection.pack_commands(commands), check_health=False)
        return connection

    def _woken(self, queue_of: Mapping[str, str], longest: float) -> list[Haul]:
        """What the connections have taken that a message wakes within `longest` seconds."""
        poller = select.poll()
        poller.register(self._bell, select.POLLIN)
        listening = {connection._sock.fileno(): name for name, connection in self._blocked.items()}
        for descriptor in listening:
            poller.register(descriptor, select.POLLIN)
        woken = [listening[descriptor] for descriptor, _ in poller.poll(longest * 1000) if descriptor in listening]
        hauls = [self._haul(queue_of[name], answer) for name in woken if (answer := self._answer(name))]
        return [haul for haul in hauls if haul.taken]

    def _answer(self, name: str) -> list[bytes]:
        """What the script said behind the message that woke the connection."""
        connection = self._blocked.pop(name)
        connection.read_response()
        answer: list[bytes] = []
        with contextlib.suppress(NoScriptError):  # the server was started anew: the next take gives it the script
            answer = connection.read_response()
        self._client.connection_pool.release(connection)
        return answer

    def _leave(self, name: str) -> None:
        connection = self._blocked.pop(name)
        connection.disconnect()
        self._client.connection_pool.release(connection)

    def _forget(self, tags: Sequence[str]) -> None:
        with self._client.pipeline(transaction=False) as pipe:
            pipe.zrem(UNACKED[1], *tags)
            pipe.hdel(UNACKED[0], *tags)
            pipe.execute()

    def _told(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (RedisError, OSError) as error:
            raise refusal("broker", error) from error


def _claim(verdict: bytes, value: bytes) -> Claim | None:
    return claim_from(verdict, value) if verdict else None
