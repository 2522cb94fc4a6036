"""What is fetched of a repository: by real processes from a hub on this machine (data_hub.py)."""

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path

import corpora
import export
import hub
import numpy as np
import prepare
import pytest
import verify
from conftest import ROOT, TINY_RUN
from data_hub import (
    COMMUNITY,
    DOCUMENTS,
    FOLDER,
    MODEL,
    MODEL_LIST,
    OFFICIAL,
    TRAIN,
    TRAIN_SIZES,
    VOCAB,
    below,
    published,
    remote,
    shard,
    small_model,
    train,
    until,
)
from data_tool import DOCUMENTS as TEXTS
from data_tool import call, jsonl, python
from fake_hub import Fault, commit_of

import train_gpt as tg


def assert_nobody_is_asked(world, **arguments):
    """The call finds that all is there, and the hub hears nothing of it."""
    before = len(world.hub.requests)
    done = world.run(**arguments)
    assert "already there" in done.out
    assert len(world.hub.requests) == before
    return done


# --------------------------------------------------------------------------------------------------
# What is fetched
# --------------------------------------------------------------------------------------------------


def test_everything_is_fetched_and_a_second_call_asks_nobody(world):
    done = subprocess.run(
        [sys.executable, "-c", world.call().script],
        capture_output=True,
        text=True,
        env=world.script_env,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr
    wanted = world.wanted()
    assert world.here == wanted  # nothing else, no .partial
    assert f"{len(wanted)} files" in done.stdout
    places = f"DATA_PATH={world.root / FOLDER} TOKENIZER_PATH={world.root / MODEL}"
    last_line = f"{places} VOCAB_SIZE={VOCAB}"
    assert done.stdout.splitlines()[-1] == last_line
    for path in wanted:
        assert world.ranges(path) == [None]
    again = assert_nobody_is_asked(world)
    assert again.out.splitlines()[-1] == last_line


def test_the_manifest_records_files_and_source(world):
    world.run()
    entry = world.dataset()
    assert entry["published"] == {
        "repo_id": OFFICIAL,
        "revision": commit_of(world.hub.repositories[OFFICIAL]),
        "asked_for": "main",
        "remote_root": "datasets",
        "docs": {},
        "files_train": TRAIN,
        "num_docs": 7,
        "shuffle_seed": 1337,
    }
    assert entry["files"].keys() == world.wanted().keys()
    for path, known in entry["files"].items():
        file = world.root / path
        assert known == {"size": file.stat().st_size, "sha256": tg.sha256(file)}
    (tokenizer,) = world.manifest()["tokenizers"]
    assert tokenizer["sha256"] == tg.sha256(world.root / MODEL)


def test_number_of_training_shards(world):
    assert "-1: expected 0 or more" in world.refused(train_shards=-1)
    world.run(train_shards=0)
    assert world.here == world.wanted(train_shards=0)
    world.run(train_shards=2)
    assert world.here == world.wanted(train_shards=2)
    source = f"{world.hub.url}/datasets/{OFFICIAL}"
    too_many = f"--train-shards 6: {source} has {TRAIN} of fineweb10B_sp1024"
    assert too_many in world.refused(train_shards=6)
    assert not (world.root / "datasets/.partial").exists()
    assert_nobody_is_asked(world, train_shards=1)  # fewer than there are
    world.run()
    before = world.dataset()
    assert too_many in world.refused(train_shards=6)  # although all that there are are here
    assert (world.here, world.dataset()) == (world.wanted(), before)
    world.run(train_shards=0)
    wanted = world.wanted()
    assert world.here == wanted
    assert world.dataset()["files"].keys() == wanted.keys()
    for path in wanted:
        assert world.ranges(path) == [None]


def test_a_repository_that_has_grown(world):
    """More than it had, and has by now: fetched; what is here is not fetched again."""
    world.run()
    world.serve(published(train=[*TRAIN_SIZES, 105, 106]))
    world.run(train_shards=TRAIN + 1)
    assert world.here == world.wanted(train_shards=TRAIN + 1)
    assert world.ranges(train(0)) == [None]


def test_a_record_of_absurd_counts_is_none(world):
    """It is not counted to its end, but asked for again."""
    world.run(train_shards=1)
    told = world.manifest()
    told["datasets"][0]["published"]["files_train"] = 10**15
    told["datasets"][0]["stats"]["files_val"] = 10**15
    (world.root / "manifest.json").write_text(json.dumps(told))
    world.run(train_shards=1)
    assert world.dataset()["published"]["files_train"] == TRAIN
    assert world.ranges(train(0)) == [None]


HF_DOWNLOAD = """
import sys
from huggingface_hub import hf_hub_download
for name in sys.argv[2:]:
    print(hf_hub_download(sys.argv[1], name, repo_type="dataset"))
"""


def test_the_clients_own_download_understands_this_hub(world):
    """The hub of these tests is like the real one: large files are on another host."""
    names = [remote(path) for path in (train(0), MODEL, "manifest.json")]
    done = python("-c", HF_DOWNLOAD, OFFICIAL, *names, env=world.env)
    assert done.code == 0, done.err
    for name, path in zip(names, done.out.splitlines()):
        assert Path(path).read_bytes() == world.hub.repositories[OFFICIAL][name]
    world.run(train_shards=1)
    assert world.here == world.wanted(train_shards=1)
    assert [len(world.hub.gets(name)) for name in names] == [1, 1, 1]  # its cache is used


def test_eighty_training_shards_by_default(world):
    world.serve(published(train=[1] * 83))
    world.run()
    assert world.here == world.wanted(train_shards=80)


def test_the_folder_of_the_official_helper_is_adopted(world):
    """Nothing is fetched again, and training shards beyond those asked for belong to it."""
    world.write(world.wanted(train_shards=3))
    world.write({"manifest.json": world.remote["manifest.json"]})
    world.run(train_shards=1)
    assert not any(world.ranges(path) for path in world.wanted())
    assert world.dataset()["files"].keys() == world.wanted(train_shards=3).keys()
    assert_nobody_is_asked(world, train_shards=3)


def test_a_tokenizers_folder_on_another_disk(world, tmp_path):
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system")
    with tempfile.TemporaryDirectory(dir=elsewhere) as folder:
        world.root.mkdir()
        (world.root / "tokenizers").symlink_to(folder)
        world.run()
        assert (world.root / MODEL).read_bytes() == world.remote[MODEL]
        assert set(os.listdir(folder)) == {Path(MODEL).name, Path(MODEL_LIST).name}


def test_a_tokenizer_without_a_vocabulary_list(world):
    """Only the model is needed: a repository may lack the rest of what its manifest names."""
    wanted = world.wanted()
    del wanted[MODEL_LIST]
    del world.hub.repositories[OFFICIAL][remote(MODEL_LIST)]
    world.run()
    assert world.here == wanted
    assert_nobody_is_asked(world)


def test_recorded_files_are_not_read_again(world):
    """Their size is enough: hashing 16 GB takes minutes. `prepare.py verify` reads them."""
    world.run(train_shards=1)
    spoiled = world.remote[train(0)][:-1] + b"?"
    world.write({train(0): spoiled})
    world.run(train_shards=2)
    assert world.here == {**world.wanted(train_shards=2), train(0): spoiled}


def test_byte260(world):
    world.serve(published("byte260"))
    done = world.run(variant="byte260")
    folder = world.root / "datasets/fineweb10B_byte260"
    last_line = f"DATA_PATH={folder} TOKENIZER_PATH=byte260 VOCAB_SIZE=260"
    assert done.out.splitlines()[-1] == last_line
    assert len(world.here) == 2 + TRAIN + 1


def test_bytes_are_not_guessed(world):
    """A tokenizer without model and kind is byte260 for nobody: train_gpt.py needs the kind."""
    files = published("byte260")
    told = json.loads(files["manifest.json"])
    del told["tokenizers"][0]["kind"]
    world.serve({**files, "manifest.json": json.dumps(told).encode()})
    message = world.refused(variant="byte260")
    assert "tokenizer tok_byte260 has no model_path, expected one, or kind byte" in message
    assert world.here == {}


def test_documents(world):
    world.run(train_shards=1)
    world.run(train_shards=1, with_docs=True)
    assert world.here == world.wanted(train_shards=1, docs=True)
    assert set(world.dataset()["published"]["docs"]) == set(DOCUMENTS)
    world.run(train_shards=2)
    assert_nobody_is_asked(world, train_shards=2, with_docs=True)


def test_environment_names_repository_and_prefix(world):
    """A repository whose data lies at its top."""
    files = published()
    world.hub.repositories = {"me/mine": files}
    world.run(env={"MATCHED_FINEWEB_REPO_ID": "me/mine", "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX": ""})
    assert world.here.keys() == files.keys() - {"manifest.json", *DOCUMENTS}
    assert "no-name" in world.refused(env={"MATCHED_FINEWEB_REPO_ID": "no-name/x/y"})


def test_a_revision(world):
    commit = commit_of(world.hub.repositories[OFFICIAL])
    world.run(options={"revision": commit}, train_shards=1)
    for revision in ("main", commit):
        assert_nobody_is_asked(world, options={"revision": revision}, train_shards=1)
    assert "at v9" in world.refused(options={"revision": "v9"}, train_shards=1)


def test_two_repositories_in_one_folder(world):
    world.serve(published("sp8192"), COMMUNITY)
    for variant, repository in (("sp1024", OFFICIAL), ("sp8192", COMMUNITY)):
        world.run(train_shards=1, variant=variant)
        entry = world.dataset(f"fineweb10B_{variant}")
        assert entry["published"]["repo_id"] == repository
    assert world.ranges("manifest.json") == [None, None]
    names = {entry["name"] for entry in world.manifest()["tokenizers"]}
    assert names == {"tok_sp1024", "tok_sp8192"}
    assert_nobody_is_asked(world, train_shards=1)


@pytest.mark.parametrize("links", [True, False])
def test_files_in_the_hubs_own_cache_are_linked_or_copied(world, links):
    """Of three one is right, one spoiled, one cut; all are left as they were."""
    repository = world.hub.repositories[OFFICIAL]
    snapshots = world.folder / "hf/hub/datasets--willdepueoai--parameter-golf/snapshots"
    cache = snapshots / commit_of(repository)
    size = len(repository[remote(train(1))])
    contents = (repository[remote(train(0))], bytes(size), b"cut")
    for number, content in enumerate(contents):
        path = cache / remote(train(number))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    world.run(train_shards=3, links=links)
    assert world.here == world.wanted(train_shards=3)
    assert (world.root / train(0)).samefile(cache / remote(train(0))) == links
    assert not world.ranges(train(0))
    assert world.ranges(train(1)) == [None]
    for number, content in enumerate(contents):
        assert (cache / remote(train(number))).read_bytes() == content


def test_fetch_then_train(world, tmp_path):
    """The README's two commands, with a repository of real text in bytes.

    The second takes what the first made.
    """
    text = jsonl(tmp_path / "docs.jsonl", TEXTS)
    made = tmp_path / "made"
    name = "fineweb10B_byte260"
    done = call("export", text, name=name, root=made, tokenizer="byte260", val_docs=5)
    assert done.code == 0, done.err
    files = {}
    for path in made.rglob("*.*"):
        if path.suffix in (".bin", ".json"):
            files[path.relative_to(made).as_posix()] = path.read_bytes()
    world.serve(files)
    place = {"DATA_PATH": str(tmp_path / "data/datasets" / name)}
    done = python(ROOT / "data/prepare.py", "fineweb", env={**world.env, **place})
    assert done.code == 0, done.err
    needed = dict(pair.split("=") for pair in done.out.splitlines()[-1].split())
    assert needed == {**place, "TOKENIZER_PATH": "byte260", "VOCAB_SIZE": "260"}
    settings = {**TINY_RUN, **needed, "SMOKE": "0", "EVAL_STRIDE": "0", "DEVICE": "cpu"}
    settings["DEFAULTS"] = "baseline"
    settings["OUT_DIR"] = str(tmp_path / "out")
    done = python(ROOT / "train_gpt.py", env={**world.env, **settings})
    assert done.code == 0, done.err
    assert f"val_loader:dataset:{name}" in done.out
    checked = call("verify", place["DATA_PATH"], documents=text)
    words = dict(re.findall(r"^(\w+) +(PASS|FAIL|SKIPPED)", checked.out, re.MULTILINE))
    assert words.pop("published") == "FAIL"  # far too little text
    assert set(words.values()) == {"PASS"}, checked.out


# --------------------------------------------------------------------------------------------------
# What is refused
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refusal:
    """A call that fails without a second attempt."""

    words: tuple[str, ...]  # in its message
    call: dict = field(default_factory=dict)  # arguments
    fault: Fault | None = None  # of the first training shard


REFUSALS = {
    "repository": Refusal(
        ("datasets/no/body", "401", "HF_TOKEN"), dict(env={"MATCHED_FINEWEB_REPO_ID": "no/body"})
    ),
    "revision": Refusal(
        ("at v9", "no such revision", "--revision"), dict(options={"revision": "v9"})
    ),
    "variant": Refusal(
        ("--variant sp4096", "has sp1024"),
        dict(variant="sp4096", env={"MATCHED_FINEWEB_REPO_ID": OFFICIAL}),
    ),
    "gated": Refusal(
        (train(0), "403", "HF_TOKEN"),
        fault=Fault(status=403, headers={"X-Error-Code": "GatedRepo"}),
    ),
    "missing": Refusal((train(0), "404"), fault=Fault(status=404)),
    "bad variant": Refusal(("--variant sp01", "byte260"), dict(variant="sp01")),
    "workers": Refusal(("--workers 0",), dict(options={"workers": 0})),
}


@pytest.mark.parametrize("case", REFUSALS.values(), ids=REFUSALS.keys())
def test_what_is_not_tried_again(world, case):
    if case.fault:
        world.spoil(train(0), case.fault)
    message = world.refused(**case.call)
    for word in case.words:
        assert word in message
    assert len(world.ranges(train(0))) == (1 if case.fault else 0)
    assert case.fault or not (world.root / "datasets/.partial").exists()
    assert not (world.root / "manifest.json").exists()


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(tokens_val=51), ("val shards", "50 tokens", "51")),
        (dict(tokens_train=1), ("train shards", "510 tokens", "1")),
        (dict(files_val=3), ("2 validation shards", "3")),
        (dict(files_val=None), ("stats.files_val",)),
    ],
)
def test_a_manifest_that_contradicts_the_files(world, changes, words):
    world.serve(published(**changes))
    message = world.refused()
    for word in words:
        assert word in message
    assert not world.finished
    assert not (world.root / "manifest.json").exists()


@pytest.mark.parametrize(
    "text, words",
    [
        (b"[" * 100_000, ("not JSON", "RecursionError")),
        (b'{"tokenizers": [], "datasets": ' + b"[" * 100 + b"]" * 100 + b"}", ("nested more",)),
        (b"{", ("not JSON",)),
        (b'{"tokenizers": [], "datasets": []}', ("--variant sp1024", "has none; other")),
    ],
    ids=["too deep to read", "deep", "cut", "empty"],
)
def test_a_published_manifest_that_is_none(world, text, words):
    world.hub.repositories[OFFICIAL][remote("manifest.json")] = text
    message = world.refused()
    for word in words:
        assert word in message
    assert not world.here


def test_names_of_a_published_manifest_are_escaped_and_short(world):
    """None of them can look like a line of the tool's own."""
    manifest = json.loads(world.remote["manifest.json"])
    forged = "x\nerror: nothing is wrong\033[2K"
    manifest["datasets"] += [{"name": f"{forged}{number}" + 900 * "y"} for number in range(30)]
    manifest["datasets"][0]["name"] = "fineweb10B_other"
    files = {**world.remote, "manifest.json": json.dumps(manifest).encode()}
    world.hub.repositories[OFFICIAL] = below(files)
    message = world.refused()
    assert r"has other, x\nerror: nothing is wrong\x1b[2K" in message
    assert "and 11 more" in message
    assert len(message) < 2500


def test_a_tokenizer_of_another_vocabulary(world):
    manifest = json.loads(world.remote["manifest.json"])
    manifest["tokenizers"][0]["vocab_size"] = 1024
    files = {**world.remote, "manifest.json": json.dumps(manifest).encode()}
    world.hub.repositories[OFFICIAL] = below(files)
    assert f"{VOCAB} tokens, the manifest says 1024" in world.refused()
    assert not world.finished


@pytest.mark.parametrize(
    "path, content",
    [(train(0), shard(100)[:-1]), (MODEL, b"no model")],
    ids=["shard", "tokenizer"],
)
def test_published_files_that_are_unusable(world, path, content):
    world.hub.repositories[OFFICIAL][remote(path)] = content
    assert Path(path).name in world.refused(train_shards=1)
    assert path not in world.finished


def test_offline(world):
    world.run(train_shards=1)
    world.hub.__exit__()
    offline = {"HF_HUB_OFFLINE": "1"}
    assert_nobody_is_asked(world, train_shards=1)
    assert_nobody_is_asked(world, train_shards=1, env=offline)
    assert "HF_HUB_OFFLINE is set" in world.refused(train_shards=2, env=offline)
    assert re.search("ConnectError: .*the same command goes on", world.refused(train_shards=2))
    (world.root / train(0)).write_bytes(b"cut")
    assert "HF_HUB_OFFLINE is set" in world.refused(train_shards=1, env=offline)


def test_too_little_room(world):
    message = world.refused(train_shards=2, free=1_000)
    for word in ("0.000 GB are free", "--train-shards", "--root"):
        assert word in message
    assert not world.finished
    needed = sum(len(content) for content in world.wanted(train_shards=2).values())
    assert world.refused(train_shards=2, free=needed - 1)
    world.run(train_shards=2, free=needed)


# --------------------------------------------------------------------------------------------------
# An export with case markers: a byte side file, a check of the splits, perhaps no manifest
# --------------------------------------------------------------------------------------------------

CASE_REPOSITORY = "romeerp/parameter-golf-caseops-v1"
CASE_NAME = "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved"
CASE_FOLDER = f"datasets/{CASE_NAME}"
CASE_MODEL = "tokenizers/fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model"
CASE_VOCAB = 500
CASE_VAL_DOCS = 6
CASE_CALL = dict(variant="sp8192_caseops", val_docs=CASE_VAL_DOCS)
# What the official exporter writes into a dataset's entry.
OFFICIAL_FIELDS = ("name", "tokenizer_name", "tokenizer_kind", "path", "train_glob", "val_glob")
OFFICIAL_FIELDS += ("vocab_size", "bos_id", "eos_id", "recommended_bigram_vocab_size", "stats")


def case_shard(split, number) -> str:
    """A shard's path below the data folder."""
    return f"{CASE_FOLDER}/{tg.shard_name(split, number)}"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Real documents in the published form, several shards a split: files below the data folder."""
    root = tmp_path_factory.mktemp("exported")
    text = jsonl(root / "docs.jsonl", TEXTS[:22])
    model = root / Path(CASE_MODEL).name
    export.train_tokenizer(TEXTS[:40], CASE_VOCAB, model, 1 << 20, "caseops")
    plan = export.TokenizerPlan(str(model), transform="caseops")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "SHARD_TOKENS", 10_000)
        corpus = corpora.file_corpus([text], val_docs=CASE_VAL_DOCS)
        export.Export(corpus, plan, root, CASE_NAME, 1).run()
    files = {}
    for path in (*root.glob("datasets/*/*.bin"), root / CASE_MODEL, root / "manifest.json"):
        files[path.relative_to(root).as_posix()] = path.read_bytes()
    counts = [len([path for path in files if f"_{split}_0" in path]) for split in verify.SPLITS]
    assert counts == [2, 5]
    return files


@pytest.fixture
def listing(exported):
    """The published files to break, without a manifest."""
    return {path: content for path, content in exported.items() if path != "manifest.json"}


@pytest.fixture
def told(exported):
    """A manifest of the official layout, which knows no transform and no side file."""
    manifest = json.loads(exported["manifest.json"])
    (dataset,) = manifest["datasets"]
    (tokenizer,) = manifest["tokenizers"]
    for name in set(dataset) - set(OFFICIAL_FIELDS):
        del dataset[name]
    for name in ("sha256", "case_transform"):
        del tokenizer[name]
    dataset["stats"]["docs_val"] = CASE_VAL_DOCS
    return {**manifest, "num_val_docs": CASE_VAL_DOCS}


def serve_case(world, files, manifest=None):
    """Gives the repository these files; what a call without options would fetch."""
    top = {"manifest.json": json.dumps(manifest).encode()} if manifest else {}
    world.serve({**files, **top}, CASE_REPOSITORY)
    return dict(sorted(files.items()))


def no_training(files, first=0):
    """Those of the files that are no training shard from that number on."""
    kept = {}
    for path in files:
        number = re.search(r"_train_(\d+)", path)
        if not number or int(number[1]) < first:
            kept[path] = files[path]
    return kept


def tokens_of(content):
    """The tokens of a shard's bytes."""
    return np.frombuffer(content, "<u2", offset=tg.SHARD_HEADER_BYTES)


def shard_of(*parts):
    """A shard's bytes from its tokens."""
    tokens = np.concatenate(parts).astype("<u2")
    return tg.shard_header(len(tokens)) + tokens.tobytes()


def charged_in(files):
    """The sum of the byte side files."""
    sides = [content for path, content in files.items() if "_val_bytes_" in path]
    return sum(int(tokens_of(content).sum(dtype=np.int64)) for content in sides)


@pytest.mark.parametrize("has_manifest", [False, True], ids=["no manifest", "manifest"])
def test_a_case_export_is_fetched(has_manifest, world, listing, told):
    """Its entries say what train_gpt.py needs, whether the repository has a manifest or not."""
    wanted = serve_case(world, listing, told if has_manifest else None)
    done = world.run(**CASE_CALL)
    assert world.here == wanted
    place = f"DATA_PATH={world.root / CASE_FOLDER} TOKENIZER_PATH={world.root / CASE_MODEL}"
    assert done.out.splitlines()[-1] == f"{place} VOCAB_SIZE={CASE_VOCAB}"
    assert f"is among {CASE_VAL_DOCS} validation documents" in done.out
    assert_nobody_is_asked(world, **CASE_CALL)
    entry = world.dataset(CASE_NAME)
    assert entry["val_bytes_glob"] == f"{CASE_FOLDER}/fineweb_val_bytes_*.bin"
    assert entry["charged_bytes"] == {"val": charged_in(listing)}
    assert entry["files"].keys() == wanted.keys()
    assert ("num_val_docs" in entry["published"]) == has_manifest
    (tokenizer,) = world.manifest()["tokenizers"]
    assert tokenizer["case_transform"] == "caseops"
    assert tokenizer["sha256"] == tg.sha256(world.root / CASE_MODEL)
    assert tokenizer["bos_id"] == entry["bos_id"] == 1


def test_train_gpt_accepts_a_case_export(world, listing, exported):
    """Settings, tokenizer and side file, as its own exporter made them; `verify` agrees."""
    serve_case(world, listing)
    done = world.run(**CASE_CALL)
    needed = dict(pair.split("=") for pair in done.out.splitlines()[-1].split())
    cfg = tg.load_config({**needed, "EVAL_STRIDE": "0"})
    table = tg.ByteTable.load(cfg)
    assert (table.transform, len(table.markers)) == ("caseops", 4)
    charges = tg.load_charges(cfg, table, tg.load_validation(cfg))
    (made,) = json.loads(exported["manifest.json"])["datasets"]
    assert charges.sum(dtype=np.int64) == made["charged_bytes"]["val"] == charged_in(listing)
    checked = call("verify", needed["DATA_PATH"])
    words = dict(re.findall(r"^(\w+) +(PASS|FAIL|SKIPPED)", checked.out, re.MULTILINE))
    assert words.pop("published") == "FAIL"  # far too little text
    assert words.pop("documents") == "SKIPPED"  # they are not here
    assert set(words.values()) == {"PASS"}, checked.out


def test_a_manifest_that_tells_more_of_a_case_export_is_kept(world, listing, told):
    told["tokenizers"][0]["case_transform"] = "caseops"
    told["datasets"][0]["charged_bytes"] = {"val": charged_in(listing), "train": 77}
    serve_case(world, listing, told)
    world.run(**CASE_CALL)
    assert world.dataset(CASE_NAME)["charged_bytes"] == {"val": charged_in(listing), "train": 77}


def test_validation_of_a_case_export_comes_with_its_side_files(world, listing):
    """0 training shards are enough to score; later calls fetch the others, each file once."""
    wanted = serve_case(world, listing)
    world.run(train_shards=0, **CASE_CALL)
    assert world.here == no_training(wanted)
    assert_nobody_is_asked(world, train_shards=0, **CASE_CALL)
    world.run(train_shards=2, **CASE_CALL)
    assert world.here == no_training(wanted, 2)
    world.run(**CASE_CALL)
    assert world.here == wanted
    for path in wanted:
        assert world.ranges(path) == [None]


def test_side_files_have_their_names_before_training_shards(tmp_path):
    request = hub.request_from(tmp_path, "sp8192_caseops", 1, False, {}, "main")
    entry = {"stats": {"files_val": 2}}
    order = [case_shard(split, number) for split in ("val", "val_bytes") for number in (0, 1)]
    assert request.paths(entry, {"model_path": CASE_MODEL}, 3) == [
        CASE_MODEL,
        *order,
        case_shard("train", 0),
    ]


def test_a_killed_download_of_a_case_export_goes_on(world, listing):
    """No file has its name before the last is there; what came is not fetched again."""
    wanted = serve_case(world, listing)
    world.spoil(case_shard("train", 1), Fault(drop=10_000, stall=600))
    running = world.start(**CASE_CALL)
    others = len(wanted) - 1
    until(lambda: world.partial_bytes(1) == 10_000)
    until(lambda: [len(world.ranges(path)) for path in wanted] == [1] * (others + 1))
    running.kill()
    assert not world.finished
    assert not (world.root / "manifest.json").exists()
    world.run(**CASE_CALL)
    assert world.here == wanted
    assert world.ranges(case_shard("train", 1)) == [None, "bytes=10000-"]


def test_a_case_export_that_was_killed_while_it_got_its_names(world, listing):
    """Names without a record: the files are looked at, the others fetched."""
    wanted = serve_case(world, listing)
    named = no_training(wanted, 1)
    world.write(named)
    world.run(**CASE_CALL)
    assert world.here == wanted
    for path in wanted:
        assert world.ranges(path) == ([] if path in named else [None])


def test_an_older_entry_of_a_case_export_does_not_matter(world, listing):
    """The published documents start with token 1, whatever was recorded under that name."""
    serve_case(world, listing)
    manifest = {"tokenizers": [], "datasets": [{"name": CASE_NAME, "bos_id": 2}]}
    world.write({"manifest.json": json.dumps(manifest).encode()})
    world.run(**CASE_CALL)
    assert world.dataset(CASE_NAME)["bos_id"] == 1


def first_document(files):
    """The first validation document, with its document start."""
    tokens = tokens_of(files[case_shard("val", 0)])
    return tokens[: np.flatnonzero(tokens == 1)[1]]


def no_side_file(files, manifest):
    del files[case_shard("val_bytes", 1)]


def short_side_file(files, manifest):
    path = case_shard("val_bytes", 1)
    files[path] = shard_of(tokens_of(files[path])[:-1])


def no_tokenizer(files, manifest):
    del files[CASE_MODEL]


def no_validation(files, manifest):
    for number in (0, 1):
        del files[case_shard("val", number)]


def one_document_less(files, manifest):
    path = case_shard("val", 0)
    tokens = tokens_of(files[path]).copy()
    tokens[np.flatnonzero(tokens == 1)[1]] = 9
    files[path] = shard_of(tokens)


def validation_trains(files, manifest):
    path = case_shard("train", 1)
    tokens = tokens_of(files[path])
    second = np.flatnonzero(tokens == 1)[0]
    files[path] = shard_of(tokens[:second], first_document(files), tokens[second:])


def validation_trains_across_shards(files, manifest):
    document = first_document(files)
    for number, kept in ((0, slice(50)), (1, slice(50, None))):
        path = case_shard("train", number)
        tokens = tokens_of(files[path])
        parts = (tokens, document[kept]) if number == 0 else (document[kept], [1], tokens)
        files[path] = shard_of(*parts)


def tokenizer_without_markers(files, manifest):
    files[CASE_MODEL] = small_model()


def told_docs_val(files, manifest):
    manifest["datasets"][0]["stats"]["docs_val"] = 5


def told_num_val_docs(files, manifest):
    manifest["num_val_docs"] = 10_000


def told_transform(files, manifest):
    manifest["tokenizers"][0]["case_transform"] = "case2"


def told_charges(files, manifest):
    manifest["datasets"][0]["charged_bytes"] = {"val": 1}


@dataclass(frozen=True)
class BadExport:
    """What is wrong with a published export, and a part of the refusal."""

    spoil: object
    message: str
    early: bool = False  # before any shard is asked for
    manifest: bool = False


BAD_EXPORTS = [
    BadExport(
        no_side_file, f"{CASE_REPOSITORY}: no file datasets/{case_shard('val_bytes', 1)}", True
    ),
    BadExport(
        short_side_file,
        rf"file datasets/{case_shard('val_bytes', 1)} has \d+ bytes; it needs the \d+ of "
        "fineweb_val_000001.bin",
        True,
    ),
    BadExport(no_tokenizer, f"no file datasets/{CASE_MODEL}", True),
    BadExport(no_validation, f"no file datasets/{case_shard('val', 0)}", True),
    BadExport(
        one_document_less,
        rf"{CASE_REPOSITORY}: validation has 5 documents \(token 1\), but the challenge's "
        f"validation is its first {CASE_VAL_DOCS} documents; nothing new has its final name",
    ),
    BadExport(
        validation_trains,
        f"{CASE_REPOSITORY}: 1 training documents are also validation documents .*, but none may "
        "be; nothing new has its final name",
    ),
    BadExport(validation_trains_across_shards, ": 1 training documents are also"),
    BadExport(tokenizer_without_markers, "reserved.model: no pieces for the case markers"),
    BadExport(told_docs_val, "manifest says docs_val 5 for .* first 6 documents", True, True),
    BadExport(told_num_val_docs, "manifest says num_val_docs 10000 for", True, True),
    BadExport(told_transform, "says case_transform case2 for .*, expected caseops", True, True),
    BadExport(told_charges, r"side files charge \d+ bytes, but the manifest says 1;", False, True),
]


@pytest.mark.parametrize("bad", BAD_EXPORTS, ids=[bad.spoil.__name__ for bad in BAD_EXPORTS])
def test_a_case_export_that_is_refused(bad, world, listing, told):
    """By name; nothing gets its own, and nothing is recorded. A second call does not help."""
    bad.spoil(listing, told)
    serve_case(world, listing, told if bad.manifest else None)
    for _ in range(2):
        message = world.refused(**CASE_CALL)
        assert re.search(bad.message, message), message
    assert not world.finished
    assert not (world.root / "manifest.json").exists()
    if bad.early:
        assert not [what for _, what, _ in world.hub.requests if what.endswith(".bin")]


def test_wrong_validation_of_a_case_export_costs_no_training_shards(world, listing):
    """It is refused while they are still on their way: here they do not come at all."""
    one_document_less(listing, None)
    serve_case(world, listing)
    gate = threading.Event()
    for number in range(5):
        world.spoil(case_shard("train", number), Fault(gate=gate))
    assert "validation has 5 documents" in world.refused(**CASE_CALL)
    gate.set()


def test_wrong_validation_that_is_here_costs_no_training_shards(world, listing):
    """Another tool fetched it, and gave it its name."""
    one_document_less(listing, None)
    wanted = serve_case(world, listing)
    for path in no_training(wanted):
        (world.root / path).parent.mkdir(parents=True, exist_ok=True)
        (world.root / path).write_bytes(wanted[path])
    assert "validation has 5 documents" in world.refused(**CASE_CALL)
    for path in wanted:
        assert world.ranges(path) == []


def test_overlap_that_comes_with_later_shards(world, listing):
    """What was right keeps its name and its record; the new shards get neither."""
    validation_trains(listing, None)
    wanted = serve_case(world, listing)
    world.run(train_shards=1, **CASE_CALL)
    before = world.dataset(CASE_NAME)
    assert "1 training documents are also" in world.refused(train_shards=2, **CASE_CALL)
    assert world.finished == no_training(wanted, 1)
    assert world.dataset(CASE_NAME) == before
    assert_nobody_is_asked(world, train_shards=1, **CASE_CALL)


def test_the_challenges_validation_has_50000_documents(world, listing):
    assert verify.VAL_DOCS == 50_000
    serve_case(world, listing)
    assert "its first 50000 documents" in world.refused(variant="sp8192_caseops")


# --------------------------------------------------------------------------------------------------
# What is there already
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [2, 0])
def test_a_broken_local_shard_is_repaired(world, asked):
    world.run(train_shards=2)
    path = world.root / train(1)
    path.write_bytes(world.remote[train(1)][:-50])
    done = world.run(train_shards=asked)
    wanted = world.wanted(train_shards=2)
    assert world.here == wanted
    size = tg.SHARD_HEADER_BYTES + 2 * TRAIN_SIZES[1] - 50
    assert f"{path}: {size} bytes" in done.err
    assert "downloading it again" in done.err
    for path in wanted:
        assert len(world.ranges(path)) == (2 if path == train(1) else 1)


@pytest.mark.parametrize("path", [train(0), MODEL])
def test_other_data_is_not_overwritten(world, path):
    other = shard(100, seed=99)
    if path == MODEL:
        other = small_model() + b"\x12\x00"
    world.write({path: other})
    message = world.refused(train_shards=1)
    assert str(world.root / path) in message
    assert "--replace" in message
    assert world.here[path] == other
    done = world.run(train_shards=1, options={"replace": True})
    assert world.here == world.wanted(train_shards=1)
    assert f"{world.root / path}: replacing" in done.err


def test_a_shard_that_changed_with_the_revision_is_replaced(world):
    """Another content of the same size: the record of the old one says nothing about the new."""
    world.run(train_shards=1)
    old = world.remote[train(0)]
    world.hub.repositories[OFFICIAL][remote(train(0))] = shard(TRAIN_SIZES[0], seed=99)
    commit = commit_of(world.hub.repositories[OFFICIAL])
    assert "--replace" in world.refused(train_shards=1, options={"revision": commit})
    assert world.here[train(0)] == old
    world.run(train_shards=1, options={"revision": commit, "replace": True})
    assert world.here == world.wanted(train_shards=1)


def test_a_shard_that_the_repository_does_not_have(world):
    world.run(train_shards=1)
    world.write({train(77): shard(9)})
    message = world.refused(train_shards=1)
    assert str(world.root / train(77)) in message
    assert "move it away" in message


# --------------------------------------------------------------------------------------------------
# Where it goes
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def place(monkeypatch):
    """What `prepare.py fineweb` would fetch, by options and environment: (folder, variant)."""
    asked = []

    def fetch(root, variant, *rest):
        asked.append((root, variant))
        return {}

    monkeypatch.setattr(hub, "fetch", fetch)

    def place(*options, **env):
        assert prepare.main(["fineweb", *options], env) == 0
        return asked[-1]

    return place


def test_default_place(place, tmp_path):
    """DATA_PATH names folder and variant: in the environment, the config file, or by DEFAULTS."""
    assert place() == (ROOT / "data", "sp8192_caseops")
    assert place(DATA_PATH="/x/datasets/fineweb10B_byte260") == (Path("/x"), "byte260")
    file = tmp_path / "config.env"
    file.write_text("DATA_PATH=./data/datasets/fineweb10B_sp8192\n")
    config = str(file)
    assert place(CONFIG=config) == (ROOT / "data", "sp8192")
    file.write_text("DEFAULTS=baseline\n")
    assert place(CONFIG=config) == place(DEFAULTS="baseline") == (ROOT / "data", "sp1024")
    assert place(CONFIG=config, DEFAULTS="") == (ROOT / "data", "sp8192_caseops")
    data_path = "y/datasets/fineweb10B_sp4096"
    assert place(CONFIG=config, DATA_PATH=data_path) == (ROOT / "y", "sp4096")
    assert place(DATA_PATH=f"/x/{CASE_FOLDER}") == (Path("/x"), "sp8192_caseops")


def test_data_that_is_here_already_is_gone_on_with(place, tmp_path, monkeypatch):
    """Where train_gpt.py would find it: seen from the working folder."""
    (tmp_path / "some/datasets/fineweb10B_sp1024").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert place(DATA_PATH="some/datasets/fineweb10B_sp1024") == (tmp_path / "some", "sp1024")
    assert place(DATA_PATH="other/datasets/fineweb10B_sp1024") == (ROOT / "other", "sp1024")


def test_options_choose_another_place(place):
    """--root and --variant, each for its half of what DATA_PATH names."""
    sp8192 = ("--variant", "sp8192")
    assert place(*sp8192, DATA_PATH="/x/datasets/mine") == (Path("/x"), "sp8192")
    assert place("--root", "/y", DATA_PATH="/fineweb10B_sp4096") == (Path("/y"), "sp4096")
    assert place("--root", "/y", *sp8192, DATA_PATH="/x") == (Path("/y"), "sp8192")


@pytest.mark.parametrize(
    "env, complaint",
    [
        ({"DATA_PATH": "data/datasets/sotu_sp1024"}, "names no published dataset .*--variant"),
        (
            {"DATA_PATH": "/x/fineweb10B_sp1024"},
            "expected <folder>/datasets/fineweb10B_sp1024; --root",
        ),
        ({"CONFIG": "nowhere.env"}, "nowhere.env"),
    ],
)
def test_a_place_that_is_none_is_named(env, complaint, capsys):
    assert prepare.main(["fineweb"], env) == 64
    assert re.search(complaint, capsys.readouterr().err)
