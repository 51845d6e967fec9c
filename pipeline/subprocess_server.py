"""A process of its own for what may end a process: libraries in C++ that hostile bytes lead to an abort.

A program of ours reads on standard input a length (8 bytes) and so many bytes, again and again, and answers each with a
line of JSON, in which `bytes` says how many bytes follow. It ends with its standard input.
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

WRITE_AT_ONCE = 1 << 20  # bytes


class Child:
    """`python -m MODULE ARGUMENT`, started when it is first asked and again when it has died. Threads may share it."""

    def __init__(self, module: str, argument: str = "") -> None:
        self.command = [sys.executable, "-P", "-m", module, argument]
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.end()

    def ask(self, data: bytes, seconds: float) -> tuple[dict[str, Any], bytes]:
        """Its answer. Raises ChildProcessError where it died of the question, or took too long; then it is ended."""
        with self.lock:
            try:
                self.process = self.process or self._start()
                return self._exchange(self.process, data, time.monotonic() + seconds)
            except (OSError, EOFError, ValueError) as error:
                self.end()
                raise ChildProcessError(str(error)) from error

    def _start(self) -> subprocess.Popen[bytes]:
        root = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path}
        process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # its last words are C++'s
            bufsize=0,
            env=environment,
        )
        assert process.stdin is not None
        os.set_blocking(process.stdin.fileno(), False)  # a child that does not read must not hold us for ever
        return process

    def _exchange(self, process: subprocess.Popen[bytes], data: bytes, end: float) -> tuple[dict[str, Any], bytes]:
        self._write(process, len(data).to_bytes(8, "little"), end)
        self._write(process, data, end)
        line = b""
        while not line.endswith(b"\n"):
            line += self._read(process, 1, end)
        answer = json.loads(line)
        return answer, bytes(self._read(process, answer.get("bytes", 0), end))

    def _write(self, process: subprocess.Popen[bytes], data: bytes, end: float) -> None:
        """All of this to its input, as it takes it. Raises TimeoutError after the end."""
        assert process.stdin is not None
        left = memoryview(data)
        while left:
            if not select.select([], [process.stdin], [], max(0.0, end - time.monotonic()))[1]:
                raise TimeoutError
            left = left[os.write(process.stdin.fileno(), left[:WRITE_AT_ONCE]) :]

    def _read(self, process: subprocess.Popen[bytes], count: int, end: float) -> bytearray:
        """Exactly so many bytes of its output. Raises EOFError where it died, TimeoutError after the end."""
        assert process.stdout is not None
        found = bytearray()
        while len(found) < count:
            if not select.select([process.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError
            some = process.stdout.read(count - len(found))
            if not some:
                raise EOFError
            found += some
        return found

    def end(self) -> None:
        """End the process, if there is one."""
        if self.process is not None:
            self.process.kill()
            with contextlib.suppress(OSError):
                self.process.communicate()
            self.process = None


def limit_itself(memory: int | None = None) -> None:
    """Bound this process: it leaves no core file, and takes so many bytes of memory at most.

    macOS does not bound a process's memory. (Windows has no `resource`: importing this module must not need it.)
    """
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory is not None and sys.platform != "darwin":
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


def serve(answer: Callable[[bytes], tuple[dict[str, Any], bytes]], seconds: int) -> None:
    """What such a program does until there are no more questions. seconds: for each; then it ends by itself."""
    while length := sys.stdin.buffer.read(8):
        data = sys.stdin.buffer.read(int.from_bytes(length, "little"))
        signal.alarm(seconds)  # for a parent that has died
        said, content = answer(data)
        sys.stdout.buffer.write(json.dumps({**said, "bytes": len(content)}).encode() + b"\n" + content)
        sys.stdout.buffer.flush()
        signal.alarm(0)
