"""Child processes that answer, hang or die; and systems without Python's `resource` module."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.subprocess_server import Child

ROOT = Path(__file__).parents[2]
LARGER_THAN_A_PIPE = bytes(4 << 20)

ECHO = """
from pipeline.subprocess_server import serve
serve(lambda data: ({"length": len(data)}, data), 60)
"""
NEVER_READS = """
import time
time.sleep(600)
"""


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Child]:
    """Return a child process that runs `echo.py` from the temporary folder."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Child("echo") as child:
        yield child


def write(folder: Path, program: str) -> None:
    (folder / "echo.py").write_text(program, encoding="utf-8")


def test_requests_and_answers_may_be_larger_than_a_pipe(child: Child, tmp_path: Path) -> None:
    write(tmp_path, ECHO)
    for data in (b"", b"x", os.urandom(5 << 20)):
        assert child.ask(data, 60) == ({"length": len(data), "bytes": len(data)}, data)


def test_a_child_that_never_reads_is_stopped_in_time(child: Child, tmp_path: Path) -> None:
    write(tmp_path, NEVER_READS)
    start = time.monotonic()
    with pytest.raises(ChildProcessError):
        child.ask(LARGER_THAN_A_PIPE, 1)
    assert time.monotonic() - start < 10
    assert child.process is None
    write(tmp_path, ECHO)
    assert child.ask(b"x", 60)[1] == b"x", "the lock is free, and a new child answers"


def test_a_child_that_stops_reading_halfway_is_stopped_in_time(child: Child, tmp_path: Path) -> None:
    write(tmp_path, ECHO)
    child.ask(b"x", 60)
    assert child.process is not None
    os.kill(child.process.pid, signal.SIGSTOP)
    start = time.monotonic()
    with pytest.raises(ChildProcessError):
        child.ask(LARGER_THAN_A_PIPE, 1)
    assert time.monotonic() - start < 10


def test_a_child_that_dies_during_a_request_is_an_error(child: Child, tmp_path: Path) -> None:
    write(tmp_path, "import sys; sys.stdin.buffer.read(100)")
    with pytest.raises(ChildProcessError):
        child.ask(LARGER_THAN_A_PIPE, 60)


@pytest.mark.slow
def test_modules_can_be_imported_without_pythons_resource_module() -> None:
    """Windows has no such module. The command reports what is supported, instead of a ModuleNotFoundError."""
    code = "import sys; sys.modules['resource'] = None; "
    code += "import pipeline.images.sandbox, pipeline.readers.parquet_footer, pipeline.flow"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=100)
