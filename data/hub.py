"""Fetches published FineWeb shards and their tokenizer from a Hugging Face dataset repository.

    python data/prepare.py fineweb                  # what DATA_PATH names, 80 training shards
    python data/prepare.py fineweb --variant sp8192 --train-shards 10

Repository and names are those of the challenge's own helper (data/ of openai/parameter-golf), whose
files are adopted. A file is downloaded into datasets/.partial under its hash, where a killed call
goes on, and gets its final name by a rename when size, hash and content are right. Final names
appear in order (tokenizer, validation, training shards, documents), so that a call that was
interrupted leaves a first part of the data and never a hole or half a file.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import manifest
from shown import names, shown
from transfer import (
    Downloads,
    Progress,
    RemoteFile,
    Repository,
    check_content,
    digests,
    say,
    size_of,
)

import train_gpt as tg
from train_gpt import InputError, check

Settings = dict[str, Any]

VARIANT = r"byte260|sp[1-9]\d*"
OFFICIAL = "willdepueoai/parameter-golf"
REPOSITORIES = {"sp4096": "kevclark/parameter-golf", "sp8192": "kevclark/parameter-golf"}
TRAIN_SHARDS = 80  # as the official helper
MOST_SHARDS = 10**6  # of a split: a name has six digits
# A tokenizer's files that nothing here needs: fetched if they are there.
EXTRAS = ("vocab_path", "path")
# Of the remote manifest, worth keeping.
TOP_FIELDS = ("docs_meta", "num_docs", "num_val_docs", "shuffle_seed")
DOCUMENTS = ("docs_selected.jsonl", "docs_selected.source_manifest.json")


# --------------------------------------------------------------------------------------------------
# What is asked for
# --------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `prepare.py fineweb`, except --root."""
    parser.add_argument(
        "--variant", help="byte260 or sp<vocabulary size> (default: the one that DATA_PATH names)"
    )
    parser.add_argument(
        "--train-shards",
        type=int,
        metavar="N",
        help=f"the first N training shards (default: {TRAIN_SHARDS}, or all if there are fewer)",
    )
    parser.add_argument(
        "--with-docs", action="store_true", help="also the text, docs_selected.jsonl (48 GB)"
    )
    parser.add_argument(
        "--revision", default="main", help="branch, tag or commit of the repository (default: main)"
    )
    parser.add_argument("--workers", type=int, default=8, help="files at a time (default: 8)")
    parser.add_argument(
        "--replace", action="store_true", help="overwrite valid files of other content"
    )


def folder_of_settings(env: Mapping[str, str]) -> Path:
    """DATA_PATH's folder (default < config file < environment, as for train_gpt.py)."""
    values, problems = tg.read_settings(env)
    for problem in problems:
        check(not problem.startswith("CONFIG="), problem)
    data_path = values.get("data_path", tg.Config.data_path)
    return tg.SCRIPT.parent / data_path


def variant_of(folder: Path) -> str:
    """The variant in a folder's name; InputError if it is none of a published dataset."""
    named = re.fullmatch(rf"fineweb10B_({VARIANT})", folder.name)
    check(
        named,
        f"DATA_PATH={folder}: names no published dataset (fineweb10B_<variant>); --variant chooses "
        "one",
    )
    return named[1]


def root_of(folder: Path) -> Path:
    """The data folder around a folder of shards."""
    check(
        folder.parent.name == "datasets",
        f"DATA_PATH={folder}: expected <folder>/datasets/{folder.name}; --root chooses the folder",
    )
    return folder.parent.parent


@dataclass(frozen=True)
class Request:
    """What is wanted, where it goes and where it comes from."""

    root: Path  # data folder
    variant: str
    train_shards: int | None  # None = the default number
    with_docs: bool
    repo: str
    prefix: str  # the folder of the repository that mirrors the data folder; may be empty
    revision: str

    @property
    def name(self) -> str:
        return f"fineweb10B_{self.variant}"

    @property
    def partial(self) -> Path:
        """Folder of unfinished files on the disk of the shards.

        One a variant, since the lock is one a variant.
        """
        return self.root / "datasets" / ".partial" / self.variant

    @property
    def folder(self) -> str:
        """The shards' folder below the data folder."""
        return f"datasets/{self.name}"

    @property
    def docs(self) -> tuple[str, ...]:
        """The wanted files of text."""
        return DOCUMENTS if self.with_docs else ()

    def shards(self, split: str, count: int) -> list[str]:
        """The first so many shards of a split, below the data folder."""
        return [f"{self.folder}/{tg.shard_name(split, number)}" for number in range(count)]

    def shards_here(self) -> list[str]:
        """All shards that are in their folder, below the data folder."""
        files = sorted((self.root / self.folder).glob(tg.shard_name("*")))
        return [f"{self.folder}/{file.name}" for file in files]

    def paths(
        self, dataset: manifest.Entry, tokenizer: manifest.Entry, train_files: int
    ) -> list[str]:
        """All wanted files below the data folder in the order of their final names.

        Training shards beyond those asked for belong to it if they are here, since training would
        read them.
        """
        first = self.train_shards
        if first is None:
            first = TRAIN_SHARDS
        here = set(self.shards_here())
        train = []
        for number, path in enumerate(self.shards("train", train_files)):
            if number < first or path in here:
                train.append(path)
        val = self.shards("val", dataset["stats"]["files_val"])
        return [*tokenizer_paths(tokenizer), *val, *train, *self.docs]


def request_from(
    root: Path,
    variant: str,
    train_shards: int | None,
    with_docs: bool,
    env: Mapping[str, str],
    revision: str,
) -> Request:
    """A request, its repository by environment or table; InputError for impossible options."""
    check(
        re.fullmatch(VARIANT, variant),
        f"--variant {variant}: expected byte260 or sp<vocabulary size>",
    )
    check(
        train_shards is None or train_shards >= 0,
        f"--train-shards {train_shards}: expected 0 or more",
    )
    repo = env.get("MATCHED_FINEWEB_REPO_ID") or REPOSITORIES.get(variant, OFFICIAL)
    prefix = env.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "datasets").strip("/")
    return Request(root, variant, train_shards, with_docs, repo, prefix, revision)


def tokenizer_paths(tokenizer: manifest.Entry) -> list[str]:
    """The files that a tokenizer's entry names."""
    return [tokenizer[key] for key in ("model_path", *EXTRAS) if tokenizer.get(key)]


def of_split(split: str, paths: Iterable[str]) -> list[str]:
    """Those of the paths that are shards of a split."""
    return [path for path in paths if manifest.shard_number(path, split) is not None]


# --------------------------------------------------------------------------------------------------
# The whole job
# --------------------------------------------------------------------------------------------------


def local_entry(request: Request) -> manifest.Entry:
    """The local manifest's entry if it is of the wanted repository, else one without records."""
    entry = manifest.entry(manifest.read(request.root), "datasets", request.name) or {}
    published = entry.get("published", {})
    source = (published.get("repo_id"), published.get("remote_root"))
    if source != (request.repo, request.prefix):
        return {"files": {}, "published": {"docs": {}}}
    return {**entry, "files": entry.get("files", {}), "published": {"docs": {}, **published}}


def records_of(dataset: manifest.Entry) -> dict[str, manifest.Entry]:
    """Path -> size and SHA-256 of all files of a published dataset, its text among them."""
    return {**dataset["files"], **dataset["published"]["docs"]}


def recorded(request: Request) -> Settings | None:
    """The settings, if the local manifest records every wanted file and no size has changed.

    Asks nobody: a second call needs no network.
    """
    dataset = local_entry(request)
    tokenizers = manifest.read(request.root)
    tokenizer = manifest.entry(tokenizers, "tokenizers", dataset.get("tokenizer_name"))
    if tokenizer is None:
        return None
    with contextlib.suppress(KeyError, TypeError, AttributeError):  # a damaged record is none
        if not complete(request, dataset, tokenizer):
            return None
        needed = manifest.settings(request.root, dataset, tokenizer)
        commit = dataset["published"]["revision"]
        place = request.root / request.folder
        print(f"{place}: already there ({request.repo} at {shown(commit):.12})")
        return needed
    return None


def complete(request: Request, dataset: manifest.Entry, tokenizer: manifest.Entry) -> bool:
    """Whether the entries are of the wanted revision, and record all that is wanted and here."""
    published = dataset["published"]
    if request.revision not in ("main", published["revision"], published["asked_for"]):
        return False
    if max(published["files_train"], dataset["stats"]["files_val"]) > MOST_SHARDS:
        return False
    if (request.train_shards or 0) > published["files_train"]:
        return False  # the hub may have more by now, or says how many there are
    files = records_of(dataset)
    wanted = set(request.paths(dataset, tokenizer, published["files_train"]))
    wanted.update(request.shards_here())
    if not wanted <= set(files):
        return False
    return not manifest.cut(request.root, {path: files[path] for path in wanted})


@dataclass(frozen=True)
class Offer:
    """What the repository has of the variant, and which of it is wanted."""

    dataset: manifest.Entry
    tokenizer: manifest.Entry
    published: manifest.Entry  # where it is from: to be recorded with the dataset
    wanted: list[RemoteFile]  # in the order of their final names


def read_manifest(
    request: Request, source: Repository, top: Mapping[str, RemoteFile]
) -> manifest.Entry:
    """The repository's manifest, not kept."""
    name = f"{source.where}, file {source.remote('manifest.json')}"
    check(
        "manifest.json" in top,
        f"{name}: there is none; MATCHED_FINEWEB_REPO_ID and "
        "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX say where to look",
    )
    file = top["manifest.json"]
    job = Downloads(source, request.partial, [file])
    job.obtain(file)
    text = job.partial(file).read_bytes()
    job.partial(file).unlink()
    remove_empty(request.partial, request.partial.parent)
    return manifest.parsed(text, name)


def remove_empty(*folders: Path) -> None:
    """Removes folders, one after the other, unless something is in them."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def entries(
    request: Request, remote: manifest.Entry, where: str
) -> tuple[manifest.Entry, manifest.Entry]:
    """The manifest's dataset and tokenizer of the variant.

    InputError if a field that is needed is missing.
    """
    dataset = manifest.entry(remote, "datasets", request.name)
    if dataset is None:
        there = sorted(entry["name"].removeprefix("fineweb10B_") for entry in remote["datasets"])
        raise InputError(
            f"--variant {request.variant}: {where} has {names(there) or 'none'}; other "
            "tokenizations are made from the documents (--with-docs) by `prepare.py export`"
        )
    tokenizer = manifest.entry(remote, "tokenizers", dataset.get("tokenizer_name")) or {}
    stats = dataset.get("stats", {})
    for number in (stats.get("files_val"), stats.get("files_train"), tokenizer.get("vocab_size")):
        check(
            isinstance(number, int),
            f"{where}: the manifest's entry {request.name} lacks stats.files_val, "
            "stats.files_train or a tokenizer",
        )
    check(
        request.variant == "byte260" or tokenizer.get("model_path"),
        f"{where}: the manifest's tokenizer {shown(tokenizer.get('name'))} has no model_path",
    )
    return dataset, tokenizer


def check_totals(
    request: Request, dataset: manifest.Entry, wanted: Mapping[str, RemoteFile]
) -> None:
    """InputError unless the shards hold the manifest's number of tokens.

    Of training shards only if all are wanted.
    """
    stats = dataset["stats"]
    for split in ("val", "train"):
        expected = stats.get(f"tokens_{split}")
        shards = of_split(split, wanted)
        if expected is None or len(shards) < stats[f"files_{split}"]:
            continue
        found = 0
        for path in shards:
            found += (wanted[path].size - tg.SHARD_HEADER_BYTES) // 2
        check(
            found == expected,
            f"{request.repo}: the {split} shards of {request.name} have {found} tokens, the "
            f"manifest says {shown(expected)}",
        )


def choose(request: Request, source: Repository) -> Offer:
    """What to fetch; InputError if the repository does not have it, or contradicts itself."""
    top = source.files()
    remote = read_manifest(request, source, top)
    dataset, tokenizer = entries(request, remote, source.where)
    listed = {**top, **source.files("tokenizers"), **source.files(request.folder)}
    train_files = count_train_files(request, source, dataset, listed)
    for key in EXTRAS:
        if key in tokenizer and tokenizer[key] not in listed:
            tokenizer = {**tokenizer}
            del tokenizer[key]
    paths = request.paths(dataset, tokenizer, train_files)
    for path in paths:
        check(path in listed, f"{source.where}: no file {source.remote(path)}")
    for path in request.shards_here():
        check(
            path in paths,
            f"{request.root / path}: not one of the files that {source.where} has, and training "
            "would read it; move it away, or choose another --root",
        )
    check_totals(request, dataset, {path: listed[path] for path in paths})
    hashed = dict(tokenizer)
    model = listed.get(tokenizer.get("model_path", ""))
    if model and model.lfs:
        hashed["sha256"] = model.hash
    manifest.refuse_other_tokenizer(request.root, dataset, hashed)
    published = {
        "repo_id": source.id,
        "revision": source.commit,
        "asked_for": request.revision,
        "remote_root": source.prefix,
        "files_train": train_files,
    }
    for field in TOP_FIELDS:
        if field in remote:
            published[field] = remote[field]
    return Offer(dataset, tokenizer, published, [listed[path] for path in paths])


def count_train_files(
    request: Request, source: Repository, dataset: manifest.Entry, listed: Mapping[str, RemoteFile]
) -> int:
    """How many training shards the repository has, of those that its manifest counts.

    InputError if that is too few, or if validation is not as the manifest says.
    """
    stats = dataset["stats"]
    val_files = len(of_split("val", listed))
    check(
        val_files == stats["files_val"],
        f"{source.where}: {val_files} validation shards of {request.name}, its manifest says "
        f"{stats['files_val']}",
    )
    train_files = min(len(of_split("train", listed)), stats["files_train"])
    asked = request.train_shards
    check(
        asked is None or asked <= train_files,
        f"--train-shards {asked}: {source.where} has {train_files} of {request.name}",
    )
    return train_files


def inspect(
    request: Request, file: RemoteFile, replace: bool, tick: Callable[[int], None]
) -> str | None:
    """SHA-256 of a file that is there and right.

    None if it must be fetched, InputError if it is someone's data.
    """
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
    check(
        replace,
        f"{path}: valid, but not the file of {request.repo}; --replace overwrites it, "
        "--root chooses another folder",
    )
    say(f"{path}: replacing other content")
    return None


def sums_of_present(
    request: Request, wanted: Sequence[RemoteFile], workers: int, replace: bool
) -> dict[str, str]:
    """Path -> SHA-256 of the wanted files that are there already.

    What the local manifest records is not read again.
    """
    known = records_of(local_entry(request))
    sums = {}
    unsure = []
    for file in wanted:
        path = request.root / file.path
        if not path.exists():
            continue
        if known.get(file.path) == {"size": size_of(path), "sha256": file.hash}:
            sums[file.path] = file.hash
        else:
            unsure.append(file)
    progress = Progress("checking what is there", sum(file.size for file in unsure))

    def work(file: RemoteFile) -> str | None:
        return inspect(request, file, replace, progress.add)

    def finish(file: RemoteFile, sha256: str | None) -> None:
        if sha256:
            sums[file.path] = sha256

    progress.run(work, unsure, workers, finish)
    return sums


def fetch_missing(
    request: Request, source: Repository, files: Sequence[RemoteFile], vocab_size: int, workers: int
) -> dict[str, str]:
    """Downloads files; returns path -> SHA-256. InputError if the disk has no room for them."""
    job = Downloads(source, request.partial, files, vocab_size)
    missing = job.progress.left
    free = shutil.disk_usage(request.root / "datasets").free
    check(
        missing <= free,
        f"{request.root}: {missing / 1e9:.3f} GB are still to be downloaded, "
        f"{free / 1e9:.3f} GB are free; --train-shards asks for less, --root for another folder",
    )
    print(
        f"{source.id} at {source.commit:.12}: {len(files)} files, {missing / 1e9:.3f} GB "
        f"to download; {free / 1e9:.3f} GB are free in {request.root}",
        flush=True,
    )
    sums = {}

    def finish(file: RemoteFile, sha256: str) -> None:
        manifest.give_name(job.partial(file), request.root / file.path)
        sums[file.path] = sha256

    job.progress.run(job.obtain, files, workers, finish)
    return sums


def record(request: Request, offer: Offer, sums: Mapping[str, str]) -> None:
    """The manifest's entries.

    Those of the repository, where they are from, every file's size and hash.
    """
    files = {}
    docs = dict(local_entry(request)["published"]["docs"])
    for file in offer.wanted:
        records = docs if file.path in DOCUMENTS else files
        records[file.path] = {"size": file.size, "sha256": sums[file.path]}
    published = {**offer.published, "docs": docs}
    dataset = {**offer.dataset, "published": published, "files": files}
    tokenizer = dict(offer.tokenizer)
    if "model_path" in tokenizer:
        tokenizer["sha256"] = sums[tokenizer["model_path"]]
    unwritable = f"{request.root / 'manifest.json'}: cannot be written"
    with (
        tg.input_error_from(unwritable, OSError),
        manifest.adding(request.root, dataset, tokenizer),
    ):
        pass  # the files have their names already


def download(request: Request, workers: int, replace: bool) -> Settings:
    """Everything that is wanted and not there, then the manifest's entries."""
    source = Repository(request.repo, request.prefix, request.revision)
    offer = choose(request, source)
    sums = sums_of_present(request, offer.wanted, workers, replace)
    todo = [file for file in offer.wanted if file.path not in sums]
    sums.update(fetch_missing(request, source, todo, offer.tokenizer["vocab_size"], workers))
    record(request, offer, sums)
    shutil.rmtree(request.partial, ignore_errors=True)
    remove_empty(request.partial.parent)  # not where another variant is under way
    return manifest.settings(request.root, offer.dataset, offer.tokenizer)


def fetch(
    root: Path,
    variant: str,
    train_shards: int | None,
    with_docs: bool,
    env: Mapping[str, str],
    revision: str = "main",
    workers: int = 8,
    replace: bool = False,
) -> Settings:
    """Fetches a variant's tokenizer, validation and first training shards into the folder `root`.

    train_shards: None = 80, or all if there are fewer; 0 = validation only. env: where the
    repository may be named (MATCHED_FINEWEB_REPO_ID, MATCHED_FINEWEB_REMOTE_ROOT_PREFIX). replace:
    overwrite valid files of other content. Returns the settings of train_gpt.py by name. InputError
    for everything that cannot be done; KeyboardInterrupt leaves when the threads are stopped.
    Several processes may call it at once: one works, the others wait for it.
    """
    check(workers >= 1, f"--workers {workers}: expected 1 or more")
    request = request_from(root, variant, train_shards, with_docs, env, revision)
    found = recorded(request)
    if found is None:
        with manifest.locked(root, request.name):
            found = recorded(request) or download(request, workers, replace)
    return found
