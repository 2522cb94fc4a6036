"""Plans, the harness, and the checks with scorers that cheat."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import (
    FULL,
    TINY,
    everything,
    failed,
    functions_entered,
    on_device_with,
    randomized,
)

import train_gpt as tg

TABLE = tg.ByteTable.bytes260()


def windows(model, rt, cfg, stride=8):
    """The plain model over windows of 32."""
    return tg.Scorer("s", tg.WindowNetwork(model, rt, cfg, 32, stride))


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize(
    "stride, batch, chunk", [*itertools.product([1, 3, 8, 20], [1, 4], [0, 25])]
)
def test_every_target_is_scored_once(stride, batch, chunk, world):
    """In order of chunks, by the window that window_of names, for any number of processes."""
    for n in (1, 2, 19, 20, 21, 23, 40, 41, 97):
        plan, tokens = tg.Windows(n, 20, stride, batch, chunk), np.arange(n + 1)
        seen = []
        for parts in zip(*(plan.chunks(rank, world) for rank in range(world)), strict=True):
            assert len({len(part.work) for part in parts}) == 1  # every process makes as many calls
            targets = []
            for work in itertools.chain(*(part.work for part in parts)):
                if work is not None:
                    found = plan.batch(tokens, work)
                    targets += found.index[found.real].tolist()
                    for row, k in zip(range(len(work)), work):
                        own = found.index[row][found.real[row]]
                        assert (plan.window_of(own) == k).all() and own[-1] - k * stride < 20
            assert targets == list(range(parts[0].lo, parts[0].hi))
            seen += targets
        assert seen == list(range(n))


def test_a_batch_holds_inputs_and_no_targets():
    """Its ids end with the token before the last target, whatever the plan."""
    tokens = np.arange(100, 142)
    for plan in (tg.Windows(41, 20, 8, 3), tg.Documents(tokens, 0, 20, 8, 2)):
        for work in itertools.chain(*(chunk.work for chunk in plan.chunks())):
            batch = plan.batch(tokens, work)
            names = {field.name for field in dataclasses.fields(batch)}
            assert names == {"ids", "index", "real", "left_context", "slots"}
            inputs = batch.ids[:, -batch.index.shape[1] :]
            assert (inputs[batch.real] == tokens[batch.index[batch.real]]).all()
            assert batch.ids.max() < 141  # the stream's last token is only a target


def test_context_is_as_long_as_the_stride_allows():
    plan, tokens = tg.Windows(100, 20, 5), np.arange(101)
    for chunk in plan.chunks():
        for work in chunk.work[1:]:
            batch = plan.batch(tokens, work)
            context = batch.index[:, 0] - batch.ids[:, 0]  # inputs before the first scored one
            assert ((context >= 15) & (context < 20)).all()


def test_the_checks_look_early_and_all_over_the_stream():
    """A batch near the start, and one with as many targets as asked from there to the end."""
    early, spread = tg.Windows(1000, 20, 8, 40).samples(np.arange(1001), 256)
    assert early.index[early.real].tolist() == list(range(20, 28))
    first = spread.index[:, 0]
    assert first[0] == 20 and spread.index[spread.real].max() == 995  # the last window is short
    assert len(first) == 256 // 8 and np.diff(first).max() <= 8 * -(-122 // 31)
    _, few = tg.Windows(1000, 20, 8, 4).samples(np.arange(1001), 256)  # a whole batch at most
    assert few.index[:, 0].tolist() == [20, 340, 660, 988]
    for targets, start in ((1000, 512), (1024, 768), (200, 0)):  # a stream in spans of 256
        _, one = tg.Windows(targets, 256, 256).samples(np.arange(targets + 1), 256)
        assert one.index[one.real][0] == start
    tokens = np.arange(100, 201)
    tokens[[0, 5, 40, 50]] = 1  # documents of 5, 35, 10 and 50 targets, three side by side
    early, late = tg.Documents(tokens, 1, 16, 8, 3).samples(tokens, 256)
    assert early.index[:, 0].tolist() == [0, 5, 40]
    assert late.index[late.real].tolist() == [*range(13, 21), 48, 49]  # the second chunks


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
    scorer = windows(model, rt, cfg, stride)
    with torch.no_grad():
        expected = slow_nats(model, tokens[:n], 32, stride)
    score = tg.evaluate(scorer, tokens[:n], TABLE, cfg, rt, run_log)
    np.testing.assert_allclose(score.nats, expected, atol=1e-4)
    assert np.isclose(score.loss, expected.mean(), atol=1e-5)
    assert np.isclose(
        score.bpb, expected.sum() / np.log(2) / TABLE.count(tokens[:n]).sum(), rtol=1e-5
    )
    plan = scorer.network.plan(tokens[:n], 0)
    for j in {0, (n - 2) // 2, n - 2}:
        p = everything(scorer, plan.position(tokens[:n], j))
        assert abs(p.sum().item() - 1) < 1e-6
        assert abs(-p[int(tokens[j + 1])].log().item() - expected[j]) < 1e-4


def test_batch_size_does_not_matter(tokens, rt, run_log):
    model, losses = randomized(tg.Config(**FULL)), []
    for size in (32, 320, 0):
        cfg = tg.Config(**dict(FULL, eval_batch_tokens=size))
        losses.append(tg.evaluate(windows(model, rt, cfg), tokens, TABLE, cfg, rt, run_log).loss)
    assert max(losses) - min(losses) < 1e-6


@pytest.mark.parametrize("stride", [4, 32])
def test_fixed_rows(stride, tokens, rt, run_log):
    """On a GPU all inputs have one shape, and the checks ask with it: rounding has no say."""
    cfg = tg.Config(**dict(FULL, eval_batch_tokens=160))
    exact = tg.evaluate(windows(randomized(cfg), rt, cfg, stride), tokens, TABLE, cfg, rt, run_log)
    rt = tg.Runtime(tg.Config(device="cpu"), {})
    on_device_with(rt, dtype=torch.bfloat16, fixed_rows=True)
    model = randomized(cfg)
    model.dtype = torch.bfloat16
    scorer = windows(model, rt, cfg, stride)
    shapes = set()
    hidden = scorer.network.hidden

    def watched(model, ids, context):
        shapes.add(tuple(ids.shape))
        return hidden(model, ids, context)

    scorer.network.hidden = watched
    score = tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log)
    assert 0 < abs(score.loss - exact.loss) < 0.01
    checks = tg.check_score(score, scorer, tokens, TABLE, cfg, rt, {})
    gaps = {check.name: check.figures for check in checks if not check.failed}
    assert shapes == {(5, 32)} and gaps["distribution"]["positions"] > 16
    assert gaps["distribution"]["entry_gap"] < 1e-6 and gaps["future"]["nats"] == 0


def test_bytes_are_compared_wherever_there_is_text():
    """One document, none that begins, a cut through a character: never nothing, never wrongly."""
    text = [1, *TABLE.encode("naïve “quotes” and more. ")]
    wrong = tg.ByteTable(np.zeros_like(TABLE.sizes), TABLE.marked, TABLE.boundary, "wrong")
    wrong.processor = TABLE.processor
    for tokens in (text, text[3:], text[: len(text) - 15], text + text[:9], text[1:2] * 2):
        tokens = np.array(tokens)
        assert not tg.check_bytes(tokens, TABLE, 1).failed
        assert "decoded" in tg.check_bytes(tokens, wrong, 1).problem
    for tokens in ([], [1], [5]):
        assert tg.check_bytes(np.array(tokens, int), TABLE, 1).problem == "no text to compare"


def test_byte_sum_is_the_text(rng):
    text = "naïve “quotes” and more. " * 20
    tokens = np.array([1, *TABLE.encode(text)])
    assert TABLE.count(tokens).sum() == len(text.encode())


class Unigram(tg.WindowNetwork):
    """A legal network that learns: counts of committed tokens, add-one smoothed."""

    learns, chunk_targets = True, 30

    def __init__(self):
        self.counts = torch.ones(260, dtype=torch.float64)
        self.pending, self.committed = [], []

    def plan(self, tokens, chunk_targets):
        return tg.Windows(len(tokens) - 1, 10, 5, 5, chunk_targets)

    def predict(self, batch):
        log_p = (self.counts / self.counts.sum()).log().float()
        log_p = log_p.expand(*batch.index.shape, 260)
        return tg.Softmax(log_p, log_p)

    def collect(self, batch, targets):
        self.pending.append(targets[torch.from_numpy(batch.real)])

    def commit(self, chunk):
        new = torch.cat(self.pending)
        self.pending = []
        self.committed.append(new.numpy())
        self.counts += torch.bincount(new, minlength=260)


def checks_of(scorer, tokens, rt, run_log, tamper=None):
    """The checks of a score; tamper changes what the harness wrote down."""
    cfg = tg.Config(**dict(TINY, eval_batch_tokens=50))
    score = tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log)
    if tamper:
        tamper(score)
    return tg.check_score(score, scorer, tokens, TABLE, cfg, rt, {})


def test_harness_is_score_first(tokens, rt, run_log):
    network = Unigram()
    cfg = tg.Config(**dict(TINY, eval_batch_tokens=50))
    score = tg.evaluate(tg.Scorer("unigram", network), tokens, TABLE, cfg, rt, run_log)
    assert np.array_equal(np.concatenate(network.committed), tokens[1:])
    counts, expected = np.ones(260), []  # the same by hand, chunk by chunk
    events = [e for e in score.events if e[0] == "score"]
    for _, lo, hi in events:
        expected += [-np.log(counts[t] / counts.sum()) for t in tokens[lo + 1 : hi + 1]]
        np.add.at(counts, tokens[lo + 1 : hi + 1], 1)
    assert len(events) > 3
    np.testing.assert_allclose(score.nats, expected, rtol=1e-5)


def test_legal_scorers_pass_the_checks(tokens, rt, run_log):
    cfg = tg.Config(**FULL)
    assert not failed(checks_of(windows(randomized(cfg), rt, cfg), tokens, rt, run_log))


class Peeking(tg.WindowNetwork):
    """Sees one token ahead: the input after the position."""

    def predict(self, batch):
        seen = super().predict(batch)
        later = np.roll(batch.ids[:, -batch.index.shape[1] :], -1, 1)
        tilt = 0.01 * torch.from_numpy(later)[..., None] * torch.arange(260) / 260
        return tg.Softmax(torch.log_softmax(seen.log_p + tilt, -1), seen.hidden)


class Better(tg.Mixer):
    """Charges the better of two guesses, so that its probabilities add up to more than one."""

    def over(self, base, batch, network):
        return AtLeast(base, 0.05)


@dataclasses.dataclass
class AtLeast(tg.Distribution):
    base: tg.Distribution
    least: float

    def prob(self, ids):
        return self.base.prob(ids).clamp(min=self.least)


def peeking(model, rt, cfg):
    return tg.Scorer("peeking", Peeking(model, rt, cfg, 32, 8))


def better_of_two(model, rt, cfg):
    return tg.Scorer("better", windows(model, rt, cfg).network, [Better()])


class BetterOnce(tg.Mixer):
    """Charges the better of two guesses at one target of the stream alone."""

    def over(self, base, batch, network):
        return AtLeastOnce(base, batch.index)


@dataclasses.dataclass
class AtLeastOnce(tg.Distribution):
    base: tg.Distribution
    index: np.ndarray  # [B, S]

    def prob(self, ids):
        p, here = self.base.prob(ids), torch.from_numpy(self.index == 77).unsqueeze(-1)
        return torch.where(here, p.clamp(min=1e-4), p)


def better_once(model, rt, cfg):
    return tg.Scorer("once", windows(model, rt, cfg).network, [BetterOnce()])


class Again(tg.Windows):
    """The second batch comes twice."""

    def chunks(self, rank=0, world=1):
        (chunk,) = super().chunks(rank, world)
        return [dataclasses.replace(chunk, work=[*chunk.work, chunk.work[1]])]


class Twice(tg.WindowNetwork):
    def plan(self, tokens, chunk_targets):
        return Again(len(tokens) - 1, 32, 8, 1)


def charged_twice(model, rt, cfg):
    return tg.Scorer("twice", Twice(model, rt, cfg, 32, 8))


class Padded(tg.Windows):
    """Padding counts: the last window's targets several times in one batch."""

    def batch(self, tokens, windows):
        batch = super().batch(tokens, windows)
        return dataclasses.replace(batch, real=batch.index < self.targets)


class Padding(tg.WindowNetwork):
    def plan(self, tokens, chunk_targets):
        return Padded(len(tokens) - 1, 32, 8, 4)


def padding_charged(model, rt, cfg):
    return tg.Scorer("padding", Padding(model, rt, cfg, 32, 8))


CHEATS = {
    peeking: "future",
    better_of_two: "distribution",
    better_once: "distribution",
    charged_twice: "coverage",
    padding_charged: "coverage",
}


@pytest.mark.parametrize("cheat, name", list(CHEATS.items()))
def test_cheats_fail_the_checks(cheat, name, tokens, rt, run_log):
    cfg = tg.Config(**FULL)
    assert name in failed(checks_of(cheat(randomized(cfg), rt, cfg), tokens, rt, run_log))


@pytest.mark.parametrize(
    "tamper, name",
    [
        (lambda s: s.coverage.__setitem__(3, 0), "coverage"),
        (lambda s: s.coverage.__setitem__(3, 2), "coverage"),
        (lambda s: setattr(s, "bpb", s.bpb * 0.99), "byte_algebra"),
        (lambda s: setattr(s, "bpb", s.bpb - 1e-6), "byte_algebra"),
        (lambda s: s.events.insert(0, ("commit", 0, 9)), "order"),
        (lambda s: s.events.insert(0, ("score", 5, 9)), "order"),
        (lambda s: s.nats.__imul__(np.float32(0.9)), "distribution"),
    ],
)
def test_wrong_books_fail_the_checks(tamper, name, tokens, rt, run_log):
    cfg = tg.Config(**FULL)
    scorer = windows(randomized(cfg), rt, cfg)
    found = failed(checks_of(scorer, tokens, rt, run_log, tamper))
    assert found == ({name, "byte_algebra"} if name == "distribution" else {name})


def test_learning_early_is_excused_by_its_own_label_only(tokens, rt, run_log):
    """A score that is labelled for something else is refused for it."""
    cfg = tg.Config(**FULL)
    score = tg.evaluate(windows(randomized(cfg), rt, cfg), tokens, TABLE, cfg, rt, run_log)
    score.events.insert(0, ("commit", 0, 9))
    refused = {v: tg.check_order(dataclasses.replace(score, validity=v)).failed for v in tg.LABELS}
    assert refused == {"valid": True, "unnormalised": True, "adapted_first": False}


def test_a_large_gain_is_a_warning(tokens, rt, run_log):
    """Over the worst of the other stages; it is said, and the score stands."""
    cfg = tg.Config(**FULL)
    score = tg.evaluate(windows(randomized(cfg), rt, cfg), tokens, TABLE, cfg, rt, run_log)
    check = tg.check_plausibility(score, {"a": score.bpb + 0.01, "b": score.bpb + 0.04})
    assert check.verdict == "WARN: gains 0.0400 bpb over another stage" and not check.failed
    assert tg.check_plausibility(score, {"a": score.bpb + 0.01}).verdict == "PASS"
    assert "0.9" in tg.check_plausibility(dataclasses.replace(score, bpb=0.8), {}).verdict


def test_one_unnormalised_mixer_is_enough(rt):
    """Wherever it stands among the mixers, the score is no val_bpb."""
    cfg = tg.Config(**FULL, ngram="fixed")
    network = windows(randomized(cfg), rt, cfg).network
    mixers = [tg.HashedNgramCache(rt, cfg, network.model), Better()]
    for order in (mixers, mixers[::-1]):
        assert tg.Scorer("s", network, order).validity == "unnormalised"


def test_stage_that_does_not_fit_is_skipped(tokens, rt, run_log):
    cfg = tg.Config(**dict(FULL, eval_batch_tokens=32, max_eval_seconds=1e-6))
    scorer = windows(randomized(cfg), rt, cfg, 1)
    assert tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log) is None
    assert "skipped" in (run_log.out_dir / "train.log").read_text()


class Slow(Unigram):
    """Takes so many seconds for each batch and commit, the first ones `cold` instead."""

    def __init__(self, now, cold, batch, commit=0.0):
        super().__init__()
        self.now = now
        self.batches = [cold, cold] + [batch] * 2000
        self.commits = [cold] + [commit] * 2000

    def plan(self, tokens, chunk_targets):
        return tg.Windows(len(tokens) - 1, 4, 4, 1, chunk_targets)

    def predict(self, batch):
        self.now[0] += self.batches.pop(0)
        return super().predict(batch)

    def commit(self, chunk):
        super().commit(chunk)
        self.now[0] += self.commits.pop(0)


@pytest.mark.parametrize(
    "cold, batch, commit, chunk, charged",
    [
        (50.0, 0.3, 0.0, 0, 947),  # compiles for 100 s, and fits 600 s
        (50.0, 0.6, 0.0, 0, 8),
        (0.6, 0.6, 0.0, 0, 947),
        (400.0, 0.0, 0.0, 0, 8),  # too late already
        (50.0, 0.1, 0.5, 8, 947),  # chunks of two batches: a commit is part of the pace
        (50.0, 0.1, 2.0, 8, 4),
        (50.0, 0.1, 2.0, 40, 947),
    ],
)
def test_compilation_is_spent_time_and_no_pace(cold, batch, commit, chunk, charged, rt, run_log):
    tokens = np.arange(947 * 4 + 1) % 260
    now = [0.0]
    network = Slow(now, cold, batch, commit)
    network.learns, network.chunk_targets = bool(chunk), chunk
    scorer = tg.Scorer("slow", network)
    plan = network.plan(tokens, chunk)
    empty = np.zeros(len(tokens) - 1, np.uint8)
    score = tg.Score("slow", empty.astype(np.float32), empty, empty.copy())
    guard = tg.TimeGuard("slow", 600.0, rt, run_log, lambda: now[0], 0.0, 0.0)
    finished = tg.score_chunks(scorer, plan, tokens, score, rt, run_log, guard)
    assert 2002 - len(network.batches) == charged and finished == (charged == 947)
    assert ("needs about" in (run_log.out_dir / "train.log").read_text()) != finished


def test_adaptation_that_does_not_fit_is_stopped(tokens, rt, run_log):
    settings = dict(ttt_before_scoring=True, ttt_epochs=50, ttt_batch_seqs=1)
    cfg = tg.Config(**dict(FULL, eval_batch_tokens=32, max_eval_seconds=1e-6, **settings))
    scorer, steps = tg.STAGES["ttt"].build(randomized(cfg), rt, cfg, TABLE), []
    scorer.training.optimizer.step = lambda: steps.append(1)
    assert tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log) is None and len(steps) == 20


def test_what_is_no_number_fails_every_check_of_numbers(tokens, rt, run_log):
    """One charge of NaN; a network that gives NaN."""
    cfg = tg.Config(**FULL)

    def spoil(score):
        score.nats[40] = math.nan

    spoiled = checks_of(windows(randomized(cfg), rt, cfg), tokens, rt, run_log, spoil)
    assert failed(spoiled) >= {"coverage", "byte_algebra"}
    model = randomized(cfg)
    with torch.no_grad():
        model.tok_emb.weight.mul_(math.nan)
    found = failed(checks_of(windows(model, rt, cfg), tokens, rt, run_log))
    assert found >= {"coverage", "byte_algebra", "future", "distribution"}


def test_the_seconds_of_every_stage_count_as_scoring():
    assert set(tg.STAGES) <= set(tg.EVAL_PHASES)


def test_only_a_true_complete_score_is_called_val_bpb(tokens, rt, run_log):
    cfg = tg.Config(**FULL)
    score = tg.evaluate(windows(randomized(cfg), rt, cfg), tokens, TABLE, cfg, rt, run_log)
    assert score.label == "val_bpb" and "val_bpb" in score.record()
    for other in (dict(complete=False), dict(validity="unnormalised")):
        assert "val_bpb" not in dataclasses.replace(score, **other).record()
    labels = [dataclasses.replace(score, validity=v).label for v in tg.LABELS]
    assert labels == ["val_bpb", "unnormalised_score", "adapted_before_scoring"]


def test_a_plain_score_is_short_to_follow(tokens, rt, run_log):
    """25 functions at most, the forward pass included; 55 with streaming, adaptation, mixture."""
    cfg = tg.Config(**TINY)
    scorer = tg.STAGES["plain"].build(randomized(cfg), rt, cfg, TABLE)
    tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log)  # makes the rotary tables
    entered = functions_entered(lambda: tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log))
    assert "Windows.batch" in entered and len(entered) <= 25, sorted(entered)
    settings = dict(eval_stream=16, ttt_epochs=1, ngram="mix", ttt_chunk_tokens=64)
    cfg = tg.Config(**dict(TINY, **settings, mix_chunk_tokens=64, ttt_batch_seqs=1))
    scorer = tg.STAGES["mixed"].build(randomized(cfg), rt, cfg, TABLE)
    tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log)  # makes the rotary tables
    entered = functions_entered(lambda: tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log))
    assert "TestTimeTraining.learn" in entered and len(entered) <= 55, sorted(entered)
