"""Streaming, adapters, tilt and mixture against slow restatements.

Every predictor against itself, token by token.
"""

import copy
import dataclasses
import functools
import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import FULL, ROOT, TINY, clean_env, everything, mild
from test_counts import ORDERS, slow_counts

import train_gpt as tg

TABLE = tg.ByteTable.bytes260()
SHORT = dict(
    FULL,
    ttt_chunk_tokens=64,
    mix_chunk_tokens=64,
    ttt_lora_chunk=16,
    ttt_docs=3,
    ttt_lora_alpha=8.0,
    ttt_lr=0.01,
    eval_batch_tokens=64,
    ngram_buckets=1024,
)


@pytest.fixture
def tokens(rng):
    tokens = rng.integers(4, 40, 301).astype(np.uint16)  # few, so that contexts come again
    tokens[120:170] = tokens[20:70]
    tokens[200:260] = tokens[5:65]
    tokens[[0, 40, 41, 130, 131, 230]] = 1
    return tokens


def build(rt, **settings):
    """Settings, a fresh model and the last stage that the settings ask for."""
    cfg = tg.Config(**dict(SHORT, **settings))
    assert not tg.check_config(cfg)
    stages = [stage for stage in tg.STAGES.values() if stage.enabled(cfg)]
    return cfg, stages[-1].build(mild(cfg), rt, cfg, TABLE)


# --- streaming: one pass with a sliding-window mask -----------------------------------------------


def masked_pass(model, ids, window, bos=None):
    """Final hidden states of one pass over [1, T] whose attention mask is written out."""
    at = torch.arange(ids.size(1))
    mask = (at[None] <= at[:, None]) & (at[None] > at[:, None] - window)
    if bos is not None:
        document = (ids[0] == bos).cumsum(0)
        mask &= document[None] == document[:, None]
    masked = functools.partial(tg.sdpa_attention, mask=mask[None, None])
    return model.hidden(ids, dataclasses.replace(model.context(ids), backend=masked))


def continued(model, ids, cache):
    """Final hidden states of a piece that goes on where the cache is."""
    return model.hidden(ids, model.context(ids, cache))


VARIANTS = [
    dict(),
    dict(bigram_hash="linear", smear_before_norm=True),
    dict(smear_bos_mask=False),
    dict(
        smear=False,
        smear_bos_mask=False,
        bigram_vocab_size=0,
        ve_layers=(),
        xsa_last_n=0,
        num_kv_heads=4,
    ),
]


@pytest.mark.parametrize("window", [1, 7, 32])
@pytest.mark.parametrize("variant", VARIANTS)
def test_pieces_equal_one_masked_pass(variant, window, tokens):
    model = mild(tg.Config(**dict(FULL, **variant)))
    ids = torch.from_numpy(tokens[None].astype(np.int64))
    whole = -(-301 // window)
    for cuts in (
        [window] * whole,
        [1] * 301,
        [window * 3] * whole,
        [1, window * 4, 1, *[window] * whole],
    ):
        memory, at, outs = tg.KVCache(window, None), 0, []
        with torch.no_grad():
            for size in cuts:
                size = min(size, (301 - at) // window * window or 301 - at)
                if size:
                    outs.append(continued(model, ids[:, at : at + size], memory))
                    at += size
            expected = masked_pass(model, ids, window)
        assert (model.head(torch.cat(outs, 1)) - model.head(expected)).abs().max() < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_documents_are_as_if_they_stood_alone(variant, tokens):
    model = mild(tg.Config(**dict(FULL, **variant)))
    ids = torch.from_numpy(tokens[None].astype(np.int64))
    edges, memory = [*np.flatnonzero(tokens == 1), 301], tg.KVCache(16, 1)
    with torch.no_grad():
        expected = torch.cat(
            [masked_pass(model, ids[:, a:b], 16) for a, b in itertools.pairwise(edges)], 1
        )
        got = [continued(model, ids[:, at : at + 16], memory) for at in range(0, 301, 16)]
        got = torch.cat(got, 1)
    assert (model.head(got) - model.head(expected)).abs().max() < 1e-5


def test_angles_stay_small_and_follow_the_window(tokens):
    """Position 10 million gives what position 0 gives.

    A stretched rotary base follows the window, not the piece.
    """
    cfg = tg.Config(**dict(FULL, rope_train_seq_len=8))
    model, window = mild(cfg), 32
    longer = mild(dataclasses.replace(cfg, rope_train_seq_len=0, rope_base=1e4 * 4 ** (4 / 2)))
    ids = torch.from_numpy(tokens[None, :256].astype(np.int64))
    with torch.no_grad():
        got, memory = continued(model, ids, tg.KVCache(window, None)), tg.KVCache(window, None)
        assert (got - masked_pass(longer, ids, window)).abs().max() < 1e-4
        for _ in range(3):
            last = continued(model, ids, memory)
        assert memory.carried["document number"].item() == 1
        first = tg.KVCache(window, None)
        continued(model, ids, first)
        assert (continued(model, ids, first) - last).abs().max() < 1e-4


def test_streaming_in_any_order(tokens, rt):
    """A batch that does not continue the last one starts from the tokens that can reach it."""
    cfg, scorer = build(rt, eval_stream=8, eval_batch_tokens=8)
    plan = scorer.network.plan(tokens, scorer.chunk_targets)
    batches = [plan.batch(tokens, work) for chunk in plan.chunks() for work in chunk.work]
    assert scorer.network.left_context == 3 * 7 + 2 and len(batches) == 38

    def nats(batch):
        return tg.score_batch(scorer, batch, tokens, rt)

    forward = [nats(batch) for batch in batches]
    backward = [nats(batch) for batch in reversed(batches)][::-1]
    assert max(np.abs(a - b).max() for a, b in zip(forward, backward)) < 1e-5
    nats(dataclasses.replace(batches[4], ids=batches[4].ids + 1))  # other text: not continued
    assert np.abs(nats(batches[5]) - forward[5]).max() < 1e-5


# --- every scorer and nesting ---------------------------------------------------------------------

STREAM = dict(eval_stream=16)
TTT = dict(ttt_epochs=1, ttt_batch_seqs=1)
LORA = dict(ttt_lora_rank=2)
EXACT = dict(tilt=True, ngram="mix")
NESTINGS = {
    "sliding": {},
    "streaming": STREAM,
    "streaming documents": dict(STREAM, stream_docs=True),
    "sliding ttt": TTT,
    "streaming ttt": dict(STREAM, **TTT),
    "lora": LORA,
    "lora reset": dict(LORA, ttt_lora_keep=False),
    "tilt": dict(tilt=True),
    "mix": dict(ngram="mix"),
    "streaming mix": dict(STREAM, ngram="mix", ngram_docs=False),
    "streaming tilt mix": dict(STREAM, **EXACT),
    "streaming ttt tilt mix": dict(STREAM, **TTT, **EXACT),
    "lora tilt mix": dict(LORA, **EXACT),
    "head over exact counts": dict(ngram="mix", mixer_head=True, ngram_order=5),
}


@pytest.mark.parametrize("name", NESTINGS)
def test_score_equals_one_token_at_a_time(name, tokens, rt, run_log):
    """The fast path charges what the scorer says token by token, learning on its way."""
    cfg, scorer = build(rt, **NESTINGS[name])
    score = tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log)
    assert score.label == "val_bpb" and (score.coverage == 1).all()
    cfg, twin = build(rt, **NESTINGS[name])
    written, nats = np.zeros_like(tokens), []
    written[0] = tokens[0]
    for number, p in enumerate(tg.token_by_token(twin, written, cfg, rt), 1):
        assert abs(p.sum().item() - 1) < 1e-6
        nats.append(-p[int(tokens[number])].log().item())
        written[number] = tokens[number]
    np.testing.assert_allclose(score.nats, nats, atol=1e-5)
    assert abs(score.nats.mean(dtype=np.float64) - np.mean(nats)) < 1e-5


@pytest.mark.parametrize("name", NESTINGS)
def test_batch_size_and_state_do_not_matter(name, tokens, rt, run_log):
    """Scored again after load_state_dict, and by a deep copy made before, it is the same."""
    losses = []
    for size in (32, 64, 256):
        cfg, scorer = build(rt, **dict(NESTINGS[name], eval_batch_tokens=size))
        state, twin = scorer.state_dict(), copy.deepcopy(scorer)
        for _ in range(2):
            losses.append(tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log).loss)
            scorer.load_state_dict(state)
        if size == 64:
            losses.append(tg.evaluate(twin, tokens, TABLE, cfg, rt, run_log).loss)
    assert max(losses) - min(losses) < (1e-5 if "ttt" in name or "lora" in name else 1e-6)


@pytest.mark.parametrize("name", ["sliding ttt", "mix", "lora", "lora tilt mix"])
def test_a_state_in_the_middle_comes_back_whole(name, tokens, rt):
    """What follows is the same again and again, also after a chunk that was left unfinished."""
    cfg, scorer = build(rt, **NESTINGS[name])
    plan = scorer.network.plan(tokens, scorer.chunk_targets)
    for counts in scorer.counts:
        counts.prepare(tokens, plan)

    def nats(chunks, commit=True):
        charged = []
        for chunk in chunks:
            for work in chunk.work:
                batch = plan.batch(tokens, work)
                charged.append(tg.score_batch(scorer, batch, tokens, rt)[batch.real])
            if commit:
                scorer.commit(chunk, tokens)
        return np.concatenate(charged)

    chunks = plan.chunks()
    nats(chunks[:2])
    state = scorer.state_dict()
    first = nats(chunks[2:])
    for _ in range(2):
        scorer.load_state_dict(state)
        nats(chunks[2:3], commit=False)
        scorer.load_state_dict(state)
        np.testing.assert_array_equal(nats(chunks[2:]), first)


def test_a_stream_of_other_weights_begins_anew(tokens, rt):
    """After a state was taken back, no key or value of the weights before it is left."""
    _, scorer = build(rt, **STREAM)
    _, other = build(rt, **STREAM)
    plan = scorer.network.plan(tokens, 0)
    first, second, *_ = (plan.batch(tokens, work) for work in plan.chunks()[0].work)
    state = scorer.state_dict()
    tg.score_batch(scorer, first, tokens, rt)
    with torch.no_grad():
        for one in (scorer, other):
            one.network.model.blocks[0].attn.c_v.weight.mul_(-1)
    scorer.load_state_dict(state)
    nats = [tg.score_batch(one, second, tokens, rt) for one in (scorer, other)]
    np.testing.assert_allclose(*nats, atol=1e-5)


def test_a_deep_copy_has_a_model_of_its_own(tokens, rt, run_log, monkeypatch):
    """With compiled functions too, which no deep copy copies."""

    def atomic(function):
        def compiled(*inputs):
            return function(*inputs)

        return compiled

    monkeypatch.setattr(rt, "compile", atomic)
    cfg, scorer = build(rt, **NESTINGS["sliding ttt"])
    twin = copy.deepcopy(scorer)
    first = tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log).nats
    assert (tg.evaluate(twin, tokens, TABLE, cfg, rt, run_log).nats == first).all()
    pairs = zip(scorer.network.model.parameters(), twin.network.model.parameters())
    assert all(torch.equal(one, other) and one is not other for one, other in pairs)


@pytest.mark.parametrize("name", NESTINGS)
def test_a_query_changes_nothing(name, tokens, rt):
    """The same batch asked again, and again after others: the same answer, and no state."""
    cfg, scorer = build(rt, **NESTINGS[name])
    plan = scorer.network.plan(tokens, scorer.chunk_targets)
    for counts in scorer.counts:
        counts.prepare(tokens, plan)
    work = [work for chunk in plan.chunks() for work in chunk.work][:3]
    ids = torch.arange(260)
    answers = []
    for number in (0, 0, 2, 0):
        batch = plan.batch(tokens, work[min(number, len(work) - 1)])
        distribution = scorer.predict(batch)
        answers.append(distribution.prob(ids.expand(*batch.index.shape, -1)))
        assert torch.equal(distribution.prob(ids.expand(*batch.index.shape, -1)), answers[-1])
    assert torch.equal(answers[0], answers[1])
    assert (answers[0] - answers[3]).abs().max() < 1e-6


def test_every_switch_acts(tokens, rt, run_log):
    def loss(**settings):
        cfg, scorer = build(rt, **settings)
        return round(tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log).loss, 9)

    losses = [loss(**settings) for settings in NESTINGS.values()]
    losses += [
        loss(eval_stream=32),
        loss(**EXACT, ngram_docs=False),
        loss(**EXACT, mix_chunk_tokens=32),
        loss(**LORA, ttt_lora_chunk=32),
        loss(ttt_lora_rank=4),
        loss(**LORA, ttt_lora_alpha=4.0),
        loss(**LORA, ttt_lr=0.02),
        loss(**LORA, ttt_docs=2),
        loss(**LORA, qttt=True, ttt_freeze_blocks=2),
        loss(**LORA, ttt_freeze_blocks=1),
    ]
    assert len(set(losses)) == len(losses)


@pytest.mark.parametrize(
    "name", ["sliding", "sliding ttt", "tilt", "mix", "lora", "streaming ttt tilt mix"]
)
def test_compiled_as_eager(name, tokens, rt, run_log):
    torch.compiler.reset()
    compiling, losses = copy.copy(rt), []
    compiling.compile = lambda function: torch.compile(
        function, backend="aot_eager", fullgraph=True, dynamic=False
    )
    for runtime in (rt, compiling):
        cfg, scorer = build(runtime, **NESTINGS[name])
        losses.append(tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log).loss)
    assert abs(losses[0] - losses[1]) < 1e-5


RANKS = """
import json, os, sys
sys.path[:0] = {paths!r}
import numpy as np, torch
torch.set_num_threads(1)
from pathlib import Path
from test_predictors import NESTINGS, TABLE, build, tg
rt = tg.Runtime(tg.Config(device="cpu"), os.environ)
run_log, losses = tg.RunLog(Path({out!r}), rt), {{}}
for name, settings in NESTINGS.items():
    cfg, scorer = build(rt, **settings)
    score = tg.evaluate(scorer, np.load({tokens!r}), TABLE, cfg, rt, run_log)
    losses[name] = score.loss
    assert (score.coverage == 1).all(), name
if rt.main:
    Path({out!r}, f"{{rt.world}}.json").write_text(json.dumps(losses))
rt.close()
"""


def test_the_number_of_processes_does_not_matter(tokens, rt, run_log, tmp_path):
    np.save(tmp_path / "tokens.npy", tokens)
    script = tmp_path / "ranks.py"
    script.write_text(
        RANKS.format(
            paths=[str(ROOT), str(ROOT / "tests")],
            out=str(tmp_path),
            tokens=str(tmp_path / "tokens.npy"),
        )
    )
    for world in (1, 2, 3):
        launcher = [sys.executable]
        if world > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
        done = subprocess.run(
            [*launcher, str(script)],
            env=clean_env(OMP_NUM_THREADS="1"),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    one, *others = (json.loads((tmp_path / f"{world}.json").read_text()) for world in (1, 2, 3))
    for other, name in itertools.product(others, NESTINGS):
        learns = "ttt" in name or "lora" in name
        assert abs(other[name] - one[name]) < (1e-5 if learns else 1e-7 * one[name]), (
            name,
            other[name] - one[name],
        )


# --- slow restatements ----------------------------------------------------------------------------


def network_p(tokens, rt, **settings):
    """p of every token at every target [n, V] by the network alone, and its entropies."""
    _, scorer = build(rt, **settings)
    plan = scorer.network.plan(tokens, scorer.chunk_targets)
    every = [everything(scorer, plan.position(tokens, j)) for j in range(len(tokens) - 1)]
    p = torch.stack(every).numpy()
    return p, -(p * np.log(p)).sum(1)


def test_tilt_from_its_definition(tokens, rt, run_log):
    """b such that the hint has its bucket's share of hits; never lowered.

    Counted chunk by chunk of 64 targets.
    """
    p, _ = network_p(tokens, rt, eval_stream=16)
    cfg, scorer = build(rt, eval_stream=16, tilt=True)
    counts, seen, fresh, nats, raised = slow_counts(tokens, ORDERS, 1), {}, {}, [], 0
    for j in range(300):
        if j % 64 == 0:
            for bucket, (hits, trials) in fresh.items():
                old = seen.get(bucket, (0, 2))
                seen[bucket] = old[0] + hits, old[1] + trials
            fresh = {}
        at = [counts[order][:, j + 1] for order in ORDERS]
        rank = max((i for i, found in enumerate(at) if found[1]), default=None)
        target, charged = int(tokens[j + 1]), p[j, tokens[j + 1]]
        if rank is not None:
            _, total, _, hint, agree = map(int, at[rank])
            h = p[j, hint]
            bucket = (
                rank + 1,
                min(int(math.log2(total)), 5),
                min(4 * agree // total, 3),
                min(max(4 + math.floor(math.log(h / (1 - h)) / 1.5), 0), 7),
            )
            hits, trials = seen.get(bucket, (0, 2))
            boost = max(math.log(hits / (trials - hits)) - math.log(h / (1 - h)), 0) if hits else 0
            raised += boost > 0
            charged *= math.exp(boost * (target == hint)) / (1 + h * (math.exp(boost) - 1))
            old = fresh.get(bucket, (0, 0))
            fresh[bucket] = old[0] + (target == hint), old[1] + 1
        nats.append(-math.log(charged))
    score = tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log)
    np.testing.assert_allclose(score.nats, nats, atol=1e-5)
    assert raised > 30


def test_mixture_from_its_definition(tokens, rt, run_log):
    """Weights are the experts' mean responsibilities in the bucket, with a prior.

    Counted chunk by chunk.
    """
    p, doubt = network_p(tokens, rt, eval_stream=16)
    cfg, scorer = build(rt, eval_stream=16, ngram="mix")
    counts, prior = slow_counts(tokens, ORDERS, 1), np.array([9.0, *[1 / 9] * 9])
    seen, fresh, nats = {}, {}, []
    for j in range(300):
        if j % 64 == 0:
            for bucket, shares in fresh.items():
                seen[bucket] = seen.get(bucket, prior) + shares
            fresh = {}
        experts, q, rank, total = [p[j, tokens[j + 1]]], 1 / 260, 0, 1
        for i, order in enumerate(ORDERS):
            n, found, distinct = counts[order][:3, j + 1]
            if found:
                q = (max(n - 0.75, 0) + (0.5 + 0.75 * distinct) * q) / (found + 0.5)
                rank, total = i + 1, found
            experts.append(q)
        bucket = rank, min(int(math.log2(total)), 4), min(int(4 * doubt[j] / math.log(260)), 3)
        weights = seen.get(bucket, prior)
        parts = weights / weights.sum() * np.array(experts)
        nats.append(-math.log(parts.sum()))
        fresh[bucket] = fresh.get(bucket, 0) + parts / parts.sum()
    score = tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log)
    np.testing.assert_allclose(score.nats, nats, atol=1e-5)


@pytest.mark.parametrize("keep", [True, False])
def test_adapters_from_their_definition(keep, tokens, rt, run_log):
    """Each document alone: W + (alpha / rank) B A in place of W.

    With torch's AdamW, one step after each whole chunk.
    """
    cfg, scorer = build(rt, ttt_lora_rank=2, ttt_lora_keep=keep)
    model = mild(cfg)
    names = [
        f"{name}.weight"
        for name, m in model.named_modules()
        if isinstance(m, tg.Linear) and name.startswith("blocks.")
    ]
    weights = {name: p.detach() for name, p in model.named_parameters()}
    starts = [*np.flatnonzero(tokens[:-1] == 1), 300]
    kept = {slot: [low[slot].clone() for low in scorer.network.start] for slot in range(3)}
    nats = np.zeros(300)
    for document, (begin, end) in enumerate(itertools.pairwise(starts)):
        lows = [low.clone().requires_grad_() for low in kept[document % 3]]
        highs = [torch.zeros(len(weights[name]), 2, requires_grad=True) for name in names]
        optimizer = torch.optim.AdamW(
            [*lows, *highs], lr=0.01, betas=(0.0, 0.99), eps=1e-10, weight_decay=0.5
        )
        for chunk in range(begin, end, 16):
            upto = min(chunk + 16, end)
            first = max(begin, chunk + 16 - 32)  # 32 inputs at most, up to the chunk's end
            ids = torch.from_numpy(tokens[first:upto].astype(np.int64))[None]
            merged = {
                name: weights[name] + 4.0 * high @ low
                for name, low, high in zip(names, lows, highs)
            }
            changed = {f"model.{name}": w for name, w in {**weights, **merged}.items()}
            hidden = torch.func.functional_call(tg_hidden(model), changed, ids)
            targets = torch.from_numpy(tokens[chunk + 1 : upto + 1].astype(np.int64))
            losses = F.cross_entropy(
                model.head(hidden)[0, chunk - first :], targets, reduction="none"
            )
            nats[chunk:upto] = losses.detach().numpy()
            if upto - chunk == 16:
                optimizer.zero_grad()
                losses.mean().backward()
                optimizer.step()
        if keep:
            kept[document % 3] = [low.detach() for low in lows]
    score = tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log)
    np.testing.assert_allclose(score.nats, nats, atol=2e-4)


def tg_hidden(model):
    """A module whose forward is the model's `hidden`."""

    class Hidden(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model.hidden(ids)

    return Hidden()


def test_no_document_sees_another_ones_adapters(tokens, rt, run_log):
    cfg, scorer = build(rt, ttt_lora_rank=2, ttt_lora_keep=False, ttt_docs=8)
    first = tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log).nats
    other = tokens.copy()
    other[2:40] += 1
    _, scorer = build(rt, ttt_lora_rank=2, ttt_lora_keep=False, ttt_docs=8)
    second = tg.evaluate(scorer, other, TABLE, cfg, rt, run_log).nats
    assert np.abs(second - first)[:38].max() > 0.01 and np.abs(second - first)[40:].max() < 1e-5


DOCS = dict(STREAM, stream_docs=True)
ISOLATION = [DOCS, dict(DOCS, **TTT), dict(DOCS, tilt=True)]
ISOLATION += [dict(LORA, ttt_docs=2), dict(LORA, ttt_docs=2, ttt_lora_keep=False)]


@pytest.mark.parametrize("settings", ISOLATION)
def test_isolation_is_claimed_where_documents_are_isolated(settings, tokens, rt, run_log):
    """Another first document moves later charges, or the scorer says that it cannot."""
    nats, other = [], tokens.copy()
    other[1:40] = other[1:40][::-1]
    for text in (tokens, other):
        cfg, scorer = build(rt, **settings)
        nats.append(tg.evaluate(scorer, text, TABLE, cfg, rt, run_log).nats[40:])
    assert scorer.isolates_documents == (np.abs(nats[0] - nats[1]).max() < 1e-5)


def test_the_mixers_head_reads_true_distributions(tokens, rt, run_log):
    """PR 859's formula with exact distributions in place of the hashed ratios."""
    settings = dict(ngram="mix", mixer_head=True, ngram_order=5)
    cfg, scorer = build(rt, **settings)
    counts = scorer.mixers[0].counts
    p, _ = network_p(tokens, rt, mixer_head=True, ngram_order=5)
    plan = scorer.network.plan(tokens, scorer.chunk_targets)
    counts.prepare(tokens, plan)
    nats = []
    for j in range(300):
        hidden = scorer.predict(plan.position(tokens, j)).base.hidden[0, 0].clone()
        gate = scorer.network.model.alpha_head(hidden).double().softmax(-1).detach().numpy()
        target = p[j, tokens[j + 1]]
        q = counts.prob(np.array([j]), torch.tensor([[int(tokens[j + 1])]]))[0, 0, 1:5]
        nats.append(-math.log(0.05 * target + 0.95 * (gate @ np.array([target, *q]))))
    np.testing.assert_allclose(
        tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log).nats, nats, atol=1e-5
    )


@pytest.mark.parametrize(
    "settings, part",
    [
        (dict(eval_stream=24), "must be multiples of EVAL_STREAM"),
        (dict(stream_docs=True), "STREAM_DOCS=1 needs EVAL_STREAM"),
        (dict(ttt_lora_rank=2, ttt_epochs=1), "goes neither with"),
        (dict(ttt_lora_rank=2, ngram="backoff"), "goes neither with"),
        (dict(ngram="mix", mixer_head=True, ngram_order=9), "NGRAM_ORDER <= 7"),
        (dict(tilt=2), ""),
    ],
)
def test_settings_that_do_not_go_together(settings, part):
    problems = tg.check_config(
        tg.Config(**dict(TINY, ttt_chunk_tokens=64, mix_chunk_tokens=64, **settings))
    )
    assert any(part in problem for problem in problems) if part else not problems
