from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from deconv_model.config import LSTMConfig, ModelConfig
from deconv_model.language_model import LanguageModel, count_parameters
from deconv_model.model_summary import reach, summarise
from tests.deconv_model.small_models import (
    ALL_CONFIGS,
    CONFIGS,
    CONTEXT,
    LSTM,
    VOCABULARY,
    random_ids,
    randomised_model,
)

torch.set_num_threads(1)

ALL = {**ALL_CONFIGS, "LSTM": replace(LSTM, pointer_size=0)}

all_models = pytest.mark.parametrize("config", ALL.values(), ids=ALL.keys())


@all_models
def test_parameters_are_those_of_the_model(config: ModelConfig | LSTMConfig) -> None:
    summary = summarise(config)
    counted = count_parameters(LanguageModel(config))
    assert (summary.parameters, summary.embedding_parameters) == (counted["total"], counted["embedding"])


@all_models
def test_flops_are_those_that_torch_counts(config: ModelConfig | LSTMConfig) -> None:
    model = LanguageModel(config).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(random_ids(1, CONTEXT))
    counted = counter.get_total_flops() / CONTEXT
    causal = summarise(config).flops_per_token
    if isinstance(config, LSTMConfig):  # torch's counter knows nothing of the LSTM operation
        counted += config.layers * 2 * 4 * config.hidden * (config.width + config.hidden)
    if config.pointer_size or (isinstance(config, ModelConfig) and reach(config) == CONTEXT - 1):
        # The sequence is one block of queries here, so the model computes with hidden keys too.
        no_pointer = summarise(replace(config, pointer_size=0))
        pairs = CONTEXT * (CONTEXT - 1) / 2 * 2 * config.pointer_size / CONTEXT
        assert causal - no_pointer.flops_per_token == pytest.approx(pairs + 4 * config.pointer_size * config.width)
        assert causal < counted < 1.35 * causal
    else:
        assert causal == pytest.approx(counted)


@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if reach(config) < CONTEXT - 1])
def test_the_receptive_field_is_reached_and_not_passed(name: str) -> None:
    config = CONFIGS[name]
    model = randomised_model(config)
    far = reach(config)
    assert summarise(config).receptive_field == far + 1 < CONTEXT
    ids = random_ids(1, CONTEXT)
    original = model(ids)
    distances = set()
    for position in range(CONTEXT):
        changed = ids.clone()
        changed[0, position] = (ids[0, position] + 1) % VOCABULARY
        seen = (model(changed) != original).any(dim=-1)[0].nonzero().flatten()
        distances.add(int(seen.max()) - position)
    assert max(distances) == far


def test_a_summary_can_be_read() -> None:
    text = str(summarise(CONFIGS["three levels, no attention"]))
    assert "parameters" in text
    assert "receptive field" in text
    assert "MFLOPs a token" in text
