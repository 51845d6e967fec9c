import dataclasses
import json

import pytest

from vae import AutoencoderKLConfig, blocks
from vae.config import ACTIVATIONS

FOUR_LEVELS = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [32, 64, 128, 128],
}


def test_a_config_is_a_mapping() -> None:
    config = AutoencoderKLConfig(latent_channels=16)
    assert len(config) == len(list(config)) == len(dataclasses.fields(config))
    assert {**config}["latent_channels"] == config.get("latent_channels") == 16
    assert config.get("nothing") is None
    assert "nothing" not in config


def test_every_activation_that_a_config_may_name_exists() -> None:
    assert tuple(blocks.ACTIVATIONS) == ACTIVATIONS


def test_a_config_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        AutoencoderKLConfig().latent_channels = 8  # type: ignore[misc]


def test_lists_become_tuples_so_that_configs_compare_equal() -> None:
    from_lists = AutoencoderKLConfig(**FOUR_LEVELS)
    from_tuples = AutoencoderKLConfig(**{key: tuple(value) for key, value in FOUR_LEVELS.items()})
    assert from_lists == from_tuples
    assert hash(from_lists) == hash(from_tuples)
    assert from_lists.block_out_channels == (32, 64, 128, 128)


def test_a_config_survives_a_round_trip_through_json() -> None:
    fields = {**FOUR_LEVELS, "latents_mean": (1, 2, 3, 4), "latents_std": (1, 1, 1, 2), "shift_factor": 0.5}
    config = AutoencoderKLConfig(**fields)
    assert AutoencoderKLConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(("levels", "downscale"), [(1, 1), (2, 2), (3, 4), (4, 8), (5, 16)])
def test_every_level_but_the_last_halves_the_image(levels: int, downscale: int) -> None:
    config = AutoencoderKLConfig(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(32,) * levels,
    )
    assert config.downscale == downscale


@pytest.mark.parametrize("key", ["_class_name", "_diffusers_version", "_name_or_path"])
def test_keys_that_diffusers_writes_for_its_own_use_are_ignored(key: str) -> None:
    assert AutoencoderKLConfig.from_dict({key: "AutoencoderKL"}) == AutoencoderKLConfig()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"_class_name": "AutoencoderTiny"}, "this is a configuration of class AutoencoderTiny, not AutoencoderKL"),
        (
            {"scaling_faktor": 1},
            "an AutoencoderKL has no parameter 'scaling_faktor'; did you mean 'scaling_factor'?",
        ),
        ({"zzz": 1}, "an AutoencoderKL has no parameter 'zzz'"),
        (
            {"up_block_types": ["UpDecoderBlock2D"] * 2},
            "up_block_types has 2 blocks, but block_out_channels has 1 levels",
        ),
        ({"down_block_types": ["CrossAttn"]}, "an AutoencoderKL has no block of type CrossAttn"),
        ({"up_block_types": ["B"], "down_block_types": ["A"]}, "an AutoencoderKL has no block of type A, B"),
        ({"block_out_channels": [48]}, "48 channels cannot be divided into norm_num_groups=32"),
        ({"latents_std": [1, 2]}, "latents_std has 2 values, but latent_channels is 4"),
        ({"act_fn": "tanh"}, "act_fn 'tanh' is not one of silu, swish, mish, gelu, relu"),
        ({"latent_channels": True}, "latent_channels must be an integer of at least 1, not True"),
        ({"shift_factor": "0"}, "shift_factor must be a number, not '0'"),
    ],
)
def test_an_error_names_the_field_and_the_value(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        AutoencoderKLConfig.from_dict(fields)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    "fields",
    [
        {"norm_num_groups": 0},
        {"block_out_channels": [], "down_block_types": [], "up_block_types": []},
        {"latent_channels": -4},
        {"latent_channels": "4"},
        {"layers_per_block": 1.5},
        {"latents_mean": [0, 0, 0, 0], "latents_std": [1, 1, 1, 0]},
        {"scaling_factor": None},
        {"scaling_factor": 0},
    ],
    ids=lambda fields: ",".join(f"{key}={value}" for key, value in fields.items()),
)
def test_values_that_no_model_can_have_are_value_errors(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        AutoencoderKLConfig.from_dict(fields)
