"""An active test of attacks: they must find an adversarial example that was planted."""

import torch
from torch import Tensor, nn
from typing_extensions import override

from condlr._support.seeds import derive_seed
from condlr.analysis.sceptic.checks import Check, at_most, not_done
from condlr.attacks._balls import inside, on_sphere, radius
from condlr.attacks.base import Attack
from condlr.layers import LowRankLinear


def active_test(model: nn.Module, pixels: Tensor, attack: Attack, seed: int = 0, points: int = 400) -> Check:
    """Plant an adversarial example for each image, and check whether the attack finds one.

    After the binarisation test of Zimmermann et al. (NeurIPS 2022). The last linear layer is replaced by one
    with two classes, which separates the features of a point x_h on the surface of the ball from those of
    `points` points inside. So x_h is adversarial, and random search does not find it. Operations after that
    layer are not tested. With features phi, and their mean m and covariance C over the points inside (plus a
    ridge of a tenth of C's mean eigenvalue), the new layer is w = C^-1 (phi(x_h) - m). Its threshold is half
    way between phi(x_h) and the nearest other point, and its logits are scaled to the network's margin at x.

    Args:
        model: in eval mode.
        pixels: (n, ...), the images.
        attack: of one strength; it must find x_h or another point of its class.
        seed: of random draws.
        points: drawn in each ball, and again for a random search.
    """
    features = _Features(model)
    generator = torch.Generator().manual_seed(derive_seed(seed, "active"))
    built = found = by_chance = 0
    try:
        for x in pixels.split(1):
            planted = _plant(features, x, attack, points, generator)
            if planted is None:
                continue
            built += 1
            (made,) = attack.perturb(planted, x, torch.zeros(1).to(x).long(), seed=built)
            with torch.no_grad():
                found += int(planted(made.images).argmax(1))
                by_chance += int(planted(_draw(x, attack, points, generator)).argmax(1).any())
    finally:
        features.remove()
    meaning = "the attack misses adversarial examples that are known to be there: its accuracies mean little"
    if not built:
        return not_done("active test", "no point on the surface could be told from those within", meaning)
    return at_most(
        "active test", 1 - found / built, 0.05, built,
        f"the planted example of {found} images in {built} is found, by random search of {by_chance}",
        meaning,
    )  # fmt: skip


def _plant(
    features: "_Features", x: Tensor, attack: Attack, points: int, generator: torch.Generator
) -> "_Planted | None":
    """The network with the new last layer; None if the point on the surface cannot be separated."""
    with torch.no_grad():
        size = radius(attack.norm, attack.eps[0], x)
        hidden = (x + size * _surface(attack.norm, x, generator)).clamp(0, 1)
        inner, own = features(_draw(x, attack, points, generator)).double(), features(hidden).double()[0]
        clean, own_margin = features(x).double()[0], features.margin
        mean = inner.mean(0)
        centred = inner - mean
        covariance = centred.T @ centred / points
        # Without a ridge the layer would use the features that vary least, such as kinks without a gradient.
        ridge = 0.1 * covariance.diagonal().mean() * torch.eye(len(mean)).to(covariance)
        if not ridge.any():  # the features are constant in the ball
            return None
        weight = torch.linalg.solve(covariance + ridge, own - mean)
        highest, target = (centred @ weight).max(), (own - mean) @ weight
        if not target > highest:
            return None
        threshold = (highest + target) / 2
        scale = own_margin / (threshold - (clean - mean) @ weight)
    return _Planted(features, (scale * weight).to(x), (scale * (threshold + mean @ weight)).to(x))


def _draw(x: Tensor, attack: Attack, points: int, generator: torch.Generator) -> Tensor:
    many = x.expand(points, *x.shape[1:])
    return (many + radius(attack.norm, attack.eps[0], x) * inside(attack.norm, many, generator)).clamp(0, 1)


def _surface(norm: str, x: Tensor, generator: torch.Generator) -> Tensor:
    """A random corner of the cube, or a random point of the sphere."""
    direction = on_sphere(x, generator)
    return direction.sign() if norm == "linf" else direction


class _Features(nn.Module):
    """The input of a network's last linear layer; its logits, if it has none.

    Attributes:
        margin: the largest minus the second logit of the first image, at the last call.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.margin, self._taken = network, 0.0, torch.empty(0)
        self._handles = [
            layer.register_forward_pre_hook(self._take)
            for layer in network.modules()
            if isinstance(layer, nn.Linear | LowRankLinear)
        ]

    @override
    def forward(self, images: Tensor) -> Tensor:
        self._taken = torch.empty(0)
        logits = self.network(images)
        first, second = logits[0].detach().topk(2).values.tolist()
        self.margin = first - second
        return (self._taken if len(self._taken) else logits).flatten(1).to(images.dtype)

    def _take(self, layer: nn.Module, inputs: tuple[Tensor]) -> None:
        self._taken = inputs[0]

    def remove(self) -> None:
        """Remove the hooks from the network."""
        for handle in self._handles:
            handle.remove()


class _Planted(nn.Module):
    """A network with two classes: class 1 if weight . features > threshold."""

    def __init__(self, features: _Features, weight: Tensor, threshold: Tensor):
        super().__init__()
        self.features, self.weight, self.threshold = features, weight, threshold

    @override
    def forward(self, images: Tensor) -> Tensor:
        score = self.features(images) @ self.weight - self.threshold
        return torch.stack([torch.zeros_like(score), score], 1)
