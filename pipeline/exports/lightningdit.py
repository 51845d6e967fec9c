"""LightningDiT: safetensors files with the latents, their mirrored twins and the labels, and their statistics."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.exports.job import SPOOL, ExportJob, OutFile, Row
from pipeline.exports.safetensors_bytes import to_safetensors

STATS = "latents_stats.pt"


@dataclass(frozen=True, slots=True)
class LabelledLatent:
    """latent, flipped: float32 [C, h, w]."""

    latent: torch.Tensor
    flipped: torch.Tensor
    label: int


def convert(row: Row, job: ExportJob) -> LabelledLatent:
    """Return a row's two latents and its label."""
    return LabelledLatent(job.read_latent(row), job.read_latent(row, flipped=True), job.read_label(row))


def pack(rows: Iterator[LabelledLatent], job: ExportJob, part: int) -> Iterator[OutFile]:
    """Yield files of as many rows as have 64 MiB. The trainer reads them sorted by name: by part, then by file."""
    shard: list[LabelledLatent] = []
    number = 0
    for row in rows:
        shard.append(row)
        if len(shard) * 2 * row.latent.nbytes >= SPOOL:
            yield make_file(shard, part, number)
            shard, number = [], number + 1
    if shard:
        yield make_file(shard, part, number)


def make_file(shard: Sequence[LabelledLatent], part: int, number: int) -> OutFile:
    """Return one file. part: stands where the trainer's own files have the rank that wrote them."""
    tensors = {
        "latents": torch.stack([row.latent for row in shard]),
        "latents_flip": torch.stack([row.flipped for row in shard]),
        "labels": torch.tensor([row.label for row in shard], dtype=torch.int64),
    }
    metadata = {"total_size": str(len(shard)), "dtype": str(tensors["latents"].dtype), "device": "cpu"}
    name = f"latents_rank{part:05d}_shard{number:03d}.safetensors"
    return OutFile(name, to_safetensors(tensors, metadata), rows=len(shard))


def finish(job: ExportJob, entries: Sequence[Any]) -> Iterator[tuple[str, bytes]]:
    """Yield the statistics that the trainer normalizes with: of all latents of the cache, raw, mirrored ones too."""
    stats = job.read_stats()
    values = {name: torch.tensor(stats[name], dtype=torch.float32).view(1, -1, 1, 1) for name in ("mean", "std")}
    buffer = io.BytesIO()
    torch.save(values, buffer)
    yield STATS, buffer.getvalue()
