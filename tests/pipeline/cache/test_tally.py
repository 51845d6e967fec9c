import numpy as np
import pytest
import torch

from pipeline.cache import tally
from pipeline.prefetch import Peekable, map_in_order


def latents(count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(3, 4, 5, generator=generator) * 7 + 2).half() for _ in range(count)]


def test_merged_tallies_equal_the_statistics_by_numpy() -> None:
    all_latents = latents(50)
    tallies = [tally.tally_latents(all_latents[start : start + 7]) for start in range(0, 50, 7)]
    merged = tally.merge(tallies)
    assert merged is not None
    values = torch.stack(all_latents).double().numpy()
    assert (merged.samples, merged.values) == (50, 50 * 4 * 5)
    np.testing.assert_allclose(merged.mean, values.mean(axis=(0, 2, 3)), rtol=1e-13)
    np.testing.assert_allclose(tally.compute_std(merged), values.std(axis=(0, 2, 3)), rtol=1e-13)
    assert merged.min == values.min(axis=(0, 2, 3)).tolist()
    assert merged.max == values.max(axis=(0, 2, 3)).tolist()
    np.testing.assert_allclose(tally.pool_channels(merged), (values.mean(), values.std()), rtol=1e-13)


def test_a_small_spread_around_a_large_mean_is_exact() -> None:
    values = [torch.full((1, 2, 2), 1e6) + torch.tensor([[[0.0, 1.0], [2.0, 3.0]]]) for _ in range(100)]
    merged = tally.merge([tally.tally_latents([value]) for value in values])
    assert merged is not None
    assert tally.compute_std(merged)[0] == pytest.approx(np.std([0, 1, 2, 3]), rel=1e-9)


def test_a_constant_channel_has_no_spread() -> None:
    assert tally.compute_std(tally.tally_latents([torch.ones(1, 1, 1)])) == [0.0]


def test_merging_no_tallies_gives_none() -> None:
    assert tally.merge([]) is None


def test_results_are_in_order_and_no_more_items_are_taken_than_the_window() -> None:
    from concurrent.futures import ThreadPoolExecutor

    taken, given = [], []

    def items() -> object:
        for number in range(20):
            taken.append(number)
            assert len(taken) - len(given) <= 4
            yield number

    with ThreadPoolExecutor(3) as pool:
        for result in map_in_order(pool, lambda number: number * number, items(), window=4):  # type: ignore[arg-type]
            given.append(result)
    assert given == [number * number for number in range(20)]


def test_an_exception_in_the_pool_reaches_the_caller() -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool, pytest.raises(ZeroDivisionError):
        list(map_in_order(pool, lambda number: 1 // number, [1, 0, 2], window=2))


def test_looking_ahead_consumes_no_item() -> None:
    items = Peekable([1, 2])
    assert not items.is_done
    assert list(items) == [1, 2]
    assert items.is_done


def test_moments_have_the_standard_deviation_of_latents_sampled_from_them() -> None:
    generator = torch.Generator().manual_seed(3)
    moments = [torch.randn(4, 6, 6, generator=generator) for _ in range(40)]
    merged = tally.merge([tally.tally_moments(moments[start : start + 9]) for start in range(0, 40, 9)])
    assert merged is not None
    means, logvars = torch.stack(moments).double().chunk(2, dim=1)
    sampled = torch.cat(
        [means + (0.5 * logvars).exp() * torch.randn(means.shape, generator=generator) for _ in range(99)]
    )
    np.testing.assert_allclose(tally.compute_std(merged), sampled.std(dim=(0, 2, 3)), rtol=0.01)
    np.testing.assert_allclose(tally.pool_channels(merged), (means.mean(), sampled.std()), rtol=0.01)
    assert merged.variance == pytest.approx(logvars.exp().mean(dim=(0, 2, 3)).tolist(), rel=1e-12)


def test_no_call_runs_after_an_exception() -> None:
    """The caller then closes what the calls use, such as a process that decodes images. A call would start it again."""
    import time
    from concurrent.futures import ThreadPoolExecutor

    ended = []

    def slow(number: int) -> None:
        if number == 0:
            raise ValueError("the first one")
        time.sleep(0.2)
        ended.append(number)

    with ThreadPoolExecutor(2) as pool:
        with pytest.raises(ValueError, match="the first one"):
            list(map_in_order(pool, slow, range(9), window=9))
        before = list(ended)
        time.sleep(0.5)
        assert ended == before
        assert len(ended) < 5
