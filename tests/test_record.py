"""The record tool on a real small record: `new`, `compare` and `pack`.

The first record is made and checked by processes of their own, as users have it; what is asked
of it afterwards is mostly forked.
"""

import json
import pathlib
import re
import shutil
import subprocess

import numpy as np
import pytest
import record
from conftest import ROOT, clean_env
from helpers import Program, forked, python
from record_help import CONFIG, make_record, new
from tool import rerun, runs, strip, wrapper
from tool.case import Case
from tool.folder import Folder, parse_config
from tool.submission import FIELDS

import train_gpt as tg

pytestmark = pytest.mark.usefixtures("own_machine")


@pytest.fixture(scope="module")
def made(place, own_machine):
    """The record of two seeds, checked with everything that runs the script."""
    return make_record(place, "--author", "A. Person", "--technique", "A tiny model.")


def run_script(folder, **settings):
    """The folder's script in a process of its own -> the finished process."""
    return python(["train_gpt.py"], clean_env(**settings), cwd=folder)


# --- new ------------------------------------------------------------------------------------------


def test_new_makes_a_record_that_passes(made):
    names = """train_gpt.py config.env requirements.txt README.md submission.json check.json
    curves.png train_seed1.log train_seed2.log model_seed1.ptz model_seed2.ptz"""
    assert {path.name for path in made.iterdir()} == set(names.split())
    report = json.loads((made / "check.json").read_text())
    verdicts = {finding["id"]: finding["verdict"] for finding in report["findings"]}
    assert report["verdict"] == "WARN"
    assert {name for name, verdict in verdicts.items() if verdict != "PASS"} == {"P8", "P9"}
    assert {"P1", "S1", "S10", "R6", "R10", "R12", "AUDIT"} <= verdicts.keys()
    assert (made / "curves.png").stat().st_size > 10_000


def test_submission_and_readme_tell_the_logs_figures(made):
    told = json.loads((made / "submission.json").read_text())
    assert set(FIELDS) <= set(told)
    assert told["seeds"] == [1, 2]
    assert len(told["all_runs"]) == 2
    scores = [told["seed_results"][seed]["val_bpb"] for seed in ("1", "2")]
    assert told["val_bpb"] == np.mean(scores)
    assert abs(told["val_bpb_std"] - np.std(scores, ddof=1)) < 1e-15
    readme = (made / "README.md").read_text()
    assert f"{told['val_bpb']:.6f}" in readme
    assert "A tiny model." in readme
    assert str(made.parent) not in readme


def test_readme_shows_every_seed_with_its_own_figures(made):
    """A row of the table: seed, steps, ms, each stage's bpb, bytes, seconds; no empty column."""
    told = json.loads((made / "submission.json").read_text())
    lines = (made / "README.md").read_text().splitlines()
    for seed in ("1", "2"):
        figures = told["seed_results"][seed]
        start = f"| {seed} | {figures['steps']} |"
        (row,) = (line for line in lines if line.startswith(start))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        scores = [f"{bpb:.6f}" for bpb in figures["stages"].values()]
        assert cells[3:-3] == scores
        assert "" not in cells
        size = f"{figures['artifact_bytes']:,}"
        seconds = [f"{figures[name]:.1f}" for name in ("train_time_s", "eval_time_s")]
        assert cells[-3:] == [size, *seconds]
    (row,) = (line for line in lines if line.startswith("| **mean** |"))
    largest = f"| {told['bytes_model_max']:,} (max) |"
    mean = f"**{told['val_bpb']:.6f}** (std {told['val_bpb_std']:.6f})"
    assert largest in row
    assert mean in row
    assert row.count("|") == 7 + len(scores)
    phases = [line.split("|")[2:-1] for line in lines if re.match(r"\| \w+ \| \d+\.\d \| ", line)]
    assert phases
    assert all(any(float(cell) > 0 for cell in cells) for cells in phases)


def test_the_commit_is_that_of_the_script_that_ran(tmp_path, monkeypatch):
    """None if the repository's own script is another one, or there is no repository."""

    def git(*command):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        command = ("git", "-C", tmp_path, *identity, *command)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    monkeypatch.setattr(runs, "ROOT", tmp_path)
    script = tmp_path / "train_gpt.py"
    script.write_text("x = 1\n")
    assert runs.commit_of(tg.sha256(script)) is None
    git("init", "-q")
    assert runs.commit_of(tg.sha256(script)) is None
    git("add", "train_gpt.py")
    git("commit", "-q", "-m", "first")
    assert runs.commit_of(tg.sha256(script)) == git("rev-parse", "HEAD")
    first, ran = git("rev-parse", "HEAD"), tg.sha256(script)
    script.write_text("x = 2\n")
    assert runs.commit_of(tg.sha256(script)) is None
    git("commit", "-q", "-a", "-m", "second")
    assert runs.commit_of(tg.sha256(script)) == git("rev-parse", "HEAD")
    assert runs.commit_of(ran) == first  # the work went on while the record was made


def test_record_runs_and_rescores_from_inside_its_folder(made, tmp_path):
    told = json.loads((made / "submission.json").read_text())["seed_results"]["2"]["val_bpb"]
    for settings in ({"MODE": "eval", "ARTIFACT": "model_seed2.ptz"}, {"SEED": "2"}):
        env = clean_env(OUT_DIR=str(tmp_path), **settings)
        codes, said = forked(Program(["train_gpt.py"], env, made))
        assert codes == [0], said
        assert json.loads((tmp_path / "result.json").read_text())["result"]["val_bpb"] == told


def test_new_makes_no_record_on_a_fail(place, made, capsys, quick):
    collect = ["--collect", str(place / "work" / "non_record_cpu_tiny"), "--no-run"]
    assert new(place, "bad", "--track", "10min_16mb", *collect) == 1
    assert "no record was made" in capsys.readouterr().out
    assert not list((place / "records").glob("track_10min_16mb/*"))
    assert (place / "work/10min_16mb_bad/check.json").is_file()


def test_collecting_finished_runs(place, made, quick):
    collect = ["--collect", str(place / "work" / "non_record_cpu_tiny"), "--no-run"]
    assert new(place, "again", "--track", "non_record_cpu", *collect) == 0
    folder = made.with_name("2026-01-31_again")
    assert (folder / "train_seed2.log").read_bytes() == (made / "train_seed2.log").read_bytes()
    settings = parse_config((folder / "config.env").read_text())
    assert settings == parse_config(CONFIG)
    assert "SEED" not in settings


def test_collecting_some_seeds_lists_the_others_as_left_out(place, made, quick):
    collect = ["--collect", str(place / "work" / "non_record_cpu_tiny"), "--seeds", "2", "--no-run"]
    assert new(place, "one", "--track", "non_record_cpu", *collect) == 0
    told = json.loads((made.with_name("2026-01-31_one") / "submission.json").read_text())
    assert told["seeds"] == [2]
    included = {row["seed"]: row["included"] for row in told["all_runs"]}
    assert included == {1: False, 2: True}


@pytest.mark.parametrize(
    "track, options, expected",
    [
        ("10min_16mb", [], True),
        ("track_non_record_16mb", [], True),
        ("10min_16mb", ["--no-packed"], False),
        ("10min_16mb", ["--collect", "x"], False),
        ("cpu_1mb", [], False),
        ("cpu_1mb", ["--packed"], True),
        ("cpu_1mb", ["--strip"], True),
    ],
)
def test_where_code_counts_it_is_packed_unless_told_otherwise(
    monkeypatch, track, options, expected
):
    seen = []
    monkeypatch.setattr(record, "make_record", lambda args: seen.append(args.packed) or 0)
    record.main(["new", "x", "--track", track, "--seeds", "1", *options])
    assert seen == [expected]


def test_what_is_packed_already_is_not_packed_again(tmp_path, monkeypatch):
    script = tmp_path / "train_gpt.py"
    script.write_text(wrapper.wrap("print(1)\n"))
    monkeypatch.setattr(record, "make_record", lambda args: int(args.packed))
    arguments = ["new", "x", "--track", "10min_16mb", "--seeds", "1", "--script", str(script)]
    assert record.main(arguments) == 0


def test_a_packed_record_holds_its_settings_and_passes(place, quick):
    """R6 scores its artifact with this repository's script, as the wrapper is another file."""
    config = ["--config", str(place / "config.env"), "--seeds", "1"]
    assert new(place, "packed", "--track", "non_record_16mb", *config) == 0
    folder = place / "records" / "track_non_record_16mb" / "2026-01-31_packed"
    assert not (folder / "config.env").exists()
    shipped = (folder / "train_gpt.py").read_text()
    assert wrapper.unpack_source(shipped) == ((ROOT / "train_gpt.py").read_text(), 1)
    assert parse_config(wrapper.settings_inside(shipped)) == parse_config(CONFIG)
    report = json.loads((folder / "check.json").read_text())
    verdicts = {finding["id"]: finding for finding in report["findings"]}
    assert verdicts["R6"]["verdict"] == "PASS"
    assert verdicts["R6"]["figures"]["runs"]["train_seed1.log"]["own_gap"] < 1e-6


@pytest.mark.slow
def test_a_stripped_record_keeps_its_readable_script(place, quick, capsys):
    config = ["--config", str(place / "config.env"), "--seeds", "1", "--no-run"]
    assert new(place, "stripped", "--track", "non_record_16mb", "--strip", *config) == 0
    folder = place / "records" / "track_non_record_16mb" / "2026-01-31_stripped"
    script = folder / "train_gpt.py"
    copy = folder / "train_gpt.readable.py"
    readable = (ROOT / "train_gpt.py").read_text()
    assert copy.read_text() == readable
    settings = runs.short_config(place / "config.env")
    assert script.read_text() == strip.wrap_stripped(readable, settings)
    report = json.loads((folder / "check.json").read_text())
    sizes = report["findings"][0]["figures"]
    code = script.stat().st_size
    assert sizes["code"] == sizes["packed"] == code
    assert sizes["readable"] == copy.stat().st_size
    assert rerun.check_import(Case(Folder(folder))).word == "PASS"
    page = (folder / "README.md").read_text()
    assert "`train_gpt.readable.py` without comments" in page
    copy.write_text(readable.replace("600.0", "601.0", 1))
    assert record.main(["check", str(folder)]) == 1
    assert "are two programs" in capsys.readouterr().out


def test_the_draft_of_a_killed_call_is_cleaned_up(place, made, quick):
    draft = place / "records" / "track_non_record_cpu" / ".2026-01-31_cleaned.abc"
    draft.mkdir()
    (draft / "half").write_text("x")
    collect = ["--collect", str(place / "work" / "non_record_cpu_tiny"), "--no-run"]
    assert new(place, "cleaned", "--track", "non_record_cpu", *collect) == 0
    assert not draft.exists()


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_one_clear_error(place, made, monkeypatch, capsys, quick):
    def full(path, data):
        with open("/dev/full", "wb") as file:
            file.write(data)

    monkeypatch.setattr(record, "atomic_write", full)
    collect = ["--collect", str(place / "work" / "non_record_cpu_tiny"), "--no-run"]
    assert new(place, "full", "--track", "non_record_cpu", *collect) == 64
    assert "No space left on device" in capsys.readouterr().err
    assert not list((place / "records" / "track_non_record_cpu").glob("*_full*"))


# --- commands -------------------------------------------------------------------------------------


def test_command_line_check(made, tmp_path, capsys, quick):
    assert record.main(["check", str(made)]) == 0
    assert "SKIPPED" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    assert record.main(["check", str(tmp_path / "empty"), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["verdict"] == "FAIL"
    assert record.main(["check", str(tmp_path / "nowhere")]) == 64


def test_compare_lists_all_runs(made, tmp_path, capsys):
    assert record.main(["compare", str(made), str(made)]) == 0
    text = capsys.readouterr().out
    assert "all runs of old (2):" in text
    assert "seed 1:" in text
    (tmp_path / "empty").mkdir()
    assert record.main(["compare", str(tmp_path / "empty"), str(made)]) == 64


def test_a_records_place_on_the_board(made, place, capsys, quick):
    """A copy alone in its track, so that no other test's record is ranked."""
    track = place / "board" / "track_non_record_cpu"
    folder = shutil.copytree(made, track / made.name)
    page = track / "README.md"
    page.write_text("<!-- board -->\n<!-- end board -->\n")
    assert record.main(["board", str(track)]) == 0
    assert "entries ranked: 1;" in capsys.readouterr().out
    told = json.loads((folder / "submission.json").read_text())
    row = page.read_text().split("| 1 | ")[1]
    score = f"| {told['val_bpb']:.6f} | {told['val_bpb_std']:.6f} | 2 | sliding | - |"
    size = max(path.stat().st_size for path in folder.glob("*.ptz"))
    assert f"{score} {size:,} |" in row
    machine = f"| {told['hardware']}, {told['matmul_gflops']} GFLOP/s |"
    assert f"{machine} 2026-01-31 |" in row
    assert record.main(["board", str(track), "--check"]) == 0


def test_pack_gives_back_every_byte(tmp_path, capsys):
    out = tmp_path / "packed.py"
    assert record.main(["pack", str(ROOT / "train_gpt.py"), "-o", str(out)]) == 0
    source = (ROOT / "train_gpt.py").read_text()
    assert wrapper.unpack_source(out.read_text()) == (source, 1)
    text = capsys.readouterr().out
    assert f"{len(source.encode())} bytes" in text
    assert f"{out.stat().st_size} bytes" in text
    assert out.stat().st_size < len(source) / 2
    # A wrapper packs too.
    assert wrapper.unpack_source(wrapper.wrap(out.read_text())) == (source, 2)


def test_packed_script_runs_with_its_own_settings(tmp_path, place, made):
    script = tmp_path / "run" / "train_gpt.py"
    script.parent.mkdir()
    settings = runs.short_config(place / "config.env")
    script.write_text(wrapper.wrap((ROOT / "train_gpt.py").read_text(), settings))
    out = tmp_path / "out"
    data = str(place / "data/tiny")
    done = run_script(script.parent, SEED="1", OUT_DIR=str(out), DATA_PATH=data)
    assert done.returncode == 0, done.stderr
    result = json.loads((out / "result.json").read_text())
    told = json.loads((made / "submission.json").read_text())
    assert result["result"]["val_bpb"] == told["seed_results"]["1"]["val_bpb"]
    assert result["sizes"]["code"] == script.stat().st_size
    assert result["steps"] == 12
    assert parse_config(wrapper.settings_inside(script.read_text())) == parse_config(CONFIG)
