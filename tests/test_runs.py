"""Whole runs, as users start them: in one process, in two, interrupted, resumed, damaged."""

import dataclasses
import io
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, TINY_RUN, clean_env, on_device_with

import train_gpt as tg


def run(out, **env):
    """main() in this process -> exit code, result.json, log."""
    code = tg.main([], {**TINY_RUN, "OUT_DIR": str(out), "DEVICE": "cpu", **env})
    log = Path(out, "train.log")
    return (
        code,
        json.loads(Path(out, "result.json").read_text()),
        log.read_text() if log.exists() else "",
    )


def launch(program, out, processes, **env):
    """A program and its arguments under torchrun, as a tiny run on the CPU."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*launcher, f"--nproc_per_node={processes}", *program],
        env=clean_env(**{**TINY_RUN, "OUT_DIR": str(out), "DEVICE": "cpu", **env}),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def torchrun(out, processes, **env):
    done = launch([str(ROOT / "train_gpt.py")], out, processes, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(Path(out, "result.json").read_text())


OTHER_VERDICT = """
import os, sys
sys.path.insert(0, sys.argv[1])
import train_gpt as tg
real = tg.check_score
def check_score(*inputs):
    planted = tg.Check("planted", "seen by one process" if os.environ["RANK"] == "1" else "")
    return [*real(*inputs), planted]
tg.check_score = check_score
code = tg.main([], os.environ)
print(f"rank {os.environ['RANK']} ends with {code}")
sys.exit(code)
"""


def test_processes_agree_on_the_exit_code_after_the_results_are_written(tmp_path):
    """A check that fails on rank 1 alone: rank 0 writes everything, and both end with 6."""
    driver = tmp_path / "driver.py"
    driver.write_text(OTHER_VERDICT)
    out = tmp_path / "run"
    done = launch([str(driver), str(ROOT)], out, 2)
    assert done.returncode == 1, done.stderr
    assert "rank 0 ends with 6" in done.stdout and "rank 1 ends with 6" in done.stdout
    result = json.loads((out / "result.json").read_text())
    assert result["exit_code"] == 6 and set(result["stages"]) == {"plain", "sliding"}
    assert "exit code    6" in (out / "train.log").read_text()


def losses(out):
    rows = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    return np.array([row["train_loss"] for row in rows if "train_loss" in row])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """One finished run with everything on: the others are compared with it."""
    out = tmp_path_factory.mktemp("base") / "run"
    return (out, *run(out, VAL_TOKENS="0", SAVE_EVERY="3", VAL_LOSS_EVERY="3", SAMPLE_TOKENS="8"))


RESULT_FIELDS = set(
    """status mode seed settings overrides config_sha256 code_sha256 versions machine
    world_size resumed data steps train_seconds train_tokens train_loss train_flops
    peak_memory_bytes sizes artifact_sha256 stages result seconds phases_began
    exit_code""".split()
)


def test_end_to_end(base):
    out, code, result, log = base
    assert code == 0 and result["status"] == "finished" and result["exit_code"] == 0
    assert json.loads(log.splitlines()[-1].removeprefix("result_json: ")) == result
    assert set(result) == RESULT_FIELDS
    files = {
        "train.log",
        "metrics.jsonl",
        "result.json",
        "final_model.pt",
        "model.ptz",
        "checkpoint.pt",
        "smoke_data",
    }
    assert {p.name for p in out.iterdir()} == files
    assert result["sizes"]["model"] == (out / "model.ptz").stat().st_size
    assert result["sizes"]["code"] == (ROOT / "train_gpt.py").stat().st_size
    assert set(result["stages"]) == {"plain", "sliding"} and result["result"]["stage"] == "sliding"
    verdicts = [s["audit"] for s in result["stages"].values()]
    assert all(
        found["verdict"] == "PASS"
        for v in verdicts
        for check, found in v.items()
        if check != "plausibility"
    )
    for pattern in (
        r"step:6/6 val_loss:\d+\.\d{4} val_bpb:\d+\.\d{4} train_time:\d+ms",
        r"step:1/6 train_loss:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms",
        r"Code size: \d+ bytes",
        r"Serialized model zstd: \d+ bytes",
        r"Total submission size zstd: \d+ bytes",
        r"final_zstd_sliding_exact val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8}",
        r"sample: ",
        r"exit code    0",
    ):
        assert re.search(pattern, log), pattern
    seconds = result["seconds"]
    named = sum(s for name, s in seconds.items() if name not in ("wall", "train_side", "eval_side"))
    assert abs(named - seconds["wall"]) < 0.02


def test_loss_falls(base):
    values = losses(base[0])
    assert len(values) == 6 and values[-1] < values[0] - 0.5


def test_same_seed_same_score_and_other_seed_another(base, tmp_path):
    _, again, _ = run(tmp_path / "a", VAL_TOKENS="0")
    assert again["result"]["val_bpb"] == base[2]["result"]["val_bpb"]
    assert again["artifact_sha256"] == base[2]["artifact_sha256"]
    _, other, _ = run(tmp_path / "b", VAL_TOKENS="0", SEED="5")
    assert other["result"]["val_bpb"] != again["result"]["val_bpb"]


def test_warm_up_leaves_no_trace(base, tmp_path):
    _, cold, _ = run(tmp_path, WARMUP_STEPS="0")
    assert cold["artifact_sha256"] == base[2]["artifact_sha256"]


def test_eval_from_the_artifact_equals_eval_after_training(base, tmp_path):
    out, _, result, _ = base
    env = dict(
        MODE="eval",
        ARTIFACT=str(out / "model.ptz"),
        DATA_PATH=str(out / "smoke_data"),
        DEVICE="cpu",
        TOKENIZER_PATH="byte260",
        OUT_DIR=str(tmp_path),
    )
    assert tg.main([], env) == 0  # nothing but the artifact and the data
    again = json.loads((tmp_path / "result.json").read_text())
    assert again["status"] == "finished" and again["mode"] == "eval"
    for stage, record in result["stages"].items():
        assert {k: v for k, v in record.items() if k != "seconds"} == {
            k: v for k, v in again["stages"][stage].items() if k != "seconds"
        }


def test_sample_mode(base, tmp_path):
    env = dict(
        MODE="sample",
        ARTIFACT=str(base[0] / "model.ptz"),
        TOKENIZER_PATH="byte260",
        DEVICE="cpu",
        OUT_DIR=str(tmp_path),
        SAMPLE_TOKENS="20",
        SAMPLE_PROMPT="ab",
    )
    texts = []
    for _ in range(2):
        assert tg.main([], env) == 0
        texts.append(re.search(r"\nab.*", (tmp_path / "train.log").read_text())[0])
    assert texts[0] == texts[1] and len(texts[0]) > 10


def test_resume_equals_uninterrupted(tmp_path):
    run(tmp_path / "a", ITERATIONS="3", SAVE_EVERY="3", WARMDOWN_ITERS="0")
    _, straight, _ = run(tmp_path / "b", WARMDOWN_ITERS="0", VAL_TOKENS="0")
    _, resumed, log = run(
        tmp_path / "c", WARMDOWN_ITERS="0", VAL_TOKENS="0", RESUME=str(tmp_path / "a/checkpoint.pt")
    )
    assert resumed["resumed"] and not straight["resumed"] and "resumed run" in log
    assert resumed["artifact_sha256"] == straight["artifact_sha256"]
    assert resumed["result"]["val_bpb"] == straight["result"]["val_bpb"]
    assert np.array_equal(losses(tmp_path / "c"), losses(tmp_path / "b")[3:])


def test_resume_continues_the_plain_average(tmp_path):
    averages = dict(EMA_DECAY="0", SWA_EVERY="1", SWA_START="0", WARMDOWN_ITERS="0")
    run(tmp_path / "a", ITERATIONS="4", SAVE_EVERY="4", **averages)
    _, straight, _ = run(tmp_path / "b", **averages)
    checkpoint = str(tmp_path / "a/checkpoint.pt")
    _, resumed, _ = run(tmp_path / "c", RESUME=checkpoint, **averages)
    assert resumed["artifact_sha256"] == straight["artifact_sha256"]


def test_resume_in_the_same_folder_appends(rt, tmp_path):
    for word, resumed in (("lost", False), ("kept", False), ("more", True)):
        log = tg.RunLog(tmp_path, rt, resumed)
        log.log(word)
        log.metric(word=word)
    assert (tmp_path / "train.log").read_text() == "kept\nmore\n"
    assert (tmp_path / "metrics.jsonl").read_text() == '{"word": "kept"}\n{"word": "more"}\n'


def test_bad_checkpoints(base, tmp_path):
    code, _, log = run(tmp_path / "a", RESUME=str(base[0] / "checkpoint.pt"), MODEL_DIM="64")
    assert code == 64 and "made with other values of MODEL_DIM" in log
    (tmp_path / "cut.pt").write_bytes((base[0] / "checkpoint.pt").read_bytes()[:5000])
    code, _, log = run(tmp_path / "b", RESUME=str(tmp_path / "cut.pt"))
    assert code == 64 and "cut.pt: cannot be read" in log
    torch.save({"step": 3}, tmp_path / "other.pt")
    code, _, log = run(tmp_path / "c", RESUME=str(tmp_path / "other.pt"))
    assert code == 64 and "other.pt: unusable" in log


def test_sigterm_leaves_a_checkpoint_that_continues(tmp_path):
    env = clean_env(
        **{**TINY_RUN, "ITERATIONS": "100000", "OUT_DIR": str(tmp_path / "a"), "DEVICE": "cpu"}
    )
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train_gpt.py")], env=env, stdout=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("step:3/"):
            process.send_signal(signal.SIGUSR1)  # on request: a checkpoint, and on it goes
        if line.startswith("checkpoint: "):
            asked = torch.load(tmp_path / "a/checkpoint.pt", weights_only=True)["step"]
            process.send_signal(signal.SIGTERM)
            break
    process.stdout.read()
    assert process.wait(200) == 143
    result = json.loads((tmp_path / "a/result.json").read_text())
    assert result["status"] == "interrupted" and result["exit_code"] == 143
    steps = torch.load(tmp_path / "a/checkpoint.pt", weights_only=True)["step"]
    assert 3 <= asked < steps
    code, resumed, _ = run(
        tmp_path / "b", ITERATIONS=str(steps + 2), RESUME=str(tmp_path / "a/checkpoint.pt")
    )
    assert code == 0 and resumed["steps"] == steps + 2


def test_divergence_stops_the_run(tmp_path):
    code, result, log = run(tmp_path, MATRIX_LR="1e30", SCALAR_LR="1e30", ITERATIONS="50")
    assert code == 4 and result["status"] == "diverged" and result["steps"] < 50
    assert not (tmp_path / "model.ptz").exists()


def test_over_the_cap_keeps_the_artifact(tmp_path):
    code, result, log = run(tmp_path, MAX_ARTIFACT_BYTES="1000")
    assert (
        code == 2
        and (tmp_path / "model.ptz").exists()
        and "OVER THE CAP" in log
        and result["sizes"]["margin"] < 0
    )


def test_over_the_cap_goes_before_over_time(tmp_path):
    """The size is the artifact's fault, the time may be the machine's."""
    code, result, _ = run(
        tmp_path,
        MAX_ARTIFACT_BYTES="1000",
        MAX_EVAL_SECONDS="0.0001",
        EVAL_BATCH_TOKENS="64",
        EVAL_STRIDE="1",
    )
    assert code == result["exit_code"] == 2 and "skipped" in result["stages"]["sliding"]


def test_seconds_of_phases(rt, tmp_path, monkeypatch):
    """Inner phases are taken out of outer ones; which count against which limit."""
    now = [100.0]
    monkeypatch.setattr(tg.time, "perf_counter", lambda: now[0])
    log = tg.RunLog(tmp_path, rt)

    def spend(name, seconds):
        with log.phase(name):
            now[0] += seconds

    spend("build", 1)
    with log.phase("train"):
        now[0] += 10
        spend("validate", 5)
        now[0] += 20
        spend("validate", 6)
    spend("calibrate", 2)
    for seconds, name in enumerate(("pack", "unpack", "plain", "sliding", "ttt", "audit"), 3):
        spend(name, seconds)
    log.save()
    told = log.result["seconds"]
    assert told["train"] == 30 and told["validate"] == 11 and told["other"] == 0
    assert told["train_side"] == 32 and told["eval_side"] == 4 + 5 + 6 + 7
    assert told["wall"] == 77 and log.result["phases_began"]["validate"] == 11
    for train_limit, eval_limit, schedule, over in (
        (32, 22, "clock", False),
        (31.9, 22, "clock", True),
        (32, 21.9, "clock", True),
        (0, 0, "clock", False),
        (31.9, 22, "tokens", False),
    ):
        cfg = tg.Config(
            max_wallclock_seconds=train_limit, max_eval_seconds=eval_limit, schedule=schedule
        )
        assert tg.over_budget(cfg, log) == over


def test_out_of_memory_names_the_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(tg, "pack_model", lambda *args: torch.empty(1 << 60))
    code, result, log = run(tmp_path)
    assert code == 3 and result["status"] == "out_of_memory" and "MICRO_BATCH_TOKENS=64" in log


def test_a_bug_is_exit_code_one_and_on_record(tmp_path, monkeypatch):
    monkeypatch.setattr(tg, "pack_model", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path)
    assert json.loads((tmp_path / "result.json").read_text())["exit_code"] == 1


def test_prefix_scores_are_not_called_val_bpb(tmp_path):
    code, result, log = run(tmp_path)
    assert (
        code == 0
        and "val_bpb:" not in log.replace("val_bpb:enabled", "")
        and "partial_bpb" in result["result"]
    )


def test_skipped_stage_is_said_and_not_substituted(tmp_path):
    code, result, _ = run(
        tmp_path, MAX_EVAL_SECONDS="0.0001", EVAL_BATCH_TOKENS="64", EVAL_STRIDE="1"
    )
    assert (
        code == 5
        and result["stages"]["sliding"] == {"skipped": "MAX_EVAL_SECONDS"}
        and "result" not in result
    )


def test_clock_schedule_stops_by_itself(tmp_path):
    code, result, log = run(
        tmp_path, SCHEDULE="clock", MAX_WALLCLOCK_SECONDS="2.5", ITERATIONS="100000"
    )
    assert "stopping_early: wallclock_cap" in log and result["status"] == "wallclock_cap"
    # A busy machine can stall one step beyond any forecast; then the exit code must say so.
    assert result["train_seconds"] > 0.5 and code == (5 if result["train_seconds"] > 2.5 else 0)


def log_text(folder):
    return (folder / "train.log").read_text()


class NoData:
    batch = None


@pytest.mark.parametrize("lag", [0, 2])
def test_clock_schedule_ends_just_below_the_cap(lag, tmp_path):
    """On its own clock: steps of 80 to 100 ms, on a device that is `lag` steps behind the host."""
    cfg = tg.Config(
        schedule="clock",
        max_wallclock_seconds=30.0,
        iterations=10**6,
        warmdown_iters=50,
        train_log_every=0,
        val_loss_every=0,
        num_layers=1,
        model_dim=8,
        num_heads=1,
        num_kv_heads=1,
        vocab_size=8,
    )
    rt = tg.Runtime(tg.Config(device="cpu"), {})
    now, busy_until, factors = [100.0], [], []
    on_device_with(rt, lag=lag)
    rt.sync = lambda: now.__setitem__(0, max([now[0], *busy_until[-1:]]))
    trainer = tg.Trainer(
        cfg, rt, tg.RunLog(tmp_path, rt), tg.build_model(cfg, rt), NoData, lambda: now[0]
    )

    def step(batch_of, steps_left):
        factors.append(tg.warmdown(cfg, trainer.steps_done, steps_left))
        start = max([now[0], *busy_until[-1:]])
        busy_until.append(start + (0.08 if trainer.steps_done % 3 else 0.1))
        if len(busy_until) > lag:  # the host reads a report that old
            now[0] = max(now[0], busy_until[-1 - lag])
        return torch.zeros(())

    trainer.step = step
    assert tg.train(trainer, lambda at: None) == "wallclock_cap"
    assert 28.9 < trainer.seconds <= 30.0
    assert (
        factors[0] == 1
        and factors[-1] < 0.2
        and len([f for f in factors if f < 1]) in range(40, 55)
    )


def test_clock_by_hand():
    """Steps of two seconds after a start of four, of a run of 96 seconds and 1,000 steps."""
    now = [1000.0]
    cfg = tg.Config(schedule="clock", max_wallclock_seconds=100, gptq_reserve_seconds=4)
    clock = tg.Clock(dataclasses.replace(cfg, iterations=1000), 2, lambda: now[0])
    clock.last = tg.StepReport(0, 4.0)
    now[0] = 5000.0
    clock.start()  # a resumed run's clock goes on where it was
    assert clock.elapsed() == 4 and not clock.out_of_time()
    clock.before_first_step = 4.0
    now[0] = 5006.0
    with clock.paused():
        now[0] += 500
    assert clock.elapsed() == 10
    for step in (1, 2, 3):
        clock.take(tg.StepReport(step, 4 + 2 * step))
    assert clock.steps_left(3) == (96 - 10) / 2  # 2 seconds a step
    assert clock.steps_left(5) == (96 - 10) / 2 - 2  # two are in flight
    assert clock.progress(5) == 10 / 96
    # In flight at the report, two since then and one more: five steps of 2.2 seconds.
    for elapsed, over in ((84.9, False), (85.1, True)):
        clock.last = tg.StepReport(40, elapsed)
        assert clock.out_of_time() == over
    by_count = tg.Clock(tg.Config(schedule="tokens", iterations=10), 0)
    assert by_count.steps_left(3) == 7 and by_count.progress(3) == 0.3


def test_train_time_of_a_validation_line_is_training_time(tmp_path, monkeypatch):
    """Half an hour of validation does not show in it."""
    now = [0.0]
    cfg = tg.Config(**dict(TINY, vocab_size=8), val_tokens=1)
    rt = tg.Runtime(tg.Config(device="cpu"), {})
    log = tg.RunLog(tmp_path, rt)
    trainer = tg.Trainer(cfg, rt, log, tg.build_model(cfg, rt), NoData, lambda: now[0])
    trainer.clock.start()
    now[0] = 3.0

    def slow(*args):
        now[0] += 1800
        nats = np.ones(1, np.float32)
        return tg.Score("validate", nats, np.ones(1), np.ones(1), complete=False, loss=1.0, bpb=2.0)

    monkeypatch.setattr(tg, "evaluate", slow)
    monkeypatch.setattr(tg, "load_validation", lambda cfg: np.zeros(2))
    with trainer.off_the_clock("validate"):
        tg.Validator(trainer, None)(7)
    assert "val_loss:1.0000 partial_bpb:2.0000 train_time:3000ms" in log_text(tmp_path)
    assert trainer.clock.elapsed() == 3.0


@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.parametrize("stop", [False, True])
def test_a_signal_saves_once(stop, lag, tmp_path, monkeypatch):
    """SIGUSR1 in step 3: one checkpoint, and the run goes on; SIGTERM: it ends there."""
    cfg = tg.Config(
        num_layers=1, model_dim=8, num_heads=1, num_kv_heads=1, vocab_size=8, iterations=9
    )
    cfg = dataclasses.replace(cfg, schedule="tokens", val_loss_every=0)
    rt, saved = tg.Runtime(tg.Config(device="cpu"), {}), []
    on_device_with(rt, lag=lag)
    trainer = tg.Trainer(cfg, rt, tg.RunLog(tmp_path, rt), tg.build_model(cfg, rt), NoData)
    monkeypatch.setattr(tg, "save_checkpoint", lambda trainer: saved.append(trainer.steps_done))

    def step(batch_of, steps_left):
        if trainer.steps_done == 2:
            signal.raise_signal(signal.SIGTERM if stop else signal.SIGUSR1)
        return torch.zeros(())

    trainer.step = step
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    assert tg.train(trainer, lambda at: None) == ("interrupted" if stop else "finished")
    assert saved == [3 + lag] and trainer.steps_done == (3 + lag if stop else 9)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


def test_several_seeds_end_with_the_highest_code(rt, tmp_path, monkeypatch):
    codes = {1: 0, 2: 5, 3: 2}
    monkeypatch.setattr(tg, "guarded_run", lambda cfg, rt: (codes[cfg.seed], {}))
    assert tg.run_seeds(tg.Config(seeds=(1, 2, 3), out_dir=str(tmp_path)), rt) == 5


def test_seeds_print_mean_and_deviation(tmp_path, capsys):
    env = dict(OUT_DIR=str(tmp_path), DEVICE="cpu", VAL_TOKENS="0", SEEDS="1,2", EVAL_STRIDE="0")
    assert tg.main([], {**TINY_RUN, **env}) == 0
    results = [json.loads((tmp_path / f"seed_{seed}/result.json").read_text()) for seed in (1, 2)]
    scores = [result["result"]["val_bpb"] for result in results]
    printed = re.search(r"seeds:1,2 val_bpb mean:(\S+) std:(\S+) n:2", capsys.readouterr().out)
    assert (
        abs(float(printed[1]) - np.mean(scores)) < 1e-6
        and abs(float(printed[2]) - np.std(scores, ddof=1)) < 1e-6
    )


def test_damaged_artifact_and_wrong_tokenizer(base, tmp_path):
    raw = (base[0] / "model.ptz").read_bytes()
    (tmp_path / "cut.ptz").write_bytes(raw[:-7])
    common = dict(
        MODE="eval", DEVICE="cpu", TOKENIZER_PATH="byte260", DATA_PATH=str(base[0] / "smoke_data")
    )
    for env, code in (
        (dict(ARTIFACT=str(tmp_path / "cut.ptz")), 64),
        (dict(ARTIFACT=str(tmp_path / "none.ptz")), 64),
        (dict(ARTIFACT=str(base[0] / "model.ptz"), NUM_LAYERS="5"), 64),
        # Its windows are 64.
        (dict(ARTIFACT=str(base[0] / "model.ptz"), EVAL_STRIDE="512"), 64),
    ):
        assert tg.main([], {**common, "OUT_DIR": str(tmp_path / "out"), **env}) == code
    stored, weights = tg.unpack(raw)
    (tmp_path / "foreign.ptz").write_bytes(tg.pack(weights, stored, notes={"tokenizer": "0" * 64}))
    assert (
        tg.main(
            [],
            {**common, "OUT_DIR": str(tmp_path / "out"), "ARTIFACT": str(tmp_path / "foreign.ptz")},
        )
        == 64
    )
    assert "trained with another tokenizer" in (tmp_path / "out/train.log").read_text()


def test_absurd_settings_in_an_artifact_cost_no_memory(base, tmp_path):
    stored, weights = tg.unpack((base[0] / "model.ptz").read_bytes())
    huge = dataclasses.replace(
        stored, num_layers=200, model_dim=65536, num_heads=512, num_kv_heads=512
    )
    (tmp_path / "huge.ptz").write_bytes(tg.pack(weights, huge))
    env = dict(
        MODE="eval",
        ARTIFACT=str(tmp_path / "huge.ptz"),
        DATA_PATH=str(base[0] / "smoke_data"),
        DEVICE="cpu",
        TOKENIZER_PATH="byte260",
        OUT_DIR=str(tmp_path / "out"),
    )
    before = tg.Runtime.peak_memory(tg.Runtime(tg.Config(device="cpu"), {}))
    assert tg.main([], env) == 64
    assert "do not fit its settings" in (tmp_path / "out/train.log").read_text()
    assert tg.Runtime.peak_memory(tg.Runtime(tg.Config(device="cpu"), {})) - before < 100e6


def test_runs_from_inside_a_record_folder(tmp_path):
    """Script and config.env copied elsewhere: the settings are found, and count as code."""
    folder = tmp_path / "records" / "track" / "mine"
    folder.mkdir(parents=True)
    (folder / "train_gpt.py").write_bytes((ROOT / "train_gpt.py").read_bytes())
    env = {**TINY_RUN, "ITERATIONS": "2"}
    (folder / "config.env").write_text(
        "".join(f"{name}={value}\n" for name, value in env.items() if name != "SMOKE")
    )
    env = clean_env(SMOKE="1", DEVICE="cpu", OUT_DIR="out")
    done = subprocess.run(
        [sys.executable, "train_gpt.py"],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((folder / "out/result.json").read_text())
    assert result["steps"] == 2
    assert result["sizes"]["code"] == sum(p.stat().st_size for p in folder.iterdir() if p.is_file())


def test_two_processes_equal_one(tmp_path):
    settings = dict(
        VAL_TOKENS="0", SAVE_EVERY="5", VAL_LOSS_EVERY="5", ITERATIONS="10", EVAL_STRIDE="48"
    )
    two = torchrun(tmp_path / "two", 2, **settings)
    _, one, _ = run(tmp_path / "one", **settings)
    a, b = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(a) == len(b) == 10 and np.abs(a / b - 1).max() < 1e-5
    # Other rounding, other codes.
    assert abs(one["result"]["val_loss"] - two["result"]["val_loss"]) < 1e-3
    env = dict(
        MODE="eval",
        ARTIFACT=str(tmp_path / "two/model.ptz"),
        DATA_PATH=str(tmp_path / "two/smoke_data"),
    )
    _, alone, _ = run(tmp_path / "eval1", **env, VAL_TOKENS="0")
    again = torchrun(tmp_path / "eval2", 2, **env, VAL_TOKENS="0")
    assert abs(again["result"]["val_loss"] - alone["result"]["val_loss"]) < 1e-6


def test_adaptation_oracle_and_caches_do_not_depend_on_the_number_of_processes(tmp_path):
    """Mixer head, late QAT, penalty, GPTQ calibration, averaging.

    And score-first adaptation under a gated cache.
    """
    settings = dict(
        MIXER_HEAD="1",
        NGRAM="gated",
        NGRAM_BUCKETS="4096",
        NGRAM_CHUNK_TOKENS="128",
        TTT_EPOCHS="1",
        TTT_CHUNK_TOKENS="128",
        TTT_PARTS="2",
        TTT_BATCH_SEQS="1",
        TTT_TEMPERATURE="0.9",
        QTTT="1",
        TTT_FREEZE_BLOCKS="1",
        BYTE_WEIGHTED_TTT="1",
        LATE_QAT_THRESHOLD="0.9",
        CROWN_Q_LAMBDA="1",
        SWA_EVERY="2",
        GPTQ_N_SAMPLES="4",
        PRUNE_PCT="0.1",
        EVAL_BATCH_TOKENS="256",
    )
    two = torchrun(tmp_path / "two", 2, **settings)
    _, one, log = run(tmp_path / "one", **settings)
    assert np.abs(losses(tmp_path / "one") / losses(tmp_path / "two") - 1).max() < 1e-4
    assert (
        "late_qat:enabled" in log
        and "prefilled" in log
        and one["exit_code"] == two["exit_code"] == 0
    )
    assert one["seconds"]["calibrate"] > 0 and one["result"]["stage"] == "ttt"
    assert (
        one["stages"]["ngram"]["metric"] == "unnormalised_score"
        and one["stages"]["ngram"]["mass"] > 1.5
    )
    env = dict(
        MODE="eval",
        ARTIFACT=str(tmp_path / "two/model.ptz"),
        DATA_PATH=str(tmp_path / "two/smoke_data"),
    )
    _, alone, _ = run(tmp_path / "eval1", **env)
    again = torchrun(tmp_path / "eval2", 2, **env)
    for name in ("sliding", "ttt", "ngram"):
        assert abs(again["stages"][name]["loss"] - alone["stages"][name]["loss"]) < 1e-5, name


def test_training_opens_no_validation_file_before_the_artifact_is_written(tmp_path, monkeypatch):
    seen, real = [], tg.read_shard

    def watched(path):
        if "fineweb_val" in str(path):
            seen.append((tmp_path / "model.ptz").is_file())
        return real(path)

    monkeypatch.setattr(tg, "read_shard", watched)
    assert run(tmp_path, VAL_LOSS_EVERY="0")[0] == 0
    assert seen and all(seen)


def test_ledger_writes_whole_files_only(tmp_path):
    path = tmp_path / "x.json"
    tg.atomic_write(path, b"old")
    with pytest.raises(TypeError):
        tg.atomic_write(path, io.StringIO("no bytes"))
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["x.json"]
