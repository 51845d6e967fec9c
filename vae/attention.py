"""Implementations of the middle block's attention. A processor is a function of queries, keys and values.

Each computes softmax(q k^T / sqrt(C)) v (Vaswani et al. 2017, "Attention Is All You Need", section 3.2.1).
The inputs q, k and v and the result are [B, 1, N, C]: B images, a single head of C channels, N = H*W positions.
Results differ by rounding only. dtype and device are those of the inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Processor = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class SDPA:
    """The default: torch's scaled_dot_product_attention. The fastest on CPUs; does not hold the [N, N] matrix."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


@dataclass(frozen=True, slots=True)
class Plain:
    """The formula as written: two matrix products around a softmax in float32. Holds the matrix [B, 1, N, N]."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return torch.matmul(weights.float().softmax(-1).to(v.dtype), v)


@dataclass(frozen=True, slots=True)
class Sliced:
    """`Plain` for `size` queries at a time: holds [B, 1, size, N], so that memory grows with N instead of N squared."""

    size: int = 1024

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        plain = Plain()
        return torch.cat([plain(part, k, v) for part in torch.split(q, self.size, dim=2)], dim=2)


@dataclass(frozen=True, slots=True)
class PerImage:
    """`Plain` for one image at a time, in the dtype of the inputs, and for at most `max_weights` weights at a time.

    On GPUs, torch has no fast fused kernel for a head of 512 channels, and two matrix products may be faster than SDPA.
    The softmax reads and writes that dtype. torch computes it in float32 in between.
    """

    max_weights: int = 1 << 28

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        size = max(1, self.max_weights // k.shape[2])
        return torch.stack([self._attend(*image, size) for image in zip(q, k, v, strict=True)])

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, size: int) -> Tensor:
        """Return the attention of one image: [1, N, C]. size: queries at a time."""
        scale, k = q.shape[-1] ** -0.5, k.transpose(-1, -2)
        return torch.cat([((part * scale) @ k).softmax(-1) @ v for part in torch.split(q, size, dim=1)], dim=1)
