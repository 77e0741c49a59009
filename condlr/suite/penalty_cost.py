"""The cost of each penalty beside a training step of ResNet-34."""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from condlr._support.precision import training
from condlr._support.rooms import available, find
from condlr.analysis.cost import flops
from condlr.models.resnet34 import ResNet34
from condlr.penalties.base import Penalty
from condlr.suite.benchmark import random_batch

# Timed beside the defaults of each penalty: OCNN on its authors' layers, the frame's other Gram matrix, and
# activations of many dimensions
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "lr_layer": [{"layers": ["stage3"]}],
    "ocnn": [{"layers": ["stage*.conv1", "*.shortcut"]}],
    "frame": [{"side": "columns"}],
}

# A penalty that has taken so many seconds takes no further turn.
_ENOUGH = 30.0


class Priced(NamedTuple):
    """One line of the table.

    Attributes:
        penalty: its title, or None for the training step itself.
        options: those that are not the defaults.
        layers: how many it penalises.
        gflop: of the products and convolutions in it, with its gradient; eigenvalues are not counted.
        milliseconds: of the fastest turn, for the value and its gradient.
        share: of a step.
        turns: how many were taken.
    """

    penalty: str | None
    options: dict[str, Any]
    layers: int
    gflop: float
    milliseconds: float
    share: float
    turns: int


def penalties() -> Iterator[tuple[Penalty, dict[str, Any]]]:
    """Every penalty with its defaults and as in `VARIANTS`, and the options that differ."""
    for name in available("penalties"):
        kind = find("penalties", name, Penalty)
        for options in ({}, *VARIANTS.get(name, [])):
            yield kind(**options), options  # pyright: ignore[reportAbstractUsage] (a subclass)


def priced(
    width: int, batch_size: int, repeats: int, precision: str, device: torch.device, progress: Any
) -> list[Priced]:
    """Time every penalty and the step in turns, so that their ratios hold on a machine with other work.

    Args:
        width: of the ResNet-34; 64 is the full one.
        batch_size: of the step, on random images of 3 x 32 x 32; a penalty does not depend on it.
        repeats: turns of each.
        precision: of the step; penalties are computed in strict float32.
        device: to run on.
        progress: called with a text, the turns done and all turns.
    """
    torch.manual_seed(0)
    model = ResNet34(width=width).build((3, 32, 32), 10).to(device).train()
    images, labels = random_batch((3, 32, 32), batch_size, device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        with training(model, precision, device):
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()

    made = list(penalties())
    works = [step, *(_work(penalty, model, images) for penalty, _ in made)]
    periods = [1, *(penalty.period for penalty, _ in made)]
    seconds: list[list[float]] = [[] for _ in works]
    # Also their first, slower, call
    operations = [flops(work) / 1e9 / period for work, period in zip(works, periods, strict=True)]
    for turn in range(repeats):
        for number, work in enumerate(works):
            progress("penalties", turn * len(works) + number, repeats * len(works))
            if sum(seconds[number]) < _ENOUGH:
                seconds[number].append(_timed(work, device))
    # Other work on the machine only ever adds to a turn
    best = [min(turns) / period for turns, period in zip(seconds, periods, strict=True)]

    def line(number: int, penalty: str | None, options: dict[str, Any], layers: int) -> Priced:
        milliseconds, share = 1e3 * best[number], best[number] / best[0]
        figures = round(operations[number], 3), round(milliseconds, 3), round(share, 4)
        return Priced(penalty, options, layers, *figures, len(seconds[number]))

    lines = [line(0, None, {}, 0)]
    for number, (penalty, options) in enumerate(made, start=1):
        lines.append(line(number, penalty.title, options, len(penalty.named(model))))
    return lines


def _work(penalty: Penalty, model: nn.Module, images: Tensor) -> Callable[[], None]:
    """All steps of a period of the penalty, without the network's own."""
    term = penalty.alone(model, images)

    def work() -> None:
        model.zero_grad()
        for _ in range(penalty.period):
            term().backward()

    return work


def _timed(work: Callable[[], None], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
