"""img2dataset's metadata: a Parquet file beside a tar, with further columns of its samples."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import pyarrow as pa

from pipeline.errors import DamagedError, Rejected, ShardError
from pipeline.limits import Limits
from pipeline.readers.parquet import read_metadata
from pipeline.records import Reject, Sample
from pipeline.storage import store

NO_METADATA = "tars without metadata"


def read_tar_metadata(
    tar: str, options: Mapping[str, str], wanted: pa.Schema, limits: Limits, passed: Counter[str] | None
) -> dict[str, dict[str, object]]:
    """The wanted columns by key from the metadata beside a tar; none if there is none, or none are wanted.

    passed: a tar without metadata of which columns are wanted is counted there.
    Raises ShardError if the metadata are damaged: the samples of the tar must not be rejected for it.
    """
    url = store.sibling_url(tar)
    if not wanted.names:
        return {}
    if not store.exists(url, options):
        if passed is not None:
            passed[NO_METADATA] += 1
        return {}
    try:
        with store.open_stream(url, options, seeking=True) as stream:
            return read_metadata(stream, url, wanted, limits)
    except DamagedError as error:
        raise ShardError(f"{error}; mend it, or move it away: {tar} goes without its columns then") from error


def merge_metadata(sample: Sample, more: Mapping[str, object]) -> Sample | Reject:
    """The sample with more columns; a reject if one of them is."""
    for value in more.values():
        if isinstance(value, Rejected):
            return Reject.of(sample.position, sample.key, value)
    return replace(sample, columns={**more, **sample.columns})
