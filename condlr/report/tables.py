"""Tables of accuracy under attack: for the terminal, Markdown, LaTeX and CSV."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table as RichTable

from condlr.report.audit import Marks
from condlr.report.results import (
    CONTEXT,
    ROW,
    attack_title,
    comparison,
    epochs,
    network,
    norm_title,
    order,
    pipe,
    setting,
    summarize,
    title,
)

LEGEND = (
    "requested, measured, deployed: compression (%) asked for, of the weights trained, and of the exported "
    "network. cond: largest condition number of the factored layers (of all layers where none is); "
    "cond all: of all layers, the dense classifier among them. s: seconds of training. "
    "Bold: best of the rows of its compression."
)

TRAINING_LEGEND = (
    "loss: mean over the first epoch and over the last. cond: largest condition number at the end, as in the "
    "table of accuracies. orthonormality error: max |U^T U - I| (of V, or of the weight itself, alike), "
    "cond(S): both the largest of all layers and epochs, in float64; empty where a method promises neither."
)
_AUDITS = ("audit_orthonormality_error", "audit_cond_S")
_FORMS: tuple[Callable[[float], str], ...] = (lambda value: f"{value:.1e}", lambda value: f"{value:.6g}")

# What a narrow terminal does without, first to last.
_SPARE = ("cond all", "deployed", "s", "seeds", "measured", "requested")


@dataclass(frozen=True)
class Cell:
    """An accuracy: ours, its spread over seeds, and the published one."""

    accuracy: float
    std: float
    seeds: int
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
    """A row of a table; not every row was attacked at every strength."""

    label: str
    compression: float
    facts: dict[str, str]
    cells: dict[float, Cell]
    warnings: list[str] | None = None

    @property
    def name(self) -> str:
        """The label, marked if an audit warned."""
        return f"{self.label} †" if self.warnings else self.label


@dataclass(frozen=True)
class Table:
    """What all formats show: rows in groups of one compression, the best of each group marked."""

    context: dict[str, object]
    lines: list[Line] = field(default_factory=list)

    @property
    def caption(self) -> str:
        """What the rows share."""
        attack = f"{attack_title(str(self.context['attack']))} ({norm_title(str(self.context['norm']))})"
        images = f"{self.context['n']:,} images"
        return f"{setting(self.context)}: accuracy (%) under {attack}, {images}"

    @property
    def audit_note(self) -> str:
        """What audits say of the rows."""
        return audit_note(self.lines)

    @property
    def strengths(self) -> list[float]:
        """Every eps that any row has."""
        return sorted({eps for line in self.lines for eps in line.cells})

    @property
    def has_published(self) -> bool:
        """Whether any cell has a published value."""
        return any(cell.published is not None for line in self.lines for cell in line.cells.values())

    @property
    def groups(self) -> list[list[Line]]:
        """The lines, split where the compression changes."""
        groups: dict[float, list[Line]] = {}
        for line in self.lines:
            groups.setdefault(line.compression, []).append(line)
        return list(groups.values())


def audit_note(lines: Iterable[Line]) -> str:
    """One sentence or two: which rows an audit warned of, and which were not audited."""
    lines = list(lines)
    texts = {}
    for line in lines:
        compression = f" {100 * line.compression:g} %" if line.compression else ""
        texts[id(line)] = f"{line.label}{compression}"
    warned = [f"{texts[id(line)]} ({', '.join(line.warnings)})" for line in lines if line.warnings]
    missing = [texts[id(line)] for line in lines if line.warnings is None]
    if len(missing) == len(lines):
        return "No row was audited in this norm (audit=true): read these accuracies as upper bounds."
    note = (
        f"† not to be trusted, the audit warns: {'; '.join(warned)}."
        if warned
        else "The audit warns of no row."
    )
    return f"{note} Not audited: {', '.join(missing)}." if missing else note


def tables(cells: pd.DataFrame, paper: Path, marks: Marks | None = None) -> Iterator[Table]:
    """A table for each combination of dataset, model, protocol with its settings, and attack in a study.

    Args:
        cells: see `condlr.report.results.read`.
        paper: the directory of published numbers.
        marks: what audits warn of.
    """
    for context, frame in summarize(cells).groupby(CONTEXT, sort=False, dropna=False):
        known = dict(zip(CONTEXT, context, strict=True))
        compare = comparison(known, cells, paper)
        rivals = frame.groupby(["compression", "eps"])["accuracy"]
        best = rivals.transform("max").eq(frame["accuracy"]) & rivals.transform("size").gt(1)
        lines = []
        for (label, compression, row_id, variant), row in frame.assign(best=best).groupby(ROW, sort=False):
            row_cells = {
                c.eps: Cell(c.accuracy, c.std, c.seeds, compare.get((label, compression, c.eps)), c.best)
                for c in row.itertuples()
            }
            warnings = marks.of(row_id, str(known["norm"]), str(known["attack"])) if marks else None
            name = title(label, variant)
            lines.append(Line(name, compression, _facts(row, compression), row_cells, warnings))
        yield Table(known, lines)


def _facts(row: pd.DataFrame, compression: float) -> dict[str, str]:
    first, fewest, most = row.iloc[0], row["seeds"].min(), row["seeds"].max()
    return {
        "requested": f"{100 * compression:g}",
        "measured": _percent(first["train_compression"]),
        "deployed": _percent(first["deploy_compression"]),
        "cond": _number(first["cond"]),
        "cond all": _number(first["cond_all"]),
        "seeds": f"{most}" if fewest == most else f"{fewest}-{most}",
        "s": f"{first['seconds']:.0f}",
    }


def _percent(fraction: float) -> str:
    return f"{round(100 * fraction, 1) + 0.0:.1f}"  # + 0.0 makes -0.0 plain


def _number(value: float) -> str:
    return f"{value:.3g}" if value >= 10 else f"{value:.2f}"


def print_table(table: Table, console: Console) -> None:
    """To a terminal: the published value stands below ours.

    No number is ever cut: a narrow terminal gets fewer columns, and is told so.
    """
    facts, strengths = list(table.lines[0].facts), table.strengths
    for spare in _SPARE:
        if _width(table, facts, strengths) > console.width:
            facts.remove(spare)
    while _width(table, facts, strengths) > console.width and len(strengths) > 2:
        strengths = [*strengths[:-1:2], strengths[-1]]
    view = RichTable(box=None, pad_edge=False, header_style="bold")
    view.add_column("row", no_wrap=True)
    for name in facts:
        view.add_column(name, justify="right", no_wrap=True)
    for eps in strengths:
        view.add_column(_strength(eps), justify="right", no_wrap=True)
    for group in table.groups:
        for line in group:
            ours = [_shown(line, eps, lambda cell: f"[bold]{cell.ours}[/]") for eps in strengths]
            view.add_row(line.name, *(line.facts[name] for name in facts), *ours)
            if any(cell.published is not None for cell in line.cells.values()):
                paper = [f"[dim]{line.cells[eps].paper if eps in line.cells else ''}[/]" for eps in strengths]
                view.add_row("[dim]  published[/]", *[""] * len(facts), *paper)
        view.add_row()
    console.print(f"[bold]{table.caption}[/]\n[dim]{table.context['settings']}[/]\n", highlight=False)
    # Where even the narrowest table is too wide, lines run on rather than lose digits.
    width, console.width = console.width, max(console.width, _width(table, facts, strengths))
    console.print(view, highlight=False)
    console.width = width
    hidden = [
        *(set(table.lines[0].facts) - {*facts}),
        *(_strength(e) for e in table.strengths if e not in strengths),
    ]
    if hidden:
        console.print(f"Not shown for want of width: {', '.join(hidden)}.", style="dim", highlight=False)
    console.print(f"{table.audit_note}\n{LEGEND}\n", style="dim", highlight=False)


def _width(table: Table, facts: list[str], strengths: list[float]) -> int:
    """Characters that a terminal needs for these columns, two between each."""
    columns = [[line.name for line in table.lines] + ["  published"]]
    columns += [[name, *(line.facts[name] for line in table.lines)] for name in facts]
    columns += [
        [_strength(eps), *(_shown(line, eps, lambda cell: cell.ours) for line in table.lines)]
        for eps in strengths
    ]
    return sum(max(map(len, column)) + 2 for column in columns)


def _strength(eps: float) -> str:
    return f"ε={eps:g}" if eps else "clean"


def _shown(line: Line, eps: float, emphasise: Callable[[Cell], str]) -> str:
    """A cell's text, emphasised if it is the best; a dash where the row was not attacked so."""
    if eps not in line.cells:
        return "–"
    cell = line.cells[eps]
    return emphasise(cell) if cell.best else cell.ours


def markdown(table: Table) -> str:
    """As Markdown: a column of published values beside ours."""
    header, rows = _flat(table, lambda cell: f"**{cell.ours}**")
    lines = [f"**{table.caption}**", "", f"`{table.context['settings']}`", ""]
    lines += [pipe(header), pipe(["---", *["---:"] * (len(header) - 1)])]
    return "\n".join([*lines, *map(pipe, rows), "", table.audit_note, "", LEGEND]) + "\n"


def by_attack(made: list[Table]) -> Iterator["Comparison"]:
    """Attacks of one strength side by side, for each strength at which there are several.

    Args:
        made: see `tables`.
    """
    alike: dict[tuple[object, ...], list[Table]] = {}
    for table in made:
        shared = [name for name in CONTEXT if name not in ("attack", "n")]
        alike.setdefault(tuple(table.context[name] for name in shared), []).append(table)
    for group in alike.values():
        for eps in sorted({eps for table in group for eps in table.strengths} - {0.0}):
            among = [table for table in group if eps in table.strengths]
            if len({str(table.context["attack"]) for table in among}) > 1:
                yield Comparison(eps, sorted(among, key=lambda table: _mean(table, eps), reverse=True))


def _mean(table: Table, eps: float) -> tuple[int, float]:
    """For an order from many images to few, and from weak attacks to strong ones."""
    values = [line.cells[eps].accuracy for line in table.lines if eps in line.cells]
    return int(str(table.context["n"])), sum(values) / len(values)


@dataclass(frozen=True)
class Comparison:
    """What several attacks of one strength leave of each row."""

    eps: float
    tables: list[Table]

    @property
    def caption(self) -> str:
        """What the columns share."""
        context = self.tables[0].context
        norm = norm_title(str(context["norm"]))
        return f"{setting(context)}: accuracy (%) at ε={self.eps:g} ({norm}), by attack"

    @property
    def columns(self) -> list[str]:
        """The attacks, with the number of images."""
        return [f"{attack_title(str(t.context['attack']))} (n={t.context['n']})" for t in self.tables]

    @property
    def lines(self) -> list[tuple[Line, list[Line | None]]]:
        """Each row: itself, and what it is in each table, if it was attacked so."""
        known = [
            {(line.label, line.compression): line for line in table.lines if self.eps in line.cells}
            for table in self.tables
        ]
        first = {key: line for lines in reversed(known) for key, line in lines.items()}
        longest = max(known, key=len)
        keys = [*longest, *(key for key in first if key not in longest)]
        return [(first[key], [lines.get(key) for lines in known]) for key in keys]

    @property
    def audit_note(self) -> str:
        """What audits say of any of the attacks."""
        notes = {audit_note(table.lines): None for table in self.tables}
        return " ".join(notes)

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of text; an accuracy that an audit warns of is marked."""
        rows = [
            [line.label, f"{100 * line.compression:g}", *(self._shown(own) for own in under)]
            for line, under in self.lines
        ]
        return ["row", "requested", *self.columns], rows

    def _shown(self, line: Line | None) -> str:
        if line is None:
            return "–"
        return f"{line.cells[self.eps].ours}{' †' if line.warnings else ''}"


def markdown_by_attack(comparison: Comparison) -> str:
    """As Markdown."""
    header, rows = comparison.rows()
    lines = [f"**{comparison.caption}**", "", pipe(header), pipe(["---", *["---:"] * (len(header) - 1)])]
    return "\n".join([*lines, *map(pipe, rows), "", comparison.audit_note]) + "\n"


def print_by_attack(comparison: Comparison, console: Console) -> None:
    """To a terminal."""
    header, rows = comparison.rows()
    view = RichTable(box=None, pad_edge=False, header_style="bold")
    for name in header:
        view.add_column(name, justify="left" if name == "row" else "right", no_wrap=name == "row")
    for row in rows:
        view.add_row(*row)
    console.print(f"[bold]{comparison.caption}[/]\n", highlight=False)
    console.print(view, highlight=False)
    console.print(f"\n{comparison.audit_note}\n", style="dim", highlight=False)


def by_protocol(made: list[Table]) -> str:
    """As Markdown: what each protocol gives for a row, and the published value, side by side.

    For tables of one network, dataset and number of epochs under FGSM; a part for each of these that
    has several protocols, at four strengths at most. Empty where none has.
    """
    alike: dict[tuple[object, ...], list[Table]] = {}
    for table in made:
        if str(table.context["attack"]).startswith("fgsm"):
            key = tuple(table.context[name] for name in ("dataset", "model", "epochs", "norm", "n"))
            alike.setdefault(key, []).append(table)
    # Two tables of one protocol, which differ in a setting, would be columns of one name.
    comparable = [
        group
        for group in alike.values()
        if len({table.context["protocol"] for table in group}) == len(group) > 1
    ]
    return "\n".join(map(_side_by_side, comparable))


def _side_by_side(group: list[Table]) -> str:
    protocols = [str(table.context["protocol"]) for table in group]
    known = [{(line.label, line.compression): line for line in table.lines} for table in group]
    # The rows of the longest table, in its order, then what only others have.
    keys = list(dict.fromkeys(key for lines in sorted(known, key=len, reverse=True) for key in lines))
    strengths = _four(sorted({eps for table in group for eps in table.strengths}))
    header = ["row", "requested"]
    for eps in strengths:
        header += [f"{_strength(eps)} {protocols[0]}", *protocols[1:], "published"]
    rows = []
    for key in keys:
        row = [key[0], f"{100 * key[1]:g}"]
        for eps in strengths:
            cells = [lines[key].cells.get(eps) if key in lines else None for lines in known]
            published = next((cell.paper for cell in cells if cell is not None and cell.paper), "")
            row += [*("–" if cell is None else cell.ours for cell in cells), published]
        rows.append(row)
    context = group[0].context
    lines = [f"**{network(context)}, {epochs(context)}: accuracy (%) under FGSM, by protocol**", ""]
    lines += [pipe(header), pipe(["---", *["---:"] * (len(header) - 1)]), *map(pipe, rows)]
    return "\n".join(lines) + "\n"


def _four(strengths: list[float]) -> list[float]:
    """The first, the last, and two between."""
    last = len(strengths) - 1
    return [strengths[i] for i in sorted({0, round(last / 3), round(2 * last / 3), last})]


def training(history: pd.DataFrame) -> str:
    """As Markdown: how each run went, its loss from the first epoch to the last, and its constraints.

    Args:
        history: see `condlr.report.results.read`.
    """
    names = ("orthonormality error", "cond(S)")
    header = ["row", "requested", "protocol", "seed", "epochs", "steps", "loss", "cond", *names]
    lines = [pipe(header), pipe(["---", *["---:"] * (len(header) - 1)])]
    trained = history[history["epoch"] > 0]
    trained = trained.assign(_place=order(trained["label"]))
    keys = ["protocol", "compression", "_place", "label", "run_id"]
    ordered = trained.sort_values([*keys, "epoch"])
    for (protocol, compression, _, label, _), run in ordered.groupby(keys, sort=False):
        first, last = run.iloc[0], run.iloc[-1]
        audits = [run[column].max() if column in run else float("nan") for column in _AUDITS]
        cells = [
            title(str(label)), f"{100 * float(compression):g}", str(protocol), str(last["seed"]),
            str(last["epoch"]), str(last["step"]),
            f"{first['train_loss']:.3f} → {last['train_loss']:.3f}", _number(last["cond"]),
            *("" if pd.isna(audit) else form(audit) for audit, form in zip(audits, _FORMS, strict=True)),
        ]  # fmt: skip
        lines.append(pipe(cells))
    return "\n".join([*lines, "", TRAINING_LEGEND]) + "\n"


def latex(table: Table) -> str:
    """As LaTeX: a `tabular` in a `table`, for the packages booktabs and graphicx."""
    header, rows = _flat(table, lambda cell: rf"\textbf{{{cell.ours}}}")
    lines = [
        r"\begin{table}", r"\centering\small", rf"\caption{{{_tex(table.caption)}.}}",
        r"\resizebox{\textwidth}{!}{%",
        rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}", r"\toprule",
        " & ".join(map(_tex, header)) + r" \\",
    ]  # fmt: skip
    remaining = iter(rows)
    for group in table.groups:
        lines.append(r"\midrule")
        lines += [" & ".join(map(_tex, next(remaining))) + r" \\" for _ in group]
    lines += [
        r"\bottomrule",
        r"\end{tabular}}",
        rf"\par\footnotesize {_tex(table.audit_note)}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def frame(table: Table) -> pd.DataFrame:
    """As data: a line for each cell, fractions and not percent."""
    return pd.DataFrame(
        table.context
        | {"row": line.label, "compression": line.compression, "eps": eps, "accuracy": cell.accuracy}
        | {"std": cell.std, "seeds": cell.seeds, "published": cell.published, "best": cell.best}
        for line in table.lines
        for eps, cell in line.cells.items()
    )


def _flat(table: Table, emphasise: Callable[[Cell], str]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of text, with a `published` column beside each eps where anything was published."""
    header = ["row", *table.lines[0].facts]
    for eps in table.strengths:
        header += [_strength(eps), *(["published"] if table.has_published else [])]
    rows = []
    for line in table.lines:
        row = [line.name, *line.facts.values()]
        for eps in table.strengths:
            paper = line.cells[eps].paper if eps in line.cells else ""
            row += [_shown(line, eps, emphasise), *([paper] if table.has_published else [])]
        rows.append(row)
    return header, rows


_TEX = {
    "%": r"\%", "_": r"\_", "ε": r"$\varepsilon$", "τ": r"$\tau$", "ℓ∞": r"$\ell_\infty$", "±": r"$\pm$",
    "–": "--", "†": r"$^\dagger$", "ℓ2": r"$\ell_2$", "‖x‖2": r"$\|x\|_2$", "×": r"$\times$",
}  # fmt: skip


def _tex(text: str) -> str:
    for plain, escaped in _TEX.items():
        text = text.replace(plain, escaped)
    return text
