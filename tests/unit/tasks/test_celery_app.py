from __future__ import annotations

from celery.app.utils import Settings

from tasks.celery_app import make_app
from tasks.settings import settings_from
from tasks.topology import load_topology

SENTINELS = "redis+sentinel://u:p%2F@a:1,b/2?service=fleet&sentinel_password=s"


def app_of(url: str) -> Settings:
    settings = settings_from({"TAXIWAY_BROKER": url, "TAXIWAY_SECRET": "00" * 32})
    return make_app(settings, load_topology(settings.queues), backend="module:Backend").conf


def test_celery_gets_sentinels_in_its_own_form() -> None:
    conf = app_of(SENTINELS)
    address = "sentinel://u:p%2F@a:1/2;sentinel://u:p%2F@b:26379/2"
    watched = {"master_name": "fleet", "sentinel_kwargs": {"password": "s"}}

    assert conf.broker_url == address
    assert conf.result_backend == f"module:Backend+{address}"
    assert conf.broker_transport_options.items() >= watched.items()
    assert conf.result_backend_transport_options == watched


def test_celery_gets_a_unix_socket_in_its_own_form() -> None:
    conf = app_of("unix://u:p%2F@/run/my%20fleet/valkey.sock?db=3")
    address = "socket://u:p%2F@/run/my%20fleet/valkey.sock?virtual_host=3"

    assert conf.broker_url == f"redis+{address}"
    assert conf.result_backend == f"module:Backend+{address}"


def test_celery_gets_tls_at_sentinels_and_at_the_primary() -> None:
    conf = app_of(SENTINELS.replace("redis+", "rediss+") + "&ssl_ca_certs=ca.pem")
    tls = {"ssl_ca_certs": "ca.pem", "ssl_cert_reqs": "required"}

    assert conf.broker_use_ssl == conf.redis_backend_use_ssl == tls
    assert conf.broker_transport_options["sentinel_kwargs"] == {"password": "s", "ssl": True, **tls}
