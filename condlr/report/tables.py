"""Tables of accuracy under attack: our results beside the published ones."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from condlr.report import numbers, results, titles
from condlr.report.audit import Marks
from condlr.report.numbers import counted
from condlr.report.protocols import differences
from condlr.report.published import NUMBERS, slips
from condlr.report.sheet import Column, Row, Sheet, Value

LEGEND = (
    "requested, measured, deployed: compression (%) asked for, of the weights trained, and of the exported "
    "network. cond: largest condition number of the factored layers (of all layers where none is); "
    "cond all: of all layers, the dense classifier among them. s: seconds of training. "
    "±: sample standard deviation over seeds."
)
_PUBLISHED = "arXiv v1: as Tables 2 and 3 of arXiv 2306.01485v1 print, after 120 epochs."
_QUOTED = "camera-ready: the NeurIPS 2023 version, as arXiv 2505.08022 quotes it."
_DIFFERENCE = (
    "difference: ours less arXiv v1 (less camera-ready where v1 has no value), in points. ‡: it exceeds two "
    "sample standard deviations of ours, which at least two seeds have"
)

# What is told of a row beside its accuracies.
_FACTS = ("measured", "deployed", "cond", "cond all", "seeds", "s")
# Those that a narrow terminal hides, in this order.
_SPARE = ("cond all", "deployed", "s", "seeds", "measured", "cond")
# The paper attacked all test images of either dataset.
_TEST_IMAGES = 10_000
# What a study of the paper's rows is trained by
_PROTOCOLS = ("paper", "released_code")


@dataclass(frozen=True)
class Cell:
    """Accuracies at one strength, as fractions: ours with its spread over seeds, and the published ones."""

    accuracy: float | None = None
    std: float = float("nan")
    seeds: int = 0
    published: float | None = None
    camera_ready: float | None = None
    group_best: bool = False
    best: bool = False

    @property
    def ours(self) -> str:
        """The accuracy in percent, with ± if there are several seeds."""
        return numbers.accuracy(self.accuracy, self.std)

    @property
    def difference(self) -> float | None:
        """Ours minus the published one (arXiv v1 before camera-ready), a fraction."""
        published = self.camera_ready if self.published is None else self.published
        return None if self.accuracy is None or published is None else self.accuracy - published

    @property
    def beyond(self) -> bool:
        """Whether the difference exceeds two standard deviations of ours, which at least two seeds have."""
        known = self.difference is not None and self.seeds > 1
        return known and abs(self.difference) - 2 * self.std > 1e-9  # a tie up to rounding is not above

    def value(self, kind: str) -> Value:
        """The text in a row of this kind, see `condlr.report.sheet.Row`."""
        if kind == "ours":
            return Value(self.ours, self.group_best, self.best)
        if kind == "difference":
            text = "" if self.difference is None else numbers.points(self.difference)
            return Value(text, beyond=self.beyond)
        known = self.published if kind == "published" else self.camera_ready
        return Value("" if known is None else numbers.accuracy(known))


# The kinds of rows that a line of a table is printed as, and their names.
_KINDS = {
    "ours": "", "published": "  arXiv v1", "camera-ready": "  camera-ready", "difference": "  difference"
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A row of a table; not every row was run, or attacked at every strength.

    Attributes:
        label: its title, with the variant.
        method: the label of its runs.
        audited: how many of its runs were audited, and how many there are.
    """

    label: str
    method: str
    compression: float
    facts: dict[str, str]
    cells: dict[float, Cell]
    warnings: Sequence[str] = ()
    audited: tuple[int, int] = (0, 0)
    measured: float | None = None

    @property
    def name(self) -> str:
        """The label, marked if an audit warned."""
        return f"{self.label} †" if self.warnings else self.label

    @property
    def described(self) -> str:
        """The label and the compression."""
        return f"{self.label} {100 * self.compression:g} %" if self.compression else self.label

    @property
    def ran(self) -> bool:
        """Whether any cell is ours."""
        return any(cell.accuracy is not None for cell in self.cells.values())

    @property
    def kinds(self) -> list[str]:
        """The kinds of rows that have values, ours first."""
        cells = self.cells.values()
        return [k for k in _KINDS if k == "ours" or any(cell.value(k).text for cell in cells)]


@dataclass(frozen=True)
class Table:
    """Rows in the order of the paper, in groups of one compression.

    Attributes:
        number: of the paper's table whose rows these are, if they are; then every row that it has is
            here, run or not.
        differences: how these runs differ from what the paper says, where it published anything.
        slips: what Table 1 of the paper prints differently.
    """

    context: Mapping[str, Any]
    lines: list[Line] = field(default_factory=list)
    number: int | None = None
    differences: Sequence[str] = ()
    slips: Sequence[str] = ()

    @property
    def caption(self) -> str:
        """What the rows share."""
        known, number = self.context, f"Table {self.number}. " if self.number else ""
        attack = f"{titles.attack_title(known['attack'])} ({titles.norm_title(known['norm'])})"
        return f"{number}{titles.setting(known)}: accuracy (%) under {attack}, {known['n']:,} images"

    @property
    def audit_note(self) -> str:
        """What audits say of the rows."""
        return audit_note(self.lines)

    @property
    def missing(self) -> str:
        """The rows of the paper that were not run; empty if all were run, or no row is the paper's."""
        absent = [line.described for line in self.lines if not line.ran]
        return f"Not run yet, {len(absent)} of the paper's rows: {', '.join(absent)}." if absent else ""

    @property
    def strengths(self) -> list[float]:
        """Every eps that any row has."""
        return sorted({eps for line in self.lines for eps in line.cells})

    @property
    def has_published(self) -> bool:
        """Whether any cell has a published value."""
        return any(len(line.kinds) > 1 for line in self.lines)

    @property
    def notes(self) -> list[str]:
        """Notes on these numbers, then the rules of all such tables."""
        return [*self.sheet.notes, *self.sheet.rules]

    @property
    def sheet(self) -> Sheet:
        """As a sheet: below a row of ours, rows of published values and of differences."""
        part = _Part(self, "", _FACTS, self.strengths)
        notes = [note for note in (self.missing, self.audit_note) if note]
        rules = [*_published_notes([self]), LEGEND]
        return _sheet(self.caption, [part], notes, [self.context["settings"]], rules)


def _published_notes(made: Sequence[Table]) -> list[str]:
    """What published values are, and how ours are made otherwise."""
    kinds = {kind for table in made for line in table.lines for kind in line.kinds}
    notes = []
    if "published" in kinds:
        notes.append(_PUBLISHED)
    if "camera-ready" in kinds:
        notes.append(_QUOTED)
    if "difference" in kinds:
        single = all(cell.seeds < 2 for t in made for line in t.lines for cell in line.cells.values())
        notes.append(f"{_DIFFERENCE}{' (no row here has them)' if single else ''}.")
    for table in made:
        if table.differences:
            of = f"{titles.network(table.context)}, what differs" if len(made) > 1 else "What differs"
            notes.append(f"{of} from the paper's text. {'. '.join(table.differences)}.")
    return [*notes, *(slip for table in made for slip in table.slips)]


def audit_note(lines: Iterable[Line]) -> str:
    """One sentence or two: which rows an audit warned of, and which were not audited."""
    lines = [line for line in lines if line.ran]
    warned = [f"{line.described} ({', '.join(line.warnings)})" for line in lines if line.warnings]
    missing = [line.described for line in lines if not line.audited[0]]
    partly: dict[tuple[int, int], list[str]] = {}
    for line in lines:
        if 0 < line.audited[0] < line.audited[1]:
            partly.setdefault(line.audited, []).append(line.described)
    if len(missing) == len(lines) and not warned:
        return "No row was audited in this norm (analysis=audit): read these accuracies as upper bounds."
    told = f"† not to be trusted, the audit warns: {'; '.join(warned)}."
    notes = [told if warned else "The audit warns of no row."]
    for (audited, runs), names in partly.items():
        rows = "every row" if len(names) == len(lines) else ", ".join(names)
        notes.append(f"Audited with {audited} of {counted(runs, 'seed')}: {rows}.")
    notes += [f"Not audited: {', '.join(missing)}."] if missing else []
    return " ".join(notes)


def tables(cells: pd.DataFrame, paper: Path, marks: Marks | None = None) -> Iterator[Table]:
    """A table for each combination of dataset, model, protocol with its settings, and attack in a study."""
    for known, frame in results.contexts(results.summarize(cells)):
        mine = results.own(known, cells)
        printed = _printed(known, mine, paper)
        asked = known["n"] == _TEST_IMAGES and known["protocol"] in _PROTOCOLS
        first_version = any(c.published is not None for row in printed.values() for c in row.values())
        number = NUMBERS.get((known["model"], known["dataset"])) if asked and first_version else None
        lines = []
        for key, row in results.by_row(_with_best(frame)):
            beside = printed.get((key.label, key.compression), {})
            row_cells = dict(beside) if number else {}
            for cell in row.to_dict("records"):
                ours = {name: cell[name] for name in ("accuracy", "std", "seeds", "group_best", "best")}
                row_cells[cell["eps"]] = replace(beside.get(cell["eps"], Cell()), **ours)
            marks = marks or Marks(None)
            warnings = marks.of(key.row_id, known["norm"], known["attack"])
            runs = {*mine.loc[mine["row_id"].eq(key.row_id), "run_id"]}
            audited = len(runs & marks.audited(key.row_id, known["norm"])), len(runs)
            name, measured = titles.title(key.label, key.variant), row.iloc[0]["train_compression"]
            facts = _facts(row)
            lines.append(
                Line(name, key.label, key.compression, facts, row_cells, warnings, audited, measured)
            )
        if number:
            ran = {(line.method, line.compression) for line in lines}
            lines += [_not_run(*key, row) for key, row in printed.items() if key not in ran]
            # By compression, then as in the paper; variants of a row keep their order
            lines.sort(key=lambda line: (line.compression, titles.place(line.method), line.method))
        told = differences(known, mine) if printed else []
        yield Table(known, lines, number, told, _slips(known, paper) if number else ())


def _printed(
    context: Mapping[str, Any], cells: pd.DataFrame, paper: Path
) -> dict[tuple[str, float], dict[float, Cell]]:
    """Cells of published values alone, by label and compression, then by eps."""
    first, second = results.comparison(context, cells, paper), results.quoted(context, cells, paper)
    printed: dict[tuple[str, float], dict[float, Cell]] = {}
    for key in dict.fromkeys([*first, *second]):
        label, compression, eps = key
        cell = Cell(published=first.get(key), camera_ready=second.get(key))
        printed.setdefault((label, compression), {})[eps] = cell
    return printed


def _with_best(frame: pd.DataFrame) -> pd.DataFrame:
    """The cells with `group_best` and `best`; a cell without a rival is neither."""
    accuracy = frame["accuracy"].round(9)  # means over seeds may differ by rounding only
    marks = {}
    for mark, keys in {"group_best": ["compression", "eps"], "best": ["eps"]}.items():
        rivals = accuracy.groupby([frame[key] for key in keys])
        marks[mark] = rivals.transform("max").eq(accuracy) & rivals.transform("size").gt(1)
    return frame.assign(**marks)


def _facts(row: pd.DataFrame) -> dict[str, str]:
    first, fewest, most = row.iloc[0], row["seeds"].min(), row["seeds"].max()
    return {
        "requested": f"{100 * first['compression']:g}",
        "measured": numbers.rounded(first["train_compression"]),
        "deployed": numbers.rounded(first["deploy_compression"]),
        "cond": numbers.condition(first["cond"]),
        "cond all": numbers.condition(first["cond_all"]),
        "seeds": f"{most}" if fewest == most else f"{fewest}-{most}",
        "s": f"{first['seconds']:.0f}",
    }


def _not_run(label: str, compression: float, cells: dict[float, Cell]) -> Line:
    facts = {"requested": f"{100 * compression:g}"} | dict.fromkeys(_FACTS, "–")
    return Line(titles.title(label), label, compression, facts, cells)


def _slips(context: Mapping[str, Any], paper: Path) -> list[str]:
    """A sentence for each row of which Table 1 prints other values."""
    number = NUMBERS[context["model"], context["dataset"]]
    found: dict[tuple[str, float], list] = {}
    for slip in slips(paper, context["dataset"], context["model"]):
        found.setdefault((slip.label, slip.compression), []).append(slip)
    return [
        f"{titles.network(context)}, {titles.title(label)} at {100 * compression:g} %, "
        f"ε={_listed(s.eps for s in row)}: Table 1 prints {_listed(100 * s.first for s in row)}, "
        f"Table {number} prints {_listed(100 * s.other for s in row)}."
        for (label, compression), row in found.items()
    ]


def _listed(numbers: Iterable[float]) -> str:
    return ", ".join(f"{number:.4g}" for number in numbers)


def strength(eps: float) -> str:
    """As columns are headed."""
    return f"ε={eps:g}" if eps else "clean"


class _Part(NamedTuple):
    """The columns of one table in a sheet."""

    table: Table
    block: str
    facts: Sequence[str]
    strengths: Sequence[float]

    @property
    def columns(self) -> list[Column]:
        facts = [Column(n, self.block, spare=_SPARE.index(n) if n in _SPARE else None) for n in self.facts]
        return facts + [Column(strength(eps), self.block, strength=True) for eps in self.strengths]

    def values(self, line: Line | None, kind: str) -> list[Value]:
        none = Value("–" if kind == "ours" else "")
        if line is None:
            return [none] * (len(self.facts) + len(self.strengths))
        facts = [Value(line.facts[name] if kind == "ours" else "") for name in self.facts]
        return facts + [line.cells[e].value(kind) if e in line.cells else none for e in self.strengths]


def _sheet(caption: str, parts: Sequence[_Part], *notes: Sequence[str]) -> Sheet:
    """Put tables side by side; rows of the same name and compression are merged."""
    known = [{(line.compression, line.label): line for line in part.table.lines} for part in parts]
    groups: dict[float, list[Row]] = {}
    for key in dict.fromkeys(key for lines in known for key in lines):
        own = [lines.get(key) for lines in known]
        some = [line for line in own if line is not None]
        for kind, name in _KINDS.items():
            if any(kind in line.kinds for line in some):
                named = name or max((line.name for line in some), key=len)  # a marked name is longer
                requested = Value(some[0].facts["requested"] if kind == "ours" else "")
                values = [v for part, line in zip(parts, own, strict=True) for v in part.values(line, kind)]
                groups.setdefault(key[0], []).append(Row(named, [requested, *values], kind))
    columns = [Column("requested")]
    columns += [column for part in parts for column in part.columns]
    return Sheet(caption, columns, [groups[compression] for compression in sorted(groups)], *notes)


def table1(made: Sequence[Table], paper: Path) -> Iterator[Sheet]:
    """Table 1 of the paper, for each protocol: Table 2 and Table 3 at four strengths, side by side.

    The tables may be of several studies. A network that was not trained has columns of what was published.
    """
    ours = {n: [table for table in made if table.number == n] for n in NUMBERS.values()}
    for protocol in dict.fromkeys(t.context["protocol"] for tables in ours.values() for t in tables):
        alike = [[t for t in tables if t.context["protocol"] == protocol] for tables in ours.values()]
        for pair in zip_longest(*alike):
            parts, which = [], []
            for table, (model, name) in zip(pair, NUMBERS, strict=True):
                table = table or _only_published(model, name, paper)
                strengths = table.strengths if not table.number else _published_strengths(table)
                block = titles.dataset(table.context)
                parts.append(_Part(table, block, ("measured", "seeds"), strengths[::2]))
                trained = titles.epochs(table.context) if table.number else "not run"
                which.append(f"{titles.network(table.context)} ({trained})")
            shown = [part.table for part in parts]
            notes = [f"{titles.network(t.context)}: {t.missing}" for t in shown if t.number and t.missing]
            notes += [f"{titles.network(t.context)}: {t.audit_note}" for t in shown if t.number]
            settings = [f"{t.context['dataset']}: {t.context['settings']}" for t in shown if t.number]
            caption = f"Table 1. {' and '.join(which)}, protocol {protocol}: accuracy (%) under FGSM (ℓ∞)"
            yield _sheet(caption, parts, notes, settings, [*_published_notes(shown), LEGEND])


def _only_published(model: str, name: str, paper: Path) -> Table:
    """A table without any of our runs."""
    context = {"model": model, "dataset": name, "attack": "fgsm", "norm": "linf", "settings": ""}
    rows = _printed(context, pd.DataFrame({"official_data": []}), paper)
    lines = [_not_run(*key, cells) for key, cells in rows.items()]
    return Table(context, lines, slips=_slips(context, paper))


def _published_strengths(table: Table) -> list[float]:
    return sorted({e for line in table.lines for e, c in line.cells.items() if c.published is not None})


def frame(table: Table) -> pd.DataFrame:
    """The tables as data: a line for each cell. Values are fractions, except the requested percentage."""
    return pd.DataFrame(
        {
            **{name: table.context[name] for name in results.CONTEXT}, "table": table.number,
            "row": line.label, "requested": line.compression,
            "measured": line.measured, "eps": eps, "v1": cell.published, "camera_ready": cell.camera_ready,
            "accuracy": cell.accuracy, "std": cell.std, "seeds": cell.seeds, "difference": cell.difference,
            "beyond": cell.beyond, "group_best": cell.group_best, "best": cell.best,
        }
        for line in table.lines
        for eps, cell in line.cells.items()
    )  # fmt: skip
