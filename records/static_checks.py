"""Static checks S1 to S10 of a shipped training script.

What its text shows before anything of it runs.

S5 to S10 look at imports, calls and literals and can FAIL. S1 to S4 follow validation tokens and
targets through assignments, slices and calls of the script's own functions; that is a guess about
behaviour, so they only WARN (the run-time checks of the same rules give the verdict). Code that
nothing reaches, or that the logged settings switch off, is left out there.
"""

from __future__ import annotations

import ast
import io
import math
import re
import sys
import tokenize
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from report import Finding, gather
from source import (
    FUNCTIONS,
    LOOPS,
    SIZES,
    Flow,
    Script,
    called,
    dotted,
    import_call,
    names_in,
    plain_value,
    text_of,
    unpack_source,
)

Problem = tuple[str, str]  # verdict, sentence
MAX_SHOWN = 6  # problems of one finding that are spelt out

# S1 to S4: heuristics

VAL_NAMES = re.compile(
    r"(^|_)(val|validation|eval)_(tok(en)?s?|data|ids|x|y|inputs|targets|seqs|chunks?|stream|np|"
    r"batch|files|pattern|loader)($|_)|load_val|load_eval|read_val"
)
TARGET_NAMES = re.compile(
    r"(^|_)(y|tgts?|targets?|labels?|gold|next_tok(en)?s?|true_tok(en)?s?)($|_)"
)
LOSS_NAMES = re.compile(r"(^|_)(loss|losses|nll|nlls|nats|bpb|bpbs|scores?|ppl|perplexity)($|_|\d)")
EVALUATION = re.compile(r"(^|[._])(eval|valid|scor|ttt|slot|sliding|adapt|ngram|cache|mix)", re.I)
EPOCHS = re.compile(r"epoch|passes|(^|_|\W)ep($|_|\W)")
QUIET = re.compile(r"\b(no_grad|inference_mode)\b")


def check_val_training(script: Script) -> Finding:
    """S1: no gradient step on validation tokens that were not scored before."""
    order, problems = ScoreOrder(script), []
    for call in order.gradients():
        if script.live(call) and not order.scored_before(call):
            problems.append(
                (
                    "WARN",
                    f"{_line(call)}: {_where(script, call)} trains on validation tokens and "
                    "nothing shows that they are scored before (allowed: per chunk, score under "
                    "no_grad, add to the sum, then step)",
                )
            )
    return _finding("S1", problems, "no gradient step on validation tokens before their score")


class ScoreOrder:
    """Where the script trains on validation tokens.

    And whether the same loop has scored them before.
    """

    def __init__(self, script: Script):
        self.script = script
        self.flow = Flow(script, self._is_val)

    def _is_val(self, node: ast.AST) -> bool:
        if isinstance(node, (ast.Name, ast.Attribute)):
            return (
                bool(VAL_NAMES.search(called(node)))
                and called(node).upper() not in self.script.declared
            )
        return isinstance(node, ast.Constant) and "fineweb_val" in text_of(node)

    def gradients(self) -> list[ast.Call]:
        """Calls of backward (or autograd.grad) whose loss depends on validation tokens."""
        return [
            call
            for call in self.script.calls
            if self.flow.has(call)
            and (
                called(call) == "backward"
                or dotted(call, self.script.aliases).endswith("autograd.grad")
            )
        ]

    def scored_before(self, node: ast.AST, depth: int = 0) -> bool:
        """Whether a loop around the node scores the tokens earlier in its body.

        The loop is here or in all callers.
        """
        owner = self.script.owner(node)
        loops = [
            up
            for up in self.script.above(node)
            if isinstance(up, LOOPS) and self.script.owner(up) is owner
        ]
        callers = [
            call
            for call in self.script.calls
            if owner
            and called(call) == owner.name
            and self.flow.has(call)
            and self.script.live(call)
        ]
        per_chunk = callers and all(
            any(isinstance(up, LOOPS) and not _is_epoch(up) for up in self.script.above(call))
            for call in callers
        )
        if any(self._scores(scope, node) for scope in [*loops, *([owner] if per_chunk else [])]):
            return True
        return (
            bool(callers)
            and depth < 8
            and all(self.scored_before(call, depth + 1) for call in callers)
        )

    def _scores(self, scope: ast.AST, node: ast.AST) -> bool:
        """Something under no_grad whose result is added up.

        Inside scope, before node, not once an epoch.
        """
        earlier = [
            part
            for part in ast.walk(scope)
            if hasattr(part, "lineno")
            and _start(part) < _start(node)
            and not any(part is up for up in self.script.above(node))
        ]
        quiet = [
            part
            for part in earlier
            if self._is_quiet_use(part)
            and not any(isinstance(up, LOOPS) and _is_epoch(up) for up in self.script.above(part))
        ]
        first = min((part.lineno for part in quiet), default=math.inf)
        return any(part.end_lineno >= first and self._adds_up(part) for part in earlier) or any(
            self._adds_up_inside(part) for part in quiet
        )

    def _is_quiet_use(self, node: ast.AST) -> bool:
        if isinstance(node, ast.With):
            return _is_quiet_block(node) and any(map(self.flow.has, ast.walk(node)))
        return (
            isinstance(node, ast.Call)
            and self.flow.has(node)
            and any(_is_quiet(function) for function in self.script.functions.get(called(node), ()))
        )

    def _adds_up(self, node: ast.AST) -> bool:
        if isinstance(node, ast.AugAssign):
            return isinstance(node.op, ast.Add) and self.flow.has(node.value)
        if isinstance(node, ast.Assign) and self.flow.has(node.value):
            target = node.targets[0]
            return (
                isinstance(target, ast.Subscript)
                or isinstance(node.value, ast.BinOp)
                and isinstance(node.value.op, ast.Add)
                and called(target) in names_in(node.value)
            )
        return (
            isinstance(node, ast.Call)
            and self.flow.has(node)
            and (called(node) in ("append", "extend", "add_") or self._adds_up_inside(node))
        )

    def _adds_up_inside(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Call) and any(
            isinstance(part, ast.AugAssign) and self.flow.has(part.value)
            for function in self.script.functions.get(called(node), ())
            for part in ast.walk(function)
        )


def _is_epoch(loop: ast.AST) -> bool:
    """A loop that repeats a pass over the same data.

    `for epoch in ...`, `for _ in range(args.ttt_epochs)`.
    """
    return isinstance(loop, (ast.For, ast.AsyncFor)) and bool(
        EPOCHS.search(f"{ast.unparse(loop.target)} {ast.unparse(loop.iter)}".lower())
    )


def _is_quiet_block(node: ast.AST) -> bool:
    return isinstance(node, ast.With) and any(
        QUIET.search(ast.unparse(item.context_expr)) for item in node.items
    )


def _is_quiet(function: ast.AST) -> bool:
    return any(QUIET.search(ast.unparse(part)) for part in function.decorator_list) or any(
        map(_is_quiet_block, ast.walk(function))
    )


def check_target_hash(script: Script) -> Finding:
    """S2: no table is read at a place that is hashed from the token to be predicted."""
    targets = Flow(script, lambda node: _is_target(script, node), objects=False)
    hashes = {
        id(node)
        for node in script.nodes
        if _is_hash(node) and script.live(node) and _holds_target(script, targets, node)
    }
    keys = Flow(script, lambda node: id(node) in hashes, objects=False)
    problems = [
        (
            "WARN",
            f"{_line(node)}: {_where(script, node)} reads a table at a hash that contains the "
            "target token; the probability of a token must not depend on which token comes",
        )
        for node in script.nodes
        if _is_lookup(node, keys) and script.live(node) and not _is_update(script, node)
    ]
    return _finding("S2", problems, "no table lookup by a hash of the target")


def _is_target(script: Script, node: ast.AST) -> bool:
    """Names of targets, and slices one token ahead: x[1:], tokens[i + 1].

    In a model slices mean other things.
    """
    if isinstance(node, (ast.Name, ast.Attribute)):
        return bool(TARGET_NAMES.search(called(node)))
    if not isinstance(node, ast.Subscript) or script.is_model(node):
        return False
    index = (
        node.slice.elts[-1] if isinstance(node.slice, ast.Tuple) and node.slice.elts else node.slice
    )
    start = index.lower if isinstance(index, ast.Slice) else index
    if isinstance(start, ast.BinOp) and isinstance(start.op, ast.Add):
        ahead = start.right
    else:
        ahead = start if isinstance(index, ast.Slice) and index.upper is None else None
    return isinstance(ahead, ast.Constant) and ahead.value == 1


def _holds_target(script: Script, targets: Flow, node: ast.AST) -> bool:
    """In a model, which hashes its own inputs, only a target's name counts."""
    if script.is_model(node):
        return any(map(TARGET_NAMES.search, names_in(node)))
    return any(map(targets.has, ast.iter_child_nodes(node)))


def _is_hash(node: ast.AST) -> bool:
    """A step that mixes values as hashes do.

    x ^ y, x ^= y, bitwise_xor(x, y), (a * PRIME + b) % M, (a * PRIME) & mask, hash(...) and the
    like.
    """
    if isinstance(node, (ast.BinOp, ast.AugAssign)) and isinstance(node.op, ast.BitXor):
        return True
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Mod, ast.BitAnd)):
        return any(
            isinstance(part, ast.BinOp) and isinstance(part.op, ast.Mult)
            for part in ast.walk(node.left)
        )
    return isinstance(node, ast.Call) and bool(
        re.search(r"bitwise_xor|(^|_)hash(ed|es)?($|_)", called(node))
    )


def _is_lookup(node: ast.AST, keys: Flow) -> bool:
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
        return keys.has(node.slice)
    return (
        isinstance(node, ast.Call)
        and called(node) in ("gather", "index_select", "take", "get", "embedding")
        and any(map(keys.has, [*node.args, *(k.value for k in node.keywords)]))
    )


def _is_update(script: Script, node: ast.AST) -> bool:
    """A read that only serves to write the same table: table[key] = table[key] + 1."""
    table = node.value if isinstance(node, ast.Subscript) else getattr(node.func, "value", node)
    return any(
        isinstance(up, ast.Assign)
        and isinstance(up.targets[0], ast.Subscript)
        and ast.dump(up.targets[0].value).replace("Store()", "Load()") == ast.dump(table)
        for up in script.above(node)
    )


def check_scored_window(script: Script) -> Finding:
    """S3: nothing is optimised inside the evaluation against the tokens that it scores (SLOT)."""
    order, problems = ScoreOrder(script), []
    for function in (node for node in script.nodes if isinstance(node, FUNCTIONS)):
        trains = [
            call
            for call in script.calls
            if script.owner(call) is function
            and (
                called(call) == "backward" or dotted(call, script.aliases).endswith("autograd.grad")
            )
        ]
        evaluates = EVALUATION.search(script.place(function)) or any(map(order.flow.has, trains))
        problems += [
            (
                "WARN",
                f"{_line(node)}: {_where(script, node)} makes a trainable tensor and optimises it "
                "during evaluation; what is fitted to a window must not score it",
            )
            for node in _new_parameters(function)
            if trains and evaluates and script.live(node)
        ]
    return _finding("S3", problems, "no tensor is created and optimised inside the evaluation")


def _new_parameters(function: ast.AST) -> Iterator[ast.Call]:
    """Calls that create a tensor to be trained.

    Switching gradients of the model's own parameters on is none.
    """
    built = {
        target.id
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
        wanted = [k.value for k in call.keywords if k.arg == "requires_grad"]
        if called(call) == "requires_grad_":
            base, wanted = getattr(call.func, "value", None), wanted + call.args
            own = isinstance(base, ast.Call) or isinstance(base, ast.Name) and base.id in built
            if own and not any(
                isinstance(value, ast.Constant) and not value.value for value in wanted
            ):
                yield call
        elif called(call) == "Parameter" or any(
            isinstance(value, ast.Constant) and value.value for value in wanted
        ):
            yield call


def check_best_of_scores(script: Script) -> Finding:
    """S4: no choice of the lower one among several losses of the same tokens."""
    problems = []
    for node in script.nodes:
        chosen = _chosen_losses(node)
        targets = {
            name
            for up in script.above(node)
            if isinstance(up, ast.Assign)
            for t in up.targets
            for name in _loss_names(t)
        }
        names = sorted(chosen)
        # Of a training loop.
        running = len(names) == 2 and re.search("best|low|min", " ".join(chosen & targets))
        inside = script.place(node)
        evaluates = inside.split(".")[0] in ("", "main") or EVALUATION.search(inside)
        if len(names) > 1 and not running and evaluates and script.live(node):
            problems.append(
                (
                    "WARN",
                    f"{_line(node)}: {_where(script, node)} picks the lower of "
                    f"{', '.join(names)}; one scorer, chosen before the token is read, is charged",
                )
            )
    return _finding("S4", problems, "no minimum over the losses of several scorers")


def _chosen_losses(node: ast.AST) -> set[str]:
    """Names of the losses among which a minimum, an argmin or a comparing `where` chooses."""
    if isinstance(node, ast.IfExp) and isinstance(node.test, ast.Compare):
        return _loss_names(node.test) & _loss_names(ast.Tuple([node.body, node.orelse]))
    if not isinstance(node, ast.Call):
        return set()
    name = called(node)
    if name == "where" and node.args:
        return _loss_names(node.args[0]) if isinstance(node.args[0], ast.Compare) else set()
    if name in ("min", "minimum", "fmin", "amin", "argmin"):
        return set().union(*map(_loss_names, [*node.args, getattr(node.func, "value", node.func)]))
    return set()


def _loss_names(node: ast.AST) -> set[str]:
    """Names of losses an expression's value is made of (not of what only counts or holds them)."""
    if isinstance(node, ast.Call) and called(node) in SIZES or isinstance(node, ast.Constant):
        return set()
    if isinstance(node, (ast.Name, ast.Attribute)):
        name = called(node)
        below = (
            _loss_names(node.value)
            if isinstance(node, ast.Attribute)
            and not LOSS_NAMES.search(name)
            and isinstance(node.value, ast.Call)
            else set()
        )
        return {name} if LOSS_NAMES.search(name) else below
    if isinstance(node, ast.Call):
        base = [node.func.value] if isinstance(node.func, ast.Attribute) else []
        return set().union(*map(_loss_names, [*base, *node.args]))
    return set().union(*map(_loss_names, ast.iter_child_nodes(node)))


# S5 to S10: exact

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
REMOTE_GIT = {"clone", "pull", "fetch", "push", "ls-remote", "submodule", "remote"}
NATIVE = re.compile(
    r"ctypes\.(CDLL|PyDLL|WinDLL|OleDLL|cdll\.\w+)|torch\.utils\.cpp_extension\.load\w*|cffi\.\w+"
)
TRAIN_DATA = re.compile(
    r"fineweb_train|(^|\b|_)train_(files|pattern|glob|shards|data_path)($|\b)", re.I
)
LATE = re.compile(r"(^|[._])(eval|scor|ttt)", re.I)
READING = re.compile(
    r"open|read|load|glob|shard|file|path|mmap|memmap|stream|calib|hess|collect|gptq|fill", re.I
)


def check_foreign_access(script: Script) -> Finding:
    """S5: no network, no package manager, no process but git and nvidia-smi.

    And no training data in the evaluation.
    """
    problems = [
        ("FAIL", f"{_line(node)}: imports {module}, which reaches the network or installs software")
        for node, module in imported_modules(script)
        if module.split(".")[0] in NETWORK and module != "urllib.parse"
    ]
    for call in script.calls:
        name = dotted(call, script.aliases)
        if PROCESSES.fullmatch(name):
            problems += _process_problem(call, name)
        elif NETWORK_CALLS.fullmatch(name):
            problems.append(
                ("FAIL", f"{_line(call)}: {name} downloads; the run may not use the network")
            )
        elif NATIVE.fullmatch(name) and not (
            call.args and isinstance(call.args[0], ast.Constant) and call.args[0].value is None
        ):
            problems.append(
                (
                    "WARN",
                    f"{_line(call)}: {name} brings in native code; its source counts as code and "
                    "must be in this file",
                )
            )
    return _finding(
        "S5",
        problems + _late_train_reads(script),
        "no network, installer, foreign process or training data in the evaluation",
    )


def _process_problem(call: ast.Call, name: str) -> list[Problem]:
    """What is wrong with starting a process.

    Only a literal git or nvidia-smi command is allowed.
    """
    first = (
        call.args[0]
        if call.args
        else next((k.value for k in call.keywords if k.arg == "args"), call.func)
    )
    listed = isinstance(first, (ast.List, ast.Tuple))
    words = [text_of(part) for part in first.elts] if listed else text_of(first).split()
    chained = not listed and re.search(r"[;&|<>$`\n(]", text_of(first))
    if words[:1] in (["git"], ["nvidia-smi"]) and not chained and not REMOTE_GIT & set(words):
        return []
    installs = {"pip", "pip3", "apt", "apt-get", "conda", "uv"} & set(words)
    shown = " ".join(words)[:60] or "a command that is no literal"
    what = f"installs software ({shown})" if installs else f"starts {shown}"
    return [("FAIL", f"{_line(call)}: {name} {what}; allowed are git (local) and nvidia-smi")]


def _late_train_reads(script: Script) -> list[Problem]:
    """Calls with a training file as argument, in evaluation functions or those they call."""
    reached = [
        node for node in script.nodes if isinstance(node, FUNCTIONS) and LATE.search(node.name)
    ]
    for function in reached:  # grows while it is read
        inner = {called(part) for part in ast.walk(function) if isinstance(part, ast.Call)}
        reached += [
            other
            for name in inner
            for other in script.functions.get(name, ())
            if other not in reached
        ]
    problems = []
    for function in reached:
        for call in (part for part in ast.walk(function) if isinstance(part, ast.Call)):
            given = [
                part
                for arg in [*call.args, *(k.value for k in call.keywords)]
                for part in ast.walk(arg)
            ]
            if READING.search(called(call)) and any(
                TRAIN_DATA.search(text_of(part) or called(part)) for part in given
            ):
                problems.append(
                    (
                        "FAIL",
                        f"{_line(call)}: {_where(script, call)} reads training files during "
                        "evaluation; they are not part of the artifact",
                    )
                )
    return problems


IMPORT_OF = {
    "triton": "torch",
    "yaml": "pyyaml",
    "sklearn": "scikit_learn",
    "google": "protobuf",
    "PIL": "pillow",
    "flash_attn_interface": "flash_attn",
}
ASSUMED = ("torch", "numpy", "sentencepiece", "zstandard")
CODE_FILES = (".py", ".pyc", ".so", ".c", ".cc", ".cpp", ".cu", ".h")
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


def imported_modules(script: Script) -> Iterator[tuple[ast.AST, str]]:
    """Every import: its node and the module; relative ones begin with a dot."""
    for node in script.nodes:
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node, "." * node.level + (node.module or node.names[0].name)
        elif isinstance(node, ast.Call) and import_call(node, script.aliases):
            yield node, import_call(node, script.aliases)


def _guarded(script: Script, node: ast.AST) -> bool:
    """Whether an import may fail: inside try, `with suppress(...)` or a condition."""
    return any(
        isinstance(up, (ast.Try, ast.If))
        or isinstance(up, ast.With)
        and "suppress" in ast.unparse(up.items[0])
        for up in script.above(node)
    )


def check_single_file(script: Script) -> Finding:
    """S6: all imports are standard library or in requirements.txt; no code from another file."""
    listed = {
        re.sub(r"[-_.]+", "_", found[0].lower())
        for line in script.requirements
        if (found := re.match(r"[A-Za-z0-9][\w.-]*", line.strip()))
    }
    known, problems = listed or set(ASSUMED), []
    for node, module in imported_modules(script):
        root = module.lstrip(".").split(".")[0]
        if module.startswith(".") or f"{root}.py" in script.siblings:
            problems.append(
                ("FAIL", f"{_line(node)}: imports sibling {root}.py; all code must be in this file")
            )
        elif (
            root in sys.stdlib_module_names
            or {root.lower(), IMPORT_OF.get(root, "").lower()} & known
        ):
            continue
        elif root.startswith("flash_attn") and (_guarded(script, node) or script.owner(node)):
            continue  # every GPU image has another one, or none
        elif _guarded(script, node):
            problems.append(
                (
                    "WARN",
                    f"{_line(node)}: optional import of {root}, which requirements.txt does not "
                    "list",
                )
            )
        else:
            problems.append(
                (
                    "FAIL",
                    f"{_line(node)}: imports {root}, not standard library nor in requirements.txt",
                )
            )
    problems += _sibling_code(script)
    told = (
        "requirements.txt"
        if listed
        else f"the assumed requirements ({', '.join(ASSUMED)}; none were given)"
    )
    return _finding("S6", problems, f"one code file; imports are standard library or in {told}")


def _sibling_code(script: Script) -> Iterator[Problem]:
    """Reads of another code file by a literal name, and exec of what cannot be read here."""
    for node in script.nodes:
        slash = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)
        if slash or isinstance(node, ast.Call) and called(node) in READERS:
            parts = [node.right] if slash else [*node.args, *(k.value for k in node.keywords)]
            for name in (re.split(r"[\\/]", text_of(part))[-1] for part in parts):
                foreign = name.endswith((".py", ".pyc", ".so")) and name != "train_gpt.py"
                if foreign or name in script.siblings and name.endswith(CODE_FILES):
                    yield (
                        "FAIL",
                        f"{_line(node)}: uses code of sibling {name}; all code must be in this "
                        "file",
                    )
        elif isinstance(node, ast.Call) and dotted(node, script.aliases) in (
            "exec",
            "eval",
            "builtins.exec",
        ):
            yield "WARN", f"{_line(node)}: {called(node)} runs code that this check cannot read"


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


def check_codec(script: Script) -> Finding:
    """S7: the codec does not depend on what happens to be installed."""
    problems = []
    for node in script.nodes:
        names = sorted(_fallback(script, node))
        if names:
            problems.append(
                (
                    "FAIL",
                    f"{_line(node)}: silently falls back to another codec where {', '.join(names)} "
                    "is missing or fails; the artifact's size would depend on the machine",
                )
            )
    return _finding("S7", problems, "no compressor is chosen by what is installed")


def _fallback(script: Script, node: ast.AST) -> set[str]:
    """The codecs whose absence a statement or expression hides."""
    if isinstance(node, ast.Try) and node.handlers and not all(map(_gives_up, node.handlers)):
        tried, instead = (
            _codecs_used(script, body, calls=True) for body in (node.body, node.handlers)
        )
        return _codecs_used(script, node.body) | (tried if instead - tried else set())
    if isinstance(node, ast.With) and any(
        "suppress" in ast.unparse(item.context_expr) for item in node.items
    ):
        return _codecs_used(script, node.body)
    if isinstance(node, ast.Call) and node.args:
        if called(node) == "find_spec":
            return {text_of(node.args[0])} & CODECS
        if called(node) == "hasattr":
            return {dotted(node.args[0], script.aliases).split(".")[0]} & CODECS
    if (
        isinstance(node, ast.Compare)
        and dotted(node.comparators[0], script.aliases) == "sys.modules"
    ):
        return {text_of(node.left)} & CODECS
    return set()


def _codecs_used(script: Script, body: Sequence[ast.AST], calls: bool = False) -> set[str]:
    """Codec modules that statements import; calls=True: and those whose functions they call."""
    inside = {id(part) for node in body for part in ast.walk(node)}
    names = {module for node, module in imported_modules(script) if id(node) in inside}
    if calls:
        names |= {dotted(node, script.aliases) for node in script.calls if id(node) in inside}
    return {name.split(".")[0] for name in names} & CODECS


def _gives_up(handler: ast.ExceptHandler) -> bool:
    """A handler that ends by raising or by leaving the program."""
    last = handler.body[-1]
    return (
        isinstance(last, ast.Raise)
        or isinstance(last, ast.Expr)
        and isinstance(last.value, ast.Call)
        and called(last.value) in ("exit", "_exit", "quit", "abort")
    )


def check_import(script: Script) -> Finding:
    """S8: Python 3.10 reads it, and importing it needs no GPU and no optional kernel."""
    problems = [
        ("FAIL", f"line {line}: the same quotes inside an f-string, which Python 3.10 cannot read")
        for line in nested_quotes(script.source)
    ]
    for node in _run_at_import(script.tree):
        if isinstance(node, ast.Call):
            problems += _import_time_call(script, node)
    problems += [
        (
            "FAIL",
            f"{_line(node)}: imports {module} at import time without a guard; it exists on few "
            "machines",
        )
        for node, module in imported_modules(script)
        if module.startswith("flash_attn")
        and not _guarded(script, node)
        and script.owner(node) is None
    ]
    return _finding("S8", problems, "Python 3.10 syntax; importing it touches no GPU")


def _import_time_call(script: Script, node: ast.Call) -> list[Problem]:
    name, given = dotted(node, script.aliases), [*node.args, *(k.value for k in node.keywords)]
    harmless = name in (
        "torch.cuda.is_available",
        "torch.cuda.device_count",
        "torch.cuda.amp.custom_fwd",
    )
    gpu = (
        name.startswith("torch.cuda.")
        and not harmless
        or called(node) in ("cuda", "init_process_group")
        or name != "torch.device"
        and any(text_of(arg).startswith("cuda") for arg in given)
        and (called(node) == "to" or any(k.arg == "device" for k in node.keywords))
    )
    if gpu:
        return [("FAIL", f"{_line(node)}: {name.lstrip('?.')} works on the GPU at import")]
    if name == "main" and "main" in script.functions:
        return [
            (
                "FAIL",
                f'{_line(node)}: main() runs at import; guard it with if __name__ == "__main__"',
            )
        ]
    return []


def _run_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes that an import evaluates: no function bodies, nothing under the main guard."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (*FUNCTIONS, ast.Lambda)):
            for part in [
                *getattr(child, "decorator_list", ()),
                *child.args.defaults,
                *child.args.kw_defaults,
            ]:
                yield from ast.walk(part) if part is not None else ()
        elif not (isinstance(child, ast.If) and "__name__" in names_in(child.test)):
            yield child
            yield from _run_at_import(child)


def nested_quotes(source: str) -> list[int]:
    """Lines with an f-string that uses its own quotes inside itself.

    Before Python 3.12 parsing refuses them.
    """
    if not hasattr(tokenize, "FSTRING_START"):
        return []
    lines, open_quotes = set(), []
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


PLACES_AND_LABELS = re.compile(
    r"SEEDS?|RUN_ID|MODE|ARTIFACT|DEVICE|CONFIG|RESUME|SAVE_EVERY|SMOKE|MAX_ARTIFACT_BYTES|"
    r"RANK|LOCAL_RANK|WORLD_SIZE|TRAIN_FILES|VAL_FILES|.*_(PATH|DIR)"
)


def check_defaults(script: Script) -> Finding:
    """S9: what the script does without settings is what the logged run did."""
    if script.run_settings is None:
        return Finding("S9", "SKIPPED", "the logs print no settings to compare the defaults with")
    differing = {
        name: [default, script.run_settings[name]]
        for name, default in script.defaults.items()
        if name in script.run_settings
        and default is not None
        and not PLACES_AND_LABELS.fullmatch(name)
        and plain_value(default) != plain_value(script.run_settings[name])
    }
    problems = [
        ("FAIL", f"{name}: default {default or 'empty'}, the run had {value or 'empty'}")
        for name, (default, value) in differing.items()
    ]
    compared = len(script.defaults.keys() & script.run_settings.keys())
    return _finding(
        "S9",
        problems,
        f"defaults and config.env give the run's settings ({compared} compared)",
        compared=compared,
        differing=differing,
    )


ABSOLUTE = re.compile(r"/(home|root|workspace|tmp|mnt|data|content|Users)(/|$)|[A-Za-z]:[\\/]")
METRIC = re.compile(r"bpb|bits_per_byte|bytes_per_tok|tokens?_per_byte|bytes_ratio", re.I)
RATIO = re.compile(r"bytes_per_tok|tokens?_per_byte|bytes_ratio|byte_ratio", re.I)
QUANTITY = re.compile(r"bpb|loss|nll|nats|bits|bytes|token", re.I)


def check_literals(script: Script) -> Finding:
    """S10: no path of one machine, no built-in bytes per token, no choice among seeds."""
    told = {id(node.value) for node in script.nodes if isinstance(node, ast.Expr)}  # docstrings
    problems = [
        (
            "FAIL",
            f"{_line(node)}: absolute path {node.value[:40]!r}; the script must run on other "
            "machines",
        )
        for node in script.nodes
        if isinstance(node, ast.Constant)
        and ABSOLUTE.match(text_of(node))
        and id(node) not in told
        and not _continues(script, node)
    ]
    problems += [
        (
            "FAIL",
            f"{_line(node)}: {node.value!r} stands for the bytes of a token; the metric must count "
            "the bytes of the text",
        )
        for node in script.nodes
        if isinstance(node, ast.Constant) and _is_byte_ratio(script, node)
    ]
    problems += [
        ("FAIL", f"the setting {name}={default} stands for the bytes of a token")
        for name, default in script.declared.items()
        if default and RATIO.search(name)
    ]
    problems += [
        ("FAIL", f"{_line(node)}: keeps the best of several seeds; every run has to be reported")
        for node in _seed_choices(script)
    ]
    return _finding(
        "S10", problems, "no absolute path, bytes-per-token constant or choice among seeds"
    )


def _continues(script: Script, node: ast.AST) -> bool:
    """Whether a string is the later part of a path: f"{base}/data", base + "/data"."""
    up = script.parent[id(node)]
    return (
        isinstance(up, ast.JoinedStr)
        and up.values[0] is not node
        or isinstance(up, ast.BinOp)
        and up.right is node
    )


def _is_byte_ratio(script: Script, node: ast.Constant) -> bool:
    """A number like 2.436, multiplied in a metric's expression or named as what it is."""
    value, up = node.value, script.parent[id(node)]
    if (
        type(value) is not float
        or len(repr(value).replace(".", "").strip("0")) < 3
        or min(abs(value - known) for known in (math.e, math.pi, math.log(10))) < 1e-3
    ):
        return False
    statement = next(
        part for part in script.above(node) if isinstance(part, (ast.stmt, ast.arguments))
    )
    bound = up if isinstance(up, (ast.Assign, ast.AnnAssign, ast.keyword, ast.arguments)) else None
    if bound is not None and (2 < value < 6 or 1 / 6 < value < 1 / 2):
        targets = getattr(bound, "targets", None) or [getattr(bound, "target", bound)]
        return any(RATIO.search(name) for target in targets for name in names_in(target))
    owner = script.owner(node)
    metric = any(map(METRIC.search, names_in(owner or statement)))
    return (
        2 < value < 6
        and isinstance(up, ast.BinOp)
        and isinstance(up.op, (ast.Mult, ast.Div))
        and metric
        and any(map(QUANTITY.search, names_in(statement)))
    )


def _seed_choices(script: Script) -> Iterator[ast.AST]:
    """Loops over seeds that keep a best result, and minima over a list made once a seed."""
    results: set[str] = set()
    for node in script.nodes:
        if isinstance(node, ast.For) and _over_seeds(node.target, node.iter):
            results |= {
                called(part.func.value)
                for part in ast.walk(node)
                if isinstance(part, ast.Call)
                and called(part) == "append"
                and isinstance(part.func, ast.Attribute)
            }
            if any(map(_keeps_best, ast.walk(node))):
                yield node
        elif isinstance(node, ast.Assign) and _made_by_seed(node.value):
            results |= {called(target) for target in node.targets}
    for call in script.calls:
        if called(call) in ("min", "argmin", "sorted") and any(
            _made_by_seed(arg) or isinstance(arg, ast.Name) and arg.id in results
            for arg in call.args
        ):
            yield call


def _over_seeds(target: ast.AST, values: ast.AST) -> bool:
    return any(
        re.search(r"(^|_)seeds?($|_)", name, re.I)
        for part in (target, values)
        for name in names_in(part)
    )


def _made_by_seed(node: ast.AST) -> bool:
    return isinstance(node, (ast.ListComp, ast.GeneratorExp)) and any(
        _over_seeds(part.target, part.iter) for part in node.generators
    )


def _keeps_best(node: ast.AST) -> bool:
    best = re.compile(r"best|lowest|(^|_)min($|_)")
    if isinstance(node, ast.If) and isinstance(node.test, (ast.Compare, ast.BoolOp)):
        kept = {
            name
            for part in node.body
            if isinstance(part, ast.Assign)
            for target in part.targets
            for name in names_in(target)
        }
        return any(best.search(name) and name in names_in(node.test) for name in kept)
    return (
        isinstance(node, ast.Assign)
        and any(best.search(name) for t in node.targets for name in names_in(t))
        and any(
            isinstance(part, ast.Call) and called(part) == "min" for part in ast.walk(node.value)
        )
    )


# The ten in order


CHECKS: dict[str, Callable[[Script], Finding]] = {
    "S1": check_val_training,
    "S2": check_target_hash,
    "S3": check_scored_window,
    "S4": check_best_of_scores,
    "S5": check_foreign_access,
    "S6": check_single_file,
    "S7": check_codec,
    "S8": check_import,
    "S9": check_defaults,
    "S10": check_literals,
}


def static_checks(
    source: str,
    *,
    requirements: Sequence[str] = (),
    siblings: Sequence[str] = (),
    run_settings: Mapping[str, str] | None = None,
    config: Mapping[str, str] | None = None,
) -> list[Finding]:
    """S1 to S10 of a script's text; a wrapper is unpacked first. Never raises on odd input.

    requirements: lines of requirements.txt; siblings: other files of the folder; run_settings: NAME
    -> text as the logs print them, None if they do not; config: NAME -> text of the folder's
    config.env.
    """
    try:
        script = Script(
            unpack_source(source)[0], requirements, siblings, run_settings, config or {}
        )
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        where = (
            f"line {getattr(error, 'lineno', None) or '?'}: {getattr(error, 'msg', None) or error}"
        )
        return [
            Finding(id, "FAIL", f"Python 3.10 cannot read the script: {where}")
            if id == "S8"
            else Finding(id, "SKIPPED", f"the script does not parse ({where})")
            for id in CHECKS
        ]
    return [_guarded_check(id, check, script) for id, check in CHECKS.items()]


def _guarded_check(id: str, check: Callable[[Script], Finding], script: Script) -> Finding:
    try:
        return check(script)
    except (RecursionError, tokenize.TokenError) as error:
        return Finding(id, "SKIPPED", f"the script is too odd to follow ({error})")


def _finding(id: str, problems: Iterable[Problem], good: str, **figures: Any) -> Finding:
    """One finding; the worst problems first, and not more of them than one reads."""
    ranked = sorted(dict.fromkeys(problems), key=lambda problem: problem[0] != "FAIL")
    more = (
        [(ranked[MAX_SHOWN][0], f"and {len(ranked) - MAX_SHOWN} more")]
        if len(ranked) > MAX_SHOWN
        else []
    )
    return gather(id, ranked[:MAX_SHOWN] + more, good, **figures)


def _line(node: ast.AST) -> str:
    return f"line {getattr(node, 'lineno', '?')}"


def _start(node: ast.AST) -> tuple[int, int]:
    return node.lineno, node.col_offset


def _where(script: Script, node: ast.AST) -> str:
    return script.place(node) or "the module"
