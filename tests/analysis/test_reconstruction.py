"""Images that come back from what the first layers make of them."""

import base64

import numpy as np
import pytest
import torch
from torch import nn

from condlr.analysis.reconstruction import Reconstruction, inverted, invertible
from condlr.factorization import factorize
from condlr.manifolds.convolution import _matrix, convolution
from condlr.models._resnet import Basic, PreActivated, ResNet
from condlr.models.base import standardized
from condlr.models.lenet5 import LeNet5
from tests.analysis.test_recovery import given


def normalised(channels):
    norm = nn.BatchNorm2d(channels)
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    return norm


def rows_of(model, **keys):
    return [*Reconstruction(**keys).rows(given(model.eval()))]


def test_layers_that_lose_nothing_give_the_images_back():
    layers = [
        nn.Conv2d(3, 8, 3, padding=1), normalised(8), nn.LeakyReLU(0.1), nn.Dropout(),
        nn.Conv2d(8, 12, 3, padding=1), nn.Identity(), normalised(12), nn.Conv2d(12, 16, 1),
    ]  # fmt: skip
    model = standardized(nn.Sequential(*layers), ((0.4, 0.5, 0.6), (0.2, 0.3, 0.25)))
    rows = rows_of(model, images=3, layers=5, iterations=3000)
    assert [*dict.fromkeys(row["layer"] for row in rows)] == ["input", "0", "4", "7"]
    assert max(row["error"] for row in rows) < 1e-6
    assert all(row["shape"] == "3x6x6" for row in rows)
    pixels = given(nn.Identity()).data.test.pixels
    by_image = {row["image"]: row["pixels"] for row in rows if row["layer"] == "7"}
    for image, row in by_image.items():
        own = next(r["pixels"] for r in rows if r["layer"] == "input" and r["image"] == image)
        assert row == own, "to the last of 255 levels"
    assert len(np.frombuffer(base64.b64decode(own), np.uint8)) == pixels[0].numel()


def test_what_relu_cuts_off_is_unknown():
    """The first convolution is solved from its outputs above 0, by the pseudo-inverse of these rows."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Conv2d(5, 9, 3, padding=1)).double()
    x = torch.rand(1, 2, 5, 5, dtype=torch.float64)
    inputs, z = [], x
    with torch.no_grad():
        for layer in model:
            inputs.append(z)
            z = layer(z)
        found = inverted(invertible(model), inputs, z, 5000)
    operator = convolution(model[0].weight.detach(), 5, 1, 0, 1)
    W = _matrix(operator.apply, operator.domain, operator.kernel).mT
    y = (inputs[1] - model[0].bias.detach()[:, None, None]).flatten()
    above = inputs[1].flatten() > 0
    assert 0.2 < above.double().mean() < 0.8
    wanted = torch.linalg.pinv(W[above]) @ y[above]
    torch.testing.assert_close(found.flatten(), wanted, rtol=1e-5, atol=1e-5)


def test_a_channel_that_normalisation_wipes_out_is_unknown():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), normalised(6))
    with torch.no_grad():
        model[1].weight[:3] = 0
    way = invertible(model.double().eval())
    x = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        between = model[0](x)
        found = inverted(way, [x, between], model[1](between), 500)
    torch.testing.assert_close(found, x, rtol=1e-6, atol=1e-6)


def test_a_layer_of_low_rank_loses_its_null_space():
    model = factorize(nn.Sequential(nn.Conv2d(3, 8, 1)), ranks={"0": 2})
    errors = [row["error"] for row in rows_of(model, images=2, iterations=500) if row["layer"] == "0"]
    assert min(errors) > 0.01


def test_the_way_back_ends_where_branches_meet():
    names = [op.name for op in invertible(ResNet(Basic, (2,), (16, 16)))]
    assert names[-1] == "stage1.0.norm2" and names.count("stage1.0.conv2") == 1
    assert [op.name for op in invertible(ResNet(PreActivated, (2,), (16, 16)))][-1] == "stage1.0.conv2"
    assert [op.kind for op in invertible(LeNet5())] == ["conv"], "max pooling is not inverted"
    assert invertible(nn.Sequential(nn.Flatten(), nn.Linear(4, 4))) == []
    assert invertible(nn.LSTM(2, 2)) == []


def test_what_cannot_be_reconstructed_is_said():
    with pytest.raises(ValueError, match="does not begin with a convolution"):
        Reconstruction().require(given(nn.Sequential(nn.Flatten(), nn.Linear(108, 2))))
    with pytest.raises(ValueError, match="images=9, but there are only 5"):
        Reconstruction(images=9).require(given(nn.Sequential(nn.Conv2d(3, 3, 1))))
    for key in ("images", "layers", "iterations"):
        with pytest.raises(ValueError, match=f"{key} must be in"):
            Reconstruction(**{key: 0})
