"""Parts as rows of an Arrow table: the form in which the commit log stores them and the statistics read them.

A table takes a tenth of the memory of objects, and is summed up a thousand times faster.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import pyarrow as pa

from latentmill.group_spans import GroupSpan
from pipeline.cache.part_info import PartSummary
from pipeline.formats.part_record import BucketTally

CHANNEL_FIELDS = ("mean", "m2", "min", "max")
GROUP = pa.struct([(name, pa.int64() if name in ("start", "stop") else pa.int32()) for name in GroupSpan._fields])
# One row per part. The tally: one entry per bucket in `buckets`, `samples` and `values`, and one per bucket and channel
# in the others. A row without a file says that the rows of earlier files for its commit no longer count.
SCHEMA = pa.schema(
    [
        ("commit", pa.string()),
        ("file", pa.string()),
        ("bytes", pa.int64()),
        ("sha256", pa.binary(32)),
        ("groups", pa.list_(GROUP)),
        ("source", pa.string()),
        ("rows", pa.int64()),
        ("filtered", pa.map_(pa.string(), pa.int64())),
        ("enlarged", pa.int64()),
        ("rejects", pa.map_(pa.string(), pa.int64())),
        ("rests", pa.list_(pa.int64())),
        ("supersedes", pa.list_(pa.struct([("position", pa.int64()), ("reason", pa.string())]))),
        ("left_out", pa.list_(pa.string())),
        ("buckets", pa.list_(pa.string())),
        ("samples", pa.list_(pa.int64())),
        ("values", pa.list_(pa.int64())),
        *((name, pa.list_(pa.float64())) for name in CHANNEL_FIELDS),
        ("variance", pa.list_(pa.float64())),
    ]
)


def make_table(parts: Sequence[tuple[str, PartSummary]]) -> pa.Table:
    """Return parts as a table. parts: each with the name of its commit; "" if there is none.

    Raises ValueError if the lists of a tally differ in length.
    """
    tallies = [[part.tally[name] for name in part.tally] for _, part in parts]
    for bucket_tallies in tallies:
        check_lengths(bucket_tallies)
    summaries = [part for _, part in parts]
    columns: dict[str, Any] = {
        "commit": [commit for commit, _ in parts],
        "file": [part.file for part in summaries],
        "bytes": [part.bytes for part in summaries],
        "sha256": [bytes.fromhex(part.sha256) for part in summaries],
        "groups": [[group._asdict() for group in part.groups] for part in summaries],
        "source": [part.source for part in summaries],
        "rows": [part.rows for part in summaries],
        "filtered": [sorted(part.filtered.items()) for part in summaries],
        "enlarged": [part.enlarged for part in summaries],
        "rejects": [sorted(part.reject_counts.items()) for part in summaries],
        "rests": [list(part.rest_positions) for part in summaries],
        "supersedes": [
            [{"position": position, "reason": reason} for position, reason in part.supersedes] for part in summaries
        ],
        "left_out": [list(part.left_out) for part in summaries],
        "buckets": [list(part.tally) for part in summaries],
        **{name: [[getattr(tally, name) for tally in each] for each in tallies] for name in ("samples", "values")},
        **{name: [_join(each, name) for each in tallies] for name in CHANNEL_FIELDS},
        "variance": [_join(each, "variance") if each and each[0].variance else None for each in tallies],
    }
    return pa.table([pa.array(columns[field.name], field.type) for field in SCHEMA], schema=SCHEMA)


def check_lengths(tallies: Sequence[BucketTally]) -> None:
    """Raise ValueError unless each list of these tallies has the same number of channels."""
    lists = [getattr(tally, name) for tally in tallies for name in CHANNEL_FIELDS]
    variances = [tally.variance for tally in tallies]
    lists += [variance for variance in variances if variance is not None]
    if len({len(values) for values in lists}) > 1 or len({variance is None for variance in variances}) > 1:
        raise ValueError("the lists of a tally differ in length")


def _join(tallies: Sequence[BucketTally], name: str) -> list[float]:
    return list(chain.from_iterable(getattr(tally, name) for tally in tallies))


def make_removals(commits: Sequence[str]) -> pa.Table:
    """Return a table that says that earlier rows for these commits no longer count."""
    nulls = [pa.nulls(len(commits), field.type) for field in SCHEMA][1:]
    return pa.table([pa.array(commits, pa.string()), *nulls], schema=SCHEMA)


def parse_parts(table: pa.Table) -> Iterator[tuple[str, PartSummary]]:
    """Yield the parts in a table, each with the name of its commit. Rows without a file are left out."""
    for row in table.to_pylist():
        if row["file"] is not None:
            yield row["commit"], _parse_part(row)


def _parse_part(row: Mapping[str, Any]) -> PartSummary:
    return PartSummary(
        file=row["file"],
        bytes=row["bytes"],
        sha256=row["sha256"].hex(),
        groups=[GroupSpan(**group) for group in row["groups"]],
        source=row["source"],
        rows=row["rows"],
        filtered=dict(row["filtered"]),
        enlarged=row["enlarged"],
        reject_counts=dict(row["rejects"]),
        rest_positions=row["rests"],
        supersedes=[(entry["position"], entry["reason"]) for entry in row["supersedes"]],
        left_out=row["left_out"],
        tally=dict(_parse_tallies(row)),
    )


def _parse_tallies(row: Mapping[str, Any]) -> Iterator[tuple[str, BucketTally]]:
    channels = len(row["mean"]) // max(1, len(row["buckets"]))
    for number, bucket in enumerate(row["buckets"]):
        of_bucket = slice(number * channels, (number + 1) * channels)
        yield (
            bucket,
            BucketTally(
                samples=row["samples"][number],
                values=row["values"][number],
                **{name: row[name][of_bucket] for name in CHANNEL_FIELDS},
                variance=row["variance"][of_bucket] if row["variance"] is not None else None,
            ),
        )
