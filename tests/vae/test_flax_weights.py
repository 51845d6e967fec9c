"""Weights in Flax's layout and files: conversion both ways, for the PyTorch class without JAX, and bad input."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
from safetensors.torch import save_file

from pipeline.weights import VAE_FILES, load_vae
from tests.checkpoints import ldm
from tests.conftest import MICRO
from vae import AutoencoderKL, LoadError, flax_weights
from vae.load import CONFIG, WEIGHTS, save, weights_sha256

GOLDEN = Path(__file__).parent / "data/golden"


@pytest.fixture(scope="module")
def model() -> AutoencoderKL:
    torch.manual_seed(3)
    return AutoencoderKL(**MICRO)


@pytest.fixture
def folder(model: AutoencoderKL, tmp_path: Path) -> Path:
    """Return a directory in the format of Flax."""
    save(tmp_path / "flax", model.config, model.state_dict(), "FlaxAutoencoderKL")
    return tmp_path / "flax"


def sha256(path: Path) -> str:
    return weights_sha256(AutoencoderKL.from_pretrained(path).state_dict())


def test_the_names_and_shapes_are_those_of_flax(model: AutoencoderKL) -> None:
    shapes = {name: list(tensor.shape) for name, tensor in flax_weights.to_flax(model.state_dict()).items()}
    assert len(shapes) == len(model.state_dict())
    for name, shape in {
        "encoder/conv_in/kernel": [3, 3, 3, 8],
        "encoder/down_blocks_0/resnets_0/norm1/scale": [8],
        "encoder/down_blocks_2/downsamplers_0/conv/kernel": [3, 3, 8, 8],
        "encoder/mid_block/attentions_0/group_norm/bias": [8],
        "decoder/mid_block/attentions_0/query/kernel": [8, 8],
        "decoder/mid_block/attentions_0/proj_attn/bias": [8],
        "decoder/up_blocks_3/resnets_1/conv2/bias": [8],
        "quant_conv/kernel": [1, 1, 8, 8],
        "decoder/conv_out/kernel": [3, 3, 8, 3],
    }.items():
        assert shapes[name] == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_conversion_and_its_reverse_change_no_bit(model: AutoencoderKL, dtype: torch.dtype, tmp_path: Path) -> None:
    weights = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    flax_weights.write(tmp_path / "file", flax_weights.to_flax(weights))
    read = flax_weights.to_torch(flax_weights.read(tmp_path / "file"), "file")
    assert read.keys() == weights.keys()
    for name, tensor in weights.items():
        assert read[name].dtype == dtype
        assert torch.equal(read[name], tensor)
        assert read[name].is_contiguous()


def test_one_value_of_every_kind_is_where_flax_expects_it() -> None:
    weights = {
        "a.conv.weight": torch.arange(24.0).reshape(2, 3, 2, 2),
        "a.to_q.weight": torch.arange(6.0).reshape(2, 3),
    }
    converted = flax_weights.to_flax(weights)
    assert converted["a/conv/kernel"][1, 0, 2, 1] == weights["a.conv.weight"][1, 2, 1, 0]
    assert converted["a/query/kernel"][2, 1] == weights["a.to_q.weight"][1, 2]


def test_older_names_are_converted_too(model: AutoencoderKL) -> None:
    """latent-diffusion's names, whose attention has 1x1 convolutions."""
    expected = flax_weights.to_flax(model.state_dict())
    converted = flax_weights.to_flax(ldm(model.state_dict()))
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name], expected[name]) for name in expected)


def test_a_directory_of_flax_loads_as_the_same_model(model: AutoencoderKL, folder: Path, tmp_path: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted([CONFIG, flax_weights.FILE])
    loaded = AutoencoderKL.from_pretrained(folder)
    assert loaded.config == model.config
    assert sha256(folder) == weights_sha256(model.state_dict())
    model.save_pretrained(tmp_path / "torch")
    of_flax, of_torch = load_vae(str(folder)), load_vae(str(tmp_path / "torch"))
    assert (of_flax.sha256, of_flax.config) == (of_torch.sha256, of_torch.config)
    assert VAE_FILES.fullmatch(f"vae/{flax_weights.FILE}")
    assert load_vae((tmp_path / "flax").as_uri()).sha256 == of_torch.sha256  # copies the files that VAE_FILES names


def test_the_class_in_the_config_decides_which_of_two_files_is_read(model: AutoencoderKL, folder: Path) -> None:
    """A model that was saved over another one leaves the other's file."""
    other = AutoencoderKL(**MICRO)
    other.save_pretrained(folder)
    assert sha256(folder) == weights_sha256(other.state_dict())
    save(folder, model.config, model.state_dict(), "FlaxAutoencoderKL")
    assert (folder / WEIGHTS).exists()
    assert sha256(folder) == weights_sha256(model.state_dict())


def test_either_file_is_read_if_there_is_only_one(model: AutoencoderKL, folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "_class_name": "AutoencoderKL"}))
    assert sha256(folder) == weights_sha256(model.state_dict())
    (folder / flax_weights.FILE).unlink()
    save_file(model.state_dict(), folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config))
    assert sha256(folder) == weights_sha256(model.state_dict())


WITHOUT_JAX = """
import sys
import vae
import pipeline.weights
assert not {"jax", "jaxlib", "flax", "ml_dtypes"} & set(sys.modules), "import vae imports JAX"
for name in ("jax", "flax"):
    sys.modules[name] = None  # as if it were not installed
print(vae.AutoencoderKL.from_pretrained(sys.argv[1]).config.block_out_channels)
for command in ("vae.FlaxAutoencoderKL", "from vae import FlaxAutoencoderKL", "import vae.flax"):
    try:
        exec(command)
    except ImportError as error:
        print(error)
"""


@pytest.mark.slow
def test_without_jax_the_package_works_and_the_error_names_the_extra() -> None:
    command = [sys.executable, "-c", WITHOUT_JAX, str(GOLDEN)]
    environment = {"PYTHONPATH": ":".join(sys.path)}
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    message = "FlaxAutoencoderKL needs JAX and Flax: run `pip install 'latentmill[jax]'`"
    assert process.stdout.splitlines() == ["(4, 8)", message, message, message]


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the tensors of a msgpack file, by path."""
    weights = flax_weights.read(folder / flax_weights.FILE)
    edit(weights)
    flax_weights.write(folder / flax_weights.FILE, weights)


def replace(folder: Path, content: bytes) -> None:
    (folder / flax_weights.FILE).write_bytes(content)


def array(*content: object) -> bytes:
    return msgpack.packb({"a": {"kernel": msgpack.ExtType(1, msgpack.packb(content))}})  # type: ignore[no-any-return]


UNREADABLE = (
    "{folder}/diffusion_flax_model.msgpack cannot be read as Flax's msgpack; it may be truncated, download it again"
)
MISMATCH = "the weights at {folder} do not match the configuration: "
NOT_FLAX = "the weights at {folder}/diffusion_flax_model.msgpack are not those of a Flax model: "
NO_ARRAY = "{folder}/diffusion_flax_model.msgpack is not a file of Flax weights: "
REFUSALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no file": (
        lambda folder: (folder / flax_weights.FILE).unlink(),
        "there are no weights at {folder}: no diffusion_flax_model.msgpack",
    ),
    "truncated": (
        lambda folder: replace(folder, (folder / flax_weights.FILE).read_bytes()[:-7]),
        UNREADABLE,
    ),
    "empty": (lambda folder: replace(folder, b""), UNREADABLE),
    "more after the end": (
        lambda folder: replace(folder, (folder / flax_weights.FILE).read_bytes() + b"\0"),
        UNREADABLE,
    ),
    "another format": (lambda folder: replace(folder, b"\x89PNG\r\n"), UNREADABLE),
    "fewer values than the shape": (lambda folder: replace(folder, array([3], "float32", b"\0" * 8)), UNREADABLE),
    "no shape": (lambda folder: replace(folder, array("float32", b"\0" * 8)), UNREADABLE),
    "an unknown dtype": (lambda folder: replace(folder, array([2], "float8", b"\0" * 2)), UNREADABLE),
    "a shape of text": (lambda folder: replace(folder, array("ab", "float32", b"\0" * 8)), UNREADABLE),
    "another extension": (
        lambda folder: replace(folder, msgpack.packb({"a": msgpack.ExtType(2, b"\0")})),
        UNREADABLE,
    ),
    "nested too deeply": (lambda folder: replace(folder, b"\x81\xa1a" * 5000 + b"\xc0"), UNREADABLE),
    "nested deeply": (
        lambda folder: replace(folder, b"\x81\xa1a" * 900 + b"\xc0"),
        NO_ARRAY + "/".join("a" * 900) + " is no array",
    ),
    "no map": (lambda folder: replace(folder, msgpack.packb([1, 2])), NO_ARRAY + "its content is no array"),
    "a number": (
        lambda folder: replace(folder, msgpack.packb({"a": {"kernel": 1.5}})),
        NO_ARRAY + "a/kernel is no array",
    ),
    "an array in chunks": (
        lambda folder: replace(folder, msgpack.packb({"a": {"kernel": {"__msgpack_chunked_array__": True}}})),
        NO_ARRAY + "a/kernel/__msgpack_chunked_array__ is no array",
    ),
    "a missing tensor": (
        lambda folder: change(folder, lambda weights: weights.pop("encoder/conv_in/bias")),
        MISMATCH + "1 tensors are missing, 0 are extra (encoder.conv_in.bias is missing)",
    ),
    "an extra tensor": (
        lambda folder: change(folder, lambda weights: weights.update({"unet/bias": torch.ones(1)})),
        MISMATCH + "0 tensors are missing, 1 are extra (unet.bias is not in the configuration)",
    ),
    "another kind of name": (
        lambda folder: change(folder, lambda weights: weights.update({"encoder/conv_in/weight": torch.ones(1)})),
        NOT_FLAX + "no layer of one has a tensor encoder/conv_in/weight of 1 dimensions",
    ),
    "a name of PyTorch": (
        lambda folder: change(folder, lambda weights: weights.update({"encoder/a/to_q/kernel": torch.ones(8, 8)})),
        NOT_FLAX + "no layer of one has a tensor encoder/a/to_q/kernel of 2 dimensions",
    ),
    "a path in one key": (
        lambda folder: change(folder, lambda weights: weights.update({"encoder.conv_in.bias": torch.ones(8)})),
        NOT_FLAX + "no layer of one has a tensor encoder.conv_in.bias of 1 dimensions",
    ),
    "a name without a layer": (
        lambda folder: change(folder, lambda weights: weights.update({"kernel": torch.ones(8, 8)})),
        NOT_FLAX + "no layer of one has a tensor kernel of 2 dimensions",
    ),
    "a name that occurs twice": (
        lambda folder: change(folder, lambda weights: weights.update({"encoder/conv_in/scale": torch.ones(1)})),
        NOT_FLAX + "encoder.conv_in.weight occurs twice",
    ),
    "a wrong shape": (
        lambda folder: change(folder, lambda weights: weights.update({"quant_conv/kernel": torch.ones(1, 1, 8, 4)})),
        MISMATCH + "quant_conv.weight has the shape [4, 8, 1, 1], not [8, 8, 1, 1]",
    ),
    "a kernel in PyTorch's layout": (
        lambda folder: change(
            folder, lambda weights: weights.update({"encoder/conv_in/kernel": torch.ones(8, 3, 3, 3)})
        ),
        MISMATCH + "encoder.conv_in.weight has the shape [3, 3, 8, 3], not [8, 3, 3, 3]",
    ),
    "integers": (
        lambda folder: change(folder, lambda weights: weights.update({"quant_conv/bias": torch.ones(8).int()})),
        "the weights at {folder} are not those of a model: quant_conv.bias has integers",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_an_error_has_exactly_this_text(folder: Path, case: str) -> None:
    damage, message = REFUSALS[case]
    damage(folder)
    with pytest.raises(LoadError) as refused:
        AutoencoderKL.from_pretrained(folder)
    assert str(refused.value) == message.format(folder=folder)
