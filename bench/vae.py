"""The model against diffusers' and against the machine: images/s of encode and decode, each variant in its own process.

    python -m bench.vae                       # SD at 256 px on this machine's CPU, or its GPU
    python -m bench.vae --models sd,flux --sizes 256,512,1024 --batch 8 --dtype bfloat16 --device cuda

The limits (a large matrix product, a copy) are measured in the same run. `of limit` is the share of the time that the
counted work would take at these: the larger of FLOPs / product and bytes / copy, where every convolution and projection
reads its input and its weights and writes its output once, and nothing else is moved. (Winograd's convolutions need
fewer products than are counted, and may pass 100%.)

Exit code 1 where a target that could be measured is missed.
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
MODELS: dict[str, dict[str, Any]] = {
    "sd": {**SD, "latent_channels": 4},
    "flux": {**SD, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
}
VARIANTS = ("diffusers", "diffusers channels_last", "diffusers compiled", "ours compiled", "ours")
# what `ours` is to reach, as a multiple of a variant's rate
TARGETS = {
    "cpu": {"diffusers": 1.4, "diffusers compiled": 1.0},
    "cuda": {"diffusers": 2.0, "diffusers compiled": 1.3},
}


@dataclass(frozen=True)
class Case:
    """One measurement. what: encode or decode; side: pixels; threads: on a CPU."""

    variant: str
    model: str
    what: str
    side: int
    batch: int
    device: str
    dtype: str
    threads: int
    seconds: float


@dataclass(frozen=True)
class Measured:
    """images/s (median), and the most memory in MiB: of the process on CPUs, of the device's tensors on GPUs."""

    rate: float
    memory: float


def build(case: Case) -> tuple[nn.Module, torch.memory_format]:
    """The variant's model with random weights on its device."""
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


def step(case: Case) -> Callable[[], object]:
    """What is timed: one batch, there or back."""
    model, layout = build(case)
    channels, side = (
        (3, case.side) if case.what == "encode" else (MODELS[case.model]["latent_channels"], case.side // 8)
    )
    x = torch.rand(case.batch, channels, side, side, device=case.device).to(getattr(torch, case.dtype)) * 2 - 1
    x = x.contiguous(memory_format=layout)
    run = half(model, case.what)
    if case.variant.endswith("compiled"):
        run = torch.compile(run)
    return lambda: run(x)


def shape(case: Case) -> tuple[int, int, int, int]:
    """Of what goes in."""
    if case.what == "encode":
        return case.batch, 3, case.side, case.side
    return case.batch, MODELS[case.model]["latent_channels"], case.side // 8, case.side // 8


def half(model: Any, what: str) -> Callable[[Tensor], Tensor]:
    if what == "encode":
        return lambda x: model.encode(x).latent_dist.mode()  # type: ignore[no-any-return]
    return lambda z: model.decode(z).sample  # type: ignore[no-any-return]


def measure(case: Case) -> Measured:
    """Time a case in this process: two batches to warm up, then batches for the given time, at least three.

    Where a batch takes longer than that time, one warms up and two are timed.
    """
    torch.manual_seed(0)
    torch.set_num_threads(case.threads)
    torch.backends.cudnn.benchmark = True
    run = step(case)
    with torch.inference_mode():
        slow = timed(run, case.device) > case.seconds
        if not slow:
            run()
        times: list[float] = []
        start = time.perf_counter()
        while time.perf_counter() - start < case.seconds or len(times) < (2 if slow else 3):
            times.append(timed(run, case.device))
    memory = torch.cuda.max_memory_allocated() if case.device == "cuda" else peak_of_process()
    return Measured(case.batch / statistics.median(times), memory / 2**20)


def timed(run: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_of_process() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def work(case: Case) -> tuple[float, float]:
    """FLOPs and bytes of a batch, counted on a model without storage."""
    with torch.device("meta"):
        model = AutoencoderKL(**MODELS[case.model])
        x = torch.empty(shape(case))
    moved = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal moved
        moved += inputs[0].numel() + output.numel() + sum(p.numel() for p in module.parameters())

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    with FlopCounterMode(display=False) as counter:
        half(model, case.what)(x)
    return float(counter.get_total_flops()), float(moved * getattr(torch, case.dtype).itemsize)


def limits(case: Case) -> tuple[float, float]:
    """FLOP/s of a large matrix product and bytes/s (read and written) of a copy."""
    torch.set_num_threads(case.threads)
    side, size = (8192, 1 << 30) if case.device == "cuda" else (2048, 1 << 28)
    a, b = (torch.rand(side, side, device=case.device).to(getattr(torch, case.dtype)) for _ in range(2))
    source = torch.zeros(size, dtype=torch.uint8, device=case.device)
    target = torch.empty_like(source)
    product = min(timed(lambda: a @ b, case.device) for _ in range(10))
    copied = min(timed(lambda: target.copy_(source), case.device) for _ in range(10))
    return 2 * side**3 / product, 2 * size / copied


def apart(function: Callable[[Case], Any], case: Case) -> Any:
    """Run in a process of its own: allocators, caches and thread pools start fresh."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, case).result()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--models", default="sd")
    parser.add_argument("--sizes", default="256")
    parser.add_argument("--what", default="encode,decode")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--batch", type=int, default=8 if device == "cuda" else 1)
    parser.add_argument("--device", default=device)
    parser.add_argument("--dtype", default="bfloat16" if device == "cuda" else "float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10.0)
    return parser.parse_args()


def main() -> int:
    """Print the table; 1 where a target is missed."""
    options, missed = arguments(), []
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {options.threads} thread(s)"
    print(f"{name}, {options.dtype}, batches of {options.batch}, torch {torch.__version__}")
    for model in options.models.split(","):
        for side in map(int, options.sizes.split(",")):
            for what in options.what.split(","):
                fixed = (model, what, side, options.batch, options.device, options.dtype, options.threads)
                missed += compare([Case(v, *fixed, options.seconds) for v in options.variants.split(",")])
    for line in missed:
        print(f"FAIL: {line}")
    return 1 if missed else 0


def compare(cases: list[Case]) -> list[str]:
    """Measure the variants of one row and print them. Returns the targets that were missed."""
    first = cases[0]
    flops, moved = work(first)
    product, copy = apart(limits, first)
    floor = max(flops / product, moved / copy) / first.batch
    print(
        f"\n{first.what} {first.model} at {first.side} px: {flops / first.batch / 1e9:.0f} GFLOP and "
        f"{moved / first.batch / 2**20:.0f} MiB an image; "
        f"product {product / 1e12:.3g} TFLOP/s, copy {copy / 1e9:.3g} GB/s"
    )
    print(f"  {'variant':<26}{'images/s':>10}{'of limit':>10}{'peak MiB':>10}")
    rates = {}
    for case in cases:
        found: Measured = apart(measure, case)
        rates[case.variant] = found.rate
        print(f"  {case.variant:<26}{found.rate:>10.3f}{found.rate * floor:>10.0%}{found.memory:>10.0f}", flush=True)
    ours = rates.get("ours", 0.0)
    targets = {v: t for v, t in TARGETS[first.device].items() if v in rates and ours}
    for variant, target in targets.items():
        print(f"  ours / {variant}: {ours / rates[variant]:.2f} (target {target})")
    where = f"{first.what} {first.model} {first.side}"
    return [f"{where}: {ours / rates[v]:.2f} of {v}, not {t}" for v, t in targets.items() if ours < t * rates[v]]


if __name__ == "__main__":
    sys.exit(main())
