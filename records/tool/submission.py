"""submission.json: every figure from the logs.

By one function that `new` writes with and `check` verifies with.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from tool.folder import Folder
from tool.logs import Run


@dataclasses.dataclass
class Typed:
    """What a person writes or a tool measures outside the logs."""

    author: str | None = None
    github_id: str | None = None
    name: str | None = None
    blurb: str | None = None
    date: str | None = None
    technique_summary: str | None = None
    attribution: dict[str, str] | None = None
    track: str | None = None
    all_runs: list[dict[str, Any]] | None = None  # made with this script, in the record or not
    matmul_gflops: float | None = None  # measured rate of a CPU
    commit: str | None = None  # of the script in its repository


@dataclasses.dataclass
class SeedResult:
    """The figures of one seed, from the result at the end of its log."""

    val_bpb: float
    val_loss: float  # nats per token
    stage: str  # whose score that is
    artifact_bytes: int
    bytes_total: int
    steps: int
    step_avg_ms: float
    train_time_s: float
    eval_time_s: float
    stages: dict[str, float | None]  # stage -> its figure; None: skipped


@dataclasses.dataclass
class Derived:
    """What the logs give; means are over seeds, std is that of a sample (None for one seed)."""

    val_bpb: float
    val_bpb_std: float | None
    val_loss: float
    val_loss_std: float | None
    bytes_total: int  # of the largest seed
    bytes_code: int
    bytes_model_max: int
    val_tokens: int
    val_bytes: int
    seeds: list[int | None]
    seed_results: dict[str, SeedResult]
    train_time_s_mean: float
    eval_time_s_mean: float
    hardware: str
    pytorch_version: str
    compliance: dict[str, bool]
    code_sha256: str
    config_sha256: str
    artifact_sha256: dict[str, str]
    tokenizer_sha256: str
    val_sha256: list[str]
    audit: dict[str, dict[str, dict[str, str]]]  # seed -> stage -> check -> verdict


TYPED = tuple(field.name for field in dataclasses.fields(Typed))
# A field that this project adds to what most published files carry; others' files may lack it.
OWN = {
    "attribution",
    "matmul_gflops",
    "commit",
    "train_time_s_mean",
    "eval_time_s_mean",
    "config_sha256",
    "tokenizer_sha256",
    "val_sha256",
}
DERIVED = tuple(field.name for field in dataclasses.fields(Derived))
# The canonical schema: what most published files carry, and what makes them verifiable (rulings of
# the contest).
FIELDS = tuple(name for name in (*TYPED, *DERIVED) if name not in OWN)


def spread(values: Sequence[float]) -> float | None:
    """Sample standard deviation; None for fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def seed_result(run: Run) -> SeedResult:
    """Raises KeyError where the result lacks a figure."""
    result = run.result
    score = run.score
    steps = result["steps"]
    step_ms = 1000 * result["train_seconds"] / max(steps, 1)
    stages = {}
    for name, stage in result["stages"].items():
        stages[name] = stage.get(stage.get("metric"))
    return SeedResult(
        val_bpb=score["val_bpb"],
        val_loss=score["val_loss"],
        stage=score["stage"],
        artifact_bytes=result["sizes"]["model"],
        bytes_total=result["sizes"]["total"],
        steps=steps,
        step_avg_ms=round(step_ms, 3),
        train_time_s=result["train_seconds"],
        eval_time_s=result["seconds"]["eval_side"],
        stages=stages,
    )


def verdicts(run: Run) -> dict[str, dict[str, str]]:
    """Stage -> check -> verdict of the script's own audit."""
    found = {}
    for name, stage in run.result["stages"].items():
        audit = stage.get("audit", {})
        found[name] = {check: outcome["verdict"] for check, outcome in audit.items()}
    return found


def compliance(runs: Sequence[Run], cap: int) -> dict[str, bool]:
    """The customary self-declaration, computed from the logs."""
    seconds = [run.result["seconds"] for run in runs]
    largest = max(run.result["sizes"]["total"] for run in runs)
    in_order = _all_passed(runs, "order")
    causal = _all_passed(runs, "future")
    counts = [_is_used(runs, name) for name in ("NGRAM", "TILT", "TILT_BOOST")]
    return {
        "train_under_600s": all(told["train_side"] <= 600 for told in seconds),
        "eval_under_600s": all(told["eval_side"] <= 600 for told in seconds),
        "artifact_under_16mb": largest <= min(cap, 16_000_000),
        "no_slot": causal and not _is_used(runs, "SLOT"),
        "no_etlb": not _is_used(runs, "ETLB"),
        "no_ngram_cache": not any(counts),
        "no_pre_quant_ttt": causal and in_order,
        "score_first_ttt": in_order,
        "three_seeds": len({run.seed for run in runs}) >= 3,
    }


def _all_passed(runs: Sequence[Run], check: str) -> bool:
    """Whether a check of the script passed wherever it was made; False if nothing was audited."""
    audits = [audit for run in runs for audit in verdicts(run).values() if audit]
    return bool(audits) and all(audit.get(check, "PASS") == "PASS" for audit in audits)


OFF = ("0", "0.0", "", "false", "none")


def _is_used(runs: Sequence[Run], technique: str) -> bool:
    """Whether some run switches a technique on: by its own name, or NAME_ENABLED, or USE_NAME.

    Its other settings (sizes, rates) are never zero and say nothing, unless there is no switch.
    """
    switches = (technique, f"{technique}_ENABLED", f"USE_{technique}", f"{technique}_STEPS")
    for run in runs:
        settings = run.settings or {}
        told = [settings[name] for name in switches if name in settings][:1]
        others = [name for name in settings if name.startswith(f"{technique}_")]
        if any(text.lower() not in OFF for text in told) or (others and not told):
            return True
    return False


def has_score(run: Run) -> bool:
    """Whether a run ends with a valid score, a number."""
    return isinstance(run.score.get("val_bpb"), float)


def summarize(folder: Folder, typed: Typed) -> dict[str, Any]:
    """submission.json's content. Raises ValueError, naming the log, if a run has no valid score."""
    for run in folder.runs:
        if not has_score(run):
            raise ValueError(f"{run.name}: no valid val_bpb at the end of the log")
    if not folder.runs:
        raise ValueError(f"{folder.path.name}: no training logs")
    return dataclasses.asdict(typed) | dataclasses.asdict(derive(folder.runs))


def derive(runs: Sequence[Run]) -> Derived:
    """Raises KeyError where a log's result lacks a figure."""
    by_seed = {str(run.seed): run for run in runs}
    seeds = [seed_result(run) for run in runs]
    scores = [seed.val_bpb for seed in seeds]
    losses = [seed.val_loss for seed in seeds]
    first = runs[0].result
    sizes = first["sizes"]
    data = first["data"]
    return Derived(
        val_bpb=statistics.fmean(scores),
        val_bpb_std=spread(scores),
        val_loss=statistics.fmean(losses),
        val_loss_std=spread(losses),
        bytes_total=max(seed.bytes_total for seed in seeds),
        bytes_code=sizes["code"],
        bytes_model_max=max(seed.artifact_bytes for seed in seeds),
        val_tokens=runs[0].score["tokens"],
        val_bytes=runs[0].score["bytes"],
        seeds=[run.seed for run in runs],
        seed_results={str(run.seed): row for run, row in zip(runs, seeds)},
        train_time_s_mean=statistics.fmean(seed.train_time_s for seed in seeds),
        eval_time_s_mean=statistics.fmean(seed.eval_time_s for seed in seeds),
        hardware=f"{first['world_size']} x {first['machine']['device']}",
        pytorch_version=first["versions"]["torch"],
        compliance=compliance(runs, sizes["cap"]),
        code_sha256=first["code_sha256"],
        config_sha256=first["config_sha256"],
        artifact_sha256={seed: run.result["artifact_sha256"] for seed, run in by_seed.items()},
        tokenizer_sha256=data["tokenizer_sha256"],
        val_sha256=data["val_sha256"],
        audit={seed: verdicts(run) for seed, run in by_seed.items()},
    )
