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

import functools
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from command import ROOT, followed, options_of, run, tg, whole_number

VOCAB = 1024
COUNTED = (range(1, 8), tg.NGRAM_ORDERS)  # exactly
SYSTEMS = {  # name -> folder of the published settings
    "PR 740 v1 (order 5, weight 0.2)": "2026-03-25_pr740_v1",
    "PR 740 v2 (orders 2-7, backoff)": "2026-03-25_pr740_v2",
    "PR 859 (orders 2-7, chunk 32,768)": "2026-03-26_pr859",
}


def gated(ratios: np.ndarray) -> np.ndarray:
    """PR 859's gate as its logs show it: the highest order that counts."""
    p = np.full(ratios.shape[1], 1 / VOCAB)
    for row in ratios:  # a higher order takes over
        p = np.where(row < 0, p, row)
    return 0.05 / VOCAB + 0.95 * p


def weight(cfg: tg.Config) -> float:
    """Of PR 740's caches over a uniform network."""
    if cfg.ngram == "fixed":
        return cfg.ngram_alpha
    doubt = 1 / (1 + np.exp(-2 * (np.log(VOCAB) - 4)))
    return cfg.ngram_ent_base + cfg.ngram_ent_range * doubt


def charged(ratios: np.ndarray, cfg: tg.Config) -> np.ndarray:
    """Bits a token, with a uniform network, for ratios [K, n] of a cache's orders."""
    if cfg.ngram == "gated":
        p = gated(ratios)
    else:
        alpha = weight(cfg)
        ratio = ratios.max(0)
        mixed = (1 - alpha) / VOCAB + alpha * ratio
        p = np.where(ratio < 0, 1 / VOCAB, mixed)
    return -np.log2(np.clip(p, 1e-12, 1))


def mass(counts: tg.HashedCounts, cfg: tg.Config) -> float:
    """What the same rule charges to all 1,024 tokens together, averaged over 64 late positions."""
    n = counts.own.shape[1]
    index = np.linspace(int(0.9 * n), n - 1, 64).astype(int)
    vocabulary = torch.arange(VOCAB).expand(64, -1)
    every = counts.ratios_of(index, vocabulary).numpy()  # [64, V, K]
    ratios = np.moveaxis(every, -1, 0).reshape(len(counts.orders), -1)  # [K, 64 V]
    p = 2.0 ** -charged(ratios, cfg)
    return float(p.reshape(64, VOCAB).sum(1).mean())


def noisy(path: Path, n: int) -> np.ndarray:
    """A shard's tokens, repeated up to n, every twentieth random."""
    rng = np.random.default_rng(0)
    text = np.resize(tg.read_shard(path), n).astype(np.uint16)
    noise = rng.random(n) < 0.05
    text[noise] = rng.integers(0, VOCAB, noise.sum())
    return text


def exact_rate(text: np.ndarray, orders: Sequence[int]) -> float:
    """Tokens a second."""
    start = time.perf_counter()
    for _ in tg.causal_counts(text, orders):
        pass
    return len(text) / (time.perf_counter() - start)


def exact_memory(text: np.ndarray, orders: Sequence[int]) -> int:
    """Peak bytes beyond the arrays that are yielded."""
    peak = 0
    tracemalloc.start()
    for _, *arrays in tg.causal_counts(text, orders):
        yielded = sum(array.nbytes for array in arrays)
        peak = max(peak, tracemalloc.get_traced_memory()[1] - yielded)
        del arrays
        tracemalloc.reset_peak()
    tracemalloc.stop()
    return peak


def hashed(cfg: tg.Config, stream: np.ndarray) -> tuple[tg.HashedCounts, float]:
    """Counts of a stream, and tokens a second."""
    counts = tg.HashedCounts(cfg, tg.Runtime(tg.Config(device="cpu"), {}))
    n = len(stream) - 1
    start = time.perf_counter()
    counts.prepare(stream, tg.Windows(n, cfg.score_len, cfg.ngram_stride or cfg.stride))
    return counts, n / (time.perf_counter() - start)


def show_exact(orders: Sequence[int], text: np.ndarray) -> None:
    """How fast exact counts are, and what memory they take."""
    rate = exact_rate(text, orders)
    beyond = exact_memory(text, orders) / len(text)
    print(
        f"exact, orders {', '.join(map(str, orders)):30} {rate / 1e6:5.2f} M tokens/s on text, "
        f"{beyond:4.1f} bytes a token beyond what is yielded",
        flush=True,
    )


def show_cache(name: str, zipf: np.ndarray, noise: np.ndarray) -> None:
    """How fast a system's cache counts, and what it charges for noise."""
    config = ROOT / "records/track_10min_16mb" / SYSTEMS[name] / "config.env"
    cfg = tg.load_config({"CONFIG": str(config)})
    _, on_text = hashed(cfg, zipf)
    counts, on_noise = hashed(cfg, noise)
    bits = charged(counts.own, cfg)
    tenth = len(bits) // 10
    first = bits[:tenth].mean()
    last = bits[-tenth:].mean()
    print(
        f"{name:36} {on_text / 1e6:5.2f} M tokens/s on Zipf text, {on_noise / 1e6:5.2f} on "
        f"random tokens; random tokens: {bits.mean():6.3f} bits (first tenth {first:6.3f}, "
        f"last {last:6.3f}), mass {mass(counts, cfg):6.1f}",
        flush=True,
    )


def main(arguments: list[str]) -> None:
    options = options_of(arguments, ("TOKENS", "TEXT"), __doc__)
    n = whole_number("TOKENS", options.get("TOKENS", "10000000"), least=1000)
    machine = tg.Runtime(tg.Config(device="cpu"), {}).device_name()
    print(f"{machine} numpy {np.__version__}; {n} tokens")
    demo = "data/datasets/sotu_sp1024/fineweb_train_000000.bin"
    text = noisy(Path(options.get("TEXT") or tg.find_path(demo)), n)
    noise = np.random.default_rng(0).integers(0, VOCAB, n + 1).astype(np.uint16)
    ranks = np.random.default_rng(1).zipf(1.3, n + 1) - 1
    zipf = np.minimum(ranks, VOCAB - 1).astype(np.uint16)
    shown = [functools.partial(show_exact, orders, text) for orders in COUNTED]
    shown += [functools.partial(show_cache, name, zipf, noise) for name in SYSTEMS]
    for show in followed(shown, "measurements"):
        show()


if __name__ == "__main__":
    torch.set_num_threads(2)
    run(main)
