"""Fast 3x3 convolutions for inference on CPUs, by Winograd's minimal filtering algorithm F(2x2, 3x3).

They apply to float32 convolutions with stride 1, padding 1 and at least 128 channels (`WinogradConv2d.suits`).
They need 16 products instead of 36 per 2x2 outputs and pair of channels, and run 1.1 to 1.7 times as fast for 128 to
512 channels (slower for 64 and fewer). The weights take 16/9 of the memory, and can no longer be trained or saved.
For SD at 256 px, the peak memory of the process grows by half.

Source: Lavin & Gray 2015, "Fast Algorithms for Convolutional Neural Networks" (arXiv 1509.09308), section 4.1. torch's
own CPU library has no such kernel. The sums are shorter than those of the direct algorithm, so the rounding errors are
smaller: 2e-6 instead of 1e-5 for 128 to 512 channels.

Each image is computed alone, in bands of rows. The intermediate values then stay in the processor's cache, and no bit
of the result depends on the other images of a batch.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MIN_CHANNELS = 128
BAND_ROW_PAIRS = 8  # pairs of rows in a band

# The names are those of the paper: G transforms the filter, B^T the input, and A^T the products.
_G = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))


class WinogradConv2d(nn.Module):
    """A convolution with a 3x3 kernel, stride 1 and padding 1, for inference: [B, in, H, W] -> [B, out, H, W].

    conv: the convolution to replace; its weights are transformed and copied. Input and output are float32 tensors in
    the memory format channels_last.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        g = torch.tensor(_G, dtype=torch.float64)
        weight = torch.einsum("ik,ockl,jl->ijco", g, conv.weight.detach().double(), g)
        self.weight = nn.Buffer(weight.reshape(16, *weight.shape[2:]).to(conv.weight.dtype).contiguous())
        bias = torch.zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()
        self.bias = nn.Buffer(bias.clone())

    @staticmethod
    def suits(module: nn.Module) -> bool:
        """Return whether `module` is a convolution that this class can replace and make faster."""
        return (
            isinstance(module, nn.Conv2d)
            and (module.kernel_size, module.stride, module.padding) == ((3, 3), (1, 1), (1, 1))
            and (module.dilation, module.groups) == ((1, 1), 1)
            and min(module.in_channels, module.out_channels) >= MIN_CHANNELS
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        row_pairs, column_pairs = (height + 1) // 2, (width + 1) // 2
        channels_last = x.permute(0, 2, 3, 1)
        out = x.new_empty(batch, 2 * row_pairs, 2 * column_pairs, self.bias.shape[0])
        for source, target in zip(channels_last, out, strict=True):
            for top in range(0, row_pairs, BAND_ROW_PAIRS):
                count = min(BAND_ROW_PAIRS, row_pairs - top)
                first, last = max(2 * top - 1, 0), min(2 * (top + count) + 1, height)
                missing = 2 * (top + count) + 1 - last  # rows of zeros at the bottom
                band = F.pad(source[first:last], (0, 0, 1, 2 * column_pairs - width + 1, int(top == 0), missing))
                self._run_band(band, target[2 * top : 2 * (top + count)].view(count, 2, column_pairs, 2, -1))
        return out[:, :height, :width].permute(0, 3, 1, 2)

    def _run_band(self, band: Tensor, out: Tensor) -> None:
        """Compute `out` [n, 2, m, 2, out] from the rows [2n + 2, 2m + 2, in] that it depends on."""
        count, column_pairs = out.shape[0], out.shape[2]
        channels = band.shape[-1]
        rows = band.new_empty(4, count, 2 * column_pairs + 2, channels)
        _transform_input(band, rows)
        tiles = band.new_empty(4, 4, count, column_pairs, channels)
        for row, row_tiles in zip(rows, tiles, strict=True):
            _transform_input(row.transpose(0, 1), row_tiles.transpose(1, 2))
        products = torch.bmm(tiles.view(16, count * column_pairs, -1), self.weight)
        products = products.view(4, 4, count, column_pairs, -1)
        for row, half in enumerate(_transform_products(products)):
            for column, values in enumerate(_transform_products(half)):
                torch.add(values, self.bias, out=out[:, row, :, column])


def _transform_input(x: Tensor, out: Tensor) -> None:
    """Write B^T x along the first dimension to `out`: [2n + 2, ...] -> [4, n, ...]."""
    a, b, c, d = x[0:-2:2], x[1:-1:2], x[2::2], x[3::2]
    torch.sub(a, c, out=out[0])
    torch.add(b, c, out=out[1])
    torch.sub(c, b, out=out[2])
    torch.sub(b, d, out=out[3])


def _transform_products(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return A^T x along the first dimension: [4, ...] -> two tensors [...]."""
    return x[0] + x[1] + x[2], x[1] - x[2] - x[3]
