from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path

from click.testing import CliRunner

from broker.accounts import ACCOUNTS, main, rabbit_accounts, valkey_accounts
from tasks.celery_app import make_app
from tasks.settings import TREE, settings_from
from tasks.topology import load_topology

PASSWORDS = {one: f"word-of-{one}" for one in ACCOUNTS}
CLASSES = ["cpu.batch", "gpu.realtime"]


def test_nothing_that_is_written_holds_a_password(tmp_path: Path) -> None:
    acl, definitions = tmp_path / "users.acl", tmp_path / "rabbit.json"
    variables = {f"TAXIWAY_{one.upper()}_PASSWORD": word for one, word in PASSWORDS.items()}

    done = CliRunner(env=variables).invoke(main, ["--acl", str(acl), "--definitions", str(definitions)])

    assert json.loads(done.output) == PASSWORDS
    for text in (acl.read_text(), definitions.read_text()):
        assert not [word for word in PASSWORDS.values() if word in text]


def test_without_passwords_of_ones_own_each_account_gets_a_new_one() -> None:
    first, second = (json.loads(CliRunner().invoke(main).output) for _ in range(2))
    assert len({*first.values(), *second.values()}) == 2 * len(ACCOUNTS)


def test_an_acl_file_has_a_line_per_account_and_refuses_by_default() -> None:
    default, *accounts = valkey_accounts(CLASSES, PASSWORDS).splitlines()
    assert default == "user default off"
    assert [line.split()[1] for line in accounts] == list(ACCOUNTS)
    assert all(line.isprintable() and "resetchannels -@all" in line for line in accounts)


def test_every_class_of_queues_yaml_has_its_queue_in_the_accounts_of_routers_and_workers() -> None:
    classes = load_topology(TREE / "queues.yaml").hardware
    lines = dict(zip(ACCOUNTS, valkey_accounts(classes, PASSWORDS).splitlines()[1:], strict=True))
    assert all(f" ~{name} " in lines[one] for name in classes for one in ("router", "worker"))


def test_rabbitmq_is_given_salted_digests_and_patterns_that_match_whole_names() -> None:
    definitions = rabbit_accounts(CLASSES, PASSWORDS, "fleet")
    digest = base64.b64decode(definitions["users"][0]["password_hash"])
    assert digest[4:] == hashlib.sha256(digest[:4] + PASSWORDS["producer"].encode()).digest()
    rights = {one["user"]: one for one in definitions["permissions"]}
    assert re.search(rights["producer"]["write"], "taxiway.arrivals")
    assert not re.search(rights["producer"]["write"], "taxiway.arrivals.other")
    assert not re.search(rights["worker"]["write"], "taxiway.arrivals")
    assert not re.search(rights["worker"]["read"], "cpuxbatch")
    assert {one["vhost"] for one in definitions["permissions"]} == {"fleet"}


def test_celery_gets_the_tls_files_in_an_address_of_rabbitmq() -> None:
    address = "amqps://router:word@host:5671/fleet?cafile=/tls/ca.pem&certfile=/tls/own.pem&keyfile=/tls/own.key"
    variables = {"TAXIWAY_BROKER": address, "TAXIWAY_STATE": "rediss://host/0", "TAXIWAY_SECRET": "00" * 32}
    settings = settings_from(variables)

    app = make_app(settings, load_topology(settings.queues))

    assert app.conf.broker_url == "amqps://router:word@host:5671/fleet"
    assert app.conf.broker_use_ssl["ca_certs"] == "/tls/ca.pem"
    assert app.conf.broker_use_ssl["certfile"] == "/tls/own.pem"
    assert app.conf.broker_use_ssl["server_hostname"] == "host"
    app.close()
