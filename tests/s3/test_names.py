"""Which data set is it, on a store: prefixes that moved, one URL named twice, and what a look costs."""

from collections import Counter

import pytest

from pipeline.cache import plan
from pipeline.errors import SourceError
from pipeline.sources.listing import Listing, list_sources
from pipeline.storage.folder import Folder
from tests.proxy import Proxy


def listed(*sources: str) -> Listing:
    return list_sources(sources, {}, "nowhere")


def test_a_prefix_that_moved_goes_on_and_another_is_refused(bucket: str) -> None:
    for name, content in (("a/shards/0.tar", b"1"), ("b/shards/0.tar", b"1"), ("c/shards/0.tar", b"2")):
        Folder(bucket).replace(name, content)
    cache = Folder(f"{bucket}/cache")
    first = listed(f"{bucket}/a/shards")
    plan.extend_plan(cache, first.shards, first.sources)
    moved = listed(f"{bucket}/b/shards")
    (unit,), (note,) = plan.extend_plan(cache, moved.shards, moved.sources)
    assert (unit.url, "has moved from" in note) == (f"{bucket}/b/shards/0.tar", True)
    other = listed(f"{bucket}/c/shards")
    with pytest.raises(SourceError, match=f"give it a name: shards2={bucket}/c/shards"):
        plan.extend_plan(cache, other.shards, other.sources)


def test_one_url_named_twice_is_one_source(bucket: str) -> None:
    Folder(bucket).replace("x/0.tar", b"1")
    found = listed(
        f"{bucket}/x", f"{bucket}/x/", f"{bucket}/x/0.tar", f"{bucket}/x/*", bucket.replace("s3:", "s3a:") + "/x"
    )
    assert [shard.path for shard in found.shards] == ["x/0.tar"]
    cache = Folder(f"{bucket}/cache")
    twice = listed(f"{bucket}/x", f"y={bucket}/x/0.tar")
    units, _ = plan.extend_plan(cache, twice.shards, twice.sources)
    assert [unit.path for unit in units] == ["x/0.tar"]


def test_a_look_at_a_source_costs_no_request_for_each_file(bucket: str, proxy: Proxy) -> None:
    for number in range(40):
        Folder(bucket).replace(f"s/data/{number}-0123456789abcdef-00000.tar", b"1")
        Folder(bucket).replace(f"s/{number}.tar", b"%d" % number)
    cache = Folder(f"{bucket}/cache")
    first = listed(f"{bucket}/s")
    plan.extend_plan(cache, first.shards, first.sources)
    before = len(proxy.seen)
    again = listed(f"t={bucket}/s")
    with pytest.raises(SourceError, match="--new-source"):
        plan.extend_plan(cache, again.shards, again.sources)
    assert len(proxy.seen) - before < 20, Counter(request.method for request in proxy.seen[before:])
