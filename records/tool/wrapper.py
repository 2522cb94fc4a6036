"""Self-extracting scripts: makes one, and reads the source inside one without running it.

A wrapper hands a literal to exec, behind decoders and decompressors of the standard library. The
literal is computed here by the few operations that such wrappers use, under limits of size.
"""

from __future__ import annotations

import ast
import base64
import bz2
import functools
import lzma
import operator
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tool.tree import called, calls_in, dotted, import_aliases, parse

MAX_LAYERS = 3
MAX_WRAPPER_STATEMENTS = 20
MAX_EXPANDED = 64 << 20  # bytes that a literal may grow to
MAX_DICTIONARY = 1 << 28  # bytes an LZMA decoder may ask for
MAX_POWER = 64  # in 2 ** 64 and 1 << 64
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
TEXT_DECODERS = {
    "base64.b85decode": base64.b85decode,
    "base64.b64decode": base64.b64decode,
    "base64.a85decode": base64.a85decode,
    "base64.b32decode": base64.b32decode,
    "base64.standard_b64decode": base64.standard_b64decode,
    "base64.urlsafe_b64decode": base64.urlsafe_b64decode,
}
CONVERSIONS = {"str": str, "int": int, "float": float, "bool": bool, "tuple": tuple}
METHODS = ("decode", "encode", "strip", "fromhex")  # of text and bytes
LZMA_CONSTANT = re.compile(r"lzma\.[A-Z][A-Z0-9_]+")
LZMA_OPTIONS = ("format", "memlimit", "filters")  # of lzma.decompress, by position


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
        source = _executed(parse(text))
        if isinstance(source, bytes):
            source = source.decode()
    except (*BAD_LITERAL, SyntaxError, RecursionError):
        return None
    return source if isinstance(source, str) else None


def _executed(tree: ast.Module) -> Any:
    """What the first exec of a short script is given; None if there is none."""
    statements = sum(isinstance(node, ast.stmt) for node in ast.walk(tree))
    if statements > MAX_WRAPPER_STATEMENTS:
        return None
    for call in calls_in(tree):
        if called(call) == "exec":
            return fold(call.args[0], import_aliases(tree), _constants(tree))
    return None


def _constants(tree: ast.Module) -> dict[str, ast.expr]:
    """Name -> expression of the assignments at the top of a script."""
    names = {}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    names[target.id] = node.value
    return names


def wrap(source: str, config: str = "", file: str = "__file__") -> str:
    """A self-extracting script of the same behaviour: lzma, base85, settings readable on top.

    file: the expression for the file that tracebacks name. The payload has a line of its own, as
    a traceback prints the line of exec. Raises ValueError unless unpacking gives the source back,
    byte for byte.
    """
    preset = 9 | lzma.PRESET_EXTREME
    data = lzma.compress(source.encode(), format=lzma.FORMAT_ALONE, preset=preset)
    payload = base64.b85encode(data).decode()
    settings = f"SETTINGS_INSIDE={config!r}\n" if config else ""
    wrapper = (
        f"{settings}import base64,lzma\nPACKED='{payload}'\n"
        f"exec(compile(lzma.decompress(base64.b85decode(PACKED)),{file},'exec'))\n"
    )
    if _unwrap(wrapper) != source:
        raise ValueError("packing: the unpacked source is not the original, byte for byte")
    return wrapper


def settings_inside(text: str) -> str:
    """The config.env that a packed script carries: its SETTINGS_INSIDE, if that is a string.

    Empty if there is none, or if the script does not parse.
    """
    try:
        tree = parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""
    value = _constants(tree).get("SETTINGS_INSIDE")
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        return value.value
    return ""


# Literals


def fold(
    node: ast.AST, aliases: Mapping[str, str], names: Mapping[str, ast.expr] | None = None
) -> Any:
    """Value of a literal: constants, arithmetic, containers, decoding, decompression.

    names: what names stand for. Raises one of BAD_LITERAL if it is no literal, or too large a one.
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
    if isinstance(node, ast.Attribute) and LZMA_CONSTANT.fullmatch(dotted(node, aliases)):
        return getattr(lzma, node.attr)
    if isinstance(node, ast.Call):
        return _fold_call(node, dotted(node, aliases), see)
    raise ValueError("not a literal")


def _arithmetic(op: ast.operator, left: Any, right: Any) -> Any:
    """One operation on two numbers, or two texts joined, if the result stays small."""
    if isinstance(left, (int, float)) and isinstance(right, (int, float)):
        grows = isinstance(op, (ast.Pow, ast.LShift))
        large = abs(right) > MAX_POWER or abs(left) > 1 << MAX_POWER
        fits = not (grows and large)
    else:
        fits = isinstance(op, ast.Add) and len(left) + len(right) <= MAX_EXPANDED
    if not fits:
        raise ValueError("not a small literal")
    return ARITHMETIC[type(op)](left, right)


def _fold_call(node: ast.Call, name: str, see: Callable[[ast.AST], Any]) -> Any:
    """What a call of a known decoder, conversion or codec returns."""
    if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
        base = bytes if name == "bytes.fromhex" else see(node.func.value)
        method = getattr(base, node.func.attr)
        return method(*map(see, node.args))
    if name == "compile":  # the code alone: file name and mode are no part of it
        return _compiled(node, see)
    args = [see(arg) for arg in node.args]
    options = {keyword.arg: see(keyword.value) for keyword in node.keywords}
    if name in TEXT_DECODERS:
        return TEXT_DECODERS[name](*args, **options)
    if name in CONVERSIONS and len(args) == 1:
        return CONVERSIONS[name](args[0])
    return _decompress(name, args, options)


def _compiled(node: ast.Call, see: Callable[[ast.AST], Any]) -> Any:
    code = see(node.args[0])
    for keyword in node.keywords:
        see(keyword.value)  # no literal: not the wrapper that it seems
    return code


def _decompress(name: str, args: Sequence[Any], options: dict[str, Any]) -> bytes:
    """What name(*args, **options) would return, at most MAX_EXPANDED bytes of it."""
    stream = _stream(name, args, options)
    data = stream.decompress(args[0], MAX_EXPANDED)
    if not stream.eof:
        raise ValueError("cut short, or too large")
    return data


def _stream(name: str, args: Sequence[Any], options: dict[str, Any]) -> Any:
    """The decoder behind a function of the standard library."""
    if name == "lzma.decompress":
        return _lzma_stream({**dict(zip(LZMA_OPTIONS, args[1:])), **options})
    if name == "gzip.decompress":
        return zlib.decompressobj(16 + zlib.MAX_WBITS)
    if name == "zlib.decompress":
        window = args[1] if len(args) > 1 else options.get("wbits", zlib.MAX_WBITS)
        return zlib.decompressobj(window)
    if name == "bz2.decompress":
        return bz2.BZ2Decompressor()
    raise ValueError(f"{name}: not a codec of the standard library")


def _lzma_stream(settings: dict[str, Any]) -> lzma.LZMADecompressor:
    for part in settings.get("filters") or ():
        if part.get("dict_size", 0) > MAX_DICTIONARY:
            raise ValueError("dictionary too large")
    if settings.get("format") != lzma.FORMAT_RAW:
        settings = {**settings, "memlimit": MAX_DICTIONARY}
    return lzma.LZMADecompressor(**settings)
