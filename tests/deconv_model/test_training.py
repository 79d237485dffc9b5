from dataclasses import replace

import pytest
import torch

from deconv_model.data import SequenceOrder, TokenStream
from deconv_model.numerics import resolve_precision
from tests.deconv_model.tiny import (
    CONFIG,
    CONTEXT,
    EARLY,
    Broken,
    TinyModel,
    assert_same,
    assert_same_training,
    stop_after,
    tiny_trainer,
    train,
    write_tiny_shards,
)


@pytest.fixture
def shards(tmp_path):
    return write_tiny_shards(tmp_path / "shards")


def test_checkpoints_come_at_their_steps_and_at_the_end(shards):
    steps = []
    train(tiny_trainer(shards, CONFIG), on_checkpoint=lambda state: steps.append(state["step"]))
    assert steps == [4, 8, 11]
    steps.clear()
    train(tiny_trainer(shards, replace(CONFIG, steps=8)), on_checkpoint=lambda state: steps.append(state["step"]))
    assert steps == [4, 8]
    steps.clear()
    trainer = tiny_trainer(shards, CONFIG)
    train(
        trainer,
        should_stop=stop_after(trainer, 6),
        on_checkpoint=lambda state: steps.append(state["step"]),
    )
    assert steps == [4, 6]


def test_progress_is_reported_every_step(shards):
    reports = []
    trainer = train(tiny_trainer(shards, CONFIG), on_progress=reports.append)
    assert [report["step"] for report in reports] == list(range(1, 12))
    for report, entry in zip(reports, trainer.history, strict=True):
        assert report["steps"] == 11
        assert report["tokens_per_second"] > 0
        assert report["loss"] == entry["train_loss"]
        assert report["learning_rate"] == entry["learning_rate"] <= CONFIG.muon_lr
        assert report["gradient_norm"] == entry["gradient_norm"] > 0
        assert report.get("valid_loss") == entry.get("valid_loss")
    assert [entry["samples_seen"] for entry in trainer.history] == list(range(5, 60, 5))


def test_the_gradient_is_that_of_the_mean_loss_over_the_global_batch(shards):
    config = replace(CONFIG, steps=1, gradient_clip=0.0)
    trainer = train(tiny_trainer(shards, config, TinyModel()))
    naive = TinyModel()
    ids = torch.from_numpy(trainer.train.batch(0, 5))
    loss = naive.token_losses(ids[:, :-1], ids[:, 1:]).mean()
    loss.backward()
    assert trainer.history[0]["train_loss"] == pytest.approx(loss.item(), rel=1e-6)
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in naive.parameters()])
    assert trainer.history[0]["gradient_norm"] == pytest.approx(norm.item(), rel=1e-5)
    for ours, theirs in zip(trainer.model.parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_a_large_gradient_is_clipped(shards):
    config = replace(CONFIG, steps=1, gradient_clip=0.01)
    trainer = train(tiny_trainer(shards, config))
    assert trainer.history[0]["gradient_norm"] > 0.1  # the one before clipping
    clipped = torch.nn.utils.get_total_norm([parameter.grad for parameter in trainer.model.parameters()])
    assert clipped.item() == pytest.approx(0.01, rel=1e-5)


def test_dropout_differs_between_steps_and_seeds(shards):
    """With rates of nearly nothing, what changes from step to step on one repeated batch is the dropout."""
    config = replace(CONFIG, steps=7, batch_size=7, muon_lr=1e-9, adamw_lr=1e-9, eval_every=100)
    losses = [entry["train_loss"] for entry in train(tiny_trainer(shards, config)).history]
    same_order = tiny_trainer(shards, config)
    same_order.config = replace(config, seed=4)
    other = [entry["train_loss"] for entry in train(same_order).history]
    assert all(abs(a - b) > 1e-6 for a, b in zip(losses, other, strict=True))


def test_training_learns_what_can_be_learnt(shards):
    config = replace(CONFIG, steps=100, batch_size=8, eval_every=50)
    trainer = train(tiny_trainer(shards, config, TinyModel()))
    # Each token is one or two further than the one before, ln 2 nats; less is learnt by heart.
    assert trainer.history[0]["train_loss"] > 3.0
    assert trainer.history[-1]["train_loss"] < 0.7


def test_the_valid_loss_is_the_mean_over_the_first_sequences_without_dropout(shards):
    trainer = tiny_trainer(shards, replace(CONFIG, steps=3))
    train(trainer)
    stream = TokenStream(shards, "valid")
    trainer.model.eval()
    losses = []
    for sequence in range(4):
        ids = torch.from_numpy(stream.read(sequence * CONTEXT, CONTEXT + 1))[None]
        losses += trainer.model.token_losses(ids[:, :-1], ids[:, 1:]).flatten().tolist()
    assert trainer.history[-1]["valid_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)


def test_no_more_sequences_are_evaluated_than_there_are(shards):
    many, all_of_them = (train(tiny_trainer(shards, replace(CONFIG, eval_sequences=n))) for n in (1000, 5))
    assert_same_training(many, all_of_them)


def test_the_best_weights_are_those_of_the_lowest_valid_loss(shards):
    at_step = {}
    trainer = tiny_trainer(shards, EARLY)

    def remember(report):
        at_step[report["step"]] = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}

    train(trainer, on_progress=remember)
    evaluated = {entry["step"]: entry["valid_loss"] for entry in trainer.history if "valid_loss" in entry}
    assert trainer.best_step == min(evaluated, key=lambda step: evaluated[step])
    assert trainer.best_loss == min(evaluated.values())
    assert_same(trainer.best_weights(), at_step[trainer.best_step])
    assert not torch.equal(trainer.best_weights()["up"], trainer.model.state_dict()["up"])


def test_without_patience_training_never_stops_early(shards):
    assert train(tiny_trainer(shards, replace(EARLY, patience=0))).step == 40


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_leaves_the_last_good_state(shards, what):
    good = tiny_trainer(shards, CONFIG)
    train(good, should_stop=stop_after(good, 2))
    broken = tiny_trainer(shards, CONFIG, Broken(8, what))  # the second of three micro-batches of step 3
    with pytest.raises(FloatingPointError, match=r"^step 3: loss .* gradient norm .* must be finite") as caught:
        train(broken)
    assert "\n" not in str(caught.value)
    assert_same_training(broken, good)


def test_a_valid_loss_that_is_not_finite_is_an_error(shards):
    broken = tiny_trainer(shards, CONFIG, Broken(10, "loss"))  # after three steps of three micro-batches
    with pytest.raises(FloatingPointError, match="step 3: valid loss nan"):
        train(broken)


def test_automatic_precision_follows_the_processor(monkeypatch):
    cpu = torch.device("cpu")
    assert resolve_precision("float32", cpu) == "float32"
    assert resolve_precision("bfloat16", cpu) == "bfloat16"
    for capabilities, expected in [
        ({"avx512_bf16": True, "amx_bf16": False}, "bfloat16"),
        ({"avx512_bf16": False, "amx_bf16": True}, "bfloat16"),
        ({"avx512_bf16": False, "amx_bf16": False}, "float32"),
    ]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert resolve_precision("auto", cpu) == expected


def test_order_of_samples_is_the_one_of_the_data_module(shards):
    """Every sequence that the model is given, over two epochs, is the one at its global position."""
    given = []

    class Watched(TinyModel):
        def token_losses(self, ids_BT, targets_BT):
            if self.training:
                given.extend(torch.cat((ids_BT, targets_BT[:, -1:]), dim=1).tolist())
            return super().token_losses(ids_BT, targets_BT)

    train(tiny_trainer(shards, replace(CONFIG, steps=4), Watched()))
    order = SequenceOrder(TokenStream(shards, "train"), CONTEXT, seed=CONFIG.seed)
    assert given == [order.sample(position).tolist() for position in range(20)]
