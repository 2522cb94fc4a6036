"""What the tests of the record tool share: damaging a record, checking it, expecting a finding."""

import json

from tool import checks
from tool.case import Case
from tool.finding import text_of
from tool.folder import Folder
from tool.logs import RESULT_MARK

import train_gpt as tg

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
