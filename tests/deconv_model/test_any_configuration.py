"""What must hold for every hourglass that can be configured, on configurations that nobody chose."""

import math
from typing import Any

import hypothesis
import hypothesis.strategies as st
import torch

from deconv_model.config import LevelConfig, ModelConfig, StackConfig
from tests.deconv_model.small_models import VOCABULARY, random_ids, randomised_model

torch.set_num_threads(1)

any_configuration = hypothesis.settings(max_examples=30, deadline=None, derandomize=True)


@st.composite
def stacks(draw: st.DrawFn, width: int, smallest: int) -> StackConfig:
    layers = draw(st.integers(smallest, 2))
    one_each = st.tuples(*[st.integers(1, 5)] * layers)
    return StackConfig(
        layers=layers,
        hidden=draw(st.integers(1, 6)),
        kernel_size=draw(st.integers(1, 6) | one_each),
        dilation=draw(st.integers(1, 3) | one_each),
        activation=draw(st.sampled_from(["silu", "gelu", "relu2"])),
        gated=draw(st.booleans()),
        heads=draw(st.sampled_from([0, 1, 2])) if width % 4 == 0 else draw(st.sampled_from([0, 1])),
        qkv_kernel=draw(st.integers(1, 4)),
    )


@st.composite
def configurations(draw: st.DrawFn) -> ModelConfig:
    count = draw(st.integers(1, 3))
    levels = []
    for i in range(count):
        width = draw(st.sampled_from([2, 4, 6, 8]))
        level: dict[str, Any] = {"width": width, "encoder": draw(stacks(width, smallest=int(count == 1)))}
        if i:
            stride = draw(st.integers(2, 4))
            level["stride"] = stride
            level["down_kernel"] = draw(st.none() | st.integers(stride, 2 * stride + 1))
            level["deconv_kernel"] = draw(st.none() | st.sampled_from([stride, 2 * stride, 3 * stride]))
        if i < count - 1:
            level["decoder"] = draw(stacks(width, smallest=0))
        levels.append(LevelConfig(**level))
    total = math.prod(level.stride for level in levels)
    return ModelConfig(
        vocab_size=VOCABULARY,
        context_length=total * draw(st.integers(-(-8 // total), -(-20 // total))),
        levels=tuple(levels),
        tied=draw(st.booleans()),
        pointer_size=draw(st.sampled_from([0, 0, 3])),
        logit_cap=draw(st.sampled_from([0.0, 15.0])),
    )


@any_configuration
@hypothesis.given(configurations(), st.integers(0, 2**31), st.data())
def test_nothing_leaks_from_later_tokens_and_every_token_reaches_its_own_output(
    config: ModelConfig, seed: int, data: st.DataObject
) -> None:
    model = randomised_model(config, seed=seed)
    length = data.draw(st.integers(1, config.context_length), "length")
    position = data.draw(st.integers(0, length - 1), "position")
    ids = random_ids(2, length, seed=seed + 1)
    changed = ids.clone()
    changed[:, position:] = random_ids(2, length - position, seed=seed + 2)
    changed[:, position] = (ids[:, position] + 1) % VOCABULARY
    with torch.no_grad():
        before, after = model(ids), model(changed)
        losses = model.token_losses(ids, ids), model.token_losses(changed, ids)
    assert torch.equal(before[:, :position], after[:, :position])
    assert torch.equal(losses[0][:, :position], losses[1][:, :position])
    assert (before[:, position] != after[:, position]).any(dim=-1).all()


@any_configuration
@hypothesis.given(configurations(), st.integers(0, 2**31), st.data())
def test_cached_logits_of_reordered_beams_are_those_of_their_sequences(
    config: ModelConfig, seed: int, data: st.DataObject
) -> None:
    model = randomised_model(config, seed=seed)
    prompt = data.draw(st.integers(1, config.context_length), "prompt")
    ids = random_ids(3, prompt, seed=seed + 1)
    logits, state = model.prefill(ids)
    assert (logits - model(ids)[:, -1]).abs().max() < 1e-10
    for _ in range(prompt, config.context_length):
        if data.draw(st.booleans(), "reorder"):
            rows = torch.tensor(data.draw(st.lists(st.integers(0, len(ids) - 1), min_size=1, max_size=4), "rows"))
            state.reorder(rows)
            ids = ids[rows]
        following = random_ids(len(ids), seed=seed + ids.shape[1])
        ids = torch.cat([ids, following[:, None]], dim=1)
        assert (model.step(following, state) - model(ids)[:, -1]).abs().max() < 1e-10
