"""`--label-from-folder`: the classes are the sorted folders, as in torchvision, and never change."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import encoded, smooth, write_tar
from tests.jobs.test_metadata import read_columns, write_images

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return a folder with three classes. In the order of bytes, capital letters precede small ones."""
    return write_images(tmp_path / "train", "dog/1.jpg", "Zebra/1.jpg", "cat/deep/2.jpg", "root.jpg")


def test_labels_are_numbered_as_in_torchvision(encode: Command, source: Path, tmp_path: Path) -> None:
    code, _, err = encode(source, "--label-from-folder")
    assert code == 0, err
    assert "INFO images in no folder of a class, without a label: 1 (train/root.jpg)\n" in err
    classes = sorted(entry.name for entry in source.iterdir() if entry.is_dir())  # torchvision's rule
    assert read_columns(tmp_path / "c", "label", "label_name") == {
        "Zebra/1": (classes.index("Zebra"), "Zebra"),
        "cat/deep/2": (classes.index("cat"), "cat"),
        "dog/1": (classes.index("dog"), "dog"),
        "root": (None, None),
    }


def test_a_further_folder_is_refused_and_a_further_image_has_its_label(
    encode: Command, latentmill: Command, source: Path, tmp_path: Path
) -> None:
    assert encode(source, "--label-from-folder")[0] == 0
    write_images(source, "dog/2.jpg", "Zebra/1.jpg")
    assert encode(source)[0] == 0, "options that are left out have the cache's values"
    assert read_columns(tmp_path / "c", "label")["dog/2"] == (2,)
    assert latentmill("verify", tmp_path / "c", "--recount")[0] == 0
    write_images(source, "bird/1.jpg")
    code, _, err = encode(source)
    assert (code, "the cache has 3 classes, and these folders are not among them: bird" in err) == (2, True)


def test_labels_of_edm2(encode: Command, source: Path, tmp_path: Path) -> None:
    (source / "dataset.json").write_text(json.dumps({"labels": [["dog/1.jpg", 6], ["cat/deep/2.jpg", 0]]}))
    code, _, err = encode(source)
    assert code == 0, err
    labels = read_columns(tmp_path / "c", "label")
    assert (labels["dog/1"], labels["cat/deep/2"], labels["root"]) == ((6,), (0,), (None,))
    code, _, err = encode(source, "--label-from-folder", "--to", tmp_path / "d")
    assert (code, "makes the column label, but train/dataset.json has it, too" in err) == (2, True), err


def test_images_without_folders_have_no_labels(encode: Command, tmp_path: Path) -> None:
    code, _, err = encode(write_images(tmp_path / "photos", "a.jpg"), "--label-from-folder")
    assert (code, "no image is in a folder directly below the root" in err) == (2, True)


def test_folders_in_archives_make_no_classes(encode: Command, source: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "shards/train.tar", {"cat/0.jpg": encoded(smooth(0))})
    code, _, err = encode(tmp_path / "shards", "--label-from-folder")
    assert (code, "the images of the sources are not files in folders, but in shards/train.tar" in err) == (2, True), (
        err
    )
    code, _, err = encode(source, tmp_path / "shards", "--label-from-folder")
    assert (code, "files whose images get no label" in err, "1 (shards/train.tar)\n" in err) == (0, True, True), err
    labels = read_columns(tmp_path / "c", "label_name")
    assert (labels["cat/0"], labels["cat/deep/2"]) == ((None,), ("cat",))


def test_labels_that_the_columns_leave_out_are_refused(encode: Command, source: Path, tmp_path: Path) -> None:
    code, _, err = encode(source, "--label-from-folder", "--columns", "txt")
    assert (code, "--columns has neither: add label to it" in err) == (2, True), err
    assert encode(source, "--label-from-folder", "--columns", "label_name")[0] == 0
    assert read_columns(tmp_path / "c", "label_name")["dog/1"] == ("dog",)
