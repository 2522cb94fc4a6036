"""Is record B better than record A?

One-sided Welch test, paired seeds, all runs on the table.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
from runs import Folder
from scipy import stats

MARGIN_NATS = 0.005  # per token: what a record must beat the last by


@dataclasses.dataclass(frozen=True)
class Sample:
    """The scores of one record, by seed."""

    name: str
    losses: dict[int, float]  # nats per token
    scores: dict[int, float]  # bits per byte
    tokens: int | None  # scored tokens
    all_runs: list[dict[str, Any]]  # every run that was made, as far as it is told

    @property
    def bytes_per_token(self) -> float:
        """Of the validation text, from loss and bpb of all seeds."""
        return float(np.mean([self.losses[s] / math.log(2) / self.scores[s] for s in self.losses]))


def load_sample(path: Path) -> Sample:
    """A record folder's final scores. ValueError names what is missing."""
    folder = Folder(path)
    finals = {
        run.seed: run.final for run in folder.runs if run.final and run.final.metric == "val_bpb"
    }
    if not finals:
        raise ValueError(f"{path}: no log with a final val_bpb")
    tokens = {
        run.result["result"]["tokens"] if run.result else run.figures.get("val_tokens")
        for run in folder.runs
    }
    made = (folder.submission or {}).get("all_runs")
    told = {
        run.seed: run.result["result"]
        for run in folder.runs
        if run.result and "result" in run.result
    }
    return Sample(
        folder.path.name,
        {s: told[s]["val_loss"] if s in told else f.val_loss for s, f in finals.items()},
        {s: told[s]["val_bpb"] if s in told else f.bpb for s, f in finals.items()},
        tokens.pop() if len(tokens) == 1 else None,
        made if isinstance(made, list) else [],
    )


def welch(new: list[float], old: list[float], margin: float) -> dict[str, float] | None:
    """H0: mean(new) >= mean(old) - margin.

    None for under three values on a side; t is nan without any variance.
    """
    if min(len(new), len(old)) < 3:
        return None
    done = stats.ttest_ind(np.asarray(old) - margin, new, equal_var=False, alternative="greater")
    return {"t": float(done.statistic), "df": float(done.df), "p": float(done.pvalue)}


def compare(old: Sample, new: Sample) -> dict[str, Any]:
    """All figures of the comparison.

    Losses when the tokens are the same, else bpb with the margin converted.
    """
    same = (
        old.tokens is not None
        and old.tokens == new.tokens
        and abs(old.bytes_per_token / new.bytes_per_token - 1) < 1e-6
    )
    unit = "nats per token" if same else "bits per byte"
    a, b = (old.losses, new.losses) if same else (old.scores, new.scores)
    margin = MARGIN_NATS if same else MARGIN_NATS / math.log(2) / old.bytes_per_token
    pairs = {seed: b[seed] - a[seed] for seed in sorted(a.keys() & b.keys())}
    paired = (
        stats.ttest_1samp(list(pairs.values()), 0, alternative="less") if len(pairs) >= 3 else None
    )
    return {
        "old": old.name,
        "new": new.name,
        "unit": unit,
        "n_old": len(a),
        "n_new": len(b),
        "mean_old": float(np.mean(list(a.values()))),
        "mean_new": float(np.mean(list(b.values()))),
        "gain": float(np.mean(list(a.values())) - np.mean(list(b.values()))),
        "margin": margin,
        "bpb_old": float(np.mean(list(old.scores.values()))),
        "bpb_new": float(np.mean(list(new.scores.values()))),
        "bytes_per_token_old": old.bytes_per_token,
        "bytes_per_token_new": new.bytes_per_token,
        "welch": welch(list(b.values()), list(a.values()), 0.0),
        "welch_margin": welch(list(b.values()), list(a.values()), margin),
        "pairs": pairs,
        "paired": None
        if paired is None
        else {"t": float(paired.statistic), "df": float(paired.df), "p": float(paired.pvalue)},
        "runs_old": old.all_runs,
        "runs_new": new.all_runs,
    }


def _test_line(name: str, test: dict[str, float] | None, n: int) -> str:
    if test is None:
        return f"{name}: no p value from {n} seeds; three are needed on each side"
    return f"{name}: t {test['t']:.3f}, df {test['df']:.2f}, one-sided p {test['p']:.4g}"


def describe(found: dict[str, Any]) -> str:
    """The comparison as text."""
    fewest = min(found["n_old"], found["n_new"])
    margin_bpb = MARGIN_NATS / math.log(2) / found["bytes_per_token_old"]
    lines = [
        (
            f"old {found['old']}: mean {found['mean_old']:.6f} {found['unit']}, "
            f"{found['bpb_old']:.6f} bpb, n {found['n_old']}"
        ),
        (
            f"new {found['new']}: mean {found['mean_new']:.6f} {found['unit']}, "
            f"{found['bpb_new']:.6f} bpb, n {found['n_new']}"
        ),
        (
            f"gain {found['gain']:.6f} {found['unit']}; margin {MARGIN_NATS} nats per token = "
            f"{margin_bpb:.6f} bpb at {found['bytes_per_token_old']:.4f} bytes per token (old)"
        ),
        _test_line("Welch, new below old", found["welch"], fewest),
        _test_line("Welch, new below old by more than the margin", found["welch_margin"], fewest),
    ]
    if found["pairs"]:
        lines.append(
            "same seeds: " + ", ".join(f"{seed} {gap:+.6f}" for seed, gap in found["pairs"].items())
        )
        lines.append(_test_line("paired t, new below old", found["paired"], len(found["pairs"])))
    for side in ("old", "new"):
        made = found[f"runs_{side}"]
        lines.append(
            f"all runs of {side} ({len(made)}):" if made else f"all runs of {side}: not told"
        )
        lines += [
            f"  seed {row.get('seed')}: {row.get('val_bpb')} ({row.get('status')}"
            f"{'' if row.get('included') else ', left out'})"
            for row in made
        ]
    return "\n".join(lines)
