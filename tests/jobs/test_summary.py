"""The summary that encode prints: its numbers, the names of rejects, and the units that are left."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.wording import count_noun
from tests.conftest import encoded, img2dataset_members, smooth, write_tar

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return a folder of one image and four files that are no images."""
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "0.jpg").write_bytes(encoded(smooth(0)))
    for number in range(1, 5):
        (folder / f"{number}.jpg").write_bytes(b"no image")
    return folder


def test_the_speed_is_that_of_the_encoding(encode: Command, shards: Path) -> None:
    _, out, _ = encode(shards)
    assert re.match(r"encoded 18 images in \d+\.\d s \(\d+\.\d per second while encoding\)\n", out), out
    _, out, _ = encode(shards)
    assert out.startswith("encoded 0 images in 0.0 s; 3 of 3 units were done before\n"), out


def test_one_image_is_an_image_and_its_row_is_a_row(encode: Command, latentmill: Command, tmp_path: Path) -> None:
    write_tar(tmp_path / "s/0.tar", img2dataset_members(0, 1))
    _, out, err = encode(tmp_path / "s", "-v")
    assert out.startswith("encoded 1 image in ")
    assert f"  cache      {tmp_path}/c: 1 row\n" in out
    assert re.search(r" DEBUG unit 0-\w+: 1 row, 0 rejects, 1 part \(", err)
    assert latentmill("stats", tmp_path / "c")[1].startswith("1 latent, raw")
    assert latentmill("decode", tmp_path / "c", "--to", tmp_path / "p", "--workers", 0)[1].startswith(
        "decoded 1 image\n"
    )
    _, out, _ = encode(tmp_path / "s")
    assert out.startswith("encoded 0 images in 0.0 s; 1 of 1 unit was done before\n"), out


def test_three_rejects_are_named_with_the_place_of_all(encode: Command, photos: Path, tmp_path: Path) -> None:
    code, out, err = encode(photos)
    names = ", ".join(f"{key} in photos (not_an_image)" for key in (1, 2, 3))
    lines = f"  rejected   4: 4 not_an_image\n             {names}; all are in {tmp_path}/c/_rejects/\n"
    assert (code, lines in out) == (3, True), out
    message = (
        "4 of 5 samples (80.0%) rejected, the limit is 5% (--max-reject-rate): exit code 3; the other images are in"
    )
    assert f"WARNING {message} the cache. After a repair, run `latentmill retry {tmp_path}/c`\n" in err


def test_a_reject_that_a_retry_supersedes_is_not_named(
    encode: Command, latentmill: Command, photos: Path, tmp_path: Path
) -> None:
    encode(photos)
    for number in (1, 2, 3):
        (photos / f"{number}.jpg").write_bytes(encoded(smooth(number)))
    assert latentmill("retry", tmp_path / "c", "--workers", 0)[0] == 0
    _, out, _ = encode(photos)
    line = f"             4 in photos (not_an_image); all are in {tmp_path}/c/_rejects/\n"
    assert f"  rejected   1: 1 not_an_image\n{line}" in out


def test_every_run_explains_that_a_shard_is_damaged(encode: Command, tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "s/0.tar", img2dataset_members(0, 8))
    shard.write_bytes(shard.read_bytes()[:9000])
    for _ in range(2):
        code, out, err = encode(tmp_path / "s")
        assert (code, f"s/0.tar (rest_of_shard); all are in {tmp_path}/c/_rejects/" in out) == (3, True), out
        message = "the rest of 1 damaged shard is not encoded and cannot be counted: exit code 3. After a repair, run"
        assert f"WARNING {message} `latentmill retry {tmp_path}/c`\n" in err


@pytest.mark.parametrize("rate", [-0.1, 1.5, 5])
def test_a_reject_rate_is_from_0_to_1(encode: Command, photos: Path, tmp_path: Path, rate: object) -> None:
    code, _, err = encode(photos, "--max-reject-rate", rate)
    message = f"--max-reject-rate must be from 0 to 1, such as 0.05 for 5%, not {rate}"
    assert (code, message in err) == (2, True), err
    assert not (tmp_path / "c").exists()


def test_the_summary_of_a_trial_names_the_units_that_are_left(encode: Command, shards: Path) -> None:
    for number in (1, 2):
        _, out, _ = encode(shards, "--max-shards", number)
        line = f"  units      {number} of 3 done; run the same command without --max-shards for the rest"
        assert out.splitlines()[-1] == line
    _, out, _ = encode(shards, "--max-shards", 3)
    assert "--max-shards" not in out


def test_a_number_has_the_right_noun() -> None:
    assert [count_noun(number, "image") for number in (0, 1, 2, 1024)] == [
        "0 images",
        "1 image",
        "2 images",
        "1,024 images",
    ]
    assert [count_noun(number, "entry", "entries") for number in (1, 2)] == ["1 entry", "2 entries"]
