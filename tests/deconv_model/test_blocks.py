from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deconv_model.attention import causal_attention
from deconv_model.blocks import ConvolutionBlock, DecodingState
from deconv_model.config import Activation, ModelConfig
from deconv_model.resampling import StridedConvolution, TransposedConvolution
from tests.deconv_model.small_models import CONFIGS, CONTEXT, randomised_model

torch.set_num_threads(1)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("pieces", [[1] * CONTEXT, [7, 1, 1, 2, 3, 5, 4, 13], [35, 1], [2, 34]], ids=str)
def test_a_sequence_in_pieces_gives_the_outputs_of_the_whole(config: ModelConfig, pieces: list[int]) -> None:
    hourglass = randomised_model(config).trunk
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


@pytest.mark.parametrize("kernel_size", [3, 4, 5, 6])
@pytest.mark.parametrize("length", [12, 11, 10, 1])
def test_the_strided_convolution_is_that_of_torch_padded_on_the_left(length: int, kernel_size: int) -> None:
    torch.manual_seed(0)
    down = StridedConvolution(4, 6, stride=3, kernel_size=kernel_size).double()
    x = torch.randn(2, length, 4, dtype=torch.float64)
    kernel = down.weight.view(6, kernel_size, 4).transpose(1, 2)  # out, in, taps
    padded = F.pad(down.norm(x).transpose(1, 2), (kernel_size - 1, 0))
    torch.testing.assert_close(down(x), F.conv1d(padded, kernel, stride=3).transpose(1, 2))


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


@pytest.mark.parametrize(("activation", "reference"), [("silu", F.silu), ("gelu", F.gelu), ("relu2", None)])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("kernel_size", "dilation"), [(1, 1), (3, 1), (3, 2)])
def test_a_convolution_block_is_what_it_says(
    activation: Activation,
    reference: Callable[[Tensor], Tensor] | None,
    gated: bool,
    kernel_size: int,
    dilation: int,
) -> None:
    torch.manual_seed(0)
    block = ConvolutionBlock(4, 6, kernel_size, dilation, activation=activation, gated=gated).double()
    x = torch.randn(2, 9, 4, dtype=torch.float64)
    assert torch.equal(block(x), x)
    torch.nn.init.normal_(block.project_out)
    hidden = F.rms_norm(x, (4,), block.norm.weight, eps=1e-6) @ block.project_in.t()
    u, v = hidden.chunk(2, dim=-1) if gated else (hidden, torch.ones((), dtype=torch.float64))
    if kernel_size > 1:
        padded = F.pad(u.transpose(1, 2), ((kernel_size - 1) * dilation, 0))
        u = F.conv1d(padded, block.taps.flip(1)[:, None], groups=6, dilation=dilation).transpose(1, 2)
    active = reference(u) if reference is not None else u.clamp(min=0) ** 2
    torch.testing.assert_close(block(x), x + (active * v) @ block.project_out.t())


def test_stochastic_depth_leaves_out_whole_sequences_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    block = ConvolutionBlock(4, 6, 3).double()
    torch.nn.init.normal_(block.project_out)
    block.skip_probability = 0.75
    x = torch.randn(1, 5, 4, dtype=torch.float64).repeat(400, 1, 1)
    whole = block.eval()(x)[0] - x[0]
    changes = block.train()(x) - x
    skipped = (changes == 0).flatten(1).all(dim=1)
    assert 260 < skipped.sum() < 340
    torch.testing.assert_close(changes[~skipped], (4 * whole).expand(int((~skipped).sum()), -1, -1))
