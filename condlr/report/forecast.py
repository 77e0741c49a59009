"""A sweep's estimate for the terminal."""

from rich.console import Console
from rich.table import Table

from condlr.report.numbers import counted, duration
from condlr.report.titles import title
from condlr.suite.sweeps.estimate import Estimate


def print_estimate(estimate: Estimate, console: Console) -> None:
    """Print a line for each row that is not done, and the total."""
    rows = estimate.rows.values()
    runs, done, diverged = (sum(getattr(row, name) for row in rows) for name in ("runs", "done", "diverged"))
    lost = f", {diverged} diverged and left alone" if diverged else ""
    left = runs - done - diverged
    studies = ", ".join(estimate.studies)
    console.print(f"{studies}: {counted(runs, 'run')}, {done} done{lost}, {left} to do", highlight=False)
    if not left:
        return
    view = Table(box=None, pad_edge=False, header_style="bold")
    view.add_column("row", no_wrap=True)
    for name in ("compression", "left", "epochs", "s/epoch", "attacks", "s/attack", "time"):
        view.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        attacks = sum(count for count, _ in row.attacks.values())
        if attacks:
            view.add_row(
                title(row.label), f"{100 * row.compression:g} %", f"{row.runs - row.done - row.diverged}",
                f"{row.epochs}", f"{row.epoch:.1f}", f"{attacks}", f"{row.attacking / attacks:.1f}",
                duration(row.seconds),
            )  # fmt: skip
    console.print(view, highlight=False)
    for row in rows:
        if row.hopeless:
            name = f"{title(row.label)} {100 * row.compression:g} %"
            console.print(f"{name} diverges within seconds: try a smaller protocol.lr", highlight=False)
    total = duration(sum(row.seconds for row in rows))
    console.print(f"about {total} here ({estimate.device}), one run after the other", highlight=False)
