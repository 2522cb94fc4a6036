"""What keeps an order from ever becoming a record, or may: said before the first seed is trained.

All from the text of script and settings, which may be other people's: nothing is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tool.case import TRACKS, Case, Track
from tool.finding import NotHere
from tool.folder import Folder
from train_gpt import shard_name, shards_in

OFF = ("", "0", "false")


class Preflight:
    """Script and settings of a snapshot, and what is wrong with them.

    problems: no record can come of it; warnings: somebody may want it so.
    """

    def __init__(self, work: Path, track: str, seeds: int = 0, nproc: int = 0):
        """seeds, nproc: how many seeds, and processes each; 0: not known."""
        self.folder = Folder(work)
        self.track = TRACKS.get(track, Track())
        self.settings = _settings_of(self.folder)
        self.problems: list[str] = []
        self.warnings: list[str] = []
        if track not in TRACKS:
            self.warnings.append(f"track {track}: no limits are known, as of {', '.join(TRACKS)}")
        if seeds and seeds < self.track.seeds:
            self.problems.append(f"--seeds: {seeds} given, the track asks for {self.track.seeds}")
        if nproc and self.track.world and nproc != self.track.world:
            self.problems.append(f"--nproc {nproc}: in this track it is {self.track.world}")
        self._check_kind()
        self._check_data()
        self._check_size()
        self._check_length()
        self._check_schedule()

    def is_on(self, name: str) -> bool:
        """Whether a setting is given and not empty, zero or false."""
        return self.settings.get(name, "").lower() not in OFF

    def number(self, name: str) -> float | None:
        """A setting as a number; None if it is none."""
        try:
            return float(self.settings[name])
        except (KeyError, ValueError):
            return None

    def _check_kind(self) -> None:
        """A training of one seed, scored on all of the text."""
        mode = self.settings.get("MODE", "train")
        if mode != "train":
            self.problems.append(f"MODE={mode}: a record is made of trainings")
        if self.is_on("VAL_TOKENS"):
            part = f"VAL_TOKENS={self.settings['VAL_TOKENS']}"
            self.problems.append(f"{part}: a part of the validation set gives no val_bpb")
        if self.is_on("SEEDS"):
            self.problems.append(f"SEEDS={self.settings['SEEDS']}: --seeds makes one run a seed")
        if self.is_on("RESUME"):
            resumed = f"RESUME={self.settings['RESUME']}"
            self.problems.append(f"{resumed}: every seed starts from its own first step")

    def _check_data(self) -> None:
        """The shards and the tokenizer, where the script looks for them."""
        if self.is_on("SMOKE"):
            return
        data = self.settings.get("DATA_PATH")
        for split in ("train", "val"):
            if data and not any(self._shards(data, split)):
                name = shard_name(split)
                self.problems.append(f"DATA_PATH={data}: no {name} there; see data/README.md")
        tokenizer = self.settings.get("TOKENIZER_PATH", "byte260")
        if tokenizer != "byte260" and not self.folder.located(tokenizer):
            self.problems.append(f"TOKENIZER_PATH={tokenizer}: not there; see data/README.md")

    def _shards(self, data: str, split: str) -> list[Path]:
        found = self.folder.located(data)
        return shards_in(found, split) if found else []

    def _check_size(self) -> None:
        """What the code leaves for the model, where both count."""
        caps = [self.track.total_bytes, self.number("MAX_ARTIFACT_BYTES")]
        cap = int(min((cap for cap in caps if cap), default=0))
        code = self.folder.code_bytes
        if cap and code >= cap:
            self.problems.append(f"the code alone has {code:,} bytes, the cap is {cap:,}")
        elif self.track.total_bytes and not self.folder.packed:
            self.warnings.append(
                f"the readable code takes {code:,} of {cap:,} bytes, {cap - code:,} are left for "
                "the model; --packed makes it smaller"
            )

    def _check_length(self) -> None:
        """Training tokens, where they are known and limited."""
        steps = self.number("ITERATIONS")
        batch = self.number("TRAIN_BATCH_TOKENS")
        most = self.track.train_tokens
        if most and steps and batch and self.settings.get("SCHEDULE") == "tokens":
            if steps * batch > most:
                self.problems.append(
                    f"ITERATIONS x TRAIN_BATCH_TOKENS = {steps * batch:,.0f} training tokens, the "
                    f"track allows {most:,}"
                )

    def _check_schedule(self) -> None:
        """Ramps that are longer than the training."""
        steps = self.number("ITERATIONS")
        for name in ("WARMDOWN_ITERS", "MUON_MOMENTUM_WARMUP_STEPS"):
            ramp = self.number(name)
            if steps and ramp and ramp > steps:
                effect = "the momentum never reaches its value"
                if name == "WARMDOWN_ITERS":
                    effect = f"the learning rate begins at {steps / ramp:.2f} of its value"
                self.warnings.append(f"{name}={ramp:.0f}, ITERATIONS={steps:.0f}: {effect}")


def _settings_of(folder: Folder) -> Mapping[str, str]:
    """What the script declares, and what comes with it in its place."""
    try:
        declared = Case(folder).declared
    except NotHere:
        declared = {}
    known = {name: text for name, text in declared.items() if text is not None}
    return {**known, **folder.config}
