"""manifest.json: which datasets and tokenizers a data folder holds.

Under the names of the challenge's own exporter.

`datasets` and `tokenizers` are lists of entries with a `name`. Beyond the exporter's fields an
entry may have `files` (path below the data folder -> size in bytes and SHA-256), a tokenizer
`sha256`, a dataset `made_from` (own exports) or `published` (downloads: repository, commit).
Entries of several sources stand side by side in one manifest.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from shown import names, shown

from train_gpt import InputError, atomic_write, check, input_error_from, shard_name

Entry = dict[str, Any]
DEEPEST = 50  # objects and lists inside each other
# What is read from entries, if it is there, and its type in JSON.
FIELDS = {
    "tokenizers": {
        "name": str,
        "kind": str,
        "vocab_size": int,
        "bos_id": int,
        "model_path": str,
        "sha256": str,
        "case_transform": str,
    },
    "datasets": {
        "name": str,
        "tokenizer_name": str,
        "vocab_size": int,
        "bos_id": int,
        "stats": dict,
        "files": dict,
        "charged_bytes": dict,
        "text_bytes": dict,
        "made_from": dict,
        "published": dict,
    },
}


def read(root: Path) -> Entry:
    """A data folder's manifest, empty if there is none; InputError if it cannot be understood."""
    path = root / "manifest.json"
    if not path.is_file():
        return {"version": "10B", "tokenizers": [], "datasets": []}
    return parsed(path.read_bytes(), str(path))


def parsed(text: bytes, name: str) -> Entry:
    """A manifest from its text.

    InputError with its name unless it has the two lists of named entries.
    """
    with input_error_from(f"{name}: not JSON", ValueError, RecursionError):
        manifest = json.loads(text)
    check(not deeper(manifest, DEEPEST), f"{name}: nested more than {DEEPEST} deep")
    expected = f"{name}: expected an object with the lists tokenizers and datasets of named entries"
    check(isinstance(manifest, dict), expected)
    for kind in FIELDS:
        entries = manifest.get(kind)
        check(isinstance(entries, list), expected)
        for found in entries:
            check(isinstance(found, dict) and "name" in found, expected)
    for kind in FIELDS:
        for found in manifest[kind]:
            check_types(found, kind, name)
    return manifest


def deeper(value: Any, limit: int) -> bool:
    """Whether objects and lists of a JSON value are nested deeper than that."""
    level = [value]
    for _ in range(limit + 1):
        inner = []
        for part in level:
            if isinstance(part, dict):
                inner += part.values()
            elif isinstance(part, list):
                inner += part
        level = inner
    return bool(level)


def check_types(found: Entry, kind: str, name: str) -> None:
    """InputError unless the fields of an entry that are read have their types."""
    for field, wanted in FIELDS[kind].items():
        value = found.get(field)
        check(
            field not in found or isinstance(value, wanted),
            f"{name}: {field} of {shown(found['name'])} in {kind} is {shown(value)}, "
            f"expected {wanted.__name__}",
        )


def entry(manifest: Entry, kind: str, name: str | None) -> Entry | None:
    """The entry of that name among `datasets` or `tokenizers`, or None."""
    for found in manifest[kind]:
        if found["name"] == name:
            return found
    return None


def in_bytes(tokenizer: Entry) -> bool:
    """Whether a tokenizer's entry stands for byte260, by train_gpt.py's own rule."""
    return tokenizer.get("kind") == "byte"


def model_of(root: Path, tokenizer: Entry) -> str:
    """What TOKENIZER_PATH must be for a tokenizer's entry; InputError if it names no model."""
    if in_bytes(tokenizer):
        return "byte260"
    check(
        tokenizer.get("model_path"),
        f"{root / 'manifest.json'}: tokenizer {shown(tokenizer.get('name'))} has no model_path, "
        "expected one, or kind byte",
    )
    return str(root / tokenizer["model_path"])


def document_start(dataset: Entry, tokenizer: Entry) -> int:
    """The token of a document start: what the first entry says, else the second, else 1."""
    return dataset.get("bos_id", tokenizer.get("bos_id", 1))


def settings(root: Path, dataset: Entry, tokenizer: Entry) -> dict[str, Any]:
    """What train_gpt.py needs to use a dataset.

    KeyError or, without a model, InputError if its entries lack something.
    """
    needed = {
        "DATA_PATH": root / "datasets" / dataset["name"],
        "TOKENIZER_PATH": model_of(root, tokenizer),
        "VOCAB_SIZE": tokenizer["vocab_size"],
    }
    bos = document_start(dataset, tokenizer)
    if bos != 1:
        needed["BOS_ID"] = bos
    return needed


def refuse_other_tokenizer(root: Path, dataset: Entry, tokenizer: Entry) -> None:
    """InputError if other datasets were made with another tokenizer of that name.

    They would get this one.
    """
    manifest = read(root)
    name = tokenizer["name"]
    users = []
    for other in manifest["datasets"]:
        if other.get("tokenizer_name") == name and other["name"] != dataset["name"]:
            users.append(other["name"])
    old = entry(manifest, "tokenizers", name) or {}
    differ = []
    for key in ("kind", "vocab_size", "model_path", "sha256", "case_transform"):
        if key in old and key in tokenizer and old[key] != tokenizer[key]:
            differ.append(key)
    if users and differ:
        raise InputError(
            f"{root / 'manifest.json'}: {names(users)} was made with another tokenizer named "
            f"{shown(name)} (another {' and '.join(differ)}); give the new one another name"
        )


@contextlib.contextmanager
def adding(root: Path, dataset: Entry, tokenizer: Entry) -> Iterator[None]:
    """Puts the entries in the manifest when the block has ended well.

    They take the place of older ones of the same names. InputError, before the block is entered,
    if the tokenizer's name stands for another tokenizer.
    """
    with locked(root, "manifest file"):  # no dataset has a space in its name
        refuse_other_tokenizer(root, dataset, tokenizer)
        yield
        manifest = read(root)
        for kind, new in (("datasets", dataset), ("tokenizers", tokenizer)):
            others = [old for old in manifest[kind] if old["name"] != new["name"]]
            manifest[kind] = [*others, new]
        text = json.dumps(manifest, indent=1) + "\n"
        place = (root / "manifest.json").resolve()
        for draft in place.parent.glob(".manifest.json.*.tmp"):  # of killed processes
            draft.unlink(missing_ok=True)
        atomic_write(place, text.encode())


@contextlib.contextmanager
def locked(root: Path, name: str) -> Iterator[None]:
    """Only one process at a time is inside for a name; the others say that they wait.

    A dead process frees its lock.
    """
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
    found = []
    for path, known in files.items():
        place = root / path
        if not place.is_file() or place.stat().st_size != known["size"]:
            found.append(path)
    return found


def shard_number(path: str | Path, split: str) -> int | None:
    """The number in the file name of a split's shard; None if it is no such name."""
    file = Path(path)
    digits = file.stem[-6:]
    if digits.isdecimal() and file.name == shard_name(split, int(digits)):
        return int(digits)
    return None


def give_name(path: Path, name: Path) -> None:
    """Renames a file; onto another disk (a linked tokenizers folder, say) by a renamed copy."""
    name.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.replace(path, name)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        draft = name.with_name(f".{name.name}.tmp")
        shutil.copyfile(path, draft)
        os.replace(draft, name)
