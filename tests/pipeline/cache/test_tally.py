from fractions import Fraction

import numpy as np
import pytest
import torch

from latentmill.group_spans import GroupSpan
from pipeline.cache import tally
from pipeline.cache.part_info import PartSummary
from pipeline.cache.part_table import make_table, parse_parts
from pipeline.cache.tally_sums import ChannelStats, TallySums
from pipeline.formats.part_record import BucketTally
from pipeline.prefetch import Peekable, map_in_order


def latents(count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(3, 4, 5, generator=generator) * 7 + 2).half() for _ in range(count)]


def make_summary(tallies: dict[str, BucketTally]) -> PartSummary:
    """Return a part with these tallies, and without anything else."""
    return PartSummary(
        file="data/u-00000.parquet",
        bytes=0,
        sha256="00" * 32,
        groups=[GroupSpan(2, 4, 9_000_000_000, 64, 72), GroupSpan(1, 9_000_000_000, 9_000_000_100, 72, 64)],
        source="s",
        rows=0,
        filtered={},
        enlarged=0,
        reject_counts={},
        rest_positions=(),
        supersedes=(),
        tally=tallies,
    )


def sum_up(tallies: list[BucketTally], bucket: str = "1x1") -> TallySums:
    sums = TallySums()
    for each in tallies:
        sums.add(make_table([("", make_summary({bucket: each}))]))
    return sums


def describe(tallies: list[BucketTally]) -> ChannelStats:
    return sum_up(tallies).describe()


def test_merged_tallies_equal_the_statistics_by_numpy() -> None:
    all_latents = latents(50)
    tallies = [tally.tally_latents(all_latents[start : start + 7]) for start in range(0, 50, 7)]
    merged = describe(tallies)
    values = torch.stack(all_latents).double().numpy()
    assert merged.samples == 50
    np.testing.assert_allclose(merged.mean, values.mean(axis=(0, 2, 3)), rtol=1e-13)
    np.testing.assert_allclose(merged.std, values.std(axis=(0, 2, 3)), rtol=1e-13)
    assert merged.min == values.min(axis=(0, 2, 3)).tolist()
    assert merged.max == values.max(axis=(0, 2, 3)).tolist()
    np.testing.assert_allclose(sum_up(tallies).pool_channels(), (values.mean(), values.std()), rtol=1e-13)


def test_a_small_spread_around_a_large_mean_is_exact() -> None:
    values = [torch.full((1, 2, 2), 1e6) + torch.tensor([[[0.0, 1.0], [2.0, 3.0]]]) for _ in range(100)]
    merged = describe([tally.tally_latents([value]) for value in values])
    assert merged.std[0] == pytest.approx(np.std([0, 1, 2, 3]), rel=1e-9)


def test_a_constant_channel_has_no_spread() -> None:
    assert describe([tally.tally_latents([torch.ones(1, 1, 1)])]).std == [0.0]
    tenth = tally.tally_latents([torch.full((1, 3, 3), 0.1)])
    assert describe([tenth] * 7).std == [0.0]


def draw_tallies(count: int, channels: int, seed: int = 0) -> list[BucketTally]:
    """Return tallies of very different sizes, means and spreads, in which sums of floats would lose digits."""
    rng = np.random.default_rng(seed)
    tallies = []
    for _ in range(count):
        mean = rng.normal(size=channels) * 10.0 ** rng.integers(-30, 8, size=channels)
        m2 = np.abs(rng.normal(size=channels)) * 10.0 ** rng.integers(-40, 8, size=channels)
        variance = np.abs(rng.normal(size=channels)) * 10.0 ** rng.integers(-20, 4, size=channels)
        tallies.append(
            BucketTally(
                samples=int(rng.integers(1, 9)),
                values=int(rng.integers(1, 1 << 40)),
                mean=mean.tolist(),
                m2=m2.tolist(),
                min=(mean - 1).tolist(),
                max=(mean + 1).tolist(),
                variance=variance.tolist(),
            )
        )
    return tallies


def test_the_statistics_are_those_of_exact_fractions() -> None:
    tallies = draw_tallies(200, channels=3)
    actual = describe(tallies)
    for channel in range(3):
        values = sum(each.values for each in tallies)
        mean = sum(each.values * Fraction(each.mean[channel]) for each in tallies) / values
        squares = [each.values * (Fraction(each.mean[channel]) - mean) ** 2 for each in tallies]
        within = sum(Fraction(each.m2[channel]) for each in tallies)
        variance = sum(each.values * Fraction(each.variance[channel]) for each in tallies if each.variance)
        assert actual.mean[channel] == float(mean)
        assert actual.std[channel] == float((sum(squares) + within + variance) / values) ** 0.5


def test_the_statistics_do_not_depend_on_the_order_or_the_grouping_to_the_last_bit() -> None:
    parts = [
        make_summary({f"{size}x64": each for size, each in zip((8, 16, 24), pair, strict=False)})
        for pair in zip(draw_tallies(60, 4, 1), draw_tallies(60, 4, 2), draw_tallies(60, 4, 3), strict=True)
    ]
    expected = TallySums()
    expected.add(make_table([("", part) for part in parts]))
    one_by_one = TallySums()
    for part in reversed(parts):
        names = list(part.tally)
        for name in reversed(names):  # buckets are met in another order as well
            one_by_one.add(make_table([("", make_summary({name: part.tally[name]}))]))
    for bucket in (None, "8x64", "16x64", "24x64"):
        assert one_by_one.describe(bucket) == expected.describe(bucket)
    assert one_by_one.pool_channels() == expected.pool_channels()


def test_a_part_is_the_same_after_its_way_through_a_table() -> None:
    part = make_summary(dict(zip(("a", "b"), draw_tallies(2, 4), strict=True)))
    without_variance = make_summary({"a": tally.tally_latents(latents(1))})
    assert [each for _, each in parse_parts(make_table([("u", part), ("u", without_variance)]))] == [
        PartSummary(**{**vars_of(each), "rest_positions": [], "supersedes": [], "left_out": []})
        for each in (part, without_variance)
    ]


def vars_of(part: PartSummary) -> dict[str, object]:
    return {name: getattr(part, name) for name in PartSummary.__slots__}


def test_tallies_whose_lists_differ_in_length_are_refused() -> None:
    (one,), (two,) = draw_tallies(1, channels=1), draw_tallies(1, channels=2)
    with pytest.raises(ValueError, match="differ in length"):
        make_table([("", make_summary({"a": one, "b": two}))])
    with pytest.raises(ValueError, match="of 1 and of 2 channels"):
        describe([one, two])


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
    tallies = [tally.tally_moments(moments[start : start + 9]) for start in range(0, 40, 9)]
    merged = describe(tallies)
    means, logvars = torch.stack(moments).double().chunk(2, dim=1)
    sampled = torch.cat(
        [means + (0.5 * logvars).exp() * torch.randn(means.shape, generator=generator) for _ in range(99)]
    )
    np.testing.assert_allclose(merged.std, sampled.std(dim=(0, 2, 3)), rtol=0.01)
    np.testing.assert_allclose(sum_up(tallies).pool_channels(), (means.mean(), sampled.std()), rtol=0.01)
    variance = means.var(dim=(0, 2, 3), correction=0) + logvars.exp().mean(dim=(0, 2, 3))
    assert merged.std == pytest.approx(variance.sqrt().tolist(), rel=1e-12)


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
