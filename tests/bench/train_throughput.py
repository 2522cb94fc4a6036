"""Training throughput: tokens per second, where a step's time goes, share of the matmul rate.

    python tests/bench/train_throughput.py      # 4 layers x 256, sequence 512, 8,192 tokens a step
    python tests/bench/train_throughput.py MODEL_DIM=128 NUM_LAYERS=8 COMPILE=1

The matmul rate is this machine's. Every figure is a ratio to a 2048^3 float32 product measured in
the same process, before every step (best of five), so that a machine whose speed drifts does not
change the result. FLOPs are counted: 6 per multiply-accumulate parameter and token, the causal half
of attention, and Newton-Schulz.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt as tg

DEFAULTS = dict(
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
STEPS, UNMEASURED = 12, 3


def matmul_rate(size: int = 2048) -> float:
    """FLOP/s of a float32 product, best of five."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = min(timed(lambda: torch.mm(a, b)) for _ in range(5))
    return 2 * size**3 / best


def timed(action) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def newton_schulz_flops(model: tg.GPT, cfg: tg.Config) -> float:
    total = 0.0
    for _, p in tg.parameter_groups(model, cfg)["matrices"]:
        small, large = sorted(p.shape)
        total += cfg.muon_backend_steps * (4 * small * small * large + 2 * small**3)
    return total


def shards(folder: Path, cfg: tg.Config) -> tg.TokenStream:
    """Zipf-distributed tokens: the loader reads a real file."""
    tokens = np.minimum(np.random.default_rng(0).zipf(1.2, 4_000_000) - 1, 1023)
    tg.write_shard(folder / "fineweb_train_000000.bin", tokens)
    return tg.TokenStream([folder / "fineweb_train_000000.bin"], cfg)


def parts_of_a_step(trainer: tg.Trainer) -> dict[str, float]:
    """Seconds of loader, forward, backward and optimizer of one step.

    Each is finished before the next begins.
    """
    cfg, rt = trainer.cfg, trainer.rt
    batches, losses, seconds = [], [], {}
    units = [trainer.steps_done * cfg.micro_batches + i for i in range(cfg.micro_batches)]
    seconds["loader"] = timed(
        lambda: batches.extend([*map(rt.put, trainer.stream.batch(u))] for u in units)
    )
    trainer.gradients.zero_()
    seconds["forward"] = timed(
        lambda: losses.extend(
            trainer.compiled_model(*batch, None, trainer.context) for batch in batches
        )
    )
    seconds["backward"] = timed(lambda: [loss.backward() for loss in losses])
    seconds["optimizer"] = timed(lambda: [optimizer.step() for optimizer in trainer.optimizers])
    return seconds


def main(arguments: list[str]) -> None:
    cfg = tg.load_config({**DEFAULTS, **dict(argument.split("=", 1) for argument in arguments)})
    rt = tg.Runtime(cfg, {})
    with tempfile.TemporaryDirectory() as folder:
        model = tg.build_model(cfg, rt)
        trainer = tg.Trainer(
            cfg, rt, tg.RunLog(Path(folder) / "out", rt), model, shards(Path(folder), cfg)
        )
        flops = tg.training_flops(cfg, model) * cfg.train_batch_tokens + newton_schulz_flops(
            model, cfg
        )
        shares, rates, parts = [], [], []
        for step in range(STEPS + UNMEASURED):
            peak = matmul_rate()
            seconds = timed(lambda: trainer.step(trainer.stream.batch, cfg.iterations))
            trainer.steps_done += 1
            if step >= UNMEASURED:
                shares.append(flops / seconds / peak)
                rates.append(cfg.train_batch_tokens / seconds)
                parts.append(parts_of_a_step(trainer))
    print(f"{rt.device_name()} torch {torch.__version__} compile={rt.compiles}")
    print(
        f"{cfg.num_layers} layers x {cfg.model_dim}, {cfg.num_heads}/{cfg.num_kv_heads} heads, "
        f"sequence {cfg.train_seq_len}, {cfg.train_batch_tokens} tokens a step: {flops / 1e9:.1f} "
        "GFLOP a step"
    )
    print(f"tokens/s   median {statistics.median(rates):.0f}  best {max(rates):.0f}")
    print(
        f"share of the 2048^3 matmul rate   median {statistics.median(shares):.3f}  best "
        f"{max(shares):.3f}"
    )
    total = sum(statistics.median(part[name] for part in parts) for name in parts[0])
    for name in parts[0]:
        part = statistics.median(p[name] for p in parts)
        print(f"  {name:10} {part * 1000:8.1f} ms  {100 * part / total:5.1f} %")


if __name__ == "__main__":
    main(sys.argv[1:])
