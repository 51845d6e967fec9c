import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from latentmill.group_spans import GroupSpan
from pipeline.cache import card as card_module
from pipeline.cache import runs
from pipeline.cache.reader import Cache
from pipeline.cache.rows import FileWithRows, choose_rows
from pipeline.preview.contact_sheet import SIDE, Cell, draw_cell, draw_contact_sheet
from pipeline.preview.image_files import make_image_name
from pipeline.preview.selection import (
    FILES_PER_TASK,
    IMAGES_PER_BUCKET,
    IMAGES_PER_SHEET,
    LATENT_BYTES_PER_TASK,
    ROWS_PER_TASK,
    RenderTask,
    choose_positions,
    hash_selection,
    make_tasks,
)
from pipeline.records import Unit
from pipeline.storage.folder import Folder
from tests.cache_infos import IDENTITY, info_of
from tests.conftest import smooth

UNIT = Unit(name="u", kind="tar", path="s/u.tar")


def make_file(name: str, *groups: tuple[int, int, int], size: int = 1000) -> FileWithRows:
    """Return a file. groups: rows, height and width of each. size: bytes of a row."""
    return FileWithRows(name, f"sha of {name}", UNIT, [GroupSpan(rows, 0, rows * size, h, w) for rows, h, w in groups])


def choose(limit: int, *rows: int) -> list[tuple[str, int]]:
    files = [make_file(f"f{n}", (count, 64, 64)) for n, count in enumerate(rows)]
    return [(ref.file, ref.index) for ref in choose_rows(files, limit)]


def list_rows(tasks: list[RenderTask]) -> list[tuple[str, int]]:
    return [(run.file, index) for task in tasks for run in task.runs for index in run.indexes]


def test_rows_are_chosen_evenly_over_the_cache() -> None:
    assert choose(4, 3, 5) == [("f0", 0), ("f0", 2), ("f1", 1), ("f1", 3)]
    assert choose(0, 2, 1) == [("f0", 0), ("f0", 1), ("f1", 0)]
    assert choose(9, 1, 1) == [("f0", 0), ("f1", 0)]
    assert choose(3) == []


def test_a_sample_follows_from_its_seed() -> None:
    sample = choose_positions(1000, 48, 10, 1)
    assert sample == choose_positions(1000, 48, 10, 1)
    assert sample != choose_positions(1000, 48, 10, 2)
    assert list(sample) == sorted(set(sample))
    assert len(sample) == 10
    assert list(choose_positions(5, 48, 10, 1)) == [0, 1, 2, 3, 4]


def test_a_few_rows_are_divided_among_many_tasks() -> None:
    tasks = make_tasks([make_file("f", (30, 64, 64))], range(30))
    assert [task.rows for task in tasks] == [IMAGES_PER_SHEET, IMAGES_PER_SHEET, 6]
    assert [task.name for task in tasks] == ["part 0", "part 1", "part 2"]


@pytest.mark.parametrize(
    ("files", "rows"),
    [
        ([make_file("f", (3000, 64, 64))], ROWS_PER_TASK),
        ([make_file("f", (3000, 64, 64), size=LATENT_BYTES_PER_TASK // 7)], 7),
        ([make_file(f"f{n}", (2, 64, 64)) for n in range(600)], 2 * FILES_PER_TASK),
    ],
    ids=["rows", "bytes", "files"],
)
def test_tasks_of_many_rows_are_bounded(files: list[FileWithRows], rows: int) -> None:
    total = sum(file.rows for file in files)
    tasks = make_tasks(files, range(total))
    assert {task.rows for task in tasks[:-1]} == {rows}
    assert list_rows(tasks) == [(file.file, index) for file in files for index in range(file.rows)]


def test_tasks_of_a_large_cache_hold_no_row() -> None:
    tasks = make_tasks([make_file(f"f{n}", (50_000, 64, 64)) for n in range(20)], range(1_000_000))
    assert all(isinstance(run.indexes, range) for task in tasks for run in task.runs)
    assert sum(len(task.cells) for task in tasks) == IMAGES_PER_BUCKET


def test_each_bucket_has_cells_evenly_over_its_rows() -> None:
    files = [make_file("f0", (100, 64, 64), (2, 64, 96)), make_file("f1", (100, 64, 64), (1, 32, 96))]
    tasks = make_tasks(files, range(203))
    cells = {place: name for task in tasks for place, name in task.cells.items()}
    assert cells["f0", 100] == "_cells/64x96-00000.png"
    assert cells["f0", 101] == "_cells/64x96-00001.png"
    assert cells["f1", 100] == "_cells/32x96-00000.png"
    squares = [place for place, name in cells.items() if "/64x64-" in name]
    assert len(squares) == IMAGES_PER_BUCKET
    assert squares[:3] == [("f0", 0), ("f0", 4), ("f0", 8)]
    assert squares[24] == ("f1", 0)


def test_the_selection_is_another_if_a_file_or_a_setting_is() -> None:
    files = [make_file("f0", (1, 64, 64)), make_file("f1", (1, 64, 64))]
    hashes = {
        hash_selection("i", ["files", 48], files),
        hash_selection("j", ["files", 48], files),
        hash_selection("i", ["files", 49], files),
        hash_selection("i", ["files", 48], files[:1]),
        hash_selection("i", ["files", 48], [files[0], dataclasses.replace(files[1], sha256="other")]),
    }
    assert len(hashes) == 5


@pytest.mark.parametrize("key", ["a/b", "../../etc/passwd", "x" * 10_000, "ü\n\0", "."])
def test_a_key_becomes_one_safe_file_name(key: str) -> None:
    name = make_image_name(key)
    assert "/" not in name
    assert "\0" not in name
    assert len(name) <= 150
    assert make_image_name(key + "!") != name


def test_a_sheet_has_a_cell_for_every_image() -> None:
    cells = [draw_cell(Cell((smooth(n, 40, 80), smooth(n, 40, 80)), f"key {n}", "remark " * 50)) for n in range(4)]
    with Image.open(io.BytesIO(draw_contact_sheet(cells, "a heading"))) as page:
        assert page.width == 12 + 3 * (2 * SIDE + 4 + 12)
        assert page.height > 2 * SIDE
        pixels = np.asarray(page)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 1000


def test_datasets_can_read_the_card(tmp_path: Path) -> None:
    stats = {
        "count": 1234,
        "rejected": {"corrupt": 2},
        "filtered": {"min_size": 3, "min_std": 1},
        "enlarged": 5,
        "digest": "d" * 64,
    }
    (tmp_path / "data").mkdir()
    for number in range(3):
        (tmp_path / f"data/{number}.parquet").touch()
    card = card_module.render_card(Cache(Folder(str(tmp_path)), info_of(IDENTITY)), stats, "0.1.0", 3).decode()
    assert "scale = 0.5" in card
    head = yaml.safe_load(card.split("---")[1])
    columns = {feature["name"]: feature for feature in head["dataset_info"]["features"]}
    assert columns["key"] == {"name": "key", "dtype": "string"}
    assert columns["shape"] == {"name": "shape", "list": "int32"}
    assert head["configs"] == [{"config_name": "default", "data_files": "data/*", "version": "0.0.3"}]
    assert "1,234 rows" not in card.split("---")[1]
    assert "# Latents of 1,234 images" in card
    assert "2 rejected, 4 filtered, 5 enlarged" in card


def test_the_record_of_a_run_is_written_from_start_to_end(tmp_path: Path) -> None:
    run = runs.Run(Folder(str(tmp_path)), "encode", {"resolution": 64})
    run.write(units=3)
    (path,) = (tmp_path / "_runs").iterdir()
    assert yaml.safe_load(path.read_text())["outcome"] == "running"
    run.end("done", 0)
    content = yaml.safe_load(path.read_text())
    assert (content["outcome"], content["exit_code"], content["units"]) == ("done", 0, 3)
    assert content["started"] <= content["alive"] <= content["ended"]
    assert set(content["versions"]) == {"latentmill", "python", "torch", "pyarrow", "pillow", "simplejpeg"}
