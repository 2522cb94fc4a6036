"""What a GPU would run, as far as tests without one can tell: graphs, number formats, devices."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import FULL, ROOT, TINY, clean_env, on_device_with, take_step
from torch._dynamo.testing import CompileCounterWithBackend

import train_gpt as tg


class Noise:
    """Random tokens in place of a stream."""

    def batch(self, unit):
        ids = np.random.default_rng(unit).integers(0, 260, (2, 33))
        return ids[:, :-1].copy(), ids[:, 1:].copy()


@pytest.mark.parametrize("settings", [TINY, FULL], ids=["baseline", "everything"])
def test_the_whole_step_compiles_once_without_graph_breaks(settings, run_log, rng):
    """bf16 autocast, fullgraph: one graph for the model, none later.

    Newton-Schulz has one a matrix shape.
    """
    cfg = tg.Config(**dict(settings, ema_decay=0.9, grad_clip_norm=1.0, device="cpu"))
    rt = tg.Runtime(cfg, {})
    counters = []

    def compile_counted(function):
        counters.append(CompileCounterWithBackend("aot_eager"))
        return torch.compile(function, dynamic=False, fullgraph=True, backend=counters[-1])

    rt.compile = compile_counted
    on_device_with(rt, dtype=torch.bfloat16)
    torch._dynamo.reset()
    model = tg.build_model(cfg, rt)
    trainer = tg.Trainer(cfg, rt, run_log, model, None)

    def batch(unit):
        ids = rng.integers(0, 260, (2, 33))
        return ids[:, :-1].copy(), ids[:, 1:].copy()

    shapes = {p.shape for _, p in tg.parameter_groups(model, cfg)["matrices"]}
    seen = []
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            loss = take_step(trainer, batch)
        trainer.steps_done += 1
        seen.append([counter.frame_count for counter in counters])
        assert torch.isfinite(loss)
    assert seen[0] == [1, len(shapes)] and seen[-1] == seen[0]
    assert model.hidden(torch.from_numpy(batch(0)[0])).dtype == torch.bfloat16


@pytest.mark.parametrize("bad_step, status", [(0, "interrupted"), (4, "diverged"), (5, "diverged")])
def test_a_checkpoint_waits_for_the_reports_in_flight(bad_step, status, run_log, rng):
    """Asked to stop in step 5: all five steps are in the log, and none of weights that diverged."""
    settings = dict(TINY, schedule="tokens", iterations=9, warmup_steps=0, val_loss_every=0)
    cfg = tg.Config(**dict(settings, device="cpu"))
    rt = tg.Runtime(cfg, {})
    on_device_with(rt, lag=2)
    trainer = tg.Trainer(cfg, rt, run_log, tg.build_model(cfg, rt), None)

    step = trainer.step

    def watched(batch_of, steps_left):
        trainer.requests.stop = trainer.steps_done == 2  # is noticed two steps later
        loss = step(batch_of, steps_left)
        return loss * math.nan if trainer.steps_done + 1 == bad_step else loss

    trainer.step = watched
    trainer.stream = Noise()
    assert tg.train(trainer, lambda step: None) == status
    assert (run_log.out_dir / "checkpoint.pt").exists() == (status == "interrupted")
    told = [json.loads(line) for line in (run_log.out_dir / "metrics.jsonl").open()]
    assert [row["step"] for row in told if "train_loss" in row] == [1, 2, 3, 4, 5]


def test_bf16_stream_stays_close_to_float32(rng):
    model = tg.GPT(tg.Config(**FULL))
    ids, targets = (torch.from_numpy(rng.integers(0, 260, (2, 32))) for _ in range(2))
    exact = model(ids, targets)
    model.dtype = torch.bfloat16
    assert model.hidden(ids).dtype == torch.bfloat16 and model.logits(ids).dtype == torch.float32
    assert abs(model(ids, targets).item() - exact.item()) < 0.02
    model(ids, targets).backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


FAKE = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
import train_gpt as tg
cfg = tg.Config(**eval(sys.argv[2]))
with FakeTensorMode(allow_non_fake_inputs=False), torch.no_grad():
    tg.GPT.reset_parameters = lambda self: None
    model = tg.GPT(cfg)
    for name, p in list(model.named_parameters()):
        owner = model.get_submodule(name.rpartition(".")[0]) if "." in name else model
        weight = torch.empty(p.shape, dtype=torch.bfloat16, device="cuda")
        fake = torch.nn.Parameter(weight, requires_grad=False)
        owner._parameters[name.rpartition(".")[2]] = fake
    model.dtype = torch.bfloat16
    ids = torch.empty(2, 32, dtype=torch.int64, device="cuda")
    hidden, logits, loss = model.hidden(ids), model.logits(ids), model(ids, ids)
    assert hidden.device.type == logits.device.type == loss.device.type == "cuda"
    assert hidden.dtype == torch.bfloat16 and logits.dtype == loss.dtype == torch.float32
    assert tuple(logits.shape) == (2, 32, 260)
print("ok")
"""


@pytest.mark.parametrize("settings", [TINY, FULL], ids=["baseline", "everything"])
def test_forward_on_fake_cuda_tensors(settings):
    done = subprocess.run(
        [sys.executable, "-c", FAKE, str(ROOT), repr(settings)],
        capture_output=True,
        text=True,
        env=clean_env(),
        timeout=300,
        check=False,
    )
    assert done.stdout.strip() == "ok", done.stderr


def test_kernels_and_devices_that_are_not_here_are_refused(monkeypatch):
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
    with pytest.raises(tg.ConfigError, match="LOCAL_RANK=2.*2 GPUs.*--nproc_per_node"):
        tg.Runtime(tg.Config(), {"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "2"})


def test_a_late_report_is_read_by_all_and_stops_in_time(run_log, rng):
    """With a GPU's lag, stop and divergence are noticed so many steps later; nothing is lost."""
    settings = dict(TINY, schedule="tokens", iterations=5, warmup_steps=0, val_loss_every=0)
    cfg = tg.Config(**dict(settings, device="cpu"))
    rt = tg.Runtime(cfg, {})
    on_device_with(rt, lag=2)

    trainer = tg.Trainer(cfg, rt, run_log, tg.build_model(cfg, rt), Noise())
    assert tg.train(trainer, lambda step: None) == "finished"
    assert trainer.steps_done == trainer.clock.last.step == 5
    assert (run_log.out_dir / "metrics.jsonl").read_text().count("train_loss") == 5
