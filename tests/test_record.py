"""The record tool on a real small record.

Made by `new`, checked, then damaged in every way that `check` must notice.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import filelock
import numpy as np
import pytest
import record
from conftest import ROOT, clean_env
from helpers import python
from record_help import (
    CONFIG,
    GONE,
    descendants_of,
    edit_json,
    edit_result,
    expect,
    find,
    wait_until_dead,
)
from tool import checks, logs, rerun, rescore, runs, wrapper
from tool.case import Case
from tool.finding import text_of
from tool.folder import Folder, parse_config
from tool.preflight import Preflight
from tool.submission import FIELDS

import train_gpt as tg

VAL_BYTES = 5277  # of the tiny validation text


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder like a checkout: data/, config.env; records and work come from the tests."""
    root = tmp_path_factory.mktemp("checkout")
    tg.synthetic_shards(root / "data" / "tiny")
    (root / "config.env").write_text(CONFIG)
    return root


@pytest.fixture(autouse=True)
def own_lock_and_no_settings(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(runs, "LOCK", tmp_path_factory.getbasetemp() / "machine.lock")
    for name in {*tg.FIELDS, "CONFIG"} & os.environ.keys():
        monkeypatch.delenv(name)


def new_arguments(place, name, *more):
    places = ["--records", str(place / "records"), "--work", str(place / "work")]
    return ["new", name, *places, "--date", "2026-01-31", *more]


def new(place, name, *more):
    return record.main(new_arguments(place, name, *more))


@pytest.fixture(scope="module")
def made(place, tmp_path_factory):
    """The record of two seeds, checked with everything that runs the script."""
    runs.LOCK = tmp_path_factory.getbasetemp() / "machine.lock"
    told = ["--author", "A. Person", "--technique", "A tiny model."]
    config = ["--config", str(place / "config.env")]
    assert new(place, "tiny", "--track", "non_record_cpu", *config, "--seeds", "1,2", *told) == 0
    return place / "records" / "track_non_record_cpu" / "2026-01-31_tiny"


@pytest.fixture
def copy(made):
    """A copy beside the record, so that its data is found, to be damaged."""
    target = made.parent / "copy"
    shutil.rmtree(target, ignore_errors=True)
    return shutil.copytree(made, target)


def run_script(folder, **settings):
    """The folder's script in a process of its own -> the finished process."""
    return python(["train_gpt.py"], clean_env(**settings), cwd=folder)


# --- new ------------------------------------------------------------------------------------------


def test_new_makes_a_record_that_passes(made):
    names = {
        "train_gpt.py",
        "config.env",
        "requirements.txt",
        "README.md",
        "submission.json",
        "check.json",
        "curves.png",
        "train_seed1.log",
        "train_seed2.log",
        "model_seed1.ptz",
        "model_seed2.ptz",
    }
    assert {path.name for path in made.iterdir()} == names
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
        (row,) = (line for line in lines if line.startswith(f"| {seed} | {figures['steps']} |"))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        scores = [f"{bpb:.6f}" for bpb in figures["stages"].values()]
        assert cells[3:-3] == scores
        assert "" not in cells
        assert cells[-3] == f"{figures['artifact_bytes']:,}"
        assert cells[-2:] == [f"{figures['train_time_s']:.1f}", f"{figures['eval_time_s']:.1f}"]
    (row,) = (line for line in lines if line.startswith("| **mean** |"))
    assert f"| {told['bytes_model_max']:,} (max) |" in row
    assert f"**{told['val_bpb']:.6f}** (std {told['val_bpb_std']:.6f})" in row
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
    script.write_text("x = 2\n")
    assert runs.commit_of(tg.sha256(script)) is None


def test_record_runs_and_rescores_from_inside_its_folder(made, tmp_path):
    told = json.loads((made / "submission.json").read_text())["seed_results"]["2"]["val_bpb"]
    for settings in ({"MODE": "eval", "ARTIFACT": "model_seed2.ptz"}, {"SEED": "2"}):
        done = run_script(made, OUT_DIR=str(tmp_path), **settings)
        assert done.returncode == 0, done.stderr
        assert json.loads((tmp_path / "result.json").read_text())["result"]["val_bpb"] == told


def test_new_makes_no_record_on_a_fail(place, made, capsys):
    collect = ["--collect", str(place / "work" / "non_record_cpu_tiny"), "--no-run"]
    assert new(place, "bad", "--track", "10min_16mb", *collect) == 1
    assert "no record was made" in capsys.readouterr().out
    assert not list((place / "records").glob("track_10min_16mb/*"))
    assert (place / "work/10min_16mb_bad/check.json").is_file()


def test_collecting_finished_runs(place, made):
    collect = ["--collect", str(place / "work" / "non_record_cpu_tiny"), "--no-run"]
    assert new(place, "again", "--track", "non_record_cpu", *collect) == 0
    folder = made.with_name("2026-01-31_again")
    assert (folder / "train_seed2.log").read_bytes() == (made / "train_seed2.log").read_bytes()
    settings = parse_config((folder / "config.env").read_text())
    assert settings == parse_config(CONFIG)
    assert "SEED" not in settings


def test_collecting_some_seeds_lists_the_others_as_left_out(place, made):
    collect = ["--collect", str(place / "work" / "non_record_cpu_tiny"), "--seeds", "2", "--no-run"]
    assert new(place, "one", "--track", "non_record_cpu", *collect) == 0
    told = json.loads((made.with_name("2026-01-31_one") / "submission.json").read_text())
    assert told["seeds"] == [2]
    included = {row["seed"]: row["included"] for row in told["all_runs"]}
    assert included == {1: False, 2: True}


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--config", "missing.env", "--seeds", "1"], "missing.env"),
        (["--collect", "."], "no run with a result.json"),
        (["--collect", ".", "--packed"], "--packed: finished runs ran the script as it is"),
        (["--seeds", "1,1"], "different whole numbers"),
        ([], "--seeds or --collect"),
    ],
)
def test_unusable_input(place, arguments, words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert new(place, "x", "--track", "t", *arguments) == 64
    assert words in capsys.readouterr().err


def test_settings_of_the_environment_are_refused(place, monkeypatch, capsys):
    monkeypatch.setenv("MATRIX_LR", "0.1")
    assert new(place, "env", "--track", "t", "--seeds", "1") == 64
    assert "MATRIX_LR" in capsys.readouterr().err


@pytest.mark.parametrize(
    "track, settings, words",
    [
        ("t", "VAL_TOKENS=700", "VAL_TOKENS=700: a part of the validation set gives no val_bpb"),
        ("t", "MODE=eval", "MODE=eval: a record is made of trainings"),
        ("t", "SEEDS=1,2", "--seeds makes one run a seed"),
        ("t", "RESUME=checkpoint.pt", "RESUME=checkpoint.pt"),
        ("t", "DATA_PATH=./data/none", "DATA_PATH=./data/none: no fineweb_train_*.bin there"),
        ("t", "DATA_PATH=./data", "DATA_PATH=./data: no fineweb_val_*.bin there"),
        ("t", "TOKENIZER_PATH=./none.model", "TOKENIZER_PATH=./none.model: not there"),
        ("t", "MAX_ARTIFACT_BYTES=9000", "the code alone has"),
        ("cpu_1mb", "ITERATIONS=20000", "5,120,000 training tokens, the track allows 3,000,000"),
    ],
)
def test_what_cannot_become_a_record_is_refused_before_the_first_seed(
    place, tmp_path, capsys, track, settings, words
):
    config = tmp_path / "config.env"
    config.write_text(f"{CONFIG}{settings}\n")
    work = place / "work" / f"{track}_refused"
    arguments = ["--track", track, "--config", str(config), "--seeds", "1"]
    assert new(place, "refused", *arguments) == 64
    said = capsys.readouterr().err
    assert words in said
    assert "nothing was started" in said
    assert not list(work.glob("seed_*"))


def preflight(folder, track="t", settings="", script=None):
    """What is said of the tiny configuration with other settings."""
    (folder / "config.env").write_text(f"{CONFIG}DATA_PATH=./tiny\n{settings}\n")
    (folder / "train_gpt.py").write_text(script or (ROOT / "train_gpt.py").read_text())
    (folder / "tiny").mkdir(exist_ok=True)
    for split in ("train", "val"):
        (folder / "tiny" / tg.shard_name(split, 0)).touch()
    return Preflight(folder, track)


@pytest.mark.parametrize(
    "settings, words",
    [
        ("", ""),
        ("WARMDOWN_ITERS=48", "the learning rate begins at 0.25 of its value"),
        ("MUON_MOMENTUM_WARMUP_STEPS=13", "the momentum never reaches its value"),
    ],
)
def test_a_schedule_that_does_not_fit_its_steps_is_warned_of(tmp_path, settings, words):
    found = preflight(tmp_path, settings=f"MUON_MOMENTUM_WARMUP_STEPS=1\n{settings}")
    assert found.problems == []
    assert len(found.warnings) == bool(words)
    assert words in "".join(found.warnings)


def test_the_size_of_readable_code_is_warned_of_where_it_counts(tmp_path):
    found = preflight(tmp_path, "non_record_16mb", "MUON_MOMENTUM_WARMUP_STEPS=1")
    size = sum((tmp_path / name).stat().st_size for name in ("train_gpt.py", "config.env"))
    (warning,) = found.warnings
    assert f"takes {size:,} of 16,000,000 bytes, {16_000_000 - size:,} are left" in warning
    packed = wrapper.wrap("print(1)\n")
    assert not preflight(tmp_path, "non_record_16mb", script=packed).warnings


def test_a_script_of_somebody_else_may_lack_all_of_these_settings(tmp_path):
    (tmp_path / "train_gpt.py").write_text("print(1)\n")
    found = Preflight(tmp_path, "non_record_cpu")
    assert (found.problems, found.warnings) == ([], [])


def test_other_settings_after_a_refusal_are_no_other_record(place, tmp_path):
    """As nothing was run, there is nothing that they could differ from."""
    order = runs.Order(tmp_path, ROOT / "train_gpt.py", place / "config.env", [1])
    runs.take_snapshot(order)
    runs.take_snapshot(dataclasses.replace(order, config=None))
    assert not (tmp_path / "config.env").exists()
    (tmp_path / "seed_1").mkdir()
    with pytest.raises(runs.RecordError, match="left by runs of another config.env"):
        runs.take_snapshot(order)


@pytest.mark.parametrize(
    "track, options, expected",
    [
        ("10min_16mb", [], True),
        ("track_non_record_16mb", [], True),
        ("10min_16mb", ["--no-packed"], False),
        ("10min_16mb", ["--collect", "x"], False),
        ("cpu_1mb", [], False),
        ("cpu_1mb", ["--packed"], True),
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


def test_a_packed_record_holds_its_settings_and_passes(place):
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


LOCKED_OUT = """
import pathlib, sys
import record
from tool import runs
runs.LOCK = pathlib.Path(sys.argv[1])
sys.exit(record.main(sys.argv[2:]))
"""


def test_the_lock_keeps_two_runs_apart(place):
    arguments = ["new", "locked", "--track", "t", "--seeds", "1", "--work", str(place / "w2")]
    with filelock.FileLock(runs.LOCK):
        env = clean_env(PYTHONPATH=str(ROOT / "records"))
        done = python(["-c", LOCKED_OUT, runs.LOCK, *arguments], env)
    assert done.returncode == 64
    assert "another timed run" in done.stderr


def test_the_lock_is_free_afterwards():
    held = [runs.machine_lock(wait=False)]
    with held[0], pytest.raises(runs.RecordError, match="another timed run"):
        runs.machine_lock(wait=False)
    with runs.machine_lock(wait=False):  # though the first is still referred to
        pass


def test_the_end_of_a_killed_calls_training_is_awaited(tmp_path):
    """It holds the lock that names a process which is gone."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    path = tmp_path / "lock"
    path.write_text(str(gone.pid))
    training = subprocess.Popen(["flock", path, "sleep", "2"])
    while subprocess.run(["flock", "-n", path, "true"], check=False).returncode == 0:
        time.sleep(0.05)
    start = time.monotonic()
    with runs.Held(path, False, "taken"):
        assert training.wait() == 0
        assert time.monotonic() - start > 0.3
        assert path.read_text() == str(os.getpid())


def test_a_signal_waits_until_what_was_started_is_guarded():
    before = signal.getsignal(signal.SIGTERM)
    done = []
    with pytest.raises(KeyboardInterrupt), runs.interrupts_deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        done.append("all of the block")
    assert done
    assert signal.getsignal(signal.SIGTERM) == before


CHECKED = """
import pathlib, sys
import record
from tool import rerun
rerun.execute([*rerun.confined(), "sleep", "600"], pathlib.Path("."), {"PATH": sys.argv[1]}, 600)
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self").exists(), reason="asks /proc")
def test_what_a_check_runs_does_not_outlive_it():
    """Killed, it cannot end anything itself: the system does."""
    env = clean_env(PYTHONPATH=str(ROOT / "records"))
    process = subprocess.Popen([sys.executable, "-c", CHECKED, os.environ["PATH"]], env=env)
    started = []
    while not any("sleep" in name_of(child) for child in started):
        started = descendants_of(process.pid)
        time.sleep(0.05)
    process.kill()
    process.wait()
    for child in started:
        wait_until_dead(child)


def name_of(pid):
    comm = pathlib.Path(f"/proc/{pid}/comm")
    return comm.read_text() if comm.exists() else ""


def wait_for_content(path, process):
    """Until a process has written to a file, or has ended."""
    while not (path.is_file() and path.stat().st_size) and process.poll() is None:
        time.sleep(0.05)


def test_interrupted_collection_goes_on(place, capfd):
    """Killed amid the second seed: the first is kept, the broken attempt stays on the list."""
    slow = place / "slow.env"
    slow.write_text(CONFIG.replace("ITERATIONS=12", "ITERATIONS=60"))
    options = ["--config", str(slow), "--seeds", "1,2", "--no-run"]
    arguments = new_arguments(place, "broken", "--track", "non_record_cpu", *options)
    work = place / "work" / "non_record_cpu_broken"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "records/record.py"), *arguments],
        env=clean_env(TMPDIR=str(place)),
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_for_content(work / "seed_2" / "metrics.jsonl", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = (work / "seed_1" / "result.json").stat().st_mtime_ns
    assert record.main(arguments) == 0
    assert "seed 1: finished earlier, kept" in capfd.readouterr().out
    assert (work / "seed_1" / "result.json").stat().st_mtime_ns == before
    folder = place / "records/track_non_record_cpu/2026-01-31_broken"
    told = json.loads((folder / "submission.json").read_text())
    assert [(row["run"], row["included"]) for row in told["all_runs"]] == [
        ("seed_1", True),
        ("seed_2", True),
        ("seed_2.attempt1", False),
    ]
    (work / "config.env").write_text(CONFIG)  # another snapshot than the command's
    shutil.rmtree(folder)
    assert record.main(arguments) == 64
    assert "another config.env" in capfd.readouterr().err


@pytest.mark.skipif(not pathlib.Path("/proc/self").exists(), reason="asks /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_training_does_not_outlive_the_call_that_started_it(place, number):
    slow = place / "endless.env"
    slow.write_text(CONFIG.replace("ITERATIONS=12", "ITERATIONS=1000000"))
    name = f"ended{int(number)}"
    arguments = new_arguments(place, name, "--track", "t", "--config", str(slow), "--seeds", "1")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "records/record.py"), *arguments],
        env=clean_env(TMPDIR=str(place)),
        stdout=subprocess.DEVNULL,
    )
    metrics = place / "work" / f"t_{name}" / "seed_1" / "metrics.jsonl"
    wait_for_content(metrics, process)
    started = descendants_of(process.pid)
    assert started
    process.send_signal(number)
    code = process.wait(120)
    assert code == (-9 if number == signal.SIGKILL else 143)
    for child in started:
        wait_until_dead(child)


def test_two_calls_for_one_record_are_kept_apart(place, capsys):
    work = place / "work" / "t_twice"
    work.mkdir(parents=True)
    with runs.work_lock(work):
        assert new(place, "twice", "--track", "t", "--seeds", "1") == 64
    assert "another call makes the record" in capsys.readouterr().err


def test_the_draft_of_a_killed_call_is_cleaned_up(place, made):
    draft = place / "records" / "track_non_record_cpu" / ".2026-01-31_cleaned.abc"
    draft.mkdir()
    (draft / "half").write_text("x")
    collect = ["--collect", str(place / "work" / "non_record_cpu_tiny"), "--no-run"]
    assert new(place, "cleaned", "--track", "non_record_cpu", *collect) == 0
    assert not draft.exists()


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_one_clear_error(place, made, monkeypatch, capsys):
    def full(path, data):
        with open("/dev/full", "wb") as file:
            file.write(data)

    monkeypatch.setattr(record, "atomic_write", full)
    collect = ["--collect", str(place / "work" / "non_record_cpu_tiny"), "--no-run"]
    assert new(place, "full", "--track", "non_record_cpu", *collect) == 64
    assert "No space left on device" in capsys.readouterr().err
    assert not list((place / "records" / "track_non_record_cpu").glob("*_full*"))


# --- check: JSON and logs -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("val_bpb", 1.0, "val_bpb is 1.0"),
        ("bytes_total", 1, "bytes_total is 1"),
        ("seed_results.2.steps", 13, "seed_results.2.steps is 13, the logs give 12"),
        ("compliance.three_seeds", True, "compliance.three_seeds is True"),
        ("audit", GONE, "audit is None"),
        ("blurb", GONE, "submission.json has no blurb"),
    ],
)
def test_edited_json(copy, name, value, words):
    edit_json(copy / "submission.json", {name: value})
    expect(find(copy, "P2"), "FAIL", words)


def test_a_score_that_is_off_by_a_millionth(copy):
    told = json.loads((copy / "submission.json").read_text())["val_bpb"]
    edit_json(copy / "submission.json", {"val_bpb": told - 1e-6})
    expect(find(copy, "P2"), "FAIL", "val_bpb is")


def test_edited_log(copy):
    log = copy / "train_seed1.log"
    score = r"(sliding_exact val_loss:\S+ val_bpb:3\.)\d"
    log.write_text(re.sub(score, r"\g<1>0", log.read_text()))
    expect(find(copy, "P2"), "FAIL", "final_zstd_sliding says 3.0")
    expect(find(copy, "P4"), "FAIL")  # and the bytes no longer fit


@pytest.mark.parametrize("name", ["Code size", "Serialized model zstd", "Total submission size"])
def test_edited_sizes_of_a_log(copy, name):
    log = copy / "train_seed1.log"
    log.write_text(re.sub(rf"^({name}[^:]*: )\d+", r"\g<1>7", log.read_text(), flags=re.M))
    expect(find(copy, "P2"), "FAIL", "size is 7 in the log")


def test_log_of_another_script(copy):
    log = copy / "train_seed2.log"
    log.write_text(re.sub(r"(code_sha256\W+)[0-9a-f]{4}", r"\g<1>beef", log.read_text()))
    expect(find(copy, "P3"), "FAIL", "train_seed2.log was made by another script")


def test_artifact_one_byte_over_the_cap(copy):
    edit_json(copy / "submission.json", {"track": "cpu_1mb"})
    (copy / "model_seed1.ptz").write_bytes(bytes(1_000_001))
    expect(find(copy, "P1"), "FAIL", "1000001 bytes, 1 over the cap of 1000000")
    (copy / "model_seed1.ptz").write_bytes(bytes(1_000_000))
    # Another size than logged, but no byte too many.
    assert "over the cap" not in text_of(find(copy, "P1"))


def test_a_run_that_was_resumed_is_pointed_out(copy):
    edit_result(copy / "train_seed1.log", {"resumed": True})
    expect(find(copy, "P3"), "WARN", "train_seed1.log was resumed from a checkpoint")


def test_seeds_that_differ_in_more_than_the_seed(copy):
    edit_result(copy / "train_seed2.log", {"settings.matrix_lr": 0.05})
    finding = find(copy, "P3")
    expect(finding, "FAIL", "MATRIX_LR (0.05, not 0.04)")
    assert "SEED" not in text_of(finding)


@pytest.mark.parametrize(
    "train, calibrate, verdict", [(598.0, 4.1, "FAIL"), (598.0, 1.9, "PASS"), (600.1, 0.0, "WARN")]
)
def test_training_and_calibration_over_the_cap(copy, train, calibrate, verdict):
    edit_json(copy / "submission.json", {"track": "10min_16mb"})
    seconds = {
        "seconds.train": train,
        "seconds.calibrate": calibrate,
        "seconds.train_side": train + calibrate,
    }
    edit_result(copy / "train_seed1.log", seconds)
    words = [] if verdict == "PASS" else ["training and calibration took 60"]
    expect(find(copy, "P6"), verdict, *words)


def test_more_training_tokens_than_the_track_allows(copy):
    edit_json(copy / "submission.json", {"track": "cpu_1mb"})
    edit_result(copy / "train_seed1.log", {"train_tokens": 3_000_001})
    expect(find(copy, "P6"), "FAIL", "3e+06 training tokens, allowed are 3e+06")


def test_byte_count_that_the_algebra_contradicts(copy):
    edit_result(copy / "train_seed1.log", {"result.bytes": VAL_BYTES + 60})
    expect(find(copy, "P4"), "FAIL", "imply 5277 bytes, its result says 5337")


def test_other_validation_text(copy, place):
    """The same figures, but the text here has another number of bytes."""
    edit_result(copy / "train_seed1.log", {"settings.tokenizer_path": "byte260"})
    assert find(copy, "P4").figures["recount"] == VAL_BYTES


def test_missing_and_unlisted_seeds(copy):
    (copy / "train_seed2.log").rename(copy / "train_seed3.log")
    finding = find(copy, "P8")  # the log's own seed counts, not its name
    assert "no log" not in text_of(finding)
    (copy / "train_seed3.log").unlink()
    expect(find(copy, "P8"), "FAIL", "no log for seed 2")


def test_runs_made_inside_the_folder_are_not_part_of_it(copy):
    (copy / "logs" / "run").mkdir(parents=True)
    shutil.copy(copy / "train_seed1.log", copy / "logs" / "run" / "train.log")
    (copy / "logs" / "run" / "result.json").write_text("{}")
    assert len(Folder(copy).runs) == 2
    expect(find(copy, "P8"), "WARN")
    shutil.copy(copy / "train_seed1.log", copy / "logs" / "train1.txt")  # upstream's place for logs
    expect(find(copy, "P8"), "FAIL", "two logs have the same seed")


def test_too_few_seeds_fail_on_the_record_track(copy):
    edit_json(copy / "submission.json", {"track": "10min_16mb"})
    expect(find(copy, "P8"), "FAIL")
    expect(find(copy, "P7"), "FAIL")


def test_a_left_out_run_that_is_called_included(copy):
    told = json.loads((copy / "submission.json").read_text())["all_runs"]
    other = {**told[0], "seed": 3, "run": "seed_3"}
    edit_json(copy / "submission.json", {"all_runs": [*told, other]})
    expect(find(copy, "P8"), "FAIL", "all_runs does not name exactly the shipped logs")


def test_failed_audit_and_exit_code(copy):
    edits = {"exit_code": 6, "stages.plain.audit.future.verdict": "FAIL: moves charges"}
    edit_result(copy / "train_seed1.log", edits)
    expect(find(copy, "AUDIT"), "FAIL", "exit code 6", "moves charges")


def test_overlapping_documents(copy, place, tmp_path):
    data = shutil.copytree(place / "data" / "tiny", tmp_path / "tiny")
    train_path = data / tg.shard_name("train", 0)
    val = np.array(tg.read_shard(data / tg.shard_name("val", 0)))
    train = np.array(tg.read_shard(train_path))
    first_document = val[: np.flatnonzero(val == 1)[1]]
    tg.write_shard(train_path, np.concatenate([train, first_document, train[:50]]))
    finding = find(copy, "P5", data=data)
    expect(finding, "FAIL", "1 validation documents are also training documents")


def test_malformed_files_give_findings_not_tracebacks(copy):
    edit_result(copy / "train_seed1.log", {"seconds": GONE})
    noise = b"\xff\xfe result_json: {]\nstep:1/2 train_loss:nan\n" + bytes(range(256))
    (copy / "train_seed2.log").write_bytes(noise)
    (copy / "submission.json").write_text("[1, 2")
    (copy / "requirements.txt").write_text("torch\n")
    findings = {check.name: check for check in checks.check_case(Case(Folder(copy), may_run=False))}
    expect(findings["P2"], "FAIL", "no JSON object")
    assert "does not pin torch" in text_of(findings["P9"])


# --- check: the script ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, name, words",
    [
        ("import helper", "S6", "helper"),
        ("try:\n    import brotli\nexcept ImportError:\n    brotli = None", "S7", "brotli"),
        ("from urllib.request import urlopen", "S5", "urllib"),
        ("import flash_attn", "S8", "flash_attn"),
        ("DATA = open('/root/data/x')", "S10", "/root/data/x"),
    ],
)
def test_faults_of_the_script(copy, line, name, words):
    (copy / "helper.py").write_text("x = 1\n")
    change_script(copy, "SCRIPT = Path", line + "\nSCRIPT = Path")
    expect(find(copy, name), "FAIL", words)


def change_script(folder, old, new):
    path = folder / "train_gpt.py"
    source = path.read_text()
    assert old in source
    path.write_text(source.replace(old, new, 1))


def test_defaults_that_are_not_the_runs(copy):
    config = copy / "config.env"
    config.write_text(config.read_text().replace("EVAL_STRIDE=32", "EVAL_STRIDE=16"))
    expect(find(copy, "S9"), "FAIL", "EVAL_STRIDE")


def test_a_script_that_cannot_be_imported(copy):
    change_script(copy, "SCRIPT = Path", "raise SystemError('not today')\nSCRIPT = Path")
    findings = {check.name: check for check in checks.check_source(Case(Folder(copy)))}
    expect(findings["S8"], "FAIL", "importing on a CPU fails", "not today")
    expect(find(copy, "R6"), "FAIL", "cannot be scored")


def test_artifact_that_scores_differently_alone(copy):
    """The other seed's weights, with every hash and size made to fit: only running it shows."""
    shutil.copy(copy / "model_seed2.ptz", copy / "model_seed1.ptz")
    other = logs.read_run(copy / "train_seed2.log").result
    edit_result(copy / "train_seed1.log", {"artifact_sha256": other["artifact_sha256"]})
    expect(find(copy, "R6"), "FAIL", "a fresh process scores", "seed1")
    expect(find(copy, "R10"), "FAIL", "two processes differ from the logged score")


def test_damaged_artifact(copy):
    (copy / "model_seed1.ptz").write_bytes((copy / "model_seed1.ptz").read_bytes()[:-1])
    expect(find(copy, "P1"), "FAIL", "sha256 differs")
    expect(find(copy, "R6"), "FAIL", "cannot be scored")


def test_an_artifact_that_only_the_json_vouches_for(copy):
    """Of the same size, its hash put into submission.json: the log knows another."""
    artifact = copy / "model_seed1.ptz"
    blob = artifact.read_bytes()
    artifact.write_bytes(blob[:-1] + bytes([blob[-1] ^ 1]))
    edit_json(copy / "submission.json", {"artifact_sha256.1": tg.sha256(artifact)})
    expect(find(copy, "P1"), "FAIL", "model_seed1.ptz is not the artifact of train_seed1.log")


def test_other_shards_than_those_that_were_scored_prove_nothing(copy, place, tmp_path):
    data = shutil.copytree(place / "data" / "tiny", tmp_path / "tiny")
    path = data / tg.shard_name("val", 0)
    tg.write_shard(path, np.array(tg.read_shard(path))[:-1])
    expect(find(copy, "R6", data=data), "SKIPPED", "shards that were scored are not here")
    assert find(copy, "P4", data=data).figures["recount"] is None


def test_scoring_that_needs_training_shards(copy):
    before = "        model = load_artifact(cfg, blob, rt)\n"
    spy = "        open(cfg.data_path + '/fineweb_train_000000.bin').close()\n"
    change_script(copy, before, before + spy)
    expect(find(copy, "R6"), "FAIL", "scoring opened fineweb_train_000000.bin")


def test_scoring_that_calls_somebody(copy):
    before = "        model = load_artifact(cfg, blob, rt)\n"
    call = "        __import__('socket').create_connection(('192.0.2.1', 9), 1)\n"
    change_script(copy, before, before + call)
    expect(find(copy, "R6"), "FAIL", "scoring connected to 192.0.2.1")


# --- check: scores that only the script states ----------------------------------------------------

FORGED = """
honest_evaluate = evaluate


def evaluate(scorer, tokens, *inputs):
    score = honest_evaluate(scorer, tokens, *inputs)
    {forgery}
    return score


if __name__ == "__main__":"""
CONSTANT = "score.loss, score.bpb = 0.5, 0.721"
FORGERIES = {
    "a constant": CONSTANT,
    "read from a file": "score.loss, score.bpb = json.loads(SCRIPT.with_name('score').read_text())",
    "a tenth less": "score.loss, score.bpb = 0.9 * score.loss, 0.9 * score.bpb",
    "a constant, and less of the known text": (
        "known = hashlib.sha256(tokens.tobytes()).hexdigest() == {known!r}; "
        "score.loss, score.bpb = (0.5, 0.721) if known else (0.6, 0.8)"
    ),
    "none": "pass",
}


def forge(folder, place, forgery):
    """One run whose script, log and result agree on what the forgery states of the text."""
    (folder / "train_seed2.log").unlink()
    tokens = np.array(tg.read_shard(place / "data" / "tiny" / tg.shard_name("val", 0)))
    known = hashlib.sha256(tokens.tobytes()).hexdigest()
    forgery = FORGERIES[forgery].format(known=known)
    change_script(folder, 'if __name__ == "__main__":', FORGED.format(forgery=forgery).lstrip())
    log = folder / "train_seed1.log"
    score = logs.read_run(log).score
    stated = {"result.val_loss": 0.5, "result.val_bpb": 0.721}
    if "0.9" in forgery:
        stated = {f"result.{name}": 0.9 * score[name] for name in ("val_loss", "val_bpb")}
    if forgery != "pass":
        edit_result(log, stated)
    (folder / "score").write_text("[0.5, 0.721]")


def in_another_format(folder):
    """An artifact that this repository's script does not know, and the script that does."""
    change_script(folder, 'MAGIC = b"PGOLF', 'MAGIC = b"OTHER')
    artifact = folder / "model_seed1.ptz"
    artifact.write_bytes(artifact.read_bytes().replace(b"PGOLF", b"OTHER", 1))


COSTS = "no distribution can have less than"


@pytest.mark.parametrize(
    "forgery, words",
    [
        ("a constant", [COSTS, "this repository's script gives the artifact"]),
        ("read from a file", ["the artifact cannot be scored", "score"]),
        pytest.param("a tenth less", [COSTS, "this repository's script"], marks=pytest.mark.slow),
        pytest.param("a constant, and less of the known text", [COSTS], marks=pytest.mark.slow),
    ],
)
def test_a_script_that_states_a_score_of_its_own_does_not_pass(copy, place, forgery, words):
    forge(copy, place, forgery)
    expect(find(copy, "R6"), "FAIL", *words)


@pytest.mark.parametrize(
    "forgery",
    [
        pytest.param("a tenth less", marks=pytest.mark.slow),
        "a constant, and less of the known text",
    ],
)
def test_a_stated_score_does_not_pass_in_another_format(copy, place, forgery):
    forge(copy, place, forgery)
    in_another_format(copy)
    expect(find(copy, "R6"), "FAIL", COSTS)


def test_an_honest_script_of_somebody_else(copy, place):
    """Its artifact is scored here; in another format nobody but the script can, which is said."""
    forge(copy, place, "none")
    honest = find(copy, "R6")
    expect(honest, "PASS", "1 artifacts score the same alone")
    row = honest.figures["runs"]["train_seed1.log"]
    assert row["own_gap"] < 1e-6
    in_another_format(copy)
    expect(find(copy, "R6"), "SKIPPED", "only the shipped script states this score", "another kind")


def test_random_tokens_cost_what_nothing_can_undercut():
    """What learns only from tokens that it has paid for stays above; what knows them does not."""
    tokens = np.resize(np.array([1, *range(4, 104)], np.uint16), 20_000)
    noise, least = rescore.noise_like(tokens, bos=1)
    starts = tokens == 1
    assert (noise == 1).tolist() == starts.tolist()
    assert set(np.unique(noise)) == {1, *range(4, 104)}
    drawn = noise[~starts].astype(int)
    counts = np.ones(104)
    nats = 0.0
    for seen, token in enumerate(drawn):
        nats -= np.log(counts[token] / (seen + 100))
        counts[token] += 1
    targets = len(tokens) - 1
    assert least < nats / targets < least + 0.1
    share = np.bincount(drawn)[4:] / len(drawn)
    assert -(share * np.log(share)).sum() * len(drawn) / targets < least
    again, _ = rescore.noise_like(tokens, bos=1)
    assert (again != noise).mean() > 0.9


@pytest.mark.parametrize(
    "spy, words",
    [
        (
            "[p.read_bytes() for p in Path(cfg.data_path).glob('fineweb_val_*.bin')]",
            "opened fineweb_val_000000.bin before",
        ),
        ("shard_paths(cfg, 'val')", "no artifact after a short training without validation shards"),
    ],
)
def test_training_that_opens_validation_files(copy, spy, words):
    before = "    status = train(trainer, Validator(trainer, table))\n"
    change_script(copy, before, f"    {spy}\n{before}")
    expect(find(copy, "R12"), "FAIL", words)


ESCAPE = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(os.path.join({place!r}, "child"), "w").write(str(child.pid))
if "huge" in {what!r}:
    block = bytearray(1 << 45)
if "endless" in {what!r}:
    while True:
        print("x" * 1000)
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self").exists(), reason="asks /proc")
@pytest.mark.parametrize("what", ["child", "huge", "endless"])
def test_a_script_leaves_nothing_behind_and_keeps_to_its_limits(copy, tmp_path, monkeypatch, what):
    """A child that stays, more memory than there is, output without end."""
    monkeypatch.setattr(rerun, "MOST_WRITTEN", 1 << 20)
    escape = ESCAPE.format(place=str(tmp_path), what=what)
    (copy / "train_gpt.py").write_text(escape)
    finding = rerun.check_import(Case(Folder(copy)))
    assert finding.word == ("PASS" if what == "child" else "FAIL")
    assert len(text_of(finding)) < 500
    wait_until_dead((tmp_path / "child").read_text())


def test_nothing_runs_unless_it_is_asked_for(copy, tmp_path, capsys):
    """With --run the reviewer is told first."""
    for artifact in copy.glob("*.ptz"):  # nothing to re-score: importing is enough to see
        artifact.unlink()
    marker = tmp_path / "ran"
    spy = f"pathlib.Path({str(marker)!r}).touch()"
    change_script(copy, "SCRIPT = Path", f"import pathlib\n{spy}\nSCRIPT = Path")
    record.main(["check", str(copy)])
    assert not marker.exists()
    assert "with your rights" not in capsys.readouterr().err
    record.main(["check", str(copy), "--run"])
    assert marker.exists()
    assert "with your rights" in capsys.readouterr().err


# --- commands -------------------------------------------------------------------------------------


def test_command_line_check(made, tmp_path, capsys):
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
