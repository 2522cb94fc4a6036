"""On a pretend GPU (far_device.py): nothing mixes devices, the host seldom waits, no loop is long.

Steps and scores are those of the CPU. How often the host waits for the device is counted, by batch
and by step; what is launched does not grow with rows and tokens.
"""

import contextlib
import dataclasses
import functools

import numpy as np
import pytest
import torch
from conftest import FULL, TINY
from far_device import FAR, Costs, FarDevice, far_device, far_runtime
from helpers import (
    NESTINGS,
    PUBLISHED,
    SHORT,
    TABLE,
    Noise,
    build,
    cpu_runtime,
    failed,
    mild,
    published,
    short_text,
    verdicts,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

import train_gpt as tg

PLAIN = dict(TINY, num_layers=2)
TWO_LAYERS = dict(num_layers=2, ve_layers=(1,))


@pytest.fixture(scope="module")
def quiet_log(tmp_path_factory):
    """For what several tests look at."""
    return tg.RunLog(tmp_path_factory.mktemp("log"), cpu_runtime(), silent=True)


@contextlib.contextmanager
def far():
    """A runtime on the pretend device, and what notes its costs."""
    with far_device() as device:
        yield far_runtime(), device


@contextlib.contextmanager
def near():
    """The same on the CPU, where there is nothing to note, with the same kernel of attention."""
    with sdpa_kernel(SDPBackend.MATH):
        yield cpu_runtime(lag=2, fixed_rows=True), FarDevice()


# --- the pretend device itself --------------------------------------------------------------------

MIXED = {
    "sum": lambda x: x + torch.ones(6),
    "stack": lambda x: torch.stack((x[0], torch.tensor(1.0))),
    "near rows": lambda x: torch.ones(6)[x.long()],
    "list": lambda x: x[[1, 2]],
}


@pytest.mark.parametrize("name", MIXED)
def test_what_mixes_devices_raises(name):
    """A list as index too: on a GPU it is sent there, and the host waits."""
    with far_device():
        x = torch.arange(6.0).to(FAR)
        with pytest.raises(RuntimeError, match="near|Python"):
            MIXED[name](x)


NOTED = {
    "item": (lambda x: x.sum().item(), Costs(reads=1, launches=1)),
    "branch": (lambda x: bool(x[0] > 0), Costs(reads=1, launches=1)),
    "mask": (lambda x: x[x > 2], Costs(reads=1, launches=2)),
    "to the host": (lambda x: torch.zeros(6).copy_(x), Costs(reads=1)),
    "near index": (lambda x: x[np.array([1, 2])], Costs(waits=1, launches=1)),
    "view": (lambda x: x.view(2, 3).mT[0], Costs()),
}


@pytest.mark.parametrize("name", NOTED)
def test_what_a_gpu_would_feel_is_noted(name):
    action, expected = NOTED[name]
    with far_device() as device:
        x = torch.arange(6.0).to(FAR)
        before = device.costs()
        action(x)
        assert device.costs(before) == expected


def test_what_is_sent_is_noted():
    with far_device() as device:
        x = far_runtime().put(np.arange(6.0))
        assert device.costs() == Costs(uploads=1)
        x[:2] = torch.zeros(2)
        assert device.costs() == Costs(uploads=1, waits=1)
        torch.testing.assert_close(x.cpu(), torch.tensor([0.0, 0, 2, 3, 4, 5]).double())


def test_gradients_are_those_of_the_cpu():
    """Through views, an index and a change in place."""

    def gradient(w):
        w = w.clone().requires_grad_()
        out = w.view(3, 2)[torch.zeros_like(w[:2]).long()].cumsum(0)
        out[0] *= 2
        out.square().sum().backward()
        return w.grad.cpu()

    start = torch.arange(6.0)
    expected = gradient(start)
    with far_device():
        assert torch.equal(gradient(start.to(FAR)), expected)


# --- a training step ------------------------------------------------------------------------------

STEPS = {name: published(name) for name in PUBLISHED}
STEPS["everything"] = dict(
    FULL,
    **TWO_LAYERS,
    grad_clip_norm=0.3,
    late_qat_threshold=0.5,
    crown_q_lambda=0.01,
    warmdown_iters=10,
    mixer_head=True,
    ngram="gated",
    ngram_order=4,
    ngram_min_count=1,
    ngram_buckets=64,
    ema_decay=0.9,
    swa_every=1,
    swa_start=0.0,
)
STEPS["pr2135"] = dict(
    PLAIN,
    num_loops=1,
    loop_start=1,
    loop_end=1,
    enable_looping_at=0.0,
    parallel_start_layer=1,
    skip_gates_enabled=True,
    smear_gate_enabled=True,
    sparse_attn_gate_enabled=True,
    gate_window=8,
    asym_logit_rescale=True,
    train_doc_mask=True,
    context_schedule="16:0.9",
    warmdown_frac=0.85,
    min_lr=0.1,
    muon_row_normalize=True,
    muon_polar_express=True,
    ema_decay=0.9,
    grad_clip_norm=0.3,
)


class PackedNoise(Noise):
    """Micro-batches of one row."""

    def batch(self, unit):
        return tuple(x.reshape(1, -1) for x in super().batch(unit))


def trainer_of(rt, log, rows=2, **settings):
    """Late in the run: steps with all that comes then. Micro-batches have so many rows of 32."""
    tokens = 32 * rows
    cfg = tg.Config(**dict(settings, micro_batch_tokens=tokens, train_batch_tokens=2 * tokens))
    assert not tg.check_config(cfg)
    model = mild(cfg).to(rt.device)
    noise = PackedNoise if cfg.train_doc_mask else Noise
    trainer = tg.Trainer(cfg, rt, log, model, noise(rows))
    if trainer.ngram_table:
        trainer.ngram_table.add(rt.put(np.random.default_rng(0).integers(0, 260, 2000)))
    trainer.steps_done = tg.TRUSTED_PACE_STEPS
    return trainer


def whole_step(trainer):
    """Step, averages and report."""
    loss = trainer.step(trainer.stream.batch, steps_left=3.0, share=0.5)
    trainer.steps_done += 1
    if trainer.averager:
        trainer.averager.update(trainer.steps_done, share=1.0)
    trainer.send_report(loss)


@pytest.fixture(scope="module")
def stepped(quiet_log):
    """(place, case, rows of a micro-batch) -> costs of the second step, losses of both."""

    @functools.cache
    def stepped(place, name, rows=2):
        with place() as (rt, device):
            trainer = trainer_of(rt, quiet_log, rows, **STEPS[name])
            whole_step(trainer)
            before = device.costs()
            whole_step(trainer)
            costs = device.costs(before)
            losses = [pending.result()[1] for _, pending in trainer.in_flight]
        return costs, losses

    return stepped


@pytest.mark.parametrize("name", STEPS)
def test_a_step_never_waits_for_the_device(name, stepped):
    """Averages and report included; sent are two arrays a micro-batch, and the report.

    Where attention stays inside documents, four arrays more say where they are.
    """
    costs, _ = stepped(far, name)
    assert (costs.reads, costs.waits) == (0, 0)
    arrays = 2 + 4 * bool(STEPS[name].get("train_doc_mask"))
    assert costs.uploads <= 2 * arrays + 4


@pytest.mark.parametrize("name", STEPS)
def test_steps_are_those_of_the_cpu(name, stepped):
    _, losses = stepped(far, name)
    _, expected = stepped(near, name)
    np.testing.assert_allclose(losses, expected, atol=1e-6)


@pytest.mark.parametrize("name", STEPS)
def test_a_step_of_twice_the_rows_launches_as_much(name, stepped):
    few, _ = stepped(far, name)
    many, _ = stepped(far, name, rows=4)
    assert many == few
    assert few.launches > 100


def test_only_reports_are_read_while_training(run_log, monkeypatch):
    """Two steps later, one read each; then those that are left."""
    reads = []
    settings = dict(STEPS["everything"], schedule="tokens", iterations=5, val_loss_every=0)
    with far() as (rt, device):
        trainer = trainer_of(rt, run_log, **settings)
        trainer.steps_done = 0
        read_reports = trainer.read_reports

        def noted(lag):
            before = device.costs()
            report = read_reports(lag)
            reads.append(device.costs(before).reads)
            return report

        monkeypatch.setattr(trainer, "read_reports", noted)
        before = device.costs()
        assert tg.training_loop(trainer, None) == "finished"
        costs = device.costs(before)
    assert trainer.faking
    assert reads == [0, 0, 1, 1, 1, 2]
    assert (costs.reads, costs.waits) == (5, 0)


def test_a_model_that_looks_at_a_number_is_caught(run_log, monkeypatch):
    """As in `if loss > 10`."""
    forward = tg.GPT.forward

    def peek(model, *args):
        loss = forward(model, *args)
        return loss * 2 if loss > 10 else loss

    monkeypatch.setattr(tg.GPT, "forward", peek)
    with far() as (rt, device):
        trainer = trainer_of(rt, run_log, **PLAIN)
        before = device.costs()
        whole_step(trainer)
        assert device.costs(before).reads == trainer.micro_batches


def test_a_model_that_mixes_devices_is_caught(run_log, monkeypatch):
    """It makes a table where it is, not where its inputs are."""
    head = tg.GPT.head

    def near(model, hidden, scoring):
        return head(model, hidden + torch.zeros(hidden.size(1), 1), scoring)

    monkeypatch.setattr(tg.GPT, "head", near)
    with far() as (rt, _):
        trainer = trainer_of(rt, run_log, **PLAIN)
        with pytest.raises(RuntimeError, match="add mixes devices"):
            whole_step(trainer)


def test_a_device_without_float64_trains_and_scores_in_windows(run_log, monkeypatch):
    """All that SMOKE=1 does on Apple's GPU, whose path no test can take."""
    monkeypatch.setattr(tg, "NO_FLOAT64", (FAR.type,))
    smoke = dataclasses.asdict(tg.load_config({"SMOKE": "1"}))
    smoke |= dict(train_seq_len=32, eval_stride=8)
    tokens = short_text(np.random.default_rng(0))[:162]
    nats = []
    with far_device(float64=False):
        for rt in (far_runtime(), cpu_runtime()):
            trainer = trainer_of(rt, run_log, **smoke)
            whole_step(trainer)
            scorer = tg.Scorer("plain", tg.WindowNetwork(trainer.model, rt, trainer.cfg, 32, 8))
            score = tg.evaluate(scorer, tokens, TABLE, trainer.cfg, rt, run_log)
            assert not failed(tg.check_score(score, scorer, tokens, TABLE, trainer.cfg, rt, {}))
            nats.append(score.nats)
    np.testing.assert_allclose(nats[0], nats[1], atol=1e-5)


# --- scores ---------------------------------------------------------------------------------------

# The published ones add what they are known for: all of the text learned before it is scored, parts
# of the weights trained by AdamW, hashed caches of fixed weight, with backoff, and with a gate.
SCORERS = {name: dict(TWO_LAYERS, **settings) for name, settings in NESTINGS.items()}
SCORERS.update((name, published(name)) for name in PUBLISHED)


@dataclasses.dataclass
class Scored:
    """An evaluation, and its checks."""

    cfg: tg.Config
    nats: np.ndarray
    batches: int
    costs: Costs
    words: dict  # of the checks
    check_costs: Costs


def batches_of(scorer, tokens):
    """How many batches score a text."""
    plan = scorer.network.plan(tokens, scorer.chunk_targets)
    return sum(work is not None for chunk in plan.chunks() for work in chunk.work)


@pytest.fixture(scope="module")
def scored(quiet_log):
    """(place, case) -> the evaluation of a text in five documents."""
    tokens = short_text(np.random.default_rng(0))[:162]

    @functools.cache
    def scored(place, name):
        with place() as (rt, device):
            cfg, scorer = build(rt, **SCORERS[name])
            before = device.costs()
            score = tg.evaluate(scorer, tokens, TABLE, cfg, rt, quiet_log)
            costs = device.costs(before)
            before = device.costs()
            found = verdicts(score, scorer, tokens, cfg, rt)
            check_costs = device.costs(before)
        words = {check: verdict.split(":")[0] for check, verdict in found.items()}
        return Scored(cfg, score.nats, batches_of(scorer, tokens), costs, words, check_costs)

    return scored


@pytest.mark.parametrize("name", SCORERS)
def test_scores_are_those_of_the_cpu(name, scored):
    """And what the checks say of them."""
    found = scored(far, name)
    expected = scored(near, name)
    np.testing.assert_allclose(found.nats, expected.nats, atol=1e-6)
    assert found.words == expected.words


@pytest.mark.parametrize("name", SCORERS)
def test_the_host_waits_once_a_batch_for_the_charge_and_once_for_counts(name, scored):
    """It never waits for what it sends: a fixed number of arrays, a few more where it learns."""
    found = scored(far, name)
    costs = found.costs
    assert costs.reads == found.batches * (2 if found.cfg.ngram else 1)
    assert costs.waits == 0
    assert costs.uploads <= 20 * found.batches


@pytest.mark.parametrize("name", SCORERS)
def test_checks_wait_a_few_times(name, scored):
    costs = scored(far, name).check_costs
    assert costs.reads <= 10
    assert costs.waits <= 20


def in_documents(count):
    """A text in so many documents of 32 tokens."""
    tokens = np.random.default_rng(0).integers(4, 40, 32 * count + 1).astype(np.uint16)
    tokens[::32] = 1
    return tokens


SIZES = ("eval_batch_tokens", "ttt_chunk_tokens", "mix_chunk_tokens", "ngram_chunk_tokens")


def costs_of_text(log, factor, **settings):
    """Of a text in two chunks; batches, chunks and steps are larger by the factor.

    -> targets, batches, costs
    """
    cfg = tg.Config(**{**SHORT, **settings})
    documents = 1 + 2 * factor
    larger = {field: getattr(cfg, field) * factor for field in SIZES}
    larger.update(ttt_docs=documents, ttt_batch_seqs=2 * factor)
    if cfg.ttt_global_docs:
        larger.update(ttt_global_docs=factor)
    tokens = in_documents(documents)
    with far() as (rt, device):
        cfg, scorer = build(rt, **{**settings, **larger})
        before = device.costs()
        tg.evaluate(scorer, tokens, TABLE, cfg, rt, log)
        costs = device.costs(before)
    return len(tokens) - 1, batches_of(scorer, tokens), costs


@pytest.mark.parametrize("name", SCORERS)
def test_batches_of_twice_the_rows_cost_as_much(name, run_log, monkeypatch):
    """What one process does, undivided."""
    monkeypatch.setattr(tg, "BUSY_PROCESSES", 1)
    few, *cost_of_few = costs_of_text(run_log, 1, **SCORERS[name])
    many, *cost_of_many = costs_of_text(run_log, 2, **SCORERS[name])
    assert many > 1.5 * few
    assert cost_of_many == cost_of_few


def test_a_loop_over_targets_is_caught(run_log, monkeypatch):
    """Adapters that take their targets one by one, each by an index of the host's."""

    def one_by_one(network, batch, targets):
        flat = targets.flatten()
        kept = [flat[np.array([place])] for place in range(len(flat))]
        network.pending.append((batch, *network.believed, torch.cat(kept).view_as(targets)))

    monkeypatch.setattr(tg.PerDocumentLoRA, "collect", one_by_one)
    few, _, cost_of_few = costs_of_text(run_log, 1, **SCORERS["lora"])
    many, _, cost_of_many = costs_of_text(run_log, 2, **SCORERS["lora"])
    assert (cost_of_few.waits, cost_of_many.waits) == (few, many)
    assert cost_of_many.launches > cost_of_few.launches
