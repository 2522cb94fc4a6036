"""submission.json: every figure from the logs.

By one function that `new` writes with and `check` verifies with.
"""

from __future__ import annotations

import statistics
from typing import Any

from runs import Folder, Run

# What a person writes or a tool measures outside the logs; everything else is derived.
TYPED = (
    "author",
    "github_id",
    "name",
    "blurb",
    "date",
    "technique_summary",
    "attribution",
    "track",
    "all_runs",
    "matmul_gflops",
    "commit",
)
# The canonical schema: fields that most published files carry, and what makes them verifiable
# (rulings of the contest).
FIELDS = (
    "author",
    "github_id",
    "name",
    "blurb",
    "date",
    "track",
    "technique_summary",
    "val_bpb",
    "val_bpb_std",
    "val_loss",
    "val_loss_std",
    "bytes_total",
    "bytes_code",
    "bytes_model_max",
    "val_tokens",
    "val_bytes",
    "seeds",
    "seed_results",
    "hardware",
    "pytorch_version",
    "compliance",
    "code_sha256",
    "artifact_sha256",
    "audit",
    "all_runs",
)


def spread(values: list[float]) -> float | None:
    """Sample standard deviation; None for fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def seed_result(run: Run) -> dict[str, Any]:
    """The figures of one seed, from the result at the end of its log."""
    result, final = run.result, run.result["result"]
    return {
        "val_bpb": final["val_bpb"],
        "val_loss": final["val_loss"],
        "stage": final["stage"],
        "artifact_bytes": result["sizes"]["model"],
        "bytes_total": result["sizes"]["total"],
        "steps": result["steps"],
        "step_avg_ms": round(1000 * result["train_seconds"] / max(result["steps"], 1), 3),
        "train_time_s": result["train_seconds"],
        "eval_time_s": result["seconds"]["eval_side"],
        "stages": {
            name: stage.get(stage.get("metric"), None) for name, stage in result["stages"].items()
        },
    }


def verdicts(run: Run) -> dict[str, dict[str, str]]:
    """Stage -> check -> verdict of the script's own audit."""
    return {
        name: {check: found["verdict"] for check, found in stage.get("audit", {}).items()}
        for name, stage in run.result["stages"].items()
    }


def compliance(runs: list[Run], cap: int) -> dict[str, bool]:
    """The customary self-declaration, computed from the logs."""
    audits = [found for run in runs for stage in verdicts(run).values() for found in stage.items()]
    settings = [
        name
        for run in runs
        for name, text in (run.settings or {}).items()
        if text not in ("0", "", "0.0")
    ]

    def passed(check: str) -> bool:
        return bool(audits) and all(verdict == "PASS" for name, verdict in audits if name == check)

    return {
        "train_under_600s": all(run.result["seconds"]["train_side"] <= 600 for run in runs),
        "eval_under_600s": all(run.result["seconds"]["eval_side"] <= 600 for run in runs),
        "artifact_under_16mb": all(
            run.result["sizes"]["total"] <= min(cap, 16_000_000) for run in runs
        ),
        "no_slot": not any(name.startswith("SLOT") for name in settings) and passed("future"),
        "no_etlb": not any(name.startswith("ETLB") for name in settings),
        "no_ngram_cache": not any(name.startswith(("NGRAM", "MIXER")) for name in settings),
        "no_pre_quant_ttt": passed("future") and passed("order"),
        "score_first_ttt": passed("order"),
        "three_seeds": len({run.seed for run in runs}) >= 3,
    }


def summarize(folder: Folder, typed: dict[str, Any]) -> dict[str, Any]:
    """submission.json's content. Raises ValueError, naming the log, if a run has no valid score."""
    runs = folder.runs
    for run in runs:
        if not (run.result and "val_bpb" in run.result.get("result", {})):
            raise ValueError(f"{run.name}: no valid val_bpb at the end of the log")
    if not runs:
        raise ValueError(f"{folder.path.name}: no training logs")
    seeds = [seed_result(run) for run in runs]
    losses, scores = [s["val_loss"] for s in seeds], [s["val_bpb"] for s in seeds]
    first = runs[0].result
    derived = {
        "val_bpb": statistics.fmean(scores),
        "val_bpb_std": spread(scores),
        "val_loss": statistics.fmean(losses),
        "val_loss_std": spread(losses),
        "bytes_total": max(s["bytes_total"] for s in seeds),
        "bytes_code": first["sizes"]["code"],
        "bytes_model_max": max(s["artifact_bytes"] for s in seeds),
        "val_tokens": first["result"]["tokens"],
        "val_bytes": first["result"]["bytes"],
        "seeds": [run.seed for run in runs],
        "seed_results": {str(run.seed): result for run, result in zip(runs, seeds)},
        "train_time_s_mean": statistics.fmean(s["train_time_s"] for s in seeds),
        "eval_time_s_mean": statistics.fmean(s["eval_time_s"] for s in seeds),
        "hardware": f"{first['world_size']} x {first['machine']['device']}",
        "pytorch_version": first["versions"]["torch"],
        "compliance": compliance(runs, first["sizes"]["cap"]),
        "code_sha256": first["code_sha256"],
        "config_sha256": first["config_sha256"],
        "artifact_sha256": {str(run.seed): run.result["artifact_sha256"] for run in runs},
        "tokenizer_sha256": first["data"]["tokenizer_sha256"],
        "val_sha256": first["data"]["val_sha256"],
        "audit": {str(run.seed): verdicts(run) for run in runs},
    }
    return {**{name: typed.get(name) for name in TYPED}, **derived}
