"""Equal latents in a whole cache, by their hashes. A sample of a large cache seldom has both rows of a pair."""

import hashlib

import numpy as np

from latentmill.loading.index import Index, read_index
from latentmill.loading.layout import LatentLayout
from latentmill.loading.row_groups import GroupReader
from pipeline.cache.reader import Cache
from pipeline.report.findings import MAX_EXAMPLES, Example, Finding
from pipeline.report.sample_findings import DUPLICATE_SHARE
from pipeline.wording import count_noun

SCAN_BYTES = 4 << 30  # of a cache that is read as a whole


def find_equal_rows(cache: Cache) -> list[Finding]:
    """Return a finding if rows have equal latents. A cache of more than 4 GiB is not read: then there is none."""
    index = read_index(cache)
    if int((index.stop - index.start).sum()) > SCAN_BYTES:
        return []
    hashes = hash_rows(cache, index)
    order = np.argsort(hashes, kind="stable")
    is_copy = np.concatenate([[False], hashes[order[1:]] == hashes[order[:-1]]])
    copies = int(is_copy.sum())
    if copies <= DUPLICATE_SHARE * len(hashes):
        return []
    shown = np.flatnonzero(is_copy)[:MAX_EXAMPLES]
    pairs = [(int(order[place - 1]), int(order[place])) for place in shown]
    sentence = (
        f"{copies:,} of {count_noun(len(hashes), 'row')} ({copies / len(hashes):.1%}) have the latent of another row."
    )
    examples = tuple(describe_pair(cache, index, *sorted(pair)) for pair in pairs)
    return [Finding(code="duplicates", severity="warning", sentence=sentence, examples=examples)]


def hash_rows(cache: Cache, index: Index) -> np.ndarray:
    """Return a hash of each row's latent, uint64 [N]."""
    layout, reader = LatentLayout.from_info(cache.info), GroupReader(cache, index)
    hashes = np.zeros(index.row_count, np.uint64)
    for group, start in enumerate(index.starts.tolist()):
        rows = reader.read(group)
        size = layout.array_bytes(rows.bucket)
        digests = (
            hashlib.blake2b(rows.data[at : at + size], digest_size=8).digest() for at in rows.offsets[0].tolist()
        )
        values = np.frombuffer(b"".join(digests), "<u8")
        hashes[start : start + len(values)] = values
    return hashes


def describe_pair(cache: Cache, index: Index, first: int, second: int) -> Example:
    """Return two rows of equal latents as an example. first, second: their numbers in the cache."""
    places = tuple(locate(index, row) for row in (first, second))
    original, copy = (next(iter(cache.rows(file, ["key", "shard"], [number]))) for file, number in places)
    return Example(
        key=copy["key"],
        shard=copy["shard"],
        remark=f"like {original['key']} in {original['shard']}",
        places=places,
    )


def locate(index: Index, row: int) -> tuple[str, int]:
    """Return the file of a row and its index in the file."""
    group = int(index.find_groups(row))
    first = int(np.searchsorted(index.file, index.file[group]))
    return index.files[index.file[group]], row - int(index.starts[first])
