import io
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from pipeline.cache import card as card_module
from pipeline.cache import runs
from pipeline.cache.reader import Cache
from pipeline.cache.rows import choose_rows
from pipeline.preview.contact_sheet import SIDE, Cell, draw_contact_sheet
from pipeline.preview.render import IMAGES_PER_SHEET, make_image_name, make_tasks
from pipeline.records import Unit
from pipeline.storage.folder import Folder
from tests.cache_infos import IDENTITY, info_of
from tests.conftest import smooth

UNIT = Unit(name="u", kind="tar", path="s/u.tar")


def choose(limit: int, *rows: int) -> list[tuple[str, int]]:
    files = [(f"f{n}", count, UNIT) for n, count in enumerate(rows)]
    return [(ref.file, ref.index) for ref in choose_rows(files, limit)]


def test_rows_are_chosen_evenly_over_the_cache() -> None:
    assert choose(4, 3, 5) == [("f0", 0), ("f0", 2), ("f1", 1), ("f1", 3)]
    assert choose(0, 2, 1) == [("f0", 0), ("f0", 1), ("f1", 0)]
    assert choose(9, 1, 1) == [("f0", 0), ("f1", 0)]
    assert choose(3) == []


def test_a_task_holds_the_rows_of_one_sheet() -> None:
    tasks = make_tasks(choose_rows([("f", 30, UNIT)], 0))
    assert [len(task.rows) for task in tasks] == [IMAGES_PER_SHEET, IMAGES_PER_SHEET, 6]
    assert [task.name for task in tasks] == ["sheet 0", "sheet 1", "sheet 2"]


@pytest.mark.parametrize("key", ["a/b", "../../etc/passwd", "x" * 10_000, "ü\n\0", "."])
def test_a_key_becomes_one_safe_file_name(key: str) -> None:
    name = make_image_name(key)
    assert "/" not in name
    assert "\0" not in name
    assert len(name) <= 150
    assert make_image_name(key + "!") != name


def test_a_sheet_has_a_cell_for_every_image() -> None:
    cells = [Cell((smooth(n, 40, 80), smooth(n, 40, 80)), f"key {n}", "remark " * 50) for n in range(4)]
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
