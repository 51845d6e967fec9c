"""Versions of libraries that differ between the runs of a cache."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import encoded, smooth, write_tar

Command = Callable[..., tuple[int, str, str]]


@pytest.mark.slow
def test_a_run_reports_versions_that_differ_from_earlier_runs(
    latentmill: Command, micro_vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2):
        write_tar(tmp_path / f"s/{number}.tar", {"1.jpg": encoded(smooth(number, 64, 64)), "2.jpg": b"no image"})
    job = ("encode", tmp_path / "s", "--to", tmp_path / "c", "--vae", micro_vae, "--resolution", 64, "--workers", 0)
    assert "earlier runs of this cache had" not in latentmill(*job, "--max-shards", 1)[2]
    monkeypatch.setattr("pipeline.cache.runs.version", lambda name: "0.9" if name == "pillow" else "1.0")
    _, _, err = latentmill(*job)
    notes = [line.partition("INFO ")[2] for line in err.splitlines() if "earlier runs of this cache had" in line]
    libraries = [note.split(" this one")[0].split(" had ")[1].split()[0] for note in notes]
    assert libraries == ["torch", "pyarrow", "pillow", "simplejpeg"]
    assert any("this one has 0.9; the bytes of images or files may differ" in note for note in notes)
    assert "earlier runs" not in latentmill(*job)[2], "a run without pending units has no such message"
    monkeypatch.undo()
    assert "earlier runs of this cache had pillow 0.9" in latentmill("retry", tmp_path / "c", "--workers", 0)[2]
    write_tar(tmp_path / "s/2.tar", {"1.jpg": encoded(smooth(1, 64, 64))})
    assert "earlier runs of this cache had pillow 0.9, this one has" in latentmill(*job)[2]
