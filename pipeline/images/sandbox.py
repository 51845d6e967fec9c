"""Decode images in a separate process, after a unit's worker died. One of the unit's images may be the cause.

An image is rejected if it ends this process, takes too long, or needs too much memory. A new process decodes the next
image. Normally images are decoded in threads of the worker (`pipeline.flow`), which cannot be stopped.
"""

import json
import sys
from dataclasses import asdict
from typing import Any

import numpy as np

from pipeline.errors import Rejected
from pipeline.images.decode import open_pixels
from pipeline.images.decode_settings import DEFAULT_DECODING, DecodeSettings
from pipeline.limits import Limits
from pipeline.subprocess_server import Child, limit_itself, serve


class SandboxedDecoder(Child):
    """Decode images as `decode.open_pixels` does, in a separate process with time and memory limits."""

    def __init__(self, limits: Limits) -> None:
        super().__init__("pipeline.images.sandbox", json.dumps(asdict(limits)))
        self.limits = limits

    def __enter__(self) -> "SandboxedDecoder":
        return self

    def open_pixels(
        self, data: bytes, limits: Limits, reduction: int = 1, settings: DecodeSettings = DEFAULT_DECODING
    ) -> np.ndarray:
        """Decode an image to RGB uint8 [H, W, 3]. Raises Rejected, with the reason `unsafe` if it ended the process."""
        header = json.dumps({"reduction": reduction, "settings": asdict(settings)}).encode()
        try:
            answer, content = self.ask(header + b"\n" + data, limits.seconds)
        except ChildProcessError:
            raise Rejected("open", "unsafe", limits.seconds, limits.memory) from None
        if "rejected" in answer:
            raise Rejected(*answer["rejected"], more=answer["more"])
        height, width = answer["shape"]
        return np.frombuffer(content, np.uint8).reshape(height, width, 3)


def main() -> None:
    """Run the separate process. It answers with `shape` and pixels, or with `rejected`, the arguments of Rejected."""
    limits = Limits(**json.loads(sys.argv[1]))
    limit_itself(limits.memory)

    def answer(request: bytes) -> tuple[dict[str, Any], bytes]:
        header, _, data = request.partition(b"\n")
        asked = json.loads(header)
        try:
            pixels = open_pixels(data, limits, asked["reduction"], DecodeSettings(**asked["settings"]))
        except Rejected as error:
            return {"rejected": [error.stage, error.reason, *error.facts], "more": error.more}, b""
        except MemoryError:
            return {"rejected": ["open", "unsafe", limits.seconds, limits.memory], "more": ""}, b""
        return {"shape": pixels.shape[:2]}, pixels.tobytes()

    serve(answer, limits.seconds + 5)


if __name__ == "__main__":
    main()
