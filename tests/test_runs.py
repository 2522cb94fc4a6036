"""Whole runs (section 13), as users start them: in one process, in two, interrupted, damaged."""

import dataclasses
import hashlib
import json
import math
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, TINY_RUN, clean_env
from helpers import (
    config,
    in_processes,
    log_of,
    losses_of,
    python,
    resealed,
    result_of,
    run,
    run_in_processes,
    run_traced,
    settings_in,
    tiny_env,
    torchrun_alone,
)

import train_gpt as tg

WHOLE = dict(VAL_TOKENS="0", WARMDOWN_ITERS="0")  # all of the validation, at a constant rate


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder, exit code, result and log of one finished run with everything on."""
    out = tmp_path_factory.mktemp("base") / "run"
    extras = dict(SAVE_EVERY="3", VAL_LOSS_EVERY="3", SAMPLE_TOKENS="8")
    return out, *run(out, VAL_TOKENS="0", **extras)


def of_artifact(base, out, **env):
    """Settings of a mode that begins from the artifact of a run."""
    folder, *_ = base
    places = dict(ARTIFACT=folder / "model.ptz", DATA_PATH=folder / "smoke_data", OUT_DIR=out)
    common = dict(MODE="eval", TOKENIZER_PATH="byte260", DEVICE="cpu")
    return {**common, **{name: str(path) for name, path in places.items()}, **env}


# --- a finished run -------------------------------------------------------------------------------

RESULT_FIELDS = set(
    """status mode seed settings overrides config_sha256 code_sha256 versions machine
    world_size resumed data steps train_seconds train_tokens train_loss train_flops
    peak_memory_bytes sizes artifact_sha256 stages result seconds phases_began
    exit_code""".split()
)
FILES = set(
    """train.log metrics.jsonl result.json final_model.pt model.ptz checkpoint.pt
    smoke_data""".split()
)
LOG_LINES = [
    r"step:6/6 val_loss:\d+\.\d{4} val_bpb:\d+\.\d{4} train_time:\d+ms",
    r"step:1/6 train_loss:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms",
    r"Code size: \d+ bytes",
    r"Serialized model zstd: \d+ bytes",
    r"Total submission size zstd: \d+ bytes",
    r"final_zstd_sliding_exact val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8}",
    r"sample: ",
    r"exit code    0",
]


def test_end_to_end(base):
    """Files, fields of the result, scores, and what the checks say of them."""
    out, code, result, log = base
    assert code == result["exit_code"] == 0
    assert result["status"] == "finished"
    last = log.splitlines()[-1]
    assert json.loads(last.removeprefix("result_json: ")) == result
    assert set(result) == RESULT_FIELDS
    assert {path.name for path in out.iterdir()} == FILES
    assert result["sizes"]["model"] == (out / "model.ptz").stat().st_size
    assert result["sizes"]["code"] == (ROOT / "train_gpt.py").stat().st_size
    assert set(result["stages"]) == {"plain", "sliding"}
    assert result["result"]["stage"] == "sliding"
    for stage in result["stages"].values():
        for name, found in stage["audit"].items():
            if name != "plausibility":  # a tiny model's gain may be a warning
                assert found["verdict"] == "PASS", name


@pytest.mark.parametrize("pattern", LOG_LINES)
def test_lines_that_peoples_tools_read(pattern, base):
    *_, log = base
    assert re.search(pattern, log)


def test_every_second_has_a_name(base):
    _, _, result, _ = base
    seconds = dict(result["seconds"])
    totals = {name: seconds.pop(name) for name in ("wall", "train_side", "eval_side")}
    assert abs(sum(seconds.values()) - totals["wall"]) < 0.02  # of rounding


def milliseconds(log, step, kind):
    """train_time in a step's line of training or of validation."""
    found = re.search(rf"step:{step}/\d+ {kind}_loss:.* train_time:(\d+)ms", log)
    return int(found[1])


def test_validation_lines_tell_the_time_without_their_own_seconds(tmp_path, monkeypatch):
    """Neither those of reading the data, nor those of scoring."""
    read, score = tg.load_validation, tg.evaluate

    def slowly(function):
        def slow(*args):
            time.sleep(0.7)
            return function(*args)

        return slow

    monkeypatch.setattr(tg, "load_validation", slowly(read))
    monkeypatch.setattr(tg, "evaluate", slowly(score))
    _, result, log = run(tmp_path, VAL_LOSS_EVERY="3", WARMUP_STEPS="0", EVAL_STRIDE="0")
    for step in (3, 6):
        behind = milliseconds(log, step, "val") - milliseconds(log, step, "train")
        assert 0 <= behind < 500
    assert result["train_seconds"] < result["seconds"]["validate"]


def test_the_last_step_is_logged_and_others_pass_by(tmp_path, monkeypatch):
    """Of fourteen steps the first ten are lines, as ever; then what fits ten seconds."""
    passing = []
    show = tg.RunLog.show_progress

    def noted(self, line, *since_and_done):
        passing.append(line)
        show(self, line, *since_and_done)

    monkeypatch.setattr(tg.RunLog, "show_progress", noted)
    _, _, log = run(tmp_path, ITERATIONS="14")
    logged = [int(step) for step in re.findall(r"^step:(\d+)/14 train_loss", log, re.M)]
    assert logged == [*range(1, 11), 14]
    steps = [line.split("/")[0] for line in passing if line.startswith("step:")]
    assert steps == [f"step:{number}" for number in range(11, 15)]


def test_long_work_says_how_long_the_rest_takes(tmp_path, monkeypatch):
    """Training, calibrating, packing, counting and scoring, each from its own beginning."""
    passing = []

    def show(_, line, end="\n"):
        if not end:
            passing.append(line)

    monkeypatch.setattr(tg.RunLog, "_show", show)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    packing = {"GPTQ_N_SAMPLES": "4", "FIT_ARTIFACT": "1", "QUANT_STEP": "0.001"}
    run(tmp_path, ITERATIONS="12", TILT="1", NGRAM="mix", COMPRESSOR="rans", **packing)
    for work in ("step", "calibrate", "pack", "plain", "mixed", "mixed: counting n-grams"):
        lines = [line for line in passing if line.startswith(f"{work}:")]
        assert lines, work
        assert all(re.search(r" \d+% eta:\d+s$", line) for line in lines), lines
        assert lines[-1].endswith(" 100% eta:0s") or work == "pack"  # which may fit sooner


def test_lines_take_the_place_of_progress(tmp_path, monkeypatch, capsys):
    """On a terminal, every line of the log begins a line of its own."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    _, _, log = run(tmp_path, ITERATIONS="14", SAMPLE_TOKENS="4")
    seen = []
    for line in capsys.readouterr().out.split("\n"):
        seen.append(line.rpartition("\r\033[K")[2])  # what stays on the screen
    assert [line for line in seen if line.startswith("step:14/14")] != []
    missing = set(log.splitlines()) - set(seen)
    assert not [line for line in missing if line.startswith(("step:", "final_", "audit"))]


def test_warm_up_says_nothing_of_fake_quantization(tmp_path):
    """Though warm-down is longer than the run, so that rates begin low."""
    settings = dict(LATE_QAT_THRESHOLD="0.5", WARMDOWN_ITERS="60", WARMUP_STEPS="3")
    _, _, log = run(tmp_path, QUANT_BITS="6", **settings)
    assert log.count("late_qat:enabled") == 1


def test_a_compiled_run_with_the_devices_own_batches(tmp_path, monkeypatch):
    """All kinds of stages, as on a GPU: traced, and warmed up before their clocks."""
    stages = dict(EVAL_PLAIN="1", EVAL_STREAM="16", TILT="1", MIX_CHUNK_TOKENS="64")
    _, eager, _ = run(tmp_path / "eager", **stages)
    code, result, _ = run_traced(monkeypatch, tmp_path / "traced", **stages)
    assert code == 0
    assert list(result["stages"]) == ["plain", "sliding", "streaming", "mixed"]
    assert result["seconds"]["stage_warmup"] > 0
    for name, stage in eager["stages"].items():
        assert result["stages"][name]["loss"] == pytest.approx(stage["loss"], abs=1e-4)


def test_a_schedule_longer_than_the_run_is_warned_of(tmp_path):
    _, _, log = run(tmp_path / "a", WARMDOWN_ITERS="60")
    assert "WARNING: WARMDOWN_ITERS=60 is more than ITERATIONS=6" in log
    assert "rates begin at 10% of what is set" in log
    _, _, log = run(tmp_path / "b")
    assert "WARNING: WARMDOWN" not in log


def test_what_means_nothing_here_is_in_the_log(tmp_path):
    _, _, log = run(tmp_path, FANCY_FLAG="1", WANDB_PROJECT="x", HOME="/root")
    assert "names in the environment that mean nothing here: FANCY_FLAG\n" in log


def test_loss_falls(base):
    out, *_ = base
    losses = losses_of(out)
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.5


def test_same_seed_same_score_and_other_seed_another(base, tmp_path):
    _, _, first, _ = base
    _, again, _ = run(tmp_path / "a", VAL_TOKENS="0")
    assert again["result"]["val_bpb"] == first["result"]["val_bpb"]
    assert again["artifact_sha256"] == first["artifact_sha256"]
    _, other, _ = run(tmp_path / "b", VAL_TOKENS="0", SEED="5")
    assert other["result"]["val_bpb"] != again["result"]["val_bpb"]


def test_warm_up_leaves_no_trace(base, tmp_path):
    _, _, warm, _ = base
    _, cold, _ = run(tmp_path, WARMUP_STEPS="0")
    assert cold["artifact_sha256"] == warm["artifact_sha256"]


def test_prefix_scores_are_not_called_val_bpb(tmp_path):
    code, result, log = run(tmp_path)
    assert code == 0
    assert "val_bpb:" not in log.replace("val_bpb:enabled", "")
    assert "partial_bpb" in result["result"]


def test_training_opens_no_validation_file_before_the_artifact_is_written(tmp_path, monkeypatch):
    written = []
    read = tg.read_shard

    def watched(path):
        if "fineweb_val" in str(path):
            written.append((tmp_path / "model.ptz").is_file())
        return read(path)

    monkeypatch.setattr(tg, "read_shard", watched)
    code, _, _ = run(tmp_path, VAL_LOSS_EVERY="0")
    assert code == 0
    assert written
    assert all(written)


# --- other modes ----------------------------------------------------------------------------------


def test_eval_from_the_artifact_equals_eval_after_training(base, tmp_path):
    """With nothing but the artifact and the data."""
    _, _, result, _ = base
    assert tg.main([], of_artifact(base, tmp_path)) == 0
    again = result_of(tmp_path)
    assert again["status"] == "finished"
    assert again["mode"] == "eval"
    assert again["stages"].keys() == result["stages"].keys()
    for stage, record in result["stages"].items():
        assert dict(again["stages"][stage], seconds=record["seconds"]) == record


def sampled(base, out, **env):
    """Seed and text of a sample, in the log of its folder."""
    sample = dict(MODE="sample", SAMPLE_TOKENS="20", SAMPLE_PROMPT="ab")
    assert tg.main([], of_artifact(base, out, **sample, **env)) == 0
    return re.search(r"sample: seed:(\d+)\n((?:\| .*\n)+)", log_of(out)).groups()


def test_a_sample_goes_on_from_the_prompt_and_repeats_with_its_seed(base, tmp_path):
    seed, text = sampled(base, tmp_path / "a", SEED="7")
    assert seed == "7"
    assert text.startswith("| ab")
    assert len(text) > 12
    assert sampled(base, tmp_path / "b", SEED="7") == (seed, text)


def test_a_sample_draws_a_seed_unless_one_is_given(base, tmp_path):
    seeds, texts = zip(*(sampled(base, tmp_path / name) for name in "abc"))
    assert len(set(seeds)) == 3
    assert len(set(texts)) > 1
    given = tmp_path / "given.env"
    given.write_text("SEED=7\n")
    assert sampled(base, tmp_path / "d", CONFIG=str(given))[0] == "7"


@pytest.mark.parametrize("mode", ["eval", "pack", "sample"])
def test_attention_is_tried_at_the_heads_of_the_artifact(base, tmp_path, monkeypatch, mode):
    """Which a run from an artifact alone learns only when it has read it."""
    tried = []

    def choose(rt, cfg):
        tried.append((cfg.model_dim, cfg.num_heads, cfg.ttt_global_docs))
        rt.attention, rt.packed_attention = tg.sdpa_attention, tg.padded_attention

    monkeypatch.setattr(tg.Runtime, "choose_attention", choose)
    raw = dict(RAW_MODEL=str(base[0] / "final_model.pt")) if mode == "pack" else {}
    assert tg.main([], of_artifact(base, tmp_path / "out", MODE=mode, **raw)) == 0
    stored, _ = tg.unpack((base[0] / "model.ptz").read_bytes())
    assert tried == [(stored.model_dim, stored.num_heads, stored.ttt_global_docs)]


def is_refused(env, settings, exit_code):
    """In one of several processes."""
    assert tg.main([], {**settings, **env}) == exit_code


def test_a_kernel_that_is_missing_ends_every_process(base, tmp_path):
    """Attention is chosen when the artifact is known: in a group that is there already."""
    in_processes(2, tmp_path, is_refused, of_artifact(base, tmp_path / "out", ATTN="fa3"), 64)
    said = (tmp_path / "rank0_of_2.txt").read_text()
    assert "ATTN=fa3: FlashAttention 3 does not run here" in said


def test_plain_windows_are_left_out_where_something_else_is_scored(base, tmp_path):
    others = dict(EVAL_STREAM="64", EVAL_STRIDE="0", NGRAM="", TTT_EPOCHS="0", VAL_TOKENS="512")
    for plain, stages in (("0", ["streaming"]), ("1", ["plain", "streaming"])):
        out = tmp_path / plain
        assert tg.main([], of_artifact(base, out, EVAL_PLAIN=plain, **others)) == 0
        assert list(result_of(out)["stages"]) == stages
    for name, ngram in (("alone", ""), ("untrue", "backoff")):
        only = dict(others, EVAL_STREAM="0", EVAL_PLAIN="0", NGRAM=ngram)
        assert tg.main([], of_artifact(base, tmp_path / name, **only)) == 0
        assert list(result_of(tmp_path / name)["stages"]) == ["plain", "ngram"][: 1 + bool(ngram)]


def manifest_of(root, *folders, tokenizer="byte260"):
    """A data folder's manifest that knows these datasets, of one tokenizer."""
    kind = dict(kind="byte") if tokenizer == "byte260" else dict(sha256=tokenizer, model_path="x")
    datasets = [dict(name=name, tokenizer_name="t") for name in folders]
    manifest = dict(tokenizers=[dict(name="t", **kind)], datasets=datasets)
    root.mkdir(exist_ok=True)
    (root / "manifest.json").write_text(json.dumps(manifest))


def test_an_artifact_alone_finds_its_data(base, tmp_path, monkeypatch):
    """By the tokenizer's hash, through data/manifest.json, from the working folder."""
    out = base[0]
    (tmp_path / "data/datasets").mkdir(parents=True)
    (tmp_path / "data/datasets/mine").symlink_to(out / "smoke_data")
    manifest_of(tmp_path / "data", "mine")
    monkeypatch.chdir(tmp_path)
    env = dict(MODE="eval", ARTIFACT=str(out / "model.ptz"), OUT_DIR="out", DEVICE="cpu")
    assert tg.main([], env) == 0
    assert result_of("out")["result"] == dict(
        base[2]["result"], seconds=result_of("out")["result"]["seconds"]
    )


@pytest.mark.parametrize("folders", [(), ("mine", "other")])
def test_data_that_is_not_sure_is_not_chosen(folders, tmp_path, monkeypatch):
    manifest_of(tmp_path / "data", *folders)
    monkeypatch.chdir(tmp_path)
    assert tg.find_data("byte260", []) == {"tokenizer_path": "byte260"}
    assert tg.find_data("byte260", ["tokenizer_path"]) == {}


def test_the_tokenizer_is_found_by_its_hash(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tg, "SCRIPT", tmp_path / "train_gpt.py")
    root = tmp_path / "data"
    digest = hashlib.sha256(b"a model").hexdigest()
    manifest_of(root, "mine", tokenizer=digest)
    with pytest.raises(tg.InputError, match=f"{digest}.*TOKENIZER_PATH names its file"):
        tg.find_data(digest, [])
    assert tg.find_data(digest, ["tokenizer_path"]) == {"data_path": str(root / "datasets/mine")}
    (root / "x").write_bytes(b"a model")
    places = {"data_path": str(root / "datasets/mine"), "tokenizer_path": str(root / "x")}
    assert tg.find_data(digest, []) == places


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "\udcff"])
def test_a_manifest_that_cannot_be_read_is_named(text, tmp_path):
    """Its say about the tokenizer is not dropped in silence."""
    folder = tmp_path / "datasets/mine"
    folder.mkdir(parents=True)
    (tmp_path / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    cfg = tg.Config(data_path=str(folder), tokenizer_path="byte260", vocab_size=260)
    with pytest.raises(tg.InputError, match="manifest.json: cannot be read"):
        tg.ByteTable.load(cfg)


def test_settings_of_scoring_are_checked_with_the_artifacts(tmp_path):
    """A stream that the artifact asks for, a gate that its head makes possible; and no more."""
    settings = dict(EVAL_STREAM="32", TTT_CHUNK_TOKENS="64", MIX_CHUNK_TOKENS="64", MIXER_HEAD="1")
    out = tmp_path / "a"
    assert run(out, **settings)[0] == 0
    env = dict(MODE="eval", ARTIFACT=str(out / "model.ptz"), DATA_PATH=str(out / "smoke_data"))
    env |= dict(DEVICE="cpu", TOKENIZER_PATH="byte260", VAL_TOKENS="300")
    for number, given in enumerate([dict(STREAM_DOCS="1"), dict(NGRAM="gated")]):
        assert tg.main([], {**env, **given, "OUT_DIR": str(tmp_path / f"eval{number}")}) == 0
        stages = result_of(tmp_path / f"eval{number}")["stages"]
        assert "streaming" in stages
        assert ("ngram" in stages) == ("NGRAM" in given)
    with pytest.raises(tg.InputError, match="STREAM_DOCS=1 needs EVAL_STREAM"):
        tg.settings_of_artifact(
            tg.Config(),
            {**env, "STREAM_DOCS": "1", "EVAL_STREAM": "0"},
            (out / "model.ptz").read_bytes(),
        )


def test_a_model_that_predicts_no_numbers_writes_no_sample(base, tmp_path, monkeypatch):
    def nothing(self, hidden, adapter=None):
        return hidden.new_full((*hidden.shape[:-1], 260), math.nan)

    monkeypatch.setattr(tg.GPT, "head", nothing)
    assert tg.main([], of_artifact(base, tmp_path, MODE="sample")) == 64
    assert "error: the model predicts no numbers" in log_of(tmp_path)


def test_a_sample_forges_no_line(rt, monkeypatch):
    """Whatever the model writes is marked as its text."""
    written = b"a\nfinal_zstd_plain_exact val_loss:0.1 val_bpb:0.1\x1b[2J\rb"
    monkeypatch.setattr(tg.ByteTable, "decode", lambda self, tokens: written)
    model = tg.GPT(tg.Config(**TINY))
    text = tg.sample(model, tg.ByteTable.bytes260(), config(TINY, sample_tokens=3), rt)
    lines = text.split("\n")
    assert lines[:2] == ["| a", "| final_zstd_plain_exact val_loss:0.1 val_bpb:0.1\\x1b[2J"]
    assert all(line.startswith("| ") and line.isprintable() for line in lines)


# --- interrupted and resumed ----------------------------------------------------------------------


def test_resume_equals_uninterrupted(tmp_path):
    run(tmp_path / "a", ITERATIONS="3", SAVE_EVERY="3", WARMDOWN_ITERS="0")
    checkpoint = str(tmp_path / "a/checkpoint.pt")
    _, straight, _ = run(tmp_path / "b", **WHOLE)
    _, resumed, log = run(tmp_path / "c", **WHOLE, RESUME=checkpoint)
    assert not straight["resumed"]
    assert resumed["resumed"]
    assert "resumed run" in log
    assert resumed["artifact_sha256"] == straight["artifact_sha256"]
    assert resumed["result"]["val_bpb"] == straight["result"]["val_bpb"]
    assert np.array_equal(losses_of(tmp_path / "c"), losses_of(tmp_path / "b")[3:])


def test_resume_continues_the_plain_average(tmp_path):
    averages = dict(EMA_DECAY="0", SWA_EVERY="1", SWA_START="0", WARMDOWN_ITERS="0")
    run(tmp_path / "a", ITERATIONS="4", SAVE_EVERY="4", **averages)
    _, straight, _ = run(tmp_path / "b", **averages)
    checkpoint = str(tmp_path / "a/checkpoint.pt")
    _, resumed, _ = run(tmp_path / "c", RESUME=checkpoint, **averages)
    assert resumed["artifact_sha256"] == straight["artifact_sha256"]


ODD = torch.zeros(3, 3)  # a tensor that no part of the model has the shape of
NAN = float("nan")
# Where a good checkpoint is changed, to what, and what is said about it.
CHECKPOINTS = {
    "of another seed": (["seed"], 5, "made with SEED=5, here it is 1337"),
    "a step beyond the end": (["step"], 10**9, "step 1000000000 is not between 0 and ITERATIONS=6"),
    "a step before the start": (["step"], -1, "step -1 is not between"),
    "a step that is no number": (["step"], NAN, "step nan is not between"),
    "seconds that are no number": (["elapsed"], NAN, "elapsed is nan"),
    "seconds before the start": (["elapsed"], -1.0, "elapsed is -1.0"),
    "a weight of another shape": (["model", "tok_emb.weight"], ODD, "unusable.*size mismatch"),
    "no weights": (["model"], {}, "unusable.*Missing key"),
    "momentum of another shape": (
        ["optimizers", 0, "state", 0, "momentum"],
        ODD,
        "not of this model",
    ),
    "no momentum": (["optimizers", 0, "state"], {}, "state of 0 parameters, not 14"),
    "no optimizers": (["optimizers"], [], "unusable"),
    "Adam without squares": (
        ["optimizers", 1, "state", 0],
        {"step": torch.tensor(3.0), "exp_avg": ODD},
        "not of this model",
    ),
    "averages of another shape": (["averages", 0, "ema"], [ODD], "do not fit"),
    "empty averages": (["averages", 0, "ema"], [], "do not fit"),
    "no averages": (["averages"], ({}, 0), "has no EMA"),
    "averages that are none": (["averages"], None, "has no averages"),
    "another average": (["averages", 0, "other"], [], "do not fit"),
}


def refusal_of(path, out):
    """What a run says that resumes a checkpoint which it must refuse; nothing is trained."""
    code, result, log = run(out, RESUME=str(path))
    assert code == result["exit_code"] == 64
    assert not result["resumed"]
    assert "resumed run" not in log
    assert "step:" not in log
    return re.search(f"error: RESUME={path}: (.*)", log)[1]


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_bad_checkpoints_are_refused_by_name(kind, base, tmp_path):
    (*outer, last), value, message = CHECKPOINTS[kind]
    state = torch.load(base[0] / "checkpoint.pt", weights_only=True)
    part = state
    for key in outer:
        part = part[key]
    part[last] = value
    torch.save(state, tmp_path / "bad.pt")
    assert re.search(message, refusal_of(tmp_path / "bad.pt", tmp_path / "out"))


def test_what_is_no_checkpoint_is_refused(base, tmp_path):
    cut = tmp_path / "cut.pt"
    cut.write_bytes((base[0] / "checkpoint.pt").read_bytes()[:5000])
    other = tmp_path / "other.pt"
    torch.save({"step": 3}, other)
    assert "cannot be read" in refusal_of(cut, tmp_path / "a")
    assert "unusable" in refusal_of(other, tmp_path / "b")
    assert "cannot be read" in refusal_of(tmp_path / "none.pt", tmp_path / "c")


def test_a_checkpoint_of_another_model(base, tmp_path):
    good = str(base[0] / "checkpoint.pt")
    _, _, log = run(tmp_path / "out", RESUME=good, MODEL_DIM="64")
    assert "made with other values of MODEL_DIM" in log


def test_a_resumed_run_takes_new_rates(base, tmp_path):
    """What the log calls changed has changed."""
    checkpoint = str(base[0] / "checkpoint.pt")
    _, same, _ = run(tmp_path / "a", RESUME=checkpoint, ITERATIONS="8")
    _, other, log = run(tmp_path / "b", RESUME=checkpoint, ITERATIONS="8", MATRIX_LR="0.3")
    assert "changed settings: ITERATIONS, MATRIX_LR" in log
    assert same["artifact_sha256"] != other["artifact_sha256"]


@pytest.mark.parametrize("setting", ["RESUME=x.pt", "SEEDS=1,2"])
def test_settings_of_training_in_other_modes(setting, base, tmp_path, capsys):
    name, value = setting.split("=")
    assert tg.main([], of_artifact(base, tmp_path / "out", **{name: value})) == 64
    assert f"{setting} needs MODE=train" in capsys.readouterr().err


def step_of(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["step"]


def test_sigterm_leaves_a_checkpoint_that_continues(tmp_path):
    """After SIGUSR1, which asks for a checkpoint and lets the run go on."""
    out = tmp_path / "a"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train_gpt.py")],
        env=tiny_env(out, ITERATIONS="100000"),
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("step:3/"):
            process.send_signal(signal.SIGUSR1)
        if line.startswith("checkpoint: "):
            asked = step_of(out)
            process.send_signal(signal.SIGTERM)
            break
    process.stdout.read()
    assert process.wait(200) == 143
    result = result_of(out)
    assert result["status"] == "interrupted"
    assert result["exit_code"] == 143
    steps = step_of(out)
    assert 3 <= asked < steps
    resume = dict(ITERATIONS=str(steps + 2), RESUME=str(out / "checkpoint.pt"))
    code, resumed, _ = run(tmp_path / "b", **resume)
    assert code == 0
    assert resumed["steps"] == steps + 2


# --- ends -----------------------------------------------------------------------------------------


def test_divergence_stops_the_run(tmp_path):
    code, result, _ = run(tmp_path, MATRIX_LR="1e30", SCALAR_LR="1e30", ITERATIONS="50")
    assert code == 4
    assert result["status"] == "diverged"
    assert result["steps"] < 50
    assert not (tmp_path / "model.ptz").exists()


@pytest.mark.parametrize("cap", ["MAX_ARTIFACT_BYTES", "MAX_MODEL_BYTES"])
def test_over_the_cap_keeps_the_artifact(cap, tmp_path):
    code, result, log = run(tmp_path, **{cap: "1000"})
    assert code == 2
    assert (tmp_path / "model.ptz").exists()
    assert "OVER THE CAP" in log
    assert result["sizes"]["margin"] < 0


NO_TIME = dict(MAX_EVAL_SECONDS="0.0001", EVAL_BATCH_TOKENS="64", EVAL_STRIDE="1")


def test_skipped_stage_is_said_and_not_substituted(tmp_path):
    code, result, _ = run(tmp_path, **NO_TIME)
    assert code == 5
    assert result["stages"]["sliding"] == {"skipped": "MAX_EVAL_SECONDS"}
    assert "result" not in result


def test_over_the_cap_goes_before_over_time(tmp_path):
    """The size is the artifact's fault, the time may be the machine's."""
    code, result, _ = run(tmp_path, MAX_ARTIFACT_BYTES="1000", **NO_TIME)
    assert code == result["exit_code"] == 2
    assert "skipped" in result["stages"]["sliding"]


def test_clock_schedule_stops_by_itself(tmp_path):
    """On the machine's own clock, which a busy machine may stall beyond any forecast."""
    clock = dict(SCHEDULE="clock", MAX_WALLCLOCK_SECONDS="1.5", ITERATIONS="100000")
    code, result, log = run(tmp_path, **clock)
    assert "stopping_early: wallclock_cap" in log
    assert result["status"] == "wallclock_cap"
    assert (
        result["train_seconds"] > 0.5
    )  # one step of less than half of the cap is followed by more
    assert code == (5 if result["train_seconds"] > 1.5 else 0)


def fail_while_packing(monkeypatch, action):
    monkeypatch.setattr(tg, "pack_model", lambda *args: action())


def test_out_of_memory_names_the_settings(tmp_path, monkeypatch):
    fail_while_packing(monkeypatch, lambda: torch.empty(1 << 60))
    code, result, log = run(tmp_path)
    assert code == 3
    assert result["status"] == "out_of_memory"
    assert "MICRO_BATCH_TOKENS=64" in log


def test_a_bug_is_exit_code_one_and_on_record(tmp_path, monkeypatch):
    fail_while_packing(monkeypatch, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path)
    assert result_of(tmp_path)["exit_code"] == 1


# --- data that is none ----------------------------------------------------------------------------


def validation_of(folder, *shards):
    """A data folder with the training shard of synthetic text and these validation shards."""
    tg.synthetic_shards(folder)
    for number, tokens in enumerate(shards):
        tg.write_shard(folder / tg.shard_name("val", number), np.array(tokens))
    settings = {name: text for name, text in TINY_RUN.items() if name != "SMOKE"}
    model = settings_in("DEFAULTS=baseline VOCAB_SIZE=260 TOKENIZER_PATH=byte260 VE_DIM=16")
    model["SCHEDULE"] = "tokens"
    return {**settings, **model, "DATA_PATH": str(folder), "DEVICE": "cpu", "VAL_TOKENS": "0"}


BAD_VALIDATION = {
    "documents without text": ([[1] * 300], "stand for no text"),
    "one token": ([[5]], "one validation token only"),
    "a token above the vocabulary in the second shard": (
        [[1, 5, 6] * 50, [1, 300, 6] * 50],
        "fineweb_val_000001.bin: token 300, but VOCAB_SIZE=260",
    ),
}


def test_missing_validation_is_said_before_training(tmp_path):
    """Training needs none, so the artifact is made; then scoring is refused."""
    env = validation_of(tmp_path / "data")
    (tmp_path / "data" / tg.shard_name("val", 0)).unlink()
    out = tmp_path / "out"
    assert tg.main([], {**env, "VAL_LOSS_EVERY": "0", "OUT_DIR": str(out)}) == 64
    before, after = log_of(out).split("step:1/")
    assert "WARNING: no fineweb_val_*.bin in DATA_PATH: nothing will be scored" in before
    assert "no fineweb_val_*.bin in" in after
    assert (out / "model.ptz").is_file()


@pytest.mark.parametrize("kind", BAD_VALIDATION)
def test_validation_that_cannot_be_scored(kind, tmp_path):
    shards, message = BAD_VALIDATION[kind]
    env = validation_of(tmp_path / "data", *shards)
    assert tg.main([], {**env, "OUT_DIR": str(tmp_path / "out")}) == 64
    assert message in log_of(tmp_path / "out")
    assert (tmp_path / "out/model.ptz").exists()


def test_a_stream_without_document_starts_is_said(tmp_path):
    env = validation_of(tmp_path / "data", list(range(4, 260)) * 3)
    assert tg.main([], {**env, "OUT_DIR": str(tmp_path / "out")}) == 0
    assert "note: no validation token is BOS_ID=1" in log_of(tmp_path / "out")
    figures = result_of(tmp_path / "out")["stages"]["plain"]["audit"]["bytes"]
    assert (figures["verdict"], figures["segments"], figures["documents"]) == ("PASS", 1, 0)


HINTS = {
    "./data/datasets/sotu_sp1024": "python data/prepare.py demo makes it",
    "data/datasets/fineweb10B_sp8192": "python data/prepare.py fineweb --variant sp8192 fetches it",
    "data/datasets/fineweb10B_sp8192_lossless_caps_caseops_v1_reserved": (
        "python data/prepare.py fineweb --variant sp8192_caseops fetches it"
    ),
    "data/tokenizers/fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model": (
        "python data/prepare.py fineweb --variant sp8192_caseops fetches it"
    ),
    "data/tokenizers/fineweb_4096_bpe.model": (
        "python data/prepare.py fineweb --variant sp4096 fetches it"
    ),
    "some/folder": "see data/README.md",
}


@pytest.mark.parametrize("place", HINTS)
def test_missing_data_names_the_command_that_makes_it(place, tmp_path, monkeypatch):
    monkeypatch.setattr(tg, "SCRIPT", tmp_path / "train_gpt.py")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(tg.InputError, match=HINTS[place]):
        tg.find_path(place)


# --- several seeds --------------------------------------------------------------------------------


def test_several_seeds_end_with_the_highest_code(rt, tmp_path, monkeypatch, capsys):
    codes = {1: 0, 2: 5, 3: 2}
    monkeypatch.setattr(tg, "guarded_run", lambda cfg, rt: (codes[cfg.seed], {}))
    assert tg.run_seeds(tg.Config(seeds=(1, 2, 3), out_dir=str(tmp_path)), rt) == 5
    assert "exit codes by seed:{1: 0, 2: 5, 3: 2}" in capsys.readouterr().out


SWEEPS = {"SEEDS=7,7": "different", "SEEDS=-1": "different", "SEEDS=1 RESUME=x": "one run"}


@pytest.mark.parametrize("text", SWEEPS)
def test_sweeps_that_are_none(text):
    with pytest.raises(tg.InputError, match=SWEEPS[text]):
        tg.load_config(settings_in(text))


def test_seeds_print_mean_and_deviation(tmp_path, capsys):
    env = dict(OUT_DIR=str(tmp_path), DEVICE="cpu", VAL_TOKENS="0", SEEDS="1,2", EVAL_STRIDE="0")
    assert tg.main([], {**TINY_RUN, **env}) == 0
    results = [result_of(tmp_path / f"seed_{seed}") for seed in (1, 2)]
    scores = [result["result"]["val_bpb"] for result in results]
    printed = re.search(
        r"seed:\{1: 0, 2: 0\} val_bpb mean:(\S+) std:(\S+) n:2", capsys.readouterr().out
    )
    mean, deviation = map(float, printed.groups())
    assert abs(mean - np.mean(scores)) < 1e-6
    assert abs(deviation - np.std(scores, ddof=1)) < 1e-6


# --- artifacts that do not fit --------------------------------------------------------------------


def test_damaged_artifact_and_wrong_settings(base, tmp_path):
    """Cut short, missing, or asked for another model or windows longer than its own."""
    cut = tmp_path / "cut.ptz"
    cut.write_bytes((base[0] / "model.ptz").read_bytes()[:-7])
    missing = tmp_path / "none.ptz"
    cases = [dict(ARTIFACT=str(cut)), dict(ARTIFACT=str(missing))]
    cases += [dict(NUM_LAYERS="5"), dict(EVAL_STRIDE="512")]
    for case in cases:
        assert tg.main([], of_artifact(base, tmp_path / "out", **case)) == 64


def test_artifact_of_another_tokenizer(base, tmp_path):
    stored, weights = tg.unpack((base[0] / "model.ptz").read_bytes())
    foreign = tmp_path / "foreign.ptz"
    foreign.write_bytes(tg.pack(weights, stored, notes={"tokenizer": "0" * 64}))
    assert tg.main([], of_artifact(base, tmp_path / "out", ARTIFACT=str(foreign))) == 64
    assert "trained with another tokenizer" in log_of(tmp_path / "out")


def test_absurd_settings_in_an_artifact_cost_no_memory(base, tmp_path, rt):
    stored, weights = tg.unpack((base[0] / "model.ptz").read_bytes())
    sizes = dict(num_layers=200, model_dim=65536, num_heads=512, num_kv_heads=512)
    huge = tmp_path / "huge.ptz"
    huge.write_bytes(tg.pack(weights, dataclasses.replace(stored, **sizes)))
    before = rt.peak_memory()
    assert tg.main([], of_artifact(base, tmp_path / "out", ARTIFACT=str(huge))) == 64
    assert "do not fit its settings" in log_of(tmp_path / "out")
    assert rt.peak_memory() - before < 100e6


# --- packing again --------------------------------------------------------------------------------


@pytest.mark.parametrize("notes", [None, [], "x"])
def test_an_artifact_without_notes_is_packed_and_scored_again(base, tmp_path, notes):
    foreign = tmp_path / "foreign.ptz"
    foreign.write_bytes(resealed((base[0] / "model.ptz").read_bytes(), notes=notes))
    raw = str(base[0] / "final_model.pt")
    for mode in (dict(MODE="eval"), dict(MODE="pack", RAW_MODEL=raw)):
        out = tmp_path / mode["MODE"]
        assert tg.main([], of_artifact(base, out, ARTIFACT=str(foreign), **mode)) == 0


def packed_again(base, out, **env):
    """MODE=pack on a run's weights -> exit code, log, artifact."""
    code = tg.main([], of_artifact(base, out, MODE="pack", **env))
    blob = (out / "model.ptz").read_bytes() if code == 0 else b""
    return code, log_of(out), blob


def test_packing_again_as_before_gives_the_same_bytes(base, tmp_path):
    code, _, blob = packed_again(base, tmp_path / "again")
    assert code == 0
    assert blob == (base[0] / "model.ptz").read_bytes()


@pytest.mark.parametrize("alone", [False, True])
def test_packing_again_otherwise(alone, base, tmp_path):
    """Fitted to a cap, the model's alone or with the code, by every new technique.

    The log's score is that of MODE=eval.
    """
    old = (base[0] / "model.ptz").stat().st_size
    code_bytes = base[2]["sizes"]["code"]
    cap = code_bytes + int(0.7 * old)
    filled = dict(QUANT_STEP="0.01", COMPRESSOR="rans", GPTQ_N_SAMPLES="4")
    capped = dict(MAX_ARTIFACT_BYTES=str(cap))
    if alone:
        capped = dict(MAX_MODEL_BYTES=str(cap - code_bytes))
    fitted = dict(FIT_ARTIFACT="1", FIT_MARGIN="100", **capped)
    out = tmp_path / "out"
    code, log, blob = packed_again(base, out, **filled, **fitted, TRAIN_SEQ_LEN="64")
    assert code == 0
    assert 0.95 * 0.7 * old < len(blob) <= cap - code_bytes - 100
    lines = {line.split()[1]: line for line in log.splitlines() if line.startswith("pack ")}
    assert {"embed", "table", "attn", "mlp", "all"} <= lines.keys()
    exact = lines["gate"].count(lines["raw"].split()[-1])  # float32: as if raw, each role alone
    assert exact == 2
    assert f"Serialized model rans: {len(blob)} bytes" in log
    assert "bits a weight, ideal" in log

    again = tmp_path / "eval"
    artifact = dict(ARTIFACT=str(out / "model.ptz"), EVAL_PLAIN="1", **capped)
    assert tg.main([], of_artifact(base, again, **artifact)) == 0
    scored = result_of(again)["stages"]["plain"]["val_bpb"]
    assert abs(scored - float(lines["all"].split("val_bpb:")[2])) < 1e-6


def test_packing_needs_the_raw_weights(base, tmp_path):
    """Missing, damaged, or of another model: named, and nothing is written."""
    torch.save({"tok_emb.weight": torch.zeros(3, 4)}, tmp_path / "other.pt")
    (tmp_path / "damaged.pt").write_bytes(b"PK\x03\x04")
    for name in ("none.pt", "other.pt", "damaged.pt"):
        out = tmp_path / name.removesuffix(".pt")
        code, log, _ = packed_again(base, out, RAW_MODEL=str(tmp_path / name))
        assert code == 64
        assert f"RAW_MODEL='{tmp_path / name}'" in log
        assert not (out / "model.ptz").exists()


# --- processes of their own -----------------------------------------------------------------------


def test_runs_from_inside_a_record_folder(tmp_path):
    """Script and config.env copied elsewhere: the settings are found, and count as code."""
    folder = tmp_path / "records" / "track" / "mine"
    folder.mkdir(parents=True)
    (folder / "train_gpt.py").write_bytes((ROOT / "train_gpt.py").read_bytes())
    settings = {**TINY_RUN, "ITERATIONS": "2"}
    del settings["SMOKE"]
    lines = [f"{name}={value}\n" for name, value in settings.items()]
    (folder / "config.env").write_text("".join(lines))
    env = clean_env(SMOKE="1", DEVICE="cpu", OUT_DIR="out")
    done = python(["train_gpt.py"], env, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    result = result_of(folder / "out")
    assert result["steps"] == 2
    files = [folder / "train_gpt.py", folder / "config.env"]
    assert result["sizes"]["code"] == sum(path.stat().st_size for path in files)


OTHER_VERDICT = """
import os, sys
sys.path.insert(0, sys.argv[1])
import train_gpt as tg
real = tg.check_score
def check_score(*inputs):
    planted = tg.Check("planted", "seen by one process" if os.environ["RANK"] == "1" else "")
    return [*real(*inputs), planted]
tg.check_score = check_score
code = tg.main([], os.environ)
print(f"rank {os.environ['RANK']} ends with {code}")
sys.exit(code)
"""


def test_processes_agree_on_the_exit_code_after_the_results_are_written(tmp_path):
    """Under torchrun. A check fails on rank 1 alone: rank 0 writes all, and both end with 6."""
    driver = tmp_path / "driver.py"
    driver.write_text(OTHER_VERDICT)
    out = tmp_path / "run"
    code, said = torchrun_alone(2, [driver, ROOT], tiny_env(out))
    assert code == 1, said
    assert "rank 0 ends with 6" in said
    assert "rank 1 ends with 6" in said
    result = result_of(out)
    assert result["exit_code"] == 6
    assert set(result["stages"]) == {"plain", "sliding"}
    assert "exit code    6" in log_of(out)


def eval_of_two(tmp_path, **env):
    """The artifact that two processes have made, scored by one and by two -> their results."""
    paths = dict(ARTIFACT=tmp_path / "two/model.ptz", DATA_PATH=tmp_path / "two/smoke_data")
    env |= {name: str(path) for name, path in paths.items()}
    _, alone, _ = run(tmp_path / "eval1", MODE="eval", **env)
    return alone, run_in_processes(tmp_path / "eval2", 2, MODE="eval", **env)


def test_two_processes_equal_one(tmp_path):
    validation = dict(VAL_TOKENS="0", VAL_LOSS_EVERY="5", EVAL_STRIDE="48")
    settings = dict(validation, SAVE_EVERY="5", ITERATIONS="10")
    two = run_in_processes(tmp_path / "two", 2, **settings)
    _, one, _ = run(tmp_path / "one", **settings)
    ratios = losses_of(tmp_path / "one") / losses_of(tmp_path / "two")
    assert len(ratios) == 10
    assert np.abs(ratios - 1).max() < 1e-5
    # Other rounding, other codes.
    assert abs(one["result"]["val_loss"] - two["result"]["val_loss"]) < 1e-3
    alone, again = eval_of_two(tmp_path, VAL_TOKENS="0")
    assert abs(again["result"]["val_loss"] - alone["result"]["val_loss"]) < 1e-6


# Mixer head, late fake quantization, penalty, GPTQ calibration, averaging, and score-first
# adaptation under a gated cache.
TRAINED_WITH = dict(
    MIXER_HEAD="1",
    LATE_QAT_THRESHOLD="0.9",
    CROWN_Q_LAMBDA="1",
    SWA_EVERY="2",
    GPTQ_N_SAMPLES="4",
    PRUNE_PCT="0.1",
)
SCORED_WITH = dict(
    NGRAM="gated",
    NGRAM_BUCKETS="4096",
    NGRAM_CHUNK_TOKENS="128",
    TTT_EPOCHS="1",
    TTT_CHUNK_TOKENS="128",
    TTT_PARTS="2",
    TTT_BATCH_SEQS="1",
    TTT_TEMPERATURE="0.9",
    QTTT="1",
    TTT_FREEZE_BLOCKS="1",
    BYTE_WEIGHTED_TTT="1",
    EVAL_BATCH_TOKENS="256",
)


def test_adaptation_oracle_and_caches_do_not_depend_on_the_number_of_processes(tmp_path):
    two = run_in_processes(tmp_path / "two", 2, **TRAINED_WITH, **SCORED_WITH)
    _, one, log = run(tmp_path / "one", **TRAINED_WITH, **SCORED_WITH)
    ratios = losses_of(tmp_path / "one") / losses_of(tmp_path / "two")
    assert np.abs(ratios - 1).max() < 1e-4
    assert one["exit_code"] == two["exit_code"] == 0
    assert "late_qat:enabled" in log
    assert "prefilled" in log
    assert one["seconds"]["calibrate"] > 0
    assert one["result"]["stage"] == "ttt"
    cache = one["stages"]["ngram"]
    assert cache["metric"] == "unnormalised_score"
    assert cache["mass"] > 1.5
    alone, again = eval_of_two(tmp_path)
    for name in ("sliding", "ttt", "ngram"):
        assert abs(again["stages"][name]["loss"] - alone["stages"][name]["loss"]) < 1e-5, name
