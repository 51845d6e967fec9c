"""The diagonal Gaussian q(z|x) that the encoder describes (Kingma & Welling 2014, Auto-Encoding Variational Bayes)."""

import math

import torch
from torch import Tensor


class DiagonalGaussianDistribution:
    """A Gaussian with a diagonal covariance, from its moments.

    parameters: [B, 2C, H, W]: the mean, then the log-variance, which is clamped to [-30, 20].
    deterministic: zero variance: `sample` returns the mean, `kl` and `nll` are 0.
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        self.parameters = parameters
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.deterministic = deterministic
        self.std = torch.zeros_like(self.mean) if deterministic else torch.exp(0.5 * self.logvar)
        self.var = torch.zeros_like(self.mean) if deterministic else torch.exp(self.logvar)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """A draw [B, C, H, W]: mean + std * noise, the reparameterisation of section 2.4.

        The noise is drawn on the generator's device, so that a CPU generator gives the same draw everywhere.
        """
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean.device)

    def mode(self) -> Tensor:
        """The most likely latent, which is the mean: [B, C, H, W]."""
        return self.mean

    def kl(self, other: "DiagonalGaussianDistribution | None" = None) -> Tensor:
        """KL(self || other) in nats, summed over a latent: [B]; `other` is the standard normal unless given."""
        if self.deterministic:
            return torch.zeros(1)
        if other is None:
            terms = self.mean.pow(2) + self.var - 1.0 - self.logvar
        else:
            terms = (
                (self.mean - other.mean).pow(2) / other.var + self.var / other.var - 1.0 - self.logvar + other.logvar
            )
        return 0.5 * terms.sum(dim=[1, 2, 3])

    def nll(self, sample: Tensor, dims: tuple[int, ...] = (1, 2, 3)) -> Tensor:
        """Negative log-likelihood of `sample` [B, C, H, W] in nats, summed over `dims`: [B]."""
        if self.deterministic:
            return torch.zeros(1)
        terms = math.log(2.0 * math.pi) + self.logvar + (sample - self.mean).pow(2) / self.var
        return 0.5 * terms.sum(dim=dims)
