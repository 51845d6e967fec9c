"""Damaged shards: which damage is accepted as the file's own, and which samples remain readable.

A damage is accepted if the whole file was delivered, and if a second attempt finds it at the same byte. The second
attempt runs on another worker if there is one. Until then the damage counts as an error of the worker that read it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import BinaryIO

from pipeline.errors import REST_OF_SHARD, DamagedError, Rejected, ShardError
from pipeline.records import Filtered, PreparedImage, Reject, Sample

PIECE = 1 << 20  # bytes per read after the damage
RETRIED = "the sample was rejected at first; it is now in a part that latentmill retry wrote"


def read_past_damage(
    samples: Iterator[Sample | Reject], stream: BinaryIO, on_piece: Callable[[], None], stop: int | None = None
) -> Iterator[Sample | Reject]:
    """Yield the same samples. After a DamagedError, read the file from the damage to its end, then raise the error.

    The stream raises StorageError if that rest is not delivered in full. on_piece: called after each piece.
    stop: the byte at which the unit's range of the file ends; None for the end of the file.
    """
    try:
        yield from samples
    except DamagedError as error:
        stream.seek(min(error.at or 0, stream.tell()))  # of a compressed file, the damage is at a byte of its content
        while (stop is None or stream.tell() < stop) and stream.read(PIECE):
            on_piece()
        raise


class ReadableSamples:
    """The samples of a shard up to an accepted damage, then one reject for all that cannot be read or counted.

    damaged_at: the byte at which an earlier attempt found the shard damaged. A damage at another byte, or at an unknown
    one, is raised. damage: the accepted error, once iteration has reached it; until then empty.
    """

    def __init__(self, samples: Iterator[Sample | Reject], damaged_at: int | None) -> None:
        self._samples = samples
        self._damaged_at = damaged_at
        self.damage = ""

    def __iter__(self) -> Iterator[Sample | Reject]:
        position = 0
        try:
            for sample in self._samples:
                position = sample.position + 1
                yield sample
        except DamagedError as error:
            if self._damaged_at is None or error.at != self._damaged_at:
                raise
            self.damage = str(error)
            yield reject_rest(position)


def reject_rest(position: int) -> Reject:
    """Return the reject for all samples from this position on."""
    return Reject.from_error(position, "", Rejected("read", REST_OF_SHARD))


def reject_missing_rest(url: str, position: int, damage: str) -> Reject:
    """Return the reject for the rest of a shard whose existing parts have more samples than can be read now.

    damage: the accepted damage. Raises ShardError if it is empty, because the shard is then another one.
    """
    if not damage:
        raise ShardError(
            f"{url} has fewer samples than the parts that were made of it; restore the file that they were made of"
        )
    return reject_rest(position)


def cut_at_retried_rest(samples: Iterable[Sample | Reject], superseded: Mapping[int, str]) -> Iterator[Sample | Reject]:
    """Yield the samples before a rest that retry parts contain, and one reject for that rest.

    superseded: by position, the reject reasons of the samples in those parts.
    """
    rest = min((position for position, reason in superseded.items() if reason == REST_OF_SHARD), default=None)
    for sample in samples:
        if rest is not None and sample.position >= rest:
            yield reject_rest(rest)
            return
        yield sample


def keep_rejected(
    sample: Sample | Reject, item: PreparedImage | Reject | Filtered, reason: str | None
) -> PreparedImage | Reject | Filtered:
    """Return the result of a sample, or its earlier reject if a part of `retry` has it. So no sample is in two parts.

    reason: why the sample was rejected before; None if no part of `retry` has it.
    """
    if reason is None or (isinstance(item, Reject) and item.reason in (reason, REST_OF_SHARD)):
        return item
    return Reject(sample.position, sample.key, "open", reason, RETRIED, sample.shard)
