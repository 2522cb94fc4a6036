"""What the source promises about itself: no side effects, Python 3.10, section order, short functions."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT, clean_env

SOURCE = (ROOT / "train_gpt.py").read_text()
TREE = ast.parse(SOURCE)
BANNERS = [(SOURCE[:m.start()].count("\n") + 1, int(m[1])) for m in re.finditer(r"^# (\d+)\. [A-Z]+ - ", SOURCE, re.M)]


def section_of(line):
    return max((number for start, number in BANNERS if start <= line), default=0)


def test_python_310_syntax():
    folders = (ROOT / name for name in ("data", "records", "tests"))
    for path in [ROOT / "train_gpt.py", *(p for folder in folders for p in folder.rglob("*.py"))]:
        ast.parse(path.read_text(), feature_version=(3, 10))


def test_sections_are_in_order_and_use_only_those_above():
    assert [number for _, number in BANNERS] == list(range(1, 12))
    home = {}
    for node in (node for node in TREE.body if section_of(node.lineno)):
        names = [node.name] if hasattr(node, "name") else \
            [t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)]
        home.update(dict.fromkeys(names, section_of(node.lineno)))
    annotations = {id(n) for node in ast.walk(TREE) for a in
                   (getattr(node, "annotation", None), getattr(node, "returns", None)) if a for n in ast.walk(a)}
    names = [node for node in ast.walk(TREE) if isinstance(node, ast.Name) and id(node) not in annotations]
    assert not [(n.id, n.lineno) for n in names if home.get(n.id, 0) > section_of(n.lineno)]


def test_functions_are_short_and_the_file_bounded():
    long = [(node.name, node.end_lineno - node.lineno + 1) for node in ast.walk(TREE)
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60]
    assert not long
    assert SOURCE.count("\n") <= 2900
    assert max(map(len, SOURCE.splitlines())) <= 110


@pytest.mark.xfail(strict=True, reason="broken since exact scoring came in: a known debt, not a new ceiling")
def test_the_file_keeps_its_ceiling():
    assert SOURCE.count("\n") <= 2400


def test_environment_is_read_in_main_only():
    lines = [node.lineno for node in ast.walk(TREE) if isinstance(node, ast.Attribute) and node.attr == "environ"]
    assert [section_of(line) for line in lines] == [11]


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
torch.cuda.is_available = torch.compile = torch.distributed.init_process_group = socket.socket = refuse
opened, real = [], builtins.open
builtins.open = lambda path, *a, **k: (opened.append(str(path)), real(path, *a, **k))[1]
start = time.process_time()           # what neighbours take from the machine does not count
import train_gpt
took = time.process_time() - start
assert not opened, opened
assert torch.initial_seed() == torch.default_generator.initial_seed()
print(took)
"""


def test_import_has_no_side_effects_and_is_quick(tmp_path):
    tmp_path.chmod(0o500)
    done = subprocess.run([sys.executable, "-c", IMPORT_PROBE, str(ROOT)], cwd=tmp_path, capture_output=True,
                          text=True, env=clean_env(CUDA_VISIBLE_DEVICES=""), timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())
    assert float(done.stdout) < 0.3


def test_no_dependency_beyond_the_four():
    imports = [node for node in ast.walk(TREE) if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = {getattr(node, "module", None) or alias.name for node in imports for alias in node.names}
    foreign = {name.split(".")[0] for name in modules} - set(sys.stdlib_module_names)
    assert foreign == {"numpy", "torch", "sentencepiece", "zstandard", "flash_attn_interface"}


def test_lint():
    subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "."], cwd=ROOT, check=True)
