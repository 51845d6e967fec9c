"""Ray clusters that cannot be reached: an error at once or after a timeout. A signal ends the wait."""

import errno
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs.ray_address import call_with_timeout, check_listening, resolve_address
from pipeline.errors import UsageError
from tests.conftest import STAMP
from tests.servers import free_port

ROOT = Path(__file__).parents[2]
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def argv(shards: Path, micro_vae: Path, tmp_path: Path) -> list[str]:
    source, cache, vae = map(str, (shards, tmp_path / "c", micro_vae))
    return [source, "--to", cache, "--vae", vae, "--resolution", "64", "--workers", "1"]


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Return the address of a server that accepts connections and never responds."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(50)
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize(
    ("address", "environment", "expected"),
    [
        ("", None, ""),
        ("", "", ""),
        ("", "a:1", "a:1"),
        ("b:2", "a:1", "b:2"),
        ("auto", "a:1", "a:1"),
        ("auto", None, "auto"),
        ("local", "a:1", ""),
        ("", "local", ""),
    ],
)
def test_the_address_comes_from_the_option_or_the_environment(
    monkeypatch: pytest.MonkeyPatch, address: str, environment: str | None, expected: str
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if environment is not None:
        monkeypatch.setenv("RAY_ADDRESS", environment)
    assert resolve_address(address) == expected


@pytest.mark.parametrize("address", ["host", "host:", ":6379", "host:port", "host:0", "host:65536", "http://host:8265"])
def test_an_invalid_address_is_wrong_usage(address: str) -> None:
    with pytest.raises(UsageError, match=f"must be HOST:PORT .*, not '{address}'"):
        check_listening(address)


def test_a_port_must_have_a_listener(silent_server: str) -> None:
    check_listening(silent_server)
    check_listening(f"ray://{silent_server}")
    with pytest.raises(ConnectionRefusedError):
        check_listening(f"[::ffff:127.0.0.1]:{free_port()}")


def test_a_call_that_takes_too_long_is_abandoned() -> None:
    end = threading.Event()
    with pytest.raises(TimeoutError):
        call_with_timeout(end.wait, 0.1)
    end.set()
    assert call_with_timeout(lambda: 1, 10) == 1
    with pytest.raises(KeyError):
        call_with_timeout(lambda: {}[0], 10)


@pytest.mark.parametrize("given_by", ["--address", "RAY_ADDRESS"])
def test_an_address_without_a_listener_is_an_error_at_once(
    latentmill: Command, argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given_by: str
) -> None:
    address = f"127.0.0.1:{free_port()}"
    if given_by == "RAY_ADDRESS":
        monkeypatch.setenv(given_by, address)
    began = time.monotonic()
    code, out, err = latentmill("encode", *argv, *(["--address", address] if given_by == "--address" else []))
    assert (code, out) == (2, "")
    assert time.monotonic() - began < 20  # to import Ray, on a busy machine
    label = address if given_by == "--address" else f"{address} (RAY_ADDRESS)"
    message, error = err.splitlines()
    assert re.fullmatch(rf"{STAMP} INFO " + re.escape(f"connecting to the Ray cluster at {label}"), message)
    assert error == (
        f"latentmill: cannot reach the Ray cluster at {label}: {os.strerror(errno.ECONNREFUSED).lower()}; start it, "
        "correct the address, or leave it out for a local Ray"
    )
    assert not (tmp_path / "c").exists()


def test_an_unknown_host_is_wrong_usage(latentmill: Command, argv: list[str]) -> None:
    code, _, err = latentmill("encode", *argv, "--address", "nowhere.invalid:6379")
    assert code == 2
    assert "cannot reach the Ray cluster at nowhere.invalid:6379: " in err


def start_job(argv: list[str], seconds: float) -> "subprocess.Popen[str]":
    """Start an encode job. seconds: how long it may wait for the cluster."""
    shorten = f"ray_executor.CONNECT_SECONDS = {seconds}"
    job = f"from jobs import encode, ray_executor; {shorten}; encode.run_as_script(encode.main)"
    return subprocess.Popen(
        [sys.executable, "-c", job, *argv],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.ray
def test_the_wait_for_a_silent_server_times_out(argv: list[str], silent_server: str) -> None:
    with start_job([*argv, "--address", silent_server], 2) as job:
        _, err = job.communicate(timeout=60)
        assert job.returncode == 2
        assert (
            f"latentmill: cannot reach the Ray cluster at {silent_server}: no answer within 2 s; is it running" in err
        )


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize(("sign", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_wait(argv: list[str], silent_server: str, sign: signal.Signals, code: int) -> None:
    with start_job([*argv, "--address", silent_server], 60) as job:
        assert job.stderr is not None
        connecting = re.escape(f"connecting to the Ray cluster at {silent_server}\n")
        assert re.fullmatch(rf"{STAMP} INFO {connecting}", job.stderr.readline())
        time.sleep(3)  # by then, Ray itself retries the connection
        signalled = time.monotonic()
        job.send_signal(sign)
        _, err = job.communicate(timeout=60)
        assert time.monotonic() - signalled < 30, "the wait alone lasts 60 s"
        assert job.returncode == code
        assert "stopped; the cache is consistent; run the same command to resume: " in err


@pytest.mark.slow
@pytest.mark.ray
def test_a_missing_token_is_named(argv: list[str], silent_server: str, tmp_path: Path) -> None:
    job = subprocess.run(
        [sys.executable, "-m", "jobs.encode", *argv, "--address", silent_server],
        cwd=ROOT,
        env={**os.environ, "RAY_AUTH_MODE": "token", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert job.returncode == 2
    last = job.stderr.splitlines()[-1]
    assert last.startswith(
        f"latentmill: cannot reach the Ray cluster at {silent_server}: Token authentication is enabled but"
    )
    assert last.endswith(
        "; RAY_AUTH_MODE=token is set here: set RAY_AUTH_TOKEN or ~/.ray/auth_token to the token of the cluster, or "
        "unset RAY_AUTH_MODE if the cluster has no token"
    )


@pytest.mark.ray
def test_both_kinds_of_a_wrong_token_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray reports a token that does not fit as a failed connection, or ends all actors before they run."""
    from jobs import ray_executor, ray_node

    refused = ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379. Please check the address")
    never_ran = ray_executor.RayError("The actor died.\nThe actor never ran - it was cancelled before it started.")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    assert ray_executor._explain_unreachable(refused) == (
        "Failed to connect to Ray cluster at 10.0.0.1:6379; if it requires a token, set RAY_AUTH_MODE=token, and "
        "RAY_AUTH_TOKEN or ~/.ray/auth_token"
    )
    assert "RAY_AUTH" not in ray_node.describe_error(never_ran)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    advice = "unset RAY_AUTH_MODE if the cluster has no token"
    assert ray_executor._explain_unreachable(refused).endswith(advice)
    assert ray_node.describe_error(never_ran).endswith(advice)
