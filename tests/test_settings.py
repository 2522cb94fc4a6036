"""Settings: precedence, complaints, and the environments that real launchers make."""

import ast
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, clean_env

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
    cfg = load(
        tmp_path,
        "# a comment\nMATRIX_LR=0.01\nSEED = 7\n\nVE_LAYERS=1,2\n",
        SEED="8",
        TIE_EMBEDDINGS="false",
    )
    assert (cfg.matrix_lr, cfg.seed, cfg.ve_layers, cfg.tie_embeddings) == (0.01, 8, (1, 2), False)
    assert tg.Hyperparameters.num_layers == 9 and tg.Hyperparameters is tg.Config


def test_smoke_is_below_file_and_environment(tmp_path):
    cfg = load(tmp_path, "MODEL_DIM=32\n", SMOKE="1", NUM_LAYERS="2", VE_LAYERS="1")
    assert (cfg.model_dim, cfg.num_layers, cfg.vocab_size) == (32, 2, 260)


def test_all_problems_at_once(tmp_path):
    text = complaint(
        tmp_path,
        "WARMDRON_ITERS=3\nNONSENSE\n",
        TIE_EMBEDDINGS="perhaps",
        NUM_LAYERS="three",
        MUON_BETA2="0.9",
        WEIGHT_DECAY="0.1",
        SEEED="1",
    )
    for part in (
        "did you mean WARMDOWN_ITERS",
        "line 2: expected NAME=value",
        "TIE_EMBEDDINGS='perhaps': expected",
        "NUM_LAYERS='three': expected a whole number",
        "MUON_BETA2",
        "here it is MUON_WD",
        "did you mean SEED",
        "7 problems; nothing was started",
    ):
        assert part in text, text


@pytest.mark.parametrize(
    "setting, part",
    [
        (dict(MODE="fly"), "expected one of train, eval, sample"),
        (dict(NUM_HEADS="7"), "MODEL_DIM=512 must be a multiple of NUM_HEADS=7"),
        (dict(NUM_KV_HEADS="3"), "NUM_KV_HEADS=3"),
        (dict(TRAIN_BATCH_TOKENS="100000"), "must be a multiple of TRAIN_SEQ_LEN=1024"),
        (dict(MICRO_BATCH_TOKENS="1000"), "multiple of MICRO_BATCH_TOKENS=1000"),
        (dict(WORLD_SIZE="3"), "possible are 1, 2, 4, 8"),
        (dict(EVAL_STRIDE="4096"), "at most EVAL_SEQ_LEN=1024"),
        (dict(TTT_LORA_RANK="4", TTT_LORA_CHUNK="2048"), "TTT_LORA_CHUNK=2048 must be at most"),
        (dict(MATRIX_LR="nan"), "finite"),
        (dict(MATRIX_LR="-1"), "0 or more"),
        (dict(ROPE_DIMS="200"), "at most the head size 64"),
        (dict(VE_LAYERS="9"), "NUM_LAYERS - 1 = 8"),
        (dict(VE_LAYERS="3,3"), "names a layer twice"),
        (dict(MLP_MULT="0.01", MODEL_DIM="64"), "leaves no unit"),
        (dict(TOKENIZER_PATH="x.json"), "expected a SentencePiece .model file or byte260"),
        (dict(QUANT_POLICY="mlp:9"), "2 to 8 bits"),
        (dict(NUM_HEADS="0"), "expected 1 or more"),
        (dict(SMEAR_BOS_MASK="1"), "needs SMEAR=1"),
        (
            dict(GPTQ_RESERVE_SECONDS="600"),
            "GPTQ_RESERVE_SECONDS=600.0 must be below MAX_WALLCLOCK_SECONDS=600.0",
        ),
        (dict(CONFIG="/no/such/file"), "no such file"),
    ],
)
def test_bad_values_are_named(setting, part, tmp_path):
    assert part in complaint(tmp_path, **setting)


def test_world_sizes_that_do_not_divide_eight():
    cfg = tg.load_config(
        dict(TRAIN_BATCH_TOKENS="786432", MICRO_BATCH_TOKENS="65536", WORLD_SIZE="6")
    )
    assert cfg.micro_batches == 12


FOREIGN = dict(
    PATH="/bin",
    HOME="/root",
    LD_LIBRARY_PATH="x",
    OMP_NUM_THREADS="1",
    NCCL_DEBUG="INFO",
    CUDA_HOME="x",
    CUDA_VISIBLE_DEVICES="",
    PYTORCH_CUDA_ALLOC_CONF="x",
    TORCHINDUCTOR_CACHE_DIR="x",
    SLURM_JOB_ID="3",
    HF_HOME="x",
    XDG_RUNTIME_DIR="x",
    GITHUB_ENV="x",
    LANG="C",
    LC_ALL="C",
    SHELL="sh",
    USER="me",
    TERM="x",
    PWD="/",
    OLDPWD="/",
    SHLVL="1",
    HOSTNAME="h",
    LOGNAME="me",
    MAIL="x",
    EDITOR="vi",
    PAGER="less",
    DISPLAY=":0",
    SSH_CONNECTION="x",
    VIRTUAL_ENV="x",
    CONDA_PREFIX="x",
    KUBERNETES_SERVICE_HOST="x",
    RUNPOD_POD_ID="x",
    NVIDIA_VISIBLE_DEVICES="all",
    MASTER_ADDR="h",
    MASTER_PORT="1",
    LOCAL_RANK="0",
    http_proxy="x",
    _="x",
    CXX="g++",
    CC="gcc",
    CI="true",
    TZ="UTC",
    MKL_NUM_THREADS="1",
    TMPDIR="/tmp",
)


def test_foreign_environment_is_left_alone():
    assert tg.load_config(FOREIGN) == tg.Config()


def test_a_real_torchrun_environment(tmp_path):
    probe = tmp_path / "probe.py"
    probe.write_text("import json, os, sys\njson.dump(dict(os.environ), open(sys.argv[1], 'w'))\n")
    out = tmp_path / "env.json"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    subprocess.run(
        [*launcher, str(probe), str(out)],
        check=True,
        env=clean_env(),
        capture_output=True,
        timeout=300,
    )
    env = json.loads(out.read_text())
    assert "TORCHELASTIC_RUN_ID" in env and env["WORLD_SIZE"] == "1"
    assert tg.load_config(env) == tg.Config()


def test_every_setting_is_read_somewhere():
    source = (ROOT / "train_gpt.py").read_text()
    after = source[source.index("class Config") :]
    after = after[after.index("@property") :]
    used = {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    used |= {
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and f'"{node.value}"' in after
    }
    assert not [name for name in map(str.lower, tg.FIELDS) if name not in used]


def test_help_names_every_setting():
    text = tg.help_text()
    assert all(f"{name}=" in text for name in tg.FIELDS)


def test_bad_settings_exit_code_and_nothing_written(tmp_path, capsys):
    assert tg.main([], dict(NUM_LAYERS="x", OUT_DIR=str(tmp_path / "out"))) == 64
    assert tg.main(["--fast"], {}) == 64
    assert tg.main(["--help"], {}) == 0
    assert "unknown argument '--fast'" in capsys.readouterr().err and not os.listdir(tmp_path)


def test_missing_data_is_named(tmp_path, capsys):
    env = dict(
        DATA_PATH="no/such/folder",
        OUT_DIR=str(tmp_path),
        TOKENIZER_PATH="byte260",
        VOCAB_SIZE="260",
    )
    assert tg.main([], env) == 64
    assert "no/such/folder: not found" in capsys.readouterr().out
    assert json.loads((tmp_path / "result.json").read_text())["exit_code"] == 64


def test_recipes_in_records_load():
    for path in sorted((ROOT / "records").rglob("config.env")):
        tg.load_config(dict(CONFIG=str(path)))
