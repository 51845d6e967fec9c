"""Other libraries read caches without any code of latentmill: both formats, and after an append."""

import io
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.cache.card import describe_features
from tests.conftest import img2dataset_members, write_tar

Command = Callable[..., tuple[int, str, str]]
KEYS = [f"{n:09d}" for n in range(12)]

# The libraries cause these warnings: unclosed streams, and forks in a process with threads.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::DeprecationWarning"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with three tars of four samples, and one without images, which makes an empty part."""
    folder = tmp_path_factory.mktemp("readers") / "shards"
    for number in range(3):
        write_tar(folder / f"{number}.tar", img2dataset_members(4 * number, 4))
    write_tar(folder / "none.tar", {"x.txt": b"no image"})
    return folder


@pytest.fixture
def encode(latentmill: Command, micro_vae: Path, tmp_path: Path) -> Callable[..., Path]:
    def run(source: object, *more: object) -> Path:
        options = ("--vae", micro_vae, "--resolution", 64, "--rows-per-part", 3, "--workers", 0, "--max-reject-rate", 1)
        code, _, err = latentmill("encode", source, "--to", tmp_path / "cache", *options, *more)
        assert code == 0, err
        return tmp_path / "cache"

    return run


@pytest.fixture
def latents(latentmill: Command, source: Path, micro_vae: Path, tmp_path: Path) -> dict[str, np.ndarray]:
    """Return the expected latents by key, read from the parts as docs/cache-format.md describes them."""
    options = ("--vae", micro_vae, "--resolution", 64, "--workers", 0, "--max-reject-rate", 1)
    assert latentmill("encode", source, "--to", tmp_path / "expected", *options)[0] == 0
    rows = [row for path in sorted((tmp_path / "expected/data").iterdir()) for row in pq.read_table(path).to_pylist()]
    return {row["key"]: to_array(row) for row in rows}


def to_array(row: Any) -> np.ndarray:
    assert row["dtype"] == "float16"
    return np.frombuffer(row["latent"], np.float16).reshape(list(row["shape"]))


def check_rows(rows: list[Any], latents: dict[str, np.ndarray]) -> None:
    assert [row["key"] for row in rows] == KEYS
    assert all(np.array_equal(to_array(row), latents[row["key"]]) for row in rows)
    assert all(row["txt"] == f"image {int(row['key'])}" for row in rows)


def test_pyarrow_reads_parquet(encode: Callable[..., Path], source: Path, latents: dict[str, np.ndarray]) -> None:
    check_rows(pyarrow.dataset.dataset(encode(source) / "data").to_table().to_pylist(), latents)


def test_pandas_reads_parquet(encode: Callable[..., Path], source: Path, latents: dict[str, np.ndarray]) -> None:
    pandas = pytest.importorskip("pandas")

    check_rows(pandas.read_parquet(encode(source) / "data").to_dict("records"), latents)


def test_polars_reads_parquet(encode: Callable[..., Path], source: Path, latents: dict[str, np.ndarray]) -> None:
    polars = pytest.importorskip("polars")

    check_rows(polars.read_parquet(encode(source) / "data/*.parquet").to_dicts(), latents)


def test_duckdb_reads_parquet(encode: Callable[..., Path], source: Path, latents: dict[str, np.ndarray]) -> None:
    duckdb = pytest.importorskip("duckdb")

    with duckdb.connect() as connection:
        rows = connection.sql(f"select * from '{encode(source)}/data/*.parquet' order by key").to_arrow_table()
    check_rows(rows.to_pylist(), latents)


def load_dataset(cache: Path, tmp_path: Path) -> Any:
    datasets = pytest.importorskip("datasets")

    datasets.disable_progress_bars()
    return datasets.load_dataset(str(cache), split="train", cache_dir=str(tmp_path / "hub"))


def test_datasets_reads_parquet(
    encode: Callable[..., Path], source: Path, latents: dict[str, np.ndarray], tmp_path: Path
) -> None:
    check_rows(list(load_dataset(encode(source), tmp_path)), latents)


def test_the_card_has_the_columns_that_datasets_finds(
    encode: Callable[..., Path], source: Path, tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    cache = encode(source)
    features = datasets.load_dataset_builder(str(cache), cache_dir=str(tmp_path / "hub")).info.features
    assert features == datasets.Features.from_arrow_schema(pyarrow.dataset.dataset(cache / "data").schema)
    assert features == load_dataset(cache, tmp_path).features


def test_the_card_names_types_as_datasets_does() -> None:
    datasets = pytest.importorskip("datasets")
    point = pa.struct([("x", pa.float16()), ("y", pa.list_(pa.string()))])
    types = [pa.string(), pa.large_string(), pa.binary(), pa.bool_(), pa.uint8(), pa.int64(), pa.float32(), point]
    types += [pa.list_(pa.float64()), pa.list_(pa.list_(pa.int8())), pa.list_(point), pa.large_list(pa.int8())]
    types += [pa.timestamp("us"), pa.timestamp("ns", "UTC"), pa.date32(), pa.duration("s"), pa.time64("us")]
    types += [pa.decimal128(9, 2), pa.large_list(pa.list_(point))]
    names = [f'{number}: "{char}" #' for char in "\u00fc\u2028\U0001f600" for number in range(len(types))]
    schema = pa.schema(list(zip(names, types * 3, strict=True)))
    lines = yaml.safe_load(describe_features(schema))["dataset_info"]["features"]
    assert datasets.Features._from_yaml_list(lines) == datasets.Features.from_arrow_schema(schema)
    assert describe_features(pa.schema([("a", pa.int8()), ("b", pa.map_(pa.string(), pa.int8()))])) == ""


def test_datasets_reads_appended_rows(encode: Callable[..., Path], tmp_path: Path) -> None:
    write_tar(tmp_path / "growing/0.tar", img2dataset_members(0, 4))
    assert len(load_dataset(encode(tmp_path / "growing"), tmp_path)) == 4
    write_tar(tmp_path / "growing/1.tar", img2dataset_members(4, 4))
    assert load_dataset(encode(tmp_path / "growing"), tmp_path)["key"][:] == KEYS[:8]


def test_datasets_reads_tars(
    encode: Callable[..., Path], source: Path, latents: dict[str, np.ndarray], tmp_path: Path
) -> None:
    rows = list(load_dataset(encode(source, "--format", "webdataset"), tmp_path))
    assert [row["__key__"] for row in rows] == KEYS
    assert all(np.array_equal(np.array(row["latent.npy"], np.float16), latents[row["__key__"]]) for row in rows)
    assert [row["latent.json"]["height"] for row in rows] == [64] * 12


@pytest.mark.parametrize("store", ["mode", "moments"])
def test_webdataset_reads_tars(
    encode: Callable[..., Path], source: Path, latents: dict[str, np.ndarray], store: str
) -> None:
    webdataset = pytest.importorskip("webdataset")

    cache = encode(source, "--format", "webdataset", "--store", store)
    tars = sorted(map(str, (cache / "data").glob("*.tar")))
    rows = list(webdataset.WebDataset(tars, shardshuffle=False).decode())
    name = "moments.npy" if store == "moments" else "latent.npy"
    assert [row["__key__"] for row in rows] == KEYS
    assert all(np.array_equal(row[name][:4], latents[row["__key__"]]) for row in rows)
    assert [row["txt"] for row in rows] == [f"image {n}" for n in range(12)]
    assert all(row["latent.json"]["shape"] == list(row[name].shape) for row in rows)


def test_the_tar_command_reads_tars(encode: Callable[..., Path], source: Path) -> None:
    cache = encode(source, "--format", "webdataset")
    for path in sorted((cache / "data").iterdir()):
        listing = subprocess.run(["tar", "-tf", path], check=True, capture_output=True, text=True).stdout.split()
        assert [name for name in listing if name.endswith(".latent.npy")]
    name = next(name for name in listing if name.endswith(".npy"))
    data = subprocess.run(["tar", "-xOf", path, name], check=True, capture_output=True).stdout
    assert np.load(io.BytesIO(data)).shape == (4, 8, 8)
