"""MODE=plan against published step times and memory; the fit of its three constants.

    python tests/bench/plan.py

The constants of train_gpt.py should be the fitted ones: least squares of the relative errors.
"""

import statistics
import sys
from collections.abc import Sequence

import numpy as np
from command import ROOT, options_of, run, tg
from scipy.optimize import nnls

sys.path.insert(0, str(ROOT / "tests"))
from published_times import PUBLISHED, Planned, planned


def fit(rows: list[Planned]) -> np.ndarray:
    """Seconds of a FLOP, a byte and an operation, from the rows of one configuration each."""
    relative = []
    for row in rows:
        if row.run.fitted and len(row.costs) == 1:
            cost = row.costs[0]
            counts = np.array([cost.flops, cost.bytes, cost.operations])
            relative.append(1000 * counts / row.run.ms)
    relative = np.array(relative)
    scale = relative.max(0)
    found, _ = nnls(relative / scale, np.ones(len(relative)))
    return found / scale


def show(row: Planned) -> None:
    """A line of the table."""
    published = row.run
    memory = ""
    if published.mib:
        memory = f"{published.mib:6} MiB {row.memory_error():+5.0%}"
    print(
        f"{published.name:30} {published.ms:7.2f} ms {row.ms():7.2f} {row.error():+5.0%} {memory}"
    )


def main(arguments: Sequence[str]) -> None:
    options_of(arguments, (), __doc__)
    rows = [planned(run) for run in PUBLISHED]
    flop, byte, operation = fit(rows)
    print(f"fitted: {1 / flop:.3g} FLOP/s, {1 / byte:.3g} byte/s, {operation:.3g} s an operation")
    used = f"{tg.FLOPS_A_SECOND:.3g} FLOP/s, {tg.BYTES_A_SECOND:.3g} byte/s"
    print(f"in use: {used}, {tg.SECONDS_AN_OPERATION:.3g} s an operation")
    print(f"{'run':30} {'logged':>10} {'plan':>7} error  logged   error")
    for row in rows:
        show(row)
    errors = [abs(row.error()) for row in rows]
    print(f"median error {statistics.median(errors):.1%}, worst {max(errors):.1%}")


if __name__ == "__main__":
    run(main)
