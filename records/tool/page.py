"""What people see of a record: the README with its tables, the plot, the machine's measured rate.

All from the logs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch

from tool.folder import Folder
from tool.logs import Run

matplotlib.use("Agg")
from matplotlib import pyplot

TO_COMPLETE = "*(to complete)*"


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


def draw(folder: Folder, path: Path) -> None:
    """Left: training (and validation) loss by step, a line a seed. Right: bpb by scoring stage."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    _draw_losses(left, folder.runs)
    _draw_scores(right, folder.runs)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def _draw_losses(axes: pyplot.Axes, runs: Sequence[Run]) -> None:
    for run in runs:
        training = dict(run.train_curve)
        validation = {step: loss for step, loss, _ in run.val_curve}
        (line,) = axes.plot(training.keys(), training.values(), lw=1, label=f"seed {run.seed}")
        axes.plot(validation.keys(), validation.values(), "o--", ms=3, color=line.get_color())
    axes.set(xlabel="step", ylabel="nats per token", title="training loss (dots: validation)")
    axes.legend(fontsize=8)


def _draw_scores(axes: pyplot.Axes, runs: Sequence[Run]) -> None:
    """Groups of bars: a group a stage, a bar a seed."""
    stages = _in_order(final.stage for run in runs for final in run.finals)
    width = 0.8 / max(len(runs), 1)
    for index, run in enumerate(runs):
        places = [stages.index(final.stage) + index * width for final in run.finals]
        scores = [final.bpb for final in run.finals]
        bars = axes.bar(places, scores, 0.94 * width, label=f"seed {run.seed}")
        axes.bar_label(bars, fmt="%.4f", fontsize=7)
    scores = [final.bpb for run in runs for final in run.finals]
    if scores:
        axes.set_ylim(0.98 * min(scores), 1.02 * max(scores))
    axes.set_title("bits per byte by stage")
    axes.set_xticks([place + 0.3 for place in range(len(stages))], stages)


def _in_order(names: Iterable[str]) -> list[str]:
    """The different names, each where it first came."""
    return list(dict.fromkeys(names))


# --- the tables -----------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """In Markdown."""
    rule = ["---"] * len(head)
    lines = [" | ".join(map(str, row)) for row in (head, rule, *rows)]
    return "\n".join(f"| {line} |" for line in lines)


def results_table(runs: Sequence[Run], told: Mapping[str, Any]) -> str:
    """One row a seed, then mean and standard deviation."""
    stages = _in_order(name for run in runs for name in run.result["stages"])
    head = ["seed", "steps", "ms/step", "bpb before packing"]
    head += [f"{stage} bpb" for stage in stages]
    head += ["artifact bytes", "train s", "eval s"]
    rows = [_result_row(run, told["seed_results"][str(run.seed)], stages) for run in runs]
    mean = [""] * len(head)
    mean[0] = "**mean**"
    mean[-4] = f"**{told['val_bpb']:.6f}**{_deviation(told)}"
    mean[-3] = f"{told['bytes_model_max']:,} (max)"
    mean[-2] = f"{told['train_time_s_mean']:.1f}"
    mean[-1] = f"{told['eval_time_s_mean']:.1f}"
    return table(head, [*rows, mean])


def _result_row(run: Run, told: Mapping[str, Any], stages: Sequence[str]) -> list[str]:
    row = [str(run.seed), str(told["steps"]), f"{told['step_avg_ms']:.1f}", ""]
    for step, _, bpb in run.val_curve:
        if step == told["steps"] and bpb:
            row[-1] = f"{bpb:.4f}"
    for stage in stages:
        bpb = told["stages"].get(stage)
        row.append(f"{bpb:.6f}" if bpb else "")
    row.append(f"{told['artifact_bytes']:,}")
    row.append(f"{told['train_time_s']:.1f}")
    row.append(f"{told['eval_time_s']:.1f}")
    return row


def _deviation(told: Mapping[str, Any]) -> str:
    std = told["val_bpb_std"]
    return "" if std is None else f" (std {std:.6f})"


def seconds_table(runs: Sequence[Run]) -> str:
    """Where the seconds went, by phase of the ledger."""
    head = ["phase", *(f"seed {run.seed}" for run in runs)]
    rows = []
    for phase in _in_order(name for run in runs for name in run.result["seconds"]):
        seconds = [run.result["seconds"].get(phase, 0) for run in runs]
        rows.append([phase, *(f"{value:.1f}" for value in seconds)])
    return table(head, rows)


def runs_table(made: Sequence[Mapping[str, Any]]) -> str:
    """Every run of the script with these settings, in the record or not."""
    rows = []
    for run in made:
        included = "yes" if run["included"] else "no"
        rows.append([run["seed"], run["status"], run["val_bpb"], included])
    return table(["seed", "status", "val_bpb", "in this record"], rows)


# --- the README -----------------------------------------------------------------------------------

README = """# {name}

**val_bpb {val_bpb:.6f}**{deviation}, {count} seeds, track `{track}`, {date}. Largest artifact
{bytes_model_max:,} bytes, code {bytes_code:,} bytes, total {bytes_total:,}.

## Idea

{idea}

## Results

{results}

The score is that of the last stage, from the artifact alone: {targets:,} targets standing for
{val_bytes:,} bytes. Every run made with this script and these settings:

{made}

![training loss and bpb by stage](curves.png)

## Run it

From inside this folder, with the data below a `data/` folder here or above:

```bash
SEED={seed} {command}
MODE=eval ARTIFACT=model_seed{seed}.ptz {command}
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
        files="`train_gpt.py`" if folder.packed else "`train_gpt.py`, `config.env`",
        credits=TO_COMPLETE,
    )
