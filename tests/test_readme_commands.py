"""The pages' commands, typed as they stand in a fresh clone after the demo (slow, needs pip)."""

import json
import os
import random
import re
import subprocess
import sys

import pytest
from conftest import PAGES, ROOT, clean_env

# Lines with these need what a test machine lacks, or are what the tests are run by.
NOT_HERE = {
    "--nproc_per_node=8": "eight GPUs",
    "GPTQ_N_SAMPLES=384 ": "two GPUs, and the challenge's shards",
    "--track 10min_16mb": "eight GPUs",
    "MICRO_BATCH_TOKENS=32768 python train_gpt.py": "a GPU, and the challenge's shards",
    "prepare.py fineweb": "a download of 16 GB",
    "tmux new": "a terminal",
    "nvidia-smi": "a driver",
    "git clone ": "the project's address",
    "pip install -r requirements.txt": "an environment of its own",
    "tests/gpu/acceptance.py  ": "a GPU",
    "-m pytest": "the tests themselves",
    "logs/true": "ten minutes of training, and as many of scoring",
    "stack.jsonl  ": "an hour of training",
    "track_1gpu/ours/config.env python train_gpt.py": "a GPU, and the challenge's shards",
}


def blocks_of(name):
    """The bash blocks of a README, in order."""
    return re.findall(r"```bash\n(.*?)```", (ROOT / name).read_text(), re.S)


def is_entry(name):
    """Whether a page is that of a run, whose commands are typed in its own folder."""
    return (ROOT / name).with_name("submission.json").exists()


READMES = [name for name in PAGES if blocks_of(name) and not is_entry(name)]


def lines_here(block):
    """A block without the lines that need what is not here."""
    kept = []
    for line in block.replace("\\\n", "").splitlines():
        if not any(part in line for part in NOT_HERE):
            kept.append(line)
    return "\n".join(kept)


@pytest.mark.parametrize("name", READMES)
def test_commands_have_no_places_to_fill_in(name):
    for block in blocks_of(name):
        assert not re.search(r"<\w+>|\.\.\.", re.sub(r"#.*", "", lines_here(block))), block


def test_what_is_not_typed_is_there():
    text = "".join(block for name in READMES for block in blocks_of(name))
    for part, reason in NOT_HERE.items():
        assert part in text, reason


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A fresh clone with the demo's run and some text of one's own, as the READMEs presume."""
    here = tmp_path_factory.mktemp("clone") / "golf"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(here)], check=True)
    (here / ".venv").symlink_to(sys.prefix)
    (here / "logs").mkdir()
    (here / "logs/run.sh").write_text("")
    dice = random.Random(1)
    words = ["".join(dice.choices("aeioubdgklmnprst", k=dice.randint(2, 8))) for _ in range(4000)]
    texts = [f"Document {n}: {' '.join(dice.choices(words, k=12))}." for n in range(50_300)]
    (here / "docs.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (here / "b.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts[:2000]))
    (here / "a.txt").write_text("\n\n".join(texts[2000:4000]))
    demo = blocks_of("README.md")[0].split("&&", 2)[2]  # without making the environment
    typed(here, demo)
    typed(here, "echo RUN=$(ls -td logs/*/ | head -1) > logs/run.sh")
    return here


def typed(here, block):
    """A block of commands in a shell that stands in the clone."""
    start = ". .venv/bin/activate && . logs/run.sh"
    env = clean_env(PATH=os.environ["PATH"])
    done = subprocess.run(
        ["bash", "-c", f"{start}\nset -e\n{block}"],
        cwd=here,
        env=env,
        capture_output=True,
        text=True,
        timeout=3000,
        check=False,
    )
    assert done.returncode == 0, block + done.stdout[-3000:] + done.stderr[-3000:]


TYPED = [(name, number) for name in READMES for number in range(len(blocks_of(name)))]


@pytest.mark.slow
@pytest.mark.parametrize("name, number", TYPED)
def test_every_command_runs_as_it_stands(name, number, clone):
    block = lines_here(blocks_of(name)[number])
    if (name, number) == ("README.md", 0) or not block.strip():
        pytest.skip("the demo itself, or not for this machine")
    typed(clone, block)
