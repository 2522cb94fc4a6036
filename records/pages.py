"""What people see of a record: the README with its tables, the plot, the machine's measured rate.

All from the logs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from runs import Folder, Run

matplotlib.use("Agg")
from matplotlib import pyplot

TO_COMPLETE = "*(to complete)*"


def matmul_gflops(size: int = 2048, repeats: int = 7) -> float:
    """Median rate of a float32 matrix product on this machine's CPU, in GFLOP/s."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return round(2 * size**3 / statistics.median(seconds) / 1e9, 1)


def draw(folder: Folder, path: Path) -> None:
    """Left: training (and validation) loss by step, a line a seed. Right: bpb by scoring stage."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for run in folder.runs:
        steps, losses = zip(*run.train_curve) if run.train_curve else ((), ())
        (line,) = left.plot(steps, losses, lw=1, label=f"seed {run.seed}")
        if run.val_curve:
            left.plot(
                *zip(*((step, loss) for step, loss, _ in run.val_curve)),
                "o--",
                ms=3,
                color=line.get_color(),
            )
    left.set(xlabel="step", ylabel="nats per token", title="training loss (dots: validation)")
    left.legend(fontsize=8)
    stages = list(dict.fromkeys(final.stage for run in folder.runs for final in run.finals))
    for index, run in enumerate(folder.runs):
        scores = {final.stage: final.bpb for final in run.finals}
        shown = [stage for stage in stages if stage in scores]
        bars = right.bar(
            [stages.index(stage) + 0.8 * index / len(folder.runs) for stage in shown],
            [scores[stage] for stage in shown],
            0.75 / len(folder.runs),
            label=f"seed {run.seed}",
        )
        right.bar_label(bars, fmt="%.4f", fontsize=7)
    values = [final.bpb for run in folder.runs for final in run.finals]
    right.set(
        title="bits per byte by stage",
        xticks=[i + 0.3 for i in range(len(stages))],
        ylim=(0.98 * min(values), 1.02 * max(values)) if values else None,
    )
    right.set_xticklabels(stages)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def results_table(runs: Sequence[Run], told: dict[str, Any]) -> str:
    """One row a seed, then mean and standard deviation."""
    stages = list(dict.fromkeys(name for run in runs for name in run.result["stages"]))
    rows = []
    for run in runs:
        row = told["seed_results"][str(run.seed)]
        raw = next(
            (bpb for step, _, bpb in reversed(run.val_curve) if step == row["steps"] and bpb), None
        )
        rows.append(
            [
                run.seed,
                row["steps"],
                f"{row['step_avg_ms']:.1f}",
                f"{raw:.4f}" if raw else "",
                *(f"{row['stages'][s]:.6f}" if row["stages"].get(s) else "" for s in stages),
                f"{row['artifact_bytes']:,}",
                f"{row['train_time_s']:.1f}",
                f"{row['eval_time_s']:.1f}",
            ]
        )
    std = told["val_bpb_std"]
    rows.append(
        [
            "**mean**",
            "",
            "",
            "",
            *[""] * (len(stages) - 1),
            f"**{told['val_bpb']:.6f}**" + (f" (std {std:.6f})" if std is not None else ""),
            f"{told['bytes_model_max']:,} (max)",
            f"{told['train_time_s_mean']:.1f}",
            f"{told['eval_time_s_mean']:.1f}",
        ]
    )
    return table(
        [
            "seed",
            "steps",
            "ms/step",
            "bpb before packing",
            *(f"{s} bpb" for s in stages),
            "artifact bytes",
            "train s",
            "eval s",
        ],
        rows,
    )


def seconds_table(runs: Sequence[Run]) -> str:
    """Where the seconds went, by phase of the ledger."""
    phases = list(dict.fromkeys(name for run in runs for name in run.result["seconds"]))
    return table(
        ["phase", *(f"seed {run.seed}" for run in runs)],
        [[name, *(f"{run.result['seconds'].get(name, 0):.1f}" for run in runs)] for name in phases],
    )


def readme(folder: Folder, told: dict[str, Any], nproc: int) -> str:
    """README.md of a record: all that was measured; the idea and the credits are for a person."""
    runs, first = folder.runs, folder.runs[0].result
    seed, data = runs[0].seed, first["data"]
    run = (
        "python train_gpt.py"
        if nproc == 1
        else f"torchrun --standalone --nproc_per_node={nproc} train_gpt.py"
    )
    rate = (
        f"; {told['matmul_gflops']} GFLOP/s for a 2048^3 float32 product"
        if told["matmul_gflops"]
        else ""
    )
    std = f" (std {told['val_bpb_std']:.6f})" if told["val_bpb_std"] is not None else ""
    overrides = " ".join(
        f"{name}={text}"
        for name, text in first["overrides"].items()
        if name not in ("SEED", "OUT_DIR", "RUN_ID")
    )
    commit = f"commit `{told['commit']}`" if told["commit"] else "of no commit of its repository"
    made = table(
        ["seed", "status", "val_bpb", "in this record"],
        [
            [row["seed"], row["status"], row["val_bpb"], "yes" if row["included"] else "no"]
            for row in told["all_runs"]
        ],
    )
    return f"""# {told["name"]}

**val_bpb {told["val_bpb"]:.6f}**{std}, {len(runs)} seeds, track `{told["track"]}`, \
{told["date"]}. Largest artifact
{told["bytes_model_max"]:,} bytes, code {told["bytes_code"]:,} bytes, total {told["bytes_total"]:,}.

## Idea

{told["technique_summary"] or TO_COMPLETE}

## Results

{results_table(runs, told)}

The score is that of the last stage, from the artifact alone: {data["val_tokens"] - 1:,} \
targets standing for
{told["val_bytes"]:,} bytes. Every run made with this script and these settings:

{made}

![training loss and bpb by stage](curves.png)

## Run it

From inside this folder, with the data below a `data/` folder here or above:

```bash
SEED={seed} {run}
MODE=eval ARTIFACT=model_seed{seed}.ptz {run}
```

Settings that differ from the script's defaults \
({"inside `train_gpt.py`" if folder.source[1] else "`config.env`"}):
`{overrides or "none"}`.

## What was measured

* Machine: {told["hardware"]}{rate}. torch {first["versions"]["torch"]}, \
Python {first["versions"]["python"]}.
* Training {told["train_time_s_mean"]:.1f} s on average, \
{first["train_tokens"]:,} tokens, {first["train_flops"]:.3g} FLOPs.
* Script sha256 `{told["code_sha256"][:16]}`, {commit}; \
tokenizer `{told["tokenizer_sha256"][:16]}`, \
validation shard `{told["val_sha256"][0][:16]}`, {data["train_shards"]} training shards \
({data["train_tokens"]:,} tokens).
* Seconds by phase:

{seconds_table(runs)}

## Files

`train_gpt.py`{"" if folder.source[1] else ", `config.env`"}, `requirements.txt`, \
`train_seed<N>.log` (each ends with its whole result as JSON), \
`model_seed<N>.ptz` (not in git; sha256 in `submission.json`), \
`submission.json`, `check.json`, `curves.png`.

## Credits

{TO_COMPLETE}
"""
