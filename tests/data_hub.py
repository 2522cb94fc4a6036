"""A hub with published shards, a data folder, and real processes that fetch into it."""

import contextlib
import errno
import functools
import io
import json
import multiprocessing
import os
import pydoc_data.topics
import re
import resource
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
from conftest import ROOT, clean_env
from fake_hub import FakeHub

import train_gpt as tg

OFFICIAL = "willdepueoai/parameter-golf"  # the repositories of the tool's table
COMMUNITY = "kevclark/parameter-golf"
FOLDER = "datasets/fineweb10B_sp1024"
MODEL = "tokenizers/fineweb_1024_bpe.model"
MODEL_LIST = MODEL.replace(".model", ".vocab")
DOCUMENTS = ["docs_selected.jsonl", "docs_selected.source_manifest.json"]
VOCAB = 400
VAL_SIZES = (30, 20)  # tokens of the sample repository's shards
TRAIN_SIZES = (100, 101, 102, 103, 104)
TRAIN = len(TRAIN_SIZES)
TESTS = Path(__file__).resolve().parent
MODULES = os.pathsep.join(map(str, (TESTS, ROOT, ROOT / "data")))  # a path to import all of them
PATIENCE = 120  # seconds after which a test gives up waiting

# --------------------------------------------------------------------------------------------------
# What the hub has
# --------------------------------------------------------------------------------------------------


@functools.cache
def small_model() -> bytes:
    """A small SentencePiece model of the official recipe."""
    written = io.BytesIO()
    texts = [*pydoc_data.topics.topics.values()][:3]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(" ".join(text.split()) for text in texts),
        model_writer=written,
        model_type="bpe",
        vocab_size=VOCAB,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        max_sentence_length=1 << 20,
    )
    return written.getvalue()


def shard(count, seed=0) -> bytes:
    """A shard of random tokens."""
    tokens = np.random.default_rng(seed).integers(0, VOCAB, count)
    return tg.shard_header(count) + tokens.astype("<u2").tobytes()


def published(variant="sp1024", val=VAL_SIZES, train=TRAIN_SIZES, **changes):
    """A repository's files below its data folder.

    val, train: tokens of the shards; changes: of the manifest's stats.
    """
    folder = f"datasets/fineweb10B_{variant}"
    files = {}
    for split, sizes in (("val", val), ("train", train)):
        for number, size in enumerate(sizes):
            path = f"{folder}/{tg.shard_name(split, number)}"
            files[path] = shard(size, seed=1000 * len(split) + number)
    tokenizer = {"name": f"tok_{variant}", "bos_id": 1, "eos_id": 2}
    if variant == "byte260":
        tokenizer["kind"] = "byte"
        tokenizer["vocab_size"] = 260
        tokenizer["path"] = "tokenizers/pure_byte_260.json"
        files[tokenizer["path"]] = b"{}\n"
    else:
        name = f"tokenizers/fineweb_{variant.removeprefix('sp')}_bpe"
        tokenizer["vocab_size"] = VOCAB
        tokenizer["model_path"] = f"{name}.model"
        tokenizer["vocab_path"] = f"{name}.vocab"
        files[f"{name}.model"] = small_model()
        files[f"{name}.vocab"] = b"<pad>\t0\n"
    stats = {
        "files_val": len(val),
        "files_train": len(train),
        "tokens_val": sum(val),
        "tokens_train": sum(train),
    }
    dataset = {
        "name": f"fineweb10B_{variant}",
        "tokenizer_name": tokenizer["name"],
        "path": folder,
        "vocab_size": tokenizer["vocab_size"],
        "bos_id": 1,
        "stats": {**stats, **changes},
    }
    manifest = {"version": "10B", "num_docs": 7, "shuffle_seed": 1337}
    manifest["tokenizers"] = [tokenizer]
    manifest["datasets"] = [dataset]
    files["manifest.json"] = json.dumps(manifest).encode()
    files["docs_selected.jsonl"] = b'{"text": "a"}\n' * 50
    files["docs_selected.source_manifest.json"] = b"{}\n"
    return files


def remote(path) -> str:
    """A path below the data folder, as the repositories have it."""
    return f"datasets/{path}"


def below(files):
    """The files of a data folder as a repository has them."""
    return {remote(path): content for path, content in files.items()}


def train(number) -> str:
    """A training shard's path below the data folder."""
    return f"{FOLDER}/{tg.shard_name('train', number)}"


# --------------------------------------------------------------------------------------------------
# Processes that fetch from it
# --------------------------------------------------------------------------------------------------


@dataclass
class Call:
    """The arguments of one process that fetches."""

    root: str
    env: dict[str, str]
    variant: str = "sp1024"
    train_shards: int | None = None
    with_docs: bool = False
    options: dict = field(default_factory=dict)  # of hub.fetch
    free: float = 0  # bytes that shutil.disk_usage reports; 0 = the truth
    links: bool = True  # whether files can be hard-linked
    largest: int = 0  # bytes that a file may have (RLIMIT_FSIZE); 0 = any
    val_docs: int = 0  # documents that validation must have (verify.VAL_DOCS); 0 = the challenge's

    @property
    def script(self) -> str:
        """For `python -c`, in World.script_env."""
        return (
            "import os, sys, data_hub\nfrom data_hub import Call\n"
            f"call = {replace(self, env={})}\n"
            "call.env = dict(os.environ)\nsys.exit(data_hub.drive(call))"
        )


def no_links(*paths) -> None:
    raise OSError(errno.EXDEV, "another file system")


def drive(call: Call) -> int:
    """Fetches, prints, returns the exit code as prepare.py does. Only for a process of its own."""
    os.environ.clear()
    os.environ.update(call.env)
    import hub  # not before: it reads HF_ENDPOINT
    import transfer
    import verify

    transfer.BACKOFF_SECONDS = 0.01
    if call.free:
        shutil.disk_usage = lambda path: SimpleNamespace(free=call.free)
    if not call.links:
        os.link = no_links
    if call.largest:
        resource.setrlimit(resource.RLIMIT_FSIZE, (call.largest, call.largest))
    if call.val_docs:
        verify.VAL_DOCS = call.val_docs
    wanted = (call.variant, call.train_shards, call.with_docs)
    try:
        found = hub.fetch(Path(call.root), *wanted, call.env, **call.options)
    except (tg.InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 64
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(" ".join(f"{name}={value}" for name, value in found.items()))
    return 0


def drive_apart(call: Call, log: Path) -> None:
    """What a process does: drive, with its words in the files log.out and log.err."""
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    sys.exit(drive(call))


@functools.cache
def forkserver():
    """Starts processes as forks of one that has imported train_gpt: a second each time saved."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data_hub"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", MODULES)
        multiprocessing.forkserver.ensure_running()
    return context


class Running:
    """A process that fetches."""

    def __init__(self, call: Call, log: Path):
        self.log = log
        self.process = forkserver().Process(target=drive_apart, args=(call, log))
        self.process.start()

    @property
    def out(self) -> str:
        """What it has printed so far."""
        file = Path(f"{self.log}.out")
        return file.read_text() if file.exists() else ""

    def wait(self):
        """How it ended: code, out, err."""
        self.process.join(PATIENCE)
        if self.process.exitcode is None:
            self.process.kill()
            pytest.fail("still running")
        out = self.out
        err = Path(f"{self.log}.err").read_text()
        assert "Traceback" not in err, err
        return SimpleNamespace(code=self.process.exitcode, out=out, err=err)

    def send(self, number: int):
        """Sends a signal; how it ended."""
        os.kill(self.process.pid, number)
        return self.wait()

    def kill(self) -> None:
        assert self.send(signal.SIGKILL).code == -signal.SIGKILL


class World:
    """One hub, one data folder, and the processes of a test."""

    def __init__(self, hub: FakeHub, folder: Path):
        self.hub = hub
        self.root = folder / "data"
        self.folder = folder
        self.started = 0
        self.env = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(folder / "hf"),
            "HF_HUB_DOWNLOAD_TIMEOUT": "600",  # longer than a test waits for the client
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        for name, text in clean_env().items():
            if not name.startswith(("HF_", "MATCHED_")):
                self.env.setdefault(name, text)
        self.script_env = {**self.env, "PYTHONPATH": MODULES}

    def call(self, env=None, **arguments) -> Call:
        return Call(str(self.root), {**self.env, **(env or {})}, **arguments)

    def start(self, **arguments) -> Running:
        self.started += 1
        return Running(self.call(**arguments), self.folder / f"process{self.started}")

    def run(self, code=0, **arguments):
        done = self.start(**arguments).wait()
        assert done.code == code, done.err
        return done

    def refused(self, **arguments) -> str:
        """The error's text."""
        done = self.run(code=64, **arguments)
        errors = re.findall(r"^error: (.*)", done.err, re.MULTILINE)
        assert len(errors) == 1
        return errors[0]

    def serve(self, files, repository=OFFICIAL) -> None:
        """Gives a repository these files (below its data folder) instead of those it has."""
        self.hub.repositories[repository] = below(files)

    @property
    def remote(self) -> dict[str, bytes]:
        """The official repository's files below its data folder."""
        files = self.hub.repositories[OFFICIAL]
        return {path.removeprefix("datasets/"): content for path, content in files.items()}

    @property
    def here(self) -> dict[str, bytes]:
        """Everything below the data folder but the manifest and the lock."""
        found = {}
        for path in sorted(self.root.rglob("*")):
            if path.is_file() and path.name != "manifest.json" and path.suffix != ".lock":
                found[path.relative_to(self.root).as_posix()] = path.read_bytes()
        return found

    @property
    def finished(self) -> dict[str, bytes]:
        """What has its final name."""
        here = self.here
        return {path: here[path] for path in here if not path.startswith("datasets/.partial")}

    def wanted(self, train_shards=TRAIN, docs=False) -> dict[str, bytes]:
        """What a call fetches."""
        names = [MODEL, MODEL_LIST]
        names += [f"{FOLDER}/{tg.shard_name('val', n)}" for n in range(len(VAL_SIZES))]
        names += [train(n) for n in range(train_shards)]
        if docs:
            names += DOCUMENTS
        remote = self.remote
        return {name: remote[name] for name in sorted(names)}

    def ranges(self, path) -> list[str | None]:
        """The Range headers of all GETs of a file of the data folder."""
        return self.hub.gets(remote(path))

    def spoil(self, path, *faults) -> None:
        """Orders faults for the next GETs of a file of the data folder."""
        self.hub.faults[remote(path)] = list(faults)

    def manifest(self):
        return json.loads((self.root / "manifest.json").read_text())

    def dataset(self, name="fineweb10B_sp1024"):
        for entry in self.manifest()["datasets"]:
            if entry["name"] == name:
                return entry
        raise AssertionError(f"no entry {name}")

    def write(self, files):
        for path, content in files.items():
            (self.root / path).parent.mkdir(parents=True, exist_ok=True)
            (self.root / path).write_bytes(content)

    def resize(self, number, count):
        """Gives a training shard so many tokens, so that it takes a while."""
        sizes = list(TRAIN_SIZES)
        sizes[number] = count
        self.serve(published(train=sizes))

    def partial_bytes(self, number) -> int:
        """Size of a training shard on its way; 0 before and after."""
        name = f"*_{tg.shard_name('train', number)}"
        with contextlib.suppress(FileNotFoundError):  # it just got its final name
            for path in self.root.glob(f"datasets/.partial/**/{name}"):
                return path.stat().st_size
        return 0


@contextlib.contextmanager
def new_world(folder: Path):
    """A World whose hub has the official repository."""
    with FakeHub({OFFICIAL: below(published())}) as hub:
        yield World(hub, folder)


def until(holds) -> None:
    """Waits for a condition."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)
