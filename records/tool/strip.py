"""The same script without comments, docstrings and white space, for a packed form.

Every statement stays on its line: a traceback of the packed script names lines of the readable one.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tool.tree import DEFINITIONS, parse
from tool.wrapper import unpack_source, wrap

READABLE = ".readable.py"  # ends the name of the readable copy beside a stripped script
UNREADABLE = (SyntaxError, ValueError, RecursionError, MemoryError)  # of a text that is no script
NO_WORDS = (tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER)
# What reads comments or docstrings while a script runs; a module's own __doc__ is kept.
READERS = {"__doc__", "getdoc", "getsource", "getsourcelines", "getcomments", "doctest"}

Place = tuple[int, int]  # line from 1, character from 0


class Token(NamedTuple):
    """A token as the text has it, and where it begins."""

    kind: int
    text: str
    start: Place


class Docstring(NamedTuple):
    """Where one ends, and whether nothing else is in its body."""

    end: Place
    alone: bool


def readable_of(script: Path) -> Path:
    """Where the readable copy of a stripped script is: train_gpt.readable.py by train_gpt.py."""
    return script.with_suffix(READABLE)


def wrap_stripped(source: str, config: str = "") -> str:
    """A self-extracting script without comments and docstrings; tracebacks name the readable one.

    ValueError as `strip` raises it.
    """
    return wrap(strip(source), config, f"__file__[:-3]+{READABLE!r}")


def strip(source: str) -> str:
    """A script without comments, docstrings but the module's, and white space that says nothing.

    ValueError if it is no readable Python, or would not be the same program.
    """
    if unpack_source(source)[1]:
        raise ValueError("is packed already; what is stripped is the readable script")
    text = _plain(source)
    try:
        _check_encoding(text)
        tree = parse(text)
        _check_readers(tree)
        stripped = _written(text, _left_out(tree, text.split("\n")))
        same = same_program(text, stripped)
    except (SyntaxError, tokenize.TokenError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None)
        where = f"line {line}: " if line else ""
        raise ValueError(f"does not parse: {where}{error.args[0]}") from None
    if not same:
        raise ValueError("without comments and docstrings it is another program; pack it readable")
    return stripped


def same_program(one: str, other: str) -> bool:
    """Whether two scripts have one syntax tree but for docstrings below the module's.

    SyntaxError or another of UNREADABLE if one does not parse.
    """
    return _meaning(one) == _meaning(other)


def _meaning(source: str) -> str:
    """The syntax tree as text, without places and without docstrings."""
    tree = parse(_plain(source))
    for node in ast.walk(tree):
        if isinstance(node, DEFINITIONS):
            node.body = node.body[len(_docstrings(node)) :] or [ast.Pass()]
    return ast.dump(tree)


def _docstrings(definition: ast.AST) -> list[ast.stmt]:
    """The strings that a body begins with: the second would become the docstring of the rest."""
    found = []
    for statement in definition.body:
        value = getattr(statement, "value", None)
        constant = isinstance(statement, ast.Expr) and isinstance(value, ast.Constant)
        if not (constant and isinstance(value.value, str)):
            break
        found.append(statement)
    return found


# --- what cannot be stripped ----------------------------------------------------------------------


def _plain(source: str) -> str:
    """Newlines as Python reads them, no byte order mark."""
    return source.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _check_encoding(text: str) -> None:
    """Without its comment, another encoding than UTF-8 would be lost."""
    encoding, _ = tokenize.detect_encoding(io.BytesIO(text.encode()).readline)
    if encoding != "utf-8":
        raise ValueError(f"declares the encoding {encoding}; a stripped script is UTF-8")


def _check_readers(tree: ast.Module) -> None:
    """ValueError if the script asks for what would be left out."""
    for node in ast.walk(tree):
        read = [name for name in _asked_for(node) if name in READERS]
        if read:
            raise ValueError(
                f"line {node.lineno}: {read[0]} reads docstrings or source while the script "
                "runs; pack it readable"
            )


def _asked_for(node: ast.AST) -> list[str]:
    """The names by which a node may reach docstrings or source."""
    if isinstance(node, ast.Attribute):
        return [node.attr]
    if isinstance(node, ast.alias):
        return node.name.split(".")
    if isinstance(node, ast.Constant):
        return ["__doc__"] if node.value == "__doc__" else []
    if isinstance(node, ast.ClassDef):  # where the bare name may be the class's own
        names = [part.id for part in ast.walk(node) if isinstance(part, ast.Name)]
        return ["__doc__"] if "__doc__" in names else []
    return []


# --- writing --------------------------------------------------------------------------------------


def _left_out(tree: ast.Module, lines: list[str]) -> dict[Place, Docstring]:
    """Where each docstring begins -> what is known of it."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, DEFINITIONS):
            docstrings = _docstrings(node)
            alone = len(docstrings) == len(node.body)
            for statement in docstrings:
                start = _place(lines, statement.lineno, statement.col_offset)
                end = _place(lines, statement.end_lineno, statement.end_col_offset)
                found[start] = Docstring(end, alone and statement is docstrings[-1])
    return found


def _place(lines: list[str], line: int, offset: int) -> Place:
    """A node's place in characters: the tree counts bytes of UTF-8."""
    return line, len(lines[line - 1].encode()[:offset].decode())


def _tokens(text: str) -> Iterator[Token]:
    """The tokens, an f-string as one on every Python: from 3.12 on it comes in pieces."""
    lines = text.split("\n")
    depth = 0
    first = (1, 0)  # where the f-string begins
    for kind, string, start, end, _ in tokenize.generate_tokens(io.StringIO(text).readline):
        name = tokenize.tok_name[kind]
        if name.endswith("STRING_START"):
            if not depth:
                first = start
            depth += 1
        elif name.endswith("STRING_END"):
            depth -= 1
            if not depth:
                yield Token(tokenize.STRING, _between(lines, first, end), first)
        elif not depth:
            yield Token(kind, string, start)


def _between(lines: list[str], start: Place, end: Place) -> str:
    """The text from one place to another."""
    (first, left), (last, right) = start, end
    if first == last:
        return lines[first - 1][left:right]
    whole = lines[first : last - 1]
    return "\n".join([lines[first - 1][left:], *whole, lines[last - 1][:right]])


def _kept(text: str, left_out: dict[Place, Docstring]) -> Iterator[Token]:
    """The tokens but for comments and docstrings; `pass` where nothing else is in a body."""
    end = (0, 0)
    dropped = False  # whether a semicolon would stand after nothing
    for token in _tokens(text):
        if token.kind in NO_WORDS or token.start < end:
            continue
        if token.start in left_out:
            end, alone = left_out[token.start]
            dropped = not alone
            if alone:
                yield Token(tokenize.NAME, "pass", token.start)
        else:
            if not (dropped and token.text == ";"):
                yield token
            dropped = False


def _written(text: str, left_out: dict[Place, Docstring]) -> str:
    """The tokens with the least white space, every statement on its line."""
    writer = Writer()
    for token in _kept(text, left_out):
        if token.kind == tokenize.INDENT:
            writer.depth += 1
        elif token.kind == tokenize.DEDENT:
            writer.depth -= 1
        elif token.kind == tokenize.NEWLINE:
            writer.end_line()
        else:
            writer.put(token)
    return "".join(writer.parts)


class Writer:
    """Puts tokens down, and knows on which line it is."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.depth = 0  # of indentation, one space each
        self.line = 1
        self.last: Token | None = None  # of this line

    def put(self, token: Token) -> None:
        """The next token: a statement's first one goes to its own line."""
        if self.last is None:
            behind = token.start[0] - self.line
            self.parts.append("\n" * behind + " " * self.depth)
            self.line += behind
        elif _would_merge(self.last, token):
            self.parts.append(" ")
        self.parts.append(token.text)
        self.line += token.text.count("\n")
        self.last = token

    def end_line(self) -> None:
        """A statement's end, if any of it was kept."""
        if self.last is not None:
            self.parts.append("\n")
            self.line += 1
            self.last = None


def _would_merge(left: Token, right: Token) -> bool:
    """Whether two tokens side by side would read as one, or as a number with something odd."""
    letter = f"_{right.text[0]}".isidentifier()
    if left.kind == tokenize.NUMBER:
        return letter or right.text[0] == "."
    return letter and f"_{left.text[-1]}".isidentifier()
