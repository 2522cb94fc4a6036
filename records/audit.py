"""The reviewer's deep audit of a score: every claim of it, tried on the artifact itself.

    python records/audit.py logs/<run>/model.ptz                 # an artifact of this program
    python records/audit.py records/<track>/<record>/model_seed42.ptz    # with its config.env
    python records/audit.py model.ptz EVAL_STREAM=256 TILT=1     # other settings, as in MODE=eval

For every stage that the settings ask for, on a short stream in three documents, with short chunks:
later tokens changed after eight positions, every token of the vocabulary tried as the target (the
charges must add up to one), uniform random tokens on a blank model (nobody may beat ln V), other
batch sizes, one process against several, documents exchanged where isolation is claimed, another
text (the charges must change), the same digits twice, weights left as they were; at last the same
scores from a fresh process. About a minute a stage for a 1 MB model, and all scoring twice. Exit
code 0 if no check fails and no stage was left out, 6 otherwise, 64 for unusable input, 143 for
Ctrl-C. What a labelled score fails by its nature is EXPECTED. Started by torchrun, the charges of
its processes are compared with those of one.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import io
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import tool  # noqa: F401  (puts the repository root on the path)
from tool.progress import Progress
from torch import nn

import train_gpt as tg
from train_gpt import Check

# The checks that a labelled score fails by its nature; any other failure counts against it too.
EXPECTED = {
    "valid": (),
    "unnormalised": ("every_token", "random_stream"),
    "adapted_first": ("future_again", "every_token", "random_stream"),
}
OTHER_RUNS = 15  # of a stage, besides twice the vocabulary
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Rescorer:
    """Scores short streams again and again, each time from the same state.

    Windows and chunks are as short as 128 targets, so that a stream of six of them holds every kind
    of edge.
    """

    def __init__(
        self,
        build: Callable[..., tg.Scorer],
        model: tg.GPT,
        rt: tg.Runtime,
        cfg: tg.Config,
        table: tg.ByteTable,
    ):
        self.build = build
        self.model = model
        self.table = table
        self.rt = rt
        self.size = min(cfg.score_len, 128)
        chunk = self.size // 2  # of adapters, at most
        early = [f"{min(size, chunk)}:{until}" for size, until in cfg.early_chunks]
        self.log = tg.RunLog(Path(os.devnull), rt, silent=True)
        self.runs = 0
        self.progress = Progress("deep checks", 2 * cfg.vocab_size + OTHER_RUNS, "scorings")
        self.cfg = dataclasses.replace(
            cfg,
            eval_seq_len=self.size,
            ttt_chunk_tokens=self.size,
            mix_chunk_tokens=self.size,
            eval_batch_tokens=self.size,
            eval_stream=min(cfg.eval_stream, self.size),
            eval_stride=min(cfg.stride, self.size // 2) if cfg.stride < cfg.score_len else 0,
            ngram_stride=0,
            ngram_chunk_tokens=min(cfg.ngram_chunk_tokens, self.size),
            ttt_docs=2,
            ttt_global_docs=min(cfg.ttt_global_docs, 2),
            ttt_lora_chunk=min(cfg.ttt_lora_chunk, chunk),
            ttt_lora_early_chunks=",".join(early),
            max_eval_seconds=0.0,
        )

    def __call__(
        self,
        tokens: np.ndarray,
        model: tg.GPT | None = None,
        rt: tg.Runtime | None = None,
        batches: int = 1,
    ) -> np.ndarray:
        """Nats of every target [n], float64; batches of so many times the usual size."""
        cfg = dataclasses.replace(self.cfg, eval_batch_tokens=batches * self.size)
        rt = rt or self.rt
        scorer = self.build(model or self.model, rt, cfg, self.table)
        state = scorer.state_dict()
        score = tg.evaluate(scorer, tokens, self.table, cfg, rt, self.log)
        scorer.load_state_dict(state)
        self.runs += 1
        self.progress.show(self.runs)
        return score.nats.astype(np.float64)


def digest(model: nn.Module) -> str:
    """A hash of all weights."""
    whole = hashlib.sha256()
    for p in model.parameters():
        whole.update(p.data.cpu().numpy().tobytes())
    return whole.hexdigest()


def blank(model: tg.GPT) -> tg.GPT:
    """A copy that believes nothing: its output matrix is zero."""
    model = copy.deepcopy(model)
    for name, p in model.named_parameters():
        if name.startswith(("tok_emb", "lm_head")):
            p.data.zero_()
    return model


class Audit:
    """The deep checks of one stage."""

    def __init__(self, scores: Rescorer, tokens: np.ndarray, validity: str, isolates: bool):
        self.scores = scores
        self.rng = np.random.default_rng(scores.cfg.seed)
        self.vocab = scores.cfg.vocab_size
        self.tolerance = scores.rt.profile.tolerance
        self.expected = EXPECTED[validity]
        self.isolates = isolates
        size = scores.size
        self.starts = [0, 2 * size, 4 * size - 7]  # of three documents
        self.stream = np.resize(tokens, 6 * size + 1)
        self.stream[self.starts] = scores.cfg.bos_id
        self.before = digest(scores.model)
        self.nats = scores(self.stream)

    def outcome(self, name: str, wrong: bool, problem: str, **figures: float) -> Check:
        counts_as = "EXPECTED" if name in self.expected else "FAIL"
        return Check(name, problem if wrong else "", figures, counts_as)

    def gap(self, name: str, what: str, moved: np.ndarray, bound: float) -> Check:
        nats = float(np.abs(moved).max())
        return self.outcome(
            name, not nats <= bound, f"{what} move charges by {nats:.2g} nats", nats=nats
        )

    def future_again(self) -> Check:
        """Other tokens after a position, in the stream itself, change no charge up to it."""
        size, end = self.scores.size, len(self.stream) - 1
        moved = []
        for last in (3, size - 1, size, *self.starts[1:], 3 * size + 5, 5 * size - 1, end - 2):
            later = self.rng.integers(0, self.vocab, end - last - 1)
            other = self.scores(np.append(self.stream[: last + 2], later))
            moved.append(other[: last + 1] - self.nats[: last + 1])
        # Later documents may change the number of rows of a batch, and so the last bits.
        bound = self.tolerance if self.scores.cfg.ttt_lora_rank else 0.0
        return self.gap("future_again", "later tokens", np.concatenate(moved), bound)

    def every_token(self) -> Check:
        """The charges of all tokens as one target add up to one: on both sides of a chunk's end."""
        sums = []
        for last in (self.scores.size - 1, self.scores.size):
            prefix = self.stream[: last + 1]
            nats = [self.scores(np.append(prefix, v))[last] for v in range(self.vocab)]
            sums.append(float(np.exp(-np.array(nats)).sum()))
        sound = all(abs(total - 1) <= 10 * self.tolerance for total in sums)  # no nan is
        return self.outcome(
            "every_token", not sound, f"charges of all tokens add up to {sums}", sums=sums
        )

    def random_stream(self) -> Check:
        """On uniform random tokens a blank model pays ln V, give or take four standard errors."""
        noise = self.rng.integers(0, self.vocab, len(self.stream)).astype(self.stream.dtype)
        nats = self.scores(noise, model=blank(self.scores.model))
        mean = float(nats.mean())
        least = math.log(self.vocab) - 4 * float(nats.std()) / math.sqrt(len(nats)) - 1e-6
        told = f"{mean:.4f} nats on random tokens, ln V is {math.log(self.vocab):.4f}"
        return self.outcome("random_stream", not mean >= least, told, nats=mean)

    def batches(self) -> Check:
        """Batches of another size give the same charges."""
        moved = self.scores(self.stream, batches=4) - self.nats
        return self.gap("batches", "other batch sizes", moved, self.tolerance)

    def processes(self) -> Check:
        """One process gives what several gave."""
        if self.scores.rt.world == 1:
            return Check("processes", "one process: compared under torchrun", counts_as="SKIPPED")
        solo = copy.copy(self.scores.rt)
        solo.rank = solo.local_rank = 0
        solo.world = solo.local_world = 1
        moved = self.scores(self.stream, rt=solo) - self.nats
        return self.gap("processes", "other numbers of processes", moved, self.tolerance)

    def isolation(self) -> Check:
        """Where it is claimed: a document's charges do not depend on those before it."""
        if not self.isolates:
            return Check("isolation", "not claimed", counts_as="SKIPPED")
        _, second, third = self.starts
        parts = (self.stream[second:third], self.stream[:second], self.stream[third:])
        moved = self.scores(np.concatenate(parts))[third:] - self.nats[third:]
        return self.gap("isolation", "other documents", moved, self.tolerance)

    def other_text(self) -> Check:
        """Another text gives other charges: they come from it, and not from elsewhere."""
        other = self.scores(self.rng.permutation(self.stream))
        same = float((other == self.nats).mean())
        told = f"{100 * same:.0f} % of the charges stay when all tokens change places"
        return self.outcome("other_text", same > 0.5, told, unmoved=same)

    def repeat(self) -> Check:
        """The same again."""
        moved = self.scores(self.stream) - self.nats
        return self.gap("repeat", "repeated scores", moved, self.tolerance)

    def neutral(self) -> Check:
        """Scoring leaves the weights as they were."""
        changed = digest(self.scores.model) != self.before
        return self.outcome("neutral", changed, "scoring left other weights")

    def run(self) -> list[Check]:
        """All of them."""
        checks = (
            self.future_again,
            self.every_token,
            self.random_stream,
            self.batches,
            self.processes,
            self.isolation,
            self.other_text,
            self.repeat,
            self.neutral,
        )
        with self.scores.progress:
            return [check() for check in checks]


def audit_stage(
    build: Callable[..., tg.Scorer],
    model: tg.GPT,
    rt: tg.Runtime,
    cfg: tg.Config,
    table: tg.ByteTable,
    tokens: np.ndarray,
) -> list[Check]:
    """The deep checks of what `build` builds; the model is left as it was."""
    scorer = build(copy.deepcopy(model), rt, cfg, table)
    scores = Rescorer(build, model, rt, cfg, table)
    return Audit(scores, tokens, scorer.validity, scorer.isolates_documents).run()


def check_fresh_process(
    env: Mapping[str, str], scores: Sequence[tg.Score], tolerance: float
) -> Check:
    """The script, alone on the artifact, reports the same scores; its log goes to stderr."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(tg.SCRIPT)]
        own = {name: value for name, value in env.items() if name not in LAUNCHED}
        own["OUT_DIR"] = folder
        subprocess.run(command, env=own, stdout=2, check=False)  # its log, to stderr
        card = Path(folder, "result.json")
        if not card.is_file():
            return Check("fresh_process", "no result: the log above says why")
        result = json.loads(card.read_text())
    stages = result["stages"]
    found = [stages.get(score.name, {}).get(score.label, math.inf) for score in scores]
    gaps = {score.name: abs(bpb - score.bpb) for score, bpb in zip(scores, found)}
    largest = max(gaps.values(), default=0.0)
    problem = f"other scores in a process of its own, which {result['status']}: {gaps}"
    return Check("fresh_process", "" if largest <= tolerance else problem, {"bpb": largest})


class Watched(tg.RunLog):
    """No files; what is logged, and progress every ten seconds, goes to stderr."""

    def __init__(self, rt: tg.Runtime):
        super().__init__(Path(os.devnull), rt, silent=True)
        self.shows = rt.main

    def log(self, line: str, show: bool = True) -> None:
        """A line."""
        if self.shows and show:
            print(line, file=sys.stderr, flush=True)


def show(check: Check) -> None:
    """Its line."""
    figures = " ".join(f"{key}={value}" for key, value in check.figures.items())
    print(f"  {check.name:14} {check.verdict}  {figures}", flush=True)


def audit_artifact(env: Mapping[str, str]) -> bool:
    """All stages that the settings ask for, each on a model of its own -> whether none failed."""
    cfg = tg.settings_of_artifact(tg.load_config(env), env)
    rt = tg.Runtime(cfg, env)
    table = tg.ByteTable.load(cfg)
    tokens = tg.load_validation(cfg)
    sizes = tg.load_charges(cfg, table, tokens)
    blob = tg.read_artifact(cfg)
    log = Watched(rt)
    true_scores: dict[str, float] = {}
    scores = []
    sound = True
    for stage in tg.stages_of(cfg):
        print(f"{stage.name}:", flush=True)
        scorer = stage.build(tg.load_artifact(cfg, blob, rt), rt, cfg, table)
        score = tg.evaluate(scorer, tokens, table, cfg, rt, log, sizes)
        if score is None:
            print(f"  not audited: it takes more than MAX_EVAL_SECONDS={cfg.max_eval_seconds}")
            sound = False
            continue
        scores.append(score)
        checks = tg.check_score(score, scorer, tokens, table, cfg, rt, true_scores, sizes)
        model = tg.load_artifact(cfg, blob, rt)
        checks += audit_stage(stage.build, model, rt, cfg, table, tokens)
        for check in checks:
            show(check)
        print(f"  {score.label} {score.bpb:.6f} ({len(score.nats)} targets)", flush=True)
        if score.validity == "valid":
            true_scores[stage.name] = score.bpb
        sound = sound and not any(check.failed for check in checks)
    if not rt.main:
        return sound
    print("all stages:")
    fresh = check_fresh_process(env, scores, 1e-3 * rt.profile.tolerance)
    show(fresh)
    return sound and not fresh.failed


def artifact_of(path: Path) -> tuple[Path, dict[str, str]]:
    """The artifact that a path means, and the settings beside it (a record's config.env)."""
    found = [path] if path.is_file() else sorted(path.glob("*.ptz"))
    tg.check(found, f"{path}: no artifact (*.ptz)")
    tg.check(len(found) == 1, f"{path}: {len(found)} artifacts; name one, as {found[0]}")
    config = found[0].with_name("config.env")
    return found[0], {"CONFIG": str(config)} if config.is_file() else {}


def only_from_the_first(env: Mapping[str, str]) -> contextlib.AbstractContextManager:
    """Of several processes, rank 0 prints."""
    if env.get("RANK", "0") == "0":
        return contextlib.nullcontext()
    return contextlib.redirect_stdout(io.StringIO())


def main(arguments: Sequence[str], env: Mapping[str, str]) -> int:
    """The command -> its exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return tg.OK if arguments else tg.BAD_INPUT
    try:
        path, *settings = arguments
        for text in settings:
            tg.check("=" in text, f"{text!r}: expected NAME=value")
        artifact, own = artifact_of(Path(path))
        given = dict(text.split("=", 1) for text in settings)
        whole = {"MAX_EVAL_SECONDS": "0"}  # nobody waits for it but who asked
        env = {**whole, **env, **own, **given, "MODE": "eval", "ARTIFACT": str(artifact)}
        with only_from_the_first(env):
            return tg.OK if audit_artifact(env) else tg.AUDIT_FAILED
    except tg.InputError as error:
        print(error, file=sys.stderr)
        return tg.BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return tg.INTERRUPTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
