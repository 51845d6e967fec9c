"""Errors of libraries on one line, to be part of a message of our own."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message. It is empty if there is no message."""
    return (str(error).strip().splitlines() or [""])[0]


def describe_error(error: BaseException) -> str:
    """Return the type of an error, and the first line of its message if there is one."""
    line = first_line(error)
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
