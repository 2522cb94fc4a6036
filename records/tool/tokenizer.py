"""The tokenizer that an artifact was made with, found by its hash."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from train_gpt import SCRIPT, sha256


def manifests() -> Iterator[Path]:
    """The data folders' manifests: of the working folder and those above it, then the script's."""
    here = Path.cwd()
    for folder in dict.fromkeys((here, *here.parents, SCRIPT.parent)):
        for place in (folder, folder / "data"):
            if (place / "manifest.json").is_file():
                yield place / "manifest.json"


def models_of(path: Path) -> list[Path]:
    """The tokenizer files that a manifest names; none if it cannot be understood."""
    found = []
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        for entry in json.loads(path.read_bytes())["tokenizers"]:
            if "model_path" in entry:
                found.append(path.parent / entry["model_path"])
    return found


def find_tokenizer(digest: str) -> str | None:
    """What TOKENIZER_PATH must be for the tokenizer of a SHA-256 (or byte260); None if not found.

    A manifest only says where to look: the file itself must have the hash.
    """
    if digest == "byte260":
        return digest
    for path in manifests():
        for model in models_of(path):
            if model.is_file() and sha256(model) == digest:
                return str(model)
    return None
