"""Bits a byte that need no network: what counts and general compressors make of a validation text.

    CONFIG=records/track_cpu_1mb/demo/config.env python tests/bench/reference_points.py

Of the settings' data: a unigram and an interpolated bigram of the first training shard (absolute
discounting, fixed once counted), on all validation targets; xz and bzip2, at their best, on the
validation text itself.
"""

from __future__ import annotations

import bz2
import lzma
import os
from collections.abc import Iterator, Sequence

import numpy as np
from command import options_of, run, tg

DISCOUNT = 0.75
XZ_BEST = 9 | lzma.PRESET_EXTREME


def unigram(train: np.ndarray, vocab: int) -> np.ndarray:
    """p of every token [V]; what never came counts as half a time."""
    counts = np.maximum(np.bincount(train, minlength=vocab), 0.5)
    return counts / counts.sum()


def bigram_nats(train: np.ndarray, val: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Nats of val[1:], each after the token before it; below: p of every token [V]."""
    vocab = len(below)
    keys = train[:-1].astype(np.int64) * vocab
    keys += train[1:]
    pairs = np.bincount(keys, minlength=vocab**2).reshape(vocab, vocab)
    before, target = val[:-1], val[1:]
    total = pairs.sum(1)[before]
    different = np.count_nonzero(pairs, 1)[before]
    base = below[target]
    p = np.maximum(pairs[before, target] - DISCOUNT, 0)
    p += DISCOUNT * different * base
    return -np.log(np.where(total > 0, p / np.maximum(total, 1), base))


def reference_points(cfg: tg.Config) -> Iterator[tuple[str, float]]:
    """Name and bpb of each."""
    table = tg.ByteTable.load(cfg)
    train = tg.read_shard(tg.shard_paths(cfg, "train")[0])
    val = tg.load_validation(cfg)
    size = int(tg.load_charges(cfg, table, val).sum(dtype=np.int64))
    p = unigram(train, cfg.vocab_size)
    text = table.decode(val[val != cfg.bos_id])
    bits = {
        "token unigram": -np.log2(p[val[1:]]).sum(),
        "token bigram, interpolated": bigram_nats(train, val, p).sum() / np.log(2),
        "xz -9e": 8 * len(lzma.compress(text, preset=XZ_BEST)),
        "bzip2 -9": 8 * len(bz2.compress(text, 9)),
    }
    for name, total in bits.items():
        yield name, total / size


def main(arguments: Sequence[str]) -> None:
    options_of(arguments, (), __doc__)
    for name, bpb in reference_points(tg.load_config(os.environ)):
        print(f"{name:28} {bpb:.3f}")


if __name__ == "__main__":
    run(main)
