"""How fast n-grams are counted, exactly and hashed, and what hashed caches "score" on noise.

    python tests/bench/hashed_caches.py                     # 10 M tokens; hashed: 4 M buckets
    python tests/bench/hashed_caches.py TOKENS=2000000      # quicker
    python tests/bench/hashed_caches.py TEXT=shard.bin      # instead of the demo's shard

The hashed orders are 2-7; TEXT is the text for the exact counts.
In noise nothing can be predicted. First the exact counts, on a real text repeated up to the length
with every twentieth token random; peak memory is what numpy held beyond the arrays that were
yielded. Then the caches: tokens per second of the counting alone (the network excluded), for the
three rules, in one process and two threads. Then uniform random tokens: each costs exactly 10 bits
under every true model, so whatever a cache charges less is no prediction. The network is replaced
by the uniform distribution over 1,024 tokens. "mass" is what the charged values add up to over the
vocabulary (1 for a probability), at 64 positions of the last tenth.
"""

import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt as tg

VOCAB = 1024
PRIMES_859 = (36313, 27191, 51647, 81929, 131071, 174763, 233017)
SYSTEMS = {  # windows of 2,048 as published; stride, buckets, chunk of each system
    "PR 740 v1 (order 5, weight 0.2)": (
        dict(ngram="fixed", ngram_order=5, ngram_min_order=5, ngram_alpha=0.2),
        128,
    ),
    "PR 740 v2 (orders 2-7, backoff)": (dict(ngram="backoff"), 128),
    "PR 859 (orders 2-7, chunk 32,768)": (
        dict(
            ngram="gated",
            mixer_head=True,
            ngram_buckets=2**20,
            ngram_primes=PRIMES_859,
            ngram_chunk_tokens=32768,
        ),
        32,
    ),
}


def charged(ratios: np.ndarray, cfg: tg.Config) -> np.ndarray:
    """Bits a token, with a uniform network, for ratios [K, n] of a cache's orders.

    PR 859's gate as its logs show it: the highest order that counts.
    """
    p = np.full(ratios.shape[1], 1 / VOCAB)
    if cfg.ngram == "gated":
        for row in ratios:  # a higher order takes over
            p = np.where(row < 0, p, row)
        p = 0.05 / VOCAB + 0.95 * p
    else:
        entropy = np.log(VOCAB)  # of the uniform network
        alpha = (
            cfg.ngram_alpha
            if cfg.ngram == "fixed"
            else cfg.ngram_ent_base + cfg.ngram_ent_range / (1 + np.exp(-2 * (entropy - 4)))
        )
        ratio = ratios.max(0)
        p = np.where(ratio < 0, p, (1 - alpha) * p + alpha * ratio)
    return -np.log2(np.clip(p, 1e-12, 1))


def mass(counts: tg.HashedCounts, cfg: tg.Config) -> float:
    """What the same rule charges to all 1,024 tokens together, averaged over 64 late positions."""
    n = counts.own.shape[1]
    index = np.linspace(int(0.9 * n), n - 1, 64).astype(int)
    every = counts.ratios_of(index, torch.arange(VOCAB).expand(64, -1)).numpy()  # [64, V, K]
    every = np.moveaxis(every, -1, 0).reshape(len(counts.orders), -1)  # [K, 64 V]
    return float((2.0 ** -charged(every, cfg)).reshape(64, VOCAB).sum(1).mean())


def exact(n: int, path: Path) -> None:
    """Speed and peak memory of the exact counts."""
    text, rng = np.resize(tg.read_shard(path), n).astype(np.uint16), np.random.default_rng(0)
    noise = rng.random(n) < 0.05
    text[noise] = rng.integers(0, VOCAB, noise.sum())
    for orders in (range(1, 8), tg.NGRAM_ORDERS):
        start = time.perf_counter()
        for _ in tg.causal_counts(text, orders):
            pass
        rate, peak = n / (time.perf_counter() - start), 0
        tracemalloc.start()
        for _, *arrays in tg.causal_counts(text, orders):
            peak = max(
                peak, tracemalloc.get_traced_memory()[1] - sum(array.nbytes for array in arrays)
            )
            del arrays, _
            tracemalloc.reset_peak()
        tracemalloc.stop()
        print(
            f"exact, orders {', '.join(map(str, orders)):30} {rate / 1e6:5.2f} M tokens/s on text, "
            f"{peak / n:4.1f} bytes a token beyond what is yielded"
        )


def main(arguments: list[str]) -> None:
    options = dict(argument.split("=", 1) for argument in arguments)
    n = int(options.get("TOKENS", 10_000_000))
    print(
        f"{tg.Runtime(tg.Config(device='cpu'), {}).device_name()} numpy {np.__version__}; {n} "
        "tokens"
    )
    exact(
        n,
        Path(
            options.get("TEXT")
            or tg.find_path("data/datasets/sotu_sp1024/fineweb_train_000000.bin")
        ),
    )
    tokens = np.random.default_rng(0).integers(0, VOCAB, n + 1).astype(np.uint16)
    text = np.minimum(np.random.default_rng(1).zipf(1.3, n + 1) - 1, VOCAB - 1).astype(np.uint16)
    for name, (settings, stride) in SYSTEMS.items():
        cfg = tg.Config(**settings)
        windows = tg.Windows(n, 2048, stride)
        rates = []
        for stream in (text, tokens):
            start = time.perf_counter()
            counts = tg.HashedCounts(cfg, tg.Runtime(tg.Config(device="cpu"), {}))
            counts.prepare(stream, windows)
            rates.append(n / (time.perf_counter() - start))
        bits = charged(counts.own, cfg)
        print(
            f"{name:36} {rates[0] / 1e6:5.2f} M tokens/s on Zipf text, {rates[1] / 1e6:5.2f} on "
            f"random tokens; random tokens: {bits.mean():6.3f} bits (first tenth "
            f"{bits[: n // 10].mean():6.3f}, last {bits[-n // 10 :].mean():6.3f}), mass "
            f"{mass(counts, cfg):6.1f}"
        )


if __name__ == "__main__":
    torch.set_num_threads(2)
    main(sys.argv[1:])
