"""What the commands of this folder share: NAME=value words, refusals in words, progress."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
import train_gpt as tg  # noqa: E402

Item = TypeVar("Item")


def run(main: Callable[[list[str]], None]) -> None:
    """main(the command line); what is refused is one message, with the script's exit code."""
    try:
        main(sys.argv[1:])
    except (tg.InputError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(tg.BAD_INPUT)


def options_of(
    arguments: Sequence[str], own: Collection[str], doc: str, settings: bool = False
) -> dict[str, str]:
    """Words NAME=value -> name: value; InputError for any other. --help prints doc and ends.

    own: names of the bench; settings: those of train_gpt.py are allowed, too.
    """
    if "--help" in arguments or "-h" in arguments:
        print(doc)
        raise SystemExit(0)
    allowed = set(own)
    told = list(own)
    if settings:
        allowed |= tg.SETTING_NAMES
        told.append("the settings of train_gpt.py")
    options = {}
    for word in arguments:
        name, equals, value = word.partition("=")
        tg.check(equals, f"{tg.printable(word)}: expected NAME=value (or --help)")
        known = f"allowed are {', '.join(told) or 'none'}"
        tg.check(name in allowed, f"{tg.printable(name)}: no such name; {known}")
        options[name] = value
    return options


def whole_number(name: str, text: str, least: int = 0) -> int:
    """The value of an option; InputError unless it is a whole number, `least` or more."""
    sound = text.isdecimal() and int(text) >= least
    expected = f"expected a whole number, {least} or more"
    tg.check(sound, f"{name}={tg.printable(text)}: {expected}")
    return int(text)


def show_progress(told: str, done: int, count: int, begun: float) -> None:
    """A line on stderr: how much is done, and how long the rest takes at that pace.

    begun: when the work began (time.perf_counter).
    """
    eta = ""
    if done:
        left = (time.perf_counter() - begun) * (count - done) / done
        eta = f" eta:{left:.0f}s"
    print(f"{done}/{count} {told}{eta}", file=sys.stderr, flush=True)


def followed(items: Iterable[Item], told: str, count: int = 0) -> Iterator[Item]:
    """The items, and a line of progress whenever the loop has done with one.

    count: how many there are, if they have no length.
    """
    count = count or len(items)
    begun = time.perf_counter()
    for done, item in enumerate(items, 1):
        yield item
        show_progress(told, done, count, begun)
