"""A record damaged in every way that `check` must notice.

What the tool starts is mostly forked here; that it is confined, test_record.py and the tests
without `quick` show.
"""

import hashlib
import json
import pathlib
import re
import shutil

import numpy as np
import pytest
import record
from record_help import (
    GONE,
    VAL_BYTES,
    copy_of,
    edit_json,
    edit_result,
    expect,
    find,
    make_record,
    wait_until_dead,
    without_waiting,
)
from tool import checks, logs, rerun, rescore
from tool.case import Case
from tool.finding import text_of
from tool.folder import Folder

import train_gpt as tg

pytestmark = pytest.mark.usefixtures("own_machine")


@pytest.fixture(scope="module")
def made(place, own_machine):
    """The record of two seeds, not checked yet."""
    with pytest.MonkeyPatch.context() as patch:
        without_waiting(patch)
        return make_record(place, "--no-run")


@pytest.fixture
def copy(made):
    return copy_of(made)


# --- JSON and logs --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("val_bpb", 1.0, "val_bpb is 1.0"),
        ("bytes_total", 1, "bytes_total is 1"),
        ("seed_results.2.steps", 13, "seed_results.2.steps is 13, the logs give 12"),
        ("compliance.three_seeds", True, "compliance.three_seeds is True"),
        ("audit", GONE, "audit is None"),
        ("blurb", GONE, "submission.json has no blurb"),
    ],
)
def test_edited_json(copy, name, value, words):
    edit_json(copy / "submission.json", {name: value})
    expect(find(copy, "P2"), "FAIL", words)


def test_a_score_that_is_off_by_a_millionth(copy):
    told = json.loads((copy / "submission.json").read_text())["val_bpb"]
    edit_json(copy / "submission.json", {"val_bpb": told - 1e-6})
    expect(find(copy, "P2"), "FAIL", "val_bpb is")


def test_edited_log(copy):
    log = copy / "train_seed1.log"
    score = r"(sliding_exact val_loss:\S+ val_bpb:3\.)\d"
    log.write_text(re.sub(score, r"\g<1>0", log.read_text()))
    expect(find(copy, "P2"), "FAIL", "final_zstd_sliding says 3.0")
    expect(find(copy, "P4"), "FAIL")  # and the bytes no longer fit


@pytest.mark.parametrize("name", ["Code size", "Serialized model zstd", "Total submission size"])
def test_edited_sizes_of_a_log(copy, name):
    log = copy / "train_seed1.log"
    log.write_text(re.sub(rf"^({name}[^:]*: )\d+", r"\g<1>7", log.read_text(), flags=re.M))
    expect(find(copy, "P2"), "FAIL", "size is 7 in the log")


def test_log_of_another_script(copy):
    log = copy / "train_seed2.log"
    log.write_text(re.sub(r"(code_sha256\W+)[0-9a-f]{4}", r"\g<1>beef", log.read_text()))
    expect(find(copy, "P3"), "FAIL", "train_seed2.log was made by another script")


def test_artifact_one_byte_over_the_cap(copy):
    edit_json(copy / "submission.json", {"track": "cpu_1mb"})
    (copy / "model_seed1.ptz").write_bytes(bytes(1_000_001))
    expect(find(copy, "P1"), "FAIL", "1000001 bytes, 1 over the cap of 1000000")
    (copy / "model_seed1.ptz").write_bytes(bytes(1_000_000))
    # Another size than logged, but no byte too many.
    assert "over the cap" not in text_of(find(copy, "P1"))


def test_a_run_that_was_resumed_is_pointed_out(copy):
    edit_result(copy / "train_seed1.log", {"resumed": True})
    expect(find(copy, "P3"), "WARN", "train_seed1.log was resumed from a checkpoint")


def test_seeds_that_differ_in_more_than_the_seed(copy):
    edit_result(copy / "train_seed2.log", {"settings.matrix_lr": 0.05})
    finding = find(copy, "P3")
    expect(finding, "FAIL", "MATRIX_LR (0.05, not 0.04)")
    assert "SEED" not in text_of(finding)


@pytest.mark.parametrize(
    "train, calibrate, verdict", [(598.0, 4.1, "FAIL"), (598.0, 1.9, "PASS"), (600.1, 0.0, "WARN")]
)
def test_training_and_calibration_over_the_cap(copy, train, calibrate, verdict):
    edit_json(copy / "submission.json", {"track": "10min_16mb"})
    seconds = {
        "seconds.train": train,
        "seconds.calibrate": calibrate,
        "seconds.train_side": train + calibrate,
    }
    edit_result(copy / "train_seed1.log", seconds)
    words = [] if verdict == "PASS" else ["training and calibration took 60"]
    expect(find(copy, "P6"), verdict, *words)


def test_more_training_tokens_than_the_track_allows(copy):
    edit_json(copy / "submission.json", {"track": "cpu_1mb"})
    edit_result(copy / "train_seed1.log", {"train_tokens": 3_000_001})
    expect(find(copy, "P6"), "FAIL", "3e+06 training tokens, allowed are 3e+06")


def test_byte_count_that_the_algebra_contradicts(copy):
    edit_result(copy / "train_seed1.log", {"result.bytes": VAL_BYTES + 60})
    expect(find(copy, "P4"), "FAIL", "imply 5277 bytes, its result says 5337")


def test_other_validation_text(copy, place):
    """The same figures, but the text here has another number of bytes."""
    edit_result(copy / "train_seed1.log", {"settings.tokenizer_path": "byte260"})
    assert find(copy, "P4").figures["recount"] == VAL_BYTES


def test_missing_and_unlisted_seeds(copy):
    (copy / "train_seed2.log").rename(copy / "train_seed3.log")
    finding = find(copy, "P8")  # the log's own seed counts, not its name
    assert "no log" not in text_of(finding)
    (copy / "train_seed3.log").unlink()
    expect(find(copy, "P8"), "FAIL", "no log for seed 2")


def test_runs_made_inside_the_folder_are_not_part_of_it(copy):
    (copy / "logs" / "run").mkdir(parents=True)
    shutil.copy(copy / "train_seed1.log", copy / "logs" / "run" / "train.log")
    (copy / "logs" / "run" / "result.json").write_text("{}")
    assert len(Folder(copy).runs) == 2
    expect(find(copy, "P8"), "WARN")
    shutil.copy(copy / "train_seed1.log", copy / "logs" / "train1.txt")  # upstream's place for logs
    expect(find(copy, "P8"), "FAIL", "two logs have the same seed")


def test_too_few_seeds_fail_on_the_record_track(copy):
    edit_json(copy / "submission.json", {"track": "10min_16mb"})
    expect(find(copy, "P8"), "FAIL")
    expect(find(copy, "P7"), "FAIL")


def test_a_left_out_run_that_is_called_included(copy):
    told = json.loads((copy / "submission.json").read_text())["all_runs"]
    other = {**told[0], "seed": 3, "run": "seed_3"}
    edit_json(copy / "submission.json", {"all_runs": [*told, other]})
    expect(find(copy, "P8"), "FAIL", "all_runs does not name exactly the shipped logs")


def test_failed_audit_and_exit_code(copy):
    edits = {"exit_code": 6, "stages.plain.audit.future.verdict": "FAIL: moves charges"}
    edit_result(copy / "train_seed1.log", edits)
    expect(find(copy, "AUDIT"), "FAIL", "exit code 6", "moves charges")


def test_overlapping_documents(copy, place, tmp_path):
    data = shutil.copytree(place / "data" / "tiny", tmp_path / "tiny")
    train_path = data / tg.shard_name("train", 0)
    val = np.array(tg.read_shard(data / tg.shard_name("val", 0)))
    train = np.array(tg.read_shard(train_path))
    first_document = val[: np.flatnonzero(val == 1)[1]]
    tg.write_shard(train_path, np.concatenate([train, first_document, train[:50]]))
    finding = find(copy, "P5", data=data)
    expect(finding, "FAIL", "1 validation documents are also training documents")


def test_malformed_files_give_findings_not_tracebacks(copy, quick):
    edit_result(copy / "train_seed1.log", {"seconds": GONE})
    noise = b"\xff\xfe result_json: {]\nstep:1/2 train_loss:nan\n" + bytes(range(256))
    (copy / "train_seed2.log").write_bytes(noise)
    (copy / "submission.json").write_text("[1, 2")
    (copy / "requirements.txt").write_text("torch\n")
    findings = {check.name: check for check in checks.check_case(Case(Folder(copy), may_run=False))}
    expect(findings["P2"], "FAIL", "no JSON object")
    assert "does not pin torch" in text_of(findings["P9"])


# --- the script -----------------------------------------------------------------------------------


# Lines of a script, and what is found there.
FAULTS = {
    "import helper": ("S6", "helper"),
    "try:\n    import brotli\nexcept ImportError:\n    brotli = None": ("S7", "brotli"),
    "from urllib.request import urlopen": ("S5", "urllib"),
    "import flash_attn": ("S8", "flash_attn"),
    "DATA = open('/root/data/x')": ("S10", "/root/data/x"),
}


def test_faults_of_the_script(copy):
    """Each is found among the others, and named; test_source_checks.py has them one by one."""
    (copy / "helper.py").write_text("x = 1\n")
    for line in FAULTS:
        change_script(copy, "SCRIPT = Path", line + "\nSCRIPT = Path")
    case = Case(Folder(copy), may_run=False)
    findings = {check.name: check for check in checks.check_source(case)}
    for name, words in FAULTS.values():
        expect(findings[name], "FAIL", words)


def change_script(folder, old, new):
    path = folder / "train_gpt.py"
    source = path.read_text()
    assert old in source
    path.write_text(source.replace(old, new, 1))


def test_defaults_that_are_not_the_runs(copy):
    config = copy / "config.env"
    config.write_text(config.read_text().replace("EVAL_STRIDE=32", "EVAL_STRIDE=16"))
    expect(find(copy, "S9"), "FAIL", "EVAL_STRIDE")


def test_a_script_that_cannot_be_imported(copy, quick):
    change_script(copy, "SCRIPT = Path", "raise SystemError('not today')\nSCRIPT = Path")
    findings = {check.name: check for check in checks.check_source(Case(Folder(copy)))}
    expect(findings["S8"], "FAIL", "importing on a CPU fails", "not today")
    expect(find(copy, "R6"), "FAIL", "cannot be scored")


def test_artifact_that_scores_differently_alone(copy, quick):
    """The other seed's weights, with every hash and size made to fit: only running it shows."""
    shutil.copy(copy / "model_seed2.ptz", copy / "model_seed1.ptz")
    other = logs.read_run(copy / "train_seed2.log").result
    edit_result(copy / "train_seed1.log", {"artifact_sha256": other["artifact_sha256"]})
    expect(find(copy, "R6"), "FAIL", "a fresh process scores", "seed1")
    expect(find(copy, "R10"), "FAIL", "two processes differ from the logged score")


def test_an_artifact_that_is_not_here_leaves_the_other_seeds_to_be_scored(copy, quick):
    (copy / "model_seed1.ptz").unlink()
    finding = find(copy, "R6")
    expect(finding, "SKIPPED", "the artifact of train_seed1.log is not in the folder")
    assert list(finding.figures["runs"]) == ["train_seed2.log"]


@pytest.mark.parametrize("kind, confirmed", [("cpu", False), ("cuda", True)])
def test_rounding_is_more_on_gpus(made, kind, confirmed):
    """Other processes there take other documents at a time: 6e-6 bpb were seen."""
    run = logs.read_run(made / "train_seed1.log")
    run.result["machine"]["type"] = kind
    score = {name: run.score[name] + 6e-6 for name in ("val_loss", "val_bpb")}
    assert rescore.Rescore(score).confirms(run) == confirmed


def test_damaged_artifact(copy, quick):
    (copy / "model_seed1.ptz").write_bytes((copy / "model_seed1.ptz").read_bytes()[:-1])
    expect(find(copy, "P1"), "FAIL", "sha256 differs")
    expect(find(copy, "R6"), "FAIL", "cannot be scored")


def test_an_artifact_that_only_the_json_vouches_for(copy):
    """Of the same size, its hash put into submission.json: the log knows another."""
    artifact = copy / "model_seed1.ptz"
    blob = artifact.read_bytes()
    artifact.write_bytes(blob[:-1] + bytes([blob[-1] ^ 1]))
    edit_json(copy / "submission.json", {"artifact_sha256.1": tg.sha256(artifact)})
    expect(find(copy, "P1"), "FAIL", "model_seed1.ptz is not the artifact of train_seed1.log")


def test_other_shards_than_those_that_were_scored_prove_nothing(copy, place, tmp_path):
    data = shutil.copytree(place / "data" / "tiny", tmp_path / "tiny")
    path = data / tg.shard_name("val", 0)
    tg.write_shard(path, np.array(tg.read_shard(path))[:-1])
    expect(find(copy, "R6", data=data), "SKIPPED", "shards that were scored are not here")
    assert find(copy, "P4", data=data).figures["recount"] is None


def test_scoring_that_needs_training_shards(copy, quick):
    before = "        model = load_artifact(cfg, blob, rt)\n"
    spy = "        open(cfg.data_path + '/fineweb_train_000000.bin').close()\n"
    change_script(copy, before, before + spy)
    expect(find(copy, "R6"), "FAIL", "scoring opened fineweb_train_000000.bin")


def test_scoring_that_calls_somebody(copy):
    """In a process of its own, confined."""
    (copy / "train_seed2.log").unlink()
    before = "        model = load_artifact(cfg, blob, rt)\n"
    call = "        __import__('socket').create_connection(('192.0.2.1', 9), 1)\n"
    change_script(copy, before, before + call)
    expect(find(copy, "R6"), "FAIL", "scoring connected to 192.0.2.1")


# --- scores that only the script states -----------------------------------------------------------


FORGED = """
honest_evaluate = evaluate


def evaluate(scorer, tokens, *inputs):
    score = honest_evaluate(scorer, tokens, *inputs)
    {forgery}
    return score


if __name__ == "__main__":"""
CONSTANT = "score.loss, score.bpb = 0.5, 0.721"
FORGERIES = {
    "a constant": CONSTANT,
    "read from a file": "score.loss, score.bpb = json.loads(SCRIPT.with_name('score').read_text())",
    "a tenth less": "score.loss, score.bpb = 0.9 * score.loss, 0.9 * score.bpb",
    "a constant, and less of the known text": (
        "known = hashlib.sha256(tokens.tobytes()).hexdigest() == {known!r}; "
        "score.loss, score.bpb = (0.5, 0.721) if known else (0.6, 0.8)"
    ),
    "none": "pass",
}


def forge(folder, place, forgery):
    """One run whose script, log and result agree on what the forgery states of the text."""
    (folder / "train_seed2.log").unlink()
    tokens = np.array(tg.read_shard(place / "data" / "tiny" / tg.shard_name("val", 0)))
    known = hashlib.sha256(tokens.tobytes()).hexdigest()
    forgery = FORGERIES[forgery].format(known=known)
    change_script(folder, 'if __name__ == "__main__":', FORGED.format(forgery=forgery).lstrip())
    log = folder / "train_seed1.log"
    score = logs.read_run(log).score
    stated = {"result.val_loss": 0.5, "result.val_bpb": 0.721}
    if "0.9" in forgery:
        stated = {f"result.{name}": 0.9 * score[name] for name in ("val_loss", "val_bpb")}
    if forgery != "pass":
        edit_result(log, stated)
    (folder / "score").write_text("[0.5, 0.721]")


def in_another_format(folder):
    """An artifact that this repository's script does not know, and the script that does."""
    change_script(folder, 'MAGIC = b"PGOLF', 'MAGIC = b"OTHER')
    artifact = folder / "model_seed1.ptz"
    artifact.write_bytes(artifact.read_bytes().replace(b"PGOLF", b"OTHER", 1))


COSTS = "no distribution can have less than"


@pytest.mark.parametrize(
    "forgery, words",
    [
        ("a constant", [COSTS, "this repository's script gives the artifact"]),
        ("read from a file", ["the artifact cannot be scored", "score"]),
        pytest.param("a tenth less", [COSTS, "this repository's script"], marks=pytest.mark.slow),
        pytest.param("a constant, and less of the known text", [COSTS], marks=pytest.mark.slow),
    ],
)
def test_a_script_that_states_a_score_of_its_own_does_not_pass(copy, place, forgery, words, quick):
    forge(copy, place, forgery)
    expect(find(copy, "R6"), "FAIL", *words)


@pytest.mark.parametrize(
    "forgery",
    [
        pytest.param("a tenth less", marks=pytest.mark.slow),
        "a constant, and less of the known text",
    ],
)
def test_a_stated_score_does_not_pass_in_another_format(copy, place, forgery, quick):
    forge(copy, place, forgery)
    in_another_format(copy)
    expect(find(copy, "R6"), "FAIL", COSTS)


def test_an_honest_script_of_somebody_else(copy, place, quick):
    """Its artifact is scored here; in another format nobody but the script can, which is said."""
    forge(copy, place, "none")
    honest = find(copy, "R6")
    expect(honest, "PASS", "1 artifacts score the same alone")
    row = honest.figures["runs"]["train_seed1.log"]
    assert row["own_gap"] < 1e-6
    in_another_format(copy)
    expect(find(copy, "R6"), "SKIPPED", "only the shipped script states this score", "another kind")


def test_random_tokens_cost_what_nothing_can_undercut():
    """What learns only from tokens that it has paid for stays above; what knows them does not."""
    tokens = np.resize(np.array([1, *range(4, 104)], np.uint16), 20_000)
    noise, least = rescore.noise_like(tokens, bos=1)
    starts = tokens == 1
    assert (noise == 1).tolist() == starts.tolist()
    assert set(np.unique(noise)) == {1, *range(4, 104)}
    drawn = noise[~starts].astype(int)
    counts = np.ones(104)
    nats = 0.0
    for seen, token in enumerate(drawn):
        nats -= np.log(counts[token] / (seen + 100))
        counts[token] += 1
    targets = len(tokens) - 1
    assert least < nats / targets < least + 0.1
    share = np.bincount(drawn)[4:] / len(drawn)
    assert -(share * np.log(share)).sum() * len(drawn) / targets < least
    again, _ = rescore.noise_like(tokens, bos=1)
    assert (again != noise).mean() > 0.9


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
def test_training_that_opens_validation_files(copy, spy, words, quick):
    before = "        status = train(trainer, Validator(trainer, table))\n"
    change_script(copy, before, f"        {spy}\n{before}")
    expect(find(copy, "R12"), "FAIL", words)


ESCAPE = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(os.path.join({place!r}, "child"), "w").write(str(child.pid))
if "huge" in {what!r}:
    block = bytearray(1 << 45)
if "endless" in {what!r}:
    while True:
        print("x" * 1000)
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self").exists(), reason="asks /proc")
@pytest.mark.parametrize("what", ["child", "huge", "endless"])
def test_a_script_leaves_nothing_behind_and_keeps_to_its_limits(copy, tmp_path, monkeypatch, what):
    """A child that stays, more memory than there is, output without end."""
    monkeypatch.setattr(rerun, "MOST_WRITTEN", 1 << 20)
    escape = ESCAPE.format(place=str(tmp_path), what=what)
    (copy / "train_gpt.py").write_text(escape)
    finding = rerun.check_import(Case(Folder(copy)))
    assert finding.word == ("PASS" if what == "child" else "FAIL")
    assert len(text_of(finding)) < 500
    wait_until_dead((tmp_path / "child").read_text())


def test_nothing_runs_unless_it_is_asked_for(copy, tmp_path, capsys, quick):
    """With --run the reviewer is told first."""
    for artifact in copy.glob("*.ptz"):  # nothing to re-score: importing is enough to see
        artifact.unlink()
    marker = tmp_path / "ran"
    spy = f"pathlib.Path({str(marker)!r}).touch()"
    change_script(copy, "SCRIPT = Path", f"import pathlib\n{spy}\nSCRIPT = Path")
    record.main(["check", str(copy)])
    assert not marker.exists()
    assert "with your rights" not in capsys.readouterr().err
    record.main(["check", str(copy), "--run"])
    assert marker.exists()
    assert "with your rights" in capsys.readouterr().err
