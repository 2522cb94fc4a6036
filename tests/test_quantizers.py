"""Quantizers (section 7): rows as whole numbers, GPTQ, fake quantization and its penalty."""

import dataclasses
import math

import numpy as np
import oracles
import pytest
import torch
from conftest import TINY
from helpers import compiled, config, random_ids, randomized

import train_gpt as tg

SMALL = dict(TINY, num_layers=2)


def top_level(bits):
    return 2 ** (bits - 1) - 1


def normal(rng, *shape):
    return torch.from_numpy(rng.standard_normal(shape)).float()


def there_and_back(w, bits, hessian=None, **settings):
    """Weights after a quantizer."""
    quantizer = tg.RowInt(bits)
    return quantizer.decode(*quantizer.fit(w, tg.Config(**settings), hessian))


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [5, 6, 8])
def test_row_quantizer_error_bounds(bits, rng):
    """Half a step without a search for the clip; with it, the squared error is no larger."""
    spread = torch.from_numpy(np.exp(rng.standard_normal((40, 1)) * 3)).float()
    w = normal(rng, 40, 64) * spread
    w[3] = 0
    whole = there_and_back(w, bits, quant_clip_steps=1)
    clipped = there_and_back(w, bits, quant_clip_steps=16)
    top = top_level(bits)
    step = w.abs().amax(1, keepdim=True) / top
    bound = 0.505 * step + 2.0**-24 * top  # float16 scales round
    assert ((whole - w).abs() <= bound).all()
    before = (whole - w).square().sum(1)
    after = (clipped - w).square().sum(1)
    assert (after <= before * 1.0001).all()
    assert bits == 8 or after.sum() < before.sum()
    assert torch.equal(whole[3], torch.zeros(64))


def test_clip_search_is_the_best_of_what_it_tries(rng):
    w = normal(rng, 1, 32) ** 3
    error = (there_and_back(w, 4) - w).square().sum().item()
    least = oracles.best_clip_error(w.numpy(), top_level(4))
    assert abs(error - least) < 1e-4 * least


def test_hessian_weighs_the_columns(rng):
    """Of an artifact's matrix: less error where the inputs are large."""
    name = "blocks.0.mlp.fc.weight"
    cfg = config(TINY, quant_bits=3, mlp_mult=1.0)
    state = tg.GPT(cfg).state_dict()
    w = state[name] = normal(rng, 32, 32)
    h = torch.diag(torch.tensor([100.0] * 8 + [0.01] * 24))

    def weighted_error(hessians):
        _, weights = tg.unpack(tg.pack(state, cfg, hessians))
        return ((weights[name] - w).square() * h.diagonal()).sum()

    assert weighted_error({name: h}) < weighted_error(None)


ROW_SIZES = torch.tensor([0.001, 0.1, 0.9, 1.5, 7.0, 0.0])


@pytest.mark.parametrize("bits", [4, 5, 8])
def test_scale_floor(bits, rng):
    """Steps are at least 1 / top level: rows below 1 share it, rows above are as without."""
    w = normal(rng, 6, 50)
    w = w / w.abs().amax(1, keepdim=True) * ROW_SIZES[:, None]
    floor = np.float16(1 / top_level(bits))

    def scales(**settings):
        _, found = tg.RowInt(bits).fit(w, tg.Config(**settings))
        return found.numpy()[:, 0]

    for clip_steps in (1, 16):
        floored = scales(quant_scale_floor=True, quant_clip_steps=clip_steps)
        assert (floored >= floor).all()
        assert (floored[[0, 1, 2, 5]] == floor).all()
    floored = scales(quant_scale_floor=True, quant_clip_steps=1)
    plain = scales(quant_scale_floor=False, quant_clip_steps=1)
    assert np.array_equal(plain[3:5], floored[3:5])
    assert (plain[:3] < floor).all()


# --- GPTQ -----------------------------------------------------------------------------------------


@dataclasses.dataclass
class Layer:
    """A matrix, and X^T X / n of correlated inputs, two columns of which are never used."""

    w: np.ndarray
    hessian: np.ndarray
    bits: int
    damp: float

    def gptq(self, scale):
        """Codes by the slow rule."""
        return oracles.gptq(self.w, scale, self.hessian, top_level(self.bits), self.damp)

    def output_error(self, decoded):
        wrong = decoded - self.w
        return np.trace(wrong @ self.hessian @ wrong.T)


@pytest.fixture(params=[(4, 24, 0.01), (3, 150, 0.1), (8, 40, 0.01)])
def layer(request, rng):
    bits, cols, damp = request.param
    w = rng.standard_normal((6, cols))
    x = rng.standard_normal((4 * cols, cols))
    mixed = rng.standard_normal((cols, cols)) / 3
    mixed += np.eye(cols)
    x = x @ mixed
    x[:, [2, 9]] = 0
    hessian = x.T @ x / len(x)
    return Layer(w.astype(np.float32), hessian.astype(np.float32), bits, damp)


def test_gptq_equals_column_by_column(layer):
    """Levels of the slow rule, less output error than plain rounding on correlated inputs.

    Dead columns are 0.
    """
    top = top_level(layer.bits)
    highest = np.abs(layer.w).max(1, keepdims=True)
    scale = highest / np.float32(top)
    arrays = [torch.from_numpy(array) for array in (layer.w, scale, layer.hessian)]
    w, steps, hessian = arrays
    rounded = tg.RowInt(layer.bits)._rounded
    factor = tg.inverse_factor(hessian, layer.damp)
    (codes,) = tg.gptq(w[None], steps[None], [factor], rounded).numpy()
    np.testing.assert_array_equal(codes, layer.gptq(scale[:, 0].astype(np.float64)))
    plain = oracles.rounded(layer.w, scale, top)
    error = layer.output_error(codes * scale)
    assert error < 0.9 * layer.output_error(plain * scale)
    assert not codes[:, [2, 9]].any()
    assert plain[:, [2, 9]].any()


def test_packed_rows_with_a_hessian_are_gptqs(layer):
    """With the scales that the search for the clip has found."""
    cfg = config(TINY, quant_clip_steps=8, gptq_damp=layer.damp)
    w = torch.from_numpy(layer.w)
    codes, scales = tg.RowInt(layer.bits).fit(w, cfg, torch.from_numpy(layer.hessian))
    expected = layer.gptq(scales.numpy()[:, 0].astype(np.float64))
    np.testing.assert_array_equal(codes.numpy(), expected)


# --- fake quantization while training -------------------------------------------------------------


def test_fake_quantization_acts_in_a_compiled_model(rt, run_log, rng):
    """Switched after the first trace it still changes the loss; off is as before.

    Gradients reach the weights.
    """
    cfg = config(TINY, num_layers=1, quant_bits=3)
    model = randomized(cfg)
    trainer = tg.Trainer(cfg, rt, run_log, model, None)
    assert len(trainer.quantized) == 6
    ids = random_ids(rng, 2, 16)
    targets = random_ids(rng, 2, 16)
    loss_of = compiled(model)
    losses = []
    gradients = []
    for on in (False, True, False):
        trainer.fake_quantization(on)
        trainer.gradients.zero_()
        loss = loss_of(ids, targets)
        torch.testing.assert_close(loss, model(ids, targets))
        loss.backward()
        losses.append(loss.item())
        gradients.append(trainer.gradients.clone())
        for name, p in model.named_parameters():
            assert p.grad.abs().max() > 0, name
    off, on, off_again = losses
    assert off == off_again != on
    assert torch.equal(gradients[0], gradients[2])
    assert not torch.allclose(gradients[0], gradients[1])


@pytest.mark.parametrize("floor", [False, True])
def test_trainer_fakes_by_the_policy(floor, rt, run_log):
    """The settings' bits and floor, matrix by matrix."""
    cfg = config(SMALL, quant_policy="attn:4,mlp:3", quant_scale_floor=floor)
    trainer = tg.Trainer(cfg, rt, run_log, randomized(cfg), None)
    trainer.fake_quantization(True)
    modules = trainer.model.named_modules()
    linears = {name: m for name, m in modules if isinstance(m, tg.Linear)}
    assert len(linears) == 12
    for name, linear in linears.items():
        w = linear.weight.detach().numpy()
        top = top_level(4 if ".attn." in name else 3)
        step = np.abs(w).max(1, keepdims=True) / np.float32(top)
        if floor:
            step = np.maximum(step, np.float32(1 / top))
        faked = linear(torch.eye(w.shape[1])).detach().T.numpy()
        expected = np.round(w / step) * step
        np.testing.assert_allclose(faked, expected, atol=1e-6, err_msg=name)


def levels_far_from_ties(rng, top, small):
    """Weights in units of their rows' steps, so that none can flip; one column is the largest.

    small: most rows reach half of the top level only, so that a floor sets their steps.
    """
    offsets = rng.uniform(-0.4, 0.4, (24, 40))
    levels = (rng.integers(-top, top + 1, (24, 40)) + offsets).clip(-top, top)
    levels[:, 7] = top
    if small:
        levels = np.where(np.abs(levels) > 0.7 * top, levels.round() // 2, levels)
    return levels


def test_fake_quantization_reaches_an_output_matrix_of_its_own(rng):
    cfg = config(TINY, tie_embeddings=False)
    model = tg.GPT(cfg)
    model.lm_head.weight.data.normal_()
    hidden = torch.from_numpy(rng.standard_normal((5, cfg.model_dim))).float()
    exact = model.head(hidden)
    model.lm_head.fake_qmax = 3
    assert (model.head(hidden) - exact).abs().max() > 0.01


@pytest.mark.parametrize("bits, floor", [(5, False), (6, True), (8, False)])
def test_fake_quantized_weights_are_what_packing_gives(bits, floor, rng):
    """Up to float16 rounding of the scales; the gradient passes as if nothing had been rounded."""
    top = top_level(bits)
    levels = levels_far_from_ties(rng, top, small=floor)
    steps = np.full((24, 1), 1 / top) if floor else 10 ** rng.uniform(-4, 1, (24, 1))
    linear = tg.Linear(40, 24)
    linear.weight.data = torch.from_numpy(levels * steps).float()
    linear.fake_qmax = top
    linear.fake_floor = floor
    w = linear.weight.detach()
    unpacked = there_and_back(w, bits, quant_clip_steps=1, quant_scale_floor=floor)
    faked = linear(torch.eye(40)).detach().T
    rounded = torch.from_numpy(levels.round() * steps).float()
    torch.testing.assert_close(faked, unpacked, rtol=2**-10, atol=1e-7)
    torch.testing.assert_close(faked, rounded, rtol=1e-5, atol=1e-7)
    x = normal(rng, 9, 40)
    push = normal(rng, 9, 24)
    (linear(x) * push).sum().backward()
    torch.testing.assert_close(linear.weight.grad, push.T @ x)


@pytest.mark.parametrize("floor", [False, True])
def test_quantization_penalty_equals_loops(floor, rng):
    """lambda / 12 times the sum over matrices of mean(w^2 step^2).

    The steps know no floor and are constants.
    """
    policy = dict(quant_policy="attn:5,mlp:4", quant_scale_floor=floor)
    cfg = config(SMALL, crown_q_lambda=0.3, **policy)
    model = randomized(cfg)
    matrices = {}
    tops = {}
    for name, p in model.named_parameters():
        if name.endswith(("c_q.weight", "c_k.weight", "c_v.weight", "proj.weight", "fc.weight")):
            matrices[name] = p.detach().double().numpy()
            tops[name] = 15 if ".attn." in name else 7
    assert len(matrices) == 12
    expected, gradients = oracles.quantization_penalty(matrices, tops, 0.3)
    penalty = tg.quantization_penalty(tg.quantized_matrices(model, cfg), cfg)
    assert math.isclose(penalty.item(), expected, rel_tol=1e-5)
    penalty.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == gradients.keys()
    for name, wanted in gradients.items():
        np.testing.assert_allclose(found[name].numpy(), wanted, rtol=1e-4)


# --- water-filled steps ---------------------------------------------------------------------------


@dataclasses.dataclass
class Filled:
    """A matrix [24, 40], X^T X / n of correlated inputs, and what its rows' outputs matter."""

    w: np.ndarray
    hessian: np.ndarray
    importance: np.ndarray
    damp: float = 0.01

    def steps(self, c):
        """c U_jj importance^-1/2; U_jj^-2: what is left of input j, given those after it."""
        h = self.hessian + self.damp * np.diagonal(self.hessian).mean() * np.eye(40)
        order = sorted(range(40), key=lambda j: -self.hessian[j, j])
        left = np.empty(40)
        for at, j in enumerate(order):
            later = order[at + 1 :]
            cross = h[np.ix_(later, [j])]
            explained = cross.T @ np.linalg.solve(h[np.ix_(later, later)], cross)
            left[j] = h[j, j] - explained.item()
        return c * np.outer(self.importance**-0.5, left**-0.5)

    def fit(self, kind, c):
        w = torch.from_numpy(self.w)
        importance = torch.from_numpy(self.importance)
        quantizer = tg.QUANTIZERS[kind]
        (found,) = quantizer.fit_many(w[None], [self.factor()], importance[None], c)
        return found

    def factor(self):
        return tg.inverse_factor(torch.from_numpy(self.hessian), self.damp)

    def loss(self, decoded):
        """Half of the importance-weighted error of the outputs."""
        wrong = decoded - self.w
        return (self.importance * np.einsum("rc,cd,rd->r", wrong, self.hessian, wrong)).sum() / 2


@pytest.fixture
def filled(rng):
    mixed = rng.standard_normal((40, 40)) / 4
    mixed += np.eye(40)
    x = rng.standard_normal((400, 40))
    x = x @ mixed
    x *= np.exp(rng.standard_normal(40))
    hessian = x.T @ x / 400
    importance = np.exp(rng.standard_normal(24))
    w = rng.standard_normal((24, 40))
    return Filled(*[array.astype(np.float32) for array in (w, hessian, importance)])


def test_water_filled_steps_and_codes_equal_the_slow_rule(filled):
    """Steps to a sixteenth of an octave; at these steps, codes of the column by column oracle."""
    q, columns, rows = filled.fit("step16", 0.1)
    row_steps = tg.step_of(rows).numpy()
    column_steps = tg.step_of(columns).numpy()
    steps = np.outer(row_steps, column_steps)
    octaves = np.log2(steps / filled.steps(0.1))
    assert np.abs(octaves).max() <= 1 / 8 + 1e-5
    slow = oracles.gptq(filled.w, steps.astype(np.float64), filled.hessian, 32767, filled.damp)
    np.testing.assert_array_equal(q.numpy(), slow)
    decoded = tg.QUANTIZERS["step16"].decode(q, columns, rows)
    np.testing.assert_allclose(decoded.numpy(), slow * steps, rtol=1e-6)


def test_the_loss_of_fine_steps_is_what_c_says(filled, rng):
    """c^2 / 24 a weight, for a Hessian without damping."""
    filled.damp = 1e-6
    filled.w = np.tile(filled.w, (16, 1)) + rng.standard_normal((384, 40)).astype(np.float32)
    filled.importance = np.tile(filled.importance, 16)
    decoded = tg.QUANTIZERS["step16"].decode(*filled.fit("step16", 0.02)).numpy()
    loss = filled.loss(decoded.astype(np.float64))
    assert abs(loss / (filled.w.size * 0.02**2 / 24) - 1) < 0.1


def test_matrices_fitted_together_equal_each_alone(filled, rng):
    other = Filled(filled.w[::-1].copy(), np.eye(40, dtype=np.float32), filled.importance)
    parts = [filled, other]
    w = torch.from_numpy(np.stack([part.w for part in parts]))
    importance = torch.from_numpy(np.stack([part.importance for part in parts]))
    factors = [part.factor() for part in parts]
    both = tg.QUANTIZERS["step16"].fit_many(w, factors, importance, 0.3)
    for found, part in zip(both, parts):
        for together, alone in zip(found, part.fit("step16", 0.3)):
            assert torch.equal(together, alone)


def test_steps_are_exact_powers():
    exponents = torch.arange(-128, 128).to(torch.int8)
    steps = tg.step_of(exponents).double()
    np.testing.assert_allclose(steps, 2.0 ** (exponents.double() / 8), rtol=1e-7)
    assert torch.equal(tg.exponent(steps), exponents)


# --- clipping by deviations, corrections ----------------------------------------------------------


def test_rows_clipped_by_deviations_and_rows_that_would_be_lost(rng):
    w = normal(rng, 4, 50)
    w[1] = 0
    w[2] = 3
    w[3] = 5 + w[3] / 1000
    q, scales = tg.RowInt(6).fit(w, tg.Config(), None, 12.0)
    centred = w[0] - w[0].mean()
    deviation = math.sqrt((centred**2).sum() / 49)
    assert scales[0] == np.float16(12 * deviation / 31)
    decoded = tg.RowInt(6).decode(q, scales)
    assert not decoded[1].any()
    wrong = decoded[2:] / w[2:] - 1
    assert wrong.abs().max() < 0.02


@pytest.mark.parametrize("shape", [(20, 30), (3, 50), (40, 2), (1, 1)])
def test_a_correction_of_low_rank_takes_error_away(shape, rng):
    """Of full precision factors it would be the best of its rank; two and four bits come close."""
    rows, columns = shape
    cfg = tg.Config(lqer_enabled=True, lqer_rank=2, lqer_asym_group=32)
    plain = tg.RowInt(3)
    corrected = tg.LowRankCorrected(plain, cfg)
    w = normal(rng, rows, columns)
    w += 3 * normal(rng, rows, 1) @ normal(rng, 1, columns)
    base = plain.fit(w, tg.Config(quant_clip_steps=1))
    rounded = plain.decode(*base)
    missing = w - rounded
    factors = corrected.factors(missing)
    shapes = [part.shape for part in corrected.layout(shape)]
    assert shapes == [tuple(array.shape) for array in (*base, *factors)]
    restored = corrected.decode(*base, *factors)
    assert (w - restored).norm() <= missing.norm()

    first, scale, second, scales = [factor.numpy() for factor in factors]
    assert first.min() >= -2
    assert first.max() <= 1
    assert second.min() >= -8
    assert second.max() <= 7
    each = np.repeat(scales.astype(float), 32)
    each = each[: second.size].reshape(second.shape)
    left = first * float(scale[0])
    right = second * each
    np.testing.assert_allclose(restored - rounded, left @ right, atol=1e-5)
