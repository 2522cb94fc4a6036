"""The ablation bench: what it trains, what it goes on from, and its figures."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest
from conftest import ROOT
from helpers import log_of

import train_gpt as tg

SETTINGS = """DEFAULTS=baseline TOKENIZER_PATH=byte260 VOCAB_SIZE=260 NUM_LAYERS=2 MODEL_DIM=32
    NUM_HEADS=2 NUM_KV_HEADS=1 TRAIN_SEQ_LEN=64 TRAIN_BATCH_TOKENS=256 MICRO_BATCH_TOKENS=256
    WARMUP_STEPS=0 TOKENS=2600 WARMDOWN_ITERS=50%"""


@pytest.fixture
def ablate(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests/bench")
    import ablate

    return ablate


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tg.synthetic_shards(folder)
    return folder


@pytest.fixture
def rows(tmp_path, data):
    """A text of two rows, the second with averaged weights."""
    path = tmp_path / "rows.txt"
    lines = [f"all {line}" for line in SETTINGS.splitlines()]
    lines += [f"all DATA_PATH={data}", "base", "averaged EMA_DECAY=0.5  # of each step"]
    path.write_text("\n".join(lines))
    return path


def results_in(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_missing_is_trained(ablate, rows, tmp_path, monkeypatch, capsys):
    """Again, if its line is gone; a finished one is not trained twice."""
    monkeypatch.setattr(ablate, "run_unit", ablate.train_unit)
    results = tmp_path / "results.jsonl"
    ablate.main([str(rows), str(results), "--seeds", "1"])
    assert [unit["row"] for unit in results_in(results)] == ["base", "averaged"]
    whole = results.read_text()
    last = whole.splitlines()[-1]
    results.write_text(whole.replace(last + "\n", ""))
    capsys.readouterr()
    ablate.main([str(rows), str(results), "--seeds", "1,2"])
    told = capsys.readouterr()
    lines = told.err.splitlines()
    assert [line.split()[1:4] for line in lines if " seed " in line] == [
        ["averaged", "seed", "1:"],
        ["base", "seed", "2:"],
        ["averaged", "seed", "2:"],
    ]
    assert re.fullmatch(r"0/10 steps, loss \d\.\d+", lines[0])
    assert re.fullmatch(r"9/10 steps, loss \d\.\d+ eta:\d+s", lines[9])
    table = [line.split(" | ")[0] for line in told.out.splitlines()]
    assert table[0] == "| row"
    assert table[2:] == ["| base", "| averaged"]
    units = results_in(results)
    assert [(unit["row"], unit["seed"]) for unit in units][:2] == [("base", 1), ("averaged", 1)]
    assert units[1]["nats"] == json.loads(last)["nats"]


def test_a_training_is_that_of_the_script(ablate, rows, tmp_path, data):
    """Its last loss equals what train_gpt.py says of the same shards, in a process of its own."""
    settings = ablate.read_rows(rows)["base"]
    held = tmp_path / "held"
    held.mkdir()
    env = ablate.environment(settings, 3)
    ablate.hold_out(tg.load_config(env), held)
    env["DATA_PATH"] = str(held)
    unit = ablate.run_unit(env)
    steps = int(env["ITERATIONS"])
    assert steps == 2600 // 256
    assert env["WARMDOWN_ITERS"] == str(round(steps / 2))
    env |= {"VAL_LOSS_EVERY": env["ITERATIONS"], "OUT_DIR": str(tmp_path / "out")}
    assert tg.main([], env) == 0
    log = log_of(tmp_path / "out")
    assert f"step:{steps}/{steps} val_loss:{unit['loss']:.4f} " in log
    assert unit["tokens"] == steps * 256
    assert math.isclose(
        sum(unit["nats"]) / math.log(2) / sum(unit["bytes"]), unit["bpb"], rel_tol=1e-4
    )


def test_documents_are_held_out(ablate, rows, tmp_path, data):
    """Every 40th; together with the rest they are the text."""
    settings = ablate.read_rows(rows)["base"]
    ablate.hold_out(tg.load_config(ablate.environment(settings, 1)), tmp_path)
    whole = tg.read_shard(data / tg.shard_name("train", 0))
    train, held = (tg.read_shard(tmp_path / tg.shard_name(split, 0)) for split in ("train", "val"))
    starts = np.flatnonzero(whole == 1)
    lengths = np.diff(starts, append=len(whole))
    assert len(held) == lengths[17] + lengths[57]
    assert held[: lengths[17]].tolist() == whole[starts[17] : starts[18]].tolist()
    assert len(train) + len(held) == len(whole)


def test_a_split_made_to_tune_on_is_what_is_held_out(ablate, rows, tmp_path, data, monkeypatch):
    """Then a training sees the data as it is, and the bench holds out nothing of its own."""
    seen = []

    def run_unit(env):
        seen.append(env["DATA_PATH"])
        return {"bpb": 1.0, "seconds": 1.0, "status": "finished"}

    monkeypatch.setattr(ablate, "run_unit", run_unit)
    settings = ablate.read_rows(rows)["base"]
    for given in ({"HELD_OUT": "split"}, {"HELD_OUT": "documents"}, {}):
        ablate.train_missing({"base": settings | given}, [1], tmp_path / "r.jsonl", [])
    assert seen[0] == str(data)
    assert str(data) not in seen[1:]
    with pytest.raises(tg.InputError, match="HELD_OUT=half: expected documents or split"):
        ablate.environment(settings | {"HELD_OUT": "half"}, 1)


def test_the_interval_is_that_of_independent_documents(ablate, rng):
    """One seed, documents of equal size: 1.96 standard errors of a mean."""
    base, row = rng.normal(10, 1, 400), rng.normal(9, 1, 400)
    made = [{7: {"nats": list(nats), "bytes": [5] * 400}} for nats in (base, row)]
    gain, low, high = ablate.gain_of(*made)
    differences = (base - row) / 5 / math.log(2)
    error = differences.std() / math.sqrt(400)
    assert gain == pytest.approx(differences.mean())
    assert (gain - low, high - gain) == pytest.approx((1.96 * error, 1.96 * error), rel=0.1)


def test_seeds_that_disagree_widen_the_interval(ablate):
    """Three seeds that win 1, 2 and 3 bits a byte everywhere: it is of the seeds alone."""
    base, row = {}, {}
    for seed in (1, 2, 3):
        base[seed] = {"nats": [10.0] * 50, "bytes": [1] * 50}
        row[seed] = {"nats": [10.0 - seed * math.log(2)] * 50, "bytes": [1] * 50}
    gain, low, high = ablate.gain_of(base, row)
    assert gain == pytest.approx(2)
    assert low < 1.4
    assert high > 2.6


def made_by(script, device, row, seed=1):
    """A training as a line of results has it; older lines name no script."""
    unit = {"row": row, "seed": seed, "settings": {}, "nats": [7.0, 9.0], "bytes": [2, 3]}
    unit |= {"bpb": 1.5, "tokens": 9, "seconds": 1.0, "parameters": 5, "curve": [(0, 0.0, 2.0)]}
    unit |= {"script": script} if script else {}
    return unit | {"device": device}


def test_trainings_of_two_programs_or_devices_are_warned_of(ablate):
    rows = {"base": {}, "wide": {}}
    alike = [made_by("abc", "CPU", "base"), made_by("abc", "CPU", "wide")]
    assert "WARNING" not in ablate.table(rows, alike)
    old = [made_by("", "CPU", "base"), made_by("", "CPU", "wide")]
    assert "WARNING" not in ablate.table(rows, old)
    mixed = [alike[0], old[1], made_by("abc", "GPU", "base", 2), made_by("abc", "GPU", "wide", 2)]
    *_, script, device = ablate.table(rows, mixed).splitlines()
    assert script == "WARNING: trainings of more than one script: abc (3), unknown (1)"
    assert device == "WARNING: trainings of more than one device: CPU (2), GPU (2)"
    unused = [*alike, made_by("def", "GPU", "wide", 2)]  # the base has no such seed
    assert "WARNING" not in ablate.table(rows, unused)


def test_when_a_curve_reaches_a_loss(ablate):
    curve = [(0, 0.0, 5.0), (10, 10.0, 4.0), (20, 30.0, 3.0)]
    assert ablate.seconds_to(curve, 3.5) == pytest.approx(20.0)
    assert ablate.seconds_to(curve, 4.0) == pytest.approx(10.0)
    assert ablate.seconds_to(curve, 2.9) == math.inf
    assert ablate.seconds_to(curve, 6.0) == 0.0


REFUSED = {
    "two rows of one name": ("base\nbase NUM_LAYERS=3", "two rows are named base"),
    "no rows": ("all TOKENS=9", "no row but `all`"),
    "no setting": ("base NUM_LAYERS", "base: expected NAME=value, not NUM_LAYERS"),
    "no share": ("base TOKENS=999999 WARMDOWN_ITERS=half%", "WARMDOWN_ITERS=half%: expected a num"),
    "two places": (
        "base TOKENS=999999\nother TOKENS=999999 HELD_OUT=split",
        "HELD_OUT: not the same",
    ),
    "no budget": ("base DEFAULTS=baseline", "TOKENS is missing"),
    "a small budget": ("base TOKENS=9", "are less than a batch"),
    "no whole number": ("base TOKENS=3e6", "TOKENS=3e6: expected a whole number"),
    "a row that is refused": ("base TOKENS=999999\nwide TOKENS=999999 NUM_HEADS=7", "NUM_HEADS=7"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_so_before_training(ablate, name, tmp_path, monkeypatch):
    text, words = REFUSED[name]
    path = tmp_path / "rows.txt"
    path.write_text(text)
    monkeypatch.setattr(ablate, "run_unit", None)
    with pytest.raises(tg.InputError, match=words):
        ablate.main([str(path), str(tmp_path / "results")])


def test_other_files_are_no_results(ablate, rows):
    before = rows.read_text()
    with pytest.raises(SystemExit, match="no file of results"):
        ablate.main([str(rows), str(rows)])
    assert rows.read_text() == before


def test_two_commands_with_one_file_of_results(ablate, rows, tmp_path, monkeypatch):
    """What the other has trained meanwhile stays; a seed that is named twice is trained once."""
    results = tmp_path / "r.jsonl"
    other = json.dumps({"row": "x", "seed": 9, "settings": {}})

    def run_unit(env):
        with open(results, "a") as file:
            file.write(other + "\n")
        return {"bpb": 1.0, "seconds": 1.0, "status": "finished"}

    monkeypatch.setattr(ablate, "run_unit", run_unit)
    base = {"base": ablate.read_rows(rows)["base"]}
    ablate.train_missing(base, [1, 1], results, [])
    assert [unit["row"] for unit in results_in(results)] == ["x", "base"]


def test_too_few_documents_to_hold_one_out(ablate, rows, tmp_path):
    tg.write_shard(tmp_path / tg.shard_name("train", 0), np.array([1, 5, 1, 6]))
    cfg = tg.load_config(ablate.environment(ablate.read_rows(rows)["base"], 1))
    with pytest.raises(tg.InputError, match="2 training documents; expected 18 or more"):
        ablate.hold_out(dataclasses.replace(cfg, data_path=str(tmp_path)), tmp_path / "held")


def test_seeds_are_whole_numbers(ablate, rows, tmp_path):
    with pytest.raises(tg.InputError, match="--seeds=a: expected a whole number"):
        ablate.main([str(rows), str(tmp_path / "results"), "--seeds", "1,a"])


def test_some_rows_only(ablate, rows, tmp_path, monkeypatch, capsys):
    """The first is always among them."""
    trained = []
    monkeypatch.setattr(ablate, "train_missing", lambda rows, *more: trained.append(list(rows)))
    ablate.main([str(rows), str(tmp_path / "results"), "--only", "averaged"])
    assert trained == [["base", "averaged"]]
    with pytest.raises(SystemExit):
        ablate.main([str(rows), str(tmp_path / "results"), "--only", "avereged"])
    assert "has no row avereged" in capsys.readouterr().err
