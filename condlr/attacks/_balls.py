"""The balls that bound perturbations: radius, steepest direction, projection, random points.

Images and perturbations are (n, ...). Both `l2` and `l2_relative` have Euclidean balls.
"""

import math

import torch
from torch import Tensor


def radius(norm: str, eps: float, images: Tensor) -> Tensor:
    """The radius for each image, (n, 1, ...): eps, or eps ||x||_2 for `l2_relative`."""
    sizes = lengths(images)
    return eps * sizes if norm == "l2_relative" else torch.full_like(sizes, eps)


def lengths(points: Tensor) -> Tensor:
    """||p||_2 of each of n points, (n, 1, ...)."""
    return torch.linalg.vector_norm(points, dim=_inner(points), keepdim=True)


def steepest(norm: str, gradient: Tensor) -> Tensor:
    """The direction of norm 1 in which a function with this gradient grows fastest; 0 if the gradient is 0.

    sign(g) for `linf`, g / ||g||_2 otherwise. The gradient is first divided by its largest entry, so that its
    squares neither underflow nor overflow.
    """
    if norm == "linf":
        return gradient.sign()
    largest = gradient.abs().amax(_inner(gradient), keepdim=True)
    scaled = torch.where(largest > 0, gradient / largest, 0)
    # Subnormal numbers lose digits in the division; the second one makes the norm at most 1 again.
    return torch.where(largest > 0, scaled / lengths(scaled), 0).nan_to_num(0, 0, 0)


def project(norm: str, perturbation: Tensor, radii: Tensor) -> Tensor:
    """The nearest perturbation within the ball."""
    if norm == "linf":
        return torch.clamp(perturbation, -radii, radii)
    size = lengths(perturbation)
    return torch.where(size > radii, perturbation * (radii / size), perturbation)


def inside(norm: str, images: Tensor, generator: torch.Generator) -> Tensor:
    """A point for each image, uniform in the ball of radius 1, drawn on the CPU."""
    if norm == "linf":
        return (2 * torch.rand(images.shape, generator=generator, device="cpu") - 1).to(images)
    direction = on_sphere(images, generator)
    n, dimension = len(images), math.prod(images.shape[1:])
    distance = torch.rand(n, generator=generator, device="cpu").to(images) ** (1 / dimension)
    return direction * distance.view(-1, *[1] * (images.ndim - 1))


def on_sphere(images: Tensor, generator: torch.Generator) -> Tensor:
    """A point for each image, uniform on the Euclidean sphere of radius 1, drawn on the CPU."""
    direction = torch.randn(images.shape, generator=generator, device="cpu").to(images)
    return direction / lengths(direction)


def _inner(points: Tensor) -> tuple[int, ...]:
    return tuple(range(1, points.ndim))
