"""The manifest: damage is named, a name stands for one tokenizer, links lead to it."""

import json
import re
import shutil
import subprocess
import threading

import export
import manifest
import numpy as np
import pytest
import shown
import verify
from data_tool import (
    DOCUMENTS,
    MINE,
    call,
    results,
    small_model,
)

import train_gpt as tg


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not JSON"),
        ("[]", "expected an object"),
        ('{"datasets": [1]}', "expected an object"),
        ('{"datasets": [1], "tokenizers": []}', "expected an object"),
        ("[" * 100_000, "not JSON .RecursionError"),
        ('{"a":' * 100_000, "not JSON .RecursionError"),
        (f"[{'9' * 5000}]", "not JSON"),
        ('{"datasets": [{"name": 3}], "tokenizers": []}', "name of 3 in datasets is 3, expected"),
        ("[" * 60 + "]" * 60, "nested more than 50 deep"),
        ('{"a":' * 300 + "1" + "}" * 300, "nested more than 50 deep"),
    ],
)
def test_a_manifest_that_is_none_is_named(text, message, tmp_path, corpus):
    """By every command that reads it, in one line; nothing is made."""
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(tg.InputError, match=f"manifest.json: {message}"):
        manifest.read(tmp_path)
    tg.write_shard(tmp_path / "datasets/mine" / tg.shard_name("val", 0), np.array([1, 5, 6]))
    before = results(tmp_path)
    for done in (
        call("verify", tmp_path / "datasets/mine", tokenizer="byte260"),
        call("text", corpus, name="other", root=tmp_path, tokenizer="byte260", workers=1),
        call("fineweb", root=tmp_path),
    ):
        assert done.code == 64
        assert re.match(f"error: .*manifest.json: {message}", done.err)
        assert len(done.err) < 500
    assert results(tmp_path) == before


FORGED = "x\nbytes      PASS     all is well\r\033[31m" + 500 * "y"


@pytest.mark.parametrize(
    "kind, key, value",
    [
        ("datasets", "files", {FORGED: {"size": 3, "sha256": ""}}),
        ("datasets", "files", {"datasets/mine/fineweb_val_000000.bin": {"size": FORGED}}),
        ("datasets", "stats", {"files_train": 1, "docs_val": FORGED}),
        ("datasets", "charged_bytes", {"val": FORGED}),
        ("datasets", "made_from", {"tokenizer_sha256": FORGED}),
        ("datasets", "tokenizer_name", FORGED),
        ("datasets", "bos_id", FORGED),
        ("datasets", FORGED, 3),
        ("tokenizers", "sha256", FORGED),
        ("tokenizers", "model_path", FORGED),
        ("tokenizers", "model_path", "nul\0"),
        ("tokenizers", "name", FORGED),
        ("tokenizers", "vocab_size", 10**4000),
    ],
    ids=[f"case {number}" for number in range(13)],
)
def test_names_from_a_manifest_forge_no_line(kind, key, value, prepared, corpus, tmp_path):
    """Whatever is printed of them is escaped and short."""
    root = shutil.copytree(prepared, tmp_path / "data")
    path = root / "manifest.json"
    told = json.loads(path.read_text())
    told[kind][0][key] = value
    path.write_text(json.dumps(told))
    checked = call("verify", root / "datasets/mine")
    assert checked.code in (0, 6, 64)
    begin = r"val_bpb:|val_loader:|train_loader:|\w+ +(PASS|FAIL|SKIPPED) "
    for line in checked.out.splitlines():
        assert re.match(begin, line), line
        assert line.isprintable()
        assert len(line) < 1000
    assert "all is well" not in re.findall("^bytes.*", checked.out, re.M)
    done = call("text", corpus, root=root, **MINE)
    assert len(done.err.splitlines()) <= 1
    assert len(done.err) < 1000
    assert done.err.removesuffix("\n").isprintable()


def test_shards_of_odd_names_forge_no_line(prepared, tmp_path):
    root = shutil.copytree(prepared, tmp_path / "data")
    (root / "datasets/mine" / "fineweb_val_0\nhashes     PASS     x.bin").write_bytes(b"")
    checked = call("verify", root / "datasets/mine")
    assert checked.code == 6
    assert len(re.findall("^hashes ", checked.out, re.M)) == 1
    assert r"fineweb_val_0\nhashes     PASS     x.bin" in checked.out


@pytest.mark.parametrize(
    "name", ["plain", "with space", "it's", "a\nb", "tab\t'\\n", "\x1b[2J\u2028é"]
)
def test_the_last_line_is_one_that_a_shell_reads(name):
    """Also with names that nobody should give."""
    word = shown.shell_word(name)
    assert word.isprintable()
    line = f"printf %s {word}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, check=True)
    assert done.stdout.decode() == name


@pytest.mark.parametrize(
    "kind, key, value",
    [
        ("datasets", "files", 3),
        ("datasets", "stats", []),
        ("tokenizers", "model_path", 1),
        ("datasets", "bos_id", "1"),
        ("datasets", "made_from", None),
        ("datasets", "tokenizer_name", ...),
        ("datasets", "files", {"x": {}}),
        ("datasets", "files", ...),
        ("tokenizers", "model_path", ...),
    ],
)
def test_damaged_entries_are_named(kind, key, value, prepared, corpus, tmp_path):
    """A field of another type, or (...) none: by export and by verify, never by a traceback."""
    root = shutil.copytree(prepared, tmp_path / "data")
    path = root / "manifest.json"
    told = json.loads(path.read_text())
    if value is ...:
        del told[kind][0][key]
    else:
        told[kind][0][key] = value
    path.write_text(json.dumps(told))
    done = call("text", corpus, root=root, **MINE)
    assert done.code == 64
    complaint = "manifest.json: (the entry mine is damaged|.* expected)|x: missing"
    assert re.search(complaint, done.err)
    checked = call("verify", root / "datasets/mine")
    assert checked.code in (0, 6, 64)


@pytest.mark.parametrize("kind", [None, "byte", "char", "sentencepiece_bpe"])
@pytest.mark.parametrize("more", [{}, {"model_path": "tokenizers/x.model", "sha256": "0"}])
def test_the_script_and_the_tool_agree_which_tokenizer_is_bytes(kind, more, tmp_path):
    entry = {"name": "x", "vocab_size": 260, **({"kind": kind} if kind else {}), **more}
    try:
        model = manifest.model_of(tmp_path, entry)
    except tg.InputError as refused:
        assert not more
        assert "manifest.json: tokenizer x has no model_path, expected one" in str(refused)
        model = ""
    assert (model == "byte260") == (tg._digest_in(entry) == "byte260")


@pytest.mark.parametrize(
    "dataset, tokenizer, start",
    [({"bos_id": 7}, {"bos_id": 5}, 7), ({}, {"bos_id": 5}, 5), ({}, {}, 1)],
)
def test_the_document_start_is_one_for_all(dataset, tokenizer, start, tmp_path):
    """The dataset's, else the tokenizer's, else 1: for train_gpt.py's settings and for verify."""
    dataset = {"name": "mine", "tokenizer_name": "x", **dataset}
    tokenizer = {"name": "x", "kind": "byte", "vocab_size": 260, **tokenizer}
    told = {"datasets": [dataset], "tokenizers": [tokenizer]}
    (tmp_path / "manifest.json").write_text(json.dumps(told))
    assert manifest.settings(tmp_path, dataset, tokenizer).get("BOS_ID", 1) == start
    assert verify.Dataset(tmp_path / "datasets/mine", "", []).bos == start


def entries(number):
    """A dataset and a tokenizer for a manifest."""
    dataset = {"name": f"data{number}", "tokenizer_name": f"tok{number}"}
    return dataset, {"name": f"tok{number}", "vocab_size": 300}


def test_entries_of_several_writers_stand_side_by_side(tmp_path, monkeypatch):
    """Each has read the manifest while the other was about to write it."""
    real = manifest.read
    meeting = threading.Barrier(2)

    def slow_read(root):
        found = real(root)
        try:
            meeting.wait(0.5)  # without a lock both are here at the same time
        except threading.BrokenBarrierError:
            pass
        return found

    monkeypatch.setattr(manifest, "read", slow_read)

    def add(number):
        with manifest.adding(tmp_path, *entries(number)):
            pass

    writers = [threading.Thread(target=add, args=(number,)) for number in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    names = sorted(entry["name"] for entry in real(tmp_path)["datasets"])
    assert names == ["data0", "data1"]


def test_another_tokenizer_of_the_same_name_is_refused(prepared, corpus, tmp_path):
    model = tmp_path / "mine_bpe.model"
    export.train_tokenizer(DOCUMENTS, 450, model, 1 << 20)
    before = results(prepared)
    done = call("text", corpus, name="other", root=prepared, workers=1, tokenizer=model)
    assert done.code == 64
    complaint = "mine was made with another tokenizer named mine_bpe (another vocab_size and sha256"
    assert complaint in done.err
    assert results(prepared) == before


def test_a_name_stands_for_one_tokenizer(corpus, tmp_path):
    """No second dataset gives the first one's tokenizer another content, wherever the file is."""
    root = tmp_path / "data"
    models = []
    for path, size in (("1/x.model", 420), ("2/x.model", 430), ("3/x.spm", 440)):
        (tmp_path / path).parent.mkdir()
        models.append(small_model(tmp_path / path, size))
    options = dict(root=root, workers=1)
    assert call("text", corpus, name="a", tokenizer=models[0], **options).code == 0
    (root / "tokenizers/x.model").rename(root / "tokenizers/moved.model")
    for model in models[1:]:
        done = call("text", corpus, name="b", tokenizer=model, **options)
        assert done.code == 64
        assert "a was made with another tokenizer named x" in done.err
        assert not (root / "datasets/b").exists()
        assert not (root / "tokenizers" / model.name).exists()


def test_a_tokenizer_that_nobody_listed_is_not_overwritten(corpus, tmp_path):
    own = tmp_path / "tokenizers/mine_bpe.model"
    own.parent.mkdir()
    own.write_bytes(b"someone's work")
    done = call("text", corpus, root=tmp_path, workers=1, **MINE)
    assert done.code == 64
    assert "another tokenizer of that name is there" in done.err
    assert list(results(tmp_path).values()) == [b"someone's work"]


def test_shards_of_another_tokenizer_are_refused(prepared, tmp_path):
    """Another model of the same size would give a wrong score without error: the manifest tells."""
    other = small_model(tmp_path / "other.model", 500)
    folder = str(prepared / "datasets/mine")
    cfg = tg.Config(data_path=folder, tokenizer_path=str(other), vocab_size=500)
    with pytest.raises(tg.InputError, match="another tokenizer .* made the shards"):
        tg.ByteTable.load(cfg)
    right = str(prepared / "tokenizers/mine_bpe.model")
    cfg = tg.Config(data_path=folder, tokenizer_path=right, vocab_size=500)
    assert tg.ByteTable.load(cfg).vocab_size == 500


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
    spelling, prepared, tmp_path, monkeypatch
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
    other = small_model(tmp_path / "other.model", 500)
    cfg = tg.Config(data_path=path, tokenizer_path=str(other), vocab_size=500)
    with pytest.raises(tg.InputError, match="another tokenizer"):
        tg.ByteTable.load(cfg)
    fields, _ = tg.shards_identity(cfg, "val", 1)
    assert fields["val_dataset"] == "mine"
    checked = call("verify", path)
    assert checked.code == 0
    assert "hashes     PASS" in checked.out


@pytest.mark.parametrize(
    "name, number",
    [
        ("fineweb_val_000007.bin", 7),
        ("some/folder/fineweb_val_123456.bin", 123456),
        ("fineweb_train_000007.bin", None),
        ("fineweb_val_7.bin", None),
        ("fineweb_val_0000007.bin", None),
        ("fineweb_val_000007.txt", None),
        ("fineweb_val_*.bin", None),
    ],
)
def test_the_number_of_a_shard(name, number):
    assert manifest.shard_number(name, "val") == number
