"""The loopback ports of a local fleet's doors: the usual ones, and whether those that were asked for are free."""

from __future__ import annotations

import errno
import socket
from collections.abc import Mapping

import psutil

HTTP_PORT = 8080
"""Where the HTTP door is, unless another program listens there."""

FLOWER_PORT = 5555
"""Where Flower is, unless another program listens there."""


class PortTakenError(Exception):
    """A port that was asked for cannot be had; names the option, and why."""

    def __init__(self, option: str, port: int, why: str) -> None:
        super().__init__(f"{option} {port}: {why}")
        self.option = option
        self.port = port


def check_ports(asked: Mapping[str, int]) -> None:
    """Check that the loopback ports asked for, by option, can be listened on; 0 asks for none in particular.

    Raises:
        PortTakenError: another program listens there, this user may not, or the same port is asked for twice.
    """
    seen: dict[int, str] = {}
    for option, port in asked.items():
        if not port:
            continue
        if port in seen:
            raise PortTakenError(option, port, f"{seen[port]} asks for the same port")
        seen[port] = option
        _check(option, port)


def _check(option: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            why = f"the port is taken{_owner(port)}" if taken else f"the port cannot be used: {error.strerror}"
            raise PortTakenError(option, port, why) from error


def _owner(port: int) -> str:
    """` by` and the program that listens on a port; empty where this user may not know."""
    try:
        listening = psutil.net_connections("tcp")
        pids = [one.pid for one in listening if one.status == psutil.CONN_LISTEN and one.laddr.port == port]
        return next((f" by {psutil.Process(pid).name()} (process {pid})" for pid in pids if pid is not None), "")
    except psutil.Error:
        return ""
