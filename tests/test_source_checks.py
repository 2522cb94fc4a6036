"""Exact checks S5 to S10 fail on planted faults and leave the legal script next to it alone."""

import tokenize

import pytest
from checking import assert_found, check, word
from conftest import ROOT
from tool import source
from tool.finding import text_of

PINNED = (ROOT / "requirements.txt").read_text().splitlines()
S5_FAULTS = {
    "import requests": "imports requests",
    "def f():\n    import urllib.request": "imports urllib.request",
    "__import__('socket')": "imports socket",
    "import subprocess as sp\nsp.run(['pip', 'install', 'x'])": "installs software (pip install x)",
    "import os\nos.system('apt-get install zstd')": "installs software (apt-get",
    "from subprocess import check_output as go\ngo(['make'])": "starts make",
    "import subprocess\nsubprocess.run(command)": "no literal",
    "import subprocess\nsubprocess.run(args=['curl', 'x'])": "starts curl x",
    "import os\nrun = os.system\nrun('curl x')": "starts curl x",
    "import os.path\nos.system('curl x')": "starts curl x",
    "import subprocess\nsubprocess.run('git log; wget example.com', shell=True)": (
        "starts git log; wget"
    ),
    "import subprocess\nsubprocess.run(['git', 'clone', address])": "starts git clone",
    "import torch\nmodel = torch.hub.load('a', 'b')": "torch.hub.load downloads",
    "from hub import snapshot_download\nsnapshot_download('x')": "downloads",
    "def eval_all(a):\n    calibrate(a)\ndef calibrate(a):\n    load_shard(a.train_files)": (
        "calibrate reads"
    ),
    "def ttt():\n    a()\ndef a():\n    b()\ndef b():\n    load(train_files)": "b reads training",
    "def ttt():\n    return open('data/fineweb_train_000001.bin')": "ttt reads training files",
    (
        "class Reader:\n    def __init__(self):\n        open('fineweb_train_0.bin')\n"
        "def evaluate():\n    Reader()"
    ): "Reader.__init__ reads training files",
}


@pytest.mark.parametrize("script, words", S5_FAULTS.items())
def test_foreign_access(script, words):
    assert_found("S5", script, "FAIL", words)


@pytest.mark.parametrize(
    "script",
    [
        "import subprocess\nsubprocess.run(['git', 'rev-parse', 'HEAD'], capture_output=True)",
        "import subprocess\nsubprocess.check_output('nvidia-smi --list-gpus', shell=True)",
        "import subprocess\nsubprocess.run(args=['git', 'status'])",
        "import ctypes\nctypes.CDLL(None).mallopt",
        "from urllib.parse import quote",
        '"""Never calls subprocess.run([\'pip\'])."""\nprint("no requests, no socket")',
        (
            "def train(args):\n    return open(args.train_files)\n"
            "def evaluate(log):\n    log('fineweb_train is not read')"
        ),
    ],
)
def test_allowed_access(script):
    assert word("S5", script) == "PASS"


COUNTED = """
def train_model(h):
    for step in range(h.iterations):
        model(step).backward()
    {trained}
def {name}(h):
    log(f"shards: {{len(list(Path(h.data).glob('fineweb_train_*.bin')))}}")
    {called}(h)
    eval_val(h)
def eval_val(h):
    {scored}
"""


# name | called | trained | scored | verdict | words
BOTH = """
train_and_eval | train_model | pass | pass | WARN | train_and_eval reads training
evaluate_run | train_model | pass | pass | WARN | evaluate_run reads training
main | train_model | load(h.train_files) | pass | PASS | no network
train_and_eval | train_model | load(h.train_files) | pass | WARN | train_model reads
evaluate_run | f | pass | pass | FAIL | evaluate_run reads training files during
evaluate_run | model.train_model | pass | pass | FAIL | evaluate_run reads
train_and_eval | train_model | pass | load(h.train_files) | FAIL | eval_val reads
train_and_eval | train_model | pass | train_model(h) | WARN | train_and_eval reads
"""


@pytest.mark.parametrize("case", BOTH.strip().splitlines())
def test_where_one_function_trains_and_scores(case):
    """A count of the shards in the log, before the training, is no read by the evaluation."""
    name, called, trained, scored, verdict, words = case.split(" | ")
    script = COUNTED.format(name=name, called=called, trained=trained, scored=scored)
    assert_found("S5", script, verdict, words)


def test_native_code_is_looked_at():
    assert word("S5", "from ctypes import CDLL\nCDLL('fast.so')") == "WARN"


OTHER_CODE = [
    ("import helper", "FAIL", "imports sibling helper.py"),
    ("from .other import x", "FAIL", "sibling other.py"),
    ("import einops", "FAIL", "imports einops"),
    ("def f():\n    import einops", "FAIL", "imports einops"),
    ("exec(open('model_code.py').read())", "FAIL", "sibling model_code.py"),
    (
        "from pathlib import Path\nPath(__file__).parent / 'helper.py'",
        "FAIL",
        "sibling helper.py",
    ),
    ("load_inline(sources=['kernel.cu'])\nopen('kernel.cu')", "FAIL", "sibling kernel.cu"),
    (
        "try:\n    import einops\nexcept ImportError:\n    einops = None",
        "WARN",
        "optional import of einops",
    ),
    ("exec(hidden())", "WARN", "cannot read"),
]


@pytest.mark.parametrize("script, verdict, words", OTHER_CODE)
def test_other_code(script, verdict, words):
    siblings = ["helper.py", "kernel.cu", "config.env"]
    assert_found("S6", script, verdict, words, requirements=PINNED, siblings=siblings)


LISTED = """
import json, torch.nn, numpy as np, yaml, my_pkg.part
from pathlib import Path
def attention():
    from flash_attn_interface import flash_attn_func
    import resource
open(Path("config.env")), Path(__file__).read_text(), print("helper.py")
"""
REQUIREMENTS = """
torch==2.13.0  # pinned
numpy
PyYAML[x]>=6
my-pkg ; python_version > '3'
# einops

"""


def test_listed_and_optional_imports():
    lines = REQUIREMENTS.splitlines()
    siblings = ["config.env", "helper.py"]
    assert word("S6", LISTED, requirements=lines, siblings=siblings) == "PASS"
    assumed = check("S6", "import zstandard")
    assert "no requirements.txt" in text_of(assumed)


@pytest.mark.parametrize(
    "module, verdict", [("torch", "PASS"), ("brotli", "PASS"), ("xxhash", "FAIL")]
)
def test_requirements_add_to_what_the_image_has(module, verdict):
    assert word("S6", f"import {module}", requirements=["brotli==1.1.0"]) == verdict


FALLBACK = "try:\n    import zstandard\nexcept {}:\n    {}"
FALLING_BACK = [
    FALLBACK.format("ImportError", "zstandard = None"),
    FALLBACK.format("Exception", "import zlib"),
    FALLBACK.format("ImportError", "HAVE_ZSTD = False"),
    "try:\n    import lzma\nexcept ImportError:\n    raise\nexcept OSError:\n    lzma = None",
    "import sys\nok = 'lzma' in sys.modules",
    "import contextlib\nwith contextlib.suppress(ImportError):\n    import brotli",
    "import importlib.util\nok = importlib.util.find_spec('brotli') is not None",
    "import zstandard\nok = hasattr(zstandard, 'compress')",
    """
        import zlib, lzma
        def f(b):
            try:
                return lzma.compress(b)
            except Exception:
                return zlib.compress(b)
    """,
]
PINNED_CODECS = [
    FALLBACK.format("ImportError", "raise SystemExit('pip install zstandard')"),
    "import sys\n" + FALLBACK.format("ImportError as e", "print(e)\n    sys.exit(1)"),
    "import zstandard, zlib, lzma",
    "import zlib\ntry:\n    raw = zlib.decompress(blob)\nexcept zlib.error:\n    raw = None",
    "try:\n    import resource\nexcept ImportError:\n    resource = None",
]


@pytest.mark.parametrize("script", FALLING_BACK)
def test_codec_falls_back(script):
    assert_found("S7", script, "FAIL", "silently falls back")


@pytest.mark.parametrize("script", PINNED_CODECS)
def test_pinned_codec(script):
    assert word("S7", script) == "PASS"


IMPORT_WORK = {
    "import torch\ntorch.cuda.set_device(0)": "line 2: torch.cuda.set_device works on the GPU",
    "import torch\nx = torch.zeros(3).cuda()": "works on the GPU",
    "import torch\nx = f().to('cuda:0')": "GPU",
    "import torch\nclass A:\n    x = torch.zeros(3, device='cuda')": "line 3",
    "import torch.distributed as dist\ndist.init_process_group('nccl')": "init_process_group",
    "from flash_attn_interface import flash_attn_func": "without a guard",
    "def main():\n    pass\nmain()": "main() runs at import",
    "try:\n    pass\nexcept* ValueError:\n    pass": "line ",
    "x = (1,\ny = 2": "cannot read the script: line 1",
}
HARMLESS_IMPORT = """
import os, torch
USE = torch.cuda.is_available() and os.environ.get("FAST", "1") == "1"
DEVICE, NAME = torch.device("cuda"), "cuda"
try:
    from flash_attn import flash_attn_func
except ImportError:
    flash_attn_func = None
text = f"{USE!r} {'a'} {f'{NAME}'}" + f'{DEVICE}'
def main():
    torch.cuda.synchronize()
if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("script, words", IMPORT_WORK.items())
def test_import_work(script, words):
    assert_found("S8", script, "FAIL", words)


def test_an_f_string_of_python_312_is_a_warning():
    """Legal where the contest runs; the community's reviewers read with 3.10."""
    assert_found("S8", "x = 1\ny = f'{d['a']}'", "WARN", "line 2")


def test_import_that_is_harmless():
    assert word("S8", HARMLESS_IMPORT) == "PASS"


@pytest.mark.skipif(not hasattr(tokenize, "FSTRING_START"), reason="this Python refuses them")
def test_quotes_inside_an_f_string():
    nested = "x = f'{d['a']}'\ny = f\"{d['a']}\"\n"
    assert source.nested_quotes(nested) == [1]


LITERALS = {
    "PATH = '/workspace/data/x.bin'": "absolute path '/workspace/data/x.bin'",
    "def f(n):\n    return f'/home/{n}/x'": "absolute path '/home/'",
    r"P = 'C:\\data'": "absolute path",
    "def val_bpb(loss):\n    return loss / LN2 / 2.436": "2.436 stands for the bytes",
    "val_bpb = loss * 1.4427 / 3.7266": "3.7266 stands for",
    "BYTES_PER_TOKEN = 2.4359": "2.4359",
    "def f(loss, tokens_per_byte=0.41052):\n    return loss * tokens_per_byte": "0.41052",
    "import os\nX = os.environ.get('BYTES_PER_TOKEN', '2.436')": (
        "the setting BYTES_PER_TOKEN=2.436"
    ),
    "for seed in range(9):\n    b = run(seed)\n    if b < best:\n        best = b": (
        "keeps the best of several seeds"
    ),
    "for seed in SEEDS:\n    best = min(best, run(seed))": "best of several seeds",
    "result = min(run(seed) for seed in (1, 2, 3))": "best of several seeds",
    "scores = [run(s) for s in seeds]\nprint(min(scores))": "best of several seeds",
}
HARMLESS_LITERALS = [
    (
        '"""Put the data in /workspace/data."""\nopen("/proc/cpuinfo")\n'
        'X = f"{BASE}/data/x" + "/tmp"'
    ),
    "a, b, c = 3.4445, -4.7750, 2.0315\nx = a * 3.4445",
    "def bpb(loss):\n    return loss / 0.6931 * 2.0 / 2.5",
    "def main():\n    bpb = f()\n    rate = 3.125 * warmth",
    "RATE = 2.436",
    (
        "runs = [run(seed) for seed in seeds]\n"
        "print(sum(runs) / len(runs), max(code for code, _ in runs))"
    ),
    (
        "for seed in seeds:\n    torch.manual_seed(seed)\n    scores.append(run())\n"
        "print(mean(scores))"
    ),
]


@pytest.mark.parametrize("script, words", LITERALS.items())
def test_literals(script, words):
    assert_found("S10", script, "FAIL", words)


@pytest.mark.parametrize("script", HARMLESS_LITERALS)
def test_harmless_literals(script):
    assert word("S10", script) == "PASS"


def test_long_lists_are_cut_and_the_worst_comes_first():
    """Six sentences of one check are spelt out; equal ones count once."""
    lines = ["import ctypes"]
    for number in range(4):
        lines.append(f"ctypes.CDLL('x{number}')")
    for module in ("socket", "requests", "http", "socket"):
        lines.append(f"import {module}")
    lines.append(lines[-1] + ", socket")
    finding = check("S5", "\n".join(lines))
    assert finding.word == "FAIL"
    told = text_of(finding).split("; ")
    assert "imports socket" in told[0]
    assert told[-1] == "and 3 more"
    assert len([part for part in told if part.startswith("line ")]) == 6


# Once each slipped through: what no other test here would have noticed.
SLIPPED = {
    "open('train_gpt.py').read()": "S6 PASS",
    "def f():\n    from flash_attn import flash_attn_func": "S6 PASS S8 PASS",
    "import torch\n@kept(torch.zeros(3, device='cuda'))\ndef f():\n    pass": "S8 FAIL",
    "import torch\ndef f(x=torch.zeros(3, device='cuda')):\n    pass": "S8 FAIL",
    "def val_bpb(loss):\n    return loss / 2.718281828": "S10 PASS",
    "def val_bpb(loss):\n    return loss / 3.14159265": "S10 PASS",
    "all = []\nfor seed in seeds:\n    all.append(run(seed))\nprint(min(all))": "S10 FAIL",
}


@pytest.mark.parametrize("script", SLIPPED)
def test_what_once_slipped_through(script):
    words = iter(SLIPPED[script].split())
    for name in words:
        verdict = next(words)
        assert word(name, script) == verdict


def test_one_of_several_handlers_goes_on_without_the_codec():
    script = (
        "try:\n    import zstandard\nexcept ImportError:\n    zstandard = None\n"
        "except OSError:\n    raise"
    )
    assert word("S7", script) == "FAIL"
