"""Load and save a model's files: a directory in diffusers' format, local or on the hub, or a single file.

A directory has config.json and `diffusion_pytorch_model.safetensors`. The weights may be split into several files with
an index. There may be other copies, the variants, such as those in half precision (`.fp16.`). Old directories have a
pickle (`.bin`) instead, and those of FlaxAutoencoderKL have `diffusion_flax_model.msgpack` (`vae.flax_weights`).
"""

import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from latentmill.weights_hash import digest_weights
from vae import checkpoint, flax_weights, hub, single_file
from vae.config import FLAX_CLASS, VaeConfig, parse_config
from vae.errors import LoadError, LoadWarning
from vae.keys import rename_keys
from vae.presets import PRESETS

CONFIG = "config.json"
STEM = "diffusion_pytorch_model"
WEIGHTS = f"{STEM}.safetensors"
INDEX = f"{WEIGHTS}.index.json"
# The variants that are looked for if there are no weights without one. The first is the most exact one.
VARIANTS = ("fp32", "fp16", "bf16", "ema", "non_ema")
DEMO = Path(__file__).parent / "demo"  # the small model that ships with this package

Fetch = Callable[[str], Path | None]
"""A function from a file's name in a model's directory to its local path, or None if there is no such file."""


def load_directory(
    ref: str | Path, subfolder: str = "", variant: str = "", revision: str | None = None, from_pt: bool = False
) -> tuple[VaeConfig, dict[str, Tensor]]:
    """Return the configuration and the tensors of a directory, of its `vae/`, or of a repository on the hub.

    The tensors have the names and the layout of PyTorch, also if they come from a file of Flax. If there are files of
    both, the weights are those of the class that config.json names. Warns (LoadWarning) if they are those of a variant
    that was not asked for.

    from_pt: read no file of Flax. The other parameters are those of `AutoencoderKL.from_pretrained`. Raises LoadError
    if there is no model.
    """
    fetch = _find_source(str(ref), revision)
    folders = [f"{subfolder}/"] if subfolder else ["vae/", ""]
    match = _fetch_first(fetch, [folder + CONFIG for folder in folders])
    if match is None:
        reason = f"its {subfolder}/ has no" if subfolder else "neither it nor its vae/ has a"
        raise LoadError(f"there is no VAE at {ref}: {reason} {CONFIG}")
    name, path = match
    folder = name.removesuffix(CONFIG)
    fields = _read_fields(path)
    config = _make_config(fields, path)
    names = _list_weights(variant, fields.get("_class_name") == FLAX_CLASS, from_pt)
    return config, _read_weights(lambda file: fetch(folder + file), names, path.parent)


def load_file(ref: str | Path, config: "ConfigLike" = None) -> tuple[VaeConfig, dict[str, Tensor]]:
    """Return the configuration and the tensors of a single file (`vae.single_file`).

    ref: a local path, or the URL of a file on the hub. config: default: if the file is one of a directory in diffusers'
    format (a variant, for instance), the config.json beside it. Raises LoadError if there is no model.
    """
    location = hub.parse_url(str(ref))
    if location is None and "://" in str(ref):
        raise LoadError(f"{ref} is neither a local file nor a file on the hub; download it first")
    repository, revision, name = location or ("", None, "")
    path = hub.fetch(repository, name, revision) if repository else Path(ref)
    if path is None or not path.is_file():
        raise LoadError(f"there is no file {ref}")
    if not is_single_file(path):
        suffixes = ", ".join(sorted(checkpoint.SUFFIXES))
        raise LoadError(f"{path} is not a checkpoint: the name of a checkpoint ends with {suffixes}")
    if config is None and path.name.startswith(STEM):
        folder = name.rpartition("/")[0]
        beside = (
            hub.fetch(repository, f"{folder}/{CONFIG}".lstrip("/"), revision) if repository else path.parent / CONFIG
        )
        config = read_config(beside) if beside and beside.is_file() else None
    return single_file.read(path, resolve_config(config), repository)


def is_single_file(ref: str | Path) -> bool:
    """Return whether `ref` has the suffix of a checkpoint file."""
    return Path(str(ref)).suffix in checkpoint.SUFFIXES


ConfigLike = VaeConfig | Mapping[str, Any] | str | Path | None
"""A configuration, its fields, the name of a preset (`vae.presets`), or a directory or hub id with a config.json."""


def resolve_config(config: ConfigLike) -> VaeConfig | None:
    """Return the configuration that `config` names, or None for None.

    Raises LoadError if a name is neither a preset nor a directory with a config.json, and ValueError for fields that
    no model can have.
    """
    if config is None or isinstance(config, VaeConfig):
        return config
    if isinstance(config, Mapping):
        return parse_config(config)
    if str(config) in PRESETS:
        return PRESETS[str(config)].config
    try:
        match = _fetch_first(_find_source(str(config), None), [f"vae/{CONFIG}", CONFIG])
    except LoadError as error:
        presets = ", ".join(PRESETS)
        raise LoadError(f"{config} is not a configuration: it is not a preset ({presets}), and {error}") from error
    if match is None:
        raise LoadError(f"{config} is not a configuration: there is no {CONFIG}")
    return read_config(match[1])


def _find_source(ref: str, revision: str | None) -> Fetch:
    """Return the function that fetches files of `ref`: `demo`, a local directory, or a repository's id."""
    local = DEMO if ref == "demo" else Path(ref)
    if local.is_dir():
        return lambda name: local / name if (local / name).is_file() else None
    if local.exists():
        raise LoadError(f"{ref} is a file; a VAE is a directory with {CONFIG} and safetensors")
    if not hub.is_repository_id(ref):
        raise LoadError(f"there is no VAE at {ref}: no such directory")
    return lambda name: hub.fetch(ref, name, revision)


def _fetch_first(fetch: Fetch, names: Iterable[str]) -> tuple[str, Path] | None:
    """Return the first of `names` that exists, and its local path, or None if none exists.

    Raises NotCachedError if the hub could not be asked about a name and no other name exists.
    """
    not_cached: hub.NotCachedError | None = None
    for name in names:
        try:
            path = fetch(name)
        except hub.NotCachedError as error:
            not_cached = not_cached or error
        else:
            if path is not None:
                return name, path
    if not_cached is not None:
        raise not_cached
    return None


def read_config(path: Path) -> VaeConfig:
    """Return the configuration in a config.json. Raises LoadError if it is not that of a model."""
    return _make_config(_read_fields(path), path)


def _read_fields(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise ValueError("it is not a JSON object")
    except ValueError as error:
        raise LoadError(f"{path}: {error}") from error
    return fields


def _make_config(fields: Mapping[str, Any], path: Path) -> VaeConfig:
    """Return the configuration with these fields. path: their source, for error messages."""
    try:
        return parse_config(fields)
    except (ValueError, TypeError) as error:
        raise LoadError(f"{path}: {error}") from error


def _list_weights(variant: str, is_flax: bool, from_pt: bool) -> list[str]:
    """Return the names that a file of weights or an index may have, the preferred one first.

    Without a variant, VARIANTS are used only if there are no other weights. is_flax: prefer the file of Flax.
    """
    names = []
    for name in [variant] if variant else ["", *VARIANTS]:
        infix = f".{name}" if name else ""
        for suffix in ("safetensors", "bin"):
            names += [f"{STEM}{infix}.{suffix}", f"{STEM}.{suffix}.index{infix}.json"]
    if variant or from_pt:
        return names
    return [flax_weights.FILE, *names] if is_flax else [*names, flax_weights.FILE]


def _read_weights(fetch: Fetch, names: list[str], folder: Path) -> dict[str, Tensor]:
    """Return the tensors of the first of `names` that exists, or of all files in it if it is an index.

    folder: their directory, for error messages.
    """
    match = _fetch_first(fetch, names)
    if match is None:
        raise LoadError(f"there are no weights at {folder}: no {names[0]}{_describe_others(folder)}")
    name, path = match
    _warn_of_variant(name, names, folder)
    if name == flax_weights.FILE:
        return flax_weights.to_torch(flax_weights.read(path), path)
    weights: dict[str, Tensor] = {}
    for part in read_index(path) if name.endswith(".json") else [name]:
        part_path = fetch(part)
        if part_path is None:
            raise LoadError(f"{part} is missing at {folder}, although {name} lists it; download it again")
        with checkpoint.open_checkpoint(part_path) as content:
            weights |= {key: content.get_tensor(key) for key in list(content.keys())}
    return rename_keys(weights)


def _warn_of_variant(name: str, names: list[str], folder: Path) -> None:
    """Warn (LoadWarning) if the file `name` is that of a variant, and the first of `names` is not."""
    variant = next((variant for variant in VARIANTS if f".{variant}." in name), None)
    if variant is not None and f".{variant}." not in names[0]:
        text = f"there is no {names[0]} at {folder}; the weights are those of the variant {variant} ({name})"
        warnings.warn(f"{text}. To use other ones, name their file", LoadWarning, stacklevel=2)


def _describe_others(folder: Path) -> str:
    """Return the files of weights in a folder as the end of a message, or an empty text if there are none."""
    others = sorted(path.name for path in folder.glob(f"{STEM}*") if is_single_file(path))
    return f" (there is {', '.join(others)}; to use one, name that file)" if others else ""


def read_index(index: Path) -> list[str]:
    """Return the names of the files in an index, all of its own directory. Raises LoadError if it is corrupt."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if any("/" in name for name in names):
            raise ValueError("it lists files of another directory")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(f"{index} cannot be read as an index of weights; download it again") from error
    return names


def check_weights(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: str | Path) -> None:
    """Raise LoadError unless `weights` has exactly the names and shapes of `expected`, and floating-point values."""
    missing, extra = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or extra:
        example = f"{missing[0]} is missing" if missing else f"{extra[0]} is not in the configuration"
        raise LoadError(
            f"the weights at {path} do not match the configuration: {len(missing)} tensors are missing, "
            f"{len(extra)} are extra ({example})"
        )
    for name, tensor in expected.items():
        if tensor.is_floating_point() and not weights[name].is_floating_point():
            raise LoadError(f"the weights at {path} are not those of a model: {name} has integers")
        if weights[name].shape != tensor.shape:
            raise LoadError(
                f"the weights at {path} do not match the configuration: {name} has the shape "
                f"{list(weights[name].shape)}, not {list(tensor.shape)}"
            )


def save(folder: Path, config: VaeConfig, weights: Mapping[str, Tensor], class_name: str = "") -> None:
    """Write config.json and one file of weights to `folder`, in the format that diffusers reads.

    weights: a state dict. class_name: FLAX_CLASS writes a msgpack file instead of safetensors; default: the class of
    the configuration in PyTorch.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fields: dict[str, Any] = {"_class_name": class_name or config.class_names()[0], **config.to_dict()}
    (folder / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    if class_name == FLAX_CLASS:
        flax_weights.write(folder / flax_weights.FILE, flax_weights.to_flax(weights))
    else:
        save_file({name: t.contiguous() for name, t in weights.items()}, folder / WEIGHTS, metadata={"format": "pt"})


def weights_sha256(weights: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 (hex) of a model's weights, which does not depend on the file that they came from.

    The hash is over the parameters in sorted order of their names. Each contributes its name, a NUL byte, its shape
    ("64,3,3,3"), a NUL byte, and its values as little-endian float32.
    """
    return digest_weights(weights)
