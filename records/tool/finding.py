"""What a check of a record found, and how a list of such findings is shown.

A finding is the script's own `Check`: P1 to P9 and AUDIT (packaging), S1 to S10 (source), R6, R10
and R12 (re-run).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from train_gpt import Check, printable

VERDICTS = ("PASS", "WARN", "FAIL", "SKIPPED")
MOST_SHOWN = 6  # problems of one finding that are spelt out
LONGEST_SENTENCE = 400  # characters of one problem


def shown(said: object, most: int = LONGEST_SENTENCE) -> str:
    """What a file says, on one line that it cannot break, fake or stretch."""
    return printable(said, most)


class NotHere(Exception):
    """A check cannot be made on this machine; the message says why."""


class Problems:
    """Collects the sentences of one check: what was seen, and what is allowed."""

    def __init__(self) -> None:
        self.sentences: dict[str, list[str]] = {"FAIL": [], "WARN": [], "SKIPPED": []}

    def fail(self, sentence: str) -> None:
        """Against the rules."""
        self.sentences["FAIL"].append(shown(sentence))

    def warn(self, sentence: str) -> None:
        """Something that a reviewer should look at."""
        self.sentences["WARN"].append(shown(sentence))

    def skip(self, sentence: str) -> None:
        """A part of the check that could not be made."""
        self.sentences["SKIPPED"].append(shown(sentence))

    def __bool__(self) -> bool:
        return any(self.sentences.values())

    def outcome(self, name: str, found: str, **figures: Any) -> Check:
        """One check of all problems: the worst kind decides, its sentences come first.

        found: what to say if there are none; figures: the numbers behind the sentence, for JSON.
        """
        worst = next((kind for kind, told in self.sentences.items() if told), "FAIL")
        told = [text for kind in self.sentences.values() for text in dict.fromkeys(kind)]
        shown = told[:MOST_SHOWN]
        if len(told) > MOST_SHOWN:
            shown.append(f"and {len(told) - MOST_SHOWN} more")
        return Check(name, "; ".join(shown), figures, counts_as=worst, found=found)


def skipped(name: str, reason: str) -> Check:
    """A check that could not be made."""
    return Check(name, reason, counts_as="SKIPPED")


def worst_verdict(findings: Iterable[Check]) -> str:
    """FAIL, else WARN, else PASS. A skipped check is neither: the summary counts it."""
    seen = {finding.word for finding in findings}
    return next((verdict for verdict in ("FAIL", "WARN") if verdict in seen), "PASS")


def text_of(finding: Check) -> str:
    """Its sentence: what is wrong, else what was found."""
    return shown(finding.problem or finding.found, (MOST_SHOWN + 1) * LONGEST_SENTENCE)


def render(findings: Sequence[Check]) -> str:
    """One line a finding, then the count of each verdict; a skipped check has not passed."""
    lines = [f"{finding.name:4} {finding.word:8} {text_of(finding)}" for finding in findings]
    words = [finding.word for finding in findings]
    counts = (f"{words.count(verdict)} {verdict}" for verdict in VERDICTS)
    return "\n".join([*lines, ", ".join(counts)])


def as_json(findings: Sequence[Check], **more: Any) -> str:
    """The findings as a JSON object.

    {"verdict", "findings": [{"id", "verdict", "text", "figures"}], ...more}
    """
    rows = [
        {
            "id": finding.name,
            "verdict": finding.word,
            "text": text_of(finding),
            "figures": finding.figures,
        }
        for finding in findings
    ]
    told = {**more, "verdict": worst_verdict(findings), "findings": rows}
    return json.dumps(told, indent=1) + "\n"
