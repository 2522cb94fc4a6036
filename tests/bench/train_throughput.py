"""Training throughput: tokens per second, where a step's time goes, share of the matmul rate.

    python tests/bench/train_throughput.py      # 4 layers x 256, sequence 512, 8,192 tokens a step
    python tests/bench/train_throughput.py MODEL_DIM=128 NUM_LAYERS=8 COMPILE=1

The matmul rate is this machine's. Every figure is a ratio to a 2048^3 float32 product measured in
the same process, before every step (best of five), so that a machine whose speed drifts does not
change the result. FLOPs are counted: 6 per multiply-accumulate parameter and token, the causal half
of attention, and Newton-Schulz.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from command import options_of, run, tg

DEFAULTS = dict(
    DEFAULTS="baseline",
    NUM_LAYERS="4",
    MODEL_DIM="256",
    MLP_MULT="2",
    NUM_HEADS="8",
    NUM_KV_HEADS="4",
    TRAIN_SEQ_LEN="512",
    TRAIN_BATCH_TOKENS="8192",
    MICRO_BATCH_TOKENS="8192",
    VOCAB_SIZE="1024",
    DEVICE="cpu",
)
STEPS = 12
UNMEASURED = 3  # at the start


def matmul_rate(size: int = 2048) -> float:
    """FLOP/s of a float32 product, best of five."""
    a = torch.randn(size, size)
    b = torch.randn(size, size)
    best = min(timed(torch.mm, a, b) for _ in range(5))
    return 2 * size**3 / best


def timed(action: Callable, *arguments: Any) -> float:
    """Seconds of action(*arguments)."""
    start = time.perf_counter()
    action(*arguments)
    return time.perf_counter() - start


def newton_schulz_flops(model: tg.GPT, cfg: tg.Config) -> float:
    total = 0.0
    for _, p in tg.parameter_groups(model, cfg)["matrices"]:
        small, large = sorted(p.shape)
        total += cfg.muon_backend_steps * (4 * small * small * large + 2 * small**3)
    return total


def shards(folder: Path, cfg: tg.Config) -> tg.TokenStream:
    """Zipf-distributed tokens: the loader reads a real file."""
    path = folder / tg.shard_name("train", 0)
    ranks = np.random.default_rng(0).zipf(1.2, 4_000_000)
    tg.write_shard(path, np.minimum(ranks - 1, cfg.vocab_size - 1))
    return tg.TokenStream([path], cfg)


class Parts:
    """A step in parts: each is finished before the next begins."""

    def __init__(self, trainer: tg.Trainer):
        self.trainer = trainer
        self.batches: list[list[torch.Tensor]] = []
        self.losses: list[torch.Tensor] = []

    def loader(self) -> None:
        trainer = self.trainer
        count = trainer.cfg.micro_batches
        for unit in range(trainer.steps_done * count, (trainer.steps_done + 1) * count):
            self.batches.append([*map(trainer.rt.put, trainer.stream.batch(unit))])

    def forward(self) -> None:
        trainer = self.trainer
        for ids, targets in self.batches:
            context = trainer.context
            if context is None:
                context = trainer.packed_context(ids.cpu().numpy())
            self.losses.append(trainer.compiled_model(ids, targets, None, context))

    def backward(self) -> None:
        for loss in self.losses:
            loss.backward()

    def optimizer(self) -> None:
        for optimizer in self.trainer.optimizers:
            optimizer.step()

    def seconds(self) -> dict[str, float]:
        self.trainer.gradients.zero_()
        parts = (self.loader, self.forward, self.backward, self.optimizer)
        return {part.__name__: timed(part) for part in parts}


def measured(trainer: tg.Trainer, flops: float) -> Iterator[tuple[float, float, dict[str, float]]]:
    """Share of the matmul rate, tokens a second and seconds of the parts, step by step."""
    cfg = trainer.cfg
    for step in range(STEPS + UNMEASURED):
        peak = matmul_rate()
        seconds = timed(trainer.step, trainer.stream.batch, cfg.iterations, 0.0)
        trainer.steps_done += 1
        if step >= UNMEASURED:
            rate = cfg.train_batch_tokens / seconds
            yield flops / seconds / peak, rate, Parts(trainer).seconds()


def show(name: str, values: Sequence[float], form: str) -> None:
    median = format(statistics.median(values), form)
    best = format(max(values), form)
    print(f"{name}   median {median}  best {best}")


def main(arguments: list[str]) -> None:
    given = options_of(arguments, (), __doc__, settings=True)
    cfg = tg.load_config({**DEFAULTS, **given})
    rt = tg.Runtime(cfg, {})
    with tempfile.TemporaryDirectory() as folder:
        model = tg.build_model(cfg, rt)
        log = tg.RunLog(Path(folder) / "out", rt)
        trainer = tg.Trainer(cfg, rt, log, model, shards(Path(folder), cfg))
        flops = tg.training_flops(cfg, model) * cfg.train_batch_tokens
        flops += newton_schulz_flops(model, cfg)
        shares, rates, parts = zip(*measured(trainer, flops))
    print(f"{rt.device_name()} torch {torch.__version__} compile={rt.compiles}")
    print(
        f"{cfg.num_layers} layers x {cfg.model_dim}, {cfg.num_heads}/{cfg.num_kv_heads} heads, "
        f"sequence {cfg.train_seq_len}, {cfg.train_batch_tokens} tokens a step: {flops / 1e9:.1f} "
        "GFLOP a step"
    )
    show("tokens/s", rates, ".0f")
    show("share of the 2048^3 matmul rate", shares, ".3f")
    medians = {name: statistics.median(part[name] for part in parts) for name in parts[0]}
    total = sum(medians.values())
    for name, seconds in medians.items():
        print(f"  {name:10} {seconds * 1000:8.1f} ms  {100 * seconds / total:5.1f} %")


if __name__ == "__main__":
    run(main)
