"""Tables of accuracy under attack: for the terminal, Markdown, LaTeX and CSV."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table as RichTable

from condlr.report.results import CONTEXT, ROW, published, setting, summarize, title


@dataclass(frozen=True)
class Cell:
    """An accuracy: ours, its spread over seeds, and the published one."""

    eps: float
    accuracy: float
    std: float
    published: float | None
    best: bool

    @property
    def ours(self) -> str:
        """In percent, with +- where there are several seeds."""
        spread = "" if pd.isna(self.std) else f" ±{100 * self.std:.2f}"
        return f"{100 * self.accuracy:.2f}{spread}"

    @property
    def paper(self) -> str:
        """The published value in percent, or nothing."""
        return "" if self.published is None else f"{100 * self.published:.2f}"


@dataclass(frozen=True)
class Line:
    """A row of a table."""

    label: str
    facts: dict[str, str]
    cells: list[Cell]
    compression: float = 0.0


@dataclass(frozen=True)
class Table:
    """What all formats show: rows in groups of one compression, the best of each group marked."""

    context: dict[str, object]
    lines: list[Line] = field(default_factory=list)

    @property
    def caption(self) -> str:
        """What the rows share."""
        attack = f"{str(self.context['attack']).upper()} ({str(self.context['norm']).replace('linf', 'ℓ∞')})"
        return f"{setting(self.context)}: accuracy (%) under {attack}"

    @property
    def has_published(self) -> bool:
        """Whether any cell has a published value."""
        return any(cell.published is not None for line in self.lines for cell in line.cells)

    @property
    def groups(self) -> list[list[Line]]:
        """The lines, split where the compression changes."""
        groups: dict[float, list[Line]] = {}
        for line in self.lines:
            groups.setdefault(line.compression, []).append(line)
        return list(groups.values())


def tables(cells: pd.DataFrame, paper: Path) -> Iterator[Table]:
    """A table for each combination of dataset, model, protocol, epochs and attack in a study.

    Args:
        cells: see `condlr.report.results.read`.
        paper: the directory of published numbers.
    """
    for context, frame in summarize(cells).groupby(CONTEXT, sort=False, dropna=False):
        known = dict(zip(CONTEXT, context, strict=True))
        compare = published(paper, known["dataset"], known["model"]) if known["attack"] == "fgsm" else {}
        best = frame.groupby(["compression", "eps"])["accuracy"].transform("max").eq(frame["accuracy"])
        lines = []
        for (label, compression, _), row in frame.assign(best=best).groupby(ROW, sort=False):
            row_cells = [
                Cell(c.eps, c.accuracy, c.std, compare.get((label, compression, c.eps)), c.best)
                for c in row.itertuples()
            ]
            lines.append(Line(title(label), _facts(row.iloc[0], compression), row_cells, compression))
        yield Table(known, lines)


def _facts(row: pd.Series, compression: float) -> dict[str, str]:
    return {
        "requested": f"{100 * compression:g}",
        "measured": f"{100 * row['train_compression']:.1f}",
        "deployed": f"{100 * row['deploy_compression']:.1f}",
        "cond": _number(row["cond"]),
        "cond all": _number(row["cond_all"]),
        "seeds": f"{row['seeds']}",
        "s": f"{row['seconds']:.0f}",
    }


def _number(value: float) -> str:
    return f"{value:.3g}" if value >= 10 else f"{value:.2f}"


def print_table(table: Table, console: Console) -> None:
    """To a terminal: the published value stands below ours."""
    view = RichTable(title=table.caption, title_justify="left", box=None, pad_edge=False, header_style="bold")
    view.add_column("row", no_wrap=True)
    for name in table.lines[0].facts:
        view.add_column(name, justify="right")
    for cell in table.lines[0].cells:
        view.add_column(f"ε={cell.eps:g}" if cell.eps else "clean", justify="right", no_wrap=True)
    for group in table.groups:
        for line in group:
            ours = [f"[bold]{cell.ours}[/]" if cell.best else cell.ours for cell in line.cells]
            view.add_row(line.label, *line.facts.values(), *ours)
            if any(cell.published is not None for cell in line.cells):
                paper = [f"[dim]{cell.paper}[/]" for cell in line.cells]
                view.add_row("[dim]  published[/]", *[""] * len(line.facts), *paper)
        view.add_section()
        view.add_row()
    console.print(view)
    console.print(LEGEND, style="dim", highlight=False)


LEGEND = (
    "requested, measured, deployed: compression (%) asked for, of the weights trained, and of the exported "
    "network. cond: largest condition number of the factored layers (of all layers where none is); "
    "cond all: of all layers, the dense classifier among them. s: seconds of training. "
    "Bold: best of its compression."
)


def markdown(table: Table) -> str:
    """As Markdown: a column of published values beside ours."""
    header, rows = _flat(table, lambda cell: f"**{cell.ours}**" if cell.best else cell.ours)
    lines = [f"**{table.caption}**", "", _pipe(header), _pipe(["---", *["---:"] * (len(header) - 1)])]
    return "\n".join([*lines, *map(_pipe, rows), "", LEGEND]) + "\n"


def latex(table: Table) -> str:
    """As LaTeX: a `tabular` in a `table`, for the packages booktabs and graphicx."""

    def bold(cell: Cell) -> str:
        text = cell.ours.replace("±", r"$\pm$")
        return rf"\textbf{{{text}}}" if cell.best else text

    header, _ = _flat(table, bold)
    lines = [
        r"\begin{table}", r"\centering\small", rf"\caption{{{_tex(table.caption)}.}}",
        r"\resizebox{\textwidth}{!}{%",
        rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}", r"\toprule",
        " & ".join(map(_tex, header)) + r" \\",
    ]  # fmt: skip
    for group in table.groups:
        lines.append(r"\midrule")
        for row in _flat(Table(table.context, group), bold, table.has_published)[1]:
            lines.append(" & ".join([_tex(row[0]), *row[1:]]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}}", r"\end{table}"]) + "\n"


def frame(table: Table) -> pd.DataFrame:
    """As data: a line for each cell, fractions and not percent."""
    return pd.DataFrame(
        table.context
        | {"row": line.label, "compression": line.compression, "eps": cell.eps}
        | {"accuracy": cell.accuracy, "std": cell.std, "published": cell.published, "best": cell.best}
        for line in table.lines
        for cell in line.cells
    )


def _flat(table: Table, show, paper: bool | None = None) -> tuple[list[str], list[list[str]]]:
    """Header and rows of text, with a `paper` column beside each eps where anything was published."""
    paper = table.has_published if paper is None else paper
    header = ["row", *table.lines[0].facts]
    for cell in table.lines[0].cells:
        header += [f"ε={cell.eps:g}" if cell.eps else "clean", *(["paper"] if paper else [])]
    rows = []
    for line in table.lines:
        row = [line.label, *line.facts.values()]
        for cell in line.cells:
            row += [show(cell), *([cell.paper] if paper else [])]
        rows.append(row)
    return header, rows


def _pipe(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


_TEX = {"%": r"\%", "_": r"\_", "ε": r"$\varepsilon$", "τ": r"$\tau$", "ℓ∞": r"$\ell_\infty$"}


def _tex(text: str) -> str:
    for plain, escaped in _TEX.items():
        text = text.replace(plain, escaped)
    return text
