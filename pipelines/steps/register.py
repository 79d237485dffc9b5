"""The register step: the model becomes a version in the MLflow registry, checked before any alias points to it.

A step that is killed and run again finds its own run, logged model and version by the tag ``deconv.step`` and goes on.
This module imports nothing heavy, because ``deconv plan`` asks :func:`is_current`.
"""

from __future__ import annotations

import json
import math
import sys
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import registry, report, tracking
from pipelines.errors import InfraError
from pipelines.files import sha256_file
from pipelines.progress import get_logger
from pipelines.steps import STEPS
from pipelines.store import PROVENANCE_FILE, RESULT_FILE, SPEC_FILE, OutputFolder, StepOutput

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature

    from pipelines.gate import Candidate, Decision

DECISION_TAG, REASON_TAG, COMPARISON_TAG = "deconv.decision", "deconv.reason", "deconv.comparison"
_EVALUATION_FILES = ("metrics.json", "documents.parquet", "samples.json", "samples.md", "loss_curve.png", "report.md")
_REQUIREMENTS = ("mlflow", "torch", "numpy", "safetensors", "tokenizers", "pandas")
_VERIFIED_DOCUMENTS = 8
_VERIFIED_CHARACTERS = 2000
_EXAMPLE = "The function returns"

log = get_logger(__name__)


def is_current(config: dict[str, Any], output: StepOutput) -> bool:
    """Tell whether the version that a complete output names is in the registry of now, with the same weights."""
    try:
        result = output.result
        found = registry.weights_tag(result["name"], result["version"])
    except (OSError, ValueError, KeyError):
        return False
    return result["name"] == config["name"] and found == result["weights_sha256"]


def run(config: dict[str, Any], inputs: dict[str, StepOutput], output: OutputFolder) -> dict[str, Any]:
    """Register the model of ``inputs["train"]`` and give it the alias that it deserves.

    Args:
        config: ``name`` of the registered model and ``confidence`` of the comparison.
        inputs: Outputs of all other steps.
        output: Only its address, ``spec.json`` and ``provenance.json`` are used.

    Returns:
        ``name``, ``version``, ``alias``, ``decision``, ``reason``, ``champion`` (the one it met), ``difference`` to it
        in bits per byte, ``run_id``, ``weights_sha256`` and ``model_uri``.

    Raises:
        ConfigError: The champion under this name was not made by this pipeline.
        InfraError: MLflow failed, or the registered version does not give the score of the model.
    """
    name = config["name"]
    lineage = _lineage(inputs, output)
    identity = _identity(output, lineage)
    metrics = inputs["evaluate"].read_json("metrics.json")
    with tracking.connected() as client:
        run_id = _fill_run(client, identity, inputs, output, metrics)
        model_id = _find_or_log_model(client, run_id, identity, inputs)
        with registry.registry_lock():
            version = registry.find_or_create_version(
                *(client, name, identity),
                model_id=model_id,
                run_id=run_id,
                tags=lineage,
                description=report.verdict(metrics),
            )
        log.info("[register] %s version %s: checking it in a fresh process", name, version.version)
        _verify(client, version, inputs)
        decision, alias = _choose(client, version, inputs, config)
    log.info("[register] %s version %s is %s: %s", name, version.version, alias, decision.reason)
    return {
        "name": name,
        "version": str(version.version),
        "alias": alias,
        **decision.to_dict(),
        "run_id": run_id,
        "weights_sha256": lineage[registry.WEIGHTS_TAG],
        "model_uri": f"models:/{name}/{version.version}",
    }


def _identity(output: OutputFolder, lineage: dict[str, str]) -> str:
    """Return what the MLflow run, logged model and version of this output are found again by after a kill.

    The address alone is not enough in a registry that outlives the storage, or that several storages share: under
    another number of workers or on another machine the same address has other weights, by rounding.
    """
    digests = (lineage[registry.WEIGHTS_TAG], lineage[registry.TOKENIZER_TAG])
    return ":".join((output.address, *(digest[:12] for digest in digests)))


def _lineage(inputs: dict[str, StepOutput], output: OutputFolder) -> dict[str, str]:
    """Return the tags that lead from a version back to what it was made of."""
    provenance = output.read_json(PROVENANCE_FILE) if output.exists(PROVENANCE_FILE) else {"attempts": [{}]}
    manifest = inputs["tokens"].local("tokens") / "manifest.json"
    content = json.loads(manifest.read_bytes())
    steps = {name: step.address for name, step in inputs.items()} | {"register": output.address}
    return {
        **{f"deconv.{name}": address for name, address in steps.items()},
        registry.WEIGHTS_TAG: inputs["train"].result["weights_sha256"],
        registry.TOKENIZER_TAG: content["tokenizer_sha256"],
        "deconv.test_digest": content["splits"]["test"]["digest"],
        "deconv.manifest_sha256": sha256_file(manifest),
        "deconv.git_commit": provenance["attempts"][-1].get("git_commit") or "unknown",
    }


def _fill_run(
    client: MlflowClient,
    identity: str,
    inputs: dict[str, StepOutput],
    output: OutputFolder,
    metrics: dict[str, Any],
) -> str:
    """Log settings, history, measures and files of all steps to the MLflow run of this output and return its id."""
    run_id = tracking.find_or_create_run(client, identity, {"deconv.train": inputs["train"].address})
    table = report.markdown_table(*report.metrics_rows(metrics))
    client.set_tag(run_id, "mlflow.note.content", f"{report.verdict(metrics)}\n\n{table}")

    steps = {**inputs, "register": output}
    params: dict[str, Any] = {}
    for name, step in steps.items():
        if step.exists(SPEC_FILE):
            settings, sections = step.read_json(SPEC_FILE)["config"], STEPS[name].sections
            params |= settings if len(sections) > 1 else {sections[0]: settings}
    tracking.log_params(client, run_id, params)
    tracking.log_history(client, run_id, inputs["train"].read_json("history.json"))
    measured = {key: metrics[key] for key in (*report.MODELS, "model_minus_unigram")}
    final = {"step": 0, **tracking.flatten({"test": measured}, "/")}
    tracking.log_history(client, run_id, [final])

    for file in _EVALUATION_FILES:
        client.log_artifact(run_id, str(inputs["evaluate"].local(file)), "evaluation")
    client.log_artifact(run_id, str(inputs["tokens"].local("tokens") / "manifest.json"), "data")
    for name, step in steps.items():
        for file in (SPEC_FILE, PROVENANCE_FILE, RESULT_FILE):
            if step.exists(file):
                client.log_artifact(run_id, str(step.local(file)), f"lineage/{name}")
    return run_id


def _find_or_log_model(client: MlflowClient, run_id: str, identity: str, inputs: dict[str, StepOutput]) -> str:
    """Return the id of the one logged model of this output, logging it if a killed run did not finish that."""
    import mlflow

    experiment = client.get_run(run_id).info.experiment_id
    ready = None
    for model in client.search_logged_models([experiment], f"tags.`{tracking.STEP_TAG}` = '{identity}'"):
        if model.status == mlflow.entities.LoggedModelStatus.READY:
            ready = model
        else:
            client.delete_logged_model(model.model_id)
    path = list(sys.path)
    try:
        with mlflow.start_run(run_id=run_id):  # ends it as finished, or as failed when something is raised
            return (ready or _log_model(inputs, identity)).model_id
    finally:
        sys.path[:] = path  # logging tries the model out and leaves its temporary folder in front


def _log_model(inputs: dict[str, StepOutput], identity: str) -> Any:
    import mlflow

    import deconv_model

    manifest = inputs["tokens"].read_json("tokens/manifest.json")
    return mlflow.pyfunc.log_model(
        name="model",
        python_model=str(Path(__file__).parents[1] / "serving.py"),
        artifacts={"model": str(inputs["train"].local("model"))},
        code_paths=[str(Path(deconv_model.__file__).parent)],
        pip_requirements=[f"{name}=={installed_version(name).partition('+')[0]}" for name in _REQUIREMENTS],
        signature=_signature(),
        input_example=([{"text": _EXAMPLE}], {"max_new_tokens": 4}),
        model_config={"end_of_document": int(manifest["end_of_document"])},
        tags={tracking.STEP_TAG: identity},
    )


def _signature() -> ModelSignature:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    return ModelSignature(
        inputs=Schema([ColSpec(DataType.string, "text")]),
        outputs=Schema([ColSpec(DataType.string, "text"), ColSpec(DataType.double, "bits_per_byte")]),
        params=ParamSchema(
            [
                ParamSpec("max_new_tokens", DataType.long, 64),
                ParamSpec("temperature", DataType.double, 0.8),
                ParamSpec("top_k", DataType.long, 50),
                ParamSpec("seed", DataType.long, 0),
            ]
        ),
    )


def _verify(client: MlflowClient, version: ModelVersion, inputs: dict[str, StepOutput]) -> None:
    """Compare the registered version with the model of the train step; the result becomes a tag of the version.

    Raises:
        InfraError: They differ.
    """
    from deconv_model.data import TokenStream
    from deconv_model.saving import load_model
    from deconv_model.scoring import score_documents
    from pipelines import scoring
    from pipelines.verification import verify_in_fresh_process

    stream = TokenStream(inputs["tokens"].local("tokens"), "test")
    end = int(stream.manifest["end_of_document"])
    model, tokenizer = load_model(inputs["train"].local("model"))
    chosen = scoring.select_documents(stream, _VERIFIED_DOCUMENTS)
    texts = [text[:_VERIFIED_CHARACTERS] for text in scoring.decode_documents(tokenizer, chosen.ids)]
    texts = [text for text in texts if text] or [_EXAMPLE]
    nats = score_documents(model, scoring.encode_documents(tokenizer, texts, end), start_id=end)
    expected = nats / math.log(2.0) / [len(text.encode()) for text in texts]
    try:
        verify_in_fresh_process(f"models:/{version.name}/{version.version}", texts, expected)
    except InfraError:
        client.set_model_version_tag(version.name, version.version, registry.VERIFIED_TAG, "false")
        raise
    client.set_model_version_tag(version.name, version.version, registry.VERIFIED_TAG, "true")


def _choose(
    client: MlflowClient, version: ModelVersion, inputs: dict[str, StepOutput], config: dict[str, Any]
) -> tuple[Decision, str]:
    """Compare the verified version with the champion and move the aliases; return the decision and the alias it has."""
    from pipelines.gate import decide

    name, number = version.name, str(version.version)
    candidate = _candidate(inputs)
    while True:
        champion = registry.find_alias(client, name, registry.CHAMPION)
        if champion is not None and str(champion.version) == number:
            # A run that was killed after the last alias had moved: the choice was made, and stands in the tags.
            return _recorded_decision(champion), registry.CHAMPION
        decision = decide(client, candidate, champion, config["confidence"])
        # Comparing may take minutes, so it is done without the lock, and again when there is another champion by then.
        with registry.registry_lock():
            now = registry.find_alias(client, name, registry.CHAMPION)
            if (now and now.version) != (champion and champion.version):
                continue
            facts = {"champion": decision.champion, "difference": decision.difference}
            tags = {DECISION_TAG: decision.decision, REASON_TAG: decision.reason, COMPARISON_TAG: json.dumps(facts)}
            for key, value in tags.items():
                client.set_model_version_tag(name, number, key, value)
            registry.move_aliases(client, name, number, decision.decision)
            return decision, decision.decision


def _candidate(inputs: dict[str, StepOutput]) -> Candidate:
    from tokenizers import Tokenizer

    from deconv_model.data import TokenStream
    from pipelines import scoring
    from pipelines.gate import Candidate

    scores, scored_by = scoring.read_scores(inputs["evaluate"].local("documents.parquet"))
    stream = TokenStream(inputs["tokens"].local("tokens"), "test")
    documents = scoring.select_documents(stream, len(scores)).ids
    tokenizer = Tokenizer.from_file(str(inputs["tokenizer"].local("tokenizer.json")))
    return Candidate(scores, scored_by, documents, tokenizer)


def _recorded_decision(version: ModelVersion) -> Decision:
    from pipelines.gate import Decision

    facts = json.loads(version.tags.get(COMPARISON_TAG, "{}"))
    return Decision(
        decision=version.tags.get(DECISION_TAG, registry.CHAMPION),
        reason=version.tags.get(REASON_TAG, "it is the champion already"),
        champion=facts.get("champion"),
        difference=facts.get("difference"),
    )
