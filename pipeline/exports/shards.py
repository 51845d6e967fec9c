"""Plain safetensors files for loaders of one's own: raw latents of one size as one tensor, and their rows as JSON."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.canonical_json import canonical_json
from pipeline.exports.job import SPOOL, ExportJob, OutFile, Row
from pipeline.exports.safetensors_bytes import to_safetensors
from pipeline.values import to_json_value

LATENTS = {"latent": "latents", "latent_flipped": "latents_flipped"}  # columns, and the names of their tensors


@dataclass(frozen=True, slots=True)
class ShardRow:
    """tensors: as stored, by their name in the file, [C, h, w] or [2C, h, w]. facts: the other columns."""

    tensors: dict[str, torch.Tensor]
    facts: dict[str, Any]


def convert(row: Row, job: ExportJob) -> ShardRow:
    """Return a row's latents as they are stored, and its other columns as JSON values."""
    names = [name for name in LATENTS if name in row]
    tensors = {LATENTS[name]: job.cache.raw_latent(row, name == "latent_flipped") for name in names}
    return ShardRow(tensors, {name: to_json_value(value) for name, value in row.items() if name not in LATENTS})


def pack(rows: Iterator[ShardRow], job: ExportJob, part: int) -> Iterator[OutFile]:
    """Yield files of as many rows of one size as have 64 MiB."""
    shard: list[ShardRow] = []
    held = number = 0
    for row in rows:
        if shard and (held >= SPOOL or row.tensors["latents"].shape != shard[0].tensors["latents"].shape):
            yield from make_files(shard, job, f"part-{part:05d}-{number:03d}")
            shard, held, number = [], 0, number + 1
        shard.append(row)
        held += sum(tensor.nbytes for tensor in row.tensors.values())
    if shard:
        yield from make_files(shard, job, f"part-{part:05d}-{number:03d}")


def make_files(shard: Sequence[ShardRow], job: ExportJob, stem: str) -> Iterator[OutFile]:
    """Yield the columns of the rows, a line each, and then their latents."""
    lines = [json.dumps(row.facts, ensure_ascii=False, separators=(",", ":")) for row in shard]
    yield OutFile(f"{stem}.jsonl", "".join(f"{line}\n" for line in lines).encode(), rows=0)
    tensors = {name: torch.stack([row.tensors[name] for row in shard]) for name in shard[0].tensors}
    info = job.cache.info
    metadata = {"store": info.identity.store, "vae": canonical_json(info.vae.constants).decode()}
    yield OutFile(f"{stem}.safetensors", to_safetensors(tensors, metadata), rows=len(shard))
