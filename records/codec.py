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
import re
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as tg

# Of a file; bits of the coder's interval; sum of frequencies.
MAGIC, PRECISION, SCALE = b"PGOLFTXT", 62, 1 << 30


# --- arithmetic coding: intervals of whole numbers (Witten, Neal and Cleary 1987) -----------------


def frequencies(log_p: torch.Tensor) -> np.ndarray:
    """Cumulative whole frequencies of a distribution, [V + 1]; every token has at least 1."""
    p = np.exp(log_p.numpy().astype(np.float64))
    tg.check(
        abs(p.sum() - 1) < 1e-6, f"the probabilities sum to {p.sum()}: no code can be made of them"
    )
    return np.concatenate(([0], np.cumsum(np.floor(p * SCALE).astype(np.int64) + 1)))


class Encoder:
    """Symbols with their intervals -> bits."""

    def __init__(self) -> None:
        self.low, self.high, self.pending, self.bits = 0, (1 << PRECISION) - 1, 0, bytearray()

    def _emit(self, bit: int) -> None:
        self.bits += bytes([bit]) + bytes([1 - bit]) * self.pending
        self.pending = 0

    def encode(self, cumulative: np.ndarray, symbol: int) -> None:
        below = int(cumulative[symbol])
        upto = int(cumulative[symbol + 1])
        total = int(cumulative[-1])
        width, half, quarter = self.high - self.low + 1, 1 << PRECISION - 1, 1 << PRECISION - 2
        self.high = self.low + width * upto // total - 1
        self.low = self.low + width * below // total
        while True:
            if self.high < half or self.low >= half:  # the first bit is settled
                self._emit(int(self.low >= half))
            elif self.low >= quarter and self.high < 3 * quarter:
                self.pending += 1  # only that the second is its opposite
                self.low, self.high = self.low - quarter, self.high - quarter
            else:
                return
            self.low, self.high = 2 * self.low % (2 * half), 2 * self.high % (2 * half) + 1

    def finish(self) -> bytes:
        self.pending += 1  # two bits name a point inside the interval
        self._emit(int(self.low >= 1 << PRECISION - 2))
        return np.packbits(np.frombuffer(bytes(self.bits), np.uint8)).tobytes()


class Decoder:
    """Bits -> symbols, given the same intervals."""

    def __init__(self, data: bytes):
        self.bits = iter(np.unpackbits(np.frombuffer(data, np.uint8)).tolist())
        self.low, self.high, self.value = 0, (1 << PRECISION) - 1, 0
        for _ in range(PRECISION):
            self.value = 2 * self.value + next(self.bits, 0)

    def decode(self, cumulative: np.ndarray) -> int:
        total, width = int(cumulative[-1]), self.high - self.low + 1
        point = ((self.value - self.low + 1) * total - 1) // width
        symbol = int(np.searchsorted(cumulative, point, side="right")) - 1
        below, upto = int(cumulative[symbol]), int(cumulative[symbol + 1])
        half, quarter = 1 << PRECISION - 1, 1 << PRECISION - 2
        self.high = self.low + width * upto // total - 1
        self.low = self.low + width * below // total
        while True:
            if self.high < half or self.low >= half:
                pass
            elif self.low >= quarter and self.high < 3 * quarter:
                self.low -= quarter
                self.high -= quarter
                self.value -= quarter
            else:
                return symbol
            self.low, self.high = 2 * self.low % (2 * half), 2 * self.high % (2 * half) + 1
            self.value = (2 * self.value + next(self.bits, 0)) % (2 * half)


# --- text and tokens ------------------------------------------------------------------------------


def kept_as_is(table: tg.ByteTable, character: str) -> bool:
    """Whether the tokenizer neither changes a character nor spells it in byte pieces."""
    sp, text = table.processor, f"a{character}a"
    return sp.decode(sp.encode(text)) == text and not any(
        sp.is_byte(t) or sp.is_unknown(t) for t in sp.encode(text)
    )


def tokens_of(text: str, table: tg.ByteTable) -> list[int]:
    """Tokens from which `text_of` gives exactly this text.

    What the tokenizer would change goes in as byte pieces.
    """
    if not table.processor:
        return table.encode(text)
    pieces = [table.processor.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
    tokens = []
    at = 0
    lost = "".join(c for c in sorted(set(text)) if c == " " or not kept_as_is(table, c))
    word = f"[^ {re.escape(lost)}]+"
    for words in re.finditer(f"{word}(?: {word})*", text):
        tokens += [
            pieces[byte] for byte in text[at : words.start()].encode()
        ] + table.processor.encode(words[0])
        at = words.end()
    tokens += [pieces[byte] for byte in text[at:].encode()]
    return (
        tokens
        if text_of(tokens, table) == text.encode()
        else [pieces[byte] for byte in text.encode()]
    )


def text_of(tokens: list[int], table: tg.ByteTable) -> bytes:
    """The bytes of tokens, as many as the table counts.

    A word mark is no space at the start or after a control token. If the tokenizer begins every
    text with a mark, neither is one after a byte piece, where `tokens_of` begins anew.
    """
    if not table.processor:
        return table.decode(tokens)
    sp, parts, bare = table.processor, [], True
    begins = sp.id_to_piece(sp.encode("a")[0]).startswith("\u2581")
    for token in map(int, tokens):
        piece, byte = sp.id_to_piece(token), sp.is_byte(token)
        if byte:
            parts.append(bytes([int(piece[3:5], 16)]))
        elif not table.boundary[token]:
            parts.append(
                (piece.removeprefix("\u2581") if bare else piece).replace("\u2581", " ").encode()
            )
        bare = table.boundary[token] or byte and begins
    return b"".join(parts)


def documents_of(tokens: np.ndarray, table: tg.ByteTable, bos: int) -> bytes:
    """Text of tokens that begin with a document start.

    Documents end in a newline, but for the last.
    """
    parts = np.split(tokens, np.flatnonzero(tokens == bos))[1:]
    return b"\n".join(text_of(part[1:], table) for part in parts)


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


class Codec:
    """Artifact, tokenizer and scorer that the settings name."""

    def __init__(self, env: dict[str, str]):
        torch.set_num_threads(1)  # sums must not depend on the machine's load
        cfg = tg.load_config({"COMPILE": "0", "DEVICE": "cpu", **env, "MODE": "eval"})
        self.cfg = tg.settings_of_artifact(cfg, {**env, "MODE": "eval"})
        self.rt, self.table = tg.Runtime(self.cfg, {}), tg.ByteTable.load(self.cfg)
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
        settings = {name.upper(): value for name, value in self.cfg.group("score").items()}
        return json.loads(
            json.dumps(
                dict(
                    artifact_sha256=hashlib.sha256(self.blob).hexdigest(),
                    tokenizer=tg.tokenizer_hash(self.cfg),
                    torch=torch.__version__,
                    SEED=self.cfg.seed,
                    **settings,
                )
            )
        )

    def compress(self, tokens: np.ndarray) -> bytes:
        header = json.dumps(
            {
                **self.identity(),
                "machine": self.rt.device_name(),
                "targets": len(tokens) - 1,
                "first": int(tokens[0]),
                "text_sha256": hashlib.sha256(self.text(tokens)).hexdigest(),
            }
        ).encode()
        data = encode(self.scorer(), tokens, self.cfg, self.rt)
        return (
            MAGIC
            + struct.pack("<I", len(header))
            + header
            + hashlib.sha256(header + data).digest()
            + data
        )

    def decompress(self, blob: bytes) -> bytes:
        """The text, checked."""
        tg.check(
            blob[: len(MAGIC)] == MAGIC,
            f"not a compressed text: begins with {blob[: len(MAGIC)]!r}",
        )
        try:
            (size,) = struct.unpack_from("<I", blob, len(MAGIC))
            at = len(MAGIC) + 4 + size
            header = json.loads(blob[len(MAGIC) + 4 : at])
            digest = blob[at : at + 32]
            data = blob[at + 32 :]
        except (ValueError, RecursionError, struct.error) as error:
            raise tg.InputError(f"compressed text: unreadable header ({error})") from None
        tg.check(
            hashlib.sha256(blob[len(MAGIC) + 4 : at] + data).digest() == digest,
            "compressed text: wrong checksum, it is damaged",
        )
        told = [
            f"{name}: {tg.as_typed(header.get(name))}; here it is {tg.as_typed(here)}"
            for name, here in self.identity().items()
            if header.get(name) != here
        ]
        tg.check(not told, f"compressed with another {', another '.join(told)}")
        text = self.text(
            decode(self.scorer(), data, header["targets"], header["first"], self.cfg, self.rt)
        )
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

    def payload_bits(self, blob: bytes) -> int:
        (size,) = struct.unpack_from("<I", blob, len(MAGIC))
        return 8 * (len(blob) - len(MAGIC) - 4 - size - 32)


def others(text: bytes) -> str:
    return (
        f"zstd -22 {len(zstandard.ZstdCompressor(level=22).compress(text))}, xz -9e "
        f"{len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))}, bzip2 -9 "
        f"{len(bz2.compress(text, 9))} bytes"
    )


def compress_file(codec: Codec, source: Path, target: Path) -> None:
    text, begun = source.read_bytes(), time.perf_counter()
    try:
        tokens = np.array([codec.cfg.bos_id, *tokens_of(text.decode(), codec.table)])
    except UnicodeDecodeError as error:
        raise tg.InputError(f"{source}: not UTF-8 text ({error})") from None
    tg.check(len(tokens) > 1, f"{source}: empty")
    tg.check(
        codec.text(tokens) == text,
        f"{source}: the tokenizer {codec.table.name} cannot spell this text",
    )
    blob = codec.compress(tokens)
    tg.atomic_write(target, blob)
    bits = codec.payload_bits(blob)
    print(
        f"{source}: {len(text)} bytes, {len(tokens) - 1} tokens -> {bits // 8} bytes of code "
        f"({bits / len(text):.4f} bits per byte), {len(blob)} with the header, "
        f"{time.perf_counter() - begun:.1f} s\nfor comparison: {others(text)}"
    )


def verify(codec: Codec, env: dict[str, str], documents: int, limit: int) -> bool:
    """Compresses sampled validation documents, decompresses them in a fresh process.

    Returns whether all is as claimed.
    """
    tg.check(documents > 0 and limit > 0, "--documents and --tokens: expected 1 or more")
    stream, bos = tg.load_validation(codec.cfg), codec.cfg.bos_id
    every = [
        part
        for part in np.split(stream, np.flatnonzero(stream == bos))
        if len(part) > 1 and part[0] == bos
    ]
    tg.check(
        every,
        f"{codec.cfg.data_path}: no document starts with BOS_ID={bos} in the validation tokens",
    )
    chosen = [every[i] for i in np.unique(np.linspace(0, len(every) - 1, documents).astype(int))]
    tokens = np.concatenate(chosen)[: limit + 1]
    text, blob = codec.text(tokens), codec.compress(tokens)
    coded, claimed = codec.payload_bits(blob), codec.claimed_bits(tokens)
    with tempfile.TemporaryDirectory() as folder:
        packed, plain = Path(folder) / "text.pgolf", Path(folder) / "text"
        packed.write_bytes(blob)
        done = subprocess.run(
            [sys.executable, __file__, "decompress", str(packed), "-o", str(plain)],
            env=env,
            check=False,
            stdout=subprocess.DEVNULL,
        )
        same = done.returncode == 0 and plain.read_bytes() == text
    fits, name = coded <= claimed * 1.001 + 64, codec.scorer().name
    print(
        f"{name}: {(tokens == bos).sum()} documents, {len(tokens) - 1} tokens, {len(text)} bytes\n"
        f"claimed {claimed:.1f} bits, coded {coded} bits ({100 * (coded / claimed - 1):+.3f} %): "
        f"{'ok' if fits else 'TOO LONG'}\n"
        f"decoded in a fresh process: {'identical' if same else 'DIFFERENT'}\n"
        f"for comparison: {others(text)}, this one {coded // 8} bytes"
    )
    return fits and same


def main(arguments: list[str], env: dict[str, str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("compress", "decompress"):
        command = commands.add_parser(name)
        command.add_argument("file", type=Path)
        command.add_argument("-o", "--output", type=Path)
    command = commands.add_parser("verify")
    command.add_argument("--documents", type=int, default=4)
    command.add_argument("--tokens", type=int, default=2000, help="at most so many")
    options = parser.parse_args(arguments)
    try:
        codec = Codec(env)
        if options.command == "verify":
            return 0 if verify(codec, env, options.documents, options.tokens) else 1
        if options.command == "compress":
            compress_file(
                codec,
                options.file,
                options.output or options.file.with_name(options.file.name + ".pgolf"),
            )
            return 0
        target = options.output or options.file.with_suffix("")
        tg.check(
            options.output or options.file.suffix == ".pgolf",
            f"{options.file}: no .pgolf to take off; name -o",
        )
        tg.atomic_write(target, codec.decompress(options.file.read_bytes()))
        return 0
    except (tg.InputError, OSError) as error:
        print(error, file=sys.stderr)
        return tg.BAD_INPUT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], dict(os.environ)))
