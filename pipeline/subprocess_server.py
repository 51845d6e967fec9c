"""Run code that may abort in a separate process: hostile bytes can make C++ libraries end their process.

The child process is one of our modules. In a loop it reads a length (8 bytes) and that many bytes from standard input.
It answers each request with a line of JSON, in which `bytes` is the number of bytes that follow. It exits when its
standard input is closed.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

WRITE_SIZE = 1 << 20  # bytes per write


class Child:
    """The process `python -m MODULE ARGUMENT`. A request starts it if it is not running. Threads may share it."""

    def __init__(self, module: str, argument: str = "") -> None:
        self.command = [sys.executable, "-P", "-m", module, argument]
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.end()

    def ask(self, data: bytes, seconds: float) -> tuple[dict[str, Any], bytes]:
        """Send a request and return the answer. If the child dies or is too slow, end it and raise ChildProcessError.

        seconds: time limit of the request.
        """
        with self.lock:
            try:
                self.process = self.process or self._start()
                return self._exchange(self.process, data, time.monotonic() + seconds)
            except (OSError, EOFError, ValueError) as error:
                self.end()
                raise ChildProcessError(str(error)) from error

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # after an abort it has only messages of C++
            bufsize=0,
            env=make_environment(),
        )
        assert process.stdin is not None
        os.set_blocking(process.stdin.fileno(), False)  # a child that does not read must not block this process forever
        return process

    def _exchange(self, process: subprocess.Popen[bytes], data: bytes, end: float) -> tuple[dict[str, Any], bytes]:
        """Write a request and read its answer. end: deadline on the monotonic clock."""
        self._write(process, len(data).to_bytes(8, "little"), end)
        self._write(process, data, end)
        line = b""
        while not line.endswith(b"\n"):
            line += self._read(process, 1, end)
        answer = json.loads(line)
        return answer, bytes(self._read(process, answer.get("bytes", 0), end))

    def _write(self, process: subprocess.Popen[bytes], data: bytes, end: float) -> None:
        """Write all data to the child, as fast as it reads. Raises TimeoutError after `end`."""
        assert process.stdin is not None
        remaining = memoryview(data)
        while remaining:
            if not select.select([], [process.stdin], [], max(0.0, end - time.monotonic()))[1]:
                raise TimeoutError
            remaining = remaining[os.write(process.stdin.fileno(), remaining[:WRITE_SIZE]) :]

    def _read(self, process: subprocess.Popen[bytes], count: int, end: float) -> bytearray:
        """Read exactly `count` bytes of output. Raises EOFError if the child died, TimeoutError after `end`."""
        assert process.stdout is not None
        data = bytearray()
        while len(data) < count:
            if not select.select([process.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError
            chunk = process.stdout.read(count - len(data))
            if not chunk:
                raise EOFError
            data += chunk
        return data

    def end(self) -> None:
        """End the process if it is running."""
        if self.process is not None:
            self.process.kill()
            with contextlib.suppress(OSError):
                self.process.communicate()
            self.process = None


def make_environment() -> dict[str, str]:
    """Return the environment of a child process, with this package on its path."""
    root = str(Path(__file__).resolve().parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}


def limit_itself(memory: int | None = None) -> None:
    """Limit this process: it writes no core file, and takes at most `memory` bytes of memory.

    macOS does not enforce a memory limit. Windows has no `resource`, so importing this module must not need it.
    """
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory is not None and sys.platform != "darwin":
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


def serve(answer: Callable[[bytes], tuple[dict[str, Any], bytes]], seconds: int) -> None:
    """Answer requests until standard input is closed. seconds: limit per request; then the process ends itself."""
    while length := sys.stdin.buffer.read(8):
        data = sys.stdin.buffer.read(int.from_bytes(length, "little"))
        signal.alarm(seconds)  # in case the parent has died
        header, content = answer(data)
        sys.stdout.buffer.write(json.dumps({**header, "bytes": len(content)}).encode() + b"\n" + content)
        sys.stdout.buffer.flush()
        signal.alarm(0)
