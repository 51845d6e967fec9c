"""The configurations of the models: exactly the fields of a diffusers `config.json`."""

import dataclasses
import difflib
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from vae.errors import LoadWarning

# diffusers writes these keys to config.json for its own use. They are not parameters of the model.
IGNORED_KEYS = frozenset({"_class_name", "_diffusers_version", "_name_or_path", "_commit_hash", "_use_default_values"})
# Other keys in the files of models that are not parameters either: what a library or a trainer wrote down.
NOTED_KEYS = frozenset(
    {"dtype", "torch_dtype", "diffusers_version", "transformers_version", "model_type"}
    # of diffusers' EMAModel, which saves a moving average of the weights
    | {"decay", "min_decay", "inv_gamma", "power", "optimization_step", "update_after_step", "use_ema_warmup"}
)

# The first two have the same configuration. Their weights differ in layout (`vae.flax_weights`).
TORCH_CLASS, FLAX_CLASS, FLUX2_CLASS = "AutoencoderKL", "FlaxAutoencoderKL", "AutoencoderKLFlux2"

ACTIVATIONS = ("silu", "swish", "mish", "gelu", "relu")

_POSITIVE_INTEGERS = ("in_channels", "out_channels", "layers_per_block", "latent_channels", "norm_num_groups")
_FOUR_DOWN, _FOUR_UP = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4


@dataclass(frozen=True, kw_only=True, slots=True)
class VaeConfig(Mapping[str, Any]):
    """The fields that the configurations of all classes have.

    Read a field as an attribute (`config.latent_channels`) or by its key (`config["latent_channels"]`).

    in_channels, out_channels: channels of the encoder's input and of the decoder's output.
    down_block_types, up_block_types: `DownEncoderBlock2D` and `UpDecoderBlock2D`, once per level; no others exist.
    block_out_channels: channels per level, finest level first. Every level but the last halves height and width.
    layers_per_block: residual blocks per level of the encoder; the decoder has one more per level.
    act_fn: the activation in residual blocks, one of `ACTIVATIONS`.
    latent_channels: channels of a latent. The encoder's output has twice as many: mean and log-variance.
    norm_num_groups: groups of every group normalization; each level's channels are a multiple of it.
    sample_size: side in pixels of the training images, or a pair of sides. It sets the default size of tiles.
    force_upcast: the model overflows in float16 and has to run in float32 (the original VAE of SDXL).
    use_quant_conv, use_post_quant_conv: 1x1 convolutions after the encoder and before the decoder.
    mid_block_add_attention: self-attention in the middle blocks.

    Raises ValueError for values that no model can have.
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
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
        for name in _POSITIVE_INTEGERS:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, not {value!r}")
        if self.act_fn not in ACTIVATIONS:
            raise ValueError(f"act_fn '{self.act_fn}' is not one of {', '.join(ACTIVATIONS)}")
        self._check_channels("block_out_channels")
        levels = len(self.block_out_channels)
        for name in ("down_block_types", "up_block_types"):
            count = len(getattr(self, name))
            if count != levels:
                raise ValueError(f"{name} has {count} blocks, but block_out_channels has {levels} levels")
        unknown = set(self.down_block_types) - {"DownEncoderBlock2D"} | set(self.up_block_types) - {"UpDecoderBlock2D"}
        if unknown:
            raise ValueError(f"an {self.class_names()[0]} has no block of type {', '.join(sorted(unknown))}")

    def _check_channels(self, name: str) -> None:
        """Raise ValueError unless a field has the channels of the levels."""
        values = getattr(self, name)
        if not values or any(type(channels) is not int or channels < 1 for channels in values):
            raise ValueError(f"{name} must be integers of at least 1, not {values}")
        for channels in values:
            if channels % self.norm_num_groups:
                raise ValueError(f"{channels} channels cannot be divided into norm_num_groups={self.norm_num_groups}")

    @classmethod
    def class_names(cls) -> tuple[str, ...]:
        """The names of the model's class in a config.json. The first one is written."""
        raise NotImplementedError

    @property
    def downscale(self) -> int:
        """Pixels per raw latent, in height and in width: 8 for the public models."""
        return int(2 ** (len(self.block_out_channels) - 1))

    @property
    def side_multiple(self) -> int:
        """The number of pixels that the sides of images must be a multiple of, so that there are model latents."""
        return self.downscale

    @property
    def decoder_channels(self) -> tuple[int, ...]:
        """The channels of the decoder's levels, the finest level first."""
        return self.block_out_channels

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Build a configuration from the content of a config.json.

        Keys in NOTED_KEYS are left out, with a LoadWarning. Raises ValueError for the configuration of another class,
        another unknown key, or an invalid value.
        """
        class_name = fields.get("_class_name", cls.class_names()[0])
        if class_name not in cls.class_names():
            raise ValueError(f"this is a configuration of class {class_name}, not {cls.class_names()[0]}")
        known = [field.name for field in dataclasses.fields(cls)]
        for key in fields:
            if key not in known and key not in IGNORED_KEYS | NOTED_KEYS:
                near = difflib.get_close_matches(key, known, 1)
                hint = f"; did you mean '{near[0]}'?" if near else ""
                raise ValueError(f"an {cls.class_names()[0]} has no parameter '{key}'{hint}")
        if noted := sorted(NOTED_KEYS & fields.keys()):
            text = f"the configuration has {', '.join(noted)}, which an {cls.class_names()[0]} does not use; left out"
            warnings.warn(text, LoadWarning, stacklevel=2)
        return cls(**{key: value for key, value in fields.items() if key in known})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as in a config.json: lists instead of tuples."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in self.items()}

    def __getitem__(self, key: str) -> Any:
        if key not in self.__dataclass_fields__:
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.__dataclass_fields__)

    def __len__(self) -> int:
        return len(self.__dataclass_fields__)


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoencoderKLConfig(VaeConfig):
    """Every documented parameter of diffusers' AutoencoderKL, with the same defaults.

    scaling_factor, shift_factor, latents_mean, latents_std: constants that diffusion models normalize latents with
        (`vae.scaling`). The model itself does not use them.

    The other fields are those of `VaeConfig`. Raises ValueError for values that no AutoencoderKL can have.
    """

    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    @classmethod
    def class_names(cls) -> tuple[str, ...]:
        return TORCH_CLASS, FLAX_CLASS

    def __post_init__(self) -> None:
        VaeConfig.__post_init__(self)  # a class with slots has no super() without arguments
        _check_number("scaling_factor", self.scaling_factor)
        if self.shift_factor is not None:
            _check_number("shift_factor", self.shift_factor)
        if not self.scaling_factor:
            raise ValueError("scaling_factor must not be 0, because latents are divided by it")
        for name in ("latents_mean", "latents_std"):
            value = getattr(self, name)
            if value is not None and len(value) != self.latent_channels:
                raise ValueError(f"{name} has {len(value)} values, but latent_channels is {self.latent_channels}")
        if self.latents_std is not None and not all(std > 0 for std in self.latents_std):
            raise ValueError("latents_std must be positive, because latents are divided by it")


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoencoderKLFlux2Config(VaeConfig):
    """Every documented parameter of diffusers' AutoencoderKLFlux2, with the same defaults, and `force_upcast`.

    The class has no such parameter, but the published files do, with the value True.

    decoder_block_out_channels: channels per level of the decoder; None: `block_out_channels`.
    batch_norm_eps, batch_norm_momentum: of the model's `bn`. eps is added to the variances that model latents are
        normalized with. momentum has no effect.
    patch_size: height and width of the patches of raw latents that become one position of the model latents.

    The other fields are those of `VaeConfig`. Raises ValueError for values that no AutoencoderKLFlux2 can have.
    """

    down_block_types: tuple[str, ...] = _FOUR_DOWN
    up_block_types: tuple[str, ...] = _FOUR_UP
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    decoder_block_out_channels: tuple[int, ...] | None = None
    layers_per_block: int = 2
    latent_channels: int = 32
    sample_size: int | tuple[int, int] = 1024
    batch_norm_eps: float = 1e-4
    batch_norm_momentum: float = 0.1
    patch_size: tuple[int, int] = (2, 2)

    @classmethod
    def class_names(cls) -> tuple[str, ...]:
        return (FLUX2_CLASS,)

    def __post_init__(self) -> None:
        VaeConfig.__post_init__(self)
        for name in ("batch_norm_eps", "batch_norm_momentum"):
            _check_number(name, getattr(self, name))
        if self.batch_norm_eps < 0:
            raise ValueError(f"batch_norm_eps must not be negative, not {self.batch_norm_eps!r}")
        sides = self.patch_size
        if not isinstance(sides, tuple) or len(sides) != 2 or any(type(n) is not int or n < 1 for n in sides):
            raise ValueError(f"patch_size must be two integers of at least 1, not {sides!r}")
        if self.decoder_block_out_channels is not None:
            self._check_channels("decoder_block_out_channels")
            if len(self.decoder_block_out_channels) != len(self.block_out_channels):
                raise ValueError(
                    "decoder_block_out_channels and block_out_channels must have the same number of levels"
                )

    @property
    def side_multiple(self) -> int:
        return self.downscale * math.lcm(*self.patch_size)

    @property
    def decoder_channels(self) -> tuple[int, ...]:
        return self.decoder_block_out_channels or self.block_out_channels


CONFIG_CLASSES: tuple[type[AutoencoderKLConfig] | type[AutoencoderKLFlux2Config], ...] = (
    AutoencoderKLConfig,
    AutoencoderKLFlux2Config,
)


def parse_config(fields: Mapping[str, Any]) -> AutoencoderKLConfig | AutoencoderKLFlux2Config:
    """Return the configuration in a config.json, of the class that it names; without a class of AutoencoderKL.

    Raises ValueError for a class that there is no model for, and see `VaeConfig.from_dict`.
    """
    name = fields.get("_class_name", TORCH_CLASS)
    for config_class in CONFIG_CLASSES:
        if name in config_class.class_names():
            return config_class.from_dict(fields)
    names = " and ".join(config_class.class_names()[0] for config_class in CONFIG_CLASSES)
    raise ValueError(f"this is a configuration of class {name}; the classes of VAEs that can be loaded are {names}")


def _check_number(name: str, value: Any) -> None:
    """Raise ValueError unless a field is a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, not {value!r}")
