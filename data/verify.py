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
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import manifest
import numpy as np
from corpora import Corpus, file_corpus
from export import TokenizerPlan, bos_of, document_hash
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as tg
from train_gpt import ByteTable, InputError, sha256

SPLITS = ("val", "train")
# What an entry that lacks something ends in.
DAMAGED = (KeyError, TypeError, AttributeError, IndexError)
# Of the published validation set: the first 50,000 documents of FineWeb.
VAL_DOCS, VAL_BYTES = 50_000, 151_080_891


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

    @property
    def root(self) -> Path:
        return self.folder.parent.parent

    @functools.cached_property
    def told(self) -> manifest.Entry:
        return manifest.read(self.root)

    @functools.cached_property
    def entry(self) -> manifest.Entry | None:
        return manifest.entry(self.told, "datasets", self.folder.name)

    @functools.cached_property
    def tokenizer_entry(self) -> manifest.Entry | None:
        return self.entry and manifest.entry(
            self.told, "tokenizers", self.entry.get("tokenizer_name")
        )

    @functools.cached_property
    def table(self) -> ByteTable:
        """The tokenizer that the user or the manifest names."""
        return TokenizerPlan(self.tokenizer_path).table()

    @functools.cached_property
    def tokenizer_path(self) -> str:
        if self.tokenizer:
            return self.tokenizer
        if not self.tokenizer_entry:
            raise NotTested("no manifest entry names the tokenizer (--tokenizer gives it)")
        return manifest.model_of(self.root, self.tokenizer_entry)

    @functools.cached_property
    def bos(self) -> int:
        return self.entry["bos_id"] if self.entry else 1

    def paths(self, split: str) -> list[Path]:
        return sorted(self.folder.glob(f"fineweb_{split}_*.bin"))

    @functools.cached_property
    def shards(self) -> dict[str, list[np.ndarray]]:
        """Split -> memory-mapped shards; NotTested where the check `shards` finds the fault."""
        if not self.paths("val"):
            raise NotTested("there are no validation shards")
        try:
            return {
                split: [np.asarray(tg.read_shard(path)) for path in self.paths(split)]
                for split in SPLITS
            }
        except InputError:
            raise NotTested("a shard cannot be read") from None

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
        """Tokens of a split, or the first; NotTested if the tokenizer does not know them all."""
        parts = (
            self.shards[split]
            if limit is None
            else [part[:limit] for part in self.shards[split][:1]]
        )
        if max((part.max() for part in parts), default=0) >= self.table.vocab_size:
            raise NotTested("there are tokens beyond the tokenizer's")
        return np.concatenate([np.empty(0, np.uint16), *parts])

    @functools.cached_property
    def documents_in(self) -> dict[str, int]:
        """Split -> number of document starts."""
        return {
            split: sum(int((tokens == self.bos).sum()) for tokens in shards)
            for split, shards in self.shards.items()
        }

    @functools.cached_property
    def charged(self) -> int:
        """Bytes that validation is charged for."""
        return int(self.table.count(self.spelled("val")).sum(dtype=np.int64))


# --------------------------------------------------------------------------------------------------
# Checks: each returns what it found, or raises Fault or NotTested
# --------------------------------------------------------------------------------------------------


def check_shards(data: Dataset) -> str:
    """Names without a gap; magic, version, size and zeros of every header."""
    for split in SPLITS:
        paths = data.paths(split)
        if not paths and split == "val":  # to score an artifact, no others are needed
            raise Fault("no fineweb_val_*.bin")
        odd = next((path for path in paths if not re.search(r"_\d{6}\.bin$", path.name)), None)
        if odd:
            raise Fault(
                f"{odd}: no shard's name (fineweb_{split}_NNNNNN.bin), and training would read it"
            )
        numbers = [int(path.stem[-6:]) for path in paths]
        if numbers != list(range(len(paths))):
            gap = next(n for n in itertools.count() if n not in numbers)
            raise Fault(
                f"fineweb_{split}_{gap:06d}.bin is missing ({len(paths)} files, the last is "
                f"{paths[-1].name})"
            )
        for path in paths:
            count = len(tg.read_shard(path))
            with open(path, "rb") as file:
                if file.read(tg.SHARD_HEADER_BYTES) != tg.shard_header(count):
                    raise Fault(f"{path}: header fields after the token count are not zero")
    return ", ".join(
        f"{len(data.paths(s))} {s} shards of {sum(map(len, data.shards[s]))} tokens"
        for s in data.shards
    )


def check_manifest(data: Dataset) -> str:
    """Counts of the manifest's entry against what is here."""
    if not data.entry:
        raise NotTested(f"no entry {data.folder.name} in {data.root / 'manifest.json'}")
    stats, published = data.entry["stats"], "made_from" not in data.entry
    for split, shards in data.shards.items():
        found = {
            "files": len(shards),
            "tokens": sum(map(len, shards)),
            "docs": data.documents_in[split],
        }
        if split == "train" and published and found["files"] < stats["files_train"]:
            continue
        for key, value in found.items():
            told = stats.get(f"{key}_{split}", value)  # not every exporter counts documents
            if value != told:
                raise Fault(f"{split} has {value} {key}, the manifest says {told}")
    return (
        f"counts agree ({len(data.shards['train'])} of {stats['files_train']} training shards "
        "are here)"
    )


def check_hashes(data: Dataset) -> str:
    """Every file's size and SHA-256 against the manifest's record; no shard without a record."""
    known = (data.entry or {}).get("files")
    if not known:
        raise NotTested("the manifest records no hashes of these files")
    unknown = {
        f"datasets/{data.folder.name}/{path.name}" for path in data.folder.glob("fineweb_*.bin")
    } - set(known)
    if unknown:
        raise Fault(f"{min(unknown)} is not in the manifest's files")
    cut = manifest.cut(data.root, known)
    if cut:
        raise Fault(f"{cut[0]}: missing, or not of the recorded {known[cut[0]]['size']} bytes")
    with ThreadPoolExecutor() as pool:
        found = dict(zip(known, pool.map(lambda path: sha256(data.root / path), known)))
    for path, digest in found.items():
        if digest != known[path]["sha256"]:
            raise Fault(f"{path}: SHA-256 {digest}, the manifest says {known[path]['sha256']}")
    return f"{len(known)} files have the recorded SHA-256"


def check_tokens(data: Dataset) -> str:
    """Every token below the vocabulary size; each split begins with a document start."""
    size = data.entry["vocab_size"] if data.entry and not data.tokenizer else data.table.vocab_size
    for split, shards in data.shards.items():
        for path, tokens in zip(data.paths(split), shards):
            if tokens.max() >= size:
                raise Fault(f"{path}: token {tokens.max()}, but the vocabulary has {size}")
        if shards and shards[0][0] != data.bos:
            raise Fault(
                f"{data.paths(split)[0]}: begins with token {shards[0][0]}, not the document start "
                f"{data.bos}"
            )
    documents = data.documents_in
    return (
        f"all below {size}; {documents['val']} validation and {documents['train']} training "
        "documents"
    )


def check_tokenizer(data: Dataset) -> str:
    """The tokenizer's file against the manifest: hash, vocabulary, document start."""
    path, table, told = data.tokenizer_path, data.table, data.tokenizer_entry
    here = tg.tokenizer_hash(tg.Config(tokenizer_path=path))
    if not told:
        raise NotTested(
            f"no manifest entry says which tokenizer made these shards (given: {table.name})"
        )
    for entry in (data.entry, told):
        if (table.vocab_size, bos_of(table)) != (entry["vocab_size"], entry["bos_id"]):
            raise Fault(
                f"{path}: {table.vocab_size} tokens, document start {bos_of(table)}; "
                f"the manifest says {entry['vocab_size']}, {entry['bos_id']}"
            )
    wanted = manifest.model_of(data.root, told)
    for recorded in (
        wanted if wanted == "byte260" else told.get("sha256", here),
        data.entry.get("made_from", {}).get("tokenizer_sha256", here),
    ):
        if here != recorded:
            raise Fault(f"{path}: SHA-256 {here}, the manifest says {recorded}")
    if "sha256" not in told and here != "byte260":
        raise NotTested(
            f"the manifest records no hash of {path}; its {table.vocab_size} tokens agree"
        )
    return f"{table.name}, {table.vocab_size} tokens, sha256 {here:.16}"


def check_bytes(data: Dataset) -> str:
    """Bytes charged by the byte table against decoded text, by document.

    All of validation, some of training.
    """
    for split, limit in (("val", None), ("train", 1 << 20)):
        tokens = data.spelled(split, limit)
        outcome = tg.check_bytes(tokens, data.table, data.bos, len(tokens))
        if len(tokens) and outcome.problem:  # training shards may be elsewhere
            raise Fault(f"{split} {outcome.problem}")
    entry = data.entry or {}
    told, text = (entry.get(key, {}).get("val") for key in ("charged_bytes", "text_bytes"))
    if told not in (None, data.charged):
        raise Fault(f"validation charges {data.charged} bytes, {told} when it was made")
    return f"validation charges {data.charged} bytes" + (
        f", its raw text has {text}" if text else ""
    )


def check_published(data: Dataset) -> str:
    """The whole fixed validation set (M1).

    Its documents and, whatever the tokenizer, its bytes of text.
    """
    if not data.folder.name.startswith("fineweb10B_"):
        raise NotTested("not named as the challenge's data (fineweb10B_*)")
    documents, charged = data.documents_in["val"], data.charged
    if documents != VAL_DOCS or abs(charged / VAL_BYTES - 1) > 1e-3:
        raise Fault(
            f"validation has {documents} documents and {charged} bytes; the challenge's has "
            f"{VAL_DOCS} documents and about {VAL_BYTES} bytes"
        )
    return f"validation is the challenge's: {documents} documents, {charged} bytes"


def check_disjoint(data: Dataset) -> str:
    """No training document is a validation document, too (M3), by a hash of each one's tokens."""
    if not data.shards["train"]:
        raise NotTested("there are no training shards")
    seen = {document_hash(part[1:]) for part in data.split_documents("val") if len(part) > 1}
    shared, count = [], 0
    for number, part in enumerate(
        tqdm(data.split_documents("train"), desc="documents", unit="doc", mininterval=1)
    ):
        count += 1
        if document_hash(part[1:]) in seen:
            shared.append(number)
    if shared:
        raise Fault(
            f"{len(shared)} training documents are also validation documents (the first: document "
            f"{shared[0]})"
        )
    return f"no one of {count} training documents is among {len(seen)} validation documents"


def source_of(data: Dataset) -> Corpus:
    """The documents that validation was made from; NotTested if they are not here."""
    paths, told = list(data.documents), (data.entry or {}).get("made_from", {})
    if not paths and (data.root / "docs_selected.jsonl").is_file() and not told:
        paths = [data.root / "docs_selected.jsonl"]
    if not paths:
        raise NotTested("no documents here (--documents gives the files)")
    if not data.documents_in["val"]:
        raise NotTested("validation has no document start")
    every = told.get("val_every")
    return file_corpus(paths, val_docs=None if every else data.documents_in["val"], val_every=every)


def check_documents(data: Dataset) -> str:
    """Validation tokens against the documents, tokenized again one by one.

    Bytes charged against raw bytes.
    """
    raw = charged = number = 0
    parts = data.split_documents("val")
    for number, text in enumerate(source_of(data).documents("val"), 1):
        part, expected = next(parts, None), [data.bos, *data.table.encode(text)]
        if part is None or part.tolist() != expected:
            raise Fault(
                f"validation document {number} is not the text's {number}. document, tokenized: "
                f"{text[:60]!r}"
            )
        raw += len(text.encode())
        charged += int(data.table.count(part).sum(dtype=np.int64))
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
    "published": check_published,
    "documents": check_documents,
    "disjoint": check_disjoint,
}


def identities(data: Dataset) -> list[str]:
    """The lines by which train_gpt.py's log identifies this data; none if it would not read it."""
    with contextlib.suppress(InputError, NotTested, OSError, *DAMAGED):
        cfg = tg.Config(data_path=str(data.folder), tokenizer_path=data.tokenizer_path)
        totals = {split: sum(map(len, shards)) for split, shards in data.shards.items() if shards}
        return [
            tg.tokenizer_identity(cfg, data.table)[1],
            *(tg.shards_identity(cfg, split, total)[1] for split, total in totals.items()),
        ]
    return []


def verify(folder: Path, tokenizer: str = "", documents: Sequence[Path] = ()) -> bool:
    """Prints identities and one line a check; returns whether none failed."""
    if not folder.is_dir():
        raise InputError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    if tokenizer:
        TokenizerPlan(tokenizer).table()
    if documents:
        file_corpus(documents, val_docs=1)
    # Links may lead to or from a manifest.
    places = [Path(os.path.abspath(folder)), folder.resolve()]
    candidates = [Dataset(place, tokenizer, documents) for place in places]
    data, good = next((data for data in candidates if data.entry), candidates[0]), True
    print("".join(f"{line}\n" for line in identities(data)), end="")
    for name, check in CHECKS.items():
        try:
            verdict, text = "PASS", check(data)
        except NotTested as reason:
            verdict, text = "SKIPPED", str(reason)
        except (Fault, InputError, OSError) as fault:
            verdict, text, good = "FAIL", str(fault), False
        except DAMAGED as error:
            verdict, text, good = "FAIL", f"the manifest's entry is damaged ({error!r})", False
        print(f"{name:10} {verdict:8} {text}", flush=True)
    return good
