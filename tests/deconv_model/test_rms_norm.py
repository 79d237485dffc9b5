import pytest
import torch
import torch.nn.functional as F

from deconv_model import rms_norm as module
from deconv_model.rms_norm import EPSILON, rms_norm

torch.set_num_threads(1)


@pytest.mark.parametrize("block_rows", [1, 4, 512])
def test_values_and_gradients_are_those_of_torch(monkeypatch: pytest.MonkeyPatch, block_rows: int) -> None:
    monkeypatch.setattr(module, "_BLOCK_ROWS", block_rows)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(3, dtype=torch.float64, generator=generator, requires_grad=True)
    expected = F.rms_norm(x, (3,), weight, eps=EPSILON)
    torch.testing.assert_close(rms_norm(x, weight), expected)
    with torch.no_grad():
        assert torch.equal(rms_norm(x, weight), expected)
    assert torch.autograd.gradcheck(rms_norm, (x, weight))


def test_a_row_of_zeros_has_a_finite_gradient() -> None:
    x = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    rms_norm(x, torch.ones(3, dtype=torch.float64)).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("with_gradient", [True, False])
def test_the_result_is_wide_unless_autocast_would_round_it(with_gradient: bool) -> None:
    weight = torch.ones(3)
    with torch.set_grad_enabled(with_gradient):
        assert rms_norm(torch.randn(2, 3, dtype=torch.bfloat16), weight).dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert rms_norm(torch.randn(2, 3), weight).dtype == torch.bfloat16
            assert rms_norm(torch.randn(2, 3).double(), weight.double()).dtype == torch.float64
