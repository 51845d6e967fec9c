"""Images opened by a process of its own: for a unit whose worker died, where one of its images may be the reason.

An image that ends this process, that takes it too long or too much memory, is rejected by name; a new process opens
the next one. Normally images are opened by threads of the worker (`pipeline.flow`), which cannot be stopped.
"""

import json
import sys
from dataclasses import asdict
from typing import Any

import numpy as np

from pipeline.errors import Rejected
from pipeline.images.decode import open_pixels
from pipeline.limits import Limits
from pipeline.subprocess_server import Child, limit_itself, serve


class SandboxedDecoder(Child):
    """Opens images as `pixels.open_pixels` does, in a process of its own."""

    def __init__(self, limits: Limits) -> None:
        super().__init__("pipeline.images.sandbox", json.dumps(asdict(limits)))
        self.limits = limits

    def __enter__(self) -> "SandboxedDecoder":
        return self

    def open_pixels(self, data: bytes, limits: Limits) -> np.ndarray:
        """An encoded image as RGB uint8 [H, W, 3]. Raises Rejected, `unsafe` for what ends the process."""
        try:
            answer, content = self.ask(data, limits.seconds)
        except ChildProcessError:
            raise Rejected("open", "unsafe", limits.seconds, limits.memory) from None
        if "rejected" in answer:
            raise Rejected(*answer["rejected"])
        height, width = answer["shape"]
        return np.frombuffer(content, np.uint8).reshape(height, width, 3)


def main() -> None:
    """The process: answers with `shape` and the pixels, or `rejected`, what Rejected is made of."""
    limits = Limits(**json.loads(sys.argv[1]))
    limit_itself(limits.memory)

    def answer(data: bytes) -> tuple[dict[str, Any], bytes]:
        try:
            pixels = open_pixels(data, limits)
        except Rejected as why:
            return {"rejected": [why.stage, why.reason, *why.numbers]}, b""
        except MemoryError:
            return {"rejected": ["open", "unsafe", limits.seconds, limits.memory]}, b""
        return {"shape": pixels.shape[:2]}, pixels.tobytes()

    serve(answer, limits.seconds + 5)


if __name__ == "__main__":
    main()
