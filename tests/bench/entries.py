"""How much better one entry of the CPU track is than others, with intervals over speeches.

    TRACK=records/track_cpu_1mb
    python tests/bench/entries.py $TRACK/2026-11-27_best $TRACK/2026-11-27_baseline

The first folder is compared with each of the others. Every artifact (model_seed<N>.ptz) is scored
again, by its last true stage. The validation pieces come from 13 speeches and are no independent
documents: the interval holds 95 % of 10,000 resamples of the speeches, and of the seeds that both
entries have.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from command import ROOT, followed, run, tg
from scores import Bench, interval

sys.path.insert(0, str(ROOT / "records"))
from codec import true_scorer


def score(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Bits and bytes by speech of an artifact's last true stage."""
    env = {"MODE": "eval", "DEVICE": "cpu", "MAX_EVAL_SECONDS": "0", "ARTIFACT": str(path)}
    bench = Bench(env, "speeches")
    scorer = true_scorer(bench.cfg, bench.blob, bench.rt, bench.table)
    found = bench.evaluated(scorer, bench.cfg, silent=True)
    print(f"{path}: {found.name} val_bpb {found.bpb:.6f}", flush=True)
    return bench.by_cluster(found.nats) / math.log(2), bench.sizes


def artifacts_in(folder: Path) -> set[str]:
    """Their names; InputError if there are none."""
    tg.check(folder.is_dir(), f"{folder}: no such folder")
    names = {path.name for path in folder.glob("model_seed*.ptz")}
    tg.check(names, f"{folder}: no model_seed<N>.ptz (artifacts are not in git)")
    return names


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("first", type=Path, help="folder of an entry")
    parser.add_argument("others", type=Path, nargs="+", help="folders that it is compared with")
    args = parser.parse_args(arguments)
    folders = [args.first, *args.others]
    names = {folder: artifacts_in(folder) for folder in folders}
    shared = {}
    for other in args.others:
        shared[other] = names[args.first] & names[other]
        tg.check(shared[other], f"{args.first} and {other}: no seed in common")
    shared[args.first] = set.union(*shared.values())
    paths = [folder / name for folder in folders for name in sorted(shared[folder])]
    found = {path: score(path) for path in followed(paths, "artifacts")}
    for other in args.others:
        both = sorted(shared[other])
        own = [found[args.first / name][0] for name in both]
        theirs = [found[other / name][0] for name in both]
        gains = np.subtract(theirs, own)
        _, sizes = found[other / both[0]]
        low, high = interval(gains, sizes)
        gain = gains.mean(0).sum() / sizes.sum()
        told = f"{gain:.4f} [{low:.4f}, {high:.4f}] bpb"
        print(f"{args.first.name} is better than {other.name} by {told}, {len(both)} seeds")


if __name__ == "__main__":
    run(main)
