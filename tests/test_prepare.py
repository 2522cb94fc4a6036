"""The command `data/prepare.py`: a second call, what is refused, from text to a score."""

import json
import re
import shutil

import manifest
import pytest
from conftest import ROOT, TINY_RUN, clean_env
from data_tool import (
    DOCUMENTS,
    MINE,
    call,
    jsonl,
    python,
    results,
)

import train_gpt as tg


@pytest.fixture
def copied(prepared, tmp_path):
    """A copy of `prepared` to break."""
    return shutil.copytree(prepared, tmp_path / "data")


# --------------------------------------------------------------------------------------------------
# A second call
# --------------------------------------------------------------------------------------------------


def times(root):
    return {path: path.stat().st_mtime_ns for path in root.rglob("*.*") if path.suffix != ".lock"}


def test_a_second_call_does_nothing(prepared, corpus):
    before = times(prepared)
    done = call("text", corpus, root=prepared, **MINE)
    assert done.code == 0
    assert "already there" in done.out
    assert "VOCAB_SIZE=500" in done.out
    assert times(prepared) == before


def test_a_second_call_needs_no_right_to_write(prepared, corpus, monkeypatch):
    def forbidden(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(manifest, "locked", forbidden)
    done = call("text", corpus, root=prepared, **MINE)
    assert done.code == 0
    assert "already there" in done.out


def test_another_corpus_under_the_same_name_is_refused(prepared, corpus):
    done = call("text", corpus, root=prepared, name="mine", vocab_size=400)
    assert done.code == 64
    assert "holds other data" in done.err


def test_a_cut_shard_is_noticed(copied, corpus):
    path = copied / "datasets/mine" / tg.shard_name("val", 0)
    path.write_bytes(path.read_bytes()[:-2])
    done = call("text", corpus, root=copied, **MINE)
    assert done.code == 64
    assert f"{path}: missing or cut" in done.err


def test_a_tokenizer_that_is_gone_or_damaged_is_noticed(copied, corpus):
    model = copied / "tokenizers/mine_bpe.model"

    def refused():
        done = call("text", corpus, root=copied, **MINE)
        assert done.code == 64
        assert f"{model}: missing, or not the tokenizer that made" in done.err

    model.write_bytes(b"x")
    refused()
    model.unlink()
    refused()


def test_a_dataset_that_was_removed_is_made_anew(tmp_path):
    """With its own tokenizer; a model that differs stays, since nobody knows who needs it."""
    text = jsonl(tmp_path / "docs.jsonl", DOCUMENTS[:40])
    options = dict(root=tmp_path, workers=1, **MINE)
    folder = tmp_path / "datasets/mine"
    for _ in range(2):
        assert call("text", text, **options).code == 0
        assert call("verify", folder, documents=text).code == 0
        shutil.rmtree(folder)
    model = tmp_path / "tokenizers/mine_bpe.model"
    before = tg.sha256(model)
    jsonl(text, DOCUMENTS[20:])
    done = call("text", text, **options)
    assert done.code == 64
    assert "mine_bpe.model: another tokenizer" in done.err
    assert tg.sha256(model) == before


# --------------------------------------------------------------------------------------------------
# What is refused
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.csv", b"x", "expected a .txt or .jsonl"),
        ("a.jsonl", b'{"no": 1}\n', "line 1: expected a JSON object"),
        ("a.jsonl", b'{"text": "b"}\n{"text": null}\n', "line 2: expected a JSON object"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000, "a.jsonl line 1: expected a JSON object"),
        ("a.txt", b"caf\xe9 and more", "a.txt: not UTF-8"),
        ("a.txt", b"tiny", "1024 pieces from this text: there is no training document"),
        ("none.txt", None, "no such file"),
        ("..", None, "expected a .txt or .jsonl"),
    ],
)
def test_a_file_that_is_no_text_is_named(name, text, message, tmp_path):
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text)
    done = call("text", path, name="x", root=tmp_path / "root", workers=1)
    assert done.code == 64
    assert message in done.err
    assert not results(tmp_path / "root")


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(tokenizer="byte260"), "no document is left for the train split"),
        (dict(val_every=1), "--val-every 1: expected 2 or more"),
        (dict(val_docs=0), "--val-docs 0: expected 1 or more"),
        (dict(val_docs=3, val_every=3), "text: argument --val-every: not allowed with"),
        (dict(workers=0), "--workers 0: expected 1 or more"),
        (dict(vocab_size=0), "--vocab-size 0: expected 1 to 65536"),
        (dict(vocab_size=70000), "--vocab-size 70000: expected 1 to 65536"),
        (dict(tokenizer_train_docs=-1), "--tokenizer-train-docs -1: expected 1 to"),
        (dict(tokenizer="byte260", vocab_size=400), "not for --tokenizer byte260"),
        (dict(tokenizer="none.model"), "none.model: no such tokenizer file"),
        (dict(name="../x"), "--name '../x': expected a folder name"),
        (dict(name=""), "--name '': expected a folder name"),
        (dict(name="a b"), "--name 'a b': expected a folder name"),
    ],
    ids=str,
)
def test_an_option_that_cannot_be_is_named(options, message, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("tiny")
    usual = dict(name="x", root=tmp_path / "root", workers=1)
    done = call("text", path, **{**usual, **options})
    assert done.code == 64
    assert message in done.err
    assert not results(tmp_path / "root")


def test_text_that_is_too_long_to_train_on_is_named(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("tiny tiny\n" * 2000)
    root = tmp_path / "root"
    done = call("text", path, name="x", root=root, workers=1, max_sentence_length=10)
    assert done.code == 64
    assert "every document is longer than --max-sentence-length" in done.err
    assert not results(root)


WITHOUT_FILELOCK = """
import runpy, sys
sys.modules["filelock"] = None
sys.argv = ["prepare.py", "demo"]
runpy.run_path("data/prepare.py", run_name="__main__")
"""


def test_a_missing_package_is_named():
    """With what installs it alone: another torch would take the place of an image's own."""
    env = clean_env(PYTHONPATH=str(ROOT / "data"))
    done = python("-c", WITHOUT_FILELOCK, env=env, cwd=ROOT)
    assert done.code == 64
    assert "filelock" in done.err
    assert "pip install -U huggingface_hub filelock tqdm" in done.err
    assert "Traceback" not in done.err


# --------------------------------------------------------------------------------------------------
# From text to a score
# --------------------------------------------------------------------------------------------------


def test_bytes_train_and_score(corpus, tmp_path):
    """The last of a byte document is charged like any other.

    The log's first lines are the ones that verify prints.
    """
    options = dict(name="raw", root=tmp_path, tokenizer="byte260", val_every=10)
    assert call("text", corpus, **options).code == 0
    folder = tmp_path / "datasets/raw"
    out = tmp_path / "out"
    settings = {
        **TINY_RUN,
        "SMOKE": "0",
        "DEFAULTS": "baseline",
        "VAL_TOKENS": "0",
        "EVAL_STRIDE": "0",
        "EVAL_SEQ_LEN": "64",
        "DATA_PATH": str(folder),
        "TOKENIZER_PATH": "byte260",
        "VOCAB_SIZE": "260",
        "OUT_DIR": str(out),
        "DEVICE": "cpu",
    }
    done = python(ROOT / "train_gpt.py", env=clean_env(**settings))
    assert done.code == 0, done.out + done.err
    result = json.loads((out / "result.json").read_text())["result"]
    assert result["bytes"] == sum(len(text.encode()) for text in DOCUMENTS[::10])
    assert result["complete"]
    assert "val_bpb" in result
    checked = call("verify", folder)
    assert checked.code == 0
    tokenizer, val, train = checked.out.splitlines()[:3]
    log = (out / "train.log").read_text().splitlines()
    assert re.match("val_bpb:", tokenizer)
    assert re.match("val_loader:", val)
    assert re.match("train_loader:", train)
    assert val in log
    assert log.index(tokenizer) < log.index(train) < 8
