"""Artifacts whose header or payload was changed and sealed again: refused, or what they may say."""

import copy
import hashlib
import json
import struct
import time
import zlib

import numpy as np
import pytest
import zstandard
from conftest import FULL
from helpers import config, mild

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
