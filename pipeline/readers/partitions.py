"""Columns that the folders of a Parquet or an Arrow file represent, as Hive, Spark and pyarrow write them."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from urllib.parse import unquote

import pyarrow as pa

from pipeline.formats.schema import to_cache_name
from pipeline.records import Reject, Sample, path_below_root
from pipeline.text import to_valid_text

_NULL = "__HIVE_DEFAULT_PARTITION__"


def parse_partitions(path: str) -> dict[str, str | None]:
    """Return the columns in the folders of a file, by their names in a cache: `split=train/` is the text `train`.

    path: of the file, with the name of its source. All values are text, because the values in other folders are not
    known. Characters are percent-encoded.
    """
    columns: dict[str, str | None] = {}
    for folder in path_below_root(path).split("/")[:-1]:
        name, equals, value = folder.partition("=")
        if name and equals:
            columns[to_cache_name(_decode(name))] = None if value == _NULL else _decode(value)
    return columns


def add_partitions(samples: Iterable[Sample | Reject], path: str, wanted: pa.Schema) -> Iterator[Sample | Reject]:
    """Yield the same samples with the wanted columns that the folders of their file represent.

    A column inside the file takes precedence.
    """
    columns = {name: value for name, value in parse_partitions(path).items() if name in wanted.names}
    for sample in samples:
        if columns and isinstance(sample, Sample):
            yield replace(sample, columns={**columns, **sample.columns})
        else:
            yield sample


def _decode(text: str) -> str:
    return to_valid_text(unquote(text, errors="surrogateescape"))
