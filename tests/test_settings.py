"""Settings (section 1): precedence, complaints, and the environments that real launchers make."""

import ast
import json
import os

import pytest
from conftest import ROOT, TINY, clean_env
from helpers import config, settings_in, torchrun_alone

import train_gpt as tg


def load(tmp_path, text="", **env):
    if text:
        path = tmp_path / "some.env"
        path.write_text(text)
        env["CONFIG"] = str(path)
    return tg.load_config(env)


def complaint(tmp_path, text="", **env):
    with pytest.raises(tg.InputError) as error:
        load(tmp_path, text, **env)
    return str(error.value)


def test_precedence(tmp_path):
    """Default, file, environment."""
    text = "# a comment\nMATRIX_LR=0.01\nSEED = 7\n\nVE_LAYERS=1,2\n"
    cfg = load(tmp_path, text, SEED="8", TIE_EMBEDDINGS="false")
    assert cfg.matrix_lr == 0.01
    assert cfg.seed == 8
    assert cfg.ve_layers == (1, 2)
    assert cfg.tie_embeddings is False
    assert cfg.num_layers == 11


def test_plain_defaults_are_readable_on_the_class():
    """People's tools look for them under the old name."""
    assert tg.Hyperparameters is tg.Config
    assert tg.Hyperparameters.num_layers == 11


def test_smoke_is_below_file_and_environment(tmp_path):
    cfg = load(tmp_path, "MODEL_DIM=32\n", SMOKE="1", NUM_LAYERS="2", VE_LAYERS="1")
    assert cfg.model_dim == 32
    assert cfg.num_layers == 2
    assert cfg.vocab_size == 260


def test_smoke_in_a_file_is_all_of_it_and_the_environment_may_take_it_back(tmp_path):
    cfg = load(tmp_path, "SMOKE=1\nMATRIX_LR=0.5\n")
    assert (cfg.smoke, cfg.vocab_size, cfg.matrix_lr) == (True, 260, 0.5)
    plain = load(tmp_path, "SMOKE=1\nMATRIX_LR=0.5\n", SMOKE="0")
    assert (plain.smoke, plain.vocab_size) == (False, tg.Config.vocab_size)


PROBLEMS = [
    "did you mean WARMDOWN_ITERS",
    "line 2: expected NAME=value",
    "TIE_EMBEDDINGS='perhaps': expected",
    "NUM_LAYERS='three': expected a whole number",
    "MUON_BETA2",
    "here it is MUON_WD",
    "did you mean SEED",
    "7 problems; nothing was started",
]


# Lines of a config.env as people write them, and the value of SAMPLE_PROMPT that they mean.
WRITTEN = {
    "SAMPLE_PROMPT=My": "My",
    "SAMPLE_PROMPT=My fellow citizens": "My fellow citizens",
    "SAMPLE_PROMPT='My # fellow'": "My # fellow",
    'SAMPLE_PROMPT="it\'s"  # a comment': "it's",
    "SAMPLE_PROMPT=My # a comment": "My",
    "SAMPLE_PROMPT=a#b": "a#b",
    "SAMPLE_PROMPT=  # a comment": "",
    "SAMPLE_PROMPT=": "",
    "  export SAMPLE_PROMPT = My\t": "My",
    "\ufeffSAMPLE_PROMPT=My": "My",
    "SAMPLE_PROMPT=a=b": "a=b",
    "SAMPLE_PROMPT=x\r\nSEED=2\r": "x",
    "SAMPLE_PROMPT=C:\\new": "C:\\new",
}


@pytest.mark.parametrize("line", WRITTEN)
def test_lines_as_people_write_them(line, tmp_path):
    assert load(tmp_path, f"{line}\nSAMPLE_TOKENS=5\n").sample_prompt == WRITTEN[line]


@pytest.mark.parametrize("line", ["SEED='7", 'SEED="7" 8', "SEED=it's", "SEED", "SEED='7'8"])
def test_lines_that_mean_nothing_are_refused_by_number(line, tmp_path):
    assert "some.env line 2: expected NAME=value" in complaint(tmp_path, f"#\n{line}\n")


def test_a_file_in_another_encoding_is_refused(tmp_path):
    for text in ("SEED=7\n".encode("utf-16"), b"SAMPLE_PROMPT=caf\xe9\n"):
        (tmp_path / "some.env").write_bytes(text)
        with pytest.raises(tg.InputError, match="some.env.*not a text file in UTF-8"):
            tg.load_config(dict(CONFIG=str(tmp_path / "some.env")))


@pytest.mark.parametrize("text", ["a\0b", "caf\udce9"])
def test_text_that_no_file_name_can_have_is_refused(text, tmp_path):
    assert f"OUT_DIR={text!r}" in complaint(tmp_path, OUT_DIR=text)


def test_all_problems_at_once(tmp_path):
    """Of the file and of the environment: typing errors, wrong values, older spellings."""
    wrong = "TIE_EMBEDDINGS=perhaps NUM_LAYERS=three MUON_BETA2=0.9 WEIGHT_DECAY=0.1 SEEED=1"
    text = complaint(tmp_path, "WARMDRON_ITERS=3\nNONSENSE\n", **settings_in(wrong))
    for part in PROBLEMS:
        assert part in text, text


BAD_VALUES = {
    "MODE=fly": "expected one of train, eval, pack, sample",
    "NUM_HEADS=7": "MODEL_DIM=512 must be a multiple of NUM_HEADS=7",
    "NUM_KV_HEADS=3": "NUM_KV_HEADS=3",
    "TRAIN_BATCH_TOKENS=100000": "must be a multiple of TRAIN_SEQ_LEN=2048",
    "MICRO_BATCH_TOKENS=1000": "multiple of MICRO_BATCH_TOKENS=1000",
    "WORLD_SIZE=3": "possible are 1, 2, 4, 8",
    "WORLD_SIZE=0": "possible are 1, 2, 4, 8",
    "WORLD_SIZE=2 GPTQ_N_SAMPLES=1": "GPTQ_N_SAMPLES=1: expected WORLD_SIZE=2 or more, or 0",
    "EVAL_STRIDE=4096": "at most EVAL_SEQ_LEN=2560",
    "TTT_LORA_CHUNK=4096": "TTT_LORA_CHUNK=4096 must be at most",
    "MATRIX_LR=nan": "finite",
    "MATRIX_LR=-1": "0 or more",
    "ROPE_DIMS=200": "at most the head size 64",
    "VE_LAYERS=11": "NUM_LAYERS - 1 = 10",
    "VE_LAYERS=3,3": "names a layer twice",
    "MLP_MULT=0.01 MODEL_DIM=64": "leaves no unit",
    "TOKENIZER_PATH=x.json": "expected a SentencePiece .model file or byte260",
    "QUANT_POLICY=mlp:9": "2 to 8 bits",
    "NUM_HEADS=0": "expected 1 or more",
    "DEFAULTS=baseline SMEAR_BOS_MASK=1": "SMEAR_BOS_MASK=1 needs SMEAR=1 or SMEAR_GATE_ENABLED",
    "STREAM_DOCS=1": "STREAM_DOCS=1 needs EVAL_STREAM",
    "GPTQ_RESERVE_SECONDS=600": (
        "GPTQ_RESERVE_SECONDS=600.0 must be below MAX_WALLCLOCK_SECONDS=600.0"
    ),
    "TTT_LORA_ON=q,x TTT_LORA_RANK=4": "expected some of q,k,v,out,up,down,attn,mlp,head",
    "TTT_LORA_ON=q,q TTT_LORA_RANK=4": "each once",
    "TTT_LORA_ON=head TTT_LORA_RANK=4 TTT_FREEZE_BLOCKS=1": "chooses among layers",
    "TILT_BOOST=1 TILT_SHARE=0.5": "expected 0.51 or more",
    "TTT_LORA_EARLY_CHUNKS=8-64 TTT_LORA_RANK=4": "expected size:until pairs",
    "TTT_LORA_EARLY_CHUNKS=8:64,4:32 TTT_LORA_RANK=4": "until rising",
    "TTT_LORA_EARLY_CHUNKS=0:64 TTT_LORA_RANK=4": "sizes from 1",
    "TILT=1 TILT_BOOST=2": "TILT and TILT_BOOST exclude each other",
    "SMOKE=1 DATA_PATH=mine": "SMOKE=1 makes its own text: DATA_PATH=mine does nothing",
    "GPTQ_RESERVE_SECONDS=0": "takes training time: GPTQ_RESERVE_SECONDS must be above 0",
    "CONFIG=/no/such/file": "no such file",
}


@pytest.mark.parametrize("setting", BAD_VALUES)
def test_bad_values_are_named(setting, tmp_path):
    assert BAD_VALUES[setting] in complaint(tmp_path, **settings_in(setting))


TOGETHER = {
    "chunks of no whole spans": (dict(eval_stream=24), "must be multiples of EVAL_STREAM"),
    "adapters and training": (dict(ttt_lora_rank=2, ttt_epochs=1), "goes neither with"),
    "adapters and a cache": (dict(ttt_lora_rank=2, ngram="backoff"), "goes neither with"),
    "a loop that ends before it begins": (dict(num_loops=1, loop_start=2, loop_end=1), "at most"),
    "a loop beyond the layers": (dict(num_loops=1, loop_end=9), "at most NUM_LAYERS - 1"),
    "lanes that begin inside the loop": (
        dict(num_loops=1, loop_start=0, loop_end=1, parallel_start_layer=1),
        "must not lie among the repeated layers 1 to 1",
    ),
    "two tables of one order": (dict(hash_orders=(3, 3)), "no two the same"),
    "lanes beyond the layers": (dict(parallel_start_layer=99), "at most NUM_LAYERS - 1"),
    "two kinds of SmearGate": (dict(smear=True, smear_gate_enabled=True), "choose one"),
    "gates wider than the model": (
        dict(smear_gate_enabled=True, gate_window=999),
        "GATE_WINDOW=999 must be at most MODEL_DIM",
    ),
    "a context schedule of no pairs": (
        dict(train_doc_mask=True, context_schedule="64"),
        "expected LENGTH:SHARE",
    ),
    "a share that is no number": (
        dict(train_doc_mask=True, context_schedule="8:0.1.2"),
        "expected LENGTH:SHARE",
    ),
    "a context that shrinks in time": (
        dict(train_doc_mask=True, context_schedule="16:0.7,8:0.1"),
        "its shares must rise",
    ),
    "fake quantization that never comes": (
        dict(min_lr=0.2, late_qat_threshold=0.1),
        "LATE_QAT_THRESHOLD=0.1 is never reached",
    ),
    "a penalty above its rates": (
        dict(min_lr=0.5, crown_q_lambda=0.1),
        "CROWN_Q_LAMBDA=0.1 never acts",
    ),
    "loops after the end": (
        dict(num_loops=1, loop_start=0, loop_end=1, enable_looping_at=1.0),
        "must be below 1",
    ),
    "a context longer than the longest": (
        dict(train_doc_mask=True, context_schedule="4096:0.5"),
        "lengths must be 1 to TRAIN_SEQ_LEN",
    ),
    "adaptation first and a hashed cache, which is neither label alone": (
        dict(ttt_epochs=1, ttt_before_scoring=True, ngram="fixed"),
        "TTT_BEFORE_SCORING=1 and NGRAM=fixed have no label together",
    ),
    "head over too many orders": (
        dict(ngram="mix", mixer_head=True, ngram_order=9),
        "NGRAM_ORDER <= 7",
    ),
}


def problems_of(**settings):
    small = dict(TINY, ttt_chunk_tokens=64, mix_chunk_tokens=64)
    return tg.check_config(config(small, **settings))


@pytest.mark.parametrize("case", TOGETHER)
def test_settings_that_do_not_go_together(case):
    settings, part = TOGETHER[case]
    assert any(part in problem for problem in problems_of(**settings))


def test_settings_that_go_together():
    assert problems_of(tilt=2) == []


def test_world_sizes_that_do_not_divide_eight():
    sizes = dict(TRAIN_BATCH_TOKENS="786432", MICRO_BATCH_TOKENS="65536", WORLD_SIZE="6")
    assert tg.load_config(sizes).micro_batches == 12


def test_a_reserve_is_below_the_clock_only_where_there_is_one():
    """An artifact is scored without the clock that its training had."""
    text = "GPTQ_N_SAMPLES=8 GPTQ_RESERVE_SECONDS=700"
    trained = tg.load_config(settings_in(f"{text} MAX_WALLCLOCK_SECONDS=900"))
    scored = dict(vars(trained), mode="eval", max_wallclock_seconds=600.0)
    assert not tg.check_config(tg.Config(**scored))


OFF_TOGETHER = [
    "GPTQ_N_SAMPLES=0 GPTQ_EMBED=0",
    "UNET_SKIPS=0 SKIP_GATES_ENABLED=0",
    "LOGIT_SOFTCAP=0 ASYM_LOGIT_RESCALE=0",
    "TTT_LORA_RANK=0 TTT_GLOBAL_DOCS=0",
]


@pytest.mark.parametrize("text", OFF_TOGETHER)
def test_what_rests_on_a_technique_may_be_turned_off_with_it(text):
    named = tg.load_config(settings_in(text))
    assert named == tg.load_config(settings_in(text.split()[0]))


def test_a_wrong_value_is_shown_as_it_was_written(tmp_path):
    text = complaint(tmp_path, "NUM_LAYERS=9\nTTT_LORA_LR=fast\n")
    assert "line 2: TTT_LORA_LR='fast': expected a number" in text


def test_calibration_needs_time_only_where_there_is_a_clock():
    for other in ("SCHEDULE=tokens", "MAX_WALLCLOCK_SECONDS=0", "GPTQ_RESERVE_SECONDS=4"):
        assert tg.load_config(settings_in(f"GPTQ_N_SAMPLES=8 {other}")).gptq_n_samples == 8


# --- published names ------------------------------------------------------------------------------


def test_published_names_are_accepted(tmp_path):
    assert set(tg.ALIASES.values()) <= set(tg.FIELDS)
    assert not set(tg.ALIASES) & set(tg.FIELDS)
    env = dict(SMEAR_GATE_ENABLED="1", SMEAR_GATE_BOS_FIX="1")
    assert tg.load_config(env).smear_bos_mask
    twice = dict(env, SMEAR_BOS_MASK="0")
    assert "SMEAR_GATE_BOS_FIX and SMEAR_BOS_MASK are one setting" in complaint(tmp_path, **twice)


# --- what is given and cannot act -----------------------------------------------------------------

# Another value than the default of each setting that needs others.
GIVEN = settings_in("""
    SEEDS=1,2 ARTIFACT=x RESUME=x SAMPLE_PROMPT=x SAMPLE_TEMPERATURE=0.5 MAX_WALLCLOCK_SECONDS=60
    TIED_EMBED_INIT_STD=0.02 BIGRAM_DIM=64 BIGRAM_HASH=linear BIGRAM_INIT=dead HASH_ROWS=99
    BIGRAM_OPTIM=scalars
    SMEAR_BEFORE_NORM=1 SMEAR_BOS_MASK=1 VE_DIM=64 EMBED_LR=0.3 HEAD_LR=0.3 TIED_EMBED_LR=0.3
    MUON_MOMENTUM_WARMUP_START=0.5 EMA_START=0.5 SWA_START=0.5 GPTQ_DAMP=0.1
    GPTQ_RESERVE_SECONDS=9 TTT_BEFORE_SCORING=1 TTT_CHUNK_TOKENS=4096 TTT_LR=0.1 TTT_OPTIMIZER=sgd
    TTT_FREEZE_BLOCKS=2 QTTT=1 BYTE_WEIGHTED_TTT=1 TTT_BATCH_SEQS=4 TTT_PARTS=2 TTT_LORA_ALPHA=8
    TTT_LORA_CHUNK=64 TTT_LORA_KEEP=1 TTT_DOCS=8 TTT_TEMPERATURE=0.9 STREAM_DOCS=1
    MIX_CHUNK_TOKENS=1024 NGRAM_DOCS=0 NGRAM_ORDER=5 NGRAM_MIN_ORDER=3 NGRAM_ALPHA=0.2
    NGRAM_ENT_BASE=0.1 NGRAM_ENT_RANGE=0.1 NGRAM_MIN_COUNT=3 NGRAM_BUCKETS=1024 NGRAM_PRIMES=3
    NGRAM_STRIDE=32 NGRAM_CHUNK_TOKENS=1024 WARMDOWN_ITERS=9 CONTEXT_SCHEDULE=64:0.5
    ENABLE_LOOPING_AT=0.5 LOOP_START=2 LOOP_END=4 SKIP_GATES_ENABLED=1 ASYM_LOGIT_RESCALE=1
    SPARSE_ATTN_GATE_SCALE=1 GATE_WINDOW=8 MIN_LR=0.1 RAW_MODEL=x QUANT_STEP=0.1 QUANT_ROW_STEPS=0
    QUANT_BITS=6 QUANT_CLIP_STEPS=1 QUANT_SCALE_FLOOR=1 MATRIX_CLIP_SIGMAS=9
    ATTN_CLIP_SIGMAS=9 MLP_CLIP_SIGMAS=9 EMBED_CLIP_SIGMAS=9 LQER_TOP_K=1 LQER_RANK=2
    LQER_FACTOR_BITS=3 LQER_ASYM_GROUP=32 GPTQ_EMBED=1 PRUNE_PCT=0.1 FIT_ARTIFACT=1 FIT_MARGIN=9
    LATE_QAT_THRESHOLD=0.1 CROWN_Q_LAMBDA=0.1 TTT_LORA_ON=q TTT_LORA_WD=2
    TTT_LORA_EARLY_CHUNKS=8:64 TTT_GLOBAL_DOCS=9 TTT_GLOBAL_LR=0.01 TILT_ORDER=9 TILT_SHARE=0.9
""")
# What makes them act, beside the first alternative that they name, and what keeps them idle.
ALSO = {"QTTT": "TTT_EPOCHS=1", "NGRAM_MIN_ORDER": "NGRAM_ORDER=7"}
ALSO |= dict.fromkeys(["QUANT_ROW_STEPS", "FIT_ARTIFACT"], "GPTQ_N_SAMPLES=1")
ALSO["TTT_GLOBAL_LR"] = "TTT_LORA_RANK=2"
ALSO["FIT_MARGIN"] = "QUANT_STEP=1 GPTQ_N_SAMPLES=1"
IDLE = {
    "ARTIFACT": "MODE=train",
    "RESUME": "MODE=eval",
    "SEEDS": "MODE=sample",
    "MAX_WALLCLOCK_SECONDS": "SCHEDULE=tokens",
    "GPTQ_RESERVE_SECONDS": "SCHEDULE=tokens",
    "TIED_EMBED_INIT_STD": "TIE_EMBEDDINGS=0",
    "TIED_EMBED_LR": "TIE_EMBEDDINGS=0",
    "MUON_MOMENTUM_WARMUP_START": "MUON_MOMENTUM_WARMUP_STEPS=0",
    "WARMDOWN_ITERS": "WARMDOWN_FRAC=0.5",
    "MIN_LR": "WARMDOWN_ITERS=0",
    "SKIP_GATES_ENABLED": "UNET_SKIPS=0",
    "ASYM_LOGIT_RESCALE": "LOGIT_SOFTCAP=0",
    "QUANT_CLIP_STEPS": "MATRIX_CLIP_SIGMAS=9",
    "QUANT_SCALE_FLOOR": "MATRIX_CLIP_SIGMAS=9",
}
# Alternatives of what is needed, each enough alone.
ENOUGH = [
    ("TIED_EMBED_LR=0.3", "TIE_EMBEDDINGS=0 HASH_ORDERS=3"),
    ("TIED_EMBED_LR=0.3", "TIE_EMBEDDINGS=0 BIGRAM_VOCAB_SIZE=512"),
    ("BIGRAM_INIT=normal", "HASH_ORDERS=3"),
    ("BIGRAM_HASH=linear", "HASH_ORDERS=3"),
    ("BIGRAM_DIM=64", "HASH_ORDERS=3"),
]
WATER_FILLED = "QUANT_BITS MATRIX_CLIP_SIGMAS PRUNE_PCT LATE_QAT_THRESHOLD CROWN_Q_LAMBDA".split()
IDLE |= dict.fromkeys(WATER_FILLED, "QUANT_STEP=1 GPTQ_N_SAMPLES=1")
NEEDY = [name for name, field in tg.FIELDS.items() if field.metadata["needs"]]


def made_to_act(name):
    """The settings that a setting says that it needs, the first where it has a choice."""
    parts = tg.FIELDS[name].metadata["needs"].split(", and ")
    terms = [part.split(" or ")[0] for part in parts]
    on = dict(VE_LAYERS="1", MIXER_HEAD="1", EVAL_STREAM="64", NGRAM="mix", TTT_FREEZE_BLOCKS="1")
    pairs = [term.partition("=") for term in terms]
    return {term: value or on.get(term, "1") for term, _, value in pairs}


@pytest.mark.parametrize("setting, enough", ENOUGH)
def test_what_acts_with_another_technique_is_accepted(setting, enough):
    cfg = tg.load_config(settings_in(f"{setting} {enough} DEFAULTS=baseline"))
    (name, value) = setting.split("=")
    assert str(getattr(cfg, name.lower())) == value


def test_no_time_is_kept_for_a_calibration_that_is_off():
    off = tg.load_config(settings_in("GPTQ_N_SAMPLES=0"))
    assert tg.Config.gptq_reserve_seconds > 0 == off.gptq_reserve_seconds
    assert tg.Clock(off, lag=0).limit == off.max_wallclock_seconds


def given_and(name, text):
    return {**settings_in(text), name: GIVEN[name]}


@pytest.mark.parametrize("name", NEEDY)
def test_what_cannot_act_is_refused_with_what_it_needs(name):
    with_mode = IDLE.get(name, "")
    values, problems = tg.read_settings(given_and(name, with_mode), tg.Config(**tg.BASELINE))
    (problem,) = problems
    needs = tg.FIELDS[name].metadata["needs"]
    assert problem.endswith(f" needs {needs}: as it is, it cannot act")
    assert problem.startswith(f"{name}=")


@pytest.mark.parametrize("name", NEEDY)
def test_what_can_act_is_accepted(name):
    env = {**settings_in(ALSO.get(name, "")), **made_to_act(name), name: GIVEN[name]}
    assert tg.read_settings(env, tg.Config(**tg.BASELINE))[1] == []


def test_the_environment_may_turn_off_what_a_file_configures(tmp_path):
    text = "DEFAULTS=baseline\nTTT_EPOCHS=1\nTTT_LR=0.1\nSMEAR=1\nSMEAR_BOS_MASK=1\n"
    cfg = load(tmp_path, text, TTT_EPOCHS="0", SMEAR="0")
    assert (cfg.ttt_epochs, cfg.ttt_lr, cfg.smear) == (0, 0.1, False)
    assert "TTT_LR=0.2 needs" in complaint(tmp_path, text, TTT_EPOCHS="0", TTT_LR="0.2")
    text = "DEFAULTS=baseline\nTTT_LR=0.1\n"
    assert "TTT_LR=0.1 needs" in complaint(tmp_path, text, TTT_EPOCHS="1")


def test_every_setting_at_its_default_is_no_complaint():
    env = {name: tg.as_typed(field.default) for name, field in tg.FIELDS.items()}
    assert tg.load_config(env) == tg.Config()


# --- names ----------------------------------------------------------------------------------------

MEANT = {
    "LEARNING_RATE": "MATRIX_LR, SCALAR_LR and TIED_EMBED_LR",
    "LR": "MATRIX_LR",
    "BATCH_SIZE": "TRAIN_BATCH_TOKENS",
    "NLAYERS": "NUM_LAYERS",
    "LAYERS": "NUM_LAYERS",
    "SEDE": "did you mean SEED",
    "num_layers": "did you mean NUM_LAYERS",
    "Num_Layers": "did you mean NUM_LAYERS",
    "ITERATOINS": "did you mean ITERATIONS",
    "TTT_BATCH_SIZE": "TTT_DOCS, of all GPUs",  # the published one is of each GPU
    "LQER_ASYM_ENABLED": "LQER_ENABLED",
    "TILT_ALPHA": "--help lists all",
    "LOOP_COUNT": "--help lists all",
    "SPARSE_GATE": "--help lists all",
}


@pytest.mark.parametrize("name", MEANT)
def test_names_that_were_meant_for_this_program(name, tmp_path):
    for said in (complaint(tmp_path, **{name: "3"}), complaint(tmp_path, f"{name}=3\n")):
        assert f"unknown setting {name}" in said
        assert MEANT[name] in said


def test_other_names_are_listed_as_ignored():
    env = dict(settings_in(FOREIGN), NUM_LAYERS="3", FANCY_FLAG="1", MY_SWITCH="0", lower="1")
    env |= dict.fromkeys(tg.ALIASES, "1")  # other names of settings mean something
    assert tg.ignored_names(env) == ["FANCY_FLAG", "MY_SWITCH"]


@pytest.mark.parametrize("setting", ["WORLD_SIZE=x", "WORLD_SIZE=-2"])
def test_what_a_launcher_sets_is_checked(setting, capsys):
    assert tg.main([], settings_in(setting)) == 64
    assert f"{setting}: expected a whole number" in capsys.readouterr().err


# Names that shells, launchers, drivers, schedulers and rented machines set.
FOREIGN = """
    PATH=/bin HOME=/root LD_LIBRARY_PATH=x OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TMPDIR=/tmp
    NCCL_DEBUG=INFO CUDA_HOME=x CUDA_VISIBLE_DEVICES= PYTORCH_CUDA_ALLOC_CONF=x
    TORCHINDUCTOR_CACHE_DIR=x NVIDIA_VISIBLE_DEVICES=all SLURM_JOB_ID=3 HF_HOME=x
    XDG_RUNTIME_DIR=x GITHUB_ENV=x LANG=C LC_ALL=C TZ=UTC SHELL=sh USER=me LOGNAME=me TERM=x
    PWD=/ OLDPWD=/ SHLVL=1 HOSTNAME=h MAIL=x EDITOR=vi PAGER=less DISPLAY=:0 SSH_CONNECTION=x
    VIRTUAL_ENV=x CONDA_PREFIX=x KUBERNETES_SERVICE_HOST=x RUNPOD_POD_ID=x MASTER_ADDR=h
    MASTER_PORT=1 LOCAL_RANK=0 http_proxy=x _=x CXX=g++ CC=gcc CI=true
"""


def test_foreign_environment_is_left_alone():
    assert tg.load_config(settings_in(FOREIGN)) == tg.Config()


PROBE = """
import json, os, sys
with open(sys.argv[1], "w") as file:
    json.dump(dict(os.environ), file)
"""


def test_a_real_torchrun_environment(tmp_path):
    probe = tmp_path / "probe.py"
    probe.write_text(PROBE)
    out = tmp_path / "env.json"
    code, said = torchrun_alone(1, [probe, out], clean_env())
    assert code == 0, said
    env = json.loads(out.read_text())
    assert "TORCHELASTIC_RUN_ID" in env
    assert env["WORLD_SIZE"] == "1"
    assert tg.load_config(env) == tg.Config()


def test_every_setting_is_read_somewhere():
    """As an attribute, or by its name in a string after the settings themselves."""
    source = (ROOT / "train_gpt.py").read_text()
    after = source[source.index("class Config") :]
    after = after[after.index("@property") :]
    used = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            used.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if f'"{node.value}"' in after:
                used.add(node.value)
    names = {name.lower() for name in tg.FIELDS}
    assert names - used == set()


def test_help_names_every_setting():
    text = tg.help_text()
    for name in tg.FIELDS:
        assert f"{name}=" in text


def test_bad_settings_exit_code_and_nothing_written(tmp_path, capsys):
    assert tg.main([], dict(NUM_LAYERS="x", OUT_DIR=str(tmp_path / "out"))) == 64
    assert tg.main(["--fast"], {}) == 64
    assert tg.main(["--help"], {}) == 0
    assert "unknown argument '--fast'" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_missing_data_is_named(tmp_path, capsys):
    env = settings_in("DATA_PATH=no/such/folder TOKENIZER_PATH=byte260 VOCAB_SIZE=260")
    assert tg.main([], dict(env, OUT_DIR=str(tmp_path))) == 64
    assert "no/such/folder: not found" in capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["exit_code"] == 64


def test_recipes_in_records_load():
    recipes = sorted((ROOT / "records").rglob("config.env"))
    assert recipes
    for path in recipes:
        tg.load_config(dict(CONFIG=str(path)))
