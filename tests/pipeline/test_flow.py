"""A unit from its shard to the files in the cache, with rejects, errors and interruptions."""

import dataclasses
import gc
import hashlib
import json
import subprocess
import sys
import threading
import tracemalloc
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from latentmill import group_spans
from latentmill.part_files import to_tensor
from pipeline.cache import commits
from pipeline.cache.commit_scan import CacheScan
from pipeline.cache.parts import read_record
from pipeline.cache.reader import read_rows
from pipeline.cache.stats import compute_stats
from pipeline.encoder import ComputeConfig, LatentEncoder, LaunchedBatch, is_out_of_memory
from pipeline.errors import CacheError, Rejected, ShardError, SourceError, Stopped, VaeError
from pipeline.flow import UnitWorker
from pipeline.formats import parquet
from pipeline.formats.part_record import PartRecord
from pipeline.formats.schema import OutputSchema, PassthroughColumns
from pipeline.images.transform import Transform
from pipeline.limits import Limits
from pipeline.part_writer import fill_part
from pipeline.readers.unit import read_samples
from pipeline.records import Attempt, Form, PreparedImage, Unit
from pipeline.storage.folder import Folder
from pipeline.timing import StageTimer
from pipeline.weights import Vae
from tests.conftest import img2dataset_members, slow_param, write_tar
from tests.pipeline.conftest import CPU, unit_of


def test_texts_of_parquet_columns_have_a_limit(worker: Callable[..., UnitWorker], tmp_path: Path) -> None:
    texts = ["x" * 400, "\u00e9" * 400, "\u00e9" * 401, None]
    jpegs = [data for name, data in img2dataset_members(0, 4).items() if name.endswith("jpg")]
    (tmp_path / "s").mkdir()
    table = pa.table({"jpg": jpegs, "text": texts})
    pq.write_table(table, tmp_path / "s/0.parquet")
    layout = OutputSchema(columns=PassthroughColumns(table.schema.remove(0), ()))
    report = worker(tmp_path / "c", layout=layout, limits=Limits(text_bytes=800)).run(unit_of(tmp_path / "s/0.parquet"))
    assert (report.rows, report.rejects) == (3, {"text_too_long": 1})


def test_texts_inside_other_values_have_the_same_limit(worker: Callable[..., UnitWorker], tmp_path: Path) -> None:
    tags = [["x" * 8, "y" * 8], ["x" * 9], [], None]
    notes = [{"by": "z" * 8}, None, {"by": "z" * 9}, {"by": None}]
    jpegs = [data for name, data in img2dataset_members(0, 4).items() if name.endswith("jpg")]
    (tmp_path / "s").mkdir()
    table = pa.table({"jpg": jpegs, "tags": tags, "notes": notes})
    pq.write_table(table, tmp_path / "s/0.parquet")
    layout = OutputSchema(columns=PassthroughColumns(table.schema.remove(0), ()))
    report = worker(tmp_path / "c", layout=layout, limits=Limits(text_bytes=8)).run(unit_of(tmp_path / "s/0.parquet"))
    assert (report.rows, report.rejects) == (2, {"text_too_long": 2})


def test_the_columns_of_a_part_have_a_memory_limit(worker: Callable[..., UnitWorker], tmp_path: Path) -> None:
    """Each row has the same share of the limit, so a reject depends only on the sample's own columns."""
    members = img2dataset_members(0, 64, height=64, width=64)
    small, large = ("x" * (60 << 10)).encode(), ("y" * (1 << 20)).encode()
    for number in range(64):
        members[f"{number:09d}.txt"] = large if number % 2 else small
    unit = unit_of(write_tar(tmp_path / "s/0.tar", members))

    def measure_peak(cache: Path, limits: Limits) -> tuple[int, dict[str, int]]:
        """Return the peak of Python's memory while the unit is encoded, in bytes, and the rejects."""
        encoder = worker(cache, rows_per_part=64, limits=limits)
        tracemalloc.start()
        try:
            report = encoder.run(unit)
            return tracemalloc.get_traced_memory()[1], dict(report.rejects)
        finally:
            tracemalloc.stop()

    unbounded, rejects = measure_peak(tmp_path / "d", Limits())  # first, because it imports modules
    assert (rejects, unbounded > 32 << 20) == ({}, True)
    bounded, rejects = measure_peak(tmp_path / "c", Limits(columns_bytes=4 << 20))
    assert rejects == {"columns_too_large": 32}
    assert bounded < 10 << 20, "the columns, and a few samples read ahead"
    (reject, *_) = (reject for record in records(tmp_path / "c") for reject in record.rejects)
    assert reject.detail.startswith("the columns take 1048596 bytes, but a row's share of its part is 65536")


def test_large_columns_make_row_groups_smaller(
    worker: Callable[..., UnitWorker], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(group_spans, "GROUP_BYTES", 4000)
    members = img2dataset_members(0, 8, height=64, width=64)
    members |= {name: b"x" * 1500 for name in members if name.endswith(".txt")}
    worker(tmp_path / "c", rows_per_part=8).run(unit_of(write_tar(tmp_path / "s/0.tar", members)))
    (file,) = (tmp_path / "c/data").iterdir()
    metadata = pq.read_metadata(file)
    assert [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)] == [2, 2, 2, 2]
    assert [row["key"] for row in rows_of(tmp_path / "c")] == [f"{n:09d}" for n in range(8)]


def make_tar_with_metadata(folder: Path, metadata: bytes | pa.Table) -> Unit:
    """Write a tar of three samples with the metadata file of img2dataset beside it, and return its unit."""
    tar = write_tar(folder / "0.tar", img2dataset_members(0, 3, height=64, width=64))
    if isinstance(metadata, bytes):
        (folder / "0.parquet").write_bytes(metadata)
    else:
        pq.write_table(metadata, folder / "0.parquet")
    return unit_of(tar)


URLS = OutputSchema(columns=PassthroughColumns(pa.schema([("url", pa.string())]), ()))


@pytest.mark.parametrize("container", ["parquet", "webdataset"])
def test_metadata_that_is_not_utf8_rejects_its_sample(
    worker: Callable[..., UnitWorker], tmp_path: Path, container: Any
) -> None:
    raw = pa.array([b"ok", b"\xff", b"ok"], pa.binary())
    urls = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    table = pa.table({"key": [f"{n:09d}" for n in range(3)], "url": urls})
    unit, layout = make_tar_with_metadata(tmp_path / "s", table), dataclasses.replace(URLS, container=container)
    report = worker(tmp_path / "c", layout=layout).run(unit)
    assert (report.rows, report.rejects) == (2, {"bad_text": 1})
    (rejects,) = (path.read_text() for path in (tmp_path / "c/_rejects").iterdir())
    assert json.loads(rejects)["key"] == "000000001"
    assert [row["url"] for row in rows_of_any_container(tmp_path / "c")] == ["ok", "ok"]


@pytest.mark.parametrize("damaged", [b"", b"<html>", b"PAR1" + bytes(100) + b"PAR1"])
def test_a_damaged_metadata_file_fails_its_unit_and_rejects_nothing(
    worker: Callable[..., UnitWorker], tmp_path: Path, damaged: bytes
) -> None:
    unit = make_tar_with_metadata(tmp_path / "s", damaged)
    with pytest.raises(
        ShardError,
        match=r"0\.parquet .*; repair or remove .* \(without it, .*0\.tar is encoded without",
    ):
        worker(tmp_path / "c", layout=URLS).run(unit, Attempt(damaged_at=0))
    (tmp_path / "s/0.parquet").unlink()
    assert worker(tmp_path / "c", layout=URLS).run(unit).rows == 3


def contents(cache: Path) -> dict[str, bytes]:
    """Return the files of data/, _empty/ and _rejects/. A second run must not change them."""
    return {
        f"{folder}/{path.name}": path.read_bytes()
        for folder in ("data", "_empty", "_rejects")
        for path in cache.glob(f"{folder}/*")
    }


def rows_of(cache: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(cache.glob("data/*")) for row in pq.read_table(path, use_threads=False).to_pylist()]


def rows_of_any_container(cache: Path) -> list[dict[str, Any]]:
    """Return the rows of Parquet or WebDataset parts."""
    return [row for path in cache.glob("data/*") for row in read_rows(Folder(str(cache)), f"data/{path.name}")]


def records(cache: Path) -> list[PartRecord]:
    return [read_record(path.read_bytes(), path.name) for path in sorted(cache.glob("data/*"))]


def test_every_sample_is_in_one_part_as_a_row_or_a_reject(
    worker: Callable[..., UnitWorker], unit: Unit, tmp_path: Path
) -> None:
    report = worker(tmp_path / "c").run(unit)
    parts = records(tmp_path / "c")
    assert [(r.part, r.first, r.samples, r.rows, r.last) for r in parts] == [
        (0, 0, 4, 3, False),
        (1, 4, 4, 4, False),
        (2, 8, 2, 2, True),
    ]
    assert [(r.position, r.key, r.reason) for r in parts[0].rejects] == [(1, "000000001", "not_an_image")]
    assert (report.samples, report.rows, dict(report.rejects), report.parts) == (10, 9, {"not_an_image": 1}, 3)
    assert report.rows == sum(pq.read_metadata(path).num_rows for path in (tmp_path / "c/data").iterdir())


def test_rows_of_an_unfinished_part_hold_no_pixels(
    worker: Callable[..., UnitWorker], unit: Unit, tmp_path: Path
) -> None:
    context, encoded_pixels = worker(tmp_path / "c").context, list[weakref.ref[torch.Tensor]]()
    launch = context.latent_encoder.launch

    def launch_and_watch(batch: Sequence[PreparedImage]) -> LaunchedBatch:
        encoded_pixels.extend(weakref.ref(image.pixels) for image in batch)
        return launch(batch)

    context.latent_encoder.launch = launch_and_watch  # type: ignore[method-assign]
    filled = fill_part(unit, read_samples(unit, context.spec), context.spec, context.stages, StageTimer(), {})
    assert (len(filled.rows), len(encoded_pixels)) == (9, 9)
    assert [row.image.bucket for row in filled.rows] == [(64, 64)] * 9
    assert all(row.image.pixels.is_meta for row in filled.rows), "the shape is kept without the memory"
    gc.collect()
    assert not [pixels for pixels in encoded_pixels if pixels() is not None]


def test_a_commit_lists_its_parts_with_their_checksums(
    worker: Callable[..., UnitWorker], unit: Unit, tmp_path: Path
) -> None:
    worker(tmp_path / "c").run(unit)
    content = json.loads((tmp_path / f"c/_commits/{unit.name}.json").read_text())
    for part in content["parts"]:
        data = (tmp_path / "c" / part["file"]).read_bytes()
        assert (part["bytes"], part["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert content["parts"][0]["rejects"] == {"not_an_image": 1}
    stages = {"read", "open", "encode", "write", "idle_opening", "idle_reading", "idle_writing"}
    assert (content["run"], set(content["seconds"])) == ("a run", stages)


def test_a_cache_in_memory_equals_a_cache_on_disk(
    worker: Callable[..., UnitWorker], unit: Unit, tmp_path: Path
) -> None:
    worker(tmp_path / "c").run(unit)
    worker("memory://flow/c").run(unit)
    folder = Folder("memory://flow/c")
    assert {f"data/{name}": folder.read(f"data/{name}") for name in folder.list_files("data")} == {
        name: data for name, data in contents(tmp_path / "c").items() if name.startswith("data/")
    }


@pytest.mark.parametrize(
    "settings",
    [{"layout": OutputSchema(store="sample")}, {"transform": Transform(resolution=64, crop="random", flip="random")}],
)
def test_random_values_depend_only_on_the_sample_and_the_seed(
    worker: Callable[..., UnitWorker], tmp_path: Path, settings: dict[str, Any]
) -> None:
    """They do not depend on the batch size or on the parts. Another seed gives other values."""
    unit = unit_of(write_tar(tmp_path / "s/0.tar", img2dataset_members(0, 6, height=64, width=150)))
    worker(tmp_path / "a", **settings).run(unit)
    worker(tmp_path / "b", **settings, rows_per_part=2, open_workers=3).run(unit)
    other_seed = {"seed": 1}
    if transform := settings.get("transform"):
        other_seed["transform"] = dataclasses.replace(transform, seed=1)
    worker(tmp_path / "c", **(settings | other_seed)).run(unit)
    a, b, c = (rows_of(tmp_path / name) for name in "abc")
    assert a == b
    assert [row["key"] for row in a] == [row["key"] for row in c]
    assert all(first["latent"] != second["latent"] for first, second in zip(a, c, strict=True))


def test_moments_are_the_mean_and_the_log_variance(
    worker: Callable[..., UnitWorker], unit: Unit, tmp_path: Path
) -> None:
    for store in ("mode", "moments"):
        worker(tmp_path / store, layout=OutputSchema(store=store), dtype="float32").run(unit)
    modes, moments = rows_of(tmp_path / "mode"), rows_of(tmp_path / "moments")
    assert {tuple(row["shape"]) for row in moments} == {(8, 8, 8)}
    means = [to_tensor(row)[:4] for row in moments]
    assert all(torch.equal(mean, to_tensor(mode)) for mean, mode in zip(means, modes, strict=True))
    mode_tally, moments_tally = (records(tmp_path / store)[0].tally["64x64"] for store in ("mode", "moments"))
    assert (mode_tally.mean, mode_tally.m2, mode_tally.variance) == (moments_tally.mean, moments_tally.m2, None)
    assert moments_tally.variance == pytest.approx(
        [float(torch.stack([to_tensor(r)[4 + c].double().exp() for r in moments[:3]]).mean()) for c in range(4)]
    )


def test_stored_samples_follow_the_posterior(worker: Callable[..., UnitWorker], unit: Unit, tmp_path: Path) -> None:
    for store in ("moments", "sample"):
        worker(tmp_path / store, layout=OutputSchema(store=store), dtype="float32").run(unit)
    pairs = zip(rows_of(tmp_path / "moments"), rows_of(tmp_path / "sample"), strict=True)
    noise = torch.stack(
        [
            (to_tensor(sample) - to_tensor(moments)[:4]) / torch.exp(0.5 * to_tensor(moments)[4:])
            for moments, sample in pairs
        ]
    )
    assert abs(float(noise.mean())) < 0.05
    assert abs(float(noise.std()) - 1) < 0.05
    assert len(noise.flatten(1).unique(dim=0)) == 9


def test_bfloat16_is_stored_in_two_bytes(worker: Callable[..., UnitWorker], unit: Unit, tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        worker(tmp_path / dtype, dtype=dtype).run(unit)
    for exact, short in zip(rows_of(tmp_path / "float32"), rows_of(tmp_path / "bfloat16"), strict=True):
        assert (short["dtype"], len(short["latent"])) == ("bfloat16", len(exact["latent"]) // 2)
        assert torch.equal(to_tensor(short), to_tensor(exact).bfloat16())


@pytest.mark.parametrize("after", [0, 1, 3, 4, 6, 8])
def test_a_unit_that_failed_anywhere_is_resumed(
    worker: Callable[..., UnitWorker], unit: Unit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    worker(tmp_path / "expected").run(unit)
    encoded: list[str] = []
    original = LatentEncoder.launch

    def launch(self: LatentEncoder, batch: Sequence[PreparedImage]) -> LaunchedBatch:
        if len(encoded) == after:
            raise MemoryError
        encoded.extend(image.key for image in batch)
        return original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(LatentEncoder, "launch", launch)
        with pytest.raises(MemoryError):
            worker(tmp_path / "c").run(unit)
    existing = contents(tmp_path / "c")
    report = worker(tmp_path / "c").run(unit)
    assert contents(tmp_path / "c") == contents(tmp_path / "expected")
    assert existing.items() <= contents(tmp_path / "c").items()
    assert report.adopted == len([name for name in existing if name.startswith("data/")])


def test_existing_parts_are_not_encoded_again(
    worker: Callable[..., UnitWorker], unit: Unit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker(tmp_path / "c").run(unit)
    monkeypatch.setattr(LatentEncoder, "launch", None)
    Path(unit.url).unlink()
    assert worker(tmp_path / "c").run(unit).adopted == 3


def test_two_workers_on_one_unit_write_the_same_cache_as_one_worker(
    worker: Callable[..., UnitWorker], unit: Unit, tmp_path: Path
) -> None:
    worker(tmp_path / "expected").run(unit)
    threads = [threading.Thread(target=worker(tmp_path / "c").run, args=(unit,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert contents(tmp_path / "c") == contents(tmp_path / "expected")


@pytest.mark.parametrize("batch", [slow_param(1), 2, slow_param(6)])
def test_the_batch_size_changes_no_byte(
    worker: Callable[..., UnitWorker], unit: Unit, tmp_path: Path, batch: int
) -> None:
    worker(tmp_path / "a").run(unit)
    compute = ComputeConfig(device="cpu", precision="fp32", batch_size=1, threads=1)
    worker(tmp_path / "b", compute=compute, open_workers=3).run(unit)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize(
    ("count", "parts"), [(4, [(4, True)]), (8, [(4, False), (4, True)]), (5, [(4, False), (1, True)])]
)
def test_only_the_last_part_is_marked_as_last(
    worker: Callable[..., UnitWorker], tmp_path: Path, count: int, parts: list[tuple[int, bool]]
) -> None:
    unit = unit_of(write_tar(tmp_path / "s/0.tar", img2dataset_members(0, count)))
    worker(tmp_path / "c").run(unit)
    assert [(record.samples, record.last) for record in records(tmp_path / "c")] == parts


def test_a_part_without_rows_has_no_file_in_data(worker: Callable[..., UnitWorker], tmp_path: Path) -> None:
    members = {f"{n}.jpg": b"no image" for n in range(4)} | img2dataset_members(4, 1)
    worker(tmp_path / "c").run(unit_of(write_tar(tmp_path / "s/0.tar", members)))
    (empty,) = (tmp_path / "c/_empty").iterdir()
    assert PartRecord.from_json(empty.read_bytes()).samples == 4
    assert [record.part for record in records(tmp_path / "c")] == [1]


def test_a_shard_without_samples_has_one_record(worker: Callable[..., UnitWorker], tmp_path: Path) -> None:
    report = worker(tmp_path / "c").run(unit_of(write_tar(tmp_path / "s/0.tar", {})))
    (empty,) = (tmp_path / "c/_empty").iterdir()
    record = PartRecord.from_json(empty.read_bytes())
    assert (record.samples, record.rows, record.last, record.tally) == (0, 0, True, {})
    assert report.parts == 1


def test_a_damaged_shard_fails_and_is_not_committed(
    worker: Callable[..., UnitWorker], unit: Unit, tmp_path: Path
) -> None:
    path = Path(unit.url)
    path.write_bytes(path.read_bytes()[:9000])
    truncated = unit_of(path)
    with pytest.raises(ShardError, match="is truncated at byte 9000"):
        worker(tmp_path / "c").run(truncated)
    assert not (tmp_path / "c/_commits").exists()


def test_a_shard_that_changed_since_it_was_planned_fails(
    worker: Callable[..., UnitWorker], unit: Unit, tmp_path: Path
) -> None:
    write_tar(Path(unit.url), img2dataset_members(0, 1))
    with pytest.raises(SourceError, match="has changed since it was planned"):
        worker(tmp_path / "c").run(unit)


def test_a_part_of_another_cache_is_refused(worker: Callable[..., UnitWorker], unit: Unit, tmp_path: Path) -> None:
    worker(tmp_path / "c", identity_sha256="another").run(unit)
    (tmp_path / f"c/_commits/{unit.name}.json").unlink()
    with pytest.raises(CacheError, match="belongs to a cache with another identity"):
        worker(tmp_path / "c").run(unit)
    (tmp_path / f"c/data/{unit.name}-00000.parquet").write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(CacheError, match="is not a part of a latentmill cache"):
        worker(tmp_path / "c").run(unit)


def test_a_worker_stops_between_samples(worker: Callable[..., UnitWorker], unit: Unit, tmp_path: Path) -> None:
    encoder = worker(tmp_path / "c")
    encoder.context.stages.stop.set()
    with pytest.raises(Stopped):
        encoder.run(unit)
    assert contents(tmp_path / "c") == {}


def test_every_sample_and_every_tile_counts_as_progress(
    worker: Callable[..., UnitWorker], unit: Unit, tmp_path: Path
) -> None:
    whole, tiled = worker(tmp_path / "a"), worker(tmp_path / "b", tile_above=32)
    done = whole.run(unit)
    assert whole.steps == done.samples + 2 * done.encoded
    assert whole.busy_seconds == pytest.approx(done.seconds.encode, abs=0.001)
    tiled.run(unit)
    assert tiled.steps == done.samples + (1 + 3 * 3) * done.encoded, (
        "3 x 3 tiles of 32 pixels, 24 pixels apart, cover 64 x 64"
    )


def test_a_part_file_follows_the_cache_format(worker: Callable[..., UnitWorker], unit: Unit, tmp_path: Path) -> None:
    worker(tmp_path / "c").run(unit)
    file = pq.ParquetFile(sorted((tmp_path / "c/data").iterdir())[0])
    assert file.schema_arrow.equals(parquet.make_schema(OutputSchema()))
    group = file.metadata.row_group(0)
    columns = {group.column(n).path_in_schema: group.column(n) for n in range(group.num_columns)}
    assert columns["latent"].compression == "UNCOMPRESSED"
    assert not any("DICTIONARY" in encoding for encoding in columns["latent"].encodings)
    assert columns["key"].compression == "ZSTD"
    row = file.read().to_pylist()[0]
    assert to_tensor(row).shape == (4, 8, 8)
    assert len(row["latent"]) == 4 * 8 * 8 * 2


def test_row_groups_have_a_limit_in_bytes(
    monkeypatch: pytest.MonkeyPatch, worker: Any, unit: Unit, tmp_path: Path
) -> None:
    monkeypatch.setattr(group_spans, "GROUP_BYTES", 4 * 8 * 8 * 2 * 3)
    worker(tmp_path / "c", rows_per_part=100).run(unit)
    (path,) = (tmp_path / "c/data").iterdir()
    metadata = pq.read_metadata(path)
    assert [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)] == [3, 3, 3]


def test_row_groups_have_one_bucket_each(worker: Callable[..., UnitWorker], tmp_path: Path) -> None:
    wide, tall = ({"height": height, "width": width} for height, width in ((64, 128), (128, 64)))
    members = img2dataset_members(0, 3, **wide) | img2dataset_members(3, 2, **tall) | img2dataset_members(5, 2, **wide)
    transform = Transform(resolution=64, buckets=((48, 96), (64, 64), (96, 48)))
    unit = unit_of(write_tar(tmp_path / "s/0.tar", members))
    worker(tmp_path / "c", rows_per_part=100, transform=transform).run(unit)
    (path,) = (tmp_path / "c/data").iterdir()
    file = pq.ParquetFile(path)
    groups = [file.read_row_group(n, ["height", "width"]).to_pylist() for n in range(file.num_row_groups)]
    assert groups == [[{"height": 48, "width": 96}] * 5, [{"height": 96, "width": 48}] * 2]


class TestOverflow:
    """NaN is never written."""

    def make_latent_encoder(self, vae: Vae, precision: str, gain: float) -> LatentEncoder:
        """Return an encoder whose latents are `gain` times larger. Its activations overflow float16."""
        weights = dict(vae.weights)
        weights["quant_conv.weight"] = weights["quant_conv.weight"] * np.float32(gain)
        amplified = Vae(reference="", config=vae.config, weights=weights, sha256="", constants={})
        compute = ComputeConfig(device="cpu", precision=precision, batch_size=1, threads=1)
        return LatentEncoder(amplified, compute, "float32" if precision == "fp16" else "float16")

    def make_image(self) -> PreparedImage:
        pixels = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        return PreparedImage(
            shard="s",
            position=0,
            key="k",
            columns={},
            pixels=pixels,
            original_height=64,
            original_width=64,
            resized_height=64,
            resized_width=64,
            crop_top=0,
            crop_left=0,
            enlarged=False,
        )

    def test_a_latent_outside_the_range_of_its_dtype_is_rejected(self, vae: Vae) -> None:
        (encoded,) = self.make_latent_encoder(vae, "fp32", 1e7).encode([self.make_image()])
        latent = encoded.latent
        assert isinstance(latent, Rejected)
        assert (latent.stage, latent.reason) == ("encode", "not_finite")

    def test_an_image_that_overflows_in_half_precision_is_encoded_in_float32(self, vae: Vae) -> None:
        half, exact = self.make_latent_encoder(vae, "fp16", 1e7), self.make_latent_encoder(vae, "fp32", 1e7)
        exact.dtype = torch.float32
        (encoded,), (expected,) = (encoder.encode([self.make_image()]) for encoder in (half, exact))
        assert (encoded.is_fallback, expected.is_fallback) == (True, False)
        assert isinstance(encoded.latent, torch.Tensor)
        assert isinstance(expected.latent, torch.Tensor)
        assert torch.equal(encoded.latent, expected.latent)


class TestPrecision:
    """The self-check of a worker, and the switches of CUDA."""

    def make_latent_encoder(self, vae: Vae, precision: str) -> LatentEncoder:
        return LatentEncoder(vae, dataclasses.replace(CPU, precision=precision), "float32")

    def test_the_self_check_measures_the_error_of_half_precision(self, vae: Vae) -> None:
        errors = {name: self.make_latent_encoder(vae, name).check_precision() for name in ("fp32", "fp16", "bf16")}
        assert errors["fp32"] is None
        assert errors["fp16"] is not None
        assert errors["bf16"] is not None
        assert 1e-5 < errors["fp16"] < 0.5 * errors["bf16"] < 0.02

    def test_an_encoder_that_computes_wrong_latents_is_refused(self, vae: Vae, monkeypatch: pytest.MonkeyPatch) -> None:
        encoder = self.make_latent_encoder(vae, "bf16")
        kernel = encoder.model.encoder.conv_out
        monkeypatch.setattr(kernel, "forward", lambda x: type(kernel).forward(kernel, x) * 1.2)
        with pytest.raises(VaeError, match=r"cpu device computes wrong latents: in bf16 they are off by \d+\.\d%"):
            encoder.check_precision()

    def test_an_overflow_is_no_error_of_the_device(self, vae: Vae) -> None:
        assert TestOverflow().make_latent_encoder(vae, "fp16", 1e7).check_precision() is None

    def test_the_report_and_the_commit_have_the_error(
        self, worker: Callable[..., UnitWorker], unit: Unit, tmp_path: Path
    ) -> None:
        report = worker(tmp_path / "c", compute=dataclasses.replace(CPU, precision="bf16")).run(unit)
        (done,) = (json.loads(path.read_text()) for path in (tmp_path / "c/_commits").iterdir())
        assert 0 < report.precision_error == done["precision_error"] < 0.05

    @pytest.mark.parametrize(
        ("precision", "float32"), [slow_param("fp32", "ieee"), ("tf32", "tf32"), slow_param("fp16", "ieee")]
    )
    def test_fp32_is_float32_on_cuda_and_tf32_is_asked_for(self, precision: str, float32: str) -> None:
        """The switches hold for the whole process, so another process sets them."""
        show = "torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision"
        script = (
            f"import torch; from pipeline.encoder import configure_cuda; configure_cuda({precision!r}); print({show})"
        )
        printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
        assert printed.split() == [float32, float32]


class TestMemory:
    """A device without enough memory."""

    def make_latent_encoder(
        self,
        vae: Vae,
        monkeypatch: pytest.MonkeyPatch,
        capacity: int,
        error: Exception = torch.OutOfMemoryError("CUDA out of memory"),
    ) -> tuple[LatentEncoder, list[int]]:
        """Return an encoder with memory for batches of `capacity` images, and a list of the sizes that it tries."""
        compute = ComputeConfig(device="cpu", precision="fp32", batch_size=4, threads=1)
        latent_encoder, tried = LatentEncoder(vae, compute, "float32"), []
        encode = latent_encoder.model.encode

        def limited(x: torch.Tensor) -> object:
            tried.append(len(x))
            if len(x) > capacity:
                raise error
            return encode(x)

        monkeypatch.setattr(latent_encoder.model, "encode", limited)
        return latent_encoder, tried

    @pytest.mark.fault(15, "a device out of memory")
    def test_batches_become_smaller_and_stay_so(self, vae: Vae, monkeypatch: pytest.MonkeyPatch) -> None:
        latent_encoder, tried = self.make_latent_encoder(vae, monkeypatch, capacity=1)
        batch = [TestOverflow().make_image()] * 4
        first = latent_encoder.encode(batch)
        assert tried == [4, 2, 1, 1, 1, 1]
        assert latent_encoder.compute.batch_size == 1
        second = latent_encoder.encode(batch)
        assert tried[6:] == [1, 1, 1, 1]
        assert all(torch.equal(a.latent, b.latent) for a, b in zip(first, second, strict=True))  # type: ignore[arg-type]

    def test_batches_become_smaller_in_float32_too(self, vae: Vae, monkeypatch: pytest.MonkeyPatch) -> None:
        exact, tried = self.make_latent_encoder(vae, monkeypatch, capacity=1)
        half = LatentEncoder(vae, dataclasses.replace(exact.compute, precision="bf16"), "float32")
        half._fp32_model = exact.model

        def overflowing(x: torch.Tensor) -> object:
            return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: torch.full((len(x), 4, 8, 8), torch.inf)))

        monkeypatch.setattr(half.model, "encode", overflowing)
        encoded = half.encode([TestOverflow().make_image()] * 4)
        assert [image.is_fallback for image in encoded] == [True] * 4
        assert tried == [4, 2, 1, 1, 1, 1]
        assert half.compute.batch_size == 1

    def test_a_single_image_that_does_not_fit_is_an_error(self, vae: Vae, monkeypatch: pytest.MonkeyPatch) -> None:
        latent_encoder, _ = self.make_latent_encoder(vae, monkeypatch, capacity=0)
        with pytest.raises(
            VaeError, match="out of memory on cpu while encoding a single image of 64x64 pixels; use --tile"
        ):
            latent_encoder.encode([TestOverflow().make_image()])

    @pytest.mark.parametrize(
        "error",
        [
            # c10/cuda/CUDACachingAllocator.cpp; the same with HIP instead of CUDA
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB. GPU 0 has a total capacity of ..."),
            # c10/cuda/CUDAException.cpp, with the runtime's cudaGetErrorString(cudaErrorMemoryAllocation)
            RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
            RuntimeError("HIP error: out of memory"),
            # ATen/cuda/CUDABlas.cpp and Exceptions.cpp; github.com/QwenLM/Qwen3/issues/873
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            # ATen/cudnn/Exceptions.h; github.com/pytorch/pytorch/issues/20123
            RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
            # cudnnStatus_t of cuDNN 9
            RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
            RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
            # ATen/mps/MPSAllocator.mm
            RuntimeError("MPS backend out of memory (MPS allocated: 1.0 GiB, other allocations: 2.0 GiB). ..."),
            RuntimeError("Invalid buffer size: 12.00 GiB"),
            # c10/core/impl/alloc_cpu.cpp: Linux and macOS; Windows and Android
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes. Error code 12"),
            RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
            # std::bad_alloc of C++, through the bindings of torch and through pybind11
            RuntimeError("std::bad_alloc"),
            MemoryError("std::bad_alloc"),
        ],
        ids=str,
    )
    def test_the_out_of_memory_errors_of_all_libraries_make_batches_smaller(
        self, vae: Vae, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        latent_encoder, tried = self.make_latent_encoder(vae, monkeypatch, capacity=1, error=error)
        latent_encoder.encode([TestOverflow().make_image()] * 4)
        assert (tried, latent_encoder.compute.batch_size) == ([4, 2, 1, 1, 1, 1], 1)

    @pytest.mark.parametrize(
        "message",
        [
            "CUDA error: an illegal memory access was encountered",
            "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`",
            "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR",
            "GET was unable to find an engine to execute this computation",
            "expected scalar type Float but found Half",
        ],
    )
    def test_other_device_errors_are_not_out_of_memory_errors(self, message: str) -> None:
        assert not is_out_of_memory(RuntimeError(message))

    def test_other_errors_do_not_change_the_batch_size(self, vae: Vae, monkeypatch: pytest.MonkeyPatch) -> None:
        latent_encoder, _ = self.make_latent_encoder(vae, monkeypatch, capacity=4)
        monkeypatch.setattr(latent_encoder.model, "encode", lambda x: torch.ones(2) @ torch.ones(3))
        with pytest.raises(RuntimeError, match=r"expected|size|shape"):
            latent_encoder.encode([TestOverflow().make_image()] * 4)
        assert latent_encoder.compute.batch_size == 4

    def test_the_smaller_batch_size_is_recorded(
        self, worker: Callable[..., UnitWorker], unit: Unit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        encoder = worker(tmp_path / "c")
        latent_encoder = encoder.context.latent_encoder
        latent_encoder.compute = dataclasses.replace(latent_encoder.compute, batch_size=8)
        encode = latent_encoder.model.encode

        def limited(x: torch.Tensor) -> object:
            if len(x) > 2:
                raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")
            return encode(x)

        monkeypatch.setattr(latent_encoder.model, "encode", limited)
        encoder.run(unit)
        (done,) = (json.loads(path.read_text()) for path in (tmp_path / "c/_commits").iterdir())
        assert done["compute"]["batch_size"] == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of torch, in torch
def test_a_compiled_encoder_gives_the_same_latents(vae: Vae) -> None:
    """The latents are equal up to rounding. Each shape is compiled once."""
    forms: tuple[Form, ...] = ("plain", "compiled")
    plain, compiled = (
        LatentEncoder(
            vae,
            ComputeConfig(device="cpu", precision="fp32", batch_size=1, threads=1, form=form),
            "float32",
        )
        for form in forms
    )
    image = TestOverflow().make_image()
    tall = dataclasses.replace(image, pixels=image.pixels.repeat(2, 1, 1))
    for prepared in (image, tall, image):
        (expected,), (found,) = plain.encode([prepared]), compiled.encode([prepared])
        torch.testing.assert_close(found.latent, expected.latent, atol=1e-4, rtol=0)


def test_statistics_equal_numpys_and_the_digest_equals_sha256sums(
    worker: Callable[..., UnitWorker], unit: Unit, tmp_path: Path
) -> None:
    members = {f"{n}.jpg": b"no image" for n in range(4)}
    empty = unit_of(write_tar(tmp_path / "e/1.tar", members))
    encoder, cache = worker(tmp_path / "c"), tmp_path / "c"
    encoder.run(unit)
    encoder.run(empty)
    written = compute_stats(CacheScan(Folder(str(cache))), "the identity")
    latents = [
        to_tensor(row).double() for path in sorted(cache.glob("data/*")) for row in pq.read_table(path).to_pylist()
    ]
    values = torch.stack(latents).numpy()
    np.testing.assert_allclose(written["mean"], values.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(written["std"], values.std(axis=(0, 2, 3)), rtol=1e-12)
    assert written["suggested"]["scaling_factor"] == pytest.approx(1 / values.std(), rel=1e-12)
    assert (written["count"], written["rejected"]) == (9, {"not_an_image": 5})
    command = "export LC_ALL=C; sha256sum _empty/* data/* | sha256sum"
    printed = subprocess.run(command, shell=True, cwd=cache, capture_output=True, text=True, check=True).stdout
    assert written["digest"] == printed.split()[0]

    (cache / f"_commits/{unit.name}.json").unlink()
    assert compute_stats(CacheScan(Folder(str(cache))), "the identity") == written
    next(cache.glob("_empty/*")).unlink()
    with pytest.raises(CacheError, match="was committed, but is missing"):
        compute_stats(CacheScan(Folder(str(cache))), "the identity")


def test_the_first_of_two_commits_is_kept(worker: Callable[..., UnitWorker], unit: Unit, tmp_path: Path) -> None:
    worker(tmp_path / "c", run="first").run(unit)
    worker(tmp_path / "c", run="second").run(unit)
    assert json.loads((tmp_path / f"c/_commits/{unit.name}.json").read_text())["run"] == "first"
    assert commits.list_finished_units(Folder(str(tmp_path / "c"))) == {unit.name}
