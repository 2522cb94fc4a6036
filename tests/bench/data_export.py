"""How fast `data/prepare.py export` is and how much memory it takes, by size of the text.

Not part of the test run.

    python tests/bench/data_export.py SOURCE.jsonl 10 100 1000      # sizes in MB

Options: --tokenizer MODEL, --transform caseops, --val-docs 1000, --workers 2.

The source's documents are repeated, each time with another number in front, until the size is
reached. Memory is the sum over all processes of what each holds for itself (proportional set size),
sampled ten times a second.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from command import ROOT, run, tg
from corpora import read_documents


def write_text(source: Path, target: Path, size: int) -> int:
    """A .jsonl of at least `size` bytes of text; returns how many."""
    documents = list(read_documents(source))
    written = 0
    with open(target, "w", encoding="utf-8") as file:
        for number in itertools.count():
            text = f"{number} {documents[number % len(documents)]}"
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            written += len(text.encode())
            if written >= size:
                return written


def family(pid: int) -> list[int]:
    """A process and all that it started."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *itertools.chain.from_iterable(family(int(child)) for child in children)]


def memory(pid: int) -> int:
    """Bytes of the whole family, pages that several share counted once."""
    total = 0
    for member in family(pid):
        try:
            lines = Path(f"/proc/{member}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def export(text: Path, root: Path, args: argparse.Namespace) -> tuple[float, int]:
    """Seconds of the whole command, and its peak of memory in bytes."""
    command = [sys.executable, ROOT / "data/prepare.py", "export", text, "--name", "x"]
    command += ["--root", root, "--tokenizer", args.tokenizer]
    command += ["--val-docs", str(args.val_docs), "--workers", str(args.workers)]
    command += ["--transform", args.transform] if args.transform else []
    peak = 0
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, memory(process.pid))
        time.sleep(0.1)
    tg.check(process.returncode == 0, f"the export ended with exit code {process.returncode}")
    return time.perf_counter() - start, peak


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help=".jsonl or .txt with real text")
    parser.add_argument("sizes", type=float, nargs="+", help="MB of text")
    parser.add_argument("--tokenizer", default="byte260", help="model file or byte260")
    parser.add_argument("--transform", default="", help="of capitals into markers")
    parser.add_argument("--val-docs", type=int, default=1000, help="documents with a side file")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args(arguments)
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            text = Path(folder) / "text.jsonl"
            root = Path(folder) / "data"
            written = write_text(args.source, text, int(size * 1e6))
            seconds, peak = export(text, root, args)
        print(
            f"{written / 1e6:8.1f} MB {seconds:7.1f} s {written / seconds / 1e6:6.2f} MB/s peak "
            f"{peak / 1e6:6.0f} MB",
            flush=True,
        )


if __name__ == "__main__":
    run(main)
