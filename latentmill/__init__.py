"""The package that trainers import: `Cache` reads the latents that `latentmill encode` wrote.

Also the `latentmill` command, which is `python -m latentmill`. The reader needs torch, numpy, pyarrow and fsspec, and
imports them when a name is first used, so that `import latentmill` and `latentmill --help` are fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

from latentmill.errors import CacheError, IdentityError, LatentmillError, StorageError

if TYPE_CHECKING:
    from latentmill.cache import Cache
    from latentmill.cache_info import CacheInfo
    from latentmill.loading.draws import draw
    from latentmill.loading.loader import Loader
    from latentmill.loading.mix import mix
    from latentmill.loading.stream import Stream
    from latentmill.micro_conditioning import time_ids
    from latentmill.scaling import Scaling

__version__ = "0.1.0"
__all__ = [
    "Cache",
    "CacheError",
    "CacheInfo",
    "IdentityError",
    "LatentmillError",
    "Loader",
    "Scaling",
    "StorageError",
    "Stream",
    "__version__",
    "draw",
    "mix",
    "time_ids",
]
_MODULES = {
    "Cache": "latentmill.cache",
    "CacheInfo": "latentmill.cache_info",
    "Loader": "latentmill.loading.loader",
    "Scaling": "latentmill.scaling",
    "Stream": "latentmill.loading.stream",
    "draw": "latentmill.loading.draws",
    "mix": "latentmill.loading.mix",
    "time_ids": "latentmill.micro_conditioning",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'latentmill' has no attribute '{name}'")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
