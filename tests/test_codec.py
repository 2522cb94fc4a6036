"""The text compressor in real processes: files, errors, other settings, and its own proof."""

import json
import struct

import codec
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_RUN, clean_env
from helpers import python

import train_gpt as tg

TEXT = "bo dake tinu\r\n\tl\u00e4ngst \u2603 ba  bo dake tinu bo dake\n"
VALIDATION = ("tinu bo dake bo", "x", TEXT, "", TEXT + TEXT, "bo bo bo tinu", "bo dake")


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    """Settings that name a tiny artifact and short validation documents."""
    out = tmp_path_factory.mktemp("tiny") / "run"
    settings = {**TINY_RUN, "OUT_DIR": str(out), "DEVICE": "cpu", "VAL_TOKENS": "64"}
    assert tg.main([], settings) == 0
    tokens = []
    for text in VALIDATION:
        tokens += [1, *(byte + 4 for byte in text.encode())]
    tg.write_shard(out / "short" / tg.shard_name("val", 0), np.array(tokens))
    return {
        "ARTIFACT": str(out / "model.ptz"),
        "DATA_PATH": str(out / "short"),
        "TOKENIZER_PATH": "byte260",
    }


@pytest.fixture(scope="module")
def packed(env, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "speech.txt"
    path.write_bytes(TEXT.encode())
    assert codec.main(["compress", str(path)], env) == 0
    return path.with_name("speech.txt.pgolf").read_bytes()


def tool(env, *arguments):
    """The command in a process of its own -> how it ended."""
    return python([ROOT / "records/codec.py", *arguments], clean_env(**env))


# --- files ----------------------------------------------------------------------------------------


def test_compress_and_decompress(env, packed, tmp_path):
    """In processes of their own, with default names; the file does not depend on the process."""
    path = tmp_path / "speech.txt"
    path.write_bytes(TEXT.encode())
    done = tool(env, "compress", path)
    assert done.returncode == 0, done.stderr
    assert f"{len(TEXT.encode())} bytes" in done.stdout
    assert "zstd" in done.stdout
    assert (tmp_path / "speech.txt.pgolf").read_bytes() == packed
    path.unlink()
    done = tool(env, "decompress", tmp_path / "speech.txt.pgolf")
    assert done.returncode == 0, done.stderr
    assert path.read_bytes() == TEXT.encode()


def test_the_header_says_what_a_decoder_needs(packed):
    (size,) = struct.unpack_from("<I", packed, 8)
    header = json.loads(packed[12 : 12 + size])
    assert header["targets"] == len(TEXT.encode())
    assert header["EVAL_STRIDE"] == 16
    assert header["torch"] == torch.__version__


def test_named_outputs(env, tmp_path):
    source = tmp_path / "a"
    source.write_text("bo dake")
    between = str(tmp_path / "b.bin")
    target = tmp_path / "c"
    assert codec.main(["compress", str(source), "-o", between], env) == 0
    assert codec.main(["decompress", between, "-o", str(target)], env) == 0
    assert target.read_text() == "bo dake"
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b.bin", "c"}


# --- what is refused ------------------------------------------------------------------------------


def test_errors_of_real_processes(env, packed, tmp_path):
    text = tmp_path / "latin.txt"
    bad = tmp_path / "bad.txt.pgolf"
    text.write_bytes("l\u00e4ngst".encode("latin-1"))
    bad.write_bytes(packed[:-1])
    for command, path, message in (
        ("compress", text, "latin.txt: not UTF-8"),
        ("decompress", bad, "wrong checksum"),
    ):
        done = tool(env, command, path)
        assert done.returncode == 64
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"latin.txt", "bad.txt.pgolf"}


@pytest.fixture
def refused(env, tmp_path, capsys):
    """Runs the tool in this process, expects exit code 64, the message and no new file."""

    def check(message, *arguments, **settings):
        before = sorted(tmp_path.iterdir())
        assert codec.main([*map(str, arguments)], {**env, **settings}) == 64
        assert message in capsys.readouterr().err
        assert sorted(tmp_path.iterdir()) == before

    return check


def test_unusable_input_is_named(refused, tmp_path):
    empty = tmp_path / "empty.txt"
    full = tmp_path / "full.txt"
    empty.write_bytes(b"")
    full.write_bytes(b"bo")
    refused("empty.txt: empty", "compress", empty)
    refused("none.txt", "compress", tmp_path / "none.txt")
    refused("none.pgolf", "decompress", tmp_path / "none.pgolf")
    refused("full.txt: no .pgolf to take off", "decompress", full)
    refused("not a compressed text", "decompress", full, "-o", tmp_path / "x")
    refused("ARTIFACT='none.ptz'", "compress", full, ARTIFACT="none.ptz")
    refused("expected 1 or more", "verify", "--documents", 0)
    refused("expected 1 or more", "verify", "--tokens", 0)
    refused("nothing was started", "compress", full, EVAL_STREAM="24")


def changed(blob, at, value):
    return blob[:at] + value + blob[at + len(value) :]


def damaged(blob):
    """(damaged file, what is said of it)."""
    count = blob.index(b'"targets": ') + len(b'"targets": ')
    flipped = bytes([blob[-1] ^ 1])
    return {
        "nothing": (b"", "begins with b''"),
        "another magic": (changed(blob, 0, b"Q"), "begins with b'QGOLFTXT'"),
        "10 bytes": (blob[:10], "unreadable header"),
        "100 bytes": (blob[:100], "unreadable header"),
        "no JSON": (changed(blob, 12, b"["), "unreadable header"),
        "an empty header": (changed(blob, 8, bytes(4)), "unreadable header"),
        "a huge header": (changed(blob, 8, b"\xff\xff\xff\xff"), "unreadable header"),
        "another count": (changed(blob, count, b"9"), "wrong checksum"),
        "cut": (blob[:-20], "wrong checksum"),
        "a byte more": (blob + b"\0", "wrong checksum"),
        "the last bit": (changed(blob, len(blob) - 1, flipped), "wrong checksum"),
    }


KINDS_OF_DAMAGE = list(damaged(b'PGOLFTXT"targets": '))


@pytest.mark.parametrize("kind", KINDS_OF_DAMAGE)
def test_damage_is_noticed(kind, packed, refused, tmp_path):
    blob, message = damaged(packed)[kind]
    (tmp_path / "bad.txt.pgolf").write_bytes(blob)
    refused(message, "decompress", tmp_path / "bad.txt.pgolf")


def test_other_settings_are_named(packed, refused, tmp_path, env):
    path = tmp_path / "speech.txt.pgolf"
    path.write_bytes(packed)
    refused("another EVAL_STREAM: 0; here it is 16", "decompress", path, EVAL_STREAM="16")
    both = "another TILT: 0; here it is 1, another NGRAM: ; here it is mix"
    refused(both, "decompress", path, TILT="1", NGRAM="mix")
    refused("another SEED: 1337; here it is 5", "decompress", path, SEED="5")
    other = tmp_path / "other.ptz"
    with open(env["ARTIFACT"], "rb") as file:
        cfg, weights = tg.unpack(file.read())
    other.write_bytes(tg.pack({name: w + 0.01 for name, w in weights.items()}, cfg))
    refused("another artifact_sha256", "decompress", path, ARTIFACT=str(other))


@pytest.fixture
def other_frequencies(monkeypatch):
    """Here, frequencies are others than in a process of its own, and as long a code."""
    real = codec.frequencies

    def shifted(log_p):
        return real(log_p) + (np.arange(261) > 9)

    monkeypatch.setattr(codec, "frequencies", shifted)


def test_a_decoder_that_computes_otherwise_writes_nothing(
    packed, refused, tmp_path, other_frequencies
):
    path = tmp_path / "speech.txt.pgolf"
    path.write_bytes(packed)
    refused("decoded to another text: this machine", "decompress", path)


def test_a_text_that_cannot_be_spelled_is_refused(refused, tmp_path, monkeypatch):
    def one_less(text, table):
        return table.encode(text)[:-1]

    (tmp_path / "a.txt").write_text("bo dake")
    monkeypatch.setattr(codec, "tokens_of", one_less)
    refused("a.txt: the tokenizer byte260 cannot spell", "compress", tmp_path / "a.txt")


# --- the scorer, and the proof --------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, name",
    [
        (dict(), "sliding"),
        (dict(EVAL_STRIDE="0"), "plain"),
        (dict(NGRAM="backoff", EVAL_PLAIN="0"), "sliding"),
        (dict(TTT_EPOCHS="1", TTT_BEFORE_SCORING="1"), "sliding"),
        (dict(NGRAM="fixed", EVAL_STREAM="16"), "streaming"),
        (dict(NGRAM="fixed", TTT_EPOCHS="1"), "ttt"),
        (dict(TTT_EPOCHS="1", TTT_BEFORE_SCORING="1", TILT="1"), "sliding"),
        (dict(NGRAM="mix", EVAL_STREAM="16"), "mixed"),
    ],
)
def test_the_last_true_stage_is_chosen(settings, name, env):
    scorer = codec.Codec({**env, **settings}).scorer()
    assert scorer.name == name
    assert scorer.validity == "valid"


MIXED = dict(EVAL_STREAM="16", TILT="1", NGRAM="mix", MIX_CHUNK_TOKENS="64", TTT_CHUNK_TOKENS="64")


@pytest.mark.parametrize("settings, name", [(dict(), "sliding"), (MIXED, "mixed")])
def test_verify(settings, name, env, capsys):
    """Over all document starts, the ends of chunks, and a last document that is cut.

    The empty document is none.
    """
    arguments = ["verify", "--documents", "9", "--tokens", "194"]
    assert codec.main(arguments, clean_env(**env, **settings)) == 0
    out = capsys.readouterr().out
    assert f"{name}: 6 documents, 194 tokens" in out
    assert ": ok" in out
    assert "identical" in out


def test_verify_finds_a_wrong_claim(env, monkeypatch, capsys):
    claim = codec.Codec.claimed_bits

    def half(self, tokens):
        return 0.5 * claim(self, tokens)

    monkeypatch.setattr(codec.Codec, "claimed_bits", half)
    assert codec.main(["verify", "--tokens", "60"], clean_env(**env)) == 1
    out = capsys.readouterr().out
    assert "TOO LONG" in out
    assert "identical" in out


def test_verify_finds_a_wrong_code(env, other_frequencies, capsys):
    """The encoder here has other frequencies than the decoder in its process, and as many bits."""
    assert codec.main(["verify", "--tokens", "60"], clean_env(**env)) == 1
    out = capsys.readouterr().out
    assert ": ok" in out
    assert "DIFFERENT" in out
