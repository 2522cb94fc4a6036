"""What the source promises: no side effects, Python 3.10, section order, short functions."""

import ast
import re
import subprocess
import sys

import numpy as np
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
    folders = (ROOT / name for name in ("data", "records", "tests"))
    return [path for folder in folders for path in sorted(folder.rglob("*.py"))]


def test_python_310_syntax():
    for path in [ROOT / "train_gpt.py", *python_files()]:
        ast.parse(path.read_text(), feature_version=(3, 10))


def test_sections_are_in_order_and_use_only_those_above():
    assert [number for _, number in BANNERS] == list(range(1, 13))
    home = {}
    for node in (node for node in TREE.body if section_of(node.lineno)):
        names = (
            [node.name]
            if hasattr(node, "name")
            else [t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)]
        )
        home.update(dict.fromkeys(names, section_of(node.lineno)))
    annotations = {
        id(n)
        for node in ast.walk(TREE)
        for a in (getattr(node, "annotation", None), getattr(node, "returns", None))
        if a
        for n in ast.walk(a)
    }
    names = [
        node
        for node in ast.walk(TREE)
        if isinstance(node, ast.Name) and id(node) not in annotations
    ]
    assert not [(n.id, n.lineno) for n in names if home.get(n.id, 0) > section_of(n.lineno)]


def statements_of(nodes):
    """Statements, a packed assignment counted as its parts; and how many of those there are."""
    nodes = list(nodes)
    packed = [
        node
        for node in nodes
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Tuple)
        and any(isinstance(target, ast.Tuple) for target in node.targets)
    ]
    parts = sum(len(node.value.elts) - 1 for node in packed)
    return sum(isinstance(node, ast.stmt) for node in nodes) + parts, len(packed)


def nesting(node, depth=0):
    blocks = (ast.For, ast.While, ast.If, ast.With, ast.Try)
    inner = [nesting(c, depth + isinstance(c, blocks)) for c in ast.iter_child_nodes(node)]
    return max([depth, *inner])


def test_functions_are_short_and_flat():
    functions = [n for n in ast.walk(TREE) if isinstance(n, ast.FunctionDef)]
    long = [f.name for f in functions if f.end_lineno - f.lineno >= 60]
    deep = [f.name for f in functions if nesting(f) > 4]
    assert (long, deep) == ([], [])


def test_statements_are_simple():
    """At most 7.0 expression nodes a statement: what no formatter changes."""
    nodes = [n for n in ast.walk(TREE) if hasattr(n, "lineno")]
    expressions = [n for n in nodes if isinstance(n, ast.Expr)]
    docstrings = sum(isinstance(getattr(n, "value", None), ast.Constant) for n in expressions)
    statements, packed = statements_of(nodes)
    assert sum(isinstance(n, ast.expr) for n in nodes) / statements <= 7.0
    assert packed <= 0.02 * len(SOURCE.splitlines())
    assert sum(isinstance(n, ast.Lambda) for n in nodes) <= 10
    assert statements_of(ast.walk(TREE))[0] - docstrings <= 3200  # text costs nothing


def test_lines_are_narrow():
    wide = [n for n, line in enumerate(SOURCE.splitlines(), 1) if len(line) > 100]
    assert not wide


def test_nothing_cites_documents_outside_the_repository():
    words = r"\bspec[: ]|[Rr]ules: section|rules' table|\brules \d"
    words += r"|\bfrontier[ -]\w*\d|\bseeds-\d|field-reports|style-review"
    for path in [ROOT / "train_gpt.py", *python_files()]:
        if path.name != "test_source.py":
            found = re.findall(words, path.read_text())
            assert not found, (path, found)


def test_formatting():
    command = [sys.executable, "-m", "ruff", "format", "--check", "--no-cache", "."]
    subprocess.run(command, cwd=ROOT, check=True)


def test_environment_is_read_in_main_only():
    lines = [
        node.lineno
        for node in ast.walk(TREE)
        if isinstance(node, ast.Attribute) and node.attr == "environ"
    ]
    assert [section_of(line) for line in lines] == [12]


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


def test_no_dependency_beyond_the_four():
    imports = [node for node in ast.walk(TREE) if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = {
        getattr(node, "module", None) or alias.name for node in imports for alias in node.names
    }
    foreign = {name.split(".")[0] for name in modules} - set(sys.stdlib_module_names)
    assert foreign == {"numpy", "torch", "sentencepiece", "zstandard", "flash_attn_interface"}


def test_lint():
    subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "."], cwd=ROOT, check=True)


def test_a_training_step_is_short_to_follow(rt, run_log, tmp_path):
    """What a reader of one step must look up: 20 functions at most, the forward pass included."""
    cfg = train_gpt.Config(**dict(TINY, schedule="tokens", iterations=9))
    train_gpt.write_shard(tmp_path / "fineweb_train_0.bin", np.arange(4000) % 260)
    stream = train_gpt.TokenStream([tmp_path / "fineweb_train_0.bin"], cfg)
    trainer = train_gpt.Trainer(cfg, rt, run_log, train_gpt.build_model(cfg, rt), stream)
    entered = functions_entered(lambda: trainer.step(stream.batch, 9))
    assert "Attention.forward" in entered and "Muon.step" in entered
    assert len(entered) <= 20, sorted(entered)
