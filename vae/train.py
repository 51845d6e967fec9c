"""How the demo model was made: `python -m vae.train --to DIRECTORY`.

The objective is the evidence lower bound of the paper (Kingma & Welling 2014, equation 10) with a Gaussian decoder
of one fixed standard deviation: a reparameterised draw from q(z|x), its reconstruction error, and the divergence of
q(z|x) from a standard normal. The images are the photographs that scikit-image and scikit-learn ship in their
packages; three of them are held out, and no pixel of those is ever trained on.
"""

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from vae.config import AutoencoderKLConfig
from vae.model import AutoencoderKL
from vae.posterior import DiagonalGaussianDistribution

TRAINED_ON = (
    "skimage/astronaut.png",
    "skimage/brick.png",
    "skimage/camera.png",
    "skimage/clock_motion.png",
    "skimage/coins.png",
    "skimage/grass.png",
    "skimage/gravel.png",
    "skimage/hubble_deep_field.jpg",
    "skimage/ihc.png",
    "skimage/moon.png",
    "skimage/motorcycle_left.png",
    "skimage/retina.jpg",
    "sklearn/china.jpg",
    "sklearn/flower.jpg",
)
HELD_OUT = ("skimage/chelsea.png", "skimage/coffee.png", "skimage/rocket.jpg")

DECODER_STD = 0.02  # standard deviation of p(x|z), in units of pixels in [-1, 1]
SCALES = (1.0, 0.75, 0.5, 0.35, 0.25)  # the photographs are also shown reduced

CONFIG = AutoencoderKLConfig(
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(16, 32, 64, 64),
    layers_per_block=1,
    latent_channels=16,
    norm_num_groups=8,
    sample_size=256,
    scaling_factor=1.0,
    force_upcast=False,
    use_quant_conv=False,
    use_post_quant_conv=False,
    mid_block_add_attention=False,
)


def photograph(name: str) -> Tensor:
    """A photograph that a package ships, as [3, H, W] in [-1, 1]."""
    import skimage
    import sklearn.datasets

    package, file = name.split("/")
    folders = {
        "skimage": Path(skimage.__file__).parent / "data",
        "sklearn": Path(sklearn.datasets.__file__).parent / "images",
    }
    with Image.open(folders[package] / file) as image:
        values = np.asarray(image.convert("RGB"))
    return torch.from_numpy(values.copy()).permute(2, 0, 1) / 127.5 - 1


def reduced(pixels: Tensor, scale: float) -> Tensor:
    """[3, H, W], smaller by `scale`, with antialiasing."""
    if scale == 1:
        return pixels
    size = [round(side * scale) for side in pixels.shape[1:]]
    return F.interpolate(pixels[None], size=size, mode="bilinear", antialias=True)[0]


def recoloured(crop: Tensor, draw: np.random.Generator) -> Tensor:
    """A crop [3, h, w] with its channels swapped, mixed towards grey or inverted, its contrast and gamma changed."""
    crop = crop[torch.from_numpy(draw.permutation(3))]
    if draw.random() < 0.1:
        crop = -crop
    grey = crop.mean(dim=0, keepdim=True)
    crop = grey + (crop - grey) * draw.uniform(0.3, 1.5)
    gamma = math.exp(draw.normal(0, 0.25))
    crop = ((crop.clamp(-1, 1) + 1) / 2) ** gamma * 2 - 1
    return (crop * draw.uniform(0.6, 1.1) + draw.normal(0, 0.1)).clamp(-1, 1)


def batches(photos: list[Tensor], size: int, count: int, draw: np.random.Generator) -> Iterator[Tensor]:
    """Endless batches [count, 3, size, size] of augmented crops; half of them keep their colours."""
    while True:
        crops = []
        for _ in range(count):
            photo = photos[draw.integers(len(photos))]
            top = draw.integers(photo.shape[1] - size + 1)
            left = draw.integers(photo.shape[2] - size + 1)
            crop = torch.rot90(photo[:, top : top + size, left : left + size], int(draw.integers(4)), (1, 2))
            if draw.random() < 0.5:
                crop = crop.flip(2)
            if draw.random() < 0.5:
                crop = recoloured(crop, draw)
            crops.append(crop)
        yield torch.stack(crops).contiguous(memory_format=torch.channels_last)


def negative_elbo(model: AutoencoderKL, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The negative evidence lower bound of images x [B, 3, H, W], and its two terms, in nats a pixel value.

    Constants of the Gaussian likelihood are left out.
    """
    posterior = DiagonalGaussianDistribution(model.moments(x))
    reconstruction = model.decode(posterior.sample(generator)).sample
    distortion = (reconstruction - x).pow(2).mean() / (2 * DECODER_STD**2)
    rate = posterior.kl().sum() / x.numel()
    return distortion + rate, distortion, rate


@torch.inference_mode()
def psnr(model: AutoencoderKL, photo: Tensor, size: int = 256) -> float:
    """Peak signal-to-noise ratio in dB of the reconstruction from the mode, at `size` px, in 8-bit pixels."""
    small = reduced(photo, size / min(photo.shape[1:]))
    top, left = (small.shape[1] - size) // 2, (small.shape[2] - size) // 2
    x = small[None, :, top : top + size, left : left + size]
    back = model.decode(model.encode(x).latent_dist.mode()).sample
    error = (((back.clamp(-1, 1) + 1) * 127.5).round() - ((x + 1) * 127.5).round()).pow(2).mean()
    return float(20 * math.log10(255) - 10 * torch.log10(error))


@torch.inference_mode()
def with_latent_constants(model: AutoencoderKL, photos: list[Tensor]) -> AutoencoderKL:
    """The same model, its configuration carrying mean and standard deviation a channel of its raw latents."""
    latents = [model.encode(p[None, :, : p.shape[1] // 8 * 8, : p.shape[2] // 8 * 8]) for p in photos]
    values = torch.cat([out.latent_dist.mode()[0].flatten(1) for out in latents], dim=1)
    mean, std = values.mean(dim=1).tolist(), values.std(dim=1, correction=0).tolist()
    fields = {**model.config, "latents_mean": [round(v, 4) for v in mean], "latents_std": [round(v, 4) for v in std]}
    done = AutoencoderKL(**fields)
    done.load_state_dict(model.state_dict())
    return done.eval()


def report(model: AutoencoderKL) -> str:
    """PSNR of every held-out photograph."""
    return ", ".join(f"{Path(name).stem} {psnr(model.eval(), photograph(name)):.2f} dB" for name in HELD_OUT)


def train(to: Path, steps: int, seed: int) -> None:
    """Train for `steps` steps, the last quarter on larger crops, and save the model, every 500 steps too."""
    torch.manual_seed(seed)
    draw, noise = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    levels = [reduced(photograph(name), scale) for name in TRAINED_ON for scale in SCALES]
    small, large = ([p for p in levels if min(p.shape[1:]) >= size] for size in (64, 128))
    stages = {0: batches(small, 64, 16, draw), steps * 3 // 4 + 1: batches(large, 128, 4, draw)}

    model = AutoencoderKL(**CONFIG).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    warm_up = min(200, steps // 10 + 1)
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * i / steps)) + 1e-3
    )
    started = time.perf_counter()
    source = stages[0]
    for step in range(1, steps + 1):
        source = stages.get(step, source)
        model.train()
        loss, distortion, rate = negative_elbo(model, next(source), noise)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        if step % 100 == 0:
            seconds = time.perf_counter() - started
            print(f"{step} of {steps}, {seconds:.0f} s: distortion {distortion:.3f}, rate {rate:.3f} nats", flush=True)
        if step % 500 == 0 or step == steps:
            print(report(model), flush=True)
            with_latent_constants(model, [photograph(name) for name in TRAINED_ON]).save_pretrained(to)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True, help="directory to save the model in")
    parser.add_argument("--steps", type=int, default=6000, help="steps of 65,536 pixels (default: 6000)")
    parser.add_argument("--threads", type=int, default=1, help="intra-op threads (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train(options.to, options.steps, options.seed)


if __name__ == "__main__":
    main()
