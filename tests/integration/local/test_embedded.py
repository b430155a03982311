import fcntl
import os
import signal
import socket
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis

from local.embedded import EmbeddedValkey, EmbeddedValkeyError, kept_port
from tasks.settings import TREE
from tests.waiting import until

HOLD = """
import sys, time
from pathlib import Path
from local.embedded import EmbeddedValkey
server = EmbeddedValkey(Path(sys.argv[1]))
server.start()
print(server.pid, server.url, flush=True)
time.sleep(600)
"""


def refused(url: str) -> bool:
    with redis.Redis.from_url(url, socket_timeout=60, retry=None) as client:
        try:
            client.ping()
        except redis.ConnectionError:
            return True
    return False


def test_the_server_answers_on_loopback_to_who_has_its_password_which_only_its_owner_can_read(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path) as server:
        kept = tmp_path / "valkey.password"
        assert stat.S_IMODE(kept.stat().st_mode) == 0o600
        assert kept.read_text() not in Path(f"/proc/{server.pid}/cmdline").read_text()
        with redis.Redis.from_url(server.url, decode_responses=True) as client:
            assert client.config_get("bind") == {"bind": "127.0.0.1"}
        bare = "redis://" + server.url.partition("@")[2]
        with redis.Redis.from_url(bare, retry=None) as stranger, pytest.raises(redis.AuthenticationError):
            stranger.ping()


def test_a_port_that_another_program_takes_before_the_server_does_is_exchanged(tmp_path: Path) -> None:
    chosen, lock = tmp_path / "valkey.port", os.open(tmp_path / "valkey.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)  # the server waits for it with its port chosen

    def take(other: socket.socket) -> int:
        assert until(lambda: chosen.exists() and bool(chosen.read_text()))
        other.bind(("127.0.0.1", int(chosen.read_text())))
        other.listen()
        os.close(lock)
        return int(other.getsockname()[1])

    with socket.socket() as other, ThreadPoolExecutor() as threads:
        taken = threads.submit(take, other)
        with EmbeddedValkey(tmp_path) as server, redis.Redis.from_url(server.url) as client:
            assert client.ping()
            assert chosen.read_text() != str(taken.result())


def test_data_addresses_and_a_unix_socket_of_its_owner_survive_a_restart(tmp_path: Path) -> None:
    (tmp_path / "my fleet").mkdir()
    for left_by_a_full_disk in ("valkey.password", "valkey.port"):
        (tmp_path / "my fleet" / left_by_a_full_disk).touch()
    with EmbeddedValkey(tmp_path / "my fleet") as first:
        place = tmp_path / "my fleet" / "valkey.sock"
        assert stat.S_IMODE(place.stat().st_mode) == 0o700
        with redis.Redis.from_url(first.socket_url) as client:
            client.set("kept", "yes")
        bare = f"unix://{first.socket_url.partition('@')[2]}"
        with redis.Redis.from_url(bare, retry=None) as stranger, pytest.raises(redis.AuthenticationError):
            stranger.ping()
    assert not place.exists()
    with EmbeddedValkey(tmp_path / "my fleet") as second, redis.Redis.from_url(second.url) as client:
        assert (second.url, second.socket_url) == (first.url, first.socket_url)
        assert client.get("kept") == b"yes"


def test_where_a_sockets_path_would_be_too_long_loopback_serves(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path / ("long" * 25)) as server:
        assert server.socket_url == server.url
        assert not refused(server.url)


def test_a_second_server_on_the_same_data_is_refused(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path), pytest.raises(EmbeddedValkeyError, match="another Valkey server"):
        EmbeddedValkey(tmp_path, timeout=0.2).start()


def test_a_server_that_cannot_start_reports_the_end_of_its_log(tmp_path: Path) -> None:
    folder = tmp_path / "valkey" / "appendonlydir"
    folder.mkdir(parents=True)
    (folder / "appendonly.aof.manifest").write_text("not a manifest\n")
    with pytest.raises(EmbeddedValkeyError, match="manifest"):
        EmbeddedValkey(tmp_path).start()


def test_the_server_dies_when_its_parent_is_killed_and_keeps_what_it_had(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=TREE)
    assert holder.stdout is not None
    with holder.stdout as said:
        url = said.readline().split()[1]
    with redis.Redis.from_url(url) as client:
        client.set("kept", "yes")
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert until(lambda: refused(url))
    with EmbeddedValkey(tmp_path) as again, redis.Redis.from_url(again.url) as client:
        assert client.get("kept") == b"yes"


def test_no_outgoing_connection_takes_the_port_that_a_server_is_given(tmp_path: Path) -> None:
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    given = {kept_port(tmp_path / str(turn)) for turn in range(20)}
    assert not given & set(range(first, last + 1))
