import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from latentmill.scaling import Scaling
from tests.conftest import MICRO
from vae import AutoencoderKL, DiagonalGaussianDistribution
from vae.blocks import group_norm
from vae.scaling import scaling_of
from vae.train import HELD_OUT, TRAINED_ON, load_photo, negative_elbo, psnr


@pytest.fixture(scope="module")
def model() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(**MICRO).eval().requires_grad_(False)


def random_images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_encode_decode_and_forward_have_the_documented_shapes(model: AutoencoderKL) -> None:
    posterior = model.encode(random_images(2)).latent_dist
    assert posterior.parameters.shape == (2, 8, 8, 8)
    assert posterior.mode().shape == (2, 4, 8, 8)
    assert model.decode(posterior.mode()).sample.shape == (2, 3, 64, 64)
    assert model.decode(posterior.mode()).commit_loss is None
    assert isinstance(model(random_images(1), sample_posterior=True, return_dict=False), tuple)


def test_a_latent_does_not_depend_on_its_batch_or_its_position(model: AutoencoderKL) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        image, others = random_images(1), random_images(3, seed=1)
        first = model.encode(torch.cat([image, others])).latent_dist.mode()[0]
        last = model.encode(torch.cat([others.flip(0), image])).latent_dist.mode()[3]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(first, last)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_slicing_does_not_change_the_latents(model: AutoencoderKL, size: int) -> None:
    whole = model.encode(random_images(5)).latent_dist.mode()
    model.enable_slicing(size)
    sliced = model.encode(random_images(5)).latent_dist.mode()
    model.disable_slicing()
    torch.testing.assert_close(sliced, whole, atol=1e-5, rtol=0)


def test_a_slice_has_at_least_one_image(model: AutoencoderKL) -> None:
    with pytest.raises(ValueError, match="at least 1, not 0"):
        model.enable_slicing(0)


def test_the_posterior_clamps_its_log_variance() -> None:
    moments = torch.cat([torch.zeros(1, 1, 1, 2), torch.tensor([[[[-99.0, 99.0]]]])], dim=1)
    assert DiagonalGaussianDistribution(moments).logvar.flatten().tolist() == [-30, 20]


def test_a_deterministic_posterior_has_zero_variance() -> None:
    posterior = DiagonalGaussianDistribution(torch.ones(1, 2, 1, 1), deterministic=True)
    assert torch.equal(posterior.sample(), posterior.mode())
    assert posterior.kl().item() == posterior.nll(torch.zeros(1, 1, 1, 1)).item() == 0


def test_the_divergence_of_the_standard_normal_is_zero() -> None:
    assert DiagonalGaussianDistribution(torch.zeros(3, 8, 2, 2)).kl().tolist() == [0, 0, 0]


def test_the_negative_elbo_is_the_sum_of_distortion_and_rate(model: AutoencoderKL) -> None:
    x = random_images(2)
    loss, distortion, rate = negative_elbo(model, x, torch.Generator().manual_seed(5))
    posterior = model.encode(x).latent_dist
    reconstruction = model.decode(posterior.sample(torch.Generator().manual_seed(5))).sample
    assert distortion.item() == pytest.approx(((reconstruction - x) ** 2).mean().item() / (2 * 0.02**2), rel=1e-5)
    assert rate.item() == pytest.approx(posterior.kl().sum().item() / x.numel(), rel=1e-5)
    assert loss.item() == pytest.approx(distortion.item() + rate.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("constants", "shift", "scale"),
    [
        ({}, (0.0,), (0.18215,)),
        ({"scaling_factor": 0.3611, "shift_factor": 0.1159}, (0.1159,), (0.3611,)),
        (
            {"scaling_factor": 0.5, "latents_mean": (1, 2, 3, 4), "latents_std": (1, 2, 4, 8)},
            (1, 2, 3, 4),
            (0.5, 0.25, 0.125, 0.0625),
        ),
    ],
)
def test_the_scaling_follows_from_the_constants_of_the_config(
    constants: dict[str, object], shift: tuple[float, ...], scale: tuple[float, ...]
) -> None:
    rule = scaling_of(AutoencoderKL(**MICRO, **constants).config)
    assert rule == Scaling(shift, scale)
    raw = torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([(raw[c] - shift[c % len(shift)]) * scale[c % len(scale)] for c in range(4)])
    torch.testing.assert_close(rule.to_model(raw), expected)
    torch.testing.assert_close(rule.to_raw(rule.to_model(raw)), raw)


@pytest.fixture(scope="module")
def demo() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained("demo")


def test_the_demo_model_is_small_and_has_latents_like_sd3(demo: AutoencoderKL) -> None:
    files = (Path(__file__).parents[2] / "vae/demo").glob("*.safetensors")
    assert sum(path.stat().st_size for path in files) < 5_000_000
    assert (demo.config.latent_channels, demo.config.downscale) == (16, 8)


@pytest.mark.parametrize("name", HELD_OUT)
def test_the_demo_model_reconstructs_photos_that_it_was_not_trained_on(demo: AutoencoderKL, name: str) -> None:
    assert name not in TRAINED_ON
    assert psnr(demo, load_photo(name), 256) > 28


def test_the_constants_of_the_demo_model_normalize_its_latents(demo: AutoencoderKL) -> None:
    x = load_photo("skimage/retina.jpg")[None, :, :512, :512]
    latents = scaling_of(demo.config).to_model(demo.encode(x).latent_dist.mode())
    assert abs(latents.mean().item()) < 1
    assert 0.3 < latents.std().item() < 2
    assert demo.config.latents_std is not None
    assert all(math.isfinite(std) and std > 0.1 for std in demo.config.latents_std)


@pytest.fixture
def single_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_wide_images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, 40, 72, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module", params=["with attention", "without attention"])
def sd_like(request: pytest.FixtureRequest) -> AutoencoderKL:
    """Return a model whose levels differ in width, with 32 groups as in the public models."""
    torch.manual_seed(2)
    widths = {"block_out_channels": (32, 64, 64, 64), "norm_num_groups": 32, "latent_channels": 16}
    attention = request.param == "with attention"
    model = AutoencoderKL(**{**MICRO, **widths, "mid_block_add_attention": attention})
    return model.eval().requires_grad_(False)


@pytest.mark.usefixtures("single_thread")
def test_no_bit_of_a_latent_depends_on_the_rest_of_its_batch(sd_like: AutoencoderKL) -> None:
    image, others = random_wide_images(1), random_wide_images(3, seed=1)
    expected = sd_like.encode(torch.cat([image, torch.zeros_like(others)])).latent_dist.parameters[0]
    for position in range(4):
        x = torch.cat([others[:position], image, others[position:]])
        assert torch.equal(sd_like.encode(x).latent_dist.parameters[position], expected)


@pytest.mark.usefixtures("single_thread")
def test_no_bit_of_an_image_depends_on_the_rest_of_its_batch(sd_like: AutoencoderKL) -> None:
    z = torch.randn(4, 16, 5, 9, generator=torch.Generator().manual_seed(0))
    pixels, rotated = sd_like.decode(z).sample, sd_like.decode(z.roll(1, 0)).sample
    assert torch.equal(pixels, rotated.roll(-1, 0))


@pytest.mark.usefixtures("single_thread")
def test_an_image_of_nan_changes_no_other_latent_of_the_batch(sd_like: AutoencoderKL) -> None:
    x = random_wide_images(3)
    healthy = sd_like.encode(x).latent_dist.parameters
    x[1] = math.nan
    with_nan = sd_like.encode(x).latent_dist.parameters
    assert with_nan[1].isnan().all()
    assert torch.equal(with_nan[[0, 2]], healthy[[0, 2]])


@pytest.mark.parametrize(("size", "slices"), [(1, [1, 1, 1, 1, 1]), (2, [2, 2, 1]), (4, [4, 1]), (5, [5]), (9, [5])])
def test_no_slice_is_larger_than_requested(size: int, slices: list[int]) -> None:
    model, sizes = AutoencoderKL(**MICRO), []
    for part in (model.encoder, model.decoder):
        part.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    model.enable_slicing(size)
    model(random_images(5))
    assert sizes == [*slices, *slices]


@pytest.mark.parametrize("size", [1, 2, 8])
def test_slicing_does_not_change_the_results_of_decode_and_forward(model: AutoencoderKL, size: int) -> None:
    x, z = random_images(3), torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    decoded, reconstructed = model.decode(z).sample, model(x).sample
    model.enable_slicing(size)
    sliced, sliced_reconstructed = model.decode(z).sample, model(x).sample
    model.disable_slicing()
    torch.testing.assert_close(sliced, decoded, atol=1e-5, rtol=0)
    torch.testing.assert_close(sliced_reconstructed, reconstructed, atol=1e-5, rtol=0)


def test_without_return_dict_the_result_is_a_tuple(model: AutoencoderKL) -> None:
    x = random_images(2)
    (posterior,) = model.encode(x, return_dict=False)
    (pixels,) = model.decode(posterior.mode(), return_dict=False)
    (reconstruction,) = model(x, return_dict=False)
    assert torch.equal(posterior.parameters, model.encode(x).latent_dist.parameters)
    assert torch.equal(pixels, model.decode(posterior.mode()).sample)
    assert torch.equal(reconstruction, pixels)


def test_forward_decodes_the_mode_or_a_random_sample(model: AutoencoderKL) -> None:
    x = random_images(1)
    posterior = model.encode(x).latent_dist
    latent = posterior.sample(torch.Generator().manual_seed(6))
    assert torch.equal(model(x).sample, model.decode(posterior.mode()).sample)
    sampled = model(x, sample_posterior=True, generator=torch.Generator().manual_seed(6)).sample
    assert torch.equal(sampled, model.decode(latent).sample)
    assert not torch.equal(sampled, model(x).sample)


def test_moments_are_the_parameters_of_the_posterior(model: AutoencoderKL) -> None:
    assert torch.equal(model.moments(random_images(2)), model.encode(random_images(2)).latent_dist.parameters)


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_latents_are_smaller_by_the_downscale_of_the_config(levels: int) -> None:
    shortened = {name: value[:levels] for name, value in MICRO.items() if isinstance(value, tuple)}
    model = AutoencoderKL(**{**MICRO, **shortened})
    latents = model.encode(torch.zeros(1, 3, 16, 24)).latent_dist.mode()
    assert latents.shape == (1, 4, 16 // model.config.downscale, 24 // model.config.downscale)
    assert model.decode(latents).sample.shape == (1, 3, 16, 24)


def test_images_may_have_other_than_three_channels() -> None:
    model = AutoencoderKL(**MICRO, in_channels=1, out_channels=2)
    assert model(torch.zeros(1, 1, 16, 16)).sample.shape == (1, 2, 16, 16)


def test_a_model_built_from_a_config_has_that_config(model: AutoencoderKL) -> None:
    copy = AutoencoderKL.from_config(model.config)
    assert copy.config == model.config
    assert copy.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_and_device_are_those_of_the_weights(model: AutoencoderKL, dtype: torch.dtype) -> None:
    other = AutoencoderKL.from_config(model.config).to(dtype)
    assert (other.dtype, other.device) == (dtype, torch.device("cpu"))
    assert other(random_images(1).to(dtype)).sample.dtype == dtype
    assert AutoencoderKL.from_config(model.config).to("meta").device == torch.device("meta")


@pytest.mark.parametrize(("dtype", "steps"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_group_norm_computes_its_statistics_in_float32(dtype: torch.dtype, steps: float) -> None:
    """A group has 65,536 values of mean 10 and deviation 1. Sums in half precision would be far off."""
    norm = group_norm(32, 8).to(dtype)
    x = (torch.randn(1, 32, 128, 128, generator=torch.Generator().manual_seed(0)) + 10).to(dtype)
    for layout in (torch.contiguous_format, torch.channels_last):
        with torch.no_grad():
            result = norm(x.contiguous(memory_format=layout)).float()
        exact = torch.nn.functional.group_norm(x.double(), 8, eps=norm.eps)
        assert ((result - exact).abs() <= 4 * steps * exact.abs().clamp(min=1)).all()
