"""Opening a cache by its digest, and checking its files."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.cache import stats
from pipeline.cache.reader import Cache
from pipeline.errors import IdentityError
from pipeline.storage.folder import Folder

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cache(latentmill: Command, shards: Path, micro_vae: Path, tmp_path: Path) -> str:
    job = ("encode", shards, "--to", tmp_path / "c", "--vae", micro_vae, "--resolution", 64, "--workers", 0)
    assert latentmill(*job, "--max-shards", 2)[0] == 0
    return str(tmp_path / "c")


def digest_of(cache: str) -> str:
    return str((stats.read_stats(Folder(cache)) or {})["digest"])


def test_an_intact_cache_passes_the_check(cache: str) -> None:
    assert Cache.open(cache, digest=digest_of(cache), verify=True).files()
    assert Cache.open(cache, verify=True).files()
    with pytest.raises(IdentityError, match=r"has the digest [0-9a-f]{64}, not abc"):
        Cache.open(cache, digest="abc")


def test_a_changed_byte_is_found_if_every_file_is_read(cache: str) -> None:
    path = Path(cache, Cache.open(cache).files()[0])
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert Cache.open(cache, digest=digest_of(cache)), "the files are not read without verify"
    with pytest.raises(IdentityError, match=r"the files of the cache .* have the digest .*: they were changed"):
        Cache.open(cache, digest=digest_of(cache), verify=True)


def test_files_that_are_newer_than_the_statistics_are_found(cache: str, latentmill: Command, shards: Path) -> None:
    """A job was killed while it added shards."""
    written = {name: Path(cache, name).read_bytes() for name in ("stats.json", "README.md")}
    vae = Cache.open(cache).info.vae.reference
    assert latentmill("encode", shards, "--to", cache, "--vae", vae, "--workers", 0)[0] == 0
    for name, data in written.items():
        Path(cache, name).write_bytes(data)
    with pytest.raises(IdentityError, match=r"has 3 files, but its stats\.json counts 2: a job is running, or was"):
        Cache.open(cache, digest=digest_of(cache))
