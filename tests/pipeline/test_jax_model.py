"""The JAX backend of the encoder: the latents of the PyTorch backend, in every stored form."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

pytest.importorskip("flax")

from pipeline import jax_model
from pipeline.encoder import ComputeConfig, LatentEncoder
from pipeline.errors import UsageError, VaeError
from pipeline.jax_model import JaxModel
from pipeline.records import EncodedImage
from pipeline.weights import Vae, load_vae
from tests.checked_images import make_image
from tests.conftest import MICRO
from vae import AutoencoderKL, AutoencoderKLFlux2
from vae.posterior import DiagonalGaussianDistribution

TORCH = ComputeConfig(device="cpu", precision="fp32", batch_size=2, threads=1)
JAX = dataclasses.replace(TORCH, backend="jax")


IMAGES = [make_image(number, 64, 64) for number in range(3)]


def get_latents(encoded: Sequence[EncodedImage]) -> torch.Tensor:
    return torch.stack([image.latent for image in encoded if isinstance(image.latent, torch.Tensor)])


@pytest.mark.parametrize("store", ["mode", "sample", "moments"])
def test_latents_equal_those_of_pytorch(vae: Vae, store: str) -> None:
    encoders = [LatentEncoder(vae, compute, "float32", store, seed=3) for compute in (TORCH, JAX)]  # type: ignore[arg-type]
    expected, actual = (get_latents([*encoder.encode(IMAGES[:2]), *encoder.encode(IMAGES[2:])]) for encoder in encoders)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    assert encoders[1].runs == 2


def test_other_shapes_are_encoded_as_well(vae: Vae) -> None:
    images = [make_image(number, 48, 96) for number in range(2)]
    expected, actual = (get_latents(LatentEncoder(vae, compute, "float32").encode(images)) for compute in (TORCH, JAX))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_a_latent_does_not_depend_on_its_batch(vae: Vae) -> None:
    encoder = LatentEncoder(vae, JAX, "float32")
    both = get_latents(encoder.encode(IMAGES[:2]))
    assert torch.equal(get_latents(encoder.encode(IMAGES[:1]))[0], both[0])
    assert torch.equal(get_latents(encoder.encode(IMAGES[1::-1])).flip(0), both)


def test_flipped_latents_are_those_of_mirrored_images(vae: Vae) -> None:
    mirrored = [dataclasses.replace(image, pixels=image.pixels.flip(1)) for image in IMAGES]
    expected = [get_latents(LatentEncoder(vae, JAX, "float32").encode(images)) for images in (IMAGES, mirrored)]
    encoded = LatentEncoder(vae, JAX, "float32", has_flipped=True).encode(IMAGES)
    flipped = torch.stack([image.latent_flipped for image in encoded if image.latent_flipped is not None])
    assert (torch.equal(get_latents(encoded), expected[0]), torch.equal(flipped, expected[1])) == (True, True)


def test_images_are_decoded_as_by_pytorch(vae: Vae, micro_vae: str) -> None:
    latents = torch.randn(1, 4, 6, 10, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = AutoencoderKL.from_pretrained(micro_vae).eval().decode(latents).sample
    actual = JaxModel(vae, "cpu", "fp32", 1).decode(latents)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_flux2_runs_unless_its_decoder_has_other_channels(tmp_path: Path) -> None:
    model = AutoencoderKLFlux2(**MICRO)
    model.save_pretrained(tmp_path)
    flux2 = load_vae(str(tmp_path))
    expected, actual = (get_latents(LatentEncoder(flux2, c, "float32").encode(IMAGES[:2])) for c in (TORCH, JAX))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    AutoencoderKLFlux2(**MICRO, decoder_block_out_channels=(4, 4, 4, 4)).save_pretrained(tmp_path)
    with pytest.raises(VaeError, match=r"the decoder of .* has other channels than its encoder: use --backend torch"):
        JaxModel(load_vae(str(tmp_path)), "cpu", "fp32", 1)


@pytest.mark.slow
def test_the_self_check_compares_with_pytorch(vae: Vae, monkeypatch: pytest.MonkeyPatch) -> None:
    exact, half = (LatentEncoder(vae, dataclasses.replace(JAX, precision=name), "float32") for name in ("fp32", "bf16"))
    errors = [encoder.check_precision() for encoder in (exact, half)]
    assert errors[0] is not None and errors[1] is not None
    assert errors[0] < 1e-4 < errors[1] < 0.05
    encode = exact.model.encode_pixels

    def encode_wrongly(pixels: torch.Tensor) -> DiagonalGaussianDistribution:
        return DiagonalGaussianDistribution(encode(pixels).parameters * 1.2)

    monkeypatch.setattr(exact.model, "encode_pixels", encode_wrongly)
    with pytest.raises(VaeError, match=r"computes wrong latents: in fp32 they are off by \d+\.\d%"):
        exact.check_precision()


def test_a_device_without_memory_makes_batches_smaller(vae: Vae, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, tried = LatentEncoder(vae, dataclasses.replace(JAX, batch_size=4), "float32"), list[int]()
    encode = encoder.model.encode_pixels

    def encode_few(pixels: torch.Tensor) -> DiagonalGaussianDistribution:
        tried.append(len(pixels))
        if len(pixels) > 1:
            raise RuntimeError("RESOURCE_EXHAUSTED: Error allocating device buffer")
        return encode(pixels)

    monkeypatch.setattr(encoder.model, "encode_pixels", encode_few)
    assert len(get_latents(encoder.encode(IMAGES))) == 3
    assert (tried, encoder.batch_size) == ([4, 2, 1, 1, 1], 1)


def test_an_image_that_overflows_in_bfloat16_is_encoded_in_float32(vae: Vae, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = LatentEncoder(vae, dataclasses.replace(JAX, precision="bf16"), "float32")
    monkeypatch.setattr(
        encoder.model,
        "encode_pixels",
        lambda pixels: DiagonalGaussianDistribution(torch.full((len(pixels), 8, 8, 8), torch.nan)),
    )
    (encoded,) = encoder.encode(IMAGES[:1])
    assert encoded.is_fallback
    torch.testing.assert_close(
        get_latents([encoded]), get_latents(LatentEncoder(vae, JAX, "float32").encode(IMAGES[:1])), atol=1e-5, rtol=1e-5
    )


def test_a_missing_device_is_an_error(vae: Vae) -> None:
    with pytest.raises(VaeError, match="JAX finds no tpu here; install jax for it, or use another --device"):
        JaxModel(vae, "tpu", "fp32", 1)


def test_a_missing_package_is_named(vae: Vae, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"--backend jax needs jax and flax: pip install 'latentmill\[jax\]'"):
        JaxModel(vae, "cpu", "fp32", 1)


@pytest.mark.slow
def test_jax_keeps_to_the_threads_of_the_worker_and_compiles_once_per_machine(tmp_path: "os.PathLike[str]") -> None:
    code = (
        "import os; from pipeline import jax_model; from pipeline.weights import load_vae; import torch; "
        "jax_model.JaxModel(load_vae('demo'), 'cpu', 'fp32', 1)"
        ".encode_pixels(torch.zeros(1, 64, 64, 3, dtype=torch.uint8)); print(os.environ['NPROC'])"
    )
    names = {"NPROC", "JAX_COMPILATION_CACHE_DIR"}
    environment = {name: value for name, value in os.environ.items() if name not in names}
    job = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "XDG_CACHE_HOME": os.fspath(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    assert job.stdout.split() == ["1"]
    assert job.stderr == ""
    assert list((jax_model.Path(tmp_path) / "latentmill/jax").iterdir())
