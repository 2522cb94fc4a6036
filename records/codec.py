"""A real compressor out of any true score.

What a scorer claims in bits, an arithmetic coder writes in bits.

    export ARTIFACT=logs/run/model.ptz
    python records/codec.py compress speech.txt                         # -> speech.txt.pgolf
    python records/codec.py decompress speech.txt.pgolf -o copy.txt
    DATA_PATH=... python records/codec.py verify                        # the proof

Settings are the artifact's, unless the environment has others, as for train_gpt.py: EVAL_STREAM,
TTT_*, TILT, NGRAM=mix choose the scorer (the last true stage that a run with them would score). The
tokenizer is found by its hash through data/manifest.json; TOKENIZER_PATH names it otherwise. The
artifact is not part of the compressed file; its hash is. No file that is there is overwritten
without --force.

`verify` compresses documents of the validation set, decompresses them in a fresh process, compares
the text byte for byte and the size with the bits that the harness of train_gpt.py charges for the
same tokens. Encoder and decoder run the same loop, `token_by_token`: one thread, the same shapes,
whole frequencies. They agree on machines that compute alike, not across CPU models or
versions of torch; the header says what made a file.
"""

from __future__ import annotations

import argparse
import bz2
import dataclasses
import hashlib
import json
import lzma
import math
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from tool.arguments import Parser, positive
from tool.arithmetic import Decoder, Encoder, OtherCode, frequencies, most_symbols
from tool.progress import Progress
from tool.spelling import documents_of, tokens_of

import train_gpt as tg

MAGIC = b"PGOLFTXT"  # a file begins with it
# What a header has beyond what must be the same for the decoder, and its type in JSON.
OWN_FIELDS = {"machine": str, "targets": int, "first": int, "text_sha256": str}
NAMED = 5  # fields that a complaint names at most


def shown(value: Any, most: int = 60) -> str:
    """A header's value as one would type it, fit to be printed."""
    return tg.printable(tg.as_typed(value), most)


# --- one token at a time --------------------------------------------------------------------------


def encode(scorer: tg.Scorer, tokens: np.ndarray, cfg: tg.Config, rt: tg.Runtime) -> bytes:
    """All tokens but the first."""
    coder = Encoder()
    written = np.zeros(len(tokens), np.uint16)
    written[0] = tokens[0]
    with Progress("encoding", len(tokens) - 1) as progress:
        for number, p in enumerate(tg.token_by_token(scorer, written, cfg, rt), 1):
            coder.encode(frequencies(p.log()), int(tokens[number]))
            written[number] = tokens[number]
            progress.show(number)
    return coder.finish()


def decode(
    scorer: tg.Scorer, data: bytes, count: int, first: int, cfg: tg.Config, rt: tg.Runtime
) -> np.ndarray:
    """The tokens of encode, of which there are `count` after the first.

    OtherCode if the code is too short or too long for them: as soon as it has ended.
    """
    coder = Decoder(data)
    tokens = np.zeros(count + 1, np.uint16)
    tokens[0] = first
    with Progress("decoding", count) as progress:
        for number, p in enumerate(tg.token_by_token(scorer, tokens, cfg, rt), 1):
            tokens[number] = coder.decode(frequencies(p.log()))
            progress.show(number)
    coder.finish()
    return tokens


# --- files ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Packed:
    """A compressed text: what must be known to decode it, and the code.

    As bytes: magic, length of the header (4), header (JSON), SHA-256 of header and code, code.
    """

    header: dict[str, Any]
    code: bytes

    @property
    def bits(self) -> int:
        """Of the code alone."""
        return 8 * len(self.code)

    def to_bytes(self) -> bytes:
        header = json.dumps(self.header).encode()
        digest = hashlib.sha256(header + self.code).digest()
        return MAGIC + struct.pack("<I", len(header)) + header + digest + self.code

    @staticmethod
    def from_bytes(blob: bytes) -> Packed:
        """InputError if it is none, or damaged."""
        start = blob[: len(MAGIC)]
        tg.check(start == MAGIC, f"not a compressed text: begins with {start!r}, not {MAGIC!r}")
        rest = blob[len(MAGIC) :]
        with tg.input_error_from("unreadable header", struct.error):
            (size,) = struct.unpack_from("<I", rest)
        header = header_from(rest[4 : 4 + size])
        digest = rest[4 + size : 36 + size]
        code = rest[36 + size :]
        whole = hashlib.sha256(rest[4 : 4 + size] + code).digest() == digest
        tg.check(whole, "wrong checksum, it is damaged")
        check_fields(header)
        return Packed(header, code)


def header_from(text: bytes) -> dict[str, Any]:
    """A header from its JSON; InputError if it is no object, or names a field twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        tg.check(len(found) == len(pairs), "a field stands there twice")
        return found

    with tg.input_error_from("unreadable header", ValueError, RecursionError):
        header = json.loads(text, object_pairs_hook=unique)
    tg.check(isinstance(header, dict), "unreadable header (no object)")
    return header


def check_fields(header: dict[str, Any]) -> None:
    """InputError unless the fields that every header has are there, and can be what they say."""
    for name, kind in OWN_FIELDS.items():
        tg.check(name in header, f"its header has no field {name}")
        value = header[name]
        expected = f"its header says {name} {shown(value)}, expected"
        tg.check(type(value) is kind, f"{expected} {'a number' if kind is int else 'text'}")
        if kind is int:
            tg.check(value >= 0, f"{expected} 0 or more")
    digest = header["text_sha256"]
    tg.check(
        re.fullmatch("[0-9a-f]{64}", digest),
        f"its header says text_sha256 {shown(digest)}, expected 64 hexadecimal digits",
    )


def true_scorer(cfg: tg.Config, blob: bytes, rt: tg.Runtime, table: tg.ByteTable) -> tg.Scorer:
    """A fresh one: the last true stage of a run with these settings."""
    for stage in reversed(tg.stages_of(cfg)):
        model = tg.load_artifact(cfg, blob, rt)
        scorer = stage.build(model, rt, cfg, table)
        if scorer.validity == "valid":
            return scorer
    raise tg.InputError(
        "these settings score nothing that is a true score: no code can be made of it"
    )


class Codec:
    """Artifact and scorer that the settings name, and the artifact's tokenizer."""

    def __init__(self, env: Mapping[str, str]):
        torch.set_num_threads(1)  # sums must not depend on the machine's load
        env = {"COMPILE": "0", "DEVICE": "cpu", **env, "MODE": "eval"}
        cfg = tg.load_config(env)
        self.blob = tg.read_artifact(cfg)
        self.cfg = tg.settings_of_artifact(cfg, env, self.blob)
        self.rt = tg.Runtime(self.cfg, {})
        self.table = tg.ByteTable.named(self.cfg)  # whatever made the shards of DATA_PATH

    def scorer(self) -> tg.Scorer:
        """A fresh one: the last true stage of a run with these settings."""
        return true_scorer(self.cfg, self.blob, self.rt, self.table)

    def text(self, tokens: np.ndarray) -> bytes:
        return documents_of(tokens, self.table, self.cfg.bos_id)

    def identity(self) -> dict[str, Any]:
        """What must be the same for the decoder."""
        told = {
            "artifact_sha256": hashlib.sha256(self.blob).hexdigest(),
            "tokenizer": tg.tokenizer_hash(self.cfg),
            "torch": torch.__version__,
            "SEED": self.cfg.seed,
        }
        scoring = self.cfg.group("score")
        del scoring["max_eval_seconds"]  # nobody's clock runs here
        told |= {name.upper(): value for name, value in scoring.items()}
        return json.loads(json.dumps(told))

    def compress(self, tokens: np.ndarray) -> Packed:
        """Document starts and tokens -> what decompresses to their text."""
        header = {
            **self.identity(),
            "machine": self.rt.device_name(),
            "targets": len(tokens) - 1,
            "first": int(tokens[0]),
            "text_sha256": hashlib.sha256(self.text(tokens)).hexdigest(),
        }
        return Packed(header, encode(self.scorer(), tokens, self.cfg, self.rt))

    def decompress(self, packed: Packed) -> bytes:
        """The text, checked."""
        header = packed.header
        self.refuse_other_identity(header)
        count = header["targets"]
        first = header["first"]
        vocab = self.cfg.vocab_size
        tg.check(first < vocab, f"its header says first {shown(first)}; there are {vocab} tokens")
        most = most_symbols(len(packed.code), vocab)
        tg.check(
            0 < count <= most,
            f"its header says targets {shown(count)}; {len(packed.code)} bytes of code hold 1 to "
            f"{most} tokens",
        )
        try:
            tokens = decode(self.scorer(), packed.code, count, first, self.cfg, self.rt)
            text = self.text(tokens)
            same = hashlib.sha256(text).hexdigest() == header["text_sha256"]
        except OtherCode:
            same = False
        except MemoryError:
            raise tg.InputError(f"too little memory for {count} tokens") from None
        tg.check(
            same,
            "decoded to another text: this machine "
            f"({self.rt.device_name()}) computes other probabilities than the one that compressed "
            f"it ({shown(header['machine'])})",
        )
        return text

    def refuse_other_identity(self, header: dict[str, Any]) -> None:
        """InputError unless all that must be the same for the decoder is, and is all there is."""
        identity = self.identity()
        told = []
        for name, here in identity.items():
            if name not in header:
                told.append(f"{name}: none; here it is {tg.as_typed(here)}")
            elif (type(header[name]), header[name]) != (type(here), here):
                told.append(f"{name}: {shown(header[name])}; here it is {tg.as_typed(here)}")
        more = f" and {len(told) - NAMED} more" if len(told) > NAMED else ""
        tg.check(not told, f"compressed with another {', another '.join(told[:NAMED])}{more}")
        unknown = [shown(name) for name in header.keys() - identity.keys() - OWN_FIELDS.keys()]
        tg.check(
            not unknown,
            f"its header has what this version does not know: {', '.join(sorted(unknown)[:NAMED])}",
        )

    def claimed_bits(self, tokens: np.ndarray) -> float:
        """What the harness charges for the same tokens."""
        run_log = tg.RunLog(Path(os.devnull), self.rt, silent=True)
        cfg = dataclasses.replace(self.cfg, max_eval_seconds=0.0)
        score = tg.evaluate(self.scorer(), tokens, self.table, cfg, self.rt, run_log)
        return float(score.nats.sum(dtype=np.float64) / math.log(2))


def others(text: bytes) -> str:
    """How many bytes well-known compressors make of a text."""
    zstd = len(zstandard.ZstdCompressor(level=22).compress(text))
    xz = len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
    bzip2 = len(bz2.compress(text, 9))
    return f"zstd -22 {zstd}, xz -9e {xz}, bzip2 -9 {bzip2} bytes"


def compress_file(codec: Codec, source: Path, target: Path, force: bool) -> None:
    """Compresses a text file, and says how well."""
    begun = time.perf_counter()
    text = source.read_bytes()
    try:
        tokens = np.array([codec.cfg.bos_id, *tokens_of(text.decode(), codec.table)])
    except UnicodeDecodeError as error:
        raise tg.InputError(f"{source}: not UTF-8 text ({error})") from None
    tg.check(len(tokens) > 1, f"{source}: empty")
    tg.check(
        codec.text(tokens) == text,
        f"{source}: the tokenizer {codec.table.name} cannot spell this text",
    )
    packed = codec.compress(tokens)
    blob = packed.to_bytes()
    write(target, blob, force)
    seconds = time.perf_counter() - begun
    print(
        f"{source}: {len(text)} bytes, {len(tokens) - 1} tokens -> {len(packed.code)} bytes of "
        f"code ({packed.bits / len(text):.4f} bits per byte), {len(blob)} with the header, "
        f"{seconds:.1f} s\nfor comparison: {others(text)}"
    )


def sampled_documents(codec: Codec, count: int, limit: int) -> np.ndarray:
    """Tokens of so many validation documents, spread over the set; at most `limit` targets."""
    bos = codec.cfg.bos_id
    tg.ByteTable.load(codec.cfg)  # which says if another tokenizer made them
    stream = tg.load_validation(codec.cfg)
    starts = np.flatnonzero(stream == bos)
    documents = [part for part in np.split(stream, starts)[1:] if len(part) > 1]
    tg.check(
        documents,
        f"{codec.cfg.data_path}: no document starts with BOS_ID={bos} in the validation tokens",
    )
    chosen = np.unique(np.linspace(0, len(documents) - 1, count).astype(int))
    return np.concatenate([documents[number] for number in chosen])[: limit + 1]


def decoded_elsewhere(blob: bytes, env: Mapping[str, str]) -> bytes | None:
    """The text that a fresh process makes of a compressed one; None if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder) / "text.pgolf"
        plain = Path(folder) / "text"
        packed.write_bytes(blob)
        command = [sys.executable, __file__, "decompress", str(packed), "-o", str(plain)]
        done = subprocess.run(command, env=env, check=False, stdout=subprocess.DEVNULL)
        return plain.read_bytes() if done.returncode == 0 else None


def verify(codec: Codec, env: Mapping[str, str], documents: int, limit: int) -> bool:
    """Compresses sampled validation documents, decompresses them in a fresh process.

    Returns whether all is as claimed.
    """
    tokens = sampled_documents(codec, documents, limit)
    text = codec.text(tokens)
    packed = codec.compress(tokens)
    coded = packed.bits
    claimed = codec.claimed_bits(tokens)
    same = decoded_elsewhere(packed.to_bytes(), env) == text
    fits = coded <= claimed * 1.001 + 64
    count = (tokens == codec.cfg.bos_id).sum()
    print(
        f"{codec.scorer().name}: {count} documents, {len(tokens) - 1} tokens, {len(text)} bytes\n"
        f"claimed {claimed:.1f} bits, coded {coded} bits ({100 * (coded / claimed - 1):+.3f} %): "
        f"{'ok' if fits else 'TOO LONG'}\n"
        f"decoded in a fresh process: {'identical' if same else 'DIFFERENT'}\n"
        f"for comparison: {others(text)}, this one {coded // 8} bytes"
    )
    return fits and same


def parser() -> Parser:
    top = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)
    for name in ("compress", "decompress"):
        command = commands.add_parser(name)
        command.add_argument("file", type=Path)
        command.add_argument("-o", "--output", type=Path)
        command.add_argument("--force", action="store_true", help="overwrite a file that is there")
    command = commands.add_parser("verify")
    command.add_argument("--documents", type=positive, default=4)
    command.add_argument("--tokens", type=positive, default=2000, help="at most so many")
    return top


def target_of(options: argparse.Namespace) -> Path:
    """Where the result goes; InputError if that is not known, or not free."""
    target = options.output
    if target is None and options.command == "compress":
        target = options.file.with_name(f"{options.file.name}.pgolf")
    if target is None:
        named = options.file.suffix == ".pgolf"
        tg.check(named, f"{options.file}: no .pgolf to take off; name -o")
        target = options.file.with_suffix("")
    refuse_taken(target, options.force)
    return target


def refuse_taken(target: Path, force: bool) -> None:
    """InputError if a file is there, unless it may be overwritten; always if it is no file."""
    if os.path.lexists(target):
        tg.check(target.is_file(), f"{target}: is there, and no file; name another with -o")
        tg.check(force, f"{target}: is there already; --force overwrites it, -o names another")


def write(target: Path, data: bytes, force: bool) -> None:
    """Writes the whole file or nothing; InputError if somebody has written it meanwhile."""
    refuse_taken(target, force)
    tg.atomic_write(target.resolve(), data)


def decompress_file(codec: Codec, source: Path, target: Path, force: bool) -> None:
    """Writes the text that a file holds; InputError with its name."""
    try:
        text = codec.decompress(Packed.from_bytes(source.read_bytes()))
    except tg.InputError as error:
        raise tg.InputError(f"{source}: {error}") from None
    write(target, text, force)


def run(options: argparse.Namespace, env: Mapping[str, str]) -> bool:
    """What the command line asks for; False if a proof fails."""
    if options.command == "verify":
        return verify(Codec(env), env, options.documents, options.tokens)
    target = target_of(options)
    job = compress_file if options.command == "compress" else decompress_file
    job(Codec(env), options.file, target, options.force)
    return True


def main(arguments: Sequence[str], env: Mapping[str, str]) -> int:
    try:
        return 0 if run(parser().parse_args(arguments), env) else 1
    except (tg.InputError, OSError) as error:
        print(error, file=sys.stderr)
        return tg.BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return tg.INTERRUPTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], dict(os.environ)))
