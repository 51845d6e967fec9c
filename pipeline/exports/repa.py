"""REPA: one .npy file per image with the mean and the standard deviation of its posterior, and dataset.json."""

import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from latentmill.loading.draws import LOGVAR_RANGE
from pipeline.exports.job import ExportJob, OutFile, Row, check_length

INDEX = "dataset.json"


def make_name(row: Row, job: ExportJob) -> str:
    """Return the name of a row's file: the image's, so that sorted images and sorted files pair up."""
    return check_length(f"{job.make_stem(row)}.npy")


def convert(row: Row, job: ExportJob) -> list[OutFile]:
    """Return the file of a row: float32 [2C, h, w], the means and then the standard deviations."""
    mean, log_variance = job.cache.raw_latent(row).float().chunk(2)
    deviation = (log_variance.clamp(*LOGVAR_RANGE) * 0.5).exp()
    buffer = io.BytesIO()
    np.save(buffer, job.cast(torch.cat([mean, deviation])).numpy())
    name = make_name(row, job)
    return [OutFile(name, buffer.getvalue(), entry=[name, job.read_label(row)])]


def finish(job: ExportJob, entries: Sequence[Any]) -> Iterator[tuple[str, bytes]]:
    """Yield the index: the name and the label of each file."""
    yield INDEX, json.dumps({"labels": sorted(entries)}, ensure_ascii=False).encode()
