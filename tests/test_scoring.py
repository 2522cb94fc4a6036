"""Scoring (section 10): plans, windows of the network, the harness, time, labels.

Counts are in test_counts.py, what learns in test_adaptation.py, all scorers in test_predictors.py.
"""

import dataclasses
import itertools
import math

import numpy as np
import oracles
import pytest
import torch
from conftest import FULL, TINY
from helpers import (
    LORA,
    TABLE,
    build,
    config,
    cpu_runtime,
    everything,
    log_of,
    randomized,
    windows,
)

import train_gpt as tg


@pytest.fixture
def tokens(rng):
    tokens = rng.integers(4, 260, 150).astype(np.uint16)
    tokens[[0, 40, 90]] = 1
    return tokens


# --- plans ----------------------------------------------------------------------------------------


def targets_of_chunk(plan, parts, tokens):
    """Targets of a chunk over all processes, in order, each from the window that names it."""
    for work in itertools.chain(*(part.work for part in parts)):
        if work is None:
            continue
        batch = plan.batch(tokens, work)
        for row, k in enumerate(work):
            own = batch.index[row][batch.real[row]]
            assert (plan.window_of(own) == k).all()
            assert own[-1] - k * plan.stride < plan.seq_len
            yield from own


LENGTHS = (1, 2, 19, 20, 21, 23, 40, 41, 97)


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("chunk", [0, 25])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("stride", [1, 3, 8, 20])
def test_every_target_is_scored_once(stride, batch, chunk, world):
    """In order of chunks, by the window that window_of names, for any number of processes."""
    for n in LENGTHS:
        plan = tg.Windows(n, 20, stride, batch, chunk)
        tokens = np.arange(n + 1)
        seen = []
        chunks = [plan.chunks(rank, world) for rank in range(world)]
        for parts in zip(*chunks, strict=True):
            assert len({len(part.work) for part in parts}) == 1  # every process makes as many calls
            targets = list(targets_of_chunk(plan, parts, tokens))
            assert targets == list(range(parts[0].lo, parts[0].hi))
            seen += targets
        assert seen == list(range(n))


def batches_of(plan, tokens):
    for chunk in plan.chunks():
        for work in chunk.work:
            yield plan.batch(tokens, work)


@pytest.mark.parametrize("kind", ["windows", "documents"])
def test_a_batch_holds_inputs_and_no_targets(kind):
    """Its ids end with the token before the last target, whatever the plan."""
    tokens = np.arange(100, 142)
    plans = {"windows": tg.Windows(41, 20, 8, 3), "documents": tg.Documents(tokens, 0, 20, 8, 2)}
    for batch in batches_of(plans[kind], tokens):
        names = {field.name for field in dataclasses.fields(batch)}
        assert names == {"ids", "index", "real", "left_context", "slots", "goes_on", "span"}
        inputs = batch.ids[:, -batch.index.shape[1] :]
        assert (inputs[batch.real] == tokens[batch.index[batch.real]]).all()
        assert batch.ids.max() < 141  # the stream's last token is only a target


def test_context_is_as_long_as_the_stride_allows():
    _, *later = batches_of(tg.Windows(100, 20, 5), np.arange(101))
    assert later
    for batch in later:
        context = batch.index[:, 0] - batch.ids[:, 0]  # inputs before the first scored one
        assert (context >= 15).all()
        assert (context < 20).all()


def test_the_checks_look_early_and_all_over_the_stream():
    """A batch near the start, and one with as many targets as asked from there to the end."""
    tokens = np.arange(1001)
    early, spread = tg.Windows(1000, 20, 8, 40).samples(tokens, 256)
    assert early.index[early.real].tolist() == list(range(20, 28))
    first = spread.index[:, 0]
    assert first[0] == 20
    assert spread.index[spread.real].max() == 995  # the last window is short
    assert len(first) == 256 // 8
    assert np.diff(first).max() <= 8 * -(-122 // 31)
    _, few = tg.Windows(1000, 20, 8, 4).samples(tokens, 256)  # a whole batch at most
    assert few.index[:, 0].tolist() == [20, 340, 660, 988]


@pytest.mark.parametrize("targets, start", [(1000, 512), (1024, 768), (200, 0)])
def test_the_checks_look_at_whole_spans_of_a_stream(targets, start):
    """Of 256: a short last one is passed over."""
    _, one = tg.Windows(targets, 256, 256).samples(np.arange(targets + 1), 256)
    assert one.index[one.real][0] == start


def test_the_checks_look_at_documents_side_by_side():
    """Of 5, 35, 10 and 50 targets, three at a time, the long ones first."""
    tokens = np.arange(100, 201)
    tokens[[0, 5, 40, 50]] = 1
    early, late = tg.Documents(tokens, 1, 16, 8, 3).samples(tokens, 256)
    assert early.index[:, 0].tolist() == [5, 40, 0]
    assert late.index[late.real].tolist() == [*range(13, 21), 48, 49]  # the second chunks


# --- windows of the network -----------------------------------------------------------------------


@pytest.mark.parametrize("n, stride", [(150, 32), (150, 8), (147, 5), (20, 8), (2, 1), (33, 16)])
def test_score_equals_one_target_at_a_time(n, stride, tokens, rt, run_log):
    cfg = config(FULL, eval_batch_tokens=96)
    model = randomized(cfg)
    scorer = windows(model, rt, cfg, stride)
    tokens = tokens[:n]
    with torch.no_grad():
        expected = oracles.charges_one_by_one(model, tokens, 32, stride)
    score = tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log)
    np.testing.assert_allclose(score.nats, expected, atol=1e-4)
    assert math.isclose(score.loss, expected.mean(), abs_tol=1e-5)
    bits = expected.sum() / math.log(2)
    assert math.isclose(score.bpb, bits / TABLE.count(tokens).sum(), rel_tol=1e-5)
    plan = scorer.network.plan(tokens, 0)
    for j in {0, (n - 2) // 2, n - 2}:
        p = everything(scorer, plan.position(tokens, j))
        assert abs(p.sum().item() - 1) < 1e-6
        assert abs(-p[int(tokens[j + 1])].log().item() - expected[j]) < 1e-4


def test_batch_size_does_not_matter(tokens, rt, run_log):
    model = randomized(config(FULL))
    losses = []
    for size in (32, 320, 0):
        cfg = config(FULL, eval_batch_tokens=size)
        score = tg.evaluate(windows(model, rt, cfg), tokens, TABLE, cfg, rt, run_log)
        losses.append(score.loss)
    assert max(losses) - min(losses) < 1e-6


@pytest.mark.parametrize("stride", [4, 32])
def test_fixed_rows(stride, tokens, rt, run_log):
    """On a GPU all inputs have one shape, and the checks ask with it: rounding has no say."""
    cfg = config(FULL, eval_batch_tokens=160)
    model = randomized(cfg)
    exact = tg.evaluate(windows(model, rt, cfg, stride), tokens, TABLE, cfg, rt, run_log)
    gpu = cpu_runtime(dtype=torch.bfloat16, fixed_rows=True)
    model.dtype = torch.bfloat16
    scorer = windows(model, gpu, cfg, stride)
    hidden = scorer.network.hidden
    shapes = set()

    def watched(model, ids, documents=None, looped=None, context=None):
        shapes.add(tuple(ids.shape))
        return hidden(model, ids, documents, looped, context)

    scorer.network.hidden = watched
    score = tg.evaluate(scorer, tokens, TABLE, cfg, gpu, run_log)
    assert 0 < abs(score.loss - exact.loss) < 0.01
    checks = tg.check_score(score, scorer, tokens, TABLE, cfg, gpu, {})
    figures = {check.name: check.figures for check in checks if not check.failed}
    assert shapes == {(5, 32)}
    assert figures["distribution"]["positions"] > 16
    assert figures["distribution"]["entry_gap"] < 1e-6
    assert figures["future"]["nats"] == 0


# --- the harness ----------------------------------------------------------------------------------


class Unigram(tg.WindowNetwork):
    """A legal network that learns: counts of committed tokens, add-one smoothed."""

    learns = True
    chunk_targets = 30

    def __init__(self):
        self.counts = torch.ones(260, dtype=torch.float64)
        self.pending = []
        self.committed = []

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


def test_harness_is_score_first(tokens, rt, run_log):
    """The charges are those of counts by hand, chunk by chunk; all tokens are learned once."""
    network = Unigram()
    cfg = config(TINY, eval_batch_tokens=50)
    score = tg.evaluate(tg.Scorer("unigram", network), tokens, TABLE, cfg, rt, run_log)
    assert np.array_equal(np.concatenate(network.committed), tokens[1:])
    counts = np.ones(260)
    expected = []
    chunks = [(lo, hi) for event, lo, hi in score.events if event == "score"]
    assert len(chunks) > 3
    for lo, hi in chunks:
        targets = tokens[lo + 1 : hi + 1]
        expected += [-math.log(counts[target] / counts.sum()) for target in targets]
        np.add.at(counts, targets, 1)
    np.testing.assert_allclose(score.nats, expected, rtol=1e-5)


def test_only_a_true_complete_score_is_called_val_bpb(tokens, rt, run_log):
    cfg = config(FULL)
    score = tg.evaluate(windows(randomized(cfg), rt, cfg), tokens, TABLE, cfg, rt, run_log)
    assert score.label == "val_bpb"
    assert "val_bpb" in score.record()
    for other in (dict(complete=False), dict(validity="unnormalised")):
        assert "val_bpb" not in dataclasses.replace(score, **other).record()
    labels = [dataclasses.replace(score, validity=v).label for v in tg.LABELS]
    assert labels == ["val_bpb", "unnormalised_score", "adapted_before_scoring"]


def test_one_unnormalised_mixer_is_enough(rt):
    """Wherever it stands among the mixers, the score is no val_bpb."""
    cfg = config(FULL, ngram="fixed")
    network = windows(randomized(cfg), rt, cfg).network
    mixers = [tg.HashedNgramCache(rt, cfg, network.model), tg.Mixer()]
    for order in (mixers, mixers[::-1]):
        assert tg.Scorer("s", network, order).validity == "unnormalised"


# --- time -----------------------------------------------------------------------------------------


def test_stage_that_does_not_fit_is_skipped(tokens, rt, run_log):
    cfg = config(FULL, eval_batch_tokens=32, max_eval_seconds=1e-6)
    scorer = windows(randomized(cfg), rt, cfg, 1)
    assert tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log) is None
    assert "skipped" in log_of(run_log.out_dir)


class Slow(Unigram):
    """Takes so many seconds for each batch and commit, the first ones `cold` instead.

    A later one takes `stall` more.
    """

    def __init__(self, now, cold, batch, commit, stall):
        super().__init__()
        self.now = now
        self.batches = iter([cold, cold, batch, batch, batch + stall] + [batch] * 2000)
        self.commits = iter([cold] + [commit] * 2000)
        self.asked = 0

    def plan(self, tokens, chunk_targets):
        return tg.Windows(len(tokens) - 1, 4, 4, 1, chunk_targets)

    def predict(self, batch):
        self.asked += 1
        self.now[0] += next(self.batches)
        return super().predict(batch)

    def commit(self, chunk):
        super().commit(chunk)
        self.now[0] += next(self.commits)


@dataclasses.dataclass
class Pace:
    """Seconds of the first batches, of each later batch and commit; batches charged of 947."""

    cold: float
    batch: float
    commit: float = 0.0
    chunk: int = 0  # targets
    charged: int = 947
    stall: float = 0.0


PACES = {
    "compiles for 100 s, and fits 600 s": Pace(50.0, 0.3),
    "the same with a stall before the first verdict": Pace(50.0, 0.3, stall=5.0),
    "compiles, and does not fit by far": Pace(50.0, 2.0, charged=8),
    "compiles, and does not quite fit: seen after an eighth": Pace(50.0, 0.6, charged=119),
    "the same without compilation": Pace(0.6, 0.6),
    "too late already": Pace(400.0, 0.0, charged=8),
    "chunks of two batches: a commit is part of the pace": Pace(50.0, 0.1, 0.5, 8),
    "very slow commits after two batches each": Pace(50.0, 0.1, 8.0, 8, charged=4),
    "slow commits after two batches each": Pace(50.0, 0.1, 2.0, 8, charged=122),
    "slow commits after ten batches each": Pace(50.0, 0.1, 2.0, 40),
}


def scored_in_time(scorer, plan, tokens, now, limit, rt, run_log):
    """The score as far as it came, and whether to the end; now[0]: the seconds."""
    empty = np.zeros(len(tokens) - 1, np.uint8)
    score = tg.Score("slow", empty.astype(np.float32), empty, empty.copy())
    guard = tg.TimeGuard("slow", limit, rt, run_log, lambda: now[0], 0.0, 0.0)
    return score, tg.score_chunks(scorer, plan, tokens, score, rt, run_log, guard)


@pytest.mark.parametrize("case", PACES)
def test_compilation_is_spent_time_and_no_pace(case, rt, run_log):
    pace = PACES[case]
    tokens = np.arange(947 * 4 + 1) % 260
    now = [0.0]
    network = Slow(now, pace.cold, pace.batch, pace.commit, pace.stall)
    network.learns = bool(pace.chunk)
    network.chunk_targets = pace.chunk
    scorer = tg.Scorer("slow", network)
    plan = network.plan(tokens, pace.chunk)
    _, finished = scored_in_time(scorer, plan, tokens, now, 600.0, rt, run_log)
    assert network.asked == pace.charged
    assert finished == (pace.charged == 947)
    assert ("needs about" in log_of(run_log.out_dir)) != finished


# Length of the documents of each group, seconds an input (limit 1,000), groups that are charged.
JUDGED = {
    "fits": ([64, 64, 64, 64], 1.0, 4),
    "does not fit": ([64, 64, 64, 64], 2.0, 2),
    "long ones come last: 48 inputs in two batches, then 320 in eight": ([16, 32, 64, 64], 3.0, 3),
    "so much too long that 32 inputs tell it": ([16, 32, 64, 64], 9.0, 2),
}


@pytest.mark.parametrize("case", JUDGED)
def test_documents_are_judged_by_their_inputs(case, rt, run_log):
    """After the second group and, if that was less than a tenth, again after the third.

    At its own pace, which grows with the context.
    """
    lengths, seconds, groups = JUDGED[case]
    cfg, scorer = build(rt, **LORA, ttt_docs=16, ttt_lora_keep=True, eval_seq_len=64)
    sizes = np.repeat(lengths, 16)  # of 16 documents a group
    tokens = np.full(sizes.sum() + 1, 5, np.uint16)
    tokens[np.cumsum(sizes) - sizes] = cfg.bos_id
    now = [0.0]
    predict = scorer.network.predict

    def slow(batch):
        now[0] += seconds * batch.ids.shape[1]
        return predict(batch)

    scorer.network.predict = slow
    plan = scorer.network.plan(tokens, 0)
    score, finished = scored_in_time(scorer, plan, tokens, now, 1000.0, rt, run_log)
    assert finished == (groups == 4)
    assert score.coverage.sum() == 16 * sum(lengths[:groups])


def adapted_in_time(limit, seconds, rt, run_log):
    """Steps of an adaptation of 800, the tenth with a stall of two seconds, until it is stopped."""
    now = [0.0]
    guard = tg.TimeGuard("slow", limit, rt, run_log, lambda: now[0], 0.0, 0.0)
    for step in range(1, 801):
        now[0] += seconds + 2.0 * (step == 10)
        if not guard.adapted(step / 800):
            return step
    return 800


# Limit in seconds -> the step after which an adaptation of 800 steps of 0.1 s is stopped.
@pytest.mark.parametrize("limit, last", [(100.0, 800), (70.0, 100), (20.0, 20)])
def test_an_adaptation_is_judged_early_and_after_an_eighth(limit, last, rt, run_log):
    assert adapted_in_time(limit, 0.1, rt, run_log) == last


def test_adaptation_that_does_not_fit_is_stopped(tokens, rt, run_log):
    first = dict(ttt_before_scoring=True, ttt_epochs=50, ttt_batch_seqs=1)
    cfg = config(FULL, eval_batch_tokens=32, max_eval_seconds=1e-6, **first)
    scorer = tg.STAGES["ttt"].build(randomized(cfg), rt, cfg, TABLE)
    steps = []
    scorer.training.optimizer.step = lambda: steps.append(1)
    assert tg.evaluate(scorer, tokens, TABLE, cfg, rt, run_log) is None
    assert len(steps) == 20
