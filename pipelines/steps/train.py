"""Step 4: training with Ray Train, around a loop that knows no Ray.

Checkpoints lie in the output folder, not in Ray's: whoever goes on (Ray after a killed worker, or the next run after a
killed driver) takes the newest whole one, and ends with the same weights, bit for bit, under the same number of
workers. ``model/`` holds the weights with the lowest valid loss, ``history.json`` the losses by step.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deconv_model.config import ModelConfig
from deconv_model.model_summary import summarise
from pipelines import errors
from pipelines.cluster import ensure_ray
from pipelines.errors import ConfigError, DataError, InfraError
from pipelines.files import join_uri, one_line
from pipelines.progress import get_logger, progress
from pipelines.store import OutputFolder, StepOutput

if TYPE_CHECKING:
    from deconv_model.training import Trainer

_SEQUENCES_A_WORKER = 8  # fewer a step and the workers wait for each other more than they compute
_WORKER_FAILURES = 3
_PROGRESS_FILE, _OUTCOME_FILE = "_progress.json", "_outcome.json"
_SECONDS_BETWEEN_PROGRESS = 1.0
_log = get_logger(__name__)


def run(config: dict[str, Any], inputs: dict[str, StepOutput], output: OutputFolder) -> dict[str, Any]:
    """Train the model and write the best weights.

    Raises:
        ConfigError: More workers are asked for than fit, or the loss is not finite.
        DataError: A split is too small for one sequence.
        InfraError: Ray or a machine failed; running again goes on from the last checkpoint.
    """
    ensure_ray()
    from ray.exceptions import RayError
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    scaling, threads = _choose_workers(config["train"])
    vocab_size = inputs["tokens"].read_json("tokens/manifest.json")["vocab_size"]
    model = ModelConfig.from_dict({"vocab_size": vocab_size, **config["model"]})
    _log.info("[train] %d workers, %d threads each; %s", scaling["num_workers"], threads, summarise(model))
    output.remove(_OUTCOME_FILE)
    output.remove(_PROGRESS_FILE)
    job = {
        "config": config,
        "model": model.to_dict(),
        "threads": threads,
        "tokens": inputs["tokens"].uri,
        "tokenizer": inputs["tokenizer"].uri,
        "folder": output.to_task(),
    }
    ray_files = tempfile.mkdtemp(prefix="deconv-ray-train-") if output.local_root else join_uri(output.uri, "_ray")
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=job,
        scaling_config=ScalingConfig(**scaling),
        # A new name each time: Ray must not restore a run of its own, the checkpoints are ours.
        run_config=RunConfig(
            name=f"{output.address}-{uuid.uuid4().hex[:8]}",
            storage_path=ray_files,
            failure_config=FailureConfig(max_failures=_WORKER_FAILURES),
        ),
    )
    try:
        with _shown_progress(output, config["train"]["steps"]):
            trainer.fit()
    except (TrainingFailedError, RayError) as error:
        raise InfraError(f"training failed: {_worker_error(error)}; Ray's logs are in /tmp/ray") from error
    finally:
        if output.local_root:
            shutil.rmtree(ray_files, ignore_errors=True)
        else:
            output.remove("_ray")
    outcome = output.read_json(_OUTCOME_FILE)
    if "error" in outcome:
        raise getattr(errors, outcome["error"])(outcome["message"])
    output.remove("checkpoints")
    output.remove(_PROGRESS_FILE)
    return outcome


def _choose_workers(train: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Return the arguments of Ray's ``ScalingConfig``, and the threads of a worker."""
    import ray

    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    wanted = train["workers"]
    available, kind = (gpus, "GPU") if gpus else (cpus, "CPU")
    if wanted > available:
        raise ConfigError(f"train.workers {wanted} needs as many {kind}s; this Ray has {available}")
    if gpus:
        workers = wanted or min(gpus, train["batch_size"])
        return {"num_workers": workers, "use_gpu": True}, max(1, min(cpus // workers, 8))
    workers = wanted or min(cpus, max(1, train["batch_size"] // _SEQUENCES_A_WORKER))
    # A worker must fit on one node, and as many must fit as are asked for.
    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    fitting = [size for size in range(1, cpus // workers + 1) if sum(node // size for node in nodes) >= workers]
    threads = max(fitting, default=1)
    return {"num_workers": workers, "resources_per_worker": {"CPU": threads}}, threads


def _worker_error(error: Exception) -> str:
    """Return the worker's own error: the last line that the deepest cause says."""
    failures = getattr(error, "worker_failures", None) or {}
    causes = [getattr(failure, "cause", failure) for failure in failures.values()] or [error]
    lines = [line for line in str(causes[0]).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


@contextmanager
def _shown_progress(output: OutputFolder, steps: int) -> Iterator[None]:
    """Show what rank 0, which may be on another machine, says about the training in the output folder."""
    done = threading.Event()

    def show() -> None:
        with progress("train", total=steps, unit="steps") as bar:
            while not done.wait(_SECONDS_BETWEEN_PROGRESS):
                try:
                    facts = output.read_json(_PROGRESS_FILE)
                except (OSError, ValueError):
                    continue
                loss = f"loss {facts.get('loss', math.nan):.3f}"  # none until a step was not skipped
                valid = f", valid {facts['valid_loss']:.3f}" if facts.get("valid_loss") is not None else ""
                bar.set(facts["step"], f"{loss}{valid}, {facts['tokens_per_second']:,.0f} tokens/s")

    thread = threading.Thread(target=show, name="train-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def train_worker(job: dict[str, Any]) -> None:
    """Train in one Ray Train worker; rank 0 writes.

    What the user can mend is written as the outcome, not raised: Ray would retry it.
    """
    import ray.train
    import ray.train.torch
    import torch

    torch.set_num_threads(job["threads"])
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    output = OutputFolder(*job["folder"])
    try:
        trainer = _make_trainer(job, output, rank, world_size, ray.train.torch.get_device())
        _fit(trainer, output, rank, world_size)
        if rank == 0:
            _write_outcome(trainer, job, output, world_size)
    except (FloatingPointError, ConfigError, DataError) as error:
        if rank == 0:
            kind = "ConfigError" if isinstance(error, FloatingPointError) else type(error).__name__
            message = f"training diverged: {error}" if isinstance(error, FloatingPointError) else str(error)
            output.write_json(_OUTCOME_FILE, {"error": kind, "message": one_line(Exception(message))})


def _make_trainer(job: dict[str, Any], output: OutputFolder, rank: int, world_size: int, device: Any) -> Trainer:
    import torch

    from deconv_model.checkpoints import read_latest_checkpoint
    from deconv_model.config import TrainingConfig
    from deconv_model.data import SequenceOrder, TokenStream
    from deconv_model.language_model import LanguageModel
    from deconv_model.training import Trainer

    settings = {key: value for key, value in job["config"]["train"].items() if key != "workers"}
    training = TrainingConfig(**settings)
    config = ModelConfig.from_dict(job["model"])
    tokens = StepOutput(job["tokens"]).local("tokens")
    try:
        streams = {split: TokenStream(tokens, split) for split in ("train", "valid")}
        train = SequenceOrder(streams["train"], config.context_length, training.seed)
        valid = SequenceOrder(streams["valid"], config.context_length, training.seed, shuffle=False)
    except ValueError as error:
        raise DataError(f"{error}; give more text, or a smaller model.context_length") from error
    torch.manual_seed(training.seed)
    model = LanguageModel(config)
    trainer = Trainer(model, training, train, valid, rank=rank, world_size=world_size, device=device)
    state = read_latest_checkpoint(output.local("checkpoints"))
    if state is not None:
        trainer.load_state_dict(state)
        if rank == 0 and state["world_size"] != world_size:
            before, now = state["world_size"], world_size
            _log.warning("[train] %d workers go on where %d stopped: equal up to rounding only", now, before)
    return trainer


def _fit(trainer: Trainer, output: OutputFolder, rank: int, world_size: int) -> None:
    from deconv_model.checkpoints import write_checkpoint

    shown = 0.0
    latest: dict[str, Any] = {}

    def on_progress(facts: dict[str, Any]) -> None:
        nonlocal shown
        latest.update(facts)
        if time.monotonic() - shown >= _SECONDS_BETWEEN_PROGRESS or facts["step"] == facts["steps"]:
            shown = time.monotonic()
            output.write_json(_PROGRESS_FILE, latest)

    def on_checkpoint(state: dict[str, Any]) -> None:
        if rank == 0:
            state = {**state, "world_size": world_size}
            output.check_owner()
            write_checkpoint(output.working_folder("checkpoints"), state, state["step"])
            output.publish("checkpoints")

    trainer.fit(on_checkpoint=on_checkpoint, on_progress=on_progress)


def _write_outcome(trainer: Trainer, job: dict[str, Any], output: OutputFolder, world_size: int) -> None:
    from deconv_model.language_model import LanguageModel, count_parameters
    from deconv_model.saving import save_model, weights_sha256

    model = LanguageModel(ModelConfig.from_dict(job["model"]))  # the trainer's may be sharded
    model.load_state_dict(trainer.best_weights())
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_model(folder, model, StepOutput(job["tokenizer"]).local("tokenizer.json"))
        digest = weights_sha256(folder)
        for file in sorted(folder.iterdir()):
            with output.write(f"model/{file.name}") as temporary:
                shutil.copyfile(file, temporary)
    output.write_json("history.json", trainer.history)
    output.write_json("timing.json", trainer.timing)
    outcome = {
        "weights_sha256": digest,
        "best_valid_loss": trainer.best_loss,
        "best_step": trainer.best_step,
        "steps": trainer.step,
        "stopped_early": trainer.step < trainer.config.steps,
        "samples_seen": trainer.samples_seen,
        "tokens_seen": trainer.samples_seen * trainer.train.sequence_length,
        "parameters": count_parameters(model)["total"],
        "workers": world_size,
        "threads": job["threads"],
        "device": str(trainer.device),
        "precision": trainer.precision,
        "seconds": round(sum(entry["seconds"] for entry in trainer.timing), 2),
    }
    output.write_json(_OUTCOME_FILE, outcome)
