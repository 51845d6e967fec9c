"""The time of each operation of the encoder on a GPU, as a fraction of the machine's limit.

    python -m bench.kernels                                     # SD's shape at 512 px, float16
    python -m bench.kernels --side 1024 --batch 4 --dtype bfloat16

It needs a CUDA GPU and triton. The limits are measured by `bench.vae.measure_limits`: a large matrix product in FLOP/s
and a copy in bytes/s. There is one row per kind of operation and shape, with these columns:

- count: how often the encoder has this operation for a batch.
- us: the median of the microseconds, from CUDA events.
- of limit: the limit of the counted FLOPs or bytes as a fraction of that time, whichever is larger.
- ms: count times us, in milliseconds. `sum` is that of all operations of a form. For `fused` it is an upper bound, as
  most norms have their moments from the addition before.

The operations are the convolutions in both memory formats (without a bias in channels_last), the kernels of
`vae.group_norm_silu`, torch's own group norm, SiLU and additions, and the two kinds of attention.
"""

import argparse
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.vae import MODELS, PRECISIONS, Case, measure_limits, measure_seconds
from pipeline.encoder import configure_allocator, configure_cuda
from vae import AutoencoderKL
from vae.attention import SDPA, PerImage
from vae.blocks import Attention, ResnetBlock

WARM_UP, REPEATS = 3, 20


@dataclass(frozen=True)
class Operation:
    """An operation of a form, its FLOPs and the bytes that it has to move at least."""

    form: str
    name: str
    count: int
    flops: float
    moved: float
    run: Callable[[], object]


@dataclass(frozen=True)
class Layer:
    """A convolution, norm, addition or attention of the encoder. shape: of its input."""

    kind: str
    shape: tuple[int, ...]
    channels: int  # of the output
    kernel: int = 0
    stride: int = 1


def list_layers(model: str, batch: int, side: int) -> Counter[Layer]:
    """Return the layers of the encoder, counted by a run on a model without storage (device `meta`)."""
    found: Counter[Layer] = Counter()
    with torch.device("meta"):
        encoder = AutoencoderKL(**MODELS[model]).encoder
        x = torch.empty(batch, 3, side, side)

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        shape = tuple(inputs[0].shape)
        if isinstance(module, nn.Conv2d):
            layer = Layer("convolution", shape, module.out_channels, module.kernel_size[0], module.stride[0])
        elif isinstance(module, nn.GroupNorm):
            layer = Layer("norm", shape, module.num_channels, module.num_groups)
        elif isinstance(module, Attention):
            found[Layer("attention", shape, shape[1])] += 1
            layer = Layer("addition", shape, shape[1])
        else:
            layer = Layer("addition", tuple(output.shape), output.shape[1])
        found[layer] += 1

    for module in encoder.modules():
        if isinstance(module, nn.Conv2d | nn.GroupNorm | Attention | ResnetBlock):
            module.register_forward_hook(count)
    encoder(x)
    return found


def make_operations(layers: Counter[Layer], dtype: torch.dtype, device: str) -> Iterator[Operation]:
    """Yield the operations of these layers, in both forms."""
    for layer, count in layers.items():
        make = {"convolution": make_convolutions, "norm": make_norms, "addition": make_additions}
        operations = make.get(layer.kind, make_attentions)(layer, count, dtype, device)
        yield from operations


def random(shape: tuple[int, ...], dtype: torch.dtype, device: str, is_channels_last: bool = True) -> Tensor:
    """Return a normal tensor. is_channels_last: its memory format, otherwise it is contiguous."""
    x = torch.randn(shape, device=device).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if is_channels_last else x


def make_convolutions(layer: Layer, count: int, dtype: torch.dtype, device: str) -> Iterator[Operation]:
    for form, is_channels_last in (("fused", True), ("plain", False)):
        x = random(layer.shape, dtype, device, is_channels_last)
        padding = layer.kernel // 2 if layer.stride == 1 else 0
        conv = nn.Conv2d(layer.shape[1], layer.channels, layer.kernel, layer.stride, padding).to(device, dtype)
        weight = conv.weight.to(memory_format=torch.channels_last) if is_channels_last else conv.weight
        bias = None if is_channels_last else conv.bias

        def run(x: Tensor = x, weight: Tensor = weight, bias: Tensor | None = bias, conv: nn.Conv2d = conv) -> Tensor:
            return F.conv2d(x, weight, bias, conv.stride, conv.padding)

        out = run()
        flops = 2.0 * out.numel() * layer.shape[1] * layer.kernel**2
        moved = (x.numel() + out.numel() + weight.numel()) * dtype.itemsize
        name = f"conv {layer.kernel}x{layer.kernel}/{layer.stride} {describe(layer)}"
        yield Operation(form, name, count, flops, moved, run)


def make_norms(layer: Layer, count: int, dtype: torch.dtype, device: str) -> Iterator[Operation]:
    from vae import group_norm_silu as kernels

    norm = nn.GroupNorm(layer.kernel, layer.channels, eps=1e-6).to(device, dtype)
    x, contiguous = random(layer.shape, dtype, device), random(layer.shape, dtype, device, False)
    moments, size = kernels.sum_moments(x), x.numel() * dtype.itemsize
    name = f"norm {describe(layer)}"
    yield Operation("fused", f"{name}: moments", count, 0, size, lambda: kernels.sum_moments(x))
    yield Operation(
        "fused",
        f"{name}: apply, SiLU",
        count,
        0,
        2 * size,
        lambda: kernels.normalize(x, norm, silu=True, moments=moments),
    )
    yield Operation("plain", name, count, 0, 3 * size, lambda: norm(contiguous))
    yield Operation("plain", f"SiLU {describe(layer)}", count, 0, 2 * size, lambda: F.silu(contiguous))


def make_additions(layer: Layer, count: int, dtype: torch.dtype, device: str) -> Iterator[Operation]:
    from vae import group_norm_silu as kernels

    h, x, bias = random(layer.shape, dtype, device), random(layer.shape, dtype, device), torch.zeros(layer.channels)
    bias, moved, name = bias.to(device), 3 * x.numel() * dtype.itemsize, f"add {describe(layer)}"
    yield Operation("fused", name, count, 0, moved, lambda: kernels.add_residual(h, x, bias))
    yield Operation("fused, padded", name, count, 0, moved, lambda: kernels.add_residual_padded(h, x, bias))
    yield Operation("plain", name, count, 0, moved, lambda: h + x)


def make_attentions(layer: Layer, count: int, dtype: torch.dtype, device: str) -> Iterator[Operation]:
    batch, channels, height, width = layer.shape
    q, k, v = (torch.randn(batch, 1, height * width, channels, device=device).to(dtype) for _ in range(3))
    flops, moved = 4.0 * batch * (height * width) ** 2 * channels, 4 * q.numel() * dtype.itemsize
    name = f"attention {describe(layer)}"
    yield Operation("sdpa", name, count, flops, moved, lambda: SDPA()(q, k, v))
    yield Operation("per-image", name, count, flops, moved, lambda: PerImage()(q, k, v))


def describe(layer: Layer) -> str:
    """Return the sizes of a layer."""
    channels = f"{layer.shape[1]}" if layer.channels == layer.shape[1] else f"{layer.shape[1]}->{layer.channels}"
    return f"{channels} at {layer.shape[2]}"


def measure(run: Callable[[], object], device: str) -> float:
    """Return the median seconds of a call. On a CPU it is called once."""
    if device != "cuda":
        return measure_seconds(run, device)
    times = []
    for _ in range(WARM_UP + REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(float(start.elapsed_time(end)) / 1000)
    return statistics.median(times[WARM_UP:])


@torch.inference_mode()
def main() -> int:
    """Run the benchmark and print the table. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd", choices=MODELS, help="shape of the model (default: sd)")
    parser.add_argument("--side", type=int, default=512, help="side of the images in pixels (default: 512)")
    parser.add_argument("--batch", type=int, default=16, help="images per batch (default: 16)")
    parser.add_argument("--dtype", default="float16", help="dtype of weights and activations (default: float16)")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the command (default: cuda)")
    options = parser.parse_args()
    dtype, device = getattr(torch, options.dtype), options.device
    if device == "cuda":
        configure_allocator()
        configure_cuda(PRECISIONS[options.dtype])
        print(torch.cuda.get_device_name(), end=", ")
    case = Case("", options.model, "encode", options.side, options.batch, device, options.dtype, 1, 0.0)
    product, copy = measure_limits(case)
    print(f"torch {torch.__version__}, product {product / 1e12:.4g} TFLOP/s, copy {copy / 1e9:.4g} GB/s")
    print(f"{options.model} at {options.side} px, batches of {options.batch}, {options.dtype}\n")
    print(f"{'form':<14}{'operation':<38}{'count':>6}{'us':>10}{'of limit':>10}{'ms':>9}")
    sums: Counter[str] = Counter()
    for operation in make_operations(list_layers(options.model, options.batch, options.side), dtype, device):
        seconds = measure(operation.run, device)
        limit = max(operation.flops / product, operation.moved / copy)
        total = 1000 * operation.count * seconds
        sums[operation.form] += total  # type: ignore[assignment]
        print(
            f"{operation.form:<14}{operation.name:<38}{operation.count:>6}{1e6 * seconds:>10.1f}"
            f"{limit / seconds:>10.0%}{total:>9.3f}",
            flush=True,
        )
    for form, total in sums.items():
        print(f"{form:<14}{'sum':<38}{'':>26}{total:>9.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
