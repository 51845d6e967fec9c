"""All bytes come and go through here: the only module that knows fsspec.

A `Folder` is where a cache or previews are written, by names relative to it. `create` is the one way to publish
something that must never change, `replace` the one for what is rewritten. There is no open-for-write: an fsspec file
that is closed by an exception publishes half of its content.

What can be promised of `create`: in memory and on most local disks, of any number of writers one wins and no reader
sees a part of a file. On object stores it is one conditional request. `supports_conditional_create` tests it.
Stores are asked again, with growing pauses, by their own libraries (S3: `RETRIES`); what fails then fails the unit.
"""

import base64
import contextlib
import hashlib
import os
import re
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from latentmill.stream import NOT_THERE, Stream, name_url_in_errors
from pipeline.errors import ChangedError, DamagedError, Rejected, SourceError, StorageError, UsageError
from pipeline.prefetch import in_order
from pipeline.records import Unit
from pipeline.storage import local_disk
from pipeline.storage.etags import same_version

ONE_REQUEST = 5 << 30  # a body up to this size goes out as one request: multipart uploads are not atomic everywhere
READ_AHEAD = 8 << 20  # bytes a request, of what is read from start to end
RETRIES = {"mode": "standard", "max_attempts": 8}  # botocore's, for 500, 503, resets: about a minute
CONNECTIONS = 64  # to one S3 server: botocore's own 10 would make the readers of folders wait for each other
PROBES = 3
AT_ONCE = 16  # small files that are read together
CONDITIONAL = frozenset({"s3", "gs", "abfs"})  # protocols whose fsspec library has a conditional create

_memory_lock = threading.Lock()  # memory:// checks and creates in two steps


def connect(url: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """The filesystem that a URL or a path names, and the path on it. `::` is a part of a name, not fsspec's chain."""
    if re.match(r"[^/]*://[^/]*:[^/]*@", url):
        raise UsageError("a URL must not hold a password: it would be written down; use --storage-option KEY=env:NAME")
    if "://" not in url:
        local = LocalFileSystem()
        return local, cast(str, local._strip_protocol(url))
    protocol = url.partition("://")[0]
    extra: dict[str, Any] = {}
    if protocol in ("s3", "s3a"):
        retries = {} if "AWS_MAX_ATTEMPTS" in os.environ else {"retries": RETRIES}
        extra["config_kwargs"] = {"max_pool_connections": CONNECTIONS, **retries}
    try:
        kind = fsspec.get_filesystem_class(protocol)
        fs = kind(**{**kind._get_kwargs_from_urls(url), "use_listings_cache": False, **extra, **options})
        return fs, cast(str, kind._strip_protocol(url))
    except Exception as error:  # libraries check their options here, each in its own way
        said = (str(error).splitlines() or [""])[0]
        raise StorageError(f"cannot reach {url}: {said or type(error).__name__}") from error


def absolute(url: str) -> str:
    """A URL as it is; a local path made absolute, because workers have another working directory."""
    if "://" in url and not url.startswith("file://"):
        return url
    return os.path.abspath(connect(url, {})[1])


def is_local(fs: Any) -> bool:
    """Whether it is this machine's: with links, pipes and permissions."""
    return isinstance(fs, LocalFileSystem)


def protocols_of(fs: Any) -> set[str]:
    """What the URLs of a filesystem may begin with."""
    return {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)


def full_url(fs: Any, path: str) -> str:
    """A path on a filesystem as a URL that any machine understands; local paths stay paths."""
    return path if isinstance(fs, LocalFileSystem) else cast(str, fs.unstrip_protocol(path))


def url_as_listed(url: str) -> str:
    """A URL or a path as `full_url` writes it; nothing is connected to, as the store may have options of its own."""
    kind = fsspec.get_filesystem_class(url.partition("://")[0] if "://" in url else "file")
    path = cast(str, kind._strip_protocol(url))
    if kind is LocalFileSystem:
        return path
    return f"{kind.protocol if isinstance(kind.protocol, str) else kind.protocol[0]}://{path}"


@contextmanager
def open_stream(
    url: str, options: Mapping[str, Any], planned: Unit | None = None, seeking: bool = False
) -> Iterator[BinaryIO]:
    """A file to read from start to end, a block at a time; or here and there, as it is asked for (`seeking`).

    Raises ChangedError where it is not what was planned, by its size or its ETag; SourceError if it changes meanwhile;
    StorageError where fewer bytes come than it has, whatever its reader made of that.
    """
    with name_url_in_errors(url, "read"):
        fs, path = connect(url, options)
        before = version_of(fs, path) if planned is not None else (0, "")
        if planned and not same_version((planned.bytes, planned.etag), before):
            what = "its time or ETag" if before[0] == planned.bytes else f"{planned.bytes} bytes then, {before[0]} now"
            raise ChangedError(f"{url} has changed since it was planned ({what}); latentmill encode says what to do")
        # with blocks, two columns of a Parquet file read in turn would fetch each byte many times
        how = {"cache_type": "none"} if seeking else {"block_size": READ_AHEAD}
        file = fs.open(path, "rb", **how)

    def check() -> None:
        if planned is not None:
            with name_url_in_errors(url, "read"):
                after = version_of(fs, path)
            if after != before:
                raise SourceError(f"{url} has changed while it was read")

    stream = Stream(file, url, planned.bytes if planned else getattr(file, "size", None), check)
    try:
        with file:
            yield cast(BinaryIO, stream)
    except Exception as error:
        if stream.error is not None and error is not stream.error:
            raise stream.error from error
        if isinstance(error, DamagedError):
            check()
        raise
    if stream.error is not None:
        raise stream.error
    check()


def current_version(unit: Unit, options: Mapping[str, Any]) -> Unit:
    """The unit, its input pinned as it is now, not as it was planned. Images of a folder are not pinned."""
    if unit.kind == "folder":
        return unit
    with name_url_in_errors(unit.url, "read"):
        fs, path = connect(unit.url, options)
        size, etag = version_of(fs, path)
    return replace(unit, bytes=size, etag=etag)


def exists(url: str, options: Mapping[str, Any]) -> bool:
    """Whether there is a file or a directory."""
    with name_url_in_errors(url, "look for"):
        fs, path = connect(url, options)
        return bool(fs.exists(path))


def check_reachable(url: str, options: Mapping[str, Any]) -> None:
    """Raise StorageError if the storage of a URL does not answer. That there is no such file is an answer, too."""
    with name_url_in_errors(url, "reach"), contextlib.suppress(FileNotFoundError):
        fs, path = connect(url, options)
        fs.info(path)


def sibling_url(tar: str) -> str:
    """Where img2dataset puts the metadata of a tar's samples."""
    return tar[: -len(".tar")] + ".parquet"


@contextmanager
def fetch(ref: str, options: Mapping[str, Any], wanted: re.Pattern[str]) -> Iterator[str]:
    """A local path for what `ref` names: its own, or where it is a URL, a temporary copy of the file or directory.

    Of a directory only those files are copied whose names in it are `wanted`.
    """
    if "://" not in ref:
        yield ref
        return
    with tempfile.TemporaryDirectory(prefix="latentmill-") as local:
        with name_url_in_errors(ref, "read"):
            fs, root = connect(ref, options)
            root = root.rstrip("/")
            if fs.isfile(root):
                copy = f"{local}/{root.rpartition('/')[2]}"
                _copy(fs, root, fs.size(root), copy)
            else:
                copy = local
                for path, info in fs.find(root, detail=True).items():
                    below = path[len(root) + 1 :]
                    if wanted.fullmatch(below):
                        os.makedirs(parent(f"{local}/{below}"), exist_ok=True)
                        _copy(fs, path, info["size"], f"{local}/{below}")
        yield copy


def _copy(fs: Any, path: str, size: int | None, local: str) -> None:
    """Copy a file of this size to the local disk. Raises StorageError where fewer bytes come."""
    fs.get_file(path, local)
    if size is not None and (came := os.path.getsize(local)) != size:
        text = f"{full_url(fs, path)} ended at byte {came}, but has {size}: it was cut short on its way"
        raise StorageError(text, may_pass=True)


def etag_of(info: Mapping[str, Any]) -> str:
    """The version of a file's content, by what its storage says of it; empty if it says nothing.

    A store's ETag, the hub's blob id; of a local file `m` and its mtime in nanoseconds.
    """
    if "mtime_ns" in info:
        return f"m{info['mtime_ns']}"
    return str(info.get("ETag") or info.get("etag") or info.get("blob_id") or "").strip('"')


def version_of(fs: Any, path: str) -> tuple[int, str]:
    """Size and ETag of a file."""
    if is_local(fs):
        stat = os.stat(path)
        info: Mapping[str, Any] = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    else:
        info = fs.info(path)
    return int(info["size"] or 0), etag_of(info)


def read_file(url: str, options: Mapping[str, Any], limit: int, size: int | None = None) -> bytes:
    """At most `limit` + 1 bytes of a file: one too many tells that there are more.

    size: that it had when it was planned. Raises SourceError where it has another one.
    """
    with open_stream(url, options) as stream:
        if size is not None and stream.seek(0, 2) != size:
            raise SourceError(f"{url} has changed since it was planned (then {size} bytes)")
        stream.seek(0)
        return stream.read(limit + 1)


def read_file_if_there(url: str, options: Mapping[str, Any], limit: int, size: int | None = None) -> bytes | None:
    """The same; None where there is no such file. Raises Rejected for a local file that one may not read."""
    return none_if_missing(url, options, lambda: read_file(url, options, limit, size))


def none_if_missing(url: str, options: Mapping[str, Any], read: Callable[[], bytes]) -> bytes | None:
    """What `read` gives of a file; None where there is no such file. Raises Rejected for one that one may not read."""
    try:
        return read()
    except StorageError as error:
        cause = error.__cause__
        if isinstance(cause, FileNotFoundError):
            return None
        fs, path = connect(url, options)
        if is_local(fs) and isinstance(cause, OSError):
            if cause.errno in NOT_THERE:
                return None
            # where the folder is closed as well, it is not the file: a mount whose ticket has run out, say
            if isinstance(cause, PermissionError) and os.access(parent(path), os.R_OK | os.X_OK):
                raise Rejected("read", "unreadable") from error
        raise


def check_has_files(url: str, options: Mapping[str, Any]) -> None:
    """Raise SourceError where there is no such directory, or nothing in it: its disk is not mounted any more, say."""
    with name_url_in_errors(url, "list"):
        fs, path = connect(url, options)
        if is_local(fs):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(path) as entries:
                if next(entries, None) is not None:
                    return
        elif fs.exists(path):  # stores have no empty directories
            return
    raise SourceError(f"{url} has gone since it was planned, or is empty: is its disk or bucket there?")


def parent(path: str) -> str:
    return path.rsplit("/", 1)[0] if "/" in path else ""


@dataclass(frozen=True, slots=True)
class Folder:
    """A directory on any storage that is written to. Light: it can be sent to another process.

    exclusive: `supports_conditional_create` was true elsewhere; a local disk without that support here is an error.
    """

    url: str
    options: Mapping[str, Any] = field(default_factory=dict)
    exclusive: bool = False

    def _on(self, name: str) -> tuple[Any, str]:
        fs, root = connect(self.url, self.options)
        return fs, f"{root.rstrip('/')}/{name}" if name else root

    def at(self, name: str) -> str:
        """The full URL or path of a name."""
        return f"{self.url.rstrip('/')}/{name}" if name else self.url

    def names(self, below: str = "") -> list[str]:
        """The files directly in the sub-folder `below`, sorted, hidden ones left out; none where it does not exist."""
        return self.listed(below)[0]

    def listed(self, below: str) -> tuple[list[str], list[str]]:
        """The same, and what else is in that sub-folder: folders, hidden files, links that lead nowhere."""
        files, others = list[str](), list[str]()
        for name, is_file in sorted(self._entries(below)):
            (files if is_file and not name.startswith(".") else others).append(name)
        return files, others

    def _entries(self, below: str) -> list[tuple[str, bool]]:
        fs, path = self._on(below)
        with name_url_in_errors(self.at(below), "list"):
            try:
                entries = fs.ls(path, detail=True, refresh=True)
            except FileNotFoundError:
                return []
        return [
            (PurePosixPath(e["name"]).name, e["type"] == "file" or bool(e.get("islink") and fs.isfile(e["name"])))
            for e in entries
            if e["name"].rstrip("/") != path.rstrip("/")  # stores list an empty object that stands for the folder
        ]

    def is_empty(self) -> bool:
        """Whether nothing at all is there."""
        fs, path = self._on("")
        with name_url_in_errors(self.url, "list"):
            try:
                return not fs.ls(path, detail=False, refresh=True)
            except FileNotFoundError:
                return True

    def read(self, name: str) -> bytes:
        """All of a file. Raises StorageError, also where there is none."""
        fs, path = self._on(name)
        with name_url_in_errors(self.at(name), "read"):
            return _whole(fs, path, self.at(name))

    def read_each(self, folder: str, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """These files of a folder, each name with its content; many are read at once, as stores are slow to answer."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            yield from in_order(pool, lambda name: (name, self.read(f"{folder}/{name}")), names, window=4 * AT_ONCE)

    def read_if_there(self, name: str) -> bytes | None:
        """All of a file; None where there is none."""
        fs, path = self._on(name)
        with name_url_in_errors(self.at(name), "read"):
            try:
                return _whole(fs, path, self.at(name))
            except FileNotFoundError:
                return None

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """A file to read here and there (a Parquet footer, say)."""
        with open_stream(self.at(name), self.options, seeking=True) as stream:
            yield stream

    def create(self, name: str, data: bytes) -> bool:
        """Publish a file whole, unless the name is taken: then False, and what stands there is untouched."""
        fs, path = self._on(name)
        with name_url_in_errors(self.at(name), "write"):
            if isinstance(fs, LocalFileSystem):
                return local_disk.create(path, data, self._on("_tmp")[1], self.exclusive)
            if isinstance(fs, MemoryFileSystem):
                with _memory_lock, contextlib.suppress(FileExistsError):
                    fs.pipe_file(path, data, mode="create")
                    return True
                return False
            return _put_once(fs, path, data)

    def supports_conditional_create(self) -> bool:
        """Whether this storage lets one writer win. One that may is tried, with a file that is removed again."""
        fs, _ = self._on("")
        if isinstance(fs, MemoryFileSystem):
            return True
        if not is_local(fs) and not protocols_of(fs) & CONDITIONAL:
            return False
        tried = replace(self, exclusive=True)
        for _ in range(PROBES):
            name = f"_tmp/probe-{uuid.uuid4().hex}"
            try:
                first, second = tried.create(name, b"probe"), tried.create(name, b"probe")
            except local_disk.NotExclusive:
                return False
            with name_url_in_errors(self.at(name), "remove"):
                fs.rm_file(self._on(name)[1])
            if first:  # else an answer was lost, and what was asked for again is refused
                return not second
        return False

    def replace(self, name: str, data: bytes) -> None:
        """Write a file whole, over what may stand there."""
        fs, path = self._on(name)
        with name_url_in_errors(self.at(name), "write"):
            if isinstance(fs, LocalFileSystem):
                local_disk.replace(path, data)
            else:
                fs.pipe_file(path, data)


def _whole(fs: Any, path: str, url: str) -> bytes:
    """All of a file. The libraries of stores compare with the length that the answer names; on disks we do."""
    if not is_local(fs):
        return cast(bytes, fs.cat_file(path, **_in_one_request(fs)))
    with fs.open(path, "rb") as file:
        return Stream(file, url, file.size).read()


def _put_once(fs: Any, path: str, data: bytes) -> bool:
    """One conditional request with the whole body; False where the name is taken. Stores refuse in different words."""
    for attempt in range(6):
        try:
            fs.pipe_file(path, data, mode="create", chunksize=ONE_REQUEST, **_checksum(fs, data))
            return True
        except FileExistsError:
            return False
        except OSError as error:
            status = http_status(error)
            if status == 412:
                return False
            if status != 409 or attempt == 5:  # another writer's request is under way: it may yet fail
                raise
            time.sleep(0.1 * 2**attempt)
    return False


def http_status(error: BaseException | None) -> int | None:
    """What a store answered, if that is where an error comes from."""
    while error is not None:
        if response := getattr(error, "response", None):
            return cast(int | None, response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
        error = error.__cause__
    return None


def _checksum(fs: Any, data: bytes) -> dict[str, str]:
    """What lets S3 refuse a body that was damaged on its way. (GCS's library does so by itself.)"""
    if "s3" not in protocols_of(fs):
        return {}
    return {"ContentMD5": base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()}


def _in_one_request(fs: Any) -> dict[str, int]:
    """What keeps s3fs from asking for a file's size before it asks for the file."""
    return {"max_concurrency": 1} if "s3" in protocols_of(fs) else {}
