"""Read the samples of one unit, whatever its kind: a file, a range of a file, or images of a folder."""

from collections import Counter
from collections.abc import Callable, Container, Generator, Iterator, Mapping
from typing import Protocol

from latentmill.cache_info import SourceRules
from pipeline.errors import ShardError
from pipeline.formats.schema import OutputSchema
from pipeline.limits import Limits
from pipeline.readers import parquet_keys
from pipeline.readers.arrow import read_arrow
from pipeline.readers.damage import (
    read_past_damage,
)
from pipeline.readers.folder import read_folder_unit
from pipeline.readers.labels import Labels
from pipeline.readers.manifest import read_manifest_unit
from pipeline.readers.members import Wanted
from pipeline.readers.metadata import MetadataReader, merge_metadata, read_tar_metadata
from pipeline.readers.parquet import read_parquet
from pipeline.readers.partitions import add_partitions
from pipeline.readers.tar import read_tar
from pipeline.readers.tar_boundaries import unpack_range
from pipeline.readers.tar_group import LeftOutTars, read_tar_group
from pipeline.readers.zip import read_zip
from pipeline.records import TAR_GROUP, Reject, Sample, Unit
from pipeline.storage import reading


class ReadSpec(Protocol):
    """The settings of a job that decide how a unit is read."""

    @property
    def source_options(self) -> Mapping[str, str]: ...
    @property
    def layout(self) -> OutputSchema: ...
    @property
    def image_column(self) -> str | None: ...
    @property
    def key_column(self) -> str | None: ...
    @property
    def source_rules(self) -> SourceRules: ...
    @property
    def limits(self) -> Limits: ...
    @property
    def superseded(self) -> Mapping[str, Mapping[int, str]]: ...


def read_samples(
    unit: Unit,
    spec: ReadSpec,
    skipped: Counter[str] | None = None,
    on_piece: Callable[[], None] = lambda: None,
    may_differ: Container[int] | None = None,
    with_images: bool = True,
    left_out: LeftOutTars | None = None,
    on_offset: Callable[[int], None] | None = None,
) -> Generator[Sample | Reject, None, None]:
    """Yield the samples of a unit, in reading order. Nothing is opened before the first sample is requested.

    skipped: receives the number of inputs that are not part of a sample, by kind.
    on_piece: called after each piece of the bytes that follow damage. A DamagedError is raised after the last piece.
    may_differ: positions at which the files of a folder may differ from the plan; default: positions that a retry has.
    If it is given, or a retry has any, tables of metadata may differ, too.
    with_images: if not, images that are files of their own are not read: they have no bytes.
    left_out: the tars that a group leaves out; default: those of `unit.left_out`, and all others must be readable.
    on_offset: called for each member of a tar, with its first byte. Of a compressed tar, this is approximate.
    Raises ShardError if this version cannot read the kind of unit, and the errors of the readers.
    """
    options, columns, encoding = spec.source_options, spec.layout.columns, spec.source_rules.text_encoding
    wanted = Wanted(columns.texts, spec.image_column, columns.binary, encoding)
    is_pinned = may_differ is None and unit.name not in spec.superseded
    more = MetadataReader(unit, options, columns.schema, spec.limits, encoding, spec.image_column, is_pinned, skipped)
    if unit.kind == "tar":
        yield from map(more.add_columns, read_single_tar(unit, spec, wanted, skipped, on_piece, on_offset))
    elif unit.kind == TAR_GROUP:
        samples = read_tar_group(unit, options, wanted, spec.limits, more.skipped, left_out or LeftOutTars())
        yield from map(more.add_columns, samples)
    elif unit.kind == "zip":
        with reading.open_stream(unit.url, options, unit, seeking=True) as stream:
            samples = read_zip(stream, unit.url, unit.bytes, unit.range or (0, 1), wanted, spec.limits, skipped)
            yield from map(more.add_columns, read_past_damage(samples, stream, on_piece))
    elif unit.kind == "parquet":
        with reading.open_stream(unit.url, options, unit, seeking=True) as stream:
            file_range, image, key = unit.range or (0, 1), spec.image_column, spec.key_column
            known = parquet_keys.get_file_keys(unit.url, unit.bytes, unit.etag, key)
            samples = read_parquet(
                stream, unit.url, unit.bytes, file_range, image, key, columns.schema, spec.limits, known, skipped
            )
            yield from add_partitions(read_past_damage(samples, stream, on_piece), unit.path, columns.schema)
    elif unit.kind == "arrow":
        with reading.open_stream(unit.url, options, unit) as stream:
            image, key = spec.image_column, spec.key_column
            samples = read_arrow(stream, unit.url, image, key, columns.schema, spec.limits, skipped)
            yield from add_partitions(read_past_damage(samples, stream, on_piece), unit.path, columns.schema)
    elif unit.kind == "folder":
        may_differ = spec.superseded.get(unit.name, ()) if may_differ is None else may_differ
        labels = Labels(spec.source_rules.classes, columns.schema.names)
        for sample in read_folder_unit(unit, options, columns.texts, spec.limits, may_differ, encoding, with_images):
            yield labels.add_to(more.add_columns(sample), unit.paths[sample.position])
    elif unit.kind == "manifest":
        image, key = spec.image_column, spec.key_column
        yield from read_manifest_unit(unit, options, columns.schema, image, key, spec.limits, encoding, with_images)
    else:
        raise ShardError(f"{unit.url}: this version cannot read units of the kind '{unit.kind}'; upgrade latentmill")


def read_single_tar(
    unit: Unit,
    spec: ReadSpec,
    wanted: Wanted,
    skipped: Counter[str] | None,
    on_piece: Callable[[], None],
    on_offset: Callable[[int], None] | None,
) -> Iterator[Sample | Reject]:
    """Yield the samples of a tar or of a range of it, with the columns of img2dataset's metadata beside it."""
    counter = None if unit.metadata else skipped  # columns may come from other tables
    wanted_columns = spec.layout.columns.from_parquet
    metadata = read_tar_metadata(unit.url, spec.source_options, wanted_columns, spec.limits, counter)
    start, stop = unpack_range(unit)
    with reading.open_stream(unit.url, spec.source_options, unit) as stream:
        if start:  # the stream of a web server without ranges cannot seek
            stream.seek(start)

        def on_member(first: int) -> None:  # a compressed tar has more bytes after decompression
            if on_offset is not None:
                on_offset(min(first, stream.tell()))

        samples = read_tar(stream, unit.url, wanted, spec.limits, skipped, (start, stop), on_member)
        for sample in read_past_damage(samples, stream, on_piece, stop):
            if isinstance(sample, Sample) and sample.key in metadata:
                sample = merge_metadata(sample, metadata[sample.key])
            yield sample
