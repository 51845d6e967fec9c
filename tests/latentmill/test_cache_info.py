"""cache.json as a typed object: an error names the file and the field."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest

from latentmill import CacheError
from latentmill.cache_info import SourceRules, parse_cache_json
from latentmill.canonical_json import canonical_json
from pipeline.cache.identity import encode_cache_json
from pipeline.cache.preprocessing import describe_transform
from pipeline.canonical_json import with_checksum
from pipeline.images.decode_settings import DecodeSettings
from pipeline.images.transform import Transform
from tests.cache_infos import IDENTITY, info_of

BUCKETS = Transform(resolution=96, buckets=((64, 128), (128, 64)), multiple_of=64, crop="random", flip="random")


def make_content(**identity_fields: Any) -> dict[str, Any]:
    """Return the content of a cache.json, as types of JSON."""
    info = info_of(dataclasses.replace(IDENTITY, **identity_fields))
    content = json.loads(encode_cache_json(with_checksum(info.to_dict())))
    assert isinstance(content, dict)
    return content


def encode_with_sha256(content: dict[str, Any]) -> bytes:
    """Return a cache.json with the sha256 of its identity."""
    sha256 = hashlib.sha256(canonical_json(content["identity"])).hexdigest()
    return encode_cache_json({**content, "identity_sha256": sha256})


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"preprocessing": describe_transform(BUCKETS)},
        {"preprocessing": describe_transform(Transform(resolution=64, jpeg_decode="scaled"))},
        {"columns": ("txt", "caption"), "tile_above": 2048, "image_column": "image", "key_column": "id"},
        {"sources": SourceRules(text_encoding="cp1252", exclude=("*.gif",), classes=("cat", "dog"))},
        {"store": "moments", "dtype": "bfloat16", "config": {"block_out_channels": [8, 8], "mid": {"a": None}}},
    ],
)
def test_parsing_and_writing_preserves_every_byte(fields: dict[str, Any]) -> None:
    info = info_of(dataclasses.replace(IDENTITY, **fields))
    data = encode_cache_json(with_checksum(info.to_dict()))
    parsed = parse_cache_json(data, "s3://b/c")
    assert parsed == info
    assert encode_cache_json(with_checksum(parsed.to_dict())) == data
    assert parsed.identity.sha256 == info.identity_sha256


def test_the_sha256_of_an_identity_is_stable() -> None:
    """The text is from earlier caches. With another sha256, no job could resume them."""
    text = (
        '{"columns":null,"config":{"latent_channels":4},"container":"parquet","dtype":"float16","image_column":null,'
        '"key_column":null,"precision":"fp32","preprocessing":{"buckets":null,"crop":"center","flip":"none",'
        '"interpolation":"bicubic","min_size":0,"multiple_of":null,"resolution":64,"version":1},"rows_per_part":10,'
        f'"seed":0,"store":"mode","tile_above":null,"weights":"{"w" * 64}"}}'
    )
    assert canonical_json(IDENTITY.to_dict()) == text.encode()
    assert IDENTITY.sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_the_identity_has_settings_of_decoding_only_if_they_are_no_defaults() -> None:
    settings = DecodeSettings(exif="ignore", alpha="drop", color="srgb", allow_truncated=True)
    described = describe_transform(Transform(resolution=64, decoding=settings))
    content = dataclasses.replace(IDENTITY, preprocessing=described).to_dict()["preprocessing"]
    plain = IDENTITY.to_dict()["preprocessing"]
    assert content == plain | {"exif": "ignore", "alpha": "drop", "color": "srgb", "allow_truncated": True}
    assert not plain.keys() & {"exif", "alpha", "color", "allow_truncated"}


def test_the_identity_has_jpeg_decode_only_if_jpegs_are_decoded_at_a_reduced_size() -> None:
    scaled = describe_transform(Transform(resolution=64, jpeg_decode="scaled"))
    content = make_content(preprocessing=scaled)["identity"]["preprocessing"]
    assert content.pop("jpeg_decode") == "scaled"
    assert content == make_content()["identity"]["preprocessing"]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (("identity",), "identity"),
        (("identity", "weights"), "identity.weights"),
        (("identity", "preprocessing", "crop"), "identity.preprocessing.crop"),
        (("identity_sha256",), "identity_sha256"),
        (("compute", "threads"), "compute.threads"),
        (("vae", "latents_mean"), "vae.latents_mean"),
        (("schema",), "schema"),
        (("columns", "texts"), "columns.texts"),
    ],
)
def test_a_missing_field_is_named_with_the_file(path: tuple[str, ...], name: str) -> None:
    content = make_content()
    parent = content
    for step in path[:-1]:
        parent = parent[step]
    del parent[path[-1]]
    text = rf"^s3://b/c is not a latentmill cache: in its cache\.json, the field '{name}' is missing$"
    with pytest.raises(CacheError, match=text):
        parse_cache_json(encode_cache_json(content), "s3://b/c")


def set_field(*path: str, to: object) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for step in path[:-1]:
            content = content[step]
        content[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (set_field("identity", "seed", to="7"), "'identity.seed' must be an integer, not '7'"),
        (set_field("identity", "seed", to=True), "'identity.seed' must be an integer, not True"),
        (set_field("identity", "dtype", to="int8"), "'identity.dtype' must be one of float16, bfloat16, float32, not"),
        (set_field("identity", "columns", to="txt"), "'identity.columns' must be a list, not 'txt'"),
        (set_field("identity", "columns", to=["txt", 1]), r"'identity.columns\[1\]' must be a string, not 1"),
        (set_field("identity", "config", to=[]), "'identity.config' must be an object, not"),
        (
            set_field("identity", "preprocessing", "buckets", to=[[64, 64], [64]]),
            r"'identity.preprocessing.buckets\[1\]' must have 2 values, not 1",
        ),
        (set_field("vae", to=[]), r"'vae' must be an object, not \[\]"),
        (set_field("vae", "scaling_factor", to=None), "'vae.scaling_factor' must be a number, not None"),
        (set_field("compute", "form", to="fast"), "'compute.form' must be one of auto, plain, fused, compiled, not"),
        (set_field("schema", to=None), "'schema' must be a list, not None"),
        (set_field("schema", to=[{"name": "key"}]), r"'schema\[0\].type' is missing"),
        (set_field("columns", "arrow_schema", to="AAAA"), "'columns.arrow_schema' is not a schema of Arrow"),
    ],
)
def test_a_field_of_another_type_is_named(change: Callable[[dict[str, Any]], None], text: str) -> None:
    content = make_content()
    change(content)
    with pytest.raises(CacheError, match=rf"^/c is not a latentmill cache: in its cache\.json, the field {text}"):
        parse_cache_json(encode_with_sha256(content), "/c")


@pytest.mark.parametrize("path", [("identity", "rotate"), ("identity", "preprocessing", "rotate")])
def test_an_identity_of_a_later_version_is_refused(path: tuple[str, ...]) -> None:
    content = make_content()
    set_field(*path, to=90)(content)
    with pytest.raises(CacheError, match=rf"has the field '{'.'.join(path)}', which this version of latentmill does"):
        parse_cache_json(encode_with_sha256(content), "/c")


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"\xff", b"[" * 100_000])
def test_a_cache_json_that_is_not_an_object_is_refused(data: bytes) -> None:
    with pytest.raises(CacheError, match=r"^/c is not a latentmill cache: its cache\.json is not "):
        parse_cache_json(data, "/c")
