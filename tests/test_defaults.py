"""What holds where nothing is set: the defaults, DEFAULTS=baseline, and old artifacts."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from helpers import settings_in

import train_gpt as tg

RESOLVED = json.loads(Path(__file__).with_name("resolved_settings.json").read_text())
BASELINE = "records/track_10min_16mb/2026-03-17_baseline"
PR2135 = "records/track_10min_16mb/2026-05-01_pr2135"
OLD = Path(__file__).with_name("artifact_of_2026_11.ptz")  # made by the script of commit 2ab74c4


def resolved(env):
    """All settings, as JSON has them."""
    return json.loads(json.dumps(dataclasses.asdict(tg.load_config(env))))


def folder(name):
    return {"SMOKE": "1"} if name == "SMOKE=1" else {"CONFIG": str(ROOT / name / "config.env")}


def test_every_folder_is_known():
    """But records, whose settings are those of the script beside them."""
    folders = [path.parent for path in ROOT.glob("records/*/*/config.env")]
    recipes = [path for path in folders if not (path / "train_gpt.py").exists()]
    assert {str(path.relative_to(ROOT)) for path in recipes} <= RESOLVED.keys()


@pytest.mark.parametrize("name", RESOLVED)
def test_settings_of_a_folder_are_what_they_were(name):
    """Field by field, whatever the defaults have become: resolved_settings.json is from before.

    The first is whole, the others are what they have otherwise.
    """
    expected = {**RESOLVED[BASELINE], **RESOLVED[name]}
    found = resolved(folder(name))
    assert {field: found[field] for field in expected} == expected


def test_the_defaults_are_pr2135_without_its_two_shortcuts():
    ours = resolved({})
    theirs = resolved(folder(PR2135))
    differ = {name for name in ours if ours[name] != theirs[name]}
    assert differ == {"smear_bos_mask", "ttt_lora_keep"}


def test_defaults_of_the_baseline_are_those_of_its_folder():
    packing = {"quant_clip_steps", "quant_scale_floor", "compressor", "eval_stride"}
    ours = resolved({"DEFAULTS": "baseline"})
    theirs = resolved(folder(BASELINE))
    assert {name for name in ours if ours[name] != theirs[name]} == packing


def test_the_official_baselines_own_command_is_read():
    """It trains the defaults on that data; CONFIG or DEFAULTS=baseline asks for its model."""
    env = settings_in("""
        RUN_ID=baseline_sp1024 DATA_PATH=./data/datasets/fineweb10B_sp1024/ VOCAB_SIZE=1024
        TOKENIZER_PATH=./data/tokenizers/fineweb_1024_bpe.model
    """)
    assert tg.load_config(env).num_layers == 11
    assert tg.load_config({**env, "DEFAULTS": "baseline"}).num_layers == 9


OFF = {
    "TTT_LORA_RANK=0": ["ttt_global_docs"],
    "SCHEDULE=tokens": ["gptq_reserve_seconds"],
    "GPTQ_N_SAMPLES=0": ["gptq_embed"],
    "MATRIX_CLIP_SIGMAS=0": ["attn_clip_sigmas", "mlp_clip_sigmas", "embed_clip_sigmas"],
    "LOGIT_SOFTCAP=0": ["asym_logit_rescale"],
    "UNET_SKIPS=0": ["skip_gates_enabled"],
    "SMEAR_GATE_ENABLED=0": ["smear_bos_mask"],
    "QUANT_STEP=0.01 QUANT_POLICY=": ["matrix_clip_sigmas", "attn_clip_sigmas"],
}


@pytest.mark.parametrize("text", OFF)
def test_a_default_that_cannot_act_is_off(text):
    """Who turns off a technique turns off what rests on it."""
    cfg = tg.load_config(settings_in(text))
    for name in OFF[text]:
        assert getattr(cfg, name) == tg.BASELINE[name], name


def test_the_environment_turns_off_what_rests_on_what_it_turns_off():
    """In a file, too, whose own values agree with each other."""
    cfg = tg.load_config({**folder(PR2135), "TTT_LORA_RANK": "0"})
    assert (cfg.ttt_global_docs, cfg.tilt_boost) == (0, 2.625)
    assert tg.load_config(folder(PR2135)).ttt_global_docs == 2500


def test_what_was_given_and_cannot_act_is_refused():
    with pytest.raises(tg.InputError, match="TTT_GLOBAL_DOCS=7 needs TTT_LORA_RANK"):
        tg.load_config(settings_in("TTT_LORA_RANK=0 TTT_GLOBAL_DOCS=7"))


def test_an_artifact_that_does_not_know_a_setting_was_made_without_it():
    header, _ = tg.read_header(OLD.read_bytes())
    cfg = tg.config_from(header["config"])
    unknown = {name for name in tg.BASELINE if name not in header["config"]}
    assert {"num_loops", "parallel_start_layer", "sparse_attn_gate_enabled"} <= unknown
    assert all(getattr(cfg, name) == tg.BASELINE[name] for name in unknown)
    stored = json.loads(json.dumps(dataclasses.asdict(cfg)))
    assert all(stored[name] == value for name, value in header["config"].items())


def test_an_old_artifact_scores_what_it_scored(tmp_path):
    """Its own script gave these figures, on the same invented text."""
    tg.synthetic_shards(tmp_path)
    data = dict(DATA_PATH=str(tmp_path), TOKENIZER_PATH="byte260", DEVICE="cpu")
    run = dict(MODE="eval", ARTIFACT=str(OLD), OUT_DIR=str(tmp_path))
    assert tg.main([], {**data, **run}) == tg.OK
    stages = json.loads((tmp_path / "result.json").read_text())["stages"]
    found = [stages[name]["val_loss"] for name in ("plain", "sliding")]
    np.testing.assert_allclose(found, [4.97674394, 4.97656768], atol=1e-5)
