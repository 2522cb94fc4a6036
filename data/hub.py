"""Fetches published FineWeb shards and their tokenizer from a Hugging Face dataset repository.

    python data/prepare.py fineweb                  # what DATA_PATH names, 80 training shards
    python data/prepare.py fineweb --variant sp8192 --train-shards 10
    python data/prepare.py fineweb --variant sp8192_caseops

Repository and names are those of the challenge's own helper (data/ of openai/parameter-golf), whose
files are adopted. A file is downloaded into datasets/.partial under its hash, where a killed call
goes on, and gets its final name by a rename when size, hash and content are right. Final names
appear in order (tokenizer, validation, training shards, documents), so that a call that was
interrupted leaves a first part of the data and never a hole or half a file. The files of an export
with case markers wait for theirs until all are there and its splits are known to be apart.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import export
import manifest
import verify
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


@dataclass(frozen=True)
class CaseExport:
    """A published export of text with case markers, whose names follow a rule of its own."""

    name: str  # of the dataset
    model: str  # the tokenizer, below the data folder
    transform: str  # one of train_gpt.CASE_TRANSFORMS


VARIANT = r"byte260|sp[1-9]\d*"
CASE_EXPORTS = {
    "sp8192_caseops": CaseExport(
        "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved",
        "tokenizers/fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model",
        "caseops",
    )
}
VARIANTS = f"byte260, sp<vocabulary size> or {' or '.join(CASE_EXPORTS)}"  # in words
OFFICIAL = "willdepueoai/parameter-golf"
REPOSITORIES = {
    "sp4096": "kevclark/parameter-golf",
    "sp8192": "kevclark/parameter-golf",
    "sp8192_caseops": "romeerp/parameter-golf-caseops-v1",
}
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
    parser.add_argument("--variant", help=f"{VARIANTS} (default: the one that DATA_PATH names)")
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
    """DATA_PATH's folder, as train_gpt.py finds it: DEFAULTS < config file < environment."""
    values, problems = tg.read_settings(env)
    for problem in problems:
        check(not problem.startswith("CONFIG="), problem)
    told = tg.filled(values).data_path
    try:
        return tg.find_path(told)
    except InputError:  # it will be made
        return tg.SCRIPT.parent / told


def variant_of(folder: Path) -> str:
    """The variant in a folder's name; InputError if it is none of a published dataset."""
    for variant, case in CASE_EXPORTS.items():
        if folder.name == case.name:
            return variant
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
    def case(self) -> CaseExport | None:
        """What is known of the variant if its text has case markers."""
        return CASE_EXPORTS.get(self.variant)

    @property
    def name(self) -> str:
        return self.case.name if self.case else f"fineweb10B_{self.variant}"

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
        val_files = dataset["stats"]["files_val"]
        val = self.shards("val", val_files)
        if self.case:
            val += self.shards(tg.CHARGES, val_files)
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
        variant in CASE_EXPORTS or re.fullmatch(VARIANT, variant),
        f"--variant {variant}: expected {VARIANTS}",
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
    damaged = (InputError, KeyError, TypeError, AttributeError)
    with contextlib.suppress(*damaged):  # a damaged record is none
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
    request: Request, source: Repository, listed: Mapping[str, RemoteFile]
) -> manifest.Entry:
    """The repository's manifest, not kept."""
    name = f"{source.where}, file {source.remote('manifest.json')}"
    check(
        "manifest.json" in listed,
        f"{name}: there is none; MATCHED_FINEWEB_REPO_ID and "
        "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX say where to look",
    )
    file = listed["manifest.json"]
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
        manifest.in_bytes(tokenizer) or tokenizer.get("model_path"),
        f"{where}: the manifest's tokenizer {shown(tokenizer.get('name'))} has no model_path, "
        "expected one, or kind byte",
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
    listed = {**source.files(), **source.files("tokenizers"), **source.files(request.folder)}
    remote: manifest.Entry = {}
    if request.case and "manifest.json" not in listed:
        dataset, tokenizer = listed_entries(request, source, listed)
    else:
        remote = read_manifest(request, source, listed)
        dataset, tokenizer = entries(request, remote, source.where)
    if request.case:
        check_told(source.where, request.case, remote, dataset, tokenizer)
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
    if request.case:
        check_side_files(request, source, dataset, listed)
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
    for name in TOP_FIELDS:
        if name in remote:
            published[name] = remote[name]
    return Offer(dataset, tokenizer, published, [listed[path] for path in paths])


def listed_entries(
    request: Request, source: Repository, listed: Mapping[str, RemoteFile]
) -> tuple[manifest.Entry, manifest.Entry]:
    """Dataset and tokenizer of a case export as far as the names of its files tell them.

    For a repository without a manifest. InputError if there is no validation shard.
    """
    files = {f"files_{split}": len(of_split(split, listed)) for split in verify.SPLITS}
    (first,) = request.shards("val", 1)
    check(files["files_val"], f"{source.where}: no file {source.remote(first)}")
    tokenizer = {"name": Path(request.case.model).stem, "model_path": request.case.model}
    dataset = {"name": request.name, "tokenizer_name": tokenizer["name"], "stats": files}
    return dataset, tokenizer


def check_told(
    where: str,
    case: CaseExport,
    remote: manifest.Entry,
    dataset: manifest.Entry,
    tokenizer: manifest.Entry,
) -> None:
    """InputError if a manifest says that this is no export of the challenge's, or another one."""
    for name, told in (
        ("docs_val", dataset["stats"].get("docs_val")),
        ("num_val_docs", remote.get("num_val_docs")),
    ):
        check(
            told in (None, verify.VAL_DOCS),
            f"{where}: the manifest says {name} {shown(told)} for {case.name}; the challenge "
            f"validates on the first {verify.VAL_DOCS} documents, and no others are allowed",
        )
    told = tokenizer.get("case_transform", case.transform)
    check(
        told == case.transform,
        f"{where}: the manifest says case_transform {shown(told)} for {case.name}, expected "
        f"{case.transform}",
    )


def check_side_files(
    request: Request,
    source: Repository,
    dataset: manifest.Entry,
    listed: Mapping[str, RemoteFile],
) -> None:
    """InputError unless each validation shard's byte side file has its length."""
    count = dataset["stats"]["files_val"]
    for path, shard in zip(request.shards(tg.CHARGES, count), request.shards("val", count)):
        check(
            listed[path].size == listed[shard].size,
            f"{source.where}: file {source.remote(path)} has {listed[path].size} bytes; it needs "
            f"the {listed[shard].size} of {Path(shard).name}, a byte count for each token",
        )


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


@dataclass(frozen=True)
class Arrived(verify.Dataset):
    """Shards of a case export under their final names or, until then, in the partial folder."""

    files: Mapping[str, list[Path]] = field(default_factory=dict)  # by split
    bos = 1  # of the published shards, whatever an older manifest here says

    def paths(self, split: str) -> list[Path]:
        return self.files[split]


@dataclass(frozen=True)
class Review:
    """What a case export must be before its files get their final names."""

    request: Request
    offer: Offer
    job: Downloads
    missing: Sequence[RemoteFile]  # that the job brings

    @property
    def validation_paths(self) -> list[str]:
        """All wanted files but the training shards and the text."""
        wanted = [file.path for file in self.offer.wanted]
        later = {*of_split("train", wanted), *DOCUMENTS}
        return [path for path in wanted if path not in later]

    def place(self, path: str) -> Path:
        """Where a wanted file is by now."""
        for file in self.missing:
            if file.path == path:
                return self.job.partial(file)
        return self.request.root / path

    def data(self, *splits: str) -> Arrived:
        """These splits as verify.py sees them, the others empty."""
        wanted = [file.path for file in self.offer.wanted]
        files: dict[str, list[Path]] = {split: [] for split in verify.SPLITS}
        for split in splits:
            files[split] = [self.place(path) for path in of_split(split, wanted)]
        return Arrived(self.request.root / self.request.folder, "", (), files=files)

    @contextlib.contextmanager
    def refusing(self, allowed: str) -> Iterator[None]:
        """What verify.py finds wrong inside is refused: an InputError."""
        try:
            yield
        except (verify.Fault, verify.NotTested) as problem:
            raise InputError(
                f"{self.request.repo}: {problem}, but {allowed}; nothing new has its final name, "
                f"what came is kept in {self.request.partial}"
            ) from None

    def validation(self) -> Offer:
        """The offer with all that its tokenizer and side files tell.

        InputError unless validation is the challenge's in number, and its tokenizer has markers.
        """
        data = self.data("val", tg.CHARGES)
        with self.refusing(f"the challenge's validation is its first {verify.VAL_DOCS} documents"):
            found = data.documents_in["val"]
            if found != verify.VAL_DOCS:
                raise verify.Fault(f"validation has {found} documents (token {data.bos})")
        path = self.offer.tokenizer["model_path"]
        model = export.tokenizer_entry(self.place(path), self.request.case.transform)
        tokenizer = {**model, **self.offer.tokenizer}
        dataset = {**export.dataset_entry(self.request.name, tokenizer), **self.offer.dataset}
        charged = tg.charged_by(data.paths(tg.CHARGES))
        told = {"val": charged, **dataset.get("charged_bytes", {})}
        with self.refusing(f"the manifest says {shown(told['val'])}"):
            if told["val"] != charged:
                raise verify.Fault(f"the byte side files charge {charged} bytes")
        dataset["charged_bytes"] = told
        return Offer(dataset, tokenizer, self.offer.published, self.offer.wanted)

    def training(self) -> None:
        """InputError if a training document is a validation document."""
        data = self.data(*verify.SPLITS)
        if not data.paths("train"):
            return
        with self.refusing("none may be"):
            print(f"{self.request.name}: {verify.check_disjoint(data)}", flush=True)


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
    request: Request,
    job: Downloads,
    files: Sequence[RemoteFile],
    workers: int,
    arrived: Callable[[RemoteFile, str], None],
) -> None:
    """Downloads files into the partial folder; arrived(file, SHA-256) for each, in their order.

    InputError if the disk has no room for them.
    """
    missing = job.progress.left
    free = shutil.disk_usage(request.root / "datasets").free
    check(
        missing <= free,
        f"{request.root}: {missing / 1e9:.3f} GB are still to be downloaded, "
        f"{free / 1e9:.3f} GB are free; --train-shards asks for less, --root for another folder",
    )
    print(
        f"{job.source.id} at {job.source.commit:.12}: {len(files)} files, {missing / 1e9:.3f} GB "
        f"to download; {free / 1e9:.3f} GB are free in {request.root}",
        flush=True,
    )
    job.progress.run(job.obtain, files, workers, arrived)


def fetch_reviewed(
    review: Review, workers: int, give_name: Callable[[RemoteFile, str], None]
) -> Offer:
    """Downloads what is missing of a case export; names are given when all is found to be right.

    Returns the offer with complete entries. InputError for what a review refuses: validation is
    looked at before the training shards have come.
    """
    came: list[tuple[RemoteFile, str]] = []
    first = [file for file in review.missing if file.path in review.validation_paths]

    def arrived(file: RemoteFile, sha256: str) -> None:
        came.append((file, sha256))
        if len(came) == len(first):
            review.validation()

    if not first:
        review.validation()
    fetch_missing(review.request, review.job, review.missing, workers, arrived)
    offer = review.validation()
    review.training()
    for file, sha256 in came:
        give_name(file, sha256)
    return offer


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
    job = Downloads(source, request.partial, todo, offer.tokenizer.get("vocab_size"))

    def give_name(file: RemoteFile, sha256: str) -> None:
        manifest.give_name(job.partial(file), request.root / file.path)
        sums[file.path] = sha256

    if request.case:
        offer = fetch_reviewed(Review(request, offer, job, todo), workers, give_name)
    else:
        fetch_missing(request, job, todo, workers, give_name)
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
