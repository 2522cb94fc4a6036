"""Reads what a training run printed: logs of this project's and of upstream's shape."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

from train_gpt import LABELS, as_typed

LONGEST_LINE = 4096  # characters that are looked at; the result's line is read whole
MOST_BYTES = 64 << 20  # of a log: of a larger one the two ends are read, half of this each
NUMBER = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"
RESULT_MARK = "result_json: "
# Figures of a log: name -> pattern of its line. Upstream's vocabulary, which this project keeps;
# the last line counts.
LINES = {
    "seed": r"(?:^|\s)seed:[ \t]*(\d{1,18})\b",
    "world_size": r"(?:^|\s)(?:world_size|ws):[ \t]*(\d+)",
    "train_shards": r"train_shards:[ \t]*(\d+)",
    "val_tokens": r"^val_loader:.*\btokens:[ \t]*(\d+)|^val_tokens:[ \t]*(\d+)",
    "code_bytes": r"^Code size[^:\n]*:[ \t]*(\d+)",
    "total_bytes": r"^Total submission size [^:\s][^:\n]*:[ \t]*(\d+)",
    "model_bytes": r"^Serialized model [^:\s][^:\n]*:[ \t]*(\d+)",
    "train_time_ms": rf"^(?:stopping_early|training|step:).*train_time:[ \t]*({NUMBER})ms",
    "step_avg_ms": rf"^step:.*step_avg:[ \t]*({NUMBER})ms",
    "steps": r"^(?:step:|(?:stopping_early|training).*\bstep:)(\d+)/\d+",
    "calibration_s": rf"^GPTQ:[ \t]*collected\b.*\bin\s+({NUMBER})[ \t]*s",
    "total_eval_ms": rf"^total_eval_time:[ \t]*({NUMBER})[ \t]*(?:ms)?",
}
DISOWNED = [label for label in LABELS.values() if label != "val_bpb"]  # what no score is called
SCORE = f"(partial_bpb|{'|'.join(LABELS.values())})"
FINAL = re.compile(
    r"^(?!step:|ttt_chunk)(?:\[[^\]\n]{0,80}\][ \t]*)?"  # a time in brackets may come first
    r"([A-Za-z][\w+-]*?)(_exact)?(?:[ \t]+stride:\d+)?"
    rf"[ \t]+val_loss[:=][ \t]*({NUMBER})[ \t]+{SCORE}[:=][ \t]*({NUMBER})"
    rf"(?:.*?eval_time:[ \t]*({NUMBER})[ \t]*ms)?",
    re.M,
)
STEP = re.compile(
    rf"^step:(\d+)/\d+ (train_loss|val_loss):({NUMBER})(?: val_bpb:({NUMBER}))?", re.M
)
SETTINGS_BLOCK = re.compile(r"^Hyperparameters:[ \t]*\n((?:[ \t]+\w+:.*\n)+)", re.M | re.I)


@dataclasses.dataclass(frozen=True)
class Final:
    """One reported score. exact: printed to eight digits."""

    stage: str
    val_loss: float
    metric: str  # partial_bpb or one of LABELS
    bpb: float
    exact: bool

    @property
    def disowned(self) -> bool:
        """Whether its own label says that it is no score."""
        return self.metric in DISOWNED

    @property
    def byte_per_token(self) -> float:
        """Bytes that one token stands for, by val_loss / ln 2 / val_bpb."""
        return self.val_loss / math.log(2) / self.bpb if self.bpb else math.nan


@dataclasses.dataclass
class Run:
    """One training run as its log tells it.

    `result` is this project's result.json, which ends the log.
    """

    name: str  # file name of the log
    text: str
    figures: dict[str, float]  # see LINES
    finals: list[Final]  # in the order printed, one a stage
    eval_ms: dict[str, float]  # stage -> milliseconds
    train_curve: list[tuple[int, float]]  # (step, nats per token)
    val_curve: list[tuple[int, float, float | None]]  # (step, nats per token, bpb)
    result: dict[str, Any] | None = None

    @property
    def seed(self) -> int | None:
        if "seed" in self.figures:
            return int(self.figures["seed"])
        found = re.search(r"seed_?(\d+)", self.name)
        return int(found[1]) if found else None

    @property
    def final(self) -> Final | None:
        """The score that counts: the last that its own label does not disown, else the last."""
        owned = [final for final in self.finals if not final.disowned]
        candidates = owned or self.finals
        return candidates[-1] if candidates else None

    @property
    def score(self) -> dict[str, Any]:
        """What the result says of the final score; empty if there is no result."""
        return (self.result or {}).get("result") or {}

    @property
    def settings(self) -> dict[str, str] | None:
        """NAME -> text of all settings in effect, if the log tells."""
        if self.result and "settings" in self.result:
            settings = self.result["settings"]
            return {name.upper(): as_typed(value) for name, value in settings.items()}
        block = SETTINGS_BLOCK.search(self.text)
        if block is None:
            return None
        pairs = re.findall(r"^[ \t]+(\w+):[ \t]*(.*?)[ \t]*$", block[1], re.M)
        return {name.upper(): text for name, text in pairs}

    @property
    def scored_tokens(self) -> int:
        """Validation targets that the score stands for; 0 if the log does not say."""
        return self.score.get("tokens") or int(self.figures.get("val_tokens", 0))


def read_run(path: Path) -> Run:
    """A log of any shape; what it does not say is absent. Never raises on odd content."""
    text = _text_of(path)
    finals, eval_ms = _finals_of(text)
    train_curve = []
    val_curve = []
    for step, kind, value, bpb in STEP.findall(text):
        if kind == "train_loss":
            train_curve.append((int(step), float(value)))
        else:
            val_curve.append((int(step), float(value), float(bpb) if bpb else None))
    return Run(
        path.name,
        text,
        _figures_of(text),
        finals,
        eval_ms,
        train_curve,
        val_curve,
        _result_of(text),
    )


def _text_of(path: Path) -> str:
    """A log's text, with bounds on its size and on its lines."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        data = file.read(MOST_BYTES // 2)
        if size > MOST_BYTES:
            file.seek(size - MOST_BYTES // 2)
            data += b"\n"
        data += file.read(MOST_BYTES // 2)
    lines = data.decode("utf-8", errors="replace").replace("\r\n", "\n").split("\n")
    for number, line in enumerate(lines):
        if not line.startswith(RESULT_MARK):
            lines[number] = line[:LONGEST_LINE]
    return "\n".join(lines)


def _figures_of(text: str) -> dict[str, float]:
    figures = {}
    for name, pattern in LINES.items():
        for match in re.finditer(pattern, text, re.M):
            figures[name] = float(next(filter(None, match.groups())))
    return figures


def _finals_of(text: str) -> tuple[list[Final], dict[str, float]]:
    """The scores in the order printed, one a stage (exact ones win), and milliseconds by stage."""
    finals: dict[str, Final] = {}
    eval_ms: dict[str, float] = {}
    for stage, exact, loss, metric, bpb, milliseconds in FINAL.findall(text):
        if exact or stage not in finals or not finals[stage].exact:
            finals.pop(stage, None)  # a later line moves to the end
            finals[stage] = Final(stage, float(loss), metric, float(bpb), bool(exact))
        if milliseconds:
            eval_ms[stage] = float(milliseconds)
    return list(finals.values()), eval_ms


def _result_of(text: str) -> dict[str, Any] | None:
    lines = [line for line in text.splitlines() if line.startswith(RESULT_MARK)]
    if not lines:
        return None
    try:
        result = json.loads(lines[-1].removeprefix(RESULT_MARK))
    except (ValueError, RecursionError):
        return None
    return result if isinstance(result, dict) else None
