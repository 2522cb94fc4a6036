"""Text from files, fit to be printed: on one line, without control characters, short."""

from __future__ import annotations

from typing import Any


def printable(text: str) -> str:
    """The text with everything escaped that is not printable: no line of it ends another."""
    parts = []
    for character in text:
        if not character.isprintable():
            character = character.encode("unicode_escape").decode()
        parts.append(character)
    return "".join(parts)


def shown(value: Any, limit: int = 60) -> str:
    """A value out of a file, escaped and cut; of objects and lists of them only their kind."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, bool):
        value = int(value)
    if isinstance(value, list):
        if any(isinstance(part, (list, dict)) for part in value):
            return "a nested list"
        value = ",".join(str(part) for part in value[:limit])
    text = printable(str(value)[: limit + 1])
    return text if len(text) <= limit else f"{text[:limit]}..."
