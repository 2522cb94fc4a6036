"""The runs of a record: what is refused before the first one; locks, signals, interrupted calls."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import filelock
import pytest
import record
from conftest import ROOT, clean_env
from helpers import Program, forked
from record_help import (
    CONFIG,
    descendants_of,
    new,
    new_arguments,
    wait_until_dead,
)
from tool import runs, wrapper
from tool.preflight import Preflight

import train_gpt as tg

pytestmark = pytest.mark.usefixtures("own_machine")


# --- what is refused, or warned of ----------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--config", "missing.env", "--seeds", "1"], "missing.env"),
        (["--collect", "."], "no run with a result.json"),
        (["--collect", ".", "--packed"], "--packed: finished runs ran the script as it is"),
        (["--collect", ".", "--strip"], "--strip: finished runs ran the script as it is"),
        (["--seeds", "1", "--strip", "--no-packed"], "--strip: only a packed script is stripped"),
        (["--seeds", "1,1"], "different whole numbers"),
        (["--seeds", "1,01"], "different whole numbers"),
        (["--seeds", "1,x"], "different whole numbers"),
        (["--seeds", "1", "--nproc", "0"], "expected a whole number from 1"),
        ([], "--seeds or --collect"),
    ],
)
def test_unusable_input(place, arguments, words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert new(place, "x", "--track", "t", *arguments) == 64
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", ["MATRIX_LR", "TTT_LORA_LR"])
def test_settings_of_the_environment_are_refused(name, place, monkeypatch, capsys):
    """By either of their names."""
    monkeypatch.setenv(name, "0.1")
    assert new(place, "env", "--track", "t", "--seeds", "1") == 64
    assert name in capsys.readouterr().err


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
        ("1gpu", "ITERATIONS=4000000", "1,024,000,000 training tokens, the track allows 1,000,000"),
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


def preflight(folder, track="cpu_1mb", settings="", script=None):
    """What is said of the tiny configuration with other settings."""
    (folder / "config.env").write_text(f"{CONFIG}DATA_PATH=./tiny\n{settings}\n")
    (folder / "train_gpt.py").write_text(script or (ROOT / "train_gpt.py").read_text())
    (folder / "tiny").mkdir(exist_ok=True)
    for split in ("train", "val"):
        (folder / "tiny" / tg.shard_name(split, 0)).touch()
    return Preflight(folder, track)


# Track, seeds and processes, and what is said before anything runs.
ORDERS = [
    ("10min_16mb", 3, 8, []),
    ("10min_16mb", 1, 8, ["--seeds: 1 given, the track asks for 3"]),
    ("10min_16mb", 3, 1, ["--nproc 1: in this track it is 8"]),
    ("1gpu", 1, 8, ["--nproc 8: in this track it is 1"]),
    ("cpu_1mb", 1, 4, []),
]


@pytest.mark.parametrize("track, seeds, nproc, problems", ORDERS)
def test_an_order_that_its_track_does_not_allow_is_refused(tmp_path, track, seeds, nproc, problems):
    preflight(tmp_path)
    assert Preflight(tmp_path, track, seeds, nproc).problems == problems


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


def test_a_track_without_known_limits_is_warned_of(tmp_path):
    warning, *_ = preflight(tmp_path, "cpu_1m").warnings
    assert warning.startswith("track cpu_1m: no limits are known, as of 10min_16mb, ")


def test_a_script_of_somebody_else_may_lack_all_of_these_settings(tmp_path):
    (tmp_path / "train_gpt.py").write_text("print(1)\n")
    found = Preflight(tmp_path, "cpu_1mb")
    assert (found.problems, found.warnings) == ([], [])


FAILS = """
import json, os, pathlib, sys
out = pathlib.Path(os.environ["OUT_DIR"])
out.mkdir()
(out / "result.json").write_text(json.dumps({"exit_code": %d}))
sys.exit(1)
"""


# A run's own exit code, and the advice.
ENDS = [(5, "other settings need another NAME"), (143, "The same command goes on")]


@pytest.mark.parametrize("code, advice", ENDS)
def test_a_seed_that_fails_is_told_by_its_own_exit_code(place, tmp_path, capsys, code, advice):
    """torchrun's is 1 whatever happened."""
    script = tmp_path / "fails.py"
    script.write_text(FAILS % code)
    config = str(place / "config.env")
    arguments = ["--track", "t", "--config", config, "--seeds", "1", "--script", str(script)]
    assert new(place, f"fails{code}", *arguments) == 64
    said = capsys.readouterr().err
    assert f"seed 1 ended with exit code {code}; " in said
    assert advice in said


def test_other_settings_after_a_refusal_are_no_other_record(place, tmp_path):
    """As nothing was run, there is nothing that they could differ from."""
    order = runs.Order(tmp_path, ROOT / "train_gpt.py", place / "config.env", [1])
    runs.take_snapshot(order)
    runs.take_snapshot(dataclasses.replace(order, config=None))
    assert not (tmp_path / "config.env").exists()
    (tmp_path / "seed_1").mkdir()
    with pytest.raises(runs.RecordError, match="left by runs of another config.env"):
        runs.take_snapshot(order)


# --- locks and signals ----------------------------------------------------------------------------


LOCKED_OUT = """
import pathlib, sys
sys.path.insert(0, sys.argv.pop(1))
import record
from tool import runs
runs.LOCK = pathlib.Path(sys.argv.pop(1))
sys.exit(record.main(sys.argv[1:]))
"""


def test_the_lock_keeps_two_runs_apart(place):
    arguments = ["new", "locked", "--track", "t", "--seeds", "1", "--work", str(place / "w2")]
    program = ["-c", LOCKED_OUT, ROOT / "records", runs.LOCK, *arguments]
    with filelock.FileLock(runs.LOCK):
        codes, said = forked(Program(program, clean_env()))
    assert codes == [64]
    assert "another timed run" in said


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


def test_interrupted_collection_goes_on(place, capfd, quick):
    """Killed amid the second seed: the first is kept, the broken attempt stays on the list."""
    slow = place / "slow.env"
    slow.write_text(CONFIG.replace("ITERATIONS=12", "ITERATIONS=30"))
    options = ["--config", str(slow), "--seeds", "1,2", "--no-run"]
    arguments = new_arguments(place, "broken", "--track", "non_record_cpu", *options)
    work = place / "work" / "non_record_cpu_broken"
    work.mkdir(parents=True)
    runs.make_runs(runs.Order(work, ROOT / "train_gpt.py", slow, [1]))
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


ENDLESS = """
import os, pathlib, time
out = pathlib.Path(os.environ["OUT_DIR"])
out.mkdir()
(out / "metrics.jsonl").write_text("{}")
time.sleep(600)
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self").exists(), reason="asks /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_training_does_not_outlive_the_call_that_started_it(place, number):
    """After SIGTERM it is a real one, else a script that starts sooner."""
    config = place / "endless.env"
    config.write_text(CONFIG.replace("ITERATIONS=12", "ITERATIONS=1000000"))
    script = place / "endless.py"
    script.write_text(ENDLESS)
    options = ["--track", "t", "--config", str(config), "--seeds", "1"]
    if number != signal.SIGTERM:
        options += ["--script", str(script)]
    name = f"ended{int(number)}"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "records/record.py"), *new_arguments(place, name, *options)],
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
