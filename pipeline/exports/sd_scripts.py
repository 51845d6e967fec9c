"""sd-scripts: one .npz file per image, named after the image and its size, with its caption beside it."""

import io

import numpy as np

from latentmill.micro_conditioning import find_borders
from pipeline.exports.job import ExportJob, OutFile, Row, check_length
from pipeline.exports.row_files import make_caption


def make_name(row: Row, job: ExportJob) -> str:
    """Return the name of a row's file, without the extensions.

    The trainer reads the size of the image from it, and derives the bucket from that size. With the trainer's own
    recipe, that is the size of the image file; otherwise the size that was encoded.
    """
    is_own_recipe = job.cache.info.identity.preprocessing.transform == "sd-scripts"
    height, width = (row[f"original_{side}" if is_own_recipe else side] for side in ("height", "width"))
    return check_length(f"{job.make_stem(row)}_{width:04d}x{height:04d}{job.options['suffix']}.npz")


def convert(row: Row, job: ExportJob) -> list[OutFile]:
    """Return the file of a row's latents, and its caption."""
    name = make_name(row, job)
    latent = job.read_latent(row)
    end = f"_{latent.shape[1]}x{latent.shape[2]}" if job.options["size_in_keys"] else ""
    left, top, right, bottom = find_borders(row)
    arrays = {
        f"latents{end}": latent.numpy(),
        f"original_size{end}": np.array([row["original_width"], row["original_height"]]),
        f"crop_ltrb{end}": np.array([left, top, right, bottom]),
    }
    if job.has_flipped:
        arrays[f"latents_flipped{end}"] = job.read_latent(row, flipped=True).numpy()
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]  # its own option is allow_pickle, which no key equals
    return [*make_caption(row, job), OutFile(name, buffer.getvalue())]
