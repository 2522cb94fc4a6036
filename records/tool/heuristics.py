"""Guesses about a training script's behaviour from its text, S1 to S4. They only warn.

Validation tokens and targets are followed through assignments, slices and calls of the script's own
functions. Code that nothing reaches, or that the logged settings switch off, is left out. The
run-time checks of the same rules give the verdict.
"""

from __future__ import annotations

import ast
import functools
import itertools
import operator
import re
from collections.abc import Callable, Iterable, Iterator

from tool.finding import Problems
from tool.script import Script, plain_value
from tool.tree import (
    DEFINITIONS,
    FUNCTIONS,
    LOOPS,
    arguments_of,
    called,
    calls_in,
    dotted,
    given,
    line_of,
    names_in,
    text_of,
)
from tool.wrapper import BAD_LITERAL, fold
from train_gpt import Check

SIZES = ("len", "range", "isinstance", "print", "numel", "size", "dim", "nelement")  # no content
COLLECTORS = ("append", "extend", "add", "update", "insert", "copy_", "add_", "bitwise_xor_")
DESCRIPTIONS = ("shape", "dtype", "device", "ndim")  # attributes that tell nothing of the content
COMPARE = {
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)
SEQUENCES = (ast.Tuple, ast.List)
CARRIERS = (ast.expr, ast.keyword, ast.comprehension)  # parts of an expression
MAX_CALLERS = 8  # callers of callers that are looked at

# Which code can run


class Liveness:
    """Which code can run.

    Code that is mentioned by code that can, and that no logged setting switches off.
    """

    def __init__(self, script: Script):
        self.script = script
        self.in_effect: dict[str, str | None] = {}
        if script.run_settings is not None:
            self.in_effect = {**script.defaults, **script.run_settings}
        self.off = self._switched_off()
        self.mentions = self._mentions()
        self.used = self._used()

    def live(self, node: ast.AST) -> bool:
        """Whether a node can run."""
        if id(node) in self.off:
            return False
        return all(id(up) in self.used for up in self.script.definitions(node))

    # Mentions

    def _used(self) -> set[int]:
        """Ids of the classes and functions that code outside them mentions.

        Code in unused ones does not count, until nothing more falls away: what is left may still
        mention each other.
        """
        definitions = [node for node in self.script.nodes if isinstance(node, DEFINITIONS)]
        used = set(map(id, definitions))
        while True:
            left = [node for node in definitions if self._is_used(node, used)]
            if len(left) == len(definitions):
                return used
            definitions = left
            used = set(map(id, left))

    def _is_used(self, definition: ast.AST, used: set[int]) -> bool:
        if definition.name == "main" or definition.name.startswith("__"):
            return True
        for mention in self.mentions.get(definition.name, ()):
            around = self.script.definitions(mention)
            if id(mention) in self.off or definition in around:
                continue
            if all(id(up) in used for up in around):
                return True
        return False

    def _mentions(self) -> dict[str, list[ast.AST]]:
        """Name -> where it is read; annotations run nothing."""
        types = self._types()
        mentions: dict[str, list[ast.AST]] = {}
        for node in self.script.nodes:
            if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load):
                if id(node) not in types:
                    mentions.setdefault(called(node), []).append(node)
        return mentions

    def _types(self) -> set[int]:
        """Ids of all parts of annotations."""
        found: set[int] = set()
        for node in self.script.nodes:
            for field in ("annotation", "returns"):
                annotation = getattr(node, field, None)
                if annotation is not None:
                    found.update(map(id, ast.walk(annotation)))
        return found

    # Settings

    def _switched_off(self) -> set[int]:
        """Ids of the nodes in parts that the settings do not choose."""
        off: set[int] = set()
        for node in self.script.nodes:  # parents before their children
            if id(node) in off:
                off.update(map(id, self.script.children[id(node)]))
            else:
                off.update(map(id, self._unchosen(node)))
        return off

    def _unchosen(self, node: ast.AST) -> list[ast.AST]:
        """The children that a node does not choose.

        The body of a condition, `part if setting else other`, or of a row in a table.
        """
        if isinstance(node, ast.If):
            return node.body if self._is_off(node.test) else []
        if isinstance(node, ast.IfExp):
            return [node.body] if self._is_off(node.test) else []
        if isinstance(node, ast.Tuple):
            return self._unchosen_in_row(node.elts)
        if isinstance(node, ast.Call) and called(node)[:1].isupper():
            return self._unchosen_in_row(node.args)
        return []

    def _unchosen_in_row(self, row: list[ast.expr]) -> list[ast.expr]:
        """What stands after a condition that is off.

        Both are lambdas or functions of the script, in a tuple or the arguments of a class.
        """
        for at, item in enumerate(row):
            condition = self._condition(item)
            if condition is not None and self._is_off(condition):
                return row[at + 1 :]
        return []

    def _condition(self, item: ast.expr) -> ast.expr | None:
        """What a lambda, or a function of one statement that is named here, returns."""
        if isinstance(item, ast.Lambda):
            return item.body
        if isinstance(item, ast.Name):
            for function in self.script.functions.get(item.id, ()):
                only = function.body[0]
                if len(function.body) == 1 and isinstance(only, ast.Return):
                    return only.value
        return None

    def _is_off(self, test: ast.expr) -> bool:
        """Whether the logged settings make a condition false; unknown conditions count as true."""
        if isinstance(test, ast.BoolOp):
            parts = map(self._is_off, test.values)
            return any(parts) if isinstance(test.op, ast.And) else all(parts)
        if isinstance(test, ast.Compare) and len(test.ops) == 1:
            value = self._setting(test.left)
            return value is not None and self._fails(value, test.ops[0], test.comparators[0])
        value = self._setting(test)
        return value is not None and plain_value(value) in ((), (0.0,))

    def _setting(self, node: ast.expr) -> str | None:
        """The value of the setting that an expression names: cfg.ttt_epochs, TTT_EPOCHS."""
        return self.in_effect.get(called(node).upper())

    def _fails(self, value: str, op: ast.cmpop, right: ast.expr) -> bool:
        holds = COMPARE.get(type(op))
        if holds is None:
            return False
        try:
            other = str(fold(right, self.script.aliases))
            return not holds(plain_value(value), plain_value(other))
        except BAD_LITERAL:  # no literal, or text against a number
            return False


# Where values flow


class Flow:
    """Which expressions carry marked values.

    Marks are followed statement by statement, through the script's own functions; those that cannot
    run pass nothing on. source(node) says which expressions are marked by themselves. A name loses
    its mark when something else is assigned to it. objects: whether an object of the script's own
    classes carries the marks of what it was made of. `marked` keeps the ids of all expressions that
    carried a mark whenever they were reached.
    """

    def __init__(self, liveness: Liveness, source: Callable[[ast.AST], bool], objects: bool = True):
        self.script = liveness.script
        self.live = liveness.live
        self.source = source
        self.sources: dict[int, bool] = {}  # what source said
        self.objects = objects
        self.classes = {node.name for node in self.script.nodes if isinstance(node, ast.ClassDef)}
        self.known: dict[int, list[str]] = {}  # parameters of functions
        self.marked: set[int] = set()
        self.params: dict[int, set[str]] = {}  # of functions called with marked values
        self.returns: set[str] = set()  # functions that return them by themselves
        self.attributes: set[tuple[str, str]] = set()  # place of a class, name of its attribute
        self.statements = {
            ast.FunctionDef: self._function,
            ast.AsyncFunctionDef: self._function,
            ast.ClassDef: self._class_body,
            ast.Assign: self._assignment,
            ast.AnnAssign: self._declaration,
            ast.AugAssign: self._update,
            ast.For: self._for,
            ast.AsyncFor: self._for,
            ast.While: self._while,
            ast.If: self._if,
            ast.Return: self._return,
        }
        self.expressions = {
            ast.Call: self._call,
            ast.Name: self._name,
            ast.Attribute: self._attribute,
            ast.NamedExpr: self._walrus,
        }
        self._follow()

    def has(self, node: ast.AST) -> bool:
        """Whether an expression carried a mark."""
        return id(node) in self.marked

    def has_any(self, nodes: Iterable[ast.AST]) -> bool:
        """Whether one of several did."""
        return any(id(node) in self.marked for node in nodes)

    def _follow(self) -> None:
        """Goes through the script until no function, class or parameter gets a new mark."""
        before = -1
        while before != self._size():
            before = self._size()
            self._block(self.script.tree.body, set())

    def _size(self) -> int:
        return len(self.returns) + len(self.attributes) + sum(map(len, self.params.values()))

    # Statements; names are those that carry a mark

    def _block(self, body: Iterable[ast.AST], names: set[str]) -> None:
        for node in body:
            self._statement(node, names)

    def _statement(self, node: ast.AST, names: set[str]) -> None:
        follow = self.statements.get(type(node), self._parts)
        follow(node, names)

    def _function(self, node: ast.AST, names: set[str]) -> None:
        if self.live(node):
            outer = names.difference(self._parameters(node))
            self._block(node.body, outer | self.params.get(id(node), set()))

    def _class_body(self, node: ast.ClassDef, names: set[str]) -> None:
        self._block(node.body, set(names))

    def _assignment(self, node: ast.Assign, names: set[str]) -> None:
        self._value(node.value, names)
        for target in node.targets:
            self._assign(target, node.value, names)

    def _declaration(self, node: ast.AnnAssign, names: set[str]) -> None:
        if node.value is None:
            self._parts(node, names)
            return
        self._value(node.value, names)
        self._assign(node.target, node.value, names)

    def _update(self, node: ast.AugAssign, names: set[str]) -> None:
        added = self._value(node.value, names)
        before = self._value(node.target, names)
        if added or before or self._is_source(node):
            self._bind(node.target, True, names)

    def _for(self, node: ast.For | ast.AsyncFor, names: set[str]) -> None:
        for _ in range(2):  # what the end of the body marks, its start sees
            self._bind(node.target, self._value(node.iter, names), names)
            self._block(node.body, names)
            self._block(node.orelse, names)

    def _while(self, node: ast.While, names: set[str]) -> None:
        for _ in range(2):
            self._value(node.test, names)
            self._block(node.body, names)
            self._block(node.orelse, names)

    def _if(self, node: ast.If, names: set[str]) -> None:
        self._value(node.test, names)
        other = set(names)
        self._block(node.body, names)
        self._block(node.orelse, other)
        names.update(other)

    def _return(self, node: ast.Return, names: set[str]) -> None:
        if node.value is None or not self._value(node.value, names):
            return
        owner = self.script.owner(node)
        if owner is not None and not self.params.get(id(owner)):
            self.returns.add(owner.name)

    def _parts(self, node: ast.AST, names: set[str]) -> None:
        for child in self.script.children[id(node)]:
            if isinstance(child, ast.expr):
                self._value(child, names)
            elif isinstance(child, ast.stmt):
                self._statement(child, names)
            elif isinstance(child, ast.withitem):
                self._with(child, names)
            else:
                self._parts(child, names)

    def _with(self, item: ast.withitem, names: set[str]) -> None:
        on = self._value(item.context_expr, names)
        if item.optional_vars is not None:
            self._bind(item.optional_vars, on, names)

    # Targets

    def _assign(self, target: ast.expr, value: ast.expr, names: set[str]) -> None:
        """Gives a target the mark of an expression already visited, pairwise for tuples."""
        if isinstance(target, SEQUENCES) and isinstance(value, SEQUENCES):
            if len(target.elts) == len(value.elts):
                for part, own in zip(target.elts, value.elts):
                    self._assign(part, own, names)
                return
        self._bind(target, self.has(value), names)

    def _bind(self, target: ast.expr, on: bool, names: set[str]) -> None:
        """Gives a target, with all its parts, a mark or none."""
        if isinstance(target, ast.Name):
            if on:
                names.add(target.id)
            else:
                names.discard(target.id)
        elif isinstance(target, SEQUENCES):
            for part in target.elts:
                self._bind(part, on, names)
        elif isinstance(target, ast.Starred):
            self._bind(target.value, on, names)
        else:
            self._store(target, on, names)

    def _store(self, target: ast.expr, on: bool, names: set[str]) -> None:
        """Marks what something marked is stored in: a table, or an attribute of self."""
        if isinstance(target, ast.Subscript):
            self._value(target.slice, names)
            if on:
                self._bind(target.value, True, names)
        elif on and isinstance(target, ast.Attribute) and called(target.value) == "self":
            self.attributes.add((self._class(target), target.attr))

    def _class(self, node: ast.AST) -> str:
        """The place of the class that a node is in."""
        for up in self.script.scopes(node):
            if isinstance(up, ast.ClassDef):
                return self.script.place(up)
        return ""

    # Expressions

    def _value(self, node: ast.AST, names: set[str]) -> bool:
        """Whether an expression carries a mark; visits and records all its parts."""
        if isinstance(node, ast.Lambda):
            names = names.difference(argument.arg for argument in arguments_of(node))
        elif isinstance(node, COMPREHENSIONS):
            names = set(names)
            for part in node.generators:
                self._bind(part.target, self._value(part.iter, names), names)
        on = False
        for part in self.script.children[id(node)]:
            if isinstance(part, CARRIERS) and self._value(part, names):
                on = True
        decide = self.expressions.get(type(node))
        if decide is not None:
            on = decide(node, on, names)
        if on or self._is_source(node):
            self.marked.add(id(node))
            return True
        return False

    def _is_source(self, node: ast.AST) -> bool:
        told = self.sources.get(id(node))
        if told is None:
            told = self.source(node)
            self.sources[id(node)] = told
        return told

    def _name(self, node: ast.Name, on: bool, names: set[str]) -> bool:
        return node.id in names

    def _attribute(self, node: ast.Attribute, on: bool, names: set[str]) -> bool:
        if node.attr in DESCRIPTIONS:
            return False
        if on or called(node.value) != "self":
            return on
        return (self._class(node), node.attr) in self.attributes

    def _walrus(self, node: ast.NamedExpr, on: bool, names: set[str]) -> bool:
        self._bind(node.target, on, names)
        return on

    def _call(self, node: ast.Call, on: bool, names: set[str]) -> bool:
        """Hands marks to the parameters of own functions and to collections.

        Returns whether the result is marked.
        """
        name = called(node)
        for function in self.script.functions.get(name, ()):
            self._hand_over(node, function)
        if name in COLLECTORS and isinstance(node.func, ast.Attribute):
            if self.has_any(node.args):
                self._bind(node.func.value, True, names)
        made = name in self.classes and not self.objects
        if made or name in SIZES:
            return False
        return on or name in self.returns

    def _hand_over(self, node: ast.Call, function: ast.AST) -> None:
        known = self._parameters(function)
        places = known[1:] if known[:1] in (["self"], ["cls"]) else known
        marked = {name for name, argument in zip(places, node.args) if self.has(argument)}
        for keyword in node.keywords:
            if keyword.arg in known and self.has(keyword.value):
                marked.add(keyword.arg)
        if marked:
            self.params.setdefault(id(function), set()).update(marked)

    def _parameters(self, function: ast.AST) -> list[str]:
        if id(function) not in self.known:
            names = [argument.arg for argument in arguments_of(function)]
            self.known[id(function)] = names
        return self.known[id(function)]


# What the checks share


class Behaviour:
    """A script with what its text tells of its behaviour, found out once."""

    def __init__(self, script: Script):
        self.script = script

    @functools.cached_property
    def liveness(self) -> Liveness:
        """Which code can run."""
        return Liveness(self.script)

    @functools.cached_property
    def order(self) -> ScoreOrder:
        """Where validation tokens go, what trains on them, and what scores them."""
        return ScoreOrder(self.liveness)


# S1: training on validation tokens

VAL_NAMES = re.compile(
    r"(^|_)(val|validation|eval)_(tok(en)?s?|data|ids|x|y|inputs|targets|seqs|chunks?|stream|np|"
    r"batch|files|pattern|loader)($|_)|load_val|load_eval|read_val"
)
EPOCHS = re.compile(r"epoch|passes|(^|_|\W)ep($|_|\W)")
QUIET = re.compile(r"\b(no_grad|inference_mode)\b")


def check_val_training(behaviour: Behaviour) -> Check:
    """S1: no gradient step on validation tokens that were not scored before."""
    script = behaviour.script
    order = behaviour.order
    problems = Problems()
    for call in order.gradients:
        if not order.flow.has(call) or not behaviour.liveness.live(call):
            continue
        if not order.scored_before(call):
            problems.warn(
                f"{line_of(call)}: {script.where(call)} trains on validation tokens and nothing "
                "shows that they are scored before (allowed: per chunk, score under no_grad, add "
                "to the sum, then step)"
            )
    return problems.outcome("S1", "no gradient step on validation tokens before their score")


class ScoreOrder:
    """Where the script trains on validation tokens.

    And whether the same loop has scored them before. gradients: calls of backward or autograd.grad.
    """

    def __init__(self, liveness: Liveness):
        self.script = liveness.script
        self.live = liveness.live
        self.flow = Flow(liveness, self._is_val)
        self.gradients = [call for call in self.script.calls if self._is_gradient(call)]

    def _is_val(self, node: ast.AST) -> bool:
        """Whether an expression is named like validation tokens; settings are only named so."""
        if isinstance(node, (ast.Name, ast.Attribute)):
            name = called(node)
            return bool(VAL_NAMES.search(name)) and name.upper() not in self.script.declared
        return isinstance(node, ast.Constant) and "fineweb_val" in text_of(node)

    def _is_gradient(self, call: ast.Call) -> bool:
        name = dotted(call, self.script.aliases)
        return called(call) == "backward" or name.endswith("autograd.grad")

    def scored_before(self, node: ast.AST, inside: tuple[ast.AST, ...] = ()) -> bool:
        """Whether a loop around the node scores the tokens earlier in its body.

        The loop is here or in all callers; inside: the functions that were gone through.
        """
        owner = self.script.owner(node)
        inside = (*inside, owner)
        callers = [call for call in self._callers(owner) if self.script.owner(call) not in inside]
        scopes = self._loops_around(node)
        if callers and all(map(self._is_made_per_chunk, callers)):
            scopes.append(owner)
        for scope in scopes:
            if self._scores(scope, node):
                return True
        if not callers or len(inside) > MAX_CALLERS:
            return False
        return all(self.scored_before(call, inside) for call in callers)

    def _loops_around(self, node: ast.AST) -> list[ast.AST]:
        """The loops around a node in the same function."""
        owner = self.script.owner(node)
        loops = (up for up in self.script.above(node) if isinstance(up, LOOPS))
        return [loop for loop in loops if self.script.owner(loop) is owner]

    def _callers(self, function: ast.AST | None) -> list[ast.Call]:
        """Calls of a function that hand validation tokens to it, and can run."""
        if function is None:
            return []
        calls = [call for call in self.script.calls if called(call) == function.name]
        return [call for call in calls if self.flow.has(call) and self.live(call)]

    def _is_made_per_chunk(self, call: ast.Call) -> bool:
        for up in self.script.above(call):
            if isinstance(up, LOOPS) and not _is_epoch(up):
                return True
        return False

    def _scores(self, scope: ast.AST, node: ast.AST) -> bool:
        """Something under no_grad whose result is added up.

        Inside scope, before node, not once an epoch.
        """
        earlier = self._earlier(scope, node)
        quiet = [part for part in earlier if self._is_quiet_use(part)]
        quiet = [part for part in quiet if not self._is_in_epoch(part)]
        if not quiet:
            return False
        first = min(part.lineno for part in quiet)
        after = (part for part in earlier if part.end_lineno >= first)
        return any(map(self._adds_up_inside, quiet)) or any(map(self._adds_up, after))

    def _earlier(self, scope: ast.AST, node: ast.AST) -> list[ast.AST]:
        """Parts of scope that begin before a node and do not contain it."""
        around = {id(up) for up in self.script.above(node)}
        start = _start(node)
        parts = (part for part in ast.walk(scope) if hasattr(part, "lineno"))
        return [part for part in parts if _start(part) < start and id(part) not in around]

    def _is_in_epoch(self, node: ast.AST) -> bool:
        for up in self.script.above(node):
            if isinstance(up, LOOPS) and _is_epoch(up):
                return True
        return False

    def _is_quiet_use(self, node: ast.AST) -> bool:
        """A block, or the call of a function, without gradients that gets validation tokens."""
        if isinstance(node, ast.With):
            return _is_quiet_block(node) and self.flow.has_any(ast.walk(node))
        if not isinstance(node, ast.Call) or not self.flow.has(node):
            return False
        functions = self.script.functions.get(called(node), ())
        inside = [part for body in functions for part in ast.walk(body)]
        calls = [part for part in inside if isinstance(part, ast.Call) and self.flow.has(part)]
        deeper = (self.script.functions.get(called(call), ()) for call in calls)
        return any(map(_is_quiet, itertools.chain(functions, *deeper)))

    def _adds_up(self, node: ast.AST) -> bool:
        """Whether a statement or call adds a marked value to what it keeps."""
        if isinstance(node, ast.AugAssign):
            return isinstance(node.op, ast.Add) and self.flow.has(node.value)
        if isinstance(node, ast.Assign):
            return self.flow.has(node.value) and _keeps_sum(node.targets[0], node.value)
        if not isinstance(node, ast.Call) or not self.flow.has(node):
            return False
        return called(node) in ("append", "extend", "add_") or self._adds_up_inside(node)

    def _adds_up_inside(self, node: ast.AST) -> bool:
        """Whether a call's function does so."""
        if not isinstance(node, ast.Call):
            return False
        for function in self.script.functions.get(called(node), ()):
            for part in ast.walk(function):
                if isinstance(part, ast.AugAssign) and self.flow.has(part.value):
                    return True
        return False


def _keeps_sum(target: ast.expr, value: ast.expr) -> bool:
    """`kept[i] = value`, or `total = total + value`."""
    if isinstance(target, ast.Subscript):
        return True
    if not isinstance(value, ast.BinOp) or not isinstance(value.op, ast.Add):
        return False
    return called(target) in names_in(value)


def _is_epoch(loop: ast.AST) -> bool:
    """A loop that repeats a pass over the same data.

    `for epoch in ...`, `for _ in range(args.ttt_epochs)`.
    """
    if isinstance(loop, ast.While):
        return False
    head = f"{ast.unparse(loop.target)} {ast.unparse(loop.iter)}"
    return bool(EPOCHS.search(head.lower()))


def _is_quiet_block(node: ast.AST) -> bool:
    if not isinstance(node, ast.With):
        return False
    return any(QUIET.search(ast.unparse(item.context_expr)) for item in node.items)


def _is_quiet(function: ast.AST) -> bool:
    decorated = any(QUIET.search(ast.unparse(part)) for part in function.decorator_list)
    return decorated or any(map(_is_quiet_block, ast.walk(function)))


def _start(node: ast.AST) -> tuple[int, int]:
    return node.lineno, node.col_offset


# S2: tables read at a hash of the target

TARGET_NAMES = re.compile(
    r"(^|_)(y|tgts?|targets?|labels?|gold|next_tok(en)?s?|true_tok(en)?s?)($|_)"
)
HASHES = re.compile(r"bitwise_xor|(^|_)hash(ed|es)?($|_)")
LOOKUPS = ("gather", "index_select", "take", "get", "embedding")


def check_target_hash(behaviour: Behaviour) -> Check:
    """S2: no table is read at a place that is hashed from the token to be predicted."""
    problems = Problems()
    for node in TargetHashes(behaviour.liveness).lookups():
        problems.warn(
            f"{line_of(node)}: {behaviour.script.where(node)} reads a table at a hash that "
            "contains the target token; the probability of a token must not depend on which token "
            "comes"
        )
    return problems.outcome("S2", "no table lookup by a hash of the target")


class TargetHashes:
    """Where targets go, which hashes contain them, and where these go."""

    def __init__(self, liveness: Liveness):
        self.script = liveness.script
        self.live = liveness.live
        self.models = {id(node) for node in self.script.nodes if _is_model_class(node)}
        self.targets = Flow(liveness, self._is_target, objects=False)
        self.hashes = {id(node) for node in self.script.nodes if self._is_target_hash(node)}
        self.keys = Flow(liveness, self._is_key, objects=False)

    def lookups(self) -> Iterator[ast.AST]:
        """Reads of a table at such a hash."""
        for node in self.script.nodes:
            if self._is_lookup(node) and self.live(node) and not self._is_update(node):
                yield node

    def _is_target(self, node: ast.AST) -> bool:
        """Names of targets, and slices one token ahead: x[1:], tokens[i + 1].

        In a model slices mean other things.
        """
        if isinstance(node, (ast.Name, ast.Attribute)):
            return bool(TARGET_NAMES.search(called(node)))
        return isinstance(node, ast.Subscript) and _is_ahead(node) and not self._is_in_model(node)

    def _is_in_model(self, node: ast.AST) -> bool:
        return any(id(up) in self.models for up in self.script.scopes(node))

    def _is_target_hash(self, node: ast.AST) -> bool:
        return _is_hash(node) and self.live(node) and self._holds_target(node)

    def _holds_target(self, node: ast.AST) -> bool:
        """In a model, which hashes its own inputs, only a target's name counts."""
        if self._is_in_model(node):
            return any(map(TARGET_NAMES.search, names_in(node)))
        return self.targets.has_any(self.script.children[id(node)])

    def _is_key(self, node: ast.AST) -> bool:
        return id(node) in self.hashes

    def _is_lookup(self, node: ast.AST) -> bool:
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            return self.keys.has(node.slice)
        if not isinstance(node, ast.Call) or called(node) not in LOOKUPS:
            return False
        return self.keys.has_any(given(node))

    def _is_update(self, node: ast.AST) -> bool:
        """A read that only serves to write the same table: table[key] = table[key] + 1."""
        read = node if isinstance(node, ast.Subscript) else node.func
        table = ast.dump(getattr(read, "value", node))
        for up in self.script.above(node):
            if isinstance(up, ast.Assign) and isinstance(up.targets[0], ast.Subscript):
                written = ast.dump(up.targets[0].value)
                if written.replace("Store()", "Load()") == table:
                    return True
        return False


def _is_model_class(node: ast.AST) -> bool:
    """A torch module: a class with a forward method or a Module base."""
    if not isinstance(node, ast.ClassDef):
        return False
    if any("Module" in names_in(base) for base in node.bases):
        return True
    return any(isinstance(part, FUNCTIONS) and part.name == "forward" for part in node.body)


def _is_ahead(node: ast.Subscript) -> bool:
    """x[1:], x[:, 1:], tokens[i + 1], tokens[i + 1 : j]."""
    index = node.slice
    if isinstance(index, ast.Tuple) and index.elts:
        index = index.elts[-1]
    start = index.lower if isinstance(index, ast.Slice) else index
    ahead = None
    if isinstance(start, ast.BinOp) and isinstance(start.op, ast.Add):
        ahead = start.right
    elif isinstance(index, ast.Slice) and index.upper is None:
        ahead = start
    return isinstance(ahead, ast.Constant) and ahead.value == 1


def _is_hash(node: ast.AST) -> bool:
    """A step that mixes values as hashes do.

    x ^ y, x ^= y, bitwise_xor(x, y), (a * PRIME + b) % M, (a * PRIME) & mask, hash(...) and the
    like.
    """
    if isinstance(node, ast.Call):
        return bool(HASHES.search(called(node)))
    if not isinstance(node, (ast.BinOp, ast.AugAssign)):
        return False
    if isinstance(node.op, ast.BitXor):
        return True
    reduces = isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Mod, ast.BitAnd))
    return reduces and any(map(_is_product, ast.walk(node.left)))


def _is_product(node: ast.AST) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)


# S3: optimising inside the evaluation

EVALUATION = re.compile(r"(^|[._])(eval|valid|scor|ttt|slot|sliding|adapt|ngram|cache|mix)", re.I)


def check_scored_window(behaviour: Behaviour) -> Check:
    """S3: nothing is optimised inside the evaluation against the tokens that it scores (SLOT)."""
    script = behaviour.script
    problems = Problems()
    for function in _trained_in_evaluation(script, behaviour.order):
        for node in _new_parameters(function):
            if behaviour.liveness.live(node):
                problems.warn(
                    f"{line_of(node)}: {script.where(node)} makes a trainable tensor and optimises "
                    "it during evaluation; what is fitted to a window must not score it"
                )
    return problems.outcome("S3", "no tensor is created and optimised inside the evaluation")


def _trained_in_evaluation(script: Script, order: ScoreOrder) -> Iterator[ast.AST]:
    """Functions that train, and are named as evaluation or train on validation tokens."""
    trains: dict[int, list[ast.Call]] = {}
    for call in order.gradients:
        trains.setdefault(id(script.owner(call)), []).append(call)
    for function in script.nodes:
        if isinstance(function, FUNCTIONS) and id(function) in trains:
            named = EVALUATION.search(script.place(function))
            if named or order.flow.has_any(trains[id(function)]):
                yield function


def _new_parameters(function: ast.AST) -> Iterator[ast.Call]:
    """Calls that create a tensor to be trained.

    Switching gradients of the model's own parameters on is none.
    """
    built = _built_names(function)
    for call in calls_in(function):
        wanted = [keyword.value for keyword in call.keywords if keyword.arg == "requires_grad"]
        if called(call) == "requires_grad_":
            switched_off = any(map(_is_false, [*wanted, *call.args]))
            if _is_own(call, built) and not switched_off:
                yield call
        elif called(call) == "Parameter" or any(map(_is_true, wanted)):
            yield call


def _built_names(function: ast.AST) -> set[str]:
    """Names that a function gives to results of calls."""
    built = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            built.update(target.id for target in node.targets if isinstance(target, ast.Name))
    return built


def _is_own(call: ast.Call, built: set[str]) -> bool:
    """Whether a method is called on a result of the same function."""
    base = getattr(call.func, "value", None)
    return isinstance(base, ast.Call) or isinstance(base, ast.Name) and base.id in built


def _is_true(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and bool(value.value)


def _is_false(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and not value.value


# S4: the lower of several scores

LOSS_NAMES = re.compile(r"(^|_)(loss|losses|nll|nlls|nats|bpb|bpbs|scores?|ppl|perplexity)($|_|\d)")
BEST = re.compile("best|low|min")
MINIMA = ("min", "minimum", "fmin", "amin", "argmin")


def check_best_of_scores(behaviour: Behaviour) -> Check:
    """S4: no choice of the lower one among several losses of the same tokens."""
    script = behaviour.script
    problems = Problems()
    for node in script.nodes:
        chosen = _chosen_losses(node)
        if len(chosen) < 2 or _is_running_best(script, node, chosen):
            continue
        if _is_in_evaluation(script, node) and behaviour.liveness.live(node):
            problems.warn(
                f"{line_of(node)}: {script.where(node)} picks the lower of "
                f"{', '.join(sorted(chosen))}; one scorer, chosen before the token is read, is "
                "charged"
            )
    return problems.outcome("S4", "no minimum over the losses of several scorers")


def _is_running_best(script: Script, node: ast.AST, chosen: set[str]) -> bool:
    """The best loss so far of a training loop: best_loss = min(best_loss, loss)."""
    targets: set[str] = set()
    for up in script.above(node):
        if isinstance(up, ast.Assign):
            targets.update(*map(_loss_names, up.targets))
    return len(chosen) == 2 and any(map(BEST.search, chosen & targets))


def _is_in_evaluation(script: Script, node: ast.AST) -> bool:
    place = script.place(node)
    return place.split(".")[0] in ("", "main") or bool(EVALUATION.search(place))


def _chosen_losses(node: ast.AST) -> set[str]:
    """Names of the losses among which a minimum, an argmin or a comparing `where` chooses."""
    if isinstance(node, ast.IfExp) and isinstance(node.test, ast.Compare):
        return _loss_names(node.test) & (_loss_names(node.body) | _loss_names(node.orelse))
    if not isinstance(node, ast.Call):
        return set()
    name = called(node)
    if name == "where" and node.args:
        test = node.args[0]
        return _loss_names(test) if isinstance(test, ast.Compare) else set()
    if name in MINIMA:
        return _loss_names_of([*node.args, getattr(node.func, "value", node.func)])
    return set()


def _loss_names_of(nodes: Iterable[ast.AST]) -> set[str]:
    return set().union(*map(_loss_names, nodes))


def _loss_names(node: ast.AST) -> set[str]:
    """Names of losses an expression's value is made of (not of what only counts or holds them)."""
    if isinstance(node, ast.Constant):
        return set()
    if isinstance(node, (ast.Name, ast.Attribute)):
        return _loss_names_of_name(node)
    if not isinstance(node, ast.Call):
        return _loss_names_of(ast.iter_child_nodes(node))
    if called(node) in SIZES:
        return set()
    base = [node.func.value] if isinstance(node.func, ast.Attribute) else []
    return _loss_names_of([*base, *node.args])


def _loss_names_of_name(node: ast.Name | ast.Attribute) -> set[str]:
    """The name itself, or what it is an attribute of the result of: model(nll).value."""
    name = called(node)
    if LOSS_NAMES.search(name):
        return {name}
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Call):
        return _loss_names(node.value)
    return set()


CHECKS: dict[str, Callable[[Behaviour], Check]] = {
    "S1": check_val_training,
    "S2": check_target_hash,
    "S3": check_scored_window,
    "S4": check_best_of_scores,
}
