"""The results of analyses, in the layout that each class declares; for the terminal and as Markdown."""

import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table
from typing_extensions import override

from condlr.analysis.base import Analysis
from condlr.report import audit
from condlr.report.content import numeric
from condlr.report.markdown import piped
from condlr.report.numbers import shown
from condlr.report.results import ordered, read_those
from condlr.report.titles import run_titles
from condlr.suite.registry import analyses

# A terminal only gets the number of rows if there are more than this.
_MOST = 200


# Name, class and collected rows of an analysis.
Found = tuple[str, type[Analysis], pd.DataFrame]


class _Template(string.Formatter):
    """Formats `{column}` with `shown`, and `{column:.2f}` as usual."""

    @override
    def format_field(self, value: Any, format_spec: str) -> str:
        return format(value, format_spec) if format_spec else shown(value)


_TEMPLATE = _Template()


def found(study: Path) -> Iterator[Found]:
    """Name, class and collected rows of each analysis of a study that pages show, in order."""
    kinds = {name: kind for name, kind in analyses().items() if kind.layout != "none"}
    for name, frame in read_those(study, kinds).items():
        yield name, kinds[name], frame


def print_analysis(kind: type[Analysis], rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print a line for each row; print a single row as a column."""
    if kind.layout == "checks":
        audit.print_audit(rows, console)
    elif len(rows) > _MOST:
        console.print(f"{kind.title}: {len(rows)} rows", highlight=False)
    elif rows:
        values = [{key: _value(text) for key, text in row.items()} for row in rows]
        templates = kind.columns or {key: f"{{{key}}}" for key in rows[0]}
        cells = [_filled(templates, row) for row in values]
        if len(cells) == 1:
            print_cells([*zip(templates, cells[0], strict=True)], [], console)
        else:
            print_cells(cells, [*templates], console)


def print_cells(cells: Sequence[Sequence[str]], header: Sequence[str], console: Console) -> None:
    """Print a table of text, with numbers aligned to the right."""
    view = Table(box=None, pad_edge=False, header_style="bold", show_header=bool(header))
    right = numeric(cells)
    for number, name in zip(right, header or [""] * len(right), strict=True):
        view.add_column(name, justify="right" if number else "left", overflow="fold", no_wrap=number)
    for row in cells:
        view.add_row(*row)
    console.print(view, highlight=False)


def markdown(kind: type[Analysis], frame: pd.DataFrame) -> str:
    """The rows as Markdown, in the layout of the class."""
    if kind.layout == "checks":
        return audit.markdown(frame)
    return _by_run(kind, frame) if kind.layout == "runs" else _by_row(kind, frame)


def _by_row(kind: type[Analysis], frame: pd.DataFrame) -> str:
    """A line for each run and row."""
    titles = run_titles(frame)
    rows = [[titles[row["run_id"]], *_filled(kind.columns, row)] for row in _ordered(frame)]
    named = [name for _, name, _, _ in string.Formatter().parse(kind.legend) if name]
    values = {name: ", ".join(map(str, sorted(frame[name].unique()))) for name in named}
    return _page(kind, ["run", *kind.columns], rows, kind.legend.format_map(values))


def _by_run(kind: type[Analysis], frame: pd.DataFrame) -> str:
    """A line for each key, a column for each run, then the other columns of the first run."""
    titles, names = run_titles(frame), {}
    values: dict[str, dict[str, str]] = {}
    besides: dict[str, list[str]] = {}
    for row in _ordered(frame):
        key, value, *rest = _filled(kind.columns, row)
        names[row["run_id"]] = titles[row["run_id"]]
        values.setdefault(key, {})[row["run_id"]] = value
        besides.setdefault(key, rest)
    first, _, *others = kind.columns
    header = [first, *names.values(), *(f"{name} ({next(iter(names.values()))})" for name in others)]
    rows = [[key, *(of_key.get(run, "–") for run in names), *besides[key]] for key, of_key in values.items()]
    return _page(kind, header, rows, kind.legend)


def _page(kind: type[Analysis], header: Sequence[str], rows: Sequence[Sequence[str]], legend: str) -> str:
    table = piped(header, rows, left=range(len(header)))
    return f"**{kind.caption or kind.title}**\n\n{table}\n" + (f"\n{legend}\n" if legend else "")


def _filled(templates: Mapping[str, str], row: Mapping[str, Any]) -> list[str]:
    return [_TEMPLATE.vformat(template, (), row) for template in templates.values()]


def _value(text: Any) -> Any:
    """A field that was read as text: a number if it is one, None if it is empty."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return None if text == "" else text


def _ordered(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows, by run in the order of the tables."""
    return ordered(frame, ["compression", "label", "seed", "run_id"]).to_dict("records")
