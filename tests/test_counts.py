"""Exact n-gram counts against a dictionary, and the distributions made of them."""

import itertools
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

import train_gpt as tg

ORDERS = (1, 2, 3, 4, 5, 6, 7, 13, 25)


def slow_counts(tokens, orders, bos=None):
    """Order -> n, N, T, the token that followed last and its n [5, len].

    By a dictionary, token after token.
    """
    found = {k: np.zeros((5, len(tokens)), int) for k in orders}
    tables = defaultdict(Counter)
    last = {}
    for t, k in itertools.product(range(len(tokens)), orders):
        whole = t >= k - 1 and not any(tokens[i] == bos for i in range(t - k + 2, t))
        if whole:
            context = (k, *tokens[t - k + 1 : t])
            seen, hint = tables[context], last.get(context, 0)
            found[k][:, t] = (
                seen[tokens[t]],
                sum(seen.values()),
                sum(v > 0 for v in seen.values()),
                hint,
                seen[hint] if context in last else 0,
            )
            seen[tokens[t]] += 1
            last[context] = tokens[t]
    return found


def repetitive(rng, vocab, size):
    tokens = rng.integers(0, vocab, size).astype(np.uint16)
    if size > 100:
        tokens[size // 2 : size // 2 + 90] = tokens[:90]
        tokens[-60:] = tokens[5:65]
    return tokens


@pytest.mark.parametrize(
    "vocab, size, bos", [*itertools.product([1, 2, 3, 7, 300], [0, 1, 2, 40, 400], [None, 0])]
)
def test_counts_equal_a_dictionary(vocab, size, bos, rng, monkeypatch):
    tokens = repetitive(rng, vocab, size)
    # Pieces of one group, and of many.
    monkeypatch.setattr(tg, "COUNT_PIECE", int(rng.integers(1, 50)))
    expected, orders = slow_counts(tokens, ORDERS, bos), []
    for order, *arrays in tg.causal_counts(tokens, ORDERS, bos, hints=True):
        orders.append(order)
        np.testing.assert_array_equal(arrays, expected[order])
    for (order, *arrays), some in zip(tg.causal_counts(tokens, (7, 2), bos), (2, 7), strict=True):
        assert order == some
        np.testing.assert_array_equal(arrays, expected[order][:3])
    assert orders == list(ORDERS)


def test_more_than_one_piece_at_full_size(rng):
    """600,000 positions of few tokens, so that single groups are larger than a piece.

    Some positions are checked by definition.
    """
    tokens = (rng.random(600_000) < 0.1).astype(np.uint16)
    tokens[400_000:500_000] = tokens[:100_000]
    for order, n, total, distinct in tg.causal_counts(tokens, (1, 2, 3, 13)):
        for t in (0, 1, 12, 262_144, 450_000, 599_999):
            same = np.arange(t) >= order - 1
            for i in range(1, min(order, t + 1)):
                same[i:] &= tokens[: t - i] == tokens[t - i]
            followers = tokens[:t][same] if t >= order - 1 else tokens[:0]
            assert (n[t], total[t], distinct[t]) == (
                (followers == tokens[t]).sum(),
                len(followers),
                len(np.unique(followers)),
            ), (order, t)


@pytest.mark.parametrize("vocab, bos", [(2, None), (7, 0), (300, 3)])
def test_the_twin_counts_every_possible_token(vocab, bos, rng):
    tokens = repetitive(rng, vocab, 300)
    for t in (0, 1, 2, 3, 24, 25, 26, 150, 200, 239, 299):
        changed = [np.append(tokens[:t], v).astype(np.uint16) for v in range(min(vocab, 7))]
        expected = [slow_counts(part, ORDERS, bos) for part in changed]
        for order, n, total, distinct, hint, agree in tg.counts_after(
            tokens[:t], ORDERS, vocab, bos
        ):
            for v, one in enumerate(expected):
                assert (n[v], total, distinct, hint, agree) == tuple(one[order][:, t])
            assert n.sum() == total and len(n) == vocab


def test_absolute_discounting_from_its_definition(rng):
    """q_k = (max(n - D, 0) + (a + D T) q_{k-1}) / (N + a); q_0 is uniform.

    Where the context is new, q_k = q_{k-1}.
    """
    tokens, vocab, d, a = repetitive(rng, 5, 200), 5, tg.DISCOUNT, tg.CONCENTRATION
    counts = slow_counts(tokens, ORDERS)
    by_order, facts = tg.discounted(tg.causal_counts(tokens, ORDERS, hints=True), vocab)
    for t in range(200):
        q, longest = 1 / vocab, (0, 0, 0, 0)
        for rank, order in enumerate(ORDERS):
            n, total, distinct, hint, agree = counts[order][:, t]
            if total:
                q = (max(n - d, 0) + (a + d * distinct) * q) / (total + a)
                longest = rank + 1, total, hint, agree
            assert np.isclose(by_order[rank][t], q, rtol=1e-12)
        assert longest == (facts.rank[t], facts.count[t], facts.hint[t], facts.agree[t])


@pytest.mark.parametrize("docs", [False, True])
def test_distributions_sum_to_one_and_hold_the_target(docs, rng, rt):
    """At thousands of positions: first ones, unseen contexts, document starts, repeats."""
    cfg, tokens = tg.Config(vocab_size=60, ngram_docs=docs), repetitive(rng, 60, 3001)
    tokens[[0, 700, 1500]] = cfg.bos_id
    counts, searched = (tg.NgramCounts(cfg, rt) for _ in range(2))
    counts.prepare(tokens)
    searched.prepare(tokens, whole=False)
    index = np.arange(3000)
    ids = torch.from_numpy(tokens[1:].astype(np.int64))[:, None]
    vocabulary = torch.arange(60).expand(3000, -1)
    every, own = counts.prob(index, vocabulary), counts.prob(index, ids)[:, 0]  # [n, V, K], [n, K]
    assert (every.sum(1) - 1).abs().max() < 1e-12 and every.min() > 0
    torch.testing.assert_close(every[index, tokens[1:]], own, rtol=1e-12, atol=0)
    facts = counts.facts(index)
    for a, b in zip(searched.facts(index), facts):
        assert torch.equal(a, b)
    assert (facts.rank == len(ORDERS)).any() and (facts.rank == 1).any()
    some = np.array([700, 3, 2999, 3])  # asked again, elsewhere, and backwards
    for service in (counts, searched):
        assert torch.equal(service.prob(some, vocabulary[:4]), every[some])
        torch.testing.assert_close(
            service.prob(some, ids[some])[:, 0], own[some], rtol=1e-12, atol=0
        )
        other = (ids[some] + 1) % 60  # one token each, and not the stream's own
        assert torch.equal(service.prob(some, other)[:, 0], every[some, other[:, 0]])


def test_counts_know_nothing_of_later_tokens(rng):
    tokens, other = repetitive(rng, 4, 300), repetitive(rng, 4, 300)
    other[:200] = tokens[:200]
    for first, second in zip(
        tg.causal_counts(tokens, ORDERS, hints=True), tg.causal_counts(other, ORDERS, hints=True)
    ):
        for a, b in zip(first[1:], second[1:]):
            np.testing.assert_array_equal(a[:200], b[:200])


def test_nothing_is_remembered_of_another_stream(rng, rt):
    """Asked of a second stream, the service tells that one's shares of tokens."""
    counts, vocabulary = tg.NgramCounts(tg.Config(vocab_size=20), rt), torch.arange(20)[None]
    for _ in range(2):
        tokens = rng.integers(2, 20, 200).astype(np.uint16)
        counts.prepare(tokens, whole=False)
        q = counts.prob(np.array([150]), vocabulary)[0, :, 0].numpy()
        n = np.bincount(tokens[:151], minlength=20)
        base = (tg.CONCENTRATION + tg.DISCOUNT * (n > 0).sum()) / 20
        expected = (np.maximum(n - tg.DISCOUNT, 0) + base) / (151 + tg.CONCENTRATION)
        np.testing.assert_allclose(q, expected, rtol=1e-12)


def test_keys_that_do_not_fit_are_refused():
    """Up to 63 bits are counted as a dictionary does; one more would wrap around."""
    tokens = np.array([2**60, 5, 2**60], np.int64)
    (found,) = tg.causal_counts(tokens, (1,))
    np.testing.assert_array_equal(found[1:], slow_counts(tokens, (1,))[1][:3])
    with pytest.raises(tg.InputError, match="too many to count"):
        list(tg.causal_counts(2 * tokens, (1,)))
