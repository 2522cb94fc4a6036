"""Downloads from a Hugging Face dataset repository.

They end whole, or go on where they stopped. `Repository` lists the files of one commit with sizes
and hashes; `Downloads` brings files into a folder of partial files; `persist` repeats what a
network may spoil; `Progress` runs threads that stop at once. Knows nothing of datasets.
"""

# Not hf_hub_download (2.4.0), which begins again after a kill and compares no hash: 10 fault
# tests (test_transfer.py, test_hub.py) fail with it, 5 with its http_get, for 19 and 16 lines less.

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import queue
import random
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx2
from bars import blocks_of
from huggingface_hub import HfApi, constants, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import (
    build_hf_headers,
    get_session,
    hf_raise_for_status,
    logging,
    parse_ratelimit_headers,
)
from shown import LONGEST_LINE
from tqdm import tqdm

import train_gpt as tg
from train_gpt import InputError, check, printable

T = TypeVar("T")
R = TypeVar("R")

ATTEMPTS = 6  # in a row that bring not one byte
BACKOFF_SECONDS = 1.0  # the first pause; it doubles
LONGEST_PAUSE = 300.0
STOP_SECONDS = 1.0  # a thread that waits for the network longer than this ends with the process
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Incomplete(Exception):
    """A download ended without an error and has the wrong size."""


class Stopped(Exception):
    """The job ends; a thread gives up where it is."""


# --------------------------------------------------------------------------------------------------
# Patience
# --------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """A line on stderr, above the bar."""
    tqdm.write(printable(text, LONGEST_LINE), file=sys.stderr)


def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed a little later."""
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return status in (408, 429) or status >= 500
    return isinstance(error, httpx2.TransportError | Incomplete)


def reason(error: Exception) -> str:
    """What happened, in one line."""
    if isinstance(error, HfHubHTTPError):
        return f"HTTP status {error.response.status_code}"
    return " ".join(f"{type(error).__name__}: {error}".split())


def pause_after(error: Exception, failures: int) -> float:
    """Seconds until the next attempt.

    What the server asks for, else twice the last pause, with jitter.
    """
    pause = BACKOFF_SECONDS * 2 ** (failures - 1) * random.uniform(0.75, 1.25)
    if isinstance(error, HfHubHTTPError):
        asked = error.response.headers.get("Retry-After", "")
        limit = parse_ratelimit_headers(error.response.headers)
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
    if is_refusal(error):
        return (
            f"not found or not open to you ({reason(error)}); MATCHED_FINEWEB_REPO_ID names the "
            "repository, a private or gated one needs HF_TOKEN"
        )
    if is_transient(error):
        return f"{reason(error)}; the same command goes on where this one stopped"
    return reason(error)


def is_refusal(error: Exception) -> bool:
    """Whether the hub says that there is no such repository for this user."""
    if isinstance(error, RepositoryNotFoundError):
        return True
    return isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403)


def no_bytes() -> int:
    """The size of what brings no file."""
    return 0


def persist(
    what: str,
    operation: Callable[[], R],
    size: Callable[[], int] = no_bytes,
    wait: Callable[[float], None] = time.sleep,
) -> R:
    """The operation's result, after as many attempts as it takes while they still bring something.

    Transient failures are repeated until ATTEMPTS in a row did not let `size` grow; then, and for
    all others, InputError says why. wait: sleeps for so many seconds, or raises to give up.
    """
    failures = 0
    reached = size()
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


# --------------------------------------------------------------------------------------------------
# Threads
# --------------------------------------------------------------------------------------------------


class Progress:
    """One bar in bytes for all threads, and the flag that ends them."""

    def __init__(self, label: str, total: int):
        self.label = label
        self.total = total  # bytes
        self.left = total
        self.bar: tqdm | None = None
        self.stopped = threading.Event()
        self.lock = threading.Lock()

    def add(self, count: int) -> None:
        """Books bytes (negative: lost again); Stopped if the job ends."""
        if self.stopped.is_set():
            raise Stopped
        with self.lock:
            self.left -= count
            if self.bar is not None:
                self.bar.update(count)

    def wait(self, seconds: float) -> None:
        """Sleeps; Stopped as soon as the job ends."""
        if self.stopped.wait(seconds):
            raise Stopped

    def run(
        self,
        work: Callable[[T], R],
        items: Sequence[T],
        workers: int,
        finish: Callable[[T, R], None],
    ) -> None:
        """work(item) in threads, finish(item, result) here and in the order of the items.

        The first failure ends all. The threads are daemons: one that waits for the network must not
        keep an interrupted process alive.
        """
        jobs = queue.SimpleQueue()
        done = queue.SimpleQueue()
        for job in enumerate(items):
            jobs.put(job)
        threads = []
        for _ in range(min(workers, len(items))):
            arguments = (work, jobs, done)
            threads.append(threading.Thread(target=self.worker, args=arguments, daemon=True))
        self.bar = tqdm(
            desc=self.label,
            total=self.total,
            initial=self.total - self.left,
            unit="B",
            unit_scale=True,
            mininterval=1,
            disable=not items,
        )
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

    def worker(
        self, work: Callable[[T], R], jobs: queue.SimpleQueue, done: queue.SimpleQueue
    ) -> None:
        """A thread: takes (number, item) from jobs, puts (number, result, error) into done."""
        while not self.stopped.is_set():
            try:
                number, item = jobs.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((number, work(item), None))
            except Exception as error:
                done.put((number, None, error))

    def stop(self, threads: Sequence[threading.Thread]) -> None:
        self.stopped.set()
        deadline = time.monotonic() + STOP_SECONDS
        for thread in threads:
            if thread.is_alive():  # not one that an interrupt kept from starting
                thread.join(max(0.0, deadline - time.monotonic()))
        self.bar.close()


# --------------------------------------------------------------------------------------------------
# The repository and its files
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RemoteFile:
    path: str  # below the data folder
    size: int  # bytes
    hash: str  # SHA-256 of a large file (LFS), git's SHA-1 of a small one
    lfs: bool


class Repository:
    """A dataset repository at one commit, seen as the data folder that it mirrors."""

    def __init__(self, repo: str, prefix: str, revision: str):
        logging.set_verbosity_error()
        self.id = repo
        self.prefix = prefix  # its folder that mirrors the data folder; may be empty
        self.api = HfApi()
        self.where = f"{constants.ENDPOINT}/datasets/{repo}"

        def commit() -> str:
            timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
            return self.api.dataset_info(repo, revision=revision, timeout=timeout).sha

        self.commit = persist(f"{self.where} at {revision}", commit)
        # Compressed bodies have no size that a download could be resumed by.
        self.headers = {**build_hf_headers(), "Accept-Encoding": "identity"}

    def remote(self, path: str) -> str:
        """A path below the data folder, seen from the top of the repository."""
        return f"{self.prefix}/{path}".strip("/")

    def url(self, path: str) -> str:
        return hf_hub_url(self.id, self.remote(path), repo_type="dataset", revision=self.commit)

    def cached(self, path: str) -> Path | None:
        """The file in the hub's own cache."""
        found = try_to_load_from_cache(
            self.id, self.remote(path), revision=self.commit, repo_type="dataset"
        )
        return Path(found).resolve() if isinstance(found, str) else None

    def files(self, folder: str = "") -> dict[str, RemoteFile]:
        """The files of one folder by their paths below the data folder.

        Empty if there is no such folder.
        """
        place = self.remote(folder)

        def tree() -> list[Any]:
            asked = dict(repo_type="dataset", revision=self.commit)
            try:
                return list(self.api.list_repo_tree(self.id, place or None, **asked))
            except EntryNotFoundError:
                return []

        listed = {}
        for found in persist(f"{self.where}, folder {place!r}", tree):
            name = Path(found.path).name
            if isinstance(found, RepoFile) and found.path == f"{place}/{name}".lstrip("/"):
                path = f"{folder}/{name}".lstrip("/")
                digest = found.lfs.sha256 if found.lfs else found.blob_id
                listed[path] = RemoteFile(path, found.size, digest, found.lfs is not None)
        return listed


def size_of(path: Path) -> int:
    """Bytes of a file; 0 if there is none."""
    return path.stat().st_size if path.is_file() else 0


def digests(path: Path, lfs: bool, tick: Callable[[int], None]) -> tuple[str, str]:
    """SHA-256 of a file, and its hash of the kind that the hub lists; tick(bytes) on the way."""
    sha256 = hashlib.sha256()
    git_sha1 = hashlib.sha1(b"blob %d\0" % size_of(path))
    for block in blocks_of(path, tick):
        sha256.update(block)
        if not lfs:
            git_sha1.update(block)
    listed = sha256 if lfs else git_sha1
    return sha256.hexdigest(), listed.hexdigest()


def check_content(path: Path, vocab_size: int | None = None) -> None:
    """InputError unless the file is right.

    A shard's header must fit its size; a tokenizer must be readable and have that vocabulary.
    """
    if path.suffix == ".bin":
        tg.read_shard(path)
    elif path.suffix == ".model":
        found = tg.ByteTable.from_sentencepiece(path).vocab_size
        check(
            vocab_size in (None, found), f"{path}: {found} tokens, the manifest says {vocab_size}"
        )


class Downloads:
    """Files on their way into the partial folder."""

    def __init__(
        self,
        source: Repository,
        folder: Path,
        files: Sequence[RemoteFile],
        vocab_size: int | None = None,
    ):
        self.source = source
        self.folder = folder
        self.vocab_size = vocab_size
        with contextlib.suppress(OSError):  # another file system: the worker copies
            for file in files:
                self.take_cached(file, os.link)
        self.progress = Progress("downloading", sum(file.size for file in files))
        for file in files:
            self.progress.add(min(file.size, size_of(self.partial(file))))

    def partial(self, file: RemoteFile) -> Path:
        """Where a file grows: by its hash, so that another version does not continue it."""
        return self.folder / f"{file.hash[:16]}_{Path(file.path).name}"

    def take_cached(self, file: RemoteFile, take: Callable[[Path, Path], Any]) -> int:
        """Links or copies a file from the hub's cache unless a part of it is here already.

        Returns its bytes.
        """
        cached = self.source.cached(file.path)
        partial = self.partial(file)
        if not cached or size_of(cached) != file.size or partial.exists():
            return 0
        partial.parent.mkdir(parents=True, exist_ok=True)
        take(cached, partial)
        return file.size

    def transfer(self, file: RemoteFile) -> None:
        """Appends the missing bytes to the partial file; Incomplete if fewer or more are sent."""
        path = self.partial(file)
        start = size_of(path)
        if start > file.size:
            self.discard(file)
            start = 0
        if start == file.size:
            path.touch()
            return
        headers = dict(self.source.headers)
        if start:
            headers["Range"] = f"bytes={start}-"
        url = self.source.url(file.path)
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
            hf_raise_for_status(response)
            if start and response.status_code != httpx2.codes.PARTIAL_CONTENT:
                self.discard(file)  # the whole file comes, from its beginning
            self.append(file, response.iter_bytes())
        if size_of(path) != file.size:
            raise Incomplete(f"{size_of(path)} bytes instead of {file.size}")

    def append(self, file: RemoteFile, chunks: Iterable[bytes]) -> None:
        """Adds chunks to the partial file until there are too many bytes."""
        with open(self.partial(file), "ab", buffering=0) as out:
            for chunk in chunks:
                self.write(out, chunk)
                if out.tell() > file.size:
                    return

    def write(self, out: Any, chunk: bytes) -> None:
        """Writes all of a chunk.

        An unbuffered file takes what fits on the disk, and complains only when nothing fits.
        """
        rest = memoryview(chunk)
        while rest:
            count = out.write(rest)
            rest = rest[count:]
            self.progress.add(count)

    def discard(self, file: RemoteFile) -> None:
        """Removes the partial file, and takes its bytes back from the bar."""
        lost = min(file.size, size_of(self.partial(file)))
        self.partial(file).unlink()
        self.progress.add(-lost)

    def obtain(self, file: RemoteFile) -> str:
        """A file, whole and right, in the partial folder; returns its SHA-256.

        Wrong content gets a second chance. InputError if it cannot be had, or the disk is full.
        """
        try:
            self.partial(file).parent.mkdir(parents=True, exist_ok=True)
            self.progress.add(self.take_cached(file, shutil.copyfile))
            return self.attempt(file, last=False) or self.attempt(file, last=True)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise InputError(
                f"{self.folder}: {os.strerror(error.errno)}, {self.progress.left} bytes are still "
                "missing; what is there is kept, and the same command goes on with it"
            ) from None

    def attempt(self, file: RemoteFile, last: bool) -> str | None:
        """Downloads what is missing; returns the SHA-256 of a file whose content is right.

        Wrong content is removed: None, or on the last attempt an InputError.
        """
        path = self.partial(file)
        what = f"{self.source.id}: {file.path}"

        def transfer() -> None:
            self.transfer(file)

        def size() -> int:
            return size_of(path)

        def tick(count: int) -> None:
            self.progress.add(0)  # the bytes are booked already; it ends with the job

        persist(what, transfer, size, self.progress.wait)
        sha256, found = digests(path, file.lfs, tick)
        if found == file.hash:
            check_content(path, self.vocab_size)
            return sha256
        self.discard(file)
        complaint = f"{what}: the content has the hash {found}, the hub lists {file.hash}"
        check(not last, f"{complaint}, twice; nothing has its name")
        say(f"{complaint}; downloading it again")
        return None
