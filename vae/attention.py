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
