"""What users lose nothing by (section 13): signals, full disks, used folders, restarts."""

import functools
import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, clean_env
from helpers import (
    Program,
    forked,
    free_port,
    in_processes,
    log_of,
    python,
    result_of,
    run,
    run_in_processes,
    tiny_env,
    tiny_settings,
    torchrun,
)

import train_gpt as tg

SCRIPT = ROOT / "train_gpt.py"


# --- signals --------------------------------------------------------------------------------------


def when_said(patch, name, action):
    """Before the script's function of that name runs, the action does, once."""
    real = getattr(tg, name)
    left = [action]

    def acted(*args, **kwargs):
        if left:
            left.pop()()
        return real(*args, **kwargs)

    patch.setattr(tg, name, acted)


PLACES = ["shard_paths", "warm_up", "load_artifact", "evaluate", "check_score"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("place", PLACES)
def test_a_signal_anywhere_ends_on_record(place, number, tmp_path, monkeypatch):
    """While loading, warming up, unpacking, scoring and checking."""
    when_said(monkeypatch, place, lambda: signal.raise_signal(number))
    code, result, log = run(tmp_path / "out")
    assert code == result["exit_code"] == 143
    assert result["status"] == "interrupted"
    assert f"interrupted: {number.name}" in log
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("place", ["save_training", "calibrate", "pack_model", "pack"])
def test_a_signal_after_the_last_step_waits_for_the_artifact(place, tmp_path, monkeypatch):
    """Nothing of a training that has ended is lost."""
    when_said(monkeypatch, place, lambda: signal.raise_signal(signal.SIGTERM))
    out = tmp_path / "out"
    code, result, log = run(out, GPTQ_N_SAMPLES="2")
    assert code == 143
    assert result["artifact_sha256"]
    assert "after the artifact was written" in log
    places = dict(ARTIFACT=str(out / "model.ptz"), DATA_PATH=str(out / "smoke_data"))
    code, again, _ = run(tmp_path / "eval", MODE="eval", **places)
    assert code == 0
    assert again["stages"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_in_training_leaves_a_checkpoint(number, tmp_path, monkeypatch):
    """And the training goes on from there to the same end."""
    monkeypatch.setattr(signal, "SIG_IGN", None)  # as if no nohup had started these tests
    when_said(monkeypatch, "clip_gradients", lambda: signal.raise_signal(number))
    settings = dict(GRAD_CLIP_NORM="1", VAL_TOKENS="0", WARMUP_STEPS="0")
    code, result, _ = run(tmp_path / "a", **settings)
    assert (code, result["status"], result["steps"]) == (143, "interrupted", 1)
    _, straight, _ = run(tmp_path / "b", **settings)
    checkpoint = str(tmp_path / "a/checkpoint.pt")
    _, resumed, _ = run(tmp_path / "a", RESUME=checkpoint, **settings)
    assert resumed["artifact_sha256"] == straight["artifact_sha256"]


def test_a_hang_up_that_is_ignored_ends_nothing(tmp_path, monkeypatch):
    """Under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        when_said(monkeypatch, "clip_gradients", lambda: signal.raise_signal(signal.SIGHUP))
        code, result, _ = run(tmp_path, GRAD_CLIP_NORM="1", VAL_TOKENS="0", WARMUP_STEPS="0")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (code, result["steps"]) == (0, 6)


def test_sigusr1_outside_training_does_no_harm(tmp_path, monkeypatch):
    when_said(monkeypatch, "shard_paths", lambda: signal.raise_signal(signal.SIGUSR1))
    when_said(monkeypatch, "load_artifact", lambda: signal.raise_signal(signal.SIGUSR1))
    assert run(tmp_path / "out")[0] == 0


def test_a_second_signal_does_not_spoil_the_record(tmp_path, monkeypatch):
    """As torchrun sends one to who has had the terminal's."""
    when_said(monkeypatch, "evaluate", lambda: signal.raise_signal(signal.SIGINT))
    when_said(monkeypatch, "result_card", lambda: signal.raise_signal(signal.SIGTERM))
    code, result, log = run(tmp_path / "out")
    assert code == result["exit_code"] == 143
    assert "exit code    143 (interrupted)" in log


def test_finished_is_written_last(tmp_path, monkeypatch):
    told = []
    when_said(monkeypatch, "evaluate", lambda: told.append(result_of(tmp_path / "out")))
    _, result, _ = run(tmp_path / "out")
    assert told[0]["status"] == "started"
    assert "exit_code" not in told[0]
    assert result["status"] == "finished"


def test_a_sweep_ends_with_a_signal(tmp_path, monkeypatch, capsys):
    when_said(monkeypatch, "evaluate", lambda: signal.raise_signal(signal.SIGINT))
    env = tiny_settings(tmp_path, SEEDS="1,2,3")
    assert tg.main([], env) == 143
    assert not (tmp_path / "seed_2").exists()
    assert "exit codes by seed:{1: 143}" in capsys.readouterr().out


# --- places that cannot be written, or are in use -------------------------------------------------


def failing(patch, *names):
    """Files of these names cannot be written; all others can."""
    error = OSError(28, "No space left on device")
    write, opened = tg.atomic_write, open

    def atomic_write(path, data):
        if path.name in names:
            raise error
        write(path, data)

    def opening(path, mode="r", **options):
        if "a" in mode and os.path.basename(path) in names:
            raise error
        return opened(path, mode, **options)

    patch.setattr(tg, "atomic_write", atomic_write)
    patch.setattr(tg, "open", opening, raising=False)


OPTIONAL = ["checkpoint.pt", "final_model.pt", "metrics.jsonl", "train.log"]


@pytest.mark.parametrize("name", OPTIONAL)
def test_what_a_run_can_do_without_is_a_warning(name, tmp_path, monkeypatch, capsys):
    failing(monkeypatch, name)
    code, result, _ = run(tmp_path / "out", SAVE_EVERY="2")
    assert code == 0
    assert result["status"] == "finished"
    said = capsys.readouterr().out
    assert said.count(f"{name}: cannot be written (No space left on device)") == 1


def test_an_artifact_that_cannot_be_written_is_a_clear_error(tmp_path, monkeypatch):
    failing(monkeypatch, "model.ptz")
    code, result, log = run(tmp_path / "out")
    assert code == result["exit_code"] == 64
    assert "error: [Errno 28] No space left on device" in log


def test_a_result_that_cannot_be_written_is_an_error_at_the_end(tmp_path, monkeypatch, capsys):
    failing(monkeypatch, "result.json")
    env = tiny_settings(tmp_path / "out")
    assert tg.main([], env) == 64
    said = capsys.readouterr().out
    assert "final_zstd_sliding_exact" in said
    assert "exit code    64" in said


def test_the_artifact_comes_before_the_raw_weights(tmp_path, monkeypatch):
    order = []
    write = tg.atomic_write

    def noted(path, data):
        order.append(path.name)
        write(path, data)

    monkeypatch.setattr(tg, "atomic_write", noted)
    run(tmp_path / "out")
    assert order.index("model.ptz") < order.index("final_model.pt")


# Bytes that any file of a run may have; the smallest file that is then cut off is named.
@pytest.mark.parametrize("limit", [pytest.param(0, marks=pytest.mark.slow), 100, 2_000, 20_000])
def test_files_of_limited_size(limit, tmp_path):
    """The limit that `ulimit -f` sets; a run's own log is among the files."""
    bounded = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
    env = tiny_env(tmp_path / "out")
    codes, said = forked(Program([SCRIPT], env, first=bounded))
    assert codes == [64]
    assert "Traceback" not in said
    assert "File too large" in said
    left = {path.name for path in (tmp_path / "out").glob("*.tmp")}
    assert not left


def bad_places(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    return {
        "a file": file,
        "below a file": file / "out",
        "too long": tmp_path / ("x" * 300),
        "no folder": "/proc/none/out",
    }


@pytest.mark.parametrize("kind", ["a file", "below a file", "too long", "no folder"])
def test_a_place_that_is_no_folder_is_named(kind, tmp_path, capsys):
    place = bad_places(tmp_path)[kind]
    assert tg.main([], tiny_settings(place)) == 64
    assert f"OUT_DIR={str(place)!r}: cannot be used" in capsys.readouterr().err


def test_two_runs_in_one_folder(tmp_path, capsys):
    """The second is refused, and the first loses nothing."""
    out = tmp_path / "out"
    with tg.locked(out):
        (out / "train.log").write_text("of the first\n")
        assert tg.main([], tiny_settings(out)) == 64
    assert "another run is writing there" in capsys.readouterr().err
    assert log_of(out) == "of the first\n"
    assert run(out)[0] == 0


def test_the_lock_ends_with_its_process(tmp_path):
    """However that ended."""
    code = "import train_gpt as tg, os, pathlib\n"
    code += f"with tg.locked(pathlib.Path({str(tmp_path)!r})): os.kill(os.getpid(), 9)"
    done = python(["-c", code], clean_env(PYTHONPATH=str(ROOT)))
    assert done.returncode == -9
    with tg.locked(tmp_path):
        pass


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert run(out)[0] == 0
    return out


@pytest.mark.parametrize("started_again", ["0", "1"])
def test_a_finished_run_is_not_overwritten(started_again, finished, capsys):
    """Not by torchrun, either, which starts again what failed while it was scored."""
    before = {path: path.read_bytes() for path in finished.iterdir() if path.is_file()}
    env = tiny_settings(finished)
    assert tg.main([], {**env, "TORCHELASTIC_RESTART_COUNT": started_again}) == 64
    assert "holds an artifact, model.ptz" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("mode", ["eval", "sample"])
def test_other_modes_write_beside_the_log_of_the_training(mode, finished):
    """The artifact is OUT_DIR's own unless another is named."""
    before = log_of(finished)
    env = dict(MODE=mode, OUT_DIR=str(finished), RUN_ID="again", DEVICE="cpu", SAMPLE_TOKENS="3")
    data = dict(DATA_PATH=str(finished / "smoke_data"), TOKENIZER_PATH="byte260")
    assert tg.main([], {**env, **data}) == 0
    assert log_of(finished) == before
    assert "exit code    0" in log_of(finished / f"{mode}_again")


def test_drafts_of_a_killed_run_are_cleaned_up(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".model.ptz.123.tmp").write_bytes(b"half")
    assert run(out)[0] == 0
    assert not list(out.glob(".*.tmp"))


# --- terminals and pipes --------------------------------------------------------------------------


@pytest.mark.slow
def test_a_terminal_that_lacks_letters(tmp_path):
    """A sample of random bytes, printed where only Western European letters are."""
    env = tiny_env(tmp_path / "out", SAMPLE_TOKENS="60", PYTHONIOENCODING="cp1252", ITERATIONS="2")
    done = subprocess.run([sys.executable, str(SCRIPT)], env=env, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_reader_that_goes_away_does_not_end_the_run(tmp_path):
    """python train_gpt.py | head -1"""
    read, write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT)], env=tiny_env(tmp_path / "out"), stdout=write
    )
    os.close(write)
    os.read(read, 10)
    os.close(read)
    assert process.wait(200) == 0
    assert "exit code    0" in log_of(tmp_path / "out")


# --- numbers that are none ------------------------------------------------------------------------


def refuse_constant(name):
    raise ValueError(f"{name} is not JSON")


def test_a_diverged_run_writes_json(tmp_path):
    code, result, log = run(tmp_path, MATRIX_LR="1e30", SCALAR_LR="1e30", ITERATIONS="50")
    assert code == 4
    assert result["train_loss"] is None
    last = log.splitlines()[-1].removeprefix("result_json: ")
    texts = [(tmp_path / "result.json").read_text(), last]
    texts += (tmp_path / "metrics.jsonl").read_text().splitlines()
    for text in texts:
        json.loads(text, parse_constant=refuse_constant)
    assert json.loads(texts[-1])["train_loss"] is None


# --- torchrun starts a run again ------------------------------------------------------------------

FAILS_ONCE = """
import os, pathlib, sys
sys.path.insert(0, sys.argv[1])
import train_gpt as tg
real = tg.save_checkpoint
def save_checkpoint(trainer):
    real(trainer)
    again = os.environ["TORCHELASTIC_RESTART_COUNT"] == "1"
    if not again and trainer.rt.rank == 1 and trainer.steps_done == 4:
        os.kill(os.getpid(), 9)
tg.save_checkpoint = save_checkpoint
sys.exit(tg.main([], os.environ))
"""


def test_a_restart_by_torchrun_goes_on_from_the_checkpoint(tmp_path):
    """One process is killed; the log is not begun anew, and the end is that of a straight run."""
    driver = tmp_path / "driver.py"
    driver.write_text(FAILS_ONCE)
    env = tiny_env("", SAVE_EVERY="2", VAL_TOKENS="0", WARMUP_STEPS="0")
    env.pop("OUT_DIR")
    options = ["--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    codes, said = forked(torchrun(options, [driver, ROOT], env, tmp_path))
    assert codes == [0], said
    (out,) = (tmp_path / "logs").iterdir()
    log = log_of(out)
    assert "step:1/6" in log
    assert re.search("resumed:.*checkpoint.pt step:[24] ", log)
    straight = run_in_processes(tmp_path / "straight", 2, VAL_TOKENS="0", WARMUP_STEPS="0")
    assert result_of(out)["artifact_sha256"] == straight["artifact_sha256"]


# --- errors of one process ------------------------------------------------------------------------


def fails_on_rank_one(env, settings, name, call):
    """main() with a function that fails on rank 1, from its call of that number on."""
    owner, attribute = (tg.TokenStream, "take") if name == "take" else (tg, name)
    real = getattr(owner, attribute)
    calls = []

    def failing(*args, **kwargs):
        calls.append(args)
        if env["RANK"] == "1" and len(calls) >= call:
            raise tg.InputError("the disk of rank 1 is gone")
        return real(*args, **kwargs)

    setattr(owner, attribute, failing)
    code = tg.main([], {**settings, **env})
    assert code == 64, code


# Where one of two processes fails, and from which call on.
ONE_FAILS = [
    ("read_shard", 1),
    ("take", 1),
    ("take", 7),
    ("load_validation", 1),
    ("load_artifact", 1),
]


@pytest.mark.parametrize("name, call", ONE_FAILS)
def test_an_error_of_one_process_ends_all_with_its_reason(name, call, tmp_path):
    settings = tiny_settings(tmp_path / "out", SAVE_EVERY="1")
    in_processes(2, tmp_path, fails_on_rank_one, settings, name, call)
    result = result_of(tmp_path / "out")
    assert (result["status"], result["exit_code"]) == ("bad_input", 64)
    assert "error: process 1: the disk of rank 1 is gone" in log_of(tmp_path / "out")


def test_a_checkpoint_that_only_rank_zero_has_serves_all(tmp_path):
    """As on two nodes: the others do not read it."""
    run_in_processes(tmp_path / "a", 2, ITERATIONS="3", SAVE_EVERY="3", WARMDOWN_ITERS="0")
    checkpoint = tmp_path / "a/checkpoint.pt"
    settings = dict(RESUME=str(checkpoint), WARMDOWN_ITERS="0", VAL_TOKENS="0")
    settings = tiny_settings(tmp_path / "b", **settings)
    in_processes(2, tmp_path, reads_on_rank_zero_only, settings)
    straight = run_in_processes(tmp_path / "c", 2, WARMDOWN_ITERS="0", VAL_TOKENS="0")
    assert result_of(tmp_path / "b")["artifact_sha256"] == straight["artifact_sha256"]


def reads_on_rank_zero_only(env, settings):
    if env["RANK"] != "0":
        Path.read_bytes = None
    assert tg.main([], {**settings, **env}) == 0


def restarted_in_its_folder(env, settings, folder):
    """main() of a process that torchrun has started again, on a disk of its own."""
    os.chdir(folder / f"node{env['RANK']}")
    again = dict(LOCAL_RANK="0", TORCHELASTIC_RESTART_COUNT="1")  # alone on its node
    assert tg.main([], {**settings, **env, **again}) == 0


def test_a_restart_of_two_nodes_resumes_what_the_first_one_has(tmp_path):
    """The second node's disk has no checkpoint: the first decides for all."""
    (tmp_path / "node1").mkdir()
    out = tmp_path / "node0/out"
    out.mkdir(parents=True)
    same = dict(WARMDOWN_ITERS="0", VAL_TOKENS="0")
    run_in_processes(out, 2, ITERATIONS="3", SAVE_EVERY="3", **same)
    (out / "model.ptz").unlink()
    settings = tiny_settings("out", **same)
    in_processes(2, tmp_path, restarted_in_its_folder, settings, tmp_path)
    straight = run_in_processes(tmp_path / "straight", 2, **same)
    assert result_of(out)["resumed"]
    assert result_of(out)["artifact_sha256"] == straight["artifact_sha256"]


# --- two nodes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_nodes(shared, tmp_path):
    """Two agents, with disks of their own or one that they share."""
    port = free_port()
    agents = []
    for node in range(2):
        folder = tmp_path if shared else tmp_path / f"node{node}"
        folder.mkdir(exist_ok=True)
        env = tiny_env("out", WARMUP_STEPS="0", ITERATIONS="2")
        options = ["--nnodes=2", f"--node_rank={node}", "--nproc_per_node=1"]
        options += ["--master_addr=127.0.0.1", f"--master_port={port}"]
        agents.append(torchrun(options, [SCRIPT], env, folder))
    codes, said = forked(*agents)
    assert codes == [0, 0], said
    first = tmp_path if shared else tmp_path / "node0"
    assert result_of(first / "out")["world_size"] == 2
    if not shared:
        assert not (tmp_path / "node1/out/train.log").exists()
