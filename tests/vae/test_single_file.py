"""The same weights in every layout in use, and files that are not a VAE."""

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.checkpoints import AROUND, ldm
from tests.conftest import MICRO
from vae import (
    AssumedConfigWarning,
    AutoencoderKL,
    AutoencoderKLConfig,
    LoadError,
    LoadWarning,
    presets,
    single_file,
    unpickle,
)
from vae.auto import class_of
from vae.keys import rename_keys
from vae.load import resolve_config, weights_sha256

SHAPE_FIELDS = (  # the fields that the tensors' names and shapes determine
    "in_channels",
    "out_channels",
    "block_out_channels",
    "layers_per_block",
    "latent_channels",
    "use_quant_conv",
    "use_post_quant_conv",
    "mid_block_add_attention",
)
SMALL = AutoencoderKLConfig(
    **{**MICRO, "block_out_channels": (8, 16, 32, 32), "norm_num_groups": 8, "layers_per_block": 2}
)


@pytest.fixture(scope="module")
def model() -> AutoencoderKL:
    torch.manual_seed(3)
    return AutoencoderKL.from_config(SMALL).eval().requires_grad_(False)


def to_old_diffusers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the attention's tensors to the names of diffusers before 0.17."""
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    return {_replace_parts(name, names): tensor for name, tensor in weights.items()}


def _replace_parts(name: str, names: Mapping[str, str]) -> str:
    for new, old in names.items():
        name = name.replace(f".{new}.", f".{old}.")
    return name


def make_tensor() -> Tensor:
    """Return a tensor whose content does not matter."""
    return torch.zeros(2)


LAYOUTS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "diffusers": lambda weights: dict(weights),
    "diffusers before 0.17": to_old_diffusers,
    "latent-diffusion": ldm,
    "latent-diffusion with its discriminator": lambda weights: {
        **ldm(weights),
        "loss.discriminator.main.0.weight": make_tensor(),
        "model_ema.decay": make_tensor(),
    },
    "a full checkpoint of SD": lambda weights: {**ldm(weights, "first_stage_model."), AROUND["sd"]: make_tensor()},
    "a full checkpoint of FLUX": lambda weights: {**ldm(weights, "vae."), AROUND["flux"]: make_tensor()},
}


@pytest.mark.parametrize(
    ("layout", "suffix"), [*((layout, ".safetensors") for layout in LAYOUTS), ("a full checkpoint of SD", ".ckpt")]
)
def test_every_layout_gives_the_same_weights(model: AutoencoderKL, layout: str, suffix: str, tmp_path: Path) -> None:
    tensors = LAYOUTS[layout](model.state_dict())
    path = tmp_path / f"model{suffix}"
    if suffix == ".ckpt":
        torch.save({"state_dict": tensors, "global_step": 840000}, path)
    else:
        save_file(tensors, path)
    loaded = AutoencoderKL.from_single_file(path, config=SMALL)
    assert weights_sha256(loaded.state_dict()) == weights_sha256(model.state_dict())
    assert not loaded.training
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(loaded.encode(pixels).latent_dist.mode(), model.encode(pixels).latent_dist.mode())


@pytest.mark.parametrize("name", presets.PRESETS)
def test_the_shapes_determine_the_architecture(name: str, tmp_path: Path) -> None:
    """For every preset, the fields inferred from its tensors are those of its configuration."""
    config = presets.PRESETS[name].config
    with torch.device("meta"):
        weights = class_of(config)(**config).state_dict()
    fields = single_file.infer_fields(rename_keys(ldm(weights)), tmp_path)
    names = {*SHAPE_FIELDS, *({"decoder_block_out_channels"} if name.startswith("flux2") else {})}
    assert fields == {field: config[field] for field in names}


def identify(fields: Mapping[str, Any], around: list[str], repository: str = "") -> Any:
    return single_file.identify_config({name: fields[name] for name in SHAPE_FIELDS}, around, repository, Path("x"))


@pytest.mark.parametrize("family", AROUND)
def test_a_full_checkpoint_is_identified_by_the_tensors_around_its_vae(family: str) -> None:
    expected = presets.PRESETS[family].config
    around = [AROUND[family], AROUND["sdxl"]] if family == "playground-v2.5" else [AROUND[family]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert identify(expected, around) == expected


def test_a_file_is_identified_by_its_repository() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sd = identify(presets.PRESETS["sd"].config, [], "stabilityai/sd-vae-ft-mse-original")
        sdxl = identify(presets.PRESETS["sd"].config, [], "stabilityai/sdxl-vae")
    assert (sd.scaling_factor, sdxl.scaling_factor) == (0.18215, 0.13025)


def test_assumed_constants_give_a_warning(model: AutoencoderKL, tmp_path: Path) -> None:
    with pytest.warns(
        AssumedConfigWarning, match=r"match sd \(scaling_factor 0.18215\), playground.*, sdxl .* Assumed: sd "
    ):
        assert identify(presets.PRESETS["sd"].config, []) == presets.PRESETS["sd"].config
    with pytest.warns(AssumedConfigWarning, match=r"match sd3 .*0.0609\), flux \(scaling_factor 0.3611, shift_factor"):
        identify(presets.PRESETS["flux"].config, [])
    wide = AutoencoderKL.from_config({**SMALL, "block_out_channels": (32, 32, 64, 64), "norm_num_groups": 32})
    save_file(ldm(wide.state_dict()), tmp_path / "own.safetensors")
    with pytest.warns(AssumedConfigWarning, match="match no preset. Assumed: the defaults of AutoencoderKL"):
        loaded = AutoencoderKL.from_single_file(tmp_path / "own.safetensors")
    assert loaded.config.block_out_channels == (32, 32, 64, 64)
    assert loaded.config.scaling_factor == 0.18215


def test_a_configuration_can_be_given_in_four_ways(micro_vae: Path) -> None:
    flux = resolve_config("flux")
    assert flux is not None
    assert (flux.scaling_factor, flux.shift_factor, flux.latent_channels) == (0.3611, 0.1159, 16)
    assert resolve_config(flux) is flux
    assert resolve_config({"latent_channels": 8}) == AutoencoderKLConfig(latent_channels=8)
    assert resolve_config(micro_vae) == AutoencoderKL.from_pretrained(micro_vae).config
    with pytest.raises(
        LoadError, match=r"fluxx is not a configuration: it is not a preset \(sd, .*\), and there is no VAE at"
    ):
        resolve_config("fluxx")


class Hostile:
    """An object whose pickle runs a command when it is read."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.witness}",)


def test_a_hostile_pickle_runs_nothing(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    torch.save({"state_dict": {"a": make_tensor()}, "callbacks": Hostile(witness)}, tmp_path / "hostile.ckpt")
    with pytest.raises(
        LoadError, match="it has objects other than tensors, which could run code; save the tensors as safetensors"
    ):
        AutoencoderKL.from_single_file(tmp_path / "hostile.ckpt")
    assert not witness.exists()


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no.safetensors": (lambda path: None, "there is no file"),
    "text.txt": (
        lambda path: path.write_text("hello"),
        "is not a checkpoint: the name of a checkpoint ends with .bin, .ckpt",
    ),
    "text.safetensors": (lambda path: path.write_text("hello, this is text"), "cannot be read as safetensors"),
    "text.ckpt": (lambda path: path.write_text("hello"), "cannot be read as a checkpoint"),
    "list.ckpt": (lambda path: torch.save([make_tensor()], path), "it does not map names to tensors"),
    "numbers.pt": (lambda path: torch.save({"a": 1}, path), "it has no tensors"),
    "lora.safetensors": (lambda path: save_file({"lora_unet.a": make_tensor()}, path), "there is no AutoencoderKL in"),
    "other.safetensors": (
        lambda path: save_file(
            {"encoder.conv_in.weight": make_tensor(), "decoder.conv_in.weight": make_tensor(), "x.y": make_tensor()},
            path,
        ),
        "is not a checkpoint of an AutoencoderKL: it has the tensor x.y",
    ),
    "flat.safetensors": (
        lambda path: save_file(
            {"encoder.conv_in.weight": make_tensor(), "decoder.conv_in.weight": make_tensor()}, path
        ),
        "is not a checkpoint of an AutoencoderKL: a weight has no dimensions",
    ),
    "half.safetensors": (
        lambda path: save_file(
            {"encoder.conv_in.weight": make_tensor()[:, None].clone(), "decoder.conv_in.weight": make_tensor()}, path
        ),
        "is not a checkpoint of an AutoencoderKL: it lacks decoder.conv_out.weight",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_not_a_vae_is_refused(name: str, tmp_path: Path) -> None:
    make, message = FILES[name]
    make(tmp_path / name)
    with pytest.raises(LoadError, match=message):
        AutoencoderKL.from_single_file(tmp_path / name)


def test_a_file_with_two_vaes_says_which_one_is_used(model: AutoencoderKL, tmp_path: Path) -> None:
    other = {f"vae.{name}": tensor * 2 for name, tensor in ldm(model.state_dict()).items()}
    save_file({**ldm(model.state_dict(), "first_stage_model."), **other}, tmp_path / "full.safetensors")
    used, unused = "first_stage_model.encoder.conv_in.weight", "vae.encoder.conv_in.weight"
    with pytest.warns(LoadWarning, match=f"has 2 VAEs; the one with the tensor {used} is used, not {unused}"):
        loaded = AutoencoderKL.from_single_file(tmp_path / "full.safetensors", config=SMALL)
    assert weights_sha256(loaded.state_dict()) == weights_sha256(model.state_dict())


def test_a_file_with_the_average_of_its_weights_says_which_ones_are_used(model: AutoencoderKL, tmp_path: Path) -> None:
    """latent-diffusion writes the names of the average without dots, and a counter, which alone means nothing."""
    counters = {"model_ema.decay": make_tensor(), "model_ema.num_updates": make_tensor()}
    tensors = ldm(model.state_dict())
    save_file({**tensors, **counters}, tmp_path / "pruned.safetensors")
    AutoencoderKL.from_single_file(tmp_path / "pruned.safetensors", config=SMALL)
    average = {f"model_ema.{name.replace('.', '')}": tensor * 2 for name, tensor in tensors.items()}
    save_file({**tensors, **counters, **average}, tmp_path / "trained.safetensors")
    with pytest.warns(
        LoadWarning, match=r"twice, as trained and as their moving average .*; those as trained are used"
    ):
        loaded = AutoencoderKL.from_single_file(tmp_path / "trained.safetensors", config=SMALL)
    assert weights_sha256(loaded.state_dict()) == weights_sha256(model.state_dict())


def test_a_configuration_that_does_not_match_is_refused(model: AutoencoderKL, tmp_path: Path) -> None:
    save_file(ldm(model.state_dict()), tmp_path / "model.safetensors")
    with pytest.raises(LoadError, match="do not match the configuration"):
        AutoencoderKL.from_single_file(tmp_path / "model.safetensors", config="flux")
    with pytest.raises(
        LoadError, match=r"\(8 channels cannot be divided .*\); give its configuration with config=NAME"
    ):
        AutoencoderKL.from_single_file(tmp_path / "model.safetensors")


def test_a_url_of_another_host_has_to_be_downloaded_first() -> None:
    with pytest.raises(LoadError, match="neither a local file nor a file on the hub; download it first"):
        AutoencoderKL.from_single_file("s3://bucket/model.safetensors")


def test_a_torch_that_cannot_read_pickles_safely_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.save({"a": make_tensor()}, tmp_path / "a.ckpt")
    assert unpickle.read_tensors(str(tmp_path / "a.ckpt")).keys() == {"a"}
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(ValueError, match=r"torch 2.9.1\+cpu cannot read pickles safely; upgrade it to 2.10 or later"):
        unpickle.read_tensors(str(tmp_path / "a.ckpt"))


@pytest.mark.slow
def test_a_full_size_sd_checkpoint_gives_the_same_model_in_every_layout(tmp_path: Path) -> None:
    """Loads 335 MB of random weights in every layout and container."""
    torch.manual_seed(6)
    original = AutoencoderKL.from_config(presets.PRESETS["sd"].config).eval().requires_grad_(False)
    weights = original.state_dict()
    size = sum(tensor.numel() * 4 for tensor in weights.values())
    assert round(size / 1e6) == 335
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = original.encode(pixels).latent_dist.mode(), weights_sha256(weights)

    def is_original(model: AutoencoderKL) -> bool:
        latent = model.encode(pixels).latent_dist.mode()
        return torch.equal(latent, expected[0]) and weights_sha256(model.state_dict()) == expected[1]

    original.save_pretrained(tmp_path / "pipeline/vae")
    assert is_original(AutoencoderKL.from_pretrained(tmp_path / "pipeline"))
    (tmp_path / "pipeline/vae/diffusion_pytorch_model.safetensors").unlink()
    torch.save(weights, tmp_path / "pipeline/vae/diffusion_pytorch_model.bin")
    assert is_original(AutoencoderKL.from_pretrained(tmp_path / "pipeline"))
    file = tmp_path / "model.safetensors"
    for layout in LAYOUTS.values():
        tensors = layout(dict(weights))
        save_file(tensors, file)
        assert is_original(AutoencoderKL.from_single_file(file, config="sd"))
    torch.save({"state_dict": ldm(weights, "first_stage_model.")}, tmp_path / "model.ckpt")
    assert is_original(AutoencoderKL.from_single_file(tmp_path / "model.ckpt", config="sd"))
