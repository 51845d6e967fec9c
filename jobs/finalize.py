"""The end of a job: the statistics, the index and the card of a cache."""

from typing import Any

import numpy as np

from pipeline.cache import card
from pipeline.cache.commit_scan import CacheScan, Repair, list_files
from pipeline.cache.identity import CacheInfo
from pipeline.cache.index import PartSizes, write_index
from pipeline.cache.reader import Cache
from pipeline.cache.runs import get_library_versions
from pipeline.cache.stats import compute_stats, write_stats
from pipeline.storage.folder import Folder

MAX_ROUNDS = 3  # then it does not matter: a second job that still writes parts writes the statistics after this one


def finalize_cache(cache: Folder, info: CacheInfo, single_writer: bool) -> dict[str, Any]:
    """Write stats.json, the index and the card from all parts of the cache, and repair `_commits` and `_log`.

    Returns the statistics.

    info: the cache.json.
    single_writer: the store does not support concurrent writers, so a writer may have overwritten another one's part.
    """
    identity_sha256 = info.identity_sha256
    repair = Repair(identity_sha256=identity_sha256, container=info.identity.container, rehash=single_writer)
    for _ in range(MAX_ROUNDS):
        scan, sizes = CacheScan(cache, repair), PartSizes()
        written = compute_stats(scan, identity_sha256, sizes.add)
        write_stats(cache, written)
        write_index(cache, info.identity.container, scan.files, sizes, written["digest"])
        version = get_library_versions()["latentmill"]
        cache.replace(card.NAME, card.render_card(Cache(cache, info), written, version, scan.parts_with_rows))
        # otherwise a second job wrote parts at the same time, and perhaps its statistics before these
        if np.array_equal(list_files(cache), scan.files):
            break
    return written
