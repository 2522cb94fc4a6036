"""From a run to a submission.

    python records/record.py new NAME --track cpu_1mb --config my/config.env --seeds 42,1337,2024
    python records/record.py new NAME --track 10min_16mb --config my/config.env \\
        --seeds 42,1337,2024 --nproc 8
    python records/record.py new NAME --track 10min_16mb \\
        --collect logs/my_runs     # finished runs, no new ones
    python records/record.py check records/track_cpu_1mb/2026-11-23_NAME
    python records/record.py compare old/folder new/folder
    python records/record.py pack train_gpt.py --config my/config.env -o packed.py

`new` runs every seed from one snapshot of script and settings, assembles the folder, checks it, and
only then puts it under records/. Interrupted, the same command goes on after the last finished
seed. `check` executes the folder's script (--no-run: it does not) and ends with 0 if nothing
failed, else 1; 64 means that a given input was unusable.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import filelock

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]
import pages  # noqa: E402
from checks import CHECKS, RUN_SETTINGS, Case, guarded  # noqa: E402
from compare import compare, describe, load_sample  # noqa: E402
from report import Finding, as_json, render, worst_verdict  # noqa: E402
from rerun import RERUNS, import_check, launcher  # noqa: E402
from runs import Folder, config_text, parse_config  # noqa: E402
from source import unpack_source, wrap  # noqa: E402
from static_checks import static_checks  # noqa: E402
from submission import summarize  # noqa: E402

import train_gpt  # noqa: E402
from train_gpt import sha256  # noqa: E402

OK, FAILED, BAD_INPUT = 0, 1, 64
LOCK = Path(tempfile.gettempdir()) / "parameter_golf.lock"
FINISHED = ("finished", "wallclock_cap")


class RecordError(Exception):
    """Something given to the tool is unusable, or a run failed; the message names it."""


# --- pack -----------------------------------------------------------------------------------------


def short_config(text: str) -> str:
    """A config.env without comments and blank lines."""
    return config_text(parse_config(text))


def command_pack(args: argparse.Namespace) -> int:
    source = read_text(args.file)
    config = short_config(read_text(args.config)) if args.config else ""
    out = args.output or args.file.with_suffix(".packed.py")
    wrapper = wrap(source, config)
    train_gpt.atomic_write(out, wrapper.encode())
    print(
        f"{args.file}: {len(source.encode())} "
        f"bytes{f' + {len(config.encode())} of settings' if config else ''} -> {out}: "
        f"{len(wrapper.encode())} bytes; unpacks to the same bytes (sha256 "
        f"{sha256(args.file)[:16]})"
    )
    return OK


def read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path}: cannot be read ({error})") from None


# --- check ----------------------------------------------------------------------------------------


def run_settings(folder: Folder) -> dict[str, str] | None:
    """Settings in effect as the first log has them, without those that only say where and how."""
    told = next((run.settings for run in folder.runs if run.settings), None)
    return (
        None
        if told is None
        else {name: text for name, text in told.items() if name not in RUN_SETTINGS}
    )


def check_folder(path: Path, data: Path | None = None, may_run: bool = True) -> list[Finding]:
    """All findings on a record folder, packaging first, then source, then re-running."""
    case = Case(Folder(path), data, may_run)
    folder = case.folder
    findings = [guarded(name, check, case) for name, check in CHECKS.items()]
    if folder.script is None:
        return findings
    siblings = [p.name for p in folder.files if p.parent == folder.path and p != folder.script]
    static = static_checks(
        folder.source[0],
        requirements=folder.requirements,
        siblings=siblings,
        run_settings=run_settings(folder),
        config=folder.config,
    )
    imported = import_check(case)
    findings += [
        imported if imported and (finding.id, finding.verdict) == ("S8", "PASS") else finding
        for finding in static
    ]
    return findings + [guarded(name, check, case) for name, check in RERUNS.items()]


def command_check(args: argparse.Namespace) -> int:
    try:
        findings = check_folder(args.folder, args.data, not args.no_run)
    except FileNotFoundError as error:
        raise RecordError(str(error)) from None
    print(as_json(findings, folder=args.folder.name) if args.json else render(findings))
    return FAILED if worst_verdict(findings) == "FAIL" else OK


# --- compare --------------------------------------------------------------------------------------


def command_compare(args: argparse.Namespace) -> int:
    try:
        found = compare(load_sample(args.old), load_sample(args.new))
    except (ValueError, FileNotFoundError) as error:
        raise RecordError(str(error)) from None
    print(json.dumps(found, indent=1) if args.json else describe(found))
    return OK


# --- new: the runs --------------------------------------------------------------------------------


def machine_lock(wait: bool) -> AbstractContextManager:
    """The lock, already held, that keeps two timed runs off one machine.

    The system frees it when its holder dies.
    """
    try:
        return filelock.FileLock(LOCK).acquire(timeout=-1 if wait else 0)
    except filelock.Timeout:
        raise RecordError(
            f"{LOCK.name}: another timed run is using this machine; wait for it, or --wait"
        ) from None


def start_work(work: Path, args: argparse.Namespace) -> None:
    """The snapshot of script and settings that every seed runs.

    An earlier snapshot must be the same.
    """
    config = short_config(read_text(args.config)) if args.config else ""
    source = read_text(args.script)
    files = {"train_gpt.py": wrap(source, config) if args.packed else source}
    if config and not args.packed:
        files["config.env"] = read_text(args.config)
    if "config.env" not in files and (work / "config.env").exists():
        raise RecordError(f"{work}: was begun with a config.env; take another NAME")
    for name, text in files.items():
        if (work / name).is_file() and (work / name).read_bytes() != text.encode():
            raise RecordError(
                f"{work / name}: left by runs of another {name}; take another NAME, or move {work} "
                "away"
            )
        train_gpt.atomic_write(work / name, text.encode())


def read_result(out: Path) -> dict[str, Any]:
    try:
        return json.loads((out / "result.json").read_text())
    except (OSError, ValueError):
        return {}


def is_finished(out: Path, script_hash: str, seed: int) -> bool:
    """Whether a folder holds a whole, successful run of this script with this seed."""
    result = read_result(out)
    return (
        result.get("exit_code") == 0
        and result.get("status") in FINISHED
        and result.get("code_sha256") == script_hash
        and result.get("seed") == seed
        and (out / "model.ptz").is_file()
        and (out / "train.log").is_file()
    )


def set_aside(out: Path) -> None:
    """Keeps a failed or interrupted attempt: every run that was made stays on the list."""
    if (out / "train.log").is_file():
        number = 1 + sum(1 for p in out.parent.glob(f"{out.name}.attempt*"))
        out.rename(out.with_name(f"{out.name}.attempt{number}"))


def run_seed(work: Path, seed: int, nproc: int) -> None:
    """One seed in a process of its own, its output passed on. RecordError if it fails."""
    out = work / f"seed_{seed}"
    set_aside(out)
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "SEED": str(seed), "OUT_DIR": out.name}
    done = subprocess.run([*launcher(nproc), "train_gpt.py"], cwd=work, check=False, env=env)
    if done.returncode or not is_finished(out, sha256(work / "train_gpt.py"), seed):
        raise RecordError(
            f"seed {seed} ended with exit code {done.returncode}; see {out / 'train.log'}. "
            "Nothing was recorded; the finished seeds are kept, the same command goes on"
        )


def make_runs(work: Path, args: argparse.Namespace) -> list[Path]:
    """Runs what is not finished yet. Returns the output folder of every seed."""
    given = sorted(name for name in os.environ if name in train_gpt.FIELDS or name == "CONFIG")
    if given:
        raise RecordError(
            f"{', '.join(given)}: set in the environment, would not be in the record; "
            "put it into --config"
        )
    with machine_lock(args.wait):
        start_work(work, args)
        script = sha256(work / "train_gpt.py")
        for seed in args.seeds:
            if is_finished(work / f"seed_{seed}", script, seed):
                print(f"seed {seed}: finished earlier, kept")
            else:
                run_seed(work, seed, args.nproc)
    return [work / f"seed_{seed}" for seed in args.seeds]


def collect_runs(work: Path, args: argparse.Namespace) -> list[Path]:
    """Finished runs below the given folders, of one script.

    The settings come from their results.
    """
    outs = sorted(
        {
            p.parent
            for base in args.collect
            for p in [*base.glob("result.json"), *base.glob("*/result.json")]
        }
    )
    chosen = [out for out in outs if not args.seeds or read_result(out).get("seed") in args.seeds]
    if not chosen:
        raise RecordError(
            f"{', '.join(map(str, args.collect))}: no run with a result.json"
            + (f" and seed {args.seeds}" if args.seeds else "")
        )
    script = args.script
    for out in chosen:
        result = read_result(out)
        if not is_finished(out, sha256(script), result.get("seed")):
            raise RecordError(
                f"{out}: not a finished run of {script} (status {result.get('status')}, exit code "
                f"{result.get('exit_code')}, script sha256 {str(result.get('code_sha256'))[:12]}, "
                f"here {sha256(script)[:12]})"
            )
    train_gpt.atomic_write(work / "train_gpt.py", script.read_bytes())
    if unpack_source(read_text(script))[1] == 0:
        train_gpt.atomic_write(
            work / "config.env", collected_config(chosen[0], args.config).encode()
        )
    return chosen


def collected_config(out: Path, given: Path | None) -> str:
    """The settings of a finished run.

    The given file, else the config.env the run had beside it, else its overrides.
    """
    beside = out.parent / "config.env"
    if given or beside.is_file():
        return read_text(given or beside)
    overrides = read_result(out).get("overrides", {})
    return config_text(
        {name: text for name, text in overrides.items() if name not in RUN_SETTINGS - {"DEVICE"}}
    )


def all_runs(outs: Sequence[Path], places: Sequence[Path]) -> list[dict[str, Any]]:
    """Every run of this script with these settings that left a log, in the record or not."""
    first, found, included = read_result(outs[0]), [], {out.resolve() for out in outs}
    logs = sorted(
        {
            p.parent.resolve()
            for place in places
            if place.is_dir()
            for p in place.rglob("result.json")
        }
    )
    keys = ("code_sha256", "config_sha256")
    for out in logs:
        result = read_result(out)
        same = [result.get(key) for key in keys] == [first[key] for key in keys]
        if same and result.get("mode") == "train":
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
    return sorted(found, key=lambda row: (not row["included"], row["seed"], row["run"]))


# --- new: the folder ------------------------------------------------------------------------------


def commit_of(code_sha256: str) -> str | None:
    """The commit that is checked out here, if its train_gpt.py is the script that ran."""
    try:
        commit, script = (
            subprocess.run(
                ["git", "-C", str(ROOT), *command], capture_output=True, timeout=60, check=True
            ).stdout
            for command in (["rev-parse", "HEAD"], ["show", "HEAD:train_gpt.py"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    same = hashlib.sha256(script).hexdigest() == code_sha256
    return commit.decode().strip() if same else None


def assemble(draft: Path, work: Path, outs: Sequence[Path], args: argparse.Namespace) -> None:
    """Script, settings, logs, artifacts, requirements, JSON, README, plot into an empty folder."""
    for name in ("train_gpt.py", "config.env"):
        if (work / name).is_file():
            shutil.copy(work / name, draft / name)
    for out in outs:
        seed = read_result(out)["seed"]
        shutil.copy(out / "train.log", draft / f"train_seed{seed}.log")
        shutil.copy(out / "model.ptz", draft / f"model_seed{seed}.ptz")
    shutil.copy(ROOT / "requirements.txt", draft / "requirements.txt")
    folder = Folder(draft)
    first = folder.runs[0].result
    typed = {
        "author": args.author,
        "github_id": args.github_id,
        "name": args.name,
        "blurb": args.blurb,
        "date": args.date,
        "technique_summary": args.technique,
        "attribution": {},
        "track": args.track,
        "all_runs": all_runs(outs, [work, ROOT / "logs", *args.collect]),
        "matmul_gflops": pages.matmul_gflops() if first["machine"]["type"] == "cpu" else None,
        "commit": commit_of(first["code_sha256"]),
    }
    try:
        told = summarize(folder, typed)
    except (ValueError, KeyError) as error:
        raise RecordError(f"no record: {error}") from None
    train_gpt.atomic_write(draft / "submission.json", (json.dumps(told, indent=1) + "\n").encode())
    pages.draw(folder, draft / "curves.png")
    train_gpt.atomic_write(draft / "README.md", pages.readme(folder, told, args.nproc).encode())


def command_new(args: argparse.Namespace) -> int:
    if not (args.seeds or args.collect):
        raise RecordError("new: --seeds or --collect is needed")
    if args.collect and args.packed:
        raise RecordError(
            "--packed: finished runs ran the script as it is; `record.py pack` it and run that "
            "instead"
        )
    args.track = args.track.removeprefix("track_")
    final = args.records / f"track_{args.track}" / f"{args.date}_{args.name}"
    if final.exists():
        raise RecordError(f"{final}: exists already; take another NAME")
    work = args.work / f"{args.track}_{args.name}"
    work.mkdir(parents=True, exist_ok=True)
    outs = collect_runs(work, args) if args.collect else make_runs(work, args)
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{final.name}.", dir=final.parent) as name:
        draft = Path(name) / final.name
        draft.mkdir()
        assemble(draft, work, outs, args)
        findings = check_folder(draft, args.data, not args.no_run)
        print(render(findings))
        train_gpt.atomic_write(work / "check.json", as_json(findings, folder=final.name).encode())
        if worst_verdict(findings) == "FAIL":
            print(
                f"no record was made; the runs are in {work}, the report is {work / 'check.json'}"
            )
            return FAILED
        train_gpt.atomic_write(draft / "check.json", as_json(findings, folder=final.name).encode())
        draft.rename(final)
    print(f"{final}: complete the idea and the credits in README.md, then check again")
    return OK


# --- command line ---------------------------------------------------------------------------------


def seed_list(text: str) -> list[int]:
    seeds = [int(part) for part in text.split(",") if part.strip()]
    if not seeds or len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"{text!r}: expected different whole numbers with commas")
    return seeds


def record_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", text, re.A):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected letters, digits, dot, dash and underscore"
        )
    return text


def iso_date(text: str) -> str:
    try:
        return datetime.date.fromisoformat(text).isoformat()
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a date like 2026-01-31") from None


class Parser(argparse.ArgumentParser):
    """argparse with this project's exit code for bad input."""

    def error(self, message: str) -> None:
        raise RecordError(f"{self.format_usage()}{self.prog}: {message}")


def parser() -> Parser:
    top = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)
    new = commands.add_parser("new", help="make a record folder from runs")
    new.set_defaults(call=command_new)
    new.add_argument("name", metavar="NAME", type=record_name)
    new.add_argument(
        "--track",
        required=True,
        help="folder records/track_<this>: 10min_16mb, non_record_16mb, cpu_1mb, ...",
    )
    new.add_argument(
        "--config", type=Path, help="file of NAME=value lines; empty = the script's defaults"
    )
    new.add_argument("--seeds", type=seed_list, default=[], help="42,1337,2024")
    new.add_argument(
        "--collect",
        type=Path,
        nargs="+",
        default=[],
        help="folders of finished runs instead of new ones",
    )
    new.add_argument("--script", type=Path, default=ROOT / "train_gpt.py")
    new.add_argument("--nproc", type=int, default=1, help="processes (GPUs) a run")
    new.add_argument(
        "--packed",
        action="store_true",
        help="ship one self-extracting script with the settings inside",
    )
    new.add_argument(
        "--wait", action="store_true", help="wait while another timed run uses the machine"
    )
    for option in ("author", "github-id", "blurb", "technique"):
        new.add_argument(f"--{option}", default="")
    new.add_argument("--date", type=iso_date, default=datetime.date.today().isoformat())
    new.add_argument("--records", type=Path, default=HERE, help="where the track folders are")
    new.add_argument(
        "--work", type=Path, default=ROOT / "logs" / "records", help="where runs are kept"
    )
    check = commands.add_parser("check", help="check a record folder, ours or other people's")
    check.set_defaults(call=command_check)
    check.add_argument("folder", type=Path)
    check.add_argument("--json", action="store_true")
    for command in (new, check):
        command.add_argument(
            "--data", type=Path, help="folder of shards, if the logged DATA_PATH is not here"
        )
        command.add_argument(
            "--no-run", action="store_true", help="execute nothing: R6, R10, R12 are skipped"
        )
    against = commands.add_parser("compare", help="is NEW better than OLD?")
    against.set_defaults(call=command_compare)
    against.add_argument("old", type=Path)
    against.add_argument("new", type=Path)
    against.add_argument("--json", action="store_true")
    pack = commands.add_parser("pack", help="wrap a script with lzma and base85")
    pack.set_defaults(call=command_pack)
    pack.add_argument("file", type=Path)
    pack.add_argument("--config", type=Path, help="settings to put inside")
    pack.add_argument("-o", "--output", type=Path)
    return top


def main(argv: Sequence[str]) -> int:
    try:
        args = parser().parse_args(argv)
        return args.call(args)
    except (RecordError, train_gpt.InputError) as error:
        print(error, file=sys.stderr)
        return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
