"""The memory that a worker takes for its parts, measured in a process of its own."""

import sys

import pytest

from bench.scale_memory import Case, measure

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the size of a process is read from /proc"),
]


@pytest.mark.parametrize(
    "case",
    [
        Case(rows=512, channels=64),  # parts of 268 MB
        Case(rows=512),  # small parts
        Case(rows=1024, container="webdataset"),  # many images and small parts
        Case(rows=1024, parts=4),  # one part is published while the next is filled
    ],
)
def test_a_worker_stays_within_one_and_a_half_times_its_parts_or_a_constant_more(case: Case) -> None:
    use = measure(case)
    assert use.is_within_limit, use
