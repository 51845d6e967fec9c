"""One sha256 over the samples that a part was made from: the `inputs` of its record. See docs/cache-format.md.

Each sample has its own digest, which the threads that open images compute. `inputs` is the sha256 over the digests in
the order of the positions.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pipeline.canonical_json import canonical_json
from pipeline.errors import SourceError
from pipeline.formats.part_record import PartRecord
from pipeline.records import Reject, Sample
from pipeline.values import to_json_value

DIGEST_BYTES = 32  # the size of a sha256


def hash_sample(item: Sample | Reject) -> bytes:
    """Return the digest of a sample as it was read, or of a reject."""
    if isinstance(item, Reject):
        return _hash_fields("reject", str(item.position), item.reason)
    columns = ((name, encode_value(item.columns[name])) for name in sorted(item.columns))
    fields = [field for name, value in columns if value is not None for field in (name, value)]
    shard = [item.shard] if item.shard else []
    return _hash_fields("sample", str(item.position), *shard, item.key, item.image, *fields)


def encode_value(value: Any) -> bytes | None:
    """Return a column's value as in latent.json, but a string without its quotes. Returns None for a null."""
    json_value = to_json_value(value)
    if isinstance(json_value, str):
        return json_value.encode()
    if json_value is None and not isinstance(value, float):  # JSON has null for NaN, too, which is not a null value
        return None
    return canonical_json(json_value)


def combine_digests(digests: Iterable[bytes]) -> str:
    """Return the `inputs` of a part. digests: the digests of its samples, in the order of their positions."""
    return hashlib.sha256(b"".join(digests)).hexdigest()


def hash_record(record: PartRecord, digests: bytes | bytearray) -> str:
    """Return the `inputs` that this part would have with the samples that its input has now.

    digests: the digests of these samples, one after the other from position 0 on. For a rejected sample, the recorded
    reject counts instead: the sample may have been repaired since, other limits may accept it now, and the rest of a
    damaged shard cannot be read.
    """
    rejected = {reject.position: hash_sample(reject) for reject in record.rejects}
    return combine_digests(
        rejected.get(p, bytes(digests[DIGEST_BYTES * p : DIGEST_BYTES * (p + 1)])) for p in record.positions
    )


def check_inputs(
    items: Iterator[Sample | Reject], records: Sequence[PartRecord], url: str
) -> Iterator[Sample | Reject]:
    """Yield the same items, and compare them with a unit's records on the way.

    Raises SourceError as soon as all samples of a part were read, if the part was made from other samples.
    """
    digests, unchecked = bytearray(), sorted(records, key=_end)
    for item in items:
        while unchecked and item.position >= _end(unchecked[0]):
            _check(unchecked.pop(0), digests, url)
        digests += hash_sample(item) if unchecked else b""
        yield item
    for record in unchecked:
        _check(record, digests, url)


def _end(record: PartRecord) -> int:
    """Return the position after the last sample of a part."""
    return max(record.sample_positions, default=-1) + 1


def _check(record: PartRecord, digests: bytearray, url: str) -> None:
    if hash_record(record, digests) != record.inputs:
        raise SourceError(
            f"{url} has changed since it was planned, and not only where it was damaged: {record.stem} was made from "
            "other samples; give the --input-limit that it was encoded with, or encode it into another cache"
        )


def _hash_fields(*fields: str | bytes) -> bytes:
    """Return the sha256 over the fields, each preceded by its length in eight bytes, big-endian."""
    sha = hashlib.sha256()
    for field in fields:
        data = field.encode() if isinstance(field, str) else field
        sha.update(len(data).to_bytes(8, "big"))
        sha.update(data)
    return sha.digest()
