"""Python imports this at its start, where PYTHONPATH leads here: some images then do what bad libraries do.

An image that ends with ABORT ends the process that opens it, one that ends with SLEEP is never open.
"""

import os
import time

import PIL.Image

_open = PIL.Image.open


def _sabotaged(file, *args, **options):  # type: ignore[no-untyped-def]
    end = file.getvalue()[-5:] if hasattr(file, "getvalue") else b""
    if end == b"ABORT":
        os.abort()
    if end == b"SLEEP":
        time.sleep(3600)
    return _open(file, *args, **options)


PIL.Image.open = _sabotaged
