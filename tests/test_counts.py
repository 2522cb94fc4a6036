"""Exact n-gram counts (section 10) against a dictionary; tilts and mixtures made of them."""

import math

import numpy as np
import oracles
import pytest
import torch
from helpers import FIXED, TABLE, build, everything, network_p, short_text

import train_gpt as tg

ORDERS = (1, 2, 3, 4, 5, 6, 7, 13, 25)


def repetitive(rng, vocab, size):
    """Random tokens, some of which come again."""
    tokens = rng.integers(0, vocab, size).astype(np.uint16)
    if size > 100:
        tokens[size // 2 : size // 2 + 90] = tokens[:90]
        tokens[-60:] = tokens[5:65]
    return tokens


# --- counts ---------------------------------------------------------------------------------------


def counted(tokens, orders, bos=None, **options):
    """Order -> its arrays [3 or 5, n], in the order in which they come."""
    arrays = tg.causal_counts(tokens, orders, bos, **options)
    return {order: np.array(found) for order, *found in arrays}


@pytest.mark.parametrize("bos", [None, 0])
@pytest.mark.parametrize("size", [0, 1, 2, 40, 400])
@pytest.mark.parametrize(
    "vocab, hints", [(1, "last"), (2, "most"), (3, "last"), (7, "most"), (300, "last")]
)
def test_counts_equal_a_dictionary(vocab, hints, size, bos, rng, monkeypatch):
    """All orders, and some of them, which come in the same way."""
    tokens = repetitive(rng, vocab, size)
    piece = int(rng.integers(1, 50))  # of one group, or of many
    monkeypatch.setattr(tg, "COUNT_PIECE", piece)
    expected = oracles.counts_by_dictionary(tokens, ORDERS, bos, hints)
    found = counted(tokens, ORDERS, bos, hints=hints)
    assert list(found) == list(ORDERS)
    for order, arrays in found.items():
        np.testing.assert_array_equal(arrays, expected[order])
    some = counted(tokens, (7, 2), bos)
    assert list(some) == [2, 7]
    for order, arrays in some.items():
        np.testing.assert_array_equal(arrays, found[order][:3])


def test_more_than_one_piece_at_full_size(rng):
    """600,000 positions of few tokens, so that single groups are larger than a piece.

    Some positions are checked by definition.
    """
    rare = rng.random(600_000) < 0.1
    tokens = rare.astype(np.uint16)
    tokens[400_000:500_000] = tokens[:100_000]
    for order, n, total, distinct in tg.causal_counts(tokens, (1, 2, 3, 13)):
        for t in (0, 1, 12, 262_144, 450_000, 599_999):
            expected = oracles.counts_at_one_position(tokens, t, order)
            assert (n[t], total[t], distinct[t]) == expected, (order, t)


TIMES = [*range(4), 24, 25, 26, 150, 200, 239, 299]


@pytest.mark.parametrize("vocab, bos", [(2, None), (7, 0), (300, 3)])
def test_the_twin_counts_every_possible_token(vocab, bos, rng):
    """After a prefix: what each next token would be counted as."""
    tokens = repetitive(rng, vocab, 300)
    for t in TIMES:
        past = tokens[:t]
        expected = []
        for v in range(min(vocab, 7)):
            stream = np.append(past, v).astype(np.uint16)
            expected.append(oracles.counts_by_dictionary(stream, ORDERS, bos))
        for order, n, total, *others in tg.counts_after(past, ORDERS, vocab, bos):
            for v, one in enumerate(expected):
                assert [n[v], total, *others] == one[order][:, t].tolist()
            assert n.sum() == total
            assert len(n) == vocab


def test_counts_know_nothing_of_later_tokens(rng):
    tokens = repetitive(rng, 4, 300)
    other = repetitive(rng, 4, 300)
    other[:200] = tokens[:200]
    first = counted(tokens, ORDERS, hints="last")
    second = counted(other, ORDERS, hints="last")
    for order in ORDERS:
        np.testing.assert_array_equal(first[order][:, :200], second[order][:, :200])


def test_keys_that_do_not_fit_are_refused():
    """Up to 63 bits are counted as a dictionary does; one more would wrap around."""
    tokens = np.array([2**60, 5, 2**60], np.int64)
    expected = oracles.counts_by_dictionary(tokens, (1,))[1]
    np.testing.assert_array_equal(counted(tokens, (1,))[1], expected[:3])
    with pytest.raises(tg.InputError, match="too many to count"):
        list(tg.causal_counts(2 * tokens, (1,)))


# --- a tilt by a fixed boost ----------------------------------------------------------------------


@pytest.mark.parametrize("within", [True, False])
def test_a_fixed_tilt_is_its_formula(within, rng, rt, run_log):
    """Every possible token at every target: e^b times the odds for the hint, if there is one."""
    tokens = short_text(rng)
    p = network_p(tokens, rt)
    cfg, scorer = build(rt, **FIXED, ngram_docs=within)
    order = cfg.tilt_order
    counts = oracles.counts_by_dictionary(tokens, [order], 1 if within else None, "most")[order]
    score = tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log)
    plan = scorer.network.plan(tokens, scorer.chunk_targets)
    raised = 0
    for target in range(len(tokens) - 1):
        _, total, _, hint, agree = counts[:, target + 1]
        expected = p[target].copy()
        sure = agree and agree / total >= 0.6
        if sure:
            expected[hint] *= np.exp(2.0)
            expected /= expected.sum()
            raised += 1
        token = tokens[target + 1]
        charge = -np.log(expected[token])
        assert abs(score.nats[target] - charge) < 1e-4
        if target % 7 == 0:
            batch = plan.position(tokens, target)
            found = everything(scorer, batch)
            np.testing.assert_allclose(found, expected, atol=1e-6)
    assert 20 < raised < 250


# --- distributions --------------------------------------------------------------------------------


def test_absolute_discounting_from_its_definition(rng):
    """q_k = (max(n - D, 0) + (a + D T) q_{k-1}) / (N + a); q_0 is uniform.

    Where the context is new, q_k = q_{k-1}.
    """
    tokens = repetitive(rng, 5, 200)
    counts = oracles.counts_by_dictionary(tokens, ORDERS)
    by_order, facts = tg.discounted(tg.causal_counts(tokens, ORDERS, hints="last"), 5)
    told = np.array(facts)  # rank, count, hint, agree
    for t in range(200):
        q = 1 / 5
        for rank, order in enumerate(ORDERS):
            n, total, distinct, _, _ = counts[order][:, t]
            q = oracles.discounted(n, total, distinct, q, tg.DISCOUNT, tg.CONCENTRATION)
            assert math.isclose(by_order[rank][t], q, rel_tol=1e-12)
        rank, (_, total, _, hint, agree) = oracles.longest_context(counts, ORDERS, t)
        expected = [rank, total, hint, agree] if rank else [0, 0, 0, 0]
        assert told[:, t].tolist() == expected


@pytest.fixture(params=[False, True], ids=["stream", "documents"])
def services(request, rng, rt):
    """Tokens, counts of the whole stream, and counts that are searched in the prefix alone."""
    cfg = tg.Config(vocab_size=60, ngram_docs=request.param)
    tokens = repetitive(rng, 60, 2001)
    tokens[[0, 500, 1100]] = cfg.bos_id
    counts = tg.NgramCounts(cfg, rt)
    counts.prepare(tokens)
    searched = tg.NgramCounts(cfg, rt)
    searched.prepare(tokens, whole=False)
    return tokens, counts, searched


def test_distributions_sum_to_one_and_hold_the_target(services):
    """At thousands of positions: first ones, unseen contexts, document starts, repeats."""
    tokens, counts, searched = services
    index = np.arange(2000)
    vocabulary = torch.arange(60).expand(2000, -1)
    ids = torch.from_numpy(tokens[1:].astype(np.int64))[:, None]
    every = counts.prob(index, vocabulary)  # [n, V, K]
    own = counts.prob(index, ids)[:, 0]  # [n, K]
    assert (every.sum(1) - 1).abs().max() < 1e-12
    assert every.min() > 0
    torch.testing.assert_close(every[index, tokens[1:]], own, rtol=1e-12, atol=0)
    some = np.array([500, 3, 1999, 3])  # asked again, elsewhere, and backwards
    targets = ids[some]
    others = (targets + 1) % 60  # one token each, and not the stream's own
    for service in (counts, searched):
        assert torch.equal(service.prob(some, vocabulary[:4]), every[some])
        of_targets = service.prob(some, targets)[:, 0]
        torch.testing.assert_close(of_targets, own[some], rtol=1e-12, atol=0)
        of_others = service.prob(some, others)[:, 0]
        assert torch.equal(of_others, every[some, others[:, 0]])


def test_facts_are_the_same_from_the_prefix_alone(services):
    _, counts, searched = services
    index = np.arange(2000)
    facts = counts.facts(index)
    for found, expected in zip(searched.facts(index), facts, strict=True):
        assert torch.equal(found, expected)
    assert (facts.rank == len(ORDERS)).any()
    assert (facts.rank == 1).any()


def test_nothing_is_remembered_of_another_stream(rng, rt):
    """Asked of a second stream, the service tells that one's shares of tokens."""
    counts = tg.NgramCounts(tg.Config(vocab_size=20), rt)
    vocabulary = torch.arange(20)[None]
    for _ in range(2):
        tokens = rng.integers(2, 20, 200).astype(np.uint16)
        counts.prepare(tokens, whole=False)
        q = counts.prob(np.array([150]), vocabulary)[0, :, 0].numpy()
        n = np.bincount(tokens[:151], minlength=20)
        seen = (n > 0).sum()
        sizes = (tg.DISCOUNT, tg.CONCENTRATION)
        expected = [oracles.discounted(count, 151, seen, 1 / 20, *sizes) for count in n]
        np.testing.assert_allclose(q, expected, rtol=1e-12)


# --- mixers ---------------------------------------------------------------------------------------


STREAM = dict(eval_stream=16, eval_batch_tokens=32)  # two batches a chunk


@pytest.fixture(scope="module")
def streamed(rt):
    """A text, and what the network alone believes of it in one pass."""
    tokens = short_text(np.random.default_rng(0))
    return tokens, network_p(tokens, rt, **STREAM)


def test_tilt_from_its_definition(streamed, rt, run_log):
    """b such that the hint has its bucket's share of hits; never lowered.

    Counted chunk by chunk of 64 targets.
    """
    tokens, p = streamed
    expected, raised = oracles.tilted_charges(p, tokens, ORDERS, bos=1, chunk=64)
    assert raised > 30
    cfg, scorer = build(rt, **STREAM, tilt=True)
    score = tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log)
    np.testing.assert_allclose(score.nats, expected, atol=1e-5)


def test_mixture_from_its_definition(streamed, rt, run_log):
    """Weights are the experts' mean responsibilities in the bucket, with a prior.

    Counted chunk by chunk.
    """
    tokens, p = streamed
    expected = oracles.mixed_charges(p, tokens, ORDERS, bos=1, chunk=64)
    cfg, scorer = build(rt, **STREAM, ngram="mix")
    score = tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log)
    np.testing.assert_allclose(score.nats, expected, atol=1e-5)


def test_the_mixers_head_reads_true_distributions(rng, rt, run_log):
    """PR 859's formula with exact distributions in place of the hashed ratios."""
    tokens = short_text(rng)[:171]
    head = dict(mixer_head=True, ngram_order=5)
    cfg, scorer = build(rt, ngram="mix", **head)
    p = network_p(tokens, rt, **head)
    plan = scorer.network.plan(tokens, scorer.chunk_targets)
    (mixer,) = scorer.mixers
    mixer.counts.prepare(tokens, plan)
    gate_of = scorer.network.model.alpha_head
    expected = []
    for j, target in enumerate(tokens[1:].tolist()):
        base = scorer.predict(plan.position(tokens, j)).base
        gate = gate_of(base.hidden[0, 0].clone()).double().softmax(-1)
        q = mixer.counts.prob(np.array([j]), torch.tensor([[target]]))[0, 0]
        experts = torch.tensor([p[j, target], *q[1:5]])
        mixed = 0.05 * p[j, target] + 0.95 * (gate @ experts).item()
        expected.append(-math.log(mixed))
    score = tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log)
    np.testing.assert_allclose(score.nats, expected, atol=1e-5)
