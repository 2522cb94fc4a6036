"""Bars with an estimate of the end; work that ends within a second shows none."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm


def progress_bar(
    label: str, total: int, unit: str = "B", items: Iterable[Any] | None = None
) -> tqdm:
    """A bar on stderr that ends at `total` units; over items, if given, it counts them itself."""
    shown = dict(unit_scale=True, mininterval=1, delay=1)
    return tqdm(items, desc=label, total=total, unit=unit, **shown)


def blocks_of(path: Path, tick: Callable[[int], Any]) -> Iterator[bytes]:
    """A file's bytes in blocks; tick(bytes) after each."""
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            yield block
            tick(len(block))


def hashed(path: Path, bar: tqdm) -> str:
    """A file's SHA-256 in hexadecimal; its bytes are booked on the bar."""
    digest = hashlib.sha256()
    for block in blocks_of(path, bar.update):
        digest.update(block)
    return digest.hexdigest()
