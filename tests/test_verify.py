"""`data/prepare.py verify` against planted faults.

Each is found, by the check that is meant to find it.
"""

import json
import pydoc_data.topics
import re
import shutil

import corpora
import export
import numpy as np
import prepare
import pytest
import verify
from conftest import SHARED

import train_gpt as tg

TOPICS = pydoc_data.topics.topics.values()
DOCUMENTS = [*dict.fromkeys(" ".join(text.split()) for text in TOPICS)][:40]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A dataset of several shards, with the text it was made from."""
    root = tmp_path_factory.mktemp("verify")
    text = root / "docs.jsonl"
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in DOCUMENTS))
    plan = export.TokenizerPlan(vocab_size=400, max_sentence_length=1 << 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "SHARD_TOKENS", 20_000)
        export.Export(corpora.file_corpus([text], val_docs=6), plan, root, "mine", 1).run()
    assert len([*(root / "datasets/mine").glob("fineweb_train_*")]) > 2
    return root


@pytest.fixture
def folder(made, tmp_path):
    """A copy of it to break."""
    shutil.copytree(made, tmp_path / "data")
    return tmp_path / "data/datasets/mine"


def run(capsys, folder, *options):
    """Exit code and {check: (verdict, text)} of `verify`."""
    capsys.readouterr()
    code = prepare.main(["verify", str(folder), *map(str, options)], {})
    found = re.findall(r"^(\w+) +(PASS|FAIL|SKIPPED) +(.*)$", capsys.readouterr().out, re.M)
    assert [name for name, *_ in found] == list(verify.CHECKS)
    return code, {name: (verdict, text) for name, verdict, text in found}


def rewrite(path, change):
    """A shard with changed tokens, whole again."""
    tokens = np.array(tg.read_shard(path))
    tg.write_shard(path, np.asarray(change(tokens)))


def forget(folder):
    """Without a manifest nothing but the check itself can tell."""
    (folder.parent.parent / "manifest.json").unlink()
    return "--tokenizer", folder.parent.parent / "tokenizers/mine_bpe.model"


def test_a_good_dataset_passes(folder, made, capsys):
    code, found = run(capsys, folder, "--documents", made / "docs.jsonl")
    assert code == 0 and {verdict for verdict, _ in found.values()} == {"PASS", "SKIPPED"}
    assert [name for name, (verdict, _) in found.items() if verdict == "SKIPPED"] == ["published"]
    raw = sum(len(text.encode()) for text in DOCUMENTS[:6])
    assert (
        f"{raw} raw" in found["documents"][1] and "6 validation documents" in found["documents"][1]
    )
    assert "no one of 34 training documents is among 6 validation documents" in found["disjoint"][1]


def test_without_a_manifest_only_that_is_skipped(folder, capsys):
    code, found = run(capsys, folder, *forget(folder))
    skipped = {name for name, (verdict, _) in found.items() if verdict == "SKIPPED"}
    assert code == 0 and skipped == {"manifest", "hashes", "tokenizer", "published", "documents"}


def first(folder, split="train"):
    return folder / f"fineweb_{split}_000000.bin"


def patch_bytes(lo, hi, new):
    """A change of a file's bytes lo to hi - 1."""
    return lambda f: first(f).write_bytes(
        first(f).read_bytes()[:lo] + new + first(f).read_bytes()[hi:]
    )


def copy_a_validation_document(folder):
    val = np.array(tg.read_shard(first(folder, "val")))
    document = val[: np.flatnonzero(val == 1)[1]]
    rewrite(first(folder), lambda t: np.concatenate((t[:50], document, [1], t[50:])))


FAULTS = {
    "half a header": ("shards", patch_bytes(500, 10**9, b""), "shorter than the header"),
    "cut shard": ("shards", patch_bytes(-2, 10**9, b""), "need"),
    "half-written shard": ("shards", patch_bytes(0, 1024, tg.shard_header(0)), "0 tokens"),
    "other magic": ("shards", patch_bytes(0, 1, b"\1"), "magic"),
    "text in the header": ("shards", patch_bytes(1000, 1024, b"x" * 24), "not zero"),
    "missing shard": (
        "shards",
        lambda f: (f / "fineweb_train_000001.bin").unlink(),
        "train_000001.bin is missing",
    ),
    "no validation": (
        "shards",
        lambda f: [p.unlink() for p in f.glob("fineweb_val_*")],
        "no fineweb_val_",
    ),
    "wrong vocabulary": (
        "tokens",
        lambda f: rewrite(first(f), lambda t: np.append(t[:-1], 400)),
        "token 400",
    ),
    "no document start": (
        "tokens",
        lambda f: rewrite(first(f, "val"), lambda t: t[1:]),
        "begins with token",
    ),
    "overlap": (
        "disjoint",
        copy_a_validation_document,
        "1 training documents are also validation documents (the first: document 1)",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, folder, capsys):
    check, plant, message = FAULTS[fault]
    plant(folder)
    code, found = run(capsys, folder, *forget(folder))
    assert code == 6 and found[check][0] == "FAIL" and message in found[check][1], found
    assert {name for name, (verdict, _) in found.items() if verdict == "FAIL"} == {check}


def test_validation_alone_is_enough_to_score_with(folder, capsys):
    for path in folder.glob("fineweb_train_*"):
        path.unlink()
    code, found = run(capsys, folder, *forget(folder))
    assert code == 0 and found["disjoint"] == ("SKIPPED", "there are no training shards")
    assert found["bytes"][0] == "PASS" and "0 train shards" in found["shards"][1]


def test_an_overlap_across_shards_is_found(folder, capsys):
    """The copy begins in one shard and ends in the next."""
    document = np.array(tg.read_shard(first(folder, "val")))
    document = document[: np.flatnonzero(document == 1)[1]]
    rewrite(folder / "fineweb_train_000000.bin", lambda t: np.concatenate((t, document[:100])))
    rewrite(folder / "fineweb_train_000001.bin", lambda t: np.concatenate((document[100:], [1], t)))
    code, found = run(capsys, folder, *forget(folder))
    assert code == 6 and found["disjoint"][0] == "FAIL"


def test_every_byte_of_a_file_is_covered(folder, capsys):
    path = first(folder, "val")
    rewrite(path, lambda t: np.where(np.arange(len(t)) == 77, t[78], t))
    code, found = run(capsys, folder)
    assert (
        code == 6
        and found["hashes"][0] == "FAIL"
        and "fineweb_val_000000.bin: SHA-256" in found["hashes"][1]
    )


def test_a_shard_that_nobody_recorded_is_found(folder, capsys):
    last = sorted(folder.glob("fineweb_train_*"))[-1]
    shutil.copy(last, folder / f"fineweb_train_{int(last.stem[-6:]) + 1:06d}.bin")
    code, found = run(capsys, folder)
    assert (
        code == 6 and "not in the manifest" in found["hashes"][1] and found["manifest"][0] == "FAIL"
    )


@pytest.mark.parametrize(
    "size, message",
    [(400, "SHA-256"), (420, "420 tokens, document start 1; the manifest says 400")],
)
def test_another_tokenizer_is_found(size, message, folder, tmp_path, capsys):
    export.train_tokenizer(DOCUMENTS[20:], size, tmp_path / "other.model", 1 << 20)
    code, found = run(capsys, folder, "--tokenizer", tmp_path / "other.model")
    assert code == 6 and found["tokenizer"][0] == "FAIL" and message in found["tokenizer"][1]


def test_a_manifest_with_other_counts_is_found(folder, capsys):
    path = folder.parent.parent / "manifest.json"
    told = json.loads(path.read_text())
    for key in ("docs_val", "tokens_train", "files_train"):
        wrong = json.loads(json.dumps(told))
        wrong["datasets"][0]["stats"][key] += 1
        path.write_text(json.dumps(wrong))
        code, found = run(capsys, folder)
        split, what = key.split("_")[1], key.split("_")[0]
        assert code == 6 and re.search(
            rf"{split} has \d+ {what}, the manifest says", found["manifest"][1]
        )


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda documents: [*documents[:3], documents[3] + "!", *documents[4:]],
            "validation document 4 is not",
        ),
        (lambda documents: documents[1:], "validation document 1 is not"),
        (lambda documents: documents[:5], "more documents than the text's 5"),
    ],
)
def test_documents_that_differ_are_found(change, message, folder, tmp_path, capsys):
    path = tmp_path / "other.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in change(DOCUMENTS)))
    code, found = run(capsys, folder, "--documents", path)
    assert code == 6 and message in found["documents"][1]


def test_a_wrong_byte_table_is_found(folder, capsys, monkeypatch):
    """One token a byte too long, that is only in the last validation document."""
    real = tg.ByteTable.from_sentencepiece
    tokens = np.concatenate([tg.read_shard(path) for path in sorted(folder.glob("fineweb_val_*"))])
    *others, last = np.split(tokens, np.flatnonzero(tokens == 1)[1:])
    token = (set(last.tolist()) - set(np.concatenate(others).tolist())).pop()

    def wrong(path):
        table = real(path)
        table.sizes = table.sizes + (np.arange(table.vocab_size) == token)
        return table

    monkeypatch.setattr(tg.ByteTable, "from_sentencepiece", wrong)
    code, found = run(capsys, folder)
    assert code == 6 and "counted" in found["bytes"][1]


def test_one_byte_more_than_recorded_is_found(folder, capsys):
    path = folder.parent.parent / "manifest.json"
    told = json.loads(path.read_text())
    told["datasets"][0]["charged_bytes"]["val"] -= 1
    path.write_text(json.dumps(told))
    code, found = run(capsys, folder)
    assert code == 6 and re.search(
        r"validation charges \d+ bytes, \d+ when it was made", found["bytes"][1]
    )


def test_a_damaged_manifest_entry_is_a_fault(folder, capsys):
    path = folder.parent.parent / "manifest.json"
    told = json.loads(path.read_text())
    del told["datasets"][0]["stats"]
    path.write_text(json.dumps(told))
    code, found = run(capsys, folder)
    assert code == 6 and found["manifest"] == (
        "FAIL",
        "the manifest's entry is damaged (KeyError('stats'))",
    )


def test_a_published_name_needs_the_whole_validation_set(folder, capsys):
    """M1: a subset under the name of the challenge's data is no validation set."""
    options = forget(folder)
    renamed = folder.rename(folder.with_name("fineweb10B_sp400"))
    code, found = run(capsys, renamed, *options)
    assert code == 6 and "validation has 6 documents" in found["published"][1]


def test_no_folder(tmp_path, capsys):
    assert prepare.main(["verify", str(tmp_path / "none")], {}) == 64
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="no shared web text")
def test_shared_shards(capsys):
    code, found = run(
        capsys,
        SHARED / "data/web_sp1024",
        "--documents",
        SHARED / "data/web_val.jsonl",
        "--tokenizer",
        SHARED / "data/tokenizers/fineweb_1024_bpe.model",
    )
    assert (
        code == 0 and found["documents"][0] == found["disjoint"][0] == found["bytes"][0] == "PASS"
    )
    assert "422154 raw" in found["documents"][1]
