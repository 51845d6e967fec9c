"""Parity with the AutoencoderKL of diffusers: the same weights give the same results, in float32."""

import copy
import inspect
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import ldm
from tests.conftest import slow_param
from vae import AutoencoderKL, AutoencoderKLConfig, DiagonalGaussianDistribution, LoadWarning
from vae.auto import class_of
from vae.load import WEIGHTS, weights_sha256
from vae.presets import PRESETS

diffusers = pytest.importorskip("diffusers")

FOUR_LEVELS = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 8,
}
# Small models with the architectures of the public models.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "sd": {"block_out_channels": (8, 16, 32, 32), "layers_per_block": 2, "latent_channels": 4},
    "sdxl": {
        "block_out_channels": (8, 16, 32, 32),
        "layers_per_block": 2,
        "latent_channels": 4,
        "scaling_factor": 0.13025,
        "sample_size": 1024,
        "force_upcast": True,
    },
    "sd3": {
        "block_out_channels": (8, 16, 32, 32),
        "layers_per_block": 2,
        "latent_channels": 16,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "flux": {
        "block_out_channels": (16, 16, 24, 24),
        "layers_per_block": 2,
        "latent_channels": 16,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "cogview": {
        "block_out_channels": (8, 32, 32, 32),
        "layers_per_block": 3,
        "latent_channels": 16,
        "mid_block_add_attention": False,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def pair(request: pytest.FixtureRequest) -> tuple[AutoencoderKL, Any]:
    """Return our model and that of diffusers, with the same random weights."""
    fields = {**FOUR_LEVELS, **ARCHITECTURES[request.param]}
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(**fields).eval()
    ours = AutoencoderKL(**fields).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def random_images(height: int, width: int) -> torch.Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(("height", "width"), [(64, 64), (128, 96), (72, 136), (70, 93)])
@torch.inference_mode()
def test_encode_decode_and_forward_are_equal(pair: tuple[AutoencoderKL, Any], height: int, width: int) -> None:
    ours, theirs = pair
    x = random_images(height, width)
    posterior, expected = ours.encode(x).latent_dist, theirs.encode(x).latent_dist
    torch.testing.assert_close(posterior.parameters, expected.parameters, atol=1e-4, rtol=0)
    z = expected.mode()
    torch.testing.assert_close(ours.decode(z).sample, theirs.decode(z).sample, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours(x).sample, theirs(x).sample, atol=1e-4, rtol=0)


@pytest.mark.parametrize("pair", [*map(slow_param, ARCHITECTURES)], indirect=True)
@torch.inference_mode()
def test_results_at_512_pixels_agree_with_the_reference_in_float64(pair: tuple[AutoencoderKL, Any]) -> None:
    """The round trip of the reference in float32 differs from float64 by up to 2e-4, ours by 4e-5."""
    ours, theirs = pair
    exact = copy.deepcopy(theirs).double()
    x = random_images(512, 320)[:1]
    z = exact.encode(x.double()).latent_dist.mode()
    for value, expected_value in [
        (ours.encode(x).latent_dist.mode(), z),
        (ours.decode(z.float()).sample, exact.decode(z).sample),
        (ours(x).sample, exact(x.double()).sample),
    ]:
        torch.testing.assert_close(value.double(), expected_value, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_the_posterior_is_equal(pair: tuple[AutoencoderKL, Any]) -> None:
    ours, theirs = pair
    x = random_images(64, 64)
    posterior, expected = ours.encode(x).latent_dist, theirs.encode(x).latent_dist
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    torch.testing.assert_close(posterior.sample(generators[0]), expected.sample(generators[1]), atol=1e-4, rtol=0)
    other, other_expected = ours.encode(-x).latent_dist, theirs.encode(-x).latent_dist
    for value, expected_value in [
        (posterior.std, expected.std),
        (posterior.var, expected.var),
        (posterior.logvar, expected.logvar),
        (posterior.kl(), expected.kl()),
        (posterior.kl(other), expected.kl(other_expected)),
        (posterior.nll(x[:, :1, :8, :8]), expected.nll(x[:, :1, :8, :8])),
    ]:
        torch.testing.assert_close(value, expected_value, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_slicing_gives_the_same_results_as_in_the_reference(pair: tuple[AutoencoderKL, Any]) -> None:
    ours, theirs = pair
    x = random_images(64, 64)
    ours.enable_slicing()
    theirs.enable_slicing()
    torch.testing.assert_close(
        ours.encode(x, return_dict=False)[0].mean, theirs.encode(x, return_dict=False)[0].mean, atol=1e-4, rtol=0
    )
    z = theirs.encode(x).latent_dist.mode()
    torch.testing.assert_close(
        ours.decode(z, return_dict=False)[0], theirs.decode(z, return_dict=False)[0], atol=1e-4, rtol=0
    )
    ours.disable_slicing()
    theirs.disable_slicing()


def test_each_implementation_loads_what_the_other_saved(pair: tuple[AutoencoderKL, Any], tmp_path: Path) -> None:
    ours, theirs = pair
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    loaded = AutoencoderKL.from_pretrained(tmp_path / "theirs")
    returned = diffusers.AutoencoderKL.from_pretrained(tmp_path / "ours", local_files_only=True)
    assert loaded.config == ours.config
    loaded_weights, returned_weights = loaded.state_dict(), returned.state_dict()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(loaded_weights[name], tensor)
        assert torch.equal(returned_weights[name], tensor)
    assert returned.config.scaling_factor == ours.config.scaling_factor


SMALL = {**FOUR_LEVELS, "block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "latent_channels": 4}


def make_pair(**fields: Any) -> tuple[AutoencoderKL, Any]:
    """Return our model and that of diffusers, small and with the same random weights. fields: override SMALL."""
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(**{**SMALL, **fields}).eval()
    ours = AutoencoderKL(**{**SMALL, **fields}).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def test_parameters_and_their_defaults_are_those_of_the_reference() -> None:
    signature = inspect.signature(diffusers.AutoencoderKL.__init__).parameters
    assert {**AutoencoderKLConfig()} == {name: value.default for name, value in signature.items() if name != "self"}


@pytest.mark.parametrize("method", ["encode", "decode", "forward"])
def test_arguments_have_the_names_order_and_defaults_of_the_reference(method: str) -> None:
    ours, theirs = (
        [(name, value.default) for name, value in inspect.signature(getattr(model_class, method)).parameters.items()]
        for model_class in (AutoencoderKL, diffusers.AutoencoderKL)
    )
    assert ours == theirs


@pytest.mark.parametrize(
    "fields",
    [
        *({"act_fn": name} for name in ("swish", "mish", "gelu", "relu")),
        {"down_block_types": FOUR_LEVELS["down_block_types"][:1], "up_block_types": FOUR_LEVELS["up_block_types"][:1]}
        | {"block_out_channels": (16,)},
        {"in_channels": 4, "out_channels": 1},
        {"use_quant_conv": False},
        {"use_post_quant_conv": False},
        {"norm_num_groups": 1},
        {"mid_block_add_attention": False},
    ],
    ids=lambda fields: ",".join(f"{name}={value}" for name, value in list(fields.items())[-2:]),
)
@torch.inference_mode()
def test_every_field_has_the_same_effect_as_in_the_reference(fields: dict[str, Any]) -> None:
    ours, theirs = make_pair(**fields)
    x = torch.rand(1, ours.config.in_channels, 64, 40, generator=torch.Generator().manual_seed(1)) * 2 - 1
    posterior, expected = ours.encode(x).latent_dist, theirs.encode(x).latent_dist
    torch.testing.assert_close(posterior.parameters, expected.parameters, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        ours.decode(posterior.mode()).sample, theirs.decode(posterior.mode()).sample, atol=1e-4, rtol=0
    )


@torch.inference_mode()
def test_forward_from_a_random_sample_is_equal() -> None:
    ours, theirs = make_pair()
    x = random_images(64, 80)
    sampled, expected = (
        model(x, sample_posterior=True, return_dict=False, generator=torch.Generator().manual_seed(2))[0]
        for model in (ours, theirs)
    )
    torch.testing.assert_close(sampled, expected, atol=1e-4, rtol=0)
    assert (sampled - ours(x).sample).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_same_moments_give_the_same_posterior_bit_for_bit(dtype: torch.dtype, deterministic: bool) -> None:
    moments, others = (
        (torch.randn(2, 8, 3, 5, generator=torch.Generator().manual_seed(seed)) * 20).to(dtype) for seed in (0, 1)
    )
    ours, ours_other = (DiagonalGaussianDistribution(parameters, deterministic) for parameters in (moments, others))
    theirs, theirs_other = (
        diffusers.models.autoencoders.vae.DiagonalGaussianDistribution(parameters, deterministic)
        for parameters in (moments, others)
    )
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    sample = others[:, :4]
    for value, expected_value in [
        *((getattr(ours, field), getattr(theirs, field)) for field in ("parameters", "mean", "logvar", "std", "var")),
        (ours.sample(generators[0]), theirs.sample(generators[1])),
        (ours.mode(), theirs.mode()),
        (ours.kl(), theirs.kl()),
        (ours.kl(ours_other), theirs.kl(theirs_other)),
        (ours.nll(sample), theirs.nll(sample)),
        (ours.nll(sample, dims=(1, 2)), theirs.nll(sample, dims=(1, 2))),
    ]:
        torch.testing.assert_close(value, expected_value, atol=0, rtol=0, equal_nan=True)  # float16 overflows in both


def test_a_directory_that_diffusers_saved_in_several_files_loads(tmp_path: Path) -> None:
    ours, theirs = make_pair()
    theirs.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = AutoencoderKL.from_pretrained(tmp_path)
    assert weights_sha256(loaded.state_dict()) == weights_sha256(ours.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize(
    "form",
    [
        {"safe_serialization": False},
        {"variant": "bf16"},
        {"variant": "fp16", "max_shard_size": "50KB"},
        {"variant": "non_ema", "safe_serialization": False},
        {"safe_serialization": False, "max_shard_size": "50KB"},
    ],
)
def test_a_directory_that_diffusers_saved_in_another_form_loads(form: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = make_pair()
    theirs.save_pretrained(tmp_path, **form)
    with pytest.warns(LoadWarning, match="variant") if "variant" in form else nullcontext():
        loaded = AutoencoderKL.from_pretrained(tmp_path)
    assert weights_sha256(loaded.state_dict()) == weights_sha256(ours.state_dict())


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
@pytest.mark.parametrize("architecture", ["sd", "flux", "cogview"])
def test_both_load_the_same_model_from_a_single_file(architecture: str, prefix: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    ours = AutoencoderKL(**{**FOUR_LEVELS, **ARCHITECTURES[architecture]})
    ours.save_pretrained(tmp_path / "config")
    save_file(ldm(ours.state_dict(), prefix), tmp_path / "model.safetensors")
    loaded = AutoencoderKL.from_single_file(tmp_path / "model.safetensors", config=tmp_path / "config")
    reference = diffusers.AutoencoderKL.from_single_file(
        str(tmp_path / "model.safetensors"), config=str(tmp_path / "config"), local_files_only=True
    )
    assert (
        weights_sha256(loaded.state_dict())
        == weights_sha256(reference.state_dict())
        == weights_sha256(ours.state_dict())
    )


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_same_tensors_in_diffusers(name: str) -> None:
    config = PRESETS[name].config
    with torch.device("meta"):
        ours = class_of(config)(**config).state_dict()
        fields = {name: value for name, value in config.to_dict().items() if name != "force_upcast"}
        theirs = getattr(diffusers, config.class_names()[0]).from_config(fields).state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


def test_the_half_precision_vae_of_a_pipeline_loads(tmp_path: Path) -> None:
    _, theirs = make_pair()
    theirs.half().save_pretrained(tmp_path / "vae")
    loaded = AutoencoderKL.from_pretrained(tmp_path)
    assert loaded.dtype == torch.float16
    assert weights_sha256(loaded.state_dict()) == weights_sha256(theirs.state_dict())


def test_diffusers_reads_every_field_that_we_save(tmp_path: Path) -> None:
    constants = {"latents_mean": (0.5,) * 4, "latents_std": (2.0,) * 4, "shift_factor": 0.25, "scaling_factor": 0.5}
    ours, _ = make_pair(**constants, force_upcast=False, sample_size=256)
    ours.save_pretrained(tmp_path)
    returned = diffusers.AutoencoderKL.from_pretrained(tmp_path, local_files_only=True)
    assert {name: returned.config[name] for name in ours.config} == ours.config.to_dict()


def test_a_directory_with_the_old_names_of_attention_loads(tmp_path: Path) -> None:
    """Early versions of diffusers used names such as query for to_q. Some public models still have these names."""
    ours, theirs = make_pair()
    theirs.save_pretrained(tmp_path)
    old_names = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    tensors = {}
    for name, tensor in load_file(tmp_path / WEIGHTS).items():
        for new, former in old_names.items():
            name = name.replace(new, former)
        tensors[name] = tensor
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    diffusers.AutoencoderKL.from_pretrained(tmp_path, local_files_only=True)
    loaded = AutoencoderKL.from_pretrained(tmp_path)
    assert weights_sha256(loaded.state_dict()) == weights_sha256(ours.state_dict())


@pytest.mark.parametrize(
    ("height", "width", "overlap"), [(64, 64, 0.25), (136, 72, 0.25), slow_param(136, 200, 0.5), (70, 93, 0.25)]
)
def test_tiling_gives_the_same_results_as_in_the_reference(
    pair: tuple[AutoencoderKL, Any], height: int, width: int, overlap: float
) -> None:
    x = random_images(height, width)
    for model in pair:
        model.enable_tiling()
        model.tile_sample_min_size, model.tile_latent_min_size, model.tile_overlap_factor = 64, 8, overlap
    ours, theirs = pair
    try:
        with torch.no_grad():
            moments, expected = (model.encode(x).latent_dist.parameters for model in pair)
            assert torch.allclose(moments, expected, atol=1e-4)
            z = theirs.encode(x).latent_dist.mode()
            assert torch.allclose(ours.decode(z).sample, theirs.decode(z).sample, atol=1e-4)
    finally:
        for model in pair:
            model.disable_tiling()


@pytest.mark.parametrize("sample_size", [32, 256, 1000])
def test_tiles_have_the_sizes_of_the_reference(sample_size: int) -> None:
    fields = {**FOUR_LEVELS, **ARCHITECTURES["sd"], "sample_size": sample_size}
    ours, theirs = AutoencoderKL(**fields), diffusers.AutoencoderKL(**fields)
    for name in ("use_tiling", "tile_sample_min_size", "tile_latent_min_size", "tile_overlap_factor"):
        assert getattr(ours, name) == getattr(theirs, name), name


def test_fused_projections_give_the_same_results_as_in_the_reference(pair: tuple[AutoencoderKL, Any]) -> None:
    ours, theirs = pair
    assert list(ours.attn_processors) == list(theirs.attn_processors)
    ours.fuse_qkv_projections()
    try:
        with torch.no_grad():
            x = random_images(64, 64)
            assert torch.allclose(
                ours.encode(x).latent_dist.parameters, theirs.encode(x).latent_dist.parameters, atol=1e-4
            )
    finally:
        ours.unfuse_qkv_projections()
