"""`--backend jax`: whole jobs, what is recorded, and what is refused."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flax")

from jobs import ray_executor, resources
from jobs.encode_options import EncodeOptions
from jobs.resources import ResourcePlan, plan_resources
from latentmill import Cache
from pipeline.errors import UsageError
from tests.conftest import slow_param

Command = Callable[..., tuple[int, str, str]]


def read_latents(cache: Path) -> dict[str, torch.Tensor]:
    opened = Cache.open(str(cache))
    return {row["key"]: opened.raw_latent(row) for file in opened.files() for row in opened.rows(file)}


@pytest.mark.parametrize("container", [slow_param("parquet"), "webdataset"])
def test_a_job_gives_the_latents_of_pytorch(
    encode: Command, latentmill: Command, photos: Path, tmp_path: Path, container: str
) -> None:
    options = ("--dtype", "float32", "--format", container)
    for backend in ("torch", "jax"):
        code, _, err = encode(photos, "--to", tmp_path / backend, "--backend", backend, *options)
        assert code == 0, err
    expected, actual = read_latents(tmp_path / "torch"), read_latents(tmp_path / "jax")
    assert expected.keys() == actual.keys()
    for key in expected:
        torch.testing.assert_close(actual[key], expected[key], atol=1e-4, rtol=1e-4)
    assert json.loads((tmp_path / "jax/cache.json").read_text())["compute"]["backend"] == "jax"
    (commit,) = (json.loads(path.read_text()) for path in (tmp_path / "jax/_commits").iterdir())
    assert commit["compute"]["backend"] == "jax"
    code, out, err = latentmill("verify", tmp_path / "jax", "--reencode", 5)
    assert code == 0, out + err
    assert "5 images encoded again, with the same latents except for rounding" in out


@pytest.mark.slow
def test_the_next_run_has_the_backend_of_the_cache(encode: Command, photos: Path, tmp_path: Path) -> None:
    assert encode(photos, "--backend", "jax", "--rows-per-part", 2)[0] == 0
    for path in (*(tmp_path / "c/_commits").iterdir(), *sorted((tmp_path / "c/data").iterdir())[1:]):
        path.unlink()
    code, _, err = encode(photos)
    assert code == 0, err
    (commit,) = (json.loads(path.read_text()) for path in (tmp_path / "c/_commits").iterdir())
    assert commit["compute"]["backend"] == "jax"
    assert encode(photos, "--max-shards", 0, "--backend", "torch")[0] == 0


def test_previews_are_decoded_by_jax(encode: Command, latentmill: Command, photos: Path, tmp_path: Path) -> None:
    assert encode(photos)[0] == 0
    reports = []
    for backend in ("torch", "jax"):
        code, out, err = latentmill(
            "decode", tmp_path / "c", "--to", tmp_path / backend, "--workers", 0, "--backend", backend, "--json"
        )
        assert code == 0, err
        reports.append(json.loads(out))
    assert reports[1]["psnr"]["mean"] == pytest.approx(reports[0]["psnr"]["mean"], abs=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tile-above", "64"], "--tile-above is for --backend torch: JAX encodes whole images"),
        (["--encoder-form", "compiled"], "--encoder-form compiled is for --backend torch"),
        (["--device", "mps"], "--device mps needs --backend torch"),
        (["--device", "tpu"], "--device tpu: this machine has none"),
    ],
)
def test_what_jax_does_not_have_is_refused(
    encode: Command, photos: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    code, out, err = encode(photos, "--backend", "jax", *options)
    assert (code, out) == (2, "")
    assert message in err
    assert not (tmp_path / "c").exists()


def test_a_precision_that_jax_does_not_have_is_refused() -> None:
    with pytest.raises(UsageError, match="--backend jax computes in fp32 and bf16, not in fp16; use one of them"):
        resources.check_jax_settings("fp16")


def test_a_tpu_needs_jax(encode: Command, photos: Path, tmp_path: Path) -> None:
    code, _, err = encode(photos, "--device", "tpu")
    assert code == 2
    assert "--device tpu needs --backend jax" in err
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("cluster", "options", "device", "reserved", "workers"),
    [
        ({"CPU": 96, "TPU": 4}, {}, "tpu", {"CPU": 1, "TPU": 1}, 4),
        ({"CPU": 96, "TPU": 4, "GPU": 2}, {"device": "cuda"}, "cuda", {"CPU": 1, "GPU": 1.0}, 2),
        ({"CPU": 96, "TPU": 4}, {"device": "cpu", "cpus_per_worker": 8}, "cpu", {"CPU": 8}, 12),
        ({"CPU": 8}, {}, "cpu", {"CPU": 1}, 8),
    ],
)
def test_a_worker_on_a_tpu_reserves_one_chip(
    monkeypatch: pytest.MonkeyPatch,
    cluster: dict[str, float],
    options: dict[str, Any],
    device: str,
    reserved: dict[str, float],
    workers: int,
) -> None:
    started: dict[str, Any] = {}

    class FakeExecutor:
        def __init__(
            self, spec: object, vae: object, workers: int, resources: dict[str, float], *more: object, is_local: bool
        ) -> None:
            started.update(workers=workers, resources=resources)

        def close(self) -> None:
            pass

    monkeypatch.setattr(ray_executor, "connect_to_ray", lambda address: ExitStack())
    monkeypatch.setattr(ray_executor, "count_resource", lambda name: cluster.get(name, 0.0))
    monkeypatch.setattr(ray_executor, "RayExecutor", FakeExecutor)
    given = EncodeOptions(source=("s",), to="c", vae="demo", backend="jax", **options)
    with plan_resources(given) as plan:
        assert plan.device == device
        plan.start_executor(None, None, 100, None)  # type: ignore[arg-type]
    assert started == {"workers": workers, "resources": reserved}


def test_a_cluster_without_tpus_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_executor, "connect_to_ray", lambda address: ExitStack())
    monkeypatch.setattr(ray_executor, "count_resource", lambda name: 0.0)
    options = EncodeOptions(source=("s",), to="c", vae="demo", backend="jax", device="tpu")
    with ExitStack() as stack, pytest.raises(UsageError, match="--device tpu: this machine has no TPUs"):
        _ = ResourcePlan(options, "jax", stack).device
    assert resources.UNMEASURED_BATCH == 8
