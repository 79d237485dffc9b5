import pytest
import torch

from deconv_model.muon import Muon, _share_out, orthogonalise


def matrix_of(values, rows, columns, seed=0):
    """Return a matrix of the given singular values, and its singular vectors as columns."""
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(rows, len(values), generator=generator))
    right, _ = torch.linalg.qr(torch.randn(columns, len(values), generator=generator))
    return left @ torch.diag(values) @ right.T, left, right


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (60, 64), (32, 128), (128, 32), (96, 70)])
@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e9])
def test_singular_values_come_near_one_and_vectors_stay(rows, columns, scale):
    values = torch.logspace(0, -2, min(rows, columns)) * scale
    matrix, left, right = matrix_of(values, rows, columns)
    result = orthogonalise(matrix[None])[0]
    assert result.dtype == torch.bfloat16
    turned = left.T @ result.float() @ right
    assert turned.diagonal().min() > 0.7
    assert turned.diagonal().max() < 1.3
    assert (turned - torch.diag(turned.diagonal())).norm() < 0.1 * turned.norm()


def test_small_singular_values_grow_but_less_and_zero_stays_zero():
    matrix, left, right = matrix_of(torch.tensor([1.0] + [1e-4] * 20), 48, 40)
    grown = (left.T @ orthogonalise(matrix[None])[0].float() @ right).diagonal()
    assert 0.7 < grown[0] < 1.3
    assert 50 * 1e-4 < grown[1:].mean() < 0.3
    assert torch.equal(orthogonalise(torch.zeros(1, 8, 30)), torch.zeros(1, 8, 30, dtype=torch.bfloat16))


def test_matrices_of_a_stack_do_not_touch_each_other():
    stack = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(2))
    stack[1] *= 1e6
    together = orthogonalise(stack)
    for matrix, result in zip(stack, together, strict=True):
        torch.testing.assert_close(orthogonalise(matrix[None])[0], result, rtol=0.02, atol=0.02)


def test_steps_are_close_to_those_of_torch():
    """Singular values near 1 in another way: the changes point the same way and are as large."""
    ours, theirs = ([torch.nn.Parameter(torch.zeros(shape)) for shape in ((40, 24), (16, 48))] for _ in range(2))
    settings = {"lr": 0.1, "weight_decay": 0.2, "momentum": 0.95}
    optimizers = Muon(ours, **settings), torch.optim.Muon(theirs, **settings, adjust_lr_fn="original")
    generator = torch.Generator().manual_seed(3)
    for _ in range(4):
        for left, right in zip(ours, theirs, strict=True):
            left.grad = right.grad = torch.randn(left.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()
        for left, right in zip(ours, theirs, strict=True):
            momentum, expected = (o.state[p]["momentum_buffer"] for o, p in zip(optimizers, (left, right), strict=True))
            torch.testing.assert_close(momentum, expected)
            assert torch.cosine_similarity(left.flatten(), right.flatten(), dim=0) > 0.95
            assert 0.9 < left.norm() / right.norm() < 1.3


def test_a_matrix_without_a_gradient_stays_and_a_vector_is_refused():
    moved, still = (torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    moved.grad = torch.eye(4)
    Muon([moved, still], lr=0.1, weight_decay=0.1).step()
    assert torch.equal(still, torch.ones(4, 4))
    assert not torch.equal(moved, torch.ones(4, 4))
    with pytest.raises(ValueError, match=r"Muon trains matrices, got a parameter of shape \(4,\)"):
        Muon([torch.nn.Parameter(torch.ones(4))], lr=0.1, weight_decay=0.0)


def test_the_work_is_shared_evenly():
    shapes = [torch.Size(shape) for shape in [(8, 8), (64, 64), (48, 64), (64, 40), (8, 8), (8, 64)]]
    owners = _share_out(shapes, 2)
    load = [sum(min(s) ** 2 * sum(s) for s, owner in zip(shapes, owners, strict=True) if owner == w) for w in (0, 1)]
    assert max(load) / sum(load) < 0.6
    assert set(_share_out(shapes[:2], 5)) < {0, 1, 2, 3, 4}
