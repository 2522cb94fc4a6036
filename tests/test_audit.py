"""MODE=audit: each illegal scorer of the contest's history is caught by the checks named here.

The legal ones pass.
"""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import FULL
from test_predictors import mild
from test_runs import run
from test_scoring import failed

import train_gpt as tg

VOCAB = 32
TABLE = tg.ByteTable(np.ones(VOCAB, np.int16), np.zeros(VOCAB, bool), np.arange(VOCAB) < 2, "toy")
CFG = tg.Config(
    **dict(
        FULL,
        vocab_size=VOCAB,
        bos_id=1,
        ttt_batch_seqs=1,
        ttt_lr=0.01,
        ttt_lora_chunk=8,
        ttt_lora_alpha=8.0,
        ngram_buckets=256,
        ngram_min_count=1,
    )
)


@pytest.fixture
def tokens(rng):
    tokens = rng.integers(2, VOCAB, 400).astype(np.uint16)
    tokens[150:300] = tokens[20:170]
    tokens[[0, 90, 210]] = 1
    return tokens


def caught_by(build, tokens, rt, run_log, cfg=CFG):
    """The checks that fail."""
    model = mild(cfg)
    predictor = build(model, rt, cfg, TABLE)
    score = tg.evaluate(predictor, tokens, TABLE, cfg, rt, run_log)
    always = tg.audit(score, predictor, tokens, TABLE, cfg, rt, {}, ())
    del always["bytes"]  # the toy vocabulary has no text
    scores = tg.Rescorer(build, mild(cfg), rt, cfg, TABLE, run_log)
    return failed(always) | failed(
        tg.audit_again(scores, tokens, cfg, build(mild(cfg), rt, cfg, TABLE))
    )


def sliding(model, rt, cfg, table=None):
    return tg.Sliding(model, rt, "toy", cfg.score_len, cfg.stride)


LEGAL = {
    "fixed model": dict(),
    "streaming": dict(eval_stream=16, stream_docs=True),
    "score-first ttt": dict(ttt_epochs=1),
    "adapters": dict(ttt_lora_rank=2, ttt_lora_keep=False),
    "tilt with Z": dict(eval_stream=16, tilt=True),
    "everything": dict(eval_stream=16, ttt_epochs=1, tilt=True, ngram="mix"),
}


@pytest.mark.parametrize("name", LEGAL)
def test_legal_scorers_pass(name, tokens, rt, run_log):
    cfg = dataclasses.replace(CFG, ttt_chunk_tokens=32, mix_chunk_tokens=32, **LEGAL[name])
    rows = [build for wanted, build in tg.PREDICTORS.values() if wanted(cfg)]
    assert caught_by(rows[-1], tokens, rt, run_log, cfg) == set()


class NormalisedCache(tg.Nested):
    """Legal: committed counts of (hashed context, token), over their sum over the vocabulary."""

    name, chunk = "toy", 32

    def __init__(self, base, cfg):
        super().__init__(base, cfg)
        self.table, self.context = torch.ones(16, VOCAB, dtype=torch.float64), {}

    def outputs(self, batch):
        rows = batch.ids[:, -batch.targets.size(1) :] % 16
        probabilities = self.table[rows] / self.table[rows].sum(-1, keepdim=True)
        return probabilities.log().float(), batch.targets

    def last(self, prefix):
        rows = torch.tensor([int(prefix[-1])]) % 16
        return (self.table[rows] / self.table[rows].sum(-1, keepdim=True)).log().float(), rows

    def observe(self, tokens, progress):
        for a, b in itertools.pairwise(tokens.tolist()):
            self.table[a % 16, b] += 1

    def snapshot(self):
        return self.table.clone()

    def restore(self, state):
        self.table.copy_(state)


def test_a_cache_divided_by_its_sum_passes(tokens, rt, run_log):
    assert caught_by(lambda *a: NormalisedCache(sliding(*a), CFG), tokens, rt, run_log) == set()


class AdaptFirst(tg.Adapting):
    """Several epochs over all tokens, then their score (#489), without saying so."""

    twin = None

    def counts(self, tokens, plan, cfg):
        for _ in self.adapt(tokens, 0.05):
            pass

    def observe(self, tokens, progress):
        pass


class AdaptThenScore(tg.Adapting):
    """Learns each batch before it charges it (#568)."""

    def score(self, batch, counts=None):
        state = self.snapshot()
        logits = self.model.logits(batch.ids)[:, -batch.targets.size(1) :]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).backward()
        self.optimizer.param_groups[0]["lr"] = 0.01
        self.optimizer.step()
        nats = super().score(batch, counts)
        self.restore(state)
        self.grads.zero_()
        return nats


class LowerOfTwo(tg.Sliding):
    """The better of two models for every target (#659)."""

    def score(self, batch, counts=None):
        return torch.minimum(
            super().score(batch), torch.full_like(super().score(batch), math.log(VOCAB) - 0.2)
        )


class WholeStream:
    """Counts of all tokens, later ones too."""

    def __init__(self, tokens, plan, cfg):
        self.p = np.bincount(tokens, minlength=VOCAB) + 0.5
        self.p /= self.p.sum()


class TwoPass(tg.Nested):
    """Mixes in what a first pass counted over everything (#846)."""

    name, counts, twin = "toy", WholeStream, None

    def prob(self, out, index, ids, counts):
        return 0.5 * self.base.prob(out, index, ids, counts) + 0.5 * torch.from_numpy(counts.p)[ids]


class ClassGate(tg.Nested):
    """Boosts the hint only where the target's class says so (#2018)."""

    name = "toy"

    def prob(self, out, index, ids, counts):
        p, h = self.base.prob(out, index, ids, counts), out[0].argmax(-1, keepdim=True)
        p_h = self.base.prob(out, index, h, counts)
        boosted = p * torch.where(ids == h, math.e, 1.0) / (1 + p_h * (math.e - 1))
        return torch.where(ids % 2 == h % 2, boosted, p)


class Slot(tg.Sliding):
    """Fits a bias to the scored slice, then charges it (#1240)."""

    @torch.enable_grad()
    def score(self, batch, counts=None):
        with torch.no_grad():
            logits = self.outputs(batch)[0]
        bias = torch.zeros(VOCAB, requires_grad=True)
        nats = torch.nn.functional.cross_entropy(
            (logits + bias).flatten(0, 1), batch.targets.flatten()
        )
        bias = bias - 3.0 * torch.autograd.grad(nats, bias)[0]
        return torch.nn.functional.cross_entropy(
            (logits + bias).mT, batch.targets, reduction="none"
        ).detach()


class Ahead(tg.Sliding):
    """Sharpens by the token after the target: a true distribution every time, but of the future."""

    def outputs(self, batch):
        logits, hidden = super().outputs(batch)
        later = torch.roll(batch.targets, -1, 1).unsqueeze(-1)
        return logits * (1 + 0.5 * (later % 2)), hidden


class Spread(tg.Sliding):
    """Charges a token spelled in two symbols half (#1835)."""

    def score(self, batch, counts=None):
        return super().score(batch) * torch.where(batch.targets % 2 == 0, 0.5, 1.0)


class TailDropped(tg.Sliding):
    def plan(self, tokens):
        return tg.Windows(len(tokens) - 1 - 9, self.seq_len, self.stride)


class HardestDropped(tg.Sliding):
    """Charges nothing for the dearest of each batch."""

    def score(self, batch, counts=None):
        nats = super().score(batch)
        return torch.where(nats >= nats.max(), 0.0, nats)


def unlabelled(predictor):
    """A hashed cache that claims to be a score."""
    predictor.validity = ""
    return predictor


def toy(kind):
    return lambda model, rt, cfg, table: kind(model, rt, "toy", cfg.score_len, cfg.stride)


CONTROLS = {
    "ttt before scoring (#489)": (
        lambda *a: AdaptFirst(sliding(*a), a[2], TABLE),
        {"future_again", "every_token"},
        dict(ttt_epochs=3),
    ),
    "adapt, then score (#568)": (
        lambda *a: AdaptThenScore(sliding(*a), a[2], TABLE),
        {"future", "future_again", "every_token"},
        dict(ttt_epochs=1),
    ),
    "cache with the target in its key (#779)": (
        lambda *a: unlabelled(tg.HashedNgramCache(sliding(*a), a[2])),
        {"distribution", "every_token", "random_stream"},
        dict(ngram="backoff"),
    ),
    "lower of two (#659)": (toy(LowerOfTwo), {"distribution", "every_token", "random_stream"}, {}),
    "two passes (#846)": (lambda *a: TwoPass(sliding(*a), a[2]), {"future_again"}, {}),
    "hint gated by the target's class (#2018)": (
        lambda *a: ClassGate(sliding(*a), a[2]),
        {"distribution", "every_token"},
        {},
    ),
    "SLOT on the scored slice (#1240)": (toy(Slot), {"future", "future_again", "every_token"}, {}),
    "one token ahead": (toy(Ahead), {"future", "future_again"}, {}),
    "spread over symbols (#1835)": (toy(Spread), {"distribution", "every_token"}, {}),
    "tail dropped (#50)": (toy(TailDropped), {"coverage"}, {}),
    "hardest dropped": (toy(HardestDropped), {"distribution"}, {}),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_illegal_scorers_are_caught(name, tokens, rt, run_log):
    build, checks, settings = CONTROLS[name]
    cfg = dataclasses.replace(CFG, ttt_chunk_tokens=32, mix_chunk_tokens=32, **settings)
    assert checks <= caught_by(build, tokens, rt, run_log, cfg)


# --- whole runs -----------------------------------------------------------------------------------

AGAIN = {
    "future_again",
    "every_token",
    "random_stream",
    "batches",
    "processes",
    "isolation",
    "repeat",
    "neutral",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("audited")
    assert run(out / "run", EVAL_STRIDE="0")[0] == 0
    return out


def audited(out, **env):
    data = out / "run" / "smoke_data"
    settings = dict(
        SMOKE="0",
        MODE="audit",
        ARTIFACT=str(out / "run" / "model.ptz"),
        DATA_PATH=str(data),
        EVAL_STRIDE="0",
        TRAIN_SEQ_LEN="64",
        VOCAB_SIZE="260",
        TOKENIZER_PATH="byte260",
    )
    return run(out / "again", **{**settings, **env})


def test_mode_audit_passes_true_scores_and_expects_what_is_labelled(trained):
    code, result, log = audited(
        trained,
        EVAL_STREAM="16",
        TILT="1",
        NGRAM="backoff",
        NGRAM_BUCKETS="64",
        TTT_CHUNK_TOKENS="64",
        MIX_CHUNK_TOKENS="64",
    )
    assert code == 0 and set(result["stages"]) == {"plain", "streaming", "mixed", "ngram"}
    for name, stage in result["stages"].items():
        assert AGAIN <= stage["audit"].keys()
        verdicts = {
            check: found["verdict"].split(":")[0] for check, found in stage["audit"].items()
        }
        expected = {check for check, verdict in verdicts.items() if verdict == "EXPECTED"}
        assert not any(verdict == "FAIL" for verdict in verdicts.values())
        assert expected >= {"distribution", "every_token"} if name == "ngram" else not expected
    assert "audit ngram every_token EXPECTED: charges of all tokens add up to" in log


def test_a_failed_audit_is_exit_code_6(trained, monkeypatch):
    wanted, build = tg.PREDICTORS["plain"]
    monkeypatch.setitem(
        tg.PREDICTORS, "plain", (wanted, lambda m, rt, cfg, table: Ahead(m, rt, "plain", 64, 64))
    )
    code, result, log = audited(trained, MODE="eval")
    assert (
        code == 6
        and result["exit_code"] == 6
        and "audit plain future FAIL: later tokens move charges" in log
    )
