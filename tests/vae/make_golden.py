"""Makes the files of tests/vae/data, with the last release of diffusers that had FlaxAutoencoderKL (0.39.0).

    python -m pip install --no-deps --target SOMEWHERE diffusers==0.39.0
    PYTHONPATH=SOMEWHERE python tests/vae/make_golden.py tests/vae/data

The model is tiny: two levels of 4 and 8 channels. All of its values are random, biases and scales included.
"""

import sys
from pathlib import Path

import jax
import numpy as np
from diffusers.models import vae_flax  # type: ignore[attr-defined]  # later releases do not have it

CONFIG = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (4, 8),
    "norm_num_groups": 2,
    "sample_size": 16,
}


def main() -> None:
    folder = Path(sys.argv[1])
    rng = np.random.default_rng(0)
    model = vae_flax.FlaxAutoencoderKL(**CONFIG)
    params = jax.tree.map(
        lambda leaf: np.float32(leaf + 0.1 * rng.standard_normal(leaf.shape)), model.init_weights(jax.random.PRNGKey(0))
    )
    model.save_pretrained(folder / "golden", params)

    x = np.float32(rng.uniform(-1, 1, (2, 3, 12, 16)))
    key = jax.random.PRNGKey(7)
    posterior = model.apply({"params": params}, x, method=model.encode).latent_dist
    other = vae_flax.FlaxDiagonalGaussianDistribution(0.5 * np.ones((2, 6, 8, 8), np.float32))
    sample = posterior.sample(key)
    np.savez(
        folder / "golden.npz",
        x=x,
        mean=posterior.mean,
        logvar=posterior.logvar,
        std=posterior.std,
        sample=sample,
        kl=posterior.kl(),
        kl_other=posterior.kl(other),
        nll=posterior.nll(sample),
        decoded=model.apply({"params": params}, sample, method=model.decode).sample,
        reconstruction=model.apply({"params": params}, x).sample,
        sampled_reconstruction=model.apply({"params": params}, x, sample_posterior=True, rngs={"gaussian": key}).sample,
    )


if __name__ == "__main__":
    main()
