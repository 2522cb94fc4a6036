"""manifest.json: which datasets and tokenizers a data folder holds, under the names of the challenge's own exporter.

`datasets` and `tokenizers` are lists of entries with a `name`. Beyond the exporter's fields an entry may have `files`
(path below the data folder -> size in bytes and SHA-256), a tokenizer `sha256`, a dataset `made_from` (own exports) or
`published` (downloads: repository, commit). Entries of several sources stand side by side in one manifest.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from train_gpt import InputError, atomic_write, sha256  # noqa: F401 - one place for those who read manifests

Entry = dict[str, Any]


def read(root: Path) -> Entry:
    """The manifest of a data folder, empty if there is none; InputError if it cannot be understood."""
    path = root / "manifest.json"
    if not path.is_file():
        return {"version": "10B", "tokenizers": [], "datasets": []}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    return checked(found, str(path))


def checked(manifest: Any, name: str) -> Entry:
    """The manifest itself, if it has the two lists of named entries; else InputError with its name."""
    lists = [manifest.get(kind) if isinstance(manifest, dict) else None for kind in ("tokenizers", "datasets")]
    if not all(isinstance(entries, list) and all(isinstance(e, dict) and "name" in e for e in entries)
               for entries in lists):
        raise InputError(f"{name}: expected an object with the lists tokenizers and datasets of named entries")
    return manifest


def entry(manifest: Entry, kind: str, name: str | None) -> Entry | None:
    """The entry of that name among `datasets` or `tokenizers`, or None."""
    return next((found for found in manifest[kind] if found["name"] == name), None)


def add(root: Path, **entries: Entry) -> None:
    """Puts entries (datasets=..., tokenizers=...) in the manifest in place of older ones of the same name."""
    with locked(root, "manifest"):
        manifest = read(root)
        for kind, new in entries.items():
            manifest[kind] = [old for old in manifest[kind] if old["name"] != new["name"]] + [new]
        atomic_write(root / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())


@contextlib.contextmanager
def locked(root: Path, name: str) -> Iterator[None]:
    """Only one process at a time is inside for a name; the others say that they wait. A dead process frees its lock."""
    lock = FileLock(root / "datasets" / f".{name}.lock")
    (root / "datasets").mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(timeout=1)
    except Timeout:
        print(f"another process works on {name}; waiting for it", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def cut(root: Path, files: dict[str, Entry]) -> list[str]:
    """Those of the recorded files that are missing or have another size."""
    return [path for path, known in files.items()
            if not (root / path).is_file() or (root / path).stat().st_size != known["size"]]


def give_name(path: Path, name: Path) -> None:
    """Renames a file; onto another disk (a linked tokenizers folder, say) by a copy that is renamed there."""
    name.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.replace(path, name)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        draft = name.with_name(f".{name.name}.tmp")
        shutil.copyfile(path, draft)
        os.replace(draft, name)
