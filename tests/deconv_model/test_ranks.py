from dataclasses import replace

import pytest
import torch

from deconv_model.checkpoints import read_latest_checkpoint, write_checkpoint
from tests.deconv_model.tiny import (
    CONFIG,
    EARLY,
    Broken,
    TinyModel,
    assert_same,
    assert_same_training,
    forget,
    run_ranks,
    stop_after,
    tiny_trainer,
    train,
    write_tiny_shards,
)


@pytest.fixture
def shards(tmp_path):
    return write_tiny_shards(tmp_path / "shards")


def test_a_rank_outside_the_process_group_is_refused(shards):
    with pytest.raises(ValueError, match="rank 1 of 2"):
        tiny_trainer(shards, CONFIG, rank=1, world_size=2)


def train_and_write(rank, world_size, folder, config, dropout):
    trainer = tiny_trainer(folder / "shards", config, TinyModel(dropout), rank, world_size)
    train(trainer)
    gradient = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
    write_checkpoint(folder / f"{world_size}-{rank}", {"trainer": trainer.state_dict(), "gradient": gradient}, 1)


@pytest.mark.slow
def test_the_number_of_ranks_changes_nothing_but_rounding(tmp_path, shards):
    """Two sequences a batch: of three ranks, one has nothing to do."""
    for steps, batch_size in ((1, 5), (4, 2)):
        config = replace(CONFIG, steps=steps, batch_size=batch_size, gradient_clip=0.0)
        alone = train(tiny_trainer(shards, config, TinyModel()))
        for world_size in (2, 3):
            run_ranks(world_size, train_and_write, tmp_path, config, 0.0)
            first, *others = (read_latest_checkpoint(tmp_path / f"{world_size}-{r}") for r in range(world_size))
            for other in others:
                other["trainer"]["timing"] = first["trainer"]["timing"]
                assert_same(other, first)
            for ours, theirs in zip(alone.history, first["trainer"]["history"], strict=True):
                assert theirs == pytest.approx(ours, rel=1e-5 if steps == 1 else 1e-3)
            if steps == 1:
                for name, parameter in alone.model.named_parameters():
                    torch.testing.assert_close(first["gradient"][name], parameter.grad, rtol=1e-5, atol=1e-7)


def stop_and_resume(rank, world_size, folder, config, step):
    whole = train(tiny_trainer(folder / "shards", config, rank=rank, world_size=world_size))
    first = tiny_trainer(folder / "shards", config, rank=rank, world_size=world_size)
    # Only the last rank wants to stop; all have to.
    wants = stop_after(first, step) if rank == world_size - 1 else lambda: False
    train(first, should_stop=wants)
    assert first.step == step
    if rank == 0:
        write_checkpoint(folder / "checkpoints", first.state_dict(), first.step)
    torch.distributed.barrier()
    second = tiny_trainer(folder / "shards", config, rank=rank, world_size=world_size)
    second.load_state_dict(read_latest_checkpoint(folder / "checkpoints"))
    assert_same_training(train(second), whole)
    reports = []
    train(tiny_trainer(folder / "shards", config, rank=rank, world_size=world_size), on_progress=reports.append)
    assert len(reports) == (whole.step if rank == 0 else 0)


@pytest.mark.parametrize(("config", "step"), [(CONFIG, 5), (EARLY, 4)])
def test_two_ranks_resume_bit_for_bit(tmp_path, shards, config, step):
    run_ranks(2, stop_and_resume, tmp_path, config, step)


def go_on(rank, world_size, folder, config):
    trainer = tiny_trainer(folder / "shards", config, TinyModel(), rank, world_size)
    trainer.load_state_dict(read_latest_checkpoint(folder / "checkpoints"))
    train(trainer)
    if rank == 0:
        write_checkpoint(folder / "checkpoints", trainer.state_dict(), trainer.step)


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path, shards):
    config = replace(CONFIG, steps=5)
    whole = train(tiny_trainer(shards, config, TinyModel()))
    first = tiny_trainer(shards, config, TinyModel())
    train(first, should_stop=stop_after(first, 2))
    write_checkpoint(tmp_path / "checkpoints", first.state_dict(), 2)
    run_ranks(2, go_on, tmp_path, config)
    state = read_latest_checkpoint(tmp_path / "checkpoints")
    assert state["step"] == 5
    for ours, theirs in zip(whole.history, state["history"], strict=True):
        assert theirs == pytest.approx(ours, rel=1e-3)


def draw(rank, world_size, folder, config):
    drawn = []

    class Watched(TinyModel):
        def token_losses(self, ids_BT, targets_BT):
            if self.training:
                drawn.append(torch.rand(()).item())
            return super().token_losses(ids_BT, targets_BT)

    train(tiny_trainer(folder / "shards", config, Watched(), rank, world_size))
    gathered = [None] * world_size
    torch.distributed.all_gather_object(gathered, drawn)
    assert (
        len({number for numbers in gathered for number in numbers}) == sum(map(len, gathered)) == 2 * 3
    )  # micro-batches


def test_dropout_differs_between_ranks_steps_and_micro_batches(tmp_path, shards):
    run_ranks(2, draw, tmp_path, replace(CONFIG, steps=2))


def fail_together(rank, world_size, folder, config):
    config = replace(config, max_skipped=0)
    good = tiny_trainer(folder / "shards", config, rank=rank, world_size=world_size)
    train(good, should_stop=stop_after(good, 1))
    # Rank 0 computes 2 micro-batches a step, rank 1 one: only rank 1 meets the bad one, in its second step.
    model = Broken([2], "loss") if rank == 1 else TinyModel(dropout=0.2)
    broken = tiny_trainer(folder / "shards", config, model, rank, world_size)
    with pytest.raises(FloatingPointError, match="step 2"):
        train(broken)
    assert_same_training(broken, good)

    model = Broken([2], "loss") if rank == 1 else TinyModel(dropout=0.2)
    skipping = tiny_trainer(folder / "shards", replace(config, max_skipped=1), model, rank, world_size)
    train(skipping, should_stop=stop_after(skipping, 2))
    assert skipping.skipped_steps == 1
    assert_same(dict(skipping.model.state_dict()), dict(good.model.state_dict()))

    behind = tiny_trainer(folder / "shards", config, rank=rank, world_size=world_size)
    if rank == 1:
        behind.load_state_dict(good.state_dict())
    with pytest.raises(RuntimeError, match="different steps, from 0 to 1"):
        train(behind)

    model = TinyModel(dropout=0.2).apply(forget) if rank == 1 else TinyModel(dropout=0.2)
    other = replace(config, precision="bfloat16") if rank == 1 else config
    trainer = tiny_trainer(folder / "shards", other, model, rank, world_size)
    train(trainer, should_stop=stop_after(trainer, 1))
    assert_same_training(trainer, good)


def test_ranks_fail_together_and_begin_together(tmp_path, shards):
    run_ranks(2, fail_together, tmp_path, CONFIG)
