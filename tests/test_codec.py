"""The text compressor: coder, tokens of any text, and the tool in real processes."""

import json
import random
import struct
import subprocess
import sys

import codec
import export
import numpy as np
import pytest
import sentencepiece
import torch
from conftest import ROOT, SHARED, TINY_RUN, clean_env

import train_gpt as tg

# --- arithmetic coder -----------------------------------------------------------------------------


def skewed(rng, vocab):
    p = rng.dirichlet(np.full(vocab, 0.02))
    return np.maximum(p, 1e-300) / np.maximum(p, 1e-300).sum()


def near_certain(rng, vocab):
    p = np.full(vocab, 1e-9 / vocab)
    p[rng.integers(vocab)] += 1 - 1e-9
    return p / p.sum()


DISTRIBUTIONS = {
    "uniform": lambda rng, vocab: np.full(vocab, 1 / vocab),
    "skewed": skewed,
    "near-certain": near_certain,
    "common": lambda rng, vocab: rng.dirichlet(np.ones(vocab)),
}


def there_and_back(logs, symbols):
    """Bits of the code, after the symbols came back."""
    encoder = codec.Encoder()
    for log_p, symbol in zip(logs, symbols):
        encoder.encode(codec.frequencies(log_p), symbol)
    data = encoder.finish()
    decoder = codec.Decoder(data)
    assert [decoder.decode(codec.frequencies(log_p)) for log_p in logs] == symbols
    return 8 * len(data)


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize("vocab, count", [(2, 4000), (1024, 2000)])
def test_the_code_is_as_long_as_claimed(kind, vocab, count, rng):
    rows = [DISTRIBUTIONS[kind](rng, vocab) for _ in range(count)]
    symbols = [int(rng.choice(vocab, p=p)) for p in rows]
    claimed = -sum(np.log2(p[symbol]) for p, symbol in zip(rows, symbols))
    coded = there_and_back([torch.from_numpy(np.log(p)) for p in rows], symbols)
    assert claimed * 0.999 - 64 <= coded <= claimed * 1.001 + 64
    assert there_and_back([], []) <= 8


@pytest.mark.parametrize("vocab", [2, 1024])
def test_what_is_thought_impossible_comes_back(vocab, rng):
    """Tokens of probability exactly 0, again and again, and the most likely ones in between."""
    logs, symbols = [], []
    for number in range(600):
        log_p = torch.full((vocab,), -torch.inf, dtype=torch.float64)
        log_p[number % vocab] = 0.0
        logs.append(log_p)
        symbols.append(number % vocab if number % 3 else int(rng.integers(vocab)))
    assert there_and_back(logs, symbols) < 600 * 31


@pytest.mark.parametrize("edge", [0, 1])
def test_intervals_around_the_middle(edge):
    """Symbols on both sides of one half: bits stay open for long."""
    log_p = torch.tensor([0.5 - 1e-6, 2e-6, 0.5 - 1e-6], dtype=torch.float64).log()
    there_and_back([log_p] * 300, [1] * 299 + [2 * edge])


def test_frequencies(rng):
    for p in (
        skewed(rng, 1024),
        near_certain(rng, 1024),
        np.eye(1024)[7],
        np.full(65536, 2.0**-16),
    ):
        with np.errstate(divide="ignore"):
            cumulative = codec.frequencies(torch.from_numpy(np.log(p)))
        assert (
            cumulative[0] == 0 and (np.diff(cumulative) > 0).all() and len(cumulative) == len(p) + 1
        )
        assert np.abs(np.diff(cumulative) / codec.SCALE - p).max() <= 1 / codec.SCALE
    for wrong in (np.full(4, np.nan), np.log(np.full(4, 0.2)), np.log([1.0, 1e-3])):
        with pytest.raises(tg.InputError, match="sum to"):
            codec.frequencies(torch.from_numpy(wrong))


# --- tokens of any text ---------------------------------------------------------------------------

NASTY = [
    "",
    " ",
    "  ",
    " a",
    "a ",
    " a  b  ",
    "\n",
    "\n\na\n",
    "\ta\tb",
    "a\r\nb\r\n",
    "\r",
    "\0",
    "a\0b",
    "\u0085\u2028",
    "\ufb01n \ufb01",
    "\u2460",
    "\uff46\uff55\uff4c\uff4c",
    "\u01c5 \u0130 \xdf \u03a9 \u2126 \u2026 \xbd x\xb2",
    "e\u0301",
    "c\u0327 \u0327",
    "\u1100\u1161",
    "\uac00",
    "\xe9 is \u2603 x",
    "\u2603",
    "\u2581",
    "\u2581a",
    "a \u2581 b",
    "a\u2581b",
    "\u200d",
    "a\u200db",
    "\u200b",
    "\ufeffa",
    "\xa0",
    "a\u3000b",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 x",
    "\U0010ffff",
    "\ufffd",
    "\ue001\ue002",
    "\u202eabc",
    "\u05e9\u05dc\u05d5\u05dd \u0639\u0631\u0628\u064a",
    "<s>",
    "</s><unk>",
    "<0x41>",
    "<pad>",
    " \u2047 ",
    "a.b-c]^\\[&&--||~~",
    "The quick brown fox jumps over 13 lazy dogs.",
]
SENTENCES = [
    f"The {a} {b} of {number} small x\u0327 boats, and the other {b}s."
    for number, (a, b) in enumerate(
        (a, b)
        for a in ("quick", "lazy", "brown", "old")
        for b in ("fox", "dog", "river", "mountain", "letter")
    )
]
MODELS = [
    "byte260",
    "trained",
    "trained with a first mark",
    *sorted(path.name for path in SHARED.glob("data/tokenizers/*.model")),
]


@pytest.fixture(scope="module", params=MODELS)
def table(request, tmp_path_factory):
    """byte260, one of data/prepare.py, one that puts a mark before every text, the real ones."""
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    if request.param == "byte260":
        return tg.ByteTable.bytes260()
    if request.param == "trained":
        export.train_tokenizer(SENTENCES, 330, path)
    elif request.param.startswith("trained"):
        recipe = dict(export.RECIPE, add_dummy_prefix=True, vocab_size=330, minloglevel=2)
        prefix = str(path.with_suffix(""))
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SENTENCES), model_prefix=prefix, **recipe
        )
    else:
        path = SHARED / "data/tokenizers" / request.param
    return tg.ByteTable.from_sentencepiece(path)


def mixture(length=3000):
    """Everything above, shuffled together."""
    chance, parts = random.Random(0), [*filter(None, NASTY), *"etaoin      ", *SENTENCES[0].split()]
    return "".join(chance.choice(parts) for _ in range(length))[:length]


def spelled(text, table):
    """Tokens that give this text, and are charged for as many bytes as it has."""
    tokens = codec.tokens_of(text, table)
    assert codec.text_of(tokens, table) == text.encode(), repr(text)
    assert not table.boundary[tokens].any()
    return tokens


def test_any_text_comes_back(table):
    for text in NASTY:
        tokens = spelled(text, table)
        assert (
            codec.documents_of(np.array([1, *tokens, 1, *tokens]), table, 1)
            == f"{text}\n{text}".encode()
        )
    for text in ("".join(NASTY), "\n".join(NASTY), mixture()):
        tokens = spelled(text, table)
        assert len(tokens) <= len(text.encode())


def test_only_what_the_tokenizer_changes_is_spelled_in_bytes(table):
    text = " and ".join(SENTENCES[:3]).replace("\u0327", "").lower()
    assert spelled(text, table) == table.encode(text)
    if table.processor:  # d + line below: a pair that it would join
        assert (
            len(spelled(f"{text}\n{text}\ttwo  spaces \xe9 is d\u0331", table))
            < 2 * len(table.encode(text)) + 40
        )


def test_a_pair_that_the_tokenizer_joins(table):
    """c + cedilla, each a piece of its own, become one letter: then all is in byte pieces."""
    if table.processor and all(codec.kept_as_is(table, c) for c in "c\u0327"):
        assert table.processor.decode(table.processor.encode("c\u0327")) == "\u00e7"
        assert all(map(table.processor.is_byte, spelled("the c\u0327", table)))
    spelled("the c\u0327", table)


def test_documents_have_the_bytes_that_they_are_charged_for(table):
    """Text of tokens that the tokenizer made by itself, byte pieces before a space among them."""
    for text in (*SENTENCES, "caf\u00e9 is \u2603 x", "a \u2603\u2603 b"):
        tokens = table.encode(text)
        if not table.marked[tokens[0]]:
            assert codec.text_of(tokens, table) == table.decode(tokens) == text.encode()
            assert table.count(np.array([1, *tokens])).sum() == len(text.encode())
    if table.processor:
        assert codec.text_of([*table.encode("the"), 3, *table.encode("fox"), 2], table) == b"thefox"


# --- the tool -------------------------------------------------------------------------------------

TEXT = "bo dake tinu\r\n\tl\u00e4ngst \u2603 ba  bo dake tinu bo dake\n"


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    """Settings that name a tiny artifact and short validation documents."""
    out = tmp_path_factory.mktemp("tiny") / "run"
    assert tg.main([], {**TINY_RUN, "OUT_DIR": str(out), "DEVICE": "cpu", "VAL_TOKENS": "64"}) == 0
    tokens = [
        token
        for text in ("tinu bo dake bo", "x", TEXT, "", TEXT + TEXT, "bo bo bo tinu", "bo dake")
        for token in (1, *(byte + 4 for byte in text.encode()))
    ]
    tg.write_shard(out / "short/fineweb_val_000000.bin", np.array(tokens))
    return dict(
        ARTIFACT=str(out / "model.ptz"), DATA_PATH=str(out / "short"), TOKENIZER_PATH="byte260"
    )


@pytest.fixture(scope="module")
def packed(env, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "speech.txt"
    path.write_bytes(TEXT.encode())
    assert codec.main(["compress", str(path)], env) == 0
    return path.with_name("speech.txt.pgolf").read_bytes()


def tool(env, *arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "records/codec.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=clean_env(OMP_NUM_THREADS="1", **env),
        timeout=120,
        check=False,
    )


def test_compress_and_decompress(env, packed, tmp_path):
    """In processes of their own, with default names; the file does not depend on the process."""
    path = tmp_path / "speech.txt"
    path.write_bytes(TEXT.encode())
    done = tool(env, "compress", path)
    assert (
        done.returncode == 0
        and f"{len(TEXT.encode())} bytes" in done.stdout
        and "zstd" in done.stdout
    ), done.stderr
    assert (tmp_path / "speech.txt.pgolf").read_bytes() == packed
    path.unlink()
    done = tool(env, "decompress", tmp_path / "speech.txt.pgolf")
    assert done.returncode == 0 and path.read_bytes() == TEXT.encode(), done.stderr
    (size,) = struct.unpack_from("<I", packed, 8)
    header = json.loads(packed[12 : 12 + size])
    assert (header["targets"], header["EVAL_STRIDE"]) == (len(TEXT.encode()), 16)
    assert header["torch"] == torch.__version__


def test_named_outputs(env, tmp_path):
    path = tmp_path / "a"
    path.write_text("bo dake")
    assert codec.main(["compress", str(path), "-o", str(tmp_path / "b.bin")], env) == 0
    assert codec.main(["decompress", str(tmp_path / "b.bin"), "-o", str(tmp_path / "c")], env) == 0
    assert (tmp_path / "c").read_text() == "bo dake" and {p.name for p in tmp_path.iterdir()} == {
        "a",
        "b.bin",
        "c",
    }


def test_errors_of_real_processes(env, packed, tmp_path):
    path, bad = tmp_path / "latin.txt", tmp_path / "bad.txt.pgolf"
    path.write_bytes("l\u00e4ngst".encode("latin-1"))
    bad.write_bytes(packed[:-1])
    for command, message in (
        (("compress", path), "latin.txt: not UTF-8"),
        (("decompress", bad), "wrong checksum"),
    ):
        done = tool(env, *command)
        assert done.returncode == 64 and message in done.stderr and "Traceback" not in done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"latin.txt", "bad.txt.pgolf"}


@pytest.fixture
def refused(env, tmp_path, capsys):
    """Runs the tool in this process, expects exit code 64, the message and no new file."""

    def check(message, *arguments, **settings):
        before = sorted(tmp_path.iterdir())
        assert codec.main([*map(str, arguments)], {**env, **settings}) == 64
        assert message in capsys.readouterr().err and sorted(tmp_path.iterdir()) == before

    return check


def test_unusable_input_is_named(refused, tmp_path):
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "full.txt").write_bytes(b"bo")
    refused("empty.txt: empty", "compress", tmp_path / "empty.txt")
    refused("none.txt", "compress", tmp_path / "none.txt")
    refused("none.pgolf", "decompress", tmp_path / "none.pgolf")
    refused("full.txt: no .pgolf to take off", "decompress", tmp_path / "full.txt")
    refused("not a compressed text", "decompress", tmp_path / "full.txt", "-o", tmp_path / "x")
    refused("ARTIFACT='none.ptz'", "compress", tmp_path / "full.txt", ARTIFACT="none.ptz")
    refused("expected 1 or more", "verify", "--documents", 0)
    refused("expected 1 or more", "verify", "--tokens", 0)
    refused("nothing was started", "compress", tmp_path / "full.txt", EVAL_STREAM="24")


def changed(blob, at, value):
    return blob[:at] + value + blob[at + len(value) :]


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda blob: b"", "begins with b''"),
        (lambda blob: changed(blob, 0, b"Q"), "not a compressed text: begins with b'QGOLFTXT'"),
        (lambda blob: blob[:10], "unreadable header"),
        (lambda blob: blob[:100], "unreadable header"),
        (lambda blob: changed(blob, 12, b"["), "unreadable header"),
        (lambda blob: changed(blob, 8, b"\0\0\0\0"), "unreadable header"),
        (lambda blob: changed(blob, 8, b"\xff\xff\xff\xff"), "unreadable header"),
        (lambda blob: changed(blob, blob.index(b'"targets": ') + 11, b"9"), "wrong checksum"),
        (lambda blob: blob[:-20], "wrong checksum"),
        (lambda blob: blob + b"\0", "wrong checksum"),
        (lambda blob: changed(blob, len(blob) - 1, bytes([blob[-1] ^ 1])), "wrong checksum"),
    ],
)
def test_damage_is_noticed(damage, message, packed, refused, tmp_path):
    (tmp_path / "bad.txt.pgolf").write_bytes(damage(packed))
    refused(message, "decompress", tmp_path / "bad.txt.pgolf")


def test_other_settings_are_named(packed, refused, tmp_path, env):
    path = tmp_path / "speech.txt.pgolf"
    path.write_bytes(packed)
    refused("another EVAL_STREAM: 0; here it is 16", "decompress", path, EVAL_STREAM="16")
    refused(
        "another TILT: 0; here it is 1, another NGRAM: ; here it is mix",
        "decompress",
        path,
        TILT="1",
        NGRAM="mix",
    )
    refused("another SEED: 1337; here it is 5", "decompress", path, SEED="5")
    other = tmp_path / "other.ptz"
    cfg, weights = tg.unpack(open(env["ARTIFACT"], "rb").read())
    other.write_bytes(tg.pack({name: w + 0.01 for name, w in weights.items()}, cfg))
    refused("another artifact_sha256", "decompress", path, ARTIFACT=str(other))


def test_a_decoder_that_computes_otherwise_writes_nothing(packed, refused, tmp_path, monkeypatch):
    (tmp_path / "speech.txt.pgolf").write_bytes(packed)
    monkeypatch.setattr(
        codec,
        "frequencies",
        lambda log_p, real=codec.frequencies: real(log_p) + (np.arange(261) > 9),
    )
    refused("decoded to another text: this machine", "decompress", tmp_path / "speech.txt.pgolf")


def test_a_text_that_cannot_be_spelled_is_refused(refused, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("bo dake")
    monkeypatch.setattr(codec, "tokens_of", lambda text, table: table.encode(text)[:-1])
    refused("a.txt: the tokenizer byte260 cannot spell", "compress", tmp_path / "a.txt")


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
    assert scorer.name == name and scorer.validity == "valid"


MIXED = dict(EVAL_STREAM="16", TILT="1", NGRAM="mix", MIX_CHUNK_TOKENS="64", TTT_CHUNK_TOKENS="64")


@pytest.mark.parametrize("settings, name", [(dict(), "sliding"), (MIXED, "mixed")])
def test_verify(settings, name, env, capsys):
    """Over all document starts, the ends of chunks, and a last document that is cut.

    The empty document is none.
    """
    assert (
        codec.main(["verify", "--documents", "9", "--tokens", "194"], clean_env(**env, **settings))
        == 0
    )
    out = capsys.readouterr().out
    assert f"{name}: 6 documents, 194 tokens" in out and ": ok" in out and "identical" in out


def test_verify_finds_a_wrong_claim(env, monkeypatch, capsys):
    claim = codec.Codec.claimed_bits
    monkeypatch.setattr(codec.Codec, "claimed_bits", lambda self, tokens: claim(self, tokens) * 0.5)
    assert codec.main(["verify", "--tokens", "60"], clean_env(**env)) == 1
    out = capsys.readouterr().out
    assert "TOO LONG" in out and "identical" in out


def test_verify_finds_a_wrong_code(env, monkeypatch, capsys):
    """The encoder here has other frequencies than the decoder in its process, and as many bits."""
    monkeypatch.setattr(
        codec,
        "frequencies",
        lambda log_p, real=codec.frequencies: real(log_p) + (np.arange(261) > 9),
    )
    assert codec.main(["verify", "--tokens", "60"], clean_env(**env)) == 1
    out = capsys.readouterr().out
    assert ": ok" in out and "DIFFERENT" in out
