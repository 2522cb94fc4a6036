"""Whether a folder of shards is what it claims to be.

Headers, tokens, tokenizer, bytes, manifest, splits apart.

    python data/prepare.py verify data/datasets/fineweb10B_sp1024

Each check says PASS, FAIL or SKIPPED with its figures; what was skipped has not passed. The first
lines are those by which train_gpt.py's log identifies the same data. Sources of the checks: the
four accounting conditions of openai/parameter-golf's issue #1017 and the rulings that confirm them.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import manifest
import numpy as np
from bars import progress_bar
from corpora import Corpus, check_files, file_corpus
from export import (
    MOST_CHARGED,
    TokenizerPlan,
    bos_of,
    bytes_before,
    charged_document,
    document_hash,
)
from shown import LONGEST_LINE, shown
from tqdm import tqdm

import train_gpt as tg
from train_gpt import ByteTable, Check, InputError, printable, sha256, shard_name

SPLITS = ("val", "train")
# What an entry that lacks something ends in.
DAMAGED = (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError)
# Of the published validation set: the first 50,000 documents of FineWeb.
VAL_DOCS = 50_000
VAL_BYTES = 151_080_891
TRAIN_SAMPLE = 1 << 20  # training tokens whose bytes are checked


class Fault(Exception):
    """A check that fails, in one line."""


class NotTested(Exception):
    """A check that could not be made here, and why."""


@dataclass(frozen=True)
class Dataset:
    """A folder of shards with what the manifest two levels up says of it."""

    folder: Path
    tokenizer: str  # given by the user; empty = the manifest's
    documents: Sequence[Path]  # text files that the shards were made from, if here
    transform: str = ""  # of capitals into markers, given by the user; empty = the manifest's

    @property
    def root(self) -> Path:
        return self.folder.parent.parent

    @functools.cached_property
    def told(self) -> manifest.Entry:
        """The manifest."""
        return manifest.read(self.root)

    @functools.cached_property
    def entry(self) -> manifest.Entry | None:
        """The manifest's entry of the folder."""
        return manifest.entry(self.told, "datasets", self.folder.name)

    @functools.cached_property
    def tokenizer_entry(self) -> manifest.Entry | None:
        """The manifest's entry of the tokenizer that the folder's entry names."""
        if not self.entry:
            return None
        return manifest.entry(self.told, "tokenizers", self.entry.get("tokenizer_name"))

    @functools.cached_property
    def table(self) -> ByteTable:
        """The tokenizer that the user or the manifest names."""
        told = self.tokenizer_entry or {}
        transform = self.transform or told.get("case_transform", "")
        return TokenizerPlan(self.tokenizer_path, transform=transform).table()

    @functools.cached_property
    def tokenizer_path(self) -> str:
        """A model file, or byte260; NotTested if nothing names the tokenizer."""
        if self.tokenizer:
            return self.tokenizer
        if not self.tokenizer_entry:
            raise NotTested("no manifest entry names the tokenizer (--tokenizer gives it)")
        return manifest.model_of(self.root, self.tokenizer_entry)

    @functools.cached_property
    def bos(self) -> int:
        """The token of a document start."""
        return manifest.document_start(self.entry or {}, self.tokenizer_entry or {})

    def paths(self, split: str) -> list[Path]:
        """The shards of a split, in order of name."""
        return tg.shards_in(self.folder, split)

    @functools.cached_property
    def shards(self) -> dict[str, list[np.ndarray]]:
        """Split -> memory-mapped shards; NotTested where the check `shards` finds the fault."""
        if not self.paths("val"):
            raise NotTested("there are no validation shards")
        found: dict[str, list[np.ndarray]] = {}
        try:
            for split in SPLITS:
                found[split] = [np.asarray(tg.read_shard(path)) for path in self.paths(split)]
        except InputError:
            raise NotTested("a shard cannot be read") from None
        return found

    def split_documents(self, split: str) -> Iterator[np.ndarray]:
        """Documents of a split with their document start.

        They may begin in one shard and end in the next.
        """
        parts: list[np.ndarray] = []
        for tokens in self.shards[split]:
            edges = sorted({0, *np.flatnonzero(tokens == self.bos).tolist(), len(tokens)})
            for lo, hi in itertools.pairwise(edges):
                if parts and tokens[lo] == self.bos:
                    yield np.concatenate(parts)
                    parts = []
                parts.append(tokens[lo:hi])
        if parts:
            yield np.concatenate(parts)

    def spelled(self, split: str, limit: int | None = None) -> np.ndarray:
        """Tokens of a split, or the first of its first shard -> [T], uint16.

        NotTested if the tokenizer does not know them all.
        """
        parts = self.shards[split]
        if limit is not None:
            parts = [part[:limit] for part in parts[:1]]
        for part in parts:
            if part.max() >= self.table.vocab_size:
                raise NotTested("there are tokens beyond the tokenizer's")
        return np.concatenate([np.empty(0, np.uint16), *parts])

    def body(self, part: np.ndarray) -> np.ndarray:
        """A document without its start; what stands before the first start has none."""
        return part[1:] if part[0] == self.bos else part

    @functools.cached_property
    def documents_in(self) -> dict[str, int]:
        """Split -> number of document starts."""
        found = {}
        for split, shards in self.shards.items():
            read = progress_bar(f"{split} document starts", len(shards), "shard", shards)
            found[split] = sum(int((tokens == self.bos).sum()) for tokens in read)
        return found

    @functools.cached_property
    def tokens_in(self) -> dict[str, int]:
        """Split -> number of tokens."""
        return {split: sum(map(len, shards)) for split, shards in self.shards.items()}

    @property
    def settings(self) -> tg.Config:
        """What train_gpt.py would need to read it."""
        return tg.Config(
            data_path=str(self.folder),
            tokenizer_path=self.tokenizer_path,
            vocab_size=self.table.vocab_size,
            case_transform=self.table.transform,
        )

    @functools.cached_property
    def charges(self) -> np.ndarray:
        """Bytes that each validation token but the first is charged for."""
        return tg.load_charges(self.settings, self.table, self.spelled("val"))

    @property
    def charged(self) -> int:
        """Their sum."""
        return int(self.charges.sum(dtype=np.int64))


# --------------------------------------------------------------------------------------------------
# Checks: each returns what it found, or raises Fault or NotTested
# --------------------------------------------------------------------------------------------------


def check_shards(data: Dataset) -> str:
    """Names without a gap; magic, version, size and zeros of every header."""
    if not data.paths("val"):  # to score an artifact, no others are needed
        raise Fault(f"no {shard_name('val')}")
    for split in SPLITS:
        paths = data.paths(split)
        check_names(paths, split)
        for path in paths:
            count = len(tg.read_shard(path))
            with open(path, "rb") as file:
                header = file.read(tg.SHARD_HEADER_BYTES)
            if header != tg.shard_header(count):
                raise Fault(f"{path}: header fields after the token count are not zero")
    found = []
    for split, tokens in data.tokens_in.items():
        found.append(f"{len(data.paths(split))} {split} shards of {tokens} tokens")
    return ", ".join(found)


def check_names(paths: Sequence[Path], split: str) -> None:
    """Fault unless the paths, in order of name, are those of the shards 0, 1, ..."""
    for number, path in enumerate(paths):
        found = manifest.shard_number(path, split)
        if found is None:
            pattern = shard_name(split, 0).replace("0", "N")
            raise Fault(f"{path}: no shard's name ({pattern}), and training would read it")
        if found != number:
            raise Fault(
                f"{shard_name(split, number)} is missing ({len(paths)} files, the last is "
                f"{paths[-1].name})"
            )


def check_manifest(data: Dataset) -> str:
    """Counts of the manifest's entry against what is here."""
    if not data.entry:
        raise NotTested(f"no entry {data.folder.name} in {data.root / 'manifest.json'}")
    stats = data.entry["stats"]
    published = "made_from" not in data.entry
    if not {"files_val", "tokens_val", "docs_val"} & stats.keys():
        raise NotTested(f"the entry {data.folder.name} counts nothing of validation")
    for split, shards in data.shards.items():
        found = {
            "files": len(shards),
            "tokens": data.tokens_in[split],
            "docs": data.documents_in[split],
        }
        if split == "train" and published and found["files"] < stats["files_train"]:
            continue
        for key, value in found.items():
            told = stats.get(f"{key}_{split}", value)  # not every exporter counts documents
            if value != told:
                raise Fault(f"{split} has {value} {key}, the manifest says {shown(told)}")
    here = len(data.shards["train"])
    return f"counts agree ({here} of {stats['files_train']} training shards are here)"


def check_hashes(data: Dataset) -> str:
    """Every file's size and SHA-256 against the manifest's record; no shard without a record."""
    known = (data.entry or {}).get("files")
    if not known:
        raise NotTested("the manifest records no hashes of these files")
    for file in sorted(data.folder.glob(shard_name("*"))):
        path = f"datasets/{data.folder.name}/{file.name}"
        if path not in known:
            raise Fault(f"{path} is not in the manifest's files")
    cut = manifest.cut(data.root, known)
    if cut:
        size = shown(known[cut[0]]["size"])
        raise Fault(f"{shown(cut[0], 100)}: missing, or not of the recorded {size} bytes")
    total = sum(told["size"] for told in known.values())
    with progress_bar("hashes", total) as bar, ThreadPoolExecutor() as pool:
        found = pool.map(sha256, [data.root / path for path in known])
        for path, digest in zip(known, found):
            bar.update(known[path]["size"])
            recorded = known[path]["sha256"]
            if digest != recorded:
                pool.shutdown(wait=False, cancel_futures=True)
                told = f"SHA-256 {digest}, the manifest says {shown(recorded, 64)}"
                raise Fault(f"{shown(path, 100)}: {told}")
    return f"{len(known)} files have the recorded SHA-256"


def check_tokens(data: Dataset) -> str:
    """Every token below the vocabulary size; each split begins with a document start."""
    if data.entry and not data.tokenizer:
        size = data.entry["vocab_size"]
    else:
        size = data.table.vocab_size
    for split, shards in data.shards.items():
        paths = data.paths(split)
        read = progress_bar(f"{split} tokens", len(shards), "shard", shards)
        for tokens, path in zip(read, paths):
            largest = tokens.max()
            if largest >= size:
                raise Fault(f"{path}: token {largest}, but the vocabulary has {size}")
        first = shards[0][0] if shards else data.bos
        if first != data.bos:
            raise Fault(f"{paths[0]}: begins with token {first}, not the document start {data.bos}")
    val = data.documents_in["val"]
    train = data.documents_in["train"]
    return f"all below {size}; {val} validation and {train} training documents"


def check_tokenizer(data: Dataset) -> str:
    """The tokenizer's file against the manifest: hash, vocabulary, document start."""
    path = data.tokenizer_path
    table = data.table
    told = data.tokenizer_entry
    if not told:
        raise NotTested(
            f"no manifest entry says which tokenizer made these shards (given: {table.name})"
        )
    size = table.vocab_size
    bos = bos_of(table)
    for entry, other in ((data.entry, told), (told, data.entry)):
        start = manifest.document_start(entry, other)
        if (size, bos) != (entry["vocab_size"], start):
            raise Fault(
                f"{path}: {size} tokens, document start {bos}; "
                f"the manifest says {shown(entry['vocab_size'])}, {shown(start)}"
            )
    here = tg.tokenizer_hash(tg.Config(tokenizer_path=path))
    for recorded in recorded_hashes(data, told):
        if here != recorded:
            raise Fault(f"{path}: SHA-256 {here}, the manifest says {shown(recorded, 64)}")
    if "sha256" not in told and here != "byte260":
        raise NotTested(f"the manifest records no hash of {path}; its {size} tokens agree")
    return f"{table.name}, {size} tokens, sha256 {here:.16}"


def recorded_hashes(data: Dataset, told: manifest.Entry) -> list[str]:
    """What the manifest says of the tokenizer's hash: its entry's, and the dataset's own record."""
    found = []
    if manifest.model_of(data.root, told) == "byte260":
        found.append("byte260")
    elif "sha256" in told:
        found.append(told["sha256"])
    made_from = data.entry.get("made_from", {})
    if "tokenizer_sha256" in made_from:
        found.append(made_from["tokenizer_sha256"])
    return found


@dataclass(frozen=True)
class BookedTable:
    """A byte table that books the tokens which it decodes on a bar."""

    table: ByteTable
    bar: tqdm

    def count(self, tokens: np.ndarray) -> np.ndarray:
        return self.table.count(tokens)

    def decode(self, tokens: Sequence[int]) -> bytes:
        self.bar.update(len(tokens))
        return self.table.decode(tokens)


def check_bytes(data: Dataset) -> str:
    """Bytes charged by the byte table against decoded text, by document.

    All of validation, some of training.
    """
    for split, limit in (("val", None), ("train", TRAIN_SAMPLE)):
        tokens = data.spelled(split, limit)
        with progress_bar(f"{split} bytes", len(tokens), "token") as bar:
            table = BookedTable(data.table, bar)
            outcome = tg.check_bytes(tokens, table, data.bos, len(tokens))
        if len(tokens) and outcome.problem:  # training shards may be elsewhere
            raise Fault(f"{split} {outcome.problem}")
        refuse_marks_in_bytes(tokens, data.table, split)
    if not data.charged:
        raise Fault("validation charges no bytes: there is no text to compare")
    entry = data.entry or {}
    told = entry.get("charged_bytes", {}).get("val")
    if told not in (None, data.charged):
        raise Fault(f"validation charges {data.charged} bytes, {shown(told)} when it was made")
    found = f"validation charges {data.charged} bytes"
    text = entry.get("text_bytes", {}).get("val")
    return f"{found}, its raw text has {text}" if text else found


def check_charges(data: Dataset) -> str:
    """The byte side file of a tokenizer with case markers: as long as its shards, zeros, sum."""
    tg.ByteTable.load(data.settings)  # which refuses a side file beside another tokenizer
    charged = data.charged
    if not data.table.markers:
        return "no case markers, so that the tokenizer's pieces tell the bytes"
    told = (data.entry or {}).get("charged_bytes", {}).get("val")
    known = "as the manifest says" if told == charged else "and no manifest tells their sum"
    files = len(data.paths(tg.CHARGES))
    return f"{files} side files charge {charged} bytes, {known}; document starts and markers none"


def refuse_marks_in_bytes(tokens: np.ndarray, table: ByteTable, split: str) -> None:
    """Fault if a word mark is spelled in byte pieces: three bytes are charged for one space.

    That is what a model does that has no piece for its own mark. Decoded, the mark stays a mark, so
    that charged and decoded bytes agree.
    """
    sp = table.processor
    if not sp or not tg.marks_spaces(sp):
        return
    pieces = [sp.piece_to_id(f"<0x{byte:02X}>") for byte in tg.WORD_MARK.encode()]
    if not all(map(sp.is_byte, pieces)):
        return
    found = np.ones(max(0, len(tokens) - 2), bool)
    for place, piece in enumerate(pieces):
        found &= tokens[place : place + len(found)] == piece
    if found.any():
        raise Fault(
            f"{split} token {int(found.argmax())}: the word mark is spelled in three byte pieces "
            f"({int(found.sum())} times), so that each space is charged as three bytes"
        )


def most_bytes(table: ByteTable, text: str) -> int:
    """The bytes of a text as the tokenizer normalises it, each word mark but the first a space.

    No tokens of it stand for more: a mark at a document's start is not charged. With case markers,
    which a side file charges by the text itself: the text without what is dropped at its ends.
    """
    sp = table.processor
    if table.markers:
        kept = between_dropped_ends(table, table.marked_text(text))
        return int(bytes_before(kept)[-1])
    if sp:
        text = sp.normalize(text)
    if sp and tg.marks_spaces(sp):
        text = text.removeprefix(tg.WORD_MARK).replace(tg.WORD_MARK, " ")
    return len(text.encode())


def between_dropped_ends(table: ByteTable, marked: str) -> str:
    """A text without what the tokenizer drops at its ends: blanks, and what becomes nothing.

    At the end only from the first blank on: what becomes nothing belongs to the piece before it.
    """
    normalize = table.processor.normalize
    first = 0
    while first < len(marked) and not normalize(marked[first]):
        first += 1
    last = at = len(marked)
    while at > first and not normalize(marked[at - 1]):
        at -= 1
        if normalize(f"a{marked[at]}a") != "aa":
            last = at
    return marked[first:last]


def check_published(data: Dataset) -> str:
    """The whole fixed validation set.

    Its documents and, whatever the tokenizer, its bytes of text.
    """
    if not data.folder.name.startswith("fineweb10B_"):
        raise NotTested("not named as the challenge's data (fineweb10B_*)")
    documents = data.documents_in["val"]
    charged = data.charged
    if documents != VAL_DOCS or abs(charged / VAL_BYTES - 1) > 1e-3:
        raise Fault(
            f"validation has {documents} documents and {charged} bytes; the challenge's has "
            f"{VAL_DOCS} documents and about {VAL_BYTES} bytes"
        )
    return f"validation is the challenge's: {documents} documents, {charged} bytes"


def check_disjoint(data: Dataset) -> str:
    """No training document is a validation document, too, by a hash of each one's tokens."""
    if not data.shards["train"]:
        raise NotTested("there are no training shards")
    bodies = (data.body(part) for part in data.split_documents("val"))
    seen = {document_hash(body) for body in bodies if len(body)}
    if not seen:
        raise NotTested("there is no validation document with text")
    shared = []
    count = 0
    with progress_bar("training documents", data.tokens_in["train"], "token") as bar:
        for part in data.split_documents("train"):
            if document_hash(data.body(part)) in seen:
                shared.append(count)
            count += 1
            bar.update(len(part))
    if shared:
        raise Fault(
            f"{len(shared)} training documents are also validation documents (the first: document "
            f"{shared[0]})"
        )
    return f"no one of {count} training documents is among {len(seen)} validation documents"


def source_of(data: Dataset) -> Corpus:
    """The documents that validation was made from; NotTested if they are not here."""
    made_from = (data.entry or {}).get("made_from", {})
    published = data.root / "docs_selected.jsonl"
    paths = list(data.documents)
    if not paths and not made_from and published.is_file():
        paths = [published]
    if not paths:
        raise NotTested("no documents here (--documents gives the files)")
    val_docs = data.documents_in["val"]
    if not val_docs:
        raise NotTested("validation has no document start")
    val_every = made_from.get("val_every")
    if val_every:
        return file_corpus(paths, val_every=val_every)
    return file_corpus(paths, val_docs=val_docs)


def check_documents(data: Dataset) -> str:
    """Validation tokens against the documents, tokenized again one by one.

    Bytes charged against raw bytes.
    """
    raw = 0
    charged = 0
    number = 0
    at = 0  # in the validation tokens
    told = np.concatenate(([0], data.charges))
    parts = data.split_documents("val")
    texts = source_of(data).documents("val")
    read = progress_bar("documents", data.documents_in["val"], "document", texts)
    for number, text in enumerate(read, 1):
        part = next(parts, None)
        expected, charges = charged_document(data.table, text, exactly=True)
        if part is None or part.tolist() != expected.tolist():
            raise Fault(
                f"validation document {number} is not the text's {number}. document, tokenized: "
                f"{text[:60]!r}"
            )
        if not np.array_equal(told[at : at + len(part)], charges):
            raise Fault(
                f"validation document {number} is charged {told[at : at + len(part)].sum()} bytes "
                f"by its side file; its text gives {charges.sum()}, token by token"
            )
        at += len(part)
        count = int(charges.sum(dtype=np.int64))
        most = most_bytes(data.table, text)
        if count > most:
            raise Fault(
                f"validation document {number} is charged {count} bytes; its text, normalised, "
                f"has {most}"
            )
        if data.table.markers and count < most and charges.max() < MOST_CHARGED:
            raise Fault(
                f"validation document {number} is charged {count} bytes; its text has {most}"
            )
        raw += len(text.encode())
        charged += count
    if next(parts, None) is not None:
        raise Fault(f"validation has more documents than the text's {number}")
    return (
        f"{number} validation documents, tokenized again, are equal; "
        f"{charged} bytes charged, {raw} raw"
    )


CHECKS: dict[str, Callable[[Dataset], str]] = {
    "shards": check_shards,
    "manifest": check_manifest,
    "hashes": check_hashes,
    "tokens": check_tokens,
    "tokenizer": check_tokenizer,
    "bytes": check_bytes,
    "charges": check_charges,
    "published": check_published,
    "documents": check_documents,
    "disjoint": check_disjoint,
}


def identities(data: Dataset) -> list[str]:
    """The lines by which train_gpt.py's log identifies this data; none if it would not read it."""
    with contextlib.suppress(InputError, NotTested, OSError, *DAMAGED):
        cfg = data.settings
        _, line = tg.tokenizer_identity(cfg, data.table)
        lines = [line]
        splits = data.tokens_in
        for split in progress_bar("identities", len(splits), "split", splits):
            tokens = splits[split]
            if tokens:
                _, line = tg.shards_identity(cfg, split, tokens)
                lines.append(line)
        if data.table.markers:
            _, line = tg.charges_identity(cfg, data.table)
            lines.append(line)
        return lines
    return []


def outcome(name: str, data: Dataset) -> Check:
    """Makes a check: what it found, why it could not be made, or what is wrong."""
    try:
        return Check(name, found=CHECKS[name](data))
    except NotTested as error:
        return Check(name, str(error), counts_as="SKIPPED")
    except (Fault, InputError, OSError) as error:
        return Check(name, str(error) or repr(error))  # without a word it would have passed
    except DAMAGED as error:
        return Check(name, f"the manifest's entry is damaged ({error!r})")


def dataset_at(folder: Path, tokenizer: str, documents: Sequence[Path], transform: str) -> Dataset:
    """The folder as it is spelt, or where its links lead if only there a manifest describes it."""
    spelt = Dataset(Path(os.path.abspath(folder)), tokenizer, documents, transform)
    resolved = Dataset(folder.resolve(), tokenizer, documents, transform)
    if spelt.entry or not resolved.entry:
        return spelt
    return resolved


def verify(
    folder: Path, tokenizer: str = "", documents: Sequence[Path] = (), transform: str = ""
) -> bool:
    """Prints identities and one line a check; returns whether none failed.

    tokenizer: a model file or byte260, empty = the manifest's; documents: text files that made the
    shards; transform: what made a given tokenizer's case markers. InputError for a folder,
    tokenizer or files that cannot be looked at.
    """
    tg.check(
        folder.is_dir(), f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}"
    )
    check_files(documents)
    data = dataset_at(folder, tokenizer, documents, transform)
    if tokenizer:
        _ = data.table  # refused before anything is checked
    for line in identities(data):
        print(printable(line, LONGEST_LINE))
    good = True
    for name in CHECKS:
        check = outcome(name, data)
        told = printable(check.problem or check.found, LONGEST_LINE)
        print(f"{check.name:10} {check.word:8} {told}", flush=True)
        good = good and not check.failed
    return good
