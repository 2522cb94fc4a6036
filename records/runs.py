"""Reads what a run left behind: logs and whole record folders.

Logs are of this project's or of upstream's shape.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from source import unpack_source

from train_gpt import LABELS, as_typed

NUMBER = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"
RESULT_MARK = "result_json: "
# Figures of a log: name -> pattern of its line. Upstream's vocabulary, which this project keeps;
# the last line counts.
LINES = {
    "seed": r"(?:^|\s)seed:\s*(\d+)",
    "world_size": r"(?:^|\s)(?:world_size|ws):\s*(\d+)",
    "train_shards": r"train_shards:\s*(\d+)",
    "val_tokens": r"^val_loader:.*\btokens:\s*(\d+)|^val_tokens:\s*(\d+)",
    "code_bytes": r"^Code size[^:]*:\s*(\d+)",
    "total_bytes": r"^Total submission size [^:\s][^:]*:\s*(\d+)",
    "model_bytes": r"^Serialized model [^:\s][^:]*:\s*(\d+)",
    "train_time_ms": rf"^(?:stopping_early|training|step:).*train_time:\s*({NUMBER})ms",
    "step_avg_ms": rf"^step:.*step_avg:\s*({NUMBER})ms",
    "steps": r"^(?:step:|(?:stopping_early|training).*\bstep:)(\d+)/\d+",
    "calibration_s": rf"^GPTQ:\s*collected\b.*\bin\s+({NUMBER})\s*s",
    "total_eval_ms": rf"^total_eval_time:\s*({NUMBER})\s*(?:ms)?",
}
FINAL = re.compile(
    rf"^(?!step:|ttt_chunk)(?:\[[^\]]*\]\s*)?([A-Za-z][\w+-]*?)(_exact)?(?:\s+stride:\d+)?"
    rf"\s+val_loss[:=]\s*({NUMBER})\s+(partial_bpb|{'|'.join(LABELS.values())})[:=]\s*({NUMBER})"
    rf"(?:.*?eval_time:\s*({NUMBER})\s*ms)?",
    re.M,
)
STEP = re.compile(
    rf"^step:(\d+)/\d+ (train_loss|val_loss):({NUMBER})(?: val_bpb:({NUMBER}))?", re.M
)


@dataclasses.dataclass(frozen=True)
class Final:
    """One reported score. exact: printed to eight digits."""

    stage: str
    val_loss: float
    metric: str  # partial_bpb or one of LABELS
    bpb: float
    exact: bool

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
        return next(
            (
                final
                for final in reversed(self.finals)
                if final.metric in ("val_bpb", "partial_bpb")
            ),
            self.finals[-1] if self.finals else None,
        )

    @property
    def settings(self) -> dict[str, str] | None:
        """NAME -> text of all settings in effect, if the log tells."""
        if self.result and "settings" in self.result:
            return {
                name.upper(): as_typed(value) for name, value in self.result["settings"].items()
            }
        block = re.search(r"^Hyperparameters:\s*\n((?:[ \t]+\w+:.*\n)+)", self.text, re.M | re.I)
        pairs = re.findall(r"^[ \t]+(\w+):\s*(.*?)\s*$", block[1], re.M) if block else []
        return {name.upper(): text for name, text in pairs} or None


def read_run(path: Path) -> Run:
    """A log of any shape; what it does not say is absent. Never raises on odd content."""
    text = path.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n")
    figures = {}
    for name, pattern in LINES.items():
        matches = list(re.finditer(pattern, text, re.M))
        if matches:
            figures[name] = float(
                next(group for group in matches[-1].groups() if group is not None)
            )
    stages: dict[str, Final] = {}
    eval_ms: dict[str, float] = {}
    for stage, exact, loss, metric, bpb, milliseconds in FINAL.findall(text):
        kept = stages.get(stage)
        if exact or kept is None or not kept.exact:
            stages.pop(stage, None)  # a later line moves to the end
            stages[stage] = Final(stage, float(loss), metric, float(bpb), bool(exact))
        if milliseconds:
            eval_ms[stage] = float(milliseconds)
    steps = STEP.findall(text)
    return Run(
        path.name,
        text,
        figures,
        list(stages.values()),
        eval_ms,
        [(int(step), float(value)) for step, kind, value, _ in steps if kind == "train_loss"],
        [
            (int(step), float(value), float(bpb) if bpb else None)
            for step, kind, value, bpb in steps
            if kind == "val_loss"
        ],
        _result_of(text),
    )


def _result_of(text: str) -> dict[str, Any] | None:
    lines = [line for line in text.splitlines() if line.startswith(RESULT_MARK)]
    try:
        result = json.loads(lines[-1].removeprefix(RESULT_MARK)) if lines else None
    except ValueError:
        return None
    return result if isinstance(result, dict) else None


def parse_config(text: str) -> dict[str, str]:
    """NAME -> text of a config.env's lines."""
    pairs = (
        line.partition("=")
        for line in text.splitlines()
        if "=" in line and not line.lstrip().startswith("#")
    )
    return {name.strip(): value.strip() for name, _, value in pairs}


def config_text(settings: Mapping[str, str]) -> str:
    """The lines of a config.env with these settings."""
    return "".join(f"{name}={text}\n" for name, text in settings.items())


@dataclasses.dataclass
class Folder:
    """A record folder, as far as its parts exist.

    They are the script, its settings, the logs, submission.json and the artifacts.
    """

    path: Path

    def __post_init__(self) -> None:
        self.path = Path(self.path).resolve()
        if not self.path.is_dir():
            raise FileNotFoundError(f"{self.path}: no such folder")

    @functools.cached_property
    def files(self) -> list[Path]:
        """All but caches and logs/<run>/, which running the script inside the folder leaves."""
        found = (
            p for p in sorted(self.path.rglob("*")) if p.is_file() and "__pycache__" not in p.parts
        )
        places = ((p, p.relative_to(self.path).parts) for p in found)
        return [p for p, parts in places if parts[0] != "logs" or len(parts) == 2]

    @functools.cached_property
    def script(self) -> Path | None:
        """train_gpt.py, else the only other script whose name begins with train."""
        named = self.path / "train_gpt.py"
        others = [
            p
            for p in self.files
            if p.parent == self.path and p.name.startswith("train") and p.suffix == ".py"
        ]
        return named if named.is_file() else others[0] if len(others) == 1 else None

    @functools.cached_property
    def source(self) -> tuple[str, int]:
        """The script's readable source, and how many wrappers were around it."""
        return (
            unpack_source(self.script.read_text(encoding="utf-8", errors="replace"))
            if self.script
            else ("", 0)
        )

    @functools.cached_property
    def config(self) -> dict[str, str]:
        """Settings that come with the script: config.env beside it, or inside the wrapper."""
        beside = self.path / "config.env"
        if beside.is_file():
            return parse_config(beside.read_text(encoding="utf-8", errors="replace"))
        if self.script is None:
            return {}
        try:
            tree = ast.parse(self.script.read_text(encoding="utf-8", errors="replace"))
        except SyntaxError:
            return {}
        for node in tree.body:
            if (
                isinstance(node, ast.Assign)
                and getattr(node.targets[0], "id", "") == "SETTINGS_INSIDE"
                and isinstance(node.value, ast.Constant)
            ):
                return parse_config(str(node.value.value))
        return {}

    @functools.cached_property
    def requirements(self) -> list[str]:
        path = self.path / "requirements.txt"
        lines = (
            path.read_text(encoding="utf-8", errors="replace").splitlines()
            if path.is_file()
            else []
        )
        return [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]

    @functools.cached_property
    def runs(self) -> list[Run]:
        """The training logs, in order of seed."""
        logs = [
            p
            for p in self.files
            if p.suffix in (".log", ".txt")
            and "require" not in p.name.lower()
            and re.search(r"train|seed|log", str(p.relative_to(self.path)), re.I)
        ]
        runs = [read_run(p) for p in logs]
        kept = [run for run in runs if run.finals or run.train_curve or run.result]
        return sorted(
            kept, key=lambda run: (run.seed if run.seed is not None else math.inf, run.name)
        )

    @functools.cached_property
    def submission(self) -> dict[str, Any] | None:
        """submission.json (or the only submission*.json).

        None if there is none; {} if it is no JSON object.
        """
        named = self.path / "submission.json"
        others = sorted(self.path.glob("submission*.json"))
        path = named if named.is_file() else others[0] if len(others) == 1 else None
        if path is None:
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8", errors="replace"))
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def artifact(self, run: Run) -> Path | None:
        """The artifact of a run, if it is in the folder."""
        names = (f"model_seed{run.seed}.ptz", f"final_model_seed{run.seed}.ptz")
        return next((self.path / name for name in names if (self.path / name).is_file()), None)

    @property
    def code_bytes(self) -> int:
        """Bytes of the script and of a config.env beside it: what this project counts as code."""
        paths = (self.script, self.path / "config.env")
        return sum(p.stat().st_size for p in paths if p is not None and p.is_file())

    @property
    def track(self) -> str:
        """From submission.json, else the name of the folder above."""
        named = (self.submission or {}).get("track")
        return str(named or self.path.parent.name).removeprefix("track_")
