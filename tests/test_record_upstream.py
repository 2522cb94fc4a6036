"""The record tool on other people's folders: scripts and logs of upstream's shape."""

import json
import math
import statistics

import pytest
import record
from record_help import edit_json, expect, find
from tool import logs
from tool.checks import check_folder
from tool.finding import text_of

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
TEXT_BYTES = 151_079_964
LOSSES = {42: 2.0727, 1337: 2.0731, 2024: 2.0719}


def upstream_folder(path, losses=LOSSES, train=600038, gptq="", stretch=1.0, model=15_815_847):
    """Script, README, a log a seed and a JSON with rounded means, as upstream's folders have."""
    path.mkdir(parents=True)
    (path / "train_gpt.py").write_text(SCRIPT)
    readme = "# Somebody's run\n\n## Results\n\ntorchrun --nproc_per_node=8 train_gpt.py\n"
    (path / "README.md").write_text(readme)
    code = len(SCRIPT)
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
    findings = {check.name: check for check in check_folder(folder)}
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
        (dict(stretch=1.17), "P4", "stand for 151079964 bytes"),
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
