"""The settings of the encode job that the benchmarks of one worker share."""

from pathlib import Path

from pipeline.encoder import ComputeConfig
from pipeline.flow import EncodeSpec
from pipeline.formats.schema import OutputSchema
from pipeline.images.transform import Transform
from pipeline.limits import Limits
from pipeline.storage.folder import Folder


def make_spec(cache: Path, transform: Transform, compute: ComputeConfig, openers: int) -> EncodeSpec:
    """Return the settings. openers: threads that open images; 0 for the default."""
    return EncodeSpec(
        cache=Folder(str(cache)),
        source_options={},
        identity_sha256="bench",
        transform=transform,
        dtype="float16",
        seed=0,
        layout=OutputSchema(),
        image_column=None,
        key_column=None,
        rows_per_part=4096,
        tile_above=None,
        limits=Limits(),
        compute=compute,
        open_workers=openers,
        run="bench",
        versions={},
    )
