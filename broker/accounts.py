"""Least rights at the broker, from the names that the fleet uses: `python -m broker.accounts`.

Each account can do its own work and no more: a producer writes arrivals and reads answers, a router does all that moves
a request, a worker takes from the classes' queues and ends jobs, Flower looks on and sends Celery's remote control, and
a tuner reads the history of arrivals and writes its plan.
What is written, an ACL file of Valkey and Redis, holds digests, and no password.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import click

from tasks.topology import TopologyError, load_topology
from taxiway.contract import keys

ACCOUNTS = ("producer", "router", "worker", "flower", "tuner")
"""The accounts' names."""

_NOTHING = "resetchannels -@all"  # before each account's own rights
_GREETING = "+auth +hello +ping +select +quit +client|setinfo +client|setname"
_SCRIPTS = "+eval +evalsha +script|load +script|exists"
_READING = "+get +mget +hget +hgetall +xread"  # results, records, streams and the large values of results
_TELLING = "-@dangerous -scan -randomkey -dbsize -pubsub -function -lolwut"  # what names no key reaches all of them
_HEARING = "+subscribe +unsubscribe +psubscribe +punsubscribe +publish"
_SERVING = f"+@read +@write {_HEARING} +multi +exec +discard {_SCRIPTS} +time +wait {_TELLING} +info"
_CHANNELS = tuple(f"&{make('*')}" for make in (keys.result_key, keys.reply_channel, keys.cancelled_channel))
_RESULTS = ("celery-task-meta-*", "celery-taskset-meta-*")
_UNACKED = (*keys.UNACKED, "unacked_mutex")
_CONTROL, _REPLIES, _EVENTS = "celery.pidbox", "reply.celery.pidbox", "celeryev"  # Celery's exchanges
_BINDING_DEADLINES = "~_kombu.binding_deadlines"
_LETTING_GO = (keys.holding_key("*"), keys.RELEASED, keys.HELD)


def valkey_accounts(classes: Iterable[str], passwords: Mapping[str, str], database: int = 0) -> str:
    """The ACL file of Valkey 8 and Redis 7.2 for a fleet of these hardware classes in that database."""
    names, fanouts = sorted(classes), _fanouts(database)
    rules = {
        "producer": _producer(),
        "router": f"{_router(names)} {fanouts}",
        "worker": f"{_worker(names)} {fanouts}",
        "flower": f"{_flower()} {fanouts}",
        "tuner": _tuner(),
        **{joining(name): f"{_worker([name])} {fanouts}" for name in names if joining(name) in passwords},
    }
    accounts = [f"user {one} on #{_sha256(passwords[one])} {_NOTHING} {its}" for one, its in rules.items()]
    return "\n".join(["user default off", *accounts, ""])


def joining(hardware_class: str) -> str:
    """The account of machines that join and serve this class alone."""
    return f"worker.{hardware_class}"


def _producer() -> str:
    """A selector for each kind of key: what may be written may not be erased, replaced or read.

    Celery binds the arrivals' queue before it publishes, and publishes without reading the bindings. So producers may
    add to those sets, and no account may read them: a forged binding has no effect.
    """
    arrivals, bindings = _queues("~", [keys.ARRIVALS]), _bound([keys.ARRIVALS])
    read = (_RESULTS[0], keys.job_key("*"), keys.stream_key("*"), keys.blob_key("*"), keys.MODELS)
    grants = [
        _grant("+lpush +llen", arrivals),
        _grant("+sadd", bindings),
        _grant("+set +setrange", [f"%W~{keys.blob_key('*')}"]),
        _grant(_READING, [f"%R~{name}" for name in read]),
    ]
    hears = [f"&{keys.result_key('*')}", f"&{keys.reply_channel('*')}"]
    return " ".join([_GREETING, "+subscribe +unsubscribe +multi +exec +wait", *hears, *grants])


def _router(classes: Iterable[str]) -> str:
    """It takes requests out of Celery's default queue, and puts nothing there."""
    owns = [*_queues("~", [keys.ARRIVALS, *classes]), "~taxiway:*", f"~{keys.DEAD}", f"~{keys.AMQP_OUTBOX}"]
    reaches = [*(f"~{name}" for name in (*_RESULTS, *_UNACKED)), *_celery(classes)]
    misdirected = _grant("+eval +evalsha +exists +type +lrange +lrem", [f"~{keys.DEFAULT_QUEUE}"])
    return " ".join([_GREETING, _SERVING, "+bgrewriteaof +waitaof", *owns, *reaches, *_CHANNELS, misdirected])


def _worker(classes: Iterable[str]) -> str:
    """It takes jobs out of holding as they end, and puts none in; of dead letters it adds some and drops the oldest.

    It adds events to the outboxes of webhook endpoints, and reads neither them nor the endpoints' secrets.

    Scripts declare the keys that they touch; what they do to each is asked of the account again.
    """
    jobs = [
        make("*")
        for make in (
            keys.job_key,
            keys.blob_key,
            keys.stream_key,
            keys.spent_key,
            keys.capacity_key,
            keys.affinity_key,
            keys.name_key,
            keys.learned_key,
        )
    ]
    facts = [keys.DEVICES, keys.HEARTBEATS, keys.WORK, keys.LENGTHS, keys.CATALOGUES, keys.CATALOGUES_SEEN]
    owns = [*_queues("~", classes), *(f"~{name}" for name in (*jobs, *facts, *_RESULTS, *_UNACKED)), *_celery(classes)]
    grants = [
        _grant("+lpush +ltrim", [f"%W~{keys.DEAD}", f"%W~{keys.webhook_dead_key('*')}"]),
        _grant("+lpush", [f"%W~{keys.AMQP_OUTBOX}"]),
        _grant("+rpush +llen", [f"~{keys.webhook_outbox_key('*')}"]),
        _grant("+zadd", [f"%W~{keys.WEBHOOKS_DUE}"]),
        _grant("+zrem +hdel", [f"%W~{name}" for name in _LETTING_GO]),
        _grant("+zrem", [f"%W~{keys.open_key('*')}"]),
        _grant("+get", [f"%R~{keys.QUEUES}"]),
        _grant("+get", [f"%R~{keys.line_key('*')}"]),
        _grant("+eval +evalsha", [*owns, *(f"~{name}" for name in (*_LETTING_GO[1:], keys.WEBHOOKS_DUE))]),
    ]
    return " ".join([_GREETING, _SERVING, "+client|reply", *owns, *_CHANNELS, *grants])


def _flower() -> str:
    """Lengths of all queues, events, and what remote control needs."""
    looks = f"{_HEARING} +multi +exec +info +script|load +script|exists"
    binding = "+sadd +srem +smembers +eval +evalsha +time +zadd +zrem +zrangebyscore +del +exists"
    grants = [
        _grant(binding, [*_bound([_CONTROL, _REPLIES, _EVENTS]), _BINDING_DEADLINES]),
        _grant("+lpush +brpop +rpop +del +exists", _control_lists()),
        _grant("+llen", ["~*"]),
    ]
    return " ".join([_GREETING, looks, *grants])


def _tuner() -> str:
    """What arrived and what became of it, what waits on which devices, and the plan that it makes of that."""
    history = _grant("+hget +hgetall", [f"%R~{name}" for name in (keys.HISTORY, keys.history_key("*"))])
    read = (keys.DEVICES, keys.HEARTBEATS, keys.WORK, keys.STARTS)
    fleet = _grant("+hgetall +zrange", [f"%R~{name}" for name in read])
    owns = [f"~{name}" for name in (keys.PLAN, keys.TUNER, keys.TUNERS, keys.TUNING)]
    writes = _grant("+get +set +del +incr +eval +evalsha", owns)
    return " ".join([_GREETING, "+time +script|load", history, fleet, writes])


def _grant(commands: str, patterns: Iterable[str]) -> str:
    """A selector: these commands on these keys, beside what else the account may do."""
    return f"({commands} {' '.join(patterns)})"


def _queues(right: str, names: Iterable[str]) -> list[str]:
    """Patterns of queues' lists; the bytes that no file of text should hold are any bytes."""
    return [right + re.sub(r"[\x00-\x1f]", "?", one) for name in names for one in keys.priority_lists(name)]


def _celery(classes: Iterable[str]) -> list[str]:
    """What kombu keeps for the queues of classes, of events and of remote control."""
    return [*_bound([*classes, _CONTROL, _REPLIES, _EVENTS]), _BINDING_DEADLINES, *_control_lists()]


def _control_lists() -> list[str]:
    """The lists of remote control's messages and answers, and of events."""
    return [*_queues("~", [f"*@*.{_CONTROL}", f"*-*-*-*-*.{_REPLIES}"]), f"~{_EVENTS}.*"]


def _bound(exchanges: Iterable[str]) -> list[str]:
    """Kombu's sets of the queues that are bound to exchanges."""
    return [f"~_kombu.{kind}.{name}" for name in exchanges for kind in ("binding", "binding_permanent")]


def _fanouts(database: int) -> str:
    """Kombu's channels for events and remote control: who subscribes to a pattern needs that very pattern."""
    return f"&/{database}.{_EVENTS}/* &/{database}.{_CONTROL}"


def _sha256(password: str) -> str:
    return hashlib.sha256(password.encode()).hexdigest()


def passwords_from(environment: Mapping[str, str], classes: Iterable[str] = ()) -> dict[str, str]:
    """Each account's password, those of machines that join these classes included.

    It is what `TAXIWAY_<ACCOUNT>_PASSWORD` says, in which `_` stands for what is no letter or digit; else a new one.
    """
    names = [*ACCOUNTS, *map(joining, classes)]
    variables = {one: f"TAXIWAY_{re.sub('[^A-Z0-9]', '_', one.upper())}_PASSWORD" for one in names}
    return {one: environment.get(variables[one]) or secrets.token_hex(24) for one in names}


@click.command()
@click.option("--queues", type=click.Path(path_type=Path), default="queues.yaml", show_default=True, help="The fleet.")
@click.option("--acl", type=click.Path(path_type=Path), help="Write an ACL file of Valkey or Redis here.")
@click.option(
    "--database", type=click.IntRange(0), default=0, show_default=True, help="The fleet's, of Valkey or Redis."
)
@click.option(
    "--join", "joins", multiple=True, metavar="CLASS", help="Add an account for machines that serve this class alone."
)
def main(queues: Path, acl: Path | None, database: int, joins: Sequence[str]) -> None:
    """Write the broker's accounts, and print their passwords as JSON.

    A password comes from TAXIWAY_PRODUCER_PASSWORD, TAXIWAY_ROUTER_PASSWORD, TAXIWAY_WORKER_PASSWORD,
    TAXIWAY_FLOWER_PASSWORD and TAXIWAY_TUNER_PASSWORD; an account without one gets a new one. Nothing that is written
    holds a password.
    """
    try:
        classes = load_topology(queues).hardware
    except TopologyError as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(2) from error
    if unknown := set(joins) - classes.keys():
        raise click.UsageError(f"--join: expected some of {sorted(classes)}, got {sorted(unknown)}")
    passwords = passwords_from(os.environ, joins)
    if acl is not None:
        acl.write_text(valkey_accounts(classes, passwords, database))
    click.echo(json.dumps(passwords))


if __name__ == "__main__":
    main()
