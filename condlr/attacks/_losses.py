"""Losses that an iterated attack maximises. Each maps (n, classes) logits and (n,) labels to (n,) values.

`margin` and `dlr` are positive exactly for misclassified images, and 0 in a tie; the others are positive
already a little before.
"""

from collections.abc import Callable

from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


def ce(logits: Tensor, labels: Tensor) -> Tensor:
    """The log-odds against y, log sum_{j != y} e^{z_j} - z_y: the cross-entropy without saturation.

    The cross-entropy is log(1 + e^l) of this l, and its gradient is (1 - p_y) times the gradient of l, so the
    direction is the same. But in float32 1 - p_y is exactly 0 from a margin of 18 on, and the p_j from 104
    on; then an attack on the cross-entropy does not move. With tiny logits l weights all wrong classes
    equally, which makes a weak attack.
    """
    true, others = _split(logits, labels)
    return others.logsumexp(1) - true


def ce_rescaled(logits: Tensor, labels: Tensor) -> Tensor:
    """`ce` of each image's logits, rescaled so that the largest and the smallest are 20 apart.

    The factor is constant in the gradient. So the weights of the wrong classes do not depend on the scale of
    a network's logits. With large logits, `ce` sees only the strongest wrong class.
    """
    held = logits.detach()
    largest = held.amax(1, keepdim=True)
    spread = (largest - held.amin(1, keepdim=True)).clamp_min(1e-30)  # 20 / spread stays finite
    return ce((logits - largest) * (20 / spread), labels)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """max_{j != y} z_j - z_y (Carlini and Wagner, S&P 2017, f_6 without its floor)."""
    true, others = _split(logits, labels)
    return others.amax(1) - true


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """The difference of logits ratio (Croce and Hein, ICML 2020, eq. 6), for three classes or more.

    (max_{j != y} z_j - z_y) / (z_(1) - z_(3)), where z_(i) is the i-th largest logit: a margin that does not
    depend on shift and scale of the logits. It is constant, without a gradient, if the true class is third.
    """
    if logits.shape[1] < 3:
        raise ValueError("loss=dlr needs three classes or more: use margin")
    ordered = logits.sort(1, descending=True).values
    return margin(logits, labels) / (ordered[:, 0] - ordered[:, 2] + 1e-12)


LOSSES: dict[str, Loss] = {"ce": ce, "margin": margin, "dlr": dlr, "ce_rescaled": ce_rescaled}
# Titles of the losses, which tables append to the attack's name.
LOSS_TITLES = {
    "ce": "", "margin": " on the margin", "dlr": " on DLR", "ce_rescaled": " on rescaled logits",
}  # fmt: skip


def _split(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The true class's logits, (n,), and all logits with -inf for the true class, (n, classes)."""
    own = labels.unsqueeze(1)
    return logits.gather(1, own).squeeze(1), logits.scatter(1, own, float("-inf"))
