"""Sources as people have them: what is no shard and no image among them is passed over, and said once."""

import gzip
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import img2dataset_members, write_tar
from tests.jobs.test_sources import by_key

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def encode(latentmill: Command, micro_vae: Path) -> Command:
    """`latentmill encode` at 64 px with the micro model, in this process."""

    def run(*argv: object) -> tuple[int, str, str]:
        return latentmill("encode", *argv, "--vae", micro_vae, "--resolution", 64, "--workers", 0)

    return run


def rejects(cache: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line) for path in sorted((cache / "_rejects").iterdir()) for line in path.read_text().splitlines()
    ]


def test_a_tar_from_macos_keeps_its_captions(encode: Command, latentmill: Command, tmp_path: Path) -> None:
    members = {"README": b"", "000.idx": b""}
    for name, data in img2dataset_members(0, 3).items():
        members |= {f"./._{name}": b"\x00\x05\x16\x07", f"./{name}": data}
    for number in range(2):
        write_tar(tmp_path / f"s/{number}.tar", members)
    code, out, err = encode(tmp_path / "s", "--to", tmp_path / "c")
    assert (code, "rejected   0" in out) == (0, True), err
    assert list(by_key(tmp_path / "c", "txt").values()) == ["picture 0", "picture 1", "picture 2"]
    (note,) = (line for line in err.splitlines() if "no part of a sample" in line)
    assert "18 hidden files" in note
    assert "4 documents and indexes" in note
    assert latentmill("verify", tmp_path / "c", "--recount")[0] == 0


def test_texts_that_stand_apart_from_their_images_are_said(encode: Command, tmp_path: Path) -> None:
    members = sorted(img2dataset_members(0, 3).items(), key=lambda member: member[0].rpartition(".")[2])
    write_tar(tmp_path / "s/0.tar", dict(members))
    code, _, err = encode(tmp_path / "s", "--to", tmp_path / "c")
    assert (code, err.count("note: 3 images do not stand next to their texts")) == (3, 1), err
    assert all("its image stands elsewhere in the tar" in reject["detail"] for reject in rejects(tmp_path / "c")[3:])


def compress(path: Path) -> None:
    path.write_bytes(gzip.compress(path.read_bytes()))


def test_a_gzip_called_tar_is_refused_before_anything_is_done(encode: Command, tmp_path: Path) -> None:
    for number in range(2):
        write_tar(tmp_path / f"s/{number}.tar", img2dataset_members(0, 1))
    compress(tmp_path / "s/1.tar")
    code, _, err = encode(tmp_path / "s", "--to", tmp_path / "c")
    assert (code, f"{tmp_path}/s/1.tar is not a tar but gzip; decompress it" in err) == (2, True), err
    assert not (tmp_path / "c").exists()


def test_a_gzip_that_was_not_looked_at_fails_its_unit_by_name(encode: Command, tmp_path: Path) -> None:
    """A few tars are looked at beforehand; of the others each says so when it is read."""
    for number in range(40):
        write_tar(tmp_path / f"s/{number:02}.tar", img2dataset_members(number, 1))
    compress(tmp_path / "s/01.tar")
    code, out, err = encode(tmp_path / "s", "--to", tmp_path / "c")
    assert (code, "failed: unit 01-" in err, "01.tar is not a tar but gzip" in err) == (1, True, True), err
    assert "rejected   0" in out, "nothing of it counts as read"


@pytest.mark.parametrize("name", ["0.tar.gz", "0.tgz", "0.tar.zst", "0.zip", "0.TAR.XZ"])
def test_archives_that_are_not_read_are_named(encode: Command, tmp_path: Path, name: str) -> None:
    (tmp_path / "s").mkdir()
    with zipfile.ZipFile(tmp_path / "s" / name, "w") as archive:
        archive.writestr("0.jpg", b"")
    said = f"compressed archives are not read: {tmp_path}/s/{name}; decompress it"
    code, _, err = encode(tmp_path / "s", "--to", tmp_path / "c")
    assert (code, said in err) == (2, True), err
    write_tar(tmp_path / "s/1.tar", img2dataset_members(0, 1))
    code, _, err = encode(tmp_path / "s", "--to", tmp_path / "c")
    assert (code, f"note: {said}" in err) == (0, True), err
