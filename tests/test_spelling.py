"""Any text as tokens, from which the very same text comes back, for every kind of tokenizer."""

import random

import export
import numpy as np
import pytest
import sentencepiece
from conftest import SHARED
from tool import spelling

import train_gpt as tg

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
PAIRS = [
    (a, b)
    for a in ("quick", "lazy", "brown", "old")
    for b in ("fox", "dog", "river", "mountain", "letter")
]
SENTENCES = [
    f"The {a} {b} of {number} small x\u0327 boats, and the other {b}s."
    for number, (a, b) in enumerate(PAIRS)
]
MODELS = [
    "byte260",
    "trained",
    "trained with a first mark",
    "trained with case2",
    *sorted(path.name for path in SHARED.glob("data/tokenizers/*.model")),
]


def train_with_first_mark(path):
    """A tokenizer that puts a word mark before every text."""
    recipe = dict(export.RECIPE, add_dummy_prefix=True, vocab_size=330, minloglevel=2)
    prefix = str(path.with_suffix(""))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_prefix=prefix, **recipe
    )


@pytest.fixture(scope="module", params=MODELS)
def table(request, tmp_path_factory):
    """byte260, one of data/prepare.py, one that puts a mark before every text, the real ones."""
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    if request.param == "byte260":
        return tg.ByteTable.bytes260()
    if request.param == "trained":
        export.train_tokenizer(SENTENCES, 330, path)
    elif request.param == "trained with a first mark":
        train_with_first_mark(path)
    elif request.param == "trained with case2":
        export.train_tokenizer(SENTENCES, 330, path, transform="case2")
        return tg.ByteTable.from_sentencepiece(path, "case2")
    else:
        path = SHARED / "data/tokenizers" / request.param
    return tg.ByteTable.from_sentencepiece(path, "caseops" if "caseops" in path.name else "")


def mixture(length=3000):
    """Everything above, shuffled together."""
    chance = random.Random(0)
    parts = [*filter(None, NASTY), *"etaoin      ", *SENTENCES[0].split()]
    return "".join(chance.choice(parts) for _ in range(length))[:length]


def spelled(text, table):
    """Tokens that give this text, and are charged for as many bytes as it has."""
    tokens = spelling.tokens_of(text, table)
    assert spelling.text_of(tokens, table) == text.encode(), repr(text)
    assert not table.boundary[tokens].any()
    return tokens


def seen(text, table):
    """What the tokenizer sees of a text."""
    return table.marked_text(text) if table.markers else text


def test_any_text_comes_back(table):
    for text in NASTY:
        document = [1, *spelled(text, table)]
        both = spelling.documents_of(np.array([*document, *document]), table, 1)
        assert both == f"{text}\n{text}".encode()
    for text in ("".join(NASTY), "\n".join(NASTY), mixture()):
        assert len(spelled(text, table)) <= len(seen(text, table).encode())


def test_only_what_the_tokenizer_changes_is_spelled_in_bytes(table):
    text = " and ".join(SENTENCES[:3]).replace("\u0327", "").lower()
    plain = table.encode(text)
    assert spelled(text, table) == plain
    if table.processor:  # d + line below: a pair that it would join
        mixed = f"{text}\n{text}\ttwo  spaces \xe9 is d\u0331"
        assert len(spelled(mixed, table)) < 2 * len(plain) + 40


def test_a_pair_that_the_tokenizer_joins(table):
    """c + cedilla, each a piece of its own, become one letter: then all is in byte pieces."""
    tokens = spelled("the c\u0327", table)
    if table.processor and all(spelling.kept_as_is(table, c) for c in "c\u0327"):
        assert table.processor.decode(table.processor.encode("c\u0327")) == "\u00e7"
        assert all(map(table.processor.is_byte, tokens))


def test_documents_have_the_bytes_that_they_are_charged_for(table):
    """Text of tokens that the tokenizer made by itself, byte pieces before a space among them."""
    for text in (*SENTENCES, "caf\u00e9 is \u2603 x", "a \u2603\u2603 b"):
        tokens = table.encode(text)
        if not table.marked[tokens[0]]:
            assert spelling.text_of(tokens, table) == text.encode()
            assert table.decode(tokens) == text.encode()
            assert table.count(np.array([1, *tokens])).sum() == len(text.encode())


def test_a_mark_after_a_control_token_is_no_space(table):
    if table.processor:
        tokens = [*table.encode("the"), 3, *table.encode("fox"), 2]
        assert spelling.text_of(tokens, table) == b"thefox"
