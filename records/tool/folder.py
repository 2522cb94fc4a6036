"""A record folder: script, settings, logs, submission.json, artifacts, as far as they exist."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tool.logs import Run, read_run
from tool.strip import READABLE, readable_of
from tool.wrapper import settings_inside, unpack_source
from train_gpt import read_config_lines


def parse_config(text: str) -> dict[str, str]:
    """NAME -> text of a config.env's lines; a line that is no assignment is left out."""
    lines = read_config_lines(text, "config.env")
    return {line.name: line.text for line in lines if line.complete}


def config_text(settings: Mapping[str, str]) -> str:
    """The lines of a config.env with these settings."""
    return "".join(f"{name}={text}\n" for name, text in settings.items())


def read_lenient(path: Path) -> str:
    """The text of somebody's file; what is not UTF-8 is replaced."""
    return path.read_text(encoding="utf-8", errors="replace")


@dataclasses.dataclass
class Folder:
    """A record folder. FileNotFoundError if there is none."""

    path: Path

    def __post_init__(self) -> None:
        self.path = Path(self.path).resolve()
        if not self.path.is_dir():
            raise FileNotFoundError(f"{self.path}: no such folder")

    @functools.cached_property
    def files(self) -> list[Path]:
        """All but caches and logs/<run>/ with a result.json, left by running the script here."""
        found = []
        for path in sorted(self.path.rglob("*")):
            parts = path.relative_to(self.path).parts
            run = self.path.joinpath(*parts[:2])
            of_a_run = parts[0] == "logs" and (run / "result.json").is_file()
            if path.is_file() and "__pycache__" not in parts and not of_a_run:
                found.append(path)
        return found

    @property
    def beside(self) -> list[Path]:
        """The files at the top of the folder."""
        return [path for path in self.files if path.parent == self.path]

    @functools.cached_property
    def script(self) -> Path | None:
        """train_gpt.py, else the only other script whose name begins with train."""
        named = self.path / "train_gpt.py"
        if named.is_file():
            return named
        others = []
        for path in self.beside:
            if re.fullmatch(r"train.*\.py", path.name) and not path.name.endswith(READABLE):
                others.append(path)
        return others[0] if len(others) == 1 else None

    @functools.cached_property
    def readable(self) -> Path | None:
        """The readable copy beside a script that was stripped of comments and docstrings."""
        copy = readable_of(self.script) if self.script else None
        return copy if copy and copy.is_file() else None

    @functools.cached_property
    def shipped(self) -> str:
        """The script's text as it is in the folder."""
        return read_lenient(self.script) if self.script else ""

    @functools.cached_property
    def _unpacked(self) -> tuple[str, int]:
        return unpack_source(self.shipped)

    @property
    def source(self) -> str:
        """The script's readable source, without wrappers."""
        return self._unpacked[0]

    @property
    def packed(self) -> bool:
        """Whether the script is a self-extracting wrapper."""
        return self._unpacked[1] > 0

    @functools.cached_property
    def config(self) -> dict[str, str]:
        """Settings that come with the script: config.env beside it, or inside the wrapper."""
        beside = self.path / "config.env"
        return parse_config(
            read_lenient(beside) if beside.is_file() else settings_inside(self.shipped)
        )

    @functools.cached_property
    def requirements(self) -> list[str]:
        """The lines of requirements.txt without comments."""
        path = self.path / "requirements.txt"
        lines = read_lenient(path).splitlines() if path.is_file() else []
        lines = [line.split("#")[0].strip() for line in lines]
        return [line for line in lines if line]

    @functools.cached_property
    def runs(self) -> list[Run]:
        """The training logs, in order of seed."""
        found = []
        for path in self.files:
            told = str(path.relative_to(self.path))
            named = re.search(r"train|seed|log", told, re.I) and "require" not in path.name.lower()
            if path.suffix in (".log", ".txt") and named:
                run = read_run(path)
                if run.finals or run.train_curve or run.result:
                    found.append(run)
        return sorted(found, key=_order_of_seed)

    @functools.cached_property
    def submission(self) -> dict[str, Any] | None:
        """submission.json (or the only submission*.json).

        None if there is none; {} if it is no JSON object.
        """
        path = self.path / "submission.json"
        others = sorted(self.path.glob("submission*.json"))
        if not path.is_file() and len(others) == 1:
            path = others[0]
        if not path.is_file():
            return None
        try:
            found = json.loads(read_lenient(path))
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def located(self, text: str) -> Path | None:
        """What a path names, as seen from the folder, or from any above it."""
        for base in (self.path, *self.path.parents):
            if (base / text).exists():
                return base / text
        return None

    @property
    def is_recipe(self) -> bool:
        """Settings or a script that nobody has run yet: no logs, and nothing said of any."""
        return bool(self.config or self.script) and not self.runs and self.submission is None

    def artifact(self, run: Run) -> Path | None:
        """The artifact of a run, if it is in the folder."""
        for name in (f"model_seed{run.seed}.ptz", f"final_model_seed{run.seed}.ptz"):
            if (self.path / name).is_file():
                return self.path / name
        return None

    @property
    def code_bytes(self) -> int:
        """Bytes of the script and of a config.env beside it: what this project counts as code."""
        config = self.path / "config.env"
        size = self.script.stat().st_size if self.script else 0
        return size + (config.stat().st_size if config.is_file() else 0)

    @property
    def track(self) -> str:
        """From submission.json, else the name of the folder above."""
        named = (self.submission or {}).get("track")
        return str(named or self.path.parent.name).removeprefix("track_")


def _order_of_seed(run: Run) -> tuple[float, str]:
    return (math.inf if run.seed is None else run.seed, run.name)
