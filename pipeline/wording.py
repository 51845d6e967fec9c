"""Numbers, nouns and options in messages."""

from collections.abc import Mapping


def count_noun(number: int, noun: str, plural: str = "") -> str:
    """Return a number and its noun: `1 image`, `1,024 images`. plural: default: the noun with an s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def to_flag(name: str) -> str:
    """Return the flag of an option: `--key-column` for `key_column`, and `--from` for `from_` (Python reserves it)."""
    return f"--{name.rstrip('_').replace('_', '-')}"


def format_counts(counts: Mapping[str, int]) -> str:
    """Return a total, and the count of each kind: `3: 2 corrupt, 1 not_an_image`."""
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in counts.items())
    return f"{sum(counts.values()):,}" + (f": {kinds}" if kinds else "")
