import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deconv_model import gated_convolution as module
from deconv_model.gated_convolution import gated_convolution

torch.set_num_threads(1)


def _inputs(length: int, taps: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    uv = torch.randn(3, length, 10, dtype=dtype, generator=generator, requires_grad=True)
    return uv, torch.randn(5, taps, dtype=torch.float64, generator=generator, requires_grad=True)


def _reference(uv: Tensor, taps: Tensor) -> Tensor:
    u, v = uv.chunk(2, dim=-1)
    padded = F.pad(u.transpose(1, 2), (taps.shape[1] - 1, 0))
    return F.silu(F.conv1d(padded, taps.flip(1)[:, None], groups=5).transpose(1, 2)) * v


@pytest.mark.parametrize(("length", "taps"), [(9, 4), (2, 4), (1, 1), (5, 1), (6, 7)])
def test_it_is_a_causal_depthwise_convolution_with_its_gate(length: int, taps: int) -> None:
    uv, weights = _inputs(length, taps)
    torch.testing.assert_close(gated_convolution(uv, weights), _reference(uv, weights))
    assert torch.autograd.gradcheck(gated_convolution, (uv, weights))


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
