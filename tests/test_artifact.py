"""The artifact (section 9): round trip, size, and every way in which it can be wrong."""

import base64
import dataclasses
import json
import math
import re
import struct
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import FULL, ROOT, TINY
from helpers import calibration_of, config, randomized, resealed, sealed, with_lanes

import train_gpt as tg


def weights_of(**settings):
    """Settings of everything, and random weights."""
    cfg = config(FULL, **settings)
    return cfg, randomized(cfg).state_dict()


def header_of(blob):
    header, _ = tg.read_header(blob)
    return header


def kinds_of(blob):
    """Tensor -> quantizer."""
    return {name: kind for name, _, kind in header_of(blob)["tensors"]}


# --- there and back -------------------------------------------------------------------------------


def expected_weights(w, kind, cfg):
    """What a tensor should be after a round trip."""
    if kind == "f32":
        return w
    if kind == "f16":
        return w.half().float()
    q, scales = tg.QUANTIZERS[kind].fit(w, cfg)
    bits = int(kind.removeprefix("int"))
    assert q.abs().max() <= 2 ** (bits - 1) - 1
    assert scales.dtype == torch.float16
    return q.float() * scales.float()


@pytest.mark.parametrize("codec", ["zstd", "zlib", "lzma"])
def test_round_trip_is_exact(codec):
    policy = "mlp:5,embed:6"
    cfg, state = weights_of(compressor=codec, quant_policy=policy, eval_seq_len=48)
    blob = tg.pack(state, cfg, code_bytes=123)
    assert blob == tg.pack(state, cfg, code_bytes=123)
    stored, weights = tg.unpack(blob)
    groups = ("model", "pack", "score")
    assert stored.group(*groups) == cfg.group(*groups)
    header = header_of(blob)
    assert header["codec"] == codec
    assert header["code_bytes"] == 123
    kinds = kinds_of(blob)
    assert weights.keys() == state.keys() == kinds.keys()
    assert kinds["tok_emb.weight"] == "int6"
    assert kinds["blocks.0.mlp.fc.weight"] == "int5"
    assert kinds["blocks.0.attn.c_q.weight"] == "int8"
    assert kinds["blocks.0.resid_mix"] == "f32"
    for name, w in state.items():
        assert torch.equal(weights[name], expected_weights(w, kinds[name], cfg)), name
    tg.GPT(stored).load_state_dict(weights, strict=True)


def test_every_tensor_has_a_role_and_off_leaves_no_byte():
    names = tg.GPT(config(FULL)).state_dict()
    assert {tg.tensor_role(name) for name in names} == set(tg.ROLES)
    cfg = config(TINY)
    plain = kinds_of(tg.pack(randomized(cfg).state_dict(), cfg))
    for name in plain:
        assert not any(part in name for part in ("bigram", "smear", "ve_")), name


def test_an_artifact_of_the_first_version_loads():
    """Written by an earlier program: every kind of tensor, the same logits."""
    told = json.loads((ROOT / "tests/artifact_v1.json").read_text())
    blob = base64.b64decode(told["artifact"])
    assert set(kinds_of(blob).values()) == {"int5", "int6", "int8", "f16", "f32"}
    stored, weights = tg.unpack(blob)
    model = tg.build_model(stored, tg.Runtime(tg.Config(device="cpu"), {}), weights)
    expected = told["last_logits"]
    logits = model.logits(torch.tensor([told["ids"]]))[0, -1, : len(expected)]
    np.testing.assert_allclose(logits.detach().numpy(), expected, atol=1e-4)


def test_weights_that_are_not_finite():
    cfg, state = weights_of()
    state["skip_weights"][0, 0] = math.nan
    with pytest.raises(tg.InputError, match="skip_weights"):
        tg.pack(state, cfg)


def test_a_small_matrix_beyond_float16_stays_float32():
    cfg, state = weights_of(keep_float_max_numel=65536)
    name = "blocks.0.attn.c_k.weight"
    state[name][0, 0] = 7e4
    _, weights = tg.unpack(tg.pack(state, cfg))
    assert torch.equal(weights[name], state[name])


# Names, shapes and sizes of tensors, two of them too small or too special to be quantized.
PRUNED = {
    "tok_emb.weight": ((20, 32), 1),
    "blocks.0.mlp.fc.weight": ((33, 30), 9),
    "bigram.proj.weight": ((16, 16), 1),
    "blocks.0.resid_mix": ((2, 200), 1),
}


@pytest.mark.parametrize("share", [0.03, 0.25, 0.5])
def test_pruning_zeroes_the_smallest_of_each_tensor(share, rng, monkeypatch):
    """Which weights become 0, tensor by tensor; floats and small tensors keep theirs."""
    cfg = config(TINY, prune_pct=share, keep_float_max_numel=256)
    state = {}
    for name, (shape, size) in PRUNED.items():
        signs = rng.choice([-1, 1], shape)
        state[name] = torch.from_numpy(rng.uniform(0.3, 1, shape) * signs * size).float()
    monkeypatch.setattr(tg, "tensors_of", lambda cfg: {n: list(w.shape) for n, w in state.items()})
    _, weights = tg.unpack(tg.pack(state, cfg))
    for name, w in state.items():
        expected = np.zeros(w.numel(), bool)
        if w.numel() > 400:
            count = math.ceil((w.numel() - 1) * share)
            expected[w.abs().flatten().argsort()[:count]] = True
        assert np.array_equal((weights[name] == 0).flatten(), expected), name


# --- steps without a limit, rANS ------------------------------------------------------------------

STEPS = dict(quant_step=0.01, gptq_n_samples=1, gptq_reserve_seconds=1.0)
LQER = dict(lqer_enabled=True, lqer_top_k=2, lqer_rank=3, lqer_asym_group=7)
WAYS = {
    "rows": dict(quant_policy="mlp:5,embed:6"),
    "rows clipped": dict(matrix_clip_sigmas=8.0),
    "steps": dict(STEPS, quant_row_steps=False),
    "steps by row": STEPS,
    "steps and rows": dict(STEPS, quant_policy="embed:8"),
    "fine steps": dict(STEPS, quant_step=1e-5),
    "rows and LQER": LQER,
    "steps and LQER": dict(STEPS, **LQER, quant_policy="embed:8"),
    "floats": dict(keep_float_max_numel=100_000),
}
# The kinds of whole numbers that each way gives.
KINDS = {
    "rows": {"int5", "int6", "int8"},
    "rows clipped": {"int8"},
    "steps": {"step8"},
    "steps by row": {"step8"},
    "steps and rows": {"step8", "int8"},
    "fine steps": {"step16"},
    "rows and LQER": {"int8", "int8+lqer"},
    "steps and LQER": {"step8", "step8+lqer", "int8"},
    "floats": set(),
}


@pytest.fixture
def sixteen_lanes():
    with with_lanes(16):
        yield


def small_weights(**settings):
    """Of a model of one layer."""
    cfg = config(TINY, **{"num_layers": 1, **settings})
    return cfg, randomized(cfg).state_dict()


def packed_with(state, cfg, **options):
    """An artifact, with a calibration of random inputs."""
    known = calibration_of(state)
    return tg.pack(state, cfg, known, **options)


@pytest.mark.parametrize("way", WAYS)
def test_rans_gives_what_zstd_gives(way, sixteen_lanes):
    """And what was fitted; twice the same bytes."""
    assert WAYS.keys() == KINDS.keys()
    cfg, state = small_weights(compressor="rans", **WAYS[way])
    blob = packed_with(state, cfg)
    fitted = tg.fit_all(state, cfg, calibration_of(state))
    assert blob == tg.packed_file(fitted, cfg, 0, {})
    kinds = set(kinds_of(blob).values()) - {"f16", "f32"}
    assert kinds == KINDS[way]
    assert header_of(blob)["codec"] == "rans"
    other = tg.packed_file(fitted, dataclasses.replace(cfg, compressor="zstd"), 0, {})
    stored, weights = tg.unpack(blob)
    _, expected = tg.unpack(other)
    assert stored.group("model", "pack") == cfg.group("model", "pack")
    assert weights.keys() == expected.keys() == state.keys()
    for tensor in fitted:
        w = weights[tensor.name]
        assert torch.equal(w, expected[tensor.name]), tensor.name
        assert torch.equal(w, tg.decoded(tensor, cfg)), tensor.name
        if "step16" in kinds:
            difference = w - state[tensor.name]
            assert difference.abs().max() < 1e-2


STEPS_OTHERWISE = dict(quant_row_steps=False, quant_step=0.02, gptq_damp=0.5)
LQER_OTHERWISE = dict(lqer_top_k=1, lqer_rank=1, lqer_factor_bits=3, lqer_asym_group=16)


@pytest.mark.parametrize("setting", [*STEPS_OTHERWISE, *LQER_OTHERWISE])
def test_settings_of_packing_act(setting):
    settings = LQER if setting in LQER_OTHERWISE else STEPS
    value = (STEPS_OTHERWISE | LQER_OTHERWISE)[setting]
    cfg, state = small_weights(**settings)
    _, payload = tg.read_header(packed_with(state, cfg))
    other = dataclasses.replace(cfg, **{setting: value})
    _, moved = tg.read_header(packed_with(state, other))
    assert payload != moved


def test_as_many_matrices_are_corrected_as_asked():
    cfg, state = small_weights(**LQER)
    kinds = kinds_of(packed_with(state, cfg))
    corrected = [kind for kind in kinds.values() if "+lqer" in kind]
    assert len(corrected) == LQER["lqer_top_k"]


def test_rans_with_the_lanes_of_a_run():
    """A whole artifact; its report names the bits of a weight."""
    cfg, state = small_weights(compressor="rans", **WAYS["steps and LQER"])
    blob = packed_with(state, cfg)
    _, weights = tg.unpack(blob)
    for tensor in tg.fit_all(state, cfg, calibration_of(state)):
        assert torch.equal(weights[tensor.name], tg.decoded(tensor, cfg)), tensor.name
    lines = tg.size_report(blob, 0, len(blob))
    coded = [tensor for tensor in tg.expand(blob)[2] if tensor.range_bytes]
    assert len(lines) == 4 + len(coded) > 9
    told = re.search(r"tok_emb.weight \[260, 32\] ([.\d]+) bits a weight, ideal ([.\d]+)", lines[4])
    found = float(told[1])
    ideal = float(told[2])
    assert ideal < found < ideal * 1.1


def test_a_first_part_and_no_codes_end_where_they_should():
    cfg, state = small_weights(compressor="rans", keep_float_max_numel=100_000)
    blob = packed_with(state, cfg)
    tg.unpack(blob)
    _, payload = tg.read_header(blob)
    for wrong in (payload + b"\0", payload[:-1], payload[:3], b"", bytes(4) + payload[4:]):
        with pytest.raises(tg.InputError, match="cannot be expanded"):
            tg.unpack(resealed(blob, wrong))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["blocks.0.mlp.fc.weight", "blocks.0.resid_mix"])
def test_steps_of_what_is_not_finite_are_refused(name, value):
    cfg, state = small_weights(**STEPS)
    state[name].flatten()[3] = value
    with pytest.raises(tg.InputError, match=f"{name}: has values that are not finite"):
        packed_with(state, cfg)


def test_a_hessian_that_cannot_be_factored_is_named():
    """Rounding rows by GPTQ; of what is not positive definite there is no factor."""
    cfg, state = small_weights(keep_float_max_numel=100)
    known = calibration_of(state)
    known.hessians["blocks.0.attn.c_q.weight"].copy_(-torch.eye(32))
    with pytest.raises(tg.InputError, match="c_q.weight: its Hessian cannot be factored"):
        tg.fit_all(state, cfg, known)


def test_a_scale_of_steps_leaves_rows_with_deviations_alone():
    """Else FIT_ARTIFACT would clip the embedding to make the other matrices' steps finer."""
    cfg, state = small_weights(**STEPS, quant_policy="embed:7", embed_clip_sigmas=14.0)
    known = calibration_of(state)
    fine = {t.name: t for t in tg.fit_all(state, cfg, known, 0.25)}
    coarse = {t.name: t for t in tg.fit_all(state, cfg, known, 1.0)}
    codes, scales = fine["tok_emb.weight"].arrays
    expected = coarse["tok_emb.weight"]
    assert expected.kind == "int7"
    assert np.array_equal(codes, expected.arrays[0])
    assert np.array_equal(scales, expected.arrays[1])
    name = "blocks.0.mlp.fc.weight"
    assert np.abs(fine[name].arrays[0]).sum() > 2 * np.abs(coarse[name].arrays[0]).sum()


@pytest.mark.parametrize("lacks", ["hessians", "importance"])
def test_steps_need_a_calibration_of_every_matrix(lacks):
    cfg, state = small_weights(**STEPS)
    known = calibration_of(state)
    del getattr(known, lacks)["blocks.0.attn.c_q.weight"]
    with pytest.raises(tg.InputError, match="c_q.weight: QUANT_STEP needs its Hessian"):
        tg.fit_all(state, cfg, known)


def odd_matrices(rng):
    """Matrices of shapes and values that a model has not, and what is known of them."""
    state = {}
    for name, shape in {
        "row": (1, 90),
        "column": (200, 1),
        "one": (1, 1),
        "tall": (300, 3),
    }.items():
        state[name] = torch.from_numpy(rng.standard_normal(shape)).float()
    for name in ("zero", "alike", "row_of_zeros", "dead", "unseen", "careless", "large", "tiny"):
        state[name] = torch.from_numpy(rng.standard_normal((20, 30))).float()
    state["zero"] *= 0
    state["alike"][3] = 0.25
    state["row_of_zeros"][3] = 0
    state["large"] *= 1e3
    state["tiny"] *= 1e-30
    known = calibration_of(state)
    known.hessians["dead"][[2, 9]] = 0
    known.hessians["dead"][:, [2, 9]] = 0
    known.hessians["unseen"].zero_()
    known.importance["careless"].zero_()
    return state, known


@pytest.mark.parametrize(
    "way", ["steps", "steps by row", "steps and LQER", "rows", "rows and LQER"]
)
def test_odd_matrices_come_back(way, rng):
    """Finite, near what they were where that matters, by rANS as they were fitted."""
    state, known = odd_matrices(rng)
    cfg = config(TINY, **{**WAYS[way], "keep_float_max_numel": 0, "quant_policy": ""})
    fitted = tg.fit_all(state, cfg, known)
    weights = tg.weights_of(fitted, cfg)  # finite
    for name in ("row", "column", "one", "tall", "alike", "row_of_zeros"):
        wrong = weights[name] - state[name]
        assert wrong.square().mean() < 0.5 * state[name].square().mean(), name
    assert not weights["zero"].any()
    if "LQER" not in way:
        assert not weights["dead"][:, [2, 9]].any()
        assert not weights["unseen"].any()
        assert weights["dead"].any()
    layouts = [tg.quantizer(t.kind, cfg).layout(t.shape) for t in fitted]
    found = payload_there_and_back(fitted, layouts, cfg)
    for tensor, arrays in zip(fitted, found):
        for array, expected in zip(arrays, tensor.arrays, strict=True):
            np.testing.assert_array_equal(array, expected, tensor.name)


def payload_there_and_back(tensors, layouts, cfg):
    """The arrays of each tensor in a payload of rANS."""
    others = []
    for stream in tg.STREAMS[1:]:
        for tensor, layout in zip(tensors, layouts):
            pairs = zip(layout, tensor.arrays)
            others += [array.tobytes() for part, array in pairs if part.stream == stream]
    payload = tg.rans_payload(tensors, cfg, b"".join(others))
    quantizers = [tg.quantizer(tensor.kind, cfg) for tensor in tensors]
    found, sizes = tg.rans_arrays(payload, layouts, quantizers)
    assert sum(sizes) < len(payload)
    return found


def test_an_importance_of_zeros_gives_the_coarsest_steps(rng):
    state, known = odd_matrices(rng)
    cfg = config(TINY, **STEPS, keep_float_max_numel=0)
    weights = {t.name: tg.decoded(t, cfg) for t in tg.fit_all(state, cfg, known)}
    assert not weights["careless"].any()
    assert weights["alike"].any()


# --- a file that fits -----------------------------------------------------------------------------

FIT = dict(fit_artifact=True)
FITTED = {
    "steps": dict(STEPS, compressor="rans"),
    "steps by zstd": STEPS,
    "rows": dict(matrix_clip_sigmas=12.0, compressor="rans"),
}


@pytest.mark.parametrize("way", FITTED)
def test_a_fitted_file_is_the_largest_that_fits(way, sixteen_lanes, cap=6_000, margin=321):
    """Within a few times the slack, for the file is small; the margin is free."""
    cfg, state = small_weights(**FIT, **FITTED[way], max_artifact_bytes=cap, fit_margin=margin)
    assert not tg.check_config(cfg)
    blob = packed_with(state, cfg, code_bytes=1000, notes={"seed": 1})
    limit = cap - margin - 1000
    assert limit * (1 - FIT_SHARE) <= len(blob) <= limit
    if way == "steps":
        assert blob == packed_with(state, cfg, code_bytes=1000, notes={"seed": 1})
    header = header_of(blob)
    assert header["notes"]["seed"] == 1
    assert header["code_bytes"] == 1000
    told = config(header["config"])
    assert (told.fit_artifact, told.max_artifact_bytes, told.fit_margin) == (True, cap, margin)
    check_scale(blob, state, cfg)


FIT_SHARE = 8 * tg.FIT_SLACK


def check_scale(blob, state, cfg):
    """Its notes say at which scale it was fitted, and that gives its weights."""
    scale = header_of(blob)["notes"]["fit_scale"]
    fitted = tg.fit_all(state, cfg, calibration_of(state), scale)
    _, weights = tg.unpack(blob)
    for tensor in fitted:
        assert torch.equal(tg.decoded(tensor, cfg), weights[tensor.name]), tensor.name


@pytest.mark.parametrize("way", ["steps", "rows"])
def test_where_no_file_fits_the_smallest_is_kept(way, sixteen_lanes):
    """The run ends over the size cap, and nothing is lost."""
    cfg, state = small_weights(**FIT, **FITTED[way], max_artifact_bytes=2000, fit_margin=100)
    blob = packed_with(state, cfg, code_bytes=400)
    unfitted = dataclasses.replace(cfg, fit_artifact=False)
    plain = packed_with(state, unfitted)
    assert 1500 < len(blob) < len(plain)
    tg.unpack(blob)


@pytest.mark.parametrize("way", ["steps", "steps by zstd"])
def test_a_cap_beyond_all_needs_gives_the_finest_steps(way, sixteen_lanes):
    """Also where the next steps would be too fine for the codec."""
    cfg, state = small_weights(**FIT, **FITTED[way])
    blob = packed_with(state, cfg)
    _, weights = tg.unpack(blob)
    name = "tok_emb.weight"
    assert (weights[name] - state[name]).abs().max() < 2e-2


@pytest.mark.parametrize("cap", [1000, 16_000_000])
def test_a_fit_of_floats_alone_ends(cap):
    """No step changes them: they fit, or they do not."""
    cfg, state = small_weights(**FIT, **STEPS, keep_float_max_numel=100_000, max_artifact_bytes=cap)
    unfitted = dataclasses.replace(cfg, fit_artifact=False)
    plain = packed_with(state, unfitted)
    blob = packed_with(state, cfg)
    assert abs(len(blob) - len(plain)) < 200


def bits_a_weight(bits, floor=0):
    """Files whose sizes fall by so many bits a weight with each octave of the steps."""
    probes = []

    def packed(scale):
        probes.append(scale)
        each = 5 - bits * math.log2(scale)
        size = max(0, 100_000 * each / 8)
        return bytes(floor + int(size))

    return packed, probes


@pytest.mark.parametrize("bits", [0.6, 1.0, 1.4])
@pytest.mark.parametrize("limit", [20_000, 50_000, 62_500, 62_499, 200_000])
def test_a_fit_finds_the_limit(bits, limit):
    """Also where an octave costs more or less than it should."""
    packed, probes = bits_a_weight(bits, floor=100)
    blob = tg.fitted_to(limit, 100_000, packed)
    assert limit * (1 - tg.FIT_SLACK) <= len(blob) <= limit
    assert probes[0] == 1
    assert len(probes) <= tg.FIT_PROBES


def test_steps_too_fine_for_16_bits_are_named():
    """Codes are not cut off: by zstd no less than by rANS."""
    cfg, state = small_weights(**{**STEPS, "quant_step": 1e-8})
    with pytest.raises(tg.InputError, match=r"weight: .*16 bits; QUANT_STEP=1e-08 is too fine"):
        packed_with(state, cfg)


def test_steps_too_fine_at_once_are_named():
    def packed(scale):
        raise tg.InputError("too fine")

    with pytest.raises(tg.InputError, match="too fine"):
        tg.fitted_to(1000, 100, packed)


# --- size -----------------------------------------------------------------------------------------


def test_size_report_adds_up():
    cfg, state = weights_of()
    blob = tg.pack(state, cfg)
    total = len(blob) + 1000
    lines = tg.size_report(blob, 1000, 10)
    assert f"Total submission size zstd: {total} bytes" in lines
    assert "OVER THE CAP" in lines[3]
    assert "OVER" not in "".join(tg.size_report(blob, 1000, total))


def entropy_bytes(arrays):
    """Bytes of some arrays under a code that knows how often each byte value comes."""
    counts = Counter(b"".join(array.numpy().tobytes() for array in arrays)).values()
    bits = [n * math.log2(sum(counts) / n) for n in counts]
    return sum(bits) / 8


def test_size_report_names_the_largest_tensors():
    """Sizes by the counts of each tensor's byte values, largest first."""
    cfg, state = weights_of(quant_policy="mlp:5")
    blob = tg.pack(state, cfg)
    needs = {}
    for name, kind in kinds_of(blob).items():
        needs[name] = entropy_bytes(tg.QUANTIZERS[kind].fit(state[name], cfg))
    lines = tg.size_report(blob, 1000, 5_000_000)
    margin = 5_000_000 - 1000 - len(blob)
    assert lines[3] == f"size_cap:5000000 margin:{margin} bytes"
    words = [line.split() for line in lines[4:]]
    largest = sorted(needs, key=needs.get, reverse=True)[:5]
    assert [word[4] for word in words] == largest
    for word in words:
        assert abs(int(word[1]) - needs[word[4]]) < 1


# --- damage ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def blob():
    cfg, state = weights_of()
    return tg.pack(state, cfg)


def replaced(blob, at, value):
    return blob[:at] + value + blob[at + len(value) :]


# Kind of damage -> what is said. The bytes are made by the test.
DAMAGE = {
    "nothing": "shorter",
    "a beginning": "shorter",
    "one byte less": "cut short or extended",
    "one byte more": "cut short or extended",
    "another magic": "begins with",
    "another version": "format version 2",
    "a flipped bit": "checksum",
    "an absurd length": "cut short or extended",
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused(blob, kind):
    damaged = {
        "nothing": b"",
        "a beginning": blob[:40],
        "one byte less": blob[:-1],
        "one byte more": blob + b"\0",
        "another magic": replaced(blob, 0, b"X"),
        "another version": replaced(blob, 8, b"\2\0"),
        "a flipped bit": replaced(blob, 2000, bytes([blob[2000] ^ 4])),
        "an absurd length": replaced(blob, 14, struct.pack("<Q", 1 << 60)),
    }
    with pytest.raises(tg.InputError, match=DAMAGE[kind]):
        tg.unpack(damaged[kind])


@dataclasses.dataclass
class Claim:
    """Fields of the header, and what is said about them."""

    message: str
    fields: dict


def table_claim(message, *row):
    return Claim(message, dict(tensors=[list(row)]))


def config_claim(message, **settings):
    return Claim(message, dict(config=settings))


BAD_TABLE = "bad tensor table"
OTHERS = "tensors do not fit its settings"
NOT_OURS = "not those of this program"
CLAIMS = {
    "a matrix beyond all bounds": table_claim(OTHERS, "a", [2**30, 2**30], "int8"),
    "a vector beyond all bounds": table_claim(OTHERS, "a", [2**40], "f32"),
    "a negative size": table_claim(OTHERS, "a", [-1, 3], "f32"),
    "a vector of whole numbers": table_claim(BAD_TABLE, "a", [4], "int8"),
    "an unknown kind": table_claim(BAD_TABLE, "a", [4, 4], "pickle"),
    "another tensor": table_claim("names or shapes differ: a", "a", [4, 4], "f32"),
    "a table of text": Claim(BAD_TABLE, dict(tensors="x")),
    "no table": Claim(BAD_TABLE, dict(tensors=None)),
    "an unknown codec": Claim("codec 'rar'", dict(codec="rar")),
    "another codec": Claim("payload cannot be expanded", dict(codec="zlib")),
    "an unknown setting": config_claim(NOT_OURS, no_such_setting=1),
    "settings in a list": Claim(NOT_OURS, dict(config=[])),
    "a number as text": config_claim("wrong type", num_layers="nine"),
    "a switch for a number": config_claim("wrong type", num_layers=True),
    "a number for a switch": config_claim("wrong type", smear=1),
    "a switch for a rate": config_claim("wrong type", rope_base=False),
    "a switch for a layer": config_claim("wrong type", ve_layers=[1, True]),
    "a header that is small only when compressed": Claim(
        "unreadable header", dict(notes="x" * (5 << 20))
    ),
    "a setting out of its range": config_claim("expected 1 or more", num_heads=0),
}
CLAIMS["steps of a vector"] = table_claim(BAD_TABLE, "a", [4], "step8")
for kind in ("+lqer", "int8+lqer+lqer", "step32", 8):
    CLAIMS[f"the kind {kind}"] = table_claim(BAD_TABLE, "a", [4, 4], kind)
CLAIMS["a correction of floats"] = table_claim(BAD_TABLE, "tok_emb.weight", [260, 32], "f16+lqer")
CLAIMS["seventy sizes"] = table_claim(OTHERS, "a", [1] * 70, "f32")
CLAIMS["no sizes"] = table_claim(BAD_TABLE, "a", {}, "int8")
CLAIMS["a size in words"] = table_claim(BAD_TABLE, "a", ["x"], "f32")
CLAIMS["a size with a point"] = table_claim(BAD_TABLE, "tok_emb.weight", [260.0, 32], "f16")
CLAIMS["a switch for a size"] = table_claim(BAD_TABLE, "smear_lambda", [True], "f32")
CLAIMS["a name that is a list"] = table_claim(BAD_TABLE, ["a"], [4], "f32")
CLAIMS["a tensor twice"] = Claim(
    f"{BAD_TABLE} .*twice", dict(tensors=[["tok_emb.weight", [260, 32], "f16"]] * 2)
)
CLAIMS["a table of 2^63 rows"] = config_claim("2147483647 at most", bigram_vocab_size=2**63)
CLAIMS["a base beyond all numbers"] = config_claim("wrong type", rope_base=10**400)
CLAIMS["a batch beyond all memory"] = config_claim("16777216 at most", eval_batch_tokens=10**29)
CLAIMS["documents beyond all memory"] = config_claim("65536 at most", ttt_docs=10**30)
for name, value in (("smoke", True), ("data_path", "x"), ("val_tokens", 9), ("matrix_lr", 1.0)):
    CLAIMS[f"a run's own {name}"] = config_claim(NOT_OURS, **{name: value})
CLAIMS["a name that forges a line"] = config_claim(
    NOT_OURS, **{"a\nfinal_zstd_plain_exact val_loss:0.1 val_bpb:0.1": 1}
)


@pytest.mark.parametrize("kind", CLAIMS)
def test_wrong_claims_are_refused(blob, kind):
    claim = CLAIMS[kind]
    with pytest.raises(tg.InputError, match=claim.message):
        tg.unpack(resealed(blob, **claim.fields))


def test_a_zstd_frame_that_claims_another_size_allocates_nothing(blob):
    _, payload = tg.read_header(blob)
    frame = bytearray(payload)
    assert frame[4] & 0xC0 in (0x40, 0x80)  # the frame header holds 2 or 4 bytes of size
    frame[5:7] = b"\xff\xff"
    with pytest.raises(tg.InputError, match="cannot be expanded"):
        tg.unpack(resealed(blob, bytes(frame)))


def test_a_stream_that_expands_without_end_is_cut_off(blob):
    bomb = zlib.compress(bytes(50_000_000), 9)
    with pytest.raises(tg.InputError, match="cannot be expanded"):
        tg.unpack(resealed(blob, bomb, codec="zlib"))


def flipped(blob, rng):
    """One bit changed, at times the last byte lost."""
    raw = bytearray(blob)
    raw[rng.integers(0, len(raw))] ^= 1 << rng.integers(0, 8)
    return bytes(raw[: len(raw) - rng.integers(0, 2)])


def spoiled_and_sealed(text, payload, rng):
    """One to three bytes of header or payload changed, with a correct checksum."""
    header = bytearray(text)
    data = bytearray(payload)
    for _ in range(rng.integers(1, 4)):
        if rng.random() < 0.7:
            header[rng.integers(0, len(header))] = rng.integers(32, 127)
        else:
            data[rng.integers(0, len(data))] = rng.integers(0, 256)
    return sealed(bytes(header), bytes(data), level=1)


def fuzz_artifacts(blob, rng, count):
    """Damaged files must be refused; if the checksum is right, refused or of sane shapes."""
    header, payload = tg.read_header(blob)
    text = json.dumps(header).encode()
    for _ in range(count // 2):
        with pytest.raises(tg.InputError):
            tg.unpack(flipped(blob, rng))
    for _ in range(count // 2):
        try:
            _, weights = tg.unpack(spoiled_and_sealed(text, payload, rng))
        except tg.InputError:
            continue
        assert sum(w.numel() for w in weights.values()) < 10 * len(blob)


def test_fuzz_artifact_reader(blob, rng):
    fuzz_artifacts(blob, rng, 2000)


@pytest.mark.slow
def test_fuzz_artifact_reader_long(blob, rng):
    fuzz_artifacts(blob, rng, 40_000)
