"""Analyses of activations, beside their definitions on explicit matrices."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from condlr.analysis._activations import activations, chosen, penultimate
from condlr.analysis.cushion import Cushion, frobenius
from condlr.analysis.effective_rank import EffectiveRank, effective_rank, stable_rank
from condlr.analysis.embeddings import Embeddings, components
from condlr.analysis.scatter import Scatter
from condlr.analysis.stability import Stability, relative
from condlr.analysis.transfer import Transfer
from condlr.analysis.variance_ratio import VarianceRatio, variance_ratio
from condlr.data.base import Data, Images
from condlr.factorization import factorize
from condlr.manifolds.convolution import _matrix, convolution
from condlr.models._resnet import Basic, ResNet
from condlr.models.lenet5 import LeNet5


class Trained(SimpleNamespace):
    @property
    def test_images(self):
        return len(self.data.test)


def given(model, shape=(3, 6, 6), n=40):
    torch.manual_seed(2)
    pixels = torch.randint(0, 256, (n, *shape), dtype=torch.uint8)
    images = Images(pixels, torch.zeros(n, dtype=torch.long))
    return Trained(model=model.eval(), data=Data(images, images, 2))


def small():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 2)
    )


def test_activations_by_name():
    net = small()
    trained = given(net)
    found = activations(net, trained.data.test, ["1", "3.input", "5.input", "4"])
    x = trained.data.test.pixels.float() / 255
    with torch.no_grad():
        wanted = net[1](net[0](x)).flatten(1)
        hidden = net[4](net[3](wanted))
    for name, value in (("1", wanted), ("3.input", wanted), ("5.input", hidden), ("4", hidden)):
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert penultimate(net, (3, 6, 6)) == "5.input"
    assert penultimate(LeNet5(), (1, 28, 28)) == "fc2.input"
    assert penultimate(factorize(LeNet5(), 0.5), (1, 28, 28)) == "fc2.input"
    with pytest.raises(ValueError, match="no linear layer"):
        penultimate(nn.Sequential(nn.Conv2d(3, 3, 1)), (3, 6, 6))
    with pytest.raises(ValueError, match="layers: '9' names none of 0, 1"):
        activations(net, trained.data.test, ["9"])


@pytest.mark.parametrize("shape", [(30, 5), (5, 30), (8, 8)])
def test_the_variance_ratio_is_that_of_singular_values(shape):
    A = torch.randn(*shape) * 2.0 ** -torch.arange(shape[1])
    values = np.linalg.svd(A.double().numpy(), compute_uv=False) ** 2
    np.testing.assert_allclose(variance_ratio(A), values.cumsum() / values.sum(), rtol=1e-9)


def test_a_layer_has_one_name_however_it_is_typed():
    net = nn.Sequential()
    net.add_module("network", small())
    net.add_module("5", nn.Identity())
    assert chosen(net, [], (3, 6, 6)) == ["network.5.input"], "5 is another module"
    assert chosen(net, ["network.3.input", "3.input", "3"], (3, 6, 6)) == ["3.input", "3"]
    with pytest.raises(ValueError, match="'9' names none of"):
        chosen(net, ["9"], (3, 6, 6))


def test_rows_of_variance_ratios():
    trained = given(small())
    rows = [*VarianceRatio(largest=3).rows(trained)]
    assert [(row["layer"], row["centred"], row["index"]) for row in rows] == [
        ("5.input", centred, index) for centred in (False, True) for index in (1, 2, 3)
    ]
    assert {row["images"] for row in rows} == {40}, "a small dataset has fewer"
    A = activations(trained.model, trained.data.test, ["5.input"])["5.input"].double()
    values = torch.linalg.svdvals(A - A.mean(0)).square()
    assert float(rows[5]["ratio"]) == pytest.approx((values[:3].sum() / values.sum()).item(), rel=1e-5)
    named = VarianceRatio(layers=["1"], largest=2)
    assert {row["layer"] for row in named.rows(trained)} == {"1"}
    assert named.lacks(rows, trained) and not VarianceRatio(largest=3).lacks(rows, trained)
    assert VarianceRatio().lacks(rows, trained), "three of more"
    assert not named.lacks([{"layer": "1", "images": "40", "index": "2", "ratio": "0.8"}], trained)


def test_ranks_of_known_spectra():
    assert stable_rank(torch.tensor([2.0, 2.0, 2.0])) == pytest.approx(3)
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0])) == pytest.approx(3)
    assert stable_rank(torch.tensor([1.0, 0.5])) == pytest.approx(1.25)
    assert effective_rank(torch.tensor([3.0, 0.0, 0.0])) == pytest.approx(1)
    p = np.array([0.5, 0.3, 0.2])
    assert effective_rank(torch.tensor(p)) == pytest.approx(math.exp(-(p * np.log(p)).sum()))
    assert stable_rank(torch.zeros(3)) == effective_rank(torch.zeros(3)) == 0
    assert math.isnan(stable_rank(torch.tensor([math.nan, 1.0])))


def test_ranks_of_weights_beside_those_of_outputs():
    net = factorize(small(), ranks={"3": 2})
    trained = given(net)
    rows = {row["layer"]: row for row in EffectiveRank(images=30).rows(trained)}
    assert [*rows] == ["0", "3", "5"]
    assert rows["3"]["rank"] == 2 and rows["3"]["effective_weight"] <= 2 + 1e-9
    assert rows["3"]["effective_outputs"] <= 2 + 1e-2, "no more directions than the layer has"
    assert (rows["0"]["n"], rows["0"]["m"], rows["0"]["outputs"]) == (4, 27, 64)
    A = activations(net, trained.data.test.take(slice(30)), ["0"])["0"].double()
    spread = torch.linalg.svdvals(A - A.mean(0))
    assert rows["0"]["stable_outputs"] == pytest.approx(stable_rank(spread), rel=1e-6)
    assert rows["0"]["effective_outputs"] == pytest.approx(effective_rank(spread), rel=1e-5)


@pytest.mark.parametrize(
    ("size", "stride", "padding", "dilation"), [(6, 1, 1, 1), (7, 2, 1, 1), (6, 1, 0, 2)]
)
def test_the_frobenius_norm_of_the_operator(size, stride, padding, dilation):
    kernel = torch.randn(3, 2, 3, 3, dtype=torch.float64)
    operator = convolution(kernel, size, stride, padding, dilation)
    W = _matrix(operator.apply, operator.domain, kernel)
    torch.testing.assert_close(frobenius(operator), torch.linalg.matrix_norm(W))


def test_cushions_of_each_layer():
    net = small()
    trained = given(net)
    rows = {row["layer"]: row for row in Cushion(images=20).rows(trained)}
    assert [*rows] == ["0", "3", "5"]
    x = activations(net, trained.data.test.take(slice(20)), ["3.input"])["3.input"].double()
    W = net[3].weight.detach().double()
    seen = (x @ W.mT).norm(dim=1) / x.norm(dim=1) / torch.linalg.matrix_norm(W)
    assert rows["3"]["cushion"] == pytest.approx(seen.min().item(), rel=1e-6)
    assert rows["3"]["noise"] == 64**-0.5
    assert rows["3"]["ratio"] == pytest.approx(8 * seen.min().item(), rel=1e-6)
    x = torch.randn(4000, 64, dtype=torch.float64)
    noise = ((x @ W.mT).norm(dim=1).square().mean() / x.norm(dim=1).square().mean()).sqrt()
    assert noise / torch.linalg.matrix_norm(W) == pytest.approx(rows["3"]["noise"], rel=0.05)


def test_a_residual_network_has_rows_for_every_layer():
    net = ResNet(Basic, (1, 1), (16, 16, 32))
    trained = given(net, (3, 8, 8), 10)
    names = [name for name, layer in net.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    for analysis in (EffectiveRank(images=10), Cushion(images=10)):
        assert {row["layer"] for row in analysis.rows(trained)} == {*names}


def test_embeddings_of_separable_points():
    """Two classes apart in one direction, which is the first component: one dimension is enough."""
    pytest.importorskip("sklearn")
    torch.manual_seed(0)
    labels = torch.arange(60) % 2
    pixels = torch.randint(0, 100, (60, 1, 3, 3), dtype=torch.uint8)
    pixels[:, 0, 1, 1] = (150 + 100 * labels).to(torch.uint8)
    images = Images(pixels, labels)
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 2)).eval()
    trained = Trained(model=net, data=Data(images, images, 2))
    rows = [*Embeddings(dimensions=[1, 4, 20], train_images=50).rows(trained)]
    assert [(row["dimensions"], row["classifier"]) for row in rows] == [
        (r, classifier) for r in (1, 4, 9) for classifier in ("svm", "logistic")
    ], "all nine, and no more"
    assert {row["percent"] for row in rows} == {100.0}
    assert [row["reduction"] for row in rows[::2]] == [9, 9 / 4, 1]
    shuffled = Images(pixels, labels[torch.randperm(60)])
    wrong = Trained(model=net, data=Data(images, shuffled, 2))
    assert all(row["percent"] < 80 for row in Embeddings(dimensions=[1], train_images=50).rows(wrong))


def test_transfer_to_labels_that_were_not_learned():
    """Of four classes in two superclasses, apart in two pixels, one dimension knows two."""
    pytest.importorskip("sklearn")
    torch.manual_seed(0)
    fine = torch.arange(80) % 4
    pixels = torch.full((80, 1, 3, 3), 100, dtype=torch.uint8)
    pixels[:, 0, 0, 0] += (100 * (fine // 2)).to(torch.uint8)
    pixels[:, 0, 1, 1] += (30 * (fine % 2) + torch.randint(0, 5, (80,))).to(torch.uint8)
    images = Images(pixels, fine // 2, {"fine": fine})
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 2)).eval()
    rows = [
        *Transfer(dimensions=[1, 2], train_images=60).rows(Trained(model=net, data=Data(images, images, 2)))
    ]
    shares = {(row["labels"], row["dimensions"], row["classifier"]): row["percent"] for row in rows}
    assert shares["fine", 1, "svm"] == 50
    assert shares["fine", 2, "logistic"] == 100
    plain = Images(pixels, fine)
    with pytest.raises(ValueError, match="only the labels that were learned; CIFAR-100 has two kinds"):
        Transfer().require(Trained(model=net, data=Data(plain, plain, 4)))


@pytest.mark.parametrize("shape", [(40, 6), (6, 40)])
def test_components_are_those_of_the_training_points(shape):
    torch.manual_seed(0)
    A, B = (torch.randn(*shape, dtype=torch.float64) * 1.3 ** torch.arange(shape[1]) + 5 for _ in range(2))
    learned, tested = components(A, B, [1, 3])
    _, sigma, Vt = torch.linalg.svd(A - A.mean(0), full_matrices=False)
    scale = sigma[0] / (len(A) - 1) ** 0.5
    torch.testing.assert_close(learned.abs(), ((A - A.mean(0)) @ Vt[:3].mT).abs() / scale)
    torch.testing.assert_close(tested.abs(), ((B - A.mean(0)) @ Vt[:3].mT).abs() / scale)


def test_points_in_the_plane():
    net = small()
    trained = given(net)
    rows = [*Scatter(images=30).rows(trained)]
    assert [(row["layer"], row["image"]) for row in rows] == [("5.input", image) for image in range(30)]
    A = activations(net, trained.data.test.take(slice(30)), ["5.input"])["5.input"].double()
    U, sigma, _ = torch.linalg.svd(A - A.mean(0), full_matrices=False)
    wanted = (U * sigma)[:, :2] / sigma[0] * 29**0.5
    found = torch.tensor([[float(row["first"]), float(row["second"])] for row in rows], dtype=torch.float64)
    torch.testing.assert_close(found.abs(), wanted.abs(), rtol=1e-3, atol=1e-3)


def test_stability_in_the_white_box_and_transferred():
    net, dense = small(), small()
    for layer in (dense[0], dense[3], dense[5]):
        nn.init.normal_(layer.weight, std=0.1)
    seen = []
    trained = given(net, n=12)
    trained.dense, trained.on_progress = dense.eval(), lambda done, total: seen.append((done, total))
    rows = [*Stability(layers=["1"], eps=[0.05, 0.2], steps=5).rows(trained)]
    assert [(row["made_on"], row["eps"]) for row in rows] == [
        ("itself", 0.05), ("itself", 0.2), ("baseline", 0.05), ("baseline", 0.2)
    ]  # fmt: skip
    for row in rows:
        assert 0 < row["moved"] <= row["eps"] ** 2 * (1 + 1e-5)
        assert row["change"] > 0
    assert rows[1]["change"] > rows[0]["change"] and rows[3]["change"] > rows[2]["change"]
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    trained.dense = None
    assert {row["made_on"] for row in Stability(eps=[0.1], steps=2).rows(trained)} == {"itself"}


def test_the_change_of_activations():
    before = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    assert relative(before, before).tolist() == [0, 0]
    after = before + torch.tensor([0.0, 1.0])
    assert relative(after, before).tolist() == pytest.approx([1 / 25, 1])
    assert relative(after, torch.zeros(2, 2)).isnan().all()


def test_values_before_a_change_in_place_and_layers_that_nobody_calls():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    assert activations(net, torch.randn(50, 4), ["0"])["0"].min() < 0

    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(108, 2), nn.Linear(3, 3)

        def forward(self, x):
            return self.used(x.flatten(1))

    trained = given(Spare())
    assert [row["layer"] for row in EffectiveRank(images=10).rows(trained)] == ["used"]
    with pytest.raises(ValueError, match="the forward pass does not call spare"):
        activations(trained.model, trained.data.test, ["spare"])


def test_wrong_keys_are_named():
    for made, key in (
        (VarianceRatio, "images"),
        (VarianceRatio, "largest"),
        (EffectiveRank, "images"),
        (Cushion, "images"),
    ):
        with pytest.raises(ValueError, match=f"{key} must be in"):
            made(**{key: 0})
