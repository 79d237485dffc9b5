import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.store import OutputFolder
from tests.pipelines.command import deconv, refused
from tests.pipelines.corpora import corpus_config, make_texts, specs_of, write_bytes_column, write_shard

TEXTS = make_texts(120)
COMMANDS = ("run", "plan", "status", "generate", "score")
HEAVY = re.compile(r"\b(torch|ray|mlflow|prefect|pandas|matplotlib|tokenizers|gigatoken)$", re.MULTILINE)


@pytest.fixture
def shards(tmp_path):
    for name in ("a", "b"):
        write_shard(tmp_path / "shards" / f"{name}.parquet", TEXTS)
    return tmp_path / "shards"


def test_every_command_explains_itself_with_examples(tmp_path):
    general = deconv(tmp_path, "--help")
    assert general.returncode == 0
    assert deconv(tmp_path).stdout == general.stdout, "without a command it says what there is"
    assert all(re.search(rf"^  {command} ", general.stdout, re.MULTILINE) for command in COMMANDS)
    for command in COMMANDS:
        text = deconv(tmp_path, command, "-h").stdout
        assert f"  deconv {command}" in text, "no example"
        assert text.startswith(f"Usage: python -m pipelines.cli {command}")
    assert "--preset" in deconv(tmp_path, "run", "--help").stdout
    assert list(tmp_path.iterdir()) == []


def test_the_installed_script_is_this_tool(tmp_path):
    script = Path(sys.executable).with_name("deconv")
    if not script.exists():
        pytest.skip("the package is not installed into this environment")
    version = subprocess.run([script, "--version"], capture_output=True, text=True, check=True).stdout
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", version)
    assert deconv(tmp_path, "--version").stdout == version


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["frobnicate"], "No such command 'frobnicate'; see"),
        (["plan", "--sett", "a=b"], "No such option '--sett'"),
        (["plan", "extra"], "extra argument"),
        (["score"], "Missing argument 'FILE'"),
        (["generate"], "Missing argument 'TEXT'"),
        (["generate", "a", "--top-k", "x"], "'x' is not a valid integer"),
        (["generate", "a", "--temperature", "-1"], "-1"),
        (["plan", "--preset", "demos"], "unknown preset 'demos'; the nearest known one is demo"),
        (["plan", "--set", "train.stps=1"], "unknown key train.stps; the nearest known one is train.steps"),
        (["run", "--set", "train.stps=1"], "unknown key train.stps; the nearest known one is train.steps"),
        (["run", "--set", "corpus.valid_fraction=0.7"], "corpus.valid_fraction must be less than 0.5, got 0.7"),
        (["run", "--set", "tokenizer.vocab_size=100"], "every byte and the end of a document"),
        (["run", "--set", "a\nb=1"], "unknown key a b"),
        (["run", "--config", "nope.yaml"], "cannot read the configuration nope.yaml: No such file"),
        (["run", "--json", "."], "is a directory"),
        (["run", "--preset", "wikitext2"], "corpus.path data/wikitext-2/train: there is no such file or folder"),
    ],
)
def test_what_cannot_be_meant_is_one_line(tmp_path, arguments, part):
    assert part in refused(tmp_path, *arguments)
    assert list(tmp_path.iterdir()) == []


def damage(folder: Path, fault: str) -> None:
    shard = folder / "b.parquet"
    if fault == "no Parquet":
        for file in folder.iterdir():
            file.rename(file.with_suffix(".csv"))
    elif fault == "another column":
        write_shard(shard, TEXTS, column="body")
    elif fault == "another type":
        write_shard(shard, [1, 2], kind="int64")  # type: ignore[list-item]
    elif fault == "no rows":
        for file in folder.iterdir():
            write_shard(file, [])
    elif fault == "zero bytes":
        shard.write_bytes(b"")
    elif fault == "truncated":
        os.truncate(shard, shard.stat().st_size // 2)


@pytest.mark.parametrize(
    ("fault", "part"),
    [
        ("no Parquet", "there are no *.parquet files in this folder"),
        ("another column", "b.parquet has no column 'text'; its columns are id, body"),
        ("another type", "b.parquet has column 'text' of type int64, not text"),
        ("no rows", "the 2 Parquet shards hold no rows"),
        ("zero bytes", "b.parquet is empty (0 bytes)"),
        ("truncated", "b.parquet is truncated or not Parquet"),
    ],
)
def test_a_corpus_that_cannot_be_used_ends_the_run_before_it_starts(tmp_path, shards, fault, part):
    damage(shards, fault)
    assert part in refused(tmp_path, "run", "--set", f"corpus.path={shards}")
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_path_that_is_not_there_ends_every_command(tmp_path, command):
    assert "there is no such file or folder" in refused(tmp_path, command, "--set", "corpus.path=nope")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("variable", "value"),
    [("DECONV_STORAGE", "/proc/steps"), ("DECONV_STORAGE", "{}/a.parquet"), ("DECONV_HOME", "{}/a.parquet/state")],
)
def test_a_storage_that_cannot_be_written_ends_the_run(tmp_path, shards, variable, value):
    message = refused(tmp_path, "run", "--set", f"corpus.path={shards}", **{variable: value.format(shards)})
    assert re.search(r"storage \S+ cannot be written .*: set DECONV_STORAGE to a folder that can$", message)


def test_a_home_that_cannot_be_written_ends_the_run_wherever_the_storage_is(tmp_path, shards):
    variables = {"DECONV_HOME": "/proc/state", "DECONV_STORAGE": str(tmp_path / "steps")}
    message = refused(tmp_path, "run", "--set", f"corpus.path={shards}", **variables)
    assert "DECONV_HOME: the folder /proc/state cannot be written" in message


def test_a_summary_that_could_not_be_written_ends_the_run_before_it_starts(tmp_path, shards):
    message = refused(tmp_path, "run", "--set", f"corpus.path={shards}", "--json", f"{shards}/a.parquet/s.json")
    assert "--json: the folder" in message
    assert "cannot be written" in message


def test_storages_that_are_no_address_are_refused(tmp_path):
    for command in ("plan", "status"):
        assert "nope://bucket" in refused(tmp_path, command, DECONV_STORAGE="nope://bucket")


def test_a_plan_for_people_and_for_programs(tmp_path, shards):
    arguments = ("--set", f"corpus.path={shards}", "--set", "train.steps=7")
    lines = deconv(tmp_path, "plan", *arguments).stdout.splitlines()
    data = json.loads(deconv(tmp_path, "plan", "--json", *arguments).stdout)
    assert data["storage"] == str(tmp_path / "state" / "steps")
    assert data["config"]["train"]["steps"] == 7
    assert [line.split() for line in lines] == [
        [step["step"], "to", "do", f"{data['storage']}/{step['address']}"] for step in data["steps"]
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["shards"], "a plan makes nothing"


def test_a_plan_and_a_status_tell_what_is_there(tmp_path, shards):
    arguments = ("--set", f"corpus.path={shards}")
    steps = {s["step"]: s for s in json.loads(deconv(tmp_path, "plan", "--json", *arguments).stdout)["steps"]}
    storage = tmp_path / "state" / "steps"
    corpus = OutputFolder(str(storage / steps["corpus"]["address"]))
    corpus.write_bytes("manifest.json", b"x" * 1_500_000)
    corpus.finish({}, 2.5)
    OutputFolder(str(storage / steps["train"]["address"])).write_json("spec.json", {})
    states = [line.split()[:2] for line in deconv(tmp_path, "plan", *arguments).stdout.splitlines()]
    assert states[0] == ["corpus", "cached"]
    assert states[3] == ["train", "resume"]
    text = deconv(tmp_path, "status").stdout
    assert text.splitlines()[0] == f"{storage}: 2 outputs, 1.5 MB"
    assert "complete" in text
    assert "took 2.5 s" in text
    outputs = json.loads(deconv(tmp_path, "status", "--json").stdout)["outputs"]
    assert [(o["address"], o["state"]) for o in outputs] == [
        (steps["corpus"]["address"], "complete"),
        (steps["train"]["address"], "left"),
    ]


@pytest.mark.parametrize("command", [["--help"], ["run", "--help"], ["plan"], ["status"], ["plan", "--preset", "base"]])
def test_quick_answers_import_nothing_heavy(tmp_path, shards, command):
    if command[0] in ("plan", "status"):
        # A complete register step is the one that a plan asks whether it is still true.
        config = corpus_config(shards)
        output = OutputFolder(str(tmp_path / "state" / "steps" / specs_of(config)["register"].address))
        output.finish({"name": "deconv-lm", "version": "1", "weights_sha256": "0"}, 1.0)
        options = () if command[0] == "status" else ("--set", f"corpus.path={shards}")
        small = ("corpus.valid_fraction=0.2", "corpus.test_fraction=0.2", "tokenizer.vocab_size=300")
        if command == ["plan"]:
            options += tuple(part for setting in small for part in ("--set", setting))
        command = [*command, *options]
    result = deconv(tmp_path, *command, python=("-X", "importtime"))
    assert result.returncode == 0
    assert "import time:" in result.stderr
    assert HEAVY.findall(result.stderr) == []
    if "plan" in command and "base" not in command:
        assert "pipelines.registry" in result.stderr, "the register step was not asked"


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "cannot read text.txt: No such file or directory"),
        (b"", "text.txt is empty: there is nothing to score"),
        (b"caf\xe9", "text.txt is not UTF-8 text: byte 3 cannot be read"),
    ],
)
def test_files_that_cannot_be_scored(tmp_path, content, part):
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    assert part in refused(tmp_path, "score", "text.txt")


def test_standard_input_and_folders_that_cannot_be_scored(tmp_path):
    assert "- is empty: there is nothing to score" in refused(tmp_path, "score", "-")
    assert "- is not UTF-8 text: byte 0" in refused(tmp_path, "score", "--json", "-", stdin=b"\xff")
    assert "cannot read .: Is a directory" in refused(tmp_path, "score", ".")


def test_without_a_registered_model_there_is_nothing_to_ask(tmp_path):
    (tmp_path / "text.txt").write_text("some text")
    for command in (("score", "text.txt"), ("generate", "some text")):
        message = refused(tmp_path, *command)
        assert "deconv-lm" in message


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "cannot read spec.json: No such file or directory"),
        (b"", "spec.json is not JSON"),
        (b"\xff\x00", "spec.json is not JSON"),
        (b"[]", "spec.json is not a step specification"),
        (b"{}", "not a step specification"),
        (b'{"step": "x", "version": 1, "config": {}, "inputs": {}, "address": "x-1"}', "unknown step 'x'"),
        (b'{"step": "corpus", "version": 1, "config": {}, "inputs": {}, "address": "../x"}', "is not the address"),
    ],
)
def test_a_step_by_itself_refuses_a_specification_that_is_none(tmp_path, content, part):
    if content is not None:
        (tmp_path / "spec.json").write_bytes(content)
    assert part in refused(tmp_path, "corpus", "spec.json", module="pipelines.steps")


def test_a_step_by_itself_refuses_the_specification_of_another(tmp_path, shards):
    spec = specs_of(corpus_config(shards))["tokens"]
    (tmp_path / "spec.json").write_text(json.dumps(spec.to_dict()))
    message = refused(tmp_path, "train", "spec.json", module="pipelines.steps")
    assert message == "error: spec.json specifies step tokens, not train"
    usage = deconv(tmp_path, "train", module="pipelines.steps")
    assert (usage.returncode, usage.stderr) == (2, "usage: python -m pipelines.steps NAME SPEC.json\n")


def test_a_step_by_itself_whose_input_is_missing_can_be_run_again(tmp_path, shards):
    spec = specs_of(corpus_config(shards))["tokens"]
    (tmp_path / "spec.json").write_text(json.dumps(spec.to_dict()))
    result = deconv(tmp_path, "tokens", "spec.json", module="pipelines.steps")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].endswith("which is not complete: run step corpus first")


@pytest.mark.slow
def test_a_planned_step_runs_by_itself(tmp_path, shards):
    plan = json.loads(deconv(tmp_path, "plan", "--json", "--set", f"corpus.path={shards}").stdout)
    (tmp_path / "spec.json").write_text(json.dumps(plan["steps"][0]))
    first = deconv(tmp_path, "corpus", "spec.json", module="pipelines.steps")
    assert first.returncode == 0, first.stderr
    answer = json.loads(first.stdout)
    assert answer["uri"] == f"{plan['storage']}/{plan['steps'][0]['address']}"
    assert (answer["cached"], answer["result"]["documents"]) == (False, 240)
    second = json.loads(deconv(tmp_path, "corpus", "spec.json", module="pipelines.steps").stdout)
    assert second == {**answer, "cached": True}


@pytest.mark.slow
def test_a_fault_that_only_reading_finds_ends_the_run_with_one_line(tmp_path, shards):
    write_bytes_column(shards / "b.parquet", [b"caf\xe9"])
    result = deconv(tmp_path, "run", "--set", f"corpus.path={shards}", "--json", "summary.json")
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.stderr.splitlines()[-1] == error
    assert f"{shards}/b.parquet: text that is not UTF-8" in error
    assert not (tmp_path / "summary.json").exists()
    assert [path for path in (tmp_path / "state").rglob("*") if path.name in ("_SUCCESS", "mlflow.db")] == []
    corpus = json.loads(deconv(tmp_path, "status", "--json").stdout)["outputs"]
    assert [output["state"] for output in corpus] == ["left"]
