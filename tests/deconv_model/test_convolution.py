import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deconv_model import convolution as module
from deconv_model.convolution import causal_convolution, gated_convolution

torch.set_num_threads(1)


def _inputs(length: int, taps: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    uv = torch.randn(3, length, 10, dtype=dtype, generator=generator, requires_grad=True)
    return uv, torch.randn(5, taps, dtype=torch.float64, generator=generator, requires_grad=True)


def _reference(uv: Tensor, taps: Tensor, dilation: int = 1) -> Tensor:
    u, v = uv.chunk(2, dim=-1)
    padded = F.pad(u.transpose(1, 2), ((taps.shape[1] - 1) * dilation, 0))
    return F.silu(F.conv1d(padded, taps.flip(1)[:, None], groups=5, dilation=dilation).transpose(1, 2)) * v


SHAPES = [(9, 4, 1), (2, 4, 1), (1, 1, 1), (5, 1, 3), (6, 7, 1), (9, 3, 2), (9, 3, 4), (4, 3, 5)]


@pytest.mark.parametrize(("length", "taps", "dilation"), SHAPES)
def test_it_is_a_causal_depthwise_convolution_with_its_gate(length: int, taps: int, dilation: int) -> None:
    uv, weights = _inputs(length, taps)
    torch.testing.assert_close(gated_convolution(uv, weights, dilation), _reference(uv, weights, dilation))
    assert torch.autograd.gradcheck(lambda uv, taps: gated_convolution(uv, taps, dilation), (uv, weights))


@pytest.mark.parametrize(("length", "taps", "dilation"), SHAPES)
def test_without_the_gate_it_is_a_causal_depthwise_convolution(length: int, taps: int, dilation: int) -> None:
    x = _inputs(length, taps)[0][:, :, :5].detach().requires_grad_()
    weights = _inputs(length, taps)[1]
    padded = F.pad(x.transpose(1, 2), ((taps - 1) * dilation, 0))
    expected = F.conv1d(padded, weights.flip(1)[:, None], groups=5, dilation=dilation).transpose(1, 2)
    torch.testing.assert_close(causal_convolution(x, weights, dilation), expected)
    assert torch.autograd.gradcheck(lambda x, taps: causal_convolution(x, taps, dilation), (x, weights))


def test_blocks_of_the_batch_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    uv, weights = _inputs(length=7, taps=3)
    whole = gated_convolution(uv, weights)
    monkeypatch.setattr(module, "_BLOCK_NUMBERS", 1)
    torch.testing.assert_close(gated_convolution(uv, weights), whole)
    assert torch.autograd.gradcheck(gated_convolution, (uv, weights))


def test_bfloat16_is_rounded_once_at_the_end() -> None:
    uv, weights = _inputs(length=30, taps=4, dtype=torch.bfloat16)
    out = gated_convolution(uv, weights.float())
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, _reference(uv.float(), weights.float()).bfloat16())
