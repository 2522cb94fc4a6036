"""Capital letters as markers, and the bytes that tokens of such text are charged.

The oracles read a text character by character; the program uses regular expressions and arrays.
"""

import json
import shutil
import time

import codec
import export
import helpers
import hypothesis
import numpy as np
import pytest
import verify
from conftest import SHARED, TINY_RUN
from data_tool import DOCUMENTS, call, jsonl, needs_web, results
from helpers import log_of, result_of
from hypothesis import strategies

import train_gpt as tg

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
FORMS = list(tg.CASE_TRANSFORMS)
REFERENCE = SHARED / "reference/caseops.jsonl"
PUBLISHED = SHARED / "data/tokenizers/fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model"
needs_reference = pytest.mark.skipif(not REFERENCE.is_file(), reason="no reference texts")

ODD = [
    "", " ", "  ", "A", "a", " A", "  A", "A ", "\nA", "\n\n \tThe end", "(The", '"The', "a-B", "I",
    "ABC", "ABc", "AbC", "aBC", "aB", "iPhone eBay McDonald's O'NEIL HTTPServer2Go 4K 3D MP3",
    "x\ue001y \ue004Z", "\ue004", "\ue004\ue004", "\ue001", " \ue001A", "\ue002 ABC", "\ue003b",
    "\ue004\ue001 The", "A\ue004", "The\ue001The", "\ue001 the", "\ue002the", "\ue003\ue004\ue001",
    "Stra\xdfe \xc4\xd6\xdc \xc9a NA\xcfVE", "A\u0301 E\u0301te", "\u0130 \u01c5 \u212a \u017f",
    "\ufb01ne OF\ufb01CE", "\uff26\uff55\uff4c\uff4c Full", "\u00a0The\u2028The\u3000The\x85The",
    "\u200bThe \u200b The", "\u2581The \u2581 The", "a\0B", "\U0001f44d OK", "A" * 300, "0\x1f",
    "a" * 300 + "B", "<s> </s> <unk> <0x41>", "\r\nThe\r\n", "The  The   The", "\uac00A",
    " The \x1f ", "\ufeffThe",
]  # fmt: skip

# Text in which capitals, white space and markers meet often.
texts = strategies.text(
    strategies.sampled_from("aAbBzZ  \n\t.\u00e9\u00c9\u0301\u200b" + tg.CASE_MARKERS)
)
any_text = strategies.text() | texts
checked = hypothesis.settings(deadline=None, derandomize=True, database=None, max_examples=300)


# --- oracles --------------------------------------------------------------------------------------


def marked_slowly(text, transform):
    """The transform, a character at a time."""
    out = []
    at = 0
    while at < len(text):
        if text[at] in tg.CASE_MARKERS:
            out += [tg.ESCAPE, text[at]]
            at += 1
            continue
        end = at
        while end < len(text) and text[end] in LETTERS:
            end += 1
        if end == at:
            out.append(text[at])
            at += 1
            continue
        run = text[at:end]
        at = end
        first = ""
        if len(run) > 1 and run == run.upper():
            first, run = tg.ALLCAPS, run.lower()
        elif run[0] == run[0].upper():
            first, run = tg.TITLE, run[0].lower() + run[1:]
        if first and transform == "case2":
            blank = len(out)
            while blank and out[blank - 1].isspace():
                blank -= 1
            out.insert(blank, first)
        elif first:
            out.append(first)
        for letter in run:
            out += [letter] if letter == letter.lower() else [tg.CAPNEXT, letter.lower()]
    return "".join(out)


def charged_slowly(text, table):
    """Bytes of each piece's surface without active markers, by characters."""
    marked = table.marked_text(text)
    active = []
    escaped = False
    for letter in marked:
        active.append(letter in tg.CASE_MARKERS and not escaped)
        escaped = active[-1] and letter == tg.ESCAPE
    found = table.processor.encode(marked, return_type="offset_mapping")
    charges = []
    for start, end in found["offsets"]:
        kept = [c for c, marker in zip(marked[start:end], active[start:end]) if not marker]
        charges.append(len("".join(kept).encode()))
    return found["ids"], charges


# --- text and back --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_any_text_comes_back(form):
    for text in ODD:
        marked = tg.mark_case(text, form)
        assert marked == marked_slowly(text, form), repr(text)
        assert tg.restore_case(marked) == text, repr(text)


@pytest.mark.parametrize("form", FORMS)
@checked
@hypothesis.given(text=any_text)
def test_random_text_comes_back(form, text):
    marked = tg.mark_case(text, form)
    assert marked == marked_slowly(text, form)
    assert tg.restore_case(marked) == text
    assert export.bytes_before(marked)[-1] == len(text.encode())


@checked
@hypothesis.given(text=any_text)
def test_what_a_model_writes_has_a_text(text):
    """Whatever the order of markers: all that is no active marker stays, small or capital."""
    restored = tg.restore_case(text)
    left = text
    for marker in tg.CASE_MARKERS:
        left = left.replace(marker, "")
        restored = restored.replace(marker, "")
    assert restored.lower() == left.lower()
    assert len(tg.restore_case(text).encode()) == export.bytes_before(text)[-1] or tg.ESCAPE in text


def test_case2_jumps_over_the_white_space_in_front():
    """So that a word has the piece it has in small letters, at line starts, too."""
    title = tg.TITLE
    marked = tg.mark_case('The cat.\nThe  Dog said "The" ABC iPhone', "case2")
    small = f'{title}the cat.{title}\nthe{title}  dog said "{title}the"{tg.ALLCAPS} abc'
    assert marked == f"{small} i{tg.CAPNEXT}phone"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("part", ["a", "A", " ", " \n", "aB", tg.ESCAPE, tg.TITLE, tg.TITLE + " "])
def test_no_text_takes_long(form, part):
    """Much of the same: minutes if the expressions went back and forth."""
    text = part * (400_000 // len(part))
    begun = time.perf_counter()
    assert tg.restore_case(tg.mark_case(text, form)) == text
    tg.restore_case(text)
    assert time.perf_counter() - begun < 5


# --- bytes ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """A small tokenizer of either form."""
    found = {}
    for form in FORMS:
        path = tmp_path_factory.mktemp(form) / "t.model"
        export.train_tokenizer(DOCUMENTS[:60], 500, path, 1 << 20, form)
        found[form] = tg.ByteTable.from_sentencepiece(path, form)
    return found


@needs_reference
def test_text_tokens_and_bytes_of_the_published_transform():
    table = tg.ByteTable.from_sentencepiece(PUBLISHED, "caseops")
    for line in REFERENCE.read_text().splitlines():
        known = json.loads(line)
        ids, charges = export.encode_charged(table, known["text"])
        assert tg.mark_case(known["text"], "caseops") == known["transformed"]
        assert [1, *ids] == known["ids"]
        assert [0, *charges] == known["bytes"]
        assert table.encode(known["text"]) == ids


@needs_web
@pytest.mark.parametrize("form", FORMS)
def test_all_shared_documents_come_back(form):
    for line in (SHARED / "data/web_val.jsonl").read_text().splitlines():
        text = json.loads(line)["text"]
        marked = tg.mark_case(text, form)
        assert marked == marked_slowly(text, form)
        assert tg.restore_case(marked) == text


def check_charges(text, table):
    """Charges equal the oracle's, and add up to the text but for what is dropped at its ends."""
    ids, charges = export.encode_charged(table, text)
    assert (ids, charges.tolist()) == charged_slowly(text, table), repr(text)
    assert charges.sum() == verify.most_bytes(table, text), repr(text)
    return ids, charges


@pytest.mark.parametrize("form", FORMS)
def test_charges_are_bytes_of_the_text(form, tables):
    for text in [*ODD, *DOCUMENTS[60:80]]:
        ids, charges = check_charges(text, tables[form])
        control = np.isin(ids, tables[form].markers[:3])
        assert charges[control].sum() == 3 * sum(map(text.count, tg.CASE_MARKERS[:3]))


@pytest.mark.parametrize("form", FORMS)
@checked
@hypothesis.given(text=any_text)
def test_charges_of_random_text(form, tables, text):
    check_charges(text, tables[form])


@pytest.mark.parametrize("form", FORMS)
def test_the_table_counts_what_tokens_decode_to(form, tables):
    table = tables[form]
    for text in [*ODD, *DOCUMENTS[60:80]]:
        ids = table.encode(text)
        assert table.count(np.array([1, *ids])).sum() == len(table.decode(ids)), repr(text)


@pytest.mark.parametrize("run", range(1, 7))
def test_every_second_escape_is_text(run, tables):
    table = tables["caseops"]
    title, *_, escape = table.markers
    tokens = np.array([1, *[escape] * run, title, title])
    charged = [3 * (number % 2) for number in range(run + 1)] + [0]
    assert table.count(tokens).tolist() == charged


def test_a_transform_needs_its_markers(tmp_path, tables):
    export.train_tokenizer(DOCUMENTS[:40], 400, tmp_path / "plain.model", 1 << 20)
    with pytest.raises(tg.InputError, match=r"plain.model: no pieces for the case markers.*case2"):
        tg.ByteTable.from_sentencepiece(tmp_path / "plain.model", "case2")


# --- shards, side files, runs ---------------------------------------------------------------------

# Documents whose length normalization changes, with markers in the text, and blank ends.
CORPUS = [*DOCUMENTS[:120], "  The \ufb01ne  OF\ufb01CE \ue001x\n", "A\u0301 \uff26ull\n\nEnd "]


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """A data folder for either form, with one dataset of 500 pieces."""
    found = {}
    for form in FORMS:
        root = tmp_path_factory.mktemp(f"root_{form}")
        corpus = jsonl(root / "docs.jsonl", reversed(CORPUS))
        settings = dict(root=root, workers=2, name="mine", vocab_size=500, val_every=10)
        done = call("text", corpus, transform=form, **settings)
        assert done.code == 0, done.err
        found[form] = root
    return found


@pytest.fixture
def mine(roots, tmp_path):
    """A copy of the case2 folder that a test may damage."""
    return shutil.copytree(roots["case2"], tmp_path / "data")


def test_a_given_tokenizer_has_the_transform_of_the_folders(roots):
    """Unless --transform says another."""
    folder = roots["case2"] / "datasets/mine"
    model = roots["case2"] / "tokenizers/mine_bpe.model"
    done = call("verify", folder, tokenizer=model)
    assert done.code == 0, done.out + done.err
    assert call("verify", folder, tokenizer=model, transform="caseops").code == 6


def settings_for(root, **more):
    """Settings of a tiny run on a data folder."""
    data = {
        "DATA_PATH": str(root / "datasets/mine"),
        "TOKENIZER_PATH": str(root / "tokenizers/mine_bpe.model"),
        "VOCAB_SIZE": "500",
        "DEVICE": "cpu",
    }
    smoke = helpers.settings_in(tg.SMOKE_CONFIG)
    tiny = {name: value for name, value in TINY_RUN.items() if name != "SMOKE"}
    return {**smoke, **tiny, **data, "VAL_TOKENS": "0", **more}


def config_for(root, **more):
    return tg.load_config(settings_for(root, **more))


def charges_of(cfg):
    """What scoring would charge, or the InputError of its refusal."""
    table = tg.ByteTable.load(cfg)
    return tg.load_charges(cfg, table, tg.load_validation(cfg))


def side_file(root):
    return root / "datasets/mine" / tg.shard_name(tg.CHARGES, 0)


def edit_manifest(root, change):
    """Applies a function to the manifest."""
    path = root / "manifest.json"
    told = json.loads(path.read_text())
    change(told)
    path.write_text(json.dumps(told))


@pytest.mark.parametrize("form", FORMS)
def test_the_side_file_adds_up_to_the_text(form, roots):
    """Less only the blanks that normalization drops at documents' ends."""
    charges = charges_of(config_for(roots[form]))
    validating = [text for number, text in enumerate(reversed(CORPUS)) if number % 10 == 0]
    assert charges.sum() == sum(len(text.strip(" \n").encode()) for text in validating)
    # The first document is "A... End ": a marker in front keeps nothing, the last blank is dropped.
    verified = call("verify", roots[form] / "datasets/mine", documents=roots[form] / "docs.jsonl")
    assert verified.code == 0, verified.out
    assert "charges    PASS" in verified.out and "documents  PASS" in verified.out


def test_any_number_of_processes_writes_the_same(roots, tmp_path):
    corpus = roots["case2"] / "docs.jsonl"
    settings = dict(root=tmp_path, workers=1, name="mine", vocab_size=500, val_every=10)
    assert call("text", corpus, transform="case2", **settings).code == 0
    theirs = {name: data for name, data in results(roots["case2"]).items() if name != "docs.jsonl"}
    assert results(tmp_path) == theirs


@pytest.fixture(scope="module")
def trained(roots, tmp_path_factory):
    """The folder of a run on case2 text, which wrote a sample."""
    out = tmp_path_factory.mktemp("run") / "out"
    env = settings_for(roots["case2"], OUT_DIR=str(out), SAMPLE_TOKENS="300")
    assert tg.main([], env) == 0
    return out


def test_a_run_scores_the_bytes_of_the_side_file(trained, roots):
    result = result_of(trained)
    charges = charges_of(config_for(roots["case2"]))
    assert result["result"]["bytes"] == charges.sum() == result["data"]["val_text_bytes"]
    assert result["data"]["case_transform"] == "case2"
    assert result["data"]["val_bytes_sha256"] == [tg.sha256(side_file(roots["case2"]))]
    assert not any("FAIL" in str(stage["audit"]) for stage in result["stages"].values())
    assert f"val_bytes_files:1 text_bytes:{charges.sum()} first_sha256:" in log_of(trained)


def test_a_sample_has_capitals_and_no_markers(trained):
    written = log_of(trained).partition("sample: seed:")[2]
    assert any(letter.isupper() for letter in written.partition("\n")[2])
    assert not set(written) & set(tg.CASE_MARKERS) and "ue00" not in written


def test_the_artifact_knows_its_transform(trained, roots, tmp_path):
    """Where no manifest tells, as on a reviewer's machine."""
    data = shutil.copytree(roots["case2"], tmp_path / "elsewhere")
    (data / "manifest.json").unlink()
    env = settings_for(data, MODE="eval", ARTIFACT=str(trained / "model.ptz"))
    out = str(tmp_path / "out")
    assert tg.main([], {**env, "OUT_DIR": out}) == 0
    scores = [result_of(folder)["result"]["val_bpb"] for folder in (trained, tmp_path / "out")]
    assert scores[0] == scores[1]
    with pytest.raises(tg.InputError, match="no manifest records which"):
        tg.ByteTable.load(config_for(data))


def test_the_codec_restores_text_with_capitals(trained, roots, tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes("  The NASA \ufb01le\ue002 of McDonald\nAnd Tom\u0301S\r\n ".encode())
    env = settings_for(roots["case2"], ARTIFACT=str(trained / "model.ptz"))
    env = {name: env[name] for name in ("ARTIFACT", "DATA_PATH", "TOKENIZER_PATH")}
    assert codec.main(["compress", str(text)], env) == 0
    packed = text.with_name("text.txt.pgolf")
    copy = tmp_path / "copy.txt"
    assert codec.main(["decompress", str(packed), "-o", str(copy)], env) == 0
    assert copy.read_bytes() == text.read_bytes()


# --- what is refused ------------------------------------------------------------------------------


def shortened(root):
    """A side file without its last count."""
    counts = np.asarray(tg.read_shard(side_file(root)))
    tg.write_shard(side_file(root), counts[:-1])


def of_other_sum(root):
    """One byte more at a piece that has some."""
    counts = np.array(tg.read_shard(side_file(root)))
    counts[np.argmax(counts > 0)] += 1
    tg.write_shard(side_file(root), counts)


def of_transformed_text(root):
    """Markers counted as the three bytes they have, and no manifest's sum."""
    edit_manifest(root, lambda told: told["datasets"][0].pop("charged_bytes"))
    counts = np.array(tg.read_shard(side_file(root)))
    tokens = tg.read_shard(root / "datasets/mine" / tg.shard_name("val", 0))
    table = tg.ByteTable.from_sentencepiece(root / "tokenizers/mine_bpe.model", "case2")
    counts[np.isin(tokens, table.markers)] = 3
    tg.write_shard(side_file(root), counts)


def of_twice_the_bytes(root):
    edit_manifest(root, lambda told: told["datasets"][0].pop("charged_bytes"))
    counts = np.array(tg.read_shard(side_file(root)))
    tg.write_shard(side_file(root), 2 * counts)


def unrecorded(root):
    edit_manifest(root, lambda told: told["tokenizers"][0].pop("case_transform"))


def recorded_otherwise(root):
    edit_manifest(root, lambda told: told["tokenizers"][0].update(case_transform="lower"))


def missing(root):
    side_file(root).unlink()


def of_no_such_tokenizer(root):
    """A plain tokenizer of the same size in the place of the one with markers."""
    model = root / "tokenizers/mine_bpe.model"
    model.unlink()
    export.train_tokenizer(CORPUS, 500, model, 1 << 20)
    (root / "manifest.json").unlink()


FAULTS = {
    shortened: r"val_bytes_000000.bin: \d+ byte counts for the \d+ tokens of fineweb_val_000000",
    of_other_sum: r"val_bytes_\*.bin: \d+ bytes of text, but the manifest says \d+",
    of_transformed_text: "document starts or case markers are charged .* transformed text",
    of_twice_the_bytes: "charges 2.0.. times the bytes of the pieces' text",
    unrecorded: "mine_bpe.model: .* no manifest records which transform .* CASE_TRANSFORM",
    recorded_otherwise: "mine_bpe.model: .* no manifest records which transform",
    missing: "val_bytes_000000.bin: no such file; .*prepare.py export",
    of_no_such_tokenizer: "has a byte side file .*mine_bpe.model has none",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_would_make_a_wrong_score_is_refused(fault, mine):
    assert charges_of(config_for(mine)).sum()
    fault(mine)
    with pytest.raises(tg.InputError, match=FAULTS[fault]):
        charges_of(config_for(mine))
    verified = call("verify", mine / "datasets/mine", tokenizer=mine / "tokenizers/mine_bpe.model")
    assert verified.code != 0, verified.out


@pytest.mark.parametrize("fault", [shortened, unrecorded, missing, of_no_such_tokenizer])
def test_a_run_is_refused_before_it_trains(fault, mine, tmp_path):
    fault(mine)
    out = tmp_path / "out"
    assert tg.main([], settings_for(mine, OUT_DIR=str(out))) == tg.BAD_INPUT
    assert "step:1/" not in log_of(out)


def test_a_setting_takes_the_manifests_place(mine):
    unrecorded(mine)
    charges = charges_of(config_for(mine, CASE_TRANSFORM="case2"))
    assert charges.sum()
    bytewise = config_for(mine, CASE_TRANSFORM="caseops", TOKENIZER_PATH="byte260")
    with pytest.raises(tg.InputError, match="CASE_TRANSFORM cannot act with .*byte260"):
        tg.ByteTable.named(bytewise)


def test_a_setting_against_the_manifest_is_refused(mine):
    with pytest.raises(tg.InputError, match="CASE_TRANSFORM=caseops: the manifest says .* case2"):
        tg.ByteTable.load(config_for(mine, CASE_TRANSFORM="caseops"))


def test_the_tools_options_are_checked(roots, tmp_path):
    corpus = roots["case2"] / "docs.jsonl"
    model = roots["case2"] / "tokenizers/mine_bpe.model"
    some = dict(root=tmp_path, name="other")
    bare = call("text", corpus, tokenizer=model, **some)
    assert bare.code == tg.BAD_INPUT and "--transform says which (caseops or case2)" in bare.err
    plain = call("text", corpus, tokenizer="byte260", transform="case2", **some)
    assert plain.code == tg.BAD_INPUT and "not for byte260" in plain.err
    unknown = call("text", corpus, transform="lower", **some)
    assert unknown.code == tg.BAD_INPUT and "lower" in unknown.err


def test_a_given_tokenizer_makes_the_same_tokens(roots, tmp_path):
    root = roots["case2"]
    model = root / "tokenizers/mine_bpe.model"
    settings = dict(root=tmp_path, name="mine", tokenizer=model, val_every=10, transform="case2")
    assert call("text", root / "docs.jsonl", **settings).code == 0
    name = f"datasets/mine/{tg.shard_name(tg.CHARGES, 0)}"
    assert results(tmp_path)[name] == side_file(root).read_bytes()


def test_a_token_of_endless_white_space_is_charged_what_fits(tables):
    """Less than it stands for: a score can only get worse by it."""
    text = "The" + " " * 70_000 + "end"
    _, charges = export.charged_document(tables["case2"], text, exactly=True)
    assert charges.max() == 65_535 == export.MOST_CHARGED
