"""Runs that end at any moment, by any signal: what follows gives the uninterrupted result.

INTERRUPTIONS=3 pytest -m slow tests/test_run_interruptions.py is a short proof.
"""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT
from helpers import losses_of, python, result_of, tiny_env

SCRIPT = ROOT / "train_gpt.py"
SETTINGS = dict(ITERATIONS="12", SAVE_EVERY="4", VAL_TOKENS="0", WARMUP_STEPS="0", EVAL_STRIDE="2")
# How the log's last line begins before a phase, and the seconds that it then takes at most.
PHASES = {"training": ("step:1/", 0.6), "packing": ("step:12/", 0.2), "scoring": ("Total", 1.5)}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Hash of the artifact, score and losses of a run that nobody disturbs."""
    out = tmp_path_factory.mktemp("straight") / "run"
    assert python([SCRIPT], tiny_env(out, **SETTINGS)).returncode == 0
    return told_by(out, out)


def told_by(trained, scored):
    """What must come out: of the folder that trained, and of the one that scored."""
    hashed = result_of(scored).get("artifact_sha256") or result_of(trained)["artifact_sha256"]
    return hashed, result_of(scored)["result"]["val_bpb"], losses_of(trained).tolist()


def interrupt(out, phase, number, seconds):
    """Starts a run, and sends it a signal so many seconds after the phase began -> exit code."""
    marker, _ = PHASES[phase]
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT)],
        env=tiny_env(out, **SETTINGS),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in process.stdout:
        if line.startswith(marker):
            time.sleep(seconds)
            process.send_signal(number)
            break
    said = process.stdout.read()
    code = process.wait(100)
    assert code in (0, 143, -signal.SIGKILL), said
    assert "Traceback" not in said
    return code


def finish(out):
    """What a user does next: score the artifact, resume the checkpoint, or begin again."""
    scored = out
    again = dict(SETTINGS)
    if (out / "model.ptz").exists():
        again |= dict(MODE="eval", RUN_ID="again", DATA_PATH=str(out / "smoke_data"))
        scored = out / "eval_again"
    elif (out / "checkpoint.pt").exists():
        again |= dict(RESUME=str(out / "checkpoint.pt"))
    done = python([SCRIPT], tiny_env(out, **again))
    assert done.returncode == 0, done.stdout + done.stderr
    return scored


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_thirty_interruptions(number, straight, tmp_path):
    """Ten each of training, packing and scoring."""
    rng = np.random.default_rng(int(number))
    for count in range(int(os.environ.get("INTERRUPTIONS", "30"))):
        phase = list(PHASES)[count % 3]
        out = tmp_path / f"{count}"
        code = interrupt(out, phase, number, rng.uniform(0, PHASES[phase][1]))
        drafts = [*out.rglob("*.tmp")]
        assert code == -signal.SIGKILL or not drafts
        if code == 143:
            assert result_of(out)["status"] == "interrupted"
            assert result_of(out)["exit_code"] == 143
        scored = finish(out) if code else out
        assert not [*out.glob(".*.tmp")]
        check_equal(straight, out, scored)


def check_equal(straight, out, scored):
    """Artifact and score to the last digit; losses too, where the log tells each step once."""
    sha, bpb, losses = straight
    result = result_of(scored)["result"]
    assert result["val_bpb"] == bpb
    assert result_of(out).get("artifact_sha256", sha) == sha
    assert losses_of(out)[-1] == losses[-1]
