import hashlib
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import MICRO
from vae import AutoencoderKL, AutoencoderKLConfig, LoadError, LoadWarning
from vae.load import CONFIG, INDEX, STEM, WEIGHTS, weights_sha256
from vae.train import train


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    AutoencoderKL(**MICRO).save_pretrained(tmp_path / "model/vae")
    return tmp_path / "model/vae"


def edit(folder: Path, **fields: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))


def test_a_saved_model_loads_with_the_same_config_and_weights(folder: Path, tmp_path: Path) -> None:
    model = AutoencoderKL.from_pretrained(folder)
    model.save_pretrained(tmp_path / "copy")
    copy = AutoencoderKL.from_pretrained(tmp_path / "copy")
    assert copy.config == model.config
    assert weights_sha256(copy.state_dict()) == weights_sha256(model.state_dict())
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_vae_of_a_pipelines_directory_is_found(folder: Path) -> None:
    assert AutoencoderKL.from_pretrained(folder.parent).config == AutoencoderKL.from_pretrained(folder).config
    assert AutoencoderKL.from_pretrained(folder.parent, subfolder="vae").dtype == torch.float32


def test_weights_may_be_split_into_several_files(folder: Path) -> None:
    before = weights_sha256(AutoencoderKL.from_pretrained(folder).state_dict())
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, names_in_file in files.items():
        save_file({name: tensors[name] for name in names_in_file}, folder / file)
    weight_map = {name: file for file, names_in_file in files.items() for name in names_in_file}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert weights_sha256(AutoencoderKL.from_pretrained(folder).state_dict()) == before


def move(folder: Path, name: str, scale: float = 1.0) -> None:
    """Save the weights times `scale` under another name. The file WEIGHTS stays, unless the name is its own."""
    save_file({key: tensor * scale for key, tensor in load_file(folder / WEIGHTS).items()}, folder / name)


def first_weight(path: Path, **options: str) -> float:
    return float(AutoencoderKL.from_pretrained(path, **options).encoder.conv_in.weight[0, 0, 0, 0])


def test_weights_without_a_variant_are_preferred_then_the_most_exact_variant(folder: Path) -> None:
    weight = first_weight(folder)
    for scale, variant in enumerate(("ema", "bf16", "fp16", "int8"), start=2):
        move(folder, f"{STEM}.{variant}.safetensors", scale)
    assert first_weight(folder) == weight
    (folder / WEIGHTS).unlink()
    with pytest.warns(LoadWarning, match=rf"there is no {WEIGHTS} at .*; the weights are those of the variant fp16 \("):
        assert first_weight(folder) == pytest.approx(4 * weight)
    (folder / f"{STEM}.fp16.safetensors").unlink()
    with pytest.warns(LoadWarning, match=r"the variant bf16 .*\. To use other ones, name their file"):
        assert first_weight(folder) == pytest.approx(3 * weight)
    assert first_weight(folder, variant="ema") == pytest.approx(2 * weight)
    (folder / f"{STEM}.bf16.safetensors").unlink()
    (folder / f"{STEM}.ema.safetensors").unlink()
    message = f"no {WEIGHTS} (there is {STEM}.int8.safetensors; to use one, name that file)"
    with pytest.raises(LoadError, match=re.escape(message)):
        AutoencoderKL.from_pretrained(folder)
    loaded = AutoencoderKL.from_single_file(folder / f"{STEM}.int8.safetensors")
    assert float(loaded.encoder.conv_in.weight[0, 0, 0, 0]) == pytest.approx(5 * weight)
    assert loaded.config.latent_channels == 4, "of the config.json beside it"


def test_a_variant_may_be_split_into_several_files(folder: Path) -> None:
    weight = first_weight(folder)
    (folder / WEIGHTS).rename(folder / "a.safetensors")
    names = list(load_file(folder / "a.safetensors"))
    (folder / f"{WEIGHTS}.index.bf16.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(names, "a.safetensors")})
    )
    with pytest.warns(LoadWarning, match="the variant bf16"):
        assert first_weight(folder) == weight


def test_keys_that_cannot_change_the_model_are_left_out_and_named(folder: Path) -> None:
    expected = AutoencoderKL.from_pretrained(folder).config
    edit(folder, _commit_hash="0a1b", _use_default_values=["act_fn"], _name_or_path="x")
    assert AutoencoderKL.from_pretrained(folder).config == expected, "without a warning"
    edit(folder, dtype="bfloat16", torch_dtype="bfloat16", decay=0.999)
    with pytest.warns(
        LoadWarning, match="configuration has decay, dtype, torch_dtype, which an AutoencoderKL does not"
    ):
        assert AutoencoderKL.from_pretrained(folder).config == expected
    edit(folder, quantization_config={})
    with pytest.raises(LoadError, match="has no parameter 'quantization_config'"):
        AutoencoderKL.from_pretrained(folder)


def test_the_hash_depends_on_values_not_on_dtype_or_memory_layout() -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}
    same = {"b": torch.ones(2, dtype=torch.float16), "a": torch.arange(6).reshape(3, 2).t().float().t().reshape(2, 3)}
    assert weights_sha256(tensors) == weights_sha256(same)
    assert weights_sha256(tensors) != weights_sha256({**tensors, "b": torch.tensor([1.0, 1.0 + 1e-7])})
    assert weights_sha256(tensors) != weights_sha256({"a": tensors["a"].reshape(3, 2), "b": tensors["b"]})


def test_weights_are_converted_to_the_requested_dtype(folder: Path) -> None:
    assert AutoencoderKL.from_pretrained(folder, torch_dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"_class_name": "AutoencoderDC"},
            "a configuration of class AutoencoderDC; the classes of VAEs that can be loaded are AutoencoderKL and Auto",
        ),
        ({"latent_chanels": 4}, "no parameter 'latent_chanels'; did you mean 'latent_channels'"),
        ({"down_block_types": ["Other"] * 4}, "no block of type Other"),
        ({"block_out_channels": [8, 8]}, "has 4 blocks, but block_out_channels has 2 levels"),
        ({"norm_num_groups": 3}, "8 channels cannot be divided into norm_num_groups=3"),
        ({"latents_mean": [0.0]}, "latents_mean has 1 values, but latent_channels is 4"),
        ({"latent_channels": 8}, "conv_in.weight has the shape|has the shape"),
        ({"layers_per_block": 2}, "tensors are missing, 0 are extra .*is missing"),
        ({"use_quant_conv": False}, "0 tensors are missing, 2 are extra .quant_conv.* is not in the configuration"),
    ],
)
def test_a_config_that_does_not_match_the_weights_is_refused(
    folder: Path, fields: dict[str, object], message: str
) -> None:
    edit(folder, **fields)
    with pytest.raises(LoadError, match=message):
        AutoencoderKL.from_pretrained(folder)


def test_a_directory_without_a_model_is_refused(folder: Path, tmp_path: Path) -> None:
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
def test_training_saves_a_model_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "trained", steps=200, seed=0)
    lines = [line for line in capsys.readouterr().out.splitlines() if "distortion" in line]
    first, last = (float(line.split("distortion ")[1].split(",")[0]) for line in (lines[0], lines[-1]))
    assert last < first
    assert AutoencoderKL.from_pretrained(tmp_path / "trained").config.latents_mean is not None


def rewrite(folder: Path, **changed: torch.Tensor | None) -> None:
    """Save the weights with each named tensor (dots as __) replaced, or removed if it is None."""
    tensors = {**load_file(folder / WEIGHTS), **{name.replace("__", "."): value for name, value in changed.items()}}
    save_file({name: value for name, value in tensors.items() if value is not None}, folder / WEIGHTS)


def replace_by_index(folder: Path, text: str) -> None:
    """Replace the weights by an index."""
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(text)


def truncate(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-4])


MISMATCH = "the weights at {folder} do not match the configuration: "
REFUSALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (
        lambda folder: (folder / CONFIG).unlink(),
        "there is no VAE at {folder}: neither it nor its vae/ has a config.json",
    ),
    "a config that is a list": (
        lambda folder: (folder / CONFIG).write_text("[1]"),
        "{folder}/config.json: it is not a JSON object",
    ),
    "a truncated config": (
        lambda folder: (folder / CONFIG).write_text('{"latent_channels": '),
        "{folder}/config.json: Expecting value: line 1 column 21 (char 20)",
    ),
    "an unknown key": (
        lambda folder: edit(folder, latent_chanels=4),
        "{folder}/config.json: an AutoencoderKL has no parameter 'latent_chanels'; did you mean 'latent_channels'?",
    ),
    "no weights": (
        lambda folder: (folder / WEIGHTS).unlink(),
        "there are no weights at {folder}: no diffusion_pytorch_model.safetensors",
    ),
    "truncated weights": (
        truncate,
        "{folder}/diffusion_pytorch_model.safetensors cannot be read as safetensors; "
        "it may be truncated, download it again",
    ),
    "empty weights": (
        lambda folder: (folder / WEIGHTS).write_bytes(b""),
        "{folder}/diffusion_pytorch_model.safetensors cannot be read as safetensors; "
        "it may be truncated, download it again",
    ),
    "an index whose file is missing": (
        lambda folder: replace_by_index(folder, '{"weight_map": {"a": "gone.safetensors"}}'),
        "gone.safetensors is missing at {folder}, although diffusion_pytorch_model.safetensors.index.json lists it; "
        "download it again",
    ),
    "a missing tensor": (
        lambda folder: rewrite(folder, encoder__conv_in__bias=None),
        MISMATCH + "1 tensors are missing, 0 are extra (encoder.conv_in.bias is missing)",
    ),
    "an extra tensor": (
        lambda folder: rewrite(folder, extra=torch.ones(1)),
        MISMATCH + "0 tensors are missing, 1 are extra (extra is not in the configuration)",
    ),
    "a wrong shape": (
        lambda folder: rewrite(folder, encoder__conv_in__bias=torch.ones(2, 4)),
        MISMATCH + "encoder.conv_in.bias has the shape [2, 4], not [8]",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_an_error_has_exactly_this_text(folder: Path, case: str) -> None:
    change, message = REFUSALS[case]
    change(folder)
    with pytest.raises(LoadError) as refused:
        AutoencoderKL.from_pretrained(folder)
    assert str(refused.value) == message.format(folder=folder)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": ["a"]}'])
def test_a_corrupt_index_is_refused(folder: Path, text: str) -> None:
    replace_by_index(folder, text)
    with pytest.raises(LoadError, match=re.escape(INDEX)):
        AutoencoderKL.from_pretrained(folder)


@pytest.mark.parametrize("fields", [{"act_fn": "nope"}, {"norm_num_groups": 0}, {"latent_channels": "4"}])
def test_a_config_that_no_model_can_have_is_refused(folder: Path, fields: dict[str, object]) -> None:
    edit(folder, **fields)
    with pytest.raises(LoadError, match=re.escape(CONFIG)):
        AutoencoderKL.from_pretrained(folder)


def test_integer_weights_are_refused(folder: Path) -> None:
    rewrite(folder, encoder__conv_in__bias=torch.ones(8, dtype=torch.int32))
    with pytest.raises(LoadError):
        AutoencoderKL.from_pretrained(folder)


def test_the_vae_directory_is_preferred_to_the_directory_around_it(folder: Path) -> None:
    (folder.parent / CONFIG).write_text('{"_class_name": "Pipeline"}')
    assert AutoencoderKL.from_pretrained(folder.parent).config.latent_channels == 4


def test_a_subfolder_may_have_any_name(folder: Path) -> None:
    folder.rename(folder.with_name("first_stage"))
    assert AutoencoderKL.from_pretrained(folder.parent, "first_stage").config.latent_channels == 4
    with pytest.raises(LoadError, match="no VAE at"):
        AutoencoderKL.from_pretrained(folder.parent)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_stay_in_the_dtype_of_the_file_unless_one_is_given(folder: Path, dtype: torch.dtype) -> None:
    AutoencoderKL.from_pretrained(folder, torch_dtype=dtype).save_pretrained(folder)
    assert AutoencoderKL.from_pretrained(folder).dtype == dtype
    assert AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).dtype == torch.float32


def test_saving_writes_one_config_and_one_file_of_weights(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted([CONFIG, WEIGHTS])
    fields = json.loads((folder / CONFIG).read_text())
    assert fields.pop("_class_name") == "AutoencoderKL"
    assert set(fields) == set(AutoencoderKLConfig())


def test_saving_over_a_model_replaces_it(folder: Path) -> None:
    torch.manual_seed(2)
    other = AutoencoderKL(**{**MICRO, "latent_channels": 3})
    other.save_pretrained(folder)
    loaded = AutoencoderKL.from_pretrained(folder)
    assert loaded.config == other.config
    assert weights_sha256(loaded.state_dict()) == weights_sha256(other.state_dict())


def test_the_hash_covers_names_shapes_and_values_in_the_order_of_names() -> None:
    tensors = {"b": torch.tensor([[1.0, -2.0]]), "a": torch.tensor(0.5)}
    expected = b"a\0\0" + struct.pack("<f", 0.5) + b"b\x001,2\0" + struct.pack("<2f", 1, -2)
    assert weights_sha256(tensors) == hashlib.sha256(expected).hexdigest()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_hash_is_the_same_after_an_exact_conversion(folder: Path, dtype: torch.dtype) -> None:
    half = AutoencoderKL.from_pretrained(folder, torch_dtype=dtype)
    before = weights_sha256(half.state_dict())
    assert before != weights_sha256(AutoencoderKL.from_pretrained(folder).state_dict())
    assert before == weights_sha256(half.to(torch.float32).state_dict()) == weights_sha256(half.double().state_dict())


def test_the_hash_changes_with_a_name_and_with_a_single_value(folder: Path) -> None:
    weights = AutoencoderKL.from_pretrained(folder).state_dict()
    renamed = {name.replace("conv_in.bias", "conv_out.bias2"): value for name, value in weights.items()}
    flipped = weights["encoder.conv_in.weight"].clone()
    flipped[0, 0, 0, 0].neg_()
    changed = {**weights, "encoder.conv_in.weight": flipped}
    assert len({weights_sha256(tensors) for tensors in (weights, renamed, changed)}) == 3
