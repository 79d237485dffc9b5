import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deconv_model import softmax as module
from deconv_model.softmax import capped_cross_entropy, capped_logits

torch.set_num_threads(1)

ROWS = 7


def _inputs(scale: float = 1.0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = (scale * torch.randn(ROWS, 3, dtype=torch.float64, generator=generator)).to(dtype).requires_grad_()
    weight = torch.randn(5, 3, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    return x, weight, torch.randint(0, 5, (ROWS,), generator=generator)


@pytest.mark.parametrize("cap", [0.0, 2.0])
@pytest.mark.parametrize("chunk_logits", [1, 10, 2**20])
@pytest.mark.parametrize("weighted", [False, True])
def test_losses_and_gradients_are_those_of_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, cap: float, chunk_logits: int, weighted: bool
) -> None:
    monkeypatch.setattr(module, "_CHUNK_LOGITS", {"cpu": chunk_logits})
    x, weight, targets = _inputs()
    losses = capped_cross_entropy(x, weight, targets, cap)
    expected = F.cross_entropy(capped_logits(x, weight, cap), targets, reduction="none")
    torch.testing.assert_close(losses, expected)
    with torch.no_grad():
        torch.testing.assert_close(capped_cross_entropy(x, weight, targets, cap), losses)
    importance = torch.arange(ROWS).double() if weighted else torch.full((ROWS,), 0.3)
    torch.testing.assert_close(
        torch.autograd.grad((losses * importance).sum(), (x, weight)),
        torch.autograd.grad((expected * importance).sum(), (x, weight)),
    )


@pytest.mark.parametrize("cap", [0.0, 2.0])
@pytest.mark.parametrize("chunk_logits", [10, 2**20])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("with_shares", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_shares_and_smoothing_have_the_losses_and_gradients_of_their_formulas(
    monkeypatch: pytest.MonkeyPatch, cap: float, chunk_logits: int, weighted: bool, with_shares: bool, smoothing: float
) -> None:
    monkeypatch.setattr(module, "_CHUNK_LOGITS", {"cpu": chunk_logits})
    x, weight, targets = _inputs()
    generator = torch.Generator().manual_seed(1)
    gate, elsewhere = (
        torch.randn(ROWS, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(2)
    )
    losses = capped_cross_entropy(
        x, weight, targets, cap, shares=(gate, elsewhere) if with_shares else None, label_smoothing=smoothing
    )
    logits = capped_logits(x, weight, cap)
    own = F.cross_entropy(logits, targets, reduction="none")
    mixed = -torch.log(torch.exp(gate - own) + elsewhere.exp()) if with_shares else own
    expected = (1 - smoothing) * mixed - smoothing * logits.log_softmax(dim=1).mean(dim=1)
    torch.testing.assert_close(losses, expected)
    importance = torch.arange(ROWS).double() if weighted else torch.full((ROWS,), 0.3)
    inputs = (x, weight, gate, elsewhere) if with_shares else (x, weight)
    torch.testing.assert_close(
        torch.autograd.grad((losses * importance).sum(), inputs),
        torch.autograd.grad((expected * importance).sum(), inputs),
    )


@pytest.mark.parametrize("cap", [0.0, 15.0, 1000.0])
def test_hopeless_targets_cost_a_finite_loss(cap: float) -> None:
    x, weight, targets = _inputs(scale=1000.0, dtype=torch.float32)
    losses = capped_cross_entropy(x, weight, targets, cap)
    expected = F.cross_entropy(capped_logits(x, weight, cap), targets, reduction="none")
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-4)
    losses.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
