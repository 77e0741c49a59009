"""Operations against the closed forms, written out here a second time; memory against sums by hand."""

import copy
import csv
from math import prod

import pytest
import torch
from torch import nn

import condlr
from condlr._support.files import read_csv
from condlr.analysis.cost import Cost, LiveBytes, cost, flops, penalty_flops
from condlr.forms import forms
from condlr.methods.base import Method
from condlr.models.lenet5 import LeNet5
from condlr.penalties.so import So
from condlr.penalties.srip import Srip
from tests import helpers

RANKS = {"conv1": 5, "conv2": 21, "fc1": 138}
# n, m and positions of the output
LENET5 = {
    "conv1": (20, 25, 24 * 24), "conv2": (50, 500, 8 * 8), "fc1": (500, 800, 1), "fc2": (10, 500, 1),
}  # fmt: skip
BATCH = 8


def training_flops(layers, ranks, form, batch, core="full"):
    """Of a step: three times the forward pass, less the gradient of the images."""
    total = 0
    for place, (name, (n, m, p)) in enumerate(layers.items()):
        r = ranks.get(name)
        if r is None:
            products, images, first = 0, 2 * n * m * p, 2 * n * m * p
        elif form == "factored":
            products, images, first = 2 * r * r * n, 2 * r * (n + m) * p, 2 * r * m * p
        elif form == "chained":
            products, images, first = 0, 2 * r * (n + m + r) * p, 2 * r * m * p
        else:
            products, images, first = 2 * n * r * r + 2 * n * m * r, 2 * n * m * p, 2 * n * m * p
        if r is not None and core != "full":
            products -= 2 * r * r * n
        total += 3 * (products + batch * images) - (batch * first if place == 0 else 0)
    return total


def forward_flops(layers, ranks):
    """Of one image, in the exported network."""
    return sum(
        2 * p * (n * m if name not in ranks else min(n * m, ranks[name] * (n + m)))
        for name, (n, m, p) in layers.items()
    )


def network(dense, ranks, form="factored", core="full"):
    if not ranks:
        return dense
    model = condlr.factorize(dense, ranks=ranks, core=core)
    condlr.set_forms(model, form)
    return model


def small_net():
    """8 x 7 x 6 images; convolutions with a stride, a padding, a dilation."""
    return nn.Sequential(
        nn.Conv2d(8, 6, (3, 2), stride=(2, 1), padding=1),  # 4 x 7
        nn.ReLU(),
        nn.Conv2d(6, 5, 2, dilation=2, padding="same", padding_mode="reflect"),
        nn.Flatten(),
        nn.Linear(5 * 4 * 7, 9),
    )


SMALL = {"0": (6, 48, 4 * 7), "2": (5, 24, 4 * 7), "4": (9, 140, 1)}
LINEAR = {"1": (30, 12, 1), "3": (7, 30, 1)}
CASES = {
    "linear": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 30), nn.ReLU(), nn.Linear(30, 7)), (3, 4),
               LINEAR, {"1": 4, "3": 3}),
    "convolutions": (small_net, (8, 7, 6), SMALL, {"0": 3, "2": 2, "4": 4}),
    "lenet5": (LeNet5, (1, 28, 28), LENET5, RANKS),
}  # fmt: skip


@pytest.mark.parametrize("form", ["dense", "factored", "chained", "multiplied"])
@pytest.mark.parametrize("case", CASES)
def test_operations_have_a_closed_form(case, form):
    make, shape, layers, ranks = CASES[case]
    ranks = {} if form == "dense" else ranks
    counted = cost(network(make(), ranks, form), shape, BATCH)
    assert counted.train_flops * BATCH == training_flops(layers, ranks, form, BATCH)
    assert counted.deploy_flops == forward_flops(layers, ranks)


@pytest.mark.parametrize("core", ["none", "diagonal"])
def test_a_core_that_is_no_matrix_saves_a_product(core):
    for form in ("factored", "multiplied"):
        counted = cost(network(LeNet5(), RANKS, form, core), (1, 28, 28), BATCH)
        assert counted.train_flops * BATCH == training_flops(LENET5, RANKS, form, BATCH, core)


def test_a_layer_of_high_rank_is_deployed_dense():
    """15 (20 + 25) > 20 x 25, so `export` multiplies it out; 21 (50 + 500) < 50 x 500."""
    ranks = RANKS | {"conv1": 15}
    model = network(LeNet5(), ranks)
    counted = cost(model, (1, 28, 28), 2)
    assert counted.deploy_weights == 500 + 21 * 550 + 138 * 1300 + 5000
    assert counted.deploy_weights == condlr.measure(condlr.export(model)).trained
    assert counted.deploy_flops == forward_flops(LENET5, ranks) == 4_586_000 - 2 * (13_450 * 64 + 220_600)


def test_lenet5():
    """The numbers that a reader can check against others' tables."""
    dense = cost(LeNet5(), (1, 28, 28), 2)
    small = cost(network(LeNet5(), RANKS), (1, 28, 28), 2)
    assert (dense.train_weights, dense.train_parameters) == (430_500, 431_080)
    assert (dense.deploy_weights, dense.deploy_parameters) == (430_500, 431_080)
    assert (dense.train_flops, dense.deploy_flops) == (13_182_000, 4_586_000)
    cores = 5**2 + 21**2 + 138**2
    assert small.train_weights == small.deploy_weights + cores == 225 + 11_550 + 179_400 + 5000 + cores
    assert small.train_parameters - small.train_weights == 580 == dense.deploy_parameters - 430_500
    ratios = small.as_dict(dense)
    assert ratios["train_weights_ratio"] == pytest.approx(0.5, abs=0.01)
    assert ratios["deploy_flops_ratio"] == small.deploy_flops / 4_586_000
    assert set(ratios) - set(small.as_dict()) == {
        f"{name}_ratio" for name in small.as_dict() if name != "batch_size"
    }
    with pytest.raises(ValueError, match="batch_size is 2 here and 3 for dense"):
        small.as_dict(cost(LeNet5(), (1, 28, 28), 3))


def test_it_is_a_line_of_a_csv(tmp_path):
    line = cost(nn.Linear(6, 3), (6,), 4).as_dict()
    with (tmp_path / "cost.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, line.keys())
        writer.writeheader()
        writer.writerow(line)
    (row,) = csv.DictReader((tmp_path / "cost.csv").open())
    assert {name: float(value) for name, value in row.items()} == line


def optimizers(kind, **options):
    return lambda model: kind(model.parameters(), lr=0.1, **options)


@pytest.mark.parametrize(
    ("make", "copies", "more"),
    [
        (optimizers(torch.optim.SGD), 2, 0),
        (optimizers(torch.optim.SGD, momentum=0.5), 3, 0),
        (optimizers(torch.optim.Adam), 4, 2 * 4),  # and the number of steps, for weight and bias
    ],
)
def test_state_of_a_linear_layer(make, copies, more):
    """Parameters, gradients, and none, one or two values of the optimiser for each."""
    assert cost(nn.Linear(100, 10), (100,), 4, make).train_state_bytes == 4 * copies * 1010 + more


def test_peak_of_training_a_linear_layer():
    """When the gradient of W is made: that of the logits is still there, activations are no longer."""
    n, m, batch = 10, 1000, 16
    counted = cost(nn.Linear(m, n, bias=False), (m,), batch)
    images, labels, logits, scalar = 4 * batch * m, 8 * batch, 4 * batch * n, 4
    before = 2 * 4 * n * m + images + labels  # weights and momenta
    made = 4 * n * m + logits
    assert before + made <= counted.train_peak_bytes <= before + made + 4 * scalar


def test_peak_of_activations():
    """A chain of wide activations on one weight each: all are kept for the backward pass."""
    net = nn.Sequential(*[nn.Conv2d(1, 1, 1, bias=False) for _ in range(5)], nn.Flatten(), nn.Linear(400, 2))
    counted = cost(net, (1, 20, 20), 32)
    image = 4 * 32 * 400
    small = 16 * (5 + 802) + 4 * 32 * 2 * 4
    # the images, the five outputs, and the gradient of the last one
    assert 7 * image <= counted.train_peak_bytes <= 7 * image + small


def test_peak_of_inference():
    """Only two neighbouring activations live at one time, and the images, which the caller holds."""
    net = nn.Sequential(nn.Linear(10, 300), nn.Linear(300, 200), nn.Linear(200, 5))
    weights = sum(parameter.numel() for parameter in net.parameters())
    assert cost(net, (10,), 64).deploy_peak_bytes == 4 * (weights + 64 * (10 + 300 + 200))
    pair = condlr.factorize(nn.Linear(200, 100, bias=False), ranks={"": 7})
    assert cost(pair, (200,), 64).deploy_peak_bytes == 4 * (7 * 300 + 64 * (200 + 7 + 100))


def test_a_step_of_the_optimiser_counts():
    """Its temporaries too: here five times what is trained, after the gradients were made."""

    def make(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        weight = model[1].weight
        optimizer.register_step_post_hook(lambda *_: weight.detach().repeat(5, 1).sum())
        return optimizer

    counted = cost(nn.Sequential(nn.Flatten(), nn.Linear(1000, 4, bias=False)), (1000,), 2, make)
    held = 4 * 4000 + 4 * 2 * 1000 + 8 * 2
    assert counted.train_peak_bytes == held + 6 * 4 * 4000 + 4


def test_a_constraint_can_be_counted():
    def make(model):
        optimizer = Method().optimizer(model, lr=0.1, momentum=0.3)
        condlr.constrain(optimizer, model, tau=0.1)
        return optimizer

    model = network(LeNet5(), RANKS)
    free, constrained = (cost(model, (1, 28, 28), 1, *more) for more in ((), (make,)))
    assert constrained.train_flops == free.train_flops
    assert constrained.train_peak_bytes > free.train_peak_bytes


def test_live_bytes():
    held = torch.zeros(1000)
    with LiveBytes() as live:
        held.mul_(2)
        held.view(10, 100).T.add_(1)
        assert live.peak == 0  # views, and what is changed in place, are not made
        first = held + 1
        second = first.reshape(10, 100) + 1
        assert live.level == 8000
        del first
        third = second[0] + 1
        del second
        assert (live.level, live.peak) == (4 * 100, 8000)
    assert third.numel() == 100


def test_nothing_is_touched():
    """Neither weights, gradients, flags, buffers and modes, nor the random state."""
    body = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.5), nn.Flatten()
    model = condlr.factorize(
        nn.Sequential(*body, nn.Linear(96, 20), nn.Linear(20, 4)), ranks={"0": 3, "4": 5}
    )
    model(torch.rand(3, 2, 6, 6)).sum().backward()
    model.eval()
    model[2].train()
    condlr.set_forms(model, {"4": "multiplied"})
    model[5].bias.requires_grad_(False)
    model[5].weight.grad = None

    def values():
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return copy.deepcopy((model.state_dict(), gradients, torch.get_rng_state()))

    def places():
        facts = [(p, p.grad, p.data_ptr(), p.stride(), p.requires_grad) for p in model.parameters()]
        identities = [tuple(map(id, fact[:2])) + fact[2:] for fact in facts]
        return identities, [module.training for module in model.modules()], forms(model)

    before, there = values(), places()
    with torch.no_grad():
        cost(model, (2, 6, 6), 5)
    torch.testing.assert_close(values(), before, rtol=0, atol=0)
    assert places() == there


def test_frozen_weights_cost_no_gradient():
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 10))
    model[0].requires_grad_(False)
    counted = cost(model, (30,), 4)
    assert counted.train_flops == 2 * 600 + 2 * 2 * 200
    assert counted.train_state_bytes == 4 * (620 + 3 * 210)
    with pytest.raises(ValueError, match="no trainable parameter"):
        cost(model.requires_grad_(False), (30,), 4)


def test_flops_of_any_work():
    A = torch.zeros(3, 4)
    assert flops(lambda: A.T @ A) == 2 * prod((4, 4, 3))


def test_a_penalty_counts_as_often_as_it_is_computed():
    """SO of a 4 x 6 matrix: W W^T, and a product for each factor's gradient; with its random state kept."""
    layer, state = nn.Linear(6, 4), torch.get_rng_state()
    assert penalty_flops(So(every=5), layer, (1, 4)) == 3 * 2 * 4 * 4 * 6 / 5
    penalty_flops(Srip(), layer, (1, 4))
    assert torch.equal(torch.get_rng_state(), state) and layer.weight.grad is None


@pytest.mark.slow
def test_the_cost_of_a_penalised_run(script, tmp_path):
    for penalty in ("none", "so"):
        assert script("train", *helpers.SMALL, "method=baseline", f"penalty={penalty}")[0] == 0
    status, _, err = script("evaluate", "run='runs/default/*'", "analysis=cost")
    assert status == 0, err
    plain, so = (
        float(read_csv(path / "cost.csv")[0]["train_flops"])
        for path in sorted((tmp_path / "runs" / "default").iterdir(), key=lambda path: "so" in path.name)
        if path.is_dir()
    )
    grams = sum(min(n, m) ** 2 * max(n, m) for n, m, _ in LENET5.values())
    assert so - plain == pytest.approx(6 * grams / 128, rel=1e-6)


@pytest.mark.gpu
def test_cuda_counts_the_same():
    model = network(LeNet5(), RANKS)
    here, there = cost(model, (1, 28, 28), BATCH), cost(model.cuda(), (1, 28, 28), BATCH)
    assert isinstance(there, Cost)
    for name, value in here.as_dict().items():
        if name.endswith("peak_bytes"):  # rounded up, and with what kernels take for themselves
            assert getattr(there, name) >= 0.9 * value
        else:
            assert getattr(there, name) == value
