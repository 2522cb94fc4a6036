"""All checks of a record folder, in order; a new one is one more row of a table."""

from __future__ import annotations

from collections.abc import Callable

from tool import accounting, package, rerun, rescore
from tool.case import Case, of_training
from tool.finding import NotHere, skipped
from tool.folder import Folder
from tool.progress import Progress
from tool.static import static_checks
from train_gpt import Check

CaseCheck = Callable[[Case], Check]

PACKAGE: dict[str, CaseCheck] = {
    "P1": package.check_sizes,
    "P2": package.check_json,
    "P3": package.check_code,
    "P4": accounting.check_byte_algebra,
    "P5": accounting.check_data,
    "P6": accounting.check_budgets,
    "P7": accounting.check_machine,
    "P8": accounting.check_seeds,
    "P9": package.check_files,
    "AUDIT": package.check_own_audit,
}
RERUN: dict[str, CaseCheck] = {
    "R6": rescore.check_fresh_process,
    "R10": rescore.check_determinism,
    "R12": rerun.check_validation_free_training,
}
OF_LOGS = ("P3", "P4", "P5", "P6", "P7", "AUDIT")  # of nothing they would say that all is well
# What a folder's files, which may hold anything, make a check stumble with.
MALFORMED = (
    KeyError,
    TypeError,
    ValueError,
    AttributeError,
    IndexError,
    ArithmeticError,
    RecursionError,
    OSError,
)


def guarded(name: str, check: CaseCheck, case: Case) -> Check:
    """The check's finding; a FAIL if the folder's own files make it stumble."""
    if name in OF_LOGS and not case.folder.runs:
        return skipped(name, "no logs")
    try:
        return check(case)
    except NotHere as reason:
        return skipped(name, str(reason))
    except MALFORMED as error:
        told = f"{type(error).__name__}: {error}"
        return Check(name, f"the folder's logs or JSON are malformed ({told})")


def check_case(case: Case) -> list[Check]:
    """All findings on a record folder, packaging first, then source, then re-running."""
    findings = check_package(case)
    if case.folder.script is None:
        return findings
    findings += check_source(case)
    with Progress("running the script again", len(RERUN), "checks") as progress:
        for number, (name, check) in enumerate(RERUN.items(), 1):
            findings.append(guarded(name, check, case))
            progress.show(number)
    return findings


def check_package(case: Case) -> list[Check]:
    """P1 to P9 and AUDIT; of a recipe there is nothing to check yet."""
    if case.folder.is_recipe:
        return [skipped(name, "a recipe, no logs") for name in PACKAGE]
    return [guarded(name, check, case) for name, check in PACKAGE.items()]


def check_source(case: Case) -> list[Check]:
    """S1 to S10; a readable copy's differences are added to S6, what importing shows to S8."""
    folder = case.folder
    findings = static_checks(
        folder.source,
        requirements=folder.requirements,
        siblings=[path.name for path in folder.beside if path != folder.script],
        run_settings=logged_settings(folder),
        config=folder.config,
    )
    more = {"S6": guarded("S6", package.check_readable, case)}
    if case.may_run:
        more["S8"] = guarded("S8", rerun.check_import, case)
    return [_worse(finding, more.get(finding.name)) for finding in findings]


def _worse(finding: Check, other: Check | None) -> Check:
    """What was found of a text, unless something else shows a problem that counts for more."""
    if other and other.problem and (other.failed > finding.failed or finding.word == "PASS"):
        return other
    return finding


def logged_settings(folder: Folder) -> dict[str, str] | None:
    """Settings in effect as the first log has them, without those that only say where and how."""
    for run in folder.runs:
        if run.settings:
            return of_training(run.settings)
    return None
