"""Random draws that follow from a sample alone: seeded by the cache's seed, the sample's shard and its key.

So they are the same in every run, whatever the order of the work and whoever does it.
"""

import hashlib


def seed_of(seed: int, purpose: str, shard: str, key: str) -> int:
    """The seed of one sample's draws for one purpose, of 63 bits. seed: the cache's (`--seed`)."""
    text = "\0".join((str(seed), purpose, shard, key))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
