"""A hook of mkdocs.yml: links that leave docs/ become plain text on the site, as their targets are not part of it."""

import re
from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    return re.sub(r"(?<!!)\[([^\]]+)\]\(\.\./[^)]*\)", r"\1", markdown)
