"""What each account may do with each kind of key: asked of a real server for every command that it knows."""

import inspect
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import redis
import yaml

from broker.accounts import ACCOUNTS
from taxiway.contract import keys
from tests.builders import recorded
from tests.guarded import Guarded

OWN, OTHER = "cpu.batch", "a queue of somebody else"
BINDING, PERMANENT = "_kombu.binding.", "_kombu.binding_permanent."


def kinds() -> dict[str, list[str]]:
    """Keys of every kind: what kombu and Celery keep, and all that `taxiway.contract.keys` names."""
    control = ["celery.pidbox", "reply.celery.pidbox", "celeryev"]
    found = {
        "arrivals": keys.priority_lists(keys.ARRIVALS),
        "class queue": keys.priority_lists(OWN),
        "queue of others": keys.priority_lists(OTHER),
        "bindings of arrivals": [BINDING + keys.ARRIVALS, PERMANENT + keys.ARRIVALS],
        "bindings of classes": [BINDING + OWN, PERMANENT + OWN],
        "bindings of control": [start + name for start in (BINDING, PERMANENT) for name in control],
        "bindings of others": [BINDING + OTHER, PERMANENT + OTHER],
        "binding deadlines": ["_kombu.binding_deadlines"],
        "control": ["a@host.celery.pidbox", "a-b-c-d-e.reply.celery.pidbox"],
        "events": ["celeryev.1234"],
        "unacked": ["unacked", "unacked_index", "unacked_mutex"],
        "result of a group": ["celery-taskset-meta-1"],
    }
    names = {name: value for name, value in vars(keys).items() if name.isupper() and isinstance(value, str)}
    makers = [pair for pair in inspect.getmembers(keys, callable) if pair[0].endswith(("_key", "_channel"))]
    found |= {
        name: [value]
        for name, value in names.items()
        if name[0] != "_"
        and name not in ("ARRIVALS", "ARRIVED", "COUNT", "TURNS", "WAITING", "RECORDED", "INFER", "CANCEL")
    }
    return found | {name: [str(make(*_arguments(make)))] for name, make in makers}


def _arguments(make: Any) -> list[str]:
    """Any arguments for what makes a key; a kind is one of a few."""
    names = inspect.signature(make).parameters
    return ["file" if name == "kind" else value for name, value in zip(names, "12", strict=False)]


ALL = "all"
"""Stands for every command with a key that reads or writes data, and for looking at a queue's length."""

ALLOWED: dict[str, dict[str, str]] = yaml.safe_load(recorded("rights.yaml")) | {
    "router": {
        **dict.fromkeys(kinds().keys() - {"bindings of arrivals", "bindings of others", "queue of others"}, ALL),
        "DEFAULT_QUEUE": "eval evalsha exists type lrange lrem",
    }
}
"""Every kind of key that an account reaches, and the commands with which it does. All else must be refused."""

GREETING = "auth hello ping select quit client|setinfo client|setname reset"
HEARING = "subscribe unsubscribe psubscribe punsubscribe publish"
SERVING = f"{GREETING} {HEARING} multi exec discard script|load script|exists time wait info"
CLUSTER = "clusterscan"
"""A read of Valkey 9 that only a cluster answers; an older server refuses an account's rules that name it."""

KEYLESS = {
    "producer": f"{GREETING} subscribe unsubscribe multi exec wait",
    "router": f"{SERVING} {CLUSTER} bgrewriteaof waitaof",
    "worker": f"{SERVING} {CLUSTER} client|reply",
    "flower": f"{GREETING} {HEARING} multi exec script|load script|exists time info",
    "tuner": f"{GREETING} time script|load",
}
"""The commands without keys that an account holds."""

CHANNELS = {
    "results": keys.result_key("1"),
    "replies": keys.reply_channel("1"),
    "withdrawals": keys.cancelled_channel("1"),
    "control": "/0.celery.pidbox",
    "events": "/0.celeryev/worker.online",
    "all events": "/0.celeryev/*",
    "control of another database": "/1.celery.pidbox",
    "what happens to keys": "__keyspace@0__:taxiway.arrivals",
    "everything": "*",
}
VERBS = ("subscribe", "publish", "psubscribe", "ssubscribe", "spublish")
SERVED = {
    *(f"{verb} {name}" for verb in VERBS[:2] for name in ("results", "replies", "withdrawals")),
    *(f"{verb} {name}" for verb in VERBS[:2] for name in ("control", "events", "all events")),
    *("psubscribe control", "psubscribe all events"),
}
RECEIVED = {
    "producer": {"subscribe results", "subscribe replies"},
    "router": SERVED,
    "worker": SERVED,
    "flower": {one for one in SERVED if one.endswith(("control", "events"))},
    "tuner": set(),
}
"""What an account may do with which channel."""


@dataclass(frozen=True)
class Command:
    """A command of the server: its name, the fewest words of a call, and where in a call its keys may be."""

    name: str
    words: int
    places: tuple[Any, ...]

    def call(self, *names: str) -> list[str]:
        """A call with these keys, one for each place, and `1` for whatever else it needs."""
        call = [*self.name.split("|"), *["1"] * (self.words - 1 - self.name.count("|"))]
        for place, name in zip(self.places, names, strict=True):
            begin, find = place[b"begin_search"], place[b"find_keys"]
            if begin[b"type"] == b"keyword":
                call += [begin[b"spec"][b"keyword"].decode(), name, *["1"] * (find[b"spec"][b"limit"] == 2)]
                continue
            at = begin[b"spec"][b"index"] + (find[b"spec"][b"firstkey"] if find[b"type"] == b"keynum" else 0)
            call += ["1"] * (at + 1 - len(call))
            call[at] = name
        return call


@pytest.fixture(scope="module")
def server(guarded: Guarded) -> Iterator[redis.Redis]:
    with guarded.client("test") as client:
        yield client


@pytest.fixture(scope="module")
def commands(server: redis.Redis) -> list[Command]:
    """Every command and subcommand that the server knows."""
    connection = server.connection_pool.get_connection()
    connection.send_command("COMMAND")
    known = list(flat(connection.read_response()))
    server.connection_pool.release(connection)
    assert len(known) > 300
    return known


def flat(answer: Iterable[Any]) -> Iterator[Command]:
    for name, arity, *_, places, subcommands in answer:
        if subcommands:
            yield from flat(subcommands)
        else:
            yield Command(name.decode(), abs(arity), tuple(filter(is_place, places)))


def is_place(answer: Any) -> bool:
    """Whether a key may be there: not where the server cannot say, nor at another word for a place that is known."""
    begin = answer[b"begin_search"]
    again = begin[b"spec"].get(b"keyword") == b"STOREDIST"  # of STORE: of both in one call the last one counts
    return begin[b"type"] != b"unknown" and b"not_key" not in answer[b"flags"] and not again


def answers(server: redis.Redis, account: str, calls: Iterable[list[str]]) -> list[str]:
    """What the server would say of each call by that account: OK, or why not."""
    with server.pipeline(transaction=False) as pipeline:
        for call in calls:
            pipeline.execute_command("ACL", "DRYRUN", account, *call)
        return [answer.decode() for answer in pipeline.execute()]


def held(server: redis.Redis, account: str, commands: list[Command]) -> list[Command]:
    """The commands that the account may run with some key, or without any."""
    reply = answers(server, account, [one.call(*["a key of no account"] * len(one.places)) for one in commands])
    return [command for command, answer in zip(commands, reply, strict=True) if "to run the" not in answer]


def allowed(server: redis.Redis, account: str, commands: list[Command]) -> dict[str, set[str]]:
    """For each kind of key, the commands that the account may run with it in some place."""
    friends = {text: kinds()[kind][0] for kind, text in ALLOWED[account].items()}
    asked = [
        (kind, command.name, command.call(*(name if at == place else friend for at in range(len(command.places)))))
        for kind, names in kinds().items()
        for name in names
        for command in held(server, account, commands)
        for place in range(len(command.places))
        for friend in (friends.values() if len(command.places) > 1 else [""])
    ]
    reply = answers(server, account, [call for _, _, call in asked])
    found: dict[str, set[str]] = defaultdict(set)
    for (kind, command, _), answer in zip(asked, reply, strict=True):
        if answer == "OK":
            found[kind].add(command)
    return found


@pytest.mark.parametrize("account", ACCOUNTS)
def test_an_account_can_do_what_its_table_says_to_each_kind_of_key_and_nothing_else(
    server: redis.Redis, commands: list[Command], account: str
) -> None:
    found = allowed(server, account, commands)
    table = {kind: set(text.split()) for kind, text in ALLOWED[account].items()}
    if account == "flower":
        table = {kind: table.get(kind, set()) | {"llen"} for kind in kinds()}

    whole = {kind for kind, names in table.items() if names == {ALL}}
    assert {kind: names for kind, names in found.items() if kind not in whole} == {
        kind: names for kind, names in table.items() if kind not in whole
    }
    assert whole <= found.keys()


@pytest.mark.parametrize("account", ACCOUNTS)
def test_an_account_holds_no_other_command_without_keys(
    server: redis.Redis, commands: list[Command], account: str
) -> None:
    keyless = [one for one in commands if not one.places]
    assert {one.name for one in held(server, account, keyless)} == set(KEYLESS[account].split())


@pytest.mark.parametrize("account", ACCOUNTS)
def test_an_account_reaches_no_other_channel(server: redis.Redis, account: str) -> None:
    asked = [(verb, name, channel) for verb in VERBS for name, channel in CHANNELS.items()]
    calls = [[verb, channel, *["text"] * verb.endswith("publish")] for verb, _, channel in asked]
    reply = zip(asked, answers(server, account, calls), strict=True)
    assert {f"{verb} {name}" for (verb, name, _), answer in reply if answer == "OK"} == RECEIVED[account]
