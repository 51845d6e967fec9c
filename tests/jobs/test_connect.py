"""Ray clusters that cannot be reached: said at once, or after a minute, and a signal ends the waiting."""

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

from jobs.connect import call_with_timeout, check_listening, resolve_address
from pipeline.errors import UsageError
from tests.conftest import STAMP, slow_param
from tests.servers import free_port

ROOT = Path(__file__).parents[2]
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def argv(shards: Path, micro_vae: Path, tmp_path: Path) -> list[str]:
    source, cache, vae = map(str, (shards, tmp_path / "c", micro_vae))
    return [source, "--to", cache, "--vae", vae, "--resolution", "64", "--workers", "1"]


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of something that takes connections and never says a word."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(50)
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize(
    ("address", "environment", "named"),
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
def test_which_cluster_is_meant(
    monkeypatch: pytest.MonkeyPatch, address: str, environment: str | None, named: str
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if environment is not None:
        monkeypatch.setenv("RAY_ADDRESS", environment)
    assert resolve_address(address) == named


@pytest.mark.parametrize("address", ["host", "host:", ":6379", "host:port", "host:0", "host:65536", "http://host:8265"])
def test_what_is_no_address_is_wrong_usage(address: str) -> None:
    with pytest.raises(UsageError, match=f"must be HOST:PORT .*, not '{address}'"):
        check_listening(address)


def test_what_listens_is_found(silent: str) -> None:
    check_listening(silent)
    check_listening(f"ray://{silent}")
    with pytest.raises(ConnectionRefusedError):
        check_listening(f"[::ffff:127.0.0.1]:{free_port()}")


def test_a_call_that_takes_too_long_is_left_behind() -> None:
    end = threading.Event()
    with pytest.raises(TimeoutError):
        call_with_timeout(end.wait, 0.1)
    end.set()
    assert call_with_timeout(lambda: 1, 10) == 1
    with pytest.raises(KeyError):
        call_with_timeout(lambda: {}[0], 10)


@pytest.mark.parametrize("by", ["--address", "RAY_ADDRESS"])
def test_where_nothing_listens_it_is_said_at_once(
    latentmill: Command, argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    where = f"127.0.0.1:{free_port()}"
    if by == "RAY_ADDRESS":
        monkeypatch.setenv(by, where)
    start = time.monotonic()
    code, out, err = latentmill("encode", *argv, *(["--address", where] if by == "--address" else []))
    assert (code, out) == (2, "")
    assert time.monotonic() - start < 20  # to import Ray, on a busy machine
    shown = where if by == "--address" else f"{where} (RAY_ADDRESS)"
    message, error = err.splitlines()
    assert re.fullmatch(rf"{STAMP} INFO " + re.escape(f"connecting to the Ray cluster at {shown}"), message)
    assert error == (
        f"latentmill: cannot reach the Ray cluster at {shown}: {os.strerror(errno.ECONNREFUSED).lower()}; start it, "
        "correct the address, or leave it out for a local Ray"
    )
    assert not (tmp_path / "c").exists()


def test_a_host_without_a_name_is_wrong_usage(latentmill: Command, argv: list[str]) -> None:
    code, _, err = latentmill("encode", *argv, "--address", "nowhere.invalid:6379")
    assert code == 2
    assert "cannot reach the Ray cluster at nowhere.invalid:6379: " in err


def start(argv: list[str], seconds: float) -> "subprocess.Popen[str]":
    """The encode job, which waits for so many seconds at most."""
    shorten = f"ray_executor.CONNECT_SECONDS = {seconds}"
    job = f"from jobs import encode, ray_executor; {shorten}; encode.run_as_script(encode.main)"
    return subprocess.Popen(
        [sys.executable, "-c", job, *argv],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.ray
def test_where_nobody_answers_the_wait_has_an_end(argv: list[str], silent: str) -> None:
    with start([*argv, "--address", silent], 2) as job:
        _, err = job.communicate(timeout=60)
        assert job.returncode == 2
        assert f"latentmill: cannot reach the Ray cluster at {silent}: no answer within 2 s; is it running" in err


@pytest.mark.ray
@pytest.mark.parametrize(("sign", "code"), [(signal.SIGTERM, 143), slow_param(signal.SIGINT, 130)])
def test_a_signal_ends_the_wait(argv: list[str], silent: str, sign: signal.Signals, code: int) -> None:
    with start([*argv, "--address", silent], 60) as job:
        assert job.stderr is not None
        connecting = re.escape(f"connecting to the Ray cluster at {silent}\n")
        assert re.fullmatch(rf"{STAMP} INFO {connecting}", job.stderr.readline())
        time.sleep(3)  # it is deep in Ray's own attempts by then
        asked = time.monotonic()
        job.send_signal(sign)
        _, err = job.communicate(timeout=60)
        assert time.monotonic() - asked < 5
        assert job.returncode == code
        assert "stopped; the cache is consistent; run the same command to resume: " in err


@pytest.mark.ray
def test_a_token_that_is_missing_is_said(argv: list[str], silent: str, tmp_path: Path) -> None:
    job = subprocess.run(
        [sys.executable, "-m", "jobs.encode", *argv, "--address", silent],
        cwd=ROOT,
        env={**os.environ, "RAY_AUTH_MODE": "token", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert job.returncode == 2
    last = job.stderr.splitlines()[-1]
    assert last.startswith(f"latentmill: cannot reach the Ray cluster at {silent}: Token authentication is enabled but")
    assert last.endswith("set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or ~/.ray/auth_token")
