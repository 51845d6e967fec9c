"""Disks without hard links or exclusive renames: whether they support conditional creates, and how jobs report it."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import StorageError
from pipeline.storage import local_disk
from pipeline.storage.folder import Folder
from tests.pipeline.storage.concurrent_writers import winners

ROOT = Path(__file__).parents[3]
Command = Callable[..., tuple[int, str, str]]

# Code that disables hard links in a process, and exclusive renames too.
NO_LINKS = """
import errno, os
def link(file, path, **how):
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(file), None, str(path))
os.link = link
"""
NO_EXCLUSIVE_RENAMES = "from pipeline.storage import local_disk; local_disk._renameat2 = lambda: None\n"


def refuse_links(monkeypatch: pytest.MonkeyPatch, number: int = errno.EPERM, within: bool = True) -> None:
    """Refuse all hard links, or only those from one directory to another (within=False)."""
    original = os.link

    def link(file: str, path: str) -> None:
        if within or os.path.dirname(file) != os.path.dirname(path):
            raise OSError(number, os.strerror(number), file, None, path)
        original(file, path)

    monkeypatch.setattr(os, "link", link)


def refuse_exclusive_renames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_disk, "_renameat2", lambda: None)


def files_below(folder: Folder) -> list[str]:
    return [path.name for path in Path(folder.url).rglob("*") if path.is_file()]


@pytest.mark.parametrize("number", sorted(local_disk.UNSUPPORTED), ids=lambda number: errno.errorcode[number])
def test_without_links_an_exclusive_rename_lets_one_writer_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    refuse_links(monkeypatch, number)
    folder = Folder(str(tmp_path / "c"))
    assert folder.supports_conditional_create()
    (won,) = winners(folder)
    assert files_below(folder) == ["x"], "no other file is left"
    assert folder.read("data/x") == bytes([won]) * 100_000


def test_links_within_a_directory_support_conditional_creates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_links(monkeypatch, errno.EXDEV, within=False)
    refuse_exclusive_renames(monkeypatch)
    folder = Folder(str(tmp_path / "c"))
    assert folder.supports_conditional_create()
    assert len(winners(folder)) == 1
    assert files_below(folder) == ["x"], "no other file is left"


def test_a_disk_with_neither_has_whole_files_without_conditional_creates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_links(monkeypatch)
    refuse_exclusive_renames(monkeypatch)
    folder = Folder(str(tmp_path / "c"))
    assert not folder.supports_conditional_create()
    assert winners(folder)
    assert files_below(folder) == ["x"], "no other file is left"
    assert not folder.create("data/x", b"late")
    assert folder.read("data/x") != b"late"


def test_a_rename_that_ignores_its_flags_is_no_conditional_create(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some FUSE filesystems ignore the flag that forbids overwriting."""
    refuse_links(monkeypatch)
    monkeypatch.setattr(local_disk, "_renameat2", lambda: lambda at, file, into, path, flags: os.replace(file, path))
    assert not Folder(str(tmp_path)).supports_conditional_create()


def test_a_worker_fails_if_only_the_driver_has_conditional_creates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_links(monkeypatch)
    refuse_exclusive_renames(monkeypatch)
    with pytest.raises(StorageError, match=r"cannot write .*/data/x: the disk has neither hard links nor exclusive"):
        Folder(str(tmp_path), exclusive=True).create("data/x", b"1")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.ESTALE, errno.EROFS])
def test_other_errors_of_a_link_are_storage_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    refuse_links(monkeypatch, number)
    with pytest.raises(StorageError, match=f"cannot write .*/x: {os.strerror(number).lower()}"):
        Folder(str(tmp_path)).create("x", b"1")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_link_whose_answer_was_lost_counts_as_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS sends the request again, and gets the answer that the name exists."""
    original = os.link

    def link(file: str, path: str) -> None:
        original(file, path)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), file, None, path)

    monkeypatch.setattr(os, "link", link)
    assert Folder(str(tmp_path)).create("x", b"1")
    monkeypatch.undo()
    assert not Folder(str(tmp_path)).create("x", b"2")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.EIO])
def test_a_disk_without_fsync_is_not_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """An fsync that fails with an I/O error is an error."""

    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    if number == errno.EIO:
        with pytest.raises(StorageError, match="input/output error"):
            Folder(str(tmp_path)).create("x", b"1")
    else:
        assert Folder(str(tmp_path)).create("x", b"1")
        Folder(str(tmp_path)).replace("x", b"2")


@pytest.fixture
def argv(shards: Path, micro_vae: Path, tmp_path: Path) -> list[object]:
    return ["encode", shards, "--to", tmp_path / "c", "--vae", micro_vae, "--resolution", 64]


def test_a_cache_on_a_disk_with_neither_is_for_one_job_at_a_time(
    latentmill: Command, argv: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_links(monkeypatch)
    refuse_exclusive_renames(monkeypatch)
    code, _, err = latentmill(*argv, "--workers", 0)
    assert code == 0, err
    assert f"INFO {tmp_path}/c has no hard links: run one job at a time" in err
    (run,) = (tmp_path / "c/_runs").glob("*.json")
    record = json.loads(run.read_text())
    assert record["conditional_creates"] is False
    assert latentmill("verify", tmp_path / "c")[0] == 0
    run.write_text(json.dumps({**record, "outcome": "running"}))
    for command in (argv, ["retry", tmp_path / "c"]):
        code, _, err = latentmill(*command, "--workers", 0)
        assert code == 1
        assert f"another run (started {record['started']}) is writing to" in err


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["encode", "retry"])
def test_a_job_fails_if_only_its_driver_has_conditional_creates(
    latentmill: Command,
    argv: list[object],
    micro_vae: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
) -> None:
    if verb == "retry":
        assert latentmill(*argv, "--workers", 0, "--input-limit", "pixels=9000", "--max-reject-rate", 1)[0] == 0
        argv = ["retry", tmp_path / "c"]
    supports_conditional_create = Folder.supports_conditional_create

    def check_then_refuse(folder: Folder) -> bool:
        is_supported = supports_conditional_create(folder)
        refuse_links(monkeypatch)
        refuse_exclusive_renames(monkeypatch)
        return is_supported

    monkeypatch.setattr(Folder, "supports_conditional_create", check_then_refuse)
    code, _, err = latentmill(*argv, "--workers", 0)
    assert code == 1
    assert "the disk has neither hard links nor exclusive renames on this machine" in err


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("kept", [True, False], ids=["exclusive renames", "neither"])
def test_ray_workers_agree_with_the_driver_on_a_disk_without_links(
    argv: list[object], tmp_path: Path, kept: bool
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(NO_LINKS + ("" if kept else NO_EXCLUSIVE_RENAMES))
    job = subprocess.run(
        [sys.executable, "-m", "jobs.encode", *map(str, argv[1:]), "--workers", "1", "--json"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}/site{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert job.returncode == 0, job.stderr
    assert json.loads(job.stdout)["stats"]["count"] == 18
    assert ("has no hard links" in job.stderr) is not kept
    assert sorted(path.name for path in (tmp_path / "c").rglob(".*")) == []
