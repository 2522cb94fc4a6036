"""Each static check reports its planted fault and leaves the legal script next to it alone."""

import ast
import base64
import bz2
import gzip
import lzma
import random
import textwrap
import zlib

import pytest
import source
import static_checks as sc
from conftest import ROOT

import train_gpt as tg

OURS = (ROOT / "train_gpt.py").read_text()
PINNED = (ROOT / "requirements.txt").read_text().splitlines()


def check(id, script, **options):
    findings = {
        finding.id: finding for finding in sc.static_checks(textwrap.dedent(script), **options)
    }
    assert list(findings) == list(sc.CHECKS)
    return findings[id]


def indented(text, spaces=4):
    return textwrap.indent(textwrap.dedent(text).strip("\n"), " " * spaces)


def program(body, helpers=""):
    """A script whose main() trains legally on the training stream, then runs body on val_tokens."""
    return "\n".join(
        [
            "import torch, os",
            "import torch.nn.functional as F",
            textwrap.dedent(helpers),
            """
def main():
    args, model, opt, stream = setup()
    val_tokens = load_validation_tokens(args.val_files, args.seq_len)
    for step in range(args.iterations):
        if step % args.val_loss_every == 0:
            val_loss, val_bpb = eval_val(args, model, val_tokens)
        x, y = stream.next_batch()
        loss = model(x, y)
        loss.backward()
        opt.step()""",
            indented(body),
            """
if __name__ == "__main__":
    main()
""",
        ]
    )


# S1: five epochs over all validation tokens inline in main() before the score, the shape that a
# reviewer overlooked
EPOCHS_IN_MAIN = """
    val_loss, val_bpb = eval_val(args, model, val_tokens)
    if args.ttt_epochs > 0:
        tuner = torch.optim.AdamW(model.parameters(), lr=args.ttt_lr)
        for epoch in range(args.ttt_epochs):
            total = 0.0
            for at in range(0, val_tokens.numel() - 1, args.seq_len):
                piece = val_tokens[at:at + args.seq_len + 1].to(torch.int64)
                x, y = piece[:-1], piece[1:]
                tuner.zero_grad()
                loss = model(x, y)
                loss.backward()
                tuner.step()
                total += loss.item()
    val_loss, val_bpb = eval_val(args, model, val_tokens)
"""
ADAPT = """
def adapt(model, tokens, epochs, opt):
    for _ in range(epochs):
        opt.zero_grad()
        loss = model(tokens[:-1], tokens[1:])
        loss.backward()
        opt.step()
"""
QUIET = """
@torch.inference_mode()
def score_chunk(model, tokens):
    return model(tokens[:-1], tokens[1:])
"""
DISCARDED_SCORE = """
    for epoch in range(args.epochs):
        for at in range(0, len(val_tokens), 64):
            piece = val_tokens[at:at + 65]
            with torch.no_grad():
                total += model(piece[:-1], piece[1:])
            loss = model(piece[:-1], piece[1:])
            loss.backward()
            opt.step()
"""
SCORE_FIRST = """
    total, count = 0.0, args.chunks
    for index in range(count):
        piece = val_tokens[index * 64:index * 64 + 65]
        with torch.inference_mode():
            for part in piece.split(8):
                nll = F.cross_entropy(model(part[:-1]), part[1:])
                total += nll.sum()
        if index + 1 < count:
            for epoch in range(args.ttt_epochs):
                for part in piece.split(8):
                    loss = model(part[:-1], part[1:])
                    loss.backward()
                    opt.step()
"""
ONE_FORWARD = """
    for piece in val_tokens.split(64):
        nll = model(piece[:-1], piece[1:])
        with torch.no_grad():
            total += nll.double().sum()
        nll.mean().backward()
        opt.step()
"""
HARNESS = """
class Predictor:
    @torch.inference_mode()
    def score(self, batch):
        return F.cross_entropy(self.model(batch.ids), batch.targets)

    def observe(self, tokens):
        for _ in range(3):
            loss = self.model(tokens[:-1], tokens[1:])
            loss.backward()
            self.opt.step()

def charge(score, nats):
    score.total += nats.sum()

def evaluate(predictor, tokens, score):
    for lo, hi in chunks(tokens):
        for batch in batches(tokens, lo, hi):
            nats = predictor.score(batch)
            charge(score, nats)
        predictor.observe(tokens[lo:hi + 1])
"""
IN_CALLER = (
    "total = 0.0\nfor piece in val_tokens.split(64):\n    total += score_chunk(model, piece)\n"
    "    adapt(model, piece, 3, opt)"
)


@pytest.mark.parametrize(
    "script, where",
    [
        (program(EPOCHS_IN_MAIN), "main trains"),
        (
            program("adapt(model, val_tokens, 5, opt)\neval_val(args, model, val_tokens)", ADAPT),
            "adapt trains",
        ),
        (
            program(
                "for piece in val_tokens.split(64):\n    adapt(model, piece, 3, opt)\n"
                "    total += score_chunk(model, piece)",
                ADAPT + QUIET,
            ),
            "adapt trains",
        ),
        (program(DISCARDED_SCORE), "main trains"),
    ],
    ids=["inline", "function", "adapt_then_score", "every_epoch"],
)
def test_training_before_the_score(script, where):
    finding = check("S1", script)
    assert finding.verdict == "WARN" and where in finding.text and "scored before" in finding.text
    assert finding.text.count("trains on") == 1  # the training loop proper is not meant


@pytest.mark.parametrize(
    "script",
    [
        program("eval_val(args, model, val_tokens)"),
        program(SCORE_FIRST),
        program(IN_CALLER, ADAPT + QUIET),
        program("evaluate(Predictor(), val_tokens, score)", HARNESS),
        program("eval_val(val_tokens)", ADAPT),
        program(ONE_FORWARD),
    ],
    ids=["no_ttt", "score_first", "in_caller", "harness", "never_called", "one_forward"],
)
def test_score_first_is_legal(script):
    assert check("S1", script).verdict == "PASS"


def test_what_the_run_switched_off_is_left_out():
    script = 'import os\nEPOCHS = int(os.environ.get("TTT_EPOCHS", 5))\n' + program(EPOCHS_IN_MAIN)
    assert check("S1", script, run_settings={"TTT_EPOCHS": "0"}).verdict == "PASS"
    assert check("S1", script, run_settings={"SEED": "1"}).verdict == "WARN"
    # What ran is not known.
    assert check("S1", script, config={"TTT_EPOCHS": "0"}).verdict == "WARN"


# S2: hashed n-gram cache with the target in the key, as in the caches that were closed
CACHE = """
import numpy as np
def eval_ngram(tokens, where, primes, mask, table, full, p):
    key = np.zeros(len(where), dtype=np.uint64)
    for k in range(4):
        key ^= tokens[where - (4 - k)] * primes[k]
    tgt = tokens[where]
    pair = ((key ^ (tgt * primes[4])) & mask).astype(np.int64)
    seen = table[key & mask]
    LOOKUP
    np.add.at(table, key & mask, 1)
    np.add.at(full, pair, 1)
    return p
eval_ngram(*arguments())
"""
ORACLE = """
def look_up(table, slots):
    return table.index_select(0, slots)
class Oracle:
    def probability(self, x, y):
        both = (x * 36313 + y * 27191) % 1048576
        return look_up(self.full, both)
Oracle().probability(x, y)
"""
MODEL = """
class Bigram(nn.Module):
    def rows(self, tokens):
        t = tokens.int()
        out = torch.empty_like(t)
        out[..., 1:] = torch.bitwise_xor(36313 * t[..., 1:], 27191 * t[..., :-1]) % 4095
        return out
    def forward(self, ids, targets=None):
        logits = self.head(self.table[self.rows(ids)])
        picked = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1))
        return F.cross_entropy(logits, targets) + picked[targets > 0].sum()
"""


def test_target_in_the_key():
    for script in (CACHE.replace("LOOKUP", "p = full[pair] / seen"), ORACLE):
        finding = check("S2", script)
        assert finding.verdict == "WARN" and "hash that contains the target" in finding.text
    read = CACHE.replace("LOOKUP", "p[full[pair] > 0] = 1")
    assert check("S2", read).verdict == "WARN"
    # Nothing calls it.
    assert check("S2", read.replace("eval_ngram(*arguments())", "")).verdict == "PASS"


def test_context_keys_updates_and_final_charges_are_legal():
    assert check("S2", CACHE.replace("LOOKUP", "full[pair] = full[pair] + 1")).verdict == "PASS"
    assert (
        check("S2", CACHE.replace("LOOKUP", "p = seen.full_distribution()[tgt]")).verdict == "PASS"
    )
    assert check("S2", MODEL + "\nloss = Bigram()(x, y)").verdict == "PASS"


SLOT = """
def eval_slot(model, val_tokens):
    for window in windows(val_tokens):
        hidden = model.hidden(window)
        delta = MADE
        for _ in range(8):
            loss = model.nll(hidden + delta, window)
            loss.backward()
        total += model.nll(hidden + delta.detach(), window)
eval_slot(model, val_tokens)
"""


@pytest.mark.parametrize(
    "made",
    [
        "torch.zeros(512, requires_grad=True)",
        "torch.zeros(512).requires_grad_()",
        "torch.nn.Parameter(torch.zeros(512))",
    ],
)
def test_optimised_on_the_scored_window(made):
    finding = check("S3", SLOT.replace("MADE", made))
    assert (
        finding.verdict == "WARN"
        and "trainable tensor" in finding.text
        and "eval_slot" in finding.text
    )


def test_training_the_models_own_parameters_is_no_slot():
    legal = SLOT.replace("MADE", "torch.zeros(512)").replace(
        "hidden = ",
        """for p in model.parameters():
            p.requires_grad_(True)
        hidden = """,
    )
    assert check("S3", legal).verdict == "PASS"
    assert (
        check(
            "S3",
            SLOT.replace("MADE", "torch.zeros(512, requires_grad=True)")
            .replace("eval_slot", "pretrain")
            .replace("val_tokens", "tokens"),
        ).verdict
        == "PASS"
    )


@pytest.mark.parametrize(
    "line",
    [
        "nll = torch.minimum(nll_model, nll_cache)",
        "nll = np.minimum(model.nll, cache_nll)",
        "val_bpb = min(plain_bpb, ngram_bpb)",
        "nll = torch.stack([nll_a, nll_b]).amin(0)",
        "which = torch.stack([loss_a, loss_b]).argmin(0)",
        "nll = torch.where(nll_a < nll_b, nll_a, nll_b)",
        "nll = nll_a if nll_a < nll_b else nll_b",
    ],
)
def test_lower_of_two_scores(line):
    finding = check("S4", program(line))
    assert finding.verdict == "WARN" and "picks the lower of" in finding.text


@pytest.mark.parametrize(
    "line",
    [
        "best_loss = min(best_loss, val_loss)",
        "rows = min(len(losses), len(score.nats))",
        "nll = min(nll, 20.0)",
        "p = torch.where(seen > 0, p_mixed, p_model)",
        "counts = np.minimum(full_counts, context_counts)",
    ],
)
def test_other_minima(line):
    assert check("S4", program(line)).verdict == "PASS"


S5_FAULTS = [
    ("import requests", "imports requests"),
    ("def f():\n    import urllib.request", "imports urllib.request"),
    ("__import__('socket')", "imports socket"),
    (
        "import subprocess as sp\nsp.run(['pip', 'install', 'x'])",
        "installs software (pip install x)",
    ),
    ("import os\nos.system('apt-get install zstd')", "installs software (apt-get"),
    ("from subprocess import check_output as go\ngo(['make'])", "starts make"),
    ("import subprocess\nsubprocess.run(command)", "no literal"),
    (
        "import subprocess\nsubprocess.run('git log; wget example.com', shell=True)",
        "starts git log; wget",
    ),
    ("import subprocess\nsubprocess.run(['git', 'clone', address])", "starts git clone"),
    ("import torch\nmodel = torch.hub.load('a', 'b')", "torch.hub.load downloads"),
    ("from hub import snapshot_download\nsnapshot_download('x')", "downloads"),
    (
        "def eval_all(a):\n    calibrate(a)\ndef calibrate(a):\n    load_shard(a.train_files)",
        "calibrate reads",
    ),
    ("def ttt():\n    return open('data/fineweb_train_000001.bin')", "ttt reads training files"),
]


@pytest.mark.parametrize("script, words", S5_FAULTS)
def test_foreign_access(script, words):
    finding = check("S5", script)
    assert finding.verdict == "FAIL" and words in finding.text


@pytest.mark.parametrize(
    "script",
    [
        "import subprocess\nsubprocess.run(['git', 'rev-parse', 'HEAD'], capture_output=True)",
        "import subprocess\nsubprocess.check_output('nvidia-smi --list-gpus', shell=True)",
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
    assert check("S5", script).verdict == "PASS"
    assert check("S5", "from ctypes import CDLL\nCDLL('fast.so')").verdict == "WARN"


@pytest.mark.parametrize(
    "script, verdict, words",
    [
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
    ],
)
def test_other_code(script, verdict, words):
    finding = check(
        "S6", script, requirements=PINNED, siblings=["helper.py", "kernel.cu", "config.env"]
    )
    assert finding.verdict == verdict and words in finding.text


def test_listed_and_optional_imports():
    legal = """
        import json, torch.nn, numpy as np, yaml, my_pkg.part
        from pathlib import Path
        def attention():
            from flash_attn_interface import flash_attn_func
            import resource
        open(Path("config.env")), Path(__file__).read_text(), print("helper.py")
    """
    lines = [
        "torch==2.13.0  # pinned",
        "numpy",
        "PyYAML[x]>=6",
        "my-pkg ; python_version > '3'",
        "# einops",
        "",
    ]
    assert (
        check("S6", legal, requirements=lines, siblings=["config.env", "helper.py"]).verdict
        == "PASS"
    )
    assert "none were given" in check("S6", "import zstandard").text


FALLBACK = "try:\n    import zstandard\nexcept {}:\n    {}"


@pytest.mark.parametrize(
    "script",
    [
        FALLBACK.format("ImportError", "zstandard = None"),
        FALLBACK.format("Exception", "import zlib"),
        FALLBACK.format("ImportError", "HAVE_ZSTD = False"),
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
    ],
)
def test_codec_falls_back(script):
    finding = check("S7", script)
    assert finding.verdict == "FAIL" and "silently falls back" in finding.text


@pytest.mark.parametrize(
    "script",
    [
        FALLBACK.format("ImportError", "raise SystemExit('pip install zstandard')"),
        "import sys\n" + FALLBACK.format("ImportError as e", "print(e)\n    sys.exit(1)"),
        "import zstandard, zlib, lzma",
        "import zlib\ntry:\n    raw = zlib.decompress(blob)\nexcept zlib.error:\n    raw = None",
        "try:\n    import resource\nexcept ImportError:\n    resource = None",
    ],
)
def test_pinned_codec(script):
    assert check("S7", script).verdict == "PASS"


@pytest.mark.parametrize(
    "script, words",
    [
        (
            "import torch\ntorch.cuda.set_device(0)",
            "line 2: torch.cuda.set_device works on the GPU",
        ),
        ("import torch\nx = torch.zeros(3).cuda()", "works on the GPU"),
        ("import torch\nx = f().to('cuda:0')", "GPU"),
        ("import torch\nclass A:\n    x = torch.zeros(3, device='cuda')", "line 3"),
        ("import torch.distributed as dist\ndist.init_process_group('nccl')", "init_process_group"),
        ("from flash_attn_interface import flash_attn_func", "without a guard"),
        ("def main():\n    pass\nmain()", "main() runs at import"),
        ("try:\n    pass\nexcept* ValueError:\n    pass", "line "),
        ("x = (1,\ny = 2", "cannot read the script: line 1"),
        ("x = 1\ny = f'{d['a']}'", "line 2"),
    ],
)
def test_import_work(script, words):
    finding = check("S8", script)
    assert finding.verdict == "FAIL" and words in finding.text


def test_import_that_is_harmless():
    script = """
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
    assert check("S8", script).verdict == "PASS"


SETTINGS = """
import os, dataclasses
def env_int(name, default):
    return int(os.environ.get(name, default))
def number(default, doc):
    return dataclasses.field(default=default)
@dataclasses.dataclass
class Settings:
    num_layers: int = number(9, "blocks")
    ve_layers: tuple = (9, 10)
    smear: bool = True
    seed: int = int(os.environ.get("SEED", "1337"))
    name: str = number(default="x", doc="")
    later: list = dataclasses.field(default_factory=list)
Config = Hyperparameters = Settings
EPS = float(os.getenv("ADAM_EPS", 1e-8))
TTT = bool(int(os.environ.get("TTT", "0")))
BATCH, RATE = env_int("BATCH", 2 ** 19), env_int("RATE", default=-3)
PATH, NEEDED, OTHER = os.environ["DATA_PATH"], os.getenv("NEEDED"), os.environ.get("OTHER", f(3))
"""


def test_declared_settings():
    script = SETTINGS.replace("Config = Hyperparameters", "Hyperparameters")
    assert source.declared_settings(ast.parse(script)) == {
        "NUM_LAYERS": "9",
        "VE_LAYERS": "9,10",
        "SMEAR": "1",
        "SEED": "1337",
        "NAME": "x",
        "LATER": None,
        "ADAM_EPS": "1e-08",
        "TTT": "0",
        "BATCH": "524288",
        "RATE": "-3",
        "DATA_PATH": None,
        "NEEDED": None,
        "OTHER": None,
    }
    ours = source.declared_settings(ast.parse(OURS))
    assert {name: source.plain_value(text) for name, text in ours.items()} == {
        name: source.plain_value(str(field.default)) for name, field in tg.FIELDS.items()
    }


def test_defaults_against_the_run():
    same = {
        "NUM_LAYERS": "9.0",
        "VE_LAYERS": "[9, 10]",
        "SMEAR": "True",
        "SEED": "7",
        "ADAM_EPS": "0.00000001",
        "TTT": "false",
        "UNKNOWN": "3",
        "DATA_PATH": "elsewhere",
        "OTHER": "4",
    }
    assert check("S9", SETTINGS, run_settings=same).verdict == "PASS"
    run = {**same, "NUM_LAYERS": "11", "TTT": "1"}
    finding = check("S9", SETTINGS, run_settings=run)
    assert finding.verdict == "FAIL" and "NUM_LAYERS: default 9, the run had 11" in finding.text
    assert finding.figures["differing"] == {"NUM_LAYERS": ["9", "11"], "TTT": ["0", "1"]}
    assert (
        check("S9", SETTINGS, run_settings=run, config={"NUM_LAYERS": "11", "TTT": "1"}).verdict
        == "PASS"
    )
    assert check("S9", SETTINGS, run_settings=same, config={"TTT": "1"}).verdict == "FAIL"
    assert check("S9", SETTINGS).verdict == "SKIPPED"
    assert source.plain_value("()") == source.plain_value("") and source.plain_value("embed:8") == (
        "embed:8",
    )


@pytest.mark.parametrize(
    "script, words",
    [
        ("PATH = '/workspace/data/x.bin'", "absolute path '/workspace/data/x.bin'"),
        ("def f(n):\n    return f'/home/{n}/x'", "absolute path '/home/'"),
        (r"P = 'C:\\data'", "absolute path"),
        ("def val_bpb(loss):\n    return loss / LN2 / 2.436", "2.436 stands for the bytes"),
        ("val_bpb = loss * 1.4427 / 3.7266", "3.7266 stands for"),
        ("BYTES_PER_TOKEN = 2.4359", "2.4359"),
        ("def f(loss, tokens_per_byte=0.41052):\n    return loss * tokens_per_byte", "0.41052"),
        (
            "import os\nX = os.environ.get('BYTES_PER_TOKEN', '2.436')",
            "the setting BYTES_PER_TOKEN=2.436",
        ),
        (
            "for seed in range(9):\n    b = run(seed)\n    if b < best:\n        best = b",
            "keeps the best of several seeds",
        ),
        ("for seed in SEEDS:\n    best = min(best, run(seed))", "best of several seeds"),
        ("result = min(run(seed) for seed in (1, 2, 3))", "best of several seeds"),
        ("scores = [run(s) for s in seeds]\nprint(min(scores))", "best of several seeds"),
    ],
)
def test_literals(script, words):
    finding = check("S10", script)
    assert finding.verdict == "FAIL" and words in finding.text


@pytest.mark.parametrize(
    "script",
    [
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
    ],
)
def test_harmless_literals(script):
    assert check("S10", script).verdict == "PASS"


RAW = {"format": lzma.FORMAT_RAW, "filters": [{"id": lzma.FILTER_LZMA2, "preset": 9}]}
WRAPPERS = {
    "raw": lambda data: (
        "import lzma as L,base64 as B\nexec(L.decompress(B.b85decode("
        f"{base64.b85encode(lzma.compress(data, **RAW)).decode()!r}),"
        "format=L.FORMAT_RAW,filters=[{'id':L.FILTER_LZMA2}]))"
    ),
    "xz": lambda data: (
        f"from lzma import decompress as d\nS = {lzma.compress(data)!r}\n"
        "exec(compile(d(S), 'x', 'exec'))"
    ),
    "zlib": lambda data: (
        "exec(__import__('zlib').decompress(__import__('base64').b64decode("
        f"{base64.b64encode(zlib.compress(data))!r})).decode('utf-8'), globals())"
    ),
    "bz2": lambda data: (
        f"import bz2, base64\ncode = base64.a85decode({base64.a85encode(bz2.compress(data))!r})\n"
        "source = bz2.decompress(code)\nif True:\n    exec(source)"
    ),
    "gzip": lambda data: f"import gzip\nexec(gzip.decompress({gzip.compress(data)!r}))",
}


def packed(script, form):
    return WRAPPERS[form](script.encode())


@pytest.mark.parametrize("form", WRAPPERS)
def test_wrappers(form):
    script = "import requests\nprint('é')\n"
    assert source.unpack_source(packed(script, form)) == (script, 1)
    assert check("S5", packed(script, form)).verdict == "FAIL"


def test_wrappers_have_bounds(tmp_path):
    layers = [f"open({str(tmp_path / 'ran')!r}, 'w')"]
    for form in ("xz", "raw", "zlib", "bz2"):
        layers.append(packed(layers[-1], form))
    assert source.unpack_source(layers[3]) == (layers[0], 3) and source.unpack_source(
        layers[4]
    ) == (layers[1], 3)
    assert not list(tmp_path.iterdir())  # nothing was executed
    bomb = packed("#" * (source.MAX_EXPANDED + 1), "zlib")
    cut = packed("x = 1", "xz").replace("S = b'\\xfd", "S = b'\\xfe")
    for text in (
        bomb,
        cut,
        OURS,
        "",
        "exec(open('x').read())",
        "exec()",
        "a = a\nexec(a)",
        "x = 10 ** 10 ** 10\nexec(x)",
        "exec(__import__('os').system('true'))",
    ):
        assert source.unpack_source(text) == (text, 0)


def test_our_script_is_clean():
    found = sc.static_checks(
        OURS,
        requirements=PINNED,
        siblings=["config.env", "train.log"],
        config={"SEED": "7"},
        run_settings=dict(source.declared_settings(ast.parse(OURS))),
    )
    assert {finding.id: finding.verdict for finding in found} == dict.fromkeys(sc.CHECKS, "PASS"), (
        found
    )


def test_what_our_script_can_do_is_named_when_the_run_does_it():
    """The hashed caches and test-time training: silent by default.

    Two warnings when the settings switch them on.
    """
    on = {"NGRAM": "gated", "MIXER_HEAD": "1", "TTT_EPOCHS": "1"}
    found = sc.static_checks(
        OURS,
        requirements=PINNED,
        siblings=["config.env"],
        config=on,
        run_settings={**source.declared_settings(ast.parse(OURS)), **on},
    )
    texts = {finding.id: finding.text for finding in found if finding.verdict == "WARN"}
    assert set(texts) == {"S1", "S2"} and "TestTimeTraining.learn" in texts["S1"]
    assert "Trainer.step" not in texts["S1"]


def test_parts_that_settings_do_not_choose_are_not_live():
    text = """
def peek(x, targets): return x[targets ^ 31]
def used(x): return x
def wanted(cfg): return cfg.peeking != ""
def build(x: peek, t): return peek(x, t)
ROWS = [Row("a", wanted, build)]
TABLE = {"a": (lambda cfg: cfg.peeking, lambda x, t: peek(x, t))}
part = peek if cfg.peeking else used
"""
    for value, live in (("", False), ("1", True)):
        script = source.Script(text, [], [], {"PEEKING": value}, {})
        node = next(n for n in ast.walk(script.tree) if isinstance(n, ast.BinOp))
        assert script.live(node) is live


def test_odd_input_never_raises():
    rng = random.Random(0)
    lines = OURS.splitlines()[:400] + program(SCORE_FIRST, HARNESS).splitlines()
    odd = [
        "",
        "\0",
        "\ud800",
        "x = " + "(" * 300 + ")" * 300,
        "x = 1" + "+1" * 20000,
        "é" * 10,
        "lambda: (yield)",
        "match x:\n    case [a, *b]:\n        pass",
        "async def f():\n    async with a as b, c:\n        await d",
        "del x, y[0]",
        "x: int",
        "f(*a, **k)",
        "class A(B, metaclass=C): x = [i for i in j if i]",
        "open()",
        "min()",
    ]
    odd += ["\n".join(rng.sample(lines, 3)) for _ in range(40)]
    for text in odd:
        assert [finding.id for finding in sc.static_checks(text, run_settings={})] == list(
            sc.CHECKS
        )
    broken = sc.static_checks("x = (")
    assert [f.verdict for f in broken if f.id != "S8"] == [
        "SKIPPED"
    ] * 9 and "does not parse" in broken[0].text
