import json
from pathlib import Path

from click.testing import CliRunner

from broker.accounts import ACCOUNTS, main

PASSWORDS = {one: f"word-of-{one}" for one in ACCOUNTS}


def test_nothing_that_is_written_holds_a_password(tmp_path: Path) -> None:
    acl = tmp_path / "users.acl"
    variables = {f"TAXIWAY_{one.upper()}_PASSWORD": word for one, word in PASSWORDS.items()}
    done = CliRunner(env=variables).invoke(main, ["--acl", str(acl)])
    assert json.loads(done.output) == PASSWORDS
    assert not [word for word in PASSWORDS.values() if word in acl.read_text()]


def test_without_passwords_of_ones_own_each_account_gets_a_new_one() -> None:
    first, second = (json.loads(CliRunner().invoke(main).output) for _ in range(2))
    assert len({*first.values(), *second.values()}) == 2 * len(ACCOUNTS)
