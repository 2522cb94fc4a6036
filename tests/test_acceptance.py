"""The acceptance of a GPU machine (tests/gpu), rehearsed on the CPU, and what it says of failures.

What a GPU alone can show is not here: kernels, graphs, NCCL.
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, clean_env
from record_help import descendants_of, wait_until_dead

FOLDER = ROOT / "tests/gpu"
SYSTEMS = [path.parent.name for path in ROOT.glob("records/track_10min_16mb/2*/config.env")]
STAGES = """plain plain|plain sliding|windows plain|windows sliding|stream streaming|stream mixed
    |ttt ttt|adapters ttt|2026-03-22_pr489 ttt|2026-03-25_pr740_v1 ngram|2026-03-25_pr740_v2 ngram
    |2026-03-26_pr834 ttt|2026-03-26_pr834 ngram|2026-03-26_pr859 ngram"""
CHECKS = ["device", "group", "refusals", "plain", "signal", "systems", "steps", "code"]


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """Exit code, what was printed, and the figures of a whole rehearsal."""
    out = tmp_path_factory.mktemp("acceptance") / "out"
    done = subprocess.run(
        [sys.executable, str(FOLDER / "acceptance.py"), "--dry", "--out", str(out)],
        env=clean_env(TRAIN_BATCH_TOKENS="7"),  # a setting of the shell's must not disturb it
        cwd=out.parent,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    return (
        done.returncode,
        done.stdout + done.stderr,
        json.loads((out / "acceptance.json").read_text()),
    )


@pytest.fixture
def parts(monkeypatch):
    """The acceptance's modules."""
    monkeypatch.syspath_prepend(FOLDER)
    import acceptance
    import advice
    import pod

    return acceptance, advice, pod


def test_every_check_passes(rehearsal):
    code, text, figures = rehearsal
    failed = [finding for finding in figures["findings"] if not finding["passed"]]
    assert (code, failed, figures["failed"]) == (0, [], 0), text[-3000:]
    assert list(dict.fromkeys(finding["check"] for finding in figures["findings"])) == CHECKS


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="asks /proc")
@pytest.mark.parametrize("number, code", [(signal.SIGHUP, 1), (signal.SIGKILL, -9)])
def test_a_hang_up_leaves_a_report_and_no_job(number, code, tmp_path):
    """As when the connection to a rented machine is lost: a job would keep its GPU for ever."""
    out = tmp_path / "out"
    program = [sys.executable, str(FOLDER / "acceptance.py"), "--dry", "--out", str(out)]
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup may have started these tests
    process = subprocess.Popen(
        [*program, "--only", "signal"], env=clean_env(), stdout=subprocess.DEVNULL
    )
    signal.signal(signal.SIGHUP, before)
    jobs = []
    while len(jobs) < 2 and process.poll() is None:  # torchrun and what trains without end
        time.sleep(0.05)
        jobs = descendants_of(process.pid)
    process.send_signal(number)
    assert process.wait(120) == code
    if number == signal.SIGHUP:
        figures = json.loads((out / "acceptance.json").read_text())
        failed = [row["value"] for row in figures["findings"] if not row["passed"]]
        assert failed == ["interrupted"]
    for job in jobs:
        wait_until_dead(job)


def test_every_system_was_trained_and_compared(rehearsal):
    _, text, figures = rehearsal
    assert len(SYSTEMS) >= 6
    assert set(figures["systems"]) == set(SYSTEMS)
    for name, row in figures["systems"].items():
        assert row["ms"] > 0 and row["ms_together"] > 0, name
        assert row["recompiles"] == 0 and row["memory"] > 0, name
        assert row["gap"] < 1e-5, name  # both are float32 here
    assert all(f"\n{name} " in text for name in SYSTEMS)


def test_every_stage_was_scored_and_projected(rehearsal):
    _, text, figures = rehearsal
    wanted = [name.strip() for name in STAGES.split("|")]
    assert set(wanted) <= figures["stages"].keys()
    for name, row in figures["stages"].items():
        assert row["checks"] is True, name
        assert f"\n{name} " in text, name
        if not name.startswith("plain "):  # torchrun's run is not looked into
            assert row["projected"] > row["seconds"] > 0, name
    kinds = {name: set(figures["stages"][name].get("seconds_a_target", ())) for name in wanted}
    assert kinds["2026-03-22_pr489 ttt"] == {"adapt", "score"}
    assert kinds["2026-03-26_pr834 ttt"] == {"score", "learn"}
    assert kinds["2026-03-26_pr859 ngram"] == {"count", "score"}
    assert kinds["stream mixed"] == {"count", "score", "learn"}


def test_exit_codes_were_seen(rehearsal):
    _, _, figures = rehearsal
    values = {f["name"]: f["value"] for f in figures["findings"]}
    assert values["exit code after SIGTERM"] == 143
    assert values["an unknown setting's exit code"] == 64


# --- failures -------------------------------------------------------------------------------------


def run(acceptance, tmp_path, *more):
    """Exit code and figures of some checks in this process."""
    code = acceptance.main(["--dry", "--out", str(tmp_path / "out"), *more])
    return code, json.loads((tmp_path / "out/acceptance.json").read_text())


def test_a_job_that_fails_is_exit_code_1_and_says_what_to_do(parts, tmp_path, monkeypatch, capsys):
    acceptance, advice, pod = parts

    def out_of_memory(env):
        print("torch.OutOfMemoryError: CUDA out of memory.")
        return 3

    monkeypatch.setattr(acceptance.inside, "program", out_of_memory)
    code, figures = run(acceptance, tmp_path, "--only", "refusals")
    failed = [finding for finding in figures["findings"] if not finding["passed"]]
    assert code == 1 and figures["failed"] == 1
    assert (failed[0]["value"], failed[0]["advice"]) == (3, advice.MEMORY)
    assert advice.MEMORY in capsys.readouterr().out


def test_a_job_that_hangs_is_ended_with_all_it_started(parts, tmp_path):
    _, advice, pod = parts
    here = pod.Pod(tmp_path, 0, True, 60)
    name = f"60{time.time_ns() % 10000}"

    def act(env):
        subprocess.run(["sleep", name], start_new_session=True, check=True)

    hang = pod.Job("hang", act, limit=2)
    finished = here.run(hang)
    assert finished.exit_code == "timeout" and finished.seconds < 6
    assert "be_job" in finished.text  # where it stood
    assert advice.NCCL in advice.diagnose(finished)
    living = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    assert name not in living.stdout.split()


def test_what_does_not_fit_the_budget_is_a_failure(parts, tmp_path):
    acceptance, advice, _ = parts
    code, figures = run(acceptance, tmp_path, "--only", "device,code", "--budget", "1")
    assert code == 1
    assert [f["advice"] for f in figures["findings"]] == [advice.TIME] * 2


def test_a_broken_check_stops_no_other(parts, tmp_path, monkeypatch):
    acceptance, advice, _ = parts

    def broken(session):
        raise KeyError("nothing")

    monkeypatch.setitem(acceptance.CHECKS, "group", broken)
    code, figures = run(acceptance, tmp_path, "--only", "group,code")
    failed = [finding["advice"] for finding in figures["findings"] if not finding["passed"]]
    assert (code, failed) == (1, [advice.BUG])
    assert {finding["check"] for finding in figures["findings"]} == {"group", "code"}


LOGS = {
    "The NVIDIA driver on your system is too old (found version 12080)": "index cu126",
    "torch.OutOfMemoryError: CUDA out of memory. Tried": "MICRO_BATCH_TOKENS",
    "[rank3]: ProcessGroupNCCL.cpp watchdog thread": "NCCL_P2P_DISABLE=1",
    "RuntimeError: Failed to find C compiler.": "build-essential",
    "OSError: [Errno 28] No space left on device": "df -h",
    "ModuleNotFoundError: No module named 'zstandard'": "requirements.txt",
    "something else": "exit codes",
}


@pytest.mark.parametrize("log", LOGS)
def test_a_log_is_diagnosed(log, parts):
    _, advice, pod = parts
    driver = advice.for_driver("13.0", "12.8")
    assert LOGS[log] in advice.diagnose(pod.Finished(1, text=log), driver)


@pytest.mark.parametrize(
    "driver, index",
    [("13.1", "cu130"), ("13.2", "cu132"), ("12.8", "cu126"), ("12.9", "cu129"), ("", "cu126")],
)
def test_the_wheel_for_a_driver(driver, index, parts):
    assert parts[1].wheel_index(driver) == index
    assert f"index {index} " in parts[1].for_driver("13.0", driver)


# --- arithmetic -----------------------------------------------------------------------------------

PACES = dict(count=1e-6, score=8e-6, learn=2e-6)
ONE_TARGET = {  # microseconds a target on eight GPUs
    "shared": (dict(one_process=False, learners=1), 1 + 1 + 2),
    "in parts": (dict(one_process=False, learners=4), 1 + 1 + 0.5),
    "one process": (dict(one_process=True, learners=1), 1 + 8 + 2),
}


@pytest.mark.parametrize("case", ONE_TARGET)
def test_projection(case, parts):
    how, microseconds = ONE_TARGET[case]
    stage = dict(how, targets=1000, seconds=5.011, seconds_a_target=PACES)  # 5 s happen once
    seconds = parts[0].projected(stage, targets=10**8, gpus=8)
    assert seconds == pytest.approx(5 + 100 * microseconds)


FULL = {"2026-03-17_baseline": 62_021_632, "2026-05-01_pr2135": 47_851_520}
SCORED = """{"result": {"stages": {"plain": {"tokens": 1000, "seconds": 0.001}}},
    "figures": {"stages": {"plain": {"targets": 1000, "seconds": 0.001, "one_process": true,
    "learners": 1, "adapters": false, "seconds_a_target": {"score": 1e-6}}}}}"""


@pytest.mark.parametrize("system", FULL)
def test_projection_is_to_fineweb_in_the_systems_vocabulary(system, parts, tmp_path):
    acceptance, _, pod = parts
    args = acceptance.parse(["--dry", "--out", str(tmp_path)])
    session = acceptance.open_session(args)
    scored = json.loads(SCORED)
    session.pod.finished["run"] = pod.Finished(0, **scored)
    acceptance.judge_stages(session, "run", {"plain"}, "some", system)
    row = session.stages["some plain"]
    assert row["projected"] == pytest.approx(FULL[system] / 10**6)


@pytest.mark.parametrize("given", ["--data x", "--tokenizer x.model"])
def test_data_and_tokenizer_go_together(given, parts, capsys):
    with pytest.raises(SystemExit) as ended:
        parts[0].parse(given.split())
    assert ended.value.code == 2
    assert "--data and --tokenizer go together" in capsys.readouterr().err


def test_pace_of_a_step_is_a_median(parts):
    rows = [dict(step=n, train_seconds=0.1 * n) for n in range(1, 10)]
    rows[-1]["train_seconds"] += 5  # somebody else had the GPU
    assert parts[2].step_ms(rows, 4) == pytest.approx(100)
    assert parts[2].step_ms(rows, 9) != parts[2].step_ms(rows, 9)  # NaN: one step tells no pace
