"""Configurations of the public VAEs by name, with the source of their numbers.

Single files need them, because a file of tensors has no scaling factor (`vae.single_file`). They are not used for a
model's directory, which has its own config.json.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vae.config import AutoencoderKLConfig, AutoencoderKLFlux2Config


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The configuration of a model family.

    source: the published files that the numbers come from.
    repositories: ids of hub repositories whose single files have this configuration.
    marks: prefixes of tensor names outside the VAE that occur only in the family's full checkpoints.
    """

    config: AutoencoderKLConfig | AutoencoderKLFlux2Config
    source: str
    repositories: Sequence[str] = ()
    marks: Sequence[str] = ()


def _make_config(**fields: Any) -> AutoencoderKLConfig:
    """Return a configuration with the fields that most families share: four levels (factor 8) of two layers."""
    common = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
    }
    return AutoencoderKLConfig(**{**common, **fields})


def _make_sd3_config(**fields: Any) -> AutoencoderKLConfig:
    """Return a configuration like SD 3's: 16 channels, no 1x1 convolutions between encoder, latent and decoder."""
    return _make_config(latent_channels=16, sample_size=1024, use_quant_conv=False, use_post_quant_conv=False, **fields)


_COGVIEW = {"block_out_channels": (128, 512, 1024, 1024), "layers_per_block": 3, "mid_block_add_attention": False}

PRESETS: dict[str, Preset] = {
    "sd": Preset(
        # scaling_factor is the class's default, 0.18215: the config.json of sd-vae-ft-mse does not set it.
        config=_make_config(sample_size=512),
        source="vae/config.json of stable-diffusion-v1-4, v1-5 and 2-1-base; config.json of sd-vae-ft-mse and -ema",
        repositories=("stabilityai/sd-vae-ft-mse-original", "stabilityai/sd-vae-ft-ema-original"),
        marks=("cond_stage_model.transformer.", "cond_stage_model.model."),
    ),
    "playground-v2.5": Preset(
        config=_make_config(
            sample_size=1024,
            scaling_factor=0.5,
            latents_mean=(-1.6574, 1.886, -1.383, 2.5155),
            latents_std=(8.4927, 5.9022, 6.5498, 5.2299),
        ),
        source="vae/config.json of playgroundai/playground-v2.5-1024px-aesthetic",
        repositories=("playgroundai/playground-v2.5-1024px-aesthetic",),
        marks=("edm_mean", "edm_std"),
    ),
    "sdxl": Preset(
        config=_make_config(sample_size=1024, scaling_factor=0.13025),
        source="config.json of stabilityai/sdxl-vae, vae/config.json of stable-diffusion-xl-base-1.0",
        repositories=("stabilityai/sdxl-vae", "stabilityai/stable-diffusion-xl-base-1.0", "stabilityai/sdxl-turbo"),
        marks=("conditioner.embedders.",),
    ),
    "sdxl-fp16-fix": Preset(
        config=_make_config(sample_size=512, scaling_factor=0.13025, force_upcast=False),
        source="config.json of madebyollin/sdxl-vae-fp16-fix",
        repositories=("madebyollin/sdxl-vae-fp16-fix",),
    ),
    "auraflow": Preset(
        config=_make_config(sample_size=1024, scaling_factor=0.13025),
        source="vae/config.json of fal/AuraFlow (the SDXL VAE)",
        marks=("model.double_layers.", "double_layers."),
    ),
    "sd3": Preset(
        config=_make_sd3_config(scaling_factor=1.5305, shift_factor=0.0609),
        source="diffusers' conversion script of SD 3; vae/config.json of stable-diffusion-3-medium and -3.5",
        repositories=("stabilityai/stable-diffusion-3-medium", "stabilityai/stable-diffusion-3.5-large"),
        marks=("model.diffusion_model.joint_blocks.", "joint_blocks."),
    ),
    "flux": Preset(
        config=_make_sd3_config(scaling_factor=0.3611, shift_factor=0.1159),
        source="vae/config.json of FLUX.1-dev, -schnell and Z-Image; diffusers' conversion script of FLUX",
        repositories=("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell"),
        marks=("model.diffusion_model.double_blocks.", "double_blocks."),
    ),
    "flux2": Preset(  # the class's defaults
        config=AutoencoderKLFlux2Config(),
        source="vae/config.json of FLUX.2-dev and FLUX.2-klein; diffusers' conversion script of FLUX.2",
        repositories=("black-forest-labs/FLUX.2-dev",),
    ),
    "flux2-small-decoder": Preset(
        config=AutoencoderKLFlux2Config(decoder_block_out_channels=(96, 192, 384, 384)),
        source="config.json of black-forest-labs/FLUX.2-small-decoder",
        repositories=("black-forest-labs/FLUX.2-small-decoder",),
    ),
    "cogview3-plus": Preset(
        config=_make_sd3_config(scaling_factor=1.0, **_COGVIEW),
        source="diffusers' conversion script of CogView3-Plus",
    ),
    "cogview4": Preset(
        config=_make_sd3_config(scaling_factor=1.0, shift_factor=0.0, **_COGVIEW),
        source="diffusers' conversion script of CogView4",
    ),
}
