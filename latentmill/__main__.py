"""The `latentmill` command."""

from latentmill.own_packages import find_own_packages


def command() -> None:
    """The entry point of the `latentmill` command."""
    find_own_packages()
    from jobs.cli import command

    command()


if __name__ == "__main__":
    command()
