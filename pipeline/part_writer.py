"""The way of a unit's samples from the reader to its parts.

    read_part: read --> threads of the pool: open --> UnitQueue --> device --> PartBuffer --> UnitWriter: publish

Nothing here waits for a single image. A part is published as soon as all its samples have a result.
"""

import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Protocol

from pipeline.buffers import LatentBuffer, return_freed_memory
from pipeline.cache import input_hash, tally
from pipeline.cache.identity import FORMAT
from pipeline.cache.part_info import PartInfo
from pipeline.device_loop import DeviceLoop, UnitQueue
from pipeline.errors import Rejected, ShardError
from pipeline.formats.part_record import PartRecord
from pipeline.formats.schema import OutputSchema
from pipeline.images.prepare import Opener, prepare_sample
from pipeline.images.transform import Transform
from pipeline.limits import Limits, check_share
from pipeline.readers.damage import keep_rejected
from pipeline.readers.tar_group import LeftOutTars
from pipeline.records import EncodedImage, Filtered, PreparedImage, Reject, Row, Sample, Unit
from pipeline.storage.folder import Folder
from pipeline.timing import StageTimer


class PartSpec(Protocol):
    """The settings of a job that decide how a part is made."""

    @property
    def cache(self) -> Folder: ...
    @property
    def identity_sha256(self) -> str: ...
    @property
    def transform(self) -> Transform: ...
    @property
    def layout(self) -> OutputSchema: ...
    @property
    def limits(self) -> Limits: ...
    @property
    def rows_per_part(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """The threads that samples pass through: those that open images, and that of the device. Units share them.

    opener: opens an image file. stop: set when the job is to stop.
    """

    pool: ThreadPoolExecutor
    loop: DeviceLoop
    stop: threading.Event
    opener: Opener


@dataclass(slots=True, eq=False)
class PartBuffer:
    """The results of the samples of one part, in the order in which they arrive from several threads.

    rows: with their latents in memory of the buffer's own, so that those of a whole batch can be freed.
    digests: the digest of each sample as it was read, by position.
    expected: the number of samples that were read so far. is_read: whether these are all.
    """

    rows: list[Row] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    filtered: Counter[str] = field(default_factory=Counter)
    fp32_fallbacks: int = 0
    digests: dict[int, bytes] = field(default_factory=dict)
    expected: int = 0
    is_read: bool = False
    _latents: LatentBuffer = field(default_factory=LatentBuffer)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, item: Reject | Filtered) -> None:
        """Add the result of a sample without a latent."""
        with self._lock:
            if isinstance(item, Reject):
                self.rejects.append(item)
            else:
                self.filtered[item.filter] += 1

    def add_encoded(self, image: PreparedImage, encoded: EncodedImage) -> None:
        """Add the model's result for an image."""
        if isinstance(encoded.latent, Rejected):
            self.add(Reject.from_error(image.position, image.key, encoded.latent, image.shard))
            return
        with self._lock:
            self.rows.append(Row(image.drop_pixels(), *self._latents.add(encoded.latents)))
            self.fp32_fallbacks += encoded.is_fallback

    def sort(self) -> None:
        """Sort the rows by bucket, then by position, and the rejects by position. No results are added after that."""
        self._latents.close()
        self.rows.sort(key=lambda row: (row.image.bucket, row.image.position))
        self.rejects.sort(key=lambda reject: reject.position)

    def take_rows(self) -> Iterator[Row]:
        """Yield the rows, and remove each, so that its memory is freed once the caller drops it."""
        self.rows.reverse()
        while self.rows:
            yield self.rows.pop()

    def clear(self) -> None:
        """Free the rows' memory. The traceback of an error can refer to the buffer for long."""
        self._latents.close()
        self.rows.clear()

    @property
    def digests_in_order(self) -> list[bytes]:
        """The digest of each sample, or of its reject if it was rejected, in the reader or in any later step."""
        digests = self.digests | {reject.position: input_hash.hash_sample(reject) for reject in self.rejects}
        return [digests[position] for position in sorted(digests)]

    @property
    def samples(self) -> int:
        """The number of samples that have a result: encoded, rejected and filtered."""
        return len(self.rows) + len(self.rejects) + self.filtered.total()

    @property
    def is_complete(self) -> bool:
        """Whether every sample of the part has its result."""
        return self.is_read and self.samples == self.expected


class UnitWriter:
    """The parts of a unit, in their order. New parts are published by a thread, one after the other.

    publish: creates the file of a part with this record and these rows (`UnitParts.publish`).
    left_out: of a group of tars, those that are left out, as far as its tars were read.
    The unit takes a place among those that are read when its first missing part is read.
    """

    def __init__(
        self,
        unit: Unit,
        spec: PartSpec,
        stages: Stages,
        timer: StageTimer,
        superseded: Mapping[int, str],
        publish: Callable[[PartRecord, Iterable[Row]], PartInfo],
        left_out: LeftOutTars,
    ) -> None:
        self.publish, self.left_out = publish, left_out
        self.unit, self.spec, self.stages, self.timer, self.superseded = unit, spec, stages, timer, superseded
        self.parts: list[PartInfo] = []
        self.adopted = self.encoded = self.fp32_fallbacks = 0
        self.texts: Counter[str] = Counter()
        self._buffers: list[PartBuffer] = []  # of the parts that are read or published
        self._publishing: deque[Future[PartInfo]] = deque()
        self._is_read = self._is_misaligned = False
        self._queue: UnitQueue | None = None
        self._stack = ExitStack()
        self._publisher = self._stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="publish"))

    def __enter__(self) -> "UnitWriter":
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is not None:
            with self._pause():  # parts whose samples were read need not be encoded again
                wait(self._publishing)
        self._stack.close()
        for buffer in self._buffers:
            buffer.clear()
        if self._queue is not None:
            self.timer.add(**asdict(self._queue.seconds))

    def adopt(self, part: PartInfo) -> None:
        """Add a part that exists."""
        future = Future[PartInfo]()
        future.set_result(part)
        self._publishing.append(future)
        self.adopted += 1
        self._is_read = part.record.last

    def read_part(self, number: int, samples: Iterable[Sample | Reject], is_done: Callable[[], bool]) -> None:
        """Read the samples of a part. It is encoded and published meanwhile. is_done: whether no samples follow."""
        if self._queue is None:
            self._queue = self._stack.enter_context(self.stages.loop.unit(self.unit.name, self.stages.stop))
        buffer = PartBuffer()
        self._buffers.append(buffer)
        read_part(buffer, self.unit, samples, self.spec, self.stages, self._queue, self.timer, self.superseded)
        self._is_read = is_done()
        end = math.inf if self._is_read else (number + 1) * self.spec.rows_per_part
        left_out = self.left_out.list_before(end)
        self._publishing.append(
            self._publisher.submit(self._publish, number, buffer, self._queue, self._is_read, left_out)
        )

    def has_last_part(self) -> bool:
        """Return whether the last part exists. Waits for all parts read so far, but for one if more follow."""
        if self._is_read and self._queue is not None:
            self._queue.end_reading()
        while len(self._publishing) > (not self._is_read) and not self._is_complete:
            future = self._publishing.popleft()
            with nullcontext() if future.done() else self._pause():
                self.parts.append(future.result())
        return self._is_complete

    def _pause(self) -> AbstractContextManager[None]:
        return self._queue.paused() if self._queue is not None else nullcontext()

    @property
    def _is_complete(self) -> bool:
        return bool(self.parts) and self.parts[-1].record.last

    def _publish(
        self, number: int, buffer: PartBuffer, queue: UnitQueue, is_last: bool, left_out: tuple[str, ...]
    ) -> PartInfo:
        queue.wait(lambda: buffer.is_complete)
        if self._is_misaligned:  # by the part before this one, whose error is raised
            raise ShardError(f"part {number} of {self.unit.name} has other positions than the parts before it")
        buffer.sort()
        self.encoded += len(buffer.rows)
        self.fp32_fallbacks += buffer.fp32_fallbacks
        self.texts.update(tally.count_texts(buffer.rows, self.spec.layout.columns.texts))
        record = make_record(self.unit, number, buffer, is_last, self.spec, left_out)
        with self.timer.stage("write"):
            return_freed_memory()  # a part takes most memory now
            part = self.publish(record, buffer.take_rows())
        self._is_misaligned = part.record.left_out != left_out
        check_left_out(part.record, left_out)
        self._buffers.remove(buffer)
        return part


def fill_part(
    unit: Unit,
    samples: Iterable[Sample | Reject],
    spec: PartSpec,
    stages: Stages,
    timer: StageTimer,
    superseded: Mapping[int, str],
) -> PartBuffer:
    """Read the samples of one part, and wait for their results. The rows are sorted by bucket, then by position."""
    buffer = PartBuffer()
    try:
        with stages.loop.unit(unit.name, stages.stop) as queue:
            read_part(buffer, unit, samples, spec, stages, queue, timer, superseded)
            queue.end_reading()
            queue.wait(lambda: buffer.is_complete)
    except BaseException:
        buffer.clear()
        raise
    timer.add(**asdict(queue.seconds))
    buffer.sort()
    return buffer


def read_part(
    buffer: PartBuffer,
    unit: Unit,
    samples: Iterable[Sample | Reject],
    spec: PartSpec,
    stages: Stages,
    queue: UnitQueue,
    timer: StageTimer,
    superseded: Mapping[int, str],
) -> None:
    """Read the samples of one part. Their results arrive in the buffer later.

    superseded: by position, the reject reasons of samples that are in a part of `retry`.
    """
    for sample in samples:
        queue.admit()
        buffer.expected += 1
        reason = superseded.get(sample.position)
        stages.pool.submit(open_sample, unit, sample, spec, stages, queue, buffer, timer, reason)
    buffer.is_read = True


def open_sample(
    unit: Unit,
    sample: Sample | Reject,
    spec: PartSpec,
    stages: Stages,
    queue: UnitQueue,
    buffer: PartBuffer,
    timer: StageTimer,
    reason: str | None,
) -> None:
    """Open a sample, and pass it on to the device, or its reject to the buffer. Called in the threads of a pool.

    reason: why the sample was rejected before, if it is in a part of `retry`.
    """
    try:
        if queue.error is not None:
            queue.drop()
            return
        with timer.stage("open"):
            item = prepare_sample(unit, sample, spec.limits, stages.opener)
        buffer.digests[sample.position] = input_hash.hash_sample(sample)
        try:
            check_share(item.columns if isinstance(item, PreparedImage) else {}, spec.rows_per_part, spec.limits)
        except Rejected as error:
            item = Reject.from_error(sample.position, sample.key, error, sample.shard)
        item = keep_rejected(sample, item, reason)
    except BaseException as error:
        queue.fail(error)
        queue.drop()
        return
    if isinstance(item, PreparedImage):
        queue.put(item, partial(buffer.add_encoded, item))
    else:
        buffer.add(item)
        queue.drop()


def check_left_out(record: PartRecord, left_out: tuple[str, ...]) -> None:
    """Raise ShardError if another writer left out other tars of a group before the end of this part.

    Then the positions differ. The next attempt leaves out the tars that the existing parts leave out.
    """
    if record.left_out != left_out:
        raise ShardError(f"another run wrote {record.stem} without some tars that this one reads, or with others")


def make_record(
    unit: Unit, number: int, buffer: PartBuffer, last: bool, spec: PartSpec, left_out: tuple[str, ...] = ()
) -> PartRecord:
    """Return the record of a part. number: of the part, from 0. last: whether it ends the unit.

    left_out: the tars of a group that are left out before the end of the part.
    """
    return PartRecord(
        format=FORMAT,
        identity=spec.identity_sha256,
        unit=unit.name,
        part=number,
        last=last,
        source=unit.path,
        source_bytes=unit.bytes,
        range=unit.range,
        first=number * spec.rows_per_part,
        samples=buffer.samples,
        rows=len(buffer.rows),
        filtered=dict(sorted(buffer.filtered.items())),
        enlarged=sum(row.image.enlarged for row in buffer.rows),
        inputs=input_hash.combine_digests(buffer.digests_in_order),
        rejects=tuple(buffer.rejects),
        tally=tally.tally_rows(buffer.rows, spec.layout.store),
        left_out=left_out,
    )
