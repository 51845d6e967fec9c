"""What FlaxAutoencoderKL returns: the outputs of `encode` and `decode`, and the posterior. All of them are pytrees.

`jit`, `vmap` and `pmap` can therefore return them. Shapes: B images, C latent channels, H and W height and width of the
latent. Channels are last in latents and moments.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from flax import struct
from jax import numpy as jnp


class FlaxDiagonalGaussianDistribution(struct.PyTreeNode):
    """A Gaussian with a diagonal covariance, built from its moments (`vae.posterior` has the source of the formulas).

    parameters: moments [B, H, W, 2C] of any floating dtype. The first C channels are the mean, the others the
        log-variance, which is clamped to [-30, 20] so that its exponential is finite.
    deterministic: treat the variance as zero. `sample` then returns the mean, and `kl` and `nll` return `[0.0]`.
    """

    parameters: jax.Array
    deterministic: bool = struct.field(pytree_node=False, default=False)

    @property
    def mean(self) -> jax.Array:
        """The mean [B, H, W, C]."""
        return jnp.split(self.parameters, 2, axis=-1)[0]

    @property
    def logvar(self) -> jax.Array:
        """The log-variance [B, H, W, C], in [-30, 20]."""
        return jnp.clip(jnp.split(self.parameters, 2, axis=-1)[1], -30.0, 20.0)

    @property
    def std(self) -> jax.Array:
        """The standard deviation [B, H, W, C]."""
        return jnp.zeros_like(self.mean) if self.deterministic else jnp.exp(0.5 * self.logvar)

    @property
    def var(self) -> jax.Array:
        """The variance [B, H, W, C]."""
        return jnp.zeros_like(self.mean) if self.deterministic else jnp.exp(self.logvar)

    def sample(self, key: jax.Array) -> jax.Array:
        """Return a random latent [B, H, W, C]: mean + std * noise. It is float32 for moments in half precision."""
        return self.mean + self.std * jax.random.normal(key, self.mean.shape)

    def mode(self) -> jax.Array:
        """Return the most likely latent [B, H, W, C], which is the mean."""
        return self.mean

    def kl(self, other: "FlaxDiagonalGaussianDistribution | None" = None) -> jax.Array:
        """Return the divergence KL(self || other) in nats, summed over C, H and W: [B].

        other: default: the standard normal.
        """
        if self.deterministic:
            return jnp.array([0.0])
        if other is None:
            terms = self.mean**2 + self.var - 1.0 - self.logvar
        else:
            terms = (self.mean - other.mean) ** 2 / other.var + self.var / other.var - 1.0 - self.logvar + other.logvar
        return 0.5 * jnp.sum(terms, axis=(-3, -2, -1))

    def nll(self, sample: jax.Array, axis: Sequence[int] = (1, 2, 3)) -> jax.Array:
        """Return the negative log-likelihood of `sample` [B, H, W, C] in nats, summed over `axis` (default: [B])."""
        if self.deterministic:
            return jnp.array([0.0])
        terms = math.log(2.0 * math.pi) + self.logvar + (sample - self.mean) ** 2 / self.var
        return 0.5 * jnp.sum(terms, axis=tuple(axis))


class _Output(struct.PyTreeNode):
    """An output whose values are read by attribute, by name or by position. It is immutable (`replace`)."""

    def keys(self) -> tuple[str, ...]:
        """Return the names of the values."""
        return tuple(self.__dataclass_fields__)

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the values."""
        return tuple(getattr(self, name) for name in self.keys())

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self.keys():
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())


class FlaxAutoencoderKLOutput(_Output):
    """The result of `encode`: the posterior over raw latents [B, H/f, W/f, C]."""

    latent_dist: FlaxDiagonalGaussianDistribution


class FlaxDecoderOutput(_Output):
    """The result of `decode`: pixels [B, 3, H, W], mostly in [-1, 1] but not clamped."""

    sample: jax.Array
