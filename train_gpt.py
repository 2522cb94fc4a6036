"""Parameter Golf: train, pack and score the best language model of 16,000,000 bytes with its code.

    torchrun --standalone --nproc_per_node=8 train_gpt.py       # the competition: 600 s on 8xH100
    MICRO_BATCH_TOKENS=16384 python train_gpt.py                # the same run on one GPU
    CONFIG=records/track_cpu_1mb/demo/config.env python train_gpt.py    # minutes on a laptop CPU
    MODE=eval ARTIFACT=logs/<run>/model.ptz python train_gpt.py         # score an artifact alone
    SMOKE=1 python train_gpt.py                                 # every section, synthetic text
    python train_gpt.py --help                                  # every setting with its meaning

Settings are environment variables. The sections stand in the order of a run; each uses only those
above it:

    1 settings     4 data         7 quantizers   10 scoring
    2 devices      5 model        8 training     11 checks
    3 run log      6 optimizer    9 artifact     12 main

A training run: `train_model` (12), `train`, `training_loop`, `Trainer.step` (8), `GPT.forward` (5),
`Muon.step` (6). Axis letters in comments: B batch, T time, H heads, K key/value heads or n-gram
orders, D model or head size, V vocabulary, S scored targets of a row, or keys that queries look at;
R, C rows and columns of a matrix, G blocks of C queries to L keys each.
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
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
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
SETTINGS_INSIDE = globals().get("SETTINGS_INSIDE", "")  # the config.env inside a packed wrapper

# ==================================================================================================
# 1. SETTINGS - what can be chosen, and every complaint about a choice.
#    Uses the standard library only.
# ==================================================================================================


class InputError(ValueError):
    """Something given to the program (a setting, a shard, an artifact) is unusable; it is named."""


class ConfigError(InputError):
    """One or more settings are wrong; the message lists all of them."""


def check(holds: Any, complaint: str) -> None:
    """Raises InputError with the complaint unless the condition holds."""
    if not holds:
        raise InputError(complaint)


def raise_if(problems: Sequence[str]) -> None:
    """Raises one ConfigError that lists all problems, if there are any."""
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}; nothing was started."
        raise ConfigError("\n".join([*problems, count]))


@contextlib.contextmanager
def input_error_from(complaint: str, *kinds: type[Exception]) -> Iterator[None]:
    """Exceptions of these kinds become an InputError: the complaint, and the reason in one line."""
    try:
        yield
    except kinds as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        reason = " ".join(reason.removeprefix("InputError: ").split())
        raise InputError(f"{complaint} ({reason:.300})") from None


def _setting(
    group: str, default: Any, doc: str, low: Any = None, high: Any = None, choices: Any = ()
) -> Any:
    metadata = {"group": group, "doc": doc, "low": low, "high": high, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


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

    mode: str = _run("train", "what to do", choices=("train", "eval", "audit", "sample"))
    run_id: str = _run("", "name of the run; empty = time and process number")
    out_dir: str = _run("", "folder for everything written; empty = logs/<RUN_ID>")
    seed: int = _run(1337, "seed of the parameters' initial values and of sampling", low=0)
    seeds: tuple[int, ...] = _run(
        (), "several seeds, one run each, then mean and standard deviation: 1,2,3"
    )
    smoke: bool = _run(False, "every section on a tiny model and synthetic text, no data needed")
    device: str = _run("auto", "where to compute", choices=("auto", "cuda", "cpu", "mps"))
    compile: str = _run("auto", "torch.compile; auto = on CUDA only", choices=("auto", "0", "1"))
    attn: str = _run(
        "auto", "attention; auto = fa3 if it works, else sdpa", choices=("auto", "fa3", "sdpa")
    )
    artifact: str = _run(
        "", "packed model for MODE=eval and MODE=sample; empty = <OUT_DIR>/model.ptz"
    )
    resume: str = _run("", "checkpoint to continue from")
    save_every: int = _run(
        0, "write a checkpoint every so many steps (also on SIGUSR1 and SIGTERM)", low=0
    )
    sample_tokens: int = _run(
        0, "length of text sample; 0 = none after training, 200 in MODE=sample", low=0
    )
    sample_prompt: str = _run("", "text that the sample continues")
    sample_temperature: float = _run(0.8, "temperature of the sample", low=0.01)

    data_path: str = _data(
        "./data/datasets/fineweb10B_sp1024", "folder of fineweb_{train,val}_*.bin shards"
    )
    tokenizer_path: str = _data(
        "./data/tokenizers/fineweb_1024_bpe.model", "SentencePiece model or byte260"
    )
    val_tokens: int = _data(
        0, "validation targets to score (development: no val_bpb); 0 = all", low=0
    )

    schedule: str = _train("clock", "what drives warm-down and stop", choices=("clock", "tokens"))
    max_wallclock_seconds: float = _train(
        600.0, "training seconds under SCHEDULE=clock; 0 = none", low=0
    )
    iterations: int = _train(20000, "training steps at most", low=0)
    warmup_steps: int = _train(
        20, "steps on throw-away state before the clock starts (compilation)", low=0
    )
    warmdown_iters: int = _train(
        1200, "last steps, over which the learning rates fall to zero", low=0
    )
    train_batch_tokens: int = _train(524288, "tokens a step, over all processes", low=1)
    micro_batch_tokens: int = _train(
        0, "tokens a forward pass; 0 = an eighth of TRAIN_BATCH_TOKENS", low=0
    )
    train_seq_len: int = _train(1024, "tokens a training sequence", low=1)
    val_loss_every: int = _train(
        1000, "validate every so many steps, outside the clock; 0 = never", low=0
    )
    train_log_every: int = _train(
        200, "log the training loss every so many steps (and the first ten)", low=0
    )
    late_qat_threshold: float = _train(
        0.0, "fake quantization at rate factors below this; 0 = never", low=0
    )
    crown_q_lambda: float = _train(
        0.0, "quantization penalty (CROWN-Q) at rate factors below 0.5", low=0
    )

    vocab_size: int = _model(1024, "tokens in the vocabulary", low=2, high=65536)
    num_layers: int = _model(9, "transformer blocks", low=1, high=1024)
    model_dim: int = _model(512, "width", low=2, high=65536)
    num_heads: int = _model(8, "attention heads", low=1)
    num_kv_heads: int = _model(4, "key/value heads (grouped-query attention)", low=1)
    mlp_mult: float = _model(
        2.0, "MLP hidden width over MODEL_DIM; may be fractional", low=0.01, high=64
    )
    leaky_slope: float = _model(0.0, "MLP activation leaky_relu(x, slope)^2; 0 = relu(x)^2", low=0)
    tie_embeddings: bool = _model(True, "the embedding is also the output matrix")
    tied_embed_init_std: float = _model(
        0.005, "standard deviation of a tied embedding at start", low=0
    )
    ortho_init: str = _model(
        "", "orthogonal start (scaled: tables less)", choices=("", "plain", "scaled")
    )
    logit_softcap: float = _model(30.0, "logits become cap * tanh(logits / cap); 0 = off", low=0)
    rope_base: float = _model(10000.0, "rotary base", low=1)
    rope_dims: int = _model(0, "rotated dimensions of a head (partial RoPE); 0 = all", low=0)
    rope_train_seq_len: int = _model(
        0, "longer inputs stretch the rotary base (NTK); 0 = never", low=0
    )
    qk_gain_init: float = _model(1.5, "initial gain of each head's normalised queries", low=0)
    xsa_last_n: int = _model(0, "last layers with exclusive self-attention (XSA); 0 = none", low=0)
    unet_skips: bool = _model(True, "learned skips from the first half of the layers to the second")
    x0_mix: bool = _model(True, "every block mixes in the embedding stream with learned weights")
    ln_scale: bool = _model(False, "normed sublayer inputs times 1/sqrt(layer + 1)")
    depth_scale_init: bool = _model(False, "attn_scale and mlp_scale start at 1/sqrt(layer + 1)")
    bigram_vocab_size: int = _model(
        0, "rows of the hashed bigram embedding (BigramHash); 0 = none", low=0
    )
    bigram_dim: int = _model(128, "width of the bigram table", low=1)
    bigram_hash: str = _model(
        "xor", "xor: PR 489; linear: PR 740, without scale", choices=("xor", "linear")
    )
    bigram_init: str = _model(
        "zero", "its start; dead: never trains", choices=("zero", "normal", "dead")
    )
    smear: bool = _model(False, "SmearGate: a learned share of the previous token's embedding")
    smear_before_norm: bool = _model(
        False, "SmearGate acts before the embedding's norm (PR 740), not after"
    )
    smear_bos_mask: bool = _model(False, "SmearGate lets nothing across a document start")
    bos_id: int = _model(1, "token that starts a document", low=0)
    ve_layers: tuple[int, ...] = _model(
        (), "layers whose values get token embeddings: 9,10; empty = none"
    )
    ve_dim: int = _model(128, "width of the shared value-embedding table", low=1)
    mixer_head: bool = _model(False, "a head that weighs network and n-gram orders (PR 859)")

    embed_lr: float = _optim(0.6, "Adam rate of an untied embedding", low=0)
    head_lr: float = _optim(0.008, "Adam rate of an untied output matrix", low=0)
    tied_embed_lr: float = _optim(
        0.05, "Adam rate of a tied embedding and of the other tables", low=0
    )
    matrix_lr: float = _optim(0.04, "Muon rate of the matrices", low=0)
    scalar_lr: float = _optim(0.04, "Adam rate of vectors and scalars", low=0)
    bigram_optim: str = _optim(
        "", "group of the bigram's matrices", choices=("", "scalars", "matrices")
    )
    muon_momentum: float = _optim(0.95, "Muon momentum", low=0, high=1)
    muon_momentum_warmup_start: float = _optim(0.85, "Muon momentum at step 0", low=0, high=1)
    muon_momentum_warmup_steps: int = _optim(500, "steps until MUON_MOMENTUM is reached", low=0)
    muon_backend_steps: int = _optim(5, "Newton-Schulz iterations", low=1)
    muon_wd: float = _optim(0.0, "decoupled weight decay of the matrices", low=0)
    embed_wd: float = _optim(
        0.0, "decoupled weight decay of embeddings, tables and output matrix", low=0
    )
    adam_wd: float = _optim(0.0, "decoupled weight decay of vectors and scalars", low=0)
    beta1: float = _optim(0.9, "Adam", low=0, high=1)
    beta2: float = _optim(0.95, "Adam", low=0, high=1)
    adam_eps: float = _optim(1e-8, "Adam", low=0)
    grad_clip_norm: float = _optim(0.0, "global gradient norm at most; 0 = off", low=0)
    ema_decay: float = _optim(
        0.0, "average the weights over steps with this decay; 0 = off", low=0, high=1
    )
    ema_start: float = _optim(0.0, "share of the run after which that begins", low=0, high=1)
    swa_every: int = _optim(
        0, "average of every so many steps (with EMA: half of each); 0 = off", low=0
    )
    swa_start: float = _optim(0.4, "share of the run after which that begins", low=0, high=1)

    quant_bits: int = _pack(8, "bits of a quantized weight, row-wise scales", low=2, high=8)
    quant_policy: str = _pack(
        "", "other bits by role: embed:8,attn:6 (roles embed, table, attn, mlp, other)"
    )
    quant_clip_steps: int = _pack(
        16, "clip levels tried for each row; 1 = its maximum", low=1, high=256
    )
    quant_scale_floor: bool = _pack(
        False, "steps of at least 1/top level, as the official baseline has them"
    )
    gptq_n_samples: int = _pack(
        0, "training sequences that calibrate GPTQ; 0 = plain rounding", low=0
    )
    gptq_damp: float = _pack(0.01, "share of its mean added to the Hessian's diagonal", low=1e-6)
    gptq_reserve_seconds: float = _pack(
        0.0, "seconds of the training clock kept for calibration", low=0
    )
    prune_pct: float = _pack(
        0.0, "share of each quantized tensor's smallest weights set to 0", low=0, high=1
    )
    keep_float_max_numel: int = _pack(65536, "tensors up to this size stay float", low=0)
    compressor: str = _pack("zstd", "codec of the artifact", choices=("zstd", "zlib", "lzma"))
    max_artifact_bytes: int = _pack(
        16_000_000, "cap on code + model; over it the exit code is 2", low=0
    )

    eval_seq_len: int = _score(0, "tokens a scoring window; 0 = TRAIN_SEQ_LEN", low=0)
    eval_plain: bool = _score(True, "score plain windows too, not only sliding ones")
    eval_stride: int = _score(64, "sliding windows advance by this; 0 = plain windows only", low=0)
    eval_batch_tokens: int = _score(0, "tokens a scoring batch; 0 = as the device likes", low=0)
    max_eval_seconds: float = _score(
        600.0, "scoring seconds; a stage that cannot finish is skipped", low=0
    )
    ttt_epochs: int = _score(
        0, "passes of test-time training over what was scored; 0 = none", low=0
    )
    ttt_before_scoring: bool = _score(
        False, "adapt to all tokens, then score them (PR 489): no valid score"
    )
    ttt_chunk_tokens: int = _score(32768, "targets between two adaptations", low=1)
    ttt_lr: float = _score(5e-4, "its learning rate; a cosine over the chunks", low=0)
    ttt_optimizer: str = _score(
        "adamw", "its optimizer; sgd has momentum 0.9", choices=("adamw", "sgd")
    )
    ttt_freeze_blocks: int = _score(
        0, "adapt the last so many blocks, scales, head; 0 = everything", low=0
    )
    qttt: bool = _score(False, "of those blocks adapt the query matrices only")
    byte_weighted_ttt: bool = _score(False, "weigh its loss by each target's bytes")
    ttt_batch_seqs: int = _score(32, "sequences of each part in a step", low=1)
    ttt_parts: int = _score(
        1, "equal parts of the data that a step draws from (the seeds' GPUs)", low=1
    )
    ttt_lora_rank: int = _score(
        0, "rank of adapters that learn each document while it is scored", low=0
    )
    ttt_lora_alpha: float = _score(144.0, "their product is scaled by this over the rank", low=0)
    ttt_lora_chunk: int = _score(48, "targets between two of their steps", low=1)
    ttt_lora_keep: bool = _score(True, "a slot's A matrices stay for its next document")
    ttt_docs: int = _score(64, "documents in a batch, each with its own adapters", low=1)
    ttt_temperature: float = _score(
        1.0, "temperature of certain predictions (ttt, ngram); 1 = off", low=0
    )
    eval_stream: int = _score(
        0, "width of the attention window of one pass over the stream; 0 = none", low=0
    )
    stream_docs: bool = _score(False, "that pass sees no document but the target's own")
    mix_chunk_tokens: int = _score(
        16384, "targets between two updates of TILT and NGRAM=mix", low=1
    )
    tilt: bool = _score(False, "raise the token that last followed the longest known context")
    ngram: str = _score(
        "",
        "mix: exact n-gram mixture; others: hashed caches (no score)",
        choices=("", "mix", "fixed", "backoff", "gated"),
    )
    ngram_docs: bool = _score(
        True, "contexts of TILT and NGRAM=mix do not reach into earlier documents"
    )
    ngram_order: int = _score(7, "highest order", low=2, high=16)
    ngram_min_order: int = _score(2, "lowest order", low=2, high=16)
    ngram_alpha: float = _score(0.4, "weight of NGRAM=fixed", low=0, high=1)
    ngram_ent_base: float = _score(
        0.05, "weight of NGRAM=backoff where the network is certain", low=0
    )
    ngram_ent_range: float = _score(0.55, "what uncertainty adds to it", low=0)
    ngram_min_count: int = _score(2, "an order counts from so many sightings of its context", low=1)
    ngram_buckets: int = _score(4_194_304, "counters of a table, a power of two", low=2, high=2**30)
    ngram_primes: tuple[int, ...] = _score(
        (36313, 27191, 51647, 81929, 131071, 65537, 104729), "of the hash"
    )
    ngram_stride: int = _score(0, "its windows advance by this; 0 = EVAL_STRIDE", low=0)
    ngram_chunk_tokens: int = _score(
        0, "targets between two updates; 0 = after every window", low=0
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
    def micro_batches(self) -> int:
        """Forward passes of one training step, over all processes."""
        return self.train_batch_tokens // self.micro_tokens

    @property
    def score_len(self) -> int:
        """Tokens of a scoring window."""
        return self.eval_seq_len or self.train_seq_len

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

SMOKE_CONFIG = """
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

# Other spellings that people's scripts use, and what the setting is called here.
OLD_NAMES = {
    "BIGRAM_HASH_BUCKETS": "BIGRAM_VOCAB_SIZE",
    "WEIGHT_DECAY": "MUON_WD",
    "VAL_BATCH_SIZE": "EVAL_BATCH_TOKENS",
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
}

# A name that begins with one of these words was meant for this program.
FAMILIES = """ADAM BIGRAM CROWN EMA EVAL GPTQ GRAD LN LOGIT MATRIX MIXER MLP MUON NGRAM PRUNE QAT QK
    QUANT ROPE SCALAR SMEAR SWA TIED TTT VAL VE WARMDOWN WARMUP XSA""".split()

# A name that begins with one of these was set by a launcher, a library or the system.
FOREIGN = tuple(
    """TORCH OMP_ MKL_ NCCL_ CUDA_ PYTHON PYTORCH SLURM_ XDG_ GITHUB_ LD_ LC_ RANK
    WORLD_SIZE LOCAL_ GROUP_ ROLE_ MASTER_ PATH GLOO_ NVIDIA_ TRITON_ HF_""".split()
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


def read_config_lines(text: str, file: str) -> list[Assignment]:
    """The assignments of a config.env; comments and empty lines are left out."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            name, equals, value = (part.strip() for part in line.partition("="))
            found.append(Assignment(f"{file} line {number}: ", name, value, bool(equals)))
    return found


def _unknown(assignment: Assignment) -> str:
    """What is wrong with a name that is no setting; empty if it may be somebody else's."""
    name = assignment.name
    if not assignment.complete:
        return f"{assignment.where}expected NAME=value"
    if not assignment.where and (
        name.startswith(FOREIGN) or not re.fullmatch("[A-Z][A-Z0-9_]*", name)
    ):
        return ""
    near = difflib.get_close_matches(name, FIELDS, 1, 0.85)
    if name in OLD_NAMES:
        hint = f": here it is {OLD_NAMES[name]}"
    elif near:
        hint = f" (did you mean {near[0]}?)"
    elif assignment.where or name.split("_")[0] in FAMILIES:
        hint = " (python train_gpt.py --help lists all)"
    else:
        return ""
    return f"{assignment.where}unknown setting {name}{hint}"


def _assignments(env: Mapping[str, str]) -> tuple[list[Assignment], list[str]]:
    """What is written in SMOKE's settings, the config file and the environment; the last holds."""
    found, problems = [], []
    if env.get("SMOKE", "0").strip().lower() in ("1", "true"):
        found += read_config_lines(SMOKE_CONFIG, "SMOKE=1")
    path = Path(env["CONFIG"]) if env.get("CONFIG") else SCRIPT.with_name("config.env")
    if path.is_file():
        found += read_config_lines(path.read_text(encoding="utf-8"), path.name)
    elif env.get("CONFIG"):
        problems.append(f"CONFIG={env['CONFIG']!r}: no such file")
    else:
        found += read_config_lines(SETTINGS_INSIDE, path.name)
    found += [Assignment("", name, text) for name, text in env.items() if name != "CONFIG"]
    return found, problems


def read_settings(env: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Everything set by SMOKE, file and environment as {field: value}, and the complaints."""
    assignments, problems = _assignments(env)
    texts = {}
    for assignment in assignments:
        if assignment.complete and assignment.name in FIELDS:
            texts[assignment.name] = assignment.text.strip()
        elif reason := _unknown(assignment):
            problems.append(reason)
    values = {}
    for name, text in texts.items():
        parse, expected = PARSERS[type(FIELDS[name].default)]
        try:
            values[name.lower()] = parse(text)
        except (ValueError, KeyError):
            problems.append(f"{name}={text!r}: expected {expected}")
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
        elif (low is not None and value < low) or (high is not None and value > high):
            limit = f", {high} at most" if high else ""
            problems.append(f"{name}={value}: expected {low} or more{limit}")
    return problems or relation_problems(cfg, world)


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
        return names.get(name, f"{name.upper()}=") + as_typed(getattr(self.cfg, name))

    def multiple(self, a: str, b: str) -> None:
        """The setting a must be a multiple of b."""
        divisor = getattr(self.cfg, b)
        divides = divisor and getattr(self.cfg, a) % divisor == 0
        self.require(divides, f"{self.shown(a)} must be a multiple of {self.shown(b)}")

    def at_most(self, a: str, b: str) -> None:
        """The setting a must not be larger than b."""
        holds = getattr(self.cfg, a) <= getattr(self.cfg, b)
        self.require(holds, f"{self.shown(a)} must be at most {self.shown(b)}")

    def needs(self, a: str, b: str) -> None:
        """The setting a acts only if b is on."""
        wanted = f"{b.upper()}=1" if isinstance(getattr(self.cfg, b), bool) else b.upper()
        holds = getattr(self.cfg, b) or not getattr(self.cfg, a)
        self.require(holds, f"{self.shown(a)} needs {wanted}")


def _check_model(c: Config, relations: Relations) -> None:
    require, shown = relations.require, relations.shown
    relations.multiple("model_dim", "num_heads")
    relations.multiple("num_heads", "num_kv_heads")
    relations.at_most("xsa_last_n", "num_layers")
    relations.at_most("rope_dims", "head_dim")
    relations.needs("smear_bos_mask", "smear")
    relations.needs("smear_before_norm", "smear")
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
        f"VE_LAYERS={c.ve_layers} names a layer twice",
    )
    require(
        all(0 <= layer <= last for layer in c.ve_layers),
        f"{shown('ve_layers')} must lie between 0 and NUM_LAYERS - 1 = {last}",
    )
    require(c.bigram_vocab_size != 1, "BIGRAM_VOCAB_SIZE=1: expected 0 or at least 2")
    require(c.bos_id < c.vocab_size, f"{shown('bos_id')} must be below {shown('vocab_size')}")


ROLES = ("embed", "table", "attn", "mlp", "other")


def _check_training(c: Config, relations: Relations) -> None:
    require, shown = relations.require, relations.shown
    relations.multiple("train_batch_tokens", "micro_tokens")
    relations.multiple("micro_tokens", "train_seq_len")
    require(
        c.tokenizer_path == "byte260" or c.tokenizer_path.endswith(".model"),
        f"TOKENIZER_PATH={c.tokenizer_path!r}: expected a SentencePiece .model file or byte260",
    )
    require(c.beta1 < 1 and c.beta2 < 1, "BETA1 and BETA2 must be below 1")
    require(
        c.max_wallclock_seconds == 0 or c.gptq_reserve_seconds < c.max_wallclock_seconds,
        f"{shown('gptq_reserve_seconds')} must be below {shown('max_wallclock_seconds')}",
    )
    policy = rf"(\s*({'|'.join(ROLES)}):[2-8]\s*(,|$)|,)*"
    require(
        re.fullmatch(policy, c.quant_policy),
        f"QUANT_POLICY={c.quant_policy!r}: expected role:bits with roles {', '.join(ROLES)}, "
        "2 to 8 bits",
    )


def _check_scoring(c: Config, relations: Relations) -> None:
    require, shown = relations.require, relations.shown
    relations.at_most("eval_stride", "score_len")
    relations.at_most("ngram_stride", "score_len")
    relations.at_most("ngram_min_order", "ngram_order")
    relations.at_most("ttt_freeze_blocks", "num_layers")
    relations.needs("stream_docs", "eval_stream")
    relations.needs("ttt_before_scoring", "ttt_epochs")
    power_of_two = c.ngram_buckets & (c.ngram_buckets - 1) == 0
    require(power_of_two, f"{shown('ngram_buckets')} must be a power of two")
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
    if not relations.problems and cfg.mode == "train":
        count = cfg.micro_batches
        sizes = ", ".join(str(size) for size in range(1, count + 1) if count % size == 0)
        relations.require(
            count % world == 0,
            f"WORLD_SIZE={world} must divide the {count} micro-batches of a step "
            f"(TRAIN_BATCH_TOKENS / MICRO_BATCH_TOKENS): possible are {sizes}",
        )
    return relations.problems


def load_config(env: Mapping[str, str]) -> Config:
    """Default < file (CONFIG, or config.env by the script) < environment; lists all problems."""
    values, problems = read_settings(env)
    cfg = Config(**values)
    raise_if(problems + check_config(cfg, int(env.get("WORLD_SIZE") or 1)))
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
        lines.append(f"{name}={as_typed(field.default)}".ljust(44) + f" {meta['doc']}{options}")
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
    tolerance: float  # nats by which a score may differ in a batch of another shape


GPU_PROFILE = DeviceProfile(torch.bfloat16, lag=2, score_tokens=1 << 19, tolerance=0.05)
CPU_PROFILE = DeviceProfile(torch.float32, lag=0, score_tokens=1 << 14, tolerance=1e-4)

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


def fa3_attention(device: torch.device) -> AttentionBackend:
    """FlashAttention 3, after one real call; raises whatever goes wrong if it fails here."""
    # Optional by design: only Hopper images have it.
    from flash_attn_interface import flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_func(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out  # releases differ in what they return

    probe = torch.zeros(1, 8, 1, 64, device=device, dtype=torch.bfloat16)
    attend(probe, probe, probe)
    return attend


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

    def __init__(self, cfg: Config, env: Mapping[str, str]):
        self.rank = int(env.get("RANK") or 0)
        self.world = int(env.get("WORLD_SIZE") or 1)
        kind = self._pick_device(cfg.device)
        self.cuda = kind == "cuda"
        self.device = torch.device(kind)
        if self.cuda:
            self.device = torch.device(kind, int(env.get("LOCAL_RANK") or 0))
        self.profile = GPU_PROFILE if self.cuda else CPU_PROFILE
        compute = str(self.profile.dtype).removeprefix("torch.")
        self.notes = [f"device:{self.device_name()} compute:{compute} world_size:{self.world}"]
        self._prepare_device()
        self.attention = self._pick_attention(cfg.attn)
        self.compiles = cfg.compile == "1" or (cfg.compile == "auto" and self.cuda)
        self._owns_group = self.world > 1 and not dist.is_initialized()
        if self._owns_group:
            dist.init_process_group(
                "nccl" if self.cuda else "gloo",
                rank=self.rank,
                world_size=self.world,
                timeout=datetime.timedelta(minutes=10),
                device_id=self.device if self.cuda else None,
            )

    def _pick_device(self, wanted: str) -> str:
        available = ["cpu"]
        if torch.backends.mps.is_available():
            available.insert(0, "mps")
        if torch.cuda.is_available():
            available.insert(0, "cuda")
        if wanted == "auto":
            return available[0]
        if wanted not in available:
            found = ", ".join(available)
            raise ConfigError(f"DEVICE={wanted}: torch finds none here; available: {found}")
        return wanted

    def _prepare_device(self) -> None:
        if self.cuda:
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        elif self.device.type == "cpu":
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid, and slow
            keep_freed_memory()

    def _pick_attention(self, wanted: str) -> AttentionBackend:
        reason = "ATTN=sdpa" if wanted == "sdpa" else "FlashAttention 3 needs CUDA"
        if wanted != "sdpa" and self.cuda:
            try:
                attend = fa3_attention(self.device)
                self.notes.append("attention:fa3 (imported, probe call passed)")
                return attend
            except Exception as error:  # any failure of a foreign kernel means: not here
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if wanted == "fa3":
            problem = f"FlashAttention 3 does not run here ({reason})"
            raise ConfigError(f"ATTN=fa3: {problem}; allowed: auto, sdpa")
        self.notes.append(f"attention:sdpa ({reason})")
        return sdpa_attention

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
        return torch.compile(function, dynamic=False, fullgraph=True) if self.compiles else function

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
            dist.all_gather_into_tensor(out, done.contiguous())
            done = out.narrow(0, 0, stack.size(0) - missing)
        return done

    def broadcast_bytes(self, blob: bytes | None) -> bytes:
        """Rank 0's bytes on every process: nodes need no shared disk."""
        box = [blob]
        if self.world > 1:
            dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

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
        """Leaves the group of processes."""
        if self._owns_group:
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


class RunLog:
    """train.log, metrics.jsonl, result.json and the seconds of each phase, in one folder.

    Only rank 0 writes; the others keep the same seconds. A resumed run appends to what is there.
    """

    def __init__(self, out_dir: Path, rt: Runtime, resumed: bool = False, silent: bool = False):
        self.out_dir = out_dir
        self.writes = rt.main and not silent
        self.seconds: dict[str, float] = {}  # of each phase, without those inside it
        self.began: dict[str, float] = {}  # each phase's first second
        self.result: dict[str, Any] = {"status": "started", "stages": {}}
        self.result["phases_began"] = self.began
        self.start = time.perf_counter()
        self._inner = 0.0  # seconds booked by phases inside the present one
        self._last_progress = self.start
        if self.writes:
            out_dir.mkdir(parents=True, exist_ok=True)
            if not resumed:
                (out_dir / "train.log").write_text("")
                (out_dir / "metrics.jsonl").write_text("")

    def _append(self, name: str, line: str) -> None:
        if self.writes:
            with open(self.out_dir / name, "a", encoding="utf-8") as file:
                file.write(line + "\n")

    def log(self, line: str, show: bool = True) -> None:
        """A line of train.log, and of the terminal if show."""
        if self.writes and show:
            print(line, flush=True)
        self._append("train.log", line)

    def metric(self, **values: Any) -> None:
        """A line of metrics.jsonl."""
        self._append("metrics.jsonl", json.dumps(values))

    def progress(self, line: str, last: bool = False) -> None:
        """One rewritten line on a terminal; elsewhere a line every ten seconds."""
        if self.writes and sys.stdout.isatty():
            print(f"\r{line}\033[K", end="\n" if last else "", flush=True)
        elif time.perf_counter() - self._last_progress > 10 and not last:
            self._last_progress = time.perf_counter()
            self.log(line)

    def identify(self, identity: Callable[..., tuple[dict[str, Any], str]], *data: Any) -> None:
        """Logs and keeps what tells data apart: identity(*data) -> fields of result, log line."""
        if self.writes:  # one process reads the files
            fields, line = identity(*data)
            self.result.setdefault("data", {}).update(fields)
            self.log(line)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Books the block's seconds under a name, without what inner phases booked."""
        outer = self._inner
        self._inner = 0.0
        start = time.perf_counter()
        self.began.setdefault(name, round(start - self.start, 3))
        try:
            yield
        finally:
            whole = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + whole - self._inner
            self._inner = outer + whole

    def train_seconds(self) -> float:
        """Seconds booked so far against MAX_WALLCLOCK_SECONDS."""
        return sum(self.seconds.get(name, 0.0) for name in TRAIN_PHASES)

    def eval_seconds(self) -> float:
        """Seconds booked so far against MAX_EVAL_SECONDS."""
        return sum(self.seconds.get(name, 0.0) for name in EVAL_PHASES)

    def save(self, **fields: Any) -> None:
        """Merges fields into result.json, with the seconds so far."""
        wall = time.perf_counter() - self.start
        seconds = dict(self.seconds)
        seconds["other"] = wall - sum(self.seconds.values())
        seconds["wall"] = wall
        seconds["train_side"] = self.train_seconds()
        seconds["eval_side"] = self.eval_seconds()
        self.result.update(fields)
        self.result["seconds"] = {name: round(value, 3) for name, value in seconds.items()}
        if self.writes:
            text = json.dumps(self.result, indent=1) + "\n"
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
    with input_error_from(f"{path}: cannot be read", OSError), open(path, "rb") as file:
        header = file.read(SHARD_HEADER_BYTES)
        size = os.fstat(file.fileno()).st_size
    too_short = f"{path}: {size} bytes, shorter than the header of a shard"
    check(size >= SHARD_HEADER_BYTES, too_short)
    magic, version, count = struct.unpack("<3i", header[:12])
    check(
        magic == SHARD_MAGIC and version == SHARD_VERSION,
        f"{path}: magic {magic}, version {version}; expected {SHARD_MAGIC}, {SHARD_VERSION}",
    )
    needed = SHARD_HEADER_BYTES + 2 * count
    check(
        count > 0 and size == needed,
        f"{path}: {size} bytes; the header's {count} tokens need {needed}",
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
    raise InputError(f"{text}: {searched}; see data/README.md")


def shard_paths(cfg: Config, split: str) -> list[Path]:
    """The shards of a split (train or val), in order of name; at least one."""
    folder = find_path(cfg.data_path)
    pattern = f"fineweb_{split}_*.bin"
    paths = sorted(folder.glob(pattern))
    check(paths, f"DATA_PATH={cfg.data_path!r}: no {pattern} in {folder}")
    return paths


def sha256(path: Path) -> str:
    """A file's SHA-256 in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class TokenStream:
    """The training tokens as one endless stream: shards in order of name, then again."""

    def __init__(self, paths: Sequence[Path], cfg: Config):
        self.paths = list(paths)
        self.vocab_size = cfg.vocab_size
        self.row = cfg.train_seq_len
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
                found = f"token {part.max()}, but VOCAB_SIZE={self.vocab_size}"
                raise InputError(f"{self.paths[index]}: {found}")
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


def load_validation(cfg: Config) -> np.ndarray:
    """All validation tokens (uint16), or the first VAL_TOKENS + 1."""
    paths = shard_paths(cfg, "val")
    tokens = np.concatenate([read_shard(path) for path in paths])
    if cfg.val_tokens:
        tokens = tokens[: cfg.val_tokens + 1]
    check(len(tokens) > 1, f"{paths[0]}: {len(tokens)} validation token; scoring needs two")
    highest = tokens.max()
    found = f"token {highest}, but VOCAB_SIZE={cfg.vocab_size}"
    check(highest < cfg.vocab_size, f"{paths[0]}: {found}")
    return tokens


WORD_MARK = "\u2581"  # SentencePiece's sign for a space before a word


class ByteTable:
    """How many bytes of text each token stands for (upstream's rule).

    A token counts the UTF-8 bytes of its piece without the word mark; the mark counts one byte
    unless the token before is control, unknown or unused. Those count nothing themselves, byte
    pieces count one.
    """

    def __init__(
        self,
        sizes: np.ndarray,
        marked: np.ndarray,
        boundary: np.ndarray,
        name: str,
        processor: sentencepiece.SentencePieceProcessor | None = None,
    ):
        self.sizes = sizes  # [V] int16, bytes without the mark
        self.marked = marked  # [V] bool, the piece begins with a mark
        self.boundary = boundary  # [V] bool, control, unknown or unused
        self.name = name
        self.processor = processor
        self.vocab_size = len(sizes)

    @classmethod
    def from_sentencepiece(cls, path: str | Path) -> ByteTable:
        """The table of a SentencePiece model file; InputError if it is none."""
        check(Path(path).is_file(), f"{path}: no such tokenizer file")
        with input_error_from(f"{path}: not a SentencePiece model", RuntimeError, OSError):
            sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        ids = range(sp.vocab_size())
        pieces = [sp.id_to_piece(i) for i in ids]
        boundary = [sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in ids]
        marked = [pieces[i].startswith(WORD_MARK) and not boundary[i] for i in ids]
        sizes = np.zeros(len(ids), dtype=np.int16)
        for i in ids:
            if sp.is_byte(i):
                sizes[i] = 1
            elif not boundary[i]:
                sizes[i] = len(pieces[i].removeprefix(WORD_MARK).encode())
        return cls(sizes, np.array(marked), np.array(boundary), Path(path).name, sp)

    @classmethod
    def bytes260(cls) -> ByteTable:
        """The byte-level vocabulary.

        0 pad, 1 document start, 2 document end, 3 unknown, b + 4 is byte b.
        """
        boundary = np.arange(260) < 4
        return cls((~boundary).astype(np.int16), np.zeros(260, bool), boundary, "byte260")

    @classmethod
    def load(cls, cfg: Config) -> ByteTable:
        """The table that TOKENIZER_PATH names; InputError if it does not fit settings or data."""
        if cfg.tokenizer_path == "byte260":
            table = cls.bytes260()
        else:
            table = cls.from_sentencepiece(find_path(cfg.tokenizer_path))
        has = f"the tokenizer {table.name} has {table.vocab_size} tokens"
        check(table.vocab_size == cfg.vocab_size, f"VOCAB_SIZE={cfg.vocab_size}, but {has}")
        made_by = maker_of_shards(cfg)
        check(
            made_by in (None, tokenizer_hash(cfg)),
            f"TOKENIZER_PATH={cfg.tokenizer_path!r}: the manifest says that another tokenizer "
            f"(sha256 {made_by!s:.16}) made the shards in {cfg.data_path}",
        )
        return table

    def count(self, tokens: np.ndarray) -> np.ndarray:
        """Bytes charged to tokens[1:] -> int16 [len(tokens) - 1]."""
        spaces = self.marked[tokens[1:]] & ~self.boundary[tokens[:-1]]
        return self.sizes[tokens[1:]] + spaces

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        if self.processor:
            return self.processor.encode(text)
        return [byte + 4 for byte in text.encode()]

    def decode(self, tokens: Sequence[int]) -> bytes:
        """The text of the tokens, as bytes. Control tokens are empty."""
        if self.processor:
            return self.processor.decode([int(t) for t in tokens]).encode()
        return bytes(int(t) - 4 for t in tokens if t >= 4)


def tokenizer_hash(cfg: Config) -> str:
    """SHA-256 of the tokenizer's file, or byte260."""
    if cfg.tokenizer_path == "byte260":
        return "byte260"
    return sha256(find_path(cfg.tokenizer_path))


def maker_of_shards(cfg: Config) -> str | None:
    """The hash of the tokenizer that made the shards, if data/prepare.py's manifest.json tells."""
    for resolve in (os.path.abspath, os.path.realpath):  # links may lead to or from a manifest
        # Whatever a damaged or foreign manifest lacks means: it does not say.
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
            folder = Path(resolve(find_path(cfg.data_path)))
            manifest = json.loads((folder.parent.parent / "manifest.json").read_text())
            (dataset,) = (entry for entry in manifest["datasets"] if entry["name"] == folder.name)
            tokenizers = {entry["name"]: entry for entry in manifest["tokenizers"]}
            made_by = tokenizers[dataset["tokenizer_name"]]
            return "byte260" if made_by.get("kind") == "byte" else made_by.get("sha256")
    return None


# What tells data apart: fields of the result, and a log line as `data/prepare.py verify` prints it.


def tokenizer_identity(cfg: Config, table: ByteTable) -> tuple[dict[str, Any], str]:
    """The tokenizer's hash, for result and log."""
    digest = tokenizer_hash(cfg)
    kind = "sentencepiece" if table.processor else "bytes"
    path = f"tokenizer_path={cfg.tokenizer_path} sha256:{digest}"
    return {"tokenizer_sha256": digest}, f"val_bpb:enabled tokenizer_kind={kind} {path}"


def shards_identity(cfg: Config, split: str, tokens: int) -> tuple[dict[str, Any], str]:
    """A split's hashes: of all validation shards, or of the first and last training shard."""
    name = find_path(cfg.data_path).resolve().name
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


def synthetic_shards(folder: Path, seed: int = 0) -> None:
    """Small byte-level shards of invented words with skewed frequencies, for SMOKE=1."""
    rng = np.random.default_rng(seed)
    letters = list("aeioubdklmnrst")
    words = ["".join(rng.choice(letters, rng.integers(2, 8))) for _ in range(200)]
    frequencies = 1 / np.arange(1, len(words) + 1)
    frequencies = frequencies / frequencies.sum()
    for split, documents in (("train", 60), ("val", 6)):
        tokens = []
        for _ in range(documents):
            text = " ".join(rng.choice(words, 150, p=frequencies))
            tokens += [1, *(byte + 4 for byte in text.encode())]
        write_shard(folder / f"fineweb_{split}_000000.bin", np.array(tokens))


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
    table = nn.Embedding(rows, dim)
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
    if not train_len or length <= train_len:
        return base
    return base * (length / train_len) ** (dims / (dims - 2))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-split pairs, of a head's first 2 * cos.size(-1) dimensions.

    x [B, T, H, D]; the other dimensions pass.
    """
    cos = cos.to(x.dtype)
    sin = sin.to(x.dtype)
    half = cos.size(-1)
    a, b, rest = x.split((half, half, x.size(-1) - 2 * half), dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)  # [B, T, H, D]


class KVCache:
    """What one pass over a long sequence carries from piece to piece: attention with a window.

    A position sees the last `window` positions, itself included; given `bos`, only those of its
    document, as if that stood alone. However the sequence is cut, the outcome is that of one pass
    with this mask. Keys are kept unrotated and turned from each block's first key on, so that
    angles stay small.
    """

    def __init__(self, window: int, bos: int | None):
        self.window = window
        self.bos = bos
        self.carried: dict[Hashable, Tensor] = {}  # by what is carried; keys and values by step

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
        out = sdpa_attention(queries, rotate(keys, cos, sin), values, self.mask)
        return out.reshape(q.shape)


@dataclasses.dataclass(frozen=True)
class AttentionContext:
    """What attention needs beyond queries, keys and values; made outside the compiled graph."""

    backend: AttentionBackend  # causal attention over rows that stand alone
    cos: Tensor  # [L, 1, dims / 2], of the keys' positions
    sin: Tensor
    cache: KVCache | None = None  # rows continue what it has seen; its window is the mask


def previous(x: Tensor, cache: KVCache | None, key: str) -> Tensor:
    """[B, T, ...] one position later; zeros stand before the start of a sequence."""
    if cache is None:
        return F.pad(x, (0, 0) * (x.ndim - 2) + (1, -1))
    starts = cache.starts.view(*cache.starts.shape, *[1] * (x.ndim - 2))
    return cache.extend(key, x, 1).narrow(1, 0, x.size(1)).masked_fill(starts, 0)


# --- layers ---------------------------------------------------------------------------------------


def row_scales(w: Tensor, qmax: int, floor: bool) -> Tensor:
    """Quantization step of every row for whole numbers up to qmax: [R, C] -> [R, 1]."""
    least = 1 / qmax if floor else 1e-12
    return (w.detach().abs().amax(1, keepdim=True) / qmax).clamp(min=least)


class Linear(nn.Module):
    """A matrix, kept in float32 and cast to the input's type at use.

    fake_qmax, if not 0: fake quantization to whole numbers up to it, through which the gradient
    passes straight; switching it makes a second compiled graph. adapter, if any: two thin matrices
    for each row of the batch, [B, R, I] and [B, O, R], whose product is added.
    """

    def __init__(self, inputs: int, outputs: int, init: Init = uniform_fan_in):
        super().__init__()
        self.weight = param(outputs, inputs, init=init)
        self.fake_qmax = 0
        self.fake_floor = False
        self.adapter: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        if self.fake_qmax:
            scale = row_scales(w, self.fake_qmax, self.fake_floor)
            w = w + ((w / scale).round() * scale - w).detach()
        out = F.linear(x, w.to(x.dtype))
        if self.adapter is not None:
            low, high = (part.to(x.dtype).mT for part in self.adapter)
            out = out + x @ low @ high
        return out


class BigramHash(nn.Module):
    """An embedding of the hashed pair (previous token, token), added to the token's own.

    xor (PR 489, PR 859): the last row is kept for position 0, and the branch has a learned scale.
    linear (PR 740): token 0 stands before position 0, no scale. A zero table needs a projection
    that is not zero; BIGRAM_INIT=dead has both at zero and never trains (PR 489).
    """

    def __init__(self, cfg: Config):
        super().__init__()
        self.rows = cfg.bigram_vocab_size
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
        if cache is None:
            starts = torch.arange(ids.size(1), device=ids.device) == 0
        else:
            starts = cache.starts
        return torch.where(starts, self.rows - 1, pairs)

    def forward(self, ids: Tensor, dtype: torch.dtype, cache: KVCache | None = None) -> Tensor:
        out = self.proj(self.embed(self.rows_of(ids, cache)).to(dtype))  # [B, T, D]
        return out if self.scale is None else out * self.scale.to(dtype)


class SmearGate(nn.Module):
    """out_t = (1 - g) x_t + g x_{t-1}, g = sigmoid(gate) per dimension; can stop at a BOS."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.bos = cfg.bos_id if cfg.smear_bos_mask else None
        self.gate = param(cfg.model_dim, init=zeros)

    def forward(self, x: Tensor, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        gate = torch.sigmoid(self.gate.to(x.dtype))
        if self.bos is not None:
            gate = gate * (ids != self.bos).unsqueeze(-1).to(x.dtype)
        return torch.lerp(x, previous(x, cache, "smear"), gate.expand_as(x))


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

    def forward(
        self, x: Tensor, value_embedding: Tensor | None, step: int, context: AttentionContext
    ) -> Tensor:
        """x [B, T, D], value_embedding [B, T, K * D]; step: number of the executed layer."""
        B, T, D = x.shape
        v = self.c_v(x)
        if value_embedding is not None:
            v = v + value_embedding
        q = norm(self.c_q(x).view(B, T, self.heads, -1))  # [B, T, H, D]
        k = norm(self.c_k(x).view(B, T, self.kv_heads, -1))  # [B, T, K, D]
        v = v.view(B, T, self.kv_heads, -1)
        gain = self.q_gain.to(x.dtype).unsqueeze(-1)
        cos, sin = context.cos, context.sin
        if context.cache is None:
            out = context.backend(rotate(q, cos, sin) * gain, rotate(k, cos, sin), v)
        else:
            out = context.cache.attend(step, q, k, v, gain, cos, sin)
        if self.xsa:
            own = F.normalize(v, dim=-1).unsqueeze(3)  # [B, T, K, 1, D]
            out = out.reshape(B, T, self.kv_heads, -1, out.size(-1))  # [B, T, K, H / K, D]
            out = out - (out * own).sum(-1, keepdim=True) * own
        return self.proj(out.reshape(B, T, D))


class MLP(nn.Module):
    """Squared leaky ReLU between two matrices."""

    def __init__(self, cfg: Config):
        super().__init__()
        hidden = int(cfg.mlp_mult * cfg.model_dim)
        self.fc = Linear(cfg.model_dim, hidden, matrix_init(cfg))
        self.proj = Linear(hidden, cfg.model_dim, zeros)
        self.slope = cfg.leaky_slope

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.leaky_relu(self.fc(x), self.slope).square())


class Block(nn.Module):
    """Mix in the embedding stream, then attention, then MLP, each with learned weights."""

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
        context: AttentionContext,
    ) -> Tensor:
        """x, x0 [B, T, D]: the stream now, and as it entered the first block."""
        if self.resid_mix is not None:
            keep, blend = self.resid_mix.to(x.dtype).unbind()
            x = keep * x + blend * x0
        attended = self.attn(norm(x, self.ln_scale), value_embedding, step, context)
        x = x + self.attn_scale.to(x.dtype) * attended
        return x + self.mlp_scale.to(x.dtype) * self.mlp(norm(x, self.ln_scale))


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
    experts = torch.cat((p.unsqueeze(-1), ratios), -1)
    return floor * p + (1 - floor) * (weights * experts).sum(-1)


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

# Matrices by shape that are gains by role: trained by Adam, kept in float32.
CONTROL_NAMES = ("resid_mix", "skip_weights")


@dataclasses.dataclass(frozen=True)
class LayerStep:
    """One executed layer of the forward pass."""

    block: int
    push: bool = False  # its output is kept for a skip
    pop: int | None = None  # row of skip_weights: the last kept output is added before it
    value_embedding: int | None = None  # place in ve_layer_scales: it gets the value embedding


def layer_steps(cfg: Config) -> list[LayerStep]:
    """What the forward pass executes. U-Net skips: the first half pushes, the second pops."""
    steps = []
    skips = cfg.num_layers // 2 if cfg.unet_skips else 0
    for layer in range(cfg.num_layers):
        place = layer - cfg.num_layers // 2  # in the second half
        pop = place if 0 <= place < skips else None
        scale = cfg.ve_layers.index(layer) if layer in cfg.ve_layers else None
        steps.append(LayerStep(layer, push=layer < skips, pop=pop, value_embedding=scale))
    return steps


class GPT(nn.Module):
    """The model. Parameters are float32; dtype is the type of the stream, backend its attention."""

    def __init__(
        self,
        cfg: Config,
        dtype: torch.dtype = torch.float32,
        backend: AttentionBackend = sdpa_attention,
    ):
        super().__init__()
        self.cfg = cfg
        self.dtype = dtype
        self.backend = backend
        std = cfg.tied_embed_init_std if cfg.tie_embeddings else 1.0
        self.tok_emb = embedding(cfg.vocab_size, cfg.model_dim, normal(std))
        self.lm_head = None
        if not cfg.tie_embeddings:
            self.lm_head = Linear(cfg.model_dim, cfg.vocab_size, zeros)
        self.bigram = BigramHash(cfg) if cfg.bigram_vocab_size else None
        self.smear = SmearGate(cfg) if cfg.smear else None
        self.ve_shared = None
        self.ve_layer_scales = None
        if cfg.ve_layers:
            self.ve_shared = ValueEmbedding(cfg)
            scales = [param(init=constant(1.0)) for _ in cfg.ve_layers]
            self.ve_layer_scales = nn.ParameterList(scales)
        self.alpha_head = MixerHead(cfg) if cfg.mixer_head else None
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.num_layers))
        self.steps = layer_steps(cfg)
        pops = sum(step.pop is not None for step in self.steps)
        self.skip_weights = param(pops, cfg.model_dim, init=constant(1.0)) if pops else None
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

    def context(self, ids: Tensor, cache: KVCache | None = None) -> AttentionContext:
        """What attention needs for these inputs [B, T]; cache: they continue what it has seen."""
        cfg = self.cfg
        length = span = ids.size(1)
        if cache is not None:
            cache.begin(ids)
            length = cache.window - 1 + cache.block  # keys of a block
            span = cache.window
        dims = cfg.rope_dims or cfg.head_dim
        base = stretched_base(cfg.rope_base, dims, span, cfg.rope_train_seq_len)
        cos, sin = rotary_tables(length, dims, base, ids.device)
        return AttentionContext(self.backend, cos, sin, cache)

    def hidden(self, ids: Tensor, context: AttentionContext | None = None) -> Tensor:
        """ids [B, T] -> the stream after the final norm [B, T, D]."""
        context = context or self.context(ids)
        x = self.tok_emb(ids).to(self.dtype)
        if self.bigram is not None:
            x = x + self.bigram(ids, self.dtype, context.cache)
        if self.smear is None:
            x = norm(x)
        elif self.cfg.smear_before_norm:
            x = norm(self.smear(x, ids, context.cache))
        else:
            x = self.smear(norm(x), ids, context.cache)

        x0 = x  # the stream as it enters the first block
        kept = []  # outputs that wait for their skip
        if self.ve_shared is not None:
            values = self.ve_shared(ids, self.dtype)
        if self.skip_weights is not None:
            skip_weights = self.skip_weights.to(self.dtype).unbind()
        for number, step in enumerate(self.steps):
            if step.pop is not None:
                x = x + skip_weights[step.pop] * kept.pop()
            value_embedding = None
            if step.value_embedding is not None:
                scale = self.ve_layer_scales[step.value_embedding]
                value_embedding = values * scale.to(self.dtype)
            x = self.blocks[step.block](x, x0, value_embedding, number, context)
            if step.push:
                kept.append(x)
        return norm(x)

    def head(self, hidden: Tensor) -> Tensor:
        """[..., D] -> logits [..., V], float32, softcapped."""
        weight = self.tok_emb.weight if self.lm_head is None else self.lm_head.weight
        logits = F.linear(hidden, weight.to(hidden.dtype)).float()
        cap = self.cfg.logit_softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    def logits(self, ids: Tensor, context: AttentionContext | None = None) -> Tensor:
        """ids [B, T] -> [B, T, V], float32, softcapped."""
        return self.head(self.hidden(ids, context))

    def forward(
        self,
        ids: Tensor,
        targets: Tensor,
        ratios: Tensor | None = None,
        context: AttentionContext | None = None,
    ) -> Tensor:
        """ids, targets [B, T] -> mean nats per target; ratios [B, T, K] add the mixture's loss."""
        hidden = self.hidden(ids, context)
        logits = self.head(hidden).flatten(0, 1)  # [B * T, V]
        nats = F.cross_entropy(logits, targets.flatten(), reduction="none")
        if ratios is None:
            return nats.mean()
        gate = self.alpha_head(hidden).flatten(0, 1)
        p = mix(gate, (-nats).exp(), ratios.flatten(0, 1))
        return nats.mean() - MIXER_LOSS_WEIGHT * p.clamp(min=1e-12).log().mean()


def training_flops(cfg: Config, model: GPT) -> float:
    """FLOPs of a trained token: 6 per multiply-accumulate parameter, causal half of attention."""
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, Linear))
    if cfg.tie_embeddings:
        matrices += cfg.vocab_size * cfg.model_dim  # the output matrix
    return 6.0 * matrices + 6.0 * cfg.num_layers * cfg.train_seq_len * cfg.model_dim


def build_model(cfg: Config, rt: Runtime, weights: Mapping[str, Tensor] | None = None) -> GPT:
    """The model on its device, at its start or with weights; InputError if these do not fit."""
    with torch.device(
        "cpu" if weights is None else "meta"
    ):  # meta: allocates nothing, whatever shapes an artifact claims
        model = GPT(cfg, rt.profile.dtype, rt.attention)
    if weights is not None:
        with input_error_from("artifact: its tensors do not fit its settings", RuntimeError):
            model.load_state_dict(weights, strict=True, assign=True)
    return model.to(rt.device)


# ==================================================================================================
# 6. OPTIMIZER - Muon, which parameter goes where, schedules, averages of the weights.
#    Uses sections 1-2 and the names of section 5.
# ==================================================================================================


def newton_schulz(matrices: Tensor, steps: int) -> Tensor:
    """Approximates the orthogonal factor of each matrix: [N, R, C] -> same shape.

    Singular values end between 0.7 and 1.2 (Jordan 2024): the quintic is steep at zero and hovers
    around one.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


def _on_one_process(function: Callable[[Tensor], Tensor], stack: Tensor) -> Tensor:
    return function(stack)


class Muon(torch.optim.Optimizer):
    """Momentum, then orthogonalised updates, for matrices [R, C] only (Jordan 2024).

    Matrices of equal shape are stacked; given a runtime, its processes share the stack.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float,
        backend_steps: int = 5,
        weight_decay: float = 0.0,
        runtime: Runtime | None = None,
    ):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "backend_steps": backend_steps})
        self.map_shares = runtime.map_shares if runtime else _on_one_process
        self.newton_schulz = runtime.compile(newton_schulz) if runtime else newton_schulz

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            orthogonalize = functools.partial(self.newton_schulz, steps=group["backend_steps"])
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
                stack = self.map_shares(orthogonalize, torch.stack(updates))
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
    takes: Callable[[str, Tensor, Config], bool]  # whether a parameter, by name, belongs here


def _is_head(name: str, p: Tensor, cfg: Config) -> bool:
    return name == "lm_head.weight"


def _is_untied_embedding(name: str, p: Tensor, cfg: Config) -> bool:
    return name == "tok_emb.weight" and not cfg.tie_embeddings


def _is_table(name: str, p: Tensor, cfg: Config) -> bool:
    return name.endswith(("tok_emb.weight", ".embed.weight"))


def _is_scalar(name: str, p: Tensor, cfg: Config) -> bool:
    return p.ndim < 2 or name.endswith((*CONTROL_NAMES, "alpha_head.weight"))


def _is_matrix(name: str, p: Tensor, cfg: Config) -> bool:
    return p.ndim == 2


# The first group that takes a parameter has it.
PARAM_GROUPS = {
    "head": ParamGroup("adam", "head_lr", "embed_wd", _is_head),
    "embed": ParamGroup("adam", "embed_lr", "embed_wd", _is_untied_embedding),
    "tables": ParamGroup("adam", "tied_embed_lr", "embed_wd", _is_table),
    "scalars": ParamGroup("adam", "scalar_lr", "adam_wd", _is_scalar),
    "matrices": ParamGroup("muon", "matrix_lr", "muon_wd", _is_matrix),
}


def group_of(name: str, p: Tensor, cfg: Config) -> str:
    """The group of a parameter; ValueError if none takes it."""
    if cfg.bigram_optim and name.startswith("bigram.") and p.ndim == 2:
        return cfg.bigram_optim
    for group, rule in PARAM_GROUPS.items():
        if rule.takes(name, p, cfg):
            return group
    problem = f"no optimizer group takes {name} {tuple(p.shape)}"
    raise ValueError(f"{problem}; add a rule to PARAM_GROUPS")


def parameter_groups(model: nn.Module, cfg: Config) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Group name -> (name, parameter) pairs; every parameter of the model is in one of them."""
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {group: [] for group in PARAM_GROUPS}
    for name, p in model.named_parameters():
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
        groups["muon"], cfg.matrix_lr, cfg.muon_momentum, cfg.muon_backend_steps, runtime=rt
    )
    adam = torch.optim.AdamW(
        groups["adam"],
        betas=(cfg.beta1, cfg.beta2),
        eps=cfg.adam_eps,
        fused=rt.device.type != "mps",
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


def warmdown(cfg: Config, step: int, steps_left: float) -> float:
    """Factor of every learning rate: 1, then straight to 0 over the last WARMDOWN_ITERS steps."""
    if not cfg.warmdown_iters:
        return 1.0
    return min(1.0, max(steps_left, 0.0) / cfg.warmdown_iters)


def momentum_warmup(cfg: Config, step: int, steps_left: float) -> float:
    """Muon's momentum: straight from its start value to MUON_MOMENTUM."""
    share = 1.0
    if cfg.muon_momentum_warmup_steps:
        share = min(step / cfg.muon_momentum_warmup_steps, 1.0)
    return (1 - share) * cfg.muon_momentum_warmup_start + share * cfg.muon_momentum


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A field of the optimizers' parameter groups that changes during the run."""

    field: str
    value: Callable[[Config, int, float], float]  # of settings, steps done, steps left
    factor_of: str = ""  # the group's field that the value multiplies; empty = the value itself


SCHEDULES = (
    Schedule("lr", warmdown, factor_of="base_lr"),
    Schedule("momentum", momentum_warmup),
)


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


def gptq(
    w: Tensor, scale: Tensor, hessian: Tensor, qmax: int, damp: float, block: int = 128
) -> Tensor:
    """Whole numbers for w [R, C] at row steps scale [R, 1] with a small error in w @ x -> [R, C].

    hessian [C, C]: mean of x x^T. Columns are rounded by falling diagonal, and later ones make up
    for the error of earlier ones; a column that is never used becomes 0 (GPTQ, 2210.17323).
    """
    hessian = hessian.double().clone()
    w = w.double().clone()
    scale = scale.double()
    unused = hessian.diagonal() == 0
    w[:, unused] = 0
    hessian.diagonal()[unused] = 1
    order = hessian.diagonal().argsort(descending=True, stable=True)
    w = w[:, order]
    hessian = hessian[order][:, order]
    hessian.diagonal().add_(damp * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    inverse = torch.linalg.cholesky(inverse, upper=True)
    q = torch.empty_like(w)
    for lo in range(0, w.size(1), block):
        hi = min(lo + block, w.size(1))
        errors = torch.empty(w.size(0), hi - lo, dtype=torch.float64)
        for j in range(lo, hi):
            q[:, j] = (w[:, j] / scale[:, 0]).round().clamp(-qmax, qmax)
            error = (w[:, j] - q[:, j] * scale[:, 0]) / inverse[j, j]
            w[:, j:hi] -= error[:, None] * inverse[j, j:hi]
            errors[:, j - lo] = error
        w[:, hi:] -= errors @ inverse[lo:hi, hi:]
    return q[:, order.argsort()]


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


class RowInt:
    """Whole numbers of a few bits, one float16 scale a row.

    Each row is clipped at that of the tried levels that has the least error.
    """

    def __init__(self, bits: int):
        self.qmax = 2 ** (bits - 1) - 1

    def layout(self, shape: Sequence[int]) -> tuple[Part, ...]:
        """The arrays that fit gives for a matrix [R, C]."""
        rows, columns = shape
        return Part("codes", "|i1", (rows, columns)), Part("scales", "<f2", (rows, 1))

    def fit(self, w: Tensor, cfg: Config, hessian: Tensor | None = None) -> tuple[Tensor, ...]:
        """w [R, C] -> q int8 [R, C], scales float16 [R, 1].

        hessian [C, C]: its diagonal weighs the clip search, then GPTQ rounds; None: plain rounding.
        """
        if cfg.prune_pct:
            smallest = float(np.quantile(w.abs().numpy(), cfg.prune_pct))
            w = w * (w.abs() >= smallest)
        weights = 1 if hessian is None else hessian.diagonal()
        least = 1 / self.qmax if cfg.quant_scale_floor else 2.0**-24
        q = torch.zeros_like(w)
        scales = torch.zeros(w.size(0), 1)
        best = torch.full((w.size(0), 1), math.inf)
        for step in range(cfg.quant_clip_steps):
            shrink = (
                1 - 0.6 * step / cfg.quant_clip_steps
            )  # from the row's maximum down to 40 % of it
            scale = row_scales(w, self.qmax, False) * shrink
            scale = scale.clamp(least, 65504.0).half().float()
            rounded = (w / scale).round().clamp(-self.qmax, self.qmax)
            error = ((rounded * scale - w).square() * weights).sum(1, keepdim=True)
            better = error < best
            best = torch.where(better, error, best)
            scales = torch.where(better, scale, scales)
            q = torch.where(better, rounded, q)
        if hessian is not None:
            q = gptq(w, scales, hessian, self.qmax, cfg.gptq_damp)
            q = q * (w != 0)  # what is pruned stays so
        return q.to(torch.int8), scales.half()

    def decode(self, q: Tensor, scales: Tensor) -> Tensor:
        """The weights [R, C], float32."""
        return q.float() * scales.float()


class AsFloat:
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


QUANTIZERS: dict[str, RowInt | AsFloat] = {
    "f16": AsFloat("<f2", torch.float16),
    "f32": AsFloat("<f4", torch.float32),
    **{f"int{bits}": RowInt(bits) for bits in range(2, 9)},
}


def tensor_role(name: str) -> str:
    """embed, table, attn, mlp or other: what QUANT_POLICY speaks of."""
    marks = {"tok_emb": "embed", "lm_head": "embed", ".embed.": "table"}
    marks |= {".attn.": "attn", ".mlp.": "mlp"}
    for mark, role in marks.items():
        if mark in name:
            return role
    return "other"


def quantizer_of(name: str, w: Tensor, cfg: Config) -> str:
    """The quantizer of a tensor: gains float32, small matrices float16, the rest by the policy."""
    if w.ndim != 2 or name.endswith(CONTROL_NAMES):
        return "f32"
    if w.numel() <= cfg.keep_float_max_numel:
        return "f16" if w.abs().max() < 65504 else "f32"
    bits_of_role = dict(re.findall(r"(\w+):(\d)", cfg.quant_policy))
    return f"int{bits_of_role.get(tensor_role(name), cfg.quant_bits)}"


@dataclasses.dataclass(frozen=True)
class QuantizedMatrix:
    """A Linear of the model that packing will turn into whole numbers up to qmax."""

    linear: Linear
    qmax: int


def quantized_matrices(model: GPT, cfg: Config) -> list[QuantizedMatrix]:
    """What late fake quantization and the quantization penalty act on."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            quantizer = QUANTIZERS[quantizer_of(f"{name}.weight", module.weight, cfg)]
            if isinstance(quantizer, RowInt):
                found.append(QuantizedMatrix(module, quantizer.qmax))
    return found


def quantization_penalty(matrices: Sequence[QuantizedMatrix], cfg: Config) -> Tensor:
    """CROWN-Q (PR 859): lambda / 12 times the sum of mean(w^2 step^2), the steps held fixed."""
    parts = []
    for matrix in matrices:
        w = matrix.linear.weight
        parts.append((w * row_scales(w, matrix.qmax, False)).square().mean())
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
        self.drives = cfg.schedule == "clock" and cfg.max_wallclock_seconds > 0
        self.limit = cfg.max_wallclock_seconds - cfg.gptq_reserve_seconds
        self.origin = now()
        self.before_first_step = 0.0  # seconds that no step took, so that they tell no pace
        self.durations: deque[float] = deque(maxlen=32)
        self.last = StepReport()

    def start(self) -> None:
        """The clock runs; a resumed run's goes on where it was."""
        self.origin = self.now() - self.last.elapsed

    def elapsed(self) -> float:
        """Training seconds so far."""
        return self.now() - self.origin

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock for something that touches no training data."""
        begin = self.now()
        yield
        self.origin += self.now() - begin

    def take(self, report: StepReport) -> None:
        """Learns how long a step took."""
        self.durations.append(report.elapsed - self.last.elapsed)
        self.last = report

    def steps_left(self, step: int) -> float:
        """Steps until the end, from what all processes know."""
        by_count = self.cfg.iterations - step
        if not self.drives:
            return by_count
        last = self.last
        pace = max(last.elapsed - self.before_first_step, 0.0) / max(last.step, 1)
        pace = pace or 1e-9  # unknown yet: full speed
        return min(by_count, (self.limit - last.elapsed) / pace - (step - last.step))

    def out_of_time(self) -> bool:
        """Whether one more step could end after the limit.

        Counted are the steps in flight at the last report, those since then, and the next.
        """
        if not self.drives or not self.durations:
            return False
        steps = 2 * self.lag + 1
        needed = 1.1 * max(self.durations) * steps  # a tenth more than the slowest of late
        return self.last.elapsed + needed > self.limit

    def progress(self, step: int) -> float:
        """Share of the run that is over."""
        return self.last.elapsed / self.limit if self.drives else step / self.cfg.iterations


class Requests:
    """What the process is asked for by signals: SIGTERM to save and stop, SIGUSR1 to save."""

    def __init__(self) -> None:
        self.stop = False
        self.save = False

    def _on_signal(self, number: int, frame: Any) -> None:
        self.stop |= number == signal.SIGTERM
        self.save = True

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Listens inside the block."""
        names = [name for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]
        numbers = [getattr(signal, name) for name in names]
        before = [signal.signal(number, self._on_signal) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before):
                signal.signal(number, handler)


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
        row = torch.empty(1, cfg.train_seq_len, dtype=torch.int64, device=rt.device)
        self.context = model.context(row)
        self.gradients = bind_flat_gradients(list(model.parameters()))
        self.optimizers = build_optimizers(model, cfg, rt)
        self.quantized = quantized_matrices(model, cfg)
        self.averager = WeightAverager(model, cfg) if cfg.ema_decay or cfg.swa_every else None
        self.ngram_table = FrozenNgramTable(cfg, rt.device) if cfg.mixer_head else None
        self.steps_done = 0
        self.seconds = 0.0  # that training took
        self.faking = False  # fake quantization is on
        # Steps whose report is not read yet.
        self.in_flight: deque[tuple[int, PendingSum]] = deque()
        self.micro_batches = cfg.micro_batches  # of a step, over all processes
        self.share = range(rt.rank, self.micro_batches, rt.world)  # this process's

    def step(
        self, batch_of: Callable[[int], tuple[np.ndarray, np.ndarray]], steps_left: float
    ) -> Tensor:
        """One optimizer step -> this process's part of the mean loss, which waits on the device.

        batch_of(n): ids and targets [B, T] of micro-batch n, counted over steps and processes.
        """
        cfg, rt = self.cfg, self.rt
        values = {s.field: s.value(cfg, self.steps_done, steps_left) for s in SCHEDULES}
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group in groups:
            for schedule in SCHEDULES:
                if schedule.field in group:
                    factor = group[schedule.factor_of] if schedule.factor_of else 1.0
                    group[schedule.field] = factor * values[schedule.field]

        rate = values["lr"]  # factor of the learning rates
        if self.clock.drives and self.steps_done < TRUSTED_PACE_STEPS:
            rate = 1.0
        if rate < cfg.late_qat_threshold and not self.faking:
            matrices = f"matrices:{len(self.quantized)}"
            self.log.log(f"late_qat:enabled step:{self.steps_done} {matrices}")
            self.fake_quantization(True)

        self.gradients.zero_()
        total = torch.zeros((), device=rt.device)
        for micro in self.share:
            ids, targets = batch_of(self.steps_done * self.micro_batches + micro)
            ids = rt.put(ids)
            targets = rt.put(targets)
            ratios = self.ngram_table.ratios(ids, targets) if self.ngram_table else None
            loss = self.compiled_model(ids, targets, ratios, self.context) / self.micro_batches
            loss.backward()
            total += loss.detach()
        if cfg.crown_q_lambda and self.quantized and rate < 0.5 and rt.main:  # once, not by all
            penalty = quantization_penalty(self.quantized, cfg)
            penalty.backward()
            total += penalty.detach()

        rt.sum_(self.gradients)
        if cfg.grad_clip_norm:
            clip_gradients(self.gradients, cfg.grad_clip_norm)
        for optimizer in self.optimizers:
            optimizer.step()
        return total

    def fake_quantization(self, on: bool) -> None:
        """Fake quantization on or off, of the matrices that will be packed as whole numbers."""
        self.faking = on
        for matrix in self.quantized:
            matrix.linear.fake_qmax = matrix.qmax if on else 0
            matrix.linear.fake_floor = self.cfg.quant_scale_floor

    def send_report(self, loss: Tensor) -> None:
        """Starts the sum over processes of what the last step has to tell."""
        elapsed = self.clock.elapsed() if self.rt.main else 0.0
        values = [elapsed, loss, self.requests.stop, self.requests.save]
        self.requests.save = False
        self.in_flight.append((self.steps_done, self.rt.start_sum(values)))

    def read_reports(self, lag: int) -> StepReport:
        """Takes in and logs the reports of all steps but the last `lag` -> the latest report."""
        while self.in_flight and self.in_flight[0][0] <= self.steps_done - lag:
            step, pending = self.in_flight.popleft()
            elapsed, loss, stop, save = pending.result()  # sums: one NaN or infinity shows
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
            self._log_step(report)
        return self.clock.last

    def _log_step(self, report: StepReport) -> None:
        step, milliseconds = report.step, report.elapsed * 1000
        every = self.cfg.train_log_every
        if (every and (step <= 10 or step % every == 0)) or report.diverged:
            took = f"train_time:{milliseconds:.0f}ms step_avg:{milliseconds / step:.2f}ms"
            self.log.log(f"step:{step}/{self.cfg.iterations} train_loss:{report.loss:.4f} {took}")
        elapsed = round(report.elapsed, 4)
        self.log.metric(step=step, train_loss=report.loss, train_seconds=elapsed)

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
        with self.clock.paused(), self.log.phase(phase):
            yield
            self.rt.sync()


def warm_up(trainer: Trainer) -> None:
    """WARMUP_STEPS steps on random tokens, so that all is compiled; then all state is as before."""
    cfg = trainer.cfg
    rng = np.random.default_rng(0)
    shape = (cfg.micro_tokens // cfg.train_seq_len, cfg.train_seq_len)

    def random_batch(unit: int) -> tuple[np.ndarray, np.ndarray]:
        ids = rng.integers(0, cfg.vocab_size, shape)
        return ids, ids

    weights = copy.deepcopy(trainer.model.state_dict())
    for index in range(cfg.warmup_steps):
        last = index == cfg.warmup_steps - 1
        trainer.fake_quantization(cfg.late_qat_threshold > 0 and last)  # the other graph
        trainer.step(random_batch, cfg.iterations)
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
    clock.before_first_step = elapsed - clock.last.elapsed
    clock.last = dataclasses.replace(clock.last, elapsed=elapsed)
    took = f"{clock.before_first_step * 1000:.0f} ms (counted)"
    trainer.log.log(f"prefilled {stream.total} tokens in {took}")


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
        trainer.rt.sync()
        trainer.seconds = clock.elapsed()
    steps = f"step:{trainer.steps_done}/{trainer.cfg.iterations}"
    log.log(f"training {status}: {steps} train_time:{trainer.seconds * 1000:.0f}ms")
    return status


def training_loop(trainer: Trainer, validate: Callable[[int], None]) -> str:
    """Step after step until the end -> why it ended."""
    cfg, clock, averager = trainer.cfg, trainer.clock, trainer.averager
    while True:
        status = trainer.reason_to_stop()
        if status and trainer.read_reports(lag=0).diverged:  # as reports still in flight may say
            return "diverged"
        validate_now = cfg.val_loss_every and trainer.steps_done % cfg.val_loss_every == 0
        if validate_now or (cfg.val_loss_every and status):
            with trainer.off_the_clock("validate"):
                validate(trainer.steps_done)
        if status:
            return status

        loss = trainer.step(trainer.stream.batch, clock.steps_left(trainer.steps_done))
        trainer.steps_done += 1
        if averager:
            averager.update(trainer.steps_done, clock.progress(trainer.steps_done))

        trainer.send_report(loss)
        report = trainer.read_reports(clock.lag)
        if report.diverged:
            return "diverged"
        save_now = cfg.save_every and trainer.steps_done % cfg.save_every == 0
        if save_now or report.save or report.stop:
            with trainer.off_the_clock("checkpoint"):
                save_checkpoint(trainer)
            clock.last = dataclasses.replace(report, save=False)
        if report.stop:
            return "interrupted"


# --- checkpoints ----------------------------------------------------------------------------------


def save_checkpoint(trainer: Trainer) -> None:
    """checkpoint.pt in OUT_DIR: all that the next step depends on."""
    path = trainer.log.out_dir / "checkpoint.pt"
    averager = trainer.averager
    if trainer.rt.main:
        state = {
            "settings": trainer.cfg.group("model", "train", "optim"),
            "model": trainer.model.state_dict(),
            "averages": averager and (averager.means, averager.swa_count),
            "step": trainer.steps_done,
            "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
            "elapsed": trainer.clock.elapsed(),
        }
        save_torch(path, state)
    trainer.log.log(f"checkpoint: {path} at step {trainer.steps_done}")


def load_checkpoint(trainer: Trainer, path: Path) -> None:
    """Continues from a checkpoint; InputError if it is none or belongs to another model."""
    with input_error_from(f"RESUME={path}: cannot be read", Exception):  # torch has many types
        state = torch.load(path, map_location="cpu", weights_only=True)
    with input_error_from(f"RESUME={path}: unusable", Exception):
        changed = _restore(trainer, state)
    changes = f"changed settings: {', '.join(changed) or 'none'}"
    seconds = f"train_time:{trainer.clock.last.elapsed * 1000:.0f}ms"
    trainer.log.log(f"resumed:{path} step:{trainer.steps_done} {seconds} {changes}")


def _restore(trainer: Trainer, state: dict[str, Any]) -> list[str]:
    """Takes over a checkpoint's state -> the settings that have changed since."""
    settings = trainer.cfg.group("model", "train", "optim")
    changed = [name for name, value in settings.items() if state["settings"][name] != value]
    changed = sorted(name.upper() for name in changed)
    wrong = [name for name in changed if FIELDS[name].metadata["group"] == "model"]
    check(not wrong, f"made with other values of {', '.join(wrong)}")
    trainer.model.load_state_dict(state["model"])
    for optimizer, stored in zip(trainer.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(stored)
    if trainer.averager:
        means, trainer.averager.swa_count = state["averages"]
        device = trainer.rt.device
        trainer.averager.means = {name: [w.to(device) for w in means[name]] for name in means}
    trainer.steps_done = state["step"]
    trainer.clock.last = StepReport(state["step"], state["elapsed"])
    return changed


# --- calibration ----------------------------------------------------------------------------------


@torch.no_grad()
def collect_hessians(
    model: GPT, cfg: Config, rt: Runtime, stream: TokenStream
) -> dict[str, Tensor]:
    """Mean of x x^T at the input of every Linear that `hidden` calls: name -> [C, C].

    Over GPTQ_N_SAMPLES training sequences.
    """
    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, Linear)]
    names = {module: f"{name}.weight" for name, module in linears}
    sums: dict[str, Tensor] = {}

    def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].flatten(0, -2).float()
        sums[names[module]] = sums.get(names[module], 0) + x.T @ x

    hooks = [module.register_forward_pre_hook(add) for module in names]
    length = cfg.train_seq_len
    samples = -(-cfg.gptq_n_samples // rt.world) * rt.world  # all processes take as many
    for number in range(rt.rank, samples, rt.world):
        model.hidden(rt.put(stream.take(number * length, length)[None]))
    for hook in hooks:
        hook.remove()
    return {name: (rt.sum_(total) / (samples * length)).cpu() for name, total in sums.items()}


# ==================================================================================================
# 9. ARTIFACT - a state dict as one self-describing file, and back.
#    Uses sections 1, 4, 5 and 7.
# ==================================================================================================

# The file: prefix, header (compressed JSON), payload. The payload is what the codec makes of three
# streams, so that like lies next to like.
MAGIC = b"PGOLF\r\n\x1a"
FORMAT_VERSION = 1
PREFIX = struct.Struct("<8sHIQ32s")  # magic, version, header and payload bytes, their SHA-256
STREAMS = ("codes", "scales", "floats")


@dataclasses.dataclass(frozen=True)
class EntropyCoder:
    """A codec: bytes to fewer bytes, and back to a known size.

    expand must never produce more than size + 1 bytes. Quantized weights are one byte each: packed
    bits would hide the repetitions that a codec finds.
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


def _compress_zlib(data: bytes) -> bytes:
    return zlib.compress(data, 9)


def _expand_zlib(data: bytes, size: int) -> bytes:
    return _expand_stream(zlib.decompressobj(), data, size)


def _compress_lzma(data: bytes) -> bytes:
    return lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)


def _expand_lzma(data: bytes, size: int) -> bytes:
    return _expand_stream(lzma.LZMADecompressor(memlimit=1 << 28), data, size)


def _expand_stream(stream: Any, data: bytes, size: int) -> bytes:
    out = stream.decompress(data, size + 1)
    ended = stream.eof and not stream.unused_data
    check(ended, "the compressed stream does not end where it should")
    return out


CODERS = {
    "zstd": EntropyCoder(_compress_zstd, _expand_zstd),
    "zlib": EntropyCoder(_compress_zlib, _expand_zlib),
    "lzma": EntropyCoder(_compress_lzma, _expand_lzma),
}
EXPAND_ERRORS = (zstandard.ZstdError, zlib.error, lzma.LZMAError, InputError)


def pack(
    state_dict: Mapping[str, Tensor],
    cfg: Config,
    hessians: Mapping[str, Tensor] | None = None,
    code_bytes: int = 0,
    notes: Mapping[str, Any] | None = None,
) -> bytes:
    """Weights and the settings that rebuild and score them as one file's bytes.

    hessians: name -> [C, C], mean of x x^T at a matrix's input (GPTQ). code_bytes, notes: recorded
    (JSON). InputError if a weight is not finite.
    """
    table = []
    streams = {stream: bytearray() for stream in STREAMS}
    for name, w in state_dict.items():
        w = w.detach().to("cpu", torch.float32).contiguous()
        check(w.isfinite().all(), f"{name}: has values that are not finite; nothing was packed")
        kind = quantizer_of(name, w, cfg)
        table.append([name, list(w.shape), kind])
        arrays = QUANTIZERS[kind].fit(w, cfg, (hessians or {}).get(name))
        for part, array in zip(QUANTIZERS[kind].layout(w.shape), arrays, strict=True):
            streams[part.stream] += array.contiguous().numpy().astype(part.dtype).tobytes()
    settings = cfg.group("model", "pack", "score")
    header = {
        "config": {**settings, "eval_seq_len": cfg.score_len},
        "tensors": table,
        "codec": cfg.compressor,
        "code_bytes": code_bytes,
        "notes": dict(notes or {}),
    }
    head = zlib.compress(json.dumps(header, separators=(",", ":")).encode(), 9)
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
    readable = stream.eof and isinstance(header, dict)
    check(readable, "artifact: unreadable header (no JSON object)")
    return header, blob[header_end:]


def config_from(stored: Any) -> Config:
    """The settings in an artifact's header, checked like any others."""
    defaults = {field.name: field.default for field in FIELDS.values()}
    known = isinstance(stored, dict) and stored.keys() <= defaults.keys()
    other_version = "its settings are not those of this program (made by another version?)"
    check(known, f"artifact: {other_version}")
    values = {}
    for name, value in stored.items():
        value = tuple(value) if isinstance(value, list) else value
        wanted = type(defaults[name])
        sound = type(value) is wanted or (wanted is float and type(value) is int)
        if isinstance(value, tuple):
            sound = sound and all(type(part) is int for part in value)
        check(sound, f"artifact: setting {name.upper()}={value!r} has the wrong type")
        values[name] = value
    problems = check_config(Config(**values))
    check(not problems, f"artifact: {'; '.join(problems)}")
    return Config(**values)


@dataclasses.dataclass(frozen=True)
class PackedTensor:
    """A tensor of an artifact, expanded and not yet decoded."""

    name: str
    shape: list[int]
    kind: str  # name of its quantizer
    arrays: tuple[np.ndarray, ...]  # as the quantizer's layout says


def _layouts(tensors: Any) -> list[tuple[Part, ...]]:
    """The arrays of every tensor that a header's table names; InputError if the table is absurd."""
    layouts = []
    unusable = (ValueError, TypeError, KeyError, AttributeError, IndexError)
    with input_error_from("artifact: bad tensor table", *unusable):
        for name, shape, kind in tensors:
            sizes_sound = all(type(n) is int and 0 < n < 2**31 for n in shape)
            is_matrix = len(shape) == 2 or not kind.startswith("int")
            sound = isinstance(name, str) and sizes_sound and is_matrix
            check(sound, f"{name} {shape} {kind}")
            layouts.append(QUANTIZERS[kind].layout(shape))
    return layouts


def expand(blob: bytes) -> tuple[dict[str, Any], list[PackedTensor]]:
    """An artifact's header and tensors; absurd claims allocate nothing."""
    header, payload = read_header(blob)
    layouts = _layouts(header.get("tensors"))
    sizes = dict.fromkeys(STREAMS, 0)
    for part in itertools.chain(*layouts):
        sizes[part.stream] += part.size
    total = sum(sizes.values())
    limit = (64 << 20) + 256 * len(payload)  # far above what any codec makes of weights
    claim = f"claims {total} bytes of weights in {len(payload)} bytes of payload"
    check(total <= limit, f"artifact: {claim}")
    codec = header.get("codec")
    known = isinstance(codec, str) and codec in CODERS
    check(known, f"artifact: codec {codec!r}; this program has {', '.join(CODERS)}")
    with input_error_from(f"artifact: the {codec} payload cannot be expanded", *EXPAND_ERRORS):
        raw = CODERS[codec].expand(payload, total)
    expands = f"the payload expands to {len(raw)} bytes, the tensors need {total}"
    check(len(raw) == total, f"artifact: {expands}")
    file = io.BytesIO(raw)
    streams = {stream: io.BytesIO(file.read(size)) for stream, size in sizes.items()}
    tensors = []
    for (name, shape, kind), layout in zip(header["tensors"], layouts):
        raw_parts = [streams[part.stream].read(part.size) for part in layout]
        arrays = [np.frombuffer(data, part.dtype) for data, part in zip(raw_parts, layout)]
        shaped = tuple(array.reshape(part.shape) for array, part in zip(arrays, layout))
        tensors.append(PackedTensor(name, shape, kind, shaped))
    return header, tensors


def unpack(blob: bytes) -> tuple[Config, dict[str, Tensor]]:
    """An artifact's settings and float weights; InputError if it is damaged or not this program's.

    Runs nothing that is in the file and allocates only what is there.
    """
    header, tensors = expand(blob)
    weights = {}
    for tensor in tensors:
        arrays = [torch.from_numpy(array.copy()) for array in tensor.arrays]
        w = QUANTIZERS[tensor.kind].decode(*arrays)
        check(w.isfinite().all(), f"artifact: {tensor.name} has values that are not finite")
        weights[tensor.name] = w
    return config_from(header.get("config")), weights


def entropy_bytes(tensor: PackedTensor) -> float:
    """What a coder that knows the frequencies of its symbols would need for a tensor's bytes."""
    data = b"".join(array.tobytes() for array in tensor.arrays)
    counts = np.unique(np.frombuffer(data, np.uint8), return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum() / 8)


def size_report(blob: bytes, code_bytes: int, cap: int) -> list[str]:
    """Log lines: bytes of code, model and both, the margin, the five largest tensors."""
    header, tensors = expand(blob)
    codec = header["codec"]
    total = len(blob) + code_bytes
    over = "" if total <= cap else " OVER THE CAP"
    lines = [
        f"Code size: {code_bytes} bytes",
        f"Serialized model {codec}: {len(blob)} bytes",
        f"Total submission size {codec}: {total} bytes",
        f"size_cap:{cap} margin:{cap - total} bytes{over}",
    ]
    rows = [(entropy_bytes(tensor), tensor.kind, tensor.name, tensor.shape) for tensor in tensors]
    for size, kind, name, shape in sorted(rows, reverse=True)[:5]:
        lines.append(f"  about {size:9.0f} bytes  {kind:5} {name} {shape}")
    return lines


def code_size() -> int:
    """Bytes of the script that runs and of a config.env beside it: a run needs both."""
    paths = (SCRIPT, SCRIPT.with_name("config.env"))
    return sum(path.stat().st_size for path in paths if path.is_file())


def read_artifact(cfg: Config) -> bytes:
    """The file that ARTIFACT names, else OUT_DIR's."""
    path = Path(cfg.artifact or Path(cfg.out_dir) / "model.ptz")
    with input_error_from(f"ARTIFACT={str(path)!r}: cannot be read", OSError):
        return path.read_bytes()


def load_artifact(cfg: Config, blob: bytes, rt: Runtime) -> GPT:
    """The model in an artifact, on its device; InputError if it had another tokenizer."""
    stored, weights = unpack(blob)
    model = build_model(stored, rt, weights)
    notes = read_header(blob)[0].get("notes")
    here = tokenizer_hash(cfg)
    made_with = notes.get("tokenizer", here) if isinstance(notes, dict) else here
    check(
        made_with == here,
        f"TOKENIZER_PATH={cfg.tokenizer_path!r}: the artifact was trained with another tokenizer "
        f"(sha256 {made_with!s:.16}, here {here:.16})",
    )
    return model


def settings_of_artifact(cfg: Config, env: Mapping[str, str]) -> Config:
    """For MODE=eval and sample: the artifact's settings, and what is set here otherwise."""
    header, _ = read_header(read_artifact(cfg))
    stored = config_from(header.get("config"))
    given, _ = read_settings(env)
    problems = []
    for name, value in stored.group("model").items():
        if name in given and given[name] != value:
            reason = f"the artifact was made with {value}"
            problems.append(f"{name.upper()}={given[name]}: {reason}")
    raise_if(problems)
    kept = {"out_dir": cfg.out_dir, "run_id": cfg.run_id}
    settings = {**stored.group("model", "pack", "score"), **given, **kept}
    merged = dataclasses.replace(cfg, **settings)
    raise_if(check_config(merged))
    return merged


# ==================================================================================================
# 10. SCORING - windows, n-gram counts, predictors, the score-first harness.
#     Uses sections 1-9.
# ==================================================================================================


# Work on the device: ids [B, T], zero-padded at the right; row b scores its last S inputs, whose targets
# [B, S] are number index [B, S] of the stream; the first valid[b] of them are real. left_context: the tokens before;
# slots: which adapters the rows have.
class Batch(
    namedtuple("Batch", "ids targets index valid left_context slots", defaults=(None, None))
):
    @property
    def real(self) -> np.ndarray:
        """Which of the targets are [B, S] bool."""
        return np.arange(self.targets.size(1)) < self.valid[:, None]


def make_batch(
    tokens: np.ndarray,
    starts: np.ndarray,
    length: int,
    index: np.ndarray,
    valid: np.ndarray,
    rt: Runtime,
    **rest: Any,
) -> Batch:
    """Rows of `length` inputs from `starts` [B] on, of which the targets `index` [B, S] are scored."""
    limit = len(tokens) - 1

    def pick(at: np.ndarray, end: int) -> Tensor:
        return rt.put(np.where(at < end, tokens[np.minimum(at, end - 1)], 0).astype(np.int64))

    return Batch(
        pick(starts[:, None] + np.arange(length), limit),
        pick(index + 1, limit + 1),
        np.minimum(index, limit - 1),
        valid,
        **rest,
    )


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
        return (start + self.seq_len - self.stride if k else 0), min(
            start + self.seq_len, self.targets
        )

    def of(self, target: Any) -> Any:
        """The window that scores a target, or each target of an array."""
        return np.maximum(0, -(-(target + 1 - self.seq_len) // self.stride))

    def units(self, batch: int, chunk: int = 0) -> Iterator[list[range]]:
        """Batches of windows of one shape, as lists per chunk of `chunk` targets (0 = one chunk)."""
        edges = [
            k
            for k in range(1, self.count if chunk else 1)
            if self.scored(k)[0] // chunk != self.scored(k - 1)[0] // chunk
        ]
        for lo, hi in itertools.pairwise([0, *edges, self.count]):
            first = [range(0, 1)] if lo == 0 and self.stride < self.seq_len else []
            yield first + [range(k, min(k + batch, hi)) for k in range(lo + len(first), hi, batch)]

    def samples(self, positions: int) -> tuple[Sequence[int], Sequence[int]]:
        """A unit early in the stream, and one spread over it with so many targets."""
        last, wanted = self.count - 1, -(-positions // self.stride)
        first = min(1, last)
        return [first], sorted({*np.linspace(first, last, wanted, dtype=int)}) if wanted > 1 else [
            last
        ]

    def span(self, units: Sequence[Sequence[int]]) -> tuple[int, int]:
        """First target of these units and the one after the last."""
        return self.scored(units[0][0])[0], self.scored(units[-1][-1])[1]

    def batch(
        self, tokens: np.ndarray, unit: Sequence[int], rows: int, rt: Runtime, left_context: int = 0
    ) -> Batch:
        """The unit's windows, the last repeated up to `rows`: all batches but the first have one shape."""
        rows = 1 if unit[0] == 0 and self.stride < self.seq_len else rows
        ks = np.array([unit[min(i, len(unit) - 1)] for i in range(rows)])
        lo, hi = np.array([self.scored(k) for k in ks]).T
        index = lo[:, None] + np.arange(self.stride if unit[0] else self.seq_len)  # [B, S]
        starts, valid = ks * self.stride, np.where(np.arange(rows) < len(unit), hi - lo, 0)
        return make_batch(
            tokens,
            starts,
            self.seq_len,
            index,
            valid,
            rt,
            left_context=tokens[max(0, starts[0] - left_context) : starts[0]],
        )


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
        for members in np.split(
            np.arange(len(self.starts)), range(self.slots, len(self.starts), self.slots)
        ):
            yield [
                (members[self.chunks[members] > c], c) for c in range(self.chunks[members].max())
            ]

    def samples(self, positions: int) -> tuple[tuple[np.ndarray, int], ...]:
        return (first := next(self.units(0)))[0], first[-1]

    def span(self, units: Sequence[tuple[np.ndarray, int]]) -> tuple[int, int]:
        return self.starts[units[0][0][0]], self.ends[units[0][0][-1]]

    def part(self, unit: tuple[np.ndarray, int], rank: int, world: int) -> tuple[np.ndarray, int]:
        """A process's documents of a unit: those of its slots."""
        return unit[0][unit[0] % self.slots % world == rank], unit[1]

    def batch(
        self,
        tokens: np.ndarray,
        unit: tuple[np.ndarray, int],
        rows: int,
        rt: Runtime,
        left_context: int = 0,
    ) -> Batch:
        members, c = unit
        starts, length = (
            self.starts[members] + c * self.chunk,
            min(self.seq_len, (c + 1) * self.chunk),
        )
        index, valid = starts[:, None] + np.arange(self.chunk), self.ends[members] - starts
        return make_batch(
            tokens,
            starts + self.chunk - length,
            length,
            index,
            valid.clip(max=self.chunk),
            rt,
            slots=members % self.slots,
        )


COUNT_PIECE = 1 << 18  # positions that are sorted at once, about


def _count_piece(
    tokens: np.ndarray,
    vocab: int,
    room: np.ndarray,
    order: int,
    out: list[np.ndarray],
    at: np.ndarray,
    first: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """One order of causal_counts, for positions `at` grouped by context, rising in a group; `first` of each.

    Fills the arrays of `out`; returns the next order's positions and which are first. Frees memory early.
    """
    place, bits = np.arange(len(at), dtype=np.int32), len(at).bit_length()
    heads = np.flatnonzero(first)
    sizes = np.diff(heads, append=len(at))
    start = np.repeat(heads.astype(np.int32), sizes)  # of the group
    check(
        int(start[-1]).bit_length() + vocab.bit_length() + bits < 64,
        f"{len(tokens)} tokens of a vocabulary of {vocab}: too many to count n-grams in 64-bit keys",
    )
    key = start.astype(np.int64)
    key *= vocab
    key += tokens[at]
    key <<= bits
    key |= place
    key.sort()  # by context, token, position
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
    again = ~(new & np.append(new[1:], True))  # pairs that occur elsewhere too
    nexts = at[by_key][again]
    nexts += 1
    whole, groups = room[nexts] >= order, np.cumsum(new, dtype=np.int32)[again]
    nexts, groups = nexts[whole], groups[whole]
    heads = np.ones(len(groups), bool)
    np.not_equal(groups[1:], groups[:-1], out=heads[1:])
    return nexts, heads


def causal_counts(
    tokens: np.ndarray, orders: Sequence[int], bos: int | None = None, hints: bool = False
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
    room = np.append(
        np.arange(size, dtype=np.int32), np.int32(-1)
    )  # length of the longest whole context
    if bos is not None:
        room[1:size] -= np.maximum.accumulate(np.where(tokens == bos, room[:-1], np.int32(0)))[:-1]
    at, first = np.arange(size, dtype=np.int32), np.arange(size) == 0
    with ThreadPoolExecutor(max(1, min(8, torch.get_num_threads()))) as pool:
        for order in range(1, max(orders) + 1):
            out = (
                [np.zeros(size, np.int32) for _ in range(5 if hints else 3)]
                if order in orders
                else []
            )
            heads = np.flatnonzero(first)  # groups are counted in pieces
            wanted = np.arange(COUNT_PIECE, heads[-1] + 1 if len(at) else 0, COUNT_PIECE)
            cuts = np.unique(heads[np.searchsorted(heads, wanted)])
            count = functools.partial(_count_piece, tokens, vocab, room, order, out)
            parts = pool.map(count, np.split(at, cuts), np.split(first, cuts)) if len(at) else ()
            parts = [(at[:0], first[:0]), *parts]
            if out:
                yield (order, *out)
            del out
            at, first = (np.concatenate(arrays) for arrays in zip(*parts))


def counts_after(
    prefix: np.ndarray,
    orders: Sequence[int],
    vocab: int,
    bos: int | None = None,
    unigram: np.ndarray | None = None,
) -> Iterator[tuple[Any, ...]]:
    """causal_counts with hints for every token that could follow a prefix, n [V], by searching it (its own
    counts of order 1, if known, are `unigram`)."""
    size, starts = len(prefix), np.flatnonzero(prefix == bos) if bos is not None else prefix[:0]
    room = size - (int(starts[-1]) if len(starts) else 0)
    found = np.flatnonzero(prefix[:-1] == prefix[-1:]) + 1  # where the context occurs, so far
    for order in range(1, max(orders) + 1):
        if order > 2 and len(found):
            found = found[np.searchsorted(found, order - 1) :] if order - 1 <= room else found[:0]
            found = found[prefix[found - order + 1] == prefix[size - order + 1]]
        if order in orders:
            after = prefix if order == 1 else prefix[found]  # the tokens that followed the context
            n = np.bincount(after, minlength=vocab) if order > 1 or unigram is None else unigram
            hint = int(after[-1]) if len(after) else 0
            yield order, n, len(after), np.count_nonzero(n), hint, n[hint]


NGRAM_ORDERS = (
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    13,
    25,
)  # of exact counts; the last reach back 12, 24 tokens
DISCOUNT, CONCENTRATION = 0.75, 0.5  # of absolute discounting
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
        self.tokens, self.vocab, self.bos = (
            tokens,
            cfg.vocab_size,
            cfg.bos_id if cfg.ngram_docs else None,
        )
        self.asked, self.answer, self.upto, self.unigram = (
            None,
            None,
            0,
            np.zeros(self.vocab, np.int64),
        )

    def _after(self, j: int) -> Grams:
        if self.upto > j + 1:
            self.unigram, self.upto = np.zeros_like(self.unigram), 0
        self.unigram += np.bincount(self.tokens[self.upto : j + 1], minlength=self.vocab)
        self.upto = j + 1
        return discounted(
            counts_after(self.tokens[: j + 1], NGRAM_ORDERS, self.vocab, self.bos, self.unigram),
            self.vocab,
        )

    def every(self, index: np.ndarray) -> Grams:
        """At targets [m], from the tokens before each alone: q [m, V, K], the rest [m]."""
        if self.asked != index.tobytes():  # tilt and mixture ask the same
            q, *facts = map(np.stack, zip(*map(self._after, index)))  # [m, K, V], [m]
            self.asked, self.answer = index.tobytes(), Grams(q.swapaxes(1, 2), *facts)
        return self.answer


class NgramCounts(PrefixCounts):
    """The same for a whole stream at once, for the targets that it has: `of`."""

    def __init__(self, tokens: np.ndarray, windows: Windows, cfg: Config):
        super().__init__(tokens, windows, cfg)
        self.grams = discounted(
            causal_counts(tokens, NGRAM_ORDERS, self.bos, hints=True), self.vocab
        )

    def of(self, index: np.ndarray) -> Grams:
        """At targets [...]: q of the target [..., K], the rest [...]."""
        q, *facts = self.grams
        return Grams(
            np.stack([row[index + 1] for row in q], -1), *(fact[index + 1] for fact in facts)
        )


def counts_before(
    keys: np.ndarray, groups: np.ndarray, counted: np.ndarray | None = None
) -> np.ndarray:
    """How many counted elements with its key stand in earlier groups, for every element -> [n]. One sort.

    keys [n] whole numbers; groups [n] never falling (a token, a window, a chunk): what one group adds, only
    later ones see. counted [n] bool, None = all.
    """
    n, bits = len(keys), len(keys).bit_length()
    order = keys.astype(np.int64) << bits | np.arange(n)
    order.sort()  # by key, then by position
    at, keys = order & ((1 << bits) - 1), order >> bits
    groups = groups[at]
    new_key = np.concatenate(([True], keys[1:] != keys[:-1]))
    runs = np.flatnonzero(
        new_key | np.concatenate(([True], groups[1:] != groups[:-1]))
    )  # of key and group
    seen = runs if counted is None else (np.cumsum(counted[at]) - counted[at])[runs]
    before = seen - np.maximum.accumulate(np.where(new_key[runs], seen, 0))
    out = np.empty(n, np.int32)
    out[at] = np.repeat(before.astype(np.int32), np.diff(runs, append=n))
    return out


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
        self.row = self.target - window * windows.stride  # position in the window
        first = np.where(window, window * windows.stride + windows.seq_len - windows.stride, 0)
        self.groups = first // (cfg.ngram_chunk_tokens or windows.stride)
        starts = np.flatnonzero(np.diff(self.groups, prepend=-1))
        self.begin = np.repeat(
            starts, np.diff(starts, append=n)
        )  # [n] first target of each one's group
        self.ratios = np.full((len(self.orders), n), -1, np.float32)
        with ThreadPoolExecutor(2) as pool:  # the two counters of an order
            for order in reversed(self.orders):
                looked, added, slots = self._order(order)
                used = looked | added
                counted = None if added[used].all() else added[used]
                context, full = pool.map(
                    counts_before,
                    (slot[used] for slot in slots),
                    [self.groups[used]] * 2,
                    [counted] * 2,
                )
                ratio = np.minimum(context, full) / np.maximum(context, 1, dtype=np.float32)
                ratio[(context < cfg.ngram_min_count) | ~looked[used]] = -1
                self.ratios[order - self.orders[0], used] = ratio

    def _order(self, order: int) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
        """Which targets look an order up, which are added to it, and their counters (where complete)."""
        padded, n = np.concatenate((np.zeros(order - 2, np.uint32), self.tokens)), len(self.target)
        slots = ngram_slots(
            [padded[i : i + n] for i in range(order - 1)], self.tokens[1:], self.cfg
        )
        if self.cfg.ngram == "gated":
            return self.row >= order - 1, self.target - self.begin >= order - 2, slots
        free = (self.ratios[order - self.orders[0] + 1 :] < 0).all(0) & (self.target >= order - 2)
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
                    np.add.at(table, slot[done : self.begin[j]][added[done : self.begin[j]]], 1)
                done, count = max(self.begin[j], done), tables[0, slots[0][j]]
                if looked[j] and count >= cfg.ngram_min_count:
                    _, full = ngram_slots(self.tokens[j - order + 2 : j + 1, None], vocabulary, cfg)
                    out[row, :, column] = np.minimum(tables[1, full], count) / count
        return out


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
    return cfg.eval_batch_tokens or min(rt.profile.score_tokens, 2**28 // cfg.vocab_size)


class Predictor:
    """What scores text. Every predictor has, its own or from the one that it wraps (Nested):

    outputs(batch) -> logits [B, S, V] and the final norm's output [B, S, D]; last(prefix) -> the same after
    a prefix, [1, V] and [1, D]; prob(out, index, ids, counts) -> p of tokens ids [..., C] as target number
    index [...], the one place that says what it believes; C = 1 are the targets themselves. The harness calls
    charged(batch) after a batch is charged and observe(tokens, progress) after a chunk is, never before.
    validity: what its score is called if it is no true one; chunk: targets between two calls of observe;
    counts, twin: the n-gram counts that it asks for, of a stream and after a prefix; plan(tokens): its work;
    shares: what processes divide, units or the rows of each; left_context: tokens wanted before a batch that does
    not continue the last; row: tokens of a training row; probe(tokens): work for the audit; isolates: a
    document's charges do not depend on others.
    """

    @torch.inference_mode()
    def score(self, batch: Batch, counts: Any = None) -> Tensor:
        """Nats of every target [B, S]."""
        p = self.prob(self.outputs(batch), batch.index, batch.targets.unsqueeze(-1), counts)
        return -p.squeeze(-1).log()

    @torch.inference_mode()
    def full(self, batch: Batch, counts: Any, rows: np.ndarray, columns: np.ndarray) -> Tensor:
        """log p over the vocabulary at chosen targets of a batch -> [m, V], float64."""
        logits, hidden = (part[rows, columns] for part in self.outputs(batch))
        ids = torch.arange(logits.size(-1), device=logits.device).expand_as(logits)
        return self.prob((logits, hidden), batch.index[rows, columns], ids, counts).log().cpu()

    @torch.inference_mode()
    def next(self, prefix: np.ndarray, counts: Any = None) -> Tensor:
        """log p over the vocabulary after a prefix -> [V], float64; by default the counts are its own."""
        out, counts = self.last(prefix), counts or self.twin and self.twin(prefix, None, self.cfg)
        ids = torch.arange(out[0].size(-1), device=out[0].device)[None]
        return self.prob(out, np.array([len(prefix) - 1]), ids, counts)[0].log().cpu()


class Sliding(Predictor):
    """The plain model over windows, each target with as much context as the stride allows."""

    validity, chunk, counts, twin, left_context, shares, isolates = (
        "",
        0,
        None,
        None,
        0,
        "units",
        False,
    )
    charged = observe = snapshot = restore = staticmethod(lambda *_: None)  # it learns nothing

    def __init__(
        self, model: GPT, rt: Runtime, name: str, seq_len: int, stride: int, temperature: float = 1
    ):
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
        hidden = self.hidden(batch.ids, self.model.context(batch.ids))[:, -batch.targets.size(1) :]
        return temper(self.model.head(hidden), self.temperature), hidden

    def unit_of(self, tokens: np.ndarray) -> Any:
        """The work that scores the last target alone."""
        return [int(self.plan(tokens).of(len(tokens) - 2))]

    def last(self, prefix: np.ndarray) -> tuple[Tensor, Tensor]:
        tokens = np.append(prefix, 0)
        batch = self.plan(tokens).batch(tokens, self.unit_of(tokens), 1, self.rt)
        at = int(batch.valid[0]) - 1
        return tuple(part[0, at : at + 1] for part in self.outputs(batch))

    def prob(
        self, out: tuple[Tensor, Tensor], index: np.ndarray, ids: Tensor, counts: Any
    ) -> Tensor:
        exact = out[0].double() if ids.size(-1) >= out[0].size(-1) else out[0]
        return F.log_softmax(exact, -1).gather(-1, ids).double().exp()


class Streaming(Sliding):
    """One pass over the stream with a sliding-window mask: each target sees the last EVAL_STREAM positions.

    Keys and values go from span to span (KVCache), so every position is computed once. A batch that does not
    continue the last one starts from the tokens before it, as many as can reach it through all layers.
    """

    def __init__(self, model: GPT, rt: Runtime, cfg: Config, temperature: float = 1):
        width, limit = cfg.eval_stream, scoring_tokens(cfg, rt)
        widths = (
            cfg.ttt_chunk_tokens // width,
            cfg.mix_chunk_tokens // width,
            max(limit // width, 1),
        )
        span = width * math.gcd(*widths)  # chunks end where spans do
        super().__init__(model, rt, "streaming", span, span, temperature)
        self.window, self.row = cfg.eval_stream, cfg.score_len
        self.left_context = (
            len(model.blocks) * (self.window - 1) + 2
        )  # SmearGate and bigram look back too
        self.bos, self.isolates = cfg.bos_id if cfg.stream_docs else None, cfg.stream_docs
        self.memory, self.at, self.span = (
            None,
            -1,
            np.empty(0, int),
        )  # the target after the last span
        self.reading, self.read = None, np.empty(0, int)  # the same for `last`, and its prefix

    def rows(self, cfg: Config) -> int:
        return 1

    def probe(self, tokens: np.ndarray) -> Windows:
        size = -(-256 // self.window) * self.window
        return Windows(len(tokens) - 1, size, size)

    def pass_on(self, tokens: np.ndarray, memory: KVCache) -> Tensor:
        """Reads tokens [n] into a memory -> final norm's output after the last of them [1, 1, D]."""
        rest = len(tokens) % self.window
        for piece in filter(len, (tokens[:rest], tokens[rest:])):
            ids = self.rt.put(piece[None].astype(np.int64))
            hidden = self.model.hidden(ids, self.model.context(ids, memory))
        return hidden[:, -1:]

    def outputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        first, known = int(batch.index[0, 0]), min(len(batch.left_context), len(self.span))
        if first != self.at or not np.array_equal(batch.left_context[-known:], self.span[-known:]):
            self.memory = KVCache(self.window, self.bos)
            if len(batch.left_context):
                self.pass_on(batch.left_context, self.memory)
        hidden, self.span = (
            self.model.hidden(batch.ids, self.model.context(batch.ids, self.memory)),
            batch.ids[0].cpu().numpy(),
        )
        self.at = first + len(self.span)
        return temper(self.model.head(hidden), self.temperature), hidden

    def last(self, prefix: np.ndarray) -> tuple[Tensor, Tensor]:
        done = len(self.read)
        if not 0 < done < len(prefix) or not np.array_equal(prefix[:done], self.read):
            self.reading, done = KVCache(self.window, self.bos), 0
        hidden, self.read = self.pass_on(prefix[done:], self.reading)[0], np.array(prefix)
        return temper(self.model.head(hidden), self.temperature), hidden


def adapted_names(model: GPT, cfg: Config) -> set[str]:
    """What test-time training may change: all, or the last blocks (or their queries), scales and head."""
    blocks = tuple(
        f"blocks.{i}." for i in range(cfg.num_layers - cfg.ttt_freeze_blocks, cfg.num_layers)
    )

    def chosen(name: str) -> bool:
        in_blocks = name.startswith(blocks) and (not cfg.qttt or ".c_q." in name)
        return in_blocks or any(part in name for part in ("norm", "scale", "lm_head", "alpha_head"))

    return {
        name for name, _ in model.named_parameters() if chosen(name) or not cfg.ttt_freeze_blocks
    }


class PerDocumentLoRA(Sliding):
    """Per-document adapters: each chunk of a document is charged, then learned from.

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
        self.matrices = [
            m
            for name, m in model.blocks.named_modules()
            if isinstance(m, Linear) and f"blocks.{name}.weight" in chosen
        ]
        generator, self.start, self.params = torch.Generator().manual_seed(cfg.seed), [], []
        for rows, columns in (m.weight.shape for m in self.matrices):
            low = (
                2 * torch.rand(cfg.ttt_docs, rank, columns, generator=generator) - 1
            ) / math.sqrt(columns)
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
        slots, scale = (
            torch.from_numpy(batch.slots),
            self.cfg.ttt_lora_alpha / self.cfg.ttt_lora_rank,
        )
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
        nats = (
            F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")
            / self.stride
        )
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
        self.validity = "adapted_before_scoring" if cfg.ttt_before_scoring else ""
        self.chunk = 0 if cfg.ttt_before_scoring else cfg.ttt_chunk_tokens
        chosen = adapted_names(base.model.requires_grad_(False), cfg)
        self.params = [
            p.requires_grad_() for name, p in base.model.named_parameters() if name in chosen
        ]
        self.grads = bind_flat_gradients(self.params)
        self.optimizer = (
            torch.optim.SGD(self.params, momentum=0.9)
            if cfg.ttt_optimizer == "sgd"
            else torch.optim.AdamW(self.params, weight_decay=0.0)
        )

    def observe(self, tokens: np.ndarray, progress: float) -> None:
        if self.chunk and progress < 1:  # nothing comes after the last
            for _ in self.adapt(tokens, self.cfg.ttt_lr * 0.5 * (1 + math.cos(math.pi * progress))):
                pass

    def adapt(self, tokens: np.ndarray, rate: float) -> Iterator[float]:
        """Trains on rows as long as a window, in order, TTT_EPOCHS times (no rest); yields the share done."""
        cfg, size, length = self.cfg, self.cfg.ttt_batch_seqs, self.row
        rows = (len(tokens) - 1) // length
        if cfg.ttt_before_scoring:  # PR 489 cuts at tokens, and drops a last row of its own
            span = rows * length // cfg.ttt_parts
            count = span // length - (span % length == 0 and (span // length - 1) % size == 0)
            parts = [(i * span, count) for i in range(cfg.ttt_parts)]  # first token, rows
        else:
            edges = [rows * i // cfg.ttt_parts for i in range(cfg.ttt_parts + 1)]
            parts = [(lo * length, hi - lo) for lo, hi in itertools.pairwise(edges)]
        self.optimizer.param_groups[0]["lr"] = rate
        steps = [*range(0, max(count for _, count in parts), size)] * cfg.ttt_epochs
        for number, at in enumerate(steps, 1):
            self.grads.zero_()
            units = [
                (first + at * length, min(size, count - at)) for first, count in parts if count > at
            ]
            for unit in units[self.rt.rank :: self.rt.world]:
                (self._loss(tokens, *unit) / len(units)).backward()
            self.rt.sum_(self.grads)
            if not cfg.ttt_before_scoring:
                clip_gradients(self.grads, 1.0)
            self.optimizer.step()
            yield number / len(steps)

    def _loss(self, tokens: np.ndarray, first: int, rows: int) -> Tensor:
        """Mean nats of so many rows from a token on; BYTE_WEIGHTED_TTT: weighted by the targets' bytes."""
        span = tokens[first : first + rows * self.row + 1].astype(np.int64)
        ids, targets = (self.rt.put(part.reshape(-1, self.row)) for part in (span[:-1], span[1:]))
        nats = F.cross_entropy(
            self.logits(ids, self.model.context(ids)).flatten(0, 1),
            targets.flatten(),
            reduction="none",
        )
        weights = (
            self.rt.put(self.table.count(span).astype(np.float32))
            if self.cfg.byte_weighted_ttt
            else torch.ones_like(nats)
        )
        return (nats * weights).sum() / weights.sum()

    def snapshot(self) -> Any:
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))

    def restore(self, state: Any) -> None:
        self.model.load_state_dict(state[0])
        self.optimizer.load_state_dict(state[1])


class HashedNgramCache(Nested):
    """The hashed caches of PR 740 (fixed weight, backoff) and PR 859 (learned gate) over another predictor.

    An order's "probability" is the ratio of two counters, the second found with the target in its key: over
    the vocabulary the ratios add up to far more than one. Kept to reproduce what was published; no score.
    """

    name, counts, twin = "ngram", HashedCounts, None

    def __init__(self, base: Predictor, cfg: Config):
        super().__init__(base, cfg)
        self.validity = base.validity or "unnormalised_score"

    def prob(
        self, out: tuple[Tensor, Tensor], index: np.ndarray, ids: Tensor, counts: Any
    ) -> Tensor:
        cfg, p = self.cfg, self.base.prob(out, index, ids, counts)
        ratios = counts.every(index) if ids.size(-1) > 1 else counts.of(index)[..., None, :]
        ratios = self.rt.put(ratios).double()  # [..., C, K]
        if cfg.ngram == "gated":
            return self.gated(out[1], p, ratios).clamp(1e-12, 1)
        ratio, alpha = ratios.amax(-1), cfg.ngram_alpha  # no more than one order counts
        if cfg.ngram == "backoff":
            weight = torch.sigmoid(2 * (entropy(out[0]) - 4)).double().unsqueeze(-1)
            alpha = cfg.ngram_ent_base + cfg.ngram_ent_range * weight
        return torch.where(ratio < 0, p, (1 - alpha) * p + alpha * ratio).clamp(1e-12, 1)


class Online(Nested):
    """Statistics by bucket, learned from charged targets: those in `pending` enter `total` at the chunk's end.

    total [buckets, n] begins at a prior; all that a bucket is made of is known before the target is.
    """

    name, counts, twin = "mixed", NgramCounts, PrefixCounts

    def __init__(self, base: Predictor, cfg: Config, prior: Sequence[float], *levels: int):
        super().__init__(base, cfg)
        self.levels, self.chunk = levels, base.chunk or cfg.mix_chunk_tokens
        self.total = base.rt.put(np.tile(prior, (math.prod(levels), 1)))
        self.pending, self.noted = torch.zeros_like(self.total), None

    def bucket(self, *features: Tensor) -> Tensor:
        """Row of `total` for features [...] cut to whole numbers from 0 up to their levels."""
        row = 0
        for feature, levels in zip(features, self.levels, strict=True):
            row = row * levels + feature.clamp(0, levels - 1).long()
        return row

    def grams(self, index: np.ndarray, ids: Tensor, counts: Any) -> Grams:
        """Exact counts on the device: q [..., C, K], the rest [...]; count at least 1."""
        grams = Grams(
            *map(self.rt.put, counts.every(index) if ids.size(-1) > 1 else counts.of(index))
        )
        return grams._replace(q=grams.q.reshape(*ids.shape, -1), count=grams.count.clamp(min=1))

    def charged(self, batch: Batch) -> None:
        if self.noted:
            self.pending.index_add_(0, *(part[torch.from_numpy(batch.real)] for part in self.noted))
        self.base.charged(batch)

    def observe(self, tokens: np.ndarray, progress: float) -> None:
        self.total += self.rt.sum_(self.pending)
        self.pending.zero_()
        self.base.observe(tokens, progress)

    def snapshot(self) -> Any:
        return self.total.clone(), self.base.snapshot()

    def restore(self, state: Any) -> None:
        self.total.copy_(state[0])
        self.pending.zero_()
        self.base.restore(state[1])


class Tilt(Online):
    """Raises one hinted token: what followed the longest known context last.

    p'(a) = p(a) e^(b [a = hint]) / (1 + p(hint) (e^b - 1)), with b >= 0 such that p'(hint) is the share of
    hits in its bucket so far: by context, its count, the hint's share of that count and p(hint).
    """

    def __init__(self, base: Predictor, cfg: Config):
        super().__init__(base, cfg, (0.0, 2.0), len(NGRAM_ORDERS) + 1, 6, 4, 8)  # hits, trials

    def prob(
        self, out: tuple[Tensor, Tensor], index: np.ndarray, ids: Tensor, counts: Any
    ) -> Tensor:
        grams = self.grams(index, ids, counts)
        known, hint = grams.agree > 0, grams.hint.long().unsqueeze(-1)
        p, h = self.base.prob(out, index, torch.cat((ids, hint), -1), counts).tensor_split(
            (-1,), -1
        )
        bucket = self.bucket(
            grams.rank,
            grams.count.log2().floor(),
            (4 * grams.agree / grams.count).floor(),
            4 + (h.squeeze(-1).logit(1e-9) / 1.5).floor(),
        )
        hits, trials = self.total[bucket].unsqueeze(-2).unbind(-1)  # [..., 1]
        top = torch.where(known.unsqueeze(-1), torch.maximum(h, hits / trials), h)
        rest = torch.where(top > h, (1 - top) / (1 - h), 1.0)
        hit = ids == hint
        if ids.size(-1) == 1:
            self.noted = (
                bucket,
                torch.cat((hit, torch.ones_like(hit)), -1) * known.unsqueeze(-1).double(),
            )
        return torch.where(hit, top, p * rest)


class Mixed(Online):
    """The network mixed with exact n-gram distributions of all orders, true probabilities all of them.

    Weights are learned online, by bucket: each expert's share of what was charged (expectation maximisation).
    With MIXER_HEAD, PR 859's head weighs them instead.
    """

    def __init__(self, base: Predictor, cfg: Config):
        experts = len(NGRAM_ORDERS)
        super().__init__(base, cfg, (9.0, *[1.0 / experts] * experts), experts + 1, 5, 4)

    def prob(
        self, out: tuple[Tensor, Tensor], index: np.ndarray, ids: Tensor, counts: Any
    ) -> Tensor:
        grams, p = self.grams(index, ids, counts), self.base.prob(out, index, ids, counts)
        if self.cfg.mixer_head:
            orders = [NGRAM_ORDERS.index(order) for order in self.cfg.ngram_orders]
            return self.gated(out[1], p, grams.q[..., orders])
        doubt = (4 * entropy(out[0]) / math.log(out[0].size(-1))).floor()
        bucket = self.bucket(grams.rank, grams.count.log2().floor(), doubt)
        weights = self.total[bucket].unsqueeze(-2)  # [..., 1, 1 + K]
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
    sizes: np.ndarray  # bytes of each target
    validity: str  # its name if it is no true score
    complete: bool  # the whole validation set
    coverage: np.ndarray  # how often each target was charged
    events: list[tuple[str, int, int]] = dataclasses.field(default_factory=list)
    counts: Any = None  # the n-gram counts that it used
    seconds: float = 0.0
    loss: float = 0.0  # mean nats, from float64 sums
    bpb: float = 0.0
    mass: float = 1.0  # mean sum of the charged p over the vocabulary

    @property
    def label(self) -> str:
        return self.validity or ("val_bpb" if self.complete else "partial_bpb")

    def record(self) -> dict[str, Any]:
        return {
            "metric": self.label,
            self.label: self.bpb,
            "val_loss" if self.label == "val_bpb" else "loss": self.loss,
            "normalised": self.validity != "unnormalised_score",
            "mass": self.mass,
            "complete": self.complete,
            "tokens": len(self.nats),
            "bytes": int(self.sizes.sum(dtype=np.int64)),
            "seconds": round(self.seconds, 3),
        }


def evaluate(
    predictor: Any, tokens: np.ndarray, table: ByteTable, cfg: Config, rt: Runtime, log: RunLog
) -> Score | None:
    """Scores every target once, in order: score -> commit -> observe. None: it would not fit the time.

    Units of work are the same for any number of processes, which take consecutive shares of every chunk.
    """
    plan, rows, targets = predictor.plan(tokens), predictor.rows(cfg), len(tokens) - 1
    alone = (
        predictor.left_context and predictor.chunk
    )  # what carries on and learns runs on every process
    rank, world = (0, 1) if alone or predictor.shares == "rows" else (rt.rank, rt.world)
    score = Score(
        predictor.name,
        np.zeros(targets, np.float32),
        table.count(tokens),
        predictor.validity,
        not cfg.val_tokens,
        np.zeros(targets, np.uint8),
    )
    with log.phase(predictor.name):
        start, rounds, charged = time.perf_counter(), 0, np.zeros(2)
        score.counts = predictor.counts and predictor.counts(tokens, plan, cfg)
        if predictor.validity == "adapted_before_scoring":
            score.events.append(("observe", 0, targets))
            for number, share in enumerate(predictor.adapt(tokens, cfg.ttt_lr)):
                log.progress(f"{score.name}: adapting {100 * share:.0f}%")
                if number == 2 and not _fits(start, start, share, cfg, rt, log):
                    return None
        chunks, begun = list(plan.units(rows, predictor.chunk)), time.perf_counter()
        total = sum(-(-len(units) // world) for units in chunks)
        for number, units in enumerate(chunks):
            lo, hi = plan.span(units)
            share = -(-len(units) // world)  # consecutive units for each process
            for at in range(rank * share, rank * share + share):
                unit = units[at] if at < len(units) else ()
                unit = plan.part(unit, rt.rank, rt.world) if predictor.shares == "rows" else unit
                if len(unit) and np.size(unit[0]):
                    batch = plan.batch(tokens, unit, rows, rt, predictor.left_context)
                    nats = predictor.score(batch, score.counts)
                    if rt.main or not alone:
                        charged += _charge(score, batch, nats)
                        predictor.charged(batch)
                rounds += 1
                if rounds == 3 and not _fits(start, begun, rounds / total, cfg, rt, log):
                    return None
                left = (time.perf_counter() - begun) * (total / rounds - 1)
                log.progress(
                    f"{score.name}: {100 * rounds / total:.0f}% running_loss:"
                    f"{charged[0] / max(charged[1], 1):.4f} eta:{left:.0f}s"
                )
            score.events.append(("score", lo, hi))
            predictor.observe(
                tokens[lo : hi + 1], number / (len(chunks) - 1) if len(chunks) > 1 else 1.0
            )
            score.events.append(("observe", lo, hi))
            if number == 0 and not _fits(start, begun, rounds / total, cfg, rt, log):
                return None  # now that one adaptation is timed
        for array in (score.nats, score.coverage):
            array[:] = rt.sum_(torch.from_numpy(array)).numpy()
        score.loss = float(score.nats.mean(dtype=np.float64))
        score.bpb = (
            score.loss / math.log(2) * len(score.nats) / int(score.sizes.sum(dtype=np.int64))
        )
        score.seconds = time.perf_counter() - start
    log.progress("", last=True)
    return score


def _charge(score: Score, batch: Batch, nats: Tensor) -> tuple[float, int]:
    """Books a batch's charges; their sum and number."""
    index, values = batch.index[batch.real], nats.float().cpu().numpy()[batch.real]
    score.nats[index] = values
    score.coverage[index] += 1
    return values.sum(dtype=np.float64), len(values)


def _fits(start: float, begun: float, share: float, cfg: Config, rt: Runtime, log: RunLog) -> bool:
    """Whether the stage, at the pace since `begun`, ends within MAX_EVAL_SECONDS; rank 0 decides for all."""
    needed = begun - start + (time.perf_counter() - begun) / share
    left = cfg.max_eval_seconds - log.eval_seconds()
    late = (
        rt.sum_(
            torch.tensor([float(rt.main and cfg.max_eval_seconds > 0 and needed > left)])
        ).item()
        > 0
    )
    if late:
        log.log(
            f"scoring stage skipped: needs about {needed:.0f} s, MAX_EVAL_SECONDS leaves {left:.0f} s"
        )
    return not late


def sample(model: GPT, table: ByteTable, cfg: Config, rt: Runtime) -> str:
    """Text the model writes after SAMPLE_PROMPT, drawn at SAMPLE_TEMPERATURE with SEED."""
    predictor = Sliding(model, rt, "sample", cfg.score_len, max(1, cfg.score_len // 2))
    generator = torch.Generator().manual_seed(cfg.seed)
    tokens = [cfg.bos_id, *table.encode(cfg.sample_prompt)]
    for _ in range(cfg.sample_tokens or 200):
        prob = torch.softmax(predictor.next(np.array(tokens)) / cfg.sample_temperature, dim=-1)
        tokens.append(int(torch.multinomial(prob, 1, generator=generator)))
    documents = [
        [*part] for is_start, part in itertools.groupby(tokens, cfg.bos_id.__eq__) if not is_start
    ]
    return "\n\n".join(table.decode(part).decode(errors="replace") for part in documents)


def network(model: GPT, rt: Runtime, cfg: Config, table: ByteTable, stride: int) -> Predictor:
    """The network as the later stages use it: over the stream or over windows, adapting if that is on."""
    base = (
        PerDocumentLoRA(model, rt, cfg)
        if cfg.ttt_lora_rank
        else Streaming(model, rt, cfg, cfg.ttt_temperature)
        if cfg.eval_stream
        else Sliding(model, rt, "sliding", cfg.score_len, stride, cfg.ttt_temperature)
    )
    return Adapting(base, cfg, table) if cfg.ttt_epochs else base


def mixture(model: GPT, rt: Runtime, cfg: Config, table: ByteTable) -> Predictor:
    predictor = network(model, rt, cfg, table, cfg.stride)
    predictor = Tilt(predictor, cfg) if cfg.tilt else predictor
    return Mixed(predictor, cfg) if cfg.ngram == "mix" else predictor


# Scoring stages in order: name -> whether the settings ask for it, and its predictor from model, runtime,
# settings and byte table. The last true score is the result; what a later one contains is not scored alone.
PREDICTORS: dict[
    str, tuple[Callable[[Config], Any], Callable[[GPT, Runtime, Config, ByteTable], Any]]
] = {
    "plain": (
        lambda cfg: cfg.eval_plain or cfg.stride == cfg.score_len and not cfg.eval_stream,
        lambda model, rt, cfg, table: Sliding(model, rt, "plain", cfg.score_len, cfg.score_len),
    ),
    "sliding": (
        lambda cfg: cfg.stride < cfg.score_len,
        lambda model, rt, cfg, table: Sliding(model, rt, "sliding", cfg.score_len, cfg.stride),
    ),
    "streaming": (
        lambda cfg: cfg.eval_stream,
        lambda model, rt, cfg, table: Streaming(model, rt, cfg),
    ),
    "ttt": (
        lambda cfg: (cfg.ttt_epochs or cfg.ttt_lora_rank) and not cfg.tilt and cfg.ngram != "mix",
        lambda model, rt, cfg, table: network(model, rt, cfg, table, cfg.stride),
    ),
    "mixed": (lambda cfg: cfg.tilt or cfg.ngram == "mix", mixture),
    "ngram": (
        lambda cfg: cfg.ngram and cfg.ngram != "mix",
        lambda model, rt, cfg, table: HashedNgramCache(
            network(model, rt, cfg, table, cfg.ngram_stride or cfg.stride), cfg
        ),
    ),
}

# ==================================================================================================
# 11. CHECKS - what makes a score believable, tested on the score itself.
#     Uses sections 3-10; changes nothing.
# ==================================================================================================

Verdict = tuple[str | None, dict[str, Any]]  # what is wrong, or None; the figures


class AccessWatch:
    """Files opened and other hosts contacted while it watches (a Python audit hook)."""

    def __init__(self) -> None:
        self.mark, self.total = "", []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple) -> None:
        if self.mark and event == "open" and self.mark in str(args[0]):
            self.total.append(f"opened {Path(args[0]).name}")
        elif (
            self.mark
            and event == "socket.connect"
            and isinstance(args[1], tuple)
            and args[1][0] not in ("127.0.0.1", "::1", "localhost")
        ):
            self.total.append(f"connected to {args[1][0]}")

    @contextlib.contextmanager
    def watching(self, mark: str) -> Iterator[list[str]]:
        """Yields the list of what is seen: files with `mark` in their path, hosts."""
        self.mark, self.total = mark, []
        try:
            yield self.total
        finally:
            self.mark = ""


access_watch = functools.cache(AccessWatch)  # one a process: Python cannot take a hook back


def audit_bytes(
    tokens: np.ndarray, table: ByteTable, bos: int, sample_tokens: int = 1 << 20
) -> Verdict:
    """The byte table against the decoded text, by document, over the first tokens."""
    tokens = tokens[:sample_tokens]
    starts, counted = (
        np.flatnonzero(tokens == bos),
        np.concatenate(([0], np.cumsum(table.count(tokens)))),
    )
    for lo, hi in itertools.pairwise(starts):
        text, count = len(table.decode(tokens[lo + 1 : hi])), counted[hi - 1] - counted[lo]
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
        for later in (ids[:, ids.size(1) - size + last + 1 :], targets[:, last + 1 :]):
            later.copy_((later + 1) % vocab)
        after = predictor.score(batch._replace(ids=ids, targets=targets), counts).float()
        moved = max(moved, (after - before)[:, : last + 1].abs().max().item())
    return f"later tokens move charges by {moved:.2g} nats" if moved > 1e-4 else None, {
        "nats": moved
    }


def audit_distribution(
    predictor: Predictor, batch: Batch, score: Score, tolerance: float
) -> Verdict:
    """At 256 positions the probabilities sum to one and the target's entry is what was charged (C2)."""
    real = np.argwhere(batch.real)
    rows, at = real[np.linspace(0, len(real) - 1, min(256, len(real))).astype(int)].T
    log_p = predictor.full(batch, score.counts, rows, at)  # [256, V]
    entries = log_p.gather(1, batch.targets.cpu()[rows, at][:, None]).squeeze(1).numpy()
    charged = (
        predictor.score(batch, score.counts).cpu().numpy()[rows, at]
        if predictor.chunk
        else score.nats[batch.index[rows, at]]
    )  # what adapts is asked as it is now
    total, gap = (
        torch.logsumexp(log_p, -1).abs().max().item(),
        float(np.abs(entries + charged).max()),
    )
    score.mass = log_p.exp().sum(-1).mean().item()
    problem = (
        f"log of the sum over the vocabulary is off by {total:.2g}, the charge from its entry by "
        f"{gap:.2g} nats"
        if total > tolerance or gap > tolerance
        else None
    )
    return problem, {"positions": len(rows), "log_sum": total, "entry_gap": gap, "mass": score.mass}


# The checks that a labelled score fails by its nature; any other failure counts against it too.
FAULTS = {
    "unnormalised_score": ("distribution", "every_token", "random_stream"),
    "adapted_before_scoring": ("order", "future_again", "every_token", "random_stream"),
}


def verdicts_of(
    checks: Mapping[str, Verdict], validity: str, tolerance: float
) -> dict[str, dict[str, Any]]:
    """Check -> verdict (PASS, or FAIL or EXPECTED and the reason) and figures."""
    verdicts = {}
    for name, (problem, figures) in checks.items():
        known = name in FAULTS.get(validity, ()) and figures.get("entry_gap", 0.0) <= tolerance
        verdict = f"{'EXPECTED' if known else 'FAIL'}: {problem}" if problem else "PASS"
        verdicts[name] = {"verdict": verdict, **figures}
    return verdicts


class Rescorer:
    """Scores short streams again and again, each time from the same state, for the checks of MODE=audit.

    Windows and chunks are as short as 128 targets, so that a stream of six of them holds every kind of edge.
    """

    def __init__(
        self,
        build: Callable[..., Predictor],
        model: GPT,
        rt: Runtime,
        cfg: Config,
        table: ByteTable,
        log: RunLog,
    ):
        self.build, self.model, self.table, self.rt = build, model, table, rt
        self.size, self.log = min(cfg.score_len, 128), RunLog(log.out_dir, rt, silent=True)
        stride = min(cfg.stride, self.size // 2) if cfg.stride < cfg.score_len else 0
        short = ("eval_seq_len", "ttt_chunk_tokens", "mix_chunk_tokens", "eval_batch_tokens")
        self.cfg = dataclasses.replace(
            cfg,
            **dict.fromkeys(short, self.size),
            eval_stream=min(cfg.eval_stream, self.size),
            ttt_docs=2,
            eval_stride=stride,
            ngram_stride=0,
            max_eval_seconds=0.0,
        )

    def __call__(
        self,
        tokens: np.ndarray,
        model: GPT | None = None,
        rt: Runtime | None = None,
        scale: int = 1,
    ) -> np.ndarray:
        """Nats of every target [n], float64."""
        cfg = dataclasses.replace(self.cfg, eval_batch_tokens=scale * self.size)
        predictor = self.build(model or self.model, rt or self.rt, cfg, self.table)
        state = predictor.snapshot()
        score = evaluate(predictor, tokens, self.table, cfg, rt or self.rt, self.log)
        predictor.restore(state)
        return score.nats.astype(np.float64)


def audit_again(
    scores: Rescorer, tokens: np.ndarray, cfg: Config, predictor: Predictor
) -> dict[str, dict[str, Any]]:
    """The checks of MODE=audit, minutes of them. The stream is cut into three documents."""
    size, rng, vocab = scores.size, np.random.default_rng(cfg.seed), cfg.vocab_size
    tolerance = scores.rt.profile.tolerance
    stream = np.resize(tokens, 6 * size + 1)
    document_starts = [0, 2 * size, 4 * size - 7]
    stream[document_starts] = cfg.bos_id

    def digest(model: nn.Module) -> bytes:
        return hashlib.sha256(
            b"".join(p.data.cpu().numpy().tobytes() for p in model.parameters())
        ).digest()

    before, first = digest(scores.model), scores(stream)

    def gap(
        name: str, other: np.ndarray, own: np.ndarray = first, bound: float = tolerance
    ) -> Verdict:
        nats = float(np.abs(other - own).max())
        return f"{name} move charges by {nats:.2g} nats" if nats > bound else None, {"nats": nats}

    moved = []
    for last in (
        3,
        size - 1,
        size,
        document_starts[1],
        3 * size + 5,
        document_starts[2],
        5 * size - 1,
        6 * size - 2,
    ):
        other = np.append(stream[: last + 2], rng.integers(0, vocab, len(stream) - last - 2))
        moved.append(scores(other)[: last + 1] - first[: last + 1])
    sums = [
        sum(math.exp(-scores(np.append(stream[: last + 1], v))[last]) for v in range(vocab))
        for last in (size - 1, size)
    ]  # on both sides of a chunk's end
    blank = copy.deepcopy(scores.model)
    for name, p in blank.named_parameters():
        p.data.mul_(0.0 if name.startswith(("tok_emb", "lm_head")) else 1.0)
    noise = scores(rng.integers(0, vocab, len(stream)).astype(stream.dtype), model=blank)
    least, mean = (
        math.log(vocab) - 4 * float(noise.std()) / math.sqrt(len(noise)) - 1e-6,
        float(noise.mean()),
    )
    solo = copy.copy(scores.rt)
    solo.rank, solo.world = 0, 1
    swapped = np.concatenate(
        (
            stream[document_starts[1] : document_starts[2]],
            stream[: document_starts[1]],
            stream[document_starts[2] :],
        )
    )
    return verdicts_of(
        {
            "future_again": gap("later tokens", np.concatenate(moved), 0.0),
            "every_token": (
                f"charges of all tokens add up to {sums}"
                if any(abs(total - 1) > 10 * tolerance for total in sums)
                else None,
                {"sums": sums},
            ),
            "random_stream": (
                f"{mean:.4f} nats on random tokens, ln V is {math.log(vocab):.4f}"
                if mean < least
                else None,
                {"nats": mean},
            ),
            "batches": gap("other batch sizes", scores(stream, scale=4)),
            "processes": gap("other numbers of processes", scores(stream, rt=solo)),
            "isolation": gap(
                "other documents",
                scores(swapped)[document_starts[2] :],
                first[document_starts[2] :],
            )
            if predictor.isolates
            else (None, {"claimed": False}),
            "repeat": gap("repeated scores", scores(stream)),
            "neutral": (
                None if digest(scores.model) == before else "scoring left other weights",
                {},
            ),
        },
        predictor.validity,
        tolerance,
    )


def audit(
    score: Score,
    predictor: Predictor,
    tokens: np.ndarray,
    table: ByteTable,
    cfg: Config,
    rt: Runtime,
    stages: Mapping[str, float],
    accessed: Sequence[str],
) -> dict[str, dict[str, Any]]:
    """The checks of every score, at the price of a few batches."""
    plan = predictor.probe(tokens)
    near, batch = (
        plan.batch(tokens, unit, len(unit), rt, predictor.left_context)
        for unit in plan.samples(256)
    )
    targets, once, tolerance = (
        len(tokens) - 1,
        int((score.coverage == 1).sum()),
        rt.profile.tolerance,
    )
    recount = float(score.nats.sum(dtype=np.float64) / math.log(2) / table.count(tokens).sum())
    checks: dict[str, Verdict] = {
        "coverage": (
            None
            if once == len(score.nats) == targets
            else f"{once} of {targets} targets charged exactly once",
            {"charged_once": once},
        ),
        "bytes": audit_bytes(tokens, table, cfg.bos_id),
        "byte_algebra": (
            None
            if abs(recount - score.bpb) < 1e-9
            else f"recount gives {recount}, reported {score.bpb}",
            {"recount": recount},
        ),
        "order": audit_order(score.events),
        "future": audit_future(predictor, near, score.counts, cfg.vocab_size),
        "distribution": audit_distribution(predictor, batch, score, tolerance),
        "access": ("; ".join(accessed) or None, {"seen": len(accessed)}),
    }
    gain = max(stages.values(), default=score.bpb) - score.bpb
    doubt = (
        f"WARN: gains {gain:.4f} bpb over another stage"
        if gain > 0.03
        else "WARN: below 0.9 bpb"
        if score.bpb < 0.9
        else "PASS"
    )
    return {
        **verdicts_of(checks, score.validity, tolerance),
        "plausibility": {"verdict": doubt, "gain": gain},
    }


# ==================================================================================================
# 12. MAIN - modes, results, exit codes.
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


def commit_of(folder: Path) -> tuple[str | None, bool | None]:
    """The commit of the repository around a folder, and whether tracked files differ."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            [
                "git",
                "-C",
                str(folder),
                "describe",
                "--always",
                "--dirty",
                "--abbrev=40",
                "--exclude=*",
            ],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
        name = done.stdout.strip()
        if name:
            return name.removesuffix("-dirty"), name.endswith("-dirty")
    return None, None


def log_identity(cfg: Config, rt: Runtime, log: RunLog) -> None:
    """First lines of the log, first fields of the result: versions, machine, settings, code."""
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    versions |= {m.__name__: m.__version__ for m in (torch, np, sentencepiece, zstandard)}
    log.log(" ".join(f"{name}:{version}" for name, version in versions.items()))
    if not torch.__version__.startswith("2.13"):
        log.log("WARNING: tested with torch 2.13 only")
    log.log("\n".join(rt.notes))

    values = {name: getattr(cfg, field.name) for name, field in FIELDS.items()}
    changed = {
        name: as_typed(value) for name, value in values.items() if value != FIELDS[name].default
    }
    typed = shlex.join(f"{name}={text}" for name, text in changed.items())
    log.log(f"overrides: {typed or 'none'}")

    code = sha256(SCRIPT)
    commit, dirty = commit_of(SCRIPT.parent) if rt.main else (None, None)
    log.log(f"seed:{cfg.seed} code_sha256:{code} commit:{commit}{' dirty' if dirty else ''}")

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
        commit=commit,
        dirty=dirty,
        versions=versions,
        world_size=rt.world,
        resumed=bool(cfg.resume),
        machine={
            "type": rt.device.type,
            "device": rt.device_name(),
            "system": platform.platform(),
            "notes": rt.notes,
        },
    )
    log.identify(tokenizer_identity, cfg, ByteTable.load(cfg))


def build_trainer(cfg: Config, rt: Runtime, log: RunLog) -> Trainer:
    """Data, model and warmed-up (or resumed) trainer, with the log lines that say what they are."""
    with log.phase("load"):
        stream = TokenStream(shard_paths(cfg, "train"), cfg)
        log.identify(shards_identity, cfg, "train", stream.total)
        needed = cfg.iterations * cfg.micro_batches * (cfg.micro_tokens + 1)
        if cfg.schedule == "tokens" and needed > stream.total:
            again = f"the data begins again after {stream.total}"
            log.log(f"note: the run takes {needed} tokens, {again}")
    with log.phase("build"):
        trainer = Trainer(cfg, rt, log, build_model(cfg, rt), stream)
    params = sum(p.numel() for p in trainer.model.parameters())
    flops = training_flops(cfg, trainer.model)
    log.log(f"model_params:{params} training_flops_per_token:{flops:.4g}")
    log.log(
        f"train_batch_tokens:{cfg.train_batch_tokens} train_seq_len:{cfg.train_seq_len} "
        f"micro_batches:{cfg.micro_batches} iterations:{cfg.iterations} "
        f"max_wallclock_seconds:{cfg.max_wallclock_seconds:.3f}"
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
        self.predictor = Sliding(
            trainer.model, trainer.rt, "validate", cfg.score_len, cfg.score_len
        )
        self.tokens: np.ndarray | None = None

    def __call__(self, step: int) -> None:
        cfg, rt, log = self.trainer.cfg, self.trainer.rt, self.trainer.log
        if self.tokens is None:
            self.tokens = load_validation(cfg)
        seconds = self.trainer.clock.elapsed()  # without this validation's own
        score = evaluate(self.predictor, self.tokens, self.table, cfg, rt, log)
        if score:
            bpb = f"{score.label}:{score.bpb:.4f}"
            steps = f"step:{step}/{cfg.iterations}"
            log.log(f"{steps} val_loss:{score.loss:.4f} {bpb} train_time:{seconds * 1000:.0f}ms")
            log.metric(step=step, val_loss=score.loss, **{score.label: score.bpb})


def train_model(cfg: Config, rt: Runtime, log: RunLog) -> tuple[str, bytes]:
    """Trains and packs -> how training ended, and the artifact (empty if there is none)."""
    table = ByteTable.load(cfg)
    trainer = build_trainer(cfg, rt, log)
    status = train(trainer, Validator(trainer, table))
    tokens = trainer.steps_done * cfg.train_batch_tokens
    log.save(
        status=status,
        steps=trainer.steps_done,
        train_seconds=round(trainer.seconds, 3),
        train_tokens=tokens,
        train_flops=training_flops(cfg, trainer.model) * tokens,
        train_loss=trainer.clock.last.loss,
        peak_memory_bytes=rt.peak_memory(),
    )
    if status in ("diverged", "interrupted"):
        return status, b""
    if trainer.averager:
        trainer.averager.apply()
    hessians = {}
    if cfg.gptq_n_samples:
        with log.phase("calibrate"):
            hessians = collect_hessians(trainer.model, cfg, rt, trainer.stream)
    return status, pack_model(cfg, rt, log, trainer.model, hessians)


def pack_model(
    cfg: Config, rt: Runtime, log: RunLog, model: GPT, hessians: dict[str, Tensor]
) -> bytes:
    """Raw weights and artifact on disk, before anything is scored -> its bytes on every process."""
    blob = None
    code = code_size()
    cap = cfg.max_artifact_bytes
    with log.phase("pack"):
        if rt.main:
            state = {name: w.cpu() for name, w in model.state_dict().items()}
            save_torch(log.out_dir / "final_model.pt", state)
            notes = {"tokenizer": tokenizer_hash(cfg), "seed": cfg.seed}
            blob = pack(state, cfg, hessians, code, notes)
            atomic_write(log.out_dir / "model.ptz", blob)
            log.log("\n".join(size_report(blob, code, cap)))
        blob = rt.broadcast_bytes(blob)
    total = code + len(blob)
    sizes = {"code": code, "model": len(blob), "total": total, "cap": cap, "margin": cap - total}
    log.save(sizes=sizes, artifact_sha256=hashlib.sha256(blob).hexdigest())
    return blob


def score_artifact(cfg: Config, blob: bytes, rt: Runtime, log: RunLog) -> int:
    """Every scoring stage from the artifact alone, results written after each -> exit code."""
    with log.phase("unpack"):
        model = load_artifact(cfg, blob, rt)
        table = ByteTable.load(cfg)
        tokens = load_validation(cfg)
        log.identify(shards_identity, cfg, "val", len(tokens))
    true_scores: dict[str, float] = {}
    code = OK
    chosen = {name: build for name, (wanted, build) in PREDICTORS.items() if wanted(cfg)}
    for name, build in chosen.items():
        predictor = build(model, rt, cfg, table)
        state = predictor.snapshot()  # what a stage learns ends with it
        with access_watch().watching("fineweb_train") as accessed:
            score = evaluate(predictor, tokens, table, cfg, rt, log)
        with log.phase("audit"):
            checks = {}
            if score:
                checks = audit(score, predictor, tokens, table, cfg, rt, true_scores, accessed)
            predictor.restore(state)
            if score and cfg.mode == "audit":
                rescorer = Rescorer(build, model, rt, cfg, table, log)
                checks |= audit_again(rescorer, tokens, cfg, predictor)
        if score is None:
            log.result["stages"][name] = {"skipped": "MAX_EVAL_SECONDS"}
            code = code or OVER_TIME
            continue
        log_score(cfg, log, name, score, checks)
        if not score.validity:  # the last true score is the run's
            true_scores[name] = score.bpb
            log.result["result"] = {"stage": name, **score.record()}
        if any(found["verdict"].startswith("FAIL") for found in checks.values()):
            code = AUDIT_FAILED
        log.save()
    with log.phase("sample"):
        if cfg.sample_tokens:
            log.log(f"sample: {sample(model, table, cfg, rt)}")
    return code


def log_score(cfg: Config, log: RunLog, name: str, score: Score, checks: dict[str, Any]) -> None:
    """A stage's lines in the log, and its entry in the result."""
    record = score.record()
    final = f"final_{cfg.compressor}_{name}"
    mass = "" if record["normalised"] else f" vocabulary_mass:{score.mass:.2f}"
    took = f"eval_time:{score.seconds * 1000:.0f}ms"
    log.log(f"{final} val_loss:{score.loss:.4f} {score.label}:{score.bpb:.4f} {took}{mass}")
    log.log(f"{final}_exact val_loss:{score.loss:.8f} {score.label}:{score.bpb:.8f}")
    for check_name, found in checks.items():
        if found["verdict"] != "PASS":
            log.log(f"audit {name} {check_name} {found['verdict']}")
    log.result["stages"][name] = {**record, "audit": checks}


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
    train = f"train {seconds['train_side']:.1f} of {cfg.max_wallclock_seconds:.0f} s"
    scoring = f"eval {seconds['eval_side']:.1f} of {cfg.max_eval_seconds:.0f} s"
    resumed = ", resumed run" if cfg.resume else ""
    lines += [
        "seconds      " + "  ".join(f"{name} {value:.1f}" for name, value in phases.items()),
        f"budgets      {train}, {scoring}",
        f"exit code    {code} ({result['status']}{resumed})",
        "-" * 72,
    ]
    log.log("\n".join(lines))


def run_once(cfg: Config, rt: Runtime, log: RunLog) -> int:
    """One run in one mode -> its exit code."""
    log_identity(cfg, rt, log)
    if cfg.mode == "train":
        with access_watch().watching("fineweb_val") as opened:
            status, blob = train_model(cfg, rt, log)
        log.save(opened_in_training=opened)
        if not blob:
            return DIVERGED if status == "diverged" else INTERRUPTED
    else:
        blob = rt.broadcast_bytes(read_artifact(cfg) if rt.main else None)
        log.result["status"] = "finished"
    if cfg.mode == "sample":
        with log.phase("sample"):
            model = load_artifact(cfg, blob, rt)
            log.log(sample(model, ByteTable.load(cfg), cfg, rt))
        return OK
    code = score_artifact(cfg, blob, rt, log)
    if code == AUDIT_FAILED:
        return code
    if code_size() + len(blob) > cfg.max_artifact_bytes:
        return OVER_SIZE
    return OVER_TIME if over_budget(cfg, log) else code


def over_budget(cfg: Config, log: RunLog) -> bool:
    """Whether training or scoring took longer than its limit; a limit of 0 is none."""
    train_limit = cfg.max_wallclock_seconds if cfg.schedule == "clock" else 0
    late_training = 0 < train_limit < log.train_seconds()
    return late_training or 0 < cfg.max_eval_seconds < log.eval_seconds()


def guarded_run(cfg: Config, rt: Runtime) -> tuple[int, dict[str, Any]]:
    """run_once with its outcome on record, whatever happens -> exit code, result."""
    log = RunLog(Path(cfg.out_dir), rt, resumed=bool(cfg.resume))
    if cfg.smoke:
        folder = Path(cfg.out_dir).resolve() / "smoke_data"
        cfg = dataclasses.replace(cfg, data_path=str(folder))
        if rt.main:
            synthetic_shards(folder)
        rt.broadcast_bytes(b"")  # the others wait for the files
    try:
        code = run_once(cfg, rt, log)
    except InputError as error:
        log.log(f"error: {error}")
        log.result["status"] = "bad_input"
        code = BAD_INPUT
    except Exception as error:
        out_of_memory = isinstance(error, torch.OutOfMemoryError)
        if not out_of_memory and "can't allocate memory" not in str(error):
            log.save(status="crashed", exit_code=BUG)
            raise
        train_setting = f"MICRO_BATCH_TOKENS={cfg.micro_tokens} (training)"
        score_setting = f"EVAL_BATCH_TOKENS={cfg.eval_batch_tokens} (scoring)"
        log.log(f"out of memory: {error}")
        log.log(f"Lower {train_setting} or {score_setting}; no score depends on them.")
        log.result["status"] = "out_of_memory"
        code = OUT_OF_MEMORY
    log.save(exit_code=code)
    result_card(cfg, log, code)
    log.log(f"result_json: {json.dumps(log.result)}", show=False)  # so the log alone says all
    return code, log.result


def run_seeds(cfg: Config, rt: Runtime) -> int:
    """One run a seed, then mean and standard deviation of the scores -> the highest exit code."""
    codes, scores = [], []
    for seed in cfg.seeds:
        folder = f"{cfg.out_dir}/seed_{seed}"
        code, result = guarded_run(dataclasses.replace(cfg, seed=seed, out_dir=folder), rt)
        codes.append(code)
        if "val_bpb" in result.get("result", {}):
            scores.append(result["result"]["val_bpb"])
    if rt.main and scores:
        std = float(np.std(scores, ddof=1)) if len(scores) > 1 else math.nan
        statistics = f"mean:{np.mean(scores):.6f} std:{std:.6f} n:{len(scores)}"
        print(f"seeds:{as_typed(cfg.seeds)} val_bpb {statistics}")
    return max(codes)


def main(argv: Sequence[str], env: Mapping[str, str]) -> int:
    """Runs the program -> its exit code."""
    if "--help" in argv or "-h" in argv:
        print(help_text())
        return OK
    try:
        hint = "settings are environment variables (--help)"
        raise_if([f"unknown argument {arg!r}: {hint}" for arg in argv])
        cfg = load_config(env)
        with contextlib.closing(Runtime(cfg, env)) as rt:
            run_id = cfg.run_id or time.strftime(f"%Y%m%d_%H%M%S_{os.getpid()}")
            run_id = rt.broadcast_bytes(run_id.encode()).decode()
            out_dir = cfg.out_dir or f"logs/{run_id}"
            cfg = dataclasses.replace(cfg, run_id=run_id, out_dir=out_dir)
            if cfg.mode != "train":
                cfg = settings_of_artifact(cfg, env)
            return run_seeds(cfg, rt) if cfg.seeds else guarded_run(cfg, rt)[0]
    except InputError as error:
        print(error, file=sys.stderr)
        return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
