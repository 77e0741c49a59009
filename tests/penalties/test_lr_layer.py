"""The LR-layer as a penalty: on every network and method, resumed, gone at the end."""

import csv
import math

import pytest
import torch
from torch import nn

from condlr._support.errors import Diverged
from condlr.analysis.cost import flops, penalty_flops
from condlr.factorization import Scheme
from condlr.models._resnet import Basic, ResNet
from condlr.models.base import standardized
from condlr.models.lenet5 import LeNet5
from condlr.penalties.lr_layer import LrLayer
from condlr.suite.engine import Trainer
from tests.helpers import SMALL, complains
from tests.training import METHODS, Noisy, Stop, protocol

LAYERS = {"layers": ["conv2", "fc2.input"], "ranks": [6, 3], "weight": 1e-3}


def trainer(method, data, **keys):
    torch.manual_seed(5)
    scheme = Scheme(0.5 if METHODS[method].compresses else None, classifier="dense")
    model = METHODS[method].apply(Noisy(), scheme)
    return Trainer(model, METHODS[method], data, protocol(epochs=3), seed=0, penalty=LrLayer(**LAYERS | keys))


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_it_combines_with_every_method(method, data):
    run = trainer(method, data)
    run.fit()
    first, *values = [row["penalty_value"] for row in run.history]
    assert first is None, "no batch was seen yet"
    assert all(map(math.isfinite, values))
    before = values[-2 if method == "adaptive" else 0]  # new directions come at full strength, in its epoch 2
    assert values[-1] < before or method.startswith(("cayley", "projected", "spel", "srn")), (
        "whose weights keep their norm"
    )
    assert not any("low_rank" in key for key in run.model.state_dict())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in run.model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("subspace", ["svd", "nystrom", "pca"])
@pytest.mark.parametrize("method", ["baseline", "condlr"])
def test_an_interrupted_training_goes_on_with_the_same_bits(method, subspace, data):
    whole, first, second = (trainer(method, data, subspace=subspace, every=2) for _ in range(3))
    whole.fit()

    def stop(t):
        if t.step == 5:
            raise Stop

    with pytest.raises(Stop):
        first.fit(on_batch=stop)
    second.load_state_dict(first.state_dict())
    second.fit()
    for key, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[key]), key
    keys = ("penalty_value", "train_loss")
    assert [[row[key] for key in keys] for row in whole.history] == [
        [row[key] for key in keys] for row in second.history
    ]


def test_steps_without_the_term_are_in_nobodys_way(data):
    """A method whose ranks change, and activations that nobody asked for."""
    run = trainer("robust_dlrt", data, every=3)
    run.fit()
    assert all(math.isfinite(row["train_loss"]) for row in run.history[1:])


@pytest.mark.slow
def test_the_subspace_follows_the_learning_rate(data):
    run = trainer("baseline", data)
    run.protocol.lr_milestones, run.protocol.lr_factor = [1], 0.5
    seen = []
    run.fit(on_batch=lambda t: seen.append((t.epoch, t.penalty._extra.lr)))
    lr = run.protocol.lr
    assert {*seen} == {(0, lr), (1, lr / 2), (2, lr / 2)}


def test_names_are_ends_of_names():
    net = standardized(ResNet(Basic, (1, 1), (16, 16, 32)), ((0.5,) * 3, (0.2,) * 3))
    penalty = LrLayer(layers=["stage1", "fc.input"], ranks=[4, 5])
    penalty.attach(net)
    net(torch.rand(6, 3, 8, 8))
    assert penalty(net) > 0
    shapes = [tuple(layer.W.shape) for layer in penalty._extra.layers]
    assert shapes == [(1024, 1024), (32, 32)]
    penalty.detach(net)
    for layers, message in (
        (["conv1"], "'conv1' names several of network.conv1, network.stage1.0.conv1, network.stage2.0.conv1"),
        (["head.input"], "'head' names none of standardize, network"),
        (["fc", "network.fc"], "names an activation twice"),
    ):
        with pytest.raises(ValueError, match=message):
            LrLayer(layers=layers, ranks=[2] * len(layers)).attach(net)


def test_the_sum_or_the_mean_over_activations():
    values = []
    for over in ("sum", "mean"):
        torch.manual_seed(0)
        net, penalty = LeNet5(), LrLayer(**LAYERS | {"over_layers": over, "weight": 0.5})
        penalty.attach(net)
        net(torch.rand(4, 1, 28, 28))
        values.append((penalty(net).item(), penalty.measured(net)))
    (total, told), (mean, told_mean) = values
    assert mean == pytest.approx(total / 2) and told_mean == pytest.approx(told / 2)
    assert total == pytest.approx(0.5 * told)


def test_what_it_costs_without_the_networks_pass():
    """Of m = 8 dimensions and n = 5 images: A W, its gradient, and the gradients of W and b."""
    net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2))
    counted = penalty_flops(LrLayer(layers=["0"], ranks=[2]), net, (5, 6))
    assert counted == 4 * 2 * 5 * 8 * 8
    forward = flops(lambda: net(torch.rand(5, 6)))
    assert forward > 0 and net.training
    assert not net[0]._forward_hooks, "a copy was counted"


def test_a_training_that_diverges_is_told_as_such(data):
    with pytest.raises(Diverged):
        trainer("baseline", data, weight=1e3).fit()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"ranks": [1, 2]}, "ranks must be as many as layers"), ({"ranks": [0]}, "ranks must be in"),
        ({"norm": -1}, "norm must be in"), ({"subspace": "ica"}, "subspace must be one of"),
        ({"momentum": 1}, "momentum must be in"), ({"acts_on": "weight"}, "acts_on must be"),
    ],
)  # fmt: skip
def test_wrong_keys_are_named(keys, message):
    with pytest.raises(ValueError, match=message):
        LrLayer(**keys)


def test_without_attaching_it_says_so():
    with pytest.raises(RuntimeError, match="attach the penalty"):
        LrLayer()(LeNet5())


@pytest.mark.long
def test_the_whole_way(script, tmp_path):
    row = [
        "method=condlr",
        "penalty=lr_layer",
        "penalty.layers=[conv2,fc2.input]",
        "penalty.ranks=[20,10]",
        "penalty.weight=1e-3",
    ]
    complains(script("train", *SMALL, *row[:2]), r"penalty.layers: 'fc' names none of .*conv1.*fc2")
    complains(script("train", *SMALL, *row[:3]), r"penalty.ranks must be as many as layers")
    assert script("train", *SMALL, *row, "protocol.epochs=2")[0] == 0
    (run,) = (tmp_path / "runs" / "default").glob("*weight_0.001*")
    with (run / "history.csv").open() as file:
        values = [row["penalty_value"] for row in csv.DictReader(file)]
    assert values[0] == "" and float(values[2]) < float(values[1])
    asked = "analysis=[conditioning,cost,variance_ratio,effective_rank,cushion,embeddings,stability]"
    small = [
        "analysis.stability.steps=2",
        "analysis.stability.images=50",
        "analysis.embeddings.dimensions=[2]",
    ]
    status, out, err = script(
        "evaluate", f"run={run}", asked, *small, "analysis.variance_ratio.layers=[conv2]"
    )
    assert status == 0, out + err
    for name in ("collect", "tables", "figures", "report"):
        status, out, err = script(name, "study=default")
        assert status == 0, out + err
    drawn = {path.stem for path in (tmp_path / "results" / "default").glob("*.png")}
    assert {"variance_ratio", "embeddings", "stability"} <= drawn
    assert "CondLR τ=0.1 + LR" in (tmp_path / "results" / "default" / "report.md").read_text("utf-8")
