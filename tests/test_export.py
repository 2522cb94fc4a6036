"""Exports of real files by real processes: shards, tokenizers, what a failure leaves."""

import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time

import corpora
import export
import manifest
import numpy as np
import sentencepiece
from conftest import ROOT, clean_env
from data_tool import (
    DOCUMENTS,
    MINE,
    PROGRAM,
    WEB,
    arguments,
    call,
    documents_of,
    group_lives,
    jsonl,
    module_env,
    needs_web,
    python,
    results,
    shards,
    small_model,
)

import train_gpt as tg

QUIET = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
IN_BYTES = dict(name="mine", tokenizer="byte260", workers=1)


def model_of(root):
    return root / "tokenizers/mine_bpe.model"


# --------------------------------------------------------------------------------------------------
# Shards
# --------------------------------------------------------------------------------------------------


def test_shards_hold_the_documents_and_nothing_else(prepared):
    """The normaliser is lossy, so both sides go through it."""
    table = tg.ByteTable.from_sentencepiece(model_of(prepared))
    assert table.vocab_size == 500
    val = DOCUMENTS[::10]
    train = [text for number, text in enumerate(DOCUMENTS) if number % 10]
    for split, expected in (("val", val), ("train", train)):
        texts = documents_of(prepared / "datasets/mine", split, table)
        assert texts == [table.processor.decode(table.processor.encode(text)) for text in expected]
        untouched = sum(found == text for found, text in zip(texts, expected))
        assert untouched >= 0.7 * len(texts)


def test_the_manifest_has_the_exporters_fields_and_ours(prepared):
    told = manifest.read(prepared)
    (dataset,) = told["datasets"]
    (tokenizer,) = told["tokenizers"]
    stats = dataset["stats"]
    val = DOCUMENTS[::10]
    assert stats["docs_total"] == len(DOCUMENTS)
    assert stats["docs_val"] == len(val)
    assert stats["files_total"] == 2
    assert stats["tokens_total"] == stats["tokens_val"] + stats["tokens_train"]
    assert dataset["text_bytes"]["val"] == sum(len(text.encode()) for text in val)
    assert dataset["left_out"] == 0
    assert dataset["vocab_size"] == 500
    assert dataset["bos_id"] == 1
    assert dataset["recommended_bigram_vocab_size"] == 2560
    assert tokenizer["name"] == dataset["tokenizer_name"]
    assert tokenizer["sha256"] == tg.sha256(prepared / tokenizer["model_path"])
    for path, known in dataset["files"].items():
        file = prepared / path
        assert known == {"size": file.stat().st_size, "sha256": tg.sha256(file)}


def test_output_does_not_depend_on_processes(prepared, corpus, tmp_path):
    assert call("text", corpus, root=tmp_path, workers=3, **MINE).code == 0
    assert results(tmp_path) == results(prepared)


def test_shards_are_cut_at_their_size_and_nowhere_else(corpus, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "SHARD_TOKENS", 7000)
    monkeypatch.setattr(export, "BATCH_BYTES", 5000)
    plan = export.TokenizerPlan(str(model_of(prepared)))
    export.Export(corpora.file_corpus([corpus], val_every=10), plan, tmp_path, "small", 1).run()
    for split in ("val", "train"):
        parts = shards(tmp_path / "datasets/small", split)
        assert len(parts) > 1
        assert {len(part) for part in parts[:-1]} == {7000}
        (whole,) = shards(prepared / "datasets/mine", split)
        assert np.array_equal(np.concatenate(parts), whole)


def test_validation_documents_do_not_train(tmp_path):
    """Copies of validation documents are left out.

    One of them differs only in what the normaliser folds.
    """
    words = DOCUMENTS[3].split()
    texts = []
    for number in range(60):
        drawn = random.Random(number).choices(words, k=60)
        texts.append(f"document {number}: {' '.join(drawn)}")
    repeated = [*texts, texts[2], texts[30], texts[4].replace(" ", "  ")]
    path = jsonl(tmp_path / "docs.jsonl", repeated)
    options = dict(name="x", root=tmp_path, vocab_size=400, val_docs=10, workers=1)
    done = call("text", path, **options)
    assert done.code == 0
    assert "2 training documents equal a validation document: left out" in done.out
    folder = tmp_path / "datasets/x"
    table = tg.ByteTable.from_sentencepiece(tmp_path / "tokenizers/x_bpe.model")
    assert documents_of(folder, "val", table) == texts[:10]
    assert documents_of(folder, "train", table) == [*texts[10:], texts[30]]
    assert call("verify", folder, documents=path).code == 0


def test_byte_shards_are_the_text(corpus, tmp_path):
    done = call("text", corpus, root=tmp_path, val_every=10, **IN_BYTES)
    assert done.code == 0, done.err
    assert "TOKENIZER_PATH=byte260 VOCAB_SIZE=260" in done.out
    (tokenizer,) = manifest.read(tmp_path)["tokenizers"]
    assert tokenizer == {
        "name": "pure_byte_260",
        "kind": "byte",
        "vocab_size": 260,
        "bos_id": 1,
        "eos_id": 2,
        "pad_id": 0,
        "unk_id": 3,
        "recommended_bigram_vocab_size": 1920,
    }
    (tokens,) = shards(tmp_path / "datasets/mine", "val")
    expected = []
    for text in DOCUMENTS[::10]:
        expected.append(1)
        expected += [byte + 4 for byte in text.encode()]
    assert tokens.tolist() == expected


def test_text_that_the_normaliser_shrinks_is_no_fault(tmp_path):
    """Indented text charges a seventh less than its raw bytes.

    The record is of the bytes charged.
    """
    text = shutil.copy(ROOT / "train_gpt.py", tmp_path / "code.txt")
    options = dict(name="code", vocab_size=600, val_every=10, workers=1)
    assert call("text", text, root=tmp_path, **options).code == 0
    (told,) = manifest.read(tmp_path)["datasets"]
    assert told["charged_bytes"]["val"] < 0.95 * told["text_bytes"]["val"]
    checked = call("verify", tmp_path / "datasets/code", documents=text)
    assert checked.code == 0
    assert "bytes      PASS" in checked.out


# --------------------------------------------------------------------------------------------------
# What an end before the end leaves
# --------------------------------------------------------------------------------------------------


def test_a_killed_export_leaves_nothing_and_is_done_again(prepared, corpus, tmp_path):
    big = jsonl(tmp_path / "docs.jsonl", [f"{i} {text}" for i in range(8) for text in DOCUMENTS])
    options = dict(name="mine", root=tmp_path, tokenizer=model_of(prepared), val_docs=20, workers=1)
    line = [*PROGRAM, *arguments("export", big, **options)]
    process = subprocess.Popen(line, env=clean_env(), start_new_session=True, **QUIET)
    draft = tmp_path / "datasets/.mine.tmp" / tg.shard_name("val", 0)
    while not draft.is_file():
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 120
    while group_lives(process.pid):
        assert time.monotonic() < deadline, "processes of a killed export live on"
        time.sleep(0.05)
    assert not (tmp_path / "datasets/mine").exists()
    assert not (tmp_path / "manifest.json").exists()
    done = call("export", big, **options)
    assert done.code == 0, done.err
    names = [path.name for path in (tmp_path / "datasets").iterdir() if path.suffix != ".lock"]
    assert names == ["mine"]
    assert call("verify", tmp_path / "datasets/mine", documents=big).code == 0


def test_interruption_leaves_nothing_under_a_final_name(corpus, tmp_path, monkeypatch):
    def broken(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(export.Exporter, "write", broken)
    assert call("text", corpus, root=tmp_path, **MINE).code == 130
    assert not results(tmp_path)


def test_an_interrupt_while_the_trainer_reads(corpus, tmp_path, monkeypatch):
    """SentencePiece makes an error of its own of it."""
    real = export.Skipped.watch

    def interrupted(self, texts):
        yield from itertools.islice(real(self, texts), 30)
        raise KeyboardInterrupt

    monkeypatch.setattr(export.Skipped, "watch", interrupted)
    done = call("text", corpus, root=tmp_path, **MINE)
    assert done.code == 130
    assert done.err.startswith("interrupted; ")
    assert not results(tmp_path)


FORKS = []  # what forks of this process do before they fork; such hooks cannot be taken back


def test_an_interrupt_while_processes_start(corpus, tmp_path, monkeypatch):
    """At the fork, where Python only reports an exception, or in a process that has just begun."""
    real = export._load_table

    def late(tokenizer):
        signal.raise_signal(signal.SIGINT)
        real(tokenizer)

    with monkeypatch.context() as patch:
        patch.setattr(export, "_load_table", late)
        assert call("text", corpus, root=tmp_path, **IN_BYTES).code == 0
    shutil.rmtree(tmp_path / "datasets")
    (tmp_path / "manifest.json").unlink()
    os.register_at_fork(before=lambda: [signal.raise_signal(number) for number in FORKS])
    FORKS.append(signal.SIGINT)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert call("text", corpus, root=tmp_path, **IN_BYTES).code == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as under nohup
        assert call("text", corpus, root=tmp_path, **IN_BYTES).code == 0
    finally:
        FORKS.clear()
        signal.signal(signal.SIGINT, before)


def test_a_folder_has_its_name_only_with_a_manifest_entry(corpus, tmp_path, monkeypatch):
    def broken(*args, **entries):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "atomic_write", broken)
        done = call("text", corpus, root=tmp_path, **IN_BYTES)
    assert done.code == 64
    assert "datasets/mine: No space left on device; mine was not made" in done.err
    assert not results(tmp_path)
    assert call("text", corpus, root=tmp_path, **IN_BYTES).code == 0


def test_a_killed_process_of_the_pool_is_an_error(corpus, tmp_path, monkeypatch):
    real = export.Exporter.encoded

    def killing(self, documents, exactly):
        self.pool.submit(int).result()
        for process in self.pool._processes.values():
            process.kill()
        return real(self, documents, exactly)

    monkeypatch.setattr(export.Exporter, "encoded", killing)
    done = call("text", corpus, root=tmp_path, **IN_BYTES)
    assert done.code == 64
    assert "a process was killed" in done.err
    assert not results(tmp_path)


def test_a_full_disk_is_an_error_and_leaves_nothing(corpus, tmp_path):
    def little_room():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    line = arguments("text", corpus, root=tmp_path, **IN_BYTES)
    done = python(ROOT / "data/prepare.py", *line, env=clean_env(), preexec_fn=little_room)
    assert done.code == 64
    assert "datasets/mine: File too large; mine was not made" in done.err
    assert not results(tmp_path)


def test_two_processes_at_once_make_one_dataset(corpus, prepared, tmp_path):
    line = [*PROGRAM, *arguments("text", corpus, root=tmp_path, workers=1, **MINE)]
    heard = {**QUIET, "stdout": subprocess.PIPE}
    both = [subprocess.Popen(line, env=clean_env(), text=True, **heard) for _ in range(2)]
    outputs = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("already there" in text for text in outputs) == 1
    assert results(tmp_path) == results(prepared)


# --------------------------------------------------------------------------------------------------
# Tokenizers
# --------------------------------------------------------------------------------------------------


LOUD_TRAINER = """
import sys, json, sentencepiece, export
from pathlib import Path
train = sentencepiece.SentencePieceTrainer.train
def loud(**options): train(**dict(options, minloglevel=0))
sentencepiece.SentencePieceTrainer.train = loud
s = export.train_tokenizer(json.load(sys.stdin), 400, Path(sys.argv[1]))
print(json.dumps([s.documents, s.long, s.reserved, s.told()]))
"""


def test_documents_that_the_trainer_skips_are_counted(tmp_path):
    """Against the trainer's own log.

    Lengths at the edge, bytes against characters, its reserved character.
    """
    at_the_edge = ["x" * 4192, "x" * 4193, "\u00e9" * 2096, "\u00e9" * 2097]
    at_the_edge.append(" " + "y" * 4192 + "\n")
    texts = [*DOCUMENTS[:30], *at_the_edge, "a \u2585 b"]
    place = tmp_path / "t.model"
    done = python("-c", LOUD_TRAINER, place, env=module_env(), input=json.dumps(texts))
    assert done.code == 0, done.err
    documents, too_long, reserved, told = json.loads(done.out)
    assert documents == len(texts)
    assert done.err.count("Reserved chars are found. Skipped") == 1
    assert reserved == 1
    skipped = re.search(r"Skipped (\d+) too long sentences", done.err)
    assert too_long == int(skipped[1])
    loaded = re.search(r"Loaded all (\d+) sentences", done.err)
    assert int(loaded[1]) == documents - too_long - reserved
    assert told[0] == f"tokenizer: trained on {loaded[1]} of {documents} documents"
    assert f"warning: {too_long} documents" in told[1]
    assert "U+2585" in told[2]


def test_a_document_start_that_text_can_spell_is_refused(tmp_path):
    """A tokenizer that turns text into its document start would make two documents of one."""
    texts = [f"some <s> text {i}" for i in range(50)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(tmp_path / "odd"),
        vocab_size=290,
        minloglevel=2,
        **dict(export.RECIPE, user_defined_symbols=["<s>"]),
    )
    path = jsonl(tmp_path / "a.jsonl", texts)
    root = tmp_path / "root"
    done = call("text", path, name="x", root=root, tokenizer=tmp_path / "odd.model")
    assert done.code == 64
    assert "odd.model: has no document start (bos_id)" in done.err
    assert not results(root)


def test_a_piece_that_is_not_utf8_is_refused(corpus, tmp_path):
    """By every command that reads the model, without a traceback."""
    model = tmp_path / "odd.model"
    good = small_model(tmp_path / "good.model", 400).read_bytes()
    assert good.count("\u2581the".encode()) >= 1
    model.write_bytes(good.replace("\u2581the".encode(), b"\xe2\x96\x81\xffhe"))
    root = tmp_path / "root"
    done = call("text", corpus, name="x", root=root, tokenizer=model, workers=1)
    assert done.code == 64
    assert str(model) in done.err
    assert not results(root)
    tg.write_shard(root / "datasets/x" / tg.shard_name("val", 0), np.array([1, 70, 71]))
    done = call("verify", root / "datasets/x", tokenizer=model)
    assert done.code == 64
    assert str(model) in done.err


def web_texts():
    """Training and validation documents of the shared web text, and their official tokenizer."""
    table = tg.ByteTable.from_sentencepiece(WEB / "tokenizers/fineweb_1024_bpe.model")
    train = documents_of(WEB / "web_sp1024", "train", table)
    lines = (WEB / "web_val.jsonl").read_text(encoding="utf-8").splitlines()
    return train, [json.loads(line)["text"] for line in lines], table


@needs_web
def test_the_recipe_is_the_official_one(tmp_path):
    train, val, official = web_texts()
    skipped = export.train_tokenizer(train, 1024, tmp_path / "t.model")
    ours = tg.ByteTable.from_sentencepiece(tmp_path / "t.model")
    counts = [sum(len(table.encode(text)) for text in val) for table in (ours, official)]
    assert abs(counts[0] / counts[1] - 1) < 0.01
    assert skipped.long > 500
    assert skipped.long == sum(len(text.encode()) > 4192 for text in train)


@needs_web
def test_official_shards_are_reproduced_bit_for_bit(tmp_path):
    train, val, _ = web_texts()
    path = jsonl(tmp_path / "docs.jsonl", [*val, *train])
    tokenizer = WEB / "tokenizers/fineweb_1024_bpe.model"
    options = dict(name="web", root=tmp_path, val_docs=len(val), tokenizer=tokenizer, workers=2)
    done = call("export", path, **options)
    assert done.code == 0, done.err
    assert "left out" not in done.out
    for split in ("val", "train"):
        name = tg.shard_name(split, 0)
        made = tmp_path / "datasets/web" / name
        assert made.read_bytes() == (WEB / "web_sp1024" / name).read_bytes()
