"""FGSM and the counting around it."""

import pytest
import torch
from torch import nn

from condlr.attacks.autoattack import AutoAttack
from condlr.attacks.fgsm import Fgsm
from condlr.attacks.pgd import Pgd
from condlr.attacks.simba import Simba
from condlr.data.base import Images
from condlr.evaluation import accuracy, evaluate


@pytest.fixture
def linear():
    """A linear classifier, whose gradient is known in closed form."""
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double()


def images(n, dtype=torch.uint8):
    return Images(torch.randint(0, 256, (n, 1, 3, 4), dtype=dtype), torch.randint(0, 3, (n,)))


def test_fgsm_is_its_formula(linear):
    x, y = torch.rand(7, 1, 3, 4, dtype=torch.float64), torch.randint(0, 3, (7,))
    W = linear[1].weight.detach()
    error = linear(x).softmax(1).detach() - nn.functional.one_hot(y, 3)  # d loss / d logits
    gradient = (error @ W).view_as(x)
    for made in Fgsm([0, 0.1, 0.7]).perturb(linear, x, y):
        torch.testing.assert_close(made.images, (x + made.eps * gradient.sign()).clamp(0, 1))
        assert not made.without_gradient.any()
    for norm in ("l2", "l2_relative"):
        (made,) = Fgsm([0.1], norm=norm, clamp=False).perturb(linear, x, y)
        sizes = x.flatten(1).norm(dim=1) if norm == "l2_relative" else torch.ones(7)
        length = 0.1 * sizes.view(-1, 1, 1, 1)
        direction = gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        torch.testing.assert_close(made.images, x + length * direction)
        assert made.label == "fgm-unclamped"


def test_without_a_clamp_images_leave_the_range(linear):
    """As in the authors' code for CIFAR-10: x + eps sign(g), which is their step on standardised images."""
    x, y = torch.rand(7, 1, 3, 4, dtype=torch.float64), torch.randint(0, 3, (7,))
    attack = Fgsm([0.5], clamp=False)
    (free,), (clamped,) = ([m.images for m in a.perturb(linear, x, y)] for a in (attack, Fgsm([0.5])))
    assert free.min() < 0 < 1 < free.max()
    torch.testing.assert_close(free.clamp(0, 1), clamped)
    torch.testing.assert_close((free - x).abs(), torch.full_like(x, 0.5))
    assert (attack.label(), Fgsm([0.5]).label()) == ("fgsm-unclamped", "fgsm")


def test_a_source_is_named_by_its_study_and_run(tmp_path, monkeypatch):
    sources = {Fgsm([0.5], source=f"x/study/{run}").label() for run in ("run", "run/", "run/.", "a/../run")}
    assert sources == {"transfer-fgsm-source=study/run"}
    run = tmp_path / "study" / "run"
    run.mkdir(parents=True)
    monkeypatch.chdir(run)
    assert {Fgsm([0.5], source=name).label() for name in (".", "../run")} == sources


def test_eps_zero_is_no_attack_and_the_result_is_in_range(linear):
    x, y = torch.rand(5, 1, 3, 4, dtype=torch.float64), torch.zeros(5, dtype=torch.long)
    for made in Fgsm([0, 1.0]).perturb(linear, x, y):
        assert made.images.min() >= 0
        assert made.images.max() <= 1
        assert (made.images - x).abs().max() <= made.eps
        if made.eps == 0:
            assert torch.equal(made.images, x)


def test_one_backward_pass_serves_every_eps(linear):
    calls = []
    linear.register_full_backward_hook(lambda *a: calls.append(1))
    list(Fgsm([0.1, 0.2, 0.3, 0.4]).perturb(linear, torch.rand(2, 1, 3, 4).double(), torch.tensor([0, 1])))
    assert len(calls) == 1


def test_images_without_a_gradient_are_counted(linear):
    """A confident model gives exactly zero gradients in float32: that must show."""
    model = linear.float()
    with torch.no_grad():
        model[1].weight.mul_(1e4)
    data = images(40)
    rows = evaluate(model, data, Fgsm([0.05]))
    x = data.pixels.float() / 255
    x.requires_grad_()
    nn.functional.cross_entropy(model(x), data.labels, reduction="sum").backward()
    assert x.grad is not None
    expected = (x.grad == 0).flatten(1).all(1).float().mean().item()
    assert 0 < rows[0]["zero_gradient"] == pytest.approx(expected)


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_accuracy_has_the_true_denominator(linear, batch_size):
    model, data = linear.float(), images(50)
    x = data.pixels.float() / 255
    expected = (model(x).argmax(1) == data.labels).float().mean().item()
    (row,) = evaluate(model, data, Fgsm([0]), batch_size)
    assert row["accuracy"] == pytest.approx(expected)
    assert row["n"] == 50
    assert accuracy(model, data, batch_size) == pytest.approx(expected)


def test_evaluation_is_in_eval_mode_and_restores_everything():
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Dropout(0.5), nn.Linear(12, 3))
    model[3].bias.requires_grad_(False)
    model[1].eval()  # as a user freezes its statistics
    state = {name: t.clone() for name, t in model.state_dict().items()}
    evaluate(model, images(20), Fgsm([0.1]))
    assert [module.training for module in model] == [True, False, True, True]
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, False]
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_only_float32_is_measured_whatever_surrounds_it():
    """TF32 and bfloat16 have no room for a small eps."""
    seen = []

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(12, 3)

        def forward(self, x):
            kinds = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.matmul
            logits = self.linear(x.flatten(1))
            seen.append((logits.dtype, *(kind.fp32_precision for kind in kinds)))
            return logits

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        precision = torch.backends.mkldnn.matmul.fp32_precision
        with torch.autocast("cpu", dtype=torch.bfloat16):
            evaluate(Spy(), images(5), Fgsm([0, 0.1]))
        assert torch.backends.mkldnn.matmul.fp32_precision == precision
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(seen) == {(torch.float32, "ieee", "ieee", "ieee")}


def test_stronger_attacks_leave_less_accuracy_on_a_linear_model(linear):
    model, data = linear.float(), images(300)
    data = Images(data.pixels, model(data.pixels.float() / 255).argmax(1))
    values = [row["accuracy"] for row in evaluate(model, data, Fgsm([0, 0.05, 0.1, 0.2, 0.5]))]
    assert values[0] == 1.0
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.5


@pytest.mark.parametrize("eps", [[], [-0.1], [1.5], [float("nan")]])
def test_bad_strengths_are_refused(eps):
    with pytest.raises(ValueError, match="eps"):
        Fgsm(eps)


def test_logits_that_are_not_finite_are_wrong_with_and_without_an_attack():
    class Nan(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :5] * torch.nan

    zeros = Images(images(40).pixels, torch.zeros(40, dtype=torch.long))
    assert accuracy(Nan(), zeros) == evaluate(Nan(), zeros, Fgsm([0]))[0]["accuracy"] == 0


def test_no_image_is_no_mistake(linear):
    none = torch.empty(0, 1, 3, 4, dtype=torch.float64)
    for norm in ("linf", "l2"):
        (made,) = Pgd([0.1], norm=norm, steps=2).perturb(linear, none, torch.empty(0, dtype=torch.long))
        assert made.images.shape == none.shape


def test_simba_says_which_images_it_takes(linear):
    with pytest.raises(ValueError, match=r"\(n, channels, height, width\); these are \(7, 12\)"):
        next(Simba([0.1]).perturb(linear, torch.rand(7, 12), torch.zeros(7, dtype=torch.long)))


def test_autoattack_leaves_no_gradient_on_the_weights():
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 5))
    x, y = torch.rand(6, 1, 4, 4), torch.arange(6) % 5
    next(AutoAttack([0.1]).perturb(net, x, y))
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
