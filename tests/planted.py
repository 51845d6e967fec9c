"""A cache with planted faults: photographs in crops, and a worker that encodes some units wrongly."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from latentmill import Scaling
from pipeline.encoder import LatentEncoder
from pipeline.records import EncodedImage, PreparedImage
from tests.conftest import encoded, write_tar

PHOTOS = Path(__file__).parents[1] / "examples/photos"
SIDE = 64  # of the images, in pixels
UNITS = 8  # tars of more than 8 MiB would be units of their own; a tar of two copies of one image is large enough
PER_UNIT = 26

Fault = Callable[[LatentEncoder, PreparedImage], torch.Tensor]


def make_crops(count: int) -> list[bytes]:
    """Return JPEGs that are different parts of the photographs, at several scales and mirrored, in a mixed order."""
    crops = []
    for photo, scale in itertools.product(sorted(PHOTOS.glob("*.jpg")), (128, 190)):
        image = Image.open(photo).convert("RGB")
        for top, left in itertools.product(range(0, image.height - scale, 90), range(0, image.width - scale, 90)):
            crop = image.crop((left, top, left + scale, top + scale))
            crop = ImageOps.mirror(crop) if (top // 90 + left // 90) % 2 else crop
            crops.append(crop.resize((80, 80)))
    order = np.random.default_rng(0).permutation(len(crops))[:count]
    return [encoded(np.asarray(crops[number]), quality=95) for number in order]


def write_source(folder: Path, faulty: bool) -> Path:
    """Write 8 tars of 26 crops with captions. faulty: with duplicates, constant images and missing captions."""
    images = make_crops(UNITS * PER_UNIT)
    captions: list[str | None] = [f"part {number} of a photograph" for number in range(len(images))]
    if faulty:
        first = 4 * PER_UNIT
        images[first : first + 11] = images[:11]  # 5% of all rows
        for number, level in enumerate((0, 60, 128, 200, 255)):
            flat = np.full((80, 80, 3), level, np.uint8)
            images[5 * PER_UNIT + number] = encoded(flat)
        captions[6 * PER_UNIT : 6 * PER_UNIT + 13] = [None] * 13
    for unit in range(UNITS):
        members: dict[str, bytes] = {}
        for number in range(unit * PER_UNIT, (unit + 1) * PER_UNIT):
            members[f"{number:06d}.jpg"] = images[number]
            if (caption := captions[number]) is not None:
                members[f"{number:06d}.txt"] = caption.encode()
        write_tar(folder / f"{unit}.tar", members)
    return folder


def use_wrong_range(encoder: LatentEncoder, image: PreparedImage) -> torch.Tensor:
    """Encode values of [0, 1]."""
    values = image.pixels.float().div(255).permute(2, 0, 1)[None]
    return encoder.model.encode(values).latent_dist.mode()[0]


def scale_latent(encoder: LatentEncoder, image: PreparedImage) -> torch.Tensor:
    """Encode an image, and scale its latent."""
    config = encoder.model.config
    scaling = Scaling.from_constants(config.scaling_factor, None, config.latents_mean, config.latents_std)
    values = image.pixels.float().div(127.5).sub(1).permute(2, 0, 1)[None]
    return scaling.to_model(encoder.model.encode(values).latent_dist.mode()[0])


def swap_colors(encoder: LatentEncoder, image: PreparedImage) -> torch.Tensor:
    """Encode an image with red and blue swapped."""
    values = image.pixels.flip(-1).float().div(127.5).sub(1).permute(2, 0, 1)[None]
    return encoder.model.encode(values).latent_dist.mode()[0]


def make_noise(encoder: LatentEncoder, image: PreparedImage) -> torch.Tensor:
    """Return noise."""
    generator = torch.Generator().manual_seed(image.position)
    return torch.randn((16, SIDE // 8, SIDE // 8), generator=generator)


FAULTS: Mapping[str, Fault] = {
    "1.tar": use_wrong_range,
    "2.tar": scale_latent,
    "3.tar": swap_colors,
    "7.tar": make_noise,
}


def break_encoder(monkeypatch: pytest.MonkeyPatch, faults: Mapping[str, Fault] = FAULTS) -> None:
    """Let the encoder of this process make the latents of these tars by their faults."""
    finish = LatentEncoder.finish

    def finish_wrongly(self: LatentEncoder, launched: object) -> list[EncodedImage]:
        results = []
        with torch.inference_mode():
            for item, result in zip(launched.inputs, finish(self, launched), strict=True):  # type: ignore[attr-defined]
                fault = faults.get(item.image.shard.rpartition("/")[2])
                latent = result.latent if fault is None else fault(self, item.image).to(self.dtype).clone()
                results.append(dataclasses.replace(result, latent=latent))
        return results

    monkeypatch.setattr(LatentEncoder, "finish", finish_wrongly)
