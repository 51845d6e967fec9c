"""A model's files: a directory as diffusers saves it, here or on the hub, or a single file.

A directory has config.json and `diffusion_pytorch_model.safetensors`: perhaps in several files with an index, perhaps
in half precision beside (`.fp16.`), and in old ones as a pickle (`.bin`).
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vae import hub, single_file, tensors
from vae.config import AutoencoderKLConfig
from vae.errors import LoadError
from vae.names import rename_keys
from vae.presets import PRESETS

CONFIG = "config.json"
STEM = "diffusion_pytorch_model"
WEIGHTS = f"{STEM}.safetensors"
INDEX = f"{WEIGHTS}.index.json"
DEMO = Path(__file__).parent / "demo"  # the small model that ships with the project

Fetch = Callable[[str], Path | None]
"""A file of a model's directory by its name in it: where it lies on this disk, None where there is none."""


def directory(
    ref: str | Path, subfolder: str = "", variant: str = "", revision: str | None = None
) -> tuple[AutoencoderKLConfig, dict[str, Tensor]]:
    """Configuration and tensors of a directory, or of the `vae/` in it, or of a repository on the hub."""
    fetch = _source(str(ref), revision)
    folders = [f"{subfolder}/"] if subfolder else ["vae/", ""]
    found = _first(fetch, [folder + CONFIG for folder in folders])
    if found is None:
        where = f"its {subfolder}/ has no" if subfolder else "neither it nor its vae/ has a"
        raise LoadError(f"there is no VAE at {ref}: {where} {CONFIG}")
    name, path = found
    folder = name.removesuffix(CONFIG)
    return read_config(path), _read_weights(lambda file: fetch(folder + file), variant, path.parent)


def file(ref: str | Path, config: "Settings" = None) -> tuple[AutoencoderKLConfig, dict[str, Tensor]]:
    """Configuration and tensors of a single file: on this disk, or on the hub by its URL there (`vae.single_file`)."""
    there = hub.parse(str(ref))
    if there is None and "://" in str(ref):
        raise LoadError(f"{ref} is neither a file here nor one on the hub; fetch it first")
    path = Path(ref) if there is None else hub.fetch(there[0], there[2], there[1])
    if path is None or not path.is_file():
        raise LoadError(f"there is no file {ref}")
    if not is_single_file(path):
        raise LoadError(f"{path} is not a file of tensors: these end with {', '.join(sorted(tensors.SUFFIXES))}")
    return single_file.read(path, configuration(config), there[0] if there else "")


def is_single_file(ref: str | Path) -> bool:
    """Whether `ref` is named as a file of tensors is."""
    return Path(str(ref)).suffix in tensors.SUFFIXES


Settings = AutoencoderKLConfig | Mapping[str, Any] | str | Path | None
"""A configuration, or its fields, or the name of a preset (`vae.presets`), or a directory that has it."""


def configuration(given: Settings) -> AutoencoderKLConfig | None:
    """What `given` means; None of None."""
    if given is None or isinstance(given, AutoencoderKLConfig):
        return given
    if isinstance(given, Mapping):
        return AutoencoderKLConfig.from_dict(given)
    if str(given) in PRESETS:
        return PRESETS[str(given)].config
    try:
        found = _first(_source(str(given), None), [f"vae/{CONFIG}", CONFIG])
    except LoadError as error:
        raise LoadError(f"{given} is no configuration: no preset ({', '.join(PRESETS)}), and {error}") from error
    if found is None:
        raise LoadError(f"{given} is no configuration: there is no {CONFIG}")
    return read_config(found[1])


def _source(ref: str, revision: str | None) -> Fetch:
    """Where a directory's files come from: `demo`, a directory on this disk, or a repository."""
    local = DEMO if ref == "demo" else Path(ref)
    if local.is_dir():
        return lambda name: local / name if (local / name).is_file() else None
    if local.exists():
        raise LoadError(f"{ref} is a file; a VAE is a directory with {CONFIG} and safetensors")
    if not hub.is_id(ref):
        raise LoadError(f"there is no VAE at {ref}: no such directory")
    return lambda name: hub.fetch(ref, name, revision)


def _first(fetch: Fetch, names: Iterable[str]) -> tuple[str, Path] | None:
    """The first of `names` that there is, and where it lies; None where there is none."""
    unknown: hub.NotCachedError | None = None
    for name in names:
        try:
            path = fetch(name)
        except hub.NotCachedError as error:
            unknown = unknown or error
        else:
            if path is not None:
                return name, path
    if unknown is not None:
        raise unknown
    return None


def read_config(path: Path) -> AutoencoderKLConfig:
    """The configuration in a config.json."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise ValueError("it is not a JSON object")
        return AutoencoderKLConfig.from_dict(fields)
    except (ValueError, TypeError) as error:
        raise LoadError(f"{path}: {error}") from error


def _read_weights(fetch: Fetch, variant: str, where: Path) -> dict[str, Tensor]:
    """All tensors, of one file or of those that an index names; half precision only where there is no other."""
    names = []
    for kind in [f"{variant}"] if variant else ["", "fp16"]:
        dot = f".{kind}" if kind else ""
        for suffix in ("safetensors", "bin"):
            names += [f"{STEM}{dot}.{suffix}", f"{STEM}.{suffix}.index{dot}.json"]
    found = _first(fetch, names)
    if found is None:
        raise LoadError(f"there are no weights at {where}: no {names[0]}")
    name, path = found
    loaded: dict[str, Tensor] = {}
    for part in read_index(path) if name.endswith(".json") else [name]:
        part_path = fetch(part)
        if part_path is None:
            raise LoadError(f"there is no {part} at {where}, which {name} names")
        with tensors.open_checkpoint(part_path) as content:
            loaded |= {key: content.get_tensor(key) for key in list(content.keys())}
    return rename_keys(loaded)


def read_index(index: Path) -> list[str]:
    """The files that an index names, all beside it."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if any("/" in name for name in names):
            raise ValueError("it names files elsewhere")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(f"{index} cannot be read as an index of files of tensors") from error
    return names


def check(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str | Path) -> None:
    """Raise LoadError unless `weights` has every name of `wanted`, no other, the same shapes, and real numbers."""
    missing, foreign = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    if missing or foreign:
        first = f"lacks {missing[0]}" if missing else f"has {foreign[0]}, which the configuration does not"
        raise LoadError(
            f"the weights at {where} do not fit the configuration: {len(missing)} tensors missing, "
            f"{len(foreign)} too many (it {first})"
        )
    for name, tensor in wanted.items():
        if not weights[name].is_floating_point():
            raise LoadError(f"the weights at {where} are not of a model: {name} holds whole numbers")
        if weights[name].shape != tensor.shape:
            raise LoadError(
                f"the weights at {where} do not fit the configuration: {name} has the shape "
                f"{list(weights[name].shape)}, not {list(tensor.shape)}"
            )


def write(folder: Path, config: AutoencoderKLConfig, weights: Mapping[str, Tensor]) -> None:
    """Write config.json and one safetensors file, which diffusers reads too."""
    folder.mkdir(parents=True, exist_ok=True)
    fields: dict[str, Any] = {"_class_name": "AutoencoderKL", **config.to_dict()}
    (folder / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    save_file({name: t.contiguous() for name, t in weights.items()}, folder / WEIGHTS, metadata={"format": "pt"})


def weights_sha256(weights: Mapping[str, Tensor]) -> str:
    """What a model's weights are, whichever file they came from: a sha256 in hex.

    Over the parameter names in sorted order: name, NUL, shape ("64,3,3,3"), NUL, values as little-endian float32.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        values = weights[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name}\0{','.join(map(str, values.shape))}\0".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()
