"""Apply a function to all tensors of a batch."""

from collections.abc import Callable, Generator
from typing import Any

import torch


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """Return a batch with the results of a function for its tensors, also within dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {name: map_tensors(function, inner) for name, inner in value.items()}
    if isinstance(value, list) and any(isinstance(inner, torch.Tensor | dict | list | tuple) for inner in value):
        return [map_tensors(function, inner) for inner in value]
    if type(value) is tuple:
        return tuple(map_tensors(function, inner) for inner in value)
    return value


def pin_tensors(batches: Generator[Any, None, None]) -> Generator[Any, None, None]:
    """Yield batches with their tensors in pinned memory, from which they are copied to a GPU beside its work."""
    try:
        for batch in batches:
            yield map_tensors(torch.Tensor.pin_memory, batch)
    finally:
        batches.close()


def move_tensors(batch: Any, device: torch.device | None) -> Any:
    """Return a batch on a device. The copy is ordered before what the current stream does next."""
    return batch if device is None else map_tensors(lambda tensor: tensor.to(device, non_blocking=True), batch)
