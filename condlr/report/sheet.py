"""A table independent of its output format."""

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field, replace


def anchor(heading: str) -> str:
    """The address of a heading, as GitHub derives it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


# What a table prints for a missing value.
NONE = ("", "–")


@dataclass(frozen=True)
class Value:
    """A text in a table, and its marks."""

    text: str
    group_best: bool = False
    best: bool = False
    beyond: bool = False


@dataclass(frozen=True)
class Column:
    """A column of values.

    Attributes:
        block: the common heading of neighbouring columns.
        strength: whether this is one of several eps; a narrow terminal shows fewer of them.
        spare: a narrow terminal hides such columns, the lowest number first; None is never hidden.
    """

    name: str
    block: str = ""
    strength: bool = False
    spare: int | None = None

    @property
    def heading(self) -> str:
        """The name after that of the block, for formats that have no line for blocks."""
        return f"{self.block} {self.name}".lstrip()

    @property
    def folded(self) -> list[str]:
        """The heading, wrapped to about 14 characters."""
        return [*([self.block] if self.block else []), *textwrap.wrap(self.name, 14, break_long_words=False)]


@dataclass(frozen=True)
class Row:
    """A named line of values; `kind` is `ours`, `published`, `camera-ready` or `difference`."""

    name: str
    values: Sequence[Value]
    kind: str = "ours"


@dataclass(frozen=True)
class Sheet:
    """A table: a caption, columns after the one with the names of rows, groups of rows, and notes.

    Attributes:
        notes: what a reader must know about these numbers.
        rules: what numbers and signs mean in all such tables; a page folds them away.
    """

    caption: str
    columns: Sequence[Column]
    groups: Sequence[Sequence[Row]]
    notes: Sequence[str] = field(default_factory=list)
    settings: Sequence[str] = field(default_factory=list)
    rules: Sequence[str] = field(default_factory=list)

    @property
    def marked(self) -> bool:
        """Whether any value is marked as the best."""
        return any(v.group_best or v.best for group in self.groups for row in group for v in row.values)

    @property
    def run(self) -> "Sheet":
        """Drop columns in which none of our rows has a value, and the rows that this empties."""
        ours = [row for group in self.groups for row in group if row.kind == "ours"]
        kept = [i for i in range(len(self.columns)) if any(row.values[i].text not in NONE for row in ours)]

        def cut(row: Row) -> Row:
            return replace(row, values=[row.values[i] for i in kept])

        groups = [
            [row for row in map(cut, group) if row.kind == "ours" or any(v.text for v in row.values)]
            for group in self.groups
        ]
        return replace(self, columns=[self.columns[i] for i in kept], groups=groups)

    def legend(self, group_best: str, best: str) -> list[str]:
        """The notes, the rules, and the meaning of the marks."""
        return [*self.notes, *self.explained(group_best, best)]

    def explained(self, group_best: str, best: str) -> list[str]:
        """The rules, and the meaning of the marks."""
        marks = f"{group_best}: the best of the rows of its compression. {best}: the best of all rows."
        return [*self.rules, *([f"{marks} Means decide; ties are all marked."] if self.marked else [])]
