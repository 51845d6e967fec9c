"""The documentation and the help texts use the words of tests/vocabulary.toml, in sentences of readable length.

`python -m tests.test_prose [FILE ...]` prints the findings of all pages and help texts, or of the files named.
"""

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
VOCABULARY = tomllib.loads((ROOT / "tests/vocabulary.toml").read_text(encoding="utf-8"))
LONGEST_SENTENCE: int = VOCABULARY["longest_sentence"]
# docs/command-line.md holds the help texts: tests/test_docs.py compares the two.
PAGES = [*sorted(ROOT.glob("*.md")), ROOT / "examples/README.md", *sorted((ROOT / "docs").glob("*.md"))]
# These pages are rewritten on other branches. Remove a name when its page passes.
NOT_YET: set[str] = set()
# These pages quote the old words on purpose, in tables of names.
QUOTES_OLD_NAMES = {"docs/engineering-log.md"}


def plain_text(markdown: str) -> str:
    """Return the prose of a page, line by line: without code blocks, inline code, link targets and HTML comments."""
    text = re.sub(r"^(```+)[^\n]*\n.*?^\1$", blank, markdown, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"<!--.*?-->", blank, text, flags=re.DOTALL)
    text = re.sub(r"`[^`]*`", lambda match: "CODE" + "\n" * match[0].count("\n"), text)
    return re.sub(r"\]\([^)]*\)", "]", text)


def help_text(markdown: str) -> str:
    """Return docs/command-line.md with its help texts as prose: they are in code blocks."""
    return re.sub(r"^```\w*$", "", markdown, flags=re.MULTILINE)


def blank(match: re.Match[str]) -> str:
    return "\n" * match[0].count("\n")


def wrong_words(text: str) -> Iterator[tuple[int, str]]:
    for pattern, instead in VOCABULARY["instead"].items():
        # A phrase may be broken over two lines. A word boundary would never match beside a colon.
        spaced = pattern.replace(" ", r"\s+")
        for match in re.finditer(rf"(?<![\w-])(?:{spaced})(?![\w-])", text, re.IGNORECASE | re.MULTILINE):
            found = " ".join(match[0].split())
            yield text.count("\n", 0, match.start()) + 1, f"'{found}': {instead}"


def long_sentences(text: str) -> Iterator[tuple[int, str]]:
    """Find long sentences. A blank line, a heading, a list item and a table cell end one."""
    number = 1
    for block in re.split(r"(\n\s*\n|\n(?=\s*(?:[-*+]|\d+\.)\s)|\n(?=\s*[|#])|\|)", text):
        line = number
        for sentence in re.split(r"(?<=[.!?])(?=[\s*)])|(?<=:)(?=\s*\n)", block):
            words = re.findall(r"\w[\w'.,%-]*", sentence)
            if len(words) > LONGEST_SENTENCE:
                yield line, f"a sentence of {len(words)} words: {' '.join(words[:8])} ..."
            line += sentence.count("\n")
        number += block.count("\n")


def findings(path: Path) -> list[str]:
    name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)
    page = path.read_text(encoding="utf-8")
    if name == "docs/command-line.md":
        return [f"{name}:{line}: {text}" for line, text in sorted(wrong_words(help_text(page)))]
    text = plain_text(page)
    if name in QUOTES_OLD_NAMES:
        text = re.sub(r"^\|.*$", "", text, flags=re.MULTILINE)
    return [f"{name}:{line}: {text}" for line, text in sorted([*wrong_words(text), *long_sentences(text)])]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_pages_and_help_texts_use_the_words_of_the_project(path: Path) -> None:
    if path.relative_to(ROOT).as_posix() in NOT_YET:
        pytest.skip("not rewritten yet")
    assert findings(path) == []


def test_the_check_finds_wrong_words_and_long_sentences() -> None:
    page = "\n".join(
        [
            "The picture is made",
            "anew; sides, unset: none.",
            "It uses that in place",
            "of this, else. Nothing else.",
            "```sh",
            "picture anew",
            "```",
            "`picture`, elsewhere, sickle.",
            "",
            "word " * LONGEST_SENTENCE + "word. Short.",
        ]
    )
    text = plain_text(page)
    assert [(line, found.split(": ")[0].strip("':")) for line, found in sorted(wrong_words(text))] == [
        (1, "picture"),
        (2, "anew"),
        (2, "unset"),
        (3, "in place of"),
        (4, "else"),
    ]
    assert [line for line, _ in long_sentences(text)] == [10]


if __name__ == "__main__":
    found = [line for path in [Path(name).resolve() for name in sys.argv[1:]] or PAGES for line in findings(path)]
    print("\n".join(found))
    sys.exit(bool(found))
