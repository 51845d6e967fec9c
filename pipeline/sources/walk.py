"""Which files lie in directories of a local disk, where there are links, pipes and closed folders, too."""

import errno
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Walk:
    """A walk from some paths on, all in the directory `top` or that itself; what is hidden is left out, and `but`.

    found: the files, by path, with their `size`, `mtime_ns` and `file` (see `file_id`). others: what is neither file
    nor directory, and directories that may not be entered. Links to directories are followed, but no directory is
    entered twice: under its own name, where it has one here.
    """

    top: str
    but: str | None
    found: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    _folders: list[str] = field(default_factory=list)
    _links: list[str] = field(default_factory=list)

    def run(self, paths: Iterable[str]) -> None:
        """Raises PermissionError where `top` itself may not be entered."""
        top, but, paths = os.path.realpath(self.top), self.but and os.path.realpath(self.but), list(paths)
        folders = {folder: os.path.realpath(folder) for folder in {os.path.dirname(path) for path in paths}}
        self._take(path for path in paths if not _is_in(folders[os.path.dirname(path)], but))
        entered: set[str] = set()
        while self._folders or self._links:
            folder = (self._folders or self._links).pop()
            real = os.path.realpath(folder)
            if real in entered or _is_in(real, but):
                continue
            entered.add(real)
            if folder != self.top and _is_in(top, real):  # a link upwards: to the whole disk, perhaps
                self.others.append(folder)
                continue
            try:
                names = os.listdir(folder)
            except PermissionError:
                if folder == self.top:
                    raise
                self.others.append(folder)
                continue
            self._take(os.path.join(folder, name) for name in names if not name.startswith("."))

    def _take(self, paths: Iterable[str]) -> None:
        for path in paths:
            try:
                info = os.stat(path)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ELOOP, errno.EACCES):
                    raise
                # a link that leads nowhere, say: it is named when it is read
                self.found[path] = {"size": 0}
                continue
            if stat.S_ISREG(info.st_mode):
                self.found[path] = {
                    "size": info.st_size,
                    "mtime_ns": info.st_mtime_ns,
                    "file": file_id(path, info),
                }
            elif not stat.S_ISDIR(info.st_mode):
                self.others.append(path)
            elif os.path.islink(path):
                self._links.append(path)
            else:
                self._folders.append(path)
        self._links.sort(reverse=True)  # of two links to one directory the first by name counts, on any disk


def file_id(path: str, info: os.stat_result) -> str:
    """A text that is equal for two paths to one file: through links, mounts, or names in other letters.

    Hard links are files of their own: backups and tools that save space make them of equal files. Size and time are a
    part of it, because some network disks give numbers that are not unique.
    """
    if info.st_nlink > 1 or not info.st_ino:
        return os.path.realpath(path)
    return f"{info.st_dev}:{info.st_ino}:{info.st_size}:{info.st_mtime_ns}"


def file_id_at(path: str) -> str:
    """The same of a path; empty if there is no such file, or none that one may look at."""
    try:
        return file_id(path, os.stat(path))
    except (OSError, ValueError):
        return ""


def find_second_paths(files: Mapping[str, Mapping[str, Any]], paths: Iterable[str]) -> set[str]:
    """Those of the paths that lead to a file which another of them names without a link.

    Several links to a file that none of them names so are files of their own: stores that go by content (git-annex,
    the hub's cache) link equal files to one.
    """
    by_file: dict[str, list[str]] = {}
    for path in paths:
        if file := files[path].get("file"):
            by_file.setdefault(file, []).append(path)
    second: set[str] = set()
    for twins in by_file.values():
        if len(twins) > 1 and (own := [path for path in twins if not os.path.islink(path)]):
            second.update(path for path in twins if path != min(own))
    return second


def _is_in(path: str, folder: str | None) -> bool:
    return folder is not None and f"{path.rstrip('/')}/".startswith(f"{folder.rstrip('/')}/")
