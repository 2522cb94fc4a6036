"""Reads a syntax tree: what a name, a call, an import or a string in it says. Runs nothing."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator, Mapping

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (*FUNCTIONS, ast.ClassDef)
LOOPS = (ast.For, ast.AsyncFor, ast.While)
IDENTIFIERS = ("id", "attr", "arg", "name")  # fields of nodes that hold one


def parse(source: str) -> ast.Module:
    """The tree of a script, by Python 3.10's grammar where the running Python can tell."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd escapes in other people's strings
        return ast.parse(source, feature_version=(3, 10))


def line_of(node: ast.AST) -> str:
    """Where a reader finds a node: `line 12`."""
    return f"line {getattr(node, 'lineno', '?')}"


# Names


def called(node: ast.AST) -> str:
    """Last part of a name or of what a call calls: `a.b.run(x)` -> run."""
    if isinstance(node, ast.Call):
        node = node.func
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Name):
        return node.id
    return ""


def dotted(node: ast.AST, aliases: Mapping[str, str]) -> str:
    """Full dotted name of an expression, or of the function that a call calls.

    `?` stands for anything else.
    """
    while isinstance(node, ast.Call):  # f(x)(y)
        node = node.func
    if isinstance(node, ast.Name):
        return aliases.get(node.id, node.id)
    if not isinstance(node, ast.Attribute):
        return "?"
    if isinstance(node.value, ast.Call):  # __import__("os").system
        base = import_call(node.value, aliases) or "?"
    else:
        base = dotted(node.value, aliases)
    return f"{base}.{node.attr}"


def names_in(node: ast.AST) -> set[str]:
    """Every identifier in a node: of names, attributes, arguments and definitions."""
    names = set()
    for part in ast.walk(node):
        for field in IDENTIFIERS:
            name = getattr(part, field, None)
            if isinstance(name, str):
                names.add(name)
    return names


def text_of(node: ast.AST) -> str:
    """A string literal's text, the literal beginning of an f-string, else empty."""
    if isinstance(node, ast.JoinedStr) and node.values:
        node = node.values[0]
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    return ""


# Calls


def calls_in(node: ast.AST) -> Iterator[ast.Call]:
    """Every call in a node, itself too."""
    for part in ast.walk(node):
        if isinstance(part, ast.Call):
            yield part


def given(call: ast.Call) -> list[ast.expr]:
    """All that a call is given: by position, then by name."""
    return [*call.args, *(keyword.value for keyword in call.keywords)]


def keyword_value(call: ast.Call, name: str) -> ast.expr | None:
    """What a call is given under a name."""
    for keyword in call.keywords:
        if keyword.arg == name:
            return keyword.value
    return None


def arguments_of(function: ast.AST) -> list[ast.arg]:
    """The parameters of a function or lambda, in the order in which they are declared."""
    declared = function.args
    named = [*declared.posonlyargs, *declared.args]
    rest = [declared.vararg, *declared.kwonlyargs, declared.kwarg]
    return [*named, *(argument for argument in rest if argument is not None)]


# Imports


def import_aliases(tree: ast.Module) -> dict[str, str]:
    """Local name -> dotted name of what was imported under it, also of `run = subprocess.run`."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                name, value = _bound_by_import(alias)
                aliases[name] = value
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute):
            _add_renamed(node, aliases)
    return aliases


def _bound_by_import(alias: ast.alias) -> tuple[str, str]:
    """The name that an import binds, and what it stands for: `import a.b` binds a."""
    if alias.asname:
        return alias.asname, alias.name
    top = alias.name.split(".")[0]
    return top, top


def _add_renamed(node: ast.Assign, aliases: dict[str, str]) -> None:
    root = dotted(node.value, {}).split(".")[0]
    if root not in aliases:
        return
    value = dotted(node.value, aliases)
    for target in node.targets:
        if isinstance(target, ast.Name):
            aliases[target.id] = value


def import_call(node: ast.Call, aliases: Mapping[str, str]) -> str:
    """The module that `__import__("m")` or `importlib.import_module("m")` names, else empty."""
    name = dotted(node.func, aliases)
    if name not in ("__import__", "importlib.import_module") or not node.args:
        return ""
    return text_of(node.args[0])
