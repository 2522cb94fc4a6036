"""Devices (section 2): what a GPU would run, as far as tests without one can tell.

Graphs, number formats, kernels, devices that are not there.
"""

import math

import numpy as np
import oracles
import pytest
import torch
from conftest import FULL, TINY
from helpers import config, cpu_runtime, on_device_with, random_ids, take_step
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import train_gpt as tg


def counted_compiler(counters):
    """A compiler that counts graphs, one counter a function."""

    def compile_counted(function):
        counters.append(CompileCounterWithBackend("aot_eager"))
        return torch.compile(function, dynamic=False, fullgraph=True, backend=counters[-1])

    return compile_counted


# Two layers, one that pushes and one that pops; a shorter Newton-Schulz: less to trace.
SHALLOW = dict(num_layers=2, muon_backend_steps=2, ema_decay=0.9, grad_clip_norm=1.0, device="cpu")
WHOLE_STEPS = {
    "baseline": TINY | SHALLOW,
    "everything": dict(FULL | SHALLOW, ve_layers=(0, 1), xsa_last_n=1),
}


@pytest.mark.parametrize("name", WHOLE_STEPS)
def test_the_whole_step_compiles_once_without_graph_breaks(name, run_log, rng):
    """bf16 autocast, fullgraph: one graph for the model, none later.

    Newton-Schulz has one a matrix shape.
    """
    cfg = tg.Config(**WHOLE_STEPS[name])
    counters = []
    rt = tg.Runtime(cfg, {})
    rt.compile = counted_compiler(counters)
    on_device_with(rt, dtype=torch.bfloat16)
    torch._dynamo.reset()
    model = tg.build_model(cfg, rt)
    trainer = tg.Trainer(cfg, rt, run_log, model, None)

    def batch(unit):
        ids = rng.integers(0, 260, (2, 33))
        return ids[:, :-1].copy(), ids[:, 1:].copy()

    shapes = {p.shape for _, p in tg.parameter_groups(model, cfg)["matrices"]}
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            loss = take_step(trainer, batch)
        trainer.steps_done += 1
        assert [counter.frame_count for counter in counters] == [1, len(shapes)]
        assert torch.isfinite(loss)
    ids, _ = batch(0)
    assert model.hidden(torch.from_numpy(ids)).dtype == torch.bfloat16


def test_bf16_stream_stays_close_to_float32(rng):
    """Inside; logits, loss and gradients are float32."""
    model = tg.GPT(config(FULL))
    ids = random_ids(rng, 2, 32)
    targets = random_ids(rng, 2, 32)
    exact = model(ids, targets)
    model.dtype = torch.bfloat16
    assert model.hidden(ids).dtype == torch.bfloat16
    assert model.logits(ids).dtype == torch.float32
    loss = model(ids, targets)
    assert abs(loss.item() - exact.item()) < 0.02
    loss.backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def on_fake_cuda(model):
    """The model with weights that have a shape, a type and a device, and no values."""
    for name, p in list(model.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        weight = torch.empty(p.shape, dtype=torch.bfloat16, device="cuda")
        fake = torch.nn.Parameter(weight, requires_grad=False)
        model.get_submodule(owner).register_parameter(attribute, fake)
    model.dtype = torch.bfloat16
    return model


@pytest.mark.parametrize("settings", [TINY, FULL], ids=["baseline", "everything"])
def test_forward_on_fake_cuda_tensors(settings, monkeypatch):
    """All that the forward pass makes is on the device of the weights."""
    monkeypatch.setattr(tg.GPT, "reset_parameters", lambda model: None)
    with FakeTensorMode(allow_non_fake_inputs=False), torch.no_grad():
        model = on_fake_cuda(tg.GPT(tg.Config(**settings)))
        ids = torch.empty(2, 32, dtype=torch.int64, device="cuda")
        hidden = model.hidden(ids)
        logits = model.logits(ids)
        loss = model(ids, ids)
    assert {x.device.type for x in (hidden, logits, loss)} == {"cuda"}
    assert hidden.dtype == torch.bfloat16
    assert {logits.dtype, loss.dtype} == {torch.float32}
    assert logits.shape == (2, 32, 260)


def test_kernels_and_devices_that_are_not_here_are_refused():
    with pytest.raises(tg.ConfigError, match="ATTN=fa3"):
        tg.Runtime(tg.Config(device="cpu", attn="fa3"), {})
    if not torch.cuda.is_available():
        with pytest.raises(tg.ConfigError, match="DEVICE=cuda.*available: .*cpu"):
            tg.Runtime(tg.Config(device="cuda"), {})


def test_a_gpu_that_torch_cannot_use_is_not_passed_over(monkeypatch, tmp_path):
    """A driver older than the wheel: the run would burn its 600 seconds on the host."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(tg, "NVIDIA_DEVICE", tmp_path)
    with pytest.raises(tg.ConfigError, match="DEVICE=auto: .*driver.*DEVICE=cpu computes"):
        tg.Runtime(tg.Config(), {})
    assert tg.Runtime(tg.Config(device="cpu"), {}).device.type == "cpu"
    monkeypatch.setattr(tg, "NVIDIA_DEVICE", tmp_path / "none")
    assert tg.Runtime(tg.Config(), {}).device.type == "cpu"


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    ranks = {"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "2"}
    with pytest.raises(tg.ConfigError, match="LOCAL_RANK=2.*2 GPUs.*--nproc_per_node"):
        tg.Runtime(tg.Config(), ranks)


def test_attention_equals_naive_loop(rng):
    """Three query heads share a head of keys and values."""
    q = torch.from_numpy(rng.standard_normal((1, 20, 6, 8)))
    k = torch.from_numpy(rng.standard_normal((1, 20, 2, 8)))
    v = torch.from_numpy(rng.standard_normal((1, 20, 2, 8)))
    expected = oracles.attention(q[0].numpy(), k[0].numpy(), v[0].numpy())
    got = tg.sdpa_attention(q.float(), k.float(), v.float())
    np.testing.assert_allclose(got[0].numpy(), expected, atol=1e-5)


def test_attention_with_a_mask_equals_the_written_one(rng):
    """Any [B, 1, T, S] mask takes the place of the causal one."""
    q = torch.from_numpy(rng.standard_normal((2, 9, 4, 8))).float()
    k = torch.from_numpy(rng.standard_normal((2, 9, 2, 8))).float()
    mask = torch.from_numpy(rng.random((9, 9)) < 0.5) | torch.eye(9, dtype=torch.bool)
    got = tg.sdpa_attention(q, k, k, mask=mask[None, None])
    torch.testing.assert_close(got, oracles.masked_attention(q, k, k, mask), atol=1e-5, rtol=1e-4)


def test_rotary_tables_are_on_the_device_of_the_ids():
    for device in ("cpu", "meta", "cpu"):
        tables = tg.rotary_tables(12, 8, 100.0, torch.device(device))
        assert {table.device.type for table in tables} == {device}


def test_sums_over_one_process_are_what_was_put_in():
    """Reports and gradients pass through as they are, NaN too."""
    rt = cpu_runtime()
    values = rt.start_sum([1.5, torch.tensor(2.5), True, math.nan]).result()
    assert values[:3] == [1.5, 2.5, 1.0]
    assert math.isnan(values[3])
    ones = torch.ones(3)
    assert torch.equal(rt.sum_(ones), torch.ones(3))
