import pytest

from tasks.settings import SettingsError
from tests.builders import a_class, a_topology
from workers.device import USD_PER_HOUR, options_from

TOPOLOGY = a_topology(cpu=a_class())


def test_a_worker_may_be_told_what_its_node_costs() -> None:
    assert options_from({"TAXIWAY_CLASS": "cpu"}, TOPOLOGY).usd_per_hour is None
    assert options_from({"TAXIWAY_CLASS": "cpu", USD_PER_HOUR: "0.28"}, TOPOLOGY).usd_per_hour == 0.28


@pytest.mark.parametrize("price", ["0", "-1", "nan", "inf", "free"])
def test_a_price_that_is_none_is_refused_by_name(price: str) -> None:
    with pytest.raises(SettingsError, match="TAXIWAY_USD_PER_HOUR: expected US dollars an hour, above 0"):
        options_from({"TAXIWAY_CLASS": "cpu", USD_PER_HOUR: price}, TOPOLOGY)
