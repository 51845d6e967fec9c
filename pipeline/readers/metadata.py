"""Metadata of img2dataset: a Parquet file beside a tar, with further columns of the tar's samples."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import pyarrow as pa

from pipeline.errors import DamagedError, Rejected, ShardError
from pipeline.limits import Limits
from pipeline.readers.parquet import read_metadata
from pipeline.readers.skipped import NO_METADATA
from pipeline.records import Reject, Sample
from pipeline.storage import connection, reading


def read_tar_metadata(
    tar: str, options: Mapping[str, str], wanted: pa.Schema, limits: Limits, skipped: Counter[str] | None
) -> dict[str, dict[str, object]]:
    """Return the wanted columns by key from the metadata beside a tar; empty if there is no file, or no wanted column.

    skipped: receives 1 if the tar has no metadata although columns are wanted.
    Raises ShardError if the metadata are damaged, because the samples of the tar must not be rejected for that.
    """
    url = connection.sibling_url(tar)
    if not wanted.names:
        return {}
    if not connection.exists(url, options):
        if skipped is not None:
            skipped[NO_METADATA] += 1
        return {}
    try:
        with reading.open_stream(url, options, seeking=True) as stream:
            return read_metadata(stream, url, wanted, limits)
    except DamagedError as error:
        raise ShardError(
            f"{error}; repair or remove this metadata file (without it, {tar} is encoded without these columns)"
        ) from error


def merge_metadata(sample: Sample, more: Mapping[str, object]) -> Sample | Reject:
    """Return the sample with more columns, or a reject if one of the columns is a Rejected."""
    for value in more.values():
        if isinstance(value, Rejected):
            return Reject.from_error(sample.position, sample.key, value)
    return replace(sample, columns={**more, **sample.columns})
