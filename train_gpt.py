"""Parameter Golf: train, pack and score the best language model whose code + weights fit 16,000,000 bytes.

    torchrun --standalone --nproc_per_node=8 train_gpt.py         # the competition: 600 s on 8xH100
    MICRO_BATCH_TOKENS=16384 python train_gpt.py                  # the same run on one GPU
    CONFIG=records/track_cpu_1mb/demo/config.env python train_gpt.py   # minutes on a laptop CPU
    MODE=eval ARTIFACT=logs/<run>/model.ptz python train_gpt.py   # score an artifact, nothing else needed
    SMOKE=1 python train_gpt.py                                   # every section, synthetic text, no data
    python train_gpt.py --help                                    # every setting with default and meaning

Settings are environment variables. The file reads top to bottom as data flows; sections use only those above:
1 settings - 2 runtime - 3 ledger - 4 data - 5 model - 6 optimizer - 7 packing - 8 scoring - 9 training -
10 audit - 11 main. Axis letters in comments: B batch, T time, S scored targets of a window, H heads,
K key/value heads, D model or head size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import datetime
import difflib
import functools
import hashlib
import io
import itertools
import json
import lzma
import math
import os
import platform
import re
import shlex
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
import zstandard
from torch import Tensor, nn

SCRIPT = Path(__file__).resolve()
SETTINGS_INSIDE = globals().get("SETTINGS_INSIDE", "")      # the config.env inside a packed wrapper

# ============================================================================================================
# 1. SETTINGS - what can be chosen, and every complaint about a choice. Uses the standard library only.
# ============================================================================================================


class InputError(ValueError):
    """Something given to the program (a setting, a shard, an artifact) is unusable; the message names it."""


class ConfigError(InputError):
    """One or more settings are wrong; the message lists all of them."""


def _setting(group: str, default: Any, doc: str, low: float | None = None, high: float | None = None,
             choices: tuple[str, ...] = ()) -> Any:
    return dataclasses.field(default=default, metadata=dict(
        group=group, doc=doc, low=low, high=high, choices=choices))


_run, _data, _train, _model, _optim, _pack, _score = (functools.partial(_setting, group) for group in (
    "run", "data", "train", "model", "optim", "pack", "score"))


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting; its environment variable is the field's name in upper case. 0 or empty = absent."""

    mode: str = _run("train", "what to do", choices=("train", "eval", "sample"))
    run_id: str = _run("", "name of the run; empty = time and process number")
    out_dir: str = _run("", "folder for everything written; empty = logs/<RUN_ID>")
    seed: int = _run(1337, "seed of the parameters' initial values and of sampling", low=0)
    seeds: tuple[int, ...] = _run((), "several seeds, one run each, then mean and standard deviation: 1,2,3")
    smoke: bool = _run(False, "every section on a tiny model and synthetic text, no data needed")
    device: str = _run("auto", "where to compute", choices=("auto", "cuda", "cpu", "mps"))
    compile: str = _run("auto", "torch.compile; auto = on CUDA only", choices=("auto", "0", "1"))
    attn: str = _run("auto", "attention kernel; auto = FlashAttention 3 if it works here, else torch's",
                     choices=("auto", "fa3", "sdpa"))
    artifact: str = _run("", "packed model that MODE=eval and MODE=sample read; empty = <OUT_DIR>/model.ptz")
    resume: str = _run("", "checkpoint to continue from")
    save_every: int = _run(0, "write a checkpoint every so many steps (also on SIGUSR1 and SIGTERM)", low=0)
    sample_tokens: int = _run(0, "length of text sample; 0 = none after training, 200 in MODE=sample", low=0)
    sample_prompt: str = _run("", "text that the sample continues")
    sample_temperature: float = _run(0.8, "temperature of the sample", low=0.01)

    data_path: str = _data("./data/datasets/fineweb10B_sp1024", "folder of fineweb_{train,val}_*.bin shards")
    tokenizer_path: str = _data("./data/tokenizers/fineweb_1024_bpe.model",
                                "SentencePiece .model file, or byte260 for the byte-level vocabulary")
    val_tokens: int = _data(0, "validation targets to score (development: no val_bpb); 0 = all", low=0)

    schedule: str = _train("clock", "what drives warm-down and stop: seconds, or ITERATIONS (reproducible)",
                           choices=("clock", "tokens"))
    max_wallclock_seconds: float = _train(600.0, "training seconds under SCHEDULE=clock; 0 = none", low=0)
    iterations: int = _train(20000, "training steps at most", low=0)
    warmup_steps: int = _train(20, "steps on throw-away state before the clock starts (compilation)", low=0)
    warmdown_iters: int = _train(1200, "last steps, over which the learning rates fall to zero", low=0)
    train_batch_tokens: int = _train(524288, "tokens a step, over all processes", low=1)
    micro_batch_tokens: int = _train(0, "tokens a forward pass; 0 = an eighth of TRAIN_BATCH_TOKENS", low=0)
    train_seq_len: int = _train(1024, "tokens a training sequence", low=1)
    val_loss_every: int = _train(1000, "validate every so many steps, outside the clock; 0 = never", low=0)
    train_log_every: int = _train(200, "log the training loss every so many steps (and the first ten)", low=0)

    vocab_size: int = _model(1024, "tokens in the vocabulary", low=2, high=65536)
    num_layers: int = _model(9, "transformer blocks", low=1, high=1024)
    model_dim: int = _model(512, "width", low=2, high=65536)
    num_heads: int = _model(8, "attention heads", low=1)
    num_kv_heads: int = _model(4, "key/value heads (grouped-query attention)", low=1)
    mlp_mult: float = _model(2.0, "MLP hidden width over MODEL_DIM; may be fractional", low=0.01, high=64)
    leaky_slope: float = _model(0.0, "MLP activation leaky_relu(x, slope)^2; 0 = relu(x)^2", low=0)
    tie_embeddings: bool = _model(True, "the embedding is also the output matrix")
    tied_embed_init_std: float = _model(0.005, "standard deviation of a tied embedding at start", low=0)
    logit_softcap: float = _model(30.0, "logits become cap * tanh(logits / cap); 0 = off", low=0)
    rope_base: float = _model(10000.0, "rotary base", low=1)
    rope_dims: int = _model(0, "rotated dimensions of a head (partial RoPE); 0 = all", low=0)
    qk_gain_init: float = _model(1.5, "initial gain of each head's normalised queries", low=0)
    xsa_last_n: int = _model(0, "last layers with exclusive self-attention (XSA); 0 = none", low=0)
    unet_skips: bool = _model(True, "learned skips from the first half of the layers to the second")
    x0_mix: bool = _model(True, "every block mixes in the embedding stream with learned weights")
    ln_scale: bool = _model(False, "normed sublayer inputs times 1/sqrt(layer + 1)")
    bigram_vocab_size: int = _model(0, "rows of the hashed bigram embedding (BigramHash); 0 = none", low=0)
    bigram_dim: int = _model(128, "width of the bigram table", low=1)
    smear: bool = _model(False, "SmearGate: a learned share of the previous token's embedding")
    smear_bos_mask: bool = _model(False, "SmearGate lets nothing across a document start")
    bos_id: int = _model(1, "token that starts a document", low=0)
    ve_layers: tuple[int, ...] = _model((), "layers whose values get token embeddings: 9,10; empty = none")
    ve_dim: int = _model(128, "width of the shared value-embedding table", low=1)

    embed_lr: float = _optim(0.6, "Adam rate of an untied embedding", low=0)
    head_lr: float = _optim(0.008, "Adam rate of an untied output matrix", low=0)
    tied_embed_lr: float = _optim(0.05, "Adam rate of a tied embedding and of the other tables", low=0)
    matrix_lr: float = _optim(0.04, "Muon rate of the matrices", low=0)
    scalar_lr: float = _optim(0.04, "Adam rate of vectors and scalars", low=0)
    muon_momentum: float = _optim(0.95, "Muon momentum", low=0, high=1)
    muon_momentum_warmup_start: float = _optim(0.85, "Muon momentum at step 0", low=0, high=1)
    muon_momentum_warmup_steps: int = _optim(500, "steps until MUON_MOMENTUM is reached", low=0)
    muon_backend_steps: int = _optim(5, "Newton-Schulz iterations", low=1)
    muon_wd: float = _optim(0.0, "decoupled weight decay of the matrices", low=0)
    adam_wd: float = _optim(0.0, "decoupled weight decay of everything else", low=0)
    beta1: float = _optim(0.9, "Adam", low=0, high=1)
    beta2: float = _optim(0.95, "Adam", low=0, high=1)
    adam_eps: float = _optim(1e-8, "Adam", low=0)
    grad_clip_norm: float = _optim(0.0, "global gradient norm at most; 0 = off", low=0)
    ema_decay: float = _optim(0.0, "average the weights over steps with this decay; 0 = off", low=0, high=1)

    quant_bits: int = _pack(8, "bits of a quantized weight, row-wise scales", low=2, high=8)
    quant_policy: str = _pack("", "other bits by role: embed:8,attn:6 (roles embed, table, attn, mlp, other)")
    quant_clip_steps: int = _pack(16, "clip levels tried for each row; 1 = its maximum", low=1, high=256)
    keep_float_max_numel: int = _pack(65536, "tensors up to this size stay float", low=0)
    compressor: str = _pack("zstd", "codec of the artifact", choices=("zstd", "zlib", "lzma"))
    max_artifact_bytes: int = _pack(16_000_000, "cap on code + model; over it the exit code is 2", low=0)

    eval_seq_len: int = _score(0, "tokens a scoring window; 0 = TRAIN_SEQ_LEN", low=0)
    eval_plain: bool = _score(True, "score plain windows too, not only sliding ones")
    eval_stride: int = _score(64, "sliding windows advance by this; 0 = plain windows only", low=0)
    eval_batch_tokens: int = _score(0, "tokens a scoring batch; 0 = from free memory", low=0)
    max_eval_seconds: float = _score(600.0, "scoring seconds; a stage that cannot finish is skipped", low=0)

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def micro_tokens(self) -> int:
        return self.micro_batch_tokens or self.train_batch_tokens // 8

    @property
    def micro_batches(self) -> int:
        return self.train_batch_tokens // self.micro_tokens

    @property
    def score_len(self) -> int:
        return self.eval_seq_len or self.train_seq_len

    def group(self, *groups: str) -> dict[str, Any]:
        """Name -> value of the settings in these groups (run, data, train, model, optim, pack, score)."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)
                if f.metadata["group"] in groups}


Hyperparameters = Config
FIELDS = {f.name.upper(): f for f in dataclasses.fields(Config)}

SMOKE_SETTINGS = dict(pair.split("=") for pair in (
    "DATA_PATH=smoke_data TOKENIZER_PATH=byte260 VOCAB_SIZE=260 NUM_LAYERS=4 MODEL_DIM=64 NUM_HEADS=4 "
    "NUM_KV_HEADS=2 TRAIN_SEQ_LEN=128 TRAIN_BATCH_TOKENS=2048 MICRO_BATCH_TOKENS=1024 ITERATIONS=20 "
    "WARMUP_STEPS=2 WARMDOWN_ITERS=10 VAL_LOSS_EVERY=10 SCHEDULE=tokens KEEP_FLOAT_MAX_NUMEL=1024 "
    "EMA_DECAY=0.8 BIGRAM_VOCAB_SIZE=256 BIGRAM_DIM=16 SMEAR=1 SMEAR_BOS_MASK=1 XSA_LAST_N=2 VE_LAYERS=2,3 "
    "VE_DIM=16 ROPE_DIMS=8 LN_SCALE=1 LEAKY_SLOPE=0.5 SAMPLE_TOKENS=60").split())
OLD_NAMES = {
    "BIGRAM_HASH_BUCKETS": "BIGRAM_VOCAB_SIZE", "WEIGHT_DECAY": "MUON_WD",
    "VAL_BATCH_SIZE": "EVAL_BATCH_TOKENS", "EVAL_ONLY": "MODE=eval with ARTIFACT",
    "TTT_ONLY": "MODE=eval with ARTIFACT", "MAX_SUBMISSION_BYTES": "MAX_ARTIFACT_BYTES",
    "XSA_LAYERS": "XSA_LAST_N", "INT8_KEEP_FLOAT_MAX_NUMEL": "KEEP_FLOAT_MAX_NUMEL",
    "VE_ENABLED": "VE_LAYERS", "EMA_ENABLED": "EMA_DECAY", "SMEAR_ENABLED": "SMEAR"}
FAMILIES = ("ADAM BIGRAM CROWN EMA EVAL GPTQ GRAD LN LOGIT MATRIX MIXER MLP MUON NGRAM PRUNE QAT QK QUANT "
            "ROPE SCALAR SMEAR SWA TIED TTT VAL VE WARMDOWN WARMUP XSA").split()
FOREIGN = tuple(("TORCH OMP_ MKL_ NCCL_ CUDA_ PYTHON PYTORCH SLURM_ XDG_ GITHUB_ LD_ LC_ RANK WORLD_SIZE "
                 "LOCAL_ GROUP_ ROLE_ MASTER_ PATH GLOO_ NVIDIA_ TRITON_ HF_").split())


def _parse(name: str, text: str, default: Any) -> Any:
    """The text of a setting as the type of its default; raises ValueError that says what is allowed."""
    text = text.strip()
    if isinstance(default, bool):
        allowed = {"0": False, "false": False, "": False, "1": True, "true": True}
        if text.lower() not in allowed:
            raise ValueError(f"{name}={text!r}: expected 0, 1, true or false")
        return allowed[text.lower()]
    try:
        if isinstance(default, tuple):
            return tuple(int(part) for part in text.split(",") if part.strip())
        if isinstance(default, (int, float)):
            return type(default)(text)
    except ValueError:
        wanted = {int: "a whole number", float: "a number", tuple: "whole numbers with commas"}[type(default)]
        raise ValueError(f"{name}={text!r}: expected {wanted}") from None
    return text


def _unknown(name: str, exact: bool) -> str | None:
    """What is wrong with a name that is no setting. exact: from a file, where every name must be known."""
    if name in OLD_NAMES:
        return f"unknown setting {name}: here it is {OLD_NAMES[name]}"
    near = difflib.get_close_matches(name, FIELDS, 1, 0.85)
    if near:
        return f"unknown setting {name} (did you mean {near[0]}?)"
    if exact or name.split("_")[0] in FAMILIES:
        return f"unknown setting {name} (python train_gpt.py --help lists all)"
    return None


def read_settings(env: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Everything set by SMOKE, file and environment as {field: value}, and the complaints."""
    texts = dict(SMOKE_SETTINGS) if env.get("SMOKE", "0").strip().lower() in ("1", "true") else {}
    problems: list[str] = []
    path = Path(env["CONFIG"]) if env.get("CONFIG") else SCRIPT.with_name("config.env")
    if env.get("CONFIG") and not path.is_file():
        problems.append(f"CONFIG={env['CONFIG']!r}: no such file")
    file_text = path.read_text(encoding="utf-8") if path.is_file() else SETTINGS_INSIDE
    for number, line in enumerate(file_text.splitlines(), 1):
        name, equals, text = (part.strip() for part in line.partition("="))
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if equals and name in FIELDS:
            texts[name] = text
        else:
            reason = _unknown(name, True) if equals else "expected NAME=value"
            problems.append(f"{path.name} line {number}: {reason}")
    for name, text in env.items():
        if name in FIELDS:
            texts[name] = text
        elif name != "CONFIG" and re.fullmatch(r"[A-Z][A-Z0-9_]*", name) and not name.startswith(FOREIGN):
            problems += filter(None, [_unknown(name, False)])
    values = {}
    for name, text in texts.items():
        try:
            values[name.lower()] = _parse(name, text, FIELDS[name].default)
        except ValueError as error:
            problems.append(str(error))
    return values, problems


def check_config(cfg: Config, world: int = 1) -> list[str]:
    """All complaints about the values themselves, one sentence each."""
    problems = []
    for name, field in FIELDS.items():
        value, meta = getattr(cfg, field.name), field.metadata
        if meta["choices"] and value not in meta["choices"]:
            problems.append(f"{name}={value!r}: expected one of {', '.join(meta['choices'])}")
        if isinstance(value, float) and not math.isfinite(value):
            problems.append(f"{name}={value}: expected a finite number")
        elif meta["low"] is not None and value < meta["low"] or \
                meta["high"] is not None and value > meta["high"]:
            problems.append(f"{name}={value}: expected {meta['low']} or more" +
                            (f", {meta['high']} at most" if meta["high"] is not None else ""))
    return problems or _cross_checks(cfg, world)


def _cross_checks(cfg: Config, world: int) -> list[str]:
    c = cfg
    wrong = [
        (c.model_dim % c.num_heads, f"MODEL_DIM={c.model_dim} must be a multiple of NUM_HEADS={c.num_heads}"),
        (c.num_heads % c.num_kv_heads,
         f"NUM_HEADS={c.num_heads} must be a multiple of NUM_KV_HEADS={c.num_kv_heads}"),
        (c.head_dim % 2, f"MODEL_DIM / NUM_HEADS = {c.head_dim} must be even (rotary pairs)"),
        (c.rope_dims % 2 or c.rope_dims > c.head_dim,
         f"ROPE_DIMS={c.rope_dims} must be even and at most the head size {c.head_dim}"),
        (c.xsa_last_n > c.num_layers, f"XSA_LAST_N={c.xsa_last_n} must be at most NUM_LAYERS={c.num_layers}"),
        (int(c.mlp_mult * c.model_dim) < 1, f"MLP_MULT={c.mlp_mult} leaves no unit at width {c.model_dim}"),
        (len(set(c.ve_layers)) < len(c.ve_layers), f"VE_LAYERS={c.ve_layers} names a layer twice"),
        (any(not 0 <= layer < c.num_layers for layer in c.ve_layers),
         f"VE_LAYERS={','.join(map(str, c.ve_layers))} must lie between 0 and NUM_LAYERS - 1 = "
         f"{c.num_layers - 1}"),
        (c.bigram_vocab_size == 1, "BIGRAM_VOCAB_SIZE=1: expected 0 or at least 2"),
        (c.smear_bos_mask and not c.smear, "SMEAR_BOS_MASK=1 needs SMEAR=1"),
        (c.bos_id >= c.vocab_size, f"BOS_ID={c.bos_id} must be below VOCAB_SIZE={c.vocab_size}"),
        (c.tokenizer_path != "byte260" and not c.tokenizer_path.endswith(".model"),
         f"TOKENIZER_PATH={c.tokenizer_path!r}: expected a SentencePiece .model file or byte260"),
        (c.micro_tokens == 0 or c.train_batch_tokens % max(c.micro_tokens, 1),
         f"TRAIN_BATCH_TOKENS={c.train_batch_tokens} must be a multiple of "
         f"MICRO_BATCH_TOKENS={c.micro_tokens}"),
        (c.micro_tokens % c.train_seq_len,
         f"MICRO_BATCH_TOKENS={c.micro_tokens} must be a multiple of TRAIN_SEQ_LEN={c.train_seq_len}"),
        (c.eval_stride > c.score_len,
         f"EVAL_STRIDE={c.eval_stride} must be at most EVAL_SEQ_LEN={c.score_len}"),
        (c.beta1 == 1 or c.beta2 == 1, "BETA1 and BETA2 must be below 1"),
    ]
    problems = [text for condition, text in wrong if condition]
    try:
        parse_policy(c)
    except ValueError as error:
        problems.append(str(error))
    if not problems and c.mode == "train" and c.micro_batches % world:
        sizes = [w for w in range(1, c.micro_batches + 1) if c.micro_batches % w == 0]
        problems.append(f"WORLD_SIZE={world} must divide the {c.micro_batches} micro-batches of a step "
                        "(TRAIN_BATCH_TOKENS / MICRO_BATCH_TOKENS): possible are "
                        f"{', '.join(map(str, sizes))}")
    return problems


ROLES = ("embed", "table", "attn", "mlp", "other")


def parse_policy(cfg: Config) -> dict[str, int]:
    """Bits by tensor role: QUANT_BITS, then the exceptions of QUANT_POLICY."""
    bits = dict.fromkeys(ROLES, cfg.quant_bits)
    for part in filter(None, cfg.quant_policy.split(",")):
        role, _, text = part.strip().partition(":")
        if role not in ROLES or text not in tuple("2345678"):
            raise ValueError(f"QUANT_POLICY={cfg.quant_policy!r}: expected role:bits with roles "
                             f"{', '.join(ROLES)} and 2 to 8 bits")
        bits[role] = int(text)
    return bits


def _refuse(problems: list[str]) -> None:
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError("\n".join([*problems, f"{count}; nothing was started."]))


def load_config(env: Mapping[str, str]) -> Config:
    """Default < file (CONFIG, or config.env by the script) < environment. ConfigError lists all problems."""
    values, problems = read_settings(env)
    problems += check_config(Config(**values), int(env.get("WORLD_SIZE") or 1))
    _refuse(problems)
    return Config(**values)


def as_typed(value: Any) -> str:
    """A setting's value as one would type it."""
    if isinstance(value, (tuple, list)):                            # a list: a tuple that went through JSON
        return ",".join(map(str, value))
    return str(int(value) if isinstance(value, bool) else value)


def help_text() -> str:
    """One line a setting: name, default, meaning."""
    lines = [__doc__.strip(), "",
             "CONFIG=<file> names a file of NAME=value lines; the environment overrides it."]
    for group, members in itertools.groupby(FIELDS.items(), key=lambda item: item[1].metadata["group"]):
        lines += ["", f"[{group}]"]
        for name, field in members:
            options = f" ({'|'.join(field.metadata['choices'])})" if field.metadata["choices"] else ""
            lines.append(f"{name}={as_typed(field.default)}".ljust(44) + f" {field.metadata['doc']}{options}")
    return "\n".join(lines)


# ============================================================================================================
# 2. RUNTIME - the only section that knows devices, processes, kernels and compilation. Uses section 1.
# ============================================================================================================


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by torch. q [B, T, H, D], k and v [B, T, K, D] with K dividing H -> [B, T, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))                                          # [B, H|K, T, D]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1))
    return out.transpose(1, 2)                                                                  # [B, T, H, D]


def _fa3_attention(device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """FlashAttention 3, after one real call; raises whatever goes wrong when it is missing or fails here."""
    from flash_attn_interface import flash_attn_func  # optional by design: only Hopper images have it

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_func(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out                # releases differ in what they return

    probe = torch.zeros(1, 8, 1, 64, device=device, dtype=torch.bfloat16)
    attend(probe, probe, probe)
    return attend


class Runtime:
    """Where the program runs: device, processes, number format, kernels. One process is just world 1.

    `lag` is how many steps later the host reads what a step reported, so that a GPU never waits for the host.
    """

    def __init__(self, cfg: Config, env: Mapping[str, str]):
        self.rank, self.world = int(env.get("RANK") or 0), int(env.get("WORLD_SIZE") or 1)
        self.device = self._pick_device(cfg.device, int(env.get("LOCAL_RANK") or 0))
        cuda = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if cuda else torch.float32
        self.lag = 2 if cuda else 0
        self.notes = [f"device:{self.device_name()} compute:{str(self.dtype)[6:]} world_size:{self.world}"]
        if cuda:
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        elif self.device.type == "cpu":
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False         # a debugging aid, and slow
            self._keep_freed_memory()
        self.attend = self._pick_attention(cfg.attn)
        self.compiles = cfg.compile == "1" or cfg.compile == "auto" and cuda
        self._owns_group = self.world > 1 and not dist.is_initialized()
        if self._owns_group:
            dist.init_process_group("nccl" if cuda else "gloo", rank=self.rank, world_size=self.world,
                                    timeout=datetime.timedelta(minutes=10),
                                    **(dict(device_id=self.device) if cuda else {}))

    @staticmethod
    def _pick_device(wanted: str, local_rank: int) -> torch.device:
        have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        kind = next(name for name, there in have.items() if there) if wanted == "auto" else wanted
        if not have[kind]:
            raise ConfigError(f"DEVICE={wanted}: torch {torch.__version__} finds none here; available: " +
                              ", ".join(name for name, there in have.items() if there))
        return torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)

    @staticmethod
    def _keep_freed_memory() -> None:
        """glibc returns large blocks to the system at once; every new tensor page-faults again: keep them.

        Measured on two cores: forward and backward of the 8192 x 1024 loss take a quarter of the time.
        """
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
        if mallopt:                                                     # absent in musl
            m_mmap_threshold, m_trim_threshold = -3, -1
            mallopt(m_mmap_threshold, 1 << 30)
            mallopt(m_trim_threshold, (1 << 31) - 1)

    def _pick_attention(self, wanted: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        reason = "ATTN=sdpa" if wanted == "sdpa" else "FlashAttention 3 needs CUDA"
        if wanted != "sdpa" and self.device.type == "cuda":
            try:
                attend = _fa3_attention(self.device)
                self.notes.append("attention:fa3 (imported, probe call passed)")
                return attend
            except Exception as error:  # any failure of a foreign kernel means: not here
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if wanted == "fa3":
            raise ConfigError(f"ATTN=fa3: FlashAttention 3 does not run here ({reason}); allowed: auto, sdpa")
        self.notes.append(f"attention:sdpa ({reason})")
        return sdpa_attention

    def device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        if self.device.type == "cpu" and Path("/proc/cpuinfo").is_file():
            names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
            return f"{names[0] if names else platform.machine()} ({torch.get_num_threads()} threads)"
        return f"{self.device.type} {platform.machine()}"

    @property
    def main(self) -> bool:
        return self.rank == 0

    def compile(self, function: Callable) -> Callable:
        return torch.compile(function, dynamic=False, fullgraph=True) if self.compiles else function

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def sum_(self, tensor: Tensor) -> Tensor:
        """The tensor's sum over all processes, in place where the device allows."""
        if self.world == 1:
            return tensor
        there = tensor.to(self.device)
        dist.all_reduce(there)
        return tensor.copy_(there) if there is not tensor else tensor

    def start_sum(self, values: Sequence[float | Tensor]) -> Callable[[], list[float]]:
        """Begins the sum over processes of a few numbers; only the call that it returns waits for it."""
        total = torch.stack([torch.as_tensor(value, dtype=torch.float32).detach()
                             .to(self.device, non_blocking=True) for value in values])
        work = dist.all_reduce(total, async_op=True) if self.world > 1 else None
        if self.device.type == "cuda":
            if work:
                work.wait()                                             # orders the streams; the host goes on
            host, done = torch.empty(total.shape, dtype=total.dtype, pin_memory=True), torch.cuda.Event()
            host.copy_(total, non_blocking=True)
            done.record()
            return lambda: (done.synchronize(), host.tolist())[1]
        return lambda: (work.wait() if work else None, total.tolist())[1]

    def all_gather(self, tensor: Tensor) -> Tensor:
        """[n, ...] on every process -> [world * n, ...], in order of rank."""
        if self.world == 1:
            return tensor
        out = tensor.new_empty((self.world * tensor.size(0), *tensor.shape[1:]))
        dist.all_gather_into_tensor(out, tensor.contiguous())
        return out

    def broadcast_bytes(self, blob: bytes | None) -> bytes:
        """Rank 0's bytes on every process: nodes need no shared disk."""
        if self.world == 1:
            return blob
        box = [blob]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def put(self, array: np.ndarray) -> Tensor:
        """A host array as a tensor on the device; the copy does not block the host."""
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else \
            tensor.to(self.device)

    def free_memory(self) -> int:
        """Bytes that a new allocation may count on."""
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[0]
        meminfo = Path("/proc/meminfo")
        found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text()) if meminfo.is_file() else None
        return int(found[1]) * 1024 if found else 2 << 30

    def peak_memory(self) -> int:
        """Peak bytes allocated on the GPU, or peak resident bytes of the process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        with contextlib.suppress(ImportError):
            import resource  # absent on Windows
            unit = 1 if sys.platform == "darwin" else 1024
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return 0

    def close(self) -> None:
        if self._owns_group:
            dist.destroy_process_group()


# ============================================================================================================
# 3. LEDGER - the log, the metrics, the result and where every second went. Uses sections 1-2.
# ============================================================================================================

# Which budget a phase counts against: MAX_WALLCLOCK_SECONDS (train), MAX_EVAL_SECONDS (eval), or neither.
PHASE_SIDES = {"train": "train", "calibrate": "train", "unpack": "eval", "plain": "eval", "sliding": "eval"}


def atomic_write(path: Path, data: bytes) -> None:
    """Writes the whole file or nothing: a temporary name in the same folder, then a rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_bytes(data)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


class Ledger:
    """Log, metrics.jsonl, result.json, seconds by phase. Only rank 0 writes; others keep the same books."""

    def __init__(self, out_dir: Path, rt: Runtime, resumed: bool = False):
        self.out_dir, self.writes = out_dir, rt.main
        self.seconds: dict[str, float] = {}
        self.began: dict[str, float] = {}                               # first second of each phase
        self.result: dict[str, Any] = {"status": "started", "stages": {}}
        self.born = self._shown = time.perf_counter()
        self._inner = 0.0
        if self.writes:
            out_dir.mkdir(parents=True, exist_ok=True)
            for name in () if resumed else ("train.log", "metrics.jsonl"):
                (out_dir / name).write_text("")

    def _append(self, name: str, line: str) -> None:
        if self.writes:
            with open(self.out_dir / name, "a", encoding="utf-8") as file:
                file.write(line + "\n")

    def log(self, line: str) -> None:
        if self.writes:
            print(line, flush=True)
        self._append("train.log", line)

    def metric(self, **values: Any) -> None:
        self._append("metrics.jsonl", json.dumps(values))

    def progress(self, line: str, last: bool = False) -> None:
        """One rewritten line on a terminal; elsewhere a line every ten seconds."""
        if self.writes and sys.stdout.isatty():
            print(f"\r{line}\033[K", end="\n" if last else "", flush=True)
        elif time.perf_counter() - self._shown > 10 and not last:
            self._shown = time.perf_counter()
            self.log(line)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Books the block's seconds under a name, without what inner phases booked."""
        outer, self._inner, start = self._inner, 0.0, time.perf_counter()
        self.began.setdefault(name, round(start - self.born, 3))
        try:
            yield
        finally:
            whole = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + whole - self._inner
            self._inner = outer + whole

    def side(self, side: str) -> float:
        """Seconds booked so far against one budget: train or eval."""
        return sum(s for name, s in self.seconds.items() if PHASE_SIDES.get(name) == side)

    def close(self) -> None:
        """The whole result as the log's last line, so that the log alone says everything."""
        self._append("train.log", f"result_json: {json.dumps(self.result)}")

    def save(self, **fields: Any) -> None:
        """Merges fields into result.json, with the seconds so far."""
        self.result.update(fields)
        wall = time.perf_counter() - self.born
        named = {name: round(s, 3) for name, s in self.seconds.items()}
        self.result["seconds"] = {**named, "other": round(wall - sum(self.seconds.values()), 3),
                                  "wall": round(wall, 3), "train_side": round(self.side("train"), 3),
                                  "eval_side": round(self.side("eval"), 3)}
        self.result["phases_began"] = self.began
        if self.writes:
            atomic_write(self.out_dir / "result.json", (json.dumps(self.result, indent=1) + "\n").encode())


# ============================================================================================================
# 4. DATA - shards, the token stream, batches, and how many bytes a token stands for. Uses sections 1-3.
# ============================================================================================================

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024


def read_shard(path: str | Path) -> np.ndarray:
    """Tokens of a .bin shard as a read-only uint16 memory map. InputError names the file and what is wrong.

    Format (upstream's): 256 little-endian int32 (magic, version, token count, zeros), then uint16 tokens.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = file.read(SHARD_HEADER_BYTES)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if len(header) < SHARD_HEADER_BYTES:
        raise InputError(
            f"{path}: {size} bytes, shorter than the {SHARD_HEADER_BYTES}-byte header of a shard")
    magic, version, count = struct.unpack("<3i", header[:12])
    if (magic, version) != (SHARD_MAGIC, SHARD_VERSION):
        raise InputError(f"{path}: magic {magic}, version {version}; expected {SHARD_MAGIC}, {SHARD_VERSION}")
    if count <= 0 or size != SHARD_HEADER_BYTES + 2 * count:
        raise InputError(
            f"{path}: {size} bytes; the header's {count} tokens need {SHARD_HEADER_BYTES + 2 * count}")
    return np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES, shape=(count,))


def shard_header(count: int) -> bytes:
    return struct.pack("<3i", SHARD_MAGIC, SHARD_VERSION, count).ljust(SHARD_HEADER_BYTES, b"\0")


def write_shard(path: str | Path, tokens: np.ndarray) -> None:
    """Writes tokens (integers below 65,536) as a shard, whole or not at all."""
    tokens = np.asarray(tokens)
    if tokens.size == 0 or tokens.min() < 0 or tokens.max() > 65535:
        raise InputError(f"{path}: a shard needs at least one token, all between 0 and 65535")
    atomic_write(Path(path), shard_header(tokens.size) + tokens.astype("<u2").tobytes())


def find_path(text: str) -> Path:
    """A relative path as seen from the working folder, else from the script's folder or any above it."""
    for base in (Path.cwd(), SCRIPT.parent, *SCRIPT.parent.parents):
        if (base / text).exists():
            return base / text
    raise InputError(f"{text}: not found from {Path.cwd()}, nor from {SCRIPT.parent} upwards "
                     "(DATA_PATH and TOKENIZER_PATH name the data; data/README.md says how to make it)")


def shard_paths(cfg: Config, split: str) -> list[Path]:
    folder = find_path(cfg.data_path)
    paths = sorted(folder.glob(f"fineweb_{split}_*.bin"))
    if not paths:
        raise InputError(f"DATA_PATH={cfg.data_path!r}: no fineweb_{split}_*.bin in {folder}")
    return paths


class TokenStream:
    """The training tokens as one endless stream: shards in order of name, begun again after the last."""

    def __init__(self, paths: Sequence[Path], vocab_size: int):
        self.paths, self.vocab_size = list(paths), vocab_size
        self.shards = [read_shard(path) for path in self.paths]
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        self.total = int(self.ends[-1])

    def take(self, start: int, count: int) -> np.ndarray:
        """Tokens start .. start + count - 1 of the stream -> int64 [count]."""
        parts = []
        while count > 0:
            at = start % self.total
            index = int(np.searchsorted(self.ends, at, side="right"))
            offset = at - (int(self.ends[index - 1]) if index else 0)
            part = self.shards[index][offset:offset + count].astype(np.int64)
            if part.max() >= self.vocab_size:
                raise InputError(f"{self.paths[index]}: token {part.max()}, but VOCAB_SIZE={self.vocab_size}")
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts)

    def batch(self, unit: int, cfg: Config) -> tuple[np.ndarray, np.ndarray]:
        """Micro-batch number `unit` of the run, counted over all steps and processes -> ids, targets [R, T].

        Units are disjoint spans of micro_tokens + 1 tokens for any number of processes (upstream's order).
        """
        span = self.take(unit * (cfg.micro_tokens + 1), cfg.micro_tokens + 1)
        return span[:-1].reshape(-1, cfg.train_seq_len), span[1:].reshape(-1, cfg.train_seq_len)


def load_validation(cfg: Config) -> np.ndarray:
    """All validation tokens (uint16), or the first VAL_TOKENS + 1."""
    paths = shard_paths(cfg, "val")
    tokens = np.concatenate([read_shard(path) for path in paths])
    tokens = tokens[:cfg.val_tokens + 1] if cfg.val_tokens else tokens
    if len(tokens) < 2:
        raise InputError(f"{paths[0]}: {len(tokens)} validation token; scoring needs two")
    if tokens.max() >= cfg.vocab_size:
        raise InputError(f"{paths[0]}: token {tokens.max()}, but VOCAB_SIZE={cfg.vocab_size}")
    return tokens


class ByteTable:
    """How many bytes of text each token stands for (upstream's rule, spec: rules M2).

    A token counts the UTF-8 bytes of its piece without the word mark U+2581; the mark counts one byte unless
    the token before is control, unknown or unused. Those count nothing themselves, byte pieces count one.
    """

    def __init__(self, sizes: np.ndarray, marked: np.ndarray, boundary: np.ndarray, name: str,
                 processor: sentencepiece.SentencePieceProcessor | None = None):
        self.sizes, self.marked, self.boundary = sizes, marked, boundary        # [V] int16, bool, bool
        self.name, self.processor, self.vocab_size = name, processor, len(sizes)

    @classmethod
    def from_sentencepiece(cls, path: str | Path) -> ByteTable:
        if not Path(path).is_file():
            raise InputError(f"{path}: no such tokenizer file")
        try:
            sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise InputError(f"{path}: not a SentencePiece model ({error})") from None
        count = sp.vocab_size()
        boundary = np.array([sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in range(count)])
        pieces = [sp.id_to_piece(i) for i in range(count)]
        marked = np.array([p.startswith("\u2581") for p in pieces]) & ~boundary
        sizes = np.array([0 if boundary[i] else 1 if sp.is_byte(i) else len(p.removeprefix("\u2581").encode())
                          for i, p in enumerate(pieces)], dtype=np.int16)
        return cls(sizes, marked, boundary, Path(path).name, sp)

    @classmethod
    def bytes260(cls) -> ByteTable:
        """The byte-level vocabulary: 0 pad, 1 document start, 2 document end, 3 unknown, b + 4 is byte b."""
        boundary = np.arange(260) < 4
        return cls((~boundary).astype(np.int16), np.zeros(260, bool), boundary, "byte260")

    @classmethod
    def load(cls, cfg: Config) -> ByteTable:
        table = cls.bytes260() if cfg.tokenizer_path == "byte260" else \
            cls.from_sentencepiece(find_path(cfg.tokenizer_path))
        if table.vocab_size != cfg.vocab_size:
            raise InputError(f"VOCAB_SIZE={cfg.vocab_size}, but the tokenizer {table.name} has "
                             f"{table.vocab_size} tokens")
        return table

    def count(self, tokens: np.ndarray) -> np.ndarray:
        """Bytes charged to tokens[1:] -> int16 [len(tokens) - 1]."""
        return self.sizes[tokens[1:]] + (self.marked[tokens[1:]] & ~self.boundary[tokens[:-1]])

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(text) if self.processor else [byte + 4 for byte in text.encode()]

    def decode(self, tokens: Sequence[int]) -> bytes:
        """The text of the tokens, as bytes. Control tokens are empty."""
        if self.processor is None:
            return bytes(int(t) - 4 for t in tokens if t >= 4)
        return self.processor.decode([int(t) for t in tokens]).encode()


def synthetic_shards(folder: Path, seed: int = 0) -> None:
    """Small byte-level shards of invented words with skewed frequencies, for SMOKE=1."""
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(list("aeioubdklmnrst"), rng.integers(2, 8))) for _ in range(200)]
    chances = 1 / np.arange(1, len(words) + 1)
    for split, documents in (("train", 60), ("val", 6)):
        tokens = []
        for _ in range(documents):
            text = " ".join(rng.choice(words, 150, p=chances / chances.sum()))
            tokens += [1, *(byte + 4 for byte in text.encode())]
        write_shard(folder / f"fineweb_{split}_000000.bin", np.array(tokens))


# ============================================================================================================
# 5. MODEL - one forward pass, `hidden`, for training, scoring and adaptation. Knows no device, rank or file;
#    indexes no tensor with brackets, so that fake CUDA tensors can run through it on a machine without a GPU.
# ============================================================================================================


def norm(x: Tensor) -> Tensor:
    """RMS norm over the last axis, without weights."""
    return F.rms_norm(x, (x.size(-1),))


def previous(x: Tensor) -> Tensor:
    """The stream one position later: [B, T, D] with zeros at position 0."""
    return F.pad(x, (0, 0, 1, -1))


def rotary_table(time: int, dims: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles -> two float32 [T, 1, dims / 2]."""
    frequencies = base ** (-torch.arange(0, dims, 2, device=device, dtype=torch.float32) / dims)
    angles = torch.outer(torch.arange(time, device=device, dtype=torch.float32), frequencies).unsqueeze(1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-split pairs, on a head's first 2 * cos.size(-1) dimensions; the rest pass."""
    cos, sin, half = cos.to(x.dtype), sin.to(x.dtype), cos.size(-1)
    a, b, rest = x.split((half, half, x.size(-1) - 2 * half), dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)                      # [B, T, H, D]


class Linear(nn.Module):
    """A matrix without bias, kept in float32 and cast to the input's type at use."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Table(nn.Module):
    """An embedding; the stream's type is chosen by the caller."""

    def __init__(self, rows: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return F.embedding(ids, self.weight).to(dtype)


class BigramHash(nn.Module):
    """An embedding of the hashed pair (previous token, token), added to the token's own (PR 489's hash).

    The last row is kept for position 0; table zero, projection not, so that the branch can train.
    """

    def __init__(self, cfg: Config):
        super().__init__()
        self.rows = cfg.bigram_vocab_size
        self.embed = Table(self.rows, cfg.bigram_dim)
        self.proj = Linear(cfg.bigram_dim, cfg.model_dim)
        self.scale = nn.Parameter(torch.empty(()))

    def rows_of(self, ids: Tensor) -> Tensor:
        """Table row of every position: [B, T] -> [B, T]."""
        pairs = torch.bitwise_xor(36313 * ids, 27191 * ids.roll(1, dims=1)) % (self.rows - 1)
        return F.pad(pairs.narrow(1, 1, ids.size(1) - 1), (1, 0), value=self.rows - 1)

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return self.proj(self.embed(self.rows_of(ids), dtype)) * self.scale.to(dtype)            # [B, T, D]


class Smear(nn.Module):
    """SmearGate: out_t = (1 - g) x_t + g x_{t-1}, g = sigmoid(gate) per dimension; can stop at a BOS."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.bos = cfg.bos_id if cfg.smear_bos_mask else None
        self.gate = nn.Parameter(torch.empty(cfg.model_dim))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate.to(x.dtype))
        if self.bos is not None:
            gate = gate * (ids != self.bos).unsqueeze(-1).to(x.dtype)
        return torch.lerp(x, previous(x), gate.expand_as(x))


class ValueEmbedding(nn.Module):
    """One token table whose projection is added to the values of the listed layers (PR 859)."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.embed = Table(cfg.vocab_size, cfg.ve_dim)
        self.proj = Linear(cfg.ve_dim, cfg.num_kv_heads * cfg.head_dim)
        self.scale = nn.Parameter(torch.empty(()))

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return self.proj(self.embed(ids, dtype)) * self.scale.to(dtype)                        # [B, T, K * D]


class Attention(nn.Module):
    """Causal grouped-query attention with normalised queries and keys, a gain per head, and optionally XSA.

    XSA (exclusive self-attention) removes from each head's output the part along the position's own value.
    """

    def __init__(self, cfg: Config, xsa: bool):
        super().__init__()
        self.heads, self.kv_heads, self.xsa = cfg.num_heads, cfg.num_kv_heads, xsa
        kv_width = cfg.num_kv_heads * cfg.head_dim
        self.c_q, self.c_k = Linear(cfg.model_dim, cfg.model_dim), Linear(cfg.model_dim, kv_width)
        self.c_v, self.proj = Linear(cfg.model_dim, kv_width), Linear(cfg.model_dim, cfg.model_dim)
        self.q_gain = nn.Parameter(torch.empty(cfg.num_heads))
        self.attend = sdpa_attention                                # the runtime's choice is set from outside

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], value_embedding: Tensor | None) -> Tensor:
        batch, time, width = x.shape
        values = self.c_v(x) if value_embedding is None else self.c_v(x) + value_embedding
        q = self.c_q(x).view(batch, time, self.heads, -1)                                       # [B, T, H, D]
        k, v = (y.view(batch, time, self.kv_heads, -1) for y in (self.c_k(x), values))          # [B, T, K, D]
        q = rotate(norm(q), *rotary) * self.q_gain.to(x.dtype).unsqueeze(-1)
        out = self.attend(q, rotate(norm(k), *rotary), v)                                       # [B, T, H, D]
        if self.xsa:
            own = F.normalize(v, dim=-1).unsqueeze(3)                                      # [B, T, K, 1, D]
            grouped = out.reshape(batch, time, self.kv_heads, -1, out.size(-1))            # [B, T, K, H/K, D]
            out = grouped - (grouped * own).sum(-1, keepdim=True) * own
        return self.proj(out.reshape(batch, time, width))


class MLP(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        hidden = int(cfg.mlp_mult * cfg.model_dim)
        self.slope = cfg.leaky_slope
        self.fc, self.proj = Linear(cfg.model_dim, hidden), Linear(hidden, cfg.model_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.leaky_relu(self.fc(x), self.slope).square())


class Block(nn.Module):
    """Mix in the embedding stream, then attention, then MLP, each with learned weights per dimension."""

    def __init__(self, cfg: Config, layer: int):
        super().__init__()
        self.attn = Attention(cfg, xsa=layer >= cfg.num_layers - cfg.xsa_last_n)
        self.mlp = MLP(cfg)
        self.attn_scale, self.mlp_scale = (nn.Parameter(torch.empty(cfg.model_dim)) for _ in range(2))
        self.resid_mix = nn.Parameter(torch.empty(2, cfg.model_dim)) if cfg.x0_mix else None
        self.ln_scale = 1 / math.sqrt(layer + 1) if cfg.ln_scale else None

    def normed(self, x: Tensor) -> Tensor:
        return norm(x) if self.ln_scale is None else norm(x) * self.ln_scale

    def forward(self, x: Tensor, x0: Tensor, rotary: tuple[Tensor, Tensor],
                value_embedding: Tensor | None) -> Tensor:
        if self.resid_mix is not None:
            keep, blend = self.resid_mix.to(x.dtype).unbind()
            x = keep * x + blend * x0
        x = x + self.attn_scale.to(x.dtype) * self.attn(self.normed(x), rotary, value_embedding)
        return x + self.mlp_scale.to(x.dtype) * self.mlp(self.normed(x))


# Matrices by shape that are gains by role: trained by Adam, kept in float32.
CONTROL_NAMES = ("resid_mix", "skip_weights")


class GPT(nn.Module):
    """The model. Parameters are float32; `compute_dtype` is the type of the stream, chosen by the runtime."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg, self.compute_dtype = cfg, torch.float32
        self.tok_emb = Table(cfg.vocab_size, cfg.model_dim)
        self.lm_head = None if cfg.tie_embeddings else Linear(cfg.model_dim, cfg.vocab_size)
        self.bigram = BigramHash(cfg) if cfg.bigram_vocab_size else None
        self.smear = Smear(cfg) if cfg.smear else None
        self.ve_shared = ValueEmbedding(cfg) if cfg.ve_layers else None
        self.ve_layer_scales = nn.ParameterList(torch.empty(()) for _ in cfg.ve_layers) \
            if cfg.ve_layers else None
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.num_layers))
        self.encoders = cfg.num_layers // 2                           # the first half pushes, the second pops
        self.skip_weights = nn.Parameter(torch.empty(self.encoders, cfg.model_dim)) \
            if cfg.unet_skips and self.encoders else None
        if not self.tok_emb.weight.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Each parameter from its own generator, seeded by (SEED, name): a new module changes no other."""
        for name, p in self.named_parameters():
            digest = hashlib.blake2b(f"{self.cfg.seed}/{name}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            p.copy_(initial_value(name, tuple(p.shape), self.cfg, generator))

    def hidden(self, ids: Tensor) -> Tensor:
        """ids [B, T] -> the stream after the final norm [B, T, D]."""
        cfg, dtype = self.cfg, self.compute_dtype
        x = self.tok_emb(ids, dtype)
        if self.bigram is not None:
            x = x + self.bigram(ids, dtype)
        x = norm(x)
        if self.smear is not None:
            x = self.smear(x, ids)
        x0, skips = x, []
        rotary = rotary_table(ids.size(1), cfg.rope_dims or cfg.head_dim, cfg.rope_base, ids.device)
        values = self.ve_shared(ids, dtype) if self.ve_shared is not None else None
        skip_weights = iter(self.skip_weights.to(dtype).unbind() if self.skip_weights is not None else ())
        for layer, block in enumerate(self.blocks):
            if layer >= self.encoders and skips:
                x = x + next(skip_weights) * skips.pop()
            own_values = values * self.ve_layer_scales[cfg.ve_layers.index(layer)].to(dtype) \
                if layer in cfg.ve_layers else None
            x = block(x, x0, rotary, own_values)
            if layer < self.encoders and self.skip_weights is not None:
                skips.append(x)
        return norm(x)

    def head(self, hidden: Tensor) -> Tensor:
        """[..., D] -> logits [..., V], float32, softcapped."""
        weight = self.tok_emb.weight if self.lm_head is None else self.lm_head.weight
        logits = F.linear(hidden, weight.to(hidden.dtype)).float()
        cap = self.cfg.logit_softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    def logits(self, ids: Tensor) -> Tensor:
        """ids [B, T] -> [B, T, V], float32, softcapped."""
        return self.head(self.hidden(ids))

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean nats per target: ids, targets [B, T] -> scalar."""
        return F.cross_entropy(self.logits(ids).flatten(0, 1), targets.flatten())


def initial_value(name: str, shape: tuple[int, ...], cfg: Config, generator: torch.Generator) -> Tensor:
    """A parameter's value at step 0. Matrices that write to the stream are zero: blocks start as identity."""
    def normal(std: float) -> Tensor:
        return torch.randn(shape, generator=generator) * std

    constants = {"q_gain": cfg.qk_gain_init, "attn_scale": 1.0, "mlp_scale": 1.0, "skip_weights": 1.0,
                 "smear.gate": 0.0, "bigram.scale": 0.05, "bigram.embed.weight": 0.0, "ve_shared.scale": 0.1,
                 "ve_shared.proj.weight": 0.0, "attn.proj.weight": 0.0, "mlp.proj.weight": 0.0,
                 "lm_head.weight": 0.0}
    for ending, value in constants.items():
        if name.endswith(ending):
            return torch.full(shape, value)
    if name.startswith("ve_layer_scales"):
        return torch.ones(shape)
    if name.endswith("resid_mix"):
        return torch.tensor([1.0, 0.0])[:, None].expand(shape).clone()
    if name == "tok_emb.weight":
        return normal(cfg.tied_embed_init_std if cfg.tie_embeddings else 1.0)
    if name == "ve_shared.embed.weight":
        return normal(0.01)
    bound = 1 / math.sqrt(shape[1])                                        # torch's default for linear layers
    return torch.rand(shape, generator=generator) * 2 * bound - bound


def training_flops(cfg: Config, model: GPT) -> float:
    """FLOPs a trained token costs: 6 per multiply-accumulate parameter, and the causal half of attention."""
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, Linear))
    head = cfg.vocab_size * cfg.model_dim if cfg.tie_embeddings else 0
    return 6.0 * (matrices + head) + 6.0 * cfg.num_layers * cfg.train_seq_len * cfg.model_dim


# ============================================================================================================
# 6. OPTIMIZER - Muon, which parameter goes where, schedules, weight averaging. Uses sections 1-2.
# ============================================================================================================

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)                    # Jordan 2024: steep at zero, hovering around one


def newton_schulz(matrices: Tensor, steps: int) -> Tensor:
    """Nearly each matrix's orthogonal factor: [G, R, C] -> same shape, singular values about 0.7 to 1.2."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, then orthogonalised updates, for matrices [R, C] only (Jordan 2024).

    Equal shapes are stacked; with a runtime of several processes each orthogonalises its share of every
    stack. The result does not depend on their number, and every process holds the whole momentum state.
    """

    def __init__(self, params: Any, lr: float, momentum: float, backend_steps: int = 5, nesterov: bool = True,
                 weight_decay: float = 0.0, runtime: Runtime | None = None):
        super().__init__(params, dict(lr=lr, momentum=momentum, backend_steps=backend_steps,
                                      nesterov=nesterov, weight_decay=weight_decay))
        self.runtime = runtime
        self.orthogonalize = runtime.compile(newton_schulz) if runtime else newton_schulz

    def _orthogonal(self, stack: Tensor, steps: int) -> Tensor:
        rt = self.runtime
        if rt is None:
            return self.orthogonalize(stack, steps)
        count, share = stack.size(0), -(-stack.size(0) // rt.world)
        stack = F.pad(stack, (0, 0, 0, 0, 0, share * rt.world - count))
        mine = self.orthogonalize(stack[rt.rank * share:(rt.rank + 1) * share].to(rt.dtype), steps)
        return rt.all_gather(mine)[:count]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum"] for p in params]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, grads)
            updates = torch._foreach_add(grads, buffers, alpha=group["momentum"]) \
                if group["nesterov"] else buffers
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            by_shape: dict[torch.Size, list[int]] = {}
            for index, p in enumerate(params):
                by_shape.setdefault(p.shape, []).append(index)
            for (rows, cols), members in by_shape.items():
                stack = self._orthogonal(torch.stack([updates[i] for i in members]), group["backend_steps"])
                rate = -group["lr"] * math.sqrt(max(1, rows / cols))
                torch._foreach_add_([params[i] for i in members], list(stack.to(params[0].dtype)), alpha=rate)


@dataclasses.dataclass(frozen=True)
class GroupRule:
    """Which parameters an optimizer group takes. The first match wins, so every parameter has one group."""

    name: str
    optimizer: str                                                      # muon or adam
    lr: str                                                            # the settings that hold rate and decay
    weight_decay: str
    matches: Callable[[str, Tensor, Config], bool]


GROUP_RULES = (
    GroupRule("head", "adam", "head_lr", "adam_wd", lambda name, p, cfg: name == "lm_head.weight"),
    GroupRule("embed", "adam", "embed_lr", "adam_wd",
              lambda name, p, cfg: name == "tok_emb.weight" and not cfg.tie_embeddings),
    GroupRule("tables", "adam", "tied_embed_lr", "adam_wd",
              lambda name, p, cfg: name.endswith(("tok_emb.weight", ".embed.weight"))),
    GroupRule("scalars", "adam", "scalar_lr", "adam_wd",
              lambda name, p, cfg: p.ndim < 2 or name.endswith(CONTROL_NAMES)),
    GroupRule("matrices", "muon", "matrix_lr", "muon_wd", lambda name, p, cfg: p.ndim == 2),
)


def parameter_groups(model: nn.Module, cfg: Config) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Group name -> (name, parameter) pairs; raises if a parameter fits no rule."""
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {rule.name: [] for rule in GROUP_RULES}
    for name, p in model.named_parameters():
        rule = next((rule for rule in GROUP_RULES if rule.matches(name, p, cfg)), None)
        if rule is None:
            raise ValueError(f"no optimizer group takes {name} {tuple(p.shape)}; add a rule to GROUP_RULES")
        groups[rule.name].append((name, p))
    return groups


def build_optimizers(model: nn.Module, cfg: Config, rt: Runtime) -> list[torch.optim.Optimizer]:
    members = parameter_groups(model, cfg)
    groups: dict[str, list[dict]] = {"muon": [], "adam": []}
    for rule in GROUP_RULES:
        if members[rule.name]:
            lr = getattr(cfg, rule.lr)
            groups[rule.optimizer].append(dict(params=[p for _, p in members[rule.name]], lr=lr, base_lr=lr,
                                               weight_decay=getattr(cfg, rule.weight_decay)))
    built: list[torch.optim.Optimizer] = []
    if groups["muon"]:
        built.append(Muon(groups["muon"], cfg.matrix_lr, cfg.muon_momentum, cfg.muon_backend_steps,
                          runtime=rt))
    if groups["adam"]:
        built.append(torch.optim.AdamW(groups["adam"], betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps,
                                       fused=rt.device.type != "mps"))
    return built


def warmdown(cfg: Config, step: int, steps_left: float) -> float:
    """Factor of every learning rate: 1, then straight to 0 over the last WARMDOWN_ITERS steps."""
    return min(1.0, max(steps_left, 0.0) / cfg.warmdown_iters) if cfg.warmdown_iters else 1.0


def momentum_warmup(cfg: Config, step: int, steps_left: float) -> float:
    """Muon's momentum: straight from its start value to MUON_MOMENTUM."""
    share = min(step / cfg.muon_momentum_warmup_steps, 1.0) if cfg.muon_momentum_warmup_steps else 1.0
    return (1 - share) * cfg.muon_momentum_warmup_start + share * cfg.muon_momentum


# Schedule stages: optimizer field -> pure function of (settings, steps done, steps left), before every step.
STAGES: dict[str, Callable[[Config, int, float], float]] = {"lr": warmdown, "momentum": momentum_warmup}


def apply_schedule(optimizers: Sequence[torch.optim.Optimizer], cfg: Config, step: int,
                   steps_left: float) -> None:
    values = {field: stage(cfg, step, steps_left) for field, stage in STAGES.items()}
    for group in itertools.chain.from_iterable(optimizer.param_groups for optimizer in optimizers):
        for field in values.keys() & group.keys():
            group[field] = group["base_lr"] * values["lr"] if field == "lr" else values[field]


class Averager:
    """Exponential moving average of the weights, float32, begun at the initial weights."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.live = decay, list(model.parameters())
        self.mean = [p.detach().clone() for p in self.live]

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self.mean, self.live, 1 - self.decay)

    @torch.no_grad()
    def apply(self) -> None:
        """The model's weights become the average."""
        torch._foreach_copy_(self.live, self.mean)


# ============================================================================================================
# 7. PACKING - a state dict to one self-describing file and back. Uses section 1 and tensor names, no model.
# ============================================================================================================

MAGIC, FORMAT_VERSION = b"PGOLF\r\n\x1a", 1
PREFIX = struct.Struct("<8sHIQ32s")                        # magic, version, header and payload bytes, SHA-256
MAX_HEADER_BYTES = 4 << 20
STREAMS = ("codes", "scales", "floats")                                 # the payload holds like next to like


class RowInt:
    """Whole numbers of a few bits, one float16 scale a row; each row's clip level has the least error."""

    def __init__(self, bits: int):
        self.top = 2 ** (bits - 1) - 1

    def sizes(self, shape: Sequence[int]) -> dict[str, int]:
        return {"codes": math.prod(shape), "scales": 2 * shape[0]}

    def encode(self, w: Tensor, importance: Tensor | None, clip_steps: int) -> dict[str, bytes]:
        """w [R, C]; importance [C] weighs the squared error by column (diagonal of a Hessian) or None."""
        best = torch.full((w.size(0),), math.inf)
        codes, scales = torch.zeros_like(w, dtype=torch.int8), torch.zeros(w.size(0), dtype=torch.float16)
        for step in range(clip_steps):
            clip = w.abs().amax(1) * (1 - 0.6 * step / clip_steps)
            scale = (clip / self.top).clamp(2.0 ** -24, 65504.0).half()
            tried = (w / scale.float()[:, None]).round().clamp(-self.top, self.top)
            error = (tried * scale.float()[:, None] - w).square()
            error = (error if importance is None else error * importance).sum(1)
            better = error < best
            best[better], scales[better], codes[better] = (
                error[better], scale[better], tried[better].to(torch.int8))
        return {"codes": codes.numpy().tobytes(), "scales": scales.numpy().tobytes()}

    def decode(self, parts: Mapping[str, bytes], shape: Sequence[int]) -> Tensor:
        codes = np.frombuffer(parts["codes"], np.int8).reshape(shape)
        scales = np.frombuffer(parts["scales"], "<f2").astype(np.float32)
        return torch.from_numpy(codes.astype(np.float32)) * torch.from_numpy(scales)[:, None]


class AsFloat:
    """A float type as it is."""

    def __init__(self, dtype: str):
        self.dtype = np.dtype(dtype)

    def sizes(self, shape: Sequence[int]) -> dict[str, int]:
        return {"floats": math.prod(shape) * self.dtype.itemsize}

    def encode(self, w: Tensor, importance: Tensor | None, clip_steps: int) -> dict[str, bytes]:
        return {"floats": w.numpy().astype(self.dtype).tobytes()}

    def decode(self, parts: Mapping[str, bytes], shape: Sequence[int]) -> Tensor:
        return torch.from_numpy(np.frombuffer(parts["floats"], self.dtype).reshape(shape).astype(np.float32))


QUANTIZERS = {f"int{bits}": RowInt(bits) for bits in range(2, 9)} | {
    "f16": AsFloat("<f2"), "f32": AsFloat("<f4")}


def _expand_zstd(data: bytes, size: int) -> bytes:
    if zstandard.get_frame_parameters(data).content_size != size:       # never trust it with an allocation
        raise InputError("the zstd frame names another size")
    return zstandard.ZstdDecompressor().decompress(data, max_output_size=size, allow_extra_data=False)


def _expand_stream(stream: Any, data: bytes, size: int) -> bytes:
    out = stream.decompress(data, size + 1)
    if not stream.eof or stream.unused_data:
        raise InputError("the compressed stream does not end where it should")
    return out


# Codec -> (compress, expand to a known size). Packed bits would defeat them: every symbol is one byte.
CODECS: dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes, int], bytes]]] = {
    "zstd": (lambda data: zstandard.ZstdCompressor(level=22).compress(data), _expand_zstd),
    "zlib": (lambda data: zlib.compress(data, 9),
             lambda data, size: _expand_stream(zlib.decompressobj(), data, size)),
    "lzma": (lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
             lambda data, size: _expand_stream(lzma.LZMADecompressor(memlimit=1 << 28), data, size)),
}


def tensor_role(name: str) -> str:
    """embed, table, attn, mlp or other: what QUANT_POLICY speaks of."""
    if name in ("tok_emb.weight", "lm_head.weight"):
        return "embed"
    return next((role for role, mark in (("table", ".embed."), ("attn", ".attn."), ("mlp", ".mlp."))
                 if mark in name), "other")


def quantizer_of(name: str, w: Tensor, cfg: Config) -> str:
    """The quantizer of a tensor: gains float32, small matrices float16, the rest by the policy."""
    if w.ndim != 2 or name.endswith(CONTROL_NAMES):
        return "f32"
    if w.numel() <= cfg.keep_float_max_numel:
        return "f16" if w.abs().max() < 65504 else "f32"
    return f"int{parse_policy(cfg)[tensor_role(name)]}"


def pack(state_dict: Mapping[str, Tensor], cfg: Config, hessians: Mapping[str, Tensor] | None = None,
         code_bytes: int = 0, notes: Mapping[str, Any] | None = None) -> bytes:
    """Weights and the settings that rebuild and score them as one file's bytes.

    hessians: name -> [C, C], whose diagonals weigh the clip search. code_bytes and notes (JSON) are recorded.
    Raises InputError for weights that are not finite.
    """
    parts: dict[str, list[bytes]] = {stream: [] for stream in STREAMS}
    table = []
    for name, w in state_dict.items():
        w = w.detach().to("cpu", torch.float32).contiguous()
        if not w.isfinite().all():
            raise InputError(f"{name}: has values that are not finite; nothing was packed")
        kind = quantizer_of(name, w, cfg)
        table.append([name, list(w.shape), kind])
        importance = hessians[name].diagonal().cpu().float() if hessians and name in hessians else None
        for stream, data in QUANTIZERS[kind].encode(w, importance, cfg.quant_clip_steps).items():
            parts[stream].append(data)
    settings = {**cfg.group("model", "pack", "score"), "eval_seq_len": cfg.score_len}
    header = zlib.compress(json.dumps(dict(
        config=settings, tensors=table, codec=cfg.compressor, code_bytes=code_bytes, notes=dict(notes or {})),
        separators=(",", ":")).encode(), 9)
    payload = CODECS[cfg.compressor][0](b"".join(itertools.chain.from_iterable(parts[s] for s in STREAMS)))
    digest = hashlib.sha256(header + payload).digest()
    return PREFIX.pack(MAGIC, FORMAT_VERSION, len(header), len(payload), digest) + header + payload


def read_header(blob: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the still compressed payload of an artifact, lengths and checksum verified."""
    if len(blob) < PREFIX.size:
        raise InputError(f"artifact: {len(blob)} bytes, shorter than the {PREFIX.size}-byte prefix")
    magic, version, header_bytes, payload_bytes, digest = PREFIX.unpack_from(blob)
    if magic != MAGIC:
        raise InputError(f"artifact: begins with {magic!r}, expected {MAGIC!r}")
    if version != FORMAT_VERSION:
        raise InputError(f"artifact: format version {version}; this program reads {FORMAT_VERSION}")
    wanted = PREFIX.size + header_bytes + payload_bytes
    if len(blob) != wanted:
        raise InputError(f"artifact: {len(blob)} bytes, its prefix says {wanted} (cut short or extended)")
    if hashlib.sha256(blob[PREFIX.size:]).digest() != digest:
        raise InputError("artifact: wrong checksum, the file is damaged")
    header_end = PREFIX.size + header_bytes
    try:
        stream = zlib.decompressobj()
        header = json.loads(stream.decompress(blob[PREFIX.size:header_end], MAX_HEADER_BYTES))
        if not stream.eof or not isinstance(header, dict):
            raise ValueError("header too long or no JSON object")
    except (zlib.error, ValueError, RecursionError) as error:
        raise InputError(f"artifact: unreadable header ({error})") from None
    return header, blob[header_end:]


def _read_config(stored: Any) -> Config:
    if not isinstance(stored, dict) or not all(f"{name}".upper() in FIELDS for name in stored):
        raise InputError("artifact: its settings are not those of this program (made by another version?)")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
    for name, value in values.items():
        wanted = type(FIELDS[name.upper()].default)
        if type(value) is not wanted and not (wanted is float and type(value) is int):
            raise InputError(f"artifact: setting {name.upper()}={value!r} has the wrong type")
    problems = check_config(Config(**values))
    if problems:
        raise InputError("artifact: " + "; ".join(problems))
    return Config(**values)


def _payload_sizes(table: Any, payload_bytes: int) -> dict[str, int]:
    """Bytes of each stream that the tensor table asks for; refuses absurd claims before any allocation."""
    sizes = dict.fromkeys(STREAMS, 0)
    try:
        for name, shape, kind in table:
            if not isinstance(name, str) or not all(type(n) is int and 0 < n < 2 ** 31 for n in shape) or \
                    kind.startswith("int") and len(shape) != 2:
                raise ValueError(f"{name} {shape} {kind}")
            for stream, size in QUANTIZERS[kind].sizes(shape).items():
                sizes[stream] += size
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise InputError(f"artifact: bad tensor table ({error})") from None
    limit = (64 << 20) + 256 * payload_bytes
    if sum(sizes.values()) > limit:
        raise InputError(f"artifact: claims {sum(sizes.values())} bytes of weights in {payload_bytes} "
                         "bytes of payload")
    return sizes


def _expand(blob: bytes) -> tuple[dict[str, Any], Iterator[tuple[str, list[int], str, dict[str, bytes]]]]:
    """The header, and (name, shape, quantizer, parts) of every tensor."""
    header, payload = read_header(blob)
    sizes = _payload_sizes(header.get("tensors"), len(payload))
    codec, total = header.get("codec"), sum(sizes.values())
    if codec not in CODECS:
        raise InputError(f"artifact: codec {codec!r}; this program has {', '.join(CODECS)}")
    try:
        raw = CODECS[codec][1](payload, total)
    except (zstandard.ZstdError, zlib.error, lzma.LZMAError, InputError) as error:
        raise InputError(f"artifact: the {codec} payload cannot be expanded ({error})") from None
    if len(raw) != total:
        raise InputError(f"artifact: the payload expands to {len(raw)} bytes, the tensors need {total}")

    def tensors() -> Iterator[tuple[str, list[int], str, dict[str, bytes]]]:
        at = dict(zip(STREAMS, itertools.accumulate([0, *sizes.values()])))
        for name, shape, kind in header["tensors"]:
            parts = {}
            for stream, size in QUANTIZERS[kind].sizes(shape).items():
                parts[stream] = raw[at[stream]:at[stream] + size]
                at[stream] += size
            yield name, shape, kind, parts

    return header, tensors()


def unpack(blob: bytes) -> tuple[Config, dict[str, Tensor]]:
    """An artifact's settings and float weights, or InputError; runs nothing, allocates only what is there."""
    header, tensors = _expand(blob)
    cfg, weights = _read_config(header.get("config")), {}
    for name, shape, kind, parts in tensors:
        weights[name] = QUANTIZERS[kind].decode(parts, shape)
        if not weights[name].isfinite().all():
            raise InputError(f"artifact: {name} has values that are not finite")
    return cfg, weights


def size_report(blob: bytes, code_bytes: int, cap: int) -> list[str]:
    """Log lines: bytes of code, model and both, the margin, the largest tensors by their symbols' entropy."""
    header, tensors = _expand(blob)
    rows = []
    for name, shape, kind, parts in tensors:
        counts = np.bincount(np.frombuffer(b"".join(parts.values()), np.uint8), minlength=256)
        shares = counts[counts > 0] / counts.sum()
        rows.append((float(-(shares * np.log2(shares)).sum()) * counts.sum() / 8, name, shape, kind))
    total, codec = len(blob) + code_bytes, header["codec"]
    return [f"Code size: {code_bytes} bytes", f"Serialized model {codec}: {len(blob)} bytes",
            f"Total submission size {codec}: {total} bytes",
            f"size_cap:{cap} margin:{cap - total} bytes" + ("" if total <= cap else " OVER THE CAP")] + \
        [f"  about {size:9.0f} bytes  {kind:5} {name} {shape}"
         for size, name, shape, kind in sorted(rows, reverse=True)[:5]]


# ============================================================================================================
# 8. SCORING - windows, the score-first harness, predictors. Uses sections 1-5.
# ============================================================================================================


@dataclasses.dataclass(frozen=True)
class Windows:
    """Which targets each window scores: target j is tokens[j + 1], predicted from tokens[..j].

    Window k reads inputs k * stride .. k * stride + seq_len - 1. Window 0 scores all its targets, later ones
    those that no earlier window has; the last may be short. So every target is scored once, for any n.
    """

    targets: int
    seq_len: int
    stride: int

    @property
    def count(self) -> int:
        return 1 + max(0, -(-(self.targets - self.seq_len) // self.stride))

    def scored(self, k: int) -> tuple[int, int]:
        """First target of window k and the one after its last."""
        start = k * self.stride
        return (start + self.seq_len - self.stride if k else 0), min(start + self.seq_len, self.targets)

    def of(self, target: int) -> int:
        """The window that scores a target."""
        return max(0, -(-(target + 1 - self.seq_len) // self.stride))

    def units(self, batch: int, chunk: int = 0) -> Iterator[list[range]]:
        """Batches of windows of one shape, as lists per chunk of `chunk` targets (0 = one chunk)."""
        edges = [k for k in range(1, self.count if chunk else 1)
                 if self.scored(k)[0] // chunk != self.scored(k - 1)[0] // chunk]
        for lo, hi in itertools.pairwise([0, *edges, self.count]):
            first = [range(0, 1)] if lo == 0 and self.stride < self.seq_len else []
            yield first + [range(k, min(k + batch, hi)) for k in range(lo + len(first), hi, batch)]


@dataclasses.dataclass(frozen=True)
class Batch:
    """A unit of windows on the device. Row b scores its last S inputs, `valid[b]` of them real targets."""

    ids: Tensor                                                         # [B, T], zero-padded at the right
    targets: Tensor                                                     # [B, S]
    first: np.ndarray                                                   # [B] index of the row's first target
    valid: np.ndarray                                                   # [B]


def make_batch(tokens: np.ndarray, windows: Windows, unit: range, rows: int, rt: Runtime) -> Batch:
    """The unit's windows, the last repeated up to `rows` so that all batches but the first have one shape."""
    rows = 1 if unit[0] == 0 and windows.stride < windows.seq_len else rows
    ks = [min(k, unit[-1]) for k in range(unit[0], unit[0] + rows)]
    scored = np.array([windows.scored(k) for k in ks])
    width = windows.seq_len if unit[0] == 0 else windows.stride
    inputs = np.array(ks)[:, None] * windows.stride + np.arange(windows.seq_len)                 # [B, T]
    targets = scored[:, :1] + 1 + np.arange(width)                                               # [B, S]
    valid = np.where(np.arange(rows) < len(unit), scored[:, 1] - scored[:, 0], 0)

    def pick(index: np.ndarray, end: int) -> Tensor:
        return rt.put(np.where(index < end, tokens[np.minimum(index, end - 1)], 0).astype(np.int64))

    return Batch(pick(inputs, windows.targets), pick(targets, windows.targets + 1), scored[:, 0], valid)


class Sliding:
    """The plain model over windows: the base of every predictor.

    score(batch, counts) -> nats [B, S]; full(batch, counts) -> log p over V [B, S, V] (audit);
    next(prefix, counts) -> log p after it [V]; the harness calls observe(tokens) with committed tokens only.
    """

    normalised, chunk = True, 0                                  # chunk: targets between two calls of observe

    def __init__(self, model: GPT, rt: Runtime, name: str, seq_len: int, stride: int):
        self.model, self.rt, self.name, self.seq_len, self.stride = model, rt, name, seq_len, stride
        self.hidden = rt.compile(model.hidden)

    @torch.inference_mode()
    def score(self, batch: Batch, counts: Any = None) -> Tensor:
        logits = self.model.head(self.hidden(batch.ids)[:, -batch.targets.size(1):])             # [B, S, V]
        return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(),
                               reduction="none").view_as(batch.targets)

    @torch.inference_mode()
    def full(self, batch: Batch, counts: Any = None) -> Tensor:
        logits = self.model.head(self.hidden(batch.ids)[:, -batch.targets.size(1):])
        return F.log_softmax(logits.cpu().double(), dim=-1)                                      # [B, S, V]

    @torch.inference_mode()
    def next(self, prefix: np.ndarray, counts: Any = None) -> Tensor:
        start = Windows(len(prefix), self.seq_len, self.stride).of(len(prefix) - 1) * self.stride
        ids = self.rt.put(np.asarray(prefix[start:], dtype=np.int64)[None])
        return F.log_softmax(self.model.head(self.model.hidden(ids)[0, -1]).cpu().double(), dim=-1)

    def observe(self, tokens: np.ndarray) -> None:
        """Nothing to learn: the predictor is fixed."""

    def snapshot(self) -> Any:
        return None

    def restore(self, state: Any) -> None:
        """Nothing to restore."""


@dataclasses.dataclass
class Score:
    """What a predictor was charged. nats: [n] float32, one per target; events: what happened, in order."""

    name: str
    windows: Windows
    nats: np.ndarray
    sizes: np.ndarray                                                   # bytes of each target
    normalised: bool
    complete: bool                                                      # the whole validation set
    seconds: float
    coverage: np.ndarray                                                # how often each target was charged
    events: list[tuple[str, int, int]]
    running: np.ndarray                                                 # this process's nats and bytes so far
    loss: float = 0.0                                                   # mean nats, from float64 sums
    bpb: float = 0.0

    @property
    def label(self) -> str:
        return "val_bpb" if self.normalised and self.complete else \
            "partial_bpb" if self.normalised else "unnormalised_score"

    def record(self) -> dict[str, Any]:
        return {"metric": self.label, self.label: self.bpb,
                "val_loss" if self.label == "val_bpb" else "loss": self.loss, "normalised": self.normalised,
                "complete": self.complete, "tokens": len(self.nats),
                "bytes": int(self.sizes.sum(dtype=np.int64)), "seconds": round(self.seconds, 3)}


def batch_rows(cfg: Config, rt: Runtime, windows: Windows) -> int:
    """Windows a scoring batch: EVAL_BATCH_TOKENS, else a power of two of tokens for half the free memory.

    Rank 0 decides: the units of work must be the same everywhere.
    """
    tokens = cfg.eval_batch_tokens
    if not tokens:
        per_token = 4 * (24 * cfg.model_dim + 4 * cfg.vocab_size * windows.stride / windows.seq_len)
        cap = 1 << 19 if rt.device.type == "cuda" else 1 << 14  # beyond it GPUs are full, CPU caches long ago
        tokens = min(cap, 1 << int(math.log2(max(rt.free_memory() / 2 / per_token, 1))))
    rows = min(max(1, tokens // windows.seq_len), windows.count)
    return int(rt.sum_(torch.tensor([rows if rt.main else 0])))


def evaluate(predictor: Any, tokens: np.ndarray, table: ByteTable, cfg: Config, rt: Runtime, ledger: Ledger
             ) -> Score | None:
    """Scores every target once, in order: score -> commit -> observe. None: it would not fit the time.

    Units of work are the same for any number of processes; one without work repeats the last and drops it.
    """
    windows = Windows(len(tokens) - 1, predictor.seq_len, predictor.stride)
    rows = batch_rows(cfg, rt, windows)
    score = Score(predictor.name, windows, np.zeros(windows.targets, np.float32),
                  table.count(tokens), predictor.normalised, not cfg.val_tokens, 0.0,
                  np.zeros(windows.targets, np.uint8), [], np.zeros(2))
    with ledger.phase(predictor.name):
        start, rounds = time.perf_counter(), 0
        chunks = list(windows.units(rows, predictor.chunk))
        total_rounds = sum(-(-len(units) // rt.world) for units in chunks)
        for units in chunks:
            lo, hi = windows.scored(units[0][0])[0], windows.scored(units[-1][-1])[1]
            for at in range(0, len(units), rt.world):
                unit = units[min(at + rt.rank, len(units) - 1)]
                batch = make_batch(tokens, windows, unit, rows, rt)
                nats = predictor.score(batch)
                if at + rt.rank < len(units):
                    _charge(score, batch, nats)
                rounds += 1
                if rounds == 3 and not _fits(start, total_rounds / 3, cfg, rt, ledger):
                    return None
                _show_progress(score, rounds / total_rounds, time.perf_counter() - start, ledger)
            score.events.append(("score", lo, hi))
            predictor.observe(tokens[lo:hi + 1])
            score.events.append(("observe", lo, hi))
        _reduce(score, rt)
        score.seconds = time.perf_counter() - start
    ledger.progress("", last=True)
    return score


def _charge(score: Score, batch: Batch, nats: Tensor) -> None:
    index = batch.first[:, None] + np.arange(nats.size(1))                                       # [B, S]
    real = np.arange(nats.size(1)) < batch.valid[:, None]
    index, values = index[real], nats.float().cpu().numpy()[real]
    score.nats[index] = values
    score.coverage[index] += 1
    score.running += values.sum(dtype=np.float64), score.sizes[index].sum(dtype=np.int64)


def _fits(start: float, rounds: float, cfg: Config, rt: Runtime, ledger: Ledger) -> bool:
    """Whether the stage, at the pace since start, ends within MAX_EVAL_SECONDS; rank 0 decides for all."""
    needed = (time.perf_counter() - start) * rounds
    left = cfg.max_eval_seconds - ledger.side("eval")
    verdict = torch.tensor([float(rt.main and cfg.max_eval_seconds > 0 and needed > left)],
                           dtype=torch.float64)
    if rt.sum_(verdict).item():
        ledger.log(f"scoring stage skipped: it needs about {needed:.0f} s, "
                   f"MAX_EVAL_SECONDS leaves {left:.0f} s")
        return False
    return True


def _show_progress(score: Score, share: float, seconds: float, ledger: Ledger) -> None:
    bpb = score.running[0] / math.log(2) / max(score.running[1], 1)
    left = seconds / share - seconds
    ledger.progress(f"{score.name}: {100 * share:.0f}% running_bpb:{bpb:.4f} eta:{left:.0f}s")


def _reduce(score: Score, rt: Runtime) -> None:
    """One reduction of the charges, then float64 sums."""
    score.nats = rt.sum_(torch.from_numpy(score.nats)).numpy()
    score.coverage = rt.sum_(torch.from_numpy(score.coverage)).numpy()
    total = score.nats.sum(dtype=np.float64)
    score.loss = float(total / len(score.nats))
    score.bpb = float(total / math.log(2) / score.sizes.sum(dtype=np.int64))


def sample(model: GPT, table: ByteTable, cfg: Config, rt: Runtime) -> str:
    """Text the model writes after SAMPLE_PROMPT, drawn at SAMPLE_TEMPERATURE with SEED."""
    predictor = Sliding(model, rt, "sample", cfg.score_len, max(1, cfg.score_len // 2))
    generator = torch.Generator().manual_seed(cfg.seed)
    tokens = [cfg.bos_id, *table.encode(cfg.sample_prompt)]
    for _ in range(cfg.sample_tokens or 200):
        chances = torch.softmax(predictor.next(np.array(tokens)) / cfg.sample_temperature, dim=-1)
        tokens.append(int(torch.multinomial(chances, 1, generator=generator)))
    documents = [[*part] for is_start, part in itertools.groupby(tokens, cfg.bos_id.__eq__) if not is_start]
    return "\n\n".join(table.decode(part).decode(errors="replace") for part in documents)


# ============================================================================================================
# 9. TRAINING - warm-up, the loop, the stop rule, checkpoint and resume. Validation comes in as a callback.
# ============================================================================================================


@dataclasses.dataclass(frozen=True)
class Report:
    """What every process knows of a finished step. The same everywhere, so decisions need no agreement."""

    step: int
    elapsed: float                                                      # rank 0's training seconds
    loss: float                                                         # mean over the whole batch
    diverged: bool
    stop: bool
    save: bool


class Trainer:
    """Model, optimizers and clock of one run; `run` trains and says how it ended."""

    def __init__(self, cfg: Config, rt: Runtime, ledger: Ledger, model: GPT, stream: TokenStream):
        self.cfg, self.rt, self.ledger, self.model, self.stream = cfg, rt, ledger, model, stream
        self.loss_of = rt.compile(model)
        params = list(model.parameters())
        self.grads = torch.zeros(sum(p.numel() for p in params), device=rt.device)
        for p, part in zip(params, self.grads.split([p.numel() for p in params])):
            p.grad = part.view_as(p)                                    # one buffer: one reduction, one norm
        self.optimizers = build_optimizers(model, cfg, rt)
        self.averager = Averager(model, cfg.ema_decay) if cfg.ema_decay else None
        self.step, self.origin, self.last = 0, 0.0, Report(0, 0.0, math.nan, False, False, False)
        self.in_flight: deque[tuple[int, Callable[[], list[float]]]] = deque()
        self.durations: deque[float] = deque(maxlen=32)
        self.clocked = cfg.schedule == "clock" and cfg.max_wallclock_seconds > 0
        self.stop_requested = self.save_requested = False

    def elapsed(self) -> float:
        """Seconds of training so far, pauses left out."""
        return time.perf_counter() - self.origin

    def steps_left(self) -> float:
        """Steps until the end, from what all processes know."""
        by_count, last = self.cfg.iterations - self.step, self.last
        if not self.clocked:
            return by_count
        pace = last.elapsed / max(last.step, 1) or 1e-9              # nothing known yet: as if at full speed
        return min(by_count, (self.cfg.max_wallclock_seconds - last.elapsed) / pace - (self.step - last.step))

    def out_of_time(self) -> bool:
        """Whether one more step could end after the cap: steps in flight at report, since then, the next."""
        if not self.clocked or not self.durations:
            return False
        needed = 1.1 * max(self.durations) * (2 * self.rt.lag + 1)
        return self.last.elapsed + needed > self.cfg.max_wallclock_seconds

    def train_step(self, batch_of: Callable[[int], tuple[np.ndarray, np.ndarray]]) -> Tensor:
        """One optimizer step -> this process's part of the mean loss. Nothing here waits for the device."""
        cfg, rt = self.cfg, self.rt
        apply_schedule(self.optimizers, cfg, self.step, self.steps_left())
        self.grads.zero_()
        total = torch.zeros((), device=rt.device)
        for micro in range(rt.rank, cfg.micro_batches, rt.world):
            ids, targets = map(rt.put, batch_of(self.step * cfg.micro_batches + micro))
            loss = self.loss_of(ids, targets) / cfg.micro_batches
            loss.backward()
            total += loss.detach()
        rt.sum_(self.grads)
        if cfg.grad_clip_norm:
            self.grads.mul_((cfg.grad_clip_norm / (self.grads.norm() + 1e-6)).clamp(max=1.0))
        for optimizer in self.optimizers:
            optimizer.step()
        return total

    def warm_up(self) -> None:
        """WARMUP_STEPS steps on random tokens, so that all is compiled; then all state is as before."""
        cfg, rng = self.cfg, np.random.default_rng(0)
        weights = [p.detach().clone() for p in self.model.parameters()]

        def noise(unit: int) -> tuple[np.ndarray, np.ndarray]:
            ids = rng.integers(0, cfg.vocab_size, (cfg.micro_tokens // cfg.train_seq_len, cfg.train_seq_len))
            return ids, ids

        for _ in range(cfg.warmup_steps):
            self.train_step(noise)
        with torch.no_grad():
            torch._foreach_copy_(list(self.model.parameters()), weights)
        self.optimizers = build_optimizers(self.model, cfg, self.rt)
        self.rt.sync()

    def run(self, validate: Callable[[int], None]) -> str:
        """Trains to the end. Returns finished, wallclock_cap, interrupted or diverged."""
        handlers = {sig: signal.signal(sig, self._on_signal) for sig in self._signals()}
        self.origin = time.perf_counter() - self.last.elapsed
        try:
            with self.ledger.phase("train"):
                status = self._loop(validate)
                self.rt.sync()
                self.seconds = self.elapsed()
        finally:
            for sig, handler in handlers.items():
                signal.signal(sig, handler)
        self.ledger.log(f"training {status}: step:{self.step}/{self.cfg.iterations} "
                        f"train_time:{self.seconds * 1000:.0f}ms")
        return status

    def _loop(self, validate: Callable[[int], None]) -> str:
        cfg, status = self.cfg, None
        while True:
            if self.step >= cfg.iterations:
                status = "finished"
            elif self.out_of_time():
                status = "wallclock_cap"
                self.ledger.log(f"stopping_early: wallclock_cap train_time:{self.elapsed() * 1000:.0f}ms "
                                f"step:{self.step}/{cfg.iterations}")
            if status:
                self._read_reports(0)                                   # the last steps may have diverged
                status = "diverged" if self.last.diverged else status
            if status != "diverged" and cfg.val_loss_every and (
                    status or self.step % cfg.val_loss_every == 0):
                with self._paused("validate"):
                    validate(self.step)
            if status:
                return status
            loss = self.train_step(lambda unit: self.stream.batch(unit, cfg))
            self.step += 1
            if self.averager:
                self.averager.update()
            self._post_report(loss)
            self._read_reports(self.rt.lag)
            if self.last.diverged:
                return "diverged"
            if self.last.stop or self.last.save or cfg.save_every and self.step % cfg.save_every == 0:
                with self._paused("checkpoint"):
                    self.save_checkpoint()
                if self.last.stop:
                    return "interrupted"
                self.last = dataclasses.replace(self.last, save=False)

    def _post_report(self, loss: Tensor) -> None:
        values = [self.elapsed() if self.rt.main else 0.0, loss, (~loss.isfinite()).double(),
                  float(self.stop_requested), float(self.save_requested)]
        self.save_requested = False
        self.in_flight.append((self.step, self.rt.start_sum(values)))

    def _read_reports(self, lag: int) -> None:
        """Takes in what steps up to `lag` ago reported, and logs it."""
        while self.in_flight and self.in_flight[0][0] <= self.step - lag:
            step, result = self.in_flight.popleft()
            elapsed, loss, bad, stop, save = result()
            self.durations.append(elapsed - self.last.elapsed)
            self.last = Report(step, elapsed, loss, self.last.diverged or bad > 0 or not math.isfinite(loss),
                               self.last.stop or stop > 0, self.last.save or save > 0)
            if self.cfg.train_log_every and (
                    step <= 10 or step % self.cfg.train_log_every == 0) or self.last.diverged:
                self.ledger.log(f"step:{step}/{self.cfg.iterations} train_loss:{loss:.4f} "
                                f"train_time:{elapsed * 1000:.0f}ms step_avg:{elapsed * 1000 / step:.2f}ms")
            self.ledger.metric(step=step, train_loss=loss, train_seconds=round(elapsed, 4))

    @contextlib.contextmanager
    def _paused(self, phase: str) -> Iterator[None]:
        """Stops the training clock for something that touches no training data."""
        self.rt.sync()
        begin = time.perf_counter()
        with self.ledger.phase(phase):
            yield
            self.rt.sync()
        self.origin += time.perf_counter() - begin

    def _signals(self) -> list[int]:
        return [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]

    def _on_signal(self, number: int, frame: Any) -> None:
        if number == signal.SIGTERM:
            self.stop_requested = True
        self.save_requested = True

    def save_checkpoint(self) -> None:
        """checkpoint.pt in OUT_DIR: all that the next step depends on."""
        state = dict(settings={**self.cfg.group("model", "train", "optim"), "seed": self.cfg.seed},
                     step=self.step, elapsed=self.elapsed(), model=self.model.state_dict(),
                     mean=self.averager and self.averager.mean,
                     optimizers=[optimizer.state_dict() for optimizer in self.optimizers])
        if self.rt.main:
            save_torch(self.ledger.out_dir / "checkpoint.pt", state)
        self.ledger.log(f"checkpoint: {self.ledger.out_dir / 'checkpoint.pt'} at step {self.step}")
        self.rt.barrier()

    def resume(self, path: Path) -> None:
        """Continues from a checkpoint. Raises InputError if it is not one or belongs to another model."""
        state = load_torch(path)
        try:
            differing = {name for name, value in self.cfg.group("model", "train", "optim").items()
                         if state["settings"][name] != value}
            wrong = [name.upper() for name in differing & self.cfg.group("model").keys()]
            if wrong:
                raise InputError(f"RESUME={path}: made with other values of {', '.join(sorted(wrong))}")
            self.model.load_state_dict(state["model"])
            for optimizer, stored in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(stored)
            if self.averager:
                for mean, stored in zip(self.averager.mean, state["mean"], strict=True):
                    mean.copy_(stored)
            self.step, elapsed = state["step"], state["elapsed"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise error if isinstance(error, InputError) else InputError(
                f"RESUME={path}: unusable ({error})") from None
        self.last = Report(self.step, elapsed, math.nan, False, False, False)
        self.ledger.log(f"resumed:{path} step:{self.step} train_time:{elapsed * 1000:.0f}ms" +
                        (f" changed settings: {', '.join(sorted(n.upper() for n in differing))}"
                         if differing else ""))


def save_torch(path: Path, state: Any) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    atomic_write(path, buffer.getvalue())


def load_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types for damaged files
        raise InputError(
            f"{path}: cannot be read ({type(error).__name__}: {str(error).splitlines()[0]})") from None


# ============================================================================================================
# 10. AUDIT - what makes a score believable, tested on the score itself. Uses sections 3-8; changes nothing.
# ============================================================================================================


LOOPBACK = ("127.0.0.1", "::1", "localhost")
Verdict = tuple[str | None, dict[str, Any]]                             # what is wrong, or None; the figures


class AccessWatch:
    """Files opened and other hosts contacted while it watches (a Python audit hook)."""

    def __init__(self) -> None:
        self.mark, self.seen = "", []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple) -> None:
        if not self.mark:
            return
        if event == "open" and self.mark in str(args[0]):
            self.seen.append(f"opened {Path(args[0]).name}")
        elif event == "socket.connect" and isinstance(args[1], tuple) and args[1][0] not in LOOPBACK:
            self.seen.append(f"connected to {args[1][0]}")

    @contextlib.contextmanager
    def watching(self, mark: str) -> Iterator[list[str]]:
        """Yields the list of what is seen: files with `mark` in their path, hosts."""
        self.mark, self.seen = mark, []
        try:
            yield self.seen
        finally:
            self.mark = ""


@functools.cache
def access_watch() -> AccessWatch:
    """One hook a process: Python cannot take an audit hook back."""
    return AccessWatch()


def audit_bytes(tokens: np.ndarray, table: ByteTable, bos: int, sample_tokens: int = 1 << 20) -> Verdict:
    """The byte table against the decoded text, by document, over the first tokens."""
    tokens, documents = tokens[:sample_tokens], 0
    starts = np.flatnonzero(tokens == bos)
    counted = np.concatenate(([0], np.cumsum(table.count(tokens))))
    for lo, hi in itertools.pairwise([*starts, len(tokens)]):
        text, documents = len(table.decode(tokens[lo + 1:hi])), documents + 1
        if hi < len(tokens) and counted[hi - 1] - counted[lo] != text:
            return f"document at token {lo}: counted {counted[hi - 1] - counted[lo]}, decoded {text}", {}
    return None, {"documents": documents}


def audit_order(events: Sequence[tuple[str, int, int]]) -> Verdict:
    """No token may be observed before it was charged (C3), and charges go left to right (C4)."""
    charged = 0
    for kind, lo, hi in events:
        if kind == "score":
            if lo != charged:
                return f"scored from target {lo}, expected {charged}", {}
            charged = hi
        elif hi > charged:
            return f"observed up to target {hi}, charged only up to {charged}", {}
    return None, {"events": len(events)}


def audit_future(predictor: Any, batch: Batch, vocab: int) -> Verdict:
    """Other tokens after a position must not change what is charged up to it (C1): two positions."""
    before = predictor.score(batch).float()
    size, moved = batch.targets.size(1), 0.0
    for last in (size // 3, 2 * size // 3):
        ids, targets = batch.ids.clone(), batch.targets.clone()
        cut = last + ids.size(1) - size                                 # the input that predicts it
        ids[:, cut + 1:] = (ids[:, cut + 1:] + 1) % vocab
        targets[:, last + 1:] = (targets[:, last + 1:] + 1) % vocab
        after = predictor.score(dataclasses.replace(batch, ids=ids, targets=targets)).float()
        moved = max(moved, (after - before)[:, :last + 1].abs().max().item())
    problem = f"changing later tokens moves charges by {moved:.2g} nats" if moved > 1e-4 else None
    return problem, {"nats": moved}


def audit_distribution(predictor: Any, batch: Batch, nats: np.ndarray, tolerance: float) -> Verdict:
    """At 256 positions the probabilities sum to one and the target's entry is what was charged (C2)."""
    real = np.argwhere(np.arange(batch.targets.size(1)) < batch.valid[:, None])
    rows, at = real[np.linspace(0, len(real) - 1, min(256, len(real))).astype(int)].T
    log_p = predictor.full(batch)[rows, at]                                                      # [256, V]
    total = torch.logsumexp(log_p, -1).abs().max().item()
    entries = log_p.gather(1, batch.targets.cpu()[rows, at][:, None]).squeeze(1).numpy()
    gap = float(np.abs(entries + nats[batch.first[rows] + at]).max())
    problem = f"log of the sum over the vocabulary is off by {total:.2g}, the charge from its entry by " \
              f"{gap:.2g} nats" if total > tolerance or gap > tolerance else None
    return problem, {"positions": len(rows), "log_sum": total, "entry_gap": gap}


def audit(score: Score, predictor: Any, tokens: np.ndarray, table: ByteTable, cfg: Config, rt: Runtime,
          stages: Mapping[str, float], accessed: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Check -> verdict (PASS, or FAIL / WARN and the reason) and figures. Costs a few batches."""
    middle, last = score.windows.count // 2, score.windows.count - 1
    unit = range(middle, min(middle + -(-256 // score.windows.stride), last) + (middle == last))
    batch = make_batch(tokens, score.windows, unit, len(unit), rt)
    tolerance = 1e-4 if rt.dtype == torch.float32 else 0.05        # bf16 products differ between batch shapes
    targets, once = len(tokens) - 1, int((score.coverage == 1).sum())
    recount = float(score.nats.sum(dtype=np.float64) / math.log(2) / table.count(tokens).sum())
    checks = {
        "coverage": (None if once == len(score.nats) == targets else
                     f"{once} of {targets} targets charged exactly once", {"charged_once": once}),
        "bytes": audit_bytes(tokens, table, cfg.bos_id),
        "byte_algebra": (None if abs(recount - score.bpb) < 1e-9 else
                         f"recount gives {recount}, reported {score.bpb}", {"recount": recount}),
        "order": audit_order(score.events),
        "future": audit_future(predictor, batch, cfg.vocab_size),
        "distribution": audit_distribution(predictor, batch, score.nats, tolerance),
        "access": ("; ".join(accessed) or None, {"seen": len(accessed)}),
    }
    verdicts = {name: {"verdict": f"FAIL: {problem}" if problem else "PASS", **figures}
                for name, (problem, figures) in checks.items()}
    gain = max(stages.values(), default=score.bpb) - score.bpb
    doubt = f"gains {gain:.4f} bpb over another stage" if gain > 0.03 else \
        "below 0.9 bpb" if score.bpb < 0.9 else ""
    return {**verdicts, "plausibility": {"verdict": f"WARN: {doubt}" if doubt else "PASS", "gain": gain}}


# ============================================================================================================
# 11. MAIN - modes, results, exit codes. The only section that reads the environment or the command line.
# ============================================================================================================

OK, BUG, OVER_SIZE, OUT_OF_MEMORY, DIVERGED, OVER_TIME, AUDIT_FAILED, BAD_INPUT, INTERRUPTED = (
    0, 1, 2, 3, 4, 5, 6, 64, 143)
TESTED_TORCH = "2.13"

# Scoring stages in order: name -> whether the settings ask for it, and the predictor. The last is the result.
PREDICTORS: dict[str, tuple[Callable[[Config], bool], Callable[[GPT, Runtime, Config], Any]]] = {
    "plain": (lambda cfg: cfg.eval_plain or not 0 < cfg.eval_stride < cfg.score_len,
              lambda model, rt, cfg: Sliding(model, rt, "plain", cfg.score_len, cfg.score_len)),
    "sliding": (lambda cfg: 0 < cfg.eval_stride < cfg.score_len,
                lambda model, rt, cfg: Sliding(model, rt, "sliding", cfg.score_len, cfg.eval_stride)),
}


def build_model(cfg: Config, rt: Runtime, weights: Mapping[str, Tensor] | None = None) -> GPT:
    """The model on its device, at its start or with given weights; InputError if they are not its own."""
    if weights is None:
        model = GPT(cfg).to(rt.device)
    else:
        with torch.device("meta"):                                      # shapes only: claims cost no memory
            model = GPT(cfg)
        try:
            model.load_state_dict(weights, strict=True, assign=True)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise InputError(f"artifact: its tensors do not fit its settings ({reason})") from None
        model = model.to(rt.device)
    model.compute_dtype = rt.dtype
    for block in model.blocks:
        block.attn.attend = rt.attend
    return model


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tokenizer_hash(cfg: Config) -> str:
    return "byte260" if cfg.tokenizer_path == "byte260" else sha256(find_path(cfg.tokenizer_path))


def code_size() -> int:
    """Bytes of the script that runs and of a config.env beside it: both are needed to repeat the run."""
    return sum(path.stat().st_size for path in (SCRIPT, SCRIPT.with_name("config.env")) if path.is_file())


def commit_of(folder: Path) -> tuple[str | None, bool | None]:
    """The commit of the repository around a folder, and whether tracked files differ; None without git."""
    try:
        described = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None, None
    name = described.stdout.strip()
    return (name.removesuffix("-dirty"), name.endswith("-dirty")) if name else (None, None)


def log_identity(cfg: Config, rt: Runtime, ledger: Ledger) -> None:
    """First lines of every log, first fields of every result: versions, machine, overrides, code."""
    versions = dict(python=platform.python_version(), torch=torch.__version__, cuda=torch.version.cuda,
                    numpy=np.__version__, sentencepiece=sentencepiece.__version__,
                    zstandard=zstandard.__version__)
    changed = {name: as_typed(getattr(cfg, field.name)) for name, field in FIELDS.items()
               if getattr(cfg, field.name) != field.default}
    recipe = json.dumps(cfg.group("data", "train", "model", "optim", "pack", "score"), sort_keys=True)
    (commit, dirty), code = commit_of(SCRIPT.parent) if rt.main else (None, None), sha256(SCRIPT)
    ledger.log(" ".join(f"{name}:{version}" for name, version in versions.items()))
    if not torch.__version__.startswith(TESTED_TORCH):
        ledger.log(f"WARNING: tested with torch {TESTED_TORCH}, this is {torch.__version__}")
    for note in rt.notes:
        ledger.log(note)
    ledger.log("overrides: " + (shlex.join(f"{name}={text}" for name, text in changed.items()) or "none"))
    ledger.log(f"seed:{cfg.seed} code_sha256:{code} commit:{commit}{' dirty' if dirty else ''}")
    ledger.save(
        mode=cfg.mode, seed=cfg.seed, settings=dataclasses.asdict(cfg), overrides=changed,
        config_sha256=hashlib.sha256(recipe.encode()).hexdigest(), code_sha256=code, commit=commit,
        dirty=dirty, versions=versions, world_size=rt.world,
        resumed=bool(cfg.resume), machine=dict(type=rt.device.type, device=rt.device_name(),
                                               system=platform.platform(), notes=rt.notes))


def train_model(cfg: Config, rt: Runtime, ledger: Ledger) -> tuple[str, bytes]:
    """Trains and packs. Returns how training ended and the artifact (empty if there is none)."""
    with ledger.phase("load"):
        table, stream = ByteTable.load(cfg), TokenStream(shard_paths(cfg, "train"), cfg.vocab_size)
        first, last = (sha256(stream.paths[index]) if rt.main else "" for index in (0, -1))
        data = dict(train_dataset=Path(cfg.data_path).name, train_shards=len(stream.paths),
                    train_tokens=stream.total, first_train_sha256=first, last_train_sha256=last)
        ledger.log(f"train_loader:dataset:{data['train_dataset']} train_shards:{data['train_shards']} "
                   f"tokens:{stream.total} first_sha256:{first}")
        ledger.save(data=data)
        wanted = cfg.iterations * cfg.micro_batches * (cfg.micro_tokens + 1)
        if cfg.schedule == "tokens" and wanted > stream.total:
            ledger.log(f"note: the run takes {wanted} tokens, the data begins again after {stream.total}")
    with ledger.phase("build"):
        model = build_model(cfg, rt)
        trainer = Trainer(cfg, rt, ledger, model, stream)
        flops = training_flops(cfg, model)
    ledger.log(f"model_params:{sum(p.numel() for p in model.parameters())} "
               f"training_flops_per_token:{flops:.4g}")
    ledger.log(f"train_batch_tokens:{cfg.train_batch_tokens} train_seq_len:{cfg.train_seq_len} "
               f"micro_batches:{cfg.micro_batches} iterations:{cfg.iterations} "
               f"max_wallclock_seconds:{cfg.max_wallclock_seconds:.3f}")
    with ledger.phase("warmup"):
        trainer.warm_up()
    if cfg.resume:
        trainer.resume(Path(cfg.resume))

    predictor = Sliding(model, rt, "validate", cfg.score_len, cfg.score_len)
    validation = functools.cache(lambda: load_validation(cfg))         # read at the first validation, if any

    def validate(step: int) -> None:
        score = evaluate(predictor, validation(), table, cfg, rt, ledger)
        if score:
            ledger.log(f"step:{step}/{cfg.iterations} val_loss:{score.loss:.4f} "
                       f"{score.label}:{score.bpb:.4f} train_time:{trainer.elapsed() * 1000:.0f}ms")
            ledger.metric(step=step, val_loss=score.loss, **{score.label: score.bpb})

    status = trainer.run(validate)
    ledger.save(status=status, steps=trainer.step, train_seconds=round(trainer.seconds, 3),
                train_tokens=trainer.step * cfg.train_batch_tokens, train_loss=trainer.last.loss,
                train_flops=flops * trainer.step * cfg.train_batch_tokens, peak_memory_bytes=rt.peak_memory())
    if status in ("diverged", "interrupted"):
        return status, b""
    if trainer.averager:
        trainer.averager.apply()
    return status, pack_model(cfg, rt, ledger, model)


def pack_model(cfg: Config, rt: Runtime, ledger: Ledger, model: GPT) -> bytes:
    """Raw weights and artifact on disk, before anything is scored; the artifact's bytes on every process."""
    blob, code = None, code_size()
    with ledger.phase("pack"):
        if rt.main:
            state = {name: w.cpu() for name, w in model.state_dict().items()}
            save_torch(ledger.out_dir / "final_model.pt", state)
            blob = pack(state, cfg, code_bytes=code, notes=dict(tokenizer=tokenizer_hash(cfg), seed=cfg.seed))
            atomic_write(ledger.out_dir / "model.ptz", blob)
        blob = rt.broadcast_bytes(blob)
    for line in size_report(blob, code, cfg.max_artifact_bytes) if rt.main else []:
        ledger.log(line)
    ledger.save(sizes=dict(code=code, model=len(blob), total=code + len(blob), cap=cfg.max_artifact_bytes,
                           margin=cfg.max_artifact_bytes - code - len(blob)),
                artifact_sha256=hashlib.sha256(blob).hexdigest())
    return blob


def load_artifact(cfg: Config, blob: bytes, rt: Runtime, ledger: Ledger) -> GPT:
    with ledger.phase("unpack"):
        stored, weights = unpack(blob)
        model = build_model(stored, rt, weights)
        notes = read_header(blob)[0].get("notes")
        made_with = notes.get("tokenizer", "") if isinstance(notes, dict) else ""
        if made_with and made_with != tokenizer_hash(cfg):
            raise InputError(f"TOKENIZER_PATH={cfg.tokenizer_path!r}: the artifact was trained with another "
                             f"tokenizer (sha256 {made_with[:16]}, here {tokenizer_hash(cfg)[:16]})")
    return model


def score_artifact(cfg: Config, blob: bytes, rt: Runtime, ledger: Ledger) -> int:
    """Every scoring stage from the artifact alone; results are written after each. Returns an exit code."""
    model = load_artifact(cfg, blob, rt, ledger)
    with ledger.phase("unpack"):
        table, tokens = ByteTable.load(cfg), load_validation(cfg)
        data = dict(val_dataset=Path(cfg.data_path).name, val_tokens=len(tokens),
                    val_sha256=[sha256(path) if rt.main else "" for path in shard_paths(cfg, "val")],
                    tokenizer_sha256=tokenizer_hash(cfg))
    ledger.save(data={**ledger.result.get("data", {}), **data})
    ledger.log(f"val_bpb:enabled tokenizer_kind={'sentencepiece' if table.processor else 'bytes'} "
               f"tokenizer_path={cfg.tokenizer_path} sha256:{data['tokenizer_sha256']}")
    ledger.log(f"val_loader:shards pattern={cfg.data_path}/fineweb_val_*.bin tokens:{len(tokens)} "
               f"first_sha256:{data['val_sha256'][0]}")
    codec, stages, code = cfg.compressor, {}, OK
    for name, (wanted, build) in PREDICTORS.items():
        if not wanted(cfg):
            continue
        predictor = build(model, rt, cfg)
        with access_watch().watching("fineweb_train") as accessed:
            score = evaluate(predictor, tokens, table, cfg, rt, ledger)
        if score is None:
            ledger.result["stages"][name] = {"skipped": "MAX_EVAL_SECONDS"}
            code = OVER_TIME
            continue
        with ledger.phase("audit"):
            checks = audit(score, predictor, tokens, table, cfg, rt, stages, accessed)
        stages[name] = score.bpb
        ledger.log(f"final_{codec}_{name} val_loss:{score.loss:.4f} {score.label}:{score.bpb:.4f} "
                   f"eval_time:{score.seconds * 1000:.0f}ms")
        ledger.log(f"final_{codec}_{name}_exact val_loss:{score.loss:.8f} {score.label}:{score.bpb:.8f}")
        for check, found in checks.items():
            if found["verdict"] != "PASS":
                ledger.log(f"audit {name} {check} {found['verdict']}")
        code = AUDIT_FAILED if any(c["verdict"].startswith("FAIL") for c in checks.values()) else code
        ledger.result["stages"][name] = {**score.record(), "audit": checks}
        ledger.save(result=dict(stage=name, **score.record()))
    with ledger.phase("sample"):
        if cfg.sample_tokens:
            ledger.log(f"sample: {sample(model, table, cfg, rt)}")
    return code


def result_card(cfg: Config, ledger: Ledger, code: int) -> None:
    """The closing summary: bpb by stage, size and margin, seconds by phase, exit code."""
    result, bar = ledger.result, "-" * 72
    ledger.log(bar)
    for name, stage in result["stages"].items():
        ledger.log(f"{name:12} " + (
            f"skipped: {stage['skipped']}" if "skipped" in stage else
            "{metric} {0:.6f}   {tokens} tokens, {bytes} bytes, {seconds:.1f} s".format(
                stage[stage["metric"]], **stage)))
    if "sizes" in result:
        ledger.log("size         {total} bytes = code {code} + model {model}; cap {cap}, margin {margin}"
                   .format(**result["sizes"]))
    seconds = result["seconds"]
    ledger.log("seconds      " + "  ".join(f"{name} {s:.1f}" for name, s in seconds.items()
                                           if not name.endswith("_side")))
    ledger.log(f"budgets      train {seconds['train_side']:.1f} of {cfg.max_wallclock_seconds:.0f} s" +
               (" (not limited: SCHEDULE=tokens)" if cfg.schedule == "tokens" else "") +
               f", eval {seconds['eval_side']:.1f} of {cfg.max_eval_seconds:.0f} s")
    ledger.log(f"exit code    {code} ({result['status']}){', resumed run' if cfg.resume else ''}; "
               f"{ledger.out_dir}")
    ledger.log(bar)


def run_once(cfg: Config, rt: Runtime, ledger: Ledger) -> int:
    """One run in one mode; returns its exit code."""
    log_identity(cfg, rt, ledger)
    if cfg.mode == "train":
        with access_watch().watching("fineweb_val") as opened:
            status, blob = train_model(cfg, rt, ledger)
        ledger.save(opened_in_training=opened)
        if not blob:
            return DIVERGED if status == "diverged" else INTERRUPTED
    else:
        blob = rt.broadcast_bytes(read_artifact(cfg) if rt.main else None)
        ledger.result["status"] = "finished"
    if cfg.mode == "sample":
        with ledger.phase("sample"):
            model = load_artifact(cfg, blob, rt, ledger)
            ledger.log(sample(model, ByteTable.load(cfg), cfg, rt))
        return OK
    code = score_artifact(cfg, blob, rt, ledger)
    late = cfg.schedule == "clock" and 0 < cfg.max_wallclock_seconds < ledger.side("train") or \
        0 < cfg.max_eval_seconds < ledger.side("eval")
    too_large = code_size() + len(blob) > cfg.max_artifact_bytes
    return code if code == AUDIT_FAILED else OVER_SIZE if too_large else OVER_TIME if late else code


def guarded_run(cfg: Config, rt: Runtime) -> tuple[int, dict[str, Any]]:
    """run_once with its outcome on record, whatever happens."""
    ledger = Ledger(Path(cfg.out_dir), rt, resumed=bool(cfg.resume))
    if cfg.smoke:
        cfg = dataclasses.replace(cfg, data_path=str(Path(cfg.out_dir).resolve() / "smoke_data"))
        if rt.main:
            synthetic_shards(Path(cfg.data_path))
        rt.barrier()
    try:
        code = run_once(cfg, rt, ledger)
    except InputError as error:
        ledger.log(f"error: {error}")
        ledger.result["status"], code = "bad_input", BAD_INPUT
    except Exception as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            ledger.save(status="crashed", exit_code=BUG)
            raise
        ledger.log(f"out of memory: {error}\nMICRO_BATCH_TOKENS={cfg.micro_tokens} sets training memory, "
                   f"EVAL_BATCH_TOKENS={cfg.eval_batch_tokens} scoring memory (0 = automatic); lower the one "
                   "that was at work. The score does not depend on them.")
        ledger.result["status"], code = "out_of_memory", OUT_OF_MEMORY
    ledger.save(exit_code=code)
    result_card(cfg, ledger, code)
    ledger.close()
    return code, ledger.result


def read_artifact(cfg: Config) -> bytes:
    path = Path(cfg.artifact or Path(cfg.out_dir) / "model.ptz")
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"ARTIFACT={str(path)!r}: cannot be read ({error.strerror})") from None


def settings_of_artifact(cfg: Config, env: Mapping[str, str]) -> Config:
    """For MODE=eval and sample: the artifact's settings, and whatever was set here outside the model."""
    stored = _read_config(read_header(read_artifact(cfg))[0].get("config"))
    given, _ = read_settings(env)
    _refuse([f"{name.upper()}={given[name]}: the artifact was made with {value}"
             for name, value in stored.group("model").items() if name in given and given[name] != value])
    own = {"out_dir": cfg.out_dir, "run_id": cfg.run_id}
    return dataclasses.replace(cfg, **{**stored.group("model", "pack", "score"), **given, **own})


def run_seeds(cfg: Config, rt: Runtime) -> int:
    """One run a seed, then mean and standard deviation of the scores. Returns the highest exit code."""
    runs = [guarded_run(dataclasses.replace(cfg, seed=seed, out_dir=f"{cfg.out_dir}/seed_{seed}"), rt)
            for seed in cfg.seeds]
    scores = [result["result"]["val_bpb"] for _, result in runs if "val_bpb" in result.get("result", {})]
    if rt.main and scores:
        spread = float(np.std(scores, ddof=1)) if len(scores) > 1 else math.nan
        print(f"seeds:{','.join(map(str, cfg.seeds))} val_bpb mean:{np.mean(scores):.6f} std:{spread:.6f} "
              f"n:{len(scores)}")
    return max(code for code, _ in runs)


def main(argv: Sequence[str], env: Mapping[str, str]) -> int:
    """Runs the program; returns its exit code."""
    if "--help" in argv or "-h" in argv:
        print(help_text())
        return OK
    rt = None
    try:
        _refuse([f"unknown argument {arg!r}: settings are environment variables (--help lists them)"
                 for arg in argv])
        cfg = load_config(env)
        rt = Runtime(cfg, env)
        now = datetime.datetime.now().strftime("%Y%m%d_%H%M%S_") + str(os.getpid())
        run_id = rt.broadcast_bytes((cfg.run_id or now).encode()).decode()
        cfg = dataclasses.replace(cfg, run_id=run_id, out_dir=cfg.out_dir or f"logs/{run_id}")
        cfg = cfg if cfg.mode == "train" else settings_of_artifact(cfg, env)
        return run_seeds(cfg, rt) if cfg.seeds else guarded_run(cfg, rt)[0]
    except InputError as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    finally:
        if rt:
            rt.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
