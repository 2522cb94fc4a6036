"""Self-extracting scripts are read, never run, and never grow without bounds."""

import base64
import bz2
import gzip
import lzma
import zlib

import pytest
from checking import word
from conftest import ROOT
from tool import wrapper

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
