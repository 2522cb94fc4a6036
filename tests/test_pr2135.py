"""Model, optimizer and schedule of PR 2135 (1.0565): equal to the original, and to the formulas.

The original's numbers are read where they are, and never copied; other shapes are compared with a
restatement in float64.
"""

import copy
import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import oracles
import pytest
import torch
import torch.nn.functional as F
from conftest import SHARED
from helpers import (
    compiled,
    config,
    counted_compiler,
    cpu_runtime,
    losses_of,
    names_of,
    on_device_with,
    randomized,
    run,
    run_in_processes,
    run_traced,
    settings_in,
    take_step,
    tiny_settings,
)

import train_gpt as tg

REFERENCE = SHARED / "reference"
needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason="no reference numbers")

# Its techniques, with the values of its published log.
TECHNIQUES = settings_in("""
    DEFAULTS=baseline
    LEAKY_SLOPE=0.5 LN_SCALE=1 QK_GAIN_INIT=5 ORTHO_INIT=plain ASYM_LOGIT_RESCALE=1
    SKIP_GATES_ENABLED=1 SMEAR_GATE_ENABLED=1 SPARSE_ATTN_GATE_ENABLED=1 GATE_WINDOW=12
    TRAIN_DOC_MASK=1 WARMDOWN_FRAC=0.85 MIN_LR=0.1 MATRIX_LR=0.028 MUON_MOMENTUM=0.97
    MUON_MOMENTUM_WARMUP_START=0.92 MUON_ROW_NORMALIZE=1 MUON_POLAR_EXPRESS=1 MUON_WD=0.095
    TIED_EMBED_LR=0.03 EMBED_WD=0.085 SCALAR_LR=0.02 ADAM_WD=0.02 BETA2=0.99 GRAD_CLIP_NORM=0.3
    MLP_MULT=4 ROPE_DIMS=16 NUM_LOOPS=2 DEVICE=cpu
""")
FULL_SIZE = settings_in("""
    VOCAB_SIZE=8192 NUM_LAYERS=11 XSA_LAST_N=11 LOOP_START=3 LOOP_END=5 PARALLEL_START_LAYER=8
    TRAIN_SEQ_LEN=2048 TRAIN_BATCH_TOKENS=786432
""")
# The reference's small case, trained for ten steps of 4,096 tokens.
CASE = settings_in("""
    VOCAB_SIZE=1024 NUM_LAYERS=7 MODEL_DIM=64 NUM_HEADS=2 NUM_KV_HEADS=1 XSA_LAST_N=7 LOOP_START=2
    LOOP_END=3 PARALLEL_START_LAYER=5 SMEAR_BOS_MASK=1 TRAIN_SEQ_LEN=128 EVAL_SEQ_LEN=256
    TRAIN_BATCH_TOKENS=4096 MICRO_BATCH_TOKENS=4096 ITERATIONS=10 SCHEDULE=tokens EMA_DECAY=0.9
    MUON_MOMENTUM_WARMUP_STEPS=5 WARMUP_STEPS=0 VAL_LOSS_EVERY=0
""")


def case(**more):
    return tg.load_config({**TECHNIQUES, **CASE, **more})


def arrays(name):
    return {key: torch.from_numpy(x) for key, x in np.load(REFERENCE / f"{name}.npz").items()}


def told():
    return json.loads((REFERENCE / "pr2135.json").read_text())


def validation(count):
    shard = SHARED / "data/web_sp1024/fineweb_val_000000.bin"
    return np.array(tg.read_shard(shard)[:count])


# --- equal to the original ------------------------------------------------------------------------


def test_parameters_at_full_size():
    for caps, expected in (("1", 35_945_673), ("0", 35_945_671)):
        cfg = tg.load_config({**TECHNIQUES, **FULL_SIZE, "ASYM_LOGIT_RESCALE": caps})
        with torch.device("meta"):
            assert sum(p.numel() for p in tg.GPT(cfg).parameters()) == expected


@needs_reference
@torch.no_grad()
def test_losses_and_logits_of_the_original():
    model = tg.build_model(case(), cpu_runtime(), arrays("pr2135_weights"))
    known = arrays("pr2135_reference")
    ids, targets = known["inputs"].long(), known["targets"].long()
    for name, looped in (("plain", False), ("looped", True)):
        logits = model.logits(ids, looped=looped)[0, :64]
        torch.testing.assert_close(logits, known[f"logits_{name}"], atol=1e-4, rtol=0)
        loss = model(ids, targets, looped=looped)
        assert abs(float(loss) - told()[f"loss_{name}"]) < 1e-4
    assert torch.equal(model.logits(ids), model.logits(ids, looped=True))  # as a finished run


@needs_reference
@torch.no_grad()
def test_packed_documents_of_the_original():
    model = tg.build_model(case(), cpu_runtime(), arrays("pr2135_weights"))
    known = arrays("pr2135_reference")
    tokens = torch.from_numpy(validation(1025).astype(np.int64))
    ids, targets = tokens[None, :-1], tokens[None, 1:]
    bounds = known["packed_cu_seqlens"]
    assert tg.segment_starts(ids[0].numpy(), 1, 128).tolist() == bounds[:-1].tolist()
    nats = F.cross_entropy(model.logits(ids, documents=bounds)[0], targets[0], reduction="none")
    torch.testing.assert_close(nats, known["nats_packed_looped"], atol=1e-4, rtol=0)
    loss = model(ids, targets, documents=bounds)
    assert abs(float(loss) - told()["loss_packed_looped"]) < 1e-4


@needs_reference
def test_ten_steps_of_the_original(run_log, tmp_path):
    cfg = case()
    rt = cpu_runtime()
    shard = tmp_path / tg.shard_name("train", 0)
    tokens = tg.read_shard(SHARED / "data/web_sp1024/fineweb_train_000000.bin")[:200_000]
    tg.write_shard(shard, np.array(tokens))
    model = tg.build_model(cfg, rt, arrays("pr2135_init"))
    trainer = tg.Trainer(cfg, rt, run_log, model, tg.TokenStream([shard], cfg))
    assert tg.train(trainer, lambda step: None) == "finished"
    expected = told()["ten_steps"]
    np.testing.assert_allclose(losses_of(run_log.out_dir), expected["train_loss"], atol=1e-3)
    assert trainer.steps_looped == 6

    def loss_now():
        scorer = tg.Scorer("after", tg.WindowNetwork(model, rt, cfg, 128, 128))
        tokenizer = SHARED / "data/tokenizers/fineweb_1024_bpe.model"
        table = tg.ByteTable.from_sentencepiece(tokenizer)
        return tg.evaluate(scorer, validation(8193), table, cfg, rt, run_log).loss

    assert abs(loss_now() - expected["val_loss_after"]) < 1e-3
    trainer.averager.apply()
    assert abs(loss_now() - expected["val_loss_after_ema"]) < 1e-3


# --- equal to the formulas, in other shapes -------------------------------------------------------

SMALL = settings_in(
    "DEFAULTS=baseline VOCAB_SIZE=40 MODEL_DIM=16 NUM_HEADS=4 NUM_KV_HEADS=2 MLP_MULT=1.5"
)
SHAPES = {
    "all": """
        NUM_LAYERS=6 NUM_LOOPS=2 LOOP_START=1 LOOP_END=2 PARALLEL_START_LAYER=4 XSA_LAST_N=6
        SKIP_GATES_ENABLED=1 SMEAR_GATE_ENABLED=1 SMEAR_BOS_MASK=1 SPARSE_ATTN_GATE_ENABLED=1
        GATE_WINDOW=5 ASYM_LOGIT_RESCALE=1 LN_SCALE=1 ROPE_DIMS=2
    """,
    "odd layers, the middle one three times": "NUM_LAYERS=5 NUM_LOOPS=2 LOOP_START=2 LOOP_END=2",
    "all layers twice, no skips": """
        NUM_LAYERS=3 NUM_LOOPS=1 LOOP_START=0 LOOP_END=2 UNET_SKIPS=0
    """,
    "last layers, value embedding": """
        NUM_LAYERS=4 NUM_LOOPS=1 LOOP_START=2 LOOP_END=3 VE_LAYERS=1,3 VE_DIM=8
    """,
    "lanes from before the loop": """
        NUM_LAYERS=7 NUM_LOOPS=1 LOOP_START=3 LOOP_END=4 PARALLEL_START_LAYER=3
    """,
    "lanes that the first half has not": "NUM_LAYERS=6 PARALLEL_START_LAYER=1",
    "gates, smear over documents": """
        NUM_LAYERS=2 SMEAR_GATE_ENABLED=1 SPARSE_ATTN_GATE_ENABLED=1 SPARSE_ATTN_GATE_SCALE=2.0
        GATE_WINDOW=16
    """,
}
STARTS = {"one document": [0], "documents": [0, 3, 4, 9]}


def model_of(text):
    """A small model with these settings, all its parameters random."""
    return randomized(tg.load_config({**SMALL, **settings_in(text)}))


@pytest.mark.parametrize("documents", STARTS)
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_the_forward_pass_is_the_written_one(shape, documents, rng):
    model = model_of(SHAPES[shape])
    ids = rng.integers(0, 40, 14)
    starts = STARTS[documents]
    ids[starts[1:]] = 1
    for looped in (False, True):
        expected = oracles.ForwardPass(model, ids, looped and model.cfg.num_loops > 0, starts)
        logits = model.logits(torch.from_numpy(ids)[None], torch.tensor(starts), looped)
        np.testing.assert_allclose(logits[0].numpy(), expected.logits(), atol=2e-4)


@torch.no_grad()
def test_streams_and_windows_agree_with_recurrence_and_lanes(rng):
    """One pass with a cache, keyed by executed layer, is the whole row's."""
    model = model_of(SHAPES["all"])
    ids = torch.from_numpy(rng.integers(2, 40, (1, 24)))
    cache = tg.KVCache(24, None)
    pieces = [model.hidden(part, context=model.context(part, cache)) for part in ids.split(8, 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model.hidden(ids), atol=1e-4, rtol=1e-4)


def test_training_has_one_cap_and_leaves_those_of_scoring(rng):
    model = model_of("NUM_LAYERS=1 LOGIT_SOFTCAP=5 ASYM_LOGIT_RESCALE=1")
    plain = model_of("NUM_LAYERS=1 LOGIT_SOFTCAP=5")
    ids = torch.from_numpy(rng.integers(0, 40, (1, 9)))
    targets = ids.flip(1)
    plain.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(model(ids, targets), plain(ids, targets))
    assert not torch.equal(model.logits(ids), plain.logits(ids))
    caps = {"softcap_pos", "softcap_neg"}
    groups = tg.parameter_groups(model, model.cfg)
    trained = {name for members in groups.values() for name, _ in members}
    assert names_of(model) - trained == caps


# --- documents in a row ---------------------------------------------------------------------------


def starts_slowly(ids, bos, longest):
    starts = []
    for place, token in enumerate(ids):
        if not starts or token == bos or place - starts[-1] == longest:
            starts.append(place)
    return starts


@pytest.mark.parametrize("longest", [1, 3, 8, 100])
def test_segments_end_at_documents_and_at_their_longest(longest, rng):
    for _ in range(20):
        ids = rng.choice([1, 5, 6, 7, 8, 9], 50)
        starts = tg.segment_starts(ids, 1, longest)
        assert starts.tolist() == starts_slowly(ids, 1, longest)
        segments = tg.segments_of(starts, 50, max(longest, 50))
        placed = segments.gather[segments.scatter]
        assert placed.tolist() == list(range(50))
        assert segments.bounds[len(starts) :].unique().tolist() == [50]


def test_a_row_of_many_documents_has_room(rng):
    """The number of pieces is always the same, unless documents are very short."""
    sizes = set()
    for count in (1, 4, 9):
        starts = np.sort(rng.choice(np.arange(1, 4096), count, replace=False))
        sizes.add(len(tg.segments_of(np.array([0, *starts]), 4096, 1024).bounds))
    assert len(sizes) == 1
    assert len(tg.segments_of(np.arange(4096), 4096, 1024).bounds) > 4096


# --- runs -----------------------------------------------------------------------------------------

TINY_FRONT = settings_in("""
    NUM_LAYERS=4 NUM_LOOPS=1 LOOP_START=1 LOOP_END=1 PARALLEL_START_LAYER=3 SKIP_GATES_ENABLED=1
    SMEAR_GATE_ENABLED=1 SMEAR_BOS_MASK=1 SPARSE_ATTN_GATE_ENABLED=1 GATE_WINDOW=8
    ASYM_LOGIT_RESCALE=1 TRAIN_DOC_MASK=1 CONTEXT_SCHEDULE=32:0.5 ENABLE_LOOPING_AT=0.3
    WARMDOWN_FRAC=0.85 MIN_LR=0.1 MUON_ROW_NORMALIZE=1 MUON_POLAR_EXPRESS=1 EMA_DECAY=0.9
    SCHEDULE=tokens GRAD_CLIP_NORM=0.3 ITERATIONS=8 XSA_LAST_N=4 WARMDOWN_ITERS=0 SMEAR=0
    TRAIN_BATCH_TOKENS=384
""")


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("front") / "run"
    code, result, log = run(out, **TINY_FRONT)
    assert code == 0
    return out, result, log


def test_a_run_turns_recurrence_on_and_scores_with_it(whole_run):
    out, result, log = whole_run
    assert "looping:enabled step:3 layers:5" in log
    assert "training_flops_per_token:" in log and "with_loops:" in log
    assert not any("FAIL" in str(stage["audit"]) for stage in result["stages"].values())
    cfg = tg.load_config(tiny_settings(out, **TINY_FRONT))
    model = tg.GPT(cfg)
    a_token = [tg.training_flops(cfg, model, looped) for looped in (False, True)]
    expected = (3 * a_token[0] + 5 * a_token[1]) * cfg.train_batch_tokens
    assert result["train_flops"] == expected


def test_a_resumed_run_is_the_same_across_both_changes(whole_run, tmp_path):
    """Stopped before recurrence begins, and again before the context grows."""
    out = whole_run[0]
    state = (out / "final_model.pt").read_bytes()
    expected = torch.load(out / "final_model.pt", weights_only=True)
    assert state
    for step in (2, 3, 4):
        part = tmp_path / f"until_{step}"
        code, _, _ = run(part, **TINY_FRONT, SAVE_EVERY=str(step))
        rest = tmp_path / f"from_{step}"
        code, result, _ = run(rest, **TINY_FRONT, RESUME=str(part / "checkpoint.pt"))
        assert code == 0 and result["resumed"]
        found = torch.load(rest / "final_model.pt", weights_only=True)
        assert all(torch.equal(found[name], w) for name, w in expected.items())
        assert result["train_flops"] == whole_run[1]["train_flops"]


SCORED = settings_in("""
    EVAL_STRIDE=0 EVAL_PLAIN=1 TTT_LORA_RANK=2 TTT_LORA_ON=q,v,attn,mlp,head TTT_LORA_CHUNK=16
    TTT_LR=0.01 TTT_DOCS=4 TTT_GLOBAL_DOCS=2 TTT_GLOBAL_LR=0.01 TTT_CHUNK_TOKENS=64 TILT_BOOST=2
    TILT_ORDER=4 GPTQ_N_SAMPLES=4 EVAL_SEQ_LEN=64
""")


def test_a_compiled_run_is_the_eager_one(tmp_path, monkeypatch):
    """All that the defaults compile, traced as for a GPU, with batches of the device's own size."""
    first = tmp_path / "eager"
    second = tmp_path / "traced"
    _, eager, _ = run(first, **TINY_FRONT, **SCORED)
    code, traced, _ = run_traced(monkeypatch, second, **TINY_FRONT, **SCORED)
    assert code == 0
    assert list(traced["stages"]) == list(eager["stages"]) == ["plain", "mixed"]
    np.testing.assert_allclose(losses_of(second), losses_of(first), atol=1e-4)
    for name, stage in eager["stages"].items():
        found = traced["stages"][name]["loss"]
        assert found == pytest.approx(stage["loss"], abs=1e-3)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_train_alike(processes, whole_run, tmp_path):
    """Sums of gradients have another order: to rounding."""
    result = run_in_processes(tmp_path / "run", processes, **TINY_FRONT)
    found = losses_of(tmp_path / "run")
    np.testing.assert_allclose(found, losses_of(whole_run[0]), atol=2e-4)
    scores = [r["stages"]["sliding"]["loss"] for r in (result, whole_run[1])]
    assert abs(scores[0] - scores[1]) < 1e-3


def test_the_context_grows_by_the_rows_of_its_schedule(run_log):
    lengths = "TRAIN_DOC_MASK=1 TRAIN_SEQ_LEN=32 CONTEXT_SCHEDULE=8:0.1,16:0.7 EVAL_STRIDE=0"
    batch = "NUM_LAYERS=1 TRAIN_BATCH_TOKENS=64 MICRO_BATCH_TOKENS=64"
    model = model_of(f"{lengths} {batch}")
    trainer = tg.Trainer(model.cfg, cpu_runtime(), run_log, model, None)
    rows = {0.0: 8, 0.099: 8, 0.1: 16, 0.69: 16, 0.7: 32, 1.0: 32}
    for share, length in rows.items():
        trainer.follow(share)
        assert trainer.longest == length


def test_recurrence_that_never_began_is_said(tmp_path):
    code, result, log = run(tmp_path / "run", **TINY_FRONT | dict(ENABLE_LOOPING_AT="0.95"))
    assert code == 0
    assert "WARNING: training ended before ENABLE_LOOPING_AT" in log


def test_the_end_by_steps_is_the_end_of_the_schedules(run_log):
    """Under the clock, too: what is to begin late begins when few steps are left."""
    cfg = config(tg.BASELINE, max_wallclock_seconds=100.0, iterations=10)
    clock = tg.Clock(cfg, 0)
    clock.last = tg.StepReport(step=8, elapsed=5.0)
    assert clock.progress(9) == 0.9
    clock.last = tg.StepReport(step=1, elapsed=50.0)
    assert clock.progress(2) == 0.5


def test_two_graphs_whatever_changes(run_log, tmp_path):
    """Both are there after the warm-up; documents of any number and a longer context make none."""
    settings = dict(NUM_LAYERS="3", LOOP_START="1", LOOP_END="1", PARALLEL_START_LAYER="2")
    small = dict(XSA_LAST_N="3", MODEL_DIM="32", MUON_BACKEND_STEPS="2", TRAIN_SEQ_LEN="64")
    batch = dict(TRAIN_BATCH_TOKENS="512", MICRO_BATCH_TOKENS="512", CONTEXT_SCHEDULE="16:0.5")
    cfg = case(**settings, **small, **batch, NUM_LOOPS="1", ENABLE_LOOPING_AT="0.3")
    counters = []
    rt = tg.Runtime(cfg, {})
    rt.compile = counted_compiler(counters)
    on_device_with(rt, fixed_rows=True)
    torch._dynamo.reset()
    cfg = dataclasses.replace(cfg, warmup_steps=1, iterations=8, schedule="tokens")
    trainer = tg.Trainer(cfg, rt, run_log, tg.build_model(cfg, rt), None)
    before = copy.deepcopy(trainer.model.state_dict())
    tg.warm_up(trainer)
    assert counters[0].frame_count == 2
    assert all(torch.equal(w, before[name]) for name, w in trainer.model.state_dict().items())
    rng = np.random.default_rng(0)
    graphs = []
    for trainer.steps_done in range(8):
        ids = rng.integers(2, 1024, (1, 512))
        documents = 2 + trainer.steps_done % 3
        ids[0, rng.integers(0, 512, documents)] = 1
        take_step(trainer, lambda unit, ids=ids: (ids, ids))
        graphs.append(counters[0].frame_count)
    assert graphs == [2] * 8
    assert trainer.model.looping


# A switch of training, and what must be on for it to act.
OF_TRAINING = {
    "MUON_ROW_NORMALIZE=1": "",
    "MUON_POLAR_EXPRESS=1": "",
    "WARMDOWN_FRAC=0.9": "",
    "MIN_LR=0.9": "WARMDOWN_FRAC=0.9",
    "TRAIN_DOC_MASK=1": "",
    "CONTEXT_SCHEDULE=8:0.9": "TRAIN_DOC_MASK=1",
    "ENABLE_LOOPING_AT=0": "NUM_LOOPS=1 LOOP_START=1 LOOP_END=1",
}


@pytest.mark.parametrize("switch", OF_TRAINING)
def test_a_switch_of_training_is_alive(switch, run_log):
    """Two steps late in the run end in other weights."""
    shape = "NUM_LAYERS=2 TRAIN_SEQ_LEN=16 TRAIN_BATCH_TOKENS=64 MICRO_BATCH_TOKENS=64 DEVICE=cpu"
    ended = []
    for settings in (OF_TRAINING[switch], f"{OF_TRAINING[switch]} {switch}"):
        texts = settings_in(f"{shape} BOS_ID=5 EVAL_STRIDE=0 {settings} WARMDOWN_ITERS=0")
        cfg = tg.load_config({**SMALL, **texts})
        model = randomized(cfg)
        trainer = tg.Trainer(cfg, cpu_runtime(), run_log, model, None)
        ids = np.random.default_rng(0).integers(0, 40, (trainer.rows, cfg.row_tokens))
        ids[0, 7] = cfg.bos_id
        trainer.follow(0.2)

        def batch(unit, ids=ids):
            return ids, ids

        for _ in range(2):
            trainer.step(batch, 9.0, 0.2)
        ended.append(model.state_dict())
    assert any(not torch.equal(w, ended[1][name]) for name, w in ended[0].items())


@torch.no_grad()
def test_compiled_as_eager(rng):
    model = model_of(SHAPES["all"])
    ids = torch.from_numpy(rng.integers(2, 40, (1, 24)))
    starts = torch.tensor([0, 5, 17])
    context = model.context(ids, documents=starts)
    found = compiled(model.logits)(ids, context=context)
    torch.testing.assert_close(found, model.logits(ids, documents=starts), atol=1e-5, rtol=1e-4)


def test_batches_are_read_ahead_and_say_what_fails():
    read = []

    def batch_of(number):
        read.append(number)
        if number == 4:
            raise tg.InputError("a cut shard")
        return number * 10

    batches = tg.Prefetcher(batch_of, 2, ThreadPoolExecutor(1))
    assert [batches(0), batches(2)] == [0, 20]
    with pytest.raises(tg.InputError, match="a cut shard"):
        batches(4)
    assert batches(7) == 70  # what nobody expected is read at once
    assert read[:3] == [0, 2, 4]


# --- its artifact ---------------------------------------------------------------------------------


@needs_reference
def test_gptq_and_corrections_of_pr2135():
    """Codes, scales and restored weights of its own program, from its weights and Hessians."""
    found = np.load(REFERENCE / "pr2135_quant.npz")
    names = sorted({key.rpartition("/")[0] for key in found})
    theirs = dict(quant_bits=6, quant_policy="embed:7", keep_float_max_numel=0)
    theirs |= dict(matrix_clip_sigmas=12.85, attn_clip_sigmas=13.0, mlp_clip_sigmas=11.5)
    theirs |= dict(embed_clip_sigmas=14.0, gptq_n_samples=1, gptq_embed=True)
    cfg = tg.Config(**theirs, lqer_enabled=True, lqer_asym_group=32)
    state = {name: torch.from_numpy(found[f"{name}/w"]) for name in names}
    hessians = {name: torch.from_numpy(found[f"{name}/hessian"]) for name in names}
    for tensor in tg.fit_all(state, cfg, tg.Calibration(hessians)):
        codes, scales = tensor.arrays[:2]
        np.testing.assert_array_equal(codes, found[f"{tensor.name}/codes"])
        np.testing.assert_array_equal(scales[:, 0], found[f"{tensor.name}/scale"])
        restored = tg.decoded(tensor, cfg).numpy()
        np.testing.assert_allclose(restored, found[f"{tensor.name}/restored"], atol=1e-6)
        assert ("lqer" in tensor.kind) == (tensor.name != "tok_emb.weight")


# --- adapters -------------------------------------------------------------------------------------

ADAPTERS = settings_in("""
    TTT_LORA_RANK=8 TTT_LORA_CHUNK=48 TTT_LR=0.002 TTT_LORA_WD=2 TTT_LORA_ON=q,v,attn,mlp,head
""")
THEIR_NAMES = dict(q="q_loras", v="v_loras", attn="o_loras", mlp="mlp_loras")
ONES = np.ones(1024, np.int16)
ONE_BYTE = tg.ByteTable(ONES, ONES < 1, ONES < 1, "one byte a token")


def adapted_charges(tokens, slots, run_log):
    """Nats of a stream with the original's weights, and its A of these slots, and the plan.

    slots: of the documents by falling length, which is the order of our rows.
    """
    cfg = case(**ADAPTERS, TTT_DOCS=str(len(slots)))
    model = tg.build_model(cfg, cpu_runtime(), arrays("pr2135_weights"))
    network = tg.PerDocumentLoRA(model, cpu_runtime(), cfg)
    known = arrays("pr2135_lora_start")
    names = [f"{THEIR_NAMES[place]}.{i}" for i in range(11) for place in network.places[i]]
    names.append("lm_head_lora")
    network.start = [known[f"{theirs}.A"][slots] for theirs in names]
    for params, a in zip(network.params[::2], network.start, strict=True):
        params.copy_(a)
    score = tg.evaluate(tg.Scorer("s", network), tokens, ONE_BYTE, cfg, cpu_runtime(), run_log)
    return score.nats, network.plan(tokens, 0)


def largest_by_document(wrong, plan):
    """Of each document's first 2,000 charges, and of all others."""
    pieces = [wrong[lo:hi] for lo, hi in zip(plan.starts, plan.ends)]
    later = max(piece[2000:].max(initial=0) for piece in pieces)
    return max(piece[:2000].max(initial=0) for piece in pieces), later


@needs_reference
@pytest.mark.parametrize("count", [4, pytest.param(5, marks=pytest.mark.slow)])
def test_adapters_of_the_original(count, run_log):
    """Every charge, but those of a document's last chunk, if its window is full: see below.

    The fifth document is longer than the other four.
    """
    known = arrays("pr2135_reference")
    lengths = np.array(told()["ttt_documents"])[:count]
    tokens = known["ttt_tokens"].numpy()[: lengths.sum() + 1]
    by_length = np.argsort(-lengths, kind="stable")
    slots = known["ttt_slot_of_document"][by_length]
    nats, plan = adapted_charges(tokens, slots, run_log)
    wrong = np.abs(nats - known["ttt_lora_nats"].numpy()[: len(nats)])
    for lo, hi in zip(plan.starts, plan.ends):
        if hi - lo > 256:
            wrong[hi - (hi - lo) % 48 : hi] = 0
    first, later = largest_by_document(wrong, plan)
    assert first < 1e-4
    assert later < 3e-3


class WindowsToTheEnd(tg.Documents):
    """The original's last window ends with its document, and so reaches further to the left.

    Where a document ends is not known inside its last chunk: our windows end where the whole chunk
    would.
    """

    def batch(self, tokens, rows):
        batch = super().batch(tokens, rows)
        end = min(rows.first[0] + 48, rows.end[0])
        start = max(end - self.seq_len, 0)
        length = int(rows.first[0]) + 48 - start
        starts = np.array([start])
        return tg.make_batch(tokens, starts, length, batch.index, batch.real, goes_on=batch.goes_on)


SOON = [0, 1, 2, 3]
LATER = [pytest.param(4, marks=pytest.mark.slow)]


@needs_reference
@pytest.mark.parametrize("document", SOON + LATER)
def test_adapters_and_last_windows_of_the_original(document, run_log, monkeypatch):
    """Every charge of a document by itself: they share nothing."""
    known = arrays("pr2135_reference")
    tokens = known["ttt_tokens"].numpy()
    theirs = known["ttt_lora_nats"].numpy()
    documents = tg.Documents(tokens, 1, 256, 48, 5)

    monkeypatch.setattr(tg, "Documents", WindowsToTheEnd)
    lo, hi = documents.starts[document], documents.ends[document]
    slot = known["ttt_slot_of_document"][document]
    nats, plan = adapted_charges(tokens[lo : hi + 1], slot[None], run_log)
    wrong = np.abs(nats - theirs[lo:hi])
    first, later = largest_by_document(wrong, plan)
    assert first < 1e-4
    assert later < 3e-3
    mean = nats.mean(dtype=np.float64)
    assert abs(mean - theirs[lo:hi].mean()) < 2e-5
