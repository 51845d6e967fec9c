"""What a part was made from, as one sha256: the `inputs` of its record. docs/cache-format.md has the rule in words.

Each sample has a digest of its own, which the threads that open images make; `inputs` is the sha256 over them in order.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pipeline.canonical_json import canonical_json
from pipeline.errors import SourceError
from pipeline.formats.record import Record
from pipeline.records import Reject, Sample
from pipeline.values import to_json_value

DIGEST_BYTES = 32  # bytes of a digest


def hash_sample(item: Sample | Reject) -> bytes:
    """The digest of a sample as it was read, or of one that was rejected."""
    if isinstance(item, Reject):
        return _sha256("reject", str(item.position), item.reason)
    columns = ((name, encode_value(item.columns[name])) for name in sorted(item.columns))
    named = [part for name, value in columns if value is not None for part in (name, value)]
    return _sha256("sample", str(item.position), item.key, item.image, *named)


def encode_value(value: Any) -> bytes | None:
    """A column's value as latent.json has it, of a string what is in it; None of a null."""
    said = to_json_value(value)
    if isinstance(said, str):
        return said.encode()
    if said is None and not isinstance(value, float):  # a number that is not finite is no null
        return None
    return canonical_json(said)


def combine_digests(digests: Iterable[bytes]) -> str:
    """`inputs` of a part, from its samples' digests in the order of their positions."""
    return hashlib.sha256(b"".join(digests)).hexdigest()


def hash_record(record: Record, found: bytes | bytearray) -> str:
    """What `inputs` of this part would be by the samples that a unit's input has now.

    found: their digests, one after the other from position 0 on. What the record rejected is taken as it was recorded:
    it may have been mended since, other limits may let it pass now, and a damaged shard's rest cannot be read at all.
    """
    rejected = {reject.position: hash_sample(reject) for reject in record.rejects}
    return combine_digests(
        rejected.get(p, bytes(found[DIGEST_BYTES * p : DIGEST_BYTES * (p + 1)])) for p in record.positions
    )


def check_inputs(items: Iterator[Sample | Reject], records: Sequence[Record], url: str) -> Iterator[Sample | Reject]:
    """The same items. Raises SourceError before the first one that follows a part which was made from other ones.

    records: of a unit's parts.
    """
    found, left = bytearray(), sorted(records, key=_end)
    for item in items:
        while left and item.position >= _end(left[0]):
            _check(left.pop(0), found, url)
        found += hash_sample(item) if left else b""
        yield item
    for record in left:
        _check(record, found, url)


def _end(record: Record) -> int:
    """The position after the last sample of a part."""
    return max(record.sample_positions, default=-1) + 1


def _check(record: Record, found: bytearray, url: str) -> None:
    if hash_record(record, found) != record.inputs:
        raise SourceError(
            f"{url} has changed since it was planned, and not in its damage alone: {record.stem} was made from "
            "other samples; give the --input-limit that it was encoded with, or encode it into another cache"
        )


def _sha256(*fields: str | bytes) -> bytes:
    """Over the fields, each after its length as eight bytes, the highest first."""
    sha = hashlib.sha256()
    for field in fields:
        data = field.encode() if isinstance(field, str) else field
        sha.update(len(data).to_bytes(8, "big"))
        sha.update(data)
    return sha.digest()
