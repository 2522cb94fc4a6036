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
SMALL = dict(
    NUM_LAYERS="4",
    MODEL_DIM="64",
    NUM_HEADS="2",
    NUM_KV_HEADS="1",
    TRAIN_SEQ_LEN="256",
    EVAL_STRIDE="64",
    TRAIN_BATCH_TOKENS="4096",
    MICRO_BATCH_TOKENS="4096",
    DEVICE="cpu",
    COMPILE="0",
    QUANT_POLICY="",
)
# What the reference cases set otherwise than the published runs.
CASES = {
    "baseline": ("baseline", {}),
    "pr489": ("pr489", dict(BIGRAM_VOCAB_SIZE="512", BIGRAM_DIM="32", ROPE_DIMS="16")),
    "pr740": ("pr740_v1", dict(XSA_LAST_N="4", ROPE_DIMS="16")),
    "pr740_v2": ("pr740_v2", dict(XSA_LAST_N="4", ROPE_DIMS="16")),
    "pr859": (
        "pr859",
        dict(
            BIGRAM_VOCAB_SIZE="512",
            BIGRAM_DIM="32",
            VE_DIM="32",
            VE_LAYERS="2,3",
            XSA_LAST_N="4",
            NUM_KV_HEADS="2",
            ROPE_DIMS="16",
        ),
    ),
    "pr834": (
        "pr834",
        dict(
            BIGRAM_VOCAB_SIZE="512",
            BIGRAM_DIM="32",
            VE_DIM="32",
            VE_LAYERS="2,3",
            XSA_LAST_N="4",
            NUM_KV_HEADS="2",
            ROPE_DIMS="16",
        ),
    ),
}
needs_reference = pytest.mark.skipif(
    not REFERENCE.is_dir(), reason="reference outputs are not here"
)


def config(case, **overrides):
    name, settings = CASES[case]
    (path,) = TRACK.glob(f"*_{name}/config.env")
    return tg.load_config({"CONFIG": str(path), **SMALL, **settings, **overrides})


@pytest.mark.parametrize(
    "name, count",
    [
        ("baseline", 17_059_912),
        ("pr489", 17_383_481),
        ("pr740_v1", 17_650_248),
        ("pr740_v2", 17_650_248),
        ("pr834", 33_321_571),
        ("pr859", 33_321_571),
    ],
)
def test_parameter_counts_at_full_size(name, count):
    (path,) = TRACK.glob(f"*_{name}/config.env")
    with torch.device("meta"):
        assert (
            sum(p.numel() for p in tg.GPT(tg.load_config({"CONFIG": str(path)})).parameters())
            == count
        )


def renamed(weights):
    """Parameter names of the originals -> ours; PR 740's gate enters negated."""
    out = {}
    for name, w in weights.items():
        name = name.replace("bigram_hash.", "bigram.").replace("smear_gate", "smear.gate")
        out[name] = torch.from_numpy(-w if name == "smear.gate" and "smear_gate" in weights else w)
    return out


def load(case, cfg, kind="weights"):
    base = {"pr740_v2": "pr740", "pr834": "pr859"}.get(case, case)
    model = tg.GPT(cfg)
    model.load_state_dict(renamed(dict(np.load(REFERENCE / f"{base}_{kind}.npz"))), strict=True)
    return (
        model,
        np.load(REFERENCE / f"{base}_reference.npz"),
        json.loads((REFERENCE / "reference.json").read_text()),
    )


def validation(count):
    tokens = tg.read_shard(SHARED / "data/web_sp1024/fineweb_val_000000.bin")[: count + 1]
    model = SHARED / "data/tokenizers/fineweb_1024_bpe.model"
    return np.asarray(tokens), tg.ByteTable.from_sentencepiece(model)


@needs_reference
@pytest.mark.parametrize("case", ["baseline", "pr489", "pr740", "pr859"])
def test_loss_and_logits_of_the_originals(case):
    cfg = config(case)
    model, reference, told = load(case, cfg)
    ids, targets = (torch.from_numpy(reference[key]).long() for key in ("inputs", "targets"))
    assert abs(model(ids, targets).item() - told[case]["loss"]) < 1e-4
    if "logits_row0" in reference:
        np.testing.assert_allclose(
            model.logits(ids)[0, :64].detach().numpy(), reference["logits_row0"], atol=1e-4
        )
    if "gate_logits_row0" in reference:
        gate = model.alpha_head(model.hidden(ids))[0, :64].detach().numpy()
        np.testing.assert_allclose(gate, reference["gate_logits_row0"], atol=1e-4)


# Case -> (stage, settings, the original's charges).
CHARGES = {
    "sliding of PR 489": ("pr489", "sliding", {}, "sliding_nats"),
    "sliding of PR 740": ("pr740", "sliding", {}, "sliding_nats"),
    "sliding of PR 859": ("pr859", "sliding", {}, "sliding_nats"),
    "5-gram cache of PR 740": ("pr740", "ngram", dict(NGRAM_BUCKETS="65536"), "ngram_v1_nats"),
    "backoff cache of PR 740": ("pr740_v2", "ngram", dict(NGRAM_BUCKETS="65536"), "ngram_v2_nats"),
    "gated cache of PR 859": (
        "pr859",
        "ngram",
        dict(
            NGRAM_BUCKETS="65536",
            NGRAM_CHUNK_TOKENS="2048",
        ),
        "mixer_nats",
    ),
    "adaptation of all parameters": (
        "pr834",
        "ttt",
        dict(TTT_EPOCHS="2", TTT_LR="0.001", TTT_FREEZE_BLOCKS="2", QTTT="0"),
        "ttt_adamw_all_nats",
    ),
    "adaptation of queries": ("pr834", "ttt", dict(TTT_LR="0.001"), "ttt_qonly_nats"),
    "adaptation by SGD": (
        "pr834",
        "ttt",
        dict(
            TTT_LR="0.01",
            TTT_FREEZE_BLOCKS="2",
            TTT_OPTIMIZER="sgd",
            QTTT="0",
            BYTE_WEIGHTED_TTT="0",
        ),
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
    model, reference, _ = load(case, cfg)
    tokens, table = validation(6144)
    scorer = tg.STAGES[stage].build(model, rt, cfg, table)
    score = tg.evaluate(scorer, tokens, table, cfg, rt, run_log)
    charged = ~np.isnan(reference[key])  # PR 489 leaves the first window's rest out
    assert charged.sum() >= 6144 - 192
    np.testing.assert_allclose(score.nats[charged], reference[key][charged], atol=1e-4)


@needs_reference
@pytest.mark.parametrize("case", ["baseline", "pr489", "pr740", "pr859"])
def test_ten_steps_of_the_originals(case, rt, run_log, tmp_path):
    settings = dict(
        TRAIN_SEQ_LEN="128",
        ITERATIONS="10",
        WARMDOWN_ITERS="6",
        MUON_MOMENTUM_WARMUP_STEPS="5",
        SCHEDULE="tokens",
        VAL_LOSS_EVERY="0",
        WARMUP_STEPS="0",
    )
    if case == "pr859":
        settings |= dict(BIGRAM_VOCAB_SIZE="6144", BIGRAM_DIM="128", VE_DIM="128", VE_LAYERS="2,3")
    if case == "pr489":
        settings |= dict(BIGRAM_VOCAB_SIZE="2048", BIGRAM_DIM="128")
    cfg = config(case, **settings)
    model, _, told = load(case, cfg, "init")
    tg.write_shard(
        tmp_path / "fineweb_train_0.bin",
        tg.read_shard(SHARED / "data/web_sp1024/fineweb_train_000000.bin")[:200_000],
    )
    stream = tg.TokenStream([tmp_path / "fineweb_train_0.bin"], cfg)
    trainer = tg.Trainer(cfg, rt, run_log, model, stream)
    assert tg.train(trainer, lambda step: None) == "finished"
    losses = [
        json.loads(line)["train_loss"]
        for line in (run_log.out_dir / "metrics.jsonl").read_text().splitlines()
    ]
    np.testing.assert_allclose(losses, told["ten_steps"][case]["train_loss"], atol=1e-3)
    tokens, table = validation(8192)
    stride = 64 if case == "pr740" else 128
    score = tg.evaluate(
        tg.Scorer("after", tg.WindowNetwork(model, rt, cfg, 128, stride)),
        tokens,
        table,
        cfg,
        rt,
        run_log,
    )
    assert abs(score.loss - told["ten_steps"][case]["val_loss_after"]) < 1e-3
