"""Batches: values, sizes, draws and columns are those of the rows, whatever else is in the batch."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from latentmill import Cache, time_ids
from latentmill.cache_files import read_stats
from latentmill.errors import UsageError
from latentmill.loading.batch import BatchSettings, check_settings, draw, make_batch
from latentmill.loading.index import read_index
from latentmill.loading.row_groups import GroupReader
from latentmill.micro_conditioning import Convention
from latentmill.part_files import to_tensor
from vae.posterior import DiagonalGaussianDistribution

Make = Callable[..., Cache]


def batch_of(cache: Cache, rows: list[int], *, epoch: int = 0, seed: int = 0, **settings: Any) -> dict[str, Any]:
    """Return a batch of rows of the first bucket, by their number among all rows of this bucket."""
    index = read_index(cache)
    rules = check_settings(cache, BatchSettings(**settings))
    numbers = np.flatnonzero(np.repeat(index.bucket, index.rows) == 0)[rows]
    reader = GroupReader(cache, index, rules.columns)
    groups = {group: reader.read(group) for group in range(len(index.rows)) if index.bucket[group] == 0}
    return make_batch(rules, index, groups, numbers, seed=seed, epoch=epoch, step=7)


def rows_of(cache: Cache, numbers: list[int]) -> list[dict[str, Any]]:
    rows = [row for file in cache.files() for row in cache.rows(file) if (row["height"], row["width"]) == (64, 64)]
    return [rows[number] for number in numbers]


def stack(rows: list[dict[str, Any]], column: str = "latent") -> Tensor:
    return torch.stack([to_tensor(row, column) for row in rows])


@pytest.mark.parametrize("container", ["parquet", "webdataset"])
def test_a_batch_has_the_rows_in_the_order_asked_for(make: Make, container: str) -> None:
    cache, numbers = make(container=container), [0, 9, 3, 10, 5]
    rows, batch = rows_of(cache, numbers), batch_of(cache, numbers)
    assert batch["latents"].dtype == torch.float32 and batch["latents"].is_contiguous()
    assert torch.equal(batch["latents"], cache.scaling.to_model(stack(rows).float()))
    for name, column in (("key", "key"), ("shard", "shard"), ("captions", "txt")):
        assert batch[name] == [row[column] for row in rows]
    assert batch["valid"].tolist() == [True] * 5 and batch["flipped"].tolist() == [False] * 5
    assert (batch["epoch"], batch["step"], batch["bucket"]) == (0, 7, (64, 64))
    expected = torch.tensor([time_ids(row) for row in rows])
    assert torch.equal(batch["time_ids"], expected)
    parts = (batch["original_size"], batch["crop_top_left"], batch["target_size"])
    assert torch.equal(torch.cat(parts, 1), expected) and all(part.is_contiguous() for part in parts)
    assert set(batch) == {"latents", "captions", "key", "shard", "flipped", "valid", "epoch", "step", "bucket"} | {
        "original_size", "crop_top_left", "target_size", "time_ids",
    }  # fmt: skip


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32"])
def test_values_can_stay_as_they_are_stored(make: Make, stored: str) -> None:
    cache = make(dtype=stored)
    raw = stack(rows_of(cache, [4, 1]))
    as_stored = batch_of(cache, [4, 1], scale=False, dtype=None)["latents"]
    assert as_stored.dtype == raw.dtype == getattr(torch, stored) and torch.equal(as_stored, raw)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(batch_of(cache, [4, 1], scale=False, dtype=dtype)["latents"], raw.to(dtype))
        scaled = batch_of(cache, [4, 1], dtype=dtype)["latents"]
        assert torch.equal(scaled, cache.scaling.to_model(raw.float()).to(dtype)), "computed in float32"


def test_the_latents_of_flux2_are_packed(make: Make) -> None:
    cache = make()
    constants = {"patch_size": (2, 2), "latents_mean": tuple(range(16)), "latents_std": tuple(range(1, 17))}
    vae = replace(cache.info.vae, scaling_factor=1.0, shift_factor=None, **constants)
    packed = replace(cache, info=replace(cache.info, vae=vae))
    raw, latents = stack(rows_of(cache, [3, 6])), batch_of(packed, [3, 6])["latents"]
    assert latents.shape == (2, 16, 4, 4) and latents.is_contiguous()
    assert torch.equal(latents, packed.scaling.to_model(raw.float()))
    expected = (float(raw[1, 1, 4, 7]) - 5) / 6
    assert float(latents[1, 5, 2, 3]) == pytest.approx(expected), "channel, row, column"


def test_the_statistics_of_the_cache_scale_it_to_zero_mean_and_unit_variance(make: Make) -> None:
    cache = make(buckets={(64, 64): 40})
    latents = batch_of(cache, list(range(40)), scale="dataset")["latents"]
    assert latents.mean((0, 2, 3)).abs().max() < 1e-5
    assert (latents.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-5
    stats = read_stats(cache.folder)
    assert stats is not None
    mean, std = (torch.tensor(stats[name]).view(-1, 1, 1) for name in ("mean", "std"))
    raw = stack(rows_of(cache, [0])).float()
    assert torch.allclose(latents[:1], (raw - mean) / std, atol=1e-6)


def test_moments_give_the_mean_a_draw_or_themselves(make: Make) -> None:
    cache = make(store="moments")
    moments = stack(rows_of(cache, [2, 8]))
    mean, logvar = moments.float().chunk(2, 1)
    assert torch.equal(batch_of(cache, [2, 8])["latents"], cache.scaling.to_model(mean))
    assert torch.equal(batch_of(cache, [2, 8], scale=False, dtype=None)["latents"], moments[:, :4])
    batch = batch_of(cache, [2, 8], sample="moments")
    assert "latents" not in batch and torch.equal(batch["moments"], moments.float())
    assert torch.equal(batch_of(cache, [2, 8], sample="moments", dtype=None)["moments"], moments)
    drawn = batch_of(cache, [2, 8], sample="posterior", scale=False)["latents"]
    noise = (drawn - mean) / (0.5 * logvar).exp()
    assert noise.std() == pytest.approx(1, abs=0.1) and noise.mean().abs() < 0.1
    half = batch_of(cache, [2, 8], sample="posterior", scale=False, dtype=None)["latents"]
    assert torch.equal(half, drawn.half())
    scaled = batch_of(cache, [2, 8], sample="posterior")["latents"]
    assert torch.equal(scaled, cache.scaling.to_model(drawn))


def test_draws_depend_on_seed_epoch_and_row_alone(make: Make) -> None:
    cache = make(store="moments", flip="both")
    settings = {"sample": "posterior", "flip": "random"}
    whole = batch_of(cache, list(range(11)), **settings)
    for numbers in ([7, 2], [2], [10, 9, 8, 7]):
        batch = batch_of(cache, numbers, **settings)
        assert torch.equal(batch["latents"], whole["latents"][numbers])
        assert torch.equal(batch["flipped"], whole["flipped"][numbers])
    for change in ({"epoch": 1}, {"seed": 1}):
        other = batch_of(cache, list(range(11)), **settings, **change)
        assert not torch.equal(other["latents"], whole["latents"])
        assert other["flipped"].tolist() != whole["flipped"].tolist()
    noise = batch_of(cache, [0, 1], sample="posterior", scale=False)["latents"]
    rows = stack(rows_of(cache, [0, 1])).float()
    first, second = (noise - rows[:, :4]) / (0.5 * rows[:, 4:]).exp()
    assert not torch.allclose(first, second), "each row has its own"


@pytest.mark.parametrize("convention", get_args(Convention))
@pytest.mark.parametrize("flip", ["none", "random", "both"])
def test_sizes_are_those_of_time_ids(make: Make, convention: Convention, flip: str) -> None:
    cache, numbers = make(flip=flip), list(range(11))
    own = {"flip": "random"} if flip == "both" else {}
    batch = batch_of(cache, numbers, conditioning=convention, **own)
    rows, flipped = rows_of(cache, numbers), batch["flipped"].tolist()
    assert len(set(flipped)) == (1 if flip == "none" else 2)
    assert batch["time_ids"].tolist() == [
        list(time_ids(row, convention, is_flipped)) for row, is_flipped in zip(rows, flipped, strict=True)
    ]
    column = ["latent_flipped" if flip == "both" and is_flipped else "latent" for is_flipped in flipped]
    expected = torch.stack([to_tensor(row, name) for row, name in zip(rows, column, strict=True)])
    assert torch.equal(batch["latents"], cache.scaling.to_model(expected.float()))
    assert flip != "both" or not batch_of(cache, numbers)["flipped"].any()


SCHEMA = pa.schema(
    {
        "label": pa.int32(),
        "score": pa.float64(),
        "ratio": pa.float32(),
        "good": pa.bool_(),
        "tags": pa.list_(pa.string()),
    }
)


def make_columns(number: int) -> dict[str, Any]:
    row = {"label": number, "score": number / 3, "ratio": None, "good": number % 2 == 0, "tags": ["a", str(number)]}
    return row | ({"label": None} if number == 4 else {})


@pytest.mark.parametrize("container", ["parquet", "webdataset"])
def test_numbers_become_tensors_and_other_columns_lists(make: Make, container: str) -> None:
    cache = make(container=container, schema=SCHEMA, columns=make_columns)
    batch = batch_of(cache, [2, 0], columns=("label", "score", "ratio", "good", "tags", "height"))
    values = {name: batch[name] for name in ("label", "score", "ratio", "good", "height")}
    assert {name: (tensor.dtype, tensor.tolist()[:1]) for name, tensor in values.items() if name != "ratio"} == {
        "label": (torch.int64, [2]),
        "score": (torch.float64, [2 / 3]),
        "good": (torch.bool, [True]),
        "height": (torch.int64, [64]),
    }
    assert batch["ratio"].dtype == torch.float32 and batch["ratio"].isnan().all()
    assert batch["tags"] == [["a", "2"], ["a", "0"]]
    assert batch["captions"] == [None, None], "the cache has no txt"
    assert batch_of(cache, [1], caption_column="tags")["captions"] == [["a", "1"]]
    batch_of(cache, [4], columns=("score",))
    with pytest.raises(UsageError, match=r"^the column label has no value in the row 000000004 of shards/00000\.tar"):
        batch_of(cache, [3, 4], columns=("label",))


@pytest.mark.parametrize(
    ("form", "settings", "reason"),
    [
        (
            {},
            {"columns": ("txt", "cap")},
            r"the cache \S+ has no column cap; it has txt, json, height, width, original_",
        ),
        ({}, {"caption_column": "cap"}, r"has no column cap; it has txt, json"),
        ({}, {"columns": ("latent",)}, r"has no column latent; it has"),
        (
            {},
            {"sample": "posterior"},
            r"sample='posterior' needs a cache that was made with --store moments; \S+ was made",
        ),
        ({}, {"sample": "moments"}, r"sample='moments' needs a cache that was made with --store moments"),
        (
            {"store": "sample"},
            {"sample": "mode"},
            r"sample='mode' needs .* --store mode or moments; .* --store sample$",
        ),
        ({}, {"sample": "mean"}, r"sample='mean' is not one of None, 'mode', 'posterior', 'moments'"),
        ({}, {"dtype": None}, r"dtype=None gives latents as they are stored, so it needs scale=False"),
        ({}, {"scale": "measured"}, r"scale='measured' is not one of True, False, 'dataset'"),
        ({}, {"flip": "both"}, r"flip='both' is not one of 'none', 'random'"),
        ({"flip": "random"}, {"flip": "random"}, r"flip='random' needs latents of the flipped images, .*--flip both$"),
        ({}, {"conditioning": "sdxl"}, r"conditioning='sdxl' is not one of 'diffusers', 'sd-scripts', 'simpletuner'"),
        ({"store": "moments"}, {"sample": "moments", "scale": "dataset"}, r"scale='dataset' does not apply to"),
    ],
)
def test_settings_that_the_cache_does_not_allow_are_refused(
    make: Make, form: dict[str, Any], settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UsageError, match=reason):
        check_settings(make(**form), BatchSettings(**settings))


def test_the_statistics_of_the_cache_are_needed_to_scale_by_them(make: Make) -> None:
    cache = make()
    stats = Path(cache.folder.url, "stats.json")
    constant = re.sub(r'"std": \[[^]]*]', '"std": [0.0, 1.0, 1.0, 1.0]', stats.read_text(), count=1)
    stats.write_text(constant)
    with pytest.raises(UsageError, match=r"scale='dataset' is not possible: a channel of the cache .* is constant"):
        check_settings(cache, BatchSettings(scale="dataset"))
    stats.unlink()
    with pytest.raises(
        UsageError, match=r"scale='dataset' needs stats\.json, which the cache .* run the encode command to its end$"
    ):
        check_settings(cache, BatchSettings(scale="dataset"))


def test_a_column_with_the_name_of_an_entry_can_only_be_the_caption(make: Make) -> None:
    cache = make(schema=pa.schema({"valid": pa.string()}), columns=lambda number: {"valid": f"v{number}"})
    with pytest.raises(UsageError, match="the column valid has the name of an entry that each batch has"):
        check_settings(cache, BatchSettings(columns=("valid",)))
    assert batch_of(cache, [3], caption_column="valid")["captions"] == ["v3"]


def test_a_public_draw_is_that_of_the_posterior() -> None:
    moments = torch.randn(3, 8, 4, 5) * 30
    before = moments.clone()
    ours = draw(moments, torch.Generator().manual_seed(1))
    theirs = DiagonalGaussianDistribution(moments).sample(torch.Generator().manual_seed(1))
    assert torch.allclose(ours, theirs) and ours.shape == (3, 4, 4, 5)
    single = draw(moments[0].half(), torch.Generator().manual_seed(1))
    assert single.shape == (4, 4, 5) and single.dtype == torch.float16
    assert draw(moments).shape == (3, 4, 4, 5)
    assert torch.equal(moments, before)
