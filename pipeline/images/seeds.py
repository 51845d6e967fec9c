"""Seeds for random numbers, derived from the cache's seed, the sample's shard and the sample's key.

So the numbers are the same in every run, on any worker and in any order of the work.
"""

import hashlib


def derive_seed(seed: int, purpose: str, shard: str, key: str) -> int:
    """Return the 63-bit seed of one sample's random numbers for one purpose. seed: of the cache (`--seed`)."""
    text = "\0".join((str(seed), purpose, shard, key))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
