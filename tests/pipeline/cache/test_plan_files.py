"""The rows of the plan: sizes without units, and inputs that were planned again."""

from dataclasses import replace
from pathlib import Path

from pipeline.cache import plan
from pipeline.records import ListedFile, Unit
from pipeline.sources.units import RANGE_BYTES, make_units
from pipeline.storage.folder import Folder


def list_file(name: str, size: int) -> ListedFile:
    return ListedFile(root="/s", path=f"s/{name}", bytes=size, etag="")


def write_plan(cache: Folder) -> list[Unit]:
    """Write two files of a plan: the second one has one of the first one's inputs again. Returns the units."""
    parquet, images = list_file("b.parquet", 2 * RANGE_BYTES["parquet"]), [list_file(f"{n}.jpg", 10) for n in range(3)]
    first = make_units([list_file("a.tar", 1), parquet, list_file("c.tar", 3), *images])
    again = make_units([replace(parquet, bytes=parquet.bytes + 2), list_file("d.tar", 4)])
    assert plan.write_plan_file(cache, 0, first)
    assert plan.write_plan_file(cache, 1, again)
    a, c, *_, folder = first
    d, *ranges = again
    return [a, c, *ranges, folder, d]


def test_an_input_that_is_planned_again_keeps_its_place(tmp_path: Path) -> None:
    cache = Folder(str(tmp_path))
    expected = write_plan(cache)
    assert [unit.kind for unit in expected] == ["tar", "tar", "parquet", "parquet", "parquet", "folder", "tar"]
    assert plan.read_plan(cache) == expected


def test_the_sizes_of_units_are_read_without_the_units(tmp_path: Path) -> None:
    cache = Folder(str(tmp_path))
    units = write_plan(cache)
    sizes = plan.read_unit_sizes(cache)
    names, numbers = sizes.names.to_pylist(), sizes.bytes.to_pylist()
    assert dict(zip(names, numbers, strict=True)) == {unit.name: unit.input_bytes for unit in units}
    assert len(names) == len(units)
    assert (sizes.images, sizes.image_bytes) == (3, 30)


def test_an_empty_plan_has_no_sizes(tmp_path: Path) -> None:
    sizes = plan.read_unit_sizes(Folder(str(tmp_path)))
    assert (len(sizes.names), len(sizes.bytes), sizes.images, sizes.image_bytes) == (0, 0, 0, 0)
