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
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from scores import interval, speeches

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
import corpora  # noqa: E402
import export  # noqa: E402

import train_gpt as tg  # noqa: E402

FORMS = ("", *tg.CASE_TRANSFORMS)
SHAPE = ROOT / "records/track_cpu_1mb/demo/config.env"
LONGEST = 1 << 30  # bytes of a document that trains a tokenizer


def texts_in(source: str) -> list[str]:
    """Documents of a .jsonl or .txt file, or of SHARD@TOKENIZER."""
    path, _, model = source.partition("@")
    if not model:
        return list(corpora.read_documents(Path(path)))
    table = tg.ByteTable.from_sentencepiece(model)
    tokens = np.asarray(tg.read_shard(path))
    parts = np.split(tokens, np.flatnonzero(tokens == export.bos_of(table)))
    return [table.decode(part).decode() for part in parts if len(part) > 1]


def documents(sources: list[str]) -> dict[str, list[str]]:
    """Split -> documents: of the demo, or of held-out and training files."""
    if sources == ["demo"]:
        return corpora.demo_documents()
    val, *train = sources
    return {"val": texts_in(val), "train": [text for name in train for text in texts_in(name)]}


def counts(texts: dict[str, list[str]]) -> None:
    """Prints held-out tokens and bytes a token, by vocabulary and form."""
    raw = sum(len(text.encode()) for text in texts["val"])
    print(f"{len(texts['val'])} held-out documents of {raw} bytes")
    print("pieces  form     tokens   bytes a token")
    for size in (1024, 8192):
        for form in FORMS:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "t.model")
                export.train_tokenizer(texts["train"], size, path, LONGEST, form)
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
        lines = [line.partition("=") for line in SHAPE.read_text().splitlines() if "=" in line]
        shape = {name: value for name, _, value in lines if name in tg.FIELDS}
        kept = {n: v for n, v in shape.items() if tg.FIELDS[n].metadata["group"] != "score"}
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

    def bits_and_bytes(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each held-out document."""
        env = {**self.settings(), "MODE": "eval", "ARTIFACT": str(self.out / "model.ptz")}
        cfg = tg.settings_of_artifact(tg.load_config(env), env)
        rt = tg.Runtime(cfg, {})
        table = tg.ByteTable.load(cfg)
        tokens = tg.load_validation(cfg)
        sizes = tg.load_charges(cfg, table, tokens)
        model = tg.load_artifact(cfg, tg.read_artifact(cfg), rt)
        scorer = tg.STAGES["streaming"].build(model, rt, cfg, table)
        with tempfile.TemporaryDirectory() as folder:
            log = tg.RunLog(Path(folder), rt, silent=True)
            score = tg.evaluate(scorer, tokens, table, cfg, rt, log, sizes)
        # A target that is a document start is the next document's, as its text is.
        starts = np.flatnonzero(tokens == cfg.bos_id)
        edges = np.maximum(starts - 1, 0)
        bits = score.nats.astype(np.float64) / np.log(2)
        return np.add.reduceat(bits, edges), np.add.reduceat(sizes.astype(np.float64), edges)


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
    texts: dict[str, list[str]], work: Path, seeds: list[int], jobs: int, demo: bool
) -> None:
    """Trains and scores every form with every seed; prints bpb and gains."""
    work.mkdir(parents=True, exist_ok=True)
    for form in FORMS:
        export_form(texts, form, work)
    trials = [Trial(work, form, seed) for seed in seeds for form in FORMS]
    threads = max(1, os.cpu_count() // jobs)
    with ThreadPoolExecutor(jobs) as pool:
        for _ in pool.map(lambda trial: trial.train(threads), trials):
            pass
    bits = {form: [] for form in FORMS}
    sizes = {}  # form -> bytes charged by document
    for trial in trials:
        found, sizes[trial.form] = trial.bits_and_bytes()
        bits[trial.form].append(found)
    group = speeches(len(texts["val"])) if demo else np.arange(len(texts["val"]))
    clustered = {form: np.bincount(group, np.mean(bits[form], 0)) for form in FORMS}
    text = np.bincount(group, sizes["caseops"])  # original bytes: of the plain form, normalised
    print("form     bpb of each seed            mean      against plain, its interval")
    for form in FORMS:
        each = [found.sum() / text.sum() for found in bits[form]]
        told = " ".join(f"{bpb:.5f}" for bpb in each)
        gains = clustered[""] - clustered[form]
        low, high = interval(gains, text)
        print(
            f"{form or 'plain':7}  {told}  {np.mean(each):.5f}  {gains.sum() / text.sum():+.5f} "
            f"({low:+.5f} to {high:+.5f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("counts", "models"))
    parser.add_argument("sources", nargs="+", help="demo, or held-out and training files")
    parser.add_argument("--work", type=Path, default=Path("logs/case_transforms"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    args = parser.parse_args()
    texts = documents(args.sources)
    if args.what == "counts":
        counts(texts)
    else:
        models(texts, args.work.resolve(), args.seeds, args.jobs, args.sources == ["demo"])


if __name__ == "__main__":
    main()
