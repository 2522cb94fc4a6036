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
