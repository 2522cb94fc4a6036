"""The defaults rehearsed: from text to a record that runs alone. Everything is on, and small."""

import json
import shutil

import numpy as np
import pytest
from conftest import clean_env
from data_tool import DOCUMENTS, call, jsonl
from helpers import forked_ranks, python, result_of, settings_in
from record_help import Program, new, without_waiting

import train_gpt as tg

pytestmark = pytest.mark.usefixtures("own_machine")

# Sizes; and what a run of thirteen steps needs otherwise than one of 600 seconds.
CONFIG = """
DATA_PATH=./data/datasets/mine
TOKENIZER_PATH=./data/tokenizers/mine_bpe.model
VOCAB_SIZE=500
DEVICE=cpu
NUM_LAYERS=6
MODEL_DIM=32
NUM_HEADS=2
NUM_KV_HEADS=1
ROPE_DIMS=8
XSA_LAST_N=6
LOOP_START=2
LOOP_END=3
PARALLEL_START_LAYER=4
TRAIN_SEQ_LEN=64
TRAIN_BATCH_TOKENS=512
MICRO_BATCH_TOKENS=256
CONTEXT_SCHEDULE=32:0.5
SCHEDULE=tokens
ITERATIONS=13
WARMUP_STEPS=1
VAL_LOSS_EVERY=12
EMA_DECAY=0.5
WARMDOWN_FRAC=0.5
MUON_MOMENTUM_WARMUP_STEPS=6
GPTQ_N_SAMPLES=4
KEEP_FLOAT_MAX_NUMEL=256
EVAL_SEQ_LEN=80
TTT_LORA_RANK=4
TTT_LORA_CHUNK=40
TTT_LR=0.0005
TTT_DOCS=4
TTT_GLOBAL_DOCS=5
TTT_CHUNK_TOKENS=512
TILT_ORDER=4
"""


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory, own_machine):
    """A checkout with data in case markers, and the record that was made in it."""
    place = tmp_path_factory.mktemp("rehearsal")
    texts = [text[:1000] for text in DOCUMENTS]  # of which eight validate
    corpus = jsonl(place / "docs.jsonl", texts)
    data = dict(root=place / "data", name="mine", vocab_size=500, val_every=10)
    assert call("text", corpus, transform="caseops", workers=2, **data).code == 0
    (place / "config.env").write_text(CONFIG)
    config = ["--config", str(place / "config.env"), "--seeds", "1"]
    told = ["--author", "A. Person", "--technique", "All at once.", "--packed", "--strip"]
    with pytest.MonkeyPatch.context() as patch:
        without_waiting(patch)
        assert new(place, "all", "--track", "non_record_cpu", *config, *told) == 0
    return place / "records" / "track_non_record_cpu" / "2026-01-31_all"


def test_every_technique_of_the_defaults_is_on():
    cfg = tg.load_config(settings_in(CONFIG))
    off = [name for name in tg.BASELINE if not getattr(cfg, name)]
    assert off == ["gptq_reserve_seconds", "eval_stride"]  # no clock; windows side by side


def test_the_record_passes_all_that_is_checked(rehearsed):
    """Its checks, which train, pack and score again; the deep audit; upstream's fields."""
    report = json.loads((rehearsed / "check.json").read_text())
    verdicts = {finding["id"]: finding["verdict"] for finding in report["findings"]}
    assert not [name for name, verdict in verdicts.items() if verdict == "FAIL"]
    assert {"R6", "R10", "R12", "AUDIT"} <= verdicts.keys()
    told = json.loads((rehearsed / "submission.json").read_text())
    assert {"author", "name", "val_bpb", "bytes_total", "date"} <= told.keys()
    log = (rehearsed / "train_seed1.log").read_text()
    for words in ("case_transform:caseops", "final_rans_plain", "final_rans_mixed", "with_loops"):
        assert words in log


def test_the_folder_alone_runs_and_scores_again(rehearsed, tmp_path):
    """Copied to where nothing else is, with the data beside it."""
    folder = shutil.copytree(rehearsed, tmp_path / "alone")
    shutil.copytree(rehearsed.parents[2] / "data", folder / "data")
    scored = clean_env(MODE="eval", ARTIFACT="model_seed1.ptz", OUT_DIR=str(tmp_path / "scored"))
    trained = clean_env(SEED="1", OUT_DIR=str(tmp_path / "trained"))
    expected = json.loads((folder / "submission.json").read_text())["val_bpb"]
    for env, out in ((scored, "scored"), (trained, "trained")):
        done = python(["train_gpt.py"], env, cwd=folder)
        assert done.returncode == 0, done.out + done.err
        result = result_of(tmp_path / out)["result"]
        assert result["stage"] == "mixed"
        np.testing.assert_allclose(result["val_bpb"], expected, rtol=1e-6)


def test_two_processes_score_as_one(rehearsed, tmp_path):
    """The whole run, in the record's own script."""
    env = clean_env(SEED="1", OUT_DIR=str(tmp_path))
    env["DATA_PATH"] = str(rehearsed.parents[2] / "data/datasets/mine")
    env["TOKENIZER_PATH"] = str(rehearsed.parents[2] / "data/tokenizers/mine_bpe.model")
    codes, said = forked_ranks(2, Program(["train_gpt.py"], env, rehearsed))
    assert codes == [0, 0], said
    expected = json.loads((rehearsed / "submission.json").read_text())["val_bpb"]
    assert abs(result_of(tmp_path)["result"]["val_bpb"] - expected) < 2e-3
