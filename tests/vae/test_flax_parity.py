"""The Flax class computes the same numbers as the PyTorch class, in float32."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.conftest import slow_param
from vae import AutoencoderKL, DiagonalGaussianDistribution, blocks
from vae.presets import PRESETS

pytest.importorskip("flax")
jax = pytest.importorskip("jax")

from jax import numpy as jnp  # noqa: E402

from vae import flax_blocks  # noqa: E402
from vae.flax import FlaxAutoencoderKL, FlaxDiagonalGaussianDistribution, encode_pixels  # noqa: E402

FOUR_LEVELS = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 4,
    "block_out_channels": (8, 8, 16, 16),
    "layers_per_block": 2,
}
TWO_LEVELS: dict[str, Any] = {
    **{name: value[:2] for name, value in FOUR_LEVELS.items() if isinstance(value, tuple)},
    "layers_per_block": 1,
}
WITHOUT_QUANT = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
# Small models with the architectures of the public models.
SHAPES: dict[str, dict[str, Any]] = {
    "sd": {},
    "sdxl": {"scaling_factor": 0.13025, "sample_size": 1024},
    "sd3": {**WITHOUT_QUANT, "scaling_factor": 1.5305, "shift_factor": 0.0609},
    "flux": {**WITHOUT_QUANT, "scaling_factor": 0.3611, "shift_factor": 0.1159, "block_out_channels": (8, 16, 16, 16)},
    "cogview": {**WITHOUT_QUANT, "layers_per_block": 3, "mid_block_add_attention": False},
    "gelu": {"act_fn": "gelu"},
    "odd": {"in_channels": 1, "out_channels": 2, "latent_channels": 3},
}


def make_pair(**fields: Any) -> tuple[AutoencoderKL, FlaxAutoencoderKL, Any]:
    """Return a PyTorch model, the same model in Flax, and its parameters. All weights are random, norms included."""
    torch.manual_seed(0)
    model = AutoencoderKL(**{**FOUR_LEVELS, **fields}).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape) * 0.05)
    flax_model = FlaxAutoencoderKL(**model.config)
    return model, flax_model, flax_model.convert_state_dict(model.state_dict())


def random_images(channels: int = 3, height: int = 40, width: int = 24) -> np.ndarray:
    return np.random.default_rng(1).uniform(-1, 1, (2, channels, height, width)).astype(np.float32)


def nchw(array: Any) -> np.ndarray:
    return np.asarray(array).transpose(0, 3, 1, 2)


def difference(ours: Any, theirs: torch.Tensor) -> float:
    assert np.shape(ours) == theirs.shape
    return float(np.abs(np.asarray(ours) - theirs.numpy()).max())


def encode_and_decode(model: FlaxAutoencoderKL, params: Any, x: Any, z: Any) -> tuple[Any, Any]:
    variables = {"params": params}
    posterior = model.apply(variables, x, method=model.encode).latent_dist
    return posterior, model.apply(variables, z, method=model.decode, channels_last=True).sample


@pytest.mark.parametrize("shape", ["sd", *map(slow_param, ("flux", "sdxl", "sd3", "cogview", "gelu", "odd"))])
def test_small_models_agree(shape: str) -> None:
    model, flax_model, params = make_pair(**SHAPES[shape])
    check_agreement(model, flax_model, params)


@pytest.mark.slow
def test_the_demo_model_agrees() -> None:
    check_agreement(AutoencoderKL.from_pretrained("demo"), *FlaxAutoencoderKL.from_pretrained("demo"))


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["sd", "flux"])
def test_a_model_of_full_size_agrees_with_all_optimizations_of_the_compiler(preset: str) -> None:
    check_agreement(*make_pair(**PRESETS[preset].config), compiler_options={"xla_backend_optimization_level": 3})


def check_agreement(
    model: AutoencoderKL, flax_model: FlaxAutoencoderKL, params: Any, compiler_options: dict[str, Any] | None = None
) -> None:
    """Compare moments, posterior and decoded pixels of two images whose sides are no multiple of 16."""
    x = random_images(model.config.in_channels)
    expected = model.encode(torch.from_numpy(x)).latent_dist
    z = expected.sample(torch.Generator().manual_seed(0))
    pixels = model.decode(z).sample
    posterior, decoded = jax.jit(encode_and_decode, static_argnums=0, compiler_options=compiler_options)(
        flax_model, params, x, z.permute(0, 2, 3, 1).numpy()
    )
    for name in ("parameters", "mean", "logvar"):
        assert difference(nchw(getattr(posterior, name)), getattr(expected, name)) < 1e-4
    assert difference(decoded, pixels) < 1e-4
    assert decoded.dtype == posterior.mean.dtype == jnp.float32
    nll = posterior.nll(z.permute(0, 2, 3, 1).numpy())
    torch.testing.assert_close(torch.from_numpy(np.array(nll)), expected.nll(z), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(torch.from_numpy(np.array(posterior.kl())), expected.kl(), rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_gradients_agree() -> None:
    """`grad` is the second of the page's promises. The loss has a random sample, so that it uses every parameter."""
    one_level = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    model, flax_model, params = make_pair(**{**one_level, "block_out_channels": (8,), "layers_per_block": 1})
    x, key = random_images(height=6, width=5), jax.random.key(0)

    def loss(params: Any) -> Any:
        posterior = flax_model.apply({"params": params}, x, method="encode").latent_dist
        decoded = flax_model.apply({"params": params}, posterior.sample(key), method="decode", channels_last=True)
        return (decoded.sample**2).mean() + posterior.kl().mean()

    gradient = flax_model.convert_params(jax.jit(jax.grad(loss))(params))
    model.requires_grad_(True)
    posterior = model.encode(torch.from_numpy(x)).latent_dist
    noise = torch.from_numpy(nchw(jax.random.normal(key, (2, 6, 5, 4))).copy())
    decoded = model.decode(posterior.mean + posterior.std * noise).sample
    (decoded.pow(2).mean() + posterior.kl().mean()).backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(gradient[name], parameter.grad, rtol=1e-3, atol=1e-3, msg=name)
        assert name.endswith("to_k.bias") or gradient[name].abs().max() > 1e-4, name  # softmax ignores that bias


def test_the_moments_of_bytes_are_those_of_the_pipeline() -> None:
    """This is the function of a backend: uint8 in, float32 moments in PyTorch's layout out."""
    model, flax_model, params = make_pair(**TWO_LEVELS)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), dtype=np.uint8)
    values = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    moments = jax.jit(encode_pixels, static_argnums=0)(flax_model, params, pixels)
    assert moments.dtype == jnp.float32
    assert difference(moments, model.moments(values)) < 1e-4
    half = jax.eval_shape(lambda: encode_pixels(flax_model.clone(dtype=jnp.bfloat16), params, pixels))
    assert (half.dtype, half.shape) == (jnp.float32, moments.shape)


@pytest.mark.parametrize("name", blocks.ACTIVATIONS)
def test_every_activation_is_that_of_the_pytorch_class(name: str) -> None:
    assert flax_blocks.ACTIVATIONS.keys() == blocks.ACTIVATIONS.keys()
    x = np.linspace(-8, 8, 101, dtype=np.float32)
    assert difference(flax_blocks.ACTIVATIONS[name](x), blocks.ACTIVATIONS[name](torch.from_numpy(x))) < 5e-6


def test_act_fn_is_used_in_the_blocks_and_not_after_the_last_norm() -> None:
    """The class of diffusers always used SiLU."""
    x = np.random.default_rng(0).normal(size=(1, 4, 4, 8)).astype(np.float32)
    silu, relu = (flax_blocks.ResnetBlock(8, 2, act_fn, jnp.float32) for act_fn in ("silu", "relu"))
    params = jax.jit(silu.init)(jax.random.key(0), x)
    outputs = {block.act_fn: jax.jit(block.apply)(params, x) for block in (silu, relu)}
    assert not np.allclose(outputs["silu"], outputs["relu"], atol=1e-2)
    theirs = blocks.ResnetBlock(8, 8, 2, "relu")
    for layer, values in params["params"].items():
        module = getattr(theirs, layer)
        weight = values["scale"] if "scale" in values else values["kernel"].transpose(3, 2, 0, 1)
        module.weight.data = torch.from_numpy(np.array(weight))
        module.bias.data = torch.from_numpy(np.array(values["bias"]))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x).permute(0, 3, 1, 2))
    assert difference(nchw(outputs["relu"]), expected) < 1e-5


def test_group_norm_is_stable_if_the_mean_is_large() -> None:
    """The variance as E[x^2] - E[x]^2, Flax's default, is off by 35 here."""
    x = (100 + 0.01 * np.random.default_rng(0).normal(size=(1, 16, 16, 32))).astype(np.float32)
    exact = F.group_norm(torch.from_numpy(x).double().permute(0, 3, 1, 2), 8, eps=1e-6)
    norm = flax_blocks.make_group_norm(8, jnp.float32)
    result = norm.apply({"params": {"scale": np.ones(32, np.float32), "bias": np.zeros(32, np.float32)}}, x)
    assert difference(nchw(result), exact) < 0.02


@pytest.mark.slow
def test_a_model_with_large_means_agrees() -> None:
    """The activations of every level are shifted by 30 before they are normalized."""
    model, flax_model, _ = make_pair(**TWO_LEVELS)
    for name, parameter in model.named_parameters():
        if name.endswith(("conv_in.bias", "conv1.bias", "conv2.bias")):
            parameter.add_(30)
    check_agreement(model, flax_model, flax_model.convert_state_dict(model.state_dict()))


@pytest.mark.parametrize(("height", "width"), [(6, 7), (8, 5), (1, 17)])
def test_attention_in_blocks_of_queries_agrees(height: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flax_blocks, "WHOLE_ATTENTION", 15)
    monkeypatch.setattr(flax_blocks, "QUERY_BLOCK", 10)
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, height * width, 8)).astype(np.float32) * 2 for _ in range(3))
    heads = [torch.from_numpy(values)[:, None] for values in (q, k, v)]
    expected = F.scaled_dot_product_attention(heads[0], heads[1], heads[2])[:, 0]
    assert difference(flax_blocks.attend(q, k, v), expected) < 1e-5
    program = str(jax.make_jaxpr(jax.grad(lambda q: flax_blocks.attend(q, k, v).sum()))(q))
    count = -(-height * width // 10)
    assert f"[2,10,{height * width}]" in program  # the weights of one block, and not those of all of them
    assert f"[2,{height * width},{height * width}]" not in program
    assert f"[{count},2,10,{height * width}]" not in program


def test_attention_holds_no_matrix_of_a_large_image() -> None:
    shape = jax.ShapeDtypeStruct((1, 4097, 8), jnp.float32)
    assert "4097,4097" not in str(jax.make_jaxpr(flax_blocks.attend)(shape, shape, shape))
    small = jax.ShapeDtypeStruct((1, 4096, 8), jnp.float32)
    assert "4096,4096" in str(jax.make_jaxpr(flax_blocks.attend)(small, small, small))


def find_precisions(jaxpr: Any) -> set[Any]:
    """Return the precisions of all convolutions and matrix products in a jaxpr."""
    found = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            found |= set(equation.params["precision"] or (None,))
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                found |= find_precisions(inner) if hasattr(inner, "eqns") else set()
    return found


@pytest.mark.parametrize(("dtype", "expected"), [(jnp.float32, {jax.lax.Precision.HIGHEST}), (jnp.bfloat16, {None})])
def test_float32_is_computed_in_full_precision_on_every_device(
    dtype: Any, expected: set[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """TPUs and GPUs otherwise round the factors to bfloat16 or TF32. A CPU cannot show this, but the program does."""
    monkeypatch.setattr(flax_blocks, "WHOLE_ATTENTION", 8)
    model = FlaxAutoencoderKL(**FOUR_LEVELS, dtype=dtype)
    x = jnp.zeros((1, 3, 32, 32))
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    assert find_precisions(jax.make_jaxpr(model.apply)(params, x).jaxpr) == expected


@pytest.mark.parametrize("dtype", [jnp.bfloat16, slow_param(jnp.float16)])
def test_half_precision_has_its_dtype_everywhere(dtype: Any) -> None:
    _, flax_model, params = make_pair(**TWO_LEVELS)
    half = flax_model.clone(dtype=dtype)

    def run(params: Any) -> Any:
        latent_dist = half.apply({"params": params}, jnp.zeros((1, 3, 8, 8)), method=half.encode).latent_dist
        return latent_dist, half.apply({"params": params}, latent_dist.mode(), method=half.decode, channels_last=True)

    for converted in (params, half.to_bf16(params)):
        posterior, decoded = jax.eval_shape(run, converted)
        assert posterior.parameters.dtype == decoded.sample.dtype == dtype
    assert (
        FlaxDiagonalGaussianDistribution(jnp.zeros((1, 1, 1, 2), dtype)).sample(jax.random.key(0)).dtype == jnp.float32
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_close(dtype: Any) -> None:
    model, flax_model, params = make_pair(**TWO_LEVELS)
    half = flax_model.clone(dtype=dtype)
    x = random_images(height=8, width=8)
    mean = jax.jit(lambda params: half.apply({"params": params}, x, method=half.encode).latent_dist.mean)(params)
    exact = model.encode(torch.from_numpy(x)).latent_dist.mean
    assert difference(nchw(mean.astype(jnp.float32)), exact) < 0.1 * float(exact.abs().max())


def test_the_posterior_agrees_with_the_one_of_pytorch() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = [], []
    for _ in range(2):
        moments = (rng.normal(size=(2, 4, 5, 6)) * np.array([1, 1, 1, 30, 30, 1])).astype(np.float32)
        ours.append(FlaxDiagonalGaussianDistribution(moments))
        theirs.append(torch_posterior(moments))
    z = rng.normal(size=(2, 4, 5, 3)).astype(np.float32)
    for name in ("mean", "logvar", "std", "var"):
        np.testing.assert_allclose(
            nchw(getattr(ours[0], name)), getattr(theirs[0], name).numpy(), rtol=1e-5, atol=1e-30
        )
    tensor = torch.from_numpy(z).permute(0, 3, 1, 2)
    np.testing.assert_allclose(ours[0].kl(), theirs[0].kl().numpy(), rtol=1e-4)
    np.testing.assert_allclose(ours[0].kl(ours[1]), theirs[0].kl(theirs[1]).numpy(), rtol=1e-4)
    np.testing.assert_allclose(ours[0].nll(z), theirs[0].nll(tensor).numpy(), rtol=1e-4)
    np.testing.assert_allclose(ours[0].nll(z, axis=[1, 2]), theirs[0].nll(tensor, (2, 3)).numpy(), rtol=1e-4)


def torch_posterior(moments: np.ndarray) -> Any:
    return DiagonalGaussianDistribution(torch.from_numpy(moments).permute(0, 3, 1, 2))
