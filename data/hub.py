"""Fetches published FineWeb shards and their tokenizer from a dataset repository of the Hugging Face hub.

    python data/prepare.py fineweb                                       # what DATA_PATH names, 80 training shards
    python data/prepare.py fineweb --variant sp8192 --train-shards 10

Repository and names are those of the challenge's own helper (spec: data, section 3), whose files are adopted. A file is
downloaded into datasets/.partial under its hash, where a killed call goes on, and gets its final name by a rename when
size, hash and content are right. Final names appear in order (tokenizer, validation, training shards, documents), so
that a call that was interrupted leaves a first part of the data and never a hole or half a file.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import json
import os
import queue
import random
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import manifest
from huggingface_hub import HfApi, constants, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, logging, parse_ratelimit_headers
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as tg
from train_gpt import InputError, demand

Settings = dict[str, Any]
T, R = TypeVar("T"), TypeVar("R")

VARIANT = r"byte260|sp[1-9]\d*"
OFFICIAL = "willdepueoai/parameter-golf"
REPOSITORIES = {"sp4096": "kevclark/parameter-golf", "sp8192": "kevclark/parameter-golf"}
TRAIN_SHARDS = 80                   # as the official helper
EXTRAS = ("vocab_path", "path")     # a tokenizer's files that nothing here needs: fetched if they are there
TOP_FIELDS = ("docs_meta", "num_docs", "num_val_docs", "shuffle_seed")     # of the remote manifest, worth keeping

ATTEMPTS = 6                        # in a row that bring not one byte
BACKOFF_SECONDS = 1.0               # the first pause; it doubles
LONGEST_PAUSE = 300.0
STOP_SECONDS = 1.0                  # a thread that waits for the network longer than this ends with the process
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Incomplete(Exception):
    """A download ended without an error and has the wrong size."""


class Stopped(Exception):
    """The job ends; a thread gives up where it is."""


# ----------------------------------------------------------------------------------------------------------------------
# What is asked for
# ----------------------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `prepare.py fineweb`, except --root."""
    parser.add_argument("--variant", help="byte260 or sp<vocabulary size> (default: the one that DATA_PATH names)")
    parser.add_argument("--train-shards", type=int, metavar="N",
                        help=f"the first N training shards (default: {TRAIN_SHARDS}, or all if there are fewer)")
    parser.add_argument("--with-docs", action="store_true", help="also the text, docs_selected.jsonl (48 GB)")
    parser.add_argument("--revision", default="main", help="branch, tag or commit of the repository (default: main)")
    parser.add_argument("--workers", type=int, default=8, help="files at a time (default: 8)")
    parser.add_argument("--replace", action="store_true", help="overwrite valid files of other content")


def folder_of_settings(env: Mapping[str, str]) -> Path:
    """The folder that DATA_PATH names (default < config file < environment, as for train_gpt.py)."""
    values, problems = tg.read_settings(env)
    for problem in problems:
        demand(not problem.startswith("CONFIG="), problem)
    return tg.SCRIPT.parent / values.get("data_path", tg.Config.data_path)


def variant_of(folder: Path) -> str:
    """The variant in a folder's name; InputError if it is none of a published dataset."""
    named = re.fullmatch(rf"fineweb10B_({VARIANT})", folder.name)
    demand(named, f"DATA_PATH={folder}: names no published dataset (fineweb10B_<variant>); --variant chooses one")
    return named[1]


def root_of(folder: Path) -> Path:
    """The data folder around a folder of shards."""
    demand(folder.parent.name == "datasets",
           f"DATA_PATH={folder}: expected <folder>/datasets/{folder.name}; --root chooses the folder")
    return folder.parent.parent


@dataclass(frozen=True)
class Request:
    """What is wanted, where it goes and where it comes from."""

    root: Path                      # data folder
    variant: str
    train_shards: int | None        # None = the default number
    with_docs: bool
    repo: str
    prefix: str                     # the folder of the repository that mirrors the data folder; may be empty
    revision: str

    @property
    def name(self) -> str:
        return f"fineweb10B_{self.variant}"

    @property
    def partial(self) -> Path:
        """Folder of unfinished files on the disk of the shards; one a variant, since the lock is one a variant."""
        return self.root / "datasets" / ".partial" / self.variant

    @property
    def docs(self) -> list[str]:
        return ["docs_selected.jsonl", "docs_selected.source_manifest.json"] * self.with_docs

    def shards(self, split: str, count: int) -> list[str]:
        return [f"datasets/{self.name}/fineweb_{split}_{number:06d}.bin" for number in range(count)]

    def shards_here(self) -> list[str]:
        return [path.relative_to(self.root).as_posix()
                for path in sorted((self.root / "datasets" / self.name).glob("fineweb_*.bin"))]

    def paths(self, dataset: manifest.Entry, tokenizer: manifest.Entry, train_files: int) -> list[str]:
        """All wanted files below the data folder in the order of their final names.

        Training shards beyond those asked for belong to it if they are here, since training would read them.
        """
        first = min(TRAIN_SHARDS, train_files) if self.train_shards is None else self.train_shards
        here = set(self.shards_here())
        train = [path for number, path in enumerate(self.shards("train", train_files))
                 if number < first or path in here]
        return [*tokenizer_paths(tokenizer), *self.shards("val", dataset["stats"]["files_val"]), *train, *self.docs]


def request_from(root: Path, variant: str, train_shards: int | None, with_docs: bool, env: Mapping[str, str],
                 revision: str) -> Request:
    """A request with the repository that environment or table name; InputError for impossible options."""
    demand(re.fullmatch(VARIANT, variant), f"--variant {variant}: expected byte260 or sp<vocabulary size>")
    demand(train_shards is None or train_shards >= 0, f"--train-shards {train_shards}: expected 0 or more")
    repo = env.get("MATCHED_FINEWEB_REPO_ID") or REPOSITORIES.get(variant, OFFICIAL)
    prefix = env.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "datasets").strip("/")
    return Request(root, variant, train_shards, with_docs, repo, prefix, revision)


def tokenizer_paths(tokenizer: manifest.Entry) -> list[str]:
    return [tokenizer[key] for key in ("model_path", *EXTRAS) if tokenizer.get(key)]


def of_split(split: str, paths: Iterable[str]) -> list[str]:
    return [path for path in paths if re.search(rf"/fineweb_{split}_\d+\.bin$", path)]


def settings(request: Request, dataset: manifest.Entry, tokenizer: manifest.Entry) -> Settings:
    """What train_gpt.py needs to use a dataset."""
    model = tokenizer.get("model_path")
    needed = {"DATA_PATH": request.root / "datasets" / request.name,
              "TOKENIZER_PATH": request.root / model if model else "byte260", "VOCAB_SIZE": tokenizer["vocab_size"]}
    return needed if dataset.get("bos_id", 1) == 1 else {**needed, "BOS_ID": dataset["bos_id"]}


# ----------------------------------------------------------------------------------------------------------------------
# Patience
# ----------------------------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """A line on stderr, above the bar."""
    tqdm.write(text, file=sys.stderr)


def is_transient(error: Exception) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    return isinstance(error, httpx2.TransportError | Incomplete)


def reason(error: Exception) -> str:
    if isinstance(error, HfHubHTTPError):
        return f"HTTP status {error.response.status_code}"
    return " ".join(f"{type(error).__name__}: {error}".split())


def pause_after(error: Exception, failures: int) -> float:
    """Seconds until the next attempt: what the server asks for, else twice the last pause, with jitter."""
    pause = BACKOFF_SECONDS * 2 ** (failures - 1) * random.uniform(0.75, 1.25)
    if isinstance(error, HfHubHTTPError):
        asked, limit = error.response.headers.get("Retry-After", ""), parse_ratelimit_headers(error.response.headers)
        if asked.isdigit():
            pause = float(asked)
        elif limit and not limit.remaining:
            pause = float(limit.reset_in_seconds)
    return min(pause, LONGEST_PAUSE)


def explained(error: Exception) -> str:
    """Why a request will not be repeated, and what to do about it."""
    if isinstance(error, OfflineModeIsEnabled):
        return "cannot be asked, HF_HUB_OFFLINE is set, and not all that is wanted is here"
    if isinstance(error, RevisionNotFoundError):
        return "no such revision; --revision takes a branch, a tag or a commit"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403):
        return (f"not found or not open to you ({reason(error)}); MATCHED_FINEWEB_REPO_ID names the repository, "
                "a private or gated one needs HF_TOKEN")
    return reason(error) + ("; the same command goes on where this one stopped" if is_transient(error) else "")


def persist(what: str, operation: Callable[[], R], size: Callable[[], int] = lambda: 0,
            wait: Callable[[float], None] = time.sleep) -> R:
    """The operation's result, after as many attempts as it takes while they still bring something.

    Transient failures are repeated until ATTEMPTS in a row did not let `size` grow; then, and for all others,
    InputError says why.
    """
    failures, reached = 0, size()
    while True:
        try:
            return operation()
        except InputError:
            raise
        except (httpx2.HTTPError, Incomplete, OfflineModeIsEnabled, ValueError) as error:
            failures = 1 if size() > reached else failures + 1
            reached = size()
            if not is_transient(error) or failures >= ATTEMPTS:
                raise InputError(f"{what}: {explained(error)}") from None
            pause = pause_after(error, failures)
            say(f"{what}: {reason(error)}; goes on in {pause:.0f} s")
        wait(pause)


# ----------------------------------------------------------------------------------------------------------------------
# Threads
# ----------------------------------------------------------------------------------------------------------------------


class Progress:
    """One bar in bytes for all threads, and the flag that ends them."""

    def __init__(self, label: str, total: int):
        self.label, self.total, self.left, self.bar = label, total, total, None
        self.stopped, self.lock = threading.Event(), threading.Lock()

    def add(self, count: int) -> None:
        """Books bytes (negative: lost again); Stopped if the job ends."""
        if self.stopped.is_set():
            raise Stopped
        with self.lock:
            self.left -= count
            if self.bar is not None:
                self.bar.update(count)

    def wait(self, seconds: float) -> None:
        if self.stopped.wait(seconds):
            raise Stopped

    def run(self, work: Callable[[T], R], items: Sequence[T], workers: int, finish: Callable[[T, R], None]) -> None:
        """work(item) in threads, finish(item, result) here and in the order of the items; the first failure ends all.

        The threads are daemons: one that waits for the network must not keep an interrupted process alive.
        """
        jobs, done = queue.SimpleQueue(), queue.SimpleQueue()
        for job in enumerate(items):
            jobs.put(job)

        def worker() -> None:
            with contextlib.suppress(queue.Empty):
                while not self.stopped.is_set():
                    number, item = jobs.get_nowait()
                    try:
                        done.put((number, work(item), None))
                    except Exception as error:
                        done.put((number, None, error))

        threads = [threading.Thread(target=worker, daemon=True) for _ in range(min(workers, len(items)))]
        self.bar = tqdm(desc=self.label, total=self.total, initial=self.total - self.left, unit="B", unit_scale=True,
                        mininterval=1, disable=not items)
        results: dict[int, R] = {}
        try:
            for thread in threads:
                thread.start()
            for number, item in enumerate(items):
                while number not in results:
                    finished, result, error = done.get()
                    if error:
                        raise error
                    results[finished] = result
                finish(item, results.pop(number))
        finally:
            self.stop(threads)

    def stop(self, threads: Sequence[threading.Thread]) -> None:
        self.stopped.set()
        deadline = time.monotonic() + STOP_SECONDS
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self.bar.close()


# ----------------------------------------------------------------------------------------------------------------------
# The repository and its files
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RemoteFile:
    path: str                       # below the data folder
    size: int                       # bytes
    hash: str                       # SHA-256 of a large file (LFS), git's SHA-1 of a small one
    lfs: bool


class Repository:
    """A dataset repository at one commit, seen as the data folder that it mirrors."""

    def __init__(self, repo: str, prefix: str, revision: str):
        logging.set_verbosity_error()
        self.id, self.prefix, self.api = repo, prefix, HfApi()
        self.where = f"{constants.ENDPOINT}/datasets/{self.id}"
        self.commit = persist(f"{self.where} at {revision}", lambda: self.api.dataset_info(
            self.id, revision=revision, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT).sha)
        # Compressed bodies have no size that a download could be resumed by.
        self.headers = {**build_hf_headers(), "Accept-Encoding": "identity"}

    def remote(self, path: str) -> str:
        return "/".join(filter(None, (self.prefix, path)))

    def url(self, path: str) -> str:
        return hf_hub_url(self.id, self.remote(path), repo_type="dataset", revision=self.commit)

    def cached(self, path: str) -> Path | None:
        """The file in the hub's own cache."""
        found = try_to_load_from_cache(self.id, self.remote(path), revision=self.commit, repo_type="dataset")
        return Path(found).resolve() if isinstance(found, str) else None

    def files(self, folder: str = "") -> dict[str, RemoteFile]:
        """The files of one folder by their paths below the data folder; none if there is no such folder."""
        def tree() -> list[Any]:
            try:
                return [*self.api.list_repo_tree(self.id, self.remote(folder) or None, repo_type="dataset",
                                                 revision=self.commit)]
            except EntryNotFoundError:
                return []

        listed = {}
        for found in persist(f"{self.where}, folder {self.remote(folder)!r}", tree):
            path = found.path.removeprefix(f"{self.prefix}/")
            if isinstance(found, RepoFile) and path == f"{folder}/{Path(path).name}".lstrip("/"):
                digest = found.lfs.sha256 if found.lfs else found.blob_id
                listed[path] = RemoteFile(path, found.size, digest, found.lfs is not None)
        return listed


def size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def digests(path: Path, lfs: bool, tick: Callable[[int], None]) -> tuple[str, str]:
    """SHA-256 of a file, and its hash of the kind that the hub lists; tick(bytes) on the way."""
    listed = hashlib.sha1(b"blob %d\0" % size_of(path))
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
            if not lfs:
                listed.update(block)
            tick(len(block))
    return sha256.hexdigest(), (sha256 if lfs else listed).hexdigest()


def check_content(path: Path, vocab_size: int | None = None) -> None:
    """InputError unless a shard's header fits its size, and a tokenizer can be read and has that vocabulary."""
    if path.suffix == ".bin":
        tg.read_shard(path)
    elif path.suffix == ".model":
        found = tg.ByteTable.from_sentencepiece(path).vocab_size
        demand(vocab_size in (None, found), f"{path}: {found} tokens, the manifest says {vocab_size}")


class Downloads:
    """Files on their way into the partial folder."""

    def __init__(self, source: Repository, folder: Path, files: Sequence[RemoteFile], vocab_size: int | None = None):
        self.source, self.folder, self.files, self.vocab_size = source, folder, files, vocab_size
        with contextlib.suppress(OSError):          # another file system: the worker copies
            for file in files:
                self.take_cached(file, os.link)
        self.progress = Progress("downloading", sum(file.size for file in files))
        self.progress.add(sum(min(file.size, size_of(self.partial(file))) for file in files))

    def partial(self, file: RemoteFile) -> Path:
        return self.folder / f"{file.hash[:16]}_{Path(file.path).name}"

    def take_cached(self, file: RemoteFile, take: Callable[[Path, Path], Any]) -> int:
        """Links or copies a file from the hub's cache unless a part of it is here already; returns its bytes."""
        cached, partial = self.source.cached(file.path), self.partial(file)
        if not cached or size_of(cached) != file.size or partial.exists():
            return 0
        partial.parent.mkdir(parents=True, exist_ok=True)
        take(cached, partial)
        return file.size

    def transfer(self, file: RemoteFile) -> None:
        """Appends the missing bytes to the partial file; Incomplete if the server sends fewer or more."""
        path, start = self.partial(file), size_of(self.partial(file))
        if start > file.size:
            self.discard(file)
            start = 0
        if start == file.size:
            path.touch()
            return
        headers = {**self.source.headers, **({"Range": f"bytes={start}-"} if start else {})}
        with get_session().stream("GET", self.source.url(file.path), headers=headers,
                                  timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
            hf_raise_for_status(response)
            if start and response.status_code != httpx2.codes.PARTIAL_CONTENT:
                self.discard(file)                  # the whole file comes, from its beginning
            with open(path, "ab", buffering=0) as out:
                for chunk in response.iter_bytes():
                    self.write(out, chunk)
                    if out.tell() > file.size:
                        break
        if size_of(path) != file.size:
            raise Incomplete(f"{size_of(path)} bytes instead of {file.size}")

    def write(self, out: Any, chunk: bytes) -> None:
        """All of a chunk: an unbuffered file takes what fits on the disk, and complains only when nothing fits."""
        rest = memoryview(chunk)
        while rest:
            count = out.write(rest)
            rest = rest[count:]
            self.progress.add(count)

    def discard(self, file: RemoteFile) -> None:
        lost = min(file.size, size_of(self.partial(file)))
        self.partial(file).unlink()
        self.progress.add(-lost)

    def obtain(self, file: RemoteFile) -> str:
        """A file, whole and right, in the partial folder; returns its SHA-256. Wrong content gets a second chance."""
        path, what = self.partial(file), f"{self.source.id}: {file.path}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.progress.add(self.take_cached(file, shutil.copyfile))
            for again in (True, False):
                persist(what, lambda: self.transfer(file), lambda: size_of(path), self.progress.wait)
                sha256, found = digests(path, file.lfs, lambda _: self.progress.add(0))
                if found == file.hash:
                    check_content(path, self.vocab_size)
                    return sha256
                self.discard(file)
                complaint = f"{what}: the content has the hash {found}, the hub lists {file.hash}"
                if again:
                    say(f"{complaint}; downloading it again")
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise InputError(f"{self.folder}: {os.strerror(error.errno)}, {self.progress.left} bytes are still missing;"
                             " what is there is kept, and the same command goes on with it") from None
        raise InputError(f"{complaint}, twice; nothing has its name")


# ----------------------------------------------------------------------------------------------------------------------
# The whole job
# ----------------------------------------------------------------------------------------------------------------------


def local_entry(request: Request) -> manifest.Entry:
    """The local manifest's entry if it is from the wanted repository, else one that records nothing."""
    entry = manifest.entry(manifest.read(request.root), "datasets", request.name) or {}
    published = entry.get("published", {})
    same = (published.get("repo_id"), published.get("remote_root")) == (request.repo, request.prefix)
    return entry if same else {"files": {}, "published": {"docs": {}}}


def recorded(request: Request) -> Settings | None:
    """The settings, if the local manifest records every wanted file and no size has changed.

    Asks nobody: a second call needs no network.
    """
    dataset = local_entry(request)
    published, files = dataset["published"], {**dataset["files"], **dataset["published"]["docs"]}
    tokenizer = manifest.entry(manifest.read(request.root), "tokenizers", dataset.get("tokenizer_name"))
    if not files or tokenizer is None:
        return None
    if request.revision not in ("main", published["revision"], published["asked_for"]):
        return None
    wanted = {*request.paths(dataset, tokenizer, published["files_train"]), *request.shards_here()}
    if not wanted <= set(files) or manifest.cut(request.root, {path: files[path] for path in wanted}):
        return None
    print(f"{request.root / 'datasets' / request.name}: already there ({request.repo} at {published['revision']:.12})")
    return settings(request, dataset, tokenizer)


@dataclass(frozen=True)
class Offer:
    """What the repository has of the variant, and which of it is wanted."""

    dataset: manifest.Entry
    tokenizer: manifest.Entry
    published: manifest.Entry                   # where it is from: to be recorded with the dataset
    wanted: list[RemoteFile]                    # in the order of their final names


def read_manifest(request: Request, source: Repository, top: Mapping[str, RemoteFile]) -> manifest.Entry:
    """The repository's manifest, not kept."""
    name = f"{source.where}, file {source.remote('manifest.json')}"
    demand("manifest.json" in top, f"{name}: there is none; MATCHED_FINEWEB_REPO_ID and "
           "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX say where to look")
    job = Downloads(source, request.partial, [top["manifest.json"]])
    job.obtain(top["manifest.json"])
    with tg.refusing(f"{name}: not JSON", ValueError):
        found = json.loads(job.partial(top["manifest.json"]).read_bytes())
    return manifest.checked(found, name)


def entries(request: Request, remote: manifest.Entry, where: str) -> tuple[manifest.Entry, manifest.Entry]:
    """The manifest's dataset and tokenizer of the variant; InputError if a field that is needed is missing."""
    dataset = manifest.entry(remote, "datasets", request.name)
    if dataset is None:
        there = ", ".join(sorted(entry["name"].removeprefix("fineweb10B_") for entry in remote["datasets"]))
        raise InputError(f"--variant {request.variant}: {where} has {there}; other tokenizations are made from the "
                         "documents (--with-docs) by `prepare.py export`")
    tokenizer = manifest.entry(remote, "tokenizers", dataset.get("tokenizer_name"))
    stats = dataset.get("stats") or {}
    numbers = [stats.get("files_val"), stats.get("files_train"), (tokenizer or {}).get("vocab_size")]
    demand(all(isinstance(number, int) for number in numbers),
           f"{where}: the manifest's entry {request.name} lacks stats.files_val, stats.files_train or a tokenizer")
    demand(request.variant == "byte260" or tokenizer.get("model_path"),
           f"{where}: the manifest's tokenizer {tokenizer['name']} has no model_path")
    return dataset, tokenizer


def check_totals(request: Request, dataset: manifest.Entry, wanted: Mapping[str, RemoteFile]) -> None:
    """InputError unless the shards hold the manifest's number of tokens; of training only if all are wanted."""
    for split in ("val", "train"):
        shards = of_split(split, wanted)
        expected = dataset["stats"].get(f"tokens_{split}")
        found = sum((wanted[path].size - tg.SHARD_HEADER_BYTES) // 2 for path in shards)
        demand(len(shards) < dataset["stats"][f"files_{split}"] or expected in (None, found), f"{request.repo}: the "
               f"{split} shards of {request.name} have {found} tokens, the manifest says {expected}")


def choose(request: Request, source: Repository) -> Offer:
    """What to fetch; InputError if the repository does not have it, or contradicts itself."""
    top = source.files()
    remote = read_manifest(request, source, top)
    dataset, tokenizer = entries(request, remote, source.where)
    docs = {path: top[path] for path in request.docs if path in top}
    listed = {**docs, **source.files("tokenizers"), **source.files(f"datasets/{request.name}")}
    val_files, train_files = (len(of_split(split, listed)) for split in ("val", "train"))
    demand(val_files == dataset["stats"]["files_val"], f"{source.where}: {val_files} validation shards of "
           f"{request.name}, its manifest says {dataset['stats']['files_val']}")
    train_files = min(train_files, dataset["stats"]["files_train"])
    demand((request.train_shards or 0) <= train_files,
           f"--train-shards {request.train_shards}: {source.where} has {train_files} of {request.name}")
    tokenizer = {key: value for key, value in tokenizer.items() if key not in EXTRAS or value in listed}
    paths = request.paths(dataset, tokenizer, train_files)
    for path in paths:
        demand(path in listed, f"{source.where}: no file {source.remote(path)}")
    for path in request.shards_here():
        demand(path in paths, f"{request.root / path}: not one of the files that {source.where} has, and training "
               "would read it; move it away, or choose another --root")
    check_totals(request, dataset, {path: listed[path] for path in paths})
    published = {"repo_id": source.id, "revision": source.commit, "asked_for": request.revision,
                 "remote_root": source.prefix, "files_train": train_files,
                 **{field: remote[field] for field in TOP_FIELDS if field in remote}}
    return Offer(dataset, tokenizer, published, [listed[path] for path in paths])


def inspect(request: Request, file: RemoteFile, replace: bool, tick: Callable[[int], None]) -> str | None:
    """SHA-256 of a file that is there and right; None if it must be fetched, InputError if it is someone's data."""
    path = request.root / file.path
    if size_of(path) == file.size:
        sha256, found = digests(path, file.lfs, tick)
        if found == file.hash:
            return sha256
    try:
        check_content(path)
    except InputError as error:
        say(f"{error}; downloading it again")
        return None
    demand(replace, f"{path}: valid, but not the file of {request.repo}; --replace overwrites it, "
           "--root chooses another folder")
    say(f"{path}: replacing other content")
    return None


def sums_of_present(request: Request, wanted: Sequence[RemoteFile], workers: int, replace: bool) -> dict[str, str]:
    """Path -> SHA-256 of the wanted files that are there already. What the local manifest records is not read again."""
    entry = local_entry(request)
    known = {**entry["files"], **entry["published"]["docs"]}
    present = [file for file in wanted if (request.root / file.path).exists()]
    sums = {file.path: file.hash for file in present if known.get(file.path) ==
            {"size": size_of(request.root / file.path), "sha256": file.hash}}
    unsure = [file for file in present if file.path not in sums]
    progress = Progress("checking what is there", sum(file.size for file in unsure))
    progress.run(lambda file: inspect(request, file, replace, progress.add), unsure, workers,
                 lambda file, sha256: sums.update({file.path: sha256} if sha256 else {}))
    return sums


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


def fetch_missing(request: Request, source: Repository, files: Sequence[RemoteFile], vocab_size: int,
                  workers: int) -> dict[str, str]:
    """Downloads files; returns path -> SHA-256. InputError if the disk has no room for them."""
    job = Downloads(source, request.partial, files, vocab_size)
    free, sums = shutil.disk_usage(request.root / "datasets").free, {}
    demand(job.progress.left <= free, f"{request.root}: {job.progress.left / 1e9:.3f} GB are still to be downloaded, "
           f"{free / 1e9:.3f} GB are free; --train-shards asks for less, --root for another folder")
    print(f"{source.id} at {source.commit:.12}: {len(files)} files, {job.progress.left / 1e9:.3f} GB to download; "
          f"{free / 1e9:.3f} GB are free in {request.root}", flush=True)

    def finish(file: RemoteFile, sha256: str) -> None:
        give_name(job.partial(file), request.root / file.path)
        sums[file.path] = sha256

    job.progress.run(job.obtain, files, workers, finish)
    return sums


def record(request: Request, offer: Offer, sums: Mapping[str, str]) -> None:
    """The manifest's entries: those of the repository, where they are from, every file's size and hash."""
    files = {file.path: {"size": file.size, "sha256": sums[file.path]} for file in offer.wanted}
    docs = {path: files.pop(path) for path in request.docs}
    published = {**offer.published, "docs": {**local_entry(request)["published"]["docs"], **docs}}
    model = offer.tokenizer.get("model_path")
    with tg.refusing(f"{request.root / 'manifest.json'}: cannot be written", OSError):
        manifest.add(request.root, datasets={**offer.dataset, "published": published, "files": files},
                     tokenizers={**offer.tokenizer, **({"sha256": sums[model]} if model else {})})


def download(request: Request, workers: int, replace: bool) -> Settings:
    """Everything that is wanted and not there, then the manifest's entries."""
    source = Repository(request.repo, request.prefix, request.revision)
    offer = choose(request, source)
    sums = sums_of_present(request, offer.wanted, workers, replace)
    todo = [file for file in offer.wanted if file.path not in sums]
    sums.update(fetch_missing(request, source, todo, offer.tokenizer["vocab_size"], workers))
    record(request, offer, sums)
    shutil.rmtree(request.partial, ignore_errors=True)
    with contextlib.suppress(OSError):              # another variant is under way
        request.partial.parent.rmdir()
    return settings(request, offer.dataset, offer.tokenizer)


def fetch(root: Path, variant: str, train_shards: int | None, with_docs: bool, env: Mapping[str, str],
          revision: str = "main", workers: int = 8, replace: bool = False) -> Settings:
    """Fetches a variant's tokenizer, validation and first training shards into the data folder `root`.

    train_shards: None = 80, or all if there are fewer; 0 = validation only. env: where the repository may be named
    (MATCHED_FINEWEB_REPO_ID, MATCHED_FINEWEB_REMOTE_ROOT_PREFIX). replace: overwrite valid files of other content.
    Returns the settings of train_gpt.py by name. InputError for everything that cannot be done; KeyboardInterrupt
    leaves when the threads are stopped. Several processes may call it at once: one works, the others wait for it.
    """
    demand(workers >= 1, f"--workers {workers}: expected 1 or more")
    request = request_from(root, variant, train_shards, with_docs, env, revision)
    found = recorded(request)
    if found is None:
        with manifest.locked(root, request.name):
            found = recorded(request) or download(request, workers, replace)
    return found
