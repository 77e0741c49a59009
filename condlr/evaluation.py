"""Accuracy under attack."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from condlr._support.memory import keep_freed_memory
from condlr._support.modes import in_eval_mode, without_gradients
from condlr._support.precision import strict
from condlr._support.seeds import derive_seed
from condlr.attacks._balls import lengths
from condlr.attacks.base import Attack, Perturbed, correct
from condlr.data.base import Images, channels_last

Row = dict[str, str | float | int | None]


def evaluate(
    model: nn.Module,
    images: Images,
    attack: Attack,
    batch_size: int | None = None,
    source: nn.Module | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Row]:
    """Attack `model` on `images`, and measure its accuracy.

    Runs in eval mode and strict float32 (no autocast, no TF32). The model's mode and the `requires_grad` of
    its weights are restored.

    Args:
        model: the network to attack.
        images: the first `attack.images` of these are used.
        attack: makes the adversarial images.
        batch_size: None for the attack's own; random draws depend on it.
        source: the network that the images are made against; None for `model`.
        on_progress: called with the number of (batch, strength) pairs done, and of all pairs.

    Returns:
        A row for each of `attack.cells()`, for evaluation.csv: attack, norm, eps, accuracy (correct / n), n,
        zero_gradient (the fraction of images whose gradient is zero or NaN in every pixel; None for an
        attack without gradients), l2_relative (the mean of ||x' - x||_2 / ||x||_2), queries (the mean per
        image, if the attack counts them) and seconds (of the whole attack, divided equally among its rows).
        An image whose logits are not finite counts as misclassified.
    """
    if source is not None and attack.source is None:
        attack = replace(attack, source="given")
    started = time.perf_counter()
    chosen = first(images, attack.images)
    size = batch_size or attack.batch_size
    counts: defaultdict[tuple[str, float], _Count] = defaultdict(_Count)
    cells = attack.cells()
    total = -(-len(chosen) // size) * len(cells)
    with evaluating(model), evaluating(source or model):
        for number, (pixels, labels) in enumerate(chosen.batches(size)):
            seed = derive_seed(attack.seed, "attack", number)
            for cell, made in enumerate(attack.perturb(source or model, pixels, labels, seed), start=1):
                with torch.no_grad():
                    hits = correct(model, made.images, labels)
                counts[made.label, made.eps].add(made, pixels, hits)
                on_progress(number * len(cells) + cell, total)
    seconds = (time.perf_counter() - started) / len(cells)
    return [
        {"attack": label, "norm": attack.norm, "eps": eps}
        | counts[label, eps].row()
        | {"seconds": round(seconds, 3)}
        for label, eps in cells
    ]


def accuracy(model: nn.Module, images: Images, batch_size: int = 1000) -> float:
    """The fraction of `images` that `model` classifies correctly, without attack; see `evaluate`."""
    with evaluating(model), torch.no_grad():
        hits = [correct(model, x, y).sum() for x, y in images.batches(batch_size)]
    return int(torch.stack(hits).sum()) / len(images)


def first(images: Images, count: int | None) -> Images:
    """The first `count` images; all for None.

    Raises:
        ValueError: there are fewer.
    """
    if count is not None and count > len(images):
        raise ValueError(f"images={count}, but there are only {len(images)}")
    return images.take(slice(count))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode and strict float32, without gradients of weights; restore it afterwards.

    The network gets its images in channels-last layout, which is twice as fast on a CPU.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    keep_freed_memory()
    with without_gradients(model), in_eval_mode(model), strict(device), _hooked(model):
        yield


@contextmanager
def _hooked(model: nn.Module) -> Iterator[None]:
    """Pass images in channels-last layout, and return logits in the images' dtype."""
    handles = (
        model.register_forward_pre_hook(
            lambda _, inputs: tuple(channels_last(x) if x.ndim == 4 else x for x in inputs)
        ),
        model.register_forward_hook(lambda _, inputs, logits: logits.to(inputs[0].dtype)),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Count:
    n: int = 0
    correct: int = 0
    zero: int | None = 0
    moved: float = 0.0
    queries: int | None = 0

    def add(self, made: Perturbed, before: Tensor, hits: Tensor) -> None:
        """Add a batch."""
        self.n += len(hits)
        self.correct += int(hits.sum())
        self.zero = _plus(self.zero, made.without_gradient)
        self.queries = _plus(self.queries, made.queries)
        sizes = lengths(before).clamp_min(torch.finfo(before.dtype).tiny)
        self.moved += float((lengths(made.images - before) / sizes).sum())

    def row(self) -> Row:
        """The columns of evaluation.csv."""
        return {
            "accuracy": self.correct / self.n,
            "n": self.n,
            "zero_gradient": None if self.zero is None else self.zero / self.n,
            "l2_relative": float(f"{self.moved / self.n:.6g}"),
            "queries": None if self.queries is None else round(self.queries / self.n, 1),
        }


def _plus(total: int | None, counts: Tensor | None) -> int | None:
    return None if total is None or counts is None else total + int(counts.sum())
