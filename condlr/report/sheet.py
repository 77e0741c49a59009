"""What a table looks like, whatever it is written as."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field


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
    """A table: a caption, columns after the first, which names the rows, groups of rows, and notes below."""

    caption: str
    columns: Sequence[Column]
    groups: Sequence[Sequence[Row]]
    notes: Sequence[str] = field(default_factory=list)
    settings: Sequence[str] = field(default_factory=list)

    @property
    def marked(self) -> bool:
        """Whether any value is marked as the best."""
        return any(v.group_best or v.best for group in self.groups for row in group for v in row.values)

    def legend(self, group_best: str, best: str) -> list[str]:
        """The notes, and what the marks of a format mean."""
        marks = f"{group_best}: the best of the rows of its compression. {best}: the best of all rows."
        return [*self.notes, *([f"{marks} Means decide; ties are all marked."] if self.marked else [])]
