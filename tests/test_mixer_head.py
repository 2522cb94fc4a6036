"""The mixer head of PR 859 (section 5): its mixture, its loss, and the n-grams that it weighs."""

import math

import numpy as np
import oracles
import pytest
import torch
from conftest import FULL, TINY
from helpers import config, random_ids, randomized

import train_gpt as tg

PRIMES = oracles.PRIMES["gated"]


def some_ratios(rng, shape):
    """Ratios of orders, -1 where an order does not count."""
    ratios = rng.random(shape)
    ratios[rng.random(shape) < 0.4] = -1
    return ratios


def mixed(gate, p, ratios, floor):
    """tg.mix of arrays."""
    arrays = [torch.from_numpy(array) for array in (gate, p, ratios)]
    return tg.mix(*arrays, floor).numpy()


@pytest.mark.parametrize("orders, floor", [(6, 0.05), (1, 0.0), (3, 0.5), (2, 1.0)])
def test_mix_equals_loops(orders, floor, rng):
    """Values, and weights that add up to one whatever is masked."""
    gate = rng.standard_normal((35, 1 + orders)) * 3
    p = rng.random(35)
    ratios = some_ratios(rng, (35, orders))
    ratios[:7] = -1  # no order counts
    got = mixed(gate, p, ratios, floor)
    expected = [oracles.mixture(*row, floor) for row in zip(gate, p, ratios)]
    np.testing.assert_allclose(got, expected, rtol=1e-9)
    np.testing.assert_allclose(got[:7], p[:7], rtol=1e-9)
    all_certain = np.where(ratios < 0, -1, 1.0)
    total = mixed(gate, np.ones(35), all_certain, floor)
    np.testing.assert_allclose(total, 1, rtol=1e-12)


def mixture_by_hand(gate, p, ratios):
    """One target; softmax over network and orders that count, the network lifted to 0.05."""
    counting = [k for k, ratio in enumerate(ratios) if ratio >= 0]
    heard = [gate[0]] + [gate[1 + k] for k in counting]
    weights = torch.softmax(torch.stack(heard), 0)
    mixed = (0.05 + 0.95 * weights[0]) * p
    for k, weight in zip(counting, weights[1:]):
        mixed = mixed + 0.95 * weight * ratios[k]
    return mixed


def losses_by_hand(model, ids, targets, ratios):
    """Mean nats of the network alone and of the mixture, target by target, in float64."""
    hidden = model.hidden(ids)
    p = torch.softmax(model.head(hidden).double(), -1)
    gates = (hidden @ model.alpha_head.weight.T + model.alpha_head.bias).double()
    plain = []
    mixture = []
    for at in np.ndindex(*targets.shape):
        network = p[at][targets[at]]
        plain.append(-torch.log(network))
        mixture.append(-torch.log(mixture_by_hand(gates[at], network, ratios[at])))
    return torch.stack(plain).mean(), torch.stack(mixture).mean()


def test_training_loss_adds_the_mixture(rng):
    """Loss and all gradients: nothing is detached.

    So head, backbone and logits all learn from the mixture.
    """
    model = randomized(config(FULL, mixer_head=True))
    ids = random_ids(rng, 2, 3).repeat(1, 2)  # contexts that come again
    targets = random_ids(rng, 2, 6)
    ratios = torch.from_numpy(some_ratios(rng, (2, 6, 6))).float()
    params = dict(model.named_parameters())
    plain, mixture = losses_by_hand(model, ids, targets, ratios)
    total = plain + 0.1 * mixture
    loss = model(ids, targets, ratios)
    assert math.isclose(loss.item(), total.item(), rel_tol=1e-5)
    expected = torch.autograd.grad(total, params.values(), retain_graph=True)
    found = torch.autograd.grad(loss, params.values())
    for name, got, wanted in zip(params, found, expected):
        atol = 1e-4 * wanted.abs().max().item()
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=atol, msg=name)
        assert got.abs().max() > 0, name
    assert model(ids, targets).item() == pytest.approx(plain.item(), rel=1e-5)
    reached = [params[name] for name in ("alpha_head.bias", "blocks.0.mlp.fc.weight")]
    for gradient in torch.autograd.grad(mixture, reached):  # the mixture alone
        assert gradient.abs().max() > 1e-6


# --- n-grams of the training tokens ---------------------------------------------------------------


def ngrams_of(piece, order):
    """Context and next token of every n-gram."""
    for at in range(order - 1, len(piece)):
        yield piece[at - order + 1 : at], piece[at]


def ratios_by_dictionaries(counters, ids, targets):
    """[B, T, K]: what the counters say of each order's context in the row and of the target."""
    expected = np.full((*ids.shape, len(counters.orders)), -1.0)
    for b, t, k in np.ndindex(*expected.shape):
        begin = t + 2 - counters.orders[k]  # the input at t is the last of the context
        if begin > 0:
            context = ids[b, begin : t + 1]
            expected[b, t, k] = counters.ratio(context, targets[b, t], min_count=2)
    return expected


@pytest.mark.parametrize("buckets, low, high", [(16, 2, 7), (64, 3, 3), (4096, 2, 4)])
def test_frozen_table_equals_dictionaries(buckets, low, high, rng, rt):
    """n-grams are counted inside each piece only, and asked for inside a row only."""
    sizes = dict(ngram_order=high, ngram_min_order=low, ngram_buckets=buckets)
    cfg = tg.Config(mixer_head=True, ngram_primes=PRIMES, **sizes)
    table = tg.FrozenNgramTable(cfg, rt.device)
    counters = oracles.HashedTables(range(low, high + 1), PRIMES, buckets)
    for length in (50, 1, 4, 0, 33):
        piece = rng.integers(0, 5, length)
        table.add(torch.from_numpy(piece))
        for order in counters.orders:
            for context, token in ngrams_of(piece, order):
                counters.add(context, token)
    ids = rng.integers(0, 5, (3, 14))
    targets = rng.integers(0, 5, (3, 14))
    ratios = table.ratios(torch.from_numpy(ids), torch.from_numpy(targets))
    expected = ratios_by_dictionaries(counters, ids, targets)
    np.testing.assert_allclose(ratios.numpy(), expected, rtol=1e-6)
    assert (expected > 0).any()
    assert (expected < 0).any()


def test_trainer_fills_its_table_shard_by_shard(rng, rt, run_log, tmp_path):
    """No n-gram reaches from one shard into the next."""
    cfg = tg.Config(**dict(TINY, num_layers=2), mixer_head=True, ngram_buckets=64)
    expected = tg.FrozenNgramTable(cfg, rt.device)
    paths = [tmp_path / f"fineweb_train_{i}.bin" for i in range(2)]
    for path in paths:
        tg.write_shard(path, rng.integers(0, 9, 40))
        expected.add(torch.from_numpy(tg.read_shard(path).astype(np.int64)))
    trainer = tg.Trainer(cfg, rt, run_log, tg.GPT(cfg), tg.TokenStream(paths, cfg))
    tg.fill_ngram_table(trainer)
    table = trainer.ngram_table
    assert torch.equal(table.tables, expected.tables)
    ngrams = sum(40 - order + 1 for order in range(2, 8))  # of a shard
    assert table.tables.sum() == 2 * 2 * ngrams
