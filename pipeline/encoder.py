"""Pixels to latents: a replica of the model on a device, and the slices it runs on.

A slice always has the one static shape of its bucket; the last one is padded. So a latent depends neither on its
neighbours nor on its place (bit for bit on a CPU), and a compiled or benchmarked kernel is chosen once a bucket.
"""

import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.errors import Rejected, VaeError
from pipeline.images.seeds import seed_of
from pipeline.records import PreparedImage, Store
from pipeline.weights import Vae
from vae import AutoencoderKL
from vae.fast import compile_encoder, disable_malloc_trim, optimize_for_cpu
from vae.posterior import DiagonalGaussianDistribution

# What libraries say of lack of memory where it is no torch.OutOfMemoryError; parts of their texts, in small letters.
OUT_OF_MEMORY = (
    "out of memory",  # CUDA's and HIP's runtime: "CUDA error: out of memory"; torch on MPS: "MPS backend out of memory"
    "can't allocate memory",  # torch's allocator on CPUs (c10/core/impl/alloc_cpu.cpp)
    "not enough memory",  # the same on Windows; oneMKL
    "std::bad_alloc",  # C++
    "status_alloc_failed",  # CUBLAS_, CUDNN_, HIPBLAS_STATUS_ALLOC_FAILED
    "_allocation_failed",  # cuDNN 9: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED and ..._DEVICE_...
    "miopenstatusallocfailed",
    "invalid buffer size",  # MPS: one buffer would be larger than the device's largest (MPSAllocator.mm)
)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeConfig:
    """How a replica runs. threads: intra-op threads on a CPU. batch_size: a multiple of slice_size.

    compile: run the encoder through torch.compile, once for each shape.
    """

    device: str
    precision: str
    slice_size: int
    batch_size: int
    threads: int
    compile: bool = False

    def with_smaller_slices(self) -> "ComputeConfig":
        """The same with slices half as large, as long as they can be."""
        return replace(self, slice_size=max(1, self.slice_size // 2))


def build_model(vae: Vae, compute: ComputeConfig, tile_above: int | None = None) -> AutoencoderKL:
    """A replica's model on its device, in its precision. tile_above: larger images are tiled, by this side."""
    if compute.device == "cpu":
        torch.set_num_threads(compute.threads)
        disable_malloc_trim()
    with torch.device("meta"):
        model = AutoencoderKL.from_config(vae.config)
    model.load_state_dict({name: torch.tensor(values) for name, values in vae.weights.items()}, assign=True)
    model.to(compute.device, PRECISIONS[compute.precision], memory_format=torch.channels_last)  # type: ignore[call-overload]
    if compute.compile:
        compile_encoder(model)
    elif (compute.device, compute.precision) == ("cpu", "fp32"):
        optimize_for_cpu(model)
    if tile_above:
        model.enable_tiling()
        model.tile_sample_min_size, model.tile_latent_min_size = tile_above, tile_above // vae.config.downscale
    return model.eval().requires_grad_(False)


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """What became of a batch, in its order: latents as they are stored, raw and on the CPU, [C, H/f, W/f] each.

    again: how many of them overflowed in half precision and were made again in float32.
    queued: seconds until the model was free. seconds: how long it was then held, the device's work included.
    """

    latents: Sequence[Tensor | Rejected]
    again: int
    queued: float = 0.0
    seconds: float = 0.0


class LatentEncoder:
    """One model on one device. Threads may share it: the model runs for one of them at a time.

    store: what is kept of the posterior: its `mode`, a `sample` drawn by `seed`, shard and key, or its `moments`.
    tile_above: images with a side of more pixels are encoded in tiles of that size.
    """

    def __init__(
        self,
        vae: Vae,
        compute: ComputeConfig,
        dtype: str,
        store: Store = "mode",
        seed: int = 0,
        tile_above: int | None = None,
    ) -> None:
        self.compute = compute  # its slices become smaller where memory does not suffice
        self.dtype = DTYPES[dtype]
        self.store = store
        self.seed = seed
        self.lock = threading.Lock()
        self.images = 0
        self.runs = 0  # of the encoder: a large image takes many, one a tile
        self.tile_above = tile_above
        self.model = build_model(vae, compute, tile_above)
        self._watch(self.model)
        self._vae = vae
        self._exact: AutoencoderKL | None = None  # the float32 twin, built when something overflows

    def encode(self, batch: Sequence[PreparedImage], shard: str = "") -> EncodedBatch:
        """The latents of a batch of one bucket; [2C, H/f, W/f] each where moments are stored.

        A latent that is not finite is made again in float32; one that still is not is a Rejected instead.
        Raises VaeError where the device's memory does not suffice for a single image.
        """
        asked = time.perf_counter()
        with self.lock:
            start = time.perf_counter()
            latents: list[Tensor | Rejected] = list(self._run_in_memory(self.model, batch, shard))
            self.images += len(batch)
            again = 0
            for index, image in enumerate(batch):
                if not bool(latents[index].isfinite().all()):  # type: ignore[union-attr]
                    latents[index] = self._again(image, shard)
                    again += isinstance(latents[index], Tensor)
            # the latents are on the CPU by now, so the device has done what it was given
            return EncodedBatch(latents, again, queued=start - asked, seconds=time.perf_counter() - start)

    def _watch(self, model: AutoencoderKL) -> None:
        """Count the runs of a model's encoder."""
        if not self.compute.compile:  # the hook would be compiled, too
            model.encoder.register_forward_hook(self._count)

    def _count(self, *_: object) -> None:
        self.runs += 1

    def _run_in_memory(self, model: AutoencoderKL, batch: Sequence[PreparedImage], shard: str) -> Tensor:
        """Run the model, in slices half as large each time that memory does not suffice: from then on for all."""
        while True:
            try:
                return self._run(model, batch, shard)
            except (RuntimeError, MemoryError) as error:
                size = self.compute.slice_size
                if not is_out_of_memory(error):
                    raise
                if size == 1:
                    height, width = batch[0].bucket
                    raise VaeError(
                        f"out of memory on {self.compute.device}, encoding a single image of {height}x{width} "
                        f"pixels; --tile-above encodes it in tiles ({(str(error).splitlines() or [''])[0]:.200})"
                    ) from error
            self.compute = self.compute.with_smaller_slices()
            if self.compute.device in ("cuda", "mps"):
                getattr(torch, self.compute.device).empty_cache()

    def _run(self, model: AutoencoderKL, images: Sequence[PreparedImage], shard: str) -> Tensor:
        size = self.compute.slice_size
        outputs = []
        with torch.inference_mode():
            for start in range(0, len(images), size):
                some = images[start : start + size]
                padded = [*some, *[some[-1]] * (size - len(some))]
                pixels = torch.stack([image.pixels for image in padded]).to(model.device, non_blocking=True)
                posterior = model.encode(normalize_pixels(pixels, model.dtype)).latent_dist
                latents = self._stored(posterior, padded, shard)
                outputs.append(latents[: len(some)].to(self.dtype))
            return torch.cat(outputs).cpu()

    def _stored(self, posterior: DiagonalGaussianDistribution, images: Sequence[PreparedImage], shard: str) -> Tensor:
        """What is kept of the posteriors of a slice; noise is drawn on the CPU, so that it is the same everywhere."""
        if self.store == "mode":
            return posterior.mode()
        if self.store == "moments":
            return torch.cat([posterior.mean, posterior.logvar], dim=1)
        shape = posterior.mean.shape[1:]
        seeds = [seed_of(self.seed, "sample", shard, image.key) for image in images]
        noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        return posterior.mean.float() + posterior.std.float() * noise.to(posterior.mean.device)

    def _again(self, image: PreparedImage, shard: str) -> Tensor | Rejected:
        if self.model.dtype != torch.float32:
            if self._exact is None:
                self._exact = build_model(self._vae, replace(self.compute, precision="fp32"), self.tile_above)
                self._watch(self._exact)
            latent = self._run_in_memory(self._exact, [image], shard)[0]
            if bool(latent.isfinite().all()):
                return latent
        return Rejected("encode", "not_finite")


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device, or the CPU's allocator, had no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(error).lower()
    return any(text in said for text in OUT_OF_MEMORY)


# What CUDA, ROCm and their libraries say once a context is lost: every later call in the process fails, too.
_DEVICE_ERROR = re.compile(
    r"(CUDA|HIP|NVML) (driver |runtime )?error|device-side assert|(CUBLAS|CUDNN|CUSOLVER|CUFFT|HIPBLAS|MIOPEN)_STATUS_|"
    r"(cuDNN|cuBLAS|cublas|MIOpen|hipBLAS) error|Unable to find an engine|ECC error"
)


def is_device_error(error: BaseException) -> bool:
    """Whether an accelerator failed in a way that sticks to its process: an illegal access, say, or an ECC error."""
    if not isinstance(error, RuntimeError) or is_out_of_memory(error):
        return False
    return isinstance(error, torch.AcceleratorError) or _DEVICE_ERROR.search(str(error)) is not None


def normalize_pixels(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 [B, 3, H, W] -> [-1, 1], 0 and 255 exactly -1 and 1; mapped in float32, then rounded to `dtype`."""
    values = pixels.to(torch.float32).div_(127.5).sub_(1.0)
    return values.to(dtype).contiguous(memory_format=torch.channels_last)
