"""The published systems: parameter counts, and the original programs' numbers.

The numbers come from the original programs' weights.
"""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED

import train_gpt as tg

TRACK = ROOT / "records/track_10min_16mb"
REFERENCE = SHARED / "reference"


def env(text):
    """NAME=value NAME=value -> environment variables."""
    return dict(word.split("=") for word in text.split())


SMALL = env(
    "NUM_LAYERS=4 MODEL_DIM=64 NUM_HEADS=2 NUM_KV_HEADS=1 TRAIN_SEQ_LEN=256 EVAL_STRIDE=64 "
    "TRAIN_BATCH_TOKENS=4096 MICRO_BATCH_TOKENS=4096 DEVICE=cpu COMPILE=0 QUANT_POLICY="
)
# Of PR 859 and of PR 834, whose model it is.
MODEL_859 = env(
    "BIGRAM_VOCAB_SIZE=512 BIGRAM_DIM=32 VE_DIM=32 VE_LAYERS=2,3 XSA_LAST_N=4 NUM_KV_HEADS=2 "
    "ROPE_DIMS=16"
)
# Case -> folder, and what the reference sets otherwise than the published run.
CASES = {
    "baseline": ("baseline", {}),
    "pr489": ("pr489", env("BIGRAM_VOCAB_SIZE=512 BIGRAM_DIM=32 ROPE_DIMS=16")),
    "pr740": ("pr740_v1", env("XSA_LAST_N=4 ROPE_DIMS=16")),
    "pr740_v2": ("pr740_v2", env("XSA_LAST_N=4 ROPE_DIMS=16")),
    "pr859": ("pr859", MODEL_859),
    "pr834": ("pr834", MODEL_859),
}
SAME_WEIGHTS = {"pr740_v2": "pr740", "pr834": "pr859"}
needs_reference = pytest.mark.skipif(
    not REFERENCE.is_dir(), reason="reference outputs are not here"
)


def published(name):
    """Settings of a published run, as environment variables."""
    (path,) = TRACK.glob(f"*_{name}/config.env")
    return {"CONFIG": str(path)}


def config(case, **overrides):
    name, settings = CASES[case]
    return tg.load_config({**published(name), **SMALL, **settings, **overrides})


PARAMETERS = {
    "baseline": 17_059_912,
    "pr489": 17_383_481,
    "pr740_v1": 17_650_248,
    "pr740_v2": 17_650_248,
    "pr834": 33_321_571,
    "pr859": 33_321_571,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_at_full_size(name):
    with torch.device("meta"):
        model = tg.GPT(tg.load_config(published(name)))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def renamed(weights):
    """Parameter names of the originals -> ours; PR 740's gate enters negated."""
    out = {}
    for name, w in weights.items():
        if name == "smear_gate":
            w = -w
        name = name.replace("bigram_hash.", "bigram.").replace("smear_gate", "smear.gate")
        out[name] = torch.from_numpy(w)
    return out


def load(case, cfg, kind="weights"):
    """Our model with a case's original weights, or those at its start (kind init)."""
    weights = np.load(REFERENCE / f"{SAME_WEIGHTS.get(case, case)}_{kind}.npz")
    model = tg.GPT(cfg)
    model.load_state_dict(renamed(dict(weights)), strict=True)
    return model


def outputs(case):
    """Arrays that the original program computed."""
    return np.load(REFERENCE / f"{SAME_WEIGHTS.get(case, case)}_reference.npz")


def told(case):
    """Single figures of the original program."""
    return json.loads((REFERENCE / "reference.json").read_text())[case]


def validation(count):
    tokens = tg.read_shard(SHARED / "data/web_sp1024/fineweb_val_000000.bin")[: count + 1]
    model = SHARED / "data/tokenizers/fineweb_1024_bpe.model"
    return np.asarray(tokens), tg.ByteTable.from_sentencepiece(model)


@needs_reference
@pytest.mark.parametrize("case", ["baseline", "pr489", "pr740", "pr859"])
def test_loss_and_logits_of_the_originals(case):
    model = load(case, config(case))
    reference = outputs(case)
    ids = torch.from_numpy(reference["inputs"]).long()
    targets = torch.from_numpy(reference["targets"]).long()
    with torch.no_grad():
        loss = model(ids, targets).item()
        found = {"logits_row0": model.logits(ids)[0, :64]}
        if case == "pr859":
            found["gate_logits_row0"] = model.alpha_head(model.hidden(ids))[0, :64]
    assert abs(loss - told(case)["loss"]) < 1e-4
    compared = found.keys() & set(reference)
    assert "logits_row0" in compared or case == "baseline"
    for key in compared:
        np.testing.assert_allclose(found[key].numpy(), reference[key], atol=1e-4)


# Case -> (stage, settings, the original's charges).
CHARGES = {
    "sliding of PR 489": ("pr489", "sliding", {}, "sliding_nats"),
    "sliding of PR 740": ("pr740", "sliding", {}, "sliding_nats"),
    "sliding of PR 859": ("pr859", "sliding", {}, "sliding_nats"),
    "5-gram cache of PR 740": ("pr740", "ngram", env("NGRAM_BUCKETS=65536"), "ngram_v1_nats"),
    "backoff cache of PR 740": ("pr740_v2", "ngram", env("NGRAM_BUCKETS=65536"), "ngram_v2_nats"),
    "gated cache of PR 859": (
        "pr859",
        "ngram",
        env("NGRAM_BUCKETS=65536 NGRAM_CHUNK_TOKENS=2048"),
        "mixer_nats",
    ),
    "adaptation of all parameters": (
        "pr834",
        "ttt",
        env("TTT_EPOCHS=2 TTT_LR=0.001 TTT_FREEZE_BLOCKS=2 QTTT=0"),
        "ttt_adamw_all_nats",
    ),
    "adaptation of queries": ("pr834", "ttt", env("TTT_LR=0.001"), "ttt_qonly_nats"),
    "adaptation by SGD": (
        "pr834",
        "ttt",
        env("TTT_LR=0.01 TTT_FREEZE_BLOCKS=2 TTT_OPTIMIZER=sgd QTTT=0 BYTE_WEIGHTED_TTT=0"),
        "ttt_sgd_nats",
    ),
}


@needs_reference
@pytest.mark.parametrize("name", CHARGES)
def test_charges_of_the_originals(name, rt, run_log):
    case, stage, settings, key = CHARGES[name]
    if stage == "ttt":
        settings = dict(settings, TTT_CHUNK_TOKENS="2048", TTT_TEMPERATURE="1")
    cfg = config(case, **settings)
    model = load(case, cfg)
    tokens, table = validation(6144)
    build = tg.STAGES[stage].build
    scorer = build(model, rt, cfg, table)
    score = tg.evaluate(scorer, tokens, table, cfg, rt, run_log)
    expected = outputs(case)[key]
    charged = ~np.isnan(expected)  # PR 489 leaves the first window's rest out
    assert charged.sum() >= 6144 - 192
    np.testing.assert_allclose(score.nats[charged], expected[charged], atol=1e-4)


TEN_STEPS = env(
    "TRAIN_SEQ_LEN=128 ITERATIONS=10 WARMDOWN_ITERS=6 MUON_MOMENTUM_WARMUP_STEPS=5 "
    "SCHEDULE=tokens VAL_LOSS_EVERY=0 WARMUP_STEPS=0"
)
TABLES_OF_TEN_STEPS = {
    "pr489": env("BIGRAM_VOCAB_SIZE=2048 BIGRAM_DIM=128"),
    "pr859": env("BIGRAM_VOCAB_SIZE=6144 BIGRAM_DIM=128 VE_DIM=128 VE_LAYERS=2,3"),
}


@needs_reference
@pytest.mark.parametrize("case", ["baseline", "pr489", "pr740", "pr859"])
def test_ten_steps_of_the_originals(case, rt, run_log, tmp_path):
    cfg = config(case, **TEN_STEPS, **TABLES_OF_TEN_STEPS.get(case, {}))
    expected = told("ten_steps")[case]
    tokens = tg.read_shard(SHARED / "data/web_sp1024/fineweb_train_000000.bin")[:200_000]
    shard = tmp_path / tg.shard_name("train", 0)
    tg.write_shard(shard, tokens)
    model = load(case, cfg, "init")
    trainer = tg.Trainer(cfg, rt, run_log, model, tg.TokenStream([shard], cfg))
    assert tg.train(trainer, lambda step: None) == "finished"
    lines = (run_log.out_dir / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["train_loss"] for line in lines]
    np.testing.assert_allclose(losses, expected["train_loss"], atol=1e-3)
    tokens, table = validation(8192)
    stride = 64 if case == "pr740" else 128
    network = tg.WindowNetwork(model, rt, cfg, 128, stride)
    scorer = tg.Scorer("after", network)
    score = tg.evaluate(scorer, tokens, table, cfg, rt, run_log)
    assert abs(score.loss - expected["val_loss_after"]) < 1e-3
