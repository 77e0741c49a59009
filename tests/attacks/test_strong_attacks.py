"""The attacks beyond FGSM: in their balls, seeded, as strong as closed forms and other libraries say."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import dctn
from sklearn.datasets import load_digits
from torch import nn

from condlr._support.errors import UserError
from condlr.analysis.crosscheck import crosscheck
from condlr.attacks import _balls as balls
from condlr.attacks._losses import LOSSES, ce, ce_rescaled, dlr, margin
from condlr.attacks.autoattack import AutoAttack
from condlr.attacks.fgsm import Fgsm
from condlr.attacks.noise import Noise
from condlr.attacks.pgd import Pgd
from condlr.attacks.simba import Simba, cosines
from condlr.attacks.square import Square
from condlr.data.base import Images
from condlr.evaluation import accuracy, evaluate, evaluating

NORMS = ("linf", "l2", "l2_relative")


@pytest.fixture(scope="module")
def digits():
    """Scikit-learn's digits, 8 x 8: the last 400 of them."""
    pixels, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(pixels * 255 / 16).to(torch.uint8).view(-1, 1, 8, 8)
    return Images(pixels, torch.tensor(labels).long())


@pytest.fixture(scope="module")
def network(digits):
    """A small convolutional network, trained on the others."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.LeakyReLU(0.01), nn.Flatten(), nn.Linear(288, 32), nn.Tanh(), nn.Linear(32, 10)
    )
    x, y = digits.pixels[:-400].float() / 255, digits.labels[:-400]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def test_images(digits):
    return digits.take(slice(len(digits) - 400, None))


class Scaled(nn.Module):
    """Large logits: the predictions of `network`, no gradient of its cross-entropy."""

    def __init__(self, network, scale):
        super().__init__()
        self.network, self.scale = network, scale

    def forward(self, x):
        return self.scale * self.network(x)


class Round(nn.Module):
    def forward(self, x):
        return x + ((x * 4).round() / 4 - x).detach()


class Behind16(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x).to(torch.bfloat16)


def share(model, images, attack, **kw):
    (row,) = evaluate(model, images, attack, **kw)
    return row["accuracy"]


# The balls


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(NORMS), st.floats(1e-3, 0.9), st.integers(0, 99))
def test_projection_is_the_nearest_point_of_the_ball(norm, eps, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(5, 2, 3, 4, generator=generator, dtype=torch.float64)
    far = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    radii = balls.radius(norm, eps, x)
    near = balls.project(norm, far, radii)
    size = near.flatten(1).abs().amax(1) if norm == "linf" else near.flatten(1).norm(dim=1)
    assert (size <= radii.flatten() * (1 + 1e-12)).all()
    torch.testing.assert_close(balls.project(norm, near, radii), near)
    for _ in range(20):  # nearer than every other point in the ball
        other = balls.inside(norm, x, generator) * radii
        size = other.flatten(1).abs().amax(1) if norm == "linf" else other.flatten(1).norm(dim=1)
        assert (size <= radii.flatten() * (1 + 1e-6)).all()
        assert ((far - near).flatten(1).norm(dim=1) <= (far - other).flatten(1).norm(dim=1) + 1e-12).all()


@pytest.mark.parametrize("scale", [1e-42, 1e-38, 1e-20, 1.0, 1e20, 1e38])
@pytest.mark.parametrize("norm", NORMS)
def test_a_tiny_gradient_points_like_a_large_one(norm, scale):
    gradient = torch.randn(3, 1, 4, 4)
    direction = balls.steepest(norm, gradient)
    tiny = balls.steepest(norm, (gradient.double() * scale).float())
    # Below 1e-38 float32 itself has few digits left.
    tolerance = 1e-6 if scale > 1e-37 else 0.2
    torch.testing.assert_close(tiny, direction, atol=tolerance, rtol=0)
    assert not balls.steepest(norm, torch.zeros(3, 1, 4, 4)).any()


def test_points_inside_a_ball_are_uniform_in_it():
    x, generator = torch.zeros(20000, 1, 1, 3), torch.Generator().manual_seed(0)
    radii = balls.lengths(balls.inside("l2", x, generator)).flatten()
    assert (radii < 0.5).float().mean().item() == pytest.approx(0.5**3, abs=0.01)
    cube = balls.inside("linf", x, generator)
    assert cube.abs().max() <= 1
    assert cube.std().item() == pytest.approx(1 / math.sqrt(3), abs=0.01)


# The losses


def logits_and_labels(dtype=torch.float64):
    return 3 * torch.randn(9, 5, dtype=dtype), torch.randint(0, 5, (9,))


def test_ce_has_the_direction_of_the_cross_entropy():
    """grad CE = (1 - p_y) grad l, and CE = log(1 + e^l)."""
    z, y = logits_and_labels()
    z.requires_grad_()
    plain = nn.functional.cross_entropy(z, y, reduction="none")
    torch.testing.assert_close(plain, nn.functional.softplus(ce(z, y)))
    (of_plain,) = torch.autograd.grad(plain.sum(), z)
    (of_odds,) = torch.autograd.grad(ce(z, y).sum(), z)
    wrong = 1 - z.softmax(1).gather(1, y[:, None])
    torch.testing.assert_close(of_plain, wrong * of_odds)


def test_ce_does_not_saturate_where_the_cross_entropy_does():
    z = torch.tensor([[200.0, 0, -1]], requires_grad=True)
    y = torch.tensor([0])
    assert not torch.autograd.grad(nn.functional.cross_entropy(z, y), z)[0].any()
    (gradient,) = torch.autograd.grad(ce(z, y).sum(), z)
    assert gradient.abs().max() >= 0.5


@pytest.mark.parametrize("name", LOSSES)
def test_losses_say_who_is_misclassified(name):
    z, y = logits_and_labels()
    wrong = z.argmax(1) != y
    value = LOSSES[name](z, y)
    assert (value[wrong] > 0).all()
    if name in ("margin", "dlr"):
        assert (value[~wrong] < 0).all()


def test_losses_are_their_formulas_and_dlr_knows_neither_shift_nor_scale():
    z, y = logits_and_labels()
    for i, row in enumerate(z.tolist()):
        others = sorted(value for j, value in enumerate(row) if j != y[i])
        ordered = sorted(row)
        lead = others[-1] - row[y[i]]
        assert margin(z, y)[i].item() == pytest.approx(lead)
        assert dlr(z, y)[i].item() == pytest.approx(lead / (ordered[-1] - ordered[-3]))
        factor = 20 / (ordered[-1] - ordered[0])
        odds = math.log(sum(math.exp(factor * value) for value in others)) - factor * row[y[i]]
        assert ce_rescaled(z, y)[i].item() == pytest.approx(odds)
    torch.testing.assert_close(dlr(7 * z + 3, y), dlr(z, y))
    torch.testing.assert_close(ce_rescaled(7 * z + 3, y), ce_rescaled(z, y))
    with pytest.raises(ValueError, match="three classes"):
        dlr(z[:, :2], y.clamp(max=1))


# PGD


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ["ce", "margin", "ce_rescaled"])
def test_pgd_reaches_the_closed_form_of_a_linear_classifier(norm, loss):
    """With two classes an image falls where its margin is at most eps ||w||_*, if no pixel is clamped."""
    linear = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    x = Images(torch.randint(90, 165, (300, 1, 3, 4), dtype=torch.uint8), torch.zeros(300).long())
    pixels = x.pixels.float() / 255
    with torch.no_grad():
        z = linear(pixels)
    x = Images(x.pixels, z.argmax(1))
    w = (linear[1].weight[0] - linear[1].weight[1]).detach()
    eps = 0.05
    reach = {"linf": w.abs().sum(), "l2": w.norm(), "l2_relative": w.norm() * pixels.flatten(1).norm(dim=1)}
    lead = (z[:, 0] - z[:, 1]).abs()
    left = (lead > eps * reach[norm]).float().mean().item()
    doubtful = ((lead / (eps * reach[norm]) - 1).abs() < 1e-3).float().mean().item()
    assert 0.1 < left < 0.95
    # On a sphere a start elsewhere comes to the nearest point but slowly.
    attack = Pgd([eps], norm=norm, steps=30, loss=loss, random_start=norm == "linf")
    assert share(linear, x, attack) == pytest.approx(left, abs=doubtful + 1e-6)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("random_start", [True, False])
def test_pgd_stays_in_its_ball_and_among_the_images(network, test_images, norm, random_start):
    x, y = next(test_images.batches(100))
    with evaluating(network):
        for made in Pgd([0, 0.03, 0.2], norm=norm, steps=7, random_start=random_start).perturb(network, x, y):
            moved = made.images - x
            size = moved.flatten(1).abs().amax(1) if norm == "linf" else moved.flatten(1).norm(dim=1)
            radii = balls.radius(norm, made.eps, x).flatten()
            assert (size <= radii * (1 + 1e-5) + 1e-6).all()
            assert made.images.min() >= 0
            assert made.images.max() <= 1


def test_pgd_is_not_fooled_by_the_scale_of_the_logits(network, test_images):
    eps, huge = 0.1, Scaled(network, 1e4)
    plain = {loss: share(network, test_images, Pgd([eps], steps=20, loss=loss)) for loss in LOSSES}
    assert share(huge, test_images, Fgsm([eps])) > share(network, test_images, Fgsm([eps])) + 0.2, "masked"
    for loss in LOSSES:
        row = evaluate(huge, test_images, Pgd([eps], steps=20, loss=loss))[0]
        assert row["accuracy"] <= plain[loss] + 0.03
        # The DLR loss is constant, 1, where the true class is third.
        assert row["zero_gradient"] == 0 or loss == "dlr"


def test_more_restarts_and_steps_are_never_weaker(network, test_images):
    once, thrice = (share(network, test_images, Pgd([0.1], steps=3, restarts=n)) for n in (1, 4))
    assert thrice < once
    assert share(network, test_images, Pgd([0.1], steps=40)) <= share(network, test_images, Fgsm([0.1]))


@pytest.mark.parametrize("norm", NORMS)
def test_an_image_that_is_wrong_already_is_not_made_right(network, test_images, norm):
    """A rounding network: what is wrong at x may be right nearby, and still does not count."""
    rounding = nn.Sequential(Round(), network)
    with torch.no_grad():
        wrong = rounding(next(test_images.batches(400))[0]).argmax(1) != test_images.labels
    images = Images(test_images.pixels[wrong], test_images.labels[wrong])
    assert len(images) > 5
    assert share(rounding, images, Pgd([0.15], norm=norm, steps=3, restarts=3)) == 0


def test_losses_of_small_and_of_constant_logits(network, test_images):
    """The margin's direction knows no scale; a constant network has no gradient, and no NaN is made of it."""
    for scale in (1e-3, 1e-20, 1e-43):
        tiny = Scaled(network, scale)
        for loss in ("margin", "ce_rescaled") if scale > 1e-30 else ("ce_rescaled",):
            attack = Pgd([0.1], steps=10, loss=loss)
            assert (
                share(tiny, test_images, attack) <= share(network, test_images, attack) + 0.04
                or scale < 1e-30
            )
    constant = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    nn.init.zeros_(constant[1].weight)
    for loss in LOSSES:
        (row,) = evaluate(constant, test_images, Pgd([0.1], steps=2, loss=loss))
        assert row["zero_gradient"] == row["accuracy"], "only what was right is attacked"
    for norm in ("linf", "l2"):
        assert evaluate(constant, test_images, Square([0.1], norm=norm, queries=5))[0]["n"] == 400


def test_half_precision_logits_are_attacked_too(network, test_images):
    half = Behind16(network)
    for attack in (Pgd([0.1], steps=3), Simba([0.2], iterations=[3]), Fgsm([0.1])):
        assert evaluate(half, test_images, attack)[-1]["n"] == 400


def test_pgd_keeps_the_best_point_of_all(network, test_images):
    """Against another network, where nothing stops it early, more starts never end lower."""
    x, y = next(test_images.batches(60))
    with evaluating(network):
        (few,), (many,) = (
            list(Pgd([0.05], steps=4, restarts=n, source="baseline", loss="margin").perturb(network, x, y))
            for n in (1, 5)
        )
        a, b = margin(network(few.images), y), margin(network(many.images), y)
    assert (b >= a - 1e-5).all()
    assert (b > a + 1e-3).any()


def test_a_result_depends_on_seed_and_images_alone(network, test_images):
    attack = Pgd([0.1], steps=2, restarts=2)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = evaluate(network, test_images, attack)[0]
    assert torch.equal(before, torch.get_rng_state()), "nothing is drawn from the global generator"
    again = evaluate(network, test_images, Pgd([0, 0.05, 0.1], steps=2, restarts=2))[-1]
    assert first["accuracy"] == again["accuracy"]
    assert first["l2_relative"] == again["l2_relative"]
    other = evaluate(network, test_images, Pgd([0.1], steps=2, restarts=2, seed=1))[0]
    assert other["l2_relative"] != first["l2_relative"]


def test_an_attack_needs_no_gradients_from_outside(network, test_images):
    attack = Pgd([0.1], steps=2)
    with torch.no_grad():
        found = evaluate(network, test_images, attack)
    assert found[0]["accuracy"] == evaluate(network, test_images, attack)[0]["accuracy"]


def test_exactly_the_images_asked_for(network, test_images):
    rows = evaluate(network, test_images, Pgd([0.1], steps=2, images=37))
    direct = evaluate(network, test_images.take(slice(37)), Pgd([0.1], steps=2))
    assert rows[0]["n"] == 37
    assert rows[0]["accuracy"] == direct[0]["accuracy"]
    with pytest.raises(ValueError, match="only 400"):
        evaluate(network, test_images, Fgsm([0.1], images=401))


def test_the_relative_size_of_what_was_changed(network, test_images):
    x, y = next(test_images.batches(400))
    (made,) = Fgsm([0.1]).perturb(network, x, y)
    expected = ((made.images - x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)).mean().item()
    (row,) = evaluate(network, test_images, Fgsm([0.1]))
    assert row["l2_relative"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"norm": "l7"}, "norm must be one of"), ({"steps": 0}, "steps"), ({"restarts": 0}, "restarts"),
        ({"loss": "hinge"}, "loss must be one of"), ({"step_size": -1}, "step_size"),
        ({"images": 0}, "images"),
        ({"restarts": 2, "random_start": False}, "random_start"), ({"seed": -1}, "seed"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        Pgd([0.1], **options)


# Other libraries


@pytest.mark.slow
def test_fgsm_is_that_of_foolbox_and_pgd_no_weaker(network, test_images):
    rows = list(crosscheck(network, test_images.take(slice(200)), [0.02, 0.1]))
    assert len(rows) == 2 + 2 * 2 * 2
    for row in rows:
        if row["attack"] == "fgsm":
            assert row["ours"] == row["foolbox"]
            assert row["largest_difference"] <= 1e-7
        else:
            assert row["ours"] <= row["foolbox"] + 0.005, row
    assert min(row["ours"] for row in rows) < rows[0]["ours"] - 0.3, "the attacks do something"


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_square_asks_and_stays_in_the_ball(network, test_images, norm):
    images, eps = test_images.take(slice(120)), {"linf": 0.15, "l2": 1.0}[norm]
    before = torch.get_rng_state()
    attack = Square([eps], norm=norm, queries=100)
    x, y = next(images.batches(120))
    with evaluating(network):
        made, again = (next(iter(attack.perturb(network, x, y, seed=3))) for _ in range(2))
        clean = network(x).argmax(1) == y
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(made.images, again.images)
    moved = made.images - x
    size = moved.flatten(1).abs().amax(1) if norm == "linf" else moved.flatten(1).norm(dim=1)
    assert (size <= eps * (1 + 1e-5)).all()
    assert made.images.min() >= 0
    assert made.images.max() <= 1
    assert made.queries.max() <= 102
    assert (made.queries[~clean] == 1).all(), "what is wrong already is not asked about again"
    (row,) = evaluate(network, images, attack)
    assert row["accuracy"] < clean.float().mean().item()
    assert row["zero_gradient"] is None
    assert row["queries"] > 1


@pytest.mark.slow
@pytest.mark.parametrize("eps", [0.2, pytest.param(0.08, marks=pytest.mark.long)])  # small: many images last
def test_autoattack_is_the_library_and_no_weaker_than_pgd(network, test_images, eps):
    images = test_images.take(slice(10))
    x, y = next(images.batches(10))
    from pyautoattack import AutoAttack as Library

    with evaluating(network), torch.random.fork_rng():
        (made,) = AutoAttack([eps]).perturb(network, x, y, seed=5)
        theirs, _ = Library(network, eps=eps, seed=5).run_standard_evaluation(x.contiguous(), y)
    torch.testing.assert_close(made.images, theirs, rtol=0, atol=1e-6)
    assert (made.images - x).abs().max() <= eps + 1e-6
    with torch.no_grad():
        left = (network(made.images).argmax(1) == y).float().mean().item()
    assert left <= share(network, images, Pgd([eps], loss="margin"))


def test_autoattack_with_few_classes(test_images):
    few = test_images.take(torch.arange(400)[test_images.labels < 5][:8])
    assert evaluate(nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), few, AutoAttack([0.05]))[0]["n"] == 8
    with pytest.raises(ValueError, match="four classes"):
        evaluate(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), few, AutoAttack([0.05]))


def test_without_the_library_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr("condlr.attacks._library.find_spec", lambda name: None)
    for attack in (Square, AutoAttack):
        with pytest.raises(UserError, match=r"pip install 'condlr\[attacks\]'"):
            attack([0.1])


# Noise, SimBA, transfer


def test_noise_has_the_size_it_says():
    x = torch.full((500, 1, 8, 8), 0.5)
    (made,) = Noise([0.05]).perturb(nn.Identity(), x, torch.zeros(500))
    assert (made.images - x).std().item() == pytest.approx(0.05, rel=0.02)
    (made,) = Noise([0.05], norm="linf").perturb(nn.Identity(), x, torch.zeros(500))
    torch.testing.assert_close((made.images - x).abs(), torch.full_like(x, 0.05))
    for norm, length in (("l2", 0.1), ("l2_relative", 0.1 * 4.0)):
        (made,) = Noise([0.1], norm=norm).perturb(nn.Identity(), x, torch.zeros(500))
        torch.testing.assert_close((made.images - x).flatten(1).norm(dim=1), torch.full((500,), length))
    (made,) = Noise([0.05], probability=0.25).perturb(nn.Identity(), x, torch.zeros(500))
    assert (made.images != x).float().mean().item() == pytest.approx(0.25, abs=0.01)
    colour = torch.full((100, 3, 4, 4), 0.5)
    (made,) = Noise([0.05], probability=0.5).perturb(nn.Identity(), colour, torch.zeros(100))
    touched = (made.images != colour).sum(1)
    assert set(touched.unique().tolist()) == {0, 3}, "a pixel is touched in all its channels or in none"


@pytest.mark.parametrize("n", [1, 2, 8, 28])
def test_the_cosines_are_those_of_the_orthonormal_dct(n):
    basis = cosines(n)
    torch.testing.assert_close(basis @ basis.T, torch.eye(n, dtype=torch.float64))
    image = torch.randn(n, n, dtype=torch.float64)
    expected = torch.tensor(dctn(image.numpy(), norm="ortho"))
    torch.testing.assert_close(basis @ image @ basis.T, expected)


@pytest.mark.parametrize(("basis", "frequencies"), [("pixel", None), ("dct", None), ("dct", 4)])
def test_simba_goes_down_one_direction_at_a_time(network, test_images, basis, frequencies):
    images, eps, counts = test_images.take(slice(80)), 0.15, [1, 5, 20, 64]
    attack = Simba([eps], basis=basis, frequencies=frequencies, iterations=counts)
    x, y = next(images.batches(80))
    odds = [ce(network(x), y)]
    with evaluating(network):
        for count, made in zip(counts, attack.perturb(network, x, y), strict=True):
            tried = min(count, 16) if frequencies == 4 else count
            moved = (made.images - x).flatten(1).norm(dim=1)
            assert (moved <= eps * math.sqrt(tried) + 1e-5).all()
            assert ((made.queries >= 1) & (made.queries <= 1 + 2 * tried)).all()
            odds.append(ce(network(made.images), y))
    assert all((later >= earlier - 1e-4).all() for earlier, later in pairwise(odds))
    rows = evaluate(network, images, attack)
    assert [row["attack"].rpartition("-")[2] for row in rows] == ["1", "5", "20", "64"]
    shares = [row["accuracy"] for row in rows]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < shares[0] or frequencies == 4


def test_every_direction_of_simba_is_tried_once():
    """A network that never gets worse refuses every step: then each costs two queries, and images stay."""
    constant = nn.Sequential(nn.Flatten(), nn.Linear(27, 2))
    nn.init.zeros_(constant[1].weight)
    x, y = torch.rand(3, 3, 3, 3), constant(torch.rand(3, 3, 3, 3)).argmax(1)
    for basis in ("pixel", "dct"):
        (made,) = Simba([0.3], basis=basis, iterations=[500]).perturb(constant, x, y)
        assert made.queries.tolist() == [1 + 2 * 27] * 3
        assert torch.equal(made.images, x)


def test_simba_of_strength_0_asks_once_and_says_who_was_right(network, test_images):
    rows = evaluate(network, test_images, Simba([0, 0.15], iterations=[1, 500]))
    assert [row["eps"] for row in rows] == [0, 0, 0.15, 0.15]
    assert {(row["accuracy"], row["queries"]) for row in rows[:2]} == {(accuracy(network, test_images), 1.0)}


def test_transfer_attacks_one_network_with_anothers_images(network, test_images):
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    attack = Pgd([0.1], steps=10)
    x, y = next(test_images.batches(400))
    with evaluating(other):
        (made,) = replace(attack, source="baseline").perturb(other, x, y)
    (row,) = evaluate(network, test_images, attack, source=other)
    assert row["attack"] == "transfer-pgd10-margin-source=given"
    with torch.no_grad():
        assert abs(row["accuracy"] - (network(made.images).argmax(1) == y).float().mean().item()) < 0.03
    assert row["accuracy"] > share(network, test_images, Pgd([0.1], steps=10))


def test_labels_tell_attacks_apart():
    labels = [
        Fgsm([0.1]).label(), Fgsm([0.1], norm="l2").label(), Pgd([0.1]).label(),
        Pgd([0.1], restarts=5).label(),
        Pgd([0.1], loss="margin", step_size=0.1).label(), Pgd([0.1], seed=2).label(), Noise([0.1]).label(),
        Square([0.1], queries=10).label(), Simba([0.1], frequencies=4).label(), AutoAttack([0.1]).label(),
        Pgd([0.1], source="baseline").label(), Pgd([0.1], source="runs/a/lenet5-x/").label(),
    ]  # fmt: skip
    assert labels == [
        "fgsm", "fgm", "pgd50-margin", "pgd50x5-margin", "pgd50-margin-step_size=0.1", "pgd50-margin-seed=2",
        "noise", "square10", "simba-dct-frequencies=4", "autoattack", "transfer-pgd50-margin",
        "transfer-pgd50-margin-source=a/lenet5-x",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", [Square, AutoAttack])
@pytest.mark.parametrize("shape", [(1, 28, 20), (3, 4, 4)])
def test_images_on_which_the_librarys_l2_attack_fails_are_refused_before(kind, shape):
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 10)), torch.rand(4, *shape)
    with pytest.raises(UserError, match="in l2 needs images of at least 5 rows"):
        next(iter(kind([0.1], norm="l2").perturb(model, x, model(x).argmax(1), 0)))
