"""The building blocks of the autoencoder.

Source: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", section 3.1.
The layout is that of VQGAN (Esser et al. 2021, "Taming Transformers for High-Resolution Image Synthesis").

Shapes: B images, C channels, H and W height and width at a level. Every block keeps the dtype and device of its input.
Parameter names are those of diffusers' safetensors files, so that these files load without renaming.
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
    """Return the normalization of every block (Wu & He 2018). eps is the reference's, not torch's default of 1e-5."""
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions with a residual connection (He et al. 2016): [B, in, H, W] -> [B, out, H, W]."""

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
    """Self-attention over all H*W positions with a residual connection: [B, C, H, W] -> [B, C, H, W].

    It has a single head of C channels. Queries, keys and values have an explicit dimension for the head, because
    torch's fused kernels accept only four dimensions. On a CPU this is 1.3 to 2.5 times as fast as three dimensions,
    and does not hold the [H*W, H*W] matrix. `processor` is the implementation (`vae.attention`).
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
        """Compute queries, keys and values by one matrix product, from a concatenated copy of their weights."""
        projections = (self.to_q, self.to_k, self.to_v)
        weight = torch.cat([projection.weight for projection in projections]).detach()
        bias = torch.cat([projection.bias for projection in projections]).detach()
        self.fused = weight, bias

    def unfuse(self) -> None:
        """Compute queries, keys and values by three matrix products, and drop the copy."""
        self.fused = None

    def project(self, h: Tensor) -> tuple[Tensor, ...]:
        """Return the queries, keys and values of h: three times [..., C] -> [..., C]."""
        if self.fused is None:
            return self.to_q(h), self.to_k(h), self.to_v(h)
        # The copy is not a parameter, so that `model.to(...)` does not convert it.
        weight, bias = (parameter.to(h) for parameter in self.fused)
        return F.linear(h, weight, bias).chunk(3, dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        h: Tensor = self.group_norm(x).flatten(2).transpose(1, 2).unsqueeze(1)  # [B, 1, H*W, C]
        h = self.processor(*self.project(h))
        h = self.to_out[0](h).squeeze(1)
        return x + h.transpose(1, 2).reshape(batch, channels, height, width)


class Downsample(nn.Module):
    """A 3x3 convolution with stride 2, padded on the right and bottom only: [B, C, H, W] -> [B, C, H/2, W/2]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # type: ignore[no-any-return]


class Upsample(nn.Module):
    """Nearest-neighbor upsampling, then a 3x3 convolution: [B, C, H, W] -> [B, C, 2H, 2W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # type: ignore[no-any-return]


class DownBlock(nn.Module):
    """A level of the encoder: `layers` residual blocks, then a `Downsample` except in the last level.

    [B, in, H, W] -> [B, out, H/2, W/2], or [B, out, H, W] in the last level.
    """

    def __init__(
        self, in_channels: int, out_channels: int, layers: int, groups: int, act_fn: str, is_last: bool
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, groups, act_fn) for i in range(layers)
        )
        self.downsamplers = None if is_last else nn.ModuleList([Downsample(out_channels)])

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.downsamplers is None else self.downsamplers[0](x)


class UpBlock(nn.Module):
    """A level of the decoder: `layers` residual blocks, then an `Upsample` except in the last level.

    [B, in, H, W] -> [B, out, 2H, 2W], or [B, out, H, W] in the last level.
    """

    def __init__(
        self, in_channels: int, out_channels: int, layers: int, groups: int, act_fn: str, is_last: bool
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, groups, act_fn) for i in range(layers)
        )
        self.upsamplers = None if is_last else nn.ModuleList([Upsample(out_channels)])

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.upsamplers is None else self.upsamplers[0](x)


class MidBlock(nn.Module):
    """The blocks at the lowest resolution: residual block, attention (optional), residual block. Keeps [B, C, H, W]."""

    def __init__(self, channels: int, groups: int, act_fn: str, has_attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups, act_fn) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels, groups)]) if has_attention else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        if self.attentions is not None:
            x = self.attentions[0](x)
        return self.resnets[1](x)  # type: ignore[no-any-return]
