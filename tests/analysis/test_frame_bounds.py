"""Frame bounds of a network's convolutions."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from condlr.analysis.frame_bounds import FrameBounds
from condlr.data.base import Data, Images
from condlr.factorization import factorize
from condlr.manifolds import convolution as operators
from condlr.manifolds.convolution import _matrix, convolution, frame_bounds
from tests.manifolds.convolutions import circular


class Given:
    def __init__(self, model, size=8):
        images = Images(torch.zeros(2, 3, size, size, dtype=torch.uint8), torch.zeros(2, dtype=torch.long))
        self.model, self.data = model, Data(images, images, 2)


def test_each_convolution_that_the_network_calls():
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, 2, padding=1), nn.Flatten(), nn.Linear(64, 2)
    ).double()
    sides = {"0": "columns", "1": "rows"}
    rows = {row["layer"]: row for row in FrameBounds().rows(Given(net))}
    assert {name: row["side"] for name, row in rows.items()} == sides
    for name, row in rows.items():
        layer = net.get_submodule(name)
        W = circular(layer.weight.detach(), (8, 8), layer.stride)
        values = torch.linalg.svdvals(W).square()
        assert (row["A_circular"], row["B_circular"]) == pytest.approx((values[-1].item(), values[0].item()))
        assert row["ratio"] == pytest.approx((values[0] / values[-1]).item())
        operator = convolution(layer.weight, 8, layer.stride, layer.padding, 1)
        padded = torch.linalg.svdvals(_matrix(operator.apply, operator.domain, operator.kernel)).square()
        assert padded.max() <= row["B_padded"]
        assert (padded - row["A_padded"]).abs().min() <= row["residual"] + 1e-9


def test_a_layer_of_low_rank_is_no_frame():
    net = factorize(nn.Sequential(nn.Conv2d(3, 6, 3, padding=1)), ranks={"0": 2})
    (row,) = FrameBounds().rows(Given(net))
    assert row["ratio"] == math.inf
    assert row["A_circular"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("shape", [(1, 8), (4, 1)])
def test_where_one_side_is_long_the_bounds_are_those_of_the_short_one(shape, monkeypatch):
    """No matrix of the operator is made, which could take terabytes."""
    kernel = torch.randn(*shape, 3, 3, dtype=torch.float64)
    wanted = frame_bounds(kernel, 9, 2)
    side = min(shape[0] * 25, shape[1] * 81)
    monkeypatch.setattr(operators, "DENSE_LIMIT", side)
    monkeypatch.setattr(operators, "_NUMBERS", 2000)
    assert frame_bounds(kernel, 9, 2) == pytest.approx(wanted, rel=1e-9, abs=1e-12 * wanted[1])
    with pytest.raises(ValueError, match="too large to be made dense"):
        monkeypatch.setattr(operators, "DENSE_LIMIT", side - 1)
        frame_bounds(kernel, 9, 2)


def test_a_stride_that_does_not_divide_a_large_image_leaves_the_circular_columns_empty():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2))
    (row,) = FrameBounds().rows(Given(net, 65))
    assert row["A_circular"] is None
    assert row["B_padded"] > 0
    net[0].weight.data[0] = math.nan
    (row,) = FrameBounds().rows(Given(net, 65))
    assert math.isnan(row["B_padded"])


def test_without_padding_the_side_may_be_another_one():
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 4, 5, bias=False)
    images = Images(torch.zeros(2, 4, 8, 8, dtype=torch.uint8), torch.zeros(2, dtype=torch.long))
    (row,) = FrameBounds(restarts=8).rows(
        SimpleNamespace(model=nn.Sequential(layer), data=Data(images, images, 2))
    )
    assert row["side"] == "columns, padded rows"
    W = _matrix_of(layer, (4, 8, 8))
    assert row["A_padded"] == pytest.approx(torch.linalg.eigvalsh(W @ W.mT)[0].item(), rel=1e-6)


def test_the_ratio_of_exact_bounds_is_finite_down_to_rounding():
    layer = nn.Conv2d(2, 2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor([1.0, 1e-8]))[..., None, None])
    images = Images(torch.zeros(2, 2, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.long))
    (row,) = FrameBounds().rows(SimpleNamespace(model=nn.Sequential(layer), data=Data(images, images, 2)))
    assert row["ratio"] == pytest.approx(1e16, rel=1e-6)


def _matrix_of(layer, shape):
    units = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    return copy.deepcopy(layer).double()(units).flatten(1).mT.detach()
