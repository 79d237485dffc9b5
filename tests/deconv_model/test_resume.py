from dataclasses import replace

import pytest
import torch
from torch import nn

from deconv_model.checkpoints import read_latest_checkpoint, write_checkpoint
from tests.deconv_model.tiny import (
    CONFIG,
    EARLY,
    Broken,
    TinyModel,
    assert_same,
    assert_same_training,
    forget,
    stop_after,
    tiny_trainer,
    train,
    write_tiny_shards,
)


@pytest.fixture
def shards(tmp_path):
    return write_tiny_shards(tmp_path / "shards")


def resumed(shards, config, folder, step):
    """Train to a step, write, and train on to the end from what is read in a new model."""
    first = tiny_trainer(shards, config)
    train(
        first,
        should_stop=stop_after(first, step),
        on_checkpoint=lambda state: write_checkpoint(folder, state, state["step"]),
    )
    assert first.step == step
    second = tiny_trainer(shards, config, TinyModel(dropout=0.2).apply(forget))
    second.load_state_dict(read_latest_checkpoint(folder))
    return train(second)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_stopped_at_any_step_ends_bit_for_bit_the_same(tmp_path, shards, precision):
    config = replace(CONFIG, precision=precision)
    whole = train(tiny_trainer(shards, config))
    assert whole.step == 11
    assert [entry["step"] for entry in whole.history if "valid_loss" in entry] == [3, 6, 9, 11]
    for step in range(1, 11):
        assert_same_training(resumed(shards, config, tmp_path / str(step), step), whole)


def test_a_run_with_skipped_steps_and_an_average_resumes_bit_for_bit(tmp_path, shards):
    """Stopped after the first of two skipped steps in a row: the second is the last that may be skipped."""
    config = replace(CONFIG, average_decay=0.75, max_skipped=2, eval_every=100)
    whole = train(tiny_trainer(shards, config, Broken([8, 11], "loss")))  # steps 3 and 4
    first = tiny_trainer(shards, config, Broken([8], "loss"))
    train(first, should_stop=stop_after(first, 3))
    write_checkpoint(tmp_path, first.state_dict(), 3)
    second = tiny_trainer(shards, config, Broken([2], "loss"))
    second.load_state_dict(read_latest_checkpoint(tmp_path))
    assert_same_training(train(second), whole)
    assert whole.skipped_steps == 2
    third = tiny_trainer(shards, config, Broken([2, 5], "loss"))
    third.load_state_dict(read_latest_checkpoint(tmp_path))
    with pytest.raises(FloatingPointError, match=r"step 5: .* and 2 before it were skipped"):
        train(third)


def test_a_run_stopped_around_early_stopping_ends_bit_for_bit_the_same(tmp_path, shards):
    whole = train(tiny_trainer(shards, EARLY))
    assert 3 * 2 < whole.step < 40
    assert whole.step == whole.best_step + 3 * 2
    for step in range(1, whole.step):
        assert_same_training(resumed(shards, EARLY, tmp_path / str(step), step), whole)


def test_a_run_killed_inside_a_micro_batch_goes_on_from_its_last_checkpoint(tmp_path, shards):
    whole = train(tiny_trainer(shards, CONFIG))

    class Killed(TinyModel):
        calls = 0

        def token_losses(self, ids_BT, targets_BT):
            self.calls += 1
            if self.calls == limit:
                raise KeyboardInterrupt
            return super().token_losses(ids_BT, targets_BT)

    for limit in (2, 16, 22, 30):  # before the first checkpoint, and between the micro-batches of later steps
        folder = tmp_path / str(limit)
        trainer = tiny_trainer(shards, CONFIG, Killed(dropout=0.2))
        with pytest.raises(KeyboardInterrupt):
            train(trainer, on_checkpoint=lambda state, to=folder: write_checkpoint(to, state, state["step"]))
        again = tiny_trainer(shards, CONFIG)
        if limit > 14:
            again.load_state_dict(read_latest_checkpoint(folder))
            assert again.step in (4, 8)
        else:
            assert read_latest_checkpoint(folder) is None
        assert_same_training(train(again), whole)


def test_resuming_does_not_depend_on_what_used_the_random_generator(tmp_path, shards):
    whole = train(tiny_trainer(shards, CONFIG))
    noisy = tiny_trainer(shards, CONFIG)
    train(noisy, on_progress=lambda _: torch.rand(5), should_stop=lambda: bool(torch.rand(3).sum() < 0))
    assert_same_training(noisy, whole)


def test_the_state_before_the_first_step_can_be_stored(tmp_path, shards):
    fresh = tiny_trainer(shards, CONFIG)
    with pytest.raises(RuntimeError, match="before the first evaluation"):
        fresh.best_weights()
    write_checkpoint(tmp_path, fresh.state_dict(), 0)
    again = tiny_trainer(shards, CONFIG)
    again.load_state_dict(read_latest_checkpoint(tmp_path))
    assert_same_training(train(again), train(fresh))


@pytest.mark.parametrize("config", [CONFIG, EARLY])
def test_a_finished_training_does_nothing_more(shards, config):
    whole = train(tiny_trainer(shards, config))
    again = tiny_trainer(shards, config)
    again.load_state_dict(whole.state_dict())
    calls = []
    train(again, on_checkpoint=calls.append, on_progress=calls.append)
    assert again.finished
    assert not calls
    assert_same_training(again, whole)


def test_a_loaded_state_is_not_changed_by_training_on(shards):
    first = train(tiny_trainer(shards, replace(CONFIG, steps=3)))
    state = first.state_dict()
    second = tiny_trainer(shards, CONFIG)
    second.load_state_dict(state)
    before = {name: tensor.clone() for name, tensor in state["model"].items()}
    moment = state["optimizers"]["muon"]["up"]["momentum_buffer"].clone()
    train(second)
    assert_same(dict(state["model"]), before)
    assert torch.equal(state["optimizers"]["muon"]["up"]["momentum_buffer"], moment)
    assert len(state["history"]) == 3


def test_a_state_of_something_else_is_refused(shards):
    state = train(tiny_trainer(shards, replace(CONFIG, steps=1))).state_dict()
    with pytest.raises(ValueError, match="format 9"):
        tiny_trainer(shards, CONFIG).load_state_dict({**state, "format": 9})

    class Wider(TinyModel):
        def __init__(self):
            super().__init__()
            self.more = nn.Parameter(torch.zeros(2, 2))

    with pytest.raises(RuntimeError, match="more"):
        tiny_trainer(shards, CONFIG, Wider()).load_state_dict(state)
    with pytest.raises(ValueError, match="no average of this model's weights: was average_decay 0 before"):
        tiny_trainer(shards, replace(CONFIG, average_decay=0.9)).load_state_dict(state)
    optimizers = {**state["optimizers"], "muon": {"gain": {}}}
    with pytest.raises(ValueError, match="'gain', which it does not train"):
        tiny_trainer(shards, CONFIG).load_state_dict({**state, "optimizers": optimizers})


def test_the_precision_of_a_run_stays_what_it_was(shards):
    seen = []

    class Watched(TinyModel):
        def token_losses(self, ids_BT, targets_BT):
            seen.append(torch.nn.functional.linear(self.gain[None], self.up).dtype)
            return super().token_losses(ids_BT, targets_BT)

    first = tiny_trainer(shards, replace(CONFIG, precision="bfloat16"), Watched())
    train(first, should_stop=stop_after(first, 2))
    assert set(seen) == {torch.bfloat16}
    assert first.model.up.dtype == torch.float32
    seen.clear()
    second = tiny_trainer(shards, replace(CONFIG, precision="float32"), Watched())
    second.load_state_dict(first.state_dict())
    train(second)
    assert set(seen) == {torch.bfloat16}
    seen.clear()
    train(tiny_trainer(shards, replace(CONFIG, precision="float32"), Watched()))
    assert set(seen) == {torch.float32}
