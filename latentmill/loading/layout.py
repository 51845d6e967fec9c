"""The form of the latents of a row: how many there are, their shape and their bytes."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from latentmill.cache_info import CacheInfo
from latentmill.errors import CacheError

if TYPE_CHECKING:
    import torch

VALUE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class LatentLayout:
    """The latents of the rows of a cache.

    names: the columns that have them: `latent`, maybe `latent_flipped`. dtype: `float16`, `bfloat16` or `float32`.
    channels: of a stored array; of moments, twice those of the latent. downscale: pixels of an image's side for one
    position of its latent.
    """

    names: tuple[str, ...]
    dtype: str
    channels: int
    downscale: int

    @classmethod
    def from_info(cls, info: CacheInfo) -> "LatentLayout":
        """Return the layout that follows from a cache.json. Raises CacheError if its VAE's configuration lacks it."""
        config, identity = info.vae.config, info.identity
        try:
            channels, downscale = int(config["latent_channels"]), 2 ** (len(config["block_out_channels"]) - 1)
        except (KeyError, TypeError, ValueError) as error:
            raise CacheError(
                f"the configuration of the VAE in cache.json lacks its {error}: restore the file"
            ) from error
        names = ("latent", "latent_flipped") if identity.preprocessing.flip == "both" else ("latent",)
        return cls(names, identity.dtype, channels * (2 if identity.store == "moments" else 1), downscale)

    def shape(self, bucket: tuple[int, int]) -> tuple[int, int, int]:
        """Return the shape of a stored array. bucket: height and width of the image in pixels."""
        return self.channels, bucket[0] // self.downscale, bucket[1] // self.downscale

    def array_bytes(self, bucket: tuple[int, int]) -> int:
        """Return the bytes of a stored array."""
        channels, height, width = self.shape(bucket)
        return channels * height * width * VALUE_BYTES[self.dtype]

    def row_bytes(self, bucket: tuple[int, int]) -> int:
        """Return the bytes of all latents of a row."""
        return len(self.names) * self.array_bytes(bucket)

    @property
    def torch_dtype(self) -> "torch.dtype":
        """The dtype of the stored values."""
        import torch

        dtypes = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
        return dtypes[self.dtype]
