"""Findings of records and of samples, each with the smallest data that show it, and with data that do not."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from bench.make_cache import CacheSpec, write_cache
from latentmill.cache_info import VaeInfo
from pipeline.cache.reader import Cache
from pipeline.report.equal_rows import find_equal_rows
from pipeline.report.findings import compare_with_constants, find_in_records, join
from pipeline.report.records import Parts, find_unusual_parts, read_parts
from pipeline.report.sample import Sample, read_sample, shrink
from pipeline.report.sample_findings import find_in_sample

MEANS, STDS = (0.5, -1.0, 0.2, 2.0), (2.0, 0.4, 0.5, 3.0)


def make_vae(means: Any = MEANS, stds: Any = STDS) -> VaeInfo:
    return VaeInfo(
        reference="a VAE", config={}, scaling_factor=1.0, shift_factor=None, latents_mean=means, latents_std=stds
    )


@pytest.mark.parametrize(
    ("mean", "std", "codes"),
    [
        (MEANS, STDS, []),
        ((0.0, 0.0, 0.0, 0.0), (1.0, 1.1, 0.9, 1.0), ["wrong-scaling"]),
        (MEANS, (1.0, 0.2, 0.25, 1.5), ["wrong-range"]),
        ((-1.0, 0.5, 0.2, 2.0), (0.4, 2.0, 0.5, 3.0), ["swapped-channels"]),
        (MEANS, (8.0, 1.6, 2.0, 12.0), ["other-vae"]),
        ((9.0, 3.0, 4.0, 12.0), STDS, ["other-vae"]),
    ],
)
def test_statistics_are_compared_with_the_constants(mean: Any, std: Any, codes: list[str]) -> None:
    assert [finding.code for finding in compare_with_constants(mean, std, make_vae())] == codes


def test_a_scaling_factor_alone_shows_scaled_latents() -> None:
    vae = dataclasses.replace(make_vae(None, None), scaling_factor=0.18215)
    assert [each.code for each in compare_with_constants([0.0] * 4, [1.0] * 4, vae)] == ["wrong-scaling"]
    assert compare_with_constants([0.5] * 4, [5.0, 6.0, 4.5, 4.0], vae) == []


def test_latents_near_the_constants_are_not_called_scaled() -> None:
    """Deviations of about 1 are no fault if they are as near to those of the model, as with SD3 and small images."""
    vae = make_vae(stds=(1.5, 0.65, 1.5, 0.65))
    assert compare_with_constants(MEANS, (1.2, 0.85, 1.2, 0.85), vae) == []
    assert [each.code for each in compare_with_constants(MEANS, (1.0, 1.0, 1.0, 1.0), vae)] == ["wrong-scaling"]


def make_content(**changes: Any) -> dict[str, Any]:
    content = {"count": 1000, "mean": list(MEANS), "std": list(STDS), "min": [-9.0] * 4, "max": [9.0] * 4}
    return content | {"rejected": {}, "filtered": {}, "enlarged": 0} | changes


@pytest.mark.parametrize(
    ("changes", "codes"),
    [
        ({}, []),
        ({"std": [2.0, 0.4, 0.0, 3.0]}, ["dead-channel"]),
        ({"max": [9.0, 65504.0, 9.0, 9.0]}, ["saturated-channel"]),
        ({"rejected": {"corrupt": 10}}, []),
        ({"rejected": {"corrupt": 11}}, ["rejects"]),
        ({"enlarged": 250}, []),
        ({"enlarged": 251}, ["enlarged"]),
        ({"count": 99, "std": [1.0, 0.2, 0.25, 1.5]}, []),  # too few rows for the constants
    ],
)
def test_records_have_findings(changes: dict[str, Any], codes: list[str]) -> None:
    assert [finding.code for finding in find_in_records(make_content(**changes), make_vae())] == codes


def make_parts(count: int = 12) -> Parts:
    rng = np.random.default_rng(0)
    mean, std = rng.normal(0, 0.05, (count, 4)), rng.normal(1, 0.05, (count, 4))
    return Parts(files=[f"data/{number}" for number in range(count)], rows=np.full(count, 100), mean=mean, std=std)


def test_a_part_that_differs_from_all_others_is_named() -> None:
    parts = make_parts()
    assert find_unusual_parts(parts) == []
    parts.std[3] *= 8
    (finding,) = find_unusual_parts(parts)
    assert [example.key for example in finding.examples] == ["data/3"]
    parts.rows[3] = 7
    assert find_unusual_parts(parts) == []


def make_sample(count: int = 60, **changes: Any) -> Sample:
    """Return a sample of smooth latents with nothing wrong."""
    rng = np.random.default_rng(1)
    numbers = range(count)
    sample = Sample(
        total=count,
        file=[f"data/{number // 10}" for number in numbers],
        index=[number % 10 for number in numbers],
        keys=[f"k{number}" for number in numbers],
        shards=["s"] * count,
        mean=rng.normal(0, 1, (count, 4)).astype(np.float32),
        std=np.exp(rng.normal(0, 0.3, (count, 4))).astype(np.float32),
        roughness=np.full(count, 0.5, np.float32),
        flatness=np.full(count, 0.5, np.float32),
        signature=rng.normal(0, 1, (count, 64)).astype(np.float32),
        hashes=[bytes([number]) for number in numbers],
        finite=np.ones(count, bool),
        clipped=np.zeros(count, np.float32),
        captions=[f"text {number}" for number in numbers],
        sizes=np.full((count, 2), 100),
        scale=np.ones(count, np.float32),
        counts=np.zeros((4, 8), np.int64),
        edges=np.zeros((4, 9)),
    )
    return dataclasses.replace(sample, **changes)


def changed(values: Any, rows: slice | int, value: Any) -> np.ndarray:
    copy = np.array(values)
    copy[rows] = value
    return copy


def find(**changes: Any) -> list[str]:
    return [finding.code for finding in find_in_sample(make_sample(**changes))]


def test_a_sample_has_findings() -> None:
    good = make_sample()
    assert find() == []
    assert find(finite=changed(good.finite, 5, False)) == ["not-finite"]
    assert find(clipped=changed(good.clipped, slice(4), 0.5)) == ["saturated-channel"]
    assert find(flatness=changed(good.flatness, 5, 0.01)) == ["constant-images"]
    assert find(hashes=[b"0", *good.hashes[:-1]]) == ["duplicates"]
    assert find(signature=changed(good.signature, 0, good.signature[1] * 1.01)) == ["near-duplicates"]
    assert find(roughness=changed(good.roughness, slice(10), 1.13)) == ["noisy-unit"]
    assert find(roughness=changed(good.roughness, slice(5), 1.13)) == []  # only half of the file
    assert find(mean=changed(good.mean, 3, 90.0), std=changed(good.std, 3, 90.0)) == ["outliers"]
    assert find(captions=[None, "", *good.captions[2:]]) == ["missing-captions"]  # type: ignore[index]
    assert find(captions=["a"] * 10 + list(good.captions[10:])) == ["repeated-captions"]  # type: ignore[index]
    assert find(scale=changed(good.scale, 7, 2.5)) == ["enlarged-most"]


def test_constant_images_are_not_called_duplicates() -> None:
    good = make_sample()
    flat = changed(good.flatness, slice(3), 0.0)
    signature = changed(good.signature, slice(3), 0.0)
    assert find(flatness=flat, signature=signature, hashes=[b"x"] * 3 + list(good.hashes[3:])) == ["constant-images"]


def test_a_sample_is_bounded_and_seeded(tmp_path: Any) -> None:
    write_cache(tmp_path, CacheSpec(buckets={(64, 64): 200, (64, 96): 100}, parts=5))
    cache = Cache.open(str(tmp_path))
    sample, again = (read_sample(cache, [0.0] * 4, [1.0] * 4, 50) for _ in range(2))
    assert sample is not None and again is not None
    assert (sample.total, sample.keys) == (300, again.keys)
    assert 50 <= len(sample) <= 60
    everything = read_sample(cache, [0.0] * 4, [1.0] * 4, 0)
    assert everything is not None
    assert sorted(everything.keys) == [f"{number:09d}" for number in range(300)]
    for file, index, key in zip(sample.file, sample.index, sample.keys, strict=True):
        assert next(iter(cache.rows(file, ["key"], [index])))["key"] == key
    parts = read_parts(cache)
    assert parts is not None and parts.rows.sum() == 300
    assert np.allclose(parts.std, 1, atol=0.05)


def test_equal_latents_are_found_in_the_whole_cache(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cache(tmp_path, CacheSpec(buckets={(64, 64): 100}, parts=4))
    cache = Cache.open(str(tmp_path))
    assert find_equal_rows(cache) == []
    draw = torch.randn
    same = lambda shape, generator: draw(shape, generator=generator.manual_seed(0))  # noqa: E731  # in all parts
    monkeypatch.setattr(torch, "randn", same)
    write_cache(tmp_path / "equal", CacheSpec(buckets={(64, 64): 100}, parts=4))
    (finding,) = find_equal_rows(Cache.open(str(tmp_path / "equal")))
    assert finding.sentence.startswith("75 of 100 rows (75.0%)")
    (file, first), (other, second) = finding.examples[0].places
    assert (first, file != other) == (second, True)


def test_a_signature_of_a_short_side_has_the_same_size() -> None:
    assert shrink(np.ones((4, 2, 8), np.float32)).shape == (4, 16)
    assert shrink(np.arange(64, dtype=np.float32).reshape(1, 8, 8))[0, 0] == 4.5


def test_numbers_are_joined() -> None:
    assert [join([1]), join([1, 2]), join([1, 2, 3])] == ["1", "1 and 2", "1, 2 and 3"]
