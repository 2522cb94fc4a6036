"""What each way to quantize costs on a trained model: real files against nats, paired by document.

    python tests/bench/quantizers.py RUN_FOLDER DATA_PATH TOKENIZER_PATH
        [--sequences 128] [--tokens 61440] [--keep 4096]
        [--steps 0.0002 0.0003 0.0004] [--clips 1 1.25 1.5]

RUN_FOLDER holds a run's model.ptz and final_model.pt. Calibration takes training sequences as long
as the model's scoring windows. First, by matrix, in dB between arithmetic and geometric mean: of
U_jj^-2 (what column steps can win), of the rows' variances (what a step a row wins), of the rows'
importance. Then each technique at three sizes: bytes of the file, bits a quantized weight, the loss
that curvature predicts (mnat a token), the loss on validation text (mnat, with 95 % of 10,000
resamples of the documents), seconds of fitting and coding. PR 2135's form is GPTQ
with SD clip, at --clips times its published deviations, LQER, int7 embedding, zstd.
"""

import argparse
import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from command import followed, run, tg
from scores import by_document, interval

SD_CLIP = dict(matrix_clip_sigmas=12.85, attn_clip_sigmas=13.0, mlp_clip_sigmas=11.5)
SD_CLIP |= dict(embed_clip_sigmas=14.0)
ROWS = dict(quant_bits=6, quant_policy="embed:7", gptq_embed=True)
LQER = dict(lqer_enabled=True, lqer_asym_group=32)
RANS = dict(compressor="rans")

# Name -> settings.
BY_ROWS = {
    "rounding, SD clip, zstd": dict(ROWS, gptq_n_samples=0),
    "GPTQ, SD clip, zstd": ROWS,
    "+ LQER, zstd (PR 2135's form)": dict(ROWS, **LQER),
}
BY_STEPS = {
    "column steps, rans": dict(RANS, quant_row_steps=False),
    "+ row steps, zstd": {},
    "+ row steps, rans": RANS,
    "+ row steps, LQER, rans": dict(RANS, **LQER),
}


def decibels(values: torch.Tensor) -> float:
    """Arithmetic over geometric mean."""
    values = values.double().clamp_min(1e-300)
    geometric = values.log().mean().exp()
    return 10 * math.log10(values.mean() / geometric)


class Bench:
    """A trained model with its calibration, and its losses on validation text."""

    def __init__(self, args: argparse.Namespace):
        blob = (args.folder / "model.ptz").read_bytes()
        stored, _ = tg.unpack(blob)
        places = dict(data_path=str(args.data), tokenizer_path=str(args.tokenizer), device="cpu")
        self.cfg = dataclasses.replace(
            stored,
            **places,
            train_seq_len=stored.score_len,
            val_tokens=args.tokens,
            keep_float_max_numel=args.keep or stored.keep_float_max_numel,
            gptq_n_samples=args.sequences,
            quant_step=1.0,
        )
        self.raw = torch.load(args.folder / "final_model.pt", weights_only=True)
        self.rt = tg.Runtime(self.cfg, {})
        self.log = tg.RunLog(args.folder / "bench", self.rt, silent=True)
        self.model = tg.build_model(self.cfg, self.rt)
        self.table = tg.ByteTable.load(self.cfg)
        self.tokens = tg.load_validation(self.cfg)
        targets = np.ones(len(self.tokens) - 1)
        self.sizes = by_document(targets, self.tokens, self.cfg.bos_id)
        self.raw_nats = self.nats(self.raw)
        self.model.load_state_dict(self.raw)
        stream = tg.TokenStream(tg.shard_paths(self.cfg, "train"), self.cfg)
        self.calibration = tg.calibrate(self.model, self.cfg, self.rt, stream)
        self.large = [name for name, w in self.raw.items() if tg.is_large(name, w, self.cfg)]

    def nats(self, weights: dict[str, torch.Tensor]) -> np.ndarray:
        """Charges of the validation targets, by document."""
        self.model.load_state_dict(weights)
        length = self.cfg.score_len
        network = tg.WindowNetwork(self.model, self.rt, self.cfg, length, length)
        scorer = tg.Scorer("bench", network)
        score = tg.evaluate(scorer, self.tokens, self.table, self.cfg, self.rt, self.log)
        return by_document(score.nats, self.tokens, self.cfg.bos_id)

    def curvature_loss(self, weights: dict[str, torch.Tensor]) -> float:
        """Half of the importance-weighted squared error of all outputs, mnat a token."""
        total = 0.0
        for name in self.large:
            wrong = (weights[name] - self.raw[name]).double()
            hessian = self.calibration.hessians[name].double()
            importance = self.calibration.importance[name].double()
            squares = ((wrong @ hessian) * wrong).sum(1)
            total += float(importance @ squares) / 2
        return 1000 * total

    def show_matrices(self) -> None:
        """AM/GM in dB of what the forms of steps can win, by matrix."""
        print(f"{'dB between AM and GM':36} {'U_jj^-2':>8} {'row var':>8} {'import.':>8}")
        for name in self.large:
            hessian = self.calibration.hessians[name]
            factor = tg.inverse_factor(hessian, self.cfg.gptq_damp)
            columns = decibels(factor.conditional**-2)
            rows = decibels(self.raw[name].var(1))
            importance = decibels(self.calibration.importance[name])
            print(f"{name:36} {columns:8.2f} {rows:8.2f} {importance:8.2f}")

    def show(self, name: str, settings: dict[str, object]) -> None:
        """One technique at one size."""
        cfg = dataclasses.replace(self.cfg, **settings)
        known = self.calibration if cfg.gptq_n_samples else None
        began = time.perf_counter()
        blob = tg.pack(self.raw, cfg, known)
        seconds = time.perf_counter() - began
        weights = tg.unpack(blob)[1]
        tensors = [t for t in tg.expand(blob)[2] if t.name in self.large]
        size = sum(map(tg.tensor_bytes, tensors))
        count = sum(self.raw[name].numel() for name in self.large)
        gains = self.nats(weights) - self.raw_nats
        low, high = 1000 * interval(gains, self.sizes)
        lost = 1000 * gains.sum() / self.sizes.sum()
        bits = 8 * size / count
        predicted = self.curvature_loss(weights)
        line = f"{name:28} {len(blob):9} bytes "
        line += f"{bits:5.2f} bits {lost:+7.2f} "
        line += f"[{low:+.2f}, {high:+.2f}] mnat, curvature {predicted:6.2f}, {seconds:.0f} s"
        print(line, flush=True)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=61440)
    parser.add_argument("--keep", type=int, default=0, help="KEEP_FLOAT_MAX_NUMEL")
    parser.add_argument("--steps", type=float, nargs="+", default=[0.0002, 0.0003, 0.0004])
    parser.add_argument("--clips", type=float, nargs="+", default=[1.0, 1.25, 1.5])
    args = parser.parse_args(arguments)
    bench = Bench(args)
    bench.show_matrices()
    rows = []
    for name, settings in BY_ROWS.items():
        for scale in args.clips:
            clips = {role: scale * sigmas for role, sigmas in SD_CLIP.items()}
            rows.append((name, {**settings, **clips, "quant_step": 0.0}))
    for name, settings in BY_STEPS.items():
        for step in args.steps:
            rows.append((name, {**settings, "quant_step": step}))
    for name, settings in followed(rows, "files"):
        bench.show(name, settings)


if __name__ == "__main__":
    run(main)
