"""Artifacts whose header or payload was changed and sealed again: refused, or what they may say."""

import copy
import hashlib
import itertools
import json
import struct
import time
import zlib

import numpy as np
import pytest
import torch
import zstandard
from conftest import FULL, TINY
from helpers import calibration_of, config, mild, with_lanes

import train_gpt as tg

# What takes the place of a value in the header: of every type, and beyond all bounds.
VALUES = [None, True, False, -1, 0, 1, 2, 7, 256, 2**31, 2**63, 10**29, 10**400, 0.5, -1.0, 1e308]
VALUES += [float("nan"), float("inf"), "", "zstd", "lzma", "int8", "f32", "x" * 100_000, "\ud800"]
VALUES += ["a\nfinal_zstd_plain_exact val_loss:0.1", [], {}, [1] * 70, [[]], {"a": 1}, [2**40, 2]]
VALUES += [[260, 32], [32, 260], [-260, -32], ["x"], [1.0, 2.0], [None]]


BOMB = zstandard.ZstdCompressor(level=1).compress(bytes(1 << 28))  # 256 MB in a few kB


def places_in(value, path=()):
    """Every place of a JSON value, as keys and numbers."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places_in(value[key], (*path, key))
    elif isinstance(value, list):
        for number in range(len(value)):
            yield from places_in(value[number], (*path, number))


def parent_of(header, path):
    for key in path[:-1]:
        header = header[key]
    return header


class Mutation:
    """One change of a header's JSON or of a payload; `path` says where."""

    def __init__(self, header, payload, rng):
        self.header = copy.deepcopy(header)
        self.payload = payload
        self.rng = rng
        places = [path for path in places_in(header) if path]
        tables = [path for path in places if path[0] == "tensors"]
        places = tables if rng.random() < 0.3 else [p for p in places if p[0] != "tensors"]
        self.path = places[rng.integers(len(places))]
        self.kind = rng.choice(["replace", "replace", "nudge", "delete", "copy", "weights", "text"])
        self.text = getattr(self, self.kind)()

    def replace(self):
        value = VALUES[self.rng.integers(len(VALUES))]
        parent_of(self.header, self.path)[self.path[-1]] = value
        return json.dumps(self.header)

    def nudge(self):
        """A number that is slightly another; other values become a list of themselves."""
        parent, key = parent_of(self.header, self.path), self.path[-1]
        value = parent[key]
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        parent[key] = value + int(self.rng.choice([-1, 1, 2])) if number else [value]
        return json.dumps(self.header)

    def delete(self):
        del parent_of(self.header, self.path)[self.path[-1]]
        return json.dumps(self.header)

    def copy(self):
        """An element twice, or a key under another name."""
        parent, key = parent_of(self.header, self.path), self.path[-1]
        if isinstance(parent, list):
            parent.insert(int(self.rng.integers(len(parent) + 1)), parent[key])
        else:
            parent[f"{key}_"] = parent[key]
        return json.dumps(self.header)

    def weights(self):
        self.path = ("payload",)
        raw = bytearray(self.payload)
        cut = int(self.rng.integers(1, 40))
        changed = {
            "flip": lambda: raw.__setitem__(self.rng.integers(len(raw)), self.rng.integers(256)),
            "cut": lambda: raw.__delitem__(slice(len(raw) - cut, None)),
            "extend": lambda: raw.extend(bytes(cut)),
            "bomb": lambda: raw.__setitem__(slice(None), BOMB),
        }
        changed[self.rng.choice(list(changed))]()
        self.payload = bytes(raw)
        return json.dumps(self.header)

    def text(self):
        """Bytes of the JSON text itself, nesting, and what follows it."""
        self.path = ("text",)
        text = json.dumps(self.header)
        at = int(self.rng.integers(len(text)))
        return self.rng.choice(
            [
                text[:at],
                text + "{}",
                "[" * 100_000,
                text[:at] + text[at + 1 :],
                text[:at] + chr(self.rng.integers(32, 127)) + text[at + 1 :],
                text.replace('"codec"', '"codec":"lzma","codec"'),
                "x" * (5 << 20),
            ]
        )

    def sealed(self):
        """The file, its checksum repaired; now and then with something behind the header."""
        body = zlib.compress(self.text.encode(errors="surrogatepass"), 1)
        if self.kind == "text" and self.rng.random() < 0.2:
            body += b"more"
        digest = hashlib.sha256(body + self.payload).digest()
        sizes = (len(body), len(self.payload))
        return (
            struct.pack("<8sHIQ32s", tg.MAGIC, tg.FORMAT_VERSION, *sizes, digest)
            + body
            + self.payload
        )


@pytest.fixture(scope="module")
def original():
    cfg = config(FULL, ttt_epochs=0, ngram_primes=(3, 5), ttt_chunk_tokens=64)
    blob = tg.pack(mild(cfg).state_dict(), cfg, notes={"tokenizer": "byte260", "seed": 1})
    return tg.read_header(blob)


# Places whose values the file may choose: settings, notes, the recorded size of the code, how a
# tensor is stored, the weights themselves, and JSON's own white space.
FREE = ("config", "notes", "code_bytes", "payload", "text")


def check_accepted(mutation, cfg, weights):
    """What was accepted says what it may: settings, and the weights of their model."""
    path = mutation.path
    may = path[0] in FREE or (path[0] == "tensors" and len(path) in (2, 3, 4))
    assert may, (mutation.kind, path)
    assert not tg.check_config(cfg)
    shapes = {name: w.shape for name, w in tg.GPT(cfg).state_dict().items()}
    assert {name: w.shape for name, w in weights.items()} == shapes
    assert all(w.isfinite().all() for w in weights.values())


def unpack_mutations(original, count, seed, rt):
    """How many were accepted; none takes long or needs memory, and none is a traceback."""
    header, payload = original
    accepted = 0
    before = rt.peak_memory()
    for number in range(count):
        mutation = Mutation(header, payload, np.random.default_rng([seed, number]))
        blob = mutation.sealed()
        began = time.process_time()
        try:
            cfg, weights = tg.unpack(blob)
        except tg.InputError as error:
            assert str(error).isprintable()
            assert len(str(error)) < 2000
        else:
            accepted += 1
            check_accepted(mutation, cfg, weights)
        assert time.process_time() - began < 5, (number, mutation.kind, mutation.path)
        assert rt.peak_memory() - before < 256e6, (number, mutation.kind, mutation.path)
    return accepted


def test_mutations_of_an_artifact(original, rt):
    accepted = unpack_mutations(original, 300, 0, rt)
    assert 10 < accepted < 150  # neither is all refused nor anything taken


@pytest.mark.slow
def test_many_mutations_of_an_artifact(original, rt):
    unpack_mutations(original, 5000, 1, rt)


# --- rANS -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sixteen_lanes():
    """As if they were right for any matrix: so artifacts are read quickly."""
    with with_lanes(16):
        yield


CORRECTED = dict(lqer_enabled=True, lqer_top_k=2)
CODED = {
    "rows": CORRECTED,
    "steps": dict(quant_step=0.01, gptq_n_samples=1, gptq_reserve_seconds=1.0),
    "steps and LQER": dict(
        quant_step=0.01, gptq_n_samples=1, gptq_reserve_seconds=1.0, **CORRECTED
    ),
}


@pytest.fixture(scope="module", params=CODED)
def coded(request, sixteen_lanes):
    """An artifact by rANS."""
    sizes = dict(num_layers=1, keep_float_max_numel=1500, compressor="rans")
    cfg = config(TINY, **sizes, **CODED[request.param])
    state = mild(cfg).state_dict()
    return tg.pack(state, cfg, calibration_of(state, highest=1.0))


def test_mutations_of_coded_artifacts(coded, rt):
    accepted = unpack_mutations(tg.read_header(coded), 60, 2, rt)
    assert 3 < accepted < 30


@pytest.mark.slow
def test_many_mutations_of_coded_artifacts(coded, rt):
    unpack_mutations(tg.read_header(coded), 3000, 3, rt)


class Payload:
    """What a payload of rANS holds, to be changed and put together again."""

    def __init__(self, blob):
        self.header, payload = tg.read_header(blob)
        cfg = tg.config_from(self.header["config"])
        parts = []
        for _, shape, kind in self.header["tensors"]:
            parts += tg.quantizer(kind, cfg).layout(shape)
        streams = [part.stream for part in parts]
        others = sum(part.size for part in parts if part.stream != "codes")
        (length,) = struct.unpack_from("<I", payload)
        first = zstandard.ZstdDecompressor().decompress(payload[4 : 4 + length])
        tables_at = others + 6 * streams.count("codes")
        self.others = first[:others]
        self.ranges = [list(row) for row in struct.iter_unpack("<Ih", first[others:tables_at])]
        self.tables = bytearray(first[tables_at:])
        self.codes = payload[4 + length :]
        assert sum(size for size, _ in self.ranges) == len(self.codes)

    def first_part(self):
        rows = [struct.pack("<Ih", *row) for row in self.ranges]
        return self.others + b"".join(rows) + self.tables

    def sealed(self, frame=None, length=None):
        """The artifact of this payload, its checksum repaired."""
        frame = frame or zstandard.ZstdCompressor(level=1).compress(self.first_part())
        length = len(frame) if length is None else length
        body = zlib.compress(json.dumps(self.header).encode(), 1)
        payload = struct.pack("<I", length) + frame + self.codes
        digest = hashlib.sha256(body + payload).digest()
        sizes = (len(body), len(payload))
        prefix = struct.pack("<8sHIQ32s", tg.MAGIC, tg.FORMAT_VERSION, *sizes, digest)
        return prefix + body + payload


def refused(blob, rt):
    """The complaint about an artifact, or None: soon, and without much memory."""
    before = rt.peak_memory()
    began = time.process_time()
    said = None
    try:
        _, weights = tg.unpack(blob)
    except tg.InputError as error:
        said = str(error)
    else:
        assert all(w.isfinite().all() for w in weights.values())
        tg.size_report(blob, 0, 10**6)
    assert time.process_time() - began < 5
    assert rt.peak_memory() - before < 256e6
    return said


def test_a_payload_put_together_again_is_as_before(coded, rt):
    blob = Payload(coded).sealed()
    assert refused(blob, rt) is None
    pairs = zip(tg.unpack(coded)[1].values(), tg.unpack(blob)[1].values())
    assert all(torch.equal(a, b) for a, b in pairs)


def frame_of_zeros(size):
    """A zstd frame of a few bytes for each 128 kB that it truly expands to."""
    block = 1 << 17
    frame = struct.pack("<IBQ", 0xFD2FB528, 0xE0, size)
    blocks = size // block
    for number in range(blocks):
        last = number == blocks - 1
        frame += struct.pack("<I", block << 3 | 2 | last)[:3] + b"\0"
    return frame


def test_a_first_part_of_two_gigabytes_allocates_nothing(coded, rt):
    bomb = frame_of_zeros(1 << 20)
    assert zstandard.ZstdDecompressor().decompress(bomb) == bytes(1 << 20)
    said = refused(Payload(coded).sealed(frame_of_zeros(1 << 31)), rt)
    assert "no frame" in said


@pytest.mark.parametrize("length", [0, 1, 17, 2**31, 2**32 - 1])
def test_a_first_part_of_another_length_is_refused(length, coded, rt):
    assert "cannot be expanded" in refused(Payload(coded).sealed(length=length), rt)


# By how much the first range is longer, and the second; as the file has them and beyond it.
LENGTHS = [(2, 0), (-2, 0), (1, -1), (2, -2), (-2, 2), (-4, 4), (10**6, 0), (2**32 - 10**5, 0)]


@pytest.mark.parametrize("first, second", LENGTHS)
def test_ranges_of_other_lengths_are_refused(first, second, coded, rt):
    """Overlapping, beyond the file, or with bytes between them."""
    payload = Payload(coded)
    payload.ranges[0][0] += first
    payload.ranges[1][0] += second
    assert "cannot be expanded" in refused(payload.sealed(), rt)


def test_missing_and_added_ranges_are_refused(coded, rt):
    for change in (list.pop, list.clear, list.reverse):
        payload = Payload(coded)
        change(payload.ranges)
        assert refused(payload.sealed(), rt)
    payload = Payload(coded)
    payload.ranges.append([0, 0])
    assert refused(payload.sealed(), rt)


@pytest.mark.parametrize("spread", [-32768, -(2**14) - 1, -200, 200, 32767])
def test_spreads_out_of_range_are_taken_as_the_last(spread, coded, rt):
    """Refused, or other codes: never an index beyond the tables."""
    for number in (0, -1):
        payload = Payload(coded)
        payload.ranges[number][1] = spread
        refused(payload.sealed(), rt)


@pytest.mark.parametrize("lowest", [-(2**31), -300, 300, 2**31 - 1])
def test_codes_beyond_their_type_are_refused(lowest, coded, rt):
    payload = Payload(coded)
    highest, _, others = struct.unpack_from("<hiH", payload.tables, 2)
    struct.pack_into("<hiH", payload.tables, 2, highest, lowest, others)
    assert "cannot be expanded" in refused(payload.sealed(), rt)


KIND_NAMES = ("step8", "step16", "int8", "int2", "f16", "f32", "rans")
KIND_NAMES += ("step8+lqer", "f16+lqer", "int6+lqer", "+lqer", "step", "step8 ", "STEP8")


def test_other_kinds_are_refused_or_read(coded, rt):
    """Of a vector, and of each of the first matrices."""
    names = itertools.product(KIND_NAMES, range(1, 5))
    read = 0
    for kind, number in names:
        payload = Payload(coded)
        _, shape, now = payload.header["tensors"][number]
        payload.header["tensors"][number][2] = kind
        said = refused(payload.sealed(), rt)
        read += said is None
        if len(shape) != 2 and kind not in ("f16", "f32"):
            assert "bad tensor table" in said
        if kind == now:
            assert said is None
    assert 4 <= read < 40


def spoiled(payload, rng):
    """A bit or a few bytes changed in one of the payload's regions."""
    region = rng.choice(["others", "tables", "codes", "ranges"])
    if region == "ranges":
        row = payload.ranges[rng.integers(len(payload.ranges))]
        at = rng.integers(2)
        row[at] = int(rng.integers(0, 2**15)) if rng.random() < 0.5 else row[at] ^ 1
        return
    data = bytearray(getattr(payload, region))
    for _ in range(rng.integers(1, 3)):
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    if rng.random() < 0.1:
        del data[rng.integers(len(data)) :]
    setattr(payload, region, data)


def fuzz_payloads(blob, rt, count, seed):
    """Regions spoiled before they are compressed -> how many were read."""
    read = 0
    for number in range(count):
        payload = Payload(blob)
        spoiled(payload, np.random.default_rng([seed, number]))
        read += refused(payload.sealed(), rt) is None
    return read


def test_spoiled_payloads(coded, rt):
    assert 0 < fuzz_payloads(coded, rt, 40, 0) < 32


@pytest.mark.slow
def test_many_spoiled_payloads(coded, rt):
    fuzz_payloads(coded, rt, 4000, 1)


@pytest.mark.slow
@pytest.mark.parametrize("region", ["tables", "ranges"])
def test_every_bit_of_tables_and_lengths(region, coded, rt):
    """Each one changed alone, with the lanes that a count of codes gets."""
    size = 8 * (
        len(Payload(coded).tables) if region == "tables" else 6 * len(Payload(coded).ranges)
    )
    for bit in range(size):
        payload = Payload(coded)
        rows = b"".join(struct.pack("<Ih", *row) for row in payload.ranges)
        data = payload.tables if region == "tables" else bytearray(rows)
        data[bit // 8] ^= 1 << bit % 8
        if region == "ranges":
            payload.ranges = [list(row) for row in struct.iter_unpack("<Ih", data)]
        refused(payload.sealed(), rt)


def test_neighbours_beyond_all_memory_share_a_scale(rt):
    """LQER_ASYM_GROUP of a file: no more neighbours than there are."""
    settings = dict(num_layers=1, keep_float_max_numel=1500, lqer_enabled=True)
    before = rt.peak_memory()
    weights = []
    for group in (4 * 260, 2**27):
        cfg = config(TINY, **settings, lqer_asym_group=group)
        weights.append(tg.unpack(tg.pack(mild(cfg).state_dict(), cfg))[1])
    first, second = weights
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert rt.peak_memory() - before < 256e6


# --- settings -------------------------------------------------------------------------------------

# Settings of scoring that an artifact may choose, and that would once take hours or all memory.
GREEDY = dict(
    eval_batch_tokens=1 << 24,
    ttt_epochs=2**31 - 1,
    ttt_parts=65536,
    ttt_batch_seqs=2**31 - 1,
    mix_chunk_tokens=2**31 - 1,
)


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_settings_of_an_artifact_end_soon(name, tmp_path):
    cfg = config(FULL)
    weights = mild(cfg).state_dict()
    settings = {"ttt_epochs": 1} if name.startswith("ttt") else {"tilt": True}
    greedy = config(vars(cfg), **{**settings, name: GREEDY[name]}, max_eval_seconds=5.0)
    (tmp_path / "greedy.ptz").write_bytes(tg.pack(weights, greedy))
    tg.synthetic_shards(tmp_path / "data")
    env = dict(MODE="eval", ARTIFACT=str(tmp_path / "greedy.ptz"), VAL_TOKENS="500", DEVICE="cpu")
    env |= dict(
        DATA_PATH=str(tmp_path / "data"), TOKENIZER_PATH="byte260", OUT_DIR=str(tmp_path / "o")
    )
    began = time.perf_counter()
    assert tg.main([], env) in (0, 5)
    assert time.perf_counter() - began < 60
