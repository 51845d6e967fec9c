"""Sources on one account, the cache on another. The tests use two servers, one of them without keys."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
import yaml

from tests.proxy import Proxy
from tests.servers import KEY, SECRET, end_sessions, moto

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def public(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Start a second server with readable shards in s3://public. The environment has no server."""
    with moto() as url, Proxy(url) as proxy:
        fs = fsspec.filesystem("s3", key=KEY, secret=SECRET, endpoint_url=url)
        fs.mkdir("public")
        for path in shards.iterdir():
            fs.pipe_file(f"public/shards/{path.name}", path.read_bytes(), ACL="public-read")
        yield proxy
        end_sessions()


@pytest.fixture
def private(endpoint: str, bucket: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the options for the server of the bucket, and remove it from the environment."""
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    end_sessions()
    monkeypatch.setenv("MY_SECRET", SECRET)
    return [f"endpoint_url={endpoint}", f"key={KEY}", "secret=env:MY_SECRET"]


def make_flags(name: str, options: list[str]) -> list[str]:
    return [word for pair in options for word in (name, pair)]


@pytest.mark.slow
def test_every_command_reads_sources_on_another_account(
    latentmill: Command, micro_vae: Path, bucket: str, public: Proxy, private: list[str], tmp_path: Path
) -> None:
    cache, cache_flags = f"{bucket}/c", make_flags("--storage-option", private)
    source_flags = make_flags("--source-option", [f"endpoint_url={public.url}", "anon=true"])
    sources = "s3://public/shards"
    argv = ["encode", sources, "--to", cache, "--vae", micro_vae, "--resolution", 64, "--workers", 0]
    code, _, err = latentmill(*argv, *cache_flags)
    assert code == 2, "without --source-option, the sources are listed on the server of the cache"
    assert "there is no source at s3://public/shards" in err
    rejecting = ["--input-limit", "image_bytes=1500", "--max-reject-rate", 1]
    code, _, err = latentmill(*argv, *cache_flags, *source_flags, *rejecting)
    assert code == 0, err
    code, out, err = latentmill("retry", cache, "--workers", 0, "--json", *cache_flags, *source_flags)
    assert (code, json.loads(out)["rejected"]) == (0, {}), err
    assert json.loads(out)["rows"] > 0
    checks = ["--recount", "--reencode", 3, "--vae", micro_vae]
    code, out, err = latentmill("verify", cache, *checks, *cache_flags, *source_flags)
    assert code == 0, out + err
    code, out, err = latentmill("verify", cache, *checks, *cache_flags, *source_flags, "--source", sources)
    assert code == 0, out + err
    code, out, err = latentmill(
        "decode", cache, "--to", tmp_path / "p", "--workers", 0, "--json", *cache_flags, *source_flags
    )
    assert (code, json.loads(out)["notes"]) == (0, []), err
    assert json.loads(out)["psnr"] is not None
    code, out, _ = latentmill("verify", cache, *checks, *cache_flags)
    assert code == 1
    assert "it cannot be counted" in out
    assert any("shards" in request.path for request in public.seen)
    assert not public.signed, "no request to the public account is signed"
    fs = fsspec.filesystem("s3", key=KEY, secret=SECRET, endpoint_url=private[0].partition("=")[2])
    for name in fs.find(cache):
        assert SECRET.encode() not in fs.cat_file(name)


@pytest.mark.slow
@pytest.mark.ray
def test_workers_read_sources_on_another_account(
    latentmill: Command, micro_vae: Path, bucket: str, public: Proxy, private: list[str], tmp_path: Path
) -> None:
    """The options come from a configuration file here."""
    config = tmp_path / "job.yaml"
    source_options = [f"endpoint_url={public.url}", "anon=true"]
    config.write_text(yaml.safe_dump({"storage_option": private, "source-option": source_options}))
    argv = ["encode", "s3://public/shards", "--to", f"{bucket}/c", "--vae", micro_vae, "--resolution", 64]
    code, out, err = latentmill(*argv, "--workers", 1, "--config", config, "--json")
    assert code == 0, err
    assert json.loads(out)["stats"]["count"] == 18
    assert not public.signed


def test_an_error_in_an_option_names_its_flag(
    latentmill: Command, shards: Path, micro_vae: Path, tmp_path: Path
) -> None:
    argv = ["encode", shards, "--to", tmp_path / "c", "--vae", micro_vae, "--workers", 0]
    code, _, err = latentmill(*argv, "--source-option", "anon")
    assert (code, err) == (2, "latentmill: --source-option must be KEY=VALUE, not 'anon'\n")
    code, _, err = latentmill(*argv, "--source-option", "key=env:NOWHERE")
    assert (code, err) == (2, "latentmill: --source-option key: the environment variable NOWHERE is not set\n")
