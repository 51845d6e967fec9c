"""A FlaxAutoencoderKL on one device, for `--backend jax`. It takes and returns torch's tensors. Needs the extra `jax`.

It also runs FLUX.2's class, whose raw latents are made in the same way.

Float32 means full precision on every device. Each shape of batch is compiled once, and compiled code is kept on disk
(CACHE, or JAX_COMPILATION_CACHE_DIR), because it takes seconds per shape on a CPU, and longer on a TPU.
"""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import UsageError, VaeError
from pipeline.weights import Vae
from vae import VaeConfig
from vae.posterior import DiagonalGaussianDistribution

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "latentmill/jax"
PLATFORMS = {"cpu": "cpu", "cuda": "gpu", "tpu": "tpu"}  # by the names of --device
PRECISIONS = ("fp32", "bf16")


def check_installed() -> None:
    """Raise UsageError if JAX or Flax is missing."""
    missing = [name for name in ("jax", "flax") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"--backend jax needs {' and '.join(missing)}: pip install 'latentmill[jax]'")


def configure(threads: int) -> None:
    """Set what JAX reads before its first use. What the user has set remains.

    threads: of a CPU, which XLA otherwise uses as a whole. Raises UsageError if JAX is not installed.
    """
    check_installed()
    os.environ.setdefault("NPROC", str(threads))
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # otherwise 75% of a GPU at once
    import jax

    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(CACHE))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def has_device(device: str) -> bool:
    """Return whether this machine has a device for JAX."""
    try:
        return bool(_list_devices(device))
    except RuntimeError:  # JAX has no such platform
        return False


def _list_devices(device: str) -> list[Any]:
    import jax

    return list(jax.local_devices(backend=PLATFORMS[device]))


class JaxModel:
    """A copy of the model. Parameters are on the device, in the precision of the computation.

    dtype: of the computation, as torch's. on_run: called after each run of the encoder.
    Raises VaeError if there is no such device.
    """

    def __init__(
        self, vae: Vae, device: str, precision: str, threads: int, on_run: Callable[[], None] = lambda: None
    ) -> None:
        configure(threads)
        import jax
        from jax import numpy as jnp

        from vae.flax import FlaxAutoencoderKL, encode_pixels

        if not has_device(device):
            raise VaeError(f"JAX finds no {device} here; install jax for it, or use another --device")
        if vae.config.decoder_channels != vae.config.block_out_channels:
            raise VaeError(f"the decoder of {vae.reference} has other channels than its encoder: use --backend torch")
        self.config = vae.config
        self._on_run = on_run
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        self._device = _list_devices(device)[0]
        fields = {name: vae.config[name] for name in VaeConfig.__dataclass_fields__}
        model = FlaxAutoencoderKL(**fields, dtype=jnp.float32 if precision == "fp32" else jnp.bfloat16)
        weights = {name: torch.tensor(values) for name, values in vae.weights.items() if not name.startswith("bn.")}
        with jax.default_device(self._device):
            params = model.convert_state_dict(weights)
            self._params = params if precision == "fp32" else model.to_bf16(params)
        self._encode: Any = jax.jit(lambda params, pixels: encode_pixels(model, params, pixels))
        self._decode: Any = jax.jit(
            lambda params, latents: model.apply(
                {"params": params}, latents, method="decode", channels_last=True
            ).sample.astype(jnp.float32)
        )

    def _put(self, array: np.ndarray) -> Any:
        import jax

        return jax.device_put(array, self._device)

    def encode_pixels(self, pixels: Tensor) -> DiagonalGaussianDistribution:
        """Return the posterior in float32 on the CPU. pixels: uint8 [B, H, W, 3] on the CPU.

        Raises RuntimeError ("RESOURCE_EXHAUSTED") if the device's memory does not suffice.
        """
        moments = self._encode(self._params, self._put(pixels.numpy()))
        posterior = DiagonalGaussianDistribution(torch.from_numpy(np.array(moments)))  # it waits for the device
        self._on_run()
        return posterior

    def decode(self, latents: Tensor) -> Tensor:
        """Return pixels [B, 3, H, W] in float32 on the CPU, mostly in [-1, 1]. latents: raw [B, C, H/f, W/f]."""
        array = latents.float().permute(0, 2, 3, 1).contiguous().numpy()
        return torch.from_numpy(np.array(self._decode(self._params, self._put(array))))
