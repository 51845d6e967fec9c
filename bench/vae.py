"""Throughput of the model alone, compared with diffusers' model and with the limits of the machine.

    python -m bench.vae                       # SD at 256 px on this machine's GPU, or its CPU if it has none
    python -m bench.vae --models sd,flux --sizes 256,512,1024 --batch 8 --dtype bfloat16 --device cuda

It needs diffusers and an idle machine. Each variant runs in its own process, with random weights. There is one table
per model, size and direction (encode or decode), with these columns:

- images/s: the median over the batches.
- of limit: the throughput as a fraction of the machine's limit. The limit is measured in the same run, by a large
  matrix product (FLOP/s) and a copy (bytes/s). It is the larger of the times for the counted FLOPs and bytes. The bytes
  are counted as if every convolution and projection read its input and weights once and wrote its output once, and
  nothing else were moved. Winograd convolutions need fewer products than are counted, so they may exceed 100%.
- peak MiB: the peak memory of the process on CPUs, of the device's tensors on GPUs.

The lines below a table compare latentmill (`ours`) with the targets. The exit code is 1 if a target is missed.
"""

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vae import AutoencoderKL
from vae.fast import disable_malloc_trim, optimize_for_cpu

SD: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
# A model with almost no work, to measure the data path beside it.
MICRO: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (8, 8, 8, 8),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
}
MODELS: dict[str, dict[str, Any]] = {
    "micro": MICRO,
    "sd": {**SD, "latent_channels": 4},
    "flux": {**SD, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
}
VARIANTS = ("diffusers", "diffusers channels_last", "diffusers compiled", "ours compiled", "ours")
# Minimum ratio of the throughput of `ours` to that of another variant.
TARGETS = {
    "cpu": {"diffusers": 1.4, "diffusers compiled": 1.0},
    "cuda": {"diffusers": 2.0, "diffusers compiled": 1.3},
}


@dataclass(frozen=True)
class Case:
    """A measurement. side: of the image in pixels. threads: of torch on a CPU. seconds: minimum duration."""

    variant: str
    model: str
    direction: str  # encode or decode
    side: int
    batch: int
    device: str
    dtype: str
    threads: int
    seconds: float


@dataclass(frozen=True)
class Result:
    """Median images/s, and the peak memory in MiB: of the process on CPUs, of the device's tensors on GPUs."""

    rate: float
    memory: float


def build_model(case: Case) -> tuple[nn.Module, torch.memory_format]:
    """Return the variant's model with random weights on its device, and the memory format of its inputs."""
    if case.variant.startswith("ours"):
        disable_malloc_trim()
        model: nn.Module = AutoencoderKL(**MODELS[case.model])
    else:
        from diffusers import AutoencoderKL as Reference

        model = Reference(**MODELS[case.model])
    layout = torch.contiguous_format if case.variant == "diffusers" else torch.channels_last
    model.to(case.device, getattr(torch, case.dtype), memory_format=layout)  # type: ignore[call-overload]
    if case.variant == "ours" and (case.device, case.dtype) == ("cpu", "float32"):
        optimize_for_cpu(model)
    return model.eval().requires_grad_(False), layout


def make_step(case: Case) -> Callable[[], object]:
    """Return the function that is timed: it encodes or decodes a batch."""
    model, layout = build_model(case)
    x = torch.rand(input_shape(case), device=case.device).to(getattr(torch, case.dtype)) * 2 - 1
    x = x.contiguous(memory_format=layout)
    run = select_direction(model, case.direction)
    if case.variant.endswith("compiled"):
        run = torch.compile(run)
    return lambda: run(x)


def input_shape(case: Case) -> tuple[int, int, int, int]:
    """Return the shape [B, C, H, W] of a batch: pixels to encode, or latents to decode."""
    if case.direction == "encode":
        return case.batch, 3, case.side, case.side
    return case.batch, MODELS[case.model]["latent_channels"], case.side // 8, case.side // 8


def select_direction(model: Any, direction: str) -> Callable[[Tensor], Tensor]:
    """Return the function of a model that encodes to the mode, or decodes."""
    if direction == "encode":
        return lambda x: model.encode(x).latent_dist.mode()  # type: ignore[no-any-return]
    return lambda z: model.decode(z).sample  # type: ignore[no-any-return]


def measure(case: Case) -> Result:
    """Time a case in this process: two batches to warm up, then at least three batches and `case.seconds`.

    If a batch takes longer than `case.seconds`, one batch warms up and two are timed.
    """
    torch.manual_seed(0)
    torch.set_num_threads(case.threads)
    torch.backends.cudnn.benchmark = True
    run = make_step(case)
    with torch.inference_mode():
        is_slow = measure_seconds(run, case.device) > case.seconds
        if not is_slow:
            run()
        times: list[float] = []
        start = time.perf_counter()
        while time.perf_counter() - start < case.seconds or len(times) < (2 if is_slow else 3):
            times.append(measure_seconds(run, case.device))
    memory = torch.cuda.max_memory_allocated() if case.device == "cuda" else peak_process_bytes()
    return Result(case.batch / statistics.median(times), memory / 2**20)


def measure_seconds(run: Callable[[], object], device: str) -> float:
    """Return the seconds of a call, including the work that it started on a GPU."""
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_process_bytes() -> int:
    """Return the peak resident memory of this process in bytes (on Linux, where ru_maxrss is in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def count_work(case: Case) -> tuple[float, float]:
    """Return the FLOPs and the bytes of a batch, counted on a model without storage (device `meta`)."""
    with torch.device("meta"):
        model = AutoencoderKL(**MODELS[case.model])
        x = torch.empty(input_shape(case))
    values = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal values
        values += inputs[0].numel() + output.numel() + sum(p.numel() for p in module.parameters())

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    with FlopCounterMode(display=False) as counter:
        select_direction(model, case.direction)(x)
    return float(counter.get_total_flops()), float(values * getattr(torch, case.dtype).itemsize)


def measure_limits(case: Case) -> tuple[float, float]:
    """Return the FLOP/s of a large matrix product and the bytes/s (read and written) of a copy."""
    torch.set_num_threads(case.threads)
    side, size = (8192, 1 << 30) if case.device == "cuda" else (2048, 1 << 28)
    a, b = (torch.rand(side, side, device=case.device).to(getattr(torch, case.dtype)) for _ in range(2))
    source = torch.zeros(size, dtype=torch.uint8, device=case.device)
    target = torch.empty_like(source)
    product_seconds = min(measure_seconds(lambda: a @ b, case.device) for _ in range(10))
    copy_seconds = min(measure_seconds(lambda: target.copy_(source), case.device) for _ in range(10))
    return 2 * side**3 / product_seconds, 2 * size / copy_seconds


def run_in_process(function: Callable[[Case], Any], case: Case) -> Any:
    """Return the result of a function in a new process, with fresh allocators, caches and thread pools."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, case).result()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch, dtype = (8, "bfloat16") if device == "cuda" else (1, "float32")
    parser.add_argument("--models", default="sd", help=f"comma-separated, of {', '.join(MODELS)} (default: sd)")
    parser.add_argument("--sizes", default="256", help="comma-separated sides in pixels (default: 256)")
    parser.add_argument("--directions", default="encode,decode", help="encode, decode or both (default: both)")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated (default: all)")
    parser.add_argument("--batch", type=int, default=batch, help=f"images per batch (default: {batch})")
    parser.add_argument("--device", default=device, help=f"cpu or cuda (default: {device})")
    parser.add_argument("--dtype", default=dtype, help=f"dtype of weights and pixels (default: {dtype})")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on a CPU (default: 1)")
    parser.add_argument("--seconds", type=float, default=10.0, help="minimum duration per variant (default: 10)")
    return parser.parse_args()


def main() -> int:
    """Run the benchmark and print the tables. Returns the exit code."""
    options, missed = parse_arguments(), []
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {options.threads} thread(s)"
    print(f"{name}, {options.dtype}, batches of {options.batch}, torch {torch.__version__}")
    for model in options.models.split(","):
        for side in map(int, options.sizes.split(",")):
            for direction in options.directions.split(","):
                common = (model, direction, side, options.batch, options.device, options.dtype, options.threads)
                missed += compare([Case(v, *common, options.seconds) for v in options.variants.split(",")])
    for line in missed:
        print(f"FAIL: {line}")
    return 1 if missed else 0


def compare(cases: list[Case]) -> list[str]:
    """Measure the variants of a table and print it. Returns a sentence per missed target."""
    first = cases[0]
    flops, moved = count_work(first)
    product, copy = run_in_process(measure_limits, first)
    min_seconds = max(flops / product, moved / copy) / first.batch
    print(
        f"\n{first.direction} {first.model} at {first.side} px: {flops / first.batch / 1e9:.0f} GFLOP and "
        f"{moved / first.batch / 2**20:.0f} MiB per image; "
        f"matrix product {product / 1e12:.3g} TFLOP/s, copy {copy / 1e9:.3g} GB/s"
    )
    print(f"  {'variant':<26}{'images/s':>10}{'of limit':>10}{'peak MiB':>10}")
    rates = {}
    for case in cases:
        result: Result = run_in_process(measure, case)
        rates[case.variant] = rate = result.rate
        print(f"  {case.variant:<26}{rate:>10.3f}{rate * min_seconds:>10.0%}{result.memory:>10.0f}", flush=True)
    ours = rates.get("ours", 0.0)
    targets = {v: t for v, t in TARGETS[first.device].items() if v in rates and ours}
    for variant, target in targets.items():
        print(f"  ours / {variant}: {ours / rates[variant]:.2f} (target {target})")
    title = f"{first.direction} {first.model} at {first.side} px"
    return [
        f"{title}: {ours / rates[v]:.2f} times {v}, but the target is {t}"
        for v, t in targets.items()
        if ours < t * rates[v]
    ]


if __name__ == "__main__":
    sys.exit(main())
