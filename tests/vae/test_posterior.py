import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from vae import DiagonalGaussianDistribution

SHAPE = (3, 4, 5, 6)


def make_gaussian(mean: float, variance: float, positions: int = 6) -> DiagonalGaussianDistribution:
    """Return a Gaussian of one channel with the same mean and variance at each position."""
    shape = (1, 1, 1, positions)
    return DiagonalGaussianDistribution(
        torch.cat([torch.full(shape, mean), torch.full(shape, math.log(variance))], dim=1)
    )


def make_random_gaussian(seed: int) -> DiagonalGaussianDistribution:
    moments = torch.randn(3, 8, 5, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return DiagonalGaussianDistribution(moments)


def test_the_first_half_of_the_channels_is_the_mean_the_second_the_log_variance() -> None:
    moments = torch.arange(8.0).reshape(1, 4, 1, 2)
    posterior = DiagonalGaussianDistribution(moments)
    assert posterior.mode().flatten().tolist() == posterior.mean.flatten().tolist() == [0, 1, 2, 3]
    assert posterior.logvar.flatten().tolist() == [4, 5, 6, 7]
    assert torch.equal(posterior.parameters, moments)
    torch.testing.assert_close(posterior.std.square(), posterior.var)
    torch.testing.assert_close(posterior.var.log(), posterior.logvar)


def test_the_divergence_agrees_with_values_computed_by_hand() -> None:
    # (2^2 + 4 - 1 - ln 4) / 2 per position
    assert make_gaussian(2, 4, positions=6).kl().item() == pytest.approx(6 * 2.8068528, rel=1e-6)
    # ((2 - 1)^2 / 0.5 + 4 / 0.5 - 1 - ln 4 + ln 0.5) / 2 per position
    assert make_gaussian(2, 4, positions=6).kl(make_gaussian(1, 0.5)).item() == pytest.approx(6 * 3.4602792, rel=1e-6)


def test_the_likelihood_agrees_with_values_computed_by_hand() -> None:
    # (ln 2 pi + ln 4 + (5 - 2)^2 / 4) / 2 per position
    sample = torch.full((1, 1, 1, 6), 5.0)
    assert make_gaussian(2, 4, positions=6).nll(sample).item() == pytest.approx(6 * 2.7370857, rel=1e-6)


def test_divergence_and_likelihood_agree_with_torch_distributions() -> None:
    posterior, other = make_random_gaussian(0), make_random_gaussian(1)
    first, second = Normal(posterior.mean, posterior.std), Normal(other.mean, other.std)
    standard = Normal(torch.zeros_like(posterior.mean), torch.ones_like(posterior.mean))
    sample = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.testing.assert_close(posterior.kl(), kl_divergence(first, standard).sum(dim=[1, 2, 3]))
    torch.testing.assert_close(posterior.kl(other), kl_divergence(first, second).sum(dim=[1, 2, 3]))
    torch.testing.assert_close(posterior.nll(sample), -first.log_prob(sample).sum(dim=[1, 2, 3]))
    torch.testing.assert_close(posterior.nll(sample, dims=(1,)), -first.log_prob(sample).sum(dim=1))


def test_the_divergence_from_itself_is_zero() -> None:
    torch.testing.assert_close(
        make_random_gaussian(0).kl(make_random_gaussian(0)), torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0
    )


def test_a_sample_is_mean_plus_deviation_times_noise() -> None:
    posterior = make_random_gaussian(0)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    assert torch.equal(posterior.sample(torch.Generator().manual_seed(7)), posterior.mean + posterior.std * noise)


def test_without_a_generator_the_sample_depends_on_the_global_seed() -> None:
    posterior = make_random_gaussian(0)
    with torch.random.fork_rng():
        first, second = posterior.sample(), posterior.sample()
        torch.manual_seed(3)
        seeded = posterior.sample()
        torch.manual_seed(3)
        repeated = posterior.sample()
    assert not torch.equal(first, second)
    assert torch.equal(seeded, repeated)


def test_samples_have_the_mean_and_deviation_of_the_gaussian() -> None:
    samples = make_gaussian(2, 9, positions=40_000).sample(torch.Generator().manual_seed(0))
    assert samples.mean().item() == pytest.approx(2, abs=0.06)  # 4 standard errors
    assert samples.std().item() == pytest.approx(3, abs=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_sample_keeps_the_dtype_of_the_moments(dtype: torch.dtype) -> None:
    posterior = DiagonalGaussianDistribution(torch.zeros(1, 8, 2, 2, dtype=dtype))
    assert posterior.sample(torch.Generator().manual_seed(0)).dtype == posterior.std.dtype == dtype


def test_a_log_variance_out_of_bounds_gives_finite_samples() -> None:
    moments = torch.cat([torch.zeros(1, 1, 1, 2), torch.tensor([[[[-1e9, 1e9]]]])], dim=1)
    posterior = DiagonalGaussianDistribution(moments)
    assert posterior.var.flatten().tolist() == pytest.approx([math.exp(-30), math.exp(20)], rel=1e-5)
    assert posterior.sample(torch.Generator().manual_seed(0)).isfinite().all()
