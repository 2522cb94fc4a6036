"""From a run to a submission.

    python records/record.py new NAME --track cpu_1mb --config my/config.env --seeds 42,1337,2024
    python records/record.py new NAME --track 10min_16mb --config my/config.env \\
        --seeds 42,1337,2024 --nproc 8
    python records/record.py new NAME --track 10min_16mb \\
        --collect logs/my_runs     # finished runs, no new ones
    python records/record.py check records/track_cpu_1mb/2026-11-23_NAME
    python records/record.py compare old/folder new/folder
    python records/record.py board records/track_cpu_1mb
    python records/record.py pack train_gpt.py --config my/config.env --strip -o packed.py

`new` runs every seed from one snapshot of script and settings, assembles the folder, checks it, and
only then puts it under records/. Interrupted, the same command goes on after the last finished
seed. `check` executes nothing of the folder unless --run says so. `board` ranks a track's entries,
in a table and a picture, where the track's page or the repository's has markers for them; with
--check it only says whether they are up to date. All end with 0 if nothing failed, else 1; 64 means
that a given input was unusable, 143 that a signal interrupted it.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import json
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tool import ROOT
from tool.arguments import Parser, positive
from tool.case import TRACKS, Case, Track
from tool.checks import check_case
from tool.finding import as_json, render, worst_verdict
from tool.folder import Folder
from tool.rerun import warning
from tool.runs import (
    SNAPSHOT,
    Order,
    RecordError,
    all_runs,
    collect_runs,
    commit_of,
    make_runs,
    packed_text,
    read_result,
    read_text,
    short_config,
    work_lock,
)
from tool.strip import readable_of
from tool.submission import Typed, summarize
from tool.wrapper import unpack_source

from train_gpt import BAD_INPUT, INTERRUPTED, OK, InputError, atomic_write

# What needs matplotlib or scipy is imported by the commands that use it, at their beginning: the
# others run where only train_gpt.py's own packages are.
FAILED = 1
RECORDS = Path(__file__).resolve().parent


# --- new ------------------------------------------------------------------------------------------


def assemble(draft: Path, work: Path, outs: Sequence[Path], args: argparse.Namespace) -> None:
    """Script, settings, logs, artifacts, requirements, JSON, README, plot into an empty folder."""
    from tool import page

    for name in SNAPSHOT:
        if (work / name).is_file():
            shutil.copy(work / name, draft / name)
    for out in outs:
        seed = read_result(out)["seed"]
        shutil.copy(out / "train.log", draft / f"train_seed{seed}.log")
        shutil.copy(out / "model.ptz", draft / f"model_seed{seed}.ptz")
    shutil.copy(ROOT / "requirements.txt", draft / "requirements.txt")
    folder = Folder(draft)
    first = folder.runs[0].result
    typed = Typed(
        author=args.author,
        github_id=args.github_id,
        name=args.name,
        blurb=args.blurb,
        date=args.date,
        technique_summary=args.technique,
        attribution={},
        track=args.track,
        all_runs=all_runs(outs, [work, ROOT / "logs", *args.collect]),
        matmul_gflops=page.matmul_gflops() if first["machine"]["type"] == "cpu" else None,
        commit=commit_of(first["code_sha256"]),
    )
    try:
        told = summarize(folder, typed)
    except (ValueError, KeyError) as error:
        raise RecordError(f"no record: {error}") from None
    atomic_write(draft / "submission.json", (json.dumps(told, indent=1) + "\n").encode())
    page.draw(folder, outs, draft / "curves.png")
    atomic_write(draft / "README.md", page.readme(folder, told, args.nproc).encode())


def command_new(args: argparse.Namespace) -> int:
    from tool import page  # noqa: F401  what the last step lacks is noticed before the first run

    if not (args.seeds or args.collect):
        raise RecordError("new: --seeds or --collect is needed")
    args.track = args.track.removeprefix("track_")
    if args.packed is None:
        args.packed = args.strip or packs_by_default(args)
    if args.strip and not args.packed:
        raise RecordError("--strip: only a packed script is stripped; without --no-packed")
    if args.collect and args.packed:
        given = "--strip" if args.strip else "--packed"
        raise RecordError(
            f"{given}: finished runs ran the script as it is; `record.py pack` it and run that "
            "instead"
        )
    return make_record(args)


def make_record(args: argparse.Namespace) -> int:
    """Runs or collects, then publishes, under the record's lock."""
    final = args.records / f"track_{args.track}" / f"{args.date}_{args.name}"
    if final.exists():
        raise RecordError(f"{final}: exists already; take another NAME")
    work = args.work / f"{args.track}_{args.name}"
    work.mkdir(parents=True, exist_ok=True)
    order = Order(
        work,
        args.script,
        args.config,
        args.seeds,
        args.packed,
        args.nproc,
        args.track,
        args.wait,
        args.strip,
    )
    with work_lock(work):
        outs = collect_runs(order, args.collect) if args.collect else make_runs(order)
        return publish(final, work, outs, args)


def packs_by_default(args: argparse.Namespace) -> bool:
    """Where code and model share one cap, a script that is not packed yet is."""
    track = TRACKS.get(args.track, Track())
    if args.collect or not track.total_bytes:
        return False
    return unpack_source(read_text(args.script))[1] == 0


def publish(final: Path, work: Path, outs: Sequence[Path], args: argparse.Namespace) -> int:
    """Assembles, checks, and gives the folder its name if nothing failed."""
    final.parent.mkdir(parents=True, exist_ok=True)
    for left in final.parent.glob(f".{final.name}.*"):  # by a call that was killed
        if "." not in left.name.removeprefix(f".{final.name}."):  # else another record's
            shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=f".{final.name}.", dir=final.parent) as name:
        draft = Path(name) / final.name
        draft.mkdir()
        assemble(draft, work, outs, args)
        findings = check_case(Case(Folder(draft), args.data, not args.no_run))
        print(render(findings))
        report = as_json(findings, folder=final.name).encode()
        atomic_write(work / "check.json", report)
        if worst_verdict(findings) == "FAIL":
            print(
                f"no record was made; the runs are in {work}, the report is {work / 'check.json'}"
            )
            return FAILED
        atomic_write(draft / "check.json", report)
        draft.rename(final)
    print(f"{final}: complete the idea and the credits in README.md, then check again")
    return OK


# --- check, compare, board, pack ------------------------------------------------------------------


def command_check(args: argparse.Namespace) -> int:
    case = Case(Folder(args.folder), args.data, args.run)
    if args.run and case.folder.script:
        print(warning(case), file=sys.stderr, flush=True)
    findings = check_case(case)
    print(as_json(findings, folder=args.folder.name) if args.json else render(findings))
    return FAILED if worst_verdict(findings) == "FAIL" else OK


def command_compare(args: argparse.Namespace) -> int:
    from tool.compare import compare, describe, load_sample

    try:
        found = compare(load_sample(args.old), load_sample(args.new))
    except ValueError as error:
        raise RecordError(str(error)) from None
    print(json.dumps(dataclasses.asdict(found), indent=1) if args.json else describe(found))
    return OK


def command_board(args: argparse.Namespace) -> int:
    from tool.board import files_of, read_board

    board = read_board(args.track)
    files, notes = files_of(board)
    for name in board.skipped:
        print(f"{name}: no submission.json, so no entry: skipped")
    for name, reason in board.refused.items():
        print(f"{name}: not ranked: {reason}")
    for note in notes:
        print(note)
    stale = {path: data for path, data in files.items() if content_of(path) != data}
    for path, data in stale.items():
        if args.check:
            print(f"{path}: not what the entries give; run the command without --check")
        elif data is None:
            path.unlink()
            print(f"{path}: taken away")
        else:
            atomic_write(path, data)
            print(f"{path}: written")
    print(f"entries ranked: {len(board.entries)}; files renewed or to renew: {len(stale)}")
    return FAILED if args.check and stale else OK


def content_of(path: Path) -> bytes | None:
    """None if there is no such file."""
    return path.read_bytes() if path.is_file() else None


def command_pack(args: argparse.Namespace) -> int:
    config = short_config(args.config)
    wrapper = packed_text(args.file, args.config, args.strip).encode()
    original = args.file.read_bytes()
    out = args.output or args.file.with_suffix(".packed.py")
    if out.exists() and out.samefile(args.file):
        raise RecordError(f"-o {out}: that is the script itself; name another file")
    how = f"unpacks to the same bytes (sha256 {hashlib.sha256(original).hexdigest()[:16]})"
    if args.strip:
        atomic_write(readable_of(out), original)
        how = f"the same program as {readable_of(out)} (syntax trees compared)"
    atomic_write(out, wrapper)
    inside = f" + {len(config.encode())} of settings" if config else ""
    print(f"{args.file}: {len(original)} bytes{inside} -> {out}: {len(wrapper)} bytes; {how}")
    return OK


# --- command line ---------------------------------------------------------------------------------


def seed_list(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    seeds = [int(part) for part in parts if part.isdecimal()]
    if not seeds or len(set(seeds)) < len(parts):
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


def parser() -> Parser:
    top = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)
    new = commands.add_parser("new", help="make a record folder from runs")
    new.set_defaults(call=command_new)
    add_arguments_of_new(new)
    check = commands.add_parser("check", help="check a record folder, ours or other people's")
    check.set_defaults(call=command_check)
    check.add_argument("folder", type=Path)
    check.add_argument("--json", action="store_true")
    check.add_argument(
        "--run", action="store_true", help="execute the folder's script too: S8, R6, R10, R12"
    )
    for command in (new, check):
        command.add_argument(
            "--data", type=Path, help="folder of shards, if the logged DATA_PATH is not here"
        )
    against = commands.add_parser("compare", help="is NEW better than OLD?")
    against.set_defaults(call=command_compare)
    against.add_argument("old", type=Path)
    against.add_argument("new", type=Path)
    against.add_argument("--json", action="store_true")
    board = commands.add_parser("board", help="rank a track's entries: table and picture")
    board.set_defaults(call=command_board)
    board.add_argument("track", type=Path, help="its folder, as records/track_cpu_1mb")
    board.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 if something would change"
    )
    pack = commands.add_parser("pack", help="wrap a script with lzma and base85")
    pack.set_defaults(call=command_pack)
    pack.add_argument("file", type=Path)
    pack.add_argument("--config", type=Path, help="settings to put inside")
    pack.add_argument("-o", "--output", type=Path)
    for command in (new, pack):
        command.add_argument(
            "--strip",
            action="store_true",
            help="pack without comments and docstrings; a readable copy lies beside it",
        )
    return top


def add_arguments_of_new(new: argparse.ArgumentParser) -> None:
    new.add_argument("name", metavar="NAME", type=record_name)
    new.add_argument(
        "--track",
        required=True,
        help="folder records/track_<this>: 10min_16mb, 1gpu, cpu_1mb, ...",
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
    new.add_argument(
        "--no-run", action="store_true", help="do not re-run: S8 in part, R6, R10, R12 are skipped"
    )
    new.add_argument("--script", type=Path, default=ROOT / "train_gpt.py")
    new.add_argument("--nproc", type=positive, default=1, help="processes (GPUs) a run")
    new.add_argument(
        "--packed",
        action=argparse.BooleanOptionalAction,
        help="ship one self-extracting script with the settings inside (default: where code and "
        "model share one cap)",
    )
    new.add_argument(
        "--wait", action="store_true", help="wait while another timed run uses the machine"
    )
    for option in ("author", "github-id", "blurb", "technique"):
        new.add_argument(f"--{option}", default="")
    new.add_argument("--date", type=iso_date, default=datetime.date.today().isoformat())
    new.add_argument("--records", type=Path, default=RECORDS, help="where the track folders are")
    new.add_argument(
        "--work", type=Path, default=ROOT / "logs" / "records", help="where runs are kept"
    )


def main(argv: Sequence[str]) -> int:
    try:
        args = parser().parse_args(argv)
        return args.call(args)
    except (RecordError, InputError, OSError) as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    except ModuleNotFoundError as missing:
        print(f"{args.command}: {missing}: pip install matplotlib scipy", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted; what is finished is kept, the same command goes on", file=sys.stderr)
        return INTERRUPTED


def interrupt(number: int, frame: object) -> None:
    """SIGTERM or a hang-up ends a call as Ctrl-C does: what it started is ended first."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # of a terminal that has fewer letters
    signal.signal(signal.SIGTERM, interrupt)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        signal.signal(signal.SIGHUP, interrupt)
    sys.exit(main(sys.argv[1:]))
