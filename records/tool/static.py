"""Static checks S1 to S10 of a shipped training script: what its text shows before it runs.

S5 to S10 (`source`) are exact and can fail. S1 to S4 (`heuristics`) guess at behaviour and only
warn.
"""

from __future__ import annotations

import sys
import tokenize
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tool import heuristics, source
from tool.finding import skipped
from tool.script import Script
from tool.wrapper import unpack_source
from train_gpt import Check

CHECKS = (*heuristics.CHECKS, *source.CHECKS)  # their names, in order


def static_checks(
    text: str,
    *,
    requirements: Sequence[str] = (),
    siblings: Sequence[str] = (),
    run_settings: Mapping[str, str] | None = None,
    config: Mapping[str, str] | None = None,
) -> list[Check]:
    """S1 to S10 of a script's text; a wrapper is unpacked first. Never raises on odd input.

    requirements: lines of requirements.txt; siblings: other files of the folder; run_settings: NAME
    -> text as the logs print them, None if they do not; config: NAME -> text of the folder's
    config.env.
    """
    try:
        inner, _ = unpack_source(text)
        script = Script(inner, requirements, siblings, run_settings, config)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return _unreadable(error)
    behaviour = heuristics.Behaviour(script)
    guesses = [_made(name, check, behaviour) for name, check in heuristics.CHECKS.items()]
    facts = [_made(name, check, script) for name, check in source.CHECKS.items()]
    return guesses + facts


def _made(name: str, check: Callable[[Any], Check], subject: Any) -> Check:
    """A check's outcome; skipped where the script defeats it."""
    try:
        return check(subject)
    except (RecursionError, tokenize.TokenError) as error:
        return skipped(name, f"the script is too odd to follow ({error})")


def _unreadable(error: Exception) -> list[Check]:
    """The outcomes for a text that is no script of Python 3.10: S8's fault, the rest skipped.

    An f-string of Python 3.12 is legal where the contest runs: a warning.
    """
    line = getattr(error, "lineno", None) or "?"
    message = getattr(error, "msg", None) or error
    where = f"line {line}: {message}"
    if isinstance(error, SyntaxError) and sys.version_info < (3, 12):
        where += "; if the script is Python 3.12's, run check on Python 3.12"
    outcomes = []
    for name in CHECKS:
        if name == "S8":
            newer = "f-string" in where and sys.version_info < (3, 12)  # may be right there
            unread = f"Python 3.10 cannot read the script: {where}"
            outcomes.append(Check(name, unread, counts_as="WARN" if newer else "FAIL"))
        else:
            outcomes.append(skipped(name, f"the script does not parse ({where})"))
    return outcomes
