"""The requests of `verify`: one for each file, and listings."""

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
    """Return a folder of twelve tars with two samples. In every other tar, one sample is a reject."""
    for number in range(12):
        members = {f"{number}a.jpg": encoded(smooth(number)), f"{number}b.jpg": encoded(smooth(50 + number))}
        if number % 2:
            members[f"{number}b.jpg"] = b"no image"
        write_tar(tmp_path / f"s/{number:02}.tar", members)
    return tmp_path / "s"


def count_requests(proxy: Proxy) -> Counter[str]:
    """Return the requests so far, by method and folder."""
    kinds: Counter[str] = Counter()
    for request in proxy.seen:
        if "list-type" in request.path:
            kinds["LIST"] += 1
        else:
            kinds[" ".join([request.method, *request.path.strip("/").split("/")[2:3]])] += 1
    return kinds


@pytest.mark.slow
def test_verify_reads_each_file_once_and_many_concurrently(
    latentmill: Command, source: Path, micro_vae: Path, bucket: str, proxy: Proxy
) -> None:
    argv = ["encode", source, "--to", f"{bucket}/c", "--vae", micro_vae, "--resolution", 64, "--workers", 0]
    assert latentmill(*argv, "--max-reject-rate", 1)[0] == 0
    active, max_active, lock = 0, 0, threading.Lock()

    def count_start(request: Request) -> None:
        nonlocal active, max_active
        with lock:
            active += "/_commits/" in request.path
            max_active = max(max_active, active)
        time.sleep(0.05)

    def count_end(request: Request) -> None:
        nonlocal active
        with lock:
            active -= "/_commits/" in request.path

    proxy.seen.clear()
    proxy.rule, proxy.after = count_start, count_end
    code, out, err = latentmill("verify", f"{bucket}/c")
    assert code == 0, out + err
    kinds = count_requests(proxy)
    assert not [kind for kind in kinds if kind.startswith("HEAD")]
    assert {kind: kinds[f"GET {kind}"] for kind in ("data", "_commits", "_rejects")} == {
        "data": 12,
        "_commits": 12,
        "_rejects": 6,  # half of the tars have rejects
    }
    assert kinds["LIST"] < 20, "the number of listings does not depend on the number of units"
    assert max_active > 4
