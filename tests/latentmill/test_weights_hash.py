"""The hash of a VAE's weights without the `vae` package, compared with what a cache made by that package has."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench.make_cache import CacheSpec, write_cache
from latentmill import Cache, IdentityError
from latentmill.errors import UsageError
from latentmill.weights_hash import hash_weights
from pipeline.weights import load_vae
from tests.checkpoints import ldm
from vae import AutoencoderKL, AutoencoderKLFlux2

FILE = "diffusion_pytorch_model.safetensors"


def read(vae: Path) -> dict[str, Tensor]:
    return load_file(vae / FILE)


def with_prefix(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in weights.items()}


def with_old_attention(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the layout of diffusers before 0.17, whose attention has other names."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    return {
        re.sub(r"\.(to_[qkv]|to_out\.0)\.", lambda match: f".{old[match[1]]}.", name): tensor
        for name, tensor in weights.items()
    }


LAYOUTS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "diffusers": lambda weights: weights,
    "diffusers, old": with_old_attention,
    "latent-diffusion": ldm,
    "full checkpoint": lambda weights: {
        **ldm(weights, "first_stage_model."),
        "model.diffusion_model.out.weight": torch.ones(2),
        "model_ema.decay": torch.ones((), dtype=torch.int64),
    },
    "under vae.": lambda weights: ldm(weights, "vae."),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_hash_of_a_file_is_that_of_the_cache(micro_vae: Path, tmp_path: Path, layout: str) -> None:
    expected = load_vae(str(micro_vae)).sha256
    file = tmp_path / "vae.safetensors"
    save_file(LAYOUTS[layout](read(micro_vae)), file)
    assert hash_weights(file) == expected
    changed = read(micro_vae)
    changed["encoder.mid_block.attentions.0.to_q.weight"][0, 0] += 1
    save_file(LAYOUTS[layout](changed), file)
    assert hash_weights(str(file)) != expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_variant_in_half_precision_is_hashed_as_it_would_be_loaded(
    micro_vae: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    folder, name = tmp_path / "vae", "fp16" if dtype == torch.float16 else "bf16"
    folder.mkdir()
    (folder / "config.json").write_bytes((micro_vae / "config.json").read_bytes())
    weights = {key: tensor.to(dtype) for key, tensor in read(micro_vae).items()}
    save_file(weights, folder / FILE.replace(".safetensors", f".{name}.safetensors"))
    assert hash_weights(folder) == load_vae(str(folder)).sha256 == hash_weights(weights)
    assert hash_weights(tmp_path) == hash_weights(folder), "the folder of a pipeline"


def test_weights_in_several_files_are_found_by_their_index(micro_vae: Path, tmp_path: Path) -> None:
    weights, parts = read(micro_vae), dict[str, str]()
    for number in range(2):
        name = FILE.replace(".safetensors", f"-{number}.safetensors")
        part = dict(sorted(weights.items())[number::2])
        save_file(part, tmp_path / name)
        parts |= dict.fromkeys(part, name)
    (tmp_path / f"{FILE}.index.json").write_text(json.dumps({"weight_map": parts}))
    (tmp_path / "config.json").write_bytes((micro_vae / "config.json").read_bytes())
    assert hash_weights(tmp_path) == load_vae(str(micro_vae)).sha256 == load_vae(str(tmp_path)).sha256


def test_modules_and_state_dicts_are_hashed(micro_vae: Path) -> None:
    expected, model = load_vae(str(micro_vae)).sha256, AutoencoderKL.from_pretrained(micro_vae)
    assert hash_weights(model) == hash_weights(model.state_dict()) == expected
    assert hash_weights(nn.ModuleDict({"module": model})) == expected
    assert hash_weights(with_prefix(model.state_dict(), "_orig_mod.")) == expected
    assert hash_weights({name: tensor.numpy() for name, tensor in model.state_dict().items()}) == expected


def test_the_statistics_of_flux2_are_not_hashed(tmp_path: Path) -> None:
    model = AutoencoderKLFlux2(
        block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    expected = load_vae(str(tmp_path)).sha256
    model.bn.running_mean += 1
    assert hash_weights(tmp_path) == hash_weights(model) == expected
    published = {
        re.sub("^quant_conv", "encoder.quant_conv", re.sub("^post_quant", "decoder.post_quant", name)): tensor
        for name, tensor in model.state_dict().items()
    }
    assert set(published) != set(model.state_dict())
    assert hash_weights(published) == expected


def test_a_cache_is_opened_with_its_vae_only(micro_vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sha256 = load_vae(str(micro_vae)).sha256
    monkeypatch.setattr("bench.make_cache.WEIGHTS", sha256)
    write_cache(tmp_path / "c", CacheSpec(buckets={(64, 64): 1}))
    url = str(tmp_path / "c")
    for vae in (sha256, str(micro_vae), micro_vae, AutoencoderKL.from_pretrained(micro_vae), read(micro_vae), "random"):
        assert Cache.open(url, vae=vae).info.identity.weights == sha256
    other = {name: tensor * 2 for name, tensor in read(micro_vae).items()}
    made = rf"^the cache {url} was made by the VAE random, whose weights have the sha256 {sha256}, not by "
    for vae, found in (
        ("0" * 64, "weights with 0{64};"),
        (other, rf"the given one, whose weights have {hash_weights(other)};"),
        ("stabilityai/sd-vae", r"stabilityai/sd-vae \(which is no local file or directory either\)$"),
    ):
        with pytest.raises(IdentityError, match=made + found):
            Cache.open(url, vae=vae)


def test_what_is_no_vae_is_named(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    for data in (b"", b"abc", (1 << 62).to_bytes(8, "little"), (2).to_bytes(8, "little") + b"[]"):
        file.write_bytes(data)
        with pytest.raises(UsageError, match=rf"^{file} cannot be read as safetensors"):
            hash_weights(file)
    save_file({"a": torch.ones(1)}, file)
    with pytest.raises(UsageError, match=rf"^{file} has no weights of an AutoencoderKL: there is no encoder\.conv_in"):
        hash_weights(file)
    with pytest.raises(UsageError, match=rf"^{tmp_path} has no {FILE}: load the model"):
        hash_weights(tmp_path)
    (tmp_path / f"{FILE}.index.json").write_text("{}")
    with pytest.raises(UsageError, match=r"index\.json cannot be read as an index of weights$"):
        hash_weights(tmp_path)
