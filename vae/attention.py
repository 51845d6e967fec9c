"""Ways to compute the attention of the middle block. A processor is a function of queries, keys and values.

All give the same numbers up to rounding, from q, k, v [B, 1, N, C] (N places, one head of C channels) to [B, 1, N, C]:
softmax(q k^T / sqrt(C)) v (Vaswani et al. 2017).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Processor = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class SDPA:
    """torch's scaled_dot_product_attention: the fastest on CPUs, and without the [N, N] matrix. The default."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


@dataclass(frozen=True, slots=True)
class Plain:
    """The formula: two matrix products around a softmax, which is taken in float32. Holds [B, N, N]."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return torch.matmul(weights.float().softmax(-1).to(v.dtype), v)


@dataclass(frozen=True, slots=True)
class Sliced:
    """The formula for `size` places at a time: holds [B, size, N], whatever the size of the image."""

    size: int = 1024

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        plain = Plain()
        return torch.cat([plain(part, k, v) for part in torch.split(q, self.size, dim=2)], dim=2)
