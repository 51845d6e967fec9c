"""Throughput of the model alone, compared with diffusers' model and with the limits of the machine.

    python -m bench.vae                       # SD at 256 px on this machine's GPU, or its CPU if it has none
    python -m bench.vae --models sd,flux --sizes 256,512,1024 --directions encode --dtype float16 --device cuda

It needs an idle machine, and diffusers for the comparison. Each variant runs in its own process, with random weights.
A variant that cannot run here is skipped, with the reason. `ours` are latentmill's forms of the encoder
(docs/performance.md): `ours plain` is torch's kernels, on a CPU in float32 with Winograd convolutions. There is one
table per model, size and direction (encode or decode), with these columns:

- images/s: the median over the batches.
- of limit: the throughput as a fraction of the machine's limit. The limit is measured in the same run, by a large
  matrix product (FLOP/s) and a copy (bytes/s). It is the larger of the times for the counted FLOPs and bytes. The bytes
  are counted as if every convolution and projection read its input and weights once and wrote its output once, and
  nothing else were moved. Winograd convolutions need fewer products than are counted, so they may exceed 100%.
- peak MiB: the peak memory of the process on CPUs, of torch's tensors on GPUs.
- first, s: seconds of the first batch, which compiles, or chooses algorithms.

On GPUs, all variants have the switches of a job (`pipeline.encoder.configure_cuda`). The lines below a table compare
the fastest of `ours` (on CPUs `ours plain`, which jobs use) with the targets. The exit code is 1 if a target is missed.
"""

import argparse
import importlib.util
import os
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

from pipeline.encoder import configure_allocator, configure_cuda
from vae import AutoencoderKL
from vae.attention import PerImage
from vae.fast import disable_malloc_trim, fuse_encoder, optimize_for_cpu

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
VARIANTS = (
    "diffusers",
    "diffusers channels_last",
    "diffusers compiled",
    "ours compiled",
    "ours fused",
    "ours fused per-image",
    "ours jax",
    "ours plain",
)
GPU_PIXELS = 16 * 512 * 512  # of a batch on a GPU by default
PRECISIONS = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
# Minimum ratio of the throughput of the fastest of `ours` to that of another variant.
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
    """Median images/s, the peak memory in MiB (see above), and the seconds of the first batch."""

    rate: float
    memory: float
    first: float


def build_model(case: Case) -> tuple[nn.Module, torch.memory_format]:
    """Return the variant's model with random weights on its device, and the memory format of its inputs."""
    if case.variant.startswith("ours"):
        disable_malloc_trim()
        model: nn.Module = AutoencoderKL(**MODELS[case.model])
    else:
        from diffusers import AutoencoderKL as Reference
        from diffusers.utils import logging

        logging.set_verbosity_error()
        model = Reference(**MODELS[case.model])
    is_contiguous = case.variant == "diffusers" or (case.variant == "ours plain" and case.device == "cuda")
    layout = torch.contiguous_format if is_contiguous else torch.channels_last
    model.to(case.device, getattr(torch, case.dtype), memory_format=layout)  # type: ignore[call-overload]
    if case.variant == "ours plain" and (case.device, case.dtype) == ("cpu", "float32"):
        optimize_for_cpu(model)
    if case.variant.startswith("ours fused"):
        assert isinstance(model, AutoencoderKL)
        fuse_encoder(model)
        if case.variant.endswith("per-image"):
            model.set_attn_processor(PerImage())
    return model.eval().requires_grad_(False), layout


def find_obstacle(case: Case) -> str:
    """Return why a variant cannot run here; empty if it can."""
    needed = "diffusers" if case.variant.startswith("diffusers") else "triton" if "fused" in case.variant else ""
    if case.variant == "ours jax":
        needed = "flax"
    if needed == "triton" and (case.device, case.direction) != ("cuda", "encode"):
        return "for the encoder on CUDA only"
    if needed and importlib.util.find_spec(needed) is None:
        return f"{needed} is not installed"
    return ""


def make_step(case: Case) -> Callable[[], object]:
    """Return the function that is timed: it encodes or decodes a batch."""
    if case.variant == "ours jax":
        return make_jax_step(case)
    model, layout = build_model(case)
    x = torch.rand(input_shape(case), device=case.device).to(getattr(torch, case.dtype)) * 2 - 1
    x = x.contiguous(memory_format=layout)
    run = select_direction(model, case.direction)
    if case.variant.endswith("compiled"):
        run = torch.compile(run)
    return lambda: run(x)


def make_jax_step(case: Case) -> Callable[[], object]:
    """Return the function that is timed for FlaxAutoencoderKL. Its first call compiles."""
    os.environ["NPROC"] = str(case.threads)  # of a CPU; JAX reads it when it is first used
    import jax
    from jax import numpy as jnp

    from vae import FlaxAutoencoderKL

    model = FlaxAutoencoderKL(**MODELS[case.model], dtype=getattr(jnp, case.dtype))
    params, key = model.init_weights(jax.random.key(0)), jax.random.key(1)
    if case.direction == "encode":
        x = jax.random.uniform(key, input_shape(case), minval=-1.0)
        encode = jax.jit(lambda params, x: model.apply({"params": params}, x, method="encode").latent_dist.mode())
        return lambda: encode(params, x).block_until_ready()
    z = jax.random.normal(key, input_shape(case)).transpose(0, 2, 3, 1)
    decode = jax.jit(lambda params, z: model.apply({"params": params}, z, method="decode", channels_last=True).sample)
    return lambda: decode(params, z).block_until_ready()


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

    If a batch takes longer than `case.seconds`, two are timed.
    """
    torch.manual_seed(0)
    torch.set_num_threads(case.threads)
    if case.device == "cuda":
        configure_allocator()
        configure_cuda(PRECISIONS[case.dtype])
    run = make_step(case)
    with torch.inference_mode():
        first = measure_seconds(run, case.device)
        is_slow = measure_seconds(run, case.device) > case.seconds
        times: list[float] = []
        start = time.perf_counter()
        while time.perf_counter() - start < case.seconds or len(times) < (2 if is_slow else 3):
            times.append(measure_seconds(run, case.device))
    memory = torch.cuda.max_memory_allocated() if case.device == "cuda" else peak_process_bytes()
    return Result(case.batch / statistics.median(times), memory / 2**20, first)


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
    dtype = "float16" if device == "cuda" else "float32"
    parser.add_argument("--models", default="sd", help=f"comma-separated, of {', '.join(MODELS)} (default: sd)")
    parser.add_argument("--sizes", default="256", help="comma-separated sides in pixels (default: 256)")
    parser.add_argument("--directions", default="encode,decode", help="encode, decode or both (default: both)")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated (default: all)")
    parser.add_argument("--batch", type=int, default=0, help="images per batch (default: 1; 16 at 512 px on GPUs)")
    parser.add_argument("--device", default=device, help=f"cpu or cuda (default: {device})")
    parser.add_argument("--dtype", default=dtype, help=f"dtype of weights and pixels (default: {dtype})")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on a CPU (default: 1)")
    parser.add_argument("--seconds", type=float, default=10.0, help="minimum duration per variant (default: 10)")
    return parser.parse_args()


def main() -> int:
    """Run the benchmark and print the tables. Returns the exit code."""
    options, missed = parse_arguments(), []
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {options.threads} thread(s)"
    print(f"{name}, {options.dtype}, torch {torch.__version__}, load average {os.getloadavg()[0]:.1f}")
    for model in options.models.split(","):
        for side in map(int, options.sizes.split(",")):
            for direction in options.directions.split(","):
                batch = options.batch or (max(1, GPU_PIXELS // side**2) if options.device == "cuda" else 1)
                common = (model, direction, side, batch, options.device, options.dtype, options.threads)
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
        f"\n{first.direction} {first.model} at {first.side} px, batches of {first.batch}: "
        f"{flops / first.batch / 1e9:.0f} GFLOP and {moved / first.batch / 2**20:.0f} MiB per image; "
        f"matrix product {product / 1e12:.3g} TFLOP/s, copy {copy / 1e9:.3g} GB/s"
    )
    print(f"  {'variant':<26}{'images/s':>10}{'of limit':>10}{'peak MiB':>10}{'first, s':>10}")
    rates = {}
    for case in cases:
        if obstacle := find_obstacle(case):
            print(f"  {case.variant:<26}  skipped: {obstacle}")
            continue
        try:
            result: Result = run_in_process(measure, case)
        except Exception as error:  # out of memory, or a form that fails; the others are still measured
            print(f"  {case.variant:<26}  failed: {type(error).__name__}: {str(error).splitlines()[:1]}", flush=True)
            continue
        rates[case.variant] = rate = result.rate
        print(
            f"  {case.variant:<26}{rate:>10.3f}{rate * min_seconds:>10.0%}{result.memory:>10.0f}{result.first:>10.1f}",
            flush=True,
        )
    used = ("ours plain",) if first.device == "cpu" else [variant for variant in rates if variant.startswith("ours")]
    ours = max((rates[variant] for variant in used if variant in rates), default=0.0)
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
