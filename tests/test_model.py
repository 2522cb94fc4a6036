"""The model against slow, obvious restatements of its formulas."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import FULL, TINY, randomized

import train_gpt as tg


def slow_attention(q, k, v):
    """One position, one head at a time, in float64. q [T, H, D], k, v [T, K, D] -> [T, H, D]."""
    q, k, v = (x.double().numpy() for x in (q, k, v))
    out = np.zeros_like(q)
    for t in range(q.shape[0]):
        for h in range(q.shape[1]):
            kv = h // (q.shape[1] // k.shape[1])
            scores = np.array([q[t, h] @ k[s, kv] / math.sqrt(q.shape[2]) for s in range(t + 1)])
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            out[t, h] = sum(w * v[s, kv] for s, w in enumerate(weights))
    return out


def slow_norm(x):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + np.finfo(np.float32).eps)


def slow_hidden(model, ids):
    """The whole forward pass of one sequence in float64 numpy, from the specification.

    ids [T] -> [T, D].
    """
    cfg = model.cfg
    p = {name: w.detach().double().numpy() for name, w in model.named_parameters()}
    T, D, hd = len(ids), cfg.model_dim, cfg.head_dim
    x = p["tok_emb.weight"][ids].copy()
    if cfg.bigram_vocab_size:
        rows = [cfg.bigram_vocab_size - 1] + [
            ((36313 * int(ids[t])) ^ (27191 * int(ids[t - 1]))) % (cfg.bigram_vocab_size - 1)
            for t in range(1, T)
        ]
        x += p["bigram.embed.weight"][rows] @ p["bigram.proj.weight"].T * p["bigram.scale"]
    x = slow_norm(x)
    if cfg.smear:
        gate, before = 1 / (1 + np.exp(-p["smear.gate"])), x.copy()
        for t in range(T):
            if not (cfg.smear_bos_mask and ids[t] == cfg.bos_id):
                x[t] = (1 - gate) * before[t] + gate * (before[t - 1] if t else 0)
    x0, pushed = x.copy(), []
    dims = cfg.rope_dims or hd
    angle = np.arange(T)[:, None] * cfg.rope_base ** (-np.arange(0, dims, 2) / dims)

    def rope(y):  # [T, H, hd]
        a, b = y[..., : dims // 2], y[..., dims // 2 : dims]
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        return np.concatenate((a * cos + b * sin, -a * sin + b * cos, y[..., dims:]), -1)

    for i in range(cfg.num_layers):
        w = {
            name.removeprefix(f"blocks.{i}."): value
            for name, value in p.items()
            if name.startswith(f"blocks.{i}.")
        }
        if i >= cfg.num_layers // 2 and pushed:
            x = x + p["skip_weights"][i - cfg.num_layers // 2] * pushed.pop()
        x = w["resid_mix"][0] * x + w["resid_mix"][1] * x0
        damping = 1 / math.sqrt(i + 1) if cfg.ln_scale else 1
        n = slow_norm(x) * damping
        v = n @ w["attn.c_v.weight"].T
        if i in cfg.ve_layers:
            e = (
                p["ve_shared.embed.weight"][ids]
                @ p["ve_shared.proj.weight"].T
                * p["ve_shared.scale"]
            )
            v = v + e * p[f"ve_layer_scales.{cfg.ve_layers.index(i)}"]
        q = (
            rope(slow_norm((n @ w["attn.c_q.weight"].T).reshape(T, -1, hd)))
            * w["attn.q_gain"][:, None]
        )
        k = rope(slow_norm((n @ w["attn.c_k.weight"].T).reshape(T, -1, hd)))
        v = v.reshape(T, -1, hd)
        y = slow_attention(*map(torch.from_numpy, (q, k, v)))
        if i >= cfg.num_layers - cfg.xsa_last_n:
            for h in range(cfg.num_heads):
                own = v[:, h // (cfg.num_heads // cfg.num_kv_heads)]
                unit = own / np.linalg.norm(own, axis=-1, keepdims=True)
                y[:, h] -= (y[:, h] * unit).sum(-1, keepdims=True) * unit
        x = x + w["attn_scale"] * (y.reshape(T, D) @ w["attn.proj.weight"].T)
        h = (slow_norm(x) * damping) @ w["mlp.fc.weight"].T
        h = np.where(h > 0, h, cfg.leaky_slope * h) ** 2
        x = x + w["mlp_scale"] * (h @ w["mlp.proj.weight"].T)
        if i < cfg.num_layers // 2:
            pushed.append(x)
    return slow_norm(x)


@pytest.mark.parametrize(
    "settings",
    [
        TINY,
        FULL,
        dict(FULL, num_layers=4, num_kv_heads=4, smear_bos_mask=False),
        dict(TINY, num_layers=1, num_kv_heads=1),
    ],
)
def test_hidden_equals_slow_restatement(settings, rng):
    model = randomized(tg.Config(**settings))
    ids = rng.integers(0, 260, 24)
    ids[[0, 9]] = 1  # document starts
    got = model.hidden(torch.from_numpy(ids)[None])[0].detach().numpy()
    np.testing.assert_allclose(got, slow_hidden(model, ids), atol=2e-4)


def test_logits_and_loss(rng):
    model = randomized(tg.Config(**dict(TINY, tie_embeddings=False, logit_softcap=5.0)))
    ids, targets = (torch.from_numpy(rng.integers(0, 260, (2, 16))) for _ in range(2))
    raw = model.hidden(ids) @ model.lm_head.weight.T
    torch.testing.assert_close(model.logits(ids), 5 * torch.tanh(raw / 5))
    log_p = torch.log_softmax(model.logits(ids).double(), -1)
    expected = -sum(log_p[b, t, targets[b, t]] for b in range(2) for t in range(16)) / 32
    assert math.isclose(model(ids, targets).item(), expected.item(), rel_tol=1e-6)
    uncapped = tg.GPT(tg.Config(**dict(TINY, logit_softcap=0.0)))
    torch.testing.assert_close(
        uncapped.logits(ids), uncapped.hidden(ids) @ uncapped.tok_emb.weight.T
    )


def test_attention_equals_naive_loop(rng):
    q, k, v = (
        torch.from_numpy(rng.standard_normal((1, 20, heads, 8))).float() for heads in (6, 2, 2)
    )
    np.testing.assert_allclose(
        tg.sdpa_attention(q, k, v)[0].numpy(), slow_attention(q[0], k[0], v[0]), atol=1e-5
    )


def test_rope_turns_only_its_dims_and_depends_on_distance_only(rng):
    x, y = (torch.from_numpy(rng.standard_normal(16)).float() for _ in range(2))
    table = tg.rotary_tables(12, 8, 100.0, torch.device("cpu"))
    turned = tg.rotate(x.expand(1, 12, 1, 16), *table)[0, :, 0]
    assert torch.equal(turned[:, 8:], x[8:].expand(12, 8)) and not torch.allclose(
        turned[3, :8], x[:8]
    )
    other = tg.rotate(y.expand(1, 12, 1, 16), *table)[0, :, 0]
    products = turned @ other.T
    for distance in range(6):
        torch.testing.assert_close(
            products.diagonal(distance),
            products[0, distance].expand(12 - distance),
            atol=1e-4,
            rtol=1e-4,
        )


def test_rotary_tables_are_on_the_device_of_the_ids():
    for device in ("cpu", "meta", "cpu"):
        tables = tg.rotary_tables(12, 8, 100.0, torch.device(device))
        assert {table.device.type for table in tables} == {device}


def test_xsa_output_is_orthogonal_to_own_value(rng):
    model = tg.GPT(tg.Config(**TINY))
    attn = model.blocks[0].attn
    attn.xsa, seen = True, {}

    def record(q, k, v):
        seen["v"] = v
        return tg.sdpa_attention(q, k, v)

    attn.proj = torch.nn.Identity()
    x = torch.from_numpy(rng.standard_normal((2, 12, 32))).float()
    context = dataclasses.replace(model.context(x), backend=record)
    out = attn(x, None, 0, context).view(2, 12, 4, 8)
    own = seen["v"].repeat_interleave(2, dim=2)
    assert (out * own).sum(-1).abs().max() < 1e-5
    assert out[:, 0].abs().max() < 1e-6  # alone with itself, nothing is left
    assert out[:, 5].abs().max() > 1e-3


def test_smear_lets_nothing_across_a_document_start():
    cfg = tg.Config(**dict(TINY, smear=True, smear_bos_mask=True))
    smear, x = tg.SmearGate(cfg), torch.randn(1, 4, 32)
    torch.nn.init.zeros_(smear.gate)
    out = smear(x, torch.tensor([[5, 6, 1, 7]]))
    torch.testing.assert_close(out[0, 1], (x[0, 0] + x[0, 1]) / 2)  # gate 0: half and half
    assert torch.equal(out[0, 2], x[0, 2])
    torch.testing.assert_close(out[0, 3], (x[0, 2] + x[0, 3]) / 2)


# Switch -> (settings on, parameters that must appear). Every one must change the logits of a
# randomised model.
SWITCHES = {
    "bigram": (
        dict(bigram_vocab_size=64, bigram_dim=8),
        {"bigram.embed.weight", "bigram.proj.weight", "bigram.scale"},
    ),
    "smear": (dict(smear=True), {"smear.gate"}),
    "value embedding": (
        dict(ve_layers=(1,), ve_dim=8),
        {"ve_shared.embed.weight", "ve_shared.proj.weight", "ve_shared.scale", "ve_layer_scales.0"},
    ),
    "untied": (dict(tie_embeddings=False), {"lm_head.weight"}),
    "xsa": (dict(xsa_last_n=1), set()),
    "ln_scale": (dict(ln_scale=True), set()),
    "partial rope": (dict(rope_dims=2), set()),
    "leaky": (dict(leaky_slope=0.5), set()),
    "softcap off": (dict(logit_softcap=0.0), set()),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_switch_is_alive_and_absent_when_off(switch):
    settings, added = SWITCHES[switch]
    shallow = dict(TINY, num_layers=2)
    off, on = (randomized(tg.Config(**cfg)) for cfg in (shallow, dict(shallow, **settings)))
    on.load_state_dict(off.state_dict(), strict=False)  # all that is shared has equal weights
    assert set(dict(on.named_parameters())) - set(dict(off.named_parameters())) == added
    ids = torch.arange(40, 56)[None]
    torch.compiler.reset()
    compiled = torch.compile(on.logits, backend="aot_eager", fullgraph=True)(ids)
    torch.testing.assert_close(compiled, on.logits(ids))
    assert (compiled - off.logits(ids)).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["unet_skips", "x0_mix"])
def test_default_parts_can_be_absent(name):
    with_part, without = (
        dict(tg.GPT(tg.Config(**TINY | {name: on})).named_parameters()) for on in (True, False)
    )
    parts = {"unet_skips": {"skip_weights"}, "x0_mix": {f"blocks.{i}.resid_mix" for i in range(3)}}
    assert with_part.keys() - without.keys() == parts[name]
    assert torch.isfinite(
        tg.GPT(tg.Config(**dict(TINY, **{name: False}))).logits(torch.arange(8)[None])
    ).all()


def test_smear_mask_is_alive():
    ids = torch.tensor([[5, 6, 1, 7]])
    model = randomized(tg.Config(**dict(TINY, smear=True)))
    masked = tg.GPT(tg.Config(**dict(TINY, smear=True, smear_bos_mask=True)))
    masked.load_state_dict(model.state_dict())
    assert torch.equal(model.logits(ids)[:, :2], masked.logits(ids)[:, :2])
    assert not torch.allclose(model.logits(ids)[:, 2], masked.logits(ids)[:, 2])


def test_a_module_more_changes_no_other_initial_value():
    small, large = tg.GPT(tg.Config(**TINY)), tg.GPT(tg.Config(**FULL | dict(mlp_mult=2.0)))
    for name, p in small.named_parameters():
        assert torch.equal(p, dict(large.named_parameters())[name]), name
    assert not torch.equal(small.tok_emb.weight, tg.GPT(tg.Config(**TINY, seed=1)).tok_emb.weight)


def test_matrices_of_one_shape_start_differently():
    model = tg.GPT(tg.Config(**FULL))
    weights = [p.detach() for name, p in model.named_parameters() if name.endswith("weight")]
    starts = [w.flatten() for w in weights if w.any()]  # some start at zero
    pairs = [(a, b) for a, b in itertools.combinations(starts, 2) if len(a) == len(b)]
    assert len(pairs) > 20
    for a, b in pairs:  # independent draws: about 1 / sqrt(elements)
        assert abs(torch.corrcoef(torch.stack((a, b)))[0, 1]) < 0.2


def test_every_parameter_moves_within_a_few_steps(rng):
    model, rt = tg.GPT(tg.Config(**FULL)), tg.Runtime(tg.Config(device="cpu"), {})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = tg.build_optimizers(model, model.cfg, rt)
    for _ in range(3):
        ids = torch.from_numpy(rng.integers(0, 260, (2, 33)))
        model.zero_grad()
        model(ids[:, :-1], ids[:, 1:]).backward()
        for optimizer in optimizers:
            optimizer.step()
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not still


def test_baseline_parameter_count():
    assert sum(p.numel() for p in tg.GPT(tg.Config()).parameters()) == 17_059_912


def test_training_flops_by_hand():
    cfg = tg.Config(
        vocab_size=1024, num_layers=4, model_dim=256, num_heads=8, num_kv_heads=4, train_seq_len=512
    )
    layer = 256 * 256 * 2 + 2 * 256 * 128 + 2 * 256 * 512
    attention = 4 * 3 * 4 * 256 * (512 / 2)  # two products, forward and twice backward
    assert tg.training_flops(cfg, tg.GPT(cfg)) == 6 * (4 * layer + 1024 * 256) + attention
