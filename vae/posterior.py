"""The posterior q(z|x) of the encoder: a Gaussian with a diagonal covariance.

Source: Kingma & Welling 2013, "Auto-Encoding Variational Bayes" (arXiv 1312.6114), sections 2.4 and 3, appendix B.
Shapes: B images, C latent channels, H and W height and width of the latent.
"""

import math

import torch
from torch import Tensor


class DiagonalGaussianDistribution:
    """A Gaussian with a diagonal covariance, built from its moments.

    parameters: moments [B, 2C, H, W] of any floating dtype. The first C channels are the mean, the others the
        log-variance, which is clamped to [-30, 20] so that its exponential is finite.
    deterministic: treat the variance as zero. `sample` then returns the mean, and `kl` and `nll` return `zeros(1)`.

    Attributes: `parameters` (not clamped), and `mean`, `logvar`, `std` and `var`, each [B, C, H, W].
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        self.parameters = parameters
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.deterministic = deterministic
        self.std = torch.zeros_like(self.mean) if deterministic else torch.exp(0.5 * self.logvar)
        self.var = torch.zeros_like(self.mean) if deterministic else torch.exp(self.logvar)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Return a random latent [B, C, H, W]: mean + std * noise, the reparameterization of section 2.4.

        The result has the dtype and device of the moments. The noise is generated on the generator's device, so that
        a CPU generator gives the same noise for a model on any device.
        """
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean.device)

    def mode(self) -> Tensor:
        """Return the most likely latent [B, C, H, W], which is the mean."""
        return self.mean

    def kl(self, other: "DiagonalGaussianDistribution | None" = None) -> Tensor:
        """Return the divergence KL(self || other) in nats, summed over C, H and W: [B].

        other: default: the standard normal (appendix B).
        """
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
        """Return the negative log-likelihood of `sample` [B, C, H, W] in nats, summed over `dims` (default: [B])."""
        if self.deterministic:
            return torch.zeros(1)
        terms = math.log(2.0 * math.pi) + self.logvar + (sample - self.mean).pow(2) / self.var
        return 0.5 * terms.sum(dim=dims)
