"""Theorem 1 and measured errors: a figure and a page, from the rows of `theory.theorem1.errors`."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from condlr.report.markdown import piped

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Algorithm 1 with and without its band often coincide, so one line is thin and the other broad.
_STYLES = {
    "vanilla": ("U Vᵀ descent", {"color": "#D55E00", "marker": "^"}),
    "unbanded": ("Algorithm 1 without band", {"color": "#56B4E9", "linewidth": 3.2}),
    "condlr": ("Algorithm 1", {"color": "#0072B2", "marker": "o"}),
    "exact": ("exact flow (5)", {"color": "#000000", "marker": "s", "markersize": 2.2}),
}
_ONE = {"color": "0.35", "linestyle": (0, (4, 1.5)), "linewidth": 1.0}
_ALL = {"color": "0.35", "linestyle": (0, (1, 1.2)), "linewidth": 1.2}
_TITLES = {"rotation": "gradient −W′(t), rotating bases", "descent": "gradient flow of a convex quadratic"}
# Errors include rounding and, for the exact flow, its substeps: bounds are compared with some tolerance.
_ROUNDING = 1 + 1e-9


LEAD = (
    "Theorem 1 of the paper (arXiv 2306.01485): if W′ = −∇L(W) stays within E(t), ‖E′‖ ≤ η, of matrices of "
    "rank r whose singular values lie in the band, then after k steps of Algorithm 1 with a learning rate "
    "λ ≤ λ* the error ‖UₖSₖVₖᵀ − W(kλ)‖ is at most 3λη. Its proof is of one interval of length λ and of the "
    "exact low-rank flow (5). Here W(t) is known in closed form, and the error is measured."
)
_LEGEND = (
    "η, μ: the largest ‖E′‖ and ‖∇L(W(t))‖. σ_r: the smallest singular value of the low-rank trajectory. "
    "λ* = σ_r / (4√(2μη)). exact: the worst error of the exact flow (5) over 3kλη. The last three: "
    "the largest learning rate up to which Algorithm 1 keeps within the bound, in one step, and in all "
    "steps to the horizon; a dash: at none that was tried."
)


def figure(frame: pd.DataFrame, out: Path) -> Iterator[Path]:
    """Error against learning rate after one step and at the horizon, and where the band is left.

    Only the middle eta is drawn. Shaded: learning rates or singular values outside the assumptions of
    Theorem 1. Dotted vertical line: the largest learning rate up to which one step of Algorithm 1 is within
    3 lambda eta. The files are `theorem1.png` and `.pdf`; a number follows the name for a second flow.
    """
    # Imported here, because the table of the same rows needs no matplotlib
    from matplotlib import pyplot as plt

    from condlr.report._style import WIDTH, saved, style

    etas = sorted(frame["eta"].unique())
    drawn = frame[frame["eta"].eq(etas[len(etas) // 2])]
    for number, (flow, part) in enumerate(drawn.groupby("flow", sort=False), start=1):
        rate, weak = part[part["sweep"].eq("rate")], part[part["sweep"].eq("weak")]
        with style():
            count = 3 if len(weak) else 2
            fig, axes = plt.subplots(1, count, figsize=(WIDTH, 3.0), layout="constrained", sharey=True)
            _rates(axes[0], rate[rate["steps"].eq(1)])
            axes[0].set(title="one step", ylabel="‖UₖSₖVₖᵀ − W(kλ)‖")
            _rates(axes[1], _at_horizon(rate))
            axes[1].set_title(f"k steps, to kλ = {rate['time'].max():g}")
            if len(weak):
                _weak(axes[2], _at_horizon(weak))
            eta = part["eta_measured"].max()
            fig.suptitle(f"{_TITLES[flow]}, ‖E′‖ ≤ η = {eta:.3g}")
            entries = dict(zip(*axes[1].get_legend_handles_labels()[::-1], strict=True))
            entries |= dict(zip(*axes[0].get_legend_handles_labels()[::-1], strict=True))
            fig.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=4)
            yield from saved(fig, out, "theorem1", number)


def markdown(frame: pd.DataFrame) -> str:
    """A line for each flow and eta, and sentences on where the bound holds."""
    header = (
        "flow", "η", "μ", "σ_r", "λ*", "exact / 3kλη", "one step ≤ 3λη", "k steps ≤ 3kλη", "k steps ≤ 3λη",
    )  # fmt: skip
    lines = []
    rates = frame[frame["sweep"].eq("rate")]
    for (flow, _), part in rates.groupby(["flow", "eta"], sort=False):
        own = part[part["integrator"].eq("condlr")]
        exact = part[part["integrator"].eq("exact")]
        one, end = own[own["steps"].eq(1)], _at_horizon(own[own["steps"].gt(1)])
        known = part.iloc[0]
        lines.append([
            flow, *(f"{known[key]:.3g}" for key in ("eta_measured", "mu", "sigma_min", "lambda_limit")),
            f"{(exact['error'] / exact['bound_all']).max():.2f}",
            _largest(one, "bound_one"), _largest(end, "bound_all"), _largest(end, "bound_one"),
        ])  # fmt: skip
    findings = "\n".join(f"- {words}" for words in _findings(frame))
    return f"{piped(header, lines, left=(0,))}\n\n{_LEGEND}\n\n{findings}\n"


def _findings(frame: pd.DataFrame) -> list[str]:
    rates = frame[frame["sweep"].eq("rate")]
    exact, own = (rates[rates["integrator"].eq(name)] for name in ("exact", "condlr"))
    # The exact flow has no learning rate: each time counts as one case
    solutions = exact.drop_duplicates(["flow", "eta", "time"])
    printed, own_printed = exact[exact["within"]], own[own["within"]]
    several = own_printed[own_printed["steps"].gt(1)]
    sentences = [
        "The exact solution of (5), of which the proof speaks, is within 3kλη of W(kλ) in "
        f"{_share(solutions[solutions['within_all']], 'bound_all')} with kλ ≤ λ*, and in "
        f"{_share(solutions[~solutions['within_all']], 'bound_all')} beyond.",
        "As printed, for λ ≤ λ* and any k > 1 steps within 3λη, the theorem holds for the exact solution in "
        f"{_share(printed[printed['steps'].gt(1)], 'bound_one')} and for Algorithm 1 in "
        f"{_share(several, 'bound_one')}.",
        "One step of Algorithm 1 with λ ≤ λ* is within 3λη in "
        f"{_share(own_printed[own_printed['steps'].eq(1)], 'bound_one')}, and k > 1 steps are within 3kλη in "
        f"{_share(several, 'bound_all')}: elsewhere the error of its explicit steps is more than the bound.",
    ]
    out = frame[frame["sweep"].eq("weak") & ~frame["in_band"]]
    if len(out):
        shares = (
            f"{text} in {_share(_at_horizon(out[out['integrator'].eq(name)]), 'bound_all')}"
            for name, (text, _) in reversed(_STYLES.items())
        )
        sentences.append(
            "Where σ_r of the low-rank trajectory leaves the band on the way, the errors at the horizon are "
            f"within 3kλη for {', '.join(shares)}; λ* is then as small as {out['lambda_limit'].min():.2g}."
        )
    return sentences


def _share(rows: pd.DataFrame, bound: str) -> str:
    """`3 of 4 cases (worst 1.2 times the bound)`."""
    if not len(rows):
        return "none of no cases"
    worst = (rows["error"] / rows[bound]).max()
    return f"{int(_holds(rows, bound).sum())} of {len(rows)} cases (at worst {_plain(worst)} times the bound)"


def _plain(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:,.0f}"


def _largest(rows: pd.DataFrame, bound: str) -> str:
    """The largest learning rate up to which the bound always holds; a dash if it never does."""
    rows = rows.sort_values("learning_rate")
    held = rows[_holds(rows, bound).cummin()]
    return f"{held['learning_rate'].iloc[-1]:.3g}" if len(held) else "–"


def _holds(rows: pd.DataFrame, bound: str) -> pd.Series:
    return pd.Series(rows["error"] <= rows[bound] * _ROUNDING)


def _at_horizon(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.loc[rows["time"].eq(rows["time"].max())]


def _rates(axes: "Axes", rows: pd.DataFrame) -> None:
    _lines(axes, rows, "learning_rate")
    at = rows.drop_duplicates("learning_rate").sort_values("learning_rate")
    limit, low, high = at["lambda_limit"].iloc[0], at["learning_rate"].min(), at["learning_rate"].max()
    axes.set_xlim(low / 1.3, high * 1.3)
    if limit < high:
        axes.axvspan(limit, high * 1.3, color="0.88", linewidth=0, label="λ > λ*, or out of the band")
    largest = _largest(rows[rows["integrator"].eq("condlr")], "bound_one")
    if largest != "–" and at["steps"].max() == 1:
        look = {"color": "#0072B2", "linestyle": ":", "linewidth": 0.9}
        axes.axvline(float(largest), label="last λ: Algorithm 1 ≤ 3λη", **look)
    axes.set_xlabel("learning rate λ")


def _weak(axes: "Axes", rows: pd.DataFrame) -> None:
    _lines(axes, rows, "sigma_min")
    low, high = rows["sigma_min"].min() / 1.3, rows["sigma_min"].max() * 1.3
    axes.set_xlim(low, high)
    inner, outer = (rows.loc[rows["in_band"].eq(inside), "sigma_min"] for inside in (True, False))
    if len(outer):
        # The band's edge lies between the last singular value out of it and the first in it
        edge = (outer.max() * inner.min()) ** 0.5 if len(inner) else high
        axes.axvspan(low, edge, color="0.88", linewidth=0)
    axes.set_title(f"σᵣ falls on the way, λ = {rows['learning_rate'].iloc[0]:.2g}")
    axes.set_xlabel("smallest singular value σᵣ on the way")


def _lines(axes: "Axes", rows: pd.DataFrame, x: str) -> None:
    for name, (text, look) in _STYLES.items():
        line = rows[rows["integrator"].eq(name)].sort_values(x)
        axes.plot(line[x], line["error"], label=text, **look)
    at = rows.drop_duplicates(x).sort_values(x)
    axes.plot(at[x], at["bound_one"], label="3λη", **_ONE)
    if at["steps"].max() > 1:
        axes.plot(at[x], at["bound_all"], label="3kλη", **_ALL)
    axes.set(xscale="log", yscale="log")
