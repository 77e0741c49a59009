"""What a table looks like, whatever it is written as."""

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field, replace


def anchor(heading: str) -> str:
    """A heading as an address, formed as GitHub forms those of a Markdown file."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


# What a table prints where there is no value.
NONE = ("", "–")


@dataclass(frozen=True)
class Value:
    """A text in a table, and what it stands out by."""

    text: str
    group_best: bool = False
    best: bool = False
    beyond: bool = False


@dataclass(frozen=True)
class Column:
    """A column of values.

    Attributes:
        block: what stands above this and its neighbours of the same block.
        strength: one of several eps, of which a narrow terminal shows fewer.
        spare: a narrow terminal does without these columns, the lowest number first.
    """

    name: str
    block: str = ""
    strength: bool = False
    spare: int | None = None

    @property
    def heading(self) -> str:
        """For formats without a line for blocks."""
        return f"{self.block} {self.name}".lstrip()

    @property
    def folded(self) -> list[str]:
        """The heading in lines of some 14 characters."""
        return [*([self.block] if self.block else []), *textwrap.wrap(self.name, 14, break_long_words=False)]


@dataclass(frozen=True)
class Row:
    """A line of values; `kind` is `ours`, `published`, `camera-ready` or `difference`."""

    name: str
    values: Sequence[Value]
    kind: str = "ours"


@dataclass(frozen=True)
class Sheet:
    """A table: a caption, columns after the first, which names the rows, groups of rows, and notes below.

    Attributes:
        notes: what a reader must know of these numbers.
        rules: what numbers and signs of such tables mean; a page shows it when asked for.
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
        """Without columns in which no row of ours has a value, and rows of others that are empty then."""
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
        """The notes and rules, and what the marks of a format mean."""
        return [*self.notes, *self.explained(group_best, best)]

    def explained(self, group_best: str, best: str) -> list[str]:
        """The rules, and what the marks of a format mean."""
        marks = f"{group_best}: the best of the rows of its compression. {best}: the best of all rows."
        return [*self.rules, *([f"{marks} Means decide; ties are all marked."] if self.marked else [])]
