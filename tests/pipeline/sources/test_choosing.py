"""The globs of --include and --exclude."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.sources.choosing import matches_glob
from pipeline.sources.listing import list_sources
from tests.jobs.test_metadata import write_images

Command = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("glob", "path", "is_match"),
    [
        ("*_mask.png", "a_mask.png", True),
        ("*_mask.png", "deep/er/a_mask.png", True),
        ("*_mask.png", "a_mask.png.txt", False),
        ("rejected/", "rejected/a.png", True),
        ("rejected/", "x/rejected/y/a.png", True),
        ("rejected/", "x/rejected", False),
        ("rejected", "x/rejected", True),
        ("a/*.png", "a/1.png", True),
        ("a/*.png", "a/b/1.png", False),
        ("a/*.png", "x/a/1.png", False),
        ("a", "x/a/1.png", True),
        ("/a", "x/a/1.png", False),
        ("/a", "a/1.png", True),
        ("a/**/*.png", "a/1.png", True),
        ("a/**/*.png", "a/b/c/1.png", True),
        ("**/masks/*", "masks/1.png", True),
        ("**/masks/*", "a/masks/1.png", True),
        ("*.PNG", "a.png", False),
        ("[ab].png", "b.png", True),
    ],
)
def test_a_glob_matches_a_path_or_a_folder_above_it(glob: str, path: str, is_match: bool) -> None:
    assert matches_glob(path, glob) is is_match


@pytest.mark.parametrize(
    ("include", "exclude", "chosen"),
    [
        ((), ("*_mask.png", "rejected/"), ["a.png", "a.txt", "metadata.jsonl", "sub.parquet", "sub/b.png", "x.txt"]),
        (("sub/*",), (), ["metadata.jsonl", "sub.parquet", "sub/b.png", "x.txt"]),
        (("*.png",), ("*_mask.*", "sub", "rejected"), ["a.png", "a.txt", "metadata.jsonl", "sub.parquet", "x.txt"]),
        ((), ("*.txt",), ["a.png", "a_mask.png", "metadata.jsonl", "rejected/c.png", "sub.parquet", "sub/b.png"]),
    ],
)
def test_texts_follow_their_images_and_tables_stay(
    tmp_path: Path, include: tuple[str, ...], exclude: tuple[str, ...], chosen: list[str]
) -> None:
    folder = write_images(tmp_path / "set", "a.png", "a_mask.png", "sub/b.png", "rejected/c.png")
    for name in ("a.txt", "a_mask.txt", "rejected/c.png.txt", "x.txt", "metadata.jsonl", "sub.parquet"):
        (folder / name).touch()
    listing = list_sources([str(folder)], {}, "nowhere", include, exclude)
    found = [file.path.removeprefix("set/") for file in listing.files]
    assert [name for name in found if name not in ("a_mask.txt", "rejected/c.png.txt")] == chosen
    assert ("a_mask.txt" in found) == ("a_mask.png" in found and "*.txt" not in exclude)
    (note,) = listing.notes
    assert note.startswith(f"left out by --include or --exclude: {10 - len(found)} (set/")
