"""Checks (section 11): scorers that cheat, books that were tampered with, bytes, gains."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from conftest import FULL, TINY, functions_entered
from helpers import TABLE, config, failed, randomized, windows

import train_gpt as tg


@pytest.fixture
def tokens(rng):
    tokens = rng.integers(4, 260, 150).astype(np.uint16)
    tokens[[0, 40, 90]] = 1
    return tokens


@pytest.fixture
def network(rt):
    """The plain model over windows of 32."""
    cfg = config(FULL)
    return windows(randomized(cfg), rt, cfg).network


@pytest.fixture
def evaluated(tokens, rt, run_log):
    """The score of a scorer."""
    cfg = config(TINY, eval_batch_tokens=50)
    return lambda scorer: tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log)


@pytest.fixture
def refused(evaluated, tokens, rt):
    """Names of the checks that a score fails; tamper changes what the harness wrote down."""
    cfg = config(TINY, eval_batch_tokens=50)

    def names(scorer, tamper=None):
        score = evaluated(scorer)
        if tamper:
            tamper(score)
        return failed(tg.check_score(score, scorer, tokens, TABLE, cfg, rt, {}))

    return names


def test_legal_scorers_pass_the_checks(network, refused):
    assert refused(tg.Scorer("s", network)) == set()


# --- scorers that cheat ---------------------------------------------------------------------------


class Peeking(tg.WindowNetwork):
    """Sees one token ahead: the input after the position."""

    def predict(self, batch):
        seen = super().predict(batch)
        later = np.roll(batch.ids[:, -batch.index.shape[1] :], -1, 1)
        tilt = 0.01 * torch.from_numpy(later)[..., None] * torch.arange(260) / 260
        return tg.Softmax(torch.log_softmax(seen.log_p + tilt, -1), seen.hidden)


@dataclasses.dataclass
class AtLeast(tg.Distribution):
    """Never less than some probability, at all targets or at one."""

    base: tg.Distribution
    least: float
    here: torch.Tensor  # [B, S]

    def prob(self, ids):
        p = self.base.prob(ids)
        return torch.where(self.here.unsqueeze(-1), p.clamp(min=self.least), p)


class Better(tg.Mixer):
    """Charges the better of two guesses, so that its probabilities add up to more than one."""

    def over(self, base, batch, network):
        everywhere = torch.ones(batch.index.shape, dtype=torch.bool)
        return AtLeast(base, 0.05, everywhere)


class BetterOnce(tg.Mixer):
    """Charges the better of two guesses at one target of the stream alone."""

    def over(self, base, batch, network):
        return AtLeast(base, 1e-4, torch.from_numpy(batch.index == 77))


class Again(tg.Windows):
    """The second batch comes twice."""

    def chunks(self, rank=0, world=1):
        (chunk,) = super().chunks(rank, world)
        return [dataclasses.replace(chunk, work=[*chunk.work, chunk.work[1]])]


class Twice(tg.WindowNetwork):
    def plan(self, tokens, chunk_targets):
        return Again(len(tokens) - 1, 32, 8, 1)


class Padded(tg.Windows):
    """Padding counts: the last window's targets several times in one batch."""

    def batch(self, tokens, windows):
        batch = super().batch(tokens, windows)
        return dataclasses.replace(batch, real=batch.index < self.targets)


class Padding(tg.WindowNetwork):
    def plan(self, tokens, chunk_targets):
        return Padded(len(tokens) - 1, 32, 8, 4)


CHEATING_NETWORKS = {Peeking: "future", Twice: "coverage", Padding: "coverage"}


@pytest.mark.parametrize("cheat", CHEATING_NETWORKS)
def test_cheating_networks_fail_the_checks(cheat, network, rt, refused):
    network = cheat(network.model, rt, network.model.cfg, 32, 8)
    assert CHEATING_NETWORKS[cheat] in refused(tg.Scorer("cheat", network))


@pytest.mark.parametrize("cheat", [Better, BetterOnce])
def test_cheating_mixers_fail_the_checks(cheat, network, refused):
    assert "distribution" in refused(tg.Scorer("cheat", network, [cheat()]))


# --- what was written down ------------------------------------------------------------------------


def leave_one_out(score):
    score.coverage[3] = 0


def charge_one_twice(score):
    score.coverage[3] = 2


def lower_by_a_hundredth(score):
    score.bpb *= 0.99


def lower_by_a_millionth(score):
    score.bpb -= 1e-6


def learn_first(score):
    score.events.insert(0, ("commit", 0, 9))


def begin_later(score):
    score.events.insert(0, ("score", 5, 9))


def charge_less(score):
    score.nats *= np.float32(0.9)


TAMPERED = {
    leave_one_out: {"coverage"},
    charge_one_twice: {"coverage"},
    lower_by_a_hundredth: {"byte_algebra"},
    lower_by_a_millionth: {"byte_algebra"},
    learn_first: {"order"},
    begin_later: {"order"},
    charge_less: {"distribution", "byte_algebra"},
}


@pytest.mark.parametrize("tamper", TAMPERED)
def test_wrong_books_fail_the_checks(tamper, network, refused):
    assert refused(tg.Scorer("s", network), tamper) == TAMPERED[tamper]


def test_one_charge_that_is_no_number_fails_the_checks(network, refused):
    def spoil(score):
        score.nats[40] = math.nan

    assert refused(tg.Scorer("s", network), spoil) >= {"coverage", "byte_algebra"}


def test_a_network_that_gives_no_numbers_fails_every_check_of_numbers(network, refused):
    with torch.no_grad():
        network.model.tok_emb.weight.mul_(math.nan)
    found = refused(tg.Scorer("s", network))
    assert found >= {"coverage", "byte_algebra", "future", "distribution"}


def test_learning_early_is_excused_by_its_own_label_only(network, evaluated):
    """A score that is labelled for something else is refused for it."""
    score = evaluated(tg.Scorer("s", network))
    learn_first(score)
    labelled = {v: dataclasses.replace(score, validity=v) for v in tg.LABELS}
    assert tg.check_order(labelled["valid"]).failed
    assert tg.check_order(labelled["unnormalised"]).failed
    assert not tg.check_order(labelled["adapted_first"]).failed


def test_a_large_gain_is_a_warning(network, evaluated):
    """Over the worst of the other stages; it is said, and the score stands."""
    score = evaluated(tg.Scorer("s", network))
    others = {"a": score.bpb + 0.01, "b": score.bpb + 0.04}
    check = tg.check_plausibility(score, others)
    assert check.verdict == "WARN: gains 0.0400 bpb over another stage"
    assert not check.failed
    assert tg.check_plausibility(score, {"a": score.bpb + 0.01}).verdict == "PASS"
    low = dataclasses.replace(score, bpb=0.8)
    assert "0.9" in tg.check_plausibility(low, {}).verdict


# --- bytes ----------------------------------------------------------------------------------------

TEXT = [1, *TABLE.encode("naïve “quotes” and more. ")]
STREAMS = {
    "one document": TEXT,
    "none that begins": TEXT[3:],
    "cut through a character": TEXT[: len(TEXT) - 15],
    "a document and a piece": TEXT + TEXT[:9],
    "one letter twice": TEXT[1:2] * 2,
}


@pytest.mark.parametrize("name", STREAMS)
def test_bytes_are_compared_wherever_there_is_text(name):
    """Never nothing, never wrongly."""
    tokens = np.array(STREAMS[name])
    assert not tg.check_bytes(tokens, TABLE, 1).failed
    nothing = np.zeros_like(TABLE.sizes)
    wrong = tg.ByteTable(nothing, TABLE.marked, TABLE.boundary, "wrong", TABLE.processor)
    assert "decoded" in tg.check_bytes(tokens, wrong, 1).problem


@pytest.mark.parametrize("tokens", [[], [1], [5]])
def test_a_check_that_compared_nothing_does_not_pass(tokens):
    found = tg.check_bytes(np.array(tokens, int), TABLE, 1)
    assert found.problem == "no text to compare"


def test_byte_sum_is_the_text():
    text = "naïve “quotes” and more. " * 20
    tokens = np.array([1, *TABLE.encode(text)])
    assert TABLE.count(tokens).sum() == len(text.encode())


# --- how far a reader has to follow ---------------------------------------------------------------


def functions_of_a_score(stage, cfg, tokens, rt, run_log):
    """The script's functions that a score enters, when rotary tables are made."""
    scorer = tg.STAGES[stage].build(randomized(cfg), rt, cfg, TABLE)
    tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log)
    return functions_entered(lambda: tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log))


def test_a_plain_score_is_short_to_follow(tokens, rt, run_log):
    """25 functions at most, the forward pass included."""
    entered = functions_of_a_score("plain", config(TINY), tokens, rt, run_log)
    assert "Windows.batch" in entered
    assert len(entered) <= 25, sorted(entered)


def test_a_score_of_everything_is_short_to_follow(tokens, rt, run_log):
    """55 functions at most with streaming, adaptation and mixture."""
    learns = dict(ttt_epochs=1, ttt_chunk_tokens=64, ttt_batch_seqs=1)
    cfg = config(TINY, eval_stream=16, ngram="mix", mix_chunk_tokens=64, **learns)
    entered = functions_of_a_score("mixed", cfg, tokens, rt, run_log)
    assert "TestTimeTraining.learn" in entered
    assert len(entered) <= 55, sorted(entered)
