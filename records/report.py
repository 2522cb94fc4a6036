"""One finding of one check, and how a list of findings is shown."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any

VERDICTS = ("PASS", "WARN", "FAIL", "SKIPPED")


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one check found.

    id: P1 to P10, S1 to S10, R6, R10, R12 (rules: packaging, static, run-time).
    """

    id: str
    verdict: str  # one of VERDICTS
    text: str  # one sentence: what was seen, what is allowed
    # JSON: the numbers behind the sentence.
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(
                f"{self.id}: verdict {self.verdict!r}; expected one of {', '.join(VERDICTS)}"
            )


def gather(id: str, problems: Sequence[tuple[str, str]], good: str, **figures: Any) -> Finding:
    """One finding of several (verdict, sentence) problems.

    It has the worst verdict and all sentences; PASS if there are none.
    """
    if not problems:
        return Finding(id, "PASS", good, figures)
    worst = max((verdict for verdict, _ in problems), key=("SKIPPED", "WARN", "FAIL").index)
    return Finding(id, worst, "; ".join(text for _, text in problems), figures)


def worst_verdict(findings: Iterable[Finding]) -> str:
    """FAIL, else WARN, else PASS. A skipped check is neither: the summary counts it."""
    seen = {finding.verdict for finding in findings}
    return next((verdict for verdict in ("FAIL", "WARN") if verdict in seen), "PASS")


def render(findings: Sequence[Finding]) -> str:
    """One line a finding, then the count of each verdict.

    A skipped check never counts as passed.
    """
    lines = [f"{finding.id:4} {finding.verdict:8} {finding.text}" for finding in findings]
    counts = {verdict: sum(f.verdict == verdict for f in findings) for verdict in VERDICTS}
    return "\n".join([*lines, ", ".join(f"{count} {verdict}" for verdict, count in counts.items())])


def as_json(findings: Sequence[Finding], **more: Any) -> str:
    """The findings as a JSON object.

    {"verdict", "findings": [{"id", "verdict", "text", "figures"}], ...more}
    """
    return (
        json.dumps(
            {
                **more,
                "verdict": worst_verdict(findings),
                "findings": [dataclasses.asdict(finding) for finding in findings],
            },
            indent=1,
        )
        + "\n"
    )
