"""Choose files of the sources by the globs of `--include` and `--exclude`."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from pipeline.readers.image_files import get_folder
from pipeline.readers.metadata import METADATA_NAMES
from pipeline.records import ListedFile, extension, get_shard_kind, get_shard_stem, is_image, path_below_root, stem
from pipeline.sources.sidecars import find_nearby_texts, find_possible_texts


def choose_files(
    files: Sequence[ListedFile],
    include: Sequence[str],
    exclude: Sequence[str],
) -> tuple[list[ListedFile], set[str]]:
    """Return the files that the globs choose, and the paths of the others.

    include: globs of images and shards; empty: all. exclude: globs of any files. The texts of an image that is left
    out are left out, too.
    """
    if not include and not exclude:
        return list(files), set()
    companions = _find_companions(files) if include else set()
    kept: list[ListedFile] = []
    for file in files:
        below = path_below_root(file.path)
        is_input = bool(include) and may_be_input(file.path) and file.path not in companions
        is_chosen = not is_input or any(matches_glob(below, glob) for glob in include)
        if is_chosen and not any(matches_glob(below, glob) for glob in exclude):
            kept.append(file)
    chosen = {file.path for file in kept}
    images = [file.path for file in files if is_image(file.path)]
    by_name = find_possible_texts(path for path in chosen if not is_image(path))
    texts = set(find_nearby_texts(by_name, (image for image in images if image not in chosen)))
    texts.difference_update(find_nearby_texts(by_name, (image for image in images if image in chosen)))
    left_out = {file.path for file in files if file.path not in chosen} | texts
    return [file for file in kept if file.path not in texts], left_out


def may_be_input(path: str) -> bool:
    """Return whether a file is an image or a shard, by its extension."""
    return bool(get_shard_kind(path)) or is_image(path)


def _find_companions(files: Sequence[ListedFile]) -> set[str]:
    """Return the paths of Parquet files that, by their names, belong to images and tars."""
    stems = {get_shard_stem(file.path) for file in files if get_shard_kind(file.path) == "tar"}
    stems |= {get_folder(file.path)[:-1] for file in files if is_image(file.path)}
    parquets = (file.path for file in files if extension(file.path) == "parquet")
    return {path for path in parquets if stem(path) in stems or path.rpartition("/")[2] in METADATA_NAMES}


def matches_glob(path: str, glob: str) -> bool:
    """Whether a glob matches a path below the root, or a folder that the path is in.

    A glob without `/` matches a name at any depth. With a trailing `/`, it matches folders only. `**` matches any
    number of folders.
    """
    steps, wanted = path.split("/"), glob.strip("/").split("/")
    if len(wanted) == 1 and not glob.startswith("/"):
        wanted = ["**", *wanted]
    return _match_steps(steps[:-1] if glob.endswith("/") else steps, wanted)


def _match_steps(steps: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether the first steps of a path match all wanted ones."""
    if not wanted:
        return True
    if wanted[0] == "**":
        return any(_match_steps(steps[start:], wanted[1:]) for start in range(len(steps) + 1))
    return bool(steps) and fnmatchcase(steps[0], wanted[0]) and _match_steps(steps[1:], wanted[1:])
