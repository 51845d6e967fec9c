"""Train a small latent diffusion transformer on a latent cache, and draw samples from it.

    latentmill encode examples/photos --to latents --vae demo --resolution 256
    python examples/train.py latents --to run                 # again after Ctrl-C: it goes on where it was saved
    python examples/train.py latents --to run --sample-only   # draw other samples: --seed 2

The model is a DiT (Peebles and Xie 2023) with adaLN-zero blocks, trained as a rectified flow (Liu et al. 2022) on model
latents. Captions are bags of hashed words, so that no text encoder is needed. The run is a folder with `checkpoint.pt`
and `samples.png`, one image per caption. A resumed run on a CPU gives the same weights as one that was not stopped,
because the order of the images is a function of seed, epoch and step, and the noise is one of seed and step.
"""

import argparse
import itertools
import math
import os
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from latentmill import Cache, Loader
from vae import AutoencoderKL

WORDS = 4096  # rows of the table of hashed words
NO_CAPTION = 0.1  # share of the images whose caption is left out, for classifier-free guidance
COPIES = 4  # of each latent in a batch, each with noise and a time of its own


class Block(nn.Module):
    """A transformer block whose layer norms are scaled and shifted by the condition."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Return the tokens [B, tokens, width]. condition: [B, width]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(condition))[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attend(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)

    def attend(self, x: Tensor) -> Tensor:
        """Return the self-attention of tokens [B, tokens, width]."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """Predict the velocity of a latent at a time between 0 (image) and 1 (noise)."""

    def __init__(self, channels: int, width: int, depth: int, patch: int) -> None:
        super().__init__()
        self.patch, self.width = patch, width
        self.words = nn.EmbeddingBag(WORDS, width, mode="sum")
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.read = nn.Linear(channels * patch**2, width)
        self.blocks = nn.ModuleList(Block(width, heads=width // 64) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.write = nn.Linear(width, channels * patch**2)
        nn.init.zeros_(self.write.weight)
        nn.init.zeros_(self.write.bias)

    def forward(self, latents: Tensor, times: Tensor, captions: list[str]) -> Tensor:
        """Return the velocity [B, C, h, w] of latents of that shape. times: [B], in [0, 1]. captions: B texts."""
        height, width = latents.shape[-2:]
        if height % self.patch or width % self.patch:
            raise ValueError(f"latents of {height} x {width} have no patches of {self.patch}; use another --patch")
        tokens = self.read(F.unfold(latents, self.patch, stride=self.patch).transpose(1, 2))
        tokens = tokens + embed_positions(height // self.patch, width // self.patch, self.width).to(tokens)
        condition = self.time(embed_numbers(1000 * times, self.width)) + self.embed_captions(captions)
        for block in self.blocks:
            tokens = block(tokens, condition)
        patches = self.write(self.norm(tokens)).transpose(1, 2)
        return F.fold(patches, (height, width), self.patch, stride=self.patch)

    def embed_captions(self, captions: list[str]) -> Tensor:
        """Return the sum of the words' embeddings [B, width], 0 for an empty caption."""
        words = [[zlib.crc32(word.encode()) % WORDS for word in caption.lower().split()] for caption in captions]
        offsets = np.cumsum([0, *map(len, words)])[:-1]
        device = self.words.weight.device
        flat = torch.tensor([word for line in words for word in line], dtype=torch.int64, device=device)
        return self.words(flat, torch.tensor(offsets, device=device)) / 4


def embed_numbers(numbers: Tensor, width: int) -> Tensor:
    """Return sines and cosines of numbers [N] at width / 2 frequencies: [N, width]."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=numbers.device) / (width // 2))
    angles = numbers[:, None].float() * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def embed_positions(rows: int, columns: int, width: int) -> Tensor:
    """Return the embedding of each position of a grid, row by row: [rows * columns, width]."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.cat([embed_numbers(axis.flatten(), width // 2) for axis in (row, column)], dim=1)


def compute_loss(model: Transformer, latents: Tensor, captions: list[str | None], generator: torch.Generator) -> Tensor:
    """Return the mean squared error of the velocity at random times. latents: [B, C, h, w], model space."""
    latents = latents.repeat(COPIES, 1, 1, 1)
    times = torch.randn(len(latents), generator=generator).sigmoid().to(latents)  # most are in the middle
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    dropped = torch.rand(len(latents), generator=generator) < NO_CAPTION
    texts = ["" if drop else text or "" for drop, text in zip(dropped, captions * COPIES, strict=True)]
    share = times[:, None, None, None]
    velocity = model((1 - share) * latents + share * noise, times, texts)
    return F.mse_loss(velocity, noise - latents)


@torch.no_grad()
def draw_samples(model: Transformer, captions: list[str], shape: tuple[int, ...], options: Any) -> Tensor:
    """Return model latents [captions, C, h, w], from noise by Heun's method with guidance."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(options.seed)
    latents = torch.randn((len(captions), *shape), generator=generator).to(device)

    def find_velocity(latents: Tensor, time: Tensor) -> Tensor:
        both = model(latents.repeat(2, 1, 1, 1), time.expand(2 * len(latents)), captions + [""] * len(captions))
        with_caption, without = both.chunk(2)
        return without + options.guidance * (with_caption - without)

    times = torch.linspace(1, 0, options.sampling_steps + 1, device=device)
    for start, stop in itertools.pairwise(times):
        velocity = find_velocity(latents, start)
        moved = latents + (stop - start) * velocity
        latents = latents + (stop - start) * (velocity + find_velocity(moved, stop)) / 2
    return latents


def save_samples(model: Transformer, cache: Cache, state: dict[str, Any], options: Any) -> None:
    """Draw a sample per caption, decode them by the VAE of the cache, and save them side by side."""
    latents = draw_samples(model.eval(), state["captions"], state["shape"], options)
    model.train()
    vae = AutoencoderKL.from_pretrained(options.vae or cache.info.vae.reference)
    images = vae.decode(cache.scaling.to_raw(latents.cpu())).sample  # [captions, 3, H, W] in [-1, 1]
    pixels = (images.clamp(-1, 1) * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    Image.fromarray(np.concatenate(list(pixels), axis=1)).save(options.to / "samples.png")
    print(f"samples: {options.to / 'samples.png'}, from left to right:", *state["captions"], sep="\n  ")


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Replace the checkpoint as a whole, so that a crash leaves the old one or the new one."""
    torch.save(state, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def train(model: Transformer, loader: Loader, state: dict[str, Any], options: Any) -> None:
    """Train up to `options.steps`. state: the last checkpoint; it is updated, and saved."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.0)
    if "optimizer" in state:
        optimizer.load_state_dict(state["optimizer"])
        loader.load_state_dict(state["loader"])
        print(f"resumed at step {state['step']}, epoch {loader.epoch}")
    device, step, begun = next(model.parameters()).device, state["step"], time.monotonic()
    losses = list[float]()
    while step < options.steps:
        for batch in loader:  # the rest of an epoch
            rate = options.learning_rate * min(1, (step + 1) / 100) * math.cos(math.pi / 2 * step / options.steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            generator = torch.Generator().manual_seed(options.seed << 32 | step)
            loss = compute_loss(model, batch["latents"].to(device), batch["captions"], generator)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            losses.append(loss.item())
            if step % options.save_every == 0 or step == options.steps:
                mean, seconds = np.mean(losses[-options.save_every :]), time.monotonic() - begun
                print(f"step {step}: loss {mean:.4f}, {len(losses) / seconds:.1f} steps/s", flush=True)
                state |= {"step": step, "loader": loader.state_dict()}
                state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                save_checkpoint(options.to / "checkpoint.pt", state)
            if step == options.steps:
                break


def parse_options() -> Any:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", help="a latent cache: a path or a URL")
    parser.add_argument("--to", type=Path, required=True, help="folder of the run")
    parser.add_argument("--vae", help="VAE that decodes the samples (default: the one that made the cache)")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=6)
    parser.add_argument("--width", type=int, default=192, help="of the tokens, a multiple of 64 (default: 192)")
    parser.add_argument("--depth", type=int, default=4, help="number of blocks (default: 4)")
    parser.add_argument("--patch", type=int, default=4, help="side of a token in positions of the latent (default: 4)")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--save-every", type=int, default=100, help="steps (default: 100)")
    parser.add_argument("--samples", type=int, default=6, help="number of captions to draw (default: 6)")
    parser.add_argument("--sampling-steps", type=int, default=32)
    parser.add_argument("--guidance", type=float, default=2.0, help="strength of the caption; 1: none (default: 2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample-only", action="store_true", help="draw samples from the checkpoint")
    return parser.parse_args()


def main() -> None:
    """Train or resume, then draw samples."""
    options = parse_options()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cache = Cache.open(options.cache)
    loader = Loader(cache, options.batch_size, seed=options.seed)
    checkpoint = options.to / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
    elif options.sample_only:
        raise SystemExit(f"there is no checkpoint in {options.to}: train first")
    else:
        options.to.mkdir(parents=True, exist_ok=True)
        rows = [cache[index] for index in range(min(options.samples, len(cache)))]
        captions = [(row["captions"] or "").strip() for row in rows]
        state = {"step": 0, "captions": captions, "shape": tuple(rows[0]["latents"].shape)}
        state["sizes"] = {"width": options.width, "depth": options.depth, "patch": options.patch}
    torch.manual_seed(options.seed)
    model = Transformer(channels=state["shape"][0], **state["sizes"]).to(device)
    if "model" in state:
        model.load_state_dict(state["model"])
    if not options.sample_only:
        train(model, loader, state, options)
    save_samples(model, cache, state, options)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("stopped: the same command goes on at the last checkpoint") from None
