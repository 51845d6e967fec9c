"""Reaching a Ray cluster: which one is meant, whether anything listens there, and an end to the wait.

Ray itself tries a dead address for minutes, without a word, and in C++, where no signal ends it.
"""

import os
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from pipeline.errors import UsageError

SECONDS = 60.0  # for a cluster to answer

Answer = TypeVar("Answer")


def resolve_address(address: str) -> str:
    """The address of the cluster to use: `--address`, otherwise RAY_ADDRESS; empty for a local Ray."""
    named = address if address not in ("", "auto") else os.environ.get("RAY_ADDRESS") or address
    return "" if named == "local" else named


def check_listening(address: str) -> None:
    """Raise OSError where nothing listens at HOST:PORT, UsageError for what is no address."""
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if "/" in host or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError(f"the address of a Ray cluster must be HOST:PORT (6379 as a rule), not '{address}'")
    socket.create_connection((host.strip("[]"), int(port)), SECONDS).close()


def call_with_timeout(call: Callable[[], Answer], seconds: float) -> Answer:
    """What a call returns that no signal ends: it runs in a thread, which is left behind where it takes too long.

    Signals are obeyed meanwhile. Raises TimeoutError.
    """
    answer: Future[Answer] = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True, name="reach").start()
    return answer.result(seconds)
