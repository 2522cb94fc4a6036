"""What the logs account for: bytes (P4), data (P5), budgets (P6), machine (P7), seeds (P8).

Each check takes a Case and returns one Check.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from tool.case import Case, Track
from tool.finding import Problems, skipped
from tool.logs import Run
from tool.submission import spread
from train_gpt import Check, read_shard

SECONDS_SLACK = 0.5  # the loop checks after a step: up to 0.14 s over was universal and accepted
FULL_TEXT_BYTES = 151_080_891  # UTF-8 of the 50,000 validation documents
FULL_TEXT_TOKENS = 20_000_000  # no tokenizer makes fewer of them
# What evaluators of whole windows leave out at the end: less than 4,096 tokens of under 4 bytes.
TAIL_BYTES = 4_096 * 4
# Where the tail is known: the official export's whole windows of 1,024 tokens, on whose bytes the
# plain evaluators of 17 published folders agree; all of its targets, which are all of the text; and
# the demo's, counted by the data tool (records/track_cpu_1mb/README.md).
KNOWN_BYTES = {62_021_632: 151_080_363, 62_021_845: FULL_TEXT_BYTES, 255_423: 728_927}
# Scored targets of the exports that were published: sp1024, sp4096, sp8192 with and without case
# transform, byte260.
KNOWN_EXPORTS = {
    62_021_632,
    62_021_845,
    45_508_608,
    40_540_160,
    47_851_520,
    47_853_343,
    151_076_864,
}
TAIL_AGAIN = 1e-5  # of the bytes: what a window that scores the tail a second time can add
PUBLISHED_SHARDS = 80
SHARDS_COMPARED = 2  # training shards whose documents are looked up among the validation's


# --- P4: bytes ------------------------------------------------------------------------------------


def check_byte_algebra(case: Case) -> Check:
    """bytes = val_loss / ln 2 x tokens / val_bpb, against known text, the result and a recount."""
    problems = Problems()
    rows = {}
    for run in case.folder.runs:
        final = run.final
        tokens = run.scored_tokens
        if final is None or final.metric != "val_bpb" or not tokens or not final.bpb:
            problems.skip(f"{run.name} does not print loss, bpb and token count together")
        else:
            implied = final.byte_per_token * tokens
            rows[run.name] = {"tokens": tokens, "bytes": round(implied, 1)}
            _check_implied(run, tokens, implied, problems)
    recount = _recount(case)
    told = case.ours[0].score["bytes"] if recount else None
    if told != recount:
        problems.fail(f"the validation text here has {recount} bytes, the result says {told}")
    recounted = f"; recounted here: {recount}" if recount else ""
    found = f"{len(rows)} logs imply the right byte count{recounted}"
    return problems.outcome("P4", found, runs=rows, recount=recount)


def _check_implied(run: Run, tokens: int, implied: float, problems: Problems) -> None:
    """The bytes that loss, bpb and tokens imply, as precise as the digits that are printed."""
    digits = 5e-9 if run.final.exact else 5e-5
    slack = implied * (digits / run.final.val_loss + digits / run.final.bpb) + 1
    told = run.score.get("bytes")
    if told is not None and abs(told - implied) > slack:
        problems.fail(
            f"{run.name}: loss, bpb and tokens imply {implied:.0f} bytes, its result says {told}"
        )
    low, high = _bytes_of(tokens)
    off = max(low - implied, implied - high)
    if off > slack + TAIL_AGAIN * implied:
        problems.fail(
            f"{run.name}: {tokens} tokens stand for {_range_of(low, high)} bytes, its scores imply "
            f"{implied:.0f}"
        )
    elif off > slack:
        problems.warn(
            f"{run.name}: its scores imply {implied:.0f} bytes, {tokens} tokens stand for "
            f"{_range_of(low, high)}: was the tail scored again?"
        )


def _bytes_of(tokens: int) -> tuple[float, float]:
    """At least and at most so many bytes of text can so many scored targets stand for."""
    if tokens in KNOWN_BYTES:
        return KNOWN_BYTES[tokens], KNOWN_BYTES[tokens]
    if tokens > FULL_TEXT_TOKENS:
        return FULL_TEXT_BYTES - TAIL_BYTES, FULL_TEXT_BYTES
    return 0, math.inf


def _range_of(low: float, high: float) -> str:
    return f"{low}" if low == high else f"{low} to {high}"


def _recount(case: Case) -> int | None:
    """Bytes of the validation text by what is here, if it is what the first run had."""
    if case.charges is None or "bytes" not in case.ours[0].score:
        return None
    return int(case.charges.sum(dtype=np.int64))


# --- P5: data -------------------------------------------------------------------------------------


def check_data(case: Case) -> Check:
    """The same whole data for every seed; no validation document among the training documents."""
    stated = {}
    for run in case.folder.runs:
        told = _data_of(run)
        if any(value is not None for value in told.values()):
            stated[run.name] = told
    if not stated:
        return skipped("P5", "the logs say nothing about the data")
    problems = Problems()
    first = next(iter(stated))
    for name, told in stated.items():
        different = [key for key in told if told[key] != stated[first].get(key)]
        if different:
            problems.fail(f"{name} used other data than {first} ({', '.join(different)})")
    for run in case.folder.runs:
        _check_extent(case.track, run, problems)
    shared, text = _shared_documents(case)
    if shared:
        problems.fail(f"{shared} validation documents are also training documents")
    found = f"same data in {len(stated)} logs; {text}"
    return problems.outcome("P5", found, shared_documents=shared, data=stated[first])


def _data_of(run: Run) -> Mapping[str, Any]:
    told = (run.result or {}).get("data")
    return told or {name: run.figures.get(name) for name in ("train_shards", "val_tokens")}


def _check_extent(track: Track, run: Run, problems: Problems) -> None:
    """All of the validation set, and as many training shards as were published."""
    tokens = run.scored_tokens
    if track.total_bytes and tokens and tokens not in KNOWN_EXPORTS:
        problems.warn(
            f"{run.name}: {tokens} validation tokens are no known export of the 50,000 documents"
        )
    shards = run.figures.get("train_shards", PUBLISHED_SHARDS)
    if track.seeds and shards != PUBLISHED_SHARDS:
        problems.warn(f"{run.name}: {shards:.0f} training shards, published: {PUBLISHED_SHARDS}")
    if not run.score.get("complete", True):
        problems.fail(f"{run.name}: only a part of the validation set was scored")


def _shared_documents(case: Case) -> tuple[int | None, str]:
    """How many validation documents are whole documents of the first training shards.

    None if the data is not here.
    """
    paths = case.shards("train")[:SHARDS_COMPARED]
    if case.validation is None or not paths:
        return None, "overlap not tested (the data is not here)"
    bos = int(case.settings.get("BOS_ID", 1))
    ours = _documents(case.validation, bos)
    shared: set[bytes] = set()
    for path in paths:
        shared |= ours & _documents(read_shard(path), bos)
    return len(shared), f"no document of {len(ours)} is in the first {len(paths)} training shards"


def _documents(tokens: np.ndarray, bos: int) -> set[bytes]:
    """The documents of a token stream that hold more than their start."""
    tokens = np.asarray(tokens)
    parts = np.split(tokens, np.flatnonzero(tokens == bos))[1:]
    return {part.tobytes() for part in parts if len(part) > 1}


# --- P6: seconds, tokens, FLOPs -------------------------------------------------------------------


def check_budgets(case: Case) -> Check:
    """Seconds and other budgets: all that touches training data, all that the score needs."""
    problems = Problems()
    rows = {}
    for run in case.folder.runs:
        seconds = _seconds(run)
        rows[run.name] = seconds
        train_cap = case.track.train_seconds or _own_clock(run)
        _check_seconds(run, "training and calibration", seconds["train"], train_cap, problems)
        _check_seconds(run, "evaluation", seconds["eval"], case.track.eval_seconds, problems)
        _check_work(case.track, run, problems)
        _check_wall(case.track, run, seconds["wall"], problems)
    train = max((row["train"] or 0 for row in rows.values()), default=0)
    evaluation = max((row["eval"] or 0 for row in rows.values()), default=0)
    found = f"training at most {train:.1f} s, evaluation at most {evaluation:.1f} s"
    return problems.outcome("P6", found, runs=rows)


def _seconds(run: Run) -> dict[str, float | None]:
    """Seconds of training with calibration, of evaluation and of all, where the log says."""
    if run.result and "seconds" in run.result:
        told = run.result["seconds"]
        named = told.get("train", 0.0) + told.get("calibrate", 0.0)
        train = max(named, told["train_side"])  # equal, unless a log was changed
        return {"train": train, "eval": told["eval_side"], "wall": told["wall"]}
    loop = run.figures.get("train_time_ms")
    if loop is not None:
        loop = loop / 1000 + run.figures.get("calibration_s", 0.0)
    evaluation = run.figures.get("total_eval_ms", sum(run.eval_ms.values()) or None)
    if evaluation is not None:
        evaluation = evaluation / 1000
    return {"train": loop, "eval": evaluation, "wall": None}


def _own_clock(run: Run) -> float | None:
    """The training seconds that a run's own settings allow."""
    settings = run.settings or {}
    if settings.get("SCHEDULE") != "clock":
        return None
    return float(settings.get("MAX_WALLCLOCK_SECONDS", 0))


def _check_seconds(
    run: Run, what: str, spent: float | None, cap: float | None, problems: Problems
) -> None:
    if spent is None:
        problems.skip(f"{run.name} does not state its {what} time")
    elif cap and spent > cap + SECONDS_SLACK:
        problems.fail(f"{run.name}: {what} took {spent:.1f} s, allowed are {cap:.0f}")
    elif cap and spent > cap:
        over = spent - cap
        problems.warn(f"{run.name}: {what} took {spent:.2f} s, {over:.2f} over (within one step)")


def _check_work(track: Track, run: Run, problems: Problems) -> None:
    """Training tokens and FLOPs."""
    limits = (
        ("tokens", "train_tokens", track.train_tokens),
        ("FLOPs", "train_flops", track.train_flops),
    )
    for what, key, cap in limits:
        done = (run.result or {}).get(key, 0)
        if cap and done > cap:
            problems.fail(f"{run.name}: {done:.4g} training {what}, allowed are {cap:.4g}")


def _check_wall(track: Track, run: Run, wall: float | None, problems: Problems) -> None:
    """Both budgets together, against the seconds from start to end."""
    allowed = (track.train_seconds or 0) + (track.eval_seconds or 0)
    if wall and track.train_seconds and wall > allowed:
        problems.warn(f"{run.name}: {wall:.0f} s from start to end, warm-up and packing included")


# --- P7: machine ----------------------------------------------------------------------------------


def check_machine(case: Case) -> Check:
    """What the runs ran on, as the logs tell."""
    problems = Problems()
    rows = {}
    for run in case.folder.runs:
        row = _machine_of(run)
        rows[run.name] = row
        world = row["world_size"]
        if case.track.world and world and world != case.track.world:
            problems.fail(f"{run.name}: {world} processes, the track has {case.track.world}")
        device = row["device"]
        if device and case.track.device not in device:
            problems.fail(f"{run.name}: {device}, the track has {case.track.device}")
        absent = [name for name, value in row.items() if value is None]
        if absent:
            problems.warn(f"{run.name} does not state {', '.join(absent)}")
    if any(one != other for one, other in itertools.pairwise(rows.values())):
        problems.warn("the runs were made on different machines or versions")
    shown = next(iter(rows.values()), dict.fromkeys(("world_size", "device", "torch")))
    found = f"{shown['world_size']} x {shown['device']}, torch {shown['torch']}"
    return problems.outcome("P7", found, runs=rows)


def _machine_of(run: Run) -> dict[str, Any]:
    """Processes, device and torch, from the result, else from the log's text; None: not told."""
    result = run.result or {}
    world = result.get("world_size", run.figures.get("world_size"))
    device = result.get("machine", {}).get("device")
    torch = result.get("versions", {}).get("torch")
    if not device:
        named = re.search(r"NVIDIA [A-Z][\w ]{0,30}?\d\w{0,20}(?: [\w ]{0,20}?HBM3)?", run.text)
        device = named[0] if named else None
    if not torch:
        named = re.search(r"[Tt]orch[^\d\n]{0,12}(\d+\.\d+[\w.+]*)", run.text)
        torch = named[1] if named else None
    return {"world_size": world and int(world), "device": device, "torch": torch}


# --- P8: seeds ------------------------------------------------------------------------------------


def check_seeds(case: Case) -> Check:
    """Distinct seeds, each with a log; all runs of the configuration listed."""
    runs = case.folder.runs
    problems = Problems()
    seeds = [run.seed for run in runs]
    _check_listed(case, problems)
    if len(set(seeds)) < len(seeds):
        problems.fail("two logs have the same seed")
    count = f"{len(set(seeds))} seeds: three are needed for a p value"
    if len(set(seeds)) < case.track.seeds:
        problems.fail(f"{count} and by this track")
    elif len(set(seeds)) < 3:
        problems.warn(count)
    made = (case.folder.submission or {}).get("all_runs")
    left_out = None
    if isinstance(made, list):
        left_out = sum(not row.get("included") for row in made)
        if {row.get("seed") for row in made if row.get("included")} != set(seeds):
            problems.fail("all_runs does not name exactly the shipped logs as included")
    else:
        problems.warn("submission.json does not list all runs that were made (all_runs)")
    scores = [run.final.bpb for run in runs if run.final]
    std = spread(scores)
    deviation = "nan" if std is None else f"{std:.6f}"
    found = f"{len(seeds)} seeds, standard deviation {deviation} bpb, {left_out} runs left out"
    return problems.outcome("P8", found, seeds=seeds, std=std)


def _check_listed(case: Case, problems: Problems) -> None:
    """The seeds that submission.json names against the logs."""
    told = case.folder.submission or {}
    named = told.get("seeds") or told.get("seed_results") or []
    if not isinstance(named, (list, dict)):
        return
    listed = {int(seed) for seed in named if str(seed).isdigit()}
    missing = sorted(listed - {run.seed for run in case.folder.runs})
    if missing:
        shown = ", ".join(map(str, missing))
        problems.fail(f"no log for seed {shown}, which submission.json lists")
    extra = sorted(run.name for run in case.folder.runs if run.seed not in listed)
    if listed and extra:
        problems.fail(f"{', '.join(extra)}: a seed that submission.json does not list")
