"""The README says what the code does: settings table, commands, figures of the tests."""

import os
import re

from conftest import ROOT

import train_gpt as tg

README = ROOT / "README.md"
SETTINGS = ROOT / "SETTINGS.md"


def settings_table() -> str:
    lines = ["", "| setting | default | meaning |", "|---|---|---|"]
    for name, field in tg.FIELDS.items():
        value = tg.as_typed(field.default)
        options = f" ({', '.join(field.metadata['choices'])})" if field.metadata["choices"] else ""
        lines.append(
            f"| `{name}` | {f'`{value}`' if value else ''} | {field.metadata['doc']}{options} |"
        )
    return "\n".join(lines) + "\n\n"


def test_settings_table_is_the_code():
    """UPDATE_README=1 pytest tests/test_readme.py rewrites it."""
    text = SETTINGS.read_text()
    parts = re.split(r"(<!-- settings -->\n|<!-- end -->)", text)
    if os.environ.get("UPDATE_README"):
        parts[2] = settings_table()
        SETTINGS.write_text("".join(parts))
    assert parts[2] == settings_table()


def test_two_commands_of_one_line_near_the_top():
    text = README.read_text()
    for mark in ("<!-- demo -->", "<!-- tests -->"):
        block = text.split(mark)[1].split("```")[1]
        assert len(block.strip().splitlines()) == 2  # the language tag and one command
        assert text.index(mark) < len(text) / 4


def test_every_setting_named_in_the_prose_exists():
    text = README.read_text()
    known = {*tg.FIELDS, *tg.ALIASES, "CONFIG", "NAME", "UPDATE_README", *dir(tg)}
    named = set(re.findall(r"\b([A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+)\b", text))
    assert not {name for name in named if name not in known}


def test_exit_codes_are_those_of_the_code():
    text = re.search(r"Exit codes.*?\n\n", README.read_text(), re.S)[0]
    codes = (
        tg.OK,
        tg.BUG,
        tg.OVER_SIZE,
        tg.OUT_OF_MEMORY,
        tg.DIVERGED,
        tg.OVER_TIME,
        tg.AUDIT_FAILED,
        tg.BAD_INPUT,
        tg.INTERRUPTED,
    )
    assert [int(number) for number in re.findall(r"\s(\d+)\s[a-z]", text)] == list(codes)
