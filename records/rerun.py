"""The checks that run the shipped script.

Import (S8), fresh process (R6), determinism (R10), val-free training (R12). They execute the
folder's code. All runs happen in empty temporary folders, without network, one after another.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from checks import RUN_SETTINGS, Case
from report import Finding, gather
from runs import Run
from source import declared_settings

HOOKED = Path(__file__).with_name("hooked.py")
TOLERANCE = 1e-6  # nats, rules R6
ALWAYS_SET = ("PATH", "HOME", "LD_LIBRARY_PATH", "LANG", "TMPDIR", "SYSTEMROOT", "OMP_NUM_THREADS")


class NotHere(Exception):
    """A check cannot be made on this machine; the message says why."""


def clean_environment(**settings: str) -> dict[str, str]:
    """The least environment a run needs, and the given settings."""
    return {
        **{name: os.environ[name] for name in ALWAYS_SET if name in os.environ},
        "PYTHONDONTWRITEBYTECODE": "1",
        **settings,
    }


def launcher(world: int) -> list[str]:
    """The command a script's name goes behind: this Python, or torchrun with several processes."""
    if world == 1:
        return [sys.executable]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, f"--nproc_per_node={world}"]


def execute(
    command: list[str], cwd: Path, env: Mapping[str, str], limit: float
) -> subprocess.CompletedProcess:
    """Runs to the end or to the time limit; raises NotHere when it takes longer."""
    try:
        return subprocess.run(
            command,
            cwd=cwd,
            env=dict(env),
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise NotHere(f"not finished after {limit:.0f} s on this machine") from None


def last_words(done: subprocess.CompletedProcess) -> str:
    """The last line of what a process said."""
    lines = [
        line.strip() for line in (done.stdout + "\n" + done.stderr).splitlines() if line.strip()
    ]
    return lines[-1][:200] if lines else "it said nothing"


@contextlib.contextmanager
def sandbox(case: Case, val: bool, train: bool) -> Iterator[tuple[Path, dict[str, str]]]:
    """An empty folder with the script alone, and the settings that lead it to the wished shards."""
    data, tokenizer = case.located("DATA_PATH"), case.located("TOKENIZER_PATH")
    settings = case.ours[0].settings or {}
    if data is None:
        raise NotHere(f"DATA_PATH={settings.get('DATA_PATH')!r} is not here; --data names it")
    if tokenizer is None and settings.get("TOKENIZER_PATH") != "byte260":
        raise NotHere(f"TOKENIZER_PATH={settings.get('TOKENIZER_PATH')!r} is not here")
    with tempfile.TemporaryDirectory(prefix="record_check_") as name:
        root = Path(name)
        for folder in ("here", "data", "run"):
            (root / folder).mkdir()
        for split, wanted in (("val", val), ("train", train)):
            for path in sorted(data.glob(f"fineweb_{split}_*.bin")) if wanted else []:
                (root / "data" / path.name).symlink_to(path.resolve())
        shutil.copy(case.folder.script, root / "run" / "train_gpt.py")
        yield (
            root,
            dict(
                DATA_PATH=str(root / "data"),
                OUT_DIR=str(root / "out"),
                TOKENIZER_PATH=str(tokenizer.resolve()) if tokenizer else "byte260",
            ),
        )


def require_runnable(case: Case) -> None:
    """Raises NotHere unless the script can be re-scored here.

    It must have this project's modes, and its runs must have been made on a device that is here.
    """
    if not case.may_run:
        raise NotHere("running the script was not allowed (--no-run)")
    if case.folder.script is None:
        raise NotHere("there is no script")
    try:
        names = declared_settings(ast.parse(case.folder.source[0]))
    except SyntaxError:
        raise NotHere("the script does not parse") from None
    if not {"MODE", "ARTIFACT", "OUT_DIR"} <= names.keys():
        raise NotHere(
            "the script declares no MODE, ARTIFACT and OUT_DIR; only its author knows how to "
            "re-score it"
        )
    if not case.ours or not case.ours[0].result.get("settings"):
        raise NotHere("the logs hold no result with settings")
    machine = case.ours[0].result.get("machine", {})
    if machine.get("type") == "cuda" and not torch.cuda.is_available():
        raise NotHere(f"the runs were made on {machine.get('device')}, here is no GPU")


def import_check(case: Case) -> Finding | None:
    """S8, second half: the script imports on a CPU, the GPU hidden, and leaves nothing behind."""
    if not case.may_run or case.folder.script is None:
        return None
    code = (
        "import importlib.util as u, sys; s = u.spec_from_file_location('shipped', sys.argv[1]); "
        "m = u.module_from_spec(s); sys.modules['shipped'] = m; s.loader.exec_module(m)"
    )
    with tempfile.TemporaryDirectory(prefix="record_check_") as here:
        try:
            done = execute(
                [sys.executable, "-c", code, str(case.folder.script)],
                Path(here),
                clean_environment(CUDA_VISIBLE_DEVICES=""),
                180,
            )
        except NotHere as reason:
            return Finding("S8", "FAIL", f"importing on a CPU: {reason}")
        left = sorted(p.name for p in Path(here).iterdir())
    missing = re.search(r"No module named '(\w+)", done.stderr)
    wanted = {
        re.split(r"[=<>~!\[ @]", line)[0].replace("-", "_").lower()
        for line in case.folder.requirements
    }
    if missing and missing[1].lower() in wanted:
        return Finding(
            "S8",
            "SKIPPED",
            f"importing on a CPU: {missing[1]}, which requirements.txt names, "
            "is not installed here",
        )
    if done.returncode:
        return Finding("S8", "FAIL", f"importing on a CPU fails: {last_words(done)}")
    return Finding("S8", "WARN", f"importing it writes {', '.join(left)}") if left else None


def rescore(case: Case, run: Run, world: int = 1) -> tuple[dict, str]:
    """The result of scoring a run's artifact alone in a fresh process; what the watch refused."""
    artifact = case.folder.artifact(run)
    if artifact is None:
        raise NotHere(f"the artifact of {run.name} is not in the folder")
    if case.validation is None:
        raise NotHere("the validation shards that were scored are not here")
    with sandbox(case, val=True, train=False) as (root, env):
        shutil.copy(artifact, root / "run" / "model.ptz")
        script, report = str(root / "run" / "train_gpt.py"), root / "refused"
        env = clean_environment(
            **env,
            MODE="eval",
            ARTIFACT=str(root / "run" / "model.ptz"),
            SAMPLE_TOKENS="0",
            DEVICE=(run.settings or {}).get("DEVICE", "auto"),
        )
        command = [
            *launcher(world),
            *([str(HOOKED), str(report), "fineweb_train"] if world == 1 else []),
            script,
        ]
        limit = 300 + 6 * run.result["seconds"]["wall"]
        done = execute(command, root / "here", env, limit)
        refused = report.read_text() if report.is_file() else ""
        result = root / "out" / "result.json"
        found = json.loads(result.read_text()) if result.is_file() else {}
    if "val_loss" not in found.get("result", {}) and not refused:
        return {"error": last_words(done), **found}, refused
    return found, refused


def r6_fresh_process(case: Case) -> Finding:
    """Script and artifact alone give the logged score.

    They are in an empty folder, without training shards and network.
    """
    try:
        require_runnable(case)
        problems, rows = [], {}
        for run in case.ours:
            found, refused = rescore(case, run)
            if refused:
                problems.append(("FAIL", f"{run.name}: scoring {refused.splitlines()[0]}"))
            elif "error" in found:
                problems.append(
                    ("FAIL", f"{run.name}: the artifact cannot be scored ({found['error']})")
                )
            else:
                gap = abs(found["result"]["val_loss"] - run.result["result"]["val_loss"])
                rows[run.name] = {"val_loss": found["result"]["val_loss"], "gap_nats": gap}
                if not gap <= TOLERANCE:
                    problems.append(
                        (
                            "FAIL",
                            f"{run.name}: a fresh process scores {found['result']['val_bpb']:.8f} "
                            f"bpb, logged are {run.result['result']['val_bpb']:.8f}",
                        )
                    )
        worst = max((row["gap_nats"] for row in rows.values()), default=0.0)
        return gather(
            "R6",
            problems,
            f"{len(rows)} artifacts score the same alone (largest gap {worst:.1g} nats)",
            runs=rows,
        )
    except NotHere as reason:
        return Finding("R6", "SKIPPED", str(reason))


def r10_determinism(case: Case) -> Finding:
    """The first artifact gives the same score with two processes."""
    try:
        require_runnable(case)
        run = case.ours[0]
        if run.result["machine"]["type"] == "cuda" and torch.cuda.device_count() < 2:
            raise NotHere("two processes need two GPUs")
        found, _ = rescore(case, run, world=2)
        if "error" in found:
            return Finding(
                "R10", "FAIL", f"{run.name}: two processes cannot score it ({found['error']})"
            )
        gap = abs(found["result"]["val_loss"] - run.result["result"]["val_loss"])
        verdict = "PASS" if gap <= TOLERANCE else "FAIL"
        return Finding(
            "R10",
            verdict,
            f"{run.name}: two processes differ from the logged score by {gap:.1g} nats",
            {"gap_nats": gap},
        )
    except NotHere as reason:
        return Finding("R10", "SKIPPED", str(reason))


def r12_validation_free_training(case: Case) -> Finding:
    """Training writes an artifact without validation shards, and opens none when they are there."""
    try:
        require_runnable(case)
        problems = []
        for present in (False, True):
            with sandbox(case, val=present, train=True) as (root, env):
                problems += _short_training(case, root, env, present)
        return gather(
            "R12", problems, "two training steps and packing need no validation shard and open none"
        )
    except NotHere as reason:
        return Finding("R12", "SKIPPED", str(reason))


def _short_training(
    case: Case, root: Path, env: dict[str, str], present: bool
) -> list[tuple[str, str]]:
    settings = {
        name: text
        for name, text in (case.ours[0].settings or {}).items()
        if name not in RUN_SETTINGS | {"DATA_PATH", "TOKENIZER_PATH"}
    }
    settings.update(
        env,
        ITERATIONS="2",
        WARMUP_STEPS="0",
        SCHEDULE="tokens",
        VAL_LOSS_EVERY="0",
        SAMPLE_TOKENS="0",
        VAL_TOKENS="256",
        DEVICE=(case.ours[0].settings or {}).get("DEVICE", "auto"),
    )
    report = root / "refused"
    done = execute(
        [
            sys.executable,
            str(HOOKED),
            str(report),
            "fineweb_val",
            str(root / "run" / "train_gpt.py"),
            "artifact",
        ],
        root / "here",
        clean_environment(**settings),
        900,
    )
    if report.read_text():
        return [
            (
                "FAIL",
                f"training {report.read_text().splitlines()[0]} before the artifact was written",
            )
        ]
    if not (root / "out" / "model.ptz").is_file():
        return [
            (
                "FAIL",
                f"no artifact after a short training {'with' if present else 'without'} validation "
                f"shards ({last_words(done)})",
            )
        ]
    return []


RERUNS: dict[str, Callable[[Case], Finding]] = {
    "R6": r6_fresh_process,
    "R10": r10_determinism,
    "R12": r12_validation_free_training,
}
