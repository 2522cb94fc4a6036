"""The deep audit: each illegal scorer is caught by the checks named here; the legal ones pass."""

import copy
import dataclasses
import math
import re

import audit
import numpy as np
import pytest
import torch
from conftest import FULL
from helpers import EVERYWHERE, FIXED, GLOBAL, failed, mild, run
from tool import progress

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
    scorer = build(mild(cfg), rt, cfg, TABLE)
    score = tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log)
    always = tg.check_score(score, scorer, tokens, TABLE, cfg, rt, {})
    always = [check for check in always if check.name != "bytes"]  # the toy has no text
    return failed(always) | failed(audit.audit_stage(build, mild(cfg), rt, cfg, TABLE, tokens))


def network(model, rt, cfg, kind=tg.WindowNetwork):
    return kind(model, rt, cfg, cfg.score_len, cfg.stride)


LEGAL = {
    "fixed model": dict(),
    "streaming": dict(eval_stream=16, stream_docs=True),
    "score-first ttt": dict(ttt_epochs=1),
    "adapters": dict(ttt_lora_rank=2),
    "adapters that are kept": dict(ttt_lora_rank=2, ttt_lora_keep=True),
    "adapters, global step, fixed tilt": dict(EVERYWHERE, **GLOBAL, **FIXED),
    "chunks longer than the audit's windows": dict(
        ttt_lora_rank=2, ttt_lora_early_chunks="100:400", eval_seq_len=256
    ),
    "tilt with Z": dict(eval_stream=16, tilt=True),
    "everything": dict(eval_stream=16, ttt_epochs=1, tilt=True, ngram="mix"),
}


@pytest.mark.parametrize("name", LEGAL)
def test_legal_scorers_pass(name, tokens, rt, run_log):
    cfg = dataclasses.replace(CFG, ttt_chunk_tokens=32, mix_chunk_tokens=32, **LEGAL[name])
    assert caught_by(tg.stages_of(cfg)[-1].build, tokens, rt, run_log, cfg) == set()


class NormalisedCache(tg.WindowNetwork):
    """Legal: counts of (hashed context, token) among committed tokens, divided by their sum."""

    learns = True
    chunk_targets = 32

    def __init__(self, base):
        self.base = base
        self.pending = []
        self.table = torch.ones(16, VOCAB, dtype=torch.float64)

    def plan(self, tokens, chunk_targets):
        return self.base.plan(tokens, chunk_targets)

    def predict(self, batch):
        rows = self.table[batch.ids[:, -batch.index.shape[1] :] % 16]
        log_p = (rows / rows.sum(-1, keepdim=True)).log().float()
        return tg.Softmax(log_p, log_p)

    def collect(self, batch, targets):
        contexts = torch.from_numpy(batch.ids[:, -batch.index.shape[1] :])
        real = torch.from_numpy(batch.real)
        self.pending += zip(contexts[real].tolist(), targets[real].tolist())

    def commit(self, chunk):
        for context, token in self.pending:
            self.table[context % 16, token] += 1
        self.pending = []

    def state_dict(self):
        return {"table": self.table.clone()}

    def load_state_dict(self, state):
        self.table.copy_(state["table"])
        self.pending = []


def test_a_cache_divided_by_its_sum_passes(tokens, rt, run_log):
    def build(model, rt, cfg, table):
        return tg.Scorer("toy", NormalisedCache(network(model, rt, cfg)))

    assert caught_by(build, tokens, rt, run_log) == set()


class AdaptFirst(tg.Mixer):
    """Several epochs over all tokens, then their score (#489), without saying so."""

    def __init__(self, training):
        self.training = self.counts = training

    def over(self, base, batch, network):
        return base


class Epochs(tg.TestTimeTraining):
    def prepare(self, tokens, plan, whole=True, progress=None):
        self.learn(tokens, 0.0)


class AdaptThenScore(tg.WindowNetwork):
    """Learns each batch before it is charged (#568), from the inputs that are its targets too."""

    def predict(self, batch):
        state = {name: w.clone() for name, w in self.model.state_dict().items()}
        with torch.inference_mode(False), torch.enable_grad():
            ids = torch.from_numpy(batch.ids)
            params = list(self.model.requires_grad_(True).parameters())
            logits = self.model.logits(ids[:, :-1].clone()).flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].clone().flatten())
            for p, g in zip(params, torch.autograd.grad(loss, params, allow_unused=True)):
                p.data.sub_(0.2 * g if g is not None else 0.0)
        seen = super().predict(batch)
        with torch.inference_mode(False):
            self.model.load_state_dict(state)
        return seen


@dataclasses.dataclass
class Changed(tg.Distribution):
    """Some function of what the base says."""

    base: tg.Distribution
    change: object  # (base, ids [B, S, C]) -> p

    def prob(self, ids):
        return self.change(self.base, ids)


class Changing(tg.Mixer):
    """A mixer made of one function of base and tokens."""

    def __init__(self, change):
        self.change = change

    def over(self, base, batch, network):
        return Changed(base, self.change)


def lower_of_two(base, ids):
    """The better of two models for every target (#659)."""
    return base.prob(ids).clamp(min=1.2 / VOCAB)


def class_gate(base, ids):
    """Boosts the hint only where the target's class says so (#2018)."""
    hint = base.log_p.argmax(-1, keepdim=True)
    p = base.prob(ids)
    p_hint = base.prob(hint)
    boosted = p * torch.where(ids == hint, math.e, 1.0) / (1 + p_hint * (math.e - 1))
    return torch.where(ids % 2 == hint % 2, boosted, p)


def spread(base, ids):
    """Charges a token spelled in two symbols half (#1835)."""
    p = base.prob(ids)
    return torch.where(ids % 2 == 0, p.sqrt(), p)


def signed(base, ids):
    """A measure that sums to one: what never occurs pays for what does."""
    p = base.prob(ids)
    never = base.prob(torch.zeros_like(ids[..., :1]))
    return torch.where(ids == 0, -0.5, 1.5 * p / (1 - never))


def hardest_dropped(base, ids):
    """Charges nothing for the dearest of what is asked."""
    p = base.prob(ids)
    return torch.where(p <= p.amin((0, 1), keepdim=True), 1.0, p)


class TwoPass(tg.Mixer):
    """Mixes in what a first pass counted over everything (#846)."""

    def __init__(self):
        self.counts = self

    def prepare(self, tokens, plan, whole=True, progress=None):
        counts = np.bincount(tokens, minlength=VOCAB) + 0.5
        self.p = torch.from_numpy(counts / counts.sum())

    def half(self, base, ids):
        return 0.5 * base.prob(ids) + 0.5 * self.p[ids]

    def over(self, base, batch, network):
        return Changed(base, self.half)


class Slot(tg.WindowNetwork):
    """Fits a bias to the scored slice, then charges it (#1240): the inputs hold its targets."""

    def predict(self, batch):
        seen = super().predict(batch)
        scored = batch.index.shape[1]
        if scored == 1:
            return seen
        targets = torch.from_numpy(batch.ids[:, -scored:])[:, 1:].flatten()
        share = torch.bincount(targets, minlength=VOCAB) / len(targets)
        return tg.Softmax(torch.log_softmax(seen.log_p + 3.0 * share, -1), seen.hidden)


class Ahead(tg.WindowNetwork):
    """Sharpens by the token after the target: a true distribution, but of the future."""

    def predict(self, batch):
        seen = super().predict(batch)
        later = np.roll(batch.ids[:, -batch.index.shape[1] :], -2, 1)
        sharper = torch.from_numpy(1 + 0.5 * (later % 2)).float().unsqueeze(-1)
        return tg.Softmax(torch.log_softmax(seen.log_p * sharper, -1), seen.hidden)


class Blind(tg.WindowNetwork):
    """Believes the same of every text: its figure comes from elsewhere."""

    def predict(self, batch):
        seen = super().predict(batch)
        return tg.Softmax(torch.log_softmax(0 * seen.log_p, -1), seen.hidden)


class CountsRows(tg.WindowNetwork):
    """Sharper in larger batches."""

    def predict(self, batch):
        seen = super().predict(batch)
        log_p = torch.log_softmax(seen.log_p * (1 + 0.1 * len(batch.ids)), -1)
        return tg.Softmax(log_p, seen.hidden)


class Claiming(tg.WindowNetwork):
    """Says that documents stand alone, and reads on across their starts."""

    isolates_documents = True


class Moody(tg.WindowNetwork):
    """Sharper by chance."""

    def predict(self, batch):
        seen = super().predict(batch)
        log_p = torch.log_softmax(seen.log_p * (1 + 0.1 * torch.rand(1)), -1)
        return tg.Softmax(log_p, seen.hidden)


class Wearing(tg.WindowNetwork):
    """Every batch leaves the weights a little smaller; the charges hardly show it."""

    def predict(self, batch):
        self.model.blocks[-1].mlp.proj.weight.data.mul_(1 - 1e-7)
        return super().predict(batch)


class LateCheat(tg.WindowNetwork):
    """Its probabilities add up to too much after the first chunk only."""

    def predict(self, batch):
        seen = super().predict(batch)
        late = torch.from_numpy(batch.index >= self.seq_len).unsqueeze(-1)
        return tg.Softmax(seen.log_p + 0.2 * late, seen.hidden)


class TailDropped(tg.WindowNetwork):
    def plan(self, tokens, chunk_targets):
        return super().plan(tokens[:-9], chunk_targets)


class Unlabelled(tg.HashedNgramCache):
    """A hashed cache that claims to be a score."""

    validity = "valid"


# What builds a scorer is build(model, rt, cfg, table), as in the script's STAGES.


def toy(kind):
    """Builds a scorer of one network."""

    def build(model, rt, cfg, table):
        return tg.Scorer("toy", network(model, rt, cfg, kind))

    return build


def mixed(make):
    """Builds a scorer of windows and one mixer, make(model, rt, cfg)."""

    def build(model, rt, cfg, table):
        return tg.Scorer("toy", network(model, rt, cfg), [make(model, rt, cfg)])

    return build


def changing(change):
    return mixed(lambda model, rt, cfg: Changing(change))


def adapt_first(model, rt, cfg, table):
    base = network(model, rt, cfg)
    return tg.Scorer("toy", base, [AdaptFirst(Epochs(base, cfg, TABLE))])


def unlabelled(model, rt, cfg):
    return Unlabelled(rt, cfg, model)


def two_passes(model, rt, cfg):
    return TwoPass()


CONTROLS = {
    "ttt before scoring (#489)": (
        adapt_first,
        {"future_again", "every_token"},
        dict(ttt_epochs=3, ttt_lr=0.05),
    ),
    "adapt, then score (#568)": (
        toy(AdaptThenScore),
        {"future", "future_again"},
        {},
    ),
    "cache with the target in its key (#779)": (
        mixed(unlabelled),
        {"distribution", "every_token", "random_stream"},
        dict(ngram="backoff"),
    ),
    "lower of two (#659)": (
        changing(lower_of_two),
        {"distribution", "every_token", "random_stream"},
        {},
    ),
    "two passes (#846)": (mixed(two_passes), {"future_again"}, {}),
    "hint gated by the target's class (#2018)": (
        changing(class_gate),
        {"distribution", "every_token"},
        {},
    ),
    "SLOT on the scored slice (#1240)": (toy(Slot), {"future", "future_again"}, {}),
    "one token ahead": (toy(Ahead), {"future", "future_again"}, {}),
    "spread over symbols (#1835)": (changing(spread), {"distribution", "every_token"}, {}),
    "tail dropped (#50)": (toy(TailDropped), {"coverage"}, {}),
    "blind to the text": (toy(Blind), {"other_text"}, {}),
    "hardest dropped": (changing(hardest_dropped), {"distribution"}, {}),
    "a signed measure": (
        changing(signed),
        {"distribution", "every_token", "random_stream"},
        {},
    ),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_illegal_scorers_are_caught(name, tokens, rt, run_log):
    build, checks, settings = CONTROLS[name]
    cfg = dataclasses.replace(CFG, ttt_chunk_tokens=32, mix_chunk_tokens=32, **settings)
    assert checks <= caught_by(build, tokens, rt, run_log, cfg)


def test_a_hashed_cache_counts_within_the_audits_short_streams(tokens, rt):
    """Also if its own chunks are longer than these: else only the network would be checked."""
    cfg = dataclasses.replace(CFG, ngram="backoff", ngram_chunk_tokens=32768)

    def charges(build):
        scores = audit.Rescorer(build, mild(cfg), rt, cfg, TABLE)
        return scores(np.resize(tokens, 6 * scores.size + 1))

    assert np.abs(charges(tg.STAGES["ngram"].build) - charges(toy(tg.WindowNetwork))).max() > 0.1


FAULTS = {
    "batches": CountsRows,
    "isolation": Claiming,
    "repeat": Moody,
    "neutral": Wearing,
    "every_token": LateCheat,
    "processes": tg.WindowNetwork,
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_check_finds_its_fault(name, tokens, rt):
    """The last one in a run of two processes of which one is missing."""
    if name == "processes":
        rt = copy.copy(rt)
        rt.world = 2
        rt.sum_ = lambda tensor: tensor
    scores = audit.Rescorer(toy(FAULTS[name]), mild(CFG), rt, CFG, TABLE)
    check = getattr(audit.Audit(scores, tokens, "valid", isolates=True), name)
    assert check().failed


@pytest.mark.parametrize(
    "name, why",
    [("isolation", "not claimed"), ("processes", "one process: compared under torchrun")],
)
def test_what_is_not_compared_is_not_passed(name, why, tokens, rt):
    scores = audit.Rescorer(toy(tg.WindowNetwork), mild(CFG), rt, CFG, TABLE)
    check = getattr(audit.Audit(scores, tokens, "valid", isolates=False), name)()
    assert check.verdict == f"SKIPPED: {why}"
    assert not check.failed


# --- the command ----------------------------------------------------------------------------------

DEEP = {
    "future_again",
    "every_token",
    "random_stream",
    "batches",
    "processes",
    "isolation",
    "other_text",
    "repeat",
    "neutral",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("audited")
    assert run(out / "run", EVAL_STRIDE="0")[0] == 0
    return out


def settings_of(out, **env):
    settings = dict(
        DATA_PATH=str(out / "run" / "smoke_data"),
        EVAL_STRIDE="0",
        TRAIN_SEQ_LEN="64",
        VOCAB_SIZE="260",
        TOKENIZER_PATH="byte260",
        DEVICE="cpu",
        **env,
    )
    return [f"{name}={value}" for name, value in settings.items()]


def test_true_scores_pass_and_labelled_ones_fail_as_expected(trained, capsys):
    stages = dict(EVAL_STREAM="16", TILT="1", NGRAM="backoff", NGRAM_BUCKETS="64")
    chunks = dict(TTT_CHUNK_TOKENS="64", MIX_CHUNK_TOKENS="64", VAL_TOKENS="400")
    artifact = str(trained / "run" / "model.ptz")
    assert audit.main([artifact, *settings_of(trained, **stages, **chunks)], {}) == 0
    told = capsys.readouterr().out
    sections = dict(zip(("plain", "streaming", "mixed", "ngram"), told.split("bpb")))
    for name in DEEP:
        assert told.count(f"  {name} ") == 4, name
    assert "  fresh_process  PASS  bpb=0.0" in told
    assert "FAIL" not in told
    assert "EXPECTED" not in sections["mixed"].split("ngram:")[0]
    assert "every_token    EXPECTED: charges of all tokens add up to" in told


def test_a_failed_check_is_exit_code_6(trained, monkeypatch, capsys):
    cheat = tg.Stage("plain", tg.STAGES["plain"].enabled, toy(Ahead))
    monkeypatch.setitem(tg.STAGES, "plain", cheat)
    folder = str(trained / "run")
    assert audit.main([folder, *settings_of(trained, VAL_TOKENS="400")], {}) == 6
    told = capsys.readouterr().out
    assert "future         FAIL: later tokens move charges" in told
    assert "fresh_process  FAIL: other scores in a process of its own" in told


def test_a_score_that_fails_its_checks_is_exit_code_6(trained, monkeypatch):
    cheat = tg.Stage("plain", tg.STAGES["plain"].enabled, toy(Ahead))
    monkeypatch.setitem(tg.STAGES, "plain", cheat)
    env = dict(pair.split("=", 1) for pair in settings_of(trained))
    env |= dict(SMOKE="0", MODE="eval", ARTIFACT=str(trained / "run" / "model.ptz"))
    code, result, log = run(trained / "again", **env)
    assert code == result["exit_code"] == 6
    assert "audit toy future FAIL: later tokens move charges" in log


def test_one_failed_stage_is_exit_code_6(trained, monkeypatch):
    """Also if a later stage passes and a fresh process agrees."""
    plain = tg.STAGES["plain"]
    stages = {
        "plain": dataclasses.replace(plain, enabled=lambda cfg: True, build=toy(Ahead)),
        "sliding": dataclasses.replace(plain, enabled=lambda cfg: True),
    }
    fresh = tg.Check("fresh_process")
    monkeypatch.setattr(tg, "STAGES", stages)
    monkeypatch.setattr(audit, "audit_stage", lambda *arguments: [])
    monkeypatch.setattr(audit, "check_fresh_process", lambda *arguments: fresh)
    folder = str(trained / "run")
    assert audit.main([folder, *settings_of(trained, VAL_TOKENS="700")], {}) == 6


def test_a_stage_that_was_not_scored_is_not_sound(trained, monkeypatch, capsys):
    monkeypatch.setattr(audit, "check_fresh_process", lambda *arguments: tg.Check("fresh_process"))
    monkeypatch.setattr(tg, "evaluate", lambda *arguments: None)
    settings = settings_of(trained, VAL_TOKENS="700", MAX_EVAL_SECONDS="5")
    assert audit.main([str(trained / "run"), *settings], {}) == 6
    assert "not audited: it takes more than MAX_EVAL_SECONDS=5.0" in capsys.readouterr().out


def test_an_audit_says_how_far_it_is(trained, monkeypatch, capsys):
    """On stderr: the score every ten seconds, and the deep checks."""
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.0)
    monkeypatch.setattr(audit, "check_fresh_process", lambda *arguments: tg.Check("fresh_process"))
    late = iter(range(0, 10**9, 20))
    monkeypatch.setattr(tg.time, "perf_counter", lambda: float(next(late)))
    folder = str(trained / "run")
    settings = settings_of(trained, VAL_TOKENS="700", MAX_EVAL_SECONDS="0")
    assert audit.main([folder, *settings], {}) == 0
    told = capsys.readouterr()
    assert re.search(r"^plain: running_loss:\S+ 100% eta:0s$", told.err, re.M)
    assert re.search(r"deep checks: 5\d\d of 535 scorings, about \d+ s left", told.err)
    assert "eta:" not in told.out


@pytest.mark.parametrize(
    "arguments, words",
    [([], ""), (["/no/such.ptz"], "/no/such.ptz"), (["{folder}", "TILT"], "expected NAME=value")],
)
def test_unusable_input_is_exit_code_64(arguments, words, trained, capsys):
    arguments = [argument.format(folder=trained / "run") for argument in arguments]
    assert audit.main(arguments, {}) == 64
    assert words in capsys.readouterr().err


def test_the_settings_beside_an_artifact_belong_to_it(tmp_path):
    """And where there are several artifacts, one must be named."""
    for seed in (1, 2):
        (tmp_path / f"model_seed{seed}.ptz").write_bytes(b"")
    with pytest.raises(tg.InputError, match="2 artifacts; name one, as .*model_seed1.ptz"):
        audit.artifact_of(tmp_path)
    artifact = tmp_path / "model_seed2.ptz"
    assert audit.artifact_of(artifact) == (artifact, {})
    config = tmp_path / "config.env"
    config.write_text("EVAL_STRIDE=64\n")
    assert audit.artifact_of(artifact) == (artifact, {"CONFIG": str(config)})
