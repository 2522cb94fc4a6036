"""Settings (section 1): precedence, complaints, and the environments that real launchers make."""

import ast
import json
import os

import pytest
from conftest import ROOT, TINY, clean_env
from helpers import settings_in, torchrun

import train_gpt as tg


def load(tmp_path, text="", **env):
    if text:
        path = tmp_path / "some.env"
        path.write_text(text)
        env["CONFIG"] = str(path)
    return tg.load_config(env)


def complaint(tmp_path, text="", **env):
    with pytest.raises(tg.ConfigError) as error:
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
    assert cfg.num_layers == 9


def test_plain_defaults_are_readable_on_the_class():
    """People's tools look for them under the old name."""
    assert tg.Hyperparameters is tg.Config
    assert tg.Hyperparameters.num_layers == 9


def test_smoke_is_below_file_and_environment(tmp_path):
    cfg = load(tmp_path, "MODEL_DIM=32\n", SMOKE="1", NUM_LAYERS="2", VE_LAYERS="1")
    assert cfg.model_dim == 32
    assert cfg.num_layers == 2
    assert cfg.vocab_size == 260


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


def test_all_problems_at_once(tmp_path):
    """Of the file and of the environment: typing errors, wrong values, older spellings."""
    wrong = "TIE_EMBEDDINGS=perhaps NUM_LAYERS=three MUON_BETA2=0.9 WEIGHT_DECAY=0.1 SEEED=1"
    text = complaint(tmp_path, "WARMDRON_ITERS=3\nNONSENSE\n", **settings_in(wrong))
    for part in PROBLEMS:
        assert part in text, text


BAD_VALUES = {
    "MODE=fly": "expected one of train, eval, sample",
    "NUM_HEADS=7": "MODEL_DIM=512 must be a multiple of NUM_HEADS=7",
    "NUM_KV_HEADS=3": "NUM_KV_HEADS=3",
    "TRAIN_BATCH_TOKENS=100000": "must be a multiple of TRAIN_SEQ_LEN=1024",
    "MICRO_BATCH_TOKENS=1000": "multiple of MICRO_BATCH_TOKENS=1000",
    "WORLD_SIZE=3": "possible are 1, 2, 4, 8",
    "EVAL_STRIDE=4096": "at most EVAL_SEQ_LEN=1024",
    "TTT_LORA_RANK=4 TTT_LORA_CHUNK=2048": "TTT_LORA_CHUNK=2048 must be at most",
    "MATRIX_LR=nan": "finite",
    "MATRIX_LR=-1": "0 or more",
    "ROPE_DIMS=200": "at most the head size 64",
    "VE_LAYERS=9": "NUM_LAYERS - 1 = 8",
    "VE_LAYERS=3,3": "names a layer twice",
    "MLP_MULT=0.01 MODEL_DIM=64": "leaves no unit",
    "TOKENIZER_PATH=x.json": "expected a SentencePiece .model file or byte260",
    "QUANT_POLICY=mlp:9": "2 to 8 bits",
    "NUM_HEADS=0": "expected 1 or more",
    "SMEAR_BOS_MASK=1": "SMEAR_BOS_MASK=1 needs SMEAR=1: as it is, it cannot act",
    "STREAM_DOCS=1": "STREAM_DOCS=1 needs EVAL_STREAM",
    "GPTQ_RESERVE_SECONDS=600": (
        "GPTQ_RESERVE_SECONDS=600.0 must be below MAX_WALLCLOCK_SECONDS=600.0"
    ),
    "CONFIG=/no/such/file": "no such file",
}


@pytest.mark.parametrize("setting", BAD_VALUES)
def test_bad_values_are_named(setting, tmp_path):
    assert BAD_VALUES[setting] in complaint(tmp_path, **settings_in(setting))


TOGETHER = {
    "chunks of no whole spans": (dict(eval_stream=24), "must be multiples of EVAL_STREAM"),
    "adapters and training": (dict(ttt_lora_rank=2, ttt_epochs=1), "goes neither with"),
    "adapters and a cache": (dict(ttt_lora_rank=2, ngram="backoff"), "goes neither with"),
    "head over too many orders": (
        dict(ngram="mix", mixer_head=True, ngram_order=9),
        "NGRAM_ORDER <= 7",
    ),
}


def problems_of(**settings):
    small = dict(TINY, ttt_chunk_tokens=64, mix_chunk_tokens=64)
    return tg.check_config(tg.Config(**small, **settings))


@pytest.mark.parametrize("case", TOGETHER)
def test_settings_that_do_not_go_together(case):
    settings, part = TOGETHER[case]
    assert any(part in problem for problem in problems_of(**settings))


def test_settings_that_go_together():
    assert problems_of(tilt=2) == []


def test_world_sizes_that_do_not_divide_eight():
    sizes = dict(TRAIN_BATCH_TOKENS="786432", MICRO_BATCH_TOKENS="65536", WORLD_SIZE="6")
    assert tg.load_config(sizes).micro_batches == 12


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
    done = torchrun(1, [probe, out], clean_env())
    assert done.returncode == 0, done.stderr
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
