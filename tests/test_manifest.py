"""The manifest: damage is named, a name stands for one tokenizer, links lead to it."""

import json
import re
import shutil
import threading

import export
import manifest
import pytest
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
    ],
)
def test_a_manifest_that_is_none_is_named(text, message, tmp_path):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(tg.InputError, match=f"manifest.json: {message}"):
        manifest.read(tmp_path)


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
