"""The benchmark as a table and as bars."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from condlr.report._style import saved, style
from condlr.report.markdown import piped

FORMS = {
    "dense": "dense", "cayley_sgd": "Cayley SGD", "projected_sgd": "projected SGD",
    "unconstrained": "U S Vᵀ, free", "condlr": "CondLR", "naive": "CondLR, naive",
}  # fmt: skip
_COLOURS = {
    "dense": "#000000", "cayley_sgd": "#E69F00", "projected_sgd": "#882255",
    "unconstrained": "#D55E00", "condlr": "#0072B2", "naive": "#999999",
}  # fmt: skip
_PARTS = ("forward_backward", "constraint", "step")
_RULES = {"params": "params", "released_code": "released code"}

HEADER = (
    "network", "ranks", "compression", "form", "fwd + bwd ms", "constraint ms", "step ms", "images/s",
    "peak MB", "of peak", "step ÷ dense", "÷ free", "naive ÷ step", "naive ÷ constraint",
)  # fmt: skip

# The columns of text.
LEFT = (0, 1, 3)

PENALTIES = ("penalty", "layers", "GFLOP", "ms", "of a step", "every j-th step for 10 %")


def table(rows: pd.DataFrame) -> list[list[str]]:
    """The cells of the table, a line for each form; the last four columns are ratios of medians."""
    lines = []
    parts = _by_part(rows)
    for _, line in parts.iterrows():
        steps = _steps_beside(parts, line)
        naive_constraint = steps.get("naive constraint")
        ours = line["form"] == "condlr"
        lines.append([
            line["network"], _RULES.get(line["rank_rule"], ""),
            "" if pd.isna(line["compression"]) else f"{100 * line['compression']:g} %", FORMS[line["form"]],
            *(_ms(line[part]) for part in _PARTS),
            f"{line['images_per_s']:,.0f}", f"{line['peak_mb']:,.0f}", f"{100 * line['share_of_peak']:.0f} %",
            f"{line['step'] / steps['dense']:.2f}",
            f"{line['step'] / steps['unconstrained']:.2f}" if ours else "",
            f"{steps['naive'] / line['step']:.1f}" if ours else "",
            f"{naive_constraint / line['constraint']:.1f}" if ours and naive_constraint else "",
        ])  # fmt: skip
    return lines


def markdown(lines: list[list[str]], facts: dict[str, Any]) -> str:
    """The table with its device and legend."""
    page = f"# {facts['device']}\n\n{piped(HEADER, lines, LEFT)}\n\n{legend(facts)}\n"
    if "penalties" in facts:
        page += f"\n{piped(PENALTIES, penalties(facts), left=(0,))}\n\n{penalties_legend(facts)}\n"
    return page


def penalties(facts: dict[str, Any]) -> list[list[str]]:
    """The cells of the table of penalties; its first line is the step itself."""
    lines = []
    for line in facts["penalties"]:
        options = ", ".join(f"{key}={_option(value)}" for key, value in line["options"].items())
        name = line["penalty"] or f"a step of ResNet-34, width {facts['penalties_width']}"
        lines.append([
            f"{name}, {options}" if options else name, str(line["layers"] or ""), f"{line['gflop']:.1f}",
            _ms(line["milliseconds"]), f"{line['share']:.3f}",
            str(max(1, math.ceil(line["share"] / 0.1))) if line["penalty"] else "",
        ])  # fmt: skip
    return lines


def penalties_legend(facts: dict[str, Any]) -> str:
    """How the penalties were measured."""
    return (
        f"Value and gradient of each penalty beside a step at batch {facts['batch_size']}; the fastest of "
        "the turns in one process. GFLOP: products and convolutions; eigenvalues are not counted. The "
        "last column is the `every` with which the penalty takes at most a tenth of the training."
    )


def _option(value: Any) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)


def legend(facts: dict[str, Any]) -> str:
    """The meaning of the columns, and how they were measured."""
    text = (
        f"Batch {facts['batch_size']}, {facts['precision']}; medians of {facts['repeats']} turns in one "
        "process. "
        "Of peak: the products and convolutions of a step against "
        f"{facts['peak_gflops']:,.0f} GFLOP/s, the rate of one large matrix "
        "product (a convolution may be faster). On the ranks of the released code CondLR takes that code's "
        "options, and computes what the naive form computes; on the others its own, which cost more. Cayley "
        "and projected SGD are those of the released code."
    )
    if "epoch_seconds" in facts:
        epoch, steps = facts["epoch_seconds"], facts["steps_seconds"]
        text += (
            "\n\nAn epoch of LeNet5 on the 60 000 images of MNIST (CondLR, 80 %): "
            f"{epoch:.2f} s, {epoch / steps:.2f} times its steps alone ({steps:.2f} s)."
        )
    if "checkpoint_seconds" in facts:
        history, checkpoint, spectrum = (facts[f"{k}_seconds"] for k in ("history", "checkpoint", "spectrum"))
        share = (history + checkpoint) / facts["epoch_seconds"]
        text += (
            f" Keeping the run at its end takes {1e3 * history:.0f} ms for the history (condition numbers, "
            f"audit, history.csv) and {1e3 * checkpoint:.0f} ms for the checkpoint, {share:.2%} of the "
            f"epoch; a run's spectra take {2e3 * spectrum:.0f} ms once."
        )
    if "collect_seconds" in facts:
        text += (
            f"\n\nCollecting {facts['collected_runs']:,} runs of {facts['collected_epochs']} epochs takes "
            f"{facts['collect_seconds']:.1f} s."
        )
    return text


def figure(rows: pd.DataFrame, facts: dict[str, Any], out: Path) -> Iterator[Path]:
    """A bar for each form, a panel for each network: `<device>.png` and `.pdf` in `out`."""
    parts = _by_part(rows)
    networks = list(dict.fromkeys(parts["network"]))
    with style():
        tallest = max((parts["network"] == network).sum() for network in networks)
        size = (7.0, 1.1 + 0.19 * tallest)
        panels, axes = plt.subplots(1, len(networks), figsize=size, layout="constrained", squeeze=False)
        for network, panel in zip(networks, axes[0], strict=True):
            _bars(panel, parts[parts["network"] == network])
            panel.set_title(network)
            panel.set_xlabel("milliseconds for a step")
        handles = [
            Patch(color=_COLOURS[form], label=FORMS[form]) for form in FORMS if form in set(parts["form"])
        ]
        handles.append(Patch(facecolor="white", edgecolor="0.3", hatch="////", label="of which constraint"))
        panels.legend(handles=handles, loc="outside lower center", ncols=len(handles))
        panels.suptitle(f"{facts['device']}, batch {facts['batch_size']}, {facts['precision']}")
        yield from saved(panels, out, facts["device"])


def _bars(axes: Axes, parts: pd.DataFrame) -> None:
    place, places, names = 0.0, [], []
    before = None
    for _, line in parts.iterrows():
        group = line["rank_rule"], line["compression"]
        place += 1.0 if before in (None, group) else 1.7
        before = group
        colour = _COLOURS[line["form"]]
        axes.barh(place, line["step"], color=colour, height=0.85)
        constraint = line["constraint"]
        if constraint == constraint:
            axes.barh(
                place, constraint, left=line["step"] - constraint, height=0.85, color=colour,
                edgecolor="white", hatch="////", linewidth=0,
            )  # fmt: skip
        axes.annotate(
            _ms(line["step"]), (line["step"], place), (3, 0), textcoords="offset points", va="center", size=6
        )
        places.append(place)
        rule = _RULES.get(line["rank_rule"], "")
        middle = line["form"] == "condlr"
        names.append(f"{100 * line['compression']:g} %, {rule}" if middle else "")
    axes.set_yticks(places, names)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 1.12 * parts["step"].max())


def _by_part(rows: pd.DataFrame) -> pd.DataFrame:
    """A line for each form, its parts as columns."""
    who = ["network", "rank_rule", "compression", "form"]
    milliseconds = rows.pivot_table("milliseconds", who, "part", sort=False, dropna=False)
    milliseconds = milliseconds.dropna(how="all").reindex(columns=[*_PARTS]).reset_index()
    steps = rows[rows["part"] == "step"].drop(columns=["part", "milliseconds", "tau"])
    return milliseconds.merge(steps, on=who)


def _steps_beside(parts: pd.DataFrame, line: pd.Series) -> dict[str, float]:
    """Milliseconds of a step, for the forms that `line` is compared with."""
    same = parts[parts["network"] == line["network"]]
    alike = same[(same["rank_rule"] == line["rank_rule"]) & (same["compression"] == line["compression"])]
    found = dict(zip(alike["form"], alike["step"], strict=True))
    found["dense"] = same.loc[same["form"] == "dense", "step"].iloc[0]
    naive = alike.loc[alike["form"] == "naive", "constraint"]
    return found if naive.empty else found | {"naive constraint": naive.iloc[0]}


def _ms(value: float) -> str:
    return "" if value != value else f"{value:.2f}" if value < 100 else f"{value:,.0f}"
