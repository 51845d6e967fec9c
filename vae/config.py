"""The configuration of an AutoencoderKL: the fields of a diffusers `config.json`, and nothing else."""

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vae.blocks import ACTIVATIONS

# Written into config.json by diffusers for its own use; they say nothing about the model.
HARMLESS_KEYS = frozenset({"_class_name", "_diffusers_version", "_name_or_path"})

_COUNTS = ("in_channels", "out_channels", "layers_per_block", "latent_channels", "norm_num_groups")
_NUMBERS = ("scaling_factor", "shift_factor")
_TUPLES = ("sample_size", "down_block_types", "up_block_types", "block_out_channels", "latents_mean", "latents_std")


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoencoderKLConfig(Mapping[str, Any]):
    """Every documented parameter of AutoencoderKL, with the reference's defaults.

    Readable by attribute (`config.latent_channels`) and by key (`config["latent_channels"]`).

    block_out_channels: channels of each level, finest first; every level but the last halves height and width.
    layers_per_block: residual blocks a level in the encoder; the decoder has one more.
    latent_channels: channels of a latent; the encoder puts out twice as many, mean and log-variance.
    sample_size: height and width, in pixels, of the images the model was trained on (as a pair where they differ).
    scaling_factor, shift_factor, latents_mean, latents_std: how others normalise latents (`vae.scaling`);
        the model itself neither applies nor needs them.
    force_upcast: half precision overflows: run in float32 (SDXL's original VAE).

    Raises ValueError for values no AutoencoderKL can have.
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
        for name in _COUNTS:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
        for name in _NUMBERS:
            value = getattr(self, name)
            absent = value is None and name != "scaling_factor"
            if not absent and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ValueError(f"{name} must be a number, not {value!r}")
        if not self.scaling_factor:
            raise ValueError("scaling_factor must not be 0: latents are divided by it")
        if not self.block_out_channels or any(type(c) is not int or c < 1 for c in self.block_out_channels):
            raise ValueError(f"block_out_channels must be whole numbers of at least 1, not {self.block_out_channels}")
        if self.act_fn not in ACTIVATIONS:
            raise ValueError(f"act_fn '{self.act_fn}' is not one of {', '.join(ACTIVATIONS)}")
        levels = len(self.block_out_channels)
        for name in ("down_block_types", "up_block_types"):
            if len(getattr(self, name)) != levels:
                raise ValueError(f"{name} names {len(getattr(self, name))} blocks, block_out_channels has {levels}")
        foreign = set(self.down_block_types) - {"DownEncoderBlock2D"} | set(self.up_block_types) - {"UpDecoderBlock2D"}
        if foreign:
            raise ValueError(f"an AutoencoderKL has no block of type {', '.join(sorted(foreign))}")
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(f"{channels} channels cannot be split into norm_num_groups={self.norm_num_groups}")
        for name in ("latents_mean", "latents_std"):
            value = getattr(self, name)
            if value is not None and len(value) != self.latent_channels:
                raise ValueError(f"{name} has {len(value)} values, latent_channels is {self.latent_channels}")
        if self.latents_std is not None and not all(std > 0 for std in self.latents_std):
            raise ValueError("latents_std must be positive: latents are divided by it")

    @property
    def downscale(self) -> int:
        """Pixels per latent in height and in width: 8 for SD, SDXL, SD3 and FLUX."""
        return int(2 ** (len(self.block_out_channels) - 1))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "AutoencoderKLConfig":
        """From the content of a config.json.

        Raises ValueError for a config of another class, and for keys that are not ours.
        """
        kind = fields.get("_class_name", "AutoencoderKL")
        if kind != "AutoencoderKL":
            raise ValueError(f"this is the configuration of a {kind}, not of an AutoencoderKL")
        known = [field.name for field in dataclasses.fields(cls)]
        for key in fields:
            if key not in known and key not in HARMLESS_KEYS:
                near = difflib.get_close_matches(key, known, 1)
                hint = f" (the nearest known one is '{near[0]}')" if near else ""
                raise ValueError(f"an AutoencoderKL has no parameter '{key}'{hint}")
        return cls(**{key: value for key, value in fields.items() if key in known})

    def to_dict(self) -> dict[str, Any]:
        """As it is written to config.json: lists in place of tuples."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in self.items()}

    def __getitem__(self, key: str) -> Any:
        if key not in self.__dataclass_fields__:
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.__dataclass_fields__)

    def __len__(self) -> int:
        return len(self.__dataclass_fields__)
