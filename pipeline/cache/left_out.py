"""Tars that a group of tars left out, because they could not be read: each is planned as a unit of its own.

The records of the group's parts say which these are. They are planned once such a part exists, never before: then no
part of the group can have them.
"""

from collections.abc import Iterable, Mapping, Set
from dataclasses import replace

import pyarrow.compute as pc

from pipeline.cache.commit_scan import CacheScan, drop_twins
from pipeline.cache.parts import parse_unit_name
from pipeline.cache.plan_files import append_plan_file, list_plan_files, read_plan_files
from pipeline.records import TAR_GROUP, ListedFile, PinnedFile, Unit
from pipeline.sources.planned_files import list_input_files
from pipeline.sources.units import make_shard_units
from pipeline.storage.folder import Folder


def read_left_out(cache: Folder, units: Iterable[Unit]) -> dict[str, set[str]]:
    """Return the tars that finished groups left out and that are not planned as units of their own, by group.

    units: all planned units. The commits are only read if there are groups among them.
    """
    groups = {unit.name: unit for unit in units if unit.kind == TAR_GROUP}
    found: dict[str, set[str]] = {}
    if not groups:
        return found
    scan = CacheScan(cache)
    for table in scan.read_tables():
        rows = drop_twins(table.rows.select(["file", "left_out"]), scan.twins)
        rows = rows.filter(pc.greater(pc.list_value_length(rows["left_out"]), 0))
        for file, paths in zip(rows["file"].to_pylist(), rows["left_out"].to_pylist(), strict=True):
            group = groups.get(parse_unit_name(file))
            if group is not None and (unplanned := set(paths) - group.left_out):
                found.setdefault(group.name, set()).update(unplanned)
    return found


def plan_left_out(cache: Folder, units: Iterable[Unit], left_out: Mapping[str, Set[str]]) -> list[Unit]:
    """Plan tars as units of their own, unless another run has planned them. Returns these units.

    units: the planned groups, and perhaps other units. left_out: the paths of the tars by group.
    """
    groups = [unit for unit in units if unit.name in left_out]
    tars = [make_tar_unit(group, file) for group in groups for file in unpack_tars(group, left_out[group.name])]
    while tars:
        names = list_plan_files(cache)
        planned = {unit.name for unit in read_plan_files(cache, names)}
        new = [unit for unit in tars if unit.name not in planned]
        if not new or append_plan_file(cache, names, new):
            break
    return tars


def unpack_tars(group: Unit, paths: Set[str]) -> list[PinnedFile]:
    """Return the tars of a group that have these paths, as they were planned."""
    return [file for file in list_input_files(group) if file.path in paths]


def make_tar_unit(group: Unit, tar: PinnedFile) -> Unit:
    """Return the unit of one tar of a group, as it was planned."""
    file = ListedFile(root=group.root, path=tar.path, bytes=tar.bytes, etag=tar.etag)
    (unit,) = make_shard_units(file, "tar")
    return replace(unit, metadata=group.metadata)
