"""A track's leaderboard: ranks and figures, what is refused, the picture, the pages' blocks."""

import json
import math
import re
import shutil

import pytest
import record
from conftest import ROOT
from record_help import GONE, edit_json, edit_result
from tool import board, checks
from tool.folder import Folder
from tool.page import pyplot
from tool.runs import RecordError
from tool.submission import Typed, summarize

import train_gpt as tg

SCRIPT = 'import os\n\nSEED = int(os.environ.get("SEED", 1))\nprint(SEED)\n'
TOKENS, TEXT_BYTES = 255_423, 728_927  # of the demo's validation split
PAGE = "# A track\n\n## Leaderboard\n\n<!-- board -->\n<!-- end board -->\n\nRules: 1 \\ 2.\n"
LOG = """seed:{seed}
Code size: {code} bytes
Serialized model zstd: {model} bytes
Total submission size zstd: {total} bytes
"""
RESULT = """{
    "status": "finished", "exit_code": 0, "config_sha256": "c", "artifact_sha256": "a",
    "settings": {}, "overrides": {}, "world_size": 1, "versions": {"torch": "2.13.0"},
    "machine": {"type": "cpu", "device": "AMD EPYC (2 threads)"},
    "data": {"tokenizer_sha256": "t", "val_sha256": ["v"]},
    "seconds": {"train": 280.0, "calibrate": 20.0, "train_side": 300.0, "eval_side": 75.0,
                "wall": 400.0},
    "steps": 366, "train_seconds": 280.0, "train_tokens": 2998272, "train_flops": 2.83e13
}"""


# --- entries by hand ------------------------------------------------------------------------------


def stage(metric, bpb):
    """A stage of a result whose loss, score and bytes belong together."""
    loss = bpb * math.log(2) * TEXT_BYTES / TOKENS
    told = {"metric": metric, metric: bpb, "val_loss": loss}
    return {**told, "tokens": TOKENS, "bytes": TEXT_BYTES, "audit": {"order": {"verdict": "PASS"}}}


def write_log(folder, seed, stages, model):
    """A finished run's log: sizes, the exact scores, the result; the last valid stage counts."""
    code = len(SCRIPT)
    sizes = dict(code=code, model=model, total=code + model)
    lines = LOG.format(seed=seed, **sizes).splitlines()
    for name, told in stages.items():
        score = f"val_loss:{told['val_loss']:.8f} {told['metric']}:{told[told['metric']]:.8f}"
        lines.append(f"final_zstd_{name}_exact {score}")
    name = [name for name, told in stages.items() if told["metric"] == "val_bpb"][-1]
    result = {
        **json.loads(RESULT),
        "seed": seed,
        "stages": stages,
        "result": {"stage": name, **stages[name]},
        "sizes": {**sizes, "cap": 16_000_000},
        "code_sha256": tg.sha256(folder / "train_gpt.py"),
    }
    lines.append(f"result_json: {json.dumps(result)}")
    (folder / f"train_seed{seed}.log").write_text("\n".join(lines) + "\n")


def tell(folder, **typed):
    """submission.json of the logs that are there."""
    typed = Typed(**{"name": "x", "author": "a", **typed, "all_runs": []})
    seeds = [run.seed for run in Folder(folder).runs]
    typed.all_runs = [{"seed": seed, "included": True} for seed in seeds]
    (folder / "submission.json").write_text(json.dumps(summarize(Folder(folder), typed)))


def entry(track, name, scores, evaluator="sliding", model=(), besides=(), **typed):
    """A record folder with a log a seed; scores: bpb of seeds 1, 2, ...

    besides: (stage, metric, value) of what is printed after the score, for every seed.
    """
    folder = track / name
    folder.mkdir()
    (folder / "train_gpt.py").write_text(SCRIPT)
    (folder / "requirements.txt").write_text("torch==2.13.0\n")
    (folder / "README.md").write_text(f"# {name}\n\n## Results\n")
    for place, bpb in enumerate(scores):
        stages = {"plain": stage("val_bpb", bpb + 0.125), evaluator: stage("val_bpb", bpb)}
        stages |= {other: stage(metric, value) for other, metric, value in besides}
        write_log(folder, place + 1, stages, model[place] if model else 964_633)
    tell(folder, **{"track": track.name[6:], "date": name[:10], **typed})
    return folder


def new_track(root):
    """The folder of a CPU track without entries, its page with markers, and the first page's."""
    folder = root / "records" / "track_cpu_1mb"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(PAGE)
    (root / "README.md").write_text("# All\n\n<!-- board cpu_1mb -->\n<!-- end board -->\n")
    return folder


@pytest.fixture
def track(tmp_path):
    return new_track(tmp_path)


def run(track, *options):
    """The command's exit code."""
    return record.main(["board", str(track), *options])


def rows_of(page):
    """The table of a page: a dict a row, cells by the heads of their columns."""
    lines = [line for line in page.read_text().splitlines() if line.startswith("| ")]
    head, _, *rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    return [dict(zip((cell.strip() for cell in head), map(str.strip, row))) for row in rows]


def column(page, name):
    return [row[name] for row in rows_of(page)]


# --- figures --------------------------------------------------------------------------------------


def test_a_row_has_the_figures_of_the_logs(track):
    folder = entry(
        track,
        "2026-12-01_ours",
        [1.5, 1.25, 1.0],
        model=[964_633, 970_000, 960_000],
        besides=[("ngram", "unnormalised_score", 0.5), ("ttt", "adapted_before_scoring", 1.125)],
        matmul_gflops=81.9,
    )
    edit_result(folder / "train_seed3.log", {"seconds.train": 283.0, "seconds.train_side": 303.0})
    assert run(track) == 0
    (row,) = rows_of(track / "README.md")
    assert row == {
        "rank": "1",
        "entry": "[2026-12-01_ours](2026-12-01_ours/README.md)",
        "val_bpb": "1.250000",
        "std": "0.250000",
        "seeds": "3",
        "evaluator": "sliding",
        "other figures, not scores": "`unnormalised_score` 0.500000 (ngram); "
        "`adapted_before_scoring` 1.125000 (ttt)",
        "model bytes": "970,000",
        "training s": "301.0",
        "scoring s": "75.0",
        "train FLOPs": "2.83e+13",
        "machine": "1 x AMD EPYC (2 threads), 81.9 GFLOP/s",
        "date": "2026-12-01",
    }
    assert "All scored 728,927 bytes" in (track / "README.md").read_text()


def test_what_is_not_told_is_a_dash(track):
    folder = entry(track, "2026-12-01_ours", [1.5])
    edit_result(folder / "train_seed1.log", {"train_flops": GONE, "machine.device": None})
    tell(folder, track="cpu_1mb")
    assert run(track) == 0
    (row,) = rows_of(track / "README.md")
    dashes = [name for name, cell in row.items() if cell == "-"]
    assert dashes == ["std", "other figures, not scores", "train FLOPs", "machine", "date"]


def test_logs_without_a_result_tell_what_they_print(track):
    """As other people's do: scores and sizes, no FLOPs; here a machine and seconds, too."""
    folder = entry(track, "2026-12-01_theirs", [1.5, 1.25])
    for log in folder.glob("*.log"):
        *lines, _ = log.read_text().splitlines()
        more = ["NVIDIA H100 80GB HBM3", "step:9/9 train_time:300000ms step_avg:1ms"]
        log.write_text("\n".join([*more, *lines]) + "\n")
    told = {"track": "cpu_1mb", "val_bpb": 1.375, "date": "2026-12-01T00:00:00Z"}
    (folder / "submission.json").write_text(json.dumps(told))
    assert run(track) == 0
    (row,) = rows_of(track / "README.md")
    assert (row["val_bpb"], row["std"], row["seeds"]) == ("1.375000", "0.176777", "2")
    assert (row["evaluator"], row["model bytes"]) == ("sliding", "964,633")
    assert (row["training s"], row["scoring s"], row["train FLOPs"]) == ("300.0", "-", "-")
    assert (row["machine"], row["date"]) == ("NVIDIA H100 80GB HBM3", "2026-12-01")


def test_a_size_that_one_log_lacks_is_not_told(track):
    folder = entry(track, "2026-12-01_ours", [1.5, 1.25])
    log = folder / "train_seed2.log"
    log.write_text(re.sub(r"Serialized model.*\n", "", log.read_text()))
    assert board.read_entry(folder, "cpu_1mb").model_bytes is None


def test_where_code_counts_total_bytes_stand_beside(track):
    track = track.rename(track.with_name("track_non_record_16mb"))
    entry(track, "2026-12-01_ours", [1.5, 1.25], model=[15_000_000, 14_000_000])
    assert run(track) == 0
    (row,) = rows_of(track / "README.md")
    total = 15_000_000 + len(SCRIPT)
    assert (row["model bytes"], row["total bytes"]) == ("15,000,000", f"{total:,}")
    seconds, size = board.panels_of(board.read_board(track))
    assert (size.values, size.cap) == ([total], 16_000_000)
    assert (seconds.values, seconds.cap) == ([300.0], None)


def test_scores_of_two_texts_are_pointed_out(track):
    entry(track, "2026-12-01_ours", [1.5])
    other = entry(track, "2026-12-01_other", [1.25])
    half = {"result.bytes": TEXT_BYTES - 1, "stages.sliding.bytes": TEXT_BYTES - 1}
    edit_result(other / "train_seed1.log", half)
    tell(other, track="cpu_1mb")
    assert run(track) == 0
    words = "one validation text: 2026-12-01_other: 728,926 bytes; 2026-12-01_ours: 728,927 bytes."
    assert words in (track / "README.md").read_text()


# --- order ----------------------------------------------------------------------------------------


def test_the_lowest_score_is_first_and_equal_ones_share_a_rank(track):
    """By the digits that are shown; of equal ones the earlier is first."""
    entry(track, "2026-12-03_a", [1.5, 1.25])
    entry(track, "2026-12-02_b", [1.3750004])
    entry(track, "2026-12-01_c", [1.5])
    entry(track, "2026-12-04_d", [1.0, 2.0, 1.5])
    entry(track, "2026-12-05_e", [1.25])
    assert run(track) == 0
    page = track / "README.md"
    names = [re.search(r"_(\w)\]", cell)[1] for cell in column(page, "entry")]
    assert (names, column(page, "rank")) == (list("ebacd"), ["1", "2", "2", "4", "4"])


# --- who is not ranked ----------------------------------------------------------------------------


def without_logs(folder):
    for log in folder.glob("*.log"):
        log.unlink()


def with_a_better_score(folder):
    edit_json(folder / "submission.json", {"val_bpb": 1.0})


def with_half_a_json(folder):
    (folder / "submission.json").write_text('{"track": "cpu_1mb", "val_')


def of_another_track(folder):
    edit_json(folder / "submission.json", {"track": "non_record_16mb"})


def over_the_cap(folder):
    write_log(folder, 1, {"sliding": stage("val_bpb", 1.5)}, 1_000_001)
    tell(folder, track="cpu_1mb")


def with_a_network(folder):
    (folder / "train_gpt.py").write_text("import requests\n")


def with_a_partial_score(folder):
    """In a log without a result, whose last score is of a prefix."""
    log = folder / "train_seed1.log"
    *lines, _ = log.read_text().replace("val_bpb:", "partial_bpb:").splitlines()
    log.write_text("\n".join(lines))
    edit_json(folder / "submission.json", {"val_bpb": 1.5})


@pytest.mark.parametrize(
    "damage, reason",
    [
        (without_logs, "P2 no training log in the folder"),
        (with_a_better_score, "P2 val_bpb is 1.0, the logs give 1.5"),
        (with_half_a_json, "P2 submission.json is no JSON object"),
        (of_another_track, "its submission.json names the track non_record_16mb"),
        (over_the_cap, "1 over the cap of 1000000"),
        (with_a_network, "S6 line 1: imports requests"),
        (with_a_partial_score, "no log with a final val_bpb"),
    ],
)
def test_a_damaged_entry_is_refused_with_its_reason(track, damage, reason):
    entry(track, "2026-12-01_good", [1.75])
    damage(entry(track, "2026-12-02_bad", [1.5]))
    found = board.read_board(track)
    assert [entry.name for entry in found.entries] == ["2026-12-01_good"]
    assert found.refused.keys() == {"2026-12-02_bad"}
    assert reason in found.refused["2026-12-02_bad"]


def test_who_is_refused_is_said_and_has_no_rank(track, capsys):
    entry(track, "2026-12-01_good", [1.75])
    without_logs(entry(track, "2026-12-02_bad", [1.5]))
    assert run(track) == 0
    assert "2026-12-02_bad: not ranked: P2 no training log" in capsys.readouterr().out
    page = track / "README.md"
    assert [cell[1:16] for cell in column(page, "entry")] == ["2026-12-01_good"]
    assert "says why): [2026-12-02_bad](2026-12-02_bad/README.md)." in page.read_text()
    assert b"bad" not in (track / "board.svg").read_bytes()


def test_a_recipe_is_no_entry(track, capsys):
    (track / "baseline").mkdir()
    (track / "baseline" / "config.env").write_text("SEED=1\n")
    shutil.copytree(entry(track, "2026-12-01_a", [1.5]), track / ".2026-12-01_draft")
    assert run(track) == 0
    said = capsys.readouterr().out
    assert "baseline: no submission.json, so no entry: skipped" in said
    assert "draft" not in said
    assert "entries ranked: 1;" in said
    assert "baseline" not in (track / "README.md").read_text()


# --- the picture ----------------------------------------------------------------------------------


def test_the_picture_is_the_same_for_the_same_entries(track):
    entry(track, "2026-12-01_ours", [1.5])
    entry(track, "2026-12-02_b$x$&<", [1.25])
    found = board.read_board(track)
    first = board.draw(found)
    with pyplot.style.context({"lines.linewidth": 9, "font.size": 30, "axes.grid": True}):
        pyplot.plot([1, 2])
        assert board.draw(found) == first
    pyplot.close("all")
    text = first.decode()
    assert text.count(">2  ours<") == text.count(">1  b$x$&amp;&lt;<") == 2
    assert "cap, 1,000,000" in text
    assert not re.search(r"<dc:date>|20\d\d-\d\d-\d\d", text)


def places_of(axes):
    """(x, y) of the points, without the line at the cap."""
    lines = [line for line in axes.lines if line.get_marker() == "o"]
    return [(line.get_xdata()[0], line.get_ydata()[0]) for line in lines]


def test_a_panel_has_a_point_for_every_entry_that_tells(track):
    entry(track, "2026-12-01_a", [1.5], model=[900_000])
    untold = entry(track, "2026-12-01_b", [1.25], model=[800_000])
    log = untold / "train_seed1.log"
    log.write_text(re.sub(r"Serialized model.*\n", "", log.read_text()))
    found = board.read_board(track)
    drawn = []
    for panel in board.panels_of(found):
        axes = pyplot.figure().subplots()
        board._draw_points(axes, panel, found.entries)
        board._label(axes, panel, found.entries)
        texts = [text.get_text() for text in axes.texts]
        drawn.append((places_of(axes), texts, axes.get_xlabel()))
    pyplot.close("all")
    assert drawn == [
        ([(300.0, 1.25), (300.0, 1.5)], ["1  b", "2  a"], "training seconds"),
        (
            [(900_000, 1.5)],
            ["2  a"],
            "bytes of the model; dashed: the cap, 1,000,000; not told by 1 of 2 entries",
        ),
    ]


def test_labels_do_not_cover_each_other(track):
    """Those of a dozen entries that have two scores only."""
    one = board.read_entry(entry(track, "2026-12-01_a", [1.5]), "cpu_1mb")
    many = [board.dataclasses.replace(one, bpb=1.5 + n // 6, name=f"x{n}") for n in range(12)]
    figure = pyplot.figure(figsize=(5.5, 4.5))
    axes = figure.subplots()
    panel = board.Panel("x", None, [300.0 + n % 3 for n in range(12)])
    board._draw_points(axes, panel, many)
    board._label(axes, panel, many)
    figure.canvas.draw()
    boxes = [pyplot.Text.get_window_extent(text) for text in axes.texts]  # without their lines
    boxes.sort(key=lambda box: box.y0)
    assert all(low.y1 <= high.y0 for low, high in zip(boxes, boxes[1:]))
    inside = axes.get_window_extent()
    assert all(inside.x0 <= box.x0 and box.x1 <= inside.x1 for box in boxes)
    pyplot.close("all")


@pytest.mark.parametrize(
    "heights, moved",
    [
        ([], []),
        ([0.5], [0.5]),
        ([0.5, 0.125], [0.5, 0.125]),
        ([0.5, 0.5], [0.5, 0.75]),
        ([1.0, 1.0, 0.0], [0.75, 1.0, 0.0]),
        ([0.5] * 8, [0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0]),
    ],
)
def test_heights_are_moved_apart_within_the_panel(heights, moved):
    assert board.apart(heights, 0.25) == moved


# --- pages ----------------------------------------------------------------------------------------


def test_only_what_is_between_the_markers_changes(track):
    entry(track, "2026-12-01_ours", [1.5])
    assert run(track) == 0
    page = (track / "README.md").read_text()
    before, after = PAGE.split("<!-- end board -->")
    assert page.startswith(before)
    assert page.endswith(f"\n\n<!-- end board -->{after}")
    assert "\n\n![val_bpb of each entry by training seconds and by bytes; " in page
    assert "the lowest is 1.500000](board.svg)\n\n" in page
    top = track.parent.parent / "README.md"
    folder = "records/track_cpu_1mb"
    assert column(top, "entry") == [f"[2026-12-01_ours]({folder}/2026-12-01_ours/README.md)"]
    assert f"]({folder}/board.svg)" in top.read_text()


def test_a_track_without_entries_has_no_picture(track):
    assert run(track) == 0
    page = (track / "README.md").read_text()
    assert "No entries yet." in page
    assert "board.svg" not in page
    assert not (track / "board.svg").exists()
    assert run(track, "--check") == 0
    folder = entry(track, "2026-12-01_ours", [1.5])
    assert run(track) == 0
    assert (track / "board.svg").is_file()
    shutil.rmtree(folder)
    assert run(track, "--check") == 1
    assert run(track) == 0
    assert (track / "README.md").read_text() == page
    assert [path.name for path in track.iterdir()] == ["README.md"]


def test_pages_without_markers_are_left_alone(track, capsys):
    entry(track, "2026-12-01_ours", [1.5])
    (track / "README.md").write_text("# A track: `<!-- board -->`\n")
    (track.parent.parent / "README.md").unlink()
    for options in ((), ("--check",)):
        assert run(track, *options) == 0
        assert capsys.readouterr().out.count("README.md: no markers <!-- board") == 2
    assert (track / "README.md").read_text() == "# A track: `<!-- board -->`\n"
    assert not (track / "board.svg").exists()


@pytest.mark.parametrize(
    "page",
    [
        "<!-- board -->\n",
        "<!-- end board -->\n<!-- board -->\n",
        "<!-- board -->\n<!-- end board -->\n" * 2,
        "<!-- board -->\n<!-- board cpu_1mb -->\n<!-- end board -->\n",
    ],
)
def test_markers_that_are_no_pair_are_an_error(track, capsys, page):
    (track / "README.md").write_text(page)
    assert run(track) == 64
    assert "README.md: expected <!-- board --> once, and" in capsys.readouterr().err
    assert (track / "README.md").read_text() == page


def test_what_files_say_breaks_no_page(track):
    """A date that ends the cell, the line and the block."""
    entry(track, "2026-12-01_a", [1.5], date="|x\n<!-- end board -->")
    folder = entry(track, "2026-12-01_[b](c)", [1.25], matmul_gflops="`|")
    assert run(track) == 0
    assert run(track, "--check") == 0
    page = track / "README.md"
    assert column(page, "rank") == ["1", "2"]
    assert column(page, "machine")[0].endswith(r", \`\| GFLOP/s")
    target = f"{folder.name[:11]}%5Bb%5D%28c%29/README.md"
    assert column(page, "entry")[0] == rf"[2026-12-01_\[b\](c)]({target})"


@pytest.mark.parametrize("name", ["records", "track_x", "track_y"])
def test_a_folder_that_is_no_track_is_an_error(tmp_path, capsys, name):
    (tmp_path / "records").mkdir()
    (tmp_path / "track_y").write_text("a file")
    assert run(tmp_path / name) == 64
    assert f"{name}: no track; expected a folder" in capsys.readouterr().err
    with pytest.raises(RecordError):
        board.read_board(tmp_path / name)


# --- up to date -----------------------------------------------------------------------------------


def another_entry(track):
    entry(track, "2026-12-02_new", [1.25])


def other_seconds(track):
    edit_result(track / "2026-12-01_a" / "train_seed1.log", {"seconds.eval_side": 80.0})
    tell(track / "2026-12-01_a", track="cpu_1mb", date="2026-12-01")


def page_by_hand(track):
    page = track / "README.md"
    page.write_text(page.read_text().replace("1.500000", "1.400000"))


def picture_by_hand(track):
    picture = track / "board.svg"
    picture.write_bytes(picture.read_bytes().replace(b"300", b"200"))


def picture_gone(track):
    (track / "board.svg").unlink()


PICTURE = "records/track_cpu_1mb/board.svg"
TRACK_PAGE = "records/track_cpu_1mb/README.md"
CHANGES = {
    another_entry: [PICTURE, TRACK_PAGE, "README.md"],
    other_seconds: [TRACK_PAGE, "README.md"],
    page_by_hand: [TRACK_PAGE],
    picture_by_hand: [PICTURE],
    picture_gone: [PICTURE],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A repository with one entry, its board written."""
    root = tmp_path_factory.mktemp("finished")
    track = new_track(root)
    entry(track, "2026-12-01_a", [1.5])
    assert run(track, "--check") == 1
    assert not (track / "board.svg").exists()
    assert run(track) == 0
    assert run(track, "--check") == 0
    return root


@pytest.mark.parametrize("change", CHANGES)
def test_check_says_what_is_not_what_the_entries_give(finished, tmp_path, capsys, change):
    root = shutil.copytree(finished, tmp_path / "copy")
    track = root / "records" / "track_cpu_1mb"
    change(track)
    files = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert run(track, "--check") == 1
    said = capsys.readouterr().out
    assert re.findall(r"(\S+): not what the entries give", said) == [
        str(root / name) for name in CHANGES[change]
    ]
    assert files == {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


OWN = [path.parent for path in ROOT.glob("records/track_*/README.md")]
OWN = [path for path in OWN if "<!-- board -->" in (path / "README.md").read_text()]


def test_the_repository_has_a_board():
    assert ROOT / "records" / "track_cpu_1mb" in OWN


@pytest.mark.parametrize("path", OWN, ids=str)
def test_the_repositorys_boards_are_up_to_date(path, monkeypatch, capsys):
    """`record.py board TRACK` renews one. The scripts' text, seconds an entry, is not read here."""
    monkeypatch.setattr(checks, "static_checks", lambda text, **inputs: [])
    assert run(path, "--check") == 0, capsys.readouterr().out
