"""Devices (section 2): what a GPU would run, as far as tests without one can tell.

Graphs, number formats, kernels, devices that are not there.
"""

import itertools
import math
import re
import sys
import tempfile
import types

import numpy as np
import oracles
import pytest
import torch
from conftest import FULL, ROOT, TINY, clean_env
from helpers import (
    PUBLISHED,
    Noise,
    compiled,
    config,
    counted_compiler,
    cpu_runtime,
    in_processes,
    losses_of,
    on_device_with,
    published,
    random_ids,
    run,
    take_step,
    torchrun_alone,
)
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode

import train_gpt as tg

# Two layers, one that pushes and one that pops; a shorter Newton-Schulz: less to trace.
SHALLOW = dict(num_layers=2, muon_backend_steps=2, device="cpu")
WHOLE_STEPS = {name: published(name) | SHALLOW for name in PUBLISHED}
WHOLE_STEPS["everything"] = dict(
    FULL | SHALLOW, ve_layers=(0, 1), xsa_last_n=1, ema_decay=0.9, grad_clip_norm=1.0
)
ON_REQUEST = ("pr489", "pr740_v1", "pr740_v2", "pr834")  # less than is in pr859


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in ON_REQUEST else [])
        for name in WHOLE_STEPS
    ],
)
def test_the_whole_step_compiles_once_without_graph_breaks(name, run_log):
    """bf16 autocast, fullgraph: one graph for the model forward and backward, none later.

    Newton-Schulz has one a matrix shape.
    """
    cfg = tg.Config(**WHOLE_STEPS[name] | dict(late_qat_threshold=0.0))  # which has another graph
    counters = []
    rt = tg.Runtime(cfg, {})
    rt.compile = counted_compiler(counters)
    on_device_with(rt, dtype=torch.bfloat16)
    torch._dynamo.reset()
    model = tg.build_model(cfg, rt)
    trainer = tg.Trainer(cfg, rt, run_log, model, None)

    noise = Noise()
    shapes = {p.shape for _, p in tg.parameter_groups(model, cfg)["matrices"]}
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            loss = take_step(trainer, noise.batch)
        trainer.steps_done += 1
        assert [counter.frame_count for counter in counters] == [1, len(shapes)]
        assert torch.isfinite(loss)
    ids, _ = noise.batch(0)
    assert model.hidden(torch.from_numpy(ids)).dtype == torch.bfloat16


def one_layer():
    return tg.GPT(config(TINY, num_layers=1, model_dim=16, num_heads=2, num_kv_heads=1))


def test_rotary_angles_are_read_in_the_graphs(rng):
    """Forward and backward: no sine, cosine or power is worked out."""
    graphs = []

    def note(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return make_boxed_func(graph.forward)

    model, ids = one_layer(), random_ids(rng, 2, 16)
    context = model.context(ids)
    backend = aot_autograd(fw_compiler=note, bw_compiler=note)
    torch._dynamo.reset()
    step = torch.compile(model, dynamic=False, fullgraph=True, backend=backend)
    step(ids, ids, None, context).backward()
    assert len(graphs) == 2
    assert "aten.mm.default" in graphs[0] & graphs[1]
    names = " ".join(graphs[0] | graphs[1])
    assert not re.search(r"aten\.(sin|cos|pow\.Scalar)", names)
    torch._dynamo.reset()
    step(ids, ids).backward()  # which makes the tables inside
    assert any("aten.cos" in name for name in graphs[2])


@pytest.mark.slow
def test_rotary_angles_are_read_in_the_generated_code(rng):
    model, ids = one_layer(), random_ids(rng, 2, 16)
    context = model.context(ids)
    step = torch.compile(model, dynamic=False, fullgraph=True)
    torch._dynamo.reset()
    with fresh_cache():
        _, sources = run_and_get_code(lambda: step(ids, ids, None, context).backward())
    assert len(sources) == 2
    assert not re.search(r"\b(sin|cos|pow)_?\(", "\n".join(sources))


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
    with pytest.raises(tg.InputError, match="ATTN=fa3"):
        tg.Runtime(tg.Config(device="cpu", attn="fa3"), {})
    if not torch.cuda.is_available():
        with pytest.raises(tg.InputError, match="DEVICE=cuda.*available: .*cpu"):
            tg.Runtime(tg.Config(device="cuda"), {})


def test_a_gpu_that_torch_cannot_use_is_not_passed_over(monkeypatch, tmp_path):
    """A driver older than the wheel: the run would burn its 600 seconds on the host."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(tg, "NVIDIA_DEVICE", tmp_path)
    with pytest.raises(tg.InputError, match="DEVICE=auto: .*driver.*DEVICE=cpu computes"):
        tg.Runtime(tg.Config(), {})
    assert tg.Runtime(tg.Config(device="cpu"), {}).device.type == "cpu"
    monkeypatch.setattr(tg, "NVIDIA_DEVICE", tmp_path / "none")
    assert tg.Runtime(tg.Config(), {}).device.type == "cpu"


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    ranks = {"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "2"}
    with pytest.raises(tg.InputError, match="LOCAL_RANK=2.*2 GPUs.*--nproc_per_node"):
        tg.Runtime(tg.Config(), ranks)


# Processors, processes on the machine -> threads of each.
THREADS = [(200, 8, 16), (64, 8, 8), (16, 1, 16), (4, 8, 1)]


@pytest.mark.parametrize("processors, processes, threads", THREADS)
def test_processes_of_gpus_share_the_processors(processors, processes, threads, monkeypatch):
    """torchrun gives each one thread, and packing would take as long as that."""
    found = []
    monkeypatch.setattr(tg, "PROCESSORS", processors)
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    monkeypatch.setattr(torch.cuda, "set_device", id)  # which does nothing
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", id)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", id)
    rt = cpu_runtime()
    rt.cuda, rt.local_world = True, processes
    rt._prepare_device()
    assert found == [threads]


BACKENDS = [tg.sdpa_attention, tg.blocked_attention]


def heads_of(rng, length):
    """Queries of six heads, keys and values of two, for one row [1, T, H, 8]."""
    return (torch.from_numpy(rng.standard_normal((1, length, heads, 8))) for heads in (6, 2, 2))


@pytest.mark.parametrize("attend", BACKENDS)
@pytest.mark.parametrize("length", [1, 20, tg.ATTENTION_BLOCK, 3 * tg.ATTENTION_BLOCK + 5])
def test_attention_equals_naive_loop(attend, length, rng):
    """Three query heads share a head of keys and values."""
    q, k, v = heads_of(rng, length)
    expected = oracles.attention(q[0].numpy(), k[0].numpy(), v[0].numpy())
    got = attend(q.float(), k.float(), v.float())
    np.testing.assert_allclose(got[0].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("length, dim", [(70, 8), (1100, 4), (40, 80)])
def test_attention_in_blocks_has_the_gradients_of_torchs(length, dim, rng):
    """Compiled, too; long rows and large heads are left to torch."""
    shapes = [(2, length, 4, dim), (2, length, 2, dim), (2, length, 2, dim), (2, length, 4, dim)]
    *inputs, weights = (torch.from_numpy(rng.standard_normal(shape)) for shape in shapes)
    found = []
    for attend in (compiled(tg.blocked_attention), *BACKENDS):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = attend(*leaves)
        found.append([out, *torch.autograd.grad((out * weights).sum(), leaves)])
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, atol=1e-5, rtol=1e-4)


def test_the_attention_of_a_cpu_is_chosen_by_what_is_faster():
    for settings, chosen in (
        ({"compile": "1"}, tg.blocked_attention),
        ({"compile": "0"}, tg.sdpa_attention),
        ({"compile": "1", "attn": "sdpa"}, tg.sdpa_attention),
    ):
        rt = tg.Runtime(tg.Config(device="cpu", **settings), {})
        assert rt.attention is chosen


@pytest.mark.parametrize("instructions", [False, True])
def test_emulated_bfloat16_is_said_and_leaves_attention_to_torch(instructions, monkeypatch):
    """Products of blocks are slower than torch's own attention where the CPU emulates them."""
    monkeypatch.setattr(tg, "cpu_has_bfloat16", lambda: instructions)
    rt = tg.Runtime(tg.Config(device="cpu", dtype="bfloat16", compile="1"), {})
    assert rt.attention is (tg.blocked_attention if instructions else tg.sdpa_attention)
    assert ("emulated" in "".join(rt.notes)) != instructions
    assert tg.Runtime(tg.Config(device="cpu", compile="1"), {}).attention is tg.blocked_attention


# --- number formats -------------------------------------------------------------------------------


def test_the_number_format_is_a_setting(rng):
    """bfloat16 on a CPU has the GPU's tolerance and batches of one shape; parameters stay."""
    exact = tg.Runtime(config(TINY, device="cpu"), {})
    rounded = tg.Runtime(config(TINY, device="cpu", dtype="bfloat16"), {})
    assert exact.profile.tolerance < 1e-3 < rounded.profile.tolerance
    assert (exact.profile.fixed_rows, rounded.profile.fixed_rows) == (False, True)
    assert "compute:bfloat16" in rounded.notes[0]
    model = tg.build_model(config(TINY), rounded)
    ids = random_ids(rng, 1, 16)
    assert model.hidden(ids).dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_run_in_bfloat16_is_close_to_one_in_float32(tmp_path):
    losses = {}
    for dtype in ("float32", "bfloat16"):
        code, result, _ = run(tmp_path / dtype, DTYPE=dtype, SCHEDULE="tokens", VAL_TOKENS="0")
        assert code == 0
        assert not [c for c in result["stages"]["sliding"]["audit"].values() if "FAIL" in str(c)]
        losses[dtype] = losses_of(tmp_path / dtype)
    assert 0 < np.abs(losses["bfloat16"] / losses["float32"] - 1).max() < 0.01


# --- FlashAttention 3, in the place of which stands what the test says ----------------------------


def flash(q, k, v, causal):
    """As FlashAttention 3 answers: the outcome, and something more in some releases."""
    assert causal
    return tg.sdpa_attention(q, k, v), None


def only_forward(q, k, v, causal):
    return flash(q.detach(), k.detach(), v.detach(), causal)


def opaque(q, k, v, causal):
    """No graph can hold it."""
    torch._dynamo.graph_break()
    return flash(q, k, v, causal)


def heads_alone(q, k, v, causal):
    if q.size(2) != k.size(2):
        raise RuntimeError("no grouped queries")
    return flash(q, k, v, causal)


def looks_ahead(q, k, v, causal):
    return torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), enable_gqa=True
    ).transpose(1, 2)


@pytest.mark.parametrize(
    "kernel, compiles, words",
    [
        (flash, True, ""),
        (flash, False, ""),
        (only_forward, True, "grad"),
        (opaque, True, "break|graph"),
        (opaque, False, ""),
        (heads_alone, False, "grouped queries"),
        (looks_ahead, False, "off by"),
    ],
)
def test_a_foreign_kernel_is_tried_as_it_will_be_used(kernel, compiles, words, monkeypatch):
    """Forward and backward, compiled, with the run's heads, and the outcome compared."""
    module = types.ModuleType("flash_attn_interface")
    module.flash_attn_func = kernel
    monkeypatch.setitem(sys.modules, module.__name__, module)
    cfg = config(TINY, device="cpu", dtype="bfloat16")
    rt = tg.Runtime(cfg, {})
    rt.cuda = True
    rt.compile = compiled if compiles else (lambda function: function)
    backend = rt._pick_attention(cfg)
    assert (backend is tg.sdpa_attention) == bool(words)
    assert re.search(f"attention:(sdpa.*({words})|fa3)", rt.notes[-1])
    assert words or "fa3" in rt.notes[-1]
    if words:
        with pytest.raises(tg.InputError, match=f"ATTN=fa3.*({words})"):
            rt._pick_attention(config(TINY, device="cpu", attn="fa3"))


def test_flash_attention_is_for_bfloat16():
    rt = tg.Runtime(tg.Config(device="cpu"), {})
    rt.cuda = True
    assert rt._pick_attention(tg.Config()) is tg.sdpa_attention
    assert "DTYPE=bfloat16" in rt.notes[-1]


def packed_flash(q, k, v, bounds_q, bounds_k, longest_q, longest_k, causal):
    """As FlashAttention 3 answers for rows with bounds [T, H, D], piece by piece."""
    pieces = []
    for begin, end in itertools.pairwise(bounds_q.tolist()):
        if end > begin:
            rows = (x[begin:end].unsqueeze(0) for x in (q, k, v))
            pieces.append(tg.sdpa_attention(*rows)[0])
    return torch.cat(pieces)


def over_bounds(q, k, v, bounds_q, bounds_k, longest_q, longest_k, causal):
    """Attention that takes no notice of them."""
    return tg.sdpa_attention(*(x.unsqueeze(0) for x in (q, k, v)))[0]


def uncompiled(function):
    return function


PACKED = dict(TINY, device="cpu", dtype="bfloat16", train_doc_mask=True)


@pytest.mark.parametrize(
    "fa3, of_torch, chosen",
    [
        (packed_flash, over_bounds, "fa3"),
        (over_bounds, packed_flash, "varlen"),
        (None, packed_flash, "varlen"),
        (over_bounds, over_bounds, "no attention with document bounds works.*fa3: .*varlen: "),
    ],
)
@pytest.mark.parametrize("older", [False, True])
def test_attention_inside_documents_is_probed_on_a_gpu(fa3, of_torch, chosen, older, monkeypatch):
    """Of two foreign kernels the first whose outcome is right; where none is, a refusal."""
    module = types.ModuleType("flash_attn_interface")
    if fa3:
        module.flash_attn_varlen_func = fa3
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def varlen(*inputs, window_size, enable_gqa=False):
        assert (window_size, enable_gqa) == ((-1, 0), True)
        return of_torch(*inputs, causal=True)

    def varlen_of_2_11(*inputs, window_size):
        assert window_size == (-1, 0)
        return of_torch(*inputs, causal=True)

    varlen = varlen_of_2_11 if older else varlen
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    cfg = tg.Config(**PACKED)
    rt = tg.Runtime(cfg, {})
    assert rt.packed_attention.func is tg.padded_attention
    rt.cuda = True
    rt.put = torch.from_numpy
    rt.compile = uncompiled
    if "no attention" in chosen:
        with pytest.raises(tg.InputError, match=f"TRAIN_DOC_MASK, TTT_GLOBAL_DOCS: {chosen}"):
            rt._pick_packed_attention(cfg)
    else:
        rt._pick_packed_attention(cfg)
        assert rt.notes[-1] == f"attention inside documents:{chosen}"


@pytest.mark.parametrize("dtype, padded", [("float32", True), ("bfloat16", False)])
def test_documents_are_padded_where_no_kernel_has_bounds(dtype, padded):
    """On a GPU in float32; the rows that padding gathers are made for the same ones."""
    cfg = tg.Config(**PACKED | {"dtype": dtype})
    rt = tg.Runtime(cfg, {})
    assert rt.pads_documents
    rt.cuda = True
    rt.put = torch.from_numpy
    assert rt.pads_documents == padded
    if padded:
        assert rt._pick_packed_attention(cfg).func is tg.padded_attention


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


# --- one machine ----------------------------------------------------------------------------------


def count_once(env, folder):
    """Two of four processes are on each of two machines."""
    rank = int(env["RANK"])
    tempfile.tempdir = str(folder)
    local = dict(LOCAL_RANK=str(rank % 2), LOCAL_WORLD_SIZE="2")
    rt = tg.Runtime(tg.Config(device="cpu"), {**env, **local})
    made = []

    def make():
        made.append(rank)
        return [np.arange(5) + rank, np.ones((2, 3), np.float32)]

    first, second = rt.once_a_machine(make)
    assert made == ([rank] if rank in (0, 2) else [])
    assert first.tolist() == [rank // 2 * 2 + i for i in range(5)]
    assert (second.shape, second.dtype) == ((2, 3), np.float32)
    rt.highest(0)
    assert not list(folder.glob("train_gpt_*"))
    rt.close()


def test_what_a_machine_needs_once_is_made_once(tmp_path):
    """The others map its files, which are gone afterwards."""
    in_processes(4, tmp_path, count_once, tmp_path)


def full(path, array):
    raise OSError("the disk is full")


def has_no_room(env):
    """Counts of a text too: the first process begins them twice."""
    np.save = full
    rt = tg.Runtime(tg.Config(device="cpu"), env)
    (made,) = rt.once_a_machine(lambda: [np.arange(3)])
    assert made.tolist() == [0, 1, 2]
    facts = []
    for runtime in (rt, cpu_runtime()):
        counts = tg.NgramCounts(tg.Config(**TINY), runtime)
        counts.prepare(np.array([1, 5, 6, 5, 6, 5], np.uint16))
        facts.append(counts.facts(np.arange(5)))
    assert all(torch.equal(a, b) for a, b in zip(*facts, strict=True))
    rt.close()


def test_without_room_for_its_files_every_process_makes_it(tmp_path):
    in_processes(2, tmp_path, has_no_room)
    assert "WARNING: process 0: the disk is full" in (tmp_path / "rank0_of_2.txt").read_text()


def cannot_make(env):
    rt = tg.Runtime(tg.Config(device="cpu"), env)
    with pytest.raises(tg.InputError, match="too many tokens"):
        rt.once_a_machine(lambda: tg.check(False, "too many tokens"))
    rt.close()


def test_what_cannot_be_made_is_an_error(tmp_path):
    in_processes(2, tmp_path, cannot_make)


THREADS_LEFT = """
import os, sys, torch
import train_gpt as tg

with tg.contextlib.closing(tg.Runtime(tg.Config(device="cpu"), os.environ)) as rt:
    rt.broadcast_bytes(b"any")
    torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])  # imports torch's compiler, late
tasks = os.listdir("/proc/self/task")
names = [open(f"/proc/self/task/{task}/comm").read() for task in tasks]
assert "torch._dynamo" in sys.modules
assert not any("gloo" in name for name in names), names
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("cuda", [True, False])
@pytest.mark.parametrize("complete", [True, False])
def test_a_process_that_fails_alone_does_not_wait_for_the_others(cuda, complete, monkeypatch):
    """NCCL's end of a group is one of all processes; gloo's is each one's own."""
    group = ["a member"]
    monkeypatch.setattr(tg.dist, "destroy_process_group", group.clear)
    rt = cpu_runtime()
    rt._owns_group = True
    rt.cuda = cuda
    rt.complete = complete
    rt.close()
    assert bool(group) == (cuda and not complete)


def test_nothing_of_the_group_is_left_when_a_process_ends():
    """A thread of gloo that outlives the interpreter aborts the process, at times (exit -6)."""
    env = dict(clean_env(), PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    code, said = torchrun_alone(2, ["--no-python", sys.executable, "-c", THREADS_LEFT], env)
    assert code == 0, said
