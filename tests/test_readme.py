"""The pages say what the code does: settings table, commands, exit codes, links, names."""

import os
import posixpath
import re

import pytest
from conftest import PAGES, ROOT

import train_gpt as tg

README = ROOT / "README.md"
SETTINGS = ROOT / "SETTINGS.md"
RECORDS = ROOT / "records" / "README.md"
# Environment variables that are no settings of the program.
OF_OTHERS = (
    "MATCHED_FINEWEB_REPO_ID",
    "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX",
    "HF_ENDPOINT",
    "HF_TOKEN",
    "TORCHINDUCTOR_CACHE_DIR",
)


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


@pytest.mark.parametrize("name", PAGES)
def test_every_setting_named_in_the_prose_exists(name):
    """Names in italics are other programs'."""
    known = {*tg.SETTING_NAMES, "NAME", "UPDATE_README", *dir(tg), *OF_OTHERS}
    text = re.sub(r"\*[A-Z0-9_]+\*", "", (ROOT / name).read_text())
    named = set(re.findall(r"\b([A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+)\b", text))
    assert not named - known


def test_exit_codes_are_those_of_the_code():
    text = re.search(r"Exit codes.*?\n\n", RECORDS.read_text(), re.S)[0]
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


def prose_of(name):
    """A page without its commands."""
    return re.sub(r"```.*?```", "", (ROOT / name).read_text(), flags=re.S)


def anchor(heading):
    """The name that a heading has in links, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def links_of(name):
    """(file, anchor) of every link of a page into this repository; a file relative to its root."""
    found = []
    for target in re.findall(r"\]\(([^()\s]+)\)", prose_of(name)):
        if "://" not in target:
            file, _, mark = target.partition("#")
            path = posixpath.join(posixpath.dirname(name), file) if file else name
            found.append((posixpath.normpath(path), mark))
    return found


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_to_a_file_and_to_a_heading(name):
    for file, mark in links_of(name):
        assert (ROOT / file).is_file(), file
        if mark:
            headings = re.findall(r"^#+ (.*)$", prose_of(file), re.M)
            assert [anchor(heading) for heading in headings].count(mark) == 1, (file, mark)


def test_every_page_is_reached_from_the_first():
    reached, found = set(), ["README.md"]
    while found:
        name = found.pop()
        if name in PAGES and name not in reached:
            reached.add(name)
            found += [file for file, _ in links_of(name)]
    assert reached == set(PAGES)
