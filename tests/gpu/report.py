"""What was found: figures as they come, then a table, acceptance.json and what to do."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import advice
from pod import SYSTEMS, Finished, Pod, tg

EVAL_SECONDS = 600


@dataclasses.dataclass
class Finding:
    """One figure and whether it is as it should be."""

    check: str
    name: str
    value: object
    wanted: str
    passed: bool
    advice: str = ""


def all_systems() -> list[str]:
    """The systems of the 16 MB track."""
    return [recipe.parent.name for recipe in sorted(SYSTEMS.glob("*/config.env"))]


def published_systems() -> list[str]:
    """Those whose names begin with their date; ours are checked where they are asked for."""
    return [name for name in all_systems() if name[0].isdigit()]


class Session:
    """The pod and what was found on it."""

    def __init__(self, pod: Pod, systems: Sequence[str]):
        self.pod = pod
        self.findings: list[Finding] = []
        self.check = ""
        self.machine: dict[str, object] = {}
        self.systems: dict[str, dict] = {name: {} for name in systems}
        self.stages: dict[str, dict] = {}
        self.driver_advice = advice.for_driver(tg.torch.version.cuda, "")

    @property
    def timed(self) -> bool:
        """Whether this is the card on which the limits of speed were measured."""
        return "H100 80GB HBM3" in str(self.machine.get("device"))

    def expect(self, name: str, value: object, wanted: str, passed: object, do: str = "") -> bool:
        """Keeps a figure of the present check, what to do if it is wrong, and prints it."""
        finding = Finding(self.check, name, value, wanted, bool(passed), "" if passed else do)
        self.findings.append(finding)
        word = "ok  " if passed else "FAIL"
        print(f"{word} {self.check:9} {name}: {value} ({wanted})", flush=True)
        return finding.passed

    def note(self, name: str, value: object) -> None:
        """A figure without a limit."""
        self.expect(name, value, "noted", True)

    def speed(self, name: str, value: float, limit: float) -> None:
        """Milliseconds, with a limit on the card on which it was measured."""
        if self.timed:
            fast = value <= limit
            self.expect(name, round(value, 2), f"<= {limit:.1f}", fast, advice.SLOW)
        else:
            self.note(name, round(value, 2))

    def ended(self, job: str, wanted: Sequence[object] = (0,), name: str = "") -> Finished | None:
        """Whether a job's exit code is a wanted one -> the job, if it has run."""
        finished = self.pod.finished[job]
        passed = finished.own_code in wanted
        do = "" if passed else advice.diagnose(finished, self.driver_advice)
        several = " or ".join(map(str, wanted))
        self.expect(name or f"{job} exit code", finished.own_code, several, passed, do)
        return finished if finished.result or finished.figures else None


# --- the report -----------------------------------------------------------------------------------


def shown(value: object, digits: int = 1) -> str:
    """A cell of the table."""
    if isinstance(value, float):
        return f"{value:.{digits}f}" if math.isfinite(value) else "-"
    return "-" if value is None else str(value)


def table_of(session: Session) -> list[str]:
    """The systems and the stages, a line each."""
    head = ("system", "ms, 1 GPU", "ms, all", "warm-up s", "graphs", "new", "GiB", "gap to f32")
    lines = ["{:22}{:>10}{:>9}{:>11}{:>8}{:>5}{:>7}{:>12}".format(*head)]
    for name, row in session.systems.items():
        cells = [shown(row.get("ms")), shown(row.get("ms_together")), shown(row.get("warmup"))]
        cells += [shown(row.get("graphs")), shown(row.get("recompiles")), shown(row.get("memory"))]
        cells.append(shown(row.get("gap"), 5))
        lines.append("{:22}{:>10}{:>9}{:>11}{:>8}{:>5}{:>7}{:>12}".format(name, *cells))
    head = ("stage", "targets", "seconds", "us a target", "full, 8 GPUs", "checks")
    lines += ["", "{:32}{:>9}{:>9}{:>13}{:>14}{:>8}".format(*head)]
    for name, row in session.stages.items():
        pace = sum(row.get("seconds_a_target", {}).values()) * 1e6
        cells = [shown(row.get("targets")), shown(row.get("seconds")), shown(pace or None, 2)]
        cells.append(shown(row.get("projected"), 0))
        cells.append("passed" if row.get("checks") else "FAILED")
        lines.append("{:32}{:>9}{:>9}{:>13}{:>14}{:>8}".format(name, *cells))
    full = " or ".join(f"{targets:,}" for targets in tg.FINEWEB_TARGETS.values())
    pieces = " or ".join(f"{vocab:,}" for vocab in tg.FINEWEB_TARGETS)
    lines.append(
        f"full: {full} targets (of {pieces} pieces) at the warm pace of one GPU; batches over 8 "
        f"GPUs unless the stage learns from one to the next; against {EVAL_SECONDS} s"
    )
    return lines


def report(session: Session, seconds: float) -> int:
    """Prints table and failures, writes acceptance.json -> exit code."""
    failed = [finding for finding in session.findings if not finding.passed]
    record = {
        "machine": session.machine,
        "seconds": round(seconds, 1),
        "failed": len(failed),
        "systems": session.systems,
        "stages": session.stages,
        "findings": [dataclasses.asdict(finding) for finding in session.findings],
    }
    text = tg.as_json(record, indent=1, default=str) + "\n"
    (session.pod.out / "acceptance.json").write_text(text)
    lines = table_of(session)
    for finding in failed:
        lines += [f"FAIL {finding.check} {finding.name}: {finding.value} ({finding.wanted})"]
        lines += [f"     {finding.advice or advice.CODE}"]
    passed = len(session.findings) - len(failed)
    lines.append(f"{passed} passed, {len(failed)} failed in {seconds:.0f} s")
    (session.pod.out / "acceptance.txt").write_text("\n".join(lines) + "\n")
    print("-" * 96)
    print("\n".join(lines))
    return 1 if failed else 0
