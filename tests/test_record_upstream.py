"""The record tool on other people's folders: scripts and logs of upstream's shape."""

import json
import math
import statistics
import subprocess
import sys
import time

import pytest
import record
from record_help import edit_json, expect, find
from tool import accounting, logs, static, wrapper
from tool.case import Case
from tool.checks import PACKAGE, RERUN, check_case
from tool.finding import shown, text_of
from tool.folder import Folder

SCRIPT = """
import os
import torch
import torch.nn.functional as F
try:
    import zstandard
    COMPRESSOR = "zstd"
except ImportError:
    COMPRESSOR = "zlib"


class Hyperparameters:
    iterations = int(os.environ.get("ITERATIONS", 20000))
    matrix_lr = float(os.environ.get("MATRIX_LR", 0.04))
    ttt_epochs = int(os.environ.get("TTT_EPOCHS", 5))


def load_validation_tokens(pattern):
    return torch.arange(1000)


def main():
    args = Hyperparameters()
    val_tokens = load_validation_tokens("fineweb_val_*.bin")
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    for epoch in range(args.ttt_epochs):
        for start in range(0, 900, 100):
            x, y = val_tokens[start:start + 100], val_tokens[start + 1:start + 101]
            loss = F.cross_entropy(model(x.float().view(25, 4)), y[:25] % 4)
            loss.backward()
            optimizer.step()
    print("final")


if __name__ == "__main__":
    main()
"""
LOG = """logs/run.txt
val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path=./data/tokenizers/fineweb_1024_bpe.model
train_loader:dataset:fineweb10B_sp1024 train_shards:80
val_loader:shards pattern=./data/datasets/fineweb10B_sp1024/fineweb_val_*.bin tokens:62021632
model_params:17059912
world_size:8 grad_accum_steps:1
train_batch_tokens:524288 train_seq_len:1024 iterations:20000 warmup_steps:20 \
max_wallclock_seconds:600.000
seed:{seed}
step:1/20000 train_loss:6.9357 train_time:45ms step_avg:45.12ms
step:13780/20000 val_loss:2.0606 val_bpb:1.2204 train_time:{train}ms step_avg:43.54ms
stopping_early: wallclock_cap train_time:{train}ms step:13780/20000
peak memory allocated: 10184 MiB reserved: 10200 MiB
Serialized model: 67224983 bytes
Code size: {code} bytes
Total submission size: 67272625 bytes
{gptq}Serialized model int8+zlib: {model} bytes \
(payload:17178912 raw_torch:17224025 payload_ratio:3.91x)
Total submission size int8+zlib: {total} bytes
final_int8_zlib_roundtrip val_loss:{loss:.4f} val_bpb:{bpb:.4f} eval_time:1401ms
final_int8_zlib_roundtrip_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}
"""
TOKENS = 62_021_632
TEXT_BYTES = 151_080_363  # of so many targets
LOSSES = {42: 2.0727, 1337: 2.0731, 2024: 2.0719}


def upstream_folder(
    path, losses=LOSSES, train=600038, gptq="", stretch=1.0, model=15_815_847, script=SCRIPT
):
    """Script, README, a log a seed and a JSON with rounded means, as upstream's folders have."""
    path.mkdir(parents=True)
    (path / "train_gpt.py").write_text(script)
    readme = "# Somebody's run\n\n## Results\n\ntorchrun --nproc_per_node=8 train_gpt.py\n"
    (path / "README.md").write_text(readme)
    code = len(script.encode())
    common = dict(train=train, code=code, gptq=gptq, model=model, total=model + code)
    scores = []
    for seed, loss in losses.items():
        bpb = loss / math.log(2) * TOKENS / (TEXT_BYTES * stretch)
        scores.append(bpb)
        text = LOG.format(seed=seed, loss=loss, bpb=bpb, **common)
        (path / f"train_seed{seed}.log").write_text(text)
    told = {
        "author": "somebody",
        "github_id": "somebody",
        "name": "A run",
        "date": "2026-03-20T00:00:00Z",
        "track": "10min_16mb",
        "val_bpb": round(statistics.fmean(scores), 4),
        "val_loss": round(statistics.fmean(losses.values()), 4),
        "bytes_total": model + code,
        "seeds": list(losses),
    }
    (path / "submission.json").write_text(json.dumps(told))
    return path


def test_upstream_folder_gets_a_sensible_report(tmp_path):
    folder = upstream_folder(tmp_path / "track_10min_16mb" / "2026-03-20_Run")
    findings = {check.name: check for check in check_case(Case(Folder(folder)))}
    expected = {
        "P2": "PASS",
        "P4": "PASS",
        "P6": "WARN",
        "P8": "WARN",
        "S1": "WARN",
        "S7": "FAIL",
        "R6": "SKIPPED",
        "R10": "SKIPPED",
        "R12": "SKIPPED",
        "AUDIT": "SKIPPED",
    }
    assert {name: findings[name].word for name in expected} == expected
    assert "main" in text_of(findings["S1"])
    assert "artifacts are not in the folder" in text_of(findings["P1"])
    assert "MODE, ARTIFACT" in text_of(findings["R6"])
    assert findings["S8"].word in ("PASS", "SKIPPED")
    assert len(findings) == 23


@pytest.mark.parametrize(
    "faults, name, words",
    [
        (
            dict(train=598000, gptq="GPTQ:collected 66 Hessians in 4.1s\n"),
            "P6",
            "training and calibration took 602.1 s",
        ),
        (dict(stretch=1.17), "P4", "stand for 151080363 bytes"),
        (dict(model=16_000_000), "P1", "over the cap of 16000000"),
    ],
)
def test_faults_of_upstream_folders(tmp_path, faults, name, words):
    folder = upstream_folder(tmp_path / "x", **faults)
    expect(find(folder, name), "FAIL", words)


@pytest.mark.parametrize("stretch, verdict", [(1.0, "PASS"), (1.01, "FAIL")])
def test_scores_of_four_digits_are_held_to_the_text_too(tmp_path, stretch, verdict):
    """Their own rounding hides a part in ten thousand; a hundredth is seen."""
    folder = upstream_folder(tmp_path / "x", stretch=stretch)
    for log in folder.glob("*.log"):
        lines = log.read_text().splitlines()
        log.write_text("\n".join(line for line in lines if "_exact" not in line) + "\n")
    expect(find(folder, "P4"), verdict)


def test_upstream_json_that_no_log_supports(tmp_path):
    folder = upstream_folder(tmp_path / "x")
    edit_json(folder / "submission.json", {"val_bpb": 1.1, "bytes_total": 15_000_000})
    expect(find(folder, "P2"), "FAIL", "val_bpb is 1.1", "no log has it")
    expect(find(folder, "P2"), "FAIL", "bytes_total is 15000000")


def test_upstream_json_with_the_best_seed_instead_of_the_mean(tmp_path):
    folder = upstream_folder(tmp_path / "x", {**LOSSES, 7: 2.05})
    best = logs.read_run(folder / "train_seed7.log").final.bpb
    edit_json(folder / "submission.json", {"val_bpb": best})
    expect(find(folder, "P2"), "FAIL", "one log alone has it (train_seed7.log)")


def test_seed_results_of_upstream_json_are_compared_seed_by_seed(tmp_path):
    folder = upstream_folder(tmp_path / "x")
    edit_json(folder / "submission.json", {"seed_results": {"42": {"val_bpb": 1.19}}})
    expect(find(folder, "P2"), "FAIL", "seed_results.42.val_bpb is 1.19, train_seed42.log says")


def test_the_machine_is_read_from_the_log(tmp_path):
    folder = upstream_folder(tmp_path / "x")
    for log in folder.glob("*.log"):
        log.write_text(log.read_text() + "NVIDIA H100 80GB HBM3 | torch: 2.5.1+cu124\n")
    expect(find(folder, "P7"), "PASS", "8 x NVIDIA H100 80GB HBM3, torch 2.5.1+cu124")
    log = folder / "train_seed42.log"
    log.write_text(log.read_text().replace("H100", "A100").replace("world_size:8", "world_size:4"))
    words = ("4 processes, the track has 8", "A100 80GB HBM3, the track has H100")
    expect(find(folder, "P7"), "FAIL", *words, "different machines or versions")


def test_exact_figures_win_over_rounded_ones(tmp_path):
    log = tmp_path / "train_seed1.log"
    log.write_text(
        "final_zlib_exact val_loss:2.00000001 val_bpb:1.20000001\n"
        "final_zlib val_loss:2.0000 val_bpb:1.2000 eval_time:7ms\n"
    )
    run = logs.read_run(log)
    assert run.final.bpb == 1.20000001
    assert run.eval_ms == {"final_zlib": 7}


@pytest.mark.parametrize(
    "off, verdict", [(0, "PASS"), (-399, "WARN"), (1500, "WARN"), (2500, "FAIL"), (-2500, "FAIL")]
)
def test_bytes_that_an_evaluator_scores_twice_are_pointed_out(tmp_path, off, verdict):
    """Of the official export's windows the bytes are known; a hundred-thousandth is a warning."""
    folder = upstream_folder(tmp_path / "x", stretch=1 + off / TEXT_BYTES)
    expect(find(folder, "P4"), verdict)


@pytest.mark.parametrize(
    "tokens, text_bytes, verdict",
    [
        (40_540_160, 151_078_222, "PASS"),
        (47_851_520, 151_074_499, "PASS"),
        (151_076_864, 151_076_864, "PASS"),
        (50_000_000, 151_080_891, "PASS"),
        (63_779_840, 155_800_000, "FAIL"),
        (40_540_160, 151_090_000, "FAIL"),
        (40_540_160, 151_050_000, "FAIL"),
    ],
)
def test_any_export_stands_for_the_whole_text_less_a_tail(tmp_path, tokens, text_bytes, verdict):
    folder = upstream_folder(tmp_path / "x", stretch=text_bytes / tokens * TOKENS / TEXT_BYTES)
    for log in folder.glob("*.log"):
        log.write_text(log.read_text().replace(str(TOKENS), str(tokens)))
    expect(find(folder, "P4"), verdict)


SETTINGS = """Hyperparameters:
  matrix_lr: 0.04
  ttt_eval_batches:
  ttt_eval_seq_len: 2048
  logfile: logs/{seed}.txt
  artifact_dir: out/{seed}
  model_path: out/{seed}/model.pt
  quantized_model_path: out/{seed}/q.pt
  run_id: run_{seed}
  run_name: run {seed}
  datasets_dir: /data/{seed}
  train_files: /data/{seed}/fineweb_train_*.bin
  val_pattern: /data/{seed}/fineweb_val_*.bin
----
"""


def test_an_empty_setting_is_empty_and_places_may_differ(tmp_path):
    folder = upstream_folder(tmp_path / "x")
    for log in folder.glob("*.log"):
        log.write_text(SETTINGS.format(seed=log.stem) + log.read_text())
    settings = logs.read_run(folder / "train_seed42.log").settings
    assert settings["TTT_EVAL_BATCHES"] == ""
    assert settings["TTT_EVAL_SEQ_LEN"] == "2048"
    expect(find(folder, "P3"), "SKIPPED", "settings agree")
    log = folder / "train_seed1337.log"
    log.write_text(log.read_text().replace("matrix_lr: 0.04", "matrix_lr: 0.03"))
    expect(find(folder, "P3"), "FAIL", "MATRIX_LR (0.03, not 0.04)")


@pytest.mark.parametrize(
    "place", ["logs/1337.txt", "logs/seed1337/train.log", "out/train_1337.log"]
)
def test_logs_are_found_in_subfolders(tmp_path, place):
    folder = upstream_folder(tmp_path / "x")
    target = folder / place
    target.parent.mkdir(parents=True)
    (folder / "train_seed1337.log").rename(target)
    assert [run.seed for run in Folder(folder).runs] == [42, 1337, 2024]


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="this Python reads such a script")
def test_what_a_newer_python_could_check_is_said(tmp_path):
    folder = upstream_folder(tmp_path / "x")
    script = folder / "train_gpt.py"
    script.write_text(script.read_text() + "print(f'{'x'}')\n")
    findings = {check.name: check for check in check_case(Case(Folder(folder), may_run=False))}
    for name in ("S1", "S2", "S3", "S4", "S5", "S6", "S7", "S9", "S10"):
        expect(findings[name], "SKIPPED", "run check on Python 3.12")
    expect(findings["S8"], "WARN", "Python 3.10 cannot read the script")


@pytest.mark.parametrize("script", ["", SCRIPT])
def test_a_recipe_is_no_failed_record(tmp_path, script, capsys):
    """Settings (and a script) that nobody has run: nothing fails, and nothing passes on nothing."""
    (tmp_path / "config.env").write_text("DEFAULTS=baseline\nNUM_LAYERS=2\n")
    if script:
        (tmp_path / "train_gpt.py").write_text(script.replace('COMPRESSOR = "zlib"', "raise"))
    assert record.main(["check", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    package = [line for line in lines if line.startswith(("P", "AUDIT"))]
    assert [line.split(maxsplit=1)[1] for line in package] == ["SKIPPED  a recipe, no logs"] * 10
    assert not any("0 logs" in line or "None" in line or "0.0 s" in line for line in lines)


def test_without_logs_nothing_about_logs_passes(tmp_path):
    folder = upstream_folder(tmp_path / "x")
    for log in folder.glob("*.log"):
        log.unlink()
    findings = {check.name: check for check in check_case(Case(Folder(folder), may_run=False))}
    passed = {name for name, check in findings.items() if check.word == "PASS"}
    assert passed <= {"P9", *static.CHECKS}
    expect(findings["P2"], "FAIL", "no training log")
    for name in ("P1", "P3", "P4", "P5", "P6", "P7", "AUDIT"):
        expect(findings[name], "SKIPPED", "no logs")


# --- traits of real folders that are no faults ----------------------------------------------------

LEGAL = SCRIPT.replace('COMPRESSOR = "zlib"', "raise")
ONE_FUNCTION = LEGAL.replace(
    "def main():",
    """def train_model(args, model):
    for step in range(args.iterations):
        model(step).backward()


def train_and_eval(args, model):
    print(f"train_shards: {len(list(glob.glob('data/fineweb_train_*.bin')))}")
    train_model(args, model)


def main():""",
).replace("import os\n", "import glob\nimport os\n", 1)
NEWER = LEGAL + "print(f'{'final'}')\n"
EXTRAS = LEGAL.replace("import torch\n", "import brotli\nimport sentencepiece\nimport torch\n", 1)


def edit_logs(folder, edit):
    for log in sorted(folder.glob("*.log")):
        log.write_bytes(edit(log).encode())


def plain(path):
    return upstream_folder(path, script=LEGAL)


def settings_dump(path):
    folder = upstream_folder(path, script=LEGAL)
    edit_logs(folder, lambda log: SETTINGS.format(seed=log.stem) + log.read_text())
    return folder


def logs_below(path):
    folder = upstream_folder(path, script=LEGAL)
    (folder / "logs").mkdir()
    for log in folder.glob("*.log"):
        log.rename(folder / "logs" / log.name.replace("train_seed", "").replace(".log", ".txt"))
    return folder


def tail_again(path):
    return upstream_folder(path, script=LEGAL, stretch=151_079_964 / TEXT_BYTES)


def newer_python(path):
    return upstream_folder(path, script=NEWER)


def extras_only(path):
    folder = upstream_folder(path, script=EXTRAS)
    (folder / "requirements.txt").write_text("# the image has the rest\nbrotli==1.1.0\n")
    return folder


def shards_counted(path):
    return upstream_folder(path, script=ONE_FUNCTION)


def foreign_git(path):
    folder = upstream_folder(path, script=LEGAL)
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    with open(folder / ".git" / "config", "a") as file:
        file.write('[core]\n\tfsmonitor = "false"\n\tworktree = "/nowhere"\n')
    return folder


def self_extracting(path):
    return upstream_folder(path, script=wrapper.wrap(LEGAL))


def other_ways_of_writing(path):
    """Lines that end as on Windows, a time before each final score, JSON under another name."""
    folder = upstream_folder(path, script=LEGAL)
    edit_logs(
        folder,
        lambda log: log.read_text().replace("\nfinal", "\n[12:00:01] final").replace("\n", "\r\n"),
    )
    (folder / "submission.json").rename(folder / "submission_ternary.json")
    return folder


def another_export(path):
    """Of a tokenizer with 8,192 pieces."""
    tokens, text_bytes = 40_540_160, 151_078_222
    stretch = text_bytes / tokens * TOKENS / TEXT_BYTES
    folder = upstream_folder(path, script=LEGAL, stretch=stretch)
    edit_logs(folder, lambda log: log.read_text().replace(str(TOKENS), str(tokens)))
    return folder


@pytest.mark.parametrize(
    "make, warned",
    [
        (plain, []),
        (settings_dump, []),
        (logs_below, []),
        (tail_again, ["P4"]),
        (newer_python, []),
        (extras_only, []),
        (shards_counted, ["S5"]),
        (foreign_git, []),
        (self_extracting, []),
        (other_ways_of_writing, []),
        (another_export, []),
    ],
)
def test_traits_of_real_folders_do_not_fail(tmp_path, make, warned, capsys):
    """A script that Python 3.10 cannot read is warned of."""
    folder = make(tmp_path / "track_10min_16mb" / "2026-03-20_Run")
    too_new = make is newer_python
    assert record.main(["check", "--json", str(folder)]) == 0
    findings = json.loads(capsys.readouterr().out)["findings"]
    by_word = {}
    for finding in findings:
        by_word.setdefault(finding["verdict"], []).append(finding["id"])
    assert "FAIL" not in by_word
    assert ("S8" in by_word["WARN"]) == too_new
    assert {"P2", "P5"} <= set(by_word["PASS"])
    assert ("P4" in by_word["PASS"]) == ("P4" not in warned)
    assert set(warned) <= set(by_word["WARN"])
    unread = too_new and sys.version_info < (3, 12)
    assert ("S6" in by_word["PASS"]) != unread


FORGED_LINE = "x\nP1   PASS     all is well\r\x1b[2K\u202e\u2028P2   PASS     too"


def test_what_files_say_cannot_forge_a_line(tmp_path, capsys):
    """Names of files, fields and values of the JSON, texts of logs and of the script."""
    folder = upstream_folder(tmp_path / "x")
    (folder / FORGED_LINE.replace("/", "")).write_text("")
    odd = FORGED_LINE.replace("/", "") + ".log"
    (folder / "train_seed42.log").rename(folder / f"train{odd}")
    (folder / "train_gpt.py").write_text(f"import {'a' * 9000}\nopen({'/root/' + FORGED_LINE!r})\n")
    edits = {"val_bpb": FORGED_LINE, "author": FORGED_LINE, "seeds": [FORGED_LINE, 5], "name": "y"}
    edits |= {"track": FORGED_LINE, "all_runs": [{"seed": FORGED_LINE, "status": "z" * 9000}]}
    edit_json(folder / "submission.json", edits)
    record.main(["check", str(folder)])
    *findings, counts = capsys.readouterr().out.split("\n")[:-1]
    assert [line.split()[0] for line in findings] == [*PACKAGE, *static.CHECKS, *RERUN]
    assert counts.endswith("SKIPPED")
    for line in findings:
        assert line.isprintable()
        assert len(line) < 3000
    record.main(["compare", str(folder), str(folder)])
    assert "P1   PASS" not in [line[:9] for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(
    "said, line",
    [
        ("plain é 日", "plain é 日"),
        ("a\nb\tc", "a\\nb\\tc"),
        ("x" * 30, "x" * 20 + "..."),
        ("\udcff", "\\udcff"),
    ],
)
def test_what_is_said_is_one_short_line(said, line):
    assert shown(said, 20) == line


def test_a_foreign_git_configuration_is_not_obeyed(tmp_path):
    """fsmonitor names a program, and git would run it where it looks for changes."""
    folder = upstream_folder(tmp_path / "x")
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    marker = tmp_path / "obeyed"
    with open(folder / ".git" / "config", "a") as file:
        file.write(f'[core]\n\tfsmonitor = "touch {marker}; false"\n')
    find(folder, "P9")
    assert not marker.exists()


NASTY = {
    "brackets on every line": "[\n" * 50_000,
    "one long line": "gate" * 500_000,
    "the mark of a GPU over and over": "NVIDIA A " * 100_000,
    "colons": "Code size" + ":" * 200_000,
    "empty lines after a name": "train_shards:" + "\n" * 200_000,
    "spaces": "final_x" + " " * 200_000,
}


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY)
def test_reading_takes_time_in_proportion_to_the_text(tmp_path, text):
    """Ten times the text takes about ten times as long; a quadratic pattern, a hundred times."""

    def seconds(part):
        log = tmp_path / "train_seed1.log"
        log.write_text(part)
        start = time.process_time()
        run = logs.read_run(log)
        accounting._machine_of(run)
        return time.process_time() - start

    short = min(seconds(text[: len(text) // 10]) for _ in range(3))
    assert seconds(text) < 40 * max(short, 1e-3)


def test_of_a_huge_log_the_ends_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "MOST_BYTES", 10_000)
    log = tmp_path / "train.log"
    final = "final_zlib_exact val_loss:2.00000000 val_bpb:1.20000000\n"
    log.write_text("seed:7\n" + "step:1/9 train_loss:1.0\n" * 10_000 + final)
    run = logs.read_run(log)
    assert run.seed == 7
    assert run.final.bpb == 1.2
    assert len(run.text) < 11_000


@pytest.mark.parametrize(
    "name, text",
    [
        ("submission.json", "[" * 100_000),
        ("train_seed42.log", "seed:" + "9" * 400 + "\nfinal_x val_loss:1.0 val_bpb:1.0\n"),
        ("train_seed42.log", logs.RESULT_MARK + '{"a":' * 100_000),
        ("train_gpt.py", "x = " + "-" * 100_000 + "1"),
        ("train_gpt.py", "x = a" + ".b" * 100_000),
    ],
)
def test_monstrous_files_give_findings(tmp_path, name, text):
    folder = upstream_folder(tmp_path / "x")
    (folder / name).write_text(text)
    findings = check_case(Case(Folder(folder), may_run=False))
    assert len(findings) == 23


def test_a_disowned_score_is_not_the_runs(tmp_path):
    """The last stage may be a labelled one: the run's score is the last that counts."""
    log = tmp_path / "train_seed1.log"
    log.write_text(
        "final_zstd_sliding_exact val_loss:2.00000000 val_bpb:1.20000000\n"
        "final_zstd_ttt_exact val_loss:1.90000000 adapted_before_scoring:1.10000000\n"
        "final_zstd_ngram val_loss:0.5000 unnormalised_score:0.3000 eval_time:10ms "
        "vocabulary_mass:600.00\n"
        "final_zstd_ngram_exact val_loss:0.50000000 unnormalised_score:0.30000000\n"
    )
    run = logs.read_run(log)
    metrics = [final.metric for final in run.finals]
    assert metrics == ["val_bpb", "adapted_before_scoring", "unnormalised_score"]
    assert run.final.stage == "final_zstd_sliding"
    assert run.final.bpb == 1.2
    assert run.eval_ms["final_zstd_ngram"] == 10


def test_comparing_with_an_upstream_folder(tmp_path, capsys):
    old = upstream_folder(tmp_path / "old")
    new = upstream_folder(tmp_path / "new", {seed: loss - 0.01 for seed, loss in LOSSES.items()})
    assert record.main(["compare", str(old), str(new)]) == 0
    text = capsys.readouterr().out
    assert "all runs of old: not told" in text
    assert "gain 0.010000 nats per token" in text
    assert record.main(["compare", str(old), str(new), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["n_old"] == 3
    assert told["welch"]["p"] < 0.01
