"""Hub ids, with a cache in the layout of huggingface_hub. No test uses the network."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoints import ldm
from tests.conftest import MICRO
from vae import AutoencoderKL, LoadError, LoadWarning, hub
from vae.load import STEM, WEIGHTS, weights_sha256

huggingface_hub = pytest.importorskip("huggingface_hub")
pytest.importorskip("huggingface_hub.constants")  # submodules that the tests patch
pytest.importorskip("huggingface_hub.errors")

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def model() -> AutoencoderKL:
    torch.manual_seed(4)
    return AutoencoderKL(**MICRO)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Return a function that makes a repository's snapshot folder in an empty cache. The hub is offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def make(name: str) -> Path:
        folder = tmp_path / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs/main").write_text(COMMIT)
        snapshot = folder / "snapshots" / COMMIT
        snapshot.mkdir(parents=True)
        return snapshot

    return make


@pytest.mark.parametrize("inside", ["", "vae/"])
def test_a_hub_id_loads_like_a_directory(model: AutoencoderKL, repository: Callable[[str], Path], inside: str) -> None:
    model.save_pretrained(repository("owner/model") / inside)
    loaded = AutoencoderKL.from_pretrained("owner/model", subfolder=inside.rstrip("/"))
    assert weights_sha256(loaded.state_dict()) == weights_sha256(model.state_dict())
    assert AutoencoderKL.from_pretrained("owner/model").config == model.config


def test_half_precision_is_used_as_a_variant_or_if_there_is_no_other(
    model: AutoencoderKL, repository: Callable[[str], Path]
) -> None:
    snapshot = repository("owner/model")
    model.save_pretrained(snapshot)
    half = {name: tensor.half() for name, tensor in model.state_dict().items()}
    save_file(half, snapshot / f"{STEM}.fp16.safetensors")
    assert AutoencoderKL.from_pretrained("owner/model").dtype == torch.float32
    assert AutoencoderKL.from_pretrained("owner/model", variant="fp16").dtype == torch.float16
    (snapshot / WEIGHTS).unlink()
    with pytest.warns(LoadWarning, match=r"the weights are those of the variant fp16 \("):
        assert AutoencoderKL.from_pretrained("owner/model").dtype == torch.float16, "the only weights"


@pytest.mark.parametrize(
    "url", ["https://huggingface.co/{}/blob/main/{}", "https://hf.co/{}/resolve/main/{}?download=true"]
)
def test_a_single_file_loads_by_its_url(model: AutoencoderKL, repository: Callable[[str], Path], url: str) -> None:
    """This is the example of the documentation."""
    snapshot = repository("stabilityai/sd-vae-ft-mse-original")
    save_file(ldm(model.state_dict()), snapshot / "vae-ft-mse-840000-ema-pruned.safetensors")
    location = url.format("stabilityai/sd-vae-ft-mse-original", "vae-ft-mse-840000-ema-pruned.safetensors")
    loaded = AutoencoderKL.from_single_file(location, config=model.config)
    assert weights_sha256(loaded.state_dict()) == weights_sha256(model.state_dict())


def test_a_file_that_is_not_cached_is_named_in_the_error(repository: Callable[[str], Path]) -> None:
    with pytest.raises(LoadError, match=r"owner/none: vae/config.json is not in the hub's local cache"):
        AutoencoderKL.from_pretrained("owner/none")
    with pytest.raises(LoadError, match="is not in the hub's local cache"):
        AutoencoderKL.from_single_file("https://huggingface.co/owner/none/blob/main/model.safetensors")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("GatedRepoError", "owner/model is gated; accept its terms on the hub, and set HF_TOKEN"),
        (
            "RepositoryNotFoundError",
            r"the hub has no repository owner/model; check its name \(a private one needs HF_TOKEN\)",
        ),
        ("RevisionNotFoundError", "owner/model: vae/config.json cannot be downloaded from the hub: the answer"),
    ],
)
def test_an_error_of_the_hub_becomes_a_clear_error(error: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error_class = getattr(huggingface_hub.errors, error)

    def refuse(*args: object, **options: object) -> str:
        instance = error_class.__new__(error_class)  # its constructor needs a response
        instance.args = ("the answer\nof the hub",)
        raise instance

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(LoadError, match=message):
        AutoencoderKL.from_pretrained("owner/model")


def test_without_the_library_the_error_names_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(LoadError, match=r"run `pip install huggingface_hub` \(the extra hub\)"):
        AutoencoderKL.from_pretrained("owner/model")


@pytest.mark.parametrize(
    ("ref", "is_id"), [("owner/model", True), ("a/b/c", False), ("/a", False), ("./a", False), ("a", False)]
)
def test_a_repository_id_is_distinguished_from_a_path(ref: str, is_id: bool) -> None:
    assert hub.is_repository_id(ref) is is_id
