"""The columns of a cache's samples as its sources have them now, without opening an image."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from latentmill.cache_info import SourceRules
from pipeline.errors import DamagedError
from pipeline.formats.schema import OutputSchema, PassthroughColumns
from pipeline.limits import Limits
from pipeline.prefetch import map_in_order
from pipeline.readers.manifest import ROWS_PER_UNIT
from pipeline.readers.unit import read_samples
from pipeline.records import TAR_GROUP, ListedFile, Reject, Sample, Unit
from pipeline.sources.planned_files import fetch_current_version
from pipeline.sources.sidecars import collect_image_files, match_sidecars, pin_files

THREADS = 4  # inputs that are read at once
ROWS = 1024  # rows whose values are Python objects


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSpec:
    """The settings with which a unit is read (`readers.unit.ReadSpec`)."""

    source_options: Mapping[str, str]
    layout: OutputSchema
    image_column: str | None
    key_column: str | None
    source_rules: SourceRules
    limits: Limits
    superseded: Mapping[str, Mapping[int, str]] = field(default_factory=dict)


def read_columns(
    units: Sequence[Unit], spec: SourceSpec, add: Callable[[pa.Table], None], on_unit: Callable[[int], None]
) -> tuple[Counter[str], list[str]]:
    """Read the columns of all samples, and add them in tables with `key` and `shard`.

    units: of `select_inputs`. on_unit: called after each of them with the number of its samples. Several inputs are
    read at once, so tables come in any order.
    Returns the number of rejected samples by reason, and the messages of damages. Raises the errors of the readers.
    """
    rejected, damaged = Counter[str](), list[str]()

    def read(unit: Unit) -> tuple[int, Counter[str], str]:
        count, reasons, damage = 0, Counter[str](), ""
        try:
            for table in _make_tables(_read_unit(unit, spec), unit.path, spec.layout.columns, reasons):
                add(table)
                count += len(table)
        except DamagedError as error:
            damage = str(error)
        return count, reasons, damage

    with ThreadPoolExecutor(THREADS, thread_name_prefix="unit") as pool:
        for count, reasons, damage in map_in_order(pool, read, units, window=2 * THREADS):
            rejected += reasons
            damaged += [damage] if damage else []
            on_unit(count)
    return rejected, damaged


def _read_unit(unit: Unit, spec: SourceSpec) -> Iterator[Sample | Reject]:
    current = fetch_current_version(unit, spec.source_options)
    if unit.kind != "manifest":
        yield from read_samples(current, spec, may_differ=(), with_images=False)
        return
    number = 0
    while True:  # a manifest may have more rows now
        samples = list(read_samples(replace(current, range=(number, number + 1)), spec, with_images=False))
        yield from samples
        if len(samples) < ROWS_PER_UNIT:
            return
        number += 1


def _make_tables(
    samples: Iterable[Sample | Reject], shard: str, columns: PassthroughColumns, rejected: Counter[str]
) -> Iterator[pa.Table]:
    """Yield the keys and columns of samples. rejected: receives the reasons of the others."""
    rows: list[Sample] = []
    damage: DamagedError | None = None
    try:
        for sample in samples:
            if isinstance(sample, Reject):
                rejected[sample.reason] += 1
                continue
            rows.append(replace(sample, image=b""))
            if len(rows) == ROWS:
                yield _make_table(rows, shard, columns)
                rows = []
    except DamagedError as error:  # the rows before the damage count
        damage = error
    yield _make_table(rows, shard, columns)
    if damage is not None:
        raise damage


def _make_table(rows: Sequence[Sample], shard: str, columns: PassthroughColumns) -> pa.Table:
    values: dict[str, Any] = {
        "key": pa.array([row.key for row in rows], pa.string()),
        "shard": pa.array([shard] * len(rows), pa.string()),
    }
    for item in columns.schema:
        values[item.name] = pa.array([row.columns.get(item.name) for row in rows], item.type)
    return pa.table(values)


def select_inputs(
    units: Iterable[Unit], listed: Collection[ListedFile], texts: Collection[str]
) -> tuple[list[Unit], list[str]]:
    """Return what to read to see every planned sample as it is now, and the planned inputs that do not exist any more.

    A file is read once as a whole, because its ranges may have moved, and the tars of a group one by one. Of a folder,
    the planned images are read that exist, with the texts that they have now. listed: the files of the sources. texts:
    extensions of texts.
    """
    files = {file.path: file for file in listed}
    sidecars = match_sidecars(list(listed), texts)
    inputs, missing = dict[str, Unit](), dict[str, None]()
    for unit in units:
        if unit.kind == "folder":
            images = [path for path in unit.paths if path in files]
            missing |= dict.fromkeys(path for path in unit.paths if path not in files)
            pins = pin_files([collect_image_files(files[path], sidecars.texts) for path in images])
            if images:
                inputs[unit.name] = replace(unit, paths=tuple(images), **pins)
        elif unit.kind == TAR_GROUP:
            for path in unit.paths:
                if path in files:
                    inputs[path] = replace(unit, kind="tar", path=path, paths=(), files="", left_out=frozenset())
                else:
                    missing[path] = None
        elif unit.path in files:
            inputs[unit.path] = replace(unit, range=None, files=unit.files if unit.kind == "manifest" else "")
        else:
            missing[unit.path] = None
    return list(inputs.values()), list(missing)
