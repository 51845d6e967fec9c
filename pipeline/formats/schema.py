"""What the files of a cache look like: the container, what is stored of a posterior, and the columns of a row."""

import base64
from dataclasses import dataclass

import pyarrow as pa

from latentmill.cache_info import PassthroughInfo
from pipeline.records import TEXT_EXTENSIONS, Container, Store

BASE_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.string()),
        ("latent", pa.binary()),
        ("shape", pa.list_(pa.field("element", pa.int32()))),
        ("dtype", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("original_height", pa.int32()),
        ("original_width", pa.int32()),
        ("crop_top", pa.int32()),
        ("crop_left", pa.int32()),
        ("flipped", pa.bool_()),
    ]
)
_PREFIX = "source_"


def cache_column_name(name: str) -> str:
    """What a column of a source is called in a cache: `source_` before a name that is ours, or is ours so prefixed."""
    return _PREFIX + name if _bare(name) in BASE_SCHEMA.names else name


def source_column_name(name: str) -> str:
    """What a passed-through column is called in its source."""
    return name.removeprefix(_PREFIX) if _bare(name) in BASE_SCHEMA.names else name


def _bare(name: str) -> str:
    while name.startswith(_PREFIX):
        name = name.removeprefix(_PREFIX)
    return name


@dataclass(frozen=True, slots=True)
class PassthroughColumns:
    """The passed-through columns.

    schema: their names in the cache, and their types; all may be null. texts: those that are text members of tars and
    files beside images, by their extension; from Parquet files come any.
    """

    schema: pa.Schema
    texts: tuple[str, ...] = TEXT_EXTENSIONS

    @property
    def from_parquet(self) -> pa.Schema:
        """Those that no text member holds."""
        return pa.schema([field for field in self.schema if field.name not in self.texts])

    def to_info(self) -> PassthroughInfo:
        """Return them as cache.json holds them: the schema as Arrow's own serialization, which knows every type."""
        return PassthroughInfo(
            texts=self.texts, arrow_schema=base64.b64encode(self.schema.serialize().to_pybytes()).decode()
        )

    @classmethod
    def from_info(cls, info: PassthroughInfo) -> "PassthroughColumns":
        """Return the columns that cache.json names."""
        return cls(info.read_schema(), info.texts)


TEXT_COLUMNS = PassthroughColumns(pa.schema([(name, pa.string()) for name in TEXT_EXTENSIONS]))


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputSchema:
    """What a part's writer must know."""

    container: Container = "parquet"
    store: Store = "mode"
    columns: PassthroughColumns = TEXT_COLUMNS
