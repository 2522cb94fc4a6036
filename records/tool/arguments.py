"""Command lines, with this project's exit code for bad input."""

from __future__ import annotations

import argparse

from train_gpt import InputError


class Parser(argparse.ArgumentParser):
    """argparse that raises InputError, which ends with 64 as other bad input does, not with 2."""

    def error(self, message: str) -> None:
        raise InputError(f"{self.format_usage()}{self.prog}: {message}")


def positive(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 1")
    return int(text)
