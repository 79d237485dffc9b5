import copy
import logging
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

from deconv_model.repeated_blocks import checkpoint_blocks, compile_blocks, repeated_blocks
from tests.deconv_model.small_models import CONFIGS, random_ids, randomised_model
from tests.deconv_model.tiny import VOCABULARY as TINY_VOCABULARY
from tests.deconv_model.tiny import TinyModel, TinyStack

CPU = torch.device("cpu")


@pytest.fixture
def without_code_generation(monkeypatch):
    """Trace and differentiate as torch.compile does, but run the operations as they are: no compiler is needed."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def gradients_of(model, seed=3):
    torch.manual_seed(seed)
    ids = random_ids(3, 13) % TINY_VOCABULARY
    model.train().token_losses(ids[:, :-1], ids[:, 1:]).mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_blocks_are_found_in_every_stack():
    assert len(repeated_blocks(TinyStack())) == 3
    assert repeated_blocks(TinyModel()) == []
    model = randomised_model(CONFIGS["three levels, attention everywhere"])
    inside = [name for name, _ in model.named_parameters() if ".blocks." in name]
    assert sum(len(list(block.parameters())) for block in repeated_blocks(model)) == len(inside) > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_recomputed_blocks_have_the_same_gradients(name):
    plain = randomised_model(CONFIGS[name], dtype=torch.float32)
    for module in plain.modules():
        if hasattr(module, "skip_probability"):
            module.dropout, module.skip_probability = 0.2, 0.3
    recomputed = copy.deepcopy(plain)
    checkpoint_blocks(recomputed)
    assert list(recomputed.state_dict()) == list(plain.state_dict())
    expected = gradients_of(plain)
    for key, gradient in gradients_of(recomputed).items():
        assert torch.equal(gradient, expected[key]), key


@pytest.mark.slow
def test_blocks_of_the_same_sizes_share_compiled_code(without_code_generation):
    """Two of the three blocks are alike; the limit on how many may differ is raised to what the model needs."""
    plain, compiled = TinyStack(dropout=0.0), TinyStack(dropout=0.0)
    with torch._dynamo.config.patch(recompile_limit=1):
        compile_blocks(compiled, CPU)
        counters.clear()
        gradients = gradients_of(compiled)
        assert counters["stats"]["unique_graphs"] == 2
        with torch.no_grad():  # evaluation is not compiled
            compiled.token_losses(*random_ids(2, 2, 9) % TINY_VOCABULARY)
        assert counters["stats"]["unique_graphs"] == 2
    assert list(compiled.state_dict()) == list(plain.state_dict())
    for key, expected in gradients_of(plain).items():
        torch.testing.assert_close(gradients[key], expected, rtol=1e-5, atol=1e-7)


def test_without_a_compiler_training_is_plain(monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise RuntimeError("InvalidCxxCompiler: no working C++ compiler\nand many more lines")

    monkeypatch.setattr(torch, "compile", broken)
    model = TinyStack()
    with caplog.at_level(logging.WARNING):
        compile_blocks(model, CPU)
    (record,) = caplog.records
    assert record.getMessage().endswith("goes on without: InvalidCxxCompiler: no working C++ compiler")
    expected = gradients_of(TinyStack())
    for key, gradient in gradients_of(model).items():
        assert torch.equal(gradient, expected[key])
