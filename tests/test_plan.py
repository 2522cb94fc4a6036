"""MODE=plan (section 12): what is counted is right, and close to what published runs took."""

import statistics

import numpy as np
import pytest
import torch
from conftest import FULL, ROOT, TINY
from helpers import NESTINGS, build, config, settings_in, short_text
from published_times import PUBLISHED, planned

import train_gpt as tg

CONFIGS = [
    pytest.param(path, marks=[pytest.mark.slow] if "cpu" in path.parts[-3] else [])
    for path in sorted((ROOT / "records").glob("track_*/*/config.env"))
]


def forward_flops(cfg, rows, length):
    """Two a multiply-accumulate: every matrix, tied head included; the causal half of attention."""
    kv = cfg.num_kv_heads * cfg.head_dim
    hidden = int(cfg.mlp_mult * cfg.model_dim)
    layer = cfg.model_dim * (2 * cfg.model_dim + 2 * kv + 2 * hidden)
    matrices = cfg.num_layers * layer + cfg.vocab_size * cfg.model_dim
    attention = cfg.num_layers * 2 * rows * length**2 * cfg.model_dim
    return 2 * rows * length * matrices, attention


def newton_schulz_flops(cfg):
    """Of one of eight processes, which takes an eighth of every stack of equal shapes."""
    kv = cfg.num_kv_heads * cfg.head_dim
    hidden = int(cfg.mlp_mult * cfg.model_dim)
    square, narrow, wide = 2 * cfg.num_layers, 2 * cfg.num_layers, 2 * cfg.num_layers
    stacks = [(square, cfg.model_dim, cfg.model_dim), (narrow, kv, cfg.model_dim)]
    stacks += [(wide // 2, cfg.model_dim, hidden)] * 2
    total = 0
    for count, short, long in stacks:
        share = -(-count // 8)
        total += share * cfg.muon_backend_steps * (4 * short**2 * long + 2 * short**3)
    return total


def test_flops_of_a_step_are_those_of_the_formula():
    cfg = config(TINY, micro_batch_tokens=0, train_batch_tokens=1024)
    _, cost = tg.plan_training(cfg)
    assert cost.tokens == 128
    products, attention = forward_flops(cfg, 4, 32)
    expected = 3 * products + 3.5 * attention + newton_schulz_flops(cfg)
    assert cost.flops == pytest.approx(expected, rel=1e-3)


def test_operations_are_counted_and_views_are_not():
    counter = tg.CostCounter()
    x = torch.empty(4, 8, device="meta")
    with counter.counting():
        y = x.t().view(8, 2, 2).unsqueeze(0)  # views
        torch.empty(5, device="meta")
        z = y + 1.0
        z.mul_(2.0)
    assert counter.cost.operations == 2
    assert counter.cost.bytes == 2 * 2 * 4 * 32
    assert counter.cost.flops == 0


def test_what_waits_for_the_backward_pass_is_counted_once():
    counter = tg.CostCounter()
    x = torch.empty(10, device="meta", requires_grad=True)
    with counter.counting():
        y = x.exp()  # keeps its outcome
        (y * y).sum()  # keeps it twice again
    assert counter.cost.kept == 40


@pytest.mark.parametrize("settings", [TINY, FULL], ids=["baseline", "everything"])
def test_longer_batches_launch_no_more_operations(settings):
    short, long = (
        tg.plan_training(config(settings, train_batch_tokens=tokens, micro_batch_tokens=0))[1]
        for tokens in (512, 4096)
    )
    assert short.operations == long.operations
    assert long.bytes > short.bytes


@pytest.mark.parametrize(
    "runs",
    [PUBLISHED[::8], pytest.param(PUBLISHED, marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def test_published_step_times_and_memory(runs):
    """The constants' errors: half below 12 %, all below 25 %; memory within 10 %."""
    rows = [planned(run) for run in runs]
    errors = {row.run.name: abs(row.error()) for row in rows}
    assert statistics.median(errors.values()) <= 0.12, errors
    assert max(errors.values()) <= 0.25, errors
    memory = {row.run.name: abs(row.memory_error()) for row in rows if row.run.mib}
    assert max(memory.values()) <= 0.10, memory


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.parent.name)
def test_every_config_has_a_plan(path, capsys, tmp_path, monkeypatch):
    """Without data, and without writing anything."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tg, "FINEWEB_TARGETS", dict.fromkeys((1024, 8192), 1_000_000))
    monkeypatch.setattr(tg, "FINEWEB_DOCUMENTS", 1000)
    env = {"MODE": "plan", "CONFIG": str(path), "DATA_PATH": "nowhere"}
    assert tg.main([], env) == tg.OK
    printed = capsys.readouterr().out
    cfg = tg.load_config(env)
    for name, stage in tg.STAGES.items():
        assert (f"\n{name}: " in printed) == bool(stage.enabled(cfg))
    assert f"model_params:{sum(p.numel() for p in tg.GPT(cfg).parameters())} " in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NESTINGS)
def test_inputs_of_a_batch_are_those_that_it_reads(name, rng, rt):
    """What a plan says beforehand is the size of the batch that it makes."""
    tokens = short_text(rng)
    _, scorer = build(rt, **NESTINGS[name])
    plan = scorer.network.plan(tokens, scorer.chunk_targets)
    for chunk in plan.chunks():
        for work in chunk.work:
            assert plan.inputs(work) == plan.batch(tokens, work).ids.size


@pytest.mark.parametrize("lengths", [[60], [60, 60, 60], [30, 60], [9]])
def test_documents_of_few_chunks_have_a_plan(lengths):
    """Also where all batches that teach have as many inputs, and where none does."""
    cfg = config(TINY, ttt_lora_rank=1, ttt_lora_chunk=20, ttt_global_docs=1)
    tokens = np.full(sum(lengths) + 1, 5, np.uint16)
    tokens[np.cumsum(lengths) - lengths] = cfg.bos_id
    total, batch = tg.plan_stage(tg.STAGES["ttt"], cfg, tokens)
    assert 0 < batch.seconds <= total.seconds < 1


@pytest.mark.parametrize(
    "text, words",
    [
        ("NUM_HEADS=7", "NUM_HEADS"),
        ("TRAIN_BATCH_TOKENS=1024", "TRAIN_SEQ_LEN"),
        ("TTT_LORA_RANK=0 TTT_LR=0.1", "cannot act"),
    ],
)
def test_settings_that_do_not_go_together_have_no_plan(text, words, capsys):
    assert tg.main([], {"MODE": "plan", **settings_in(text)}) == tg.BAD_INPUT
    assert words in capsys.readouterr().err


def test_micro_batches_that_eight_cannot_share_are_pointed_out(capsys):
    env = {"MODE": "plan", "DEFAULTS": "baseline", "VAL_TOKENS": "100000"}
    env |= {"TRAIN_BATCH_TOKENS": "65536", "MICRO_BATCH_TOKENS": "65536"}
    assert tg.main([], env) == tg.OK
    printed = capsys.readouterr().out
    assert "8 processes cannot share the 1 micro-batches" in printed
    assert "100000 validation targets" in printed


def test_a_plan_of_data_that_is_there_counts_it(tmp_path, capsys):
    tokens = np.ones(5001, np.uint16)
    tg.write_shard(tmp_path / tg.shard_name("val", 0), tokens)
    env = {"MODE": "plan", "DEFAULTS": "baseline", "DATA_PATH": str(tmp_path)}
    assert tg.main([], env) == tg.OK
    assert "5000 validation targets of" in capsys.readouterr().out


def test_adaptation_costs_what_its_steps_cost():
    """Twice the passes cost twice as much; more of the weights cost more."""

    def seconds(**settings):
        cfg = config(TINY, ttt_chunk_tokens=512, **settings)
        rt = tg.PlanRuntime(cfg)
        scorer = tg.STAGES["ttt"].build(rt.model(), rt, cfg, tg.ByteTable.bytes260())
        return tg.plan_adaptation(scorer.training, cfg, 100_000).seconds

    once = seconds(ttt_epochs=1)
    twice = seconds(ttt_epochs=2)
    part = seconds(ttt_epochs=1, ttt_freeze_blocks=1)
    assert twice == pytest.approx(2 * once)
    assert part < once
