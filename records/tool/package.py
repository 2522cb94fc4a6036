"""What the folder holds: sizes (P1), JSON (P2), code (P3, S6), files (P9), own checks (AUDIT).

Each check takes a Case and returns one Check.
"""

from __future__ import annotations

import re
import statistics
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tool import ROOT
from tool.case import RUN_SETTINGS, Case, Track
from tool.finding import Problems, skipped
from tool.folder import Folder, config_text, read_lenient
from tool.logs import Final, Run
from tool.script import PLACES_AND_LABELS
from tool.strip import UNREADABLE, same_program
from tool.submission import FIELDS, TYPED, Typed, has_score, summarize
from tool.wrapper import wrap
from train_gpt import Check, sha256

MARGIN = 10_000  # bytes of room that another seed may need


# --- P1: sizes ------------------------------------------------------------------------------------


def check_sizes(case: Case) -> Check:
    """Bytes of the shipped files against the cap, the logs and the JSON."""
    folder = case.folder
    problems = Problems()
    if folder.script is None:
        problems.fail("no train_gpt.py in the folder")
        return problems.outcome("P1", "")
    rows = {}
    for run in folder.runs:
        _check_artifact(folder, run, problems)
        model = _model_bytes(folder, run)
        if model is None:
            problems.warn(f"{run.name} states no model size")
        else:
            total = folder.code_bytes + model
            rows[run.name] = {"code": folder.code_bytes, "model": model, "total": total}
            _check_cap(case.track, run, rows[run.name], problems)
            _check_code_size(folder, run, problems)
    if not folder.runs:
        problems.skip(f"no logs; the code has {folder.code_bytes} bytes")
    largest = max((row["total"] for row in rows.values()), default=0)
    missing = [run for run in folder.runs if folder.artifact(run) is None]
    if missing and not problems:
        problems.skip(
            f"{len(missing)} of {len(folder.runs)} artifacts are not in the folder: sizes are the "
            f"logs' (largest {largest})"
        )
    code = folder.code_bytes
    readable = folder.readable.stat().st_size if folder.readable else len(folder.source.encode())
    packed = _packed_size(folder)
    found = f"largest total {largest} bytes, code {code} ({readable} readable, {packed} packed)"
    return problems.outcome("P1", found, runs=rows, code=code, readable=readable, packed=packed)


def _model_bytes(folder: Folder, run: Run) -> int | None:
    """Of the artifact if it is here, else as its log says."""
    artifact = folder.artifact(run)
    if artifact:
        return artifact.stat().st_size
    logged = run.figures.get("model_bytes")
    return None if logged is None else int(logged)


def _check_artifact(folder: Folder, run: Run, problems: Problems) -> None:
    """The file against the log and against submission.json."""
    artifact = folder.artifact(run)
    if artifact is None:
        return
    size = artifact.stat().st_size
    logged = run.figures.get("model_bytes", size)
    if size != logged:
        problems.fail(f"{artifact.name} has {size} bytes, {run.name} says {logged:.0f}")
    digest = sha256(artifact)
    stated = (folder.submission or {}).get("artifact_sha256")
    if run.result and digest != run.result.get("artifact_sha256"):
        problems.fail(f"{artifact.name} is not the artifact of {run.name} (sha256 differs)")
    elif isinstance(stated, dict) and stated.get(str(run.seed)) != digest:
        problems.fail(f"{artifact.name} is not the artifact of submission.json (sha256 differs)")


def _check_code_size(folder: Folder, run: Run, problems: Problems) -> None:
    logged = run.figures.get("code_bytes")
    allowed = (None, folder.code_bytes, folder.script.stat().st_size)
    if logged not in allowed:
        problems.fail(
            f"{run.name} logs a code size of {logged:.0f} bytes, the folder has {folder.code_bytes}"
        )


def _check_cap(track: Track, run: Run, sizes: Mapping[str, int], problems: Problems) -> None:
    """Against the track's limits; where it has none, against the run's own."""
    total_cap = track.total_bytes
    if not (track.total_bytes or track.model_bytes):
        total_cap = (run.result or {}).get("sizes", {}).get("cap")
    limits = (
        ("code + model", sizes["total"], total_cap),
        ("the model file", sizes["model"], track.model_bytes),
    )
    for what, size, cap in limits:
        room = cap - size if cap else MARGIN
        if room < 0:
            problems.fail(f"{run.name}: {what} has {size} bytes, {-room} over the cap of {cap}")
        elif room < MARGIN:
            problems.warn(
                f"{run.name}: {what} is only {room} bytes below the cap; another seed may cross"
            )


def _packed_size(folder: Folder) -> int | None:
    """Bytes of the script with its settings as a wrapper; None if it cannot be wrapped."""
    if folder.packed:
        return folder.code_bytes
    try:
        return len(wrap(folder.source, config_text(folder.config)).encode())
    except ValueError:
        return None


# --- P2: JSON -------------------------------------------------------------------------------------


def check_json(case: Case) -> Check:
    """submission.json rebuilt from the logs, field by field."""
    folder = case.folder
    problems = Problems()
    if not folder.runs:
        problems.fail("no training log in the folder")
    elif folder.submission is None:
        problems.fail("no submission.json")
    elif not folder.submission:
        problems.fail("submission.json is no JSON object")
    else:
        for run in case.ours:
            _check_log(run, problems)
        if len(case.ours) == len(folder.runs):
            _check_rebuilt(folder, problems)
        else:
            _check_upstream(folder, problems)
    found = f"submission.json equals what {len(folder.runs)} logs give"
    return problems.outcome("P2", found, val_bpb=(folder.submission or {}).get("val_bpb"))


def _check_rebuilt(folder: Folder, problems: Problems) -> None:
    """Our own JSON: every field, exactly."""
    typed = Typed(*(folder.submission.get(name) for name in TYPED))
    try:
        derived = summarize(folder, typed)
    except (ValueError, KeyError, TypeError) as error:
        problems.fail(f"submission.json cannot be rebuilt ({type(error).__name__}: {error})")
        return
    for name in FIELDS:
        if name not in folder.submission:
            problems.fail(f"submission.json has no {name}")
    for sentence in _differences(folder.submission, derived, ""):
        problems.fail(sentence)


def _differences(stated: Any, derived: Any, path: str) -> list[str]:
    """Where two JSON values differ, as sentences."""
    if isinstance(stated, dict) and isinstance(derived, dict):
        sentences = []
        for name in sorted({*stated, *derived}):
            below = f"{path}.{name}" if path else name
            sentences += _differences(stated.get(name), derived.get(name), below)
        return sentences
    if isinstance(stated, (int, float)) and isinstance(derived, (int, float)):
        if abs(stated - derived) <= 1e-12:
            return []
        return [f"{path} is {stated}, the logs give {derived}"]
    return [] if stated == derived else [f"{path} is {stated!r}, the logs give {derived!r}"]


def _check_log(run: Run, problems: Problems) -> None:
    """A log's printed scores and sizes against the result at its end."""
    for final in run.finals:
        stage = run.result["stages"].get(final.stage.rsplit("_", 1)[-1], {})
        if final.exact and not _same_score(final, stage):
            told = stage.get(stage.get("metric"))
            problems.fail(
                f"{run.name}: the line of {final.stage} says {final.bpb:.8f}, its result says "
                f"{told}"
            )
    sizes = run.result.get("sizes", {})
    for name in ("code", "model", "total"):
        told = sizes.get(name)
        logged = run.figures.get(f"{name}_bytes", told)
        if logged != told:
            problems.fail(
                f"{run.name}: the {name} size is {logged:.0f} in the log, {told} in its result"
            )


def _same_score(final: Final, stage: Mapping[str, Any]) -> bool:
    """Whether a printed score is the stage's, to the eight digits that are printed."""
    bpb = stage.get(stage.get("metric"))
    loss = stage.get("val_loss", stage.get("loss"))
    if bpb is None or loss is None:
        return False
    return abs(bpb - final.bpb) <= 6e-9 and abs(loss - final.val_loss) <= 6e-9


def _check_upstream(folder: Folder, problems: Problems) -> None:
    """Other people's JSON: the fields that upstream-shaped logs can confirm."""
    runs = [run for run in folder.runs if run.final]
    if not runs:
        problems.fail("no log ends with a score")
        return
    told = folder.submission
    score = told.get("val_bpb")
    mean = statistics.fmean(run.final.bpb for run in runs)
    if not isinstance(score, (int, float)):
        problems.fail(f"val_bpb is {score!r}, no number")
    elif not _rounds_to(score, mean):
        hint = _where_from(score, runs)
        problems.fail(
            f"val_bpb is {score}, the logs' final scores have the mean {mean:.8f}; {hint}"
        )
    totals = [run.figures["total_bytes"] for run in runs if "total_bytes" in run.figures]
    stated = told.get("bytes_total")
    if totals and isinstance(stated, (int, float)) and stated != max(totals):
        problems.fail(f"bytes_total is {stated}, the largest logged total {max(totals):.0f}")
    results = told.get("seed_results")
    for run in runs:
        stated = results.get(str(run.seed)) if isinstance(results, dict) else None
        bpb = stated.get("val_bpb") if isinstance(stated, dict) else None
        if isinstance(bpb, (int, float)) and not _rounds_to(bpb, run.final.bpb):
            problems.fail(
                f"seed_results.{run.seed}.val_bpb is {bpb}, {run.name} says {run.final.bpb}"
            )


def _rounds_to(stated: float, derived: float) -> bool:
    """Whether a figure equals another to the digits that are stated."""
    digits = len(str(stated).partition(".")[2])
    return abs(stated - derived) <= 0.5000001 * 10.0**-digits


def _where_from(score: float, runs: list[Run]) -> str:
    """Which of the logs' figures a stated score is, if it is not the mean of the last ones."""
    by_stage: dict[str, list[float]] = {}
    for run in runs:
        for final in run.finals:
            by_stage.setdefault(final.stage, []).append(final.bpb)
    for stage, scores in by_stage.items():
        if _rounds_to(score, statistics.fmean(scores)):
            return f"it is the mean of {stage}"
    for run in runs:
        if any(_rounds_to(score, final.bpb) for final in run.finals):
            return f"one log alone has it ({run.name})"
    return "no log has it"


# --- P3: code -------------------------------------------------------------------------------------


def check_code(case: Case) -> Check:
    """Every log comes from the shipped script, with settings that differ in the seed only."""
    folder = case.folder
    if folder.script is None or not folder.runs:
        return skipped("P3", "needs a script and logs")
    problems = Problems()
    shipped = sha256(folder.script)
    known = 0
    for run in folder.runs:
        hashes = _hashes_in(run)
        known += bool(hashes)
        for logged in hashes - {shipped}:
            problems.fail(
                f"{run.name} was made by another script "
                f"(sha256 {logged[:12]}, shipped {shipped[:12]})"
            )
        if run.result and run.result.get("resumed"):
            problems.warn(f"{run.name} was resumed from a checkpoint")
    told = [run for run in folder.runs if run.settings]
    for run in told[1:]:
        different = _different_settings(told[0].settings, run.settings)
        if different:
            problems.fail(f"{run.name} differs from {told[0].name} in {', '.join(different)}")
    if not known and not problems:
        settings = "settings agree" if len(told) > 1 else "no settings"
        return skipped("P3", f"the logs state no hash of the script and {settings}")
    found = f"{known} logs by the shipped script, settings equal except the seed"
    return problems.outcome("P3", found, sha256=shipped)


def _hashes_in(run: Run) -> set[str]:
    """The script's SHA-256 as the log prints it and as its result has it."""
    hashes = re.findall(r"code_sha256:([0-9a-f]{64})", run.text)[:1]
    if run.result and run.result.get("code_sha256"):
        hashes.append(run.result["code_sha256"])
    return set(hashes)


def _different_settings(first: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Settings that differ, but for those that only say where and how a run was made."""
    different = []
    for name in sorted({*first, *other} - RUN_SETTINGS):
        if first.get(name) != other.get(name) and not PLACES_AND_LABELS.fullmatch(name):
            different.append(f"{name} ({other.get(name)}, not {first.get(name)})")
    return different


# --- S6: the readable copy ------------------------------------------------------------------------


def check_readable(case: Case) -> Check:
    """A readable copy beside the script is the same program, but for comments and docstrings."""
    folder = case.folder
    problems = Problems()
    if folder.readable is None:
        return problems.outcome("S6", "no readable copy")
    named = f"{folder.readable.name} and {folder.script.name}"
    try:
        same = same_program(read_lenient(folder.readable), folder.source)
    except UNREADABLE as error:
        problems.fail(f"{named} cannot be compared ({type(error).__name__}: {error})")
    else:
        if not same:
            problems.fail(f"{named} are two programs: more than comments and docstrings differs")
    return problems.outcome("S6", f"{named} are one program")


# --- P9: files ------------------------------------------------------------------------------------

README_PARTS = {
    "a command": r"torchrun|python\s+\S*train_gpt",
    "results": r"(?im)^#+ .*result|\bval_bpb\b",
    "credits": r"(?im)^#+ .*(credit|lineage|attribution|built on)",
    "what was done": r"(?m)^#+ ",
}


def check_files(case: Case) -> Check:
    """The files a record has and no others; README, requirements and names."""
    folder = case.folder
    problems = Problems()
    _check_readme(folder, problems)
    told = folder.submission or {}
    absent = [name for name in ("author", "name") if told and not told.get(name)]
    if absent:
        problems.warn(f"submission.json leaves {', '.join(absent)} empty")
    loose = [line for line in folder.requirements if not re.search(r"==|@", line)]
    if not folder.requirements:
        problems.warn("no requirements.txt")
    elif loose:
        problems.warn(f"requirements.txt does not pin {', '.join(loose)}")
    names = sorted(str(path.relative_to(folder.path)) for path in folder.files)
    odd = [repr(name) for name in names if not re.fullmatch(r"[\w./+-]+", name, re.A)]
    if odd:
        problems.fail(f"unreadable file names: {', '.join(odd)}")
    path_of_a_machine = re.compile(r"(?<![\w.])/(?:home|root|Users|tmp|workspace|mnt)/\w")
    local = [run.name for run in folder.runs if path_of_a_machine.search(run.text)]
    if local:
        problems.warn(f"absolute paths of a machine in {', '.join(local)}")
    outside = _changed_outside(folder)
    if outside:
        problems.warn(f"uncommitted changes outside the folder: {', '.join(outside[:5])}")
    found = f"{len(names)} files, README complete, requirements pinned"
    return problems.outcome("P9", found, files=names)


def _check_readme(folder: Folder, problems: Problems) -> None:
    path = next((path for path in folder.files if path.name.lower() == "readme.md"), None)
    if path is None:
        problems.fail("no README.md")
        return
    text = read_lenient(path)
    absent = [part for part, pattern in README_PARTS.items() if not re.search(pattern, text)]
    if absent:
        problems.warn(f"README.md has no {', no '.join(absent)}")
    if "to complete" in text:
        problems.warn("README.md has parts to complete")
    told = (folder.submission or {}).get("val_bpb")
    if isinstance(told, (int, float)) and f"{told:.4f}"[:-1] not in text:
        problems.warn(f"README.md does not show the val_bpb of submission.json ({told})")


def _changed_outside(folder: Folder) -> list[str]:
    """Tracked files outside the folder, changed since the last commit; empty without git.

    Only this repository is asked: git obeys the configuration of the place it looks at, which may
    name programs to run, and a foreign folder may bring its own.
    """
    if ROOT not in folder.path.parents or any(_has_git(up) for up in _between(folder.path)):
        return []
    place = f":!{folder.path.relative_to(ROOT)}"
    command = ["git", "-C", str(ROOT), "diff", "--name-only", "HEAD", "--", ".", place]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.split() if done.returncode == 0 else []


def _between(path: Path) -> list[Path]:
    """The folder and those above it, up to this repository's own."""
    return [path, *(up for up in path.parents if ROOT in up.parents)]


def _has_git(path: Path) -> bool:
    return (path / ".git").exists()


# --- AUDIT: what the script said of its own scores ------------------------------------------------


def check_own_audit(case: Case) -> Check:
    """The verdicts that the script itself gave, and how its runs ended."""
    if not case.ours:
        return skipped("AUDIT", "the logs hold no result with an audit")
    problems = Problems()
    for run in case.ours:
        result = run.result
        code = result.get("exit_code")
        if code != 0:
            problems.fail(f"{run.name} ended with exit code {code} ({result.get('status')})")
        if not has_score(run):
            problems.fail(f"{run.name} has no valid val_bpb")
        if not result.get("stages"):
            problems.warn(f"{run.name} scored no stage")
        for name, stage in result.get("stages", {}).items():
            _check_stage(run.name, name, stage, problems)
    found = f"the script's own audits of {len(case.ours)} runs passed"
    return problems.outcome("AUDIT", found)


def _check_stage(run: str, name: str, stage: Mapping[str, Any], problems: Problems) -> None:
    if "audit" not in stage:
        problems.warn(f"{run}: stage {name} was skipped or not audited")
    for check, outcome in stage.get("audit", {}).items():
        verdict = outcome["verdict"]
        sentence = f"{run} {name} {check}: {verdict}"
        if verdict.startswith("FAIL"):
            problems.fail(sentence)
        elif verdict != "PASS":
            problems.warn(sentence)
