"""What case transforms are worth: tokens and bytes a token, and bpb of small models.

On the original bytes, of held-out documents.

    python tests/bench/case_transforms.py counts demo
    python tests/bench/case_transforms.py counts held_out.jsonl train.jsonl
    python tests/bench/case_transforms.py models demo --work FOLDER --seeds 1 2 3 --jobs 2

Training text may be a shard: fineweb_train_000000.bin@TOKENIZER.model, whose documents are decoded.
`counts` trains tokenizers of 1,024 and 8,192 pieces on the same documents, none of which is
skipped for its length. `models` exports each form with 1,024 pieces, trains the shape of
records/track_cpu_1mb/demo on each (the same tokens and FLOPs, so of forms with more tokens less
text), and scores streams of 256. Intervals hold 95 % of 10,000 resamples of the documents (of the
demo: of its speeches), seeds averaged. What is in FOLDER already is not made again.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from command import ROOT, followed, run, tg  # data/ is on the path from here on
from corpora import demo_documents, read_documents
from export import bos_of, train_tokenizer
from scores import Bench, interval, parted

FORMS = ("", *tg.CASE_TRANSFORMS)
SHAPE = ROOT / "records/track_cpu_1mb/demo/config.env"
LONGEST = 1 << 30  # bytes of a document that trains a tokenizer


def texts_in(source: str) -> list[str]:
    """Documents of a .jsonl or .txt file, or of SHARD@TOKENIZER."""
    path, _, model = source.partition("@")
    if not model:
        return list(read_documents(Path(path)))
    table = tg.ByteTable.from_sentencepiece(model)
    tokens = np.asarray(tg.read_shard(path))
    parts = np.split(tokens, np.flatnonzero(tokens == bos_of(table)))
    return [table.decode(part).decode() for part in parts if len(part) > 1]


def documents(sources: list[str]) -> dict[str, list[str]]:
    """Split -> documents: of the demo, or of held-out and training files."""
    if sources == ["demo"]:
        return demo_documents()
    val, *train = sources
    return {"val": texts_in(val), "train": [text for name in train for text in texts_in(name)]}


def counts(texts: dict[str, list[str]]) -> None:
    """Prints held-out tokens and bytes a token, by vocabulary and form."""
    raw = sum(len(text.encode()) for text in texts["val"])
    print(f"{len(texts['val'])} held-out documents of {raw} bytes")
    print("pieces  form     tokens   bytes a token")
    rows = list(itertools.product((1024, 8192), FORMS))
    for size, form in followed(rows, "tokenizers"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "t.model")
            train_tokenizer(texts["train"], size, path, LONGEST, form)
            table = tg.ByteTable.from_sentencepiece(path, form)
        tokens = sum(len(table.encode(text)) for text in texts["val"])
        print(f"{size:6}  {form or 'plain':7}  {tokens:7}  {raw / tokens:.4f}", flush=True)


@dataclasses.dataclass(frozen=True)
class Trial:
    """A form and a seed, below a folder."""

    work: Path
    form: str
    seed: int

    @property
    def name(self) -> str:
        return self.form or "plain"

    @property
    def out(self) -> Path:
        return self.work / f"{self.name}_{self.seed}"

    def settings(self) -> dict[str, str]:
        """The shape's settings but for scoring, on the form's shards."""
        shape = tg.read_config_lines(SHAPE.read_text(), str(SHAPE))
        _, kept = parted({one.name: one.text for one in shape})
        data = {
            "DATA_PATH": str(self.work / "datasets" / self.name),
            "TOKENIZER_PATH": str(self.work / "tokenizers" / f"{self.name}_bpe.model"),
            "OUT_DIR": str(self.out),
            "SEED": str(self.seed),
        }
        return {**kept, **data, "EVAL_PLAIN": "0", "EVAL_STRIDE": "0", "EVAL_STREAM": "256"}

    def train(self, threads: int) -> None:
        """Writes the artifact, unless it is there."""
        if not (self.out / "model.ptz").exists():
            env = {**os.environ, **self.settings(), "OMP_NUM_THREADS": str(threads)}
            command = [sys.executable, str(tg.SCRIPT)]
            subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)

    def bits_and_bytes(self, clusters: str) -> tuple[np.ndarray, np.ndarray]:
        """Of each held-out document, or of each speech."""
        env = {**self.settings(), "MODE": "eval", "ARTIFACT": str(self.out / "model.ptz")}
        bench = Bench(env, clusters)
        scorer = bench.scorer("streaming", bench.cfg)
        score = bench.evaluated(scorer, bench.cfg, silent=True)
        return bench.by_cluster(score.nats) / math.log(2), bench.sizes


def export_form(texts: dict[str, list[str]], form: str, work: Path) -> None:
    """The documents as shards of that form, with a tokenizer of their own."""
    files = []
    for split in ("val", "train"):
        files.append(str(work / f"{split}.jsonl"))
        lines = [json.dumps({"text": text}) for text in texts[split]]
        Path(files[-1]).write_text("\n".join(lines))
    command = [sys.executable, str(ROOT / "data/prepare.py"), "export", *files]
    command += ["--val-docs", str(len(texts["val"])), "--name", form or "plain"]
    command += ["--root", str(work), "--max-sentence-length", str(LONGEST)]
    command += ["--transform", form] if form else []
    subprocess.run(command, check=True)


def models(
    texts: dict[str, list[str]], work: Path, seeds: list[int], jobs: int, clusters: str
) -> None:
    """Trains and scores every form with every seed; prints bpb and gains."""
    work.mkdir(parents=True, exist_ok=True)
    for form in followed(FORMS, "forms exported"):
        export_form(texts, form, work)
    trials = [Trial(work, form, seed) for seed in seeds for form in FORMS]
    threads = max(1, os.cpu_count() // jobs)
    with ThreadPoolExecutor(jobs) as pool:
        trained = pool.map(lambda trial: trial.train(threads), trials)
        for _ in followed(trained, "trainings", len(trials)):
            pass
    bits = {form: [] for form in FORMS}
    sizes = {}  # form -> bytes charged by cluster
    for trial in followed(trials, "scores"):
        found, sizes[trial.form] = trial.bits_and_bytes(clusters)
        bits[trial.form].append(found)
    means = {form: np.mean(bits[form], 0) for form in FORMS}
    text = sizes["caseops"]  # original bytes: of the plain form, normalised
    print("form     bpb of each seed            mean      against plain, its interval")
    for form in FORMS:
        each = [found.sum() / text.sum() for found in bits[form]]
        told = " ".join(f"{bpb:.5f}" for bpb in each)
        gains = means[""] - means[form]
        low, high = interval(gains, text)
        print(
            f"{form or 'plain':7}  {told}  {np.mean(each):.5f}  {gains.sum() / text.sum():+.5f} "
            f"({low:+.5f} to {high:+.5f})"
        )


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("counts", "models"))
    parser.add_argument("sources", nargs="+", help="demo, or held-out and training files")
    parser.add_argument("--work", type=Path, default=Path("logs/case_transforms"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    args = parser.parse_args(arguments)
    texts = documents(args.sources)
    if args.what == "counts":
        counts(texts)
    else:
        clusters = "speeches" if args.sources == ["demo"] else "documents"
        models(texts, args.work.resolve(), args.seeds, args.jobs, clusters)


if __name__ == "__main__":
    run(main)
