"""What the tests of the record tool share: damaging a record, checking it, watching processes."""

import contextlib
import json
import pathlib
import time

from tool import checks
from tool.case import Case
from tool.finding import text_of
from tool.folder import Folder
from tool.logs import RESULT_MARK

import train_gpt as tg

CONFIG = """# a tiny byte-level model
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
