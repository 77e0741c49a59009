"""What layers keep of their inputs, beside pseudo-inverses of explicit matrices."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from condlr.analysis.cushion import Cushion
from condlr.analysis.embeddings import Embeddings
from condlr.analysis.frame_bounds import FrameBounds
from condlr.analysis.reconstruction import Reconstruction
from condlr.analysis.recovery import Recovery, least_squares
from condlr.analysis.stability import Stability
from condlr.analysis.variance_ratio import VarianceRatio
from condlr.data.base import Data, Images
from condlr.factorization import factorize
from condlr.manifolds.convolution import _matrix, convolution


def given(model, size=6):
    pixels = torch.randint(0, 256, (5, 3, size, size), dtype=torch.uint8)
    images = Images(pixels, torch.zeros(5, dtype=torch.long))
    return SimpleNamespace(model=model, data=Data(images, images, 2), test_images=5)


@pytest.mark.parametrize(("out", "into", "stride"), [(8, 3, 1), (3, 3, 1), (2, 4, 1), (6, 3, 2)])
def test_the_shortest_least_squares_solution(out, into, stride):
    kernel = torch.randn(out, into, 3, 3, dtype=torch.float64)
    operator = convolution(kernel, 6, stride, 1, 1)
    W = _matrix(operator.apply, operator.domain, kernel).mT
    y = torch.randn(4, *operator.range, dtype=torch.float64)
    wanted = (torch.linalg.pinv(W) @ y.flatten(1).mT).mT
    found = least_squares(operator, y, 2000).flatten(1)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_errors_are_those_of_the_projection_on_the_row_space():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 3, 2), nn.Flatten(), nn.Linear(8, 20)
    )
    network = given(net)
    rows = {row["layer"]: row for row in Recovery(images=4, iterations=3000).rows(network)}
    assert [*rows] == ["0", "2", "4"]
    x = network.data.test.pixels[:4].double() / 255
    double = nn.Sequential(*net).double()
    for place, name in enumerate("024"):
        layer = double.get_submodule(name)
        if isinstance(layer, nn.Conv2d):
            operator = convolution(layer.weight, x.shape[-1], layer.stride, layer.padding, 1)
            W = _matrix(operator.apply, operator.domain, operator.kernel).mT
        else:
            W = layer.weight.detach()
        flat = x.flatten(1).mT
        lost = (torch.linalg.pinv(W) @ W @ flat - flat).norm(dim=0) / flat.norm(dim=0)
        assert rows[name]["error"] == pytest.approx(lost.mean().item(), rel=1e-3, abs=1e-5)
        assert rows[name]["misfit"] < 1e-6
        with torch.no_grad():
            x = double[2 * place : 2 * place + 2](x) if place < 2 else x
    assert rows["2"]["error"] > 0.1, "eight channels onto two, with a stride"
    assert rows["4"]["error"] < 1e-4, "8 values to 20 lose nothing"


def test_an_orthogonal_layer_is_recovered_at_once_and_one_of_low_rank_never():
    net = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False))
    nn.init.orthogonal_(net[0].weight)
    (row,) = Recovery(images=3, iterations=1).rows(given(net))
    assert row["error"] < 1e-6
    low = factorize(net, ranks={"0": 1})
    (row,) = Recovery(images=3, iterations=100).rows(given(low))
    assert row["error"] > 0.01 and row["misfit"] < 1e-6


def test_wrong_keys_are_named():
    with pytest.raises(ValueError, match="iterations must be in"):
        Recovery(iterations=0)
    with pytest.raises(ValueError, match="images=9, but there are only 5"):
        Recovery(images=9).require(given(nn.Sequential(nn.Conv2d(3, 3, 1))))


def test_rows_of_other_options_are_missing():
    """The default of every analysis: options that are key columns must have their rows."""
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3))
    here = SimpleNamespace(test_images=30, train_images=400, has_dense=False, model=net)
    there = [{"layer": "conv1", "images": "5", "iterations": "3"}]
    assert Recovery().lacks([], here)
    assert not Recovery(images=5, iterations=3).lacks(there, here)
    assert Recovery(images=20, iterations=3).lacks(there, here)
    assert Recovery(images=5, iterations=50).lacks(there, here)
    rows = [{"layer": "fc", "made_on": "itself", "images": "30", "eps": eps} for eps in ("0.1", "0.30")]
    cases = [
        ({"eps": [0.1]}, False), ({"eps": [0.1, 0.3]}, False), ({"eps": [0.2]}, True),
        ({"eps": [0.1], "layers": ["fc"]}, False), ({"eps": [0.1], "layers": ["fc", "conv1"]}, True),
        ({"eps": [0.1], "images": 7}, True), ({"eps": "26/260"}, False), ({"eps": [0.1], "steps": 200}, True),
    ]  # fmt: skip
    for options, lacks in cases:
        assert Stability(**options).lacks(rows, here) == lacks, options
    whole = [
        {"layer": "fc", "train_images": "400", "dimensions": str(r), "classifier": "svm", "activations": "64"}
        for r in (1, 2, 5, 10, 20, 50, 64)
    ]
    assert not Embeddings().lacks(whole, here), "a layer of 64 activations has no more dimensions"
    assert Embeddings(dimensions=[1, 3]).lacks(whole, here)
    wide = [row | {"layer": "conv", "activations": "4096"} for row in whole[:4]]
    assert Embeddings(layers=["conv"]).lacks([*whole, *wide], here), "it has more dimensions than the other"
    assert not Embeddings(layers=["fc"]).lacks([*whole, *wide], here)


def test_a_combination_that_is_missing_is_missed():
    here = SimpleNamespace(test_images=500, train_images=400, has_dense=False)
    rows = [
        {"layer": layer, "made_on": "itself", "images": "500", "eps": eps}
        for layer, eps in (("fc2", "0.1"), ("fc2", "0.2"), ("fc1", "0.1"))
    ]
    assert not Stability(layers=["fc1", "fc2"], eps=[0.1]).lacks(rows, here)
    assert Stability(layers=["fc1", "fc2"], eps=[0.1, 0.2]).lacks(rows, here)
    assert Stability(layers=["fc1"], eps=[0.1, 0.2]).lacks(rows, here)
    assert Stability(eps=[0.3]).lacks(rows, here), "of no layer"


def test_rows_of_the_dense_network_are_missing_once_it_is_trained():
    before, after = (SimpleNamespace(test_images=500, has_dense=trained) for trained in (False, True))
    rows = [{"layer": "fc", "made_on": "itself", "images": "500", "eps": "0.1", "steps": "20"}]
    assert not Stability(eps=[0.1]).lacks(rows, before)
    assert Stability(eps=[0.1]).lacks(rows, after)
    assert not Stability(eps=[0.1]).lacks([*rows, rows[0] | {"made_on": "baseline"}], after)


def test_more_images_layers_restarts_and_values_are_missing():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3))
    here = SimpleNamespace(test_images=2000, model=net)
    made = [
        {"layer": layer, "image": str(number), "iterations": "100"}
        for layer in ("input", "0", "2") for number in range(4)
    ]  # fmt: skip
    assert not Reconstruction().lacks(made, here), "the network has no third convolution"
    assert Reconstruction(images=8).lacks(made, here)
    assert Reconstruction(iterations=50).lacks(made, here)
    assert Reconstruction(layers=2).lacks([row for row in made if row["layer"] != "2"], here)
    bounds = [{"layer": "0", "A_padded": "0.1", "restarts": "2"}, {"layer": "2", "A_padded": "0.1"}]
    assert not FrameBounds().lacks(bounds, here), "rows without the column have its default"
    assert FrameBounds(restarts=10).lacks(bounds, here)
    ratios = [
        {"layer": "fc", "centred": "True", "images": "2000", "index": str(r), "ratio": str(r / 120)}
        for r in range(1, 101)
    ]
    assert not VarianceRatio().lacks(ratios, here)
    assert VarianceRatio(largest=110).lacks(ratios, here)
    ratios[-1]["ratio"] = "1"
    assert not VarianceRatio(largest=110).lacks(ratios, here), "there are no more values"


class Mixed(nn.Module):
    """Layers on tokens and on vectors, one called by keyword, and a low-rank convolution of lines."""

    def __init__(self):
        super().__init__()
        self.conv, self.line, self.tokens = nn.Conv2d(3, 4, 3), nn.Conv1d(4, 4, 3), nn.Linear(14, 6)
        self.head = nn.Linear(24, 2)

    def forward(self, x):
        z = self.line(input=self.conv(input=x).flatten(2))
        return self.head(input=self.tokens(z).flatten(1))


@pytest.mark.parametrize("analysis", [Recovery(images=4, iterations=5), Cushion(images=4)])
@pytest.mark.parametrize("low_rank", [False, True])
def test_layers_that_are_no_map_of_vectors_or_images_are_left_out(analysis, low_rank):
    net = Mixed()
    if low_rank:
        net = factorize(net, ranks=2)
    rows = [*analysis.rows(given(net))]
    assert [row["layer"] for row in rows] == ["conv", "head"]


def test_an_image_of_zeros_leaves_the_means_of_the_others():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5)).eval()
    nn.init.constant_(net[0].bias, -0.01)
    pixels = (torch.rand(20, 1, 6, 6) * 255).to(torch.uint8)
    black = torch.cat([torch.zeros_like(pixels[:1]), pixels])
    found = []
    for images in (pixels, black):
        set_of = Images(images, torch.zeros(len(images), dtype=torch.long))
        run = SimpleNamespace(
            model=net,
            data=Data(set_of, set_of, 5),
            test_images=len(images),
            dense=None,
            on_progress=lambda *_: None,
        )
        stability = Stability(images=len(images), eps=[0.1], steps=2, layers=["1"])
        found.append([*Cushion(images=21).rows(run), *stability.rows(run)])
        for row in Recovery(images=len(images)).rows(run):
            assert all(math.isfinite(row[key]) for key in ("error", "largest_error", "misfit"))
    for alone, beside in zip(*found, strict=True):
        for key in {"cushion", "median"} & {*alone}:
            assert beside[key] == pytest.approx(alone[key], rel=1e-5), "the image of zeros does not count"
        assert all(math.isfinite(value) for value in beside.values() if isinstance(value, float))
