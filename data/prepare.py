"""Makes, fetches and verifies training data: tokenizer and token shards as train_gpt.py reads them.

    python data/prepare.py fineweb                # the challenge's shards and tokenizer, for 8xH100
    python data/prepare.py demo                   # 12 MB of US annual messages, for the CPU track
    python data/prepare.py text BOOKS.txt MORE.jsonl --name mine
    python data/prepare.py export docs_selected.jsonl --name mine \\
        --tokenizer data/tokenizers/fineweb_1024_bpe.model
    python data/prepare.py verify data/datasets/mine

Everything goes below --root (default: the folder of this file; for fineweb, that of DATA_PATH):
datasets/<name>/fineweb_{train,val}_*.bin, tokenizers/ and manifest.json. A second call finds its
own result and does nothing; a call that was interrupted leaves nothing under a final name. Exit
codes: 0 done, 6 verify found a fault, 64 refused, 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # for the modules, too: all of them import train_gpt
on_interrupt = signal.getsignal(signal.SIGINT)
if __name__ == "__main__" and on_interrupt is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while seconds of imports last: a quiet end
try:
    import corpora
    import export
    import hub
    import verify
    from shown import paragraph, shell_word

    from train_gpt import AUDIT_FAILED, BAD_INPUT, CASE_TRANSFORMS, OK, InputError, check
except (ModuleNotFoundError, ValueError) as error:  # as train_gpt's BAD_INPUT, which may be missing
    told = f"HF_ENDPOINT: {error}"  # huggingface_hub reads its address when it is imported
    if isinstance(error, ModuleNotFoundError):
        # Not requirements-dev.txt: it would put another torch in the place of an image's own.
        told = f"{error}: pip install -U huggingface_hub filelock tqdm, and requirements.txt"
    print(f"error: {told}", file=sys.stderr)
    sys.exit(64)

INTERRUPTED = 130
OFFICIAL = export.TokenizerPlan()
LARGEST = {"vocab_size": 1 << 16, "tokenizer_train_docs": 1 << 40, "max_sentence_length": 1 << 30}
# A small corpus cannot spare its long documents.
SMALL = export.TokenizerPlan(max_sentence_length=1 << 20)


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are refusals like all others."""

    def error(self, message: str) -> None:
        raise InputError(f"{self.prog}: {message} (--help lists the options)")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    fineweb = commands.add_parser("fineweb", help="the published shards and tokenizer")
    hub.add_arguments(fineweb)
    demo = commands.add_parser("demo", help="the CPU track's corpus: datasets/sotu_sp1024")
    demo.add_argument(
        "--tokenizer", default="", choices=("byte260",), help="bytes instead: datasets/sotu_byte260"
    )
    demo.add_argument("--vocab-size", type=int, metavar="N", help="or N pieces: datasets/sotu_spN")
    demo.add_argument(
        "--tuning",
        action="store_true",
        help="of its training text other speeches validate: datasets/<its name>_tuning",
    )
    text = commands.add_parser("text", help="your own files, with defaults for small corpora")
    exported = commands.add_parser(
        "export", help="your own files, as the challenge's data was made"
    )
    told = "data folder (default: the one that DATA_PATH names, data/)"
    fineweb.add_argument("--root", type=Path, help=told)
    for command in (demo, text, exported):
        command.add_argument("--root", type=Path, default=HERE, help="data folder (default: data/)")
    for command in (demo, text, exported):
        command.add_argument(
            "--transform",
            default="",
            choices=tuple(CASE_TRANSFORMS),
            help="make capital letters markers before the tokenizer (default: leave them)",
        )
        command.add_argument(
            "--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)"
        )
    for command, small in ((text, True), (exported, False)):
        add_export_arguments(command, small)
    checked = commands.add_parser("verify", help="check a folder of shards")
    checked.add_argument("folder", type=Path, help="datasets/<name>")
    checked.add_argument(
        "--tokenizer", default="", help="model file or byte260 (default: the manifest's)"
    )
    checked.add_argument(
        "--transform",
        default="",
        choices=tuple(CASE_TRANSFORMS),
        help="what made the markers of a given tokenizer's text (default: the manifest's)",
    )
    checked.add_argument(
        "--documents", type=Path, nargs="+", default=[], help="the text that made the shards"
    )
    return parser


def add_export_arguments(command: argparse.ArgumentParser, small: bool) -> None:
    """Options of `text` and `export`: one command, two sets of defaults."""
    plan = SMALL if small else OFFICIAL
    command.add_argument(
        "files", nargs="+", type=Path, help=".jsonl (field text) or .txt (running text) files"
    )
    command.add_argument("--name", required=True, help="name of the dataset")
    command.add_argument(
        "--tokenizer", default="", help="model file or byte260 (default: train one)"
    )
    command.add_argument(
        "--vocab-size",
        type=int,
        help=f"of the tokenizer to be trained (default: {plan.vocab_size})",
    )
    command.add_argument(
        "--tokenizer-train-docs",
        type=int,
        help=f"the first so many training documents train it ({plan.tokenizer_train_docs})",
    )
    command.add_argument(
        "--max-sentence-length",
        type=int,
        help=f"bytes; its trainer skips longer documents (default: {plan.max_sentence_length})",
    )
    split = command.add_mutually_exclusive_group()
    split.add_argument(
        "--val-docs",
        type=int,
        help="the first so many documents validate (default of export: 50000)",
    )
    split.add_argument(
        "--val-every", type=int, help="every n-th document validates (default of text: 100)"
    )
    command.set_defaults(plan=plan, split=(None, 100) if small else (verify.VAL_DOCS, None))


def plan_of(args: argparse.Namespace, plan: export.TokenizerPlan) -> export.TokenizerPlan:
    """The tokenizer that the options ask for, with what they leave open taken from a plan."""
    asked = {}
    for name, largest in LARGEST.items():
        value = getattr(args, name, None)
        if value is None:
            continue
        option = f"--{name.replace('_', '-')} {value}"
        check(0 < value <= largest, f"{option}: expected 1 to {largest}")
        check(
            not args.tokenizer,
            f"{option}: is for a tokenizer to be trained, not for --tokenizer {args.tokenizer}",
        )
        asked[name] = value
    given = args.tokenizer
    check(
        not (args.transform and given == "byte260"),
        f"--transform {args.transform}: is for SentencePiece tokenizers, not for byte260",
    )
    return dataclasses.replace(plan, given=given, transform=args.transform, **asked)


def with_tokenizer_of(root: Path, name: str, plan: export.TokenizerPlan) -> export.TokenizerPlan:
    """The plan, with the tokenizer that a dataset was made with; InputError if it is not there."""
    if plan.given:
        return plan
    model = root / "tokenizers" / f"{name}_bpe.model"
    check(model.exists(), f"--tuning: {model} is not there; make {name} first, without --tuning")
    return dataclasses.replace(plan, given=str(model))


def exporter(args: argparse.Namespace) -> export.Export:
    """The job of `demo`, `text` or `export`."""
    check(args.workers > 0, f"--workers {args.workers}: expected 1 or more")
    if args.command == "demo":
        plan = plan_of(args, SMALL)
        name = f"sotu_{args.tokenizer or f'sp{plan.vocab_size}'}"
        if plan.transform:
            name += f"_{plan.transform}"
        if args.tuning:
            plan = with_tokenizer_of(args.root, name, plan)
            name += "_tuning"
        corpus = corpora.demo_corpus(args.tuning)
        return export.Export(corpus, plan, args.root, name, args.workers)
    check(
        re.fullmatch(r"\w[\w.+-]*", args.name),
        f"--name {args.name!r}: expected a folder name below datasets/ of letters, digits and _ . "
        "+ -",
    )
    split = (args.val_docs, args.val_every)
    if split == (None, None):
        split = args.split
    corpus = corpora.file_corpus(args.files, *split)
    return export.Export(corpus, plan_of(args, args.plan), args.root, args.name, args.workers)


def fetch(args: argparse.Namespace, env: Mapping[str, str]) -> dict[str, Any]:
    """The job of `fineweb`: what the settings name, unless options say otherwise."""
    folder = hub.folder_of_settings(env)
    return hub.fetch(
        args.root or hub.root_of(folder),
        args.variant or hub.variant_of(folder),
        args.train_shards,
        args.with_docs,
        env,
        args.revision,
        args.workers,
        args.replace,
    )


def main(argv: list[str], env: Mapping[str, str] = os.environ) -> int:
    """Runs a command; returns its exit code."""
    try:
        args = build_parser().parse_args(argv)
        if args.command == "verify":
            good = verify.verify(args.folder, args.tokenizer, args.documents, args.transform)
            return OK if good else AUDIT_FAILED
        needed = fetch(args, env) if args.command == "fineweb" else exporter(args).run()
        print(" ".join(f"{name}={shell_word(value)}" for name, value in needed.items()))
        return OK
    except BrokenPipeError:  # the reader has seen enough (verify ... | head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return INTERRUPTED
    except (InputError, OSError) as error:
        print(f"error: {paragraph(str(error))}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(
            "interrupted; nothing incomplete has a final name, the same command finishes the work",
            file=sys.stderr,
        )
        return INTERRUPTED


if __name__ == "__main__":
    signal.signal(signal.SIGINT, on_interrupt)
    sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main(sys.argv[1:]))
