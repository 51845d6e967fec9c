"""What `verify` asks a store for: a request for each file, and listings."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import encoded, smooth, write_tar
from tests.proxy import Proxy, Request

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Twelve tars of two samples, one of them a reject in every other tar."""
    for number in range(12):
        members = {f"{number}a.jpg": encoded(smooth(number)), f"{number}b.jpg": encoded(smooth(50 + number))}
        if number % 2:
            members[f"{number}b.jpg"] = b"no image"
        write_tar(tmp_path / f"s/{number:02}.tar", members)
    return tmp_path / "s"


def asked(proxy: Proxy) -> Counter[str]:
    """The requests so far, by kind and folder."""
    kinds: Counter[str] = Counter()
    for request in proxy.seen:
        if "list-type" in request.path:
            kinds["LIST"] += 1
        else:
            kinds[" ".join([request.method, *request.path.strip("/").split("/")[2:3]])] += 1
    return kinds


def test_verify_asks_for_each_file_once_and_for_many_at_once(
    latentmill: Command, source: Path, micro_vae: Path, bucket: str, proxy: Proxy
) -> None:
    argv = ["encode", source, "--to", f"{bucket}/c", "--vae", micro_vae, "--resolution", 64, "--workers", 0]
    assert latentmill(*argv, "--max-reject-rate", 1)[0] == 0
    under_way, most, lock = 0, 0, threading.Lock()

    def begun(request: Request) -> None:
        nonlocal under_way, most
        with lock:
            under_way += "/_commits/" in request.path
            most = max(most, under_way)
        time.sleep(0.05)

    def ended(request: Request) -> None:
        nonlocal under_way
        with lock:
            under_way -= "/_commits/" in request.path

    proxy.seen.clear()
    proxy.rule, proxy.after = begun, ended
    code, out, err = latentmill("verify", f"{bucket}/c")
    assert code == 0, out + err
    kinds = asked(proxy)
    assert not [kind for kind in kinds if kind.startswith("HEAD")]
    assert {kind: kinds[f"GET {kind}"] for kind in ("data", "_commits", "_rejects")} == {
        "data": 12,
        "_commits": 12,
        "_rejects": 6,  # of those that there are
    }
    assert kinds["LIST"] < 16, "of folders, however many units there are"
    assert most > 4
