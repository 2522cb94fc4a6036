"""A fresh model (section 5): initial values, their independence, and that all of them learn."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import FULL, TINY
from helpers import config, random_ids

import train_gpt as tg


def test_a_module_more_changes_no_other_initial_value():
    """Each parameter is drawn from the seed and its own name."""
    small = tg.GPT(config(TINY))
    large = dict(tg.GPT(config(FULL, mlp_mult=2.0)).named_parameters())
    for name, p in small.named_parameters():
        assert torch.equal(p, large[name]), name
    other_seed = tg.GPT(config(TINY, seed=1))
    assert not torch.equal(small.tok_emb.weight, other_seed.tok_emb.weight)


def test_matrices_of_one_shape_start_differently():
    """Independent draws correlate by about 1 / sqrt(elements)."""
    model = tg.GPT(config(FULL))
    weights = [p.detach() for name, p in model.named_parameters() if name.endswith("weight")]
    starts = [w.flatten() for w in weights if w.any()]  # some start at zero
    pairs = [(a, b) for a, b in itertools.combinations(starts, 2) if len(a) == len(b)]
    assert len(pairs) > 20
    for pair in pairs:
        assert abs(torch.corrcoef(torch.stack(pair))[0, 1]) < 0.2


ORTHOGONAL = ("c_q.weight", "c_k.weight", "c_v.weight", "fc.weight")
SIDE_TABLES = ("bigram.proj.weight", "ve_shared.proj.weight")
OUTPUTS = ("attn.proj.weight", "mlp.proj.weight")


@pytest.mark.parametrize("start, gain", [("plain", 1), ("scaled", 1 / 8**0.5)])
def test_orthogonal_start(start, gain):
    """Every matrix that is not zero has equal singular values.

    They are 1, those of the side tables' projections the gain.
    """
    model = tg.GPT(config(FULL, num_layers=4, ortho_init=start))
    for name, p in model.named_parameters():
        if name.endswith(OUTPUTS):
            assert not p.any()
        elif name.endswith(ORTHOGONAL) or name in SIDE_TABLES:
            values = torch.linalg.svdvals(p.detach().double())
            wanted = torch.full_like(values, gain if name in SIDE_TABLES else 1)
            torch.testing.assert_close(values, wanted, atol=1e-5, rtol=1e-5, msg=name)


def test_start_without_orthogonal_matrices():
    """The baseline's; its side tables' projections start at zero."""
    model = tg.GPT(config(FULL))
    assert torch.linalg.svdvals(model.blocks[0].attn.c_q.weight).std() > 0.1
    assert not model.ve_shared.proj.weight.any()


@pytest.mark.parametrize("on", [True, False])
def test_depth_scaled_start(on):
    """1 / sqrt(layer + 1) for both scales of a block, which stay learnable; 1 without."""
    model = tg.GPT(config(TINY, num_layers=5, depth_scale_init=on))
    for layer, block in enumerate(model.blocks):
        expected = 1 / math.sqrt(layer + 1) if on else 1
        for scale in (block.attn_scale, block.mlp_scale):
            np.testing.assert_allclose(scale.detach().numpy(), expected, rtol=1e-6)
            assert scale.requires_grad
    ids = torch.randint(4, 260, (1, 8))
    assert model(ids, ids).isfinite()


@pytest.mark.parametrize("orders", [2, 6])
def test_start_of_mixer_head(orders):
    """Constants of the published scripts.

    With every order counting the network starts at e^2 / (e^2 + K).
    """
    head = tg.GPT(config(FULL, mixer_head=True, ngram_order=1 + orders)).alpha_head
    assert not head.weight.any()
    assert head.bias.tolist() == [2.0] + [0.0] * orders
    gate = head(torch.randn(32))
    network = tg.mix(gate, torch.tensor(1.0), torch.zeros(orders), 0.0).item()
    assert math.isclose(network, math.e**2 / (math.e**2 + orders), rel_tol=1e-5)


def test_start_of_blocks_and_side_branches():
    """Constants of the published scripts."""
    model = tg.GPT(config(FULL, qk_gain_init=1.7))
    assert not model.smear.gate.any()
    assert abs(model.ve_shared.embed.weight.std() - 0.01) < 0.001
    scales = [model.bigram.scale, model.ve_shared.scale, *model.ve_layer_scales]
    assert [round(scale.item(), 6) for scale in scales] == [0.05, 0.1, 1, 1]
    stream_alone = torch.tensor([1.0, 0.0])[:, None]
    for block in model.blocks:
        assert (block.resid_mix == stream_alone).all()
        assert (block.attn.q_gain == 1.7).all()
        assert not block.attn.proj.weight.any()
        assert not block.mlp.proj.weight.any()


def bigram_learns(model, rng):
    """Whether gradients reach the bigram branch's table, projection and scale."""
    model.zero_grad()
    model(random_ids(rng, 2, 32), random_ids(rng, 2, 32)).backward()
    branch = model.bigram
    parameters = (branch.embed.weight, branch.proj.weight, branch.scale)
    return [bool(p.grad.any()) for p in parameters]


# Kind of start -> whether table and projection are not zero, and which gradients come at first.
BIGRAM_STARTS = {
    "zero": (False, True, [True, False, False]),
    "normal": (True, True, [True, True, True]),
    "dead": (False, False, [False, False, False]),
}


@pytest.mark.parametrize("kind", BIGRAM_STARTS)
def test_bigram_start(kind, rng, rt):
    """dead never gets a gradient; zero lives through its projection; normal is N(0, 1)."""
    table_lives, projection_lives, learns = BIGRAM_STARTS[kind]
    start = dict(bigram_init=kind, tied_embed_init_std=0.5, muon_wd=0.1)
    cfg = config(FULL, bigram_vocab_size=512, **start)
    model = tg.GPT(cfg)
    table = model.bigram.embed.weight.detach()
    projection = model.bigram.proj.weight.detach()
    assert bool(table.any()) == table_lives
    assert bool(projection.any()) == projection_lives
    if kind == "normal":
        assert abs(table.mean()) < 0.06
        assert abs(table.std() - 1) < 0.05
    assert model.bigram.scale.item() == pytest.approx(0.05)
    assert bigram_learns(model, rng) == learns
    optimizers = tg.build_optimizers(model, cfg, rt)
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.step()
        learns = bigram_learns(model, rng)
    assert learns == [kind != "dead"] * 3
    if kind == "dead":
        assert not table.any()
        assert not projection.any()


def test_every_parameter_moves_within_a_few_steps(rng, rt):
    model = tg.GPT(config(FULL))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = tg.build_optimizers(model, model.cfg, rt)
    for _ in range(3):
        ids = random_ids(rng, 2, 33)
        model.zero_grad()
        model(ids[:, :-1], ids[:, 1:]).backward()
        for optimizer in optimizers:
            optimizer.step()
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not still
