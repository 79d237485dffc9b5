import copy
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
    TinyStack,
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
    good = tiny_trainer(shards, replace(CONFIG, max_skipped=0))
    train(good, should_stop=stop_after(good, 2))
    broken = tiny_trainer(shards, good.config, Broken([8], what))  # the second of three micro-batches of step 3
    with pytest.raises(FloatingPointError, match=r"^step 3: loss .* gradient norm .* must be finite; lower") as caught:
        train(broken)
    assert "\n" not in str(caught.value)
    assert_same_training(broken, good)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_steps_that_are_not_finite_are_skipped_and_counted(shards, what):
    """Steps 3, 4 and 6: weights, moments and average stay as they are, and the samples are not seen again."""
    trainer = tiny_trainer(shards, replace(CONFIG, max_skipped=2, average_decay=0.5), Broken([8, 13, 19], what))
    states = {}

    def remember(report):
        state = trainer.state_dict()
        states[report["step"]] = copy.deepcopy([state[name] for name in ("model", "optimizers", "average")])

    reports = []
    train(trainer, on_progress=lambda report: (remember(report), reports.append(report)))
    assert trainer.step == 11
    assert trainer.skipped_steps == 3
    assert [entry["skipped_steps"] for entry in trainer.history] == [0, 0, 1, 2, 2, 3, 3, 3, 3, 3, 3]
    assert [entry["step"] for entry in trainer.history if "train_loss" not in entry] == [3, 4, 6]
    assert [report["step"] for report in reports if "loss" not in report] == [3, 4, 6]
    assert [entry["samples_seen"] for entry in trainer.history] == list(range(5, 60, 5))
    for before, after, same in ((2, 3, True), (3, 4, True), (4, 5, False), (5, 6, True), (6, 7, False)):
        if same:
            assert_same(states[after], states[before])
        else:
            assert not torch.equal(states[after][0]["up"], states[before][0]["up"])


def test_too_many_skipped_steps_in_a_row_are_an_error(shards):
    trainer = tiny_trainer(shards, replace(CONFIG, max_skipped=2), Broken([5, 8, 13], "loss"))  # steps 2, 3, 4
    with pytest.raises(FloatingPointError, match=r"^step 4: loss nan .* must be finite, and 2 before it were skipped;"):
        train(trainer)
    assert (trainer.step, trainer.skipped_steps) == (3, 2)


def test_a_valid_loss_that_is_not_finite_is_an_error(shards):
    broken = tiny_trainer(shards, CONFIG, Broken([10], "loss"))  # after three steps of three micro-batches
    with pytest.raises(FloatingPointError, match="step 3: valid loss nan"):
        train(broken)


def test_the_average_is_the_mean_at_first_and_exponential_later(shards):
    trainer = tiny_trainer(shards, replace(CONFIG, average_decay=0.75))
    weights, averages = [], []

    def remember(_):
        weights.append(trainer.model.up.detach().clone())
        averages.append(trainer.state_dict()["average"]["up"].clone())

    train(trainer, on_progress=remember)
    for step in range(4):
        torch.testing.assert_close(averages[step], torch.stack(weights[: step + 1]).mean(0))
    for step in range(4, 11):
        torch.testing.assert_close(averages[step], 0.75 * averages[step - 1] + 0.25 * weights[step])


def test_the_average_is_what_is_evaluated_and_kept_and_changes_nothing_else(shards):
    plain = train(tiny_trainer(shards, CONFIG))
    averaged = tiny_trainer(shards, replace(CONFIG, average_decay=0.75))
    at_step = {}
    train(
        averaged,
        on_progress=lambda report: at_step.update({report["step"]: averaged.state_dict()["average"]["up"] + 0}),
    )
    assert_same(dict(averaged.model.state_dict()), dict(plain.model.state_dict()))
    assert torch.equal(averaged.best_weights()["up"], at_step[averaged.best_step])
    same = tiny_trainer(shards, CONFIG)
    same.model.load_state_dict(averaged.best_weights())
    assert averaged.best_loss == same._evaluate()
    assert averaged.best_loss != plain.best_loss


def test_labels_are_smoothed_in_training_alone(shards):
    plain, smoothed = (
        tiny_trainer(shards, replace(CONFIG, steps=1, gradient_clip=0.0, label_smoothing=part), TinyStack(dropout=0.0))
        for part in (0.0, 0.1)
    )
    ids = torch.from_numpy(plain.train.batch(0, 5))
    for trainer, part in ((plain, 0.0), (smoothed, 0.1)):
        expected = TinyStack(dropout=0.0)
        expected.token_losses(ids[:, :-1], ids[:, 1:], part).mean().backward()
        train(trainer)
        gradient = trainer.model.output_embedding.grad
        torch.testing.assert_close(gradient, expected.output_embedding.grad, rtol=1e-4, atol=1e-6)
    assert smoothed.history[0]["train_loss"] != plain.history[0]["train_loss"]
    again = tiny_trainer(shards, plain.config, TinyStack())
    again.model.load_state_dict(smoothed.best_weights())
    assert again._evaluate() == smoothed.best_loss


def test_recomputed_blocks_train_to_the_same_weights(shards):
    """Dropout and autocast of the second computation are those of the first."""
    config = replace(CONFIG, precision="bfloat16")
    plain, recomputed = (
        train(tiny_trainer(shards, replace(config, activation_checkpointing=flag), TinyStack()))
        for flag in (False, True)
    )
    assert_same_training(recomputed, plain)
    assert recomputed.model.blocks[0].calls == plain.model.blocks[0].calls + 11 * 3  # micro-batches


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
