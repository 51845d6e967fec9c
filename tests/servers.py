"""An S3 server on loopback, over real HTTP: moto's by default.

LATENTMILL_TEST_S3=ceph takes a Ceph gateway (tests/ceph.py), LATENTMILL_TEST_S3=http://... one that stands.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pytest

from tests import ceph
from tests.proxy import Proxy

KEY, SECRET = "testing", "pl4nted-s3cret-k3y"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def await_http(url: str, process: subprocess.Popen[bytes], seconds: float = 30) -> None:
    """Return once something answers."""
    end = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            assert process.poll() is None, "the server has ended"
            assert time.monotonic() < end, "the server does not answer"
            time.sleep(0.05)


@pytest.fixture(scope="session")
def endpoint() -> Iterator[str]:
    """The URL of an S3 server."""
    wanted = os.environ.get("LATENTMILL_TEST_S3", "moto")
    if wanted == "ceph":
        with (
            tempfile.TemporaryDirectory() as folder,
            ceph.gateway(Path(folder), free_port(), free_port(), KEY, SECRET) as url,
        ):
            yield url
        return
    if wanted != "moto":
        yield wanted
        return
    with moto() as url:
        yield url


@contextmanager
def moto() -> Iterator[str]:
    """The URL of a server of its own."""
    port = free_port()
    argv = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        await_http(f"http://127.0.0.1:{port}/", server)
        yield f"http://127.0.0.1:{port}"
        server.terminate()


def end_sessions() -> None:
    """Close what s3fs keeps open, and have it read the environment anew."""
    kind = fsspec.get_filesystem_class("s3")
    for fs in kind._cache.values():
        if fs._s3 is not None:
            kind.close_session(fs.loop, fs._s3)
    kind.clear_instance_cache()


@pytest.fixture
def account(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The usual environment of S3 context, pointing to the server."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    end_sessions()
    yield endpoint
    end_sessions()


@pytest.fixture
def bucket(account: str) -> str:
    """The URL of a bucket of its own."""
    name = f"test-{uuid.uuid4().hex}"
    fsspec.filesystem("s3").mkdir(name)
    return f"s3://{name}"


@pytest.fixture
def proxy(account: str, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy in front of the server, which every request now goes through."""
    with Proxy(account) as between:
        monkeypatch.setenv("AWS_ENDPOINT_URL", between.url)
        end_sessions()
        yield between
        end_sessions()


def upload(folder: Path, url: str) -> str:
    """Put a folder of the disk at a URL."""
    fs, root = fsspec.url_to_fs(url)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            fs.pipe_file(f"{root}/{path.relative_to(folder)}", path.read_bytes())
    return url


def names(url: str) -> list[str]:
    """The names of all that stands below a URL, relative to it."""
    fs, root = fsspec.url_to_fs(url, use_listings_cache=False)
    return [path[len(root) + 1 :] for path in fs.find(root, withdirs=False)]


def read(url: str) -> bytes:
    fs, path = fsspec.url_to_fs(url)
    return bytes(fs.cat_file(path))


def objects(url: str) -> dict[str, bytes]:
    """All that stands below a URL, by names relative to it."""
    return {name: read(f"{url}/{name}") for name in names(url)}
