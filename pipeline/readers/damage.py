"""What is believed of a damaged shard, and what is left of it to be read.

A damage is believed where the file came whole, and a second look, by another worker where there is one, finds it at the
same byte. Until then it is an error of whoever read it.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import BinaryIO

from pipeline.errors import REST_OF_SHARD, DamagedError, Rejected, ShardError
from pipeline.records import Filtered, PreparedImage, Reject, Sample

AT_ONCE = 1 << 20  # bytes of what is read past
RETRIED = "it was rejected when it was first read; a part that latentmill retry wrote has it"


def read_past_damage(
    samples: Iterator[Sample | Reject], stream: BinaryIO, on_piece: Callable[[], None]
) -> Iterator[Sample | Reject]:
    """The same samples. Before a DamagedError goes on, the file is read from the damage to its end.

    The stream raises StorageError where that does not come. on_piece: called after each piece.
    """
    try:
        yield from samples
    except DamagedError as error:
        stream.seek(error.at or 0)
        while stream.read(AT_ONCE):
            on_piece()
        raise


def until_damage(samples: Iterator[Sample | Reject], at: int | None, damage: list[str]) -> Iterator[Sample | Reject]:
    """The same samples; where the shard is damaged, one reject in place of all that cannot be read or counted.

    at: the byte at which it was found damaged before. A damage at another one, or at none, is raised.
    damage: the error is put in there.
    """
    position = 0
    try:
        for sample in samples:
            position = sample.position + 1
            yield sample
    except DamagedError as error:
        if at is None or error.at != at:
            raise
        damage.append(str(error))
        yield reject_rest(position)


def reject_rest(position: int) -> Reject:
    """The reject that stands for all samples from here on."""
    return Reject.of(position, "", Rejected("read", REST_OF_SHARD))


def reject_missing_rest(url: str, position: int, damage: list[str]) -> Reject:
    """The reject for the rest behind parts that stand, where they have more samples than are there before a damage.

    Raises ShardError where there is none: then the shard is another one.
    """
    if not damage:
        raise ShardError(f"{url} has fewer samples than the parts that were made of it")
    return reject_rest(position)


def before_retried_rest(samples: Iterator[Sample | Reject], superseded: Mapping[int, str]) -> Iterator[Sample | Reject]:
    """The samples in front of a rest that parts of `retry` have, and one reject for it.

    superseded: what they have, as reasons by position.
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
    """What became of a sample; where a part of `retry` has it, a reject as it was, so that no sample is in two parts.

    reason: why it was rejected before; None where no such part has it.
    """
    if reason is None or (isinstance(item, Reject) and item.reason in (reason, REST_OF_SHARD)):
        return item
    return Reject(sample.position, sample.key, "open", reason, RETRIED)
