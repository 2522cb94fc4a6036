"""Published shards downloaded by real processes from a hub that misbehaves (tests/fake_hub.py)."""

import contextlib
import errno
import io
import json
import multiprocessing
import os
import pydoc_data.topics
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
from conftest import ROOT, TINY_RUN, clean_env
from fake_hub import FakeHub, Fault, commit_of

import train_gpt as tg

OFFICIAL, COMMUNITY = "willdepueoai/parameter-golf", "kevclark/parameter-golf"  # the table's
FOLDER, MODEL, VOCAB = "datasets/fineweb10B_sp1024", "tokenizers/fineweb_1024_bpe.model", 400
TESTS = Path(__file__).resolve().parent
TRAIN = 5  # training shards of the sample repository

# --------------------------------------------------------------------------------------------------
# What the hub has
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    """A small SentencePiece model of the official recipe."""
    written = io.BytesIO()
    sentences = (" ".join(text.split()) for text in list(pydoc_data.topics.topics.values())[:3])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences,
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


def shard(count, seed=0):
    return (
        tg.shard_header(count)
        + np.random.default_rng(seed).integers(0, VOCAB, count).astype("<u2").tobytes()
    )


def published(
    variant="sp1024", model=None, val=(30, 20), train=tuple(range(100, 100 + TRAIN)), **changes
):
    """A repository's files below its data folder.

    val, train: tokens of the shards; changes: of the stats.
    """
    name, vocab = f"fineweb10B_{variant}", VOCAB if model else 260
    shards = {
        f"datasets/{name}/fineweb_{split}_{n:06d}.bin": shard(count, seed=1000 * len(split) + n)
        for split, counts in (("val", val), ("train", train))
        for n, count in enumerate(counts)
    }
    path = (
        f"tokenizers/fineweb_{variant.removeprefix('sp')}_bpe.model"
        if model
        else "tokenizers/pure_byte_260.json"
    )
    tokenizer = {
        "name": f"tok_{variant}",
        "vocab_size": vocab,
        "bos_id": 1,
        "eos_id": 2,
        **(
            {"model_path": path, "vocab_path": path.replace(".model", ".vocab")}
            if model
            else {"path": path}
        ),
    }
    files = (
        {path: model, path.replace(".model", ".vocab"): b"<pad>\t0\n"} if model else {path: b"{}\n"}
    )
    stats = {
        "files_val": len(val),
        "files_train": len(train),
        "tokens_val": sum(val),
        "tokens_train": sum(train),
    }
    entry = {
        "name": name,
        "tokenizer_name": tokenizer["name"],
        "path": f"datasets/{name}",
        "vocab_size": vocab,
        "bos_id": 1,
        "stats": {**stats, **changes},
    }
    manifest = {
        "version": "10B",
        "num_docs": 7,
        "shuffle_seed": 1337,
        "tokenizers": [tokenizer],
        "datasets": [entry],
    }
    return {
        **shards,
        **files,
        "manifest.json": json.dumps(manifest).encode(),
        "docs_selected.jsonl": b'{"text": "a"}\n' * 50,
        "docs_selected.source_manifest.json": b"{}\n",
    }


def below(prefix, files):
    return {f"{prefix}/{path}": content for path, content in files.items()}


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

    @property
    def script(self) -> str:
        """For `python -c`, in the environment that the call names."""
        return (
            f"import os, sys; sys.path.insert(0, {str(TESTS)!r})\nimport test_hub\n"
            f"from test_hub import Call\ncall = {replace(self, env={})}\n"
            "call.env = dict(os.environ)\nsys.exit(test_hub.drive(call))"
        )


def no_links(*paths) -> None:
    raise OSError(errno.EXDEV, "another file system")


def drive(call: Call) -> int:
    """Fetches, prints, returns the exit code as prepare.py does. Only for a process of its own."""
    os.environ.clear()
    os.environ.update(call.env)
    sys.path.insert(0, str(ROOT / "data"))
    import hub  # not before: it reads HF_ENDPOINT
    import transfer

    transfer.BACKOFF_SECONDS = 0.01
    if call.free:
        shutil.disk_usage = lambda path: SimpleNamespace(free=call.free)
    if not call.links:
        os.link = no_links
    if call.largest:
        resource.setrlimit(resource.RLIMIT_FSIZE, (call.largest, call.largest))
    try:
        found = hub.fetch(
            Path(call.root),
            call.variant,
            call.train_shards,
            call.with_docs,
            call.env,
            **call.options,
        )
        print(" ".join(f"{name}={value}" for name, value in found.items()))
        return 0
    except (tg.InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 64
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def drive_apart(call: Call, log: str) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.exit(drive(call))


@pytest.fixture(scope="module")
def processes():
    """Starts processes as forks of one that has imported train_gpt: a second each time saved."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_hub"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), str(ROOT)]))
        multiprocessing.forkserver.ensure_running()
    return context


class Running:
    def __init__(self, context, call: Call, log: Path):
        self.log, self.process = log, context.Process(target=drive_apart, args=(call, str(log)))
        self.process.start()

    def wait(self):
        self.process.join(60)
        if self.process.exitcode is None:
            self.process.kill()
            pytest.fail("still running")
        out, err = (
            self.log.with_name(f"{self.log.name}.{name}").read_text() for name in ("out", "err")
        )
        assert "Traceback" not in err, err
        return SimpleNamespace(code=self.process.exitcode, out=out, err=err)

    def send(self, number: int):
        """Sends a signal; returns how the process ended, with the seconds that it took."""
        start = time.monotonic()
        os.kill(self.process.pid, number)
        return SimpleNamespace(**vars(self.wait()), seconds=time.monotonic() - start)


class World:
    """One hub, one data folder, and the processes of a test."""

    def __init__(self, processes, hub, folder: Path):
        self.processes = processes
        self.hub = hub
        self.root = folder / "data"
        self.folder = folder
        self.started = 0
        outer = {
            name: text
            for name, text in clean_env().items()
            if not name.startswith(("HF_", "MATCHED_"))
        }
        self.env = {
            **outer,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(folder / "hf"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def call(self, env=None, **arguments) -> Call:
        return Call(str(self.root), {**self.env, **(env or {})}, **arguments)

    def start(self, **arguments) -> Running:
        self.started += 1
        return Running(
            self.processes, self.call(**arguments), self.folder / f"process{self.started}"
        )

    def run(self, code=0, **arguments):
        done = self.start(**arguments).wait()
        assert done.code == code, done.err
        return done

    def refused(self, **arguments) -> str:
        """The error's text."""
        errors = re.findall(r"^error: (.*)", self.run(code=64, **arguments).err, re.MULTILINE)
        assert len(errors) == 1
        return errors[0]

    @property
    def remote(self) -> dict[str, bytes]:
        """The official repository's files below its data folder."""
        return {
            path.removeprefix("datasets/"): content
            for path, content in self.hub.repositories[OFFICIAL].items()
        }

    @property
    def here(self) -> dict[str, bytes]:
        """Everything below the data folder but the manifest and the lock."""
        return {
            path.relative_to(self.root).as_posix(): path.read_bytes()
            for path in sorted(self.root.rglob("*"))
            if path.is_file() and path.name != "manifest.json" and not path.name.endswith(".lock")
        }

    @property
    def finished(self) -> dict[str, bytes]:
        return {
            path: content
            for path, content in self.here.items()
            if not path.startswith("datasets/.partial")
        }

    def wanted(self, train=TRAIN, docs=False) -> dict[str, bytes]:
        names = [
            MODEL,
            MODEL.replace(".model", ".vocab"),
            *(f"{FOLDER}/fineweb_val_{n:06d}.bin" for n in range(2)),
            *(f"{FOLDER}/fineweb_train_{n:06d}.bin" for n in range(train)),
            *["docs_selected.jsonl", "docs_selected.source_manifest.json"] * docs,
        ]
        return {name: self.remote[name] for name in sorted(names)}

    def manifest(self):
        return json.loads((self.root / "manifest.json").read_text())

    def dataset(self, name="fineweb10B_sp1024"):
        return next(entry for entry in self.manifest()["datasets"] if entry["name"] == name)

    def write(self, files):
        for path, content in files.items():
            (self.root / path).parent.mkdir(parents=True, exist_ok=True)
            (self.root / path).write_bytes(content)

    def resize(self, path, count):
        """Gives a training shard so many tokens, so that it takes a while."""
        index = int(path[-10:-4])
        sizes = [100 + n for n in range(TRAIN)]
        sizes[index] = count
        model = self.remote[MODEL]
        self.hub.repositories[OFFICIAL] = below("datasets", published(model=model, train=sizes))


@pytest.fixture
def world(processes, model, tmp_path):
    with FakeHub({OFFICIAL: below("datasets", published(model=model))}) as hub:
        yield World(processes, hub, tmp_path)


def remote(path):
    return f"datasets/{path}"


def train(number):
    return f"{FOLDER}/fineweb_train_{number:06d}.bin"


def until(holds, seconds=20):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def partial_bytes(world, number):
    """Size of a training shard on its way; 0 before and after."""
    with contextlib.suppress(FileNotFoundError):  # it just got its final name
        for path in world.root.glob(f"datasets/.partial/**/*_fineweb_train_{number:06d}.bin"):
            return path.stat().st_size
    return 0


# --------------------------------------------------------------------------------------------------
# What is fetched
# --------------------------------------------------------------------------------------------------


def test_everything_is_fetched_and_a_second_call_asks_nobody(world):
    done = subprocess.run(
        [sys.executable, "-c", world.call().script],
        capture_output=True,
        text=True,
        env=world.env,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert world.here == world.wanted()  # nothing else, no .partial
    wanted = (
        f"DATA_PATH={world.root / FOLDER} TOKENIZER_PATH={world.root / MODEL} VOCAB_SIZE={VOCAB}"
    )
    assert done.stdout.splitlines()[-1] == wanted
    assert f"{len(world.wanted())} files" in done.stdout and "error" not in done.stderr
    assert all(world.hub.gets(remote(path)) == [None] for path in world.wanted())
    entry, asked = world.dataset(), len(world.hub.requests)
    commit = commit_of(world.hub.repositories[OFFICIAL])
    assert entry["published"] == {
        "repo_id": OFFICIAL,
        "revision": commit,
        "asked_for": "main",
        "remote_root": "datasets",
        "docs": {},
        "files_train": TRAIN,
        "num_docs": 7,
        "shuffle_seed": 1337,
    }
    assert entry["files"].keys() == world.wanted().keys()
    assert all(
        known["sha256"] == tg.sha256(world.root / path) for path, known in entry["files"].items()
    )
    assert world.manifest()["tokenizers"][0]["sha256"] == tg.sha256(world.root / MODEL)
    again = world.run()
    assert "already there" in again.out and again.out.splitlines()[-1] == wanted
    assert len(world.hub.requests) == asked


def test_number_of_training_shards(world):
    assert "-1: expected 0 or more" in world.refused(train_shards=-1)
    world.run(train_shards=0)
    assert world.here == world.wanted(train=0)
    world.run(train_shards=2)
    assert world.here == world.wanted(train=2)
    assert f"--train-shards 6: {world.hub.url}/datasets/{OFFICIAL} has {TRAIN}" in world.refused(
        train_shards=6
    )
    assert "already there" in world.run(train_shards=1).out  # fewer than there are
    world.run()
    world.run(train_shards=0)
    assert world.here == world.wanted() and world.dataset()["files"].keys() == world.wanted().keys()
    assert [len(world.hub.gets(remote(path))) for path in world.wanted()] == [1] * len(
        world.wanted()
    )


def test_eighty_training_shards_by_default(world, model):
    world.hub.repositories[OFFICIAL] = below("datasets", published(model=model, train=[1] * 83))
    world.run()
    assert world.here == world.wanted(train=80)


def test_the_folder_of_the_official_helper_is_adopted(world):
    world.write({**world.wanted(train=3), "manifest.json": world.remote["manifest.json"]})
    world.run(train_shards=1)
    assert not any(world.hub.gets(remote(path)) for path in world.wanted())
    # Those that are there belong to it.
    assert world.dataset()["files"].keys() == world.wanted(train=3).keys()
    before = len(world.hub.requests)
    world.run(train_shards=3)
    assert len(world.hub.requests) == before


def test_a_tokenizers_folder_on_another_disk(world, tmp_path):
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system")
    with tempfile.TemporaryDirectory(dir=elsewhere) as folder:
        world.root.mkdir()
        (world.root / "tokenizers").symlink_to(folder)
        world.run()
        assert (world.root / MODEL).read_bytes() == world.remote[MODEL]
        assert sorted(os.listdir(folder)) == sorted(
            Path(path).name for path in world.wanted() if "tokenizers" in path
        )


def test_a_tokenizer_without_a_vocabulary_list(world):
    """Only the model is needed: a repository may lack the rest of what its manifest names."""
    del world.hub.repositories[OFFICIAL][remote(MODEL.replace(".model", ".vocab"))]
    world.run()
    assert (
        train(0) in world.here
        and MODEL in world.here
        and not any(path.endswith(".vocab") for path in world.here)
    )
    assert "already there" in world.run().out


def test_fetch_then_train(world, tmp_path):
    """The README's two commands, with a repository of real text in bytes.

    The second takes what the first made.
    """
    text = tmp_path / "docs.jsonl"
    documents = dict.fromkeys(pydoc_data.topics.topics.values())
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))

    def command(script, *args, **env):
        return subprocess.run(
            [sys.executable, str(ROOT / script), *map(str, args)],
            capture_output=True,
            text=True,
            env={**world.env, **env},
            timeout=120,
            check=False,
        )

    made = tmp_path / "made"
    done = command(
        "data/prepare.py",
        "export",
        text,
        "--name",
        "fineweb10B_byte260",
        "--root",
        made,
        "--tokenizer",
        "byte260",
        "--val-docs",
        5,
    )
    assert done.returncode == 0, done.stderr
    files = {
        path.relative_to(made).as_posix(): path.read_bytes()
        for path in made.rglob("*.*")
        if path.suffix in (".bin", ".json")
    }
    world.hub.repositories[OFFICIAL] = below("datasets", files)
    place = {"DATA_PATH": str(tmp_path / "data/datasets/fineweb10B_byte260")}
    done = command("data/prepare.py", "fineweb", **place)
    assert done.returncode == 0, done.stderr
    needed = dict(pair.split("=") for pair in done.stdout.splitlines()[-1].split())
    assert needed == {**place, "TOKENIZER_PATH": "byte260", "VOCAB_SIZE": "260"}
    settings = {
        **TINY_RUN,
        **needed,
        "SMOKE": "0",
        "OUT_DIR": str(tmp_path / "out"),
        "EVAL_STRIDE": "0",
    }
    done = command("train_gpt.py", **settings, DEVICE="cpu")
    assert done.returncode == 0 and "val_loader:dataset:fineweb10B_byte260" in done.stdout, (
        done.stderr
    )
    checked = command("data/prepare.py", "verify", place["DATA_PATH"], "--documents", text)
    verdicts = dict(re.findall(r"^(\w+) +(PASS|FAIL|SKIPPED)", checked.stdout, re.MULTILINE))
    # Far too little text.
    assert [name for name, verdict in verdicts.items() if verdict == "FAIL"] == ["published"]
    assert {verdict for name, verdict in verdicts.items() if name != "published"} == {"PASS"}, (
        checked.stdout
    )


def test_recorded_files_are_not_read_again(world):
    """Their size is enough: hashing 16 GB takes minutes. `prepare.py verify` reads them."""
    world.run(train_shards=1)
    spoiled = world.remote[train(0)][:-1] + b"?"
    world.write({train(0): spoiled})
    world.run(train_shards=2)
    assert world.here == {**world.wanted(train=2), train(0): spoiled}


def test_byte260(world):
    world.hub.repositories[OFFICIAL] = below("datasets", published("byte260"))
    done = world.run(variant="byte260")
    assert done.out.splitlines()[-1] == (
        f"DATA_PATH={world.root}/datasets/fineweb10B_byte260 TOKENIZER_PATH=byte260 VOCAB_SIZE=260"
    )
    assert len(world.here) == 2 + TRAIN + 1


def test_documents(world):
    world.run(train_shards=1)
    world.run(train_shards=1, with_docs=True)
    assert world.here == world.wanted(train=1, docs=True)
    assert set(world.dataset()["published"]["docs"]) == {
        "docs_selected.jsonl",
        "docs_selected.source_manifest.json",
    }
    world.run(train_shards=2)
    before = len(world.hub.requests)
    world.run(with_docs=True, train_shards=2)
    assert len(world.hub.requests) == before


def test_environment_names_repository_and_prefix(world, model):
    world.hub.repositories = {"me/mine": published(model=model)}  # at the top of the repository
    world.run(env={"MATCHED_FINEWEB_REPO_ID": "me/mine", "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX": ""})
    assert world.here.keys() == {
        path
        for path in world.hub.repositories["me/mine"]
        if path != "manifest.json" and not path.startswith("docs")
    }
    assert "no-name" in world.refused(env={"MATCHED_FINEWEB_REPO_ID": "no-name/x/y"})


def test_a_revision(world):
    commit = commit_of(world.hub.repositories[OFFICIAL])
    world.run(options={"revision": commit}, train_shards=1)
    before = len(world.hub.requests)
    for revision in ("main", commit):
        assert "already there" in world.run(options={"revision": revision}, train_shards=1).out
    assert len(world.hub.requests) == before
    assert "at v9" in world.refused(options={"revision": "v9"}, train_shards=1)


def test_two_repositories_in_one_folder(world, model):
    world.hub.repositories[COMMUNITY] = below("datasets", published("sp8192", model))
    world.run(train_shards=1)
    world.run(train_shards=1, variant="sp8192")
    assert len(world.hub.gets("datasets/manifest.json")) == 2
    assert [
        world.dataset(f"fineweb10B_{v}")["published"]["repo_id"] for v in ("sp1024", "sp8192")
    ] == [OFFICIAL, COMMUNITY]
    assert {entry["name"] for entry in world.manifest()["tokenizers"]} == {
        "tok_sp1024",
        "tok_sp8192",
    }
    before = len(world.hub.requests)
    assert "already there" in world.run(train_shards=1).out and len(world.hub.requests) == before


@pytest.mark.parametrize("links", [True, False])
def test_files_in_the_hubs_own_cache_are_linked_or_copied(world, links):
    repository = world.hub.repositories[OFFICIAL]
    cache = (
        world.folder
        / "hf/hub/datasets--willdepueoai--parameter-golf/snapshots"
        / commit_of(repository)
    )
    for path in (remote(train(0)), remote(train(1)), remote(train(2))):
        (cache / path).parent.mkdir(parents=True, exist_ok=True)
        (cache / path).write_bytes(repository[path])
    # A spoiled one.
    (cache / remote(train(1))).write_bytes(bytes(len(repository[remote(train(1))])))
    (cache / remote(train(2))).write_bytes(b"cut")
    world.run(train_shards=3, links=links)
    assert world.here == world.wanted(train=3)
    assert (world.root / train(0)).samefile(cache / remote(train(0))) == links
    assert not world.hub.gets(remote(train(0))) and world.hub.gets(remote(train(1))) == [None]
    assert not any((cache / remote(train(1))).read_bytes())  # left as they were
    assert (cache / remote(train(2))).read_bytes() == b"cut"


# --------------------------------------------------------------------------------------------------
# What goes wrong on the way
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moved", [False, True], ids=["same commit", "next commit"])
def test_a_killed_download_goes_on_where_it_was(world, moved):
    world.resize(train(1), 100_000)
    world.hub.faults[remote(train(1))] = [Fault(rate=200_000)]
    running = world.start(train_shards=2)
    until(lambda: partial_bytes(world, 1) > 20_000)
    assert running.send(signal.SIGKILL).code == -signal.SIGKILL
    assert world.finished == world.wanted(train=1)
    reached = partial_bytes(world, 1)
    if moved:
        world.hub.repositories[OFFICIAL]["README.md"] = b"news"
    world.run(train_shards=2)
    assert world.here == world.wanted(train=2)
    assert world.hub.gets(remote(train(1))) == [None, f"bytes={reached}-"]


@pytest.mark.parametrize(
    "stuck",
    [
        Fault(rate=50_000),
        Fault(drop=50_000, stall=60),
        Fault(status=429, headers={"Retry-After": "60"}),
    ],
    ids=["slow", "silent", "asked to wait"],
)
def test_interrupt(world, stuck):
    world.resize(train(1), 100_000)
    world.hub.faults[remote(train(1))] = [stuck]
    running = world.start(train_shards=2)
    until(
        lambda: (
            world.hub.gets(remote(train(1))) and (stuck.status or partial_bytes(world, 1) > 20_000)
        )
    )
    until((world.root / train(0)).exists)
    done = running.send(signal.SIGINT)
    assert done.code == 130 and done.seconds < 2
    assert done.err.splitlines()[-1] == "interrupted"
    assert world.finished == world.wanted(train=1)
    world.run(train_shards=2)
    assert world.here == world.wanted(train=2)


def test_dropped_connections(world):
    world.resize(train(0), 50_000)
    ends = [
        Fault(drop=30_000),
        Fault(drop=20_000, reset=True),
        Fault(drop=0),
        Fault(drop=0, reset=True),
        Fault(drop=1),
        *[Fault(drop=1_000)] * 8,  # more than ATTEMPTS, each brings something
    ]
    world.hub.faults[remote(train(0))] = list(ends)
    done = world.run(train_shards=1)
    assert world.here == world.wanted(train=1)
    assert len(
        re.findall(rf"^{OFFICIAL}: {train(0)}: \w+Error: .*; goes on in 0 s$", done.err, re.M)
    ) == len(ends)
    ranges = world.hub.gets(remote(train(0)))
    assert len(ranges) == len(ends) + 1 and ranges[1] == "bytes=30000-"


def test_a_server_that_ignores_ranges(world):
    world.resize(train(0), 50_000)
    world.hub.faults[remote(train(0))] = [
        Fault(drop=30_000),
        Fault(whole=True, drop=10_000),
        Fault(whole=True),
    ]
    world.run(train_shards=1)
    assert world.here == world.wanted(train=1)
    assert world.hub.gets(remote(train(0))) == [None, "bytes=30000-", "bytes=10000-"]


def test_a_body_that_is_too_short(world):
    world.hub.faults[remote(train(0))] = [Fault(short=1_100), Fault(short=0)]
    done = world.run(train_shards=1)
    assert world.here == world.wanted(train=1)
    assert "1100 bytes instead of 1224; goes on" in done.err
    assert world.hub.gets(remote(train(0))) == [None, "bytes=1100-", "bytes=1100-"]


def test_wrong_content_once(world):
    world.hub.faults[remote(train(1))] = [Fault(flip=True)]
    done = world.run(train_shards=2)
    assert world.here == world.wanted(train=2)
    assert re.search(
        rf"{train(1)}: the content has the hash \w+, the hub lists \w+; downloading it again",
        done.err,
    )
    assert world.hub.gets(remote(train(1))) == [None, None]


@pytest.mark.parametrize(
    "path", [train(1), MODEL.replace(".model", ".vocab")], ids=["large", "small"]
)
def test_wrong_content_always(world, path):
    world.hub.faults[remote(path)] = [Fault(flip=True)] * 9
    assert re.search(
        rf"{path}: the content has the hash \w+, the hub lists \w+, twice", world.refused()
    )
    assert path not in world.finished and len(world.hub.gets(remote(path))) == 2
    assert not [*world.root.glob(f"datasets/.partial/**/*{Path(path).name}")]
    world.hub.faults.clear()
    world.run()
    assert world.here == world.wanted()


@pytest.mark.parametrize("path", [train(0), MODEL], ids=["shard", "tokenizer"])
def test_published_files_that_are_unusable(world, path):
    bad = {train(0): shard(100)[:-1], MODEL: b"no model"}[path]
    world.hub.repositories[OFFICIAL][remote(path)] = bad
    assert Path(path).name in world.refused(train_shards=1)
    assert path not in world.finished


def test_a_tokenizer_of_another_vocabulary(world):
    manifest = json.loads(world.remote["manifest.json"])
    manifest["tokenizers"][0]["vocab_size"] = 1024
    world.hub.repositories[OFFICIAL]["datasets/manifest.json"] = json.dumps(manifest).encode()
    assert f"{VOCAB} tokens, the manifest says 1024" in world.refused()
    assert not world.finished


def test_a_busy_hub(world):
    limited = {"RateLimit": '"resolvers";r=0;t=1'}
    world.hub.faults.update(
        {
            remote(train(0)): [Fault(status=429, headers={"Retry-After": "1"}), Fault(status=503)],
            remote(train(1)): [Fault(status=429, headers=limited)],
            "revision": [Fault(status=503)],
            "tree": [Fault(status=503)],
            "datasets/manifest.json": [Fault(status=500)],
        }
    )
    start = time.monotonic()
    done = world.run(train_shards=2)
    assert world.here == world.wanted(train=2) and time.monotonic() - start > 2
    assert all(
        f"{OFFICIAL}: {train(n)}: HTTP status 429; goes on in 1 s" in done.err for n in (0, 1)
    )
    # huggingface_hub repeats one itself.
    assert len(re.findall(r"HTTP status 5\d\d; goes on in 0 s", done.err)) == 3


def test_a_hub_that_stays_busy(world):
    world.hub.faults[remote(train(0))] = [Fault(status=503)] * 99
    assert re.search(
        rf"{train(0)}: HTTP status 503; the same command goes on", world.refused(train_shards=1)
    )
    assert len(world.hub.gets(remote(train(0)))) == 6


@pytest.mark.parametrize(
    "arguments, faults, words",
    [
        (
            dict(env={"MATCHED_FINEWEB_REPO_ID": "no/body"}),
            {},
            ("datasets/no/body", "401", "HF_TOKEN"),
        ),
        (dict(options={"revision": "v9"}), {}, ("at v9", "no such revision", "--revision")),
        (
            dict(variant="sp4096", env={"MATCHED_FINEWEB_REPO_ID": OFFICIAL}),
            {},
            ("--variant sp4096", "has sp1024"),
        ),
        (
            {},
            {remote(train(0)): [Fault(status=403, headers={"X-Error-Code": "GatedRepo"})]},
            (train(0), "403", "HF_TOKEN"),
        ),
        ({}, {remote(train(0)): [Fault(status=404)]}, (train(0), "404")),
        (dict(variant="sp01"), {}, ("--variant sp01", "byte260")),
        (dict(options={"workers": 0}), {}, ("--workers 0",)),
    ],
    ids=["repository", "revision", "variant", "gated", "missing", "bad variant", "workers"],
)
def test_what_is_not_tried_again(world, arguments, faults, words):
    world.hub.faults.update(faults)
    message = world.refused(**arguments)
    assert all(word in message for word in words), message
    assert all(len(world.hub.gets(path)) == 1 for path in faults)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(tokens_val=51), ("val shards", "50 tokens", "51")),
        (dict(tokens_train=1), ("train shards", "510 tokens", "1")),
        (dict(files_val=3), ("2 validation shards", "3")),
        (dict(files_val=None), ("stats.files_val",)),
    ],
)
def test_a_manifest_that_contradicts_the_files(world, model, changes, words):
    world.hub.repositories[OFFICIAL] = below("datasets", published(model=model, **changes))
    message = world.refused()
    assert all(word in message for word in words), message
    assert not world.finished and not (world.root / "manifest.json").exists()


def test_offline(world):
    world.run(train_shards=1)
    world.hub.__exit__()
    offline = {"HF_HUB_OFFLINE": "1"}
    assert "already there" in world.run(train_shards=1).out
    assert "already there" in world.run(train_shards=1, env=offline).out
    assert "HF_HUB_OFFLINE is set" in world.refused(train_shards=2, env=offline)
    assert re.search(r"ConnectError: .*the same command goes on", world.refused(train_shards=2))
    (world.root / train(0)).write_bytes(b"cut")
    assert "HF_HUB_OFFLINE is set" in world.refused(train_shards=1, env=offline)


# --------------------------------------------------------------------------------------------------
# What is there already
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [2, 0])
def test_a_broken_local_shard_is_repaired(world, asked):
    world.run(train_shards=2)
    (world.root / train(1)).write_bytes(world.remote[train(1)][:-50])
    done = world.run(train_shards=asked)
    assert world.here == world.wanted(train=2)
    assert f"{world.root / train(1)}: 1176 bytes" in done.err and "downloading it again" in done.err
    assert [len(world.hub.gets(remote(path))) for path in world.wanted(train=2)] == [
        1,
        2,
        1,
        1,
        1,
        1,
    ]


@pytest.mark.parametrize("path", [train(0), MODEL])
def test_other_data_is_not_overwritten(world, model, path):
    other = {train(0): shard(100, seed=99), MODEL: model + b"\0" * 0 + b"\x12\x00"}[path]
    world.write({path: other})
    message = world.refused(train_shards=1)
    assert str(world.root / path) in message and "--replace" in message
    assert world.here[path] == other
    done = world.run(train_shards=1, options={"replace": True})
    assert world.here == world.wanted(train=1) and f"{world.root / path}: replacing" in done.err


def test_a_shard_that_the_repository_does_not_have(world):
    world.run(train_shards=1)
    world.write({train(77): shard(9)})
    message = world.refused(train_shards=1)
    assert str(world.root / train(77)) in message and "move it away" in message


def test_too_little_room(world):
    message = world.refused(train_shards=2, free=1_000)
    assert "0.000 GB are free" in message and "--train-shards" in message and "--root" in message
    assert not world.finished
    needed = sum(map(len, world.wanted(train=2).values()))
    assert world.refused(train_shards=2, free=needed - 1)
    world.run(train_shards=2, free=needed)


def test_a_file_that_may_not_grow(world):
    """The disk is full in mid-file (here: the process's limit); it goes on when there is room."""
    world.resize(train(1), 200_000)
    message = world.refused(train_shards=2, largest=300_000, options={"workers": 1})
    assert (
        f"{os.strerror(errno.EFBIG)}, {len(world.remote[train(1)]) - 300_000} bytes are still "
        "missing" in message
    )
    assert world.finished == world.wanted(train=1) and partial_bytes(world, 1) == 300_000
    world.run(train_shards=2)
    assert world.here == world.wanted(train=2) and world.hub.gets(remote(train(1))) == [
        None,
        "bytes=300000-",
    ]


def test_a_full_disk(world):
    """A file system of a megabyte in a mount namespace that goes with its process."""
    if (
        not shutil.which("unshare")
        or subprocess.run(["unshare", "-Urm", "true"], check=False).returncode
    ):
        pytest.skip("no user namespaces here")
    world.resize(train(1), 600_000)
    world.root.mkdir()
    script = world.call(train_shards=2, free=1e12).script
    fetch = f"{shlex.quote(sys.executable)} -c {shlex.quote(script)}"
    root = shlex.quote(str(world.root))
    done = subprocess.run(
        [
            "unshare",
            "-Urm",
            "sh",
            "-c",
            f"mount -t tmpfs -o size=1m none {root} || exit 3; {fetch}; "
            f"echo code $?; ls {root}/{FOLDER}; mount -o remount,size=8m {root}; {fetch}; "
            "echo code $?",
        ],
        capture_output=True,
        text=True,
        env=world.env,
        timeout=60,
        check=False,
    )
    if done.returncode == 3:
        pytest.skip("no tmpfs here")
    assert re.search(
        rf"error: {world.root}/datasets/.partial/sp1024: No space left on device, "
        r"\d+ bytes are still missing",
        done.stderr,
    ), done.stderr
    second = done.stdout.split("code 64\n")[1]
    assert Path(train(1)).name not in second.split("\n")
    assert second.endswith(f"VOCAB_SIZE={VOCAB}\ncode 0\n")
    assert int(world.hub.gets(remote(train(1)))[1].strip("bytes=-")) > 500_000
    assert not world.here


# --------------------------------------------------------------------------------------------------
# Several at once
# --------------------------------------------------------------------------------------------------


def test_three_processes_at_once(world):
    world.resize(train(0), 50_000)
    world.hub.faults[remote(train(0))] = [Fault(rate=100_000)]
    done = [running.wait() for running in [world.start(train_shards=2) for _ in range(3)]]
    assert [one.code for one in done] == [0, 0, 0], done
    assert world.here == world.wanted(train=2)
    assert [len(world.hub.gets(remote(path))) for path in world.wanted(train=2)] == [1] * 6
    assert sum("already there" in one.out for one in done) == 2


def test_two_variants_at_once(world, model):
    world.hub.repositories[COMMUNITY] = below("datasets", published("sp8192", model))
    done = [
        running.wait()
        for running in [
            world.start(variant=variant, with_docs=True) for variant in ("sp1024", "sp8192")
        ]
    ]
    assert [one.code for one in done] == [0, 0], done
    assert {entry["name"] for entry in world.manifest()["datasets"]} == {
        "fineweb10B_sp1024",
        "fineweb10B_sp8192",
    }
    assert not (world.root / "datasets/.partial").exists()


def test_final_names_appear_in_order(world):
    world.resize(train(1), 50_000)
    world.hub.faults[remote(train(1))] = [Fault(rate=150_000)]
    order = sorted(world.wanted(), key=lambda path: ("_train_" in path, "_val_" in path, path))
    running, counts, waiting = world.start(), set(), 0
    while running.process.exitcode is None:
        # The last first: none comes between.
        there = [(world.root / path).exists() for path in reversed(order)][::-1]
        assert there == sorted(there, reverse=True), there
        counts.add(sum(there))
        waiting = max(waiting, partial_bytes(world, 2))
        time.sleep(0.002)
    assert running.wait().code == 0 and world.finished == world.wanted()
    # It was there and waited.
    assert order.index(train(1)) in counts and waiting == len(world.remote[train(2)])


# --------------------------------------------------------------------------------------------------
# Where it goes
# --------------------------------------------------------------------------------------------------


def test_default_place(tmp_path, monkeypatch, capsys):
    """What settings name, option by option, as the command asks for it."""
    import hub
    import prepare

    asked = []
    monkeypatch.setattr(
        hub, "fetch", lambda root, variant, *rest: asked.append((root, variant)) or {}
    )

    def place(*options, **env):
        assert prepare.main(["fineweb", *options], env) == 0
        return asked[-1]

    assert place() == (ROOT / "data", "sp1024")
    assert place(DATA_PATH="/x/datasets/fineweb10B_byte260") == (Path("/x"), "byte260")
    file = tmp_path / "config.env"
    file.write_text("DATA_PATH=./data/datasets/fineweb10B_sp8192\n")
    assert place(CONFIG=str(file)) == (ROOT / "data", "sp8192")
    assert place(CONFIG=str(file), DATA_PATH="y/datasets/fineweb10B_sp4096") == (
        ROOT / "y",
        "sp4096",
    )
    assert place("--variant", "sp8192", DATA_PATH="/x/datasets/mine") == (Path("/x"), "sp8192")
    assert place("--root", "/y", DATA_PATH="/fineweb10B_sp4096") == (Path("/y"), "sp4096")
    assert place("--root", "/y", "--variant", "sp8192", DATA_PATH="/x") == (Path("/y"), "sp8192")
    for env, words in (
        ({"DATA_PATH": "data/datasets/sotu_sp1024"}, "names no published dataset .*--variant"),
        (
            {"DATA_PATH": "/x/fineweb10B_sp1024"},
            "expected <folder>/datasets/fineweb10B_sp1024; --root",
        ),
        ({"CONFIG": "nowhere.env"}, "nowhere.env"),
    ):
        assert prepare.main(["fineweb"], env) == 64
        assert re.search(words, capsys.readouterr().err)
