"""What runs the shipped script: processes under limits, sandboxes, import (S8), training (R12).

They execute the folder's code, in empty temporary folders, without network, one after another. Each
check takes a Case and returns one Check, or raises NotHere. Scoring again is in `rescore`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from tool.case import Case, of_training
from tool.finding import NotHere, Problems
from tool.source import IMAGE
from train_gpt import (
    CHARGES,
    Check,
    filled,
    idle_names,
    read_settings,
    shard_name,
    shards_in,
    write_shard,
)

WATCH = Path(__file__).with_name("watch.py")
ALWAYS_SET = ("PATH", "HOME", "LD_LIBRARY_PATH", "LANG", "TMPDIR", "SYSTEMROOT", "OMP_NUM_THREADS")
MOST_READ = 1 << 16  # bytes at the end of what a process says
MOST_WRITTEN = 4 << 30  # bytes of any file that it may write, its output too
IMPORT_SECONDS = 180
TRAINING_SECONDS = 900
IMPORT = """
import importlib.util, sys
wanted = importlib.util.spec_from_file_location("shipped", sys.argv[1])
sys.modules["shipped"] = importlib.util.module_from_spec(wanted)
wanted.loader.exec_module(sys.modules["shipped"])
"""


# --- processes ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Done:
    """How a process ended."""

    code: int
    said: str  # the end of its output and errors


def clean_environment(**settings: str) -> dict[str, str]:
    """The least environment a run needs, and the given settings."""
    kept = {name: os.environ[name] for name in ALWAYS_SET if name in os.environ}
    return {**kept, "PYTHONDONTWRITEBYTECODE": "1", **settings}


def launcher(world: int) -> list[str]:
    """The command a script's name goes behind: this Python, or torchrun with several processes."""
    if world == 1:
        return [sys.executable]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, f"--nproc_per_node={world}"]


@functools.cache
def without_network() -> list[str]:
    """What to put before a command so that it has no network; empty where the system has none.

    A user namespace and a network namespace of its own, in which not even loopback is up.
    """
    prefix = ["unshare", "--user", "--map-root-user", "--net"]
    try:
        done = subprocess.run([*prefix, "true"], capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [] if done.returncode else prefix


def dies_with_parent(signal_name: str) -> list[str]:
    """What to put before a command so that it is sent a signal when this process dies (Linux)."""
    return ["setpriv", "--pdeathsig", signal_name] if shutil.which("setpriv") else []


def warning(case: Case) -> str:
    """What a reviewer should know before the script of somebody else runs."""
    network = "no network" if without_network() else "the network only watched, not cut off"
    return (
        f"{case.folder.script}: is now run several times with your rights, in empty folders, with "
        f"{network}, limits on time, memory and output; without --run nothing of it is run"
    )


def confined() -> list[str]:
    """What to put before a command of somebody else's: no network, no life after this process."""
    return [*without_network(), *dies_with_parent("KILL")]


def _limit(pid: int, seconds: float) -> None:
    """Bounds a process, and all that it starts: CPU seconds, memory, size of files (Linux)."""
    if not hasattr(resource, "prlimit"):
        return
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    processor = int(seconds * (os.cpu_count() or 1)) + 1
    for what, most in (
        (resource.RLIMIT_CPU, processor),
        (resource.RLIMIT_DATA, memory),
        (resource.RLIMIT_FSIZE, MOST_WRITTEN),
    ):
        resource.prlimit(pid, what, (most, most))


def execute(command: Sequence[str], cwd: Path, env: Mapping[str, str], limit: float) -> Done:
    """Runs to the end or to the time limit; raises NotHere when it takes longer.

    In a session of its own, which is killed at the end with all that the command left running.
    """
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _limit(process.pid, limit)
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            raise NotHere(f"not finished after {limit:.0f} s on this machine") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        size = output.seek(0, os.SEEK_END)
        output.seek(max(0, size - MOST_READ))
        return Done(code, output.read().decode("utf-8", errors="replace"))


def last_words(done: Done) -> str:
    """The last line of what a process said."""
    lines = [line.strip() for line in done.said.splitlines()]
    said = [line for line in lines if line]
    return said[-1][:200] if said else "it said nothing"


# --- S8: import -----------------------------------------------------------------------------------


def check_import(case: Case) -> Check:
    """S8, second half: the script imports on a CPU, the GPU hidden, and leaves nothing behind."""
    problems = Problems()
    with tempfile.TemporaryDirectory(prefix="record_check_") as here:
        command = [*confined(), sys.executable, "-c", IMPORT, str(case.folder.script)]
        env = clean_environment(CUDA_VISIBLE_DEVICES="")
        try:
            done = execute(command, Path(here), env, IMPORT_SECONDS)
        except NotHere as reason:
            problems.fail(f"importing on a CPU: {reason}")
            return problems.outcome("S8", "")
        left = sorted(path.name for path in Path(here).iterdir())
    missing = re.search(r"No module named '(\w+)", done.said)
    if missing and missing[1].lower() in _required(case):
        problems.skip(
            f"importing on a CPU: {missing[1]}, which requirements.txt or the contest's image has, "
            "is not installed here"
        )
    elif done.code:
        problems.fail(f"importing on a CPU fails: {last_words(done)}")
    elif left:
        problems.warn(f"importing it writes {', '.join(left)}")
    return problems.outcome("S8", "it imports on a CPU and leaves nothing behind")


def _required(case: Case) -> set[str]:
    """The packages of requirements.txt and of the contest's image, spelled as modules."""
    names = (re.split(r"[=<>~!\[ @]", line)[0] for line in case.folder.requirements)
    return {*IMAGE, *(name.replace("-", "_").lower() for name in names)}


# --- what a re-run needs --------------------------------------------------------------------------


def require_runnable(case: Case) -> None:
    """Raises NotHere unless the script can be re-scored here.

    It must have this project's modes, and its runs must have been made on a device that is here.
    """
    if not case.may_run:
        raise NotHere("running the script was not asked for")
    if case.folder.script is None:
        raise NotHere("there is no script")
    if not {"MODE", "ARTIFACT", "OUT_DIR"} <= case.declared.keys():
        raise NotHere(
            "the script declares no MODE, ARTIFACT and OUT_DIR; only its author knows how to "
            "re-score it"
        )
    if not case.ours or not case.ours[0].result.get("settings"):
        raise NotHere("the logs hold no result with settings")
    machine = case.ours[0].result.get("machine", {})
    if machine.get("type") == "cuda" and not torch.cuda.is_available():
        raise NotHere(f"the runs were made on {machine.get('device')}, here is no GPU")


@dataclasses.dataclass(frozen=True)
class Sandbox:
    """An empty folder with the script alone, and settings that lead it to the wished shards."""

    root: Path
    settings: Mapping[str, str]

    @property
    def script(self) -> Path:
        return self.root / "run" / "train_gpt.py"

    @property
    def report(self) -> Path:
        """Where the watch writes what it refused."""
        return self.root / "refused"

    @property
    def refused(self) -> str:
        """The first event that the watch refused; empty if there was none."""
        lines = self.report.read_text().splitlines() if self.report.is_file() else []
        return lines[0] if lines else ""

    def watched(self, mark: str, *until: str) -> list[str]:
        """The command that runs the script under watch: no path that contains mark, no network."""
        watch = [*confined(), sys.executable, str(WATCH), str(self.report), mark]
        return [*watch, str(self.script), *until]

    def run(self, command: Sequence[str], limit: float, **settings: str) -> Done:
        env = clean_environment(**{**settings, **self.settings})
        return execute(command, self.root / "here", env, limit)


@contextlib.contextmanager
def sandbox(
    case: Case,
    splits: Sequence[str],
    script: Path | None = None,
    validation: np.ndarray | None = None,
) -> Iterator[Sandbox]:
    """A sandbox with the shards of these splits. Raises NotHere if data or tokenizer are not.

    script: another one than the folder's; validation: tokens that stand for the validation shards.
    """
    data = case.located("DATA_PATH")
    if data is None:
        raise NotHere(f"DATA_PATH={case.settings.get('DATA_PATH')!r} is not here; --data names it")
    named = case.settings.get("TOKENIZER_PATH")
    tokenizer = case.located("TOKENIZER_PATH")
    if tokenizer is None and named != "byte260":
        raise NotHere(f"TOKENIZER_PATH={named!r} is not here")
    with tempfile.TemporaryDirectory(prefix="record_check_") as name:
        root = Path(name)
        for folder in ("here", "data", "run"):
            (root / folder).mkdir()
        for split in splits:
            for path in data.glob(shard_name(split)):
                (root / "data" / path.name).symlink_to(path.resolve())
        if validation is not None:
            place_validation(root / "data", validation, case)
        settings = {
            "DATA_PATH": str(root / "data"),
            "OUT_DIR": str(root / "out"),
            "TOKENIZER_PATH": str(tokenizer.resolve()) if tokenizer else "byte260",
            "DEVICE": case.settings.get("DEVICE", "auto"),
            "SAMPLE_TOKENS": "0",
        }
        if case.transform:
            settings["CASE_TRANSFORM"] = case.transform
        box = Sandbox(root, settings)
        shutil.copy(script or case.folder.script, box.script)
        yield box


def place_validation(folder: Path, tokens: np.ndarray, case: Case) -> None:
    """Writes tokens as the validation shard, and what they are charged if a side file must say."""
    write_shard(folder / shard_name("val", 0), tokens)
    if case.transform:
        if case.table is None:
            raise NotHere("the first run's tokenizer is not here")
        charges = np.concatenate(([0], case.table.count(tokens)))
        write_shard(folder / shard_name(CHARGES, 0), charges)


# --- R12: training without validation -------------------------------------------------------------


def check_validation_free_training(case: Case) -> Check:
    """R12: training writes an artifact without validation shards; it opens none if there are."""
    require_runnable(case)
    problems = Problems()
    for splits in (["train"], ["train", "val"]):
        with sandbox(case, splits) as box:
            _train_shortly(case, box, problems)
    told = "two training steps and packing need no validation shard and open none"
    return problems.outcome("R12", told)


def _given(case: Case) -> dict[str, str]:
    """What the first run was given of its training, without what could not act: it is refused."""
    overrides = case.ours[0].result.get("overrides")
    settings = of_training(overrides if isinstance(overrides, dict) else case.settings)
    values, _ = read_settings(settings)
    given = {name.upper(): value for name, value in values.items()}
    idle = idle_names(given, filled(values))
    return {name: text for name, text in settings.items() if name not in idle}


def _train_shortly(case: Case, box: Sandbox, problems: Problems) -> None:
    short = dict(ITERATIONS="2", WARMUP_STEPS="0", VAL_LOSS_EVERY="0", VAL_TOKENS="256")
    settings = {**_given(case), **short}
    done = box.run(box.watched("fineweb_val", "artifact"), TRAINING_SECONDS, **settings)
    present = any(shards_in(box.root / "data", "val"))
    if box.refused:
        problems.fail(f"training {box.refused} before the artifact was written")
    elif not (box.root / "out" / "model.ptz").is_file():
        problems.fail(
            f"no artifact after a short training {'with' if present else 'without'} validation "
            f"shards ({last_words(done)})"
        )
