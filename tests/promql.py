"""What an expression of PromQL selects. It needs no parser: a few kinds of tokens tell metrics from the other names."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|\[[^\]]*\]|\$?[A-Za-z_][A-Za-z0-9_:]*|=~|!~|!=|[=<>]=|[-+*/%^()={},<>]|[\d.]+')
AGGREGATIONS = {"sum", "avg", "min", "max", "count", "topk", "quantile"}
GROUPINGS = {"by", "without", "on", "ignoring", "group_left", "group_right"}
OPERATORS = {"and", "or", "unless", "bool", "offset"}


@dataclass(frozen=True, slots=True)
class Selector:
    """A metric in an expression. matchers: label, operator and value of each."""

    metric: str
    matchers: tuple[tuple[str, str, str], ...] = ()

    @property
    def wanted(self) -> dict[str, list[str]]:
        """The values that its matchers ask for, by label. Those with a variable of Grafana ask for none."""
        return {
            label: [] if "$" in value else value.split("|")
            for label, operator, value in self.matchers
            if operator in ("=", "=~")
        }


@dataclass(frozen=True, slots=True)
class Expression:
    """The metrics of an expression, and the labels by which it groups them."""

    selectors: tuple[Selector, ...]
    labels: frozenset[str]


def parse(text: str) -> Expression:
    """Return what an expression selects. Raises ValueError for characters that are not part of any token."""
    if rest := TOKEN.sub("", text).strip():
        raise ValueError(f"unexpected {rest!r} in {text}")
    tokens = TOKEN.findall(text)
    if tokens.count("(") != tokens.count(")"):
        raise ValueError(f"unbalanced parentheses in {text}")
    selectors, labels = list[Selector](), set[str]()
    position = 0
    while position < len(tokens):
        token, following = tokens[position], tokens[position + 1] if position + 1 < len(tokens) else ""
        if token in GROUPINGS:
            end = tokens.index(")", position)
            labels.update(name for name in tokens[position + 2 : end] if name != ",")
            position = end
        elif re.match("[A-Za-z_]", token) and token not in AGGREGATIONS | OPERATORS and following != "(":
            end = tokens.index("}", position) if following == "{" else position
            selectors.append(Selector(token, tuple(_parse_matchers(tokens[position + 2 : end]))))
            position = end
        position += 1
    return Expression(tuple(selectors), frozenset(labels))


def _parse_matchers(tokens: list[str]) -> Iterator[tuple[str, str, str]]:
    for start in range(0, len(tokens), 4):  # label, operator, value, comma
        label, operator, value = tokens[start : start + 3]
        yield label, operator, value.strip('"')
