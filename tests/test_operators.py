"""Norm and singular values of layers as operators, against explicitly built matrices."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import condlr

# PyTorch says that even kernels may be padded by a copy
pytestmark = pytest.mark.filterwarnings("ignore:Using padding=")

OVERHANGING = nn.ConvTranspose2d(3, 5, 3, dilation=2, output_padding=1)
CASES = {
    "conv2d": (nn.Conv2d(3, 5, 3, padding=1), (3, 7, 6)),
    "strided": (nn.Conv2d(3, 5, 3, stride=2, padding=1), (3, 8, 7)),
    "dilated": (nn.Conv2d(2, 4, 3, padding=2, dilation=2), (2, 6, 6)),
    "groups": (nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 5, 5)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4, bias=False), (4, 5, 5)),
    "same": (nn.Conv2d(2, 3, (3, 2), padding="same"), (2, 5, 4)),
    "valid": (nn.Conv2d(2, 3, 3, padding="valid"), (2, 5, 4)),
    "circular": (nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular"), (3, 6, 6)),
    "circular, strided": (nn.Conv2d(3, 5, 3, stride=2, padding=1, padding_mode="circular"), (3, 6, 8)),
    "conv1d": (nn.Conv1d(3, 4, 3, stride=2, padding=1), (3, 9)),
    "conv1d same": (nn.Conv1d(3, 4, 5, padding="same"), (3, 9)),
    "conv1d same, even": (nn.Conv1d(3, 4, 4, padding="same", dilation=2), (3, 9)),
    "conv1d circular": (nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular"), (3, 6)),
    "transposed": (nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1), (4, 4, 3)),
    "transposed1d": (nn.ConvTranspose1d(4, 3, 4, stride=3), (4, 5)),
    "transposed groups": (nn.ConvTranspose2d(4, 6, 2, groups=2), (4, 4, 4)),
    "reflected": (nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"), (3, 5, 6)),
    "replicated": (nn.Conv1d(3, 5, 3, padding=1, padding_mode="replicate"), (3, 6)),
    "circular, wide": (nn.Conv2d(3, 5, 3, padding=2, padding_mode="circular"), (3, 6, 6)),
    "circular, strided by 2, valid": (nn.Conv2d(3, 5, 3, stride=2, padding_mode="circular"), (3, 7, 7)),
    "overhanging": (OVERHANGING, (3, 4, 4)),
    "conv3d": (nn.Conv3d(2, 3, 3, padding=1), (2, 4, 3, 4)),
    "conv3d, strided": (nn.Conv3d(2, 3, 2, stride=2, bias=False), (2, 4, 4, 5)),
    "conv3d groups": (nn.Conv3d(4, 2, 3, groups=2, padding=1), (4, 3, 3, 3)),
    "transposed3d": (nn.ConvTranspose3d(2, 3, 2, stride=2), (2, 3, 2, 3)),
    "linear": (nn.Linear(7, 5), (7,)),
}


def explicit(layer, shape):
    """All singular values, from the images of unit vectors."""
    units = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    zero = layer(torch.zeros(1, *shape, dtype=torch.float64))
    return torch.linalg.svdvals((layer(units) - zero).flatten(1))


@pytest.mark.parametrize("name", CASES)
def test_they_are_those_of_the_explicit_matrix(name):
    layer, shape = CASES[name]
    layer = layer.double()
    expected = explicit(layer, shape)
    asked = () if name == "linear" else shape
    torch.testing.assert_close(condlr.singular_values(layer, asked), expected, rtol=1e-6, atol=1e-9)
    assert condlr.operator_norm(layer, asked) == pytest.approx(expected[0].item(), rel=1e-6)


@pytest.mark.parametrize("name", [name for name in CASES if "groups" not in name and name != "depthwise"])
def test_low_rank_layers_have_them_too(name):
    layer, shape = CASES[name]
    low = condlr.factorize(layer.double(), ranks=2)
    expected = explicit(low, shape)
    asked = () if name == "linear" else shape
    torch.testing.assert_close(condlr.singular_values(low, asked), expected, rtol=1e-6, atol=1e-6)
    assert condlr.operator_norm(low, asked) == pytest.approx(expected[0].item(), rel=1e-6)


def test_the_boundary_can_be_chosen():
    zeros, wraps = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular")
    wraps.load_state_dict(zeros.state_dict())
    shape = (3, 6, 6)
    for boundary, layer in (("circular", wraps), ("zeros", zeros)):
        expected = explicit(layer.double(), shape)
        for other in (zeros, wraps):
            found = condlr.singular_values(other, shape, boundary=boundary)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
            norm = condlr.operator_norm(other, shape, boundary=boundary)
            assert norm == pytest.approx(expected[0].item(), rel=1e-6)
    up = nn.ConvTranspose2d(3, 5, 2, stride=2).double()
    periodic = condlr.singular_values(up, (3, 4, 4), boundary="circular")
    torch.testing.assert_close(periodic, explicit(up, (3, 4, 4)), msg="kernels that do not overlap")


def test_a_large_operator_has_its_norm_and_says_what_else_there_is():
    layer = nn.Conv2d(16, 16, 3, padding=1)
    norm = condlr.operator_norm(layer, (16, 32, 32))
    assert norm <= condlr.operator_norm(layer, (16, 32, 32), boundary="circular") * (1 + 1e-6)
    assert len(condlr.singular_values(layer, (16, 32, 32), boundary="circular")) == 16 * 32 * 32
    with pytest.raises(ValueError, match="more than 3500 singular values: operator_norm finds the largest"):
        condlr.singular_values(layer, (16, 32, 32))
    cube = nn.Conv3d(2, 4, 3, padding=1)
    with pytest.raises(
        ValueError, match="more than 3500 singular values: operator_norm finds the largest, and a"
    ):
        condlr.singular_values(cube, (2, 16, 16, 16))
    assert condlr.operator_norm(cube, (2, 16, 16, 16)) > condlr.operator_norm(cube, (2, 8, 8, 8))


@pytest.mark.parametrize(
    ("layer", "shape", "options", "message"),
    [
        (nn.Conv2d(3, 5, 3), (1, 8, 8), {}, r"one input, \(3, height, width\); got \(1, 8, 8\)"),
        (nn.Conv2d(3, 5, 3), (3, 8), {}, "height, width"),
        (nn.Conv1d(3, 5, 3), (3, 8, 8), {}, r"\(3, length\)"),
        (nn.Conv2d(3, 5, 9), (3, 4, 4), {}, "larger than the padded image"),
        (nn.Conv2d(3, 5, 3, stride=2), (3, 7, 7), {"boundary": "circular"}, "divide"),
        (nn.Conv3d(3, 5, 3), (3, 7, 7, 7), {"boundary": "circular"}, "three dimensions"),
        (nn.Conv3d(3, 5, 3), (3, 7, 7), {}, r"\(3, depth, height, width\)"),
        (nn.ReLU(), (3, 7, 7), {}, "a ReLU is no linear layer"),
        (OVERHANGING, (3, 4, 4), {"boundary": "zeros"}, "output_padding of"),
        (nn.LazyLinear(3), (), {}, "no weights yet"),
        (nn.Linear(3, 3, device="meta"), (), {}, "no weights yet"),
        (nn.Linear(3, 3), (7,), {}, "a linear layer of 3 inputs needs no shape"),
        (nn.Conv2d(3, 5, 3), 3, {}, "such as"),
        (nn.Conv2d(3, 5, 3), (3, 8, 8), {"boundary": "mirror"}, "boundary must be one of"),
    ],
)  # fmt: skip
def test_what_has_no_such_values_is_one_line(layer, shape, options, message):
    for call in (condlr.operator_norm, condlr.singular_values):
        with pytest.raises(ValueError, match=message):
            call(layer, shape, **options)


def test_weights_that_are_not_finite_have_no_singular_values():
    for layer, shape in ((nn.Conv2d(3, 5, 3), (3, 8, 8)), (nn.Linear(3, 3), ())):
        layer.weight.data.fill_(torch.inf)
        for call in (condlr.operator_norm, condlr.singular_values):
            with pytest.raises(ValueError, match="not finite"):
                call(layer, shape)
    with pytest.raises(ValueError, match="tolerance must be in"):
        condlr.operator_norm(nn.Linear(3, 3), tolerance=-1)


class Standardised(nn.Conv2d):
    """A subclass that uses its weight in its own way: standardised, as in NFNets."""

    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


def test_a_subclass_with_a_forward_of_its_own_is_taken_as_it_computes():
    layer = Standardised(3, 6, 3, stride=2, bias=False).double()
    A = layer(torch.eye(192).double().view(-1, 3, 8, 8)).flatten(1).detach()
    assert condlr.operator_norm(layer, (3, 8, 8)) == pytest.approx(torch.linalg.matrix_norm(A, 2).item())
    torch.testing.assert_close(condlr.singular_values(layer, (3, 8, 8)), torch.linalg.svdvals(A))
    with pytest.raises(ValueError, match="taken as it computes"):
        condlr.operator_norm(layer, (3, 8, 8), boundary="circular")
    summary = condlr.summary(nn.Sequential(layer), torch.zeros(1, 3, 8, 8).double())
    assert summary.rows[0].cond_operator is None


def test_circular_padding_with_a_stride_that_does_not_divide_the_size():
    layer = nn.Conv2d(2, 3, 3, stride=2, padding=1, padding_mode="circular", bias=False).double()
    A = layer(torch.eye(98).double().view(-1, 2, 7, 7)).flatten(1).detach()
    assert condlr.operator_norm(layer, (2, 7, 7)) == pytest.approx(torch.linalg.matrix_norm(A, 2).item())
    torch.testing.assert_close(condlr.singular_values(layer, (2, 7, 7)), torch.linalg.svdvals(A))


def test_complex_weights_have_no_operator_here():
    with pytest.raises(ValueError, match="complex"):
        condlr.operator_norm(nn.Conv2d(2, 3, 3, dtype=torch.complex64), (2, 7, 7))


class Halved(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


@pytest.mark.parametrize(
    "make", [nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.weight_norm]
)
def test_parametrised_layers_are_those_of_the_weight_they_have(make):
    layer = make(nn.Linear(5, 4).double()).eval()
    expected = torch.linalg.matrix_norm(layer.weight.detach(), 2).item()
    assert condlr.operator_norm(layer) == pytest.approx(expected)
    conv = make(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular").double()).eval()
    plain = nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular").double()
    plain.load_state_dict({"weight": conv.weight.detach(), "bias": conv.bias.detach()})
    for boundary in ("layer", "circular"):
        norms = [condlr.operator_norm(net, (2, 6, 6), boundary=boundary) for net in (conv, plain)]
        assert norms[0] == pytest.approx(norms[1])


def test_a_linear_layer_with_a_forward_of_its_own_is_taken_as_it_computes():
    layer = Halved(5, 4)
    norm = torch.linalg.matrix_norm(layer.weight.detach().double(), 2).item()
    assert condlr.operator_norm(layer) == pytest.approx(norm / 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layer", "shape", "count"),
    [
        (nn.Conv3d(1, 8, 4, stride=4), (1, 24, 24, 24), 1728),
        (nn.Conv2d(3, 8, 8, stride=8, padding=3, padding_mode="reflect"), (3, 64, 64), 512),
    ],
)
def test_the_limit_counts_singular_values_and_not_entries(layer, shape, count):
    assert len(condlr.singular_values(layer, shape)) == count


def test_a_matrix_that_is_too_large_is_told_from_too_many_values():
    layer = nn.Conv3d(1, 1, 4, stride=4)
    with pytest.raises(ValueError, match="matrix, 216 x 13824, is too large"):
        condlr.singular_values(layer, (1, 24, 24, 24), limit=400)
