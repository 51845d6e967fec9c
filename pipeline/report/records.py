"""What the records of a cache say about its parts and runs, without reading a row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.cache import commits
from pipeline.cache.commit_scan import CacheScan
from pipeline.cache.part_table import CHANNEL_FIELDS
from pipeline.cache.parts import DATA, is_retry_part, parse_unit_name, strip_extension
from pipeline.cache.reader import Cache
from pipeline.report.findings import MAX_EXAMPLES, Example, Finding
from pipeline.wording import count_noun

MIN_PARTS, MIN_ROWS = 4, 8  # parts of fewer rows are not compared with each other
FAR = 10.0  # median absolute deviations
NARROWEST = 0.15  # the least deviation of means and logarithms that is taken as usual
COMMITS_READ = 64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Parts:
    """The tallies of P parts with rows. files: their names. rows: [P]. mean, std: of each channel [P, C]."""

    files: Sequence[str]
    rows: NDArray[np.int64]
    mean: NDArray[np.float64]
    std: NDArray[np.float64]


def read_parts(cache: Cache) -> Parts | None:
    """Return the tallies of a cache's parts; None if it has no rows."""
    pieces = [pool_buckets(table.rows) for table in CacheScan(cache.folder).read_tables(cache.info.identity_sha256)]
    pieces = [piece for piece in pieces if piece.files]
    if not pieces:
        return None
    order = np.argsort(np.array([file for piece in pieces for file in piece.files]))
    files = [file for piece in pieces for file in piece.files]
    return Parts(
        files=[files[number] for number in order],
        rows=np.concatenate([piece.rows for piece in pieces])[order],
        mean=np.concatenate([piece.mean for piece in pieces])[order],
        std=np.concatenate([piece.std for piece in pieces])[order],
    )


def pool_buckets(table: pa.Table) -> Parts:
    """Return the parts of a table with rows, each over all of its buckets. table: `pipeline.cache.part_table`."""
    table = table.filter(pc.and_(pc.greater(table["rows"], 0), pc.is_valid(table["file"]))).combine_chunks()
    owner = pc.list_parent_indices(table["buckets"]).to_numpy()
    values = pc.list_flatten(table["values"]).to_numpy().astype(np.float64)[:, None]
    count = max(1, len(values))
    mean, m2, _, _ = (pc.list_flatten(table[name]).to_numpy().reshape(count, -1) for name in CHANNEL_FIELDS)
    sums = np.zeros((3, len(table), mean.shape[1]))
    if len(values):
        for total, each in zip(sums, (values + 0 * mean, values * mean, m2 + values * mean**2), strict=True):
            np.add.at(total, owner, each)
    means = sums[1] / np.maximum(sums[0], 1)
    return Parts(
        files=table["file"].to_pylist(),
        rows=table["rows"].to_numpy(),
        mean=means,
        std=np.sqrt(np.maximum(sums[2] / np.maximum(sums[0], 1) - means**2, 0)),
    )


def find_unusual_parts(parts: Parts | None) -> list[Finding]:
    """Return a finding of parts whose latents differ from those of all others."""
    if parts is None:
        return []
    kept = np.flatnonzero(parts.rows >= MIN_ROWS)
    if len(kept) < MIN_PARTS:
        return []
    std = np.maximum(parts.std[kept], 1e-6)
    usual = np.median(std, axis=0)
    values = np.concatenate([parts.mean[kept] / usual, np.log(std)], axis=1)
    middle = np.median(values, axis=0)
    width = np.maximum(1.4826 * np.median(abs(values - middle), axis=0), NARROWEST)
    distance = (abs(values - middle) / width).max(axis=1)
    far = [(float(distance[row]), int(kept[row])) for row in np.flatnonzero(distance > FAR)]
    if not far or len(far) > len(kept) / 3:
        return []
    examples = tuple(
        Example(key=parts.files[part], remark=f"{count_noun(int(parts.rows[part]), 'row')}, {away:.0f} deviations")
        for away, part in sorted(far, reverse=True)[:MAX_EXAMPLES]
    )
    sentence = (
        f"The mean or the deviation of {count_noun(len(far), 'part')} of {len(kept):,} is far from that of all others: "
        "a worker may be broken, or the images are of another kind."
    )
    return [
        Finding(
            code="unusual-parts",
            severity="warning",
            sentence=sentence,
            examples=examples,
            command="latentmill verify {cache} --reencode 100",
        )
    ]


def name_hosts(cache: Cache, findings: Sequence[Finding]) -> list[Finding]:
    """Return the findings. Those of parts name the hosts that encoded their examples: one of them may be broken."""
    hosts: dict[str, str] = {}  # by commit: the examples are often of one
    return [
        replace(finding, examples=tuple(_name_host(cache, example, hosts) for example in finding.examples))
        if finding.code in ("unusual-parts", "noisy-unit")
        else finding
        for finding in findings
    ]


def _name_host(cache: Cache, example: Example, hosts: dict[str, str]) -> Example:
    file = example.places[0][0] if example.places else example.key  # of a row, or a file
    stem = strip_extension(file).removeprefix(f"{DATA}/")
    commit = stem if is_retry_part(stem) else parse_unit_name(file)
    if commit not in hosts:
        hosts[commit] = (commits.read_commit_if_exists(cache.folder, commit) or {}).get("host") or ""
    return replace(example, remark=f"{example.remark}, encoded on {hosts[commit]}") if hosts[commit] else example


def read_reject_examples(cache: Cache, per_reason: int = 3, limit: int = 200) -> dict[str, list[Mapping[str, Any]]]:
    """Return the first rejects of each reason, among the first ones of the cache."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for reject in islice(commits.read_rejects(cache.folder), limit):
        examples = found.setdefault(reject["reason"], [])
        if len(examples) < per_reason:
            examples.append(reject)
    return found


def read_precision(cache: Cache) -> tuple[float | None, dict[str, int]]:
    """Return the largest error of the workers' self-checks, and the devices with their commits, of some commits."""
    scan_names = list(islice(commits.iterate_commits(cache.folder), COMMITS_READ))
    errors, devices = [], dict[str, int]()
    for _, content in commits.read_commits(cache.folder, scan_names):
        if content.get("precision_error") is not None:
            errors.append(float(content["precision_error"]))
        compute = content.get("compute") or {}
        name = " ".join(str(compute[key]) for key in ("device", "precision", "form") if key in compute)
        devices[name] = devices.get(name, 0) + 1
    return max(errors, default=None), devices
