"""Gram matrices of convolutions, beside those of explicit block-Toeplitz matrices."""

from itertools import product

import pytest
import torch

from condlr.manifolds.convolution import (
    _matrix,
    circular_singular_values,
    convolution,
    frame_bounds,
    padded_frame_bounds,
)
from condlr.manifolds.gram import gram, smaller_side
from tests.manifolds.convolutions import circular

# out, in, kernel, stride, dilation, image
CASES = [
    (3, 2, (3, 3), (1, 1), (1, 1), 9), (2, 3, (3, 3), (1, 1), (1, 1), 10),
    (3, 2, (3, 3), (2, 2), (1, 1), 13), (2, 3, (3, 3), (2, 2), (1, 1), 12),
    (4, 3, (1, 1), (1, 1), (1, 1), 5), (4, 3, (1, 1), (2, 2), (1, 1), 6),
    (3, 2, (5, 5), (2, 2), (1, 1), 17), (2, 2, (5, 5), (1, 1), (1, 1), 12),
    (2, 3, (3, 3), (2, 2), (2, 2), 15), (2, 2, (3, 3), (3, 3), (2, 2), 22),
    (2, 2, (2, 2), (3, 3), (1, 1), 15), (2, 3, (3, 1), (2, 1), (1, 2), 12),
]  # fmt: skip
cases = pytest.mark.parametrize(("out", "into", "size", "stride", "dilation", "image"), CASES)
sides = pytest.mark.parametrize("side", ["columns", "rows"])


def kernel_of(out, into, size):
    return torch.randn(out, into, *size, dtype=torch.float64)


@sides
@cases
def test_entries_away_from_the_edges_are_those_of_the_operator(
    out, into, size, stride, dilation, image, side
):
    kernel, padding = kernel_of(out, into, size), [k // 2 for k in size]
    operator = convolution(kernel, image, stride, padding, dilation)
    W = _matrix(operator.apply, operator.domain, kernel).mT
    found = gram(kernel, stride, dilation, side)
    n, height, width = operator.domain if side == "columns" else operator.range
    whole = (W.mT @ W if side == "columns" else W @ W.mT).view(n, height, width, n, height, width)
    steps = (1, 1) if side == "columns" else stride
    edge = [-(-d * (k - 1) // s) + 1 for d, k, s in zip(dilation, size, steps, strict=True)]
    inside = [*product(range(edge[0], height - edge[0]), range(edge[1], width - edge[1]))]
    assert inside
    diagonal, sums = found.diagonal(), found.off_diagonal_sums()
    for row, column in inside:
        residue = (0, 0)
        if side == "columns":
            residue = (row + padding[0]) % stride[0], (column + padding[1]) % stride[1]
        wanted, mine = whole[:, row, column], torch.zeros(n, n, height, width, dtype=torch.float64)
        for lag in product(range(1 - size[0], size[0]), range(1 - size[1], size[1])):
            down, right = (at + lag[i] * found.unit[i] for i, at in enumerate((row, column)))
            if 0 <= down < height and 0 <= right < width:
                mine[:, :, down, right] = found.block(residue, lag)
        torch.testing.assert_close(mine, wanted)
        place = residue[0] * found.residues[1] + residue[1]
        own = wanted[:, :, row, column].diagonal()
        torch.testing.assert_close(diagonal[place], own)
        torch.testing.assert_close(sums[place], wanted.abs().sum((1, 2, 3)) - own)


@pytest.mark.slow
@sides
@cases
def test_the_gradient_is_that_of_finite_differences(out, into, size, stride, dilation, image, side):
    """Of all entries at once, each with a weight of its own."""
    kernel = kernel_of(out, into, size).requires_grad_()
    weights = torch.randn_like(gram(kernel, stride, dilation, side).blocks)
    assert torch.autograd.gradcheck(
        lambda K: (weights * gram(K, stride, dilation, side).blocks).sum(), (kernel,)
    )


@sides
@cases
def test_the_distance_to_the_identity_is_that_of_the_operator(out, into, size, stride, dilation, image, side):
    kernel, torus = kernel_of(out, into, size), (12, 12)
    W = circular(kernel, torus, stride, dilation)
    whole = W.mT @ W if side == "columns" else W @ W.mT
    found = gram(kernel, stride, dilation, side)
    positions = len(whole) // (found.n * found.residues[0] * found.residues[1])
    wanted = (whole - torch.eye(len(whole))).square().sum() / positions
    torch.testing.assert_close(found.squared_distance(), wanted)
    kernel = (kernel / 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda K: gram(K, stride, dilation, side).squared_distance(), (kernel,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_of_any_precision(dtype):
    kernel = torch.randn(4, 3, 3, 3).to(dtype)
    found = gram(kernel, (2, 2))
    assert found.blocks.dtype == dtype
    exact = gram(kernel.double(), (2, 2)).off_diagonal_sums()
    torch.testing.assert_close(found.off_diagonal_sums().double(), exact, rtol=0.05, atol=0.5)


def test_a_kernel_of_one_tap_has_no_neighbours():
    kernel = torch.zeros(3, 3, 3, 3, dtype=torch.float64)
    kernel[range(3), range(3), 1, 1] = 1
    for side in ("columns", "rows"):
        found = gram(kernel, side=side)
        assert torch.equal(found.diagonal(), torch.ones(1, 3, dtype=torch.float64))
        assert not found.off_diagonal_sums().any()
        assert found.squared_distance() == 0


def test_the_smaller_side():
    assert smaller_side(torch.empty(8, 2, 3, 3), (2, 2)) == "columns"
    assert smaller_side(torch.empty(7, 2, 3, 3), (2, 2)) == "rows"
    with pytest.raises(ValueError, match=r"a kernel is \(out, in, kh, kw\)"):
        gram(torch.ones(3, 3))


@cases
def test_the_singular_values_of_a_periodic_image(out, into, size, stride, dilation, image):
    """Kernels larger than the image wrap around."""
    for torus in ((6, 6), (2 * stride[0], 3 * stride[1])):
        kernel = kernel_of(out, into, size)
        wanted = torch.linalg.svdvals(circular(kernel, torus, stride, dilation))
        found = circular_singular_values(kernel, torus, stride, dilation).flatten()
        torch.testing.assert_close(found.sort(descending=True).values, wanted)


@cases
def test_frame_bounds_of_a_periodic_image(out, into, size, stride, dilation, image):
    """Also where the stride does not divide the image."""
    kernel = kernel_of(out, into, size)
    for torus in ((6, 6), (7, 5)):
        values = torch.linalg.svdvals(circular(kernel, torus, stride, dilation)).square()
        found = frame_bounds(kernel, torus, stride, dilation)
        assert found == pytest.approx((values.min().item(), values.max().item()), rel=1e-9, abs=1e-12)
    with pytest.raises(ValueError, match="too large to be made dense"):
        frame_bounds(torch.ones(64, 64, 3, 3), 33, 2)


@pytest.mark.parametrize(("out", "into", "k"), [(8, 3, 3), (3, 8, 3), (8, 8, 5)])
def test_the_upper_frame_bound_is_that_of_orthogonium(out, into, k):
    """Its bound by Gram iteration; it knows no lower one. Where the package is installed."""
    singular_values = pytest.importorskip("orthogonium.layers.conv.singular_values.get_sv")
    layer = torch.nn.Conv2d(into, out, k, padding=k // 2, padding_mode="circular", bias=False).double()
    theirs, _ = singular_values.get_conv_sv(layer, n_iter=10, imsize=8)
    assert frame_bounds(layer.weight.detach(), 8)[1] ** 0.5 == pytest.approx(theirs.item(), rel=1e-6)


@cases
def test_frame_bounds_of_a_padded_image(out, into, size, stride, dilation, image):
    kernel, padding = kernel_of(out, into, size), [k // 2 for k in size]
    operator = convolution(kernel, image, stride, padding, dilation)
    values = torch.linalg.svdvals(_matrix(operator.apply, operator.domain, kernel)).square()
    A, residual, B = padded_frame_bounds(kernel, image, stride, padding, dilation)
    assert values.max() <= B
    assert values.min().item() - 1e-9 * B <= A
    assert (values - A).abs().min().item() <= residual + 1e-9 * B
    assert padded_frame_bounds(0 * kernel, image, stride, padding, dilation) == (0, 0, 0)
