"""What the benchmarks run on: photographs as img2dataset would have stored them, and a micro model."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage import data

from vae import AutoencoderKL

# scikit-image ships these in its package; nothing is downloaded.
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "retina.jpg", "rocket.jpg")
LONG, SHORT = 512, 384
NOISE = 3.0  # standard deviation, of 255: a sensor's; resizing has taken it out of the photographs
MICRO = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (8, 8, 8, 8),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
}


def make_shards(folder: Path, shards: int, images: int) -> None:
    """Write `images` samples (jpg, txt, json) into `shards` tars; the same ones every time."""
    folder.mkdir(parents=True, exist_ok=True)
    photographs = [Image.open(Path(data.__file__).parent / name).convert("RGB") for name in PHOTOGRAPHS]
    for number in range(shards):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for index in range(number * images // shards, (number + 1) * images // shards):
                caption = f"a piece of {PHOTOGRAPHS[index % len(PHOTOGRAPHS)]}"
                facts = {"key": f"{index:09d}", "caption": caption, "url": None, "status": "success"}
                add(tar, f"{index:09d}.jpg", image(photographs[index % len(photographs)], index))
                add(tar, f"{index:09d}.txt", caption.encode())
                add(tar, f"{index:09d}.json", json.dumps(facts).encode())


def image(photograph: Image.Image, seed: int) -> bytes:
    """A JPEG of a random piece of a photograph: a third of them upright, the others lying."""
    draw = np.random.default_rng(seed)
    width, height = (SHORT, LONG) if draw.random() < 1 / 3 else (LONG, SHORT)
    scale = min(photograph.width / width, photograph.height / height) * draw.uniform(0.6, 1.0)
    left = draw.uniform(0, photograph.width - width * scale)
    top = draw.uniform(0, photograph.height - height * scale)
    box = (left, top, left + width * scale, top + height * scale)
    pixels = np.asarray(photograph.resize((width, height), Image.Resampling.LANCZOS, box))
    noisy = pixels + draw.normal(0, NOISE, pixels.shape)
    sink = io.BytesIO()
    Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8)).save(sink, "JPEG", quality=90)
    return sink.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a member to a tar."""
    header = tarfile.TarInfo(name)
    header.size = len(content)
    tar.addfile(header, io.BytesIO(content))


def read_images(folder: Path, count: int) -> list[bytes]:
    """The JPEGs of the first `count` samples."""
    found: list[bytes] = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member)
                if member.name.endswith(".jpg") and content is not None:
                    found.append(content.read())
                if len(found) == count:
                    return found
    return found


def make_model(folder: Path) -> None:
    """Save a micro AutoencoderKL of random weights: f8, 4 channels. diffusers loads the same directory."""
    torch.manual_seed(0)
    AutoencoderKL(**MICRO).save_pretrained(folder)
