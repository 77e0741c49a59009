"""Accuracy under attack, on exactly the images asked for."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from condlr.attacks.base import Attack
from condlr.data.base import Images
from condlr.modes import in_eval_mode
from condlr.precision import strict

Row = dict[str, str | float | int]


def evaluate(model: nn.Module, images: Images, attack: Attack, batch_size: int = 1000) -> list[Row]:
    """Attack `model` on `images` and count what it still classifies correctly.

    In eval mode and strict float32 (no autocast, no TF32), whatever the model was trained in; its mode
    and the `requires_grad` of its weights are restored.

    Returns:
        A row for each eps, for evaluation.csv: attack, norm, eps, accuracy (correct / n), n,
        zero_gradient (the fraction of images whose gradient is zero in every pixel) and seconds (of
        the whole attack, shared equally by its rows).
    """
    started = time.perf_counter()
    correct: Counter[float] = Counter()
    zero: Counter[float] = Counter()
    with _evaluating(model):
        for pixels, labels in images.batches(batch_size):
            for eps, adversarial, without in attack.perturb(model, pixels, labels):
                with torch.no_grad():
                    predicted = model(adversarial).argmax(1)
                correct[eps] += int((predicted == labels).sum())
                zero[eps] += int(without.sum())
    n, seconds = len(images), (time.perf_counter() - started) / len(correct)
    return [
        {
            "attack": attack.label(),
            "norm": attack.norm,
            "eps": eps,
            "accuracy": correct[eps] / n,
            "n": n,
            "zero_gradient": zero[eps] / n,
            "seconds": round(seconds, 3),
        }
        for eps in sorted(correct)
    ]


def accuracy(model: nn.Module, images: Images, batch_size: int = 1000) -> float:
    """The fraction of `images` that `model` classifies correctly, without attack."""
    with _evaluating(model), torch.no_grad():
        hits = [(model(x).argmax(1) == y).sum() for x, y in images.batches(batch_size)]
    return int(torch.stack(hits).sum()) / len(images)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    device = wanted[0][0].device if wanted else torch.device("cpu")
    try:
        for parameter, _ in wanted:
            parameter.requires_grad_(False)
        with in_eval_mode(model), strict(device):
            yield
    finally:
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)
