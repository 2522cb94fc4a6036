"""The data tool's exports on real files and processes."""

import contextlib
import json
import os
import pydoc_data.topics
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import corpora
import export
import manifest
import numpy as np
import prepare
import pytest
import sentencepiece
from conftest import ROOT, SHARED, TINY_RUN, clean_env

import train_gpt as tg

TEXT = ("text", "--name", "mine", "--vocab-size", 500, "--val-every", 10)
DOCUMENTS = [*dict.fromkeys(" ".join(text.split()) for text in pydoc_data.topics.topics.values())]
WEB = SHARED / "data"
needs_web = pytest.mark.skipif(not WEB.is_dir(), reason="no shared web text")


def command(*args):
    return [sys.executable, str(ROOT / "data/prepare.py"), *map(str, args)]


def tool(*args, **more):
    return subprocess.run(
        command(*args),
        capture_output=True,
        text=True,
        env=clean_env(),
        timeout=300,
        check=False,
        **more,
    )


def alive():
    """/proc/N/stat of every process that could be read, zombies left out."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if stat.read_text().split()[2] != "Z":
                yield stat


def jsonl(path, documents):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def shard_bytes(root):
    """Everything an export leaves, by name; locks are no result."""
    return {
        str(p.relative_to(root)): p.read_bytes()
        for p in sorted(root.rglob("*"))
        if p.is_file() and p.suffix != ".lock"
    }


def documents_of(folder, split, table):
    tokens = np.concatenate(
        [tg.read_shard(p) for p in sorted(folder.glob(f"fineweb_{split}_*.bin"))]
    )
    starts = np.flatnonzero(tokens == 1)
    assert starts[0] == 0
    return [table.decode(part[1:]).decode() for part in np.split(tokens, starts[1:])]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return jsonl(tmp_path_factory.mktemp("text") / "docs.jsonl", DOCUMENTS)


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
    for split, expected in (
        ("val", DOCUMENTS[::10]),
        ("train", [d for i, d in enumerate(DOCUMENTS) if i % 10]),
    ):
        texts = documents_of(folder, split, table)
        again = [table.processor.decode(table.processor.encode(text)) for text in expected]
        assert texts == again  # the normaliser is lossy, so both go through it
        assert sum(a == b for a, b in zip(texts, expected)) >= 0.7 * len(texts)


def test_the_manifest_has_the_exporters_fields_and_ours(prepared):
    found = json.loads((prepared / "manifest.json").read_text())
    dataset, tokenizer = found["datasets"][0], found["tokenizers"][0]
    stats, val = dataset["stats"], DOCUMENTS[::10]
    assert (stats["docs_total"], stats["docs_val"]) == (len(DOCUMENTS), len(val))
    assert (
        stats["files_total"] == 2
        and stats["tokens_total"] == stats["tokens_val"] + stats["tokens_train"]
    )
    assert (
        dataset["text_bytes"]["val"] == sum(len(text.encode()) for text in val)
        and dataset["left_out"] == 0
    )
    assert (dataset["vocab_size"], dataset["bos_id"], dataset["recommended_bigram_vocab_size"]) == (
        500,
        1,
        2560,
    )
    assert tokenizer["name"] == dataset["tokenizer_name"] and tokenizer["sha256"] == tg.sha256(
        prepared / tokenizer["model_path"]
    )
    for path, known in dataset["files"].items():
        assert known == {
            "size": (prepared / path).stat().st_size,
            "sha256": tg.sha256(prepared / path),
        }


def test_a_second_call_does_nothing(prepared, corpus):
    def times():
        return {
            p: p.stat().st_mtime_ns
            for p in prepared.rglob("*")
            if p.is_file() and p.suffix != ".lock"
        }

    before = times()
    done = tool(*TEXT, corpus, "--root", prepared)
    assert (
        done.returncode == 0 and "already there" in done.stdout and "VOCAB_SIZE=500" in done.stdout
    )
    assert before == times()


def test_another_corpus_under_the_same_name_is_refused(prepared, corpus, capsys):
    args = ["text", str(corpus), "--name", "mine", "--vocab-size", "400", "--root", str(prepared)]
    assert prepare.main(args, {}) == 64 and "holds other data" in capsys.readouterr().err


def test_a_cut_shard_is_noticed(prepared, corpus, capsys):
    path = next((prepared / "datasets/mine").glob("fineweb_val*"))
    good = path.read_bytes()
    path.write_bytes(good[:-2])
    try:
        assert prepare.main([*map(str, TEXT), str(corpus), "--root", str(prepared)], {}) == 64
        assert "missing or cut" in capsys.readouterr().err
    finally:
        path.write_bytes(good)


def test_output_does_not_depend_on_processes(prepared, corpus, tmp_path):
    done = tool(*TEXT, corpus, "--root", tmp_path, "--workers", 3)
    assert done.returncode == 0 and shard_bytes(tmp_path) == shard_bytes(prepared)


def test_shards_are_cut_at_their_size_and_nowhere_else(corpus, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "SHARD_TOKENS", 7000)
    monkeypatch.setattr(export, "BATCH_BYTES", 5000)
    plan = export.TokenizerPlan(str(prepared / "tokenizers/mine_bpe.model"))
    export.Export(corpora.file_corpus([corpus], val_every=10), plan, tmp_path, "small", 1).run()
    for split in ("val", "train"):
        parts = [
            tg.read_shard(p)
            for p in sorted((tmp_path / "datasets/small").glob(f"fineweb_{split}_*.bin"))
        ]
        assert len(parts) > 1 and all(len(part) == 7000 for part in parts[:-1])
        whole = tg.read_shard(prepared / f"datasets/mine/fineweb_{split}_000000.bin")
        assert np.array_equal(np.concatenate(parts), whole)


def test_a_killed_export_leaves_nothing_and_is_done_again(prepared, corpus, tmp_path):
    big = jsonl(tmp_path / "docs.jsonl", [f"{i} {text}" for i in range(8) for text in DOCUMENTS])
    args = (
        "export",
        big,
        "--name",
        "mine",
        "--root",
        tmp_path,
        "--workers",
        1,
        "--val-docs",
        20,
        "--tokenizer",
        prepared / "tokenizers/mine_bpe.model",
    )
    process = subprocess.Popen(
        command(*args),
        env=clean_env(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    draft = tmp_path / "datasets/.mine.tmp/fineweb_val_000000.bin"
    while not draft.is_file():
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    # Its whole group.
    while any(stat.read_text().split()[4] == str(process.pid) for stat in alive()):
        assert time.monotonic() < deadline, "processes of a killed export live on"
        time.sleep(0.05)
    assert not (tmp_path / "datasets/mine").exists() and not (tmp_path / "manifest.json").exists()
    done = tool(*args)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in sorted((tmp_path / "datasets").iterdir()) if p.suffix != ".lock"] == [
        "mine"
    ]
    assert tool("verify", tmp_path / "datasets/mine", "--documents", big).returncode == 0


def test_interruption_leaves_nothing_under_a_final_name(corpus, tmp_path, monkeypatch):
    def broken(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(export.Exporter, "write", broken)
    assert prepare.main([*map(str, TEXT), str(corpus), "--root", str(tmp_path)], {}) == 130
    assert not shard_bytes(tmp_path)


def test_a_folder_has_its_name_only_with_a_manifest_entry(corpus, tmp_path, monkeypatch, capsys):
    def broken(*args, **entries):
        raise OSError(28, "No space left on device")

    args = [
        "text",
        str(corpus),
        "--name",
        "mine",
        "--root",
        str(tmp_path),
        "--tokenizer",
        "byte260",
        "--workers",
        "1",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "atomic_write", broken)
        assert prepare.main(args, {}) == 64
        assert (
            "datasets/mine: No space left on device; mine was not made" in capsys.readouterr().err
        )
    assert not shard_bytes(tmp_path)
    assert prepare.main(args, {}) == 0


def test_a_killed_process_of_the_pool_is_an_error(corpus, prepared, tmp_path, monkeypatch, capsys):
    def kill(self):
        for process in self.pool._processes.values():
            process.kill()

    real = export.Exporter.encoded
    monkeypatch.setattr(
        export.Exporter,
        "encoded",
        lambda self, documents: (
            [self.pool.submit(int).result(), kill(self)] and None or real(self, documents)
        ),
    )
    args = [
        "text",
        str(corpus),
        "--name",
        "mine",
        "--root",
        str(tmp_path),
        "--tokenizer",
        str(prepared / "tokenizers/mine_bpe.model"),
        "--workers",
        "1",
    ]
    assert prepare.main(args, {}) == 64 and "a process was killed" in capsys.readouterr().err
    assert not shard_bytes(tmp_path)


def test_a_full_disk_is_an_error_and_leaves_nothing(corpus, tmp_path):
    def little_room():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    done = tool(
        "text",
        corpus,
        "--name",
        "mine",
        "--root",
        tmp_path,
        "--tokenizer",
        "byte260",
        preexec_fn=little_room,
    )
    assert (
        done.returncode == 64 and "datasets/mine: File too large; mine was not made" in done.stderr
    )
    assert not shard_bytes(tmp_path)


def test_two_processes_at_once_make_one_dataset(corpus, prepared, tmp_path):
    args = command(*TEXT, corpus, "--root", tmp_path, "--workers", 1)
    both = [
        subprocess.Popen(
            args, env=clean_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("already there" in text for text in outputs) == 1
    assert shard_bytes(tmp_path) == shard_bytes(prepared)


def test_validation_documents_do_not_train(tmp_path):
    """Copies of validation documents are left out.

    One of them differs only in what the normaliser folds.
    """
    texts = [
        f"document {i}: {' '.join(random.Random(i).choices(DOCUMENTS[3].split(), k=60))}"
        for i in range(60)
    ]
    repeated = [*texts, texts[2], texts[30], texts[4].replace(" ", "  ")]
    path = jsonl(tmp_path / "docs.jsonl", repeated)
    done = tool(
        "text",
        path,
        "--name",
        "x",
        "--root",
        tmp_path,
        "--vocab-size",
        400,
        "--val-docs",
        10,
        "--workers",
        1,
    )
    assert (
        done.returncode == 0
        and "2 training documents equal a validation document: left out" in done.stdout
    )
    table = tg.ByteTable.from_sentencepiece(tmp_path / "tokenizers/x_bpe.model")
    assert documents_of(tmp_path / "datasets/x", "val", table) == texts[:10]
    assert documents_of(tmp_path / "datasets/x", "train", table) == [*texts[10:], texts[30]]
    assert tool("verify", tmp_path / "datasets/x", "--documents", path).returncode == 0


def test_running_text_is_cut_at_line_ends(tmp_path):
    path = tmp_path / "book.txt"
    lines = [f"line {i} " + "word " * 20 for i in range(200)]
    path.write_text("\n".join(lines))
    documents = list(corpora.read_documents(path))
    assert "\n".join(documents) == "\n".join(lines) and len(documents) > 5
    assert all(2500 <= len(d.encode()) + 1 < 2700 for d in documents[:-1])


def test_odd_documents(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"text": "a"}\n\n{"text": "  "}\n{"text": "half \\ud83d pair"}\n'
        '{"text": "\\ud83d\\ude00", "x": 1}\n'
    )
    assert list(corpora.read_documents(path)) == ["a", "half ? pair", "\N{GRINNING FACE}"]


@pytest.mark.parametrize(
    "name, text, options, message",
    [
        ("a.csv", "x", [], "expected a .txt or .jsonl"),
        ("a.jsonl", '{"no": 1}\n', [], "line 1: expected a JSON object"),
        ("a.jsonl", '{"text": "b"}\n{"text": null}\n', [], "line 2: expected a JSON object"),
        ("a.txt", b"caf\xe9 and more", [], "a.txt: not UTF-8"),
        ("a.txt", "tiny", [], "1024 pieces from this text: there is no training document"),
        ("none.txt", None, [], "no such file"),
        ("a.txt", "tiny", ["--tokenizer", "byte260"], "no document is left for the train split"),
        ("a.txt", "tiny", ["--val-every", "1"], "--val-every 1: expected 2 or more"),
        ("a.txt", "tiny", ["--val-docs", "0"], "--val-docs 0: expected 1 or more"),
        ("a.txt", "tiny", ["--workers", "0"], "--workers 0: expected 1 or more"),
        ("a.txt", "tiny", ["--vocab-size", "0"], "--vocab-size 0: expected 1 to 65536"),
        ("a.txt", "tiny", ["--vocab-size", "70000"], "--vocab-size 70000: expected 1 to 65536"),
        (
            "a.txt",
            "tiny",
            ["--tokenizer-train-docs", "-1"],
            "--tokenizer-train-docs -1: expected 1 to",
        ),
        (
            "a.txt",
            "tiny",
            ["--tokenizer", "byte260", "--vocab-size", "400"],
            "not for --tokenizer byte260",
        ),
        ("a.txt", "tiny", ["--name", "../x"], "--name '../x': expected a folder name"),
        ("a.txt", "tiny", ["--name", ""], "--name '': expected a folder name"),
        ("a.txt", "tiny", ["--name", "a b"], "--name 'a b': expected a folder name"),
        (
            "a.txt",
            "tiny",
            ["--val-docs", "3", "--val-every", "3"],
            "text: argument --val-every: not allowed with",
        ),
        (
            "deep.jsonl",
            '{"text": ' + "[" * 100_000,
            [],
            "deep.jsonl line 1: expected a JSON object",
        ),
        ("..", None, [], "expected a .txt or .jsonl"),
        ("a.txt", "tiny", ["--tokenizer", "none.model"], "none.model: no such tokenizer file"),
        (
            "a.txt",
            "tiny tiny\n" * 2000,
            ["--max-sentence-length", "10"],
            "every document is longer than --max-sentence-",
        ),
    ],
)
def test_bad_input_is_named(name, text, options, message, tmp_path, capsys):
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    args = [
        "text",
        str(path),
        "--name",
        "x",
        "--root",
        str(tmp_path / "root"),
        "--workers",
        "1",
        *options,
    ]
    assert prepare.main(args, {}) == 64
    assert re.search(message, capsys.readouterr().err)
    assert not shard_bytes(tmp_path / "root") or not (tmp_path / "root").exists()


def test_a_document_start_that_text_can_spell_is_refused(tmp_path, capsys):
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
    args = [
        "text",
        str(path),
        "--name",
        "x",
        "--root",
        str(tmp_path / "root"),
        "--tokenizer",
        str(tmp_path / "odd.model"),
    ]
    assert prepare.main(args, {}) == 64
    assert "odd.model: has no document start (bos_id)" in capsys.readouterr().err
    assert not shard_bytes(tmp_path / "root")


def test_another_tokenizer_of_the_same_name_is_refused(prepared, corpus, tmp_path, capsys):
    export.train_tokenizer(DOCUMENTS, 450, tmp_path / "mine_bpe.model", 1 << 20)
    args = [
        "text",
        str(corpus),
        "--name",
        "other",
        "--root",
        str(prepared),
        "--workers",
        "1",
        "--tokenizer",
        str(tmp_path / "mine_bpe.model"),
    ]
    before = shard_bytes(prepared)
    assert prepare.main(args, {}) == 64
    assert (
        "mine was made with another tokenizer named mine_bpe (another vocab_size and sha256)"
        in capsys.readouterr().err
    )
    assert shard_bytes(prepared) == before


def test_a_tokenizer_that_nobody_listed_is_not_overwritten(corpus, tmp_path, capsys):
    own = tmp_path / "tokenizers/mine_bpe.model"
    own.parent.mkdir()
    own.write_bytes(b"someone's work")
    args = [*map(str, TEXT), str(corpus), "--root", str(tmp_path), "--workers", "1"]
    assert prepare.main(args, {}) == 64
    assert "another tokenizer of that name is there" in capsys.readouterr().err
    assert list(shard_bytes(tmp_path).values()) == [b"someone's work"]


def test_a_dataset_that_was_removed_is_made_anew(tmp_path, capsys):
    """With its own tokenizer; a model that differs stays, since nobody knows who needs it."""
    text = jsonl(tmp_path / "docs.jsonl", DOCUMENTS[:40])
    args = [*map(str, TEXT), str(text), "--root", str(tmp_path), "--workers", "1"]
    for _ in range(2):
        assert prepare.main(args, {}) == 0
        assert (
            prepare.main(["verify", str(tmp_path / "datasets/mine"), "--documents", str(text)], {})
            == 0
        )
        shutil.rmtree(tmp_path / "datasets/mine")
    before = tg.sha256(tmp_path / "tokenizers/mine_bpe.model")
    jsonl(text, DOCUMENTS[20:])
    assert (
        prepare.main(args, {}) == 64
        and "mine_bpe.model: another tokenizer" in capsys.readouterr().err
    )
    assert tg.sha256(tmp_path / "tokenizers/mine_bpe.model") == before


def test_a_tokenizer_that_is_gone_or_damaged_is_noticed(prepared, corpus, tmp_path, capsys):
    shutil.copytree(prepared, tmp_path / "data")
    model = tmp_path / "data/tokenizers/mine_bpe.model"
    for damage in (lambda: model.write_bytes(b"x"), model.unlink):
        damage()
        assert (
            prepare.main([*map(str, TEXT), str(corpus), "--root", str(tmp_path / "data")], {}) == 64
        )
        assert f"{model}: missing, or not the tokenizer that made" in capsys.readouterr().err


def test_a_second_call_needs_no_right_to_write(prepared, corpus, tmp_path, monkeypatch, capsys):
    def forbidden(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(manifest, "locked", forbidden)
    assert prepare.main([*map(str, TEXT), str(corpus), "--root", str(prepared)], {}) == 0
    assert "already there" in capsys.readouterr().out


def test_damaged_entries_are_named(prepared, corpus, tmp_path, capsys):
    shutil.copytree(prepared, tmp_path / "data")
    path = tmp_path / "data/manifest.json"
    args = [*map(str, TEXT), str(corpus), "--root", str(tmp_path / "data")]
    good = json.loads(path.read_text())
    for kind, key, value in (
        ("datasets", "files", 3),
        ("datasets", "stats", []),
        ("tokenizers", "model_path", 1),
        ("datasets", "bos_id", "1"),
        ("datasets", "made_from", None),
        ("datasets", "tokenizer_name", ...),
        ("datasets", "files", {"x": {}}),
        ("datasets", "files", ...),
        ("tokenizers", "model_path", ...),
    ):
        broken = json.loads(json.dumps(good))
        if value is ...:
            del broken[kind][0][key]
        else:
            broken[kind][0][key] = value
        path.write_text(json.dumps(broken))
        assert prepare.main(args, {}) == 64, (key, value)
        assert re.search(
            "manifest.json: (the entry mine is damaged|.* expected)|x: missing",
            capsys.readouterr().err,
        )
        assert prepare.main(["verify", str(tmp_path / "data/datasets/mine")], {}) in (0, 6, 64)
        assert "Traceback" not in capsys.readouterr().err


def test_demo_split_and_hash_are_checked(monkeypatch):
    monkeypatch.setattr(
        corpora, "fetch_wheel", lambda: (_ for _ in ()).throw(tg.InputError("SHA-256"))
    )
    corpora.demo_documents.cache_clear()
    with pytest.raises(tg.InputError, match="SHA-256"):
        corpora.demo_corpus().documents("val")


# --------------------------------------------------------------------------------------------------
# Tokenizers
# --------------------------------------------------------------------------------------------------


def test_documents_that_the_trainer_skips_are_counted(tmp_path):
    """Against the trainer's own log.

    Lengths at the edge, bytes against characters, its reserved character.
    """
    texts = [
        *DOCUMENTS[:30],
        "x" * 4192,
        "x" * 4193,
        "\u00e9" * 2096,
        "\u00e9" * 2097,
        "a \u2585 b",
        " " + "y" * 4192 + "\n",
    ]
    script = (
        "import sys, json, sentencepiece, export\nfrom pathlib import Path\n"
        "train = sentencepiece.SentencePieceTrainer.train\n"
        "def loud(**options): train(**dict(options, minloglevel=0))\n"
        "sentencepiece.SentencePieceTrainer.train = loud\n"
        "s = export.train_tokenizer(json.load(sys.stdin), 400, "
        f"Path({str(tmp_path / 't.model')!r}))\n"
        "print(json.dumps([s.documents, s.long, s.reserved, s.told()]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        env=clean_env(PYTHONPATH=str(ROOT / "data")),
        timeout=120,
        check=True,
    )
    documents, too_long, reserved, told = json.loads(done.stdout)
    assert (
        documents == len(texts)
        and reserved == done.stderr.count("Reserved chars are found. Skipped") == 1
    )
    assert too_long == int(re.search(r"Skipped (\d+) too long sentences", done.stderr)[1])
    assert (
        int(re.search(r"Loaded all (\d+) sentences", done.stderr)[1])
        == documents - too_long - reserved
    )
    assert f"warning: {too_long} documents" in told[1] and "U+2585" in told[2]


def web_documents():
    table = tg.ByteTable.from_sentencepiece(WEB / "tokenizers/fineweb_1024_bpe.model")
    train = documents_of(WEB / "web_sp1024", "train", table)
    return (
        table,
        train,
        [json.loads(line)["text"] for line in open(WEB / "web_val.jsonl", encoding="utf-8")],
    )


@needs_web
def test_the_recipe_is_the_official_one(tmp_path):
    table, train, val = web_documents()
    skipped = export.train_tokenizer(train, 1024, tmp_path / "t.model")
    ours = tg.ByteTable.from_sentencepiece(tmp_path / "t.model")
    counts = [sum(len(t.encode(text)) for text in val) for t in (ours, table)]
    assert abs(counts[0] / counts[1] - 1) < 0.01
    assert skipped.long == sum(len(text.encode()) > 4192 for text in train) > 500


@needs_web
def test_official_shards_are_reproduced_bit_for_bit(tmp_path):
    _, train, val = web_documents()
    path = jsonl(tmp_path / "docs.jsonl", [*val, *train])
    args = ("--name", "web", "--root", tmp_path, "--val-docs", len(val))
    done = tool("export", path, *args, "--tokenizer", WEB / "tokenizers/fineweb_1024_bpe.model")
    assert done.returncode == 0 and "left out" not in done.stdout, done.stderr
    for split in ("val", "train"):
        name = f"fineweb_{split}_000000.bin"
        made = tmp_path / "datasets/web" / name
        assert made.read_bytes() == (WEB / "web_sp1024" / name).read_bytes()


# --------------------------------------------------------------------------------------------------
# Bytes, end to end
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_bytes(corpus, tmp_path_factory):
    root = tmp_path_factory.mktemp("bytes")
    done = tool(
        "text", corpus, "--name", "raw", "--root", root, "--tokenizer", "byte260", "--val-every", 10
    )
    assert done.returncode == 0 and "TOKENIZER_PATH=byte260 VOCAB_SIZE=260" in done.stdout
    (tokenizer,) = manifest.read(root)["tokenizers"]
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
    return root / "datasets/raw"


def test_byte_shards_are_the_text(in_bytes):
    tokens = np.asarray(tg.read_shard(in_bytes / "fineweb_val_000000.bin")).tolist()
    assert tokens == [
        token for text in DOCUMENTS[::10] for token in (1, *(byte + 4 for byte in text.encode()))
    ]


def test_bytes_train_and_score(in_bytes, tmp_path):
    """The last of a byte document is charged like any other.

    The log's first lines are the ones that verify prints.
    """
    env = clean_env(
        **{
            **TINY_RUN,
            "SMOKE": "0",
            "VAL_TOKENS": "0",
            "EVAL_STRIDE": "0",
            "DATA_PATH": str(in_bytes),
            "TOKENIZER_PATH": "byte260",
            "VOCAB_SIZE": "260",
            "OUT_DIR": str(tmp_path),
            "DEVICE": "cpu",
            "EVAL_SEQ_LEN": "64",
        }
    )
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_gpt.py")],
        capture_output=True,
        text=True,
        env=env,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    log = (tmp_path / "train.log").read_text().splitlines()
    text = sum(len(text.encode()) for text in DOCUMENTS[::10])
    assert (
        result["result"]["bytes"] == text
        and result["result"]["complete"]
        and "val_bpb" in result["result"]
    )
    checked = tool("verify", in_bytes)
    lines = checked.stdout.splitlines()[:3]
    assert checked.returncode == 0 and all(line in log for line in lines)
    assert [line.split(":")[0] for line in lines] == ["val_bpb", "val_loader", "train_loader"]
    assert log.index(lines[0]) < log.index(lines[2]) < 8


def test_shards_of_another_tokenizer_are_refused(prepared, tmp_path):
    """Another model of the same size would give a wrong score without error: the manifest tells."""
    other = tmp_path / "other.model"
    export.train_tokenizer(DOCUMENTS[:40], 500, other, 1 << 20)
    cfg = tg.Config(
        data_path=str(prepared / "datasets/mine"), tokenizer_path=str(other), vocab_size=500
    )
    with pytest.raises(tg.InputError, match="another tokenizer .* made the shards"):
        tg.ByteTable.load(cfg)
    right = str(prepared / "tokenizers/mine_bpe.model")
    assert tg.ByteTable.load(tg.Config(**{**vars(cfg), "tokenizer_path": right})).vocab_size == 500


def other_model(path, size):
    export.train_tokenizer(DOCUMENTS[:40], size, path, 1 << 20)
    return str(path)


@pytest.mark.parametrize(
    "spelling",
    [
        "{root}/datasets/mine/",
        "{root}/datasets/mine/../mine",
        "{root}/link",
        "{root}/linked/mine",
        ".",
    ],
)
def test_the_manifest_is_found_however_the_folder_is_spelt(
    spelling, prepared, tmp_path, monkeypatch, capsys
):
    """Also through a link to the dataset, and where the folder of datasets is itself a link."""
    root = tmp_path / "data"
    shutil.copytree(prepared, root)
    (root / "datasets").rename(tmp_path / "elsewhere")
    (root / "datasets").symlink_to(tmp_path / "elsewhere")
    shutil.copytree(prepared, tmp_path / "plain")
    (root / "link").symlink_to(tmp_path / "plain/datasets/mine")
    (root / "linked").symlink_to(tmp_path / "plain/datasets")
    monkeypatch.chdir(tmp_path / "plain/datasets/mine")
    path = spelling.format(root=root)
    cfg = tg.Config(
        data_path=path, tokenizer_path=other_model(tmp_path / "other.model", 500), vocab_size=500
    )
    with pytest.raises(tg.InputError, match="another tokenizer"):
        tg.ByteTable.load(cfg)
    assert tg.shards_identity(cfg, "val", 1)[0]["val_dataset"] == "mine"
    assert prepare.main(["verify", path], {}) == 0
    assert "hashes     PASS" in capsys.readouterr().out


def test_byte_shards_want_bytes(in_bytes, tmp_path, capsys):
    model = other_model(tmp_path / "sp.model", 400)
    with pytest.raises(tg.InputError, match="another tokenizer .sha256 byte260. made the shards"):
        tg.ByteTable.load(tg.Config(data_path=str(in_bytes), tokenizer_path=model, vocab_size=400))
    assert prepare.main(["verify", str(in_bytes), "--tokenizer", model], {}) == 6
    assert re.search("tokenizer +FAIL", capsys.readouterr().out)


def test_a_name_stands_for_one_tokenizer(corpus, tmp_path, capsys):
    """No second dataset gives the first one's tokenizer another content, wherever the file is."""
    root = tmp_path / "data"
    models = [tmp_path / "1/x.model", tmp_path / "2/x.model", tmp_path / "3/x.spm"]
    for path, size in zip(models, (420, 430, 440)):
        path.parent.mkdir()
        other_model(path, size)

    def make(name, model):
        return prepare.main(
            [
                "text",
                str(corpus),
                "--name",
                name,
                "--tokenizer",
                str(model),
                "--root",
                str(root),
                "--workers",
                "1",
            ],
            {},
        )

    assert make("a", models[0]) == 0
    (root / "tokenizers/x.model").rename(root / "tokenizers/moved.model")
    for model in models[1:]:
        capsys.readouterr()
        assert (
            make("b", model) == 64
            and "a was made with another tokenizer named x" in capsys.readouterr().err
        )
        assert (
            not (root / "datasets/b").exists() and not (root / "tokenizers" / model.name).exists()
        )


def test_text_that_the_normaliser_shrinks_is_no_fault(tmp_path, capsys):
    """Indented text charges a seventh less than its raw bytes.

    The record is of the bytes charged.
    """
    source = ROOT / "train_gpt.py"
    shutil.copy(source, tmp_path / "code.txt")
    args = [
        "text",
        str(tmp_path / "code.txt"),
        "--name",
        "code",
        "--vocab-size",
        "600",
        "--val-every",
        "10",
    ]
    assert prepare.main([*args, "--root", str(tmp_path), "--workers", "1"], {}) == 0
    (told,) = manifest.read(tmp_path)["datasets"]
    assert told["charged_bytes"]["val"] < 0.95 * told["text_bytes"]["val"]
    checked = ["verify", str(tmp_path / "datasets/code"), "--documents", str(tmp_path / "code.txt")]
    assert prepare.main(checked, {}) == 0 and "bytes      PASS" in capsys.readouterr().out


def test_a_missing_package_is_named():
    script = (
        "import runpy, sys\nsys.modules['filelock'] = None\nsys.argv = ['prepare.py', 'demo']\n"
        f"sys.path.insert(0, {str(ROOT / 'data')!r})\n"
        f"runpy.run_path({str(ROOT / 'data/prepare.py')!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=clean_env(),
        timeout=60,
        check=False,
    )
    assert (
        done.returncode == 1 and "filelock" in done.stderr and "requirements-dev.txt" in done.stderr
    )
    assert "Traceback" not in done.stderr


def test_a_manifest_that_is_none_is_named(tmp_path):
    for text, message in (
        ("{", "not JSON"),
        ("[]", "expected an object"),
        ('{"datasets": [1]}', "expected an object"),
    ):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(tg.InputError, match=message):
            manifest.read(tmp_path)
