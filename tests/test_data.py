"""Shards, the token stream, batches and bytes."""

import hashlib
import json
import pydoc_data.topics
import struct

import numpy as np
import pytest
import torch
from conftest import SHARED, TINY

import train_gpt as tg


def test_shard_round_trip_and_format(tmp_path, rng):
    path, tokens = tmp_path / "a.bin", rng.integers(0, 65536, 1000)
    tg.write_shard(path, tokens)
    raw = path.read_bytes()
    assert (
        struct.unpack("<3i", raw[:12]) == (20240520, 1, 1000)
        and len(raw) == 1024 + 2000
        and not any(raw[12:1024])
    )
    assert np.array_equal(np.frombuffer(raw[1024:], "<u2"), tokens)
    assert np.array_equal(tg.read_shard(path), tokens)
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]  # no temporary file stays


@pytest.mark.parametrize("tokens", [[], [-1], [65536]])
def test_unwritable_tokens(tokens, tmp_path):
    with pytest.raises(tg.InputError, match=r"x\.bin"):
        tg.write_shard(tmp_path / "x.bin", np.array(tokens))
    assert not list(tmp_path.iterdir())


def damaged(raw, kind):
    header = {
        "magic": (1, 1, 50),
        "version": (20240520, 9, 50),
        "negative": (20240520, 1, -5),
        "more": (20240520, 1, 51),
        "absurd": (20240520, 1, 2**31 - 1),
    }
    if kind in header:
        return struct.pack("<3i", *header[kind]) + raw[12:]
    return {
        "empty": b"",
        "header only": raw[:1024],
        "short header": raw[:500],
        "cut": raw[:-1],
        "longer": raw + b"\0",
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "magic",
        "version",
        "negative",
        "more",
        "absurd",
        "empty",
        "header only",
        "short header",
        "cut",
        "longer",
    ],
)
def test_bad_shards_are_refused_by_name(kind, tmp_path):
    path = tmp_path / "bad.bin"
    tg.write_shard(path, np.arange(50))
    path.write_bytes(damaged(path.read_bytes(), kind))
    with pytest.raises(tg.InputError, match=r"bad\.bin"):
        tg.read_shard(path)


def test_missing_shard(tmp_path):
    with pytest.raises(tg.InputError, match="cannot be read"):
        tg.read_shard(tmp_path / "none.bin")


def fuzz_shards(tmp_path, rng, count):
    """Random damage: either an InputError or exactly the tokens that the bytes spell."""
    tg.write_shard(tmp_path / "good.bin", rng.integers(0, 1024, 40))
    good, refused = (tmp_path / "good.bin").read_bytes(), 0
    for i in range(count):
        raw = bytearray(good)
        for _ in range(rng.integers(1, 4)):
            raw[rng.integers(0, 16) if rng.random() < 0.5 else rng.integers(0, len(raw))] = (
                rng.integers(0, 256)
            )
        if rng.random() < 0.3:
            raw = raw[: rng.integers(0, len(raw))] + bytes(rng.integers(0, 3))
        path = tmp_path / f"{i}.bin"  # new names: replacing a file costs a disk flush
        path.write_bytes(raw)
        try:
            assert np.array_equal(tg.read_shard(path), np.frombuffer(bytes(raw[1024:]), "<u2"))
        except tg.InputError:
            refused += 1
        path.unlink()
    assert refused > count / 4


def test_fuzz_shard_reader(tmp_path, rng):
    fuzz_shards(tmp_path, rng, 2000)


@pytest.mark.slow
def test_fuzz_shard_reader_long(tmp_path, rng):
    fuzz_shards(tmp_path, rng, 50_000)


@pytest.fixture
def stream(tmp_path, rng):
    parts = [rng.integers(0, 260, n) for n in (37, 5, 90)]
    for i, part in enumerate(parts):
        tg.write_shard(tmp_path / f"fineweb_train_{i:06d}.bin", part)
    paths = sorted(tmp_path.glob("*.bin"))
    return tg.TokenStream(paths, tg.Config(**TINY)), np.concatenate(parts)


def test_stream_is_the_endless_concatenation(stream):
    stream, tokens = stream
    endless = np.tile(tokens, 5)
    for start, count in ((0, 132), (30, 20), (130, 10), (0, 400), (131, 1), (36, 1), (37, 6)):
        assert np.array_equal(stream.take(start, count), endless[start : start + count])


def test_batches_follow_upstream_order(stream):
    stream, tokens = stream
    cfg = tg.Config(**dict(TINY, train_seq_len=4, micro_batch_tokens=8, train_batch_tokens=16))
    endless = np.tile(tokens, 3)
    stream = tg.TokenStream(stream.paths, cfg)
    for unit in (0, 1, 7, 20):
        ids, targets = stream.batch(unit)
        span = endless[9 * unit : 9 * unit + 9]
        assert ids.shape == targets.shape == (2, 4)
        assert np.array_equal(ids.ravel(), span[:-1]) and np.array_equal(targets.ravel(), span[1:])


def test_token_outside_the_vocabulary_names_the_shard(tmp_path):
    tg.write_shard(tmp_path / "fineweb_train_000000.bin", np.array([1, 2, 300]))
    with pytest.raises(
        tg.InputError, match=r"fineweb_train_000000\.bin: token 300, but VOCAB_SIZE=260"
    ):
        tg.TokenStream([tmp_path / "fineweb_train_000000.bin"], tg.Config(**TINY)).take(0, 3)
    tg.write_shard(tmp_path / "fineweb_val_000000.bin", np.array([1, 2, 300]))
    with pytest.raises(tg.InputError, match="VOCAB_SIZE=260"):
        tg.load_validation(tg.Config(**dict(TINY, data_path=str(tmp_path))))


def test_the_first_token_outside_the_vocabulary(tmp_path):
    """259 is the last of 260 tokens, in training as in validation."""
    cfg = tg.Config(**dict(TINY, data_path=str(tmp_path)))
    for split in ("train", "val"):
        tg.write_shard(tmp_path / f"fineweb_{split}_000000.bin", np.array([1, 259, 2, 260]))
    stream = tg.TokenStream(tg.shard_paths(cfg, "train"), cfg)
    assert stream.take(0, 3).tolist() == [1, 259, 2]
    with pytest.raises(tg.InputError, match="token 260, but VOCAB_SIZE=260"):
        stream.take(0, 4)
    with pytest.raises(tg.InputError, match="token 260, but VOCAB_SIZE=260"):
        tg.load_validation(cfg)


def test_validation_targets_need_one_token_more(tmp_path):
    tg.write_shard(tmp_path / "fineweb_val_000000.bin", np.arange(5))
    tg.write_shard(tmp_path / "fineweb_val_000001.bin", np.arange(5, 9))
    for targets, count in ((0, 9), (1, 2), (5, 6), (8, 9), (50, 9)):
        cfg = tg.Config(**dict(TINY, data_path=str(tmp_path), val_tokens=targets))
        assert tg.load_validation(cfg).tolist() == list(range(count))


TEXTS = [
    "plain words, and  two spaces",
    "naïve café – “quotes” 中文 🙂 \t tab",
    "x" * 50,
    " leading and trailing ",
]


def test_byte260_counts_and_decodes():
    table = tg.ByteTable.bytes260()
    for text in TEXTS:
        tokens = np.array([1, *table.encode(text)])
        assert table.decode(tokens) == text.encode() and table.count(tokens).sum() == len(
            text.encode()
        )
    assert table.count(np.array([5, 1, 6])).tolist() == [0, 1]


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory):
    import io

    import sentencepiece
    from export import RECIPE

    model, path = io.BytesIO(), tmp_path_factory.mktemp("sp") / "small.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(pydoc_data.topics.topics.values()),
        model_writer=model,
        vocab_size=400,
        minloglevel=2,
        **RECIPE,
    )
    path.write_bytes(model.getvalue())
    return path


def check_table(path, texts):
    table = tg.ByteTable.from_sentencepiece(path)
    stream, sizes = [], []
    for text in texts:
        ids = table.encode(text)
        stream += [1, *ids]
        sizes.append(len(table.processor.decode(ids).encode()))
    starts = np.flatnonzero(np.array(stream) == 1)
    # The last charge is the added start's: 0.
    counted = np.add.reduceat(table.count(np.array([*stream, 1])), starts)
    assert counted.tolist() == sizes
    assert not tg.check_bytes(np.array(stream), table, 1).problem
    wrong = tg.ByteTable(
        table.sizes + (np.arange(table.vocab_size) == stream[5]),
        table.marked,
        table.boundary,
        "x",
        table.processor,
    )
    assert ": counted " in tg.check_bytes(np.array(stream), wrong, 1).problem
    first = {*stream[: starts[1]]}
    later = next(t for t in stream[starts[1] : starts[-1]] if t not in first)
    sizes = table.sizes - (np.arange(table.vocab_size) == later)  # too few, and not in the first
    few = tg.ByteTable(sizes, table.marked, table.boundary, "x", table.processor)
    assert ": counted " in tg.check_bytes(np.array(stream), few, 1).problem


def test_byte_table_equals_decoded_text(small_tokenizer):
    check_table(small_tokenizer, [*TEXTS, *list(pydoc_data.topics.topics.values())[:20]])


def test_word_mark_counts_unless_a_control_token_is_before(small_tokenizer):
    table = tg.ByteTable.from_sentencepiece(small_tokenizer)
    word = next(i for i in range(400) if table.processor.id_to_piece(i) == "\u2581the")
    byte, letter = table.processor.piece_to_id("<0xE2>"), table.processor.piece_to_id("a")
    assert table.count(np.array([1, word, word, byte, word, 3, word, letter, 0])).tolist() == [
        3,
        4,
        1,
        4,
        0,
        3,
        1,
        0,
    ]


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
    before = {0: 0, 1: 0, 2: 0, 3: 1, 4: 1, 5: 1}  # bytes of a mark after each token
    alone = {0: 0, 1: 0, 2: 0, 3: 2, 4: 2, 5: 1}
    for first in range(6):
        for token in range(6):
            expected = alone[token] + (before[first] if token == 3 else 0)
            assert table.count(np.array([first, token])).tolist() == [expected], (first, token)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published tokenizers are not here")
@pytest.mark.parametrize(
    "path", sorted((SHARED / "data/tokenizers").glob("*.model")), ids=lambda path: path.stem
)
def test_byte_table_of_the_published_tokenizers(path):
    with open(SHARED / "data/web_val.jsonl", encoding="utf-8") as file:
        check_table(path, [*TEXTS, *(json.loads(line)["text"] for line in file)])


def test_bad_tokenizers(tmp_path):
    with pytest.raises(tg.InputError, match="no such tokenizer"):
        tg.ByteTable.from_sentencepiece(tmp_path / "a.model")
    (tmp_path / "b.model").write_bytes(b"no model")
    with pytest.raises(tg.InputError, match="not a SentencePiece model"):
        tg.ByteTable.from_sentencepiece(tmp_path / "b.model")
    with pytest.raises(tg.InputError, match="VOCAB_SIZE=1024, but the tokenizer byte260 has 260"):
        tg.ByteTable.load(tg.Config(tokenizer_path="byte260"))


def test_batches_reach_the_device_as_int64(rt, stream):
    ids, _ = stream[0].batch(0)
    assert rt.put(ids).dtype == torch.int64


def test_identity_of_shards(tmp_path):
    """Of training the first and last shard, of validation every one; the line says the first."""
    for split in ("train", "val"):
        for number in range(3):
            tg.write_shard(
                tmp_path / f"fineweb_{split}_{number:06d}.bin", np.array([1, 5 + number, 6])
            )
    cfg = tg.Config(**dict(TINY, data_path=str(tmp_path)))
    hashes = {
        split: [
            hashlib.sha256(path.read_bytes()).hexdigest() for path in tg.shard_paths(cfg, split)
        ]
        for split in ("train", "val")
    }
    fields, line = tg.shards_identity(cfg, "train", 9)
    assert fields == {
        "train_dataset": tmp_path.name,
        "train_shards": 3,
        "train_tokens": 9,
        "train_sha256": hashes["train"][::2],
    }
    assert line == (
        f"train_loader:dataset:{tmp_path.name} train_shards:3 tokens:9 "
        f"first_sha256:{hashes['train'][0]}"
    )
    assert tg.shards_identity(cfg, "val", 9)[0]["val_sha256"] == hashes["val"]
