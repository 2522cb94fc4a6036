"""Who holds, ends and goes on with the runs of a record: locks, signals, interrupted calls."""

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
from tool import runs

pytestmark = pytest.mark.usefixtures("own_machine")


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
    slow.write_text(CONFIG.replace("ITERATIONS=12", "ITERATIONS=60"))
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
