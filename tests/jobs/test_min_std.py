"""Jobs with `--min-std`: near-empty images are left out and counted."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from latentmill import Cache
from tests.conftest import encoded, smooth

Command = Callable[..., tuple[int, str, str]]


def test_near_empty_images_are_filtered_and_counted(latentmill: Command, micro_vae: Path, tmp_path: Path) -> None:
    def encode(*argv: object) -> tuple[int, str, str]:
        return latentmill("encode", *argv, "--vae", micro_vae, "--resolution", 64, "--workers", 0)

    images = {"blank": np.full((64, 64, 3), 250, np.uint8), "a": smooth(0, 64, 64), "b": smooth(1, 64, 64)}
    for name, pixels in images.items():
        (tmp_path / "p").mkdir(exist_ok=True)
        (tmp_path / "p" / f"{name}.png").write_bytes(encoded(pixels, "PNG"))
    (tmp_path / "job.yaml").write_text("min-std: 2\n")
    to_c, to_d = (tmp_path / "p", "--to", tmp_path / "c"), (tmp_path / "p", "--to", tmp_path / "d")
    _, out, _ = encode(*to_c, "--config", tmp_path / "job.yaml")
    cache = Cache.open(str(tmp_path / "c"))
    assert [row["key"] for row in cache.rows(*cache.files())] == ["a", "b"]
    assert "filtered   1: 1 min_std\n" in out
    code, out, _ = latentmill("verify", tmp_path / "c", "--recount")
    assert code == 0, out
    assert encode(*to_c)[0] == 0, "the cache's value is the default"
    code, _, err = encode(*to_c, "--min-std", 3)
    assert (code, "--min-std 2, this command has --min-std 3" in err) == (2, True)
    for value in ("-1", "128"):
        code, _, err = encode(*to_d, "--min-std", value)
        assert (code, "--min-std must be from 0 to 127.5, " in err) == (2, True)
