"""What an iterated attack climbs. Each is (n, classes) logits and (n,) labels -> (n,) values to be large.

`margin` and `dlr` are positive where the image is misclassified, 0 in a tie; the others also a little before.
"""

from collections.abc import Callable

from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


def ce(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy without its saturation: log sum_{j != y} e^{z_j} - z_y, the log-odds against y.

    It does not suffer from large logits; with tiny ones it weighs all wrong classes alike, which is weak.

    The cross-entropy is log(1 + e^l) of this l, and its gradient (1 - p_y) times that of l: the same
    direction. But in float32 1 - p_y is exactly 0 from a margin of 18 on, the p_j from 104 on: an attack on
    the cross-entropy itself then stands still.
    """
    true, others = _split(logits, labels)
    return others.logsumexp(1) - true


def ce_rescaled(logits: Tensor, labels: Tensor) -> Tensor:
    """`ce` of each image's logits, multiplied by what sets the largest and the smallest of them 20 apart.

    The factor is held constant. So the loss weighs the wrong classes alike in all networks, whatever the
    scale that training gave their logits; with large ones `ce` looks at the strongest wrong class alone.
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

    (max_{j != y} z_j - z_y) / (z_(1) - z_(3)), where z_(i) is the i-th largest logit: the margin, in units
    that neither shift nor scale of the logits changes. It is constant, without a gradient, where the true
    class is third.
    """
    if logits.shape[1] < 3:
        raise ValueError("loss=dlr needs three classes or more: take margin")
    ordered = logits.sort(1, descending=True).values
    return margin(logits, labels) / (ordered[:, 0] - ordered[:, 2] + 1e-12)


LOSSES: dict[str, Loss] = {"ce": ce, "margin": margin, "dlr": dlr, "ce_rescaled": ce_rescaled}
# What tables add to the name of an attack that climbs it.
LOSS_TITLES = {
    "ce": "", "margin": " on the margin", "dlr": " on DLR", "ce_rescaled": " on rescaled logits",
}  # fmt: skip


def _split(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The true class's logits, (n,), and the others, (n, classes) with -inf in the true one's place."""
    own = labels.unsqueeze(1)
    return logits.gather(1, own).squeeze(1), logits.scatter(1, own, float("-inf"))
