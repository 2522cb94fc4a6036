"""rANS (section 9): every code comes back, by a slow decoder too; damaged bytes are refused."""

import ast
import bisect
import contextlib
import functools
import inspect
import itertools
import math
import struct
import sys
import textwrap
import time
import tracemalloc

import hypothesis
import numpy as np
import pytest
import torch
from conftest import TINY
from helpers import config, with_lanes
from hypothesis import strategies

import train_gpt as tg

checked = hypothesis.settings(deadline=None, derandomize=True, database=None, max_examples=40)
some = functools.partial(hypothesis.settings, checked)
seeds = strategies.integers(0, 2**32 - 1)


# --- oracles: plain Python integers ---------------------------------------------------------------


def slow_frequencies(values):
    """Bytes of a table -> frequencies of a sum of 2^14, or None."""
    found = []
    for value in values:
        doublings = max(0, value // 16 - 1)
        found.append((value - 16 * doublings) * 2**doublings)
    most = found.index(max(found))
    found[most] += 2**14 - sum(found)
    return found if found[most] > 0 else None


def slow_tables(data):
    """Bytes of tables -> highest context, lowest code and frequencies of each."""
    (count,) = struct.unpack_from("<H", data)
    at = 2
    tables = []
    for _ in range(count):
        highest, lowest, others = struct.unpack_from("<hiH", data, at)
        at += 8
        values = list(data[at : at + others + 1])
        tables.append((highest, lowest, slow_frequencies(values)))
        at += others + 1
    assert at == len(data)
    return tables


def chosen_table(tables, context):
    """The first whose contexts reach so far, else the last."""
    for table in tables[:-1]:
        if context <= table[0]:
            return table
    return tables[-1]


class SlowLanes:
    """States and words of a range; each lane in its turn takes the next word if it needs one."""

    def __init__(self, data, lanes):
        self.states = list(struct.unpack_from(f"<{lanes}I", data))
        words = data[4 * lanes :]
        self.words = [low + 256 * high for low, high in zip(words[::2], words[1::2])]
        self.words.reverse()

    def code(self, lane, table):
        """The next code of a lane."""
        _, lowest, frequencies = table
        state = self.states[lane]
        slot = state % 2**14
        ends = list(itertools.accumulate(frequencies))
        symbol = bisect.bisect_right(ends, slot)
        before = ends[symbol] - frequencies[symbol]
        state = frequencies[symbol] * (state // 2**14) + slot - before
        if state < 2**16:
            state = 2**16 * state + self.words.pop()
        self.states[lane] = state
        return lowest + symbol


def slow_decode(data, contexts, tables, lanes):
    """What `rans_decode` gives, one code after the other; tables as bytes."""
    tables = slow_tables(tables)
    coder = SlowLanes(data, lanes)
    codes = []
    for i, context in enumerate(contexts):
        codes.append(coder.code(i % lanes, chosen_table(tables, context)))
    assert not coder.words
    assert set(coder.states) == {2**16}
    return codes


# --- codes and their contexts ---------------------------------------------------------------------


def gaussian(rng, count):
    """Of several sizes, side by side."""
    size = 2.0 ** rng.uniform(-6, 6, rng.integers(1, 5))
    return np.round(rng.standard_normal(count) * size[np.arange(count) % len(size)])


def all_equal(rng, count):
    return np.full(count, rng.choice([0, -1, 5, 20_000, -20_000, 32767, -32768]))


def far_off(rng, count):
    """About 20,000 or -20,000, as far apart as a table reaches."""
    middle = rng.choice([-20_000, 20_000])
    codes = middle + rng.integers(-8191, 8192, count)
    codes[:: 1 + count // 7] = middle - 8191
    return codes


def one_rare(rng, count):
    codes = np.zeros(count)
    codes[rng.integers(count)] = rng.choice([1, -1, 16_383, -16_383])
    return codes


def two_of_them(rng, count):
    return rng.integers(0, 2, count) * rng.integers(1, 300)


KINDS = (gaussian, all_equal, far_off, one_rare, two_of_them)


def some_contexts(rng, count):
    """Alike, any, or growing."""
    one = np.full(count, rng.integers(-32, 128))
    every = rng.integers(-32, 128, count)
    growing = np.arange(count) * 159 // count - 32
    return (one, every, growing)[rng.integers(3)]


def coded(codes, contexts):
    return tg.CodedPart(codes.astype(np.int64), contexts, 0)


def there_and_back(codes, contexts, lanes=None):
    """Bytes of tables and of a range that give the codes again, quickly and slowly."""
    part = coded(codes, contexts)
    with with_lanes(lanes) if lanes else contextlib.nullcontext():
        tables = tg.build_tables([part])
        data = tg.rans_encode(part.codes, contexts, tables)
        stored = tables.to_bytes()
        found = tg.rans_decode(data, contexts, tg.CodeTables.from_bytes(stored))
    np.testing.assert_array_equal(found, part.codes)
    lanes = lanes or max(1, len(codes) // (4096 if len(codes) >= 2**18 else 8192))
    slow = slow_decode(data, contexts.tolist(), stored, lanes)
    assert slow == part.codes.tolist()
    return data, stored


# --- there and back -------------------------------------------------------------------------------


def drawn_there_and_back(seed, kind, count, lanes):
    rng = np.random.default_rng(seed)
    contexts = some_contexts(rng, count)
    there_and_back(kind(rng, count), contexts, lanes)


@checked
@hypothesis.given(
    seed=seeds,
    kind=strategies.sampled_from(KINDS),
    count=strategies.integers(1, 400),
    lanes=strategies.integers(1, 9),
)
def test_every_code_comes_back(seed, kind, count, lanes):
    """Of any kind, in any contexts, by so many lanes."""
    drawn_there_and_back(seed, kind, count, lanes)


COUNTS = (1, 7, 300, 8191, 16_500)
MANY = tuple(pytest.param(n, marks=pytest.mark.slow) for n in (300_000, 1 << 18, 400_003))


@pytest.mark.parametrize("count", [*COUNTS, *MANY])
def test_counts_come_back(count, rng):
    """With the lanes that a count of codes gets."""
    contexts = some_contexts(rng, count)
    there_and_back(gaussian(rng, count), contexts)


@pytest.mark.slow
@some(max_examples=1000)
@hypothesis.given(
    seed=seeds,
    kind=strategies.sampled_from(KINDS),
    count=strategies.integers(1, 3000),
    lanes=strategies.integers(1, 40),
)
def test_every_code_comes_back_long(seed, kind, count, lanes):
    drawn_there_and_back(seed, kind, count, lanes)


def test_codes_too_far_apart_are_refused():
    """By the setting's name; one less is coded."""
    codes = np.array([-20_000, 20_000])
    far = tg.CodedPart(codes, np.zeros(2, np.int64), 0)
    with pytest.raises(tg.InputError, match=r"COMPRESSOR=rans: 40001 codes apart"):
        tg.build_tables([far])
    contexts = np.zeros(2, np.int64)
    there_and_back(np.array([-8000, 8383]), contexts)


# --- size -----------------------------------------------------------------------------------------


def gaussian_file(rng, tensors, shape):
    """Matrices of whole steps, the rows' exponents over four octaves, and their settings."""
    found = []
    for number in range(tensors):
        columns = rng.integers(-4, 5, shape[1]).astype(np.int8)
        rows = rng.integers(-16, 17, shape[0]).astype(np.int8)
        octaves = (rows[:, None] + columns) / 8
        codes = np.round(rng.standard_normal(shape) * 2.0 ** (number % 5 / 2 - octaves))
        arrays = (codes.astype("<i2"), columns, rows)
        found.append(tg.PackedTensor(str(number), list(shape), "step16", arrays))
    return found, config(TINY, compressor="rans")


def price(tables, context, code):
    """Bits of a code with the table of its context."""
    _, lowest, frequencies = chosen_table(tables, context)
    return 14 - math.log2(frequencies[code - lowest])


def check_sizes(rng, tensors, shape, most):
    """All bytes of a file are within a share of the cross entropy, and of what is ideal."""
    fitted, cfg = gaussian_file(rng, tensors, shape)
    parts = [part for tensor in fitted for part in tg.coded_parts(tensor, cfg)]
    built = tg.build_tables(parts)
    tables = slow_tables(built.to_bytes())
    memo = functools.lru_cache(None)(functools.partial(price, tables))
    bits = 0.0
    for part in parts:
        bits += sum(map(memo, part.contexts.tolist(), part.codes.tolist()))
    payload = tg.rans_payload(fitted, cfg, b"")
    assert 8 * len(payload) < bits * (1 + most)
    ideal = sum(map(tg.context_entropy, parts))
    assert bits < ideal * 1.01
    assert len(tables) > 5


def test_a_million_codes_cost_what_their_tables_say(rng):
    """Within 0.5 %, tables and lanes included."""
    check_sizes(rng, 20, (200, 250), 0.005)


# --- tables ---------------------------------------------------------------------------------------


def some_tables(rng, count=300):
    """Of codes of several sizes, which give several tables."""
    contexts = np.repeat(np.arange(0, 64, 8), count)
    codes = np.round(rng.standard_normal(len(contexts)) * 2.0 ** (contexts / 8))
    tables = tg.build_tables([coded(codes, contexts)])
    assert len(tables.stored) > 2
    return tables


def test_tables_come_back(rng):
    tables = some_tables(rng)
    again = tg.CodeTables.from_bytes(tables.to_bytes())
    assert np.array_equal(tables.highest, again.highest)
    assert np.array_equal(tables.lowest, again.lowest)
    assert len(tables.stored) == len(again.stored)
    for values, found in zip(tables.stored, again.stored):
        assert np.array_equal(values, found)
    for name in ("frequency", "start", "code_at"):
        assert np.array_equal(getattr(tables, name), getattr(again, name)), name


def refused(data):
    """Whether tables are; as the reader of an artifact, which knows what may be raised."""
    try:
        with tg.input_error_from("x", *tg.EXPAND_ERRORS):
            tg.CodeTables.from_bytes(data)
    except tg.InputError:
        return True
    return False


def test_tables_cut_or_extended_are_refused(rng):
    data = some_tables(rng).to_bytes()
    assert not refused(data)
    for size in range(len(data)):
        assert refused(data[:size]), size
    assert refused(data + b"\0")
    assert refused(data + data[2:])


def tables_of(*rows):
    """Bytes of tables from highest context, lowest code and bytes of frequencies."""
    found = struct.pack("<H", len(rows))
    for highest, lowest, values in rows:
        found += struct.pack("<hiH", highest, lowest, len(values) - 1) + bytes(values)
    return found


# Frequencies of 2^13 and, if no more is said, of all the rest.
HALF = 16 * 9 + 16
WRONG_TABLES = {
    "of another sum": ("another sum", [(0, 0, [HALF, HALF, HALF])]),
    "of a sum beyond all": ("another sum", [(0, 0, [255, 255])]),
    "out of order": ("out of order", [(1, 0, [HALF]), (0, 0, [HALF])]),
    "one context twice": ("out of order", [(1, 0, [HALF]), (1, 0, [HALF])]),
    "none": ("do not end", []),
    "of too many codes": ("too long", [(0, 0, [1] * 16_385)]),
}


@pytest.mark.parametrize("kind", WRONG_TABLES)
def test_wrong_tables_are_refused(kind):
    message, rows = WRONG_TABLES[kind]
    with pytest.raises(tg.InputError, match=message):
        tg.CodeTables.from_bytes(tables_of(*rows))


def test_the_largest_frequency_makes_up_for_the_sum():
    assert not refused(tables_of((0, 0, [HALF, HALF - 1])))
    assert tg.frequencies_of(np.array([HALF, 1, 0], np.uint8)).tolist() == [16_383, 1, 0]
    assert tg.frequencies_of(np.array([1, HALF, HALF], np.uint8)).tolist() == [1, 8191, 8192]


def peak_bytes(action):
    """Of what an action allocates."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


HUGE_TABLES = {
    "65535 tables of a code": [(at - 32768, 0, [1]) for at in range(65_535)],
    "300 tables, one of 65536 codes": [(at, 0, [1]) for at in range(299)] + [(300, 0, [0] * 65536)],
    "256 tables of all codes": [(at, 0, [1] * 16_384) for at in range(256)],
}


@pytest.mark.parametrize("kind", HUGE_TABLES)
def test_huge_tables_need_little_memory(kind):
    """Refused, or of the 100 MB that 256 tables of 2^14 codes take: not of gigabytes."""
    data = tables_of(*HUGE_TABLES[kind])

    def use():
        with contextlib.suppress(tg.InputError):
            tables = tg.CodeTables.from_bytes(data)
            size = len(tables.stored) * max(map(len, tables.stored))
            assert size <= 256 << 14
            assert len(tables.stored) << 14 <= 256 << 14

    assert peak_bytes(use) < 100e6


counts_of = strategies.lists(strategies.integers(0, 1 << 20), min_size=1, max_size=60)


@checked
@hypothesis.given(counts=counts_of, times=strategies.integers(1, 200))
def test_frequencies_are_in_proportion(counts, times):
    """What occurs has one, what does not has none; the smaller ones err by 1/32 at most."""
    counts = np.array(counts * times)
    hypothesis.assume(counts.any())
    values = tg.normalised(counts)
    frequency = tg.frequencies_of(values)
    assert frequency.tolist() == slow_frequencies(values.tolist())
    assert frequency.sum() == 2**14
    assert np.array_equal(frequency > 0, counts > 0)
    if np.count_nonzero(counts) < 60:
        wanted = np.maximum(1, counts * 2**14 // counts.sum()) * (counts > 0)
        others = np.arange(len(counts)) != wanted.argmax()
        error = np.abs(frequency - wanted)[others]
        assert (error <= wanted[others] / 32).all() or wanted.max() < 2**9


@pytest.mark.parametrize("seen", [16_384, 16_383, 16_000])
def test_as_many_codes_as_frequencies_end(seen, rng):
    """Each occurs: no more than one is left for most."""
    counts = np.zeros(16_384, np.int64)
    counts[:seen] = rng.integers(1, 1000, seen)
    frequency = tg.frequencies_of(tg.normalised(counts))
    assert frequency.sum() == 2**14
    assert np.array_equal(frequency > 0, counts > 0)


def test_contexts_that_tell_nothing_share_a_table(rng):
    """And those that tell something do not, which saves bits."""
    codes = np.round(rng.standard_normal(20_000) * 3)
    alike = coded(codes, rng.integers(-32, 128, 20_000))
    assert len(tg.build_tables([alike]).stored) == 1
    contexts = np.arange(20_000) % 2 * 40
    told = coded(codes * 2.0 ** (contexts / 8) // 1, contexts)
    assert len(tg.build_tables([told]).stored) == 2


# --- damage ---------------------------------------------------------------------------------------


class Range:
    """A range of codes as a file holds it, and what it decodes to."""

    def __init__(self, count, lanes, rng):
        self.lanes = lanes
        self.contexts = rng.integers(0, 60, count)
        self.codes = np.round(rng.standard_normal(count) * 2.0 ** (self.contexts / 8))
        self.data, stored = there_and_back(self.codes, self.contexts, lanes)
        self.tables = tg.CodeTables.from_bytes(stored)

    def decode(self, data):
        """Codes, or None if the data is refused."""
        with with_lanes(self.lanes):
            try:
                return tg.rans_decode(data, self.contexts, self.tables)
            except tg.InputError:
                return None

    def check_damaged(self, data):
        """Refused, or other codes, which are the only ones of these bytes."""
        codes = self.decode(data)
        if codes is None:
            return 0
        assert not np.array_equal(codes, self.codes)
        return 1


@pytest.mark.parametrize("lanes", [1, 3])
def test_a_changed_range_gives_no_such_codes(lanes, rng):
    """Every byte changed in several ways, cut at every length, extended: never the same codes."""
    whole = Range(48, lanes, rng)
    data = whole.data
    began = time.process_time()
    for at, flip in itertools.product(range(len(data)), (1, 2, 16, 128, 255)):
        changed = bytearray(data)
        changed[at] ^= flip
        whole.check_damaged(bytes(changed))
    for size in range(len(data)):
        assert whole.decode(data[:size]) is None
    for more in (b"\0", b"\0\0", b"\0\0\1\0", bytes(4 * lanes), b"\xff" * 1000):
        assert whole.decode(data + more) is None
    assert time.process_time() - began < 60


@pytest.mark.slow
def test_any_changed_range_gives_no_such_codes(rng):
    """Random bytes in many ranges: some are taken, as other codes."""
    taken = 0
    for number in range(400):
        whole = Range(4 + number % 9, 1 + number % 3, rng)
        for at, value in itertools.product(range(len(whole.data)), range(0, 256, 3)):
            changed = bytearray(whole.data)
            changed[at] ^= value or 1
            taken += whole.check_damaged(bytes(changed))
    assert taken


def test_codes_have_one_range_only():
    """A lane that begins below 2^16 could end with the same codes after one word more."""
    contexts = np.zeros(3, np.int64)
    part = coded(np.array([0, 0, 1]), contexts)
    tables = tg.build_tables([part])
    data = tg.rans_encode(part.codes[:1], part.contexts[:1], tables)
    first = int(tables.start[0, 0]) + 1
    other = struct.pack("<IH", first, 0)
    assert other != data
    assert tg.rans_decode(data, contexts[:1], tables).tolist() == [0]
    with pytest.raises(tg.InputError, match="too low"):
        tg.rans_decode(other, contexts[:1], tables)


# --- whole numbers only ---------------------------------------------------------------------------

# All that a decoder of codes calls.
DECODER = (
    tg.rans_decode,
    tg.lanes_of,
    tg.contexts_of,
    tg.frequencies_of,
    tg.StepInt.spreads,
    tg.RowInt.spreads,
    tg.LowRankCorrected.spreads,
    tg.CodeTables.of_context,
    tg.CodeTables.from_bytes.__func__,
    tg.CodeTables.frequency.func,
    tg.CodeTables.start.func,
    tg.CodeTables.code_at.func,
)


@pytest.mark.parametrize("function", DECODER, ids=[each.__qualname__ for each in DECODER])
def test_the_decoder_divides_no_numbers(function):
    """Nor does it name a fraction, a float type, or what gives one."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    for node in ast.walk(tree):
        assert not isinstance(node, (ast.Div, ast.Pow))
        assert not isinstance(getattr(node, "value", None), float)
        name = getattr(node, "attr", "") or getattr(node, "id", "")
        assert "float" not in name
        assert name not in ("math", "log2", "exp2", "mean", "half", "double", "sqrt", "ldexp")


def arrays_in(value):
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from arrays_in(each)


def types_seen(action):
    """Types of all arrays that the script's own functions name or return while an action lasts."""
    seen = set()
    entered = set()

    def note(frame, event, found):
        if frame.f_code.co_filename != tg.__file__:
            return None
        entered.add(frame.f_code.co_name)
        for value in (*frame.f_locals.values(), found):
            seen.update(array.dtype.kind for array in arrays_in(value))
        return note

    sys.settrace(note)
    try:
        action()
    finally:
        sys.settrace(None)
    return seen, entered


def step_tensor(rng, shape):
    columns = rng.integers(-20, 20, shape[1]).astype(np.int8)
    rows = rng.integers(-20, 20, shape[0]).astype(np.int8)
    codes = np.round(rng.standard_normal(shape) * 3).astype(np.int8)
    return tg.PackedTensor("a", list(shape), "step8", (codes, columns, rows))


def payload_of(rng, shape):
    """A tensor in steps, and an action that reads its payload."""
    cfg = config(TINY, compressor="rans")
    tensor = step_tensor(rng, shape)
    payload = tg.rans_payload(
        [tensor], cfg, tensor.arrays[1].tobytes() + tensor.arrays[2].tobytes()
    )
    found = tg.quantizer(tensor.kind, cfg)
    return tensor, functools.partial(tg.rans_arrays, payload, [found.layout(shape)], [found])


def test_the_decoder_has_whole_numbers_only(rng):
    _, read = payload_of(rng, (130, 5))
    seen, entered = types_seen(read)
    assert {"i", "u"} <= seen <= {"i", "u", "b"}
    assert {"rans_decode", "of_context", "code_at", "contexts_of", "spreads"} <= entered


def test_the_decoder_depends_on_no_count_of_threads(rng):
    tensor, read = payload_of(rng, (300, 7))
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            ((codes, *_),), _ = read()
        finally:
            torch.set_num_threads(1)
        np.testing.assert_array_equal(codes, tensor.arrays[0])
