"""Parts of the record tool on their own: comparisons by the book, findings, config files."""

import dataclasses
import json
import math
import sys

import numpy as np
import pytest
import record
import tool
from record_help import expect, find
from tool import compare, logs, package, page, runs, strip, submission
from tool.case import Case
from tool.finding import Problems, as_json, render, skipped, text_of, worst_verdict
from tool.folder import Folder, config_text, parse_config

import train_gpt as tg

# --- compare --------------------------------------------------------------------------------------

OLD = {1: 2.0730, 2: 2.0741, 3: 2.0725, 4: 2.0729}
NEW = {1: 2.0610, 2: 2.0605, 3: 2.0622}


def sample(losses, tokens=62_021_632, bytes_per_token=2.436):
    scores = {seed: loss / math.log(2) / bytes_per_token for seed, loss in losses.items()}
    return compare.Sample("x", losses, scores, tokens, [])


def student_tail(t, df):
    """The chance of more than t by Student's distribution: its density, summed on a grid."""
    grid = np.linspace(t, t + 4000, 4_000_001)
    scale = math.gamma((df + 1) / 2) / math.sqrt(df * math.pi) / math.gamma(df / 2)
    density = scale * (1 + grid**2 / df) ** (-(df + 1) / 2)
    return density.sum() * 0.001


def welch_by_the_book(old, new, margin):
    """t and degrees of freedom for means that differ by more than the margin."""
    a = np.array(list(old.values()))
    b = np.array(list(new.values()))
    variance_a = a.var(ddof=1) / len(a)
    variance_b = b.var(ddof=1) / len(b)
    total = variance_a + variance_b
    t = (a.mean() - margin - b.mean()) / math.sqrt(total)
    df = total**2 / (variance_a**2 / (len(a) - 1) + variance_b**2 / (len(b) - 1))
    return t, df


def test_compare_is_welch_by_the_book():
    result = compare.compare(sample(OLD), sample(NEW))
    for margin, test in ((0.0, result.welch), (0.005, result.welch_margin)):
        t, df = welch_by_the_book(OLD, NEW, margin)
        p = student_tail(t, df)
        assert abs(test.t - t) < 1e-9
        assert abs(test.df - df) < 1e-9
        assert abs(test.p - p) < 1e-3 * p + 1e-7
    assert result.unit == "nats per token"


def test_seeds_that_both_have_are_compared_in_pairs():
    result = compare.compare(sample(OLD), sample(NEW))
    assert list(result.pairs) == [1, 2, 3]
    gaps = np.array([OLD[seed] - NEW[seed] for seed in (1, 2, 3)])
    assert np.allclose(list(result.pairs.values()), gaps)
    t = gaps.mean() / (gaps.std(ddof=1) / math.sqrt(3))
    assert abs(result.paired.t - t) < 1e-9
    assert abs(result.paired.p - student_tail(t, 2)) < 1e-4


def shifted(gain):
    return {seed: loss - gain + 1e-4 * (seed % 2) for seed, loss in OLD.items()}


@pytest.mark.parametrize(
    "gain, words",
    [
        (0.012, "new is better by more than the margin (p "),
        (0.004, "new is better, but not shown to be by more than the margin (p "),
        (0.0001, "no difference is shown (p "),
        (-0.004, "new is worse (p "),
    ],
)
def test_a_comparison_ends_with_a_sentence(gain, words):
    found = compare.compare(sample(OLD), sample(shifted(gain)))
    assert compare.describe(found).splitlines()[-1].startswith(f"verdict: {words}")


@pytest.mark.parametrize("count, words", [(2, "two seeds"), (1, "one seed")])
def test_few_seeds_cannot_tell(count, words):
    few = dict(list(NEW.items())[:count])
    text = compare.describe(compare.compare(sample(OLD), sample(few)))
    assert f"verdict: {words} cannot tell; 3 on each side are needed (gain 0.01" in text


@pytest.mark.filterwarnings("ignore:Precision loss")
def test_seeds_without_any_spread_cannot_tell():
    same = dict.fromkeys((1, 2, 3), 2.0)
    found = compare.compare(sample(same), sample(same))
    assert compare.verdict(found).startswith("verdict: seeds that all score the same cannot tell")


def test_a_gain_has_one_sign():
    text = compare.describe(compare.compare(sample(OLD), sample(NEW)))
    assert "gain 0.011" in text
    assert "gain by seed: 1 +0.012000, 2 +0.013600, 3 +0.010300" in text


def test_compare_refuses_a_p_value_under_three_seeds():
    result = compare.compare(sample(OLD), sample({1: 2.0, 2: 2.01}))
    assert result.welch is None
    assert "no p value from 2 seeds" in compare.describe(result)


def test_compare_converts_across_tokenizers():
    """Another number of tokens, or of bytes a token: bits per byte, and the margin in them."""
    longer = {seed: 1.5 * loss for seed, loss in OLD.items()}
    for other in (sample(longer, 40_540_160, 3.726), sample(OLD, bytes_per_token=2.5)):
        result = compare.compare(sample(OLD), other)
        assert result.unit == "bits per byte"
        assert abs(result.margin - 0.005 / math.log(2) / 2.436) < 1e-9


# --- findings -------------------------------------------------------------------------------------


def test_the_worst_problem_decides_and_comes_first():
    problems = Problems()
    problems.skip("c")
    problems.warn("a")
    problems.fail("b")
    problems.warn("a")  # said once
    finding = problems.outcome("P2", "all is well", n=1)
    expect(finding, "FAIL", "b; a; c")
    assert finding.failed
    assert finding.figures == {"n": 1}
    expect(Problems().outcome("P2", "all is well"), "PASS", "all is well")


def test_many_problems_are_counted_not_listed():
    problems = Problems()
    for number in range(20):
        problems.warn(f"<{number}>")
    finding = problems.outcome("P2", "")
    assert text_of(finding).endswith("<5>; and 14 more")


def test_a_skipped_check_has_not_passed():
    passed = tg.Check("P1", found="good")
    findings = [passed, tg.Check("P2", "bad"), skipped("R6", "no data")]
    assert worst_verdict(findings) == "FAIL"
    assert render(findings).splitlines()[0] == "P1   PASS     good"
    assert render(findings).endswith("1 PASS, 0 WARN, 1 FAIL, 1 SKIPPED")
    assert worst_verdict([passed, findings[2]]) == "PASS"
    rows = json.loads(as_json(findings, folder="x"))["findings"]
    assert [row["verdict"] for row in rows] == ["PASS", "FAIL", "SKIPPED"]
    assert [row["text"] for row in rows] == ["good", "bad", "no data"]


# --- compliance -----------------------------------------------------------------------------------


COMPLIANT = """{
    "seconds": {"train_side": 500.0, "eval_side": 500.0},
    "sizes": {"total": 15000000},
    "stages": {"sliding": {"audit": {"order": {"verdict": "PASS"}, "future": {"verdict": "PASS"}}}},
    "settings": {"ngram": "", "ngram_order": 7, "ngram_alpha": 0.4, "tilt": false}
}"""


def run_of(seed=1, edits=""):
    """A run of 500 s each side whose stages passed everything, with edits like sizes.total=1."""
    result = json.loads(COMPLIANT)
    for edit in edits.split():
        dotted, value = edit.split("=")
        *path, last = dotted.split(".")
        place = result
        for name in path:
            place = place[name]
        place[last] = json.loads(value)
    return logs.Run("x.log", "", {"seed": seed}, [], {}, [], [], result)


# A field of compliance, and what in one of the runs makes it false.
REASONS = """
train_under_600s: seconds.train_side=600.1
eval_under_600s: seconds.eval_side=600.1
artifact_under_16mb: sizes.total=16000001
no_slot: settings.slot_enabled=true settings.slot_steps=8
no_slot: settings.slot_lr=0.1
no_slot: stages.sliding.audit.future.verdict="FAIL"
no_etlb: settings.use_etlb=1
no_ngram_cache: settings.ngram="mix"
no_ngram_cache: settings.ngram="backoff"
no_ngram_cache: settings.tilt=true
no_pre_quant_ttt: stages.sliding.audit.order.verdict="FAIL"
score_first_ttt: stages.sliding.audit.order.verdict="FAIL"
"""


@pytest.mark.parametrize("reason", REASONS.strip().splitlines())
def test_each_field_of_compliance_is_false_for_its_reason(reason):
    field, edits = reason.split(": ")
    made = [run_of(1), run_of(2, edits), run_of(3)]
    told = submission.compliance(made, 16_000_000)
    assert told[field] is False
    if "verdict" not in edits:
        assert list(told.values()).count(False) == 1


def test_three_seeds_are_three_different_ones():
    made = [run_of(1), run_of(2), run_of(2)]
    assert submission.compliance(made, 16_000_000)["three_seeds"] is False


@pytest.mark.parametrize(
    "idle",
    [
        "",
        "settings.slot_enabled=false settings.slot_steps=8",
        "settings.etlb_enabled=0 settings.etlb_lr=0.1",
    ],
)
def test_every_field_of_compliance_is_true_of_a_compliant_record(idle):
    """Settings of techniques that are off (orders, rates) do not count."""
    told = submission.compliance([run_of(seed, idle) for seed in (1, 2, 3)], 16_000_000)
    assert set(told.values()) == {True}


def test_an_artifact_is_held_to_the_runs_own_cap_too():
    told = submission.compliance([run_of(1, "sizes.total=1000001")], 1_000_000)
    assert told["artifact_under_16mb"] is False


# --- the page -------------------------------------------------------------------------------------


MADE = """
{"seed": 1, "run": "seed_1", "status": "finished", "exit_code": 0, "included": true}
{"seed": 1, "run": "seed_1.attempt1", "status": "interrupted", "exit_code": 143}
{"seed": 1, "run": "other", "status": "finished", "exit_code": 0}
{"seed": 2, "run": "seed_2", "status": "finished", "exit_code": 0}
{"seed": 3, "run": "seed_3", "status": "finished", "exit_code": 4}
"""
SHOWN = """
| 1 | finished | 1.234568 | yes |
| 1 | interrupted (exit code 143) | none | no: it did not finish, run again (`seed_1.attempt1`) |
| 1 | finished | 1.234568 | no: another run of the same seed (`other`) |
| 2 | finished | 1.234568 | no: a seed that was not chosen (`seed_2`) |
| 3 | finished (exit code 4) | none | no: it did not finish (`seed_3`) |
"""


def test_every_run_of_the_list_says_why_it_is_in_the_record_or_not():
    made = [{"included": False, **json.loads(line)} for line in MADE.strip().splitlines()]
    for run in made:
        run["val_bpb"] = None if run["exit_code"] else 1.23456789012345
    assert page.runs_table(made).splitlines()[2:] == SHOWN.strip().splitlines()


METRICS = """{"step": 1, "train_loss": 5.5}
{"step": 2, "train_loss": null}
{"step": 3, "train_loss": 5.25}
{"step": 3, "val_loss": 5.125, "val_bpb": 7.4}
{"step": 4, "train_l"""


def test_curves_are_of_every_step_and_of_the_log_if_there_is_no_more(tmp_path):
    run = logs.Run("x.log", "", {}, [], {}, [(10, 4.0)], [(20, 3.0, 1.5)])
    curves = page.curves_of(tmp_path, run)
    assert (curves.training, curves.validation) == ({10: 4.0}, {20: 3.0})
    (tmp_path / "metrics.jsonl").write_text(METRICS)
    curves = page.curves_of(tmp_path, run)
    assert (curves.training, curves.validation) == ({1: 5.5, 3: 5.25}, {3: 5.125})


def test_scores_are_drawn_as_points_with_mean_and_deviation_from_zero_on():
    def of_seed(*scores):
        finals = [
            logs.Final(f"stage{i}", 1.0, "val_bpb", bpb, True) for i, bpb in enumerate(scores)
        ]
        return logs.Run("x.log", "", {}, finals, {}, [], [])

    axes = page.pyplot.figure().subplots()
    page._draw_scores(axes, [of_seed(1.5, 1.25), of_seed(1.75, 1.375)])
    points = [line.get_ydata().tolist() for line in axes.lines if len(line.get_ydata()) == 2]
    assert [1.5, 1.75] in points
    assert [1.25, 1.375] in points
    assert axes.get_ylim()[0] == 0
    assert [text.get_text() for text in axes.get_xticklabels()] == [
        "stage0\n1.625000\n± 0.176777",
        "stage1\n1.312500\n± 0.088388",
    ]
    page.pyplot.close("all")


def test_what_is_no_score_is_not_called_bpb():
    """In the picture, and in the heads of the table."""
    finals = [
        logs.Final("plain", 1.0, "val_bpb", 1.5, True),
        logs.Final("ngram", 1.0, "unnormalised_score", 0.5, True),
    ]
    stages = {"plain": {"val_bpb": 1.5}, "ngram": {"unnormalised_score": 0.5}, "ttt": {}}
    run = logs.Run("x.log", "", {}, finals, {}, [], [], {"stages": stages})
    heads = [page._head_of(stage, [run]) for stage in stages]
    assert heads == ["plain bpb", "ngram: `unnormalised_score`, no score", "ttt bpb"]
    axes = page.pyplot.figure().subplots()
    page._draw_scores(axes, [run])
    shown = [text.get_text() for text in axes.get_xticklabels()]
    assert shown == ["plain\n1.500000", "ngram\n(no score)\n0.500000"]
    page.pyplot.close("all")


def test_validation_is_shown_as_dots():
    axes = page.pyplot.figure().subplots()
    page._draw_losses(axes, {7: page.Curves({1: 5.0, 2: 4.0}, {2: 4.5})})
    training, validation = axes.lines
    assert (training.get_marker(), validation.get_marker()) == ("None", "o")
    assert validation.get_ydata().tolist() == [4.5]
    assert validation.get_linestyle() == "None"
    page.pyplot.close("all")


# --- config.env -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, settings",
    [
        ("# a comment\n\nA=1\n  B = x=y \n", {"A": "1", "B": "x=y"}),
        ("A=1\nnonsense\nA=2", {"A": "2"}),
        ("", {}),
    ],
)
def test_config_lines_are_read_as_the_script_reads_them(text, settings):
    assert parse_config(text) == settings
    assert parse_config(config_text(settings)) == settings


# --- finished runs --------------------------------------------------------------------------------

RESULT = {"exit_code": 0, "status": "finished", "code_sha256": "abc", "seed": 7}


def finished(folder, result):
    (folder / "result.json").write_text(json.dumps(result))
    return runs.is_finished(folder, "abc", 7)


@pytest.fixture
def out(tmp_path):
    """The folder of a whole run of the script `abc` with seed 7."""
    for name in ("model.ptz", "train.log"):
        (tmp_path / name).write_text("")
    assert finished(tmp_path, RESULT)
    return tmp_path


@pytest.mark.parametrize(
    "name, value",
    [
        ("exit_code", 6),
        ("exit_code", None),
        ("status", "interrupted"),
        ("status", "started"),
        ("code_sha256", "abd"),
        ("seed", 8),
    ],
)
def test_a_run_of_something_else_is_not_the_finished_run(out, name, value):
    assert not finished(out, {**RESULT, name: value})


@pytest.mark.parametrize(
    "ended", [{"status": "wallclock_cap"}, {"status": "finished", "training": "wallclock_cap"}]
)
def test_a_training_that_the_clock_ended_is_finished(out, ended):
    """As scripts say it whose status is the training's, and those that have both."""
    assert finished(out, {**RESULT, **ended})


@pytest.mark.parametrize("name", ["model.ptz", "train.log", "result.json"])
def test_a_run_that_lacks_a_file_is_not_finished(out, name):
    (out / name).unlink()
    assert not runs.is_finished(out, "abc", 7)


# --- a stripped script and its readable copy ------------------------------------------------------

READABLE = "def f():\n    'Doc.'\n    return 1  # one\n\n\nprint(f())\n"
COPIES = {
    "the same": (READABLE, "PASS", ""),
    "other comments": (READABLE.replace("one", "two").replace("Doc", "Text"), "PASS", ""),
    "another value": (READABLE.replace("return 1", "return 2"), "FAIL", "are two programs"),
    "the module's text": ("'Doc.'\n" + READABLE, "FAIL", "are two programs"),
    "no Python": ("def f(:\n", "FAIL", "cannot be compared (SyntaxError"),
    "nothing": ("", "FAIL", "are two programs"),
}


@pytest.fixture
def stripped(tmp_path):
    """A folder with a stripped script and its readable copy."""
    (tmp_path / "train_gpt.py").write_text(strip.wrap_stripped(READABLE, "SEED=3\n"))
    (tmp_path / "train_gpt.readable.py").write_text(READABLE)
    return tmp_path


@pytest.mark.parametrize("kind", COPIES)
def test_a_readable_copy_is_the_program_that_ships(stripped, kind):
    text, word, sentence = COPIES[kind]
    (stripped / "train_gpt.readable.py").write_text(text)
    expect(find(stripped, "S6"), word, sentence)


def test_the_copy_of_a_script_that_is_not_packed(stripped):
    (stripped / "train_gpt.py").write_text(READABLE)
    expect(find(stripped, "S6"), "PASS")
    (stripped / "train_gpt.py").write_text("print(1)\n")
    expect(find(stripped, "S6"), "FAIL", "are two programs")


def test_the_worse_of_two_findings_on_one_file_is_shown(stripped):
    (stripped / "train_gpt.py").write_text(strip.wrap_stripped("import requests\n"))
    expect(find(stripped, "S6"), "FAIL", "imports requests")
    optional = "try:\n    import requests\nexcept ImportError:\n    pass\n"
    (stripped / "train_gpt.py").write_text(strip.wrap_stripped(optional))
    expect(find(stripped, "S6"), "FAIL", "are two programs")
    (stripped / "train_gpt.readable.py").write_text(optional)
    expect(find(stripped, "S6"), "WARN", "optional import of requests")


def test_a_readable_copy_is_neither_the_script_nor_counted(stripped):
    folder = Folder(stripped)
    assert folder.script.name == "train_gpt.py"
    assert folder.code_bytes == (stripped / "train_gpt.py").stat().st_size
    assert folder.config == {"SEED": "3"}
    assert folder.readable.read_text() == READABLE
    (stripped / "train_gpt.py").unlink()
    assert Folder(stripped).script is None
    assert Folder(stripped).readable is None


def test_sizes_and_page_tell_of_the_readable_copy(stripped):
    sizes = package.check_sizes(Case(Folder(stripped))).figures
    code = (stripped / "train_gpt.py").stat().st_size
    assert (sizes["code"], sizes["packed"], sizes["readable"]) == (code, code, len(READABLE))
    assert "`train_gpt.readable.py` without comments" in page._code_files(Folder(stripped))
    (stripped / "train_gpt.readable.py").unlink()
    assert page._code_files(Folder(stripped)) == "`train_gpt.py`"


def test_a_snapshot_keeps_the_readable_script(tmp_path):
    script = tmp_path / "mine.py"
    script.write_text(READABLE)
    order = runs.Order(tmp_path / "work", script, None, [1], packed=True, strip=True)
    order.work.mkdir()
    runs.take_snapshot(order)
    files = {path.name: path.read_text() for path in order.work.iterdir()}
    shipped = strip.wrap_stripped(READABLE)
    assert files == {"train_gpt.py": shipped, "train_gpt.readable.py": READABLE}
    (order.work / "seed_1").mkdir()
    script.write_text(READABLE.replace("one", "two"))
    with pytest.raises(runs.RecordError, match=r"runs of another train_gpt.readable.py"):
        runs.take_snapshot(order)
    (order.work / "seed_1").rmdir()
    runs.take_snapshot(dataclasses.replace(order, strip=False))
    assert [path.name for path in order.work.iterdir()] == ["train_gpt.py"]


def test_finished_runs_are_collected_with_the_copy_beside_their_script(stripped):
    script = stripped / "train_gpt.py"
    out = stripped / "runs"
    out.mkdir()
    for name in ("model.ptz", "train.log"):
        (out / name).write_text("")
    told = {**RESULT, "code_sha256": tg.sha256(script)}
    (out / "result.json").write_text(json.dumps(told))
    order = runs.Order(stripped / "work", script, None, [])
    for _ in range(2):  # with the copy, then without
        assert runs.collect_runs(order, [out]) == [out]
        copy = order.work / "train_gpt.readable.py"
        assert copy.is_file() == (stripped / copy.name).is_file()
        (stripped / copy.name).unlink(missing_ok=True)


# Command -> exit code where neither matplotlib nor scipy is installed.
ALONE = {"pack": 0, "check": 0, "compare": 64, "board": 64, "new": 64}


@pytest.mark.parametrize("command", ALONE)
def test_only_what_draws_or_compares_needs_more_packages(command, tmp_path, monkeypatch, capsys):
    for name in ("matplotlib", "scipy"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("page", "board", "compare"):  # as in a fresh process
        monkeypatch.delitem(sys.modules, f"tool.{name}", raising=False)
        monkeypatch.delattr(tool, name, raising=False)
    monkeypatch.setattr(record, "check_case", lambda case: [])
    script = tmp_path / "script.py"
    script.write_text("print(1)\n")
    arguments = {
        "pack": [str(script)],
        "check": [str(tmp_path)],
        "compare": [str(tmp_path), str(tmp_path)],
        "board": [str(tmp_path)],
        "new": ["x", "--track", "t", "--seeds", "1"],
    }
    assert record.main([command, *arguments[command]]) == ALONE[command]
    assert ("pip install matplotlib scipy" in capsys.readouterr().err) == (ALONE[command] == 64)
