import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from tests.conftest import MICRO
from vae import AutoencoderKL, AutoencoderKLConfig, train
from vae.load import weights_sha256
from vae.scaling import scaling_of

TINY = AutoencoderKLConfig(**MICRO, scaling_factor=1.0)


def random_image(seed: int, height: int, width: int) -> Tensor:
    """Return noise [3, height, width] in [-1, 1]."""
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def build_untrained() -> AutoencoderKL:
    """Return the model that training with seed 0 starts from."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoencoderKL(**TINY)


def compute_loss(model: AutoencoderKL, x: Tensor) -> float:
    with torch.no_grad():
        return train.negative_elbo(model, x, torch.Generator().manual_seed(1))[0].item()


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make training use the micro model and a single small photo."""
    monkeypatch.setattr(train, "CONFIG", TINY)
    monkeypatch.setattr(train, "TRAINED_ON", ("skimage/coins.png",))
    monkeypatch.setattr(train, "HELD_OUT", ("skimage/coffee.png",))
    monkeypatch.setattr(train, "SCALES", (0.5,))


def list_symmetries(square: Tensor) -> list[Tensor]:
    """Return a square image, rotated and mirrored in all eight ways."""
    rotated = [torch.rot90(square, turns, (1, 2)) for turns in range(4)]
    return [*rotated, *(image.flip(2) for image in rotated)]


def test_no_photo_is_both_trained_on_and_held_out() -> None:
    names = train.TRAINED_ON + train.HELD_OUT
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", ["skimage/camera.png", "sklearn/flower.jpg"])
def test_a_photo_is_rgb_in_minus_one_to_one(name: str) -> None:
    photo = train.load_photo(name)
    assert photo.shape[0] == 3
    assert min(photo.shape[1:]) >= 256
    assert -1 <= photo.min() < -0.9
    assert 0.9 < photo.max() <= 1


def test_downscaling_averages_the_pixels_that_it_merges() -> None:
    stripes = torch.ones(3, 64, 96)
    stripes[:, :, ::2] = -1
    small = train.downscale(stripes, 0.25)
    assert small.shape == (3, 16, 24)
    assert small[:, :, 2:-2].abs().max() < 0.05
    assert train.downscale(stripes, 1.0) is stripes


def test_color_jitter_stays_in_range_and_keeps_the_shape() -> None:
    crop, rng = random_image(0, 8, 8), np.random.default_rng(0)
    changed = [train.jitter_colors(crop, rng) for _ in range(50)]
    assert all(result.shape == crop.shape and result.abs().max() <= 1 for result in changed)
    assert not any(torch.equal(result, crop) for result in changed)


def test_batches_have_the_requested_shape_and_depend_on_the_seed() -> None:
    photos = [random_image(0, 40, 24), random_image(1, 24, 40)]
    first, repeated, other = (train.iterate_batches(photos, 16, 5, np.random.default_rng(seed)) for seed in (0, 0, 1))
    for _ in range(3):
        batch = next(first)
        assert batch.shape == (5, 3, 16, 16)
        assert batch.abs().max() <= 1
        assert torch.equal(batch, next(repeated))
        assert not torch.equal(batch, next(other))


def test_half_of_the_crops_are_the_photo_rotated_and_mirrored_in_all_eight_ways() -> None:
    photo = random_image(0, 6, 6)
    crops = next(train.iterate_batches([photo], 6, 400, np.random.default_rng(0)))
    counts = [sum(torch.equal(crop, way) for crop in crops) for way in list_symmetries(photo)]
    assert 160 < sum(counts) < 240
    assert min(counts) > 10


def test_crops_cover_every_photo_completely() -> None:
    photos = [torch.arange(9.0).reshape(1, 3, 3).expand(3, 3, 3) / 20 + offset for offset in (-0.9, 0.4)]
    crops = next(train.iterate_batches(photos, 1, 400, np.random.default_rng(0)))
    values = {round(value, 4) for value in crops[:, 0, 0, 0].tolist()}
    assert {round(value, 4) for photo in photos for value in photo[0].flatten().tolist()} <= values


def test_the_terms_of_the_negative_elbo_agree_with_torch_distributions() -> None:
    model, x = build_untrained().eval(), torch.stack([random_image(0, 32, 48), random_image(1, 32, 48)])
    loss, distortion, rate = (term.item() for term in train.negative_elbo(model, x, torch.Generator().manual_seed(4)))
    mean, logvar = model.moments(x).chunk(2, dim=1)
    q = Normal(mean, (logvar / 2).exp())
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(4))
    p = Normal(model.decode(mean + q.stddev * noise).sample, train.DECODER_STD)
    constant = math.log(train.DECODER_STD * math.sqrt(2 * math.pi))
    assert distortion == pytest.approx(-p.log_prob(x).mean().item() - constant, rel=1e-4)
    standard = Normal(torch.zeros_like(mean), torch.ones_like(mean))
    assert rate == pytest.approx(kl_divergence(q, standard).sum().item() / (2 * 3 * 32 * 48), rel=1e-4)
    assert loss == pytest.approx(distortion + rate)


def test_the_negative_elbo_reaches_every_weight() -> None:
    model = build_untrained()
    loss, *_ = train.negative_elbo(model, random_image(0, 32, 32)[None], torch.Generator().manual_seed(0))
    loss.backward()
    unreached = {name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()}
    assert {
        name for name in unreached if not name.endswith("to_k.bias")
    } == set()  # softmax ignores a constant added to all keys


def test_psnr_agrees_with_the_formula() -> None:
    model, photo = build_untrained().eval(), random_image(0, 64, 64)
    with torch.no_grad():
        reconstruction = model.decode(model.encode(photo[None]).latent_dist.mode()).sample[0]
    levels = [np.round((values.clamp(-1, 1).double().numpy() + 1) * 127.5) for values in (reconstruction, photo)]
    expected = 10 * math.log10(255**2 / np.mean((levels[0] - levels[1]) ** 2))
    assert train.psnr(model, photo, 64) == pytest.approx(expected, abs=1e-3)


def test_psnr_uses_the_center_at_the_requested_size() -> None:
    model, wide = build_untrained().eval(), random_image(0, 64, 96)
    assert train.psnr(model, wide, 64) == train.psnr(model, wide[:, :, 16:80], 64)
    large = random_image(1, 128, 128)
    assert train.psnr(model, large, 64) == train.psnr(model, train.downscale(large, 0.5), 64)


def test_the_latent_constants_normalize_the_latents_of_the_photos() -> None:
    model, photos = build_untrained().eval(), [random_image(0, 64, 80), random_image(1, 70, 93)]
    copy = train.add_latent_constants(model, photos)
    assert weights_sha256(copy.state_dict()) == weights_sha256(model.state_dict())
    with torch.no_grad():
        raw = [copy.encode(x[None]).latent_dist.mode()[0] for x in (photos[0], photos[1][:, :64, :88])]
    values = torch.cat([scaling_of(copy.config).to_model(latent).flatten(1) for latent in raw], dim=1)
    torch.testing.assert_close(values.mean(dim=1), torch.zeros(4), atol=0.01, rtol=0)
    torch.testing.assert_close(values.std(dim=1, correction=0), torch.ones(4), atol=0.01, rtol=0)


@pytest.mark.usefixtures("tiny")
def test_a_few_steps_lower_the_loss_and_save_a_model_that_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with torch.random.fork_rng():
        train.train(tmp_path, steps=6, seed=0)
    trained = AutoencoderKL.from_pretrained(tmp_path)
    x = next(train.iterate_batches([train.load_photo("skimage/coins.png")], 64, 8, np.random.default_rng(9)))
    assert compute_loss(trained, x) < 0.8 * compute_loss(build_untrained(), x)
    assert trained.config.latents_mean is not None
    assert capsys.readouterr().out.startswith("PSNR of held-out photos: coffee ")


@pytest.mark.usefixtures("tiny")
def test_the_same_seed_trains_the_same_model(tmp_path: Path) -> None:
    for name in ("first", "repeated"):
        with torch.random.fork_rng():
            train.train(tmp_path / name, steps=1, seed=0)
    first, repeated = (AutoencoderKL.from_pretrained(tmp_path / name) for name in ("first", "repeated"))
    assert weights_sha256(first.state_dict()) == weights_sha256(repeated.state_dict())
    assert weights_sha256(first.state_dict()) != weights_sha256(build_untrained().state_dict())


def test_the_last_quarter_of_the_steps_uses_larger_crops(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    negative_elbo = train.negative_elbo

    def record_size(model: AutoencoderKL, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        sizes.append(x.shape[-1])
        return negative_elbo(model, x, generator)

    monkeypatch.setattr(train, "negative_elbo", record_size)
    with torch.random.fork_rng():
        train.train(tmp_path, steps=4, seed=0)
    assert [(size, len(list(steps))) for size, steps in itertools.groupby(sizes)] == [(64, 3), (128, 1)]
