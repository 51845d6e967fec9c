"""The layout of a cache's files: the container, the stored form of a posterior, and the columns of a row."""

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
        ("resized_height", pa.int32()),
        ("resized_width", pa.int32()),
        ("crop_top", pa.int32()),
        ("crop_left", pa.int32()),
        ("flipped", pa.bool_()),
    ]
)
LATENT_FLIPPED = pa.field("latent_flipped", pa.binary())
TRUNCATED = pa.field("truncated", pa.bool_())
RESERVED_NAMES = frozenset({*BASE_SCHEMA.names, LATENT_FLIPPED.name, TRUNCATED.name})
_PREFIX = "source_"


def to_cache_name(name: str) -> str:
    """Return the name in the cache of a source's column. `source_` precedes names of our columns, prefixed or not."""
    return _PREFIX + name if _strip_prefixes(name) in RESERVED_NAMES else name


def to_source_name(name: str) -> str:
    """Return the name in its source of a column of the cache."""
    return name.removeprefix(_PREFIX) if _strip_prefixes(name) in RESERVED_NAMES else name


def _strip_prefixes(name: str) -> str:
    while name.startswith(_PREFIX):
        name = name.removeprefix(_PREFIX)
    return name


@dataclass(frozen=True, slots=True)
class PassthroughColumns:
    """The columns that are copied from the sources.

    schema: their names in the cache, and their types; all may be null. texts: the names of the columns that can come
    from members of tars and zips, and from text files beside images. They are text, or bytes if their type is binary.
    Parquet and Arrow files can have any column.
    """

    schema: pa.Schema
    texts: tuple[str, ...] = TEXT_EXTENSIONS

    @property
    def binary(self) -> frozenset[str]:
        """Those of `texts` that are bytes, such as further images of a sample."""
        return frozenset(name for name in self.texts if pa.types.is_binary(self.schema.field(name).type))

    @property
    def from_parquet(self) -> pa.Schema:
        """The columns that can come only from Parquet files."""
        return pa.schema([field for field in self.schema if field.name not in self.texts])

    def to_info(self) -> PassthroughInfo:
        """Return the entry of cache.json. The schema is serialized by Arrow, which supports every type."""
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
    """The layout of a cache's files, as the writers of parts need it.

    has_flipped: whether rows have LATENT_FLIPPED (`--flip both`). has_truncated: whether rows have TRUNCATED.
    """

    container: Container = "parquet"
    store: Store = "mode"
    columns: PassthroughColumns = TEXT_COLUMNS
    has_flipped: bool = False
    has_truncated: bool = False

    @property
    def latent_names(self) -> tuple[str, ...]:
        """The columns of a row that hold latents."""
        return ("latent", LATENT_FLIPPED.name) if self.has_flipped else ("latent",)

    @property
    def base_schema(self) -> pa.Schema:
        """The columns of a row that are not copied from the sources."""
        after_latent = BASE_SCHEMA.get_field_index("latent") + 1
        schema = BASE_SCHEMA.insert(after_latent, LATENT_FLIPPED) if self.has_flipped else BASE_SCHEMA
        return schema.append(TRUNCATED) if self.has_truncated else schema
