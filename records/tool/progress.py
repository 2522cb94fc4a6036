"""How far a long job is, on stderr."""

from __future__ import annotations

import sys
import time
from typing import Any

EVERY_SECONDS = 10.0  # a line, where it is no terminal


class Progress:
    """One rewritten line on a terminal; elsewhere a line every ten seconds."""

    def __init__(self, label: str, total: int, unit: str = "tokens"):
        self.label = label
        self.total = total
        self.unit = unit  # what is counted
        self.start = time.perf_counter()
        self.last = self.start
        self.on_terminal = sys.stderr.isatty()

    def __enter__(self) -> Progress:
        return self

    def show(self, done: int) -> None:
        """So many are done."""
        now = time.perf_counter()
        if now - self.last < (0.2 if self.on_terminal else EVERY_SECONDS):
            return
        self.last = now
        seconds = (now - self.start) / done * (self.total - done)
        line = f"{self.label}: {done} of {self.total} {self.unit}, about {seconds:.0f} s left"
        if self.on_terminal:
            print(f"\r{line}\033[K", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def __exit__(self, *failure: Any) -> None:
        """Takes the rewritten line away."""
        if self.on_terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
