import pytest
import torch
import torch.nn.functional as F

from deconv_model.blocks import DecodingState, StridedConvolution, TransposedConvolution, causal_attention
from deconv_model.config import ModelConfig
from tests.deconv_model.small_models import CONFIGS, CONTEXT, randomised_model

torch.set_num_threads(1)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("pieces", [[1] * CONTEXT, [7, 1, 1, 2, 3, 5, 4, 13], [35, 1], [2, 34]], ids=str)
def test_a_sequence_in_pieces_gives_the_outputs_of_the_whole(config: ModelConfig, pieces: list[int]) -> None:
    hourglass = randomised_model(config).hourglass
    x = torch.randn(2, CONTEXT, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    state = DecodingState()
    with torch.no_grad():
        outputs = torch.cat([hourglass(piece, state) for piece in x.split(pieces, dim=1)], dim=1)
        assert (outputs - hourglass(x)).abs().max() < 1e-12


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 200), (128, 128), (129, 129), (300, 300), (140, 300)])
def test_attention_in_blocks_is_attention(queries: int, keys: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, queries, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    k, v = (torch.randn(2, 3, keys, 4, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(2))
    mask = torch.ones(keys, keys, dtype=torch.bool).tril()[keys - queries :]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    out = causal_attention(q, k, v)
    torch.testing.assert_close(out, expected)
    weights = torch.randn(out.shape, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(
        torch.autograd.grad((out * weights).sum(), (q, k, v)),
        torch.autograd.grad((expected * weights).sum(), (q, k, v)),
    )


@pytest.mark.parametrize("length", [12, 11, 10, 1])
def test_the_strided_convolution_is_that_of_torch_padded_on_the_left(length: int) -> None:
    torch.manual_seed(0)
    down = StridedConvolution(4, 6, stride=3).double()
    x = torch.randn(2, length, 4, dtype=torch.float64)
    kernel = down.weight.view(6, 3, 4).transpose(1, 2)  # out, in, taps
    expected = F.conv1d(F.pad(down.norm(x).transpose(1, 2), (2, 0)), kernel, stride=3).transpose(1, 2)
    torch.testing.assert_close(down(x), expected)


@pytest.mark.parametrize(("kernel_size", "length"), [(3, 12), (6, 12), (9, 11), (6, 10)])
def test_the_transposed_convolution_is_that_of_torch_without_its_tail(kernel_size: int, length: int) -> None:
    torch.manual_seed(0)
    up = TransposedConvolution(6, 4, stride=3, kernel_size=kernel_size).double()
    assert not up.weight.any()
    torch.nn.init.normal_(up.weight)
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    kernel = up.weight.view(kernel_size, 4, 6).permute(2, 1, 0)  # in, out, taps
    expected = F.conv_transpose1d(up.norm(x).transpose(1, 2), kernel, stride=3).transpose(1, 2)
    torch.testing.assert_close(up(x, length), expected[:, :length])
