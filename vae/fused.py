"""The encoder in the memory format channels_last, with the kernels of `vae.group_norm_silu` between its convolutions.

It computes the same function as `vae.model.Encoder`, from the same modules and parameters. The differences:

- No convolution adds its bias. The kernel that reads its output does. The bias of a convolution whose output is also
  passed on (`conv_in`, those of `Downsample`) is added to the result of the residual block, through the 1x1 convolution
  of the shortcut if there is one.
- The kernel of a residual addition also computes the moments that the next norm needs, so that the norm reads its
  input once.
- A `Downsample` finds its input padded, as the addition before it wrote it.
- The attention has its positions in rows as they are, without a copy.

For inference only: the kernels have no gradients.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vae.blocks import Attention, DownBlock, ResnetBlock
from vae.group_norm_silu import Moments, add_residual, add_residual_padded, normalize
from vae.model import Encoder


@dataclass(frozen=True, slots=True)
class _FusedResnet:
    """A residual block. Its input lacks `in_bias` [in]; `out_bias` [out] is the sum of the biases that it adds."""

    block: ResnetBlock
    in_bias: Tensor | None
    out_bias: Tensor
    pads_output: bool

    @classmethod
    def of(cls, block: ResnetBlock, in_bias: Tensor | None, pads_output: bool) -> "_FusedResnet":
        out_bias = _bias_of(block.conv2)
        if block.conv_shortcut is not None:
            out_bias = out_bias + _bias_of(block.conv_shortcut)
        if in_bias is not None and block.conv_shortcut is not None:
            out_bias = out_bias + block.conv_shortcut.weight.detach().float()[:, :, 0, 0] @ in_bias
        elif in_bias is not None:
            out_bias = out_bias + in_bias
        return cls(block, in_bias, out_bias, pads_output)

    def run(self, x: Tensor, moments: Moments | None) -> tuple[Tensor, Moments | None]:
        """Return the block's output [B, out, H, W] and its moments, or the padded output [B, out, H + 1, W + 1].

        x: [B, in, H, W]. moments: of x, if they are known.
        """
        block = self.block
        h = _convolve(block.conv1, self._activate(x, block.norm1, self.in_bias, moments))
        h = _convolve(block.conv2, self._activate(h, block.norm2, block.conv1.bias))
        if block.conv_shortcut is not None:
            x = _convolve(block.conv_shortcut, x)
        if self.pads_output:
            return add_residual_padded(h, x, self.out_bias), None
        return add_residual(h, x, self.out_bias)

    def _activate(self, x: Tensor, norm: nn.GroupNorm, bias: Tensor | None, moments: Moments | None = None) -> Tensor:
        is_silu = self.block.act is F.silu
        y = normalize(x, norm, silu=is_silu, bias=bias, moments=moments)
        return y if is_silu else self.block.act(y)


class FusedEncoder(nn.Module):
    """An encoder with the same parameters under the same names: pixels [B, 3, H, W] -> moments [B, 2C, H/f, W/f].

    encoder: the encoder to replace, in channels_last, on its device and of its dtype. It must not be moved or trained
    afterwards. Pixels may have any memory format. The result is channels_last.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.conv_in, self.conv_out = encoder.conv_in, encoder.conv_out
        self.down_blocks, self.mid_block = encoder.down_blocks, encoder.mid_block
        self.conv_norm_out = encoder.conv_norm_out
        self._levels: list[tuple[list[_FusedResnet], nn.Conv2d | None]] = []
        bias: Tensor | None = _bias_of(encoder.conv_in)
        for level in cast("Iterable[DownBlock]", encoder.down_blocks):
            downsample = None if level.downsamplers is None else cast(nn.Conv2d, level.downsamplers[0].conv)
            resnets = []
            for index, block in enumerate(level.resnets):
                pads_output = downsample is not None and index == len(level.resnets) - 1
                resnets.append(_FusedResnet.of(cast(ResnetBlock, block), bias, pads_output))
                bias = None
            self._levels.append((resnets, downsample))
            bias = None if downsample is None else _bias_of(downsample)
        self._mid = [_FusedResnet.of(cast(ResnetBlock, block), None, False) for block in encoder.mid_block.resnets]

    def forward(self, x: Tensor) -> Tensor:
        moments: Moments | None = None
        x = _convolve(self.conv_in, x)
        for resnets, downsample in self._levels:
            for resnet in resnets:
                x, moments = resnet.run(x, moments)
            if downsample is not None:
                x = _convolve(downsample, x)  # the input is padded
        x, moments = self._mid[0].run(x, moments)
        if self.mid_block.attentions is not None:
            x, moments = _attend(cast(Attention, self.mid_block.attentions[0]), x, moments)
        x, moments = self._mid[1].run(x, moments)
        h = normalize(x, self.conv_norm_out, silu=True, moments=moments)
        return self.conv_out(h)  # type: ignore[no-any-return]


def _attend(attention: Attention, x: Tensor, moments: Moments | None) -> tuple[Tensor, Moments]:
    """Return x [B, C, H, W] plus its attention, and the moments of the sum."""
    batch, channels, height, width = x.shape
    h = normalize(x, attention.group_norm, silu=False, moments=moments)
    h = h.permute(0, 2, 3, 1).reshape(batch, 1, height * width, channels)  # a view
    h = attention.processor(*attention.project(h))
    out = cast(nn.Linear, attention.to_out[0])
    h = F.linear(h, out.weight).view(batch, height, width, channels).permute(0, 3, 1, 2)
    return add_residual(h, x, out.bias)


def _convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Return the convolution of x in channels_last, without its bias."""
    y = F.conv2d(x, conv.weight, None, conv.stride, conv.padding)
    return y.contiguous(memory_format=torch.channels_last)


def _bias_of(conv: nn.Conv2d) -> Tensor:
    """Return a convolution's bias in float32, in which sums of biases are kept."""
    assert conv.bias is not None
    return conv.bias.detach().float()
