"""`record.py new` ended at random times, by every signal: nothing is left, and nothing is lost.

INTERRUPTIONS=3 pytest -m slow tests/test_record_interruptions.py for a short proof.
"""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, clean_env
from record_help import CONFIG, descendants_of, wait_until_dead

import train_gpt as tg

TIMES = int(os.environ.get("INTERRUPTIONS", "30"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not pathlib.Path("/proc/self").exists(), reason="asks /proc"),
]


class Checkout:
    """A folder with data and settings, where `new` makes one record after another."""

    def __init__(self, root):
        self.root = root
        tg.synthetic_shards(root / "data" / "tiny")
        (root / "config.env").write_text(CONFIG)

    def command(self, name):
        places = ["--records", self.root / "records", "--work", self.root / "work"]
        options = ["--config", self.root / "config.env", "--seeds", "1,2", "--date", "2026-01-31"]
        new = ["new", name, "--track", "t", *places, *options, "--no-run"]
        return [sys.executable, ROOT / "records/record.py", *new]

    def start(self, name):
        env = clean_env(TMPDIR=str(self.root))
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        return subprocess.Popen(list(map(str, self.command(name))), env=env, **quiet)

    def made(self, name):
        return self.root / "records" / "track_t" / f"2026-01-31_{name}"

    def finish(self, name):
        """The whole command -> its record, unless that was made before."""
        process = self.start(name)
        _, said = process.communicate(timeout=400)
        assert process.returncode == (64 if "exists already" in said else 0), said
        return self.made(name)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return Checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="module")
def untouched(checkout):
    """The record of a command that nobody interrupted, and how long it took."""
    start = time.monotonic()
    return checkout.finish("untouched"), time.monotonic() - start


def scores_of(folder):
    told = json.loads((folder / "submission.json").read_text())
    stages = {seed: row["stages"] for seed, row in told["seed_results"].items()}
    return told["val_bpb"], told["artifact_sha256"], stages


def assert_whole(folder):
    """Every file that has its final name can be read to its end."""
    for path in folder.rglob("*"):
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".ptz":
            tg.unpack(path.read_bytes())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_command_goes_on_as_if_nothing_had_happened(checkout, untouched, number):
    expected, seconds = untouched
    rng = random.Random(int(number))
    for attempt in range(TIMES):
        name = f"{number.name}{attempt}"
        moment = rng.uniform(0, seconds)
        process = checkout.start(name)
        time.sleep(moment)
        started = descendants_of(process.pid)
        process.send_signal(number)
        process.communicate(timeout=200)
        for child in started:
            wait_until_dead(child)
        told = f"{number.name} after {moment:.2f} of {seconds:.2f} s"
        assert_whole(checkout.root / "work")
        assert_whole(checkout.root / "records")
        folder = checkout.finish(name)  # no stale lock stops it
        assert scores_of(folder) == scores_of(expected), told
        assert {path.name for path in folder.iterdir()} == {p.name for p in expected.iterdir()}
        drafts = list(folder.parent.glob(".*"))
        assert not drafts, told
