"""Sources on one account, the cache on another: here two servers, one of which is read without keys."""

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
    """A second server, with shards in s3://public; no server is in the environment."""
    with moto() as url, Proxy(url) as between:
        fs = fsspec.filesystem("s3", key=KEY, secret=SECRET, endpoint_url=url)
        fs.mkdir("public")
        for path in shards.iterdir():
            fs.pipe_file(f"public/shards/{path.name}", path.read_bytes(), ACL="public-read")
        yield between
        end_sessions()


@pytest.fixture
def private(endpoint: str, bucket: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The options for the bucket's server, which only options say."""
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    end_sessions()
    monkeypatch.setenv("MINE", SECRET)
    return [f"endpoint_url={endpoint}", f"key={KEY}", "secret=env:MINE"]


def flags(name: str, options: list[str]) -> list[str]:
    return [word for pair in options for word in (name, pair)]


@pytest.mark.slow
def test_every_verb_reads_sources_on_an_account_of_their_own(
    latentmill: Command, micro_vae: Path, bucket: str, public: Proxy, private: list[str], tmp_path: Path
) -> None:
    cache, mine = f"{bucket}/c", flags("--storage-option", private)
    theirs = flags("--source-option", [f"endpoint_url={public.url}", "anon=true"])
    sources = "s3://public/shards"
    argv = ["encode", sources, "--to", cache, "--vae", micro_vae, "--resolution", 64, "--workers", 0]
    code, _, err = latentmill(*argv, *mine)
    assert code == 2, "without options of their own, the sources are looked for on the cache's server"
    assert "there is no source at s3://public/shards" in err
    rejecting = ["--input-limit", "image_bytes=1500", "--max-reject-rate", 1]
    code, _, err = latentmill(*argv, *mine, *theirs, *rejecting)
    assert code == 0, err
    code, out, err = latentmill("retry", cache, "--workers", 0, "--json", *mine, *theirs)
    assert (code, json.loads(out)["rejected"]) == (0, {}), err
    assert json.loads(out)["rows"] > 0
    proofs = ["--recount", "--reencode", 3, "--vae", micro_vae]
    code, out, err = latentmill("verify", cache, *proofs, *mine, *theirs)
    assert code == 0, out + err
    code, out, err = latentmill("verify", cache, *proofs, *mine, *theirs, "--source", sources)
    assert code == 0, out + err
    code, out, err = latentmill("decode", cache, "--to", tmp_path / "p", "--workers", 0, "--json", *mine, *theirs)
    assert (code, json.loads(out)["notes"]) == (0, []), err
    assert json.loads(out)["psnr"] is not None
    code, out, _ = latentmill("verify", cache, *proofs, *mine)
    assert code == 1
    assert "it cannot be counted" in out
    assert any("shards" in request.path for request in public.seen)
    assert not public.signed, "nothing was signed for the public account"
    fs = fsspec.filesystem("s3", key=KEY, secret=SECRET, endpoint_url=private[0].partition("=")[2])
    for name in fs.find(cache):
        assert SECRET.encode() not in fs.cat_file(name)


@pytest.mark.slow
@pytest.mark.ray
def test_workers_read_sources_on_an_account_of_their_own(
    latentmill: Command, micro_vae: Path, bucket: str, public: Proxy, private: list[str], tmp_path: Path
) -> None:
    """And a file says it as flags do."""
    config = tmp_path / "job.yaml"
    theirs = [f"endpoint_url={public.url}", "anon=true"]
    config.write_text(yaml.safe_dump({"storage_option": private, "source-option": theirs}))
    argv = ["encode", "s3://public/shards", "--to", f"{bucket}/c", "--vae", micro_vae, "--resolution", 64]
    code, out, err = latentmill(*argv, "--workers", 1, "--config", config, "--json")
    assert code == 0, err
    assert json.loads(out)["stats"]["count"] == 18
    assert not public.signed


def test_what_is_no_option_names_its_flag(latentmill: Command, shards: Path, micro_vae: Path, tmp_path: Path) -> None:
    argv = ["encode", shards, "--to", tmp_path / "c", "--vae", micro_vae, "--workers", 0]
    code, _, err = latentmill(*argv, "--source-option", "anon")
    assert (code, err) == (2, "latentmill: --source-option must be KEY=VALUE, not 'anon'\n")
    code, _, err = latentmill(*argv, "--source-option", "key=env:NOWHERE")
    assert (code, err) == (2, "latentmill: --source-option key: the environment variable NOWHERE is not set\n")
