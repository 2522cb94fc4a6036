"""The optimizer (section 6): Muon, parameter groups, schedules, averages; against closed forms.

The originals' steps are in test_seeds.py.
"""

import copy
import math

import numpy as np
import oracles
import pytest
import torch
from conftest import FULL, TINY
from helpers import config, names_of, randomized, take_step

import train_gpt as tg

# --- Muon -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24, 24), (16, 48), (48, 16)])
def test_newton_schulz_against_svd(shape):
    """Singular vectors stay, values follow a quintic from the Frobenius norm on."""
    g = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    out = tg.newton_schulz(g, 5)
    for before, after in zip(g.double(), out.double()):
        u, s, vh = torch.linalg.svd(before, full_matrices=False)
        s = s / s.norm()
        for _ in range(5):
            s = oracles.quintic(s)
        torch.testing.assert_close(after, u @ torch.diag(s) @ vh, atol=2e-4, rtol=1e-3)
        assert s.max() < 1.3
        assert s.median() > 0.6


def orthogonalized(u):
    """Five steps of Newton-Schulz, written out."""
    x = u / (u.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        b = -4.7750 * a + 2.0315 * a @ a
        x = 3.4445 * x + b @ x
    return x


@pytest.mark.parametrize("rows, columns, size", [(12, 6, 2**0.5), (6, 6, 1), (6, 12, 1)])
def test_muon_step_by_hand(rows, columns, size):
    """Nesterov momentum, decoupled decay, and larger steps for tall matrices."""
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(rows, columns, generator=generator))
    expected = p.detach().clone()
    buffer = torch.zeros(rows, columns)
    muon = tg.Muon([p], lr=0.1, momentum=0.9, weight_decay=0.5)
    for _ in range(2):
        p.grad = torch.randn(rows, columns, generator=generator)
        buffer = 0.9 * buffer + p.grad
        update = orthogonalized(p.grad + 0.9 * buffer)
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * size * update
        muon.step()
        torch.testing.assert_close(p.detach(), expected, atol=1e-4, rtol=1e-3)


# --- which parameter goes where -------------------------------------------------------------------


def held_by(optimizers):
    """Every parameter that an optimizer holds, with the optimizer and its group."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                yield p, optimizer, group


@pytest.mark.parametrize("settings", [TINY, FULL, dict(FULL, tie_embeddings=False)])
def test_every_parameter_is_in_exactly_one_group(settings, rt):
    cfg = tg.Config(**settings)
    model = tg.GPT(cfg)
    groups = tg.parameter_groups(model, cfg)
    names = [name for members in groups.values() for name, _ in members]
    assert sorted(names) == sorted(names_of(model))
    held = [id(p) for p, _, _ in held_by(tg.build_optimizers(model, cfg, rt))]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    for name, p in groups["matrices"]:
        assert p.ndim == 2
        assert "tok_emb" not in name
        assert "resid_mix" not in name
    untied = set() if cfg.tie_embeddings else {"tok_emb.weight"}
    assert {name for name, _ in groups["embed"]} == untied


def test_a_parameter_without_a_rule_is_an_error():
    model = torch.nn.ParameterDict({"odd": torch.zeros(2, 2, 2)})
    with pytest.raises(ValueError, match="no optimizer group takes odd"):
        tg.parameter_groups(model, tg.Config())


# Rate and decay of each group, by their settings.
RATES = dict(head_lr=0.011, embed_lr=0.012, tied_embed_lr=0.013, scalar_lr=0.014, matrix_lr=0.015)
DECAYS = dict(embed_wd=0.1, adam_wd=0.2, muon_wd=0.3)
RATES_OF_GROUPS = {
    "head": (0.011, 0.1),
    "embed": (0.012, 0.1),
    "tables": (0.013, 0.1),
    "scalars": (0.014, 0.2),
    "matrices": (0.015, 0.3),
}


TABLES = ("tok_emb", "bigram.embed", "hashes.0.embed", "hashes.1.embed", "ve_shared.embed")


def usual_group(name, p, tied):
    """Where the published scripts put a parameter."""
    if name == "lm_head.weight":
        return "head"
    if name == "tok_emb.weight" and not tied:
        return "embed"
    if name in (f"{table}.weight" for table in TABLES):
        return "tables"
    if p.ndim < 2 or name.endswith("resid_mix"):
        return "scalars"
    gains = ("skip_weights", "alpha_head.weight", "induction.gate")
    return "scalars" if name in gains else "matrices"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bigram", ["", "scalars", "matrices"])
def test_groups_rates_and_decay(bigram, tied, rt):
    """What the optimizers hold.

    With no gradient a step shrinks each weight by its rate times its decay.
    """
    settings = dict(mixer_head=True, tie_embeddings=tied, bigram_optim=bigram)
    cfg = config(FULL, **settings, **RATES, **DECAYS)
    model = randomized(cfg)
    expected = {name: usual_group(name, p, tied) for name, p in model.named_parameters()}
    if bigram:  # PR 740, PR 489
        expected |= {"bigram.embed.weight": bigram, "bigram.proj.weight": bigram}
    groups = tg.parameter_groups(model, cfg)
    found = {name: group for group, members in groups.items() for name, _ in members}
    assert found == expected
    optimizers = tg.build_optimizers(model, cfg, rt)
    held = {id(p): (optimizer, group) for p, optimizer, group in held_by(optimizers)}
    before = copy.deepcopy(dict(model.named_parameters()))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for optimizer in optimizers:
        optimizer.step()
    for name, p in model.named_parameters():
        rate, decay = RATES_OF_GROUPS[expected[name]]
        optimizer, group = held[id(p)]
        assert (group["lr"], group["weight_decay"]) == (rate, decay), name
        assert (type(optimizer) is tg.Muon) == (expected[name] == "matrices"), name
        shrunk = before[name] * (1 - rate * decay)
        torch.testing.assert_close(p, shrunk, rtol=1e-6, atol=1e-7, msg=name)


# --- schedules ------------------------------------------------------------------------------------


def test_warmdown():
    """Linear over the last steps, whatever is known of how many are left."""
    cfg = config(tg.BASELINE, warmdown_iters=6, iterations=10)
    for step in range(11):
        assert tg.warmdown(cfg, tg.Moment(step, 10 - step, 0.0)) == min(1, (10 - step) / 6)
    assert tg.warmdown(cfg, tg.Moment(0, math.inf, 0.0)) == 1
    assert tg.warmdown(cfg, tg.Moment(0, -1, 0.0)) == 0
    assert tg.warmdown(config(tg.BASELINE, warmdown_iters=0), tg.Moment(5, 0, 0.0)) == 1


def test_warmdown_over_a_share_of_the_run_with_a_floor():
    """PR 2135's: 1 up to 15 % of the run, then straight towards 0 at its end, a tenth at least."""
    cfg = config(tg.BASELINE, warmdown_frac=0.85, min_lr=0.1)
    for share in np.linspace(0, 1, 41):
        expected = 1.0
        if share > 0.15:
            expected = max((1 - share) / 0.85, 0.1)
        now = tg.Moment(7, 3.0, share)
        assert tg.warmdown(cfg, now) == pytest.approx(expected)
    floor = config(tg.BASELINE, warmdown_iters=10, min_lr=0.25)
    for left, factor in ((10, 1), (5, 0.5), (1, 0.25)):
        now = tg.Moment(0, left, 0.0)
        assert tg.warmdown(floor, now) == factor


@pytest.mark.parametrize("step, momentum", [(0, 0.5), (1, 0.6), (4, 0.9), (99, 0.9)])
def test_momentum_warmup(step, momentum):
    warmup = dict(muon_momentum_warmup_steps=4, muon_momentum_warmup_start=0.5)
    cfg = tg.Config(muon_momentum=0.9, **warmup)
    assert tg.momentum_warmup(cfg, tg.Moment(step, 0.0, 0.0)) == pytest.approx(momentum, abs=1e-6)


def test_steps_set_rates_and_momentum_from_their_start(rt, run_log, rng):
    """Factors of the rate that the settings name, not of the last step's."""
    steps = dict(warmdown_iters=4, iterations=4, muon_momentum_warmup_steps=2)
    cfg = config(TINY, schedule="tokens", **steps)
    trainer = tg.Trainer(cfg, rt, run_log, tg.GPT(cfg), None)
    batch = rng.integers(0, 260, (2, 2, 32))
    factors = [1, 0.75, 0.5, 0.25]
    momenta = [0.85, 0.9, 0.95, 0.95]
    for step in range(4):
        trainer.steps_done = step
        take_step(trainer, lambda unit: batch)
        muon, adam = trainer.optimizers
        groups = muon.param_groups + adam.param_groups
        expected = np.array([0.04, 0.05, 0.04]) * factors[step]
        np.testing.assert_allclose([group["lr"] for group in groups], expected)
        assert math.isclose(groups[0]["momentum"], momenta[step])


@pytest.mark.parametrize("max_norm, expected", [(1.0, 1.0), (4.9, 4.9), (5.1, 5.0), (50.0, 5.0)])
def test_clipping_only_makes_gradients_shorter(max_norm, expected):
    gradients = torch.tensor([3.0, 0.0, -4.0])
    tg.clip_gradients(gradients, max_norm)
    torch.testing.assert_close(gradients, torch.tensor([0.6, 0.0, -0.8]) * expected)


# --- averages of the weights ----------------------------------------------------------------------


def average_of(values, **settings):
    """What the averager leaves of the initial weights values[0] and those after each step."""
    model = torch.nn.Linear(*values.shape[:0:-1], bias=False)
    model.weight.data = torch.from_numpy(values[0]).float()
    averager = tg.WeightAverager(model, config(tg.BASELINE, **settings))
    last = len(values) - 1
    for step in range(1, len(values)):
        model.weight.data = torch.from_numpy(values[step]).float()
        averager.update(step, step / last)
    averager.apply()
    return model.weight.detach().numpy()


def test_average_against_closed_form():
    values = np.array([2.0, 3.0, 5.0, 1.0]).reshape(4, 1, 1)
    expected = 0.75**3 * 2 + 0.25 * (0.75**2 * 3 + 0.75 * 5 + 1)
    found = average_of(values, ema_decay=0.75).item()
    assert math.isclose(found, expected, rel_tol=1e-6)


# What ten steps should leave of weights w[0] (initial), w[1] .. w[10] (after each step).


def from_the_start(w):
    return oracles.ema(w, 0.75)


def late(w):
    return oracles.ema(w[5:], 0.75)


def plain(w):
    return w[[4, 6, 8, 10]].mean(0)


def plain_and_rare(w):
    return w[[3, 6, 9]].mean(0)


def half_and_half(w):
    return 0.5 * oracles.ema(w[1:], 0.9) + 0.5 * w[[5, 10]].mean(0)


def half_and_half_from_the_start(w):
    return 0.5 * oracles.ema(w, 0.9) + 0.5 * w[8]


def last_weights(w):
    return w[10]


AVERAGES = {
    "from the start": (from_the_start, dict(ema_decay=0.75)),
    "late": (late, dict(ema_decay=0.75, ema_start=0.5)),
    "plain": (plain, dict(swa_every=2, swa_start=0.4)),
    "plain, rare": (plain_and_rare, dict(swa_every=3, swa_start=0.0)),
    "half and half": (
        half_and_half,
        dict(ema_decay=0.9, ema_start=0.1, swa_every=5, swa_start=0.4),
    ),
    "half and half from the start": (
        half_and_half_from_the_start,
        dict(ema_decay=0.9, swa_every=4, swa_start=0.7),
    ),
    "none yet": (last_weights, dict(swa_every=20)),
    "not begun": (last_weights, dict(ema_decay=0.9, ema_start=1.0, swa_every=1, swa_start=0.95)),
}


@pytest.mark.parametrize("case", AVERAGES)
def test_averages_equal_closed_forms(case, rng):
    closed_form, settings = AVERAGES[case]
    values = rng.standard_normal((11, 4, 3))
    found = average_of(values, **settings)
    np.testing.assert_allclose(found, closed_form(values), rtol=1e-5, atol=1e-6)
