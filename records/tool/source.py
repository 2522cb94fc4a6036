"""Exact checks of a training script's text, S5 to S10: imports, calls and literals. They can fail.

What reaches the network or another file (S5, S6), what depends on the machine (S7, S8), and what
the text says against the run and the rules (S9, S10).
"""

from __future__ import annotations

import ast
import functools
import io
import math
import re
import sys
import tokenize
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from tool.finding import Problems, skipped
from tool.script import PLACES_AND_LABELS, Script, declared_needs, file_name, plain_value
from tool.tree import (
    FUNCTIONS,
    called,
    calls_in,
    dotted,
    given,
    keyword_value,
    line_of,
    names_in,
    text_of,
)
from train_gpt import Check, is_there

# S5: network, processes, training data

NETWORK = {
    "urllib",
    "urllib3",
    "requests",
    "http",
    "socket",
    "ftplib",
    "smtplib",
    "httpx",
    "aiohttp",
    "kernels",
    "huggingface_hub",
    "datasets",
    "wandb",
    "boto3",
    "pip",
    "ensurepip",
}
NETWORK_CALLS = re.compile(
    r"torch\.hub\.\w+|(.*\.)?(hf_hub_download|snapshot_download|get_kernel|urlopen|urlretrieve|"
    r"load_state_dict_from_url)"
)
PROCESSES = re.compile(
    r"subprocess\.(run|call|check_call|check_output|Popen|getoutput|getstatusoutput)|"
    r"os\.(system|popen|exec\w+|spawn\w+|posix_spawn\w*)|pty\.spawn|asyncio\.create_subprocess_\w+"
)
LOCAL_COMMANDS = (["git"], ["nvidia-smi"])
REMOTE_GIT = {"clone", "pull", "fetch", "push", "ls-remote", "submodule", "remote"}
INSTALLERS = {"pip", "pip3", "apt", "apt-get", "conda", "uv"}
CHAINED = re.compile(r"[;&|<>$`\n(]")  # a shell line of more than one command
NATIVE = re.compile(
    r"ctypes\.(CDLL|PyDLL|WinDLL|OleDLL|cdll\.\w+)|torch\.utils\.cpp_extension\.load\w*|cffi\.\w+"
)
TRAIN_DATA = re.compile(
    r"fineweb_train|(^|\b|_)train_(files|pattern|glob|shards|data_path)($|\b)", re.I
)
LATE = re.compile(r"(^|[._])(eval|scor|ttt)", re.I)
TRAINING = re.compile(r"(^|_)train(ing)?(_|$)", re.I)
LENGTH_OF_TRAINING = re.compile(r"iterations|max_wallclock|(max|num|total)_steps|warmdown", re.I)
READING = re.compile(
    r"open|read|load|glob|shard|file|path|mmap|memmap|stream|calib|hess|collect|gptq|fill", re.I
)


def check_foreign_access(script: Script) -> Check:
    """S5: no network, no package manager, no process but git and nvidia-smi.

    And no training data in the evaluation.
    """
    problems = Problems()
    for node, module in script.imports:
        if module.split(".")[0] in NETWORK and module != "urllib.parse":
            reaches = "which reaches the network or installs software"
            problems.fail(f"{line_of(node)}: imports {module}, {reaches}")
    for call in script.calls:
        _check_foreign_call(call, dotted(call, script.aliases), problems)
    _check_late_train_reads(script, problems)
    return problems.outcome(
        "S5", "no network, installer, foreign process or training data in the evaluation"
    )


def _check_foreign_call(call: ast.Call, name: str, problems: Problems) -> None:
    line = line_of(call)
    if PROCESSES.fullmatch(name):
        started = _foreign_process(call)
        if started:
            allowed = "allowed are git (local) and nvidia-smi"
            problems.fail(f"{line}: {name} {started}; {allowed}")
    elif NETWORK_CALLS.fullmatch(name):
        problems.fail(f"{line}: {name} downloads; the run may not use the network")
    elif NATIVE.fullmatch(name) and not _names_this_process(call):
        problems.warn(
            f"{line}: {name} brings in native code; its source counts as code and must be in this "
            "file"
        )


def _names_this_process(call: ast.Call) -> bool:
    """`ctypes.CDLL(None)`: the libraries that are loaded already."""
    if not call.args:
        return False
    first = call.args[0]
    return isinstance(first, ast.Constant) and first.value is None


def _foreign_process(call: ast.Call) -> str:
    """What the start of a process does, empty for a literal local git or nvidia-smi command."""
    command = _command(call)
    if isinstance(command, (ast.List, ast.Tuple)):
        words = [text_of(part) for part in command.elts]
        chained = False
    else:
        line = text_of(command)
        words = line.split()
        chained = bool(CHAINED.search(line))
    local = words[:1] in LOCAL_COMMANDS and not REMOTE_GIT.intersection(words)
    if local and not chained:
        return ""
    shown = " ".join(words)[:60] or "a command that is no literal"
    if INSTALLERS.intersection(words):
        return f"installs software ({shown})"
    return f"starts {shown}"


def _command(call: ast.Call) -> ast.expr:
    if call.args:
        return call.args[0]
    named = keyword_value(call, "args")
    return call.func if named is None else named


def _check_late_train_reads(script: Script, problems: Problems) -> None:
    """Reads of training files by what scores; where one function also trains, perhaps before."""
    named = [f for f in script.nodes if isinstance(f, FUNCTIONS) and LATE.search(f.name)]
    both = [function for function in named if _trains_too(script, function)]
    evaluation = _with_called(script, [function for function in named if function not in both])
    for call in _train_reads(evaluation):
        problems.fail(
            f"{line_of(call)}: {script.where(call)} reads training files during evaluation; "
            "they are not part of the artifact"
        )
    of_both = [f for f in _with_called(script, both) if f not in set(evaluation)]
    for call in _train_reads(of_both):
        problems.warn(
            f"{line_of(call)}: {script.where(call)} reads training files, and is called where the "
            "script both trains and scores; they are not part of the artifact"
        )


def _trains_too(script: Script, function: ast.AST) -> bool:
    """Whether an evaluation function is also the training: by its name, or it calls the loop."""
    if TRAINING.search(function.name):
        return True
    for call in calls_in(function):
        if isinstance(call.func, ast.Name):
            if any(map(_is_training_loop, script.functions.get(call.func.id, ()))):
                return True
    return False


def _is_training_loop(function: ast.AST) -> bool:
    """A function named as the training, with a backward pass, that knows how long it takes."""
    if not TRAINING.search(function.name) or LATE.search(function.name):
        return False
    names = names_in(function)
    return "backward" in names and any(map(LENGTH_OF_TRAINING.search, names))


def _train_reads(functions: Iterable[ast.AST]) -> Iterator[ast.Call]:
    """Calls with a training file as argument."""
    for function in functions:
        for call in calls_in(function):
            if READING.search(called(call)) and _is_given_train_data(call):
                yield call


def _with_called(script: Script, functions: Iterable[ast.AST]) -> list[ast.AST]:
    """These functions, and those they call."""
    reached = list(functions)
    known = set(reached)
    for function in reached:  # grows while it is read
        for call in calls_in(function):
            for other in script.functions.get(called(call), ()):
                if other not in known:
                    known.add(other)
                    reached.append(other)
    return reached


def _is_given_train_data(call: ast.Call) -> bool:
    for argument in given(call):
        for part in ast.walk(argument):
            if TRAIN_DATA.search(text_of(part) or called(part)):
                return True
    return False


# S6: one file

IMPORT_OF = {
    "triton": "torch",
    "yaml": "pyyaml",
    "sklearn": "scikit_learn",
    "google": "protobuf",
    "PIL": "pillow",
    "flash_attn_interface": "flash_attn",
}
# What the contest's image has, whatever requirements.txt adds to it.
IMAGE = (
    "torch",
    "numpy",
    "sentencepiece",
    "zstandard",
    "tqdm",
    "tiktoken",
    "typing_extensions",
    "setuptools",
)
PYTHON_FILES = (".py", ".pyc", ".so")  # code, whoever wrote it
CODE_FILES = (*PYTHON_FILES, ".c", ".cc", ".cpp", ".cu", ".h")
READERS = (
    "open",
    "Path",
    "run_path",
    "run_module",
    "read_text",
    "with_name",
    "joinpath",
    "join",
    "spec_from_file_location",
    "SourceFileLoader",
    "CDLL",
    "load",
    "load_inline",
)
RUNNERS = ("exec", "eval", "builtins.exec")


def check_single_file(script: Script) -> Check:
    """S6: all imports are standard library or in requirements.txt; no code from another file."""
    known = _listed_packages(script.requirements) | set(IMAGE)
    problems = Problems()
    for node, module in script.imports:
        _check_module(script, node, module, known, problems)
    for node in script.nodes:
        _check_use_of_code(script, node, problems)
    listed = "requirements.txt" if script.requirements else "no requirements.txt"
    told = f"imports are standard library, of the contest's image or listed ({listed})"
    return problems.outcome("S6", f"one code file; {told}")


def _listed_packages(requirements: Sequence[str]) -> set[str]:
    """Names of the packages in lines of requirements.txt, as imports spell them."""
    listed = set()
    for line in requirements:
        name = re.match(r"[A-Za-z0-9][\w.-]*", line.strip())
        if name:
            listed.add(re.sub(r"[-_.]+", "_", name[0].lower()))
    return listed


def _check_module(
    script: Script, node: ast.AST, module: str, known: set[str], problems: Problems
) -> None:
    root = module.lstrip(".").split(".")[0]
    line = line_of(node)
    if module.startswith(".") or f"{root}.py" in script.siblings:
        problems.fail(f"{line}: imports sibling {root}.py; all code must be in this file")
        return
    if root in sys.stdlib_module_names or known.intersection(_package_names(root)):
        return
    guarded = _is_guarded(script, node)
    if root.startswith("flash_attn") and (guarded or script.owner(node)):
        return  # every GPU image has another one, or none
    if guarded:
        problems.warn(f"{line}: optional import of {root}, which requirements.txt does not list")
    else:
        problems.fail(f"{line}: imports {root}, not standard library nor in requirements.txt")


def _package_names(root: str) -> set[str]:
    return {root.lower(), IMPORT_OF.get(root, "").lower()}


def _is_guarded(script: Script, node: ast.AST) -> bool:
    """Whether an import may fail: inside try, `with suppress(...)` or a condition."""
    for up in script.above(node):
        if isinstance(up, (ast.Try, ast.If)):
            return True
        if isinstance(up, ast.With) and "suppress" in ast.unparse(up.items[0]):
            return True
    return False


def _check_use_of_code(script: Script, node: ast.AST, problems: Problems) -> None:
    """Reads of another code file by a literal name, and exec of what cannot be read here."""
    for name in map(file_name, _read_paths(node)):
        sibling = name in script.siblings and name.endswith(CODE_FILES)
        foreign = name.endswith(PYTHON_FILES) and name != "train_gpt.py"
        if foreign or sibling:
            problems.fail(
                f"{line_of(node)}: uses code of sibling {name}; all code must be in this file"
            )
    if isinstance(node, ast.Call) and dotted(node, script.aliases) in RUNNERS:
        problems.warn(f"{line_of(node)}: {called(node)} runs code that this check cannot read")


def _read_paths(node: ast.AST) -> list[str]:
    """Literal paths that an expression opens or joins: open("a.py"), folder / "a.py"."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        return [text_of(node.right)]
    if isinstance(node, ast.Call) and called(node) in READERS:
        return list(map(text_of, given(node)))
    return []


# S7: the codec

CODECS = {
    "zstandard",
    "zstd",
    "pyzstd",
    "brotli",
    "brotlicffi",
    "lzma",
    "zlib",
    "bz2",
    "gzip",
    "lz4",
    "snappy",
}
ENDINGS = ("exit", "_exit", "quit", "abort")


def check_codec(script: Script) -> Check:
    """S7: the codec does not depend on what happens to be installed."""
    problems = Problems()
    for node in script.nodes:
        names = sorted(_hidden_codecs(script, node))
        if names:
            problems.fail(
                f"{line_of(node)}: silently falls back to another codec where {', '.join(names)} "
                "is missing or fails; the artifact's size would depend on the machine"
            )
    return problems.outcome("S7", "no compressor is chosen by what is installed")


def _hidden_codecs(script: Script, node: ast.AST) -> set[str]:
    """The codecs whose absence a statement or expression hides."""
    if isinstance(node, ast.Try):
        return _hidden_by_try(script, node)
    if isinstance(node, ast.With):
        suppresses = any("suppress" in ast.unparse(item.context_expr) for item in node.items)
        return _imported_codecs(script, node.body) if suppresses else set()
    if isinstance(node, ast.Call):
        return CODECS.intersection([_asked_for(script, node)])
    if isinstance(node, ast.Compare):
        asks = dotted(node.comparators[0], script.aliases) == "sys.modules"
        return CODECS.intersection([text_of(node.left)]) if asks else set()
    return set()


def _asked_for(script: Script, call: ast.Call) -> str:
    """The module that a call asks after: find_spec("lzma"), hasattr(lzma, "compress")."""
    if not call.args:
        return ""
    if called(call) == "find_spec":
        return text_of(call.args[0])
    if called(call) == "hasattr":
        return dotted(call.args[0], script.aliases).split(".")[0]
    return ""


def _hidden_by_try(script: Script, node: ast.Try) -> set[str]:
    """Codecs imported in a try that goes on without them, and called ones that others replace."""
    if not node.handlers or all(map(_gives_up, node.handlers)):
        return set()
    imported = _imported_codecs(script, node.body)
    tried = imported | _called_codecs(script, node.body)
    instead = _imported_codecs(script, node.handlers) | _called_codecs(script, node.handlers)
    return tried if instead - tried else imported


def _imported_codecs(script: Script, body: Iterable[ast.AST]) -> set[str]:
    """Codec modules that statements import."""
    inside = _ids(body)
    return _codecs(module for node, module in script.imports if id(node) in inside)


def _called_codecs(script: Script, body: Iterable[ast.AST]) -> set[str]:
    """Codec modules whose functions statements call."""
    return _codecs(dotted(call, script.aliases) for part in body for call in calls_in(part))


def _codecs(names: Iterable[str]) -> set[str]:
    return CODECS.intersection(name.split(".")[0] for name in names)


def _ids(body: Iterable[ast.AST]) -> set[int]:
    return {id(part) for node in body for part in ast.walk(node)}


def _gives_up(handler: ast.ExceptHandler) -> bool:
    """A handler that ends by raising or by leaving the program."""
    last = handler.body[-1]
    if isinstance(last, ast.Raise):
        return True
    if not isinstance(last, ast.Expr) or not isinstance(last.value, ast.Call):
        return False
    return called(last.value) in ENDINGS


# S8: importing it

HARMLESS = (
    "torch.cuda.is_available",
    "torch.cuda.device_count",
    "torch.cuda.amp.custom_fwd",
)


def check_import(script: Script) -> Check:
    """S8: Python 3.10 reads it, and importing it needs no GPU and no optional kernel."""
    problems = Problems()
    for line in nested_quotes(script.source):
        unread = "which Python 3.10 of the community's reviewers cannot read"
        problems.warn(f"line {line}: the same quotes inside an f-string, {unread}")
    for node in _run_at_import(script.tree):
        if isinstance(node, ast.Call):
            _check_call_at_import(script, node, problems)
    for node, module in script.imports:
        kernel = module.startswith("flash_attn") and script.owner(node) is None
        if kernel and not _is_guarded(script, node):
            problems.fail(
                f"{line_of(node)}: imports {module} at import time without a guard; it exists on "
                "few machines"
            )
    return problems.outcome("S8", "Python 3.10 syntax; importing it touches no GPU")


def _check_call_at_import(script: Script, call: ast.Call, problems: Problems) -> None:
    name = dotted(call, script.aliases)
    line = line_of(call)
    if _works_on_gpu(call, name):
        problems.fail(f"{line}: {name.lstrip('?.')} works on the GPU at import")
    elif name == "main" and "main" in script.functions:
        guard = 'guard it with if __name__ == "__main__"'
        problems.fail(f"{line}: main() runs at import; {guard}")


def _works_on_gpu(call: ast.Call, name: str) -> bool:
    last = called(call)
    if last in ("cuda", "init_process_group"):
        return True
    if name.startswith("torch.cuda.") and name not in HARMLESS:
        return True
    places = last == "to" or keyword_value(call, "device") is not None
    if name == "torch.device" or not places:
        return False
    return any(text_of(argument).startswith("cuda") for argument in given(call))


def _run_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes that an import evaluates: no function bodies, nothing under the main guard."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (*FUNCTIONS, ast.Lambda)):
            for part in _run_at_definition(child):
                yield from ast.walk(part)
        elif not _is_main_guard(child):
            yield child
            yield from _run_at_import(child)


def _run_at_definition(function: ast.AST) -> list[ast.expr]:
    """What making a function evaluates: its decorators and defaults."""
    decorators = getattr(function, "decorator_list", [])
    defaults = [*function.args.defaults, *function.args.kw_defaults]
    return [*decorators, *(part for part in defaults if part is not None)]


def _is_main_guard(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "__name__" in names_in(node.test)


def nested_quotes(source: str) -> list[int]:
    """Lines with an f-string that uses its own quotes inside itself.

    Before Python 3.12 parsing refuses them.
    """
    if not hasattr(tokenize, "FSTRING_START"):
        return []
    lines: set[int] = set()
    open_quotes: list[str] = []
    for token in tokenize.generate_tokens(io.StringIO(source, newline=None).readline):
        if token.type == tokenize.FSTRING_END:
            open_quotes.pop()
        elif token.type in (tokenize.STRING, tokenize.FSTRING_START):
            quote = re.search(r"\"\"\"|'''|\"|'", token.string)[0]
            if quote in open_quotes:
                lines.add(token.start[0])
            if token.type == tokenize.FSTRING_START:
                open_quotes.append(quote)
    return sorted(lines)


# S9: the defaults


def check_defaults(script: Script) -> Check:
    """S9: what the script does without settings is what the logged run did."""
    if script.run_settings is None:
        return skipped("S9", "the logs print no settings to compare the defaults with")
    problems = Problems()
    differing = {}
    needs = declared_needs(script.tree)
    held = functools.partial(_held, script.run_settings)
    for name, default in script.defaults.items():
        value = script.run_settings.get(name)
        off = not _is_on(value) and not is_there(needs.get(name, ""), held)  # could not act
        if _differ(name, default, value) and not off:
            differing[name] = [default, value]
            given_as = f"default {default or 'empty'}, the run had {value or 'empty'}"
            problems.fail(f"{name}: {given_as}")
    compared = len(script.defaults.keys() & script.run_settings.keys())
    if not compared:
        return skipped("S9", "the logs print none of the settings that the script declares")
    return problems.outcome(
        "S9",
        f"defaults and config.env give the run's settings ({compared} compared)",
        compared=compared,
        differing=differing,
    )


def _is_on(value: str | None) -> bool:
    return value not in (None, "", "0", "0.0")


def _held(settings: Mapping[str, str], term: str) -> bool:
    """Whether the run had NAME=value, or NAME on."""
    name, _, wanted = term.partition("=")
    value = settings.get(name)
    return value == wanted if wanted else _is_on(value)


def _differ(name: str, default: str | None, value: str | None) -> bool:
    """Whether a setting that acts on the run had another value than its default."""
    no_effect = PLACES_AND_LABELS.fullmatch(name) or name == "MAX_ARTIFACT_BYTES"
    if default is None or value is None or no_effect:
        return False
    return plain_value(default) != plain_value(value)


# S10: literals

ABSOLUTE = re.compile(r"/(home|root|workspace|tmp|mnt|data|content|Users)(/|$)|[A-Za-z]:[\\/]")
METRIC = re.compile(r"bpb|bits_per_byte|bytes_per_tok|tokens?_per_byte|bytes_ratio", re.I)
RATIO = re.compile(r"bytes_per_tok|tokens?_per_byte|bytes_ratio|byte_ratio", re.I)
QUANTITY = re.compile(r"bpb|loss|nll|nats|bits|bytes|token", re.I)
SEED = re.compile(r"(^|_)seeds?($|_)", re.I)
BEST = re.compile(r"best|lowest|(^|_)min($|_)")
CONSTANTS = (math.e, math.pi, math.log(10))
BINDINGS = (ast.Assign, ast.AnnAssign, ast.keyword, ast.arguments)  # of a name and a value


def check_literals(script: Script) -> Check:
    """S10: no path of one machine, no built-in bytes per token, no choice among seeds."""
    problems = Problems()
    for node in _absolute_paths(script):
        others = "the script must run on other machines"
        problems.fail(f"{line_of(node)}: absolute path {node.value[:40]!r}; {others}")
    for node in script.nodes:
        if isinstance(node, ast.Constant) and _is_byte_ratio(script, node):
            problems.fail(
                f"{line_of(node)}: {node.value!r} stands for the bytes of a token; the metric must "
                "count the bytes of the text"
            )
    for name, default in script.declared.items():
        if default and RATIO.search(name):
            problems.fail(f"the setting {name}={default} stands for the bytes of a token")
    for node in _seed_choices(script):
        reported = "every run has to be reported"
        problems.fail(f"{line_of(node)}: keeps the best of several seeds; {reported}")
    return problems.outcome(
        "S10", "no absolute path, bytes-per-token constant or choice among seeds"
    )


def _absolute_paths(script: Script) -> Iterator[ast.Constant]:
    """Strings that begin like a path of one machine; docstrings may."""
    for node in script.nodes:
        if not isinstance(node, ast.Constant) or not ABSOLUTE.match(text_of(node)):
            continue
        up = script.parent[id(node)]
        if not isinstance(up, ast.Expr) and not _continues(up, node):
            yield node


def _continues(up: ast.AST, node: ast.Constant) -> bool:
    """Whether a string is the later part of a path: f"{base}/data", base + "/data"."""
    if isinstance(up, ast.JoinedStr):
        return up.values[0] is not node
    return isinstance(up, ast.BinOp) and up.right is node


def _is_byte_ratio(script: Script, node: ast.Constant) -> bool:
    """A number like 2.436, multiplied in a metric's expression or named as what it is."""
    if not _is_measured(node.value):
        return False
    bytes_per_token = 2 < node.value < 6
    tokens_per_byte = 1 / 6 < node.value < 1 / 2
    up = script.parent[id(node)]
    if isinstance(up, BINDINGS):
        return (bytes_per_token or tokens_per_byte) and _binds_ratio(up)
    scales = isinstance(up, ast.BinOp) and isinstance(up.op, (ast.Mult, ast.Div))
    return bytes_per_token and scales and _in_metric(script, node)


def _is_measured(value: object) -> bool:
    """A float of three digits or more that is no known constant."""
    if type(value) is not float:
        return False
    digits = repr(value).replace(".", "").strip("0")
    return len(digits) >= 3 and min(abs(value - known) for known in CONSTANTS) >= 1e-3


def _binds_ratio(binding: ast.AST) -> bool:
    """Whether the name that an assignment or argument gives a value is that of a ratio."""
    if isinstance(binding, ast.Assign):
        targets = binding.targets
    elif isinstance(binding, ast.AnnAssign):
        targets = [binding.target]
    else:
        targets = [binding]
    for target in targets:
        if any(map(RATIO.search, names_in(target))):
            return True
    return False


def _in_metric(script: Script, node: ast.AST) -> bool:
    """Whether the function around a number makes the metric, and its statement something of it."""
    statement = _statement(script, node)
    metric = names_in(script.owner(node) or statement)
    return any(map(METRIC.search, metric)) and any(map(QUANTITY.search, names_in(statement)))


def _statement(script: Script, node: ast.AST) -> ast.AST:
    """The statement, or list of parameters, that a number is in."""
    for up in script.above(node):
        if isinstance(up, (ast.stmt, ast.arguments)):
            return up
    return script.tree


def _seed_choices(script: Script) -> Iterator[ast.AST]:
    """Loops over seeds that keep a best result, and minima over a list made once a seed."""
    results: set[str] = set()
    for node in script.nodes:
        if isinstance(node, ast.For) and _over_seeds(node.target, node.iter):
            results.update(_filled_lists(node))
            if any(map(_keeps_best, ast.walk(node))):
                yield node
        elif isinstance(node, ast.Assign) and _made_by_seed(node.value):
            results.update(map(called, node.targets))
    for call in script.calls:
        if called(call) in ("min", "argmin", "sorted") and _is_given_results(call, results):
            yield call


def _filled_lists(loop: ast.For) -> Iterator[str]:
    """Names of what a loop appends to."""
    for call in calls_in(loop):
        if called(call) == "append" and isinstance(call.func, ast.Attribute):
            yield called(call.func.value)


def _is_given_results(call: ast.Call, results: set[str]) -> bool:
    for argument in call.args:
        if _made_by_seed(argument):
            return True
        if isinstance(argument, ast.Name) and argument.id in results:
            return True
    return False


def _over_seeds(target: ast.AST, values: ast.AST) -> bool:
    return any(map(SEED.search, names_in(target) | names_in(values)))


def _made_by_seed(node: ast.AST) -> bool:
    if not isinstance(node, (ast.ListComp, ast.GeneratorExp)):
        return False
    return any(_over_seeds(part.target, part.iter) for part in node.generators)


def _keeps_best(node: ast.AST) -> bool:
    """`if b < best: best = b`, or `best = min(best, b)`."""
    if isinstance(node, ast.If) and isinstance(node.test, (ast.Compare, ast.BoolOp)):
        kept = _assigned_names(node.body) & names_in(node.test)
        return any(map(BEST.search, kept))
    if not isinstance(node, ast.Assign):
        return False
    lowest = any(called(call) == "min" for call in calls_in(node.value))
    return lowest and any(map(BEST.search, _assigned_names([node])))


def _assigned_names(body: Iterable[ast.stmt]) -> set[str]:
    """Identifiers in the targets of a block's own assignments."""
    names: set[str] = set()
    for statement in body:
        if isinstance(statement, ast.Assign):
            names.update(*map(names_in, statement.targets))
    return names


CHECKS: dict[str, Callable[[Script], Check]] = {
    "S5": check_foreign_access,
    "S6": check_single_file,
    "S7": check_codec,
    "S8": check_import,
    "S9": check_defaults,
    "S10": check_literals,
}
