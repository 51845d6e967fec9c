"""Encode pixels to latents with one copy of the model on one device, a batch of images per forward pass.

A batch always has the static shape of its bucket. If it is not full, it is padded. So a latent depends neither on the
other images nor on its position (bit for bit on a CPU), and a compiled or benchmarked kernel is chosen once per bucket.
"""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from latentmill.error_text import first_line
from pipeline.errors import Rejected, VaeError
from pipeline.images.seeds import derive_seed
from pipeline.jax_model import JaxModel
from pipeline.records import AttentionKernel, Backend, EncodedImage, Form, PreparedImage, Store
from pipeline.staging import Staging
from pipeline.weights import Vae
from vae import Autoencoder
from vae.attention import PerImage
from vae.auto import class_of
from vae.fast import compile_encoder, disable_malloc_trim, fuse_encoder, optimize_for_cpu
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
    "resource_exhausted",  # XLA
    "invalid buffer size",  # MPS: one buffer would exceed the device's maximum buffer length (MPSAllocator.mm)
)
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CHECKED_IMAGES, CHECKED_SIDE = 2, 256  # of the self-check
MAX_ERROR = 0.05  # of the self-check; the largest that was seen of a sound encoder is in docs/models.md
SAME_LATENT = 0.05  # the largest error of the same image; another device or batch size changes less, another image more


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeConfig:
    """How the model runs on a worker.

    backend: PyTorch (`vae.model`) or JAX (`vae.flax`), for which form and attention have no meaning.
    batch_size: images per forward pass. threads: intra-op threads on a CPU.
    form: the implementation of the encoder. `plain` is torch's own kernels (on a CPU with wide convolutions in float32
    by Winograd's algorithm), `fused` has Triton kernels between the convolutions, for GPUs (`vae.fused`), and
    `compiled` is torch.compile, once per shape.
    attention: `sdpa` is torch's scaled_dot_product_attention, `per-image` is `vae.attention.PerImage`.
    """

    device: str
    precision: str
    batch_size: int
    threads: int
    form: Form = "plain"
    attention: AttentionKernel = "sdpa"
    backend: Backend = "torch"

    @property
    def memory_format(self) -> torch.memory_format:
        """The memory format of pixels and weights. On GPUs, torch's group norm is slow for channels_last."""
        is_contiguous = self.device == "cuda" and self.form == "plain"
        return torch.contiguous_format if is_contiguous else torch.channels_last

    def with_smaller_batches(self) -> "ComputeConfig":
        """Return the same settings with half the batch size, but at least 1."""
        return replace(self, batch_size=max(1, self.batch_size // 2))


def build_model(vae: Vae, compute: ComputeConfig, tile_above: int | None = None) -> Autoencoder:
    """Build the model on its device and in its precision. tile_above: side in pixels, see `LatentEncoder`.

    Raises VaeError if the form needs a package that is not installed.
    """
    disable_malloc_trim()
    if compute.device == "cuda":
        configure_allocator()
        configure_cuda(compute.precision)
    if compute.device == "cpu":
        torch.set_num_threads(compute.threads)
    with torch.device("meta"):
        model = class_of(vae.config)(**vae.config)
    model.load_state_dict({name: torch.tensor(values) for name, values in vae.weights.items()}, assign=True)
    model.to(compute.device, PRECISIONS[compute.precision], memory_format=compute.memory_format)  # type: ignore[call-overload]
    if compute.attention == "per-image":
        model.set_attn_processor(PerImage())
    if compute.form == "compiled":
        compile_encoder(model)
    elif compute.form == "fused":
        try:
            fuse_encoder(model)
        except ModuleNotFoundError as error:
            text = f"the form fused needs the package {error.name}, which is not installed"
            raise VaeError(f"{text}: pip install {error.name}, or use --encoder-form plain") from error
    elif compute.device == "cpu" and model.dtype == torch.float32:
        optimize_for_cpu(model)
    if tile_above:
        model.enable_tiling()
        model.tile_sample_min_size, model.tile_latent_min_size = tile_above, tile_above // vae.config.downscale
    return model.eval().requires_grad_(False)


def configure_allocator() -> None:
    """Let torch's allocator on CUDA grow its segments, unless the user has configured it.

    Buckets and halved batches need blocks of many sizes. Without this, memory that is free in segments of another size
    cannot be used. torch reads the environment variable at its first allocation, so this must run before it.
    """
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"


def configure_cuda(precision: str) -> None:
    """Set the switches of torch that decide how exact and how fast CUDA computes. They hold for the whole process.

    By default, torch convolves float32 values in TF32, which keeps 10 bits of their mantissas. So `fp32` asks for
    float32, and `tf32` for TF32. Sums of half-precision products are kept in float32. The shapes are static, so cuDNN
    times its algorithms once per shape. Only those are used that give the same bits each time.
    """
    float32_precision = "tf32" if precision == "tf32" else "ieee"
    torch.backends.cuda.matmul.fp32_precision = float32_precision
    torch.backends.cudnn.conv.fp32_precision = float32_precision  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.deterministic = True


@dataclass(frozen=True, slots=True)
class ModelInput:
    """An image as the model sees it. is_flipped: mirrored left to right."""

    image: PreparedImage
    is_flipped: bool = False

    def derive_seed(self, seed: int) -> int:
        """Return the seed of a sample of its posterior. seed: of the cache."""
        return derive_seed(seed, "sample_flipped" if self.is_flipped else "sample", self.image.shard, self.image.key)


@dataclass(slots=True)
class LaunchedBatch:
    """A batch that a device encodes. latents, is_finite: [N, ...] and [N], valid once `done` has happened.

    inputs: one per image, in order, followed by one per flipped image, in the same order, if these are encoded.
    buffers: pinned memory that is in use until then.
    """

    inputs: Sequence[ModelInput]
    latents: Tensor
    is_finite: Tensor
    done: "torch.cuda.Event | None" = None
    buffers: Sequence[Tensor] = ()


class LatentEncoder:
    """One model on one device. Only one thread at a time may use it.

    store: the stored part of the posterior: its `mode`, a `sample` that follows from `seed`, shard and key, or its
    `moments` (mean and log-variance).
    tile_above: images with a side of more pixels than this are encoded in tiles of this size.
    has_flipped: whether each image is encoded a second time, mirrored left to right. Images and flipped images fill the
    same batches.
    """

    def __init__(
        self,
        vae: Vae,
        compute: ComputeConfig,
        dtype: str,
        store: Store = "mode",
        seed: int = 0,
        tile_above: int | None = None,
        has_flipped: bool = False,
    ) -> None:
        self.compute = compute  # the batch size is halved if memory does not suffice
        self.dtype = DTYPES[dtype]
        self.store = store
        self.seed = seed
        self.images = 0
        self.runs = 0  # of the encoder; a tiled image takes one run per tile
        self.tile_above = tile_above
        self.has_flipped = has_flipped
        self._vae = vae
        self.model = self._build_model(compute)
        self._fp32_model: Autoencoder | JaxModel | None = None  # built when the first latent overflows
        self.runs_ahead = (compute.backend, compute.device) == ("torch", "cuda")
        self._staging = Staging(compute.device if compute.backend == "torch" else "cpu")

    @property
    def batch_size(self) -> int:
        """Images per forward pass."""
        return self.compute.batch_size

    def encode(self, images: Sequence[PreparedImage]) -> Sequence[EncodedImage]:
        """Encode images of one bucket. Each latent is [2C, H/f, W/f] if moments are stored.

        A latent that is not finite is encoded again in float32. If it is still not finite, it becomes a Rejected. With
        flipped latents, an image is rejected if either is not finite.
        Raises VaeError if the device's memory does not suffice for a single image.
        """
        return self.finish(self.launch(images))

    def launch(self, images: Sequence[PreparedImage]) -> LaunchedBatch:
        """Start to encode images of one bucket. On CUDA, the device works on after this returns. Raises VaeError."""
        inputs = [ModelInput(image) for image in images]
        if self.has_flipped:
            inputs += [ModelInput(image, is_flipped=True) for image in images]
        latents, buffers = self._run_in_memory(self.model, inputs)
        is_finite = latents.isfinite().flatten(1).all(dim=1)
        if not self.runs_ahead:
            self._staging.release(buffers)
            return LaunchedBatch(inputs, latents, is_finite)
        host_latents = self._staging.take(latents.shape, latents.dtype)
        host_finite = self._staging.take(is_finite.shape, is_finite.dtype)
        host_latents.copy_(latents, non_blocking=True)
        host_finite.copy_(is_finite, non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        return LaunchedBatch(inputs, host_latents, host_finite, done, [*buffers, host_latents, host_finite])

    def is_fatal(self, error: Exception) -> bool:
        """Whether an error means that every later batch fails as well."""
        return is_device_error(error)

    def is_done(self, launched: LaunchedBatch) -> bool:
        """Whether the device is done with a batch, so that `finish` does not wait."""
        return launched.done is None or bool(launched.done.query())  # type: ignore[no-untyped-call]

    def finish(self, launched: LaunchedBatch) -> Sequence[EncodedImage]:
        """Wait for a batch, and return the results in the order of its images. See `encode`."""
        if launched.done is not None:
            launched.done.synchronize()
        latents, is_finite = launched.latents.cpu(), launched.is_finite.tolist()
        if launched.buffers:
            latents = latents.clone()  # the pinned memory is used again
            self._staging.release(launched.buffers)
        results = [
            EncodedImage(latent) if finite else self._encode_in_fp32(item)
            for item, latent, finite in zip(launched.inputs, latents, is_finite, strict=True)
        ]
        if self.has_flipped:
            half = len(results) // 2
            results = [result.with_flipped(other) for result, other in zip(results[:half], results[half:], strict=True)]
        self.images += len(results)
        return results

    def check_precision(self) -> float | None:
        """Encode two synthetic images also in float32, and return the relative root mean square error of the latents.

        Returns None if this encoder computes in float32 on a CPU, or if an image overflows. Raises VaeError if the
        error is above MAX_ERROR, as with a broken kernel or a faulty device.
        """
        compute = self.compute
        if (compute.backend, compute.device, compute.precision) == ("torch", "cpu", "fp32"):
            return None
        device = compute.device if compute.backend == "torch" else "cpu"
        plain = replace(compute, device=device, precision="fp32", form="plain", attention="sdpa", backend="torch")
        exact = encode_checked_images(build_model(self._vae, plain, self.tile_above), plain)
        if device == "cuda":
            configure_cuda(compute.precision)
        error = measure_error(encode_checked_images(self.model, compute), exact)
        if error is not None and error > MAX_ERROR:
            raise VaeError(
                f"the {self.compute.device} device computes wrong latents: in {self.compute.precision} they are off by "
                f"{error:.1%} of their size (at most {MAX_ERROR:.0%} is normal); use another device or --precision fp32"
            )
        return error

    def _build_model(self, compute: ComputeConfig) -> "Autoencoder | JaxModel":
        """Build a model whose encoder counts its runs."""
        if compute.backend == "jax":
            return JaxModel(self._vae, compute.device, compute.precision, compute.threads, self._on_run)
        model = build_model(self._vae, compute, self.tile_above)
        if compute.form != "compiled":  # torch.compile would compile the hook as well
            model.encoder.register_forward_hook(self._on_run)
        return model

    def _on_run(self, *_: object) -> None:
        self.runs += 1

    def _run_in_memory(
        self, model: Autoencoder | JaxModel, inputs: Sequence[ModelInput]
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the model. Halve the batch size, also for later batches, each time that memory does not suffice."""
        while True:
            try:
                return self._run(model, inputs)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.compute.batch_size == 1:
                    height, width = inputs[0].image.bucket
                    backend = "--backend torch and " if self.compute.backend == "jax" else ""
                    raise VaeError(
                        f"out of memory on {self.compute.device} while encoding a single image of {height}x{width} "
                        f"pixels; use {backend}--tile-above to encode it in tiles "
                        f"({first_line(error):.200})"
                    ) from error
            self.compute = self.compute.with_smaller_batches()
            if self.compute.device in ("cuda", "mps"):
                getattr(torch, self.compute.device).empty_cache()

    def _run(self, model: Autoencoder | JaxModel, inputs: Sequence[ModelInput]) -> tuple[Tensor, list[Tensor]]:
        """Return the latents [N, ...] on the device, and the pinned memory that it still reads.

        inputs: flipped ones last. They are flipped on the device, so that no second copy of the pixels waits for it.
        """
        size = self.compute.batch_size
        outputs, buffers = [], []
        with torch.inference_mode():
            for start in range(0, len(inputs), size):
                chunk = inputs[start : start + size]
                buffers.append(self._staging.collate([item.image.pixels for item in chunk], size))
                pixels = self._staging.to_device(buffers[-1])
                if chunk[-1].is_flipped:
                    first = sum(not item.is_flipped for item in chunk)
                    pixels[first:] = pixels[first:].flip(2)
                posterior = encode_pixels(model, pixels, self.compute)
                latents = self._convert_to_stored_form(posterior, [*chunk, *[chunk[-1]] * (size - len(chunk))])
                outputs.append(latents[: len(chunk)].to(self.dtype))
            return torch.cat(outputs), buffers

    def _convert_to_stored_form(self, posterior: DiagonalGaussianDistribution, inputs: Sequence[ModelInput]) -> Tensor:
        """Return the stored form of a batch's posteriors. Noise is drawn on the CPU, so it is equal on all devices."""
        if self.store == "mode":
            return posterior.mode()
        if self.store == "moments":
            return torch.cat([posterior.mean, posterior.logvar], dim=1)
        shape = posterior.mean.shape[1:]
        seeds = [item.derive_seed(self.seed) for item in inputs]
        noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        return posterior.mean.float() + posterior.std.float() * noise.to(posterior.mean.device)

    def _encode_in_fp32(self, item: ModelInput) -> EncodedImage:
        """Encode one image in float32. Its latent is a Rejected if it is not finite in float32 either."""
        if self.model.dtype != torch.float32:
            if self._fp32_model is None:
                self._fp32_model = self._build_model(replace(self.compute, precision="fp32"))
            latents, buffers = self._run_in_memory(self._fp32_model, [item])
            latent = latents[0].cpu()
            self._staging.release(buffers)
            if bool(latent.isfinite().all()):
                return EncodedImage(latent, is_fallback=True)
        return EncodedImage(Rejected("encode", "not_finite"))


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


def make_checked_image(seed: int) -> Tensor:
    """Return an image for the self-check, uint8 [CHECKED_SIDE, CHECKED_SIDE, 3]: large shapes with some noise."""
    generator = torch.Generator().manual_seed(seed)
    shapes = torch.rand(1, 3, 8, 8, generator=generator)
    smooth = torch.nn.functional.interpolate(shapes, size=CHECKED_SIDE, mode="bicubic")[0]
    noise = torch.randn(smooth.shape, generator=generator) * 0.05
    return ((smooth + noise).clamp(0, 1) * 255).to(torch.uint8).permute(1, 2, 0)


def encode_checked_images(model: Autoencoder | JaxModel, compute: ComputeConfig) -> Tensor:
    """Return the latents of the self-check's images, float64 [CHECKED_IMAGES, C, H/f, W/f] on the CPU."""
    pixels = torch.stack([make_checked_image(number) for number in range(CHECKED_IMAGES)])
    if compute.backend == "torch":
        pixels = pixels.to(compute.device)
    with torch.inference_mode():
        return encode_pixels(model, pixels, compute).mode().double().cpu()


def encode_pixels(
    model: Autoencoder | JaxModel, pixels: Tensor, compute: ComputeConfig
) -> DiagonalGaussianDistribution:
    """Return the posteriors of images, uint8 [B, H, W, 3]: for torch on the model's device, for JAX on the CPU."""
    if isinstance(model, JaxModel):
        return model.encode_pixels(pixels)
    return model.encode(normalize_pixels(pixels, model.dtype, compute.memory_format)).latent_dist


def measure_error(actual: Tensor, exact: Tensor) -> float | None:
    """Return the root mean square error relative to `exact`, of the same shape; None if one of them is not finite."""
    actual, exact = actual.double(), exact.double()
    error = float((actual - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt().clamp(min=1e-12))
    return error if math.isfinite(error) else None


def normalize_pixels(
    pixels: Tensor, dtype: torch.dtype, memory_format: torch.memory_format = torch.channels_last
) -> Tensor:
    """Map uint8 [B, H, W, 3] to [B, 3, H, W] in [-1, 1]: 0 is exactly -1, and 255 exactly 1.

    The values are computed in float32, then rounded to `dtype`.
    """
    values = pixels.permute(0, 3, 1, 2).to(torch.float32).div_(127.5).sub_(1.0)
    return values.to(dtype).contiguous(memory_format=memory_format)


def denormalize_pixels(values: Tensor) -> Tensor:
    """Map a decoder's output [B, 3, H, W], clamped to [-1, 1], to uint8 [B, H, W, 3] on the CPU."""
    return values.float().clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).contiguous().cpu()
