"""The interface of FlaxAutoencoderKL, the four promises of its page, and the golden files of diffusers 0.39.0."""

import dataclasses
import inspect
import json
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flax")
jax = pytest.importorskip("jax")

import flax  # noqa: E402
from flax import linen as nn  # noqa: E402
from flax import serialization  # noqa: E402
from jax import numpy as jnp  # noqa: E402

import vae  # noqa: E402
from vae import AutoencoderKLConfig, LoadError, flax_weights  # noqa: E402
from vae.errors import AmbiguousLayoutWarning  # noqa: E402
from vae.flax import (  # noqa: E402
    FlaxAutoencoderKL,
    FlaxAutoencoderKLOutput,
    FlaxDecoderOutput,
    FlaxDiagonalGaussianDistribution,
)

DATA = Path(__file__).parent / "data"
FIELDS = {  # in their order, which is that of positional arguments
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "dtype": jnp.float32,
}
SIGNATURES = {
    "init_weights": "(self, rng)",
    "encode": "(self, sample, deterministic=True, return_dict=True)",
    "decode": "(self, latents, deterministic=True, return_dict=True, *, channels_last=None)",
    "__call__": "(self, sample, sample_posterior=False, deterministic=True, return_dict=True)",
    "save_pretrained": "(self, path, params, is_main_process=True, push_to_hub=False)",
    "to_bf16": "(self, params, mask=None)",
    "to_fp16": "(self, params, mask=None)",
    "to_fp32": "(self, params, mask=None)",
}

Model = tuple[FlaxAutoencoderKL, Any]


@pytest.fixture(scope="module")
def golden() -> Model:
    return FlaxAutoencoderKL.from_pretrained(DATA / "golden")


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with np.load(DATA / "golden.npz") as arrays:
        return dict(arrays)


@partial(jax.jit, static_argnums=0, static_argnames=("method", "return_dict", "sample_posterior", "channels_last"))
def apply(model: FlaxAutoencoderKL, params: Any, x: Any, rngs: Any = None, **options: Any) -> Any:
    return model.apply({"params": params}, x, rngs=rngs, **options)


def run(golden: Model, x: Any, **options: Any) -> Any:
    """Return the result of a method of the model, compiled once per shape."""
    return apply(*golden, x, **options)


def trace(golden: Model, x: Any, **options: Any) -> Any:
    """Return the result of a method without computing it: shapes and dtypes instead of arrays."""
    model, params = golden
    return jax.eval_shape(lambda x: model.apply({"params": params}, x, **options), x)


def assert_close(ours: Any, theirs: np.ndarray) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-5)


def test_the_fields_are_the_documented_ones_in_their_order() -> None:
    fields = {field.name: field for field in dataclasses.fields(FlaxAutoencoderKL)}
    positional = [name for name, field in fields.items() if not field.kw_only]
    assert positional[: len(FIELDS)] == list(FIELDS)
    model = FlaxAutoencoderKL(*FIELDS.values())
    assert model == FlaxAutoencoderKL()
    assert {name: getattr(model, name) for name in FIELDS} == FIELDS
    ours = {name for name, field in fields.items() if field.kw_only} - {"parent", "name"}
    assert {*FIELDS, *ours} == {*AutoencoderKLConfig(), "dtype"}
    assert isinstance(model, nn.Module)
    assert all(model.config[name] == AutoencoderKLConfig()[name] for name in model.config)


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_methods_have_the_documented_parameters(name: str) -> None:
    signature = inspect.signature(getattr(FlaxAutoencoderKL, name))
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == SIGNATURES[name]


def test_the_golden_results_of_diffusers_are_reproduced(golden: Model, expected: dict[str, np.ndarray]) -> None:
    key = jax.random.PRNGKey(7)
    posterior = run(golden, expected["x"], method="encode").latent_dist
    for name in ("mean", "logvar"):
        assert_close(getattr(posterior, name), expected[name])
    sample = posterior.sample(key)
    other = FlaxDiagonalGaussianDistribution(jnp.full((2, 6, 8, 8), 0.5))
    for ours, name in (
        (posterior.mode(), "mean"),
        (posterior.std, "std"),
        (sample, "sample"),
        (posterior.kl(), "kl"),
        (posterior.kl(other), "kl_other"),
        (posterior.nll(expected["sample"]), "nll"),
    ):
        assert_close(ours, expected[name])
    assert_close(run(golden, expected["sample"], method="decode").sample, expected["decoded"])
    assert_close(run(golden, expected["mean"], method="decode").sample, expected["reconstruction"])
    sampled = run(golden, expected["x"], sample_posterior=True, rngs={"gaussian": key}).sample
    assert_close(sampled, expected["sampled_reconstruction"])


def test_the_golden_file_loads_bit_by_bit_and_is_written_again_byte_by_byte(golden: Model, tmp_path: Path) -> None:
    model, params = golden
    content = (DATA / "golden" / flax_weights.FILE).read_bytes()
    theirs = serialization.msgpack_restore(content)
    assert jax.tree.structure(params) == jax.tree.structure(theirs)
    assert len(jax.tree.leaves(params)) == 124
    for ours, value in zip(jax.tree.leaves(params), jax.tree.leaves(theirs), strict=True):
        assert ours.dtype == value.dtype
        np.testing.assert_array_equal(ours, value)
    model.save_pretrained(tmp_path / "copy", flax.core.freeze(params))
    assert (tmp_path / "copy" / flax_weights.FILE).read_bytes() == content
    fields = json.loads((tmp_path / "copy/config.json").read_text())
    assert fields.pop("_class_name") == "FlaxAutoencoderKL"
    assert fields == model.config.to_dict()
    assert model.config == FlaxAutoencoderKL.from_pretrained(tmp_path / "copy")[0].config


def test_random_weights_have_the_tree_of_the_model(golden: Model) -> None:
    model, params = golden
    random = model.init_weights(jax.random.key(0))
    assert isinstance(random, dict)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), random) == jax.tree.map(lambda x: (x.shape, x.dtype), params)
    kernel = random["decoder"]["mid_block"]["resnets_0"]["conv1"]["kernel"]
    assert float(kernel.std()) == pytest.approx((9 * 8) ** -0.5, rel=0.1)
    assert 1.9 < float(np.abs(kernel).max()) * (9 * 8) ** 0.5 * 0.8796 <= 2
    assert set(np.unique(random["encoder"]["conv_norm_out"]["scale"])) == {1.0}
    assert set(np.unique(random["quant_conv"]["bias"])) == {0.0}
    other = model.init_weights(jax.random.PRNGKey(1))
    assert not np.array_equal(other["quant_conv"]["kernel"], random["quant_conv"]["kernel"])
    pair = model.clone(sample_size=(16, 24), dtype=jnp.bfloat16).init_weights(jax.random.key(0))
    np.testing.assert_array_equal(pair["quant_conv"]["kernel"], random["quant_conv"]["kernel"])


def test_outputs_are_read_by_attribute_name_and_position_and_are_immutable() -> None:
    output = FlaxDecoderOutput(sample=jnp.ones(2))
    assert output.sample is output["sample"] is output[0] is output.to_tuple()[0]
    assert dict(**output).keys() == {"sample"}
    assert (list(output), len(output), output.keys()) == (["sample"], 1, ("sample",))
    with pytest.raises(KeyError):
        output["replace"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        output.sample = jnp.zeros(2)
    assert float(output.replace(sample=jnp.zeros(2)).sample.sum()) == 0
    assert float(jax.tree.map(lambda x: 2 * x, output).sample.sum()) == 4


def test_a_deterministic_posterior_has_zero_variance() -> None:
    posterior = FlaxDiagonalGaussianDistribution(jnp.ones((1, 1, 1, 2)), deterministic=True)
    np.testing.assert_array_equal(posterior.sample(jax.random.key(0)), posterior.mode())
    assert posterior.kl().tolist() == posterior.nll(jnp.zeros((1, 1, 1, 1))).tolist() == [0.0]
    assert float(posterior.std.sum()) == float(posterior.var.sum()) == 0


def test_jit_returns_the_posterior_whole_with_the_model_as_a_static_argument(golden: Model) -> None:
    """The first promise, and two defects of diffusers' class: its posterior is no pytree, its model no static value."""
    model, params = golden
    from_lists = FlaxAutoencoderKL.from_config(json.loads((DATA / "golden/config.json").read_text()))
    assert hash(from_lists) == hash(model)
    assert from_lists == model
    compilations = []

    def encode(model: FlaxAutoencoderKL, params: Any, x: Any) -> Any:
        compilations.append(model)
        return model.apply({"params": params}, x, method=FlaxAutoencoderKL.encode)

    compiled = jax.jit(encode, static_argnums=0)
    x = jnp.zeros((1, 3, 4, 4))
    output = compiled(model, params, x)
    assert isinstance(output, FlaxAutoencoderKLOutput)
    assert isinstance(output.latent_dist, FlaxDiagonalGaussianDistribution)
    assert output.latent_dist.mode().shape == (1, 2, 2, 4)
    compiled(from_lists, params, x)
    assert len(compilations) == 1


@pytest.mark.slow
def test_vmap_returns_the_posterior_whole(golden: Model, expected: dict[str, np.ndarray]) -> None:
    model, params = golden

    def encode(image: Any) -> Any:
        return model.apply({"params": params}, image[None], method=model.encode).latent_dist

    posterior = jax.jit(jax.vmap(encode))(expected["x"])
    assert posterior.mean.shape == (2, 1, 6, 8, 4)
    assert_close(posterior.mean[:, 0], expected["mean"])
    assert_close(posterior.kl()[:, 0], expected["kl"])


PMAP = """
import sys
import jax, numpy as np
from flax.jax_utils import replicate
from vae.flax import FlaxAutoencoderKL
assert jax.device_count() == 2
model, params = FlaxAutoencoderKL.from_pretrained(sys.argv[1] + "/golden")
with np.load(sys.argv[1] + "/golden.npz") as file:
    x, mean = file["x"], file["mean"]
encode = jax.pmap(lambda params, x: model.apply({"params": params}, x, method=model.encode).latent_dist)
posterior = encode(replicate(params), x[:, None])
assert posterior.mean.shape == (2, 1, 6, 8, 4)
assert {shard.device.id for shard in posterior.parameters.addressable_shards} == {0, 1}
np.testing.assert_allclose(posterior.mean[:, 0], mean, rtol=1e-5, atol=2e-5)
"""


@pytest.mark.slow
def test_pmap_returns_the_posterior_whole_from_two_devices() -> None:
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    command = [sys.executable, "-c", PMAP, str(DATA)]
    environment = {"PYTHONPATH": ":".join(sys.path), "XLA_FLAGS": flags, "NPROC": "1", "JAX_PLATFORMS": "cpu"}
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_without_return_dict_every_result_is_a_tuple(golden: Model) -> None:
    """diffusers' `__call__` failed with it."""
    x = jnp.zeros((1, 3, 4, 4))
    (posterior,) = trace(golden, x, method="encode", return_dict=False)
    assert posterior.parameters.shape == (1, 2, 2, 8)
    (pixels,) = trace(golden, jnp.zeros((1, 2, 2, 4)), method="decode", return_dict=False)
    (reconstruction,) = trace(golden, x, return_dict=False)
    assert pixels.shape == reconstruction.shape == x.shape


def test_latents_with_channels_first_are_decoded_too(golden: Model, expected: dict[str, np.ndarray]) -> None:
    channels_first = expected["sample"].transpose(0, 3, 1, 2)
    assert_close(run(golden, channels_first, method="decode").sample, expected["decoded"])


@pytest.mark.parametrize(
    ("shape", "channels_last", "is_ambiguous", "size"),
    [
        ((1, 8, 6, 4), None, False, (16, 12)),
        ((1, 4, 8, 6), None, False, (16, 12)),
        ((1, 4, 8, 4), None, True, (8, 16)),
        ((1, 4, 8, 4), True, False, (8, 16)),
        ((1, 4, 8, 4), False, False, (16, 8)),
        ((1, 8, 4, 4), None, False, (16, 8)),
        ((1, 4, 4, 8), None, False, (8, 16)),
    ],
)
def test_decode_tells_the_layout_of_latents_from_their_shape_or_warns(
    golden: Model, shape: tuple[int, ...], channels_last: bool | None, is_ambiguous: bool, size: tuple[int, int]
) -> None:
    """diffusers' `decode` took latents [1, 4, 8, 4] with channels first for those of a wide image, without a word."""
    latents = jnp.zeros(shape)
    with pytest.warns(AmbiguousLayoutWarning, match=r"4 channels first or") if is_ambiguous else nullcontext():
        decoded = trace(golden, latents, method="decode", channels_last=channels_last).sample
    assert decoded.shape == (1, 3, *size)


@pytest.mark.parametrize(
    ("shape", "channels_last", "message"),
    [
        ((1, 5, 8, 8), None, r"\[B, h, w, 4\] or \[B, 4, h, w\], not \[1, 5, 8, 8\]"),
        ((4, 8, 8), None, r"not \[4, 8, 8\]"),
        ((1, 4, 8, 8), True, r"the shape \[B, h, w, 4\], not \[1, 4, 8, 8\]"),
        ((1, 8, 8, 4), False, r"the shape \[B, 4, h, w\], not \[1, 8, 8, 4\]"),
    ],
)
def test_latents_of_another_shape_are_refused(
    golden: Model, shape: tuple[int, ...], channels_last: bool | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        trace(golden, jnp.zeros(shape), method="decode", channels_last=channels_last)


def test_pixels_of_another_shape_are_refused(golden: Model) -> None:
    for shape in ((1, 8, 8, 3), (3, 8, 8)):
        with pytest.raises(ValueError, match=r"sample must have the shape \[B, 3, H, W\]"):
            trace(golden, jnp.zeros(shape), method="encode")


def test_a_reconstruction_of_an_ambiguous_size_needs_no_warning(golden: Model) -> None:
    assert trace(golden, jnp.zeros((1, 3, 8, 16))).sample.shape == (1, 3, 8, 16)


@pytest.mark.parametrize(("method", "dtype"), [("to_bf16", jnp.bfloat16), ("to_fp16", jnp.float16)])
def test_parameters_are_cast_whole_or_by_a_mask(golden: Model, method: str, dtype: Any) -> None:
    model, _ = golden
    tree = {"b": np.ones(2, np.float32), "a": {"c": jnp.ones(3), "steps": np.arange(3)}}
    cast = getattr(model, method)(tree)
    assert (cast["b"].dtype, cast["a"]["c"].dtype, cast["a"]["steps"].dtype) == (dtype, dtype, np.int64)
    masked = getattr(model, method)(tree, {"b": False, "a": {"c": True, "steps": True}})
    assert (masked["b"].dtype, masked["a"]["c"].dtype, masked["a"]["steps"].dtype) == (np.float32, dtype, np.int64)
    assert model.to_fp32(masked)["a"]["c"].dtype == jnp.float32
    assert isinstance(tree["b"], np.ndarray)
    assert tree["b"].dtype == np.float32


def test_a_model_from_a_config_has_its_fields() -> None:
    config = {"_class_name": "FlaxAutoencoderKL", "latent_channels": 8, "block_out_channels": [32]}
    model = FlaxAutoencoderKL.from_config(config, dtype=jnp.bfloat16, layers_per_block=2)
    assert (model.latent_channels, model.layers_per_block, model.dtype) == (8, 2, jnp.bfloat16)
    assert (model.config.latent_channels, model.config["block_out_channels"]) == (8, (32,))
    with pytest.raises(ValueError, match="no parameter 'latent_chanels'; did you mean 'latent_channels'"):
        FlaxAutoencoderKL.from_config({"latent_chanels": 4})
    model, unused = FlaxAutoencoderKL.from_config({**config, "extra": 1}, return_unused_kwargs=True)
    assert (model.latent_channels, unused) == (8, {"extra": 1})
    with pytest.raises(ValueError, match="act_fn 'nope'"):
        FlaxAutoencoderKL(act_fn="nope")


def test_only_one_process_saves_and_uploads_are_refused(golden: Model, tmp_path: Path) -> None:
    model, params = golden
    model.save_pretrained(tmp_path / "none", params, is_main_process=False)
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="push_to_hub is not supported"):
        model.save_pretrained(tmp_path / "none", params, push_to_hub=True)


def test_parameters_of_another_model_are_not_saved(golden: Model, tmp_path: Path) -> None:
    model, params = golden
    with pytest.raises(LoadError, match=r"encoder/conv_in/kernel has the shape \[2, 3, 3, 3, 4\], not \[3, 3, 3, 4\]"):
        model.save_pretrained(tmp_path / "none", jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), params))
    with pytest.raises(LoadError, match=r"1 tensors are missing, 0 are extra \(quant_conv/bias is missing\)"):
        model.save_pretrained(tmp_path / "none", {**params, "quant_conv": {"kernel": params["quant_conv"]["kernel"]}})
    assert not (tmp_path / "none").exists()


def test_the_class_is_a_lazy_attribute_of_the_package() -> None:
    assert vae.FlaxAutoencoderKL is FlaxAutoencoderKL
    with pytest.raises(AttributeError, match="module 'vae' has no attribute 'Nothing'"):
        vae.Nothing  # noqa: B018
