"""The forms of the encoder give the same latents, and have what they need."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.encoder import ALLOCATOR_VARIABLES, ComputeConfig, LatentEncoder, build_model
from pipeline.errors import VaeError
from pipeline.weights import Vae
from tests.checked_images import make_image
from tests.conftest import slow_param

CPU = ComputeConfig(device="cpu", precision="fp32", batch_size=2, threads=1)


def encode(vae: Vae, compute: ComputeConfig, tile_above: int | None = None, side: int = 16) -> torch.Tensor:
    """Return the latents of three images: a full batch, and one that is padded."""
    encoder = LatentEncoder(vae, compute, "float32", tile_above=tile_above)
    images = [make_image(number, side, side) for number in range(3)]
    results = [*encoder.encode(images[:2]), *encoder.encode(images[2:])]
    assert encoder.runs
    return torch.stack([result.latent for result in results if isinstance(result.latent, torch.Tensor)])


@pytest.mark.slow
def test_the_fused_form_gives_the_same_latents(vae: Vae) -> None:
    pytest.importorskip("triton")
    for attention in ("sdpa", "per-image"):
        fused = dataclasses.replace(CPU, form="fused", attention=attention)
        torch.testing.assert_close(encode(vae, fused), encode(vae, CPU), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_the_fused_form_encodes_tiles(vae: Vae) -> None:
    pytest.importorskip("triton")
    expected = encode(vae, CPU, tile_above=32, side=56)
    fused = encode(vae, dataclasses.replace(CPU, form="fused"), tile_above=32, side=56)
    torch.testing.assert_close(fused, expected, atol=1e-5, rtol=1e-5)


def test_a_form_without_its_package_is_named(vae: Vae, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("vae.fused", "vae.group_norm_silu", "vae.triton_kernels"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(VaeError, match=r"the form fused needs the package triton.*pip install triton, or use --enc"):
        build_model(vae, dataclasses.replace(CPU, form="fused"))


def test_torchs_kernels_are_contiguous_on_gpus_only() -> None:
    formats = {
        (device, form): dataclasses.replace(CPU, device=device, form=form).memory_format
        for device in ("cpu", "cuda", "mps")
        for form in ("plain", "fused", "compiled")
    }
    assert [key for key, value in formats.items() if value == torch.contiguous_format] == [("cuda", "plain")]


SCRIPT = """
import torch
from pipeline.encoder import configure_allocator
configure_allocator()
print(torch._C._accelerator_getAllocatorSettings())
"""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        slow_param({}, "expandable_segments:True"),
        slow_param({"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}, "max_split_size_mb:512"),
        slow_param({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:256"}, "max_split_size_mb:256"),
    ],
)
def test_the_allocator_is_configured_after_torch_was_imported(given: dict[str, str], expected: str) -> None:
    """torch reports the settings that it read. The user's own remain."""
    environment = {name: value for name, value in os.environ.items() if name not in ALLOCATOR_VARIABLES}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=Path(__file__).parents[2],
        env=environment | given,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == expected
