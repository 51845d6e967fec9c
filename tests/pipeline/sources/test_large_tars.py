"""Which tars are divided, and what storage errors do."""

import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest

from pipeline.errors import StorageError
from pipeline.records import ListedFile
from pipeline.sources import large_tars
from pipeline.sources.large_tars import divide_large_tars
from pipeline.storage import reading
from tests.listed_files import list_source_files
from tests.pipeline.readers.test_tar import tar

LARGE = tar({f"{n:03}.jpg": b"i" * 700 for n in range(100)})
SMALL = tar({"0.jpg": b"i"})


@pytest.fixture
def files(root: str, monkeypatch: pytest.MonkeyPatch) -> list[ListedFile]:
    """Write two large tars, a small one, and another large file."""
    monkeypatch.setattr(large_tars, "LARGE_TAR_BYTES", len(SMALL))
    monkeypatch.setattr(large_tars, "TAR_RANGE_BYTES", len(LARGE) // 4)
    fs, path = fsspec.url_to_fs(f"{root}/s")
    fs.makedirs(path)
    for name, data in {"0.tar": LARGE, "1.tar": SMALL, "2.tar": LARGE, "3.zip": LARGE}.items():
        fs.pipe_file(f"{path}/{name}", data)
    return list_source_files((f"{root}/s",), {}, "nowhere")


def fail(may_pass: bool) -> Callable[..., bytes]:
    def read_range(url: str, *_: object) -> bytes:
        raise StorageError(f"cannot read {url}", may_pass=may_pass)

    return read_range


def test_large_tars_are_divided(files: list[ListedFile]) -> None:
    boundaries = divide_large_tars(files, {})
    assert list(boundaries) == ["s/0.tar", "s/2.tar"]
    assert boundaries["s/0.tar"] == boundaries["s/2.tar"]
    assert len(boundaries["s/0.tar"]) in (3, 4)


def test_a_tar_that_cannot_be_read_stays_whole_unless_the_error_may_pass(
    files: list[ListedFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its unit then says why. An outage must not decide for ever that a tar stays whole."""
    monkeypatch.setattr(reading, "read_range", fail(may_pass=False))
    assert divide_large_tars(files, {}) == {}
    monkeypatch.setattr(reading, "read_range", fail(may_pass=True))
    with pytest.raises(StorageError, match=r"0\.tar"):
        divide_large_tars(files, {})


def test_a_range_of_bytes_is_read_in_full_or_not_at_all(files: list[ListedFile]) -> None:
    url = files[0].url
    assert reading.read_range(url, {}, 512, 1212) == b"i" * 700
    with pytest.raises(StorageError, match="only 10 of the 20 bytes from byte"):
        reading.read_range(url, {}, len(LARGE) - 10, len(LARGE) + 10)
    with pytest.raises(StorageError, match="no such file"):
        reading.read_range(f"{url}x", {}, 0, 1)


@pytest.fixture(params=[True, False], ids=["ranges", "whole files"])
def web(request: pytest.FixtureRequest) -> Iterator[ListedFile]:
    """Serve a large tar, by a server that delivers ranges or does not."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if request.param else None
            start, stop = (int(match[1]), int(match[2]) + 1) if match else (0, len(LARGE))
            self.send_response(206 if match else 200)
            if match:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(LARGE)}")
            self.send_header("Accept-Ranges", "bytes" if request.param else "none")
            self.send_header("Content-Length", str(stop - start))
            self.end_headers()
            if with_body:
                middle = (start + stop) // 2  # the client may get the first piece alone
                self.wfile.write(LARGE[start:middle])
                time.sleep(0.05)
                self.wfile.write(LARGE[middle:stop])

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    root = f"http://127.0.0.1:{server.server_port}"
    yield ListedFile(root=root, path="s/0.tar", bytes=len(LARGE), etag="")
    server.shutdown()
    server.server_close()


def test_a_tar_on_a_web_server_is_divided_if_the_server_delivers_ranges(
    web: ListedFile, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(large_tars, "LARGE_TAR_BYTES", len(SMALL))
    monkeypatch.setattr(large_tars, "TAR_RANGE_BYTES", len(LARGE) // 4)
    has_ranges = "whole" not in request.node.name
    assert list(divide_large_tars([web], {})) == (["s/0.tar"] if has_ranges else [])
