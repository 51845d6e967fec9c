"""Pictures opened by a process of its own: for a unit whose worker died, where one of its pictures may be the reason.

A picture that ends this process, that takes it too long or too much memory, is rejected by name; a new process opens
the next one. Normally pictures are opened by threads of the worker (`pipeline.flow`), which cannot be stopped.

As a program it is that process: on standard input a length (8 bytes) and an encoded picture, again and again; on
standard output a line of JSON for each, `{"shape": [H, W]}` and then the pixels, or `{"rejected": [STAGE, ...]}`.
"""

import contextlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

import numpy as np

from pipeline.errors import Rejected
from pipeline.limits import Limits
from pipeline.pixels import open_pixels


class Opener:
    """Opens pictures as `pixels.open_pixels` does, in a process of its own. Threads may share it."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Opener":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()

    def open_pixels(self, data: bytes, limits: Limits) -> np.ndarray:
        """An encoded picture as RGB uint8 [H, W, 3]. Raises Rejected, `unsafe` for what ends the process."""
        with self.lock:
            self.process = self.process or self._start()
            try:
                return self._ask(self.process, data)
            except (OSError, EOFError, ValueError):
                self._end()
                raise Rejected("open", "unsafe", limits.seconds, limits.memory) from None

    def _start(self) -> subprocess.Popen[bytes]:
        root = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-P", "-m", "pipeline.careful", json.dumps(asdict(self.limits))]
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env={**os.environ, "PYTHONPATH": path}
        )

    def _ask(self, process: subprocess.Popen[bytes], data: bytes) -> np.ndarray:
        assert process.stdin is not None
        end = time.monotonic() + self.limits.seconds
        process.stdin.write(len(data).to_bytes(8, "little"))
        for start in range(0, len(data), 1 << 20):
            process.stdin.write(data[start : start + (1 << 20)])
        line = b""
        while not line.endswith(b"\n"):
            line += self._read(process, 1, end)
        answer = json.loads(line)
        if "rejected" in answer:
            raise Rejected(*answer["rejected"])
        height, width = answer["shape"]
        return np.frombuffer(self._read(process, height * width * 3, end), np.uint8).reshape(height, width, 3)

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

    def _end(self) -> None:
        if self.process is not None:
            self.process.kill()
            with contextlib.suppress(OSError):
                self.process.communicate()
            self.process = None


def main() -> None:
    """Open what comes until there is no more. Ends by itself where one picture takes too long."""
    limits = Limits(**json.loads(sys.argv[1]))
    resource.setrlimit(resource.RLIMIT_AS, (limits.memory, limits.memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while length := sys.stdin.buffer.read(8):
        data = sys.stdin.buffer.read(int.from_bytes(length, "little"))
        signal.alarm(limits.seconds + 5)  # for a parent that has died
        try:
            pixels = open_pixels(data, limits)
            answer, content = {"shape": list(pixels.shape[:2])}, pixels.tobytes()
        except Rejected as why:
            answer, content = {"rejected": [why.stage, why.reason, *why.numbers]}, b""
        except MemoryError:
            answer, content = {"rejected": ["open", "unsafe", limits.seconds, limits.memory]}, b""
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n" + content)
        sys.stdout.buffer.flush()
        signal.alarm(0)


if __name__ == "__main__":
    main()
