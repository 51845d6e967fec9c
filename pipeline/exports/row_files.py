"""Formats with a file per image and no index: musubi-tuner, SimpleTuner."""

import hashlib
import io
from collections.abc import Iterator

import torch

from pipeline.exports.job import ExportJob, OutFile, Row, check_length
from pipeline.exports.safetensors_bytes import to_safetensors


def pack(rows: Iterator[list[OutFile]], job: ExportJob, part: int) -> Iterator[OutFile]:
    """Yield the files of the rows."""
    for files in rows:
        yield from files


def make_caption(row: Row, job: ExportJob) -> list[OutFile]:
    """Return the file with a row's caption, if it has one. A caption that is there already is the user's own."""
    caption = job.read_caption(row)
    if caption is None:
        return []
    return [OutFile(check_length(f"{job.make_stem(row)}.txt"), caption.encode(), rows=0, keeps_existing=True)]


def name_musubi(row: Row, job: ExportJob) -> str:
    """Return the name of a row's file, with the encoded size."""
    return check_length(
        f"{job.make_stem(row)}_{row['width']:04d}x{row['height']:04d}_{job.options['architecture']}.safetensors"
    )


def convert_musubi(row: Row, job: ExportJob) -> list[OutFile]:
    """Return the file of a row's latent: one tensor [C, h, w], whose name has its size and dtype."""
    latent = job.read_latent(row)
    frames = "" if job.options["is_flux2"] else "1x"
    size = f"{frames}{latent.shape[1]}x{latent.shape[2]}"
    metadata = {
        "architecture": job.options["architecture_name"],
        "width": str(row["width"]),
        "height": str(row["height"]),
        "format_version": "1.0.1",
    }
    name = f"latents_{size}_{str(latent.dtype).removeprefix('torch.')}"
    return [OutFile(name_musubi(row, job), to_safetensors({name: latent}, metadata))]


def name_simpletuner(row: Row, job: ExportJob) -> str:
    """Return the name of a row's file: the sha256 of the image's stem, in the folder of the image."""
    folder, slash, stem = job.make_stem(row).rpartition("/")
    return check_length(f"{folder}{slash}{hashlib.sha256(stem.encode()).hexdigest()}.pt")


def convert_simpletuner(row: Row, job: ExportJob) -> list[OutFile]:
    """Return the file of a row's latent: one tensor [C, h, w], as torch saves it."""
    buffer = io.BytesIO()
    torch.save(job.read_latent(row).clone(), buffer)
    return [OutFile(name_simpletuner(row, job), buffer.getvalue())]
