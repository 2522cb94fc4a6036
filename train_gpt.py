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
K key/value heads or n-gram orders, D model or head size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
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
from collections import deque, namedtuple
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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

class InputError(ValueError):
    """Something given to the program (a setting, a shard, an artifact) is unusable; the message names it."""

class ConfigError(InputError):
    """One or more settings are wrong; the message lists all of them."""

def demand(holds: Any, complaint: str) -> None:
    if not holds:
        raise InputError(complaint)

@contextlib.contextmanager
def refusing(complaint: str, *kinds: type[Exception]) -> Iterator[None]:
    """Exceptions of these kinds become an InputError: the complaint, and the reason in one line."""
    try:
        yield
    except kinds as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        reason = " ".join(reason.removeprefix("InputError: ").split())
        raise InputError(f"{complaint} ({reason:.300})") from None

def _setting(group: str, default: Any, doc: str, low: Any = None, high: Any = None, choices: Any = ()) -> Any:
    return dataclasses.field(default=default, metadata=dict(
        group=group, doc=doc, low=low, high=high, choices=choices))

_run, _data, _train, _model, _optim, _pack, _score = (functools.partial(_setting, group) for group in (
    "run", "data", "train", "model", "optim", "pack", "score"))

@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting; its environment variable is the field's name in upper case. 0 or empty = absent."""
    mode: str = _run("train", "what to do", choices=("train", "eval", "audit", "sample"))
    run_id: str = _run("", "name of the run; empty = time and process number")
    out_dir: str = _run("", "folder for everything written; empty = logs/<RUN_ID>")
    seed: int = _run(1337, "seed of the parameters' initial values and of sampling", low=0)
    seeds: tuple[int, ...] = _run((), "several seeds, one run each, then mean and standard deviation: 1,2,3")
    smoke: bool = _run(False, "every section on a tiny model and synthetic text, no data needed")
    device: str = _run("auto", "where to compute", choices=("auto", "cuda", "cpu", "mps"))
    compile: str = _run("auto", "torch.compile; auto = on CUDA only", choices=("auto", "0", "1"))
    attn: str = _run("auto", "attention; auto = fa3 if it works, else sdpa", choices=("auto", "fa3", "sdpa"))
    artifact: str = _run("", "packed model for MODE=eval and MODE=sample; empty = <OUT_DIR>/model.ptz")
    resume: str = _run("", "checkpoint to continue from")
    save_every: int = _run(0, "write a checkpoint every so many steps (also on SIGUSR1 and SIGTERM)", low=0)
    sample_tokens: int = _run(0, "length of text sample; 0 = none after training, 200 in MODE=sample", low=0)
    sample_prompt: str = _run("", "text that the sample continues")
    sample_temperature: float = _run(0.8, "temperature of the sample", low=0.01)

    data_path: str = _data("./data/datasets/fineweb10B_sp1024", "folder of fineweb_{train,val}_*.bin shards")
    tokenizer_path: str = _data("./data/tokenizers/fineweb_1024_bpe.model", "SentencePiece model or byte260")
    val_tokens: int = _data(0, "validation targets to score (development: no val_bpb); 0 = all", low=0)

    schedule: str = _train("clock", "what drives warm-down and stop", choices=("clock", "tokens"))
    max_wallclock_seconds: float = _train(600.0, "training seconds under SCHEDULE=clock; 0 = none", low=0)
    iterations: int = _train(20000, "training steps at most", low=0)
    warmup_steps: int = _train(20, "steps on throw-away state before the clock starts (compilation)", low=0)
    warmdown_iters: int = _train(1200, "last steps, over which the learning rates fall to zero", low=0)
    train_batch_tokens: int = _train(524288, "tokens a step, over all processes", low=1)
    micro_batch_tokens: int = _train(0, "tokens a forward pass; 0 = an eighth of TRAIN_BATCH_TOKENS", low=0)
    train_seq_len: int = _train(1024, "tokens a training sequence", low=1)
    val_loss_every: int = _train(1000, "validate every so many steps, outside the clock; 0 = never", low=0)
    train_log_every: int = _train(200, "log the training loss every so many steps (and the first ten)", low=0)
    late_qat_threshold: float = _train(0.0, "fake quantization at rate factors below this; 0 = never", low=0)
    crown_q_lambda: float = _train(0.0, "quantization penalty (CROWN-Q) at rate factors below 0.5", low=0)

    vocab_size: int = _model(1024, "tokens in the vocabulary", low=2, high=65536)
    num_layers: int = _model(9, "transformer blocks", low=1, high=1024)
    model_dim: int = _model(512, "width", low=2, high=65536)
    num_heads: int = _model(8, "attention heads", low=1)
    num_kv_heads: int = _model(4, "key/value heads (grouped-query attention)", low=1)
    mlp_mult: float = _model(2.0, "MLP hidden width over MODEL_DIM; may be fractional", low=0.01, high=64)
    leaky_slope: float = _model(0.0, "MLP activation leaky_relu(x, slope)^2; 0 = relu(x)^2", low=0)
    tie_embeddings: bool = _model(True, "the embedding is also the output matrix")
    tied_embed_init_std: float = _model(0.005, "standard deviation of a tied embedding at start", low=0)
    ortho_init: str = _model("", "orthogonal start (scaled: tables less)", choices=("", "plain", "scaled"))
    logit_softcap: float = _model(30.0, "logits become cap * tanh(logits / cap); 0 = off", low=0)
    rope_base: float = _model(10000.0, "rotary base", low=1)
    rope_dims: int = _model(0, "rotated dimensions of a head (partial RoPE); 0 = all", low=0)
    rope_train_seq_len: int = _model(0, "longer inputs stretch the rotary base (NTK); 0 = never", low=0)
    qk_gain_init: float = _model(1.5, "initial gain of each head's normalised queries", low=0)
    xsa_last_n: int = _model(0, "last layers with exclusive self-attention (XSA); 0 = none", low=0)
    unet_skips: bool = _model(True, "learned skips from the first half of the layers to the second")
    x0_mix: bool = _model(True, "every block mixes in the embedding stream with learned weights")
    ln_scale: bool = _model(False, "normed sublayer inputs times 1/sqrt(layer + 1)")
    depth_scale_init: bool = _model(False, "attn_scale and mlp_scale start at 1/sqrt(layer + 1)")
    bigram_vocab_size: int = _model(0, "rows of the hashed bigram embedding (BigramHash); 0 = none", low=0)
    bigram_dim: int = _model(128, "width of the bigram table", low=1)
    bigram_hash: str = _model("xor", "xor: PR 489; linear: PR 740, without scale", choices=("xor", "linear"))
    bigram_init: str = _model("zero", "its start; dead: never trains", choices=("zero", "normal", "dead"))
    smear: bool = _model(False, "SmearGate: a learned share of the previous token's embedding")
    smear_before_norm: bool = _model(False, "SmearGate acts before the embedding's norm (PR 740), not after")
    smear_bos_mask: bool = _model(False, "SmearGate lets nothing across a document start")
    bos_id: int = _model(1, "token that starts a document", low=0)
    ve_layers: tuple[int, ...] = _model((), "layers whose values get token embeddings: 9,10; empty = none")
    ve_dim: int = _model(128, "width of the shared value-embedding table", low=1)
    mixer_head: bool = _model(False, "a head that weighs network and n-gram orders (PR 859)")

    embed_lr: float = _optim(0.6, "Adam rate of an untied embedding", low=0)
    head_lr: float = _optim(0.008, "Adam rate of an untied output matrix", low=0)
    tied_embed_lr: float = _optim(0.05, "Adam rate of a tied embedding and of the other tables", low=0)
    matrix_lr: float = _optim(0.04, "Muon rate of the matrices", low=0)
    scalar_lr: float = _optim(0.04, "Adam rate of vectors and scalars", low=0)
    bigram_optim: str = _optim("", "group of the bigram's matrices", choices=("", "scalars", "matrices"))
    muon_momentum: float = _optim(0.95, "Muon momentum", low=0, high=1)
    muon_momentum_warmup_start: float = _optim(0.85, "Muon momentum at step 0", low=0, high=1)
    muon_momentum_warmup_steps: int = _optim(500, "steps until MUON_MOMENTUM is reached", low=0)
    muon_backend_steps: int = _optim(5, "Newton-Schulz iterations", low=1)
    muon_wd: float = _optim(0.0, "decoupled weight decay of the matrices", low=0)
    embed_wd: float = _optim(0.0, "decoupled weight decay of embeddings, tables and output matrix", low=0)
    adam_wd: float = _optim(0.0, "decoupled weight decay of vectors and scalars", low=0)
    beta1: float = _optim(0.9, "Adam", low=0, high=1)
    beta2: float = _optim(0.95, "Adam", low=0, high=1)
    adam_eps: float = _optim(1e-8, "Adam", low=0)
    grad_clip_norm: float = _optim(0.0, "global gradient norm at most; 0 = off", low=0)
    ema_decay: float = _optim(0.0, "average the weights over steps with this decay; 0 = off", low=0, high=1)
    ema_start: float = _optim(0.0, "share of the run after which that begins", low=0, high=1)
    swa_every: int = _optim(0, "average of every so many steps (with EMA: half of each); 0 = off", low=0)
    swa_start: float = _optim(0.4, "share of the run after which that begins", low=0, high=1)

    quant_bits: int = _pack(8, "bits of a quantized weight, row-wise scales", low=2, high=8)
    quant_policy: str = _pack("", "other bits by role: embed:8,attn:6 (roles embed, table, attn, mlp, other)")
    quant_clip_steps: int = _pack(16, "clip levels tried for each row; 1 = its maximum", low=1, high=256)
    quant_scale_floor: bool = _pack(False, "steps of at least 1/top level, as the official baseline has them")
    gptq_n_samples: int = _pack(0, "training sequences that calibrate GPTQ; 0 = plain rounding", low=0)
    gptq_damp: float = _pack(0.01, "share of its mean added to the Hessian's diagonal", low=1e-6)
    gptq_reserve_seconds: float = _pack(0.0, "seconds of the training clock kept for calibration", low=0)
    prune_pct: float = _pack(0.0, "share of each quantized tensor's smallest weights set to 0", low=0, high=1)
    keep_float_max_numel: int = _pack(65536, "tensors up to this size stay float", low=0)
    compressor: str = _pack("zstd", "codec of the artifact", choices=("zstd", "zlib", "lzma"))
    max_artifact_bytes: int = _pack(16_000_000, "cap on code + model; over it the exit code is 2", low=0)

    eval_seq_len: int = _score(0, "tokens a scoring window; 0 = TRAIN_SEQ_LEN", low=0)
    eval_plain: bool = _score(True, "score plain windows too, not only sliding ones")
    eval_stride: int = _score(64, "sliding windows advance by this; 0 = plain windows only", low=0)
    eval_batch_tokens: int = _score(0, "tokens a scoring batch; 0 = as the device likes", low=0)
    max_eval_seconds: float = _score(600.0, "scoring seconds; a stage that cannot finish is skipped", low=0)
    ttt_epochs: int = _score(0, "passes of test-time training over what was scored; 0 = none", low=0)
    ttt_before_scoring: bool = _score(False, "adapt to all tokens, then score them (PR 489): no valid score")
    ttt_chunk_tokens: int = _score(32768, "targets between two adaptations", low=1)
    ttt_lr: float = _score(5e-4, "its learning rate; a cosine over the chunks", low=0)
    ttt_optimizer: str = _score("adamw", "its optimizer; sgd has momentum 0.9", choices=("adamw", "sgd"))
    ttt_freeze_blocks: int = _score(0, "adapt the last so many blocks, scales, head; 0 = everything", low=0)
    qttt: bool = _score(False, "of those blocks adapt the query matrices only")
    byte_weighted_ttt: bool = _score(False, "weigh its loss by each target's bytes")
    ttt_batch_seqs: int = _score(32, "sequences of each part in a step", low=1)
    ttt_parts: int = _score(1, "equal parts of the data that a step draws from (the seeds' GPUs)", low=1)
    ttt_lora_rank: int = _score(0, "rank of adapters that learn each document while it is scored", low=0)
    ttt_lora_alpha: float = _score(144.0, "their product is scaled by this over the rank", low=0)
    ttt_lora_chunk: int = _score(48, "targets between two of their steps", low=1)
    ttt_lora_keep: bool = _score(True, "a slot's A matrices stay for its next document")
    ttt_docs: int = _score(64, "documents in a batch, each with its own adapters", low=1)
    ttt_temperature: float = _score(1.0, "temperature of certain predictions (ttt, ngram); 1 = off", low=0)
    eval_stream: int = _score(0, "width of the attention window of one pass over the stream; 0 = none", low=0)
    stream_docs: bool = _score(False, "that pass sees no document but the target's own")
    mix_chunk_tokens: int = _score(16384, "targets between two updates of TILT and NGRAM=mix", low=1)
    tilt: bool = _score(False, "raise the token that last followed the longest known context")
    ngram: str = _score("", "mix: exact n-gram mixture; others: hashed caches (no score)",
                        choices=("", "mix", "fixed", "backoff", "gated"))
    ngram_docs: bool = _score(True, "contexts of TILT and NGRAM=mix do not reach into earlier documents")
    ngram_order: int = _score(7, "highest order", low=2, high=16)
    ngram_min_order: int = _score(2, "lowest order", low=2, high=16)
    ngram_alpha: float = _score(0.4, "weight of NGRAM=fixed", low=0, high=1)
    ngram_ent_base: float = _score(0.05, "weight of NGRAM=backoff where the network is certain", low=0)
    ngram_ent_range: float = _score(0.55, "what uncertainty adds to it", low=0)
    ngram_min_count: int = _score(2, "an order counts from so many sightings of its context", low=1)
    ngram_buckets: int = _score(4_194_304, "counters of a table, a power of two", low=2, high=2 ** 30)
    ngram_primes: tuple[int, ...] = _score((36313, 27191, 51647, 81929, 131071, 65537, 104729), "of the hash")
    ngram_stride: int = _score(0, "its windows advance by this; 0 = EVAL_STRIDE", low=0)
    ngram_chunk_tokens: int = _score(0, "targets between two updates; 0 = after every window", low=0)
    head_dim = property(lambda c: c.model_dim // c.num_heads)
    micro_tokens = property(lambda c: c.micro_batch_tokens or c.train_batch_tokens // 8)
    micro_batches = property(lambda c: c.train_batch_tokens // c.micro_tokens)
    score_len = property(lambda c: c.eval_seq_len or c.train_seq_len)
    stride = property(lambda c: c.eval_stride or c.score_len)
    ngram_orders = property(lambda c: range(c.ngram_min_order, c.ngram_order + 1))
    def group(self, *groups: str) -> dict[str, Any]:
        """Name -> value of the settings in these groups (run, data, train, model, optim, pack, score)."""
        return {f.name: getattr(self, f.name) for f in FIELDS.values() if f.metadata["group"] in groups}

Hyperparameters = Config
FIELDS = {f.name.upper(): f for f in dataclasses.fields(Config)}

SMOKE_SETTINGS = dict(pair.split("=") for pair in (
    "DATA_PATH=smoke_data TOKENIZER_PATH=byte260 VOCAB_SIZE=260 NUM_LAYERS=4 MODEL_DIM=64 NUM_HEADS=4 "
    "NUM_KV_HEADS=2 TRAIN_SEQ_LEN=128 TRAIN_BATCH_TOKENS=2048 MICRO_BATCH_TOKENS=1024 ITERATIONS=20 "
    "WARMUP_STEPS=2 WARMDOWN_ITERS=10 VAL_LOSS_EVERY=10 SCHEDULE=tokens KEEP_FLOAT_MAX_NUMEL=1024 "
    "EMA_DECAY=0.8 BIGRAM_VOCAB_SIZE=256 BIGRAM_DIM=16 SMEAR=1 SMEAR_BOS_MASK=1 XSA_LAST_N=2 VE_LAYERS=2,3 "
    "VE_DIM=16 ROPE_DIMS=8 LN_SCALE=1 LEAKY_SLOPE=0.5 SAMPLE_TOKENS=60").split())
OLD_NAMES = dict(pair.split(":") for pair in (
    "BIGRAM_HASH_BUCKETS:BIGRAM_VOCAB_SIZE WEIGHT_DECAY:MUON_WD VAL_BATCH_SIZE:EVAL_BATCH_TOKENS "
    "EVAL_ONLY:MODE=eval TTT_ONLY:MODE=eval MAX_SUBMISSION_BYTES:MAX_ARTIFACT_BYTES XSA_LAYERS:XSA_LAST_N "
    "INT8_KEEP_FLOAT_MAX_NUMEL:KEEP_FLOAT_MAX_NUMEL VE_ENABLED:VE_LAYERS EMA_ENABLED:EMA_DECAY "
    "SMEAR_ENABLED:SMEAR SWA_ENABLED:SWA_EVERY QAT_ENABLED:LATE_QAT_THRESHOLD GPTQ_ENABLED:GPTQ_N_SAMPLES "
    "NGRAM_ENABLED:NGRAM NGRAM_ENTROPY_ADAPTIVE:NGRAM=backoff USE_MIXER:NGRAM=gated").split())
FAMILIES = ("ADAM BIGRAM CROWN EMA EVAL GPTQ GRAD LN LOGIT MATRIX MIXER MLP MUON NGRAM PRUNE QAT QK QUANT "
            "ROPE SCALAR SMEAR SWA TIED TTT VAL VE WARMDOWN WARMUP XSA").split()
FOREIGN = tuple(("TORCH OMP_ MKL_ NCCL_ CUDA_ PYTHON PYTORCH SLURM_ XDG_ GITHUB_ LD_ LC_ RANK WORLD_SIZE "
                 "LOCAL_ GROUP_ ROLE_ MASTER_ PATH GLOO_ NVIDIA_ TRITON_ HF_").split())
PARSERS: dict[type, tuple[Callable[[str], Any], str]] = {
    bool: (lambda text: {"0": False, "false": False, "": False, "1": True, "true": True}[text.lower()],
           "0, 1, true or false"),
    tuple: (lambda text: tuple(map(int, filter(str.strip, text.split(",")))), "whole numbers with commas"),
    int: (int, "a whole number"), float: (float, "a number"), str: (str, "text")}

def _unknown(name: str, exact: bool) -> str:
    """What is wrong with a name that is no setting. exact: from a file, where every name must be known."""
    near = difflib.get_close_matches(name, FIELDS, 1, 0.85)
    hint = f": here it is {OLD_NAMES[name]}" if name in OLD_NAMES else \
        f" (did you mean {near[0]}?)" if near else " (python train_gpt.py --help lists all)"
    meant = exact or name in OLD_NAMES or near or name.split("_")[0] in FAMILIES
    return f"unknown setting {name}{hint}" if meant else ""

def read_settings(env: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Everything set by SMOKE, file and environment as {field: value}, and the complaints."""
    texts = dict(SMOKE_SETTINGS) if env.get("SMOKE", "0").strip().lower() in ("1", "true") else {}
    path = Path(env["CONFIG"]) if env.get("CONFIG") else SCRIPT.with_name("config.env")
    problems = [f"CONFIG={env['CONFIG']!r}: no such file"] if env.get("CONFIG") and not path.is_file() else []
    lines = (path.read_text(encoding="utf-8") if path.is_file() else SETTINGS_INSIDE).splitlines()
    given = [(f"{path.name} line {number}: ", *map(str.strip, line.partition("="))) for number, line in
             enumerate(lines, 1) if line.strip() and not line.lstrip().startswith("#")]
    given += [("", name, "=", text) for name, text in env.items() if name != "CONFIG"]    # the last one holds
    for where, name, equals, text in given:
        if equals and name in FIELDS:
            texts[name] = text
        elif where or re.fullmatch(r"[A-Z][A-Z0-9_]*", name) and not name.startswith(FOREIGN):
            reason = _unknown(name, bool(where)) if equals else "expected NAME=value"
            problems += [where + reason] if reason else []
    values = {}
    for name, text in texts.items():
        parse, wanted = PARSERS[type(FIELDS[name].default)]
        try:
            values[name.lower()] = parse(text.strip())
        except (ValueError, KeyError):
            problems.append(f"{name}={text.strip()!r}: expected {wanted}")
    return values, problems

def check_config(cfg: Config, world: int = 1) -> list[str]:
    """All complaints about the values themselves, one sentence each."""
    problems = []
    for name, field in FIELDS.items():
        value, meta = getattr(cfg, field.name), field.metadata
        low, high = meta["low"], meta["high"]
        if meta["choices"] and value not in meta["choices"]:
            problems.append(f"{name}={value!r}: expected one of {', '.join(meta['choices'])}")
        if isinstance(value, float) and not math.isfinite(value):
            problems.append(f"{name}={value}: expected a finite number")
        elif low is not None and value < low or high is not None and value > high:
            problems.append(f"{name}={value}: expected {low} or more" + (f", {high} at most" if high else ""))
    return problems or _cross_checks(cfg, world)

ROLES = ("embed", "table", "attn", "mlp", "other")
# Relations that must hold between settings, a:b or a:b:c with b:c as well.
MULTIPLES = "model_dim:num_heads:num_kv_heads train_batch_tokens:micro_tokens:train_seq_len"
AT_MOST = ("xsa_last_n:num_layers rope_dims:head_dim eval_stride:score_len ngram_stride:score_len "
           "ngram_min_order:ngram_order ttt_freeze_blocks:num_layers")
NEEDS = "stream_docs:eval_stream smear_bos_mask:smear smear_before_norm:smear ttt_before_scoring:ttt_epochs"

def _cross_checks(c: Config, world: int) -> list[str]:
    def shown(name: str) -> str:
        plain = dict(micro_tokens="MICRO_BATCH_TOKENS=", head_dim="the head size ", score_len="EVAL_SEQ_LEN=")
        return plain.get(name, f"{name.upper()}=") + as_typed(getattr(c, name))
    def each(relation: str) -> Iterator[tuple[str, str, Any, Any]]:
        return ((a, b, getattr(c, a), getattr(c, b)) for a, b in re.findall(r"(\w+):(?=(\w+))", relation))
    checks = [
        (c.head_dim % 2, f"MODEL_DIM / NUM_HEADS = {c.head_dim} must be even (rotary pairs)"),
        (c.rope_dims % 2, f"ROPE_DIMS={c.rope_dims} must be even"),
        (c.rope_train_seq_len and (c.rope_dims or c.head_dim) < 4, "ROPE_TRAIN_SEQ_LEN needs ROPE_DIMS >= 4"),
        (int(c.mlp_mult * c.model_dim) < 1, f"MLP_MULT={c.mlp_mult} leaves no unit at width {c.model_dim}"),
        (len(set(c.ve_layers)) < len(c.ve_layers), f"VE_LAYERS={c.ve_layers} names a layer twice"),
        (any(not 0 <= layer < c.num_layers for layer in c.ve_layers),
         f"{shown('ve_layers')} must lie between 0 and NUM_LAYERS - 1 = {c.num_layers - 1}"),
        (c.bigram_vocab_size == 1, "BIGRAM_VOCAB_SIZE=1: expected 0 or at least 2"),
        (c.bos_id >= c.vocab_size, f"{shown('bos_id')} must be below {shown('vocab_size')}"),
        (c.tokenizer_path != "byte260" and not c.tokenizer_path.endswith(".model"),
         f"TOKENIZER_PATH={c.tokenizer_path!r}: expected a SentencePiece .model file or byte260"),
        (c.beta1 == 1 or c.beta2 == 1, "BETA1 and BETA2 must be below 1"),
        (0 < c.max_wallclock_seconds <= c.gptq_reserve_seconds,
         f"{shown('gptq_reserve_seconds')} must be below {shown('max_wallclock_seconds')}"),
        (c.ngram_buckets & (c.ngram_buckets - 1), f"{shown('ngram_buckets')} must be a power of two"),
        (not c.ngram_primes or not all(0 < prime < 2 ** 32 for prime in c.ngram_primes),
         f"{shown('ngram_primes')}: expected numbers from 1 to 2^32 - 1"),
        (c.ngram == "gated" and not c.mixer_head, "NGRAM=gated needs MIXER_HEAD=1"),
        (c.eval_stream and (c.ttt_chunk_tokens % c.eval_stream or c.mix_chunk_tokens % c.eval_stream),
         "TTT_CHUNK_TOKENS and MIX_CHUNK_TOKENS must be multiples of EVAL_STREAM"),
        (c.ttt_lora_rank and (c.ttt_epochs or c.ngram not in ("", "mix")),
         "TTT_LORA_RANK goes neither with TTT_EPOCHS nor with a hashed NGRAM"),
        (c.ngram == "mix" and c.mixer_head and c.ngram_order > 7, "NGRAM=mix needs NGRAM_ORDER <= 7"),
        *((not y or x % y, f"{shown(a)} must be a multiple of {shown(b)}") for a, b, x, y in each(MULTIPLES)),
        *((x > y, f"{shown(a)} must be at most {shown(b)}") for a, b, x, y in each(AT_MOST)),
        *((x and not y, f"{shown(a)} needs {b.upper()}" + "=1" * (y is False)) for a, b, x, y in each(NEEDS)),
        (not re.fullmatch(rf"(\s*({'|'.join(ROLES)}):[2-8]\s*(,|$)|,)*", c.quant_policy),
         f"QUANT_POLICY={c.quant_policy!r}: expected role:bits with roles {', '.join(ROLES)}, 2 to 8 bits")]
    problems = [text for wrong, text in checks if wrong]
    if not problems and c.mode == "train" and c.micro_batches % world:
        sizes = ", ".join(str(w) for w in range(1, c.micro_batches + 1) if c.micro_batches % w == 0)
        problems.append(f"WORLD_SIZE={world} must divide the {c.micro_batches} micro-batches of a step "
                        f"(TRAIN_BATCH_TOKENS / MICRO_BATCH_TOKENS): possible are {sizes}")
    return problems

def _refuse(problems: list[str]) -> None:
    if problems:
        count = f"{len(problems)} problem{'s' * (len(problems) > 1)}; nothing was started."
        raise ConfigError("\n".join([*problems, count]))

def load_config(env: Mapping[str, str]) -> Config:
    """Default < file (CONFIG, or config.env by the script) < environment. ConfigError lists all problems."""
    values, problems = read_settings(env)
    _refuse(problems + check_config(Config(**values), int(env.get("WORLD_SIZE") or 1)))
    return Config(**values)

def as_typed(value: Any) -> str:
    """A setting's value as one would type it; a list is a tuple that went through JSON."""
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else \
        str(int(value) if isinstance(value, bool) else value)

def help_text() -> str:
    """One line a setting: name, default, meaning."""
    lines = [__doc__, "CONFIG=<file> names a file of NAME=value lines; the environment overrides it."]
    for group, members in itertools.groupby(FIELDS.items(), key=lambda item: item[1].metadata["group"]):
        lines += ["", f"[{group}]"]
        for name, field in members:
            options = f" ({'|'.join(field.metadata['choices'])})" if field.metadata["choices"] else ""
            lines.append(f"{name}={as_typed(field.default)}".ljust(44) + f" {field.metadata['doc']}{options}")
    return "\n".join(lines)

# ============================================================================================================
# 2. RUNTIME - the only section that knows devices, processes, kernels and compilation. Uses section 1.

def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention by torch, causal or masked. q [B, T, H, D], k and v [B, S, K, D], K divides H -> as q."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))                                          # [B, H|K, T, D]
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None,
                                         enable_gqa=q.size(1) != k.size(1))
    return out.transpose(1, 2)                                                                  # [B, T, H, D]

def _fa3_attention(device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """FlashAttention 3, after one real call; raises whatever goes wrong when it is missing or fails here."""
    from flash_attn_interface import flash_attn_func  # optional by design: only Hopper images have it
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_func(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out                # releases differ in what they return
    attend(*[torch.zeros(1, 8, 1, 64, device=device, dtype=torch.bfloat16)] * 3)
    return attend

class Runtime:
    """Where the program runs: device, processes, number format, kernels. One process is just world 1."""
    def __init__(self, cfg: Config, env: Mapping[str, str]):
        self.rank, self.world = int(env.get("RANK") or 0), int(env.get("WORLD_SIZE") or 1)
        have = [*["cuda"] * torch.cuda.is_available(), *["mps"] * torch.backends.mps.is_available(), "cpu"]
        if cfg.device not in ("auto", *have):
            raise ConfigError(f"DEVICE={cfg.device}: torch finds none here; available: {', '.join(have)}")
        kind = have[0] if cfg.device == "auto" else cfg.device
        self.cuda = kind == "cuda"
        self.device = torch.device(kind, int(env.get("LOCAL_RANK") or 0)) if self.cuda else torch.device(kind)
        # lag: the host reads a step's report so many steps later, and the GPU never waits for it.
        # score_tokens: larger batches are not faster. tolerance: nats by which other shapes may differ.
        gpu, cpu = (torch.bfloat16, 2, 1 << 19, 0.05), (torch.float32, 0, 1 << 14, 1e-4)
        self.dtype, self.lag, self.score_tokens, self.tolerance = gpu if self.cuda else cpu
        self.notes = [f"device:{self.device_name()} compute:{str(self.dtype)[6:]} world_size:{self.world}"]
        if self.cuda:
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        elif self.device.type == "cpu":
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False         # a debugging aid, and slow
            # glibc returns large blocks at once, new tensors page-fault again: keep them (loss 4x faster).
            libc = ctypes.CDLL(None) if sys.platform == "linux" else None
            for option, value in ((-3, 1 << 30), (-1, (1 << 31) - 1)):  # mmap threshold, trim threshold
                getattr(libc, "mallopt", lambda *_: None)(option, value)        # absent in musl
        self.attend = self._pick_attention(cfg.attn)
        self.compiles = cfg.compile == "1" or cfg.compile == "auto" and self.cuda
        self._owns_group = self.world > 1 and not dist.is_initialized()
        if self._owns_group:
            dist.init_process_group("nccl" if self.cuda else "gloo", rank=self.rank, world_size=self.world,
                                    timeout=datetime.timedelta(minutes=10),
                                    device_id=self.device if self.cuda else None)
    def _pick_attention(self, wanted: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        reason = "ATTN=sdpa" if wanted == "sdpa" else "FlashAttention 3 needs CUDA"
        if wanted != "sdpa" and self.cuda:
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
        if self.cuda:
            return torch.cuda.get_device_name(self.device)
        cpuinfo = Path("/proc/cpuinfo")
        found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.is_file() else None
        return f"{found[1] if found else platform.machine()} ({torch.get_num_threads()} threads)"
    @property
    def main(self) -> bool:
        return self.rank == 0
    def compile(self, function: Callable) -> Callable:
        return torch.compile(function, dynamic=False, fullgraph=True) if self.compiles else function
    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)
    def sum_(self, tensor: Tensor) -> Tensor:
        """The tensor's sum over all processes, in place where the device allows."""
        if self.world == 1:
            return tensor
        there = tensor.to(self.device)
        dist.all_reduce(there)
        return tensor.copy_(there) if there is not tensor else tensor
    def start_sum(self, values: Sequence[float | Tensor]) -> Callable[[], list[float]]:
        """The sum over processes of a few numbers; on CUDA only the call that it returns waits for it."""
        total = self.sum_(torch.stack([torch.as_tensor(value, dtype=torch.float32).detach()
                                       .to(self.device, non_blocking=True) for value in values]))
        if not self.cuda:
            return total.tolist
        host, done = torch.empty(total.shape, dtype=total.dtype, pin_memory=True), torch.cuda.Event()
        host.copy_(total, non_blocking=True)
        done.record()
        return lambda: (done.synchronize(), host.tolist())[1]
    def all_gather(self, tensor: Tensor) -> Tensor:
        """[n, ...] on every process -> [world * n, ...], in order of rank."""
        if self.world == 1:
            return tensor
        out = tensor.new_empty((self.world * tensor.size(0), *tensor.shape[1:]))
        dist.all_gather_into_tensor(out, tensor.contiguous())
        return out
    def broadcast_bytes(self, blob: bytes | None) -> bytes:
        """Rank 0's bytes on every process: nodes need no shared disk."""
        box = [blob]
        if self.world > 1:
            dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]
    def put(self, array: np.ndarray) -> Tensor:
        """A host array as a tensor on the device; the copy does not block the host."""
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.cuda else tensor.to(self.device)
    def peak_memory(self) -> int:
        """Peak bytes allocated on the GPU, or peak resident bytes of the process."""
        if self.cuda:
            return torch.cuda.max_memory_allocated(self.device)
        with contextlib.suppress(ImportError):
            from resource import RUSAGE_SELF, getrusage  # absent on Windows
            return getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return 0
    def close(self) -> None:
        if self._owns_group:
            dist.destroy_process_group()

# ============================================================================================================
# 3. LEDGER - the log, the metrics, the result and where every second went. Uses sections 1-2.

# The phases that count against MAX_WALLCLOCK_SECONDS (train) and MAX_EVAL_SECONDS (eval).
SIDES = {"train": ("train", "calibrate"),
         "eval": ("unpack", "plain", "sliding", "streaming", "ttt", "mixed", "ngram")}

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
        self.out_dir, self.writes, self._inner = out_dir, rt.main, 0.0
        self.seconds, self.began = {}, {}                     # of each phase: seconds spent, its first second
        self.result: dict[str, Any] = {"status": "started", "stages": {}, "phases_began": self.began}
        self.born = self._shown = time.perf_counter()
        if self.writes:
            out_dir.mkdir(parents=True, exist_ok=True)
            for name in () if resumed else ("train.log", "metrics.jsonl"):
                (out_dir / name).write_text("")
    def _append(self, name: str, line: str) -> None:
        if self.writes:
            with open(self.out_dir / name, "a", encoding="utf-8") as file:
                file.write(line + "\n")
    def log(self, line: str, show: bool = True) -> None:
        if self.writes and show:
            print(line, flush=True)
        self._append("train.log", line)
    def identify(self, identity: Callable[..., tuple[dict[str, Any], str]], *data: Any) -> None:
        """Logs and keeps what tells data apart: identity(*data) -> fields of result["data"], log line."""
        if self.writes:                                                 # one process reads the files
            fields, line = identity(*data)
            self.result.setdefault("data", {}).update(fields)
            self.log(line)
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
        return sum(self.seconds.get(name, 0.0) for name in SIDES[side])
    def save(self, **fields: Any) -> None:
        """Merges fields into result.json, with the seconds so far."""
        wall = time.perf_counter() - self.born
        seconds = {**self.seconds, "other": wall - sum(self.seconds.values()), "wall": wall,
                   "train_side": self.side("train"), "eval_side": self.side("eval")}
        self.result.update(fields, seconds={name: round(s, 3) for name, s in seconds.items()})
        if self.writes:
            atomic_write(self.out_dir / "result.json", (json.dumps(self.result, indent=1) + "\n").encode())

# ============================================================================================================
# 4. DATA - shards, the token stream, batches, and how many bytes a token stands for. Uses sections 1-3.

# A shard (upstream's format): 256 little-endian int32 (magic, version, token count, zeros), uint16 tokens.
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024

def read_shard(path: str | Path) -> np.ndarray:
    """Tokens of a .bin shard as a uint16 read-only memory map; InputError names the file and the fault."""
    with refusing(f"{path}: cannot be read", OSError), open(path, "rb") as file:
        header, size = file.read(SHARD_HEADER_BYTES), os.fstat(file.fileno()).st_size
    demand(size >= SHARD_HEADER_BYTES, f"{path}: {size} bytes, shorter than the header of a shard")
    magic, version, count = struct.unpack("<3i", header[:12])
    needed = SHARD_HEADER_BYTES + 2 * count
    demand((magic, version) == (SHARD_MAGIC, SHARD_VERSION),
           f"{path}: magic {magic}, version {version}; expected {SHARD_MAGIC}, {SHARD_VERSION}")
    demand(count > 0 and size == needed, f"{path}: {size} bytes; the header's {count} tokens need {needed}")
    return np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES, shape=(count,))

def shard_header(count: int) -> bytes:
    return struct.pack("<3i", SHARD_MAGIC, SHARD_VERSION, count).ljust(SHARD_HEADER_BYTES, b"\0")

def write_shard(path: str | Path, tokens: np.ndarray) -> None:
    """Writes tokens (integers below 65,536) as a shard, whole or not at all."""
    demand(tokens.size and 0 <= tokens.min() and tokens.max() < 2 ** 16,
           f"{path}: a shard needs at least one token, all between 0 and 65535")
    atomic_write(Path(path), shard_header(tokens.size) + tokens.astype("<u2").tobytes())

def find_path(text: str) -> Path:
    """A relative path as seen from the working folder, else from the script's folder or any above it."""
    for base in (Path.cwd(), *SCRIPT.parents):
        if (base / text).exists():
            return base / text
    raise InputError(f"{text}: not found from {Path.cwd()}, nor from {SCRIPT.parent} up; see data/README.md")

def shard_paths(cfg: Config, split: str) -> list[Path]:
    folder, pattern = find_path(cfg.data_path), f"fineweb_{split}_*.bin"
    paths = sorted(folder.glob(pattern))
    demand(paths, f"DATA_PATH={cfg.data_path!r}: no {pattern} in {folder}")
    return paths

def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

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
            index = np.searchsorted(self.ends, at, side="right")
            part = self.shards[index][at - self.ends[index]:][:count].astype(np.int64)     # a negative index
            top, limit = part.max(), self.vocab_size
            demand(top < limit, f"{self.paths[index]}: token {top}, but VOCAB_SIZE={limit}")
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts)
    def batch(self, unit: int, cfg: Config) -> tuple[np.ndarray, np.ndarray]:
        """Micro-batch `unit`, counted over steps and processes, its own span -> ids, targets [R, T]."""
        span = self.take(unit * (cfg.micro_tokens + 1), cfg.micro_tokens + 1)
        return span[:-1].reshape(-1, cfg.train_seq_len), span[1:].reshape(-1, cfg.train_seq_len)

def load_validation(cfg: Config) -> np.ndarray:
    """All validation tokens (uint16), or the first VAL_TOKENS + 1."""
    paths = shard_paths(cfg, "val")
    tokens = np.concatenate([*map(read_shard, paths)])[:cfg.val_tokens + 1 if cfg.val_tokens else None]
    demand(len(tokens) > 1, f"{paths[0]}: {len(tokens)} validation token; scoring needs two")
    top, limit = tokens.max(), cfg.vocab_size
    demand(top < limit, f"{paths[0]}: token {top}, but VOCAB_SIZE={limit}")
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
        demand(Path(path).is_file(), f"{path}: no such tokenizer file")
        with refusing(f"{path}: not a SentencePiece model", RuntimeError, OSError):
            sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        ids = range(sp.vocab_size())
        boundary = np.array([sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in ids])
        pieces = [sp.id_to_piece(i) for i in ids]
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
        told, made_by = f"the tokenizer {table.name} has {table.vocab_size} tokens", maker_of_shards(cfg)
        demand(table.vocab_size == cfg.vocab_size, f"VOCAB_SIZE={cfg.vocab_size}, but {told}")
        demand(made_by in (None, tokenizer_hash(cfg)), f"TOKENIZER_PATH={cfg.tokenizer_path!r}: the manifest "
               f"says that another tokenizer (sha256 {made_by!s:.16}) made the shards in {cfg.data_path}")
        return table
    def count(self, tokens: np.ndarray) -> np.ndarray:
        """Bytes charged to tokens[1:] -> int16 [len(tokens) - 1]."""
        return self.sizes[tokens[1:]] + (self.marked[tokens[1:]] & ~self.boundary[tokens[:-1]])
    def encode(self, text: str) -> list[int]:
        return self.processor.encode(text) if self.processor else [byte + 4 for byte in text.encode()]
    def decode(self, tokens: Sequence[int]) -> bytes:
        """The text of the tokens, as bytes. Control tokens are empty."""
        if self.processor:
            return self.processor.decode([int(t) for t in tokens]).encode()
        return bytes(int(t) - 4 for t in tokens if t >= 4)

def tokenizer_hash(cfg: Config) -> str:
    return "byte260" if cfg.tokenizer_path == "byte260" else sha256(find_path(cfg.tokenizer_path))

def maker_of_shards(cfg: Config) -> str | None:
    """The hash of the tokenizer that made the shards, if a manifest.json (data/prepare.py) records it."""
    for place in (os.path.abspath, os.path.realpath):                   # links may lead to or from a manifest
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
            folder = Path(place(find_path(cfg.data_path)))
            told = json.loads((folder.parent.parent / "manifest.json").read_text())
            dataset, = (entry for entry in told["datasets"] if entry["name"] == folder.name)
            made_by = {entry["name"]: entry for entry in told["tokenizers"]}[dataset["tokenizer_name"]]
            return "byte260" if made_by.get("kind") == "byte" else made_by.get("sha256")
    return None

# What tells data apart: fields of the result, and a log line that `data/prepare.py verify` also prints.
def tokenizer_identity(cfg: Config, table: ByteTable) -> tuple[dict[str, Any], str]:
    digest, kind = tokenizer_hash(cfg), "sentencepiece" if table.processor else "bytes"
    return dict(tokenizer_sha256=digest), f"val_bpb:enabled tokenizer_kind={kind} tokenizer_path=" \
        f"{cfg.tokenizer_path} sha256:{digest}"
def shards_identity(cfg: Config, split: str, tokens: int) -> tuple[dict[str, Any], str]:
    name, paths = find_path(cfg.data_path).resolve().name, shard_paths(cfg, split)
    hashes = [sha256(path) for path in (paths if split == "val" else sorted({paths[0], paths[-1]}))]
    told = dict(dataset=name, shards=len(paths), tokens=tokens, sha256=hashes)
    return {f"{split}_{key}": value for key, value in told.items()}, f"{split}_loader:dataset:{name} " \
        f"{split}_shards:{len(paths)} tokens:{tokens} first_sha256:{hashes[0]}"

def synthetic_shards(folder: Path, seed: int = 0) -> None:
    """Small byte-level shards of invented words with skewed frequencies, for SMOKE=1."""
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(list("aeioubdklmnrst"), rng.integers(2, 8))) for _ in range(200)]
    chances = 1 / np.arange(1, len(words) + 1)
    for split, documents in (("train", 60), ("val", 6)):
        texts = [" ".join(rng.choice(words, 150, p=chances / chances.sum())) for _ in range(documents)]
        tokens = [token for text in texts for token in (1, *(byte + 4 for byte in text.encode()))]
        write_shard(folder / f"fineweb_{split}_000000.bin", np.array(tokens))

# ============================================================================================================
# 5. MODEL - one forward pass, `hidden`, for all uses. Knows no device, rank or file; indexes no tensor with
#    brackets, so that fake CUDA tensors can run through it on a machine without a GPU.

def norm(x: Tensor) -> Tensor:
    """RMS norm over the last axis, without weights."""
    return F.rms_norm(x, (x.size(-1),))

def rotary_table(time: int, dims: int, base: float, device: torch.device, train_len: int = 0,
                 context: int = 0) -> list[Tensor]:
    """cos and sin of every position's angles -> two float32 [T, 1, dims / 2].

    For a context (0 = time) beyond train_len (0 = never) the base grows, so that the slowest pair turns as
    far as at train_len (NTK).
    """
    base *= max((context or time) / train_len, 1) ** (dims / (dims - 2)) if train_len else 1
    frequencies = base ** (-torch.arange(0, dims, 2, device=device, dtype=torch.float32) / dims)
    angles = torch.outer(torch.arange(time, device=device, dtype=torch.float32), frequencies).unsqueeze(1)
    return [angles.cos(), angles.sin()]

def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-split pairs, on a head's first 2 * cos.size(-1) dimensions; the rest pass."""
    cos, sin, half = cos.to(x.dtype), sin.to(x.dtype), cos.size(-1)
    a, b, rest = x.split((half, half, x.size(-1) - 2 * half), dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)                      # [B, T, H, D]

class Memory:
    """What one pass over a long sequence carries from piece to piece: attention with a sliding window.

    A position sees the last `window` positions, itself included; given `bos`, only those of its document,
    as if that stood alone. However the sequence is cut, the outcome is that of one pass with this mask.
    Keys are kept unrotated and turned from each block's first key on, so that angles stay small.
    """
    def __init__(self, window: int, bos: int | None):
        self.window, self.bos, self.carried = window, bos, {}
    def extend(self, name: str, x: Tensor, count: int) -> Tensor:
        """x [B, T, ...] after the last `count` positions under this name -> [B, count + T, ...]."""
        before = self.carried.get(name)                                 # zeros stand before the first piece
        before = x.new_zeros(x.size(0), count, *x.shape[2:]) if before is None else before
        whole = torch.cat((before, x), 1)
        self.carried[name] = whole.narrow(1, x.size(1), count)
        return whole
    def begin(self, ids: Tensor) -> None:
        """Mask and starts of a piece, ids [B, T]; T is less than the window or a multiple of it."""
        fresh, self.block, self.calls = not self.carried, min(ids.size(1), self.window), 0
        self.starts = ids == (-1 if self.bos is None else self.bos)                                 # [B, T]
        number = self.starts.cumsum(1) + self.carried.get("number", 1)
        self.carried["number"] = number.narrow(1, ids.size(1) - 1, 1)
        if fresh:
            self.starts = self.starts | (torch.arange(ids.size(1), device=ids.device) == 0)
        seen = self._blocks(self.extend("document", number, self.window - 1))                       # [G, L]
        rows, columns = (torch.arange(n, device=ids.device) for n in (self.block, seen.size(1)))
        ahead = columns - rows.unsqueeze(1)                             # of the oldest position in the window
        own = seen.unsqueeze(1) == number.reshape(-1, self.block, 1)
        self.mask = (own & (ahead >= 0) & (ahead < self.window)).unsqueeze(1)                 # [G, 1, C, L]
    def _blocks(self, whole: Tensor) -> Tensor:
        """[B, window - 1 + T, ...] -> overlapping blocks, one for each block of queries [G, L, ...]."""
        blocks = whole.unfold(1, self.block + self.window - 1, self.block)
        return blocks.movedim(-1, 2).flatten(0, 1)
    def seen(self, x: Tensor) -> Tensor:
        """Keys or values [B, T, K, D] -> what each block may see; a cache for each executed layer."""
        self.calls += 1
        return self._blocks(self.extend(f"layer {self.calls}", x, self.window - 1))

def previous(x: Tensor, memory: Memory | None, name: str) -> Tensor:
    """[B, T, ...], one position later; zeros stand before the start of a sequence."""
    if memory is None:
        return F.pad(x, (0, 0) * (x.ndim - 2) + (1, -1))
    starts = memory.starts.view(*memory.starts.shape, *[1] * (x.ndim - 2))
    return memory.extend(name, x, 1).narrow(1, 0, x.size(1)).masked_fill(starts, 0)

def row_steps(w: Tensor, top: int, floor: bool) -> Tensor:
    """Quantization step of every row for whole numbers up to `top`: [R, C] -> [R, 1]."""
    return (w.detach().abs().amax(1, keepdim=True) / top).clamp(min=1 / top if floor else 1e-12)

class Linear(nn.Module):
    """A matrix without bias, kept in float32 and cast to the input's type at use.

    fake_top, if not 0: top level of fake quantization, through which the gradient passes straight; switching
    it makes a second compiled graph. adapter, if any: two thin matrices for each row of the batch, [B, R, I]
    and [B, O, R], whose product is added.
    """
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight, self.fake_top, self.fake_floor = nn.Parameter(torch.empty(outputs, inputs)), 0, False
        self.adapter: tuple[Tensor, Tensor] | None = None
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        if self.fake_top:
            step = row_steps(w, self.fake_top, self.fake_floor)
            w = w + ((w / step).round() * step - w).detach()
        out = F.linear(x, w.to(x.dtype))
        if self.adapter is None:
            return out
        low, high = (part.to(x.dtype).mT for part in self.adapter)
        return out + x @ low @ high

class BigramHash(nn.Module):
    """An embedding of the hashed pair (previous token, token), added to the token's own.

    xor (PR 489, PR 859): the last row is kept for position 0, and the branch has a learned scale. linear
    (PR 740): token 0 stands before position 0, no scale. A zero table needs a projection that is not zero.
    """
    def __init__(self, cfg: Config):
        super().__init__()
        self.rows, self.xor = cfg.bigram_vocab_size, cfg.bigram_hash == "xor"
        self.embed = nn.Embedding(self.rows, cfg.bigram_dim)
        self.proj = Linear(cfg.bigram_dim, cfg.model_dim)
        self.scale = nn.Parameter(torch.empty(())) if self.xor else None
    def rows_of(self, ids: Tensor, memory: Memory | None = None) -> Tensor:
        """Table row of every position: [B, T] -> [B, T]."""
        before = previous(ids, memory, "ids")
        if not self.xor:
            return (2654435761 * ids + 40503 * before) % self.rows
        pairs = torch.bitwise_xor(36313 * ids, 27191 * before) % (self.rows - 1)
        starts = torch.arange(ids.size(1), device=ids.device) == 0 if memory is None else memory.starts
        return torch.where(starts, self.rows - 1, pairs)
    def forward(self, ids: Tensor, dtype: torch.dtype, memory: Memory | None = None) -> Tensor:
        out = self.proj(self.embed(self.rows_of(ids, memory)).to(dtype))                        # [B, T, D]
        return out if self.scale is None else out * self.scale.to(dtype)

class Smear(nn.Module):
    """SmearGate: out_t = (1 - g) x_t + g x_{t-1}, g = sigmoid(gate) per dimension; can stop at a BOS."""
    def __init__(self, cfg: Config):
        super().__init__()
        self.bos = cfg.bos_id if cfg.smear_bos_mask else None
        self.gate = nn.Parameter(torch.empty(cfg.model_dim))
    def forward(self, x: Tensor, ids: Tensor, memory: Memory | None = None) -> Tensor:
        gate = torch.sigmoid(self.gate.to(x.dtype))
        if self.bos is not None:
            gate = gate * (ids != self.bos).unsqueeze(-1).to(x.dtype)
        return torch.lerp(x, previous(x, memory, "stream"), gate.expand_as(x))

class ValueEmbedding(nn.Module):
    """One token table whose projection is added to the values of the listed layers (PR 859)."""
    def __init__(self, cfg: Config):
        super().__init__()
        self.embed = nn.Embedding(cfg.vocab_size, cfg.ve_dim)
        self.proj = Linear(cfg.ve_dim, cfg.num_kv_heads * cfg.head_dim)
        self.scale = nn.Parameter(torch.empty(()))
    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return self.proj(self.embed(ids).to(dtype)) * self.scale.to(dtype)                     # [B, T, K * D]

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
    def forward(self, x: Tensor, rotary: list[Tensor], own_values: Tensor | None,
                memory: Memory | None = None) -> Tensor:
        batch, time, width = x.shape
        values = self.c_v(x) if own_values is None else self.c_v(x) + own_values
        q = self.c_q(x).view(batch, time, self.heads, -1)                                       # [B, T, H, D]
        k, v = (y.view(batch, time, self.kv_heads, -1) for y in (self.c_k(x), values))          # [B, T, K, D]
        q, k, seen, turn, attend = norm(q), norm(k), v, rotary, self.attend
        if memory is not None:                                          # queries in blocks of C: [G, C, H, D]
            q, k, seen = q.reshape(-1, memory.block, *q.shape[2:]), memory.seen(k), memory.seen(v)
            turn = [part.narrow(0, memory.window - 1, memory.block) for part in rotary]
            attend = functools.partial(sdpa_attention, mask=memory.mask)
        q = rotate(q, *turn) * self.q_gain.to(x.dtype).unsqueeze(-1)
        out = attend(q, rotate(k, *rotary), seen).reshape(batch, time, self.heads, -1)          # [B, T, H, D]
        if self.xsa:
            own = F.normalize(v, dim=-1).unsqueeze(3)                                      # [B, T, K, 1, D]
            grouped = out.reshape(batch, time, self.kv_heads, -1, out.size(-1))            # [B, T, K, H/K, D]
            out = grouped - (grouped * own).sum(-1, keepdim=True) * own
        return self.proj(out.reshape(batch, time, width))

class MLP(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        hidden = int(cfg.mlp_mult * cfg.model_dim)
        self.fc, self.proj = Linear(cfg.model_dim, hidden), Linear(hidden, cfg.model_dim)
        self.slope = cfg.leaky_slope
    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.leaky_relu(self.fc(x), self.slope).square())

class Block(nn.Module):
    """Mix in the embedding stream, then attention, then MLP, each with learned weights per dimension."""
    def __init__(self, cfg: Config, layer: int):
        super().__init__()
        self.attn, self.mlp = Attention(cfg, xsa=layer >= cfg.num_layers - cfg.xsa_last_n), MLP(cfg)
        self.attn_scale, self.mlp_scale = (nn.Parameter(torch.empty(cfg.model_dim)) for _ in range(2))
        self.resid_mix = nn.Parameter(torch.empty(2, cfg.model_dim)) if cfg.x0_mix else None
        self.ln_scale = 1 / math.sqrt(layer + 1) if cfg.ln_scale else None
    def normed(self, x: Tensor) -> Tensor:
        return norm(x) if self.ln_scale is None else norm(x) * self.ln_scale
    def forward(self, x: Tensor, x0: Tensor, rotary: list[Tensor], own_values: Tensor | None,
                memory: Memory | None = None) -> Tensor:
        if self.resid_mix is not None:
            keep, blend = self.resid_mix.to(x.dtype).unbind()
            x = keep * x + blend * x0
        x = x + self.attn_scale.to(x.dtype) * self.attn(self.normed(x), rotary, own_values, memory)
        return x + self.mlp_scale.to(x.dtype) * self.mlp(self.normed(x))

class MixerHead(Linear):
    """Logits of the weights of network and n-gram orders, from the final norm's output (PR 859), float32."""
    def __init__(self, cfg: Config):
        super().__init__(cfg.model_dim, len(cfg.ngram_orders) + 1)
        self.bias = nn.Parameter(torch.empty(self.weight.size(0)))
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight, self.bias)                                      # [..., 1 + K]

MIXER_LOSS_WEIGHT, MIXER_NEURAL_FLOOR = 0.1, 0.05                      # as PR 859 has them

def mix(gate: Tensor, p: Tensor, ratios: Tensor, floor: float = MIXER_NEURAL_FLOOR) -> Tensor:
    """Learned mixture of a target's probability (PR 859), the same in training and scoring -> [...].

    gate [..., 1 + K] logits; p [...] by the network, whose weight is at least `floor`; ratios [..., K] by
    order, negative where an order does not count.
    """
    weights = gate.masked_fill(F.pad(ratios < 0, (1, 0)), -1e9).softmax(-1)
    return floor * p + (1 - floor) * (weights * torch.cat((p.unsqueeze(-1), ratios), -1)).sum(-1)

# Matrices by shape that are gains by role: trained by Adam, kept in float32.
CONTROL_NAMES = ("resid_mix", "skip_weights")

class GPT(nn.Module):
    """The model. Parameters are float32; `compute_dtype` is the type of the stream, chosen by the runtime."""
    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg, self.compute_dtype = cfg, torch.float32
        self.tok_emb = nn.Embedding(cfg.vocab_size, cfg.model_dim)
        self.lm_head = None if cfg.tie_embeddings else Linear(cfg.model_dim, cfg.vocab_size)
        self.bigram = BigramHash(cfg) if cfg.bigram_vocab_size else None
        self.smear = Smear(cfg) if cfg.smear else None
        self.ve_shared = ValueEmbedding(cfg) if cfg.ve_layers else None
        scales = [nn.Parameter(torch.empty(())) for _ in cfg.ve_layers]
        self.ve_layer_scales = nn.ParameterList(scales) if scales else None
        self.alpha_head = MixerHead(cfg) if cfg.mixer_head else None
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
    def hidden(self, ids: Tensor, memory: Memory | None = None) -> Tensor:
        """ids [B, T] -> the stream after the final norm [B, T, D]; memory: they continue what it has seen."""
        cfg, dtype, time, context = self.cfg, self.compute_dtype, ids.size(1), 0
        if memory is not None:
            memory.begin(ids)
            time, context = memory.block + memory.window - 1, memory.window
        x = self.tok_emb(ids).to(dtype)
        if self.bigram is not None:
            x = x + self.bigram(ids, dtype, memory)
        smear = self.smear or (lambda x, ids, memory: x)
        x = norm(smear(x, ids, memory)) if cfg.smear_before_norm else smear(norm(x), ids, memory)
        x0, skips, dims = x, [], cfg.rope_dims or cfg.head_dim
        rotary = rotary_table(time, dims, cfg.rope_base, ids.device, cfg.rope_train_seq_len, context)
        values = self.ve_shared(ids, dtype) if self.ve_shared is not None else None
        skip_weights = iter(self.skip_weights.to(dtype).unbind() if self.skip_weights is not None else ())
        for layer, block in enumerate(self.blocks):
            if layer >= self.encoders and skips:
                x = x + next(skip_weights) * skips.pop()
            own_values = values * self.ve_layer_scales[cfg.ve_layers.index(layer)].to(dtype) \
                if layer in cfg.ve_layers else None
            x = block(x, x0, rotary, own_values, memory)
            if layer < self.encoders and self.skip_weights is not None:
                skips.append(x)
        return norm(x)
    def head(self, hidden: Tensor) -> Tensor:
        """[..., D] -> logits [..., V], float32, softcapped."""
        weight = self.tok_emb.weight if self.lm_head is None else self.lm_head.weight
        logits, cap = F.linear(hidden, weight.to(hidden.dtype)).float(), self.cfg.logit_softcap
        return cap * torch.tanh(logits / cap) if cap else logits
    def logits(self, ids: Tensor) -> Tensor:
        """ids [B, T] -> [B, T, V], float32, softcapped."""
        return self.head(self.hidden(ids))
    def forward(self, ids: Tensor, targets: Tensor, ratios: Tensor | None = None) -> Tensor:
        """Mean nats per target: ids, targets [B, T] -> scalar. ratios [B, T, K] add the mixture's loss."""
        hidden = self.hidden(ids)
        nats = F.cross_entropy(self.head(hidden).flatten(0, 1), targets.flatten(), reduction="none")
        if ratios is None:
            return nats.mean()
        p = mix(self.alpha_head(hidden).flatten(0, 1), (-nats).exp(), ratios.flatten(0, 1))
        return nats.mean() - MIXER_LOSS_WEIGHT * p.clamp(min=1e-12).log().mean()

def initial_value(name: str, shape: tuple[int, ...], cfg: Config, generator: torch.Generator) -> Tensor:
    """A parameter's value at step 0. Matrices that write to the stream are zero: blocks start as identity."""
    layer, _, in_block = name.removeprefix("blocks.").partition(".")
    key = in_block if name.startswith("blocks.") else "ve" if name.startswith("ve_layer_scales") else name
    depth = (int(layer) + 1) ** -0.5 if key == in_block and cfg.depth_scale_init else 1.0
    zeros = ["smear.gate", "attn.proj.weight", "mlp.proj.weight", "lm_head.weight", "alpha_head.weight",
             *["bigram.embed.weight"] * (cfg.bigram_init != "normal"),
             *["bigram.proj.weight"] * (cfg.bigram_init == "dead"),
             *["ve_shared.proj.weight"] * (not cfg.ortho_init)]
    constants = {**dict.fromkeys(zeros, 0.0), "attn.q_gain": cfg.qk_gain_init, "attn_scale": depth, "ve": 1.0,
                 "mlp_scale": depth, "skip_weights": 1.0, "bigram.scale": 0.05, "ve_shared.scale": 0.1}
    stds = {"tok_emb.weight": cfg.tied_embed_init_std if cfg.tie_embeddings else 1.0,
            "bigram.embed.weight": 1.0, "ve_shared.embed.weight": 0.01}
    if key in constants:
        return torch.full(shape, constants[key])
    if name.endswith(("resid_mix", "alpha_head.bias")):         # all from the stream, most from the network
        first = torch.zeros(shape)
        first.select(0, 0).fill_(1.0 if name.endswith("resid_mix") else 2.0)
        return first
    if name in stds:
        return torch.randn(shape, generator=generator) * stds[name]
    if cfg.ortho_init:
        gain = (2 * cfg.num_layers) ** -0.5 if cfg.ortho_init == "scaled" and key == name else 1.0
        return nn.init.orthogonal_(torch.empty(shape), gain, generator)
    return (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(shape[1])   # as torch's linear layers

def training_flops(cfg: Config, model: GPT) -> float:
    """FLOPs a trained token costs: 6 per multiply-accumulate parameter, and the causal half of attention."""
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, Linear))
    head = cfg.vocab_size * cfg.model_dim if cfg.tie_embeddings else 0
    return 6.0 * (matrices + head) + 6.0 * cfg.num_layers * cfg.train_seq_len * cfg.model_dim

# ============================================================================================================
# 6. OPTIMIZER - Muon, which parameter goes where, schedules, averaging. Uses sections 1-2 and names of 5.

def newton_schulz(matrices: Tensor, steps: int) -> Tensor:
    """Nearly each matrix's orthogonal factor: [G, R, C] -> same shape, singular values about 0.7 to 1.2."""
    a, b, c = 3.4445, -4.7750, 2.0315                       # Jordan 2024: steep at zero, hovering around one
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x

class Muon(torch.optim.Optimizer):
    """Momentum, then orthogonalised updates, for matrices [R, C] only (Jordan 2024); equal shapes stacked."""
    def __init__(self, params: Any, lr: float, momentum: float, backend_steps: int = 5,
                 weight_decay: float = 0.0, runtime: Runtime | None = None):
        super().__init__(params, dict(lr=lr, momentum=momentum, backend_steps=backend_steps,
                                      weight_decay=weight_decay))
        self.runtime = runtime
        self.orthogonalize = runtime.compile(newton_schulz) if runtime else newton_schulz
    def _orthogonal(self, stack: Tensor, steps: int) -> Tensor:
        """Each process does its share of the stack; the result does not depend on their number."""
        rt, count = self.runtime, stack.size(0)
        if rt is None:
            return self.orthogonalize(stack, steps)
        share = -(-count // rt.world)
        stack = F.pad(stack, (0, 0, 0, 0, 0, share * rt.world - count))
        mine = self.orthogonalize(stack[rt.rank * share:(rt.rank + 1) * share].to(rt.dtype), steps)
        return rt.all_gather(mine)[:count]
    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p] = self.state[p] or {"momentum": torch.zeros_like(p)}
                    by_shape.setdefault(p.shape, []).append(p)
            for (rows, cols), params in by_shape.items():
                grads, buffers = [p.grad for p in params], [self.state[p]["momentum"] for p in params]
                torch._foreach_mul_(buffers, group["momentum"])
                torch._foreach_add_(buffers, grads)
                updates = torch._foreach_add(grads, buffers, alpha=group["momentum"])              # Nesterov
                stack = self._orthogonal(torch.stack(updates), group["backend_steps"])
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, list(stack.to(params[0].dtype)),
                                    alpha=-group["lr"] * math.sqrt(max(1, rows / cols)))

# Optimizer groups: name -> optimizer, settings of rate and decay, which parameters; the first match wins.
GROUP_RULES: dict[str, tuple[str, str, str, Callable[[str, Tensor, Config], bool]]] = {
    "head": ("adam", "head_lr", "embed_wd", lambda name, p, cfg: name == "lm_head.weight"),
    "embed": ("adam", "embed_lr", "embed_wd",
              lambda name, p, cfg: name == "tok_emb.weight" and not cfg.tie_embeddings),
    "tables": ("adam", "tied_embed_lr", "embed_wd",
               lambda name, p, cfg: name.endswith(("tok_emb.weight", ".embed.weight"))),
    "scalars": ("adam", "scalar_lr", "adam_wd",
                lambda name, p, cfg: p.ndim < 2 or name.endswith((*CONTROL_NAMES, "alpha_head.weight"))),
    "matrices": ("muon", "matrix_lr", "muon_wd", lambda name, p, cfg: p.ndim == 2)}

def parameter_groups(model: nn.Module, cfg: Config) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Group name -> (name, parameter) pairs; raises if a parameter fits no group."""
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {group: [] for group in GROUP_RULES}
    for name, p in model.named_parameters():
        group = next((group for group, rule in GROUP_RULES.items() if rule[3](name, p, cfg)), None)
        if name.startswith("bigram.") and p.ndim == 2:
            group = cfg.bigram_optim or group
        if group is None:
            raise ValueError(f"no optimizer group takes {name} {tuple(p.shape)}; add a rule to GROUP_RULES")
        groups[group].append((name, p))
    return groups

def build_optimizers(model: nn.Module, cfg: Config, rt: Runtime) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for the rest; base_lr is a rate before the schedule's factor."""
    groups: dict[str, list[dict]] = {"muon": [], "adam": []}
    for name, members in parameter_groups(model, cfg).items():
        optimizer, lr, decay, _ = GROUP_RULES[name]
        if members:
            groups[optimizer].append(dict(params=[p for _, p in members], weight_decay=getattr(cfg, decay),
                                          lr=getattr(cfg, lr), base_lr=getattr(cfg, lr)))
    return [Muon(groups["muon"], cfg.matrix_lr, cfg.muon_momentum, cfg.muon_backend_steps, runtime=rt),
            torch.optim.AdamW(groups["adam"], betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps,
                              fused=rt.device.type != "mps")]

def flat_gradients(params: Sequence[nn.Parameter]) -> Tensor:
    """One buffer behind all gradients: one reduction, one norm."""
    buffer = torch.zeros(sum(p.numel() for p in params), device=params[0].device)
    for p, part in zip(params, buffer.split([p.numel() for p in params])):
        p.grad = part.view_as(p)
    return buffer

def clip_gradients(buffer: Tensor, norm: float) -> None:
    """Scales the gradients down to this norm at most; 0 = off. No host synchronisation."""
    if norm:
        buffer.mul_((norm / (buffer.norm() + 1e-6)).clamp(max=1.0))

def warmdown(cfg: Config, step: int, steps_left: float) -> float:
    """Factor of every learning rate: 1, then straight to 0 over the last WARMDOWN_ITERS steps."""
    return min(1.0, max(steps_left, 0.0) / cfg.warmdown_iters) if cfg.warmdown_iters else 1.0

def momentum_warmup(cfg: Config, step: int, steps_left: float) -> float:
    """Muon's momentum: straight from its start value to MUON_MOMENTUM."""
    share = min(step / cfg.muon_momentum_warmup_steps, 1.0) if cfg.muon_momentum_warmup_steps else 1.0
    return (1 - share) * cfg.muon_momentum_warmup_start + share * cfg.muon_momentum

# Schedule stages: optimizer field -> pure function of settings, steps done and steps left, before every step.
STAGES: dict[str, Callable[[Config, int, float], float]] = {"lr": warmdown, "momentum": momentum_warmup}

def apply_schedule(optimizers: Sequence[Any], cfg: Config, step: int, steps_left: float) -> float:
    """Sets every group's rate and momentum for the next step; returns the factor of the rates."""
    values = {field: stage(cfg, step, steps_left) for field, stage in STAGES.items()}
    for group in itertools.chain.from_iterable(optimizer.param_groups for optimizer in optimizers):
        for field in values.keys() & group.keys():
            group[field] = group["base_lr"] * values["lr"] if field == "lr" else values[field]
    return values["lr"]

class Averager:
    """Averages of the weights in float32: exponential (EMA), of every so many steps (SWA), half of each."""
    def __init__(self, model: nn.Module, cfg: Config):
        self.cfg, self.live, self.means, self.count = cfg, list(model.parameters()), {}, 0  # count: the SWA's
        if cfg.ema_decay and not cfg.ema_start:
            self._begun("ema")              # with the initial weights (PR 859), else at EMA_START (PR 740)
    def _begun(self, name: str) -> list[Tensor]:
        return self.means.get(name) or self.means.setdefault(name, [p.detach().clone() for p in self.live])
    @torch.no_grad()
    def update(self, step: int, share: float) -> None:
        """After step number `step`; share: how much of the run is over."""
        cfg = self.cfg
        if cfg.ema_decay and share >= cfg.ema_start:
            torch._foreach_lerp_(self._begun("ema"), self.live, 1 - cfg.ema_decay)
        if cfg.swa_every and share >= cfg.swa_start and step % cfg.swa_every == 0:
            self.count += 1
            torch._foreach_lerp_(self._begun("swa"), self.live, 1 / self.count)
    @torch.no_grad()
    def apply(self) -> None:
        """The model's weights become the average, if there is one yet."""
        for share, mean in zip((1.0, 0.5), self.means.values()):
            torch._foreach_lerp_(self.live, mean, share)

# ============================================================================================================
# 7. PACKING - a state dict to one self-describing file and back. Uses section 1, steps and names of 5.

MAGIC, FORMAT_VERSION = b"PGOLF\r\n\x1a", 1
PREFIX = struct.Struct("<8sHIQ32s")                        # magic, version, header and payload bytes, SHA-256
STREAMS = ("codes", "scales", "floats")                                 # the payload holds like next to like

def gptq(w: Tensor, scale: Tensor, hessian: Tensor, top: int, damp: float, block: int = 128) -> Tensor:
    """Whole numbers for w [R, C] at row steps scale [R, 1] with a small error in w @ x (GPTQ, 2210.17323).

    hessian [C, C]: mean of x x^T. Columns, by falling diagonal, make up for earlier losses; unseen become 0.
    """
    hessian, w = hessian.double().clone(), w.double().clone()
    dead = hessian.diagonal() == 0
    w[:, dead] = 0
    hessian.diagonal()[dead] = 1
    order = hessian.diagonal().argsort(descending=True, stable=True)
    w, hessian = w[:, order], hessian[order][:, order]
    hessian.diagonal().add_(damp * hessian.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    codes, scale = torch.empty_like(w), scale.double()
    for lo in range(0, w.size(1), block):
        hi = min(lo + block, w.size(1))
        errors = torch.empty(w.size(0), hi - lo, dtype=torch.float64)
        for j in range(lo, hi):
            codes[:, j] = (w[:, j] / scale[:, 0]).round().clamp(-top, top)
            errors[:, j - lo] = (w[:, j] - codes[:, j] * scale[:, 0]) / inverse[j, j]
            w[:, j:hi] -= errors[:, j - lo, None] * inverse[j, j:hi]
        w[:, hi:] -= errors @ inverse[lo:hi, hi:]
    return codes[:, order.argsort()]

class RowInt:
    """Whole numbers of a few bits, one float16 scale a row; each row's clip level has the least error."""
    def __init__(self, bits: int):
        self.top = 2 ** (bits - 1) - 1
    def sizes(self, shape: Sequence[int]) -> dict[str, int]:
        return {"codes": math.prod(shape), "scales": 2 * shape[0]}
    def encode(self, w: Tensor, cfg: Config, hessian: Tensor | None = None) -> dict[str, bytes]:
        """w [R, C]; hessian [C, C]: its diagonal weighs the clip search, then GPTQ; None: plain rounding."""
        if cfg.prune_pct:
            w = w * (w.abs() >= float(np.quantile(w.abs().numpy(), cfg.prune_pct)))
        best, weights = torch.full((w.size(0), 1), math.inf), 1 if hessian is None else hessian.diagonal()
        codes, scales = torch.zeros_like(w), torch.zeros(w.size(0), 1)
        for step in range(cfg.quant_clip_steps):
            scale = row_steps(w, self.top, False) * (1 - 0.6 * step / cfg.quant_clip_steps)
            scale = scale.clamp(1 / self.top if cfg.quant_scale_floor else 2.0 ** -24, 65504.0).half().float()
            tried = (w / scale).round().clamp(-self.top, self.top)
            error = ((tried * scale - w).square() * weights).sum(1, keepdim=True)
            better = error < best
            best, scales, codes = (torch.where(better, new, old) for new, old in (
                (error, best), (scale, scales), (tried, codes)))
        if hessian is not None:
            codes = gptq(w, scales, hessian, self.top, cfg.gptq_damp) * (w != 0)     # what is pruned stays so
        return {"codes": codes.to(torch.int8).numpy().tobytes(), "scales": scales.half().numpy().tobytes()}
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
    def encode(self, w: Tensor, cfg: Config, hessian: Tensor | None = None) -> dict[str, bytes]:
        return {"floats": w.numpy().astype(self.dtype).tobytes()}
    def decode(self, parts: Mapping[str, bytes], shape: Sequence[int]) -> Tensor:
        return torch.from_numpy(np.frombuffer(parts["floats"], self.dtype).reshape(shape).astype(np.float32))

QUANTIZERS = {"f16": AsFloat("<f2"), "f32": AsFloat("<f4"), **{f"int{b}": RowInt(b) for b in range(2, 9)}}

def _expand_zstd(data: bytes, size: int) -> bytes:
    named = zstandard.get_frame_parameters(data).content_size           # never trusted with an allocation
    demand(named == size, "the zstd frame names another size")
    return zstandard.ZstdDecompressor().decompress(data, max_output_size=size, allow_extra_data=False)

def _expand_stream(stream: Any, data: bytes, size: int) -> bytes:
    out = stream.decompress(data, size + 1)
    demand(stream.eof and not stream.unused_data, "the compressed stream does not end where it should")
    return out

# Codec -> (compress, expand to a known size). Packed bits would defeat them: every symbol is one byte.
CODECS: dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes, int], bytes]]] = {
    "zstd": (lambda data: zstandard.ZstdCompressor(level=22).compress(data), _expand_zstd),
    "zlib": (lambda data: zlib.compress(data, 9),
             lambda data, size: _expand_stream(zlib.decompressobj(), data, size)),
    "lzma": (lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
             lambda data, size: _expand_stream(lzma.LZMADecompressor(memlimit=1 << 28), data, size))}

def tensor_role(name: str) -> str:
    """embed, table, attn, mlp or other: what QUANT_POLICY speaks of."""
    marks = {"tok_emb": "embed", "lm_head": "embed", ".embed.": "table", ".attn.": "attn", ".mlp.": "mlp"}
    return next((role for mark, role in marks.items() if mark in name), "other")

def quantizer_of(name: str, w: Tensor, cfg: Config) -> str:
    """The quantizer of a tensor: gains float32, small matrices float16, the rest by the policy."""
    if w.ndim != 2 or name.endswith(CONTROL_NAMES):
        return "f32"
    if w.numel() <= cfg.keep_float_max_numel:
        return "f16" if w.abs().max() < 65504 else "f32"
    exceptions = dict(re.findall(r"(\w+):(\d)", cfg.quant_policy))
    return f"int{exceptions.get(tensor_role(name), cfg.quant_bits)}"

def pack(state_dict: Mapping[str, Tensor], cfg: Config, hessians: Mapping[str, Tensor] | None = None,
         code_bytes: int = 0, notes: Mapping[str, Any] | None = None) -> bytes:
    """Weights and the settings that rebuild and score them as one file's bytes; InputError if not finite.

    hessians: name -> [C, C], mean of x x^T at a matrix's input (GPTQ). code_bytes, notes: recorded (JSON).
    """
    table, parts = [], {stream: bytearray() for stream in STREAMS}
    for name, w in state_dict.items():
        w, hessian = w.detach().to("cpu", torch.float32).contiguous(), (hessians or {}).get(name)
        demand(w.isfinite().all(), f"{name}: has values that are not finite; nothing was packed")
        kind = quantizer_of(name, w, cfg)
        table.append([name, list(w.shape), kind])
        for stream, data in QUANTIZERS[kind].encode(w, cfg, hessian).items():
            parts[stream] += data
    header = dict(config=cfg.group("model", "pack", "score") | {"eval_seq_len": cfg.score_len}, tensors=table,
                  codec=cfg.compressor, code_bytes=code_bytes, notes=dict(notes or {}))
    header = zlib.compress(json.dumps(header, separators=(",", ":")).encode(), 9)
    payload = CODECS[cfg.compressor][0](b"".join(parts.values()))
    digest = hashlib.sha256(header + payload).digest()
    return PREFIX.pack(MAGIC, FORMAT_VERSION, len(header), len(payload), digest) + header + payload

def read_header(blob: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the still compressed payload of an artifact, lengths and checksum verified."""
    demand(len(blob) >= PREFIX.size, f"artifact: {len(blob)} bytes, shorter than its prefix")
    magic, version, header_bytes, payload_bytes, digest = PREFIX.unpack_from(blob)
    demand(magic == MAGIC, f"artifact: begins with {magic!r}, expected {MAGIC!r}")
    demand(version == FORMAT_VERSION, f"artifact: format version {version}, not {FORMAT_VERSION}")
    wanted, header_end = PREFIX.size + header_bytes + payload_bytes, PREFIX.size + header_bytes
    demand(len(blob) == wanted, f"artifact: {len(blob)} bytes, not {wanted} (cut short or extended)")
    demand(hashlib.sha256(blob[PREFIX.size:]).digest() == digest, "artifact: wrong checksum, it is damaged")
    stream = zlib.decompressobj()
    with refusing("artifact: unreadable header", zlib.error, ValueError, RecursionError):
        header = json.loads(stream.decompress(blob[PREFIX.size:header_end], 4 << 20))
    demand(stream.eof and isinstance(header, dict), "artifact: unreadable header (no JSON object)")
    return header, blob[header_end:]

def _read_config(stored: Any) -> Config:
    defaults = {field.name: field.default for field in FIELDS.values()}
    demand(isinstance(stored, dict) and stored.keys() <= defaults.keys(),
           "artifact: its settings are not those of this program (made by another version?)")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
    for name, value in values.items():
        wanted = type(defaults[name])
        sound = type(value) is wanted and (wanted is not tuple or all(type(part) is int for part in value))
        demand(sound or wanted is float and type(value) is int,
               f"artifact: setting {name.upper()}={value!r} has the wrong type")
    problems = check_config(Config(**values))
    demand(not problems, f"artifact: {'; '.join(problems)}")
    return Config(**values)

def _expand(blob: bytes) -> tuple[dict[str, Any], list[tuple[str, list[int], str, dict[str, bytes]]]]:
    """The header, and (name, shape, quantizer, parts) of every tensor; absurd claims allocate nothing."""
    (header, payload), sizes = read_header(blob), dict.fromkeys(STREAMS, 0)     # bytes of each stream
    with refusing("artifact: bad tensor table", ValueError, TypeError, KeyError, AttributeError, IndexError):
        for name, shape, kind in header["tensors"]:
            demand(isinstance(name, str) and all(type(n) is int and 0 < n < 2 ** 31 for n in shape) and
                   (len(shape) == 2 or not kind.startswith("int")), f"{name} {shape} {kind}")
            for stream, size in QUANTIZERS[kind].sizes(shape).items():
                sizes[stream] += size
    total, limit, codec = sum(sizes.values()), (64 << 20) + 256 * len(payload), header.get("codec")
    demand(total <= limit, f"artifact: claims {total} bytes of weights in {len(payload)} bytes of payload")
    known = isinstance(codec, str) and codec in CODECS
    demand(known, f"artifact: codec {codec!r}; this program has {', '.join(CODECS)}")
    with refusing(f"artifact: the {codec} payload cannot be expanded", zstandard.ZstdError, zlib.error,
                  lzma.LZMAError, InputError):
        raw = CODECS[codec][1](payload, total)
    demand(len(raw) == total, f"artifact: the payload expands to {len(raw)} bytes, the tensors need {total}")
    file = io.BytesIO(raw)
    streams = {stream: io.BytesIO(file.read(size)) for stream, size in sizes.items()}
    return header, [
        (name, shape, kind, {s: streams[s].read(size) for s, size in QUANTIZERS[kind].sizes(shape).items()})
        for name, shape, kind in header["tensors"]]

def unpack(blob: bytes) -> tuple[Config, dict[str, Tensor]]:
    """An artifact's settings and float weights, or InputError; runs nothing, allocates only what is there."""
    header, tensors = _expand(blob)
    weights = {name: QUANTIZERS[kind].decode(parts, shape) for name, shape, kind, parts in tensors}
    for name, w in weights.items():
        demand(w.isfinite().all(), f"artifact: {name} has values that are not finite")
    return _read_config(header.get("config")), weights

def size_report(blob: bytes, code_bytes: int, cap: int) -> list[str]:
    """Log lines: bytes of code, model and both, the margin, the largest tensors by their symbols' entropy."""
    header, tensors = _expand(blob)
    rows, total, codec = [], len(blob) + code_bytes, header["codec"]
    for name, shape, kind, parts in tensors:
        counts = np.unique(np.frombuffer(b"".join(parts.values()), np.uint8), return_counts=True)[1]
        rows.append((-(counts * np.log2(counts / counts.sum())).sum() / 8, kind, name, shape))
    return [f"Code size: {code_bytes} bytes", f"Serialized model {codec}: {len(blob)} bytes",
            f"Total submission size {codec}: {total} bytes",
            f"size_cap:{cap} margin:{cap - total} bytes" + ("" if total <= cap else " OVER THE CAP"),
            *("  about {:9.0f} bytes  {:5} {} {}".format(*row) for row in sorted(rows, reverse=True)[:5])]

# ============================================================================================================
# 8. SCORING - windows, n-gram counts, predictors, the score-first harness. Uses sections 1-6.

# Work on the device: ids [B, T], zero-padded at the right; row b scores its last S inputs, whose targets
# [B, S] are number index [B, S] of the stream; the first valid[b] of them are real. lead: the tokens before;
# slots: which adapters the rows have.
class Batch(namedtuple("Batch", "ids targets index valid lead slots", defaults=(None, None))):
    @property
    def real(self) -> np.ndarray:
        """Which of the targets are [B, S] bool."""
        return np.arange(self.targets.size(1)) < self.valid[:, None]

def make_batch(tokens: np.ndarray, starts: np.ndarray, length: int, index: np.ndarray, valid: np.ndarray,
               rt: Runtime, **rest: Any) -> Batch:
    """Rows of `length` inputs from `starts` [B] on, of which the targets `index` [B, S] are scored."""
    limit = len(tokens) - 1
    def pick(at: np.ndarray, end: int) -> Tensor:
        return rt.put(np.where(at < end, tokens[np.minimum(at, end - 1)], 0).astype(np.int64))
    return Batch(pick(starts[:, None] + np.arange(length), limit), pick(index + 1, limit + 1),
                 np.minimum(index, limit - 1), valid, **rest)

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
    def of(self, target: Any) -> Any:
        """The window that scores a target, or each target of an array."""
        return np.maximum(0, -(-(target + 1 - self.seq_len) // self.stride))
    def units(self, batch: int, chunk: int = 0) -> Iterator[list[range]]:
        """Batches of windows of one shape, as lists per chunk of `chunk` targets (0 = one chunk)."""
        edges = [k for k in range(1, self.count if chunk else 1)
                 if self.scored(k)[0] // chunk != self.scored(k - 1)[0] // chunk]
        for lo, hi in itertools.pairwise([0, *edges, self.count]):
            first = [range(0, 1)] if lo == 0 and self.stride < self.seq_len else []
            yield first + [range(k, min(k + batch, hi)) for k in range(lo + len(first), hi, batch)]
    def samples(self, positions: int) -> tuple[Sequence[int], Sequence[int]]:
        """A unit early in the stream, and one spread over it with so many targets."""
        last, wanted = self.count - 1, -(-positions // self.stride)
        first = min(1, last)
        return [first], sorted({*np.linspace(first, last, wanted, dtype=int)}) if wanted > 1 else [last]
    def span(self, units: Sequence[Sequence[int]]) -> tuple[int, int]:
        """First target of these units and the one after the last."""
        return self.scored(units[0][0])[0], self.scored(units[-1][-1])[1]
    def batch(self, tokens: np.ndarray, unit: Sequence[int], rows: int, rt: Runtime, reach: int = 0) -> Batch:
        """The unit's windows, the last repeated up to `rows`: all batches but the first have one shape."""
        rows = 1 if unit[0] == 0 and self.stride < self.seq_len else rows
        ks = np.array([unit[min(i, len(unit) - 1)] for i in range(rows)])
        lo, hi = np.array([self.scored(k) for k in ks]).T
        index = lo[:, None] + np.arange(self.stride if unit[0] else self.seq_len)                # [B, S]
        starts, valid = ks * self.stride, np.where(np.arange(rows) < len(unit), hi - lo, 0)
        return make_batch(tokens, starts, self.seq_len, index, valid, rt,
                          lead=tokens[max(0, starts[0] - reach):starts[0]])

class Documents:
    """Batches of consecutive documents, in chunks: unit (documents, c) is chunk c of those that have one.

    A chunk is scored with what stands before it in its own document, seq_len inputs at most. A document's
    targets end with the start of the next one.
    """
    def __init__(self, tokens: np.ndarray, bos: int, seq_len: int, chunk: int, slots: int):
        self.targets, self.seq_len, self.chunk, self.slots = len(tokens) - 1, seq_len, chunk, slots
        self.starts = np.union1d(np.flatnonzero(tokens[:-1] == bos), [0])
        self.ends = np.append(self.starts[1:], self.targets)
        self.chunks = -(-(self.ends - self.starts) // chunk)
    def units(self, batch: int, chunk: int = 0) -> Iterator[list[tuple[np.ndarray, int]]]:
        for members in np.split(np.arange(len(self.starts)), range(self.slots, len(self.starts), self.slots)):
            yield [(members[self.chunks[members] > c], c) for c in range(self.chunks[members].max())]
    def samples(self, positions: int) -> tuple[tuple[np.ndarray, int], ...]:
        return (first := next(self.units(0)))[0], first[-1]
    def span(self, units: Sequence[tuple[np.ndarray, int]]) -> tuple[int, int]:
        return self.starts[units[0][0][0]], self.ends[units[0][0][-1]]
    def part(self, unit: tuple[np.ndarray, int], rank: int, world: int) -> tuple[np.ndarray, int]:
        """A process's documents of a unit: those of its slots."""
        return unit[0][unit[0] % self.slots % world == rank], unit[1]
    def batch(self, tokens: np.ndarray, unit: tuple[np.ndarray, int], rows: int, rt: Runtime, reach: int = 0
              ) -> Batch:
        members, c = unit
        starts, length = self.starts[members] + c * self.chunk, min(self.seq_len, (c + 1) * self.chunk)
        index, valid = starts[:, None] + np.arange(self.chunk), self.ends[members] - starts
        return make_batch(tokens, starts + self.chunk - length, length, index, valid.clip(max=self.chunk), rt,
                          slots=members % self.slots)

COUNT_PIECE = 1 << 18                                       # positions that are sorted at once, about

def _count_piece(tokens: np.ndarray, vocab: int, room: np.ndarray, order: int, out: list[np.ndarray],
                 at: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One order of causal_counts, for positions `at` grouped by context, rising in a group; `first` of each.

    Fills the arrays of `out`; returns the next order's positions and which are first. Frees memory early.
    """
    place, bits = np.arange(len(at), dtype=np.int32), len(at).bit_length()
    heads = np.flatnonzero(first)
    sizes = np.diff(heads, append=len(at))
    start = np.repeat(heads.astype(np.int32), sizes)                    # of the group
    demand(int(start[-1]).bit_length() + vocab.bit_length() + bits < 64,
           f"{len(tokens)} tokens of a vocabulary of {vocab}: too many to count n-grams in 64-bit keys")
    key = start.astype(np.int64)
    key *= vocab
    key += tokens[at]
    key <<= bits
    key |= place
    key.sort()                                                          # by context, token, position
    by_key = np.bitwise_and(key, (1 << bits) - 1, out=np.empty_like(place), casting="unsafe")
    key >>= bits
    new = np.concatenate(([True], key[1:] != key[:-1]))
    del key
    if out:
        n, rank = np.empty_like(place), np.where(new, place, np.int32(0))
        n[by_key] = np.subtract(place, np.maximum.accumulate(rank, out=rank), out=rank)
        del rank
        out[0][at] = n
        distinct = np.cumsum(n == 0, dtype=np.int32)
        distinct -= n == 0
        distinct -= np.repeat(distinct[heads], sizes)
        out[2][at] = distinct
        if len(out) > 3:
            later = np.flatnonzero(~first)
            out[3][at[later]], out[4][at[later]] = tokens[at[later - 1]], n[later - 1] + 1
        place -= start
        out[1][at] = place
        del n, distinct
    del place, start
    again = ~(new & np.append(new[1:], True))                           # pairs that occur elsewhere too
    nexts = at[by_key][again]
    nexts += 1
    whole, groups = room[nexts] >= order, np.cumsum(new, dtype=np.int32)[again]
    nexts, groups = nexts[whole], groups[whole]
    heads = np.ones(len(groups), bool)
    np.not_equal(groups[1:], groups[:-1], out=heads[1:])
    return nexts, heads

def causal_counts(tokens: np.ndarray, orders: Sequence[int], bos: int | None = None, hints: bool = False
                  ) -> Iterator[tuple[Any, ...]]:
    """Exact n-gram counts at every position, from earlier tokens only: (order, n, N, T), orders rising.

    Order k has a context of k - 1 tokens. int32 [len(tokens)]: n, how often context and token came before; N,
    how often the context did; T, how many different tokens followed it. Zeros where the context is incomplete
    (it begins before the stream or, given bos, in an earlier document). hints: two arrays more, the token
    that followed the context last, and its n. One sort an order, of those positions whose context occurs
    elsewhere too; memory: under 40 bytes a token beyond what is yielded.
    """
    tokens = np.asarray(tokens)
    size, vocab = len(tokens), int(tokens.max(initial=0)) + 1
    room = np.append(np.arange(size, dtype=np.int32), np.int32(-1))     # length of the longest whole context
    if bos is not None:
        room[1:size] -= np.maximum.accumulate(np.where(tokens == bos, room[:-1], np.int32(0)))[:-1]
    at, first = np.arange(size, dtype=np.int32), np.arange(size) == 0
    with ThreadPoolExecutor(max(1, min(8, torch.get_num_threads()))) as pool:
        for order in range(1, max(orders) + 1):
            out = [np.zeros(size, np.int32) for _ in range(5 if hints else 3)] if order in orders else []
            heads = np.flatnonzero(first)                               # groups are counted in pieces
            wanted = np.arange(COUNT_PIECE, heads[-1] + 1 if len(at) else 0, COUNT_PIECE)
            cuts = np.unique(heads[np.searchsorted(heads, wanted)])
            count = functools.partial(_count_piece, tokens, vocab, room, order, out)
            parts = pool.map(count, np.split(at, cuts), np.split(first, cuts)) if len(at) else ()
            parts = [(at[:0], first[:0]), *parts]
            if out:
                yield (order, *out)
            del out
            at, first = (np.concatenate(arrays) for arrays in zip(*parts))

def counts_after(prefix: np.ndarray, orders: Sequence[int], vocab: int, bos: int | None = None,
                 unigram: np.ndarray | None = None) -> Iterator[tuple[Any, ...]]:
    """causal_counts with hints for every token that could follow a prefix, n [V], by searching it (its own
    counts of order 1, if known, are `unigram`)."""
    size, starts = len(prefix), np.flatnonzero(prefix == bos) if bos is not None else prefix[:0]
    room = size - (int(starts[-1]) if len(starts) else 0)
    found = np.flatnonzero(prefix[:-1] == prefix[-1:]) + 1              # where the context occurs, so far
    for order in range(1, max(orders) + 1):
        if order > 2 and len(found):
            found = found[np.searchsorted(found, order - 1):] if order - 1 <= room else found[:0]
            found = found[prefix[found - order + 1] == prefix[size - order + 1]]
        if order in orders:
            after = prefix if order == 1 else prefix[found]             # the tokens that followed the context
            n = np.bincount(after, minlength=vocab) if order > 1 or unigram is None else unigram
            hint = int(after[-1]) if len(after) else 0
            yield order, n, len(after), np.count_nonzero(n), hint, n[hint]

NGRAM_ORDERS = (1, 2, 3, 4, 5, 6, 7, 13, 25)             # of exact counts; the last reach back 12, 24 tokens
DISCOUNT, CONCENTRATION = 0.75, 0.5                      # of absolute discounting (spec: seeds-834-859, 11.8)
Grams = namedtuple("Grams", "q rank count hint agree")

def discounted(counts: Iterator[tuple[Any, ...]], vocab: int) -> Grams:
    """Interpolated absolute discounting: q, a list of probabilities by order; each has the lower one as base.

    Below order 1 is the uniform distribution. Of the longest context seen before: its rank in the orders
    (from 1; 0 = none), its count, the token that followed it last and how often that did.
    """
    q, rows, facts = np.float64(1 / vocab), [], (0, 0, 0, 0)
    for rank, (_, n, total, distinct, hint, agree) in enumerate(counts, 1):
        seen, total = np.greater(total, 0), np.asarray(total)
        below = (CONCENTRATION + DISCOUNT * distinct) * q
        q = np.where(seen, (np.maximum(n - DISCOUNT, 0) + below) / (total + CONCENTRATION), q)
        rows.append(q)
        facts = [np.where(seen, new, old) for new, old in zip((rank, total, hint, agree), facts)]
    return Grams(rows, *facts)

class PrefixCounts:
    """What exact counts say after a prefix of the tokens, for every token that could follow: `every`."""
    def __init__(self, tokens: np.ndarray, windows: Windows, cfg: Config):
        self.tokens, self.vocab, self.bos = tokens, cfg.vocab_size, cfg.bos_id if cfg.ngram_docs else None
        self.asked, self.answer, self.upto, self.unigram = None, None, 0, np.zeros(self.vocab, np.int64)
    def _after(self, j: int) -> Grams:
        if self.upto > j + 1:
            self.unigram, self.upto = np.zeros_like(self.unigram), 0
        self.unigram += np.bincount(self.tokens[self.upto:j + 1], minlength=self.vocab)
        self.upto = j + 1
        return discounted(counts_after(self.tokens[:j + 1], NGRAM_ORDERS, self.vocab, self.bos, self.unigram),
                          self.vocab)
    def every(self, index: np.ndarray) -> Grams:
        """At targets [m], from the tokens before each alone: q [m, V, K], the rest [m]."""
        if self.asked != index.tobytes():                               # tilt and mixture ask the same
            q, *facts = map(np.stack, zip(*map(self._after, index)))    # [m, K, V], [m]
            self.asked, self.answer = index.tobytes(), Grams(q.swapaxes(1, 2), *facts)
        return self.answer

class NgramCounts(PrefixCounts):
    """The same for a whole stream at once, for the targets that it has: `of`."""
    def __init__(self, tokens: np.ndarray, windows: Windows, cfg: Config):
        super().__init__(tokens, windows, cfg)
        self.grams = discounted(causal_counts(tokens, NGRAM_ORDERS, self.bos, hints=True), self.vocab)
    def of(self, index: np.ndarray) -> Grams:
        """At targets [...]: q of the target [..., K], the rest [...]."""
        q, *facts = self.grams
        return Grams(np.stack([row[index + 1] for row in q], -1), *(fact[index + 1] for fact in facts))

def counts_before(keys: np.ndarray, groups: np.ndarray, counted: np.ndarray | None = None) -> np.ndarray:
    """How many counted elements with its key stand in earlier groups, for every element -> [n]. One sort.

    keys [n] whole numbers; groups [n] never falling (a token, a window, a chunk): what one group adds, only
    later ones see. counted [n] bool, None = all.
    """
    n, bits = len(keys), len(keys).bit_length()
    order = keys.astype(np.int64) << bits | np.arange(n)
    order.sort()                                                        # by key, then by position
    at, keys = order & ((1 << bits) - 1), order >> bits
    groups = groups[at]
    new_key = np.concatenate(([True], keys[1:] != keys[:-1]))
    runs = np.flatnonzero(new_key | np.concatenate(([True], groups[1:] != groups[:-1])))   # of key and group
    seen = runs if counted is None else (np.cumsum(counted[at]) - counted[at])[runs]
    before = seen - np.maximum.accumulate(np.where(new_key[runs], seen, 0))
    out = np.empty(n, np.int32)
    out[at] = np.repeat(before.astype(np.int32), np.diff(runs, append=n))
    return out

def ngram_slots(context: Sequence[Any], target: Any, cfg: Config) -> tuple[Any, Any]:
    """Counters of a context (oldest token first) and of context and target; arrays or tensors of tokens."""
    primes, key = itertools.cycle(cfg.ngram_primes), 0
    for tokens in context:
        key = tokens * next(primes) ^ key
    return key & (cfg.ngram_buckets - 1), (target * next(primes) ^ key) & (cfg.ngram_buckets - 1)

class HashedCounts:
    """The hashed caches' ratio min(F, C) / C of every target and order, over the whole stream at once.

    C counts earlier sightings of the context's counter, F of context and target's; -1 where an order does not
    count. A window (PR 740) or chunk (PR 859) is added after it. PR 740: an order sees and gets only what no
    higher order mixed. PR 859: all orders, contexts from the window, no n-gram across a chunk's start.
    """
    def __init__(self, tokens: np.ndarray, windows: Windows, cfg: Config):
        self.cfg, self.orders, n = cfg, cfg.ngram_orders, windows.targets
        self.tokens, self.target = tokens.astype(np.uint32), np.arange(n, dtype=np.int32)
        window = windows.of(self.target)
        self.row = self.target - window * windows.stride                # position in the window
        first = np.where(window, window * windows.stride + windows.seq_len - windows.stride, 0)
        self.groups = first // (cfg.ngram_chunk_tokens or windows.stride)
        starts = np.flatnonzero(np.diff(self.groups, prepend=-1))
        self.begin = np.repeat(starts, np.diff(starts, append=n))       # [n] first target of each one's group
        self.ratios = np.full((len(self.orders), n), -1, np.float32)
        with ThreadPoolExecutor(2) as pool:                             # the two counters of an order
            for order in reversed(self.orders):
                looked, added, slots = self._order(order)
                used = looked | added
                counted = None if added[used].all() else added[used]
                context, full = pool.map(counts_before, (slot[used] for slot in slots),
                                         [self.groups[used]] * 2, [counted] * 2)
                ratio = np.minimum(context, full) / np.maximum(context, 1, dtype=np.float32)
                ratio[(context < cfg.ngram_min_count) | ~looked[used]] = -1
                self.ratios[order - self.orders[0], used] = ratio
    def _order(self, order: int) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
        """Which targets look an order up, which are added to it, and their counters (where complete)."""
        padded, n = np.concatenate((np.zeros(order - 2, np.uint32), self.tokens)), len(self.target)
        slots = ngram_slots([padded[i:i + n] for i in range(order - 1)], self.tokens[1:], self.cfg)
        if self.cfg.ngram == "gated":
            return self.row >= order - 1, self.target - self.begin >= order - 2, slots
        free = (self.ratios[order - self.orders[0] + 1:] < 0).all(0) & (self.target >= order - 2)
        return free, free, slots
    def of(self, index: np.ndarray) -> np.ndarray:
        """Ratios of the targets [..., K]."""
        return np.moveaxis(self.ratios[:, index], 0, -1)
    def every(self, index: np.ndarray) -> np.ndarray:
        """Ratios of every token of the vocabulary at rising targets [m] -> [m, V, K], from plain tables."""
        cfg, vocabulary = self.cfg, np.arange(self.cfg.vocab_size, dtype=np.uint32)
        out = np.full((len(index), len(vocabulary), len(self.orders)), -1, np.float32)
        for column, order in enumerate(self.orders):
            (looked, added, slots), done = self._order(order), 0
            tables = np.zeros((2, cfg.ngram_buckets), np.uint32)
            for row, j in enumerate(index):
                for table, slot in zip(tables, slots):
                    np.add.at(table, slot[done:self.begin[j]][added[done:self.begin[j]]], 1)
                done, count = max(self.begin[j], done), tables[0, slots[0][j]]
                if looked[j] and count >= cfg.ngram_min_count:
                    _, full = ngram_slots(self.tokens[j - order + 2:j + 1, None], vocabulary, cfg)
                    out[row, :, column] = np.minimum(tables[1, full], count) / count
        return out

class Oracle:
    """Hashed counts of the training tokens, frozen before step 1, for the mixer head to learn (PR 859)."""
    def __init__(self, cfg: Config, device: torch.device):
        self.cfg, shape = cfg, (len(cfg.ngram_orders), 2, cfg.ngram_buckets)
        self.tables = torch.zeros(shape, dtype=torch.int32, device=device)
    def add(self, tokens: Tensor) -> None:
        """Counts all n-grams of a piece [n]."""
        for tables, order in zip(self.tables, self.cfg.ngram_orders):
            n = max(len(tokens) - order + 1, 0)
            slots = ngram_slots([tokens[i:i + n] for i in range(order - 1)], tokens[order - 1:], self.cfg)
            for table, slot in zip(tables, slots):
                table += torch.bincount(slot, minlength=self.cfg.ngram_buckets).int()
    def ratios(self, ids: Tensor, targets: Tensor) -> Tensor:
        """ids, targets [B, T] -> min(F, C) / C [B, T, K]; -1 where an order does not count (HashedCounts)."""
        columns, row = [], torch.arange(ids.size(1), device=ids.device)
        for (contexts, fulls), order in zip(self.tables, self.cfg.ngram_orders):
            before = [ids.roll(order - 2 - i, 1) for i in range(order - 1)]
            context, full = ngram_slots(before, targets, self.cfg)
            count = contexts[context]
            ratio = torch.minimum(fulls[full], count) / count.clamp(min=1)
            columns.append(ratio.masked_fill((count < self.cfg.ngram_min_count) | (row < order - 1), -1.0))
        return torch.stack(columns, -1)

def entropy(logits: Tensor) -> Tensor:
    """[..., V] -> nats [...]."""
    log_p = F.log_softmax(logits, -1)
    return -(log_p.exp() * log_p).sum(-1)

def temper(logits: Tensor, temperature: float) -> Tensor:
    """Logits / (1 - (1 - temperature) (1 - entropy / ln V)), the divisor within 0.9 and 1.05 (PR 834)."""
    if temperature == 1:
        return logits
    certain = 1 - entropy(logits) / math.log(logits.size(-1))
    return logits / (1 - (1 - temperature) * certain).clamp(0.9, 1.05).unsqueeze(-1)

def scoring_tokens(cfg: Config, rt: Runtime) -> int:
    return cfg.eval_batch_tokens or min(rt.score_tokens, 2 ** 28 // cfg.vocab_size)

class Predictor:
    """What scores text. Every predictor has, its own or from the one that it wraps (Nested):

    outputs(batch) -> logits [B, S, V] and the final norm's output [B, S, D]; last(prefix) -> the same after
    a prefix, [1, V] and [1, D]; chances(out, index, ids, counts) -> p of tokens ids [..., C] as target number
    index [...], the one place that says what it believes; C = 1 are the targets themselves. The harness calls
    charged(batch) after a batch is charged and observe(tokens, progress) after a chunk is, never before.
    fault: what its score is called if it is no true one; chunk: targets between two calls of observe;
    counts, twin: the n-gram counts that it asks for, of a stream and after a prefix; plan(tokens): its work;
    shares: what processes divide, units or the rows of each; reach: tokens wanted before a batch that does
    not continue the last; row: tokens of a training row; probe(tokens): work for the audit; isolates: a
    document's charges do not depend on others.
    """
    @torch.inference_mode()
    def score(self, batch: Batch, counts: Any = None) -> Tensor:
        """Nats of every target [B, S]."""
        p = self.chances(self.outputs(batch), batch.index, batch.targets.unsqueeze(-1), counts)
        return -p.squeeze(-1).log()
    @torch.inference_mode()
    def full(self, batch: Batch, counts: Any, rows: np.ndarray, columns: np.ndarray) -> Tensor:
        """log p over the vocabulary at chosen targets of a batch -> [m, V], float64."""
        logits, hidden = (part[rows, columns] for part in self.outputs(batch))
        ids = torch.arange(logits.size(-1), device=logits.device).expand_as(logits)
        return self.chances((logits, hidden), batch.index[rows, columns], ids, counts).log().cpu()
    @torch.inference_mode()
    def next(self, prefix: np.ndarray, counts: Any = None) -> Tensor:
        """log p over the vocabulary after a prefix -> [V], float64; by default the counts are its own."""
        out, counts = self.last(prefix), counts or self.twin and self.twin(prefix, None, self.cfg)
        ids = torch.arange(out[0].size(-1), device=out[0].device)[None]
        return self.chances(out, np.array([len(prefix) - 1]), ids, counts)[0].log().cpu()

class Sliding(Predictor):
    """The plain model over windows, each target with as much context as the stride allows."""
    fault, chunk, counts, twin, reach, shares, isolates = "", 0, None, None, 0, "units", False
    charged = observe = snapshot = restore = staticmethod(lambda *_: None)      # it learns nothing
    def __init__(self, model: GPT, rt: Runtime, name: str, seq_len: int, stride: int, temperature: float = 1):
        self.model, self.rt, self.name, self.seq_len, self.stride = model, rt, name, seq_len, stride
        self.temperature, self.hidden, self.row = temperature, rt.compile(model.hidden), seq_len
        self.cfg = model.cfg
    def rows(self, cfg: Config) -> int:
        """Windows in a batch."""
        return max(1, scoring_tokens(cfg, self.rt) // self.seq_len)
    def plan(self, tokens: np.ndarray) -> Windows:
        return Windows(len(tokens) - 1, self.seq_len, self.stride)
    probe = plan
    def outputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(batch.ids)[:, -batch.targets.size(1):]
        return temper(self.model.head(hidden), self.temperature), hidden
    def unit_of(self, tokens: np.ndarray) -> Any:
        """The work that scores the last target alone."""
        return [int(self.plan(tokens).of(len(tokens) - 2))]
    def last(self, prefix: np.ndarray) -> tuple[Tensor, Tensor]:
        tokens = np.append(prefix, 0)
        batch = self.plan(tokens).batch(tokens, self.unit_of(tokens), 1, self.rt)
        at = int(batch.valid[0]) - 1
        return tuple(part[0, at:at + 1] for part in self.outputs(batch))
    def chances(self, out: tuple[Tensor, Tensor], index: np.ndarray, ids: Tensor, counts: Any) -> Tensor:
        exact = out[0].double() if ids.size(-1) >= out[0].size(-1) else out[0]
        return F.log_softmax(exact, -1).gather(-1, ids).double().exp()

class Streaming(Sliding):
    """One pass over the stream with a sliding-window mask: each target sees the last EVAL_STREAM positions.

    Keys and values go from span to span (Memory), so every position is computed once. A batch that does not
    continue the last one starts from the tokens before it, as many as can reach it through all layers.
    """
    def __init__(self, model: GPT, rt: Runtime, cfg: Config, temperature: float = 1):
        width, limit = cfg.eval_stream, scoring_tokens(cfg, rt)
        widths = (cfg.ttt_chunk_tokens // width, cfg.mix_chunk_tokens // width, max(limit // width, 1))
        span = width * math.gcd(*widths)                                # chunks end where spans do
        super().__init__(model, rt, "streaming", span, span, temperature)
        self.window, self.row = cfg.eval_stream, cfg.score_len
        self.reach = len(model.blocks) * (self.window - 1) + 2          # SmearGate and bigram look back too
        self.bos, self.isolates = cfg.bos_id if cfg.stream_docs else None, cfg.stream_docs
        self.memory, self.at, self.span = None, -1, np.empty(0, int)    # the target after the last span
        self.reading, self.read = None, np.empty(0, int)                # the same for `last`, and its prefix
    def rows(self, cfg: Config) -> int:
        return 1
    def probe(self, tokens: np.ndarray) -> Windows:
        size = -(-256 // self.window) * self.window
        return Windows(len(tokens) - 1, size, size)
    def pass_on(self, tokens: np.ndarray, memory: Memory) -> Tensor:
        """Reads tokens [n] into a memory -> final norm's output after the last of them [1, 1, D]."""
        rest = len(tokens) % self.window
        for piece in filter(len, (tokens[:rest], tokens[rest:])):
            hidden = self.model.hidden(self.rt.put(piece[None].astype(np.int64)), memory)
        return hidden[:, -1:]
    def outputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        first, known = int(batch.index[0, 0]), min(len(batch.lead), len(self.span))
        if first != self.at or not np.array_equal(batch.lead[-known:], self.span[-known:]):
            self.memory = Memory(self.window, self.bos)
            if len(batch.lead):
                self.pass_on(batch.lead, self.memory)
        hidden, self.span = self.model.hidden(batch.ids, self.memory), batch.ids[0].cpu().numpy()
        self.at = first + len(self.span)
        return temper(self.model.head(hidden), self.temperature), hidden
    def last(self, prefix: np.ndarray) -> tuple[Tensor, Tensor]:
        done = len(self.read)
        if not 0 < done < len(prefix) or not np.array_equal(prefix[:done], self.read):
            self.reading, done = Memory(self.window, self.bos), 0
        hidden, self.read = self.pass_on(prefix[done:], self.reading)[0], np.array(prefix)
        return temper(self.model.head(hidden), self.temperature), hidden

def adapted_names(model: GPT, cfg: Config) -> set[str]:
    """What test-time training may change: all, or the last blocks (or their queries), scales and head."""
    blocks = tuple(f"blocks.{i}." for i in range(cfg.num_layers - cfg.ttt_freeze_blocks, cfg.num_layers))
    def chosen(name: str) -> bool:
        in_blocks = name.startswith(blocks) and (not cfg.qttt or ".c_q." in name)
        return in_blocks or any(part in name for part in ("norm", "scale", "lm_head", "alpha_head"))
    return {name for name, _ in model.named_parameters() if chosen(name) or not cfg.ttt_freeze_blocks}

class LowRank(Sliding):
    """Per-document adapters (spec: frontier F2): each chunk of a document is charged, then learned from.

    Documents come in batches of TTT_DOCS, a slot of adapters for each; what one learns no other sees. At the
    next batch B is zero again, and A too is as it was or, with TTT_LORA_KEEP, as its slot left it. AdamW with
    betas (0, 0.99), epsilon 1e-10, weight decay 0.5.
    """
    shares, chunk = "rows", 1
    def __init__(self, model: GPT, rt: Runtime, cfg: Config):
        super().__init__(model, rt, "ttt", cfg.score_len, cfg.ttt_lora_chunk, cfg.ttt_temperature)
        self.cfg, self.hidden, rank = cfg, model.hidden, cfg.ttt_lora_rank
        self.isolates = not cfg.ttt_lora_keep
        model.requires_grad_(False)
        chosen = adapted_names(model, cfg)
        self.matrices = [m for name, m in model.blocks.named_modules()
                         if isinstance(m, Linear) and f"blocks.{name}.weight" in chosen]
        generator, self.start, self.params = torch.Generator().manual_seed(cfg.seed), [], []
        for rows, columns in (m.weight.shape for m in self.matrices):
            low = (2 * torch.rand(cfg.ttt_docs, rank, columns, generator=generator) - 1) / math.sqrt(columns)
            self.start.append(low.to(rt.device))
            high = torch.zeros(cfg.ttt_docs, rows, rank, device=rt.device)
            self.params += [self.start[-1].clone().requires_grad_(), high.requires_grad_()]
        self.squares = [torch.zeros_like(p) for p in self.params]
        self.steps = torch.zeros(cfg.ttt_docs, device=rt.device)
    def plan(self, tokens: np.ndarray) -> Documents:
        return Documents(tokens, self.cfg.bos_id, self.seq_len, self.stride, self.cfg.ttt_docs)
    probe = plan
    def unit_of(self, tokens: np.ndarray) -> Any:
        plan = self.plan(tokens)
        return np.array([len(plan.starts) - 1]), (plan.targets - 1 - plan.starts[-1]) // plan.chunk
    def outputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """As the base; the rows' own adapters act only here."""
        slots, scale = torch.from_numpy(batch.slots), self.cfg.ttt_lora_alpha / self.cfg.ttt_lora_rank
        for matrix, low, high in zip(self.matrices, self.params[::2], self.params[1::2]):
            matrix.adapter = low[slots], high[slots] * scale
        try:
            return super().outputs(batch)
        finally:
            for matrix in self.matrices:
                matrix.adapter = None
    def charged(self, batch: Batch) -> None:
        """One step on the sum over documents of their chunk's mean loss; short chunks end their document."""
        learning = batch.valid == self.stride
        if not learning.any():
            return
        batch = Batch(*(part if part is None else part[learning] for part in batch))
        logits, _ = self.outputs(batch)
        nats = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum") / self.stride
        grads, slots = torch.autograd.grad(nats, self.params), torch.from_numpy(batch.slots)
        self.steps[slots] += 1
        bias = 1 - 0.99 ** self.steps[slots].view(-1, 1, 1)
        with torch.no_grad():
            for p, square, grad in zip(self.params, self.squares, grads):
                square[slots] = 0.99 * square[slots] + 0.01 * grad[slots].square()
                step = grad[slots] / ((square[slots] / bias).sqrt() + 1e-10)
                p[slots] = p[slots] * (1 - 0.5 * self.cfg.ttt_lr) - self.cfg.ttt_lr * step
    @torch.no_grad()
    def observe(self, tokens: np.ndarray, progress: float) -> None:
        if not self.cfg.ttt_lora_keep:
            torch._foreach_copy_(self.params[::2], self.start)
        torch._foreach_zero_([*self.params[1::2], *self.squares, self.steps])
    def snapshot(self) -> Any:
        return [p.detach().clone() for p in (*self.params, *self.squares, self.steps)]
    @torch.no_grad()
    def restore(self, state: Any) -> None:
        torch._foreach_copy_([*self.params, *self.squares, self.steps], state)

class Nested(Predictor):
    """A predictor over another one; whatever it does not define itself is the other's."""
    isolates = False
    def __init__(self, base: Predictor, cfg: Config):
        self.base, self.cfg = base, cfg
    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name)
    def gated(self, hidden: Tensor, p: Tensor, ratios: Tensor) -> Tensor:
        """p [..., C] mixed with ratios [..., C, K] by the model's own head."""
        return mix(self.model.alpha_head(hidden).double().unsqueeze(-2), p, ratios)

class Adapting(Nested):
    """Test-time training: learns every chunk after it was charged (PR 834), or everything before (PR 489).

    A step takes TTT_BATCH_SEQS rows from each of TTT_PARTS equal parts of the data, whatever the number of
    processes; the rate falls with the chunks along a cosine. Optimizer state lasts from chunk to chunk.
    """
    name = "ttt"
    def __init__(self, base: Predictor, cfg: Config, table: ByteTable):
        super().__init__(base, cfg)
        self.table, self.logits = table, base.rt.compile(base.model.logits)
        self.fault = "adapted_before_scoring" if cfg.ttt_before_scoring else ""
        self.chunk = 0 if cfg.ttt_before_scoring else cfg.ttt_chunk_tokens
        chosen = adapted_names(base.model.requires_grad_(False), cfg)
        self.params = [p.requires_grad_() for name, p in base.model.named_parameters() if name in chosen]
        self.grads = flat_gradients(self.params)
        self.optimizer = torch.optim.SGD(self.params, momentum=0.9) if cfg.ttt_optimizer == "sgd" else \
            torch.optim.AdamW(self.params, weight_decay=0.0)
    def observe(self, tokens: np.ndarray, progress: float) -> None:
        if self.chunk and progress < 1:                                 # nothing comes after the last
            for _ in self.adapt(tokens, self.cfg.ttt_lr * 0.5 * (1 + math.cos(math.pi * progress))):
                pass
    def adapt(self, tokens: np.ndarray, rate: float) -> Iterator[float]:
        """Trains on rows as long as a window, in order, TTT_EPOCHS times (no rest); yields the share done."""
        cfg, size, length = self.cfg, self.cfg.ttt_batch_seqs, self.row
        rows = (len(tokens) - 1) // length
        if cfg.ttt_before_scoring:                  # PR 489 cuts at tokens, and drops a last row of its own
            span = rows * length // cfg.ttt_parts
            count = span // length - (span % length == 0 and (span // length - 1) % size == 0)
            parts = [(i * span, count) for i in range(cfg.ttt_parts)]                    # first token, rows
        else:
            edges = [rows * i // cfg.ttt_parts for i in range(cfg.ttt_parts + 1)]
            parts = [(lo * length, hi - lo) for lo, hi in itertools.pairwise(edges)]
        self.optimizer.param_groups[0]["lr"] = rate
        steps = [*range(0, max(count for _, count in parts), size)] * cfg.ttt_epochs
        for number, at in enumerate(steps, 1):
            self.grads.zero_()
            units = [(first + at * length, min(size, count - at)) for first, count in parts if count > at]
            for unit in units[self.rt.rank::self.rt.world]:
                (self._loss(tokens, *unit) / len(units)).backward()
            clip_gradients(self.rt.sum_(self.grads), 0.0 if cfg.ttt_before_scoring else 1.0)
            self.optimizer.step()
            yield number / len(steps)
    def _loss(self, tokens: np.ndarray, first: int, rows: int) -> Tensor:
        """Mean nats of so many rows from a token on; BYTE_WEIGHTED_TTT: weighted by the targets' bytes."""
        span = tokens[first:first + rows * self.row + 1].astype(np.int64)
        ids, targets = (self.rt.put(part.reshape(-1, self.row)) for part in (span[:-1], span[1:]))
        nats = F.cross_entropy(self.logits(ids).flatten(0, 1), targets.flatten(), reduction="none")
        weights = self.rt.put(self.table.count(span).astype(np.float32)) if self.cfg.byte_weighted_ttt else \
            torch.ones_like(nats)
        return (nats * weights).sum() / weights.sum()
    def snapshot(self) -> Any:
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))
    def restore(self, state: Any) -> None:
        self.model.load_state_dict(state[0])
        self.optimizer.load_state_dict(state[1])

class Hashed(Nested):
    """The hashed caches of PR 740 (fixed weight, backoff) and PR 859 (learned gate) over another predictor.

    An order's "probability" is the ratio of two counters, the second found with the target in its key: over
    the vocabulary the ratios add up to far more than one. Kept to reproduce what was published; no score.
    """
    name, counts, twin = "ngram", HashedCounts, None
    def __init__(self, base: Predictor, cfg: Config):
        super().__init__(base, cfg)
        self.fault = base.fault or "unnormalised_score"
    def chances(self, out: tuple[Tensor, Tensor], index: np.ndarray, ids: Tensor, counts: Any) -> Tensor:
        cfg, p = self.cfg, self.base.chances(out, index, ids, counts)
        ratios = counts.every(index) if ids.size(-1) > 1 else counts.of(index)[..., None, :]
        ratios = self.rt.put(ratios).double()                                              # [..., C, K]
        if cfg.ngram == "gated":
            return self.gated(out[1], p, ratios).clamp(1e-12, 1)
        ratio, alpha = ratios.amax(-1), cfg.ngram_alpha                 # no more than one order counts
        if cfg.ngram == "backoff":
            weight = torch.sigmoid(2 * (entropy(out[0]) - 4)).double().unsqueeze(-1)
            alpha = cfg.ngram_ent_base + cfg.ngram_ent_range * weight
        return torch.where(ratio < 0, p, (1 - alpha) * p + alpha * ratio).clamp(1e-12, 1)

class Online(Nested):
    """Statistics by bucket, learned from charged targets: those in `fresh` enter `seen` at the chunk's end.

    seen [buckets, n] begins at a prior; all that a bucket is made of is known before the target is.
    """
    name, counts, twin = "mixed", NgramCounts, PrefixCounts
    def __init__(self, base: Predictor, cfg: Config, prior: Sequence[float], *levels: int):
        super().__init__(base, cfg)
        self.levels, self.chunk = levels, base.chunk or cfg.mix_chunk_tokens
        self.seen = base.rt.put(np.tile(prior, (math.prod(levels), 1)))
        self.fresh, self.noted = torch.zeros_like(self.seen), None
    def bucket(self, *features: Tensor) -> Tensor:
        """Row of `seen` for features [...] cut to whole numbers from 0 up to their levels."""
        row = 0
        for feature, levels in zip(features, self.levels, strict=True):
            row = row * levels + feature.clamp(0, levels - 1).long()
        return row
    def grams(self, index: np.ndarray, ids: Tensor, counts: Any) -> Grams:
        """Exact counts on the device: q [..., C, K], the rest [...]; count at least 1."""
        grams = Grams(*map(self.rt.put, counts.every(index) if ids.size(-1) > 1 else counts.of(index)))
        return grams._replace(q=grams.q.reshape(*ids.shape, -1), count=grams.count.clamp(min=1))
    def charged(self, batch: Batch) -> None:
        if self.noted:
            self.fresh.index_add_(0, *(part[torch.from_numpy(batch.real)] for part in self.noted))
        self.base.charged(batch)
    def observe(self, tokens: np.ndarray, progress: float) -> None:
        self.seen += self.rt.sum_(self.fresh)
        self.fresh.zero_()
        self.base.observe(tokens, progress)
    def snapshot(self) -> Any:
        return self.seen.clone(), self.base.snapshot()
    def restore(self, state: Any) -> None:
        self.seen.copy_(state[0])
        self.fresh.zero_()
        self.base.restore(state[1])

class Tilt(Online):
    """Raises one hinted token: what followed the longest known context last (spec: frontier G1, 7 E).

    p'(a) = p(a) e^(b [a = hint]) / (1 + p(hint) (e^b - 1)), with b >= 0 such that p'(hint) is the share of
    hits in its bucket so far: by context, its count, the hint's share of that count and p(hint).
    """
    def __init__(self, base: Predictor, cfg: Config):
        super().__init__(base, cfg, (0.0, 2.0), len(NGRAM_ORDERS) + 1, 6, 4, 8)          # hits, trials
    def chances(self, out: tuple[Tensor, Tensor], index: np.ndarray, ids: Tensor, counts: Any) -> Tensor:
        grams = self.grams(index, ids, counts)
        known, hint = grams.agree > 0, grams.hint.long().unsqueeze(-1)
        p, h = self.base.chances(out, index, torch.cat((ids, hint), -1), counts).tensor_split((-1,), -1)
        bucket = self.bucket(grams.rank, grams.count.log2().floor(), (4 * grams.agree / grams.count).floor(),
                             4 + (h.squeeze(-1).logit(1e-9) / 1.5).floor())
        hits, trials = self.seen[bucket].unsqueeze(-2).unbind(-1)                              # [..., 1]
        top = torch.where(known.unsqueeze(-1), torch.maximum(h, hits / trials), h)
        rest = torch.where(top > h, (1 - top) / (1 - h), 1.0)
        hit = ids == hint
        if ids.size(-1) == 1:
            self.noted = bucket, torch.cat((hit, torch.ones_like(hit)), -1) * known.unsqueeze(-1).double()
        return torch.where(hit, top, p * rest)

class Mixed(Online):
    """The network mixed with exact n-gram distributions of all orders, true probabilities all of them.

    Weights are learned online, by bucket: each expert's share of what was charged (expectation maximisation).
    With MIXER_HEAD, PR 859's head weighs them instead.
    """
    def __init__(self, base: Predictor, cfg: Config):
        experts = len(NGRAM_ORDERS)
        super().__init__(base, cfg, (9.0, *[1.0 / experts] * experts), experts + 1, 5, 4)
    def chances(self, out: tuple[Tensor, Tensor], index: np.ndarray, ids: Tensor, counts: Any) -> Tensor:
        grams, p = self.grams(index, ids, counts), self.base.chances(out, index, ids, counts)
        if self.cfg.mixer_head:
            orders = [NGRAM_ORDERS.index(order) for order in self.cfg.ngram_orders]
            return self.gated(out[1], p, grams.q[..., orders])
        doubt = (4 * entropy(out[0]) / math.log(out[0].size(-1))).floor()
        bucket = self.bucket(grams.rank, grams.count.log2().floor(), doubt)
        weights = self.seen[bucket].unsqueeze(-2)                                           # [..., 1, 1 + K]
        parts = weights / weights.sum(-1, keepdim=True) * torch.cat((p.unsqueeze(-1), grams.q), -1)
        total = parts.sum(-1)
        if ids.size(-1) == 1:
            self.noted = bucket, (parts / total.unsqueeze(-1)).squeeze(-2)
        return total

@dataclasses.dataclass
class Score:
    """What a predictor was charged. nats: [n] float32, one per target; events: what happened, in order."""
    name: str
    nats: np.ndarray
    sizes: np.ndarray                                                   # bytes of each target
    fault: str                                                          # its name if it is no true score
    complete: bool                                                      # the whole validation set
    coverage: np.ndarray                                                # how often each target was charged
    events: list[tuple[str, int, int]] = dataclasses.field(default_factory=list)
    counts: Any = None                                                  # the n-gram counts that it used
    seconds: float = 0.0
    loss: float = 0.0                                                   # mean nats, from float64 sums
    bpb: float = 0.0
    mass: float = 1.0                                        # mean sum of the charged p over the vocabulary
    @property
    def label(self) -> str:
        return self.fault or ("val_bpb" if self.complete else "partial_bpb")
    def record(self) -> dict[str, Any]:
        return {"metric": self.label, self.label: self.bpb,
                "val_loss" if self.label == "val_bpb" else "loss": self.loss,
                "normalised": self.fault != "unnormalised_score", "mass": self.mass,
                "complete": self.complete, "tokens": len(self.nats),
                "bytes": int(self.sizes.sum(dtype=np.int64)), "seconds": round(self.seconds, 3)}

def evaluate(predictor: Any, tokens: np.ndarray, table: ByteTable, cfg: Config, rt: Runtime, ledger: Ledger
             ) -> Score | None:
    """Scores every target once, in order: score -> commit -> observe. None: it would not fit the time.

    Units of work are the same for any number of processes, which take consecutive shares of every chunk.
    """
    plan, rows, targets = predictor.plan(tokens), predictor.rows(cfg), len(tokens) - 1
    alone = predictor.reach and predictor.chunk             # what carries on and learns runs on every process
    rank, world = (0, 1) if alone or predictor.shares == "rows" else (rt.rank, rt.world)
    score = Score(predictor.name, np.zeros(targets, np.float32), table.count(tokens),
                  predictor.fault, not cfg.val_tokens, np.zeros(targets, np.uint8))
    with ledger.phase(predictor.name):
        start, rounds, charged = time.perf_counter(), 0, np.zeros(2)
        score.counts = predictor.counts and predictor.counts(tokens, plan, cfg)
        if predictor.fault == "adapted_before_scoring":
            score.events.append(("observe", 0, targets))
            for number, share in enumerate(predictor.adapt(tokens, cfg.ttt_lr)):
                ledger.progress(f"{score.name}: adapting {100 * share:.0f}%")
                if number == 2 and not _fits(start, start, share, cfg, rt, ledger):
                    return None
        chunks, begun = list(plan.units(rows, predictor.chunk)), time.perf_counter()
        total = sum(-(-len(units) // world) for units in chunks)
        for number, units in enumerate(chunks):
            lo, hi = plan.span(units)
            share = -(-len(units) // world)                             # consecutive units for each process
            for at in range(rank * share, rank * share + share):
                unit = units[at] if at < len(units) else ()
                unit = plan.part(unit, rt.rank, rt.world) if predictor.shares == "rows" else unit
                if len(unit) and np.size(unit[0]):
                    batch = plan.batch(tokens, unit, rows, rt, predictor.reach)
                    nats = predictor.score(batch, score.counts)
                    if rt.main or not alone:
                        charged += _charge(score, batch, nats)
                        predictor.charged(batch)
                rounds += 1
                if rounds == 3 and not _fits(start, begun, rounds / total, cfg, rt, ledger):
                    return None
                left = (time.perf_counter() - begun) * (total / rounds - 1)
                ledger.progress(f"{score.name}: {100 * rounds / total:.0f}% running_loss:"
                                f"{charged[0] / max(charged[1], 1):.4f} eta:{left:.0f}s")
            score.events.append(("score", lo, hi))
            predictor.observe(tokens[lo:hi + 1], number / (len(chunks) - 1) if len(chunks) > 1 else 1.0)
            score.events.append(("observe", lo, hi))
            if number == 0 and not _fits(start, begun, rounds / total, cfg, rt, ledger):
                return None                                             # now that one adaptation is timed
        for array in (score.nats, score.coverage):
            array[:] = rt.sum_(torch.from_numpy(array)).numpy()
        score.loss = float(score.nats.mean(dtype=np.float64))
        score.bpb = score.loss / math.log(2) * len(score.nats) / int(score.sizes.sum(dtype=np.int64))
        score.seconds = time.perf_counter() - start
    ledger.progress("", last=True)
    return score

def _charge(score: Score, batch: Batch, nats: Tensor) -> tuple[float, int]:
    """Books a batch's charges; their sum and number."""
    index, values = batch.index[batch.real], nats.float().cpu().numpy()[batch.real]
    score.nats[index] = values
    score.coverage[index] += 1
    return values.sum(dtype=np.float64), len(values)

def _fits(start: float, begun: float, share: float, cfg: Config, rt: Runtime, ledger: Ledger) -> bool:
    """Whether the stage, at the pace since `begun`, ends within MAX_EVAL_SECONDS; rank 0 decides for all."""
    needed = begun - start + (time.perf_counter() - begun) / share
    left = cfg.max_eval_seconds - ledger.side("eval")
    late = rt.sum_(torch.tensor([float(rt.main and cfg.max_eval_seconds > 0 and needed > left)])).item() > 0
    if late:
        ledger.log(f"scoring stage skipped: needs about {needed:.0f} s, MAX_EVAL_SECONDS leaves {left:.0f} s")
    return not late

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

def network(model: GPT, rt: Runtime, cfg: Config, table: ByteTable, stride: int) -> Predictor:
    """The network as the later stages use it: over the stream or over windows, adapting if that is on."""
    base = LowRank(model, rt, cfg) if cfg.ttt_lora_rank else \
        Streaming(model, rt, cfg, cfg.ttt_temperature) if cfg.eval_stream else \
        Sliding(model, rt, "sliding", cfg.score_len, stride, cfg.ttt_temperature)
    return Adapting(base, cfg, table) if cfg.ttt_epochs else base

def mixture(model: GPT, rt: Runtime, cfg: Config, table: ByteTable) -> Predictor:
    predictor = network(model, rt, cfg, table, cfg.stride)
    predictor = Tilt(predictor, cfg) if cfg.tilt else predictor
    return Mixed(predictor, cfg) if cfg.ngram == "mix" else predictor

# Scoring stages in order: name -> whether the settings ask for it, and its predictor from model, runtime,
# settings and byte table. The last true score is the result; what a later one contains is not scored alone.
PREDICTORS: dict[str, tuple[Callable[[Config], Any], Callable[[GPT, Runtime, Config, ByteTable], Any]]] = {
    "plain": (lambda cfg: cfg.eval_plain or cfg.stride == cfg.score_len and not cfg.eval_stream,
              lambda model, rt, cfg, table: Sliding(model, rt, "plain", cfg.score_len, cfg.score_len)),
    "sliding": (lambda cfg: cfg.stride < cfg.score_len,
                lambda model, rt, cfg, table: Sliding(model, rt, "sliding", cfg.score_len, cfg.stride)),
    "streaming": (lambda cfg: cfg.eval_stream, lambda model, rt, cfg, table: Streaming(model, rt, cfg)),
    "ttt": (lambda cfg: (cfg.ttt_epochs or cfg.ttt_lora_rank) and not cfg.tilt and cfg.ngram != "mix",
            lambda model, rt, cfg, table: network(model, rt, cfg, table, cfg.stride)),
    "mixed": (lambda cfg: cfg.tilt or cfg.ngram == "mix", mixture),
    "ngram": (lambda cfg: cfg.ngram and cfg.ngram != "mix", lambda model, rt, cfg, table: Hashed(
        network(model, rt, cfg, table, cfg.ngram_stride or cfg.stride), cfg))}

# ============================================================================================================
# 9. TRAINING - warm-up, the loop, the stop rule, checkpoint and resume. Validation comes in as a callback.

def quantized_matrices(model: GPT, cfg: Config) -> list[tuple[Linear, int]]:
    """The matrices that packing will turn into whole numbers, each with its top level."""
    return [(m, QUANTIZERS[kind].top) for name, m in model.named_modules() if isinstance(m, Linear)
            and (kind := quantizer_of(f"{name}.weight", m.weight, cfg)).startswith("int")]

def quantization_penalty(matrices: Sequence[tuple[Linear, int]], cfg: Config) -> Tensor:
    """CROWN-Q (PR 859): lambda / 12 times the matrices' sum of mean(w^2 step^2), the row steps held fixed."""
    parts = [(m.weight * row_steps(m.weight, top, False)).square().mean() for m, top in matrices]
    return cfg.crown_q_lambda / 12 * torch.stack(parts).sum()

@torch.no_grad()
def collect_hessians(model: GPT, cfg: Config, rt: Runtime, stream: TokenStream) -> dict[str, Tensor]:
    """Mean of x x^T at the input of every matrix, over GPTQ_N_SAMPLES training sequences: name -> [C, C]."""
    sums: dict[str, Tensor] = {}
    names = {module: f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear)}
    def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].flatten(0, -2).float()
        sums[names[module]] = sums.get(names[module], 0) + x.T @ x
    hooks = [module.register_forward_pre_hook(add) for module in names]
    samples = -(-cfg.gptq_n_samples // rt.world) * rt.world             # all processes take as many
    for at in range(rt.rank, samples, rt.world):
        model.hidden(rt.put(stream.take(at * cfg.train_seq_len, cfg.train_seq_len)[None]))
    for hook in hooks:
        hook.remove()
    return {name: (rt.sum_(total) / (samples * cfg.train_seq_len)).cpu() for name, total in sums.items()}

# What all processes know of a finished step (rank 0's seconds, the mean loss): decisions need no agreement.
Report = namedtuple("Report", "step elapsed loss diverged stop save", defaults=(0, 0, math.nan, *[False] * 3))

class Trainer:
    """Model, optimizers and clock of one run; `run` trains and says how it ended."""
    def __init__(self, cfg: Config, rt: Runtime, ledger: Ledger, model: GPT, stream: TokenStream):
        self.cfg, self.rt, self.ledger, self.model, self.stream = cfg, rt, ledger, model, stream
        self.loss_of, self.grads = rt.compile(model), flat_gradients(list(model.parameters()))
        self.optimizers, self.quantized = build_optimizers(model, cfg, rt), quantized_matrices(model, cfg)
        self.averager = Averager(model, cfg) if cfg.ema_decay or cfg.swa_every else None
        self.oracle = Oracle(cfg, rt.device) if cfg.mixer_head else None
        self.step, self.origin, self.filling, self.last = 0, 0.0, 0.0, Report()  # filling the oracle: seconds
        self.in_flight, self.durations = deque(), deque(maxlen=32)               # steps, results; seconds
        self.time_limit = cfg.max_wallclock_seconds - cfg.gptq_reserve_seconds
        self.clocked = cfg.schedule == "clock" and cfg.max_wallclock_seconds > 0
        self.stop_requested = self.save_requested = self.faking = False
    def elapsed(self) -> float:                                         # training seconds, pauses left out
        return time.perf_counter() - self.origin
    def steps_left(self) -> float:
        """Steps until the end, from what all processes know."""
        by_count, last = self.cfg.iterations - self.step, self.last
        if not self.clocked:
            return by_count
        pace = max(last.elapsed - self.filling, 0.0) / max(last.step, 1) or 1e-9      # unknown: full speed
        return min(by_count, (self.time_limit - last.elapsed) / pace - (self.step - last.step))
    def out_of_time(self) -> bool:
        """Whether one more step could end after the cap: steps in flight at report, since then, the next."""
        needed = 1.1 * max(self.durations, default=0.0) * (2 * self.rt.lag + 1)
        return self.clocked and bool(self.durations) and self.last.elapsed + needed > self.time_limit
    def train_step(self, batch_of: Callable[[int], tuple[np.ndarray, np.ndarray]]) -> Tensor:
        """One optimizer step -> this process's part of the mean loss. Nothing here waits for the device."""
        cfg, rt = self.cfg, self.rt
        factor = apply_schedule(self.optimizers, cfg, self.step, self.steps_left())
        if self.clocked and self.step < 50:                             # a slow first step is no end in sight
            factor = 1.0
        if factor < cfg.late_qat_threshold and not self.faking:
            self.ledger.log(f"late_qat:enabled step:{self.step} matrices:{len(self.quantized)}")
            self.fake_quantization(True)
        self.grads.zero_()
        total = torch.zeros((), device=rt.device)
        for micro in range(rt.rank, cfg.micro_batches, rt.world):
            ids, targets = map(rt.put, batch_of(self.step * cfg.micro_batches + micro))
            ratios = self.oracle.ratios(ids, targets) if self.oracle else None
            loss = self.loss_of(ids, targets, ratios) / cfg.micro_batches
            loss.backward()
            total += loss.detach()
        if rt.main and self.quantized and cfg.crown_q_lambda and factor < 0.5:
            penalty = quantization_penalty(self.quantized, cfg)         # once, not by every process
            penalty.backward()
            total += penalty.detach()
        clip_gradients(rt.sum_(self.grads), cfg.grad_clip_norm)
        for optimizer in self.optimizers:
            optimizer.step()
        return total
    def fake_quantization(self, on: bool) -> None:
        """Turns fake quantization of the matrices that will be packed as whole numbers on or off."""
        self.faking = on
        for matrix, top in self.quantized:
            matrix.fake_top, matrix.fake_floor = top if on else 0, self.cfg.quant_scale_floor
    def fill_oracle(self) -> None:
        """Counts all training tokens, in pieces shared by the processes, inside the training clock."""
        shards, size = self.stream.shards, 10 ** 7
        pieces = [shard[at:at + size] for shard in shards for at in range(0, len(shard), size)]
        for piece in pieces[self.rt.rank::self.rt.world]:
            self.oracle.add(self.rt.put(piece.astype(np.int64)))
        self.rt.sum_(self.oracle.tables)
        self.rt.sync()
        now = self.rt.sum_(torch.tensor([self.elapsed() if self.rt.main else 0.0])).item()   # rank 0's
        self.filling, self.last = now - self.last.elapsed, self.last._replace(elapsed=now)
        self.ledger.log(f"prefilled {self.stream.total} tokens in {self.filling * 1000:.0f} ms (counted)")
    def warm_up(self) -> None:
        """WARMUP_STEPS steps on random tokens, so that all is compiled; then all state is as before."""
        cfg, rng = self.cfg, np.random.default_rng(0)
        weights = copy.deepcopy(self.model.state_dict())
        shape = cfg.micro_tokens // cfg.train_seq_len, cfg.train_seq_len
        for index in range(cfg.warmup_steps):                           # the last with the other graph
            self.fake_quantization(cfg.late_qat_threshold > 0 and index == cfg.warmup_steps - 1)
            self.train_step(lambda unit: (rng.integers(0, cfg.vocab_size, shape),) * 2)
        self.fake_quantization(False)
        self.model.load_state_dict(weights)
        self.optimizers = build_optimizers(self.model, cfg, self.rt)
        self.rt.sync()
    def run(self, validate: Callable[[int], None]) -> str:
        """Trains to the end. Returns finished, wallclock_cap, interrupted or diverged."""
        handlers = {number: signal.signal(number, self._on_signal) for number in (
            getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))}
        self.origin = time.perf_counter() - self.last.elapsed
        try:
            with self.ledger.phase("train"):
                if self.oracle:
                    self.fill_oracle()
                status = self._loop(validate)
                self.rt.sync()
                self.seconds = self.elapsed()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
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
            if status and self._diverged(0):                            # in its last steps
                return "diverged"
            if cfg.val_loss_every and (status or self.step % cfg.val_loss_every == 0):
                with self._paused("validate"):
                    validate(self.step)
            if status:
                return status
            loss = self.train_step(lambda unit: self.stream.batch(unit, cfg))
            self.step += 1
            if self.averager:
                share = self.last.elapsed / self.time_limit if self.clocked else self.step / cfg.iterations
                self.averager.update(self.step, share)
            values = [self.elapsed() if self.rt.main else 0.0, loss, self.stop_requested, self.save_requested]
            self.save_requested = False
            self.in_flight.append((self.step, self.rt.start_sum(values)))
            if self._diverged(self.rt.lag):
                return "diverged"
            if self.last.stop or self.last.save or cfg.save_every and self.step % cfg.save_every == 0:
                with self._paused("checkpoint"):
                    self.save_checkpoint()
                if self.last.stop:
                    return "interrupted"
                self.last = self.last._replace(save=False)
    def _diverged(self, lag: int) -> bool:
        """Takes in what steps up to `lag` ago reported, and logs it: was a loss not finite?"""
        while self.in_flight and self.in_flight[0][0] <= self.step - lag:
            step, result = self.in_flight.popleft()
            elapsed, loss, stop, save = result()                        # sums: one NaN or infinity shows
            self.durations.append(elapsed - self.last.elapsed)
            self.last = Report(step, elapsed, loss, self.last.diverged or not math.isfinite(loss),
                               self.last.stop or stop > 0, self.last.save or save > 0)
            every = self.cfg.train_log_every
            if every and (step <= 10 or step % every == 0) or self.last.diverged:
                self.ledger.log(f"step:{step}/{self.cfg.iterations} train_loss:{loss:.4f} "
                                f"train_time:{elapsed * 1000:.0f}ms step_avg:{elapsed * 1000 / step:.2f}ms")
            self.ledger.metric(step=step, train_loss=loss, train_seconds=round(elapsed, 4))
        return self.last.diverged
    @contextlib.contextmanager
    def _paused(self, phase: str) -> Iterator[None]:
        """Stops the training clock for something that touches no training data."""
        self.rt.sync()
        begin = time.perf_counter()
        with self.ledger.phase(phase):
            yield
            self.rt.sync()
        self.origin += time.perf_counter() - begin
    def _on_signal(self, number: int, frame: Any) -> None:
        self.stop_requested |= number == signal.SIGTERM
        self.save_requested = True
    def save_checkpoint(self) -> None:
        """checkpoint.pt in OUT_DIR: all that the next step depends on."""
        path = self.ledger.out_dir / "checkpoint.pt"
        if self.rt.main:
            save_torch(path, dict(
                settings=self.cfg.group("model", "train", "optim"), model=self.model.state_dict(),
                averages=self.averager and (self.averager.means, self.averager.count), step=self.step,
                optimizers=[optimizer.state_dict() for optimizer in self.optimizers], elapsed=self.elapsed()))
        self.ledger.log(f"checkpoint: {path} at step {self.step}")
    def resume(self, path: Path) -> None:
        """Continues from a checkpoint. Raises InputError if it is not one or belongs to another model."""
        with refusing(f"RESUME={path}: cannot be read", Exception):     # torch raises half a dozen types
            state = torch.load(path, map_location="cpu", weights_only=True)
        with refusing(f"RESUME={path}: unusable", Exception):
            differing = sorted(name.upper() for name, now in self.cfg.group("model", "train", "optim").items()
                               if state["settings"][name] != now)
            wrong = [name for name in differing if FIELDS[name].metadata["group"] == "model"]
            demand(not wrong, f"made with other values of {', '.join(wrong)}")
            self.model.load_state_dict(state["model"])
            for optimizer, stored in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(stored)
            if self.averager:
                means, self.averager.count = state["averages"]
                self.averager.means = {n: [w.to(self.rt.device) for w in mean] for n, mean in means.items()}
            self.step, self.last = state["step"], Report(state["step"], state["elapsed"])
        self.ledger.log(f"resumed:{path} step:{self.step} train_time:{self.last.elapsed * 1000:.0f}ms "
                        f"changed settings: {', '.join(differing) or 'none'}")

def save_torch(path: Path, state: Any) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    atomic_write(path, buffer.getvalue())

# ============================================================================================================
# 10. AUDIT - what makes a score believable, tested on the score itself. Uses sections 3-8; changes nothing.

Verdict = tuple[str | None, dict[str, Any]]                             # what is wrong, or None; the figures

class AccessWatch:
    """Files opened and other hosts contacted while it watches (a Python audit hook)."""
    def __init__(self) -> None:
        self.mark, self.seen = "", []
        sys.addaudithook(self._hook)
    def _hook(self, event: str, args: tuple) -> None:
        if self.mark and event == "open" and self.mark in str(args[0]):
            self.seen.append(f"opened {Path(args[0]).name}")
        elif self.mark and event == "socket.connect" and isinstance(args[1], tuple) and \
                args[1][0] not in ("127.0.0.1", "::1", "localhost"):
            self.seen.append(f"connected to {args[1][0]}")
    @contextlib.contextmanager
    def watching(self, mark: str) -> Iterator[list[str]]:
        """Yields the list of what is seen: files with `mark` in their path, hosts."""
        self.mark, self.seen = mark, []
        try:
            yield self.seen
        finally:
            self.mark = ""

access_watch = functools.cache(AccessWatch)                # one a process: Python cannot take a hook back

def audit_bytes(tokens: np.ndarray, table: ByteTable, bos: int, sample_tokens: int = 1 << 20) -> Verdict:
    """The byte table against the decoded text, by document, over the first tokens."""
    tokens = tokens[:sample_tokens]
    starts, counted = np.flatnonzero(tokens == bos), np.concatenate(([0], np.cumsum(table.count(tokens))))
    for lo, hi in itertools.pairwise(starts):
        text, count = len(table.decode(tokens[lo + 1:hi])), counted[hi - 1] - counted[lo]
        if count != text:
            return f"document at token {lo}: counted {count}, decoded {text}", {}
    return None, {"documents": len(starts)}

def audit_order(events: Sequence[tuple[str, int, int]]) -> Verdict:
    """No token may be observed before it was charged (C3), and charges go left to right (C4)."""
    charged = 0
    for kind, lo, hi in events:
        if kind == "score" and lo != charged:
            return f"scored from target {lo}, expected {charged}", {}
        if kind == "observe" and hi > charged:
            return f"observed up to target {hi}, charged only up to {charged}", {}
        charged = max(charged, hi)
    return None, {"events": len(events)}

def audit_future(predictor: Predictor, batch: Batch, counts: Any, vocab: int) -> Verdict:
    """Other tokens after a position must not change what is charged up to it (C1): two positions."""
    before = predictor.score(batch, counts).float()
    size, moved = batch.targets.size(1), 0.0
    for last in (size // 3, 2 * size // 3):
        ids, targets = batch.ids.clone(), batch.targets.clone()
        for later in (ids[:, ids.size(1) - size + last + 1:], targets[:, last + 1:]):
            later.copy_((later + 1) % vocab)
        after = predictor.score(batch._replace(ids=ids, targets=targets), counts).float()
        moved = max(moved, (after - before)[:, :last + 1].abs().max().item())
    return f"later tokens move charges by {moved:.2g} nats" if moved > 1e-4 else None, {"nats": moved}

def audit_distribution(predictor: Predictor, batch: Batch, score: Score, tolerance: float) -> Verdict:
    """At 256 positions the probabilities sum to one and the target's entry is what was charged (C2)."""
    real = np.argwhere(batch.real)
    rows, at = real[np.linspace(0, len(real) - 1, min(256, len(real))).astype(int)].T
    log_p = predictor.full(batch, score.counts, rows, at)                                        # [256, V]
    entries = log_p.gather(1, batch.targets.cpu()[rows, at][:, None]).squeeze(1).numpy()
    charged = predictor.score(batch, score.counts).cpu().numpy()[rows, at] if predictor.chunk else \
        score.nats[batch.index[rows, at]]                               # what adapts is asked as it is now
    total, gap = torch.logsumexp(log_p, -1).abs().max().item(), float(np.abs(entries + charged).max())
    score.mass = log_p.exp().sum(-1).mean().item()
    problem = f"log of the sum over the vocabulary is off by {total:.2g}, the charge from its entry by " \
              f"{gap:.2g} nats" if total > tolerance or gap > tolerance else None
    return problem, {"positions": len(rows), "log_sum": total, "entry_gap": gap, "mass": score.mass}

# The checks that a labelled score fails by its nature; any other failure counts against it too.
FAULTS = {"unnormalised_score": ("distribution", "every_token", "random_stream"),
          "adapted_before_scoring": ("order", "future_again", "every_token", "random_stream")}

def judged(checks: Mapping[str, Verdict], fault: str, tolerance: float) -> dict[str, dict[str, Any]]:
    """Check -> verdict (PASS, or FAIL or EXPECTED and the reason) and figures."""
    verdicts = {}
    for name, (problem, figures) in checks.items():
        known = name in FAULTS.get(fault, ()) and figures.get("entry_gap", 0.0) <= tolerance
        verdict = f"{'EXPECTED' if known else 'FAIL'}: {problem}" if problem else "PASS"
        verdicts[name] = {"verdict": verdict, **figures}
    return verdicts

class Rescorer:
    """Scores short streams again and again, each time from the same state, for the checks of MODE=audit.

    Windows and chunks are as short as 128 targets, so that a stream of six of them holds every kind of edge.
    """
    def __init__(self, build: Callable[..., Predictor], model: GPT, rt: Runtime, cfg: Config,
                 table: ByteTable, ledger: Ledger):
        self.build, self.model, self.table, self.rt = build, model, table, rt
        self.size, self.ledger = min(cfg.score_len, 128), Ledger(ledger.out_dir, rt, resumed=True)
        self.ledger.writes = False
        stride = min(cfg.stride, self.size // 2) if cfg.stride < cfg.score_len else 0
        short = ("eval_seq_len", "ttt_chunk_tokens", "mix_chunk_tokens", "eval_batch_tokens")
        self.cfg = dataclasses.replace(
            cfg, **dict.fromkeys(short, self.size), eval_stream=min(cfg.eval_stream, self.size), ttt_docs=2,
            eval_stride=stride, ngram_stride=0, max_eval_seconds=0.0)
    def __call__(self, tokens: np.ndarray, model: GPT | None = None, rt: Runtime | None = None, scale: int = 1
                 ) -> np.ndarray:
        """Nats of every target [n], float64."""
        cfg = dataclasses.replace(self.cfg, eval_batch_tokens=scale * self.size)
        predictor = self.build(model or self.model, rt or self.rt, cfg, self.table)
        state = predictor.snapshot()
        score = evaluate(predictor, tokens, self.table, cfg, rt or self.rt, self.ledger)
        predictor.restore(state)
        return score.nats.astype(np.float64)

def audit_again(scores: Rescorer, tokens: np.ndarray, cfg: Config, predictor: Predictor
                ) -> dict[str, dict[str, Any]]:
    """The checks of MODE=audit (spec: rules 7.3), minutes of them. The stream is cut into three documents."""
    size, rng, vocab = scores.size, np.random.default_rng(cfg.seed), cfg.vocab_size
    tolerance = scores.rt.tolerance
    stream = np.resize(tokens, 6 * size + 1)
    thirds = [0, 2 * size, 4 * size - 7]
    stream[thirds] = cfg.bos_id
    def digest(model: nn.Module) -> bytes:
        return hashlib.sha256(b"".join(p.data.cpu().numpy().tobytes() for p in model.parameters())).digest()
    before, first = digest(scores.model), scores(stream)
    def gap(name: str, other: np.ndarray, own: np.ndarray = first, bound: float = tolerance) -> Verdict:
        nats = float(np.abs(other - own).max())
        return f"{name} move charges by {nats:.2g} nats" if nats > bound else None, {"nats": nats}
    moved = []
    for last in (3, size - 1, size, thirds[1], 3 * size + 5, thirds[2], 5 * size - 1, 6 * size - 2):
        other = np.append(stream[:last + 2], rng.integers(0, vocab, len(stream) - last - 2))
        moved.append(scores(other)[:last + 1] - first[:last + 1])
    sums = [sum(math.exp(-scores(np.append(stream[:last + 1], v))[last]) for v in range(vocab))
            for last in (size - 1, size)]                               # on both sides of a chunk's end
    blank = copy.deepcopy(scores.model)
    for name, p in blank.named_parameters():
        p.data.mul_(0.0 if name.startswith(("tok_emb", "lm_head")) else 1.0)
    noise = scores(rng.integers(0, vocab, len(stream)).astype(stream.dtype), model=blank)
    least, mean = math.log(vocab) - 4 * float(noise.std()) / math.sqrt(len(noise)) - 1e-6, float(noise.mean())
    solo = copy.copy(scores.rt)
    solo.rank, solo.world = 0, 1
    swapped = np.concatenate((stream[thirds[1]:thirds[2]], stream[:thirds[1]], stream[thirds[2]:]))
    return judged({
        "future_again": gap("later tokens", np.concatenate(moved), 0.0),
        "every_token": (f"charges of all tokens add up to {sums}"
                        if any(abs(total - 1) > 10 * tolerance for total in sums) else None, {"sums": sums}),
        "random_stream": (f"{mean:.4f} nats on random tokens, ln V is {math.log(vocab):.4f}"
                          if mean < least else None, {"nats": mean}),
        "batches": gap("other batch sizes", scores(stream, scale=4)),
        "processes": gap("other numbers of processes", scores(stream, rt=solo)),
        "isolation": gap("other documents", scores(swapped)[thirds[2]:], first[thirds[2]:])
        if predictor.isolates else (None, {"claimed": False}),
        "repeat": gap("repeated scores", scores(stream)),
        "neutral": (None if digest(scores.model) == before else "scoring left other weights", {}),
    }, predictor.fault, tolerance)

def audit(score: Score, predictor: Predictor, tokens: np.ndarray, table: ByteTable, cfg: Config, rt: Runtime,
          stages: Mapping[str, float], accessed: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The checks of every score, at the price of a few batches."""
    plan = predictor.probe(tokens)
    near, batch = (plan.batch(tokens, unit, len(unit), rt, predictor.reach) for unit in plan.samples(256))
    targets, once, tolerance = len(tokens) - 1, int((score.coverage == 1).sum()), rt.tolerance
    recount = float(score.nats.sum(dtype=np.float64) / math.log(2) / table.count(tokens).sum())
    checks: dict[str, Verdict] = {
        "coverage": (None if once == len(score.nats) == targets else
                     f"{once} of {targets} targets charged exactly once", {"charged_once": once}),
        "bytes": audit_bytes(tokens, table, cfg.bos_id),
        "byte_algebra": (None if abs(recount - score.bpb) < 1e-9 else
                         f"recount gives {recount}, reported {score.bpb}", {"recount": recount}),
        "order": audit_order(score.events),
        "future": audit_future(predictor, near, score.counts, cfg.vocab_size),
        "distribution": audit_distribution(predictor, batch, score, tolerance),
        "access": ("; ".join(accessed) or None, {"seen": len(accessed)})}
    gain = max(stages.values(), default=score.bpb) - score.bpb
    doubt = f"WARN: gains {gain:.4f} bpb over another stage" if gain > 0.03 else \
        "WARN: below 0.9 bpb" if score.bpb < 0.9 else "PASS"
    return {**judged(checks, score.fault, tolerance), "plausibility": {"verdict": doubt, "gain": gain}}

# ============================================================================================================
# 11. MAIN - modes, results, exit codes. The only section that reads the environment or the command line.

OK, BUG, OVER_SIZE, OUT_OF_MEMORY, DIVERGED, OVER_TIME, AUDIT_FAILED, BAD_INPUT, INTERRUPTED = (
    0, 1, 2, 3, 4, 5, 6, 64, 143)

def build_model(cfg: Config, rt: Runtime, weights: Mapping[str, Tensor] | None = None) -> GPT:
    """The model on its device, at its start or with given weights; InputError if they are not its own."""
    with torch.device("cpu" if weights is None else "meta"):            # shapes only: claims cost no memory
        model = GPT(cfg)
    if weights is not None:
        with refusing("artifact: its tensors do not fit its settings", RuntimeError):
            model.load_state_dict(weights, strict=True, assign=True)
    model, model.compute_dtype = model.to(rt.device), rt.dtype
    for block in model.blocks:
        block.attn.attend = rt.attend
    return model

def code_size() -> int:
    """Bytes of the script that runs and of a config.env beside it: both are needed to repeat the run."""
    return sum(path.stat().st_size for path in (SCRIPT, SCRIPT.with_name("config.env")) if path.is_file())

def commit_of(folder: Path) -> tuple[str | None, bool | None]:
    """The commit of the repository around a folder, and whether tracked files differ; None without git."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        name = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=False).stdout.strip()
        return (name.removesuffix("-dirty"), name.endswith("-dirty")) if name else (None, None)
    return None, None

def log_identity(cfg: Config, rt: Runtime, ledger: Ledger) -> None:
    """First lines of every log, first fields of every result: versions, machine, overrides, code."""
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda, **{
        module.__name__: module.__version__ for module in (torch, np, sentencepiece, zstandard)}}
    changed = {name: as_typed(getattr(cfg, field.name)) for name, field in FIELDS.items()
               if getattr(cfg, field.name) != field.default}
    recipe = json.dumps(cfg.group("data", "train", "model", "optim", "pack", "score"), sort_keys=True)
    (commit, dirty), code = commit_of(SCRIPT.parent) if rt.main else (None, None), sha256(SCRIPT)
    tested = [] if torch.__version__.startswith("2.13") else ["WARNING: tested with torch 2.13 only"]
    ledger.log("\n".join([" ".join(f"{n}:{v}" for n, v in versions.items()), *tested, *rt.notes]))
    ledger.log("overrides: " + (shlex.join(f"{name}={text}" for name, text in changed.items()) or "none"))
    ledger.log(f"seed:{cfg.seed} code_sha256:{code} commit:{commit}{' dirty' if dirty else ''}")
    ledger.save(
        mode=cfg.mode, seed=cfg.seed, settings=dataclasses.asdict(cfg), overrides=changed, code_sha256=code,
        config_sha256=hashlib.sha256(recipe.encode()).hexdigest(), commit=commit, dirty=dirty,
        versions=versions, world_size=rt.world, resumed=bool(cfg.resume), machine=dict(
            type=rt.device.type, device=rt.device_name(), system=platform.platform(), notes=rt.notes))
    ledger.identify(tokenizer_identity, cfg, ByteTable.load(cfg))

def build_trainer(cfg: Config, rt: Runtime, ledger: Ledger) -> Trainer:
    """Data, model and warmed-up (or resumed) trainer, with the log lines that say what they are."""
    with ledger.phase("load"):
        stream = TokenStream(shard_paths(cfg, "train"), cfg.vocab_size)
        wanted = cfg.iterations * cfg.micro_batches * (cfg.micro_tokens + 1)
        ledger.identify(shards_identity, cfg, "train", stream.total)
        if cfg.schedule == "tokens" and wanted > stream.total:
            ledger.log(f"note: the run takes {wanted} tokens, the data begins again after {stream.total}")
    with ledger.phase("build"):
        trainer = Trainer(cfg, rt, ledger, build_model(cfg, rt), stream)
    ledger.log(f"model_params:{sum(p.numel() for p in trainer.model.parameters())} training_flops_per_token:"
               f"{training_flops(cfg, trainer.model):.4g}\ntrain_batch_tokens:{cfg.train_batch_tokens} "
               f"train_seq_len:{cfg.train_seq_len} micro_batches:{cfg.micro_batches} "
               f"iterations:{cfg.iterations} max_wallclock_seconds:{cfg.max_wallclock_seconds:.3f}")
    with ledger.phase("warmup"):
        trainer.warm_up()
    if cfg.resume:
        trainer.resume(Path(cfg.resume))
    return trainer

def train_model(cfg: Config, rt: Runtime, ledger: Ledger) -> tuple[str, bytes]:
    """Trains and packs. Returns how training ended and the artifact (empty if there is none)."""
    table, trainer = ByteTable.load(cfg), build_trainer(cfg, rt, ledger)
    predictor = Sliding(trainer.model, rt, "validate", cfg.score_len, cfg.score_len)
    validation = functools.cache(lambda: load_validation(cfg))         # read at the first validation, if any
    def validate(step: int) -> None:
        score = evaluate(predictor, validation(), table, cfg, rt, ledger)
        if score:
            ledger.log(f"step:{step}/{cfg.iterations} val_loss:{score.loss:.4f} "
                       f"{score.label}:{score.bpb:.4f} train_time:{trainer.elapsed() * 1000:.0f}ms")
            ledger.metric(step=step, val_loss=score.loss, **{score.label: score.bpb})
    status = trainer.run(validate)
    tokens, hessians = trainer.step * cfg.train_batch_tokens, {}
    ledger.save(status=status, steps=trainer.step, train_seconds=round(trainer.seconds, 3),
                train_tokens=tokens, train_flops=training_flops(cfg, trainer.model) * tokens,
                train_loss=trainer.last.loss, peak_memory_bytes=rt.peak_memory())
    if status in ("diverged", "interrupted"):
        return status, b""
    if trainer.averager:
        trainer.averager.apply()
    if cfg.gptq_n_samples:
        with ledger.phase("calibrate"):
            hessians = collect_hessians(trainer.model, cfg, rt, trainer.stream)
    return status, pack_model(cfg, rt, ledger, trainer.model, hessians)

def pack_model(cfg: Config, rt: Runtime, ledger: Ledger, model: GPT, hessians: dict[str, Tensor]) -> bytes:
    """Raw weights and artifact on disk, before anything is scored; the artifact's bytes on every process."""
    blob, code, cap = None, code_size(), cfg.max_artifact_bytes
    with ledger.phase("pack"):
        if rt.main:
            state = {name: w.cpu() for name, w in model.state_dict().items()}
            save_torch(ledger.out_dir / "final_model.pt", state)
            blob = pack(state, cfg, hessians, code, dict(tokenizer=tokenizer_hash(cfg), seed=cfg.seed))
            atomic_write(ledger.out_dir / "model.ptz", blob)
            ledger.log("\n".join(size_report(blob, code, cap)))
        blob = rt.broadcast_bytes(blob)
    total = code + len(blob)
    ledger.save(sizes=dict(code=code, model=len(blob), total=total, cap=cap, margin=cap - total),
                artifact_sha256=hashlib.sha256(blob).hexdigest())
    return blob

def load_artifact(cfg: Config, blob: bytes, rt: Runtime) -> GPT:
    stored, weights = unpack(blob)
    model, notes = build_model(stored, rt, weights), read_header(blob)[0].get("notes")
    here = tokenizer_hash(cfg)
    made_with = notes.get("tokenizer", here) if isinstance(notes, dict) else here
    demand(made_with == here, f"TOKENIZER_PATH={cfg.tokenizer_path!r}: the artifact was trained with another "
                              f"tokenizer (sha256 {made_with!s:.16}, here {here:.16})")
    return model

def score_artifact(cfg: Config, blob: bytes, rt: Runtime, ledger: Ledger) -> int:
    """Every scoring stage from the artifact alone; results are written after each. Returns an exit code."""
    with ledger.phase("unpack"):
        model = load_artifact(cfg, blob, rt)
        table, tokens = ByteTable.load(cfg), load_validation(cfg)
        ledger.identify(shards_identity, cfg, "val", len(tokens))
    stages, code = {}, OK
    chosen = {name: build for name, (wanted, build) in PREDICTORS.items() if wanted(cfg)}
    for name, build in chosen.items():
        predictor = build(model, rt, cfg, table)
        state = predictor.snapshot()                                    # what a stage learns ends with it
        with access_watch().watching("fineweb_train") as accessed:
            score = evaluate(predictor, tokens, table, cfg, rt, ledger)
        with ledger.phase("audit"):
            checks = audit(score, predictor, tokens, table, cfg, rt, stages, accessed) if score else {}
            predictor.restore(state)
            if score and cfg.mode == "audit":
                checks |= audit_again(Rescorer(build, model, rt, cfg, table, ledger), tokens, cfg, predictor)
        if score is None:
            ledger.result["stages"][name], code = {"skipped": "MAX_EVAL_SECONDS"}, code or OVER_TIME
        else:
            record, final = score.record(), f"final_{cfg.compressor}_{name}"
            mass = "" if record["normalised"] else f" vocabulary_mass:{score.mass:.2f}"
            ledger.log(f"{final} val_loss:{score.loss:.4f} {score.label}:{score.bpb:.4f} eval_time:"
                       f"{score.seconds * 1000:.0f}ms{mass}\n{final}_exact val_loss:{score.loss:.8f} "
                       f"{score.label}:{score.bpb:.8f}")
            for check, found in checks.items():
                if found["verdict"] != "PASS":
                    ledger.log(f"audit {name} {check} {found['verdict']}")
            ledger.result["stages"][name] = {**record, "audit": checks}
            if not score.fault:                                         # the last true score is the run's
                stages[name], ledger.result["result"] = score.bpb, dict(stage=name, **record)
            code = AUDIT_FAILED if any(c["verdict"].startswith("FAIL") for c in checks.values()) else code
            ledger.save()
    with ledger.phase("sample"):
        if cfg.sample_tokens:
            ledger.log(f"sample: {sample(model, table, cfg, rt)}")
    return code

def result_card(cfg: Config, ledger: Ledger, code: int) -> None:
    """The closing summary: bpb by stage, size and margin, seconds by phase, exit code."""
    result, seconds = ledger.result, ledger.result["seconds"]
    told = "{metric} {value:.6f}   {tokens} tokens, {bytes} bytes, {seconds:.1f} s"
    lines = [f"{name:12} " + (f"skipped: {stage['skipped']}" if "skipped" in stage else
                              told.format(value=stage[stage["metric"]], **stage))
             for name, stage in result["stages"].items()]
    if "sizes" in result:
        size = "size         {total} bytes = code {code} + model {model}; cap {cap}, margin {margin}"
        lines.append(size.format(**result["sizes"]))
    spent = "  ".join(f"{name} {s:.1f}" for name, s in seconds.items() if "_side" not in name)
    lines += [f"seconds      {spent}",
              f"budgets      train {seconds['train_side']:.1f} of {cfg.max_wallclock_seconds:.0f} s, "
              f"eval {seconds['eval_side']:.1f} of {cfg.max_eval_seconds:.0f} s",
              f"exit code    {code} ({result['status']}{', resumed run' * bool(cfg.resume)})"]
    ledger.log("\n".join(["-" * 72, *lines, "-" * 72]))

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
            ledger.log(sample(load_artifact(cfg, blob, rt), ByteTable.load(cfg), cfg, rt))
        return OK
    code = score_artifact(cfg, blob, rt, ledger)
    late = cfg.schedule == "clock" and 0 < cfg.max_wallclock_seconds < ledger.side("train") or \
        0 < cfg.max_eval_seconds < ledger.side("eval")
    return code if code == AUDIT_FAILED else \
        OVER_SIZE if code_size() + len(blob) > cfg.max_artifact_bytes else OVER_TIME if late else code

def guarded_run(cfg: Config, rt: Runtime) -> tuple[int, dict[str, Any]]:
    """run_once with its outcome on record, whatever happens."""
    ledger = Ledger(Path(cfg.out_dir), rt, resumed=bool(cfg.resume))
    if cfg.smoke:
        cfg = dataclasses.replace(cfg, data_path=str(Path(cfg.out_dir).resolve() / "smoke_data"))
        if rt.main:
            synthetic_shards(Path(cfg.data_path))
        rt.broadcast_bytes(b"")                                         # the others wait for the files
    try:
        code = run_once(cfg, rt, ledger)
    except InputError as error:
        ledger.log(f"error: {error}")
        ledger.result["status"], code = "bad_input", BAD_INPUT
    except Exception as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            ledger.save(status="crashed", exit_code=BUG)
            raise
        ledger.log(f"out of memory: {error}\nLower MICRO_BATCH_TOKENS={cfg.micro_tokens} (training) or "
                   f"EVAL_BATCH_TOKENS={cfg.eval_batch_tokens} (scoring); no score depends on them.")
        ledger.result["status"], code = "out_of_memory", OUT_OF_MEMORY
    ledger.save(exit_code=code)
    result_card(cfg, ledger, code)
    ledger.log(f"result_json: {json.dumps(ledger.result)}", show=False)    # so the log alone says everything
    return code, ledger.result

def read_artifact(cfg: Config) -> bytes:
    path = Path(cfg.artifact or Path(cfg.out_dir) / "model.ptz")
    with refusing(f"ARTIFACT={str(path)!r}: cannot be read", OSError):
        return path.read_bytes()

def settings_of_artifact(cfg: Config, env: Mapping[str, str]) -> Config:
    """For MODE=eval and sample: the artifact's settings, and whatever was set here outside the model."""
    stored, (given, _) = _read_config(read_header(read_artifact(cfg))[0].get("config")), read_settings(env)
    _refuse([f"{name.upper()}={given[name]}: the artifact was made with {value}"
             for name, value in stored.group("model").items() if name in given and given[name] != value])
    merged = dataclasses.replace(cfg, **{**stored.group("model", "pack", "score"), **given,
                                         "out_dir": cfg.out_dir, "run_id": cfg.run_id})
    _refuse(check_config(merged))
    return merged

def run_seeds(cfg: Config, rt: Runtime) -> int:
    """One run a seed, then mean and standard deviation of the scores. Returns the highest exit code."""
    runs = [guarded_run(dataclasses.replace(cfg, seed=seed, out_dir=f"{cfg.out_dir}/seed_{seed}"), rt)
            for seed in cfg.seeds]
    scores = [result["result"]["val_bpb"] for _, result in runs if "val_bpb" in result.get("result", {})]
    if rt.main and scores:
        std = float(np.std(scores, ddof=1)) if len(scores) > 1 else math.nan
        print(f"seeds:{as_typed(cfg.seeds)} val_bpb mean:{np.mean(scores):.6f} std:{std:.6f} n:{len(scores)}")
    return max(code for code, _ in runs)

def main(argv: Sequence[str], env: Mapping[str, str]) -> int:
    """Runs the program; returns its exit code."""
    if "--help" in argv or "-h" in argv:
        print(help_text())
        return OK
    try:
        _refuse([f"unknown argument {arg!r}: settings are environment variables (--help)" for arg in argv])
        cfg = load_config(env)
        with contextlib.closing(Runtime(cfg, env)) as rt:
            run_id = cfg.run_id or time.strftime(f"%Y%m%d_%H%M%S_{os.getpid()}")
            run_id = rt.broadcast_bytes(run_id.encode()).decode()
            cfg = dataclasses.replace(cfg, run_id=run_id, out_dir=cfg.out_dir or f"logs/{run_id}")
            cfg = cfg if cfg.mode == "train" else settings_of_artifact(cfg, env)
            return run_seeds(cfg, rt) if cfg.seeds else guarded_run(cfg, rt)[0]
    except InputError as error:
        print(error, file=sys.stderr)
        return BAD_INPUT

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
