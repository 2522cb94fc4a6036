"""Static checks as a whole: settings, our own script, and texts that are hardly scripts."""

import random

import pytest
from checking import assert_found, check, program, word
from conftest import ROOT
from tool import script, static
from tool.finding import text_of
from tool.tree import parse

import train_gpt as tg

OURS = (ROOT / "train_gpt.py").read_text()
PINNED = (ROOT / "requirements.txt").read_text().splitlines()
SETTINGS = """
import os, dataclasses
def env_int(name, default):
    return int(os.environ.get(name, default))
def number(default, doc):
    return dataclasses.field(default=default)
@dataclasses.dataclass
class Settings:
    num_layers: int = number(9, "blocks")
    ve_layers: tuple = (9, 10)
    smear: bool = True
    seed: int = int(os.environ.get("SEED", "1337"))
    name: str = number(default="x", doc="")
    later: list = dataclasses.field(default_factory=list)
Config = Hyperparameters = Settings
EPS = float(os.getenv("ADAM_EPS", 1e-8))
TTT = bool(int(os.environ.get("TTT", "0")))
BATCH, RATE = env_int("BATCH", 2 ** 19), env_int("RATE", default=-3)
PATH, NEEDED, OTHER = os.environ["DATA_PATH"], os.getenv("NEEDED"), os.environ.get("OTHER", f(3))
"""
DEFAULTS = {
    "NUM_LAYERS": "9",
    "VE_LAYERS": "9,10",
    "SMEAR": "1",
    "SEED": "1337",
    "NAME": "x",
    "LATER": None,
    "ADAM_EPS": "1e-08",
    "TTT": "0",
    "BATCH": "524288",
    "RATE": "-3",
    "DATA_PATH": None,
    "NEEDED": None,
    "OTHER": None,
}
SAME_RUN = {
    "NUM_LAYERS": "9.0",
    "VE_LAYERS": "[9, 10]",
    "SMEAR": "True",
    "SEED": "7",
    "ADAM_EPS": "0.00000001",
    "TTT": "false",
    "UNKNOWN": "3",
    "DATA_PATH": "elsewhere",
    "OTHER": "4",
}


@pytest.fixture(scope="module")
def our_settings():
    """The settings that our script declares, with their defaults as text."""
    return script.declared_settings(parse(OURS))


def test_declared_settings(our_settings):
    text = SETTINGS.replace("Config = Hyperparameters", "Hyperparameters")
    assert script.declared_settings(parse(text)) == DEFAULTS
    plain = {name: script.plain_value(value) for name, value in our_settings.items()}
    fields = tg.FIELDS.items()
    assert plain == {name: script.plain_value(str(field.default)) for name, field in fields}


def test_plain_values():
    assert script.plain_value("()") == script.plain_value("")
    assert script.plain_value("embed:8") == ("embed:8",)


def test_defaults_against_the_run():
    assert word("S9", SETTINGS, run_settings=SAME_RUN) == "PASS"
    changed = {"NUM_LAYERS": "11", "TTT": "1"}
    run = {**SAME_RUN, **changed}
    assert_found("S9", SETTINGS, "FAIL", "NUM_LAYERS: default 9, the run had 11", run_settings=run)
    finding = check("S9", SETTINGS, run_settings=run)
    assert finding.figures["differing"] == {"NUM_LAYERS": ["9", "11"], "TTT": ["0", "1"]}
    assert finding.figures["compared"] == 8
    assert word("S9", SETTINGS, run_settings=run, config=changed) == "PASS"
    assert word("S9", SETTINGS, run_settings=SAME_RUN, config={"TTT": "1"}) == "FAIL"
    assert word("S9", SETTINGS) == "SKIPPED"


def test_our_script_is_clean(our_settings):
    found = static.static_checks(
        OURS,
        requirements=PINNED,
        siblings=["config.env", "train.log"],
        config={"SEED": "7"},
        run_settings=our_settings,
    )
    verdicts = {finding.name: finding.word for finding in found}
    assert verdicts == dict.fromkeys(static.CHECKS, "PASS"), found


def test_what_our_script_can_do_is_named_when_the_run_does_it(our_settings):
    """The hashed caches and test-time training: silent by default.

    Two warnings when the settings switch them on.
    """
    on = {"NGRAM": "gated", "MIXER_HEAD": "1", "TTT_EPOCHS": "1"}
    found = static.static_checks(
        OURS,
        requirements=PINNED,
        siblings=["config.env"],
        config=on,
        run_settings={**our_settings, **on},
    )
    texts = {finding.name: text_of(finding) for finding in found if finding.word == "WARN"}
    assert set(texts) == {"S1", "S2"}
    assert "TestTimeTraining.learn" in texts["S1"]
    assert "Trainer.step" not in texts["S1"]


ODD = [
    "",
    "\0",
    "\ud800",
    "x = " + "(" * 300 + ")" * 300,
    "x = 1" + "+1" * 20000,
    "é" * 10,
    "lambda: (yield)",
    "match x:\n    case [a, *b]:\n        pass",
    "async def f():\n    async with a as b, c:\n        await d",
    "del x, y[0]",
    "x: int",
    "f(*a, **k)",
    "class A(B, metaclass=C): x = [i for i in j if i]",
    "open()",
    "min()",
]


def test_odd_input_never_raises():
    rng = random.Random(0)
    scoring = "for piece in val_tokens.split(64):\n    total += score_chunk(model, piece)"
    lines = OURS.splitlines()[:400] + program(scoring).splitlines()
    pieces = ["\n".join(rng.sample(lines, 3)) for _ in range(40)]
    for text in (*ODD, *pieces):
        found = static.static_checks(text, run_settings={})
        assert [finding.name for finding in found] == list(static.CHECKS)


def test_a_script_that_does_not_parse():
    broken = static.static_checks("x = (")
    verdicts = {finding.name: finding.word for finding in broken}
    assert verdicts == {**dict.fromkeys(static.CHECKS, "SKIPPED"), "S8": "FAIL"}
    assert "does not parse" in text_of(broken[0])


DECLARING = """
import os
def get(name, default):
    return os.environ.get(name, default)
A = get("LR", 1)
B = get("no_setting", 2)
class Config:
    rate: float = float(os.environ.get("MATRIX_LR", 0.04))
    depth: int = 9
"""


def test_settings_are_what_the_environment_is_asked_for():
    """Own helpers with names in capitals; a field that asks for another name is not itself one."""
    found = script.declared_settings(parse(DECLARING))
    assert found == {"LR": "1", "MATRIX_LR": "0.04", "DEPTH": "9"}
