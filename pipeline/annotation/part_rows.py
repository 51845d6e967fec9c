"""The keys of a part's rows, and the values that some of its columns have now."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from latentmill.canonical_json import VERIFY_HINT
from latentmill.error_text import describe_error
from latentmill.errors import LatentmillError
from latentmill.group_spans import GroupLimit
from latentmill.part_files import PARQUET_SUFFIX, open_parquet_file, read_webdataset_rows
from pipeline.cache.reader import Cache
from pipeline.errors import DamagedFileError


@dataclass(frozen=True, slots=True, eq=False)
class PartRows:
    """The rows of a part. groups: the rows of each of its row groups. rows: `key`, `shard`, and those asked for."""

    file: str
    groups: tuple[int, ...]
    rows: pa.Table


def read_part_rows(cache: Cache, file: str, schema: pa.Schema) -> PartRows:
    """Read a part without its latents. schema: further columns to read, of the cache or of its overlays.

    A part that an overlay does not cover has its own values of a column that the overlay replaces.
    A tar is read to its end. Its row groups are consecutive samples of one bucket, with at most 32 MiB of latents.
    Raises DamagedFileError if the file cannot be read.
    """
    providers = cache.overlays.providers
    later = [name for name in schema.names if name in providers and providers[name].find(file)]
    own = [name for name in schema.names if name not in later and name in cache.layout.columns.schema.names]
    try:
        with cache.folder.open(file) as stream:
            read = _read_parquet if file.endswith(PARQUET_SUFFIX) else _read_webdataset
            groups, rows = read(cache, stream, own, schema)
    except LatentmillError:
        raise
    except Exception as error:  # damaged bytes can make a library raise anything
        message = describe_error(error)
        raise DamagedFileError(f"{cache.folder.url_of(file)} is damaged: {message:.200}; {VERIFY_HINT}") from error
    if later:
        overlays = cache.overlays.read(file, later, 0, len(rows))
        for name in later:
            rows = rows.append_column(name, overlays[name].cast(schema.field(name).type))
    for name in sorted({*schema.names} - {*own, *later}):  # of a version that does not cover the part
        rows = rows.append_column(name, pa.nulls(len(rows), schema.field(name).type))
    return PartRows(file, tuple(groups), rows.select(["key", "shard", *schema.names]))


def _read_parquet(cache: Cache, stream: Any, names: Sequence[str], schema: pa.Schema) -> tuple[Sequence[int], pa.Table]:
    file = open_parquet_file(stream)
    table = file.read(columns=["key", "shard", *names], use_threads=False)
    groups = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
    return groups, table


def _read_webdataset(
    cache: Cache, stream: Any, names: Sequence[str], schema: pa.Schema
) -> tuple[Sequence[int], pa.Table]:
    columns = cache.info.columns
    values: dict[str, list[Any]] = {name: [] for name in ("key", "shard", *names)}
    groups, limit = list[int](), GroupLimit()
    for row in read_webdataset_rows(stream, None, columns.texts, columns.binary):
        latents = len(row["latent"]) + len(row.get("latent_flipped", b""))
        if limit.starts_group((row["height"], row["width"]), latents, others=0):
            groups.append(0)
        groups[-1] += 1
        for name, column in values.items():
            column.append(row.get(name))
    kinds = {"key": pa.string(), "shard": pa.string(), **{name: schema.field(name).type for name in names}}
    return groups, pa.table({name: pa.array(column, kinds[name]) for name, column in values.items()})


def is_exact_in_tars(kind: Any, name: str, cache: Cache) -> bool:
    """Whether the values of a column can be read again from the parts of a cache: in Parquet, those of all types.

    Tars have texts, which are exact, and JSON, which has neither times nor bytes.
    """
    if (
        cache.info.identity.container == "parquet"
        or name in cache.info.columns.texts
        or name in cache.overlays.providers
    ):
        return True
    inside = [kind.field(index).type for index in range(kind.num_fields)]
    if inside and not pa.types.is_map(kind):
        return all(is_exact_in_tars(inner, "", cache) for inner in inside)
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    return bool(is_number or pa.types.is_boolean(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind))
