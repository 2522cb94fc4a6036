"""The data tool as its tests call it, and the text they give it."""

import contextlib
import io
import json
import os
import pydoc_data.topics
import sys
from dataclasses import dataclass
from pathlib import Path

import export
import helpers
import numpy as np
import prepare
import pytest
from conftest import ROOT, SHARED, clean_env

import train_gpt as tg

PROGRAM = [sys.executable, str(ROOT / "data/prepare.py")]
WEB = SHARED / "data"
needs_web = pytest.mark.skipif(not WEB.is_dir(), reason="no shared web text")

# Some hundred documents that every CPython has.
TOPICS = pydoc_data.topics.topics.values()
DOCUMENTS = [*dict.fromkeys(" ".join(text.split()) for text in TOPICS)]
MINE = dict(name="mine", vocab_size=500, val_every=10)  # the dataset that `prepared` holds


@dataclass(frozen=True)
class Done:
    """How a call ended."""

    code: int
    out: str
    err: str


def arguments(command, *places, **options):
    """A command line: call("text", path, val_docs=3) is `text path --val-docs 3`."""
    line = [command, *map(str, places)]
    for name, value in options.items():
        line += [f"--{name.replace('_', '-')}", str(value)]
    return line


def call(command, *places, **options):
    """The tool in this process."""
    out = io.StringIO()
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = prepare.main(arguments(command, *places, **options), {})
    return Done(code, out.getvalue(), err.getvalue())


def python(*line, env=None, **more):
    """A Python process of its own, with the modules on its path, until it has ended."""
    done = helpers.python(line, env or module_env(), **more)
    return Done(done.returncode, done.stdout, done.stderr)


def module_env():
    """An environment in which a script can import the tool's modules."""
    return clean_env(PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "data")]))


def jsonl(path, documents):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def results(root):
    """Everything an export leaves, by name; locks are no result."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_file() and path.suffix != ".lock":
            found[str(path.relative_to(root))] = path.read_bytes()
    return found


def shards(folder, split):
    """The tokens of each shard of a split."""
    return [tg.read_shard(path) for path in sorted(folder.glob(tg.shard_name(split)))]


def documents_of(folder, split, table):
    """The text of each document of a split."""
    tokens = np.concatenate(shards(folder, split))
    starts = np.flatnonzero(tokens == 1)
    assert starts[0] == 0
    return [table.decode(part[1:]).decode() for part in np.split(tokens, starts[1:])]


def make_corpus(folder):
    """All documents in one file."""
    return jsonl(folder / "docs.jsonl", DOCUMENTS)


def make_mine(root, corpus):
    """A data folder with one dataset of the documents, under MINE's name and settings."""
    done = call("text", corpus, root=root, workers=2, **MINE)
    assert done.code == 0, done.err
    return root


def small_model(path, size):
    """A tokenizer of so many pieces from some of the documents; returns its path."""
    export.train_tokenizer(DOCUMENTS[:40], size, path, 1 << 20)
    return path


def group_lives(group):
    """Whether a process of that group runs; zombies do not."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if fields[2] == str(group) and fields[0] != "Z":
                return True
    return False
