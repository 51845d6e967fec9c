"""Latents of 1 x 1, which torch considers contiguous regardless of their strides."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from latentmill.part_files import to_tensor
from pipeline.cache.reader import Cache
from tests.conftest import encoded, smooth

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for number in range(2):
        (tmp_path / f"in/{number}.png").write_bytes(encoded(smooth(number), "PNG"))
    return tmp_path / "in"


@pytest.mark.parametrize(
    ("container", "dtype", "store"),
    [
        ("parquet", "float16", "mode"),
        ("parquet", "bfloat16", "moments"),
        ("parquet", "float32", "sample"),
        ("webdataset", "float16", "mode"),
        ("webdataset", "float32", "moments"),
    ],
)
def test_latents_of_one_position_are_stored_read_and_decoded(
    latentmill: Command, micro_vae: Path, source: Path, tmp_path: Path, container: str, dtype: str, store: str
) -> None:
    cache = tmp_path / "c"
    options = ("--format", container, "--dtype", dtype, "--store", store, "--resolution", 8)
    code, _, err = latentmill("encode", source, "--to", cache, "--vae", micro_vae, *options, "--workers", 0)
    assert code == 0, err
    opened = Cache.open(str(cache))
    rows = [row for file in opened.files() for row in opened.rows(file)]
    assert [tuple(to_tensor(row).shape) for row in rows] == [(8 if store == "moments" else 4, 1, 1)] * 2
    assert not torch.equal(*map(to_tensor, rows))
    assert latentmill("verify", cache, "--reencode", 2)[0] == 0
    code, out, err = latentmill("decode", cache, "--to", tmp_path / "p", "--workers", 0)
    assert (code, "decoded 2 images" in out) == (0, True), err
