"""What a job does inside its process: the program itself, watched, and looks at device and step."""

from __future__ import annotations

import collections
import contextlib
import fcntl
import functools
import importlib.util
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pod import SCRIPT, Act, tg

EPOCH_WARM = 4  # steps before an adaptation's pace counts
BATCH_WARM = 2  # the same of scoring batches


def write_figures(env: Mapping[str, str], figures: Mapping[str, Any]) -> None:
    """Leaves what was measured in the job's folder."""
    text = tg.as_json(dict(figures), indent=1)
    tg.atomic_write(Path(env["OUT_DIR"]) / "figures.json", text.encode())


def synchronize() -> None:
    """Waits for the GPU, if there is one in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class Turns:
    """A GPU that jobs of several lanes share, for one at a time: what is timed is timed alone."""

    def __init__(self, env: Mapping[str, str]):
        self.waited = 0.0  # seconds, for the others
        self.mine = "RANK" in env  # processes of one group must compute together
        name = f"gpu{env.get('CUDA_VISIBLE_DEVICES', '')}.lock"
        self.file = open(Path(env["OUT_DIR"]).parent / name, "w")

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """While it is held, no other job computes, except to warm up."""
        if self.mine:
            yield
            return
        begin = time.perf_counter()
        fcntl.flock(self.file, fcntl.LOCK_EX)
        self.waited += time.perf_counter() - begin
        self.mine = True
        try:
            yield
            synchronize()
        finally:
            self.mine = False
            fcntl.flock(self.file, fcntl.LOCK_UN)

    def when(self, function: Callable) -> Callable:
        """The function, when it is its turn."""

        @functools.wraps(function)
        def called(*inputs: Any, **more: Any) -> Any:
            with self.one():
                return function(*inputs, **more)

        return called


def become(command: list[str]) -> Act:
    """The act of being another program."""

    def act(env: Mapping[str, str]) -> int:
        os.execvpe(command[0], command, dict(env))

    return act


def torchrun(processes: int) -> Act:
    """The program as its README starts it."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return become([sys.executable, *launcher, str(SCRIPT)])


def program(env: Mapping[str, str]) -> int:
    """The program in this process."""
    return tg.main([], env)


# --- the device -----------------------------------------------------------------------------------


# No kernel of attention but torch's, and none with document bounds: nothing to be tried.
PLAIN = dict(attn="sdpa", train_doc_mask=False, ttt_global_docs=0)


def attention_ms(backend: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> float | str:
    """Milliseconds of one forward and backward pass by a backend, or why it cannot."""
    from torch.nn.attention import sdpa_kernel

    begin = 0.0
    try:
        for _ in range(2):  # the first one sets up
            synchronize()
            begin = time.perf_counter()
            with sdpa_kernel(backend), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                out.sum().backward()
            synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0][:120]
    return round(1000 * (time.perf_counter() - begin), 3)


def device_facts(rows: int, length: int) -> Act:
    """Versions, devices, kernels: what is found, and which attention training's shape gets."""

    def act(env: Mapping[str, str]) -> int:
        from torch.nn.attention import SDPBackend

        cuda = env["DEVICE"] == "cuda"
        figures: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda}
        figures["usable"] = torch.cuda.is_available() if cuda else True
        figures["fa3"] = importlib.util.find_spec("flash_attn_interface") is not None
        figures["varlen"] = importlib.util.find_spec("torch.nn.attention.varlen") is not None
        write_figures(env, figures)
        if not figures["usable"]:
            torch.zeros(1, device="cuda")  # says why
        cfg = tg.Config(**PLAIN, device=env["DEVICE"])
        with contextlib.closing(tg.Runtime(cfg, env)):  # which kernels of torch's it allows
            pass
        figures["device"] = torch.cuda.get_device_name(0) if cuda else "cpu"
        if cuda:
            figures["memory"] = torch.cuda.get_device_properties(0).total_memory
            with contextlib.suppress(Exception):
                figures["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
            figures["cudnn"] = torch.backends.cudnn.version()
        device = "cuda" if cuda else "cpu"
        q, k, v = (
            torch.randn(rows, heads, length, 64, device=device, dtype=torch.bfloat16)
            for heads in (8, 4, 4)
        )
        for tensor in (q, k, v):
            tensor.requires_grad_()
        names = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION")
        backends = [getattr(SDPBackend, name) for name in names]
        figures["attention"] = {b.name: attention_ms(b, q, k, v) for b in backends}
        try:
            choice = torch._fused_sdp_choice(q, k, v, None, 0.0, True, enable_gqa=True)
            figures["chosen"] = SDPBackend(choice).name
        except Exception as error:  # an internal of torch: it may go
            figures["chosen"] = f"unknown ({type(error).__name__})"
        write_figures(env, figures)
        return 0

    return act


def reduction(count: int) -> Act:
    """Sums so many numbers over all processes, a few times."""

    def act(env: Mapping[str, str]) -> int:
        cfg = tg.Config(**PLAIN, device=env["DEVICE"])
        with contextlib.closing(tg.Runtime(cfg, env)) as rt:
            numbers = torch.ones(count, device=rt.device)
            rt.sum_(numbers)
            right = bool((numbers == rt.world).all())
            rt.sync()
            begin = time.perf_counter()
            for _ in range(5):
                rt.sum_(numbers)
            rt.sync()
            seconds = (time.perf_counter() - begin) / 5
            if rt.main:
                speed = 4e-9 * count / seconds
                write_figures(env, {"right": right, "gigabytes_s": speed})
            return 0 if rt.highest(not right) == 0 else 1

    return act


# --- graphs and steps -----------------------------------------------------------------------------


def graphs() -> int:
    """Graphs compiled so far in this process."""
    found = sys.modules.get("torch._dynamo.utils")
    return found.counters["stats"]["unique_graphs"] if found else 0


def watch_training(figures: dict[str, Any], turns: Turns) -> None:
    """Notes how many graphs there are when training begins, and how many it adds."""
    loop = tg.training_loop

    @functools.wraps(loop)
    def watched(trainer: tg.Trainer, validate: Callable[[int], None]) -> str:
        before = graphs()
        with contextlib.ExitStack() as turn:
            with trainer.off_the_clock("turn"):
                turn.enter_context(turns.one())
            status = loop(trainer, validate)
        figures["graphs"] = before
        figures["recompiles"] = graphs() - before
        return status

    tg.training_loop = watched


def waits_of(run: Callable[[], None]) -> dict[str, int]:
    """Host synchronisations while it runs, by the program's line."""
    places = collections.Counter()

    def note(message: object, *rest: object, **more: object) -> None:
        stack = [f for f in traceback.extract_stack() if f.filename == tg.__file__]
        if "synchroniz" in str(message) and stack:
            places[f"{stack[-1].name}:{stack[-1].lineno}"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return dict(places)


def kernel_times(run: Callable[[], None]) -> tuple[float, int]:
    """Milliseconds of all kernels and copies while it runs, and their number."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    events = [e for e in recorded.events() if str(e.device_type).endswith("CUDA")]
    events = [e for e in events if not e.name.startswith("Optimizer.")]
    return sum(e.time_range.end - e.time_range.start for e in events) / 1000, len(events)


def no_validation(step: int) -> None:
    """In the place of a validation."""


def training_steps(env: Mapping[str, str]) -> int:
    """Trains as the program does; packs and scores nothing."""
    return train_and(env, lambda trainer: {})


def examined_steps(env: Mapping[str, str]) -> int:
    """The same, and looks into three more steps."""
    return train_and(env, look_into)


def train_and(env: Mapping[str, str], look: Callable[[tg.Trainer], dict]) -> int:
    """Trains, then looks at the trainer; leaves all figures."""
    figures: dict[str, Any] = {}
    watch_training(figures, Turns(env))
    cfg = tg.load_config(env)
    with contextlib.closing(tg.Runtime(cfg, env)) as rt:
        log = tg.RunLog(Path(cfg.out_dir), rt)
        tg.log_identity(cfg, rt, log)
        trainer = tg.build_trainer(cfg, rt, log)
        tg.train(trainer, no_validation)
        log.save(peak_memory_bytes=rt.peak_memory())
        figures |= look(trainer)
        rt.sync()
        if rt.main:
            write_figures(env, figures)
    return 0


def look_into(trainer: tg.Trainer) -> dict[str, Any]:
    """The host's waits and the GPU's kernels in three steps; on a CPU there are none."""

    def three_steps() -> None:
        for _ in range(3):
            loss = trainer.step(trainer.stream.batch, trainer.cfg.iterations, 0.5)
            trainer.steps_done += 1
            trainer.send_report(loss)
            trainer.in_flight.clear()

    three_steps()
    if not trainer.rt.cuda:
        return {"waits": {}, "busy_ms": 0.0, "kernels": 0}
    waits = waits_of(three_steps)
    milliseconds, kernels = kernel_times(three_steps)
    return {"waits": waits, "busy_ms": milliseconds / 3, "kernels": kernels // 3}


# --- the paces of scoring -------------------------------------------------------------------------


class Paces:
    """Seconds of each stage by kind of work: count, adapt (before), score, learn (after a chunk).

    A kind has entries (seconds, targets), each from the end of the work before.
    """

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.stages: dict[str, dict[str, Any]] = {}
        self.kinds: dict[str, list[tuple[float, float]]] | None = None  # of the present stage
        self.mark = 0.0
        self.charged = 0  # targets since the last chunk ended

    def clock(self) -> float:
        """Seconds, without those of waiting for other jobs."""
        return time.perf_counter() - self.turns.waited

    def note(self, kind: str, targets: float) -> None:
        """Work that has just ended."""
        if self.kinds is not None:
            synchronize()
            now = self.clock()
            self.kinds[kind].append((now - self.mark, targets))
            self.mark = now

    def stage(self, scorer: tg.Scorer, cfg: tg.Config, targets: int, seconds: float) -> None:
        """Keeps the present stage."""
        warm = {kind: warm_pace(kind, entries) for kind, entries in self.kinds.items()}
        adapters = isinstance(scorer.network, tg.PerDocumentLoRA)
        learners = tg.BUSY_PROCESSES if adapters else 1
        if scorer.training:
            rows = cfg.ttt_batch_seqs * cfg.ttt_parts  # of a step
            learners = -(-rows // -(-rows // tg.BUSY_PROCESSES))
        self.stages[scorer.name] = {
            "targets": targets,
            "seconds": seconds,
            "one_process": scorer.alone,
            "learners": learners,
            "adapters": adapters,
            "seconds_a_target": warm,
        }


def warm_pace(kind: str, entries: list[tuple[float, float]]) -> float:
    """Seconds a target: the median of what was done when all was compiled."""
    begin = {"adapt": EPOCH_WARM, "score": BATCH_WARM, "learn": 1}.get(kind, 0)
    end = -1 if kind == "learn" else None  # nothing is learned after the last chunk
    chosen = entries[begin:end] or entries
    return float(np.median([seconds / max(targets, 1) for seconds, targets in chosen]))


def watch_scoring(paces: Paces) -> None:
    """Puts a clock around the parts of scoring."""
    evaluate = tg.evaluate
    score_batch = paces.turns.when(tg.score_batch)
    commit = paces.turns.when(tg.Scorer.commit)
    learn = paces.turns.when(tg.TestTimeTraining.learn)

    def watched_evaluate(scorer, tokens, table, cfg, rt, log, sizes=None):
        paces.kinds = collections.defaultdict(list)
        paces.mark = begin = paces.clock()
        paces.charged = 0
        try:
            score = evaluate(scorer, tokens, table, cfg, rt, log, sizes)
            synchronize()
            paces.stage(scorer, cfg, len(tokens) - 1, paces.clock() - begin)
        finally:
            paces.kinds = None
        return score

    def watched_batch(scorer, batch, tokens, rt):
        nats = score_batch(scorer, batch, tokens, rt)
        paces.note("score", int(batch.real.sum()))
        paces.charged += int(batch.real.sum())
        return nats

    def watched_commit(scorer, chunk, tokens):
        commit(scorer, chunk, tokens)
        paces.note("learn", paces.charged)
        paces.charged = 0

    def watched_learn(training, tokens, progress, go_on=None):
        done = [0.0]

        def after_step(share: float) -> bool:
            paces.note("adapt", (share - done[0]) * (len(tokens) - 1))
            done[0] = share
            return go_on(share)

        return learn(training, tokens, progress, after_step if go_on else None)

    tg.evaluate = watched_evaluate
    tg.score_batch = watched_batch
    tg.Scorer.commit = watched_commit
    tg.TestTimeTraining.learn = watched_learn
    for service in (tg.NgramCounts, tg.HashedCounts, tg.FrequentHints):
        service.prepare = watched_prepare(service.prepare, paces)


def watched_prepare(prepare: Callable, paces: Paces) -> Callable:
    """A count service's preparation with a clock around it."""

    def watched(self, tokens, *rest, **more):
        prepare(self, tokens, *rest, **more)
        paces.note("count", len(tokens) - 1)

    return watched


def watched_program(env: Mapping[str, str]) -> int:
    """The program in this process, with clocks around its parts."""
    figures: dict[str, Any] = {}
    turns = Turns(env)
    paces = Paces(turns)
    watch_training(figures, turns)
    watch_scoring(paces)
    tg.calibrate = turns.when(tg.calibrate)
    code = tg.main([], env)
    write_figures(env, figures | {"stages": paces.stages})
    return code
