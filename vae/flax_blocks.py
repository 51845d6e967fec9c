"""The building blocks of the autoencoder in JAX: `vae.blocks` as Flax linen modules.

Source: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", section 3.1.

Shapes: B images, C channels, H and W height and width at a level; channels come last. Every block computes and returns
`dtype`. Parameter names are those of diffusers' FlaxAutoencoderKL, so that its files load without renaming.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from flax import linen as nn
from jax import numpy as jnp

from vae.config import AutoencoderKLConfig

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "mish": jax.nn.mish,
    "gelu": partial(jax.nn.gelu, approximate=False),  # torch's default
    "relu": jax.nn.relu,
}

QUERY_BLOCK = 1024  # queries that attention computes at a time, beyond WHOLE_ATTENTION positions
WHOLE_ATTENTION = 4096


def choose_precision(dtype: Any) -> jax.lax.Precision | None:
    """Return the precision of convolutions and matrix products that compute in `dtype`.

    By default, JAX rounds float32 factors to bfloat16 on TPUs and to TF32 on GPUs, which is not within 1e-4.
    """
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype).itemsize >= 4 else None


def make_conv(channels: int, size: int, dtype: Any, name: str | None = None, **options: Any) -> nn.Conv:
    """Return a convolution with a kernel of `size` x `size`, which keeps height and width by default."""
    options = {"padding": size // 2, **options}
    return nn.Conv(channels, (size, size), dtype=dtype, precision=choose_precision(dtype), name=name, **options)


def make_group_norm(groups: int, dtype: Any, name: str | None = None) -> nn.GroupNorm:
    """Return the normalization of every block (Wu & He 2018), with statistics in float32.

    The default of Flax computes the variance as E[x^2] - E[x]^2, which cancels if the mean is large.
    """
    return nn.GroupNorm(groups, epsilon=1e-6, dtype=dtype, use_fast_variance=False, name=name)


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions with a residual connection (He et al. 2016): [B, H, W, in] -> [B, H, W, channels]."""

    channels: int
    groups: int
    act_fn: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        act = ACTIVATIONS[self.act_fn]
        h = act(make_group_norm(self.groups, self.dtype, "norm1")(x))
        h = make_conv(self.channels, 3, self.dtype, "conv1")(h)
        h = act(make_group_norm(self.groups, self.dtype, "norm2")(h))
        h = make_conv(self.channels, 3, self.dtype, "conv2")(h)
        if x.shape[-1] != self.channels:
            x = make_conv(self.channels, 1, self.dtype, "conv_shortcut")(x)
        return x + h


class Attention(nn.Module):
    """Self-attention over all H*W positions with a residual connection: [B, H, W, C] -> [B, H, W, C]. One head."""

    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        project = partial(nn.Dense, channels, dtype=self.dtype, precision=choose_precision(self.dtype))
        h = make_group_norm(self.groups, self.dtype, "group_norm")(x).reshape(batch, height * width, channels)
        q, k, v = (project(name=name)(h) for name in ("query", "key", "value"))
        h = project(name="proj_attn")(attend(q, k, v))
        return x + h.reshape(x.shape)


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Return softmax(q k^T / sqrt(C)) v (Vaswani et al. 2017, section 3.2.1), for q, k and v [B, N, C].

    Scores and softmax are float32. Beyond WHOLE_ATTENTION positions, QUERY_BLOCK queries are computed at a time, so
    that memory grows with N instead of N squared, in gradients as well.
    """
    precision = choose_precision(q.dtype)

    def attend_block(block: jax.Array) -> jax.Array:
        scores = jnp.einsum("bqc,bkc->bqk", block, k, precision=precision, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        return jnp.einsum("bqk,bkc->bqc", weights, v, precision=precision)

    batch, positions, channels = q.shape
    q = q * jnp.asarray(channels**-0.5, q.dtype)
    if positions <= WHOLE_ATTENTION:
        return attend_block(q)
    blocks = -(-positions // QUERY_BLOCK)
    padded = jnp.pad(q, ((0, 0), (0, blocks * QUERY_BLOCK - positions), (0, 0)))
    split = padded.reshape(batch, blocks, QUERY_BLOCK, channels).swapaxes(0, 1)
    out = jax.lax.map(jax.checkpoint(attend_block), split)  # checkpoint: a gradient keeps no block's weights
    return out.swapaxes(0, 1).reshape(padded.shape)[:, :positions]


class Downsample(nn.Module):
    """A 3x3 convolution with stride 2, padded on the right and bottom only: [B, H, W, C] -> [B, H/2, W/2, C]."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        padding = ((0, 1), (0, 1))
        return make_conv(x.shape[-1], 3, self.dtype, "conv", strides=(2, 2), padding=padding)(x)


class Upsample(nn.Module):
    """Nearest-neighbor upsampling, then a 3x3 convolution: [B, H, W, C] -> [B, 2H, 2W, C]."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.repeat(2, axis=1).repeat(2, axis=2)
        return make_conv(x.shape[-1], 3, self.dtype, "conv")(x)


class Level(nn.Module):
    """A level of the encoder or decoder: `layers` residual blocks, then `resample` except in the last level.

    [B, H, W, in] -> [B, H/2, W/2, channels] or [B, 2H, 2W, channels], or [B, H, W, channels] in the last level.
    """

    channels: int
    layers: int
    groups: int
    act_fn: str
    dtype: Any
    resample: type[Downsample] | type[Upsample] | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.layers):
            x = ResnetBlock(self.channels, self.groups, self.act_fn, self.dtype, name=f"resnets_{i}")(x)
        if self.resample is not None:
            name = "downsamplers_0" if self.resample is Downsample else "upsamplers_0"
            x = self.resample(self.dtype, name=name)(x)
        return x


class MidBlock(nn.Module):
    """The blocks at the lowest resolution: residual block, attention (optional), residual block. Keeps [B, H, W, C]."""

    groups: int
    act_fn: str
    dtype: Any
    has_attention: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        x = ResnetBlock(channels, self.groups, self.act_fn, self.dtype, name="resnets_0")(x)
        if self.has_attention:
            x = Attention(self.groups, self.dtype, name="attentions_0")(x)
        return ResnetBlock(channels, self.groups, self.act_fn, self.dtype, name="resnets_1")(x)


class Encoder(nn.Module):
    """The encoder: pixels [B, H, W, 3] in [-1, 1] -> moments before quant_conv [B, H/f, W/f, 2C]."""

    config: AutoencoderKLConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, dtype = self.config, self.dtype
        groups, act_fn, levels = config.norm_num_groups, config.act_fn, len(config.block_out_channels)
        x = make_conv(config.block_out_channels[0], 3, dtype, "conv_in")(x)
        for level, channels in enumerate(config.block_out_channels):
            resample = None if level == levels - 1 else Downsample
            name = f"down_blocks_{level}"
            x = Level(channels, config.layers_per_block, groups, act_fn, dtype, resample, name=name)(x)
        x = MidBlock(groups, act_fn, dtype, config.mid_block_add_attention, name="mid_block")(x)
        x = jax.nn.silu(make_group_norm(groups, dtype, "conv_norm_out")(x))  # act_fn does not apply here
        return make_conv(2 * config.latent_channels, 3, dtype, "conv_out")(x)


class Decoder(nn.Module):
    """The decoder: latents after post_quant_conv [B, H/f, W/f, C] -> pixels [B, H, W, 3]."""

    config: AutoencoderKLConfig
    dtype: Any

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        config, dtype = self.config, self.dtype
        groups, act_fn, levels = config.norm_num_groups, config.act_fn, len(config.block_out_channels)
        x = make_conv(config.block_out_channels[-1], 3, dtype, "conv_in")(z)
        x = MidBlock(groups, act_fn, dtype, config.mid_block_add_attention, name="mid_block")(x)
        for level, channels in enumerate(reversed(config.block_out_channels)):
            resample = None if level == levels - 1 else Upsample
            name = f"up_blocks_{level}"
            x = Level(channels, config.layers_per_block + 1, groups, act_fn, dtype, resample, name=name)(x)
        x = jax.nn.silu(make_group_norm(groups, dtype, "conv_norm_out")(x))  # act_fn does not apply here
        return make_conv(config.out_channels, 3, dtype, "conv_out")(x)
