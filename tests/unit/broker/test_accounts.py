import json
from pathlib import Path

from click.testing import CliRunner

from broker.accounts import ACCOUNTS, main, valkey_accounts
from tasks.settings import TREE
from tasks.topology import load_topology

PASSWORDS = {one: f"word-of-{one}" for one in ACCOUNTS}
CLASSES = ["cpu.batch", "gpu.realtime"]


def test_nothing_that_is_written_holds_a_password(tmp_path: Path) -> None:
    acl = tmp_path / "users.acl"
    variables = {f"TAXIWAY_{one.upper()}_PASSWORD": word for one, word in PASSWORDS.items()}
    done = CliRunner(env=variables).invoke(main, ["--acl", str(acl)])
    assert json.loads(done.output) == PASSWORDS
    assert not [word for word in PASSWORDS.values() if word in acl.read_text()]


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
