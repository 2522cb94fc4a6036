"""Scoring again: is the logged score that of the artifact (R6), and with two processes too (R10)?

A score that only the shipped script states proves nothing: it may state any. So the artifact is
scored by this repository's own script as well; where that cannot read it, the shipped script must
at least pay for random tokens what they cost. Each check takes a Case and returns one Check, or
raises NotHere.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tool import ROOT
from tool.case import Case
from tool.finding import NotHere, Problems
from tool.logs import Run
from tool.rerun import dies_with_parent, last_words, launcher, require_runnable, sandbox
from train_gpt import MAGIC, Check

OWN_SCRIPT = ROOT / "train_gpt.py"
# Nats per token, and bits per byte, between two runs of one script: on CPUs, and on GPUs, where
# another number of processes, or of documents at a time, rounds otherwise.
TOLERANCE = {"cpu": 1e-6, "cuda": 1e-4}
OWN_TOLERANCE = 1e-4  # ... between two scripts that compute the same, rounding apart
LUCK = 20.0  # nats: random tokens come cheaper by so much with a chance of e^-20


# --- one artifact, one process --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rescore:
    """What scoring an artifact alone gave."""

    score: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # empty if it failed
    error: str = ""  # the last words of a process that gave no score
    refused: str = ""  # what the watch did not allow

    def gap(self, run: Run) -> float:
        """To the logged score: nats per token or bits per byte, whichever is more."""
        return max(abs(self.score[name] - run.score[name]) for name in ("val_loss", "val_bpb"))

    def confirms(self, run: Run) -> bool:
        """Whether the gap is no more than rounding on machines like the run's explains."""
        return self.gap(run) <= TOLERANCE.get(run.result["machine"]["type"], OWN_TOLERANCE)


def rescore(
    case: Case,
    run: Run,
    world: int = 1,
    script: Path | None = None,
    validation: np.ndarray | None = None,
) -> Rescore:
    """Scores a run's artifact in a fresh process; alone, it is watched.

    script: another one than the folder's, of which the stage that the run reports is taken;
    validation: tokens in place of those that were scored.
    """
    artifact = artifact_of(case, run)
    seconds = run.result["seconds"]
    told = f"scoring {run.name} again, {world} processes: its own took {seconds['eval_side']:.0f} s"
    print(told, file=sys.stderr, flush=True)
    splits = ["val"] if validation is None else []
    with sandbox(case, splits, script, validation) as box:
        model = box.root / "run" / "model.ptz"
        shutil.copy(artifact, model)
        command = [*dies_with_parent("KILL"), *launcher(world), str(box.script)]
        if world == 1:
            command = box.watched("fineweb_train")
        limit = 300 + 6 * seconds["wall"]
        done = box.run(command, limit, MODE="eval", ARTIFACT=str(model), MAX_EVAL_SECONDS="0")
        result = box.root / "out" / "result.json"
        found = json.loads(result.read_text()) if result.is_file() else {}
        refused = box.refused
    score = found.get("result", {})
    if script:
        score = found.get("stages", {}).get(run.score["stage"], {})
    if {"val_loss", "val_bpb"} <= score.keys():
        return Rescore(score, refused=refused)
    return Rescore(error=last_words(done), refused=refused)


def artifact_of(case: Case, run: Run) -> Path:
    """A run's artifact. Raises NotHere if it, or what it was scored on, is not here."""
    artifact = case.folder.artifact(run)
    if artifact is None:
        raise NotHere(f"the artifact of {run.name} is not in the folder")
    if case.validation is None:
        raise NotHere("the validation shards that were scored are not here")
    return artifact


# --- R6 -------------------------------------------------------------------------------------------


def check_fresh_process(case: Case) -> Check:
    """R6: script and artifact alone give the logged score, and not only the script says so.

    They are in an empty folder, without training shards and network.
    """
    require_runnable(case)
    problems = Problems()
    rows = {}
    for run in case.ours:
        try:
            row = _check_alone(case, run, problems)
            if row and not is_own_script(case):
                row |= _check_independently(case, run, problems)
        except NotHere as reason:  # other seeds' artifacts may be
            problems.skip(str(reason))
            continue
        rows[run.name] = row
    worst = max((row.get("gap", 0.0) for row in rows.values()), default=0.0)
    told = f"{len(rows)} artifacts score the same alone (largest gap {worst:.1g} nats)"
    return problems.outcome("R6", told, runs=rows)


def is_own_script(case: Case) -> bool:
    """Whether the shipped script is this repository's, byte for byte."""
    return case.folder.script.read_bytes() == OWN_SCRIPT.read_bytes()


def _check_alone(case: Case, run: Run, problems: Problems) -> dict[str, Any]:
    """The shipped script in a fresh process -> figures; empty if it does not confirm its log."""
    found = rescore(case, run)
    if found.refused:
        problems.fail(f"{run.name}: scoring {found.refused}")
        return {}
    if found.error:
        problems.fail(f"{run.name}: the artifact cannot be scored ({found.error})")
        return {}
    if not found.confirms(run):
        problems.fail(
            f"{run.name}: a fresh process scores {found.score['val_bpb']:.8f} bpb, "
            f"logged are {run.score['val_bpb']:.8f}"
        )
        return {}
    return {"val_loss": found.score["val_loss"], "gap": found.gap(run)}


def _check_independently(case: Case, run: Run, problems: Problems) -> dict[str, Any]:
    """A script that is not this repository's: is its score anybody else's too? -> figures."""
    reason = "its artifact is of another kind than this repository's"
    row = {}
    if artifact_of(case, run).read_bytes().startswith(MAGIC):
        own = rescore(case, run, script=OWN_SCRIPT)
        reason = f"this repository's script cannot score its artifact ({own.error})"
        if own.score:
            row = {"own_val_bpb": own.score["val_bpb"], "own_gap": own.gap(run)}
            _check_own_audit(run, own, problems)
            if own.gap(run) <= OWN_TOLERANCE:
                return row
            reason = (
                f"this repository's script gives the artifact {own.score['val_bpb']:.6f} bpb, not "
                f"{run.score['val_bpb']:.6f}"
            )
            problems.warn(f"{run.name}: {reason}: what did the shipped one change?")
    return row | _check_on_noise(case, run, reason, problems)


def _check_own_audit(run: Run, own: Rescore, problems: Problems) -> None:
    """The checks that this repository's script makes of every score."""
    for name, outcome in own.score.get("audit", {}).items():
        verdict = outcome["verdict"]
        if verdict.startswith("FAIL"):
            problems.fail(f"{run.name}: scored by this repository's script, {name} {verdict}")


def _check_on_noise(case: Case, run: Run, reason: str, problems: Problems) -> dict[str, Any]:
    """The shipped script on random tokens: whatever it predicts with, they cost ln V on average."""
    tokens, least = noise_like(case.validation, int(case.settings.get("BOS_ID", 1)))
    found = rescore(case, run, validation=tokens)
    only = f"{run.name}: only the shipped script states this score: {reason}"
    if found.error:
        problems.skip(f"{only}; on random tokens it states none ({found.error})")
        return {}
    loss = found.score["val_loss"]
    on_noise = f"on random tokens it states {loss:.4f} nats per token"
    if not loss >= least:
        problems.fail(f"{run.name}: {on_noise}, no distribution can have less than {least:.4f}")
    elif found.confirms(run):
        problems.fail(f"{run.name}: {on_noise}, the same as on the text")
    else:
        problems.skip(f"{only}; {on_noise}, no less than they cost")
    return {"noise_val_loss": loss, "noise_least": least}


def noise_like(tokens: np.ndarray, bos: int) -> tuple[np.ndarray, float]:
    """The same documents, every other token drawn anew from the stream's kinds, alike likely.

    -> tokens, and nats per target that nothing stays below: whatever p is, the mean of p(x) K over
    K kinds is one at most, so a product of them exceeds e^LUCK with a chance of e^-LUCK.
    """
    rng = np.random.default_rng()  # nobody knows the seed
    kinds = np.setdiff1d(tokens, [bos])
    drawn = kinds[rng.integers(len(kinds), size=len(tokens))]
    noise = np.where(tokens == bos, tokens, drawn).astype(np.uint16)
    random_targets = int((noise[1:] != bos).sum())
    least = (random_targets * math.log(len(kinds)) - LUCK) / (len(noise) - 1)
    return noise, least


# --- R10 ------------------------------------------------------------------------------------------


def check_determinism(case: Case) -> Check:
    """R10: the first artifact gives the same score with two processes."""
    require_runnable(case)
    problems = Problems()
    run = case.ours[0]
    if run.result["machine"]["type"] == "cuda" and torch.cuda.device_count() < 2:
        raise NotHere("two processes need two GPUs")
    found = rescore(case, run, world=2)
    if found.error:
        problems.fail(f"{run.name}: two processes cannot score it ({found.error})")
        return problems.outcome("R10", "")
    gap = found.gap(run)
    told = f"{run.name}: two processes differ from the logged score by {gap:.1g} nats"
    if not found.confirms(run):
        problems.fail(told)
    return problems.outcome("R10", told, gap_nats=gap)
