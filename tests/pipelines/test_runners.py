import json
import os
import subprocess
import sys
import threading

import pytest

from pipelines.errors import ConfigError, DataError, InfraError
from pipelines.lease import read_lease
from pipelines.runners import run_step
from pipelines.status import list_outputs, step_state
from pipelines.store import Storage
from tests.pipelines.corpora import corpus_config, finish_corpus, make_texts, specs_of, write_shard

# Runs the tokenizer step of the specification in a file when it is told to, and says whether it was cached.
RUNNER = """
import json, sys
from pipelines.runners import run_step
from pipelines.steps import StepSpec
from pipelines.store import Storage
import pipelines.steps.tokenizer
print("ready", flush=True)
sys.stdin.readline()
report = run_step(StepSpec.from_dict(json.load(open(sys.argv[1]))), Storage(sys.argv[2]))
print(json.dumps([report.cached, report.output.result["sha256"]]), flush=True)
"""
# Holds the lease of a folder until it is told to finish the output in it.
OWNER = """
import sys
from pipelines.lease import Lease
from pipelines.store import OutputFolder
output = OutputFolder(sys.argv[1])
lease = Lease(output)
assert lease.try_acquire() is None
with lease:
    output.write_json("spec.json", {})
    print("owner", flush=True)
    sys.stdin.readline()
    output.owned_by(lease.token).write_bytes("tokenizer.json", b"of the owner")
    output.finish({"sha256": "of the owner"}, 7.5)
"""


@pytest.fixture
def storage(tmp_path):
    return Storage(str(tmp_path / "steps"))


@pytest.fixture
def spec(tmp_path, storage):
    """A tokenizer step whose corpus is complete."""
    write_shard(tmp_path / "shards" / "a.parquet", make_texts(100))
    specs = specs_of(corpus_config(tmp_path / "shards"))
    finish_corpus(specs["corpus"], storage)
    return specs["tokenizer"]


def start(*arguments: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() in ("ready", "owner")
    return process


def fault_of(spec, storage, error, state="resume"):
    with pytest.raises(error) as caught:
        run_step(spec, storage)
    assert len(str(caught.value).splitlines()) == 1
    assert not storage.output(spec.address).exists("_SUCCESS")
    assert read_lease(storage.output(spec.address)) is None, "the lease was not given back"
    assert step_state(spec, storage) == state
    return str(caught.value)


def test_a_step_is_done_once_and_then_read(spec, storage):
    assert step_state(spec, storage) == "to do"
    first = run_step(spec, storage)
    assert not first.cached
    assert first.output.is_complete()
    assert step_state(spec, storage) == "cached"
    files = {name: first.output.local(name).stat().st_mtime_ns for name in first.output.sizes()}
    second = run_step(spec, storage)
    assert second.cached
    assert second.seconds == first.seconds
    assert {name: first.output.local(name).stat().st_mtime_ns for name in first.output.sizes()} == files


def test_an_output_says_what_was_asked_and_how_it_was_made(spec, storage):
    output = run_step(spec, storage).output
    assert output.read_json("spec.json") == json.loads(json.dumps(spec.to_dict()))
    (attempt,) = output.read_json("provenance.json")["attempts"]
    assert attempt["packages"]["tokenizers"]
    assert attempt["argv"] == sys.argv
    assert set(output.read_json("_SUCCESS")["files"]) == {
        "spec.json",
        "provenance.json",
        "tokenizer.json",
        "result.json",
    }


def test_of_several_runs_at_once_one_does_the_work(tmp_path, spec, storage):
    (tmp_path / "spec.json").write_text(json.dumps(spec.to_dict()))
    processes = [start(RUNNER, str(tmp_path / "spec.json"), storage.uri) for _ in range(3)]
    answers = [json.loads(process.communicate("\n")[0]) for process in processes]
    assert sorted(cached for cached, _ in answers) == [False, True, True]
    assert len({digest for _, digest in answers}) == 1
    assert len(storage.output(spec.address).read_json("provenance.json")["attempts"]) == 1


def test_a_run_waits_for_a_living_owner_and_reads_its_output(spec, storage):
    output = storage.output(spec.address)
    owner = start(OWNER, output.uri)
    assert step_state(spec, storage) == "running"
    reports = []
    thread = threading.Thread(target=lambda: reports.append(run_step(spec, storage)))
    thread.start()
    thread.join(1.2)
    assert thread.is_alive(), "it did not wait"
    owner.communicate("\n")
    thread.join()
    assert (reports[0].cached, reports[0].seconds) == (True, 7.5)
    assert output.read_bytes("tokenizer.json") == b"of the owner"


@pytest.mark.fault
def test_a_run_takes_over_at_once_from_an_owner_that_was_killed(spec, storage):
    output = storage.output(spec.address)
    owner = start(OWNER, output.uri)
    output.local(".0a1b2c3d.tmp.tokenizer.json").write_bytes(b"half")
    owner.kill()
    report = run_step(spec, storage)
    assert not report.cached
    assert report.output.is_complete()
    assert not output.local(".0a1b2c3d.tmp.tokenizer.json").exists(), "litter stayed"
    owner.communicate()


@pytest.mark.parametrize("name", ["tokenizer.json", "result.json", "spec.json"])
def test_an_output_that_lost_a_file_is_done_again(spec, storage, name):
    before = run_step(spec, storage).output.result
    storage.output(spec.address).remove(name)
    report = run_step(spec, storage)
    assert not report.cached
    assert report.output.result == before
    assert len(report.output.read_json("provenance.json")["attempts"]) == 2


def test_a_fault_of_the_user_leaves_nothing_complete(spec, storage, tmp_path):
    (tmp_path / "shards" / "a.parquet").write_bytes(b"")
    assert "a.parquet" in fault_of(spec, storage, DataError)
    write_shard(tmp_path / "shards" / "a.parquet", make_texts(100))
    assert not run_step(spec, storage).cached, "mended, it goes on"


def test_a_given_tokenizer_that_is_none_leaves_nothing_complete(tmp_path, spec, storage):
    (tmp_path / "mine.json").write_text("{}")
    mine = specs_of(corpus_config(tmp_path / "shards", f"tokenizer.path={tmp_path / 'mine.json'}"))["tokenizer"]
    assert "is not a tokenizer.json" in fault_of(mine, storage, ConfigError)
    assert set(storage.output(mine.address).sizes()) == {"spec.json", "provenance.json", "_lease.lock"}


def test_a_fault_of_the_disk_is_one_line_and_can_be_tried_again(spec, storage):
    manifest = storage.output(spec.inputs["corpus"]).local("manifest.json")
    success = storage.output(spec.inputs["corpus"]).local("_SUCCESS")
    data = json.loads(success.read_text())
    data["files"].pop("manifest.json")
    success.write_text(json.dumps(data))
    manifest.rename(manifest.with_name("moved"))
    message = fault_of(spec, storage, InfraError)
    assert message == f"step tokenizer: No such file or directory ({manifest})"
    manifest.with_name("moved").rename(manifest)
    assert not run_step(spec, storage).cached


def test_a_bug_gives_the_lease_back_too(spec, storage):
    storage.output(spec.inputs["corpus"]).write_json("manifest.json", {"shards": 3})
    os.truncate(storage.output(spec.inputs["corpus"]).local("_SUCCESS"), 0)
    storage.output(spec.inputs["corpus"]).finish({}, 0.0)
    with pytest.raises(TypeError):
        run_step(spec, storage)
    assert read_lease(storage.output(spec.address)) is None
    assert step_state(spec, storage) == "resume"


def test_a_step_whose_input_is_not_complete_says_which(spec, storage):
    storage.output(spec.inputs["corpus"]).remove("manifest.json")
    message = fault_of(spec, storage, InfraError, state="to do")
    assert spec.inputs["corpus"] in message
    assert "run step corpus first" in message


def test_status_tells_what_is_there(spec, storage):
    assert [(o["address"], o["state"]) for o in list_outputs(storage)] == [(spec.inputs["corpus"], "complete")]
    storage.output("notes-0123456789ab").write_bytes("a", b"of somebody else")
    storage.output("train-0123456789ab").write_json("spec.json", {})
    owner = start(OWNER, storage.output(spec.address).uri)
    corpus, tokenizer, train = list_outputs(storage)
    assert (corpus["state"], corpus["note"]) == ("complete", "took 0.0 s")
    assert corpus["bytes"] == sum(storage.output(spec.inputs["corpus"]).sizes().values())
    assert tokenizer["state"] == "running"
    assert f"process {owner.pid} of " in tokenizer["note"]
    assert (train["state"], train["bytes"]) == ("left", 2)
    storage.output(spec.address).write_json("_progress.json", {"step": 1200, "steps": 3000, "loss": 4.56789})
    assert list_outputs(storage)[1]["note"].endswith(", step 1,200 of 3,000, loss 4.568")
    storage.output(spec.address).write_bytes("_progress.json", b"{")
    assert f"process {owner.pid} of " in list_outputs(storage)[1]["note"]
    owner.kill()
    owner.communicate()
    assert list_outputs(storage)[1]["state"] == "left"
    assert list_outputs(Storage(f"{storage.uri}/nope")) == []
