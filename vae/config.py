"""The configuration of an AutoencoderKL: exactly the fields of a diffusers `config.json`."""

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vae.blocks import ACTIVATIONS

# diffusers writes these keys to config.json for its own use. They are not parameters of the model.
IGNORED_KEYS = frozenset({"_class_name", "_diffusers_version", "_name_or_path"})

# Both classes have the same configuration. Their weights differ in layout (`vae.flax_weights`).
TORCH_CLASS, FLAX_CLASS = "AutoencoderKL", "FlaxAutoencoderKL"

_POSITIVE_INTEGERS = ("in_channels", "out_channels", "layers_per_block", "latent_channels", "norm_num_groups")
_NUMBERS = ("scaling_factor", "shift_factor")
_TUPLES = ("sample_size", "down_block_types", "up_block_types", "block_out_channels", "latents_mean", "latents_std")


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoencoderKLConfig(Mapping[str, Any]):
    """Every documented parameter of diffusers' AutoencoderKL, with the same defaults.

    Read a field as an attribute (`config.latent_channels`) or by its key (`config["latent_channels"]`).

    in_channels, out_channels: channels of the encoder's input and of the decoder's output.
    down_block_types, up_block_types: `DownEncoderBlock2D` and `UpDecoderBlock2D`, once per level; no others exist.
    block_out_channels: channels per level, finest level first. Every level but the last halves height and width.
    layers_per_block: residual blocks per level of the encoder; the decoder has one more per level.
    act_fn: the activation in residual blocks, a key of `vae.blocks.ACTIVATIONS`.
    latent_channels: channels of a latent. The encoder's output has twice as many: mean and log-variance.
    norm_num_groups: groups of every group normalization; each level's channels are a multiple of it.
    sample_size: side in pixels of the training images, or a pair of sides. It sets the default size of tiles.
    scaling_factor, shift_factor, latents_mean, latents_std: constants that diffusion models normalize latents with
        (`vae.scaling`). The model itself does not use them.
    force_upcast: the model overflows in float16 and has to run in float32 (the original VAE of SDXL).
    use_quant_conv, use_post_quant_conv: 1x1 convolutions after the encoder and before the decoder.
    mid_block_add_attention: self-attention in the middle blocks.

    Raises ValueError for values that no AutoencoderKL can have.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, int] = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        for name in _TUPLES:
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        for name in _POSITIVE_INTEGERS:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, not {value!r}")
        for name in _NUMBERS:
            value = getattr(self, name)
            is_absent = value is None and name != "scaling_factor"
            if not is_absent and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ValueError(f"{name} must be a number, not {value!r}")
        if not self.scaling_factor:
            raise ValueError("scaling_factor must not be 0, because latents are divided by it")
        if not self.block_out_channels or any(type(c) is not int or c < 1 for c in self.block_out_channels):
            raise ValueError(f"block_out_channels must be integers of at least 1, not {self.block_out_channels}")
        if self.act_fn not in ACTIVATIONS:
            raise ValueError(f"act_fn '{self.act_fn}' is not one of {', '.join(ACTIVATIONS)}")
        levels = len(self.block_out_channels)
        for name in ("down_block_types", "up_block_types"):
            count = len(getattr(self, name))
            if count != levels:
                raise ValueError(f"{name} has {count} blocks, but block_out_channels has {levels} levels")
        unknown = set(self.down_block_types) - {"DownEncoderBlock2D"} | set(self.up_block_types) - {"UpDecoderBlock2D"}
        if unknown:
            raise ValueError(f"an AutoencoderKL has no block of type {', '.join(sorted(unknown))}")
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(f"{channels} channels cannot be divided into norm_num_groups={self.norm_num_groups}")
        for name in ("latents_mean", "latents_std"):
            value = getattr(self, name)
            if value is not None and len(value) != self.latent_channels:
                raise ValueError(f"{name} has {len(value)} values, but latent_channels is {self.latent_channels}")
        if self.latents_std is not None and not all(std > 0 for std in self.latents_std):
            raise ValueError("latents_std must be positive, because latents are divided by it")

    @property
    def downscale(self) -> int:
        """Pixels per latent, in height and in width: 8 for SD, SDXL, SD3 and FLUX."""
        return int(2 ** (len(self.block_out_channels) - 1))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "AutoencoderKLConfig":
        """Build a configuration from the content of a config.json, of either class.

        Raises ValueError for the configuration of another class, an unknown key, or an invalid value.
        """
        class_name = fields.get("_class_name", TORCH_CLASS)
        if class_name not in (TORCH_CLASS, FLAX_CLASS):
            raise ValueError(f"this is a configuration of class {class_name}, not AutoencoderKL")
        known = [field.name for field in dataclasses.fields(cls)]
        for key in fields:
            if key not in known and key not in IGNORED_KEYS:
                near = difflib.get_close_matches(key, known, 1)
                hint = f"; did you mean '{near[0]}'?" if near else ""
                raise ValueError(f"an AutoencoderKL has no parameter '{key}'{hint}")
        return cls(**{key: value for key, value in fields.items() if key in known})

    def to_dict(self) -> dict[str, Any]:
        """Return the content of a config.json: lists instead of tuples."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in self.items()}

    def __getitem__(self, key: str) -> Any:
        if key not in self.__dataclass_fields__:
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.__dataclass_fields__)

    def __len__(self) -> int:
        return len(self.__dataclass_fields__)
