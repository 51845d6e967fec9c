"""An S3 server on loopback over real HTTP, by default that of moto.

LATENTMILL_TEST_S3=ceph starts a Ceph gateway (tests/ceph.py). LATENTMILL_TEST_S3=http://... uses a running server.
"""

import gc
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
import warnings
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
    """Return when the server answers at the URL."""
    end = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            assert process.poll() is None, "the server has ended"
            assert time.monotonic() < end, "the server did not answer in time"
            time.sleep(0.05)


@pytest.fixture(scope="session")
def endpoint() -> Iterator[str]:
    """Start an S3 server and return its URL."""
    server = os.environ.get("LATENTMILL_TEST_S3", "moto")
    if server == "ceph":
        with (
            tempfile.TemporaryDirectory() as folder,
            ceph.gateway(Path(folder), free_port(), free_port(), KEY, SECRET) as url,
        ):
            yield url
        return
    if server != "moto":
        yield server
        return
    with moto() as url:
        yield url


@contextmanager
def moto() -> Iterator[str]:
    """Start a new moto server and return its URL."""
    pytest.importorskip("moto", reason="the S3 server of the tests, moto, is not installed (extra peers)")
    port = free_port()
    argv = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        await_http(f"http://127.0.0.1:{port}/", server)
        yield f"http://127.0.0.1:{port}"
        server.terminate()


def end_sessions() -> None:
    """Close the sessions of s3fs, so that it reads the environment again."""
    filesystem_class = fsspec.get_filesystem_class("s3")
    for fs in filesystem_class._cache.values():
        if fs._s3 is not None:
            filesystem_class.close_session(fs.loop, fs._s3)
    filesystem_class.clear_instance_cache()
    # s3fs leaves the connection open on which it receives another ETag, until its memory is collected
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
def account(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Set the usual S3 variables in the environment to the server, and return its URL."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    end_sessions()
    yield endpoint
    end_sessions()


@pytest.fixture
def bucket(account: str) -> str:
    """Create a new bucket and return its URL."""
    name = f"test-{uuid.uuid4().hex}"
    fsspec.filesystem("s3").mkdir(name)
    return f"s3://{name}"


@pytest.fixture
def proxy(account: str, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Start a proxy in front of the server, and send every request through it."""
    with Proxy(account) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        end_sessions()
        yield proxy
        end_sessions()


def upload(folder: Path, url: str) -> str:
    """Copy a local folder to a URL. Returns the URL."""
    fs, root = fsspec.url_to_fs(url)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            fs.pipe_file(f"{root}/{path.relative_to(folder)}", path.read_bytes())
    return url


def names(url: str) -> list[str]:
    """Return the names of all files below a URL, relative to it."""
    fs, root = fsspec.url_to_fs(url, use_listings_cache=False)
    return [path[len(root) + 1 :] for path in fs.find(root, withdirs=False)]


def read(url: str) -> bytes:
    fs, path = fsspec.url_to_fs(url)
    return bytes(fs.cat_file(path))


def objects(url: str) -> dict[str, bytes]:
    """Return the content of all files below a URL, by their names relative to it."""
    return {name: read(f"{url}/{name}") for name in names(url)}
