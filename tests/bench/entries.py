"""How much better one entry of the CPU track is than others, with intervals over speeches.

    python tests/bench/entries.py BETTER OTHER [OTHER ...]    # folders below records/track_cpu_1mb

Every artifact (model_seed<N>.ptz) is scored again, by its last true stage. The validation pieces
come from 13 speeches and are no independent documents: the interval holds 95 % of 10,000 resamples
of the speeches, and of the seeds that both entries have.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
from scores import Bench, interval

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "records"))
from codec import true_scorer  # noqa: E402


def score(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Bits and bytes by speech of an artifact's last true stage."""
    env = {"MODE": "eval", "DEVICE": "cpu", "MAX_EVAL_SECONDS": "0", "ARTIFACT": str(path)}
    bench = Bench(env, "speeches")
    scorer = true_scorer(bench.cfg, bench.blob, bench.rt, bench.table)
    found = bench.evaluated(scorer, bench.cfg, silent=True)
    print(f"{path}: {found.name} val_bpb {found.bpb:.6f}", flush=True)
    return bench.by_cluster(found.nats) / math.log(2), bench.sizes


def scores_of(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Name of the artifact -> bits and bytes by speech."""
    paths = sorted(folder.glob("model_seed*.ptz"))
    if not paths:
        raise SystemExit(f"{folder}: no model_seed<N>.ptz (artifacts are not in git)")
    return {path.name: score(path) for path in paths}


def main(folders: list[str]) -> None:
    first, *others = (Path(folder) for folder in folders)
    own = scores_of(first)
    for other in others:
        theirs = scores_of(other)
        both = sorted(own.keys() & theirs.keys())
        gains = np.array([theirs[name][0] - own[name][0] for name in both])
        sizes = own[both[0]][1]
        low, high = interval(gains, sizes)
        gain = gains.mean(0).sum() / sizes.sum()
        told = f"{gain:.4f} [{low:.4f}, {high:.4f}] bpb"
        print(f"{first.name} is better than {other.name} by {told}, {len(both)} seeds")


if __name__ == "__main__":
    main(sys.argv[1:])
