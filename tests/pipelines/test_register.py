import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deconv_model.saving import load_model
from deconv_model.scoring import score_documents
from pipelines import gate, registry, scoring, verification
from pipelines.errors import ConfigError, InfraError
from pipelines.registry import CHALLENGER, CHAMPION, PREVIOUS
from pipelines.steps import register
from pipelines.store import StepOutput
from tests.pipelines.finished_steps import (
    TEXTS,
    finish_evaluate,
    finish_inputs,
    finish_tokenizer,
    make_texts,
    register_output,
    use_fresh_mlflow,
)

CONFIG = {"name": "tiny", "confidence": 0.95}


@pytest.fixture(autouse=True)
def _mlflow(tmp_path, monkeypatch):
    use_fresh_mlflow(tmp_path, monkeypatch)


@pytest.fixture
def _without_fresh_process(monkeypatch):
    """Leave out the fresh process, which takes seconds, where a test is about something else."""
    monkeypatch.setattr(verification, "verify_in_fresh_process", lambda *_: None)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, StepOutput]]:
    root = tmp_path_factory.mktemp("models")
    return {
        "poor": finish_evaluate(root, finish_inputs(root, steps=0)),
        "fair": finish_evaluate(root, finish_inputs(root, steps=15)),
        "good": finish_evaluate(root, finish_inputs(root, steps=40)),
        "good, measured otherwise": finish_evaluate(root, finish_inputs(root, steps=40), bootstrap_resamples=100),
        "good, fewer documents": finish_evaluate(root, finish_inputs(root, steps=40), max_documents=10),
        "good, larger vocabulary": finish_evaluate(root, finish_inputs(root, steps=40, vocab_size=320)),
        "good, other text": finish_evaluate(
            root, finish_inputs(root, steps=40, texts={**TEXTS, "test": make_texts(20, seed=9)})
        ),
    }


def _register(root, inputs) -> dict[str, Any]:
    output = register_output(root, inputs)
    result = register.run(CONFIG, inputs, output)
    output.finish(result, 0.0)
    return result


def _client():
    from mlflow import MlflowClient

    return MlflowClient()


def _count_scorings(monkeypatch) -> list[str]:
    """Return a list that gets the label of each scoring from now on."""
    labels = []
    score = scoring.score

    def counted(model, documents, *, start_id, label):
        labels.append(label)
        return score(model, documents, start_id=start_id, label=label)

    monkeypatch.setattr(scoring, "score", counted)
    return labels


def _aliases() -> dict[str, str]:
    return {alias: str(version) for alias, version in _client().get_registered_model("tiny").aliases.items()}


@pytest.mark.slow
def test_the_first_model_becomes_champion_and_answers_in_a_fresh_process(models, tmp_path):
    result = _register(tmp_path, models["good"])
    assert result["alias"] == result["decision"] == CHAMPION
    assert result["reason"] == "there is no champion yet"
    assert (result["champion"], result["difference"]) == (None, None)
    assert _aliases() == {CHAMPION: "1"}

    version = _client().get_model_version("tiny", "1")
    weights = models["good"]["train"].result["weights_sha256"]
    manifest = models["good"]["tokens"].read_json("tokens/manifest.json")
    for tag, value in {
        "deconv.verified": "true",
        "deconv.weights_sha256": weights,
        "deconv.tokenizer_sha256": manifest["tokenizer_sha256"],
        "deconv.test_digest": manifest["splits"]["test"]["digest"],
        "deconv.git_commit": "0123abc",
        "deconv.decision": CHAMPION,
        "deconv.reason": "there is no champion yet",
        **{f"deconv.{name}": step.address for name, step in models["good"].items()},
    }.items():
        assert version.tags[tag] == value
    assert result["weights_sha256"] == weights

    run = _client().get_run(result["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["train.steps"] == "40"
    assert run.data.params["register.name"] == "tiny"
    bits = models["good"]["evaluate"].result["bits_per_byte"]
    assert run.data.metrics["test/model/bits_per_byte/value"] == pytest.approx(bits)
    losses = _client().get_metric_history(result["run_id"], "train_loss")
    assert [metric.step for metric in losses] == list(range(1, 41))
    files = {file.path for file in _client().list_artifacts(result["run_id"], "evaluation")}
    assert {"evaluation/report.md", "evaluation/documents.parquet", "evaluation/loss_curve.png"} <= files


@pytest.mark.usefixtures("_without_fresh_process")
def test_a_worse_model_becomes_challenger(models, tmp_path):
    first = _register(tmp_path, models["good"])
    second = _register(tmp_path, models["poor"])
    assert second["alias"] == CHALLENGER
    assert second["reason"].startswith("worse than champion version 1: +")
    assert second["champion"]["version"] == first["version"] == "1"
    assert 0 < second["difference"]["low"] < second["difference"]["value"] < second["difference"]["high"]
    assert _aliases() == {CHAMPION: "1", CHALLENGER: "2"}


@pytest.mark.usefixtures("_without_fresh_process")
def test_a_better_model_becomes_champion_and_the_old_one_previous(models, tmp_path):
    _register(tmp_path, models["poor"])
    second = _register(tmp_path, models["fair"])
    third = _register(tmp_path, models["good"])
    assert second["alias"] == third["alias"] == CHAMPION
    assert third["reason"].startswith("better than champion version 2: -")
    assert _aliases() == {CHAMPION: "3", PREVIOUS: "2"}
    measured = [models[name]["evaluate"].result["bits_per_byte"] for name in ("good", "fair")]
    assert third["difference"]["value"] == pytest.approx(measured[0] - measured[1])
    assert third["champion"]["bits_per_byte"] == pytest.approx(measured[1])


@pytest.mark.usefixtures("_without_fresh_process")
def test_the_same_weights_again_become_challenger(models, tmp_path):
    _register(tmp_path, models["good"])
    again = _register(tmp_path, models["good, measured otherwise"])
    assert again["alias"] == CHALLENGER
    assert again["reason"] == "same weights as champion version 1"
    assert _aliases() == {CHAMPION: "1", CHALLENGER: "2"}


@pytest.mark.usefixtures("_without_fresh_process")
def test_a_champion_with_another_tokenizer_is_scored_on_the_same_text(models, tmp_path, monkeypatch):
    _register(tmp_path, models["good, larger vocabulary"])
    scored = _count_scorings(monkeypatch)
    result = _register(tmp_path, models["fair"])
    assert scored == ["champion"]
    ours, theirs = (models[name]["evaluate"].result["bits_per_byte"] for name in ("fair", "good, larger vocabulary"))
    assert result["champion"]["bits_per_byte"] == pytest.approx(theirs, rel=1e-5)
    assert result["difference"]["value"] == pytest.approx(ours - theirs, rel=1e-4)


@pytest.mark.parametrize("other", ["good, fewer documents", "good, other text"])
@pytest.mark.usefixtures("_without_fresh_process")
def test_a_champion_measured_on_other_documents_is_scored_again(models, tmp_path, monkeypatch, other):
    _register(tmp_path, models["fair"])
    scored = _count_scorings(monkeypatch)
    result = _register(tmp_path, models[other])
    assert scored == ["champion"]
    assert result["alias"] == CHAMPION
    fair, tokenizer = load_model(models["fair"]["train"].local("model"))
    texts = {"good, fewer documents": [TEXTS["test"][i] for i in range(26) if i in {n * 26 // 10 for n in range(10)}]}
    texts["good, other text"] = make_texts(20, seed=9)
    documents = scoring.encode_documents(tokenizer, texts[other], 0)
    bits = score_documents(fair, documents, start_id=0).sum() / math.log(2) / sum(len(t.encode()) for t in texts[other])
    assert result["champion"]["bits_per_byte"] == pytest.approx(bits, rel=1e-5)


@pytest.mark.usefixtures("_without_fresh_process")
def test_a_kill_between_version_and_alias_leaves_one_of_everything(models, tmp_path, monkeypatch):
    _register(tmp_path, models["poor"])
    set_alias = registry.set_alias

    def killed_at(alias):
        def stop(client, name, asked, version):
            if asked == alias:
                raise KeyboardInterrupt
            set_alias(client, name, asked, version)

        return stop

    for alias in (PREVIOUS, CHAMPION):
        monkeypatch.setattr(registry, "set_alias", killed_at(alias))
        with pytest.raises(KeyboardInterrupt):
            _register(tmp_path, models["good"])
        assert _aliases()[CHAMPION] == "1"
    monkeypatch.setattr(registry, "set_alias", set_alias)
    result = _register(tmp_path, models["good"])
    assert result["version"] == "2"
    assert _aliases() == {CHAMPION: "2", PREVIOUS: "1"}
    # And once more after everything was done, as if the kill had come before the step's result was written.
    assert _register(tmp_path, models["good"]) == result

    versions = _client().search_model_versions("name = 'tiny'")
    assert sorted(str(version.version) for version in versions) == ["1", "2"]
    experiment = _client().get_experiment_by_name("deconv").experiment_id
    assert len(_client().search_runs([experiment])) == 2
    assert len(_client().search_logged_models([experiment])) == 2
    losses = _client().get_metric_history(result["run_id"], "train_loss")
    assert [metric.step for metric in losses] == list(range(1, 41))
    values = _client().get_metric_history(result["run_id"], "test/model/bits_per_byte/value")
    assert len(values) == 1


@pytest.mark.usefixtures("_without_fresh_process")
def test_a_kill_while_the_model_is_logged_leaves_one_logged_model(models, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    upload = MlflowClient.log_model_artifacts

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(MlflowClient, "log_model_artifacts", killed)
    with pytest.raises(KeyboardInterrupt):
        _register(tmp_path, models["good"])
    monkeypatch.setattr(MlflowClient, "log_model_artifacts", upload)
    result = _register(tmp_path, models["good"])
    experiment = _client().get_experiment_by_name("deconv").experiment_id
    (logged,) = _client().search_logged_models([experiment])
    assert str(logged.status) == "READY"
    assert result["alias"] == CHAMPION
    assert _client().get_run(result["run_id"]).info.status == "FINISHED"


@pytest.mark.slow
def test_a_version_that_answers_otherwise_gets_no_alias(models, tmp_path, monkeypatch):
    log_model = register._find_or_log_model

    def log_and_damage(*args):
        uri = log_model(*args)
        (logged,) = (tmp_path / "artifacts").rglob("model.safetensors")
        logged.write_bytes(models["fair"]["train"].read_bytes("model/model.safetensors"))
        return uri

    monkeypatch.setattr(register, "_find_or_log_model", log_and_damage)
    with pytest.raises(InfraError, match=r"gives \d\.\d+ bits per byte in a fresh process where this one has \d\.\d+"):
        _register(tmp_path, models["good"])
    assert _aliases() == {}
    assert _client().get_model_version("tiny", "1").tags["deconv.verified"] == "false"


@pytest.mark.slow
def test_a_model_that_does_not_load_is_named_with_the_reason():
    with pytest.raises(InfraError, match=r"models:/nobody/1 does not load and answer in a fresh process: .*nobody"):
        verification.verify_in_fresh_process("models:/nobody/1", ["text"], np.ones(1))


@pytest.mark.usefixtures("_without_fresh_process")
def test_a_champion_that_changes_during_the_comparison_is_compared_again(models, tmp_path, monkeypatch):
    _register(tmp_path, models["poor"])
    _register(tmp_path, models["good"])
    registry.set_alias(_client(), "tiny", CHAMPION, "1")
    decide = gate.decide
    met = []

    def decide_slowly(client, candidate, champion, confidence):
        decision = decide(client, candidate, champion, confidence)
        met.append(str(champion.version))
        if len(met) == 1:  # another run promotes its model meanwhile
            registry.move_aliases(client, "tiny", "2", CHAMPION)
        return decision

    monkeypatch.setattr(gate, "decide", decide_slowly)
    result = _register(tmp_path, models["fair"])
    assert met == ["1", "2"]
    assert result["alias"] == CHALLENGER
    assert _aliases() == {CHAMPION: "2", PREVIOUS: "1", CHALLENGER: "3"}


@pytest.mark.usefixtures("_without_fresh_process")
def test_two_that_choose_at_the_same_moment_leave_the_better_one_as_champion(models, tmp_path, monkeypatch):
    _register(tmp_path, models["poor"])
    with monkeypatch.context() as patched:
        undecided = (gate.Decision(CHALLENGER, "not yet"), CHALLENGER)
        patched.setattr(register, "_choose", lambda *_: undecided)
        for name in ("fair", "good"):
            _register(tmp_path, models[name])
    start = threading.Barrier(2)
    move_aliases = registry.move_aliases

    def move_slowly(*args):
        time.sleep(0.3)  # longer than a comparison: without the lock both would have met version 1
        move_aliases(*args)

    monkeypatch.setattr(registry, "move_aliases", move_slowly)

    def choose(version, name):
        start.wait()
        return register._choose(_client(), _client().get_model_version("tiny", version), models[name], CONFIG)

    with ThreadPoolExecutor(2) as threads:
        fair, good = threads.map(choose, ("2", "3"), ("fair", "good"))
    assert good[1] == CHAMPION
    if fair[1] == CHAMPION:
        assert good[0].champion["version"] == "2"
        assert _aliases() == {CHAMPION: "3", PREVIOUS: "2"}
    else:
        assert fair[0].champion["version"] == "3"
        assert _aliases() == {CHAMPION: "3", PREVIOUS: "1", CHALLENGER: "2"}


@pytest.mark.usefixtures("_without_fresh_process")
def test_a_registered_version_is_current_until_it_is_deleted(models, tmp_path, monkeypatch):
    output = register_output(tmp_path, models["good"])
    assert register.is_current(CONFIG, output) is False  # no result yet
    output.finish(register.run(CONFIG, models["good"], output), 0.0)
    assert register.is_current(CONFIG, output) is True

    with monkeypatch.context() as patched:
        patched.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'absent' / 'mlflow.db'}")
        assert register.is_current(CONFIG, output) is False
        assert not (tmp_path / "absent").exists()
        (tmp_path / "damaged.db").write_bytes(b"not a database" * 100)
        patched.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'damaged.db'}")
        with pytest.raises(InfraError, match="cannot be read"):
            register.is_current(CONFIG, output)

    _client().set_model_version_tag("tiny", "1", registry.WEIGHTS_TAG, "other")
    assert register.is_current(CONFIG, output) is False
    _client().set_model_version_tag("tiny", "1", registry.WEIGHTS_TAG, output.result["weights_sha256"])
    assert register.is_current(CONFIG, output) is True
    _client().delete_model_version("tiny", "1")
    assert register.is_current(CONFIG, output) is False

    result = _register(tmp_path, models["good"])
    assert result["version"] == "2"
    assert register.is_current(CONFIG, output) is True


@pytest.mark.usefixtures("_without_fresh_process")
def test_a_registered_model_comes_back_by_name_alias_or_version(models, tmp_path):
    _register(tmp_path, models["fair"])
    _register(tmp_path, models["good"])
    for reference, version in {"tiny": "2", "tiny@previous": "1", "models:/tiny@champion": "2", "tiny/1": "1"}.items():
        model, tokenizer, info = registry.load_registered(reference)
        assert (info.version, info.uri, info.end_of_document) == (version, f"models:/tiny/{version}", 0)
        assert info.aliases == ((CHAMPION,) if version == "2" else (PREVIOUS,))
        trained, _ = load_model(models["good" if version == "2" else "fair"]["train"].local("model"))
        document = scoring.encode_documents(tokenizer, ["the model"], 0)
        assert score_documents(model, document, start_id=0) == score_documents(trained, document, start_id=0)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (
            "tiny@nobody",
            r"no 'tiny' with the alias 'nobody' in the registry at sqlite:.*aliases are champion \(version 1\)",
        ),
        ("tiny/7", "no version 7 of 'tiny'"),
        ("other", "no 'other' with the alias 'champion'.*registered are tiny"),
        ("no such: thing", "is not a registered model: write NAME@champion"),
        ("foreign/1", "was not registered by this pipeline"),
    ],
)
@pytest.mark.usefixtures("_without_fresh_process")
def test_what_is_not_registered_is_refused_in_one_line(models, tmp_path, reference, message):
    _register(tmp_path, models["good"])
    if reference.startswith("foreign"):
        stranger = tmp_path / "stranger"
        stranger.mkdir()
        (stranger / "MLmodel").write_text("flavors:\n  python_function:\n    loader_module: json\n")
        _client().create_registered_model("foreign")
        _client().create_model_version("foreign", stranger.as_uri())
    with pytest.raises(ConfigError, match=message) as caught:
        registry.load_registered(reference)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("_without_fresh_process")
def test_files_that_are_damaged_or_gone_are_no_fault_of_the_user(models, tmp_path):
    _register(tmp_path, models["good"])
    (weights,) = (tmp_path / "artifacts").rglob("model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InfraError, match=r"files of models:/tiny/1 are damaged: .*model\.safetensors"):
        registry.load_registered("tiny")
    shutil.rmtree(tmp_path / "artifacts" / "models")
    with pytest.raises(InfraError, match="files of models:/tiny/1 cannot be read"):
        registry.load_registered("tiny")


def test_a_registry_without_database_is_refused_and_not_made(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'absent' / 'mlflow.db'}")
    with pytest.raises(ConfigError, match="nothing was registered there yet"):
        registry.load_registered("tiny")
    assert not (tmp_path / "absent").exists()


@pytest.mark.usefixtures("_without_fresh_process")
def test_a_foreign_champion_is_the_users_to_settle(models, tmp_path):
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "MLmodel").write_text("flavors:\n  python_function:\n    loader_module: json\n")
    _client().create_registered_model("tiny")
    _client().create_model_version("tiny", stranger.as_uri())
    registry.set_alias(_client(), "tiny", CHAMPION, "1")
    with pytest.raises(ConfigError, match="models:/tiny/1 cannot be used"):
        _register(tmp_path, models["good"])
    assert _aliases() == {CHAMPION: "1"}


def test_an_unreachable_server_is_a_fault_that_may_pass(models, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(InfraError, match=r"MLflow at http://user:\*\*\*@127\.0\.0\.1:9 failed") as caught:
        _register(tmp_path, models["good"])
    assert "secret" not in str(caught.value)
    output = register_output(tmp_path, models["good"])
    output.finish({"name": "tiny", "version": "1", "weights_sha256": "0"}, 0.0)
    with pytest.raises(InfraError, match="failed"):  # "cannot tell" must not undo a finished step
        register.is_current(CONFIG, output)


def test_step_outputs_of_one_tokenizer_are_shared(tmp_path):
    # Guards the fixtures: the models above may be compared only because their tokenizer is the same file.
    first, second = finish_tokenizer(tmp_path / "a"), finish_tokenizer(tmp_path / "b")
    assert first.result == second.result
    assert json.loads(first.read_bytes("tokenizer.json"))["model"]["type"] == "BPE"


@pytest.fixture
def _mlflow_server(tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path / 'server.db'}"]
    command += ["--artifacts-destination", str(tmp_path / "artifacts")]
    binaries = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
    environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 120
        while not _answers(f"{address}/health"):
            assert server.poll() is None, (tmp_path / "server.log").read_text()
            assert time.monotonic() < deadline, "the server did not come up"
            time.sleep(0.5)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        monkeypatch.delenv("DECONV_MLFLOW_ARTIFACTS")
        yield
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _answers(address):
    try:
        with urllib.request.urlopen(address, timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.usefixtures("_mlflow_server", "_without_fresh_process")
def test_a_server_keeps_the_registry_as_a_database_does(models, tmp_path):
    _register(tmp_path, models["fair"])
    result = _register(tmp_path, models["good"])
    assert result["reason"].startswith("better than champion version 1")
    assert _aliases() == {CHAMPION: "2", PREVIOUS: "1"}
    output = register_output(tmp_path, models["good"])
    assert register.is_current(CONFIG, output) is True
    model, _, info = registry.load_registered("tiny")
    assert info.version == "2"
    assert model.config.vocab_size == models["good"]["tokenizer"].result["vocab_size"]
    with pytest.raises(ConfigError, match="registered are tiny"):
        registry.load_registered("other")
    _client().delete_model_version("tiny", "2")
    assert register.is_current(CONFIG, output) is False
