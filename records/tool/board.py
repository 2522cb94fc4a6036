"""A track's leaderboard: its entries by score, as a table in pages and a picture.

The figures are those that `check` recounts from the logs; an entry that it fails is not ranked.
"""

from __future__ import annotations

import dataclasses
import io
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tool.case import TRACKS, Case, Track
from tool.checks import MALFORMED, check_case
from tool.compare import load_sample
from tool.finding import shown, text_of
from tool.folder import Folder
from tool.logs import Final, Run
from tool.page import in_order, pyplot, table
from tool.runs import RecordError, read_text
from tool.submission import spread

END = "<!-- end board -->"
ABSENT = "-"  # neither the JSON nor the logs tell
DIGITS = 6  # of a score as it is shown, and by which entries are ranked
LONGEST_CELL = 80  # characters
MEANING = (
    "Scores and seconds are means over seeds, std is that of the sample, bytes are those of the "
    "largest seed; training seconds include calibration."
)


class NotRanked(Exception):
    """An entry has no place on the board; the message says why."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """An entry's figures, over its seeds; None or empty: neither its JSON nor its logs tell."""

    name: str  # of its folder
    bpb: float  # mean of the valid scores
    std: float | None  # of the sample; None for one seed
    seeds: int
    evaluators: list[str]  # whose score that is
    others: dict[tuple[str, str], float]  # (metric, stage) -> mean of what is no valid score
    model_bytes: int | None  # of the largest seed
    total_bytes: int | None  # the same, code included
    train_seconds: float | None  # mean, calibration included
    eval_seconds: float | None  # mean
    train_flops: float | None  # mean
    machines: list[str]
    matmul_gflops: float | None  # measured rate of a CPU
    date: str | None
    text_bytes: list[int | None]  # of the validation text that was scored; more than one is odd


@dataclasses.dataclass(frozen=True)
class Board:
    """The folders of a track."""

    path: Path
    entries: list[Entry]  # best first
    refused: dict[str, str]  # name of an entry's folder -> why it is not ranked
    skipped: list[str]  # names of folders without a submission.json

    @property
    def track(self) -> str:
        return self.path.name.removeprefix("track_")

    @property
    def limits(self) -> Track:
        return TRACKS.get(self.track, Track())

    @property
    def counts_code(self) -> bool:
        """Whether the track's cap is on code and model together."""
        return self.limits.total_bytes is not None

    @property
    def picture(self) -> Path:
        return self.path / "board.svg"


# --- reading --------------------------------------------------------------------------------------


def read_board(path: Path) -> Board:
    """The entries of a track's folder, checked as `check` without --run does.

    RecordError if it is no track.
    """
    path = path.resolve()
    if not path.is_dir() or not path.name.startswith("track_"):
        raise RecordError(f"{path}: no track; expected a folder records/track_NAME")
    board = Board(path, [], {}, [])
    for below in sorted(path.iterdir()):
        hidden = below.name.startswith((".", "__"))  # drafts and caches
        if hidden or not below.is_dir():
            continue
        try:
            if Folder(below).submission is None:
                board.skipped.append(below.name)
            else:
                board.entries.append(read_entry(below, board.track))
        except NotRanked as reason:
            board.refused[below.name] = str(reason)
        except MALFORMED as error:
            board.refused[below.name] = shown(f"{type(error).__name__}: {error}")
    board.entries.sort(key=_order)
    return board


def _order(entry: Entry) -> tuple[float, str, str]:
    """By the score that is shown; of equal ones the earlier comes first."""
    return (round(entry.bpb, DIGITS), entry.date or "", entry.name)


def read_entry(path: Path, track: str) -> Entry:
    """The figures of a record folder. NotRanked if it has no place on this track's board."""
    folder = Folder(path)
    if folder.track != track:
        raise NotRanked(f"its submission.json names the track {shown(folder.track)}")
    findings = check_case(Case(folder, may_run=False))
    failed = [f"{finding.name} {text_of(finding)}" for finding in findings if finding.failed]
    if failed:
        raise NotRanked("; ".join(failed))
    runs = folder.runs
    scores = list(load_sample(path).scores.values())
    if len(scores) < len(runs):
        raise NotRanked("a log ends without a valid val_bpb")
    rows = {finding.name: finding.figures.get("runs", {}) for finding in findings}
    told = folder.submission
    return Entry(
        name=path.name,
        bpb=statistics.fmean(scores),
        std=spread(scores),
        seeds=len(scores),
        evaluators=in_order(run.score.get("stage") or _stage_of(run.final) for run in runs),
        others=_no_scores(runs),
        model_bytes=max(_of_all(runs, rows["P1"], "model"), default=None),
        total_bytes=max(_of_all(runs, rows["P1"], "total"), default=None),
        train_seconds=_mean(_of_all(runs, rows["P6"], "train")),
        eval_seconds=_mean(_of_all(runs, rows["P6"], "eval")),
        train_flops=_mean(
            _of_all(runs, {run.name: run.result or {} for run in runs}, "train_flops")
        ),
        machines=in_order(_machine(row) for row in rows["P7"].values() if row["device"]),
        matmul_gflops=told.get("matmul_gflops"),
        date=str(told["date"])[:10] if told.get("date") else None,
        text_bytes=in_order(run.score.get("bytes") for run in runs),
    )


def _of_all(runs: Sequence[Run], rows: Mapping[str, Mapping[str, Any]], key: str) -> list[float]:
    """A figure of every run; empty if some run lacks it, as a part would pass for the whole."""
    values = [rows.get(run.name, {}).get(key) for run in runs]
    return [] if None in values else values


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _machine(row: Mapping[str, Any]) -> str:
    """Of a row of P7."""
    world = row["world_size"]
    return f"{world} x {row['device']}" if world else row["device"]


def _stage_of(final: Final) -> str:
    """`final_zstd_sliding` is sliding."""
    return final.stage.rsplit("_", 1)[-1]


def _no_scores(runs: Sequence[Run]) -> dict[tuple[str, str], float]:
    """Means of what the logs print under another name than val_bpb, by that name and stage."""
    found: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        for final in run.finals:
            if final.metric != "val_bpb":
                found.setdefault((final.metric, _stage_of(final)), []).append(final.bpb)
    return {key: statistics.fmean(values) for key, values in found.items()}


# --- the table ------------------------------------------------------------------------------------


def cell(said: object) -> str:
    """What a file says, as part of a table; it ends neither the cell nor the block."""
    return re.sub(r"([\\|<`*\[\]])", r"\\\1", shown(said, LONGEST_CELL))


def _figure(value: float | None, form: str) -> str:
    return ABSENT if value is None else format(value, form)


def _places(entries: Sequence[Entry]) -> list[int]:
    """The rank of each; those that show the same score share one."""
    scores = [round(entry.bpb, DIGITS) for entry in entries]
    return [1 + scores.index(score) for score in scores]


def _link(board: Board, name: str, prefix: str) -> str:
    """To an entry's page."""
    readme = board.path / name / "README.md"
    page = readme.name if readme.is_file() else "submission.json"
    return f"[{cell(name)}]({prefix}{quote(name)}/{page})"


def _cells(board: Board, place: int, entry: Entry, prefix: str) -> dict[str, Any]:
    """A row by the heads of its columns."""
    others = [
        f"`{metric}` {mean:.{DIGITS}f} ({cell(stage)})"
        for (metric, stage), mean in entry.others.items()
    ]
    machine = cell(", ".join(entry.machines) or ABSENT)
    if entry.matmul_gflops is not None:
        machine += f", {cell(entry.matmul_gflops)} GFLOP/s"
    cells = {
        "rank": place,
        "entry": _link(board, entry.name, prefix),
        "val_bpb": f"{entry.bpb:.{DIGITS}f}",
        "std": _figure(entry.std, f".{DIGITS}f"),
        "seeds": entry.seeds,
        "evaluator": cell(", ".join(entry.evaluators)),
        "other figures, not scores": "; ".join(others) or ABSENT,
        "model bytes": _figure(entry.model_bytes, ",.0f"),
    }
    if board.counts_code:
        cells["total bytes"] = _figure(entry.total_bytes, ",.0f")
    cells["training s"] = _figure(entry.train_seconds, ".1f")
    cells["scoring s"] = _figure(entry.eval_seconds, ".1f")
    cells["train FLOPs"] = _figure(entry.train_flops, ".3g")
    cells["machine"] = machine
    cells["date"] = cell(entry.date or ABSENT)
    return cells


def block(board: Board, prefix: str) -> str:
    """What stands between the markers, in Markdown.

    prefix: path from the page's folder to the track's, empty or with a slash at its end.
    """
    parts = ["No entries yet."]
    if board.entries:
        ranked = zip(_places(board.entries), board.entries)
        rows = [_cells(board, place, entry, prefix) for place, entry in ranked]
        lowest = f"{board.entries[0].bpb:.{DIGITS}f}"
        alt = f"val_bpb of each entry by training seconds and by bytes; the lowest is {lowest}"
        parts = [
            table(list(rows[0]), [list(row.values()) for row in rows]),
            f"![{alt}]({prefix}{board.picture.name})",
            f"{MEANING} {_texts(board.entries)}",
        ]
    if board.refused:
        names = [_link(board, name, prefix) for name in board.refused]
        parts.append(f"Not ranked (the command says why): {', '.join(names)}.")
    command = f"python records/record.py board records/track_{board.track}"
    parts.append(f"From the entries' logs by `{command}`.")
    return "\n\n".join(parts)


def _texts(entries: Sequence[Entry]) -> str:
    """Whether the scores are of one text, as far as the logs tell."""
    texts = in_order(size for entry in entries for size in entry.text_bytes)
    if len(texts) == 1 and texts[0] is not None:
        return f"All scored {texts[0]:,.0f} bytes of validation text."
    told = []
    for size in texts:
        names = [cell(entry.name) for entry in entries if size in entry.text_bytes]
        bytes_ = "a text of unknown size" if size is None else f"{size:,.0f} bytes"
        told.append(f"{', '.join(names)}: {bytes_}")
    return f"Not shown to be of one validation text: {'; '.join(told)}."


# --- the picture ----------------------------------------------------------------------------------

# Letters stay letters, and what is numbered at random otherwise is numbered by its content.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "board"}
GAP = 0.05  # between labels, as part of a panel's height
LONGEST_LABEL = 28  # characters of a name
BESIDE = 0.025  # from a point to its label, as part of a panel's width


@dataclasses.dataclass(frozen=True)
class Panel:
    """What stands on a panel's horizontal axis."""

    counted: str
    cap: float | None  # the track's
    values: list[float | None]  # one an entry; None: not told


def panels_of(board: Board) -> list[Panel]:
    """Training seconds, and the bytes that the track's cap is on."""
    limits = board.limits
    seconds = [entry.train_seconds for entry in board.entries]
    model = [entry.model_bytes for entry in board.entries]
    total = [entry.total_bytes for entry in board.entries]
    size = Panel("bytes of the model", limits.model_bytes, model)
    if board.counts_code:
        size = Panel("bytes of code and model", limits.total_bytes, total)
    return [Panel("training seconds", limits.train_seconds, seconds), size]


def draw(board: Board) -> bytes:
    """The picture as SVG: val_bpb by each panel's values, a point an entry.

    The same entries give the same bytes.
    """
    panels = panels_of(board)
    file = io.BytesIO()
    with pyplot.style.context(STYLE, after_reset=True):
        figure, places = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True)
        figure.subplots_adjust(left=0.07, right=0.98, bottom=0.12, top=0.92, wspace=0.05)
        for axes, panel in zip(places, panels):
            _draw_points(axes, panel, board.entries)
        for axes, panel in zip(places, panels):  # when the limits of both are final
            _label(axes, panel, board.entries)
        places[0].set_ylabel("val_bpb, mean over seeds")
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
    return file.getvalue()


def _draw_points(axes: pyplot.Axes, panel: Panel, entries: Sequence[Entry]) -> None:
    """A point an entry that tells the value; a dashed line at the cap."""
    for number, (entry, value) in enumerate(zip(entries, panel.values)):
        if value is not None:
            axes.plot(value, entry.bpb, "o", ms=6, color=f"C{number}")
    notes = []
    if panel.cap is not None:
        axes.axvline(panel.cap, ls="--", lw=1, color="gray")
        notes.append(f"dashed: the cap, {panel.cap:,.0f}")
    if None in panel.values:
        notes.append(f"not told by {panel.values.count(None)} of {len(entries)} entries")
    axes.margins(0.1, 0.1)
    axes.locator_params(axis="x", nbins=6)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set(title=f"val_bpb by {panel.counted}", xlabel="; ".join([panel.counted, *notes]))


def _label(axes: pyplot.Axes, panel: Panel, entries: Sequence[Entry]) -> None:
    """Rank and name beside each point, towards the middle, none on top of another."""
    told = [index for index, value in enumerate(panel.values) if value is not None]
    ranks = _places(entries)
    across = _within([panel.values[index] for index in told], axes.get_xlim())
    heights = _within([entries[index].bpb for index in told], axes.get_ylim())
    for index, x, y in zip(told, across, apart(heights, GAP)):
        name = re.sub(r"^\d{4}-\d\d-\d\d_", "", entries[index].name)
        left = x > 0.5
        axes.annotate(
            f"{ranks[index]}  {shown(name, LONGEST_LABEL)}",
            (panel.values[index], entries[index].bpb),
            (x - BESIDE if left else x + BESIDE, y),
            textcoords="axes fraction",
            ha="right" if left else "left",
            va="center",
            fontsize=8,
            parse_math=False,  # a name may hold dollar signs
            arrowprops=dict(arrowstyle="-", lw=0.6, color=f"C{index}", shrinkA=1, shrinkB=3),
        )


def _within(values: Sequence[float], limits: tuple[float, float]) -> list[float]:
    """Places on an axis: 0 at its lower limit, 1 at its upper."""
    low, high = limits
    return [(value - low) / (high - low) for value in values]


def apart(heights: Sequence[float], gap: float) -> list[float]:
    """Heights within 0 to 1, in the order given, moved until all are a gap apart.

    The gap is smaller where there is no room for it.
    """
    gap = min(gap, 1 / max(len(heights), 1))
    order = sorted(range(len(heights)), key=heights.__getitem__)
    moved = list(heights)
    lowest = 0.0
    for index in order:
        moved[index] = lowest = max(moved[index], lowest)
        lowest += gap
    highest = 1.0
    for index in reversed(order):
        moved[index] = highest = min(moved[index], highest)
        highest -= gap
    return moved


# --- the pages ------------------------------------------------------------------------------------


def files_of(board: Board) -> tuple[dict[Path, bytes | None], list[str]]:
    """What the entries give -> file: its content, None for one that should not be there; notes.

    The track's page and the repository's, where they have markers, and the picture if one of them
    has. RecordError if a page's markers are no pair.
    """
    top = board.path.parent.parent / "README.md"
    prefix = f"{board.path.parent.name}/{board.path.name}/"
    pages = {
        board.path / "README.md": ("", "<!-- board -->"),
        top: (prefix, f"<!-- board {board.track} -->"),
    }
    files: dict[Path, bytes | None] = {}
    notes = []
    for page, (prefix, mark) in pages.items():
        text = read_text(page) if page.is_file() else ""
        inside = _between(text, mark, page)
        if inside is None:
            notes.append(f"{page}: no markers {mark} and {END}, left as it is")
        else:
            new = f"{text[: inside.start]}\n{block(board, prefix)}\n\n{text[inside.stop :]}"
            files[page] = new.encode()
    # Written first and taken away last, so that no page shows a picture that is not there.
    if files and board.entries:
        files = {board.picture: draw(board), **files}
    elif files:
        files[board.picture] = None
    return files, notes


def _between(text: str, mark: str, page: Path) -> slice | None:
    """Where a page has its block, between two markers on lines of their own; None without."""
    starts = [found.end() for found in re.finditer(rf"^{re.escape(mark)}\n", text, re.M)]
    if not starts:
        return None
    end = re.compile(rf"^{re.escape(END)}$", re.M).search(text, starts[0])
    if len(starts) > 1 or end is None or "<!-- board" in text[starts[0] : end.start()]:
        raise RecordError(f"{page}: expected {mark} once, and {END} below it")
    return slice(starts[0], end.start())
