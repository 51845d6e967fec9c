"""Encode pixels to latents with one copy of the model on one device, a slice of images per forward pass.

A slice always has the static shape of its bucket. The last slice is padded. So a latent depends neither on the other
images nor on its position (bit for bit on a CPU), and a compiled or benchmarked kernel is chosen once per bucket.
"""

import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.errors import Rejected, VaeError
from pipeline.images.seeds import derive_seed
from pipeline.records import PreparedImage, Store
from pipeline.weights import Vae
from vae import AutoencoderKL
from vae.fast import compile_encoder, disable_malloc_trim, optimize_for_cpu
from vae.posterior import DiagonalGaussianDistribution

# Parts of the messages, in lower case, that report a lack of memory without a torch.OutOfMemoryError.
OUT_OF_MEMORY = (
    "out of memory",  # CUDA's and HIP's runtime: "CUDA error: out of memory"; torch on MPS: "MPS backend out of memory"
    "can't allocate memory",  # torch's allocator on CPUs (c10/core/impl/alloc_cpu.cpp)
    "not enough memory",  # the same on Windows; oneMKL
    "std::bad_alloc",  # C++
    "status_alloc_failed",  # CUBLAS_, CUDNN_, HIPBLAS_STATUS_ALLOC_FAILED
    "_allocation_failed",  # cuDNN 9: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED and ..._DEVICE_...
    "miopenstatusallocfailed",
    "invalid buffer size",  # MPS: one buffer would exceed the device's maximum buffer length (MPSAllocator.mm)
)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeConfig:
    """How the model runs on a worker.

    slice_size: images per forward pass. batch_size: images per call, a multiple of slice_size.
    threads: intra-op threads on a CPU. compile: compile the encoder with torch.compile, once per shape.
    """

    device: str
    precision: str
    slice_size: int
    batch_size: int
    threads: int
    compile: bool = False

    def with_smaller_slices(self) -> "ComputeConfig":
        """Return the same settings with half the slice size, but at least 1."""
        return replace(self, slice_size=max(1, self.slice_size // 2))


def build_model(vae: Vae, compute: ComputeConfig, tile_above: int | None = None) -> AutoencoderKL:
    """Build the model on its device and in its precision. tile_above: side in pixels, see `LatentEncoder`."""
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
    """The results of a batch, in its order.

    latents: raw latents as they are stored, on the CPU, [C, H/f, W/f] each; a Rejected for one that is not finite.
    fp32_fallbacks: how many latents overflowed in half precision and were encoded again in float32.
    queued: seconds until the model was free. seconds: how long the model was then in use, including the device's work.
    """

    latents: Sequence[Tensor | Rejected]
    fp32_fallbacks: int
    queued: float = 0.0
    seconds: float = 0.0


class LatentEncoder:
    """One model on one device. Threads may share it; the model serves one thread at a time.

    store: the stored part of the posterior: its `mode`, a `sample` that follows from `seed`, shard and key, or its
    `moments` (mean and log-variance).
    tile_above: images with a side of more pixels than this are encoded in tiles of this size.
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
        self.compute = compute  # the slice size is halved if memory does not suffice
        self.dtype = DTYPES[dtype]
        self.store = store
        self.seed = seed
        self.lock = threading.Lock()
        self.images = 0
        self.runs = 0  # of the encoder; a tiled image takes one run per tile
        self.tile_above = tile_above
        self.model = build_model(vae, compute, tile_above)
        self._count_runs(self.model)
        self._vae = vae
        self._fp32_model: AutoencoderKL | None = None  # built when the first latent overflows

    def encode(self, batch: Sequence[PreparedImage], shard: str = "") -> EncodedBatch:
        """Encode a batch of images of one bucket. Each latent is [2C, H/f, W/f] if moments are stored.

        A latent that is not finite is encoded again in float32. If it is still not finite, it becomes a Rejected.
        Raises VaeError if the device's memory does not suffice for a single image.
        """
        called = time.perf_counter()
        with self.lock:
            start = time.perf_counter()
            latents: list[Tensor | Rejected] = list(self._run_in_memory(self.model, batch, shard))
            self.images += len(batch)
            fp32_fallbacks = 0
            for index, image in enumerate(batch):
                if not bool(latents[index].isfinite().all()):  # type: ignore[union-attr]
                    latents[index] = self._encode_in_fp32(image, shard)
                    fp32_fallbacks += isinstance(latents[index], Tensor)
            # the latents are on the CPU now, so the device has finished its work
            seconds = time.perf_counter() - start
            return EncodedBatch(latents, fp32_fallbacks, queued=start - called, seconds=seconds)

    def _count_runs(self, model: AutoencoderKL) -> None:
        """Make a model's encoder count its runs."""
        if not self.compute.compile:  # torch.compile would compile the hook as well
            model.encoder.register_forward_hook(self._on_run)

    def _on_run(self, *_: object) -> None:
        self.runs += 1

    def _run_in_memory(self, model: AutoencoderKL, batch: Sequence[PreparedImage], shard: str) -> Tensor:
        """Run the model. Halve the slice size, also for later batches, each time that memory does not suffice."""
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
                        f"out of memory on {self.compute.device} while encoding a single image of {height}x{width} "
                        f"pixels; use --tile-above to encode it in tiles ({(str(error).splitlines() or [''])[0]:.200})"
                    ) from error
            self.compute = self.compute.with_smaller_slices()
            if self.compute.device in ("cuda", "mps"):
                getattr(torch, self.compute.device).empty_cache()

    def _run(self, model: AutoencoderKL, images: Sequence[PreparedImage], shard: str) -> Tensor:
        size = self.compute.slice_size
        outputs = []
        with torch.inference_mode():
            for start in range(0, len(images), size):
                chunk = images[start : start + size]
                padded = [*chunk, *[chunk[-1]] * (size - len(chunk))]
                pixels = torch.stack([image.pixels for image in padded]).to(model.device, non_blocking=True)
                posterior = model.encode(normalize_pixels(pixels, model.dtype)).latent_dist
                latents = self._convert_to_stored_form(posterior, padded, shard)
                outputs.append(latents[: len(chunk)].to(self.dtype))
            return torch.cat(outputs).cpu()

    def _convert_to_stored_form(
        self, posterior: DiagonalGaussianDistribution, images: Sequence[PreparedImage], shard: str
    ) -> Tensor:
        """Return the stored form of a slice's posteriors. Noise is drawn on the CPU, so it is equal on all devices."""
        if self.store == "mode":
            return posterior.mode()
        if self.store == "moments":
            return torch.cat([posterior.mean, posterior.logvar], dim=1)
        shape = posterior.mean.shape[1:]
        seeds = [derive_seed(self.seed, "sample", shard, image.key) for image in images]
        noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        return posterior.mean.float() + posterior.std.float() * noise.to(posterior.mean.device)

    def _encode_in_fp32(self, image: PreparedImage, shard: str) -> Tensor | Rejected:
        """Encode one image in float32. Return a Rejected if its latent is not finite in float32 either."""
        if self.model.dtype != torch.float32:
            if self._fp32_model is None:
                self._fp32_model = build_model(self._vae, replace(self.compute, precision="fp32"), self.tile_above)
                self._count_runs(self._fp32_model)
            latent = self._run_in_memory(self._fp32_model, [image], shard)[0]
            if bool(latent.isfinite().all()):
                return latent
        return Rejected("encode", "not_finite")


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error means that a device, or the CPU's allocator, had no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    message = str(error).lower()
    return any(text in message for text in OUT_OF_MEMORY)


# Messages of CUDA, ROCm and their libraries after a context is lost. Every later call in the process fails as well.
_DEVICE_ERROR = re.compile(
    r"(CUDA|HIP|NVML) (driver |runtime )?error|device-side assert|(CUBLAS|CUDNN|CUSOLVER|CUFFT|HIPBLAS|MIOPEN)_STATUS_|"
    r"(cuDNN|cuBLAS|cublas|MIOpen|hipBLAS) error|Unable to find an engine|ECC error"
)


def is_device_error(error: BaseException) -> bool:
    """Whether an accelerator failed for the rest of its process, as after an illegal access or an ECC error."""
    if not isinstance(error, RuntimeError) or is_out_of_memory(error):
        return False
    return isinstance(error, torch.AcceleratorError) or _DEVICE_ERROR.search(str(error)) is not None


def normalize_pixels(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """Map uint8 [B, 3, H, W] to [-1, 1]: 0 is exactly -1, and 255 exactly 1.

    The values are computed in float32, then rounded to `dtype`.
    """
    values = pixels.to(torch.float32).div_(127.5).sub_(1.0)
    return values.to(dtype).contiguous(memory_format=torch.channels_last)
