"""What goes wrong on the way of a file: a hub that misbehaves, kills, full disks, company.

By real processes from a hub on this machine (data_hub.py, fake_hub.py).
"""

import errno
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import transfer
from data_hub import (
    COMMUNITY,
    FOLDER,
    MODEL_LIST,
    OFFICIAL,
    VOCAB,
    published,
    remote,
    train,
    until,
)
from fake_hub import Fault

# --------------------------------------------------------------------------------------------------
# Ends before the end
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moved", [False, True], ids=["same commit", "next commit"])
def test_a_killed_download_goes_on_where_it_was(world, moved):
    world.resize(1, 100_000)
    world.spoil(train(1), Fault(drop=50_000, stall=600))
    running = world.start(train_shards=2)
    until(lambda: world.partial_bytes(1) == 50_000)
    until((world.root / train(0)).exists)
    running.kill()
    assert world.finished == world.wanted(train_shards=1)
    if moved:
        world.hub.repositories[OFFICIAL]["README.md"] = b"news"
    world.run(train_shards=2)
    assert world.here == world.wanted(train_shards=2)
    assert world.ranges(train(1)) == [None, "bytes=50000-"]


@pytest.mark.parametrize(
    "stuck",
    [
        Fault(rate=50),
        Fault(drop=50_000, stall=600),
        Fault(status=429, headers={"Retry-After": "300"}),
    ],
    ids=["slow", "silent", "asked to wait"],
)
def test_interrupt(world, stuck):
    """It ends long before the file would come, and what has its name is whole."""
    world.resize(1, 100_000)
    world.spoil(train(1), stuck)
    running = world.start(train_shards=2)
    until(lambda: world.ranges(train(1)) and (stuck.status or world.partial_bytes(1)))
    until((world.root / train(0)).exists)
    done = running.send(signal.SIGINT)
    assert done.code == 130
    assert done.err.splitlines()[-1] == "interrupted"
    assert world.finished == world.wanted(train_shards=1)
    world.run(train_shards=2)
    assert world.here == world.wanted(train_shards=2)


def test_a_thread_that_waits_is_woken_by_the_end():
    progress = transfer.Progress("nothing", 0)
    progress.wait(0)
    progress.stopped.set()
    with pytest.raises(transfer.Stopped):
        progress.wait(0)


@pytest.mark.parametrize("late", [False, True], ids=["before", "while it starts"])
@pytest.mark.parametrize("number", [0, 1, 3])
def test_an_interrupt_while_threads_start(number, late, monkeypatch):
    """It is passed on; the threads that have begun end, and no file is worked on."""
    started = []
    worked = []
    real = threading.Thread.start

    def start(thread):
        if thread._target != progress.worker:  # the bar's own
            return real(thread)
        interrupted = len(started) == number
        if not interrupted or late:
            real(thread)
            started.append(thread)
        if interrupted:
            thread._started.clear() if late else None
            raise KeyboardInterrupt

    progress = transfer.Progress("nothing", 0)

    def work(item):
        progress.wait(60)
        worked.append(item)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(threading.Thread, "start", start)
        progress.run(work, list(range(9)), 4, lambda item, result: None)
    for thread in started:
        thread._started.set()
        thread.join(60)
        assert not thread.is_alive()
    assert not worked


def test_a_file_that_may_not_grow(world):
    """The disk is full in mid-file (here: the process's limit); it goes on when there is room."""
    world.resize(1, 200_000)
    message = world.refused(train_shards=2, largest=300_000, options={"workers": 1})
    missing = len(world.remote[train(1)]) - 300_000
    assert f"{os.strerror(errno.EFBIG)}, {missing} bytes are still missing" in message
    assert world.finished == world.wanted(train_shards=1)
    assert world.partial_bytes(1) == 300_000
    world.run(train_shards=2)
    assert world.here == world.wanted(train_shards=2)
    assert world.ranges(train(1)) == [None, "bytes=300000-"]


def can_mount():
    if not shutil.which("unshare"):
        return False
    return subprocess.run(["unshare", "-Urm", "true"], check=False).returncode == 0


def test_a_full_disk(world):
    """A file system of a megabyte in a mount namespace that goes with its process."""
    if not can_mount():
        pytest.skip("no user namespaces here")
    world.resize(1, 600_000)
    world.root.mkdir()
    root = shlex.quote(str(world.root))
    fetch = shlex.join([sys.executable, "-c", world.call(train_shards=2, free=1e12).script])
    steps = [
        f"mount -t tmpfs -o size=1m none {root} || exit 3",
        f"{fetch}; echo code $?",
        f"ls {root}/{FOLDER}",
        f"mount -o remount,size=8m {root}",
        f"{fetch}; echo code $?",
    ]
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", "\n".join(steps)],
        capture_output=True,
        text=True,
        env=world.script_env,
        timeout=300,
        check=False,
    )
    if done.returncode == 3:
        pytest.skip("no tmpfs here")
    place = world.root / "datasets/.partial/sp1024"
    complaint = rf"error: {place}: No space left on device, \d+ bytes are still missing"
    assert re.search(complaint, done.stderr), done.stderr
    _, second = done.stdout.split("code 64\n")
    assert Path(train(1)).name not in second.split("\n")
    assert second.endswith(f"VOCAB_SIZE={VOCAB}\ncode 0\n")
    _, span = world.ranges(train(1))
    assert int(span.strip("bytes=-")) > 500_000
    assert not world.here


# --------------------------------------------------------------------------------------------------
# A network that loses
# --------------------------------------------------------------------------------------------------


def test_dropped_connections(world):
    """More than ATTEMPTS, but each brings something."""
    world.resize(0, 50_000)
    ends = [
        Fault(drop=30_000),
        Fault(drop=20_000, reset=True),
        Fault(drop=0),
        Fault(drop=0, reset=True),
        Fault(drop=1),
        *[Fault(drop=1_000)] * 8,
    ]
    assert len(ends) > transfer.ATTEMPTS
    world.spoil(train(0), *ends)
    done = world.run(train_shards=1)
    assert world.here == world.wanted(train_shards=1)
    told = rf"^{OFFICIAL}: {train(0)}: \w+Error: .*; goes on in 0 s$"
    assert len(re.findall(told, done.err, re.M)) == len(ends)
    ranges = world.ranges(train(0))
    assert len(ranges) == len(ends) + 1
    assert ranges[1] == "bytes=30000-"


def test_a_server_that_ignores_ranges(world):
    world.resize(0, 50_000)
    begins_anew = [Fault(whole=True, drop=10_000), Fault(whole=True)]
    world.spoil(train(0), Fault(drop=30_000), *begins_anew)
    world.run(train_shards=1)
    assert world.here == world.wanted(train_shards=1)
    assert world.ranges(train(0)) == [None, "bytes=30000-", "bytes=10000-"]


def test_a_body_that_is_too_short(world):
    world.spoil(train(0), Fault(short=1_100), Fault(short=0))
    done = world.run(train_shards=1)
    assert world.here == world.wanted(train_shards=1)
    assert "1100 bytes instead of 1224; goes on" in done.err
    assert world.ranges(train(0)) == [None, "bytes=1100-", "bytes=1100-"]


WRONG = r"the content has the hash \w+, the hub lists \w+"


def test_wrong_content_once(world):
    world.spoil(train(1), Fault(flip=True))
    done = world.run(train_shards=2)
    assert world.here == world.wanted(train_shards=2)
    assert re.search(f"{train(1)}: {WRONG}; downloading it again", done.err)
    assert world.ranges(train(1)) == [None, None]


@pytest.mark.parametrize("path", [train(1), MODEL_LIST], ids=["large", "small"])
def test_wrong_content_always(world, path):
    world.spoil(path, *[Fault(flip=True)] * 9)
    assert re.search(f"{path}: {WRONG}, twice", world.refused())
    assert path not in world.finished
    assert len(world.ranges(path)) == 2
    assert not list(world.root.glob(f"datasets/.partial/**/*{Path(path).name}"))
    world.hub.faults.clear()
    world.run()
    assert world.here == world.wanted()


# --------------------------------------------------------------------------------------------------
# A hub that asks for patience
# --------------------------------------------------------------------------------------------------


def test_a_busy_hub(world):
    """The two pauses that it asks for are kept; the other errors are repeated at once.

    Of the four of them huggingface_hub repeats one itself: the folder listing's.
    """
    limited = {"RateLimit": '"resolvers";r=0;t=1'}
    world.spoil(train(0), Fault(status=429, headers={"Retry-After": "1"}), Fault(status=503))
    world.spoil(train(1), Fault(status=429, headers=limited))
    world.spoil("manifest.json", Fault(status=500))
    world.hub.faults["revision"] = [Fault(status=503)]
    world.hub.faults["tree"] = [Fault(status=503)]
    done = world.run(train_shards=2)
    assert world.here == world.wanted(train_shards=2)
    for number in (0, 1):
        told = f"{OFFICIAL}: {train(number)}: HTTP status 429; goes on in 1 s"
        assert told in done.err
        first, second, *_ = world.hub.moments[remote(train(number))]
        assert second - first >= 0.99
    assert len(re.findall(r"HTTP status 5\d\d; goes on in 0 s", done.err)) == 3


def test_a_hub_that_stays_busy(world):
    world.spoil(train(0), *[Fault(status=503)] * 99)
    message = world.refused(train_shards=1)
    assert f"{train(0)}: HTTP status 503; the same command goes on" in message
    assert len(world.ranges(train(0))) == transfer.ATTEMPTS


# --------------------------------------------------------------------------------------------------
# Several at once
# --------------------------------------------------------------------------------------------------


def test_three_processes_at_once(world):
    """One works, the others wait for it: the file comes when all have begun."""
    gate = threading.Event()
    world.spoil(train(0), Fault(gate=gate))
    started = [world.start(train_shards=2) for _ in range(3)]
    until(lambda: sum("waiting for it" in running.out for running in started) == 2)
    gate.set()
    done = [running.wait() for running in started]
    assert [one.code for one in done] == [0, 0, 0], done
    wanted = world.wanted(train_shards=2)
    assert world.here == wanted
    assert [world.ranges(path) for path in wanted] == [[None]] * len(wanted)
    assert sum("already there" in one.out for one in done) == 2


def test_two_variants_at_once(world):
    world.serve(published("sp8192"), COMMUNITY)
    variants = ("sp1024", "sp8192")
    started = [world.start(variant=variant, with_docs=True) for variant in variants]
    done = [running.wait() for running in started]
    assert [one.code for one in done] == [0, 0], done
    names = {entry["name"] for entry in world.manifest()["datasets"]}
    assert names == {"fineweb10B_sp1024", "fineweb10B_sp8192"}
    assert not (world.root / "datasets/.partial").exists()


def test_final_names_appear_in_order(world):
    """A shard that is whole waits in the partial folder until the one before it has its name."""
    gate = threading.Event()
    world.spoil(train(1), Fault(gate=gate))
    wanted = world.wanted()
    order = sorted(wanted, key=lambda path: ("_train_" in path, "_val_" in path, path))
    running = world.start()

    def missing():
        """How many files have no final name; those that have come first."""
        there = []
        for path in reversed(order):  # the last first: none comes between
            there.append((world.root / path).exists())
        assert there == sorted(there), there
        return there.count(False)

    before = order.index(train(1))
    until(lambda: missing() == len(order) - before)
    until(lambda: world.partial_bytes(2) == len(wanted[train(2)]))
    assert missing() == len(order) - before
    gate.set()
    until(lambda: missing() == 0)
    assert running.wait().code == 0
    assert world.finished == wanted
