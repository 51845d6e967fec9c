"""Open images on other machines as well, if this one has too few cores for its GPUs.

    thread of a worker --> a free local opener
                       --> otherwise a queue --(blocks of image files)--> remote opener --(blocks of pixels)--> thread

Only remote openers that are ready take images from the queue, so no image waits for a machine that is still to start.
The number of images on their way is bounded by the number of threads. If a remote opener is lost, the images of its
blocks are opened again here, in a process with limits.
"""

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Protocol

from pipeline.images.prepare import OpenedImage, Opener, open_in_sandbox
from pipeline.images.transform import Transform
from pipeline.limits import Limits

MAX_BLOCK_IMAGES = 16
MAX_BLOCK_BYTES = 16 << 20  # of pixels
CALLS_PER_OPENER = 2  # so that one block is on its way while another is opened

ImageFile = tuple[bytes, str, str]  # the arguments of an `Opener`
Result = OpenedImage | Exception


class RemoteOpener(Protocol):
    """A process on another machine. Threads share it. Its methods raise ConnectionError if it was lost."""

    def wait_until_ready(self) -> None:
        """Wait until it runs, also after it was lost."""
        ...

    def open_images(self, block: Sequence[ImageFile]) -> Sequence[Result]:
        """Open a block of images. Returns what an `Opener` returns or raises, in the same order."""
        ...


class RemoteOpeners(Protocol):
    """The remote openers of a worker, before they are started."""

    @property
    def count(self) -> int:
        """The number of processes."""
        ...

    def start(self, transform: Transform, limits: Limits) -> Sequence[RemoteOpener]:
        """Start them, and return at once."""
        ...


class LocalAndRemoteOpeners:
    """Opens images with the local opener while fewer than `local_count` threads do, and remotely otherwise."""

    def __init__(
        self, local: Opener, local_count: int, remote: Sequence[RemoteOpener], transform: Transform, limits: Limits
    ) -> None:
        self.local, self.transform, self.limits = local, transform, limits
        self.block_images = count_block_images(transform)
        self._local_places = threading.Semaphore(local_count)
        self._queue = SimpleQueue[tuple[ImageFile, Future[Result]]]()
        self._lock = threading.Lock()
        self._ready = 0  # calls that take images from the queue
        for opener in remote:
            for _ in range(CALLS_PER_OPENER):
                threading.Thread(target=self._serve, args=[opener], name="remote open", daemon=True).start()

    def open_image(self, data: bytes, shard: str, key: str) -> OpenedImage:
        """Open an image. See `prepare.Opener`."""
        if not self._local_places.acquire(blocking=False):
            if future := self._enqueue((data, shard, key)):
                try:
                    result = future.result()
                except ConnectionError:
                    return open_in_sandbox(self.transform, self.limits, data, shard, key)
                if isinstance(result, Exception):
                    raise result
                return result
            self._local_places.acquire()
        try:
            return self.local(data, shard, key)
        finally:
            self._local_places.release()

    def _enqueue(self, file: ImageFile) -> Future[Result] | None:
        """Return the future result of an image, or None if no remote opener is ready."""
        with self._lock:
            if not self._ready:
                return None
            future = Future[Result]()
            self._queue.put((file, future))
            return future

    def _serve(self, opener: RemoteOpener) -> None:
        """Send blocks to a remote opener. Runs in a thread per call."""
        while True:
            try:
                opener.wait_until_ready()
            except ConnectionError:
                continue
            with self._lock:
                self._ready += 1
            try:
                while True:
                    self._open_block(opener)
            except ConnectionError as error:
                self._lose_call(error)

    def _open_block(self, opener: RemoteOpener) -> None:
        block = [self._queue.get()]
        while len(block) < self.block_images:
            try:
                block.append(self._queue.get_nowait())
            except Empty:
                break
        try:
            results = opener.open_images([file for file, _ in block])
        except Exception as error:  # it is raised in the threads that wait
            for _, future in block:
                future.set_exception(error)
            if isinstance(error, ConnectionError):
                raise
            return
        for (_, future), result in zip(block, results, strict=True):
            future.set_result(result)

    def _lose_call(self, error: ConnectionError) -> None:
        """Record that a call ended. If it was the last one, nobody would take the images that wait."""
        with self._lock:
            self._ready -= 1
            while not self._ready:
                try:
                    self._queue.get_nowait()[1].set_exception(error)
                except Empty:
                    return


def count_block_images(transform: Transform) -> int:
    """Return the number of images that are sent at once."""
    return max(1, min(MAX_BLOCK_IMAGES, MAX_BLOCK_BYTES // (3 * transform.max_pixels)))


def count_images_in_flight(openers: RemoteOpeners | None, transform: Transform) -> int:
    """Return how many images are opened remotely at the same time, in as many threads."""
    return openers.count * CALLS_PER_OPENER * count_block_images(transform) if openers else 0
