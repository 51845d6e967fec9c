"""The figures of `bench.scale` from before the commit log, measured by it on one machine with two shared cores.

Imports took 2.0 of the CPU seconds of each command, and 1.7 of those of `status`. `resume` and `status` of `buckets`
ran beside other programs.
"""

BEFORE_COMMIT = "01e13a1, 2026-11-27"
# By kind, scenario and units: CPU seconds of the driver, MB at the peak, requests.
BEFORE: dict[tuple[str, str, int], tuple[float, float, float]] = {
    ("shards", "fresh", 10_000): (8.1, 401, 9_232),
    ("shards", "resume", 10_000): (8.1, 378, 10_257),
    ("shards", "again", 10_000): (7.4, 378, 10_235),
    ("shards", "status", 10_000): (5.9, 359, 10_029),
    ("shards", "fresh", 100_000): (65.4, 616, 90_973),
    ("shards", "resume", 100_000): (56.9, 669, 101_240),
    ("shards", "again", 100_000): (48.9, 654, 101_139),
    ("shards", "status", 100_000): (41.5, 568, 100_209),
    ("buckets", "fresh", 10_000): (19.3, 405, 9_247),
    ("buckets", "resume", 10_000): (22.2, 382, 10_252),
    ("buckets", "again", 10_000): (17.7, 381, 10_244),
    ("buckets", "status", 10_000): (13.6, 361, 10_029),
}
# By the number of workers that take 30 s a task: the share of a core.
BEFORE_SHARES: dict[int, float] = {100: 0.003, 300: 0.010, 1000: 0.063}
