"""The building blocks of the autoencoder (Rombach et al. 2022, "High-Resolution Image Synthesis with Latent
Diffusion Models", section 3.1 and appendix E; the layout is that of VQGAN, Esser et al. 2021).

Shapes: B images, C channels, H and W height and width at the level. Parameter names are those of diffusers'
safetensors files, so that these load as they are.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vae.attention import SDPA, Processor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "mish": F.mish,
    "gelu": F.gelu,
    "relu": F.relu,
}


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut: [B, in, H, W] -> [B, out, H, W]."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, act_fn: str) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.act = ACTIVATIONS[act_fn]

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.conv1(self.act(self.norm1(x)))
        h = self.conv2(self.act(self.norm2(h)))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        return x + h


class Attention(nn.Module):
    """Self-attention over all H*W places with one head as wide as the level: [B, C, H, W] -> the same.

    The head is spelt out, because torch's fused kernels take four dimensions only: on a CPU 1.3 to 2.5 times as fast
    as the same in three, and without the [H*W, H*W] matrix. processor: how it is computed (`vae.attention`).
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = group_norm(channels, groups)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])
        self.processor: Processor = SDPA()
        self.fused: tuple[Tensor, Tensor] | None = None

    def fuse(self) -> None:
        """Compute queries, keys and values by one matrix product, from weights that stand side by side."""
        parts = (self.to_q, self.to_k, self.to_v)
        self.fused = torch.cat([p.weight for p in parts]).detach(), torch.cat([p.bias for p in parts]).detach()

    def unfuse(self) -> None:
        self.fused = None

    def _qkv(self, h: Tensor) -> tuple[Tensor, ...]:
        if self.fused is None:
            return self.to_q(h), self.to_k(h), self.to_v(h)
        weight, bias = (part.to(h) for part in self.fused)
        return F.linear(h, weight, bias).chunk(3, dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        h: Tensor = self.group_norm(x).flatten(2).transpose(1, 2).unsqueeze(1)  # [B, 1, H*W, C]
        h = self.processor(*self._qkv(h))
        h = self.to_out[0](h).squeeze(1)
        return x + h.transpose(1, 2).reshape(batch, channels, height, width)


class Downsample(nn.Module):
    """Halves height and width by a strided convolution, padded on the right and below only, as in VQGAN."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # type: ignore[no-any-return]


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # type: ignore[no-any-return]


class DownBlock(nn.Module):
    """A level of the encoder: `layers` residual blocks, then a halving unless it is the last level."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, act_fn: str, last: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, groups, act_fn) for i in range(layers)
        )
        self.downsamplers = None if last else nn.ModuleList([Downsample(out_channels)])

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.downsamplers is None else self.downsamplers[0](x)


class UpBlock(nn.Module):
    """A level of the decoder: `layers` residual blocks, then a doubling unless it is the last level."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, act_fn: str, last: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, groups, act_fn) for i in range(layers)
        )
        self.upsamplers = None if last else nn.ModuleList([Upsample(out_channels)])

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.upsamplers is None else self.upsamplers[0](x)


class MidBlock(nn.Module):
    """The bottom of the U without skips: residual block, attention (unless switched off), residual block."""

    def __init__(self, channels: int, groups: int, act_fn: str, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups, act_fn) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels, groups)]) if attention else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        if self.attentions is not None:
            x = self.attentions[0](x)
        return self.resnets[1](x)  # type: ignore[no-any-return]
