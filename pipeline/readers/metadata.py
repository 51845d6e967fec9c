"""Tables with further columns of samples: img2dataset's beside a tar, and others beside images or tars.

A table is in the folder of its images or tars or above it, and is named `metadata.jsonl` or the like. The nearest one
counts. img2dataset's table of the images in the folder `00000` is `00000.parquet` beside it.
"""

from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import replace
from typing import Any

import pyarrow as pa

from pipeline.errors import DamagedError, Rejected, ShardError
from pipeline.limits import Limits
from pipeline.readers.image_files import get_folder, unpack_metadata
from pipeline.readers.parquet import KEY, read_metadata
from pipeline.readers.skipped import NO_METADATA, NO_ROW
from pipeline.readers.table import NameRule, Table, find_path_column, load_table, normalize_paths
from pipeline.readers.table_rows import convert_rows
from pipeline.records import Reject, Sample, Unit, is_image, join_url, path_below_root, stem
from pipeline.storage import connection, reading

LABEL_TABLE = "dataset.json"  # of EDM2
METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet", LABEL_TABLE)
KEY_RULE = NameRule("keys", lambda schema: KEY if KEY in schema.names else None, lambda keys: keys)


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
            return Reject.from_error(sample.position, sample.key, value, sample.shard)
    own = {name: value for name, value in sample.columns.items() if value is not None}
    return replace(sample, columns={**sample.columns, **more, **own})


def find_metadata(path: str, tables: Container[str]) -> str | None:
    """Return the path of the nearest table of an image or a tar; None if there is none."""
    folder = get_folder(path)
    if is_image(path) and (own := f"{folder[:-1]}.parquet") in tables:
        return own
    while folder:
        for name in METADATA_NAMES:
            if folder + name in tables:
                return folder + name
        folder = get_folder(folder[:-1])
    return None


def make_rule(table: str, image_column: str | None) -> NameRule:
    """Return how the rows of a table of images are named. image_column: the column with their paths, if it exists."""
    if table.rpartition("/")[2] not in METADATA_NAMES:
        return KEY_RULE
    return NameRule(f"paths {image_column}", lambda schema: find_path_column(schema, image_column), normalize_paths)


def name_in_table(image: str, table: str) -> str:
    """Return the name of an image's row: its path below the folder of the table, or its key for img2dataset."""
    if table.rpartition("/")[2] in METADATA_NAMES:
        return image[len(get_folder(table)) :]
    return stem(image[len(get_folder(image)) :])


class MetadataReader:
    """Adds the columns of a unit's tables to its samples.

    wanted: the columns to copy. is_pinned: raise ChangedError if a table differs from the plan.
    skipped: receives the number of samples of a tar that have no row.
    """

    def __init__(
        self,
        unit: Unit,
        options: Mapping[str, Any],
        wanted: pa.Schema,
        limits: Limits,
        encoding: str,
        image_column: str | None,
        is_pinned: bool = True,
        skipped: Counter[str] | None = None,
    ) -> None:
        self.unit, self.wanted, self.skipped = unit, wanted, Counter[str]() if skipped is None else skipped
        self.tables: dict[str, Table] = {}
        self.of_images = unit.kind == "folder"
        for planned in unpack_metadata(unit):
            rule = make_rule(planned.path, image_column) if self.of_images else KEY_RULE
            url = join_url(unit.root, path_below_root(planned.path))
            self.tables[planned.path] = load_table(url, options, planned if is_pinned else None, rule, limits, encoding)

    def add_columns(self, sample: Sample | Reject) -> Sample | Reject:
        """Return a sample with the columns of its row, or a reject if one of them is not text."""
        if isinstance(sample, Reject) or not self.tables:
            return sample
        path = self.unit.paths[sample.position] if self.of_images else sample.shard or self.unit.path
        nearest = find_metadata(path, self.tables)
        if nearest is None:
            return sample
        table = self.tables[nearest]
        row = table.find(name_in_table(path, nearest) if self.of_images else sample.key)
        if row is None:
            self.skipped[NO_ROW] += not self.of_images
            return sample
        (columns,) = convert_rows(table.rows.slice(row, 1), self.wanted, nearest)
        return merge_metadata(sample, columns)
