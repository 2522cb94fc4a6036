"""A real compressor out of any true score.

What a scorer claims in bits, an arithmetic coder writes in bits.

    export ARTIFACT=logs/run/model.ptz TOKENIZER_PATH=... DATA_PATH=...
    python records/codec.py compress speech.txt                         # -> speech.txt.pgolf
    python records/codec.py decompress speech.txt.pgolf -o copy.txt
    python records/codec.py verify                                      # the proof

Settings are those of train_gpt.py, from the environment: EVAL_STREAM, TTT_*, TILT, NGRAM=mix choose
the scorer (the last true stage that a run with them would score). The artifact is not part of
the compressed file; its hash is.

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
from tool.arithmetic import Decoder, Encoder, frequencies
from tool.spelling import documents_of, tokens_of

import train_gpt as tg

MAGIC = b"PGOLFTXT"  # a file begins with it


# --- one token at a time --------------------------------------------------------------------------


def encode(scorer: tg.Scorer, tokens: np.ndarray, cfg: tg.Config, rt: tg.Runtime) -> bytes:
    """All tokens but the first."""
    coder = Encoder()
    written = np.zeros(len(tokens), np.uint16)
    written[0] = tokens[0]
    for number, p in enumerate(tg.token_by_token(scorer, written, cfg, rt), 1):
        coder.encode(frequencies(p.log()), int(tokens[number]))
        written[number] = tokens[number]
    return coder.finish()


def decode(
    scorer: tg.Scorer, data: bytes, count: int, first: int, cfg: tg.Config, rt: tg.Runtime
) -> np.ndarray:
    """The tokens of encode, of which there are `count` after the first."""
    coder = Decoder(data)
    tokens = np.zeros(count + 1, np.uint16)
    tokens[0] = first
    for number, p in enumerate(tg.token_by_token(scorer, tokens, cfg, rt), 1):
        tokens[number] = coder.decode(frequencies(p.log()))
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
        tg.check(start == MAGIC, f"not a compressed text: begins with {start!r}")
        rest = blob[len(MAGIC) :]
        try:
            (size,) = struct.unpack_from("<I", rest)
            text = rest[4 : 4 + size]
            header = json.loads(text)
        except (ValueError, RecursionError, struct.error) as error:
            raise tg.InputError(f"compressed text: unreadable header ({error})") from None
        digest = rest[4 + size : 36 + size]
        code = rest[36 + size :]
        whole = hashlib.sha256(text + code).digest() == digest
        tg.check(whole, "compressed text: wrong checksum, it is damaged")
        return Packed(header, code)


class Codec:
    """Artifact, tokenizer and scorer that the settings name."""

    def __init__(self, env: Mapping[str, str]):
        torch.set_num_threads(1)  # sums must not depend on the machine's load
        cfg = tg.load_config({"COMPILE": "0", "DEVICE": "cpu", **env, "MODE": "eval"})
        self.cfg = tg.settings_of_artifact(cfg, {**env, "MODE": "eval"})
        self.rt = tg.Runtime(self.cfg, {})
        self.table = tg.ByteTable.load(self.cfg)
        self.blob = tg.read_artifact(self.cfg)

    def scorer(self) -> tg.Scorer:
        """A fresh one: the last true stage of a run with these settings."""
        for stage in reversed(tg.STAGES.values()):
            if stage.enabled(self.cfg):
                model = tg.load_artifact(self.cfg, self.blob, self.rt)
                scorer = stage.build(model, self.rt, self.cfg, self.table)
                if scorer.validity == "valid":
                    return scorer
        raise tg.InputError(
            "these settings score nothing that is a true score: no code can be made of it"
        )

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
        for name, value in self.cfg.group("score").items():
            told[name.upper()] = value
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
        told = [
            f"{name}: {tg.as_typed(header.get(name))}; here it is {tg.as_typed(here)}"
            for name, here in self.identity().items()
            if header.get(name) != here
        ]
        tg.check(not told, f"compressed with another {', another '.join(told)}")
        count = header["targets"]
        tokens = decode(self.scorer(), packed.code, count, header["first"], self.cfg, self.rt)
        text = self.text(tokens)
        tg.check(
            hashlib.sha256(text).hexdigest() == header["text_sha256"],
            "decoded to another text: this machine "
            f"({self.rt.device_name()}) computes other probabilities than the one that compressed "
            f"it ({header['machine']})",
        )
        return text

    def claimed_bits(self, tokens: np.ndarray) -> float:
        """What the harness charges for the same tokens."""
        with tempfile.TemporaryDirectory() as folder:
            run_log = tg.RunLog(Path(folder), self.rt, silent=True)
            cfg = dataclasses.replace(self.cfg, max_eval_seconds=0.0)
            score = tg.evaluate(self.scorer(), tokens, self.table, cfg, self.rt, run_log)
        return float(score.nats.sum(dtype=np.float64) / math.log(2))


def others(text: bytes) -> str:
    """How many bytes well-known compressors make of a text."""
    zstd = len(zstandard.ZstdCompressor(level=22).compress(text))
    xz = len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
    bzip2 = len(bz2.compress(text, 9))
    return f"zstd -22 {zstd}, xz -9e {xz}, bzip2 -9 {bzip2} bytes"


def compress_file(codec: Codec, source: Path, target: Path) -> None:
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
    tg.atomic_write(target, blob)
    seconds = time.perf_counter() - begun
    print(
        f"{source}: {len(text)} bytes, {len(tokens) - 1} tokens -> {len(packed.code)} bytes of "
        f"code ({packed.bits / len(text):.4f} bits per byte), {len(blob)} with the header, "
        f"{seconds:.1f} s\nfor comparison: {others(text)}"
    )


def sampled_documents(codec: Codec, count: int, limit: int) -> np.ndarray:
    """Tokens of so many validation documents, spread over the set; at most `limit` targets."""
    tg.check(count > 0 and limit > 0, "--documents and --tokens: expected 1 or more")
    bos = codec.cfg.bos_id
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


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="command", required=True)
    for name in ("compress", "decompress"):
        command = commands.add_parser(name)
        command.add_argument("file", type=Path)
        command.add_argument("-o", "--output", type=Path)
    command = commands.add_parser("verify")
    command.add_argument("--documents", type=int, default=4)
    command.add_argument("--tokens", type=int, default=2000, help="at most so many")
    return top


def run(options: argparse.Namespace, env: Mapping[str, str]) -> bool:
    """What the command line asks for; False if a proof fails."""
    codec = Codec(env)
    if options.command == "verify":
        return verify(codec, env, options.documents, options.tokens)
    if options.command == "compress":
        beside = options.file.with_name(f"{options.file.name}.pgolf")
        compress_file(codec, options.file, options.output or beside)
        return True
    tg.check(
        options.output or options.file.suffix == ".pgolf",
        f"{options.file}: no .pgolf to take off; name -o",
    )
    packed = Packed.from_bytes(options.file.read_bytes())
    tg.atomic_write(options.output or options.file.with_suffix(""), codec.decompress(packed))
    return True


def main(arguments: Sequence[str], env: Mapping[str, str]) -> int:
    options = parser().parse_args(arguments)
    try:
        return 0 if run(options, env) else 1
    except (tg.InputError, OSError) as error:
        print(error, file=sys.stderr)
        return tg.BAD_INPUT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], dict(os.environ)))
