"""Checks of the forms of the encoder on one device: bits, errors, and a lack of memory. See `bench.gpu`."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pipeline import tuning
from pipeline.encoder import ComputeConfig, LatentEncoder, make_checked_image
from pipeline.errors import VaeError
from pipeline.records import PreparedImage
from pipeline.storage.folder import Folder
from pipeline.tuning import BATCH_SIZES, Candidates
from pipeline.weights import Vae

LEFT = 1 << 30  # bytes of the GPU's memory that are left free


def print_checks(vae: Vae, computes: Sequence[ComputeConfig], side: int) -> bool:
    """Print a table of the checks, one row per form. Return whether all passed."""
    print("\n| form | error | same bits | after out of memory |\n|---|---|---|---|")
    is_sound = True
    for compute in computes:
        try:
            encoder = LatentEncoder(vae, compute, "float32")
            error = encoder.check_precision()
            differing = count_differing(encoder, side)
            memory = describe_lack_of_memory(encoder, side)
        except Exception as failure:  # the other forms are still checked
            print(f"| {compute.form} | {type(failure).__name__}: {str(failure).splitlines()[:1]} | | |", flush=True)
            is_sound = False
            continue
        bits = "yes" if not differing else f"NO: {differing} of {3 * compute.batch_size} latents differ"
        shown = "none" if error is None else f"{error:.3%}"
        print(f"| {compute.form} | {shown} | {bits} | {memory} |", flush=True)
        is_sound = is_sound and not differing
    return is_sound


def print_choice(folder: Path, vae: Vae, compute: ComputeConfig, side: int) -> ComputeConfig:
    """Let the GPU choose as a job does. Print the choice with its measurements, and return its settings."""
    cache, bound = Folder(str(folder / "choice")), max(BATCH_SIZES)
    candidates = Candidates(("plain", "fused", "compiled"), BATCH_SIZES)
    settings = dataclasses.replace(compute, batch_size=bound)
    start = time.perf_counter()
    chosen = tuning.choose_compute(cache, vae, settings, candidates, ((side, side),), None)
    print(f"\nthe choice of a job took {time.perf_counter() - start:.1f} s:")
    choice = tuning.read_choice(cache, torch.cuda.get_device_name())
    assert choice is not None
    for result in choice.measured:
        rate = f"{result.images_per_second:.1f} images/s, error {result.error:.3%}"
        print(f"  {result.form}, attention {result.attention}, batches of {result.batch_size}: {rate}")
    for left in choice.left_out:
        print(f"  {left.form}, attention {left.attention}, batches of {left.batch_size}: left out, {left.reason}")
    print(f"  chosen: {choice.form}, attention {choice.attention}, batches of {choice.batch_size}", flush=True)
    return chosen


def make_image(number: int, side: int) -> PreparedImage:
    """Return an image of the self-check, repeated up to `side`."""
    pixels = make_checked_image(number)
    repeats = -(-side // pixels.shape[0])
    return PreparedImage(
        shard="s",
        position=number,
        key=str(number),
        columns={},
        pixels=pixels.repeat(repeats, repeats, 1)[:side, :side].contiguous(),
        original_height=side,
        original_width=side,
        resized_height=side,
        resized_width=side,
        crop_top=0,
        crop_left=0,
        enlarged=False,
    )


def encode(encoder: LatentEncoder, images: Sequence[PreparedImage]) -> Tensor:
    """Return the latents [B, C, H/f, W/f]."""
    encoded = encoder.encode(images)
    return torch.stack([image.latent for image in encoded if isinstance(image.latent, Tensor)])


def count_differing(encoder: LatentEncoder, side: int) -> int:
    """Return how many latents of a batch differ in a bit if it runs again, is reversed, or if each image is alone."""
    images = [make_image(number, side) for number in range(encoder.batch_size)]
    whole = encode(encoder, images)
    alone = torch.cat([encode(encoder, [image]) for image in images])
    others = (encode(encoder, images), encode(encoder, images[::-1]).flip(0), alone)
    return sum(
        not torch.equal(expected, found) for other in others for expected, found in zip(whole, other, strict=True)
    )


def describe_lack_of_memory(encoder: LatentEncoder, side: int) -> str:
    """Take the GPU's memory except for LEFT bytes, encode a batch, and describe what happened."""
    if encoder.compute.device != "cuda":
        return "not tried"
    size = encoder.batch_size
    images = [make_image(number, side) for number in range(size)]
    expected = encode(encoder, images)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    taken = torch.empty(max(1, free - LEFT), dtype=torch.uint8, device="cuda")
    try:
        actual = encode(encoder, images)
    except VaeError as error:
        return f"a single image does not fit into {LEFT >> 30} GiB: {error}"
    finally:
        del taken
        torch.cuda.empty_cache()
    difference = float((actual - expected).abs().max() / expected.std())
    return f"batches of {size} became {encoder.batch_size}; at most {difference:.1e} apart"
