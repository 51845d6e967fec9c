"""Prints a constraints file with the lower bound of each dependency in pyproject.toml. `make test-lowest` installs it.

python -m tests.lowest_versions > constraints.txt
"""

import re
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def list_lowest_versions(pyproject: Path = PYPROJECT) -> list[str]:
    """Return a line `name==version` for each `name>=version` of the dependencies and of all extras, sorted."""
    project = tomllib.loads(pyproject.read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    bounds = [
        re.fullmatch(r"([\w-]+)(?:\[.*\])?>=([\d.]+)(?:;.*)?", requirement) for group in groups for requirement in group
    ]
    return sorted({f"{bound[1]}=={bound[2]}" for bound in bounds if bound})


if __name__ == "__main__":
    print(*list_lowest_versions(), sep="\n")
