"""Shards that were damaged and restored: `retry` encodes the samples after the damage, each of them once."""

import json
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cache import parts, plan
from pipeline.cache.reader import read_rows
from pipeline.errors import StorageError
from pipeline.maintenance import retry
from pipeline.sources import units
from pipeline.storage.folder import Folder
from tests.conftest import img2dataset_members, slow_param, write_tar

Command = Callable[..., tuple[int, str, str]]
COUNT = 23  # samples of the tar: the ninth is not an image, the thirteenth has the key of the second


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    members = img2dataset_members(0, COUNT, height=64, width=64)
    members["000000008.jpg"] = b"no image"
    twelfth = members.pop("000000012.jpg")
    names = list(members)
    ordered = {name: members[name] for name in names[:36]}
    ordered |= {"000000001.jpeg": twelfth} | {n: members[n] for n in names[36:] if not n.startswith("000000012")}
    return write_tar(tmp_path_factory.mktemp("intact") / "0.tar", ordered).read_bytes()


def find_sample(intact: bytes, sample: int) -> int:
    return intact.index(b"%09d.jpg" % sample)


class Case:
    """A source with one shard, and a cache of it."""

    def __init__(self, latentmill: Command, vae: Path, folder: Path, form: str) -> None:
        self.command, self.shard, self.cache = latentmill, folder / "s/0.tar", folder / "c"
        self.shard.parent.mkdir()
        self.argv = ["--vae", vae, "--resolution", 64, "--workers", 0, "--rows-per-part", 4, "--format", form]
        self.argv += ["--max-reject-rate", 0.3]

    def encode(self, to: Path | None = None) -> tuple[int, str, str]:
        return self.command("encode", self.shard.parent, "--to", to or self.cache, *self.argv)

    def retry(self) -> tuple[int, str, str]:
        return self.command("retry", self.cache, "--workers", 0)

    def verify(self, *proofs: object) -> tuple[int, str, str]:
        return self.command("verify", self.cache, *proofs)

    @property
    def stats(self) -> dict[str, Any]:
        return dict(json.loads((self.cache / "stats.json").read_text()))

    @property
    def rejected(self) -> dict[str, int]:
        return dict(self.stats["rejected"])

    def check_complete(self, reference: Path) -> None:
        """Check that the cache has the rows and rejects of one that was made from the intact shard."""
        code, out, err = self.verify("--recount", "--reencode", 60)
        assert (code, err) == (0, ""), out
        assert "the inputs have the samples that are recorded; " in out
        actual = read_sorted_rows(self.cache)
        assert len(actual) == len({(row["shard"], row["key"]) for row in actual})
        assert actual == read_sorted_rows(reference)
        expected = json.loads((reference / "stats.json").read_text())
        assert (self.stats["count"], self.rejected) == (expected["count"], expected["rejected"])
        assert self.stats["mean"] == pytest.approx(expected["mean"], rel=1e-12)


def read_sorted_rows(cache: Path) -> list[dict[str, Any]]:
    unsorted = [
        row for path in (cache / "data").iterdir() for row in read_rows(Folder(str(cache)), f"data/{path.name}")
    ]
    return sorted(unsorted, key=lambda row: (row["shard"], row["key"]))


@pytest.fixture(params=["parquet", slow_param("webdataset")])
def case(request: pytest.FixtureRequest, latentmill: Command, micro_vae: Path, tmp_path: Path) -> Case:
    return Case(latentmill, micro_vae, tmp_path, request.param)


@pytest.fixture
def reference(case: Case, intact: bytes, tmp_path: Path) -> Path:
    """Return a cache of the intact shard."""
    case.shard.write_bytes(intact)
    assert case.encode(tmp_path / "reference")[0] == 0
    return tmp_path / "reference"


@pytest.mark.slow
def test_a_restored_shard_is_encoded_again_if_all_its_files_were_moved_away(
    case: Case, intact: bytes, reference: Path, tmp_path: Path
) -> None:
    """The note gives this advice for a unit that lost its first part and whose truncated input no longer exists."""
    case.shard.write_bytes(intact[: find_sample(intact, 9)])
    assert case.encode()[0] == 3
    case.shard.write_bytes(intact)
    assert case.retry()[0] == 0
    next((case.cache / "data").glob("*-00000.*")).unlink()
    (unit,) = plan.read_plan(Folder(str(case.cache)))
    (case.cache / f"_commits/{unit.name}.json").unlink()
    _, _, err = case.encode()
    (folders,) = re.findall("move away the unit's files in (.*), and run", err)
    for folder in re.findall(r"\w+", folders.replace("and ", "")):
        for path in (case.cache / folder).glob(f"{unit.name}*"):
            path.unlink()
    assert case.encode()[0] == 0
    case.check_complete(reference)


@pytest.mark.parametrize("sample", [*map(slow_param, (1, 5)), 7, *map(slow_param, (9, 22))])
def test_retry_completes_a_restored_shard(case: Case, intact: bytes, reference: Path, sample: int) -> None:
    """The rest begins at the start of a part, inside a part, and in the last part."""
    case.shard.write_bytes(intact[: find_sample(intact, sample) + 700])
    assert case.encode()[0] == 3
    before = case.stats
    assert before["rejected"]["rest_of_shard"] == 1
    code, out, _ = case.retry()
    assert (code, case.stats["digest"]) == (0, before["digest"]), "the damage is still at the same position"
    assert "and the rest of 1 damaged shard\n  rows       0 more" in out

    case.shard.write_bytes(intact)
    code, out, err = case.retry()
    assert code == 0, err
    assert f"rows       {COUNT - 2 - before['count']} more, {COUNT - 2} in all" in out
    case.check_complete(reference)
    digest = case.stats["digest"]
    assert case.retry()[1].startswith("retried 2 rejected samples\n  rows       0 more")
    assert case.encode()[0] == 0, "nothing is left of the damage"
    assert case.stats["digest"] == digest
    assert case.command("status", case.cache)[0] == 0


@pytest.mark.slow
def test_samples_before_a_later_damage_are_encoded_and_a_new_rest_remains(
    case: Case, intact: bytes, reference: Path
) -> None:
    for sample in (6, 11, 19):
        case.shard.write_bytes(intact[: find_sample(intact, sample) + 700])
        assert (case.encode if sample == 6 else case.retry)()[0] == (3 if sample == 6 else 0)
        assert case.rejected["rest_of_shard"] == 1
        assert len(read_sorted_rows(case.cache)) == sample - 1 - (sample > 8) - (sample > 12)
        code, out, err = case.verify("--recount")
        assert code == 0, out
        assert "the inputs have the samples that are recorded, except after the damage of 1 input\n" in out
        assert f"is damaged after {sample - 1} samples: what follows is not counted" in err
    assert case.encode()[0] == 3
    case.shard.write_bytes(intact)
    assert case.retry()[0] == 0
    case.check_complete(reference)


def test_verify_reports_that_a_rest_can_be_read_now(case: Case, intact: bytes) -> None:
    case.shard.write_bytes(intact[: find_sample(intact, 6) + 700])
    case.encode()
    content = json.loads(case.command("verify", case.cache, "--recount", "--json")[1])
    assert [item["samples"] for item in content["uncounted"]] == [5]
    case.shard.write_bytes(intact)
    code, out, _ = case.verify("--recount")
    assert code == 1
    assert (
        f"it has {COUNT} samples, but was damaged after 5 samples when it was encoded\n  run latentmill retry, which"
        in out
    )


@pytest.mark.slow
@pytest.mark.parametrize("same_run", [False, True])
@pytest.mark.parametrize("written", range(4))
def test_a_retry_that_fails_anywhere_leaves_a_rest_for_the_next_one(
    case: Case,
    intact: bytes,
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    written: int,
    same_run: bool,
) -> None:
    """same_run: the same run makes a second attempt."""
    case.shard.write_bytes(intact[: find_sample(intact, 6) + 700])
    case.encode()
    case.shard.write_bytes(intact)
    shutil.copytree(case.cache, tmp_path / "copy")
    publish, count = parts.publish_part, 0

    def fail_after_some(*argv: Any) -> Any:
        nonlocal count
        count += 1
        if count > written and not (same_run and count > written + 1):
            raise StorageError("the store is away")
        return publish(*argv)

    with monkeypatch.context() as patch:
        patch.setattr(retry, "publish_part", fail_after_some)
        assert case.retry()[0] == (0 if same_run else 1)
    if not same_run:
        assert case.rejected["rest_of_shard"] == 1
        assert len(list(case.cache.glob("data/*r1.*"))) == written
        assert case.verify()[0] == 0
        assert case.encode()[0] == 3
        code, _, err = case.retry()
        assert code == 0, err
    else:
        assert count == 6, "five parts, one of them twice: existing parts are adopted"
    case.check_complete(reference)
    digest = case.stats["digest"]
    shutil.rmtree(case.cache)
    (tmp_path / "copy").rename(case.cache)
    case.retry()
    assert case.stats["digest"] == digest


def delete_parts(cache: Path, pattern: str) -> None:
    """Delete parts together with their commits, as verify advises."""
    for path in cache.glob(f"*/{pattern}"):
        stem = path.stem if "r" in path.stem.rpartition("-")[2] else path.stem.rpartition("-")[0]
        path.unlink()
        (cache / f"_commits/{stem}.json").unlink(missing_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(1, 6))
def test_a_lost_retry_part_is_a_rest_again(case: Case, intact: bytes, reference: Path, number: int) -> None:
    case.shard.write_bytes(intact[: find_sample(intact, 6) + 700])
    case.encode()
    case.shard.write_bytes(intact)
    case.retry()
    digest = case.stats["digest"]
    delete_parts(case.cache, f"*-{number:05d}r1.*")
    assert case.encode()[0] == 3, "samples are missing"
    assert case.rejected["rest_of_shard"] == 1
    assert case.verify()[0] == (0 if number == 5 else 1)
    assert case.retry()[0] == 0
    assert case.stats["digest"] == digest
    case.check_complete(reference)


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["*-00000.*", "*-00001.*", "*-0000?.*", "*-0000[01]*"])
def test_a_lost_part_of_the_unit_is_encoded_again_without_the_samples_of_the_retry(
    case: Case, intact: bytes, reference: Path, lost: str
) -> None:
    """The damage is inside the file, and the restored file has the planned size."""
    damaged = bytearray(intact)
    offset = find_sample(intact, 6)
    damaged[offset : offset + 100] = bytes(range(100))
    case.shard.write_bytes(damaged)
    assert case.encode()[0] == 3
    case.shard.write_bytes(intact)
    assert case.retry()[0] == 0
    digest = case.stats["digest"]
    delete_parts(case.cache, lost)
    assert case.encode()[0] == 0
    assert case.rejected == {"duplicate_key": 1, "not_an_image": 1}
    if lost != "*-0000[01]*":  # the first of the retry's parts is lost, too: its samples are the unit's own now
        assert case.stats["digest"] == digest
    case.check_complete(reference)


def test_a_different_shard_is_refused(case: Case, intact: bytes) -> None:
    case.shard.write_bytes(intact[: find_sample(intact, 6) + 700])
    case.encode()
    before = case.stats
    other = intact.replace(b"image 2", b"image 7", 1)
    for content, message in (
        (other, "has changed since it was planned, and not only where it was damaged: 0-"),
        (intact[: find_sample(intact, 3) + 700], "has changed since it was planned, and not only where it was damaged"),
        (
            intact[: find_sample(intact, 3)] + bytes(1024),
            "has changed since it was planned, and not only where it was damaged",
        ),
    ):
        case.shard.write_bytes(content)
        code, _, err = case.retry()
        assert (code, case.stats["digest"]) == (1, before["digest"])
        assert message in err
        assert case.verify()[0] == 0


@pytest.mark.slow
def test_a_shard_that_differs_in_the_samples_of_a_retry_is_refused(case: Case, intact: bytes) -> None:
    case.shard.write_bytes(intact[: find_sample(intact, 6) + 700])
    case.encode()
    other = intact.replace(b"image 9", b"image 8", 1)
    assert other != intact
    case.shard.write_bytes(other[: find_sample(intact, 15) + 700])
    assert case.retry()[0] == 0
    before = case.stats
    case.shard.write_bytes(intact)
    code, _, err = case.retry()
    assert (code, case.stats["digest"]) == (1, before["digest"])
    assert "-00002r1 was made from other samples" in err
    case.shard.write_bytes(other)
    assert case.retry()[0] == 0
    assert "rest_of_shard" not in case.rejected
    assert case.verify("--recount")[0] == 0


@pytest.mark.slow
def test_two_concurrent_retries_encode_each_sample_once(case: Case, intact: bytes, reference: Path) -> None:
    case.shard.write_bytes(intact[: find_sample(intact, 6) + 700])
    case.encode()
    case.shard.write_bytes(intact)
    from jobs import retry as job
    from jobs.options import RetryOptions
    from jobs.parsing import parse
    from jobs.signals import Signals

    codes: list[int] = []

    def run() -> None:
        options, _ = parse(RetryOptions, "retry", [str(case.cache), "--workers", "0"])
        codes.append(job.run_job(options, Signals()))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [0, 0]
    case.check_complete(reference)


def test_retry_completes_a_restored_tar_without_samples(case: Case, tmp_path: Path) -> None:
    write_tar(case.shard, {})
    sound = case.shard.read_bytes()
    write_tar(case.shard.with_name("1.tar"), img2dataset_members(0, 1))
    case.shard.write_bytes(sound[:700])
    assert case.encode()[0] == 3
    case.shard.write_bytes(sound)
    assert case.retry()[0] == 0
    assert case.rejected == {}
    assert case.verify("--recount")[0] == 0
    assert [path.name.rpartition("-")[2] for path in sorted(case.cache.glob("_empty/*"))] == [
        "00000.json",
        "00000r1.json",
    ]


class TestParquet:
    """Files of several ranges; which rows a range has depends on the file's size."""

    @pytest.fixture
    def parquet(self, case: Case, monkeypatch: pytest.MonkeyPatch) -> bytes:
        monkeypatch.setitem(units.RANGE_BYTES, "parquet", 20_000)
        jpegs = [d for name, d in img2dataset_members(0, COUNT, height=64, width=64).items() if name.endswith("jpg")]
        table = pa.table({"jpg": jpegs, "caption": [f"caption {n}" for n in range(COUNT)]})
        case.shard = case.shard.with_name("0.parquet")
        pq.write_table(table, case.shard, row_group_size=3, write_page_checksum=True)
        # a second file, so that the columns are known
        pq.write_table(table.slice(0, 1), case.shard.with_name("1.parquet"))
        return case.shard.read_bytes()

    @pytest.fixture
    def reference(self, case: Case, parquet: bytes, tmp_path: Path) -> Path:
        assert case.encode(tmp_path / "reference")[0] == 0
        return tmp_path / "reference"

    def test_retry_completes_a_truncated_file(self, case: Case, parquet: bytes, reference: Path) -> None:
        case.shard.write_bytes(parquet[: len(parquet) * 3 // 4])
        assert case.encode()[0] == 3
        assert case.rejected["rest_of_shard"] > 1
        case.shard.write_bytes(parquet)
        assert case.retry()[0] == 0
        case.check_complete(reference)

    def test_retry_completes_a_file_with_a_damaged_page(self, case: Case, parquet: bytes, reference: Path) -> None:
        damaged = bytearray(parquet)
        column = pq.read_metadata(case.shard).row_group(4).column(0)
        offset = column.dictionary_page_offset or column.data_page_offset
        damaged[offset : offset + 50] = bytes(50)
        case.shard.write_bytes(damaged)
        assert case.encode()[0] == 3
        assert case.rejected == {"rest_of_shard": 1}
        before = case.stats["digest"]
        case.shard.write_bytes(parquet + b"x" * 50_000)
        code, _, err = case.retry()
        assert (code, case.stats["digest"]) == (1, before)
        assert "its ranges would have other rows; encode it into another cache" in err
        case.shard.write_bytes(parquet)
        assert case.retry()[0] == 0
        case.check_complete(reference)
