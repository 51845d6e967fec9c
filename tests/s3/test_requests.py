"""The number of requests that reading and writing a cache on a store costs, counted over HTTP."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import fsspec
import pytest

from pipeline.cache.part_info import UnitReport
from pipeline.limits import Limits
from pipeline.records import FIRST_ATTEMPT, Attempt, Unit
from pipeline.sources.units import make_units
from pipeline.storage.folder import Folder
from pipeline.weights import Vae, load_vae
from tests.conftest import img2dataset_members, write_tar
from tests.listed_files import list_source_files
from tests.pipeline.conftest import make_worker
from tests.proxy import Proxy, Request
from tests.servers import names, upload

Command = Callable[..., tuple[int, str, str]]

UNITS = 12
pytestmark = pytest.mark.slow


@pytest.fixture
def cache(latentmill: Command, micro_vae: Path, bucket: str, tmp_path: Path) -> tuple[str, ...]:
    """Write a complete cache to the store, and return the arguments of its job."""
    for number in range(UNITS):
        write_tar(tmp_path / f"s/{number:02d}.tar", img2dataset_members(number, 1, height=64, width=64))
    options = ("--vae", str(micro_vae), "--resolution", "64", "--workers", "0")
    code, _, err = latentmill("encode", tmp_path / "s", "--to", tmp_path / "c", *options)
    assert code == 0, err
    return ("encode", str(tmp_path / "s"), "--to", upload(tmp_path / "c", f"{bucket}/c"), *options)


def count_requests(proxy: Proxy) -> Counter[tuple[str, str]]:
    """Return the requests by method and folder of the cache, without listings."""
    counts: Counter[tuple[str, str]] = Counter()
    for request in proxy.seen:
        _, _, name = urlsplit(request.path).path.partition("/c/")
        if name:
            counts[request.method, name.partition("/")[0]] += 1
    return counts


def test_a_run_with_nothing_to_do_reads_the_log_and_no_commit(
    latentmill: Command, cache: tuple[str, ...], proxy: Proxy
) -> None:
    code, out, err = latentmill(*cache)
    assert (code, out.startswith("encoded 0 images")) == (0, True), err
    requests = count_requests(proxy)
    assert requests["GET", "_log"] == 3, "the names of the commits, those of the files, and the rows"
    assert not [key for key in requests if key[1] in ("_commits", "data")], requests
    assert not [key for key in requests if key[0] == "HEAD"], requests


@pytest.mark.parametrize("has_log", [True, False])
def test_status_reads_the_log_or_else_each_commit_in_one_request(
    latentmill: Command, cache: tuple[str, ...], bucket: str, proxy: Proxy, has_log: bool
) -> None:
    if not has_log:
        remove(bucket, "_log/*")
    code, _, err = latentmill("status", cache[3])
    assert code == 0, err
    requests = count_requests(proxy)
    assert requests["GET", "_commits"] == (0 if has_log else UNITS)
    assert requests["GET", "_log"] == (3 if has_log else 0)
    assert ("HEAD", "_commits") not in requests


@pytest.fixture
def vae(micro_vae: Path) -> Vae:
    return load_vae(str(micro_vae))


@pytest.fixture
def unit(bucket: str, tmp_path: Path) -> Unit:
    """Return the unit of a tar on the store with twelve samples. The ninth one is not an image."""
    members = img2dataset_members(0, 12, height=64, width=64)
    members["000000008.jpg"] = b"no image"
    write_tar(tmp_path / "t/0.tar", members)
    (unit,) = make_units(list_source_files((upload(tmp_path / "t", f"{bucket}/t"),), {}, "nowhere"))
    return unit


@pytest.fixture
def run(vae: Vae, unit: Unit, bucket: str, proxy: Proxy) -> Callable[..., tuple[UnitReport, list[str]]]:
    """Return a function that encodes the unit, and returns the report and the worker's requests in their order."""

    def run_unit(attempt: Attempt = FIRST_ATTEMPT, **settings: Any) -> tuple[UnitReport, list[str]]:
        worker = make_worker(vae, f"{bucket}/c", **{"standing": {}, **settings})
        proxy.seen.clear()
        report = worker.run(unit, attempt)
        return report, list(map(describe, proxy.seen))

    return run_unit


def describe(request: Request) -> str:
    """Return the method of a request, and the folder of its file and the number of its part, or the listed folder."""
    url = urlsplit(request.path)
    if "list-type" in url.query:
        return f"LIST {parse_qs(url.query).get('prefix', [''])[0].partition('/')[2].partition('/')[0]}"
    folder, name = url.path.split("/")[-2:]
    number = re.search(r"-(\d{5})\.", name)
    return f"{request.method} {folder}" + (f" {int(number[1])}" if number else "")


def remove(bucket: str, *patterns: str) -> None:
    """Remove files of the cache."""
    fs = fsspec.filesystem("s3")
    for pattern in patterns:
        for path in fs.glob(f"{bucket}/c/{pattern}"):
            fs.rm_file(path)


Run = Callable[..., tuple[UnitReport, list[str]]]


def test_a_unit_of_one_part_costs_three_requests_and_one_for_its_rejects(run: Run) -> None:
    report, requests = run(rows_per_part=12)
    assert report.rows == 11
    assert requests == ["GET _commits", "GET t", "PUT data 0", "PUT _rejects", "PUT _commits"]


def test_each_further_part_costs_one_request(run: Run) -> None:
    report, requests = run(rows_per_part=3)
    assert (report.parts, report.rows) == (4, 11)
    parts = [f"PUT data {number}" for number in range(4)]
    assert requests == ["GET _commits", "GET t", *parts, "PUT _rejects", "PUT _commits"]


def test_a_part_without_rows_is_looked_for_with_rows(run: Run) -> None:
    report, requests = run(rows_per_part=12, limits=Limits(image_bytes=10))
    assert (report.rows, sum(report.rejects.values())) == (0, 12)
    assert requests == ["GET _commits", "GET t", "GET data 0", "PUT _empty 0", "PUT _rejects", "PUT _commits"]


def test_only_parts_that_the_driver_listed_are_read(run: Run, unit: Unit, bucket: str) -> None:
    first, _ = run(rows_per_part=3)
    remove(bucket, "_commits/*", "_rejects/*", "data/*-00002.parquet", "data/*-00003.parquet")
    standing = {unit.name: {f"data/{unit.name}-0000{number}.parquet" for number in range(2)}}
    report, requests = run(rows_per_part=3, standing=standing)
    assert (report.adopted, report.rows, report.bytes) == (2, first.rows, first.bytes)
    parts = ["GET data 0", "GET data 1", "GET t", "PUT data 2", "PUT data 3"]
    assert requests == ["GET _commits", *parts, "PUT _rejects", "PUT _commits"]


@pytest.mark.parametrize("settings", [{"standing": {}}, {"standing": None}], ids=["a retry", "a driver without a list"])
def test_other_attempts_list_the_files_of_the_unit(run: Run, bucket: str, settings: dict[str, None]) -> None:
    run(rows_per_part=3)
    remove(bucket, "_commits/*", "_rejects/*", "data/*-00003.parquet")
    report, requests = run(Attempt(is_retry=settings["standing"] is not None), rows_per_part=3, **settings)
    assert report.adopted == 3
    parts = [*(f"GET data {number}" for number in range(3)), "GET t", "PUT data 3"]
    assert requests == ["GET _commits", "LIST _empty", "LIST data", *parts, "PUT _rejects", "PUT _commits"]


def test_parts_are_looked_for_once_another_writer_is_noticed(run: Run, bucket: str) -> None:
    run(rows_per_part=2)
    remove(bucket, "_commits/*", "_rejects/*", "data/*-00005.parquet")
    report, requests = run(rows_per_part=2)
    assert (report.parts, report.rows) == (6, 11)
    assert requests[:4] == ["GET _commits", "GET t", "PUT data 0", "GET data 0"]
    assert requests[-5:] == ["GET data 5", "GET _empty 5", "PUT data 5", "PUT _rejects", "PUT _commits"]
    assert requests.count("PUT data 3") == 0, "the first refusal is known by then"


def test_a_unit_that_another_job_finished_is_not_read(run: Run) -> None:
    first, _ = run(rows_per_part=3)
    report, requests = run(rows_per_part=3)
    assert requests == ["GET _commits"]
    again = replace(report, adopted=0, seconds=first.seconds, elapsed=first.elapsed)
    assert again == replace(first, encoded=0, texts={}, skipped={})
    assert report.adopted == 4


def test_each_image_of_a_folder_costs_one_request(vae: Vae, bucket: str, proxy: Proxy) -> None:
    folder = Folder(f"{bucket}/images")
    for name, data in img2dataset_members(0, 20, height=64, width=64).items():
        if name.endswith(".jpg"):
            folder.replace(name, data)
    (unit,) = make_units(list_source_files((folder.url,), {}, "nowhere"))
    worker = make_worker(vae, f"{bucket}/c", rows_per_part=20, standing={})
    proxy.seen.clear()
    assert worker.run(unit).rows == 20
    counts = Counter(map(describe, proxy.seen))
    assert counts == {"GET images": 20, "GET _commits": 1, "PUT data 0": 1, "PUT _commits": 1}


def test_the_driver_lists_the_parts_once_and_tells_its_workers(
    latentmill: Command, cache: tuple[str, ...], bucket: str, proxy: Proxy
) -> None:
    """A quarter of the units has a part, and a quarter has nothing. The other half is done."""
    done, missing = slice(0, UNITS // 2), slice(3 * UNITS // 4, UNITS)
    commits = sorted(names(f"{bucket}/c/_commits"))
    units = [name.removesuffix(".json") for name in commits]
    remove(bucket, *(f"_commits/{unit}.json" for unit in units[UNITS // 2 :]))
    remove(bucket, *(f"data/{unit}-*" for unit in units[missing]))
    proxy.seen.clear()
    code, out, err = latentmill(*cache)
    assert (code, out.startswith(f"encoded {UNITS // 4} images")) == (0, True), err
    last = max(number for number, request in enumerate(proxy.seen) if describe(request) == "PUT _commits")
    requests = Counter(map(describe, proxy.seen[:last]))
    assert requests["GET data 0"] == requests["PUT data 0"] == UNITS // 4
    assert requests["LIST data"] == 1 and not [name for name in requests if name.startswith("HEAD data")]
    assert not [request for unit in units[done] for request in proxy.seen[:last] if f"data/{unit}" in request.path]


def test_a_tar_of_a_group_costs_one_request_and_the_group_three(
    vae: Vae, bucket: str, tmp_path: Path, proxy: Proxy
) -> None:
    """Alone, each of the tars would cost four. One that is damaged costs no more in the group."""
    for number in range(20):
        tar = write_tar(tmp_path / f"t/{number:02d}.tar", img2dataset_members(number, 1, height=64, width=64))
    tar.write_bytes(tar.read_bytes()[:700])
    files = list_source_files((upload(tmp_path / "t", f"{bucket}/t"),), {}, "nowhere")
    (unit,) = make_units(files, tar_groups=[files])
    worker = make_worker(vae, f"{bucket}/c", rows_per_part=20, standing={})
    proxy.seen.clear()
    report = worker.run(unit)
    assert (report.rows, [part.left_out for part in report.summaries]) == (19, [("t/19.tar",)])
    counts = Counter(map(describe, proxy.seen))
    assert counts == {"GET t": 20, "GET _commits": 1, "PUT data 0": 1, "PUT _commits": 1}
