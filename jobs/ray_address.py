"""Connect to a Ray cluster: find its address, check that a server listens at it, and limit the time.

Without the check, Ray retries a dead address for minutes without a message, in C++ code that no signal interrupts.
"""

import os
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from pipeline.errors import UsageError

CONNECT_SECONDS = 60.0  # timeout for a cluster to answer

Answer = TypeVar("Answer")


def resolve_address(address: str) -> str:
    """Return the address of the cluster to use: `--address`, otherwise RAY_ADDRESS; empty for a local Ray."""
    resolved = address if address not in ("", "auto") else os.environ.get("RAY_ADDRESS") or address
    return "" if resolved == "local" else resolved


def check_listening(address: str) -> None:
    """Raise OSError if nothing listens at HOST:PORT, UsageError if this is not an address."""
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if "/" in host or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError(f"the address of a Ray cluster must be HOST:PORT (usually port 6379), not '{address}'")
    socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()


def advise_about_token() -> str:
    """Return what to do if this process and the cluster do not agree about a token."""
    if os.environ.get("RAY_AUTH_MODE") == "token":
        return (
            "RAY_AUTH_MODE=token is set here: set RAY_AUTH_TOKEN or ~/.ray/auth_token to the token of the cluster, or "
            "unset RAY_AUTH_MODE if the cluster has no token"
        )
    return "if it requires a token, set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or ~/.ray/auth_token"


def explain_lost_actor(reason: str) -> str:
    """Return the reason why an actor was lost. In a cluster without a token, actors of a job with a token never run."""
    is_token_set = os.environ.get("RAY_AUTH_MODE") == "token"
    return f"{reason.rstrip('.')}; {advise_about_token()}" if is_token_set and "never ran" in reason else reason


def call_with_timeout(call: Callable[[], Answer], seconds: float) -> Answer:
    """Return the result of a call that no signal can interrupt. Raises TimeoutError.

    The call runs in a thread, so that signals are handled during the call. After a timeout the thread is abandoned.
    """
    answer: Future[Answer] = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True, name="connect").start()
    return answer.result(seconds)
