"""Residual networks, beside torchvision's blocks and networks written out."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet as other

from condlr.factorization import Scheme, low_rank_layers
from condlr.models._resnet import Basic, Bottleneck, PreActivated
from condlr.models.resnet18 import ResNet18
from condlr.models.resnet34 import ResNet34
from condlr.models.resnet50 import ResNet50
from condlr.models.wide_resnet16 import WideResNet16
from tests.training import METHODS

NETWORKS = [ResNet18, ResNet34, ResNet50, WideResNet16]


def spread(net):
    """Values that no init has, so that nothing is by chance 0 or 1; batch norm's statistics included."""
    for value in net.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.1)
    return net


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(("channels", "stride"), [(16, 1), (16, 2), (20, 1), (64, 1)])
@pytest.mark.parametrize(("ours", "theirs"), [(Basic, other.BasicBlock), (Bottleneck, other.Bottleneck)])
def test_blocks_are_those_of_torchvision(ours, theirs, channels, stride, train):
    mine = spread(ours(channels, 16, stride, 0.1)).train(train)
    shortcut = mine.shortcut and nn.Sequential(mine.shortcut, mine.shortcut_norm)
    block = theirs(channels, 16, stride, shortcut).train(train)
    for number in range(1, 4):
        if hasattr(mine, f"conv{number}"):
            setattr(block, f"conv{number}", getattr(mine, f"conv{number}"))
            setattr(block, f"bn{number}", getattr(mine, f"norm{number}"))
    x = torch.randn(2, channels, 8, 8)
    torch.testing.assert_close(mine(x), block(x))


@pytest.mark.parametrize(("channels", "stride"), [(16, 1), (16, 2), (20, 1)])
def test_a_pre_activated_block_written_out(channels, stride):
    block = spread(PreActivated(channels, 16, stride, 0.1)).eval()
    x = torch.randn(2, channels, 8, 8)
    a = F.relu(block.norm1(x))
    z = F.relu(block.norm2(F.conv2d(a, block.conv1.weight, stride=stride, padding=1)))
    kept = x if (channels, stride) == (16, 1) else F.conv2d(a, block.shortcut.weight, stride=stride)
    torch.testing.assert_close(block(x), F.conv2d(z, block.conv2.weight, padding=1) + kept)


@pytest.mark.parametrize(
    ("network", "parameters", "convolutions"),
    [(ResNet18, 11_173_962, 20), (ResNet34, 21_282_122, 36), (ResNet50, 23_520_842, 53),
     (WideResNet16, 2_748_890, 16)],
)  # fmt: skip
def test_the_networks_of_the_papers(network, parameters, convolutions):
    with torch.device("meta"):
        net = network().build((3, 32, 32), 10)
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert sum(isinstance(module, nn.Conv2d) for module in net.modules()) == convolutions


def test_strides_and_widths():
    net, seen = ResNet18(width=16).build((1, 32, 32), 7), {}
    for name, module in net.named_children():
        module.register_forward_hook(lambda _, __, out, name=name: seen.update({name: tuple(out.shape[1:])}))
    assert net(torch.rand(2, 1, 32, 32)).shape == (2, 7)
    assert [seen[f"stage{i}"] for i in (1, 2, 3, 4)] == [(16, 32, 32), (32, 16, 16), (64, 8, 8), (128, 4, 4)]
    assert seen["conv1"] == (16, 32, 32)
    net = WideResNet16(width=1).build((3, 32, 32), 10)
    assert [net.get_submodule(f"stage{i}.1.conv2").out_channels for i in (1, 2, 3)] == [16, 32, 64]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("keys", [{"width": 0}, {"batch_norm_momentum": 2.0}])
def test_wrong_options_are_named(network, keys):
    with pytest.raises(ValueError, match=f"{next(iter(keys))} must be in"):
        network(**keys)


@pytest.mark.long
@pytest.mark.parametrize("network", [ResNet18(width=16), ResNet50(width=16), WideResNet16(width=1)])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_a_step(network, name):
    method = METHODS[name]
    model = method.apply(
        network.build((3, 8, 8), 4), Scheme(0.5 if method.compresses else None, classifier="dense")
    )
    if method.compresses:
        assert "stage1.0.conv1" in low_rank_layers(model) or name == "snip", "which prunes dense layers"
    optimizer = method.optimizer(model, 0.01, 0.3)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        loss, logits = method.step(model, optimizer, torch.rand(8, 3, 8, 8), torch.arange(8) % 4)
        assert loss.isfinite() and logits.shape == (8, 4)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    method.audit(model)
