"""The run log (section 3): lines that are appended, files that are whole, seconds by phase."""

import io
import json

import pytest
from helpers import FakeClock

import train_gpt as tg


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def test_files_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    tg.atomic_write(path, b"old")
    with pytest.raises(TypeError):
        tg.atomic_write(path, io.StringIO("no bytes"))
    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == {"x.json"}


def test_resume_in_the_same_folder_appends(rt, tmp_path):
    """A new run begins its files anew."""
    for word, resumed in (("lost", False), ("kept", False), ("more", True)):
        log = tg.RunLog(tmp_path, rt, resumed)
        log.log(word)
        log.metric(word=word)
    assert (tmp_path / "train.log").read_text() == "kept\nmore\n"
    assert (tmp_path / "metrics.jsonl").read_text() == '{"word": "kept"}\n{"word": "more"}\n'


def test_a_silent_log_keeps_its_seconds_and_writes_nothing(rt, tmp_path, capsys):
    """As the logs of all processes but the first do."""
    log = tg.RunLog(tmp_path / "out", rt, silent=True)
    with log.phase("train"):
        log.log("a line")
        log.metric(step=1)
    log.save(status="finished")
    assert log.result["status"] == "finished"
    assert log.seconds.keys() == {"train"}
    assert names_in(tmp_path) == set()
    assert capsys.readouterr().out == ""


def test_fields_are_merged_into_the_result(run_log):
    """What is saved later takes the place of what was saved before."""
    run_log.save(status="started", steps=3)
    run_log.save(status="finished")
    told = json.loads((run_log.out_dir / "result.json").read_text())
    assert told == run_log.result
    assert told["status"] == "finished"
    assert told["steps"] == 3


@pytest.fixture
def timed(rt, tmp_path, monkeypatch):
    """A log, and spend(name, seconds): a phase of so many seconds of its clock."""
    now = FakeClock(100.0)
    monkeypatch.setattr(tg.time, "perf_counter", now)
    log = tg.RunLog(tmp_path, rt)

    def spend(name, seconds):
        with log.phase(name):
            now.advance(seconds)

    return log, now, spend


def test_inner_phases_are_taken_out_of_outer_ones(timed):
    log, now, spend = timed
    spend("build", 1)
    with log.phase("train"):
        now.advance(10)
        spend("validate", 5)
        now.advance(20)
        spend("validate", 6)
    log.save()
    told = log.result["seconds"]
    assert told["train"] == 30
    assert told["validate"] == 11
    assert told["other"] == 0
    assert told["wall"] == 42
    assert log.result["phases_began"]["validate"] == 11


# Seconds of each phase; which of them count as training and as scoring follows.
SPENT = dict(build=1, train=30, validate=11, calibrate=2, pack=3, unpack=4)
SCORED = dict(plain=5, sliding=6, ttt=7, audit=8)


@pytest.fixture
def whole_run(timed):
    log, _, spend = timed
    for name, seconds in {**SPENT, **SCORED}.items():
        spend(name, seconds)
    log.save()
    return log


def test_which_phases_count_against_which_limit(whole_run):
    told = whole_run.result["seconds"]
    assert told["train_side"] == 30 + 2
    assert told["eval_side"] == 4 + 5 + 6 + 7
    assert told["wall"] == sum(SPENT.values()) + sum(SCORED.values()) == 77


LIMITS = {
    "just enough": ("clock", 32, 22, False),
    "training was longer": ("clock", 31.9, 22, True),
    "scoring was longer": ("clock", 32, 21.9, True),
    "no limits": ("clock", 0, 0, False),
    "tokens have no limit of training": ("tokens", 31.9, 22, False),
}


@pytest.mark.parametrize("case", LIMITS)
def test_over_budget(case, whole_run):
    schedule, train, scoring, over = LIMITS[case]
    limits = dict(max_wallclock_seconds=train, max_eval_seconds=scoring)
    assert tg.over_budget(tg.Config(schedule=schedule, **limits), whole_run) == over


def test_the_seconds_of_every_stage_count_as_scoring():
    assert set(tg.STAGES) <= set(tg.EVAL_PHASES)
