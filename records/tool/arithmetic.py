"""Arithmetic coding: intervals of whole numbers (Witten, Neal and Cleary 1987).

An interval [low, high] of whole numbers is narrowed to each symbol's share. Whenever both ends lie
in the same half, that half is a bit of the code; when they lie around the middle and close to it,
the next bit is known to be the opposite of the one that follows.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from train_gpt import InputError, check

PRECISION = 62  # bits of the interval
SCALE = 1 << 30  # sum of frequencies
LARGEST_ERROR = 1e-5  # of the probabilities' sum: float32 is off by a millionth or two
TOP = 1 << PRECISION
HALF = TOP // 2
QUARTER = TOP // 4


class OtherCode(InputError):
    """A code that other intervals made: it has not the length that these need."""


def frequencies(log_p: torch.Tensor) -> np.ndarray:
    """Cumulative whole frequencies of a distribution, [V + 1]; every token has at least 1."""
    p = np.exp(log_p.numpy().astype(np.float64))
    total = p.sum()
    check(
        abs(total - 1) < LARGEST_ERROR,
        f"the probabilities sum to {total}: no code can be made of them",
    )
    whole = np.floor(p * SCALE).astype(np.int64) + 1
    return np.concatenate(([0], np.cumsum(whole)))


def most_symbols(code_bytes: int, vocab: int) -> int:
    """How many symbols a code of so many bytes can hold at most, whatever their probabilities.

    A certain token costs bits, too: each of the others keeps a frequency of 1. With 1024 tokens
    that is about 1.4 millionths of a bit. The interval shrinks by at least that much a symbol, and
    no farther than the bits of the code say.
    """
    largest = SCALE * (1 + LARGEST_ERROR) + 1  # the most that one of the frequencies can be
    rounding = 1 / QUARTER  # of the interval's ends, which are never closer than a quarter
    left_to_others = (vocab - 1) / (largest + vocab - 1) - rounding
    least = -math.log1p(-left_to_others) / math.log(2)  # bits a symbol
    return int(8 * code_bytes / least)


class Interval:
    """What encoder and decoder narrow alike; both ends are included."""

    def __init__(self) -> None:
        self.low = 0
        self.high = TOP - 1

    @property
    def width(self) -> int:
        return self.high - self.low + 1

    def narrow(self, cumulative: np.ndarray, symbol: int) -> None:
        """To the share of a symbol."""
        below = int(cumulative[symbol])
        upto = int(cumulative[symbol + 1])
        total = int(cumulative[-1])
        width = self.width
        self.high = self.low + width * upto // total - 1
        self.low = self.low + width * below // total

    def settled(self) -> bool:
        """Whether both ends lie in the same half: a bit is known."""
        return self.high < HALF or self.low >= HALF

    def straddles(self) -> bool:
        """Whether both ends lie in the middle half: the next bit is the opposite of the next."""
        return self.low >= QUARTER and self.high < 3 * QUARTER

    def double(self, offset: int) -> None:
        """Zooms into the half that begins at the offset."""
        self.low = 2 * (self.low - offset)
        self.high = 2 * (self.high - offset) + 1


class Encoder:
    """Symbols with their intervals -> bits."""

    def __init__(self) -> None:
        self.interval = Interval()
        self.opposites = 0  # bits that wait for the next one, to be its opposite
        self.bits = bytearray()

    def _emit(self, bit: int) -> None:
        self.bits += bytes([bit]) + bytes([1 - bit]) * self.opposites
        self.opposites = 0

    def encode(self, cumulative: np.ndarray, symbol: int) -> None:
        interval = self.interval
        interval.narrow(cumulative, symbol)
        while True:
            if interval.settled():
                bit = int(interval.low >= HALF)
                self._emit(bit)
                interval.double(bit * HALF)
            elif interval.straddles():
                self.opposites += 1
                interval.double(QUARTER)
            else:
                return

    def finish(self) -> bytes:
        self.opposites += 1  # two bits name a point inside the interval
        self._emit(int(self.interval.low >= QUARTER))
        return np.packbits(np.frombuffer(bytes(self.bits), np.uint8)).tobytes()


class Decoder:
    """Bits -> symbols, given the same intervals. OtherCode where it is too short for them.

    An encoder zooms once a bit, and adds two bits at its end.
    """

    def __init__(self, data: bytes):
        self.zooms_left = 8 * len(data) - 2
        self.bits = iter(np.unpackbits(np.frombuffer(data, np.uint8)).tolist())
        self.interval = Interval()
        self.value = 0
        for _ in range(PRECISION):
            self._read(0)

    def _read(self, offset: int) -> None:
        """Zooms as the interval does; past the end of the data all bits are 0."""
        self.value = 2 * (self.value - offset) + next(self.bits, 0)

    def decode(self, cumulative: np.ndarray) -> int:
        interval = self.interval
        total = int(cumulative[-1])
        point = ((self.value - interval.low + 1) * total - 1) // interval.width
        symbol = int(np.searchsorted(cumulative, point, side="right")) - 1
        interval.narrow(cumulative, symbol)
        while True:
            if interval.settled():
                offset = HALF if interval.low >= HALF else 0
            elif interval.straddles():
                offset = QUARTER
            else:
                return symbol
            interval.double(offset)
            self._read(offset)
            self.zooms_left -= 1
            if self.zooms_left < 0:
                raise OtherCode("the code ends before the text does")

    def finish(self) -> None:
        """OtherCode if there is more than the symbols needed."""
        if self.zooms_left >= 8:
            raise OtherCode("the code goes on after the end of the text")
