"""A record folder under check, and what its track demands."""

from __future__ import annotations

import ast
import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tool.finding import NotHere
from tool.folder import Folder
from tool.logs import Run
from tool.script import declared_settings
from train_gpt import CHARGES, FIELDS, ByteTable, read_shard, sha256, shards_in

# Settings that say where and how a run was made, not what was trained.
RUN_SETTINGS = frozenset(name for name, field in FIELDS.items() if field.metadata["group"] == "run")


def of_training(settings: Mapping[str, str]) -> dict[str, str]:
    """The settings that say what was trained."""
    return {name: text for name, text in settings.items() if name not in RUN_SETTINGS}


@dataclasses.dataclass(frozen=True)
class Track:
    """What a track demands. None: no limit."""

    total_bytes: int | None = None  # code + model
    model_bytes: int | None = None  # model file alone
    train_seconds: float | None = None  # training loop and all that reads data
    eval_seconds: float | None = None
    train_tokens: int | None = None
    train_flops: float | None = None
    world: int | None = None
    device: str = ""  # part of the device's name
    seeds: int = 0  # fewer are a FAIL, not a WARN


TRACKS = {
    "10min_16mb": Track(
        total_bytes=16_000_000, train_seconds=600, eval_seconds=600, world=8, device="H100", seeds=3
    ),
    "non_record_16mb": Track(total_bytes=16_000_000),
    "1gpu": Track(
        total_bytes=16_000_000,
        eval_seconds=3600,
        train_tokens=1_000_000_000,
        train_flops=4e17,
        world=1,
    ),
    "cpu_1mb": Track(
        model_bytes=1_000_000, eval_seconds=600, train_tokens=3_000_000, train_flops=4e13
    ),
}


@dataclasses.dataclass
class Case:
    """A folder under check.

    data: folder of shards to use instead of the logged one; may_run: execute its script.
    """

    folder: Folder
    data: Path | None = None
    may_run: bool = True

    @functools.cached_property
    def track(self) -> Track:
        return TRACKS.get(self.folder.track, Track())

    @functools.cached_property
    def ours(self) -> list[Run]:
        """The runs that end with this project's result."""
        return [run for run in self.folder.runs if run.result]

    @property
    def settings(self) -> dict[str, str]:
        """Settings in effect in the first of our runs."""
        return (self.ours[0].settings or {}) if self.ours else {}

    @functools.cached_property
    def declared(self) -> dict[str, str | None]:
        """The settings that the script declares. Raises NotHere if it does not parse."""
        try:
            return declared_settings(ast.parse(self.folder.source))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise NotHere("the script does not parse on this Python") from None

    def located(self, setting: str) -> Path | None:
        """The file or folder that a path setting of the first run names, if it is here."""
        if setting == "DATA_PATH" and self.data:
            return self.data
        text = self.settings.get(setting)
        if not text:
            return None
        here = Path.cwd() / text
        return here if here.exists() else self.folder.located(text)

    def shards(self, split: str) -> list[Path]:
        """The shards of a split where the first run's were, or --data says; empty without."""
        folder = self.located("DATA_PATH")
        return shards_in(folder, split) if folder else []

    def tokens_of(self, split: str) -> np.ndarray | None:
        """What a split's shards hold, if they are the very files that the first run logged."""
        paths = self.shards(split)
        logged = self.data_logged.get(f"{split}_sha256")
        if not paths or [sha256(path) for path in paths] != logged:
            return None
        return np.concatenate([read_shard(path) for path in paths])

    @property
    def data_logged(self) -> Mapping[str, Any]:
        """What the first run's result says of its data."""
        return self.ours[0].result.get("data", {}) if self.ours else {}

    @functools.cached_property
    def validation(self) -> np.ndarray | None:
        """The validation tokens, if the very shards that the first run scored are here."""
        return self.tokens_of("val")

    @functools.cached_property
    def charges(self) -> np.ndarray | None:
        """Bytes that each validation token but the first is charged, if what says so is here."""
        if self.validation is None or self.table is None:
            return None
        if not self.table.markers:
            return self.table.count(self.validation)
        told = self.tokens_of(CHARGES)
        return None if told is None else told[1:]

    @property
    def transform(self) -> str:
        """What the first run's text went through before its tokenizer; empty = nothing."""
        return self.data_logged.get("case_transform", "")

    @functools.cached_property
    def table(self) -> ByteTable | None:
        """The byte table of the first run's tokenizer, if that very tokenizer is here."""
        if self.settings.get("TOKENIZER_PATH") == "byte260":
            return ByteTable.bytes260()
        path = self.located("TOKENIZER_PATH")
        if path is None or sha256(path) != self.data_logged["tokenizer_sha256"]:
            return None
        return ByteTable.from_sentencepiece(path, self.transform)
