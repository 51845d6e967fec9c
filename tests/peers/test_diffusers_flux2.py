"""Parity with the AutoencoderKLFlux2 of diffusers, and with what its pipelines make of the latents, in float32."""

import ast
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vae import AutoencoderKLFlux2, AutoencoderKLFlux2Config
from vae.load import weights_sha256
from vae.scaling import scaling_of

diffusers = pytest.importorskip("diffusers")

SMALL = {"block_out_channels": (8, 16, 32, 32), "norm_num_groups": 8, "sample_size": 64}
SHAPES: dict[str, dict[str, Any]] = {
    "flux2": {},
    "small decoder": {"decoder_block_out_channels": (8, 8, 16, 16), "layers_per_block": 1},
}


@pytest.fixture(scope="module", params=SHAPES)
def pair(request: pytest.FixtureRequest) -> tuple[AutoencoderKLFlux2, Any]:
    """Return our model and that of diffusers, with the same random weights and statistics."""
    fields = {**SMALL, **SHAPES[request.param]}
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKLFlux2(**fields).eval()
    theirs.bn.running_mean.normal_()
    theirs.bn.running_var.uniform_(0.1, 4)
    ours = AutoencoderKLFlux2(**fields).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def random_images(height: int, width: int) -> torch.Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 112), (72, 56)])
@torch.inference_mode()
def test_encode_decode_and_forward_are_equal(pair: tuple[AutoencoderKLFlux2, Any], height: int, width: int) -> None:
    ours, theirs = pair
    x = random_images(height, width)
    posterior, expected = ours.encode(x).latent_dist, theirs.encode(x).latent_dist
    assert posterior.mean.shape == (2, 32, height // 8, width // 8)
    torch.testing.assert_close(posterior.parameters, expected.parameters, atol=1e-4, rtol=0)
    z = expected.mode()
    torch.testing.assert_close(ours.decode(z).sample, theirs.decode(z).sample, atol=1e-4, rtol=0)
    draws = [m(x, sample_posterior=True, generator=torch.Generator().manual_seed(2)).sample for m in pair]
    torch.testing.assert_close(*draws, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_tiles_and_slices_are_equal(pair: tuple[AutoencoderKLFlux2, Any]) -> None:
    x = random_images(72, 104)
    try:
        for model in pair:
            model.enable_tiling()
            model.enable_slicing()
        results = [model.encode(x, return_dict=False)[0].parameters for model in pair]
        torch.testing.assert_close(*results, atol=1e-4, rtol=0)
        torch.testing.assert_close(*(model.decode(results[1][:, :32]).sample for model in pair), atol=1e-4, rtol=0)
    finally:
        for model in pair:
            model.disable_tiling()
            model.disable_slicing()


def load_pipeline_functions(*names: str) -> SimpleNamespace:
    """Return functions of FLUX.2's pipeline. Its module itself cannot be imported without transformers."""
    path = Path(diffusers.__file__).parent / "pipelines/flux2/pipeline_flux2.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in names]
    for function in functions:
        function.decorator_list = []  # staticmethod
    namespace: dict[str, Any] = {"torch": torch}
    exec(compile(ast.Module(list(functions), []), str(path), "exec"), namespace)
    return SimpleNamespace(**{name: namespace[name] for name in names})


@torch.inference_mode()
def test_model_latents_are_those_of_the_pipeline(pair: tuple[AutoencoderKLFlux2, Any]) -> None:
    ours, theirs = pair
    pipeline = load_pipeline_functions(
        "_encode_vae_image", "_patchify_latents", "_unpatchify_latents", "retrieve_latents"
    )
    x = random_images(48, 80)
    as_self = SimpleNamespace(vae=theirs, _patchify_latents=pipeline._patchify_latents)
    expected = pipeline._encode_vae_image(as_self, x, None)
    assert expected.shape == (2, 128, 3, 5)
    rule = scaling_of(ours.config, ours.state_dict())
    raw = ours.encode(x).latent_dist.mode()
    torch.testing.assert_close(rule.to_model(raw), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(rule.to_raw(expected), raw, atol=1e-4, rtol=0)
    torch.testing.assert_close(rule.to_model(raw[0]), expected[0], atol=1e-4, rtol=0)


def test_each_implementation_loads_what_the_other_saved(pair: tuple[AutoencoderKLFlux2, Any], tmp_path: Path) -> None:
    ours, theirs = pair
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    loaded = AutoencoderKLFlux2.from_pretrained(tmp_path / "theirs")
    returned = diffusers.AutoencoderKLFlux2.from_pretrained(tmp_path / "ours", local_files_only=True)
    assert loaded.config == ours.config
    assert loaded.bn.eps == returned.bn.eps == 1e-4
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
        assert torch.equal(returned.state_dict()[name], tensor)
    half = AutoencoderKLFlux2.from_pretrained(tmp_path / "theirs", torch_dtype=torch.bfloat16)
    assert (half.dtype, half.bn.running_var.dtype) == (torch.bfloat16, torch.bfloat16)
    assert weights_sha256(dict(loaded.named_parameters())) == weights_sha256(dict(theirs.named_parameters()))


def test_parameters_and_their_defaults_are_those_of_the_reference() -> None:
    """`force_upcast` is in the published files, but no parameter of the reference."""
    signature = inspect.signature(diffusers.AutoencoderKLFlux2.__init__).parameters
    ours = {name: value for name, value in AutoencoderKLFlux2Config().items() if name != "force_upcast"}
    assert ours == {name: value.default for name, value in signature.items() if name != "self"}
    for method in ("encode", "decode", "forward"):
        ours_parameters, theirs_parameters = (
            [(name, value.default) for name, value in inspect.signature(getattr(kind, method)).parameters.items()]
            for kind in (AutoencoderKLFlux2, diffusers.AutoencoderKLFlux2)
        )
        assert ours_parameters == theirs_parameters
