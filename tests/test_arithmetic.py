"""The arithmetic coder: any symbols come back, and the code is as long as the probabilities say."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from tool import arithmetic

import train_gpt as tg


def uniform(rng, vocab):
    return np.full(vocab, 1 / vocab)


def skewed(rng, vocab):
    p = np.maximum(rng.dirichlet(np.full(vocab, 0.02)), 1e-300)
    return p / p.sum()


def near_certain(rng, vocab):
    p = np.full(vocab, 1e-9 / vocab)
    p[rng.integers(vocab)] += 1 - 1e-9
    return p / p.sum()


def common(rng, vocab):
    return rng.dirichlet(np.ones(vocab))


def there_and_back(logs, symbols):
    """Bits of the code, after the symbols came back."""
    encoder = arithmetic.Encoder()
    for log_p, symbol in zip(logs, symbols):
        encoder.encode(arithmetic.frequencies(log_p), symbol)
    data = encoder.finish()
    decoder = arithmetic.Decoder(data)
    assert [decoder.decode(arithmetic.frequencies(log_p)) for log_p in logs] == symbols
    return 8 * len(data)


@pytest.mark.parametrize("kind", [uniform, skewed, near_certain, common])
@pytest.mark.parametrize("vocab, count", [(2, 4000), (1024, 2000)])
def test_the_code_is_as_long_as_claimed(kind, vocab, count, rng):
    rows = [kind(rng, vocab) for _ in range(count)]
    symbols = [int(rng.choice(vocab, p=p)) for p in rows]
    claimed = -sum(np.log2(p[symbol]) for p, symbol in zip(rows, symbols))
    coded = there_and_back([torch.from_numpy(np.log(p)) for p in rows], symbols)
    assert claimed * 0.999 - 64 <= coded <= claimed * 1.001 + 64
    assert there_and_back([], []) <= 8


@pytest.mark.parametrize("vocab", [2, 1024])
def test_what_is_thought_impossible_comes_back(vocab, rng):
    """Tokens of probability exactly 0, again and again, and the most likely ones in between."""
    logs = []
    symbols = []
    for number in range(600):
        log_p = torch.full((vocab,), -torch.inf, dtype=torch.float64)
        log_p[number % vocab] = 0.0
        logs.append(log_p)
        symbols.append(number % vocab if number % 3 else int(rng.integers(vocab)))
    assert there_and_back(logs, symbols) < 600 * 31


@pytest.mark.parametrize("edge", [0, 1])
def test_intervals_around_the_middle(edge):
    """Symbols on both sides of one half: bits stay open for long."""
    log_p = torch.tensor([0.5 - 1e-6, 2e-6, 0.5 - 1e-6], dtype=torch.float64).log()
    there_and_back([log_p] * 300, [1] * 299 + [2 * edge])


@pytest.mark.parametrize("vocab, count", [(4096, 2_000_000), (65536, 300_000)])
@pytest.mark.parametrize("last", [False, True])
def test_the_most_symbols_of_a_code(vocab, count, last):
    """Certain tokens, nothing else: no code is denser, and the bound lies close above it."""
    symbol = vocab - 1 if last else 0
    log_p = torch.full((vocab,), -torch.inf, dtype=torch.float64)
    log_p[symbol] = 0.0
    cumulative = arithmetic.frequencies(log_p)
    encoder = arithmetic.Encoder()
    for _ in range(count):
        encoder.encode(cumulative, symbol)
    data = encoder.finish()
    most = arithmetic.most_symbols(len(data), vocab)
    assert count <= most
    spare = 9 / (8 * len(data) - 9)  # the last byte, and a bit that was not yet due
    assert most <= count * (1 + spare) * 1.01
    assert arithmetic.most_symbols(0, vocab) == 0


def test_the_most_symbols_in_exact_figures():
    """Against fractions: the largest share of an interval that `narrow` can leave."""
    vocab = 1024
    share = Fraction(arithmetic.SCALE + 1, arithmetic.SCALE + vocab)
    most = arithmetic.most_symbols(1, vocab)
    assert share**10_000 > Fraction(1, 2**8)
    assert most == pytest.approx(-8 / math.log2(share), rel=1e-5)


@pytest.mark.parametrize("kind", [uniform, skewed, near_certain, common])
def test_a_code_of_another_length_is_found(kind, rng):
    """A decoder ends with its code: it neither reads on in zeros nor leaves a byte."""
    logs = [torch.from_numpy(np.log(kind(rng, 64))) for _ in range(3000)]
    symbols = [int(rng.choice(64, p=log_p.exp().numpy())) for log_p in logs]
    encoder = arithmetic.Encoder()
    for log_p, symbol in zip(logs, symbols):
        encoder.encode(arithmetic.frequencies(log_p), symbol)
    data = encoder.finish()

    def decoded(code):
        decoder = arithmetic.Decoder(code)
        found = [decoder.decode(arithmetic.frequencies(log_p)) for log_p in logs]
        decoder.finish()
        return found

    assert decoded(data) == symbols
    with pytest.raises(arithmetic.OtherCode, match="goes on after"):
        decoded(data + b"\0")
    if len(data) > 1:
        with pytest.raises(arithmetic.OtherCode, match="ends before"):
            decoded(data[:-1])


def test_frequencies(rng):
    """Whole numbers, at least one a token, in the probabilities' proportions."""
    certain = np.eye(1024)[7]
    many = np.full(65536, 2.0**-16)
    for p in (skewed(rng, 1024), near_certain(rng, 1024), certain, many):
        with np.errstate(divide="ignore"):
            cumulative = arithmetic.frequencies(torch.from_numpy(np.log(p)))
        shares = np.diff(cumulative)
        assert cumulative[0] == 0
        assert len(shares) == len(p)
        assert (shares > 0).all()
        assert np.abs(shares / arithmetic.SCALE - p).max() <= 1 / arithmetic.SCALE


@pytest.mark.parametrize("p", [[np.nan, 0.5], [0.2, 0.2], [1.0, 0.1]])
def test_what_is_no_distribution_is_refused(p):
    with pytest.raises(tg.InputError, match="sum to"):
        arithmetic.frequencies(torch.tensor(p, dtype=torch.float64).log())


@pytest.mark.parametrize("error, fits", [(2e-6, True), (-5e-6, True), (1e-4, False)])
def test_what_float32_rounds_is_a_distribution(error, fits):
    """And what is off by more is none."""
    p = torch.full((1024,), (1 + error) / 1024)
    if fits:
        assert len(arithmetic.frequencies(p.log())) == 1025
    else:
        with pytest.raises(tg.InputError, match="no code can be made"):
            arithmetic.frequencies(p.log())
