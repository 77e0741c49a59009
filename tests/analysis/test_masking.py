"""The audit: it passes a network that hides nothing, and names what hides in those that do."""

import copy

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from condlr.analysis.sceptic.masking import CHECKS, Audit
from condlr.analysis.sceptic.planting import active_test
from condlr.attacks.fgsm import Fgsm
from condlr.data.base import Images
from condlr.evaluation import evaluate, evaluating

EPS = 0.08


def trained(seed):
    pixels, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(pixels * 255 / 16).to(torch.uint8).view(-1, 1, 8, 8)
    labels = torch.tensor(labels).long()
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.LeakyReLU(0.01), nn.Linear(48, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(80):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(pixels[:-200].float() / 255), labels[:-200]).backward()
        optimizer.step()
    return model.eval(), Images(pixels[-200:], labels[-200:])


@pytest.fixture(scope="module")
def honest():
    return trained(0)


@pytest.fixture(scope="module")
def dense():
    return trained(1)[0]


class Behind(nn.Module):
    """A network behind something that is done to its images or its logits."""

    def __init__(self, network, images=lambda x: x, logits=lambda z: z):
        super().__init__()
        self.network, self.images, self.logits = network, images, logits

    def forward(self, x):
        return self.logits(self.network(self.images(x)))


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (x * 32).round() / 32

    @staticmethod
    def backward(ctx, gradient):
        return torch.zeros_like(gradient)


class Shattered(torch.autograd.Function):
    """The identity, whose gradient points anywhere."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        generator = torch.Generator().manual_seed(0)
        return torch.randn(gradient.shape, generator=generator).to(gradient) * gradient.abs().mean()


def audit(model, images, dense=None, **options):
    checks = Audit(EPS, steps=20, queries=300, active=20, **options).checks(model, images, dense)
    return {check.name: check for check in checks}


def warned(checks):
    return {name for name, check in checks.items() if check.status == "warning"}


def test_a_network_that_hides_nothing_passes(honest, dense):
    model, images = honest
    checks = audit(model, images, dense)
    assert tuple(checks) == CHECKS
    assert not warned(checks)
    assert all(check.status != "not done" and check.found and check.meaning for check in checks.values())
    assert not model[1]._forward_pre_hooks, "no hook is left behind"


def test_large_logits_are_found_out(honest, dense):
    model, images = honest
    checks = audit(Behind(model, logits=lambda z: 1000 * z), images, dense)
    assert {"zero gradients", "rescaled logits"} <= warned(checks)
    assert {checks[name].status for name in ("tiny gradients", "saturated margins")} == {"note"}
    assert checks["PGD against FGSM"].status == "pass", "our PGD does not depend on the scale"


def test_float64_tells_rounding_from_robustness(honest):
    """Margins between 18 and 745: a gradient in float64, none or half of one in float32."""
    model, images = honest
    checks = audit(Behind(model, logits=lambda z: 100 * z), images)
    assert checks["float64"].value > 0.05
    assert checks["float64"].status == "warning"
    assert checks["transfer"].status == "not done", "no other network was given"


def test_an_image_without_gradient_is_found_out(honest, dense):
    """Rounded images: no gradient at all, but transfer, Square and a known adversarial example are there."""
    model, images = honest
    checks = audit(Behind(model, images=Rounded.apply), images, dense)
    expected = {"zero gradients", "transfer", "Square", "random noise", "active test", "anything allowed"}
    assert expected <= warned(checks)


def test_a_gradient_that_points_anywhere_is_found_out(honest, dense):
    model, images = honest
    checks = audit(Behind(model, images=Shattered.apply), images, dense)
    assert {"transfer", "Square", "active test", "random noise"} <= warned(checks)
    assert checks["zero gradients"].status == "pass"


@pytest.mark.parametrize("norm", ["l2", "l2_relative"])
def test_other_norms(honest, dense, norm):
    model, images = honest
    eps = {"l2": 0.8, "l2_relative": 0.15}[norm]
    checks = Audit(eps, norm, steps=20, queries=100, active=10).checks(model, images, dense)
    found = {check.name: check for check in checks}
    assert not warned(found)
    assert found["Square"].status == ("pass" if norm == "l2" else "not done")
    assert found["anything allowed"].value == 0


def test_what_is_planted_is_there_and_hard_to_find_by_chance(honest):
    model, images = honest
    pixels, _ = next(images.batches(30))
    with evaluating(model):
        check = active_test(model, pixels, Audit(EPS, steps=30).pgd("margin"), points=200)
    assert check.status == "pass"
    assert "30 images in 30" in check.found
    assert "random search of 0" in check.found


@pytest.mark.slow
def test_an_audit_is_repeatable_and_leaves_the_network_alone(honest, dense):
    model, images = honest
    before = {name: t.clone() for name, t in model.state_dict().items()}
    random = torch.get_rng_state()
    first, again = (audit(model, images, dense) for _ in range(2))
    assert first == again
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(random, torch.get_rng_state())


def test_small_logits_are_found_out(honest, dense):
    """FGSM sees all wrong classes alike where the softmax is flat."""
    model, images = honest
    checks = audit(Behind(model, logits=lambda z: 0.01 * z), images, dense)
    assert "rescaled logits" in warned(checks)


def test_gradients_of_another_function_are_found_out_without_any_other_network(honest):
    """The logits of one function, the gradients of another; the active test is blind to it."""
    model, images = honest

    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.other = model, nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

        def forward(self, x):
            return self.model(x).detach() + self.other(x) - self.other(x).detach()

    for norm, eps in (("linf", EPS), ("l2_relative", 0.15)):
        found = Audit(eps, norm, steps=10, queries=20, active=5).checks(Detached(), images)
        assert "gradients against differences" in warned({check.name: check for check in found})


def test_ties_of_max_pooling_are_no_false_gradients(honest):
    """Where neighbours are equal, as in a black border, there is no derivative; nearby there is."""
    _, images = honest
    black = Images(images.pixels.clone(), images.labels)
    black.pixels[:, :, :4] = 0
    pooled = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10))
    assert audit(pooled, black)["gradients against differences"].status == "pass"


def test_a_network_that_draws_at_random_is_found_out(honest):
    model, images = honest
    noisy = Behind(model, images=lambda x: x + 0.1 * torch.randn_like(x))
    assert "repeatable" in warned(audit(noisy, images))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_and_logits_that_are_no_numbers_are_none(honest, value):
    model, images = honest

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return torch.full_like(gradient, value)

    checks = audit(Behind(model, images=Broken.apply), images)
    assert checks["zero gradients"].value == 1
    assert "zero gradients" in warned(checks)
    (row,) = evaluate(Behind(model, images=Broken.apply), images, Fgsm([0.1]))
    assert row["zero_gradient"] == 1
    (row,) = evaluate(Behind(model, logits=lambda z: z * value), images, Fgsm([0]))
    assert row["accuracy"] == 0, "what is no number is no right answer"


def test_a_strength_at_which_nothing_happens_is_no_masking(honest, dense):
    model, images = honest
    found = Audit(1e-4, steps=5, queries=20, active=5).checks(model, images, dense)
    checks = {check.name: check for check in found}
    assert checks["random noise"].status == "not done"
    assert warned(checks) <= {"active test"}


def test_few_images_are_no_evidence(honest, dense):
    model, images = honest
    assert not warned(audit(model, images.take(slice(20)), dense))


def test_a_network_of_its_own_types_is_audited_all_the_same(honest):
    model, images = honest
    half = copy.deepcopy(model).to(torch.bfloat16)
    checks = audit(Behind(half, images=lambda x: x.to(torch.bfloat16)), images.take(slice(60)))
    assert checks["active test"].status in ("pass", "warning", "note", "not done")


@pytest.mark.parametrize(("eps", "norm"), [(0.0, "linf"), (2.0, "linf"), (0.1, "std")])
def test_an_audit_needs_an_attack(eps, norm):
    with pytest.raises(ValueError, match="eps|norm"):
        Audit(eps, norm)
