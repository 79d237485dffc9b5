from dataclasses import replace

import pytest
import torch

from deconv_model.checkpoints import read_latest_checkpoint, write_checkpoint
from deconv_model.config import LevelConfig, ModelConfig, StackConfig
from deconv_model.language_model import LanguageModel
from tests.deconv_model.tiny import (
    CONFIG,
    CONTEXT,
    VOCABULARY,
    TinyStack,
    assert_same,
    assert_same_training,
    forget,
    run_ranks,
    stop_after,
    tiny_trainer,
    train,
    write_tiny_shards,
)

pytestmark = pytest.mark.slow  # processes that find each other

# Five sequences a batch, two at once: one of two ranks has a micro-batch less than the other.
ALL = replace(CONFIG, average_decay=0.75, label_smoothing=0.1, activation_checkpointing=True)


def states_of(trainer):
    """Return a trainer's state without the times; gathering it is a collective call."""
    return {name: value for name, value in trainer.state_dict().items() if name != "timing"}


def share_and_resume(rank, world_size, folder, parallel):
    config = replace(ALL, parallel=parallel)

    def trainer(model=None, config=config):
        return tiny_trainer(folder / "shards", config, model or TinyStack(), rank, world_size)

    def write(state):
        if rank == 0:
            write_checkpoint(folder / "checkpoints", state, state["step"])
        torch.distributed.barrier()

    def interrupt():
        if killed.step == 6:
            raise KeyboardInterrupt
        return False

    whole = train(trainer())
    killed = trainer()
    with pytest.raises(KeyboardInterrupt):
        train(killed, on_checkpoint=write, should_stop=interrupt)
    again = trainer(TinyStack().apply(forget))
    again.load_state_dict(read_latest_checkpoint(folder / "checkpoints"))
    assert again.step == 4
    train(again)
    assert_same_training(again, whole)
    assert_same(again.best_weights(), whole.best_weights())

    states = [None] * world_size
    torch.distributed.all_gather_object(states, states_of(whole))
    for other in states[1:]:
        assert_same(other, states[0])
    if rank == 0:
        write_checkpoint(folder / "whole", states[0], 11)

    # Without weights of its own, a worker takes the first one's.
    strange = trainer(TinyStack().apply(forget) if rank else TinyStack())
    train(strange, should_stop=stop_after(strange, 1))
    assert strange.history == whole.history[:1]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_shared_training_is_that_of_one_worker_and_resumes_bit_for_bit(tmp_path, parallel):
    shards = write_tiny_shards(tmp_path / "shards")
    run_ranks(2, share_and_resume, tmp_path, parallel)
    state = read_latest_checkpoint(tmp_path / "whole")

    # Dropout differs between the ranks, so what is the same for one worker is what follows the state.
    alone = tiny_trainer(shards, replace(ALL, parallel=parallel), TinyStack())
    alone.load_state_dict({**state, "timing": []})
    assert_same(dict(alone.model.state_dict()), state["model"])
    with alone._average.in_model():
        assert alone._evaluate() == pytest.approx(state["history"][-1]["valid_loss"], rel=1e-5)


def compare(rank, world_size, folder, config):
    trainers = {}
    for parallel in ("replicated", "ddp", "fsdp"):
        trainer = tiny_trainer(folder / "shards", replace(config, parallel=parallel), TinyStack(0.0), rank, world_size)
        trainer.load_state_dict(read_latest_checkpoint(folder / "start"))
        trainers[parallel] = train(trainer)
    if rank == 0:
        histories = {parallel: trainer.history for parallel, trainer in trainers.items()}
        write_checkpoint(folder / "histories", histories, 1)


@pytest.mark.parametrize("batch_size", [5, 2])
def test_all_ways_of_sharing_go_on_from_a_state_of_one_worker_alike(tmp_path, batch_size):
    """Three ranks and two sequences a batch: one has nothing to do but must take part."""
    shards = write_tiny_shards(tmp_path / "shards")
    config = replace(CONFIG, steps=5, batch_size=batch_size, average_decay=0.5)
    alone = tiny_trainer(shards, config, TinyStack(0.0))
    train(alone, should_stop=stop_after(alone, 2))
    write_checkpoint(tmp_path / "start", alone.state_dict(), 2)
    train(alone)
    run_ranks(2 if batch_size == 5 else 3, compare, tmp_path, config)
    for history in read_latest_checkpoint(tmp_path / "histories").values():
        assert len(history) == 5
        for ours, theirs in zip(history, alone.history, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3)


def hourglass():
    torch.manual_seed(4)
    stack = StackConfig(layers=1, hidden=12)
    levels = (
        LevelConfig(width=8, encoder=stack, decoder=stack),
        LevelConfig(width=12, stride=2, encoder=replace(stack, heads=2, qkv_kernel=3)),
    )
    config = ModelConfig(vocab_size=VOCABULARY, context_length=CONTEXT, levels=levels, pointer_size=4)
    return LanguageModel(config)


def train_hourglasses(rank, world_size, folder, config):
    histories = {}
    for parallel in ("replicated", "ddp", "fsdp"):
        trainer = tiny_trainer(folder, replace(config, parallel=parallel), hourglass(), rank, world_size)
        histories[parallel] = train(trainer).history
    if rank == 0:
        write_checkpoint(folder / "histories", histories, 1)


def test_the_language_model_with_all_its_parts_can_be_shared_in_every_way(tmp_path):
    write_tiny_shards(tmp_path)
    config = replace(ALL, steps=3, activation_checkpointing=False)
    alone = train(tiny_trainer(tmp_path, config, hourglass()))
    run_ranks(2, train_hourglasses, tmp_path, config)
    for history in read_latest_checkpoint(tmp_path / "histories").values():
        assert len(history) == 3
        for ours, theirs in zip(history, alone.history, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3)
