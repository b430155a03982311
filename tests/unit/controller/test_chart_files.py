"""The chart's files as data; tests/cluster renders and installs it."""

import re

import pytest
import yaml

from broker.accounts import ACCOUNTS, valkey_accounts
from tasks.settings import TREE

CHARTS = TREE / "charts"


@pytest.mark.parametrize("account", ["flower", "tuner"])
def test_flower_and_the_tuner_may_do_at_valkey_what_their_accounts_may(account: str) -> None:
    accounts = valkey_accounts([], dict.fromkeys(ACCOUNTS, "x"))
    [line] = [one for one in accounts.splitlines() if f"user {account} " in one]
    assert (CHARTS / "taxiway" / "files" / f"{account}.acl").read_text().split() == line.split()[4:]


def test_the_chart_has_the_images_of_others_that_compose_has() -> None:
    values = yaml.safe_load((CHARTS / "taxiway" / "values.yaml").read_text())
    pinned = set(re.findall(r"_IMAGE:-(\S+@sha256:\w+)", (TREE / "docker" / "compose.yaml").read_text()))
    assert {values["valkey"]["image"], values["nginx"]} <= pinned
