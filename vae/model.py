"""AutoencoderKL, the autoencoder of latent diffusion: read this first.

    pixels [B, 3, H, W] in [-1, 1]
      -> Encoder -> quant_conv -> moments [B, 2C, H/f, W/f] -> posterior -> latents [B, C, H/f, W/f]
      -> post_quant_conv -> Decoder -> pixels [B, 3, H, W]

The latents that come out and go in are *raw*: what a diffusion model sees is made from them by `vae.scaling`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vae import load
from vae.attention import SDPA, Processor
from vae.blocks import Attention, DownBlock, MidBlock, UpBlock, group_norm
from vae.config import AutoencoderKLConfig
from vae.posterior import DiagonalGaussianDistribution
from vae.tiling import Tiles, run_in_tiles


class Encoder(nn.Module):
    """Pixels [B, 3, H, W] -> moments before quant_conv [B, 2C, H/f, W/f]."""

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        channels, groups, act_fn = config.block_out_channels, config.norm_num_groups, config.act_fn
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(
                channels[max(level - 1, 0)],
                channels[level],
                config.layers_per_block,
                groups,
                act_fn,
                last=level == len(channels) - 1,
            )
            for level in range(len(channels))
        )
        self.mid_block = MidBlock(channels[-1], groups, act_fn, config.mid_block_add_attention)
        self.conv_norm_out = group_norm(channels[-1], groups)
        self.conv_act = F.silu  # in the reference too, whatever act_fn is
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(self.conv_act(self.conv_norm_out(x)))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Latents after post_quant_conv [B, C, H/f, W/f] -> pixels [B, 3, H, W]."""

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        channels, groups, act_fn = config.block_out_channels[::-1], config.norm_num_groups, config.act_fn
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(channels[0], groups, act_fn, config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList(
            UpBlock(
                channels[max(level - 1, 0)],
                channels[level],
                config.layers_per_block + 1,
                groups,
                act_fn,
                last=level == len(channels) - 1,
            )
            for level in range(len(channels))
        )
        self.conv_norm_out = group_norm(channels[-1], groups)
        self.conv_act = F.silu  # in the reference too, whatever act_fn is
        self.conv_out = nn.Conv2d(channels[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(self.conv_act(self.conv_norm_out(x)))  # type: ignore[no-any-return]


@dataclass
class AutoencoderKLOutput:
    """What `encode` returns."""

    latent_dist: DiagonalGaussianDistribution


@dataclass
class DecoderOutput:
    """What `decode` returns: pixels [B, 3, H, W], about [-1, 1] (not clamped)."""

    sample: Tensor
    commit_loss: Tensor | None = None


class AutoencoderKL(nn.Module):
    """The KL-regularised autoencoder. The keyword arguments are the fields of `AutoencoderKLConfig`."""

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.config = AutoencoderKLConfig(**fields)
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
        both, latent = 2 * self.config.latent_channels, self.config.latent_channels
        self.quant_conv = nn.Conv2d(both, both, 1) if self.config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent, latent, 1) if self.config.use_post_quant_conv else None
        self.slice_size: int | None = None
        self.use_tiling = False
        size = self.config.sample_size
        self.tile_sample_min_size = size if isinstance(size, int) else size[0]  # pixels; larger images are tiled
        self.tile_latent_min_size = self.tile_sample_min_size // self.config.downscale
        self.tile_overlap_factor = 0.25

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.encoder.conv_in.weight.device

    @overload
    def encode(self, x: Tensor, return_dict: Literal[True] = True) -> AutoencoderKLOutput: ...
    @overload
    def encode(self, x: Tensor, return_dict: bool) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]: ...
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Pixels [B, 3, H, W] in [-1, 1] -> the posterior over raw latents [B, C, H/f, W/f]."""
        posterior = DiagonalGaussianDistribution(self._in_slices(self._encode, x))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @overload
    def decode(
        self, z: Tensor, return_dict: Literal[True] = True, generator: torch.Generator | None = None
    ) -> DecoderOutput: ...
    @overload
    def decode(
        self, z: Tensor, return_dict: bool, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]: ...
    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Raw latents [B, C, H/f, W/f] -> pixels [B, 3, H, W]. `generator` is of the reference's interface, unused."""
        sample = self._in_slices(self._decode, z)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """There and back: pixels [B, 3, H, W] -> their reconstruction, from the mode or from a draw."""
        posterior = DiagonalGaussianDistribution(self._in_slices(self._encode, sample))
        z = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict=return_dict)

    def enable_slicing(self, slice_size: int = 1) -> None:
        """Encode and decode `slice_size` images at a time: less memory, the same numbers."""
        if slice_size < 1:
            raise ValueError(f"slice_size must be at least 1, not {slice_size}")
        self.slice_size = slice_size

    def disable_slicing(self) -> None:
        """Encode and decode a whole batch at once again."""
        self.slice_size = None

    def enable_tiling(self, use_tiling: bool = True) -> None:
        """Run images larger than `tile_sample_min_size` in overlapping tiles (`vae.tiling`): memory for a few tiles.

        What comes out differs from the whole image's, because a tile does not see its neighbours.
        """
        self.use_tiling = use_tiling

    def disable_tiling(self) -> None:
        """Run every image whole again."""
        self.use_tiling = False

    @overload
    def tiled_encode(self, x: Tensor, return_dict: Literal[True] = True) -> AutoencoderKLOutput: ...
    @overload
    def tiled_encode(
        self, x: Tensor, return_dict: bool
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]: ...
    def tiled_encode(
        self, x: Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """`encode` in tiles, whatever the image's size."""
        tiles = Tiles.of(self.tile_sample_min_size, self.tile_latent_min_size, self.tile_overlap_factor)
        posterior = DiagonalGaussianDistribution(run_in_tiles(self._encode_whole, x, tiles))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @overload
    def tiled_decode(self, z: Tensor, return_dict: Literal[True] = True) -> DecoderOutput: ...
    @overload
    def tiled_decode(self, z: Tensor, return_dict: bool) -> DecoderOutput | tuple[Tensor]: ...
    def tiled_decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """`decode` in tiles, whatever the latent's size."""
        tiles = Tiles.of(self.tile_latent_min_size, self.tile_sample_min_size, self.tile_overlap_factor)
        sample = run_in_tiles(self._decode_whole, z, tiles)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    @property
    def _attentions(self) -> dict[str, Attention]:
        return {name: module for name, module in self.named_modules() if isinstance(module, Attention)}

    @property
    def attn_processors(self) -> dict[str, Processor]:
        """How each attention is computed, by its module's name and `.processor`."""
        return {f"{name}.processor": attention.processor for name, attention in self._attentions.items()}

    def set_attn_processor(self, processor: Processor | Mapping[str, Processor]) -> None:
        """Compute every attention by `processor` (`vae.attention`), or each by the one that stands under its name."""
        if isinstance(processor, Mapping) and processor.keys() != self.attn_processors.keys():
            raise ValueError(f"processors are wanted for {', '.join(self.attn_processors) or 'nothing'}")
        for name, attention in self._attentions.items():
            attention.processor = processor[f"{name}.processor"] if isinstance(processor, Mapping) else processor

    def set_default_attn_processor(self) -> None:
        """Compute every attention by torch's own."""
        self.set_attn_processor(SDPA())

    def fuse_qkv_projections(self) -> None:
        """Project to queries, keys and values by one matrix product: the same numbers. For inference."""
        for attention in self._attentions.values():
            attention.fuse()

    def unfuse_qkv_projections(self) -> None:
        """Project by three matrix products again."""
        for attention in self._attentions.values():
            attention.unfuse()

    def moments(self, x: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] -> moments [B, 2C, H/f, W/f]: mean, then log-variance (not clamped)."""
        return self._encode(x)

    def _encode(self, x: Tensor) -> Tensor:
        if self.use_tiling and max(x.shape[2:]) > self.tile_sample_min_size:
            return self.tiled_encode(x).latent_dist.parameters
        return self._encode_whole(x)

    def _decode(self, z: Tensor) -> Tensor:
        if self.use_tiling and max(z.shape[2:]) > self.tile_latent_min_size:
            return self.tiled_decode(z).sample
        return self._decode_whole(z)

    def _encode_whole(self, x: Tensor) -> Tensor:
        h: Tensor = self.encoder(x)
        return h if self.quant_conv is None else self.quant_conv(h)

    def _decode_whole(self, z: Tensor) -> Tensor:
        x: Tensor = self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))
        return x

    def _in_slices(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self.slice_size is None or x.shape[0] <= self.slice_size:
            return run(x)
        return torch.cat([run(part) for part in torch.split(x, self.slice_size)])

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "AutoencoderKL":
        """A model with random weights. config: an AutoencoderKLConfig, or the content of a config.json."""
        return cls(**AutoencoderKLConfig.from_dict(config))

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        subfolder: str = "",
        torch_dtype: torch.dtype | None = None,
        variant: str = "",
        revision: str | None = None,
    ) -> "AutoencoderKL":
        """A trained model, ready to run: a directory as diffusers saves it, one with such a `vae/` in it, or a hub id.

        torch_dtype: what to convert the weights to; as they are in the file unless given.
        variant: `fp16` for the weights in half precision where there are both. revision: of a hub id.
        Raises `vae.LoadError` where there is no AutoencoderKL.
        """
        return cls._with(*load.directory(path, subfolder, variant, revision), path, torch_dtype)

    @classmethod
    def from_single_file(
        cls, path: str | Path, config: load.Settings = None, torch_dtype: torch.dtype | None = None
    ) -> "AutoencoderKL":
        """A trained model from one file: latent-diffusion's layout, FLUX's, or inside a full checkpoint.

        path: a `.safetensors`, `.ckpt`, `.pt` or `.bin` here, or the URL of one on the hub (`.../blob/main/...`).
        config: a preset's name (`vae.presets`), a directory with config.json, or the fields. What the tensors' shapes
            tell need not be given; how latents are scaled no tensor tells: where the file is not known by what is
            around the VAE or where it came from, this warns (`vae.AssumedConfigWarning`) and says what it assumed.
        Raises `vae.LoadError` where there is no AutoencoderKL.
        """
        return cls._with(*load.file(path, config), path, torch_dtype)

    @classmethod
    def _with(
        cls,
        config: AutoencoderKLConfig,
        weights: dict[str, Tensor],
        where: str | Path,
        torch_dtype: torch.dtype | None,
    ) -> "AutoencoderKL":
        """A model with these weights, for inference."""
        with torch.device("meta"):
            model = cls(**config)
        load.check(weights, model.state_dict(), where)
        model.load_state_dict(weights, assign=True)
        return model.to(torch_dtype).eval().requires_grad_(False)

    def save_pretrained(self, path: str | Path) -> None:
        """Write config.json and one safetensors file into the directory `path`, as diffusers does."""
        load.write(Path(path), self.config, self.state_dict())
