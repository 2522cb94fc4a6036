"""Training (section 8): the clock, late mechanisms, reports in flight, signals, calibration."""

import copy
import functools
import json
import math
import signal
import types

import numpy as np
import pytest
import torch
from conftest import FULL, TINY
from helpers import FakeClock, NoData, Noise, config, cpu_runtime, log_of, randomized, take_step

import train_gpt as tg

SMALL = dict(TINY, num_layers=2)
# A model whose steps cost nothing, for tests of the loop around them.
SMALLEST = dict(tg.BASELINE, num_layers=1, model_dim=8, num_heads=1, num_kv_heads=1, vocab_size=8)


def trainer_of(cfg, rt, log, stream=None, **options):
    return tg.Trainer(cfg, rt, log, tg.build_model(cfg, rt), stream, **options)


def losses_told(log):
    rows = [json.loads(line) for line in (log.out_dir / "metrics.jsonl").open()]
    return [row["step"] for row in rows if "train_loss" in row]


def no_validation(step):
    pass


# --- the clock ------------------------------------------------------------------------------------


@pytest.fixture
def clock():
    """Of a run of 96 seconds and 1,000 steps, two of which may be in flight."""
    limits = dict(max_wallclock_seconds=100, gptq_reserve_seconds=4, iterations=1000)
    return tg.Clock(config(tg.BASELINE, **limits), 2, FakeClock(1000.0))


def test_clock_goes_on_where_it_was(clock):
    """A resumed run's."""
    clock.last = tg.StepReport(0, 4.0)
    clock.now.advance(4000)
    clock.start()
    assert clock.elapsed() == 4
    assert not clock.out_of_time()
    clock.now.advance(6)
    assert clock.elapsed() == 10


def test_pace_by_hand(clock):
    """Steps of two seconds after a start of four."""
    clock.last = tg.StepReport(0, 4.0)
    clock.before_first_step = 4.0
    for step in (1, 2, 3):
        clock.take(tg.StepReport(step, 4 + 2 * step))
    assert clock.steps_left(3) == (96 - 10) / 2
    assert clock.steps_left(5) == (96 - 10) / 2 - 2  # two are in flight
    assert clock.progress(5) == 10 / 96


@pytest.mark.parametrize("limit, over", [(97.3, False), (97.1, True)])
def test_the_end_is_foreseen_before_the_first_step_of_a_resumed_run(limit, over, clock):
    """From the pace before, two seconds after a start of four: six steps of 2.2 seconds."""
    clock.limit = limit
    clock.before_first_step = 4.0
    clock.last = tg.StepReport(40, 84.0)
    assert clock.out_of_time() == over


@pytest.mark.parametrize("elapsed, over", [(82.7, False), (82.9, True)])
def test_the_end_is_foreseen(elapsed, over, clock):
    """Three in flight at the report, two since then and one more: six steps of 2.2 seconds."""
    clock.take(tg.StepReport(1, 2.0))
    clock.last = tg.StepReport(40, elapsed)
    assert clock.out_of_time() == over


def test_one_stall_does_not_end_the_training(clock):
    """Five steps as the slow ones of late, and one more stall; not six stalls."""
    elapsed = 0.0
    for step in range(1, 33):
        elapsed += 1.0 if step == 20 else 0.05
        clock.take(tg.StepReport(step, elapsed))
    needed = 1.1 * (5 * 0.05 + 1.0)
    for left, over in ((needed + 0.01, False), (needed - 0.01, True)):
        clock.last = tg.StepReport(32, clock.limit - left)
        assert clock.out_of_time() == over


def test_a_clock_that_does_not_drive_counts_steps():
    clock = tg.Clock(tg.Config(schedule="tokens", iterations=10), 0)
    assert clock.steps_left(3) == 7
    assert clock.progress(3) == 0.3


class SlowDevice:
    """Steps of so many seconds on a device that is `lag` steps behind the host."""

    def __init__(self, lag, seconds):
        self.lag = lag
        self.seconds = seconds
        self.now = FakeClock(100.0)
        self.ends = []  # of each step

    def wait(self):
        """The host waits for all steps."""
        self.now.seconds = max([self.now.seconds, *self.ends[-1:]])

    def step(self):
        """The host launches it in 20 ms, and waits for its end only where there is no lag."""
        self.now.advance(0.02 if self.lag else 0.0)
        start = max([self.now.seconds, *self.ends[-1:]])
        self.ends.append(start + self.seconds)
        if not self.lag:
            self.wait()

    def start_sum(self, values):
        """A report, which is there when the step before it has ended."""
        end = self.ends[-1]

        def result():
            self.now.seconds = max(self.now.seconds, end)
            return [float(value) for value in values]

        return types.SimpleNamespace(result=result)


# Seconds of a step, such that the end falls otherwise between two steps in each.
PACES = [0.08, 0.0823, 0.0851, 0.0877, 0.0902, 0.0937, 0.0951, 0.0979]


@pytest.mark.parametrize("seconds", PACES)
@pytest.mark.parametrize("lag", [0, 2])
def test_clock_schedule_ends_just_below_the_cap(lag, seconds, run_log):
    """The warm-down is as long as asked for and over at the end."""
    run = dict(schedule="clock", max_wallclock_seconds=30.0, iterations=10**6, warmdown_iters=50)
    cfg = config(SMALLEST, **run, train_log_every=0, val_loss_every=0)
    device = SlowDevice(lag, seconds)
    rt = cpu_runtime(lag=lag)
    rt.sync = device.wait
    rt.start_sum = device.start_sum
    trainer = trainer_of(cfg, rt, run_log, NoData, now=device.now)
    factors = []

    def step(batch_of, steps_left, share):
        now = tg.Moment(trainer.steps_done, steps_left, 0.0)
        factors.append(tg.warmdown(cfg, now))
        device.step()
        return torch.zeros(())

    trainer.step = step
    assert tg.train(trainer, no_validation) == "wallclock_cap"
    assert 28.9 < trainer.seconds <= 30.0
    assert factors[0] == 1
    assert factors[-1] < 0.2
    falling = [factor for factor in factors if factor < 1]
    assert 40 <= len(falling) < 55


def test_train_time_of_a_validation_line_is_training_time(run_log, monkeypatch):
    """Half an hour of validation does not show in it."""
    now = FakeClock()
    cfg = config(TINY, vocab_size=8, val_tokens=1)
    trainer = trainer_of(cfg, cpu_runtime(), run_log, NoData, now=now)
    trainer.clock.start()
    now.advance(3)
    one = np.ones(1, np.float32)
    score = tg.Score("validate", one, one, one, complete=False, loss=1.0, bpb=2.0)

    def slow(*args):
        now.advance(1800)
        return score

    monkeypatch.setattr(tg, "evaluate", slow)
    monkeypatch.setattr(tg, "load_validation", lambda cfg: np.zeros(2, int))
    with trainer.off_the_clock("validate"):
        tg.Validator(trainer, tg.ByteTable.bytes260())(7)
    assert "val_loss:1.0000 partial_bpb:2.0000 train_time:3000ms" in log_of(run_log.out_dir)
    assert trainer.clock.elapsed() == 3.0


# --- what begins late -----------------------------------------------------------------------------


def test_fake_quantization_and_penalty_begin_late(rt, run_log, rng):
    """At rate factors (1, 3/4, 1/2, 1/4 here) below 3/4 and below 1/2.

    The penalty counts once a step.
    """
    late = dict(quant_bits=4, crown_q_lambda=90.0, late_qat_threshold=0.75)
    cfg = config(SMALL, iterations=4, warmdown_iters=4, schedule="tokens", **late)
    model = randomized(cfg)
    trainer = tg.Trainer(cfg, rt, run_log, model, None)
    batches = torch.from_numpy(rng.integers(0, 260, (8, 2, 2, 32)))
    for step in range(4):
        twin = copy.deepcopy(model)
        trainer.steps_done = step
        penalty = tg.quantization_penalty(tg.quantized_matrices(twin, cfg), cfg).item()
        for module in twin.modules():
            if isinstance(module, tg.Linear):
                module.fake_qmax = 7 if step >= 2 else 0
        first, second = batches[2 * step : 2 * step + 2]
        expected = (twin(*first).item() + twin(*second).item()) / 2
        if step == 3:
            expected += penalty
        loss = take_step(trainer, lambda unit: batches[unit].numpy()).item()
        assert math.isclose(loss, expected, rel_tol=1e-5)
        assert penalty > 0.01 * loss


@pytest.mark.parametrize("steps_done, steps_left, faking", [(49, 1, 0), (50, 95, 0), (50, 80, 1)])
def test_no_late_mechanism_before_the_pace_is_trusted(
    steps_done, steps_left, faking, rt, run_log, rng
):
    """By the clock, 50 steps: until then one slow step makes the end look near."""
    cfg = config(SMALL, late_qat_threshold=0.9, warmdown_iters=100, schedule="clock")
    trainer = tg.Trainer(cfg, rt, run_log, randomized(cfg), None)
    batch = rng.integers(0, 260, (2, 2, 32))
    trainer.steps_done = steps_done
    trainer.step(lambda unit: batch, steps_left, 0.5)
    assert trainer.faking == bool(faking)


# --- several processes, and a device that is behind -----------------------------------------------


def report_of(rank, world, cfg, run_log, batches):
    """Seconds and loss that one of several processes tells of a step, 5 s after the start."""
    rt = cpu_runtime()
    rt.rank = rank
    rt.world = world
    rt.sum_ = lambda tensor: tensor
    rt.map_shares = lambda function, stack: function(stack)
    trainer = tg.Trainer(cfg, rt, run_log, randomized(cfg), None, FakeClock(7.0))
    trainer.clock.origin = 2.0
    trainer.send_report(trainer.step(lambda unit: batches[unit], 1, 0.0))
    _, pending = trainer.in_flight[0]
    seconds, loss, *_ = pending.result()
    return np.array([seconds, loss])


def test_a_step_of_two_processes_counts_penalty_and_seconds_once(run_log, rng):
    """What the processes report adds up to one process's loss, and to rank 0's seconds."""
    settings = dict(quant_bits=4, crown_q_lambda=90.0, warmdown_iters=4)
    cfg = config(SMALL, schedule="tokens", iterations=1, **settings)
    batches = rng.integers(0, 260, (2, 2, 2, 32))
    matrices = tg.quantized_matrices(randomized(cfg), cfg)
    expected = tg.quantization_penalty(matrices, cfg).item()
    for ids, targets in torch.from_numpy(batches):
        expected += randomized(cfg)(ids, targets).item() / 2
    alone = report_of(0, 1, cfg, run_log, batches)
    first = report_of(0, 2, cfg, run_log, batches)
    second = report_of(1, 2, cfg, run_log, batches)
    np.testing.assert_allclose(alone, [5.0, expected], rtol=1e-5)
    np.testing.assert_allclose(first + second, [5.0, expected], rtol=1e-5)
    assert alone[0] == first[0] == 5.0


COUNTED = dict(schedule="tokens", warmup_steps=0, val_loss_every=0, device="cpu")


@pytest.mark.parametrize("bad_step, status", [(0, "interrupted"), (4, "diverged"), (5, "diverged")])
def test_a_checkpoint_waits_for_the_reports_in_flight(bad_step, status, run_log):
    """Asked to stop in step 5: all five steps are in the log, and none of weights that diverged."""
    cfg = config(TINY, **COUNTED, iterations=9)
    trainer = trainer_of(cfg, cpu_runtime(lag=2), run_log, Noise())
    step = trainer.step

    def watched(*inputs):
        trainer.requests.stop = trainer.steps_done == 2  # is noticed two steps later
        loss = step(*inputs)
        return loss * math.nan if trainer.steps_done + 1 == bad_step else loss

    trainer.step = watched
    assert tg.train(trainer, no_validation) == status
    assert (run_log.out_dir / "checkpoint.pt").exists() == (status == "interrupted")
    assert losses_told(run_log) == [1, 2, 3, 4, 5]


def test_a_late_report_is_read_by_all_and_stops_in_time(run_log):
    """With a GPU's lag, stop and divergence are noticed so many steps later; nothing is lost."""
    cfg = config(TINY, **COUNTED, iterations=5)
    trainer = trainer_of(cfg, cpu_runtime(lag=2), run_log, Noise())
    assert tg.train(trainer, no_validation) == "finished"
    assert trainer.steps_done == trainer.clock.last.step == 5
    assert losses_told(run_log) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_saves_once(number, lag, run_log, monkeypatch):
    """SIGUSR1 in step 3: one checkpoint, and the run goes on; SIGTERM: it ends there."""
    cfg = config(SMALLEST, iterations=9, schedule="tokens", val_loss_every=0)
    trainer = trainer_of(cfg, cpu_runtime(lag=lag), run_log, NoData)
    saved = []
    monkeypatch.setattr(tg, "save_checkpoint", lambda trainer: saved.append(trainer.steps_done))

    def step(batch_of, steps_left, share):
        if trainer.steps_done == 2:
            signal.raise_signal(number)
        return torch.zeros(())

    trainer.step = step
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    status = tg.train(trainer, no_validation)
    assert saved == [3 + lag]
    if number == signal.SIGTERM:
        assert (status, trainer.steps_done) == ("interrupted", 3 + lag)
    else:
        assert (status, trainer.steps_done) == ("finished", 9)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == handlers


# --- calibration ----------------------------------------------------------------------------------


def inputs_of_matrices(model, rows):
    """Name of each matrix -> all that it was given while the model read some rows, [n, D]."""
    inputs = {}

    def remember(name):
        def hook(module, args, out):
            inputs.setdefault(name, []).append(args[0].flatten(0, -2))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, tg.Linear):
            module.register_forward_hook(remember(f"{name}.weight"))
    with torch.no_grad():
        for row in rows:
            model.hidden(torch.from_numpy(row)[None])
    return {name: torch.cat(seen).double().numpy() for name, seen in inputs.items()}


@pytest.mark.parametrize("world", [1, 2])
def test_hessians_are_the_layers_inputs(world, rng, rt, tmp_path, monkeypatch):
    """X^T X / n of every matrix, over the first sequences of the training stream.

    Two of them are a micro-batch, and so a pass; of two processes one has two, the other one.
    """
    cfg = config(FULL, mixer_head=True, gptq_n_samples=3)
    model = randomized(cfg)
    tokens = rng.integers(0, 260, 400)
    tg.write_shard(tmp_path / "fineweb_train_0.bin", tokens)
    stream = tg.TokenStream([tmp_path / "fineweb_train_0.bin"], cfg)
    monkeypatch.setattr(rt, "world", world)
    monkeypatch.setattr(rt, "sum_", lambda tensor: tensor)
    parts = []
    for rank in range(world):
        monkeypatch.setattr(rt, "rank", rank)
        parts.append(tg.calibrate(model, cfg, rt, stream).hessians)
    inputs = inputs_of_matrices(model, tokens[:96].reshape(3, 32))
    assert all(part.keys() == inputs.keys() for part in parts)
    assert len(inputs) == 3 * 6 + 4  # of three blocks, and of the input's four tables
    for name, x in inputs.items():
        assert len(x) == 96
        found = sum(part[name].numpy() for part in parts)
        np.testing.assert_allclose(found, x.T @ x / 96, rtol=1e-3, atol=1e-4)


def plus(zeros, module, args, out):
    return out + zeros


def gradients_of(model, module, rows, outputs):
    """d loss / d output of a module at every token [N, outputs], by adding zeros to that output."""
    seen = []
    for ids, targets in rows:
        zeros = torch.zeros(ids.shape[1], outputs, requires_grad=True)
        handle = module.register_forward_hook(functools.partial(plus, zeros))
        logits = model.head(model.hidden(ids), scoring=False)
        handle.remove()
        loss = torch.nn.functional.cross_entropy(logits[0], targets[0], reduction="sum")
        seen.append(torch.autograd.grad(loss, zeros)[0])
    return torch.cat(seen).double()


@pytest.mark.parametrize("tied", [True, False])
def test_importance_is_the_gradients_square(tied, rng, rt, tmp_path):
    """Of matrices and of tables; of the output embedding what p - 1[target] says, by frequency."""
    cfg = config(FULL, gptq_n_samples=3, quant_step=0.1, tie_embeddings=tied, logit_softcap=5.0)
    model = randomized(cfg)
    tokens = rng.integers(0, 30, 400)
    tg.write_shard(tmp_path / "fineweb_train_0.bin", tokens)
    stream = tg.TokenStream([tmp_path / "fineweb_train_0.bin"], cfg)
    found = tg.calibrate(model, cfg, rt, stream)
    rows = [torch.from_numpy(tokens[at : at + 33].astype(np.int64))[None] for at in (0, 32, 64)]
    rows = [(row[:, :-1], row[:, 1:]) for row in rows]
    for name in ("blocks.1.mlp.fc", "blocks.0.attn.c_k", "bigram.proj"):
        module = model.get_submodule(name)
        squares = gradients_of(model, module, rows, len(module.weight)).square().mean(0)
        np.testing.assert_allclose(found.importance[f"{name}.weight"], squares, rtol=1e-3)

    table = model.bigram.embed
    g = gradients_of(model, table, rows, table.embedding_dim)
    np.testing.assert_allclose(found.hessians["bigram.embed.weight"], g.T @ g / 96, rtol=1e-3)
    reads = np.bincount(
        torch.cat([model.bigram.rows_of(ids)[0] for ids, _ in rows]), minlength=len(table.weight)
    )
    np.testing.assert_allclose(found.importance["bigram.embed.weight"], (reads + 1) / 96, rtol=1e-5)

    name = "tok_emb.weight" if tied else "lm_head.weight"
    hidden = torch.cat([model.hidden(ids)[0] for ids, _ in rows]).detach().double()
    np.testing.assert_allclose(found.hessians[name], hidden.T @ hidden / 96, rtol=1e-3, atol=1e-5)
    mean = found.importance[name].double().sum() * 96 / (96 + 260)
    weight = model.get_parameter(name).detach().double()
    z = (hidden @ weight.T).requires_grad_(True)
    targets = torch.cat([targets[0] for _, targets in rows])
    nats = torch.nn.functional.cross_entropy(5 * torch.tanh(z / 5), targets, reduction="sum")
    squares = torch.autograd.grad(nats, z)[0].square().sum() / 96
    assert abs(mean / squares - 1) < 0.05
    assert "tok_emb.weight" in found.hessians
