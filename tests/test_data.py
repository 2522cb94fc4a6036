"""Data (section 4): shards, the token stream, batches and bytes."""

import hashlib
import io
import json
import os
import pydoc_data.topics
import struct

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import SHARED, TINY
from export import RECIPE
from helpers import config

import train_gpt as tg

# --- shards ---------------------------------------------------------------------------------------


def test_shard_round_trip_and_format(tmp_path, rng):
    """256 little-endian int32, three of them in use, then uint16 tokens."""
    path = tmp_path / "a.bin"
    tokens = rng.integers(0, 65536, 1000)
    tg.write_shard(path, tokens)
    raw = path.read_bytes()
    assert struct.unpack("<3i", raw[:12]) == (20240520, 1, 1000)
    assert raw[12:1024] == bytes(1012)
    assert len(raw) == 1024 + 2000
    assert np.array_equal(np.frombuffer(raw[1024:], "<u2"), tokens)
    assert np.array_equal(tg.read_shard(path), tokens)
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]  # no temporary file stays


def test_what_is_no_file_is_no_shard(tmp_path):
    """A queue would be waited for for ever; a folder cannot be read."""
    os.mkfifo(tmp_path / "queue.bin")
    (tmp_path / "folder.bin").mkdir()
    for name in ("queue.bin", "folder.bin"):
        with pytest.raises(tg.InputError, match=f"{name}: not a regular file"):
            tg.read_shard(tmp_path / name)


def test_a_name_forges_no_line(tmp_path):
    """Of a shard, a folder or a tokenizer: one line, escaped and short."""
    forged = "fineweb_val_\nfinal_zstd_plain_exact val_loss:0.1 val_bpb:0.1\n.bin"
    (tmp_path / forged).write_bytes(b"x" * 2000)
    cfg = tg.Config(data_path=str(tmp_path))
    for act in (
        lambda: tg.load_validation(cfg),
        lambda: tg.read_shard(tmp_path / forged),
        lambda: tg.find_path(forged),
        lambda: tg.read_shard(tmp_path / ("\x1b[2Jx" * 30)),
    ):
        with pytest.raises(tg.InputError) as error:
            act()
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 700


@pytest.mark.parametrize("tokens", [[], [-1], [65536]])
def test_unwritable_tokens(tokens, tmp_path):
    with pytest.raises(tg.InputError, match=r"x\.bin"):
        tg.write_shard(tmp_path / "x.bin", np.array(tokens))
    assert not list(tmp_path.iterdir())


def with_header(raw, magic=20240520, version=1, count=50):
    return struct.pack("<3i", magic, version, count) + raw[12:]


GOOD = with_header(bytes(1024)) + bytes(range(100))
DAMAGE = {
    "magic": with_header(GOOD, magic=1),
    "version": with_header(GOOD, version=9),
    "negative": with_header(GOOD, count=-5),
    "more": with_header(GOOD, count=51),
    "absurd": with_header(GOOD, count=2**31 - 1),
    "empty": b"",
    "header only": GOOD[:1024],
    "short header": GOOD[:500],
    "cut": GOOD[:-1],
    "longer": GOOD + b"\0",
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_bad_shards_are_refused_by_name(kind, tmp_path):
    path = tmp_path / "bad.bin"
    path.write_bytes(GOOD)
    assert len(tg.read_shard(path)) == 50
    path.write_bytes(DAMAGE[kind])
    with pytest.raises(tg.InputError, match=r"bad\.bin"):
        tg.read_shard(path)


def test_missing_shard(tmp_path):
    with pytest.raises(tg.InputError, match="cannot be read"):
        tg.read_shard(tmp_path / "none.bin")


def spoiled(good, rng):
    """One to three bytes changed, half of them in the header; at times cut and lengthened."""
    raw = bytearray(good)
    for _ in range(rng.integers(1, 4)):
        end = 16 if rng.random() < 0.5 else len(raw)
        raw[rng.integers(0, end)] = rng.integers(0, 256)
    if rng.random() < 0.3:
        raw = raw[: rng.integers(0, len(raw))] + bytes(rng.integers(0, 3))
    return bytes(raw)


def fuzz_shards(tmp_path, rng, count):
    """Random damage: either an InputError or exactly the tokens that the bytes spell."""
    tg.write_shard(tmp_path / "good.bin", rng.integers(0, 1024, 40))
    good = (tmp_path / "good.bin").read_bytes()
    refused = 0
    for i in range(count):
        path = tmp_path / f"{i}.bin"  # new names: replacing a file costs a disk flush
        raw = spoiled(good, rng)
        path.write_bytes(raw)
        try:
            tokens = tg.read_shard(path)
        except tg.InputError:
            refused += 1
        else:
            assert np.array_equal(tokens, np.frombuffer(raw[1024:], "<u2"))
        path.unlink()
    assert refused > count / 4


def test_fuzz_shard_reader(tmp_path, rng):
    fuzz_shards(tmp_path, rng, 2000)


@pytest.mark.slow
def test_fuzz_shard_reader_long(tmp_path, rng):
    fuzz_shards(tmp_path, rng, 50_000)


# --- the token stream -----------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path, rng):
    """Paths of three uneven shards, and all their tokens."""
    parts = [rng.integers(0, 260, n) for n in (37, 5, 90)]
    for i, part in enumerate(parts):
        tg.write_shard(tmp_path / f"fineweb_train_{i:06d}.bin", part)
    return sorted(tmp_path.glob("*.bin")), np.concatenate(parts)


SPANS = [(0, 132), (30, 20), (130, 10), (0, 400), (131, 1), (36, 1), (37, 6)]


@pytest.mark.parametrize("start, count", SPANS)
def test_stream_is_the_endless_concatenation(start, count, shards):
    paths, tokens = shards
    stream = tg.TokenStream(paths, config(TINY))
    endless = np.tile(tokens, 5)
    assert np.array_equal(stream.take(start, count), endless[start : start + count])


@pytest.mark.parametrize("unit", [0, 1, 7, 20])
def test_batches_follow_upstream_order(unit, shards):
    """A span of tokens and one more, cut into rows; the next begins after the one more."""
    paths, tokens = shards
    cfg = config(TINY, train_seq_len=4, micro_batch_tokens=8, train_batch_tokens=16)
    ids, targets = tg.TokenStream(paths, cfg).batch(unit)
    span = np.tile(tokens, 3)[9 * unit : 9 * unit + 9]
    assert ids.shape == targets.shape == (2, 4)
    assert np.array_equal(ids.ravel(), span[:-1])
    assert np.array_equal(targets.ravel(), span[1:])


def test_batches_reach_the_device_as_int64(rt, shards):
    paths, _ = shards
    ids, targets = tg.TokenStream(paths, config(TINY)).batch(0)
    assert rt.put(ids).dtype == rt.put(targets).dtype == torch.int64


def test_token_outside_the_vocabulary_names_the_shard(tmp_path):
    cfg = config(TINY, data_path=str(tmp_path))
    for split in ("train", "val"):
        tg.write_shard(tmp_path / f"fineweb_{split}_000000.bin", np.array([1, 2, 300]))
    stream = tg.TokenStream([tmp_path / "fineweb_train_000000.bin"], cfg)
    message = r"fineweb_train_000000\.bin: token 300, but VOCAB_SIZE=260"
    with pytest.raises(tg.InputError, match=message):
        stream.take(0, 3)
    with pytest.raises(tg.InputError, match="VOCAB_SIZE=260"):
        tg.load_validation(cfg)


def test_the_first_token_outside_the_vocabulary(tmp_path):
    """259 is the last of 260 tokens, in training as in validation."""
    cfg = config(TINY, data_path=str(tmp_path))
    for split in ("train", "val"):
        tg.write_shard(tmp_path / f"fineweb_{split}_000000.bin", np.array([1, 259, 2, 260]))
    stream = tg.TokenStream(tg.shard_paths(cfg, "train"), cfg)
    assert stream.take(0, 3).tolist() == [1, 259, 2]
    with pytest.raises(tg.InputError, match="token 260, but VOCAB_SIZE=260"):
        stream.take(0, 4)
    with pytest.raises(tg.InputError, match="token 260, but VOCAB_SIZE=260"):
        tg.load_validation(cfg)


@pytest.mark.parametrize("targets, count", [(0, 9), (1, 2), (5, 6), (8, 9), (50, 9)])
def test_validation_targets_need_one_token_more(targets, count, tmp_path):
    tg.write_shard(tmp_path / "fineweb_val_000000.bin", np.arange(5))
    tg.write_shard(tmp_path / "fineweb_val_000001.bin", np.arange(5, 9))
    cfg = config(TINY, data_path=str(tmp_path), val_tokens=targets)
    assert tg.load_validation(cfg).tolist() == list(range(count))


def test_identity_of_shards(tmp_path):
    """Of training the first and last shard, of validation every one; the line says the first."""
    hashes = {"train": [], "val": []}
    for split, found in hashes.items():
        for number in range(3):
            path = tmp_path / f"fineweb_{split}_{number:06d}.bin"
            tg.write_shard(path, np.array([1, 5 + number, 6]))
            found.append(hashlib.sha256(path.read_bytes()).hexdigest())
    cfg = config(TINY, data_path=str(tmp_path))
    fields, line = tg.shards_identity(cfg, "train", 9)
    first, _, last = hashes["train"]
    assert fields == {
        "train_dataset": tmp_path.name,
        "train_shards": 3,
        "train_tokens": 9,
        "train_sha256": [first, last],
    }
    told = f"dataset:{tmp_path.name} train_shards:3 tokens:9 first_sha256:{first}"
    assert line == f"train_loader:{told}"
    fields, _ = tg.shards_identity(cfg, "val", 9)
    assert fields["val_sha256"] == hashes["val"]


# --- bytes ----------------------------------------------------------------------------------------

TEXTS = [
    "plain words, and  two spaces",
    "naïve café – “quotes” 中文 🙂 \t tab",
    "x" * 50,
    " leading and trailing ",
]
TOPICS = list(pydoc_data.topics.topics.values())


@pytest.mark.parametrize("text", TEXTS)
def test_byte260_counts_and_decodes(text):
    table = tg.ByteTable.bytes260()
    tokens = np.array([1, *table.encode(text)])
    assert table.decode(tokens) == text.encode()
    assert table.count(tokens).sum() == len(text.encode())


def test_the_start_of_a_document_has_no_bytes():
    assert tg.ByteTable.bytes260().count(np.array([5, 1, 6])).tolist() == [0, 1]


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("sp") / "small.model"
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TOPICS), model_writer=model, vocab_size=400, minloglevel=2, **RECIPE
    )
    path.write_bytes(model.getvalue())
    return path


def table_with(table, sizes):
    """The same tokenizer with other numbers of bytes."""
    return tg.ByteTable(sizes, table.marked, table.boundary, "x", table.processor)


def check_table(path, texts):
    """Counts of each document are the bytes of its decoded text, and wrong tables are found out."""
    table = tg.ByteTable.from_sentencepiece(path)
    documents = [table.encode(text) for text in texts]
    stream = np.array([token for ids in documents for token in (1, *ids)])
    starts = np.flatnonzero(stream == 1)
    counts = table.count(np.append(stream, 1))  # the last charge is the added start's: 0
    decoded = [len(table.processor.decode(ids).encode()) for ids in documents]
    assert np.add.reduceat(counts, starts).tolist() == decoded
    assert not tg.check_bytes(stream, table, 1).problem
    pieces = np.arange(table.vocab_size)
    too_many = table_with(table, table.sizes + (pieces == stream[5]))
    assert ": counted " in tg.check_bytes(stream, too_many, 1).problem
    first = stream[: starts[1]]
    later = next(token for token in stream[starts[1] : starts[-1]] if token not in first)
    too_few = table_with(table, table.sizes - (pieces == later))
    assert ": counted " in tg.check_bytes(stream, too_few, 1).problem


def test_byte_table_equals_decoded_text(small_tokenizer):
    check_table(small_tokenizer, [*TEXTS, *TOPICS[:20]])


def test_word_mark_counts_unless_a_control_token_is_before(small_tokenizer):
    table = tg.ByteTable.from_sentencepiece(small_tokenizer)
    pieces = [table.processor.id_to_piece(token) for token in range(400)]
    word = pieces.index("\u2581the")
    byte = pieces.index("<0xE2>")
    letter = pieces.index("a")
    stream = np.array([1, word, word, byte, word, 3, word, letter, 0])
    assert table.count(stream).tolist() == [3, 4, 1, 4, 0, 3, 1, 0]


def trained(path, texts, **recipe):
    """A SentencePiece model of these texts, as the tool trains them but for some settings."""
    model = io.BytesIO()
    options = {**RECIPE, "vocab_size": 800, "minloglevel": 2, **recipe}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, **options
    )
    path.write_bytes(model.getvalue())
    return path


def without_word_mark(model):
    """A model file in which every word mark is another character of three bytes."""
    raw = model.read_bytes()
    assert raw.count("\u2581".encode()) > 10
    return raw.replace("\u2581".encode(), "\u2582".encode())


def test_a_model_that_spells_spaces_in_bytes_is_refused(small_tokenizer, tmp_path):
    """Each would be charged three bytes: 25 % more on such a text, and as much off the score."""
    bad = tmp_path / "bad.model"
    bad.write_bytes(without_word_mark(small_tokenizer))
    sp = sentencepiece.SentencePieceProcessor(model_file=str(bad))
    assert "<0xE2><0x96><0x81>" in "".join(sp.id_to_piece(i) for i in sp.encode("a b"))
    with pytest.raises(tg.InputError, match="no piece for the word mark"):
        tg.ByteTable.from_sentencepiece(bad)


def test_marks_inside_and_behind_a_piece_count_one_byte(tmp_path):
    """Pieces of several spaces, and words with their spaces inside or behind.

    The charge is the normalised text's, less a mark at its start, which stands for nothing.
    """
    spaced = [f"a  b    c\td {text}".replace(". ", ".   ") for text in TOPICS]
    recipes = {
        "runs": dict(remove_extra_whitespaces=False, split_by_whitespace=False),
        "suffix": dict(treat_whitespace_as_suffix=True),
        "words": dict(split_by_whitespace=False, model_type="unigram"),
    }
    for name, recipe in recipes.items():
        path = trained(tmp_path / f"{name}.model", spaced, **recipe)
        table = tg.ByteTable.from_sentencepiece(path)
        pieces = [table.processor.id_to_piece(i) for i in range(table.vocab_size)]
        assert any("\u2581" in piece[1:] for piece in pieces), name
        for text in ("a  b    c of the", "in the end", "the"):
            tokens = table.encode(text)
            charged = table.count(np.array([1, *tokens])).sum()
            normal = table.processor.normalize(text).replace("\u2581", " ")
            assert charged == len(normal.encode()) - normal.startswith(" "), (name, text)


def test_a_model_that_escapes_no_spaces_needs_no_mark(tmp_path, monkeypatch):
    class Plain(EveryKind):
        pieces = (*[(f"<0x{b:02X}>", "byte") for b in (0xE2, 0x96, 0x81)], (" a", "normal"))

        def normalize(self, text):
            return text

    monkeypatch.setattr(tg.sentencepiece, "SentencePieceProcessor", Plain)
    (tmp_path / "x.model").write_bytes(b"")
    assert tg.ByteTable.from_sentencepiece(tmp_path / "x.model").sizes.tolist() == [1, 1, 1, 2]


class EveryKind:
    """A SentencePiece processor with a piece of every kind."""

    pieces = (
        ("<unk>", "unknown"),
        ("<s>", "control"),
        ("\u2581old", "unused"),
        ("\u2581ab", "normal"),
        ("\u00e9", "normal"),
        ("<0x41>", "byte"),
    )

    def __init__(self, model_file):
        pass

    def vocab_size(self):
        return len(self.pieces)

    def id_to_piece(self, token):
        return self.pieces[token][0]

    def __getattr__(self, name):
        return lambda token: self.pieces[token][1] == name.removeprefix("is_")


def test_bytes_of_every_kind_of_piece(tmp_path, monkeypatch):
    """Unknown, control and unused pieces count nothing, nor does a mark right after them."""
    monkeypatch.setattr(tg.sentencepiece, "SentencePieceProcessor", EveryKind)
    (tmp_path / "x.model").write_bytes(b"")
    table = tg.ByteTable.from_sentencepiece(tmp_path / "x.model")
    mark_after = [0, 0, 0, 1, 1, 1]  # bytes of a mark after each token
    alone = [0, 0, 0, 2, 2, 1]
    for first, token in np.ndindex(6, 6):
        mark = mark_after[first] if token == 3 else 0
        counted = table.count(np.array([first, token]))
        assert counted.tolist() == [alone[token] + mark], (first, token)


PUBLISHED = sorted((SHARED / "data/tokenizers").glob("*.model"))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published tokenizers are not here")
@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_byte_table_of_the_published_tokenizers(path):
    with open(SHARED / "data/web_val.jsonl", encoding="utf-8") as file:
        check_table(path, [*TEXTS, *(json.loads(line)["text"] for line in file)])


def test_a_piece_that_is_no_text(small_tokenizer, tmp_path):
    raw = small_tokenizer.read_bytes()
    broken = tmp_path / "broken.model"
    broken.write_bytes(raw.replace("\u2581the".encode(), b"\xff\xfe\xfdthe", 1))
    with pytest.raises(tg.InputError, match=r"broken.model: not a SentencePiece model"):
        tg.ByteTable.from_sentencepiece(broken)


def test_bad_tokenizers(tmp_path):
    with pytest.raises(tg.InputError, match="no such tokenizer"):
        tg.ByteTable.from_sentencepiece(tmp_path / "a.model")
    (tmp_path / "b.model").write_bytes(b"no model")
    with pytest.raises(tg.InputError, match="not a SentencePiece model"):
        tg.ByteTable.from_sentencepiece(tmp_path / "b.model")
    with pytest.raises(tg.InputError, match="VOCAB_SIZE=8192, but the tokenizer byte260 has 260"):
        tg.ByteTable.load(tg.Config(tokenizer_path="byte260"))
