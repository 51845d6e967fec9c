"""Random numbers of a row: the same in every batch, on every rank, and after every restart."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

LOGVAR_RANGE = (-30.0, 20.0)  # the clamp of the log-variance, as in `vae.posterior`


def derive_seed(purpose: str, seed: int, epoch: int, shard: str, key: str) -> int:
    """Return the 63-bit seed of a row's random numbers for one purpose in one epoch."""
    text = f"{purpose} {seed} {epoch} {shard}\0{key}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def draw_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Return standard normal numbers [B, *shape] in float32. Those of a row depend on its seed alone."""
    noise, generator = torch.empty((len(seeds), *shape)), torch.Generator()
    for row, seed in zip(noise, seeds, strict=True):
        generator.manual_seed(seed)
        torch.randn(row.shape, generator=generator, out=row)
    return noise


def draw(moments: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return a random latent [..., C, h, w] of moments [..., 2C, h, w]: mean + std * noise.

    It has the dtype and the device of the moments, as raw latents do. The log-variance is clamped to [-30, 20].
    generator: of the noise, on any device; None: torch's own.
    """
    mean, logvar = moments.chunk(2, dim=-3)
    device = moments.device if generator is None else generator.device
    noise = torch.randn(mean.shape, generator=generator, device=device, dtype=mean.dtype)
    return add_noise(mean, logvar, noise.to(moments.device))


def add_noise(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """Return mean + std * noise, in the memory of the noise."""
    return noise.mul_(logvar.clamp(*LOGVAR_RANGE).mul_(0.5).exp_()).add_(mean)
