"""All true scorers (section 10): streaming, and every scorer against itself, token by token."""

import copy
import dataclasses
import functools
import itertools
import json

import numpy as np
import oracles
import pytest
import torch
from conftest import FULL
from helpers import (
    EVERYWHERE,
    FIXED,
    GLOBAL,
    LORA,
    NESTINGS,
    STREAM,
    TABLE,
    TTT,
    Cases,
    build,
    config,
    in_processes,
    largest,
    mild,
    short_text,
)

import train_gpt as tg


@pytest.fixture
def tokens(rng):
    return short_text(rng)


def ids_of(tokens):
    return torch.from_numpy(tokens[None].astype(np.int64))


def learns(name):
    """Whether a scorer's charges pass through sums of gradients."""
    return "ttt" in name or "lora" in name


# --- streaming: one pass with a sliding-window mask -----------------------------------------------


def looked_back(ids, cache, cfg, reach):
    """What `Induction.followers` finds in [1, T], token by token."""
    found = oracles.followers(ids[0], cfg.induction_orders, cfg.bos_id, reach)
    tokens = [[token or 0 for token, _ in found]]  # of no meaning where the order is none
    return torch.tensor(tokens), torch.tensor([[number for _, number in found]])


def masked_pass(model, ids, window, bos=None):
    """Final hidden states of one pass over [1, T] whose mask and look back are written out."""
    at = torch.arange(ids.size(1))
    mask = (at[None] <= at[:, None]) & (at[None] > at[:, None] - window)
    if bos is not None:
        document = (ids[0] == bos).cumsum(0)
        mask &= document[None] == document[:, None]
    masked = functools.partial(oracles.masked_attention, mask=mask)
    context = dataclasses.replace(model.context(ids), backend=masked)
    with pytest.MonkeyPatch.context() as patch:
        if model.induction is not None:
            within = functools.partial(looked_back, cfg=model.cfg, reach=window - 1)
            patch.setattr(model.induction, "followers", within)
        return model.hidden(ids, context=context)


def continued(model, ids, cache):
    """Final hidden states of a piece that goes on where the cache is."""
    return model.hidden(ids, context=model.context(ids, cache))


def in_pieces(model, ids, cache, sizes):
    """Final hidden states piece by piece; sizes may ask for more than there is."""
    outs = []
    for size in sizes:
        piece = ids[:, :size]
        ids = ids[:, size:]
        if piece.numel():
            outs.append(continued(model, piece, cache))
    assert not ids.numel()
    return torch.cat(outs, 1)


def cuts_of(length, window):
    """Ways to cut a text into pieces: windows, single tokens, several windows, all of them mixed.

    A piece of more than one window is a whole number of them.
    """
    windows = [window] * (length // window)
    rest = [1] * (length % window)
    threes = [3 * window] * (length // (3 * window))
    after_threes = [1] * (length - sum(threes))
    one_four_one = [1, 4 * window, 1]
    more = (length - sum(one_four_one)) // window
    mixed = [*one_four_one, *[window] * more]
    after_mixed = [1] * (length - sum(mixed))
    cuts = [windows + rest, [1] * length, threes + after_threes, mixed + after_mixed]
    return [cut for number, cut in enumerate(cuts) if cut not in cuts[:number]]


VARIANTS = Cases()
VARIANTS.add("everything")
VARIANTS.add("linear bigram, smear before norm", bigram_hash="linear", smear_before_norm=True)
VARIANTS.add("smear across documents", smear_bos_mask=False)
VARIANTS.add(
    "plain",
    smear=False,
    smear_bos_mask=False,
    bigram_vocab_size=0,
    ve_layers=(),
    xsa_last_n=0,
    num_kv_heads=4,
)


@pytest.mark.parametrize("window", [1, 7, 32])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_pieces_equal_one_masked_pass(variant, window, tokens):
    """However the text is cut."""
    model = mild(config(FULL, **VARIANTS[variant]))
    ids = ids_of(tokens[:173])
    expected = model.head(masked_pass(model, ids, window))
    for sizes in cuts_of(173, window):
        found = in_pieces(model, ids, tg.KVCache(window, None), sizes)
        assert largest(model.head(found) - expected) < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_documents_are_as_if_they_stood_alone(variant, tokens):
    model = mild(config(FULL, **VARIANTS[variant]))
    ids = ids_of(tokens)
    edges = [*np.flatnonzero(tokens == 1), 301]
    documents = [ids[:, begin:end] for begin, end in itertools.pairwise(edges)]
    expected = torch.cat([masked_pass(model, document, 16) for document in documents], 1)
    found = in_pieces(model, ids, tg.KVCache(16, 1), [16] * 19)
    assert largest(model.head(found) - model.head(expected)) < 1e-5


@torch.no_grad()
def test_angles_stay_small_and_follow_the_window(tokens):
    """A text that is read again and again gives the same again.

    A stretched rotary base follows the window, not the piece.
    """
    cfg = config(FULL, rope_train_seq_len=8)
    model = mild(cfg)
    stretched = 1e4 * 4 ** (4 / 2)
    longer = mild(dataclasses.replace(cfg, rope_train_seq_len=0, rope_base=stretched))
    ids = ids_of(tokens[:256])
    found = continued(model, ids, tg.KVCache(32, None))
    assert largest(found - masked_pass(longer, ids, 32)) < 1e-4
    cache = tg.KVCache(32, None)
    passes = [continued(model, ids, cache) for _ in range(3)]
    assert cache.carried["document number"].item() == 1
    assert largest(passes[1] - passes[2]) < 1e-4


def test_streaming_in_any_order(tokens, rt):
    """A batch that does not continue the last one starts from the tokens that can reach it."""
    cfg, scorer = build(rt, eval_stream=8, eval_batch_tokens=8)
    plan = scorer.network.plan(tokens, scorer.chunk_targets)
    batches = [plan.batch(tokens, work) for chunk in plan.chunks() for work in chunk.work]
    assert scorer.network.left_context == 3 * 7 + (7 + 2)  # induction of two tokens, smeared
    assert len(batches) == 38

    def nats(batch):
        return tg.score_batch(scorer, batch, tokens, rt).numpy()

    forward = [nats(batch) for batch in batches]
    backward = [nats(batch) for batch in reversed(batches)]
    for first, second in zip(forward, reversed(backward)):
        assert np.abs(first - second).max() < 1e-5
    nats(dataclasses.replace(batches[4], ids=batches[4].ids + 1))  # other text: not continued
    assert np.abs(nats(batches[5]) - forward[5]).max() < 1e-5


# --- every scorer and nesting ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def scores(rt, tmp_path_factory):
    """The score of a nesting, made once."""
    log = tg.RunLog(tmp_path_factory.mktemp("scores"), rt)
    tokens = short_text(np.random.default_rng(0))

    @functools.cache
    def score_of(name):
        cfg, scorer = build(rt, **NESTINGS[name])
        return tg.evaluate(scorer, tokens, TABLE, cfg, rt, log)

    return score_of


@pytest.mark.parametrize("name", NESTINGS)
def test_score_equals_one_token_at_a_time(name, scores, tokens, rt):
    """The fast path charges what the scorer says token by token, learning on its way."""
    score = scores(name)
    assert score.label == "val_bpb"
    assert (score.coverage == 1).all()
    cfg, twin = build(rt, **NESTINGS[name])
    written = np.zeros_like(tokens)
    written[0] = tokens[0]
    nats = []
    for number, p in enumerate(tg.token_by_token(twin, written, cfg, rt), 1):
        token = int(tokens[number])
        assert abs(p.sum().item() - 1) < 1e-6
        nats.append(-p[token].log().item())
        written[number] = token
    np.testing.assert_allclose(score.nats, nats, atol=1e-5)
    assert abs(score.nats.mean(dtype=np.float64) - np.mean(nats)) < 1e-5


@pytest.mark.parametrize("name", NESTINGS)
def test_batch_size_and_state_do_not_matter(name, scores, tokens, rt, run_log):
    """Scored again after load_state_dict, and by a deep copy made before, it is the same."""
    losses = [scores(name).loss]  # of 64 tokens a batch
    for size in (32, 256):
        cfg, scorer = build(rt, **dict(NESTINGS[name], eval_batch_tokens=size))
        state = scorer.state_dict()
        twin = copy.deepcopy(scorer)
        losses.append(tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log).loss)
        scorer.load_state_dict(state)
        again = scorer if size == 32 else twin
        losses.append(tg.evaluate(again, tokens, TABLE, cfg, rt, run_log).loss)
    assert max(losses) - min(losses) < (1e-5 if learns(name) else 1e-6)


def charged(scorer, plan, chunks, tokens, rt, commit=True):
    """Nats of some chunks, each learned after its charge or not."""
    nats = []
    for chunk in chunks:
        for work in chunk.work:
            batch = plan.batch(tokens, work)
            nats.append(tg.score_batch(scorer, batch, tokens, rt).numpy()[batch.real])
        if commit:
            scorer.commit(chunk, tokens)
    return np.concatenate(nats)


@pytest.mark.parametrize("name", ["sliding ttt", "mix", "lora", "lora tilt mix"])
def test_a_state_in_the_middle_comes_back_whole(name, tokens, rt):
    """What follows is the same again and again, also after a chunk that was left unfinished."""
    cfg, scorer = build(rt, **NESTINGS[name])
    plan = scorer.network.plan(tokens, scorer.chunk_targets)
    for counts in scorer.counts:
        counts.prepare(tokens, plan)
    chunks = plan.chunks()
    charged(scorer, plan, chunks[:2], tokens, rt)
    state = scorer.state_dict()
    first = charged(scorer, plan, chunks[2:], tokens, rt)
    for _ in range(2):
        scorer.load_state_dict(state)
        charged(scorer, plan, chunks[2:3], tokens, rt, commit=False)
        scorer.load_state_dict(state)
        again = charged(scorer, plan, chunks[2:], tokens, rt)
        np.testing.assert_array_equal(again, first)


def test_a_stream_of_other_weights_begins_anew(tokens, rt):
    """After a state was taken back, no key or value of the weights before it is left."""
    _, scorer = build(rt, **STREAM)
    _, other = build(rt, **STREAM)
    plan = scorer.network.plan(tokens, 0)
    (chunk,) = plan.chunks()
    first, second = (plan.batch(tokens, work) for work in chunk.work[:2])
    state = scorer.state_dict()
    tg.score_batch(scorer, first, tokens, rt)
    with torch.no_grad():
        for one in (scorer, other):
            one.network.model.blocks[0].attn.c_v.weight.mul_(-1)
    scorer.load_state_dict(state)
    nats, expected = (tg.score_batch(s, second, tokens, rt).numpy() for s in (scorer, other))
    np.testing.assert_allclose(nats, expected, atol=1e-5)


def atomic(function):
    """A function that no deep copy copies, as compiled ones are."""

    def compiled(*inputs, **more):
        return function(*inputs, **more)

    return compiled


def test_a_deep_copy_has_a_model_of_its_own(tokens, rt, run_log, monkeypatch):
    """With compiled functions too."""
    monkeypatch.setattr(rt, "compile", atomic)
    cfg, scorer = build(rt, **NESTINGS["sliding ttt"])
    twin = copy.deepcopy(scorer)
    first = tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log)
    second = tg.evaluate(twin, tokens, TABLE, cfg, rt, run_log)
    assert (first.nats == second.nats).all()
    pairs = zip(scorer.network.model.parameters(), twin.network.model.parameters())
    for one, other in pairs:
        assert torch.equal(one, other)
        assert one is not other


@pytest.mark.parametrize("name", NESTINGS)
def test_a_query_changes_nothing(name, tokens, rt):
    """The same batch asked again, and again after others: the same answer, and no state."""
    cfg, scorer = build(rt, **NESTINGS[name])
    plan = scorer.network.plan(tokens, scorer.chunk_targets)
    for counts in scorer.counts:
        counts.prepare(tokens, plan)
    works = [work for chunk in plan.chunks() for work in chunk.work]
    vocabulary = torch.arange(260)

    def answer(number):
        batch = plan.batch(tokens, works[min(number, len(works) - 1)])
        distribution = scorer.predict(batch)
        ids = vocabulary.expand(*batch.index.shape, -1)
        p = distribution.prob(ids)
        assert torch.equal(distribution.prob(ids), p)
        return p

    first = answer(0)
    assert torch.equal(first, answer(0))
    answer(2)
    assert largest(first - answer(0)) < 1e-6


OTHER_SETTINGS = Cases()
OTHER_SETTINGS.add("longer spans", eval_stream=32)
OTHER_SETTINGS.add("counts across documents", tilt=True, ngram="mix", ngram_docs=False)
OTHER_SETTINGS.add("smaller chunks", tilt=True, ngram="mix", mix_chunk_tokens=32)
OTHER_SETTINGS.add("larger chunks of adapters", **LORA, ttt_lora_chunk=32)
OTHER_SETTINGS.add("higher rank", ttt_lora_rank=4)
OTHER_SETTINGS.add("weaker adapters", **LORA, ttt_lora_alpha=4.0)
OTHER_SETTINGS.add("faster adapters", **LORA, ttt_lr=0.02)
OTHER_SETTINGS.add("fewer documents at once", **LORA, ttt_lora_keep=True, ttt_docs=2)
OTHER_SETTINGS.add("adapters of queries", **LORA, ttt_lora_on="q")
OTHER_SETTINGS.add("adapters of one block", **LORA, ttt_freeze_blocks=1)
OTHER_SETTINGS.add("decaying adapters", **LORA, ttt_lora_wd=5.0)
OTHER_SETTINGS.add("adapters of the head", **LORA, ttt_lora_on="head")
OTHER_SETTINGS.add("adapters beside attention", **LORA, ttt_lora_on="attn")
OTHER_SETTINGS.add("adapters beside the MLP", **LORA, ttt_lora_on="mlp")
OTHER_SETTINGS.add("adapters of executed layers", **EVERYWHERE)
OTHER_SETTINGS.add("small chunks first", **LORA, ttt_lora_early_chunks="8:16")
OTHER_SETTINGS.add("a global step", **LORA, **GLOBAL)
OTHER_SETTINGS.add("a slow global step", **LORA, ttt_global_docs=4)
OTHER_SETTINGS.add("an early global step", **LORA, ttt_global_docs=2, ttt_global_lr=0.05)
OTHER_SETTINGS.add("a global step in more steps", **LORA, **GLOBAL, ttt_chunk_tokens=32)
OTHER_SETTINGS.add("a smaller boost", tilt_boost=1.0, tilt_order=3, tilt_share=0.6)
OTHER_SETTINGS.add("a longer context", tilt_boost=2.0, tilt_order=4, tilt_share=0.6)
OTHER_SETTINGS.add("surer tokens", tilt_boost=2.0, tilt_order=3, tilt_share=0.95)
OTHER_SETTINGS.add("hints across documents", **FIXED, ngram_docs=False)


def test_every_switch_acts(scores, tokens, rt, run_log):
    """No two settings give the same loss."""
    losses = [scores(name).loss for name in NESTINGS]
    for settings in OTHER_SETTINGS.values():
        cfg, scorer = build(rt, **settings)
        losses.append(tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log).loss)
    assert len({round(loss, 9) for loss in losses}) == len(losses)


# Only windows and test-time training are compiled; mixers over windows add nothing to a graph.
SHALLOW = dict(num_layers=2, ve_layers=(0, 1), xsa_last_n=1)
ALWAYS = ["streaming ttt tilt mix"]
RARELY = ("sliding", "sliding ttt", "tilt", "mix", "lora")
SOMETIMES = [pytest.param(name, marks=pytest.mark.slow) for name in RARELY]


@pytest.mark.parametrize("name", [*ALWAYS, *SOMETIMES])
def test_compiled_as_eager(name, tokens, rt, run_log):
    torch.compiler.reset()
    compiling = copy.copy(rt)
    compiling.compile = functools.partial(
        torch.compile, backend="aot_eager", fullgraph=True, dynamic=False
    )
    losses = []
    for runtime in (rt, compiling):
        cfg, scorer = build(runtime, **NESTINGS[name], **SHALLOW)
        losses.append(tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log).loss)
    assert abs(losses[0] - losses[1]) < 1e-5


def score_nestings(env, folder):
    """What one of several processes does: all nestings, whose losses rank 0 writes down."""
    rt = tg.Runtime(tg.Config(device="cpu"), env)
    log = tg.RunLog(folder, rt)
    tokens = short_text(np.random.default_rng(0))
    losses = {}
    for name, settings in NESTINGS.items():
        cfg, scorer = build(rt, **settings)
        score = tg.evaluate(scorer, tokens, TABLE, cfg, rt, log)
        assert (score.coverage == 1).all(), name
        losses[name] = score.loss
    if rt.main:
        (folder / f"{rt.world}.json").write_text(json.dumps(losses))
    rt.close()


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_number_of_processes_does_not_matter(world, scores, tmp_path):
    in_processes(world, tmp_path, score_nestings, tmp_path)
    losses = json.loads((tmp_path / f"{world}.json").read_text())
    for name, loss in losses.items():
        alone = scores(name).loss
        allowed = 1e-5 if learns(name) else 1e-7 * alone
        assert abs(loss - alone) < allowed, name
    assert losses.keys() == NESTINGS.keys()


DOCUMENTS = dict(STREAM, stream_docs=True)
TWO_AT_ONCE = dict(LORA, ttt_docs=2)
ISOLATION = {
    "a stream of documents": DOCUMENTS,
    "that learns": dict(DOCUMENTS, **TTT),
    "that is tilted": dict(DOCUMENTS, tilt=True),
    "adapters that are kept": dict(TWO_AT_ONCE, ttt_lora_keep=True),
    "adapters that are reset": TWO_AT_ONCE,
    "a global step": dict(TWO_AT_ONCE, **GLOBAL),
    "a fixed tilt": dict(TWO_AT_ONCE, **FIXED),
}


@pytest.mark.parametrize("name", ISOLATION)
def test_isolation_is_claimed_where_documents_are_isolated(name, tokens, rt, run_log):
    """Another first document moves later charges, or the scorer says that it cannot."""
    other = tokens.copy()
    other[1:40] = other[1:40][::-1]
    nats = []
    for text in (tokens, other):
        cfg, scorer = build(rt, **ISOLATION[name])
        score = tg.evaluate(scorer, text, TABLE, cfg, rt, run_log)
        nats.append(score.nats[40:])
    moved = np.abs(nats[0] - nats[1]).max()
    assert scorer.isolates_documents == (moved < 1e-5)
