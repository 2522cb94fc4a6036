"""Hashed n-gram caches of the published systems (section 10), against a walk with plain tables."""

import dataclasses
import math

import numpy as np
import oracles
import pytest
import torch
from conftest import FULL
from helpers import TABLE, Cases, config, cpu_runtime, randomized, verdicts

import train_gpt as tg

GATED = dict(ngram="gated", ngram_primes=oracles.PRIMES["gated"], ngram_min_order=2)
FIXED = dict(ngram="fixed")
BACKOFF = dict(ngram="backoff")
CACHES = Cases()
CACHES.add("PR 740 v1", **FIXED, ngram_order=5, ngram_min_order=5)
CACHES.add("one short order", **FIXED, ngram_order=2, ngram_min_order=2, ngram_min_count=1)
CACHES.add("PR 740 v2", **BACKOFF, ngram_order=7, ngram_min_order=2)
CACHES.add("PR 740 v2 by chunk", **BACKOFF, ngram_order=4, ngram_chunk_tokens=24)
CACHES.add(
    "more tokens than primes", **BACKOFF, ngram_order=9, ngram_min_order=3, ngram_min_count=3
)
CACHES.add("PR 859", **GATED, ngram_order=7, ngram_chunk_tokens=40)
CACHES.add("PR 859 by window", **GATED, ngram_order=4)


# --- counting -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Keys:
    """How many keys, how many different ones, and how many in a group."""

    count: int
    values: int
    span: int


KEYS = {
    "one": Keys(1, 1, 1),
    "each alone": Keys(200, 3, 1),
    "all the same": Keys(200, 1, 7),
    "few": Keys(300, 16, 7),
    "many": Keys(300, 4096, 25),
    "all different": Keys(300, 2**30, 40),
    "one group": Keys(90, 5, 90),
}


@pytest.mark.parametrize("partly", [False, True])
@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("kind", KEYS)
def test_counts_before_equals_a_dictionary(kind, uneven, partly, rng):
    """Groups of a token, a window, a chunk, and of uneven length.

    Some keys are counted, some only ask.
    """
    n = KEYS[kind].count
    span = KEYS[kind].span
    keys = rng.integers(0, KEYS[kind].values, n, dtype=np.uint32)
    counted = rng.random(n) < 0.6 if partly else None
    groups = np.arange(n) // span
    if uneven:
        groups = np.cumsum(rng.random(n) < 1 / span) * 3
    expected = oracles.counts_of_earlier_groups(keys, groups, counted)
    assert tg.counts_before(keys, groups, counted).tolist() == expected


class Stream:
    """Random tokens, the service's counts of them, and what it says."""

    def __init__(self, rng, cache, vocab, buckets, n, seq_len, stride):
        self.shape = (seq_len, stride)
        self.cfg = tg.Config(**CACHES[cache], vocab_size=vocab, ngram_buckets=buckets)
        self.tokens = rng.integers(0, vocab, n + 1).astype(np.uint16)
        self.counts = self.counts_of(self.tokens)

    def counts_of(self, tokens):
        counts = tg.HashedCounts(self.cfg, cpu_runtime())
        counts.prepare(tokens, tg.Windows(len(tokens) - 1, *self.shape))
        return counts

    def simulation(self, vocab=None):
        """[n, 1, K] for the true targets or [n, V, K] for every possible one."""
        return oracles.hashed_ratios(self.tokens, *self.shape, self.cfg, vocab)

    def ratios_of(self, index, tokens):
        """Ratios [..., K] of one token at each target of an index."""
        ids = torch.from_numpy(np.asarray(tokens).astype(np.int64))[..., None]
        return self.counts.ratios_of(index, ids)[..., 0, :].numpy()

    def own(self, index):
        """Of the stream's own targets: what one sort has counted."""
        return self.ratios_of(index, self.tokens[index + 1])

    def every(self, index):
        """Of every token at targets [m] -> [m, V, K]: from plain tables."""
        vocabulary = torch.arange(self.cfg.vocab_size).expand(len(index), -1)
        return self.counts.ratios_of(index, vocabulary).numpy()


def same(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-6)


# Targets, length and stride of windows; vocabulary and buckets of streams over them.
SHAPES = ["1 20 4", "5 20 20", "120 20 20", "131 20 4", "97 20 7", "98 16 5", "43 12 1"]
STREAMS = ["3 4096", "6 64", "30 16"]


def numbers(text):
    return [int(word) for word in text.split()]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cache", CACHES)
def test_hashed_counts_equal_a_simulation(cache, shape, rng):
    """The sorted counts of the whole stream are what a walk over it with plain tables finds."""
    n, seq_len, stride = numbers(shape)
    counting = 0
    for sizes in STREAMS:
        stream = Stream(rng, cache, *numbers(sizes), n, seq_len, stride)
        expected = stream.simulation()[:, 0]
        same(stream.own(np.arange(n)), expected)
        pairs = np.array([[0, n - 1], [n // 2, n // 3]])
        same(stream.own(pairs), expected[pairs])
        counting += (expected >= 0).sum()
    assert counting > 10 or n < 20  # there was something to compare


@pytest.mark.parametrize("sizes", ["4 4096", "9 16"])
@pytest.mark.parametrize("shape", ["60 20 4", "47 12 5", "40 10 10"])
@pytest.mark.parametrize("cache", CACHES)
def test_every_possible_target_equals_the_simulation(cache, shape, sizes, rng):
    """The audit asks for the same rule, but about the whole vocabulary at some of the targets."""
    n, seq_len, stride = numbers(shape)
    vocab, buckets = numbers(sizes)
    stream = Stream(rng, cache, vocab, buckets, n, seq_len, stride)
    expected = stream.simulation(vocab)
    whole = np.arange(n)
    some = np.sort(rng.integers(0, n, 15))
    in_no_order = rng.permutation(n)
    for index in (whole, some, in_no_order):
        same(stream.every(index), expected[index])
    own = stream.every(whole)[whole, stream.tokens[1:]]
    np.testing.assert_array_equal(own, stream.own(whole))
    other = (stream.tokens[1:] + 1) % vocab  # one token each, and not the stream's own
    same(stream.ratios_of(whole, other), expected[whole, other])


@pytest.mark.parametrize("cache", ["PR 740 v2", "PR 859"])
def test_counts_never_look_ahead(cache, rng):
    """Other tokens from a chunk on change nothing earlier: no ratio, no target's context."""
    stream = Stream(rng, cache, 4, 64, 120, 20, 4)
    index = np.arange(120)
    first = stream.own(index)
    stream.tokens[81:] = rng.integers(0, 4, 40)
    stream.counts = stream.counts_of(stream.tokens)
    second = stream.own(index)
    assert np.array_equal(first[:80], second[:80])
    assert not np.array_equal(first, second)


# --- charging -------------------------------------------------------------------------------------

MIXTURES = Cases()
MIXTURES.add("fixed", **FIXED, ngram_order=3, ngram_min_order=3, ngram_alpha=0.2, ngram_stride=5)
MIXTURES.add("backoff", **CACHES["PR 740 v2"], ngram_ent_base=0.1, ngram_ent_range=0.7)
MIXTURES.add(
    "gated", **GATED, ngram_order=7, mixer_head=True, ngram_chunk_tokens=64, ttt_temperature=0.93
)


def few_words(rng, n=300):
    """A stream that repeats itself, so that n-grams return: documents of few different bytes."""
    tokens = rng.integers(100, 104, n).astype(np.uint16)
    tokens[[0, n // 3]] = 1
    return tokens


@pytest.mark.parametrize("buckets", [16, 4096])
@pytest.mark.parametrize("name", MIXTURES)
def test_cache_charges_equal_the_slow_mixture(name, buckets, rt, run_log, rng):
    """Charges, the label, what the checks say, and how much probability there is to give away."""
    stride = 32 if name == "fixed" else 8
    sizes = dict(ngram_buckets=buckets, eval_batch_tokens=96, eval_stride=stride)
    cfg = config(FULL, **MIXTURES[name], **sizes)
    model = randomized(cfg)
    tokens = few_words(rng)
    with torch.no_grad():
        model.tok_emb.weight.mul_(1.15)  # entropies on both sides of 4 nats
    scorer = tg.STAGES["ngram"].build(model, rt, cfg, TABLE)
    score = tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log)

    plan = oracles.windows_of(299, 32, cfg.ngram_stride or 8)
    log_p, hidden = oracles.outputs_of_windows(model, tokens, plan, cfg.ttt_temperature)
    expected, alphas = oracles.cache_charges(model, tokens, cfg, log_p, hidden)
    np.testing.assert_allclose(score.nats, expected, atol=2e-4)
    of_network = -log_p[np.arange(299), tokens[1:]]
    assert np.abs(expected - of_network).max() > 0.1
    if name == "backoff":
        assert alphas.min() < 0.3
        assert alphas.max() > 0.5

    assert score.label == "unnormalised_score"
    assert "val_bpb" not in score.record()
    found = verdicts(score, scorer, tokens, cfg, rt)
    assert found["distribution"].startswith("EXPECTED")
    assert not [verdict for verdict in found.values() if verdict.startswith("FAIL")]
    assert buckets > 16 or score.mass > 10
    score.nats *= np.float32(0.9)  # its label excuses the sum, but no other charge
    assert verdicts(score, scorer, tokens, cfg, rt)["distribution"].startswith("FAIL")


def no_counts(index, ids):
    return torch.zeros(1, 1, 3, 2).double()


def test_no_charge_of_a_cache_is_infinite():
    """A target that neither network nor counts know costs what p = 1e-12 costs."""
    impossible = torch.full((1, 1, 3), -math.inf)
    base = tg.Softmax(impossible, torch.zeros(1, 1, 4))
    index = np.zeros((1, 1), int)
    gate = torch.zeros(1, 1, 3).double()
    alpha = torch.full((1, 1, 1), 0.3).double()
    gated = tg.Gated(base, index, gate, no_counts)
    cached = tg.Cached(base, index, alpha, no_counts)
    for distribution in (gated, cached):
        assert distribution.prob(torch.arange(3)[None, None]).tolist() == [[[1e-12] * 3]]


@pytest.mark.parametrize("temperature", [0.5, 0.95, 0.98, 1.2])
def test_temper_equals_its_formula(temperature, rng):
    """Clamped at 0.9 and 1.05; in between only confident rows are touched."""
    logits = rng.standard_normal((2, 9, 12))
    sizes = [0, 1e-3, 0.3, 1, 2, 3, 5, 9, 30]
    logits *= np.reshape(sizes, (9, 1))
    expected = [[oracles.temper(row, temperature) for row in rows] for rows in logits]
    tempered = tg.temper(torch.from_numpy(logits), temperature).numpy()
    np.testing.assert_allclose(tempered, expected, rtol=1e-9)
    divided = logits[:, 1:] / tempered[:, 1:]
    assert divided.max() <= 1.05 + 1e-9
    assert divided.min() >= 0.9 - 1e-9
    if temperature == 0.5:
        assert np.isclose(divided, 0.9).any()
    if temperature == 1.2:
        assert np.isclose(divided, 1.05).any()


def test_temperature_one_is_the_very_tensor(rng):
    logits = torch.from_numpy(rng.standard_normal((2, 9, 12)))
    assert tg.temper(logits, 1.0) is logits
