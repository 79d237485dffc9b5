import pytest
import torch

from deconv_model import pointer as module
from deconv_model.pointer import Pointer

torch.set_num_threads(1)

LENGTH = 9
CHANNELS = 5


def _pointer() -> Pointer:
    torch.manual_seed(0)
    pointer = Pointer(CHANNELS, 3, LENGTH).double()
    with torch.no_grad():
        pointer.sentinel.normal_()
        pointer.sentinel_bias.fill_(1.0)
        pointer.log_scale.fill_(0.1)
    return pointer


def _features() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, LENGTH, CHANNELS, dtype=torch.float64, generator=generator, requires_grad=True)


IDS = torch.tensor([[1, 2, 3, 1, 2, 3, 1, 2, 3], [4, 4, 0, 4, 1, 4, 4, 0, 2]])
TARGETS = torch.tensor([[2, 3, 1, 2, 3, 1, 2, 3, 1], [4, 0, 4, 1, 4, 4, 0, 2, 3]])


def _by_the_formula(pointer: Pointer, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return gate and copied probability one position at a time."""
    q, k, sentinel = pointer._project(x)
    gates, copies = [], []
    for b in range(len(x)):
        for t in range(LENGTH):
            scores = torch.cat([sentinel[b, t : t + 1], k[b, :t] @ q[b, t]])
            weights = scores.softmax(0)
            gates.append(weights[0])
            copies.append((weights[1:] * (IDS[b, 1 : t + 1] == TARGETS[b, t])).sum())
    return torch.stack(gates).view(2, LENGTH), torch.stack(copies).view(2, LENGTH)


@pytest.mark.parametrize("block", [1, 4, 128])
def test_shares_and_their_gradients_are_those_of_the_formula(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(module, "_QUERY_BLOCK", block)
    pointer, x = _pointer(), _features()
    log_gate, log_copied = pointer.log_shares(x, IDS, TARGETS)
    gate, copied = _by_the_formula(pointer, x)
    torch.testing.assert_close(log_gate.exp(), gate)
    torch.testing.assert_close(log_copied.exp(), copied)
    assert (copied == 0).any()
    assert (copied > 0).any()
    # A loss in which, as in training, what cannot be copied has no weight.
    inputs = [x, *pointer.parameters()]
    loss = -torch.logaddexp(log_gate - 2.0, log_copied).sum()
    expected = -(gate * torch.exp(torch.tensor(-2.0)) + copied).log().sum()
    torch.testing.assert_close(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs))


def test_a_repeated_phrase_is_continued() -> None:
    pointer = Pointer(8, 8, 6)
    with torch.no_grad():
        pointer.project_in.copy_(torch.eye(8).repeat(2, 1))
        pointer.log_scale.fill_(1.0)
    x = torch.eye(8)[[0, 1, 2, 0, 1, 2]][None]  # the features say where in the phrase we are
    ids = torch.tensor([[5, 6, 7, 5, 6, 7]])
    p = pointer.mix(x, ids, torch.zeros(1, 6, 10)).exp()
    torch.testing.assert_close(p.sum(-1), torch.ones(1, 6))
    assert p[0, 3:].argmax(-1).tolist() == [6, 7, 5]
    assert (p[0, 3:].amax(-1) > 0.99).all()
    torch.testing.assert_close(p[0, 0], torch.full((10,), 0.1))
