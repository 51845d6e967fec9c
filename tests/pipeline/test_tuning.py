"""The choice of the encoder's form and batch size: what wins, what is refused, and who takes whose choice."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import tuning
from pipeline.encoder import ComputeConfig
from pipeline.errors import CacheError, VaeError
from pipeline.flow import UnitWorker
from pipeline.records import AttentionKernel, Form
from pipeline.storage.folder import Folder
from pipeline.tuning import BATCH_SIZES, Candidates, Choice
from pipeline.weights import Vae

CUDA = ComputeConfig(device="cuda", precision="fp16", batch_size=32, threads=1)
CPU = ComputeConfig(device="cpu", precision="fp32", batch_size=32, threads=1)
ALL = Candidates(("plain", "fused", "compiled"), (4, 8, 16, 32))
SQUARE = ((512, 512),)
Variant = tuple[Form, AttentionKernel]
Rate = float | Callable[[int], float]
EXACT = torch.linspace(-1, 1, 100, dtype=torch.float64)


class FakeTrial:
    """A model with a throughput by batch size. The clock advances by `seconds` with each measurement."""

    def __init__(self, gpu: "FakeGpu", compute: ComputeConfig) -> None:
        self.gpu, self.variant = gpu, (compute.form, compute.attention)
        self.is_exact = compute.precision == "fp32"
        if not self.is_exact and isinstance(error := gpu.rates[self.variant], Exception):
            raise error
        gpu.open += 1

    def encode_checked_images(self) -> torch.Tensor:
        return EXACT if self.is_exact else EXACT * (1 + self.gpu.errors.get(self.variant, 1e-3))

    def measure(self, height: int, width: int, batch_size: int) -> float:
        self.gpu.calls.append((*self.variant, batch_size, height, width))
        self.gpu.now += self.gpu.seconds
        rate = self.gpu.rates[self.variant]
        assert not isinstance(rate, Exception)
        return rate(batch_size) if callable(rate) else rate

    def close(self) -> None:
        self.gpu.open -= 1


class FakeGpu:
    """A GPU with the throughput, or the exception, and the error of the latents of each variant."""

    def __init__(self, rates: Mapping[Variant, Rate | Exception], seconds: float = 1.0, **errors: float) -> None:
        default: dict[Variant, Rate | Exception] = dict.fromkeys(tuning.VARIANTS, 1.0)
        self.rates = {**default, **rates}
        self.errors: dict[Variant, float] = {(form, "sdpa"): error for form, error in errors.items()}  # type: ignore[misc]
        self.seconds = seconds
        self.calls: list[tuple[Form, AttentionKernel, int, int, int]] = []
        self.now = 0.0
        self.open = 0

    def choose(
        self,
        candidates: Candidates = ALL,
        shapes: Sequence[tuple[int, int]] = SQUARE,
        tile_above: int | None = None,
    ) -> Choice:
        choice = tuning.choose(
            lambda compute: FakeTrial(self, compute), CUDA, candidates, shapes, tile_above, "GPU", lambda: self.now
        )
        assert not self.open, "each trial frees its memory"
        return choice


def grow_until(batch_size: int, rate: float) -> Callable[[int], float]:
    """Return a throughput that grows with the batch up to a size."""
    return lambda size: rate * min(size, batch_size) / batch_size


def out_of_memory_from(batch_size: int) -> Callable[[int], float]:
    def measure(size: int) -> float:
        if size >= batch_size:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return 100.0 + size

    return measure


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({("fused", "sdpa"): 400.0, ("plain", "sdpa"): 200.0}, ("fused", "sdpa")),
        ({("fused", "sdpa"): 400.0, ("fused", "per-image"): 420.0}, ("fused", "per-image")),
        ({("fused", "sdpa"): 400.0, ("plain", "sdpa"): 500.0}, ("plain", "sdpa")),
        ({("fused", "sdpa"): 400.0, ("compiled", "sdpa"): 500.0}, ("compiled", "sdpa")),
    ],
)
def test_the_fastest_form_wins(rates: Mapping[Variant, Rate], expected: Variant) -> None:
    gpu = FakeGpu(rates)
    choice = gpu.choose()
    assert (choice.form, choice.attention) == expected
    assert choice.images_per_second == max(result.images_per_second for result in choice.measured)
    assert {(result.form, result.attention) for result in choice.measured} == set(tuning.VARIANTS)
    assert not choice.left_out


def test_the_smallest_batch_that_is_nearly_the_fastest_is_chosen() -> None:
    gpu = FakeGpu({("fused", "sdpa"): grow_until(16, 400.0), ("fused", "per-image"): 401.0})
    choice = gpu.choose()
    assert choice.batch_size == 16
    assert [call[2] for call in gpu.calls] == [4, 8, 16, 32, 16, 16, 16], "only the first form is measured with all"
    assert FakeGpu({("fused", "sdpa"): lambda size: 399.0 + size / 32}).choose().batch_size == 4


def test_a_batch_that_does_not_fit_ends_the_larger_ones() -> None:
    choice = FakeGpu({("fused", "sdpa"): out_of_memory_from(16)}).choose()
    assert (choice.form, choice.batch_size) == ("fused", 8)
    assert [(left.form, left.batch_size, left.reason) for left in choice.left_out] == [("fused", 16, "out of memory")]


def test_a_wrong_kernel_is_refused_by_name() -> None:
    choice = FakeGpu({("fused", "sdpa"): 900.0, ("plain", "sdpa"): 100.0}, fused=0.2).choose()
    assert (choice.form, choice.attention) == ("fused", "per-image") or choice.form == "plain"
    (left,) = choice.left_out
    assert (left.form, left.attention) == ("fused", "sdpa")
    assert left.reason == "its latents are off by 20.0% of their size (at most 5% is normal)"
    assert all((result.form, result.attention) != ("fused", "sdpa") for result in choice.measured)


def test_latents_that_are_not_finite_are_refused_except_for_torchs_own_kernels() -> None:
    choice = FakeGpu({("plain", "sdpa"): 5.0}, fused=float("inf"), plain=float("inf"), compiled=float("nan")).choose()
    assert choice.form == "plain"
    reasons = {left.form: left.reason for left in choice.left_out}
    assert reasons == {"fused": "its latents are not finite", "compiled": "its latents are not finite"}


def test_a_form_that_cannot_be_built_is_left_out_with_its_reason() -> None:
    missing = VaeError("the form fused needs the package triton, which is not installed: pip install triton\nmore")
    rates: dict[Variant, Any] = {("fused", "sdpa"): missing, ("fused", "per-image"): missing}
    choice = FakeGpu({**rates, ("compiled", "sdpa"): ValueError()}).choose()
    assert choice.form == "plain"
    assert [left.reason for left in choice.left_out] == [
        "VaeError: the form fused needs the package triton, which is not installed: pip install triton"
    ] * 2 + ["ValueError"]
    assert [result.batch_size for result in choice.measured] == [4, 8, 16, 32], "plain is now the first that works"


def test_an_error_names_every_form_if_none_works() -> None:
    gpu = FakeGpu(dict.fromkeys(tuning.VARIANTS, RuntimeError("no kernel image")))
    with pytest.raises(VaeError, match=r"no form of the encoder works on GPU: fused \(sdpa\): RuntimeError: no kernel"):
        gpu.choose()


def test_a_form_that_breaks_the_device_ends_the_benchmark() -> None:
    gpu = FakeGpu({("fused", "sdpa"): RuntimeError("CUDA error: an illegal memory access was encountered")})
    with pytest.raises(VaeError, match=r"the form fused fails on this GPU .*illegal.*use --encoder-form plain"):
        gpu.choose()


def test_no_measurement_is_started_when_the_time_is_over() -> None:
    choice = FakeGpu({("plain", "sdpa"): 900.0}, seconds=tuning.SECONDS / 2 + 1).choose()
    assert [(result.form, result.batch_size) for result in choice.measured] == [("fused", 4), ("fused", 8)]
    assert [(left.form, left.batch_size) for left in choice.left_out] == [
        ("fused", 16),
        ("fused", None),
        ("plain", None),
        ("compiled", None),
    ]
    assert "25 seconds of the benchmark were over" in choice.left_out[0].reason


def test_buckets_are_represented_by_the_largest_and_are_not_compiled() -> None:
    gpu = FakeGpu({})
    choice = gpu.choose(shapes=((512, 512), (768, 384), (640, 448)))
    assert {call[3:] for call in gpu.calls} == {(768, 384)}
    assert [left.reason for left in choice.left_out] == ["it would be compiled for each of 3 shapes"]
    gpu.choose(shapes=((512, 512), (1024, 768)), tile_above=640)
    assert gpu.calls[-1][3:] == (640, 640)
    only = gpu.choose(Candidates(("compiled",), (8,)), shapes=((512, 512), (768, 384)))
    assert (only.form, only.batch_size) == ("compiled", 8), "the user has set it"


@pytest.mark.parametrize(
    ("side", "expected"), [(256, (4, 8, 16, 32)), (512, (4, 8, 16, 32)), (1024, (1, 2, 4, 8)), (8192, (1,))]
)
def test_batches_have_at_most_2_to_the_31_values(side: int, expected: tuple[int, ...]) -> None:
    candidates = Candidates(("fused",), BATCH_SIZES)
    assert tuning.limit_batch_sizes(candidates, 128, ((side, side),), None).batch_sizes == expected
    given = Candidates(("fused",), (64,))
    assert tuning.limit_batch_sizes(given, 128, ((side, side),), None) == given


class Gpu:
    """Replaces the GPU of this process, and counts the benchmarks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch, self.benchmarks = monkeypatch, 0
        self.install("NVIDIA H100 80GB HBM3", {("fused", "sdpa"): grow_until(16, 400.0)})

    def install(self, name: str, rates: Mapping[Variant, Rate]) -> None:
        gpu = FakeGpu(rates)

        def open_trial(vae: Vae, compute: ComputeConfig, tile_above: int | None) -> FakeTrial:
            self.benchmarks += compute.precision == "fp32"  # the exact latents are computed once
            return FakeTrial(gpu, compute)

        self.monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
        self.monkeypatch.setattr(tuning, "GpuTrial", open_trial)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")  # removed again after the test
    return Gpu(monkeypatch)


def choose_compute(cache: Folder, vae: Vae, candidates: Candidates = ALL, bound: int = 32) -> ComputeConfig:
    compute = dataclasses.replace(CUDA, batch_size=bound)
    return tuning.choose_compute(cache, vae, compute, candidates, SQUARE, None)


def test_later_workers_take_the_published_choice(gpu: Gpu, root: str, vae: Vae) -> None:
    cache = Folder(root)
    first = choose_compute(cache, vae)
    assert (first.form, first.attention, first.batch_size) == ("fused", "sdpa", 16)
    assert cache.list_files("_compute") == ["NVIDIA-H100-80GB-HBM3.json"]
    gpu.install("NVIDIA H100 80GB HBM3", {("plain", "sdpa"): 900.0})
    assert choose_compute(cache, vae) == first
    assert gpu.benchmarks == 1
    content = json.loads(cache.read("_compute/NVIDIA-H100-80GB-HBM3.json"))
    assert (content["images_per_second"], content["height"], content["width"]) == (400.0, 512, 512)


def test_each_kind_of_gpu_has_its_own_choice(gpu: Gpu, root: str, vae: Vae) -> None:
    cache = Folder(root)
    choose_compute(cache, vae)
    gpu.install("NVIDIA A10G", {("plain", "sdpa"): 900.0})
    assert choose_compute(cache, vae).form == "plain"
    assert cache.list_files("_compute") == ["NVIDIA-A10G.json", "NVIDIA-H100-80GB-HBM3.json"]
    lines = tuning.describe_choices(cache)
    assert "encoder on NVIDIA A10G: plain (attention sdpa), batches of 4; it had 900.0 images/s at 512x512" in lines[0]


def test_of_workers_that_measure_at_the_same_time_all_take_the_first_choice(
    gpu: Gpu, root: str, vae: Vae, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, measure = Folder(root), tuning.choose

    def publish_another_meanwhile(*arguments: Any) -> Choice:
        choice = measure(*arguments)
        tuning.publish_choice(cache, dataclasses.replace(choice, form="plain", batch_size=2))
        return choice

    monkeypatch.setattr(tuning, "choose", publish_another_meanwhile)
    chosen = choose_compute(cache, vae)
    assert (chosen.form, chosen.batch_size) == ("plain", 2)


@pytest.mark.parametrize(
    ("candidates", "expected"),
    [
        (Candidates(("plain", "fused", "compiled"), (3,)), ("fused", "per-image", 3)),
        (Candidates(("plain",), (4, 8, 16, 32)), ("plain", "sdpa", 16)),
        (Candidates(("fused",), (4, 8, 16, 32)), ("fused", "per-image", 16)),
    ],
)
def test_what_the_user_has_set_remains(
    gpu: Gpu, root: str, vae: Vae, candidates: Candidates, expected: tuple[Form, AttentionKernel, int]
) -> None:
    gpu.install("NVIDIA L4", {("fused", "sdpa"): grow_until(16, 400.0), ("fused", "per-image"): 500.0})
    choose_compute(Folder(root), vae)
    chosen = choose_compute(Folder(root), vae, candidates)
    assert (chosen.form, chosen.attention, chosen.batch_size) == expected
    assert gpu.benchmarks == 1


def test_a_worker_with_smaller_batches_keeps_them(gpu: Gpu, root: str, vae: Vae) -> None:
    assert choose_compute(Folder(root), vae, bound=8).batch_size == 8


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda data: data[:-9], "is corrupt: it is not a JSON object"),
        (lambda data: data.replace(b"400.0", b"401.0"), "does not have its own sha256; remove it, and the next run"),
        (lambda data: b'{"form": "plain"}', "does not have its own sha256"),
    ],
)
def test_a_damaged_choice_is_named(gpu: Gpu, root: str, vae: Vae, damage: Callable[[bytes], bytes], text: str) -> None:
    cache = Folder(root)
    choose_compute(cache, vae)
    name = "_compute/NVIDIA-H100-80GB-HBM3.json"
    cache.replace(name, damage(cache.read(name)))
    with pytest.raises(CacheError, match=f"NVIDIA-H100-80GB-HBM3.json.*{text}"):
        choose_compute(cache, vae)
    (line,) = tuning.describe_choices(cache)
    assert "NVIDIA-H100-80GB-HBM3.json" in line


def test_a_worker_measures_its_device_and_uses_the_choice(
    worker: Callable[..., UnitWorker], vae: Vae, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real measurement, on the CPU. The worker is built with the chosen settings."""
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a CPU")
    monkeypatch.setattr(tuning, "SECONDS_PER_SIZE", 0.0)
    settings = {"compute": CPU, "candidates": Candidates(("plain",), (1, 2))}
    built = worker(tmp_path / "c", **settings).context
    choice = tuning.read_choice(Folder(str(tmp_path / "c")), "a CPU")
    assert choice is not None
    assert [result.batch_size for result in choice.measured] == [1, 2]
    assert all(result.images_per_second > 0 for result in choice.measured)
    assert built.latent_encoder.compute == dataclasses.replace(CPU, batch_size=choice.batch_size)
    assert built.spec.compute == built.latent_encoder.compute
    assert built.spec.candidates is None


def test_a_job_on_a_cpu_writes_no_choice(worker: Callable[..., UnitWorker], unit: Any, tmp_path: Path) -> None:
    worker(tmp_path / "c").run(unit)
    assert not (tmp_path / "c/_compute").exists()
