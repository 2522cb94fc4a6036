"""Trains one setting changed at a time, over several seeds, and says what each change is worth.

    python tests/bench/ablate.py ROWS RESULTS             # trains what is missing, then the table
    python tests/bench/ablate.py ROWS RESULTS --table     # the table only
    python tests/bench/ablate.py ROWS RESULTS --only best,value-embeddings --seeds 1337

ROWS is a text of lines `name NAME=value ...`; the line `all` holds for every row, and the first of
the others is what they are compared with. A value of so many % is a share of the steps:
WARMDOWN_ITERS=60%. Two settings are this bench's own: TOKENS, what one training may take, and
HELD_OUT, what is scored: documents (every 40th training document, which is then not trained on) or
split (the data's validation split, only for data that was made to tune on, as by `data/prepare.py
demo --tuning`: no choice may see the text that a record is scored on). RESULTS is a file of JSON
lines, one a training, written anew as each ends: interrupted, the same command goes on.

What is held out is scored in plain windows with the unquantized weights, averaged where a row
averages; settings of packing and scoring change nothing. Text with case markers, whose bytes stand
in files of their own, is not for this bench. Rows take turns seed by seed, so that their times are
comparable; a time is that of the training clock. The interval holds 95 % of 10,000 resamples of the
documents and of the seeds: too narrow where documents are pieces of one text, as the demo's are,
and with few seeds. A table of trainings by several programs or on several devices ends with a
warning.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from command import ROOT, run, show_progress, tg, whole_number
from scores import by_document, interval

ONE_OF = 40  # documents is held out
OFFSET = 17  # the first of them
CURVE_TARGETS = 12_288
CURVE_POINTS = 10


# --- rows -----------------------------------------------------------------------------------------


def read_rows(path: Path) -> dict[str, dict[str, str]]:
    """Row -> its settings, those of `all` among them."""
    shared: dict[str, str] = {}
    rows: dict[str, dict[str, str]] = {}
    for line in path.read_text().splitlines():
        words = line.partition("#")[0].split()
        if not words:
            continue
        wrong = [word for word in words[1:] if "=" not in word]
        tg.check(not wrong, f"{path}: {words[0]}: expected NAME=value, not {' '.join(wrong[:1])}")
        settings = dict(word.split("=", 1) for word in words[1:])
        if words[0] == "all":
            shared |= settings
        else:
            tg.check(words[0] not in rows, f"{path}: two rows are named {words[0]}")
            rows[words[0]] = settings
    tg.check(rows, f"{path}: no row but `all`")
    return {name: shared | settings for name, settings in rows.items()}


def environment(settings: dict[str, str], seed: int) -> dict[str, str]:
    """What train_gpt.py is told; the data is still the row's."""
    env = {"DEVICE": "cpu", "SCHEDULE": "tokens", "MAX_EVAL_SECONDS": "0"}
    env |= settings | {"SEED": str(seed)}
    if "CONFIG" in env:
        env["CONFIG"] = str(ROOT / env["CONFIG"])
    tg.check("TOKENS" in env, "TOKENS is missing: the training tokens of a row")
    held_out = env.pop("HELD_OUT", "documents")
    known = held_out in ("documents", "split")
    tg.check(known, f"HELD_OUT={held_out}: expected documents or split")
    tokens = whole_number("TOKENS", env.pop("TOKENS"))
    batch = tg.load_config({n: v for n, v in env.items() if "%" not in v}).train_batch_tokens
    steps = tokens // batch
    tg.check(steps, f"TOKENS={tokens} are less than a batch of {batch}")
    for name, value in env.items():
        if value.endswith("%"):
            share = value[:-1]
            number = re.fullmatch(r"\d+(\.\d+)?", share)
            tg.check(number, f"{name}={value}: expected a number before %")
            env[name] = str(round(steps * float(share) / 100))
    return env | {"ITERATIONS": str(steps), "VAL_LOSS_EVERY": str(max(1, steps // CURVE_POINTS))}


def hold_out(cfg: tg.Config, folder: Path) -> None:
    """Shards of the training documents without, and of those that are held out."""
    parts: dict[str, list[np.ndarray]] = {"train": [], "val": []}
    for path in tg.shard_paths(cfg, "train"):
        tokens = tg.read_shard(path)
        pieces = np.split(tokens, tg.document_starts(tokens, cfg.bos_id)[1:])
        for number, piece in enumerate(pieces):
            parts["val" if number % ONE_OF == OFFSET else "train"].append(piece)
    few = (
        f"{cfg.data_path}: {len(parts['train'])} training documents; expected {OFFSET + 1} or more"
    )
    tg.check(parts["val"], few)
    for split, pieces in parts.items():
        tg.write_shard(folder / tg.shard_name(split, 0), np.concatenate(pieces))


# --- one training ---------------------------------------------------------------------------------


class Held:
    """The held-out documents and a scorer for them."""

    def __init__(self, trainer: tg.Trainer):
        self.trainer = trainer
        cfg = trainer.cfg
        network = tg.WindowNetwork(trainer.model, trainer.rt, cfg, cfg.score_len, cfg.score_len)
        self.scorer = tg.Scorer("held-out", network)
        self.table = tg.ByteTable.load(cfg)
        self.tokens = tg.load_validation(cfg)
        self.sizes = tg.load_charges(cfg, self.table, self.tokens)
        self.curve: list[tuple[int, float, float]] = []  # step, seconds, nats a target
        self.begun = time.perf_counter()

    @contextlib.contextmanager
    def averaged(self):
        """While it lasts, the model has the weights that would be packed."""
        trainer = self.trainer
        if not trainer.averager or not trainer.steps_done:
            yield
            return
        weights = copy.deepcopy(trainer.model.state_dict())
        trainer.averager.apply()
        yield
        trainer.model.load_state_dict(weights)

    def score(self, tokens: np.ndarray) -> np.ndarray:
        """Nats of each target in plain windows."""
        trainer = self.trainer
        sizes = self.sizes[: len(tokens) - 1]
        data = (tokens, self.table, trainer.cfg, trainer.rt, trainer.log, sizes)
        with self.averaged():
            return tg.evaluate(self.scorer, *data).nats

    def note(self, step: int) -> None:
        """A point of the curve, which is shown."""
        seconds = self.trainer.clock.elapsed()
        loss = float(self.score(self.tokens[: CURVE_TARGETS + 1]).mean())
        self.curve.append((step, round(seconds, 2), round(loss, 5)))
        show_progress(f"steps, loss {loss:.4f}", step, self.trainer.cfg.iterations, self.begun)

    def result(self) -> dict[str, Any]:
        """The final score, by document, and the curve to it."""
        nats = self.score(self.tokens)
        bits = nats.sum() / math.log(2)
        found: dict[str, Any] = {"bpb": round(float(bits / self.sizes.sum()), 6)}
        found["loss"] = round(float(nats.mean()), 6)
        found["curve"] = self.curve
        bos = self.trainer.cfg.bos_id
        found["nats"] = by_document(nats, self.tokens, bos).round(2).tolist()
        found["bytes"] = by_document(self.sizes, self.tokens, bos).astype(int).tolist()
        return found


def train_unit(env: dict[str, str]) -> dict[str, Any]:
    """One training -> what is kept of it."""
    cfg = tg.load_config(env)
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(tg.Runtime(cfg, {})) as rt:
        log = tg.RunLog(Path(folder), rt, silent=True)
        trainer = tg.build_trainer(cfg, rt, log)
        held = Held(trainer)
        unit: dict[str, Any] = {"script": tg.sha256(Path(tg.__file__))}  # before anybody edits it
        unit["status"] = tg.train(trainer, held.note)
        unit |= held.result()
        unit["seconds"] = round(trainer.seconds, 2)
        unit["tokens"] = trainer.steps_done * cfg.train_batch_tokens
        unit["parameters"] = sum(p.numel() for p in trainer.model.parameters())
        unit["device"] = rt.device_name()
    return unit


def run_unit(env: dict[str, str]) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--unit", json.dumps(env)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"a training ended with exit code {done.returncode}: {env}")
    unit = json.loads(done.stdout.splitlines()[-1])
    if unit["status"] == "interrupted":
        raise SystemExit("a training was interrupted; it will be made again")
    return unit


# --- results --------------------------------------------------------------------------------------


def read_results(path: Path) -> list[dict[str, Any]]:
    """All trainings that have ended."""
    try:
        lines = path.read_text().splitlines() if path.is_file() else []
        return [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise SystemExit(f"{path} is no file of results: {error}") from None


def of_row(results: Sequence[dict], name: str, settings: dict[str, str]) -> dict[int, dict]:
    """Seed -> training of a row as it is now described."""
    return {
        one["seed"]: one for one in results if (one["row"], one["settings"]) == (name, settings)
    }


def train_missing(
    rows: dict[str, dict[str, str]], seeds: Sequence[int], path: Path, results: list[dict]
) -> None:
    """Seed after seed, row after row, what has not been trained yet."""
    for settings in rows.values():
        tg.load_config(environment(settings, 0))  # what is refused is so before hours of training
    places = {settings.get("HELD_OUT", "documents") for settings in rows.values()}
    tg.check(len(places) == 1, "HELD_OUT: not the same in all rows, which are compared")
    missing = []
    for seed in dict.fromkeys(seeds):
        for name, settings in rows.items():
            if seed not in of_row(results, name, settings):
                missing.append((name, seed))
    begun = time.perf_counter()
    for number, (name, seed) in enumerate(missing, 1):
        settings = rows[name]
        unit = {"row": name, "seed": seed, "settings": settings}
        with tempfile.TemporaryDirectory() as folder:
            env = environment(settings, seed)
            if settings.get("HELD_OUT") != "split":
                hold_out(tg.load_config(env), Path(folder))
                env["DATA_PATH"] = folder
            unit |= run_unit(env)
        results[:] = [*read_results(path), unit]  # another command may have added some
        lines = [json.dumps(one) + "\n" for one in results]
        tg.atomic_write(path, "".join(lines).encode())
        told = f"{unit['bpb']:.4f} bpb, {unit['seconds']:.0f} s, {unit['status']}"
        show_progress(f"{name} seed {seed}: {told}", number, len(missing), begun)


def gain_of(base: dict[int, dict], row: dict[int, dict]) -> tuple[float, float, float]:
    """Bits a byte that a row wins, and its interval, over the seeds of both."""
    seeds = sorted(base.keys() & row.keys())
    before = np.array([base[seed]["nats"] for seed in seeds])  # [seeds, documents]
    after = np.array([row[seed]["nats"] for seed in seeds])
    gains = (before - after) / math.log(2)
    sizes = np.array(base[seeds[0]]["bytes"], dtype=np.float64)
    low, high = interval(gains, sizes)
    return gains.mean(0).sum() / sizes.sum(), low, high


def seconds_to(curve: Sequence[Sequence[float]], loss: float) -> float:
    """When a curve first reaches a loss, between its points; infinite if it never does."""
    if curve[0][2] <= loss:
        return curve[0][1]
    for (_, before, above), (_, after, below) in zip(curve, curve[1:]):
        if below <= loss:
            share = (loss - below) / max(above - below, 1e-9)
            return after - (after - before) * share
    return math.inf


def line_of(name: str, base: dict[int, dict], row: dict[int, dict]) -> str:
    """A row of the table."""
    seeds = sorted(base.keys() & row.keys())
    gain, low, high = gain_of(base, row)
    mean = np.mean([row[seed]["bpb"] for seed in seeds])
    each, paces, shares = [], [], []
    for seed in seeds:
        first, own = base[seed], row[seed]
        _, _, loss = first["curve"][-1]
        each.append(f"{first['bpb'] - own['bpb']:+.4f}")
        paces.append(own["tokens"] / own["seconds"])
        shares.append(seconds_to(own["curve"], loss) / first["seconds"])
    cells = [name, f"{mean:.4f}", f"{gain:+.4f} [{low:+.4f}, {high:+.4f}]", " ".join(each)]
    cells += [str(row[seeds[0]]["parameters"]), f"{np.mean(paces):.0f}", f"{np.mean(shares):.2f}"]
    return f"| {' | '.join(cells)} |"


def mixtures(units: Sequence[dict]) -> list[str]:
    """Warnings that trainings of one table are of several programs or devices."""
    found = []
    for field in ("script", "device"):
        counts = collections.Counter(unit.get(field, "unknown") for unit in units)
        told = ", ".join(f"{value:.40} ({count})" for value, count in counts.items())
        if len(counts) > 1:
            found.append(f"WARNING: trainings of more than one {field}: {told}")
    return found


def table(rows: dict[str, dict[str, str]], results: Sequence[dict]) -> str:
    """One line a row; the first is what the others are compared with."""
    first, *_ = rows
    base = of_row(results, first, rows[first])
    heads = ["row", "bpb", "gain, 95 %", "by seed", "parameters", "tokens/s", "time to its loss"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    compared = []
    for name, settings in rows.items():
        row = of_row(results, name, settings)
        if base.keys() & row.keys():
            lines.append(line_of(name, base, row))
            compared += [unit for seed, unit in row.items() if seed in base]
    return "\n".join(lines + mixtures(compared))


def main(arguments: Sequence[str]) -> None:
    if arguments[:1] == ["--unit"]:
        print(json.dumps(train_unit(json.loads(arguments[1]))))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--seeds", default="1337,42,2024", help="whole numbers with commas")
    parser.add_argument("--only", help="names of rows, beside the first")
    parser.add_argument("--table", action="store_true", help="train nothing")
    options = parser.parse_args(arguments)
    rows = read_rows(options.rows)
    if options.only:
        chosen = options.only.split(",")
        unknown = set(chosen) - rows.keys()
        if unknown:
            parser.error(f"--only: {options.rows} has no row {', '.join(sorted(unknown))}")
        first, *_ = rows
        rows = {name: settings for name, settings in rows.items() if name in (first, *chosen)}
    results = read_results(options.results)
    if not options.table:
        seeds = [whole_number("--seeds", seed) for seed in options.seeds.split(",")]
        train_missing(rows, seeds, options.results, results)
    print(table(rows, results))


if __name__ == "__main__":
    run(main)
