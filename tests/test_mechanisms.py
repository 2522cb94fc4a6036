"""The published mechanisms against slow restatements.

N-gram caches, mixer head, adaptation, quantization.
"""

import copy
import dataclasses
import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import FULL, TINY, randomized, take_step

import train_gpt as tg

TABLE = tg.ByteTable.bytes260()


def verdicts(score, scorer, tokens, cfg, rt):
    """Check -> verdict of a score."""
    checks = tg.check_score(score, scorer, tokens, TABLE, cfg, rt, {})
    return {check.name: check.verdict for check in checks}


def learn(scorer, tokens, progress=0.0):
    """Test-time training on a stream as one chunk."""
    scorer.training.learn(tokens, progress)


SMALL = dict(TINY, num_layers=2)
PRIMES = {
    "fixed": (36313, 27191, 51647, 81929, 131071, 65537, 104729),
    "backoff": (36313, 27191, 51647, 81929, 131071, 65537, 104729),
    "gated": (36313, 27191, 51647, 81929, 131071, 174763, 233017),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Matrices this small gain nothing from threads.

    On a busy machine threads only wait for each other.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def every_name(model):
    return {name for name, _ in model.named_parameters()}


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("partly", [False, True])
@pytest.mark.parametrize(
    "n, values, span",
    [
        (1, 1, 1),
        (200, 3, 1),
        (200, 1, 7),
        (300, 16, 7),
        (300, 4096, 25),
        (300, 2**30, 40),
        (90, 5, 90),
    ],
)
def test_counts_before_equals_a_dictionary(n, values, span, partly, rng):
    """Groups of a token, a window, a chunk, and of uneven length.

    Some keys are counted, some only ask.
    """
    keys = rng.integers(0, values, n, dtype=np.uint32)
    counted = rng.random(n) < 0.6 if partly else None
    for groups in (np.arange(n) // span, np.cumsum(rng.random(n) < 1 / span) * 3):
        table, waiting, expected = Counter(), [], []
        for i in range(n):
            if i and groups[i] != groups[i - 1]:
                table.update(waiting)
                waiting = []
            expected.append(table[int(keys[i])])
            if counted is None or counted[i]:
                waiting.append(int(keys[i]))
        assert tg.counts_before(keys, groups, counted).tolist() == expected


def slow_slots(context, target, primes, buckets):
    """Counter of a context, oldest token first, and of context and target; in Python's integers."""
    key = 0
    for k, token in enumerate(context):
        key ^= int(token) * primes[k % len(primes)]
    return key % buckets, (key ^ int(target) * primes[len(context) % len(primes)]) % buckets


def slow_windows(n, seq_len, stride):
    """(start, first target, target after the last) of every window."""
    windows, start, lo = [], 0, 0
    while lo < n:
        windows.append((start, lo, min(start + seq_len, n)))
        start, lo = start + stride, windows[-1][2]
    return windows


def slow_chunks(n, seq_len, stride, chunk):
    """The windows in lists: one a chunk of targets, by first scored target; chunk 0: each alone."""
    windows = slow_windows(n, seq_len, stride)
    return [list(w) for _, w in itertools.groupby(windows, lambda w: w[1] // chunk if chunk else w)]


def slow_ratios(tokens, seq_len, stride, cfg, vocab=None):
    """Token by token, window after window.

    [n, 1, K] for the true targets or [n, V, K] for every possible one.
    """
    n, orders = len(tokens) - 1, range(cfg.ngram_min_order, cfg.ngram_order + 1)
    contexts, fulls = ({order: Counter() for order in orders} for _ in range(2))
    out = np.full((n, vocab or 1, len(orders)), -1.0)
    for windows in slow_chunks(n, seq_len, stride, cfg.ngram_chunk_tokens):
        begin, to_add = windows[0][1], []
        for start, lo, hi in windows:
            for at in range(lo + 1, hi + 1):  # position of the target in the stream
                mixed = False
                for order in reversed(orders):
                    length = order - 1
                    if at < length or (mixed and cfg.ngram != "gated"):
                        continue  # the highest order that counts wins
                    slots = [
                        slow_slots(
                            tokens[at - length : at], y, PRIMES[cfg.ngram], cfg.ngram_buckets
                        )
                        for y in ([tokens[at]] if vocab is None else range(vocab))
                    ]
                    if cfg.ngram == "gated":  # n-grams of the piece tokens[begin..]
                        joins, asks = at - length >= begin, at - 1 - start >= order - 1
                    else:
                        joins = asks = True
                    if joins:
                        to_add.append(
                            (
                                order,
                                *slow_slots(
                                    tokens[at - length : at],
                                    tokens[at],
                                    PRIMES[cfg.ngram],
                                    cfg.ngram_buckets,
                                ),
                            )
                        )
                    count = contexts[order][slots[0][0]]
                    if asks and count >= cfg.ngram_min_count:
                        mixed = True
                        out[at - 1, :, order - orders[0]] = [
                            min(fulls[order][full], count) / count for _, full in slots
                        ]
        for order, context, full in to_add:
            contexts[order][context] += 1
            fulls[order][full] += 1
    return out


CACHES = {
    "PR 740 v1": dict(ngram="fixed", ngram_order=5, ngram_min_order=5),
    "one short order": dict(ngram="fixed", ngram_order=2, ngram_min_order=2, ngram_min_count=1),
    "PR 740 v2": dict(ngram="backoff", ngram_order=7, ngram_min_order=2),
    "more tokens than primes": dict(
        ngram="backoff", ngram_order=9, ngram_min_order=3, ngram_min_count=3
    ),
    "PR 740 v2 by chunk": dict(
        ngram="backoff", ngram_order=4, ngram_min_order=2, ngram_chunk_tokens=24
    ),
    "PR 859": dict(
        ngram="gated",
        ngram_order=7,
        ngram_min_order=2,
        ngram_chunk_tokens=40,
        ngram_primes=PRIMES["gated"],
    ),
    "PR 859 by window": dict(
        ngram="gated", ngram_order=4, ngram_min_order=2, ngram_primes=PRIMES["gated"]
    ),
}
SHAPES = [
    (1, 20, 4),
    (5, 20, 20),
    (120, 20, 20),
    (131, 20, 4),
    (97, 20, 7),
    (98, 16, 5),
    (43, 12, 1),
]


def hashed(tokens, windows, cfg):
    """The hashed counts of a stream."""
    counts = tg.HashedCounts(cfg, tg.Runtime(tg.Config(device="cpu"), {}))
    counts.prepare(tokens, windows)
    return counts


def own_ratios(counts, tokens, index):
    """Ratios of the stream's own targets [..., K]: what one sort has counted."""
    ids = torch.from_numpy(tokens[index + 1].astype(np.int64))[..., None]
    return counts.ratios_of(index, ids)[..., 0, :].numpy()


def every_ratio(counts, index, vocab):
    """Ratios of every token at targets [m] -> [m, V, K]: from plain tables."""
    return counts.ratios_of(index, torch.arange(vocab).expand(len(index), -1)).numpy()


@pytest.mark.parametrize("n, seq_len, stride", SHAPES)
@pytest.mark.parametrize("cache", CACHES)
def test_hashed_counts_equal_a_simulation(cache, n, seq_len, stride, rng):
    """The sorted counts of the whole stream are what a walk over it with plain tables finds."""
    counting = 0
    for vocab, buckets in ((3, 4096), (6, 64), (30, 16)):
        cfg = tg.Config(**CACHES[cache], vocab_size=vocab, ngram_buckets=buckets)
        tokens = rng.integers(0, vocab, n + 1).astype(np.uint16)
        counts = hashed(tokens, tg.Windows(n, seq_len, stride), cfg)
        expected = slow_ratios(tokens, seq_len, stride, cfg)[:, 0]
        np.testing.assert_allclose(own_ratios(counts, tokens, np.arange(n)), expected, rtol=1e-6)
        pairs = np.array([[0, n - 1], [n // 2, n // 3]])
        np.testing.assert_allclose(own_ratios(counts, tokens, pairs), expected[pairs], rtol=1e-6)
        counting += (expected >= 0).sum()
    assert counting > 10 or n < 20  # there was something to compare


@pytest.mark.parametrize("n, seq_len, stride", [(60, 20, 4), (47, 12, 5), (40, 10, 10)])
@pytest.mark.parametrize("cache", CACHES)
def test_every_possible_target_equals_the_simulation(cache, n, seq_len, stride, rng):
    """The audit asks for the same rule, but about the whole vocabulary at some of the targets."""
    for vocab, buckets in ((4, 4096), (9, 16)):
        cfg = tg.Config(**CACHES[cache], vocab_size=vocab, ngram_buckets=buckets)
        tokens = rng.integers(0, vocab, n + 1).astype(np.uint16)
        counts = hashed(tokens, tg.Windows(n, seq_len, stride), cfg)
        expected = slow_ratios(tokens, seq_len, stride, cfg, vocab)
        for index in (np.arange(n), np.sort(rng.integers(0, n, 15))):
            np.testing.assert_allclose(
                every_ratio(counts, index, vocab), expected[index], rtol=1e-6
            )
        own = every_ratio(counts, np.arange(n), vocab)[np.arange(n), tokens[1:]]
        np.testing.assert_array_equal(own, own_ratios(counts, tokens, np.arange(n)))
        mixed = rng.permutation(n)  # in no order
        np.testing.assert_allclose(every_ratio(counts, mixed, vocab), expected[mixed], rtol=1e-6)
        other = (tokens[1:] + 1) % vocab  # one token each, and not the stream's own
        ids = torch.from_numpy(other.astype(np.int64))[:, None]
        np.testing.assert_allclose(
            counts.ratios_of(np.arange(n), ids)[:, 0], expected[np.arange(n), other], rtol=1e-6
        )


@pytest.mark.parametrize("cache", ["PR 740 v2", "PR 859"])
def test_counts_never_look_ahead(cache, rng):
    """Other tokens from a chunk on change nothing earlier: no ratio, no target's context."""
    cfg, tokens = tg.Config(**CACHES[cache], ngram_buckets=64), rng.integers(0, 4, 121)
    other = np.concatenate((tokens[:81], rng.integers(0, 4, 40)))
    first, second = (
        own_ratios(hashed(t, tg.Windows(120, 20, 4), cfg), t, np.arange(120))
        for t in (tokens, other)
    )
    assert np.array_equal(first[:80], second[:80]) and not np.array_equal(first, second)


def slow_temper(logits, temperature):
    """One row of logits, divided by the clamped, entropy-scaled temperature."""
    p = np.exp(logits - logits.max())
    p /= p.sum()
    entropy = -sum(x * math.log(x) for x in p if x > 0)
    return logits / min(max(1 - (1 - temperature) * (1 - entropy / math.log(len(p))), 0.9), 1.05)


@torch.no_grad()
def slow_outputs(model, tokens, windows, temperature=1.0):
    """log p of every target's position [n, V] and the stream there [n, D], window after window."""
    log_p, hidden = [], []
    for start, lo, hi in windows:
        ids = torch.from_numpy(tokens[start:hi].astype(np.int64))[None]
        stream = model.hidden(ids)[0, lo - start :]
        for row, logits in zip(stream, model.head(stream).double().numpy()):
            logits = slow_temper(logits, temperature)
            log_p.append(logits - logits.max() - math.log(np.exp(logits - logits.max()).sum()))
            hidden.append(row.double().numpy())
    return np.array(log_p), np.array(hidden)


def slow_mixture(gate, p, ratios, floor):
    """One target: softmax over network and orders that count, the network lifted to the floor."""
    logits = [gate[0], *(g if ratio >= 0 else -math.inf for g, ratio in zip(gate[1:], ratios))]
    weights = [math.exp(g - max(logits)) for g in logits]
    weights = [(1 - floor) * w / sum(weights) for w in weights]
    weights[0] += floor
    assert abs(sum(weights) - 1) < 1e-12
    return sum(w * e for w, e in zip(weights, [p, *ratios]))


def slow_nats(model, tokens, cfg, log_p, hidden):
    """Charges of a hashed cache over the network's outputs, one target at a time.

    With the weights of fixed and of backoff.
    """
    ratios = slow_ratios(tokens, cfg.train_seq_len, cfg.ngram_stride or cfg.eval_stride, cfg)[:, 0]
    nats, alphas = [], []
    for j, target in enumerate(tokens[1:]):
        p, found = math.exp(log_p[j, target]), [r for r in ratios[j] if r >= 0]
        if cfg.ngram == "gated":
            weight, bias = (
                getattr(model.alpha_head, name).detach().double().numpy()
                for name in ("weight", "bias")
            )
            p = slow_mixture([w @ hidden[j] + b for w, b in zip(weight, bias)], p, ratios[j], 0.05)
        elif found:
            alphas.append(cfg.ngram_alpha)
            if cfg.ngram == "backoff":
                entropy = -sum(math.exp(x) * x for x in log_p[j])
                alphas[-1] = cfg.ngram_ent_base + cfg.ngram_ent_range * sigmoid(2 * (entropy - 4))
            p = (1 - alphas[-1]) * p + alphas[-1] * found[0]
        nats.append(-math.log(min(max(p, 1e-12), 1)))
    return np.array(nats), np.array(alphas)


def few_words(rng, n=300):
    """A stream that repeats itself, so that n-grams return: documents of few different bytes."""
    tokens = rng.integers(100, 104, n).astype(np.uint16)
    tokens[[0, n // 3]] = 1
    return tokens


MIXTURES = {
    "fixed": dict(
        ngram="fixed",
        ngram_order=3,
        ngram_min_order=3,
        ngram_alpha=0.2,
        eval_stride=32,
        ngram_stride=5,
    ),
    "backoff": dict(
        ngram="backoff", ngram_order=7, ngram_min_order=2, ngram_ent_base=0.1, ngram_ent_range=0.7
    ),
    "gated": dict(
        ngram="gated",
        ngram_order=7,
        ngram_min_order=2,
        mixer_head=True,
        ngram_chunk_tokens=64,
        ttt_temperature=0.93,
        ngram_primes=PRIMES["gated"],
    ),
}


@pytest.mark.parametrize("buckets", [16, 4096])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_cache_charges_equal_the_slow_mixture(mixture, buckets, rt, run_log, rng):
    """Charges, the label, what the audit says, and how much probability there is to give away."""
    cfg = tg.Config(**dict(FULL, **MIXTURES[mixture]), ngram_buckets=buckets, eval_batch_tokens=96)
    model, tokens = randomized(cfg), few_words(rng)
    with torch.no_grad():
        model.tok_emb.weight.mul_(1.15)  # entropies on both sides of 4 nats
    scorer = tg.STAGES["ngram"].build(model, rt, cfg, TABLE)
    score = tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log)
    outputs = slow_outputs(
        model, tokens, slow_windows(299, 32, cfg.ngram_stride or 8), cfg.ttt_temperature
    )
    expected, alphas = slow_nats(model, tokens, cfg, *outputs)
    np.testing.assert_allclose(score.nats, expected, atol=2e-4)
    # More than the network's charges.
    assert np.abs(expected + outputs[0][np.arange(299), tokens[1:]]).max() > 0.1
    assert mixture != "backoff" or alphas.min() < 0.3 and alphas.max() > 0.5
    checks = verdicts(score, scorer, tokens, cfg, rt)
    assert score.label == "unnormalised_score" and "val_bpb" not in score.record()
    assert checks["distribution"].startswith("EXPECTED")
    assert not [name for name, found in checks.items() if found.startswith("FAIL")]
    assert buckets > 16 or score.mass > 10
    score.nats *= np.float32(0.9)  # its label excuses the sum, but no other charge
    assert verdicts(score, scorer, tokens, cfg, rt)["distribution"].startswith("FAIL")


def test_no_charge_of_a_cache_is_infinite():
    """A target that neither network nor counts know costs what p = 1e-12 costs."""
    base = tg.Softmax(torch.full((1, 1, 3), -math.inf), torch.zeros(1, 1, 4))
    index, nothing = np.zeros((1, 1), int), lambda index, ids: torch.zeros(1, 1, 3, 2).double()
    gated = tg.Gated(base, index, torch.zeros(1, 1, 3).double(), nothing)
    cached = tg.Cached(base, index, torch.full((1, 1, 1), 0.3).double(), nothing)
    for distribution in (gated, cached):
        assert distribution.prob(torch.arange(3)[None, None]).tolist() == [[[1e-12] * 3]]


@pytest.mark.parametrize("temperature", [0.5, 0.95, 0.98, 1.2])
def test_temper_equals_its_formula(temperature, rng):
    """Clamped at 0.9 and 1.05; in between only confident rows are touched; 1 is the very tensor."""
    logits = rng.standard_normal((2, 9, 12)) * np.array([0, 1e-3, 0.3, 1, 2, 3, 5, 9, 30])[:, None]
    expected = np.array([[slow_temper(row, temperature) for row in rows] for rows in logits])
    ratio = tg.temper(torch.from_numpy(logits), temperature).numpy()
    np.testing.assert_allclose(ratio, expected, rtol=1e-9)
    divided = logits[:, 1:] / expected[:, 1:]
    assert divided.max() <= 1.05 + 1e-9 and divided.min() >= 0.9 - 1e-9
    assert {0.5: np.isclose(divided, 0.9).any(), 1.2: np.isclose(divided, 1.05).any()}.get(
        temperature, True
    )
    unchanged = torch.from_numpy(logits)
    assert tg.temper(unchanged, 1.0) is unchanged


def some_ratios(rng, shape):
    ratios = rng.random(shape)
    ratios[rng.random(shape) < 0.4] = -1
    return ratios


@pytest.mark.parametrize("orders, floor", [(6, 0.05), (1, 0.0), (3, 0.5), (2, 1.0)])
def test_mix_equals_loops(orders, floor, rng):
    """Values, and weights that add up to one whatever is masked."""
    gate, p = rng.standard_normal((5, 7, 1 + orders)) * 3, rng.random((5, 7))
    ratios = some_ratios(rng, (5, 7, orders))
    ratios[0] = -1  # no order counts
    expected = [
        [slow_mixture(*args, floor) for args in zip(*rows)] for rows in zip(gate, p, ratios)
    ]
    got = tg.mix(*map(torch.from_numpy, (gate, p, ratios)), floor)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-9)
    np.testing.assert_allclose(got[0].numpy(), p[0], rtol=1e-9)
    ones = np.where(ratios < 0, -1, 1.0)
    total = tg.mix(*map(torch.from_numpy, (gate, np.ones((5, 7)), ones)), floor)
    np.testing.assert_allclose(total.numpy(), 1, rtol=1e-12)


def test_training_loss_adds_the_mixture(rng):
    """Loss and all gradients: nothing is detached.

    So head, backbone and logits all learn from the mixture.
    """
    model = randomized(tg.Config(**FULL, mixer_head=True))
    ids, targets = (torch.from_numpy(rng.integers(0, 260, (2, 6))) for _ in range(2))
    ratios = torch.from_numpy(some_ratios(rng, (2, 6, 6))).float()
    names, params = zip(*model.named_parameters())
    hidden = model.hidden(ids)
    log_p = torch.log_softmax(model.head(hidden).double(), -1)
    gates = (hidden @ model.alpha_head.weight.T + model.alpha_head.bias).double()
    plain = mixed = 0
    for b, t in itertools.product(range(2), range(6)):
        nats = -log_p[b, t, targets[b, t]]
        counting = [k for k in range(6) if ratios[b, t, k] >= 0]
        weights = torch.softmax(
            torch.stack([gates[b, t, 0], *(gates[b, t, 1 + k] for k in counting)]), 0
        )
        p = (0.05 + 0.95 * weights[0]) * torch.exp(-nats)
        for k, w in zip(counting, weights[1:]):
            p = p + 0.95 * w * ratios[b, t, k]
        plain, mixed = plain + nats / 12, mixed - torch.log(p) / 12
    expected = torch.autograd.grad(plain + 0.1 * mixed, params, retain_graph=True)
    loss = model(ids, targets, ratios)
    assert math.isclose(loss.item(), (plain + 0.1 * mixed).item(), rel_tol=1e-5)
    for name, found, wanted in zip(names, torch.autograd.grad(loss, params), expected):
        torch.testing.assert_close(
            found, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item(), msg=name
        )
        assert found.abs().max() > 0, name
    # The mixture alone reaches the backbone.
    only = dict(zip(names, torch.autograd.grad(mixed, params)))
    assert (
        min(only[name].abs().max() for name in ("alpha_head.bias", "blocks.0.mlp.fc.weight")) > 1e-6
    )
    assert model(ids, targets).item() == pytest.approx(plain.item(), rel=1e-5)


@pytest.mark.parametrize("buckets, low, high", [(16, 2, 7), (64, 3, 3), (4096, 2, 4)])
def test_oracle_equals_dictionaries(buckets, low, high, rng, rt):
    """n-grams are counted inside each piece only, and asked for inside a row only."""
    cfg = tg.Config(
        mixer_head=True,
        ngram_order=high,
        ngram_min_order=low,
        ngram_buckets=buckets,
        ngram_primes=PRIMES["gated"],
    )
    oracle, orders = tg.FrozenNgramTable(cfg, rt.device), range(low, high + 1)
    contexts, fulls = ({order: Counter() for order in orders} for _ in range(2))
    for length in (50, 1, 4, 0, 33):
        piece = rng.integers(0, 5, length)
        oracle.add(torch.from_numpy(piece))
        for order in orders:
            for at in range(order - 1, length):
                context, full = slow_slots(
                    piece[at - order + 1 : at], piece[at], PRIMES["gated"], buckets
                )
                contexts[order][context] += 1
                fulls[order][full] += 1
    ids, targets = rng.integers(0, 5, (3, 14)), rng.integers(0, 5, (3, 14))
    expected = np.full((3, 14, len(orders)), -1.0)
    for b, t, k in np.ndindex(*expected.shape):
        order = orders[k]
        if t >= order - 1:
            context, full = slow_slots(
                ids[b, t - order + 2 : t + 1], targets[b, t], PRIMES["gated"], buckets
            )
            count = contexts[order][context]
            expected[b, t, k] = min(fulls[order][full], count) / count if count >= 2 else -1
    np.testing.assert_allclose(
        oracle.ratios(*map(torch.from_numpy, (ids, targets))).numpy(), expected, rtol=1e-6
    )
    assert (expected > 0).any() and (expected < 0).any()


def test_trainer_fills_its_oracle_shard_by_shard(rng, rt, run_log, tmp_path):
    cfg = tg.Config(**SMALL, mixer_head=True, ngram_buckets=64)
    oracle = tg.FrozenNgramTable(cfg, rt.device)
    paths = [tmp_path / f"fineweb_train_{i}.bin" for i in range(2)]
    for path in paths:
        tg.write_shard(path, rng.integers(0, 9, 40))
        oracle.add(torch.from_numpy(tg.read_shard(path).astype(np.int64)))
    trainer = tg.Trainer(cfg, rt, run_log, tg.GPT(cfg), tg.TokenStream(paths, cfg))
    tg.fill_ngram_table(trainer)
    assert torch.equal(
        trainer.ngram_table.tables, oracle.tables
    ) and oracle.tables.sum() == 2 * 2 * sum(range(34, 40))


# Every token has its own number of bytes, so that byte weights matter.
SIZES = tg.ByteTable(
    (np.arange(260) % 7).astype(np.int16), np.arange(260) % 3 == 0, np.arange(260) < 4, "sizes"
)
ADAPTS = dict(
    SMALL,
    train_seq_len=16,
    eval_stride=8,
    eval_batch_tokens=48,
    ttt_epochs=2,
    ttt_chunk_tokens=48,
    ttt_batch_seqs=2,
    ttt_lr=0.02,
    ttt_optimizer="sgd",
)


def steps_after_a_chunk(count, cfg):
    """PR 834: the first tokens of the rows, [steps][parts][rows].

    Each part is a run of neighbouring rows; of 5 in two parts the first has 2, the second 3.
    """
    length, size, parts = cfg.train_seq_len, cfg.ttt_batch_seqs, cfg.ttt_parts
    rows = count // length
    sizes = [rows // parts + (part >= parts - rows % parts) for part in range(parts)]
    steps = []
    for at in range(0, max(sizes), size):
        step = []
        for part, share in enumerate(sizes):
            first = sum(sizes[:part])
            step.append([(first + row) * length for row in range(at, min(at + size, share))])
        steps.append([starts for starts in step if starts])
    return steps


def steps_before_scoring(count, cfg):
    """PR 489: parts are cut at tokens, a batch begins only while more than a row is left."""
    length, size = cfg.train_seq_len, cfg.ttt_batch_seqs
    share, parts = count // length * length // cfg.ttt_parts, []
    for part in range(cfg.ttt_parts):
        start, end, batches = part * share, (part + 1) * share, []
        while start < end - length:
            rows = (min(start + size * length, end) - start) // length
            batches.append([start + row * length for row in range(rows)])
            start += size * length
        parts.append(batches)
    return list(zip(*parts))


def slow_gradient(model, params, tokens, starts, cfg):
    """Gradient of the mean nats of some rows, weighted by bytes or not."""
    nats, weights = [], []
    for start in starts:
        span = tokens[start : start + cfg.train_seq_len + 1].astype(np.int64)
        log_p = torch.log_softmax(model.logits(torch.from_numpy(span[None, :-1]))[0], -1)
        for t, (before, token) in enumerate(zip(span[:-1], span[1:])):
            size = SIZES.sizes[token] + int(SIZES.marked[token] and not SIZES.boundary[before])
            nats.append(-log_p[t, token])
            weights.append(float(size) if cfg.byte_weighted_ttt else 1.0)
    loss = sum(w * x for w, x in zip(weights, nats)) / sum(weights)
    return [
        torch.zeros_like(p) if g is None else g
        for p, g in zip(params, torch.autograd.grad(loss, params, allow_unused=True))
    ]


class SlowAdaptation:
    """SGD with momentum 0.9 or Adam without decay, on a copy of the model, by hand.

    Gradients are clipped to norm 1.
    """

    def __init__(self, model, cfg, names):
        self.model, self.cfg, self.steps, self.norms = copy.deepcopy(model), cfg, 0, []
        self.params = [p for name, p in self.model.named_parameters() if name in names]
        self.first, self.second = ([torch.zeros_like(p) for p in self.params] for _ in range(2))

    def learn(self, tokens, rate, steps_of=steps_after_a_chunk):
        for parts in steps_of(len(tokens) - 1, self.cfg) * self.cfg.ttt_epochs:
            several = [
                slow_gradient(self.model, self.params, tokens, starts, self.cfg) for starts in parts
            ]
            mean = [sum(gradients) / len(parts) for gradients in zip(*several)]
            self.norms.append(math.sqrt(sum(g.double().square().sum().item() for g in mean)))
            limit = math.inf if self.cfg.ttt_before_scoring else 1.0
            self.step([g * min(1, limit / self.norms[-1]) for g in mean], rate)

    @torch.no_grad()
    def step(self, gradients, rate):
        self.steps += 1
        for p, g, first, second in zip(self.params, gradients, self.first, self.second):
            if self.cfg.ttt_optimizer == "sgd":
                first.mul_(0.9).add_(g)
                p -= rate * first
            else:
                first.mul_(0.9).add_(0.1 * g)
                second.mul_(0.999).add_(0.001 * g * g)
                p -= (
                    rate
                    * (first / (1 - 0.9**self.steps))
                    / ((second / (1 - 0.999**self.steps)).sqrt() + 1e-8)
                )

    def charge(self, tokens, windows):
        log_p, _ = slow_outputs(self.model, tokens, windows, self.cfg.ttt_temperature)
        return [-row[tokens[at]] for at, row in enumerate(log_p, windows[0][1] + 1)]


ADAPTATIONS = {
    "clipped": dict(ttt_lr=0.2),
    "weighted by bytes": dict(byte_weighted_ttt=True, ttt_epochs=1),
    "two parts": dict(ttt_parts=2, ttt_batch_seqs=1, byte_weighted_ttt=True, ttt_chunk_tokens=64),
    "uneven parts": dict(
        ttt_parts=2,
        ttt_batch_seqs=1,
        ttt_chunk_tokens=80,
        eval_stride=16,
        qttt=True,
        ttt_freeze_blocks=1,
        ttt_lr=0.3,
    ),
    "adam, tempered": dict(ttt_optimizer="adamw", ttt_lr=0.003, ttt_temperature=0.93),
    "queries, clipped at times": dict(qttt=True, ttt_freeze_blocks=1, ttt_lr=0.3),
    "odd stride": dict(eval_stride=6, ttt_chunk_tokens=30),
}


@pytest.mark.parametrize("case", ADAPTATIONS)
def test_adaptation_equals_a_slow_loop(case, rt, run_log, rng):
    """Charge a chunk, then learn it, with a rate that falls along a cosine.

    The last chunk is only charged.
    """
    cfg = tg.Config(**dict(ADAPTS, **ADAPTATIONS[case]))
    tokens, model = rng.integers(0, 260, 171).astype(np.uint16), randomized(cfg)
    learned = {
        "blocks.1.attn.c_q.weight",
        *(f"blocks.{i}.{kind}_scale" for i in range(2) for kind in ("attn", "mlp")),
    }
    slow = SlowAdaptation(model, cfg, learned if cfg.qttt else every_name(model))
    chunks, expected = slow_chunks(170, 16, cfg.eval_stride, cfg.ttt_chunk_tokens), []
    for number, windows in enumerate(chunks):
        expected += slow.charge(tokens, windows)
        if number < len(chunks) - 1:
            rate = cfg.ttt_lr * 0.5 * (1 + math.cos(math.pi * number / (len(chunks) - 1)))
            slow.learn(tokens[windows[0][1] : windows[-1][2] + 1], rate)
    without = tg.evaluate(
        tg.Scorer("s", tg.WindowNetwork(model, rt, cfg, 16, cfg.eval_stride)),
        tokens,
        SIZES,
        cfg,
        rt,
        run_log,
    )
    scorer = tg.STAGES["ttt"].build(model, rt, cfg, SIZES)
    score = tg.evaluate(scorer, tokens, SIZES, cfg, rt, run_log)
    np.testing.assert_allclose(score.nats, expected, atol=5e-4)
    for (name, p), wanted in zip(model.named_parameters(), slow.model.parameters()):
        torch.testing.assert_close(p, wanted, atol=2e-4, rtol=1e-3, msg=name)
    assert max(slow.norms) > 1 and (min(slow.norms) < 1 or not cfg.qttt)
    first = chunks[0][-1][2]
    assert (
        np.abs(score.nats - without.nats)[first:].max() > 0.02
        and score.label == "val_bpb"
        and len(chunks) > 2
    )
    checks = verdicts(score, scorer, tokens, cfg, rt)
    assert checks["order"] == checks["future"] == checks["distribution"] == "PASS"


def test_gated_cache_over_an_adapting_network(rt, run_log, rng):
    """PR 834 as it was scored.

    The head weighs orders and a network that learns each chunk after its charge.
    """
    cfg = tg.Config(**dict(ADAPTS, **MIXTURES["gated"], ngram_buckets=64, ttt_lr=0.1))
    tokens, model, outputs = few_words(rng, 200), randomized(cfg), []
    slow, chunks = SlowAdaptation(model, cfg, every_name(model)), slow_chunks(199, 16, 8, 48)
    for number, windows in enumerate(chunks):
        outputs.append(slow_outputs(slow.model, tokens, windows, cfg.ttt_temperature))
        if number < len(chunks) - 1:
            rate = cfg.ttt_lr * 0.5 * (1 + math.cos(math.pi * number / (len(chunks) - 1)))
            slow.learn(tokens[windows[0][1] : windows[-1][2] + 1], rate)
    expected, _ = slow_nats(copy.deepcopy(model), tokens, cfg, *map(np.concatenate, zip(*outputs)))
    score = tg.evaluate(
        tg.STAGES["ngram"].build(model, rt, cfg, SIZES), tokens, SIZES, cfg, rt, run_log
    )
    np.testing.assert_allclose(score.nats, expected, atol=5e-4)
    assert score.label == "unnormalised_score"


def test_weights_rest_while_a_chunk_is_charged(rt, run_log, rng):
    """Untouched until the first chunk is charged, the same for all of a chunk.

    Nothing is learned after the last.
    """
    cfg = tg.Config(**ADAPTS)
    tokens, model = rng.integers(4, 260, 171).astype(np.uint16), randomized(cfg)
    scorer, seen = tg.STAGES["ttt"].build(model, rt, cfg, TABLE), []
    optimizer = scorer.training.optimizer
    weights = lambda: torch.cat([p.detach().flatten() for p in model.parameters()])  # noqa: E731
    start, predict, step, steps = weights(), scorer.predict, optimizer.step, Counter()

    def watched(batch):
        seen.append((int(batch.index[0, 0]), weights()))
        return predict(batch)

    def counted():
        steps[seen[-1][0] // 48] += 1
        step()

    scorer.predict, optimizer.step = watched, counted
    tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log)
    assert steps == dict.fromkeys(range(3), 2 * 2)  # two epochs of two batches of rows
    states = {number: [w for at, w in seen if at // 48 == number] for number in range(4)}
    assert all(torch.equal(w, start) for w in states[0]) and torch.equal(weights(), states[3][-1])
    for number in range(1, 4):
        assert all(torch.equal(w, states[number][0]) for w in states[number])
        assert not torch.equal(states[number][0], states[number - 1][0])


def test_one_chunk_is_only_charged(rt, run_log, rng):
    """There is nothing left to learn for: no weight moves."""
    cfg = tg.Config(**dict(ADAPTS, ttt_chunk_tokens=176))
    tokens, model = rng.integers(4, 260, 171).astype(np.uint16), randomized(cfg)
    before = copy.deepcopy(model.state_dict())
    scorer = tg.STAGES["ttt"].build(model, rt, cfg, TABLE)
    tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log)
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())


SCALES = {f"blocks.{i}.{kind}_scale" for i in range(3) for kind in ("attn", "mlp")} | {
    "bigram.scale",
    "ve_shared.scale",
    "ve_layer_scales.0",
    "ve_layer_scales.1",
}
BLOCK = {
    f"blocks.2.{name}"
    for name in (
        "attn.c_q.weight",
        "attn.c_k.weight",
        "attn.c_v.weight",
        "attn.proj.weight",
        "attn.q_gain",
        "mlp.fc.weight",
        "mlp.proj.weight",
        "resid_mix",
    )
}
LEARNED = {
    "queries of the last": (
        dict(qttt=True, ttt_freeze_blocks=1),
        SCALES | {"blocks.2.attn.c_q.weight"},
    ),
    "queries of two": (
        dict(qttt=True, ttt_freeze_blocks=2),
        SCALES | {"blocks.1.attn.c_q.weight", "blocks.2.attn.c_q.weight"},
    ),
    "last block": (dict(ttt_freeze_blocks=1), SCALES | BLOCK),
    "untied": (
        dict(qttt=True, ttt_freeze_blocks=1, tie_embeddings=False),
        SCALES | {"blocks.2.attn.c_q.weight", "lm_head.weight"},
    ),
}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("case", LEARNED)
def test_adaptation_moves_what_it_says_and_nothing_else(case, optimizer, rt, rng):
    """The list of PR 834; its mixer head may move, but the network's loss does not reach it."""
    settings, expected = LEARNED[case]
    cfg = tg.Config(
        **dict(
            FULL,
            mixer_head=True,
            ttt_epochs=1,
            ttt_batch_seqs=2,
            ttt_optimizer=optimizer,
            **settings,
        )
    )
    model = randomized(cfg)
    before = copy.deepcopy(dict(model.named_parameters()))
    scorer = tg.STAGES["ttt"].build(model, rt, cfg, TABLE)
    learn(scorer, rng.integers(4, 260, 129).astype(np.uint16))
    assert {
        name for name, p in model.named_parameters() if not torch.equal(p, before[name])
    } == expected
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected | {
        "alpha_head.weight",
        "alpha_head.bias",
    }


@pytest.mark.parametrize(
    "settings, count",
    [(dict(qttt=True, ttt_freeze_blocks=1), 277_003), (dict(ttt_freeze_blocks=2), 5_784_091)],
)
def test_adapted_parameters_at_full_size(settings, count, rt):
    """What the logs of PR 834 and PR 859 print."""
    cfg = tg.Config(
        num_layers=11,
        num_kv_heads=8,
        mlp_mult=3.5,
        bigram_vocab_size=6144,
        smear=True,
        ve_layers=(9, 10),
        mixer_head=True,
        ttt_epochs=1,
        **settings,
    )
    with torch.device("meta"):
        model = tg.GPT(cfg)
    tg.STAGES["ttt"].build(model, rt, cfg, TABLE)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


@pytest.mark.parametrize(
    "optimizer, rows, parts",
    [("adamw", 8, 1), ("sgd", 8, 2), ("sgd", 5, 1), ("sgd", 9, 2), ("sgd", 10, 3), ("sgd", 10, 2)],
)
def test_adapting_first_is_called_what_it_is(optimizer, rows, parts, rt, run_log, rng):
    """PR 489: a constant rate, all tokens, all parameters, then the score; it is never val_bpb."""
    cfg = tg.Config(
        **dict(
            ADAPTS,
            ttt_before_scoring=True,
            ttt_optimizer=optimizer,
            ttt_lr=0.003,
            ttt_parts=parts,
            eval_stride=16,
        )
    )
    tokens, model = rng.integers(4, 260, rows * 16 + 4).astype(np.uint16), randomized(cfg)
    slow = SlowAdaptation(model, cfg, every_name(model))
    slow.learn(tokens, 0.003, steps_before_scoring)
    scorer = tg.STAGES["ttt"].build(model, rt, cfg, SIZES)
    score = tg.evaluate(scorer, tokens, SIZES, cfg, rt, run_log)
    np.testing.assert_allclose(
        score.nats, slow.charge(tokens, slow_windows(len(tokens) - 1, 16, 16)), atol=5e-4
    )
    assert score.label == "adapted_before_scoring" and "val_bpb" not in score.record()
    checks = verdicts(score, scorer, tokens, cfg, rt)
    assert checks["order"].startswith("EXPECTED")
    assert not [name for name in ("coverage", "future", "distribution") if checks[name] != "PASS"]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_restored_adaptation_is_bit_equal(optimizer, rt, rng):
    """Weights and optimizer: what comes after a restore is what came after the snapshot."""
    cfg = tg.Config(**dict(ADAPTS, ttt_optimizer=optimizer))
    model, tokens = randomized(cfg), rng.integers(4, 260, 49).astype(np.uint16)
    scorer = tg.STAGES["ttt"].build(model, rt, cfg, TABLE)
    learn(scorer, tokens)
    state, then = scorer.state_dict(), copy.deepcopy(model.state_dict())
    learn(scorer, tokens, 0.3)
    after = copy.deepcopy(model.state_dict())
    scorer.load_state_dict(state)
    assert all(torch.equal(w, then[name]) for name, w in model.state_dict().items())
    learn(scorer, tokens, 0.3)
    assert all(torch.equal(w, after[name]) for name, w in model.state_dict().items())
    assert not all(torch.equal(then[name], after[name]) for name in then)


def compiled(function):
    torch.compiler.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True)


def test_fake_quantization_acts_in_a_compiled_model(rt, run_log, rng):
    """Switched after the first trace it still changes the loss; off is as before.

    Gradients reach the weights.
    """
    cfg = tg.Config(**dict(SMALL, num_layers=1, quant_bits=3))
    model = randomized(cfg)
    trainer = tg.Trainer(cfg, rt, run_log, model, None)
    assert len(trainer.quantized) == 6
    ids, targets = (torch.from_numpy(rng.integers(0, 260, (2, 16))) for _ in range(2))
    loss_of, losses, gradients = compiled(model), [], []
    for on in (False, True, False):
        trainer.fake_quantization(on)
        trainer.gradients.zero_()
        loss = loss_of(ids, targets)
        torch.testing.assert_close(loss, model(ids, targets))
        loss.backward()
        losses.append(loss.item())
        gradients.append(trainer.gradients.clone())
        assert all(p.grad.abs().max() > 0 for name, p in model.named_parameters())
    assert losses[0] == losses[2] != losses[1] and torch.equal(gradients[0], gradients[2])
    assert not torch.allclose(gradients[0], gradients[1])


@pytest.mark.parametrize("floor", [False, True])
def test_trainer_fakes_by_the_policy(floor, rt, run_log):
    """The settings' bits and floor, matrix by matrix."""
    cfg = tg.Config(**dict(SMALL, quant_policy="attn:4,mlp:3", quant_scale_floor=floor))
    trainer = tg.Trainer(cfg, rt, run_log, randomized(cfg), None)
    trainer.fake_quantization(True)
    for name, module in trainer.model.named_modules():
        if isinstance(module, tg.Linear):
            top, w = 7 if ".attn." in name else 3, module.weight.detach().numpy()
            step = np.abs(w).max(1, keepdims=True) / np.float32(top)
            if floor:
                step = np.maximum(step, np.float32(1 / top))
            faked = module(torch.eye(w.shape[1])).detach().T.numpy()
            np.testing.assert_allclose(faked, np.round(w / step) * step, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("bits, floor", [(5, False), (6, True), (8, False)])
def test_fake_quantized_weights_are_what_packing_gives(bits, floor, rng):
    """Up to float16 rounding of the scales; the gradient passes as if nothing had been rounded."""
    top = 2 ** (bits - 1) - 1
    levels = (rng.integers(-top, top + 1, (24, 40)) + rng.uniform(-0.4, 0.4, (24, 40))).clip(
        -top, top
    )
    levels[:, 7] = top  # far from ties, so no level can flip
    if floor:  # rows below 1: the floor sets their steps
        levels = np.where(np.abs(levels) > 0.7 * top, levels.round() // 2, levels)
    steps = np.full((24, 1), 1 / top) if floor else 10 ** rng.uniform(-4, 1, (24, 1))
    linear = tg.Linear(40, 24)
    linear.weight.data = torch.from_numpy(levels * steps).float()
    linear.fake_qmax, linear.fake_floor = top, floor
    cfg = tg.Config(quant_clip_steps=1, quant_scale_floor=floor)
    quantizer = tg.RowInt(bits)
    unpacked = quantizer.decode(*quantizer.fit(linear.weight.detach(), cfg))
    x = torch.from_numpy(rng.standard_normal((9, 40))).float()
    out = linear(torch.eye(40))
    torch.testing.assert_close(out.detach().T, unpacked, rtol=2**-10, atol=1e-7)
    torch.testing.assert_close(
        out.detach().T, torch.from_numpy(levels.round() * steps).float(), rtol=1e-5, atol=1e-7
    )
    push = torch.from_numpy(rng.standard_normal((9, 24))).float()
    (linear(x) * push).sum().backward()
    torch.testing.assert_close(linear.weight.grad, push.T @ x)


@pytest.mark.parametrize("floor", [False, True])
def test_quantization_penalty_equals_loops(floor, rng):
    """lambda / 12 times the sum over matrices of mean(w^2 step^2).

    The steps know no floor and are constants.
    """
    cfg = tg.Config(
        **dict(SMALL, quant_policy="attn:5,mlp:4", crown_q_lambda=0.3, quant_scale_floor=floor)
    )
    model = randomized(cfg)
    expected, gradients = 0.0, {}
    for name, p in model.named_parameters():
        if ".attn.c_" in name or ".mlp." in name or ".attn.proj" in name:
            w, top = p.detach().double().numpy(), 15 if ".attn." in name else 7
            gradients[name] = np.zeros_like(w)
            for i, j in np.ndindex(*w.shape):
                step = abs(w[i]).max() / top
                expected += 0.3 / 12 * (w[i, j] * step) ** 2 / w.size
                gradients[name][i, j] = 0.3 / 6 * w[i, j] * step**2 / w.size
    penalty = tg.quantization_penalty(tg.quantized_matrices(model, cfg), cfg)
    assert math.isclose(penalty.item(), expected, rel_tol=1e-5) and len(gradients) == 12
    penalty.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == gradients.keys()
    for name, wanted in gradients.items():
        np.testing.assert_allclose(model.get_parameter(name).grad.numpy(), wanted, rtol=1e-4)


def test_fake_quantization_and_penalty_begin_late(rt, run_log, rng):
    """At rate factors (1, 3/4, 1/2, 1/4 here) below 3/4 and below 1/2.

    The penalty counts once a step.
    """
    cfg = tg.Config(
        **dict(
            SMALL,
            quant_bits=4,
            iterations=4,
            warmdown_iters=4,
            schedule="tokens",
            crown_q_lambda=90.0,
            late_qat_threshold=0.75,
        )
    )
    model = randomized(cfg)
    trainer = tg.Trainer(cfg, rt, run_log, model, None)
    batches = [torch.from_numpy(rng.integers(0, 260, (2, 2, 32))) for _ in range(8)]
    for step in range(4):
        twin = copy.deepcopy(model)
        trainer.steps_done = step
        penalty = tg.quantization_penalty(tg.quantized_matrices(twin, cfg), cfg).item()
        for module in twin.modules():
            if isinstance(module, tg.Linear):
                module.fake_qmax = 7 if step >= 2 else 0
        expected = sum(twin(*batch).item() for batch in batches[2 * step : 2 * step + 2]) / 2
        loss = take_step(trainer, lambda unit: batches[unit].numpy()).item()
        assert (
            math.isclose(loss, expected + (penalty if step == 3 else 0), rel_tol=1e-5)
            and penalty > 0.01 * loss
        )


def test_no_late_mechanism_before_the_pace_is_trusted(rt, run_log, rng):
    """By the clock, 50 steps: until then one slow step makes the end look near."""
    cfg = tg.Config(**dict(SMALL, late_qat_threshold=0.9, warmdown_iters=100, schedule="clock"))
    trainer = tg.Trainer(cfg, rt, run_log, randomized(cfg), None)
    batch = rng.integers(0, 260, (2, 2, 32))
    for steps_done, steps_left, faking in ((49, 1, False), (50, 95, False), (50, 80, True)):
        trainer.steps_done = steps_done
        trainer.step(lambda unit: batch, steps_left)
        assert trainer.faking == faking


def test_a_step_of_two_processes_counts_penalty_and_seconds_once(run_log, rng):
    """What the processes report adds up to one process's loss, and to rank 0's seconds."""
    cfg = tg.Config(**dict(SMALL, quant_bits=4, crown_q_lambda=90.0, warmdown_iters=4))
    cfg = dataclasses.replace(cfg, schedule="tokens", iterations=1)
    batches = rng.integers(0, 260, (2, 2, 2, 32))
    reports = {}
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        rt = tg.Runtime(tg.Config(device="cpu"), {})
        rt.rank, rt.world = rank, world
        rt.sum_ = lambda tensor: tensor
        rt.map_shares = lambda function, stack: function(stack)
        trainer = tg.Trainer(cfg, rt, run_log, randomized(cfg), None, lambda: 7.0)
        trainer.clock.origin = 2.0
        loss = trainer.step(lambda unit: batches[unit], 1)
        trainer.send_report(loss)
        reports[rank, world] = trainer.in_flight[0][1].result()
    expected = tg.quantization_penalty(tg.quantized_matrices(randomized(cfg), cfg), cfg).item()
    for ids, targets in torch.from_numpy(batches):
        expected += randomized(cfg)(ids, targets).item() / 2
    assert math.isclose(reports[0, 1][1], expected, rel_tol=1e-5)
    assert math.isclose(reports[0, 2][1] + reports[1, 2][1], expected, rel_tol=1e-5)
    assert reports[0, 1][0] == reports[0, 2][0] + reports[1, 2][0] == 5.0


def slow_gptq(w, scale, hessian, top, damp):
    """Round one column, let those not yet rounded make up for it, take it out of the system.

    In float64.
    """
    w, h = w.astype(np.float64), hessian.astype(np.float64)
    for j in range(len(h)):
        if h[j, j] == 0:
            h[j, j], w[:, j] = 1, 0
    left = sorted(range(len(h)), key=lambda j: -h[j, j])
    inverse = np.linalg.inv(h + damp * np.diagonal(h).mean() * np.eye(len(h)))
    codes = np.zeros_like(w)
    while left:
        j = left.pop(0)
        codes[:, j] = np.clip(np.round(w[:, j] / scale), -top, top)
        error = (w[:, j] - codes[:, j] * scale) / inverse[j, j]
        for k in left:
            w[:, k] -= error * inverse[j, k]
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


@pytest.mark.parametrize("bits, cols, damp", [(4, 24, 0.01), (3, 150, 0.1), (8, 40, 0.01)])
def test_gptq_equals_column_by_column(bits, cols, damp, rng):
    """Levels of the slow rule, less output error than plain rounding on correlated inputs.

    Dead columns are 0.
    """
    top, w = 2 ** (bits - 1) - 1, rng.standard_normal((6, cols)).astype(np.float32)
    x = rng.standard_normal((4 * cols, cols)) @ (
        rng.standard_normal((cols, cols)) / 3 + np.eye(cols)
    )
    x[:, [2, 9]] = 0
    hessian = (x.T @ x / len(x)).astype(np.float32)
    scale = (np.abs(w).max(1) / top).astype(np.float32)
    codes = tg.gptq(*map(torch.from_numpy, (w, scale[:, None], hessian)), top, damp).numpy()
    np.testing.assert_array_equal(codes, slow_gptq(w, scale.astype(np.float64), hessian, top, damp))
    plain = np.clip(np.round(w / scale[:, None]), -top, top)
    errors = [
        np.trace((q * scale[:, None] - w) @ hessian @ (q * scale[:, None] - w).T)
        for q in (codes, plain)
    ]
    assert errors[0] < 0.9 * errors[1] and not codes[:, [2, 9]].any() and plain[:, [2, 9]].any()
    cfg = tg.Config(**dict(TINY, quant_bits=bits, quant_clip_steps=8, gptq_damp=damp))
    packed = tg.RowInt(bits).fit(torch.from_numpy(w), cfg, torch.from_numpy(hessian))
    scale = packed[1].numpy()[:, 0].astype(np.float64)
    expected = slow_gptq(w, scale, hessian, top, damp)
    np.testing.assert_array_equal(packed[0].numpy(), expected)


def test_hessians_are_the_layers_inputs(rng, rt, tmp_path):
    """X^T X / n of every matrix, over the first sequences of the training stream."""
    cfg = tg.Config(**FULL, mixer_head=True, gptq_n_samples=3)
    model, tokens = randomized(cfg), rng.integers(0, 260, 400)
    tg.write_shard(tmp_path / "fineweb_train_0.bin", tokens)
    hessians = tg.collect_hessians(
        model, cfg, rt, tg.TokenStream([tmp_path / "fineweb_train_0.bin"], cfg)
    )
    inputs = {}
    for name, module in model.named_modules():
        if isinstance(module, tg.Linear):
            module.register_forward_hook(
                lambda m, args, out, name=name: inputs.setdefault(name, []).append(args[0])
            )
    with torch.no_grad():
        for i in range(3):
            model.hidden(torch.from_numpy(tokens[i * 32 : i * 32 + 32])[None])
    assert hessians.keys() == {f"{name}.weight" for name in inputs} and len(inputs) == 3 * 6 + 2
    for name, rows in inputs.items():
        x = torch.cat([row.reshape(-1, row.shape[-1]) for row in rows]).double().numpy()
        assert len(x) == 96
        np.testing.assert_allclose(
            hessians[f"{name}.weight"].numpy(), x.T @ x / 96, rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("share", [0.03, 0.25, 0.5])
def test_pruning_zeroes_the_smallest_of_each_tensor(share, rng):
    """Which weights become 0, tensor by tensor; floats and small tensors keep theirs."""
    cfg = tg.Config(**dict(TINY, prune_pct=share, keep_float_max_numel=256))
    state = {
        name: torch.from_numpy(
            rng.uniform(0.3, 1, shape) * rng.choice([-1, 1], shape) * size
        ).float()
        for name, shape, size in (
            ("tok_emb.weight", (20, 32), 1),
            ("blocks.0.mlp.fc.weight", (33, 30), 9),
            ("bigram.proj.weight", (16, 16), 1),
            ("blocks.0.resid_mix", (2, 200), 1),
        )
    }
    _, weights = tg.unpack(tg.pack(state, cfg))
    for name, w in state.items():
        sizes = w.abs().flatten().tolist()
        smallest = (
            np.argsort(sizes)[: math.ceil((len(sizes) - 1) * share)] if len(sizes) > 400 else []
        )
        expected = np.zeros(len(sizes), bool)
        expected[smallest] = True
        assert np.array_equal((weights[name] == 0).flatten().numpy(), expected), name


@pytest.mark.parametrize("bits", [4, 5, 8])
def test_scale_floor(bits, rng):
    """Steps are at least 1 / top level: rows below 1 share it, rows above are as without."""
    top, w = 2 ** (bits - 1) - 1, torch.from_numpy(rng.standard_normal((6, 50))).float()
    w = w / w.abs().amax(1, keepdim=True) * torch.tensor([0.001, 0.1, 0.9, 1.5, 7.0, 0.0])[:, None]
    for clip_steps in (1, 16):
        cfg = tg.Config(quant_scale_floor=True, quant_clip_steps=clip_steps)
        scales = tg.RowInt(bits).fit(w, cfg)[1].numpy()[:, 0]
        floor = np.float16(1 / top)
        assert (scales >= floor).all() and (scales[[0, 1, 2, 5]] == floor).all()
    plain, scales = (
        tg.RowInt(bits).fit(w, tg.Config(quant_scale_floor=floor_on, quant_clip_steps=1))[1].numpy()
        for floor_on in (False, True)
    )
    assert np.array_equal(plain[3:5], scales[3:5]) and (plain[:3] < floor).all()


def ema(values, decay):
    """The first value, then each new one with weight 1 - decay, as one sum."""
    last = len(values) - 1
    return decay**last * values[0] + sum(
        (1 - decay) * decay ** (last - i) * v for i, v in enumerate(values) if i
    )


# Settings -> the expected average of the weights w[0] (initial), w[1] .. w[10] (after each of ten
# steps).
AVERAGES = {
    "from the start": (dict(ema_decay=0.75), lambda w: ema(w, 0.75)),
    "late": (dict(ema_decay=0.75, ema_start=0.5), lambda w: ema(w[5:], 0.75)),
    "plain": (dict(swa_every=2, swa_start=0.4), lambda w: (w[4] + w[6] + w[8] + w[10]) / 4),
    "plain, rare": (dict(swa_every=3, swa_start=0.0), lambda w: (w[3] + w[6] + w[9]) / 3),
    "half and half": (
        dict(ema_decay=0.9, ema_start=0.1, swa_every=5, swa_start=0.4),
        lambda w: 0.5 * ema(w[1:], 0.9) + 0.5 * (w[5] + w[10]) / 2,
    ),
    "half and half from the start": (
        dict(ema_decay=0.9, swa_every=4, swa_start=0.7),
        lambda w: 0.5 * ema(w, 0.9) + 0.5 * w[8],
    ),
    "none yet": (dict(swa_every=20), lambda w: w[10]),
    "not begun": (dict(ema_decay=0.9, ema_start=1.0, swa_every=1, swa_start=0.95), lambda w: w[10]),
}


@pytest.mark.parametrize("case", AVERAGES)
def test_averages_equal_closed_forms(case, rng):
    settings, closed_form = AVERAGES[case]
    values, model = rng.standard_normal((11, 4, 3)), torch.nn.Linear(3, 4, bias=False)
    model.weight.data = torch.from_numpy(values[0]).float()
    averager = tg.WeightAverager(model, tg.Config(**settings))
    for step in range(1, 11):
        model.weight.data = torch.from_numpy(values[step]).float()
        averager.update(step, step / 10)
    averager.apply()
    np.testing.assert_allclose(
        model.weight.detach().numpy(), closed_form(values), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    "settings, gain", [(dict(ortho_init="plain"), 1), (dict(ortho_init="scaled"), 1 / 8**0.5)]
)
def test_orthogonal_start(settings, gain):
    """Every matrix that is not zero has equal singular values.

    They are 1, those of the side tables' projections the gain.
    """
    cfg = tg.Config(**dict(FULL, num_layers=4, **settings))
    for name, p in tg.GPT(cfg).named_parameters():
        if name.endswith(("attn.proj.weight", "mlp.proj.weight")):
            assert not p.any()
        elif name.endswith(
            (
                ".c_q.weight",
                ".c_k.weight",
                ".c_v.weight",
                ".fc.weight",
                "bigram.proj.weight",
                "ve_shared.proj.weight",
            )
        ):
            values = torch.linalg.svdvals(p.detach().double())
            wanted = gain if not name.startswith("blocks.") else 1
            torch.testing.assert_close(
                values, torch.full_like(values, wanted), atol=1e-5, rtol=1e-5, msg=name
            )
    without = tg.GPT(tg.Config(**FULL))
    assert torch.linalg.svdvals(without.blocks[0].attn.c_q.weight).std() > 0.1
    assert not without.ve_shared.proj.weight.any()  # the baseline's start of side tables


def test_depth_scaled_start():
    """1 / sqrt(layer + 1) for both scales of a block, which stay learnable; 1 without."""
    for on in (True, False):
        model = tg.GPT(tg.Config(**dict(TINY, num_layers=5, depth_scale_init=on)))
        for layer, block in enumerate(model.blocks):
            for scale in (block.attn_scale, block.mlp_scale):
                np.testing.assert_allclose(
                    scale.detach().numpy(), 1 / math.sqrt(layer + 1) if on else 1, rtol=1e-6
                )
                assert scale.requires_grad
        assert model(*torch.randint(4, 260, (2, 1, 8))).isfinite()


@pytest.mark.parametrize("orders", [2, 6])
def test_start_of_mixer_head_and_side_branches(orders):
    """Constants of the published scripts.

    With every order counting the network starts at e^2 / (e^2 + K).
    """
    cfg = tg.Config(**FULL, mixer_head=True, ngram_order=1 + orders, qk_gain_init=1.7)
    model = tg.GPT(cfg)
    head = model.alpha_head
    assert not head.weight.any() and head.bias.tolist() == [2.0] + [0.0] * orders
    nothing = tg.mix(head(torch.randn(32)), torch.tensor(1.0), torch.zeros(orders), 0.0).item()
    assert math.isclose(nothing, math.e**2 / (math.e**2 + orders), rel_tol=1e-5)
    assert not model.smear.gate.any() and abs(model.ve_shared.embed.weight.std() - 0.01) < 0.001
    assert [
        round(p.item(), 6)
        for p in (model.bigram.scale, model.ve_shared.scale, *model.ve_layer_scales)
    ] == [0.05, 0.1, 1, 1]
    for block in model.blocks:
        assert (block.resid_mix == torch.tensor([1.0, 0.0])[:, None]).all()
        assert (block.attn.q_gain == 1.7).all()
        assert not block.attn.proj.weight.any() and not block.mlp.proj.weight.any()


def bigram_gradients(model, rng):
    """Largest gradient of the bigram branch's table, projection and scale on random tokens."""
    ids, targets = (torch.from_numpy(rng.integers(0, 260, (2, 32))) for _ in range(2))
    model.zero_grad()
    model(ids, targets).backward()
    branch = model.bigram
    return [
        p.grad.abs().max().item() for p in (branch.embed.weight, branch.proj.weight, branch.scale)
    ]


@pytest.mark.parametrize("kind", ["zero", "normal", "dead"])
def test_bigram_start(kind, rng, rt):
    """dead never gets a gradient; zero lives through its projection; normal is N(0, 1)."""
    cfg = tg.Config(
        **dict(FULL, bigram_vocab_size=512, bigram_init=kind, tied_embed_init_std=0.5, muon_wd=0.1)
    )
    model = tg.GPT(cfg)
    table, projection = model.bigram.embed.weight.detach(), model.bigram.proj.weight.detach()
    assert bool(table.any()) == (kind == "normal") and bool(projection.any()) == (kind != "dead")
    if kind == "normal":
        assert abs(table.mean()) < 0.06 and abs(table.std() - 1) < 0.05
    assert model.bigram.scale.item() == pytest.approx(0.05)
    gradients = bigram_gradients(model, rng)
    assert [g > 0 for g in gradients] == {
        "zero": [True, False, False],
        "normal": [True] * 3,
        "dead": [False] * 3,
    }[kind]
    optimizers = tg.build_optimizers(model, cfg, rt)
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.step()
        gradients = bigram_gradients(model, rng)
    assert [g > 0 for g in gradients] == [kind != "dead"] * 3
    assert kind != "dead" or not table.any() and not projection.any()


@pytest.mark.parametrize("rows", [2, 64, 2048])
def test_bigram_rows_equal_whole_numbers(rows, rng):
    """The two published hashes, with Python's unbounded integers and large vocabularies."""
    for vocab in (260, 1024, 65536):
        ids = rng.integers(0, vocab, (3, 40))
        for kind in ("xor", "linear"):
            expected = np.empty_like(ids)
            for b, t in np.ndindex(*ids.shape):
                token, before = int(ids[b, t]), int(ids[b, t - 1]) if t else 0
                if kind == "linear":
                    expected[b, t] = (token * 2654435761 + before * 40503) % rows
                else:
                    expected[b, t] = (
                        ((36313 * token) ^ (27191 * before)) % (rows - 1) if t else rows - 1
                    )
            module = tg.BigramHash(tg.Config(bigram_vocab_size=rows, bigram_hash=kind))
            assert np.array_equal(module.rows_of(torch.from_numpy(ids)).numpy(), expected)
            assert (module.scale is None) == (kind == "linear")


def test_linear_bigram_hash_at_published_size():
    """With 4,096 rows the published products reduce to small ones."""
    ids = torch.arange(1024).repeat(2, 1)
    rows = (
        tg.BigramHash(tg.Config(bigram_vocab_size=4096, bigram_hash="linear"))
        .rows_of(ids)[0]
        .tolist()
    )
    assert rows == [(2481 * t + 3639 * max(t - 1, 0)) % 4096 for t in range(1024)]


def tables_of(time, dims, base, train_len):
    """Rotary tables of a model's context for inputs of this length."""
    stretched = tg.stretched_base(base, dims, time, train_len)
    return tg.rotary_tables(time, dims, stretched, torch.device("cpu"))


@pytest.mark.parametrize("time, dims, train_len", [(48, 8, 16), (33, 4, 32), (40, 6, 7)])
def test_rotary_base_grows_beyond_the_trained_length(time, dims, train_len, rng):
    """base (T / train_len) ^ (d / (d - 2)) beyond it, and nothing up to it."""
    base = 100 * (time / train_len) ** (dims / (dims - 2))
    cos, sin = tables_of(time, dims, 100.0, train_len)
    angles = np.array(
        [[t * base ** (-2 * i / dims) for i in range(dims // 2)] for t in range(time)]
    )
    np.testing.assert_allclose(cos[:, 0].numpy(), np.cos(angles), atol=1e-4)
    np.testing.assert_allclose(sin[:, 0].numpy(), np.sin(angles), atol=1e-4)
    ids = torch.from_numpy(rng.integers(0, 260, (1, time)))
    stretched, same, plain = (
        randomized(tg.Config(**dict(TINY, rope_dims=dims, **settings)))
        for settings in (
            dict(rope_base=100.0, rope_train_seq_len=train_len),
            dict(rope_base=base),
            dict(rope_base=100.0),
        )
    )
    torch.testing.assert_close(stretched.hidden(ids), same.hidden(ids), atol=1e-4, rtol=1e-3)
    assert not torch.allclose(stretched.hidden(ids), plain.hidden(ids), atol=1e-2)
    assert torch.equal(stretched.hidden(ids[:, :train_len]), plain.hidden(ids[:, :train_len]))


def test_rotary_base_of_the_published_run():
    cos, _ = tables_of(2048, 16, 10000.0, 1024)
    # 2,048 tokens, trained as if for 1,024.
    wanted = [math.cos(22_080 ** (-i / 8)) for i in range(8)]
    np.testing.assert_allclose(cos[1, 0].numpy(), wanted, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_smear_before_or_after_the_norm(before, masked, rng):
    """A fresh model's blocks are the identity, so its output shows the stream that enters them."""
    cfg = tg.Config(
        **dict(
            TINY, smear=True, smear_before_norm=before, smear_bos_mask=masked, tie_embeddings=False
        )
    )
    model, ids = tg.GPT(cfg), rng.integers(0, 260, 20)
    ids[[6, 13]] = 1
    with torch.no_grad():
        model.smear.gate.copy_(torch.from_numpy(rng.standard_normal(32)))
        model.tok_emb.weight.mul_(torch.rand(260, 1) * 5)  # tokens of different lengths
    table, gate = (p.detach().double().numpy() for p in (model.tok_emb.weight, model.smear.gate))

    def norm(x):
        return x / math.sqrt((x * x).mean() + np.finfo(np.float32).eps)

    stream = [table[i] if before else norm(table[i]) for i in ids]
    gate, expected = 1 / (1 + np.exp(-gate)), []
    for t, token in enumerate(ids):
        held = masked and token == 1
        out = stream[t] if held else (1 - gate) * stream[t] + (gate * stream[t - 1] if t else 0)
        expected.append(norm(norm(out) if before else out))
    got = model.hidden(torch.from_numpy(ids)[None])[0].detach().numpy()
    np.testing.assert_allclose(got, expected, atol=1e-4)


RATES = {
    "head": (0.011, 0.1),
    "embed": (0.012, 0.1),
    "tables": (0.013, 0.1),
    "scalars": (0.014, 0.2),
    "matrices": (0.015, 0.3),
}


def usual_group(name, p, tied):
    """Where the published scripts put a parameter."""
    if name in ("lm_head.weight", "tok_emb.weight") and not tied:
        return "head" if name == "lm_head.weight" else "embed"
    if name in ("tok_emb.weight", "bigram.embed.weight", "ve_shared.embed.weight"):
        return "tables"
    vector = (
        p.ndim < 2 or name.endswith("resid_mix") or name in ("skip_weights", "alpha_head.weight")
    )
    return "scalars" if vector else "matrices"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bigram", ["", "scalars", "matrices"])
def test_groups_rates_and_decay(bigram, tied, rt):
    """What the optimizers hold.

    With no gradient a step shrinks each weight by its rate times its decay.
    """
    cfg = tg.Config(
        **dict(
            FULL,
            mixer_head=True,
            tie_embeddings=tied,
            head_lr=0.011,
            embed_lr=0.012,
            tied_embed_lr=0.013,
            scalar_lr=0.014,
            matrix_lr=0.015,
            embed_wd=0.1,
            adam_wd=0.2,
            muon_wd=0.3,
            bigram_optim=bigram,
        )
    )
    model = randomized(cfg)
    expected = {name: usual_group(name, p, tied) for name, p in model.named_parameters()}
    if bigram:  # PR 740, PR 489
        expected |= {"bigram.embed.weight": bigram, "bigram.proj.weight": bigram}
    groups = tg.parameter_groups(model, cfg)
    assert {name: group for group, members in groups.items() for name, _ in members} == expected
    optimizers = tg.build_optimizers(model, cfg, rt)
    held = {
        id(p): (group["lr"], group["weight_decay"], type(optimizer) is tg.Muon)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    }
    before = copy.deepcopy(dict(model.named_parameters()))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for optimizer in optimizers:
        optimizer.step()
    for name, p in model.named_parameters():
        rate, decay = RATES[expected[name]]
        assert held[id(p)] == (rate, decay, expected[name] == "matrices"), name
        torch.testing.assert_close(
            p, before[name] * (1 - rate * decay), rtol=1e-6, atol=1e-7, msg=name
        )


# Switch -> (settings it builds on, settings on, parameters that must appear, parameters that must
# go).
SWITCHES = {
    "smear before norm": (dict(smear=True), dict(smear_before_norm=True), set(), set()),
    "linear bigram": (
        dict(),
        dict(bigram_vocab_size=64, bigram_dim=8, bigram_hash="linear"),
        {"bigram.embed.weight", "bigram.proj.weight"},
        set(),
    ),
    "linear for xor": (
        dict(bigram_vocab_size=64, bigram_dim=8),
        dict(bigram_hash="linear"),
        set(),
        {"bigram.scale"},
    ),
    "rotary stretch": (dict(), dict(rope_train_seq_len=8), set(), set()),
    "mixer head": (dict(), dict(mixer_head=True), {"alpha_head.weight", "alpha_head.bias"}, set()),
}


def tensors_of(model):
    header, _ = tg.read_header(tg.pack(model.state_dict(), model.cfg))
    return {row[0] for row in header["tensors"]}


@pytest.mark.parametrize("switch", SWITCHES)
def test_switch_is_alive_and_absent_when_off(switch, rng):
    """On, it changes the loss, compiled as well as eager.

    Off, neither model nor artifact holds anything of it.
    """
    base, settings, added, gone = SWITCHES[switch]
    base = dict(SMALL, num_layers=1, **base)
    off, on = (randomized(tg.Config(**cfg)) for cfg in (base, dict(base, **settings)))
    on.load_state_dict(off.state_dict(), strict=False)  # all that is shared has equal weights
    for found in (every_name, tensors_of):
        assert (found(on) - found(off), found(off) - found(on)) == (added, gone)
    ids, targets = (torch.from_numpy(rng.integers(0, 260, (2, 16))) for _ in range(2))
    ratios = torch.from_numpy(some_ratios(rng, (2, 16, 6))).float() if on.cfg.mixer_head else None
    losses = [compiled(on)(ids, targets, ratios), on(ids, targets, ratios)]
    torch.testing.assert_close(*losses)
    assert abs(losses[0] - off(ids, targets)) > 1e-4
    if on.cfg.mixer_head:  # it weighs, it does not predict
        assert torch.equal(on.logits(ids), off.logits(ids))
