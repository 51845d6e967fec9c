"""The reader for trainers: `from latentmill import Cache`, and latents as tensors."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from latentmill import Cache, CacheError, IdentityError, StorageError
from latentmill.cache_files import hash_files
from latentmill.errors import UsageError
from pipeline.cache.reader import Cache as PipelineCache
from vae import AutoencoderKLConfig
from vae.scaling import scaling_of

ROOT = Path(__file__).parents[2]
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def encode(latentmill: Command, shards: Path, micro_vae: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that makes a cache of 18 images of 64 x 64."""

    def run(*more: object) -> Path:
        argv = ("encode", shards, "--to", tmp_path / "c", "--vae", micro_vae, "--resolution", 64, "--workers", 0)
        code, _, err = latentmill(*argv, *more)
        assert code == 0, err
        return tmp_path / "c"

    return run


def read_digest(cache: Path) -> str:
    return str(json.loads((cache / "stats.json").read_text())["digest"])


@pytest.mark.parametrize("container", ["parquet", "webdataset"])
def test_a_cache_gives_rows_and_tensors_raw_and_scaled(encode: Callable[..., Path], container: str) -> None:
    folder = encode("--format", container)
    cache = Cache.open(str(folder), digest=read_digest(folder), verify=True)
    assert len(cache.files()) == 3
    rows = [row for file in cache.files() for row in cache.rows(file)]
    assert [row["key"] for row in rows] == [f"{number:09d}" for number in range(18)]
    assert rows[3]["txt"] == "image 3"
    raw, model = cache.raw_latent(rows[3]), cache.model_latent(rows[3])
    assert (raw.shape, raw.dtype, model.shape, model.dtype) == ((4, 8, 8), torch.float16, (4, 8, 8), torch.float16)
    assert torch.equal(model, raw * torch.tensor(0.18215, dtype=torch.float16))
    assert torch.equal(
        raw.view(torch.uint8), torch.frombuffer(bytearray(rows[3]["latent"]), dtype=torch.uint8).view(4, 8, 16)
    )
    assert [row["key"] for row in cache.rows(cache.files()[0], wanted=[1, 4])] == ["000000001", "000000004"]
    config = AutoencoderKLConfig.from_dict(cache.info.vae.config)
    assert cache.scaling == scaling_of(config) == PipelineCache.open(str(folder)).scaling


def test_the_model_latent_of_moments_is_the_scaled_mean(encode: Callable[..., Path]) -> None:
    cache = Cache.open(str(encode("--store", "moments", "--max-shards", 1)))
    row = next(cache.rows(cache.files()[0]))
    raw, model = cache.raw_latent(row), cache.model_latent(row)
    assert (raw.shape, model.shape) == ((8, 8, 8), (4, 8, 8))
    assert torch.equal(model, cache.scaling.to_model(raw[:4]))


def test_only_the_requested_columns_are_read(encode: Callable[..., Path]) -> None:
    cache = Cache.open(str(encode("--max-shards", 1)))
    assert list(next(cache.rows(cache.files()[0], columns=["key", "txt"]))) == ["key", "txt"]


def test_a_column_that_the_cache_lacks_is_named(encode: Callable[..., Path]) -> None:
    cache = Cache.open(encode())
    for columns in (["nope"], ["key", "nope"]):
        with pytest.raises(UsageError, match="no column nope; it has key, shard, latent, "):
            list(cache.rows(cache.files()[0], columns))


@pytest.mark.parametrize("container", ["parquet", "webdataset"])
def test_a_damaged_file_is_named(encode: Callable[..., Path], container: str) -> None:
    cache = Cache.open(encode("--format", container))
    path = Path(cache.folder.url_of(cache.files()[0]))
    data = path.read_bytes()
    for content in (data[: len(data) // 2], b"", b"x" * 2048):
        path.write_bytes(content)
        with pytest.raises((CacheError, StorageError), match=str(path)):
            list(cache.rows(cache.files()[0]))


def test_another_digest_and_changed_bytes_are_refused(encode: Callable[..., Path]) -> None:
    folder = encode("--max-shards", 1)
    with pytest.raises(IdentityError, match=r"has the digest [0-9a-f]{64}, not abc"):
        Cache.open(str(folder), digest="abc")
    (path,) = (folder / "data").iterdir()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert Cache.open(str(folder), digest=read_digest(folder)).files(), "without verify, files are not read"
    with pytest.raises(IdentityError, match=r"the files of the cache .* have the digest .*: they were changed"):
        Cache.open(str(folder), verify=True)


def test_a_cache_json_that_lacks_a_field_is_named(encode: Callable[..., Path]) -> None:
    folder = encode("--max-shards", 1)
    content = json.loads((folder / "cache.json").read_text())
    del content["vae"]["scaling_factor"]
    (folder / "cache.json").write_text(json.dumps(content))
    with pytest.raises(
        CacheError, match=rf"^{folder} .* in its cache\.json, the field 'vae\.scaling_factor' is missing$"
    ):
        Cache.open(str(folder))


def test_a_url_without_a_cache_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=rf"there is no latentmill cache at {tmp_path}/x: it has no cache\.json"):
        Cache.open(f"{tmp_path}/x")
    (tmp_path / "f").touch()
    with pytest.raises(StorageError, match=rf"cannot read {tmp_path}/f/cache\.json"):
        Cache.open(f"{tmp_path}/f")
    with pytest.raises(UsageError, match="a URL must not hold a password"):
        Cache.open("s3://key:secret@bucket/c")


def test_a_cache_is_read_from_disk_and_from_a_url(encode: Callable[..., Path], tmp_path: Path) -> None:
    folder = encode("--max-shards", 2)
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/reader/c", recursive=True)
    try:
        on_disk, at_url = Cache.open(f"file://{folder}"), Cache.open("memory://reader/c", verify=True)
        assert on_disk.files() == at_url.files()
        assert on_disk.folder.url == str(folder)
        for file in on_disk.files():
            assert list(on_disk.rows(file)) == list(at_url.rows(file))
    finally:
        memory.rm("/reader", recursive=True)


@pytest.mark.parametrize("container", ["parquet", "webdataset"])
def test_a_truncated_transfer_is_an_error(
    encode: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, container: str
) -> None:
    """A store may send fewer bytes than it announced. A tar that ends after a member looks complete."""
    from fsspec.implementations.local import LocalFileOpener

    folder = encode("--max-shards", 1, "--format", container)
    cache = Cache.open(str(folder))
    (file,) = cache.files()
    read, end = LocalFileOpener.read, (folder / file).stat().st_size // 2 // 512 * 512

    def read_short(self: Any, *size: int) -> bytes:
        start = self.tell()
        return bytes(read(self, *size)[: max(0, end - start)])

    monkeypatch.setattr(LocalFileOpener, "read", read_short)
    with pytest.raises(StorageError, match=rf"{file} ended at byte \d+, but has \d+ bytes: the transfer was cut short"):
        list(cache.rows(file))
    with pytest.raises(StorageError, match="the transfer was cut short"):
        hash_files(cache.folder, [file])


def test_hidden_files_and_folders_are_not_listed(encode: Callable[..., Path]) -> None:
    folder = encode("--max-shards", 1)
    files = Cache.open(str(folder)).files()
    shutil.copy(folder / files[0], folder / "data/.hidden.parquet")
    (folder / "data/below").mkdir()
    assert Cache.open(str(folder)).files() == files


def test_importing_latentmill_imports_no_library() -> None:
    """So `latentmill --help` is fast, and the reader does not need the libraries of the jobs."""
    code = (
        "import sys, latentmill\n"
        "heavy = {'torch', 'numpy', 'pyarrow', 'fsspec'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert set(latentmill.__all__) <= set(dir(latentmill))\n"
        "training = {'Loader', 'Stream', 'draw', 'mix'}\n"
        "others = {'ray', 'yaml', 'PIL', 'vae', 'pipeline', 'jobs'}\n"
        "for names, absent in ((set(latentmill.__all__) - training, others | {'torch'}), (training, others)):\n"
        "    assert all(hasattr(latentmill, name) for name in names)\n"
        "    assert not absent & set(sys.modules), absent & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_importing_latentmill_imports_few_modules() -> None:
    """Their number is what its time depends on; seconds would depend on the machine."""
    code = (
        "import importlib, typing, sys; before = set(sys.modules); import latentmill; print(*set(sys.modules) - before)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60, capture_output=True, text=True)
    assert sorted(run.stdout.split()) == ["latentmill", "latentmill.errors"]


def test_rows_are_opened_and_counted_without_torch(encode: Callable[..., Path]) -> None:
    folder = encode("--max-shards", 1)
    weights = Cache.open(str(folder)).info.identity.weights
    code = (
        "import sys; from latentmill import Cache\n"
        f"cache = Cache.open({str(folder)!r}, vae={weights!r})\n"
        "assert len(cache) == 5 and cache.find('shards/00000.tar', '000000004') == 4\n"
        "assert len(list(cache.rows(cache.files()[0]))) == 5 and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


@pytest.mark.parametrize("annotated", [False, True])
def test_reading_a_local_cache_starts_no_thread(
    encode: Callable[..., Path], latentmill: Command, tmp_path: Path, annotated: bool
) -> None:
    """The end of a process that reads by pyarrow's threads, and has imported torch, is now and then an abort."""
    folder = encode()
    if annotated:
        (tmp_path / "t.jsonl").write_text('{"key": "000000003", "score": 1.5}\n')
        assert latentmill("annotate", folder, "--from", tmp_path / "t.jsonl")[0] == 0
    script = (
        "import os, sys, torch, pyarrow.parquet; from latentmill import Cache\n"
        "count = lambda: len(os.listdir('/proc/self/task'))\n"
        "before, cache = count(), Cache.open(sys.argv[1])\n"
        "rows = [row for file in cache.files() for row in cache.rows(file)]\n"
        "cache.find(rows[7]['shard'], rows[7]['key'])\n"
        "print(len(rows), count() - before)"
    )
    done = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["18", "0"]
