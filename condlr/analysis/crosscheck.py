"""Our attacks beside another library's on the same weights: foolbox (Rauber et al., JOSS 2020)."""

from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from condlr._support.errors import UserError
from condlr.analysis.sceptic.checks import share_of
from condlr.attacks.base import Attack, correct
from condlr.attacks.fgsm import Fgsm
from condlr.attacks.pgd import Pgd
from condlr.data.base import Images
from condlr.evaluation import evaluate, evaluating


def crosscheck(
    model: nn.Module, images: Images, strengths: Sequence[float], steps: int = 40
) -> Iterator[dict[str, Any]]:
    """FGSM and PGD of both libraries, with as many steps and one start each, on all of `images`.

    PGD's steps are as long as each library has them: there eps / 30, here eps / 16 for 40 steps.

    Args:
        model: whose images are in [0, 1].
        images: attacked in one batch.
        strengths: of the maximum norm; a Euclidean ball has sqrt(d) / 5 times that radius, d the pixels.
        steps: of PGD.

    Yields:
        attack, norm, eps, n, ours and foolbox (accuracies), largest_difference (of two pixels, for FGSM).

    Raises:
        UserError: foolbox is not installed.
    """
    if find_spec("foolbox") is None:
        raise UserError("the cross-check needs the package foolbox: pip install 'condlr[attacks]'")
    foolbox: Any = import_module("foolbox")
    ((pixels, labels),) = images.batches(len(images))
    euclidean = pixels[0].numel() ** 0.5 / 5
    with evaluating(model):
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=pixels.device)

        def theirs(attack: Any, eps: float) -> Tensor:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                return attack(wrapped, pixels, labels, epsilons=eps)[1]

        def row(attack: Attack, other: Any) -> dict[str, Any]:
            (ours,), moved = evaluate(model, images, attack, len(images)), theirs(other, attack.eps[0])
            with torch.no_grad():
                left = share_of(correct(model, moved, labels))
            found = {key: ours[key] for key in ("attack", "norm", "eps", "n")}
            found |= {"ours": ours["accuracy"], "foolbox": left, "largest_difference": None}
            if isinstance(attack, Fgsm):
                (made,) = attack.perturb(model, pixels, labels)
                found["largest_difference"] = (made.images - moved).abs().max().item()
            return found

        library: Any = foolbox.attacks
        for eps in strengths:
            yield row(Fgsm([eps]), library.LinfFastGradientAttack(random_start=False))
        for eps in strengths:
            linf, l2 = library.LinfProjectedGradientDescentAttack, library.L2ProjectedGradientDescentAttack
            for loss in ("ce", "margin"):
                yield row(Pgd([eps], steps=steps, loss=loss), linf(steps=steps))
                yield row(Pgd([eps * euclidean], norm="l2", steps=steps, loss=loss), l2(steps=steps))
