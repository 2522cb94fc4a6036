"""Muon, parameter groups, schedules, averaging; against closed forms.

The originals' steps are in test_seeds.py.
"""

import math

import numpy as np
import pytest
import torch
from conftest import FULL, TINY, take_step

import train_gpt as tg


@pytest.mark.parametrize("shape", [(24, 24), (16, 48), (48, 16)])
def test_newton_schulz_against_svd(shape):
    g = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    out = tg.newton_schulz(g, 5)
    for before, after in zip(g.double(), out.double()):
        u, s, vh = torch.linalg.svd(before, full_matrices=False)
        s = s / s.norm()  # the Frobenius norm is the singular values' own
        for _ in range(5):  # singular vectors stay, values follow a quintic
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        torch.testing.assert_close(after, u @ torch.diag(s) @ vh, atol=2e-4, rtol=1e-3)
        assert s.max() < 1.3 and s.median() > 0.6


@pytest.mark.parametrize("rows, columns, size", [(12, 6, 2**0.5), (6, 6, 1), (6, 12, 1)])
def test_muon_step_by_hand(rows, columns, size):
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(rows, columns, generator=generator))
    start, buffer = p.detach().clone(), torch.zeros(rows, columns)
    muon = tg.Muon([p], lr=0.1, momentum=0.9, weight_decay=0.5)
    for _ in range(2):
        p.grad = torch.randn(rows, columns, generator=generator)
        buffer = 0.9 * buffer + p.grad
        u = p.grad + 0.9 * buffer
        x = u / (u.norm() + 1e-7)
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        start = start * (1 - 0.1 * 0.5) - 0.1 * size * x
        muon.step()
        torch.testing.assert_close(p.detach(), start, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("settings", [TINY, FULL, dict(FULL, tie_embeddings=False)])
def test_every_parameter_is_in_exactly_one_group(settings, rt):
    cfg = tg.Config(**settings)
    model = tg.GPT(cfg)
    groups = tg.parameter_groups(model, cfg)
    names = [name for members in groups.values() for name, _ in members]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    held = [
        p for o in tg.build_optimizers(model, cfg, rt) for g in o.param_groups for p in g["params"]
    ]
    assert len(held) == len({id(p) for p in held}) == len(list(model.parameters()))
    assert all(
        p.ndim == 2 and "tok_emb" not in name and "resid_mix" not in name
        for name, p in groups["matrices"]
    )
    assert {name for name, _ in groups["embed"]} == (
        set() if cfg.tie_embeddings else {"tok_emb.weight"}
    )


def test_a_parameter_without_a_rule_is_an_error():
    model = torch.nn.ParameterDict({"odd": torch.zeros(2, 2, 2)})
    with pytest.raises(ValueError, match="no optimizer group takes odd"):
        tg.parameter_groups(model, tg.Config())


def test_schedules():
    cfg = tg.Config(
        warmdown_iters=6,
        iterations=10,
        muon_momentum_warmup_steps=4,
        muon_momentum=0.9,
        muon_momentum_warmup_start=0.5,
    )
    assert [tg.warmdown(cfg, i, 10 - i) for i in range(11)] == [
        min(1, (10 - i) / 6) for i in range(11)
    ]
    assert tg.warmdown(cfg, 0, math.inf) == 1 and tg.warmdown(cfg, 0, -1) == 0
    assert tg.warmdown(tg.Config(warmdown_iters=0), 5, 0) == 1
    assert [round(tg.momentum_warmup(cfg, i, 0), 6) for i in (0, 1, 4, 99)] == [0.5, 0.6, 0.9, 0.9]


def test_steps_set_rates_and_momentum_from_their_start(rt, run_log, rng):
    """Factors of the rate that the settings name, not of the last step's."""
    cfg = tg.Config(
        **dict(
            TINY, schedule="tokens", warmdown_iters=4, iterations=4, muon_momentum_warmup_steps=2
        )
    )
    trainer = tg.Trainer(cfg, rt, run_log, tg.GPT(cfg), None)
    batch = rng.integers(0, 260, (2, 2, 32))
    for step, (factor, momentum) in enumerate(((1, 0.85), (0.75, 0.9), (0.5, 0.95), (0.25, 0.95))):
        trainer.steps_done = step
        take_step(trainer, lambda unit: batch)
        muon, adam = (optimizer.param_groups for optimizer in trainer.optimizers)
        rates = [group["lr"] for group in (*muon, *adam)]
        np.testing.assert_allclose(rates, np.array([0.04, 0.05, 0.04]) * factor)
        assert math.isclose(muon[0]["momentum"], momentum)


def test_average_against_closed_form():
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(2.0)
    averager = tg.WeightAverager(model, tg.Config(ema_decay=0.75))
    values = [3.0, 5.0, 1.0]
    for step, value in enumerate(values, 1):
        model.weight.data.fill_(value)
        averager.update(step, step / len(values))
    averager.apply()
    expected = 0.75**3 * 2 + sum(0.25 * 0.75 ** (2 - i) * v for i, v in enumerate(values))
    assert math.isclose(model.weight.item(), expected, rel_tol=1e-6)


@pytest.mark.parametrize("max_norm, expected", [(1.0, 1.0), (4.9, 4.9), (5.1, 5.0), (50.0, 5.0)])
def test_clipping_only_makes_gradients_shorter(max_norm, expected):
    gradients = torch.tensor([3.0, 0.0, -4.0])
    tg.clip_gradients(gradients, max_norm)
    torch.testing.assert_close(gradients, torch.tensor([0.6, 0.0, -0.8]) * expected)
