"""Text from files and servers, fit to be printed: on one line, no control characters, short."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from typing import Any

LONGEST_LINE = 2000  # characters of a line that is printed


def printable(text: str) -> str:
    """The text with everything escaped that is not printable: no line of it ends another."""
    parts = []
    for character in text:
        if not character.isprintable():
            character = character.encode("unicode_escape").decode()
        parts.append(character)
    return "".join(parts)


def shortened(text: str, limit: int) -> str:
    """At most so many characters of a text, and a sign that there are more."""
    return text if len(text) <= limit else f"{text[:limit]}..."


def shown(value: Any, limit: int = 60) -> str:
    """A value from a file, escaped and cut; of objects and lists only their kind."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    return printable(shortened(str(value), limit))


def names(found: Iterable[Any], most: int = 20) -> str:
    """Some names from a file, separated by commas, and how many there are more."""
    told = [shown(name) for name in found]
    more = f" and {len(told) - most} more" if len(told) > most else ""
    return ", ".join(told[:most]) + more


def paragraph(text: str) -> str:
    """A message of several lines; those after the first are indented, so that none looks like it.

    What is not printable is escaped.
    """
    lines = [printable(shortened(line, LONGEST_LINE)) for line in text.split("\n")]
    return "\n  ".join(lines)


def shell_word(value: Any) -> str:
    """A value as a shell reads it, on one line."""
    text = str(value)
    if text.isprintable():
        return shlex.quote(text)
    escaped = printable(text.replace("\\", "\\\\")).replace("'", "\\'")
    return f"$'{escaped}'"
