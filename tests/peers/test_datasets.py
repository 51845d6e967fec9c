"""Data sets that Hugging Face `datasets` saved are encoded, in the order and with the columns that it gives back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.conftest import encoded, smooth

datasets = pytest.importorskip("datasets")
Command = Callable[..., tuple[int, str, str]]

pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::DeprecationWarning"
)


@pytest.fixture
def dataset() -> Any:
    """Return a data set of ten images with texts and labels."""
    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    images = [{"bytes": encoded(smooth(n, 72, 80)), "path": f"{n}.jpg"} for n in range(10)]
    columns = {"image": images, "text": [f"text {n}" for n in range(10)], "label": [n % 2 for n in range(10)]}
    return datasets.Dataset.from_dict(columns, features=features)


def encode(latentmill: Command, vae: Path, source: Path, cache: Path) -> tuple[list[dict[str, Any]], str]:
    """Return the rows of the files in the order of their inputs, and the messages."""
    argv = ("--to", cache, "--vae", vae, "--resolution", 64, "--workers", 0)
    code, _, err = latentmill("encode", source, *argv)
    assert code == 0, err
    rows = [row for path in (cache / "data").iterdir() for row in pq.read_table(path).to_pylist()]
    return sorted(rows, key=lambda row: (row["shard"], int(row["key"]))), err


@pytest.mark.slow
def test_a_saved_data_set_is_encoded(latentmill: Command, micro_vae: Path, tmp_path: Path, dataset: Any) -> None:
    """Its rows were chosen and reordered, and `datasets` has cached the result of a transform beside them."""
    chosen = dataset.shuffle(seed=1).select(range(7))
    chosen.save_to_disk(tmp_path / "saved", num_shards=2)
    datasets.load_from_disk(tmp_path / "saved").map(lambda row: {"text": row["text"] + "!"}, keep_in_memory=False)
    assert list((tmp_path / "saved").glob("cache-*.arrow"))
    rows, err = encode(latentmill, micro_vae, tmp_path / "saved", tmp_path / "cache")
    assert [(row["text"], row["label"]) for row in rows] == list(zip(chosen["text"], chosen["label"], strict=True))
    assert {row["shard"] for row in rows} == {f"saved/data-0000{n}-of-00002.arrow" for n in range(2)}
    assert "INFO passed over 1 Arrow files with results of transforms of datasets (cache-*.arrow)" in err
    dataset.to_parquet(tmp_path / "p/0.parquet")
    others, _ = encode(latentmill, micro_vae, tmp_path / "p", tmp_path / "parquet-cache")
    latents = {row["text"]: row["latent"] for row in others}
    assert all(row["latent"] == latents[row["text"]] for row in rows)


def test_the_splits_of_a_saved_data_set_are_encoded(
    latentmill: Command, micro_vae: Path, tmp_path: Path, dataset: Any
) -> None:
    splits = datasets.DatasetDict(train=dataset.select(range(3)), test=dataset.select(range(3, 5)))
    splits.save_to_disk(tmp_path / "saved")
    rows, err = encode(latentmill, micro_vae, tmp_path / "saved", tmp_path / "cache")
    assert [(row["shard"].split("/")[1], row["text"]) for row in rows] == [
        *[("test", "text 3"), ("test", "text 4")],
        *[("train", f"text {n}") for n in range(3)],
    ]
    assert err == ""
