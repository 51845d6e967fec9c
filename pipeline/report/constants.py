"""What the latents of a VAE should look like: the mean and standard deviation of its raw channels, by its constants."""

import math

from latentmill.cache_info import VaeInfo


def pool_patches(vae: VaeInfo) -> tuple[list[float], list[float]]:
    """Return the mean and the standard deviation of each raw channel by the model's constants; empty if it has none.

    With a patch_size, the constants are those of each position in a patch. They are pooled over the positions.
    """
    size = math.prod(vae.patch_size or (1, 1))
    moments = list(zip(vae.latents_mean or (), vae.latents_std or (), strict=True))
    means, stds = [], []
    for start in range(0, len(moments), size):
        patch = moments[start : start + size]
        pooled = sum(mean for mean, _ in patch) / size
        means.append(pooled)
        stds.append(math.sqrt(sum(std**2 + (mean - pooled) ** 2 for mean, std in patch) / size))
    return means, stds


def expect_channels(vae: VaeInfo, channels: int) -> tuple[list[float], list[float]]:
    """Return the mean and the standard deviation that each of the raw channels should have by the model's constants.

    Without constants per channel, all channels have those of the scaling and the shift.
    """
    means, stds = pool_patches(vae)
    if means and stds:
        return means, stds
    return [vae.shift_factor or 0.0] * channels, [1 / vae.scaling_factor] * channels
