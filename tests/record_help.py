"""What the tests of the record tool share: making a record, damaging and checking it, processes."""

import contextlib
import functools
import json
import os
import pathlib
import shutil
import sys
import time

import record
from helpers import Program, forked, forked_ranks
from tool import checks, rerun, runs, static
from tool.case import Case
from tool.finding import text_of
from tool.folder import Folder
from tool.logs import RESULT_MARK

import train_gpt as tg

CONFIG = """# a tiny byte-level model
DEFAULTS=baseline
DATA_PATH=./data/tiny
TOKENIZER_PATH=byte260
VOCAB_SIZE=260
DEVICE=cpu
SCHEDULE=tokens
NUM_LAYERS=2
MODEL_DIM=32
NUM_HEADS=2
NUM_KV_HEADS=1
TRAIN_SEQ_LEN=64
TRAIN_BATCH_TOKENS=256
MICRO_BATCH_TOKENS=64
ITERATIONS=12
WARMUP_STEPS=0
WARMDOWN_ITERS=6
VAL_LOSS_EVERY=0
EVAL_STRIDE=32
KEEP_FLOAT_MAX_NUMEL=256
"""
GONE = object()  # in an edit: takes the value away


VAL_BYTES = 5277  # of the tiny validation text


# --- a record -------------------------------------------------------------------------------------


def checkout(root):
    """A folder like a checkout: data/, config.env; records and work come from the tests."""
    tg.synthetic_shards(root / "data" / "tiny")
    (root / "config.env").write_text(CONFIG)
    return root


def new_arguments(place, name, *more):
    places = ["--records", str(place / "records"), "--work", str(place / "work")]
    return ["new", name, *places, "--date", "2026-01-31", *more]


def new(place, name, *more):
    return record.main(new_arguments(place, name, *more))


def make_record(place, *more):
    """The record of two seeds."""
    config = ["--config", str(place / "config.env"), "--seeds", "1,2"]
    assert new(place, "tiny", "--track", "non_record_cpu", *config, *more) == 0
    return place / "records" / "track_non_record_cpu" / "2026-01-31_tiny"


def copy_of(made):
    """A copy beside a record, so that its data is found, to be damaged."""
    target = made.parent / "copy"
    shutil.rmtree(target, ignore_errors=True)
    return shutil.copytree(made, target)


def prepare(patch, base):
    """A machine's lock of the tests' own, and an environment without settings."""
    patch.setattr(runs, "LOCK", base / "machine.lock")
    for name in tg.SETTING_NAMES & os.environ.keys():
        patch.delenv(name)


# --- the tool without waiting for its processes to start ------------------------------------------


def without_waiting(patch):
    """What the tool starts is forked from a process that has imported torch, and is not confined.

    And the static checks of one text are made once.
    """
    patch.setattr(rerun, "execute", execute)
    patch.setattr(runs, "run_to_its_end", run_to_its_end)
    patch.setattr(checks, "static_checks", static_checks)


def run_command(command, cwd, env):
    """A command of the tool: Python or torchrun, behind what confines it -> exit code, output."""
    arguments = command[command.index(sys.executable) + 1 :]
    if arguments[0] != "-m":
        (code,), said = forked(Program(arguments, env, cwd))
        return code, said
    _, torchrun, _, processes, *arguments = arguments
    assert torchrun == "torch.distributed.run"
    world = int(processes.partition("=")[2])
    codes, said = forked_ranks(world, Program(arguments, env, cwd))
    return max(codes, key=abs), said


def execute(command, cwd, env, limit):
    return rerun.Done(*run_command(command, cwd, env))


def run_to_its_end(command, cwd, env):
    code, said = run_command(command, cwd, env)
    print(said)
    return code


def static_checks(text, **inputs):
    return list(_static_checks(text, json.dumps(inputs)))


@functools.cache
def _static_checks(text, inputs):
    return static.static_checks(text, **json.loads(inputs))


# --- damage, and what is found --------------------------------------------------------------------


def _put(tree, dotted, value):
    """tree["a"]["b"] = value for "a.b"; a name may not hold a dot."""
    *path, last = dotted.split(".")
    for name in path:
        tree = tree[name]
    if value is GONE:
        del tree[last]
    else:
        tree[last] = value


def edit_json(path, edits):
    """Changes values of a JSON file, each named by its dotted path."""
    value = json.loads(path.read_text())
    for dotted, new in edits.items():
        _put(value, dotted, new)
    path.write_text(json.dumps(value))


def edit_result(log, edits):
    """Changes the result at the end of a log."""
    *lines, last = log.read_text().splitlines()
    result = json.loads(last.removeprefix(RESULT_MARK))
    for dotted, new in edits.items():
        _put(result, dotted, new)
    log.write_text("\n".join([*lines, RESULT_MARK + json.dumps(result)]) + "\n")


def find(folder, name, **options):
    """One finding of a folder, made without the others; source checks import nothing."""
    case = Case(Folder(folder), **options)
    table = {**checks.PACKAGE, **checks.RERUN}
    if name in table:
        return checks.guarded(name, table[name], case)
    case.may_run = False
    return next(check for check in checks.check_source(case) if check.name == name)


def expect(finding: tg.Check, word: str, *sentences: str) -> None:
    """The finding has this verdict, and says these words."""
    assert finding.word == word, finding
    for sentence in sentences:
        assert sentence in text_of(finding), finding


# --- processes ------------------------------------------------------------------------------------


def is_alive(pid):
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def descendants_of(pid):
    """All processes below one, by /proc."""
    below = {}
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = stat.read_text().rpartition(")")[2].split()[1]
            below.setdefault(int(parent), []).append(int(stat.parent.name))
    found = [pid]
    for one in found:  # grows while it is read
        found += below.get(one, [])
    return found[1:]


def wait_until_dead(pid):
    deadline = time.monotonic() + 120
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(pid)
