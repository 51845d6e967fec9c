"""List the files in directories of a local disk, which also has links, pipes and folders without permission."""

import errno
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field

from pipeline.sources.found import FoundFile, FoundFiles
from pipeline.storage.etags import get_etag


@dataclass(slots=True)
class Walk:
    """A walk from paths that are in the directory `top`, or are `top`. Hidden entries and `excluded` are skipped.

    found: the files by path. others: entries that are neither files nor directories, and links to directories above
    `top`. unreadable: directories without permission. Links to directories are followed, but no directory is entered
    twice. A directory that is below `top` and also behind a link is entered below `top`.
    """

    top: str
    excluded: str | None
    found: dict[str, FoundFile] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    _folders: list[str] = field(default_factory=list)
    _links: list[str] = field(default_factory=list)

    def run(self, paths: Iterable[str]) -> None:
        """Walk. Raises PermissionError if `top` itself may not be entered."""
        top, excluded = os.path.realpath(self.top), self.excluded and os.path.realpath(self.excluded)
        paths = list(paths)
        folders = {folder: os.path.realpath(folder) for folder in {os.path.dirname(path) for path in paths}}
        self._add(path for path in paths if not _is_in(folders[os.path.dirname(path)], excluded))
        entered: set[str] = set()
        while self._folders or self._links:
            folder = (self._folders or self._links).pop()
            real = os.path.realpath(folder)
            if real in entered or _is_in(real, excluded):
                continue
            entered.add(real)
            if folder != self.top and _is_in(top, real):  # a link to a directory above, perhaps to the whole disk
                self.others.append(folder)
                continue
            try:
                names = os.listdir(folder)
            except PermissionError:
                if folder == self.top:
                    raise
                self.unreadable.append(folder)
                continue
            self._add(os.path.join(folder, name) for name in names if not name.startswith("."))

    def _add(self, paths: Iterable[str]) -> None:
        """Add each path to the files, the other entries or the directories to visit."""
        for path in paths:
            try:
                info = os.stat(path)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ELOOP, errno.EACCES):
                    raise
                # for example a broken link; reading it raises an error that names it
                self.found[path] = FoundFile(0, "")
                continue
            if stat.S_ISREG(info.st_mode):
                self.found[path] = FoundFile(
                    info.st_size, get_etag({"mtime_ns": info.st_mtime_ns}), file_id(path, info)
                )
            elif not stat.S_ISDIR(info.st_mode):
                self.others.append(path)
            elif os.path.islink(path):
                self._links.append(path)
            else:
                self._folders.append(path)
        self._links.sort(reverse=True)  # the first by name of two links to one directory is entered, on any disk


def file_id(path: str, info: os.stat_result) -> str:
    """Return a text that is equal for two paths to one file, through links, mounts, or a disk that ignores case.

    Hard links count as separate files, because backups and deduplication tools create them for equal files. Size and
    time are part of the text, because some network disks have inode numbers that are not unique.
    """
    if info.st_nlink > 1 or not info.st_ino:
        return os.path.realpath(path)
    return f"{info.st_dev}:{info.st_ino}:{info.st_size}:{info.st_mtime_ns}"


def file_id_at(path: str) -> str:
    """Return the `file_id` of a path. It is empty if the file does not exist or is not accessible."""
    try:
        return file_id(path, os.stat(path))
    except (OSError, ValueError):
        return ""


def find_second_paths(files: FoundFiles, paths: Iterable[str]) -> set[str]:
    """Return the paths to files that another of the paths names without a link.

    If all paths to a file are links, they count as separate files: content-addressed stores (git-annex, the hub's
    cache) link equal files to one.
    """
    first: dict[str, str] = {}
    twins: dict[str, list[str]] = {}
    for path in paths:
        if (file := files[path].file_id) and (other := first.setdefault(file, path)) is not path:
            twins.setdefault(file, [other]).append(path)
    second: set[str] = set()
    for paths_to_file in twins.values():
        if own := [path for path in paths_to_file if not os.path.islink(path)]:
            second.update(path for path in paths_to_file if path != min(own))
    return second


def _is_in(path: str, folder: str | None) -> bool:
    """Whether a path is a folder or is below it."""
    return folder is not None and f"{path.rstrip('/')}/".startswith(f"{folder.rstrip('/')}/")
