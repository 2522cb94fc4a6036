"""Windows, the harness, and the audit with predictors that cheat."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from conftest import FULL, TINY, randomized

import train_gpt as tg

TABLE = tg.ByteTable.bytes260()


@pytest.mark.parametrize(
    "stride, batch, chunk", [*itertools.product([1, 3, 8, 20], [1, 4], [0, 25])]
)
def test_every_target_is_scored_once(stride, batch, chunk):
    for n in (1, 2, 19, 20, 21, 23, 40, 41, 97):
        windows = tg.Windows(n, 20, stride)
        seen = []
        for units in windows.units(batch, chunk):
            for k in itertools.chain.from_iterable(units):
                lo, hi = windows.scored(k)
                assert lo < hi and k * stride <= lo and hi - k * stride <= 20
                assert all(windows.of(j) == k for j in range(lo, hi))
                seen += range(lo, hi)
        assert seen == list(range(n))


def test_context_is_as_long_as_the_stride_allows():
    windows = tg.Windows(100, 20, 5)
    assert all(15 <= windows.scored(k)[0] - 5 * k < 20 for k in range(1, windows.count))


def slow_nats(model, tokens, seq_len, stride):
    """Each target alone, from the definition.

    A window begins at a multiple of the stride and holds the target.
    """
    nats = []
    for j in range(len(tokens) - 1):
        start = 0
        while start + seq_len <= j:
            start += stride
        ids = torch.from_numpy(tokens[start : j + 1].astype(np.int64))[None]
        nats.append(
            -torch.log_softmax(model.logits(ids)[0, -1].double(), -1)[int(tokens[j + 1])].item()
        )
    return np.array(nats)


@pytest.fixture
def tokens(rng):
    tokens = rng.integers(4, 260, 150).astype(np.uint16)
    tokens[[0, 40, 90]] = 1
    return tokens


@pytest.mark.parametrize("n, stride", [(150, 32), (150, 8), (147, 5), (20, 8), (2, 1), (33, 16)])
def test_score_equals_one_target_at_a_time(n, stride, tokens, rt, run_log):
    cfg = tg.Config(**dict(FULL, eval_batch_tokens=96))
    model = randomized(cfg)
    predictor = tg.Sliding(model, rt, "sliding", 32, stride)
    with torch.no_grad():
        expected = slow_nats(model, tokens[:n], 32, stride)
    score = tg.evaluate(predictor, tokens[:n], TABLE, cfg, rt, run_log)
    np.testing.assert_allclose(score.nats, expected, atol=1e-4)
    assert np.isclose(score.loss, expected.mean(), atol=1e-5)
    assert np.isclose(
        score.bpb, expected.sum() / np.log(2) / TABLE.count(tokens[:n]).sum(), rtol=1e-5
    )
    for j in {0, (n - 2) // 2, n - 2}:
        following = predictor.next(tokens[: j + 1])
        assert abs(following.logsumexp(0).item()) < 1e-9
        assert abs(-following[int(tokens[j + 1])].item() - expected[j]) < 1e-4


def test_batch_size_does_not_matter(tokens, rt, run_log):
    model = randomized(tg.Config(**FULL))
    losses = [
        tg.evaluate(
            tg.Sliding(model, rt, "s", 32, 8),
            tokens,
            TABLE,
            tg.Config(**dict(FULL, eval_batch_tokens=size)),
            rt,
            run_log,
        ).loss
        for size in (32, 320, 0)
    ]
    assert max(losses) - min(losses) < 1e-6


def test_byte_sum_is_the_text(rng):
    text = "naïve “quotes” and more. " * 20
    tokens = np.array([1, *TABLE.encode(text)])
    assert TABLE.count(tokens).sum() == len(text.encode())


class Unigram(tg.Sliding):
    """A legal adaptive predictor: counts of committed tokens, add-one smoothed."""

    chunk, seq_len, stride, name, probe = 30, 10, 5, "unigram", (10, 5)

    def __init__(self, rt):
        self.rt, self.cfg = rt, None
        self.seen, self.observed = torch.ones(260, dtype=torch.float64), []

    def outputs(self, batch):
        log_p = (self.seen / self.seen.sum()).log().float()
        return log_p.expand(*batch.targets.shape, 260), batch.targets

    def observe(self, tokens, progress):
        self.observed.append(tokens)
        self.seen += torch.bincount(torch.from_numpy(tokens[1:].astype(np.int64)), minlength=260)


def run_audit(predictor, tokens, rt, run_log, cfg=None, tamper=None, accessed=()):
    cfg = cfg or tg.Config(**dict(TINY, eval_batch_tokens=50))
    score = tg.evaluate(predictor, tokens, TABLE, cfg, rt, run_log)
    if tamper:
        tamper(score)
    return tg.audit(score, predictor, tokens, TABLE, cfg, rt, {}, accessed)


def failed(checks):
    return {name for name, found in checks.items() if found["verdict"].startswith("FAIL")}


def test_harness_is_score_first(tokens, rt, run_log):
    predictor = Unigram(rt)
    cfg = tg.Config(**dict(TINY, eval_batch_tokens=50))
    score = tg.evaluate(predictor, tokens, TABLE, cfg, rt, run_log)
    assert np.array_equal(np.concatenate([part[1:] for part in predictor.observed]), tokens[1:])
    counts, expected = np.ones(260), []  # the same by hand, chunk by chunk
    events = [e for e in score.events if e[0] == "score"]
    for _, lo, hi in events:
        expected += [-np.log(counts[t] / counts.sum()) for t in tokens[lo + 1 : hi + 1]]
        np.add.at(counts, tokens[lo + 1 : hi + 1], 1)
    assert len(events) > 3
    np.testing.assert_allclose(score.nats, expected, rtol=1e-5)


def test_legal_predictors_pass_the_audit(tokens, rt, run_log):
    assert not failed(
        run_audit(tg.Sliding(randomized(tg.Config(**FULL)), rt, "s", 32, 8), tokens, rt, run_log)
    )


class Peeking(tg.Sliding):
    """Sees one token ahead."""

    def score(self, batch, counts=None):
        nats = super().score(batch)
        return nats + 0.01 * torch.roll(batch.targets, -1, 1)


class Unnormalised(tg.Sliding):
    """Charges the better of two guesses, so its probabilities add up to more than one."""

    def full(self, *args):
        return super().full(*args).clamp(min=-3.0)

    def score(self, batch, counts=None):
        return super().score(batch).clamp(max=3.0)


class Special(tg.Sliding):
    """Charges less than the entry of the distribution it shows."""

    def score(self, batch, counts=None):
        return super().score(batch) * 0.9


CHEATS = {Peeking: "future", Unnormalised: "distribution", Special: "distribution"}


@pytest.mark.parametrize("cheat, check", list(CHEATS.items()))
def test_cheats_fail_the_audit(cheat, check, tokens, rt, run_log):
    predictor = cheat(randomized(tg.Config(**FULL)), rt, "s", 32, 8)
    assert check in failed(run_audit(predictor, tokens, rt, run_log))


@pytest.mark.parametrize(
    "tamper, check",
    [
        (lambda s: s.coverage.__setitem__(3, 0), "coverage"),
        (lambda s: s.coverage.__setitem__(3, 2), "coverage"),
        (lambda s: setattr(s, "bpb", s.bpb * 0.99), "byte_algebra"),
        (lambda s: s.events.insert(0, ("observe", 0, 9)), "order"),
        (lambda s: s.events.insert(0, ("score", 5, 9)), "order"),
    ],
)
def test_wrong_books_fail_the_audit(tamper, check, tokens, rt, run_log):
    predictor = tg.Sliding(randomized(tg.Config(**FULL)), rt, "s", 32, 8)
    assert failed(run_audit(predictor, tokens, rt, run_log, tamper=tamper)) == {check}


def test_opening_training_data_fails_the_audit(tokens, rt, run_log, tmp_path):
    shard = tmp_path / "fineweb_train_000000.bin"
    tg.write_shard(shard, tokens)
    with tg.access_watch().watching("fineweb_train") as accessed:
        tg.read_shard(shard)
    tg.read_shard(shard)  # unwatched
    assert accessed == ["opened fineweb_train_000000.bin"] * 2  # header and tokens
    predictor = tg.Sliding(randomized(tg.Config(**FULL)), rt, "s", 32, 8)
    assert failed(run_audit(predictor, tokens, rt, run_log, accessed=accessed)) == {"access"}


def test_stage_that_does_not_fit_is_skipped(tokens, rt, run_log):
    cfg = tg.Config(**dict(FULL, eval_batch_tokens=32, max_eval_seconds=1e-6))
    predictor = tg.Sliding(randomized(cfg), rt, "sliding", 32, 1)
    assert tg.evaluate(predictor, tokens, TABLE, cfg, rt, run_log) is None
    assert "skipped" in (run_log.out_dir / "train.log").read_text()


def test_adaptation_that_does_not_fit_is_stopped_after_three_steps(tokens, rt, run_log):
    cfg = tg.Config(
        **dict(
            FULL,
            eval_batch_tokens=32,
            max_eval_seconds=1e-6,
            ttt_before_scoring=True,
            ttt_epochs=50,
            ttt_batch_seqs=1,
        )
    )
    model = randomized(cfg)
    predictor, steps = tg.PREDICTORS["ttt"][1](model, rt, cfg, TABLE), []
    predictor.optimizer.step = lambda: steps.append(1)
    assert tg.evaluate(predictor, tokens, TABLE, cfg, rt, run_log) is None and len(steps) == 3


def test_only_a_true_complete_score_is_called_val_bpb(tokens, rt, run_log):
    predictor = tg.Sliding(randomized(tg.Config(**FULL)), rt, "s", 32, 8)
    score = tg.evaluate(predictor, tokens, TABLE, tg.Config(**FULL), rt, run_log)
    assert score.label == "val_bpb" and "val_bpb" in score.record()
    assert "val_bpb" not in dataclasses.replace(score, complete=False).record()
    assert "val_bpb" not in dataclasses.replace(score, validity="unnormalised_score").record()
