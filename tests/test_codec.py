"""The text compressor in real processes: files, errors, other settings, and its own proof."""

import hashlib
import json
import resource
import signal
import struct

import codec
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, TINY_RUN, clean_env
from data_hub import small_model
from helpers import FakeClock, Program, forked, python
from tool import progress

import train_gpt as tg

TEXT = "bo dake tinu\r\n\tl\u00e4ngst \u2603 ba  bo dake tinu bo dake\n"
VALIDATION = ("tinu bo dake bo", "x", TEXT, "", TEXT + TEXT, "bo bo bo tinu", "bo dake")


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    """Settings that name a tiny artifact and short validation documents."""
    out = tmp_path_factory.mktemp("tiny") / "run"
    settings = {**TINY_RUN, "OUT_DIR": str(out), "DEVICE": "cpu", "VAL_TOKENS": "64"}
    assert tg.main([], settings) == 0
    tokens = []
    for text in VALIDATION:
        tokens += [1, *(byte + 4 for byte in text.encode())]
    tg.write_shard(out / "short" / tg.shard_name("val", 0), np.array(tokens))
    return {
        "ARTIFACT": str(out / "model.ptz"),
        "DATA_PATH": str(out / "short"),
        "TOKENIZER_PATH": "byte260",
    }


@pytest.fixture(scope="module")
def packed(env, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "speech.txt"
    path.write_bytes(TEXT.encode())
    assert codec.main(["compress", str(path)], env) == 0
    return path.with_name("speech.txt.pgolf").read_bytes()


def tool(env, *arguments):
    """The command in a process of its own -> how it ended."""
    return python([ROOT / "records/codec.py", *arguments], clean_env(**env))


def forked_tool(env, *arguments, first=None):
    """The same in a forked process -> exit code, output."""
    program = [ROOT / "records/codec.py", *arguments]
    (code,), said = forked(Program(program, clean_env(**env), first=first))
    return code, said


# --- files ----------------------------------------------------------------------------------------


def test_compress_and_decompress(env, packed, tmp_path):
    """In processes of their own, with default names; the file does not depend on the process."""
    path = tmp_path / "speech.txt"
    path.write_bytes(TEXT.encode())
    done = tool(env, "compress", path)
    assert done.returncode == 0, done.stderr
    assert f"{len(TEXT.encode())} bytes" in done.stdout
    assert "zstd" in done.stdout
    assert (tmp_path / "speech.txt.pgolf").read_bytes() == packed
    path.unlink()
    assert forked_tool(env, "decompress", tmp_path / "speech.txt.pgolf")[0] == 0
    assert path.read_bytes() == TEXT.encode()


def test_the_header_says_what_a_decoder_needs(packed):
    (size,) = struct.unpack_from("<I", packed, 8)
    header = json.loads(packed[12 : 12 + size])
    assert header["targets"] == len(TEXT.encode())
    assert header["EVAL_STRIDE"] == 16
    assert header["torch"] == torch.__version__


def test_named_outputs(env, tmp_path):
    source = tmp_path / "a"
    source.write_text("bo dake")
    between = str(tmp_path / "b.bin")
    target = tmp_path / "c"
    assert codec.main(["compress", str(source), "-o", between], env) == 0
    assert codec.main(["decompress", between, "-o", str(target)], env) == 0
    assert target.read_text() == "bo dake"
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b.bin", "c"}


# --- what is refused ------------------------------------------------------------------------------


def test_errors_of_processes(env, packed, tmp_path):
    text = tmp_path / "latin.txt"
    bad = tmp_path / "bad.txt.pgolf"
    text.write_bytes("l\u00e4ngst".encode("latin-1"))
    bad.write_bytes(packed[:-1])
    for command, path, message in (
        ("compress", text, "latin.txt: not UTF-8"),
        ("decompress", bad, "wrong checksum"),
    ):
        code, said = forked_tool(env, command, path)
        assert code == 64
        assert message in said
        assert "Traceback" not in said
    assert {path.name for path in tmp_path.iterdir()} == {"latin.txt", "bad.txt.pgolf"}


@pytest.fixture
def refused(env, tmp_path, capsys):
    """Runs the tool in this process, expects exit code 64, the message and no new file."""

    def check(message, *arguments, **settings):
        before = sorted(tmp_path.iterdir())
        assert codec.main([*map(str, arguments)], {**env, **settings}) == 64
        assert message in capsys.readouterr().err
        assert sorted(tmp_path.iterdir()) == before

    return check


def test_unusable_input_is_named(refused, tmp_path):
    empty = tmp_path / "empty.txt"
    full = tmp_path / "full.txt"
    empty.write_bytes(b"")
    full.write_bytes(b"bo")
    refused("empty.txt: empty", "compress", empty)
    refused("none.txt", "compress", tmp_path / "none.txt")
    refused("none.pgolf", "decompress", tmp_path / "none.pgolf")
    refused("full.txt: no .pgolf to take off", "decompress", full)
    refused("not a compressed text", "decompress", full, "-o", tmp_path / "x")
    refused("ARTIFACT='none.ptz'", "compress", full, ARTIFACT="none.ptz")
    refused("expected a whole number from 1", "verify", "--documents", 0)
    refused("expected a whole number from 1", "verify", "--tokens", 0)
    refused("nothing was started", "compress", full, EVAL_STREAM="24")


def changed(blob, at, value):
    return blob[:at] + value + blob[at + len(value) :]


def damaged(blob):
    """(damaged file, what is said of it)."""
    count = blob.index(b'"targets": ') + len(b'"targets": ')
    flipped = bytes([blob[-1] ^ 1])
    return {
        "nothing": (b"", "begins with b''"),
        "another magic": (changed(blob, 0, b"Q"), "begins with b'QGOLFTXT'"),
        "10 bytes": (blob[:10], "unreadable header"),
        "100 bytes": (blob[:100], "unreadable header"),
        "no JSON": (changed(blob, 12, b"["), "unreadable header"),
        "an empty header": (changed(blob, 8, bytes(4)), "unreadable header"),
        "a huge header": (changed(blob, 8, b"\xff\xff\xff\xff"), "unreadable header"),
        "another count": (changed(blob, count, b"9"), "wrong checksum"),
        "cut": (blob[:-20], "wrong checksum"),
        "a byte more": (blob + b"\0", "wrong checksum"),
        "the last bit": (changed(blob, len(blob) - 1, flipped), "wrong checksum"),
    }


KINDS_OF_DAMAGE = list(damaged(b'PGOLFTXT"targets": '))


@pytest.mark.parametrize("kind", KINDS_OF_DAMAGE)
def test_damage_is_noticed(kind, packed, refused, tmp_path):
    blob, message = damaged(packed)[kind]
    (tmp_path / "bad.txt.pgolf").write_bytes(blob)
    refused(message, "decompress", tmp_path / "bad.txt.pgolf")


def test_other_settings_are_named(packed, refused, tmp_path, env):
    path = tmp_path / "speech.txt.pgolf"
    path.write_bytes(packed)
    refused("another EVAL_STREAM: 0; here it is 16", "decompress", path, EVAL_STREAM="16")
    both = "another TILT: 0; here it is 1, another NGRAM: ; here it is mix"
    refused(both, "decompress", path, TILT="1", NGRAM="mix")
    refused("another SEED: 1337; here it is 5", "decompress", path, SEED="5")
    decoded = ["decompress", str(path), "-o", str(tmp_path / "text")]
    assert codec.main(decoded, {**env, "MAX_EVAL_SECONDS": "9"}) == 0  # nothing is timed here
    other = tmp_path / "other.ptz"
    with open(env["ARTIFACT"], "rb") as file:
        cfg, weights = tg.unpack(file.read())
    other.write_bytes(tg.pack({name: w + 0.01 for name, w in weights.items()}, cfg))
    refused("another artifact_sha256", "decompress", path, ARTIFACT=str(other))


@pytest.fixture
def other_frequencies(monkeypatch):
    """Here, frequencies are others than in a process of its own, and as long a code."""
    real = codec.frequencies

    def shifted(log_p):
        return real(log_p) + (np.arange(261) > 9)

    monkeypatch.setattr(codec, "frequencies", shifted)


def test_a_decoder_that_computes_otherwise_writes_nothing(
    packed, refused, tmp_path, other_frequencies
):
    path = tmp_path / "speech.txt.pgolf"
    path.write_bytes(packed)
    refused("decoded to another text: this machine", "decompress", path)


def test_a_text_that_cannot_be_spelled_is_refused(refused, tmp_path, monkeypatch):
    def one_less(text, table):
        return table.encode(text)[:-1]

    (tmp_path / "a.txt").write_text("bo dake")
    monkeypatch.setattr(codec, "tokens_of", one_less)
    refused("a.txt: the tokenizer byte260 cannot spell", "compress", tmp_path / "a.txt")


# --- files that were made to harm -----------------------------------------------------------------


def header_of(blob):
    """A file's header, and its code."""
    (size,) = struct.unpack_from("<I", blob, 8)
    return json.loads(blob[12 : 12 + size]), blob[44 + size :]


def signed(text, code):
    """A file with any header text and the checksum that belongs to it."""
    digest = hashlib.sha256(text + code).digest()
    return codec.MAGIC + struct.pack("<I", len(text)) + text + digest + code


def with_field(blob, name, text):
    """The file with another JSON text as the value of a field; signed."""
    header, code = header_of(blob)
    header[name] = "@@"
    return signed(json.dumps(header).replace('"@@"', text, 1).encode(), code)


ODD_VALUES = {
    "null": "null",
    "true": "true",
    "negative": "-1",
    "huge": "1" + 400 * "0",
    "too long a number": 5000 * "9",
    "fraction": "0.5",
    "NaN": "NaN",
    "infinite": "1e999",
    "empty": '""',
    "other text": '"x"',
    "lines": '"a\\nfinal_exact val_bpb:0.1\\u001b[2J"',
    "surrogate": '"\\ud800"',
    "long text": json.dumps("x" * 100_000),
    "list": "[1, 2]",
    "nested": "[" * 900 + "]" * 900,
    "nested deeper": "[" * 100_000 + "]" * 100_000,
    "object": '{"a": {"b": 1}}',
}
# Values that are as good as the right ones: what a header says of the machine is for its reader.
HARMLESS = {
    ("machine", kind) for kind in ("empty", "other text", "lines", "surrogate", "long text")
}


@pytest.fixture(scope="module")
def decoder(env):
    return codec.Codec(env)


def complaint_about(decoder, blob, tmp_path):
    """The one line that a file is refused with; empty if it is decoded."""
    path = tmp_path / "odd.txt.pgolf"
    path.write_bytes(blob)
    target = tmp_path / "odd.txt"
    try:
        codec.decompress_file(decoder, path, target, force=False)
    except tg.InputError as error:
        assert not target.exists()
        line = str(error)
        assert line.startswith(f"{path}: ")
        assert len(line) < 1000
        assert line.isprintable()
        return line.removeprefix(f"{path}: ")
    assert target.read_bytes() == TEXT.encode()
    target.unlink()
    return ""


@pytest.mark.parametrize("kind", ODD_VALUES)
def test_odd_values_in_a_header(kind, decoder, packed, tmp_path):
    """In every field: refused by one line that names the field."""
    header, _ = header_of(packed)
    for name in header:
        blob = with_field(packed, name, ODD_VALUES[kind])
        complaint = complaint_about(decoder, blob, tmp_path)
        if (name, kind) in HARMLESS or ODD_VALUES[kind] == json.dumps(header[name]):
            assert not complaint
        else:
            assert name in complaint or "unreadable header" in complaint, (name, complaint)


def test_fields_that_are_missing_too_many_or_twice(decoder, packed, tmp_path):
    header, code = header_of(packed)
    text = json.dumps(header)
    for name in header:
        fewer = {key: value for key, value in header.items() if key != name}
        complaint = complaint_about(decoder, signed(json.dumps(fewer).encode(), code), tmp_path)
        assert name in complaint
        again = f"{text[:-1]}, {json.dumps(name)}: {json.dumps(header[name])}}}"
        complaint = complaint_about(decoder, signed(again.encode(), code), tmp_path)
        assert "a field stands there twice" in complaint
    more = json.dumps({**header, "SOME\nTHING": 0}).encode()
    told = r"does not know: SOME\nTHING"
    assert told in complaint_about(decoder, signed(more, code), tmp_path)
    for other in ("[]", "3", "null", "", "{", '{"a":', "\xff", "[" * 100_000):
        complaint = complaint_about(decoder, signed(other.encode("latin-1"), code), tmp_path)
        assert "unreadable header" in complaint


@pytest.mark.parametrize("code", [b"", bytes(30), b"\xff" * 30], ids=["none", "zeros", "ones"])
@pytest.mark.parametrize("count", [10**9, 10**8, 10**5, 0])
def test_a_count_that_the_code_does_not_hold(count, code, decoder, packed, tmp_path):
    """Refused at once, or where the code ends: long before so many tokens are decoded."""
    decoded = []
    header, _ = header_of(packed)
    blob = codec.Packed({**header, "targets": count}, code).to_bytes()
    with pytest.MonkeyPatch.context() as patch:
        real = codec.frequencies
        patch.setattr(codec, "frequencies", lambda log_p: decoded.append(1) or real(log_p))
        complaint = complaint_about(decoder, blob, tmp_path)
    if count in (0, 10**9) or not code:
        assert complaint.startswith(f"its header says targets {count}; {len(code)} bytes of code")
        assert not decoded
    else:
        assert "decoded to another text" in complaint
        assert 0 < len(decoded) < 1000


@pytest.mark.parametrize("times", [8, pytest.param(25, marks=pytest.mark.slow)])
def test_any_changed_byte(times, decoder, packed, tmp_path, rng):
    """Cut, extended, or bytes changed, with a wrong and with the right checksum."""
    header, code = header_of(packed)
    text = json.dumps(header).encode()
    blobs = []
    for _ in range(times):
        at = int(rng.integers(len(packed)))
        byte = bytes([packed[at] ^ int(rng.integers(1, 256))])
        blobs += [changed(packed, at, byte), packed[:at], packed[at:], packed[:at] + byte]
        inside = int(rng.integers(len(code)))
        bits = bytes([code[inside] ^ int(rng.integers(1, 256))])
        blobs.append(signed(text, changed(code, inside, bits)))
        blobs.append(signed(text, code[:inside]))
        blobs.append(signed(text, code + byte))
        place = int(rng.integers(len(text)))
        odd = signed(changed(text, place, byte), code)
        blobs += [odd] if text[place : place + 1] not in b'abcdefghijklmnopqrstuvwxyz "' else []
    for blob in blobs:
        complaint = complaint_about(decoder, blob, tmp_path)
        assert complaint or header_of(blob)[0].keys() == header.keys()


# --- what is there is not overwritten -------------------------------------------------------------


def test_a_file_that_is_there_is_kept_without_force(env, packed, refused, tmp_path):
    speech = tmp_path / "speech.txt"
    small = tmp_path / "speech.txt.pgolf"
    link = tmp_path / "link"
    speech.write_text("mine")
    small.write_bytes(packed)
    link.symlink_to(tmp_path / "nothing")
    (tmp_path / "folder").mkdir()
    taken = "speech.txt: is there already; --force overwrites it"
    refused(taken, "decompress", small)
    refused(taken, "decompress", small, "-o", speech)
    refused("speech.txt.pgolf: is there already; --force", "compress", speech)
    refused("link: is there, and no file", "decompress", small, "-o", link)
    refused("folder: is there, and no file", "decompress", small, "-o", tmp_path / "folder")
    refused(
        "folder: is there, and no file", "compress", speech, "--force", "-o", tmp_path / "folder"
    )
    refused("/dev/null: is there, and no file", "compress", speech, "--force", "-o", "/dev/null")
    assert (speech.read_text(), small.read_bytes()) == ("mine", packed)
    assert codec.main(["decompress", "--force", str(small)], env) == 0
    assert speech.read_bytes() == TEXT.encode()
    small.write_bytes(b"old")
    assert codec.main(["compress", "--force", str(speech)], env) == 0
    assert small.read_bytes() == packed
    link.unlink()
    link.symlink_to(speech)
    speech.write_text("older")
    assert codec.main(["decompress", "--force", str(small), "-o", str(link)], env) == 0
    assert link.is_symlink() and speech.read_bytes() == TEXT.encode()


def test_a_file_written_meanwhile_is_kept(packed, refused, tmp_path, monkeypatch):
    small = tmp_path / "a.pgolf"
    small.write_bytes(packed)
    target = tmp_path / "a"
    real = codec.Codec.decompress

    def slow(self, packed):
        target.write_text("somebody else's")
        return real(self, packed)

    monkeypatch.setattr(codec.Codec, "decompress", slow)
    with pytest.raises(AssertionError):  # a new file: the other one's
        refused("a: is there already", "decompress", small)
    assert target.read_text() == "somebody else's"


def little_room():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))


def test_a_full_disk_leaves_no_half_file(env, packed, tmp_path):
    """The text is written under another name, which goes away."""
    small = tmp_path / "a.pgolf"
    small.write_bytes(packed)
    code, said = forked_tool(env, "decompress", small, first=little_room)
    assert code == 64
    assert "File too large" in said
    assert "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["a.pgolf"]


# --- the artifact alone is enough, and the wait is told -------------------------------------------


def model_artifact(folder, model):
    """A tiny artifact of a SentencePiece tokenizer, with its hash, as a training writes it."""
    cfg = tg.Config(**{**TINY, "vocab_size": 400, "tokenizer_path": str(model)})
    weights = tg.GPT(cfg).state_dict()
    blob = tg.pack(weights, cfg, notes={"tokenizer": tg.sha256(model)})
    (folder / "model.ptz").write_bytes(blob)
    return str(folder / "model.ptz")


def test_the_tokenizer_is_found_by_its_hash(tmp_path, monkeypatch):
    """Other files of its name do not matter."""
    here = tmp_path / "work"
    here.mkdir()
    monkeypatch.chdir(here)
    manifest = here / "data/manifest.json"
    models = manifest.parent / "tokenizers"
    models.mkdir(parents=True)
    (models / "right.model").write_bytes(small_model())
    (models / "wrong.model").write_bytes(b"of the right name")
    names = ["tokenizers/wrong.model", "tokenizers/none.model", "tokenizers/right.model"]
    digest = hashlib.sha256(small_model()).hexdigest()
    entries = [{"name": "x", "model_path": name, "sha256": digest} for name in names]
    entries = [{"name": "bytes", "kind": "byte"}, *entries]
    manifest.write_text(json.dumps({"datasets": [], "tokenizers": entries}))
    artifact = model_artifact(tmp_path, models / "right.model")
    (here / "a.txt").write_text("the tokenizer is found")
    assert codec.main(["compress", "a.txt"], {"ARTIFACT": artifact}) == 0
    assert codec.main(["decompress", "a.txt.pgolf", "-o", "b.txt"], {"ARTIFACT": artifact}) == 0
    assert (here / "b.txt").read_text() == "the tokenizer is found"


@pytest.mark.parametrize("text", ["", "[" * 100_000, '{"tokenizers": [3]}', '{"tokenizers": 1}'])
def test_a_tokenizer_that_is_not_found_is_named(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tg, "SCRIPT", tmp_path / "train_gpt.py")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/manifest.json").write_text(text)
    (tmp_path / "right.model").write_bytes(small_model())
    artifact = model_artifact(tmp_path, tmp_path / "right.model")
    (tmp_path / "a.txt").write_text("x")
    assert codec.main(["compress", "a.txt"], {"ARTIFACT": artifact}) == 64
    told = capsys.readouterr().err
    assert tg.sha256(tmp_path / "right.model") in told
    assert "TOKENIZER_PATH names its file" in told
    given = {"ARTIFACT": artifact, "TOKENIZER_PATH": str(tmp_path / "right.model")}
    assert codec.main(["compress", "a.txt"], given) == 0


def test_the_artifact_alone_is_enough(env, packed, tmp_path):
    """Its settings and its tokenizer, in a process of its own; a DATA_PATH of others is ignored."""
    (tmp_path / "speech.txt").write_bytes(TEXT.encode())
    done = tool({"ARTIFACT": env["ARTIFACT"]}, "compress", tmp_path / "speech.txt")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "speech.txt.pgolf").read_bytes() == packed


def test_progress_is_told(capsys, monkeypatch):
    """A line every ten seconds; on a terminal one that is rewritten, and taken away."""
    clock = FakeClock()
    monkeypatch.setattr(progress.time, "perf_counter", clock)

    def told():
        with progress.Progress("encoding", 100) as shown:
            for done in range(1, 101):
                clock.advance(0.5)
                shown.show(done)
        return capsys.readouterr()

    lines = told()
    assert lines.out == ""
    told_lines = lines.err.splitlines()
    assert told_lines[0] == "encoding: 20 of 100 tokens, about 40 s left"
    assert len(told_lines) == 5
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    on_terminal = told().err
    assert on_terminal.count("\n") == 0
    assert on_terminal.count("\r") == 101
    assert on_terminal.endswith("tokens, about 0 s left\033[K\r\033[K")


@pytest.mark.parametrize("command", ["compress", "decompress"])
def test_both_directions_tell_their_progress(command, env, packed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.0)
    (tmp_path / "a").write_bytes(TEXT.encode())
    (tmp_path / "b.pgolf").write_bytes(packed)
    file = {"compress": "a", "decompress": "b.pgolf"}[command]
    assert codec.main([command, str(tmp_path / file)], env) == 0
    count = len(TEXT.encode())
    assert capsys.readouterr().err.count(f" of {count} tokens") == count


def test_it_computes_on_the_cpu_and_as_it_stands(env):
    """Whatever the machine has: others must decode it. Who wants otherwise says so."""
    cfg = codec.Codec(env).cfg
    assert (cfg.device, cfg.compile) == ("cpu", "0")
    assert codec.Codec({**env, "DEVICE": "auto"}).cfg.device == "auto"


# --- the scorer, and the proof --------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, name",
    [
        (dict(), "sliding"),
        (dict(EVAL_STRIDE="0"), "plain"),
        (dict(NGRAM="backoff", EVAL_PLAIN="0"), "sliding"),
        (dict(TTT_EPOCHS="1", TTT_BEFORE_SCORING="1"), "sliding"),
        (dict(NGRAM="fixed", EVAL_STREAM="16"), "streaming"),
        (dict(NGRAM="fixed", TTT_EPOCHS="1"), "ttt"),
        (dict(TTT_EPOCHS="1", TTT_BEFORE_SCORING="1", TILT="1"), "sliding"),
        (dict(NGRAM="mix", EVAL_STREAM="16"), "mixed"),
    ],
)
def test_the_last_true_stage_is_chosen(settings, name, env):
    scorer = codec.Codec({**env, **settings}).scorer()
    assert scorer.name == name
    assert scorer.validity == "valid"


MIXED = dict(EVAL_STREAM="16", TILT="1", NGRAM="mix", MIX_CHUNK_TOKENS="64", TTT_CHUNK_TOKENS="64")


ADAPTED = dict(TTT_LORA_RANK="2", TTT_LORA_CHUNK="8", TTT_LORA_EARLY_CHUNKS="3:6", TTT_DOCS="2")
ADAPTED |= dict(TTT_LORA_ON="q,v,attn,mlp,head", TTT_GLOBAL_DOCS="3", TTT_GLOBAL_LR="0.05")
ADAPTED |= dict(TILT_BOOST="2", TILT_ORDER="3")


@pytest.mark.parametrize(
    "settings, name", [(dict(), "sliding"), (MIXED, "mixed"), (ADAPTED, "mixed")]
)
def test_verify(settings, name, env, capsys):
    """Over all document starts, the ends of chunks, and a last document that is cut.

    The empty document is none.
    """
    arguments = ["verify", "--documents", "9", "--tokens", "194"]
    assert codec.main(arguments, clean_env(**env, **settings)) == 0
    out = capsys.readouterr().out
    assert f"{name}: 6 documents, 194 tokens" in out
    assert ": ok" in out
    assert "identical" in out


def test_verify_finds_a_wrong_claim(env, monkeypatch, capsys):
    claim = codec.Codec.claimed_bits

    def half(self, tokens):
        return 0.5 * claim(self, tokens)

    monkeypatch.setattr(codec.Codec, "claimed_bits", half)
    assert codec.main(["verify", "--tokens", "60"], clean_env(**env)) == 1
    out = capsys.readouterr().out
    assert "TOO LONG" in out
    assert "identical" in out


def test_verify_finds_a_wrong_code(env, other_frequencies, capsys):
    """The encoder here has other frequencies than the decoder in its process, and as many bits."""
    assert codec.main(["verify", "--tokens", "60"], clean_env(**env)) == 1
    out = capsys.readouterr().out
    assert ": ok" in out
    assert "DIFFERENT" in out
