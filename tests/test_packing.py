"""The artifact: quantizers, round trip, size, and every way it can be wrong."""

import base64
import dataclasses
import hashlib
import json
import math
import struct
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import FULL, ROOT, TINY, randomized

import train_gpt as tg


def packed(cfg=None, **settings):
    cfg = cfg or tg.Config(**dict(FULL, **settings))
    return cfg, randomized(cfg).state_dict()


@pytest.mark.parametrize("bits", [5, 6, 8])
def test_row_quantizer_error_bounds(bits, rng):
    w = torch.from_numpy(
        rng.standard_normal((40, 64)) * np.exp(rng.standard_normal((40, 1)) * 3)
    ).float()
    w[3] = 0
    quantizer, top = tg.RowInt(bits), 2 ** (bits - 1) - 1
    whole, clipped = (
        quantizer.decode(*quantizer.fit(w, tg.Config(quant_clip_steps=steps))) for steps in (1, 16)
    )
    scale = w.abs().amax(1, keepdim=True) / top
    assert ((whole - w).abs() <= 0.505 * scale + 2.0**-24 * top).all()  # float16 scales round
    before, after = ((x - w).square().sum(1) for x in (whole, clipped))
    assert (after <= before * 1.0001).all() and (bits == 8 or after.sum() < before.sum())
    assert torch.equal(whole[3], torch.zeros(64))


def test_clip_search_is_the_best_of_what_it_tries(rng):
    w = torch.from_numpy(rng.standard_normal((1, 32)) ** 3).float()
    errors = []
    for step in range(16):
        scale = np.float16(w.abs().max().item() * (1 - 0.6 * step / 16) / 7)
        q = np.clip(np.round(w.numpy() / np.float32(scale)), -7, 7) * np.float32(scale)
        errors.append(((q - w.numpy()) ** 2).sum())
    got = tg.RowInt(4).decode(*tg.RowInt(4).fit(w, tg.Config()))
    assert abs((got - w).square().sum().item() - min(errors)) < 1e-4 * min(errors)


def test_hessian_weighs_the_columns(rng):
    cfg = tg.Config(**dict(TINY, quant_bits=3))
    w = {"blocks.0.mlp.fc.weight": torch.from_numpy(rng.standard_normal((32, 32))).float()}
    h = torch.diag(torch.tensor([100.0] * 8 + [0.01] * 24))
    plain, weighted = (
        tg.unpack(tg.pack(w, cfg, hessians))[1]["blocks.0.mlp.fc.weight"]
        for hessians in (None, {"blocks.0.mlp.fc.weight": h})
    )
    error = [
        ((x - w["blocks.0.mlp.fc.weight"]).square() * h.diagonal()).sum() for x in (plain, weighted)
    ]
    assert error[1] < error[0]


@pytest.mark.parametrize("codec", ["zstd", "zlib", "lzma"])
def test_round_trip_is_exact(codec):
    cfg, state = packed(compressor=codec, quant_policy="mlp:5,embed:6", eval_seq_len=48)
    blob = tg.pack(state, cfg, code_bytes=123)
    stored, weights = tg.unpack(blob)
    assert stored.group("model", "pack", "score") == cfg.group("model", "pack", "score")
    assert weights.keys() == state.keys() and blob == tg.pack(state, cfg, code_bytes=123)
    header, _ = tg.read_header(blob)
    assert header["codec"] == codec and header["code_bytes"] == 123
    kinds = {name: kind for name, _, kind in header["tensors"]}
    assert kinds["tok_emb.weight"] == "int6" and kinds["blocks.0.mlp.fc.weight"] == "int5"
    assert kinds["blocks.0.attn.c_q.weight"] == "int8" and kinds["blocks.0.resid_mix"] == "f32"
    for name, w in state.items():
        if kinds[name] == "f32":
            assert torch.equal(weights[name], w)
        elif kinds[name] == "f16":
            assert torch.equal(weights[name], w.half().float())
        else:
            top = 2 ** (int(kinds[name][3:]) - 1) - 1
            q, scales = (part.numpy() for part in tg.QUANTIZERS[kinds[name]].fit(w, cfg))
            assert np.abs(q).max() <= top and scales.dtype == np.float16
            expected = q.astype(np.float32) * scales.astype(np.float32)
            assert np.array_equal(weights[name].numpy(), expected)
    tg.GPT(stored).load_state_dict(weights, strict=True)


def test_every_tensor_has_a_role_and_off_leaves_no_byte():
    names = {tg.tensor_role(name) for name in tg.GPT(tg.Config(**FULL)).state_dict()}
    assert names == set(tg.ROLES)
    _, plain = packed(tg.Config(**TINY))
    assert not any(
        "bigram" in row[0] or "smear" in row[0] or "ve_" in row[0]
        for row in tg.read_header(tg.pack(plain, tg.Config(**TINY)))[0]["tensors"]
    )


def test_weights_that_are_not_finite():
    cfg, state = packed()
    state["skip_weights"][0, 0] = float("nan")
    with pytest.raises(tg.InputError, match="skip_weights"):
        tg.pack(state, cfg)


def test_size_report_adds_up():
    cfg, state = packed()
    blob = tg.pack(state, cfg)
    lines = tg.size_report(blob, 1000, 10)
    assert (
        f"Total submission size zstd: {len(blob) + 1000} bytes" in lines
        and "OVER THE CAP" in lines[3]
    )
    assert "OVER" not in "".join(tg.size_report(blob, 1000, len(blob) + 1000))


def test_size_report_names_the_largest_tensors():
    """Sizes by the counts of each tensor's byte values, largest first."""
    cfg, state = packed(quant_policy="mlp:5")
    blob, needs = tg.pack(state, cfg), {}
    for name, _, kind in tg.read_header(blob)[0]["tensors"]:
        arrays = tg.QUANTIZERS[kind].fit(state[name], cfg)
        counts = Counter(b"".join(array.numpy().tobytes() for array in arrays)).values()
        needs[name] = sum(n * math.log2(sum(counts) / n) for n in counts) / 8
    lines = tg.size_report(blob, 1000, 5_000_000)
    assert lines[3] == f"size_cap:5000000 margin:{5_000_000 - 1000 - len(blob)} bytes"
    told = [(line.split()[4], int(line.split()[1])) for line in lines[4:]]
    assert [name for name, _ in told] == sorted(needs, key=needs.get, reverse=True)[:5]
    assert all(abs(size - needs[name]) < 1 for name, size in told)


def test_a_small_matrix_beyond_float16_stays_float32():
    cfg, state = packed()
    state["blocks.0.attn.c_k.weight"][0, 0] = 7e4
    cfg = dataclasses.replace(cfg, keep_float_max_numel=65536)
    _, weights = tg.unpack(tg.pack(state, cfg))
    assert torch.equal(weights["blocks.0.attn.c_k.weight"], state["blocks.0.attn.c_k.weight"])


def resealed(blob, header=None, payload=None, version=1):
    """A blob with another header or payload and a correct checksum: only the content is wrong."""
    old_header, old_payload = tg.read_header(blob)
    body = zlib.compress(json.dumps(old_header if header is None else header).encode())
    payload = old_payload if payload is None else payload
    return (
        struct.pack(
            "<8sHIQ32s",
            tg.MAGIC,
            version,
            len(body),
            len(payload),
            hashlib.sha256(body + payload).digest(),
        )
        + body
        + payload
    )


@pytest.fixture(scope="module")
def blob():
    cfg, state = packed()
    return tg.pack(state, cfg)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda b: b"", "shorter"),
        (lambda b: b[:40], "shorter"),
        (lambda b: b[:-1], "cut short or extended"),
        (lambda b: b + b"\0", "cut short or extended"),
        (lambda b: b"X" + b[1:], "begins with"),
        (lambda b: b[:8] + b"\2\0" + b[10:], "format version 2"),
        (lambda b: b[:2000] + bytes([b[2000] ^ 4]) + b[2001:], "checksum"),
        (lambda b: b[:14] + struct.pack("<Q", 1 << 60) + b[22:], "cut short or extended"),
    ],
)
def test_damage_is_refused(blob, change, message):
    with pytest.raises(tg.InputError, match=message):
        tg.unpack(change(blob))


def with_header(blob, **fields):
    return resealed(blob, {**tg.read_header(blob)[0], **fields})


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(tensors=[["a", [2**30, 2**30], "int8"]]), "claims"),
        (dict(tensors=[["a", [2**40], "f32"]]), "bad tensor table"),
        (dict(tensors=[["a", [-1, 3], "f32"]]), "bad tensor table"),
        (dict(tensors=[["a", [4], "int8"]]), "bad tensor table"),
        (dict(tensors=[["a", [4, 4], "pickle"]]), "bad tensor table"),
        (dict(tensors="x"), "bad tensor table"),
        (dict(tensors=None), "bad tensor table"),
        (dict(tensors=[["a", [4, 4], "f32"]]), "payload cannot be expanded"),
        (dict(codec="rar"), "codec 'rar'"),
        (dict(codec="zlib"), "payload cannot be expanded"),
        (dict(config={"no_such_setting": 1}), "not those of this program"),
        (dict(config=[]), "not those of this program"),
        (dict(config={"num_layers": "nine"}), "wrong type"),
        (dict(config={"num_layers": True}), "wrong type"),
        (dict(config={"smear": 1}), "wrong type"),
        (dict(config={"matrix_lr": False}), "wrong type"),
        (dict(config={"ve_layers": [1, True]}), "wrong type"),
        (dict(notes="x" * (5 << 20)), "unreadable header"),  # compressed it is small
        (dict(config={"num_heads": 0}), "expected 1 or more"),
    ],
)
def test_wrong_claims_are_refused(blob, fields, message):
    with pytest.raises(tg.InputError, match=message):
        tg.unpack(with_header(blob, **fields))


def test_a_zstd_frame_that_claims_another_size_allocates_nothing(blob):
    frame = bytearray(tg.read_header(blob)[1])
    assert frame[4] & 0xC0 in (0x40, 0x80)  # the frame header holds 2 or 4 bytes of size
    frame[5:7] = b"\xff\xff"
    with pytest.raises(tg.InputError, match="cannot be expanded"):
        tg.unpack(resealed(blob, payload=bytes(frame)))
    bomb = zlib.compress(b"\0" * 50_000_000, 9)
    with pytest.raises(tg.InputError, match="cannot be expanded"):
        tg.unpack(resealed(blob, {**tg.read_header(blob)[0], "codec": "zlib"}, bomb))


def fuzz_artifacts(blob, rng, count):
    """Damaged files must be refused; if the checksum is right, refused or of sane shapes."""
    header, payload = tg.read_header(blob)
    text = json.dumps(header).encode()
    for i in range(count):
        if i % 2:
            raw = bytearray(blob)
            raw[rng.integers(0, len(raw))] ^= 1 << rng.integers(0, 8)
            with pytest.raises(tg.InputError):
                tg.unpack(bytes(raw[: len(raw) - rng.integers(0, 2)]))
            continue
        changed, data = bytearray(text), bytearray(payload)
        for _ in range(rng.integers(1, 4)):
            if rng.random() < 0.7:
                changed[rng.integers(0, len(changed))] = rng.integers(32, 127)
            else:
                data[rng.integers(0, len(data))] = rng.integers(0, 256)
        body = zlib.compress(bytes(changed), 1)
        sealed = (
            struct.pack(
                "<8sHIQ32s",
                tg.MAGIC,
                1,
                len(body),
                len(data),
                hashlib.sha256(body + bytes(data)).digest(),
            )
            + body
            + bytes(data)
        )
        try:
            _, weights = tg.unpack(sealed)
        except tg.InputError:
            continue
        assert sum(w.numel() for w in weights.values()) < 10 * len(blob)


def test_fuzz_artifact_reader(blob, rng):
    fuzz_artifacts(blob, rng, 2000)


@pytest.mark.slow
def test_fuzz_artifact_reader_long(blob, rng):
    fuzz_artifacts(blob, rng, 40_000)


def test_an_artifact_of_the_first_version_loads():
    """Written by an earlier program: every kind of tensor, the same logits."""
    told = json.loads((ROOT / "tests/artifact_v1.json").read_text())
    blob = base64.b64decode(told["artifact"])
    stored, weights = tg.unpack(blob)
    kinds = {kind for _, _, kind in tg.read_header(blob)[0]["tensors"]}
    assert kinds == {"int5", "int6", "int8", "f16", "f32"}
    model = tg.build_model(stored, tg.Runtime(tg.Config(device="cpu"), {}), weights)
    logits = model.logits(torch.tensor([told["ids"]]))[0, -1, : len(told["last_logits"])]
    np.testing.assert_allclose(logits.detach().numpy(), told["last_logits"], atol=1e-4)
