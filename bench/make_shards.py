"""Inputs of the benchmarks: tar shards in the layout of img2dataset, and a micro VAE with random weights.

The images are random crops of photos that scikit-image ships in its package, so nothing is downloaded. The same
arguments give the same images.
"""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage import data

from bench.vae import MICRO
from vae import AutoencoderKL

PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "retina.jpg", "rocket.jpg")
LONG, SHORT = 512, 384  # sides of an image in pixels
NOISE_STD = 3.0  # of 255: the noise of a camera's sensor, which the resized photos have lost


def make_shards(folder: Path, shards: int, images: int) -> None:
    """Write `images` samples (jpg, txt, json) to `shards` tars in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    photos = [Image.open(Path(data.__file__).parent / name).convert("RGB") for name in PHOTOS]
    for number in range(shards):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for index in range(number * images // shards, (number + 1) * images // shards):
                caption = f"a piece of {PHOTOS[index % len(PHOTOS)]}"
                metadata = {"key": f"{index:09d}", "caption": caption, "url": None, "status": "success"}
                add_member(tar, f"{index:09d}.jpg", make_jpeg(photos[index % len(photos)], index))
                add_member(tar, f"{index:09d}.txt", caption.encode())
                add_member(tar, f"{index:09d}.json", json.dumps(metadata).encode())


def make_jpeg(photo: Image.Image, seed: int) -> bytes:
    """Return a JPEG of a random crop of a photo. One third of the images are portrait, the others landscape."""
    rng = np.random.default_rng(seed)
    width, height = (SHORT, LONG) if rng.random() < 1 / 3 else (LONG, SHORT)
    scale = min(photo.width / width, photo.height / height) * rng.uniform(0.6, 1.0)
    left = rng.uniform(0, photo.width - width * scale)
    top = rng.uniform(0, photo.height - height * scale)
    box = (left, top, left + width * scale, top + height * scale)
    pixels = np.asarray(photo.resize((width, height), Image.Resampling.LANCZOS, box))
    noisy = pixels + rng.normal(0, NOISE_STD, pixels.shape)
    buffer = io.BytesIO()
    Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Append a file to a tar."""
    header = tarfile.TarInfo(name)
    header.size = len(content)
    tar.addfile(header, io.BytesIO(content))


def read_images(folder: Path, count: int) -> list[bytes]:
    """Return the JPEGs of the first `count` samples in the tars of `folder`."""
    images: list[bytes] = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member)
                if member.name.endswith(".jpg") and content is not None:
                    images.append(content.read())
                if len(images) == count:
                    return images
    return images


def make_model(folder: Path) -> None:
    """Save a micro AutoencoderKL (downscale 8, 4 latent channels) to `folder`. diffusers loads it too."""
    torch.manual_seed(0)
    AutoencoderKL(**MICRO).save_pretrained(folder)
