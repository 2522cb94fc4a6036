"""`data/prepare.py verify` against planted faults.

Each is found, by the check that is meant to find it.
"""

import io
import json
import re
import shutil
from dataclasses import dataclass

import corpora
import data_hub
import export
import numpy as np
import pytest
import sentencepiece
import verify
from conftest import SHARED
from data_tool import DOCUMENTS, call, jsonl, needs_web, shards, small_model

import train_gpt as tg

TEXTS = DOCUMENTS[:40]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A dataset of several shards, with the text it was made from."""
    root = tmp_path_factory.mktemp("verify")
    text = jsonl(root / "docs.jsonl", TEXTS)
    plan = export.TokenizerPlan(vocab_size=400, max_sentence_length=1 << 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "SHARD_TOKENS", 20_000)
        export.Export(corpora.file_corpus([text], val_docs=6), plan, root, "mine", 1).run()
    assert len(shards(root / "datasets/mine", "train")) > 2
    return root


@pytest.fixture
def folder(made, tmp_path):
    """A copy of it to break."""
    shutil.copytree(made, tmp_path / "data")
    return tmp_path / "data/datasets/mine"


def outcomes(folder, **options):
    """Exit code and {check: (word, text)} of `verify`."""
    done = call("verify", folder, **options)
    found = re.findall(r"^(\w+) +(PASS|FAIL|SKIPPED) +(.*)$", done.out, re.M)
    assert [name for name, *_ in found] == list(verify.CHECKS)
    return done.code, {name: (word, text) for name, word, text in found}


def with_word(found, wanted):
    """Names of the checks with that word."""
    return {name for name, (word, _) in found.items() if word == wanted}


def assert_fault(folder, check, message, **options):
    """`verify` finds a fault, by that check, and says this about it."""
    code, found = outcomes(folder, **options)
    word, text = found[check]
    assert (code, word) == (6, "FAIL"), found
    assert re.search(message, text), text
    return found


def first(folder, split="train"):
    return folder / tg.shard_name(split, 0)


def rewrite(path, tokens):
    """Gives a shard other tokens, whole again."""
    tg.write_shard(path, np.asarray(tokens))


def tokens_of(path):
    return np.array(tg.read_shard(path))


def first_document(folder):
    """The first document of validation, with its document start."""
    tokens = tokens_of(first(folder, "val"))
    second = np.flatnonzero(tokens == 1)[1]
    return tokens[:second]


def root_of(folder):
    return folder.parent.parent


def forget(folder):
    """Without a manifest nothing but the check itself can tell.

    Returns the options that `verify` needs then.
    """
    (root_of(folder) / "manifest.json").unlink()
    return {"tokenizer": root_of(folder) / "tokenizers/mine_bpe.model"}


def edit_manifest(folder, change):
    """change(the dataset's entry) alters the manifest."""
    path = root_of(folder) / "manifest.json"
    told = json.loads(path.read_text())
    change(told["datasets"][0])
    path.write_text(json.dumps(told))


# --------------------------------------------------------------------------------------------------
# Nothing is wrong
# --------------------------------------------------------------------------------------------------


def test_a_good_dataset_passes(folder, made):
    code, found = outcomes(folder, documents=made / "docs.jsonl")
    assert code == 0
    assert with_word(found, "SKIPPED") == {"published"}
    assert with_word(found, "PASS") == set(verify.CHECKS) - {"published"}
    raw = sum(len(text.encode()) for text in TEXTS[:6])
    _, documents = found["documents"]
    assert f"{raw} raw" in documents
    assert "6 validation documents" in documents
    _, disjoint = found["disjoint"]
    assert disjoint == "no one of 34 training documents is among 6 validation documents"


def test_one_document_start_of_two_is_enough(folder):
    """Not every exporter writes it in both entries."""
    edit_manifest(folder, lambda dataset: dataset.pop("bos_id"))
    code, found = outcomes(folder)
    assert code == 0
    assert with_word(found, "PASS") == set(verify.CHECKS) - {"published", "documents"}


def test_documents_are_read_once(folder, made, monkeypatch):
    """And not hashed: they may be 48 GB."""
    opened = []
    real = open

    def spy(path, *rest, **more):
        opened.append(str(path))
        return real(path, *rest, **more)

    monkeypatch.setattr("builtins.open", spy)
    text = made / "docs.jsonl"
    code, _ = outcomes(folder, documents=text)
    assert (code, opened.count(str(text))) == (0, 1)


def test_without_a_manifest_only_that_is_skipped(folder):
    code, found = outcomes(folder, **forget(folder))
    assert code == 0
    skipped = with_word(found, "SKIPPED")
    assert skipped == {"manifest", "hashes", "tokenizer", "published", "documents"}


def test_validation_alone_is_enough_to_score_with(folder):
    for path in folder.glob(tg.shard_name("train")):
        path.unlink()
    code, found = outcomes(folder, **forget(folder))
    assert code == 0
    assert found["disjoint"] == ("SKIPPED", "there are no training shards")
    word, _ = found["bytes"]
    assert word == "PASS"
    _, text = found["shards"]
    assert "0 train shards" in text


def test_every_outcome_is_a_check(made):
    """The project's own type. An error without words is a problem, too."""
    data = verify.Dataset(made / "datasets/mine", "", [])
    assert verify.outcome("shards", data).found.startswith("2 val shards of ")
    skipped = verify.outcome("published", data)
    assert (skipped.word, skipped.failed) == ("SKIPPED", False)

    def silent(data):
        raise OSError

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(verify.CHECKS, "shards", silent)
        found = verify.outcome("shards", data)
    assert isinstance(found, tg.Check)
    assert (found.word, found.problem) == ("FAIL", "OSError()")


# --------------------------------------------------------------------------------------------------
# Shards and their tokens
# --------------------------------------------------------------------------------------------------


def cut_in_the_header(folder):
    path = first(folder)
    path.write_bytes(path.read_bytes()[:500])


def cut_at_the_end(folder):
    path = first(folder)
    path.write_bytes(path.read_bytes()[:-2])


def patch_header(folder, at, new):
    path = first(folder)
    content = bytearray(path.read_bytes())
    content[at : at + len(new)] = new
    path.write_bytes(content)


def half_written(folder):
    patch_header(folder, 0, tg.shard_header(0))


def other_magic(folder):
    patch_header(folder, 0, b"\1")


def text_in_the_header(folder):
    patch_header(folder, 1000, b"x" * 24)


def one_shard_less(folder):
    (folder / tg.shard_name("train", 1)).unlink()


def odd_name(folder):
    shutil.copy(first(folder), folder / "fineweb_train_1.bin")


def no_validation(folder):
    for path in folder.glob(tg.shard_name("val")):
        path.unlink()


def token_beyond_the_vocabulary(folder):
    tokens = tokens_of(first(folder))
    tokens[-1] = 400
    rewrite(first(folder), tokens)


def no_document_start(folder):
    path = first(folder, "val")
    rewrite(path, tokens_of(path)[1:])


def validation_document_that_trains(folder):
    tokens = tokens_of(first(folder))
    parts = (tokens[:50], first_document(folder), [1], tokens[50:])
    rewrite(first(folder), np.concatenate(parts))


def validation_document_across_shards(folder):
    """The copy begins in one shard and ends in the next."""
    before = first(folder)
    after = folder / tg.shard_name("train", 1)
    document = first_document(folder)
    rewrite(before, np.concatenate((tokens_of(before), document[:100])))
    rewrite(after, np.concatenate((document[100:], [1], tokens_of(after))))


@dataclass(frozen=True)
class Planted:
    """A fault, the check that finds it and a part of what it says."""

    plant: object
    check: str
    message: str


FAULTS = [
    Planted(cut_in_the_header, "shards", "shorter than the header"),
    Planted(cut_at_the_end, "shards", "need"),
    Planted(half_written, "shards", "0 tokens"),
    Planted(other_magic, "shards", "magic"),
    Planted(text_in_the_header, "shards", "not zero"),
    Planted(one_shard_less, "shards", "train_000001.bin is missing"),
    Planted(odd_name, "shards", r"no shard's name \(fineweb_train_NNNNNN.bin\)"),
    Planted(no_validation, "shards", r"no fineweb_val_\*.bin"),
    Planted(token_beyond_the_vocabulary, "tokens", "token 400"),
    Planted(no_document_start, "tokens", "begins with token"),
    Planted(
        validation_document_that_trains,
        "disjoint",
        "^1 training documents are also validation documents .the first: document 1.$",
    ),
    Planted(validation_document_across_shards, "disjoint", "^1 training documents are also"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.plant.__name__ for fault in FAULTS])
def test_a_planted_fault_is_found(fault, folder):
    """By its own check and by no other."""
    fault.plant(folder)
    found = assert_fault(folder, fault.check, fault.message, **forget(folder))
    assert with_word(found, "FAIL") == {fault.check}


def test_a_published_name_needs_the_whole_validation_set(folder):
    """M1: a subset under the name of the challenge's data is no validation set."""
    options = forget(folder)
    renamed = folder.rename(folder.with_name("fineweb10B_sp400"))
    assert_fault(renamed, "published", "validation has 6 documents", **options)


# --------------------------------------------------------------------------------------------------
# Against the manifest
# --------------------------------------------------------------------------------------------------


def test_every_byte_of_a_file_is_covered(folder):
    path = first(folder, "val")
    tokens = tokens_of(path)
    tokens[77] = tokens[78]
    rewrite(path, tokens)
    assert_fault(folder, "hashes", "fineweb_val_000000.bin: SHA-256")


def test_a_shard_that_nobody_recorded_is_found(folder):
    count = len(shards(folder, "train"))
    shutil.copy(first(folder), folder / tg.shard_name("train", count))
    found = assert_fault(folder, "hashes", "not in the manifest")
    assert "manifest" in with_word(found, "FAIL")


@pytest.mark.parametrize(
    "size, message",
    [(400, "SHA-256"), (420, "420 tokens, document start 1; the manifest says 400")],
)
def test_another_tokenizer_is_found(size, message, folder, tmp_path):
    other = tmp_path / "other.model"
    export.train_tokenizer(TEXTS[20:], size, other, 1 << 20)
    assert_fault(folder, "tokenizer", message, tokenizer=other)


@pytest.mark.parametrize("key", ["docs_val", "tokens_train", "files_train"])
def test_a_manifest_with_other_counts_is_found(key, folder):
    def one_more(dataset):
        dataset["stats"][key] += 1

    edit_manifest(folder, one_more)
    what, split = key.split("_")
    assert_fault(folder, "manifest", rf"{split} has \d+ {what}, the manifest says")


def test_one_byte_more_than_recorded_is_found(folder):
    def one_less(dataset):
        dataset["charged_bytes"]["val"] -= 1

    edit_manifest(folder, one_less)
    assert_fault(folder, "bytes", r"validation charges \d+ bytes, \d+ when it was made")


def test_a_damaged_manifest_entry_is_a_fault(folder):
    def damage(dataset):
        del dataset["stats"]

    edit_manifest(folder, damage)
    assert_fault(folder, "manifest", r"^the manifest's entry is damaged .KeyError\('stats'\).$")


# --------------------------------------------------------------------------------------------------
# Against the text
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "texts, message",
    [
        ([*TEXTS[:3], TEXTS[3] + "!", *TEXTS[4:]], "validation document 4 is not"),
        (TEXTS[1:], "validation document 1 is not"),
        (TEXTS[:5], "more documents than the text's 5"),
    ],
    ids=["other text", "one less before", "one less behind"],
)
def test_documents_that_differ_are_found(texts, message, folder, tmp_path):
    path = jsonl(tmp_path / "other.jsonl", texts)
    assert_fault(folder, "documents", message, documents=path)


def test_a_wrong_byte_table_is_found(folder, monkeypatch):
    """One token a byte too long, that is only in the last validation document."""
    real = tg.ByteTable.from_sentencepiece
    tokens = np.concatenate(shards(folder, "val"))
    *others, last = np.split(tokens, np.flatnonzero(tokens == 1)[1:])
    only_there = set(last.tolist()) - set(np.concatenate(others).tolist())
    token = only_there.pop()

    def wrong(path, transform):
        table = real(path, transform)
        longer = np.arange(table.vocab_size) == token
        table.sizes = table.sizes + longer
        return table

    monkeypatch.setattr(tg.ByteTable, "from_sentencepiece", wrong)
    assert_fault(folder, "bytes", "counted")


# --------------------------------------------------------------------------------------------------
# Bytes that no table of the tokenizer's own making shows
# --------------------------------------------------------------------------------------------------

MARK = tg.WORD_MARK.encode()
SPACED = ["some words of a text", "and  others, with   more \u00bd spaces", "x y z"]


def folder_of(root, val, train=(1, 70, 71)):
    """Shards of these tokens below a data folder without a manifest."""
    folder = root / "datasets/made"
    for split, tokens in (("val", val), ("train", train)):
        if len(tokens):
            tg.write_shard(folder / tg.shard_name(split, 0), np.asarray(tokens))
    return folder


def model_with(path, model):
    """A model file, and SentencePiece's own reading of it."""
    path.write_bytes(model)
    return sentencepiece.SentencePieceProcessor(model_proto=model)


@pytest.mark.parametrize("character", ["\u2582", "\u4e2d"])
@pytest.mark.parametrize("with_documents", [False, True])
def test_a_word_mark_of_three_bytes_is_found(with_documents, character, tmp_path):
    """A model without a piece for its mark: decoded bytes are as many as charged, the text's less.

    Refused as a tokenizer or found in the shards; never passed.
    """
    path = tmp_path / "odd.model"
    sp = model_with(path, data_hub.small_model().replace(MARK, character.encode()))
    documents = [sp.encode(text) for text in SPACED]
    folder = folder_of(tmp_path, [token for ids in documents for token in (1, *ids)])
    text = jsonl(tmp_path / "docs.jsonl", SPACED)
    places = dict(documents=text) if with_documents else {}
    assert sum(map(len, documents)) > sum(len(text.encode()) for text in SPACED)
    done = call("verify", folder, tokenizer=path, **places)
    if done.code == 64:
        assert str(path) in done.err
        return
    assert done.code == 6
    assert re.search(r"^bytes +FAIL .*\(14 times\), so that each space is charged", done.out, re.M)
    if with_documents:
        assert re.search(r"^documents +FAIL .* 1 is charged 31 bytes; .* has 20$", done.out, re.M)


@pytest.mark.parametrize("split", ["val", "train"])
def test_a_mark_in_bytes_is_found_whatever_the_tokenizer(split, tmp_path):
    """A good model never spells its mark so: somebody else made these tokens."""
    path = tmp_path / "good.model"
    sp = model_with(path, data_hub.small_model())
    good = [1, *sp.encode("a word")]
    odd = [1, sp.piece_to_id("a"), *(sp.piece_to_id(f"<0x{byte:02X}>") for byte in MARK)]
    streams = {"val": good, "train": good, split: odd}
    done = call("verify", folder_of(tmp_path, **streams), tokenizer=path)
    assert done.code == 6
    assert re.search(f"^bytes +FAIL +{split} token 2: the word mark", done.out, re.M)


def test_charges_beyond_the_normalised_text_are_found(folder, made, monkeypatch):
    """One byte too many, in one token: the documents tell, without the table's own decoding."""
    real = tg.ByteTable.from_sentencepiece
    token = int(first_document(folder)[5])

    def wrong(path, transform):
        table = real(path, transform)
        table.sizes = table.sizes + (np.arange(table.vocab_size) == token)
        return table

    monkeypatch.setattr(tg.ByteTable, "from_sentencepiece", wrong)
    told = r"validation document 1 is charged \d+ bytes; its text, normalised, has \d+"
    assert_fault(folder, "documents", told, documents=made / "docs.jsonl")


def test_a_tokenizer_that_keeps_spaces_may_meet_the_character(tmp_path):
    """U+2581 in a text is three bytes of that text where it stands for no space."""
    written = io.BytesIO()
    recipe = dict(export.RECIPE, normalization_rule_name="identity")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=written, vocab_size=400, minloglevel=2, **recipe
    )
    normalizer = b"\x28\x00"  # escape_whitespaces = false, the message's field 5
    model = written.getvalue().replace(MARK, "\u2582".encode()) + b"\x1a\x02" + normalizer
    sp = model_with(tmp_path / "kept.model", model)
    text = "a b \u2581 c"
    pieces = sp.encode(text, out_type=str)
    assert "<0xE2> <0x96> <0x81>" in " ".join(pieces)
    assert sp.decode(pieces) == text
    folder = folder_of(tmp_path, [1, *sp.encode(text)])
    path = jsonl(tmp_path / "docs.jsonl", [text])
    done = call("verify", folder, tokenizer=tmp_path / "kept.model", documents=path)
    assert re.search("^bytes +PASS", done.out, re.M), done.out
    assert re.search("^documents +PASS .* 9 bytes charged, 9 raw", done.out, re.M), done.out


@pytest.mark.parametrize(
    "old, new",
    [
        ("\u2581the", "the\u2581"),
        ("\u2581of", "o\u2581f"),
        ("\u2581assign", "\u2581\u2581\u2581"),
    ],
)
def test_marks_inside_and_behind_a_piece(old, new, tmp_path):
    """Each is one byte of text: `verify` passes if they are charged so, and only then."""
    assert len(old.encode()) == len(new.encode())  # the file's fields have lengths
    path = tmp_path / "odd.model"
    sp = model_with(path, data_hub.small_model().replace(old.encode(), new.encode()))
    pieces = (["\u2581a", new, "in", new], [new, "in", "\u2581a"], ["in", new], [new])
    documents = [[sp.piece_to_id(piece) for piece in document] for document in pieces]
    assert sp.unk_id() not in sum(documents, [])
    table = tg.ByteTable.from_sentencepiece(path)
    charged = [int(table.count(np.array([1, *ids])).sum()) for ids in documents]
    folder = folder_of(tmp_path, [token for ids in documents for token in (1, *ids)])
    done = call("verify", folder, tokenizer=path)
    right = charged == [len(sp.decode(ids).encode()) for ids in documents]
    word = re.search(r"^bytes +(\w+)", done.out, re.M)[1]
    assert word == ("PASS" if right else "FAIL"), done.out


BAD = 100  # a token that the table of these tests counts twice


@pytest.fixture
def miscounting(monkeypatch):
    real = tg.ByteTable.bytes260

    def wrong():
        table = real()
        table.sizes = table.sizes + (np.arange(260) == BAD)
        return table

    monkeypatch.setattr(tg.ByteTable, "bytes260", wrong)


SEGMENTS = {
    "head": ([90, BAD, 91, 1, 92], True),
    "last": ([1, 90, 1, 91, 92, BAD], True),
    "only": ([1, 90, BAD], True),
    "only, without a start": ([90, BAD, 91], True),
    "last of one without a start": ([90, BAD], True),
    "behind an empty document": ([1, 1, BAD], True),
    "first token of a head": ([BAD, 90, 91], False),  # context only: it is not charged
}


@pytest.mark.parametrize("tokens, charged", SEGMENTS.values(), ids=SEGMENTS)
def test_every_segment_is_compared(tokens, charged, tmp_path, miscounting):
    done = call("verify", folder_of(tmp_path, tokens), tokenizer="byte260")
    word = re.search(r"^bytes +(\w+)", done.out, re.M)[1]
    assert word == ("FAIL" if charged else "PASS")
    begins = re.search(r"^tokens +(\w+) +(.*)", done.out, re.M)
    if tokens[0] == 1:
        assert begins[1] == "PASS"
    else:
        assert begins[1] == "FAIL"
        assert f"begins with token {tokens[0]}, not the document start 1" in begins[2]


@pytest.mark.parametrize("tokens", [[1], [1, 1, 1], [90], [0, 0, 2]], ids=str)
def test_nothing_passes_on_nothing(tokens, tmp_path):
    """A stream without a byte of text is no validation set."""
    done = call("verify", folder_of(tmp_path, tokens), tokenizer="byte260")
    assert done.code == 6
    assert re.search(r"^bytes +FAIL +.*no text to compare", done.out, re.M)
    assert not re.search(r"PASS .*(among 0|^0 )", done.out)
    if set(tokens) == {1}:
        assert re.search("^disjoint +SKIPPED +there is no validation document", done.out, re.M)


def test_a_stream_without_starts_is_a_document_that_may_train(tmp_path):
    folder = folder_of(tmp_path, [90, 91, 92], [1, 80, 81, 1, 90, 91, 92, 1, 93])
    done = call("verify", folder, tokenizer="byte260")
    assert re.search(r"^disjoint +FAIL +1 training documents .*document 1\)", done.out, re.M)


def test_a_manifest_without_counts_is_not_passed(folder):
    def forget_counts(dataset):
        dataset["stats"] = {"files_train": dataset["stats"]["files_train"]}

    edit_manifest(folder, forget_counts)
    _, found = outcomes(folder)
    assert found["manifest"] == ("SKIPPED", "the entry mine counts nothing of validation")


@needs_web
def test_shared_shards():
    """Shards of web text that the official tokenizer made elsewhere."""
    web = SHARED / "data"
    code, found = outcomes(
        web / "web_sp1024",
        documents=web / "web_val.jsonl",
        tokenizer=web / "tokenizers/fineweb_1024_bpe.model",
    )
    assert code == 0
    assert {"documents", "disjoint", "bytes"} <= with_word(found, "PASS")
    _, text = found["documents"]
    assert "422154 raw" in text


# --------------------------------------------------------------------------------------------------
# What cannot be looked at
# --------------------------------------------------------------------------------------------------


def test_no_folder(tmp_path):
    done = call("verify", tmp_path / "none")
    assert done.code == 64
    assert "no such folder" in done.err


def test_byte_shards_want_bytes(tmp_path):
    text = jsonl(tmp_path / "docs.jsonl", TEXTS)
    done = call("text", text, name="raw", root=tmp_path, tokenizer="byte260", workers=1)
    assert done.code == 0, done.err
    folder = tmp_path / "datasets/raw"
    model = small_model(tmp_path / "sp.model", 400)
    cfg = tg.Config(data_path=str(folder), tokenizer_path=str(model), vocab_size=400)
    with pytest.raises(tg.InputError, match="another tokenizer .sha256 byte260. made the shards"):
        tg.ByteTable.load(cfg)
    assert_fault(folder, "tokenizer", "260", tokenizer=model)
