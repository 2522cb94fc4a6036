"""A training script as text: its settings, its tree, and where in the tree things are."""

from __future__ import annotations

import ast
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

from tool.tree import (
    DEFINITIONS,
    FUNCTIONS,
    called,
    dotted,
    import_aliases,
    import_call,
    keyword_value,
    parse,
    text_of,
)
from tool.wrapper import BAD_LITERAL, fold

ENVIRONMENT = ("os.environ", "os.getenv")
ENVIRONMENT_READS = ("os.environ.get", "os.getenv", "os.environ.setdefault", "os.environ.pop")
CONFIG_CLASSES = ("Config", "Hyperparameters")

# Settings that name a place, a run or a process, in anybody's words: not what was trained.
PLACES_AND_LABELS = re.compile(
    r"SEEDS?|RUN_ID|RUN_NAME|LOGFILE|MODE|ARTIFACT|DEVICE|CONFIG|RESUME|SAVE_EVERY|SMOKE|"
    r"RANK|LOCAL_RANK|WORLD_SIZE|.*_(PATH|DIR|FILES?|PATTERN)"
)

Declaration = tuple[str, ast.AST | None]  # name of a setting, expression of its default


# Settings


def declared_settings(tree: ast.Module) -> dict[str, str | None]:
    """Name -> default as text, None if it is no literal.

    From environment reads, own helpers around them, and Config fields; the first default that is
    a literal counts.
    """
    aliases = import_aliases(tree)
    found: dict[str, str | None] = {}
    for name, default in [*_environment_reads(tree, aliases), *_config_fields(tree, aliases)]:
        if name and found.get(name) is None:
            found[name] = _default_text(default, aliases)
    return found


def chosen_defaults(tree: ast.Module, config: Mapping[str, str]) -> dict[str, str | None]:
    """NAME -> value of the table that DEFAULTS names: NAME = dict(...) of the script."""
    aliases = import_aliases(tree)
    table = config.get("DEFAULTS", "").upper()
    for node in tree.body:
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        named = table in [target.id for target in targets if isinstance(target, ast.Name)]
        if table and named and isinstance(node.value, ast.Call):
            pairs = ((word.arg, word.value) for word in node.value.keywords)
            return {name.upper(): _default_text(value, aliases) for name, value in pairs if name}
    return {}


def _environment_reads(tree: ast.Module, aliases: Mapping[str, str]) -> Iterator[Declaration]:
    """What a script asks the environment for: os.environ["A"], os.getenv("A", 1), own("A", 1)."""
    helpers = set()
    for node in ast.walk(tree):
        if isinstance(node, FUNCTIONS) and _reads_environment(node, aliases):
            helpers.add(node.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args:
            name = text_of(node.args[0])
            own = called(node) in helpers and name.isupper()
            if own or dotted(node, aliases) in ENVIRONMENT_READS:
                yield name, _default_argument(node, position=1)
        elif isinstance(node, ast.Subscript) and dotted(node.value, aliases) == "os.environ":
            yield text_of(node.slice), None


def _default_argument(call: ast.Call, position: int) -> ast.AST | None:
    """A call's argument `default`, else the one at a position."""
    named = keyword_value(call, "default")
    if named is None and len(call.args) > position:
        return call.args[position]
    return named


def _reads_environment(node: ast.AST, aliases: Mapping[str, str]) -> bool:
    for part in ast.walk(node):
        named = isinstance(part, (ast.Name, ast.Attribute))
        if named and dotted(part, aliases) in ENVIRONMENT:
            return True
    return False


def _default_text(node: ast.AST | None, aliases: Mapping[str, str]) -> str | None:
    if node is None:
        return None
    try:
        value = fold(node, aliases)
    except BAD_LITERAL:
        return None
    if value is None:
        return None
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, bool):
        value = int(value)
    return str(value)


def _config_fields(tree: ast.Module, aliases: Mapping[str, str]) -> Iterator[Declaration]:
    """NAME and default of the fields of classes called Config or Hyperparameters.

    Whatever `field` makes them; a field that asks the environment is no setting of its own.
    """
    for name, value in _fields(tree):
        if not _reads_environment(value, aliases):
            yield name, _field_default(value)


def _fields(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    classes = _config_classes(tree)
    for owner in tree.body:
        if not isinstance(owner, ast.ClassDef) or owner.name not in classes:
            continue
        for node in owner.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
                yield node.target.id.upper(), node.value


def declared_needs(tree: ast.Module) -> dict[str, str]:
    """NAME -> what a field says that it needs: "A=x or B, and C"."""
    found = {}
    for name, value in _fields(tree):
        needs = keyword_value(value, "needs") if isinstance(value, ast.Call) else None
        if isinstance(needs, ast.Constant):
            found[name] = str(needs.value)
    return found


def _config_classes(tree: ast.Module) -> set[str]:
    """The names Config and Hyperparameters, and those they are other names of."""
    classes = set(CONFIG_CLASSES)
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name):
            names = {called(target) for target in node.targets if isinstance(target, ast.Name)}
            if names.intersection(CONFIG_CLASSES):
                classes.add(node.value.id)
    return classes


def _field_default(value: ast.expr | None) -> ast.AST | None:
    return _default_argument(value, position=0) if isinstance(value, ast.Call) else value


def plain_value(text: str) -> tuple[float | str, ...]:
    """A setting's text as numbers where it can be.

    1e-8 and 0.00000001, (9, 10) and 9,10, False and 0 become equal.
    """
    values = []
    for part in text.strip().strip("()[]").split(","):
        word = part.strip().strip("'\"")
        if word and word.lower() != "none":
            values.append(_number(word))
    return tuple(values)


def _number(text: str) -> float | str:
    switches = {"true": 1.0, "false": 0.0}
    if text.lower() in switches:
        return switches[text.lower()]
    try:
        value = float(text)
    except ValueError:
        return text
    return text if math.isnan(value) else value


# The script under check


class Script:
    """A parsed script, what is known of its folder and run, and indexes that the checks share.

    requirements: lines of requirements.txt; siblings: other files of the folder; run_settings: NAME
    -> text as the logs print them, None if they do not; config: NAME -> text of the folder's
    config.env. Raises what parsing raises.
    """

    def __init__(
        self,
        source: str,
        requirements: Sequence[str] = (),
        siblings: Sequence[str] = (),
        run_settings: Mapping[str, str] | None = None,
        config: Mapping[str, str] | None = None,
    ):
        self.source = source
        self.tree = parse(source)
        self.requirements = requirements
        self.siblings = {file_name(sibling) for sibling in siblings}
        self.run_settings = run_settings
        self.declared = declared_settings(self.tree)
        self.defaults = {**self.declared, **chosen_defaults(self.tree, config or {})}
        for name, value in (config or {}).items():
            if name in self.declared:
                self.defaults[name] = value
        self.aliases = import_aliases(self.tree)
        self.nodes = list(ast.walk(self.tree))
        self.calls = [node for node in self.nodes if isinstance(node, ast.Call)]
        self.children: dict[int, list[ast.AST]] = {}
        self.parent: dict[int, ast.AST] = {}
        self.scope: dict[int, ast.AST] = {}  # the innermost class or function around a node
        self.places: dict[int, str] = {}  # of classes and functions
        for node in self.nodes:
            self._index(node)
        self.functions = self._functions()

    def _index(self, node: ast.AST) -> None:
        """Enters a node's children; its parents have been entered before."""
        children = list(ast.iter_child_nodes(node))
        scope = self.scope.get(id(node))
        if isinstance(node, DEFINITIONS):
            around = f"{self.places[id(scope)]}." if scope else ""
            self.places[id(node)] = around + node.name
            scope = node
        self.children[id(node)] = children
        for child in children:
            self.parent[id(child)] = node
            if scope is not None:
                self.scope[id(child)] = scope

    def _functions(self) -> dict[str, list[ast.AST]]:
        """Name -> functions that a call of it may run; calling a class calls its __init__."""
        functions: dict[str, list[ast.AST]] = {}
        for node in self.nodes:
            if isinstance(node, FUNCTIONS):
                functions.setdefault(node.name, []).append(node)
            elif isinstance(node, ast.ClassDef):
                methods = [part for part in node.body if isinstance(part, FUNCTIONS)]
                made = [method for method in methods if method.name == "__init__"]
                functions.setdefault(node.name, []).extend(made)
        return functions

    def above(self, node: ast.AST) -> Iterator[ast.AST]:
        """The node's parents, nearest first."""
        up = self.parent.get(id(node))
        while up is not None:
            yield up
            up = self.parent.get(id(up))

    def scopes(self, node: ast.AST) -> Iterator[ast.AST]:
        """The classes and functions around a node, innermost first."""
        up = self.scope.get(id(node))
        while up is not None:
            yield up
            up = self.scope.get(id(up))

    def owner(self, node: ast.AST) -> ast.AST | None:
        """The function that a node is in, None at module level."""
        for up in self.scopes(node):
            if isinstance(up, FUNCTIONS):
                return up
        return None

    def definitions(self, node: ast.AST) -> list[ast.AST]:
        """The classes and functions around a node, and itself if it is one; innermost first."""
        around = list(self.scopes(node))
        return [node, *around] if isinstance(node, DEFINITIONS) else around

    def place(self, node: ast.AST) -> str:
        """Names of the classes and functions around a node (and a function's own): Scorer.score."""
        inner = node if isinstance(node, DEFINITIONS) else self.scope.get(id(node))
        return self.places[id(inner)] if inner is not None else ""

    def where(self, node: ast.AST) -> str:
        """Its place, for a sentence."""
        return self.place(node) or "the module"

    @functools.cached_property
    def imports(self) -> list[tuple[ast.AST, str]]:
        """Every import: its node and the module; relative ones begin with a dot."""
        found: list[tuple[ast.AST, str]] = []
        for node in self.nodes:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                found += [(node, module) for module in _modules(node)]
            elif isinstance(node, ast.Call):
                module = import_call(node, self.aliases)
                if module:
                    found.append((node, module))
        return found


def _modules(node: ast.Import | ast.ImportFrom) -> list[str]:
    """The modules that an import statement names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    module = node.module or node.names[0].name
    return ["." * node.level + module]


def file_name(path: str) -> str:
    """The last part of a path, in either way of writing."""
    return re.split(r"[\\/]", path)[-1]
