"""FlaxAutoencoderKL: the autoencoder of `vae.model` in JAX, with the interface of diffusers' class of that name.

    pixels [B, 3, H, W] in [-1, 1]
      -> Encoder -> quant_conv -> moments [B, H/f, W/f, 2C] -> posterior -> latents [B, H/f, W/f, C]
      -> post_quant_conv -> Decoder -> pixels [B, 3, H, W]

As in diffusers, pixels have their channels first, and latents have them last. Latents are *raw* (`vae.scaling`).
Parameters are a tree of dicts, under the names of diffusers' files (`vae.flax_weights`). Needs the extra `jax`.
"""

import dataclasses
import math
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vae import flax_weights, load
from vae.config import FLAX_CLASS, IGNORED_KEYS, AutoencoderKLConfig, VaeConfig
from vae.errors import AmbiguousLayoutWarning, LoadError
from vae.model import AutoencoderKL

try:
    import jax
    from flax import linen as nn
    from jax import numpy as jnp
except ImportError as error:
    raise ImportError("FlaxAutoencoderKL needs JAX and Flax: run `pip install 'latentmill[jax]'`") from error

from vae.flax_blocks import Decoder, Encoder, make_conv
from vae.flax_outputs import FlaxAutoencoderKLOutput, FlaxDecoderOutput, FlaxDiagonalGaussianDistribution

__all__ = [
    "FlaxAutoencoderKL",
    "FlaxAutoencoderKLOutput",
    "FlaxDecoderOutput",
    "FlaxDiagonalGaussianDistribution",
    "encode_pixels",
]

TRUNCATED_STD = 0.87962566103423978  # of a standard normal that is truncated to [-2, 2]

Params = Any
"""A tree of dicts whose leaves are arrays: the parameters of a model."""


class FlaxAutoencoderKL(nn.Module):
    """The KL-regularized autoencoder as a Flax linen module. Its parameters are separate, as always in Flax.

    The fields are those of `AutoencoderKLConfig`, with the same defaults, and `dtype`: the dtype of the computation
    (default: float32), whichever dtype the parameters have. float32 means full precision on every device.

    A model is hashable, so that it can be a static argument of `jit`. Raises ValueError for values that no
    AutoencoderKL can have. Load trained weights with `from_pretrained` or `from_single_file`.
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
    dtype: Any = jnp.float32
    shift_factor: float | None = dataclasses.field(default=None, kw_only=True)
    latents_mean: tuple[float, ...] | None = dataclasses.field(default=None, kw_only=True)
    latents_std: tuple[float, ...] | None = dataclasses.field(default=None, kw_only=True)
    force_upcast: bool = dataclasses.field(default=True, kw_only=True)
    use_quant_conv: bool = dataclasses.field(default=True, kw_only=True)
    use_post_quant_conv: bool = dataclasses.field(default=True, kw_only=True)
    mid_block_add_attention: bool = dataclasses.field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        for name, value in self.config.items():  # lists have become tuples, so that the model can be hashed
            object.__setattr__(self, name, value)
        super().__post_init__()

    def setup(self) -> None:
        channels = self.latent_channels
        self.encoder = Encoder(self.config, self.dtype)
        self.decoder = Decoder(self.config, self.dtype)
        self.quant_conv = make_conv(2 * channels, 1, self.dtype) if self.use_quant_conv else None
        self.post_quant_conv = make_conv(channels, 1, self.dtype) if self.use_post_quant_conv else None

    @property
    def config(self) -> AutoencoderKLConfig:
        """The configuration, which has every field but `dtype`."""
        return AutoencoderKLConfig(**{name: getattr(self, name) for name in AutoencoderKLConfig.__dataclass_fields__})

    @nn.nowrap
    def init_weights(self, rng: jax.Array) -> Params:
        """Return random parameters in float32. rng: a key of `jax.random`.

        They have the distribution of `init`'s (LeCun et al. 1998: truncated normal kernels of variance 1 / fan-in), but
        are drawn at once. `init` compiles a generator per layer, which takes half a minute for the shape of SD.
        """
        side = self.config.downscale  # parameters do not depend on the size
        shapes = jax.eval_shape(self.init, rng, jax.ShapeDtypeStruct((1, self.in_channels, side, side), jnp.float32))
        leaves = tuple((path, leaf.shape) for path, leaf in flax_weights.flatten(shapes["params"]).items())
        return flax_weights.nest(_draw(rng, leaves))

    def encode(
        self, sample: jax.Array, deterministic: bool = True, return_dict: bool = True
    ) -> FlaxAutoencoderKLOutput | tuple[FlaxDiagonalGaussianDistribution]:
        """Return the posterior over raw latents [B, H/f, W/f, C].

        Call it as `model.apply({"params": params}, sample, method=model.encode)`.

        sample: pixels [B, 3, H, W] in [-1, 1]. deterministic: part of diffusers' interface; not used.
        return_dict: if False, return a tuple with the posterior. Raises ValueError for another shape.
        """
        if sample.ndim != 4 or sample.shape[1] != self.in_channels:
            raise ValueError(f"sample must have the shape [B, {self.in_channels}, H, W], not {list(sample.shape)}")
        posterior = FlaxDiagonalGaussianDistribution(self.moments(sample.transpose(0, 2, 3, 1)))
        return FlaxAutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def moments(self, sample: jax.Array) -> jax.Array:
        """Return the moments [B, H/f, W/f, 2C]: the mean, then the log-variance, which is not clamped.

        sample: pixels [B, H, W, 3] in [-1, 1]: here, the channels are last.
        """
        h = self.encoder(sample)
        return h if self.quant_conv is None else self.quant_conv(h)

    def decode(
        self,
        latents: jax.Array,
        deterministic: bool = True,
        return_dict: bool = True,
        *,
        channels_last: bool | None = None,
    ) -> FlaxDecoderOutput | tuple[jax.Array]:
        """Return pixels [B, 3, H, W], mostly in [-1, 1] but not clamped.

        latents: raw latents [B, H/f, W/f, C], as `encode` returns them, or [B, C, H/f, W/f].
        deterministic: part of diffusers' interface; not used.
        return_dict: if False, return a tuple with the pixels.
        channels_last: the layout of `latents`; default: the one that matches its shape. If both match, channels are
            taken to be last, as in diffusers, with an AmbiguousLayoutWarning.

        Raises ValueError for another shape.
        """
        if not self._has_channels_last(latents, channels_last):
            latents = latents.transpose(0, 2, 3, 1)
        z = latents if self.post_quant_conv is None else self.post_quant_conv(latents)
        sample = self.decoder(z).transpose(0, 3, 1, 2)
        return FlaxDecoderOutput(sample=sample) if return_dict else (sample,)

    @nn.nowrap
    def _has_channels_last(self, latents: jax.Array, channels_last: bool | None) -> bool:
        """Return whether the channels of `latents` are last, as given or as its shape tells."""
        channels, shape = self.latent_channels, list(latents.shape)
        matches = {1: shape[1], -1: shape[-1]} if len(shape) == 4 else {}
        axes = [axis for axis, size in matches.items() if size == channels]
        if channels_last is not None:
            axes = [axis for axis in axes if axis == (-1 if channels_last else 1)]
        if not axes:
            expected = {None: f"[B, h, w, {channels}] or [B, {channels}, h, w]", True: f"[B, h, w, {channels}]"}
            layout = expected.get(channels_last, f"[B, {channels}, h, w]")
            raise ValueError(f"latents must have the shape {layout}, not {shape}")
        if len(axes) == 2:
            warnings.warn(
                f"latents of shape {shape} may have their {channels} channels first or last; they are taken to be "
                "last. Say which by channels_last=True or False",
                AmbiguousLayoutWarning,
                stacklevel=4,
            )
        return -1 in axes

    def __call__(
        self, sample: jax.Array, sample_posterior: bool = False, deterministic: bool = True, return_dict: bool = True
    ) -> FlaxDecoderOutput | tuple[jax.Array]:
        """Encode and decode: return the reconstruction [B, 3, H, W] of pixels `sample` [B, 3, H, W] in [-1, 1].

        sample_posterior: decode a random sample of the posterior instead of its mode. This needs a key:
            `model.apply({"params": params}, sample, sample_posterior=True, rngs={"gaussian": key})`.
        deterministic: part of diffusers' interface; not used.
        return_dict: if False, return a tuple with the reconstruction.
        """
        posterior = self.encode(sample)[0]
        latents = posterior.sample(self.make_rng("gaussian")) if sample_posterior else posterior.mode()
        return self.decode(latents, return_dict=return_dict, channels_last=True)

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], return_unused_kwargs: bool = False, dtype: Any = jnp.float32, **fields: Any
    ) -> Any:
        """Return a model, which has no parameters yet.

        config: an AutoencoderKLConfig, or the content of a config.json. fields: replace values of `config`.
        return_unused_kwargs: return the model and a dict of the values that are not fields. By default, such values
            raise ValueError. dtype: the dtype of the computation.
        """
        merged = {**config, **fields}
        known = {*AutoencoderKLConfig.__dataclass_fields__, *IGNORED_KEYS}
        unused = {name: merged.pop(name) for name in list(merged) if return_unused_kwargs and name not in known}
        model = cls(**AutoencoderKLConfig.from_dict(merged), dtype=dtype)
        return (model, unused) if return_unused_kwargs else model

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: Any = jnp.float32,
        *,
        subfolder: str = "",
        from_pt: bool = False,
        variant: str = "",
        revision: str | None = None,
    ) -> tuple["FlaxAutoencoderKL", Params]:
        """Load a trained model. Return the model and its parameters.

        path: all that `AutoencoderKL.from_pretrained` accepts: a directory in diffusers' format, of PyTorch or of Flax,
            a pipeline's directory with a `vae/` in such a format, a hub id (`owner/name`), or `demo`. If a directory
            has weights of both, those of the class that its config.json names are read.
        dtype: the dtype of the computation. Parameters keep the dtype of the file (`to_bf16` converts them). They are
            on JAX's default device.
        subfolder, variant, revision: see `AutoencoderKL.from_pretrained`.
        from_pt: read PyTorch's files only, not Flax's.

        Raises `vae.LoadError` if there is no AutoencoderKL.
        """
        config, weights = load.load_directory(path, subfolder, variant, revision, from_pt)
        model = cls(**_check_class(config, path), dtype=dtype)
        return model, model.convert_state_dict(weights, path)

    @classmethod
    def from_single_file(
        cls, path: str | Path, config: load.ConfigLike = None, dtype: Any = jnp.float32
    ) -> tuple["FlaxAutoencoderKL", Params]:
        """Load a trained model from a single file. Return the model and its parameters.

        path, config: see `AutoencoderKL.from_single_file`. dtype: see `from_pretrained`.
        Raises `vae.LoadError` if there is no AutoencoderKL.
        """
        resolved, weights = load.load_file(path, config)
        model = cls(**_check_class(resolved, path), dtype=dtype)
        return model, model.convert_state_dict(weights, path)

    @nn.nowrap
    def save_pretrained(
        self, path: str | Path, params: Params, is_main_process: bool = True, push_to_hub: bool = False
    ) -> None:
        """Write config.json and `diffusion_flax_model.msgpack` to the directory `path`, in diffusers' format.

        is_main_process: if False, write nothing: of several processes, one writes. push_to_hub: not supported.
        Raises LoadError if `params` are not parameters of this model, and ValueError for push_to_hub.
        """
        if push_to_hub:
            raise ValueError("push_to_hub is not supported; save the model, then upload it with `hf upload`")
        weights = self.convert_params(params)
        if is_main_process:
            load.save(Path(path), self.config, weights, FLAX_CLASS)

    @nn.nowrap
    def convert_state_dict(self, weights: Mapping[str, Tensor], path: str | Path = "state_dict") -> Params:
        """Return the parameters of this model from the state dict of a PyTorch AutoencoderKL.

        path: their source, for messages. Raises LoadError unless the names and shapes are exactly those of the model.
        """
        load.check_weights(weights, self._expected_weights(), path)
        return flax_weights.nest({name: _to_array(value) for name, value in flax_weights.to_flax(weights).items()})

    @nn.nowrap
    def convert_params(self, params: Params) -> dict[str, Tensor]:
        """Return the state dict of a PyTorch AutoencoderKL from parameters of this model.

        Raises LoadError unless the names and shapes of `params` are exactly those of the model.
        """
        weights = {name: _to_tensor(value) for name, value in flax_weights.flatten(params).items()}
        load.check_weights(weights, flax_weights.to_flax(self._expected_weights()), "params")
        return flax_weights.to_torch(weights, "params")

    @nn.nowrap
    def _expected_weights(self) -> dict[str, Tensor]:
        with torch.device("meta"):
            return AutoencoderKL(**self.config).state_dict()

    @nn.nowrap
    def to_bf16(self, params: Params, mask: Any = None) -> Params:
        """Return the parameters with their floating-point values in bfloat16.

        mask: a tree of bools with the structure of `params`; only values whose mask is True are converted.
        """
        return _cast(params, jnp.bfloat16, mask)

    @nn.nowrap
    def to_fp16(self, params: Params, mask: Any = None) -> Params:
        """Return the parameters with their floating-point values in float16. mask: see `to_bf16`."""
        return _cast(params, jnp.float16, mask)

    @nn.nowrap
    def to_fp32(self, params: Params, mask: Any = None) -> Params:
        """Return the parameters with their floating-point values in float32. mask: see `to_bf16`."""
        return _cast(params, jnp.float32, mask)


def encode_pixels(model: FlaxAutoencoderKL, params: Params, pixels: jax.Array) -> jax.Array:
    """Return the moments [B, 2C, H/f, W/f] of images in float32: the mean, then the log-variance, not clamped.

    Made for `jax.jit(encode_pixels, static_argnums=0)`, which compiles once per shape.

    pixels: [B, H, W, 3], uint8. The moments have the layout of PyTorch's.
    """
    moments = model.apply({"params": params}, pixels.astype(jnp.float32) / 127.5 - 1.0, method="moments")
    return moments.astype(jnp.float32).transpose(0, 3, 1, 2)


@partial(jax.jit, static_argnums=1)
def _draw(rng: jax.Array, shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> dict[str, jax.Array]:
    """Return random kernels, scales of one and biases of zero, by path. shapes: pairs of a path and its shape."""
    sizes = [math.prod(shape) if path.endswith("/kernel") else 0 for path, shape in shapes]
    noise = jax.random.truncated_normal(rng, -2.0, 2.0, (sum(sizes),)) / TRUNCATED_STD
    params, start = {}, 0
    for (path, shape), size in zip(shapes, sizes, strict=True):
        if size:
            part = jax.lax.slice(noise, (start,), (start + size,))
            params[path] = part.reshape(shape) / math.sqrt(math.prod(shape[:-1]))
        else:
            params[path] = jnp.full(shape, float(path.endswith("/scale")))
        start += size
    return params


def _check_class(config: VaeConfig, path: str | Path) -> AutoencoderKLConfig:
    """Return the configuration. Raises LoadError if it is not that of an AutoencoderKL. path: its source."""
    if not isinstance(config, AutoencoderKLConfig):
        raise LoadError(
            f"{path} is of class {config.class_names()[0]}, which FlaxAutoencoderKL does not run; use PyTorch"
        )
    return config


def _cast(params: Params, dtype: Any, mask: Any) -> Params:
    def cast(value: Any, is_selected: bool = True) -> Any:
        is_float = jnp.issubdtype(jnp.result_type(value), jnp.floating)
        return jnp.asarray(value, dtype) if is_float and is_selected else value

    return jax.tree.map(cast, params) if mask is None else jax.tree.map(cast, params, mask)


def _to_array(tensor: Tensor) -> jax.Array:
    """Return a copy of a tensor as an array of the same dtype."""
    values = tensor.detach().cpu().contiguous()
    if values.dtype == torch.bfloat16:  # numpy has no bfloat16
        return jnp.array(values.view(torch.int16).numpy()).view(jnp.bfloat16)
    return jnp.array(values.numpy())


def _to_tensor(array: Any) -> Tensor:
    """Return a copy of an array as a tensor of the same dtype."""
    values = np.array(array, order="C")
    if values.dtype == jnp.bfloat16:
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)
