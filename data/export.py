"""Documents to token shards.

Trains or takes a tokenizer, writes fineweb_{val,train}_*.bin and the manifest's entry.

The format is the challenge's (data/README.md of openai/parameter-golf): validation documents
first, a document start before each document, documents end to end in shards of 100 million tokens.
Two things it leaves to luck are certain here: a training document that is also a validation
document is left out, and the output is the same for any number of processes. Memory does not grow
with the corpus: a window of batches is in flight, and one hash a validation document.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import manifest
import numpy as np
import sentencepiece
from bars import hashed, progress_bar
from corpora import Corpus
from shown import shown
from tqdm import tqdm

from train_gpt import (
    CASE_MARKERS,
    CASE_TRANSFORMS,
    CHARGES,
    MARKER_BYTES,
    SHARD_HEADER_BYTES,
    ByteTable,
    Config,
    InputError,
    atomic_write,
    check,
    input_error_from,
    mark_case,
    sha256,
    shard_header,
    shard_name,
    tokenizer_hash,
)

SHARD_TOKENS = 100_000_000
BATCH_BYTES = 1 << 18  # text handed to a process at a time
MOST_CHARGED = (1 << 16) - 1  # bytes that a side file can say of a token
# The trainer's default: longer documents teach the official tokenizers nothing.
OFFICIAL_SENTENCE_BYTES = 4192
RESERVED = "\u2585"  # the trainer skips documents with its own mark for unknown pieces

# The official tokenizers' recipe (data/ of openai/parameter-golf), without its max_sentence_length,
# which callers choose.
RECIPE = dict(
    model_type="bpe",
    character_coverage=0.999,
    byte_fallback=True,
    split_digits=True,
    normalization_rule_name="nmt_nfkc",
    add_dummy_prefix=False,
    pad_id=0,
    bos_id=1,
    eos_id=2,
    unk_id=3,
    hard_vocab_limit=False,
)


# --------------------------------------------------------------------------------------------------
# Tokenizer
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenizerPlan:
    """Which tokenizer an export uses.

    A given model file, `byte260`, or (if `given` is empty) one to be trained.
    """

    given: str = ""
    vocab_size: int = 1024
    tokenizer_train_docs: int = 50_000  # the first so many training documents train it
    max_sentence_length: int = OFFICIAL_SENTENCE_BYTES
    transform: str = ""  # of capitals into markers, one of CASE_TRANSFORMS

    def identity(self) -> dict[str, Any]:
        """What of this determines the tokens, for the manifest."""
        told = {"case_transform": self.transform} if self.transform else {}
        if self.given:
            digest = tokenizer_hash(Config(tokenizer_path=self.given))
            return {**told, "tokenizer_sha256": digest}
        return {
            **told,
            "vocab_size": self.vocab_size,
            "tokenizer_train_docs": self.tokenizer_train_docs,
            "max_sentence_length": self.max_sentence_length,
        }

    def table(self) -> ByteTable:
        """The given tokenizer, or byte260; InputError if shards cannot be made with it."""
        if self.given == "byte260":
            check(not self.transform, f"--transform {self.transform}: byte260 has no case markers")
            table = ByteTable.bytes260()
        else:
            table = ByteTable.from_sentencepiece(self.given, self.transform)
        check(
            bool(table.markers) == bool(self.transform),
            f"{self.given}: a tokenizer of text with case markers; --transform says which "
            f"({' or '.join(CASE_TRANSFORMS)})",
        )
        size = table.vocab_size
        check(size <= 1 << 16, f"{self.given}: {size} tokens; a shard's uint16 holds 65536")
        no_start = f"{self.given}: has no document start (bos_id); shards need one"
        check(bos_of(table) >= 0, no_start)
        return table


def bos_of(table: ByteTable) -> int:
    """The token of a document start; negative if the tokenizer has none."""
    return table.processor.bos_id() if table.processor else 1


@dataclass
class Skipped:
    """What the trainer leaves out without an error, counted beside it."""

    limit: int  # bytes of the longest document that it takes
    documents: int = 0
    bytes: int = 0  # of all documents
    long: int = 0  # documents beyond the limit
    long_bytes: int = 0
    reserved: int = 0  # documents with the reserved character, of those within the limit

    def watch(self, texts: Iterable[str]) -> Iterator[str]:
        """The documents as the official script gives the trainer: NUL a space, ends stripped."""
        for text in texts:
            text = text.replace("\0", " ").strip()
            size = len(text.encode())
            self.documents += 1
            self.bytes += size
            if size > self.limit:
                self.long += 1
                self.long_bytes += size
            elif RESERVED in text:
                self.reserved += 1
            if text:
                yield text

    def told(self) -> list[str]:
        """Lines for the user: what trained the tokenizer, and a warning for each kind left out."""
        used = self.documents - self.long - self.reserved
        lines = [f"tokenizer: trained on {used} of {self.documents} documents"]
        if self.long:
            share = self.long_bytes / self.bytes
            lines.append(
                f"warning: {self.long} documents ({share:.0%} of the text) are longer than "
                f"--max-sentence-length {self.limit} bytes: the trainer skips them"
            )
        if self.reserved:
            lines.append(
                f"warning: the trainer skips {self.reserved} documents with the character U+2585"
            )
        return lines


def train_tokenizer(
    documents: Iterable[str],
    vocab_size: int,
    path: Path,
    max_sentence_length: int = OFFICIAL_SENTENCE_BYTES,
    transform: str = "",
) -> Skipped:
    """Writes a BPE model of the official recipe from these documents.

    transform: it learns from their text with case markers, which become pieces by themselves.
    Returns what the trainer left out. InputError if the text is too little for that vocabulary.
    """
    model = io.BytesIO()
    skipped = Skipped(max_sentence_length)
    recipe = dict(RECIPE)
    if transform:
        documents = (mark_case(text, transform) for text in documents)
        recipe["user_defined_symbols"] = list(CASE_MARKERS)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=skipped.watch(documents),
            model_writer=model,
            vocab_size=vocab_size,
            minloglevel=2,
            max_sentence_length=max_sentence_length,
            **recipe,
        )
    except RuntimeError as error:
        if "KeyboardInterrupt" in str(error):  # the trainer passes on no exception but its own
            raise KeyboardInterrupt from None
        if not skipped.documents:
            reason = "there is no training document"
        elif skipped.documents == skipped.long:
            reason = "every document is longer than --max-sentence-length"
        else:
            reason = error
        raise InputError(f"no tokenizer of {vocab_size} pieces from this text: {reason}") from None
    found = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    too_few = f"the text yields only {found} pieces; ask for --vocab-size {found} or give more text"
    check(found == vocab_size, too_few)
    atomic_write(path, model.getvalue())
    return skipped


# --------------------------------------------------------------------------------------------------
# Tokens
# --------------------------------------------------------------------------------------------------

_table: ByteTable | None = None


def _load_table(plan: TokenizerPlan) -> None:
    global _table  # noqa: PLW0603 - one tokenizer a worker process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _table = plan.table()


def _end_with_parent() -> None:
    """A killed parent closes no queue: its processes would wait for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def document_hash(tokens: np.ndarray) -> bytes:
    """What tells documents apart: a hash of their tokens without the document start.

    The tokens are hashed as uint16, little-endian.
    """
    return hashlib.blake2b(tokens.astype("<u2", copy=False).tobytes(), digest_size=16).digest()


@dataclass(frozen=True)
class Document:
    """An encoded document."""

    tokens: np.ndarray  # uint16, after a document start
    digest: bytes  # document_hash of the tokens
    bytes: int  # of its text
    charges: np.ndarray  # bytes that each token is charged; a document start none


# A case marker in UTF-8, which stands for no byte of the text: an escaped one does.
MARKER_IN_BYTES = re.compile(b"\xee\x80\x84...|\xee\x80[\x81-\x83]", re.DOTALL)


def bytes_before(marked: str) -> np.ndarray:
    """Bytes of the original text before each byte of a transformed text, and all -> [bytes + 1]."""
    encoded = marked.encode()
    is_text = np.ones(len(encoded), np.int64)
    for found in MARKER_IN_BYTES.finditer(encoded):
        is_text[found.start() : found.start() + MARKER_BYTES] = 0
    return np.concatenate(([0], np.cumsum(is_text)))


def encode_charged(table: ByteTable, text: str) -> tuple[list[int], np.ndarray]:
    """A text's tokens, and the bytes of it that each stands for -> [T] int64.

    By the places in the text that SentencePiece gives, where normalization may have changed its
    length; what it drops at the ends is charged to no token.
    """
    marked = table.marked_text(text)
    found = table.processor.encode(marked, return_type="offset_mapping", return_bytes=True)
    places = found["offsets"]  # adjoin: each piece begins where the one before it ends
    edges = [begin for begin, _ in places[:1]] + [end for _, end in places]
    return found["ids"], np.diff(bytes_before(marked)[edges])


def charged_document(table: ByteTable, text: str, exactly: bool) -> tuple[np.ndarray, np.ndarray]:
    """A document's tokens, its start before them, and the bytes that each is charged.

    exactly: with case markers by their places in the text, as a side file has it; a token that
    stands for more text than it can say (white space without end) is charged what it can.
    """
    if exactly and table.markers:
        ids, charges = encode_charged(table, text)
        tokens = np.array([bos_of(table), *ids], dtype=np.uint16)
        charges = np.minimum(charges, MOST_CHARGED)
    else:
        tokens = np.array([bos_of(table), *table.encode(text)], dtype=np.uint16)
        charges = table.count(tokens)
    return tokens, np.concatenate(([0], charges))


def _encode(texts: list[str], exactly: bool) -> list[Document]:
    """Texts as tokens, in a worker process.

    The document start is a control token, which no text is encoded to: documents stay apart.
    """
    documents = []
    for text in texts:
        tokens, charges = charged_document(_table, text, exactly)
        digest = document_hash(tokens[1:])
        documents.append(Document(tokens, digest, len(text.encode()), charges))
    return documents


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Lists of documents of about BATCH_BYTES characters.

    Long documents need no more memory than short ones.
    """
    batch = []
    size = 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


def booked(documents: Iterable[tuple[str, int]], bar: tqdm) -> Iterator[str]:
    """The texts; the bytes of the files that they stand for are booked on the bar."""
    for text, size in documents:
        bar.update(size)
        yield text


class ShardWriter:
    """Streams tokens into the shards of a split, of at most SHARD_TOKENS tokens each."""

    def __init__(self, folder: Path, split: str):
        self.folder = folder
        self.split = split
        self.files = 0  # that are whole
        self.tokens = 0  # in all files
        self.file: BinaryIO | None = None
        self.room = 0  # tokens that the open file still takes

    def add(self, tokens: np.ndarray) -> None:
        """Appends tokens, over the border of a shard if need be."""
        self.tokens += len(tokens)
        while len(tokens):
            if self.file is None:
                self.file = open(self.folder / shard_name(self.split, self.files), "wb")
                self.file.write(shard_header(0))
                self.room = SHARD_TOKENS
            part = tokens[: self.room]
            self.file.write(part.astype("<u2").tobytes())
            tokens = tokens[len(part) :]
            self.room -= len(part)
            if not self.room:
                self.close()

    def close(self) -> None:
        """The header last: until it is there, its count is 0 and no reader accepts the file."""
        if self.file is not None:
            count = (self.file.tell() - SHARD_HEADER_BYTES) // 2
            self.file.seek(0)
            self.file.write(shard_header(count))
            self.file.close()
            self.file = None
            self.files += 1


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """A Ctrl-C inside the block takes effect after it.

    In the middle of a fork Python would drop it, or a new process would die of it before it can
    ignore it. Only for the main thread.
    """
    held = []

    def hold(number: int, frame: Any) -> None:
        held.append(number)

    before = signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held:
            signal.raise_signal(signal.SIGINT)


class Exporter:
    """Encodes splits with several processes into a folder.

    Keeps the validation documents' hashes.
    """

    def __init__(self, folder: Path, plan: TokenizerPlan, workers: int):
        # Forked processes start at once; elsewhere than on Linux system libraries may not survive a
        # fork.
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        self.folder = folder
        self.transform = plan.transform
        self.window = 4 * workers  # batches
        self.pool = ProcessPoolExecutor(workers, context, _load_table, (plan,))
        self.seen: set[bytes] = set()

    def __enter__(self) -> Exporter:
        return self

    def __exit__(self, *failure: Any) -> None:
        self.pool.shutdown(cancel_futures=True)

    def encoded(self, documents: Iterable[str], exactly: bool) -> Iterator[Document]:
        """All documents, in their order.

        A bounded window of batches is in flight, so memory is constant.
        """
        batches = _batches(documents)
        window = deque()
        while True:
            for batch in itertools.islice(batches, self.window - len(window)):
                with interrupts_held():  # the first starts the processes
                    window.append(self.pool.submit(_encode, batch, exactly))
            if not window:
                return
            yield from window.popleft().result()

    def write(self, split: str, corpus: Corpus, bar: tqdm) -> dict[str, int]:
        """All documents of a corpus' split as shards.

        Returns how many documents, files, tokens, bytes and charged bytes. Validation documents are
        remembered; training documents equal to one of them are left out, and counted. With case
        markers, validation gets a byte side file.
        """
        writer = ShardWriter(self.folder, split)
        side_file = ShardWriter(self.folder, CHARGES)
        validates = split == "val"
        stats = {"docs": 0, "bytes": 0, "charged": 0, "left_out": 0}
        documents = booked(corpus.sized(split), bar)
        for document in self.encoded(documents, exactly=validates):
            if validates:
                self.seen.add(document.digest)
            elif document.digest in self.seen:
                stats["left_out"] += 1
                continue
            writer.add(document.tokens)
            if validates and self.transform:
                side_file.add(document.charges)
            stats["docs"] += 1
            stats["bytes"] += document.bytes
            stats["charged"] += int(document.charges.sum(dtype=np.int64))
        writer.close()
        side_file.close()
        return {**stats, "files": writer.files, "tokens": writer.tokens}


# --------------------------------------------------------------------------------------------------
# The whole job
# --------------------------------------------------------------------------------------------------


@dataclass
class Export:
    """One dataset below a data folder.

    Everything is made in a draft folder and gets its final names at the end.
    """

    corpus: Corpus
    plan: TokenizerPlan
    root: Path
    name: str
    workers: int

    @property
    def draft(self) -> Path:
        return self.root / "datasets" / f".{self.name}.tmp"

    @property
    def final(self) -> Path:
        return self.root / "datasets" / self.name

    @property
    def made_from(self) -> dict[str, Any]:
        """All that determines the shards' content: equal for two calls, the second does nothing."""
        return {**self.corpus.source(), **self.plan.identity(), "shard_tokens": SHARD_TOKENS}

    def settings(self) -> dict[str, Any]:
        """What train_gpt.py needs to use the dataset; KeyError, InputError as manifest.settings."""
        found = manifest.read(self.root)
        dataset = manifest.entry(found, "datasets", self.name)
        tokenizer = manifest.entry(found, "tokenizers", dataset["tokenizer_name"]) or {}
        needed = manifest.settings(self.root, dataset, tokenizer)
        if needed["TOKENIZER_PATH"] == "byte260":
            return needed
        path = Path(needed["TOKENIZER_PATH"])
        known = tokenizer.get("sha256")
        check(
            path.is_file() and sha256(path) == known,
            f"{shown(path, 300)}: missing, or not the tokenizer that made {self.final} "
            f"(SHA-256 {shown(known, 64)})",
        )
        return needed

    def finished(self) -> dict[str, Any] | None:
        """The settings if this very dataset is there, whole; InputError if another has its name."""
        entry = manifest.entry(manifest.read(self.root), "datasets", self.name)
        if not os.path.lexists(self.final):
            return None
        check(
            entry is not None and entry.get("made_from") == self.made_from,
            f"{self.final}: holds other data than asked for; remove it or choose another --name",
        )
        damaged = f"{self.root / 'manifest.json'}: the entry {self.name} is damaged"
        with input_error_from(damaged, KeyError, TypeError):
            cut = manifest.cut(self.root, entry["files"])
            if cut:
                raise InputError(
                    f"{shown(self.root / cut[0], 300)}: missing or cut; remove {self.final} "
                    "and run this again"
                )
            return self.settings()

    def run(self) -> dict[str, Any]:
        """Exports unless it is done already; returns the settings that train_gpt.py needs.

        InputError if it cannot be done. Of several processes one works, the others wait for it.
        """
        done = self.finished()  # needs no right to write
        if not done:
            with manifest.locked(self.root, self.name):
                done = self.finished()
                if not done:
                    self.attempt()
                    return self.settings()
        print(f"{self.final}: already there")
        return done

    def attempt(self) -> None:
        """Makes the dataset, or says why not and removes the draft."""
        shutil.rmtree(self.draft, ignore_errors=True)  # a killed process left it
        self.draft.mkdir(parents=True)
        try:
            self.make()
        except OSError as error:
            raise InputError(
                f"{error.filename or self.final}: {error.strerror or error}; {self.name} was not "
                "made"
            ) from None
        except BrokenProcessPool:
            raise InputError(
                f"{self.final}: a process was killed (out of memory?); fewer --workers need less; "
                "it was not made"
            ) from None
        finally:
            shutil.rmtree(self.draft, ignore_errors=True)

    def make(self) -> None:
        """Tokenizer, shards, manifest; the folder's final name last.

        A folder that is there must be whole.
        """
        self.corpus.source()  # before the text is read: a file that changes then has another hash
        tokenizer = self.tokenizer_file()
        made = replace(self.plan, given=str(tokenizer or "byte260"))
        stats = self.write_shards(made)
        with manifest.adding(self.root, *self.entries(tokenizer, stats)):
            if tokenizer is not None:
                self.place_tokenizer(tokenizer)
        self.draft.rename(self.final)
        for split, counts in stats.items():
            print(
                f"{split}: {counts['docs']} documents, {counts['tokens']} tokens, "
                f"{counts['files']} files"
            )

    def write_shards(self, plan: TokenizerPlan) -> dict[str, dict[str, int]]:
        """Both splits in the draft folder -> the counts of Exporter.write by split.

        InputError if a split would be empty.
        """
        stats = {}
        with (
            Exporter(self.draft, plan, self.workers) as exporter,
            progress_bar("text", self.corpus.size) as bar,
        ):
            for split in ("val", "train"):
                stats[split] = exporter.write(split, self.corpus, bar)
        validate = stats["val"]["docs"]
        for split, counts in stats.items():
            check(
                counts["docs"],
                f"too little text: no document is left for the {split} split "
                f"({validate} validate; see --val-docs, --val-every)",
            )
        left_out = stats["train"]["left_out"]
        if left_out:
            print(f"note: {left_out} training documents equal a validation document: left out")
        return stats

    def tokenizer_file(self) -> Path | None:
        """The model in the draft's tokenizer folder: a copy, or trained.

        It is trained on training documents only.
        """
        plan = self.plan
        if plan.given == "byte260":
            return None
        folder = self.draft / "tokenizer"
        folder.mkdir()
        if plan.given:
            plan.table()
            return Path(shutil.copy(plan.given, folder))
        path = folder / f"{self.name}_bpe.model"
        print(
            f"training a tokenizer of {plan.vocab_size} pieces on at most "
            f"{plan.tokenizer_train_docs} documents: some seconds for each 100 MB, without a bar",
            flush=True,
        )
        documents = itertools.islice(self.corpus.documents("train"), plan.tokenizer_train_docs)
        skipped = train_tokenizer(
            documents, plan.vocab_size, path, plan.max_sentence_length, plan.transform
        )
        print("\n".join(skipped.told()), flush=True)
        return path

    def place_tokenizer(self, path: Path) -> None:
        """Gives the model its final name.

        InputError if another model has it: nobody knows who still needs that.
        """
        place = self.root / "tokenizers" / path.name
        check(
            not place.exists() or sha256(place) == sha256(path),
            f"{place}: another tokenizer of that name is there; choose another name, or move it "
            "away if nothing was made with it",
        )
        manifest.give_name(path, place)
        shutil.rmtree(path.parent)

    def entries(
        self, tokenizer: Path | None, stats: dict[str, dict[str, int]]
    ) -> tuple[manifest.Entry, manifest.Entry]:
        """Dataset and tokenizer for the manifest.

        The official manifest's fields, what made them, and every file's size and hash.
        """
        model = tokenizer_entry(tokenizer, self.plan.transform)
        dataset = dataset_entry(self.name, model)
        dataset["stats"] = official_stats(stats)
        dataset["text_bytes"] = {split: counts["bytes"] for split, counts in stats.items()}
        dataset["charged_bytes"] = {split: counts["charged"] for split, counts in stats.items()}
        dataset["left_out"] = stats["train"]["left_out"]
        dataset["made_from"] = self.made_from
        dataset["files"] = recorded(sorted(self.draft.glob(shard_name("*"))), dataset["path"])
        return dataset, model


def recorded(files: Sequence[Path], folder: str) -> dict[str, manifest.Entry]:
    """Each file's size and SHA-256 by its path in a folder below the data folder."""
    sizes = {file: file.stat().st_size for file in files}
    found = {}
    with progress_bar("hashing the shards", sum(sizes.values())) as bar:
        for file, size in sizes.items():
            found[f"{folder}/{file.name}"] = {"size": size, "sha256": hashed(file, bar)}
    return found


def official_stats(stats: dict[str, dict[str, int]]) -> dict[str, int]:
    """Counts by split under the official manifest's names: docs_total, docs_val, ..."""
    found = {}
    for key in ("docs", "files", "tokens"):
        found[f"{key}_total"] = sum(counts[key] for counts in stats.values())
        for split, counts in stats.items():
            found[f"{key}_{split}"] = counts[key]
    return found


def dataset_entry(name: str, tokenizer: manifest.Entry) -> manifest.Entry:
    """A dataset for the manifest, as far as its name and its tokenizer's entry tell."""
    folder = f"datasets/{name}"
    entry = {
        "name": name,
        "tokenizer_name": tokenizer["name"],
        "tokenizer_kind": tokenizer["kind"],
        "path": folder,
        "train_glob": f"{folder}/{shard_name('train')}",
        "val_glob": f"{folder}/{shard_name('val')}",
    }
    if "case_transform" in tokenizer:
        entry["val_bytes_glob"] = f"{folder}/{shard_name(CHARGES)}"
    for field in ("vocab_size", "bos_id", "eos_id", "recommended_bigram_vocab_size"):
        entry[field] = tokenizer[field]
    return entry


def tokenizer_entry(path: Path | None, transform: str = "") -> manifest.Entry:
    """A tokenizer for the manifest: a model file, or byte260 if there is none."""
    table = TokenizerPlan(str(path or "byte260"), transform=transform).table()
    entry = {
        "name": "pure_byte_260",
        "kind": "byte",
        "vocab_size": table.vocab_size,
        "bos_id": bos_of(table),
        "eos_id": 2,
        "recommended_bigram_vocab_size": 5 * 128 * math.ceil(table.vocab_size / 128),
        "pad_id": 0,
        "unk_id": 3,
    }
    if path is not None:
        entry["name"] = path.stem
        entry["kind"] = "sentencepiece_bpe"
        entry["eos_id"] = table.processor.eos_id()
        entry["pad_id"] = table.processor.pad_id()
        entry["unk_id"] = table.processor.unk_id()
        entry["model_path"] = f"tokenizers/{path.name}"
        entry["sha256"] = sha256(path)
    if transform:
        entry["case_transform"] = transform
    return entry
