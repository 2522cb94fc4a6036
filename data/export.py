"""Documents to token shards.

Trains or takes a tokenizer, writes fineweb_{val,train}_*.bin and the manifest's entry.

The format is the challenge's (data/README.md of openai/parameter-golf): validation documents
first, a document start
before each document, documents end to end in shards of 100 million tokens. Two things it leaves to
luck are certain here: a training document that is also a validation document is left out, and the
output is the same for any number of processes. Memory does not grow with the corpus: a window of
batches is in flight, and one hash a validation document.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import manifest
import numpy as np
import sentencepiece
from corpora import Corpus
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from train_gpt import (
    SHARD_HEADER_BYTES,
    ByteTable,
    Config,
    InputError,
    atomic_write,
    input_error_from,
    sha256,
    shard_header,
    tokenizer_hash,
)

SHARD_TOKENS = 100_000_000
BATCH_BYTES = 1 << 18  # text handed to a process at a time
OFFICIAL_SENTENCE_BYTES = (
    4192  # the trainer's default: longer documents teach the official tokenizers nothing
)
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

    def identity(self) -> dict[str, Any]:
        """What of this determines the tokens, for the manifest."""
        if self.given:
            return {"tokenizer_sha256": tokenizer_hash(Config(tokenizer_path=self.given))}
        return {
            "vocab_size": self.vocab_size,
            "tokenizer_train_docs": self.tokenizer_train_docs,
            "max_sentence_length": self.max_sentence_length,
        }

    def table(self) -> ByteTable:
        """The given tokenizer, or byte260; InputError if shards cannot be made with it."""
        table = (
            ByteTable.bytes260()
            if self.given == "byte260"
            else ByteTable.from_sentencepiece(self.given)
        )
        if table.vocab_size > 1 << 16:
            raise InputError(
                f"{self.given}: {table.vocab_size} tokens; a shard's uint16 holds 65536"
            )
        if bos_of(table) < 0:
            raise InputError(f"{self.given}: has no document start (bos_id); shards need one")
        return table


def bos_of(table: ByteTable) -> int:
    return table.processor.bos_id() if table.processor else 1


@dataclass
class Skipped:
    """What the trainer leaves out without an error, counted beside it."""

    limit: int
    documents: int = 0
    bytes: int = 0
    long: int = 0
    long_bytes: int = 0
    reserved: int = 0

    def watch(self, texts: Iterable[str]) -> Iterator[str]:
        """The documents as the official script gives the trainer: NUL a space, ends stripped."""
        for text in texts:
            text = text.replace("\0", " ").strip()
            size = len(text.encode())
            self.documents, self.bytes = self.documents + 1, self.bytes + size
            if size > self.limit:
                self.long, self.long_bytes = self.long + 1, self.long_bytes + size
            elif RESERVED in text:
                self.reserved += 1
            if text:
                yield text

    def told(self) -> list[str]:
        lines = [
            f"tokenizer: trained on {self.documents - self.long - self.reserved} of "
            f"{self.documents} documents"
        ]
        if self.long:
            lines.append(
                f"warning: {self.long} documents ({self.long_bytes / self.bytes:.0%} of the text) "
                f"are longer than --max-sentence-length {self.limit} bytes: the trainer skips them"
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
) -> Skipped:
    """A BPE model of the official recipe from these documents.

    Returns what the trainer left out.
    """
    model, skipped = io.BytesIO(), Skipped(max_sentence_length)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=skipped.watch(documents),
            model_writer=model,
            vocab_size=vocab_size,
            minloglevel=2,
            max_sentence_length=max_sentence_length,
            **RECIPE,
        )
    except RuntimeError as error:
        if not skipped.documents:
            reason = "there is no training document"
        elif skipped.documents == skipped.long:
            reason = "every document is longer than --max-sentence-length"
        else:
            reason = error
        raise InputError(f"no tokenizer of {vocab_size} pieces from this text: {reason}") from None
    found = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    if found != vocab_size:
        raise InputError(
            f"the text yields only {found} pieces; ask for --vocab-size {found} or give more text"
        )
    atomic_write(path, model.getvalue())
    return skipped


# --------------------------------------------------------------------------------------------------
# Tokens
# --------------------------------------------------------------------------------------------------

_table: ByteTable | None = None


def _load_table(tokenizer: str) -> None:
    global _table  # noqa: PLW0603 - one tokenizer a worker process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _table = TokenizerPlan(tokenizer).table()


def _end_with_parent() -> None:
    """A killed parent closes no queue: its processes would wait for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def document_hash(tokens: np.ndarray) -> bytes:
    """What tells documents apart: a hash of their tokens without the document start.

    The tokens are hashed as uint16, little-endian.
    """
    return hashlib.blake2b(tokens.astype("<u2", copy=False).tobytes(), digest_size=16).digest()


def _encode(texts: list[str]) -> list[tuple[np.ndarray, bytes, int, int]]:
    """Documents -> their tokens, their hash, their bytes of text, bytes charged.

    Tokens are uint16, after a document start. The document start is a control token, which no text
    is encoded to: documents stay apart.
    """
    parts = []
    for text in texts:
        tokens = np.array([bos_of(_table), *_table.encode(text)], dtype=np.uint16)
        charged = int(_table.count(tokens).sum(dtype=np.int64))
        parts.append((tokens, document_hash(tokens[1:]), len(text.encode()), charged))
    return parts


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Lists of documents of about BATCH_BYTES characters.

    Long documents need no more memory than short ones.
    """
    batch, size = [], 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class ShardWriter:
    """Streams tokens into fineweb_<split>_<number>.bin files of at most SHARD_TOKENS tokens."""

    def __init__(self, folder: Path, split: str):
        self.folder, self.split, self.files, self.tokens = folder, split, 0, 0
        self.file, self.room = None, 0

    def add(self, tokens: np.ndarray) -> None:
        self.tokens += len(tokens)
        while len(tokens):
            if self.file is None:
                self.file = open(self.folder / f"fineweb_{self.split}_{self.files:06d}.bin", "wb")
                self.file.write(shard_header(0))
                self.room = SHARD_TOKENS
            self.file.write(tokens[: self.room].astype("<u2").tobytes())
            tokens, self.room = tokens[self.room :], self.room - len(tokens[: self.room])
            if not self.room:
                self.close()

    def close(self) -> None:
        """The header last: until it is there, its count is 0 and no reader accepts the file."""
        if self.file is not None:
            count = (self.file.tell() - SHARD_HEADER_BYTES) // 2
            self.file.seek(0)
            self.file.write(shard_header(count))
            self.file.close()
            self.file, self.files = None, self.files + 1


class Exporter:
    """Encodes splits with several processes into a folder.

    Keeps the validation documents' hashes.
    """

    def __init__(self, folder: Path, tokenizer: str, workers: int):
        # Forked processes start at once; elsewhere than on Linux system libraries may not survive a
        # fork.
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        self.folder, self.window = folder, 4 * workers
        self.pool = ProcessPoolExecutor(workers, context, _load_table, (tokenizer,))
        self.seen: set[bytes] = set()

    def __enter__(self) -> Exporter:
        return self

    def __exit__(self, *failure: Any) -> None:
        self.pool.shutdown(cancel_futures=True)

    def encoded(self, documents: Iterable[str]) -> Iterator[tuple[np.ndarray, bytes, int, int]]:
        """_encode of all documents, in their order.

        A bounded window of batches is in flight, so memory is constant.
        """
        batches, window = _batches(documents), deque()
        while True:
            room = self.window - len(window)
            window += [
                self.pool.submit(_encode, batch) for batch in itertools.islice(batches, room)
            ]
            if not window:
                return
            yield from window.popleft().result()

    def write(self, split: str, documents: Iterable[str], bar: tqdm) -> dict[str, int]:
        """All documents of a split as shards.

        Returns how many documents, files, tokens, bytes and charged bytes. Validation documents are
        remembered; training documents equal to one of them are left out, and counted.
        """
        writer = ShardWriter(self.folder, split)
        stats = {"docs": 0, "bytes": 0, "charged": 0, "left_out": 0}
        for tokens, digest, size, charged in self.encoded(documents):
            bar.update(size)
            if split == "val":
                self.seen.add(digest)
            elif digest in self.seen:
                stats["left_out"] += 1
                continue
            writer.add(tokens)
            stats["docs"], stats["bytes"] = stats["docs"] + 1, stats["bytes"] + size
            stats["charged"] += charged
        writer.close()
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
        return {**self.corpus.source, **self.plan.identity(), "shard_tokens": SHARD_TOKENS}

    def settings(self) -> dict[str, Any]:
        """What train_gpt.py needs to use the dataset; KeyError if its entries lack something."""
        found = manifest.read(self.root)
        dataset = manifest.entry(found, "datasets", self.name)
        tokenizer = manifest.entry(found, "tokenizers", dataset["tokenizer_name"]) or {}
        needed = manifest.settings(self.root, dataset, tokenizer)
        path, known = needed["TOKENIZER_PATH"], tokenizer.get("sha256")
        if path != "byte260" and not (Path(path).is_file() and sha256(Path(path)) == known):
            raise InputError(
                f"{path}: missing, or not the tokenizer that made {self.final} (SHA-256 {known})"
            )
        return needed

    def finished(self) -> dict[str, Any] | None:
        """The settings if this very dataset is there, whole; InputError if another has its name."""
        entry = manifest.entry(manifest.read(self.root), "datasets", self.name)
        if not os.path.lexists(self.final):
            return None
        if entry is None or entry.get("made_from") != self.made_from:
            raise InputError(
                f"{self.final}: holds other data than asked for; remove it or choose another --name"
            )
        with input_error_from(
            f"{self.root / 'manifest.json'}: the entry {self.name} is damaged", KeyError, TypeError
        ):
            cut = manifest.cut(self.root, entry["files"])
            if cut:
                raise InputError(
                    f"{self.root / cut[0]}: missing or cut; remove {self.final} and run this again"
                )
            return self.settings()

    def run(self) -> dict[str, Any]:
        """Exports unless it is done already; returns the settings that train_gpt.py needs."""
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
        tokenizer = self.tokenizer_file()
        with (
            Exporter(self.draft, str(tokenizer or "byte260"), self.workers) as exporter,
            tqdm(
                desc="text", total=self.corpus.size, unit="B", unit_scale=True, mininterval=1
            ) as bar,
        ):
            stats = {
                split: exporter.write(split, self.corpus.documents(split), bar)
                for split in ("val", "train")
            }
        for split, counts in stats.items():
            if not counts["docs"]:
                raise InputError(
                    f"too little text: no document is left for the {split} split "
                    f"({stats['val']['docs']} validate; see --val-docs, --val-every)"
                )
        if stats["train"]["left_out"]:
            print(
                f"note: {stats['train']['left_out']} training documents equal a validation "
                "document: left out"
            )
        with manifest.adding(self.root, *self.entries(tokenizer, stats)):
            if tokenizer is not None:
                self.place_tokenizer(tokenizer)
        self.draft.rename(self.final)
        for split, counts in stats.items():
            print(
                f"{split}: {counts['docs']} documents, {counts['tokens']} tokens, "
                f"{counts['files']} files"
            )

    def tokenizer_file(self) -> Path | None:
        """The model in the draft's tokenizer folder: a copy, or trained.

        It is trained on training documents only.
        """
        if self.plan.given == "byte260":
            return None
        (self.draft / "tokenizer").mkdir()
        if self.plan.given:
            self.plan.table()
            return Path(shutil.copy(self.plan.given, self.draft / "tokenizer"))
        path = self.draft / "tokenizer" / f"{self.name}_bpe.model"
        print(f"training a tokenizer of {self.plan.vocab_size} pieces", flush=True)
        documents = itertools.islice(self.corpus.documents("train"), self.plan.tokenizer_train_docs)
        skipped = train_tokenizer(
            documents, self.plan.vocab_size, path, self.plan.max_sentence_length
        )
        print("\n".join(skipped.told()), flush=True)
        return path

    def place_tokenizer(self, path: Path) -> None:
        """Gives the model its final name.

        InputError if another model has it: nobody knows who still needs that.
        """
        place = self.root / "tokenizers" / path.name
        if place.exists() and sha256(place) != sha256(path):
            raise InputError(
                f"{place}: another tokenizer of that name is there; choose another name, or move "
                "it away if nothing was made with it"
            )
        manifest.give_name(path, place)
        shutil.rmtree(path.parent)

    def entries(
        self, tokenizer: Path | None, stats: dict[str, dict[str, int]]
    ) -> list[manifest.Entry]:
        """Dataset and tokenizer for the manifest.

        The official manifest's fields, what made them, and every file's size and hash.
        """
        table, folder = TokenizerPlan(str(tokenizer or "byte260")).table(), f"datasets/{self.name}"
        kind, name = (
            ("sentencepiece_bpe", tokenizer.stem) if tokenizer else ("byte", "pure_byte_260")
        )
        special = table.processor
        common = {
            "vocab_size": table.vocab_size,
            "bos_id": bos_of(table),
            "eos_id": special.eos_id() if special else 2,
            "recommended_bigram_vocab_size": 5 * 128 * math.ceil(table.vocab_size / 128),
        }
        totals = {
            key: stats["val"][key] + stats["train"][key] for key in ("docs", "files", "tokens")
        }
        model = (
            {"model_path": f"tokenizers/{tokenizer.name}", "sha256": sha256(tokenizer)}
            if tokenizer
            else {}
        )
        return [
            {
                "name": self.name,
                "tokenizer_name": name,
                "tokenizer_kind": kind,
                "path": folder,
                "train_glob": f"{folder}/fineweb_train_*.bin",
                "val_glob": f"{folder}/fineweb_val_*.bin",
                **common,
                "stats": {
                    f"{key}_{split}": counts[key]
                    for key in totals
                    for split, counts in (("total", totals), *stats.items())
                },
                "text_bytes": {split: counts["bytes"] for split, counts in stats.items()},
                "charged_bytes": {split: counts["charged"] for split, counts in stats.items()},
                "left_out": stats["train"]["left_out"],
                "made_from": self.made_from,
                "files": {
                    f"{folder}/{file.name}": {"size": file.stat().st_size, "sha256": sha256(file)}
                    for file in sorted(self.draft.glob("fineweb_*.bin"))
                },
            },
            {
                "name": name,
                "kind": kind,
                **common,
                "pad_id": special.pad_id() if special else 0,
                "unk_id": special.unk_id() if special else 3,
                **model,
            },
        ]
