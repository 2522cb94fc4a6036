"""Bars with an estimate of the end; work that ends within a second shows none."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm


def progress_bar(
    label: str, total: int, unit: str = "B", items: Iterable[Any] | None = None
) -> tqdm:
    """A bar on stderr that ends at `total` units; over items, if given, it counts them itself."""
    shown = dict(unit_scale=True, mininterval=1, delay=1)
    return tqdm(items, desc=label, total=total, unit=unit, **shown)


def hashed(path: Path, bar: tqdm) -> str:
    """A file's SHA-256 in hexadecimal; its bytes are booked on the bar."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()
