"""Parameter Golf: train, pack and score the best language model of 16,000,000 bytes with its code.

    torchrun --standalone --nproc_per_node=8 train_gpt.py       # the competition: 600 s on 8xH100
    CONFIG=records/track_1gpu/pr2135/config.env python train_gpt.py     # an hour on one GPU
    CONFIG=records/track_cpu_1mb/demo/config.env python train_gpt.py    # minutes on a laptop CPU
    MODE=eval ARTIFACT=logs/<run>/model.ptz python train_gpt.py         # score an artifact alone
    SMOKE=1 python train_gpt.py                                 # every section, synthetic text
    MODE=pack ARTIFACT=logs/<run>/model.ptz python train_gpt.py         # pack its weights otherwise
    MODE=plan python train_gpt.py                               # what a run would cost on 8xH100
    python train_gpt.py --help                                  # every setting with its meaning

Settings are environment variables. The sections stand in the order of a run; each uses only those
above it:

    1 settings     5 model         9 artifact    13 main
    2 devices      6 optimizer    10 scoring
    3 run log      7 quantizers   11 checks
    4 data         8 training     12 plan

A training run: `train_model` (13), `train`, `steps_until_the_end`, `Trainer.step` (8),
`GPT.forward` (5), `Muon.step` (6). Axis letters in comments: B batch, T time, H heads, K key/value
heads or n-gram orders, D model or head size, V vocabulary, S scored targets of a row, keys that
queries look at, pieces of a row, or slots of adapters; R, C rows and columns of a matrix, G blocks
of C queries to L keys each.
"""

from __future__ import annotations

import bisect
import contextlib
import copy
import ctypes
import dataclasses
import datetime
import difflib
import functools
import hashlib
import inspect
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
import sys
import tempfile
import time
import zlib
from collections import Counter, defaultdict, deque, namedtuple
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # binds the group that it finds: must find none, or it stays
import torch.nn.functional as F
import zstandard
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

SCRIPT = Path(__file__).resolve()
SETTINGS_INSIDE = globals().get("SETTINGS_INSIDE", "")  # the config.env inside a packed wrapper

# ==================================================================================================
# 1. SETTINGS - what can be chosen, and every complaint about a choice.
#    Uses the standard library only.
# ==================================================================================================


class InputError(ValueError):
    """Something given to the program (a setting, a shard, an artifact) is unusable; it is named."""


ConfigError = InputError  # by the name that others' checks import


class TooFine(InputError):
    """Quantization steps so small that whole numbers of two bytes do not reach the weights."""


class AgreedError(InputError):
    """An InputError that every process raises at the same place."""


def check(holds: Any, complaint: str) -> None:
    """Raises InputError with the complaint unless the condition holds."""
    if not holds:
        raise InputError(complaint)


def raise_if(problems: Sequence[str]) -> None:
    """Raises one InputError that lists all problems, if there are any."""
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}; nothing was started."
        raise InputError("\n".join([*problems, count]))


@contextlib.contextmanager
def input_error_from(complaint: str, *kinds: type[Exception]) -> Iterator[None]:
    """Exceptions of these kinds become an InputError: the complaint, and the reason in one line."""
    try:
        yield
    except kinds as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        reason = " ".join(reason.removeprefix("InputError: ").split())
        raise InputError(f"{complaint} ({reason:.300})") from None


def printable(text: Any, most: int = 80) -> str:
    """What a file says, as part of a log line: it can neither begin a new line nor fill the log."""
    text = str(text)
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:most])
    return shown if len(text) <= most else f"{shown}..."


def _setting(
    group: str,
    default: Any,
    doc: str,
    low: Any = None,
    high: Any = None,
    choices: Any = (),
    needs: str = "",
) -> Any:
    """A field of Config. needs: without this it cannot act ("A=x or B, and C")."""
    if high is None:  # what the machine's numbers hold
        high = {int: 2**31 - 1, float: 1e38}.get(type(default))
    metadata = {"group": group, "doc": doc, "low": low, "high": high}
    metadata |= {"choices": choices, "needs": needs}
    return dataclasses.field(default=default, metadata=metadata)


HASHED_NGRAM = "NGRAM=fixed or NGRAM=backoff or NGRAM=gated"
NGRAM_TABLES = f"{HASHED_NGRAM} or MIXER_HEAD"
PACKS_ROWS = "QUANT_STEP=0.0 or QUANT_POLICY"  # some matrix in whole numbers by rows

_run = functools.partial(_setting, "run")
_data = functools.partial(_setting, "data")
_train = functools.partial(_setting, "train")
_model = functools.partial(_setting, "model")
_optim = functools.partial(_setting, "optim")
_pack = functools.partial(_setting, "pack")
_score = functools.partial(_setting, "score")


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting; its environment variable is the field's name in upper case.

    0 or empty = absent, unless its sentence says otherwise.
    """

    mode: str = _run(
        "train",
        "what to do; plan: print what a run would cost on 8xH100; pack: raw weights again",
        choices=("train", "eval", "pack", "sample", "plan"),
    )
    run_id: str = _run("", "name of the run; empty = time and process number")
    out_dir: str = _run("", "folder for everything written; empty = logs/<RUN_ID>")
    seed: int = _run(
        1337, "seed of the parameters' initial values and of sampling", low=0, high=2**63 - 1
    )
    seeds: tuple[int, ...] = _run(
        (),
        "several seeds, one run each, then mean and standard deviation: 1,2,3",
        needs="MODE=train",
    )
    smoke: bool = _run(False, "every section on a tiny model and synthetic text, no data needed")
    device: str = _run("auto", "where to compute", choices=("auto", "cuda", "cpu", "mps"))
    dtype: str = _run(
        "auto",
        "number format of the activations; auto = bfloat16 on CUDA, else float32",
        choices=("auto", "float32", "bfloat16"),
    )
    compile: str = _run("auto", "torch.compile; auto = on CUDA only", choices=("auto", "0", "1"))
    attn: str = _run(
        "auto",
        "attention; auto = the fastest that works here (the log's line attention: says which)",
        choices=("auto", "fa3", "sdpa"),
    )
    artifact: str = _run(
        "",
        "packed model for MODE=eval, pack and sample; empty = <OUT_DIR>/model.ptz",
        needs="MODE=eval or MODE=sample or MODE=pack",
    )
    raw_model: str = _run(
        "",
        "float weights for MODE=pack; empty = final_model.pt beside the artifact",
        needs="MODE=pack",
    )
    resume: str = _run("", "checkpoint to continue from", needs="MODE=train")
    save_every: int = _run(
        0, "write a checkpoint every so many steps (also on SIGUSR1, SIGTERM and SIGINT)", low=0
    )
    sample_tokens: int = _run(
        0, "length of text sample; 0 = none after training, 200 in MODE=sample", low=0
    )
    sample_prompt: str = _run(
        "", "text that the sample continues", needs="SAMPLE_TOKENS or MODE=sample"
    )
    sample_temperature: float = _run(
        0.8, "temperature of the sample", low=0.01, needs="SAMPLE_TOKENS or MODE=sample"
    )

    data_path: str = _data(
        "./data/datasets/fineweb10B_sp8192_lossless_caps_caseops_v1_reserved",
        "folder of fineweb_{train,val}_*.bin shards",
    )
    tokenizer_path: str = _data(
        "./data/tokenizers/fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model",
        "SentencePiece model or byte260",
    )
    case_transform: str = _data(
        "",
        "how capitals become markers, for a tokenizer that has them; empty = as the manifest says",
        choices=("", "caseops", "case2"),
    )
    val_tokens: int = _data(
        0, "validation targets to score (development: no val_bpb); 0 = all", low=0
    )

    schedule: str = _train("clock", "what drives warm-down and stop", choices=("clock", "tokens"))
    max_wallclock_seconds: float = _train(
        600.0, "training seconds under SCHEDULE=clock; 0 = none", low=0, needs="SCHEDULE=clock"
    )
    iterations: int = _train(20000, "training steps at most", low=0)
    warmup_steps: int = _train(
        20, "steps on throw-away state before the clock starts (compilation)", low=0
    )
    warmdown_iters: int = _train(
        1200,
        "last steps, over which the learning rates fall to zero",
        low=0,
        needs="WARMDOWN_FRAC=0.0",
    )
    warmdown_frac: float = _train(
        0.85,
        "last share of the run, over which they fall (of its clock under SCHEDULE=clock)",
        low=0,
        high=1,
    )
    min_lr: float = _train(
        0.1,
        "share of the learning rates that stays at least",
        low=0,
        high=1,
        needs="WARMDOWN_FRAC or WARMDOWN_ITERS",
    )
    train_batch_tokens: int = _train(786432, "tokens a step, over all processes", low=1)
    micro_batch_tokens: int = _train(
        0, "tokens a forward pass; 0 = an eighth of TRAIN_BATCH_TOKENS", low=0
    )
    train_seq_len: int = _train(2048, "tokens a training sequence", low=1)
    train_doc_mask: bool = _train(
        True, "attention inside documents only, cut at TRAIN_SEQ_LEN; a micro-batch is one row"
    )
    context_schedule: str = _train(
        "",
        "shorter cuts at first, each until a share of the run: 1024:0.1,2048:0.7 (PR 2014)",
        needs="TRAIN_DOC_MASK",
    )
    val_loss_every: int = _train(
        4000, "validate every so many steps, outside the clock; 0 = never", low=0
    )
    train_log_every: int = _train(
        500, "log the training loss every so many steps (and the first ten)", low=0
    )
    enable_looping_at: float = _train(
        0.35, "share of the run after which layers are repeated", low=0, high=1, needs="NUM_LOOPS"
    )
    late_qat_threshold: float = _train(
        0.0,
        "fake quantization at rate factors below this; 0 = never",
        low=0,
        needs=PACKS_ROWS,
    )
    crown_q_lambda: float = _train(
        0.0,
        "quantization penalty (CROWN-Q) at rate factors below 0.5",
        low=0,
        needs=f"{PACKS_ROWS}, and WARMDOWN_FRAC or WARMDOWN_ITERS",
    )

    defaults: str = _model(
        "pr2135",
        "whose values hold where nothing is set: PR 2135's, or the official baseline's (all off)",
        choices=("pr2135", "baseline"),
    )
    vocab_size: int = _model(8192, "tokens in the vocabulary", low=2, high=65536)
    num_layers: int = _model(11, "transformer blocks", low=1, high=1024)
    model_dim: int = _model(512, "width", low=2, high=65536)
    num_heads: int = _model(8, "attention heads", low=1)
    num_kv_heads: int = _model(4, "key/value heads (grouped-query attention)", low=1)
    mlp_mult: float = _model(
        4.0, "MLP hidden width over MODEL_DIM; may be fractional", low=0.01, high=64
    )
    leaky_slope: float = _model(0.5, "MLP activation leaky_relu(x, slope)^2; 0 = relu(x)^2", low=0)
    tie_embeddings: bool = _model(True, "the embedding is also the output matrix")
    tied_embed_init_std: float = _model(
        0.005, "standard deviation of a tied embedding at start", low=0, needs="TIE_EMBEDDINGS"
    )
    ortho_init: str = _model(
        "plain", "orthogonal start (scaled: tables less)", choices=("", "plain", "scaled")
    )
    logit_softcap: float = _model(30.0, "logits become cap * tanh(logits / cap); 0 = off", low=0)
    rope_base: float = _model(10000.0, "rotary base", low=1)
    rope_dims: int = _model(16, "rotated dimensions of a head (partial RoPE); 0 = all", low=0)
    rope_train_seq_len: int = _model(
        0, "longer inputs stretch the rotary base (NTK); 0 = never", low=0
    )
    qk_gain_init: float = _model(5.0, "initial gain of each head's normalised queries", low=0)
    xsa_last_n: int = _model(11, "last layers with exclusive self-attention (XSA); 0 = none", low=0)
    asym_logit_rescale: bool = _model(
        True,
        "scoring has a cap above zero and one below, kept in the model",
        needs="LOGIT_SOFTCAP",
    )
    unet_skips: bool = _model(True, "learned skips from the first half of the layers to the second")
    skip_gates_enabled: bool = _model(
        True, "a skip is blended in by a learned sigmoid gate, not added", needs="UNET_SKIPS"
    )
    num_loops: int = _model(
        2, "depth recurrence: further passes over LOOP_START to LOOP_END; 0 = none", low=0, high=64
    )
    loop_start: int = _model(3, "first repeated layer", low=0, needs="NUM_LOOPS")
    loop_end: int = _model(5, "last repeated layer", low=0, needs="NUM_LOOPS")
    parallel_start_layer: int = _model(
        8,
        "attention and MLP have a lane each from this layer of the second half on; 0 = one lane",
        low=0,
    )
    x0_mix: bool = _model(True, "every block mixes in the embedding stream with learned weights")
    ln_scale: bool = _model(True, "normed sublayer inputs times 1/sqrt(layer + 1)")
    depth_scale_init: bool = _model(False, "attn_scale and mlp_scale start at 1/sqrt(layer + 1)")
    bigram_vocab_size: int = _model(
        0, "rows of the hashed bigram embedding (BigramHash); 0 = none", low=0
    )
    hash_orders: tuple[int, ...] = _model(
        (), "hashed embeddings of so many last tokens each: 3,4; empty = none"
    )
    hash_rows: int = _model(16384, "rows of each of them", low=2, needs="HASH_ORDERS")
    bigram_dim: int = _model(
        128, "width of all these tables", low=1, needs="BIGRAM_VOCAB_SIZE or HASH_ORDERS"
    )
    bigram_hash: str = _model(
        "xor",
        "xor: PR 489; linear: PR 740, without scale",
        choices=("xor", "linear"),
        needs="BIGRAM_VOCAB_SIZE or HASH_ORDERS",
    )
    bigram_init: str = _model(
        "zero",
        "its start; dead: never trains",
        choices=("zero", "normal", "dead"),
        needs="BIGRAM_VOCAB_SIZE or HASH_ORDERS",
    )
    smear: bool = _model(
        False, "SmearGate by dimension: a learned share of the previous token's embedding"
    )
    smear_before_norm: bool = _model(
        False, "SmearGate acts before the embedding's norm (PR 740), not after", needs="SMEAR=1"
    )
    smear_gate_enabled: bool = _model(
        True, "SmearGate by input: a share of the previous token's embedding is added (PR 1667)"
    )
    smear_bos_mask: bool = _model(
        True,
        "SmearGate lets nothing across a document start",
        needs="SMEAR=1 or SMEAR_GATE_ENABLED",
    )
    sparse_attn_gate_enabled: bool = _model(
        True, "each head's output times a sigmoid gate of the layer's input (PR 1787)"
    )
    sparse_attn_gate_scale: float = _model(
        0.5, "factor inside that sigmoid", low=0, needs="SPARSE_ATTN_GATE_ENABLED"
    )
    gate_window: int = _model(
        12,
        "first dimensions that those gates read",
        low=1,
        needs="SMEAR_GATE_ENABLED or SPARSE_ATTN_GATE_ENABLED",
    )
    induction_orders: tuple[int, ...] = _model(
        (),
        "tokens that a place of the document must share with this one, most first: 3,2; what "
        "followed the last such place is an input; empty = off",
    )
    bos_id: int = _model(1, "token that starts a document", low=0)
    ve_layers: tuple[int, ...] = _model(
        (), "layers whose values get token embeddings: 9,10; empty = none"
    )
    ve_dim: int = _model(128, "width of the shared value-embedding table", low=1, needs="VE_LAYERS")
    mixer_head: bool = _model(False, "a head that weighs network and n-gram orders (PR 859)")

    embed_lr: float = _optim(
        0.6, "Adam rate of an untied embedding", low=0, needs="TIE_EMBEDDINGS=0"
    )
    head_lr: float = _optim(
        0.008, "Adam rate of an untied output matrix", low=0, needs="TIE_EMBEDDINGS=0"
    )
    tied_embed_lr: float = _optim(
        0.03,
        "Adam rate of a tied embedding and of the other tables",
        low=0,
        needs="TIE_EMBEDDINGS or BIGRAM_VOCAB_SIZE or HASH_ORDERS or VE_LAYERS",
    )
    matrix_lr: float = _optim(0.028, "Muon rate of the matrices", low=0)
    scalar_lr: float = _optim(0.02, "Adam rate of vectors and scalars", low=0)
    bigram_optim: str = _optim(
        "",
        "optimizer group of the bigram's table and projection; empty = tables and matrices",
        choices=("", "scalars", "matrices"),
        needs="BIGRAM_VOCAB_SIZE",
    )
    muon_momentum: float = _optim(0.97, "Muon momentum", low=0, high=1)
    muon_momentum_warmup_start: float = _optim(
        0.92, "Muon momentum at step 0", low=0, high=1, needs="MUON_MOMENTUM_WARMUP_STEPS"
    )
    muon_momentum_warmup_steps: int = _optim(1500, "steps until MUON_MOMENTUM is reached", low=0)
    muon_backend_steps: int = _optim(5, "Newton-Schulz iterations", low=1)
    muon_row_normalize: bool = _optim(
        True, "rows of a matrix's update have length one before they are orthogonalised"
    )
    muon_polar_express: bool = _optim(
        True, "coefficients of each Newton-Schulz iteration (Polar Express), not one set for all"
    )
    muon_wd: float = _optim(0.095, "decoupled weight decay of the matrices", low=0)
    embed_wd: float = _optim(
        0.085, "decoupled weight decay of embeddings, tables and output matrix", low=0
    )
    adam_wd: float = _optim(0.02, "decoupled weight decay of vectors and scalars", low=0)
    beta1: float = _optim(0.9, "Adam", low=0, high=1)
    beta2: float = _optim(0.99, "Adam", low=0, high=1)
    adam_eps: float = _optim(1e-8, "Adam", low=0)
    grad_clip_norm: float = _optim(0.3, "global gradient norm at most; 0 = off", low=0)
    ema_decay: float = _optim(
        0.9965, "average the weights over steps with this decay; 0 = off", low=0, high=1
    )
    ema_start: float = _optim(
        0.0, "share of the run after which that begins", low=0, high=1, needs="EMA_DECAY"
    )
    swa_every: int = _optim(
        0, "average of every so many steps (with EMA: half of each); 0 = off", low=0
    )
    swa_start: float = _optim(
        0.4, "share of the run after which that begins", low=0, high=1, needs="SWA_EVERY"
    )

    quant_step: float = _pack(
        0.0,
        "water-filling: c of steps c x U_jj x importance^-1/2 (costs c^2 / 24 nats a weight)",
        low=0,
        high=1e3,
        needs="GPTQ_N_SAMPLES",
    )
    quant_row_steps: bool = _pack(
        True, "a step for each row by its importance, not one a matrix", needs="QUANT_STEP"
    )
    quant_bits: int = _pack(
        6,
        "bits of a quantized weight, row-wise scales",
        low=2,
        high=8,
        needs="QUANT_STEP=0.0",
    )
    quant_policy: str = _pack(
        "embed:7,gate:16",
        "other bits by role: embed:8,attn:6 (embed, table, attn, mlp, gate, other; gate:16)",
    )
    quant_clip_steps: int = _pack(
        16,
        "clip levels tried for each row; 1 = its maximum",
        low=1,
        high=256,
        needs="MATRIX_CLIP_SIGMAS=0.0, and QUANT_STEP=0.0 or QUANT_POLICY",
    )
    quant_scale_floor: bool = _pack(
        False,
        "steps of at least 1/top level, as the official baseline has them",
        needs="MATRIX_CLIP_SIGMAS=0.0, and QUANT_STEP=0.0 or QUANT_POLICY",
    )
    matrix_clip_sigmas: float = _pack(
        12.85,
        "clip each row at so many of its standard deviations; 0 = search",
        low=0,
        high=1e4,
        needs=PACKS_ROWS,
    )
    attn_clip_sigmas: float = _pack(
        13.0,
        "the same for attention; 0 = MATRIX_CLIP_SIGMAS",
        low=0,
        high=1e4,
        needs="MATRIX_CLIP_SIGMAS",
    )
    mlp_clip_sigmas: float = _pack(
        11.5,
        "the same for the MLP; 0 = MATRIX_CLIP_SIGMAS",
        low=0,
        high=1e4,
        needs="MATRIX_CLIP_SIGMAS",
    )
    embed_clip_sigmas: float = _pack(
        14.0,
        "the same for embeddings; 0 = MATRIX_CLIP_SIGMAS",
        low=0,
        high=1e4,
        needs="MATRIX_CLIP_SIGMAS",
    )
    lqer_enabled: bool = _pack(
        True, "the worst quantized matrices get a correction of low rank (LQER, 2402.02446)"
    )
    lqer_top_k: int = _pack(3, "how many matrices get one", low=1, needs="LQER_ENABLED")
    lqer_rank: int = _pack(4, "its rank", low=1, high=256, needs="LQER_ENABLED")
    lqer_factor_bits: int = _pack(
        4, "bits of its second factor; the first has 2", low=2, high=8, needs="LQER_ENABLED"
    )
    lqer_asym_group: int = _pack(
        32,
        "neighbours in the second factor that share a scale",
        low=1,
        needs="LQER_ENABLED",
    )
    gptq_n_samples: int = _pack(
        1536, "training sequences that calibrate GPTQ; 0 = plain rounding", low=0
    )
    gptq_embed: bool = _pack(
        True,
        "GPTQ for the output embedding too (PR 1394)",
        needs="GPTQ_N_SAMPLES, and QUANT_STEP=0.0",
    )
    gptq_damp: float = _pack(
        0.01, "share of its mean added to the Hessian's diagonal", low=1e-6, needs="GPTQ_N_SAMPLES"
    )
    gptq_reserve_seconds: float = _pack(
        4.0,
        "seconds of the training clock kept for calibration",
        low=0,
        needs="SCHEDULE=clock, and GPTQ_N_SAMPLES",
    )
    prune_pct: float = _pack(
        0.0,
        "share of each quantized tensor's smallest weights set to 0",
        low=0,
        high=1,
        needs=PACKS_ROWS,
    )
    keep_float_max_numel: int = _pack(65536, "tensors up to this size stay float", low=0)
    compressor: str = _pack(
        "rans", "codec of the artifact", choices=("zstd", "zlib", "lzma", "rans")
    )
    max_artifact_bytes: int = _pack(
        16_000_000, "cap on code + model; over it the exit code is 2", low=0
    )
    max_model_bytes: int = _pack(
        0, "cap on the model alone, as small tracks have it; 0 = none", low=0
    )
    fit_artifact: bool = _pack(
        True,
        "scale QUANT_STEP to fill the cap; MATRIX_CLIP_SIGMAS and its like only up, to fit it",
        needs="QUANT_STEP or MATRIX_CLIP_SIGMAS",
    )
    fit_margin: int = _pack(10_000, "bytes of the cap left free then", low=0, needs="FIT_ARTIFACT")

    eval_seq_len: int = _score(
        2560, "tokens a scoring window; 0 = TRAIN_SEQ_LEN", low=0, high=1 << 20
    )
    eval_plain: bool = _score(
        True, "score plain windows too; 0 = only where no other stage gives a true score"
    )
    eval_stride: int = _score(0, "sliding windows advance by this; 0 = none", low=0)
    eval_batch_tokens: int = _score(
        0, "tokens a scoring batch; 0 = as the device likes", low=0, high=1 << 24
    )
    max_eval_seconds: float = _score(
        600.0, "scoring seconds; a stage that cannot finish is skipped", low=0
    )
    ttt_epochs: int = _score(
        0, "passes of test-time training over what was scored; 0 = none", low=0
    )
    ttt_before_scoring: bool = _score(
        False, "adapt to all tokens, then score them (PR 489): no valid score", needs="TTT_EPOCHS"
    )
    ttt_chunk_tokens: int = _score(
        32768,
        "targets between two adaptations; of a step of TTT_GLOBAL_DOCS",
        low=1,
        needs="TTT_EPOCHS or EVAL_STREAM or TTT_GLOBAL_DOCS",
    )
    ttt_lr: float = _score(
        8e-5,
        "learning rate: of all weights along a cosine over the chunks, of adapters as it is",
        low=0,
        needs="TTT_EPOCHS or TTT_LORA_RANK",
    )
    ttt_optimizer: str = _score(
        "adamw", "its optimizer; sgd has momentum 0.9", choices=("adamw", "sgd"), needs="TTT_EPOCHS"
    )
    ttt_freeze_blocks: int = _score(
        0,
        "adapt the last so many blocks (and scales and head, without adapters); 0 = all",
        low=0,
        needs="TTT_EPOCHS or TTT_LORA_RANK",
    )
    qttt: bool = _score(
        False,
        "of those blocks adapt the query matrices only",
        needs="TTT_EPOCHS, and TTT_FREEZE_BLOCKS",
    )
    byte_weighted_ttt: bool = _score(
        False, "weigh its loss by each target's bytes", needs="TTT_EPOCHS"
    )
    ttt_batch_seqs: int = _score(32, "sequences of each part in a step", low=1, needs="TTT_EPOCHS")
    ttt_parts: int = _score(
        1,
        "equal parts of the data that a step draws from (the published runs' GPUs)",
        low=1,
        high=65536,
        needs="TTT_EPOCHS",
    )
    ttt_lora_rank: int = _score(
        80, "rank of adapters that learn each document while it is scored", low=0
    )
    ttt_lora_alpha: float = _score(
        144.0, "their product is scaled by this over the rank", low=1e-6, needs="TTT_LORA_RANK"
    )
    ttt_lora_on: str = _score(
        "q,v,attn,mlp,head",
        "where, in every executed layer: q, k, v, out (attention's matrices), up, down (the "
        "MLP's), attn, mlp (beside all of either); and head",
        needs="TTT_LORA_RANK",
    )
    ttt_lora_wd: float = _score(2.0, "their weight decay", low=0, needs="TTT_LORA_RANK")
    ttt_lora_chunk: int = _score(
        48, "targets between two of their steps", low=1, needs="TTT_LORA_RANK"
    )
    ttt_lora_early_chunks: str = _score(
        "",
        "other chunks in a document's first targets: 8:256,24:2000 (8 up to target 256, then 24)",
        needs="TTT_LORA_RANK",
    )
    ttt_lora_keep: bool = _score(
        False, "a slot's A matrices stay for its next document", needs="TTT_LORA_RANK"
    )
    ttt_docs: int = _score(
        512,
        "documents in a batch, each with its own adapters; 64 a GPU at most, if no score changes",
        low=1,
        high=65536,
        needs="TTT_LORA_RANK",
    )
    ttt_global_docs: int = _score(
        2500,
        "after so many documents all weights learn these, in one pass of SGD; 0 = never",
        low=0,
        needs="TTT_LORA_RANK",
    )
    ttt_global_lr: float = _score(
        0.001, "its learning rate at first; a cosine", low=1e-9, needs="TTT_GLOBAL_DOCS"
    )
    ttt_temperature: float = _score(
        1.0,
        "temperature of certain predictions (ttt, mixed, ngram); 1 = off",
        low=0,
        needs="TTT_EPOCHS or TTT_LORA_RANK or TILT or TILT_BOOST or NGRAM",
    )
    eval_stream: int = _score(
        0,
        "width of the attention window of one pass over the stream; 0 = none",
        low=0,
        high=1 << 20,
    )
    stream_docs: bool = _score(
        False, "that pass sees no document but the target's own", needs="EVAL_STREAM"
    )
    mix_chunk_tokens: int = _score(
        16384,
        "targets between two updates of TILT and NGRAM=mix",
        low=1,
        needs="TILT or NGRAM=mix or EVAL_STREAM, and TTT_LORA_RANK=0, "
        "and TTT_EPOCHS=0 or TTT_BEFORE_SCORING",
    )
    tilt: bool = _score(False, "raise the token that last followed the longest known context")
    tilt_boost: float = _score(
        2.625,
        "raise a token that mostly followed a context by so many nats of odds",
        low=0,
        high=50,
    )
    tilt_order: int = _score(
        16, "length of that context and token together", low=2, high=256, needs="TILT_BOOST"
    )
    tilt_share: float = _score(
        0.8,
        "share of the context's sightings that it must have followed",
        low=0.51,  # at a half two tokens may have
        high=1,
        needs="TILT_BOOST",
    )
    ngram: str = _score(
        "",
        "mix: exact n-gram mixture; others: hashed caches (no score)",
        choices=("", "mix", "fixed", "backoff", "gated"),
    )
    ngram_docs: bool = _score(
        True,
        "contexts of TILT and NGRAM=mix do not reach into earlier documents",
        needs="TILT or TILT_BOOST or NGRAM=mix",
    )
    ngram_order: int = _score(7, "highest order", low=2, high=16, needs=NGRAM_TABLES)
    ngram_min_order: int = _score(2, "lowest order", low=2, high=16, needs=NGRAM_TABLES)
    ngram_alpha: float = _score(0.4, "weight of NGRAM=fixed", low=0, high=1, needs="NGRAM=fixed")
    ngram_ent_base: float = _score(
        0.05, "weight of NGRAM=backoff where the network is certain", low=0, needs="NGRAM=backoff"
    )
    ngram_ent_range: float = _score(
        0.55, "what uncertainty adds to it", low=0, needs="NGRAM=backoff"
    )
    ngram_min_count: int = _score(
        2, "an order counts from so many sightings of its context", low=1, needs=NGRAM_TABLES
    )
    ngram_buckets: int = _score(
        4_194_304, "counters of a table, a power of two", low=2, high=2**30, needs=NGRAM_TABLES
    )
    ngram_primes: tuple[int, ...] = _score(
        (36313, 27191, 51647, 81929, 131071, 65537, 104729), "of the hash", needs=NGRAM_TABLES
    )
    ngram_stride: int = _score(
        0, "its windows advance by this; 0 = EVAL_STRIDE", low=0, needs=HASHED_NGRAM
    )
    ngram_chunk_tokens: int = _score(
        0, "targets between two updates; 0 = after every window", low=0, needs=HASHED_NGRAM
    )

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.model_dim // self.num_heads

    @property
    def micro_tokens(self) -> int:
        """Tokens of one forward pass in training."""
        return self.micro_batch_tokens or self.train_batch_tokens // 8

    @property
    def row_tokens(self) -> int:
        """Tokens of a row of a training batch."""
        return self.micro_tokens if self.train_doc_mask else self.train_seq_len

    @property
    def micro_batches(self) -> int:
        """Forward passes of one training step, over all processes."""
        return self.train_batch_tokens // self.micro_tokens

    @property
    def context_rows(self) -> list[tuple[int, float]]:
        """Largest segments of training, and the share of the run until which each holds."""
        found = re.findall(r"(\d+):(\d*\.?\d+)", self.context_schedule)
        rows = [*found, (self.train_seq_len, "inf")]
        return [(int(length), float(until)) for length, until in rows]

    @property
    def early_chunks(self) -> list[tuple[int, int]]:
        """Targets of a chunk of adapters, and the target of a document up to which that holds."""
        found = re.findall(r"(\d+):(\d+)", self.ttt_lora_early_chunks)
        return [(int(size), int(until)) for size, until in found]

    @property
    def adapted_places(self) -> list[str]:
        """Where adapters stand."""
        return self.ttt_lora_on.split(",")

    @property
    def score_len(self) -> int:
        """Tokens of a scoring window."""
        return self.eval_seq_len or self.train_seq_len

    @property
    def train_limit(self) -> float:
        """Seconds that training may take, calibration included; 0 is no limit."""
        return self.max_wallclock_seconds if self.schedule == "clock" else 0.0

    @property
    def stride(self) -> int:
        """What sliding windows advance by; the window's length = windows side by side."""
        return self.eval_stride or self.score_len

    @property
    def ngram_orders(self) -> range:
        """Orders of the hashed caches, ascending."""
        return range(self.ngram_min_order, self.ngram_order + 1)

    def group(self, *groups: str) -> dict[str, Any]:
        """Name -> value of these groups' settings (run, data, train, model, optim, pack, score)."""
        chosen = (f.name for f in FIELDS.values() if f.metadata["group"] in groups)
        return {name: getattr(self, name) for name in chosen}


Hyperparameters = Config  # the name that people's tools look for
FIELDS = {f.name.upper(): f for f in dataclasses.fields(Config)}

# Values of DEFAULTS=baseline, where others than those above: techniques are off. An artifact that
# does not know a setting was made without it.
BASELINE: dict[str, Any] = dict(
    defaults="baseline",
    data_path="./data/datasets/fineweb10B_sp1024",
    tokenizer_path="./data/tokenizers/fineweb_1024_bpe.model",
    warmdown_frac=0.0,
    min_lr=0.0,
    train_batch_tokens=524288,
    train_seq_len=1024,
    train_doc_mask=False,
    val_loss_every=1000,
    train_log_every=200,
    vocab_size=1024,
    num_layers=9,
    mlp_mult=2.0,
    leaky_slope=0.0,
    ortho_init="",
    rope_dims=0,
    qk_gain_init=1.5,
    xsa_last_n=0,
    asym_logit_rescale=False,
    skip_gates_enabled=False,
    num_loops=0,
    parallel_start_layer=0,
    ln_scale=False,
    smear_gate_enabled=False,
    smear_bos_mask=False,
    sparse_attn_gate_enabled=False,
    tied_embed_lr=0.05,
    matrix_lr=0.04,
    scalar_lr=0.04,
    muon_momentum=0.95,
    muon_momentum_warmup_start=0.85,
    muon_momentum_warmup_steps=500,
    muon_row_normalize=False,
    muon_polar_express=False,
    muon_wd=0.0,
    embed_wd=0.0,
    adam_wd=0.0,
    beta2=0.95,
    grad_clip_norm=0.0,
    ema_decay=0.0,
    quant_bits=8,
    quant_policy="",
    matrix_clip_sigmas=0.0,
    attn_clip_sigmas=0.0,
    mlp_clip_sigmas=0.0,
    embed_clip_sigmas=0.0,
    lqer_enabled=False,
    lqer_asym_group=64,
    gptq_n_samples=0,
    gptq_embed=False,
    gptq_reserve_seconds=0.0,
    compressor="zstd",
    fit_artifact=False,
    fit_margin=0,
    eval_seq_len=0,
    eval_stride=64,
    ttt_lr=5e-4,
    ttt_lora_rank=0,
    ttt_lora_on="q,k,v,out,up,down",
    ttt_lora_wd=0.5,
    ttt_docs=64,
    ttt_global_docs=0,
    tilt_boost=0.0,
)

SMOKE_CONFIG = """
DEFAULTS=baseline
DATA_PATH=smoke_data
TOKENIZER_PATH=byte260
VOCAB_SIZE=260
NUM_LAYERS=4
MODEL_DIM=64
NUM_HEADS=4
NUM_KV_HEADS=2
TRAIN_SEQ_LEN=128
TRAIN_BATCH_TOKENS=2048
MICRO_BATCH_TOKENS=1024
ITERATIONS=20
WARMUP_STEPS=2
WARMDOWN_ITERS=10
VAL_LOSS_EVERY=10
SCHEDULE=tokens
KEEP_FLOAT_MAX_NUMEL=1024
EMA_DECAY=0.8
BIGRAM_VOCAB_SIZE=256
BIGRAM_DIM=16
SMEAR=1
SMEAR_BOS_MASK=1
XSA_LAST_N=2
VE_LAYERS=2,3
VE_DIM=16
ROPE_DIMS=8
LN_SCALE=1
LEAKY_SLOPE=0.5
SAMPLE_TOKENS=60
"""

# Modes whose settings must make a training.
TRAINING_MODES = ("train", "plan")

ADAPTED_PLACES = ("q", "k", "v", "out", "up", "down", "attn", "mlp", "head")

# Names of published logs that are settings here, of the same values, under another name.
ALIASES = {
    "SMEAR_GATE_BOS_FIX": "SMEAR_BOS_MASK",
    "TTT_LORA_LR": "TTT_LR",
    "TTT_CHUNK_SIZE": "TTT_LORA_CHUNK",
    "TTT_WEIGHT_DECAY": "TTT_LORA_WD",
    "PHASED_TTT_PREFIX_DOCS": "TTT_GLOBAL_DOCS",
    "GLOBAL_TTT_LR": "TTT_GLOBAL_LR",
    "GLOBAL_TTT_CHUNK_TOKENS": "TTT_CHUNK_TOKENS",
    "TOKEN_BOOST": "TILT_BOOST",
    "TOKEN_ORDER": "TILT_ORDER",
    "TOKEN_THRESHOLD": "TILT_SHARE",
}

SETTING_NAMES = {*FIELDS, *ALIASES, "CONFIG"}  # of environment variables that are read

# Other spellings that people's scripts use, and what the setting is called here.
OLD_NAMES = {
    "BIGRAM_HASH_BUCKETS": "BIGRAM_VOCAB_SIZE",
    "WEIGHT_DECAY": "MUON_WD",
    "VAL_BATCH_SIZE": "EVAL_BATCH_TOKENS",
    "BATCH_SIZE": "TRAIN_BATCH_TOKENS",
    "LEARNING_RATE": "MATRIX_LR, SCALAR_LR and TIED_EMBED_LR",
    "LR": "MATRIX_LR, SCALAR_LR and TIED_EMBED_LR",
    "LAYERS": "NUM_LAYERS",
    "NLAYERS": "NUM_LAYERS",
    "N_LAYERS": "NUM_LAYERS",
    "N_LAYER": "NUM_LAYERS",
    "N_HEAD": "NUM_HEADS",
    "N_EMBD": "MODEL_DIM",
    "D_MODEL": "MODEL_DIM",
    "HIDDEN_SIZE": "MODEL_DIM",
    "SEQ_LEN": "TRAIN_SEQ_LEN",
    "STEPS": "ITERATIONS",
    "MAX_STEPS": "ITERATIONS",
    "NUM_STEPS": "ITERATIONS",
    "NUM_ITERATIONS": "ITERATIONS",
    "EVAL_ONLY": "MODE=eval",
    "TTT_ONLY": "MODE=eval",
    "MAX_SUBMISSION_BYTES": "MAX_ARTIFACT_BYTES",
    "XSA_LAYERS": "XSA_LAST_N",
    "INT8_KEEP_FLOAT_MAX_NUMEL": "KEEP_FLOAT_MAX_NUMEL",
    "VE_ENABLED": "VE_LAYERS",
    "EMA_ENABLED": "EMA_DECAY",
    "SMEAR_ENABLED": "SMEAR",
    "SWA_ENABLED": "SWA_EVERY",
    "QAT_ENABLED": "LATE_QAT_THRESHOLD",
    "GPTQ_ENABLED": "GPTQ_N_SAMPLES",
    "NGRAM_ENABLED": "NGRAM",
    "NGRAM_ENTROPY_ADAPTIVE": "NGRAM=backoff",
    "USE_MIXER": "NGRAM=gated",
    "CASEOPS_ENABLED": "CASE_TRANSFORM",
    "LQER_ASYM_ENABLED": "LQER_ENABLED",
    "TTT_BATCH_SIZE": "TTT_DOCS, of all GPUs: eight times as many",
}

# A name that begins with one of these words was meant for this program.
FAMILIES = """ADAM BIGRAM CROWN EMA EVAL GPTQ GRAD INDUCTION LN LOGIT LOOP LQER MATRIX MIXER MLP
    MUON NGRAM PRUNE QAT QK QUANT ROPE SCALAR SMEAR SPARSE SWA TIED TILT TTT VAL VE WARMDOWN WARMUP
    XSA""".split()

# A name that begins with one of these was set by a launcher, a library or the system.
FOREIGN = tuple(
    """TORCH OMP_ MKL_ NCCL_ CUDA_ PYTHON PYTORCH SLURM_ XDG_ GITHUB_ LD_ LC_ RANK
    WORLD_SIZE LOCAL_ GROUP_ ROLE_ MASTER_ PATH GLOO_ NVIDIA_ TRITON_ HF_""".split()
)

# So were these; any other name that means nothing here is named in the log.
SYSTEM = tuple(
    """ALL_PROXY APPDATA AWS_ AZURE_ BASH BUILD_ CARGO CC CI CLOUD COLOR COLUMNS COMSPEC CONDA
    CONTAINER CPATH CUDNN CURL_ CXX DBUS_ DEBIAN_ DESKTOP_ DISPLAY DOCKER_ EDITOR ENV FTP_ GCC
    GDM GIT GO GPG_ GRPC_ GTK_ HIST HOME HOST HTTP I_MPI_ INFOPATH INVOCATION JAVA JOURNAL JPY_
    JUPYTER KERAS KERNEL KMP_ KUBERNETES LAMBDA_ LANG LESS LIBRARY LIBVA LINES LOGNAME LOGS_
    LSCOLORS LS_ MAIL MALLOC MANAGER MANPATH MOTD MPI NIX_ NO_PROXY NODE NPM_ NUMBER_OF NUMEXPR
    NUM_CPU NVM_ OLDPWD OMPI_ OPAL OPENBLAS OS PAGER PIP PKG_ PMI PODS POD_ POWERSHELL PROCESSOR
    PROGRAM PROMPT PS PUBLIC_ PWD PYENV QT_ REQUESTS_ RUNPOD RUST SESSION SGE SHELL SHLVL SSH
    SSL_ SUDO SYSTEM TEMP TERM TF_ TMP TMUX TZ UCX USER UV_ VAST VECLIB VIRTUAL_ENV VISUAL VSCODE
    WANDB WAYLAND WINDIR WINDOW XAUTH XLA_ ZSH""".split()
)


def _parse_bool(text: str) -> bool:
    return {"0": False, "false": False, "": False, "1": True, "true": True}[text.lower()]


def _parse_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part.strip())


# Type of a setting -> how its text is read, and what is expected there.
PARSERS: dict[type, tuple[Callable[[str], Any], str]] = {
    bool: (_parse_bool, "0, 1, true or false"),
    tuple: (_parse_numbers, "whole numbers with commas"),
    int: (int, "a whole number"),
    float: (float, "a number"),
    str: (str, "text"),
}


@dataclasses.dataclass(frozen=True)
class Assignment:
    """One NAME=value that somebody wrote; `where` names the line of a file, or is empty."""

    where: str
    name: str
    text: str
    complete: bool = True  # false: the line has no equals sign


def _value_in(text: str) -> str | None:
    """What stands behind the equals sign, without quotes and comment; None if quotes are open."""
    quote = text.strip()[:1]
    if quote not in ("'", '"'):
        bare = re.split(r"\s#", text, maxsplit=1)[0].strip()
        return None if "'" in bare or '"' in bare else bare
    value, closed, rest = text.strip().removeprefix(quote).partition(quote)
    ends = closed and (not rest or re.match(r"\s+#", rest))
    return value if ends else None


def read_config_lines(text: str, file: str) -> list[Assignment]:
    """The assignments of a config.env: quotes, comments and `export` as in a shell.

    Spaces in a value need no quotes; nothing is substituted.
    """
    found = []
    for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            name, equals, rest = line.partition("=")
            name = name.strip().removeprefix("export ").strip()
            value = _value_in(rest) if equals else None
            where = f"{file} line {number}: "
            found.append(Assignment(where, name, value or "", value is not None))
    return found


def _near(name: str) -> str:
    """The setting that a mistyped name may mean; empty if none is near."""
    swapped = [name[:i] + name[i : i + 2][::-1] + name[i + 2 :] for i in range(len(name))]
    near = [other for other in swapped if other in FIELDS]
    return next(iter(near or difflib.get_close_matches(name, FIELDS, 1, 0.85)), "")


def _unknown(assignment: Assignment) -> str:
    """What is wrong with a name that is no setting; empty if it may be somebody else's."""
    name = assignment.name
    if not assignment.complete:
        return f"{assignment.where}expected NAME=value (in quotes if it has # or quotes)"
    capitals = name.upper() in FIELDS
    foreign = name.startswith(FOREIGN) or not re.fullmatch("[A-Z][A-Z0-9_]*", name)
    if not assignment.where and foreign and not capitals:
        return ""
    near = name.upper() if capitals else _near(name)
    if name in OLD_NAMES:
        hint = f": here it is {OLD_NAMES[name]}"
    elif near:
        hint = f" (did you mean {near}?)"
    elif assignment.where or name.split("_")[0] in FAMILIES:
        hint = " (python train_gpt.py --help lists all)"
    else:
        return ""
    return f"{assignment.where}unknown setting {printable(name)}{hint}"


def ignored_names(env: Mapping[str, str]) -> list[str]:
    """Names of the environment that mean nothing here, nor to any system that is known here."""
    names = [name for name in env.keys() - SETTING_NAMES if re.fullmatch("[A-Z][A-Z0-9_]*", name)]
    return sorted(name for name in names if not name.startswith(FOREIGN + SYSTEM))


def _sources(env: Mapping[str, str]) -> tuple[list[list[Assignment]], list[str]]:
    """What is written in SMOKE's settings, the config file and the environment; the last holds."""
    problems = []
    path = Path(env["CONFIG"]) if env.get("CONFIG") else SCRIPT.with_name("config.env")
    text = SETTINGS_INSIDE
    if path.is_file():
        unreadable = f"CONFIG={str(path)!r}: not a text file in UTF-8"
        with input_error_from(unreadable, OSError, UnicodeDecodeError):
            text = path.read_text(encoding="utf-8")
    elif env.get("CONFIG"):
        problems.append(f"CONFIG={env['CONFIG']!r}: no such file")
    in_file = read_config_lines(text, path.name)
    in_environment = [
        Assignment("", name, value) for name, value in env.items() if name != "CONFIG"
    ]
    switches = [one.text.strip().lower() for one in in_file + in_environment if one.name == "SMOKE"]
    smoke = SMOKE_CONFIG if switches and switches[-1] in ("1", "true") else ""
    return [read_config_lines(smoke, "SMOKE=1"), in_file, in_environment], problems


def read_settings(
    env: Mapping[str, str], below: Config | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Everything set by SMOKE, file and environment as {field: value}, and the complaints.

    below: what holds where nothing is set; the defaults if it is not given. What cannot act is a
    complaint, except in a mode whose artifact decides that and is not given.
    """
    sources, problems = _sources(env)
    values = {}
    idle = []
    for source in sources:
        given = {}
        written: dict[str, str] = {}
        for assignment in source:
            name = ALIASES.get(assignment.name, assignment.name)
            text = assignment.text.strip()
            if written.setdefault(name, assignment.name) != assignment.name:
                problems.append(f"{written[name]} and {assignment.name} are one setting: give one")
            if not assignment.complete or name not in FIELDS:
                problems += filter(None, [_unknown(assignment)])
                continue
            parse, expected = PARSERS[type(FIELDS[name].default)]
            try:
                check(b"\0" not in text.encode(), "no text")
                given[name] = parse(text)
                values[name.lower()] = given[name]
            except (ValueError, KeyError):
                told = f"{assignment.where}{assignment.name}={printable(repr(text))}"
                problems.append(f"{told}: expected {expected}")
        for name in idle_names(given, filled(values, below)):
            needs = FIELDS[name].metadata["needs"]
            idle.append(f"{name}={as_typed(given[name])} needs {needs}: as it is, it cannot act")
    decided = below or values.get("mode", "train") in TRAINING_MODES
    return values, problems + (idle if decided else [])


def _holds(cfg: Config, term: str) -> bool:
    """Whether NAME=value is so, or NAME is on."""
    name, _, wanted = term.partition("=")
    value = getattr(cfg, name.lower())
    return as_typed(value) == wanted if wanted else bool(value)


def default_config(defaults: str) -> Config:
    """The settings where nothing is set."""
    return Config(**BASELINE) if defaults == "baseline" else Config()


def filled(values: Mapping[str, Any], below: Config | None = None) -> Config:
    """What is set, over `below`, or over the defaults that it chooses."""
    return dataclasses.replace(below or default_config(values.get("defaults", "")), **values)


def is_there(needs: str, holds: Callable[[str], Any]) -> bool:
    """Whether what a setting needs is so: "A=x or B, and C", of which holds(term) knows each."""
    parts = needs.split(", and ") if needs else []
    return all(any(holds(term) for term in part.split(" or ")) for part in parts)


def _acts(cfg: Config, name: str) -> bool:
    return is_there(FIELDS[name].metadata["needs"], functools.partial(_holds, cfg))


def idle_names(given: Mapping[str, Any], cfg: Config) -> list[str]:
    """Names of what was given beside its default and cannot act, as the rest is set.

    A file is judged by itself, so that the environment may turn off what it configures.
    """
    idle = []
    defaults = default_config(cfg.defaults)
    for name, value in given.items():
        default = getattr(defaults, name.lower())
        off = name.lower() in BASELINE or default is not True  # 0 asks for nothing
        if value != default and (value or not off) and not _acts(cfg, name):
            idle.append(name)
    return idle


def settled(cfg: Config) -> Config:
    """Techniques that are on, by default or by a file, and cannot act as the rest is set: off."""
    for name, off in BASELINE.items():
        if not off and not _acts(cfg, name.upper()):
            cfg = dataclasses.replace(cfg, **{name: off})
    return cfg


def value_problems(cfg: Config) -> list[str]:
    """Complaints about the values one by one."""
    problems = []
    for name, field in FIELDS.items():
        value, meta = getattr(cfg, field.name), field.metadata
        low, high = meta["low"], meta["high"]
        if meta["choices"] and value not in meta["choices"]:
            choices = ", ".join(meta["choices"])
            problems.append(f"{name}={printable(repr(value))}: expected one of {choices}")
        if isinstance(value, float) and not math.isfinite(value):
            problems.append(f"{name}={value}: expected a finite number")
        elif low is not None and value < low:
            problems.append(f"{name}={value}: expected {low} or more")
        elif high is not None and value > high:
            problems.append(f"{name}={printable(value)}: expected {high} at most")
    return problems


class Relations:
    """Collects the complaints about settings that do not go together."""

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self.problems: list[str] = []

    def require(self, holds: Any, sentence: str) -> None:
        """Keeps the sentence as a complaint unless the condition holds."""
        if not holds:
            self.problems.append(sentence)

    def shown(self, name: str) -> str:
        """A setting, or what follows from several, as the user would recognise it."""
        names = {"micro_tokens": "MICRO_BATCH_TOKENS=", "head_dim": "the head size "}
        names["score_len"] = "EVAL_SEQ_LEN="
        return names.get(name, f"{name.upper()}=") + printable(as_typed(getattr(self.cfg, name)))

    def multiple(self, a: str, b: str) -> None:
        """The setting a must be a multiple of b."""
        divisor = getattr(self.cfg, b)
        divides = divisor and getattr(self.cfg, a) % divisor == 0
        self.require(divides, f"{self.shown(a)} must be a multiple of {self.shown(b)}")

    def at_most(self, a: str, b: str) -> None:
        """The setting a must not be larger than b."""
        holds = getattr(self.cfg, a) <= getattr(self.cfg, b)
        self.require(holds, f"{self.shown(a)} must be at most {self.shown(b)}")


def _check_model(c: Config, relations: Relations) -> None:
    require, shown = relations.require, relations.shown
    relations.multiple("model_dim", "num_heads")
    relations.multiple("num_heads", "num_kv_heads")
    relations.at_most("xsa_last_n", "num_layers")
    relations.at_most("rope_dims", "head_dim")
    rotated = c.rope_dims or c.head_dim
    last = c.num_layers - 1
    require(
        c.head_dim % 2 == 0, f"MODEL_DIM / NUM_HEADS = {c.head_dim} must be even (rotary pairs)"
    )
    require(c.rope_dims % 2 == 0, f"ROPE_DIMS={c.rope_dims} must be even")
    require(not c.rope_train_seq_len or rotated >= 4, "ROPE_TRAIN_SEQ_LEN needs ROPE_DIMS >= 4")
    require(
        int(c.mlp_mult * c.model_dim) >= 1,
        f"MLP_MULT={c.mlp_mult} leaves no unit at width {c.model_dim}",
    )
    require(
        len(set(c.ve_layers)) == len(c.ve_layers),
        f"{shown('ve_layers')} names a layer twice",
    )
    require(
        all(0 <= layer <= last for layer in c.ve_layers),
        f"{shown('ve_layers')} must lie between 0 and NUM_LAYERS - 1 = {last}",
    )
    if c.num_loops:
        relations.at_most("loop_start", "loop_end")
        require(c.enable_looping_at < 1, f"{shown('enable_looping_at')} must be below 1")
        repeated = range(c.loop_start, c.loop_end + 1)
        require(c.loop_end <= last, f"{shown('loop_end')} must be at most NUM_LAYERS - 1 = {last}")
        require(
            c.parallel_start_layer not in repeated[1:],
            f"{shown('parallel_start_layer')} must not lie among the repeated layers "
            f"{c.loop_start + 1} to {c.loop_end}: a later pass would begin with one lane",
        )
    if c.smear_gate_enabled or c.sparse_attn_gate_enabled:
        relations.at_most("gate_window", "model_dim")
    require(
        c.parallel_start_layer <= last,
        f"{shown('parallel_start_layer')} must be at most NUM_LAYERS - 1 = {last}",
    )
    require(not (c.smear and c.smear_gate_enabled), "SMEAR=1 and SMEAR_GATE_ENABLED=1: choose one")
    require(c.bigram_vocab_size != 1, "BIGRAM_VOCAB_SIZE=1: expected 0 or at least 2")
    require(c.bos_id < c.vocab_size, f"{shown('bos_id')} must be below {shown('vocab_size')}")
    orders = c.induction_orders
    require(
        all(order >= 1 for order in orders) and list(orders) == sorted(set(orders), reverse=True),
        f"{shown('induction_orders')}: each must be at least 1, and less than the one before",
    )
    require(
        all(order >= 3 for order in c.hash_orders) and len({*c.hash_orders}) == len(c.hash_orders),
        f"{shown('hash_orders')}: each must be at least 3, and no two the same",
    )


ROLES = ("embed", "table", "attn", "mlp", "gate", "other")


def _check_training(c: Config, relations: Relations) -> None:
    require, shown = relations.require, relations.shown
    relations.multiple("train_batch_tokens", "micro_tokens")
    relations.multiple("micro_tokens", "train_seq_len")
    require(
        re.fullmatch(r"(\d+:(0?\.\d+|1(\.0*)?)(, ?|$))*", c.context_schedule),
        f"{shown('context_schedule')}: expected LENGTH:SHARE,LENGTH:SHARE as in 1024:0.1,2048:0.7",
    )
    require(
        not c.late_qat_threshold or c.late_qat_threshold > c.min_lr,
        f"{shown('late_qat_threshold')} is never reached: {shown('min_lr')} stays",
    )
    require(
        not c.crown_q_lambda or c.min_lr < 0.5,
        f"{shown('crown_q_lambda')} never acts: {shown('min_lr')} stays",
    )
    shares = [until for _, until in c.context_rows]
    require(shares == sorted(set(shares)), f"{shown('context_schedule')}: its shares must rise")
    require(
        all(0 < length <= c.train_seq_len for length, _ in c.context_rows),
        f"{shown('context_schedule')}: lengths must be 1 to {shown('train_seq_len')}",
    )
    require(
        c.tokenizer_path == "byte260" or c.tokenizer_path.endswith(".model"),
        f"TOKENIZER_PATH={c.tokenizer_path!r}: expected a SentencePiece .model file or byte260",
    )
    require(c.beta1 < 1 and c.beta2 < 1, "BETA1 and BETA2 must be below 1")
    timed = c.mode in TRAINING_MODES and c.train_limit > 0
    require(
        not timed or c.gptq_reserve_seconds < c.max_wallclock_seconds,
        f"{shown('gptq_reserve_seconds')} must be below {shown('max_wallclock_seconds')}",
    )
    require(
        not timed or not c.gptq_n_samples or c.gptq_reserve_seconds > 0,
        f"{shown('gptq_n_samples')} takes training time: GPTQ_RESERVE_SECONDS must be above 0",
    )
    require(
        len(set(c.seeds)) == len(c.seeds) and all(0 <= seed < 2**63 for seed in c.seeds),
        f"{shown('seeds')}: expected different numbers from 0 on",
    )
    require(not c.seeds or not c.resume, "RESUME goes on with one run: not with SEEDS")
    require(
        not c.smoke or Path(c.data_path).name == "smoke_data",
        f"SMOKE=1 makes its own text: {shown('data_path')} does nothing",
    )
    policy = rf"(\s*(({'|'.join(ROLES)}):[2-8]|gate:16)\s*(,|$)|,)*"
    require(
        re.fullmatch(policy, c.quant_policy),
        f"{shown('quant_policy')}: expected role:bits with roles {', '.join(ROLES)}, 2 to 8 bits",
    )


def _check_scoring(c: Config, relations: Relations) -> None:
    require, shown = relations.require, relations.shown
    relations.at_most("eval_stride", "score_len")
    relations.at_most("ngram_stride", "score_len")
    if c.ttt_lora_rank:
        relations.at_most("ttt_lora_chunk", "score_len")
        relations.at_most("ttt_lora_rank", "model_dim")
        places = c.adapted_places
        require(
            set(places) <= set(ADAPTED_PLACES) and len(set(places)) == len(places),
            f"{shown('ttt_lora_on')}: expected some of {','.join(ADAPTED_PLACES)}, each once",
        )
        require(
            not c.ttt_freeze_blocks or places != ["head"],
            "TTT_FREEZE_BLOCKS chooses among layers: not with TTT_LORA_ON=head",
        )
        ends = [until for _, until in c.early_chunks]
        require(
            re.fullmatch(r"(\d+:\d+(,\d+:\d+)*)?", c.ttt_lora_early_chunks)
            and all(0 < size <= c.score_len and until for size, until in c.early_chunks)
            and ends == sorted(set(ends)),
            f"{shown('ttt_lora_early_chunks')}: expected size:until pairs, sizes from 1 to "
            f"{shown('score_len')}, until rising",
        )
    require(
        not c.ttt_before_scoring or c.ngram in ("", "mix"),
        f"TTT_BEFORE_SCORING=1 and {shown('ngram')} have no label together: take one",
    )
    relations.at_most("ngram_min_order", "ngram_order")
    relations.at_most("ttt_freeze_blocks", "num_layers")
    require(c.ngram_buckets.bit_count() == 1, f"{shown('ngram_buckets')} must be a power of two")
    require(
        c.ngram_primes and all(0 < prime < 2**32 for prime in c.ngram_primes),
        f"{shown('ngram_primes')}: expected numbers from 1 to 2^32 - 1",
    )
    require(c.ngram != "gated" or c.mixer_head, "NGRAM=gated needs MIXER_HEAD=1")
    width = c.eval_stream or 1
    require(
        c.ttt_chunk_tokens % width == 0 and c.mix_chunk_tokens % width == 0,
        "TTT_CHUNK_TOKENS and MIX_CHUNK_TOKENS must be multiples of EVAL_STREAM",
    )
    require(
        not c.ttt_lora_rank or (not c.ttt_epochs and c.ngram in ("", "mix")),
        "TTT_LORA_RANK goes neither with TTT_EPOCHS nor with a hashed NGRAM",
    )
    require(not c.tilt or not c.tilt_boost, "TILT and TILT_BOOST exclude each other")
    require(
        c.ngram != "mix" or not c.mixer_head or c.ngram_order <= 7,
        "NGRAM=mix with MIXER_HEAD needs NGRAM_ORDER <= 7",
    )


def relation_problems(cfg: Config, world: int) -> list[str]:
    """Complaints about settings that are right one by one and do not go together."""
    relations = Relations(cfg)
    _check_model(cfg, relations)
    _check_training(cfg, relations)
    _check_scoring(cfg, relations)
    if not relations.problems and cfg.mode in TRAINING_MODES:
        count = cfg.micro_batches
        sizes = ", ".join(str(size) for size in range(1, count + 1) if count % size == 0)
        relations.require(
            world > 0 and count % world == 0,
            f"WORLD_SIZE={world} must divide the {count} micro-batches of a step "
            f"(TRAIN_BATCH_TOKENS / MICRO_BATCH_TOKENS): possible are {sizes}",
        )
        relations.require(
            not cfg.gptq_n_samples or cfg.gptq_n_samples >= world,
            f"{relations.shown('gptq_n_samples')}: expected WORLD_SIZE={world} or more, or 0",
        )
    return relations.problems


def check_config(cfg: Config) -> list[str]:
    """All complaints about settings of one process, one sentence each."""
    return value_problems(cfg) or relation_problems(cfg, world=1)


def launched(env: Mapping[str, str], name: str, default: int = 0) -> int:
    """A number that the launcher of several processes sets."""
    text = env.get(name) or str(default)
    check(text.isdecimal(), f"{name}={printable(text)}: expected a whole number, as torchrun sets")
    return int(text)


def load_config(env: Mapping[str, str], artifact: Config | None = None) -> Config:
    """Default < artifact < file (CONFIG, or config.env by the script) < environment.

    InputError lists all problems. Without the artifact's settings, those of a mode that needs
    them are not yet checked against each other.
    """
    values, problems = read_settings(env, artifact)
    cfg = settled(filled(values, artifact))
    problems += value_problems(cfg)
    if not problems and (artifact or cfg.mode in TRAINING_MODES):
        problems = relation_problems(cfg, launched(env, "WORLD_SIZE", 1))
    raise_if(problems)
    return cfg


def as_typed(value: Any) -> str:
    """A setting's value as one would type it; a list is a tuple that went through JSON."""
    if isinstance(value, (tuple, list)):
        return ",".join(str(part) for part in value)
    return str(int(value) if isinstance(value, bool) else value)


def help_text() -> str:
    """One line a setting: name, default, meaning."""
    lines = [
        __doc__,
        "CONFIG=<file> names a file of NAME=value lines; the environment overrides it.",
    ]
    group = ""
    for name, field in FIELDS.items():
        meta = field.metadata
        if meta["group"] != group:
            group = meta["group"]
            lines += ["", f"[{group}]"]
        options = f" ({'|'.join(meta['choices'])})" if meta["choices"] else ""
        needs = f"; needs {meta['needs']}" if meta["needs"] else ""
        setting = f"{name}={as_typed(field.default)}".ljust(44)
        lines.append(f"{setting} {meta['doc']}{options}{needs}")
    return "\n".join(lines)


# ==================================================================================================
# 2. DEVICES - kinds of devices, processes, kernels and compilation are known here only.
#    Uses section 1.
# ==================================================================================================


@dataclasses.dataclass(frozen=True)
class DeviceProfile:
    """What differs by kind of device."""

    dtype: torch.dtype  # of the stream of activations; parameters are float32 everywhere
    lag: int  # the host reads a step's report so many steps later, so that the device never waits
    score_tokens: int  # tokens of a scoring batch; larger ones are not faster
    fixed_rows: bool  # another number of rows costs a compilation, or rounds otherwise

    @property
    def tolerance(self) -> float:
        """Nats by which a score may differ in a batch of another shape."""
        return 0.05 if self.dtype == torch.bfloat16 else 1e-4

    def in_format(self, wanted: str, compiles: bool = False) -> DeviceProfile:
        """With DTYPE's number format; auto is the profile's own."""
        dtype = self.dtype if wanted == "auto" else getattr(torch, wanted)
        fixed_rows = self.fixed_rows or compiles or dtype == torch.bfloat16
        return dataclasses.replace(self, dtype=dtype, fixed_rows=fixed_rows)


GPU_PROFILE = DeviceProfile(torch.bfloat16, lag=2, score_tokens=1 << 19, fixed_rows=True)
CPU_PROFILE = DeviceProfile(torch.float32, lag=0, score_tokens=1 << 14, fixed_rows=False)

NVIDIA_DEVICE = Path("/dev/nvidia0")

# Shapes, stages and parts that train make graphs of their own; torch ends a run at the ninth.
GRAPHS_OF_A_FUNCTION = 64

ATTENTION_BLOCK = 32  # queries

# Attention of queries [B, T, H, D] to keys and values [B, S, K, D] -> as the queries.
AttentionBackend = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention by torch, causal or masked. q [B, T, H, D]; k, v [B, S, K, D], K divides H -> as q.

    mask: bool, broadcast to [B, H, T, S]; true where a query may look.
    """
    q = q.transpose(1, 2)  # [B, H, T, D]
    k = k.transpose(1, 2)  # [B, K, S, D]
    v = v.transpose(1, 2)
    grouped = q.size(1) != k.size(1)
    causal = mask is None
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped)
    return out.transpose(1, 2)  # [B, T, H, D]


def blocked_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention in blocks of queries, each against all keys up to its own end.

    Compiled on a CPU it is faster than torch's for short rows of small heads: the query heads of a
    group stand side by side in one product, and what torch works out again for the backward pass
    is kept.
    """
    B, T, H, D = q.shape
    K = k.size(2)
    if T > 1024 or D > 64:
        return sdpa_attention(q, k, v)
    queries = (q * D**-0.5).view(B, T, K, -1, D).permute(0, 2, 3, 1, 4)  # [B, K, H / K, T, D]
    keys = k.permute(0, 2, 3, 1).flatten(0, 1)  # [B * K, D, T]
    values = v.transpose(1, 2).flatten(0, 1)  # [B * K, T, D]
    position = torch.arange(T, device=q.device)
    blocks = []
    for begin in range(0, T, ATTENTION_BLOCK):
        end = min(begin + ATTENTION_BLOCK, T)
        rows = queries[:, :, :, begin:end].reshape(B * K, -1, D)  # [B * K, H / K * C, D]
        later = position[:end] > position[begin:end].repeat(H // K).unsqueeze(1)
        scores = torch.bmm(rows, keys[:, :, :end]).float().masked_fill(later, -math.inf)
        block = torch.bmm(scores.softmax(-1).to(v.dtype), values[:, :end])
        blocks.append(block.view(B, K, H // K, end - begin, D))
    return torch.cat(blocks, 3).permute(0, 3, 1, 2, 4).reshape(q.shape)


@dataclasses.dataclass(frozen=True)
class Segments:
    """Pieces of one packed row [1, T]; attention stays inside each."""

    bounds: Tensor  # [S + 1] int32: where each begins, and the row's end; the last may be empty
    longest: int  # tokens at most
    position: Tensor  # [T] of each token in its piece
    # The pieces side by side, [S, longest]: for attention that knows no bounds, else empty.
    gather: Tensor  # [S * longest] the row's token at each place; behind a piece's end any
    scatter: Tensor  # [T] the place of each token

    def moved(self, move: Callable[[Tensor], Tensor]) -> Segments:
        """The same elsewhere: every tensor as `move` gives it."""
        tensors = {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}
        return dataclasses.replace(self, **{name: move(x) for name, x in tensors.items()})


SHORT_DOCUMENT = 512  # tokens; rows of longer ones on average have all the same number of pieces


def segments_of(
    starts: np.ndarray, length: int, longest: int, cut: int = 0, side_by_side: bool = True
) -> Segments:
    """The pieces of a row of so many tokens, from where they begin (0 first) -> on the CPU.

    Empty ones fill their number up, since another number is another graph: to what documents of 512
    tokens, cut at `cut` (0: at the longest), would need, twice that, ...
    """
    count = length // (cut or longest) + length // SHORT_DOCUMENT + 2
    while count < len(starts):
        count *= 2
    bounds = np.full(count + 1, length, np.int32)
    bounds[: len(starts)] = starts
    sizes = np.diff(bounds)
    number = np.repeat(np.arange(count), sizes)
    position = np.arange(length) - bounds[number]
    gather = scatter = np.empty(0, np.int64)
    if side_by_side:
        gather = np.minimum(bounds[:-1, None] + np.arange(longest), length - 1).reshape(-1)
        scatter = number * longest + position
    arrays = (bounds, position, gather, scatter)
    bounds, position, gather, scatter = (torch.from_numpy(array) for array in arrays)
    return Segments(bounds, longest, position, gather, scatter)


# Attention inside the pieces of a packed row: q [1, T, H, D], k and v [1, T, K, D] -> as q.
PackedBackend = Callable[[Tensor, Tensor, Tensor, Segments], Tensor]


def padded_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, attend: AttentionBackend = sdpa_attention
) -> Tensor:
    """By causal attention over the pieces side by side: what stands behind one, it never sees."""
    rows = [
        x.squeeze(0).index_select(0, segments.gather).view(-1, segments.longest, *x.shape[2:])
        for x in (q, k, v)
    ]
    out = attend(*rows)  # [S, longest, H, D]
    return out.flatten(0, 1).index_select(0, segments.scatter).unsqueeze(0)


def _with_bounds(kernel: Callable[..., Any], **options: Any) -> PackedBackend:
    """A kernel over rows without a batch axis [T, H, D], which takes bounds and longest twice."""

    def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        bounds, longest = segments.bounds, segments.longest
        rows = (x.squeeze(0) for x in (q, k, v))
        out = kernel(*rows, bounds, bounds, longest, longest, **options)
        return (out[0] if isinstance(out, tuple) else out).unsqueeze(0)

    return attend


def fa3_packed_attention() -> PackedBackend:
    """FlashAttention 3 with bounds; ImportError where there is none."""
    from flash_attn_interface import flash_attn_varlen_func

    return _with_bounds(flash_attn_varlen_func, causal=True)


def torch_packed_attention() -> PackedBackend:
    """Torch's own attention with bounds; ImportError where there is none."""
    from torch.nn.attention.varlen import varlen_attn

    # 2.13 wants to be told that key heads are fewer; 2.11 takes them as they are.
    parameters = inspect.signature(varlen_attn).parameters
    options = {"enable_gqa": True} if "enable_gqa" in parameters else {}
    return _with_bounds(varlen_attn, window_size=(-1, 0), **options)


def fa3_attention() -> AttentionBackend:
    """FlashAttention 3; ImportError where there is none."""
    # Optional by design: only Hopper images have it.
    from flash_attn_interface import flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_func(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out  # releases differ in what they return

    return attend


def probe_attention(
    attend: AttentionBackend,
    cfg: Config,
    device: torch.device,
    compile: Callable[[Callable], Callable],
    shape: tuple[int, int] = (2, 128),
    expected: AttentionBackend = sdpa_attention,
) -> None:
    """A forward and a backward pass at the run's own heads, compiled as they will be.

    Raises whatever goes wrong, and a RuntimeError if the outcome is not that of torch's attention.
    Older releases of FlashAttention 3 work forward, or alone, but not inside a compiled graph.
    """
    sizes = [(*shape, heads, cfg.head_dim) for heads in (cfg.num_heads, cfg.num_kv_heads)]
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(sizes[place], generator=generator) for place in (0, 1, 1, 0)]
    *inputs, weights = (x.to(device, torch.bfloat16) for x in drawn)
    found = []
    for function in (compile(attend), expected):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*leaves)
        found.append([out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)])
    gap = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*found))
    if not gap < 0.05:  # kernels of bfloat16 differ by a hundredth
        raise RuntimeError(f"off by {gap:.1%} from torch's attention")


# For work outside torch: torchrun lets torch itself use one.
PROCESSORS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

# Options of glibc's mallopt.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3


def keep_freed_memory() -> None:
    """Tells glibc to keep large blocks that are freed.

    It would return them to the system at once, and the next tensor would page-fault again: the
    training loss is then four times slower. Without effect on other C libraries.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt:
            mallopt(M_MMAP_THRESHOLD, 1 << 30)
            mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


NO_FLOAT64 = ("mps",)  # kinds of devices without that format


def cpu_has_bfloat16() -> bool:
    """Whether the CPU has instructions for products in bfloat16, as oneDNN sees it."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class PendingSum:
    """Sums over all processes that are on their way to the host."""

    def __init__(self, sums: Tensor, asynchronous: bool):
        self.host = sums
        self.done = None
        if asynchronous:
            self.host = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True)
            self.done = torch.cuda.Event()
            self.host.copy_(sums, non_blocking=True)
            self.done.record()

    def result(self) -> list[float]:
        """The numbers; waits until the device has worked up to them."""
        if self.done:
            self.done.synchronize()
        return self.host.tolist()


class Runtime:
    """Where the program runs: device, number of processes (world), number format, kernels."""

    def __init__(self, cfg: Config, env: Mapping[str, str], knows_model: bool = True):
        """knows_model: cfg is the model's own; if not, choose_attention is called when it is."""
        self.rank = launched(env, "RANK")
        self.world = launched(env, "WORLD_SIZE", 1)
        self.local_rank = launched(env, "LOCAL_RANK", self.rank)
        self.local_world = launched(env, "LOCAL_WORLD_SIZE", self.world)  # on this machine
        self.by_agent = "TORCHELASTIC_RUN_ID" in env  # torchrun's, which may start a run again
        self.restarts = launched(env, "TORCHELASTIC_RESTART_COUNT")
        check(self.rank < self.world, f"RANK={self.rank}, but WORLD_SIZE={self.world}")
        kind = self._pick_device(cfg.device)
        self.cuda = kind == "cuda"
        self.device = torch.device(kind)
        if self.cuda:
            found = torch.cuda.device_count()
            check(
                self.local_rank < found,
                f"LOCAL_RANK={self.local_rank}: this machine has {found} GPUs; "
                f"--nproc_per_node may be {found} at most",
            )
            self.device = torch.device(kind, self.local_rank)
        self.compiles = cfg.compile == "1" or (cfg.compile == "auto" and self.cuda)
        profile = GPU_PROFILE if self.cuda else CPU_PROFILE
        self.profile = profile.in_format(cfg.dtype, self.compiles)
        compute = str(self.profile.dtype).removeprefix("torch.")
        self.notes = [f"device:{self.device_name()} compute:{compute} world_size:{self.world}"]
        self.emulates = kind == "cpu" and compute == "bfloat16" and not cpu_has_bfloat16()
        if self.emulates:
            self.notes.append(
                "WARNING: DTYPE=bfloat16: emulated on this CPU, and many times slower"
            )
        self._prepare_device()
        if knows_model:
            self.choose_attention(cfg)
        self.complete = True  # no process is known to have failed alone
        self._owns_group = self.world > 1 and not dist.is_initialized()
        if self._owns_group:
            store, _, _ = next(dist.rendezvous("env://", self.rank, self.world))
            dist.init_process_group(
                "nccl" if self.cuda else "gloo",
                # After a restart torchrun's store still has the addresses of the dead processes.
                store=dist.PrefixStore(f"start_{self.restarts}", store),
                rank=self.rank,
                world_size=self.world,
                timeout=datetime.timedelta(minutes=60),
                device_id=self.device if self.cuda else None,
            )

    def _pick_device(self, wanted: str) -> str:
        there = {"cuda": torch.cuda, "mps": torch.backends.mps, "cpu": torch.cpu}
        available = [name for name, kind in there.items() if kind.is_available()]
        if wanted == "auto":
            check(
                available[0] != "cpu" or not NVIDIA_DEVICE.exists(),
                "DEVICE=auto: this machine has an NVIDIA GPU that torch cannot use (is its "
                f"driver older than CUDA {torch.version.cuda}?); DEVICE=cpu computes on the CPU",
            )
            return available[0]
        found = ", ".join(available)
        check(wanted in available, f"DEVICE={wanted}: torch finds none here; available: {found}")
        return wanted

    def _prepare_device(self) -> None:
        if self.cuda:
            torch.cuda.set_device(self.device)
            exact = self.profile.dtype == torch.float32
            torch.set_float32_matmul_precision("highest" if exact else "high")
            torch.backends.cuda.enable_cudnn_sdp(False)  # it makes a plan for every new length
            # Packing works on the host, and torchrun gives every process one thread.
            torch.set_num_threads(max(1, min(16, PROCESSORS // self.local_world)))
            keep_freed_memory()
        elif self.device.type == "cpu":
            torch.set_deterministic_debug_mode("error")  # the other name of it imports a compiler
            torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid, and slow
            keep_freed_memory()

    def choose_attention(self, cfg: Config) -> None:
        """The kernels that work here at the model's own heads; InputError if a needed one fails."""
        self.attention = self._pick_attention(cfg)
        self.packed_attention: PackedBackend = padded_attention
        masks = cfg.mode == "train" and cfg.train_doc_mask
        if masks or (cfg.mode in ("train", "eval") and cfg.ttt_global_docs):
            self.packed_attention = self._pick_packed_attention(cfg)

    def _pick_attention(self, cfg: Config) -> AttentionBackend:
        wanted = cfg.attn
        reason = (
            "ATTN=sdpa" if wanted == "sdpa" else "FlashAttention 3 needs CUDA and DTYPE=bfloat16"
        )
        if wanted != "sdpa" and self.cuda and self.profile.dtype == torch.bfloat16:
            try:
                attend = fa3_attention()
                probe_attention(attend, cfg, self.device, self.compile)
                self.notes.append("attention:fa3 (equals sdpa forward and backward)")
                return attend
            except Exception as error:  # any failure of a foreign kernel means: not here
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
        problem = f"FlashAttention 3 does not run here ({reason})"
        check(wanted != "fa3", f"ATTN=fa3: {problem}; allowed: auto, sdpa")
        faster = self.device.type == "cpu" and self.compiles and not self.emulates
        if wanted == "auto" and faster:
            self.notes.append("attention:blocks (compiled on a CPU: faster than sdpa)")
            return blocked_attention
        self.notes.append(f"attention:sdpa ({reason})")
        return sdpa_attention

    def _pick_packed_attention(self, cfg: Config) -> PackedBackend:
        if self.pads_documents:
            return functools.partial(padded_attention, attend=self.attention)
        segments = self.put_segments(segments_of(np.array([0, 100, 228]), 256, 128))
        expected = functools.partial(padded_attention, segments=segments)
        kinds = {"fa3": fa3_packed_attention, "varlen": torch_packed_attention}
        kinds.pop({"sdpa": "fa3", "fa3": "varlen"}.get(cfg.attn), None)
        reasons = []
        for name, make in kinds.items():
            try:
                attend = make()
                probed = functools.partial(attend, segments=segments)
                probe_attention(probed, cfg, self.device, self.compile, (1, 256), expected)
                self.notes.append(f"attention inside documents:{name}")
                return attend
            except Exception as error:  # any failure of a foreign kernel means: not here
                reasons.append(f"{name}: {type(error).__name__}: {error}".splitlines()[0])
        raise InputError(
            "TRAIN_DOC_MASK, TTT_GLOBAL_DOCS: no attention with document bounds works on this GPU "
            f"(ATTN={cfg.attn}; {'; '.join(reasons)}); both at 0 need none"
        )

    @property
    def pads_documents(self) -> bool:
        """Whether pieces of a packed row stand side by side: only CUDA's bfloat16 has bounds."""
        return not self.cuda or self.profile.dtype != torch.bfloat16

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def device_name(self) -> str:
        """The GPU's or the CPU's name."""
        if self.cuda:
            return torch.cuda.get_device_name(self.device)
        name = platform.machine()
        cpuinfo = Path("/proc/cpuinfo")
        if cpuinfo.is_file():
            found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())
            name = found[1] if found else name
        return f"{name} ({torch.get_num_threads()} threads)"

    def compile(self, function: Callable) -> Callable:
        """The function compiled as one graph of fixed shapes, if compilation is on."""
        if not self.compiles:
            return function
        torch._dynamo.config.recompile_limit = GRAPHS_OF_A_FUNCTION
        return torch.compile(function, dynamic=False, fullgraph=True)

    def mark_varying(self, axis: int, *tensors: Tensor) -> None:
        """Compiled functions shall take any length of this axis, in one graph (1 has its own)."""
        for tensor in tensors:
            if self.compiles and tensor.size(axis) > 1:
                torch._dynamo.mark_dynamic(tensor, axis)

    def sync(self) -> None:
        """Waits until the device has done all that it was given."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def put(self, array: np.ndarray) -> Tensor:
        """A host array as a tensor on the device; the copy does not block the host."""
        tensor = torch.from_numpy(array)
        if self.cuda:
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=self.cuda)

    def uniform(self, generator: torch.Generator, *shape: int) -> Tensor:
        """Numbers in [0, 1) from a generator of the CPU: the same on every device."""
        return torch.rand(*shape, generator=generator).to(self.device)

    def put_segments(self, segments: Segments) -> Segments:
        """On the device."""
        return segments.moved(lambda x: self.put(x.numpy()))

    def sum_(self, tensor: Tensor) -> Tensor:
        """The tensor's sum over all processes, in place."""
        if self.world == 1:
            return tensor
        there = tensor.to(self.device)
        dist.all_reduce(there)
        return tensor if there is tensor else tensor.copy_(there)

    def start_sum(self, values: Sequence[float | Tensor]) -> PendingSum:
        """The sum over processes of a few numbers; on CUDA only its result() waits for it."""
        numbers = [torch.as_tensor(value, dtype=torch.float32).detach() for value in values]
        there = [number.to(self.device, non_blocking=True) for number in numbers]
        return PendingSum(self.sum_(torch.stack(there)), asynchronous=self.cuda)

    def map_shares(self, function: Callable[[Tensor], Tensor], stack: Tensor) -> Tensor:
        """function(stack) for a stack [N, ...] of independent parts -> [N, ...].

        Each process works on its share, in the profile's number format; the result does not depend
        on their number.
        """
        share = -(-stack.size(0) // self.world)
        missing = share * self.world - stack.size(0)
        if missing:
            stack = torch.cat((stack, stack.new_zeros(missing, *stack.shape[1:])))
        mine = stack.narrow(0, self.rank * share, share).to(self.profile.dtype)
        done = function(mine)
        if self.world > 1:
            out = done.new_empty(stack.shape)
            # The first name is torch 2.13's, which warns of the second.
            gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
            gather(out, done.contiguous())
            done = out.narrow(0, 0, stack.size(0) - missing)
        return done

    def broadcast_bytes(self, blob: bytes | None) -> bytes:
        """Rank 0's bytes on every process: nodes need no shared disk."""
        box = [blob]
        if self.world > 1:
            dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, text: str) -> list[str]:
        """The texts of all processes, by rank."""
        told = [text] * self.world
        if self.world > 1:
            dist.all_gather_object(told, text)
        return told

    def agree(self, problem: str) -> None:
        """Raises an AgreedError on every process if one of them has a problem (others: empty)."""
        for rank, text in enumerate(self.gather(problem)):
            if text:
                raise AgreedError(text if self.world == 1 else f"process {rank}: {text}")

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What cannot be read or written by one process in the block ends all, with its reason.

        The block makes no calls that others wait for.
        """
        problem = ""
        try:
            yield
        except (InputError, OSError) as error:
            problem = str(error) or type(error).__name__
        self.agree(problem)

    def once_a_machine(self, make: Callable[[], Iterable[np.ndarray]]) -> Sequence[np.ndarray]:
        """make()'s arrays, which one process of each machine makes; all map its files, read-only.

        Each process would need gigabytes and the processors of all. The files are in TMPDIR; where
        they cannot be written, every process does make the arrays.
        """
        if self.local_world == 1:
            return list(make())
        try:
            with self._shared_folder() as folder:
                with self.together():
                    arrays = make() if self.local_rank == 0 else ()
                    for number, array in enumerate(arrays):
                        np.save(f"{folder}/{number:03}.npy", array)
                with self.together():
                    paths = sorted(Path(folder).glob("*.npy"))
                    return [np.load(path, mmap_mode="r").view(np.ndarray) for path in paths]
        except AgreedError as error:
            if self.main:
                print(f"WARNING: {error} (TMPDIR); every process counts", file=sys.stderr)
            return list(make())

    @contextlib.contextmanager
    def _shared_folder(self) -> Iterator[str]:
        """A folder of this machine's first process, which removes it."""
        folder = ""
        with contextlib.ExitStack() as held:
            with self.together():
                if self.local_rank == 0:
                    new = tempfile.TemporaryDirectory("", "train_gpt_", ignore_cleanup_errors=True)
                    folder = held.enter_context(new)
            yield self.gather(folder)[self.rank - self.local_rank]

    def highest(self, number: int) -> int:
        """The highest of the processes' numbers, once all are here."""
        return max(map(int, self.gather(str(int(number)))))

    def peak_memory(self) -> int:
        """Peak bytes allocated on the GPU, or peak resident bytes of the process."""
        if self.cuda:
            return torch.cuda.max_memory_allocated(self.device)
        with contextlib.suppress(ImportError):
            from resource import RUSAGE_SELF, getrusage  # absent on Windows

            unit = 1 if sys.platform == "darwin" else 1024
            return getrusage(RUSAGE_SELF).ru_maxrss * unit
        return 0

    def close(self) -> None:
        """Leaves the group of processes. On CUDA that waits for all: one that failed just ends."""
        if self._owns_group and (self.complete or not self.cuda):
            dist.destroy_process_group()


# ==================================================================================================
# 3. RUN LOG - the log, the metrics, the result, and where every second went.
#    Uses sections 1-2.
# ==================================================================================================

# The phases that count against MAX_WALLCLOCK_SECONDS and MAX_EVAL_SECONDS.
TRAIN_PHASES = ("train", "calibrate")
EVAL_PHASES = ("unpack", "plain", "sliding", "streaming", "ttt", "mixed", "ngram")


def atomic_write(path: Path, data: bytes) -> None:
    """Writes the whole file or nothing: a temporary name in the same folder, then a rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_bytes(data)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def save_torch(path: Path, state: Any) -> None:
    """torch.save, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    atomic_write(path, buffer.getvalue())


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One run at a time in a folder: the lock ends with the process, however that ends."""
    with input_error_from(f"OUT_DIR={str(folder)!r}: cannot be used", OSError):
        folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError):
            import fcntl  # absent on Windows

            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"OUT_DIR={str(folder)!r}: another run is writing there") from None
            except OSError:  # some network disks know no locks
                pass
        yield


def as_json(value: Any, **layout: Any) -> str:
    """JSON as the standard has it: what is no finite number becomes null."""

    def finite(part: Any) -> Any:
        if isinstance(part, dict):
            return {name: finite(inner) for name, inner in part.items()}
        if isinstance(part, (list, tuple)):
            return [finite(inner) for inner in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(finite(value), allow_nan=False, **layout)


Progress = Callable[[float], None]  # told what share of a piece of work is done


def unseen(done: float) -> None:
    """Progress that nobody looks at."""


class RunLog:
    """train.log, metrics.jsonl, result.json and the seconds of each phase, in one folder.

    Only rank 0 writes; the others keep the same seconds. A resumed run appends to what is there.
    What cannot be written is a warning: a full disk shall not end a run.
    """

    def __init__(self, out_dir: Path, rt: Runtime, resumed: bool = False, silent: bool = False):
        self.out_dir = out_dir
        self.writes = rt.main and not silent
        self.seconds: dict[str, float] = {}  # of each phase, without those inside it
        self.began: dict[str, float] = {}  # each phase's first second
        self.result: dict[str, Any] = {
            "status": "started",
            "stages": {},
            "phases_began": self.began,
        }
        self.unwritten: dict[str, str] = {}  # file -> why something is missing in it
        self.start = time.perf_counter()
        self._inner = 0.0  # seconds booked by phases inside the present one
        self._last_progress = self.start
        if self.writes:
            out_dir.mkdir(parents=True, exist_ok=True)
            for draft in out_dir.glob(".*.tmp"):  # of a run that was killed
                draft.unlink()
            if not resumed:
                (out_dir / "train.log").write_text("")
                (out_dir / "metrics.jsonl").write_text("")

    @contextlib.contextmanager
    def optional(self, name: str) -> Iterator[None]:
        """Writing a file that the run does not depend on: a failure is said once."""
        try:
            yield
        except OSError as error:
            if name not in self.unwritten:
                self.unwritten[name] = error.strerror or str(error)
                place = self.out_dir / name
                self._show(f"WARNING: {place}: cannot be written ({self.unwritten[name]})")

    def _show(self, line: str, end: str = "\n") -> None:
        """Prints a line; on a terminal in place of the progress that stands there."""
        start = "\r\033[K" if sys.stdout.isatty() else ""
        try:
            print(start + line, end=end, flush=True)
        except OSError:  # the reader of a pipe has gone, or its disk is full
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def _append(self, name: str, line: str) -> None:
        if self.writes:
            with self.optional(name), open(self.out_dir / name, "a", encoding="utf-8") as file:
                file.write(line + "\n")

    def log(self, line: str, show: bool = True) -> None:
        """A line of train.log, and of the terminal if show."""
        if self.writes and show:
            self._show(line)
        self._append("train.log", line)

    def metric(self, **values: Any) -> None:
        """A line of metrics.jsonl."""
        self._append("metrics.jsonl", as_json(values))

    def show_progress(self, line: str, since: float = 0.0, done: float = 0.0) -> None:
        """One rewritten line on a terminal; elsewhere a line every ten seconds.

        since: when the work began (time.perf_counter); with the share of it that is done, the line
        says how long the rest takes.
        """
        if done:
            left = (time.perf_counter() - since) * max(0.0, 1 / done - 1)
            line += f" {100 * done:.0f}% eta:{left:.0f}s"
        if self.writes and sys.stdout.isatty():
            self._show(line, end="")
        elif time.perf_counter() - self._last_progress > 10:
            self._last_progress = time.perf_counter()
            self.log(line)

    def identify(self, identity: Callable[..., tuple[dict[str, Any], str]], *data: Any) -> None:
        """Logs and keeps what tells data apart: identity(*data) -> fields of result, log line."""
        if self.writes:  # one process reads the files
            fields, line = identity(*data)
            self.result.setdefault("data", {}).update(fields)
            self.log(line)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[Progress]:
        """Books the block's seconds under a name, without what inner phases booked -> progress."""
        outer = self._inner
        self._inner = 0.0
        start = time.perf_counter()
        self.began.setdefault(name, round(start - self.start, 3))
        try:
            yield functools.partial(self.show_progress, f"{name}:", start)
        finally:
            whole = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + whole - self._inner
            self._inner = outer + whole

    def booked(self, phases: Sequence[str]) -> float:
        """Seconds of these phases so far: TRAIN_PHASES, or EVAL_PHASES."""
        return sum(self.seconds.get(name, 0.0) for name in phases)

    def save(self, **fields: Any) -> None:
        """Merges fields into result.json, with the seconds so far."""
        wall = time.perf_counter() - self.start
        seconds = {
            **self.seconds,
            "other": wall - sum(self.seconds.values()),
            "wall": wall,
            "train_side": self.booked(TRAIN_PHASES),
            "eval_side": self.booked(EVAL_PHASES),
        }
        self.result.update(fields)
        self.result["seconds"] = {name: round(value, 3) for name, value in seconds.items()}
        if self.writes:
            text = as_json(self.result, indent=1) + "\n"
            with self.optional("result.json"):
                atomic_write(self.out_dir / "result.json", text.encode())


# ==================================================================================================
# 4. DATA - shards, the token stream, batches, and how many bytes a token stands for.
#    Uses sections 1-3.
# ==================================================================================================

# A shard (upstream's format): 256 little-endian int32 (magic, version, token count, zeros), then
# the tokens as uint16.
SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER_BYTES = 1024


def read_shard(path: str | Path) -> np.ndarray:
    """Tokens of a .bin shard as a read-only uint16 memory map; InputError names file and fault."""
    name = printable(path, 300)
    with input_error_from(f"{name}: cannot be read", OSError):
        size = os.stat(path).st_size
        check(os.path.isfile(path), f"{name}: not a regular file")
        with open(path, "rb") as file:
            header = file.read(SHARD_HEADER_BYTES)
    check(
        len(header) == SHARD_HEADER_BYTES,
        f"{name}: {size} bytes, shorter than the header of a shard",
    )
    magic, version, count = struct.unpack("<3i", header[:12])
    check(
        magic == SHARD_MAGIC and version == SHARD_VERSION,
        f"{name}: magic {magic}, version {version}; expected {SHARD_MAGIC}, {SHARD_VERSION}",
    )
    needed = SHARD_HEADER_BYTES + 2 * count
    check(
        count > 0 and size == needed,
        f"{name}: {size} bytes; the header's {count} tokens need {needed}",
    )
    return np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES, shape=(count,))


def shard_header(count: int) -> bytes:
    """The first bytes of a shard of so many tokens."""
    return struct.pack("<3i", SHARD_MAGIC, SHARD_VERSION, count).ljust(SHARD_HEADER_BYTES, b"\0")


def write_shard(path: str | Path, tokens: np.ndarray) -> None:
    """Writes tokens (integers below 65,536) as a shard, whole or not at all."""
    check(
        tokens.size and tokens.min() >= 0 and tokens.max() < 2**16,
        f"{path}: a shard needs at least one token, all between 0 and 65535",
    )
    atomic_write(Path(path), shard_header(tokens.size) + tokens.astype("<u2").tobytes())


def find_path(text: str) -> Path:
    """A relative path as seen from the working folder, else from the script's or any above it."""
    for base in (Path.cwd(), *SCRIPT.parents):
        if (base / text).exists():
            return base / text
    searched = f"not found from {Path.cwd()}, nor from {SCRIPT.parent} up"
    raise InputError(f"{printable(text, 300)}: {searched}; {how_to_get(text)}")


def how_to_get(text: str) -> str:
    """What makes the data or the tokenizer of that name."""
    text = text.replace("_lossless_caps_caseops_v1_reserved", "_caseops")
    variant = re.search(r"fineweb10B_(\w+)", text)
    pieces = re.search(r"fineweb_(\d+)_bpe(_caseops|)", text)
    if "sotu_sp1024" in text:
        return "python data/prepare.py demo makes it"
    if variant or pieces:
        name = variant[1] if variant else f"sp{pieces[1]}{pieces[2]}"
        return f"python data/prepare.py fineweb --variant {name} fetches it"
    return "see data/README.md"


CHARGES = "val_bytes"  # the split of the byte side file: bytes of each validation token


def shard_name(split: str, number: int | None = None) -> str:
    """The file name of a split's shard; without a number, the pattern of all (of both: split *)."""
    return f"fineweb_{split}_{'*' if number is None else f'{number:06d}'}.bin"


def shards_in(folder: Path, split: str) -> list[Path]:
    """The files of a split (train, val or val_bytes) in a folder, in order of name."""
    paths = sorted(folder.glob(shard_name(split)))
    others = shard_name(CHARGES).split("*")[0]  # which the pattern of val fits, too
    return [path for path in paths if split == CHARGES or not path.name.startswith(others)]


def shard_paths(cfg: Config, split: str) -> list[Path]:
    """The shards of a split (train or val), in order of name; at least one."""
    folder = find_path(cfg.data_path)
    paths = shards_in(folder, split)
    check(paths, f"DATA_PATH={cfg.data_path!r}: no {shard_name(split)} in {folder}")
    return paths


def sha256(path: Path) -> str:
    """A file's SHA-256 in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_tokens(tokens: np.ndarray, path: Path, vocab_size: int) -> None:
    """InputError unless a shard's tokens are in the vocabulary."""
    found = f"token {tokens.max()}, but VOCAB_SIZE={vocab_size}"
    check(tokens.max() < vocab_size, f"{printable(path, 300)}: {found}")


class TokenStream:
    """The training tokens as one endless stream: shards in order of name, then again."""

    def __init__(self, paths: Sequence[Path], cfg: Config):
        self.paths = list(paths)
        self.vocab_size = cfg.vocab_size
        self.row = cfg.row_tokens
        self.micro_tokens = cfg.micro_tokens
        self.shards = [read_shard(path) for path in self.paths]
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        self.total = int(self.ends[-1])

    def take(self, start: int, count: int) -> np.ndarray:
        """Tokens start .. start + count - 1 of the stream -> int64 [count]."""
        parts = []
        while count > 0:
            at = start % self.total
            index = int(np.searchsorted(self.ends, at, side="right"))
            shard = self.shards[index]
            first = len(shard) - int(self.ends[index]) + at
            part = shard[first : first + count].astype(np.int64)
            if part.max() >= self.vocab_size:
                check_tokens(part, self.paths[index], self.vocab_size)
            parts.append(part)
            start += len(part)
            count -= len(part)
        return np.concatenate(parts)

    def batch(self, unit: int) -> tuple[np.ndarray, np.ndarray]:
        """Micro-batch number `unit`, counted over steps and processes -> ids, targets [B, T].

        Every unit has a span of tokens of its own.
        """
        size = self.micro_tokens + 1
        span = self.take(unit * size, size)
        return span[:-1].reshape(-1, self.row), span[1:].reshape(-1, self.row)


class Prefetcher:
    """Batches by number, the next one read by a thread while the device works."""

    def __init__(self, read: Callable[[int], Any], stride: int, pool: ThreadPoolExecutor):
        self.read = read
        self.stride = stride  # from one number to the next that this process asks for
        self.pool = pool
        self.ahead: dict[int, Future] = {}

    def __call__(self, number: int) -> Any:
        """What `read` gives for the number; its exception, too."""
        ahead = self.ahead.pop(number, None)
        found = self.read(number) if ahead is None else ahead.result()
        following = number + self.stride
        self.ahead = {following: self.pool.submit(self.read, following)}
        return found


def document_starts(ids: np.ndarray, bos: int) -> np.ndarray:
    """Where the documents of a row [T] begin; the first does at 0, whatever token stands there."""
    return np.union1d([0], np.flatnonzero(ids == bos))


def segment_starts(ids: np.ndarray, bos: int, longest: int) -> np.ndarray:
    """Where the segments of a row [T] begin: at documents, and every `longest` tokens of one."""
    documents = document_starts(ids, bos)
    pieces = -(-np.diff(documents, append=len(ids)) // longest)
    first = np.cumsum(pieces) - pieces  # number of each document's first piece
    number = np.arange(pieces.sum()) - np.repeat(first, pieces)
    return np.repeat(documents, pieces) + number * longest


def load_validation(cfg: Config) -> np.ndarray:
    """All validation tokens (uint16), or the first VAL_TOKENS + 1."""
    paths = shard_paths(cfg, "val")
    shards = [read_shard(path) for path in paths]
    for path, shard in zip(paths, shards):
        check_tokens(shard, path, cfg.vocab_size)
    tokens = np.concatenate(shards)
    if cfg.val_tokens:
        tokens = tokens[: cfg.val_tokens + 1]
    check(
        len(tokens) > 1, f"{printable(paths[0], 300)}: one validation token only; scoring needs two"
    )
    return tokens


# --- capital letters as markers: text in small letters, and the exact way back --------------------

TITLE = "\ue001"  # the next letter is a capital
ALLCAPS = "\ue002"  # all letters of the next run are
CAPNEXT = "\ue003"  # the next letter is, inside a run
ESCAPE = "\ue004"  # the next character is text, although it looks like a marker
CASE_MARKERS = TITLE + ALLCAPS + CAPNEXT + ESCAPE
MARKER_BYTES = len(TITLE.encode())

# A run of ASCII letters that begins with a capital. To look back from its first letter keeps the
# search fast, and long texts of one character linear.
_RUN = "[A-Z](?<![A-Za-z].)[A-Za-z]*"
# What a transform rewrites: such a run, with the white space that the marker jumps over; a capital
# inside a run, or a literal marker.
CASE_TRANSFORMS = {
    "caseops": re.compile(f"({_RUN})|[A-Z{CASE_MARKERS}]", re.DOTALL),
    "case2": re.compile(rf"(\s(?<!\s\s)\s*[A-Z][A-Za-z]*|{_RUN})|[A-Z{CASE_MARKERS}]", re.DOTALL),
}
_INNER_CAPITALS = {ord(c): CAPNEXT + c.lower() for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"}
_MARKED = re.compile(
    rf"{ESCAPE}(.)|[{TITLE}{CAPNEXT}](\s*[a-z])|{ALLCAPS}(\s*[a-z]+)|[{CASE_MARKERS}]", re.DOTALL
)


def mark_case(text: str, transform: str) -> str:
    """A text in small ASCII letters and markers, from which `restore_case` gives it back.

    caseops (PR 1729 of openai/parameter-golf): a run of letters with one capital in front gets
    TITLE, one of two or more capitals ALLCAPS, all other capitals CAPNEXT; ESCAPE comes before
    characters of the text that are markers. case2: TITLE and ALLCAPS stand before the white space
    in front of the run, whatever it is (spaces, line ends), so that " The" has the piece of " the".
    """
    return CASE_TRANSFORMS[transform].sub(_with_markers, text)


def _with_markers(found: re.Match[str]) -> str:
    text = found[0]
    if found[1] is None:
        return ESCAPE + text if text in CASE_MARKERS else CAPNEXT + text.lower()
    run = text.lstrip()
    space = text[: len(text) - len(run)]
    if len(run) > 1 and run.isupper():
        return ALLCAPS + space + run.lower()
    return TITLE + space + run[0].lower() + run[1:].translate(_INNER_CAPITALS)


def restore_case(text: str) -> str:
    """The text that either transform was made from.

    A marker that stands before nothing that it could act on, as a model may write it, is dropped.
    """
    return _MARKED.sub(_with_capitals, text)


def _with_capitals(found: re.Match[str]) -> str:
    escaped, *capitals = found.groups("")
    return escaped or "".join(capitals).upper()


# --- how many bytes of text a token stands for ----------------------------------------------------

WORD_MARK = "\u2581"  # SentencePiece's sign for a space before a word


def marks_spaces(sp: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether U+2581 stands for a space; else it is a character like others."""
    return WORD_MARK in sp.normalize("a b")


class ByteTable:
    """How many bytes of text each token stands for (upstream's rule).

    A token counts the UTF-8 bytes of its piece, a word mark in it one byte as the space that it
    stands for; a mark in front counts nothing after a control, unknown or unused token. Those count
    nothing themselves, byte pieces count one. A case marker counts nothing, unless it is text: then
    ESCAPE comes before it.
    """

    def __init__(
        self,
        sizes: np.ndarray,
        marked: np.ndarray,
        boundary: np.ndarray,
        name: str,
        processor: sentencepiece.SentencePieceProcessor | None = None,
        markers: Sequence[int] = (),
        transform: str = "",
    ):
        self.sizes = sizes  # [V] int16, bytes without the mark
        self.marked = marked  # [V] bool, the piece begins with a mark
        self.boundary = boundary  # [V] bool, control, unknown or unused
        self.name = name
        self.processor = processor
        self.markers = list(markers)  # the tokens of CASE_MARKERS, if its text has them
        self.transform = transform  # that its text goes through; empty = none, or not known
        self.vocab_size = len(sizes)

    @classmethod
    def from_sentencepiece(cls, path: str | Path, transform: str = "") -> ByteTable:
        """The table of a SentencePiece model file; InputError if it is none.

        transform: what text goes through before it is encoded, one of CASE_TRANSFORMS.
        """
        check(Path(path).is_file(), f"{path}: no such tokenizer file")
        unusable = (RuntimeError, OSError, UnicodeDecodeError)
        with input_error_from(f"{path}: not a SentencePiece model", *unusable):
            sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
            ids = range(sp.vocab_size())
            pieces = [sp.id_to_piece(i) for i in ids]
        boundary = [sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in ids]
        marked = [pieces[i].startswith(WORD_MARK) and not boundary[i] for i in ids]
        words = {pieces[i] for i in ids if not boundary[i]}
        spells_marks = WORD_MARK not in words and {"<0xE2>", "<0x96>", "<0x81>"} <= words
        check(
            not spells_marks or not marks_spaces(sp),
            f"{path}: no piece for the word mark U+2581; a space would be spelled in three bytes, "
            "and charged as three",
        )
        marked_case = words.issuperset(CASE_MARKERS)
        markers = [sp.piece_to_id(marker) for marker in CASE_MARKERS if marked_case]
        check(
            markers or not transform,
            f"{path}: no pieces for the case markers U+E001 to U+E004, so that {transform} text is "
            "none of its",
        )
        sizes = np.zeros(len(ids), dtype=np.int16)
        for i in ids:
            if sp.is_byte(i):
                sizes[i] = 1
            elif not boundary[i] and i not in markers:
                sizes[i] = len(pieces[i].removeprefix(WORD_MARK).replace(WORD_MARK, " ").encode())
        name = Path(path).name
        return cls(sizes, np.array(marked), np.array(boundary), name, sp, markers, transform)

    @classmethod
    def bytes260(cls) -> ByteTable:
        """The byte-level vocabulary.

        0 pad, 1 document start, 2 document end, 3 unknown, b + 4 is byte b.
        """
        boundary = np.arange(260) < 4
        return cls((~boundary).astype(np.int16), np.zeros(260, bool), boundary, "byte260")

    @classmethod
    def named(cls, cfg: Config, recorded: str = "") -> ByteTable:
        """The table that TOKENIZER_PATH names; InputError if it does not fit the settings.

        recorded: the case transform that the manifest says.
        """
        if cfg.tokenizer_path == "byte260":
            check(not cfg.case_transform, "CASE_TRANSFORM cannot act with TOKENIZER_PATH=byte260")
            table = cls.bytes260()
        else:
            path = find_path(cfg.tokenizer_path)
            table = cls.from_sentencepiece(path, cfg.case_transform or recorded)
        has = f"the tokenizer {table.name} has {table.vocab_size} tokens"
        check(table.vocab_size == cfg.vocab_size, f"VOCAB_SIZE={cfg.vocab_size}, but {has}")
        table.check_transform()
        return table

    @classmethod
    def load(cls, cfg: Config) -> ByteTable:
        """The same; InputError, too, if other than this made the shards."""
        maker = recorded_entries(cfg)[1]
        made_by = _digest_in(maker)
        check(
            made_by in (None, tokenizer_hash(cfg)),
            f"TOKENIZER_PATH={cfg.tokenizer_path!r}: the manifest says that another tokenizer "
            f"(sha256 {printable(made_by, 16)}) made the shards in {cfg.data_path}",
        )
        recorded = str(maker.get("case_transform", ""))
        check(
            cfg.case_transform in ("", recorded or cfg.case_transform),
            f"CASE_TRANSFORM={cfg.case_transform}: the manifest says that the shards in "
            f"{cfg.data_path} were made with {printable(recorded)}",
        )
        table = cls.named(cfg, recorded)
        beside = []
        with contextlib.suppress(InputError):
            beside = shards_in(find_path(cfg.data_path), CHARGES)
        check(
            table.markers or not beside,
            f"{cfg.data_path}: has a byte side file ({shard_name(CHARGES)}), so that its shards "
            f"are of text with case markers; TOKENIZER_PATH={cfg.tokenizer_path} has none",
        )
        return table

    def check_transform(self) -> None:
        """InputError unless it is known what text with case markers goes through."""
        check(
            not self.markers or self.transform in CASE_TRANSFORMS,
            f"{self.name}: a tokenizer of text with case markers, and no manifest records which "
            "transform made it; CASE_TRANSFORM says so: caseops is the published one",
        )

    def count(self, tokens: np.ndarray) -> np.ndarray:
        """Bytes charged to tokens[1:] -> int16 [len(tokens) - 1]."""
        spaces = self.marked[tokens[1:]] & ~self.boundary[tokens[:-1]]
        sizes = self.sizes[tokens[1:]] + spaces
        if self.markers:
            sizes[self.escaped(tokens)] = MARKER_BYTES
        return sizes

    def escaped(self, tokens: np.ndarray) -> np.ndarray:
        """Which of tokens[1:] are markers that are text: after an odd number of ESCAPE -> bool."""
        places = np.arange(len(tokens))
        is_escape = tokens == self.markers[CASE_MARKERS.index(ESCAPE)]
        last_other = np.maximum.accumulate(np.where(is_escape, -1, places))
        odd = (places - last_other)[:-1] % 2 == 1
        return odd & np.isin(tokens[1:], self.markers)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        if not self.processor:
            return [byte + 4 for byte in text.encode()]
        return self.processor.encode(self.marked_text(text))

    def marked_text(self, text: str) -> str:
        """What SentencePiece sees of a text; where no transform is known, the text itself."""
        return mark_case(text, self.transform) if self.transform else text

    def decode(self, tokens: Sequence[int]) -> bytes:
        """The text of the tokens, as bytes. Control tokens are empty."""
        if not self.processor:
            return bytes(int(t) - 4 for t in tokens if t >= 4)
        text = self.processor.decode([int(t) for t in tokens])
        return (restore_case(text) if self.markers else text).encode()


def tokenizer_hash(cfg: Config) -> str:
    """SHA-256 of the tokenizer's file, or byte260."""
    if cfg.tokenizer_path == "byte260":
        return "byte260"
    return sha256(find_path(cfg.tokenizer_path))


def read_manifest(root: Path) -> dict[str, Any]:
    """What data/prepare.py's manifest says of a data folder; empty if there is none."""
    path = root / "manifest.json"
    if not path.is_file():
        return {}
    damaged = (OSError, ValueError, RecursionError)
    with input_error_from(f"{printable(path, 300)}: cannot be read", *damaged):
        return json.loads(path.read_text(encoding="utf-8"))


NOT_SAID = (
    LookupError,
    TypeError,
    AttributeError,
    ValueError,
)  # of a manifest that lacks something


def _digest_in(tokenizer: Mapping[str, Any]) -> Any:
    """A manifest's tokenizer as tokenizer_hash gives it."""
    return "byte260" if tokenizer.get("kind") == "byte" else tokenizer.get("sha256")


def recorded_entries(cfg: Config) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """What data/prepare.py's manifest.json says of DATA_PATH's shards and of their tokenizer.

    Both are empty if it says nothing.
    """
    for resolve in (os.path.abspath, os.path.realpath):  # links may lead to or from a manifest
        folder = Path(resolve(cfg.data_path))
        with contextlib.suppress(InputError):
            folder = Path(resolve(find_path(cfg.data_path)))
        manifest = read_manifest(folder.parent.parent)
        with contextlib.suppress(*NOT_SAID):
            (dataset,) = (entry for entry in manifest["datasets"] if entry["name"] == folder.name)
            tokenizers = {entry["name"]: entry for entry in manifest["tokenizers"]}
            return dict(dataset), dict(tokenizers[dataset["tokenizer_name"]])
    return {}, {}


def find_tokenizer(digest: str, models: Sequence[Path]) -> str:
    """A TOKENIZER_PATH with this hash: the default, or one of these files; empty if none has it."""
    if digest == "byte260":
        return digest
    with contextlib.suppress(InputError):
        if sha256(find_path(Config.tokenizer_path)) == digest:
            return Config.tokenizer_path
    found = (str(path) for path in models if path.is_file() and sha256(path) == digest)
    return next(found, "")


def find_data(tokenizer: str, given: Collection[str]) -> dict[str, str]:
    """Settings of data_path and tokenizer_path for a tokenizer's hash, where they are not given.

    As data/manifest.json tells; of several datasets with it, none is chosen. InputError if the
    tokenizer is not found.
    """
    if not tokenizer:
        return {}
    models = []
    folders = []
    places = {}
    with contextlib.suppress(*NOT_SAID):
        root = find_path("data/manifest.json").parent
        manifest = read_manifest(root)
        entries = [e for e in manifest["tokenizers"] if _digest_in(e) == tokenizer]
        models = [root / entry.get("model_path", "") for entry in entries]
        made = [entry["name"] for entry in entries]
        folders = [e["name"] for e in manifest["datasets"] if e["tokenizer_name"] in made]
    if len(folders) == 1 and "data_path" not in given:
        places["data_path"] = str(root / "datasets" / folders[0])
    if "tokenizer_path" not in given:
        places["tokenizer_path"] = find_tokenizer(tokenizer, models)
        check(
            places["tokenizer_path"],
            f"the artifact's tokenizer (SHA-256 {printable(tokenizer)}) is in no "
            "data/manifest.json that can be read; TOKENIZER_PATH names its file, and DATA_PATH the "
            "shards that it made",
        )
    return places


# --- the byte side file: what normalization and markers hide from the table -----------------------

PLAUSIBLE = 0.05  # by which a side file that nothing records may differ from the table's count


def charge_paths(cfg: Config, table: ByteTable) -> list[Path]:
    """The byte side files of the validation shards, one each; none without case markers.

    InputError unless each is there, and as long as its shard.
    """
    if not table.markers:
        return []
    paths = []
    for shard in shards_in(find_path(cfg.data_path), "val"):
        path = shard.with_name(shard.name.replace("_val_", f"_{CHARGES}_"))
        check(
            path.is_file(),
            f"{path}: no such file; it says how many bytes of text each validation token stands "
            "for, which tokens with case markers do not tell. `python data/prepare.py export` and "
            "`fineweb --variant sp8192_caseops` make it",
        )
        counts = [(file.stat().st_size - SHARD_HEADER_BYTES) // 2 for file in (path, shard)]
        check(
            counts[0] == counts[1],
            f"{path}: {counts[0]} byte counts for the {counts[1]} tokens of {shard.name}",
        )
        paths.append(path)
    return paths


def charged_by(paths: Sequence[Path]) -> int:
    """Bytes of text that side files say in all."""
    return sum(int(read_shard(path).sum(dtype=np.int64)) for path in paths)


def load_charges(cfg: Config, table: ByteTable, tokens: np.ndarray) -> np.ndarray:
    """Bytes charged to tokens[1:] of load_validation: by side file or table -> [T - 1].

    InputError for a side file that is none of these tokens.
    """
    paths = charge_paths(cfg, table)
    if not paths:
        return table.count(tokens)
    charges = np.concatenate([read_shard(path) for path in paths])
    name = paths[0].with_name(shard_name(CHARGES))
    total = int(charges.sum(dtype=np.int64))
    told = None
    with contextlib.suppress(*NOT_SAID):
        told = recorded_entries(cfg)[0]["charged_bytes"]["val"]
    check(
        told in (None, total),
        f"{name}: {total} bytes of text, but the manifest says {printable(told)}",
    )
    charges = charges[1 : len(tokens)]
    counted = table.count(tokens)
    control = table.boundary | np.isin(np.arange(table.vocab_size), table.markers)
    silent = control[tokens[1:]] & (counted == 0)
    wrong = silent & (charges > 0)
    check(
        not wrong.any(),
        f"{name}: {wrong.sum()} document starts or case markers are charged (the first is token "
        f"{wrong.argmax() + 1}): it is not of these tokens, or counts transformed text",
    )
    share = charges.sum(dtype=np.int64) / max(1, counted.sum(dtype=np.int64))
    check(
        told is not None or abs(share - 1) < PLAUSIBLE,
        f"{name}: charges {share:.3f} times the bytes of the pieces' text, and no manifest "
        "records its sum",
    )
    return charges


# What tells data apart: fields of the result, and a log line as `data/prepare.py verify` prints it.


def tokenizer_identity(cfg: Config, table: ByteTable) -> tuple[dict[str, Any], str]:
    """The tokenizer's hash, for result and log."""
    digest = tokenizer_hash(cfg)
    kind = "sentencepiece" if table.processor else "bytes"
    fields = {"tokenizer_sha256": digest}
    line = f"val_bpb:enabled tokenizer_kind={kind} tokenizer_path={cfg.tokenizer_path} "
    line += f"sha256:{digest}"
    if table.markers:
        fields["case_transform"] = table.transform
        line += f" case_transform:{table.transform}"
    return fields, line


def shards_identity(cfg: Config, split: str, tokens: int) -> tuple[dict[str, Any], str]:
    """A split's hashes: of all validation shards, or of the first and last training shard."""
    name = printable(find_path(cfg.data_path).resolve().name)
    paths = shard_paths(cfg, split)
    hashed = paths if split == "val" else sorted({paths[0], paths[-1]})
    hashes = [sha256(path) for path in hashed]
    fields = {
        f"{split}_dataset": name,
        f"{split}_shards": len(paths),
        f"{split}_tokens": tokens,
        f"{split}_sha256": hashes,
    }
    shards = f"{split}_shards:{len(paths)} tokens:{tokens} first_sha256:{hashes[0]}"
    return fields, f"{split}_loader:dataset:{name} {shards}"


def charges_identity(cfg: Config, table: ByteTable) -> tuple[dict[str, Any], str]:
    """Hashes and sum of the byte side files."""
    paths = charge_paths(cfg, table)
    hashes = [sha256(path) for path in paths]
    total = charged_by(paths)
    fields = {f"{CHARGES}_sha256": hashes, "val_text_bytes": total}
    return fields, f"{CHARGES}_files:{len(paths)} text_bytes:{total} first_sha256:{hashes[0]}"


def synthetic_shards(folder: Path) -> None:
    """Small byte-level shards of invented words with skewed frequencies, for SMOKE=1."""
    rng = np.random.default_rng(0)
    letters = list("aeioubdklmnrst")
    words = ["".join(rng.choice(letters, rng.integers(2, 8))) for _ in range(200)]
    frequencies = 1 / np.arange(1, len(words) + 1)
    frequencies = frequencies / frequencies.sum()
    for split, documents in (("train", 60), ("val", 6)):
        tokens = []
        for _ in range(documents):
            text = " ".join(rng.choice(words, 150, p=frequencies))
            tokens += [1, *(byte + 4 for byte in text.encode())]
        write_shard(folder / shard_name(split, 0), np.array(tokens))


# ==================================================================================================
# 5. MODEL - one forward pass, `GPT.hidden`, for training, scoring and adaptation.
#    Uses sections 1-2. GPT and its layers know no device, process or file, and index no tensor
#    with brackets, so that fake CUDA tensors can run through them on a machine without a GPU.
# ==================================================================================================

# --- parameters -----------------------------------------------------------------------------------

# A parameter's value at step 0, from its shape and a generator of its own.
Init = Callable[[tuple[int, ...], torch.Generator], Tensor]


def param(*shape: int, init: Init) -> nn.Parameter:
    """A parameter and its initial value, which GPT.reset_parameters draws."""
    # What a name decides: optimizer group (6), storage and role (7), what adaptation changes (10).
    p = nn.Parameter(torch.empty(shape))
    p.init = init
    return p


def constant(value: float) -> Init:
    """All elements alike."""
    return lambda shape, generator: torch.full(shape, value)


def zeros(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A branch that ends in zeros begins as the identity."""
    return torch.zeros(shape)


def first_only(value: float) -> Init:
    """The first row, or the first element of a vector, has the value; the rest are zero."""

    def init(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        out = torch.zeros(shape)
        out.select(0, 0).fill_(value)
        return out

    return init


def normal(std: float) -> Init:
    """Normal distribution with mean 0."""
    return lambda shape, generator: torch.randn(shape, generator=generator) * std


def uniform_fan_in(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """As torch starts its linear layers: uniform within 1 / sqrt(inputs) of zero."""
    return (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(shape[1])


def orthogonal(gain: float) -> Init:
    """Orthogonal rows or columns, all singular values equal to the gain."""
    return lambda shape, generator: nn.init.orthogonal_(torch.empty(shape), gain, generator)


def matrix_init(cfg: Config, in_block: bool = True) -> Init:
    """The start of a matrix whose output is not added to the stream directly.

    With ORTHO_INIT=scaled, those of the side tables (in_block=False) begin smaller.
    """
    if not cfg.ortho_init:
        return uniform_fan_in
    shrink = cfg.ortho_init == "scaled" and not in_block
    return orthogonal((2 * cfg.num_layers) ** -0.5 if shrink else 1.0)


def embedding(rows: int, dim: int, init: Init) -> nn.Embedding:
    """A table of vectors [rows, dim]."""
    table = nn.Embedding(rows, dim, _weight=torch.empty(rows, dim))  # drawing imports a compiler
    table.weight = param(rows, dim, init=init)
    return table


# --- attention: positions, and what it needs beyond queries, keys and values ----------------------


def norm(x: Tensor, scale: float | None = None) -> Tensor:
    """RMS norm over the last axis, without weights; scale, if any, multiplies the outcome."""
    x = F.rms_norm(x, (x.size(-1),))
    return x if scale is None else x * scale


@functools.lru_cache(maxsize=64)
def rotary_tables(
    length: int, dims: int, base: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles -> two float32 [T, 1, dims / 2] (2104.09864).

    Made once for each length, outside the compiled graph: inside, every kernel that turns a query
    or a key would work them out again.
    """
    with torch.inference_mode(False), torch.no_grad():  # training reads what scoring made
        exponents = -torch.arange(0, dims, 2, device=device, dtype=torch.float32) / dims
        positions = torch.arange(length, device=device, dtype=torch.float32)
        angles = torch.outer(positions, base**exponents).unsqueeze(1)
        return angles.cos(), angles.sin()


def stretched_base(base: float, dims: int, length: int, train_len: int) -> float:
    """The rotary base at which the slowest pair turns as far in `length` as in train_len (NTK)."""
    return base * max(1.0, length / train_len) ** (dims / (dims - 2))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-split pairs, of a head's first 2 * cos.size(-1) dimensions.

    x [B, T, H, D]; the other dimensions pass.
    """
    cos = cos.to(x.dtype)
    sin = sin.to(x.dtype)
    half = cos.size(-1)
    a, b, rest = x.split((half, half, x.size(-1) - 2 * half), dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)  # [B, T, H, D]


@dataclasses.dataclass
class KVCache:
    """What one pass over a long sequence carries from piece to piece: attention with a window.

    A position sees the last `window` positions, itself included; given `bos`, only those of its
    document, as if that stood alone. However the sequence is cut, the outcome is that of one pass
    with this mask. Keys are kept unrotated and turned from each block's first key on, so that
    angles stay small.
    """

    window: int
    bos: int | None
    carried: dict[Hashable, Tensor] = dataclasses.field(default_factory=dict)  # by what it is

    def extend(self, key: Hashable, x: Tensor, count: int) -> Tensor:
        """x [B, T, ...] after the last `count` positions under this key -> [B, count + T, ...]."""
        before = self.carried.get(key)
        if before is None:  # zeros stand before the first piece
            before = x.new_zeros(x.size(0), count, *x.shape[2:])
        whole = torch.cat((before, x), 1)
        self.carried[key] = whole.narrow(1, x.size(1), count)
        return whole

    def begin(self, ids: Tensor) -> None:
        """Prepares for a piece, ids [B, T]; T is less than the window or a multiple of it.

        Sets `block` (queries that share their keys), `starts` [B, T] (no position looks back across
        one) and `mask` [G, 1, C, L] of the G blocks of C queries and L keys.
        """
        first_piece = not self.carried
        self.block = min(ids.size(1), self.window)
        self.starts = ids == (-1 if self.bos is None else self.bos)
        number = self.starts.cumsum(1) + self.carried.get("document number", 1)  # [B, T]
        self.carried["document number"] = number.narrow(1, ids.size(1) - 1, 1)
        if first_piece:
            self.starts = self.starts | (torch.arange(ids.size(1), device=ids.device) == 0)
        keys = self._blocks(self.extend("documents", number, self.window - 1))  # [G, L]
        row = torch.arange(self.block, device=ids.device).unsqueeze(1)
        column = torch.arange(keys.size(1), device=ids.device)
        in_window = (column >= row) & (column - row < self.window)
        same_document = keys.unsqueeze(1) == number.reshape(-1, self.block, 1)
        self.mask = (same_document & in_window).unsqueeze(1)

    def _blocks(self, whole: Tensor) -> Tensor:
        """[B, window - 1 + T, ...] -> overlapping blocks, one a block of queries [G, L, ...]."""
        blocks = whole.unfold(1, self.block + self.window - 1, self.block)
        return blocks.movedim(-1, 2).flatten(0, 1)

    def attend(
        self, step: int, q: Tensor, k: Tensor, v: Tensor, gain: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """Queries [B, T, H, D] of a piece, to its keys and values [B, T, K, D] and earlier ones.

        q and k are not yet turned; cos, sin [L, 1, dims / 2]; gain [H, 1] multiplies the turned
        queries. step: number of the executed layer, which has keys and values of its own.
        """
        keys = self._blocks(self.extend((step, "keys"), k, self.window - 1))  # [G, L, K, D]
        values = self._blocks(self.extend((step, "values"), v, self.window - 1))
        queries = q.reshape(-1, self.block, *q.shape[2:])  # [G, C, H, D]
        own_cos = cos.narrow(0, self.window - 1, self.block)
        own_sin = sin.narrow(0, self.window - 1, self.block)
        queries = rotate(queries, own_cos, own_sin) * gain
        return sdpa_attention(queries, rotate(keys, cos, sin), values, self.mask).reshape(q.shape)


class Adapter(NamedTuple):
    """Two thin matrices for each row of a batch, A [B, R, I] and B [B, O, R]."""

    low: Tensor
    high: Tensor
    scale: float  # of their product


NO_ADAPTERS: dict[str, Adapter] = {}


def plus_adapter(out: Tensor, x: Tensor, adapter: Adapter) -> Tensor:
    """out [B, T, O], and what an adapter makes of x [B, T, I] (LoRA, 2106.09685)."""
    thin = x @ adapter.low.to(x.dtype).mT * adapter.scale
    return out + thin @ adapter.high.to(x.dtype).mT


@dataclasses.dataclass(frozen=True)
class PassContext:
    """What a forward pass needs beyond its inputs; made outside the compiled graph."""

    backend: AttentionBackend  # causal attention over rows that stand alone
    cos: Tensor  # [L, 1, dims / 2], of the keys' positions
    sin: Tensor
    cache: KVCache | None = None  # rows continue what it has seen; its window is the mask
    segments: Segments | None = None  # the one row is packed of these
    packed: PackedBackend = padded_attention
    adapters: Sequence[dict[str, Adapter]] | None = None  # of every executed layer, by place


def previous(x: Tensor, cache: KVCache | None, key: str) -> Tensor:
    """[B, T, ...] one position later; zeros stand before the start of a sequence."""
    if cache is None:
        return F.pad(x, (0, 0) * (x.ndim - 2) + (1, -1))
    starts = cache.starts.view(*cache.starts.shape, *[1] * (x.ndim - 2))
    return cache.extend(key, x, 1).narrow(1, 0, x.size(1)).masked_fill(starts, 0)


CONTEXT_HASH = 6364136223846793005  # odd: a polynomial in it, modulo 2^64, tells contexts apart


def context_hash(
    ids: Tensor, order: int, cache: KVCache | None = None, start: Tensor | int = 0
) -> Tensor:
    """A number for every position's last `order` tokens, and for what it starts with -> [B, T]."""
    token = ids
    key = start * CONTEXT_HASH + token
    for back in range(1, order):
        token = previous(token, cache, f"{back} before, of {order}")
        key = key * CONTEXT_HASH + token
    return key


# --- layers ---------------------------------------------------------------------------------------


def row_scales(w: Tensor, qmax: int, floor: bool) -> Tensor:
    """Quantization step of every row for whole numbers up to qmax: [..., R, C] -> [..., R, 1]."""
    least = 1 / qmax if floor else 1e-12
    return (w.detach().abs().amax(-1, keepdim=True) / qmax).clamp(min=least)


class Linear(nn.Module):
    """A matrix, kept in float32 and cast to the input's type at use.

    fake_qmax, if not 0: fake quantization to whole numbers up to it, through which the gradient
    passes straight; switching it makes a second compiled graph.
    """

    def __init__(self, inputs: int, outputs: int, init: Init = uniform_fan_in):
        super().__init__()
        self.weight = param(outputs, inputs, init=init)
        self.fake_qmax = 0
        self.fake_floor = False

    def forward(self, x: Tensor, adapter: Adapter | None = None) -> Tensor:
        w = self.weight
        if self.fake_qmax:
            scale = row_scales(w, self.fake_qmax, self.fake_floor)
            w = w + ((w / scale).round() * scale - w).detach()
        out = F.linear(x, w.to(x.dtype))
        return out if adapter is None else plus_adapter(out, x, adapter)


class BigramHash(nn.Module):
    """An embedding of the hashed pair (previous token, token), added to the token's own.

    xor (PR 489, PR 859): the last row is kept for position 0, and the branch has a learned scale.
    linear (PR 740): token 0 stands before position 0, no scale. A zero table needs a projection
    that is not zero; BIGRAM_INIT=dead has both at zero and never trains (PR 489).
    """

    def __init__(self, cfg: Config, rows: int):
        super().__init__()
        self.rows = rows
        self.xor = cfg.bigram_hash == "xor"
        table_init = normal(1.0) if cfg.bigram_init == "normal" else zeros
        proj_init = zeros if cfg.bigram_init == "dead" else matrix_init(cfg, in_block=False)
        self.embed = embedding(self.rows, cfg.bigram_dim, table_init)
        self.proj = Linear(cfg.bigram_dim, cfg.model_dim, proj_init)
        self.scale = param(init=constant(0.05)) if self.xor else None

    def rows_of(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Table row of every position: [B, T] -> [B, T]."""
        before = previous(ids, cache, "ids")
        if not self.xor:
            return (2654435761 * ids + 40503 * before) % self.rows
        pairs = torch.bitwise_xor(36313 * ids, 27191 * before) % (self.rows - 1)
        first = torch.arange(ids.size(1), device=ids.device) == 0
        starts = first if cache is None else cache.starts
        return torch.where(starts, self.rows - 1, pairs)

    def forward(self, ids: Tensor, dtype: torch.dtype, cache: KVCache | None = None) -> Tensor:
        out = self.proj(self.embed(self.rows_of(ids, cache)).to(dtype))  # [B, T, D]
        return out if self.scale is None else out * self.scale.to(dtype)


class ContextHash(BigramHash):
    """The same of more than two last tokens; token 0 stands before a sequence."""

    def __init__(self, cfg: Config, order: int):
        super().__init__(cfg, cfg.hash_rows)
        self.order = order

    def rows_of(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Table row of every position: [B, T] -> [B, T]."""
        key = context_hash(ids, self.order, cache)
        return (key >> 33) % self.rows  # by high bits, which all tokens reach


def inside_documents(gate: Tensor, ids: Tensor, bos: int | None) -> Tensor:
    """A gate [D], [B, T, 1] or [B, T, D], closed where a document starts; bos None: as it is."""
    return gate if bos is None else gate * (ids != bos).unsqueeze(-1).to(gate.dtype)


class SmearGate(nn.Module):
    """out_t = (1 - g) x_t + g x_{t-1}, g = sigmoid(gate) per dimension; can stop at a BOS."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.bos = cfg.bos_id if cfg.smear_bos_mask else None
        self.gate = param(cfg.model_dim, init=zeros)

    def forward(self, x: Tensor, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        gate = inside_documents(torch.sigmoid(self.gate.to(x.dtype)), ids, self.bos)
        return torch.lerp(x, previous(x, cache, "smear"), gate.expand_as(x))


def input_gate(x: Tensor, weight: Tensor, scale: float = 1.0) -> Tensor:
    """sigmoid(scale w . x) of the first dimensions of x: [B, T, D], [N, window] -> [B, T, N]."""
    window = x.narrow(-1, 0, weight.size(1))
    return torch.sigmoid(scale * F.linear(window, weight.to(x.dtype)))


class InputSmearGate(nn.Module):
    """The previous token's embedding, times a gate that reads the token's own (PR 1667)."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.bos = cfg.bos_id if cfg.smear_bos_mask else None
        self.weight = param(1, cfg.gate_window, init=zeros)

    def forward(self, x: Tensor, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        gate = inside_documents(input_gate(x, self.weight), ids, self.bos)  # [B, T, 1]
        return gate * previous(x, cache, "smear")


class Induction(nn.Module):
    """What followed the last like place of the document: its embedding, times a gate.

    Places are alike whose last tokens are the same, as many as the first order says, else as the
    next; every order has a gate of its own. What a cache's window does not hold is not found.
    """

    def __init__(self, cfg: Config):
        super().__init__()
        self.orders = cfg.induction_orders
        self.bos = cfg.bos_id
        self.gate = param(len(self.orders), cfg.model_dim, init=zeros)

    def last_like(self, ids: Tensor, order: int) -> Tensor:
        """Place of the last like one of every place [B, T], -1 if there is none."""
        document = (ids == self.bos).cumsum(1)
        key = context_hash(ids + 1, order, start=document)  # 0 stands for no token
        key, place = torch.sort(key, dim=1, stable=True)
        pairs = ids.size(1) - 1
        alike = key.narrow(1, 1, pairs) == key.narrow(1, 0, pairs)
        earlier = torch.where(alike, place.narrow(1, 0, pairs), -1)
        return torch.full_like(ids, -1).scatter(1, place.narrow(1, 1, pairs), earlier)

    def followers(self, ids: Tensor, cache: KVCache | None = None) -> tuple[Tensor, Tensor]:
        """[B, T] -> the tokens that followed, and the order's number; its last + 1 if none."""
        length = reach = ids.size(1)
        if cache is not None:
            reach = cache.window - 1
            ids = cache.extend("induction", ids + 1, reach + max(self.orders) - 1) - 1
        here = torch.arange(ids.size(1), device=ids.device)
        token, which = ids, torch.full_like(ids, len(self.orders))
        for number, order in reversed(list(enumerate(self.orders))):
            place = self.last_like(ids, order)
            found = (place >= 0) & (here - place <= reach)
            token = torch.where(found, ids.gather(1, (place + 1).clamp(min=0)), token)
            which = torch.where(found, number, which)
        first = ids.size(1) - length
        return token.narrow(1, first, length), which.narrow(1, first, length)

    def forward(
        self, ids: Tensor, embed: nn.Embedding, dtype: torch.dtype, cache: KVCache | None = None
    ) -> Tensor:
        token, which = self.followers(ids, cache)
        numbers = torch.arange(len(self.orders), device=ids.device)
        found = (which.unsqueeze(-1) == numbers).to(dtype)  # [B, T, orders]
        return (found @ self.gate.to(dtype)) * embed(token).to(dtype)


class ValueEmbedding(nn.Module):
    """One token table whose projection is added to the values of the listed layers (PR 859)."""

    def __init__(self, cfg: Config):
        super().__init__()
        proj_init = matrix_init(cfg, in_block=False) if cfg.ortho_init else zeros
        self.embed = embedding(cfg.vocab_size, cfg.ve_dim, normal(0.01))
        self.proj = Linear(cfg.ve_dim, cfg.num_kv_heads * cfg.head_dim, proj_init)
        self.scale = param(init=constant(0.1))

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return self.proj(self.embed(ids).to(dtype)) * self.scale.to(dtype)  # [B, T, K * D]


class Attention(nn.Module):
    """Causal grouped-query attention: normalised queries and keys, a gain per head, optionally XSA.

    XSA (exclusive self-attention) removes from each head's output the part along the position's
    own value.
    """

    def __init__(self, cfg: Config, xsa: bool):
        super().__init__()
        self.heads = cfg.num_heads
        self.kv_heads = cfg.num_kv_heads
        self.xsa = xsa
        dim = cfg.model_dim
        kv_dim = cfg.num_kv_heads * cfg.head_dim
        self.c_q = Linear(dim, dim, matrix_init(cfg))
        self.c_k = Linear(dim, kv_dim, matrix_init(cfg))
        self.c_v = Linear(dim, kv_dim, matrix_init(cfg))
        self.proj = Linear(dim, dim, zeros)
        self.q_gain = param(cfg.num_heads, init=constant(cfg.qk_gain_init))
        gated = cfg.sparse_attn_gate_enabled
        self.attn_gate_w = param(cfg.num_heads, cfg.gate_window, init=zeros) if gated else None
        self.gate_scale = cfg.sparse_attn_gate_scale

    def forward(
        self,
        x: Tensor,
        value_embedding: Tensor | None,
        step: int,
        context: PassContext,
        adapters: dict[str, Adapter] = NO_ADAPTERS,
    ) -> Tensor:
        """x [B, T, D], value_embedding [B, T, K * D]; step: number of the executed layer."""
        B, T, D = x.shape
        v = self.c_v(x, adapters.get("v"))
        if value_embedding is not None:
            v = v + value_embedding
        q = norm(self.c_q(x, adapters.get("q")).view(B, T, self.heads, -1))  # [B, T, H, D]
        k = norm(self.c_k(x, adapters.get("k")).view(B, T, self.kv_heads, -1))  # [B, T, K, D]
        v = v.view(B, T, self.kv_heads, -1)
        gain = self.q_gain.to(x.dtype).unsqueeze(-1)
        cos, sin = context.cos, context.sin
        if context.cache is not None:
            out = context.cache.attend(step, q, k, v, gain, cos, sin)
        else:
            q, k = rotate(q, cos, sin) * gain, rotate(k, cos, sin)
            packed = context.segments is not None
            out = context.packed(q, k, v, context.segments) if packed else context.backend(q, k, v)
        if self.xsa:
            own = F.normalize(v, dim=-1).unsqueeze(3)  # [B, T, K, 1, D]
            out = out.reshape(B, T, self.kv_heads, -1, out.size(-1))  # [B, T, K, H / K, D]
            out = out - (out * own).sum(-1, keepdim=True) * own
        if self.attn_gate_w is not None:
            gate = input_gate(x, self.attn_gate_w, self.gate_scale)  # [B, T, H]
            out = out.reshape(B, T, self.heads, -1) * gate.unsqueeze(-1)
        return self.proj(out.reshape(B, T, D), adapters.get("out"))


class MLP(nn.Module):
    """Squared leaky ReLU between two matrices."""

    def __init__(self, cfg: Config):
        super().__init__()
        hidden = int(cfg.mlp_mult * cfg.model_dim)
        self.fc = Linear(cfg.model_dim, hidden, matrix_init(cfg))
        self.proj = Linear(hidden, cfg.model_dim, zeros)
        self.slope = cfg.leaky_slope

    def forward(self, x: Tensor, adapters: dict[str, Adapter] = NO_ADAPTERS) -> Tensor:
        hidden = F.leaky_relu(self.fc(x, adapters.get("up")), self.slope).square()
        return self.proj(hidden, adapters.get("down"))


class Block(nn.Module):
    """Mix in the embedding stream, then attention, then MLP, each with learned weights.

    With two lanes (PR 1204) attention reads the first and the MLP the second, and each lane goes on
    as a learned sum of itself and of what both gave.
    """

    def __init__(self, cfg: Config, layer: int):
        super().__init__()
        start = (layer + 1) ** -0.5 if cfg.depth_scale_init else 1.0
        self.attn = Attention(cfg, xsa=layer >= cfg.num_layers - cfg.xsa_last_n)
        self.mlp = MLP(cfg)
        self.attn_scale = param(cfg.model_dim, init=constant(start))
        self.mlp_scale = param(cfg.model_dim, init=constant(start))
        self.resid_mix = param(2, cfg.model_dim, init=first_only(1.0)) if cfg.x0_mix else None
        self.ln_scale = 1 / math.sqrt(layer + 1) if cfg.ln_scale else None

    def forward(
        self,
        x: Tensor,
        x0: Tensor,
        value_embedding: Tensor | None,
        step: int,
        context: PassContext,
        lane: Tensor | None = None,
        lambdas: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """x, x0 [B, T, D]: the stream now, and as it entered the first block -> stream and lane.

        lane: the second, whose lambdas are [from attention or MLP, to lane] and [lane].
        """
        mixed = x
        if self.resid_mix is not None:
            keep, blend = self.resid_mix.to(x.dtype).unbind()
            mixed = keep * x + blend * x0
        adapters = context.adapters[step] if context.adapters else NO_ADAPTERS
        normed = norm(mixed, self.ln_scale)
        attended = self.attn(normed, value_embedding, step, context, adapters)
        if "attn" in adapters:  # beside all of attention
            attended = plus_adapter(attended, normed, adapters["attn"])
        attended = self.attn_scale.to(x.dtype) * attended
        read = mixed + attended if lane is None else lane
        normed = norm(read, self.ln_scale)
        transformed = self.mlp(normed, adapters)
        if "mlp" in adapters:
            transformed = plus_adapter(transformed, normed, adapters["mlp"])
        transformed = self.mlp_scale.to(x.dtype) * transformed
        if lane is None:
            return read + transformed, None
        post, keep = lambdas
        from_attention, from_mlp = (row.to(x.dtype).unbind() for row in post.unbind())
        keep = keep.to(x.dtype).unbind()
        first = keep[0] * x + from_attention[0] * attended + from_mlp[0] * transformed
        second = keep[1] * lane + from_attention[1] * attended + from_mlp[1] * transformed
        return first, second


# --- the mixer head of PR 859, and the n-grams that it weighs -------------------------------------

MIXER_LOSS_WEIGHT = 0.1  # as PR 859 has them
MIXER_NEURAL_FLOOR = 0.05


class MixerHead(Linear):
    """Logits of the weights of network and n-gram orders, from the final norm's output, float32."""

    def __init__(self, cfg: Config):
        outputs = len(cfg.ngram_orders) + 1
        super().__init__(cfg.model_dim, outputs, zeros)
        self.bias = param(outputs, init=first_only(2.0))  # at first the network is trusted most

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight, self.bias)  # [..., 1 + K]


def mix(gate: Tensor, p: Tensor, ratios: Tensor, floor: float = MIXER_NEURAL_FLOOR) -> Tensor:
    """Learned mixture of a target's probability (PR 859), in training and scoring -> [...].

    gate [..., 1 + K] logits; p [...] by the network, whose weight is at least `floor`; ratios
    [..., K] by order, negative where an order does not count.
    """
    absent = F.pad(ratios < 0, (1, 0))
    weights = gate.masked_fill(absent, -1e9).softmax(-1)
    mixed = (weights * torch.cat((p.unsqueeze(-1), ratios), -1)).sum(-1)
    return floor * p + (1 - floor) * mixed


def ngram_slots(context: Sequence[Any], target: Any, cfg: Config) -> tuple[Any, Any]:
    """Counters of a context (oldest token first) and of context and target; arrays or tensors."""
    primes = itertools.cycle(cfg.ngram_primes)
    key = 0
    for tokens in context:
        key = tokens * next(primes) ^ key
    full = target * next(primes) ^ key
    last = cfg.ngram_buckets - 1
    return key & last, full & last


class FrozenNgramTable:
    """Hashed counts of the training tokens, frozen before step 1, for the mixer head to learn."""

    def __init__(self, cfg: Config, device: torch.device):
        self.cfg = cfg
        shape = (len(cfg.ngram_orders), 2, cfg.ngram_buckets)  # contexts, and contexts with targets
        self.tables = torch.zeros(shape, dtype=torch.int32, device=device)

    def add(self, tokens: Tensor) -> None:
        """Counts all n-grams of a piece [n]."""
        for tables, order in zip(self.tables, self.cfg.ngram_orders):
            n = max(len(tokens) - order + 1, 0)
            context = [tokens[i : i + n] for i in range(order - 1)]
            slots = ngram_slots(context, tokens[order - 1 :], self.cfg)
            for table, slot in zip(tables, slots):
                table += torch.bincount(slot, minlength=self.cfg.ngram_buckets).int()

    def ratios(self, ids: Tensor, targets: Tensor) -> Tensor:
        """ids, targets [B, T] -> share of the context's sightings that had the target [B, T, K].

        -1 where an order does not count: in the row's first order - 1 places, as PR 859 has it, or
        where the context is too rare.
        """
        columns = []
        position = torch.arange(ids.size(1), device=ids.device)
        for (contexts, fulls), order in zip(self.tables, self.cfg.ngram_orders):
            before = [ids.roll(order - 2 - i, 1) for i in range(order - 1)]
            context, full = ngram_slots(before, targets, self.cfg)
            count = contexts[context]
            ratio = torch.minimum(fulls[full], count) / count.clamp(min=1)
            absent = (count < self.cfg.ngram_min_count) | (position < order - 1)
            columns.append(ratio.masked_fill(absent, -1.0))
        return torch.stack(columns, -1)


# --- the whole model ------------------------------------------------------------------------------

# Matrices by shape that are gains by role: trained by Adam, and packed as floats (gates unless
# QUANT_POLICY has bits for them).
CONTROL_NAMES = (
    "resid_mix",
    "skip_weights",
    "skip_gates",
    "parallel_post_lambdas",
    "parallel_resid_lambdas",
    "attn_gate_w",
    "smear_gate.weight",
    "induction.gate",
)


@dataclasses.dataclass(frozen=True)
class LayerStep:
    """One executed layer of the forward pass."""

    block: int
    push: bool = False  # its output is kept for a skip
    pop: int | None = None  # row of skip_weights: the last kept output is added before it
    value_embedding: int | None = None  # place in ve_layer_scales: it gets the value embedding
    lanes: bool = False  # attention and MLP have a lane each


def layer_steps(cfg: Config, looped: bool = False) -> list[LayerStep]:
    """What the forward pass executes. U-Net skips: the first half pushes, the second pops.

    looped: with depth recurrence, whose layers stand there several times. Halves are of the
    executed layers; lanes begin in the second.
    """
    order = list(range(cfg.num_layers))
    if looped:
        repeated = order[cfg.loop_start : cfg.loop_end + 1]
        order[cfg.loop_end + 1 : cfg.loop_end + 1] = repeated * cfg.num_loops
    half = len(order) // 2
    skips = half if cfg.unet_skips else 0
    steps = []
    for number, layer in enumerate(order):
        place = number - half  # in the second half
        step = LayerStep(
            layer,
            push=number < skips,
            pop=place if 0 <= place < skips else None,
            value_embedding=cfg.ve_layers.index(layer) if layer in cfg.ve_layers else None,
            lanes=0 < cfg.parallel_start_layer <= layer and place >= 0,
        )
        steps.append(step)
    return steps


class GPT(nn.Module):
    """The model. Parameters are float32; dtype is the type of the stream, backend its attention."""

    def __init__(
        self,
        cfg: Config,
        dtype: torch.dtype = torch.float32,
        backend: AttentionBackend = sdpa_attention,
        packed: PackedBackend = padded_attention,
    ):
        super().__init__()
        self.cfg = cfg
        self.dtype = dtype
        self.backend = backend
        self.packed = packed
        self.rotary_dims = cfg.rope_dims or cfg.head_dim
        tied = cfg.tie_embeddings
        std = cfg.tied_embed_init_std if tied else 1.0
        self.tok_emb = embedding(cfg.vocab_size, cfg.model_dim, normal(std))
        self.lm_head = None if tied else Linear(cfg.model_dim, cfg.vocab_size, zeros)
        self.bigram = BigramHash(cfg, cfg.bigram_vocab_size) if cfg.bigram_vocab_size else None
        self.hashes = nn.ModuleList(ContextHash(cfg, order) for order in cfg.hash_orders)
        self.induction = Induction(cfg) if cfg.induction_orders else None
        self.smear = SmearGate(cfg) if cfg.smear else None
        self.smear_gate = InputSmearGate(cfg) if cfg.smear_gate_enabled else None
        self.smear_lambda = param(1, init=zeros) if cfg.smear_gate_enabled else None
        self.ve_shared = ValueEmbedding(cfg) if cfg.ve_layers else None
        scales = [param(init=constant(1.0)) for _ in cfg.ve_layers]
        self.ve_layer_scales = nn.ParameterList(scales) if scales else None
        self.alpha_head = MixerHead(cfg) if cfg.mixer_head else None
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.num_layers))
        self.plain_steps = layer_steps(cfg)
        self.looped_steps = layer_steps(cfg, looped=cfg.num_loops > 0)
        self.set_looping(True)  # as in a finished run
        pops = sum(step.pop is not None for step in self.looped_steps)
        self.skip_weights = param(pops, cfg.model_dim, init=constant(1.0)) if pops else None
        gated = cfg.skip_gates_enabled and pops
        self.skip_gates = param(pops, cfg.model_dim, init=zeros) if gated else None
        self.parallel_post_lambdas = None
        if cfg.parallel_start_layer:  # [layer, from attention or MLP, to lane], [layer, lane]
            self.parallel_post_lambdas = param(cfg.num_layers, 2, 2, init=constant(1.0))
            self.parallel_resid_lambdas = param(cfg.num_layers, 2, init=constant(1.1))
        self.softcap_pos = None
        if cfg.asym_logit_rescale:  # training has one cap, and leaves these as they are
            self.softcap_pos = param(init=constant(cfg.logit_softcap)).requires_grad_(False)
            self.softcap_neg = param(init=constant(cfg.logit_softcap)).requires_grad_(False)
        if not self.tok_emb.weight.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Each parameter from a generator seeded by (SEED, name): a new one changes no other."""
        for name, p in self.named_parameters():
            digest = hashlib.blake2b(f"{self.cfg.seed}/{name}".encode(), digest_size=8).digest()
            seed = int.from_bytes(digest, "little") >> 1  # torch takes 63 bits
            generator = torch.Generator().manual_seed(seed)
            p.copy_(p.init(tuple(p.shape), generator))

    def set_looping(self, on: bool) -> None:
        """Depth recurrence in force or not, where there is one."""
        self.looping = on and self.cfg.num_loops > 0
        self.steps = self.looped_steps if self.looping else self.plain_steps

    def context(
        self,
        ids: Tensor,
        cache: KVCache | None = None,
        documents: Tensor | Segments | None = None,
        span: int = 0,
    ) -> PassContext:
        """What attention needs for these inputs [B, T].

        cache: they continue what it has seen; documents: they are one row, packed of these pieces,
        or of those that begin at these places; span: they are the first of so many.
        """
        cfg = self.cfg
        length = ids.size(1)
        span = max(span, length)
        if documents is not None and not isinstance(documents, Segments):
            documents = self._segments(torch.as_tensor(documents, device=ids.device), length)
        if documents is not None:
            length = span = documents.longest
        if cache is not None:
            cache.begin(ids)
            length = cache.window - 1 + cache.block  # keys of a block
            span = cache.window
        base = cfg.rope_base
        if cfg.rope_train_seq_len:
            base = stretched_base(base, self.rotary_dims, span, cfg.rope_train_seq_len)
        cos, sin = rotary_tables(length, self.rotary_dims, base, ids.device)
        if documents is not None:  # angles begin anew with every piece
            cos, sin = (table.index_select(0, documents.position) for table in (cos, sin))
        return PassContext(self.backend, cos, sin, cache, documents, self.packed)

    @staticmethod
    def _segments(starts: Tensor, length: int) -> Segments:
        """The pieces of a row that begin at these places, which the host reads."""
        places = np.unique([0, *starts.tolist()])
        places = places.compress(places < length)
        longest = int(np.diff(places, append=length).max())
        return segments_of(places, length, longest).moved(lambda x: x.to(starts.device))

    def hidden(
        self,
        ids: Tensor,
        documents: Tensor | None = None,
        looped: bool | None = None,
        context: PassContext | None = None,
    ) -> Tensor:
        """ids [B, T] -> the stream after the final norm [B, T, D].

        documents: where pieces of a packed row begin, inside which attention stays; looped: depth
        recurrence on or off, None = as it is in force; context: instead of documents.
        """
        context = context or self.context(ids, documents=documents)
        steps = {None: self.steps, True: self.looped_steps, False: self.plain_steps}[looped]
        x = self.tok_emb(ids).to(self.dtype)
        for table in filter(None, (self.bigram, *self.hashes)):
            x = x + table(ids, self.dtype, context.cache)
        if self.induction is not None:
            x = x + self.induction(ids, self.tok_emb, self.dtype, context.cache)
        if self.smear_gate is not None:
            smeared = self.smear_gate(x, ids, context.cache)
            x = x + self.smear_lambda.to(self.dtype) * smeared
        if self.smear is not None and self.cfg.smear_before_norm:
            x = self.smear(x, ids, context.cache)
        x = norm(x)
        if self.smear is not None and not self.cfg.smear_before_norm:
            x = self.smear(x, ids, context.cache)

        x0 = x  # the stream as it enters the first block
        kept = []  # outputs that wait for their skip
        if self.ve_shared is not None:
            values = self.ve_shared(ids, self.dtype)
        if self.skip_weights is not None:
            skip_weights = self.skip_weights.to(self.dtype).unbind()
        if self.skip_gates is not None:
            skip_gates = torch.sigmoid(self.skip_gates.to(self.dtype)).unbind()
        if self.parallel_post_lambdas is not None:
            post, keep = self.parallel_post_lambdas.unbind(), self.parallel_resid_lambdas.unbind()
        lane = lambdas = None  # the MLP's, from the first step with two lanes on
        for number, step in enumerate(steps):
            if step.lanes:
                lane = x if lane is None else lane
                lambdas = post[step.block], keep[step.block]
            if step.pop is not None:
                skipped = skip_weights[step.pop] * kept.pop()
                if self.skip_gates is None:
                    x = x + skipped
                else:
                    x = torch.lerp(skipped, x, skip_gates[step.pop].expand_as(x))
            value_embedding = None
            if step.value_embedding is not None:
                scale = self.ve_layer_scales[step.value_embedding]
                value_embedding = values * scale.to(self.dtype)
            block = self.blocks[step.block]
            x, lane = block(x, x0, value_embedding, number, context, lane, lambdas)
            if step.push:
                kept.append(x)
        return norm(x if lane is None else (x + lane) / 2)

    def head(self, hidden: Tensor, scoring: bool = True, adapter: Adapter | None = None) -> Tensor:
        """[..., D] -> logits [..., V], float32, with the caps of scoring, or training's cap."""
        if self.lm_head is not None:
            logits = self.lm_head(hidden, adapter)
        else:
            logits = F.linear(hidden, self.tok_emb.weight.to(hidden.dtype))
            if adapter is not None:
                logits = plus_adapter(logits, hidden, adapter)
        logits = logits.float()
        cap = self.cfg.logit_softcap
        if scoring and self.softcap_pos is not None:
            cap = torch.where(logits < 0, self.softcap_neg, self.softcap_pos)
        return cap * torch.tanh(logits / cap) if self.cfg.logit_softcap else logits

    def logits(
        self,
        ids: Tensor,
        documents: Tensor | None = None,
        looped: bool | None = None,
        context: PassContext | None = None,
    ) -> Tensor:
        """ids [B, T] -> [B, T, V], float32, with the caps of scoring; the rest as `hidden`."""
        return self.head(self.hidden(ids, documents, looped, context))

    def forward(
        self,
        ids: Tensor,
        targets: Tensor,
        ratios: Tensor | None = None,
        context: PassContext | None = None,
        documents: Tensor | None = None,
        looped: bool | None = None,
    ) -> Tensor:
        """ids, targets [B, T] -> mean nats per target, with training's cap; the rest as `hidden`.

        ratios [B, T, K] add the mixture's loss.
        """
        hidden = self.hidden(ids, documents, looped, context)
        logits = self.head(hidden, scoring=False).flatten(0, 1)  # [B * T, V]
        nats = F.cross_entropy(logits, targets.flatten(), reduction="none")
        if ratios is None:
            return nats.mean()
        gate = self.alpha_head(hidden).flatten(0, 1)
        p = mix(gate, (-nats).exp(), ratios.flatten(0, 1))
        return nats.mean() - MIXER_LOSS_WEIGHT * p.clamp(min=1e-12).log().mean()


def _macs(module: nn.Module) -> int:
    """Multiply-accumulate parameters of a module's matrices."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, Linear))


def training_flops(cfg: Config, model: GPT, looped: bool = False) -> float:
    """FLOPs of a trained token: 6 per multiply-accumulate parameter, causal half of attention.

    Repeated layers count as often as they are executed.
    """
    steps = model.looped_steps if looped else model.plain_steps
    matrices = _macs(model) - _macs(model.blocks)
    matrices += sum(_macs(model.blocks[step.block]) for step in steps)
    if cfg.tie_embeddings:
        matrices += cfg.vocab_size * cfg.model_dim  # the output matrix
    return 6.0 * matrices + 6.0 * len(steps) * cfg.train_seq_len * cfg.model_dim


def build_model(cfg: Config, rt: Runtime, weights: Mapping[str, Tensor] | None = None) -> GPT:
    """The model on its device, at its start or with weights; InputError if these do not fit."""
    # meta: allocates nothing, whatever shapes an artifact claims
    with torch.device("cpu" if weights is None else "meta"):
        model = GPT(cfg, rt.profile.dtype, rt.attention, rt.packed_attention)
    if weights is not None:
        with input_error_from("artifact: its tensors do not fit its settings", RuntimeError):
            model.load_state_dict(weights, strict=True, assign=True)
    return model.to(rt.device)


# ==================================================================================================
# 6. OPTIMIZER - Muon, which parameter goes where, schedules, averages of the weights.
#    Uses sections 1-2 and the names of section 5.
# ==================================================================================================


# Coefficients of the odd quintic a x + b x^3 + c x^5, which brings singular values towards one.
QUINTIC = ((3.4445, -4.7750, 2.0315),)  # steep at zero, hovers between 0.7 and 1.2 (Jordan 2024)
POLAR_EXPRESS = (  # the best for each of five iterations (2505.16932), as PR 1787 has them
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def newton_schulz(
    matrices: Tensor, steps: int, coefficients: Sequence[tuple[float, ...]] = QUINTIC
) -> Tensor:
    """Approximates the orthogonal factor of each matrix: [N, R, C] -> same shape.

    coefficients: of each iteration; the last ones go on.
    """
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
    for step in range(steps):
        a, b, c = coefficients[min(step, len(coefficients) - 1)]
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


def _on_one_process(function: Callable[[Tensor], Tensor], stack: Tensor) -> Tensor:
    return function(stack)


class Muon(torch.optim.Optimizer):
    """Momentum, then orthogonalised updates, for matrices [R, C] only (Jordan 2024).

    Matrices of equal shape are stacked; given a runtime, its processes share the stack.
    row_normalize: rows of an update have length one before that (MuonEq-R, PR 1217).
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float,
        backend_steps: int = 5,
        weight_decay: float = 0.0,
        runtime: Runtime | None = None,
        row_normalize: bool = False,
        polar_express: bool = False,
    ):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "backend_steps": backend_steps})
        self.map_shares = runtime.map_shares if runtime else _on_one_process
        self.newton_schulz = runtime.compile(newton_schulz) if runtime else newton_schulz
        self.row_normalize = row_normalize
        self.coefficients = POLAR_EXPRESS if polar_express else QUINTIC

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            orthogonalize = functools.partial(
                self.newton_schulz, steps=group["backend_steps"], coefficients=self.coefficients
            )
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p] = self.state[p] or {"momentum": torch.zeros_like(p)}
                    by_shape.setdefault(p.shape, []).append(p)
            for (rows, columns), params in by_shape.items():
                grads = [p.grad for p in params]
                buffers = [self.state[p]["momentum"] for p in params]
                torch._foreach_mul_(buffers, group["momentum"])
                torch._foreach_add_(buffers, grads)
                updates = torch._foreach_add(grads, buffers, alpha=group["momentum"])  # Nesterov
                stack = torch.stack(updates)
                if self.row_normalize:
                    stack = F.normalize(stack, dim=-1)
                stack = self.map_shares(orthogonalize, stack)
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                step_size = group["lr"] * math.sqrt(max(1, rows / columns))
                torch._foreach_add_(params, list(stack.to(params[0].dtype)), alpha=-step_size)


# --- which parameter goes where -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ParamGroup:
    """Parameters that share an optimizer, a rate and a decay."""

    optimizer: str  # muon or adam
    lr: str  # names of settings
    weight_decay: str


PARAM_GROUPS = {
    "head": ParamGroup("adam", "head_lr", "embed_wd"),
    "embed": ParamGroup("adam", "embed_lr", "embed_wd"),
    "tables": ParamGroup("adam", "tied_embed_lr", "embed_wd"),
    "scalars": ParamGroup("adam", "scalar_lr", "adam_wd"),
    "matrices": ParamGroup("muon", "matrix_lr", "muon_wd"),
}


def group_of(name: str, p: Tensor, cfg: Config) -> str:
    """The first group that takes a parameter; ValueError if none does."""
    if cfg.bigram_optim and name.startswith("bigram.") and p.ndim == 2:
        return cfg.bigram_optim
    takes = {
        "head": name == "lm_head.weight",
        "embed": name == "tok_emb.weight" and not cfg.tie_embeddings,
        "tables": name.endswith(("tok_emb.weight", ".embed.weight")),
        "scalars": p.ndim < 2 or name.endswith((*CONTROL_NAMES, "alpha_head.weight")),
        "matrices": p.ndim == 2,
    }
    for group, its in takes.items():
        if its:
            return group
    raise ValueError(f"no optimizer group takes {name} {tuple(p.shape)}; see `group_of`")


def parameter_groups(model: nn.Module, cfg: Config) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Group name -> (name, parameter) pairs; every parameter of the model is in one of them."""
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {group: [] for group in PARAM_GROUPS}
    for name, p in model.named_parameters():
        if p.requires_grad:  # the caps of scoring stay as they are
            groups[group_of(name, p, cfg)].append((name, p))
    return groups


def build_optimizers(model: nn.Module, cfg: Config, rt: Runtime) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for the rest; base_lr is a rate before the schedule's factor."""
    groups: dict[str, list[dict[str, Any]]] = {"muon": [], "adam": []}
    for name, members in parameter_groups(model, cfg).items():
        rule = PARAM_GROUPS[name]
        lr = getattr(cfg, rule.lr)
        group = {"params": [p for _, p in members], "lr": lr, "base_lr": lr}
        group["weight_decay"] = getattr(cfg, rule.weight_decay)
        if members:
            groups[rule.optimizer].append(group)
    muon = Muon(
        groups["muon"],
        cfg.matrix_lr,
        cfg.muon_momentum,
        cfg.muon_backend_steps,
        runtime=rt,
        row_normalize=cfg.muon_row_normalize,
        polar_express=cfg.muon_polar_express,
    )
    adam = torch.optim.AdamW(
        groups["adam"],
        betas=(cfg.beta1, cfg.beta2),
        eps=cfg.adam_eps,
        fused=rt.device.type not in ("mps", "meta"),
    )
    return [muon, adam]


def bind_flat_gradients(params: Sequence[nn.Parameter]) -> Tensor:
    """Makes every p.grad a view of one buffer: one reduction, one norm.

    Gradients are zeroed in the buffer: zero_grad would detach them from it.
    """
    sizes = [p.numel() for p in params]
    buffer = torch.zeros(sum(sizes), device=params[0].device)
    for p, part in zip(params, buffer.split(sizes)):
        p.grad = part.view_as(p)
    return buffer


def clip_gradients(buffer: Tensor, max_norm: float) -> None:
    """Scales the gradients down to this norm at most. No host synchronisation."""
    buffer.mul_((max_norm / (buffer.norm() + 1e-6)).clamp(max=1.0))


# --- schedules: pure functions of the settings and of how far the run is --------------------------


@dataclasses.dataclass(frozen=True)
class Moment:
    """Where a run is."""

    step: int  # steps done
    steps_left: float
    share: float  # of the run that is over


def warmdown(cfg: Config, now: Moment) -> float:
    """Factor of every learning rate: 1, then straight towards 0 until the end, MIN_LR at least.

    Over the last WARMDOWN_ITERS steps, or the last WARMDOWN_FRAC of the run.
    """
    factor = 1.0
    if cfg.warmdown_frac:
        factor = (1 - now.share) / cfg.warmdown_frac
    elif cfg.warmdown_iters:
        factor = now.steps_left / cfg.warmdown_iters
    return min(1.0, max(factor, cfg.min_lr))


def momentum_warmup(cfg: Config, now: Moment) -> float:
    """Muon's momentum: straight from its start value to MUON_MOMENTUM."""
    share = 1.0
    if cfg.muon_momentum_warmup_steps:
        share = min(now.step / cfg.muon_momentum_warmup_steps, 1.0)
    return (1 - share) * cfg.muon_momentum_warmup_start + share * cfg.muon_momentum


# Field of the optimizers' parameter groups -> its value, as a factor of the group's base_<field> if
# it has one.
SCHEDULES: dict[str, Callable[[Config, Moment], float]] = {
    "lr": warmdown,
    "momentum": momentum_warmup,
}


class WeightAverager:
    """Averages of the weights in float32: exponential (EMA), of every so many steps (SWA).

    With both on, the outcome is half of each.
    """

    def __init__(self, model: nn.Module, cfg: Config):
        self.cfg = cfg
        self.live = list(model.parameters())
        self.means: dict[str, list[Tensor]] = {}
        self.swa_count = 0
        if cfg.ema_decay and not cfg.ema_start:  # with the initial weights (PR 859)
            self._mean("ema")

    def _mean(self, name: str) -> list[Tensor]:
        """The average of this name; it begins with the weights as they are."""
        if name not in self.means:
            self.means[name] = [p.detach().clone() for p in self.live]
        return self.means[name]

    @torch.no_grad()
    def update(self, step: int, share: float) -> None:
        """After step number `step`; share: how much of the run is over."""
        cfg = self.cfg
        if cfg.ema_decay and share >= cfg.ema_start:
            torch._foreach_lerp_(self._mean("ema"), self.live, 1 - cfg.ema_decay)
        if cfg.swa_every and share >= cfg.swa_start and step % cfg.swa_every == 0:
            self.swa_count += 1
            torch._foreach_lerp_(self._mean("swa"), self.live, 1 / self.swa_count)

    def restore(self, means: dict[str, list[Tensor]], swa_count: int) -> None:
        """Goes on with what a checkpoint holds; InputError if that is not of this model."""
        wanted = {"ema": self.cfg.ema_decay, "swa": self.cfg.swa_every}
        wanted = {name for name, on in wanted.items() if on}
        shapes = [p.shape for p in self.live]
        fit = all([w.shape for w in weights] == shapes for weights in means.values())
        check(fit and means.keys() <= wanted, f"its averages ({', '.join(means)}) do not fit")
        check(means.keys() >= self.means.keys(), "has no EMA, which began with the first step")
        check(type(swa_count) is int and swa_count >= 0, f"swa_count {swa_count!r}")
        check(("swa" in means) == (swa_count > 0), f"{swa_count} weights averaged in {list(means)}")
        device = self.live[0].device
        self.means = {name: [w.to(device) for w in means[name]] for name in means}
        self.swa_count = swa_count

    @torch.no_grad()
    def apply(self) -> None:
        """The model's weights become the average, if there is one yet."""
        # The first average replaces the weights, a second is averaged with it.
        for share, mean in zip((1.0, 0.5), self.means.values()):
            torch._foreach_lerp_(self.live, mean, share)


# ==================================================================================================
# 7. QUANTIZERS - weights as whole numbers and back: pure functions of a matrix.
#    Uses section 1, and names and steps of section 5.
# ==================================================================================================


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What quantizers know of how a model uses its matrices: means over training tokens.

    hessians: name -> [C, C], x x^T at a matrix's input (of a table: g g^T at its output).
    importance: name -> [R], square of the loss's gradient g at its rows' outputs (of a table: how
    often a row is read). Only QUANT_STEP asks for importance, and for tables.
    """

    hessians: Mapping[str, Tensor]
    importance: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    factors: dict[Any, InverseFactor] = dataclasses.field(default_factory=dict)  # made once

    def __post_init__(self) -> None:
        for kind, found in (("Hessian", self.hessians), ("importance", self.importance)):
            for name, values in found.items():
                check(values.isfinite().all(), f"{name}: its {kind} has values that are not finite")

    def factor(self, name: str, damp: float) -> InverseFactor:
        """Of a matrix's Hessian; InputError, by name, if it cannot be factored."""
        if (name, damp) not in self.factors:
            unusable = f"{name}: its Hessian cannot be factored at GPTQ_DAMP={damp}"
            with input_error_from(unusable, torch.linalg.LinAlgError):
                self.factors[name, damp] = inverse_factor(self.hessians[name], damp)
        return self.factors[name, damp]


@dataclasses.dataclass(frozen=True)
class InverseFactor:
    """What GPTQ needs of a Hessian: the order of the columns, and U, the upper Cholesky factor of
    its inverse in that order (both [C, C] float64). Columns without any input are unused [C].
    """

    order: Tensor
    upper: Tensor
    unused: Tensor

    @property
    def conditional(self) -> Tensor:
        """U_jj of every column [C], where it stands in the matrix.

        Its inverse is the root of what an error costs that later columns cannot make up for.
        """
        return self.upper.diagonal()[self.order.argsort()]


def inverse_factor(hessian: Tensor, damp: float) -> InverseFactor:
    """Of hessian [C, C], a mean of x x^T; damp: share of its mean added to its diagonal.

    Columns are in the order of a falling diagonal, as GPTQ (2210.17323) rounds them.
    """
    hessian = hessian.double().clone()
    unused = hessian.diagonal() == 0
    hessian.diagonal()[unused] = 1
    order = hessian.diagonal().argsort(descending=True, stable=True)
    hessian = hessian[order][:, order]
    hessian.diagonal().add_(damp * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return InverseFactor(order, torch.linalg.cholesky(inverse, upper=True), unused)


def gptq(
    w: Tensor,
    steps: Tensor,
    factors: Sequence[InverseFactor],
    rounded: Callable[[Tensor], Tensor],
    block: int = 128,
) -> Tensor:
    """Codes for M matrices w [M, R, C] at steps [M, R, C], with a small error in w @ x; float64.

    Each column is rounded, and later ones make up for its error; a column that is never used
    becomes 0 (GPTQ, 2210.17323). rounded: a column in steps [M, R] -> codes.
    """
    order = torch.stack([factor.order for factor in factors])[:, None]  # [M, 1, C]
    inverse = torch.stack([factor.upper for factor in factors])
    unused = torch.stack([factor.unused for factor in factors])[:, None]
    ordered = order.expand_as(w)
    w = w.double().masked_fill(unused, 0).gather(2, ordered)
    steps = steps.double().expand(w.shape).gather(2, ordered)
    q = torch.empty_like(w)
    for lo in range(0, w.size(2), block):
        hi = min(lo + block, w.size(2))
        errors = torch.empty(*w.shape[:2], hi - lo, dtype=torch.float64)
        for j in range(lo, hi):
            step = steps[:, :, j]
            q[:, :, j] = rounded(w[:, :, j] / step)
            error = (w[:, :, j] - q[:, :, j] * step) / inverse[:, j, j, None]
            w[:, :, j:hi] -= error[:, :, None] * inverse[:, None, j, j:hi]
            errors[:, :, j - lo] = error
        w[:, :, hi:] -= errors @ inverse[:, lo:hi, hi:]
    return q.gather(2, order.argsort(2).expand_as(q))


@dataclasses.dataclass(frozen=True)
class Part:
    """One array of a packed tensor: the stream of the payload that it is in, its type and shape."""

    stream: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class Quantizer:
    """A tensor as arrays (`fit`), what these are (`layout`), and back (`decode`)."""

    def spreads(self, arrays: Sequence[Any]) -> list[np.ndarray]:
        """For each array of codes: log2, in eighths, of a code's expected size, but for a constant.

        Broadcasts to the codes, and is told without them, so that a decoder can tell.
        """
        return []


class RowInt(Quantizer):
    """Whole numbers of a few bits, one float16 scale a row.

    Each row is clipped at so many of its standard deviations (SD clip, PR 1394), or at that of the
    tried levels that has the least error.
    """

    def __init__(self, bits: int):
        self.qmax = 2 ** (bits - 1) - 1

    def layout(self, shape: Sequence[int]) -> tuple[Part, ...]:
        """The arrays that fit gives for a matrix [R, C]."""
        rows, columns = shape
        return Part("codes", "|i1", (rows, columns)), Part("scales", "<f2", (rows, 1))

    def fit(
        self,
        w: Tensor,
        cfg: Config,
        hessian: Tensor | None = None,
        sigmas: float = 0.0,
        factor: InverseFactor | None = None,
    ) -> tuple[Tensor, ...]:
        """w [R, C] -> q int8 [R, C], scales float16 [R, 1].

        hessian [C, C]: its diagonal weighs the clip search, then GPTQ rounds; None: plain rounding.
        sigmas: where to clip, in standard deviations of a row; 0 = the search. factor: the
        Hessian's, if known.
        """
        if cfg.prune_pct:
            smallest = float(np.quantile(w.abs().numpy(), cfg.prune_pct))
            w = w * (w.abs() >= smallest)
        if sigmas:
            scales = self._deviation_scales(w, sigmas)
        else:
            scales = self._searched_scales(w, cfg, hessian)
        if hessian is None:
            q = self._rounded(w / scales)
        else:
            factor = factor or inverse_factor(hessian, cfg.gptq_damp)
            (q,) = gptq(w[None], scales[None], [factor], self._rounded)
            q = q * (w != 0)  # what is pruned stays so
        return q.to(torch.int8), scales.half()

    def _rounded(self, y: Tensor) -> Tensor:
        return y.round().clamp(-self.qmax, self.qmax)

    def _deviation_scales(self, w: Tensor, sigmas: float) -> Tensor:
        """Steps [R, 1] as float16 has them; a row that would be clipped throughout is not."""
        scale = sigmas * w.std(1, keepdim=True, correction=min(1, w.size(1) - 1)) / self.qmax
        lost = w.abs().amin(1, keepdim=True) > scale * self.qmax
        scale = torch.where(lost, row_scales(w, self.qmax, False), scale)
        return scale.clamp(2.0**-24, 65504.0).half().float()

    def _searched_scales(self, w: Tensor, cfg: Config, hessian: Tensor | None) -> Tensor:
        """Steps [R, 1] as float16 has them, each the best of QUANT_CLIP_STEPS for its row."""
        weights = 1 if hessian is None else hessian.diagonal()
        least = 1 / self.qmax if cfg.quant_scale_floor else 2.0**-24
        scales = torch.zeros(w.size(0), 1)
        best = torch.full((w.size(0), 1), math.inf)
        largest = row_scales(w, self.qmax, False)
        for step in range(cfg.quant_clip_steps):
            # From the row's maximum down to 40 % of it.
            scale = largest * (1 - 0.6 * step / cfg.quant_clip_steps)
            scale = scale.clamp(least, 65504.0).half().float()
            error = ((self._rounded(w / scale) * scale - w).square() * weights).sum(1, keepdim=True)
            better = error < best
            best = torch.where(better, error, best)
            scales = torch.where(better, scale, scales)
        return scales

    def spreads(self, arrays: Sequence[Any]) -> list[np.ndarray]:
        """All alike."""
        return [np.zeros((1, 1), np.int64)]

    def decode(self, q: Tensor, scales: Tensor) -> Tensor:
        """The weights [R, C], float32."""
        return q.float().mul_(scales.float())


class AsFloat(Quantizer):
    """A float type as it is."""

    def __init__(self, dtype: str, torch_dtype: torch.dtype):
        self.dtype = dtype
        self.torch_dtype = torch_dtype

    def layout(self, shape: Sequence[int]) -> tuple[Part, ...]:
        """The array that fit gives for a tensor of any shape."""
        return (Part("floats", self.dtype, tuple(shape)),)

    def fit(self, w: Tensor, cfg: Config, hessian: Tensor | None = None) -> tuple[Tensor, ...]:
        """The tensor in this type."""
        return (w.to(self.torch_dtype),)

    def decode(self, values: Tensor) -> Tensor:
        """The weights, float32."""
        return values.float()


class StepInt(Quantizer):
    """Whole numbers without a limit; the step is its column's times its row's, a byte each.

    Water-filling (WaterSIC, 2603.04956): with U of `InverseFactor`, the loss of a matrix is the sum
    of importance_i (error_ij / U_jj)^2 over rows i and columns j. So the cheapest codes of a loss
    have steps c x U_jj x importance_i^-1/2, with one c for the whole model.
    """

    def __init__(self, dtype: str):
        self.dtype = dtype

    def layout(self, shape: Sequence[int]) -> tuple[Part, ...]:
        """The arrays that fit gives for a matrix [R, C]."""
        rows, columns = shape
        steps = Part("steps", "|i1", (columns,)), Part("steps", "|i1", (rows,))
        return Part("codes", self.dtype, (rows, columns)), *steps

    def fit(self, w: Tensor, cfg: Config, hessian: Tensor | None = None) -> tuple[Tensor, ...]:
        """One matrix w [R, C] at c = QUANT_STEP, all of its rows of importance 1; see fit_many."""
        factor = inverse_factor(torch.eye(w.size(1)) if hessian is None else hessian, cfg.gptq_damp)
        return self.fit_many(w[None], [factor], torch.ones(1, len(w)), cfg.quant_step)[0]

    def fit_many(
        self, w: Tensor, factors: Sequence[InverseFactor], importance: Tensor, c: float
    ) -> list[tuple[Tensor, ...]]:
        """M matrices w [M, R, C] -> of each q int16 [R, C], exponents of steps int8 [C] and [R].

        importance [M, R]: mean square of the loss's gradient at the rows' outputs. A row's is at
        most 256 times more or less than their mean, since it is an estimate. c: root of 24 times
        the nats that a weight may cost. TooFine if a code needs more than two bytes.
        """
        mean = importance.double().mean(1, keepdim=True).clamp_min(1e-30)
        relative = (importance.double() / mean).clamp(1 / 256, 256)
        conditional = torch.stack([factor.conditional for factor in factors])
        columns = exponent(c * conditional / mean.sqrt())
        rows = exponent(relative**-0.5)
        steps = step_of(rows)[:, :, None] * step_of(columns)[:, None]
        q = gptq(w, steps, factors, torch.round)
        if q.abs().max() > 32767 or columns.min() == -128:
            raise TooFine(f"codes of more than 16 bits; QUANT_STEP={c:g} is too fine")
        return list(zip(q.to(torch.int16), columns, rows))

    def spreads(self, arrays: Sequence[Any]) -> list[np.ndarray]:
        """Larger where steps are smaller."""
        columns, rows = (np.asarray(array, np.int64) for array in arrays[1:])
        return [-columns - rows[:, None]]

    def decode(self, q: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
        """The weights [R, C], float32."""
        return q.float() * step_of(columns) * step_of(rows)[:, None]


# 2^(0/8) to 2^(7/8), float32. Read, not computed, so that no machine's rounding decides; whole
# octaves only change the exponent.
EIGHTHS = np.array(
    [1, 1.0905077, 1.1892071, 1.2968396, 1.4142135, 1.5422108, 1.6817929, 1.8340081], np.float32
)


def exponent(step: Tensor) -> Tensor:
    """log2 of a step in eighths, as one byte."""
    return (8 * step.log2()).round().clamp(-128, 127).to(torch.int8)


def step_of(exponents: Tensor) -> Tensor:
    """The steps, float32, the same on every machine."""
    eighths = exponents.numpy().astype(np.int32)
    return torch.from_numpy(np.ldexp(EIGHTHS[eighths & 7], eighths >> 3))


class LowRankCorrected(Quantizer):
    """Another quantizer, and two thin factors whose product makes up for its largest errors.

    LQER (2402.02446) as PR 1797 has it: the factors are rounded without symmetry, the first to 2
    bits at one float16 scale, the second at one for every few neighbours.
    """

    def __init__(self, base: RowInt | StepInt, cfg: Config):
        self.base = base
        self.rank = cfg.lqer_rank
        self.group = cfg.lqer_asym_group
        self.levels = 2 ** (cfg.lqer_factor_bits - 1)

    def layout(self, shape: Sequence[int]) -> tuple[Part, ...]:
        """The arrays of the other quantizer, then those that factors gives."""
        rows, columns = shape
        rank = min(self.rank, rows, columns)
        groups = -(-rank * columns // self.group)
        return (
            *self.base.layout(shape),
            Part("codes", "|i1", (rows, rank)),
            Part("scales", "<f2", (1,)),
            Part("codes", "|i1", (rank, columns)),
            Part("scales", "<f2", (groups, 1)),
        )

    def factors(self, error: Tensor) -> tuple[Tensor, ...]:
        """What is still missing [R, C] -> [R, rank] and its scale, [rank, C] and its scales."""
        u, s, v = torch.linalg.svd(error, full_matrices=False)
        rank = min(self.rank, len(s))
        first = u[:, :rank] * s[:rank]
        scale = (first.abs().max() / 1.5).clamp(2.0**-24).half()
        q_first = (first / scale.float()).round().clamp(-2, 1)
        groups = self._grouped(v[:rank])
        highest = groups.abs().amax(1, keepdim=True)
        scales = (highest / (self.levels - 0.5)).clamp(2.0**-24).half()
        q_groups = (groups / scales.float()).round().clamp(-self.levels, self.levels - 1)
        q_second = q_groups.flatten()[: rank * error.size(1)].view(rank, -1)
        return q_first.to(torch.int8), scale.view(1), q_second.to(torch.int8), scales

    def _grouped(self, factor: Tensor) -> Tensor:
        """The flattened factor as rows of neighbours that share a scale; the last is padded."""
        group = min(self.group, factor.numel())
        return F.pad(factor.flatten(), (0, -factor.numel() % group)).view(-1, group)

    def spreads(self, arrays: Sequence[Any]) -> list[np.ndarray]:
        """The other quantizer's; the factors' codes are all alike."""
        alike = np.zeros((1, 1), np.int64)
        return [*self.base.spreads(arrays[:-4]), alike, alike]

    def decode(self, *arrays: Tensor) -> Tensor:
        """The weights [R, C], float32."""
        *base, q_first, scale, q_second, scales = arrays
        second = self._grouped(q_second.float()) * scales.float()
        second = second.flatten()[: q_second.numel()].view(q_second.shape)
        first = q_first.float() * scale.float()
        w = self.base.decode(*base)
        for column, row in zip(first.T, second):  # no matmul, whose order of sums is not fixed
            w = w + column[:, None] * row
        return w


QUANTIZERS: dict[str, Any] = {
    "step8": StepInt("|i1"),
    "step16": StepInt("<i2"),
    "f16": AsFloat("<f2", torch.float16),
    "f32": AsFloat("<f4", torch.float32),
    **{f"int{bits}": RowInt(bits) for bits in range(2, 9)},
}


def quantizer(kind: str, cfg: Config) -> Any:
    """The quantizer of a name in an artifact's table: int6, f16, int6+lqer; else a KeyError."""
    if kind.endswith("+lqer") and not kind.startswith("f"):
        return LowRankCorrected(QUANTIZERS[kind.removesuffix("+lqer")], cfg)
    return QUANTIZERS[kind]


# A part of a tensor's name -> its role; the first that is there counts.
ROLE_MARKS = {
    "tok_emb": "embed",
    "lm_head": "embed",
    ".embed.": "table",
    "gate": "gate",
    ".attn.": "attn",
    ".mlp.": "mlp",
}


def tensor_role(name: str) -> str:
    """embed, table, gate, attn, mlp or other: what QUANT_POLICY speaks of."""
    return next((role for mark, role in ROLE_MARKS.items() if mark in name), "other")


def integer_bits(name: str, w: Tensor, cfg: Config) -> int:
    """Bits of a tensor's whole numbers by the policy; 0 = a float, or whole numbers without limit.

    Gains and small matrices stay floats; gates too, unless the policy gives them 2 to 8 bits.
    """
    bits_of_role = dict(re.findall(r"(\w+):(\d+)", cfg.quant_policy))
    role = tensor_role(name)
    if w.ndim == 2 and role == "gate":
        return int(bits_of_role.get(role, 0)) % 16
    if not is_large(name, w, cfg):
        return 0
    return int(bits_of_role.get(role, 0 if cfg.quant_step else cfg.quant_bits))


def is_large(name: str, w: Tensor, cfg: Config) -> bool:
    """Whether a tensor is a matrix, and no gain by role, of more than KEEP_FLOAT_MAX_NUMEL."""
    is_gain = name.endswith(CONTROL_NAMES)
    is_gain |= name.startswith("alpha_head") and cfg.quant_step > 0  # calibration does not see it
    return w.ndim == 2 and not is_gain and w.numel() > cfg.keep_float_max_numel


def clip_sigmas(name: str, cfg: Config) -> float:
    """Where the rows of a quantized matrix are clipped, in standard deviations; 0 = by search."""
    usual = cfg.matrix_clip_sigmas
    of_role = {
        "attn": cfg.attn_clip_sigmas or usual,
        "mlp": cfg.mlp_clip_sigmas or usual,
        "embed": cfg.embed_clip_sigmas or usual,
        "gate": 0.0,  # rows so short have no value that many deviations out
    }
    return of_role.get(tensor_role(name), usual)


def quantizer_of(name: str, w: Tensor, cfg: Config) -> str:
    """The quantizer of a tensor: gains float32, small matrices float16, the rest whole numbers.

    QUANT_POLICY's gate:16 makes gates float16, too.
    """
    bits = integer_bits(name, w, cfg)
    if bits:
        return f"int{bits}"
    if is_large(name, w, cfg):
        return "step16"
    small_gate = tensor_role(name) == "gate" and "gate:16" in cfg.quant_policy
    half = w.ndim == 2 and (small_gate or not name.endswith(CONTROL_NAMES))
    return "f16" if half and w.abs().max() < 65504 else "f32"


def quantized_matrices(model: GPT, cfg: Config) -> list[tuple[Linear, int]]:
    """What late fake quantization and the quantization penalty act on, and its highest number."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            bits = integer_bits(f"{name}.weight", module.weight, cfg)
            if bits:
                found.append((module, QUANTIZERS[f"int{bits}"].qmax))
    return found


def quantization_penalty(matrices: Sequence[tuple[Linear, int]], cfg: Config) -> Tensor:
    """CROWN-Q (PR 859): lambda / 12 times the sum of mean(w^2 step^2), the steps held fixed."""
    alike: dict[Any, list[Tensor]] = {}  # matrices of one shape are one operation
    for linear, qmax in matrices:
        alike.setdefault((linear.weight.shape, qmax), []).append(linear.weight)
    parts = []
    for (_, qmax), weights in alike.items():
        w = torch.stack(weights)
        parts.append((w * row_scales(w, qmax, False)).square().mean((1, 2)).sum())
    return cfg.crown_q_lambda / 12 * torch.stack(parts).sum()


# ==================================================================================================
# 8. TRAINING - the clock, one step, the loop (`train`), checkpoints, calibration.
#    Uses sections 1-7. Validation comes in as a function.
# ==================================================================================================


@dataclasses.dataclass(frozen=True)
class StepReport:
    """What all processes know of a finished step, so that their decisions need no agreement."""

    step: int = 0
    elapsed: float = 0.0  # rank 0's training seconds
    loss: float = math.nan  # mean over all processes
    diverged: bool = False  # this or an earlier loss was not finite
    stop: bool = False  # some process was asked to stop
    save: bool = False  # some process was asked for a checkpoint


class Clock:
    """Training seconds without pauses, and what follows from them: pace, steps left, the end."""

    def __init__(self, cfg: Config, lag: int, now: Callable[[], float] = time.perf_counter):
        self.cfg = cfg
        self.lag = lag
        self.now = now
        self.drives = cfg.train_limit > 0
        self.limit = cfg.max_wallclock_seconds - cfg.gptq_reserve_seconds
        self.origin = now()
        self.before_first_step = 0.0  # seconds of them that no step took, so that they tell no pace
        self.durations: deque[float] = deque(maxlen=32)
        self.last = StepReport()

    def start(self) -> None:
        """The clock runs; a resumed run's goes on where it was."""
        self.origin = self.now() - self.last.elapsed

    def elapsed(self) -> float:
        """Training seconds so far."""
        return self.now() - self.origin

    def take(self, report: StepReport) -> None:
        """Learns how long a step took."""
        self.durations.append(report.elapsed - self.last.elapsed)
        self.last = report

    def pace(self) -> float:
        """Seconds a step took so far; before the first is known, hardly any: full speed."""
        return max(self.last.elapsed - self.before_first_step, 0.0) / max(self.last.step, 1) or 1e-9

    def steps_left(self, step: int) -> float:
        """Steps until the end, from what all processes know."""
        if not self.drives:
            return self.cfg.iterations - step
        by_time = self.last.step + (self.limit - self.last.elapsed) / self.pace()
        return min(self.cfg.iterations, by_time) - step

    def out_of_time(self) -> bool:
        """Whether one more step could end after the limit.

        Counted are the steps in flight at the last report (which is sent off before an older one is
        awaited, so one more than the lag), those since then, and the next: a tenth more than the
        slow ones of late took, and one as slow as the slowest (a stall).
        """
        durations = sorted(self.durations) or [self.pace()]  # after a resume none is known yet
        slowest, slow = durations[-1], durations[len(durations) * 9 // 10]
        under_way = 2 * self.lag + 1 if self.lag else 0
        needed = 1.1 * (under_way * slow + slowest)
        return self.drives and self.last.elapsed + needed > self.limit

    def progress(self, step: int) -> float:
        """Share of the run that is over."""
        by_count = step / max(1, self.cfg.iterations)
        return max(self.last.elapsed / self.limit, by_count) if self.drives else by_count


class Interrupted(BaseException):
    """The run was asked to end by the signal that the text names."""


class Requests:
    """What signals ask for: SIGTERM, SIGINT and SIGHUP to end, SIGUSR1 to save.

    They are noted; at_once: the end is an Interrupted, raised wherever the program is. A SIGHUP
    that is ignored stays so (nohup).
    """

    def __init__(self, at_once: bool = False) -> None:
        self.at_once = at_once
        self.stop = False
        self.save = False

    def _on_signal(self, number: int, frame: Any) -> None:
        asked_before = self.stop
        name = signal.Signals(number).name
        self.stop |= name != "SIGUSR1"
        self.save = True
        if self.at_once and self.stop and not asked_before:
            raise Interrupted(name)

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Listens inside the block."""
        names = {"SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"} & vars(signal).keys()
        if "SIGHUP" in names and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
            names.remove("SIGHUP")
        numbers = [getattr(signal, name) for name in names]
        before = [signal.signal(number, self._on_signal) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before):
                signal.signal(number, handler)


def packed_context(
    model: GPT, rt: Runtime, ids: np.ndarray, longest: int, room: int, cut: int
) -> PassContext:
    """What keeps attention inside a row's documents, and inside pieces of so many tokens.

    ids [1, T]. Shapes are for pieces of `room` tokens at most, and as many as `cut` gives.
    """
    starts = segment_starts(ids.reshape(-1), model.cfg.bos_id, longest)
    segments = segments_of(starts, ids.size, room, cut, rt.pads_documents)
    row = torch.empty(ids.shape, dtype=torch.int64, device=rt.device)
    return model.context(row, documents=rt.put_segments(segments))


# Before that, one slow step makes the end look near, and fake quantization would stay on for good.
TRUSTED_PACE_STEPS = 50


class Trainer:
    """Model, optimizers and clock of one run; `step` is one optimizer step."""

    def __init__(
        self,
        cfg: Config,
        rt: Runtime,
        log: RunLog,
        model: GPT,
        stream: TokenStream,
        now: Callable[[], float] = time.perf_counter,
    ):
        self.cfg = cfg
        self.rt = rt
        self.log = log
        self.model = model
        self.stream = stream
        self.clock = Clock(cfg, rt.profile.lag, now)
        self.requests = Requests()
        self.compiled_model = rt.compile(model)
        self.rows = cfg.micro_tokens // cfg.row_tokens  # of a micro-batch
        no_start = (cfg.bos_id + 1) % cfg.vocab_size
        self.nothing = np.full((self.rows, cfg.row_tokens), no_start, np.int64)
        row = torch.empty(1, cfg.row_tokens, dtype=torch.int64, device=rt.device)
        self.context = None if cfg.train_doc_mask else model.context(row)
        self.context_rows = cfg.context_rows
        self.shortest = min(length for length, _ in self.context_rows)
        self.longest = cfg.train_seq_len  # tokens of a segment, now
        trained = [p for p in model.parameters() if p.requires_grad]
        self.gradients = bind_flat_gradients(trained)
        self.optimizers = build_optimizers(model, cfg, rt)
        self.quantized = quantized_matrices(model, cfg)
        # This process's share: gradients are summed.
        self.penalized = self.quantized[rt.rank :: rt.world] if cfg.crown_q_lambda else []
        self.averager = WeightAverager(model, cfg) if cfg.ema_decay or cfg.swa_every else None
        self.ngram_table = FrozenNgramTable(cfg, rt.device) if cfg.mixer_head else None
        self.steps_done = 0
        self.steps_looped = 0  # of them, with depth recurrence
        self.seconds = 0.0  # that training took
        self.faking = False  # fake quantization is on
        self.problem = ""  # why this process could not read its tokens
        self.last_shown = 0  # step whose loss was logged
        # Steps whose report is not read yet.
        self.in_flight: deque[tuple[int, PendingSum]] = deque()
        self.micro_batches = cfg.micro_batches  # of a step, over all processes
        self.own_micro_batches = range(rt.rank, self.micro_batches, rt.world)

    def step(
        self,
        batch_of: Callable[[int], tuple[np.ndarray, np.ndarray]],
        steps_left: float,
        share: float,
    ) -> Tensor:
        """One optimizer step -> this process's part of the mean loss, which waits on the device.

        batch_of(n): ids and targets [B, T] of micro-batch n, counted over steps and processes.
        share: of the run that is over.
        """
        cfg, rt = self.cfg, self.rt
        now = Moment(self.steps_done, steps_left, share)
        values = {field: value(cfg, now) for field, value in SCHEDULES.items()}
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group in groups:
            for field in values.keys() & group:
                group[field] = group.get(f"base_{field}", 1.0) * values[field]

        rate = values["lr"]  # factor of the learning rates
        if self.clock.drives and self.steps_done < TRUSTED_PACE_STEPS:
            rate = 1.0
        if rate < cfg.late_qat_threshold and not self.faking:
            self.log.log(f"late_qat:enabled step:{self.steps_done} matrices:{len(self.quantized)}")
            self.fake_quantization(True)

        self.gradients.zero_()
        total = torch.zeros((), device=rt.device)
        for micro in self.own_micro_batches:
            try:
                ids, targets = batch_of(self.steps_done * self.micro_batches + micro)
            except InputError as error:  # told with the report: nobody waits for this process
                self.problem = self.problem or str(error)
                ids = targets = self.nothing
            context = self.context or self.packed_context(ids)
            ids = rt.put(ids)
            targets = rt.put(targets)
            ratios = self.ngram_table.ratios(ids, targets) if self.ngram_table else None
            loss = self.compiled_model(ids, targets, ratios, context) / self.micro_batches
            loss.backward()
            total += loss.detach()
        if self.penalized and rate < 0.5:
            penalty = quantization_penalty(self.penalized, cfg)
            penalty.backward()
            total += penalty.detach()

        rt.sum_(self.gradients)
        if cfg.grad_clip_norm:
            clip_gradients(self.gradients, cfg.grad_clip_norm)
        for optimizer in self.optimizers:
            optimizer.step()
        return total

    def packed_context(self, ids: np.ndarray) -> PassContext:
        """What keeps attention inside the documents of a row [1, T]."""
        # Shapes are for the longest and the most pieces of the whole run: a change is no new graph.
        room = self.cfg.train_seq_len
        return packed_context(self.model, self.rt, ids, self.longest, room, self.shortest)

    def follow(self, share: float) -> None:
        """Depth recurrence and largest segments as they are when that share of the run is over."""
        for length, until in reversed(self.context_rows):
            if share < until:
                self.longest = length
        before = len(self.model.steps)
        self.model.set_looping(share >= self.cfg.enable_looping_at)
        after = len(self.model.steps)
        if after > before:
            self.log.log(f"looping:enabled step:{self.steps_done} layers:{after}")

    def fake_quantization(self, on: bool) -> None:
        """Fake quantization on or off, of the matrices that will be packed as whole numbers."""
        self.faking = on
        for linear, qmax in self.quantized:
            linear.fake_qmax = qmax if on else 0
            linear.fake_floor = self.cfg.quant_scale_floor

    def send_report(self, loss: Tensor) -> None:
        """Starts the sum over processes of what the last step has to tell."""
        elapsed = self.clock.elapsed() if self.rt.main else 0.0
        values = [elapsed, loss, self.requests.stop, self.requests.save, bool(self.problem)]
        self.requests.save = False
        self.in_flight.append((self.steps_done, self.rt.start_sum(values)))

    def read_reports(self, lag: int) -> StepReport:
        """Takes in and logs the reports of all steps but the last `lag` -> the latest report.

        AgreedError if a process could not read its tokens.
        """
        while self.in_flight and self.in_flight[0][0] <= self.steps_done - lag:
            step, pending = self.in_flight.popleft()
            elapsed, loss, stop, save, failed = pending.result()  # sums: one NaN or infinity shows
            if failed:
                self.rt.agree(self.problem)
            last = self.clock.last
            report = StepReport(
                step=step,
                elapsed=elapsed,
                loss=loss,
                diverged=last.diverged or not math.isfinite(loss),
                stop=last.stop or stop > 0,
                save=last.save or save > 0,
            )
            self.clock.take(report)
            every = self.cfg.train_log_every
            self.show(every and (step <= 10 or step % every == 0) or report.diverged)
            seconds = round(report.elapsed, 4)
            self.log.metric(step=step, train_loss=report.loss, train_seconds=seconds)
        return self.clock.last

    def show(self, logged: Any) -> None:
        """The last report's line in the log, or as passing progress."""
        report = self.clock.last
        milliseconds = report.elapsed * 1000
        took = f"train_time:{milliseconds:.0f}ms step_avg:{milliseconds / report.step:.2f}ms"
        line = f"step:{report.step}/{self.cfg.iterations} train_loss:{report.loss:.4f} {took}"
        if logged:
            self.last_shown = report.step
            self.log.log(line)
        else:
            self.log.show_progress(
                line, time.perf_counter() - report.elapsed, self.clock.progress(report.step)
            )

    def reason_to_stop(self) -> str:
        """finished or wallclock_cap, which is logged; empty if another step is taken."""
        if self.steps_done >= self.cfg.iterations:
            return "finished"
        if not self.clock.out_of_time():
            return ""
        took = f"train_time:{self.clock.elapsed() * 1000:.0f}ms"
        steps = f"step:{self.steps_done}/{self.cfg.iterations}"
        self.log.log(f"stopping_early: wallclock_cap {took} {steps}")
        return "wallclock_cap"

    @contextlib.contextmanager
    def off_the_clock(self, phase: str) -> Iterator[None]:
        """Stops the training clock for something that touches no training data."""
        self.rt.sync()
        begin = self.clock.now()
        with self.log.phase(phase):
            yield
            self.rt.sync()
        self.clock.origin += self.clock.now() - begin


def warm_up(trainer: Trainer) -> None:
    """WARMUP_STEPS steps on random tokens, so that all is compiled; then all state is as before.

    Depth recurrence and late fake quantization have graphs of their own: a step more for each
    combination.
    """
    cfg = trainer.cfg
    rng = np.random.default_rng(0)
    shape = (trainer.rows, cfg.row_tokens)

    def random_batch(unit: int) -> tuple[np.ndarray, np.ndarray]:
        ids = rng.integers(0, cfg.vocab_size - 1, shape)
        ids += ids >= cfg.bos_id  # one document, as many pieces as most rows have
        return ids, ids

    weights = copy.deepcopy(trainer.model.state_dict())
    graphs = itertools.product(
        [False, True] if cfg.num_loops else [False],  # depth recurrence
        [False, True] if cfg.late_qat_threshold else [False],  # fake quantization
    )
    steps = [(False, False)] * cfg.warmup_steps
    steps += list(graphs)[1:] if steps else []
    for looping, faking in steps:
        trainer.model.set_looping(looping)
        trainer.fake_quantization(faking)
        trainer.step(random_batch, math.inf, share=0.0)
    trainer.fake_quantization(False)
    trainer.model.load_state_dict(weights)
    trainer.optimizers = build_optimizers(trainer.model, cfg, trainer.rt)
    trainer.rt.sync()


def fill_ngram_table(trainer: Trainer) -> None:
    """Counts the n-grams of the training tokens, inside the training clock.

    Processes share the pieces; n-grams across two pieces or shards are not counted.
    """
    rt, clock, stream = trainer.rt, trainer.clock, trainer.stream
    size = 10**7
    pieces = [shard[at : at + size] for shard in stream.shards for at in range(0, len(shard), size)]
    for piece in pieces[rt.rank :: rt.world]:
        trainer.ngram_table.add(rt.put(piece.astype(np.int64)))
    rt.sum_(trainer.ngram_table.tables)
    rt.sync()
    elapsed = rt.sum_(torch.tensor([clock.elapsed() if rt.main else 0.0])).item()  # rank 0's
    seconds = elapsed - clock.last.elapsed
    clock.before_first_step += seconds
    clock.last = dataclasses.replace(clock.last, elapsed=elapsed)
    trainer.log.log(f"prefilled {stream.total} tokens in {seconds * 1000:.0f} ms (counted)")


def train(trainer: Trainer, validate: Callable[[int], None]) -> str:
    """Trains to the end -> finished, wallclock_cap, interrupted or diverged.

    validate(step) is called at the start, every VAL_LOSS_EVERY steps and at the end, outside the
    clock.
    """
    log, clock = trainer.log, trainer.clock
    with trainer.requests.heard(), log.phase("train"):
        clock.start()
        if trainer.ngram_table:
            fill_ngram_table(trainer)
        status = training_loop(trainer, validate)
        trainer.model.set_looping(True)  # what is packed is the model of a finished run
        if trainer.model.looping and not trainer.steps_looped:
            log.log("WARNING: training ended before ENABLE_LOOPING_AT: no step repeated layers")
        trainer.rt.sync()
        trainer.seconds = clock.elapsed()
    if clock.last.step > trainer.last_shown:
        trainer.show(True)
    steps = f"step:{trainer.steps_done}/{trainer.cfg.iterations}"
    log.log(f"training {status}: {steps} train_time:{trainer.seconds * 1000:.0f}ms")
    return status


def training_loop(trainer: Trainer, validate: Callable[[int], None]) -> str:
    """Step after step until the end -> why it ended."""
    with ThreadPoolExecutor(1) as reader:
        batches = Prefetcher(trainer.stream.batch, trainer.rt.world, reader)
        return steps_until_the_end(trainer, validate, batches)


def steps_until_the_end(
    trainer: Trainer, validate: Callable[[int], None], batches: Callable[[int], Any]
) -> str:
    """The same, given the micro-batches by number."""
    cfg, clock, averager = trainer.cfg, trainer.clock, trainer.averager
    while True:
        status = trainer.reason_to_stop()
        if status and trainer.read_reports(lag=0).diverged:  # as reports still in flight may say
            return "diverged"
        trainer.follow(clock.progress(trainer.steps_done))
        validate_now = cfg.val_loss_every and trainer.steps_done % cfg.val_loss_every == 0
        if validate_now or (cfg.val_loss_every and status):
            with trainer.off_the_clock("validate"):
                validate(trainer.steps_done)
        if status:
            return status

        step = trainer.steps_done
        loss = trainer.step(batches, clock.steps_left(step), clock.progress(step))
        trainer.steps_done += 1
        trainer.steps_looped += trainer.model.looping
        if averager:
            averager.update(trainer.steps_done, clock.progress(trainer.steps_done))

        trainer.send_report(loss)
        report = trainer.read_reports(clock.lag)
        if report.diverged:
            return "diverged"
        save_now = cfg.save_every and trainer.steps_done % cfg.save_every == 0
        if save_now or report.save or report.stop:
            report = trainer.read_reports(lag=0)
            if report.diverged:  # a good checkpoint is not overwritten by these weights
                return "diverged"
            with trainer.off_the_clock("checkpoint"):
                save_checkpoint(trainer)
            clock.last = dataclasses.replace(report, save=False)
        if report.stop:
            return "interrupted"


# --- checkpoints ----------------------------------------------------------------------------------


def save_checkpoint(trainer: Trainer) -> None:
    """checkpoint.pt in OUT_DIR: all that the next step depends on. A failure is a warning."""
    path = trainer.log.out_dir / "checkpoint.pt"
    averager = trainer.averager
    if trainer.rt.main:
        state = {
            "settings": trainer.cfg.group("model", "train", "optim"),
            "seed": trainer.cfg.seed,
            "model": trainer.model.state_dict(),
            "averages": averager and (averager.means, averager.swa_count),
            "step": trainer.steps_done,
            "looped_steps": trainer.steps_looped,
            "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
            "elapsed": trainer.clock.elapsed(),
            "before_first_step": trainer.clock.before_first_step,
        }
        with trainer.log.optional(path.name):
            save_torch(path, state)
            trainer.log.log(f"checkpoint: {path} at step {trainer.steps_done}")


def load_checkpoint(trainer: Trainer, path: Path) -> None:
    """Continues from a checkpoint, which rank 0 reads.

    InputError if it is none, belongs to another run or lacks something.
    """
    rt = trainer.rt
    with rt.together(), input_error_from(f"RESUME={path}: cannot be read", OSError):
        blob = path.read_bytes() if rt.main else b""
    blob = rt.broadcast_bytes(blob)
    with rt.together():
        with input_error_from(f"RESUME={path}: cannot be read", Exception):  # torch has many types
            state = torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)
        with input_error_from(f"RESUME={path}: unusable", Exception):
            changed = _restore(trainer, state)
    trainer.log.result["resumed"] = True
    changes = f"changed settings: {', '.join(changed) or 'none'}"
    seconds = f"train_time:{trainer.clock.last.elapsed * 1000:.0f}ms"
    trainer.log.log(f"resumed:{path} step:{trainer.steps_done} {seconds} {changes}")


def _restore(trainer: Trainer, state: dict[str, Any]) -> list[str]:
    """Takes over a checkpoint's state -> the settings that have changed since."""
    cfg, step, elapsed = trainer.cfg, state["step"], state["elapsed"]
    settings = cfg.group("model", "train", "optim")
    older = default_config("baseline").group("model", "train", "optim")
    before = older | state["settings"]  # what an older version did not know was off
    changed = sorted(name.upper() for name in settings if before[name] != settings[name])
    wrong = [name for name in changed if FIELDS[name].metadata["group"] == "model"]
    check(not wrong, f"made with other values of {', '.join(wrong)}")
    check(state["seed"] == cfg.seed, f"made with SEED={state['seed']}, here it is {cfg.seed}")
    check(
        type(step) is int and 0 <= step <= cfg.iterations,
        f"step {step!r} is not between 0 and ITERATIONS={cfg.iterations}",
    )
    check(
        type(elapsed) is float and 0 <= elapsed < math.inf,
        f"elapsed is {elapsed!r}, expected seconds",
    )

    trainer.model.load_state_dict(state["model"])
    for optimizer, stored in zip(trainer.optimizers, state["optimizers"], strict=True):
        _restore_optimizer(optimizer, stored["state"], step)
    if trainer.averager:
        check(state["averages"], "has no averages, which EMA_DECAY and SWA_EVERY go on with")
        trainer.averager.restore(*state["averages"])
    trainer.steps_done = trainer.last_shown = step
    trainer.steps_looped = state.get("looped_steps", 0)
    trainer.clock.last = StepReport(step, elapsed)
    trainer.clock.before_first_step = state.get("before_first_step", 0.0)
    return changed


def _restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[int, Any], step: int) -> None:
    """Takes over what an optimizer remembers of each parameter; the rates are the settings'."""
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    count = sum(len(group["params"]) for group in groups) if step else 0
    found = len(optimizer.state)
    check(found == count, f"an optimizer has state of {found} parameters, not {count}")
    adam = {"step", "exp_avg", "exp_avg_sq"}
    wanted = {"momentum"} if isinstance(optimizer, Muon) else adam
    for p, values in optimizer.state.items():
        fits = all(value.shape in ((), p.shape) for value in values.values())
        check(fits and values.keys() == wanted, "an optimizer's state is not of this model")


# --- calibration ----------------------------------------------------------------------------------


class CalibrationSums:
    """Sums over tokens of what `Calibration` holds the means of, gathered by hooks on a model."""

    def __init__(self, model: GPT, cfg: Config):
        self.model = model
        self.cfg = cfg
        self.hessians: dict[str, Any] = defaultdict(float)  # sums of tensors, by name
        self.importance: dict[str, Any] = defaultdict(float)
        self.reads: dict[str, Any] = defaultdict(float)  # of rows of tables and of the head
        self.head = "tok_emb.weight" if model.lm_head is None else "lm_head.weight"

    def _add_moments(self, name: str, x: Tensor) -> None:
        x = x.flatten(0, -2).float()
        self.hessians[name] += x.T @ x

    def _add_squares(self, name: str, gradient: Tensor) -> None:
        self.importance[name] += gradient.flatten(0, -2).float().square().sum(0)

    def _add_reads(self, name: str, rows: Tensor, count: int) -> None:
        self.reads[name] += torch.bincount(rows.flatten(), minlength=count).float()

    def _see_linear(self, name: str, module: Linear, args: tuple[Tensor, ...], out: Tensor) -> None:
        self._add_moments(name, args[0].detach())
        if out.requires_grad:
            out.register_hook(functools.partial(self._add_squares, name))

    def _see_table(
        self, name: str, module: nn.Embedding, args: tuple[Tensor, ...], out: Tensor
    ) -> None:
        if out.requires_grad:
            self._add_reads(name, args[0], len(module.weight))
            out.register_hook(functools.partial(self._add_moments, name))

    def _see_logits(self, logits: Tensor, targets: Tensor) -> None:
        """The output embedding: the sum of its rows' importance, shared out by frequency.

        By frequency, since its rows are read as inputs too, and few calibration tokens tell more.
        """
        cap = self.cfg.logit_softcap
        gradient = logits.detach().softmax(-1)  # less 1 at the target, times the cap's derivative
        gradient.scatter_add_(-1, targets.unsqueeze(-1), -torch.ones_like(gradient[..., :1]))
        if cap:
            gradient *= 1 - (logits.detach() / cap).square()
        self._add_reads(self.head, targets, logits.size(-1))
        self._add_squares(self.head, gradient.square().sum(-1, keepdim=True).sqrt())

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """While it lasts, forward passes (and their backward passes) add to the sums."""
        handles = []
        for name, module in self.model.named_modules():
            see = {Linear: self._see_linear, nn.Embedding: self._see_table}.get(type(module))
            if see and f"{name}.weight" != self.head:
                see = functools.partial(see, f"{name}.weight")
                handles.append(module.register_forward_hook(see))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add(self, ids: Tensor, targets: Tensor) -> None:
        """One batch [B, T]; the loss's gradient is taken only where QUANT_STEP needs it."""
        with torch.set_grad_enabled(bool(self.cfg.quant_step)):
            hidden = self.model.hidden(ids)
            if self.cfg.gptq_embed or self.cfg.quant_step:
                self._add_moments(self.head, hidden.detach())
            if self.cfg.quant_step:
                logits = self.model.head(hidden, scoring=False)
                self._see_logits(logits, targets)
                F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
                self.model.zero_grad()


# Sequences of a pass at most, as training's micro-batch is another bound: enough for a busy GPU.
CALIBRATION_ROWS = 16


def calibrate(
    model: GPT, cfg: Config, rt: Runtime, stream: TokenStream, progress: Progress = unseen
) -> Calibration:
    """Statistics of every Linear that `hidden` calls, over GPTQ_N_SAMPLES training sequences.

    Passes of a repeated layer add up. With GPTQ_EMBED of the output embedding too, and with
    QUANT_STEP of all tables.
    """
    sums = CalibrationSums(model, cfg)
    length = cfg.train_seq_len
    own = range(rt.rank, cfg.gptq_n_samples, rt.world)
    count = cfg.gptq_n_samples * length
    rows = max(1, min(CALIBRATION_ROWS, cfg.micro_tokens // length))
    with sums.listening():
        for begin in range(0, len(own), rows):
            numbers = own[begin : begin + rows]
            tokens = rt.put(np.stack([stream.take(n * length, length + 1) for n in numbers]))
            sums.add(tokens[:, :-1], tokens[:, 1:])
            progress(min(1.0, (begin + rows) / len(own)))

    def means(totals: dict[str, Tensor]) -> dict[str, Tensor]:
        names = sorted(totals)  # every process makes the same calls
        return {name: (rt.sum_(totals[name]) / count).cpu() for name in names}

    importance = means(sums.importance)
    for name, share in means(sums.reads).items():
        seen = share + 1 / count  # once more, since no row is never read
        importance[name] = seen * importance[name] if name in importance else seen
    return Calibration(means(sums.hessians), importance)


# ==================================================================================================
# 9. ARTIFACT - a state dict as one self-describing file, and back.
#    Uses sections 1 to 5 and 7.
# ==================================================================================================

# The file: prefix, header (compressed JSON), payload. The payload is what the codec makes of the
# STREAMS one after the other, so that like lies next to like; with rANS, every matrix's codes have
# a range of their own behind the other streams (`rans_payload`).
MAGIC = b"PGOLF\r\n\x1a"
FORMAT_VERSION = 1
PREFIX = struct.Struct("<8sHIQ32s")  # magic, version, header and payload bytes, their SHA-256
STREAMS = ("codes", "scales", "floats", "steps")


@dataclasses.dataclass(frozen=True)
class EntropyCoder:
    """A codec: bytes to fewer bytes, and back to a known size.

    expand must never produce more than size + 1 bytes. Quantized weights are one byte each (two of
    water-filled ones that need them): packed bits would hide the repetitions that a codec finds.
    """

    compress: Callable[[bytes], bytes]
    expand: Callable[[bytes, int], bytes]


def _compress_zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=22).compress(data)


def _expand_zstd(data: bytes, size: int) -> bytes:
    named = zstandard.get_frame_parameters(data).content_size  # never trusted with an allocation
    check(named == size, "the zstd frame names another size")
    return zstandard.ZstdDecompressor().decompress(
        data, max_output_size=size, allow_extra_data=False
    )


def _expand_stream(begin: Callable[[], Any], data: bytes, size: int) -> bytes:
    stream = begin()
    out = stream.decompress(data, size + 1)
    ended = stream.eof and not stream.unused_data
    check(ended, "the compressed stream does not end where it should")
    return out


# rANS (1311.2540): an entropy coder of whole numbers only, so that every machine decodes the same.
# A code's table of frequencies is chosen by its context: its expected size in units of its step,
# which the decoder knows from the steps. Lanes are independent coders of one sequence of words.
RANS_BITS = 14  # the frequencies of a table sum to 2^14
RANS_LOW = 1 << 16  # a state is at least this and below 2^32; words have 16 bits
RANS_TABLES = 256  # tables at most; the contexts, -32 to 127, share 80
RANS_CODES = 1 << RANS_BITS  # codes of a table at most
RANGE = struct.Struct("<Ih")  # of every array of codes: bytes, and its spread in eighths of log2
TABLE = struct.Struct("<hiH")  # of every table: highest context, lowest code, frequencies less 1


@dataclasses.dataclass(frozen=True)
class CodeTables:
    """Frequencies of codes, a table for each of K classes of context."""

    highest: np.ndarray  # [K] context up to which a table is used; the last has no end
    lowest: np.ndarray  # [K] code of its first frequency
    stored: tuple[np.ndarray, ...]  # K arrays of bytes, see frequencies_of

    @functools.cached_property
    def frequency(self) -> np.ndarray:
        """[K, A] uint64, A codes from the lowest on; 0 where a table has no such code."""
        frequency = np.zeros((len(self.stored), max(map(len, self.stored))), np.uint64)
        for row, values in zip(frequency, self.stored):
            row[: len(values)] = frequencies_of(values)
        return frequency

    @functools.cached_property
    def start(self) -> np.ndarray:
        """[K, A] sum of the frequencies before each."""
        return np.cumsum(self.frequency, 1, dtype=np.uint64) - self.frequency

    @functools.cached_property
    def code_at(self) -> np.ndarray:
        """[K, 2^14] which code (from lowest) holds a slot."""
        codes = np.arange(self.frequency.shape[1], dtype=np.uint16)
        return np.stack([np.repeat(codes, row.astype(np.int64)) for row in self.frequency])

    def of_context(self, context: np.ndarray) -> np.ndarray:
        """Which table a context uses."""
        return np.searchsorted(self.highest[:-1], context)

    def to_bytes(self) -> bytes:
        """For `from_bytes`."""
        data = struct.pack("<H", len(self.highest))
        for highest, lowest, values in zip(self.highest, self.lowest, self.stored):
            data += TABLE.pack(highest, lowest, len(values) - 1) + values.tobytes()
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> CodeTables:
        """InputError unless these are whole tables, in order, each of the full sum."""
        (count,) = struct.unpack_from("<H", data)
        at = 2
        highest, lowest, stored = [], [], []
        check(count <= RANS_TABLES, f"{count} code tables")
        for _ in range(count):
            until, first, others = TABLE.unpack_from(data, at)
            at += TABLE.size + others + 1
            whole = others < RANS_CODES and at <= len(data)
            check(whole, "a code table is cut short or too long")
            values = np.frombuffer(data[at - others - 1 : at], np.uint8)
            check(not highest or until > highest[-1], "the code tables are out of order")
            frequencies_of(values)
            highest.append(until)
            lowest.append(first)
            stored.append(values)
        check(stored and at == len(data), "the code tables do not end where they should")
        return cls(np.array(highest), np.array(lowest), tuple(stored))


def spread_of(codes: np.ndarray, relative: np.ndarray) -> int:
    """What to add to relative spreads, so that they tell the size of these codes."""
    size = np.square(codes * 2.0 ** (-relative / 8)).mean()
    return int(np.clip(round(4 * math.log2(max(size, 2.0**-200))), -(2**14), 2**14))


def contexts_of(spread: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Contexts [N] of a matrix's codes, from log2 of their sizes in eighths."""
    return np.broadcast_to(np.clip(spread, -32, 127), shape).ravel()


def frequency_bytes(frequency: np.ndarray) -> np.ndarray:
    """Frequencies as one byte each: 5 significant bits and an exponent; rounded, never to 0."""
    values = frequency.astype(np.int64)
    shift = np.maximum(0, np.frexp(values)[1] - 5)
    mantissa = values + (1 << shift >> 1) >> shift  # 32 is the next exponent's 16
    return (mantissa + 16 * shift).astype(np.uint8)


def frequencies_of(values: np.ndarray) -> np.ndarray:
    """The frequencies of such bytes; the largest makes up for what their sum lacks of 2^14.

    InputError if it cannot.
    """
    values = values.astype(np.int64)
    shift = np.maximum(0, (values >> 4) - 1)
    frequency = values - 16 * shift << shift  # of 255 by RANS_BITS
    at = frequency.argmax()
    frequency[at] += (1 << RANS_BITS) - frequency.sum()
    check(0 < frequency[at] <= 1 << RANS_BITS, "a code table has another sum")
    return frequency


def normalised(counts: np.ndarray) -> np.ndarray:
    """Bytes of frequencies in proportion to counts; what occurs has one."""
    total = 1 << RANS_BITS
    while True:
        values = frequency_bytes(np.maximum(counts * total // counts.sum(), counts > 0))
        with contextlib.suppress(InputError):
            frequencies_of(values)
            return values
        total //= 2  # so many rare codes that the largest cannot make up for them


def ideal_bits(counts: np.ndarray) -> float:
    """What symbols of these counts cost a coder that knows the counts."""
    seen = counts[counts > 0]
    return float((seen * np.log2(counts.sum() / seen)).sum())


def table_bits(counts: np.ndarray) -> float:
    """What coding with a table of these counts costs, the table included."""
    return ideal_bits(counts) + 100 + 9 * np.count_nonzero(counts)


def build_tables(parts: Sequence[CodedPart]) -> CodeTables:
    """Tables by quarter octaves of size, neighbours merged as long as that saves bits."""
    lowest = min(int(part.codes.min()) for part in parts)
    size = max(int(part.codes.max()) for part in parts) - lowest + 1
    if size > RANS_CODES:
        raise TooFine(f"COMPRESSOR=rans: {size} codes apart, {RANS_CODES} at most: QUANT_STEP")
    counts: dict[int, np.ndarray] = {}
    for part in parts:
        bins = part.contexts >> 1
        for at in np.unique(bins):
            found = np.bincount(part.codes[bins == at] - lowest, minlength=size)
            counts[at] = counts.get(at, 0) + found
    rows = [[2 * int(at) + 1, counts[at], table_bits(counts[at])] for at in sorted(counts)]
    while len(rows) > 1:
        merged = [table_bits(a[1] + b[1]) for a, b in itertools.pairwise(rows)]
        saved = [a[2] + b[2] - bits for (a, b), bits in zip(itertools.pairwise(rows), merged)]
        at = int(np.argmax(saved))
        if saved[at] <= 0:
            break
        highest, other, _ = rows.pop(at + 1)
        rows[at] = [highest, rows[at][1] + other, merged[at]]
    firsts = [lowest + int(np.flatnonzero(found)[0]) for _, found, _ in rows]
    stored = [normalised(np.trim_zeros(found)) for _, found, _ in rows]
    return CodeTables(np.array([row[0] for row in rows]), np.array(firsts), tuple(stored))


def lanes_of(count: int) -> int:
    """How many lanes code so many codes: each costs about 3 bytes, and fewer are slower."""
    return max(1, count // (4096 if count >= 1 << 18 else 8192))


def rans_encode(codes: np.ndarray, contexts: np.ndarray, tables: CodeTables) -> bytes:
    """Codes [N] in their contexts [N] -> states of the lanes, then the words that they need."""
    lanes = lanes_of(len(codes))
    table = tables.of_context(contexts)
    symbol = codes - tables.lowest[table]
    frequency = tables.frequency[table, symbol]
    start = tables.start[table, symbol]
    states = np.full(lanes, RANS_LOW, np.uint64)
    words = [np.empty(0, "<u2")]
    for lo in reversed(range(0, len(codes), lanes)):  # the decoder goes forward
        f = frequency[lo : lo + lanes]
        state = states[: len(f)]
        full = state >= f << (32 - RANS_BITS)
        words.append(state[full].astype("<u2"))
        state = np.where(full, state >> 16, state)
        states[: len(f)] = (state // f << RANS_BITS) + state % f + start[lo : lo + lanes]
    return states.astype("<u4").tobytes() + np.concatenate(words[::-1]).tobytes()


def rans_decode(data: bytes, contexts: np.ndarray, tables: CodeTables) -> np.ndarray:
    """The codes [N]; InputError unless all words are used and all lanes end where they began."""
    lanes = lanes_of(len(contexts))
    check(len(data) >= 4 * lanes and len(data) % 2 == 0, "a range of codes is too short")
    states = np.frombuffer(data, "<u4", lanes).astype(np.uint64)
    check((states >= RANS_LOW).all(), "a lane begins too low")  # else bytes are not the only ones
    words = np.frombuffer(data, "<u2", offset=4 * lanes).astype(np.uint64)
    used = 0
    codes = np.empty(len(contexts), np.int64)
    table = tables.of_context(contexts)
    for lo in range(0, len(codes), lanes):
        which = table[lo : lo + lanes]
        state = states[: len(which)]
        slot = state & ((1 << RANS_BITS) - 1)
        symbol = tables.code_at[which, slot]
        codes[lo : lo + lanes] = symbol + tables.lowest[which]
        state = tables.frequency[which, symbol] * (state >> RANS_BITS) + slot
        state -= tables.start[which, symbol]
        low = np.flatnonzero(state < RANS_LOW)
        check(used + len(low) <= len(words), "a range of codes is too short")
        state[low] = state[low] << 16 | words[used : used + len(low)]
        used += len(low)
        states[: len(which)] = state
    check(
        used == len(words) and (states == RANS_LOW).all(),
        "a range of codes does not end where it should",
    )
    return codes


CODERS = {
    "zstd": EntropyCoder(_compress_zstd, _expand_zstd),
    "zlib": EntropyCoder(
        functools.partial(zlib.compress, level=9),
        functools.partial(_expand_stream, zlib.decompressobj),
    ),
    "lzma": EntropyCoder(
        functools.partial(lzma.compress, preset=9 | lzma.PRESET_EXTREME),
        functools.partial(
            _expand_stream, functools.partial(lzma.LZMADecompressor, memlimit=1 << 28)
        ),
    ),
}
EXPAND_ERRORS = (zstandard.ZstdError, zlib.error, lzma.LZMAError, InputError, struct.error)


@dataclasses.dataclass(frozen=True)
class PackedTensor:
    """A tensor of the model as its quantizer's arrays."""

    name: str
    shape: list[int]
    kind: str  # name of the quantizer
    arrays: tuple[np.ndarray, ...]  # as the quantizer's layout says
    range_bytes: int = 0  # of its codes in the file, if they have ranges of their own


def packed_tensor(
    name: str, shape: Sequence[int], kind: str, arrays: Sequence[Tensor], cfg: Config
) -> PackedTensor:
    """What a quantizer has fitted, in the types of its layout."""
    rows = zip(arrays, quantizer(kind, cfg).layout(shape), strict=True)
    found = [array.contiguous().numpy().astype(part.dtype) for array, part in rows]
    return PackedTensor(name, list(shape), kind, tuple(found))


@dataclasses.dataclass(frozen=True)
class CodedPart:
    """One array of codes, flat, as rANS codes it."""

    codes: np.ndarray  # [N] int64
    contexts: np.ndarray  # [N]
    spread: int  # of the array, see spread_of


def coded_parts(tensor: PackedTensor, cfg: Config) -> list[CodedPart]:
    """The arrays of codes of a tensor in their contexts."""
    found = quantizer(tensor.kind, cfg)
    rows = zip(tensor.arrays, found.layout(tensor.shape))
    matrices = [array.astype(np.int64) for array, part in rows if part.stream == "codes"]
    parts = []
    for codes, relative in zip(matrices, found.spreads(tensor.arrays), strict=True):
        spread = spread_of(codes, relative)
        contexts = contexts_of(spread + relative, codes.shape)
        parts.append(CodedPart(codes.ravel(), contexts, spread))
    return parts


def rans_payload(tensors: Sequence[PackedTensor], cfg: Config, others: bytes) -> bytes:
    """Length of and what zstd makes of the other streams, sizes and tables; then the ranges."""
    parts = [part for tensor in tensors for part in coded_parts(tensor, cfg)]
    ranges = []
    if parts:
        tables = build_tables(parts)
        ranges = [rans_encode(part.codes, part.contexts, tables) for part in parts]
        sizes = [RANGE.pack(len(data), part.spread) for data, part in zip(ranges, parts)]
        others += b"".join(sizes) + tables.to_bytes()
    rest = _compress_zstd(others)
    return struct.pack("<I", len(rest)) + rest + b"".join(ranges)


def fit_steps(
    group: Mapping[str, Tensor], cfg: Config, calibration: Calibration, scale: float
) -> dict[str, PackedTensor]:
    """Matrices of one shape by StepInt, at steps times scale."""
    for name in group:
        known = name in calibration.hessians and name in calibration.importance
        check(known, f"{name}: QUANT_STEP needs its Hessian and the importance of its rows")
    factors = [calibration.factor(name, cfg.gptq_damp) for name in group]
    importance = torch.stack([calibration.importance[name] for name in group])
    if not cfg.quant_row_steps:
        importance = importance.mean(1, keepdim=True).expand_as(importance)
    w = torch.stack(list(group.values()))
    try:
        found = QUANTIZERS["step16"].fit_many(w, factors, importance, cfg.quant_step * scale)
    except TooFine as error:
        raise TooFine(f"{', '.join(group)}: {error}") from None
    fitted = {}
    for name, (q, *steps) in zip(group, found):
        narrow = -128 <= q.min() and q.max() < 128
        kind = "step8" if narrow else "step16"
        q = q.to(torch.int8 if narrow else torch.int16)
        fitted[name] = packed_tensor(name, q.shape, kind, (q, *steps), cfg)
    return fitted


def fit_all(
    state_dict: Mapping[str, Tensor], cfg: Config, calibration: Calibration, scale: float = 1.0
) -> list[PackedTensor]:
    """Every tensor by its quantizer, steps times scale; with LQER_ENABLED the worst are corrected.

    state_dict: float32, on the CPU.

    The scale is that of QUANT_STEP where that is on, else of the deviations where rows are clipped.
    Matrices of one shape that take GPTQ's column steps are fitted together, which is faster.
    """
    fitted: dict[str, PackedTensor] = {}
    groups: dict[Any, dict[str, Tensor]] = {}
    for name, w in state_dict.items():
        kind = quantizer_of(name, w, cfg)
        if kind == "step16":
            groups.setdefault(w.shape, {})[name] = w
            continue
        if kind.startswith("int"):
            hessian = calibration.hessians.get(name)
            factor = None if hessian is None else calibration.factor(name, cfg.gptq_damp)
            sigmas = clip_sigmas(name, cfg) * (1.0 if cfg.quant_step else scale)
            arrays = QUANTIZERS[kind].fit(w, cfg, hessian, sigmas, factor)
        else:
            arrays = QUANTIZERS[kind].fit(w, cfg)
        fitted[name] = packed_tensor(name, w.shape, kind, arrays, cfg)
    for group in groups.values():
        fitted |= fit_steps(group, cfg, calibration, scale)
    if cfg.lqer_enabled:
        fitted |= corrected(fitted, state_dict, cfg)
    return [fitted[name] for name in state_dict]


def corrected(
    fitted: Mapping[str, PackedTensor], state_dict: Mapping[str, Tensor], cfg: Config
) -> dict[str, PackedTensor]:
    """The matrices that quantization has lost most of, with what LowRankCorrected adds."""
    missing = {
        name: state_dict[name] - decoded(tensor, cfg)
        for name, tensor in fitted.items()
        if tensor.kind not in ("f16", "f32")
    }
    norms = {name: float(error.norm()) for name, error in missing.items()}
    worst = sorted(norms, key=norms.__getitem__, reverse=True)
    found = {}
    for name in worst[: cfg.lqer_top_k]:
        tensor = fitted[name]
        kind = f"{tensor.kind}+lqer"
        factors = quantizer(kind, cfg).factors(missing[name])
        arrays = (*map(torch.from_numpy, tensor.arrays), *factors)
        found[name] = packed_tensor(name, tensor.shape, kind, arrays, cfg)
    return found


def decoded(tensor: PackedTensor, cfg: Config) -> Tensor:
    """A tensor's float weights."""
    arrays = [torch.from_numpy(array.copy()) for array in tensor.arrays]
    return quantizer(tensor.kind, cfg).decode(*arrays)


def size_cap(cfg: Config, code_bytes: int) -> int:
    """Bytes that code and model may have together."""
    cap = cfg.max_artifact_bytes
    return min(cap, code_bytes + cfg.max_model_bytes) if cfg.max_model_bytes else cap


def pack(
    state_dict: Mapping[str, Tensor],
    cfg: Config,
    hessians: Calibration | Mapping[str, Tensor] | None = None,
    code_bytes: int = 0,
    notes: Mapping[str, Any] | None = None,
    progress: Progress = unseen,
) -> bytes:
    """Weights and the settings that rebuild and score them as one file's bytes.

    hessians: all of a calibration, or name -> mean of x x^T [C, C]. code_bytes, notes: recorded
    (JSON). With FIT_ARTIFACT the file is the largest found that leaves code and margin their bytes,
    the smallest if none does. InputError if a weight is not finite.
    """
    calibration = hessians if isinstance(hessians, Calibration) else Calibration(hessians or {})
    weights = {
        name: w.detach().to("cpu", torch.float32).contiguous() for name, w in state_dict.items()
    }
    for name, w in weights.items():
        check(w.isfinite().all(), f"{name}: has values that are not finite; nothing was packed")

    def packed(scale: float) -> bytes:
        fitted = fit_all(weights, cfg, calibration, scale)
        said = {**(notes or {}), "fit_scale": scale} if cfg.fit_artifact else dict(notes or {})
        return packed_file(fitted, cfg, code_bytes, said)

    if not cfg.fit_artifact:
        return packed(1.0)
    count = sum(w.numel() for name, w in weights.items() if is_large(name, w, cfg))
    # Of PR 2135's form fewer deviations would clip more, not round finer.
    least = -math.inf if cfg.quant_step else 0.0
    limit = size_cap(cfg, code_bytes) - code_bytes - cfg.fit_margin
    return fitted_to(limit, count, packed, least, progress)


# Probes of FIT_ARTIFACT, and the share of the limit that the file may fall short of it.
FIT_PROBES = 6
FIT_SLACK = 0.001


def fitted_to(
    limit: int,
    weights: int,
    packed: Callable[[float], bytes],
    least: float = -math.inf,
    progress: Progress = unseen,
) -> bytes:
    """The largest file of at most `limit` bytes that a few scales of the quantization steps give.

    Else the smallest. Each probe aims at half of the slack: steps an octave finer cost about a bit
    a weight, which two probes know better. Steps refused as too fine end the search, once there is
    a file. least: no fewer octaves.
    """
    aim = limit * (1 - FIT_SLACK / 2)
    usual = 8 / max(1, weights)  # octaves a byte
    octaves = 0.0
    blobs: dict[float, bytes] = {}  # octaves -> file
    while octaves not in blobs and len(blobs) < FIT_PROBES:
        try:
            blobs[octaves] = packed(2.0**octaves)
        except TooFine:
            if not blobs:
                raise
            break
        progress(len(blobs) / FIT_PROBES)  # at most; the first that fits ends it
        size = len(blobs[octaves])
        if limit * (1 - FIT_SLACK) <= size <= limit:
            break
        probes = [(len(blob), at) for at, blob in blobs.items()]
        below = [probe for probe in probes if probe[0] <= limit]
        above = [probe for probe in probes if probe[0] > limit]
        base, other = (max(below), min(above)) if below and above else (probes[-1], probes[-2:][0])
        pace = usual
        if other[0] != base[0]:
            measured = (base[1] - other[1]) / (other[0] - base[0])
            pace = max(usual / 4, min(measured, 4 * usual))
        octaves = max(least, base[1] + max(-4.0, min(pace * (base[0] - aim), 4.0)))
    fitting = [blob for blob in blobs.values() if len(blob) <= limit]
    return max(fitting, key=len) if fitting else min(blobs.values(), key=len)


TOLD = ("model", "pack", "score")  # groups of settings that an artifact holds


def packed_file(
    fitted: Sequence[PackedTensor], cfg: Config, code_bytes: int, notes: dict[str, Any]
) -> bytes:
    """Prefix, header and payload of an artifact."""
    streams = {stream: bytearray() for stream in STREAMS}
    for tensor in fitted:
        layout = quantizer(tensor.kind, cfg).layout(tensor.shape)
        for part, array in zip(layout, tensor.arrays):
            streams[part.stream] += array.tobytes()
    header = {
        "config": {**cfg.group(*TOLD), "eval_seq_len": cfg.score_len},
        "tensors": [[tensor.name, tensor.shape, tensor.kind] for tensor in fitted],
        "codec": cfg.compressor,
        "code_bytes": code_bytes,
        "notes": notes,
    }
    head = zlib.compress(json.dumps(header, separators=(",", ":")).encode(), 9)
    if cfg.compressor == "rans":
        del streams["codes"]
        payload = rans_payload(fitted, cfg, b"".join(streams.values()))
    else:
        payload = CODERS[cfg.compressor].compress(b"".join(streams.values()))
    digest = hashlib.sha256(head + payload).digest()
    return PREFIX.pack(MAGIC, FORMAT_VERSION, len(head), len(payload), digest) + head + payload


def read_header(blob: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the still compressed payload of an artifact, lengths and checksum verified."""
    check(len(blob) >= PREFIX.size, f"artifact: {len(blob)} bytes, shorter than its prefix")
    magic, version, header_bytes, payload_bytes, digest = PREFIX.unpack_from(blob)
    check(magic == MAGIC, f"artifact: begins with {magic!r}, expected {MAGIC!r}")
    check(version == FORMAT_VERSION, f"artifact: format version {version}, not {FORMAT_VERSION}")
    header_end = PREFIX.size + header_bytes
    size = header_end + payload_bytes
    check(len(blob) == size, f"artifact: {len(blob)} bytes, not {size} (cut short or extended)")
    intact = hashlib.sha256(blob[PREFIX.size :]).digest() == digest
    check(intact, "artifact: wrong checksum, it is damaged")
    stream = zlib.decompressobj()
    with input_error_from("artifact: unreadable header", zlib.error, ValueError, RecursionError):
        header = json.loads(stream.decompress(blob[PREFIX.size : header_end], 4 << 20))
    whole = stream.eof and not stream.unused_data and isinstance(header, dict)
    check(whole, "artifact: unreadable header (not one JSON object)")
    others = header.keys() - {"config", "tensors", "codec", "code_bytes", "notes"}
    check(not others, f"artifact: unknown fields in its header: {printable(sorted(others))}")
    return header, blob[header_end:]


def config_from(stored: Any) -> Config:
    """The settings in an artifact's header, checked like any others."""
    defaults = Config().group(*TOLD)
    known = isinstance(stored, dict) and stored.keys() <= defaults.keys()
    other_version = "its settings are not those of this program (made by another version?)"
    check(known, f"artifact: {other_version}")
    values = {}
    for name, value in stored.items():
        wanted = type(defaults[name])
        if isinstance(value, list):
            value = tuple(value)
        if wanted is float and type(value) is int and abs(value) < 2**53:
            value = float(value)
        sound = type(value) is wanted
        if isinstance(value, tuple):
            sound = sound and all(type(part) is int for part in value)
        shown = printable(f"{name.upper()}={value!r}")
        check(sound, f"artifact: setting {shown} has the wrong type")
        values[name] = value
    off = {name: value for name, value in BASELINE.items() if name in defaults}
    cfg = filled(off | values)
    problems = check_config(dataclasses.replace(cfg, mode="eval"))  # not as those of a training
    check(not problems, f"artifact: {'; '.join(problems)}")
    return cfg


def tensors_of(cfg: Config) -> dict[str, list[int]]:
    """Name -> shape of every tensor of the settings' model; allocates nothing."""
    with torch.device("meta"):
        model = GPT(cfg)
    return {name: list(w.shape) for name, w in model.state_dict().items()}


def _layouts(tensors: Any, cfg: Config) -> list[tuple[Part, ...]]:
    """The arrays of every tensor that a header's table names, which must be the model's tensors."""
    layouts = []
    found = {}
    unusable = (ValueError, TypeError, KeyError, AttributeError, IndexError)
    with input_error_from("artifact: bad tensor table", *unusable):
        for name, shape, kind in tensors:
            check(name not in found, f"{name!r:.80} twice")
            found[name] = shape
            shown = f"{name!r:.80} {shape!r:.80} {kind!r:.20}"
            check(len(shape) == 2 or kind in ("f16", "f32"), shown)
            check(all(type(side) is int for side in shape), shown)
            layouts.append(quantizer(kind, cfg).layout(shape))
    wanted = tensors_of(cfg)
    differ = sorted(map(str, {n for n in found | wanted if found.get(n) != wanted.get(n)}))
    names = ", ".join(printable(name, 40) for name in differ[:5])
    fault = f"{len(differ)} names or shapes differ: {names}"
    check(not differ, f"artifact: its tensors do not fit its settings ({fault})")
    return layouts


def expand(blob: bytes) -> tuple[Config, dict[str, Any], list[PackedTensor]]:
    """An artifact's settings, header and tensors.

    Settings are checked first, then that the tensors are those of their model; only then is the
    payload expanded, to what they need.
    """
    header, payload = read_header(blob)
    cfg = config_from(header.get("config"))
    layouts = _layouts(header.get("tensors"), cfg)
    total = sum(part.size for part in itertools.chain(*layouts))
    limit = (64 << 20) + 64 * len(payload)  # far above what any codec makes of weights
    claim = f"claims {total} bytes of weights in {len(payload)} bytes of payload"
    check(total <= limit, f"artifact: {claim}")
    codec = header.get("codec")
    known = isinstance(codec, str) and codec in (*CODERS, "rans")
    check(known, f"artifact: codec {codec!r:.40}; this program has {', '.join(CODERS)}, rans")
    with input_error_from(f"artifact: the {codec} payload cannot be expanded", *EXPAND_ERRORS):
        if codec == "rans":
            quantizers = [quantizer(kind, cfg) for _, _, kind in header["tensors"]]
            arrays, sizes = rans_arrays(payload, layouts, quantizers)
        else:
            arrays = arrays_in(CODERS[codec].expand(payload, total), layouts, STREAMS)
            sizes = [0] * len(layouts)
    rows = zip(header["tensors"], arrays, sizes)
    return cfg, header, [PackedTensor(*row, tuple(found), size) for row, found, size in rows]


def arrays_in(
    raw: bytes, layouts: Sequence[tuple[Part, ...]], streams: Sequence[str]
) -> list[list[Any]]:
    """Every tensor's arrays in expanded streams; None for those that are in other streams."""
    sizes = dict.fromkeys(streams, 0)
    for part in itertools.chain(*layouts):
        if part.stream in sizes:
            sizes[part.stream] += part.size
    total = sum(sizes.values())
    check(len(raw) == total, f"the payload expands to {len(raw)} bytes, the tensors need {total}")
    ends = itertools.accumulate(sizes.values(), initial=0)
    offsets = dict(zip(streams, ends))  # where the next array of a stream begins
    tensors = []
    for layout in layouts:
        arrays: list[Any] = [None] * len(layout)
        for at, part in enumerate(layout):
            if part.stream in offsets:
                count = math.prod(part.shape)
                array = np.frombuffer(raw, part.dtype, count, offsets[part.stream])
                arrays[at] = array.reshape(part.shape)
                offsets[part.stream] += part.size
        tensors.append(arrays)
    return tensors


def rans_arrays(
    payload: bytes, layouts: Sequence[tuple[Part, ...]], quantizers: Sequence[Any]
) -> tuple[list[list[Any]], list[int]]:
    """Every tensor's arrays in what `rans_payload` gives, and the bytes of its ranges."""
    parts = list(itertools.chain(*layouts))
    count = sum(part.stream == "codes" for part in parts)
    others = sum(part.size for part in parts if part.stream != "codes")
    (length,) = struct.unpack_from("<I", payload)
    rest = payload[4 : 4 + length]
    size = zstandard.get_frame_parameters(rest).content_size
    most = RANGE.size * count + RANS_TABLES * (TABLE.size + RANS_CODES) if count else 0
    check(others <= size <= others + most, "its first part is no frame")
    rest = _expand_zstd(rest, size)
    sizes = [0] * len(layouts)
    tensors = arrays_in(rest[:others], layouts, STREAMS[1:])
    tables = CodeTables.from_bytes(rest[others + RANGE.size * count :]) if count else None
    ranges = RANGE.iter_unpack(rest[others : others + RANGE.size * count])
    at = 4 + length
    for tensor, (layout, arrays, found) in enumerate(zip(layouts, tensors, quantizers)):
        relative = iter(found.spreads(arrays))
        for number, part in enumerate(layout):
            if part.stream == "codes":
                size, spread = next(ranges)
                contexts = contexts_of(spread + next(relative), part.shape)
                codes = rans_decode(payload[at : at + size], contexts, tables)
                arrays[number] = codes.astype(part.dtype).reshape(part.shape)
                check((arrays[number].ravel() == codes).all(), "a code is out of its range")
                at += size
                sizes[tensor] += size
    check(at == len(payload), "the ranges of codes do not end where they should")
    return tensors, sizes


def unpack(blob: bytes) -> tuple[Config, dict[str, Tensor]]:
    """An artifact's settings and float weights; InputError if it is damaged or not this program's.

    Runs nothing that is in the file and allocates only what its model needs.
    """
    cfg, _, tensors = expand(blob)
    return cfg, weights_of(tensors, cfg)


def weights_of(tensors: Sequence[PackedTensor], cfg: Config) -> dict[str, Tensor]:
    """Name -> float weights; InputError if one is not finite."""
    weights = {}
    for tensor in tensors:
        w = decoded(tensor, cfg)
        check(w.isfinite().all(), f"artifact: {tensor.name} has values that are not finite")
        weights[tensor.name] = w
    return weights


def tensor_bytes(tensor: PackedTensor) -> float:
    """About what a tensor takes in the file: its ranges, and the entropy of what has none."""
    arrays = tensor.arrays
    if tensor.range_bytes:
        arrays = [array for array in arrays if array.ndim == 1 or array.dtype == np.float16]
    data = b"".join(array.tobytes() for array in arrays)
    return tensor.range_bytes + ideal_bits(np.bincount(np.frombuffer(data, np.uint8))) / 8


def size_report(blob: bytes, code_bytes: int, cap: int) -> list[str]:
    """Log lines: bytes of code, model and both, the margin, the five largest tensors.

    With rANS all that it codes, and the bits of a weight beside what its contexts would allow.
    """
    cfg, header, tensors = expand(blob)
    codec = header["codec"]
    total = len(blob) + code_bytes
    over = "" if total <= cap else " OVER THE CAP"
    lines = [
        f"Code size: {code_bytes} bytes",
        f"Serialized model {codec}: {len(blob)} bytes",
        f"Total submission size {codec}: {total} bytes",
        f"size_cap:{cap} margin:{cap - total} bytes{over}",
    ]
    coded = sum(tensor.range_bytes > 0 for tensor in tensors)
    for tensor in sorted(tensors, key=tensor_bytes, reverse=True)[: max(5, coded)]:
        size = tensor_bytes(tensor)
        line = f"  about {size:9.0f} bytes  {tensor.kind:5} {tensor.name} {tensor.shape}"
        if tensor.range_bytes:
            count = math.prod(tensor.shape)
            ideal = sum(map(context_entropy, coded_parts(tensor, cfg)))
            line += (
                f" {8 * tensor.range_bytes / count:.3f} bits a weight, ideal {ideal / count:.3f}"
            )
        lines.append(line)
    return lines


def context_entropy(part: CodedPart) -> float:
    """Bits of an array of codes for a coder that knows how often each comes in a context."""
    bins = part.contexts >> 1
    of_bins = (part.codes[bins == at] for at in np.unique(bins))
    return sum(ideal_bits(np.unique(codes, return_counts=True)[1]) for codes in of_bins)


def code_size() -> int:
    """Bytes of the script that runs and of a config.env beside it: a run needs both."""
    paths = (SCRIPT, SCRIPT.with_name("config.env"))
    return sum(path.stat().st_size for path in paths if path.is_file())


def artifact_path(cfg: Config) -> Path:
    """The file that ARTIFACT names, else OUT_DIR's."""
    return Path(cfg.artifact or Path(cfg.out_dir) / "model.ptz")


def raw_path(cfg: Config) -> Path:
    """The file of float weights that RAW_MODEL names, else the one beside the artifact."""
    return Path(cfg.raw_model or artifact_path(cfg).with_name("final_model.pt"))


def read_raw_model(cfg: Config, wanted: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """The float weights for MODE=pack; InputError unless their names and shapes are the model's."""
    where = f"RAW_MODEL={str(raw_path(cfg))!r}"
    with input_error_from(f"{where}: cannot be read", Exception):  # torch has many types
        weights = torch.load(raw_path(cfg), map_location="cpu", weights_only=True)
        fits = wanted == {name: list(w.shape) for name, w in weights.items()}
    check(fits, f"{where}: its tensors are not those of the artifact's model")
    return {name: w.float() for name, w in weights.items()}


def read_artifact(cfg: Config) -> bytes:
    """The bytes of `artifact_path`."""
    path = artifact_path(cfg)
    with input_error_from(f"ARTIFACT={str(path)!r}: cannot be read", OSError):
        check(path.is_file() or not path.exists(), f"ARTIFACT={str(path)!r}: not a regular file")
        return path.read_bytes()


def notes_of(header: Mapping[str, Any]) -> dict[str, Any]:
    """What an artifact's header says beyond its settings; a foreign file may say nothing."""
    notes = header.get("notes")
    return notes if isinstance(notes, dict) else {}


def noted(header: Mapping[str, Any], name: str) -> str:
    """One of the notes as text, empty if it is not there.

    tokenizer: the hash of the one that it was trained with; case_transform: of its text.
    """
    return str(notes_of(header).get(name, ""))


def load_artifact(cfg: Config, blob: bytes, rt: Runtime) -> GPT:
    """The model in an artifact, on its device; InputError if it had another tokenizer."""
    stored, header, tensors = expand(blob)
    model = build_model(stored, rt, weights_of(tensors, stored))
    here = tokenizer_hash(cfg)
    made_with = noted(header, "tokenizer")
    check(
        made_with in ("", here),
        f"TOKENIZER_PATH={cfg.tokenizer_path!r}: the artifact was trained with another tokenizer "
        f"(sha256 {printable(made_with, 16)}, here {here:.16})",
    )
    return model


def settings_of_artifact(cfg: Config, env: Mapping[str, str], blob: bytes | None = None) -> Config:
    """For MODE=eval, pack and sample: the artifact's settings, and what is set here otherwise.

    blob: what the file that ARTIFACT names holds, if it is read already. Data and tokenizer that
    nobody names are looked for.
    """
    header, _ = read_header(read_artifact(cfg) if blob is None else blob)
    stored = config_from(header.get("config"))
    given, _ = read_settings(env, stored)
    problems = []
    for name, value in stored.group("model").items():
        if name in given and given[name] != value:
            reason = f"the artifact was made with {as_typed(value)}"
            problems.append(f"{name.upper()}={as_typed(given[name])}: {reason}")
    raise_if(problems)
    merged = load_config(env, stored)
    if cfg.mode == "pack" and "train_seq_len" not in given:
        # An artifact does not tell the length of its training: calibrated at what it is scored at.
        merged = dataclasses.replace(merged, train_seq_len=stored.score_len)
    places = find_data(noted(header, "tokenizer"), given.keys())
    if "case_transform" not in given:
        places["case_transform"] = noted(header, "case_transform")
    return dataclasses.replace(merged, out_dir=cfg.out_dir, run_id=cfg.run_id, **places)


# ==================================================================================================
# 10. SCORING - text is predicted, charged, and only then learned from.
#     Uses sections 1-9.
#
#     `score_batch` is the only place that charges. A plan cuts the stream into chunks of batches,
#     left to right. A Scorer (a network, mixers over it, and perhaps test-time training) says what
#     it believes as a Distribution before the targets are known, and learns from a chunk after all
#     of it was charged.
# ==================================================================================================

# --- batches: what is asked, in which order -------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Batch:
    """Positions to predict from. It holds no targets: nothing that predicts can see them.

    Where documents end is told to what learns (`real`, `goes_on`); predictions do not look there.
    """

    ids: np.ndarray  # [R, T] int64 inputs; the last S of the first B rows predict
    index: np.ndarray  # [B, S] number of each target in the stream
    real: np.ndarray  # [B, S] bool; false where padding
    left_context: np.ndarray  # tokens before the first input, for a network that carries on
    slots: np.ndarray | None = None  # [B] whose adapters the rows have; None = row 0 the first, ...
    goes_on: np.ndarray | None = None  # [B] bool, whether more of the row's document follows
    span: int = 0  # inputs that rotary tables are made for, if not T


def make_batch(
    tokens: np.ndarray,
    starts: np.ndarray,
    length: int,
    index: np.ndarray,
    real: np.ndarray,
    left_context: int = 0,
    slots: np.ndarray | None = None,
    goes_on: np.ndarray | None = None,
    span: int = 0,
) -> Batch:
    """Rows of `length` inputs from `starts` [R] on; the first B predict the targets `index`."""
    last = len(tokens) - 2  # number of the last target, and of the last input; then zeros
    at = starts[:, None] + np.arange(length)
    ids = np.where(at <= last, tokens[np.minimum(at, last)], 0).astype(np.int64)
    first = int(starts[0])
    before = tokens[max(0, first - left_context) : first]
    return Batch(ids, np.minimum(index, last), real, before, slots, goes_on, span)


def batch_of_one(tokens: np.ndarray, target: int, length: int, **more: Any) -> Batch:
    """One target, predicted from so many tokens before it; more: as make_batch."""
    index = np.array([[target]])
    return make_batch(tokens, index[0] + 1 - length, length, index, np.ones((1, 1), bool), **more)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Batches that are predicted with one state; what they teach takes effect at their commit."""

    lo: int  # first target
    hi: int  # the one after the last
    work: list[Any]  # this process's batches, as the plan's batch() takes them; None = no batch
    progress: float = 1.0  # 0 for the stream's first chunk, 1 for its last
    weight: int = 1  # inputs of a batch, of all processes, where they differ
    closes: bool = True  # all of lo .. hi is charged after it
    ends_documents: bool = True  # all whose adapters are in use


@dataclasses.dataclass(frozen=True)
class Windows:
    """A plan of windows: target j is tokens[j + 1], predicted from tokens[..j].

    Window k reads inputs k * stride .. k * stride + seq_len - 1. Window 0 scores all its targets,
    later ones those that no earlier window has; the last may be short. So every target is scored
    once, for any number of targets. A chunk begins with the first window whose first target is in
    the next `chunk_targets` (0 = one chunk).
    """

    targets: int
    seq_len: int
    stride: int
    batch_rows: int = 1
    chunk_targets: int = 0
    left_context: int = 0  # tokens that a network which carries on wants before a batch
    fixed_rows: bool = False  # all batches have as many rows of inputs

    def window_of(self, target: Any) -> Any:
        """The window that scores a target, or each target of an array."""
        return np.maximum(0, -(-(target + 1 - self.seq_len) // self.stride))

    def chunks(self, rank: int = 0, world: int = 1) -> list[Chunk]:
        """All chunks; of each, this process's consecutive share of the batches."""
        windows = np.arange(1 + max(0, -(-(self.targets - self.seq_len) // self.stride)))
        first = np.where(windows > 0, windows * self.stride + self.seq_len - self.stride, 0)
        parts = first // (self.chunk_targets or self.targets)
        edges = [*np.flatnonzero(np.diff(parts, prepend=-1)).tolist(), len(windows)]
        chunks = []
        for number, (lo, hi) in enumerate(itertools.pairwise(edges)):
            # Window 0 scores more targets than the others, and stands alone.
            work = [range(0, 1)] if lo == 0 and self.stride < self.seq_len else []
            for k in range(lo + len(work), hi, self.batch_rows):
                work.append(range(k, min(k + self.batch_rows, hi)))
            share = -(-len(work) // world)
            work += [None] * (share * world - len(work))
            progress = number / (len(edges) - 2) if len(edges) > 2 else 1.0
            end = int(first[hi]) if hi < len(windows) else self.targets
            mine = work[rank * share : (rank + 1) * share]
            chunks.append(Chunk(int(first[lo]), end, mine, progress))
        return chunks

    def batch(self, tokens: np.ndarray, windows: Sequence[int]) -> Batch:
        """Some windows; the last is repeated, so that all batches but the first have one shape."""
        alone = windows[0] == 0 and self.stride < self.seq_len
        row = np.arange(1 if alone else self.batch_rows)
        k = np.asarray(windows)[np.minimum(row, len(windows) - 1)]
        starts = k * self.stride
        first = np.where(k > 0, starts + self.seq_len - self.stride, 0)
        end = np.minimum(starts + self.seq_len, self.targets)
        index = first[:, None] + np.arange(self.seq_len if windows[0] == 0 else self.stride)
        real = (index < end[:, None]) & (row < len(windows))[:, None]
        if self.fixed_rows:
            starts = np.resize(starts, self.batch_rows)
        return make_batch(tokens, starts, self.seq_len, index, real, self.left_context)

    def inputs(self, windows: Sequence[int]) -> int:
        """Tokens that the batch of some windows reads."""
        alone = windows[0] == 0 and self.stride < self.seq_len and not self.fixed_rows
        return self.seq_len * (1 if alone else self.batch_rows)

    def position(self, tokens: np.ndarray, target: int) -> Batch:
        """A batch of one position, which predicts this target from the tokens before it."""
        start = int(self.window_of(target)) * self.stride
        if self.left_context:  # whoever carries on needs one input
            start = target
        more = {"left_context": self.left_context, "span": self.seq_len}
        return batch_of_one(tokens, target, target + 1 - start, **more)

    def completed(self, tokens: np.ndarray, known: int) -> list[Chunk]:
        """The chunk that ends with the newest of the `known` tokens, if one does."""
        return [self._by_end[known - 1]] if known - 1 in self._by_end else []

    @functools.cached_property
    def _by_end(self) -> dict[int, Chunk]:
        """The chunks by their end: who writes a stream asks after every token."""
        return {chunk.hi: chunk for chunk in self.chunks()}

    def samples(self, tokens: np.ndarray, positions: int) -> tuple[Batch, Batch]:
        """For the checks: a batch early in the stream, one spread over it with so many targets."""
        first = min(1, int(self.window_of(self.targets - 1)))
        last = max(first, int(self.window_of(self.targets)) - 1)  # the last one that is not short
        rows = min(-(-positions // self.stride), self.batch_rows)
        spread = np.unique(np.linspace(last, first, rows).astype(int))
        plan = self if self.fixed_rows else dataclasses.replace(self, batch_rows=rows)
        return plan.batch(tokens, [first]), plan.batch(tokens, spread)


@dataclasses.dataclass(frozen=True)
class DocumentRows:
    """One chunk of some documents, a row each; the number of a chunk is the same for all."""

    number: int
    first: np.ndarray  # [B] first target
    end: np.ndarray  # [B] the one after the document's last
    slots: np.ndarray | None  # [B] of adapters; None = of the first ones, in the rows' order


class Documents:
    """A plan of documents side by side, in groups of `slots`: chunk 0 of each, then chunk 1 ...

    A chunk is scored with what stands before it in its own document, seq_len inputs at most. A
    document's targets end with the start of the next one. Chunks are of as many targets for all:
    chunk_targets, or, in a document's first targets, what `early` says. Processes share the slots.

    What a document may know of others is fixed by the stream: of `window` groups at a time, which
    share nothing, documents of like length stand together, so that they end together; a window
    never reaches beyond the first `prefix` documents, after which the weights may change. keeps:
    what a slot has learned goes on to its next document, a group later, so a window is one group.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        bos: int,
        seq_len: int,
        chunk_targets: int,
        slots: int,
        window: int = 1,
        rows: int = 0,
        fixed_rows: bool = False,
        early: Sequence[tuple[int, int]] = (),
        prefix: int = 0,
        keeps: bool = False,
    ):
        self.bos = bos
        self.seq_len = seq_len
        self.slots = slots
        self.together = slots * (1 if keeps else window)
        self.rows = rows or slots  # documents of a batch at most, where processes share the slots
        few = {max(min(2, self.rows), -(-self.rows // 4**part)) for part in range(4)}
        self.row_counts = sorted(few) if fixed_rows else range(1, self.rows + 1)  # of inputs
        self.prefix = prefix
        self.keeps = keeps
        self.starts = document_starts(tokens[:-1], bos)
        self.ends = np.append(self.starts[1:], len(tokens) - 1)
        self.lengths = self.ends - self.starts
        edges = np.zeros(1, np.int64)  # where chunks begin in a document
        for size, until in early:
            until = min(until, len(tokens))
            more = np.arange(edges[-1] + size, until + size, size).clip(max=until)
            edges = np.append(edges, more)
        more = np.arange(edges[-1], len(tokens), chunk_targets) + chunk_targets
        self.edges = np.append(edges, more)
        self.counts = np.searchsorted(self.edges, self.lengths)  # chunks of each

    def _window(self, document: int) -> tuple[int, int]:
        """First document, and the one after the last, of the window that a document is in."""
        base = self.prefix if document >= self.prefix else 0
        first = base + (document - base) // self.together * self.together
        end = first + self.together
        return first, min(end, self.prefix) if document < self.prefix else end

    def chunks(self, rank: int = 0, world: int = 1) -> list[Chunk]:
        """All chunks; of each, the documents in this process's slots."""
        chunks = []
        end = 0
        while end < len(self.starts):
            first, end = self._window(end)
            end = min(end, len(self.starts))
            documents = np.arange(first, end)
            lo, hi = int(self.starts[first]), int(self.ends[end - 1])
            documents = documents[np.argsort(-self.lengths[documents], kind="stable")]
            for at in range(0, len(documents), self.slots):
                group = documents[at : at + self.slots]
                slots = group - first if self.keeps else np.arange(len(group))
                mine = slots % world == rank
                works = self._group(group, group[mine], slots[mine])
                for number, work in enumerate(works, 1):
                    alive = -(-int((self.counts[group] >= number).sum()) // world)
                    weight = self._rows(min(alive, self.rows)) * self._length(number)
                    ends = number == len(works)
                    closes = ends and at + self.slots >= len(documents)
                    chunks.append(Chunk(lo, hi, [work], 1.0, weight, closes, ends))
        return chunks

    def _group(
        self, group: np.ndarray, mine: np.ndarray, slots: np.ndarray
    ) -> list[DocumentRows | None]:
        """Chunk by chunk the rows of those documents of a group that are this process's."""
        works: list[DocumentRows | None] = []
        for number in range(int(self.counts[group].max())):
            rows = self.counts[mine] > number
            first = self.starts[mine[rows]] + self.edges[number]
            own = slots[rows] if self.keeps else None
            work = DocumentRows(number, first, self.ends[mine[rows]], own)
            works.append(work if rows.any() else None)
        return works

    def _rows(self, documents: int) -> int:
        """Rows of inputs for so many documents."""
        return self.row_counts[bisect.bisect_left(self.row_counts, documents)]

    def _length(self, chunks: int) -> int:
        """Inputs of a row whose chunk is the document's chunks-th."""
        return min(self.seq_len, int(self.edges[chunks]))

    def inputs(self, rows: DocumentRows) -> int:
        """Tokens that the rows' batch reads."""
        return self._rows(len(rows.first)) * self._length(rows.number + 1)

    def batch(self, tokens: np.ndarray, rows: DocumentRows) -> Batch:
        """The rows' chunk; all documents of a chunk have as many inputs."""
        lo, hi = self.edges[rows.number : rows.number + 2]
        length = self._length(rows.number + 1)
        index = rows.first[:, None] + np.arange(hi - lo)
        real = index < rows.end[:, None]
        starts = rows.first + (hi - lo) - length
        goes_on = rows.first + (hi - lo) < rows.end
        starts = np.resize(starts, self._rows(len(starts)))
        return make_batch(tokens, starts, length, index, real, slots=rows.slots, goes_on=goes_on)

    def _slot(self, document: int) -> np.ndarray | None:
        """Of a document that is scored alone."""
        first, _ = self._window(document)
        return np.array([document - first]) if self.keeps else None

    def position(self, tokens: np.ndarray, target: int) -> Batch:
        """A batch of one position, which predicts this target from the tokens before it."""
        starts = document_starts(tokens[: target + 1], self.bos)
        begun = int(starts[-1])
        number = int(np.searchsorted(self.edges, target - begun, side="right"))
        span = self._length(number)
        length = target + 1 - (begun + int(self.edges[number]) - span)
        slot = self._slot(len(starts) - 1)
        return batch_of_one(tokens, target, length, slots=slot, span=span)

    def completed(self, tokens: np.ndarray, known: int) -> list[Chunk]:
        """The chunk that ends with the newest of the `known` tokens, if one does."""
        targets = known - 1
        starts = document_starts(tokens[:targets], self.bos)
        scored = targets - starts[-1]  # of the newest document
        over = known == len(tokens)
        ended = bool(over or tokens[targets] == self.bos)
        number = int(np.searchsorted(self.edges, scored)) - 1
        if not ended and scored != self.edges[number + 1]:
            return []
        document = len(starts) - 1
        end = np.array([targets if ended else targets + 1])
        rows = DocumentRows(number, starts[-1:] + self.edges[number], end, self._slot(document))
        first, behind = self._window(document)
        closes = ended and (over or document + 1 == behind)
        ends = closes if self.keeps else ended
        lo = int(starts[first])
        return [Chunk(lo, targets, [rows], closes=closes, ends_documents=ends)]

    def samples(self, tokens: np.ndarray, positions: int) -> tuple[Batch, Batch]:
        """For the checks: the first chunks of the stream's first documents, and the second ones."""
        first, *later = (chunk.work[0] for chunk in self.chunks() if chunk.lo == 0)
        few = [self._some(rows) for rows in (first, later[0] if later else first)]
        return self.batch(tokens, few[0]), self.batch(tokens, few[1])

    def _some(self, rows: DocumentRows) -> DocumentRows:
        """No more rows than a batch of this process has."""
        slots = None if rows.slots is None else rows.slots[: self.rows]
        return DocumentRows(rows.number, rows.first[: self.rows], rows.end[: self.rows], slots)


Plan = Windows | Documents

# --- n-gram counts: a service that mixers ask -----------------------------------------------------

COUNT_PIECE = 1 << 18  # positions that are sorted at once, about


class OrderCounts(NamedTuple):
    """Counts of one order before every token of a stream, arrays [n], or before one place of it."""

    order: int
    n: Any  # how often context and token came before; before one place: of every token [V]
    total: Any  # how often the context did
    distinct: Any  # how many different tokens followed it


# Besides: a token that followed the context, and how often that one did.
HintedCounts = namedtuple("HintedCounts", [*OrderCounts._fields, "hint", "agree"])


def causal_counts(
    tokens: np.ndarray,
    orders: Sequence[int],
    bos: int | None = None,
    hints: str = "",
    progress: Progress = unseen,
) -> Iterator[Any]:
    """Exact n-gram counts at every position, from earlier tokens only, of rising order.

    Order k has a context of k - 1 tokens. Arrays int32 [len(tokens)]; zeros where the context is
    incomplete (it begins before the stream or, given bos, in an earlier document). OrderCounts; or
    HintedCounts, if hints says which token is the hint: the one that followed the context "last" or
    "most"; of tokens that did equally often, the one that did first.

    One sort an order. Positions stand in groups of equal context, in order of position inside a
    group. Sorted by (group, token, position), equal n-grams lie side by side, so that n is the
    place in the run; total is the place in the group; distinct counts the runs that began before.
    The runs are the next order's groups, one position later, and only those that occur elsewhere
    too go on. Memory: under 40 bytes a token beyond what is yielded.
    """
    tokens = np.asarray(tokens)
    size = len(tokens)
    vocab = int(tokens.max(initial=0)) + 1
    room = np.append(np.arange(size, dtype=np.int32), np.int32(-1))  # longest complete context
    if bos is not None:
        starts = np.where(tokens == bos, room[:-1], np.int32(0))
        room[1:size] -= np.maximum.accumulate(starts)[:-1]
    at = np.arange(size, dtype=np.int32)
    first = at == 0  # whether a position begins its group
    with ThreadPoolExecutor(min(32, PROCESSORS or 1)) as pool:
        for order in range(1, max(orders) + 1):
            counts = None
            if order in orders:
                kind = HintedCounts if hints else OrderCounts
                counts = kind(order, *(np.zeros(size, np.int32) for _ in kind._fields[1:]))
            heads = np.flatnonzero(first)  # groups are counted in pieces
            ends = np.arange(COUNT_PIECE, heads[-1] + 1 if len(at) else 0, COUNT_PIECE)
            cuts = np.unique(heads[np.searchsorted(heads, ends)])
            piece = functools.partial(_count_piece, tokens, vocab, room, order, counts, hints)
            parts = [(at[:0], first[:0])]
            if len(at):
                parts += pool.map(piece, np.split(at, cuts), np.split(first, cuts))
            if counts:
                yield counts
                del counts, piece
            at, first = (np.concatenate(arrays) for arrays in zip(*parts))
            progress(order / max(orders))


def _count_piece(
    tokens: np.ndarray,
    vocab: int,
    room: np.ndarray,
    order: int,
    counts: Any,
    hints: str,
    at: np.ndarray,
    first: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """One order of causal_counts, for whole groups -> the next order's positions, group starts."""
    place = np.arange(len(at), dtype=np.int32)
    heads = np.flatnonzero(first)
    group = np.repeat(heads.astype(np.int32), np.diff(heads, append=len(at)))
    by_key, run_starts = _sort_group_token(tokens[at], group, vocab, place)
    if counts:
        rank = np.maximum.accumulate(np.where(run_starts, place, np.int32(0)))
        n = np.empty_like(place)
        n[by_key] = place - rank
        del rank
        counts.n[at] = n
        counts.total[at] = place - group
        new = n == 0
        runs = np.cumsum(new, dtype=np.int32)
        runs -= new
        counts.distinct[at] = runs - runs[group]
        if hints:
            later = np.flatnonzero(~first)
            hinted = later - 1
            if hints == "most":
                hinted = _leaders(group, n, place)[hinted]
            counts.hint[at[later]] = tokens[at[hinted]]
            counts.agree[at[later]] = n[hinted] + 1
        del n, new, runs
    del place, group
    alone = run_starts & np.append(run_starts[1:], True)
    number = np.cumsum(run_starts, dtype=np.int32)[~alone]
    following = at[by_key][~alone] + np.int32(1)
    whole = room[following] >= order
    following, number = following[whole], number[whole]
    starts = np.ones(len(number), bool)
    np.not_equal(number[1:], number[:-1], out=starts[1:])
    return following, starts


def _leaders(group: np.ndarray, n: np.ndarray, place: np.ndarray) -> np.ndarray:
    """For every place the one, up to it in its group, of highest n; the first of equal ones."""
    height = group.astype(np.int64) * (len(group) + 1) + n
    risen = np.diff(np.maximum.accumulate(height), prepend=-1) > 0
    return np.maximum.accumulate(np.where(risen, place, 0))


def _sort_group_token(
    tokens: np.ndarray, group: np.ndarray, vocab: int, place: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Places sorted by group, token, place; and where a run of equal group and token starts."""
    bits = len(place).bit_length()
    needed = int(group[-1]).bit_length() + vocab.bit_length() + bits
    check(
        needed < 64,
        f"TILT, TILT_BOOST, NGRAM: {len(tokens)} tokens of a vocabulary of {vocab} are too many to "
        "count n-grams in 64 bits",
    )
    key = group.astype(np.int64)
    key *= vocab
    key += tokens
    key <<= bits
    key |= place
    key.sort()
    by_key = np.empty_like(place)
    np.bitwise_and(key, (1 << bits) - 1, out=by_key, casting="unsafe")
    key >>= bits
    return by_key, np.concatenate(([True], key[1:] != key[:-1]))


def counts_after(
    prefix: np.ndarray,
    orders: Sequence[int],
    vocab: int,
    bos: int | None,
    unigram: np.ndarray | None = None,
) -> Iterator[Any]:
    """HintedCounts (hints "last") of causal_counts at the end of a prefix, by searching it.

    bos: contexts end where a document begins with it; None: nowhere. unigram: the prefix's own
    counts of order 1, if known.
    """
    size = len(prefix)
    starts = np.flatnonzero(prefix == bos) if bos is not None else prefix[:0]
    room = size - (int(starts[-1]) if len(starts) else 0)
    found = np.flatnonzero(prefix[:-1] == prefix[-1:]) + 1  # what followed the context, so far
    for order in range(1, max(orders) + 1):
        if order > 2 and len(found):
            found = found[np.searchsorted(found, order - 1) :] if order - 1 <= room else found[:0]
            found = found[prefix[found - order + 1] == prefix[size - order + 1]]
        if order in orders:
            after = prefix if order == 1 else prefix[found]
            known = order == 1 and unigram is not None
            n = unigram if known else np.bincount(after, minlength=vocab)
            hint = int(after[-1]) if len(after) else 0
            yield HintedCounts(order, n, len(after), np.count_nonzero(n), hint, n[hint])


NGRAM_ORDERS = (1, 2, 3, 4, 5, 6, 7, 13, 25)  # of exact counts; the last reach back 12, 24 tokens
DISCOUNT = 0.75  # of absolute discounting
CONCENTRATION = 0.5


class NgramFacts(NamedTuple):
    """What is known of the longest context seen before a target; arrays or tensors [...]."""

    rank: Any  # its place in NGRAM_ORDERS, from 1; 0 = none was seen
    count: Any  # how often it was seen
    hint: Any  # the token that followed it last
    agree: Any  # how often that token did


def discounted(counts: Iterator[Any], vocab: int) -> tuple[list[Any], NgramFacts]:
    """Interpolated absolute discounting: a list of q by order, each with the lower one as base.

    Below order 1 is the uniform distribution. Beside it the facts of the longest context.
    """
    q = np.float64(1 / vocab)
    by_order = []
    facts = (0, 0, 0, 0)
    for rank, of_order in enumerate(counts, 1):
        seen = np.greater(of_order.total, 0)
        lower = (CONCENTRATION + DISCOUNT * of_order.distinct) * q
        above = np.maximum(of_order.n - DISCOUNT, 0)
        q = np.where(seen, (above + lower) / (np.asarray(of_order.total) + CONCENTRATION), q)
        by_order.append(q)
        found = (rank, of_order.total, of_order.hint, of_order.agree)
        facts = tuple(np.where(seen, new, old) for new, old in zip(found, facts))
    return by_order, NgramFacts(*facts)


class NgramCounts:
    """Exact counts of a stream as a service, for targets by number: facts, and q of any tokens.

    One sort of the stream answers for its own tokens. Whatever else is asked, and everything while
    the stream is still being written (whole = False), comes from searching the tokens before the
    target alone.
    """

    def __init__(self, cfg: Config, rt: Runtime):
        self.rt = rt
        self.vocab = cfg.vocab_size
        self.bos = cfg.bos_id if cfg.ngram_docs else None

    def prepare(
        self,
        tokens: np.ndarray,
        plan: Any = None,
        whole: bool = True,
        progress: Progress = unseen,
    ) -> None:
        """Takes a stream."""
        self.tokens = tokens
        self.sorted = None
        if whole:
            count = functools.partial(
                causal_counts, tokens, NGRAM_ORDERS, self.bos, "last", progress
            )
            arrays = self.rt.once_a_machine(
                lambda: itertools.chain(*discounted(count(), self.vocab))
            )
            self.sorted = arrays[: len(NGRAM_ORDERS)], NgramFacts(*arrays[len(NGRAM_ORDERS) :])
        self.unigram = np.zeros(self.vocab, np.int64)
        self.unigram_end = 0  # tokens that are counted in it
        self.asked: tuple[bytes, Any] = (b"", None)  # tilt and mixture ask the same

    def facts(self, index: np.ndarray) -> NgramFacts:
        """Of the context before each target [...] -> tensors [...]; count is at least 1."""
        if self.sorted:
            _, facts = self.sorted
            facts = NgramFacts(*(array[index + 1] for array in facts))
        else:
            _, facts = self._search(index)
        facts = NgramFacts(*(self.rt.put(array) for array in facts))
        return facts._replace(count=facts.count.clamp(min=1))

    def prob(self, index: np.ndarray, ids: Tensor) -> Tensor:
        """q of tokens ids [..., C] as targets number index [...] -> [..., C, K], float64."""
        asked = ids.cpu().numpy()
        own = asked.shape[-1] == 1 and np.array_equal(asked[..., 0], self.tokens[index + 1])
        if self.sorted and own:
            by_order, _ = self.sorted
            found = np.stack([q[index + 1] for q in by_order], -1)[..., None, :]
        else:
            q, _ = self._search(index)  # [..., K, V]
            found = np.take_along_axis(q, asked[..., None, :], -1).swapaxes(-1, -2)
        return self.rt.put(np.ascontiguousarray(found))

    def _search(self, index: np.ndarray) -> tuple[np.ndarray, NgramFacts]:
        """q of the whole vocabulary [..., K, V], and the facts [...]."""
        key = index.tobytes()
        if self.asked[0] != key:
            found = [self._after(int(target)) for target in index.flat]
            q = np.stack([np.stack(by_order) for by_order, _ in found])
            facts = (np.stack(arrays) for arrays in zip(*(facts for _, facts in found)))
            facts = NgramFacts(*(array.reshape(index.shape) for array in facts))
            self.asked = key, (q.reshape(*index.shape, *q.shape[1:]), facts)
        return self.asked[1]

    def _after(self, target: int) -> tuple[list[np.ndarray], NgramFacts]:
        end = target + 1
        if self.unigram_end > end:
            self.unigram = np.zeros_like(self.unigram)
            self.unigram_end = 0
        new = self.tokens[self.unigram_end : end]
        self.unigram = self.unigram + np.bincount(new, minlength=self.vocab)
        self.unigram_end = end
        known = self.tokens[:end]
        counts = counts_after(known, NGRAM_ORDERS, self.vocab, self.bos, self.unigram)
        return discounted(counts, self.vocab)


class FrequentHints:
    """As a service, for targets by number: the token that followed the TILT_ORDER - 1 tokens before
    the target in at least TILT_SHARE of their earlier sightings, where there is one.
    """

    def __init__(self, cfg: Config, rt: Runtime):
        self.rt = rt
        self.cfg = cfg
        self.bos = cfg.bos_id if cfg.ngram_docs else None

    def prepare(
        self,
        tokens: np.ndarray,
        plan: Any = None,
        whole: bool = True,
        progress: Progress = unseen,
    ) -> None:
        """Takes a stream; whole = False: it is still being written."""
        self.tokens = tokens
        self.found = (
            self.rt.once_a_machine(functools.partial(self._all, progress)) if whole else None
        )

    def _all(self, progress: Progress) -> tuple[np.ndarray, np.ndarray]:
        """Hint, and whether there is one, before every token."""
        (counts,) = causal_counts(self.tokens, [self.cfg.tilt_order], self.bos, "most", progress)
        return counts.hint, self._sure(counts.agree, counts.total)

    def _sure(self, agree: Any, total: Any) -> Any:
        return (agree > 0) & (agree >= self.cfg.tilt_share * total)

    def hints(self, index: np.ndarray) -> tuple[Tensor, Tensor]:
        """Before each target [...]: hint int64, and whether there is one."""
        if self.found:
            hint, sure = (array[index + 1] for array in self.found)
        else:
            found = [self._after(self.tokens[: target + 1]) for target in index.flat]
            hint, sure = np.array(found).T.reshape(2, *index.shape)
        return self.rt.put(hint.astype(np.int64)), self.rt.put(sure.astype(bool))

    def _after(self, known: np.ndarray) -> tuple[int, bool]:
        """By searching the tokens before a target."""
        cfg = self.cfg
        (counts,) = counts_after(known, [cfg.tilt_order], cfg.vocab_size, self.bos)
        hint = int(np.argmax(counts.n))
        return hint, bool(self._sure(counts.n[hint], counts.total))


def counts_before(
    keys: np.ndarray, groups: np.ndarray, counted: np.ndarray | None = None
) -> np.ndarray:
    """How many counted elements with its key stand in earlier groups, for every element -> [n].

    keys [n] whole numbers; groups [n] never falling (a token, a window, a chunk): what one group
    adds, only later ones see. counted [n] bool, None = all. One sort.
    """
    n = len(keys)
    bits = n.bit_length()
    order = keys.astype(np.int64) << bits | np.arange(n)
    order.sort()  # by key, then by position
    at = order & ((1 << bits) - 1)
    keys = order >> bits
    groups = groups[at]
    new_key = np.concatenate(([True], keys[1:] != keys[:-1]))
    new_group = np.concatenate(([True], groups[1:] != groups[:-1]))
    runs = np.flatnonzero(new_key | new_group)  # of equal key and group
    seen = runs
    if counted is not None:
        seen = (np.cumsum(counted[at]) - counted[at])[runs]
    before = seen - np.maximum.accumulate(np.where(new_key[runs], seen, 0))
    out = np.empty(n, np.int32)
    out[at] = np.repeat(before.astype(np.int32), np.diff(runs, append=n))
    return out


class HashedCounts:
    """The hashed caches' ratios min(F, C) / C of every order, as a service for a stream's targets.

    C counts earlier sightings of the context's counter, F of context and target's; -1 where an
    order does not count. A window (PR 740) or chunk (PR 859) is added after it. PR 740: an order
    sees and gets only what no higher order mixed. PR 859: all orders, contexts from the window, no
    n-gram across a chunk's start. Sorting the whole stream once an order is many times faster than
    keeping tables up to date from window to window.
    """

    def __init__(self, cfg: Config, rt: Runtime):
        self.cfg = cfg
        self.rt = rt
        self.orders = cfg.ngram_orders

    def prepare(
        self,
        tokens: np.ndarray,
        windows: Windows,
        whole: bool = True,
        progress: Progress = unseen,
    ) -> None:
        """Counts a stream."""
        self.tokens = tokens.astype(np.uint32)
        n = windows.targets
        self.target = np.arange(n, dtype=np.int32)
        window = windows.window_of(self.target)
        self.row = self.target - window * windows.stride  # position in the window
        first = np.where(window > 0, self.target - self.row + windows.seq_len - windows.stride, 0)
        self.groups = first // (self.cfg.ngram_chunk_tokens or windows.stride)
        starts = np.flatnonzero(np.diff(self.groups, prepend=-1))
        self.begin = np.repeat(starts, np.diff(starts, append=n))  # first target of one's group
        (self.own,) = self.rt.once_a_machine(functools.partial(self._count, progress))

    def _count(self, progress: Progress) -> list[np.ndarray]:
        """The ratios of the stream's own tokens [K, n]."""
        self.own = np.full((len(self.orders), len(self.target)), -1, np.float32)
        with ThreadPoolExecutor(2) as pool:  # the two counters of an order
            for done, order in enumerate(reversed(self.orders), 1):
                self._count_order(order, pool)
                progress(done / len(self.orders))
        return [self.own]

    def _count_order(self, order: int, pool: ThreadPoolExecutor) -> None:
        """The ratios of one order, for all targets that look it up."""
        looked, added, slots = self._order(order)
        used = looked | added
        counted = None if added[used].all() else added[used]
        groups = self.groups[used]

        def count(slot: np.ndarray) -> np.ndarray:
            return counts_before(slot[used], groups, counted)

        context, full = pool.map(count, slots)
        ratio = np.minimum(context, full) / np.maximum(context, 1, dtype=np.float32)
        ratio[(context < self.cfg.ngram_min_count) | ~looked[used]] = -1
        self.own[order - self.orders[0], used] = ratio

    def _order(self, order: int) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
        """Which targets look an order up, which are added to it, and their counters."""
        n = len(self.target)
        padded = np.concatenate((np.zeros(order - 2, np.uint32), self.tokens))
        context = [padded[i : i + n] for i in range(order - 1)]
        slots = ngram_slots(context, self.tokens[1:], self.cfg)
        if self.cfg.ngram == "gated":
            return self.row >= order - 1, self.target - self.begin >= order - 2, slots
        unmixed = (self.own[order - self.orders[0] + 1 :] < 0).all(0)  # by any higher order
        free = unmixed & (self.target >= order - 2)
        return free, free, slots

    def ratios_of(self, index: np.ndarray, ids: Tensor) -> Tensor:
        """Of tokens ids [..., C] as targets number index [...] -> [..., C, K], float64."""
        asked = ids.cpu().numpy().astype(np.uint32)
        if asked.shape[-1] == 1 and np.array_equal(asked[..., 0], self.tokens[index + 1]):
            found = np.moveaxis(self.own[:, index], 0, -1)[..., None, :]
        else:
            order = np.argsort(index, axis=None, kind="stable")  # the tables grow with the stream
            rows = asked.reshape(-1, asked.shape[-1])
            found = np.empty((*rows.shape, len(self.orders)), np.float32)
            found[order] = self._from_tables(index.flat[order], rows[order])
            found = found.reshape(*asked.shape, len(self.orders))
        return self.rt.put(np.ascontiguousarray(found)).double()

    def _from_tables(self, index: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Ratios of tokens ids [m, C] at rising targets [m] -> [m, C, K], from plain tables."""
        out = np.full((*ids.shape, len(self.orders)), -1, np.float32)
        for column, order in enumerate(self.orders):
            looked, added, slots = self._order(order)
            contexts, fulls = np.zeros((2, self.cfg.ngram_buckets), np.uint32)
            done = 0
            for row, target in enumerate(index):
                fresh = slice(done, max(self.begin[target], done))
                done = fresh.stop
                np.add.at(contexts, slots[0][fresh][added[fresh]], 1)
                np.add.at(fulls, slots[1][fresh][added[fresh]], 1)
                count = contexts[slots[0][target]]
                if looked[target] and count >= self.cfg.ngram_min_count:
                    context = self.tokens[target - order + 2 : target + 1, None]
                    _, full = ngram_slots(context, ids[row], self.cfg)
                    out[row, :, column] = np.minimum(fulls[full], count) / count
        return out


# --- distributions: what is believed --------------------------------------------------------------


def entropy(log_p: Tensor) -> Tensor:
    """[..., V] -> nats [...]."""
    return -(log_p.exp() * log_p).sum(-1)


def temper(logits: Tensor, temperature: float) -> Tensor:
    """Logits over a temperature that acts the more the surer they are (PR 834).

    The divisor is 1 - (1 - temperature) (1 - entropy / ln V), within 0.9 and 1.05.
    """
    if temperature == 1:
        return logits
    certain = 1 - entropy(F.log_softmax(logits, -1)) / math.log(logits.size(-1))
    return logits / (1 - (1 - temperature) * certain).clamp(0.9, 1.05).unsqueeze(-1)


class Distribution:
    """What is believed at every position of a batch, fixed before its targets are known.

    A dataclass whose tensors and arrays begin with the batch's positions [B, S].
    """

    def prob(self, ids: Tensor) -> Tensor:
        """p of token ids [B, S, C] -> [B, S, C], float64. Those of all V tokens sum to one."""
        raise NotImplementedError

    def at(self, rows: np.ndarray, columns: np.ndarray) -> Distribution:
        """The same at m of the positions -> [m, 1] positions."""
        chosen = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Distribution):
                chosen[field.name] = value.at(rows, columns)
            elif isinstance(value, (Tensor, np.ndarray)):
                chosen[field.name] = value[rows, columns][:, None]
        return dataclasses.replace(self, **chosen)


@dataclasses.dataclass
class Softmax(Distribution):
    """The network's own distribution."""

    log_p: Tensor  # [B, S, V] float32
    hidden: Tensor  # [B, S, D] the final norm's output

    def prob(self, ids: Tensor) -> Tensor:
        log_p = self.log_p.gather(-1, ids)
        return (log_p.cpu() if log_p.device.type in NO_FLOAT64 else log_p).double().exp()


@dataclasses.dataclass
class Tilted(Distribution):
    """A hinted token is raised, the others shrink in proportion."""

    base: Distribution
    hint: Tensor  # [B, S, 1]
    known: Tensor  # [B, S, 1] bool, there is a hint
    raised: Tensor  # [B, S, 1] p of the hint
    shrink: Tensor  # [B, S, 1] factor of all others
    bucket: Tensor | None = None  # [B, S], where it is learned by how much

    def prob(self, ids: Tensor) -> Tensor:
        return torch.where(ids == self.hint, self.raised, self.base.prob(ids) * self.shrink)


@dataclasses.dataclass
class Mixture(Distribution):
    """A weighted mean of the base and of what n-gram counts say, order by order."""

    base: Distribution
    index: np.ndarray  # [B, S]
    weights: Tensor  # [B, S, 1 + K], base first
    counts: NgramCounts
    bucket: Tensor  # [B, S]
    # The last ids, and their parts.
    known: tuple[Any, Any] = dataclasses.field(default=(None, None), init=False)

    def parts(self, ids: Tensor) -> Tensor:
        """What each expert adds to p of ids [B, S, C] -> [B, S, C, 1 + K].

        Who learns asks what was charged: the host looks it up once.
        """
        asked, parts = self.known
        if ids is not asked:
            p = self.base.prob(ids).unsqueeze(-1)
            q = self.counts.prob(self.index, ids)
            parts = self.weights.unsqueeze(-2) * torch.cat((p, q), -1)
            self.known = ids, parts
        return parts

    def prob(self, ids: Tensor) -> Tensor:
        return self.parts(ids).sum(-1)


@dataclasses.dataclass
class Gated(Distribution):
    """PR 859's head weighs the base and what counts say of the same tokens, order by order."""

    base: Distribution
    index: np.ndarray  # [B, S]
    gate: Tensor  # [B, S, 1 + K] logits
    counts: Callable[[np.ndarray, Tensor], Tensor]  # (index, ids [B, S, C]) -> [B, S, C, K]

    def prob(self, ids: Tensor) -> Tensor:
        p = mix(self.gate.unsqueeze(-2), self.base.prob(ids), self.counts(self.index, ids))
        return p.clamp(1e-12, 1)


@dataclasses.dataclass
class Cached(Distribution):
    """PR 740's: the one order that counts has a weight that the network decides."""

    base: Distribution
    index: np.ndarray  # [B, S]
    weight: Tensor  # [B, S, 1]
    counts: Callable[[np.ndarray, Tensor], Tensor]  # (index, ids [B, S, C]) -> [B, S, C, K]

    def prob(self, ids: Tensor) -> Tensor:
        p = self.base.prob(ids)
        ratio = self.counts(self.index, ids).amax(-1)
        mixed = (1 - self.weight) * p + self.weight * ratio
        return torch.where(ratio < 0, p, mixed).clamp(1e-12, 1)


# --- networks ------------------------------------------------------------------------------------


# Work that ends with a commit is cut so that as many processes have a share of it; the number is
# fixed, so that scores do not depend on how many there are.
BUSY_PROCESSES = 8


def scoring_tokens(cfg: Config, rt: Runtime) -> int:
    """Tokens of a scoring batch."""
    return cfg.eval_batch_tokens or min(rt.profile.score_tokens, 2**28 // cfg.vocab_size)


class WindowNetwork:
    """The model over windows, each target with as much context as the stride allows.

    Networks turn a batch into the model's distribution. One that `learns` sets aside what a charged
    batch teaches (`collect`) and learns it at the chunk's end (`commit`).
    """

    learns = False
    carries_on = False  # from batch to batch, in the order of the stream
    isolates_documents = False  # what a document is charged does not depend on others
    chunk_targets = 0  # targets between two commits, 1 if they are its own; 0 = it does not care
    cache: KVCache | None = None  # what stands before a batch, for one that carries on
    head_adapter: Adapter | None = None  # of a batch's rows, for one that adapts

    def __init__(
        self,
        model: GPT,
        rt: Runtime,
        cfg: Config,
        seq_len: int,
        stride: int,
        temperature: float = 1.0,
    ):
        self.model = model
        self.rt = rt
        self.seq_len = seq_len
        self.stride = stride
        self.temperature = temperature
        self.batch_rows = max(1, scoring_tokens(cfg, rt) // seq_len)
        self.hidden = rt.compile(GPT.hidden)  # of any model: a deep copy has its own

    def plan(self, tokens: np.ndarray, chunk_targets: int) -> Plan:
        """The batches that score a stream, in chunks of so many targets; 0 = one chunk."""
        targets = most = len(tokens) - 1
        if chunk_targets:
            most = -(-min(targets, chunk_targets) // BUSY_PROCESSES)
        return Windows(
            targets=targets,
            seq_len=self.seq_len,
            stride=self.stride,
            batch_rows=min(self.batch_rows, -(-most // self.stride)),
            chunk_targets=chunk_targets,
            fixed_rows=self.rt.profile.fixed_rows,
        )

    def probe(self, tokens: np.ndarray, chunk_targets: int) -> Plan:
        """A plan whose batches the checks can afford."""
        return self.plan(tokens, chunk_targets)

    def predict(self, batch: Batch) -> Softmax:
        """The distribution at the batch's positions."""
        rows, scored = batch.index.shape
        ids = self.rt.put(batch.ids)
        context = self.model.context(ids, self.cache, span=batch.span)
        hidden = self.hidden(self.model, ids, context=context)[:, -scored:]  # [R, S, D]
        logits = self.model.head(hidden, adapter=self.head_adapter)
        if self.temperature != 1:
            logits = temper(logits, self.temperature)
        return Softmax(F.log_softmax(logits[:rows], -1), hidden[:rows])

    def collect(self, batch: Batch, targets: Tensor) -> None:
        """Sets aside a charged batch; targets [B, S]."""

    def commit(self, chunk: Chunk) -> None:
        """Learns what was set aside."""

    def state_dict(self) -> dict[str, Any]:
        """All that it has learned, as copies."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes a state back."""


@dataclasses.dataclass
class Reading:
    """How far a pass over a stream has come."""

    cache: KVCache
    tokens: np.ndarray  # the last ones that are in the cache
    at: int  # number of the input after them


class StreamNetwork(WindowNetwork):
    """One pass over the stream with a sliding-window mask of EVAL_STREAM tokens.

    Keys and values go from batch to batch (KVCache), so every position is computed once. A batch
    that does not continue the last one starts from the tokens before it, as many as can reach it
    through all layers.
    """

    carries_on = True

    def __init__(self, model: GPT, rt: Runtime, cfg: Config, temperature: float = 1.0):
        window = cfg.eval_stream
        super().__init__(model, rt, cfg, window, window, temperature)
        in_chunks = math.gcd(cfg.ttt_chunk_tokens // window, cfg.mix_chunk_tokens // window)
        self.span = window * math.gcd(in_chunks, self.batch_rows)  # chunks end where batches do
        self.window = window
        self.bos = cfg.bos_id if cfg.stream_docs else None
        self.isolates_documents = cfg.stream_docs
        inputs = [2, *cfg.hash_orders, *(window - 1 + order for order in cfg.induction_orders)]
        # Of each attention, and of the inputs with SmearGate, which reads the one before.
        self.left_context = len(model.steps) * (window - 1) + max(inputs)
        self.hidden = GPT.hidden
        self.readings: list[Reading] = []  # two: of whole batches, and of single positions

    def plan(self, tokens: np.ndarray, chunk_targets: int) -> Plan:
        targets = len(tokens) - 1
        return Windows(targets, self.span, self.span, 1, chunk_targets, self.left_context)

    def probe(self, tokens: np.ndarray, chunk_targets: int) -> Plan:
        span = -(-256 // self.window) * self.window
        return Windows(len(tokens) - 1, span, span, 1, 0, self.left_context)

    def predict(self, batch: Batch) -> Softmax:
        first = int(batch.index[0, 0])
        reading = self._reading(batch.left_context, first)
        self.cache = reading.cache
        distribution = super().predict(batch)
        reading.tokens = np.append(reading.tokens, batch.ids[0])[-self.left_context :]
        reading.at = first + batch.ids.shape[1]
        return distribution

    def _reading(self, before: np.ndarray, first: int) -> Reading:
        """The one that stands here after these tokens, or a new one that has read them alone."""
        for reading in self.readings:
            known = reading.tokens[len(reading.tokens) - len(before) :]
            if reading.at == first and np.array_equal(known, before):
                return reading
        cache = KVCache(self.window, self.bos)
        tokens = before.astype(np.int64)
        for piece in np.split(tokens, [len(before) % self.window]):  # then whole windows
            if piece.size:
                ids = self.rt.put(piece[None])
                self.model.hidden(ids, context=self.model.context(ids, cache))
        self.readings = [*self.readings[-1:], Reading(cache, tokens, first)]
        return self.readings[-1]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.readings = []  # keys and values are of other weights


def adapted_names(model: GPT, cfg: Config) -> set[str]:
    """What test-time training may change: all, or scales, head, last blocks (their queries)."""
    names = {name for name, _ in model.named_parameters()}
    if not cfg.ttt_freeze_blocks:
        return names
    first = cfg.num_layers - cfg.ttt_freeze_blocks
    blocks = tuple(f"blocks.{i}." for i in range(first, cfg.num_layers))
    chosen = set()
    for name in names:
        in_blocks = name.startswith(blocks) and (not cfg.qttt or ".c_q." in name)
        if in_blocks or any(part in name for part in ("scale", "lm_head", "alpha_head")):
            chosen.add(name)
    return chosen


def adapter_shapes(model: GPT, cfg: Config) -> list[dict[str, tuple[int, int]]]:
    """Place -> outputs and inputs of every executed layer's adapters; at last the head's."""
    places = cfg.adapted_places
    first = cfg.num_layers - cfg.ttt_freeze_blocks if cfg.ttt_freeze_blocks else 0
    shapes: list[dict[str, tuple[int, int]]] = []
    for step in model.steps:
        attn, mlp = model.blocks[step.block].attn, model.blocks[step.block].mlp
        matrices = {"q": attn.c_q, "k": attn.c_k, "v": attn.c_v, "out": attn.proj}
        matrices |= {"up": mlp.fc, "down": mlp.proj}
        possible = {place: matrix.weight.shape for place, matrix in matrices.items()}
        possible |= dict.fromkeys(("attn", "mlp"), (cfg.model_dim, cfg.model_dim))
        here = {place: shape for place, shape in possible.items() if place in places}
        shapes.append(here if step.block >= first else {})
    shapes.append({"head": (cfg.vocab_size, cfg.model_dim)} if "head" in places else {})
    return shapes


def adapter_step(
    params: Sequence[Tensor],
    squares: Sequence[Tensor],
    gradients: Sequence[Tensor],
    steps: Tensor,
    rates: Tensor,
    decay: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """AdamW of adapters [B, ...], each at its own step [B] and rate [B] -> parameters and squares.

    Betas (0, 0.99), epsilon 1e-10 (PR 2135).
    """
    bias = 1 - 0.99 ** steps.clamp_min(1).view(-1, 1, 1)
    rates = rates.view(-1, 1, 1)
    params_after, squares_after = [], []
    for p, square, gradient in zip(params, squares, gradients):
        mean = 0.99 * square + 0.01 * gradient.square()
        step = gradient / ((mean / bias).sqrt() + 1e-10)
        params_after.append(p * (1 - decay * rates) - rates * step)
        squares_after.append(mean)
    return params_after, squares_after


DOCUMENT_GROUPS = 128  # that are sorted by length together, where documents know nothing of others
SLOTS_A_PROCESS = 64  # at most, where their number changes no score: 80 GB for the defaults


class PerDocumentLoRA(WindowNetwork):
    """Low-rank adapters, a set for each document, that learn each chunk of it after its charge.

    Documents stand side by side in slots, of adapters each: TTT_DOCS, or as many as fit the GPUs,
    where no score depends on it. What one learns no other sees. For the next ones B is zero again,
    and A as it was at first, the same for all, or, with TTT_LORA_KEEP, as its slot left it. A
    process has the adapters of its own slots. Every executed layer has its own. The pass that is
    charged is also the one that teaches: its graph is kept until the chunk's end.
    """

    learns = True
    chunk_targets = 1

    def __init__(self, model: GPT, rt: Runtime, cfg: Config, in_order: bool = False):
        super().__init__(model, rt, cfg, cfg.score_len, cfg.ttt_lora_chunk, cfg.ttt_temperature)
        self.cfg = cfg
        self.window = 1 if in_order else DOCUMENT_GROUPS
        most = cfg.ttt_docs if in_order or cfg.ttt_lora_keep else SLOTS_A_PROCESS * rt.world
        self.slots = min(cfg.ttt_docs, most)  # of all processes
        self.update = rt.compile(adapter_step)
        self.compiled_hidden, self.hidden = self.hidden, self._hidden
        self.adapters: list[dict[str, Adapter]] = []  # of the batch at hand
        self.isolates_documents = not cfg.ttt_lora_keep
        self.believed: tuple[Tensor, list[Tensor]] | None = None  # log p of the last prediction
        self.pending: list[tuple[Batch, Tensor, list[Tensor], Tensor]] = []
        model.requires_grad_(False)
        shapes = adapter_shapes(model, cfg)
        self.places = [list(places) for places in shapes]
        generator = torch.Generator().manual_seed(1337)  # not SEED: no artifact holds it
        self.start = []  # A at first
        self.params = []  # A and B of every place
        for rows, columns in itertools.chain(*(places.values() for places in shapes)):
            kinds = self.slots if cfg.ttt_lora_keep else 1  # else no document's slot may matter
            low = 2 * rt.uniform(generator, kinds, cfg.ttt_lora_rank, columns) - 1
            low = (low / math.sqrt(columns)).expand(self.slots, -1, -1)
            low = low[rt.rank % self.slots :: rt.world]  # one at least
            high = torch.zeros(len(low), rows, cfg.ttt_lora_rank, device=rt.device)
            self.start.append(low.clone() if cfg.ttt_lora_keep else low)  # not all slots' own
            self.params += [low.clone(), high]
        self.squares = [torch.zeros_like(p) for p in self.params]
        self.steps = torch.zeros(len(low), device=rt.device)

    def plan(self, tokens: np.ndarray, chunk_targets: int) -> Plan:
        cfg = self.cfg
        return Documents(
            tokens,
            cfg.bos_id,
            self.seq_len,
            self.stride,
            self.slots,
            window=self.window,
            rows=len(self.steps),
            fixed_rows=self.rt.profile.fixed_rows,
            early=cfg.early_chunks,
            prefix=cfg.ttt_global_docs,
            keeps=cfg.ttt_lora_keep,
        )

    def _hidden(self, model: GPT, ids: Tensor, context: PassContext) -> Tensor:
        """With adapters; one graph for all lengths and numbers of rows: chunks have many."""
        cos, sin = context.cos.view_as(context.cos), context.sin.view_as(context.sin)
        self.rt.mark_varying(0, ids, cos, sin)
        self.rt.mark_varying(1, ids)
        backend = sdpa_attention if context.backend is blocked_attention else context.backend
        context = PassContext(backend, cos, sin, adapters=self.adapters)
        return self.compiled_hidden(model, ids, context=context)

    def _own(self, tensors: Sequence[Tensor], batch: Batch) -> list[Tensor]:
        """The rows' own of all slots' [S, ...]: a view of the first, or with slots a copy.

        Slots are numbers on the device: an index on the host would wait for it. A slot of other
        processes, which checks ask for too, is the last one.
        """
        if batch.slots is None:
            return [tensor.narrow(0, 0, len(batch.ids)) for tensor in tensors]
        slots = self._slots(batch)
        return [tensor[slots] for tensor in tensors]

    def _slots(self, batch: Batch) -> Tensor:
        own = np.minimum(batch.slots // self.rt.world, len(self.steps) - 1)
        return self.rt.put(np.resize(own, len(batch.ids)))

    @torch.inference_mode(False)
    @torch.enable_grad()
    def predict(self, batch: Batch) -> Softmax:
        """As the base, with the rows' own adapters, and a graph to learn from."""
        self.believed = None  # frees an earlier prediction's graph, if nothing came of it
        leaves = [p.detach().requires_grad_() for p in self._own(self.params, batch)]
        self.rt.mark_varying(0, *leaves)
        scale = self.cfg.ttt_lora_alpha / self.cfg.ttt_lora_rank
        pairs = iter(zip(leaves[::2], leaves[1::2]))
        *self.adapters, head = (
            {place: Adapter(*next(pairs), scale) for place in places} for places in self.places
        )
        self.head_adapter = head.get("head")
        found = super().predict(batch)
        self.believed = found.log_p, leaves
        return Softmax(found.log_p.detach(), found.hidden.detach())

    def collect(self, batch: Batch, targets: Tensor) -> None:
        if batch.goes_on.any():
            self.pending.append((batch, *self.believed, targets))
        self.believed = None

    def commit(self, chunk: Chunk) -> None:
        for pending in self.pending:
            self._step(*pending)
        self.pending = []
        if chunk.ends_documents:
            with torch.no_grad():
                if not self.cfg.ttt_lora_keep:
                    torch._foreach_copy_(self.params[::2], self.start)
                torch._foreach_zero_([*self.params[1::2], *self.squares, self.steps])

    def _step(self, batch: Batch, log_p: Tensor, leaves: list[Tensor], targets: Tensor) -> None:
        """One step on the sum over documents of their chunk's mean loss.

        A document's last chunk teaches nothing, since nothing comes after it.
        """
        goes_on = np.zeros(len(batch.ids), np.float32)
        goes_on[: len(batch.index)] = batch.goes_on
        goes_on = self.rt.put(goes_on)
        nats = -log_p.gather(-1, targets.unsqueeze(-1)).mean((1, 2))
        gradients = torch.autograd.grad(nats @ goes_on[: len(nats)], leaves)
        with torch.no_grad():
            squares = self._own(self.squares, batch)
            steps = self._own([self.steps], batch)[0] + goes_on
            rates = self.cfg.ttt_lr * goes_on
            self.rt.mark_varying(0, *squares, *gradients, steps, rates)
            new = self.update(leaves, squares, gradients, steps, rates, self.cfg.ttt_lora_wd)
            values = [*itertools.chain(*new), steps]
            if batch.slots is None:
                torch._foreach_copy_(self._own(self._state(), batch), values)
                return
            learned = self._slots(batch)[: len(batch.index)]
            for old, value in zip(self._state(), values):
                old[learned] = value[: len(learned)]

    def _state(self) -> list[Tensor]:
        return [*self.params, *self.squares, self.steps]

    def state_dict(self) -> dict[str, Any]:
        return {"adapters": [p.detach().clone() for p in self._state()]}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        torch._foreach_copy_(self._state(), state["adapters"])
        self.pending = []
        self.believed = None


class GlobalStep:
    """All weights learn the first TTT_GLOBAL_DOCS documents once, after all these were charged.

    One pass of SGD (PR 1610): a step for every TTT_CHUNK_TOKENS targets, in the stream's order,
    momentum 0.9, gradients clipped to norm 1. The rate falls along a cosine, to zero at the last
    step, which is left out where there are two or more. Attention stays inside documents, and
    inside windows of the scoring length.
    """

    def __init__(self, network: WindowNetwork, cfg: Config):
        self.cfg = cfg
        self.rt = network.rt
        self.model = network.model
        self.row = cfg.score_len
        self.loss = self.rt.compile(GPT.forward)

    def warn(self, plan: Documents, log: RunLog) -> None:
        """Says so if nothing of a stream comes after the step."""
        documents = len(plan.starts)
        if documents <= self.cfg.ttt_global_docs:
            log.log(
                f"WARNING: TTT_GLOBAL_DOCS={self.cfg.ttt_global_docs} changes no score: "
                f"the stream has {documents} documents"
            )

    def after(self, chunk: Chunk, tokens: np.ndarray) -> None:
        """Acts if with this chunk the last of its documents is charged; tokens are known so far."""
        if not chunk.closes:
            return
        charged = document_starts(tokens[: chunk.hi], self.cfg.bos_id)
        if len(charged) == self.cfg.ttt_global_docs:
            self.pass_over(tokens[: chunk.hi + 1])

    def pass_over(self, tokens: np.ndarray) -> None:
        """Learns a stream."""
        cfg, rt = self.cfg, self.rt
        params = [p.requires_grad_() for p in self.model.parameters()]
        optimizer = torch.optim.SGD(params, lr=cfg.ttt_global_lr, momentum=0.9)
        gradients = bind_flat_gradients(params)
        size, targets = cfg.ttt_chunk_tokens, len(tokens) - 1
        piece = -(-size // BUSY_PROCESSES)  # of a step, on one process
        steps = max(1, -(-targets // size) - 1)  # at one more the rate would be zero
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for number in range(steps):
            gradients.zero_()
            lo, hi = number * size, min((number + 1) * size, targets)
            for at in range(lo + rt.rank * piece, hi, rt.world * piece):
                end = min(at + piece, hi)
                (self._mean_loss(tokens[at : end + 1]) * ((end - at) / (hi - lo))).backward()
            rt.sum_(gradients)
            clip_gradients(gradients, 1.0)
            optimizer.step()
            schedule.step()
        for p in params:
            p.grad = None
        self.model.requires_grad_(False)

    def _mean_loss(self, tokens: np.ndarray) -> Tensor:
        """Of one packed row."""
        ids, targets = (part.astype(np.int64)[None] for part in (tokens[:-1], tokens[1:]))
        # With bounds, room for pieces of 128 tokens: another number would be another graph.
        cut = 0 if self.rt.pads_documents else 128
        context = packed_context(self.model, self.rt, ids, self.row, self.row, cut)
        return self.loss(self.model, self.rt.put(ids), self.rt.put(targets), context=context)

    def state_dict(self) -> dict[str, Any]:
        """Weights, as copies."""
        return {"model": copy.deepcopy(self.model.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes them back."""
        self.model.load_state_dict(state["model"])


class TestTimeTraining:
    """A network's weights learn every chunk after it was charged (PR 834), or all of it before.

    A step takes TTT_BATCH_SEQS rows from each of TTT_PARTS equal parts of the chunk, whatever the
    number of processes; the rate falls with the chunks along a cosine. The optimizer's state lasts
    from chunk to chunk. TTT_BEFORE_SCORING (PR 489): all tokens at a constant rate, gradients not
    clipped, and then the score, which is no valid one.
    """

    __test__ = False  # for pytest: not a test

    def __init__(self, network: WindowNetwork, cfg: Config, table: ByteTable):
        self.cfg = cfg
        self.table = table
        self.rt = network.rt
        self.model = network.model
        self.row = cfg.score_len
        self.first = cfg.ttt_before_scoring
        self.logits = self.rt.compile(GPT.logits)
        chosen = adapted_names(self.model.requires_grad_(False), cfg)
        self.params = [
            p.requires_grad_() for name, p in self.model.named_parameters() if name in chosen
        ]
        if cfg.ttt_optimizer == "sgd":
            self.optimizer = torch.optim.SGD(self.params, momentum=0.9)
        else:
            self.optimizer = torch.optim.AdamW(self.params, weight_decay=0.0)

    def learn(
        self, tokens: np.ndarray, progress: float, go_on: Callable[[float], bool] | None = None
    ) -> bool:
        """TTT_EPOCHS passes over the rows, in order; go_on(share done) may end them -> whether not.

        progress: share of the stream that is over; at its end there is nothing left to learn for.
        """
        cfg, rt = self.cfg, self.rt
        factor = 1.0 if self.first else 0.5 * (1 + math.cos(math.pi * progress))
        self.optimizer.param_groups[0]["lr"] = cfg.ttt_lr * factor
        gradients = bind_flat_gradients(self.params)
        piece = -(-cfg.ttt_batch_seqs * cfg.ttt_parts // BUSY_PROCESSES)  # rows of a share
        for epoch in range(cfg.ttt_epochs if progress < 1 else 0):
            for rows, weights, share in self._steps(tokens, piece):
                gradients.zero_()
                for first in range(rt.rank * piece, len(rows), rt.world * piece):
                    mine = rows[first : first + piece]
                    ids = rt.put(mine[:, :-1].copy())
                    targets = rt.put(mine[:, 1:].flatten())
                    context = self.model.context(ids)
                    logits = self.logits(self.model, ids, context=context).flatten(0, 1)
                    nats = F.cross_entropy(logits, targets, reduction="none")
                    (nats @ rt.put(weights[first : first + piece].flatten())).backward()
                rt.sum_(gradients)
                if not self.first:
                    clip_gradients(gradients, 1.0)
                self.optimizer.step()
                if go_on and not go_on((epoch + share) / cfg.ttt_epochs):
                    return False
        return True

    def _steps(self, tokens: np.ndarray, multiple: int) -> Iterator[tuple[Any, Any, float]]:
        """The steps of a pass: rows of tokens [N, T + 1], weights [N, T], share of the pass.

        A step has TTT_BATCH_SEQS rows of every part, if there are as many left; what does not fill
        a row is left out. Its loss is the mean over parts of the mean over their targets, by the
        targets' bytes with BYTE_WEIGHTED_TTT. Rows without weight fill N up to a multiple.
        """
        size, count = self.cfg.ttt_batch_seqs, self.cfg.ttt_parts
        total = (len(tokens) - 1) // self.row
        edges = [total * part // count for part in range(count + 1)]
        parts = [(lo * self.row, hi - lo) for lo, hi in itertools.pairwise(edges)]
        if self.first:  # PR 489 cuts at tokens, and drops a last row of its own in a step
            span = total * self.row // count
            rows, rest = divmod(span, self.row)
            if rest == 0 and (rows - 1) % size == 0:
                rows -= 1
            parts = [(part * span, rows) for part in range(count)]
        longest = max(rows for _, rows in parts)
        for at in range(0, longest, size):
            left = [(lo + at * self.row, min(size, rows - at)) for lo, rows in parts if rows > at]
            firsts = [lo + self.row * np.arange(rows) for lo, rows in left]
            index = np.concatenate(firsts)[:, None] + np.arange(self.row + 1)
            step = tokens[index].astype(np.int64)
            weights = np.ones((len(step), self.row), np.float32)
            if self.cfg.byte_weighted_ttt:
                weights = np.stack([self.table.count(row) for row in step]).astype(np.float32)
            part = np.repeat(np.arange(len(left)), [rows for _, rows in left])
            totals = np.bincount(part, weights.sum(1))[part] * len(left)
            weights /= np.maximum(totals, 1)[:, None].astype(np.float32)
            missing = (0, -len(step) % multiple)
            step, weights = (np.pad(x, (missing, (0, 0))) for x in (step, weights))
            yield step, weights, min(1.0, (at + size) / longest)

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimizer, as copies."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return copy.deepcopy(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes a state back."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))


# --- mixers: distributions over distributions -----------------------------------------------------


class BucketStatistics:
    """Sums by bucket of context. What is collected takes effect at the next commit.

    All that a bucket is made of is known before the target is.
    """

    def __init__(self, rt: Runtime, levels: tuple[int, ...], prior: Sequence[float]):
        self.rt = rt
        self.levels = levels
        self.total = rt.put(np.tile(np.array(prior, float), (math.prod(levels), 1)))  # [buckets, n]
        self.pending = torch.zeros_like(self.total)

    def bucket(self, *features: Tensor) -> Tensor:
        """Number of the bucket for features [...], each cut to whole numbers below its levels."""
        row = torch.zeros_like(features[0], dtype=torch.int64)
        for feature, levels in zip(features, self.levels, strict=True):
            row = row * levels + feature.floor().clamp(0, levels - 1).long()
        return row

    def collect(self, bucket: Tensor, values: Tensor, real: np.ndarray) -> None:
        """Sets aside values [B, S, n] in their buckets [B, S], where they are real."""
        values = torch.where(self.rt.put(real).unsqueeze(-1), values, 0.0)
        self.pending.index_add_(0, bucket.flatten(), values.flatten(0, 1))

    def commit(self) -> None:
        """What processes have collected counts from now on."""
        self.total += self.rt.sum_(self.pending)
        self.pending.zero_()

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total.clone(), "pending": self.pending.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total.copy_(state["total"])
        self.pending.copy_(state["pending"])


class Mixer:
    """What makes another distribution of a network's or another mixer's, with n-gram counts."""

    validity = "valid"  # or unnormalised: its "probabilities" need not sum to one
    counts: NgramCounts | FrequentHints | HashedCounts | None = None
    statistics: BucketStatistics | None = None  # what it learns, if anything

    def over(self, base: Distribution, batch: Batch, network: Softmax) -> Distribution:
        """The distribution over `base` at the batch's positions; network: below all mixers."""
        raise NotImplementedError

    def collect(self, distribution: Any, targets: Tensor, real: np.ndarray) -> None:
        """Sets aside what charged targets [B, S, 1] say of a distribution that it made."""


class Tilt(Mixer):
    """Raises one hinted token: what followed the longest known context last (PR 1145, PR 2135).

    p'(a) = p(a) e^(b [a = hint]) / (1 + p(hint) (e^b - 1)), with b >= 0 such that p'(hint) is the
    share of hits in its bucket so far: by context, its count, the hint's share of it, and p(hint).
    """

    def __init__(self, rt: Runtime, counts: NgramCounts):
        self.counts = counts
        levels = (len(NGRAM_ORDERS) + 1, 6, 4, 8)
        self.statistics = BucketStatistics(rt, levels, (0.0, 2.0))  # hits, trials

    def over(self, base: Distribution, batch: Batch, network: Softmax) -> Tilted:
        facts = self.counts.facts(batch.index)
        hint = facts.hint.long().unsqueeze(-1)
        known = (facts.agree > 0).unsqueeze(-1)
        p = base.prob(hint)  # [B, S, 1]
        share = 4 * facts.agree / facts.count
        odds = 4 + (p.squeeze(-1).logit(1e-9) / 1.5).floor()
        bucket = self.statistics.bucket(facts.rank, facts.count.log2(), share, odds)
        hits, trials = self.statistics.total[bucket].unsqueeze(-2).unbind(-1)
        raised = torch.where(known, torch.maximum(p, hits / trials), p)
        shrink = torch.where(raised > p, (1 - raised) / (1 - p), 1.0)
        return Tilted(base, hint, known, raised, shrink, bucket)

    def collect(self, distribution: Tilted, targets: Tensor, real: np.ndarray) -> None:
        hit = targets == distribution.hint
        outcome = torch.cat((hit, torch.ones_like(hit)), -1) * distribution.known.double()
        self.statistics.collect(distribution.bucket, outcome, real)


class FixedTilt(Mixer):
    """Raises the token that mostly followed the context, always by as much (PR 1145, PR 2135).

    p'(a) = p(a) e^(b [a = hint]) / (1 + p(hint) (e^b - 1)), with b = TILT_BOOST.
    """

    def __init__(self, rt: Runtime, cfg: Config):
        self.counts = FrequentHints(cfg, rt)
        self.boost = cfg.tilt_boost

    def over(self, base: Distribution, batch: Batch, network: Softmax) -> Tilted:
        hint, known = (x.unsqueeze(-1) for x in self.counts.hints(batch.index))
        p = base.prob(hint)  # [B, S, 1]
        shrink = torch.where(known, 1 / (1 + p * math.expm1(self.boost)), 1.0)
        raised = torch.where(known, p * math.exp(self.boost) * shrink, p)
        return Tilted(base, hint, known, raised, shrink)


class NgramMixer(Mixer):
    """The network mixed with exact n-gram distributions of all orders, true probabilities all.

    Weights are learned online, by bucket: each expert's share of what was charged (expectation
    maximisation).
    """

    def __init__(self, rt: Runtime, counts: NgramCounts):
        self.counts = counts
        experts = len(NGRAM_ORDERS)
        prior = (9.0, *[1.0 / experts] * experts)
        self.statistics = BucketStatistics(rt, (experts + 1, 5, 4), prior)

    def over(self, base: Distribution, batch: Batch, network: Softmax) -> Mixture:
        facts = self.counts.facts(batch.index)
        doubt = 4 * entropy(network.log_p) / math.log(network.log_p.size(-1))
        bucket = self.statistics.bucket(facts.rank, facts.count.log2(), doubt)
        weights = self.statistics.total[bucket]
        weights = weights / weights.sum(-1, keepdim=True)
        return Mixture(base, batch.index, weights, self.counts, bucket)

    def collect(self, distribution: Mixture, targets: Tensor, real: np.ndarray) -> None:
        parts = distribution.parts(targets).squeeze(-2)
        self.statistics.collect(distribution.bucket, parts / parts.sum(-1, keepdim=True), real)


class GatedNgramMixer(Mixer):
    """Exact n-gram distributions of the hashed caches' orders, weighed by PR 859's head."""

    def __init__(self, cfg: Config, counts: NgramCounts, model: GPT):
        self.counts = counts
        self.head = model.alpha_head
        columns = [NGRAM_ORDERS.index(order) for order in cfg.ngram_orders]
        self.columns = counts.rt.put(np.array(columns))  # from the host every batch would wait

    def over(self, base: Distribution, batch: Batch, network: Softmax) -> Gated:
        def chosen(index: np.ndarray, ids: Tensor) -> Tensor:
            return self.counts.prob(index, ids)[..., self.columns]

        return Gated(base, batch.index, self.head(network.hidden).double(), chosen)


class HashedNgramCache(Mixer):
    """The hashed caches of PR 740 (fixed weight, backoff) and PR 859 (learned gate).

    An order's "probability" is the ratio of two counters, the second found with the target in its
    key: over the vocabulary the ratios add up to far more than one. Kept to reproduce what was
    published; no score.
    """

    validity = "unnormalised"

    def __init__(self, rt: Runtime, cfg: Config, model: GPT):
        self.cfg = cfg
        self.head = model.alpha_head
        self.counts = HashedCounts(cfg, rt)

    def over(self, base: Distribution, batch: Batch, network: Softmax) -> Gated | Cached:
        cfg = self.cfg
        ratios = self.counts.ratios_of
        if cfg.ngram == "gated":
            return Gated(base, batch.index, self.head(network.hidden).double(), ratios)
        weight = torch.full_like(network.log_p[..., :1], cfg.ngram_alpha, dtype=torch.float64)
        if cfg.ngram == "backoff":
            doubt = torch.sigmoid(2 * (entropy(network.log_p) - 4)).double().unsqueeze(-1)
            weight = cfg.ngram_ent_base + cfg.ngram_ent_range * doubt
        return Cached(base, batch.index, weight, ratios)


class Scorer:
    """A network, mixers over it, and perhaps test-time training. The harness calls, for each chunk:

    predict(batch) -> Distribution, from the inputs and what was learned from earlier chunks
    collect(...)      after the batch's targets were charged: what is to be learned, set aside
    commit(chunk)     after all of the chunk was charged: it takes effect
    """

    def __init__(
        self,
        name: str,
        network: WindowNetwork,
        mixers: Sequence[Mixer] = (),
        training: TestTimeTraining | None = None,
        mix_chunk: int = 0,
        global_step: GlobalStep | None = None,
    ):
        self.name = name
        self.network = network
        self.mixers = list(mixers)
        self.training = training
        self.global_step = global_step
        self.counts = list(dict.fromkeys(m.counts for m in self.mixers if m.counts))
        self.statistics = [m.statistics for m in self.mixers if m.statistics]
        self.trains = training is not None and not training.first  # on what was charged
        self.chunk_targets = network.chunk_targets
        if self.trains:
            self.chunk_targets = training.cfg.ttt_chunk_tokens
        elif self.statistics and not self.chunk_targets:
            self.chunk_targets = mix_chunk
        self.learns = network.learns or self.trains or bool(self.statistics)
        others = self.mixers or training or global_step
        self.isolates_documents = network.isolates_documents and not others
        # What carries on from batch to batch and learns is one sequence of work: rank 0 does it.
        self.alone = network.carries_on and self.chunk_targets > 0
        self.validity = "valid"
        if any(mixer.validity == "unnormalised" for mixer in self.mixers):
            self.validity = "unnormalised"
        if training and training.first:
            self.validity = "adapted_first"

    @torch.inference_mode()
    def predict(self, batch: Batch) -> Distribution:
        """What is believed at the batch's positions."""
        network = distribution = self.network.predict(batch)
        for mixer in self.mixers:
            distribution = mixer.over(distribution, batch, network)
        return distribution

    def collect(self, batch: Batch, distribution: Any, targets: Tensor) -> None:
        """After a batch was charged: targets [B, S, 1] of what predict believed."""
        with torch.inference_mode():
            for mixer in reversed(self.mixers):
                mixer.collect(distribution, targets, batch.real)
                distribution = distribution.base
        if self.network.learns:
            self.network.collect(batch, targets.squeeze(-1))

    def commit(self, chunk: Chunk, tokens: np.ndarray) -> None:
        """After a chunk was charged; tokens: the stream's, as far as they are known."""
        if self.network.learns:
            self.network.commit(chunk)
        if self.trains:
            self.training.learn(tokens[chunk.lo : chunk.hi + 1], chunk.progress)
        if self.global_step:
            self.global_step.after(chunk, tokens)
        if chunk.closes:
            for statistics in self.statistics:
                statistics.commit()

    def parts(self) -> list[Any]:
        """What has a state."""
        parts = (self.network, self.training, self.global_step, *self.statistics)
        return [part for part in parts if part is not None]

    def state_dict(self) -> dict[str, Any]:
        """All that it has learned, as copies."""
        return {"parts": [part.state_dict() for part in self.parts()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes a state back."""
        for part, stored in zip(self.parts(), state["parts"], strict=True):
            part.load_state_dict(stored)


# --- the harness ----------------------------------------------------------------------------------

LABELS = {
    "valid": "val_bpb",
    "unnormalised": "unnormalised_score",
    "adapted_first": "adapted_before_scoring",
}


@dataclasses.dataclass
class Score:
    """What a scorer was charged."""

    name: str
    nats: np.ndarray  # [n] float32, one a target
    sizes: np.ndarray  # [n] bytes of each target
    coverage: np.ndarray  # [n] how often each target was charged
    validity: str = "valid"
    complete: bool = True  # the whole validation set
    events: list[tuple[str, int, int]] = dataclasses.field(default_factory=list)  # in order
    seconds: float = 0.0
    loss: float = 0.0  # mean nats, from float64 sums
    bpb: float = 0.0
    mass: float = 1.0  # mean sum over the vocabulary of what is charged; its check measures it

    @property
    def label(self) -> str:
        """What the figure may be called."""
        if self.validity == "valid" and not self.complete:
            return "partial_bpb"
        return LABELS[self.validity]

    def record(self) -> dict[str, Any]:
        """The stage's entry in result.json."""
        loss = "val_loss" if self.label == "val_bpb" else "loss"
        return {
            "metric": self.label,
            self.label: self.bpb,
            loss: self.loss,
            "normalised": self.validity != "unnormalised",
            "mass": self.mass,
            "complete": self.complete,
            "tokens": len(self.nats),
            "bytes": int(self.sizes.sum(dtype=np.int64)),
            "seconds": round(self.seconds, 3),
        }


# Kind of round -> after so many the pace counts, and after so many a stage is judged early (0: by
# these never).
ROUNDS = {"adaptation": (4, 20), "batch": (2, 8), "chunk": (1, 0), "group": (1, 2)}


@dataclasses.dataclass
class TimeGuard:
    """Says whether a stage ends within MAX_EVAL_SECONDS, at the pace of its warm rounds.

    The first batches, adaptation steps and commit ask for memory and choose kernels: what they take
    is spent, and says nothing of the rest. Shares are of the stage's adaptation, then of its
    inputs; a global step is not foreseen. Every stage is judged twice: early, where only what is
    hopeless is skipped, and when an eighth of its rounds is over.
    """

    name: str
    limit: float  # seconds, all stages together; 0 = none
    rt: Runtime
    log: RunLog
    now: Callable[[], float]
    start: float
    since: float  # the pace counts from then on
    share: float = 0.0  # what was done then
    rounds: Counter[str] = dataclasses.field(default_factory=Counter)
    settled: set[str] = dataclasses.field(default_factory=set)  # kinds that were judged twice

    def after(self, kind: str, share: float, rounds_over: float, judged: bool = True) -> bool:
        """After a round of a kind, with this share done -> whether there is time for the rest.

        rounds_over: the share of the rounds, which all processes know alike.
        """
        self.rounds[kind] += 1
        warm, early = ROUNDS[kind]
        if self.rounds[kind] == warm:
            self.since, self.share = self.now(), share
        late = self.rounds[kind] > early and rounds_over >= 1 / 8 and kind not in self.settled
        if late:
            self.settled.add(kind)
        return self.fits(share) if judged and (late or self.rounds[kind] == early) else True

    def adapted(self, share: float) -> bool:
        """After a step of what comes before scoring -> whether there is time for the rest."""
        self.log.show_progress(f"{self.name}: adapting", self.start, share)
        return self.after("adaptation", share, share)

    def fits(self, share: float) -> bool:
        """Whether the stage ends in time if this share is done; rank 0 decides for all."""
        spent = self.since - self.start
        told = share - self.share  # what tells the pace
        coming = (self.now() - self.since) * (1 - self.share) / told if told > 0 else 0.0
        left = self.limit - self.log.booked(EVAL_PHASES)
        # Where that is little, one stall of a second looks like minutes.
        least = spent + (coming if told > 0.1 else coming / 3)
        late = self.rt.rank == 0 and self.limit > 0 and share < 1 and least > left
        late = self.rt.sum_(torch.tensor([float(late)])).item() > 0
        if late:
            self.log.log(
                f"scoring stage skipped: needs about {spent + coming:.0f} s, MAX_EVAL_SECONDS "
                f"leaves {left:.0f} s"
            )
        return not late


def evaluate(
    scorer: Scorer,
    tokens: np.ndarray,
    table: ByteTable,
    cfg: Config,
    rt: Runtime,
    log: RunLog,
    sizes: np.ndarray | None = None,
) -> Score | None:
    """Scores every target once, left to right. None: it would not fit the time.

    sizes: bytes of text of each target, if not the table's.
    The batches are the same for any number of processes, which take consecutive shares of every
    chunk, or the slots of each batch.
    """
    targets = len(tokens) - 1
    score = Score(
        name=scorer.name,
        nats=np.zeros(targets, np.float32),
        sizes=table.count(tokens) if sizes is None else sizes,
        coverage=np.zeros(targets, np.uint8),
        validity=scorer.validity,
        complete=not cfg.val_tokens,
    )
    if not score.sizes.any():
        raise InputError(f"DATA_PATH={cfg.data_path!r}: the {targets} targets stand for no text")
    with log.phase(scorer.name):
        now = time.perf_counter
        guard = TimeGuard(scorer.name, cfg.max_eval_seconds, rt, log, now, now(), now())
        plan = scorer.network.plan(tokens, scorer.chunk_targets)
        for counts in scorer.counts:
            work = f"{scorer.name}: counting n-grams:"
            progress = functools.partial(log.show_progress, work, now())
            counts.prepare(tokens, plan, progress=progress)
        if scorer.global_step:
            scorer.global_step.warn(plan, log)
        if scorer.validity == "adapted_first":
            score.events.append(("commit", 0, targets))
            if not scorer.training.learn(tokens, 0.0, guard.adapted):
                return None
            guard = dataclasses.replace(guard, since=now(), share=0.0)  # a pace of its own
        if not score_chunks(scorer, plan, tokens, score, rt, log, guard):
            return None
        for array in (score.nats, score.coverage):
            rt.sum_(torch.from_numpy(array))
        score.loss = float(score.nats.mean(dtype=np.float64))
        score.bpb = score.loss / math.log(2) * targets / int(score.sizes.sum(dtype=np.int64))
        score.seconds = now() - guard.start
    return score


def score_chunks(
    scorer: Scorer,
    plan: Plan,
    tokens: np.ndarray,
    score: Score,
    rt: Runtime,
    log: RunLog,
    guard: TimeGuard,
) -> bool:
    """Chunk after chunk: predict, charge, set aside, then learn -> false if there is no time."""
    rank, world = (0, 1) if scorer.alone else (rt.rank, rt.world)
    chunks = plan.chunks(rank, world)
    total = sum(chunk.weight * len(chunk.work) for chunk in chunks)
    begun = guard.now()
    all_batches = sum(len(chunk.work) for chunk in chunks)
    batches = done = charged = count = 0
    ahead = None
    for number, chunk in enumerate(chunks):
        for work, following in itertools.pairwise([*chunk.work, None]):
            if work is not None and (rt.rank == 0 or not scorer.alone):
                batch = ahead or plan.batch(tokens, work)
                on_device = score_batch(scorer, batch, tokens, rt)
                # The host makes the next batch while the device computes, and only then waits.
                ahead = None if following is None else plan.batch(tokens, following)
                nats = on_device.cpu().numpy()
                index = batch.index[batch.real]
                score.nats[index] = nats[batch.real]
                np.add.at(score.coverage, index, 1)  # twice in one batch counts twice
                charged += float(nats[batch.real].sum(dtype=np.float64))
                count += len(index)
            batches += 1
            done += chunk.weight / total
            line = f"{score.name}: running_loss:{charged / max(count, 1):.4f}"
            log.show_progress(line, begun, done)
            judged = not scorer.network.learns
            # One or two foretell nothing.
            if all_batches > 2 and not guard.after("batch", done, batches / all_batches, judged):
                return False
        if chunk.closes:
            score.events.append(("score", chunk.lo, chunk.hi))
        if scorer.learns:
            scorer.commit(chunk, tokens)
            if chunk.closes:
                score.events.append(("commit", chunk.lo, chunk.hi))
            guard.after("chunk", done, 0.0)  # the first asks for memory
            if chunk.ends_documents and not guard.after("group", done, number / len(chunks)):
                return False
    return True


def warm_up_scorer(scorer: Scorer, cfg: Config, rt: Runtime, table: ByteTable, count: int) -> None:
    """Scores random tokens, so that all is compiled; then the scorer is as it was before.

    As many as fill two batches of every process or two chunks of what learns from the stream, or
    the stream's own `count` of targets if it is shorter; or every slot of adapters, and the
    documents that a global step waits for.
    """
    between = cfg.score_len
    network = scorer.network
    batch = network.batch_rows * network.stride  # beside the first window, which stands alone
    batches = network.seq_len + (2 * rt.world - 1) * batch
    targets = min(2 * scorer.chunk_targets or batches, count)
    if network.learns:
        between = 3 * cfg.ttt_lora_chunk
        targets = between * (cfg.ttt_global_docs + network.slots)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, targets + 1, dtype=np.uint16)
    tokens[::between] = cfg.bos_id
    cfg = dataclasses.replace(cfg, max_eval_seconds=0.0)
    state = scorer.state_dict()
    evaluate(scorer, tokens, table, cfg, rt, RunLog(Path(os.devnull), rt, silent=True))
    scorer.load_state_dict(state)


def score_batch(scorer: Scorer, batch: Batch, tokens: np.ndarray, rt: Runtime) -> Tensor:
    """Nats of a batch's targets [B, S]: predicted, charged, and then set aside for what learns."""
    distribution = scorer.predict(batch)
    targets = rt.put(tokens[batch.index + 1].astype(np.int64)).unsqueeze(-1)  # known only now
    nats = -distribution.prob(targets).squeeze(-1).log().float()
    if scorer.learns:
        scorer.collect(batch, distribution, targets)
    return nats


def token_by_token(
    scorer: Scorer, tokens: np.ndarray, cfg: Config, rt: Runtime
) -> Iterator[Tensor]:
    """The harness for a stream that is still being written: yields p of the next token [V].

    tokens[0] is known; before the next step the caller has written the next token into the array.
    The scorer learns as it does in evaluate: from the same batches, at the end of the same chunks.
    """
    plan = scorer.network.plan(tokens, scorer.chunk_targets)
    for counts in scorer.counts:
        counts.prepare(tokens, plan, whole=False)
    vocabulary = torch.arange(cfg.vocab_size, device=rt.device).view(1, 1, -1)
    for target in range(len(tokens) - 1):
        batch = plan.position(tokens, target)
        with torch.inference_mode():
            p = scorer.predict(batch).prob(vocabulary)[0, 0].cpu()
        yield p
        if scorer.learns:
            known = tokens[: target + 2]
            for chunk in plan.completed(tokens, target + 2):
                for work in chunk.work:
                    score_batch(scorer, plan.batch(known, work), known, rt)
                scorer.commit(chunk, known)


def sample(model: GPT, table: ByteTable, cfg: Config, rt: Runtime) -> str:
    """Text the model writes after SAMPLE_PROMPT, drawn at SAMPLE_TEMPERATURE with SEED."""
    length = cfg.score_len
    network = WindowNetwork(model, rt, cfg, length, max(1, length // 2))
    network.hidden = GPT.hidden  # not compiled: every position is another length
    generator = torch.Generator().manual_seed(cfg.seed)
    prompt = [cfg.bos_id, *table.encode(cfg.sample_prompt)]
    tokens = np.zeros(len(prompt) + (cfg.sample_tokens or 200), np.uint16)
    tokens[: len(prompt)] = prompt
    for number, p in enumerate(token_by_token(Scorer("sample", network), tokens, cfg, rt), 1):
        if number >= len(prompt):
            tempered = torch.softmax(p.log() / cfg.sample_temperature, dim=-1)
            check(tempered.isfinite().all(), "the model predicts no numbers")
            tokens[number] = int(torch.multinomial(tempered, 1, generator=generator))
    documents = np.split(tokens, np.flatnonzero(tokens == cfg.bos_id))
    texts = [table.decode(part[part != cfg.bos_id]).decode(errors="replace") for part in documents]
    lines = "\n\n".join(text for text in texts if text).splitlines()
    return "\n".join(f"| {printable(line, len(line))}" for line in lines)  # no lines of a log


# --- stages: what a run scores, in this order -----------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Stage:
    """One evaluator: whether the settings ask for it, and its scorer."""

    name: str
    enabled: Callable[[Config], Any]
    build: Callable[[GPT, Runtime, Config, ByteTable], Scorer]


def _plain_enabled(cfg: Config) -> bool:
    learns = (_ttt_enabled(cfg) or _mixed_enabled(cfg)) and not cfg.ttt_before_scoring
    return cfg.eval_plain or not (_sliding_enabled(cfg) or _streaming_enabled(cfg) or learns)


def _build_plain(model: GPT, rt: Runtime, cfg: Config, table: ByteTable) -> Scorer:
    return Scorer("plain", WindowNetwork(model, rt, cfg, cfg.score_len, cfg.score_len))


def _sliding_enabled(cfg: Config) -> bool:
    return cfg.stride < cfg.score_len


def _build_sliding(model: GPT, rt: Runtime, cfg: Config, table: ByteTable) -> Scorer:
    return Scorer("sliding", WindowNetwork(model, rt, cfg, cfg.score_len, cfg.stride))


def _streaming_enabled(cfg: Config) -> bool:
    return cfg.eval_stream > 0


def _build_streaming(model: GPT, rt: Runtime, cfg: Config, table: ByteTable) -> Scorer:
    return Scorer("streaming", StreamNetwork(model, rt, cfg))


def build_scorer(
    name: str,
    model: GPT,
    rt: Runtime,
    cfg: Config,
    table: ByteTable,
    stride: int,
    mixers: Sequence[Mixer] = (),
) -> Scorer:
    """A later stage: over the stream or over windows, adapting if that is on."""
    if cfg.ttt_lora_rank:
        in_order = any(mixer.statistics for mixer in mixers)  # which learn by group
        network = PerDocumentLoRA(model, rt, cfg, in_order)
    elif cfg.eval_stream:
        network = StreamNetwork(model, rt, cfg, cfg.ttt_temperature)
    else:
        network = WindowNetwork(model, rt, cfg, cfg.score_len, stride, cfg.ttt_temperature)
    training = TestTimeTraining(network, cfg, table) if cfg.ttt_epochs else None
    global_step = GlobalStep(network, cfg) if cfg.ttt_global_docs else None
    return Scorer(name, network, mixers, training, cfg.mix_chunk_tokens, global_step)


def _mixed_enabled(cfg: Config) -> bool:
    return cfg.tilt or cfg.tilt_boost or cfg.ngram == "mix"


def _ttt_enabled(cfg: Config) -> bool:
    return (cfg.ttt_epochs or cfg.ttt_lora_rank) and not _mixed_enabled(cfg)  # which contains it


def _build_ttt(model: GPT, rt: Runtime, cfg: Config, table: ByteTable) -> Scorer:
    return build_scorer("ttt", model, rt, cfg, table, cfg.stride)


def _build_mixed(model: GPT, rt: Runtime, cfg: Config, table: ByteTable) -> Scorer:
    counts = NgramCounts(cfg, rt)
    mixers: list[Mixer] = [Tilt(rt, counts)] if cfg.tilt else []
    if cfg.tilt_boost:
        mixers.append(FixedTilt(rt, cfg))
    if cfg.ngram == "mix" and cfg.mixer_head:
        mixers.append(GatedNgramMixer(cfg, counts, model))
    elif cfg.ngram == "mix":
        mixers.append(NgramMixer(rt, counts))
    return build_scorer("mixed", model, rt, cfg, table, cfg.stride, mixers)


def _ngram_enabled(cfg: Config) -> bool:
    return cfg.ngram != "" and cfg.ngram != "mix"


def _build_ngram(model: GPT, rt: Runtime, cfg: Config, table: ByteTable) -> Scorer:
    stride = cfg.ngram_stride or cfg.stride
    cache = HashedNgramCache(rt, cfg, model)
    return build_scorer("ngram", model, rt, cfg, table, stride, [cache])


STAGES = {
    stage.name: stage
    for stage in (
        Stage("plain", _plain_enabled, _build_plain),
        Stage("sliding", _sliding_enabled, _build_sliding),
        Stage("streaming", _streaming_enabled, _build_streaming),
        Stage("ttt", _ttt_enabled, _build_ttt),
        Stage("mixed", _mixed_enabled, _build_mixed),
        Stage("ngram", _ngram_enabled, _build_ngram),
    )
}


def stages_of(cfg: Config) -> list[Stage]:
    """What a run scores, in its order."""
    return [stage for stage in STAGES.values() if stage.enabled(cfg)]


# ==================================================================================================
# 11. CHECKS - what makes a score believable, tested on every score at the price of a few batches.
#     Uses sections 1-10; what it finds changes no score. `records/audit.py` is the deep form.
# ==================================================================================================


@dataclasses.dataclass(frozen=True)
class Check:
    """The outcome of a check: what is wrong, or nothing; and figures."""

    name: str
    problem: str = ""  # empty = passed
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)
    counts_as: str = (
        "FAIL"  # what a problem is: FAIL, WARN, EXPECTED (by a score's nature), SKIPPED
    )
    found: str = ""  # what there is to say if nothing is wrong

    @property
    def word(self) -> str:
        """PASS, or what the problem counts as."""
        return self.counts_as if self.problem else "PASS"

    @property
    def failed(self) -> bool:
        """Whether it counts against what was checked."""
        return self.word == "FAIL"

    @property
    def verdict(self) -> str:
        """The word, and the problem."""
        return f"{self.word}: {self.problem}" if self.problem else self.word

    def record(self) -> dict[str, Any]:
        """Its entry in result.json."""
        return {"verdict": self.verdict, **self.figures}


def check_coverage(score: Score, targets: int) -> Check:
    """Every target was charged once."""
    once = int(((score.coverage == 1) & np.isfinite(score.nats)).sum())
    complete = once == len(score.nats) == targets
    problem = "" if complete else f"{once} of {targets} targets charged exactly once, and finite"
    return Check("coverage", problem, {"charged_once": once})


def check_bytes(
    tokens: np.ndarray, table: ByteTable, bos: int, sample_tokens: int = 1 << 20
) -> Check:
    """The byte table against the decoded text of every segment of the first tokens.

    A segment ends at a document's start. What stands before the first one has no start of its own:
    its first token is only context, as in the score.
    """
    tokens = tokens[:sample_tokens]
    incomplete = "\ufffd".encode()  # where a cut divides a character that is spelled in bytes
    while len(tokens) and incomplete in table.decode(tokens[-1:]):
        tokens = tokens[:-1]
    while len(tokens) and incomplete in table.decode(tokens[:1]):
        tokens = tokens[1:]
    edges = np.union1d(np.flatnonzero(tokens == bos), [0, len(tokens)])
    counted = np.concatenate(([0], np.cumsum(table.count(tokens))))
    for lo, hi in itertools.pairwise(edges):
        if tokens[lo] == bos:
            text = len(table.decode(tokens[lo + 1 : hi]))
        else:
            text = len(table.decode(tokens[lo:hi])) - len(table.decode(tokens[lo : lo + 1]))
        count = counted[hi - 1] - counted[lo]
        if count != text:
            return Check("bytes", f"document at token {lo}: counted {count}, decoded {text}")
    problem = "" if counted[-1] else "no text to compare"
    documents = int((tokens == bos).sum())
    figures = {"segments": len(edges) - 1, "documents": documents, "bytes": int(counted[-1])}
    return Check("bytes", problem, figures)


def check_byte_algebra(score: Score, sizes: np.ndarray) -> Check:
    """bpb = sum of nats / ln 2 / bytes, counted again."""
    recount = float(score.nats.sum(dtype=np.float64) / math.log(2) / sizes.sum())
    right = abs(recount - score.bpb) < 1e-9  # false for what is no number
    problem = "" if right else f"recount gives {recount}, reported {score.bpb}"
    return Check("byte_algebra", problem, {"recount": recount})


def check_order(score: Score) -> Check:
    """Nothing is learned from a token before it was charged, and charges go left to right."""
    charged = 0
    for kind, lo, hi in score.events:
        if kind == "score" and lo != charged:
            return Check("order", f"scored from target {lo}, expected {charged}")
        if kind == "commit" and hi > charged:
            return Check(
                "order",
                f"learned from targets up to {hi}, charged only up to {charged}",
                counts_as="EXPECTED" if score.validity == "adapted_first" else "FAIL",
            )
        charged = max(charged, hi)
    return Check("order", figures={"events": len(score.events)})


def targets_of(tokens: np.ndarray, batch: Batch, rt: Runtime) -> Tensor:
    """A batch's targets [B, S, 1]."""
    return rt.put(tokens[batch.index + 1].astype(np.int64)).unsqueeze(-1)


@torch.inference_mode()
def check_future(
    scorer: Scorer, batch: Batch, tokens: np.ndarray, vocab: int, rt: Runtime
) -> Check:
    """Other inputs after a position change no probability up to it: two positions."""
    rng = np.random.default_rng(0)
    targets = targets_of(tokens, batch, rt)
    before = scorer.predict(batch).prob(targets).log()
    scored = batch.index.shape[1]
    gaps = []
    for last in (scored // 3, 2 * scored // 3):
        ids = batch.ids.copy()
        later = ids[:, ids.shape[1] - scored + last + 1 :]
        later[:] = (later + rng.integers(1, vocab, later.shape)) % vocab
        after = scorer.predict(dataclasses.replace(batch, ids=ids)).prob(targets).log()
        gaps.append((after - before)[:, : last + 1].abs().max().item())
    moved = float(np.max(gaps))  # which passes on what is no number
    problem = "" if moved <= 1e-4 else f"later tokens move charges by {moved:.2g} nats"
    return Check("future", problem, {"nats": moved})


@torch.inference_mode()
def check_distribution(
    scorer: Scorer, batch: Batch, tokens: np.ndarray, vocab: int, score: Score, rt: Runtime
) -> Check:
    """At 256 positions probabilities sum to one, and the target's entry is what was charged.

    What adapts has moved on since: it is asked for entry and charge as it is now.
    """
    real = np.argwhere(batch.real)
    places = np.linspace(0, len(real) - 1, min(256, len(real))).astype(int)
    rows, columns = real[places].T
    distribution = scorer.predict(batch)
    targets = targets_of(tokens, batch, rt)
    charged = -score.nats[batch.index[rows, columns]]
    if scorer.chunk_targets:
        charged = distribution.prob(targets).log().cpu().numpy()[rows, columns, 0]
    vocabulary = torch.arange(vocab, device=rt.device).expand(len(rows), 1, -1)
    p = distribution.at(rows, columns).prob(vocabulary)[:, 0].cpu()  # [m, V]
    entries = p.gather(1, targets.cpu()[rows, columns])[:, 0].log().numpy()
    off = p.sum(-1).log().abs().max().item()
    least = p.min().item()
    gap = float(np.abs(entries - charged).max())
    score.mass = p.sum(-1).mean().item()
    told = (
        f"log of the sum over the vocabulary is off by {off:.2g}, the charge from its entry by "
        f"{gap:.2g} nats; the least probability is {least:.2g}"
    )
    agrees = gap <= rt.profile.tolerance
    sound = agrees and off <= rt.profile.tolerance and least >= 0
    figures = {"positions": len(rows), "log_sum": off, "entry_gap": gap, "mass": score.mass}
    known = score.validity == "unnormalised" and agrees
    return Check("distribution", "" if sound else told, figures, "EXPECTED" if known else "FAIL")


def check_plausibility(score: Score, true_scores: Mapping[str, float]) -> Check:
    """Large gains over another stage, and very low scores, want an explanation."""
    gain = max(true_scores.values(), default=score.bpb) - score.bpb
    problem = ""
    if gain > 0.03:
        problem = f"gains {gain:.4f} bpb over another stage"
    elif score.bpb < 0.9:
        problem = "below 0.9 bpb"
    return Check("plausibility", problem, {"gain": gain}, counts_as="WARN")


def check_score(
    score: Score,
    scorer: Scorer,
    tokens: np.ndarray,
    table: ByteTable,
    cfg: Config,
    rt: Runtime,
    true_scores: Mapping[str, float],
    sizes: np.ndarray | None = None,
) -> list[Check]:
    """The checks of every score; true_scores: bpb of the stages before it; sizes: as evaluate."""
    early, spread = scorer.network.probe(tokens, scorer.chunk_targets).samples(tokens, 256)
    return [
        check_coverage(score, len(tokens) - 1),
        check_bytes(tokens, table, cfg.bos_id),
        check_byte_algebra(score, table.count(tokens) if sizes is None else sizes),
        check_order(score),
        check_future(scorer, early, tokens, cfg.vocab_size, rt),
        check_distribution(scorer, spread, tokens, cfg.vocab_size, score, rt),
        check_plausibility(score, true_scores),
    ]


# ==================================================================================================
# 12. PLAN - what a run would cost, counted on tensors that have shapes and no values.
#     Uses sections 1-10.
# ==================================================================================================

# An H100's pace, fitted to the step times of published logs (`tests/bench/plan.py` shows them and
# the errors). Bytes are those that operations read and write one by one; compiled, most never
# leave the chip.
FLOPS_A_SECOND = 4.2e14
BYTES_A_SECOND = 1.65e14
SECONDS_AN_OPERATION = 8.5e-6
MEMORY_SHARE = 0.72  # of what is kept for the backward pass that is, compiled; from the same logs
PLANNED_GPUS = 8
# FineWeb's validation set, where no data is at hand: targets by size of the vocabulary (8,192: with
# case markers), and how documents' lengths are spread (of their logarithm; from web text).
FINEWEB_TARGETS = {1024: 62_021_632, 8192: 47_851_520}
FINEWEB_DOCUMENTS = 50_000
FINEWEB_SPREAD = 1.1


@dataclasses.dataclass
class Cost:
    """What one GPU does."""

    flops: float = 0.0  # of matrix products and attention
    bytes: float = 0.0
    operations: float = 0.0
    tokens: float = 0.0  # inputs
    kept: float = 0.0  # bytes that wait for the backward pass

    @property
    def seconds(self) -> float:
        """On an H100."""
        moved = self.bytes / BYTES_A_SECOND
        return self.flops / FLOPS_A_SECOND + moved + self.operations * SECONDS_AN_OPERATION

    def of(self, tokens: float, batches: float) -> Cost:
        """The same work on so many tokens in so many batches."""
        share = tokens / self.tokens
        return Cost(self.flops * share, self.bytes * share, self.operations * batches, tokens)

    def __mul__(self, times: float) -> Cost:
        return Cost(*(value * times for value in dataclasses.astuple(self)))

    def __add__(self, other: Cost) -> Cost:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other))
        return Cost(*(a + b for a, b in pairs))


class CostCounter(TorchDispatchMode):
    """Counts operations inside its block; allocations and views are none."""

    FREE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach")

    def __init__(self) -> None:
        super().__init__()
        self.cost = Cost()
        self.kept: dict[int, int] = {}  # storage -> its bytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        aliases = [returned.alias_info for returned in func._schema.returns]
        is_view = aliases and all(alias and not alias.is_write for alias in aliases)
        if not is_view and func.overloadpacket.__name__ not in self.FREE:
            formula = flop_registry.get(func.overloadpacket)
            flops = formula(*args, **kwargs, out_val=out) if formula else 0
            self.add(flops, *tree_leaves((args, kwargs, out)))
        return out

    def add(self, flops: float, *touched: Any) -> None:
        """An operation, and the tensors that it reads and writes."""
        self.cost.flops += flops
        self.cost.bytes += sum(t.nbytes for t in touched if isinstance(t, Tensor))
        self.cost.operations += 1

    def keep(self, tensor: Tensor) -> Tensor:
        """For autograd's hooks: what is kept for the backward pass."""
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            self.kept[storage._cdata] = storage.nbytes()
        return tensor

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Counts inside the block, kept bytes too."""
        with torch.autograd.graph.saved_tensors_hooks(self.keep, lambda kept: kept), self:
            yield
        self.cost.kept = sum(self.kept.values())

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """An attention backend: a fused kernel's cost, without one."""
        return _CountedAttention.apply(q, k, v, self)


class _CountedAttention(torch.autograd.Function):
    """Causal attention in one kernel forward, 2.5 times its FLOPs in one backward."""

    @staticmethod
    def forward(context: Any, q: Tensor, k: Tensor, v: Tensor, counter: CostCounter) -> Tensor:
        context.save_for_backward(q, k, v)
        context.counter = counter
        context.flops = 2.0 * q.numel() * k.size(1)  # two products of half a square
        counter.add(context.flops, q, k, v, q)
        return torch.empty_like(q)

    @staticmethod
    def backward(context: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = context.saved_tensors
        context.counter.add(2.5 * context.flops, q, k, v, grad, q, k, v, q)
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


class PlanRuntime(Runtime):
    """The first of PLANNED_GPUS processes, on a device that has no numbers."""

    def __init__(self, cfg: Config):
        super().__init__(dataclasses.replace(cfg, device="cpu", attn="sdpa", compile="0"), {})
        self.cfg = cfg
        self.counter = CostCounter()
        self.attention = self.counter.attention
        self.packed_attention = self.attention_in_segments
        self.device = torch.device("meta")
        self.world = PLANNED_GPUS
        self.profile = GPU_PROFILE.in_format(cfg.dtype)

    def model(self) -> GPT:
        """The settings' model."""
        with self.device:
            return GPT(self.cfg, self.profile.dtype, self.attention, self.packed_attention)

    def attention_in_segments(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        """As if all were as long as the longest."""
        length = q.size(1)
        missing = -length % segments.longest
        padded = (F.pad(x, (0, 0, 0, 0, 0, missing)) for x in (q, k, v))
        rows = (x.view(-1, segments.longest, *x.shape[2:]) for x in padded)
        return self.attention(*rows).view(1, -1, *q.shape[2:])[:, :length]

    def uniform(self, generator: torch.Generator, *shape: int) -> Tensor:
        return torch.empty(*shape, device=self.device)

    def sum_(self, tensor: Tensor) -> Tensor:
        return tensor

    def map_shares(self, function: Callable[[Tensor], Tensor], stack: Tensor) -> Tensor:
        share = -(-stack.size(0) // self.world)
        function(stack.narrow(0, 0, share).to(self.profile.dtype))
        return torch.empty_like(stack)


def cost_of(rt: PlanRuntime, action: Callable[[], Any]) -> Cost:
    """What the action costs."""
    rt.counter.cost, rt.counter.kept = Cost(), {}
    with rt.counter.counting():
        action()
    return rt.counter.cost


def plan_training(cfg: Config, share: float = 0.0) -> tuple[Trainer, Cost]:
    """A trainer without numbers, and what a step at that share of the run costs one GPU."""
    rt = PlanRuntime(cfg)
    trainer = Trainer(cfg, rt, RunLog(Path(), rt, silent=True), rt.model(), None)
    batch = trainer.nothing
    trainer.follow(share)

    def step() -> None:
        trainer.step(lambda micro: (batch, batch), cfg.iterations, share)
        if trainer.averager:
            trainer.averager.update(1, 1.0)

    cost = cost_of(rt, step)
    cost.tokens = len(trainer.own_micro_batches) * batch.size
    return trainer, cost


def memory_of(trainer: Trainer, cost: Cost) -> float:
    """Bytes that training takes: weights, gradients, what optimizers remember, activations."""
    remembered = [state for o in trainer.optimizers for state in o.state.values()]
    averages = trainer.averager.means if trainer.averager else {}
    held = [*trainer.model.parameters(), trainer.gradients]
    held += tree_leaves((remembered, averages))
    return sum(t.nbytes for t in held if isinstance(t, Tensor)) + MEMORY_SHARE * cost.kept


def plan_stage(stage: Stage, cfg: Config, tokens: np.ndarray) -> tuple[Cost, Cost]:
    """What a scoring stage costs one GPU, and a batch of it; without work on the host.

    All batches are taken to cost as much a token as the second one. Chunks of documents, whose
    inputs grow, cost something however short they are: the shortest and the longest tell how much.
    """
    rt = PlanRuntime(cfg)
    scorer = stage.build(rt.model().requires_grad_(False), rt, cfg, ByteTable.bytes260())
    network = scorer.network
    plan = network.plan(tokens, scorer.chunk_targets)
    chunks = plan.chunks(0, 1 if scorer.alone else PLANNED_GPUS)
    work = [work for chunk in chunks for work in chunk.work if work is not None]
    inputs = np.array([plan.inputs(part) for part in work])
    network.predict(plan.batch(tokens, work[0]))  # which a network that carries on continues

    def score(batch: Batch) -> None:
        with torch.no_grad():
            network.predict(batch)
        if network.learns:
            targets = torch.zeros(batch.index.shape, dtype=torch.int64, device=rt.device)
            network.collect(batch, targets)
            network.commit(Chunk(0, 1, []))

    def cost_of_batch(part: Any) -> Cost:
        batch = plan.batch(tokens, part)
        cost = cost_of(rt, functools.partial(score, batch))
        cost.tokens = batch.ids.size
        return cost

    teaching = [part for chunk in chunks if not chunk.ends_documents for part in chunk.work if part]
    usual = teaching or work[:2][-1:]
    shortest, longest = min(usual, key=plan.inputs), max(usual, key=plan.inputs)
    least = cost_of_batch(shortest)
    total = least.of(inputs.sum(), len(work))
    if plan.inputs(longest) > plan.inputs(shortest):
        most = cost_of_batch(longest)
        share = (inputs.sum() / len(work) - least.tokens) / (most.tokens - least.tokens)
        total = (least * (1 - share) + most * share) * len(work)
    if scorer.training:
        total += plan_adaptation(scorer.training, cfg, len(tokens) - 1)
    if scorer.global_step:
        total += plan_global_step(scorer.global_step, cfg, tokens)
    return total, least


def plan_adaptation(training: TestTimeTraining, cfg: Config, targets: int) -> Cost:
    """What test-time training costs one GPU: one step, for all of them."""
    step_targets = training.row * cfg.ttt_parts * cfg.ttt_batch_seqs
    epochs = cfg.ttt_epochs
    step = cost_of(
        training.rt,
        lambda: training.learn(np.zeros(step_targets + 1, np.uint16), 0.0, lambda share: False),
    )
    step.tokens = step_targets
    return step.of(targets * epochs, targets * epochs / step_targets)


def plan_global_step(global_step: GlobalStep, cfg: Config, tokens: np.ndarray) -> Cost:
    """What the pass over the first documents costs one GPU: one step, for all of them."""
    size = cfg.ttt_chunk_tokens
    starts = document_starts(tokens[:-1], cfg.bos_id)
    targets = [*starts, len(tokens) - 1][: cfg.ttt_global_docs + 1][-1]
    learn = functools.partial(global_step.pass_over, np.zeros(size + 1, np.uint16))
    step = cost_of(global_step.rt, learn)
    step.tokens = size
    return step.of(targets, targets / size)


def planned_tokens(cfg: Config) -> tuple[np.ndarray, str]:
    """The validation tokens, or as many as FineWeb has, in documents of such lengths; a note."""
    try:
        find_path(cfg.data_path)
    except InputError:
        whole = FINEWEB_TARGETS.get(cfg.vocab_size, FINEWEB_TARGETS[1024])
        lengths = np.random.default_rng(0).lognormal(0, FINEWEB_SPREAD, FINEWEB_DOCUMENTS)
        starts = np.cumsum(lengths) / lengths.sum() * whole
        tokens = np.full((cfg.val_tokens or whole) + 1, cfg.bos_id + 1, np.uint16)
        tokens[starts[starts < len(tokens)].astype(np.int64)] = cfg.bos_id
        return tokens, f"no DATA_PATH={cfg.data_path!r} here: {len(tokens) - 1} validation targets"
    tokens = load_validation(cfg)
    return tokens, f"{len(tokens) - 1} validation targets of {cfg.data_path}"


def planned_steps(cfg: Config, plain: Cost, looped: Cost) -> tuple[int, float]:
    """How many steps a run takes, and their seconds; looped: with depth recurrence, if there is."""
    share = cfg.enable_looping_at if cfg.num_loops else 1.0
    clock = Clock(cfg, lag=0)
    if clock.drives:  # shares are of seconds
        pace = share / plain.seconds + (1 - share) / looped.seconds
        steps = min(cfg.iterations, int(clock.limit * pace))
    else:
        pace = 1 / (share * plain.seconds + (1 - share) * looped.seconds)
        steps = cfg.iterations
    return steps, steps / pace


def plan_lines(cfg: Config) -> list[str]:
    """What MODE=plan prints."""
    trainer, step = plan_training(cfg)
    looped = step
    if cfg.num_loops:
        trainer, looped = plan_training(cfg, cfg.enable_looping_at)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    pace = f"{FLOPS_A_SECOND / 1e12:.0f} TFLOP/s, {BYTES_A_SECOND / 1e12:.0f} TB/s before fusion"
    steps, seconds = planned_steps(cfg, step, looped)
    took = f"{1000 * step.seconds:.1f} ms a step"
    if cfg.num_loops:
        took += f", {1000 * looped.seconds:.1f} with depth recurrence"
    tokens, note = planned_tokens(cfg)
    lines = [
        f"plan for {PLANNED_GPUS}xH100 at {pace}, {SECONDS_AN_OPERATION * 1e6:.1f} us an operation",
        note,
        f"model_params:{parameters} peak_memory:{memory_of(trainer, looped) / 2**30:.1f} GiB a GPU",
        f"train: {_per_token(step)} {step.operations:.0f} operations a step, "
        f"{took}, {steps} steps in {seconds:.0f} s",
    ]
    if cfg.micro_batches % PLANNED_GPUS:
        lines.append(
            f"WARNING: {PLANNED_GPUS} processes cannot share the {cfg.micro_batches} micro-batches "
            "of a step (TRAIN_BATCH_TOKENS / MICRO_BATCH_TOKENS)"
        )
    whole = 0.0
    for stage in stages_of(cfg):
        total, batch = plan_stage(stage, cfg, tokens)
        whole += total.seconds
        counts = " and n-gram counts" if stage.name in ("mixed", "ngram") else ""
        lines.append(
            f"{stage.name}: {_per_token(total)} {batch.operations:.0f} operations a batch, "
            f"{total.seconds:.1f} s{counts}"
        )
    lines.append(f"scoring: {whole:.0f} of {cfg.max_eval_seconds:.0f} s")
    return lines


def _per_token(cost: Cost) -> str:
    """FLOPs and bytes of a token of input."""
    megaflops, megabytes = (x / cost.tokens / 1e6 for x in (cost.flops, cost.bytes))
    return f"{megaflops:.1f} MFLOP {megabytes:.2f} MB a token,"


# ==================================================================================================
# 13. MAIN - modes, results, exit codes.
#     Uses all sections, and is the only reader of the environment and the command line.
# ==================================================================================================

# Exit codes.
OK = 0
BUG = 1
OVER_SIZE = 2
OUT_OF_MEMORY = 3
DIVERGED = 4
OVER_TIME = 5
AUDIT_FAILED = 6
BAD_INPUT = 64
INTERRUPTED = 143


def log_identity(cfg: Config, rt: Runtime, log: RunLog) -> None:
    """First lines of the log, first fields of the result: versions, machine, settings, code."""
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    versions |= {m.__name__: m.__version__ for m in (torch, np, sentencepiece, zstandard)}
    log.log(" ".join(f"{name}:{version}" for name, version in versions.items()))
    if not torch.__version__.startswith(("2.11", "2.13")):
        log.log("WARNING: tested with torch 2.11 and 2.13 only")
    log.log("\n".join(rt.notes))

    base = dataclasses.replace(default_config(cfg.defaults), defaults=Config.defaults)
    changed = {
        name: as_typed(getattr(cfg, field.name))
        for name, field in FIELDS.items()
        if getattr(cfg, field.name) != getattr(base, field.name)
    }
    typed = shlex.join(f"{name}={text}" for name, text in changed.items())
    log.log(f"overrides: {typed or 'none'}")

    code = sha256(SCRIPT)
    log.log(f"seed:{cfg.seed} code_sha256:{code}")

    recipe = json.dumps(
        cfg.group("data", "train", "model", "optim", "pack", "score"), sort_keys=True
    )
    log.save(
        mode=cfg.mode,
        seed=cfg.seed,
        settings=dataclasses.asdict(cfg),
        overrides=changed,
        code_sha256=code,
        config_sha256=hashlib.sha256(recipe.encode()).hexdigest(),
        versions=versions,
        world_size=rt.world,
        resumed=False,
        machine={
            "type": rt.device.type,
            "device": rt.device_name(),
            "system": platform.platform(),
            "notes": rt.notes,
        },
    )


def build_trainer(cfg: Config, rt: Runtime, log: RunLog) -> Trainer:
    """Data, model and warmed-up (or resumed) trainer, with the log lines that say what they are."""
    with log.phase("load"), rt.together():
        stream = TokenStream(shard_paths(cfg, "train"), cfg)
        log.identify(shards_identity, cfg, "train", stream.total)
        needed = cfg.iterations * cfg.micro_batches * (cfg.micro_tokens + 1)
        if cfg.schedule == "tokens" and needed > stream.total:
            log.log(
                f"note: the run takes {needed} tokens, the data begins again after {stream.total}"
            )
    with log.phase("build"):
        trainer = Trainer(cfg, rt, log, build_model(cfg, rt), stream)
    params = sum(p.numel() for p in trainer.model.parameters())
    flops = training_flops(cfg, trainer.model)
    line = f"model_params:{params} training_flops_per_token:{flops:.4g}"
    if cfg.num_loops:
        line += f" with_loops:{training_flops(cfg, trainer.model, looped=True):.4g}"
    log.log(line)
    log.log(
        f"train_batch_tokens:{cfg.train_batch_tokens} train_seq_len:{cfg.train_seq_len} "
        f"micro_batches:{cfg.micro_batches} iterations:{cfg.iterations} "
        f"max_wallclock_seconds:{cfg.max_wallclock_seconds:.3f}"
    )
    code = code_size()
    cap = size_cap(cfg, code)
    log.log(f"code_bytes:{code} size_cap:{cap} left_for_the_model:{cap - code}")
    if cfg.warmdown_iters > cfg.iterations and not cfg.warmdown_frac:
        begin = cfg.iterations / cfg.warmdown_iters
        log.log(
            f"WARNING: WARMDOWN_ITERS={cfg.warmdown_iters} is more than ITERATIONS="
            f"{cfg.iterations}: the learning rates begin at {begin:.0%} of what is set"
        )
    with log.phase("warmup"):
        warm_up(trainer)
    if cfg.resume:
        load_checkpoint(trainer, Path(cfg.resume))
    return trainer


class Validator:
    """Scores plain windows during training, outside the clock; reads the data when first asked."""

    def __init__(self, trainer: Trainer, table: ByteTable):
        self.trainer = trainer
        self.table = table
        cfg = trainer.cfg
        network = WindowNetwork(trainer.model, trainer.rt, cfg, cfg.score_len, cfg.score_len)
        self.scorer = Scorer("validate", network)
        self.tokens: np.ndarray | None = None
        self.sizes: np.ndarray | None = None  # bytes of each target

    def __call__(self, step: int) -> None:
        cfg, rt, log = self.trainer.cfg, self.trainer.rt, self.trainer.log
        seconds = self.trainer.clock.elapsed()  # without this validation's own
        if self.tokens is None:
            with rt.together():
                self.tokens = load_validation(cfg)
                self.sizes = load_charges(cfg, self.table, self.tokens)
        score = evaluate(self.scorer, self.tokens, self.table, cfg, rt, log, self.sizes)
        if score:
            log.log(
                f"step:{step}/{cfg.iterations} val_loss:{score.loss:.4f} "
                f"{score.label}:{score.bpb:.4f} train_time:{seconds * 1000:.0f}ms"
            )
            log.metric(step=step, val_loss=score.loss, **{score.label: score.bpb})


def train_model(cfg: Config, rt: Runtime, log: RunLog, table: ByteTable) -> tuple[str, bytes]:
    """Trains and packs -> how training ended, and the artifact (empty if there is none).

    Who asks the run to end after its last step waits for the artifact.
    """
    trainer = build_trainer(cfg, rt, log)
    with trainer.requests.heard():
        status = train(trainer, Validator(trainer, table))
        save_training(trainer)
        if status in ("diverged", "interrupted"):
            return status, b""
        if trainer.averager:
            trainer.averager.apply()
        notes = {"tokenizer": tokenizer_hash(cfg), "seed": cfg.seed}
        if table.transform:
            notes["case_transform"] = table.transform
        calibration = calibrate_if_asked(trainer.model, cfg, rt, log, trainer.stream)
        blob = pack_model(cfg, rt, log, trainer.model, calibration, notes)
    raise_if_asked_to_end(trainer.requests, rt)
    return status, blob


def save_training(trainer: Trainer) -> None:
    """The run's training in figures, into result.json."""
    cfg, model = trainer.cfg, trainer.model
    tokens = trainer.steps_done * cfg.train_batch_tokens
    looped = trainer.steps_looped * cfg.train_batch_tokens
    flops = training_flops(cfg, model) * (tokens - looped)
    flops += training_flops(cfg, model, looped=True) * looped
    trainer.log.save(
        steps=trainer.steps_done,
        train_seconds=round(trainer.seconds, 3),
        train_tokens=tokens,
        train_flops=flops,
        train_loss=trainer.clock.last.loss,
        peak_memory_bytes=trainer.rt.peak_memory(),
    )


def calibrate_if_asked(
    model: GPT, cfg: Config, rt: Runtime, log: RunLog, stream: TokenStream | None
) -> Calibration:
    """What GPTQ needs, from training text; empty without GPTQ_N_SAMPLES."""
    if not cfg.gptq_n_samples:
        return Calibration({})
    with log.phase("calibrate") as progress:
        return calibrate(model, cfg, rt, stream, progress)


def raise_if_asked_to_end(requests: Requests, rt: Runtime) -> None:
    """On all processes if one was asked."""
    if rt.highest(requests.stop):
        raise Interrupted("after the artifact was written; MODE=eval scores it")


def pack_to_disk(
    cfg: Config,
    log: RunLog,
    model: GPT,
    calibration: Calibration,
    code_bytes: int,
    notes: dict[str, Any],
    progress: Progress,
) -> bytes:
    """Writes model.ptz, and the raw weights final_model.pt, these also if packing fails."""
    state = {name: w.cpu() for name, w in model.state_dict().items()}
    try:
        blob = pack(state, cfg, calibration, code_bytes, notes, progress)
        atomic_write(log.out_dir / "model.ptz", blob)
    finally:
        with log.optional("final_model.pt"):
            save_torch(log.out_dir / "final_model.pt", state)
    return blob


def pack_model(
    cfg: Config,
    rt: Runtime,
    log: RunLog,
    model: GPT,
    calibration: Calibration,
    notes: dict[str, Any],
) -> bytes:
    """Artifact and raw weights on disk, before anything is scored -> its bytes on every process."""
    blob = None
    code = code_size()
    cap = size_cap(cfg, code)
    with log.phase("pack") as progress:
        with rt.together():
            if rt.main:
                blob = pack_to_disk(cfg, log, model, calibration, code, notes, progress)
                log.log("\n".join(size_report(blob, code, cap)))
        blob = rt.broadcast_bytes(blob)
    total = code + len(blob)
    sizes = {"code": code, "model": len(blob), "total": total, "cap": cap, "margin": cap - total}
    log.save(sizes=sizes, artifact_sha256=hashlib.sha256(blob).hexdigest())
    return blob


def repack_model(cfg: Config, rt: Runtime, log: RunLog, old_blob: bytes, table: ByteTable) -> bytes:
    """MODE=pack: the raw weights packed as the settings say now, and what that changes by role."""
    with log.phase("load"), rt.together():
        stored, header, old = expand(old_blob)
        raw = read_raw_model(cfg, tensors_of(stored))
        tokens = load_validation(cfg)
        sizes = load_charges(cfg, table, tokens)
        stream = TokenStream(shard_paths(cfg, "train"), cfg) if cfg.gptq_n_samples else None
    model = build_model(cfg, rt, {name: w.clone() for name, w in raw.items()})
    calibration = calibrate_if_asked(model, cfg, rt, log, stream)
    notes = {name: value for name, value in notes_of(header).items() if name != "fit_scale"}
    if cfg.gptq_n_samples:
        notes["repacked"] = "calibrated on training text after the run"
    requests = Requests()
    with requests.heard():
        blob = pack_model(cfg, rt, log, model, calibration, notes)
    raise_if_asked_to_end(requests, rt)
    scorer = Scorer("compare", WindowNetwork(model, rt, cfg, cfg.score_len, cfg.score_len))

    def score(packed: Mapping[str, Tensor]) -> str:
        model.load_state_dict({**raw, **packed})
        found = evaluate(scorer, tokens, table, cfg, rt, log, sizes)
        return f"{found.label}:{found.bpb:.6f}" if found else "skipped:MAX_EVAL_SECONDS"

    log.log(f"pack raw weights {score({})}")
    new = expand(blob)[2]
    for role in ("all", *ROLES):
        line = ""
        for when, tensors, settings in (("before", old, stored), ("after", new, cfg)):
            chosen = [t for t in tensors if role in ("all", tensor_role(t.name))]
            if chosen:
                size = sum(map(tensor_bytes, chosen))
                line += f" {when} about {size:.0f} bytes {score(weights_of(chosen, settings))}"
        if line:
            log.log(f"pack {role}{line}")
    return blob


def score_artifact(cfg: Config, blob: bytes, rt: Runtime, log: RunLog, table: ByteTable) -> int:
    """Every scoring stage from the artifact alone, results written after each -> exit code."""
    with log.phase("unpack"), rt.together():
        model = load_artifact(cfg, blob, rt)
        tokens = load_validation(cfg)
        sizes = load_charges(cfg, table, tokens)
        log.identify(shards_identity, cfg, "val", len(tokens))
        if table.markers:
            log.identify(charges_identity, cfg, table)
        if not (tokens == cfg.bos_id).any():
            log.log(f"note: no validation token is BOS_ID={cfg.bos_id}: it is all one document")
    true_scores: dict[str, float] = {}
    weights = copy.deepcopy(model.state_dict())
    code = OK
    for stage in stages_of(cfg):
        scorer = stage.build(model, rt, cfg, table)
        if rt.compiles:
            with log.phase("stage_warmup"):
                warm_up_scorer(scorer, cfg, rt, table, len(sizes))
        score = evaluate(scorer, tokens, table, cfg, rt, log, sizes)
        if score is None:
            log.result["stages"][stage.name] = {"skipped": "MAX_EVAL_SECONDS"}
            code = code or OVER_TIME
        else:
            with log.phase("audit"):
                checks = check_score(score, scorer, tokens, table, cfg, rt, true_scores, sizes)
            log_score(cfg, log, score, checks)
            if score.validity == "valid":  # the last true score is the run's
                true_scores[stage.name] = score.bpb
                log.result["result"] = {"stage": stage.name, **score.record()}
            if any(check.failed for check in checks):
                code = AUDIT_FAILED
        model.load_state_dict(weights)  # what a stage learns ends with it
        log.save()
    if cfg.sample_tokens:
        with log.phase("sample"):
            log_sample(model, table, cfg, rt, log)
    return code


def log_sample(model: GPT, table: ByteTable, cfg: Config, rt: Runtime, log: RunLog) -> None:
    """A text of the model's, with the seed that draws it again."""
    log.log(f"sample: seed:{cfg.seed}\n{sample(model, table, cfg, rt)}")


def log_score(cfg: Config, log: RunLog, score: Score, checks: Sequence[Check]) -> None:
    """A stage's lines in the log, and its entry in the result."""
    record = score.record()
    final = f"final_{cfg.compressor}_{score.name}"
    mass = "" if record["normalised"] else f" vocabulary_mass:{score.mass:.2f}"
    log.log(
        f"{final} val_loss:{score.loss:.4f} {score.label}:{score.bpb:.4f} "
        f"eval_time:{score.seconds * 1000:.0f}ms{mass}"
    )
    log.log(f"{final}_exact val_loss:{score.loss:.8f} {score.label}:{score.bpb:.8f}")
    for check in checks:
        if check.problem:
            log.log(f"audit {score.name} {check.name} {check.verdict}")
    record["audit"] = {check.name: check.record() for check in checks}
    log.result["stages"][score.name] = record


def result_card(cfg: Config, log: RunLog, code: int) -> None:
    """The closing summary: bpb by stage, size and margin, seconds by phase, exit code."""
    result = log.result
    seconds = result["seconds"]
    lines = ["-" * 72]
    for name, stage in result["stages"].items():
        if "skipped" in stage:
            lines.append(f"{name:12} skipped: {stage['skipped']}")
        else:
            value = f"{stage['metric']} {stage[stage['metric']]:.6f}"
            size = f"{stage['tokens']} tokens, {stage['bytes']} bytes"
            lines.append(f"{name:12} {value}   {size}, {stage['seconds']:.1f} s")
    if "sizes" in result:
        size = (
            "size         {total} bytes = code {code} + model {model}; cap {cap}, margin {margin}"
        )
        lines.append(size.format(**result["sizes"]))
    phases = {name: value for name, value in seconds.items() if "_side" not in name}
    resumed = ", resumed run" if result.get("resumed") else ""
    lines += [
        "seconds      " + "  ".join(f"{name} {value:.1f}" for name, value in phases.items()),
        f"budgets      train {seconds['train_side']:.1f} s of {cfg.train_limit or 'no limit'}, "
        f"eval {seconds['eval_side']:.1f} s of {cfg.max_eval_seconds or 'no limit'}",
        f"exit code    {code} ({result['status']}{resumed})",
        "-" * 72,
    ]
    log.log("\n".join(lines))


def run_once(cfg: Config, rt: Runtime, log: RunLog, blob: bytes) -> int:
    """One run in one mode -> its exit code. blob: the artifact, unless the mode makes it."""
    log_identity(cfg, rt, log)
    with rt.together():
        table = ByteTable.load(cfg)
        log.identify(tokenizer_identity, cfg, table)
        if cfg.mode != "sample":  # what scoring will lack is noticed now
            charge_paths(cfg, table)
            if not shards_in(find_path(cfg.data_path), "val"):
                log.log(f"WARNING: no {shard_name('val')} in DATA_PATH: nothing will be scored")
    ended = "finished"
    if cfg.mode == "train":
        ended, blob = train_model(cfg, rt, log, table)
    elif cfg.mode == "pack":
        blob = repack_model(cfg, rt, log, blob, table)
    code = {"diverged": DIVERGED, "interrupted": INTERRUPTED}.get(ended, OK)
    if cfg.mode == "sample":
        with log.phase("sample"):
            log_sample(load_artifact(cfg, blob, rt), table, cfg, rt, log)
    elif blob:
        if cfg.mode != "pack":
            code = score_artifact(cfg, blob, rt, log, table)
        code_bytes = code_size()
        if code != AUDIT_FAILED and code_bytes + len(blob) > size_cap(cfg, code_bytes):
            code = OVER_SIZE
        elif code == OK and rt.main and over_budget(cfg, log):  # others wait within theirs
            code = OVER_TIME
    log.result["status"] = ended  # last of all
    return code


def over_budget(cfg: Config, log: RunLog) -> bool:
    """Whether training or scoring took longer than its limit."""
    limits = ((cfg.train_limit, TRAIN_PHASES), (cfg.max_eval_seconds, EVAL_PHASES))
    return any(0 < limit < log.booked(phases) for limit, phases in limits)


def open_log(cfg: Config, rt: Runtime, out: Path) -> RunLog:
    """The log in OUT_DIR; InputError if an artifact is there that a training would overwrite."""
    finished = f"OUT_DIR={str(out)!r} holds an artifact, model.ptz: MODE=eval scores it; "
    finished += "another OUT_DIR or RUN_ID trains anew"
    check(cfg.mode != "train" or not (out / "model.ptz").exists(), finished)
    return RunLog(out, rt, resumed=bool(cfg.resume or rt.restarts))


def place_of(cfg: Config, rt: Runtime) -> Config:
    """Settings with the run's own folders: what is there already is neither lost nor mixed up."""
    out = Path(cfg.out_dir)
    if cfg.mode != "train" and ((out / "model.ptz").exists() or (out / "checkpoint.pt").exists()):
        out = out / f"{cfg.mode}_{cfg.run_id}"  # beside the log of the training
    checkpoint = out / "checkpoint.pt"
    goes_on = rt.restarts and rt.highest(rt.main and checkpoint.is_file())  # as on rank 0's disk
    resume = str(checkpoint) if goes_on else cfg.resume
    data = str(out.resolve() / "smoke_data") if cfg.smoke else cfg.data_path
    return dataclasses.replace(cfg, out_dir=str(out), resume=resume, data_path=data)


def guarded_run(cfg: Config, rt: Runtime, blob: bytes = b"") -> tuple[int, dict[str, Any]]:
    """run_once with its outcome on record, whatever happens -> exit code, result."""
    cfg = place_of(cfg, rt)
    with contextlib.ExitStack() as held:
        with rt.together():
            if rt.main:
                held.enter_context(locked(Path(cfg.out_dir)))
            log = open_log(cfg, rt, Path(cfg.out_dir))
            if cfg.smoke and rt.local_rank == 0:
                synthetic_shards(Path(cfg.data_path))
        rt.complete = False  # until all say that they are here
        code, rt.complete = run_on_record(cfg, rt, log, blob)
        with Requests().heard():  # the end itself is not interrupted
            if code == OK and "result.json" in log.unwritten:
                code = BAD_INPUT
            log.save(exit_code=code)
            result_card(cfg, log, code)
            log.log(f"result_json: {as_json(log.result)}", show=False)  # so the log alone says all
            if rt.complete:
                code = rt.highest(code)  # the launcher ends all when one leaves with an error
    return code, log.result


def run_on_record(cfg: Config, rt: Runtime, log: RunLog, blob: bytes) -> tuple[int, bool]:
    """run_once -> exit code, and whether all processes are here; a bug is raised once on record."""
    say = log.log if rt.main else functools.partial(print, f"process {rt.rank}:", file=sys.stderr)
    try:
        return rt.highest(run_once(cfg, rt, log, blob)), True  # checks may differ by rounding
    except Interrupted as reason:
        say(f"interrupted: {reason}")
        log.result["status"] = "interrupted"
        return INTERRUPTED, False
    except (InputError, OSError) as error:
        say(f"error: {error}")
        log.result["status"] = "bad_input"
        return BAD_INPUT, isinstance(error, AgreedError)
    except Exception as error:
        texts = ("can't allocate memory", "Unable to allocate")  # torch's and numpy's, on CPUs
        short = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not short and not any(text in str(error) for text in texts):
            say(f"error: {type(error).__name__}: {error}")
            log.save(status="crashed", exit_code=BUG)
            raise
        say(f"out of memory: {error}")
        say(
            f"Lower MICRO_BATCH_TOKENS={cfg.micro_tokens} (training), EVAL_BATCH_TOKENS="
            f"{scoring_tokens(cfg, rt)} (windows; no score depends on it) or "
            f"TTT_DOCS={cfg.ttt_docs} (adapters)."
        )
        log.result["status"] = "out_of_memory"
        return OUT_OF_MEMORY, False


def run_seeds(cfg: Config, rt: Runtime) -> int:
    """One run a seed, then mean and standard deviation of the scores -> the highest exit code."""
    codes, scores = {}, []
    for seed in cfg.seeds:
        own = dataclasses.replace(cfg, seed=seed, out_dir=f"{cfg.out_dir}/seed_{seed}")
        codes[seed], result = guarded_run(own, rt)
        if "val_bpb" in result.get("result", {}):
            scores.append(result["result"]["val_bpb"])
        if codes[seed] == INTERRUPTED:
            break
    if rt.main:
        mean = float(np.mean(scores)) if scores else math.nan
        std = float(np.std(scores, ddof=1)) if len(scores) > 1 else math.nan
        print(f"exit codes by seed:{codes} val_bpb mean:{mean:.6f} std:{std:.6f} n:{len(scores)}")
    return max(codes.values())


def name_of_run(rt: Runtime) -> str:
    """Time and process; a run that torchrun starts again keeps its name."""
    process = os.getppid() if rt.by_agent else os.getpid()
    earlier = sorted(Path("logs").glob(f"*_{process}")) if rt.restarts else []
    return earlier[-1].name if earlier else time.strftime(f"%Y%m%d_%H%M%S_{process}")


def run_mode(env: Mapping[str, str]) -> int:
    """The run that the environment describes -> its exit code."""
    cfg = load_config(env)
    if cfg.mode == "plan":
        print("\n".join(plan_lines(cfg)))
        return OK
    with contextlib.closing(Runtime(cfg, env, knows_model=cfg.mode == "train")) as rt:
        ignored = ", ".join(ignored_names(env))
        if ignored:
            rt.notes.append(f"names in the environment that mean nothing here: {ignored}")
        run_id = rt.broadcast_bytes((cfg.run_id or name_of_run(rt)).encode()).decode()
        cfg = dataclasses.replace(cfg, run_id=run_id, out_dir=cfg.out_dir or f"logs/{run_id}")
        if cfg.mode == "train":
            return run_seeds(cfg, rt) if cfg.seeds else guarded_run(cfg, rt)[0]
        with rt.together():
            blob = read_artifact(cfg) if rt.main else b""
        blob = rt.broadcast_bytes(blob)
        raw = str(raw_path(cfg)) if cfg.mode == "pack" else ""
        cfg = dataclasses.replace(settings_of_artifact(cfg, env, blob), raw_model=raw)
        with rt.together():
            rt.choose_attention(cfg)
        if cfg.mode == "sample":
            given = "seed" in read_settings(env)[0]
            seed = cfg.seed if given else int.from_bytes(os.urandom(4), "little")
            cfg = dataclasses.replace(cfg, seed=int(rt.broadcast_bytes(str(seed).encode())))
        return guarded_run(cfg, rt, blob)[0]


def main(argv: Sequence[str], env: Mapping[str, str]) -> int:
    """Runs the program -> its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may lack letters of a sample
    if "--help" in argv or "-h" in argv:
        print(help_text())
        return OK
    try:
        raise_if(
            [f"unknown argument {a!r}: settings are environment variables (--help)" for a in argv]
        )
        with Requests(at_once=True).heard():
            return run_mode(env)
    except InputError as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    except Interrupted as reason:
        print(f"interrupted: {reason}", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
