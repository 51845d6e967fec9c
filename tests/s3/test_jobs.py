"""Whole jobs with S3 have the same digest as from disk, even if the store fails in between."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from tests.proxy import Proxy, Request
from tests.servers import KEY, SECRET, await_http, end_sessions, free_port, objects, upload

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def encode(latentmill: Command, micro_vae: Path) -> Command:
    def run(source: object, cache: object, *more: object) -> tuple[int, str, str]:
        options = ("--vae", micro_vae, "--resolution", 64, "--rows-per-part", 4, "--workers", 0, *more)
        return latentmill("encode", source, "--to", cache, *options)

    return run


@pytest.fixture
def local_digest(encode: Command, shards: Path, tmp_path: Path) -> str:
    """Return the digest of the job from disk to disk."""
    assert encode(shards, tmp_path / "local")[0] == 0
    return str(json.loads((tmp_path / "local/stats.json").read_text())["digest"])


def read_digest(cache: str) -> str:
    return str(json.loads(objects(cache)["stats.json"])["digest"])


@pytest.mark.slow
def test_sources_caches_vaes_and_previews_may_be_on_s3(
    latentmill: Command, encode: Command, shards: Path, micro_vae: Path, bucket: str, local_digest: str
) -> None:
    source, vae = upload(shards, f"{bucket}/shards"), upload(micro_vae, f"{bucket}/models/vae")
    code, out, err = encode(source, f"{bucket}/c", "--vae", vae)
    assert (code, "18 rows" in out) == (0, True), err
    assert read_digest(f"{bucket}/c") == local_digest
    assert objects(f"{bucket}/c").keys() >= {"cache.json", "stats.json", "README.md"}
    assert json.loads(objects(f"{bucket}/c")["cache.json"])["vae"]["reference"] == vae
    code, out, _ = latentmill("status", f"{bucket}/c", "--json")
    assert (code, json.loads(out)["state"]) == (0, "done")
    code, out, _ = latentmill("decode", f"{bucket}/c", "--to", f"{bucket}/previews", "--workers", 0, "--json")
    assert (code, json.loads(out)["psnr"] is not None) == (0, True)
    assert "sheets/00000.png" in objects(f"{bucket}/previews")
    assert encode(source, f"{bucket}/c", "--vae", vae)[1].startswith("encoded 0 images")


def test_a_folder_of_images_on_s3_has_the_digest_of_a_local_one(
    encode: Command, photos: Path, bucket: str, tmp_path: Path
) -> None:
    encode(photos, tmp_path / "c")
    code, _, err = encode(upload(photos, f"{bucket}/photos"), f"{bucket}/c")
    assert code == 0, err
    assert read_digest(f"{bucket}/c") == json.loads((tmp_path / "c/stats.json").read_text())["digest"]


def is_part(request: Request) -> bool:
    """Return whether this is the first attempt to write a part."""
    return request.number == 0 and request.method == "PUT" and "/data/" in request.path


@pytest.mark.fault(20, "answers to PUTs are lost, connections reset")
@pytest.mark.parametrize(
    "rule",
    [
        pytest.param(lambda request: 500 if request.number == 0 else None, id="500", marks=pytest.mark.slow),
        pytest.param(lambda request: "reset" if is_part(request) else None, id="reset", marks=pytest.mark.slow),
        pytest.param(lambda request: "lose" if is_part(request) else None, id="lost answers", marks=pytest.mark.slow),
    ],
)
def test_a_store_with_faults_changes_nothing(
    encode: Command,
    shards: Path,
    bucket: str,
    proxy: Proxy,
    local_digest: str,
    rule: Callable[[Request], int | str | None],
) -> None:
    source = upload(shards, f"{bucket}/shards")
    proxy.rule = rule
    code, _, err = encode(source, f"{bucket}/c")
    proxy.rule = lambda request: None
    assert code == 0, err
    assert read_digest(f"{bucket}/c") == local_digest


@pytest.mark.fault(18, "a store that answers 500 for ever")
@pytest.mark.slow
def test_a_store_that_always_fails_ends_the_job_with_one_line(
    encode: Command, shards: Path, bucket: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = upload(shards, f"{bucket}/shards")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    end_sessions()
    proxy.rule = lambda request: 500 if request.method == "PUT" and "/data/" in request.path else None
    code, out, err = encode(source, f"{bucket}/c", "--stall-timeout", 3)
    assert code == 1
    assert "failed" in out + err
    assert f"cannot write {bucket}/c/data/" in out + err
    proxy.rule = lambda request: 403 if request.path.endswith("/cache.json") else None
    code, _, err = encode(source, f"{bucket}/c")
    assert code == 1
    assert err.strip().splitlines()[-1].startswith(f"latentmill: cannot read {bucket}/c/cache.json: permission denied")


def test_options_replace_the_environment_and_no_secret_is_stored(
    encode: Command, shards: Path, endpoint: str, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = upload(shards, f"{bucket}/shards")
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("MY_SECRET", SECRET)
    end_sessions()
    options = {"endpoint_url": endpoint, "key": KEY, "secret": "env:MY_SECRET"}
    flags = [text for name, value in options.items() for text in ("--storage-option", f"{name}={value}")]
    code, out, err = encode(source, f"{bucket}/c", *flags)
    assert code == 0, err
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    end_sessions()
    files = objects(f"{bucket}/c")
    assert len(files) > 10
    assert not [name for name, data in files.items() if SECRET.encode() in data]
    assert SECRET not in out + err


@pytest.fixture
def unconditional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Start rclone's server, which ignores conditions, and return the URL of a bucket on it."""
    rclone = Path(sys.executable).with_name("rclone")
    if not rclone.exists():
        pytest.skip("rclone is not installed (extra peers)")
    (tmp_path / "rclone/bucket").mkdir(parents=True)
    port = free_port()
    argv = [
        str(rclone),
        "serve",
        "s3",
        tmp_path / "rclone",
        "--addr",
        f"127.0.0.1:{port}",
        "--auth-key",
        f"{KEY},{SECRET}",
    ]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        await_http(f"http://127.0.0.1:{port}/", server)
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
        }.items():
            monkeypatch.setenv(name, value)
        end_sessions()
        yield "s3://bucket"
        server.terminate()


@pytest.mark.slow
def test_a_store_without_conditional_writes_allows_one_job_at_a_time(
    encode: Command, shards: Path, unconditional: str, local_digest: str
) -> None:
    code, _, err = encode(shards, f"{unconditional}/c")
    assert code == 0, err
    assert "has no conditional creates: run one job at a time" in err
    assert read_digest(f"{unconditional}/c") == local_digest
    fs = fsspec.filesystem("s3")
    (run,) = fs.glob("bucket/c/_runs/*.json")
    record = json.loads(fs.cat_file(run))
    assert record["conditional_creates"] is False
    fs.pipe_file(run, json.dumps({**record, "outcome": "running"}).encode())
    code, _, err = encode(shards, f"{unconditional}/c")
    assert code == 1
    assert f"another run (started {record['started']}) is writing to" in err
