"""Several processes of which one is slow, wrong or of another opinion: all end, and alike."""

import dataclasses
import functools
import time

import pytest
from helpers import in_processes, log_of, result_of, tiny_settings

import train_gpt as tg


def patched_run(env, settings, place, replacement, code):
    """main() of one process; in the last one the function at that place is another."""
    if int(env["RANK"]) == int(env["WORLD_SIZE"]) - 1:
        *owners, name = place.split(".")
        owner = functools.reduce(getattr, owners, tg)
        real = getattr(owner, name)
        setattr(owner, name, lambda *args, **kwargs: replacement(real, *args, **kwargs))
    assert tg.main([], {**settings, **env}) == code


def slowly(real, *args, **kwargs):
    time.sleep(0.1)
    return real(*args, **kwargs)


def one_failed(real, *args, **kwargs):
    first, *others = real(*args, **kwargs)
    return [dataclasses.replace(first, problem="as the test wants it"), *others]


def not_a_number(real, *args, **kwargs):
    return real(*args, **kwargs) * float("nan")


def late_by_its_clock(real, guard, share):
    guard.since = guard.start = -1e9
    return real(guard, share)


WORLDS = pytest.mark.parametrize("world", [2, 3])


def run_with_one_changed(tmp_path, world, place, replacement, code, **env):
    """A tiny run whose steps the processes share evenly, the last one changed -> result.json."""
    batch = dict(TRAIN_BATCH_TOKENS=str(64 * 2 * world), MICRO_BATCH_TOKENS="64")
    settings = tiny_settings(tmp_path / "out", **batch, **env)
    in_processes(world, tmp_path, patched_run, settings, place, replacement, code)
    return result_of(tmp_path / "out")


@WORLDS
def test_a_slow_process_is_waited_for(world, tmp_path):
    limit = dict(SCHEDULE="clock", MAX_WALLCLOCK_SECONDS="60")
    result = run_with_one_changed(tmp_path, world, "Trainer.step", slowly, 0, **limit)
    assert (result["status"], result["exit_code"], result["steps"]) == ("finished", 0, 6)
    assert set(result["stages"]) == {"plain", "sliding"}
    assert result["train_seconds"] > 0.5


@WORLDS
def test_a_verdict_of_one_process_is_that_of_all(world, tmp_path):
    """The results are written before any process leaves."""
    code = tg.AUDIT_FAILED
    result = run_with_one_changed(tmp_path, world, "check_score", one_failed, code)
    assert (result["status"], result["exit_code"]) == ("finished", code)
    assert set(result["stages"]) == {"plain", "sliding"}
    assert "exit code    6" in log_of(tmp_path / "out")


@WORLDS
def test_a_loss_that_is_no_number_in_one_process_ends_all(world, tmp_path):
    result = run_with_one_changed(tmp_path, world, "GPT.forward", not_a_number, tg.DIVERGED)
    assert (result["status"], result["exit_code"]) == ("diverged", tg.DIVERGED)


@WORLDS
def test_no_time_left_by_one_clock_is_no_time_for_all(world, tmp_path):
    """Rank 0's clock decides on stages, whatever the others' say."""
    limit = dict(MAX_EVAL_SECONDS="600")
    place = "TimeGuard.fits"
    result = run_with_one_changed(tmp_path, world, place, late_by_its_clock, 0, **limit)
    assert not [stage for stage in result["stages"].values() if "skipped" in stage]
