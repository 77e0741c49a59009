"""What the analyses of networks found: conditioning, guarantees, cost; for the terminal and as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from condlr.report.numbers import shown
from condlr.report.results import order, pipe, run_title

_LAYERS = ("cond_S", "cond_matrix", "norm", "norm_circular", "cond_circular", "norm_padded", "norm_bound")
_LAYERS += ("cond_padded",)
_COSTS = {
    "train_weights": "weights", "train_flops": "FLOPs an image", "train_state_bytes": "state, bytes",
    "train_peak_bytes": "peak, bytes", "deploy_weights": "exported: weights",
    "deploy_flops": "exported: FLOPs an image", "deploy_peak_bytes": "exported: peak, bytes",
}  # fmt: skip

CONDITIONING_LEGEND = (
    "cond S: of the factor that a method constrains. matrix: of the weight, kernels as out × (in·kh·kw). "
    "circular: of the convolution of a periodic image, exact by FFT. padded: as the network computes it, the "
    "norm by iteration, ≤ bound, the condition number from all singular values. Condition numbers leave out "
    "the null space that a layer's rank makes certain; a dash: not computed, or not for this kind of layer."
)


def print_rows(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], console: Console) -> None:
    """To a terminal: rows with these columns."""
    view = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        number = isinstance(rows[0][name], int | float) or rows[0][name] is None
        view.add_column(
            name.replace("_", " "), justify="right" if number else "left", overflow="fold", no_wrap=number
        )
    for row in rows:
        view.add_row(*(shown(row[name]) for name in columns))
    console.print(view, highlight=False)


def print_conditioning(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """To a terminal: a line for each layer."""
    print_rows(rows, ("layer", "rank", *_LAYERS), console)


def print_guarantees(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """To a terminal: a line for each quantity."""
    print_rows(rows, ("quantity", "value", "note"), console)


def print_cost(row: Mapping[str, Any], console: Console) -> None:
    """To a terminal: a line for each count, and what part of the dense network's it is."""
    rows = [
        {"count": text, "this network": row[key], "of the dense one": row[f"{key}_ratio"]}
        for key, text in _COSTS.items()
    ]
    print_rows(rows, ("count", "this network", "of the dense one"), console)


def conditioning(frame: pd.DataFrame) -> str:
    """As Markdown: a line for each run and layer."""
    header = ["run", "layer", "n × m", "rank", *(name.replace("_", " ") for name in _LAYERS)]
    rows = [
        [run_title(row), row["layer"], f"{row['n']} × {row['m']}", shown(row["rank"])]
        + [shown(row[name]) for name in _LAYERS]
        for row in _ordered(frame)
    ]
    return f"**Conditioning of the layers**\n\n{_markdown(header, rows)}\n\n{CONDITIONING_LEGEND}\n"


def guarantees(frame: pd.DataFrame) -> str:
    """As Markdown: a line for each quantity, a column for each run; and what the first run notes of it."""
    rows = _ordered(frame)
    runs = list(dict.fromkeys(row["run_id"] for row in rows))
    names = {row["run_id"]: run_title(row) for row in rows}
    values = {(row["quantity"], row["run_id"]): shown(row["value"]) for row in rows}
    notes = {row["quantity"]: row["note"] for row in reversed(rows)}
    quantities = dict.fromkeys(row["quantity"] for row in rows)
    table = [[q, *(values.get((q, run), "–") for run in runs), str(notes[q])] for q in quantities]
    body = _markdown(["quantity", *(names[run] for run in runs), f"note ({names[runs[0]]})"], table)
    return f"**What is measured and what can be proved of the networks**\n\n{body}\n"


def cost(frame: pd.DataFrame) -> str:
    """As Markdown: a line for each run, each count with its part of the dense network's."""
    rows = [
        [run_title(row), *(f"{shown(row[key])} ({row[f'{key}_ratio']:.2f})" for key in _COSTS)]
        for row in _ordered(frame)
    ]
    note = (
        "In brackets: the part of the dense network's. Peaks are of a step, and of a forward pass, at batch "
    )
    sizes = ", ".join(map(str, sorted(frame["batch_size"].unique())))
    body = _markdown(["run", *_COSTS.values()], rows)
    return f"**What the networks cost, counted**\n\n{body}\n\n{note}{sizes}.\n"


def _ordered(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows, by run in the order of the tables."""
    placed = frame.assign(_place=order(frame["label"]))
    keys = ["compression", "_place", "label", "seed", "run_id"]
    return placed.sort_values(keys, kind="stable").to_dict("records")


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(map(pipe, (header, ["---"] * len(header), *rows)))
