"""s3fs on the store of `bench.scale`: all of s3fs but its requests, which are counted here instead of sent.

So each call of the product costs the requests that this version of s3fs makes of it. What a request costs in botocore
and aiohttp (signatures, HTTP, XML) is left out.
"""

import asyncio
import datetime
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import fsspec
from s3fs import S3FileSystem

from bench.scale_store import CACHES, ObjectStore

KINDS = {
    "list_objects_v2": "LIST",
    "head_object": "HEAD",
    "head_bucket": "HEAD",
    "get_object": "GET",
    "put_object": "PUT",
    "delete_object": "DELETE",
}
# Dollars a request: S3 Standard in us-east-1. A refused create is a PUT, and a missing object a HEAD or a GET.
PRICES = {"PUT": 0.005 / 1000, "LIST": 0.005 / 1000, "GET": 0.0004 / 1000, "HEAD": 0.0004 / 1000, "DELETE": 0.0}
ONE = " (one name)"  # a LIST that only asks whether a folder has any object
MODIFIED = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


@dataclass(slots=True)
class Requests:
    """The requests of a process, by kind and place, such as `LIST _commits`. Only the thread of s3fs changes it.

    latency: seconds that each takes. page: names in an answer of LIST. cpu: CPU seconds of the store itself.
    busy: by kind and place, the seconds in which at least one request was under way.
    """

    store: ObjectStore
    latency: float = 0.0
    page: int = 1000
    counts: Counter[str] = field(default_factory=Counter)
    busy: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    cpu: float = 0.0
    _under_way: dict[str, tuple[int, float]] = field(default_factory=lambda: defaultdict(lambda: (0, 0.0)))

    async def answer(self, method: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer of a request as botocore gives it. Raises FileNotFoundError and FileExistsError."""
        name = f"{KINDS[method]} {name_place(arguments)}" + (ONE if arguments.get("MaxKeys") == 1 else "")
        number, since = self._under_way[name]
        self._under_way[name] = (number + 1, since if number else time.monotonic())
        if self.latency:
            await asyncio.sleep(self.latency)
        started = time.thread_time()
        try:
            answer: dict[str, Any] = getattr(self, f"_{method}")(arguments)
            return answer
        finally:
            self.counts[name] += 1
            self.cpu += time.thread_time() - started
            number, since = self._under_way[name]
            self._under_way[name] = (number - 1, since)
            if number == 1:
                self.busy[name] += time.monotonic() - since

    def _list_objects_v2(self, request: Mapping[str, Any]) -> dict[str, Any]:
        prefix, delimiter = request.get("Prefix", ""), request.get("Delimiter", "")
        after, limit = request.get("ContinuationToken", ""), min(self.page, request.get("MaxKeys", 1000))
        entries, folders, following = self.store.list_page(request["Bucket"], prefix, delimiter, after, limit)
        contents = [{"Key": key, "Size": size, "ETag": tag, "LastModified": MODIFIED} for key, size, tag in entries]
        return {
            "Contents": contents,
            "CommonPrefixes": [{"Prefix": folder} for folder in folders],
            "KeyCount": len(entries) + len(folders),
            "IsTruncated": bool(following),
            "NextContinuationToken": following,
        }

    def _head_bucket(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return {}

    def _head_object(self, request: Mapping[str, Any]) -> dict[str, Any]:
        entry = self.store.head(request["Bucket"], request["Key"])
        if entry is None:
            raise FileNotFoundError(f"{request['Bucket']}/{request['Key']}")
        return {"ContentLength": entry[1], "ETag": entry[2], "LastModified": MODIFIED}

    def _get_object(self, request: Mapping[str, Any]) -> dict[str, Any]:
        head = self._head_object(request)
        data = self.store.get(request["Bucket"], request["Key"])
        if wanted := request.get("Range", ""):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            data = data[int(first) : int(last) + 1 if last else None] if first else data[-int(last) :]
        return {**head, "ContentLength": len(data), "Body": Body(data)}

    def _put_object(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert request["Bucket"] == CACHES, f"{request['Bucket']} is read-only"
        body = request["Body"]  # bytes or a file, as botocore takes it
        data = body.read() if hasattr(body, "read") else bytes(body)
        if not self.store.put(request["Key"], data, is_new="IfNoneMatch" in request):
            raise FileExistsError(f"{request['Bucket']}/{request['Key']}")
        return {}

    def _delete_object(self, request: Mapping[str, Any]) -> dict[str, Any]:
        self.store.delete(request["Key"])
        return {}


@dataclass(slots=True)
class Body:
    """The body of an answer."""

    data: bytes

    async def read(self, size: int = -1) -> bytes:
        taken = self.data if size < 0 else self.data[:size]
        self.data = self.data[len(taken) :]
        return taken

    def close(self) -> None:
        pass


def name_place(arguments: Mapping[str, Any]) -> str:
    """Return which part of the data a request is about: `source`, `cache`, or a folder of a cache."""
    if arguments.get("Bucket") != CACHES:
        return "source"
    steps = str(arguments.get("Key") or arguments.get("Prefix", "")).split("/")
    return steps[1] if len(steps) > 2 else "cache"


def price(counts: Mapping[str, int]) -> float:
    """Return the dollars that these requests cost."""
    return sum(number * PRICES[name.partition(" ")[0]] for name, number in counts.items())


def install(requests: Requests) -> None:
    """Let `s3://` URLs of this process go to a store, until `uninstall`."""

    class CountedS3(S3FileSystem):  # type: ignore[misc]
        async def _call_s3(self, method: str, *defaults: Mapping[str, Any], **arguments: Any) -> dict[str, Any]:
            merged = {name: value for each in defaults for name, value in each.items()}
            return await requests.answer(method, {**merged, **arguments})

    fsspec.register_implementation("s3", CountedS3, clobber=True)


def uninstall() -> None:
    """Let `s3://` URLs go to S3 again."""
    fsspec.register_implementation("s3", S3FileSystem, clobber=True)
