"""What every test may use: places, small settings, a runtime of one process, a run's log."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train_gpt as tg

# What tests start has a core, as they have: threads that wait for a core spin, and take it away.
os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
PAGES = ["README.md", "SETTINGS.md"]  # what people read, relative to ROOT
for _folder in ("data", "records", "tests"):
    PAGES += sorted(str(path.relative_to(ROOT)) for path in (ROOT / _folder).rglob("README.md"))

TINY = dict(
    tg.BASELINE,
    vocab_size=260,
    tokenizer_path="byte260",
    num_layers=3,
    model_dim=32,
    num_heads=4,
    num_kv_heads=2,
    train_seq_len=32,
    train_batch_tokens=128,
    micro_batch_tokens=64,
    keep_float_max_numel=256,
    eval_stride=8,
)
FULL = dict(
    TINY,
    bigram_vocab_size=64,
    bigram_dim=8,
    hash_orders=(3, 5),
    hash_rows=61,
    smear=True,
    smear_bos_mask=True,
    ve_layers=(1, 2),
    ve_dim=8,
    induction_orders=(2, 1),
    xsa_last_n=2,
    rope_dims=4,
    ln_scale=True,
    leaky_slope=0.5,
    mlp_mult=2.5,
)
# What a tiny run on synthetic text needs, as environment variables.
TINY_RUN = dict(
    SMOKE="1",
    NUM_LAYERS="2",
    MODEL_DIM="32",
    NUM_HEADS="2",
    NUM_KV_HEADS="1",
    TRAIN_SEQ_LEN="64",
    TRAIN_BATCH_TOKENS="256",
    MICRO_BATCH_TOKENS="64",
    VE_LAYERS="1",
    ITERATIONS="6",
    WARMUP_STEPS="1",
    WARMDOWN_ITERS="3",
    VAL_LOSS_EVERY="0",
    SAMPLE_TOKENS="0",
    EVAL_STRIDE="16",
    VAL_TOKENS="700",
)


LONGEST = (
    "test_record.py",
    "test_rehearsal.py",
    "test_lost_nothing.py",
    "test_audit.py",
    "test_predictors.py",
    "test_record_faults.py",
    "test_record_runs.py",
    "test_devices.py",
    "test_plan.py",
    "test_acceptance.py",
)


def pytest_xdist_auto_num_workers(config):
    """One more than there are cores: much of a test's time is waiting for processes."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(items):
    """The longest files first: with several processes, none is left alone with one at the end."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONGEST)))


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Matrices this small gain nothing from threads, which only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def rt():
    return tg.Runtime(tg.Config(device="cpu"), {})


@pytest.fixture
def run_log(tmp_path, rt):
    return tg.RunLog(tmp_path / "out", rt)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A file of documents for the data tool."""
    from data_tool import make_corpus  # here, so that only tests of the data tool import it

    return make_corpus(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def prepared(corpus, tmp_path_factory):
    """A data folder with one dataset of the corpus; whoever breaks it takes a copy."""
    from data_tool import make_mine

    return make_mine(tmp_path_factory.mktemp("data"), corpus)


@pytest.fixture
def world(tmp_path):
    """A hub on this machine, and a place to download to (data_hub.py)."""
    from data_hub import new_world

    with new_world(tmp_path) as world:
        yield world


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder like a checkout, with data and settings for the record tool (record_help.py)."""
    from record_help import checkout

    return checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="module")
def own_machine(tmp_path_factory):
    """For the record tool: a machine's lock of the tests' own, an environment without settings."""
    from record_help import prepare

    with pytest.MonkeyPatch.context() as patch:
        prepare(patch, tmp_path_factory.getbasetemp())
        yield


@pytest.fixture
def quick(monkeypatch):
    """The record tool waits for no process to start (record_help.py)."""
    from record_help import without_waiting

    without_waiting(monkeypatch)


def clean_env(**extra: str) -> dict[str, str]:
    """This process's environment without settings, plus the given ones; for subprocesses."""
    kept = {name: value for name, value in os.environ.items() if name not in tg.SETTING_NAMES}
    return {**kept, "PYTHONDONTWRITEBYTECODE": "1", **extra}


def functions_entered(action):
    """Names of the script's own functions that an action enters; comprehensions are not counted."""
    entered = set()

    def note(frame, event, arg):
        code = frame.f_code
        if event == "call" and code.co_filename == tg.__file__ and code.co_name[0] != "<":
            entered.add(code.co_qualname)

    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
    return entered
