"""The names of sources on a store: moved prefixes, one URL given twice, and the number of requests."""

from collections import Counter

import pytest

from pipeline.cache import plan
from pipeline.errors import SourceError
from pipeline.sources.listing import Listing, list_sources
from pipeline.storage.folder import Folder
from tests.proxy import Proxy


def list_all(*sources: str) -> Listing:
    return list_sources(sources, {}, "nowhere")


def test_a_moved_prefix_is_resumed_and_another_one_is_refused(bucket: str) -> None:
    for name, content in (("a/shards/0.tar", b"1"), ("b/shards/0.tar", b"1"), ("c/shards/0.tar", b"2")):
        Folder(bucket).replace(name, content)
    cache = Folder(f"{bucket}/cache")
    first = list_all(f"{bucket}/a/shards")
    plan.extend_plan(cache, first.files, first.sources)
    moved = list_all(f"{bucket}/b/shards")
    (unit,), (note,) = plan.extend_plan(cache, moved.files, moved.sources)
    assert (unit.url, "has moved from" in note) == (f"{bucket}/b/shards/0.tar", True)
    other = list_all(f"{bucket}/c/shards")
    with pytest.raises(SourceError, match=f"give it a name: shards2={bucket}/c/shards"):
        plan.extend_plan(cache, other.files, other.sources)


def test_a_url_given_twice_is_one_source(bucket: str) -> None:
    Folder(bucket).replace("x/0.tar", b"1")
    listing = list_all(
        f"{bucket}/x", f"{bucket}/x/", f"{bucket}/x/0.tar", f"{bucket}/x/*", bucket.replace("s3:", "s3a:") + "/x"
    )
    assert [shard.path for shard in listing.files] == ["x/0.tar"]
    cache = Folder(f"{bucket}/cache")
    twice = list_all(f"{bucket}/x", f"y={bucket}/x/0.tar")
    units, _ = plan.extend_plan(cache, twice.files, twice.sources)
    assert [unit.path for unit in units] == ["x/0.tar"]


@pytest.mark.slow
def test_listing_a_source_does_not_cost_a_request_per_file(bucket: str, proxy: Proxy) -> None:
    for number in range(40):
        Folder(bucket).replace(f"s/data/{number}-0123456789abcdef-00000.tar", b"1")
        Folder(bucket).replace(f"s/{number}.tar", b"%d" % number)
    cache = Folder(f"{bucket}/cache")
    first = list_all(f"{bucket}/s")
    plan.extend_plan(cache, first.files, first.sources)
    before = len(proxy.seen)
    renamed = list_all(f"t={bucket}/s")
    with pytest.raises(SourceError, match="--new-source"):
        plan.extend_plan(cache, renamed.files, renamed.sources)
    assert len(proxy.seen) - before < 20, Counter(request.method for request in proxy.seen[before:])


@pytest.mark.slow
def test_many_named_files_are_found_by_listing_their_folder(bucket: str, proxy: Proxy) -> None:
    for number in range(40):
        Folder(bucket).replace(f"s/{number:02d}.tar", b"%d" % number)
    Folder(bucket).replace("s/40.zip", b"40")
    for source in ("{00..39}.tar", "*.tar", "[0-3]?.tar"):
        before = len(proxy.seen)
        files = list_all(f"{bucket}/s/{source}").files
        assert [file.path for file in files] == [f"s/{number:02d}.tar" for number in range(40)]
        assert len(proxy.seen) - before < 10, Counter(request.method for request in proxy.seen[before:])
    with pytest.raises(SourceError, match=r"/s/40\.tar does not exist"):
        list_all(f"{bucket}/s/{{00..41}}.tar")
