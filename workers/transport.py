"""kombu's Redis transport, except that one round trip takes many messages and one acknowledges many.

Lists, hash and index are kombu's own, so that other workers of the same broker, its restoring of lost messages and
every tool that reads them go on as before. Measured: kombu's way costs two round trips a message, and its objects.
"""

from __future__ import annotations

import json
import time
from typing import Any

from kombu.transport import TRANSPORT_ALIASES, redis, virtual

from taxiway.keys import priority_lists

MOST = 256
"""Messages that one script takes, so that the server is not blocked for long by one worker."""

_TAKE = """
-- KEYS: the unacked hash, its index, then a queue's lists, first served first.
-- ARGV: most messages, time, exchange and routing key as the end of a JSON array.
local taken, left = {}, tonumber(ARGV[1])
for k = 3, #KEYS do
  local got = left > 0 and redis.call('RPOP', KEYS[k], left) or {}
  for _, message in ipairs(got or {}) do
    local tag = cjson.decode(message).properties.delivery_tag
    redis.call('HSET', KEYS[1], tag, '[' .. message .. ARGV[3])
    redis.call('ZADD', KEYS[2], ARGV[2], tag)
    taken[#taken + 1], left = message, left - 1
  end
end
return taken
"""


class BulkQoS(redis.QoS):
    """Acknowledges on the next turn of the consumer's loop, all at once."""

    channel: Any
    unacked_key: Any
    unacked_index_key: Any
    _delivered: Any
    _on_collect: Any
    _dirty: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._acknowledged: list[str] = []

    def ack(self, delivery_tag: str) -> None:
        """Acknowledge a message; the broker is told by `tell`."""
        self._acknowledged.append(delivery_tag)
        virtual.QoS.ack(self, delivery_tag)

    def keep(self, message: Any) -> None:
        """Hold a message that the broker has in its unacked hash already."""
        virtual.QoS.append(self, message, message.delivery_tag)

    def tell(self) -> None:
        """Tell the broker what was acknowledged. What it does not hear it delivers again, and the claim ends there."""
        tags, self._acknowledged = self._acknowledged, []
        if tags:
            with self.channel.conn_or_acquire() as client, client.pipeline() as pipe:
                pipe.zrem(self.unacked_index_key, *tags)
                pipe.hdel(self.unacked_key, *tags)
                pipe.execute()

    def room(self) -> int:
        """How many more messages may be taken."""
        if not self.prefetch_count:
            return MOST
        return max(0, min(MOST, self.prefetch_count - (len(self._delivered) - len(self._dirty))))

    def restore_unacked_once(self, stderr: Any = None) -> None:
        """Tell what was acknowledged, then put the rest back, as kombu does on closing a channel.

        Not after the connection was lost: kombu would fail on what it has cleared by then, and end the worker. Those
        messages go on here, and the broker delivers what it hears no more of.
        """
        if self.channel.connection.client is None:
            self._on_collect.cancel()
            self._delivered.clear()
            return
        self.tell()
        super().restore_unacked_once(stderr)


class BulkChannel(redis.Channel):
    """Waits for a message as kombu does, then takes those behind it."""

    QoS = BulkQoS
    qos: Any
    unacked_key: Any
    unacked_index_key: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._receivers: dict[str, Any] = {}

    def basic_consume(self, queue: str, no_ack: bool, callback: Any, consumer_tag: str | None, **kwargs: Any) -> Any:
        """Consume from `queue`; messages that must be acknowledged are taken in bulk."""
        if not no_ack:
            self._receivers[queue] = callback
        return super().basic_consume(queue, no_ack, callback, consumer_tag, **kwargs)

    def basic_cancel(self, consumer_tag: str) -> Any:
        """Stop consuming."""
        self._receivers.pop(self._tag_to_queue.get(consumer_tag, ""), None)
        return super().basic_cancel(consumer_tag)

    def _brpop_read(self, **options: Any) -> Any:
        read = super()._brpop_read(**options)  # type: ignore[misc]  # celery-types lacks it
        for queue, receive in list(self._receivers.items()):
            self._take_more(queue, receive)
        return read

    def _take_more(self, queue: str, receive: Any) -> None:
        room = self.qos.room()
        if not room:
            return
        end = f", {json.dumps(queue)}, {json.dumps(queue)}]"
        with self.conn_or_acquire() as client:
            keys = [self.unacked_key, self.unacked_index_key, *priority_lists(queue)]
            taken = client.register_script(_TAKE)(keys=keys, args=[room, time.time(), end])
        messages = [self.Message(json.loads(raw), channel=self) for raw in taken]
        for message in messages:
            self.qos.keep(message)
        for message in messages:
            receive(message)


class BulkPoller(redis.MultiChannelPoller):
    """Acknowledges before each wait of the loop."""

    _channels: Any

    def on_poll_start(self) -> None:
        """Acknowledge, then wait for messages."""
        for channel in self._channels:
            channel.qos.tell()
        super().on_poll_start()


class Transport(redis.Transport):
    """`redis://`, in bulk."""

    Channel = BulkChannel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cycle = BulkPoller()


def use_in_bulk() -> None:
    """Have kombu open `redis://` and `rediss://` addresses with this transport, in this process."""
    TRANSPORT_ALIASES.update(dict.fromkeys(("redis", "rediss"), f"{__name__}:{Transport.__name__}"))
