"""A small cache.json for tests, as a typed object."""

from latentmill.cache_info import CacheInfo, ColumnInfo, ComputeInfo, Identity, VaeInfo
from pipeline.cache.preprocessing import describe_transform
from pipeline.formats.schema import TEXT_COLUMNS
from pipeline.images.transform import Transform

IDENTITY = Identity(
    weights="w" * 64,
    config={"latent_channels": 4},
    preprocessing=describe_transform(Transform(resolution=64)),
    store="mode",
    dtype="float16",
    precision="fp32",
    tile_above=None,
    rows_per_part=10,
    seed=0,
    container="parquet",
    columns=None,
    image_column=None,
    key_column=None,
)


def info_of(identity: Identity) -> CacheInfo:
    """Return the cache.json of a cache with this identity."""
    return CacheInfo(
        format=1,
        identity=identity,
        identity_sha256=identity.sha256,
        compute=ComputeInfo(backend="torch", device="cpu", batch_size=1, threads=1, form="plain"),
        vae=VaeInfo(
            reference="demo",
            config={"latent_channels": 4, "scaling_factor": 0.5},
            scaling_factor=0.5,
            shift_factor=None,
            latents_mean=None,
            latents_std=None,
        ),
        schema=(ColumnInfo("key", "string"),),
        columns=TEXT_COLUMNS.to_info(),
    )
