"""Makes or collects the runs of a record: one script, one configuration, several seeds.

Every seed runs in a process of its own from one snapshot of script and settings, in a folder of
work where what is finished stays: interrupted, the same call goes on after the last finished seed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tool import ROOT
from tool.case import RUN_SETTINGS
from tool.finding import shown
from tool.folder import config_text, parse_config
from tool.preflight import Preflight
from tool.rerun import dies_with_parent, launcher
from tool.strip import readable_of, wrap_stripped
from tool.wrapper import unpack_source, wrap
from train_gpt import (
    AUDIT_FAILED,
    DIVERGED,
    OUT_OF_MEMORY,
    OVER_SIZE,
    OVER_TIME,
    SETTING_NAMES,
    atomic_write,
    sha256,
)

GRACE_SECONDS = 60.0  # for a training to write its checkpoint
SNAPSHOT = ("train_gpt.py", "train_gpt.readable.py", "config.env")  # what a record may hold of it
LOCK = Path(tempfile.gettempdir()) / "parameter_golf.lock"
FINISHED = ("finished", "wallclock_cap")
# Exit codes of a run that ends like this every time.
OWN_FAULTS = (OVER_SIZE, OUT_OF_MEMORY, DIVERGED, OVER_TIME, AUDIT_FAILED)
LOOKED_AT = 200  # commits of the script, the newest, that may have been the one that ran
# Settings that are not copied into a collected config.env.
LEFT_OUT = RUN_SETTINGS - {"DEVICE"}


class RecordError(Exception):
    """Something given to the tool is unusable, or a run failed; the message names it."""


@dataclasses.dataclass(frozen=True)
class Order:
    """What is to be run, or collected."""

    work: Path  # where the snapshot and the runs are kept
    script: Path
    config: Path | None  # None: the script's defaults
    seeds: Sequence[int]
    packed: bool = False  # run one self-extracting script with the settings inside
    nproc: int = 1  # processes (GPUs) a run
    track: str = ""
    wait: bool = False  # for another timed run on this machine, instead of refusing
    strip: bool = False  # with packed: without comments and docstrings


def read_text(path: Path) -> str:
    """A file that was named to the tool."""
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path}: cannot be read ({error})") from None


def short_config(path: Path | None) -> str:
    """The lines of a config.env without comments and blank lines; empty for None."""
    return config_text(parse_config(read_text(path))) if path else ""


def packed_text(script: Path, config: Path | None, strip: bool) -> str:
    """A script with its settings as one self-extracting script."""
    pack = wrap_stripped if strip else wrap
    try:
        return pack(read_text(script), short_config(config))
    except ValueError as error:
        raise RecordError(f"{script}: {error}") from None


def read_result(out: Path) -> dict[str, Any]:
    """A run's result.json; empty if there is none."""
    try:
        found = json.loads((out / "result.json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def results_below(places: Iterable[Path], pattern: str) -> list[Path]:
    """The folders of runs, wherever a result.json fits the pattern."""
    return sorted({path.parent for place in places for path in place.glob(pattern)})


# --- making ---------------------------------------------------------------------------------------


class Held:
    """A lock on a file, held from the start; RecordError if another process has it.

    A training inherits it: while one lives on after its caller was killed, the lock is not free.
    The file names the process that took it; if that is gone, the end of its training is awaited.
    """

    def __init__(self, path: Path, wait: bool, complaint: str):
        self.file = open(path, "a+")
        deadline = time.monotonic() + (math.inf if wait else 2 * GRACE_SECONDS)
        while not self._taken():
            if time.monotonic() > deadline or (not wait and self._holder_lives()):
                self.file.close()
                raise RecordError(f"{path.name}: {complaint}")
            time.sleep(0.1)
        os.set_inheritable(self.file.fileno(), True)
        self.file.truncate(0)
        self.file.write(str(os.getpid()))
        self.file.flush()

    def _taken(self) -> bool:
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _holder_lives(self) -> bool:
        """Whether the process that took the lock is there; yes if it has not said which it is."""
        self.file.seek(0)
        try:
            os.kill(int(self.file.read()), 0)
        except ProcessLookupError:
            return False
        except (ValueError, OSError):
            return True
        return True

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()


def machine_lock(wait: bool) -> Held:
    """Keeps two timed runs off one machine."""
    return Held(LOCK, wait, "another timed run is using this machine; wait for it, or --wait")


def work_lock(work: Path) -> Held:
    """Keeps two calls for one record apart, from the first run to the finished folder."""
    return Held(work / "lock", False, f"another call makes the record of {work}")


def take_snapshot(order: Order) -> None:
    """The script and settings that every seed runs; that of earlier runs must be the same."""
    source = read_text(order.script)
    files = {"train_gpt.py": source}
    if order.packed:
        files["train_gpt.py"] = packed_text(order.script, order.config, order.strip)
        if order.strip:
            files["train_gpt.readable.py"] = source
    elif short_config(order.config):
        files["config.env"] = read_text(order.config)
    begun = any(order.work.glob("seed_*"))
    for name in SNAPSHOT:
        path = order.work / name
        found = path.read_bytes() if path.is_file() else None
        wanted = files[name].encode() if name in files else None
        if begun and found != wanted:
            raise RecordError(
                f"{path}: left by runs of another {name}, or without --packed or --strip; take "
                f"another NAME, or move {order.work} away"
            )
        if wanted is None:
            path.unlink(missing_ok=True)
        else:
            atomic_write(path, wanted)


def is_finished(out: Path, script_hash: str, seed: int) -> bool:
    """Whether a folder holds a whole, successful run of this script with this seed."""
    result = read_result(out)
    ended_well = result.get("exit_code") == 0 and result.get("status") in FINISHED
    same = result.get("code_sha256") == script_hash and result.get("seed") == seed
    whole = all((out / name).is_file() for name in ("model.ptz", "train.log"))
    return ended_well and same and whole


def set_aside(out: Path) -> None:
    """Keeps a failed or interrupted attempt: every run that was made stays on the list."""
    if out.is_dir() and any(path.name != ".lock" for path in out.iterdir()):
        number = 1 + len(list(out.parent.glob(f"{out.name}.attempt*")))
        out.rename(out.with_name(f"{out.name}.attempt{number}"))


def end_group(process: subprocess.Popen) -> None:
    """Ends a process and all that it started: first asked to (a training writes its checkpoint)."""
    try:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    finally:  # its time is over, or somebody interrupts a second time
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_to_its_end(command: Sequence[str], cwd: Path, env: Mapping[str, str]) -> int:
    """A command's exit code. It never outlives this process, however that ends.

    Interrupted, this process ends it; killed, the system does (setpriv, on Linux). It holds the
    locks of this process too.
    """
    command = [*dies_with_parent("TERM"), *command]
    process = None
    try:
        with interrupts_deferred():
            process = subprocess.Popen(
                command, cwd=cwd, env=env, start_new_session=True, close_fds=False
            )
        return process.wait()
    except BaseException:
        if process is not None:
            end_group(process)
        raise


@contextlib.contextmanager
def interrupts_deferred() -> Iterator[None]:
    """A signal that would end this process waits until the block is done."""
    seen = []
    handlers = {}
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        handlers[number] = signal.signal(number, lambda *signalled: seen.append(signalled))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if seen:
        raise KeyboardInterrupt


def run_seed(order: Order, seed: int) -> None:
    """One seed in a process of its own, its output passed on. RecordError if it fails."""
    out = order.work / f"seed_{seed}"
    set_aside(out)
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "SEED": str(seed), "OUT_DIR": out.name}
    command = [*launcher(order.nproc), "train_gpt.py"]
    code = run_to_its_end(command, order.work, env)
    if code or not is_finished(out, sha256(order.work / "train_gpt.py"), seed):
        code = read_result(out).get("exit_code") or code  # torchrun's own is 1 whatever happened
        further = "The same command goes on"
        if code in OWN_FAULTS:
            further = "It would end like this again: other settings need another NAME"
        raise RecordError(
            f"seed {seed} ended with exit code {code}; see {out / 'train.log'}. "
            f"Nothing was recorded; the finished seeds are kept. {further}"
        )


def look_ahead(order: Order) -> None:
    """Says what may be wrong with the snapshot; RecordError if it can never become a record."""
    found = Preflight(order.work, order.track, len(order.seeds), order.nproc)
    if found.problems:
        problems = "\n".join(map(shown, found.problems))
        raise RecordError(f"{problems}\nno record can come of this; nothing was started")
    for sentence in found.warnings:
        print(f"warning: {shown(sentence)}", file=sys.stderr, flush=True)


def make_runs(order: Order) -> list[Path]:
    """Runs what is not finished yet. Returns the output folder of every seed."""
    given = sorted(os.environ.keys() & SETTING_NAMES)
    if given:
        raise RecordError(
            f"{', '.join(given)}: set in the environment, would not be in the record; "
            "put it into --config"
        )
    outs = []
    with machine_lock(order.wait):
        take_snapshot(order)
        look_ahead(order)
        script = sha256(order.work / "train_gpt.py")
        for seed in order.seeds:
            outs.append(order.work / f"seed_{seed}")
            if is_finished(outs[-1], script, seed):
                print(f"seed {seed}: finished earlier, kept")
            else:
                run_seed(order, seed)
    return outs


# --- collecting -----------------------------------------------------------------------------------


def collect_runs(order: Order, places: Sequence[Path]) -> list[Path]:
    """Finished runs in or right below the given folders, of one script, all or of some seeds.

    Their script and settings become the snapshot.
    """
    chosen = []
    for out in sorted(
        {*results_below(places, "result.json"), *results_below(places, "*/result.json")}
    ):
        if not order.seeds or read_result(out).get("seed") in order.seeds:
            chosen.append(out)
    if not chosen:
        seeds = f" and seed {order.seeds}" if order.seeds else ""
        raise RecordError(f"{', '.join(map(str, places))}: no run with a result.json{seeds}")
    script = sha256(order.script)
    for out in chosen:
        result = read_result(out)
        seed = result.get("seed")
        if not isinstance(seed, int) or not is_finished(out, script, seed):
            told = ("status", "exit_code", "seed", "code_sha256")
            found = ", ".join(f"{name} {shown(result.get(name), 12)}" for name in told)
            raise RecordError(
                f"{out}: not a finished run of {order.script} ({found}; here {script[:12]})"
            )
    atomic_write(order.work / "train_gpt.py", order.script.read_bytes())
    layers = unpack_source(read_text(order.script))[1]
    copy = readable_of(order.script)
    if layers and copy.is_file():
        atomic_write(order.work / "train_gpt.readable.py", copy.read_bytes())
    else:
        (order.work / "train_gpt.readable.py").unlink(missing_ok=True)
    if not layers:
        config = collected_config(chosen[0], order.config)
        atomic_write(order.work / "config.env", config.encode())
    return chosen


def collected_config(out: Path, given: Path | None) -> str:
    """The settings of a finished run.

    The given file, else the config.env the run had beside it, else its overrides.
    """
    beside = out.parent / "config.env"
    if given or beside.is_file():
        return read_text(given or beside)
    overrides = read_result(out).get("overrides", {})
    return config_text({name: text for name, text in overrides.items() if name not in LEFT_OUT})


# --- all runs -------------------------------------------------------------------------------------


def all_runs(outs: Sequence[Path], places: Iterable[Path]) -> list[dict[str, Any]]:
    """Every run of this script with these settings that left a result, in the record or not."""
    included = {out.resolve() for out in outs}
    first = read_result(outs[0])
    found = []
    for out in results_below({place.resolve() for place in places}, "**/result.json"):
        result = read_result(out)
        if result.get("mode") == "train" and _same_program(result, first):
            found.append(
                {
                    "seed": result.get("seed"),
                    "status": result.get("status"),
                    "exit_code": result.get("exit_code"),
                    "run": out.name,
                    "val_bpb": result.get("result", {}).get("val_bpb"),
                    "included": out in included,
                }
            )
    return sorted(found, key=_listing_order)


def _same_program(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(one.get(key) == other[key] for key in ("code_sha256", "config_sha256"))


def _listing_order(row: Mapping[str, Any]) -> tuple[bool, int, str]:
    return (not row["included"], row["seed"], row["run"])


def commit_of(code_sha256: str) -> str | None:
    """The newest commit here that made train_gpt.py the script that ran, of the last LOOKED_AT."""

    def said(*command: str) -> bytes:
        git = ["git", "-C", str(ROOT), *command]
        return subprocess.run(git, capture_output=True, timeout=60, check=True).stdout

    with contextlib.suppress(OSError, subprocess.SubprocessError):  # no git, or no repository
        commits = said("log", "--format=%H", f"-n{LOOKED_AT}", "--", "train_gpt.py")
        for commit in commits.decode().split():
            script = said("show", f"{commit}:train_gpt.py")
            if hashlib.sha256(script).hexdigest() == code_sha256:
                return commit
    return None
