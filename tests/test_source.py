"""What the source promises: no side effects, Python 3.10, section order, short functions."""

import ast
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, TINY, clean_env, functions_entered

import train_gpt

SOURCE = (ROOT / "train_gpt.py").read_text()
TREE = ast.parse(SOURCE)
BANNERS = [
    (SOURCE[: m.start()].count("\n") + 1, int(m[1]))
    for m in re.finditer(r"^# (\d+)\. [A-Z ]+ - ", SOURCE, re.M)
]


def section_of(line):
    return max((number for start, number in BANNERS if start <= line), default=0)


def python_files():
    """Every Python file of the project itself; record folders hold copies of older scripts."""
    yield ROOT / "train_gpt.py"
    for folder in ("data", "records", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            if not path.relative_to(ROOT).parts[1].startswith("track_"):
                yield path


FILES = sorted(str(path.relative_to(ROOT)) for path in python_files())


@pytest.mark.parametrize("name", FILES)
def test_python_310_syntax(name):
    ast.parse((ROOT / name).read_text(), feature_version=(3, 10))


def defined_by(node):
    """Names that a statement at the top of the script defines."""
    if hasattr(node, "name"):
        return [node.name]
    targets = getattr(node, "targets", [])
    return [target.id for target in targets if isinstance(target, ast.Name)]


def annotations_of(tree):
    """The nodes of annotations: they are not evaluated, and may name what comes later."""
    found = set()
    for node in ast.walk(tree):
        for field in ("annotation", "returns"):
            annotation = getattr(node, field, None)
            if annotation is not None:
                found |= set(ast.walk(annotation))
    return found


def test_sections_are_in_order_and_use_only_those_above():
    assert [number for _, number in BANNERS] == list(range(1, 14))
    home = {}
    for node in TREE.body:
        section = section_of(node.lineno)
        home.update(dict.fromkeys(defined_by(node), section))
    later = []
    for node in set(ast.walk(TREE)) - annotations_of(TREE):
        if isinstance(node, ast.Name) and home.get(node.id, 0) > section_of(node.lineno):
            later.append((node.id, node.lineno))
    assert not later


# --- form: what no formatter changes --------------------------------------------------------------


def is_packed(node):
    """a, b = x, y"""
    return (
        isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Tuple)
        and any(isinstance(target, ast.Tuple) for target in node.targets)
    )


def statements_of(nodes):
    """How many there are, a packed assignment counted as its parts."""
    parts = sum(len(node.value.elts) - 1 for node in nodes if is_packed(node))
    return sum(isinstance(node, ast.stmt) for node in nodes) + parts


def nesting(node, depth=0):
    """Blocks inside blocks, at most."""
    blocks = (ast.For, ast.While, ast.If, ast.With, ast.Try)
    inner = [nesting(c, depth + isinstance(c, blocks)) for c in ast.iter_child_nodes(node)]
    return max([depth, *inner])


@pytest.mark.parametrize("name", FILES)
def test_functions_are_short_and_flat(name):
    """At most 60 lines and four levels of blocks."""
    tree = ast.parse((ROOT / name).read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    long = [f.name for f in functions if f.end_lineno - f.lineno >= 60]
    deep = [f.name for f in functions if nesting(f) > 4]
    assert (long, deep) == ([], [])


@pytest.mark.parametrize("name", FILES)
def test_statements_are_simple(name):
    """At most 7.0 expression nodes a statement; few packed assignments, and few lambdas."""
    source = (ROOT / name).read_text()
    nodes = list(ast.walk(ast.parse(source)))
    expressions = sum(isinstance(node, ast.expr) for node in nodes)
    assert expressions <= 7.0 * statements_of(nodes), expressions / statements_of(nodes)
    assert sum(map(is_packed, nodes)) <= 0.02 * len(source.splitlines())
    assert sum(isinstance(node, ast.Lambda) for node in nodes) <= 10


def test_the_script_has_at_most_5200_statements():
    """Docstrings are not counted: text costs nothing.

    What the published front still needs (its model, optimizer, packer, adapters) comes on top of
    the systems that are here, a plan of a run's costs, and text with case markers.
    """
    nodes = list(ast.walk(TREE))
    texts = [node for node in nodes if isinstance(node, ast.Expr)]
    docstrings = sum(isinstance(node.value, ast.Constant) for node in texts)
    assert statements_of(nodes) - docstrings <= 5200


@pytest.mark.parametrize("name", FILES)
def test_lines_are_narrow(name):
    lines = (ROOT / name).read_text().splitlines()
    assert not [number for number, line in enumerate(lines, 1) if len(line) > 100]


@pytest.mark.parametrize("name", FILES)
def test_nothing_cites_documents_outside_the_repository(name):
    words = r"\bspec[: ]|[Rr]ules: section|rules' table|\brules \d"
    words += r"|\bfrontier[ -]\w*\d|\bseeds-\d|field-reports|style-review"
    if name != "tests/test_source.py":
        assert not re.findall(words, (ROOT / name).read_text())


def test_formatting():
    command = [sys.executable, "-m", "ruff", "format", "--check", "--no-cache", "."]
    subprocess.run(command, cwd=ROOT, check=True)


def test_lint():
    subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "."], cwd=ROOT, check=True)


# --- imports --------------------------------------------------------------------------------------


def imported_by(tree):
    """The modules that a file imports, by their first names."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("tests/")])
def test_no_test_imports_a_test(name):
    imported = imported_by(ast.parse((ROOT / name).read_text()))
    assert not [module for module in imported if module.startswith("test_")]


# The one file of each folder that puts the repository root on the path.
ON_THE_PATH = {"records/tool/__init__.py", "data/prepare.py"}


def test_the_path_is_edited_in_one_place_a_folder():
    edited = r"sys\.path(\.insert|\.append|\[:0\])"
    tools = [name for name in FILES if name.startswith(("data/", "records/"))]
    assert {name for name in tools if re.search(edited, (ROOT / name).read_text())} == ON_THE_PATH


def test_no_dependency_beyond_the_four():
    foreign = imported_by(TREE) - set(sys.stdlib_module_names)
    assert foreign == {"numpy", "torch", "sentencepiece", "zstandard", "flash_attn_interface"}


# --- what the script promises ---------------------------------------------------------------------


def test_environment_is_read_in_main_only():
    lines = [
        node.lineno
        for node in ast.walk(TREE)
        if isinstance(node, ast.Attribute) and node.attr == "environ"
    ]
    assert [section_of(line) for line in lines] == [13]


def test_model_knows_no_device():
    start, end = (next(line for line, number in BANNERS if number == n) for n in (5, 6))
    model = "\n".join(SOURCE.splitlines()[start:end])
    assert not re.search(r"cuda|is_available|dist\.|rank\b|environ|open\(", model)


IMPORT_PROBE = """
import builtins, os, socket, sys, time
import numpy, torch, sentencepiece, zstandard
import torch.distributed
sys.path.insert(0, sys.argv[1])
def refuse(*args, **kwargs):
    raise AssertionError("touched at import")
class Poisoned(dict):
    __getitem__ = __contains__ = get = __iter__ = keys = items = refuse
os.environ = Poisoned()
torch.cuda.is_available = torch.compile = refuse
torch.distributed.init_process_group = socket.socket = refuse
opened, real = [], builtins.open
builtins.open = lambda path, *a, **k: (opened.append(str(path)), real(path, *a, **k))[1]
source = open(os.path.join(sys.argv[1], "train_gpt.py")).read()
opened.clear()
start = time.process_time()           # what neighbours take from the machine does not count
compile(source, "train_gpt.py", "exec")
middle = time.process_time()
import train_gpt
took = (time.process_time() - middle) / (middle - start)
assert not opened, opened
assert torch.initial_seed() == torch.default_generator.initial_seed()
print(took)
"""


def test_import_has_no_side_effects_and_is_quick(tmp_path):
    tmp_path.chmod(0o500)
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_PROBE, str(ROOT)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=clean_env(CUDA_VISIBLE_DEVICES=""),
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())
    assert float(done.stdout) < 3  # times what reading the source takes


def test_a_training_step_is_short_to_follow(rt, run_log, tmp_path):
    """What a reader of one step must look up: 20 functions at most, the forward pass included."""
    cfg = train_gpt.Config(**dict(TINY, schedule="tokens", iterations=9))
    train_gpt.write_shard(tmp_path / "fineweb_train_0.bin", np.arange(4000) % 260)
    stream = train_gpt.TokenStream([tmp_path / "fineweb_train_0.bin"], cfg)
    trainer = train_gpt.Trainer(cfg, rt, run_log, train_gpt.build_model(cfg, rt), stream)
    entered = functions_entered(lambda: trainer.step(stream.batch, 9, 0.0))
    assert "Attention.forward" in entered and "Muon.step" in entered
    assert len(entered) <= 20, sorted(entered)
