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

    found: the files, by path, with their `size`. others: what is neither file nor directory, and directories that may
    not be entered. Links to directories are followed, but no directory is entered twice: under its own name, where it
    has one here.
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
                self.found[path] = {"size": info.st_size}
            elif not stat.S_ISDIR(info.st_mode):
                self.others.append(path)
            elif os.path.islink(path):
                self._links.append(path)
            else:
                self._folders.append(path)
        self._links.sort(reverse=True)  # of two links to one directory the first by name counts, on any disk


def _is_in(path: str, folder: str | None) -> bool:
    return folder is not None and f"{path.rstrip('/')}/".startswith(f"{folder.rstrip('/')}/")
