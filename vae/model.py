"""AutoencoderKL, the autoencoder of latent diffusion: read this first. `vae.flux2` has the class of FLUX.2.

    pixels [B, 3, H, W] in [-1, 1]
      -> Encoder -> quant_conv -> moments [B, 2C, H/f, W/f] -> posterior -> latents [B, C, H/f, W/f]
      -> post_quant_conv -> Decoder -> pixels [B, 3, H, W]

Shapes: B images, H and W height and width in pixels, C latent channels, f the downscale factor (8 for the public VAEs).
H and W should be multiples of f. Latents are *raw* here; `vae.scaling` converts them for a diffusion model and back.

Source: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", section 3.1.
The interface is that of diffusers' AutoencoderKL, with the same names and results.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vae import load
from vae.attention import SDPA, Processor
from vae.blocks import Attention, DownBlock, MidBlock, UpBlock, group_norm
from vae.config import AutoencoderKLConfig, VaeConfig
from vae.errors import LoadError
from vae.posterior import DiagonalGaussianDistribution
from vae.tiling import Tiles, run_in_tiles


class Encoder(nn.Module):
    """The encoder: pixels [B, 3, H, W] in [-1, 1] -> moments before quant_conv [B, 2C, H/f, W/f]."""

    def __init__(self, config: VaeConfig) -> None:
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
                is_last=level == len(channels) - 1,
            )
            for level in range(len(channels))
        )
        self.mid_block = MidBlock(channels[-1], groups, act_fn, config.mid_block_add_attention)
        self.conv_norm_out = group_norm(channels[-1], groups)
        self.conv_act = F.silu  # act_fn does not apply here, as in diffusers
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(self.conv_act(self.conv_norm_out(x)))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """The decoder: latents after post_quant_conv [B, C, H/f, W/f] -> pixels [B, 3, H, W]."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        channels, groups, act_fn = config.decoder_channels[::-1], config.norm_num_groups, config.act_fn
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(channels[0], groups, act_fn, config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList(
            UpBlock(
                channels[max(level - 1, 0)],
                channels[level],
                config.layers_per_block + 1,
                groups,
                act_fn,
                is_last=level == len(channels) - 1,
            )
            for level in range(len(channels))
        )
        self.conv_norm_out = group_norm(channels[-1], groups)
        self.conv_act = F.silu  # act_fn does not apply here, as in diffusers
        self.conv_out = nn.Conv2d(channels[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(self.conv_act(self.conv_norm_out(x)))  # type: ignore[no-any-return]


@dataclass
class AutoencoderKLOutput:
    """The result of `encode`: the posterior over raw latents [B, C, H/f, W/f]."""

    latent_dist: DiagonalGaussianDistribution


@dataclass
class DecoderOutput:
    """The result of `decode`: pixels [B, 3, H, W], mostly in [-1, 1] but not clamped.

    `commit_loss` is part of diffusers' interface and always None.
    """

    sample: Tensor
    commit_loss: Tensor | None = None


class Autoencoder(nn.Module):
    """All that the classes of models have in common. Keyword arguments: the fields of their configuration."""

    config_class: ClassVar[type[VaeConfig]]
    config: VaeConfig

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.config = self.config_class(**fields)
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
        channels = self.config.latent_channels
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1) if self.config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(channels, channels, 1) if self.config.use_post_quant_conv else None
        self.slice_size: int | None = None
        self.use_tiling = False
        size = self.config.sample_size
        self.tile_sample_min_size = size if isinstance(size, int) else size[0]  # pixels; larger images are tiled
        self.tile_latent_min_size = self.tile_sample_min_size // self.config.downscale
        self.tile_overlap_factor = 0.25

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.encoder.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.encoder.conv_in.weight.device

    @overload
    def encode(self, x: Tensor, return_dict: Literal[True] = True) -> AutoencoderKLOutput: ...
    @overload
    def encode(self, x: Tensor, return_dict: bool) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]: ...
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Return the posterior over raw latents [B, C, H/f, W/f].

        x: pixels [B, 3, H, W] in [-1, 1], of the model's dtype and on its device.
        return_dict: if False, return a tuple with the posterior.
        """
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
        """Return pixels [B, 3, H, W], mostly in [-1, 1] but not clamped.

        z: raw latents [B, C, H/f, W/f], of the model's dtype and on its device.
        return_dict: if False, return a tuple with the pixels.
        generator: part of diffusers' interface; not used.
        """
        sample = self._in_slices(self._decode, z)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Encode and decode: return the reconstruction [B, 3, H, W] of pixels `sample` [B, 3, H, W] in [-1, 1].

        sample_posterior: decode a random sample of the posterior instead of its mode.
        return_dict: if False, return a tuple with the reconstruction.
        generator: source of the random sample; default: torch's global generator.
        """
        posterior = DiagonalGaussianDistribution(self._in_slices(self._encode, sample))
        z = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict=return_dict)

    def enable_slicing(self, slice_size: int = 1) -> None:
        """Encode and decode `slice_size` images at a time, which needs less memory. Results are the same.

        Raises ValueError if `slice_size` is less than 1.
        """
        if slice_size < 1:
            raise ValueError(f"slice_size must be at least 1, not {slice_size}")
        self.slice_size = slice_size

    def disable_slicing(self) -> None:
        """Encode and decode a whole batch at once, which is the default."""
        self.slice_size = None

    def enable_tiling(self, use_tiling: bool = True) -> None:
        """Run images with a side above `tile_sample_min_size` pixels in overlapping tiles (`vae.tiling`).

        This needs memory for a few tiles only. Results differ from those of the whole image, because a tile has no
        context beyond its edges.
        """
        self.use_tiling = use_tiling

    def disable_tiling(self) -> None:
        """Run every image whole, which is the default."""
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
        """Do the same as `encode`, in tiles for an image of any size."""
        tiles = Tiles.of(self.tile_sample_min_size, self.tile_latent_min_size, self.tile_overlap_factor)
        posterior = DiagonalGaussianDistribution(run_in_tiles(self._encode_whole, x, tiles))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @overload
    def tiled_decode(self, z: Tensor, return_dict: Literal[True] = True) -> DecoderOutput: ...
    @overload
    def tiled_decode(self, z: Tensor, return_dict: bool) -> DecoderOutput | tuple[Tensor]: ...
    def tiled_decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Do the same as `decode`, in tiles for a latent of any size."""
        tiles = Tiles.of(self.tile_latent_min_size, self.tile_sample_min_size, self.tile_overlap_factor)
        sample = run_in_tiles(self._decode_whole, z, tiles)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    @property
    def _attentions(self) -> dict[str, Attention]:
        return {name: module for name, module in self.named_modules() if isinstance(module, Attention)}

    @property
    def attn_processors(self) -> dict[str, Processor]:
        """The implementation of each attention. A key is the module's name followed by `.processor`."""
        return {f"{name}.processor": attention.processor for name, attention in self._attentions.items()}

    def set_attn_processor(self, processor: Processor | Mapping[str, Processor]) -> None:
        """Set the implementation of every attention (`vae.attention`).

        processor: one for all, or a mapping with exactly the keys of `attn_processors`. Raises ValueError for others.
        """
        if isinstance(processor, Mapping) and processor.keys() != self.attn_processors.keys():
            keys = ", ".join(self.attn_processors) or "none"
            raise ValueError(f"the keys of processor must be those of the model's attentions: {keys}")
        for name, attention in self._attentions.items():
            attention.processor = processor[f"{name}.processor"] if isinstance(processor, Mapping) else processor

    def set_default_attn_processor(self) -> None:
        """Set every attention to the default, torch's scaled_dot_product_attention."""
        self.set_attn_processor(SDPA())

    def fuse_qkv_projections(self) -> None:
        """Compute queries, keys and values by one matrix product instead of three. For inference; same results."""
        for attention in self._attentions.values():
            attention.fuse()

    def unfuse_qkv_projections(self) -> None:
        """Compute queries, keys and values by three matrix products, which is the default."""
        for attention in self._attentions.values():
            attention.unfuse()

    def moments(self, x: Tensor) -> Tensor:
        """Return the moments [B, 2C, H/f, W/f] of x: the mean, then the log-variance, which is not clamped.

        x: pixels [B, 3, H, W] in [-1, 1].

        Tiling applies if it is enabled, slicing does not.
        """
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
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Return a model with random weights.

        config: a configuration, or the content of a config.json. Raises ValueError if it is invalid.
        """
        return cls(**cls.config_class.from_dict(config))

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        subfolder: str = "",
        torch_dtype: torch.dtype | None = None,
        variant: str = "",
        revision: str | None = None,
    ) -> Self:
        """Load a trained model for inference, in evaluation mode and without gradients.

        path: a directory in diffusers' format, a pipeline's directory with a `vae/` in such a format, a hub id
            (`owner/name`), or `demo` for the model that ships with this package.
        subfolder: the model's directory within `path`; default: `vae/` if it has a model, otherwise `path` itself.
        torch_dtype: dtype to convert the weights to; default: the dtype of the file.
        variant: `fp16`, `bf16` or another name selects the weights of that variant; default: those without one, or if
            there are none, those of the first of `vae.load.VARIANTS`, with a `vae.LoadWarning`.
        revision: branch, tag or commit of a hub id; default: the main branch.

        Raises `vae.LoadError` if there is no model of this class.
        """
        return cls.from_weights(*load.load_directory(path, subfolder, variant, revision), path, torch_dtype)

    @classmethod
    def from_single_file(
        cls, path: str | Path, config: load.ConfigLike = None, torch_dtype: torch.dtype | None = None
    ) -> Self:
        """Load a trained model for inference from a single file, which may be a full checkpoint around the VAE.

        path: a local `.safetensors`, `.ckpt`, `.pt`, `.pth` or `.bin` file in the layout of latent-diffusion, FLUX or
            diffusers, or the URL of such a file on the hub (`.../blob/main/...`).
        config: a preset's name (`vae.presets`), a directory or hub id with a config.json, or the fields. Default:
            derived from the tensors' shapes, and from the tensors around the VAE or the file's repository. The shapes
            do not determine the scaling constants. If the family is not identified, the constants are assumed and
            named in a `vae.AssumedConfigWarning`.
        torch_dtype: dtype to convert the weights to; default: the dtype of the file.

        Raises `vae.LoadError` if there is no model of this class.
        """
        return cls.from_weights(*load.load_file(path, config), path, torch_dtype)

    @classmethod
    def from_weights(
        cls,
        config: VaeConfig,
        weights: dict[str, Tensor],
        path: str | Path,
        torch_dtype: torch.dtype | None = None,
    ) -> Self:
        """Return a model with these weights for inference. path: their source, for error messages.

        Raises `vae.LoadError` if the configuration is that of another class, or does not match the weights.
        """
        if not isinstance(config, cls.config_class):
            raise LoadError(
                f"{path} is of class {config.class_names()[0]}, not {cls.__name__}: load it with the class of that name"
            )
        with torch.device("meta"):
            model = cls(**config)
        load.check_weights(weights, model.state_dict(), path)
        model.load_state_dict(weights, assign=True)
        return model.to(torch_dtype).eval().requires_grad_(False)

    def save_pretrained(self, path: str | Path) -> None:
        """Write config.json and one safetensors file to the directory `path`, in diffusers' format."""
        load.save(Path(path), self.config, self.state_dict())


class AutoencoderKL(Autoencoder):
    """The KL-regularized autoencoder, with random weights. Keyword arguments: the fields of `AutoencoderKLConfig`.

    Raises ValueError for values that no AutoencoderKL can have. Load trained weights with `from_pretrained` or
    `from_single_file`.
    """

    config_class = AutoencoderKLConfig
    config: AutoencoderKLConfig
