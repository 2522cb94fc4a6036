"""The checks of a record folder: packaging and logs (P1 to P10), and the script's own audit.

Each takes a Case and returns one Finding. CHECKS lists them in order; a new check is one more row.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from report import Finding, gather
from runs import Folder, Run, config_text
from source import wrap
from submission import FIELDS, TYPED, summarize

import train_gpt
from train_gpt import sha256


@dataclasses.dataclass(frozen=True)
class Track:
    """What a track demands. None: no limit."""

    total_bytes: int | None = None  # code + model
    model_bytes: int | None = None  # model file alone
    train_seconds: float | None = None  # training loop and all that reads data
    eval_seconds: float | None = None
    train_tokens: int | None = None
    train_flops: float | None = None
    world: int | None = None
    device: str = ""  # part of the device's name
    seeds: int = 0  # fewer are a FAIL, not a WARN


TRACKS = {
    "10min_16mb": Track(
        total_bytes=16_000_000, train_seconds=600, eval_seconds=600, world=8, device="H100", seeds=3
    ),
    "non_record_16mb": Track(total_bytes=16_000_000),
    "cpu_1mb": Track(
        model_bytes=1_000_000, eval_seconds=600, train_tokens=3_000_000, train_flops=4e13
    ),
}
MARGIN = 10_000  # bytes of room that another seed may need
SECONDS_SLACK = 0.5  # the loop checks after a step: up to 0.14 s over was universal and accepted
# Scored validation targets -> bytes of text they stand for (rulings of the contest; the demo's:
# records/track_cpu_1mb/README.md).
KNOWN_BYTES = {
    62_021_632: 151_079_964,
    62_021_845: 151_080_891,
    45_508_608: 151_074_053,
    40_540_160: 151_078_222,
    47_851_520: 151_074_499,
    47_853_343: 151_080_645,
    151_076_864: 151_076_864,
    255_423: 728_927,
}
FULL_TEXT_BYTES = 151_080_000  # the 50,000 documents, whatever the tokenizer
# Settings that say where and how a run was made, not what was trained.
RUN_SETTINGS = frozenset(
    name for name, field in train_gpt.FIELDS.items() if field.metadata["group"] == "run"
)


@dataclasses.dataclass
class Case:
    """A folder under check.

    data: folder of shards to use instead of the logged one; may_run: execute its script.
    """

    folder: Folder
    data: Path | None = None
    may_run: bool = True

    @functools.cached_property
    def track(self) -> Track:
        return TRACKS.get(self.folder.track, Track())

    @functools.cached_property
    def ours(self) -> list[Run]:
        """The runs that end with this project's result."""
        return [run for run in self.folder.runs if run.result]

    def located(self, setting: str) -> Path | None:
        """The file or folder that a path setting of the first run names, if it is here."""
        text = (self.ours[0].settings or {}).get(setting, "") if self.ours else ""
        if setting == "DATA_PATH" and self.data:
            return self.data
        for base in (Path.cwd(), self.folder.path, *self.folder.path.parents):
            if text and (base / text).exists():
                return base / text
        return None

    @functools.cached_property
    def validation(self) -> np.ndarray | None:
        """The validation tokens, if the very shards that the first run scored are here."""
        folder = self.located("DATA_PATH")
        paths = sorted(folder.glob("fineweb_val_*.bin")) if folder else []
        logged = self.ours[0].result.get("data", {}).get("val_sha256") if self.ours else None
        if not paths or [sha256(path) for path in paths] != logged:
            return None
        return np.concatenate([train_gpt.read_shard(path) for path in paths])


def p1_sizes(case: Case) -> Finding:
    """Bytes of the shipped files against the cap, the logs and the JSON."""
    folder, problems, rows = case.folder, [], {}
    if folder.script is None:
        return Finding("P1", "FAIL", "no train_gpt.py in the folder")
    code, track = folder.code_bytes, case.track
    missing = [run.name for run in folder.runs if folder.artifact(run) is None]
    for run in folder.runs:
        artifact = folder.artifact(run)
        logged = run.figures.get("model_bytes")
        model = artifact.stat().st_size if artifact else logged
        if model is None:
            problems.append(("WARN", f"{run.name} states no model size"))
            continue
        rows[run.name] = {"code": code, "model": int(model), "total": int(code + model)}
        if artifact and logged is not None and model != logged:
            problems.append(
                ("FAIL", f"{artifact.name} has {model} bytes, {run.name} says {logged:.0f}")
            )
        stated = (folder.submission or {}).get("artifact_sha256")
        digest = artifact and sha256(artifact)
        if digest and run.result and digest != run.result.get("artifact_sha256"):
            problems.append(
                ("FAIL", f"{artifact.name} is not the artifact of {run.name} (sha256 differs)")
            )
        elif digest and isinstance(stated, dict) and stated.get(str(run.seed)) != digest:
            problems.append(
                ("FAIL", f"{artifact.name} is not the artifact of submission.json (sha256 differs)")
            )
        problems += _cap_problems(run, code, int(model), track)
        logged_code = run.figures.get("code_bytes")
        if logged_code is not None and logged_code not in (code, folder.script.stat().st_size):
            problems.append(
                (
                    "FAIL",
                    f"{run.name} logs a code size of {logged_code:.0f} bytes, the folder has "
                    f"{code}",
                )
            )
    largest = max((row["total"] for row in rows.values()), default=0)
    if missing and not problems:
        problems.append(
            (
                "SKIPPED",
                f"{len(missing)} of {len(folder.runs)} artifacts are not in the folder: sizes are "
                f"the logs' (largest {largest})",
            )
        )
    readable = len(folder.source[0].encode())
    figures = {"code": code, "readable": readable, "packed": _packed_size(folder)}
    return gather(
        "P1",
        problems,
        f"largest total {largest} bytes, code {code} ({readable} readable, "
        f"{figures['packed']} packed)",
        runs=rows,
        **figures,
    )


def _packed_size(folder: Folder) -> int | None:
    """Bytes of the script with its settings as a wrapper; None if it cannot be wrapped."""
    if folder.source[1]:
        return folder.code_bytes
    try:
        return len(wrap(folder.source[0], config_text(folder.config)).encode())
    except ValueError:
        return None


def _cap_problems(run: Run, code: int, model: int, track: Track) -> list[tuple[str, str]]:
    own_cap = run.result["sizes"]["cap"] if run.result and "sizes" in run.result else None
    limits = [
        (code + model, track.total_bytes, "code + model"),
        (model, track.model_bytes, "the model file"),
    ]
    if not (track.total_bytes or track.model_bytes):
        limits = [(code + model, own_cap, "code + model")]
    problems = []
    for size, cap, what in limits:
        if cap and size > cap:
            problems.append(
                ("FAIL", f"{run.name}: {what} has {size} bytes, {size - cap} over the cap of {cap}")
            )
        elif cap and cap - size < MARGIN:
            problems.append(
                (
                    "WARN",
                    f"{run.name}: {what} is only {cap - size} bytes below the cap; "
                    "another seed may cross",
                )
            )
    return problems


def _agrees(stated: Any, derived: Any, path: str, exact: bool = True) -> list[str]:
    """Where two JSON values differ, as sentences.

    Numbers are compared to the digits that are stated unless exact.
    """
    if isinstance(stated, dict) and isinstance(derived, dict):
        names = sorted({*stated, *derived}) if exact else sorted(stated.keys() & derived.keys())
        return [
            line
            for name in names
            for line in _agrees(
                stated.get(name), derived.get(name), f"{path}.{name}" if path else name, exact
            )
        ]
    if isinstance(stated, (int, float)) and isinstance(derived, (int, float)):
        digits = len(str(stated).partition(".")[2])
        tolerance = 1e-12 if exact else 0.5000001 * 10.0**-digits
        return (
            []
            if abs(stated - derived) <= tolerance
            else [f"{path} is {stated}, the logs give {derived}"]
        )
    return [] if stated == derived else [f"{path} is {stated!r}, the logs give {derived!r}"]


def p2_json_from_logs(case: Case) -> Finding:
    """submission.json rebuilt from the logs, field by field."""
    folder = case.folder
    if not folder.runs:
        return Finding("P2", "FAIL", "no training log in the folder")
    if not folder.submission:
        return Finding(
            "P2",
            "FAIL",
            "no submission.json"
            if folder.submission is None
            else "submission.json is no JSON object",
        )
    tampered = [line for run in case.ours for line in _log_contradictions(run)]
    if len(case.ours) < len(folder.runs):
        wrong = _upstream_differences(case)
    else:
        try:
            typed = {name: folder.submission.get(name) for name in TYPED}
            wrong = [
                f"submission.json has no {name}" for name in FIELDS if name not in folder.submission
            ]
            wrong += _agrees(folder.submission, summarize(folder, typed), "")
        except (ValueError, KeyError, TypeError) as error:
            wrong = [f"submission.json cannot be rebuilt ({type(error).__name__}: {error})"]
    return gather(
        "P2",
        [("FAIL", text) for text in tampered + wrong],
        f"submission.json equals what {len(folder.runs)} logs give",
        val_bpb=folder.submission.get("val_bpb"),
    )


def _log_contradictions(run: Run) -> list[str]:
    """A log's printed scores and sizes against the result at its end."""
    lines = []
    for final in (f for f in run.finals if f.exact):
        stage = run.result["stages"].get(final.stage.rsplit("_", 1)[-1], {})
        told, loss = stage.get(stage.get("metric")), stage.get("val_loss", stage.get("loss"))
        if told is None or abs(told - final.bpb) > 6e-9 or abs(loss - final.val_loss) > 6e-9:
            lines.append(
                f"{run.name}: the line of {final.stage} says {final.bpb:.8f}, its result says "
                f"{told}"
            )
    sizes = run.result.get("sizes", {})
    for name in ("code", "model", "total"):
        if run.figures.get(f"{name}_bytes", sizes.get(name)) != sizes.get(name):
            lines.append(
                f"{run.name}: the {name} size is {run.figures[f'{name}_bytes']:.0f} in the log, "
                f"{sizes.get(name)} in its result"
            )
    return lines


def _upstream_differences(case: Case) -> list[str]:
    """Other people's JSON: the fields that upstream-shaped logs can confirm."""
    told, runs = case.folder.submission, [run for run in case.folder.runs if run.final]
    if not runs:
        return ["no log ends with a score"]
    wrong, score, mean = [], told.get("val_bpb"), float(np.mean([run.final.bpb for run in runs]))
    stages = {stage for run in runs for stage in (f.stage for f in run.finals)}
    means = {
        stage: np.mean([f.bpb for run in runs for f in run.finals if f.stage == stage])
        for stage in stages
    }
    if not isinstance(score, (int, float)):
        wrong.append(f"val_bpb is {score!r}, no number")
    elif _agrees(score, mean, "val_bpb", exact=False):
        other = [
            stage
            for stage, value in means.items()
            if not _agrees(score, float(value), "", exact=False)
        ]
        single = [
            run.name
            for run in runs
            if any(not _agrees(score, f.bpb, "", exact=False) for f in run.finals)
        ]
        if other:
            hint = f"; it is the mean of {other[0]}"
        elif single:
            hint = f"; one log alone has it ({single[0]})"
        else:
            hint = "; no log has it"
        wrong.append(f"val_bpb is {score}, the logs' final scores have the mean {mean:.8f}{hint}")
    totals = [run.figures["total_bytes"] for run in runs if "total_bytes" in run.figures]
    if (
        totals
        and isinstance(told.get("bytes_total"), (int, float))
        and told["bytes_total"] != max(totals)
    ):
        wrong.append(
            f"bytes_total is {told['bytes_total']}, the largest logged total {max(totals):.0f}"
        )
    results = told.get("seed_results") if isinstance(told.get("seed_results"), dict) else {}
    for run in runs:
        stated = results.get(str(run.seed))
        bpb = stated.get("val_bpb") if isinstance(stated, dict) else None
        if isinstance(bpb, (int, float)) and _agrees(bpb, run.final.bpb, "", exact=False):
            wrong.append(
                f"seed_results.{run.seed}.val_bpb is {bpb}, {run.name} says {run.final.bpb}"
            )
    return wrong


def p3_same_code(case: Case) -> Finding:
    """Every log comes from the shipped script, with settings that differ in the seed only."""
    folder, problems = case.folder, []
    if folder.script is None or not folder.runs:
        return Finding("P3", "SKIPPED", "needs a script and logs")
    shipped, known = sha256(folder.script), 0
    for run in folder.runs:
        found = re.search(r"code_sha256:([0-9a-f]{64})", run.text)
        logged = run.result.get("code_sha256") if run.result else found and found[1]
        if logged and logged != shipped or found and found[1] != logged:
            problems.append(
                (
                    "FAIL",
                    f"{run.name} was made by another script "
                    f"(sha256 {logged[:12]}, shipped {shipped[:12]})",
                )
            )
        known += bool(logged)
        if run.result and run.result.get("resumed"):
            problems.append(("WARN", f"{run.name} was resumed from a checkpoint"))
    told = [(run.name, run.settings) for run in folder.runs if run.settings]
    for name, settings in told[1:]:
        first = told[0][1]
        different = sorted(
            key
            for key in {*first, *settings}
            if first.get(key) != settings.get(key) and key not in RUN_SETTINGS
        )
        if different:
            problems.append(
                (
                    "FAIL",
                    f"{name} differs from {told[0][0]} in "
                    + ", ".join(
                        f"{key} ({settings.get(key)}, not {first.get(key)})" for key in different
                    ),
                )
            )
    if not known and not problems:
        return Finding(
            "P3",
            "SKIPPED",
            f"the logs state no hash of the script and "
            f"{'settings agree' if len(told) > 1 else 'no settings'}",
        )
    return gather(
        "P3",
        problems,
        f"{known} logs by the shipped script, settings equal except the seed",
        sha256=shipped,
    )


def p4_byte_algebra(case: Case) -> Finding:
    """bytes = val_loss / ln 2 x tokens / val_bpb, against known text, the result and a recount."""
    problems, rows = [], {}
    for run in case.folder.runs:
        final, tokens = run.final, _scored_tokens(run)
        if final is None or final.metric != "val_bpb" or not tokens or not final.bpb:
            problems.append(
                ("SKIPPED", f"{run.name} does not print loss, bpb and token count together")
            )
            continue
        implied = final.byte_per_token * tokens
        digits = 5e-9 if final.exact else 5e-5
        slack = implied * (digits / final.val_loss + digits / final.bpb) + 1
        rows[run.name] = {"tokens": tokens, "bytes": round(implied, 1)}
        told = run.result["result"].get("bytes") if run.result and "result" in run.result else None
        if told is not None and abs(told - implied) > slack:
            problems.append(
                (
                    "FAIL",
                    f"{run.name}: loss, bpb and tokens imply {implied:.0f} bytes, "
                    f"its result says {told}",
                )
            )
        problems += _against_known(run.name, tokens, implied, slack)
    recount = _recount(case)
    if recount:
        told = case.ours[0].result["result"]["bytes"]
        if told != recount:
            problems.append(
                ("FAIL", f"the validation text here has {recount} bytes, the result says {told}")
            )
    return gather(
        "P4",
        problems,
        f"{len(rows)} logs imply the right byte count"
        + (f"; recounted here: {recount}" if recount else ""),
        runs=rows,
        recount=recount,
    )


def _scored_tokens(run: Run) -> int:
    if run.result and "result" in run.result:
        return run.result["result"].get("tokens", 0)
    return int(run.figures.get("val_tokens", 0))


def _against_known(name: str, tokens: int, implied: float, slack: float) -> list[tuple[str, str]]:
    if tokens in KNOWN_BYTES:
        known = KNOWN_BYTES[tokens]
        if abs(implied - known) > slack + 1e-3 * known * (slack > 100):
            return [
                (
                    "FAIL",
                    f"{name}: {tokens} tokens stand for {known} bytes, its scores imply "
                    f"{implied:.0f}",
                )
            ]
        return []
    if tokens > 20_000_000 and abs(implied / FULL_TEXT_BYTES - 1) > 1e-3:
        return [
            (
                "FAIL",
                f"{name}: its scores imply {implied:.0f} bytes; "
                f"the validation text has about {FULL_TEXT_BYTES}",
            )
        ]
    return []


def _recount(case: Case) -> int | None:
    """Bytes of the validation text by the tokenizer here, if it is the one of the first run."""
    tokens, path = case.validation, case.located("TOKENIZER_PATH")
    name = (case.ours[0].settings or {}).get("TOKENIZER_PATH") if case.ours else None
    if (
        tokens is None
        or "bytes" not in case.ours[0].result.get("result", {})
        or not (path or name == "byte260")
    ):
        return None
    if path and sha256(path) != case.ours[0].result["data"]["tokenizer_sha256"]:
        return None
    table = (
        train_gpt.ByteTable.bytes260()
        if name == "byte260"
        else train_gpt.ByteTable.from_sentencepiece(path)
    )
    return int(table.count(tokens).sum(dtype=np.int64))


def p5_data(case: Case) -> Finding:
    """The same whole data for every seed; no validation document among the training documents."""
    problems, runs = [], case.folder.runs
    prints = {
        run.name: (run.result or {}).get("data")
        or {name: run.figures.get(name) for name in ("train_shards", "val_tokens")}
        for run in runs
    }
    stated = {
        name: found
        for name, found in prints.items()
        if any(value is not None for value in found.values())
    }
    if not stated:
        return Finding("P5", "SKIPPED", "the logs say nothing about the data")
    first = next(iter(stated.items()))
    for name, found in stated.items():
        different = [key for key in found if found[key] != first[1].get(key)]
        if different:
            problems.append(
                ("FAIL", f"{name} used other data than {first[0]} ({', '.join(different)})")
            )
    for run in runs:
        tokens = _scored_tokens(run)
        if case.track.total_bytes and tokens and tokens not in KNOWN_BYTES:
            problems.append(
                (
                    "WARN",
                    f"{run.name}: {tokens} validation tokens are no known export "
                    "of the 50,000 documents",
                )
            )
        if case.track.seeds and run.figures.get("train_shards", 80) != 80:
            problems.append(
                (
                    "WARN",
                    f"{run.name}: {run.figures['train_shards']:.0f} training shards, published: 80",
                )
            )
        if run.result and not run.result.get("result", {}).get("complete", True):
            problems.append(("FAIL", f"{run.name}: only a part of the validation set was scored"))
    shared, text = _shared_documents(case)
    if shared:
        problems.append(("FAIL", f"{shared} validation documents are also training documents"))
    return gather(
        "P5",
        problems,
        f"same data in {len(stated)} logs; {text}",
        shared_documents=shared,
        data=first[1],
    )


def _shared_documents(case: Case, shards: int = 2) -> tuple[int | None, str]:
    """Validation documents that are whole documents of the first training shards.

    None if the data is not here.
    """
    folder = case.located("DATA_PATH")
    paths = sorted(folder.glob("fineweb_train_*.bin"))[:shards] if folder else []
    if case.validation is None or not paths:
        return None, "overlap not tested (the data is not here)"
    bos = int((case.ours[0].settings or {}).get("BOS_ID", 1))

    def documents(tokens: np.ndarray) -> set[bytes]:
        cuts = np.flatnonzero(tokens == bos)
        return {part.tobytes() for part in np.split(tokens, cuts)[1:] if len(part) > 1}

    ours = documents(np.asarray(case.validation))
    shared = set().union(
        *(ours & documents(np.asarray(train_gpt.read_shard(path))) for path in paths)
    )
    return len(shared), f"no document of {len(ours)} is in the first {len(paths)} training shards"


def p6_time(case: Case) -> Finding:
    """Seconds and other budgets: all that touches training data, all that the score needs."""
    track, problems, rows = case.track, [], {}
    for run in case.folder.runs:
        train, evaluation, everything = _seconds(run)
        rows[run.name] = {"train": train, "eval": evaluation, "wall": everything}
        settings = run.settings or {}
        clock = (
            float(settings.get("MAX_WALLCLOCK_SECONDS", 0))
            if settings.get("SCHEDULE") == "clock"
            else None
        )
        for what, spent, cap in (
            ("training and calibration", train, track.train_seconds or clock),
            ("evaluation", evaluation, track.eval_seconds),
        ):
            if spent is None:
                problems.append(("SKIPPED", f"{run.name} does not state its {what} time"))
            elif cap and spent > cap + SECONDS_SLACK:
                problems.append(
                    ("FAIL", f"{run.name}: {what} took {spent:.1f} s, allowed are {cap:.0f}")
                )
            elif cap and spent > cap:
                problems.append(
                    (
                        "WARN",
                        f"{run.name}: {what} took {spent:.2f} s, "
                        f"{spent - cap:.2f} over (within one step)",
                    )
                )
        result = run.result or {}
        for what, key, cap in (
            ("tokens", "train_tokens", track.train_tokens),
            ("FLOPs", "train_flops", track.train_flops),
        ):
            if cap and result.get(key, 0) > cap:
                problems.append(
                    (
                        "FAIL",
                        f"{run.name}: {result[key]:.4g} training {what}, allowed are {cap:.4g}",
                    )
                )
        if (
            everything
            and track.train_seconds
            and everything > track.train_seconds + (track.eval_seconds or 0)
        ):
            problems.append(
                (
                    "WARN",
                    f"{run.name}: {everything:.0f} s from start to end, warm-up and packing "
                    "included",
                )
            )
    longest = max((row["train"] or 0 for row in rows.values()), default=0)
    return gather(
        "P6",
        problems,
        f"training at most {longest:.1f} s, evaluation at most "
        f"{max((row['eval'] or 0 for row in rows.values()), default=0):.1f} s",
        runs=rows,
    )


def _seconds(run: Run) -> tuple[float | None, float | None, float | None]:
    """Seconds of training with calibration, of evaluation and of all, where the log says."""
    if run.result and "seconds" in run.result:
        seconds = run.result["seconds"]
        named = [seconds.get(name, 0.0) for name in ("train", "calibrate")]
        return max(sum(named), seconds["train_side"]), seconds["eval_side"], seconds["wall"]
    loop = run.figures.get("train_time_ms")
    evaluation = run.figures.get("total_eval_ms", sum(run.eval_ms.values()) or None)
    return (
        None if loop is None else loop / 1000 + run.figures.get("calibration_s", 0.0),
        None if evaluation is None else evaluation / 1000,
        None,
    )


def p7_hardware(case: Case) -> Finding:
    """What the runs ran on, as the logs tell."""
    track, problems, seen = case.track, [], {}
    for run in case.folder.runs:
        result = run.result or {}
        world = result.get("world_size", run.figures.get("world_size"))
        named = re.search(r"NVIDIA [A-Z][\w ]*?\d\w*(?: [\w ]*?HBM3)?", run.text)
        device = result.get("machine", {}).get("device") or (named[0] if named else None)
        logged = re.findall(r"[Tt]orch[^\d\n]{0,12}(\d+\.\d+[\w.+]*)", run.text)
        torch = result.get("versions", {}).get("torch") or next(iter(logged), None)
        seen[run.name] = {"world_size": world and int(world), "device": device, "torch": torch}
        if track.world and world and world != track.world:
            problems.append(
                ("FAIL", f"{run.name}: {world:.0f} processes, the track has {track.world}")
            )
        if track.device and device and track.device not in device:
            problems.append(("FAIL", f"{run.name}: {device}, the track has {track.device}"))
        absent = [name for name, value in seen[run.name].items() if value is None]
        if absent:
            problems.append(("WARN", f"{run.name} does not state {', '.join(absent)}"))
    if len({tuple(row.values()) for row in seen.values()}) > 1:
        problems.append(("WARN", "the runs were made on different machines or versions"))
    shown = next(iter(seen.values()), {})
    return gather(
        "P7",
        problems,
        f"{shown.get('world_size')} x {shown.get('device')}, torch {shown.get('torch')}",
        runs=seen,
    )


def p8_seeds(case: Case) -> Finding:
    """Distinct seeds, each with a log; all runs of the configuration listed."""
    runs, told, problems = case.folder.runs, case.folder.submission or {}, []
    seeds = [run.seed for run in runs]
    listed = told.get("seeds") or told.get("seed_results") or []
    listed = (
        {int(s) for s in listed if str(s).isdigit()} if isinstance(listed, (list, dict)) else set()
    )
    missing = sorted(listed - set(seeds))
    if missing:
        problems.append(
            ("FAIL", f"no log for seed {', '.join(map(str, missing))}, which submission.json lists")
        )
    extra = sorted(str(run.name) for run in runs if listed and run.seed not in listed)
    if extra:
        problems.append(("FAIL", f"{', '.join(extra)}: a seed that submission.json does not list"))
    if len(set(seeds)) < len(seeds):
        problems.append(("FAIL", "two logs have the same seed"))
    needed = case.track.seeds
    if len(set(seeds)) < max(needed, 3):
        problems.append(
            (
                "FAIL" if needed else "WARN",
                f"{len(set(seeds))} seeds: three are needed for a p value"
                + (" and by this track" if needed else ""),
            )
        )
    made = told.get("all_runs")
    if isinstance(made, list) and not {
        row.get("seed") for row in made if row.get("included")
    } == set(seeds):
        problems.append(("FAIL", "all_runs does not name exactly the shipped logs as included"))
    elif not isinstance(made, list):
        problems.append(
            ("WARN", "submission.json does not list all runs that were made (all_runs)")
        )
    scores = [run.final.bpb for run in runs if run.final]
    std = float(np.std(scores, ddof=1)) if len(scores) > 1 else math.nan
    left_out = sum(not row.get("included") for row in made) if isinstance(made, list) else None
    return gather(
        "P8",
        problems,
        f"{len(seeds)} seeds, standard deviation {std:.6f} bpb, {left_out} runs left out",
        seeds=seeds,
        std=None if math.isnan(std) else std,
    )


README_PARTS = {
    "a command": r"torchrun|python\s+\S*train_gpt",
    "results": r"(?im)^#+ .*result|\bval_bpb\b",
    "credits": r"(?im)^#+ .*(credit|lineage|attribution|built on)",
    "what was done": r"(?m)^#+ ",
}


def p9_hygiene(case: Case) -> Finding:
    """The files a record has and no others; README, requirements and names."""
    folder, problems = case.folder, []
    names = {str(p.relative_to(folder.path)) for p in folder.files}
    readme = next((p for p in folder.files if p.name.lower() == "readme.md"), None)
    text = readme.read_text(encoding="utf-8", errors="replace") if readme else ""
    if readme is None:
        problems.append(("FAIL", "no README.md"))
    absent = [
        part for part, pattern in README_PARTS.items() if readme and not re.search(pattern, text)
    ]
    if absent:
        problems.append(("WARN", f"README.md has no {', no '.join(absent)}"))
    if "to complete" in text:
        problems.append(("WARN", "README.md has parts to complete"))
    told = (folder.submission or {}).get("val_bpb")
    if readme and isinstance(told, (int, float)) and f"{told:.4f}"[:-1] not in text:
        problems.append(
            ("WARN", f"README.md does not show the val_bpb of submission.json ({told})")
        )
    absent = [
        field
        for field in ("author", "name")
        if folder.submission and not folder.submission.get(field)
    ]
    if absent:
        problems.append(("WARN", f"submission.json leaves {', '.join(absent)} empty"))
    loose = [line for line in folder.requirements if not re.search(r"==|@", line)]
    if not folder.requirements:
        problems.append(("WARN", "no requirements.txt"))
    elif loose:
        problems.append(("WARN", f"requirements.txt does not pin {', '.join(loose)}"))
    odd = sorted(name for name in names if not re.fullmatch(r"[\w./+-]+", name, re.A))
    if odd:
        problems.append(("FAIL", f"unreadable file names: {', '.join(map(repr, odd))}"))
    local = [
        run.name
        for run in folder.runs
        if re.search(r"(?<![\w.])/(?:home|root|Users|tmp|workspace|mnt)/\w", run.text)
    ]
    if local:
        problems.append(("WARN", f"absolute paths of a machine in {', '.join(local)}"))
    outside = _changed_outside(folder)
    if outside:
        problems.append(
            ("WARN", f"uncommitted changes outside the folder: {', '.join(outside[:5])}")
        )
    return gather(
        "P9",
        problems,
        f"{len(names)} files, README complete, requirements pinned",
        files=sorted(names),
    )


def _changed_outside(folder: Folder) -> list[str]:
    """Changed tracked files that lie outside the folder; empty without git.

    Changed since the last commit.
    """
    try:
        done = subprocess.run(
            ["git", "-C", str(folder.path), "diff", "--name-only", "HEAD", "--", ":/", ":!."],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.split() if done.returncode == 0 else []


# Hint channels that read the target (#2041).
ILLEGAL_COUNTERS = ("within_gate", "word_gate", "agree2plus")


def p10_gates(case: Case) -> Finding:
    """Every optional scorer says how often it acted."""
    problems, counters = [], {}
    for run in case.folder.runs:
        found = {
            name: int(value)
            for name, value in re.findall(r"\b(\w*(?:gate|agree)\w*)[=:]\s*(\d+)\b", run.text)
        }
        found.update(((run.result or {}).get("result") or {}).get("counters", {}))
        counters[run.name] = found
        acted = [name for name in ILLEGAL_COUNTERS if found.get(name)]
        if acted:
            problems.append(
                (
                    "FAIL",
                    f"{run.name}: {', '.join(acted)} acted; as coded upstream they read the target",
                )
            )
        silent = [
            name
            for name, stage in ((run.result or {}).get("stages") or {}).items()
            if name not in ("plain", "sliding")
            and "counters" not in stage
            and "skipped" not in stage
        ]
        if silent:
            problems.append(
                ("WARN", f"{run.name}: the stage {', '.join(silent)} prints no counter")
            )
    if not any(counters.values()) and not case.ours:
        return Finding("P10", "SKIPPED", "the logs print no gate counters")
    return gather("P10", problems, "no optional scorer acted unseen", counters=counters)


def own_audit(case: Case) -> Finding:
    """The verdicts that the script itself gave, and how its runs ended."""
    problems = []
    if not case.ours:
        return Finding("AUDIT", "SKIPPED", "the logs hold no result with an audit")
    for run in case.ours:
        result = run.result
        if result.get("exit_code") != 0:
            problems.append(
                (
                    "FAIL",
                    f"{run.name} ended with exit code {result.get('exit_code')} "
                    f"({result.get('status')})",
                )
            )
        if "val_bpb" not in result.get("result", {}):
            problems.append(("FAIL", f"{run.name} has no valid val_bpb"))
        for stage, found in result.get("stages", {}).items():
            if "audit" not in found:
                problems.append(("WARN", f"{run.name}: stage {stage} was skipped or not audited"))
            verdicts = {
                check: verdict["verdict"] for check, verdict in found.get("audit", {}).items()
            }
            problems += [
                (
                    "FAIL" if text.startswith("FAIL") else "WARN",
                    f"{run.name} {stage} {check}: {text}",
                )
                for check, text in verdicts.items()
                if text != "PASS"
            ]
    return gather("AUDIT", problems, f"all audits of {len(case.ours)} runs passed")


CHECKS: dict[str, Callable[[Case], Finding]] = {
    "P1": p1_sizes,
    "P2": p2_json_from_logs,
    "P3": p3_same_code,
    "P4": p4_byte_algebra,
    "P5": p5_data,
    "P6": p6_time,
    "P7": p7_hardware,
    "P8": p8_seeds,
    "P9": p9_hygiene,
    "P10": p10_gates,
    "AUDIT": own_audit,
}


def guarded(name: str, check: Callable[[Case], Finding], case: Case) -> Finding:
    """The check's finding; a FAIL if the folder's own files make it stumble.

    They may hold anything.
    """
    try:
        return check(case)
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
        ArithmeticError,
        OSError,
    ) as error:
        return Finding(
            name,
            "FAIL",
            f"the folder's logs or JSON are malformed ({type(error).__name__}: {error})",
        )
