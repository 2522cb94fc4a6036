"""Reads a training script without running it.

Wrappers, declared settings, what can run, where values flow.
"""

from __future__ import annotations

import ast
import base64
import bz2
import functools
import lzma
import math
import operator
import re
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

MAX_LAYERS, MAX_EXPANDED, MAX_WRAPPER_STATEMENTS = 3, 64 << 20, 20
MAX_DICTIONARY = 1 << 28  # bytes an LZMA decoder may ask for
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
LOOPS = (ast.For, ast.AsyncFor, ast.While)
BAD_LITERAL = (
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    OSError,
    EOFError,
    MemoryError,
    lzma.LZMAError,
    zlib.error,
)
ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.LShift: operator.lshift,
    ast.BitOr: operator.or_,
}
COMPARE = {
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
TEXT_DECODERS = {
    f"base64.{name}": getattr(base64, name)
    for name in (
        "b85decode",
        "b64decode",
        "a85decode",
        "b32decode",
        "standard_b64decode",
        "urlsafe_b64decode",
    )
}
CONVERSIONS = {"str": str, "int": int, "float": float, "bool": bool, "tuple": tuple}


# Reading the tree


def called(node: ast.AST) -> str:
    """Last part of a name or of what a call calls: `a.b.run(x)` -> run."""
    node = node.func if isinstance(node, ast.Call) else node
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def import_aliases(tree: ast.Module) -> dict[str, str]:
    """Local name -> dotted name of what was imported under it, also of `run = subprocess.run`."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases.update(
                (a.asname, a.name) if a.asname else (a.name.split(".")[0],) * 2 for a in node.names
            )
        elif isinstance(node, ast.ImportFrom) and not node.level:
            aliases.update((a.asname or a.name, f"{node.module}.{a.name}") for a in node.names)
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Attribute)
            and dotted(node.value, {}).split(".")[0] in aliases
        ):
            aliases.update(
                (t.id, dotted(node.value, aliases)) for t in node.targets if isinstance(t, ast.Name)
            )
    return aliases


def dotted(node: ast.AST, aliases: Mapping[str, str]) -> str:
    """Full dotted name of an expression, or of the function that a call calls.

    `?` stands for anything else.
    """
    if isinstance(node, ast.Call):
        return dotted(node.func, aliases)
    if isinstance(node, ast.Name):
        return aliases.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        made = isinstance(node.value, ast.Call)  # __import__("os").system
        base = import_call(node.value, aliases) or "?" if made else dotted(node.value, aliases)
        return f"{base}.{node.attr}"
    return "?"


def import_call(node: ast.Call, aliases: Mapping[str, str]) -> str:
    """The module that `__import__("m")` or `importlib.import_module("m")` names, else empty."""
    imports = dotted(node.func, aliases) in ("__import__", "importlib.import_module")
    return text_of(node.args[0]) if imports and node.args else ""


def text_of(node: ast.AST) -> str:
    """A string literal's text, the literal beginning of an f-string, else empty."""
    if isinstance(node, ast.JoinedStr) and node.values:
        node = node.values[0]
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def names_in(node: ast.AST) -> set[str]:
    """Every identifier below a node."""
    return {
        name
        for part in ast.walk(node)
        for field in ("id", "attr", "arg", "name")
        if isinstance(name := getattr(part, field, None), str)
    }


def fold(
    node: ast.AST, aliases: Mapping[str, str], names: Mapping[str, ast.expr] | None = None
) -> Any:
    """Value of a literal: constants, arithmetic, containers, decoding, decompression.

    ValueError if it is none.
    """
    names = names or {}
    see = functools.partial(fold, aliases=aliases, names=names)
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name) and node.id in names:
        return see(names[node.id])
    if isinstance(node, (ast.Tuple, ast.List)):
        return tuple(map(see, node.elts))
    if isinstance(node, ast.Dict):
        return {see(key): see(value) for key, value in zip(node.keys, node.values)}
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -see(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        return _arithmetic(node.op, see(node.left), see(node.right))
    if isinstance(node, ast.Attribute) and re.fullmatch(
        r"lzma\.[A-Z][A-Z0-9_]+", dotted(node, aliases)
    ):
        return getattr(lzma, node.attr)
    if isinstance(node, ast.Call):
        return _fold_call(node, dotted(node, aliases), see)
    raise ValueError("not a literal")


def _arithmetic(op: ast.operator, left: Any, right: Any) -> Any:
    numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
    grows = (
        isinstance(op, (ast.Pow, ast.LShift)) and (abs(right) > 64 or abs(left) > 1 << 64)
        if numbers
        else False
    )
    joined = not numbers and isinstance(op, ast.Add) and len(left) + len(right) <= MAX_EXPANDED
    if grows or not (numbers or joined):
        raise ValueError("not a small literal")
    return ARITHMETIC[type(op)](left, right)


def _fold_call(node: ast.Call, name: str, see: Callable[[ast.AST], Any]) -> Any:
    if isinstance(node.func, ast.Attribute) and node.func.attr in (
        "decode",
        "encode",
        "strip",
        "fromhex",
    ):
        base = bytes if name == "bytes.fromhex" else see(node.func.value)
        return getattr(base, node.func.attr)(*map(see, node.args))
    args = [see(arg) for arg in node.args[: 1 if name == "compile" else None]]
    options = {keyword.arg: see(keyword.value) for keyword in node.keywords}
    if name == "compile":
        return args[0]
    if name in TEXT_DECODERS:
        return TEXT_DECODERS[name](*args, **options)
    if name in CONVERSIONS and len(args) == 1:
        return CONVERSIONS[name](args[0])
    return _decompress(name, args, options)


def _decompress(name: str, args: list[Any], options: dict[str, Any]) -> bytes:
    """What name(*args, **options) would return, at most MAX_EXPANDED bytes of it."""
    if name == "lzma.decompress":
        settings = {**dict(zip(("format", "memlimit", "filters"), args[1:])), **options}
        if any(part.get("dict_size", 0) > MAX_DICTIONARY for part in settings.get("filters") or ()):
            raise ValueError("dictionary too large")
        raw = settings.get("format") == lzma.FORMAT_RAW
        stream = lzma.LZMADecompressor(
            **{**settings, **({} if raw else {"memlimit": MAX_DICTIONARY})}
        )
    elif name in ("zlib.decompress", "gzip.decompress"):
        if name[0] == "g":
            wbits = 31
        else:
            wbits = args[1] if len(args) > 1 else options.get("wbits", zlib.MAX_WBITS)
        stream = zlib.decompressobj(wbits)
    elif name == "bz2.decompress":
        stream = bz2.BZ2Decompressor()
    else:
        raise ValueError(f"{name}: not a codec of the standard library")
    data = stream.decompress(args[0], MAX_EXPANDED)
    if not stream.eof:
        raise ValueError("cut short, or too large")
    return data


def parse(source: str) -> ast.Module:
    """The tree of a script, by Python 3.10's grammar where the running Python can tell."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd escapes in other people's strings
        return ast.parse(source, feature_version=(3, 10))


def unpack_source(text: str) -> tuple[str, int]:
    """A script's source without self-extracting wrappers, and how many there were. Runs nothing."""
    for layers in range(MAX_LAYERS):
        inner = _unwrap(text)
        if inner is None:
            return text, layers
        text = inner
    return text, MAX_LAYERS


def _unwrap(text: str) -> str | None:
    """The source that a short script hands to exec.

    None unless it is a literal behind known codecs.
    """
    try:
        tree = parse(text)
        if sum(isinstance(node, ast.stmt) for node in ast.walk(tree)) > MAX_WRAPPER_STATEMENTS:
            return None
        names = {
            target.id: node.value
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        call = next(
            node for node in ast.walk(tree) if isinstance(node, ast.Call) and called(node) == "exec"
        )
        source = fold(call.args[0], import_aliases(tree), names)
        if isinstance(source, bytes):
            return source.decode()
        return source if isinstance(source, str) else None
    except (*BAD_LITERAL, SyntaxError, StopIteration, RecursionError):
        return None


def wrap(source: str, config: str = "") -> str:
    """A self-extracting script of the same behaviour: lzma, base85, settings readable on top.

    Raises ValueError unless unpacking gives the source back, byte for byte.
    """
    data = lzma.compress(source.encode(), format=lzma.FORMAT_ALONE, preset=9 | lzma.PRESET_EXTREME)
    settings = f"SETTINGS_INSIDE={config!r}\n" if config else ""
    payload = base64.b85encode(data).decode()
    wrapper = (
        f"{settings}import base64,lzma\n"
        f"exec(compile(lzma.decompress(base64.b85decode('{payload}')),__file__,'exec'))\n"
    )
    if _unwrap(wrapper) != source:
        raise ValueError("packing: the unpacked source is not the original, byte for byte")
    return wrapper


# Settings


def declared_settings(tree: ast.Module) -> dict[str, str | None]:
    """Name -> default as text, None if it is no literal.

    From environment reads, own helpers around them, and Config fields.
    """
    aliases, found = import_aliases(tree), {}
    helpers = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, FUNCTIONS) and _reads_environment(node, aliases)
    }

    def add(name: Any, default: ast.AST | None) -> None:
        if isinstance(name, str) and name and found.get(name) is None:
            found[name] = _default_text(default, aliases)

    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args:
            default = next(
                (k.value for k in node.keywords if k.arg == "default"), (*node.args, None)[1]
            )
            name = text_of(node.args[0])
            if (
                dotted(node, aliases)
                in ("os.environ.get", "os.getenv", "os.environ.setdefault", "os.environ.pop")
                or called(node) in helpers
                and name.isupper()
            ):
                add(name, default)
        elif isinstance(node, ast.Subscript) and dotted(node.value, aliases) == "os.environ":
            add(text_of(node.slice), None)
    for name, default in _config_fields(tree, aliases):
        add(name, default)
    return found


def _reads_environment(node: ast.AST, aliases: Mapping[str, str]) -> bool:
    return any(
        isinstance(part, (ast.Name, ast.Attribute))
        and dotted(part, aliases) in ("os.environ", "os.getenv")
        for part in ast.walk(node)
    )


def _default_text(node: ast.AST | None, aliases: Mapping[str, str]) -> str | None:
    try:
        value = fold(node, aliases) if node is not None else None
    except BAD_LITERAL:
        return None
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return None if value is None else str(int(value) if isinstance(value, bool) else value)


def _config_fields(
    tree: ast.Module, aliases: Mapping[str, str]
) -> Iterator[tuple[str, ast.AST | None]]:
    """NAME and default of the fields of classes called Config or Hyperparameters.

    Whatever `field` makes them.
    """
    classes = {"Config", "Hyperparameters"}
    classes |= {
        node.value.id
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Name)
        and any(isinstance(t, ast.Name) and t.id in classes for t in node.targets)
    }
    for owner in (
        node for node in tree.body if isinstance(node, ast.ClassDef) and node.name in classes
    ):
        for node in owner.body:
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and not _reads_environment(node, aliases)
            ):
                default = node.value
                if isinstance(default, ast.Call):
                    default = next(
                        (k.value for k in default.keywords if k.arg == "default"),
                        (*default.args, None)[0],
                    )
                yield node.target.id.upper(), default


def plain_value(text: str) -> tuple[Any, ...]:
    """A setting's text as numbers where it can be.

    1e-8 and 0.00000001, (9, 10) and 9,10, False and 0 become equal.
    """
    parts = (part.strip().strip("'\"") for part in text.strip().strip("()[]").split(","))
    return tuple(_number(part) for part in parts if part and part.lower() != "none")


def _number(text: str) -> float | str:
    try:
        value = {"true": 1.0, "false": 0.0}.get(text.lower())
        value = float(text) if value is None else value
    except ValueError:
        return text
    return text if math.isnan(value) else value


# The script under check, and what flows through it


class Script:
    """A parsed script with the indexes that the checks share."""

    def __init__(
        self,
        source: str,
        requirements: Sequence[str],
        siblings: Sequence[str],
        run_settings: Mapping[str, str] | None,
        config: Mapping[str, str],
    ):
        self.source, self.tree = source, parse(source)
        self.requirements = requirements
        self.siblings = {re.split(r"[\\/]", name)[-1] for name in siblings}
        self.run_settings, self.declared = run_settings, declared_settings(self.tree)
        self.defaults = {name: config.get(name, default) for name, default in self.declared.items()}
        self.in_effect = {} if run_settings is None else {**self.defaults, **run_settings}
        self.aliases = import_aliases(self.tree)
        self.nodes = list(ast.walk(self.tree))
        self.parent = {
            id(child): node for node in self.nodes for child in ast.iter_child_nodes(node)
        }
        self.calls = [node for node in self.nodes if isinstance(node, ast.Call)]
        self.classes = {node.name for node in self.nodes if isinstance(node, ast.ClassDef)}
        self.functions: dict[str, list[ast.AST]] = {}
        for node in self.nodes:
            if isinstance(node, FUNCTIONS):
                self.functions.setdefault(node.name, []).append(node)
            elif isinstance(node, ast.ClassDef):  # calling a class calls its __init__
                self.functions.setdefault(node.name, []).extend(
                    part
                    for part in node.body
                    if isinstance(part, FUNCTIONS) and part.name == "__init__"
                )
        self.mentions: dict[str, list[ast.AST]] = {}
        types = self._types()
        for node in self.nodes:
            loads = isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load)
            if loads and id(node) not in types:
                self.mentions.setdefault(called(node), []).append(node)

    def _types(self) -> set[int]:
        """Nodes of annotations: they run nothing."""
        fields = ("annotation", "returns")
        found = [getattr(node, field, None) for node in self.nodes for field in fields]
        return {id(part) for annotation in found if annotation for part in ast.walk(annotation)}

    def above(self, node: ast.AST) -> Iterator[ast.AST]:
        """The node's parents, nearest first."""
        while (node := self.parent.get(id(node))) is not None:
            yield node

    def owner(self, node: ast.AST) -> ast.AST | None:
        """The function that a node is in, None at module level."""
        return next((up for up in self.above(node) if isinstance(up, FUNCTIONS)), None)

    def place(self, node: ast.AST) -> str:
        """Names of the classes and functions around a node (and a function's own): Scorer.score."""
        chain = [
            up.name
            for up in (node, *self.above(node))
            if isinstance(up, (*FUNCTIONS, ast.ClassDef))
        ]
        return ".".join(reversed(chain))

    def is_model(self, node: ast.AST) -> bool:
        """Whether a node is in a torch module: a class with a forward method or a Module base."""
        return any(
            isinstance(up, ast.ClassDef)
            and (
                "Module" in names_in(ast.Tuple(up.bases))
                or any(isinstance(part, FUNCTIONS) and part.name == "forward" for part in up.body)
            )
            for up in self.above(node)
        )

    def live(self, node: ast.AST, verdicts: dict[str, bool] | None = None) -> bool:
        """Whether a node can run.

        Its functions are mentioned by code that can, and no setting switches it off.
        """
        verdicts, child = {} if verdicts is None else verdicts, node
        for up in self.above(node):
            if (
                isinstance(up, ast.If)
                and child in up.body
                and self._off(up.test)
                or self._chosen_off(up, child)
            ):
                return False
            child = up
        definitions = [
            up for up in (node, *self.above(node)) if isinstance(up, (*FUNCTIONS, ast.ClassDef))
        ]
        for name in {
            up.name for up in definitions if up.name != "main" and not up.name.startswith("__")
        }:
            if name not in verdicts:
                verdicts[name] = True  # while it is asked for: calls may be circular
                outside = [
                    at
                    for at in self.mentions.get(name, [])
                    if not any(up in definitions and up.name == name for up in self.above(at))
                ]
                verdicts[name] = any(self.live(at, verdicts) for at in outside)
            if not verdicts[name]:
                return False
        return True

    @functools.cached_property
    def dead(self) -> set[ast.AST]:
        """The functions that cannot run."""
        functions = [node for node in self.nodes if isinstance(node, FUNCTIONS)]
        return {node for node in functions if not self.live(node)}

    def _chosen_off(self, up: ast.AST, child: ast.AST) -> bool:
        """A part that settings do not choose.

        `part if setting else other`, or a row of a table: a condition, and then the part, both
        lambdas or functions of the script; a tuple, or the arguments of a class.
        """
        if isinstance(up, ast.IfExp):
            return child is up.body and self._off(up.test)
        row = []
        if isinstance(up, ast.Tuple):
            row = up.elts
        elif isinstance(up, ast.Call) and called(up)[:1].isupper():
            row = up.args
        before = row[: row.index(child)] if child in row else []
        return any(self._off(test) for test in map(self._condition, before) if test)

    def _condition(self, item: ast.expr) -> ast.expr | None:
        """What a lambda, or a function of one statement that is named here, returns."""
        if isinstance(item, ast.Lambda):
            return item.body
        if isinstance(item, ast.Name):
            for function in self.functions.get(item.id, []):
                if isinstance(function.body[-1], ast.Return) and len(function.body) == 1:
                    return function.body[0].value
        return None

    def _off(self, test: ast.expr) -> bool:
        """Whether the logged settings make a condition false; unknown conditions count as true."""
        if isinstance(test, ast.BoolOp):
            return (any if isinstance(test.op, ast.And) else all)(map(self._off, test.values))
        compared = isinstance(test, ast.Compare) and len(test.ops) == 1
        value = self.in_effect.get(called(test.left if compared else test).upper())
        if value is None:
            return False
        if not compared:
            return plain_value(value) in ((), (0.0,))
        holds, right = COMPARE.get(type(test.ops[0])), test.comparators[0]
        try:
            return bool(holds) and not holds(
                plain_value(value), plain_value(str(fold(right, self.aliases)))
            )
        except BAD_LITERAL:  # no literal, or text against a number
            return False


# Tell nothing of the content.
SIZES = ("len", "range", "isinstance", "print", "numel", "size", "dim", "nelement")
COLLECTORS = ("append", "extend", "add", "update", "insert", "copy_", "add_", "bitwise_xor_")


class Flow:
    """Which expressions carry marked values.

    Marks are followed statement by statement, through the script's own functions.

    Functions that cannot run pass nothing on. source(node) says which expressions are marked by
    themselves. A name loses its mark when something else is assigned to it. objects: whether an
    object of the script's own classes carries the marks of what it was made of. `marked` keeps the
    ids of all expressions that carried a mark whenever they were reached.
    """

    def __init__(self, script: Script, source: Callable[[ast.AST], bool], objects: bool = True):
        self.script, self.source, self.objects = script, source, objects
        self.marked: set[int] = set()
        self.params: dict[int, set[str]] = {}  # of functions called with marked values
        self.returns: set[str] = set()  # functions that return them by themselves
        self.attributes: set[tuple[str, str]] = set()  # place of a class, name of its attribute
        before = -1
        while before != (before := self._size()):
            self._block(script.tree.body, set())

    def has(self, node: ast.AST | None) -> bool:
        return id(node) in self.marked

    def _size(self) -> int:
        return len(self.returns) + len(self.attributes) + sum(map(len, self.params.values()))

    def _block(self, body: Iterable[ast.AST], names: set[str]) -> None:
        for node in body:
            self._statement(node, names)

    def _statement(self, node: ast.AST, names: set[str]) -> None:
        if isinstance(node, FUNCTIONS):
            if node in self.script.dead:
                return
            arguments = {arg.arg for arg in arguments_of(node)}
            self._block(node.body, names - arguments | self.params.get(id(node), set()))
        elif isinstance(node, ast.ClassDef):
            self._block(node.body, set(names))
        elif isinstance(node, ast.Assign):
            self._value(node.value, names)
            for target in node.targets:
                self._bind(target, node.value, names)
        elif isinstance(node, ast.AnnAssign) and node.value:
            self._value(node.value, names)
            self._bind(node.target, node.value, names)
        elif isinstance(node, ast.AugAssign):
            if self._value(node.value, names) | self._value(node.target, names) | self.source(node):
                self._bind(node.target, True, names)
        elif isinstance(node, LOOPS):
            for _ in range(2):  # what the end of the body marks, its start sees
                on = self._value(node.test if isinstance(node, ast.While) else node.iter, names)
                if not isinstance(node, ast.While):
                    self._bind(node.target, on, names)
                self._block([*node.body, *node.orelse], names)
        elif isinstance(node, ast.If):
            self._value(node.test, names)
            other = set(names)
            self._block(node.body, names)
            self._block(node.orelse, other)
            names |= other
        elif isinstance(node, ast.Return) and node.value:
            self._return(node, names)
        else:
            self._parts(node, names)

    def _parts(self, node: ast.AST, names: set[str]) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.withitem):
                on = self._value(child.context_expr, names)
                if child.optional_vars:
                    self._bind(child.optional_vars, on, names)
            elif isinstance(child, ast.expr):
                self._value(child, names)
            elif isinstance(child, ast.stmt):
                self._statement(child, names)
            else:
                self._parts(child, names)

    def _return(self, node: ast.Return, names: set[str]) -> None:
        owner = self.script.owner(node)
        if self._value(node.value, names) and owner is not None and not self.params.get(id(owner)):
            self.returns.add(owner.name)

    def _bind(self, target: ast.AST, value: ast.AST | bool, names: set[str]) -> None:
        """Gives a target the mark of a value, pairwise for tuples.

        The value is an expression already visited, or yes/no.
        """
        on = value if isinstance(value, bool) else self.has(value)
        if isinstance(target, (ast.Tuple, ast.List)):
            pairs = isinstance(value, (ast.Tuple, ast.List)) and len(value.elts) == len(target.elts)
            for part, own in zip(target.elts, value.elts if pairs else [on] * len(target.elts)):
                self._bind(part, own, names)
        elif isinstance(target, ast.Starred):
            self._bind(target.value, on, names)
        elif isinstance(target, ast.Name):
            (names.add if on else names.discard)(target.id)
        elif isinstance(target, ast.Subscript):
            self._value(target.slice, names)
            if on:
                self._bind(target.value, True, names)
        elif on and isinstance(target, ast.Attribute) and called(target.value) == "self":
            self.attributes.add((self._class(target), target.attr))

    def _class(self, node: ast.AST) -> str:
        return next(
            (
                self.script.place(up)
                for up in self.script.above(node)
                if isinstance(up, ast.ClassDef)
            ),
            "",
        )

    def _value(self, node: ast.AST, names: set[str]) -> bool:
        """Whether an expression carries a mark; visits and records all its parts."""
        if isinstance(
            node, (ast.Lambda, ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)
        ):
            names = set(names)
            if isinstance(node, ast.Lambda):
                names -= {arg.arg for arg in arguments_of(node)}
            for part in getattr(node, "generators", ()):
                self._bind(part.target, self._value(part.iter, names), names)
        parts = [
            self._value(part, names)
            for part in ast.iter_child_nodes(node)
            if isinstance(part, (ast.expr, ast.keyword, ast.comprehension))
        ]
        on = any(parts)
        if isinstance(node, ast.Call):
            on = self._call(node, on, names)
        elif isinstance(node, ast.Name):
            on = node.id in names
        elif isinstance(node, ast.Attribute):
            on = (
                on
                or (self._class(node), node.attr) in self.attributes
                and called(node.value) == "self"
            ) and node.attr not in ("shape", "dtype", "device", "ndim")
        elif isinstance(node, ast.NamedExpr):
            self._bind(node.target, on, names)
        on = bool(on or self.source(node))
        if on:
            self.marked.add(id(node))
        return on

    def _call(self, node: ast.Call, on: bool, names: set[str]) -> bool:
        """Hands marks to the parameters of own functions and to collections.

        Returns whether the result is marked.
        """
        name = called(node)
        for function in self.script.functions.get(name, ()):
            self._hand_over(node, function)
        if (
            name in COLLECTORS
            and isinstance(node.func, ast.Attribute)
            and any(map(self.has, node.args))
        ):
            self._bind(node.func.value, True, names)
        made = not self.objects and name in self.script.classes
        return name not in SIZES and not made and (on or name in self.returns)

    def _hand_over(self, node: ast.Call, function: ast.AST) -> None:
        known = [arg.arg for arg in arguments_of(function)]
        method = known[:1] in (["self"], ["cls"])
        given = {name for name, arg in zip(known[method:], node.args) if self.has(arg)}
        given |= {k.arg for k in node.keywords if self.has(k.value) and k.arg in known}
        if given:
            self.params.setdefault(id(function), set()).update(given)


def arguments_of(node: ast.AST) -> list[ast.arg]:
    args = node.args
    return [
        *args.posonlyargs,
        *args.args,
        *filter(None, [args.vararg]),
        *args.kwonlyargs,
        *filter(None, [args.kwarg]),
    ]
