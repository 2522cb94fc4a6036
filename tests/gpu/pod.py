"""The machine under acceptance: how large the checks are here, and jobs in processes of their own.

A job is forked from this process, which has imported everything and computed nothing: a start costs
no imports, what one breaks stops no other, and each has a time limit. Jobs of one GPU stand side by
side on several GPUs (lanes).
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import faulthandler
import json
import os
import re
import shutil
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch._dynamo  # what every optimizer imports at its first step, in each process anew

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import train_gpt as tg  # noqa: E402

SCRIPT = ROOT / "train_gpt.py"
SYSTEMS = ROOT / "records" / "track_10min_16mb"
BASELINE = "2026-03-17_baseline"
FRONT = "2026-05-01_pr2135"  # the defaults' system
VOCAB = 1024  # pieces of most systems
WORDS_A_PIECE = 4  # of invented text
PARTS = 8  # of a published batch: what one of eight GPUs works on

# What a job does, given its environment -> exit code.
Act = Callable[[Mapping[str, str]], int]


# --- how large everything is: the only difference between a GPU and a rehearsal -------------------


@dataclasses.dataclass(frozen=True)
class Scale:
    """Sizes of the checks."""

    settings: dict[str, object]  # of every run
    documents: tuple[int, int]  # invented for training and for validation
    steps: int  # of a training run
    paced_from: int  # the step from which on its pace counts
    targets: int  # of every scoring stage
    adapter_targets: int  # the same of per-document adapters
    eval_batch: int  # tokens of a scoring batch: enough batches to tell a pace
    adapted_chunk: int  # targets between two adaptations
    attention: tuple[int, int]  # rows and length
    reduced: int  # numbers that the group of processes sums


REAL = Scale(
    settings={"DEVICE": "cuda"},
    documents=(2500, 450),
    steps=30,
    paced_from=10,
    targets=300_000,
    adapter_targets=60_000,
    eval_batch=65536,
    adapted_chunk=65536,
    attention=(64, 1024),
    reduced=1 << 25,
)
DRY = Scale(
    settings={"DEVICE": "cpu", "COMPILE": "0"},
    documents=(12, 3),
    steps=6,
    paced_from=2,
    targets=700,
    adapter_targets=500,
    eval_batch=256,
    adapted_chunk=256,
    attention=(1, 64),
    reduced=1 << 10,
)

# A model of the rehearsal; the second part, where a system has it.
TINY = """NUM_LAYERS=2 MODEL_DIM=32 NUM_HEADS=2 NUM_KV_HEADS=1 TRAIN_SEQ_LEN=64
    TRAIN_BATCH_TOKENS=512 WARMUP_STEPS=1 MUON_BACKEND_STEPS=1 KEEP_FLOAT_MAX_NUMEL=256"""
TINY_IF_ON = """XSA_LAST_N=2 ROPE_DIMS=8 BIGRAM_VOCAB_SIZE=64 VE_LAYERS=0,1 EVAL_STRIDE=32
    NGRAM_STRIDE=32 NGRAM_CHUNK_TOKENS=256 TTT_BATCH_SEQS=4 TTT_EPOCHS=1 EVAL_SEQ_LEN=64
    NUM_LOOPS=1 LOOP_START=1 LOOP_END=1 PARALLEL_START_LAYER=1 GPTQ_N_SAMPLES=4 TTT_LORA_RANK=4
    TTT_LORA_CHUNK=16 TTT_DOCS=8 TTT_GLOBAL_DOCS=2 WARMDOWN_FRAC=0.1 ENABLE_LOOPING_AT=0.8"""


def pairs(text: str) -> dict[str, object]:
    """NAME=value, separated by white space."""
    return dict(pair.split("=", 1) for pair in text.split())


def tiny(cfg: tg.Config) -> dict[str, object]:
    """Settings that make a system as small as the rehearsal's models."""
    found = pairs(TINY)
    if cfg.num_kv_heads == cfg.num_heads:
        found["NUM_KV_HEADS"] = found["NUM_HEADS"]
    for name, value in pairs(TINY_IF_ON).items():
        if getattr(cfg, name.lower()) and not tg.idle_names({name: cfg}, cfg):
            found[name] = value
    if cfg.ngram or cfg.mixer_head:
        found["NGRAM_BUCKETS"] = 4096
    return found


# --- invented text --------------------------------------------------------------------------------


def invented_words(count: int) -> list[str]:
    """Different words of two to nine letters."""
    rng = np.random.default_rng(0)
    letters = list("aeioubcdfghklmnprstvw")
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(rng.choice(letters, rng.integers(2, 10)))] = None
    return list(words)


def invent_data(folder: Path, documents: tuple[int, int], vocab: int) -> tuple[Path, Path]:
    """Shards of invented documents, as long as web pages, and a tokenizer of so many pieces.

    -> folder of shards, tokenizer
    """
    words = np.array(invented_words(WORDS_A_PIECE * vocab))
    frequencies = 1 / np.arange(1, len(words) + 1)
    frequencies = frequencies / frequencies.sum()
    rng = np.random.default_rng(1)
    texts = []
    for _ in range(sum(documents)):
        texts.append(" ".join(rng.choice(words, rng.integers(150, 450), p=frequencies)))
    model = folder / "invented.model"
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words),
        model_prefix=str(model.with_suffix("")),
        vocab_size=vocab,
        model_type="bpe",
        byte_fallback=True,
        num_threads=1,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    splits = {"train": texts[: documents[0]], "val": texts[documents[0] :]}
    for split, chosen in splits.items():
        tokens = [[1, *processor.encode(text)] for text in chosen]
        tg.write_shard(folder / tg.shard_name(split, 0), np.concatenate(tokens))
    return folder, model


# --- jobs -----------------------------------------------------------------------------------------


@dataclasses.dataclass
class Job:
    """What one or several processes shall do."""

    name: str
    act: Act
    settings: dict[str, object] = dataclasses.field(default_factory=dict)
    limit: float = 240.0  # seconds
    ranks: int = 1
    alone: bool = False  # it chooses its GPUs itself
    after: str = ""  # the job whose artifact it needs
    stop_at: str = ""  # SIGTERM when its log shows this


@dataclasses.dataclass
class Finished:
    """A job that has ended."""

    exit_code: int | str  # or "timeout", "no time"
    seconds: float = 0.0
    text: str = ""  # all that it printed
    result: dict = dataclasses.field(default_factory=dict)  # result.json
    figures: dict = dataclasses.field(default_factory=dict)  # what was measured inside
    out: Path = Path()

    @property
    def own_code(self) -> int | str:
        """The program's exit code: torchrun's own is 1 whatever the program returned."""
        return self.result.get("exit_code") or self.exit_code

    def losses(self) -> dict[int, float]:
        """Step -> training loss."""
        return {row["step"]: row["train_loss"] for row in self.steps()}

    def steps(self) -> list[dict]:
        """The training steps' lines of metrics.jsonl."""
        path = self.out / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        rows = [json.loads(line) for line in lines]
        return [row for row in rows if "train_loss" in row]


def step_ms(rows: Sequence[dict], paced_from: int) -> float:
    """The median of what a step took, in milliseconds; NaN if there are too few."""
    times = [row["train_seconds"] for row in rows if row["step"] >= paced_from]
    return 1000 * float(np.median(np.diff(times))) if len(times) > 1 else float("nan")


def free_port() -> str:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


PR_SET_PDEATHSIG = 1  # of Linux: the signal that a process gets when its parent ends


def be_job(job: Job, env: Mapping[str, str], log: Path, threads: int) -> None:
    """What the forked process does; it does not return."""
    code = 1
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # nothing trains on for ever
        with open(log, "ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout = open(1, "w", closefd=False, buffering=1)
        sys.stderr = open(2, "w", closefd=False, buffering=1)
        os.environ.clear()
        os.environ.update(env)
        faulthandler.enable(sys.stderr)
        torch.set_num_threads(threads)
        code = job.act(env)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def descendants(processes: Collection[int]) -> list[int]:
    """The processes that these have started, and those that they have."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = list(processes)
    for process in found:  # which grows
        found += [child for child, parent in parents.items() if parent == process]
    return found[len(processes) :]


class Running:
    """The processes of a job."""

    def __init__(self, job: Job, envs: Sequence[Mapping[str, str]], log: Path, limit: float):
        self.job = job
        self.log = log
        self.begin = time.monotonic()
        self.end = self.begin + limit
        self.stopped = False
        self.codes: dict[int, int | None] = {}
        threads = max(1, min(16, (os.cpu_count() or 1) // (4 * len(envs))))
        log.write_bytes(b"")
        sys.stdout.flush()
        for env in envs:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of forks beside threads, which sleep
                process = os.fork()
            if not process:
                be_job(job, env, log, threads)
            self.codes[process] = None

    def text(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace")

    def send(self, number: int) -> None:
        """A signal to every process that it started."""
        for process, code in self.codes.items():
            if code is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process, number)

    def poll(self) -> int | str | None:
        """The exit code, once all processes have ended."""
        for process, code in self.codes.items():
            if code is None:
                done, status = os.waitpid(process, os.WNOHANG)
                if done:
                    self.codes[process] = os.waitstatus_to_exitcode(status)
        codes = [code for code in self.codes.values() if code is not None]
        if len(codes) == len(self.codes):
            return max(codes, key=abs)
        now = time.monotonic()
        if any(codes):  # the others wait for one that has gone
            self.end = min(self.end, now + 15)
        if self.job.stop_at and not self.stopped and re.search(self.job.stop_at, self.text()):
            self.stopped = True
            for process in self.codes:
                os.kill(process, signal.SIGTERM)
        if now > self.end:
            self.kill()
            return next((code for code in codes if code), "timeout")
        return None

    def kill(self) -> None:
        """Ends it and all that it has started; where its threads stood is in its log."""
        started = descendants(self.codes)
        self.send(signal.SIGABRT)
        time.sleep(0.5)
        self.send(signal.SIGKILL)
        for process in started:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
        for process, code in self.codes.items():
            if code is None:
                self.codes[process] = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def read_json(path: Path) -> dict:
    """A file's object; empty if there is none."""
    return json.loads(path.read_text()) if path.is_file() else {}


class Pod:
    """The GPUs of this machine, or the CPU, and the jobs that have run on them."""

    def __init__(self, out: Path, gpus: int, dry: bool, budget: float, data: tuple | None = None):
        self.out = out.resolve()
        self.dry = dry
        self.scale = DRY if dry else REAL
        self.gpus = gpus
        self.world = 2 if dry else max(size for size in (1, 2, 4, 8) if size <= max(gpus, 1))
        self.launched = 1 if dry else self.world  # processes that torchrun starts
        self.lanes = max(gpus, 1)
        self.end = time.monotonic() + budget
        self.finished: dict[str, Finished] = {}
        self.out.mkdir(parents=True, exist_ok=True)
        self.data = {VOCAB: data} if data else {}  # vocabulary -> shards, tokenizer
        cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(self.out / "inductor"))
        self.inductor = Path(cache)
        others = tg.SETTING_NAMES | {"RANK", "LOCAL_RANK", "WORLD_SIZE"}
        kept = {name: value for name, value in os.environ.items() if name not in others}
        quiet = {
            "PYTHONUNBUFFERED": 1,
            "TORCHINDUCTOR_CACHE_DIR": cache,
            "TORCH_LOGS": "recompiles",
        }
        self.env = kept | self.texts(quiet | self.places(VOCAB) | self.scale.settings)

    def places(self, vocab: int) -> dict[str, object]:
        """Settings of text in so many pieces, which is invented where none was given."""
        if vocab not in self.data:
            folder = self.out / f"data_{vocab}"
            self.data[vocab] = invent_data(folder, self.scale.documents, vocab)
        data, tokenizer = self.data[vocab]
        return {"DATA_PATH": data, "TOKENIZER_PATH": tokenizer, "VOCAB_SIZE": vocab}

    @staticmethod
    def texts(settings: Mapping[str, object]) -> dict[str, str]:
        """Settings as an environment has them."""
        return {name: str(value) for name, value in settings.items()}

    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.end - time.monotonic()

    def _environments(self, job: Job, lane: int) -> list[dict[str, str]]:
        """The environment of each process of a job."""
        env = self.env | {"OUT_DIR": str(self.out / job.name)} | self.texts(job.settings)
        if job.alone:
            return [env]
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        devices = seen.split(",") if seen else [str(i) for i in range(max(self.gpus, 1))]
        if job.ranks == 1:
            return [env | {"CUDA_VISIBLE_DEVICES": devices[lane % len(devices)]}]
        group = {"WORLD_SIZE": job.ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        envs = []
        for rank in range(job.ranks):
            # Each sees one GPU, as its first: what one compiled then serves all.
            own = {"RANK": rank, "LOCAL_RANK": 0}
            own["CUDA_VISIBLE_DEVICES"] = devices[rank % len(devices)]
            envs.append(env | self.texts(group | own))
        return envs

    def start(self, job: Job, lane: int = 0) -> Running | None:
        """Starts a job; None if there is no time for it."""
        if self.left() < 5:
            self.finished[job.name] = Finished("no time")
            return None
        shutil.rmtree(self.out / job.name, ignore_errors=True)  # of an earlier acceptance
        log = self.out / f"{job.name}.log"
        return Running(job, self._environments(job, lane), log, min(job.limit, self.left()))

    def _end(self, running: Running, code: int | str) -> Finished:
        name = running.job.name
        folder = self.out / name
        self.finished[name] = Finished(
            exit_code=code,
            seconds=time.monotonic() - running.begin,
            text=running.text(),
            result=read_json(folder / "result.json"),
            figures=read_json(folder / "figures.json"),
            out=folder,
        )
        return self.finished[name]

    def _fill(self, lanes: Iterable[int], waiting: list[Job]) -> dict[int, Running]:
        """Starts a job in each lane, if there is one that need not wait -> those started."""
        started = {}
        for lane in lanes:
            ready = [job for job in waiting if not job.after or job.after in self.finished]
            if ready:
                waiting.remove(ready[0])
                started[lane] = self.start(ready[0], lane)
        return {lane: running for lane, running in started.items() if running}

    def run_all(self, jobs: Sequence[Job], lanes: int = 1) -> None:
        """Runs jobs, so many at a time, in this order unless one must wait for another."""
        waiting = list(jobs)
        running: dict[int, Running] = {}
        try:
            while waiting or running:
                running |= self._fill(sorted(set(range(lanes)) - running.keys()), waiting)
                codes = {lane: one.poll() for lane, one in running.items()}
                for lane, code in codes.items():
                    if code is not None:
                        ended = self._end(running.pop(lane), code)
                        print(f"     {ended.out.name}: {ended.seconds:.0f} s, {code}", flush=True)
                time.sleep(0.02)
        finally:
            for one in running.values():
                one.kill()

    def run(self, job: Job) -> Finished:
        """Runs a job to its end."""
        self.run_all([job])
        return self.finished[job.name]

    # --- settings of jobs ---

    def config(self, system: str) -> tg.Config:
        """A system's settings as they are published."""
        return tg.load_config({"CONFIG": str(SYSTEMS / system / "config.env")})

    def system(self, system: str, parts: int) -> dict[str, object]:
        """Settings of a system's run on so many eighths of its batch: one for each GPU."""
        cfg = self.config(system)
        small = tiny(cfg) if self.dry else {}
        batch = int(small.get("TRAIN_BATCH_TOKENS", cfg.train_batch_tokens))
        settings = {"CONFIG": SYSTEMS / system / "config.env"} | small
        settings |= self.places(VOCAB if self.dry else cfg.vocab_size)
        settings |= {"TRAIN_BATCH_TOKENS": batch // PARTS * parts}
        settings |= {"MICRO_BATCH_TOKENS": batch // PARTS, "MAX_ARTIFACT_BYTES": 60_000_000}
        settings |= {"ITERATIONS": self.scale.steps}
        if not cfg.warmdown_frac:
            settings["WARMDOWN_ITERS"] = self.scale.steps // 3
        return settings | {"VAL_LOSS_EVERY": 0, "VAL_TOKENS": self.scale.targets}

    def scoring(self, system: str) -> dict[str, object]:
        """Settings of its scoring: in batches small enough to tell a pace."""
        cfg = self.config(system)
        settings = {"EVAL_BATCH_TOKENS": self.scale.eval_batch, "MAX_EVAL_SECONDS": 0}
        if cfg.ttt_epochs and not cfg.ttt_before_scoring:
            settings["TTT_CHUNK_TOKENS"] = self.scale.adapted_chunk
        if cfg.ttt_lora_rank and not self.dry:
            settings["TTT_DOCS"] = cfg.ttt_docs // PARTS  # those of one of eight GPUs
        if cfg.ttt_global_docs:
            settings["TTT_GLOBAL_DOCS"] = self.scale.documents[1] // 4  # of so many, of any length
        return settings
