"""A worker's hold on its class's queue on Valkey or Redis, beside kombu and in kombu's own lists, hash and index.

One script takes messages by priority into the unacked hash, and claims their jobs, so that other workers and all tools
that read them go on as before. An idle worker blocks on `BLMOVE queue queue RIGHT RIGHT`, which leaves a message where
it was: it wakes at once, and nothing is taken outside the script. kombu's own way costs two round trips and 150 µs a
message. What a silent worker held comes back to the front of its queue; kombu would put it last, by some host's clock.
"""

from __future__ import annotations

import select
import socket
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kombu.transport.redis import Channel
from redis.exceptions import RedisError

from tasks.scripts import CLAIMING, DRAINS, NOW, Claim, claim_from
from tasks.topology import Limits
from taxiway.acceptance import refusal
from taxiway.keys import claim_key, job_key, priority_lists, result_key
from workers.connection import Line, connect

MOST = 256
"""Messages that one script takes, so that the server is not blocked for long by one worker."""

UNACKED: tuple[str, str] = (Channel.unacked_key, Channel.unacked_index_key)
"""kombu's hash of messages that were taken, and its index by time."""

_TAKE = (
    DRAINS
    + CLAIMING
    + """
-- KEYS: the unacked hash, its index, then a queue's lists, first served first.
-- ARGV: most messages, prefix of tags, the end of an unacked entry, worker ('' = claim nothing), lease in ms, prefixes
-- of result, claim and job keys. A job is claimed where the message says in the usual form which it is and that it has
-- no eta; whoever reads the ticket sees whether that was true.
local function order_of(message)
  local at = string.find(message, '"taxiway":"', 1, true) or string.find(message, '"taxiway": "', 1, true)
  if not at or string.find(message, '"eta":"', 1, true) or string.find(message, '"eta": "', 1, true) then return nil end
  local job = string.match(message, '\\\\"job\\\\": ?\\\\"([^\\\\"]+)', at)
  return job, string.match(message, '\\\\"deadline_at\\\\": ?([%d.e+]+)', at) or '0'
end
local answer, entries, scores, left, n = {tostring(now)}, {}, {}, tonumber(ARGV[1]), 0
for k = 3, #KEYS do
  local got = left > 0 and redis.call('RPOP', KEYS[k], left) or {}
  for _, message in ipairs(got or {}) do
    local tag, job, verdict, value = ARGV[2] .. n, nil, '', ''
    entries[2 * n + 1], entries[2 * n + 2] = tag, '[' .. message .. ARGV[3]
    scores[2 * n + 1], scores[2 * n + 2] = now, tag
    if ARGV[4] ~= '' then
      local deadline
      job, deadline = order_of(message)
      if job then
        verdict, value = claimed(ARGV[4], ARGV[5], ARGV[6] .. job, ARGV[7] .. job, ARGV[8] .. job, deadline)
      end
    end
    answer[4 * n + 2], answer[4 * n + 3], answer[4 * n + 4], answer[4 * n + 5] = message, job or '', verdict, value
    n, left = n + 1, left - 1
  end
end
if n > 0 then
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


class ClassQueue:
    """A worker's hold on the queues that it consumes. Threads may share it, but for `wait`.

    Args:
        worker: the worker's name; claims carry it.
        claiming: whether broker and state are one server, so that what is taken is claimed by the same step.
    """

    def __init__(self, url: str, worker: str, limits: Limits, *, claiming: bool) -> None:
        self.acknowledges_with_result = claiming
        self._client = connect(url)
        self._waiting = connect(url, answer=None)
        self._line = Line(url)
        self._take = self._client.register_script(_TAKE)
        self._put_back = self._client.register_script(_PUT_BACK)
        self._keep = self._client.register_script(_KEEP)
        self._recover = self._client.register_script(_RECOVER)
        self._lease = limits.lease
        keys = (result_key(""), claim_key(""), job_key(""))
        self._claim_args = [worker if claiming else "", int(limits.lease * 1000), *keys]
        self._events = f"/{self._client.connection_pool.connection_kwargs.get('db') or 0}."
        self._tags = f"{uuid.uuid4().hex[:12]}."
        self._takes = 0
        self._blocked: dict[str, Any] = {}  # redis-py's connections, whose methods lack types
        self._rope, self._bell = socket.socketpair()

    def take(self, queue: str, most: int) -> tuple[float, list[Taken]]:
        """The store's time, and up to `most` messages by priority, then by age, with the claims on their jobs."""
        self._takes += 1
        prefix = f"{self._tags}{self._takes}."
        args: list[Any] = [min(most, MOST), prefix, f', "{queue}", "{queue}"]', *self._claim_args]
        answer = self._told(lambda: self._line.run(self._take, [*UNACKED, *priority_lists(queue)], args))
        taken = [
            Taken(f"{prefix}{n}", answer[at], answer[at + 1].decode(errors="replace"), _claim(*answer[at + 2 : at + 4]))
            for n, at in enumerate(range(1, len(answer), 4))
        ]
        return float(answer[0]), taken

    def wait(self, queues: Sequence[str], longest: float) -> None:
        """Return when a message stands in one of the queues, at the latest after `longest` seconds."""
        try:
            self._wait([name for queue in queues for name in priority_lists(queue)], longest)
        except (RedisError, OSError) as error:
            for connection in self._blocked.values():
                connection.disconnect()
            self._blocked.clear()
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

    def _wait(self, names: Sequence[str], longest: float) -> None:
        poller, listening = select.poll(), {}
        poller.register(self._bell, select.POLLIN)
        for name in self._blocked.keys() - set(names):  # of a class that the worker has left
            left = self._blocked.pop(name)
            left.disconnect()
            self._waiting.connection_pool.release(left)
        for name in names:
            if name not in self._blocked:
                connection: Any = self._waiting.connection_pool.get_connection()
                connection.send_command("BLMOVE", name, name, "RIGHT", "RIGHT", 0)
                self._blocked[name] = connection
            sock = self._blocked[name]._sock
            listening[sock.fileno()] = name
            poller.register(sock, select.POLLIN)
        for descriptor, _ in poller.poll(longest * 1000):
            if descriptor == self._bell.fileno():
                continue
            connection = self._blocked.pop(listening[descriptor])
            connection.read_response()
            self._waiting.connection_pool.release(connection)

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
