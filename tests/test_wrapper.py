"""Self-extracting scripts: read, never run, without growing beyond bounds; made, also stripped."""

import ast
import base64
import bz2
import gzip
import hashlib
import io
import json
import lzma
import re
import subprocess
import sys
import textwrap
import tokenize
import types
import warnings
import zlib

import pytest
import record
import torch
from checking import word
from conftest import ROOT, TINY_RUN, clean_env
from helpers import Program, compiled, forked
from tool import strip, wrapper

import train_gpt

OURS = (ROOT / "train_gpt.py").read_text()


def wrap_raw(data):
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9}]
    stream = lzma.compress(data, format=lzma.FORMAT_RAW, filters=filters)
    text = base64.b85encode(stream).decode()
    options = "format=L.FORMAT_RAW,filters=[{'id':L.FILTER_LZMA2}]"
    return f"import lzma as L,base64 as B\nexec(L.decompress(B.b85decode({text!r}),{options}))"


def wrap_xz(data):
    stream = lzma.compress(data)
    imports = "from lzma import decompress as d"
    return f"{imports}\nS = {stream!r}\nexec(compile(d(S), 'x', 'exec'))"


def wrap_zlib(data):
    text = base64.b64encode(zlib.compress(data))
    decoded = f"__import__('base64').b64decode({text!r})"
    return f"exec(__import__('zlib').decompress({decoded}).decode('utf-8'), globals())"


def wrap_bz2(data):
    text = base64.a85encode(bz2.compress(data))
    code = f"import bz2, base64\ncode = base64.a85decode({text!r})"
    return f"{code}\nsource = bz2.decompress(code)\nif True:\n    exec(source)"


def wrap_gzip(data):
    stream = gzip.compress(data)
    return f"import gzip\nexec(gzip.decompress({stream!r}))"


WRAPPERS = {
    "raw": wrap_raw,
    "xz": wrap_xz,
    "zlib": wrap_zlib,
    "bz2": wrap_bz2,
    "gzip": wrap_gzip,
}
NO_WRAPPERS = (
    "",
    "exec(open('x').read())",
    "exec()",
    "a = a\nexec(a)",
    "x = 10 ** 10 ** 10\nexec(x)",
    "exec(__import__('os').system('true'))",
)


def packed(script, form):
    return WRAPPERS[form](script.encode())


@pytest.mark.parametrize("form", WRAPPERS)
def test_wrappers(form):
    script = "import requests\nprint('é')\n"
    text = packed(script, form)
    assert wrapper.unpack_source(text) == (script, 1)
    assert word("S5", text) == "FAIL"


def test_wrappers_have_bounds(tmp_path):
    marker = str(tmp_path / "ran")
    layers = [f"open({marker!r}, 'w')"]
    for form in ("xz", "raw", "zlib", "bz2"):
        layers.append(packed(layers[-1], form))
    assert wrapper.unpack_source(layers[3]) == (layers[0], 3)
    assert wrapper.unpack_source(layers[4]) == (layers[1], 3)
    assert not list(tmp_path.iterdir())  # nothing was executed
    bomb = packed("#" * (wrapper.MAX_EXPANDED + 1), "zlib")
    cut = packed("x = 1", "xz").replace("S = b'\\xfd", "S = b'\\xfe")
    for text in (bomb, cut, OURS, *NO_WRAPPERS):
        assert wrapper.unpack_source(text) == (text, 0)


def test_settings_inside_a_packed_script():
    config = "SEED=7\nNAME='é'\n"
    text = wrapper.wrap("print(SETTINGS_INSIDE)\n", config)
    assert wrapper.settings_inside(text) == config
    assert wrapper.unpack_source(text) == ("print(SETTINGS_INSIDE)\n", 1)
    bare = wrapper.wrap("print(1)\n")
    for other in (bare, OURS, "", "SETTINGS_INSIDE = 'a", "SETTINGS_INSIDE = 3", "\0", "\ud800"):
        assert wrapper.settings_inside(other) == ""
    nested = "def f():\n    SETTINGS_INSIDE = 'a'\n"
    assert wrapper.settings_inside(nested) == ""


def zlib_script(options):
    """A wrapper whose stream has no header, and a call with these options."""
    stream = zlib.compress(b"print(1)")[2:-4]
    return f"import zlib\nexec(zlib.decompress({stream!r}{options}))"


@pytest.mark.parametrize("options", [", -15", ", wbits=-15"])
def test_streams_without_a_header(options):
    assert wrapper.unpack_source(zlib_script(options)) == ("print(1)", 1)


def test_a_window_is_not_guessed():
    text = zlib_script("")
    assert wrapper.unpack_source(text) == (text, 0)


def with_dictionary(size):
    """An LZMA stream whose header asks the decoder for so large a dictionary."""
    stream = lzma.compress(b"print(1)", format=lzma.FORMAT_ALONE)
    stream = stream[:1] + size.to_bytes(4, "little") + stream[5:]
    return f"import lzma\nexec(lzma.decompress({stream!r}))"


def test_a_decoder_is_given_no_endless_memory():
    assert wrapper.unpack_source(with_dictionary(1 << 20)) == ("print(1)", 1)
    huge = with_dictionary(1 << 30)
    assert wrapper.unpack_source(huge) == (huge, 0)
    filters = "[{'id': lzma.FILTER_LZMA2, 'dict_size': 1 << 29}]"
    raw = wrap_raw(b"print(1)").replace("[{'id':L.FILTER_LZMA2}]", filters.replace("lzma.", "L."))
    assert wrapper.unpack_source(raw) == (raw, 0)


def test_a_long_script_is_no_wrapper():
    text = packed("print(1)", "gzip")
    assert wrapper.unpack_source(text) == ("print(1)", 1)
    long = "x = 1\n" * wrapper.MAX_WRAPPER_STATEMENTS + text
    assert wrapper.unpack_source(long) == (long, 0)


# --- without comments and docstrings --------------------------------------------------------------


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """What `pack --strip` makes of this repository's script, alone in a folder."""
    out = tmp_path_factory.mktemp("packed") / "train_gpt.py"
    assert record.main(["pack", str(ROOT / "train_gpt.py"), "--strip", "-o", str(out)]) == 0
    (out.parent / "train_gpt.readable.py").unlink()
    return out


@pytest.fixture(scope="module")
def stripped(script):
    """The source inside."""
    return wrapper.unpack_source(script.read_text())[0]


def statements(text):
    """Line, depth and words of every logical line, as tokenize reads them; no comments."""
    found = []
    depth = line = 0
    words = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        depth += (token.type == tokenize.INDENT) - (token.type == tokenize.DEDENT)
        if token.type == tokenize.NEWLINE:
            found.append((line, depth, words))
            words = []
        elif token.string.strip() and token.type != tokenize.COMMENT:
            line = line if words else token.start[0]
            words.append(token.string)
    return found


def without_texts(found):
    """Logical lines but for those of one string below the top; `pass` where it was alone.

    In a formatted script, which has no other such strings, these are the docstrings.
    """
    kept = []
    for i, (line, depth, words) in enumerate(found):
        is_text = depth > 0 and len(words) == 1 and words[0][-1] in "\"'"
        if is_text and depth > found[i - 1][1] and found[i + 1][1] < depth:
            kept.append((line, depth, ["pass"]))
        elif not is_text:
            kept.append((line, depth, words))
    return kept


def test_no_comment_and_no_docstring_is_left_and_all_else_on_its_line(stripped):
    before = statements(OURS)
    after = statements(stripped)
    expected = without_texts(before)
    assert len(before) - len(expected) > 400
    assert after == expected
    kinds = {token.type for token in tokenize.generate_tokens(io.StringIO(stripped).readline)}
    assert tokenize.COMMENT not in kinds
    assert ast.get_docstring(ast.parse(stripped)) == ast.get_docstring(ast.parse(OURS))


def test_the_stripped_form_is_the_smallest(stripped):
    """Also than what ast.unparse makes of the same tree."""
    sizes = []
    for text in (stripped, ast.unparse(ast.parse(stripped)), OURS):
        sizes.append(len(lzma.compress(text.encode())))
    assert sizes[0] < sizes[1] < 0.8 * sizes[2]


ODD = {
    "nested": """
        def outer():  # one
            '''Outer.'''
            def inner():
                "Inner."
                return "# no comment"
            return inner()
        seen = [outer()]
        """,
    "only docstrings": """
        class Empty:
            '''Nothing.'''
        class Error(Exception): "Nothing either."
        def idle():
            '''Idle.'''
        async def later():
            r'''Later.\\d'''
        seen = [idle(), Empty.__name__, Error.__name__, later.__name__]
        """,
    "two strings": '''
        def two():
            """The first."""
            "The second."
            u"A third."; """A fourth
            with a second line."""
        def rest():
            "One." ; "Two." ;
            return 3
        seen = [two(), rest()]
        ''',
    "parentheses": """
        def f(): ('a'  # why
            "b"  # why not
        ); return 1
        class A: ("doc"); x = 1
        seen = [f(), A.x]
        """,
    "no docstrings": """
        def f():
            x = 1
            "in the middle"
            return x
        def g():
            b"bytes"
            return 2
        def h():
            f"{f()}"
            return 3
        if seen := []:
            "no docstring"
        else:
            'nor this'
        for k in (f, g, h): seen.append(k())
        """,
    "strings": """
        w = 5
        seen = ["# a", '''# b
            # c''', b"# d", rb'\\#', f"#{w!r:>{w}} # {{#}}", f'''{
            w} # e''' "f" r"\\g", "a" 'b'"c", u"h"]
        """,
    "continued": """
        a = 1 + \\
            2  # three
        (c): int = 4
        b = [1,  # one

             2]
        if a and \\
           b: seen = [a, b, not-a]
        assert a \\
            == 3
        """,
    "decorated": """
        import dataclasses, functools
        @dataclasses.dataclass(  # frozen
            frozen=True)
        class D:
            '''A dataclass.'''
            a: int = 1  # the first
            # of two
            b: "list[int]" = dataclasses.field(default_factory=list)
        @functools.lru_cache  # once
        def f(x: int = 1, /, *, y: str = "#") -> str:
            '''Doc.'''
            return y * x
        seen = [D(), f(2), f.__wrapped__.__annotations__, D.__annotations__]
        """,
    "conditions": """
        from typing import TYPE_CHECKING
        if TYPE_CHECKING:
            import numpy  # only then
        match [1, 2]:
            case [a, *b] if a: "one"
            case _: pass
        try: seen = [a, b]
        except (ValueError): "no docstring"
        finally: "nor this"
        with open(__import__("os").devnull) as f: pass
        """,
    "numbers": """
        x = 3 if 1 else 0
        seen = [1 .real, 1. .real, 0x1f if x else 2, 1.if x else 0, x is not None, - -x, x<-1]
        seen += [1_0 .bit_length(), [*range(3)][: :2], {**{1: 2}}, (lambda: .5)(), 1if x else 2]
        """,
    "tabs": "def f():\n\t'''Doc.'''\n\tif 1:\n\t        return '\t# x'\n\nseen = [f()]",
    "newlines": "# a\r\ndef f():\r\n  '''D\r\n  oc.'''\r\n  return '''x\r\ny'''\rseen = [f()]\r\n",
    "letters": """
        def größe(): "Schön."; return "é # ü"
        naïve = "ö"; seen = [größe(), naïve, "\u2028"]  # é
        """,
    "header": "#!/usr/bin/env python3\n# coding: utf-8\n'''Doc: é'''\nseen = [__doc__, 'é']",
    "mark": "\ufeff# a\nseen = ['é']  # the end",
    "feeds": "x = 1\n\f\ndef f():\n    '''a\f'''\n    return 'b\f'\n\f\nseen = [f()]\n",
    "nothing": "seen = []",
}


def names_of(text):
    """What running a script leaves."""
    module = types.ModuleType("odd")  # dataclasses look for it
    names = module.__dict__
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")  # of 1if
        patch.setitem(sys.modules, "odd", module)
        exec(compile(text.encode(), "odd.py", "exec"), names)
    return names


def documented(names):
    """Functions and classes with a docstring, of what a script leaves; not those of dataclasses."""
    functions = (types.FunctionType, type)
    found = []
    for value in names.values():
        made = "__dataclass_fields__" in getattr(value, "__dict__", ())
        if isinstance(value, functions) and value.__module__ == "odd" and not made:
            found += [value.__name__] if value.__doc__ else []
    return found


@pytest.mark.parametrize("name", ODD)
def test_odd_scripts_do_the_same_without_comments_and_docstrings(name):
    source = textwrap.dedent(ODD[name]) if "\n    " in ODD[name] else ODD[name]
    text = strip.strip(source)
    before, after = names_of(source), names_of(text)
    assert repr(after["seen"]) == repr(before["seen"])
    assert documented(after) == []
    assert before["__doc__"] == after["__doc__"]
    words = [token.string for token in tokenize.generate_tokens(io.StringIO(text).readline)]
    assert not [word for word in words if word.startswith("#")]
    assert "\r" not in text
    assert strip.strip(text) == text
    assert strip.same_program(source, text)


def test_strings_that_are_no_docstrings_stay():
    texts = []
    for source in (ODD["no docstrings"], strip.strip(textwrap.dedent(ODD["no docstrings"]))):
        texts.append(re.findall(r"""b?["'][a-z ]+["']""", source))
    assert texts[0] == texts[1] == ['"in the middle"', 'b"bytes"', '"no docstring"', "'nor this'"]


@pytest.mark.parametrize("text", ["", "# nothing but\n\n# comments", "\n\n"])
def test_a_script_without_statements(text):
    assert strip.strip(text) == ""


@pytest.mark.parametrize(
    "other",
    [
        "def f(a):\n    'Doc.'\n    return b'x'\n",
        "def f(a):\n    'Doc.'\n    return 'X'\n",
        "def f(a):\n    'Doc.'\n    'x'\n",
        "def f(a: int):\n    'Doc.'\n    return 'x'\n",
        "'Doc.'\ndef f(a):\n    return 'x'\n",
    ],
)
def test_other_programs_are_not_the_same(other):
    one = "def f(a):  # that\n    return ('x')\n"
    assert strip.same_program(one, "def f(a):\n\n    'Another.'; return 'x'")
    assert not strip.same_program(one, other)


READERS = (
    "def f():\n    'doc'\nprint(f.__doc__)",
    "print(getattr(print, '__doc__'))",
    "import inspect\n\nprint(inspect.getsource(print))",
    "from inspect import getdoc as g",
    "import doctest",
    "class A:\n    'doc'\n    told = __doc__",
)
REFUSED = {
    "does not parse: line 2: ": "x = 1\ndef f(:\n",
    "null bytes": "x = '\0'\n",
    "is packed already": wrapper.wrap("x = 1\n"),
    "declares the encoding iso-8859-1": "# coding: latin-1\nx = 'é'\n",
    "unknown encoding": "# coding: klingon\n",
}


@pytest.mark.parametrize("text", READERS)
def test_a_script_that_reads_its_docstrings_is_refused(text):
    """The module's own is read by `header` above."""
    with pytest.raises(ValueError, match=r"line \d: \w+ reads docstrings or source"):
        strip.strip(text)


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_stripped_is_one_clear_error(words, tmp_path, capsys):
    script = tmp_path / "a.py"
    script.write_text(REFUSED[words])
    assert record.main(["pack", str(script), "--strip"]) == 64
    said = capsys.readouterr().err
    assert f"{script}: " in said
    assert words in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == [script]


def test_another_program_is_never_written(tmp_path, capsys, monkeypatch):
    script = tmp_path / "a.py"
    script.write_text("x = 1\n")
    monkeypatch.setattr(strip, "_written", lambda *inputs: "x = 2\n")
    assert record.main(["pack", str(script), "--strip"]) == 64
    assert "another program" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [script]


@pytest.mark.parametrize("place", ["a.py/out.py", "folder"])
def test_an_output_that_cannot_be_written(place, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    script = tmp_path / "a.py"
    script.write_text("x = 1\n")
    assert record.main(["pack", str(script), "--strip", "-o", str(tmp_path / place)]) == 64
    assert str(tmp_path / place.partition("/")[0]) in capsys.readouterr().err
    assert not list(tmp_path.rglob(".*")) and not list((tmp_path / "folder").iterdir())


FAILS = """'''Module.'''

def fails(x):
    '''Fails.'''
    # a comment
    y = [x,
         1]
    return y[0] / 0  # here


fails(1)
"""


@pytest.mark.parametrize("copy", [True, False])
def test_a_traceback_names_function_and_line_and_shows_no_payload(copy, tmp_path):
    source = tmp_path / "source.py"
    source.write_text(FAILS)
    script = tmp_path / "train_gpt.py"
    assert record.main(["pack", str(source), "--strip", "-o", str(script)]) == 0
    readable = tmp_path / "train_gpt.readable.py"
    assert readable.read_text() == FAILS
    if not copy:
        readable.unlink()
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=clean_env(), check=False
    )
    assert done.returncode == 1
    assert f'"{readable}", line 8, in fails' in done.stderr
    assert ("return y[0] / 0  # here" in done.stderr) == copy
    assert "b85decode(PACKED)" in done.stderr
    assert "PACKED='" not in done.stderr


def test_help_is_the_same_line_by_line(script, capsys):
    codes, said = forked(Program([script, "--help"], clean_env()))
    capsys.readouterr()
    assert codes == [train_gpt.main(["--help"], {})] == [0]
    assert said.splitlines() == capsys.readouterr().out.splitlines()
    assert len(said.splitlines()) > 150


def test_a_run_has_the_same_score(script, tmp_path):
    env = {**TINY_RUN, "DEVICE": "cpu", "COMPILE": "0"}
    (code,), said = forked(Program([script], clean_env(**env, OUT_DIR=str(tmp_path / "packed"))))
    assert code == 0, said
    assert train_gpt.main([], {**env, "OUT_DIR": str(tmp_path / "readable")}) == 0
    results = [
        json.loads((tmp_path / out / "result.json").read_text()) for out in ("packed", "readable")
    ]
    losses = [result["stages"]["sliding"]["loss"] for result in results]
    assert losses[0] == losses[1] > 0
    assert results[0]["sizes"]["code"] == script.stat().st_size
    assert results[0]["code_sha256"] == hashlib.sha256(script.read_bytes()).hexdigest()


GATE = """
import torch
class Gate(torch.nn.Module):
    '''A gate.'''
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3))
    def forward(self, x):
        '''Its own product.'''
        return torch.relu(x) * self.scale  # [3]
"""


def test_a_stripped_module_compiles():
    names = {"__file__": "gate.py", "__name__": "gate"}
    exec(strip.wrap_stripped(GATE), names)
    gate = names["Gate"]()
    x = torch.tensor([-1.0, 0.5, 2.0])
    torch.testing.assert_close(compiled(gate)(x), gate(x), rtol=0, atol=0)
