"""The model (section 5): the forward pass against slow restatements, and what each switch does."""

import dataclasses
import math

import numpy as np
import oracles
import pytest
import torch
from conftest import FULL, TINY
from helpers import compiled, config, largest, names_of, random_ids, randomized

import train_gpt as tg

CPU = torch.device("cpu")


def hidden_of(model, ids):
    """Final hidden states [T, D] of one sequence, in numpy."""
    return model.hidden(torch.from_numpy(ids)[None])[0].detach().numpy()


def vector(rng):
    return torch.from_numpy(rng.standard_normal(16)).float()


# --- the whole pass -------------------------------------------------------------------------------

MODELS = {
    "baseline": TINY,
    "everything": FULL,
    "even layers, all heads, documents smeared": dict(
        FULL, num_layers=4, num_kv_heads=4, smear_bos_mask=False
    ),
    "one layer": dict(TINY, num_layers=1, num_kv_heads=1),
}


@pytest.mark.parametrize("name", MODELS)
def test_hidden_equals_slow_restatement(name, rng):
    model = randomized(tg.Config(**MODELS[name]))
    ids = rng.integers(0, 260, 24)
    ids[[0, 9]] = 1  # document starts
    expected = oracles.ForwardPass(model, ids).hidden()
    np.testing.assert_allclose(hidden_of(model, ids), expected, atol=2e-4)


def test_logits_and_loss(rng):
    """Capped logits of the untied head; the loss is their mean nats."""
    model = randomized(config(TINY, tie_embeddings=False, logit_softcap=5.0))
    ids = random_ids(rng, 2, 16)
    targets = random_ids(rng, 2, 16)
    raw = model.hidden(ids) @ model.lm_head.weight.T
    logits = model.logits(ids)
    torch.testing.assert_close(logits, 5 * torch.tanh(raw / 5))
    log_p = torch.log_softmax(logits.double(), -1)
    nats = [-log_p[b, t, targets[b, t]].item() for b, t in np.ndindex(2, 16)]
    assert math.isclose(model(ids, targets).item(), sum(nats) / 32, rel_tol=1e-6)


def test_logits_without_a_cap(rng):
    """Of the tied head."""
    model = tg.GPT(config(TINY, logit_softcap=0.0))
    ids = random_ids(rng, 2, 16)
    expected = model.hidden(ids) @ model.tok_emb.weight.T
    torch.testing.assert_close(model.logits(ids), expected)


def test_baseline_parameter_count():
    assert sum(p.numel() for p in tg.GPT(tg.Config(**tg.BASELINE)).parameters()) == 17_059_912


def test_training_flops_by_hand():
    """Six a multiply-accumulate parameter; attention looks at half of the sequence on average."""
    shape = dict(num_layers=4, model_dim=256, num_heads=8, num_kv_heads=4, train_seq_len=512)
    cfg = config(tg.BASELINE, **shape)
    queries_and_output = 2 * 256 * 256
    keys_and_values = 2 * 256 * 128
    mlp = 2 * 256 * 512
    layer = queries_and_output + keys_and_values + mlp
    attention = 4 * 3 * 4 * 256 * (512 / 2)  # two products, forward and twice backward
    expected = 6 * (4 * layer + 1024 * 256) + attention
    assert tg.training_flops(cfg, tg.GPT(cfg)) == expected


# --- positions ------------------------------------------------------------------------------------


def turned(x):
    """A vector at twelve positions, eight of its numbers turned -> [12, 16]"""
    table = tg.rotary_tables(12, 8, 100.0, CPU)
    return tg.rotate(x.expand(1, 12, 1, 16), *table)[0, :, 0]


def test_rope_turns_only_its_dims(rng):
    x = vector(rng)
    rows = turned(x)
    assert torch.equal(rows[:, 8:], x[8:].expand(12, 8))
    assert not torch.allclose(rows[3, :8], x[:8])


def test_rope_depends_on_distance_only(rng):
    products = turned(vector(rng)) @ turned(vector(rng)).T
    for distance in range(6):
        found = products.diagonal(distance)
        expected = products[0, distance].expand_as(found)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def tables_of(time, dims, base, train_len):
    """Rotary tables of a model's context for inputs of this length."""
    stretched = tg.stretched_base(base, dims, time, train_len)
    return tg.rotary_tables(time, dims, stretched, CPU)


LENGTHS = [(48, 8, 16), (33, 4, 32), (40, 6, 7)]


@pytest.mark.parametrize("time, dims, train_len", LENGTHS)
def test_rotary_base_grows_beyond_the_trained_length(time, dims, train_len, rng):
    """base (T / train_len) ^ (d / (d - 2)) beyond it, and nothing up to it."""
    base = 100 * (time / train_len) ** (dims / (dims - 2))
    cos, sin = tables_of(time, dims, 100.0, train_len)
    angles = oracles.rotary_angles(time, dims, base)
    np.testing.assert_allclose(cos[:, 0].numpy(), np.cos(angles), atol=1e-4)
    np.testing.assert_allclose(sin[:, 0].numpy(), np.sin(angles), atol=1e-4)

    def model(**settings):
        return randomized(config(TINY, rope_dims=dims, **settings))

    stretched = model(rope_base=100.0, rope_train_seq_len=train_len)
    same = model(rope_base=base)
    plain = model(rope_base=100.0)
    ids = random_ids(rng, 1, time)
    hidden = stretched.hidden(ids)
    torch.testing.assert_close(hidden, same.hidden(ids), atol=1e-4, rtol=1e-3)
    assert not torch.allclose(hidden, plain.hidden(ids), atol=1e-2)
    short = ids[:, :train_len]
    assert torch.equal(stretched.hidden(short), plain.hidden(short))


def test_rotary_base_of_the_published_run():
    """2,048 tokens, trained as if for 1,024."""
    cos, _ = tables_of(2048, 16, 10000.0, 1024)
    wanted = [math.cos(22_080 ** (-i / 8)) for i in range(8)]
    np.testing.assert_allclose(cos[1, 0].numpy(), wanted, atol=1e-5)


# --- parts ----------------------------------------------------------------------------------------


def test_xsa_output_is_orthogonal_to_own_value(rng):
    model = tg.GPT(config(TINY))
    attn = model.blocks[0].attn
    attn.xsa = True
    attn.proj.forward = lambda x, adapter: x
    values = []

    def record(q, k, v):
        values.append(v)
        return tg.sdpa_attention(q, k, v)

    x = torch.from_numpy(rng.standard_normal((2, 12, 32))).float()
    context = dataclasses.replace(model.context(x), backend=record)
    out = attn(x, None, 0, context).view(2, 12, 4, 8)
    own = values[0].repeat_interleave(2, dim=2)
    assert largest((out * own).sum(-1)) < 1e-5
    assert largest(out[:, 0]) < 1e-6  # alone with itself, nothing is left
    assert largest(out[:, 5]) > 1e-3


def test_smear_lets_nothing_across_a_document_start():
    smear = tg.SmearGate(config(TINY, smear=True, smear_bos_mask=True))
    x = torch.randn(1, 4, 32)
    torch.nn.init.zeros_(smear.gate)
    first, second, start, after = x[0]
    out = smear(x, torch.tensor([[5, 6, 1, 7]]))[0]
    torch.testing.assert_close(out[1], (first + second) / 2)  # gate 0: half and half
    assert torch.equal(out[2], start)
    torch.testing.assert_close(out[3], (start + after) / 2)


def test_smear_mask_is_alive():
    model = randomized(config(TINY, smear=True))
    masked = tg.GPT(config(TINY, smear=True, smear_bos_mask=True))
    masked.load_state_dict(model.state_dict())
    ids = torch.tensor([[5, 6, 1, 7]])
    across = model.logits(ids)[0]
    kept_apart = masked.logits(ids)[0]
    assert torch.equal(across[:2], kept_apart[:2])
    assert not torch.allclose(across[2], kept_apart[2])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_smear_before_or_after_the_norm(before, masked, rng):
    """A fresh model's blocks are the identity, so its output shows the stream that enters them."""
    smear = dict(smear=True, smear_before_norm=before, smear_bos_mask=masked)
    model = tg.GPT(config(TINY, **smear, tie_embeddings=False))
    ids = rng.integers(0, 260, 20)
    ids[[6, 13]] = 1
    gate = rng.standard_normal(32)
    table = rng.standard_normal((260, 32)) * rng.random((260, 1))  # tokens of different lengths
    with torch.no_grad():
        model.smear.gate.copy_(torch.from_numpy(gate))
        model.tok_emb.weight.copy_(torch.from_numpy(table))
    x = table[ids]
    gate = oracles.sigmoid(gate)
    held = (ids == 1) & masked
    if before:
        x = oracles.rms_norm(oracles.smeared(x, gate, held))
    else:
        x = oracles.smeared(oracles.rms_norm(x), gate, held)
    np.testing.assert_allclose(hidden_of(model, ids), oracles.rms_norm(x), atol=1e-4)


@pytest.mark.parametrize("kind", ["xor", "linear"])
@pytest.mark.parametrize("rows", [2, 64, 2048])
def test_bigram_rows_equal_whole_numbers(rows, kind, rng):
    """The two published hashes, with Python's unbounded integers and large vocabularies."""
    module = tg.BigramHash(tg.Config(bigram_hash=kind), rows)
    assert (module.scale is None) == (kind == "linear")
    for vocab in (260, 1024, 65536):
        ids = random_ids(rng, 3, 40, vocab=vocab)
        expected = [oracles.bigram_rows(row, rows, kind) for row in ids]
        assert module.rows_of(ids).tolist() == expected


@pytest.mark.parametrize("order", [3, 4, 7])
@pytest.mark.parametrize("rows", [2, 61, 4096])
def test_context_rows_equal_whole_numbers(rows, order, rng):
    """In integers without end, taken to 64 bits with a sign."""
    module = tg.ContextHash(tg.Config(hash_rows=rows), order)
    ids = rng.integers(0, 65536, (3, 50))
    found = module.rows_of(torch.from_numpy(ids))
    for row, got in zip(ids.tolist(), found.tolist()):
        assert got == oracles.context_rows(row, order, rows)


def test_linear_bigram_hash_at_published_size():
    """With 4,096 rows the published products reduce to small ones."""
    module = tg.BigramHash(tg.Config(bigram_hash="linear"), 4096)
    rows = module.rows_of(torch.arange(1024).repeat(2, 1))[0].tolist()
    assert rows == [(2481 * t + 3639 * max(t - 1, 0)) % 4096 for t in range(1024)]


def assert_followed_by(tokens, expected):
    """Where no order finds one, the token means nothing."""
    for found, (token, _) in zip(tokens.tolist(), expected):
        assert token in (None, found)


@pytest.mark.parametrize("orders", [(1,), (3, 2), (5, 2, 1)])
def test_induction_finds_the_last_like_place(orders, rng):
    """As looking back token by token does, in documents of few kinds of tokens."""
    module = tg.Induction(config({}, induction_orders=orders, vocab_size=6))
    ids = rng.integers(0, 6, (3, 80))
    found = module.followers(torch.from_numpy(ids))
    for row, tokens, numbers in zip(ids, *found):
        expected = oracles.followers(row, orders, 1, 80)
        assert numbers.tolist() == [number for _, number in expected]
        assert_followed_by(tokens, expected)


@pytest.mark.parametrize("bos", [1, 9])
@pytest.mark.parametrize("window", [1, 2, 7, 40])
def test_induction_in_pieces_looks_back_one_window(window, bos, rng):
    """However a sequence is cut; 9 never comes, so that nothing begins but the sequence."""
    orders = (3, 1)
    module = tg.Induction(config({}, induction_orders=orders, vocab_size=10, bos_id=bos))
    ids = rng.integers(0, 5, 120)
    expected = oracles.followers(ids, orders, bos, window - 1)
    for sizes in ([1] * 120, [120], [50, 1, 2, 67]):
        cache = tg.KVCache(window, bos=None)
        begin = 0
        for size in sizes:
            piece = torch.from_numpy(ids[begin : begin + size])[None]
            token, which = module.followers(piece, cache)
            assert which[0].tolist() == [number for _, number in expected[begin : begin + size]]
            assert_followed_by(token[0], expected[begin : begin + size])
            begin += size


# --- switches -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Switch:
    """Settings that turn a technique on, and the parameters that come and go with it."""

    settings: dict
    adds: str
    removes: str
    base: dict  # what it builds on


SWITCHES = {}


def switch_on(name, adds="", removes="", base=None, **settings):
    SWITCHES[name] = Switch(settings, adds, removes, base or {})


BIGRAM = dict(bigram_vocab_size=64, bigram_dim=8)
TABLES = "bigram.embed.weight bigram.proj.weight"
SHARED_VALUES = "ve_shared.embed.weight ve_shared.proj.weight ve_shared.scale"

switch_on("bigram", **BIGRAM, adds=f"{TABLES} bigram.scale")
switch_on("linear bigram", **BIGRAM, bigram_hash="linear", adds=TABLES)
CONTEXT = "hashes.0.embed.weight hashes.0.proj.weight hashes.0.scale"
switch_on("contexts", hash_orders=(3,), hash_rows=64, bigram_dim=8, adds=CONTEXT)
switch_on("linear for xor", bigram_hash="linear", removes="bigram.scale", base=BIGRAM)
switch_on("smear", smear=True, adds="smear.gate")
switch_on("smear before norm", smear_before_norm=True, base=dict(smear=True))
switch_on("value embedding", ve_layers=(1,), ve_dim=8, adds=f"{SHARED_VALUES} ve_layer_scales.0")
switch_on("untied", tie_embeddings=False, adds="lm_head.weight")
switch_on("xsa", xsa_last_n=1)
switch_on("ln_scale", ln_scale=True)
switch_on("partial rope", rope_dims=2)
switch_on("rotary stretch", rope_train_seq_len=8)
switch_on("leaky", leaky_slope=0.5)
switch_on("softcap off", logit_softcap=0.0)
switch_on(
    "smear gate", smear_gate_enabled=True, gate_window=4, adds="smear_gate.weight smear_lambda"
)
switch_on(
    "attention gate",
    sparse_attn_gate_enabled=True,
    gate_window=4,
    adds="blocks.0.attn.attn_gate_w",
)
switch_on("induction", induction_orders=(2, 1), adds="induction.gate")
switch_on("skip gates", skip_gates_enabled=True, adds="skip_gates")
switch_on("depth recurrence", num_loops=1, loop_start=0, loop_end=0, adds="skip_weights")
switch_on("lanes", parallel_start_layer=1, adds="parallel_post_lambdas parallel_resid_lambdas")
switch_on("caps of scoring", asym_logit_rescale=True, adds="softcap_pos softcap_neg")
switch_on("mixer head", mixer_head=True, adds="alpha_head.weight alpha_head.bias")
# They leave the first layer as it is, or need a second.
DEEPER = ("value embedding", "ln_scale", "skip gates", "lanes")


def tensors_of(model):
    header, _ = tg.read_header(tg.pack(model.state_dict(), model.cfg))
    return {row[0] for row in header["tensors"]}


@pytest.mark.parametrize("name", SWITCHES)
@torch.no_grad()
def test_switch_is_alive_and_absent_when_off(name, rng):
    """On, it changes logits and loss, compiled as well as eager.

    Off, neither model nor artifact holds anything of it.
    """
    switch = SWITCHES[name]
    base = dict(TINY, num_layers=2 if name in DEEPER else 1, **switch.base)
    off = randomized(config(base))
    on = randomized(config(base, **switch.settings))
    on.load_state_dict(off.state_dict(), strict=False)  # all that is shared has equal weights
    for found in (names_of, tensors_of):
        assert found(on) - found(off) == set(switch.adds.split())
        assert found(off) - found(on) == set(switch.removes.split())
    ids = random_ids(rng, 2, 8).repeat(1, 2)  # contexts that come again
    targets = random_ids(rng, 2, 16)
    ratios = torch.rand(2, 16, 6) if on.cfg.mixer_head else None
    loss = compiled(on)(ids, targets, ratios)
    torch.testing.assert_close(loss, on(ids, targets, ratios))
    if name == "caps of scoring":  # training has its own
        assert largest(loss - off(ids, targets)) < 1e-5
    else:
        assert largest(loss - off(ids, targets)) > 1e-4
    change = largest(on.logits(ids) - off.logits(ids))
    if on.cfg.mixer_head:  # it weighs, it does not predict
        assert change == 0
    else:
        assert change > 1e-4


DEFAULT_PARTS = {
    "unet_skips": {"skip_weights"},
    "x0_mix": {f"blocks.{i}.resid_mix" for i in range(3)},
}


@pytest.mark.parametrize("name", DEFAULT_PARTS)
def test_default_parts_can_be_absent(name):
    with_part = tg.GPT(config(TINY))
    without = tg.GPT(config(TINY, **{name: False}))
    assert names_of(with_part) - names_of(without) == DEFAULT_PARTS[name]
    assert torch.isfinite(without.logits(torch.arange(8)[None])).all()
