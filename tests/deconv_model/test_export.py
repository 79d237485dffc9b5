import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from deconv_model.config import LevelConfig, ModelConfig, StackConfig
from deconv_model.export import export_scoring, export_step, load_exported, save_exported
from deconv_model.generation import generate
from deconv_model.scoring import score_documents
from tests.deconv_model.small_models import ALL_CONFIGS, CONFIGS, CONTEXT, VOCABULARY, random_ids, randomised_model

torch.set_num_threads(1)

pytestmark = pytest.mark.slow  # tracing takes seconds a program

_TORCH_ALONE = """
import sys, torch
folder, strides = sys.argv[1], int(sys.argv[2])
scoring, start, *steps = (
    torch.export.load(f"{folder}/{name}.pt2").module()
    for name in ("scoring", "start", *(f"step_{phase}" for phase in range(strides)))
)
ids = torch.load(f"{folder}/ids.pt")
state, logits = start(ids[:, 0]), []
for position in range(ids.shape[1]):
    step_logits, state = steps[position % strides](ids[:, position], position, state)
    logits.append(step_logits)
torch.save([torch.stack(logits, dim=1), scoring(ids, ids.roll(-1, dims=1))], f"{folder}/outputs.pt")
assert not any(name.startswith("deconv") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory):
    """A model of two levels with attention and pointer, and the folder it was exported to."""
    model = randomised_model(CONFIGS["two levels, coarse attention, pointer"])
    folder = tmp_path_factory.mktemp("exported")
    save_exported(folder / "programs", model)
    return folder / "programs", model


@pytest.fixture(scope="module")
def loaded(exported):
    return load_exported(exported[0])


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [
        ("one level, attention", torch.float32, 1e-5),
        ("LSTM, pointer", torch.float64, 1e-10),
        *(
            pytest.param(name, torch.float64, 1e-10, marks=pytest.mark.slow)
            for name in sorted(ALL_CONFIGS.keys() - {"one level, attention", "LSTM, pointer"})
        ),
    ],
)
def test_the_programs_compute_what_the_model_does(tmp_path: Path, name: str, dtype: torch.dtype, tolerance) -> None:
    model = randomised_model(ALL_CONFIGS[name], dtype).train()
    save_exported(tmp_path, model)
    assert model.training
    loaded = load_exported(tmp_path)
    model.eval()
    for batch in (3, 1):
        ids, targets = random_ids(batch, CONTEXT), random_ids(batch, CONTEXT, seed=2)
        logits, losses = loaded(ids), loaded.token_losses(ids[:, :-5], targets[:, :-5])
        assert logits.dtype == losses.dtype == dtype
        assert (logits - model(ids)).abs().max() < tolerance
        assert (losses - model.token_losses(ids[:, :-5], targets[:, :-5])).abs().max() < tolerance


def test_torch_alone_runs_them(exported) -> None:
    folder, model = exported
    ids = random_ids(3, CONTEXT)
    torch.save(ids, folder / "ids.pt")
    command = [sys.executable, "-c", _TORCH_ALONE, str(folder), str(model.config.total_stride)]
    subprocess.run(command, check=True, cwd=folder)
    logits, losses = torch.load(folder / "outputs.pt")
    assert (logits - model(ids)).abs().max() < 1e-10
    assert (losses - model.token_losses(ids, ids.roll(-1, dims=1))).abs().max() < 1e-10


def test_an_exported_model_stands_in_for_the_model(exported, loaded) -> None:
    _, model = exported
    prompt = random_ids(5).tolist()
    new = generate(loaded, prompt, max_new_tokens=CONTEXT, seed=3)  # beyond the context
    assert new == generate(model, prompt, max_new_tokens=CONTEXT, seed=3)
    documents = [random_ids(length).numpy() for length in (0, 7, 50)]
    expected = score_documents(model, documents, start_id=0)
    np.testing.assert_allclose(score_documents(loaded, documents, start_id=0), expected, rtol=1e-9)


def test_a_reordered_state_goes_on(exported, loaded) -> None:
    _, model = exported
    ids = random_ids(2, 9)
    _, state = loaded.prefill(ids)
    state.reorder(torch.tensor([1, 0, 1]))
    ids = torch.cat([ids[[1, 0, 1]], random_ids(3, 1)], dim=1)
    assert (loaded.step(ids[:, -1], state) - model(ids)[:, -1]).abs().max() < 1e-10


def test_the_weights_are_in_memory_once_and_ask_for_no_gradient(loaded) -> None:
    step = loaded._steps[1]
    shared = {parameter.data_ptr() for parameter in loaded.parameters()}
    assert {parameter.data_ptr() for parameter in step.parameters()} <= shared
    assert not any(parameter.requires_grad for parameter in [*loaded.parameters(), *step.parameters()])


def test_a_large_vocabulary_is_scored_in_chunks() -> None:
    level = LevelConfig(width=8, encoder=StackConfig(layers=1, hidden=6))
    model = randomised_model(ModelConfig(vocab_size=9000, context_length=8, levels=(level,), tied=False))
    ids = torch.arange(0, 9000, 375).view(3, 8)
    losses = export_scoring(model).module()(ids, ids.flip(0))
    assert (losses - model.token_losses(ids, ids.flip(0))).abs().max() < 1e-10


def test_what_cannot_be_read_is_refused_in_one_line(loaded) -> None:
    _, state = loaded.prefill(random_ids(1, CONTEXT))
    with pytest.raises(ValueError, match="sequence of 37 tokens: must be 1 to context_length = 36"):
        loaded.step(random_ids(1), state)
    with pytest.raises(ValueError, match="sequence of 0 tokens"):
        loaded.prefill(random_ids(1, 0))
    with pytest.raises(ValueError, match=r"ids must be in \[0, vocab_size = 30\), got 30 to 30"):
        loaded.token_losses(random_ids(1, 4), torch.full((1, 4), VOCABULARY))
    with pytest.raises(ValueError, match="cannot be trained"):
        loaded.train()


def test_a_program_refuses_a_position_that_is_not_its_own(exported) -> None:
    start, *steps = (torch.export.load(exported[0] / f"{name}.pt2").module() for name in ("start", "step_0", "step_1"))
    ids = random_ids(2)
    for position in (1, CONTEXT):
        with pytest.raises(AssertionError, match="Guard failed"):
            steps[0](ids, position, start(ids))


def test_a_context_too_short_for_the_step_is_refused() -> None:
    level = LevelConfig(width=8, encoder=StackConfig(layers=1, hidden=6))
    model = randomised_model(ModelConfig(vocab_size=9, context_length=2, levels=(level,)))
    with pytest.raises(ValueError, match=r"context_length must be at least 3 x the product of strides \(3\)"):
        export_step(model)


def test_a_damaged_file_is_named(exported, tmp_path: Path) -> None:
    for file in exported[0].glob("*.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    program = tmp_path / "scoring.pt2"
    for data in (program.read_bytes()[:-2000], b""):
        program.write_bytes(data)
        with pytest.raises(ValueError, match=r"scoring\.pt2: not an exported program"):
            load_exported(tmp_path)
    program.unlink()
    with pytest.raises(ValueError, match=r"scoring\.pt2: not an exported program"):
        load_exported(tmp_path)
    sizes = tmp_path / "programs.json"
    sizes.write_text(json.dumps({**json.loads(sizes.read_text()), "format": 9}))
    with pytest.raises(ValueError, match=r"programs\.json: .*its format is not 1"):
        load_exported(tmp_path)
    sizes.unlink()
    with pytest.raises(ValueError, match=r"programs\.json: not the sizes"):
        load_exported(tmp_path)
