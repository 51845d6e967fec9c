"""Train the small demo model that ships in vae/demo. You do not need this to encode images.

    python -m vae.train --to DIRECTORY

The defaults made vae/demo: 6,000 steps in 84 minutes on one CPU thread. Needs the extra `train`
(scikit-image and scikit-learn). Every 100 steps, it prints the two terms of the loss. Every 500 steps, it prints the
PSNR of the held-out photos and saves the model to DIRECTORY, which `--vae DIRECTORY` then accepts.

The loss is the negative evidence lower bound (Kingma & Welling 2013, equation 10), with a Gaussian decoder of fixed
standard deviation. It needs a random latent from q(z|x), its reconstruction error (the distortion), and the divergence
of q(z|x) from a standard normal (the rate). There is no perceptual or adversarial loss, unlike in latent diffusion.

The training images are photos that the packages scikit-image and scikit-learn contain, so nothing is downloaded.
Three photos are held out, and no pixel of them is used for training.
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

DECODER_STD = 0.02  # standard deviation of p(x|z), for pixels in [-1, 1]
SCALES = (1.0, 0.75, 0.5, 0.35, 0.25)  # each photo is used at these scales, so that detail of every size occurs

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


def load_photo(name: str) -> Tensor:
    """Return a photo of a package as pixels [3, H, W] in [-1, 1]. name: `skimage/FILE` or `sklearn/FILE`."""
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


def downscale(pixels: Tensor, scale: float) -> Tensor:
    """Return pixels [3, H, W] with both sides multiplied by `scale` (at most 1), with antialiasing."""
    if scale == 1:
        return pixels
    size = [round(side * scale) for side in pixels.shape[1:]]
    return F.interpolate(pixels[None], size=size, mode="bilinear", antialias=True)[0]


def jitter_colors(crop: Tensor, rng: np.random.Generator) -> Tensor:
    """Return a crop [3, h, w] in [-1, 1] with random changes of its colors.

    Channels are permuted, and one crop in ten is inverted. Saturation, gamma, contrast and brightness change.
    """
    crop = crop[torch.from_numpy(rng.permutation(3))]
    if rng.random() < 0.1:
        crop = -crop
    gray = crop.mean(dim=0, keepdim=True)
    crop = gray + (crop - gray) * rng.uniform(0.3, 1.5)
    gamma = math.exp(rng.normal(0, 0.25))
    crop = ((crop.clamp(-1, 1) + 1) / 2) ** gamma * 2 - 1
    return (crop * rng.uniform(0.6, 1.1) + rng.normal(0, 0.1)).clamp(-1, 1)


def iterate_batches(photos: list[Tensor], size: int, count: int, rng: np.random.Generator) -> Iterator[Tensor]:
    """Yield batches [count, 3, size, size] of random crops in [-1, 1], without end.

    Each crop is rotated and mirrored at random. Half of the crops also change their colors.
    """
    while True:
        crops = []
        for _ in range(count):
            photo = photos[rng.integers(len(photos))]
            top = rng.integers(photo.shape[1] - size + 1)
            left = rng.integers(photo.shape[2] - size + 1)
            crop = torch.rot90(photo[:, top : top + size, left : left + size], int(rng.integers(4)), (1, 2))
            if rng.random() < 0.5:
                crop = crop.flip(2)
            if rng.random() < 0.5:
                crop = jitter_colors(crop, rng)
            crops.append(crop)
        yield torch.stack(crops).contiguous(memory_format=torch.channels_last)


def negative_elbo(model: AutoencoderKL, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return the negative evidence lower bound of images, and its two terms: distortion and rate.

    x: pixels [B, 3, H, W] in [-1, 1]. The results are scalars in nats per pixel value (B*3*H*W values). The constant
    term of the Gaussian likelihood is omitted.
    """
    posterior = DiagonalGaussianDistribution(model.moments(x))
    reconstruction = model.decode(posterior.sample(generator)).sample
    distortion = (reconstruction - x).pow(2).mean() / (2 * DECODER_STD**2)
    rate = posterior.kl().sum() / x.numel()
    return distortion + rate, distortion, rate


@torch.inference_mode()
def psnr(model: AutoencoderKL, photo: Tensor, size: int = 256) -> float:
    """Return the peak signal-to-noise ratio in dB of a photo's reconstruction from the mode, in 8-bit pixels.

    photo: pixels [3, H, W] in [-1, 1]. Its shorter side is resized to `size`, and its center is cropped to a square.
    """
    small = downscale(photo, size / min(photo.shape[1:]))
    top, left = (small.shape[1] - size) // 2, (small.shape[2] - size) // 2
    x = small[None, :, top : top + size, left : left + size]
    reconstruction = model.decode(model.encode(x).latent_dist.mode()).sample
    error = (((reconstruction.clamp(-1, 1) + 1) * 127.5).round() - ((x + 1) * 127.5).round()).pow(2).mean()
    return float(20 * math.log10(255) - 10 * torch.log10(error))


@torch.inference_mode()
def add_latent_constants(model: AutoencoderKL, photos: list[Tensor]) -> AutoencoderKL:
    """Return a copy of the model whose configuration has `latents_mean` and `latents_std`.

    They are the mean and the standard deviation per channel of the raw latents of `photos` ([3, H, W] in [-1, 1]).
    """
    posteriors = [model.encode(p[None, :, : p.shape[1] // 8 * 8, : p.shape[2] // 8 * 8]) for p in photos]
    values = torch.cat([output.latent_dist.mode()[0].flatten(1) for output in posteriors], dim=1)
    mean, std = values.mean(dim=1).tolist(), values.std(dim=1, correction=0).tolist()
    fields = {**model.config, "latents_mean": [round(v, 4) for v in mean], "latents_std": [round(v, 4) for v in std]}
    copy = AutoencoderKL(**fields)
    copy.load_state_dict(model.state_dict())
    return copy.eval()


def format_psnrs(model: AutoencoderKL) -> str:
    """Return the PSNR of every held-out photo as text."""
    return ", ".join(f"{Path(name).stem} {psnr(model.eval(), load_photo(name)):.2f} dB" for name in HELD_OUT)


def train(to: Path, steps: int, seed: int) -> None:
    """Train the demo model, and save it to the directory `to` every 500 steps and at the end.

    The last quarter of the steps uses larger crops: 4 of 128 px per step instead of 16 of 64 px.
    """
    torch.manual_seed(seed)
    rng, noise = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    photos = [downscale(load_photo(name), scale) for name in TRAINED_ON for scale in SCALES]
    small, large = ([photo for photo in photos if min(photo.shape[1:]) >= size] for size in (64, 128))
    # The key is the first step of a stage.
    stages = {0: iterate_batches(small, 64, 16, rng), steps * 3 // 4 + 1: iterate_batches(large, 128, 4, rng)}

    model = AutoencoderKL(**CONFIG).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    warm_up = min(200, steps // 10 + 1)  # steps of linear warm-up, then a cosine decay
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * i / steps)) + 1e-3
    )
    started = time.perf_counter()
    batches = stages[0]
    for step in range(1, steps + 1):
        batches = stages.get(step, batches)
        model.train()
        loss, distortion, rate = negative_elbo(model, next(batches), noise)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            seconds = time.perf_counter() - started
            losses = f"distortion {distortion:.3f}, rate {rate:.3f} nats per pixel value"
            print(f"step {step} of {steps}, {seconds:.0f} s: {losses}", flush=True)
        if step % 500 == 0 or step == steps:
            print(f"PSNR of held-out photos: {format_psnrs(model)}", flush=True)
            add_latent_constants(model, [load_photo(name) for name in TRAINED_ON]).save_pretrained(to)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True, help="directory to save the model to")
    parser.add_argument("--steps", type=int, default=6000, help="training steps of 65,536 pixels (default: 6000)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, crops and noise (default: 0)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train(options.to, options.steps, options.seed)


if __name__ == "__main__":
    main()
