"""Text from files and servers, fit to be printed: on one line, no control characters, short."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from typing import Any

from train_gpt import printable

LONGEST_LINE = 2000  # characters of a line that is printed


def shown(value: Any, limit: int = 60) -> str:
    """A value from a file, escaped and cut; of objects and lists only their kind."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    return printable(value, limit)


def names(found: Iterable[Any], most: int = 20) -> str:
    """Some names from a file, separated by commas, and how many there are more."""
    told = [shown(name) for name in found]
    more = f" and {len(told) - most} more" if len(told) > most else ""
    return ", ".join(told[:most]) + more


def paragraph(text: str) -> str:
    """A message of several lines; those after the first are indented, so that none looks like it.

    What is not printable is escaped.
    """
    lines = [printable(line, LONGEST_LINE) for line in text.split("\n")]
    return "\n  ".join(lines)


def shell_word(value: Any) -> str:
    """A value as a shell reads it, on one line."""
    text = str(value)
    if text.isprintable():
        return shlex.quote(text)
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    escaped = printable(escaped, len(escaped))
    return f"$'{escaped}'"
