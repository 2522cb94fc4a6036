"""What several test files share: small models, scorers over them, clocks, runs in processes."""

import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import runpy
import socket
import struct
import subprocess
import sys
import traceback
import zlib
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import FULL, ROOT, TINY, TINY_RUN, clean_env
from torch._dynamo.testing import CompileCounterWithBackend

import train_gpt as tg

TABLE = tg.ByteTable.bytes260()


def settings_in(text):
    """NAME=value pairs, as the environment has them."""
    return dict(pair.split("=", 1) for pair in text.split())


class Cases(dict):
    """Settings of a parametrized test's cases: cases.add("name", setting=...)."""

    def add(self, name, **settings):
        self[name] = settings


# Of a published run: what is larger is made so small.
LARGEST = dict(
    num_layers=2,
    model_dim=32,
    num_heads=2,
    num_kv_heads=2,
    rope_dims=8,
    rope_train_seq_len=16,
    xsa_last_n=2,
    bigram_vocab_size=64,
    bigram_dim=8,
    ve_dim=8,
    keep_float_max_numel=256,
    train_seq_len=32,
    warmdown_iters=10,
    eval_stride=8,
    ttt_epochs=1,
    ttt_batch_seqs=1,
    ttt_chunk_tokens=64,
    ngram_buckets=64,
    ngram_stride=16,
    ngram_min_count=1,
    ngram_chunk_tokens=64,
)
PUBLISHED = ("baseline", "pr489", "pr740_v1", "pr740_v2", "pr834", "pr859")


def published(name):
    """Settings of a published run, its switches as they were, its sizes small."""
    (path,) = ROOT.glob(f"records/track_10min_16mb/*_{name}/config.env")
    cfg = tg.load_config({"CONFIG": str(path)})
    settings = {field: min(getattr(cfg, field), most) for field, most in LARGEST.items()}
    settings["ve_layers"] = (1,) if cfg.ve_layers else ()
    for field in ("vocab_size", "tokenizer_path", "train_batch_tokens", "micro_batch_tokens"):
        settings[field] = TINY[field]
    return {**dataclasses.asdict(cfg), **settings}


# --- models, devices, steps -----------------------------------------------------------------------


def config(base, **settings):
    """Settings with some others in their place."""
    return tg.Config(**{**base, **settings})


def cpu_runtime(**profile):
    """A runtime of one process on the CPU, with other properties of the device."""
    rt = tg.Runtime(tg.Config(device="cpu"), {})
    on_device_with(rt, **profile)
    return rt


def on_device_with(rt, **profile):
    """The runtime as if its device had other properties."""
    rt.profile = dataclasses.replace(rt.profile, **profile)


def randomized(cfg, seed=0):
    """A model whose every parameter is random, so that nothing hides behind a zero or a one."""
    model = tg.GPT(cfg)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            size = 0.3 if p.ndim == 2 else 0.5
            p.copy_(torch.randn(p.shape, generator=generator) * size)
    return model


def mild(cfg, seed=0):
    """A model of random parameters whose outputs stay moderate."""
    model = tg.GPT(cfg)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


def names_of(model):
    return {name for name, _ in model.named_parameters()}


def largest(x):
    """Magnitude of the largest element."""
    return x.abs().max().item()


def random_ids(rng, *shape, vocab=260):
    """Random tokens [*shape], int64."""
    return torch.from_numpy(rng.integers(0, vocab, shape))


def compiled(function):
    """As torch.compile would run it, in one graph."""
    torch.compiler.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True)


def counted_compiler(counters):
    """A compiler that counts graphs, one counter a function."""

    def compile_counted(function):
        counters.append(CompileCounterWithBackend("aot_eager"))
        return torch.compile(function, dynamic=False, fullgraph=True, backend=counters[-1])

    return compile_counted


def with_lanes(lanes):
    """As if rANS had so many for any count of codes: with many, small matrices are read quickly."""
    return mock.patch.object(tg, "lanes_of", return_value=lanes)


def take_step(trainer, batch_of):
    """One optimizer step with the rates that the run's clock gives; it is not counted as done."""
    done = trainer.steps_done
    share = done / max(1, trainer.cfg.iterations)
    trainer.follow(share)
    return trainer.step(batch_of, trainer.clock.steps_left(done), share)


class FakeClock:
    """A clock that stands until somebody moves it."""

    def __init__(self, seconds=0.0):
        self.seconds = seconds

    def __call__(self):
        return self.seconds

    def advance(self, seconds):
        self.seconds += seconds


class NoData:
    """A stream for trainers whose steps read nothing."""

    batch = None


class Noise:
    """Random tokens in place of a stream."""

    def __init__(self, rows=2):
        self.rows = rows

    def batch(self, unit):
        ids = np.random.default_rng(unit).integers(0, 260, (self.rows, 33))
        return ids[:, :-1].copy(), ids[:, 1:].copy()


# --- scoring --------------------------------------------------------------------------------------

# Settings of every kind of scorer, for texts of a few hundred tokens.
SHORT = dict(
    FULL,
    ttt_chunk_tokens=64,
    mix_chunk_tokens=64,
    ttt_lora_chunk=16,
    ttt_docs=3,
    ttt_lora_alpha=8.0,
    ttt_lr=0.01,
    eval_batch_tokens=64,
    ngram_buckets=1024,
)
STREAM = dict(eval_stream=16)
TTT = dict(ttt_epochs=1, ttt_batch_seqs=1)
LORA = dict(ttt_lora_rank=2)
EXACT = dict(tilt=True, ngram="mix")
FIXED = dict(tilt_boost=2.0, tilt_order=3, tilt_share=0.6)
GLOBAL = dict(ttt_global_docs=4, ttt_global_lr=0.05)
EVERYWHERE = dict(LORA, ttt_lora_on="q,v,attn,mlp,head", ttt_lora_early_chunks="3:7,8:20")
EVERYWHERE |= dict(num_loops=1, loop_start=1, loop_end=1)
NESTINGS = {
    "sliding": {},
    "sliding, stretched": dict(rope_train_seq_len=8),
    "streaming": STREAM,
    "streaming documents": dict(STREAM, stream_docs=True),
    "sliding ttt": TTT,
    "streaming ttt": dict(STREAM, **TTT),
    "lora": LORA,
    "lora, stretched": dict(LORA, rope_train_seq_len=8),
    "lora kept": dict(LORA, ttt_lora_keep=True),
    "lora, global step, fixed tilt": dict(EVERYWHERE, **GLOBAL, **FIXED),
    "fixed tilt": FIXED,
    "tilt": dict(tilt=True),
    "mix": dict(ngram="mix"),
    "streaming mix": dict(STREAM, ngram="mix", ngram_docs=False),
    "streaming tilt mix": dict(STREAM, **EXACT),
    "streaming ttt tilt mix": dict(STREAM, **TTT, **EXACT),
    "lora tilt mix": dict(LORA, **EXACT),
    "head over exact counts": dict(ngram="mix", mixer_head=True, ngram_order=5),
}


def short_text(rng):
    """301 tokens of few kinds, so that contexts come again, in six documents, one of them empty."""
    tokens = rng.integers(4, 40, 301).astype(np.uint16)
    tokens[120:170] = tokens[20:70]
    tokens[200:260] = tokens[5:65]
    tokens[[0, 40, 41, 130, 131, 230]] = 1
    return tokens


def build(rt, **settings):
    """Settings, a fresh model and the last stage that the settings ask for."""
    cfg = tg.Config(**dict(SHORT, **settings))
    assert not tg.check_config(cfg)
    return cfg, tg.stages_of(cfg)[-1].build(mild(cfg).to(rt.device), rt, cfg, TABLE)


def windows(model, rt, cfg, stride=8):
    """The plain model over windows of 32."""
    return tg.Scorer("s", tg.WindowNetwork(model, rt, cfg, 32, stride))


def everything(scorer, batch):
    """p of the whole vocabulary at the one position of a batch -> [V], float64."""
    vocabulary = torch.arange(scorer.network.model.cfg.vocab_size)
    with torch.inference_mode():
        return scorer.predict(batch).prob(vocabulary.view(1, 1, -1))[0, 0].clone()


def network_p(tokens, rt, **settings):
    """p of every token at every target [n, V] by the network alone."""
    _, scorer = build(rt, **settings)
    plan = scorer.network.plan(tokens, scorer.chunk_targets)
    targets = range(len(tokens) - 1)
    every = [everything(scorer, plan.position(tokens, j)) for j in targets]
    return torch.stack(every).numpy()


def failed(checks):
    """Names of the checks that count against a score."""
    return {check.name for check in checks if check.failed}


def verdicts(score, scorer, tokens, cfg, rt):
    """Check -> verdict of a score."""
    checks = tg.check_score(score, scorer, tokens, TABLE, cfg, rt, {})
    return {check.name: check.verdict for check in checks}


# --- whole runs -----------------------------------------------------------------------------------


def result_of(out):
    return json.loads(Path(out, "result.json").read_text())


def log_of(out):
    log = Path(out, "train.log")
    return log.read_text() if log.exists() else ""


def losses_of(out):
    rows = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    return np.array([row["train_loss"] for row in rows if "train_loss" in row])


def tiny_settings(out, **env):
    """Settings of a tiny run on the CPU, as environment variables."""
    return {**TINY_RUN, "OUT_DIR": str(out), "DEVICE": "cpu", **env}


def run(out, **env):
    """main() in this process -> exit code, result.json, log."""
    code = tg.main([], tiny_settings(out, **env))
    return code, result_of(out), log_of(out)


def run_traced(patch, out, **env):
    """The same with compilation on: traced as for a GPU, then run as it stands."""
    patch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    return run(out, COMPILE="1", **env)


def tiny_env(out, **env):
    """The environment of a process that makes a tiny run on the CPU."""
    return clean_env(**tiny_settings(out, **env))


def python(arguments, env, **options):
    """This interpreter in a process of its own."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        **options,
    )


# Several processes without torchrun and imports, which take longer than a tiny run: they are forked
# from one that has imported everything.
FORKS = multiprocessing.get_context("forkserver")


@functools.cache
def start_fork_server():
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    FORKS.set_forkserver_preload(["helpers", "torch._dynamo"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        forkserver.ensure_running()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def as_rank(function, env, log, arguments):
    """What a forked process does: function(env, *arguments) in an environment like torchrun's."""
    with open(log, "w") as sys.stderr:
        os.environ.update(env)
        torch.set_num_threads(1)
        try:
            function(env, *arguments)
        except BaseException:
            traceback.print_exc()
            raise


def rank_settings(world):
    """What torchrun tells each of so many processes, by rank."""
    shared = dict(WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    return [dict(shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(world)]


def in_processes(world, folder, function, *arguments):
    """function(env, *arguments) in so many processes at once, which must all succeed."""
    start_fork_server()
    logs = [Path(folder, f"rank{rank}_of_{world}.txt") for rank in range(world)]
    processes = []
    for env, log in zip(rank_settings(world), logs):
        processes.append(FORKS.Process(target=as_rank, args=(function, env, log, arguments)))
        processes[-1].start()
    for process in processes:
        process.join(300)
    codes = [process.exitcode for process in processes]
    assert codes == [0] * world, "".join(log.read_text() for log in logs)


OWN_PLACES = [ROOT, *(ROOT / name for name in ("data", "records", "tests"))]


class Program(NamedTuple):
    """A Python program: its arguments, and what it finds; `first` is done before it begins."""

    arguments: Sequence[str]
    env: Mapping[str, str]
    cwd: Path = ROOT
    first: Callable[[], object] | None = None


def as_program(program, pipe):
    """What a forked process does to be a program that says what it says to a pipe."""
    for descriptor in (1, 2):
        os.dup2(pipe.fileno(), descriptor)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    sys.path[:] = [name for name in sys.path if Path(name).resolve() not in OWN_PLACES]
    os.chdir(program.cwd)
    os.environ.clear()
    os.environ.update(program.env)
    torch.set_num_threads(int(program.env.get("OMP_NUM_THREADS", torch.get_num_threads())))
    sys.argv = list(map(str, program.arguments))
    if program.first:
        program.first()
    if sys.argv[0] == "-c":
        code = sys.argv.pop(1)
        exec(code, {"__name__": "__main__"})
    elif sys.argv[0] == "-m":
        runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(sys.argv[0]).parent.resolve()))
        runpy.run_path(sys.argv[0], run_name="__main__")


def forked(*programs):
    """Exit codes of programs at once, and all that they say; none of them need import torch."""
    start_fork_server()
    reader, writer = FORKS.Pipe(duplex=False)
    processes = [FORKS.Process(target=as_program, args=(each, writer)) for each in programs]
    for process in processes:
        process.start()
    writer.close()
    said = b""
    while connection.wait([reader], 300):
        piece = os.read(reader.fileno(), 1 << 16)
        said += piece
        if not piece:
            break
    for process in processes:
        process.join(10)
        process.kill()
        process.join()
    return [process.exitcode for process in processes], said.decode(errors="replace")


def forked_ranks(world, program):
    """A program as torchrun would start it, so often."""
    ranks = [program._replace(env={**program.env, **env}) for env in rank_settings(world)]
    return forked(*ranks)


def torchrun(options, program, env, cwd=ROOT):
    """What starts a program with torchrun: the agent is forked, what it starts is not."""
    return Program(["-m", "torch.distributed.run", *options, *program], env, cwd)


def torchrun_alone(processes, program, env):
    """A program and its arguments, as so many processes of this machine -> exit code, output."""
    options = ["--standalone", f"--nproc_per_node={processes}"]
    (code,), said = forked(torchrun(options, program, env))
    return code, said


def main_of_rank(env, settings):
    assert tg.main([], {**settings, **env}) == 0


def run_in_processes(out, processes, **env):
    """A tiny run of several processes -> result.json."""
    in_processes(processes, Path(out).parent, main_of_rank, tiny_settings(out, **env))
    return result_of(out)


def sealed(header, payload, version=1, level=-1):
    """An artifact of some header (JSON text) and payload, with a correct checksum."""
    body = zlib.compress(header, level)
    digest = hashlib.sha256(body + payload).digest()
    prefix = struct.pack("<8sHIQ32s", tg.MAGIC, version, len(body), len(payload), digest)
    return prefix + body + payload


def resealed(blob, payload=None, **fields):
    """A blob with other content and a correct checksum: only the content is wrong."""
    header, old_payload = tg.read_header(blob)
    text = json.dumps({**header, **fields}).encode()
    return sealed(text, old_payload if payload is None else payload)


def calibration_of(state, highest=1e-3):
    """X^T X / n of random inputs, and a positive importance of each row, for every matrix."""
    generator = torch.Generator().manual_seed(0)
    hessians = {}
    importance = {}
    for name, w in state.items():
        if w.ndim == 2:
            x = torch.randn(3 * w.size(1), w.size(1), generator=generator)
            hessians[name] = x.T @ x / len(x)
            drawn = torch.rand(w.size(0), generator=generator)
            importance[name] = drawn * highest + highest / 1000
    return tg.Calibration(hessians, importance)
