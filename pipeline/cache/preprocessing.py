"""The transform of images, as the identity of a cache describes it. Apart from `identity`, because it needs torch."""

from dataclasses import asdict

from latentmill.cache_info import Identity, Preprocessing
from pipeline.images.decode_settings import DecodeSettings
from pipeline.images.transform import HAS_INTERPOLATION, Transform


def describe_transform(settings: Transform) -> Preprocessing:
    """Return a transform as the identity names it."""
    return Preprocessing(
        resolution=settings.resolution,
        buckets=settings.buckets or None,
        multiple_of=settings.multiple_of or None,
        min_size=settings.min_size,
        interpolation=settings.interpolation if settings.recipe in HAS_INTERPOLATION else None,
        jpeg_decode=settings.jpeg_decode,
        crop=settings.crop,
        flip=settings.flip,
        version=settings.version,
        transform=settings.recipe,
        min_bucket_reso=settings.min_bucket_reso or None,
        max_bucket_reso=settings.max_bucket_reso or None,
        no_upscale=settings.no_upscale,
        max_aspect=settings.max_aspect or None,
        min_std=settings.min_std,
        **asdict(settings.decoding),
    )


def parse_transform(identity: Identity) -> Transform:
    """Return the transform that a cache's identity describes."""
    preprocessing = identity.preprocessing
    return Transform(
        resolution=preprocessing.resolution,
        buckets=preprocessing.buckets or (),
        multiple_of=preprocessing.multiple_of or 0,
        min_size=preprocessing.min_size,
        interpolation=preprocessing.interpolation or "bicubic",
        jpeg_decode=preprocessing.jpeg_decode,
        crop=preprocessing.crop,
        flip=preprocessing.flip,
        recipe=preprocessing.transform,
        min_bucket_reso=preprocessing.min_bucket_reso or 0,
        max_bucket_reso=preprocessing.max_bucket_reso or 0,
        no_upscale=preprocessing.no_upscale,
        max_aspect=preprocessing.max_aspect or 0.0,
        seed=identity.seed,
        min_std=preprocessing.min_std,
        decoding=DecodeSettings(
            exif=preprocessing.exif,
            alpha=preprocessing.alpha,
            color=preprocessing.color,
            allow_truncated=preprocessing.allow_truncated,
        ),
    )
