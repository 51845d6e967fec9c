"""Check the files at the root of a cache that follow from its parts: the statistics, the card and the index."""

from collections.abc import Iterator, Sequence

import pyarrow as pa

from latentmill.part_files import open_parquet_file
from pipeline.cache import card, index, runs, stats
from pipeline.cache.part_info import PartInfo
from pipeline.cache.reader import Cache
from pipeline.canonical_json import REBUILD_HINT
from pipeline.maintenance.verify_part import Problem
from pipeline.storage.folder import Folder

REWRITE = "run the encode command again, which writes it again"


def check_statistics(cache: Cache, parts: Sequence[PartInfo]) -> Iterator[Problem]:
    """Compare stats.json and README.md with the statistics of the parts."""
    expected = stats.summarize_parts(part.summary for part in parts)
    data = cache.folder.read_if_exists(stats.NAME)
    if data is None:
        yield Problem(stats.NAME, "it is missing: no run has ended yet", REWRITE)
        return
    if data != stats.encode_stats(expected):
        yield Problem(stats.NAME, "it differs from the statistics of the records", REWRITE)
    written = cache.folder.read_if_exists(card.NAME)
    versions_of_runs = [run.get("versions") for run in runs.read_runs(cache.folder).values()]
    versions = {str(entry.get("latentmill")) for entry in versions_of_runs if isinstance(entry, dict)}
    with_rows = sum(part.record.rows > 0 for part in parts)
    if written not in [card.render_card(cache, expected, version, with_rows) for version in versions]:
        yield Problem(card.NAME, "it differs from the card of this cache", REWRITE)


def check_index(cache: Cache, parts: Sequence[PartInfo]) -> Iterator[Problem]:
    """Compare index.parquet and wids-meta.json with the parts."""
    summaries = [part.summary for part in parts]
    digest = stats.summarize_parts(summaries)["digest"]
    expected, expected_wids = index.encode_parts(summaries, digest)
    data = cache.folder.read_if_exists(index.NAME)
    if data is None:
        yield Problem(index.NAME, "it is missing", REBUILD_HINT)
    elif data != expected and not _is_of_another_version(data, expected):
        yield Problem(index.NAME, "it differs from the parts", REBUILD_HINT)
    if cache.layout.container == "webdataset" and cache.folder.read_if_exists(index.WIDS_NAME) != expected_wids:
        yield Problem(index.WIDS_NAME, "it is missing, or differs from the parts", REBUILD_HINT)


def _is_of_another_version(data: bytes, expected: bytes) -> bool:
    """Return whether an index has the expected rows and metadata, but was written by another version of pyarrow."""
    try:
        files = [open_parquet_file(pa.BufferReader(each)) for each in (data, expected)]
        versions = [file.metadata.created_by for file in files]
        contents = [(file.read(use_threads=False), file.metadata.metadata) for file in files]
    except Exception:  # damaged bytes can make Arrow raise anything
        return False
    return versions[0] != versions[1] and contents[0] == contents[1]


def drop_index(folder: Folder) -> None:
    """Empty the index, so that the next end of a run writes it again, with the other files that depend on it."""
    folder.replace(index.NAME, b"")
