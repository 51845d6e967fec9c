"""The same work as the encode job, as a plain Ray Data pipeline in the style of Ray's documentation.

    python bench/ray_data_peer.py SHARDS --to FOLDER --vae DIRECTORY

`bench.end_to_end` runs it for comparison and measures its time. It prints nothing, and writes Parquet files with keys,
captions and latents to FOLDER. It imports nothing of latentmill.
"""

import argparse
import io
from typing import Any

import numpy as np
import ray
from PIL import Image

SIDE = 256
# These are the fastest settings on two cores with 512 images. Seconds of the whole process, by actors x CPUs per actor:
#   2 x 0.5   batch 4: 35   8: 31   16: 35   32: 45; 2 x 0.25 and other numbers of blocks were not faster
#   1 x 1     batch 16: 44
#   2 x 1     never ends: the actors take all CPUs, so that none is free for reading (ray-project/ray issue 44687)
# Sending uint8 between the stages instead of float32 made no measurable difference (35 s in both cases at batch 16).
ACTORS, CPUS_PER_ACTOR, BATCH = 2, 0.5, 8


def open_image(row: dict[str, Any]) -> dict[str, Any]:
    """Replace a JPEG by float32 pixels [3, SIDE, SIDE] in [-1, 1]: shorter side resized, then center-cropped."""
    image = Image.open(io.BytesIO(row["jpg"])).convert("RGB")
    scale = SIDE / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
    pixels = np.asarray(image.crop((left, top, left + SIDE, top + SIDE)), dtype=np.float32)
    return {
        "key": row["__key__"],
        "txt": row["txt"].decode(),
        "json": row["json"].decode(),
        "pixels": (pixels / 127.5 - 1.0).transpose(2, 0, 1),
    }


class Encoder:
    """An actor with its own model. Only actors import torch and diffusers, which takes seconds per process."""

    def __init__(self, vae: str) -> None:
        import torch
        from diffusers import AutoencoderKL

        torch.set_num_threads(1)
        self.torch = torch
        self.vae = AutoencoderKL.from_pretrained(vae).eval()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        pixels = self.torch.tensor(batch.pop("pixels"))
        with self.torch.inference_mode():
            latents = self.vae.encode(pixels).latent_dist.mode()
        return {**batch, "latent": latents.to(self.torch.float16).numpy()}


def main() -> None:
    """Run the pipeline."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", help="folder with tar shards")
    parser.add_argument("--to", required=True, help="folder for the Parquet files")
    parser.add_argument("--vae", required=True, help="directory of the VAE, in diffusers' format")
    options = parser.parse_args()

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    (
        ray.data.read_webdataset(options.shards, decoder=None)
        .map(open_image)
        .map_batches(
            Encoder,
            fn_constructor_args=[options.vae],
            batch_size=BATCH,
            compute=ray.data.ActorPoolStrategy(size=ACTORS),
            num_cpus=CPUS_PER_ACTOR,
        )
        .write_parquet(options.to)
    )


if __name__ == "__main__":
    main()
