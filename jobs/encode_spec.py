"""The specification of the workers that encode, made from a cache.json."""

from collections.abc import Mapping, Sequence
from typing import Any

from jobs.common_options import parse_limits
from pipeline.cache import identity
from pipeline.cache.identity import CacheInfo
from pipeline.cache.preprocessing import parse_transform
from pipeline.cache.runs import get_library_versions
from pipeline.encoder import ComputeConfig
from pipeline.flow import EncodeSpec
from pipeline.storage.folder import Folder
from pipeline.tuning import Candidates


def make_encode_spec(
    cache: Folder,
    info: CacheInfo,
    compute: ComputeConfig,
    limit_options: Sequence[str],
    open_workers: int,
    run: str,
    source_options: Mapping[str, Any],
    candidates: Candidates | None = None,
) -> EncodeSpec:
    """Return the specification of workers that encode into a cache.

    info: the cache.json. limit_options: `--input-limit`. run: the name of the run. candidates: what workers choose.
    """
    described = info.identity
    return EncodeSpec(
        cache=cache,
        source_options=source_options,
        identity_sha256=info.identity_sha256,
        transform=parse_transform(described),
        dtype=described.dtype,
        layout=identity.parse_schema(info),
        image_column=described.image_column,
        key_column=described.key_column,
        source_rules=described.sources,
        seed=described.seed,
        rows_per_part=described.rows_per_part,
        tile_above=described.tile_above,
        limits=parse_limits(limit_options),
        compute=compute,
        open_workers=open_workers,
        run=run,
        versions=get_library_versions(),
        candidates=candidates,
    )
