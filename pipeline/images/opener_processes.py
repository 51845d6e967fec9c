"""Open images in separate processes, because the interpreter's lock lets threads decode little more than one alone.

    thread of a worker --(bytes: shared memory; length, shard, key: socket)--> opener process
                       <--(pixels: shared memory; sizes: socket)--

A thread takes an idle opener, sends it an image, and waits for its pixels. If the opener dies or is too slow, another
one replaces it. Its image is opened once more, in a process with limits (`sandbox`), which decides whether the image is
rejected. So a crash costs neither the worker nor another image.

The openers are forks of one process that has imported the libraries (`main`). They end when the worker ends.
"""

import contextlib
import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import LifoQueue
from typing import Any

import numpy as np
import torch

from pipeline.images.fit import Fit
from pipeline.images.prepare import OpenedImage, make_opener, open_in_sandbox
from pipeline.images.transform import Transform
from pipeline.limits import Limits
from pipeline.subprocess_server import limit_itself, make_environment

COMMAND = f"from {__name__} import main; main()"  # not -m, because then its classes would be those of __main__
# glibc keeps the memory of freed images for the next ones. Mapping it again takes a quarter of the time of an image.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
IS_SUPPORTED = hasattr(os, "fork")
MEMORY_BYTES = 16 << 20  # of the shared memory per opener; the operating system provides only what is used of it
START_SECONDS = 120  # for importing the libraries on a busy machine
PATIENCE = 3  # times the time limit of an image; the sandbox, which rejects it, is stricter


@dataclass(frozen=True, slots=True)
class _Request:
    """An image file: the first `length` bytes of the shared memory."""

    length: int
    shard: str
    key: str


@dataclass(frozen=True, slots=True)
class _Opened:
    """An opened image. shape: [H, W, 3] of the pixels at the start of the shared memory."""

    shape: tuple[int, ...]
    original_height: int
    original_width: int
    fit: Fit
    truncated: bool | None


_Answer = _Opened | Exception  # to a request; the worker raises the exception


class OpenerProcesses:
    """A number of processes that open images. Threads share it. The processes start at once, and are soon ready."""

    def __init__(self, count: int, transform: Transform, limits: Limits) -> None:
        self.limits = limits
        self.open_here = make_opener(transform, limits)
        self.transform = transform
        self._server = _Server(transform, limits)
        self._idle = LifoQueue[_OpenerProcess | None]()  # the most recent one first; its memory is still cached
        for _ in range(count):
            self._idle.put(self._server.start_opener())

    def open_image(self, data: bytes, shard: str, key: str) -> OpenedImage:
        """Open an image. See `prepare.Opener`."""
        opener = self._idle.get()
        try:
            opener = opener or self._server.start_opener()
            if len(data) > len(opener.memory):
                return self.open_here(data, shard, key)
            return opener.open_image(data, shard, key)
        except (OSError, EOFError):
            if opener is not None:
                opener.end()
            opener = None  # the next image starts another one
        finally:
            self._idle.put(opener)
        return open_in_sandbox(self.transform, self.limits, data, shard, key)

    def list_pids(self) -> list[int]:
        """Return the process ids of the openers that are ready and idle, for tests and messages."""
        return [opener.pid for opener in list(self._idle.queue) if opener is not None and opener.pid]


class _OpenerProcess:
    """The worker's side of an opener. One thread at a time uses it."""

    def __init__(self, connection: Connection, memory: mmap.mmap, seconds: float) -> None:
        self.connection, self.memory, self.seconds = connection, memory, seconds
        self.pid = 0  # known once it is ready

    def open_image(self, data: bytes, shard: str, key: str) -> OpenedImage:
        """Open an image in the process. Raises OSError or EOFError if the process died or takes too long."""
        self.pid = self.pid or int(self._receive(START_SECONDS))
        self.memory[: len(data)] = data
        self.connection.send(_Request(len(data), shard, key))
        answer: _Answer = self._receive(self.seconds)
        if isinstance(answer, Exception):
            raise answer
        pixels = np.frombuffer(self.memory, np.uint8, int(np.prod(answer.shape))).reshape(answer.shape).copy()
        size = answer.original_height, answer.original_width
        return OpenedImage(torch.from_numpy(pixels), *size, answer.fit, answer.truncated)

    def _receive(self, seconds: float) -> Any:
        if not self.connection.poll(seconds):
            raise TimeoutError
        return self.connection.recv()

    def end(self) -> None:
        """End the process."""
        if self.pid:
            with contextlib.suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)
        self.connection.close()


class _Server:
    """The process that forks the openers. If it died, another one is started."""

    def __init__(self, transform: Transform, limits: Limits) -> None:
        self.settings = pickle.dumps((transform, limits)).hex()
        self.seconds = PATIENCE * limits.seconds
        self.size = max(MEMORY_BYTES, 3 * transform.max_pixels)
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self.process: subprocess.Popen[bytes] | None = None

    def start_opener(self) -> _OpenerProcess:
        """Return a new opener. Raises OSError if there is no memory for it."""
        ours, theirs = socket.socketpair()
        memory, file = make_shared_memory(self.size)
        with theirs, self._lock:
            try:
                self._send(theirs.fileno(), file)
            except OSError:  # the process died
                self._socket = None
                self._send(theirs.fileno(), file)
            finally:
                os.close(file)
        return _OpenerProcess(Connection(ours.detach()), memory, self.seconds)

    def _send(self, *files: int) -> None:
        if self._socket is None:
            self._socket = self._start()
        socket.send_fds(self._socket, [b"."], files)

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", COMMAND, str(theirs.fileno()), str(self.size), self.settings],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**make_environment(), **ENVIRONMENT},
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a terminal's Ctrl-C is for the job
            )
        weakref.finalize(self, _end_server, ours, self.process)
        return ours


def _end_server(connection: socket.socket, process: "subprocess.Popen[bytes]") -> None:
    connection.close()
    process.kill()
    process.wait()


def make_shared_memory(size: int) -> tuple[mmap.mmap, int]:
    """Return memory of `size` bytes without a name, and a file descriptor of it, which the caller closes.

    /dev/shm is not used: in a container it often has only 64 MB.
    """
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("latentmill-opener")
    else:
        with tempfile.TemporaryFile() as temporary:
            file = os.dup(temporary.fileno())
    os.ftruncate(file, size)
    return mmap.mmap(file, size), file


def main() -> None:
    """Run the process that forks the openers: one for each pair of a socket and a shared memory that it receives."""
    with socket.socket(fileno=int(sys.argv[1])) as worker:
        size = int(sys.argv[2])
        transform, limits = pickle.loads(bytes.fromhex(sys.argv[3]))
        limit_itself()
        torch.set_num_threads(1)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so the operating system forgets openers that died
        while True:
            message, files, _, _ = socket.recv_fds(worker, 1, 2)
            if not message:  # the worker ended
                return
            connection, file = files
            if os.fork() == 0:
                worker.close()
                serve(Connection(connection), mmap.mmap(file, size), transform, limits)
                os._exit(0)
            os.close(connection)
            os.close(file)


def serve(connection: Connection, memory: mmap.mmap, transform: Transform, limits: Limits) -> None:
    """Open images until the worker closes the connection."""
    opener = make_opener(transform, limits)
    with contextlib.suppress(OSError, EOFError):
        connection.send(os.getpid())
        while True:
            request: _Request = connection.recv()
            answer: _Answer
            try:
                answer = _write_pixels(opener(memory[: request.length], request.shard, request.key), memory)
            except Exception as error:  # a Rejected, a FilteredOut, or an error that fails the unit
                answer = error
            connection.send(answer)


def _write_pixels(opened: OpenedImage, memory: mmap.mmap) -> _Opened:
    pixels = opened.pixels.numpy()
    np.frombuffer(memory, np.uint8, pixels.size).reshape(pixels.shape)[:] = pixels
    return _Opened(pixels.shape, opened.original_height, opened.original_width, opened.fit, opened.truncated)
