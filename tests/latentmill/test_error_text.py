"""Errors on one line."""

import pytest

from latentmill.error_text import describe_error, first_line


@pytest.mark.parametrize(
    ("message", "line", "described"),
    [
        ("no such column", "no such column", "ValueError: no such column"),
        ("a\nb", "a", "ValueError: a"),
        ("\n\na\n", "a", "ValueError: a"),
        ("", "", "ValueError"),
        ("\n", "", "ValueError"),
    ],
)
def test_an_error_is_described_on_one_line(message: str, line: str, described: str) -> None:
    error = ValueError(message)
    assert (first_line(error), describe_error(error)) == (line, described)
