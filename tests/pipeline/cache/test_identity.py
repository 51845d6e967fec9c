import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from latentmill.cache_info import parse_cache_json
from pipeline.cache import identity
from pipeline.cache.identity import Identity, SourceRules, encode_cache_json
from pipeline.cache.preprocessing import describe_transform, parse_transform
from pipeline.canonical_json import with_checksum
from pipeline.errors import CacheError, IdentityError
from pipeline.images.decode_settings import DecodeSettings
from pipeline.images.transform import Transform
from pipeline.storage.folder import Folder
from tests.cache_infos import IDENTITY, info_of
from tests.conftest import MICRO
from vae import AutoencoderKLConfig

# For each field of an identity: another value, and how the cache's value and the other one are named.
DIFFERENCES: dict[str, tuple[Any, str, str]] = {
    "weights": ("v" * 64, "a VAE whose weights have the sha256 wwwwwwwwwwww...", "the sha256 vvvvvvvvvvvv..."),
    "config": ({"latent_channels": 8}, "a VAE that has latent_channels 4", "a VAE that has latent_channels 8"),
    "preprocessing": (Transform(resolution=96), "--resolution 64", "--resolution 96"),
    "store": ("moments", "--store mode", "--store moments"),
    "dtype": ("float32", "--dtype float16", "--dtype float32"),
    "precision": ("bf16", "--precision fp32", "--precision bf16"),
    "tile_above": (64, "--tile-above 0", "--tile-above 64"),
    "rows_per_part": (20, "--rows-per-part 10", "--rows-per-part 20"),
    "seed": (1, "--seed 0", "--seed 1"),
    "container": ("webdataset", "--format parquet", "--format webdataset"),
    "columns": (("txt", "json"), "--columns all", "--columns 'txt,json'"),
    "image_column": ("jpg", "no --image-column", "--image-column jpg"),
    "sources": (SourceRules(exclude=("*_mask.png",)), "no --exclude", "--exclude '*_mask.png'"),
    "key_column": ("id", "no --key-column", "--key-column id"),
}
BUCKETS: dict[str, Any] = {"buckets": ((64, 64),), "multiple_of": 64}
WIDE = ((128, 128), (64, 256))


def decoded(**settings: Any) -> dict[str, Any]:
    return {"decoding": DecodeSettings(**settings)}


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Identity)])
def test_every_field_counts_and_is_named_if_it_differs(field: str, tmp_path: Path) -> None:
    cache = Folder(str(tmp_path))
    value, before, after = DIFFERENCES[field]
    value = describe_transform(value) if field == "preprocessing" else value
    other = dataclasses.replace(IDENTITY, **{field: value})
    assert other.sha256 != IDENTITY.sha256
    assert identity.create_or_load(cache, info_of(IDENTITY)) == info_of(IDENTITY)
    pattern = f"{re.escape(f'was made with {before}, this command has ')}.*{re.escape(after)}; use"
    with pytest.raises(IdentityError, match=pattern):
        identity.create_or_load(cache, info_of(other))
    assert (tmp_path / "cache.json").read_bytes() == encode_cache_json(with_checksum(info_of(IDENTITY).to_dict()))


@pytest.mark.parametrize(
    ("cached", "wanted", "before", "after"),
    [
        ({}, BUCKETS, "--resolution 64", "--buckets 64"),
        (BUCKETS | {"multiple_of": 32}, BUCKETS | {"buckets": WIDE}, "--multiple-of 32", "--multiple-of 64"),
        (BUCKETS, BUCKETS | {"buckets": WIDE}, "the buckets 64x64", "the buckets 128x128, 64x256"),
        ({}, {"min_size": 5, "crop": "random"}, "--min-size 0 and --crop center", "--min-size 5 and --crop random"),
        ({}, {"interpolation": "lanczos"}, "--interpolation bicubic", "--interpolation lanczos"),
        ({}, {"jpeg_decode": "scaled"}, "--jpeg-decode full", "--jpeg-decode scaled"),
        ({"jpeg_decode": "scaled"}, {}, "--jpeg-decode scaled", "--jpeg-decode full"),
        ({}, {"flip": "random"}, "--flip none", "--flip random"),
        ({}, {"flip": "both"}, "--flip none", "--flip both"),
        ({}, {"min_std": 2.5}, "--min-std 0", "--min-std 2.5"),
        ({}, decoded(exif="ignore"), "--exif apply", "--exif ignore"),
        (decoded(alpha="drop"), decoded(alpha="black"), "--alpha drop", "--alpha black"),
        ({}, decoded(color="srgb"), "--color keep", "--color srgb"),
        (decoded(allow_truncated=True), {}, "--allow-truncated", "no --allow-truncated"),
    ],
)
def test_every_setting_of_the_preprocessing_is_named_if_it_differs(
    cached: dict[str, Any], wanted: dict[str, Any], before: str, after: str
) -> None:
    """The numbers of the buckets are named only if no option explains them."""
    first, second = (
        dataclasses.replace(IDENTITY, preprocessing=describe_transform(Transform(resolution=64, **settings)))
        for settings in (cached, wanted)
    )
    with pytest.raises(IdentityError) as raised:
        identity.check_same_identity("/c", first, second)
    message = f"was made with {before}, this command has {after}; use the settings of the cache, or another --to"
    assert str(raised.value) == f"the cache /c {message}"


def test_another_version_of_the_preprocessing_is_named() -> None:
    later = dataclasses.replace(IDENTITY.preprocessing, version=99)
    with pytest.raises(IdentityError, match="this command has version 99 of the preprocessing; use"):
        identity.check_same_identity("/c", IDENTITY, dataclasses.replace(IDENTITY, preprocessing=later))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "is not a latentmill cache: in its cache.json, the field 'format' is missing"),
        ("not json", "is not a latentmill cache: its cache.json is not JSON"),
        ('{"format": 2}', "has cache format 2; this version knows 1"),
        (json.dumps({**info_of(IDENTITY).to_dict(), "identity_sha256": "0" * 64}), "was changed by hand"),
    ],
)
def test_a_broken_cache_json_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "cache.json").write_text(text)
    with pytest.raises(CacheError, match=message):
        identity.read_cache_json(Folder(str(tmp_path)))


def test_scaling_is_not_part_of_the_identity() -> None:
    plain = AutoencoderKLConfig(**MICRO)
    scaled = dataclasses.replace(plain, scaling_factor=0.5, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4)
    deeper = dataclasses.replace(plain, layers_per_block=2)
    assert identity.select_raw_fields(plain) == identity.select_raw_fields(scaled)
    assert identity.select_raw_fields(plain) != identity.select_raw_fields(deeper)


@pytest.mark.parametrize(
    ("resolution", "dtype", "store", "flip", "rows"),
    [
        (256, "float16", "mode", "none", 4096),
        (2048, "float16", "mode", "random", 512),
        (2048, "float16", "mode", "both", 256),
        (2048, "bfloat16", "moments", "none", 256),
        (2048, "bfloat16", "moments", "both", 128),
        (2048, "float32", "sample", "none", 256),
    ],
)
def test_a_part_has_up_to_4096_rows_and_256_mib(resolution: int, dtype: str, store: str, flip: str, rows: int) -> None:
    assert identity.choose_rows_per_part(AutoencoderKLConfig(**MICRO), resolution, dtype, store, flip) == rows


def test_the_transform_is_parsed_from_the_identity() -> None:
    transform = Transform(
        resolution=96,
        min_size=5,
        min_std=1.5,
        interpolation="lanczos",
        jpeg_decode="scaled",
        crop="random",
        flip="random",
        seed=7,
        decoding=DecodeSettings(exif="ignore", alpha="drop", color="srgb", allow_truncated=True),
    )
    wanted = dataclasses.replace(IDENTITY, preprocessing=describe_transform(transform), seed=7)
    data = encode_cache_json(info_of(wanted).to_dict())
    assert parse_transform(parse_cache_json(data, "c").identity) == transform


def test_a_cache_that_another_job_creates_meanwhile_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, is_empty = Folder(str(tmp_path)), Folder.is_empty

    def create_first(self: Folder) -> bool:
        cache.create(identity.NAME, b'{"format": 99}')
        return is_empty(self)

    monkeypatch.setattr(Folder, "is_empty", create_first)
    with pytest.raises(CacheError, match="has cache format 99"):
        identity.read_cache_json(cache)
