"""Claims as pictures: a dot with an interval for each row, a vertical line for each reference row."""

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.axes import Axes

from condlr.report import _style
from condlr.report._style import WIDTH, Drawing, Drawn
from condlr.report.evidence import Claim, Comparison, Mean, places
from condlr.report.titles import Known, colour

LEGEND = (
    "Dots: mean accuracy over seeds; bars: two standard errors, where they are known. Hollow, dashed and "
    "shaded: what the other rows are compared with (the dashed line less what a row may lose)."
)
# A picture of one setting, and the columns of a picture of several.
_NARROW, _COLUMNS = 4.6, 3


def verdicts(claims: Sequence[Sequence[Claim]], out: Path) -> Iterator[Drawing]:
    """A figure for each claim, a panel for each setting of it."""
    tables = (({"settings": ""}, made) for made in claims)
    return _style.drawings(out, "claims", tables, _draw)


def _draw(_: Known, claims: Sequence[Claim]) -> Drawn:
    names = [*{mean.name: None for claim in claims for mean in _rows(claim)}]
    shared, own = places(claims)
    columns = min(len(claims), _COLUMNS)
    height = 0.55 + 0.15 * len(names)
    width = _NARROW if len(claims) == 1 else WIDTH
    figure, axes = _style.panels(len(claims), columns, height, width, sharey=True)
    for axis, claim, where in zip(axes, claims, own, strict=True):
        _panel(axis, claim, names)
        axis.set_title(f"{textwrap.fill(where, 34 if columns > 2 else 50)}\n{claim.verdict}".lstrip())
        axis.locator_params(axis="x", nbins=7 if columns == 1 else 4)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    caption = ", ".join(filter(None, [claims[0].title, shared])) + f". {LEGEND}".removesuffix(".")
    return Drawn(figure, caption, title=textwrap.fill(shared, 70))


def _rows(claim: Claim) -> list[Mean]:
    """The rows of a claim, by compression; reference rows come first."""
    means = {mean.name: mean for pair in claim.comparisons for mean in (pair.left, pair.right)}
    against = {_reference(pair).name for pair in claim.comparisons}
    return sorted(means.values(), key=lambda mean: (mean.compression, mean.name not in against))


def _reference(pair: Comparison) -> Mean:
    """The reference row of a comparison: the dense row, if there is one."""
    return pair.left if pair.right.compression > 0 == pair.left.compression else pair.right


def _panel(axes: Axes, claim: Claim, names: Sequence[str]) -> None:
    places = {name: place for place, name in enumerate(names)}
    for mean in _rows(claim):
        pairs = [pair for pair in claim.comparisons if _reference(pair) == mean]
        drawn, place = colour(mean.label) or "0.4", places[mean.name]
        axes.errorbar(
            mean.value, place, xerr=mean.margin, fmt="o", color=drawn, markersize=4, elinewidth=1.1,
            markerfacecolor="white" if pairs else drawn, capsize=2,
        )  # fmt: skip
        if pairs:
            at = mean.value - pairs[0].slack
            ends = [place, *(places[side.name] for pair in pairs for side in (pair.left, pair.right))]
            span = min(ends) - 0.4, max(ends) + 0.4
            axes.vlines(at, *span, color=drawn, linewidth=0.9, linestyle="--")
            if not pairs[0].slack and mean.margin == mean.margin:
                low, high = mean.value - mean.margin, mean.value + mean.margin
                axes.fill_betweenx(span, low, high, color=drawn, alpha=0.08, linewidth=0)
    _style.percent(axes.xaxis)
