"""How the options about the encoder's form and the batch size become the settings of workers and of cache.json."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from jobs import cache_spec, report, verify
from jobs.encode_options import EncodeOptions
from jobs.resources import ResourcePlan
from latentmill.cache_info import ComputeInfo
from pipeline import tuning
from pipeline.encoder import ComputeConfig
from pipeline.errors import UsageError
from pipeline.tuning import BATCH_SIZES, Candidates

FORMS = ("plain", "fused", "compiled")
CHOSEN = ComputeInfo(backend="torch", device="cuda", batch_size=None, threads=1, form="auto")
SET = ComputeInfo(backend="torch", device="cuda", batch_size=16, threads=1, form="fused")
ON_CPU = ComputeInfo(backend="torch", device="cpu", batch_size=1, threads=1, form="plain")


def make_options(**given: Any) -> EncodeOptions:
    return EncodeOptions(source=("s",), to="c", vae="demo", **given)


def make_plan(device: str, options: EncodeOptions) -> ResourcePlan:
    plan = ResourcePlan(options, "torch", ExitStack())
    plan._device = device
    return plan


@pytest.mark.parametrize(
    ("device", "given", "expected"),
    [
        ("cuda", {}, Candidates(FORMS, BATCH_SIZES)),
        ("cuda", {"encoder_form": "fused"}, Candidates(("fused",), BATCH_SIZES)),
        ("cuda", {"batch_size": 24}, Candidates(FORMS, (24,))),
        ("cuda", {"batch_size": 24, "encoder_form": "plain"}, None),
        ("cpu", {}, None),
        ("mps", {}, None),
    ],
)
def test_workers_choose_what_is_not_set_on_cuda(
    device: str, given: dict[str, Any], expected: Candidates | None
) -> None:
    options = make_options(**given)
    plan = make_plan(device, options)
    assert plan.candidates(options.batch_size, options.encoder_form) == expected
    described = cache_spec.describe_compute(options, plan, "fp32")
    compute = plan.compute("fp32", options.batch_size, options.encoder_form)
    if expected is None:
        assert (described.batch_size, described.form) == (compute.batch_size, compute.form)
    else:
        assert described.batch_size == given.get("batch_size")
        assert described.form == given.get("encoder_form", "auto")
        assert compute.batch_size == max(expected.batch_sizes), "an upper bound"


@pytest.mark.parametrize(
    ("recorded", "device", "given", "expected"),
    [
        (CHOSEN, "cuda", (0, "auto"), (0, "auto")),
        (SET, "cuda", (0, "auto"), (16, "fused")),
        (SET, "cuda", (8, "plain"), (8, "plain")),
        (SET, "cpu", (0, "auto"), (0, "auto")),
        (ON_CPU, "cuda", (0, "auto"), (0, "auto")),
    ],
)
def test_a_later_run_on_cuda_has_the_settings_of_the_cache(
    recorded: ComputeInfo, device: str, given: tuple[int, Any], expected: tuple[int, str]
) -> None:
    assert cache_spec.inherit_compute(recorded, "torch", device, *given) == expected


@pytest.mark.parametrize(
    ("recorded", "given", "expected"),
    [
        (CHOSEN, {}, []),
        (CHOSEN, {"batch_size": 8, "encoder_form": "plain"}, []),
        (SET, {"batch_size": 8}, ["--batch-size 16, this command has --batch-size 8"]),
        (SET, {"batch_size": 16, "encoder_form": "plain"}, ["--encoder-form fused, this command has --encoder-form"]),
        (ON_CPU, {}, ["--device cpu, this command has --device cuda"]),
    ],
)
def test_differences_from_the_cache_are_noted(
    recorded: ComputeInfo, given: dict[str, Any], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    monkeypatch.setattr(cache_spec, "log_note", notes.append)
    options = make_options(**given)
    plan = make_plan("cuda", options)
    size, form = cache_spec.inherit_compute(recorded, "torch", "cuda", options.batch_size, options.encoder_form)
    cache_spec.note_differences(recorded, plan.compute("fp16", size, form), plan.candidates(size, form))
    assert len(notes) == len(expected)
    for note, text in zip(notes, expected, strict=True):
        assert text in note


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_the_fused_form_is_refused_on_other_devices(device: str) -> None:
    plan = make_plan(device, make_options())
    with pytest.raises(UsageError, match=f"--encoder-form fused is for CUDA GPUs, and this job runs on {device}"):
        plan.compute("fp32", 0, "fused")


def test_a_job_lets_its_worker_choose_and_says_what_was_chosen(
    latentmill: Callable[..., tuple[int, str, str]],
    shards: Path,
    micro_vae: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The CPU stands for a GPU here. A second run takes the choice of the first."""
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Test")
    monkeypatch.setattr(tuning, "SECONDS_PER_SIZE", 0.0)
    monkeypatch.setattr(ResourcePlan, "candidates", lambda *_: Candidates(("plain",), (1, 2)))
    command = ["encode", shards, "--to", tmp_path / "c", "--vae", micro_vae, "--resolution", 64, "--workers", 0]
    code, _, errors = latentmill(*command, "--max-shards", 1)
    assert code == 0, errors
    assert "encoder on NVIDIA Test: plain (attention sdpa), batches of " in errors
    assert json.loads((tmp_path / "c/cache.json").read_text())["compute"] | {"threads": 1} == {
        "backend": "torch",
        "device": "cpu",
        "batch_size": None,
        "threads": 1,
        "form": "auto",
    }
    choice = (tmp_path / "c/_compute/NVIDIA-Test.json").read_bytes()
    code, _, errors = latentmill(*command)
    assert code == 0, errors
    assert (tmp_path / "c/_compute/NVIDIA-Test.json").read_bytes() == choice
    code, _, errors = latentmill("verify", tmp_path / "c", "--reencode", 2)
    assert code == 0, errors


@pytest.mark.parametrize(
    ("job", "argv"),
    [(verify, ("verify", "c", "--reencode", 1)), (report, ("report", "c", "--to", "r.html"))],
    ids=["verify", "report"],
)
def test_checks_use_the_gpu_of_a_mac(
    latentmill: Callable[..., tuple[int, str, str]],
    shards: Path,
    micro_vae: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    job: ModuleType,
    argv: tuple[object, ...],
) -> None:
    """The command ends before it computes."""
    devices: list[str] = []

    def stop(_cache: object, _info: object, compute: ComputeConfig, *_: object) -> None:
        devices.append(compute.device)
        raise UsageError("stopped by the test")

    monkeypatch.chdir(tmp_path)
    assert latentmill("encode", shards, "--to", "c", "--vae", micro_vae, "--resolution", 64, "--workers", 0)[0] == 0
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(job, "make_encode_spec", stop)
    assert latentmill(*argv)[0] == 2
    assert devices == ["mps"]
