"""Test-time training and adapters (section 10): score first, learn then, and what is learned."""

import copy
import dataclasses
from collections import Counter

import numpy as np
import oracles
import oracles_adaptation as slow
import pytest
import torch
from conftest import FULL, TINY
from helpers import (
    LORA,
    TABLE,
    Cases,
    build,
    config,
    counted_compiler,
    log_of,
    mild,
    names_of,
    randomized,
    short_text,
    verdicts,
)

import train_gpt as tg

# Every token has its own number of bytes, so that byte weights matter.
BYTES = np.arange(260)
SIZES = tg.ByteTable((BYTES % 7).astype(np.int16), BYTES % 3 == 0, BYTES < 4, "sizes")
ADAPTS = dict(
    TINY,
    num_layers=2,
    train_seq_len=16,
    eval_stride=8,
    eval_batch_tokens=48,
    ttt_epochs=2,
    ttt_chunk_tokens=48,
    ttt_batch_seqs=2,
    ttt_lr=0.02,
    ttt_optimizer="sgd",
)


@pytest.fixture
def tokens(rng):
    return rng.integers(4, 260, 171).astype(np.uint16)


def learn(scorer, tokens, progress=0.0):
    """Test-time training on a stream as one chunk."""
    scorer.training.learn(tokens, progress)


def state_of(model):
    return copy.deepcopy(model.state_dict())


def equal(state, other):
    return all(torch.equal(w, other[name]) for name, w in state.items())


# --- chunk by chunk -------------------------------------------------------------------------------

QUERIES = dict(qttt=True, ttt_freeze_blocks=1)
TWO_PARTS = dict(ttt_parts=2, ttt_batch_seqs=1)
ADAPTATIONS = Cases()
ADAPTATIONS.add("clipped", ttt_lr=0.2)
ADAPTATIONS.add("weighted by bytes", byte_weighted_ttt=True, ttt_epochs=1)
ADAPTATIONS.add("two parts", **TWO_PARTS, byte_weighted_ttt=True, ttt_chunk_tokens=64)
ADAPTATIONS.add(
    "uneven parts", **TWO_PARTS, **QUERIES, ttt_chunk_tokens=80, eval_stride=16, ttt_lr=0.3
)
ADAPTATIONS.add("adam, tempered", ttt_optimizer="adamw", ttt_lr=0.003, ttt_temperature=0.93)
ADAPTATIONS.add("queries, clipped at times", **QUERIES, ttt_lr=0.3)
ADAPTATIONS.add("odd stride", eval_stride=6, ttt_chunk_tokens=30)
LAST_QUERIES_AND_SCALES = {
    "blocks.0.attn_scale",
    "blocks.0.mlp_scale",
    "blocks.1.attn_scale",
    "blocks.1.mlp_scale",
    "blocks.1.attn.c_q.weight",
}


@pytest.mark.parametrize("case", ADAPTATIONS)
def test_adaptation_equals_a_slow_loop(case, rt, run_log, rng):
    """Charge a chunk, then learn it, with a rate that falls along a cosine.

    The last chunk is only charged.
    """
    cfg = config(ADAPTS, **ADAPTATIONS[case])
    tokens = rng.integers(0, 260, 171).astype(np.uint16)
    model = randomized(cfg)
    learned = LAST_QUERIES_AND_SCALES if cfg.qttt else names_of(model)
    twin = slow.Adaptation(model, cfg, learned, SIZES)
    charges = twin.over_chunks(tokens, lambda windows: twin.charge(tokens, windows))
    assert len(charges) > 2
    plain = tg.Scorer("s", tg.WindowNetwork(model, rt, cfg, 16, cfg.eval_stride))
    without = tg.evaluate(plain, tokens, SIZES, cfg, rt, run_log)
    scorer = tg.STAGES["ttt"].build(model, rt, cfg, SIZES)
    score = tg.evaluate(scorer, tokens, SIZES, cfg, rt, run_log)
    np.testing.assert_allclose(score.nats, np.concatenate(charges), atol=5e-4)
    for (name, p), wanted in zip(model.named_parameters(), twin.model.parameters()):
        torch.testing.assert_close(p, wanted, atol=2e-4, rtol=1e-3, msg=name)
    assert max(twin.norms) > 1
    if cfg.qttt:
        assert min(twin.norms) < 1
    later = len(charges[0])
    assert np.abs(score.nats - without.nats)[later:].max() > 0.02
    assert score.label == "val_bpb"
    found = verdicts(score, scorer, tokens, cfg, rt)
    assert found["order"] == found["future"] == found["distribution"] == "PASS"


GATED_CACHE = dict(
    ngram="gated",
    ngram_order=7,
    ngram_min_order=2,
    ngram_buckets=64,
    ngram_primes=oracles.PRIMES["gated"],
    mixer_head=True,
    ttt_temperature=0.93,
    ngram_chunk_tokens=64,
    ttt_lr=0.1,
)


def test_gated_cache_over_an_adapting_network(rt, run_log, rng):
    """PR 834 as it was scored.

    The head weighs orders and a network that learns each chunk after its charge.
    """
    cfg = config(ADAPTS, **GATED_CACHE)
    tokens = rng.integers(100, 104, 200).astype(np.uint16)  # n-grams return
    tokens[[0, 66]] = 1
    model = randomized(cfg)
    twin = slow.Adaptation(model, cfg, names_of(model), SIZES)
    outputs = twin.over_chunks(tokens, lambda windows: twin.outputs(tokens, windows))
    log_p = np.concatenate([p for p, _ in outputs])
    hidden = np.concatenate([stream for _, stream in outputs])
    expected, _ = oracles.cache_charges(copy.deepcopy(model), tokens, cfg, log_p, hidden)
    scorer = tg.STAGES["ngram"].build(model, rt, cfg, SIZES)
    score = tg.evaluate(scorer, tokens, SIZES, cfg, rt, run_log)
    np.testing.assert_allclose(score.nats, expected, atol=5e-4)
    assert score.label == "unnormalised_score"


def test_weights_rest_while_a_chunk_is_charged(tokens, rt, run_log):
    """Untouched until the first chunk is charged, the same for all of a chunk.

    Nothing is learned after the last.
    """
    cfg = config(ADAPTS)
    model = randomized(cfg)
    scorer = tg.STAGES["ttt"].build(model, rt, cfg, TABLE)
    optimizer = scorer.training.optimizer
    predict = scorer.predict
    step = optimizer.step
    states = {number: [] for number in range(4)}  # weights at every batch of a chunk
    steps = Counter()  # of a chunk
    now = [0]  # the chunk

    def weights():
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    def watched(batch):
        now[0] = int(batch.index[0, 0]) // 48
        states[now[0]].append(weights())
        return predict(batch)

    def counted():
        steps[now[0]] += 1
        step()

    start = weights()
    scorer.predict = watched
    optimizer.step = counted
    tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log)
    assert steps == dict.fromkeys(range(3), 2 * 2)  # two epochs of two batches of rows
    assert torch.equal(states[0][0], start)
    for state in states.values():
        assert all(torch.equal(w, state[0]) for w in state)
    for number in range(1, 4):
        assert not torch.equal(states[number][0], states[number - 1][0])
    assert torch.equal(weights(), states[3][-1])


def test_one_chunk_is_only_charged(tokens, rt, run_log):
    """There is nothing left to learn for: no weight moves."""
    cfg = config(ADAPTS, ttt_chunk_tokens=176)
    model = randomized(cfg)
    before = state_of(model)
    scorer = tg.STAGES["ttt"].build(model, rt, cfg, TABLE)
    tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log)
    assert equal(model.state_dict(), before)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_restored_adaptation_is_bit_equal(optimizer, tokens, rt):
    """Weights and optimizer: what comes after a restore is what came after the snapshot."""
    cfg = config(ADAPTS, ttt_optimizer=optimizer)
    model = randomized(cfg)
    tokens = tokens[:49]
    scorer = tg.STAGES["ttt"].build(model, rt, cfg, TABLE)
    learn(scorer, tokens)
    state = scorer.state_dict()
    then = state_of(model)
    learn(scorer, tokens, 0.3)
    after = state_of(model)
    scorer.load_state_dict(state)
    assert equal(model.state_dict(), then)
    learn(scorer, tokens, 0.3)
    assert equal(model.state_dict(), after)
    assert not equal(then, after)


# --- what is learned ------------------------------------------------------------------------------

SCALES = {f"blocks.{i}.{kind}_scale" for i in range(3) for kind in ("attn", "mlp")}
SCALES |= {
    "bigram.scale",
    "hashes.0.scale",
    "hashes.1.scale",
    "ve_shared.scale",
    "ve_layer_scales.0",
    "ve_layer_scales.1",
}
LAST_QUERIES = {"blocks.2.attn.c_q.weight"}
LAST_ATTENTION = {f"blocks.2.attn.{name}.weight" for name in ("c_q", "c_k", "c_v", "proj")}
LAST_BLOCK = LAST_ATTENTION | {
    "blocks.2.attn.q_gain",
    "blocks.2.mlp.fc.weight",
    "blocks.2.mlp.proj.weight",
    "blocks.2.resid_mix",
}
LEARNED = {
    "queries of the last": (QUERIES, LAST_QUERIES),
    "queries of two": (
        dict(qttt=True, ttt_freeze_blocks=2),
        LAST_QUERIES | {"blocks.1.attn.c_q.weight"},
    ),
    "last block": (dict(ttt_freeze_blocks=1), LAST_BLOCK),
    "untied": (dict(QUERIES, tie_embeddings=False), LAST_QUERIES | {"lm_head.weight"}),
}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("case", LEARNED)
def test_adaptation_moves_what_it_says_and_nothing_else(case, optimizer, tokens, rt):
    """The list of PR 834; its mixer head may move, but the network's loss does not reach it."""
    settings, matrices = LEARNED[case]
    training = dict(ttt_epochs=1, ttt_batch_seqs=2, ttt_optimizer=optimizer)
    cfg = config(FULL, mixer_head=True, **training, **settings)
    model = randomized(cfg)
    before = copy.deepcopy(dict(model.named_parameters()))
    scorer = tg.STAGES["ttt"].build(model, rt, cfg, TABLE)
    learn(scorer, tokens[:129])
    after = dict(model.named_parameters())
    moved = {name for name, p in after.items() if not torch.equal(p, before[name])}
    may_move = {name for name, p in after.items() if p.requires_grad}
    assert moved == SCALES | matrices
    assert may_move == moved | {"alpha_head.weight", "alpha_head.bias"}


PUBLISHED = dict(
    num_layers=11,
    num_kv_heads=8,
    mlp_mult=3.5,
    bigram_vocab_size=6144,
    smear=True,
    ve_layers=(9, 10),
    mixer_head=True,
    ttt_epochs=1,
)


@pytest.mark.parametrize("qttt, blocks, count", [(True, 1, 277_003), (False, 2, 5_784_091)])
def test_adapted_parameters_at_full_size(qttt, blocks, count, rt):
    """What the logs of PR 834 and PR 859 print."""
    cfg = config(tg.BASELINE, **PUBLISHED, qttt=qttt, ttt_freeze_blocks=blocks)
    with torch.device("meta"):
        model = tg.GPT(cfg)
    tg.STAGES["ttt"].build(model, rt, cfg, TABLE)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


# --- before scoring -------------------------------------------------------------------------------


# Optimizer, rows of 16 tokens, parts.
FIRST = ["adamw 8 1", "sgd 8 2", "sgd 5 1", "sgd 9 2", "sgd 10 3", "sgd 10 2"]


@pytest.mark.parametrize("case", FIRST)
def test_adapting_first_is_called_what_it_is(case, rt, run_log, rng):
    """PR 489: a constant rate, all tokens, all parameters, then the score; it is never val_bpb."""
    optimizer, rows, parts = case.split()
    training = dict(ttt_optimizer=optimizer, ttt_lr=0.003, ttt_parts=int(parts))
    cfg = config(ADAPTS, ttt_before_scoring=True, eval_stride=16, **training)
    tokens = rng.integers(4, 260, int(rows) * 16 + 4).astype(np.uint16)
    model = randomized(cfg)
    twin = slow.Adaptation(model, cfg, names_of(model), SIZES)
    twin.learn(tokens, 0.003, slow.steps_before_scoring)
    expected = twin.charge(tokens, oracles.windows_of(len(tokens) - 1, 16, 16))
    scorer = tg.STAGES["ttt"].build(model, rt, cfg, SIZES)
    score = tg.evaluate(scorer, tokens, SIZES, cfg, rt, run_log)
    np.testing.assert_allclose(score.nats, expected, atol=5e-4)
    assert score.label == "adapted_before_scoring"
    assert "val_bpb" not in score.record()
    found = verdicts(score, scorer, tokens, cfg, rt)
    assert found["order"].startswith("EXPECTED")
    assert found["coverage"] == found["future"] == found["distribution"] == "PASS"


# --- adapters -------------------------------------------------------------------------------------


ADAPTERS = {
    "kept": dict(ttt_lora_keep=True),
    "reset": dict(ttt_lora_wd=0.7),
    "early chunks": dict(ttt_lora_early_chunks="3:7,8:20"),
    "global step": dict(ttt_global_docs=4, ttt_global_lr=0.05),
    "global step, kept": dict(ttt_global_docs=4, ttt_global_lr=0.05, ttt_lora_keep=True),
    "global step of many": dict(ttt_global_docs=5, ttt_global_lr=0.3, ttt_chunk_tokens=48),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_from_their_definition(name, rng, rt, run_log):
    """Each document alone: W + (alpha / rank) B A in place of W, trained after each chunk."""
    tokens = short_text(rng)
    cfg, scorer = build(rt, ttt_lora_rank=2, **ADAPTERS[name])
    model = mild(cfg)
    modules = [name for name, m in model.named_modules() if isinstance(m, tg.Linear)]
    names = [f"{name}.weight" for name in modules if name.startswith("blocks.")]
    expected = slow.adapter_charges(model, names, scorer.network.start, tokens, cfg)
    score = tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log)
    np.testing.assert_allclose(score.nats, expected, atol=2e-4)


def test_no_document_sees_another_ones_adapters(rng, rt, run_log):
    tokens = short_text(rng)
    other = tokens.copy()
    other[2:40] += 1
    nats = []
    for text in (tokens, other):
        cfg, scorer = build(rt, ttt_lora_rank=2, ttt_lora_keep=False, ttt_docs=8)
        nats.append(tg.evaluate(scorer, text, TABLE, cfg, rt, run_log).nats)
    change = np.abs(nats[1] - nats[0])
    assert change[:38].max() > 0.01
    assert change[40:].max() < 1e-5


# --- adapters on a GPU ----------------------------------------------------------------------------


def shuffled_documents(rng, count=40):
    """Documents of 3 to 90 tokens: their lengths rise and fall along the stream."""
    lengths = rng.integers(3, 90, count)
    tokens = rng.integers(4, 60, lengths.sum()).astype(np.uint16)
    tokens[np.cumsum(lengths) - lengths] = 1
    return tokens


@pytest.mark.parametrize("fixed_rows", [False, True])
def test_documents_of_like_length_stand_together(fixed_rows, rng, rt, run_log):
    """In windows of the stream: the same charges, in fewer batches that are fuller."""
    tokens = shuffled_documents(rng)
    nats, batches, filled = {}, {}, {}
    for groups in (1, 4):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tg, "DOCUMENT_GROUPS", groups)
            patch.setattr(rt, "profile", dataclasses.replace(rt.profile, fixed_rows=fixed_rows))
            cfg, scorer = build(rt, **LORA, ttt_lora_keep=False, ttt_docs=5)
            score = tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log)
            works = [chunk.work[0] for chunk in scorer.network.plan(tokens, 0).chunks()]
        assert not tg.check_order(score).problem
        nats[groups] = score.nats
        batches[groups] = len(works)
        filled[groups] = sum(len(work.first) for work in works) / (5 * len(works))
    np.testing.assert_allclose(nats[1], nats[4], atol=1e-4)
    assert batches[4] < 0.8 * batches[1]
    assert filled[4] > 1.25 * filled[1]


@pytest.mark.parametrize("slots, counts", [(64, [2, 4, 16, 64]), (8, [2, 8]), (1, [1])])
def test_batches_have_few_numbers_of_rows(slots, counts, rng):
    """Where each costs a compilation: as many as there are documents left, or a few more."""
    tokens = shuffled_documents(rng, 70)
    plan = tg.Documents(tokens, 1, 16, 8, slots, fixed_rows=True)
    assert plan.row_counts == counts
    for chunk in plan.chunks():
        documents = len(chunk.work[0].first)
        rows = len(plan.batch(tokens, chunk.work[0]).ids)
        assert rows == min(count for count in counts if count >= documents)


def test_who_keeps_adapters_keeps_the_order_of_the_stream(rt):
    """What a slot hands on must not depend on lengths that lie ahead."""
    tokens = np.tile(np.array([1, 5, 6], np.uint16), 50)
    for keep, groups in ((True, 1), (False, tg.DOCUMENT_GROUPS)):
        cfg, scorer = build(rt, **LORA, ttt_lora_keep=keep)
        assert scorer.network.plan(tokens, 0).together == groups * cfg.ttt_docs


def test_how_many_documents_stand_together_changes_no_score(rng, rt, run_log):
    tokens = shuffled_documents(rng, 9)
    nats = []
    for docs in (1, 3, 64):
        cfg, scorer = build(rt, **LORA, ttt_docs=docs)
        nats.append(tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log).nats)
    np.testing.assert_allclose(nats[1:], [nats[0]] * 2, atol=1e-4)


def test_a_process_holds_the_adapters_of_its_own_slots(rt):
    """Together they hold what one process holds."""
    whole, parts = adapters_of(rt, 0, 1), [adapters_of(rt, rank, 2) for rank in (0, 1)]
    for tensor, *own in zip(whole, *parts):
        assert [len(part) for part in own] == [3, 2]
        joined = torch.empty_like(tensor)
        joined[0::2], joined[1::2] = own
        assert torch.equal(joined, tensor)


def adapters_of(rt, rank, world):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rt, "rank", rank)
        patch.setattr(rt, "world", world)
        _, scorer = build(rt, **LORA, ttt_lora_keep=True, ttt_docs=5)
        return scorer.network.params


WARMED = {
    "windows": dict(eval_stride=8),
    "batches as the device likes": dict(eval_stride=8, eval_batch_tokens=0),
    "streaming": dict(eval_stream=16),
    "windows that learn": dict(ttt_epochs=1, ttt_batch_seqs=1, eval_stride=8),
    "adapters and a global step": dict(
        LORA, ttt_lora_chunk=8, ttt_global_docs=3, ttt_global_lr=0.05, ttt_chunk_tokens=64
    ),
}


@pytest.mark.parametrize("kind", WARMED)
def test_a_warmed_up_stage_compiles_nothing_more(kind, rng, rt, run_log, monkeypatch):
    """Random tokens have met all graphs; the charges are those of a scorer that met none."""
    tokens = shuffled_documents(rng, 9)
    settings = dict(WARMED[kind], num_layers=1, ve_layers=(), xsa_last_n=1)
    cfg, scorer = build(rt, **settings)
    expected = tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log).nats
    counters = []
    torch._dynamo.reset()
    monkeypatch.setattr(rt, "profile", dataclasses.replace(rt.profile, fixed_rows=True))
    monkeypatch.setattr(rt, "compiles", True)
    monkeypatch.setattr(rt, "compile", counted_compiler(counters))
    cfg, scorer = build(rt, **settings)
    tg.warm_up_scorer(scorer, cfg, rt, TABLE, len(tokens) - 1)
    graphs = [counter.frame_count for counter in counters]
    score = tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log)
    assert [counter.frame_count for counter in counters] == graphs
    assert all(graphs) == (kind != "streaming")  # which runs as it stands
    np.testing.assert_allclose(score.nats, expected, atol=1e-4)


def test_a_warm_up_is_outside_the_scoring_clock(rng, rt, run_log):
    cfg, scorer = build(rt, **LORA, max_eval_seconds=1e-9)
    tg.warm_up_scorer(scorer, cfg, rt, TABLE, 500)
    assert not run_log.seconds


@pytest.mark.parametrize("kept", [False, True])
def test_few_processes_take_fewer_documents_at_a_time(kept, rng, rt, run_log, monkeypatch):
    """Unless what they hand on depends on their number; no charge does."""
    tokens = shuffled_documents(rng, 9)
    cfg, scorer = build(rt, **LORA, ttt_docs=7, ttt_lora_keep=kept)
    expected = tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log).nats
    monkeypatch.setattr(tg, "SLOTS_A_PROCESS", 2)
    cfg, scorer = build(rt, **LORA, ttt_docs=7, ttt_lora_keep=kept)
    assert len(scorer.network.steps) == (7 if kept else 2)
    score = tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log)
    np.testing.assert_allclose(score.nats, expected, atol=1e-5)


@pytest.mark.parametrize("count", [3, 12, 40])
def test_chunks_of_a_stream_that_ends_among_the_early_ones(count, rt):
    """As the definition has it, document after document."""
    settings = dict(LORA, ttt_lora_early_chunks="4:16,8:32", ttt_lora_chunk=16, ttt_docs=2)
    _, scorer = build(rt, **settings)
    tokens = np.full(count, 5, np.uint16)
    tokens[0] = 1
    chunks = scorer.network.plan(tokens, 1).chunks()
    steps = [4, 4, 4, 4, 8, 8, 16]  # the last ones end with the stream
    ends = [min(end, count - 1) for end in np.cumsum(steps)]
    wanted = list(dict.fromkeys(ends))
    assert len(chunks) == len(wanted)


@pytest.mark.parametrize("beside", [False, True])
def test_a_global_step_has_one_shape_for_any_number_of_documents(beside, rng, rt, monkeypatch):
    """On a GPU with bounds, where another number of pieces would be another graph."""
    shapes = []

    def seen(segments):
        shapes.append(len(segments.bounds))
        raise StopIteration

    cfg = config(TINY, train_seq_len=4096, ttt_chunk_tokens=32768)
    monkeypatch.setattr(type(rt), "pads_documents", beside)
    monkeypatch.setattr(rt, "put_segments", seen)
    step = tg.GlobalStep(tg.WindowNetwork(tg.GPT(cfg), rt, cfg, 4096, 4096), cfg)
    for documents in (1, 11, 12, 22, 35):
        tokens = rng.integers(4, 60, 4097)
        tokens[np.linspace(0, 4000, documents).astype(int)] = cfg.bos_id
        with pytest.raises(StopIteration):
            step._mean_loss(tokens)
    assert len(set(shapes)) == 1 or beside


def test_one_graph_serves_chunks_of_all_lengths(rng, rt, run_log, monkeypatch):
    """The update has one too. Charges are those without."""
    tokens = shuffled_documents(rng, 9)
    settings = dict(LORA, ttt_lora_keep=False, ttt_docs=3, ttt_lora_chunk=8, num_layers=1)
    cfg, scorer = build(rt, **settings, ve_layers=(), xsa_last_n=1)
    expected = tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log).nats
    counters = []
    torch._dynamo.reset()
    monkeypatch.setattr(rt, "profile", dataclasses.replace(rt.profile, fixed_rows=True))
    monkeypatch.setattr(rt, "compiles", True)
    monkeypatch.setattr(rt, "compile", counted_compiler(counters))
    cfg, scorer = build(rt, **settings, ve_layers=(), xsa_last_n=1)
    score = tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log)
    assert [counter.frame_count for counter in counters] == [1, 1]
    np.testing.assert_allclose(score.nats, expected, atol=1e-4)


@pytest.mark.parametrize("docs", [5, 4, 1])
def test_checks_of_adapters_pass_in_every_process(docs, rng, rt, run_log, monkeypatch):
    """Whatever slots it has of its own, and with batches of fixed rows."""
    tokens = short_text(rng)
    monkeypatch.setattr(rt, "sum_", lambda tensor: tensor)
    monkeypatch.setattr(rt, "profile", dataclasses.replace(rt.profile, fixed_rows=True))
    for rank, world in ((0, 1), (0, 2), (1, 2), (2, 3)):
        monkeypatch.setattr(rt, "rank", rank)
        monkeypatch.setattr(rt, "world", world)
        cfg, scorer = build(rt, **LORA, ttt_docs=docs)
        score = tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log)
        found = verdicts(score, scorer, tokens, cfg, rt)
        assert (found["future"], found["distribution"]) == ("PASS", "PASS")


def test_a_global_step_is_made_once(rng, rt, run_log, monkeypatch):
    """However many groups of documents come after it."""
    monkeypatch.setattr(tg, "DOCUMENT_GROUPS", 1)
    cfg, scorer = build(rt, **LORA, ttt_docs=1, ttt_global_docs=2)
    learned = []
    scorer.global_step.pass_over = learned.append
    tokens = short_text(rng)
    tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log)
    (stream,) = learned
    assert np.array_equal(stream, tokens[:42])  # two documents, and where the third begins


def test_a_global_step_follows_the_mean_loss(rng, rt, monkeypatch):
    """Of all its targets, however they are shared out: before the clip, which hides a factor."""
    cfg, scorer = build(rt, **LORA, ttt_global_docs=1, ttt_chunk_tokens=64)
    model = scorer.network.model.requires_grad_(True)
    tokens = rng.integers(4, 60, 31)
    total = 0.0
    for at in range(0, 30, 8):  # an eighth of a step
        piece = torch.from_numpy(tokens[at : at + 9])[None]
        total = total + model(piece[:, :-1], piece[:, 1:]) * (piece.size(1) - 1) / 30
    expected = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    found = []
    monkeypatch.setattr(tg, "clip_gradients", lambda flat, most: found.append(flat.norm().item()))
    scorer.global_step.pass_over(tokens)
    norm = torch.stack([g.norm() for g in expected if g is not None]).norm().item()
    assert found == [pytest.approx(norm, rel=1e-4)]


@pytest.mark.parametrize("documents", [5, 6, 7])
def test_a_global_step_after_which_nothing_comes_is_warned_of(documents, rng, rt, run_log):
    cfg, scorer = build(rt, **LORA, ttt_global_docs=documents)
    tg.evaluate(scorer, short_text(rng), TABLE, cfg, rt, run_log)
    told = "changes no score: the stream has 6 documents" in log_of(run_log.out_dir)
    assert told == (documents > 5)


def test_mixers_learn_after_every_group_of_documents(rt):
    _, scorer = build(rt, **LORA, ttt_lora_keep=False, tilt=True)
    assert scorer.network.window == 1


def test_adapters_take_any_length_whatever_the_attention(rt):
    """Attention in blocks unrolls a length of its own."""
    _, scorer = build(rt, **LORA)
    network = scorer.network
    found = []

    def note(model, ids, context):
        found.append(context.backend)
        return tg.GPT.hidden(model, ids, context=context)

    network.compiled_hidden = note
    for backend in (tg.blocked_attention, tg.sdpa_attention):
        network.model.backend = backend
        network.predict(network.plan(np.ones(9, np.uint16), 1).position(np.ones(9, np.uint16), 5))
    assert found == [tg.sdpa_attention, tg.sdpa_attention]
