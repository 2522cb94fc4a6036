"""Acceptance of train_gpt.py on a machine with 1 to 8 GPUs: one command, under ten minutes.

    python tests/gpu/acceptance.py                 # all GPUs of this machine, invented text
    python tests/gpu/acceptance.py --dry           # the same checks on a CPU, tiny shapes
    python tests/gpu/acceptance.py --only plain,steps --data DIR --tokenizer FILE

At the end: a table, acceptance.json and all logs in --out, exit code 1 if anything failed, and for
each failure a sentence what to do. README.md beside this file says what is checked and how long it
takes.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import advice
import inside
from pod import BASELINE, FRONT, PARTS, VOCAB, Finished, Job, Pod, step_ms, tg
from report import (
    EVAL_SECONDS,
    Session,
    all_systems,
    published_systems,
    report,
)

# What the GPU of one rank needs for its eighth of a step, in milliseconds, measured on an H100 80GB
# with torch 2.11 and cuDNN's attention, which is no longer used; a machine may be a quarter slower.
# With the reduction between eight GPUs 43.5 were published for the baseline.
SHARE_MS = {
    "2026-03-17_baseline": 34.8,
    "2026-03-22_pr489": 42.6,
    "2026-03-25_pr740_v1": 61.8,
    "2026-03-25_pr740_v2": 61.8,
    "2026-03-26_pr834": 91.4,
    "2026-03-26_pr859": 91.4,
    FRONT: 156.0,  # with recurrence; 148.1 were measured with 1,024 pieces
}
SLACK = 1.25
REDUCTION_MS = 10.0
PEAK_GIB = 60.0
ALIKE = 0.01  # relative gap of a first loss in bfloat16
COMPARED = 5  # first losses
NOISE = re.compile(r"warn|deprecat|graph break|Traceback|Error", re.IGNORECASE)
KNOWN_NOISE = re.compile(r"tested with torch|No module named 'flash_attn_interface'|audit .* WARN")

# Stages beyond those of the systems, on the artifact of the plain run; name -> settings.
MORE_STAGES = {
    "windows": {"EVAL_STRIDE": 64, "EVAL_BATCH_TOKENS": 0},  # batches as the device likes
    "stream": {"EVAL_PLAIN": 0, "EVAL_STREAM": 1024, "TILT": 1, "NGRAM": "mix"},
    "ttt": {"EVAL_PLAIN": 0, "TTT_EPOCHS": 1},
    "adapters": {"EVAL_PLAIN": 0, "EVAL_STRIDE": 0, "TTT_LORA_RANK": 8},
}
DRY_STAGES = {
    "windows": {"EVAL_STRIDE": 32, "EVAL_BATCH_TOKENS": 256},
    "stream": {"EVAL_STREAM": 32, "TTT_CHUNK_TOKENS": 256, "MIX_CHUNK_TOKENS": 256},
    "ttt": {"EVAL_STRIDE": 32, "TTT_CHUNK_TOKENS": 256, "TTT_BATCH_SEQS": 4},
    "adapters": {"TTT_DOCS": 4},
}
WANTED = {
    "windows": {"plain", "sliding"},
    "stream": {"streaming", "mixed"},
    "ttt": {"ttt"},
    "adapters": {"ttt"},
}


# --- scores and their time ------------------------------------------------------------------------


def full_targets(cfg: tg.Config) -> int:
    """FineWeb's validation targets in a system's vocabulary."""
    return tg.FINEWEB_TARGETS.get(cfg.vocab_size, tg.FINEWEB_TARGETS[VOCAB])


def projected(stage: dict, targets: int, gpus: int = 8) -> float:
    """Seconds of a stage over so many targets on so many GPUs, from its warm pace on one.

    What happens once (compilation, first calls) is added. Batches are shared by all GPUs, unless
    the stage carries what it learns from one to the next; the rows of an adaptation step are
    shared; n-grams are counted once a machine.
    """
    paces = stage["seconds_a_target"]
    once = stage["seconds"] - stage["targets"] * sum(paces.values())
    learners = min(gpus, stage["learners"])
    pace = paces.get("count", 0.0)
    pace += (paces.get("adapt", 0.0) + paces.get("learn", 0.0)) / learners
    pace += paces.get("score", 0.0) / (1 if stage["one_process"] else gpus)
    return max(once, 0.0) + targets * pace


def judge_stages(
    session: Session, job: str, wanted: set[str], label: str, system: str = BASELINE
) -> None:
    """All wanted stages ran, no check of a score failed, and each would end within its time."""
    finished = session.pod.finished[job]
    targets = full_targets(session.pod.config(system))
    stages = finished.result.get("stages", {})
    missing = sorted(wanted - stages.keys())
    do = advice.diagnose(finished, session.driver_advice)
    session.expect(f"{label} stages", sorted(stages), f"with {sorted(wanted)}", not missing, do)
    for name in missing:
        session.stages[f"{label} {name}"] = {"failed": "not run"}
    for name, stage in stages.items():
        verdicts = {n: found["verdict"] for n, found in stage.get("audit", {}).items()}
        failed = {n: text for n, text in verdicts.items() if text.startswith("FAIL")}
        told = failed or ("none failed" if verdicts else stage)
        held = verdicts and not failed
        session.expect(f"{label} {name} checks", told, "none failed", held, advice.SCORE)
        row = {"metric": stage.get("metric"), "checks": bool(held)}
        row |= {"targets": stage.get("tokens"), "seconds": stage.get("seconds")}
        session.stages[f"{label} {name}"] = row
        measured = finished.figures.get("stages", {}).get(name)
        if measured:
            row |= measured | {"projected": projected(measured, targets)}
            judge_time(session, f"{label} {name}", row)


def judge_time(session: Session, label: str, row: dict) -> None:
    """Whether a stage would end within ten minutes on eight GPUs."""
    shown = f"{row['seconds']:.1f} s for {row['targets']} targets here, projected"
    value = f"{shown} {row['projected']:.0f} s"
    if row["adapters"] or not session.timed:  # adapters were too slow at full size when last seen
        session.note(f"{label} time", value)
    else:
        in_time = row["projected"] <= EVAL_SECONDS
        session.expect(f"{label} time", value, f"<= {EVAL_SECONDS} s", in_time, advice.FITS)


# --- the checks -----------------------------------------------------------------------------------


def nvidia_smi(*query: str) -> str:
    """What nvidia-smi says; empty if there is none."""
    try:
        done = subprocess.run(
            ["nvidia-smi", *query], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def check_device(session: Session) -> None:
    """GPUs, driver, versions; a fused attention kernel serves the shape of training."""
    pod = session.pod
    found = re.search(r"CUDA Version:\s*([\d.]+)", "" if pod.dry else nvidia_smi())
    driver_cuda = found[1] if found else ""
    fields = "name,driver_version,memory.used,power.limit,clocks.max.sm"
    cards = nvidia_smi(f"--query-gpu={fields}", "--format=csv,noheader") if not pod.dry else ""
    session.driver_advice = advice.for_driver(tg.torch.version.cuda, driver_cuda)
    session.note("nvidia-smi", cards.strip().splitlines() or "not here")
    session.note("driver's CUDA", driver_cuda or "unknown")
    pod.run(Job("device", inside.device_facts(*pod.scale.attention), limit=90))
    ended = session.ended("device")
    facts = ended.figures if ended else {}
    session.machine = facts | {"gpus": pod.gpus, "driver_cuda": driver_cuda, "cards": cards}
    for name in ("torch", "cuda", "device", "nccl", "cudnn"):
        session.note(name, facts.get(name, "unknown"))
    usable = facts.get("usable", False)
    session.expect("torch uses the GPU", usable, "yes", usable, session.driver_advice)
    none = "not found: fine, SDPA is used"
    session.note("FlashAttention 3", "found" if facts.get("fa3") else none)
    session.note("varlen attention", "found" if facts.get("varlen") else "not found")
    kernels = facts.get("attention", {})
    served = {name: ms for name, ms in kernels.items() if not isinstance(ms, str)}
    session.expect("fused kernels, ms", kernels, "at least one", served, advice.MATH)
    chosen = facts.get("chosen", "unknown")
    fused = pod.dry or chosen not in ("MATH", "ERROR")
    session.expect("chosen by SDPA", chosen, "a fused one", fused, advice.MATH)


def check_group(session: Session) -> None:
    """All GPUs sum numbers together; if they cannot, the rest is run on one."""
    pod = session.pod
    if pod.world == 1:
        session.note("processes", "one GPU: no group")
        return
    pod.run(Job("group", inside.reduction(pod.scale.reduced), ranks=pod.world, limit=75))
    finished = pod.finished["group"]
    held = finished.exit_code == 0 and finished.figures.get("right")
    value = f"{finished.exit_code} after {finished.seconds:.0f} s"
    do = advice.diagnose(finished, session.driver_advice)
    session.expect("sum over processes", value, "0", held, do if do != advice.CODE else advice.NCCL)
    if held:
        speed = finished.figures["gigabytes_s"]
        session.note("GB summed a second", f"{speed:.2f}")
    else:
        pod.world = pod.launched = 1


def check_refusals(session: Session) -> None:
    """What cannot work is refused in words."""
    session.pod.run(Job("typo", inside.program, {"TRAIN_BATCH_TOKEN": 1}, limit=60))
    session.ended("typo", (64,), "an unknown setting's exit code")


def check_plain(session: Session) -> None:
    """The README's command: torchrun, to the end, quietly, as fast as the GPUs allow."""
    pod = session.pod
    settings = pod.system(BASELINE, pod.launched)
    if pod.launched == PARTS:
        del settings["TRAIN_BATCH_TOKENS"], settings["MICRO_BATCH_TOKENS"]  # as published
    settings["EVAL_STRIDE"] = 32 if pod.dry else 64
    pod.run(Job("plain", inside.torchrun(pod.launched), settings, alone=True))
    finished = session.ended("plain")
    ran = pod.finished["plain"]
    do = advice.diagnose(ran, session.driver_advice)
    session.expect("launcher's exit code", ran.exit_code, "0", ran.exit_code == 0, do)
    if not finished:
        return
    lines = [line.strip()[:200] for line in finished.text.splitlines() if NOISE.search(line)]
    noise = [line for line in lines if not KNOWN_NOISE.search(line)]
    session.note("lines to look at", noise[:5] or "none")
    judge_stages(session, "plain", {"plain", "sliding"}, "plain")
    pace = step_ms(finished.steps(), pod.scale.paced_from)
    session.speed("ms a step", pace, limit_of(BASELINE, pod.launched))
    trained = finished.text.partition("step:1/")[2].partition("training finished")[0]
    recompiled = trained.count("Recompiling function")
    session.expect("recompiles in training", recompiled, "0", not recompiled, advice.GRAPHS)
    judge_run(session, finished)


def judge_run(session: Session, finished: Finished) -> None:
    """What a run took before its clock, and of memory."""
    warmup = finished.result.get("seconds", {}).get("warmup", math.inf)
    name = finished.out.name
    session.expect(f"{name} warm-up s", warmup, "<= 150", warmup <= 150, advice.WARMUP)
    memory = finished.result.get("peak_memory_bytes", 0) / 2**30
    fits = 0 < memory <= PEAK_GIB
    session.expect(f"{name} peak GiB", round(memory, 2), f"<= {PEAK_GIB}", fits, advice.MEMORY)


def limit_of(system: str, gpus: int) -> float:
    """Milliseconds that a step of one eighth a GPU may take; none for a system without a time."""
    return SHARE_MS.get(system, math.inf) * SLACK + (REDUCTION_MS if gpus > 1 else 0)


def check_code(session: Session) -> None:
    """Generated kernels work out no rotary angles."""
    found = collections.Counter()
    kernels = list(session.pod.inductor.rglob("*.py"))
    for path in kernels:
        found.update(re.findall(r"(?:tl_math|libdevice)\.(sin|cos)\b", path.read_text()))
    session.note("generated files looked at", len(kernels))
    session.expect("sin, cos in kernels", dict(found), "none", not found, advice.ANGLES)


def check_signal(session: Session) -> None:
    """SIGTERM to torchrun writes a checkpoint and ends with 143; RESUME goes on from there."""
    pod = session.pod
    micro = 64 if pod.dry else 1024
    settings = pod.system(BASELINE, 1) | {"TRAIN_BATCH_TOKENS": micro * pod.launched}
    settings |= {"MICRO_BATCH_TOKENS": micro, "COMPILE": 0, "EVAL_STRIDE": 0, "VAL_TOKENS": micro}
    settings |= {"WARMUP_STEPS": 1, "WARMDOWN_ITERS": 0, "SCHEDULE": "tokens"}
    endless = settings | {"ITERATIONS": 10**6}
    launched = inside.torchrun(pod.launched)
    pod.run(Job("signal", launched, endless, limit=90, alone=True, stop_at="step:8/"))
    session.ended("signal", (143,), "exit code after SIGTERM")
    text = pod.finished["signal"].text
    found = re.findall(r"checkpoint: (\S+) at step (\d+)", text)
    session.expect("checkpoint", found, "one", len(found) == 1, advice.RESUME)
    if found:
        path, step = found[0]
        goes_on = settings | {"RESUME": path, "ITERATIONS": int(step) + 3}
        pod.run(Job("resume", inside.program, goes_on, limit=90))
        session.ended("resume")
        steps = [row["step"] for row in pod.finished["resume"].steps()]
        wanted = [int(step) + i for i in (1, 2, 3)]
        session.expect("resumed steps", steps, str(wanted), steps == wanted, advice.RESUME)


def training_of(cfg: tg.Config) -> str:
    """What decides the losses of a system, as a text."""
    return json.dumps(cfg.group("model", "train", "optim"), sort_keys=True)


def shape_of(cfg: tg.Config) -> str:
    """What decides the time of a system's step: all of it but its rates."""
    settings = cfg.group("model", "train", "optim")
    return json.dumps({k: v for k, v in settings.items() if not k.endswith("_lr")}, sort_keys=True)


def exact_jobs(pod: Pod, systems: Sequence[str]) -> dict[str, Job]:
    """The first steps of each system in float32, without compilation; one for equal trainings."""
    jobs: dict[str, Job] = {}
    for system in systems:
        cfg = pod.config(system)
        settings = pod.system(system, pod.launched if system == BASELINE else 1)
        micro = int(settings["MICRO_BATCH_TOKENS"])
        row = int(settings.get("TRAIN_SEQ_LEN", cfg.train_seq_len))
        # In float32 pieces of a packed row stand side by side, most of them half empty.
        part = 16 if cfg.train_doc_mask else 8
        settings |= {"MICRO_BATCH_TOKENS": max(row, micro // part), "ITERATIONS": COMPARED}
        settings |= {"WARMDOWN_ITERS": 0, "WARMUP_STEPS": 0, "COMPILE": 0}
        if cfg.warmdown_frac:  # shares of so short a run are no shares of the other one
            settings |= {"WARMDOWN_FRAC": 0, "ENABLE_LOOPING_AT": 0.99}
        settings["DTYPE"] = "float32"
        name = f"exact_{system}"
        jobs.setdefault(training_of(cfg), Job(name, inside.training_steps, settings, limit=120))
    return {system: jobs[training_of(pod.config(system))] for system in systems}


def stage_jobs(pod: Pod) -> list[Job]:
    """The evaluators beyond those of the systems, and a sample, on the plain run's artifact."""
    artifact = {"ARTIFACT": pod.out / "plain" / "model.ptz", "VAL_TOKENS": pod.scale.targets}
    common = artifact | {"MODE": "eval", "MAX_EVAL_SECONDS": 0}
    common |= {"DEFAULTS": "baseline", "EVAL_BATCH_TOKENS": pod.scale.eval_batch}
    jobs = []
    for name, settings in MORE_STAGES.items():
        settings = common | settings | (DRY_STAGES[name] if pod.dry else {})
        if name == "adapters":
            settings["VAL_TOKENS"] = pod.scale.adapter_targets
        jobs.append(Job(f"stage_{name}", inside.watched_program, settings, after="plain"))
    few = 4 if pod.dry else 24
    settings = artifact | {"MODE": "sample", "SAMPLE_TOKENS": few, "SEED": 1}
    jobs.append(Job("sample", inside.program, settings, limit=90, after="plain"))
    return jobs


def check_systems(session: Session) -> None:
    """Each system on one GPU, whole: its eighth of a step, its artifact, its scoring stages.

    Beside them float32, and the other stages; as many at a time as there are GPUs (two on one).
    """
    pod = session.pod
    systems = sorted(session.systems, key=lambda name: -SHARE_MS.get(name, math.inf))
    exact = exact_jobs(pod, systems)
    jobs = []
    for system in systems:
        if system != BASELINE:
            settings = pod.system(system, 1) | pod.scoring(system)
            jobs.append(Job(f"run_{system}", inside.watched_program, settings, limit=420))
    if "plain" in pod.finished:
        jobs += stage_jobs(pod)
    different = {job.name: job for job in exact.values()}
    pod.run_all([*jobs, *different.values()], pod.lanes)
    for system in session.systems:
        judge_system(session, system, exact[system].name)
    if "plain" in pod.finished:
        judge_more_stages(session)


def judge_system(session: Session, system: str, exact: str) -> None:
    """A system's row of the table."""
    pod = session.pod
    name = "plain" if system == BASELINE else f"run_{system}"
    row = session.systems[system]
    if name not in pod.finished:
        session.expect(f"{system} ran", "no", "yes: add the check plain", False, advice.TIME)
        return
    finished = pod.finished[name]
    pace = step_ms(finished.steps(), pod.scale.paced_from)
    row |= {"ms": pace, "limit": limit_of(system, pod.launched if name == "plain" else 1)}
    row["warmup"] = finished.result.get("seconds", {}).get("warmup")
    row["memory"] = finished.result.get("peak_memory_bytes", 0) / 2**30
    if name != "plain":
        row["graphs"] = finished.figures.get("graphs")
        row["recompiles"] = finished.figures.get("recompiles")
        if session.ended(name):
            session.speed(f"{system} ms of an eighth of a step", pace, row["limit"])
            new = row["recompiles"]
            session.expect(f"{system} recompiles", new, "0", new == 0, advice.GRAPHS)
            judge_run(session, finished)
        wanted = {stage.name for stage in tg.stages_of(pod.config(system))}
        judge_stages(session, name, wanted, system, system)
    judge_losses(session, system, finished, pod.finished[exact])


def judge_losses(session: Session, system: str, fast: Finished, exact: Finished) -> None:
    """The first losses are those of float32."""
    wanted = exact.losses()
    got = fast.losses()
    gaps = [abs(got[n] - loss) / loss for n, loss in wanted.items() if n in got]
    gap = max(gaps) if len(gaps) == COMPARED else math.inf
    session.systems[system]["gap"] = gap
    do = advice.LOSSES if gaps else advice.diagnose(exact, session.driver_advice)
    session.expect(f"{system} gap to float32", f"{gap:.2g}", f"<= {ALIKE}", gap <= ALIKE, do)


def judge_more_stages(session: Session) -> None:
    """The other evaluators; a fresh process gives the plain run's score again."""
    pod = session.pod
    for name, wanted in WANTED.items():
        session.ended(f"stage_{name}")
        judge_stages(session, f"stage_{name}", wanted, name)
    session.ended("sample")
    before = pod.finished["plain"].result.get("stages", {})
    after = pod.finished["stage_windows"].result.get("stages", {})
    for name in ("plain", "sliding"):
        gap = after.get(name, {}).get("loss", math.nan) - before.get(name, {}).get("loss", math.nan)
        # Inductor times kernels on the spot and may choose others: 6e-6 was seen.
        held = abs(gap) <= 1e-4
        session.expect(f"{name} moved by nats", f"{gap:.1g}", "<= 1e-4", held, advice.AGAIN)


def check_steps(session: Session) -> None:
    """Each kind of system's whole step on all GPUs: its time, waits of the host, idle time.

    Systems that differ in their rates alone are one kind. On one GPU the baseline's and the
    default's only: the check `systems` has timed the others there.
    """
    pod = session.pod
    kinds: dict[str, str] = {}
    for system in session.systems:
        kinds.setdefault(shape_of(pod.config(system)), system)
    examined = session.systems if pod.world > 1 else (BASELINE, FRONT)
    for system in kinds.values():
        if system not in examined:
            continue
        settings = pod.system(system, pod.world)
        name = f"steps_{system}"
        pod.run(Job(name, inside.examined_steps, settings, ranks=pod.world, limit=150))
        finished = session.ended(name)
        if finished and finished.exit_code == 0:
            judge_steps(session, system, finished)
    for system, row in session.systems.items():
        row["like"] = kinds[shape_of(pod.config(system))]
        row["ms_together"] = session.systems[row["like"]].get("ms_together")


def judge_steps(session: Session, system: str, finished: Finished) -> None:
    """What was seen in the steps of a system."""
    pod = session.pod
    figures = finished.figures
    pace = step_ms(finished.steps(), pod.scale.paced_from)
    row = session.systems[system]
    row |= {"ms_together": pace, "gpus": pod.world}
    row.setdefault("graphs", figures["graphs"])
    row.setdefault("recompiles", figures["recompiles"])
    session.speed(f"{system} ms a step on {pod.world} GPUs", pace, limit_of(system, pod.world))
    new = figures["recompiles"]
    session.expect(
        f"{system} graphs, recompiles", [figures["graphs"], new], "0 new", not new, advice.GRAPHS
    )
    waits = figures["waits"]
    session.expect(f"{system} waits in 3 steps", waits, "none", not waits, advice.WAITS)
    session.note(f"{system} kernels a step, their ms", [figures["kernels"], figures["busy_ms"]])
    if pod.world == 1 and not pod.dry:
        busy = figures["busy_ms"] / pace
        session.expect(f"{system} GPU busy", round(busy, 3), ">= 0.9", busy >= 0.9, advice.IDLE)


CHECKS = {
    "device": check_device,
    "group": check_group,
    "refusals": check_refusals,
    "plain": check_plain,
    "signal": check_signal,
    "systems": check_systems,
    "steps": check_steps,
    "code": check_code,
}


# --- main -----------------------------------------------------------------------------------------


def count_gpus() -> tuple[int, float]:
    """GPUs and GiB of the smallest, asked in another process: this one must not touch them."""
    code = "import torch; c = torch.cuda; n = c.device_count(); print(n, min([c."
    code += "get_device_properties(i).total_memory for i in range(n)], default=0))"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
        )
        count, memory = done.stdout.split()[-2:]
        return int(count), int(memory) / 2**30
    except (subprocess.TimeoutExpired, ValueError):
        return 0, 0.0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="on a CPU, with tiny shapes")
    parser.add_argument("--out", type=Path, default=Path("logs/acceptance"))
    parser.add_argument("--only", default=",".join(CHECKS), help="some of the checks")
    parser.add_argument("--systems", default=",".join(published_systems()), help="which systems")
    parser.add_argument("--budget", type=float, default=580.0, help="seconds for all")
    parser.add_argument("--data", type=Path, help=f"folder of shards of {VOCAB} tokens")
    parser.add_argument("--tokenizer", type=Path, help="their SentencePiece model")
    args = parser.parse_args(argv)
    for name, known in (("only", list(CHECKS)), ("systems", all_systems())):
        unknown = set(getattr(args, name).split(",")) - set(known)
        if unknown:
            listed = ", ".join(sorted(unknown))
            parser.error(f"--{name}: there is no {listed}; there are {', '.join(known)}")
    if bool(args.data) != bool(args.tokenizer):
        parser.error("--data and --tokenizer go together: give both or neither")
    return args


def open_session(args: argparse.Namespace) -> Session:
    """Looks for GPUs and makes the text."""
    gpus, memory = (0, 0.0) if args.dry else count_gpus()
    data = (args.data.resolve(), args.tokenizer.resolve()) if args.data else None
    pod = Pod(args.out, gpus, args.dry, args.budget, data)
    if gpus == 1 and memory > 60:
        pod.lanes = 2  # while one compiles, the other computes
    return Session(pod, args.systems.split(","))


def main(argv: Sequence[str]) -> int:
    """Runs the checks -> exit code."""
    begin = time.monotonic()
    args = parse(argv)
    session = open_session(args)
    usable = args.dry or session.pod.gpus > 0
    if not usable:
        print("torch finds no GPU here; --dry rehearses on the CPU", file=sys.stderr)
    try:
        for name in args.only.split(",") if usable else ["device"]:
            run_check(session, name)
    except KeyboardInterrupt:  # jobs end with this process; what is known is reported
        session.expect("ran", "interrupted", "to the end", False, advice.TIME)
    return report(session, time.monotonic() - begin)


def run_check(session: Session, name: str) -> None:
    """One check, if there is time."""
    session.check = name
    if session.pod.left() < 5:
        session.expect("time", "none left", "in time", False, advice.TIME)
        return
    start = time.monotonic()
    try:
        CHECKS[name](session)
    except Exception as error:  # one broken check stops no other
        (session.pod.out / f"{name}.error").write_text(traceback.format_exc())
        told = f"{type(error).__name__}: {error}"[:200]
        session.expect("ran", told, "to the end", False, advice.BUG)
    session.note("seconds", round(time.monotonic() - start, 1))


def interrupt(number: int, frame: object) -> None:
    """A hang-up or SIGTERM ends the checks as Ctrl-C does."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        signal.signal(signal.SIGHUP, interrupt)
    sys.exit(main(sys.argv[1:]))
