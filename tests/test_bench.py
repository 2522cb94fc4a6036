"""The benches' commands: what they take and refuse, what a row of scores is, and progress."""

import importlib
import re

import numpy as np
import pytest
from conftest import ROOT, TINY
from helpers import config, randomized

import train_gpt as tg


@pytest.fixture(autouse=True)
def benches(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests/bench")


# --- the command line -----------------------------------------------------------------------------


def test_words_are_options():
    import command

    words = ["TOKENS=7", "TEXT=a=b", "TTT_LORA_LR=1", "CONFIG="]
    options = command.options_of(words, ("TOKENS", "TEXT"), "", settings=True)
    assert options == {"TOKENS": "7", "TEXT": "a=b", "TTT_LORA_LR": "1", "CONFIG": ""}


REFUSED = {
    "hashed_caches TOKEN=2000000": "TOKEN: no such name; allowed are TOKENS, TEXT$",
    "hashed_caches NGRAM=mix": "NGRAM: no such name; allowed are TOKENS, TEXT$",
    "reference_points X=1": "X: no such name; allowed are none$",
    "plan X=1": "X: no such name; allowed are none$",
    "hashed_caches 2000000": "2000000: expected NAME=value",
    "hashed_caches TOKENS=3e6": "TOKENS=3e6: expected a whole number, 1000 or more",
    "hashed_caches TOKENS=999": "TOKENS=999: expected a whole number, 1000 or more",
    "scores ROW=tilt": "ROW: no such name; allowed are ROWS, CLUSTERS, the settings of train_gpt",
    "scores ROWS=plain,tild": "ROWS: there is no row tild; there are sliding, plain, streaming, ",
    "scores CLUSTERS=speech": "CLUSTERS=speech: expected documents or speeches",
    "train_throughput LAYERS=2": "LAYERS: no such name; allowed are the settings of train_gpt.py$",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_a_bench_does_not_know_is_refused(words):
    name, *arguments = words.split()
    with pytest.raises(tg.InputError, match=REFUSED[words]):
        importlib.import_module(name).main(arguments)


@pytest.mark.parametrize("name", ["scores", "hashed_caches", "train_throughput", "entries"])
def test_help_is_the_docstring(name, capsys):
    bench = importlib.import_module(name)
    with pytest.raises(SystemExit) as ended:
        bench.main(["--help"])
    assert not ended.value.code
    assert bench.__doc__.strip() in capsys.readouterr().out


def test_what_is_refused_is_one_message(monkeypatch, capsys):
    """With the exit code of the script."""
    import command
    import hashed_caches

    monkeypatch.setattr("sys.argv", ["hashed_caches.py", "TOKENS=no"])
    with pytest.raises(SystemExit) as ended:
        command.run(hashed_caches.main)
    assert ended.value.code == tg.BAD_INPUT == 64
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_progress_says_when_the_rest_will_be_done(monkeypatch, capsys):
    import command

    seconds = iter([0.0, 2.0, 4.0, 6.0])
    monkeypatch.setattr(command.time, "perf_counter", lambda: next(seconds))
    assert list(command.followed("abc", "rows")) == ["a", "b", "c"]
    told = capsys.readouterr()
    assert told.err.splitlines() == ["1/3 rows eta:4s", "2/3 rows eta:2s", "3/3 rows eta:0s"]
    assert not told.out


# --- scores ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """Words that name the data, and two artifacts of the same weights, made for two scorings."""
    folder = tmp_path_factory.mktemp("scores")
    tg.synthetic_shards(folder)
    shape = dict(TINY, train_seq_len=64, micro_batch_tokens=128, eval_stride=0)
    weights = randomized(config(shape)).state_dict()
    mixed = dict(tilt=True, ngram="mix", eval_stream=32, mix_chunk_tokens=64)
    for name, scoring in (("plain", {}), ("mixed", mixed)):
        (folder / name).write_bytes(tg.pack(weights, config(shape, **scoring)))
    return folder, [f"DATA_PATH={folder}", "TOKENIZER_PATH=byte260", "VAL_TOKENS=600"]


def test_a_row_is_the_same_whatever_the_artifact_was_made_for(artifacts, capsys):
    import scores

    folder, data = artifacts
    found = {}
    for name in ("plain", "mixed"):
        scores.main([f"ARTIFACT={folder / name}", *data, "ROWS=plain,tilt,fixed"])
        told = capsys.readouterr()
        found[name] = re.findall(r"^(\w+) +bpb ([\d.]+) ", told.out, re.M)
        assert [line.split(" eta")[0] for line in told.err.splitlines()] == [
            "1/3 rows",
            "2/3 rows",
            "3/3 rows",
        ]
    assert found["plain"] == found["mixed"]
    assert [row for row, _ in found["plain"]] == ["plain", "tilt", "fixed"]
    assert len({bpb for _, bpb in found["plain"]}) == 3


def test_what_a_row_names_beats_the_arguments_which_beat_the_artifact(artifacts):
    import scores

    folder, data = artifacts
    options = dict(word.split("=") for word in data)
    options |= {"ARTIFACT": str(folder / "mixed"), "TOKEN_ORDER": "5", "TILT_BOOST": "3"}
    scoring, others = scores.parted(options)
    assert scoring == {"TILT_ORDER": "5", "TILT_BOOST": "3"}
    bench = scores.Bench({**others, "MODE": "eval"}, "documents")
    fixed = bench.config_of("fixed", scoring)
    assert (fixed.tilt_order, fixed.tilt_boost) == (5, 2.625)
    assert (fixed.tilt, fixed.ngram, fixed.eval_seq_len) == (False, "", 64)
    assert bench.config_of("fixed", {}).tilt_order == 16
    with pytest.raises(tg.InputError, match="TILT and TILT_BOOST exclude each other"):
        bench.config_of("tilt", scoring)


def test_only_the_demo_has_speeches(monkeypatch):
    import corpora
    import scores

    pieces = [(corpora.VALIDATING, "a"), (corpora.VALIDATING, "b"), (corpora.VALIDATING + 20, "c")]
    monkeypatch.setattr(corpora, "fetch_wheel", lambda: None)
    monkeypatch.setattr(corpora, "speeches", lambda wheel: pieces)
    assert scores.speeches(3).tolist() == [0, 0, 1]
    with pytest.raises(tg.InputError, match="4 validation documents here, .* text has 3"):
        scores.speeches(4)


def test_documents_begin_where_their_first_token_is_read():
    import scores

    tokens = np.array([1, 5, 6, 1, 7, 8, 1, 9])
    values = np.array([1, 2, 4, 8, 16, 32, 64], np.float32)
    assert scores.by_document(values, tokens, bos=1).tolist() == [7, 56, 64]


# --- entries --------------------------------------------------------------------------------------


@pytest.fixture
def entries(tmp_path):
    """Folders of entries with some seeds each; the fourth has no artifact."""
    for name, seeds in (("a", "12"), ("b", "23"), ("c", "3"), ("none", "")):
        (tmp_path / name).mkdir()
        for seed in seeds:
            (tmp_path / name / f"model_seed{seed}.ptz").touch()
    return tmp_path


WRONG = {
    "": "the following arguments are required: first, others",
    "a": "the following arguments are required: others",
    "a missing": "missing: no such folder",
    "a none": "none: no model_seed<N>.ptz",
    "a b c": "a and .*c: no seed in common",
}


@pytest.mark.parametrize("names", WRONG)
def test_entries_that_cannot_be_compared(names, entries, monkeypatch, capsys):
    import entries as bench

    monkeypatch.setattr(bench, "score", None)  # nothing is scored before
    with pytest.raises((SystemExit, tg.InputError)) as refused:
        bench.main([str(entries / name) for name in names.split()])
    assert re.search(WRONG[names], capsys.readouterr().err + str(refused.value))


def test_entries_are_compared_by_common_seeds(entries, monkeypatch, capsys):
    """Of a and b the seed 2 only: 3 bits less in each of two speeches of 4 and 8 bytes."""
    import entries as bench

    bits = {"a/2": 5, "b/2": 8}  # no other artifact is scored

    def score(path):
        seed = path.stem.removeprefix("model_seed")
        return np.full(2, bits[f"{path.parent.name}/{seed}"]), np.array([4, 8])

    monkeypatch.setattr(bench, "score", score)
    bench.main([str(entries / "a"), str(entries / "b")])
    told = capsys.readouterr()
    assert re.match(r"a is better than b by 0.5000 \[.*\] bpb, 1 seeds", told.out)
    assert told.err.splitlines()[-1] == "2/2 artifacts eta:0s"


# --- throughput -----------------------------------------------------------------------------------


def test_throughput_is_of_the_vocabulary_that_is_asked_for(monkeypatch, capsys):
    import train_throughput as bench

    monkeypatch.setattr(bench, "STEPS", 1)
    monkeypatch.setattr(bench, "UNMEASURED", 0)
    monkeypatch.setattr(bench, "matmul_rate", lambda: 1e9)
    small = "NUM_LAYERS=1 MODEL_DIM=32 NUM_HEADS=2 NUM_KV_HEADS=1 TRAIN_SEQ_LEN=64"
    small += " TRAIN_BATCH_TOKENS=128 MICRO_BATCH_TOKENS=64 VOCAB_SIZE=300 DTYPE=float32"
    bench.main(small.split())
    told = capsys.readouterr().out
    for part in ("tokens/s", "loader", "forward", "backward", "optimizer"):
        assert re.search(rf"^ *{part} .*\d", told, re.M)
