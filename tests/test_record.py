"""The record tool on a real small record.

Made by `new`, checked, then damaged in every way that check must notice.
"""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import checks
import compare as comparing
import numpy as np
import pytest
import record
import rerun
import runs
from conftest import ROOT, clean_env
from report import Finding, gather, render, worst_verdict
from submission import FIELDS

import train_gpt as tg

CONFIG = """# a tiny byte-level model
DATA_PATH=./data/tiny
TOKENIZER_PATH=byte260
VOCAB_SIZE=260
DEVICE=cpu
SCHEDULE=tokens
NUM_LAYERS=2
MODEL_DIM=32
NUM_HEADS=2
NUM_KV_HEADS=1
TRAIN_SEQ_LEN=64
TRAIN_BATCH_TOKENS=256
MICRO_BATCH_TOKENS=64
ITERATIONS=12
WARMUP_STEPS=0
WARMDOWN_ITERS=6
VAL_LOSS_EVERY=0
EVAL_STRIDE=32
KEEP_FLOAT_MAX_NUMEL=256
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder like a checkout: data/, config.env; records and work come from the tests."""
    root = tmp_path_factory.mktemp("checkout")
    tg.synthetic_shards(root / "data" / "tiny")
    (root / "config.env").write_text(CONFIG)
    return root


@pytest.fixture(autouse=True)
def own_lock_and_no_settings(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(record, "LOCK", tmp_path_factory.getbasetemp() / "machine.lock")
    for name in {*tg.FIELDS, "CONFIG"} & os.environ.keys():
        monkeypatch.delenv(name)


def new(place, name, *more):
    return record.main(
        [
            "new",
            name,
            "--records",
            str(place / "records"),
            "--work",
            str(place / "work"),
            "--date",
            "2026-01-31",
            *more,
        ]
    )


@pytest.fixture(scope="module")
def made(place, tmp_path_factory):
    """The record of two seeds, checked with everything that runs the script."""
    record.LOCK = tmp_path_factory.getbasetemp() / "machine.lock"
    assert (
        new(
            place,
            "tiny",
            "--track",
            "non_record_cpu",
            "--config",
            str(place / "config.env"),
            "--seeds",
            "1,2",
            "--author",
            "A. Person",
            "--technique",
            "A tiny model.",
        )
        == 0
    )
    return place / "records" / "track_non_record_cpu" / "2026-01-31_tiny"


@pytest.fixture
def copy(made):
    """A copy beside the record, so that its data is found, to be damaged."""
    target = made.parent / "copy"
    shutil.rmtree(target, ignore_errors=True)
    return shutil.copytree(made, target)


def found(folder, *ids):
    """The wished findings by id; only static checks need the whole report."""
    quick = {**checks.CHECKS, **rerun.RERUNS}
    case = checks.Case(runs.Folder(folder))
    findings = [checks.guarded(id, quick[id], case) for id in ids if id in quick]
    if len(findings) < len(ids):
        findings += record.check_folder(folder, may_run=False)
    return {finding.id: finding for finding in findings if finding.id in ids}


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_result(log, change):
    """Changes the result at the end of a log."""
    lines = log.read_text().splitlines()
    result = json.loads(lines[-1].removeprefix(runs.RESULT_MARK))
    change(result)
    log.write_text("\n".join([*lines[:-1], runs.RESULT_MARK + json.dumps(result)]) + "\n")


def test_new_makes_a_record_that_passes(made):
    names = {
        "train_gpt.py",
        "config.env",
        "requirements.txt",
        "README.md",
        "submission.json",
        "check.json",
        "curves.png",
        "train_seed1.log",
        "train_seed2.log",
        "model_seed1.ptz",
        "model_seed2.ptz",
    }
    assert {p.name for p in made.iterdir()} == names
    report = json.loads((made / "check.json").read_text())
    verdicts = {finding["id"]: finding["verdict"] for finding in report["findings"]}
    assert report["verdict"] == "WARN" and {id for id, v in verdicts.items() if v != "PASS"} == {
        "P8",
        "P9",
    }
    assert {"P1", "S1", "S10", "R6", "R10", "R12", "AUDIT"} <= verdicts.keys()
    told = json.loads((made / "submission.json").read_text())
    assert set(FIELDS) <= set(told) and told["seeds"] == [1, 2] and len(told["all_runs"]) == 2
    scores = [told["seed_results"][seed]["val_bpb"] for seed in ("1", "2")]
    assert (
        told["val_bpb"] == np.mean(scores)
        and abs(told["val_bpb_std"] - np.std(scores, ddof=1)) < 1e-15
    )
    readme = (made / "README.md").read_text()
    assert (
        f"{told['val_bpb']:.6f}" in readme
        and "A tiny model." in readme
        and str(made.parent) not in readme
    )
    assert (made / "curves.png").stat().st_size > 10_000


def test_the_commit_is_that_of_the_script_that_ran(tmp_path, monkeypatch):
    """None if the repository's own script is another one, or there is no repository."""

    def git(*command):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        command = ("git", "-C", tmp_path, *identity, *command)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    monkeypatch.setattr(record, "ROOT", tmp_path)
    script = tmp_path / "train_gpt.py"
    script.write_text("x = 1\n")
    assert record.commit_of(tg.sha256(script)) is None
    git("init", "-q")
    assert record.commit_of(tg.sha256(script)) is None
    git("add", "train_gpt.py")
    git("commit", "-q", "-m", "first")
    assert record.commit_of(tg.sha256(script)) == git("rev-parse", "HEAD")
    script.write_text("x = 2\n")
    assert record.commit_of(tg.sha256(script)) is None


def test_record_runs_and_rescores_from_inside_its_folder(made, tmp_path):
    env = clean_env(OUT_DIR=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "train_gpt.py"],
        cwd=made,
        env={**env, "MODE": "eval", "ARTIFACT": "model_seed2.ptz"},
        capture_output=True,
        text=True,
        check=False,
    )
    told = json.loads((made / "submission.json").read_text())["seed_results"]["2"]["val_bpb"]
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "result.json").read_text())["result"]["val_bpb"] == told
    done = subprocess.run(
        [sys.executable, "train_gpt.py"],
        cwd=made,
        env={**env, "SEED": "2"},
        capture_output=True,
        check=False,
    )
    again = json.loads((tmp_path / "result.json").read_text())
    assert done.returncode == 0 and again["result"]["val_bpb"] == told


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda j: j.update(val_bpb=j["val_bpb"] - 1e-6), "val_bpb is"),
        (lambda j: j.update(bytes_total=j["bytes_total"] - 1), "bytes_total is"),
        (
            lambda j: j["seed_results"]["2"].update(steps=13),
            "seed_results.2.steps is 13, the logs give 12",
        ),
        (lambda j: j["compliance"].update(three_seeds=True), "compliance.three_seeds is True"),
        (lambda j: j.pop("audit"), "audit is None"),
        (lambda j: j.pop("blurb"), "submission.json has no blurb"),
    ],
)
def test_edited_json(copy, change, words):
    edit_json(copy / "submission.json", change)
    finding = found(copy, "P2")["P2"]
    assert finding.verdict == "FAIL" and words in finding.text


def test_edited_log(copy):
    log = copy / "train_seed1.log"
    log.write_text(
        re.sub(r"(sliding_exact val_loss:\S+ val_bpb:3\.)\d", r"\g<1>0", log.read_text())
    )
    assert "final_zstd_sliding says 3.0" in found(copy, "P2")["P2"].text
    assert found(copy, "P4")["P4"].verdict == "FAIL"  # and the bytes no longer fit


def test_log_of_another_script(copy):
    log = copy / "train_seed2.log"
    log.write_text(re.sub(r"(code_sha256\W+)[0-9a-f]{4}", r"\g<1>beef", log.read_text()))
    finding = found(copy, "P3")["P3"]
    assert (
        finding.verdict == "FAIL" and "train_seed2.log was made by another script" in finding.text
    )


def test_artifact_one_byte_over_the_cap(copy):
    edit_json(copy / "submission.json", lambda j: j.update(track="cpu_1mb"))
    (copy / "model_seed1.ptz").write_bytes(bytes(1_000_001))
    finding = found(copy, "P1")["P1"]
    assert finding.verdict == "FAIL" and "1000001 bytes, 1 over the cap of 1000000" in finding.text
    (copy / "model_seed1.ptz").write_bytes(bytes(1_000_000))
    # Another size than logged, but no byte too many.
    assert "over the cap" not in found(copy, "P1")["P1"].text


@pytest.mark.parametrize(
    "line, id, words",
    [
        ("import helper", "S6", "helper"),
        ("try:\n    import brotli\nexcept ImportError:\n    brotli = None", "S7", "brotli"),
        ("from urllib.request import urlopen", "S5", "urllib"),
        ("print(f'{'x'}')", "S8", "f-string"),
        ("DATA = open('/root/data/x')", "S10", "/root/data/x"),
    ],
)
def test_faults_of_the_script(copy, line, id, words):
    (copy / "helper.py").write_text("x = 1\n")
    source = (copy / "train_gpt.py").read_text()
    (copy / "train_gpt.py").write_text(source.replace("SCRIPT = Path", line + "\nSCRIPT = Path", 1))
    finding = found(copy, id)[id]
    assert finding.verdict == "FAIL" and words in finding.text, finding


def test_defaults_that_are_not_the_runs(copy):
    config = copy / "config.env"
    config.write_text(config.read_text().replace("EVAL_STRIDE=32", "EVAL_STRIDE=16"))
    finding = found(copy, "S9")["S9"]
    assert finding.verdict == "FAIL" and "EVAL_STRIDE" in finding.text


def test_seeds_that_differ_in_more_than_the_seed(copy):
    edit_result(copy / "train_seed2.log", lambda r: r["settings"].update(matrix_lr=0.05))
    finding = found(copy, "P3")["P3"]
    assert (
        finding.verdict == "FAIL"
        and "MATRIX_LR (0.05, not 0.04)" in finding.text
        and "SEED" not in finding.text
    )


@pytest.mark.parametrize(
    "train, calibrate, verdict", [(598.0, 4.1, "FAIL"), (598.0, 1.9, "PASS"), (600.1, 0.0, "WARN")]
)
def test_training_and_calibration_over_the_cap(copy, train, calibrate, verdict):
    edit_json(copy / "submission.json", lambda j: j.update(track="10min_16mb"))
    edit_result(
        copy / "train_seed1.log",
        lambda r: r["seconds"].update(
            train=train, calibrate=calibrate, train_side=train + calibrate
        ),
    )
    finding = found(copy, "P6")["P6"]
    assert finding.verdict == verdict and (
        verdict == "PASS" or "training and calibration took 60" in finding.text
    )


def test_byte_count_that_the_algebra_contradicts(copy):
    edit_result(
        copy / "train_seed1.log", lambda r: r["result"].update(bytes=r["result"]["bytes"] + 60)
    )
    finding = found(copy, "P4")["P4"]
    assert finding.verdict == "FAIL" and "imply 5277 bytes, its result says 5337" in finding.text


def test_other_validation_text(copy, place):
    """The same figures, but the text here has another number of bytes."""
    edit_result(copy / "train_seed1.log", lambda r: r["settings"].update(tokenizer_path="byte260"))
    assert found(copy, "P4")["P4"].figures["recount"] == 5277


def test_missing_and_unlisted_seeds(copy):
    (copy / "train_seed2.log").rename(copy / "train_seed3.log")
    finding = found(copy, "P8")["P8"]  # the log's own seed counts, not its name
    assert "no log" not in finding.text
    (copy / "train_seed3.log").unlink()
    finding = found(copy, "P8")["P8"]
    assert finding.verdict == "FAIL" and "no log for seed 2" in finding.text


def test_runs_made_inside_the_folder_are_not_part_of_it(copy):
    (copy / "logs" / "run").mkdir(parents=True)
    shutil.copy(copy / "train_seed1.log", copy / "logs" / "run" / "train.log")
    assert len(runs.Folder(copy).runs) == 2 and found(copy, "P8")["P8"].verdict == "WARN"
    shutil.copy(copy / "train_seed1.log", copy / "logs" / "train1.txt")  # upstream's place for logs
    assert "two logs have the same seed" in found(copy, "P8")["P8"].text


def test_too_few_seeds_fail_on_the_record_track(copy):
    edit_json(copy / "submission.json", lambda j: j.update(track="10min_16mb"))
    assert found(copy, "P8")["P8"].verdict == found(copy, "P7")["P7"].verdict == "FAIL"


def test_artifact_that_scores_differently_alone(copy):
    """The other seed's weights, with every hash and size made to fit: only running it shows."""
    shutil.copy(copy / "model_seed2.ptz", copy / "model_seed1.ptz")
    other = runs.read_run(copy / "train_seed2.log").result
    edit_result(
        copy / "train_seed1.log", lambda r: r.update(artifact_sha256=other["artifact_sha256"])
    )
    finding = found(copy, "R6")["R6"]
    assert (
        finding.verdict == "FAIL"
        and "a fresh process scores" in finding.text
        and "seed1" in finding.text
    )


def test_damaged_artifact(copy):
    (copy / "model_seed1.ptz").write_bytes((copy / "model_seed1.ptz").read_bytes()[:-1])
    findings = found(copy, "P1", "R6")
    assert "sha256 differs" in findings["P1"].text and "cannot be scored" in findings["R6"].text


def test_scoring_that_needs_training_shards(copy):
    path = copy / "train_gpt.py"
    path.write_text(
        path.read_text().replace(
            "        model = load_artifact(cfg, blob, rt)\n",
            "        model = load_artifact(cfg, blob, rt)\n"
            "        open(cfg.data_path + '/fineweb_train_000000.bin').close()\n",
            1,
        )
    )
    finding = found(copy, "R6")["R6"]
    assert finding.verdict == "FAIL" and "scoring opened fineweb_train_000000.bin" in finding.text


@pytest.mark.parametrize(
    "spy, words",
    [
        (
            "[p.read_bytes() for p in Path(cfg.data_path).glob('fineweb_val_*.bin')]",
            "opened fineweb_val_000000.bin before",
        ),
        ("shard_paths(cfg, 'val')", "no artifact after a short training without validation shards"),
    ],
)
def test_training_that_opens_validation_files(copy, spy, words):
    path = copy / "train_gpt.py"
    path.write_text(
        path.read_text().replace(
            "    status = train(trainer, Validator(trainer, table))\n",
            f"    {spy}\n    status = train(trainer, Validator(trainer, table))\n",
            1,
        )
    )
    finding = found(copy, "R12")["R12"]
    assert finding.verdict == "FAIL" and words in finding.text, finding


def test_failed_audit_and_exit_code(copy):
    edit_result(
        copy / "train_seed1.log",
        lambda r: (
            r.update(exit_code=6),
            r["stages"]["plain"]["audit"]["future"].update(verdict="FAIL: moves charges"),
        ),
    )
    finding = found(copy, "AUDIT")["AUDIT"]
    assert (
        finding.verdict == "FAIL"
        and "exit code 6" in finding.text
        and "moves charges" in finding.text
    )


def test_overlapping_documents(copy, place, tmp_path):
    data = shutil.copytree(place / "data" / "tiny", tmp_path / "tiny")
    val, train = (
        np.array(tg.read_shard(data / f"fineweb_{split}_000000.bin")) for split in ("val", "train")
    )
    tg.write_shard(
        data / "fineweb_train_000000.bin",
        np.concatenate([train, val[: np.flatnonzero(val == 1)[1]], train[:50]]),
    )
    finding = checks.p5_data(checks.Case(runs.Folder(copy), data=data))
    assert (
        finding.verdict == "FAIL"
        and "1 validation documents are also training documents" in finding.text
    )


def test_malformed_files_give_findings_not_tracebacks(copy):
    edit_result(copy / "train_seed1.log", lambda r: r.pop("seconds"))
    (copy / "train_seed2.log").write_bytes(
        b"\xff\xfe result_json: {]\nstep:1/2 train_loss:nan\n" + bytes(range(256))
    )
    (copy / "submission.json").write_text("[1, 2")
    (copy / "requirements.txt").write_text("torch\n")
    findings = {f.id: f for f in record.check_folder(copy, may_run=False)}
    assert findings["P2"].verdict == "FAIL" and "no JSON object" in findings["P2"].text
    assert "does not pin torch" in findings["P9"].text


def test_new_makes_no_record_on_a_fail(place, made, capsys):
    code = new(
        place,
        "bad",
        "--track",
        "10min_16mb",
        "--collect",
        str(place / "work" / "non_record_cpu_tiny"),
        "--no-run",
    )
    assert code == 1 and "no record was made" in capsys.readouterr().out
    assert not list((place / "records").glob("track_10min_16mb/*"))
    assert (place / "work/10min_16mb_bad/check.json").is_file()


def test_collecting_finished_runs(place, made):
    code = new(
        place,
        "again",
        "--track",
        "non_record_cpu",
        "--collect",
        str(place / "work" / "non_record_cpu_tiny"),
        "--no-run",
    )
    folder = made.with_name("2026-01-31_again")
    assert (
        code == 0
        and (folder / "train_seed2.log").read_bytes() == (made / "train_seed2.log").read_bytes()
    )
    settings = runs.parse_config((folder / "config.env").read_text())
    assert (
        settings == {k: v for k, v in runs.parse_config(CONFIG).items()} and "SEED" not in settings
    )


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--config", "missing.env", "--seeds", "1"], "missing.env"),
        (["--collect", "."], "no run with a result.json"),
        (["--collect", ".", "--packed"], "--packed: finished runs ran the script as it is"),
        (["--seeds", "1,1"], "different whole numbers"),
        ([], "--seeds or --collect"),
    ],
)
def test_unusable_input(place, arguments, words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert new(place, "x", "--track", "t", *arguments) == 64 and words in capsys.readouterr().err


def test_settings_of_the_environment_are_refused(place, monkeypatch, capsys):
    monkeypatch.setenv("MATRIX_LR", "0.1")
    assert (
        new(place, "env", "--track", "t", "--seeds", "1") == 64
        and "MATRIX_LR" in capsys.readouterr().err
    )


def test_the_lock_keeps_two_runs_apart(place, capsys):
    import filelock

    with filelock.FileLock(record.LOCK):
        code = subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys, pathlib; sys.path.insert(0, sys.argv[1]); "
                "import record; record.LOCK = pathlib.Path(sys.argv[2]); "
                "sys.exit(record.main(sys.argv[3:]))",
                str(ROOT / "records"),
                str(record.LOCK),
                "new",
                "locked",
                "--track",
                "t",
                "--seeds",
                "1",
                "--work",
                str(place / "w2"),
            ],
            env=clean_env(),
            capture_output=True,
            text=True,
            check=False,
        )
    assert code.returncode == 64 and "another timed run" in code.stderr


def test_the_lock_is_free_afterwards():
    held = [record.machine_lock(wait=False)]
    with held[0]:
        with pytest.raises(record.RecordError, match="another timed run"):
            record.machine_lock(wait=False)
    with record.machine_lock(wait=False):  # though the first is still referred to
        pass


def test_interrupted_collection_goes_on(place, capfd):
    """Killed amid the second seed: the first is kept, the broken attempt stays on the list."""
    arguments = [
        "new",
        "broken",
        "--track",
        "non_record_cpu",
        "--config",
        str(place / "slow.env"),
        "--seeds",
        "1,2",
        "--records",
        str(place / "records"),
        "--work",
        str(place / "work"),
        "--date",
        "2026-01-31",
        "--no-run",
    ]
    (place / "slow.env").write_text(CONFIG.replace("ITERATIONS=12", "ITERATIONS=120"))
    work = place / "work" / "non_record_cpu_broken"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "records/record.py"), *arguments],
        env=clean_env(TMPDIR=str(place)),
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    metrics = work / "seed_2" / "metrics.jsonl"
    for _ in range(600):
        if metrics.is_file() and metrics.stat().st_size:
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = (work / "seed_1" / "result.json").stat().st_mtime_ns
    assert (
        record.main(arguments) == 0 and "seed 1: finished earlier, kept" in capfd.readouterr().out
    )
    assert (work / "seed_1" / "result.json").stat().st_mtime_ns == before
    told = json.loads(
        (place / "records/track_non_record_cpu/2026-01-31_broken/submission.json").read_text()
    )
    assert [(row["run"], row["included"]) for row in told["all_runs"]] == [
        ("seed_1", True),
        ("seed_2", True),
        ("seed_2.attempt1", False),
    ]
    (work / "config.env").write_text(CONFIG)  # another snapshot than the command's
    shutil.rmtree(place / "records/track_non_record_cpu/2026-01-31_broken")
    assert record.main(arguments) == 64 and "another config.env" in capfd.readouterr().err


UPSTREAM_SCRIPT = """
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
UPSTREAM_LOG = """logs/run.txt
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


def upstream_folder(path, losses, train=600038, gptq="", stretch=1.0, model=15_815_847):
    path.mkdir(parents=True)
    (path / "train_gpt.py").write_text(UPSTREAM_SCRIPT)
    (path / "README.md").write_text(
        "# Somebody's run\n\n## Results\n\ntorchrun --nproc_per_node=8 train_gpt.py\n"
    )
    scores, code = [], len(UPSTREAM_SCRIPT)
    for seed, loss in losses.items():
        bpb = loss / math.log(2) * 62_021_632 / (151_079_964 * stretch)
        scores.append(bpb)
        (path / f"train_seed{seed}.log").write_text(
            UPSTREAM_LOG.format(
                seed=seed,
                train=train,
                code=code,
                gptq=gptq,
                model=model,
                total=model + code,
                loss=loss,
                bpb=bpb,
            )
        )
    (path / "submission.json").write_text(
        json.dumps(
            {
                "author": "somebody",
                "github_id": "somebody",
                "name": "A run",
                "date": "2026-03-20T00:00:00Z",
                "track": "10min_16mb",
                "val_bpb": round(float(np.mean(scores)), 4),
                "val_loss": round(float(np.mean(list(losses.values()))), 4),
                "bytes_total": model + code,
                "seeds": list(losses),
            }
        )
    )
    return path


LOSSES = {42: 2.0727, 1337: 2.0731, 2024: 2.0719}


def test_upstream_folder_gets_a_sensible_report(tmp_path):
    folder = upstream_folder(tmp_path / "track_10min_16mb" / "2026-03-20_Run", LOSSES)
    findings = {f.id: f for f in record.check_folder(folder)}
    assert {
        id: findings[id].verdict
        for id in ("P2", "P4", "P6", "S1", "S7", "R6", "R10", "R12", "AUDIT")
    } == {
        "P2": "PASS",
        "P4": "PASS",
        "P6": "WARN",
        "S1": "WARN",
        "S7": "FAIL",
        "R6": "SKIPPED",
        "R10": "SKIPPED",
        "R12": "SKIPPED",
        "AUDIT": "SKIPPED",
    }
    assert (
        "main" in findings["S1"].text and "artifacts are not in the folder" in findings["P1"].text
    )
    assert "MODE, ARTIFACT" in findings["R6"].text and findings["P8"].verdict == "WARN"
    assert len(findings) == 24 and findings["S8"].verdict in ("PASS", "SKIPPED")


@pytest.mark.parametrize(
    "faults, id, words",
    [
        (
            dict(train=598000, gptq="GPTQ:collected 66 Hessians in 4.1s\n"),
            "P6",
            "training and calibration took 602.1 s",
        ),
        (dict(stretch=1.17), "P4", "stand for 151079964 bytes"),
        (dict(model=16_000_000), "P1", "over the cap of 16000000"),
    ],
)
def test_faults_of_upstream_folders(tmp_path, faults, id, words):
    finding = found(upstream_folder(tmp_path / "x", LOSSES, **faults), id)[id]
    assert finding.verdict == "FAIL" and words in finding.text, finding


def test_upstream_json_that_no_log_supports(tmp_path):
    folder = upstream_folder(tmp_path / "x", LOSSES)
    edit_json(folder / "submission.json", lambda j: j.update(val_bpb=1.1, bytes_total=15_000_000))
    text = found(folder, "P2")["P2"].text
    assert (
        "val_bpb is 1.1" in text and "no log has it" in text and "bytes_total is 15000000" in text
    )


def test_a_disowned_score_is_not_the_runs(tmp_path):
    """The last stage may be a labelled one: the run's score is the last that counts."""
    log = tmp_path / "train_seed1.log"
    lines = [
        "final_zstd_sliding_exact val_loss:2.00000000 val_bpb:1.20000000",
        "final_zstd_ttt_exact val_loss:1.90000000 adapted_before_scoring:1.10000000",
        (
            "final_zstd_ngram val_loss:0.5000 unnormalised_score:0.3000 eval_time:10ms "
            "vocabulary_mass:600.00"
        ),
        "final_zstd_ngram_exact val_loss:0.50000000 unnormalised_score:0.30000000",
    ]
    log.write_text("\n".join(lines) + "\n")
    run = runs.read_run(log)
    assert [final.metric for final in run.finals] == [
        "val_bpb",
        "adapted_before_scoring",
        "unnormalised_score",
    ]
    assert (
        run.final.stage == "final_zstd_sliding"
        and run.final.bpb == 1.2
        and run.eval_ms["final_zstd_ngram"] == 10
    )


def test_command_line_check(made, tmp_path, capsys):
    assert (
        record.main(["check", str(made), "--no-run"]) == 0 and "SKIPPED" in capsys.readouterr().out
    )
    (tmp_path / "empty").mkdir()
    assert record.main(["check", str(tmp_path / "empty"), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["verdict"] == "FAIL"
    assert record.main(["check", str(tmp_path / "nowhere")]) == 64


def sample(losses, tokens=62_021_632, ratio=2.436, name="x"):
    return comparing.Sample(
        name, losses, {s: v / math.log(2) / ratio for s, v in losses.items()}, tokens, []
    )


def test_compare_is_welch_by_the_book():
    old, new = {1: 2.0730, 2: 2.0741, 3: 2.0725, 4: 2.0729}, {1: 2.0610, 2: 2.0605, 3: 2.0622}
    result = comparing.compare(sample(old), sample(new))
    for margin, test in ((0.0, result["welch"]), (0.005, result["welch_margin"])):
        a, b = np.array(list(old.values())), np.array(list(new.values()))
        va, vb = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
        t = (a.mean() - margin - b.mean()) / math.sqrt(va + vb)
        df = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
        grid = np.linspace(t, t + 4000, 4_000_001)  # the tail of Student's density, summed
        density = (
            math.gamma((df + 1) / 2)
            / math.sqrt(df * math.pi)
            / math.gamma(df / 2)
            * (1 + grid**2 / df) ** (-(df + 1) / 2)
        )
        assert abs(test["t"] - t) < 1e-9 and abs(test["df"] - df) < 1e-9
        assert abs(test["p"] - density.sum() * 0.001) < 1e-3 * test["p"] + 1e-7
    assert (
        result["unit"] == "nats per token"
        and list(result["pairs"]) == [1, 2, 3]
        and result["paired"]["p"] < 0.01
    )


def test_compare_refuses_a_p_value_under_three_seeds():
    result = comparing.compare(sample(LOSSES), sample({1: 2.0, 2: 2.01}))
    assert result["welch"] is None and "no p value from 2 seeds" in comparing.describe(result)


def test_compare_converts_across_tokenizers():
    result = comparing.compare(
        sample(LOSSES), sample({s: v * 1.5 for s, v in LOSSES.items()}, 40_540_160, 3.726)
    )
    assert result["unit"] == "bits per byte" and abs(result["margin"] - 0.00296) < 1e-5


def test_compare_reads_folders_and_lists_all_runs(made, tmp_path, capsys):
    folder = upstream_folder(tmp_path / "up", LOSSES)
    assert record.main(["compare", str(folder), str(made)]) == 0
    text = capsys.readouterr().out
    assert (
        "all runs of old: not told" in text and "all runs of new (2):" in text and "seed 1:" in text
    )
    (tmp_path / "empty").mkdir()
    assert record.main(["compare", str(tmp_path / "empty"), str(made)]) == 64


def test_pack_gives_back_every_byte(tmp_path, capsys):
    out = tmp_path / "packed.py"
    assert record.main(["pack", str(ROOT / "train_gpt.py"), "-o", str(out)]) == 0
    source = (ROOT / "train_gpt.py").read_text()
    assert record.unpack_source(out.read_text()) == (source, 1)
    text = capsys.readouterr().out
    assert f"{len(source.encode())} bytes" in text and f"{out.stat().st_size} bytes" in text
    assert out.stat().st_size < len(source) / 2
    assert record.unpack_source(record.wrap(out.read_text())) == (source, 2)  # a wrapper packs too


def test_packed_script_runs_with_its_own_settings(tmp_path, place, made):
    out = tmp_path / "run" / "train_gpt.py"
    out.parent.mkdir()
    out.write_text(record.wrap((ROOT / "train_gpt.py").read_text(), record.short_config(CONFIG)))
    env = clean_env(SEED="1", OUT_DIR=str(tmp_path / "out"), DATA_PATH=str(place / "data/tiny"))
    done = subprocess.run(
        [sys.executable, str(out)],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result, plain = (
        json.loads(p.read_text()) for p in (tmp_path / "out/result.json", made / "submission.json")
    )
    assert result["result"]["val_bpb"] == plain["seed_results"]["1"]["val_bpb"]
    assert result["sizes"]["code"] == out.stat().st_size and result["steps"] == 12


def test_findings():
    findings = [
        Finding("P1", "PASS", "good"),
        gather("P2", [("WARN", "a"), ("FAIL", "b")], ""),
        Finding("R6", "SKIPPED", "c"),
    ]
    assert worst_verdict(findings) == "FAIL" and render(findings).endswith(
        "1 PASS, 0 WARN, 1 FAIL, 1 SKIPPED"
    )
    assert (
        worst_verdict(findings[::2]) == "PASS" and dataclasses.asdict(findings[1])["text"] == "a; b"
    )
    with pytest.raises(ValueError, match="MAYBE"):
        Finding("P1", "MAYBE", "")
