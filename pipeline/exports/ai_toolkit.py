"""ai-toolkit: one safetensors file per image, named after the image and a hash of how the trainer resizes it."""

import base64
import hashlib
import json

from pipeline.exports.job import ExportJob, OutFile, RefusedRow, Row, check_length
from pipeline.exports.safetensors_bytes import to_safetensors

FOLDER = "_latent_cache"
VERSION = 1  # of the latents' format in the trainer


def convert(row: Row, job: ExportJob) -> list[OutFile]:
    """Return the file of a row's latent [C, h, w], in the folder of the image.

    Raises RefusedRow for an image that the trainer would resize or turn.
    """
    size = row["height"], row["width"]
    if size != (row["original_height"], row["original_width"]):
        raise RefusedRow("its image was resized or cropped, which the trainer does by itself")
    facts = describe(row, job.options["latent_space"])
    digest = hashlib.md5(json.dumps(facts, sort_keys=True).encode(), usedforsecurity=False).digest()
    folder, slash, stem = job.make_stem(row).rpartition("/")
    name = f"{stem}_{base64.urlsafe_b64encode(digest).decode().rstrip('=')}.safetensors"
    metadata = {key: str(value) for key, value in facts.items()}
    data = to_safetensors({"latent": job.read_latent(row)}, metadata)
    return [OutFile(check_length(f"{folder}{slash}{FOLDER}/{name}"), data)]


def describe(row: Row, latent_space: str) -> dict[str, object]:
    """Return what the hash covers: an image that has the size of its bucket is neither resized nor cropped."""
    height, width = row["height"], row["width"]
    return {
        "filename": row["image_name"],
        "scale_to_width": width,
        "scale_to_height": height,
        "crop_x": 0,
        "crop_y": 0,
        "crop_width": width,
        "crop_height": height,
        "latent_space_version": latent_space,
        "latent_version": VERSION,
    }
