"""The encoder on a CUDA device. These tests need no Ray, and are skipped on machines without a GPU."""

import dataclasses
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from pipeline import tuning
from pipeline.device_loop import DeviceLoop
from pipeline.encoder import ComputeConfig, LatentEncoder
from pipeline.errors import VaeError
from pipeline.records import AttentionKernel, EncodedImage, Form
from pipeline.storage.folder import Folder
from pipeline.tuning import Candidates
from pipeline.weights import Vae, load_vae
from tests.checked_images import make_image
from vae import AutoencoderKL, AutoencoderKLConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

CUDA = ComputeConfig(device="cuda", precision="fp16", batch_size=4, threads=1)
FORMS: tuple[tuple[Form, AttentionKernel], ...] = (("plain", "sdpa"), ("fused", "sdpa"), ("fused", "per-image"))
ERRORS = {"fp32": 1e-5, "tf32": 5e-3, "fp16": 5e-3, "bf16": 5e-2}  # the largest relative errors that are accepted


@pytest.fixture(scope="module")
def vae() -> Vae:
    return load_vae("demo")


def get_latents(encoded: Sequence[EncodedImage]) -> torch.Tensor:
    """Return the latents [B, C, h, w] in float64."""
    return torch.stack([image.latent for image in encoded if isinstance(image.latent, torch.Tensor)]).double()


@pytest.fixture(scope="module")
def vae_with_attention() -> Vae:
    """Return a VAE of SD's layout with an attention, 64 to 128 channels and random weights."""
    torch.manual_seed(0)
    config = AutoencoderKLConfig(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(64, 96, 128),
        layers_per_block=2,
    )
    weights = {name: value.numpy() for name, value in AutoencoderKL(**config).state_dict().items()}
    return Vae(reference="random", config=config, weights=weights, sha256="", constants={})


@pytest.mark.parametrize(("form", "attention"), FORMS)
@pytest.mark.parametrize("precision", ERRORS)
def test_latents_agree_with_those_of_the_cpu(vae: Vae, precision: str, form: Form, attention: AttentionKernel) -> None:
    images = [make_image(number) for number in range(4)]
    cpu = ComputeConfig(device="cpu", precision="fp32", batch_size=1, threads=4)
    expected = torch.cat([get_latents(LatentEncoder(vae, cpu, "float32").encode([image])) for image in images])
    compute = dataclasses.replace(CUDA, precision=precision, form=form, attention=attention)
    actual = get_latents(LatentEncoder(vae, compute, "float32").encode(images))
    assert float((actual - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt()) < ERRORS[precision]


@pytest.mark.parametrize(("form", "attention"), FORMS)
def test_a_latent_does_not_depend_on_its_batch(vae_with_attention: Vae, form: Form, attention: AttentionKernel) -> None:
    """The neighbours, the place in the batch and the padding change no bit. Neither does another run."""
    compute = dataclasses.replace(CUDA, form=form, attention=attention)
    encoder = LatentEncoder(vae_with_attention, compute, "float32")
    images = [make_image(number, 192, 256) for number in range(4)]
    whole = get_latents(encoder.encode(images))
    for number, image in enumerate(images):
        assert torch.equal(get_latents(encoder.encode([image]))[0], whole[number])
    assert torch.equal(get_latents(encoder.encode(images[::-1])).flip(0), whole)
    assert torch.equal(get_latents(LatentEncoder(vae_with_attention, compute, "float32").encode(images)), whole)


@pytest.mark.parametrize(("form", "attention"), FORMS)
def test_the_forms_agree_on_a_model_with_attention(
    vae_with_attention: Vae, form: Form, attention: AttentionKernel
) -> None:
    for precision, most in ERRORS.items():
        compute = dataclasses.replace(CUDA, precision=precision, form=form, attention=attention)
        error = LatentEncoder(vae_with_attention, compute, "float32").check_precision()
        assert error is not None
        assert error < most


def test_the_fused_form_encodes_tiles(vae: Vae) -> None:
    plain, fused = (
        get_latents(
            LatentEncoder(vae, dataclasses.replace(CUDA, form=form), "float32", tile_above=128).encode([make_image(0)])
        )
        for form in ("plain", "fused")
    )
    torch.testing.assert_close(fused, plain, atol=0.02, rtol=0.02)


def test_workers_choose_a_form_that_is_correct_and_share_the_choice(vae: Vae, tmp_path: Path) -> None:
    cache, candidates = Folder(str(tmp_path)), Candidates(("plain", "fused"), (1, 2, 4))
    compute = dataclasses.replace(CUDA, batch_size=4)
    first = tuning.choose_compute(cache, vae, compute, candidates, ((128, 128),), None)
    choice = tuning.read_choice(cache, torch.cuda.get_device_name())
    assert choice is not None
    assert choice.measured[0].form == "fused"
    assert all("seconds of the benchmark were over" in left.reason for left in choice.left_out)
    assert tuning.choose_compute(cache, vae, compute, candidates, ((128, 128),), None) == first


def test_the_self_check_measures_the_error(vae: Vae) -> None:
    for precision, most in ERRORS.items():
        error = LatentEncoder(vae, dataclasses.replace(CUDA, precision=precision), "float32").check_precision()
        assert error is not None
        assert error < most


def test_batches_of_several_units_run_ahead_on_the_device(vae: Vae) -> None:
    encoder = LatentEncoder(vae, CUDA, "float32")
    loop = DeviceLoop(encoder, max_units=2, max_in_flight=64, openers=1)
    images = [make_image(number, *shape) for number, shape in enumerate([(256, 256), (128, 256)] * 15)]
    expected = [get_latents(encoder.encode([image]))[0] for image in images]
    results: dict[int, torch.Tensor] = {}

    def store(position: int, encoded: EncodedImage) -> None:
        assert isinstance(encoded.latent, torch.Tensor)
        results[position] = encoded.latent.double()

    with loop.unit("u", threading.Event()) as queue:
        for image in images:
            queue.admit()
            queue.put(image, lambda encoded, position=image.position: store(position, encoded))
        queue.end_reading()
        queue.wait(lambda: len(results) == len(images))
    assert all(torch.equal(results[position], expected[position]) for position in results)


@pytest.mark.parametrize("form", ["plain", "fused"])
def test_a_device_without_memory_makes_batches_smaller(vae: Vae, form: Form) -> None:
    """The rest of the device's memory is taken, so that a batch does not fit."""
    encoder = LatentEncoder(vae, dataclasses.replace(CUDA, batch_size=64, form=form), "float32")
    images = [make_image(number % 8) for number in range(64)]
    expected = get_latents(encoder.encode(images))
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    taken = torch.empty(free - (1 << 30), dtype=torch.uint8, device="cuda")
    try:
        actual = get_latents(encoder.encode(images))
    except VaeError:
        pytest.fail("a single image should fit into 1 GiB")
    finally:
        del taken
        torch.cuda.empty_cache()
    assert encoder.batch_size < 64
    torch.testing.assert_close(actual, expected, atol=0.02, rtol=0.02)
