"""The networks of the tables, against plain PyTorch written in the order that papers draw them."""

import pytest
import torch
from torch import nn

from condlr.factorization import Scheme, measure
from condlr.models._vgg import STAGES, Vgg
from condlr.models.base import standardized
from condlr.models.lenet5 import LeNet5Options
from condlr.models.vgg16 import Vgg16
from condlr.models.vgg19 import Vgg19


def drawn(net, slope):
    """conv, norm, activation, ..., pooling, as a plain Sequential with the weights of `net`."""
    layers, number = [], 0
    for stage in ((4, 4), (6,), (8,), (8,), (8,)):
        for _ in stage:
            number += 1
            layers += [
                net.get_submodule(f"conv{number}"),
                net.get_submodule(f"norm{number}"),
                nn.LeakyReLU(slope),
            ]
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), net.fc1, nn.LeakyReLU(slope), net.fc2)


@pytest.mark.parametrize("slope", [0.01, 0.0])
@pytest.mark.parametrize("train", [True, False])
def test_vgg_computes_what_is_drawn(slope, train):
    net = Vgg(((4, 4), (6,), (8,), (8,), (8,)), 3, 5, slope, dropout=0.0).train(train)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.rand(3, 3, 32, 32)
    torch.testing.assert_close(net(x), drawn(net, slope)(x))


@pytest.mark.parametrize(
    ("options", "convolutions", "weights"),
    [(Vgg16, 13, 14_977_728), (Vgg19, 16, 14_977_728 + 9 * (256**2 + 2 * 512**2))],
)
def test_vgg_has_the_layers_of_its_name(options, convolutions, weights):
    net = options(batch_norm_momentum=0.9).build((3, 32, 32), 10)
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    linear = [m for m in net.modules() if isinstance(m, nn.Linear)]
    assert (len(convs), len(norms), len(linear)) == (convolutions, convolutions, 2)
    assert [tuple(m.weight.shape) for m in linear] == [(512, 512), (10, 512)]
    assert sum(map(len, STAGES[options.depth])) == convolutions
    assert measure(net).dense == weights
    assert all(norm.momentum == 0.9 for norm in norms)
    assert all(conv.bias is None for conv in convs)


def test_dropout_is_before_the_last_layer_alone():
    net = Vgg16(dropout=0.5).build((3, 32, 32), 10)
    seen = []
    net.get_submodule("fc2").register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = torch.rand(2, 3, 32, 32)
    net.train()(x)
    net.eval()(x)
    assert 0.3 < (seen[0] == 0).float().mean() < 0.7
    assert (seen[1] == 0).float().mean() < 0.05


def test_the_ranks_of_vgg16_are_the_published_ones():
    """reference: up to 220 and 90 by the paper's rule, 256 and 103 by the released code's."""
    net = Vgg16().build((3, 32, 32), 10)
    largest = {
        (rule, compression): max(Scheme(compression, rule, "dense").ranks(net).values())
        for rule in ("params", "released_code")
        for compression in (0.5, 0.8)
    }
    assert largest == {
        ("params", 0.5): 220, ("params", 0.8): 90, ("released_code", 0.5): 256, ("released_code", 0.8): 103,
    }  # fmt: skip


@pytest.mark.parametrize("options", [Vgg16(), LeNet5Options()])
def test_images_of_another_size_are_refused(options):
    with pytest.raises(ValueError, match=r"takes images of .*; these are 3 x 30 x 30"):
        options.build((3, 30, 30), 10)


def test_standardization_is_inside_the_network():
    net = nn.Flatten()
    x = torch.rand(4, 3, 2, 2)
    mean, deviation = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    expected = (x - torch.tensor(mean)[:, None, None]) / torch.tensor(deviation)[:, None, None]
    torch.testing.assert_close(standardized(net, (mean, deviation))(x), expected.flatten(1))
    assert standardized(net, None) is net
    assert {"standardize.mean", "standardize.deviation"} == standardized(
        net, (mean, deviation)
    ).state_dict().keys()
