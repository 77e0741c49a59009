"""Adversarial training: the attack on a batch, and what training with it keeps."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from condlr.adversarial import Adversarial
from condlr.analysis.cost import attack_flops, flops
from condlr.attacks.pgd import Pgd
from condlr.evaluation import evaluate
from condlr.methods.baseline import Baseline
from tests.training import METHODS, Stop, trainer

EPS = 0.1


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(n=6, classes=4):
    torch.manual_seed(3)
    return torch.rand(n, 1, 3, 3, dtype=torch.float64), torch.arange(n) % classes


@pytest.fixture
def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 4)).double()


@pytest.mark.parametrize("keys", [{}, {"steps": 3, "step_size": 0.7}, {"attack": "fgsm"}])
def test_the_attack_is_its_equation(net, keys):
    """Of a linear classifier, whose gradient is W^T (softmax - onehot), in numpy."""
    images, labels = batch()
    found = Adversarial(EPS, **keys)(net, images, labels, generator())
    W, b = (p.detach().numpy() for p in net.parameters())
    x0 = images.flatten(1).numpy()
    start = torch.empty_like(images).uniform_(-EPS, EPS, generator=generator()).flatten(1).numpy()
    x = np.clip(x0 + start, 0, 1)
    steps = keys.get("steps", 1 if keys.get("attack") == "fgsm" else 7)
    size = 1.25 if keys.get("attack") == "fgsm" else keys.get("step_size", 2.5 / steps)
    for _ in range(steps):
        z = x @ W.T + b
        p = np.exp(z - z.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        x = x + size * EPS * np.sign((p - np.eye(4)[labels]) @ W)
        x = np.clip(x0 + np.clip(x - x0, -EPS, EPS), 0, 1)
    np.testing.assert_allclose(found.flatten(1).numpy(), x, atol=1e-12)


def test_a_share_of_the_batch_is_attacked(net):
    images, labels = batch()
    found = Adversarial(EPS, share=0.5)(net, images, labels, generator())
    moved = (found != images).flatten(1).any(1)
    assert moved.tolist() == [True] * 3 + [False] * 3
    for keys in ({"share": 0.0}, {"eps": 0.0}):
        assert torch.equal(Adversarial(**({"eps": EPS} | keys))(net, images, labels, generator()), images)


def test_the_network_does_not_change():
    """No gradient of a weight, no running statistics, no dropout, each module in its own mode."""
    net = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Dropout(0.5), nn.Flatten(), nn.Linear(8, 4))
    net.double()[1].eval()
    images, labels = batch()
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    Adversarial(EPS)(net, images, labels, generator())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert net.training and not net[1].training and net[2].training
    assert torch.equal(torch.get_rng_state(), state)


def test_the_weights_gradients_are_not_counted():
    """Each step costs a forward pass and as much again, not twice as much."""
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(9, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 4)
    ).double()
    images, _ = batch()
    once = flops(lambda: net(images))
    for attack in (Adversarial(EPS), Adversarial(EPS, "fgsm"), Adversarial(EPS, share=0.5)):
        found = attack_flops(attack, net, (6, 1, 3, 3))
        assert found == 2 * once * attack.gradients * attack.share


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"eps": 8}, "of 255 levels that is 8/255"),
        ({"eps": 0.1, "attack": "cw"}, "attack must be one of pgd, fgsm"),
        ({"eps": 0.1, "steps": 0}, "steps must be"),
        ({"eps": 0.1, "share": 1.5}, "share must be"),
        ({"eps": 0.1, "attack": "fgsm", "steps": 3}, "choose attack=pgd"),
    ],
)
def test_bad_settings_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        Adversarial(**keys)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["condlr", "dlrt_adaptive", "cayley_sgd", "srn"])
def test_an_interrupted_training_ends_with_the_same_bits(name, data):
    keys = {"epochs": 2, "adversarial": {"eps": 0.1, "steps": 2}}
    whole = trainer(METHODS[name], data, **keys)
    whole.fit()
    first = trainer(METHODS[name], data, **keys)

    def stop(trainer):
        if trainer.step == 3:
            raise Stop

    with pytest.raises(Stop):
        first.fit(stop)
    state = copy.deepcopy(first.state_dict())
    second = trainer(METHODS[name], data, **keys)
    second.load_state_dict(state)
    second.fit()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


@pytest.mark.long
def test_it_makes_a_network_more_robust(data):
    attack, found = Pgd(eps=[EPS], steps=10), {}
    for adversarial in (None, {"eps": EPS, "steps": 3}):
        t = trainer(Baseline(), data, epochs=25, lr=0.1, lr_milestones=[], adversarial=adversarial)
        t.fit()
        (row,) = evaluate(t.model, data.train, attack)
        found[adversarial is None] = row["accuracy"]
    assert found[False] > found[True] + 0.1
