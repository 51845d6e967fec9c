import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import MICRO
from vae import AutoencoderKL, AutoencoderKLConfig, LoadError
from vae.load import CONFIG, INDEX, WEIGHTS, weights_sha256
from vae.train import train


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    AutoencoderKL(**MICRO).save_pretrained(tmp_path / "model/vae")
    return tmp_path / "model/vae"


def edit(folder: Path, **fields: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))


def test_there_and_back(folder: Path, tmp_path: Path) -> None:
    model = AutoencoderKL.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    again = AutoencoderKL.from_pretrained(tmp_path / "again")
    assert again.config == model.config
    assert weights_sha256(again.state_dict()) == weights_sha256(model.state_dict())
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_pipelines_directory_has_it_in_vae(folder: Path) -> None:
    assert AutoencoderKL.from_pretrained(folder.parent).config == AutoencoderKL.from_pretrained(folder).config
    assert AutoencoderKL.from_pretrained(folder.parent, subfolder="vae").dtype == torch.float32


def test_weights_may_be_in_several_files(folder: Path) -> None:
    before = weights_sha256(AutoencoderKL.from_pretrained(folder).state_dict())
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, inside in files.items():
        save_file({name: tensors[name] for name in inside}, folder / file)
    weight_map = {name: file for file, inside in files.items() for name in inside}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert weights_sha256(AutoencoderKL.from_pretrained(folder).state_dict()) == before


def test_the_hash_is_of_values_not_of_files() -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}
    same = {"b": torch.ones(2, dtype=torch.float16), "a": torch.arange(6).reshape(3, 2).t().float().t().reshape(2, 3)}
    assert weights_sha256(tensors) == weights_sha256(same)
    assert weights_sha256(tensors) != weights_sha256({**tensors, "b": torch.tensor([1.0, 1.0 + 1e-7])})
    assert weights_sha256(tensors) != weights_sha256({"a": tensors["a"].reshape(3, 2), "b": tensors["b"]})


def test_a_dtype_can_be_asked_for(folder: Path) -> None:
    assert AutoencoderKL.from_pretrained(folder, torch_dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"_class_name": "AutoencoderDC"}, "configuration of a AutoencoderDC"),
        ({"latent_chanels": 4}, "no parameter 'latent_chanels' .*'latent_channels'"),
        ({"down_block_types": ["Other"] * 4}, "no block of type Other"),
        ({"block_out_channels": [8, 8]}, "names 4 blocks, block_out_channels has 2"),
        ({"norm_num_groups": 3}, "8 channels cannot be split into norm_num_groups=3"),
        ({"latents_mean": [0.0]}, "latents_mean has 1 values, latent_channels is 4"),
        ({"latent_channels": 8}, "conv_in.weight has the shape|has the shape"),
        ({"layers_per_block": 2}, "tensors missing, 0 too many .it lacks"),
        ({"use_quant_conv": False}, "0 tensors missing, 2 too many .it has quant_conv"),
    ],
)
def test_what_does_not_fit_is_named(folder: Path, fields: dict[str, object], message: str) -> None:
    edit(folder, **fields)
    with pytest.raises(LoadError, match=message):
        AutoencoderKL.from_pretrained(folder)


def test_a_directory_without_a_model_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"no VAE at .*nowhere: no such directory"):
        AutoencoderKL.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(LoadError, match="is a file"):
        AutoencoderKL.from_pretrained(folder / CONFIG)
    with pytest.raises(LoadError, match="neither it nor its vae/"):
        AutoencoderKL.from_pretrained(tmp_path)
    (folder / WEIGHTS).write_bytes(b"\x10" * 100)
    with pytest.raises(LoadError, match="cannot be read as safetensors"):
        AutoencoderKL.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(LoadError, match="there are no weights"):
        AutoencoderKL.from_pretrained(folder)


def test_a_config_is_read_by_attribute_and_by_key() -> None:
    config = AutoencoderKLConfig.from_dict({"_diffusers_version": "0.4.2", "latent_channels": 16})
    assert config.latent_channels == config["latent_channels"] == 16
    assert config.scaling_factor == 0.18215
    assert AutoencoderKLConfig.from_dict(config.to_dict()) == config
    with pytest.raises(KeyError):
        config["nothing"]


@pytest.mark.slow
def test_training_makes_a_model_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "trained", steps=200, seed=0)
    lines = [line for line in capsys.readouterr().out.splitlines() if "distortion" in line]
    first, last = (float(line.split("distortion ")[1].split(",")[0]) for line in (lines[0], lines[-1]))
    assert last < first
    assert AutoencoderKL.from_pretrained(tmp_path / "trained").config.latents_mean is not None
