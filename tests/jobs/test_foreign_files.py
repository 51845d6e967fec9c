"""Files that other programs leave in the folders of the parts, such as litdata's index of `data/`."""

from collections.abc import Callable
from pathlib import Path

import pytest

from latentmill import Cache
from latentmill.loading.loader import Loader

Command = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("container", ["parquet", "webdataset"])
def test_files_that_are_no_parts_are_passed_over_and_named_by_verify(
    latentmill: Command, shards: Path, micro_vae: Path, tmp_path: Path, container: str
) -> None:
    cache = tmp_path / "c"
    encode = ("encode", shards, "--to", cache, "--vae", micro_vae, "--resolution", 64, "--workers", 0)
    assert latentmill(*encode, "--format", container, "--max-shards", 2)[0] == 0
    (cache / "_empty").mkdir(exist_ok=True)
    for name in ("data/index.json", "_empty/notes.txt"):
        (cache / name).write_text("{}")
    (tmp_path / "t.jsonl").write_text('{"key": "000000003", "score": 1.5}\n')
    for command in (
        (*encode, "--format", container),
        ("status", cache),
        ("stats", cache),
        ("annotate", cache, "--from", tmp_path / "t.jsonl"),
        ("export", cache, "--format", "safetensors", "--to", tmp_path / "e", "--workers", 0),
        ("decode", cache, "--to", tmp_path / "p", "--workers", 0),
    ):
        code, _, err = latentmill(*command)
        assert code == 0, err
    assert len(Cache.open(str(cache)).files()) == 3
    assert sum(len(batch["key"]) for batch in Loader(Cache.open(str(cache)), 1)) == 18
    code, out, _ = latentmill("verify", cache)
    assert code == 1
    assert out.count("unexpected file") == 2 and "data/index.json: unexpected file" in out
    assert "_empty/notes.txt: unexpected file" in out
