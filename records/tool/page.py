"""What people see of a record: the README with its tables, the plot, the machine's measured rate.

All from the logs.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch

from tool.folder import Folder, read_lenient
from tool.logs import DISOWNED, Run
from tool.runs import FINISHED
from tool.submission import spread

matplotlib.use("Agg")
from matplotlib import pyplot

TO_COMPLETE = "*(to complete)*"
LEAST_SHOWN = 0.05  # seconds of a phase, rounded to a tenth


def matmul_gflops(size: int = 2048, repeats: int = 7) -> float:
    """Median rate of a float32 matrix product on this machine's CPU, in GFLOP/s."""
    a = torch.randn(size, size)
    b = torch.randn(size, size)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return round(2 * size**3 / statistics.median(seconds) / 1e9, 1)


# --- the plot -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Curves:
    """Nats per token by step, of training and of validation."""

    training: dict[int, float]
    validation: dict[int, float]


def curves_of(out: Path, run: Run) -> Curves:
    """Every step of metrics.jsonl in a run's folder; what the log has of them if there is none."""
    metrics = out / "metrics.jsonl"
    if not metrics.is_file():
        return Curves(dict(run.train_curve), {step: loss for step, loss, _ in run.val_curve})
    curves = Curves({}, {})
    for line in read_lenient(metrics).splitlines():
        row = _row_of(line)
        if row.get("train_loss") is not None:
            curves.training[row["step"]] = row["train_loss"]
        if row.get("val_loss") is not None:
            curves.validation[row["step"]] = row["val_loss"]
    return curves


def _row_of(line: str) -> dict[str, Any]:
    """A line of metrics.jsonl; empty for half a line, as a full disk leaves it."""
    try:
        return json.loads(line)
    except ValueError:
        return {}


def draw(folder: Folder, outs: Sequence[Path], path: Path) -> None:
    """Left: training loss by step, dots for validation. Right: bpb by scoring stage.

    outs: the folders of the runs, in any order.
    """
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    by_seed = {json.loads((out / "result.json").read_text())["seed"]: out for out in outs}
    _draw_losses(left, {run.seed: curves_of(by_seed[run.seed], run) for run in folder.runs})
    _draw_scores(right, folder.runs)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def _draw_losses(axes: pyplot.Axes, curves: Mapping[int | None, Curves]) -> None:
    title = "training loss"
    for seed, curve in curves.items():
        label = f"seed {seed}"
        (line,) = axes.plot(curve.training.keys(), curve.training.values(), lw=1, label=label)
        if curve.validation:
            title = "training loss (dots: validation)"
            dots = dict(ms=4, color=line.get_color())
            axes.plot(curve.validation.keys(), curve.validation.values(), "o", **dots)
    axes.set(xlabel="step", ylabel="nats per token", title=title)
    axes.legend(fontsize=8)


def _draw_scores(axes: pyplot.Axes, runs: Sequence[Run]) -> None:
    """A column a stage: a point a seed, beside them mean and standard deviation; from zero on."""
    finals = [final for run in runs for final in run.finals]
    stages = in_order(final.stage for final in finals)
    disowned = {final.stage for final in finals if final.disowned}
    labels = []
    for place, stage in enumerate(stages):
        scores = [final.bpb for final in finals if final.stage == stage]
        axes.plot([place] * len(scores), scores, "o", ms=4, alpha=0.6, color="tab:blue")
        mean = statistics.fmean(scores)
        deviation = spread(scores)
        axes.errorbar(place + 0.15, mean, yerr=deviation, fmt="D", ms=4, capsize=4, color="black")
        named = f"{stage}\n(no score)" if stage in disowned else stage
        labels.append(f"{named}\n{mean:.6f}")
        if deviation is not None:
            labels[-1] += f"\n± {deviation:.6f}"
    highest = max((final.bpb for final in finals), default=1.0)
    axes.set(title="bits per byte by stage: seeds, mean and deviation", ylim=(0, 1.15 * highest))
    axes.set_xlim(-0.5, len(stages) - 0.5)
    axes.set_xticks(range(len(stages)), labels, fontsize=8)


def in_order(values: Iterable[Any]) -> list[Any]:
    """The different ones, each where it first came."""
    return list(dict.fromkeys(values))


# --- the tables -----------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """In Markdown."""
    rule = ["---"] * len(head)
    lines = [" | ".join(map(str, row)) for row in (head, rule, *rows)]
    return "\n".join(f"| {line} |" for line in lines)


def results_table(runs: Sequence[Run], told: Mapping[str, Any]) -> str:
    """One row a seed, then mean and standard deviation; no column in which there is nothing."""
    stages = in_order(name for run in runs for name in run.result["stages"])
    head = ["seed", "steps", "ms/step", "bpb before packing"]
    head += [_head_of(stage, runs) for stage in stages]
    head += ["artifact bytes", "train s", "eval s"]
    seeds = [told["seed_results"][str(run.seed)] for run in runs]
    rows = [_result_row(run, seed, stages) for run, seed in zip(runs, seeds)]
    mean = ["**mean**", f"{statistics.fmean(seed['steps'] for seed in seeds):.0f}"]
    mean += [f"{statistics.fmean(seed['step_avg_ms'] for seed in seeds):.1f}", ""]
    mean += [_mean_of_stage(stage, seeds, told) for stage in stages]
    mean.append(f"{told['bytes_model_max']:,} (max)")
    mean.append(f"{told['train_time_s_mean']:.1f}")
    mean.append(f"{told['eval_time_s_mean']:.1f}")
    filled = [index for index in range(len(head)) if any(row[index] for row in rows)]
    head, mean, *rows = [[row[index] for index in filled] for row in (head, mean, *rows)]
    return table(head, [*rows, mean])


def _head_of(stage: str, runs: Sequence[Run]) -> str:
    """What a stage's figures are: bits per byte, or by their own name, which says that they are
    none.
    """
    own = {label for run in runs for label in DISOWNED if label in run.result["stages"][stage]}
    return f"{stage}: `{own.pop()}`, no score" if own else f"{stage} bpb"


def _mean_of_stage(stage: str, seeds: Sequence[Mapping[str, Any]], told: Mapping[str, Any]) -> str:
    """Over the seeds; that of the stage whose score counts in bold, with its deviation."""
    if stage == seeds[0]["stage"]:
        return f"**{told['val_bpb']:.6f}**{_deviation(told)}"
    scores = [seed["stages"].get(stage) for seed in seeds]
    return "" if None in scores else f"{statistics.fmean(scores):.6f}"


def _result_row(run: Run, told: Mapping[str, Any], stages: Sequence[str]) -> list[str]:
    row = [str(run.seed), str(told["steps"]), f"{told['step_avg_ms']:.1f}", ""]
    for step, _, bpb in run.val_curve:
        if step == told["steps"] and bpb:
            row[-1] = f"{bpb:.4f}"
    for stage in stages:
        row.append(_six(told["stages"].get(stage)))
    row.append(f"{told['artifact_bytes']:,}")
    row.append(f"{told['train_time_s']:.1f}")
    row.append(f"{told['eval_time_s']:.1f}")
    return row


def _six(bpb: float | None) -> str:
    """A score as it is shown; empty for none."""
    return "" if bpb is None else f"{bpb:.6f}"


def _deviation(told: Mapping[str, Any]) -> str:
    std = told["val_bpb_std"]
    return "" if std is None else f" (std {std:.6f})"


def seconds_table(runs: Sequence[Run]) -> str:
    """Where the seconds went, by phase of the ledger; phases that took none are left out."""
    head = ["phase", *(f"seed {run.seed}" for run in runs)]
    rows = []
    for phase in in_order(name for run in runs for name in run.result["seconds"]):
        seconds = [run.result["seconds"].get(phase, 0) for run in runs]
        if max(seconds) >= LEAST_SHOWN:
            rows.append([phase, *(f"{value:.1f}" for value in seconds)])
    return table(head, rows)


def runs_table(made: Sequence[Mapping[str, Any]]) -> str:
    """Every run of the script with these settings, in the record or not, and why not."""
    chosen = {run["seed"] for run in made if run["included"]}
    rows = []
    for run in made:
        cells = [run["seed"], _how_it_ended(run), _six(run["val_bpb"]) or "none"]
        rows.append([*cells, _why(run, chosen)])
    return table(["seed", "ended", "val_bpb", "in this record"], rows)


def _how_it_ended(run: Mapping[str, Any]) -> str:
    code = run["exit_code"]
    return str(run["status"]) if code == 0 else f"{run['status']} (exit code {code})"


def _why(run: Mapping[str, Any], chosen: set[int]) -> str:
    """Whether a run is in the record; if it is not, what became of it."""
    if run["included"]:
        return "yes"
    if run["exit_code"] != 0 or run["status"] not in FINISHED:
        again = ", run again" if run["seed"] in chosen else ""
        return f"no: it did not finish{again} (`{run['run']}`)"
    if run["seed"] in chosen:
        return f"no: another run of the same seed (`{run['run']}`)"
    return f"no: a seed that was not chosen (`{run['run']}`)"


# --- the README -----------------------------------------------------------------------------------

README = """# {name}

**val_bpb {val_bpb:.6f}**{deviation}, {count} seeds, track `{track}`, {date}. Largest artifact
{bytes_model_max:,} bytes, code {bytes_code:,} bytes, total {bytes_total:,}.

## Idea

{idea}

## Results

{results}

The score is that of the last stage that is one, from the artifact alone: {targets:,} targets
standing for {val_bytes:,} bytes. Every run made with this script and these settings:

{made}

![training loss and bpb by stage](curves.png)

## Run it

From inside this folder, with the data below a `data/` folder here or above:

```bash
SEED={seed} OUT_DIR=logs/seed{seed} {command}
MODE=eval ARTIFACT=logs/seed{seed}/model.ptz {command}
```

Settings that differ from the script's defaults ({config}):
`{overrides}`.

## What was measured

* Machine: {hardware}{rate}. torch {pytorch_version}, Python {python}.
* Training {train_time_s_mean:.1f} s on average, {train_tokens:,} tokens, {train_flops:.3g} FLOPs.
* Script sha256 `{code_sha256:.16}`, {source}; tokenizer `{tokenizer_sha256:.16}`, \
validation shard `{val_sha256[0]:.16}`, {train_shards} training shards ({shard_tokens:,} tokens).
* Seconds by phase:

{seconds}

## Files

{files}, `requirements.txt`, `train_seed<N>.log` (each ends with its whole result as JSON), \
`model_seed<N>.ptz` (not in git; sha256 in `submission.json`), `submission.json`, `check.json`, \
`curves.png`.

## Credits

{credits}
"""
NOT_SHOWN = ("SEED", "OUT_DIR", "RUN_ID")  # they differ from run to run


def readme(folder: Folder, told: Mapping[str, Any], nproc: int) -> str:
    """README.md of a record: all that was measured; the idea and the credits are for a person.

    told: submission.json's content.
    """
    runs = folder.runs
    first = runs[0].result
    data = first["data"]
    command = "python train_gpt.py"
    if nproc > 1:
        command = f"torchrun --standalone --nproc_per_node={nproc} train_gpt.py"
    named = first["overrides"].items()
    overrides = [f"{name}={text}" for name, text in named if name not in NOT_SHOWN]
    rate = ""
    if told["matmul_gflops"]:
        rate = f"; {told['matmul_gflops']} GFLOP/s for a 2048^3 float32 product"
    source = "of no commit of its repository"
    if told["commit"]:
        source = f"commit `{told['commit']}`"
    return README.format(
        **told,
        deviation=_deviation(told),
        count=len(runs),
        idea=told["technique_summary"] or TO_COMPLETE,
        results=results_table(runs, told),
        targets=data["val_tokens"] - 1,
        made=runs_table(told["all_runs"]),
        seed=runs[0].seed,
        command=command,
        config="inside `train_gpt.py`" if folder.packed else "`config.env`",
        overrides=" ".join(overrides) or "none",
        rate=rate,
        python=first["versions"]["python"],
        train_tokens=first["train_tokens"],
        train_flops=first["train_flops"],
        source=source,
        train_shards=data["train_shards"],
        shard_tokens=data["train_tokens"],
        seconds=seconds_table(runs),
        files=_code_files(folder),
        credits=TO_COMPLETE,
    )


def _code_files(folder: Folder) -> str:
    """The files that hold script and settings."""
    if folder.readable:
        return f"`train_gpt.py` (`{folder.readable.name}` without comments and docstrings, packed)"
    return "`train_gpt.py`" if folder.packed else "`train_gpt.py`, `config.env`"
