"""Tables of a study side by side: attacks of one strength, and protocols."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from condlr.report.results import BESIDE
from condlr.report.sheet import Column, Row, Sheet, Value
from condlr.report.tables import Line, Table, audit_note, strength
from condlr.report.titles import attack_title, epochs, network, norm_title, setting


@dataclass(frozen=True)
class Comparison:
    """The accuracy of each row under several attacks of one strength."""

    eps: float
    tables: Sequence[Table]

    @property
    def sheet(self) -> Sheet:
        """A column for each attack. Audit warnings and cells with fewer seeds are marked."""
        context = self.tables[0].context
        norm = norm_title(context["norm"])
        caption = f"{setting(context)}: accuracy (%) at ε={self.eps:g} ({norm}), by attack"
        attacks = [f"{attack_title(t.context['attack'])} (n={t.context['n']})" for t in self.tables]
        columns = [Column("requested"), *map(Column, attacks)]
        known = [_by_row(table, self.eps) for table in self.tables]
        groups: dict[float, list[Row]] = {}
        for label, compression in _rows(known):
            lines = [of_attack.get((label, compression)) for of_attack in known]
            most = max(line.cells[self.eps].seeds for line in lines if line is not None)
            values = [self._value(line, most) for line in lines]
            row = Row(label, [Value(f"{100 * compression:g}"), *values])
            groups.setdefault(compression, []).append(row)
        return Sheet(caption, columns, [*groups.values()], [audit_note(self._audited(known))])

    def _audited(self, known: Sequence[Mapping[tuple[str, float], Line]]) -> list[Line]:
        """Each row once, with the warnings of all its attacks, and its audits of the most runs."""
        found: dict[tuple[str, float], Line] = {}
        for of_attack in known:
            for key, line in of_attack.items():
                both = [one for one in (line, found.get(key)) if one is not None]
                every = dict.fromkeys(text for one in both for text in one.warnings)
                audited = max(one.audited for one in both)
                found[key] = replace(line, warnings=[*every], audited=audited)
        return [*found.values()]

    def _value(self, line: Line | None, most: int) -> Value:
        if line is None:
            return Value("–")
        cell = line.cells[self.eps]
        fewer = f" ({cell.seeds} of {most} seeds)" if cell.seeds < most else ""
        return Value(f"{cell.ours}{' †' if line.warnings else ''}{fewer}")


def by_attack(made: Sequence[Table]) -> Iterator[Comparison]:
    """Attacks of one strength side by side, for each strength at which there are several."""
    for group in _alike(made, BESIDE):
        for eps in sorted({eps for table in group for eps in table.strengths} - {0.0}):
            among = [table for table in group if _by_row(table, eps)]
            if len({table.context["attack"] for table in among}) > 1:
                yield Comparison(eps, sorted(among, key=lambda table: _mean(table, eps), reverse=True))


def _mean(table: Table, eps: float) -> tuple[int, float]:
    """Sort key: more images first, then weaker attacks first."""
    values = [line.cells[eps].accuracy or 0.0 for line in _by_row(table, eps).values()]
    return table.context["n"], sum(values) / len(values)


def _alike(made: Sequence[Table], names: Sequence[str]) -> Collection[list[Table]]:
    """Tables that share these parts of their context, together."""
    found: dict[tuple[Any, ...], list[Table]] = {}
    for table in made:
        found.setdefault(tuple(table.context[name] for name in names), []).append(table)
    return found.values()


def by_protocol(made: Sequence[Table]) -> Iterator[Sheet]:
    """The accuracy of each row under each protocol, beside the published value.

    For tables of one network, dataset and number of epochs under FGSM; a sheet for each of these that
    has several protocols, at four strengths at most.
    """
    fgsm = [table for table in made if table.context["attack"].startswith("fgsm")]
    for group in _alike(fgsm, ("dataset", "model", "epochs", "norm", "n")):
        # Two tables of one protocol with different settings would give columns of the same name.
        if len({table.context["protocol"] for table in group}) == len(group) > 1:
            yield _side_by_side(group)


def _side_by_side(group: Sequence[Table]) -> Sheet:
    known = [_by_row(table) for table in group]
    strengths = _four(sorted({eps for table in group for eps in table.strengths}))
    columns = [Column("requested")]
    for eps in strengths:
        names = [*(table.context["protocol"] for table in group), "arXiv v1"]
        columns += [Column(name, strength(eps)) for name in names]
    groups: dict[float, list[Row]] = {}
    for key in _rows(known):
        values = [Value(f"{100 * key[1]:g}")]
        for eps in strengths:
            cells = [lines[key].cells.get(eps) if key in lines else None for lines in known]
            published = next(
                (c.value("published") for c in cells if c and c.published is not None), Value("")
            )
            values += [*(cell.value("ours") if cell else Value("–") for cell in cells), published]
        # No best is marked here: the best row of a protocol is marked in the protocol's own table.
        groups.setdefault(key[1], []).append(Row(key[0], [Value(value.text) for value in values]))
    context = group[0].context
    caption = f"{network(context)}, {epochs(context)}: accuracy (%) under FGSM, by protocol"
    return Sheet(caption, columns, [*groups.values()])


def _by_row(table: Table, eps: float | None = None) -> dict[tuple[str, float], Line]:
    """The rows that were run, or those attacked at a strength."""
    return {
        (line.label, line.compression): line
        for line in table.lines
        if (line.ran if eps is None else eps in line.cells and line.cells[eps].accuracy is not None)
    }


def _rows(known: Sequence[dict[tuple[str, float], Line]]) -> list[tuple[str, float]]:
    """The rows of the longest table in its order, then rows of other tables; by compression."""
    keys = dict.fromkeys(key for lines in sorted(known, key=len, reverse=True) for key in lines)
    return sorted(keys, key=lambda key: key[1])


def _four(strengths: list[float]) -> list[float]:
    """The first, the last, and two between."""
    last = len(strengths) - 1
    return [strengths[i] for i in sorted({0, round(last / 3), round(2 * last / 3), last})]
