"""Is record B better than record A?

One-sided Welch test, paired seeds, all runs on the table.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from tool.finding import shown
from tool.folder import Folder

MARGIN_NATS = 0.005  # per token: what a record must beat the last by
FEWEST = 3  # values that a test needs
LEVEL = 0.01  # of p: what a record must be under
SHORT = 40  # characters of what a list of runs says


@dataclasses.dataclass(frozen=True)
class Sample:
    """The scores of one record, by seed."""

    name: str
    losses: dict[int, float]  # nats per token
    scores: dict[int, float]  # bits per byte
    tokens: int | None  # scored tokens; None: not told, or not the same for all seeds
    all_runs: list[dict[str, Any]]  # every run that was made, as far as it is told

    @property
    def bytes_per_token(self) -> float:
        """Of the validation text, from loss and bpb of all seeds."""
        bits = {seed: loss / math.log(2) for seed, loss in self.losses.items()}
        return statistics.fmean(bits[seed] / self.scores[seed] for seed in bits)

    @property
    def margin_bpb(self) -> float:
        """The margin of a record in bits per byte of this text."""
        return MARGIN_NATS / math.log(2) / self.bytes_per_token

    def same_text_as(self, other: Sample) -> bool:
        """Whether both scored as many tokens that stand for as many bytes."""
        ratio = self.bytes_per_token / other.bytes_per_token
        return self.tokens is not None and self.tokens == other.tokens and abs(ratio - 1) < 1e-6


def load_sample(path: Path) -> Sample:
    """A record folder's final scores. ValueError names what is missing."""
    folder = Folder(path)
    losses = {}
    scores = {}
    tokens = set()
    for run in folder.runs:
        tokens.add(run.score["tokens"] if run.score else run.figures.get("val_tokens"))
        if run.final and run.final.metric == "val_bpb":
            losses[run.seed] = run.score.get("val_loss", run.final.val_loss)
            scores[run.seed] = run.score.get("val_bpb", run.final.bpb)
    if not scores:
        raise ValueError(f"{path}: no log with a final val_bpb")
    made = (folder.submission or {}).get("all_runs")
    return Sample(
        folder.path.name,
        losses,
        scores,
        tokens.pop() if len(tokens) == 1 else None,
        [row for row in made if isinstance(row, dict)] if isinstance(made, list) else [],
    )


@dataclasses.dataclass(frozen=True)
class Significance:
    """A one-sided test; t is nan without any variance."""

    t: float
    df: float
    p: float


def _test_of(done: Any) -> Significance:
    return Significance(float(done.statistic), float(done.df), float(done.pvalue))


def welch(new: Sequence[float], old: Sequence[float], margin: float) -> Significance | None:
    """H0: mean(new) >= mean(old) - margin. None for under three values on a side."""
    if min(len(new), len(old)) < FEWEST:
        return None
    bar = np.asarray(old) - margin
    return _test_of(stats.ttest_ind(bar, new, equal_var=False, alternative="greater"))


def paired(gaps: Sequence[float]) -> Significance | None:
    """H0: the mean of old less new, seed by seed, is not above zero. None for under three."""
    if len(gaps) < FEWEST:
        return None
    return _test_of(stats.ttest_1samp(gaps, 0, alternative="greater"))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All figures of a comparison: losses when the text is the same, else bits per byte."""

    old: str
    new: str
    unit: str
    n_old: int
    n_new: int
    mean_old: float
    mean_new: float
    gain: float
    margin: float  # of a record, in the unit
    margin_bpb: float
    bpb_old: float
    bpb_new: float
    bytes_per_token_old: float
    bytes_per_token_new: float
    welch: Significance | None
    welch_margin: Significance | None
    pairs: dict[int, float]  # seed -> gain: old less new
    paired: Significance | None
    runs_old: list[dict[str, Any]]
    runs_new: list[dict[str, Any]]


def compare(old: Sample, new: Sample) -> Comparison:
    """With the margin converted where the texts differ."""
    same = old.same_text_as(new)
    by_seed_old = old.losses if same else old.scores
    by_seed_new = new.losses if same else new.scores
    values_old = list(by_seed_old.values())
    values_new = list(by_seed_new.values())
    margin = MARGIN_NATS if same else old.margin_bpb
    common = sorted(by_seed_old.keys() & by_seed_new.keys())
    pairs = {seed: by_seed_old[seed] - by_seed_new[seed] for seed in common}
    mean_old = statistics.fmean(values_old)
    mean_new = statistics.fmean(values_new)
    return Comparison(
        old=old.name,
        new=new.name,
        unit="nats per token" if same else "bits per byte",
        n_old=len(values_old),
        n_new=len(values_new),
        mean_old=mean_old,
        mean_new=mean_new,
        gain=mean_old - mean_new,
        margin=margin,
        margin_bpb=old.margin_bpb,
        bpb_old=statistics.fmean(old.scores.values()),
        bpb_new=statistics.fmean(new.scores.values()),
        bytes_per_token_old=old.bytes_per_token,
        bytes_per_token_new=new.bytes_per_token,
        welch=welch(values_new, values_old, 0.0),
        welch_margin=welch(values_new, values_old, margin),
        pairs=pairs,
        paired=paired(list(pairs.values())),
        runs_old=old.all_runs,
        runs_new=new.all_runs,
    )


def _test_line(name: str, test: Significance | None, n: int) -> str:
    if test is None:
        return f"{name}: no p value from {n} seeds; three are needed on each side"
    return f"{name}: t {test.t:.3f}, df {test.df:.2f}, one-sided p {test.p:.4g}"


def _runs_lines(side: str, made: Sequence[Mapping[str, Any]]) -> list[str]:
    if not made:
        return [f"all runs of {side}: not told"]
    lines = [f"all runs of {side} ({len(made)}):"]
    for run in made:
        left_out = "" if run.get("included") else ", left out"
        told = [shown(run.get(name), SHORT) for name in ("seed", "val_bpb", "status")]
        lines.append("  seed {}: {} ({}{})".format(*told, left_out))
    return lines


def verdict(found: Comparison) -> str:
    """What the figures amount to, in a sentence."""
    fewest = min(found.n_old, found.n_new)
    gain = f"gain {found.gain:.6f} {found.unit}"
    if found.welch is None or found.welch_margin is None:
        seeds = {1: "one seed", 2: "two seeds"}[fewest]
        return f"verdict: {seeds} cannot tell; {FEWEST} on each side are needed ({gain})"
    p, p_margin = found.welch.p, found.welch_margin.p
    if math.isnan(p) or math.isnan(p_margin):
        return f"verdict: seeds that all score the same cannot tell ({gain})"
    if p_margin < LEVEL:
        return f"verdict: new is better by more than the margin (p {p_margin:.2g}, {gain})"
    if p < LEVEL:
        short = f"p {p:.2g}; by more than the margin: p {p_margin:.2g}, {LEVEL} is needed"
        return f"verdict: new is better, but not shown to be by more than the margin ({short})"
    if 1 - p < LEVEL:
        return f"verdict: new is worse (p {1 - p:.2g}, {gain})"
    return f"verdict: no difference is shown (p {p:.2g}, {LEVEL} is needed; {gain})"


def describe(found: Comparison) -> str:
    """The comparison as text."""
    fewest = min(found.n_old, found.n_new)
    lines = [
        f"old {shown(found.old)}: mean {found.mean_old:.6f} {found.unit}, "
        f"{found.bpb_old:.6f} bpb, n {found.n_old}",
        f"new {shown(found.new)}: mean {found.mean_new:.6f} {found.unit}, "
        f"{found.bpb_new:.6f} bpb, n {found.n_new}",
        f"gain {found.gain:.6f} {found.unit}; margin {MARGIN_NATS} nats per token = "
        f"{found.margin_bpb:.6f} bpb at {found.bytes_per_token_old:.4f} bytes per token (old)",
        _test_line("Welch, new below old", found.welch, fewest),
        _test_line("Welch, new below old by more than the margin", found.welch_margin, fewest),
    ]
    if found.pairs:
        gaps = [f"{seed} {gap:+.6f}" for seed, gap in found.pairs.items()]
        lines.append(f"gain by seed: {', '.join(gaps)}")
        lines.append(_test_line("paired t, new below old", found.paired, len(gaps)))
    lines += _runs_lines("old", found.runs_old)
    lines += _runs_lines("new", found.runs_new)
    return "\n".join([*lines, verdict(found)])
